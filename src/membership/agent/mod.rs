//! The node's side of membership: join, heartbeat, the node list, renewal, for as long as the node runs.
//!
//! Owns when what is asked of which server, and tells what it waits for in words that a person can act on. Tries for ever:
//! nothing that a server says or does not say ends it, short of removal. [`local`] does the same for a server's own node.

mod balancer;
pub(crate) mod forward;
pub mod keep;
pub mod local;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Method;
use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use self::balancer::Balancer;
use self::keep::{Keep, KeepError, KeptList, Membership};
use super::address::{BadServerAddress, ServerAddress};
use super::api::{JoinAnswer, JoinRequest, Myself, News, Poll, PollAnswer, RenewAnswer, RenewRequest, TokenProof};
use super::authority;
use super::client::{ClientError, Connection};
use super::clock::Now;
use super::link::{FromSidecar, Hello, Peers, Refusal, Status};
use super::matrix::Part;
use super::random;
use super::record::{NodeRecord, Role};
use super::registry::INTERVAL;
use super::settings::{SERVER_PORT, Settings};
use super::tls::Trust;
use super::token::{BadToken, Credential};
use crate::node::first_address;

/// A server that refuses is asked again after this long, and up to half as long again.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);
/// A proof of the shared secret lets whoever is in between try one guess, so the pause between proofs grows: 10 s doubled
/// this often is 640 s, or 135 guesses a day.
const MAX_DOUBLINGS: u32 = 6;
/// The copy of the list is written this often at most.
const KEEP_LIST: Duration = Duration::from_secs(30);

/// Why the agent cannot even try.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its files.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// Its token.
    #[error(transparent)]
    Token(#[from] BadToken),
    /// Its servers.
    #[error(transparent)]
    Address(#[from] BadServerAddress),
    /// Nothing to join with.
    #[error(
        "this node has not joined yet, and has no token: set `token` or `token-file` (`meshctl token create` on a server)"
    )]
    NoToken,
    /// Nobody to join.
    #[error("a shared secret does not say where the servers are: set `server`")]
    NoServer,
}

/// What others may ask the agent for while it runs.
pub enum Command {
    /// This node goes; the answer comes when the servers know.
    Leave(oneshot::Sender<Result<(), Refusal>>),
}

/// A server that has not told what it knows of the matrix within this time is missing from it.
const PART: Duration = Duration::from_secs(3);

/// What `meshd` says, as it is now.
#[derive(Clone)]
pub struct Heard {
    /// Who this node is.
    pub hello: watch::Receiver<Hello>,
    /// What its data path knows of others.
    pub reached: watch::Receiver<Peers>,
}

/// What the agent knows, for who answers questions meanwhile.
#[derive(Clone)]
pub struct View {
    /// How membership fares.
    pub status: watch::Sender<Status>,
    /// The node list as last heard.
    list: Arc<RwLock<BTreeMap<String, NodeRecord>>>,
}

impl Default for View {
    fn default() -> Self {
        View { status: watch::Sender::new(Status::default()), list: Arc::default() }
    }
}

