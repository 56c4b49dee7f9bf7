//! The sidecar: what `meshd` says on the link becomes membership, and what membership brings goes back.
//!
//! Builds and connects; ends when the link closes. In server role it holds the registry and serves it, and its own node is
//! a member like any other; as an agent it knows servers. Knows nothing of how either works.

mod known;
mod names;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use self::known::{Known, without_own_token};
pub use self::known::{elsewhere, served};
use self::names::{addresses, keep_names, names, node_token, refresh_node_token};
use super::address::BadServerAddress;
use super::agent::keep::KeepError;
use super::agent::{Agent, AgentError, Command, Heard, View, forward, local, matrix_of};
use super::clock::Now;
use super::etcd::{Managed, ManagedError};
use super::files::{self, FileError};
use super::link::{FromMeshd, FromSidecar, Hello, Peers, Refusal, Request, Status};
use super::matrix::{Matrix, Missing, whole};
use super::record::{NodeRecord, Role};
use super::registry::{OpenError, Proof, Refused, Registry, Setup};
use super::server::{Server, ServerError};
use super::settings::Settings;
use super::store::standby::{self, Standby};
use super::store::{self, Store, StoreError};
use super::token::Credential;

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
/// What its store had, if others share it: for a start without it.
const COPY: &str = "server/copy.json";
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
    let named = watch::Sender::new(settings.tls_san.clone());
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
                                let named = named.subscribe();
                                let life = live(settings, heard, named, orders, view, serving.clone(), out.clone());
                                tasks.spawn(life);
                            }
                        }
                    },
                    FromMeshd::Peers(peers) => drop(reached.send_replace(peers)),
                    FromMeshd::Names { tls_san } => drop(named.send_replace(tls_san)),
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
    named: watch::Receiver<Vec<String>>,
    orders: mpsc::Receiver<Command>,
    view: View,
    serving: watch::Sender<Option<Arc<Registry>>>,
    out: mpsc::Sender<FromSidecar>,
) -> Result<(), SidecarError> {
    if settings.role != Role::Server {
        Agent::new(settings, heard, orders, view, out)?.run().await;
        return Ok(());
    }
    let settings = without_own_token(settings)?;
    let hello = heard.hello.clone();
    let mut managed = Managed::find(&settings, DATABASE)?;
    let (registry, server, standby) = loop {
        let said = hello.borrow().clone();
        let progress = managed.as_ref().map(Managed::progress);
        let opening = serve(&settings, &said, &mut managed);
        let served = tokio::select! {
            served = opening => served,
            () = tell_progress(progress, &view) => return Ok(()),
        };
        match served {
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
                if error.is_later() {
                    view.status.send_modify(|status| (status.problem, status.progress) = (None, Some(problem)));
                } else if view.status.borrow().problem.as_ref() != Some(&problem) {
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
    let names = keep_names(&settings, hello.clone(), named, registry.clone(), &server);
    let copy = settings.data_dir.join(COPY);
    tokio::select! {
        () = names => {}
        () = registry.keep_copy(&copy), if registry.is_shared() => {}
        gone = registry.follow(), if registry.is_shared() => return Err(gone.into()),
        ended = maintain(&settings, hello, &mut managed, &registry, standby) => return Err(ended),
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

/// Passes on what a joining server waits for. Runs for ever.
async fn tell_progress(progress: Option<watch::Receiver<Option<String>>>, view: &View) {
    let Some(mut progress) = progress else { return std::future::pending().await };
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        view.status.send_modify(|status| {
            if now.is_some() {
                status.problem = None;
            }
            status.progress = now;
        });
    }
    std::future::pending().await
}

/// Sees to it that there is a store, and goes on to be one.
async fn maintain(
    settings: &Settings,
    hello: watch::Receiver<Hello>,
    managed: &mut Option<Managed>,
    registry: &Registry,
    standby: Option<Arc<Standby>>,
) -> SidecarError {
    if let Some(standby) = standby {
        if let Err(error) = arrive(settings, &hello, managed, registry, &standby).await {
            return error;
        }
        tracing::info!("the datastore answers");
        if let Err(error) = Known::write(&settings.data_dir, registry.cluster(), &settings.datastore) {
            tracing::warn!("{error}");
        }
        if let Err(error) = refresh_node_token(settings, registry).await {
            tracing::warn!("{error}");
        }
    }
    match (managed, registry.members()) {
        (Some(managed), Ok(members)) => managed.maintain(registry, members, &hello).await.into(),
        _ => std::future::pending().await,
    }
}

/// Opens the store behind a registry that answers from a copy meanwhile, and tells what is missing.
async fn arrive(
    settings: &Settings,
    hello: &watch::Receiver<Hello>,
    managed: &mut Option<Managed>,
    registry: &Registry,
    standby: &Standby,
) -> Result<(), SidecarError> {
    let complaint = watch::Sender::new(String::new());
    loop {
        let outlook = managed.as_ref().and_then(Managed::outlook);
        let told = async {
            loop {
                let mut reasons = match &outlook {
                    Some(outlook) => outlook.reasons(|identity| registry.name_of(identity)).await,
                    None => vec![],
                };
                reasons.extend(Some(complaint.borrow().clone()).filter(|complaint| !complaint.is_empty()));
                if standby.say(reasons.clone()) {
                    tracing::warn!("the datastore does not answer: {}", reasons.join("; "));
                }
                tokio::time::sleep(RETRY_JOIN).await;
            }
        };
        let said = hello.borrow().clone();
        let opened = async {
            Ok::<_, SidecarError>(match managed {
                Some(managed) => {
                    let (store, members) = managed.store(settings, &said).await?;
                    (Arc::new(store) as Arc<dyn Store>, Some(members))
                }
                None => {
                    let database = settings.data_dir.join(DATABASE);
                    (store::open(&settings.datastore, &database).await.map_err(OpenError::Store)?, None)
                }
            })
        };
        let opened = tokio::select! {
            opened = opened => opened,
            () = told => return Ok(()),
        };
        let error = match opened {
            Ok((store, members)) => match registry.arrive(standby, store, members).await {
                Ok(()) => return Ok(()),
                Err(error) => SidecarError::Open(error),
            },
            Err(error) => error,
        };
        match &error {
            SidecarError::Managed(managed) if managed.may_pass() => {}
            // who may read and write there is for a person to say, and what is served meanwhile stays true
            SidecarError::Open(OpenError::Store(
                StoreError::Full { .. }
                | StoreError::InUse { .. }
                | StoreError::Unavailable { .. }
                | StoreError::Unfit { .. },
            )) => {}
            _ => return Err(error),
        }
        complaint.send_replace(error.to_string());
        tokio::time::sleep(RETRY_JOIN).await;
    }
}

/// Opens the store, and listens. A server that has a copy of what others share listens at once, and opens the store then.
async fn serve(
    settings: &Settings,
    hello: &Hello,
    managed: &mut Option<Managed>,
) -> Result<(Arc<Registry>, Server, Option<Arc<Standby>>), SidecarError> {
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
    let copy = known.cluster.is_some() && managed.as_ref().map_or(shared, Managed::is_member);
    let standby = if copy { standby::kept(&settings.data_dir.join(COPY)).map(Standby::new) } else { None };
    let adopts = managed.as_ref().is_some_and(Managed::joined);
    let mut setup = Setup {
        cidrs: if adopts { vec![] } else { settings.cluster_cidr.clone() },
        masks: settings.node_cidr_mask_size,
        secret: secret.clone(),
        purge_after: settings.purge_after,
        shared,
        candidate: None,
        ca: None,
        join: false,
        cluster: known.cluster.clone(),
        datastore: if managed.is_some() { "etcd" } else { store::kind(&settings.datastore) },
    };
    if let Some(standby) = standby {
        match Registry::open(standby.clone(), setup.clone(), Now::read()).await {
            Ok(registry) => {
                registry.set_standby(&standby);
                let registry = Arc::new(registry);
                let server = listen(settings, hello, &registry).await?;
                return Ok((registry, server, Some(standby)));
            }
            // what the store itself says counts more
            Err(error) => tracing::warn!("the copy of the datastore is not used: {error}"),
        }
    }
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
    setup.candidate = Some(known.candidate(&settings.data_dir)?);
    setup.ca = joins.as_ref().map(|token| token.ca_hash);
    setup.join = members.is_none() && known.cluster.is_none() && !settings.servers.is_empty();
    setup.cluster = known.cluster;
    // only now is it known whether it came to others
    if managed.as_ref().is_some_and(Managed::joined) {
        setup.cidrs = vec![];
    }
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
    let server = listen(settings, hello, &registry).await?;
    match secret {
        Some(secret) => files::write_atomic(&settings.data_dir.join(NODE_TOKEN), secret.reveal().as_bytes())?,
        None => node_token(&settings.data_dir.join(NODE_TOKEN), &registry).await?,
    }
    Ok((registry, server, None))
}

async fn listen(settings: &Settings, hello: &Hello, registry: &Arc<Registry>) -> Result<Server, SidecarError> {
    let server = Server::start(settings.bind_address, registry.clone(), &names(settings, hello)).await?;
    registry.set_servers(addresses(settings, hello, server.address()));
    tracing::info!(cluster = registry.cluster(), "serving on {}", server.address());
    Ok(server)
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
            Some(registry) => (registry.running(), registry.records()),
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
