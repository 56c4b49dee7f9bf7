//! The sidecar: what `meshd` says on the link becomes membership, and what membership brings goes back.
//!
//! Builds and connects; ends when the link closes. In server role it holds the registry and serves it, and its own node is
//! a member like any other; as an agent it knows servers. Knows nothing of how either works.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::address::{BadServerAddress, ServerAddress};
use super::agent::keep::KeepError;
use super::agent::{Agent, AgentError, Command, Heard, View, forward, local, matrix_of};
use super::clock::Now;
use super::etcd::{Managed, ManagedError};
use super::files::{self, FileError};
use super::link::{FromMeshd, FromSidecar, Hello, Peers, Refusal, Request, Status};
use super::matrix::{Matrix, Missing, whole};
use super::random;
use super::record::{NodeRecord, Role};
use super::registry::{OpenError, Proof, Refused, Registry, Setup};
use super::server::{Server, ServerError};
use super::settings::{Datastore, Settings};
use super::store::endpoint::redacted;
use super::store::{self, Store, StoreError};
use super::token::{Credential, Token};

/// Messages that wait for `meshd`.
const WAITING: usize = 64;
/// The largest line that `meshd` may send.
const MAX_LINE: u64 = 4 << 20;
/// What fails at the start is tried again after so long.
const RETRY: Duration = Duration::from_secs(5);
/// What depends on other servers that come up at the same time.
const RETRY_JOIN: Duration = Duration::from_secs(1);
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The database of a server.
pub const DATABASE: &str = "server/membership.db";
/// Which cluster a server has served, and, on its second line, in which store it is.
const CLUSTER_ID: &str = "server/cluster-id";
/// The id of a cluster that is about to be made.
const CANDIDATE: &str = "server/cluster-id.new";
/// What whoever wants a token for another server is told.
const ONE_SERVER: &str = "no token for a further server: servers of one cluster need a datastore that they share \
                          (`cluster-init: true`, or `datastore-endpoint`), and this one keeps its state in SQLite. `--role agent` makes a token for \
                          everything else";
/// A token for agents, or the pre-shared secret.
pub const NODE_TOKEN: &str = "server/node-token";