impl View {
    /// The node list, sorted by name.
    pub fn nodes(&self) -> Vec<NodeRecord> {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        let mut nodes: Vec<_> = list.values().cloned().collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    fn say(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_if_modified(|status| {
            let before = status.clone();
            change(status);
            *status != before
        });
    }

    fn problem(&self, problem: String) {
        self.trouble(problem, false);
    }

    /// `refused`: it is a server's answer.
    fn trouble(&self, problem: String, refused: bool) {
        if self.status.borrow().problem.as_ref() != Some(&problem) {
            tracing::warn!("{problem}");
        }
        self.say(|status| {
            status.connected = false;
            status.server = None;
            status.problem = Some(problem);
            status.refused = refused;
        });
    }
}

/// The node list on its way to `meshd`: whole first, and then as it changes.
struct Relay {
    cluster: String,
    cidrs: Vec<IpNet>,
    revision: Option<u64>,
    sent: bool,
    view: View,
    out: mpsc::Sender<FromSidecar>,
}

/// `meshd` is gone.
struct Gone;

impl Relay {
    /// Passes news on. `false`: they do not fit what is known, so the whole list is needed.
    async fn take(&mut self, news: News) -> Result<bool, Gone> {
        let message = match news {
            News::Same { revision } if Some(revision) == self.revision => {
                if self.sent {
                    return Ok(true);
                }
                let nodes = self.list().values().cloned().collect();
                FromSidecar::List { revision, cluster: self.cluster.clone(), cidrs: self.cidrs.clone(), nodes }
            }
            News::Delta { from, to, upsert, remove } if Some(from) == self.revision => {
                let whole = {
                    let mut list = self.list_mut();
                    remove.iter().for_each(|id| drop(list.remove(id)));
                    list.extend(upsert.iter().map(|record| (record.id.clone(), record.clone())));
                    if self.sent { vec![] } else { list.values().cloned().collect() }
                };
                self.revision = Some(to);
                if self.sent {
                    FromSidecar::Delta { from, to, upsert, remove }
                } else {
                    FromSidecar::List {
                        revision: to,
                        cluster: self.cluster.clone(),
                        cidrs: self.cidrs.clone(),
                        nodes: whole,
                    }
                }
            }
            News::List { revision, nodes } => {
                *self.list_mut() = nodes.iter().map(|record| (record.id.clone(), record.clone())).collect();
                self.revision = Some(revision);
                FromSidecar::List { revision, cluster: self.cluster.clone(), cidrs: self.cidrs.clone(), nodes }
            }
            _ => {
                self.revision = None;
                return Ok(false);
            }
        };
        self.sent = true;
        self.out.send(message).await.map_err(|_| Gone)?;
        Ok(true)
    }

