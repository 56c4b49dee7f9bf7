//! Who is a member: nodes, tokens and subnets, over a store.
//!
//! Owns the rules (`state`), how it comes to be (`open`), and the order of changes (`change`), which watchers are told of
//! (`feed`). Heartbeats stay in memory (`health`). Takes the time as an argument, and knows nothing of HTTP.

mod change;
mod feed;
mod follow;
mod found;
mod health;
mod open;
mod others;
mod refused;
mod requests;
mod rows;
mod space;
mod standby;
mod state;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use ipnet::IpNet;
use tokio::sync::{Notify, watch};

use self::feed::Feed;
use self::health::{Beat, Health, Patient};
pub use self::health::{GRACE, INTERVAL};
pub use self::open::{OpenError, Setup};
use self::others::Others;
pub use self::refused::Refused;
pub use self::rows::BadRow;
use self::rows::{AuditRow, ClusterRow, How, Plan, TokenRow};
pub use self::space::BadSpace;
pub use self::state::{Proof, REST};
use self::state::{State, audit};
use super::address::ServerAddress;
use super::api::{JoinAnswer, JoinRequest, Myself, News, PollAnswer};
use super::authority::{self, Authority, AuthorityError};
use super::clock::Now;
use super::etcd::Members;
use super::link::{AuditLine, Peers};
use super::matrix::MAX_PATHS;
use super::pake;
use super::random;
use super::record::{NodeRecord, Role};
use super::settings::{PurgeAfter, SERVER_PORT};
use super::store::{Op, Revision, Store, StoreError, Txn};
use super::token::{Token, TokenId, TokenSecret};

/// Heartbeats are stored this often, for people who ask after a restart.
const FLUSH: Duration = Duration::from_secs(300);
const TIDY: Duration = Duration::from_secs(600);

/// A member, for authorisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: Role,
}

/// Counters for `/metrics`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Nodes that joined.
    pub joins: AtomicU64,
    /// Joins that were refused.
    pub refusals: AtomicU64,
    /// Heartbeats.
    pub beats: AtomicU64,
    /// Transactions that were stored.
    pub commits: AtomicU64,
}

/// The registry.
pub struct Registry {
    store: Arc<dyn Store>,
    authority: Authority,
    cluster: ClusterRow,
    secret: Option<pake::Verifier>,
    purge_after: PurgeAfter,
    /// Locked before `health`, where both are.
    known: RwLock<Known>,
    writer: tokio::sync::Mutex<Writer>,
    health: Mutex<Health>,
    servers: RwLock<Vec<ServerAddress>>,
    /// The etcd that the servers run, where they do.
    members: OnceLock<Arc<Members>>,
    /// Why the store does not answer yet, where this server began without it.
    away: OnceLock<watch::Receiver<Vec<String>>>,
    shared: bool,
    datastore: &'static str,
    /// This server among others, as long as it runs.
    me: String,
    /// Locked after `known` and `health`, where they are, too.
    others: Mutex<Others>,
    /// Nodes that heartbeat here, and that the store does not know of yet.
    moved: Mutex<HashSet<String>>,
    presence: tokio::sync::Mutex<follow::Presence>,
    /// When the store last answered, by the clock that does not jump, in ns; 0: it was not asked yet.
    heard: AtomicU64,
    /// What watchers may have by now; lags a little behind, so that many changes are one answer.
    published: watch::Sender<u64>,
    changed: Notify,
    answers: Mutex<Answers>,
    /// When a refusal was last written to the audit log.
    refused_at: AtomicI64,
    /// What it did.
    pub counters: Counters,
}

struct Known {
    state: State,
    feed: Feed,
}

struct Writer {
    guard: Revision,
    /// Up to here everything that was written was heard of. What servers say of themselves does not touch the guard, which a
    /// change of this server's own may have taken beyond it.
    followed: Revision,
    /// The outcome of something is unknown: read everything again before the next change.
    stale: bool,
    audited: u64,
    flushed: Duration,
    tidied: Duration,
}

/// Answers that many watchers get.
#[derive(Default)]
struct Answers {
    revision: u64,
    servers: Vec<ServerAddress>,
    by_start: HashMap<Option<u64>, Bytes>,
}

impl Registry {
    /// Whether the store answers.
    pub async fn check(&self) -> Result<(), StoreError> {
        self.store.range(rows::GUARD).await.map(drop)
    }

    /// The cluster's id.
    pub fn cluster(&self) -> &str {
        &self.cluster.id
    }

    /// `cluster-cidr`
    pub fn cidrs(&self) -> &[IpNet] {
        &self.cluster.cidrs
    }

    /// The cluster's CA.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// What is needed to check proofs of the shared secret.
    pub fn secret(&self) -> Option<&pake::Verifier> {
        self.secret.as_ref()
    }