/// Why the sidecar ended.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// The link.
    #[error("the link to meshd: {0}")]
    Link(#[from] io::Error),
    /// What `meshd` said.
    #[error("meshd sent what is no message ({0}); are both of the same version?")]
    Message(#[from] serde_json::Error),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A server's own node.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The registry.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The endpoint.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// A change.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The servers' own etcd.
    #[error(transparent)]
    Managed(#[from] ManagedError),
    /// A `server:` that is none.
    #[error(transparent)]
    Address(#[from] BadServerAddress),
    /// More than one server needs a store that they share.
    #[error(
        "`server` or a `mesh1…` token joins a further server to a cluster, which needs a datastore that they share: set \
         `datastore-endpoint` to that of the cluster's servers. Remove `server` (and that token) to make a cluster, or run \
         `meshd agent`"
    )]
    SecondServer,
}

/// Runs on a link whose first line, the settings, has been read.
pub async fn run(settings: Settings, link: UnixStream) -> Result<(), SidecarError> {
    let (read, mut write) = link.into_split();
    let (out, mut waiting) = mpsc::channel::<FromSidecar>(WAITING);
    let mut writer = tokio::spawn(async move {
        while let Some(message) = waiting.recv().await {
            let mut line = serde_json::to_vec(&message)?;
            line.push(b'\n');
            write.write_all(&line).await?;
        }
        Ok::<(), SidecarError>(())
    });
    let result = linked(settings, read, out).await;
    // What was said last, such as why it ends, is to arrive; but a `meshd` that does not read is not waited for.
    if tokio::time::timeout(LAST_WORDS, &mut writer).await.is_err() {
        writer.abort();
    }
    result
}

async fn linked(settings: Settings, read: OwnedReadHalf, out: mpsc::Sender<FromSidecar>) -> Result<(), SidecarError> {
    let mut lines = BufReader::new(tokio::io::AsyncReadExt::take(read, MAX_LINE));
    let view = View::default();
    let (commands, orders) = mpsc::channel(4);
    let mut orders = Some(orders);
    let (serving, registry) = watch::channel::<Option<Arc<Registry>>>(None);
    let mut hello: Option<watch::Sender<Hello>> = None;
    let reached = watch::Sender::new(Peers::default());
    let mut tasks: JoinSet<Result<(), SidecarError>> = JoinSet::new();
    tasks.spawn(tell_status(view.clone(), out.clone()));
    if let Some(port) = settings.lb_server_port {
        let status = view.status.subscribe();
        tasks.spawn(async move {
            forward::run(port, status).await;
            Ok(())
        });
    }
    let data_dir = settings.data_dir.clone();
    let desk = Desk { role: settings.role, data_dir, view: view.clone(), registry, commands };
    let mut line = Vec::new();
    loop {
        // `line` keeps what was read so far when another branch wins.
        tokio::select! {
            read = lines.read_until(b'\n', &mut line) => {
                match read {
                    Ok(1..) if line.ends_with(b"\n") => {}
                    // Killed with something unread: the socket says so instead of ending.
                    Err(error) if error.kind() != io::ErrorKind::ConnectionReset => return Err(error.into()),
                    _ => return Ok(()),
                }
                match serde_json::from_slice(&line)? {
                    FromMeshd::Hello(said) => match &hello {
                        Some(hello) => drop(hello.send_replace(said)),
                        None => {
                            let (sender, said) = watch::channel(said);
                            hello = Some(sender);
                            if let Some(orders) = orders.take() {
                                let (settings, view) = (settings.clone(), view.clone());
                                let heard = Heard { hello: said, reached: reached.subscribe() };
                                let life = live(settings, heard, orders, view, serving.clone(), out.clone());
                                tasks.spawn(life);
                            }
                        }
                    },
                    FromMeshd::Peers(peers) => drop(reached.send_replace(peers)),
                    FromMeshd::Ping => {
                        // a meshd that reads nothing gets none, and is not waited for
                        let _ = out.try_send(FromSidecar::Pong);
                    }
                    FromMeshd::Request { id, request } => {
                        let (desk, out) = (desk.clone(), out.clone());
                        tasks.spawn(async move {
                            let result = desk.answer(request).await;
                            let _ = out.send(FromSidecar::Answer { id, result }).await;
                            Ok(())
                        });
                    }
                }
                line.clear();
                lines.get_mut().set_limit(MAX_LINE);
            }
            Some(ended) = tasks.join_next() => {
                if let Err(error) = ended.map_err(io::Error::other)? {
                    let mut status = view.status.borrow().clone();
                    status.problem = Some(error.to_string());
                    let _ = out.try_send(FromSidecar::Status(status));
                    return Err(error);
                }
            }
        }
    }
}

/// Membership itself, in either role. Ends when this node has left or was expelled; the sidecar stays, to answer.
async fn live(
    settings: Settings,
    heard: Heard,
    orders: mpsc::Receiver<Command>,
    view: View,
    serving: watch::Sender<Option<Arc<Registry>>>,
    out: mpsc::Sender<FromSidecar>,
) -> Result<(), SidecarError> {
    if settings.role != Role::Server {
        Agent::new(settings, heard, orders, view, out)?.run().await;
        return Ok(());
    }
    let hello = heard.hello.clone();
    let mut managed = Managed::find(&settings, DATABASE)?;
    let (registry, server) = loop {
        let said = hello.borrow().clone();
        match serve(&settings, &said, &mut managed).await {
            Ok(started) => break started,
            // What may pass by itself is waited for; the rest is for a person, and ends the process with the reason.
            Err(
                error @ (SidecarError::Server(ServerError::Bind { .. })
                | SidecarError::Open(OpenError::Store(
                    StoreError::Full { .. } | StoreError::InUse { .. } | StoreError::Unavailable { .. },
                ))
                | SidecarError::Refused(Refused::Store(_))
                | SidecarError::File(_)),
            ) => {
                tracing::error!("{error}");
                view.status.send_modify(|status| status.problem = Some(error.to_string()));
            }
            Err(SidecarError::Managed(error)) if error.may_pass() => {
                let problem = error.to_string();
                if view.status.borrow().problem.as_ref() != Some(&problem) {
                    tracing::warn!("{problem}");
                    view.status.send_modify(|status| status.problem = Some(problem));
                }
            }
            Err(SidecarError::Managed(ManagedError::Expelled(reason))) => {
                view.status.send_modify(|status| (status.joined, status.problem) = (false, Some(reason.clone())));
                let _ = out.send(FromSidecar::Expelled { reason }).await;
                out.closed().await;
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(if managed.is_some() { RETRY_JOIN } else { RETRY }) => {}
            () = out.closed() => return Ok(()),
        }
    };
    serving.send_replace(Some(registry.clone()));
    let names = keep_names(&settings, hello.clone(), registry.clone(), &server);
    tokio::select! {
        () = names => {}
        gone = registry.follow(), if registry.is_shared() => return Err(gone.into()),
        ended = maintain(&mut managed, &registry) => return Err(ended.into()),
        ended = local::run(settings.clone(), registry.clone(), heard, orders, view.clone(), out.clone()) => ended?,
    }
    if let (Some(managed), Ok(members)) = (&mut managed, registry.members())
        && managed.part(members).await?
    {
        serving.send_replace(None);
        drop(server);
        out.closed().await;
        return Ok(());
    }
    // The others are served for as long as `meshd` lives, also after this node has left.
    tokio::select! {
        () = out.closed() => {}
        gone = registry.follow(), if registry.is_shared() => return Err(gone.into()),
    }
    Ok(())
}

async fn maintain(managed: &mut Option<Managed>, registry: &Registry) -> ManagedError {
    match (managed, registry.members()) {
        (Some(managed), Ok(members)) => managed.maintain(registry, members).await,
        _ => std::future::pending().await,
    }
}

/// Opens the store, and listens.
async fn serve(
    settings: &Settings,
    hello: &Hello,
    managed: &mut Option<Managed>,
) -> Result<(Arc<Registry>, Server), SidecarError> {
    let shared = managed.is_some() || store::is_shared(&settings.datastore);
    let known = Known::read(&settings.data_dir)?;
    let (mut secret, mut joins) = (None, None);
    match settings.token.as_ref().map(|token| Credential::parse(token.reveal())) {
        Some(Ok(Credential::Shared(shared))) => secret = Some(shared),
        Some(Ok(Credential::Token(token))) => joins = Some(token),
        Some(Err(error)) => return Err(AgentError::Token(error).into()),
        None => {}
    }
    if !shared && (joins.is_some() || !settings.servers.is_empty()) {
        return Err(SidecarError::SecondServer);
    }
    // Who has served a cluster belongs to it, whatever the configuration says still.
    joins = joins.filter(|_| known.cluster.is_none());
    files::ensure_dir(&settings.data_dir.join("server"))?;
    let (store, members, known) = match managed {
        Some(managed) => {
            let (store, members) = managed.store(settings, hello).await?;
            // Who came to others proved itself to them, and the cluster is theirs.
            let joined = if managed.joined() { managed.cluster(settings)? } else { None };
            joins = None;
            (Arc::new(store) as Arc<dyn Store>, Some(members), Known { cluster: joined.or(known.cluster) })
        }
        None => {
            let database = settings.data_dir.join(DATABASE);
            (store::open(&settings.datastore, &database).await.map_err(OpenError::Store)?, None, known)
        }
    };
    let adopts = managed.as_ref().is_some_and(Managed::joined);
    let setup = Setup {
        cidrs: if adopts { vec![] } else { settings.cluster_cidr.clone() },
        masks: settings.node_cidr_mask_size,
        secret: secret.clone(),
        purge_after: settings.purge_after,
        shared,
        candidate: Some(known.candidate(&settings.data_dir)?),
        ca: joins.as_ref().map(|token| token.ca_hash),
        join: members.is_none() && known.cluster.is_none() && !settings.servers.is_empty(),
        cluster: known.cluster,
        datastore: if members.is_some() { "etcd" } else { store::kind(&settings.datastore) },
    };
    let registry = Arc::new(Registry::open(store, setup, Now::read()).await?);
    if let Some(members) = members {
        registry.set_members(members);
    }
    if let Some(token) = joins {
        let proof = Proof::Token(token.id, token.secret);
        local::join(settings, &registry, hello, &proof).await.map_err(|error| match error {
            local::JoinError::Keep(error) => SidecarError::Keep(error),
            local::JoinError::Refused(refused) => SidecarError::Refused(refused),
        })?;
    }
    Known::write(&settings.data_dir, registry.cluster(), &settings.datastore)?;
    let names = names(settings, hello);
    let server = Server::start(settings.bind_address, registry.clone(), &names).await?;
    registry.set_servers(addresses(settings, hello, server.address()));
    tracing::info!(cluster = registry.cluster(), "serving on {}", server.address());
    match secret {
        Some(secret) => files::write_atomic(&settings.data_dir.join(NODE_TOKEN), secret.reveal().as_bytes())?,
        None => node_token(&settings.data_dir.join(NODE_TOKEN), &registry).await?,
    }
    Ok((registry, server))
}

/// What the data directory says of the cluster that this server serves.
struct Known {
    cluster: Option<String>,
}

impl Known {
    fn read(data_dir: &Path) -> Result<Self, SidecarError> {
        let text = files::read(&data_dir.join(CLUSTER_ID))?;
        let text = text.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let first = text.and_then(|text| text.lines().next().map(|line| line.trim().to_owned()));
        Ok(Known { cluster: first.filter(|line| !line.is_empty()) })
    }

    /// The id of a cluster that this server may make: it stands on the disk before the cluster is there, so that a crash
    /// in between leaves nobody with a cluster that is not theirs.
    fn candidate(&self, data_dir: &Path) -> Result<String, SidecarError> {
        let path = data_dir.join(CANDIDATE);
        let kept = files::read(&path)?.and_then(|bytes| String::from_utf8(bytes).ok()).filter(|id| id.len() == 32);
        if let Some(id) = kept {
            return Ok(id);
        }
        let id = random::id();
        if self.cluster.is_none() {
            files::write_atomic(&path, id.as_bytes())?;
        }
        Ok(id)
    }

    fn write(data_dir: &Path, cluster: &str, datastore: &Datastore) -> Result<(), SidecarError> {
        let place = datastore.endpoint.as_ref().map_or_else(|| "sqlite://".to_owned(), |e| redacted(e.reveal()));
        let (path, text) = (data_dir.join(CLUSTER_ID), format!("{cluster}\n{place}\n"));
        if files::read(&path)?.as_deref() != Some(text.as_bytes()) {
            files::write_atomic(&path, text.as_bytes())?;
        }
        let candidate = data_dir.join(CANDIDATE);
        Ok(files::remove(&candidate).map_err(|source| FileError { path: candidate, source })?)
    }
}

/// Where the state of a server with this data directory is, when that is a store elsewhere, which has tools of its own.
pub fn elsewhere(data_dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(data_dir.join(CLUSTER_ID)).ok()?;
    let place = text.lines().nth(1)?.trim().to_owned();
    (!place.is_empty() && !place.starts_with("sqlite:")).then_some(place)
}

/// Follows the node's addresses: what the certificate names, and where servers are said to be.
async fn keep_names(settings: &Settings, mut hello: watch::Receiver<Hello>, registry: Arc<Registry>, server: &Server) {
    loop {
        let changed = hello.changed().await;
        let said = hello.borrow_and_update().clone();
        if changed.is_err() {
            return std::future::pending().await;
        }
        registry.set_servers(addresses(settings, &said, server.address()));
        if let Err(error) = server.set_names(&names(settings, &said)) {
            tracing::error!("{error}");
        }
        if let Err(error) = refresh_node_token(settings, &registry).await {
            tracing::warn!("{error}");
        }
    }
}

async fn refresh_node_token(settings: &Settings, registry: &Registry) -> Result<(), SidecarError> {
    if settings.token.is_none() {
        node_token(&settings.data_dir.join(NODE_TOKEN), registry).await?;
    }
    Ok(())
}

/// The token that lies ready: made once, and written again when the servers' addresses changed.
async fn node_token(path: &Path, registry: &Registry) -> Result<(), SidecarError> {
    let kept = files::read(path)?.and_then(|bytes| String::from_utf8(bytes).ok());
    let kept = kept.and_then(|text| text.parse::<Token>().ok()).filter(|token| registry.is_good(Now::read(), token));
    let token = match kept {
        Some(token) if token.servers == registry.servers() => return Ok(()),
        Some(token) => Token { servers: registry.servers(), ..token },
        None => registry.mint(Now::read(), Role::Agent, None, None, None, "node-token").await?,
    };
    let text = token.reveal();
    Ok(files::write_atomic(path, format!("{}\n", text.reveal()).as_bytes())?)
}

/// What the server's certificate names: what people configured, and what this machine is called and reached by.
fn names(settings: &Settings, hello: &Hello) -> Vec<String> {
    let mut names: BTreeSet<String> = settings.tls_san.iter().cloned().collect();
    names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    names.extend(hello.underlay.iter().map(|address| address.ip().to_string()));
    if !settings.bind_address.ip().is_unspecified() {
        names.insert(settings.bind_address.ip().to_string());
    }
    let usable = |name: &str| rustls::pki_types::DnsName::try_from(name.to_owned()).is_ok();
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    names.extend(hostname.into_iter().chain([hello.name.clone()]).filter(|name| usable(name)));
    let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    names.extend(own_addresses().into_iter().filter(|ip| !link_local(ip)).map(|ip| ip.to_string()));
    names.into_iter().collect()
}

fn own_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return vec![] };
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .collect()
}