    fn list(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, NodeRecord>> {
        self.view.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn list_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, NodeRecord>> {
        self.view.list.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The agent.
pub struct Agent {
    settings: Settings,
    keep: Keep,
    member: Option<Membership>,
    credential: Option<Credential>,
    balancer: Balancer,
    heard: Heard,
    commands: mpsc::Receiver<Command>,
    view: View,
    out: mpsc::Sender<FromSidecar>,
    renew_at: i64,
    list_kept: Duration,
    /// What the servers do not like about what this node says of itself.
    unwell: Option<String>,
    /// How often this run has tried to prove the shared secret to a server.
    proofs: u32,
}

/// Why a connection was given up.
enum End {
    /// It failed.
    Failed(ClientError),
    /// Everything is well, but a new connection is needed.
    Reconnect,
    /// This node is no member any more, for this reason.
    Expelled(String),
    /// This node left.
    Left,
    /// The servers do not know this node, though it has a certificate: it may come back by that.
    Unknown,
    /// `meshd` is gone.
    Gone,
}

impl Agent {
    /// Looks at what is kept and what is configured.
    pub fn new(
        settings: Settings,
        heard: Heard,
        commands: mpsc::Receiver<Command>,
        view: View,
        out: mpsc::Sender<FromSidecar>,
    ) -> Result<Self, AgentError> {
        let keep = Keep::open(&settings.data_dir)?;
        let member = keep.membership()?;
        let mut servers: Vec<ServerAddress> = settings.servers.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
        let mut credential = None;
        match (&member, &settings.token) {
            (Some(_), Some(_)) => tracing::info!("this node has joined already: its token is not needed, and ignored"),
            (Some(_), None) => {}
            (None, None) => return Err(AgentError::NoToken),
            (None, Some(token)) => {
                credential = Some(Credential::parse(token.reveal())?);
                if let Some(Credential::Token(token)) = &credential {
                    servers.extend(token.servers.iter().cloned());
                }
            }
        }
        let learnt = member.as_ref().map(|m| m.servers.clone()).unwrap_or_default();
        if servers.is_empty() && learnt.is_empty() {
            return Err(AgentError::NoServer);
        }
        let mut agent = Agent {
            balancer: Balancer::new(servers, &learnt),
            settings,
            keep,
            member: None,
            credential,
            heard,
            commands,
            view,
            out,
            renew_at: 0,
            list_kept: Duration::ZERO,
            unwell: None,
            proofs: 0,
        };
        agent.set_member(member);
        let servers = agent.balancer.servers().iter().map(ToString::to_string).collect();
        agent.view.say(|status| status.servers = servers);
        Ok(agent)
    }

    /// Runs until `meshd` is gone, this node has left, or it was expelled.
    pub async fn run(mut self) {
        let mut relay: Option<Relay> = None;
        loop {
            let server = match self.balancer.pick(Now::read().mono, random::below(u64::MAX)) {
                Ok(server) => server,
                Err(wait) => match self.pause(wait.max(Duration::from_millis(20))).await {
                    Some(end) if self.ended(&end).await => return,
                    _ => continue,
                },
            };
            let end = match self.member.clone() {
                None => match self.join(&server).await {
                    Ok(()) => continue,
                    Err(error) => End::Failed(error),
                },
                Some(member) => {
                    let relay = relay.get_or_insert_with(|| self.relay(&member));
                    self.attend(&server, &member, relay).await
                }
            };
            match &end {
                End::Failed(error) => {
                    self.balancer.failed(&server, Now::read().mono, random::below(1000));
                    self.learn_overlay();
                    // who cannot decide now refuses nobody: perhaps another server can
                    let refused = error.code().is_some_and(|code| !["store", "busy"].contains(&code));
                    self.view.trouble(self.waiting(error), refused);
                    if refused || self.proofs > 0 {
                        let doublings = self.proofs.saturating_sub(1).min(MAX_DOUBLINGS);
                        let pause = REFUSED_PAUSE * (1 << doublings);
                        let pause = pause + pause.mul_f64(random::below(500) as f64 / 1000.0);
                        if let Some(end) = self.pause(pause).await
                            && self.ended(&end).await
                        {
                            return;
                        }
                    }
                }
                End::Unknown => match self.rejoin(&server).await {
                    Ok(()) => self.balancer.worked(&server),
                    Err(ClientError::Refused { code, message }) if code == "removed" => {
                        self.ended(&End::Expelled(message)).await;
                        return;
                    }
                    Err(error) => {
                        self.balancer.failed(&server, Now::read().mono, random::below(1000));
                        self.view.trouble(error.to_string(), error.code().is_some());
                    }
                },
                end => {
                    if self.ended(end).await {
                        return;
                    }
                }
            }
        }
    }

    /// Waits, and hears a command meanwhile.
    async fn pause(&mut self, wait: Duration) -> Option<End> {
        tokio::select! {
            () = tokio::time::sleep(wait) => None,
            () = self.out.closed() => Some(End::Gone),
            Some(Command::Leave(answer)) = self.commands.recv() => {
                let message = match &self.view.status.borrow().problem {
                    Some(problem) => format!("no server can be told of it, so this node does not leave now: {problem}"),
                    None => "no server answers, so this node cannot leave now; try again".to_owned(),
                };
                let _ = answer.send(Err(Refusal { message }));
                None
            }
        }
    }

    /// Tells of an end; whether it is one.
    async fn ended(&mut self, end: &End) -> bool {
        match end {
            End::Expelled(reason) => {
                tracing::warn!("{reason}");
                if let Err(error) = self.keep.forget() {
                    tracing::error!("{error}");
                }
                let _ = self.out.send(FromSidecar::Expelled { reason: reason.clone() }).await;
                self.view.problem(reason.clone());
                self.view.say(|status| status.joined = false);
                true
            }
            End::Left => {
                if let Err(error) = self.keep.forget() {
                    tracing::error!("{error}");
                }
                self.view.say(|status| *status = Status::default());
                true
            }
            End::Gone => true,
            End::Reconnect | End::Failed(_) | End::Unknown => false,
        }
    }

    async fn join(&mut self, server: &ServerAddress) -> Result<(), ClientError> {
        let join = self.join_request()?;
        let no_token = || ClientError::Setup(AgentError::NoToken.to_string());
        let credential = self.credential.clone().ok_or_else(no_token)?;
        let answer = ask_to_join(server, &credential, join, &mut self.proofs).await?;
        self.keep_answer(server, &answer)
    }

    async fn rejoin(&mut self, server: &ServerAddress) -> Result<(), ClientError> {
        let Some(member) = self.member.clone() else { return Ok(()) };
        let join = self.join_request()?;
        let mut connection = Connection::open(server, trust(&member), Some(self.keep.client_identity(&member))).await?;
        let answer: JoinAnswer = connection.ask(Method::POST, "/v1/rejoin", &join).await?;
        tracing::info!("this node is a member again");
        self.keep_answer(server, &answer)
    }

    fn keep_answer(&mut self, server: &ServerAddress, answer: &JoinAnswer) -> Result<(), ClientError> {
        let name = self.name();
        let member = self.keep.joined(&name, self.settings.role, answer).map_err(setup)?;
        self.proofs = 0;
        tracing::info!(id = member.id, cluster = member.cluster, "joined through {server}");
        self.balancer.learn(&member.servers);
        self.set_member(Some(member));
        Ok(())
    }

    fn join_request(&self) -> Result<JoinRequest, ClientError> {
        Ok(JoinRequest {
            name: self.name(),
            role: self.settings.role,
            myself: myself(&self.settings, &self.heard.hello.borrow()),
            control_only: self.settings.control_only,
            request: self.keep.request().map_err(setup)?,
            clock: Now::read().unix,
            token: None,
        })
    }

    /// Stays with a server for as long as that goes well.
    async fn attend(&mut self, server: &ServerAddress, member: &Membership, relay: &mut Relay) -> End {
        match self.attended(server, member, relay).await {
            Ok(end) => end,
            Err(ClientError::Refused { code, message }) if code == "removed" => End::Expelled(message),
            Err(ClientError::Refused { code, .. }) if code == "purged" || code == "not-a-member" => End::Unknown,
            Err(error) => End::Failed(error),
        }
    }

    async fn attended(
        &mut self,
        server: &ServerAddress,
        member: &Membership,
        relay: &mut Relay,
    ) -> Result<End, ClientError> {
        let mut connection = Connection::open(server, trust(member), Some(self.keep.client_identity(member))).await?;
        let said = myself(&self.settings, &self.heard.hello.borrow_and_update());
        let told = connection.ask::<()>(Method::PUT, "/v1/self", &said).await;
        self.tolerate(told)?;
        let mut at_once = true;
        loop {
            let Peers { heard: reaches, paths } = self.heard.reached.borrow().clone();
            let ask = Poll { revision: relay.revision, no_wait: at_once, reaches, paths };
            let poll = connection.ask_patiently::<PollAnswer>("/v1/poll", &ask, INTERVAL);
            tokio::pin!(poll);
            let answer = loop {
                tokio::select! {
                    answer = &mut poll => break answer?,
                    () = self.out.closed() => return Ok(End::Gone),
                    Ok(()) = self.heard.hello.changed() => {
                        let said = myself(&self.settings, &self.heard.hello.borrow_and_update());
                        let told = self.aside(server, member, Method::PUT, "/v1/self", &said).await;
                        self.tolerate(told)?;
                    }
                    Some(Command::Leave(answer)) = self.commands.recv() => {
                        let left = self.aside::<()>(server, member, Method::POST, "/v1/leave", &()).await;
                        let gone = left.is_ok();
                        let _ = answer.send(left.map_err(|e| Refusal { message: e.to_string() }));
                        if gone {
                            return Ok(End::Left);
                        }
                    }
                }
            };
            self.learn(server, &answer.servers);
            relay.cidrs = answer.cidrs;
            at_once = match relay.take(answer.news).await {
                Ok(fits) => !fits,
                Err(Gone) => return Ok(End::Gone),
            };
            self.keep_list(relay);
            if Now::read().unix >= self.renew_at {
                self.renew(server, member).await?;
                return Ok(End::Reconnect);
            }
        }
    }

    /// Asks for something beside the poll that is under way.
    async fn aside<T: serde::de::DeserializeOwned>(
        &self,
        server: &ServerAddress,
        member: &Membership,
        method: Method,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<T, ClientError> {
        let identity = self.keep.client_identity(member);
        Connection::open(server, trust(member), Some(identity)).await?.ask(method, path, body).await
    }

    /// A server that does not like what this node says of itself still has a list for it.
    fn tolerate(&mut self, told: Result<(), ClientError>) -> Result<(), ClientError> {
        self.unwell = match told {
            Err(ClientError::Refused { code, message }) if code == "bad-record" => {
                tracing::warn!("{message}");
                Some(message)
            }
            other => other.map(|()| None)?,
        };
        let unwell = self.unwell.clone();
        self.view.say(|status| (status.refused, status.problem) = (unwell.is_some(), unwell));
        Ok(())
    }

    async fn renew(&mut self, server: &ServerAddress, member: &Membership) -> Result<(), ClientError> {
        let request = RenewRequest { request: self.keep.request().map_err(setup)? };
        let answer: RenewAnswer = self.aside(server, member, Method::POST, "/v1/renew", &request).await?;
        let renewed = Membership { certificate: answer.certificate, ..member.clone() };
        self.keep.write(&renewed).map_err(setup)?;
        tracing::info!("this node's certificate was renewed");
        self.set_member(Some(renewed));
        Ok(())
    }

    /// A server answered: it works, and tells of the others.
    fn learn(&mut self, server: &ServerAddress, servers: &[ServerAddress]) {
        self.balancer.worked(server);
        self.balancer.learn(servers);
        if let Some(member) = &mut self.member
            && !servers.is_empty()
            && member.servers != servers
        {
            member.servers = servers.to_vec();
            if let Err(error) = self.keep.write(member) {
                tracing::warn!("the server list cannot be kept: {error}");
            }
        }
        let all = self.balancer.servers().iter().map(ToString::to_string).collect();
        let unwell = self.unwell.clone();
        self.view.say(|status| {
            (status.refused, status.problem) = (unwell.is_some(), unwell);
            status.joined = true;
            status.connected = true;
            status.server = Some(server.to_string());
            status.servers = all;
        });
    }

    /// Where the servers' nodes are in the overlay: there they stay where they are when the underlay's addresses change.
    fn learn_overlay(&mut self) {
        let port = self.balancer.servers().first().map_or(SERVER_PORT, ServerAddress::port);
        let nodes = self.view.list.read().unwrap_or_else(PoisonError::into_inner);
        let nets = nodes.values().filter(|node| node.role == Role::Server).flat_map(|node| &node.subnets);
        // that one is the node's or its bridge's
        self.balancer.learn_overlay(nets.map(|net| SocketAddr::new(first_address(net), port).into()));
    }

    fn relay(&self, member: &Membership) -> Relay {
        let kept = self.keep.list().filter(|list| list.cluster == member.cluster);
        let mut revision = None;
        if let Some(kept) = kept {
            revision = Some(kept.revision);
            let mut list = self.view.list.write().unwrap_or_else(PoisonError::into_inner);
            *list = kept.nodes.into_iter().map(|record| (record.id.clone(), record)).collect();
        }
        let (view, out) = (self.view.clone(), self.out.clone());
        Relay { cluster: member.cluster.clone(), cidrs: vec![], revision, sent: false, view, out }
    }

    fn keep_list(&mut self, relay: &Relay) {
        let now = Now::read().mono;
        let Some(revision) = relay.revision else { return };
        if !self.list_kept.is_zero() && now.saturating_sub(self.list_kept) < KEEP_LIST {
            return;
        }
        self.list_kept = now.max(Duration::from_nanos(1));
        let nodes = relay.list().values().cloned().collect();
        let list = KeptList { cluster: relay.cluster.clone(), revision, nodes };
        if self.keep.list().is_none_or(|kept| kept.revision != revision)
            && let Err(error) = self.keep.keep_list(&list)
        {
            tracing::warn!("the copy of the node list cannot be kept: {error}");
        }
    }

    fn set_member(&mut self, member: Option<Membership>) {
        if let Some(member) = &member {
            self.renew_at = renew_at(&member.certificate);
            self.view.say(|status| status.joined = true);
        }
        self.member = member;
    }

    fn name(&self) -> String {
        self.member.as_ref().map_or_else(|| self.heard.hello.borrow().name.clone(), |member| member.name.clone())
    }

    fn waiting(&self, error: &ClientError) -> String {
        match error {
            ClientError::Unreachable { .. } if self.member.is_none() => format!("waiting for a server: {error}"),
            other => other.to_string(),
        }
    }
}

/// Joins once, through that server. `proofs` counts how often a server could have tried a guess at a shared secret, also one
/// that cut the connection then.
pub(super) async fn ask_to_join(
    server: &ServerAddress,
    credential: &Credential,
    mut join: JoinRequest,
    proofs: &mut u32,
) -> Result<JoinAnswer, ClientError> {
    match credential {
        Credential::Token(token) => {
            // The hash is compared within the handshake: a stranger is never sent the token.
            let mut connection = Connection::open(server, Trust::Hash(token.ca_hash), None).await?;
            let secret = random::hex(&token.secret.0);
            join.token = Some(TokenProof { id: token.id.to_string(), secret: super::settings::Secret::new(secret) });
            connection.ask(Method::POST, "/v1/join", &join).await
        }
        Credential::Shared(secret) => {
            let mut connection = Connection::open(server, Trust::Unproven, None).await?;
            *proofs = proofs.saturating_add(1);
            connection.join_by_secret(secret.reveal(), join).await
        }
    }
}

/// When a certificate (DER in base64) has two thirds of its life behind it.
fn renew_at(certificate: &str) -> i64 {
    let certificate = STANDARD.decode(certificate).unwrap_or_default();
    authority::validity(&certificate).map_or(0, |(from, to)| from + (to - from) / 3 * 2)
}

/// What a server knows of who reaches whom; asked by this node's certificate.
pub async fn matrix_of(data_dir: &Path, server: &ServerAddress) -> Result<Part, String> {
    let keep = Keep::open(data_dir).map_err(|error| error.to_string())?;
    let member = keep.membership().map_err(|error| error.to_string())?.ok_or("this node is no member")?;
    let identity = Some(keep.client_identity(&member));
    let ask = async { Connection::open(server, trust(&member), identity).await?.get("/v1/matrix").await };
    match timeout(PART, ask).await {
        Ok(answer) => answer.map_err(|error: ClientError| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", PART.as_secs())),
    }
}

fn trust(member: &Membership) -> Trust {
    Trust::Ca(CertificateDer::from(STANDARD.decode(&member.ca).unwrap_or_default()))
}

/// What this node says of itself.
fn myself(settings: &Settings, hello: &Hello) -> Myself {
    Myself {
        underlay: hello.underlay.clone(),
        public_keys: hello.public_keys.clone(),
        encryption: hello.encryption,
        labels: settings.node_labels.clone(),
        taints: settings.node_taints.clone(),
    }
}

fn setup(error: KeepError) -> ClientError {
    ClientError::Setup(error.to_string())
}