    /// Whether other servers use the store, too.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// The etcd that the servers run, for further ones.
    pub fn members(&self) -> Result<&Arc<Members>, Refused> {
        self.present()?;
        self.members.get().ok_or(Refused::NoMembers(self.datastore))
    }

    /// Says that the servers run it.
    pub fn set_members(&self, members: Arc<Members>) {
        let _ = self.members.set(members);
    }

    /// Where the servers are: those that run, and where those are looked for that do not.
    pub fn servers(&self) -> Vec<ServerAddress> {
        let mut all = self.running();
        let port = all.first().map_or(SERVER_PORT, ServerAddress::port);
        let known = self.known();
        let nodes = known.state.nodes.values().filter(|row| self.shared && row.record.role == Role::Server);
        for address in nodes.flat_map(|row| &row.record.underlay) {
            let looked_for = SocketAddr::new(address.ip(), port).into();
            if !all.contains(&looked_for) {
                all.push(looked_for);
            }
        }
        all
    }

    /// Where the servers are that run: this one first.
    pub fn running(&self) -> Vec<ServerAddress> {
        let mut all = self.servers.read().unwrap_or_else(PoisonError::into_inner).clone();
        for address in self.others().servers.values().flatten() {
            if !all.contains(address) {
                all.push(address.clone());
            }
        }
        all
    }

    /// Says where this server is.
    pub fn set_servers(&self, servers: Vec<ServerAddress>) {
        *self.servers.write().unwrap_or_else(PoisonError::into_inner) = servers;
    }

    /// Lets a node in, or says again what it was told. Its identity is that of the key that signed its request.
    pub async fn join(
        &self,
        now: Now,
        join: &JoinRequest,
        proof: &Proof,
        from: Option<IpAddr>,
    ) -> Result<JoinAnswer, Refused> {
        if !matches!(proof, Proof::Local | Proof::LocalAlone) {
            self.present()?;
        }
        if let Proof::Token(id, secret) = proof {
            // Guesses stop here: they cost no signature, and no turn in the queue of those who change something.
            self.known().state.token(id, secret).inspect_err(|_| {
                self.counters.refusals.fetch_add(1, Ordering::Relaxed);
            })?;
        }
        let request = STANDARD.decode(&join.request).map_err(|_| AuthorityError::BadRequest)?;
        let identity = authority::identity_of_request(&request)?;
        let joined = self.decide(now, true, |state| state.join(now, join, &identity, proof, from)).await;
        let row = match joined {
            Ok(row) => row,
            Err(refused) => {
                self.counters.refusals.fetch_add(1, Ordering::Relaxed);
                self.note_refusal(now, join, proof, from, &refused).await;
                return Err(refused);
            }
        };
        self.counters.joins.fetch_add(1, Ordering::Relaxed);
        let id = row.record.id;
        self.beat(now, &id, from, Peers::default());
        let certificate = self.authority.node_leaf(&request, &id, now.date())?;
        Ok(JoinAnswer {
            id,
            cluster: self.cluster.id.clone(),
            certificate: STANDARD.encode(certificate),
            ca: STANDARD.encode(self.authority.certificate()),
            servers: self.servers(),
        })
    }

    /// Somebody who could prove something was refused: one line a second of the audit log, and each in the log.
    async fn note_refusal(&self, now: Now, join: &JoinRequest, proof: &Proof, from: Option<IpAddr>, why: &Refused) {
        let name: String = join.name.chars().take(63).flat_map(char::escape_default).collect();
        let from = from.map(|from| from.to_string());
        tracing::warn!(name, from, "a join was refused: {why}");
        let token = match proof {
            Proof::Token(id, _) => Some(id.to_string()),
            _ => None,
        };
        let what = format!("refuse: {}", why.code());
        let line = AuditRow { at: now.unix, what, node: Some(name), token, from };
        let last = self.refused_at.swap(now.unix, Ordering::Relaxed);
        if last != now.unix && !matches!(why, Refused::Store(_)) {
            let plan = Plan { audit: vec![line], ..Plan::default() };
            if let Err(error) = self.change(now, |_| Ok(((), plan.clone()))).await {
                tracing::warn!("the audit log: {error}");
            }
        }
    }

    /// The audit log, oldest first: who made, used and revoked tokens, who joined, was refused, removed, and went.
    pub async fn audit(&self) -> Result<Vec<AuditLine>, StoreError> {
        let lines = self.store.range(rows::AUDIT).await?.items;
        let lines = lines.iter().filter_map(|line| serde_json::from_slice::<AuditRow>(&line.value).ok());
        Ok(lines.map(AuditLine::from).collect())
    }