/// Where agents are told to find this server.
fn addresses(settings: &Settings, hello: &Hello, bound: SocketAddr) -> Vec<ServerAddress> {
    if !bound.ip().is_unspecified() {
        return vec![bound.into()];
    }
    let own = hello.underlay.iter().map(|address| SocketAddr::new(address.ip(), bound.port()).into());
    // A name that people gave may lead here in a way that this machine cannot know.
    let given = settings.tls_san.iter().filter_map(|name| {
        let host = if name.contains(':') { format!("[{name}]") } else { name.clone() };
        format!("https://{host}:{}", bound.port()).parse().ok()
    });
    let mut all: Vec<ServerAddress> = Vec::new();
    for address in own.chain(given) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

async fn tell_status(view: View, out: mpsc::Sender<FromSidecar>) -> Result<(), SidecarError> {
    let mut status = view.status.subscribe();
    loop {
        let now: Status = status.borrow_and_update().clone();
        if out.send(FromSidecar::Status(now)).await.is_err() || status.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Where requests are answered.
#[derive(Clone)]
struct Desk {
    role: Role,
    data_dir: PathBuf,
    view: View,
    registry: watch::Receiver<Option<Arc<Registry>>>,
    commands: mpsc::Sender<Command>,
}

impl Desk {
    async fn answer(&self, request: Request) -> Result<Value, Refusal> {
        let refusal = |message: String| Refusal { message };
        if request == Request::Leave {
            let (answer, left) = oneshot::channel();
            let gone = || refusal("this node is no member, so it cannot leave".to_owned());
            self.commands.send(Command::Leave(answer)).await.map_err(|_| gone())?;
            return left.await.unwrap_or_else(|_| Err(gone())).map(|()| json!({ "left": true }));
        }
        if request == Request::ClusterMatrix {
            return Ok(json!(self.matrix().await));
        }
        if self.role == Role::Server {
            let registry = self.registry.borrow().clone();
            let Some(registry) = registry else {
                let problem = self.view.status.borrow().problem.clone();
                return Err(refusal(problem.unwrap_or_else(|| "the server is starting; try again".to_owned())));
            };
            if matches!(request, Request::TokenCreate { role: Role::Server, .. }) && !registry.is_shared() {
                return Err(refusal(ONE_SERVER.to_owned()));
            }
            return registry.request(Now::read(), &request).await.map_err(|e| refusal(e.to_string()));
        }
        let status = self.view.status.borrow().clone();
        match request {
            Request::Nodes => Ok(json!(self.view.nodes())),
            Request::ClusterStatus => Ok(json!({
                "joined": status.joined,
                "connected": status.connected,
                "server": status.server,
                "addresses": status.servers,
                "problem": status.problem,
                "warnings": [],
            })),
            _ => {
                let server = status.server.or_else(|| status.servers.first().cloned());
                let there = server.map(|server| format!(", such as {server}")).unwrap_or_default();
                Err(refusal(format!("only servers may do this: run it on a server{there}")))
            }
        }
    }

    /// Each server knows what was told to it: all are asked, on a server's node as on an agent's.
    async fn matrix(&self) -> Matrix {
        let registry = self.registry.borrow().clone();
        let (servers, records) = match &registry {
            Some(registry) => (registry.servers(), registry.records()),
            None => {
                let servers = self.view.status.borrow().servers.clone();
                (servers.iter().filter_map(|server| server.parse().ok()).collect(), self.view.nodes())
            }
        };
        let asked = servers.iter().map(|server| async move { (server, matrix_of(&self.data_dir, server).await) });
        let mut parts: Vec<_> = registry.iter().map(|registry| registry.matrix(Now::read())).collect();
        let mut missing = Vec::new();
        for (server, part) in join_all(asked).await {
            match part {
                Ok(part) => parts.push(part),
                Err(problem) => missing.push(Missing { server: server.to_string(), problem }),
            }
        }
        let watches = |record: &NodeRecord| record.role != Role::Foreign;
        whole(parts, records.into_iter().filter(watches).map(|record| record.name), missing)
    }
}
