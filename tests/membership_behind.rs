//! A server that is behind: the others have written, and it has not heard of it yet, or cannot. What it says then has to be
//! about what the store has, or that it cannot tell. The servers here share a store, and the one that is behind never
//! follows the others by itself.

#[path = "membership/harness.rs"]
#[allow(dead_code)]
mod harness;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use hyper::Method;
use meshd::membership::agent::keep::Keep;
use meshd::membership::api::{JoinRequest, News, Poll, PollAnswer};
use meshd::membership::client::Connection;
use meshd::membership::clock::Now;
use meshd::membership::link::Request;
use meshd::membership::record::{Role, State};
use meshd::membership::registry::{Proof, Refused, Registry, Setup};
use meshd::membership::server::Server;
use meshd::membership::store::sqlite::Sqlite;
use meshd::membership::store::{LeaseId, Outcome, Snapshot, Store, StoreError, Txn, Watch};
use meshd::membership::tls::Trust;
use meshd::membership::token::Token;
use tempfile::TempDir;

struct Two {
    first: Arc<Registry>,
    /// It is behind.
    second: Arc<Registry>,
    at_first: Server,
    at_second: Server,
    store: Sqlite,
    _dir: TempDir,
}

async fn two() -> Two {
    let dir = TempDir::new().unwrap();
    let store = Sqlite::open(&dir.path().join("db")).await.unwrap();
    let setup = || Setup { candidate: Some("c".to_owned()), shared: true, ..harness::setup() };
    let open = async || Arc::new(Registry::open(Arc::new(store.clone()), setup(), Now::read()).await.unwrap());
    let (first, second) = (open().await, open().await);
    let serve = async |registry: &Arc<Registry>| {
        let names = ["127.0.0.1".to_owned()];
        Server::start("127.0.0.1:0".parse().unwrap(), registry.clone(), &names).await.unwrap()
    };
    let (at_first, at_second) = (serve(&first).await, serve(&second).await);
    Two { first, second, at_first, at_second, store, _dir: dir }
}

impl Two {
    async fn token(&self) -> Token {
        self.first.mint(Now::read(), Role::Agent, None, None, None, "").await.unwrap()
    }

    async fn state(&self, name: &str) -> State {
        self.first.catch().await.unwrap();
        self.first.records().into_iter().find(|record| record.name == name).unwrap().state
    }
}

async fn ask(registry: &Registry, request: Request) -> Result<(), Refused> {
    registry.request(Now::read(), &request).await.map(drop)
}

fn drain(name: &str, draining: bool) -> Request {
    let name = name.to_owned();
    if draining { Request::NodeDrain { name } } else { Request::NodeUndrain { name } }
}

/// A store that can be cut off, and counts how often it was asked for what it has forgotten.
struct Cut(Sqlite, AtomicBool, AtomicU32);

impl Cut {
    fn of(store: Sqlite) -> Arc<Self> {
        Arc::new(Cut(store, AtomicBool::new(false), AtomicU32::new(0)))
    }
    fn there(&self) -> Result<&Sqlite, StoreError> {
        let (place, detail) = ("here".to_owned(), "cut off".to_owned());
        if self.1.load(Ordering::Relaxed) { Err(StoreError::Unavailable { place, detail }) } else { Ok(&self.0) }
    }
}

impl Store for Cut {
    fn range<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Snapshot, StoreError>> {
        Box::pin(async move { self.there()?.range(prefix).await })
    }
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        Box::pin(async move { self.there()?.txn(txn).await })
    }
    fn watch<'a>(&'a self, prefix: &'a str, after: u64) -> BoxFuture<'a, Result<Watch, StoreError>> {
        Box::pin(async move {
            let watch = self.there()?.watch(prefix, after).await;
            self.2.fetch_add(u32::from(matches!(watch, Err(StoreError::Compacted { .. }))), Ordering::Relaxed);
            watch
        })
    }
    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        Box::pin(async move { self.there()?.grant(ttl).await })
    }
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.there()?.keep_alive(lease).await })
    }
    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.there()?.revoke(lease).await })
    }
}