    /// The member with this identity, or why there is none.
    pub fn member(&self, identity: &str) -> Result<Member, Refused> {
        let known = self.known();
        let found = known.state.member(identity);
        // a copy of the store does not know who came since
        let row = if found.is_err() { self.present().and(found)? } else { found? };
        Ok(Member { id: row.record.id.clone(), name: row.record.name.clone(), role: row.record.role })
    }

    /// Whether this token is known here, with this secret.
    pub fn knows(&self, proof: &Proof) -> bool {
        match proof {
            Proof::Token(id, secret) => self.known().state.token(id, secret).is_ok(),
            _ => true,
        }
    }

    /// The node list's revision, as it is known here.
    pub fn revision(&self) -> u64 {
        self.known().feed.revision()
    }

    /// Whether there is a member with this id.
    pub fn has(&self, id: &str) -> bool {
        self.known().state.nodes.contains_key(id)
    }

    /// A certificate for the time to come, for a key that is a member's.
    pub fn renew(&self, now: Now, member: &Member, identity: &str, request: &[u8]) -> Result<Vec<u8>, Refused> {
        if authority::identity_of_request(request)? != identity {
            return Err(Refused::NotAllowed);
        }
        Ok(self.authority.node_leaf(request, &member.id, now.date())?)
    }

    /// A heartbeat.
    pub fn beat(&self, now: Now, id: &str, observed: Option<IpAddr>, peers: Peers) {
        let Peers { heard: mut reaches, mut paths } = peers;
        reaches.truncate(16);
        paths.truncate(MAX_PATHS);
        self.counters.beats.fetch_add(1, Ordering::Relaxed);
        self.health().beat(id, Beat { at: now, observed, reaches, paths });
        if self.shared && self.others().via.get(id) != Some(&self.me) {
            self.moved.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
        }
    }

    /// What a node says of itself.
    pub async fn update(&self, now: Now, id: &str, myself: &Myself) -> Result<(), Refused> {
        self.change(now, |state| Ok(((), state.update(id, myself)?))).await
    }

    /// A node goes by itself.
    pub async fn leave(&self, now: Now, id: &str) -> Result<(), Refused> {
        self.decide(now, true, |state| Ok(((), state.remove(now, id, How::Left)?))).await
    }

    /// Makes a token.
    pub async fn mint(
        &self,
        now: Now,
        role: Role,
        ttl: Option<u64>,
        uses: Option<u32>,
        node: Option<&str>,
        description: &str,
    ) -> Result<Token, Refused> {
        let servers = self.servers();
        if role == Role::Foreign || uses == Some(0) || ttl == Some(0) {
            let what = "a token is for role agent or server, for at least one second and one use";
            return Err(Refused::BadRecord(what.to_owned()));
        }
        if let Some(node) = node {
            node.parse::<crate::node::NodeName>().map_err(|e| Refused::BadRecord(e.to_string()))?;
        }
        let token = Token {
            servers,
            ca_hash: self.authority.hash(),
            id: TokenId(random::bytes()),
            secret: TokenSecret(random::bytes()),
        };
        let row = TokenRow {
            id: token.id.to_string(),
            hash: random::hex(&token.secret.hash()),
            role,
            node: node.map(str::to_owned),
            expires_at: ttl.map(|ttl| now.unix.saturating_add_unsigned(ttl)),
            uses_left: uses,
            created_at: now.unix,
            revoked: false,
            description: description.to_owned(),
        };
        let plan = Plan {
            audit: vec![audit(now, "create token", node, Some(&row.id))],
            put_tokens: vec![row],
            ..Plan::default()
        };
        self.change(now, |_| Ok(((), plan.clone()))).await?;
        Ok(token)
    }

    /// Whether there is such a token, and it is not revoked or expired.
    pub fn is_good(&self, now: Now, token: &Token) -> bool {
        let known = self.known();
        known.state.tokens.get(&token.id.to_string()).is_some_and(|row| {
            row.hash == random::hex(&token.secret.hash())
                && !row.revoked
                && row.expires_at.is_none_or(|at| at > now.unix)
                && token.ca_hash == self.authority.hash()
        })
    }

