//! A real server over real TLS on loopback, and nodes that join it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hyper::Method;
use meshd::membership::address::ServerAddress;
use meshd::membership::agent::keep::{Keep, Membership};
use meshd::membership::agent::{Agent, Command, Heard, View};
use meshd::membership::api::{JoinAnswer, JoinRequest, Myself, TokenProof};
use meshd::membership::client::{ClientError, Connection};
use meshd::membership::clock::Now;
use meshd::membership::link::{FromSidecar, Hello, Peers, Status};
use meshd::membership::random;
use meshd::membership::record::{Mode, NodeRecord, Role};
use meshd::membership::registry::{Registry, Setup};
use meshd::membership::server::Server;
use meshd::membership::settings::{MaskSizes, PurgeAfter, Secret, Settings};
use meshd::membership::store::sqlite::Sqlite;
use meshd::membership::tls::Trust;
use meshd::membership::token::Token;
use rustls::pki_types::CertificateDer;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

pub(crate) struct Cluster {
    pub(crate) registry: Arc<Registry>,
    pub(crate) server: Server,
    pub(crate) dir: Arc<TempDir>,
    store: Sqlite,
    setup: Setup,
}

pub(crate) fn setup() -> Setup {
    Setup {
        cidrs: vec!["10.42.0.0/16".parse().unwrap()],
        masks: MaskSizes { v4: 24, v6: 64 },
        secret: None,
        purge_after: PurgeAfter::Off,
        ..Setup::default()
    }
}

pub(crate) async fn cluster() -> Cluster {
    Cluster::open(Arc::new(TempDir::new().unwrap()), setup(), "127.0.0.1:0".parse().unwrap()).await
}

impl Cluster {
    pub(crate) async fn open(dir: Arc<TempDir>, setup: Setup, address: SocketAddr) -> Self {
        let store = Sqlite::open(&dir.path().join("db")).await.unwrap();
        let registry = Registry::open(Arc::new(store.clone()), setup.clone(), Now::read()).await.unwrap();
        let registry = Arc::new(registry);
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let server = Server::start(address, registry.clone(), &names).await.unwrap();
        registry.set_servers(vec![server.address().into()]);
        Cluster { registry, server, dir, store, setup }
    }

    /// Stops, and returns what is needed to start again at the same place.
    pub(crate) async fn stop(self) -> (Arc<TempDir>, Setup, SocketAddr) {
        let address = self.server.address();
        drop(self.server);
        drop(self.registry);
        self.store.close().await;
        drop(self.store);
        tokio::time::sleep(Duration::from_millis(500)).await;
        (self.dir, self.setup, address)
    }

    pub(crate) fn address(&self) -> ServerAddress {
        self.server.address().into()
    }

    pub(crate) async fn token(&self, role: Role, uses: Option<u32>) -> Token {
        self.registry.mint(Now::read(), role, Some(3600), uses, None, "").await.unwrap()
    }

    pub(crate) fn ca(&self) -> CertificateDer<'static> {
        self.registry.authority().certificate().clone()
    }
}

/// An underlay address that no other node of this run has.
pub(crate) fn underlay() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0a09_0000 + n)), 8472)
}

pub(crate) fn myself() -> Myself {
    Myself {
        underlay: vec![underlay()],
        public_keys: vec![base64::Engine::encode(&base64::engine::general_purpose::STANDARD, random::bytes::<32>())],
        encryption: Mode::Wireguard,
        labels: BTreeMap::new(),
        taints: vec![],
    }
}

pub(crate) fn request(keep: &Keep, name: &str, role: Role) -> JoinRequest {
    JoinRequest {
        name: name.to_owned(),
        role,
        myself: myself(),
        control_only: false,
        request: keep.request().unwrap(),
        clock: Now::read().unix,
        token: None,
    }
}

/// A node that joined without an agent: for asking what no agent asks.
pub(crate) struct Joined {
    pub(crate) keep: Keep,
    pub(crate) member: Membership,
    _dir: TempDir,
}

pub(crate) async fn join_raw(
    server: &ServerAddress,
    keep: &Keep,
    token: &Token,
    request: JoinRequest,
) -> Result<JoinAnswer, ClientError> {
    let mut connection = Connection::open(server, Trust::Hash(token.ca_hash), None).await?;
    let secret = Secret::new(random::hex(&token.secret.0));
    let mut join = request;
    join.request = keep.request().unwrap();
    join.token = Some(TokenProof { id: token.id.to_string(), secret });
    connection.ask(Method::POST, "/v1/join", &join).await
}

pub(crate) async fn join(server: &ServerAddress, token: &Token, name: &str, role: Role) -> Result<Joined, ClientError> {
    let dir = TempDir::new().unwrap();
    let keep = Keep::open(dir.path()).unwrap();
    let answer = join_raw(server, &keep, token, request(&keep, name, role)).await?;
    let member = keep.joined(name, role, &answer).unwrap();
    Ok(Joined { keep, member, _dir: dir })
}

impl Joined {
    pub(crate) async fn connect(&self, cluster: &Cluster) -> Connection {
        let identity = self.keep.client_identity(&self.member);
        Connection::open(&cluster.address(), Trust::Ca(cluster.ca()), Some(identity)).await.unwrap()
    }
}

/// A whole agent.
pub(crate) struct Node {
    pub(crate) hello: watch::Sender<Hello>,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) view: View,
    pub(crate) out: mpsc::Receiver<FromSidecar>,
    pub(crate) task: JoinHandle<()>,
}

pub(crate) fn hello(name: &str) -> Hello {
    let Myself { underlay, public_keys, encryption, .. } = myself();
    Hello { name: name.to_owned(), underlay, public_keys, encryption }
}

pub(crate) fn agent_settings(dir: &Path, token: Option<&str>, servers: &[ServerAddress]) -> Settings {
    let mut settings = Settings::new(Role::Agent, dir);
    settings.token = token.map(Secret::new);
    settings.servers = servers.iter().map(ToString::to_string).collect();
    settings
}

impl Node {
    pub(crate) fn start(settings: Settings, said: Hello) -> Self {
        let (hello, heard) = watch::channel(said);
        let (commands, orders) = mpsc::channel(4);
        let (sender, out) = mpsc::channel(1024);
        let view = View::default();
        let heard = Heard { hello: heard, reached: watch::channel(Peers::default()).1 };
        let agent = Agent::new(settings, heard, orders, view.clone(), sender).unwrap();
        let task = tokio::spawn(agent.run());
        Node { hello, commands, view, out, task }
    }

    /// Waits until the status is as wanted.
    pub(crate) async fn until(&self, what: &str, good: impl Fn(&Status) -> bool) -> Status {
        let mut status = self.view.status.subscribe();
        // three times what the slowest takes: a handshake's time limit, and the pause after it
        let result = tokio::time::timeout(Duration::from_secs(60), status.wait_for(|s| good(s))).await;
        match result {
            Ok(Ok(status)) => status.clone(),
            _ => panic!("{what}: {:?}", self.view.status.borrow()),
        }
    }

    pub(crate) async fn until_nodes(&self, what: &str, good: impl Fn(&[NodeRecord]) -> bool) -> Vec<NodeRecord> {
        for _ in 0..400 {
            let nodes = self.view.nodes();
            if good(&nodes) {
                return nodes;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("{what}: {:?}", self.view.nodes().iter().map(|n| n.name.clone()).collect::<Vec<_>>());
    }
}