/// Its nodes go elsewhere before the others take them for silent; and it takes none for silent that it could not hear of.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_its_store_says_so_and_judges_nobody() {
    let dir = TempDir::new().unwrap();
    let store = Cut::of(Sqlite::open(&dir.path().join("db")).await.unwrap());
    let setup = Setup { candidate: Some("c".to_owned()), shared: true, ..harness::setup() };
    let mut now = Now::read();
    let registry = Registry::open(store.clone(), setup, now).await.unwrap();
    let token = registry.mint(now, Role::Server, None, None, None, "").await.unwrap();
    let keep = Keep::open(dir.path()).unwrap();
    let join = JoinRequest { clock: now.unix, ..harness::request(&keep, "n", Role::Server) };
    let id = registry.join(now, &join, &Proof::Token(token.id, token.secret), None).await.unwrap().id;
    let mut pass = async |seconds: u32, beats: bool| {
        let mut failed = 0;
        for _ in 0..seconds / 4 {
            now.mono += Duration::from_secs(4);
            if beats {
                registry.beat(now, &id, None, Default::default());
            }
            failed += u32::from(registry.tick(now).await.is_err());
        }
        (failed > 0, registry.is_away(now), registry.records()[0].state)
    };
    assert_eq!(pass(60, true).await, (false, false, State::Ready));
    store.1.store(true, Ordering::Relaxed);
    assert_eq!(pass(8, false).await, (true, false, State::Ready), "an election is no reason to go");
    assert_eq!(pass(100, false).await, (true, true, State::Ready));
    let said = async |later: u64| {
        let now = Now { mono: Now::read().mono + Duration::from_secs(later), ..Now::read() };
        registry.request(now, &Request::ClusterStatus).await.unwrap()
    };
    let status = said(1000).await;
    assert!(status["summary"].as_str().unwrap().contains("nothing can be changed"), "{status}");
    assert!(status["warnings"][0].as_str().unwrap().contains("has not answered"), "{status}");
    store.1.store(false, Ordering::Relaxed);
    assert_eq!(pass(20, false).await, (false, false, State::Ready));
    let status = said(0).await;
    assert_eq!(status["warnings"].as_array().map(Vec::len), Some(0), "positive control: {status}");
    assert_eq!(pass(60, false).await, (false, false, State::NotReady), "positive control");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_at_once_wherever_it_was_made() {
    let two = two().await;
    let token = two.token().await;
    harness::join(&two.at_second.address().into(), &token, "n", Role::Agent).await.unwrap();
    // positive control
    let forged = Token { secret: meshd::membership::token::TokenSecret([7; 20]), ..token };
    let refused = harness::join(&two.at_second.address().into(), &forged, "m", Role::Agent).await;
    assert_eq!(refused.err().unwrap().code(), Some("bad-token"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_seems_to_change_nothing_is_carried_out() {
    let two = two().await;
    let token = two.token().await;
    harness::join(&two.at_second.address().into(), &token, "n", Role::Agent).await.unwrap();
    // each where the state of before is the one that is ordered
    ask(&two.first, drain("n", true)).await.unwrap();
    ask(&two.second, drain("n", false)).await.unwrap();
    assert_eq!(two.state("n").await, State::Ready);
    ask(&two.first, drain("n", true)).await.unwrap();
    assert_eq!(two.state("n").await, State::Draining);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_and_a_token_that_another_server_made_are_there() {
    let two = two().await;
    let token = two.token().await;
    harness::join(&two.at_first.address().into(), &token, "n", Role::Agent).await.unwrap();
    ask(&two.second, Request::TokenRevoke { id: token.id.to_string() }).await.unwrap();
    let late = harness::join(&two.at_first.address().into(), &token, "m", Role::Agent).await;
    assert_eq!(late.err().unwrap().code(), Some("token-revoked"));
    let token = two.token().await;
    harness::join(&two.at_first.address().into(), &token, "m", Role::Agent).await.unwrap();
    ask(&two.second, Request::NodeRemove { name: "m".to_owned() }).await.unwrap();
    let nobody = ask(&two.second, Request::NodeRemove { name: "m".to_owned() }).await;
    assert!(matches!(nobody, Err(Refused::NoSuchNode(_))), "positive control: {nobody:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_is_not_told_that_it_is_none() {
    let two = two().await;
    let token = two.token().await;
    let node = harness::join(&two.at_first.address().into(), &token, "n", Role::Agent).await.unwrap();
    // removed, of which the second knows, and let in again, of which it does not
    ask(&two.second, Request::NodeRemove { name: "n".to_owned() }).await.unwrap();
    two.first.catch().await.unwrap();
    let again = harness::request(&node.keep, "n", Role::Agent);
    harness::join_raw(&two.at_first.address().into(), &node.keep, &token, again).await.unwrap();
    let identity = Some(node.keep.client_identity(&node.member));
    let trust = Trust::Ca(two.second.authority().certificate().clone());
    let mut connection = Connection::open(&two.at_second.address().into(), trust, identity).await.unwrap();
    let poll = Poll { revision: None, no_wait: true, reaches: vec![], paths: vec![] };
    connection.ask::<PollAnswer>(Method::POST, "/v1/poll", &poll).await.unwrap();
    ask(&two.first, Request::NodeRemove { name: "n".to_owned() }).await.unwrap();
    two.second.catch().await.unwrap();
    let gone = connection.ask::<PollAnswer>(Method::POST, "/v1/poll", &poll).await;
    assert_eq!(gone.err().unwrap().code(), Some("removed"), "positive control");
}

/// A node that comes from a server that knows more must not get the list of before: its peers would vanish.
#[tokio::test(flavor = "multi_thread")]
async fn no_list_goes_back_in_time() {
    let two = two().await;
    let token = two.token().await;
    let node = harness::join(&two.at_first.address().into(), &token, "n", Role::Agent).await.unwrap();
    two.second.catch().await.unwrap();
    harness::join(&two.at_first.address().into(), &token, "m", Role::Agent).await.unwrap();
    assert!(two.second.revision() < two.first.revision(), "positive control: it is behind");
    let identity = || Some(node.keep.client_identity(&node.member));
    let trust = || Trust::Ca(two.second.authority().certificate().clone());
    let mut connection = Connection::open(&two.at_second.address().into(), trust(), identity()).await.unwrap();
    let poll = Poll { revision: Some(two.first.revision()), no_wait: true, reaches: vec![], paths: vec![] };
    let answer: PollAnswer = connection.ask(Method::POST, "/v1/poll", &poll).await.unwrap();
    assert!(matches!(answer.news, News::Same { .. }), "{:?}", answer.news);

    // and where it cannot learn more, it says so, instead of what it has
    harness::join(&two.at_first.address().into(), &token, "o", Role::Agent).await.unwrap();
    two.store.close().await;
    let poll = Poll { revision: Some(two.first.revision()), no_wait: true, reaches: vec![], paths: vec![] };
    let refused = connection.ask::<PollAnswer>(Method::POST, "/v1/poll", &poll).await;
    assert_eq!(refused.err().unwrap().code(), Some("store"));
}

/// Of the servers that run nobody is missed, whatever this one wrote itself since it last heard from the store.
#[tokio::test(flavor = "multi_thread")]
async fn who_came_before_a_change_of_ours_is_known_when_we_follow() {
    let two = two().await;
    let running = async |registry: &Registry| {
        let status = registry.request(Now::read(), &Request::ClusterStatus).await.unwrap();
        status["tolerance"].as_u64().unwrap() + 1
    };
    two.first.set_servers(vec![two.at_first.address().into()]);
    two.second.set_servers(vec![two.at_second.address().into()]);
    two.second.tick(Now::read()).await.unwrap();
    two.first.tick(Now::read()).await.unwrap();
    assert_eq!(running(&two.first).await, 1, "positive control: it has not heard of the second yet");
    two.token().await;
    let followed = two.first.clone();
    let following = tokio::spawn(async move { followed.follow().await });
    for _ in 0..200 {
        if running(&two.first).await == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(running(&two.first).await, 2);
    following.abort();
}

/// Where nobody changed the list for long, the store has forgotten that last change, and no later one: it is read once.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_forgot_its_last_change_is_not_read_again_and_again() {
    let two = two().await;
    // what servers say of themselves changes no list
    two.first.set_servers(vec![two.at_first.address().into()]);
    two.first.tick(Now::read()).await.unwrap();
    let now = two.store.range("").await.unwrap().revision;
    two.store.compact(now).await.unwrap();
    let store = Cut::of(two.store.clone());
    let setup = Setup { candidate: Some("c".to_owned()), shared: true, ..harness::setup() };
    let third = Arc::new(Registry::open(store.clone(), setup, Now::read()).await.unwrap());
    let followed = third.clone();
    let following = tokio::spawn(async move { followed.follow().await });
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(store.2.load(Ordering::Relaxed), 0);
    let token = two.token().await;
    harness::join(&two.at_first.address().into(), &token, "n", Role::Agent).await.unwrap();
    for _ in 0..100 {
        if !third.records().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(third.records().len(), 1, "positive control: it follows");
    let last = store.watch("", now - 1).await;
    assert!(matches!(last, Err(StoreError::Compacted { .. })), "positive control: that is forgotten");
    following.abort();
}