    /// To be called about once a second: readiness, purging, tidying. None of it while the store is away.
    pub async fn tick(&self, now: Now) -> Result<(), Refused> {
        if !self.away().is_empty() {
            return Ok(());
        }
        // Without the store nothing is judged: to `health` that is a standstill, which is held against nobody.
        self.show_presence(now).await?;
        let verdict = {
            let known = self.known();
            let nodes = known.state.nodes.values().filter(|row| row.record.role != Role::Foreign);
            let mut health = self.health();
            let others = self.others();
            let mine = |id: &str| !self.shared || others.is_mine(&self.me, id);
            let nodes: Vec<_> =
                nodes.map(|row| Patient { id: &row.record.id, ready: row.ready, mine: mine(&row.record.id) }).collect();
            let is_server = |id: &String| known.state.nodes.get(id).is_some_and(|row| row.record.role == Role::Server);
            let servers = known.state.nodes.keys().filter(|id| is_server(id)).count();
            let mut verdict = health.tick(now, &nodes, self.purge_after.limit(servers));
            // a server is what others depend on: only a person takes it out
            verdict.purge.retain(|id| !is_server(id));
            verdict
        };
        for part in verdict.parts() {
            let flips = self.change(now, |state| Ok(judged(state, now, &part))).await?;
            for (name, ready) in flips {
                tracing::info!(node = name, "{}", if ready { "ready" } else { "not ready" });
            }
        }
        let (flush, tidy) = {
            let mut writer = self.writer.lock().await;
            let flush = now.mono.saturating_sub(writer.flushed) >= FLUSH;
            let tidy = now.mono.saturating_sub(writer.tidied) >= TIDY || writer.tidied.is_zero();
            if flush {
                writer.flushed = now.mono;
            }
            if tidy {
                writer.tidied = now.mono.max(Duration::from_nanos(1));
            }
            (flush, tidy)
        };
        if tidy {
            self.change(now, |state| Ok(((), state.tidy(now)))).await?;
        }
        if flush {
            self.flush().await?;
        }
        Ok(())
    }

    /// Stores when nodes were last heard.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let beats: HashMap<String, i64> = {
            let known = self.known();
            let health = self.health();
            known.state.nodes.keys().filter_map(|id| Some((id.clone(), health.last(id)?))).collect()
        };
        let ops = vec![Op::put(rows::BEATS, rows::json(&beats))];
        self.store.txn(Txn { compares: vec![], ops }).await.map(drop)
    }

    /// Lets watchers have what changed, at a pace: the more nodes, the more changes one answer holds. Runs for ever.
    pub async fn publish(&self) {
        loop {
            self.changed.notified().await;
            let nodes = self.known().state.nodes.len() as u64;
            tokio::time::sleep(Duration::from_millis((nodes / 20).clamp(5, 500))).await;
            let revision = self.known().feed.revision();
            self.published.send_replace(revision);
        }
    }

    /// The node list's revision, as far as watchers may know it.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    /// What is new for somebody who has the list of revision `from`, as the JSON of a [`PollAnswer`].
    pub fn news(&self, from: Option<u64>) -> Bytes {
        let servers = self.servers();
        if let Some(revision) = from.filter(|_| !self.away().is_empty()) {
            let news = News::Same { revision };
            return rows::json(&PollAnswer { news, servers, cidrs: self.cidrs().to_vec() }).into();
        }
        let known = self.known();
        let revision = known.feed.revision();
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.revision != revision || answers.servers != servers || answers.by_start.len() > 64 {
            *answers = Answers { revision, servers: servers.clone(), by_start: HashMap::new() };
        }
        answers
            .by_start
            .entry(from)
            .or_insert_with(|| {
                rows::json(&PollAnswer { news: known.news(from), servers, cidrs: self.cidrs().to_vec() }).into()
            })
            .clone()
    }

    /// The same, for who is in this process.
    pub fn local_news(&self, from: Option<u64>) -> News {
        self.known().news(from)
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn others(&self) -> MutexGuard<'_, Others> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn news(&self, from: Option<u64>) -> News {
        from.and_then(|from| self.feed.since(from)).unwrap_or_else(|| News::List {
            revision: self.feed.revision(),
            nodes: self.state.nodes.values().map(|row| row.record.clone()).collect(),
        })
    }
}

/// What the verdict on everybody's health means for the rows, and whose readiness changes.
fn judged(state: &State, now: Now, verdict: &health::Verdict) -> (Vec<(String, bool)>, Plan) {
    let mut plan = Plan::default();
    let mut changed = Vec::new();
    for id in &verdict.purge {
        if let Ok(purge) = state.remove(now, id, How::Purged) {
            plan.add_removal(purge);
        }
    }
    let flips = verdict.up.iter().map(|id| (id, true)).chain(verdict.down.iter().map(|id| (id, false)));
    for (id, ready) in flips.filter(|(id, _)| !verdict.purge.contains(id)) {
        if let Some(mut row) = state.nodes.get(id).filter(|row| row.ready != ready).cloned() {
            row.ready = ready;
            row.settle();
            changed.push((row.record.name.clone(), ready));
            plan.put_nodes.push(row);
        }
    }
    (changed, plan)
}

/// A node's record with what is known of it beside the store.
fn with_health(record: &NodeRecord, health: &Health) -> NodeRecord {
    let mut record = record.clone();
    record.last_heartbeat = health.last(&record.id).map(super::clock::rfc3339);
    record.observed = health.beats.get(&record.id).and_then(|beat| beat.observed).map(|ip| ip.to_string());
    record
}
