//! The registry's rules over a real store, with time as an argument.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use meshd::membership::api::{JoinAnswer, JoinRequest, Myself, News};
use meshd::membership::authority::identity_of_request;
use meshd::membership::clock::Now;
use meshd::membership::link::{Peers, Request};
use meshd::membership::random;
use meshd::membership::record::{Mode, Role, State};
use meshd::membership::registry::{OpenError, Proof, REST, Refused, Registry, Setup};
use meshd::membership::settings::{MaskSizes, PurgeAfter};
use meshd::membership::store::sqlite::Sqlite;
use meshd::membership::token::Token;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use tempfile::TempDir;

const HOUR: u64 = 3600;

struct Sim {
    registry: Arc<Registry>,
    store: Sqlite,
    now: Now,
    _dir: TempDir,
}

struct Node {
    name: String,
    role: Role,
    request: String,
    id: String,
    underlay: SocketAddr,
}

impl Node {
    fn new(n: u8) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let request = CertificateParams::default().serialize_request(&key).unwrap();
        Node {
            name: format!("n{n}"),
            role: Role::Agent,
            request: STANDARD.encode(request.der()),
            id: String::new(),
            underlay: SocketAddr::from(([10, 9, 0, n], 8472)),
        }
    }

    fn proof(&self) -> Proof {
        Proof::Certificate(identity_of_request(&STANDARD.decode(&self.request).unwrap()).unwrap())
    }
}

impl Sim {
    async fn new(cidr: &str, masks: MaskSizes) -> Self {
        let dir = TempDir::new().unwrap();
        let store = Sqlite::open(&dir.path().join("db")).await.unwrap();
        let now = Now { unix: 1_800_000_000, mono: Duration::from_secs(5000) };
        let setup = setup(cidr, masks);
        let registry = Arc::new(Registry::open(Arc::new(store.clone()), setup, now).await.unwrap());
        Sim { registry, store, now, _dir: dir }
    }

    fn pass(&mut self, seconds: u64) {
        self.now.unix += i64::try_from(seconds).unwrap();
        self.now.mono += Duration::from_secs(seconds);
    }

    /// So many seconds, with heartbeats of these.
    async fn live(&mut self, seconds: u64, alive: &[&Node]) {
        for second in 0..seconds {
            self.pass(1);
            if second % 10 == 0 {
                alive.iter().for_each(|node| self.registry.beat(self.now, &node.id, None, Peers::default()));
            }
            self.registry.tick(self.now).await.unwrap();
        }
    }

    async fn join(&self, node: &Node, proof: &Proof, control_only: bool) -> Result<JoinAnswer, Refused> {
        let join = JoinRequest {
            name: node.name.clone(),
            role: node.role,
            myself: Myself {
                underlay: vec![node.underlay],
                public_keys: vec![],
                encryption: Mode::None,
                labels: BTreeMap::new(),
                taints: vec![],
            },
            control_only,
            request: node.request.clone(),
            clock: self.now.unix,
            token: None,
        };
        self.registry.join(self.now, &join, proof, None).await
    }

    async fn joined(&self, n: u8) -> Node {
        let mut node = Node::new(n);
        node.id = self.join(&node, &Proof::Secret, false).await.unwrap().id;
        node
    }

    fn subnets(&self, node: &Node) -> Vec<String> {
        let record = self.registry.records().into_iter().find(|r| r.name == node.name).unwrap();
        record.subnets.iter().map(ToString::to_string).collect()
    }

    async fn ask(&self, request: Request) -> Result<serde_json::Value, Refused> {
        self.registry.request(self.now, &request).await
    }

    async fn mint(&self, node: Option<&str>) -> Proof {
        let Token { id, secret, .. } = self.registry.mint(self.now, Role::Agent, None, None, node, "").await.unwrap();
        Proof::Token(id, secret)
    }
}

fn setup(cidr: &str, masks: MaskSizes) -> Setup {
    let cidrs = cidr.split(',').map(|c| c.parse().unwrap()).collect();
    Setup { cidrs, masks, secret: None, purge_after: PurgeAfter::Seconds(HOUR), ..Setup::default() }
}

const MASKS: MaskSizes = MaskSizes { v4: 24, v6: 64 };

#[tokio::test]
async fn a_purged_node_comes_back_by_its_certificate_with_its_subnet() {
    let mut sim = Sim::new("10.42.0.0/16,fd00:42::/48", MASKS).await;
    let (a, b, c) = (sim.joined(1).await, sim.joined(2).await, sim.joined(3).await);
    let had = sim.subnets(&c);
    assert_eq!(had, ["10.42.2.0/24", "fd00:42:0:2::/64"]);
    sim.live(60, &[&a, &b, &c]).await;
    sim.live(HOUR + 120, &[&a, &b]).await;
    assert!(!sim.registry.has(&c.id), "purged");
    let refused = sim.registry.member(&identity_of_request(&STANDARD.decode(&c.request).unwrap()).unwrap());
    assert_eq!(refused.unwrap_err().code(), "purged");
    // Its subnet rests: the next node gets another.
    let d = sim.joined(4).await;
    assert_eq!(sim.subnets(&d)[0], "10.42.3.0/24");
    // Another's certificate is not its own.
    assert_eq!(sim.join(&c, &a.proof(), false).await.unwrap_err().code(), "not-allowed");
    let back = sim.join(&c, &c.proof(), false).await.unwrap();
    assert_eq!((back.id, sim.subnets(&c)), (c.id.clone(), had));
}

#[tokio::test]
async fn a_removed_node_does_not_come_back_by_its_certificate() {
    let mut sim = Sim::new("10.42.0.0/16", MASKS).await;
    let (a, b) = (sim.joined(1).await, sim.joined(2).await);
    sim.ask(Request::NodeRemove { name: "n2".to_owned() }).await.unwrap();
    assert_eq!(sim.join(&b, &b.proof(), false).await.unwrap_err().code(), "removed");
    // Its subnet rests for a week, and then is anybody's.
    assert_eq!(sim.subnets(&sim.joined(3).await), ["10.42.2.0/24"]);
    sim.pass(u64::try_from(REST).unwrap() + 10);
    sim.live(2, &[&a]).await;
    assert_eq!(sim.subnets(&sim.joined(4).await), ["10.42.1.0/24"]);
    assert_eq!(sim.join(&b, &b.proof(), false).await.unwrap_err().code(), "removed", "still");
    let token = sim.mint(None).await;
    sim.join(&b, &token, false).await.unwrap();
    assert_eq!(sim.subnets(&b), ["10.42.3.0/24"], "positive control: with a token, and what is free now");
}

#[tokio::test]
async fn exhaustion_is_a_refusal_and_control_only_takes_single_addresses() {
    let sim = Sim::new("10.42.0.0/22", MASKS).await;
    let mut server = Node::new(100);
    server.id = sim.join(&server, &Proof::Secret, true).await.unwrap().id;
    assert_eq!(sim.subnets(&server), ["10.42.3.1/32"]);
    for n in 1..=3 {
        sim.joined(n).await;
    }
    let late = Node::new(4);
    let refused = sim.join(&late, &Proof::Secret, false).await.unwrap_err();
    assert_eq!(refused.code(), "subnets-exhausted");
    assert!(refused.to_string().contains("10.42.0.0/22"), "{refused}");
    assert!(sim.join(&late, &Proof::Secret, true).await.is_ok(), "a single address still fits");
    assert_eq!(sim.subnets(&late), ["10.42.3.2/32"]);
}

#[tokio::test]
async fn a_dead_node_is_replaced_by_a_token_for_its_name() {
    let mut sim = Sim::new("10.42.0.0/16", MASKS).await;
    let (a, b) = (sim.joined(1).await, sim.joined(2).await);
    let mut new = Node::new(2);
    let (general, bound) = (sim.mint(None).await, sim.mint(Some("n2")).await);
    sim.live(20, &[&a, &b]).await;
    assert_eq!(sim.join(&new, &bound, false).await.unwrap_err().code(), "name-taken", "while it lives");
    sim.live(60, &[&a]).await;
    assert_eq!(sim.join(&new, &general, false).await.unwrap_err().code(), "name-taken", "by any token");
    new.id = sim.join(&new, &bound, false).await.unwrap().id;
    assert!(!sim.registry.has(&b.id) && sim.registry.has(&new.id));
    assert_eq!(sim.subnets(&new), ["10.42.2.0/24"], "its own subnet: the old one was bound to another key");
    assert_eq!(sim.join(&b, &b.proof(), false).await.unwrap_err().code(), "removed");
}

#[tokio::test]
async fn foreign_members_are_checked_like_others() {
    let sim = Sim::new("10.42.0.0/16", MASKS).await;
    let a = sim.joined(1).await;
    let add = |name: &str, underlay: &str, subnets: &[&str]| Request::NodeAdd {
        name: name.to_owned(),
        underlay: vec![underlay.parse().unwrap()],
        subnets: subnets.iter().map(|s| s.parse().unwrap()).collect(),
        mac: None,
        public_key: None,
    };
    for (bad, code) in [
        (add("n1", "10.9.0.50:1", &[]), "name-taken"),
        (add("k", &a.underlay.to_string(), &[]), "bad-record"),
        (add("k", "10.42.0.1:1", &[]), "bad-record"),
        (add("k", "10.9.0.50:1", &["0.0.0.0/0"]), "bad-record"),
        (add("k", "10.9.0.50:1", &["10.42.0.128/25"]), "bad-record"),
        (add("k", "10.9.0.50:1", &["10.0.0.0/8"]), "bad-record"),
        (add("k", "10.9.0.50:1", &["10.77.0.0/24", "10.77.0.0/25"]), "bad-record"),
        (add("k", "10.9.0.50:1", &["10.77.0.5/24"]), "bad-record"),
    ] {
        assert_eq!(sim.ask(bad.clone()).await.unwrap_err().code(), code, "{bad:?}");
    }
    let record = sim.ask(add("k", "10.9.0.50:1", &["10.77.0.0/24", "10.42.1.0/24"])).await.unwrap();
    assert_eq!((&record["role"], &record["state"]), (&"foreign".into(), &"ready".into()));
    assert_eq!(sim.subnets(&sim.joined(2).await), ["10.42.2.0/24"], "round what was given away");
}

#[tokio::test]
async fn what_every_node_would_refuse_the_whole_list_for_is_refused_here() {
    let sim = Sim::new("10.42.0.0/16", MaskSizes { v4: 24, v6: 64 }).await;
    let node = sim.joined(1).await;
    let add = |name: &str, n: u8, subnet: &str| Request::NodeAdd {
        name: name.to_owned(),
        underlay: vec![SocketAddr::from(([10, 9, 1, n], 8472))],
        subnets: vec![subnet.parse().unwrap()],
        mac: None,
        public_key: None,
    };
    sim.ask(add("f1", 1, "10.99.1.0/24")).await.unwrap();
    let refused = sim.ask(add("f2", 2, "10.9.0.0/24")).await.unwrap_err().to_string();
    assert!(refused.contains("underlay address lies within 10.9.0.0/24"), "{refused}");
    let good = Myself {
        underlay: vec![node.underlay],
        public_keys: vec![],
        encryption: Mode::None,
        labels: BTreeMap::new(),
        taints: vec![],
    };
    let key = || STANDARD.encode(random::bytes::<32>());
    let lanes = |count: usize| Myself { public_keys: (0..count).map(|_| key()).collect(), ..good.clone() };
    let stray = Myself { underlay: vec!["10.99.1.7:8472".parse().unwrap()], ..good.clone() };
    sim.registry.update(sim.now, &node.id, &lanes(16)).await.unwrap();
    for bad in [lanes(17), stray] {
        assert!(matches!(sim.registry.update(sim.now, &node.id, &bad).await, Err(Refused::BadRecord(_))), "{bad:?}");
    }
}

#[tokio::test]
async fn readiness_and_draining_are_in_the_list_and_deltas_hold_what_changed() {
    let mut sim = Sim::new("10.42.0.0/16", MASKS).await;
    let (a, b) = (sim.joined(1).await, sim.joined(2).await);
    sim.live(20, &[&a, &b]).await;
    let News::List { revision, nodes } = sim.registry.local_news(None) else { panic!() };
    assert_eq!(nodes.len(), 2);
    assert_eq!(sim.registry.local_news(Some(revision)), News::Same { revision }, "heartbeats are no revision");
    sim.live(60, &[&a]).await;
    let News::Delta { from, to, upsert, remove } = sim.registry.local_news(Some(revision)) else { panic!() };
    assert!(from == revision && to > revision && remove.is_empty());
    assert_eq!(upsert.iter().map(|n| (n.id.clone(), n.state)).collect::<Vec<_>>(), [(b.id.clone(), State::NotReady)]);
    sim.ask(Request::NodeDrain { name: "n2".to_owned() }).await.unwrap();
    sim.live(5, &[&a, &b]).await;
    let state = |sim: &Sim| sim.registry.records().iter().find(|r| r.name == "n2").unwrap().state;
    assert_eq!(state(&sim), State::Draining, "ready, and still draining");
    sim.ask(Request::NodeUndrain { name: "n2".to_owned() }).await.unwrap();
    assert_eq!(state(&sim), State::Ready);
    assert!(matches!(sim.registry.local_news(Some(to + 100)), News::List { .. }), "from a future that never was");
}

#[tokio::test]
async fn two_servers_on_one_store_give_nothing_away_twice() {
    let sim = Sim::new("10.42.0.0/16", MASKS).await;
    let other = Registry::open(Arc::new(sim.store.clone()), setup("10.42.0.0/16", MASKS), sim.now).await.unwrap();
    let other =
        Sim { registry: Arc::new(other), store: sim.store.clone(), now: sim.now, _dir: TempDir::new().unwrap() };
    assert_eq!(sim.registry.cluster(), other.registry.cluster());
    let once = sim.registry.mint(sim.now, Role::Agent, None, Some(5), None, "").await.unwrap();
    other.registry.mint(sim.now, Role::Agent, None, None, None, "makes it read again").await.unwrap();
    let nodes: Vec<Node> = (1..=40).map(Node::new).collect();
    let joins = nodes.iter().enumerate().map(|(n, node)| {
        let at = if n % 2 == 0 { &sim } else { &other };
        let proof = Proof::Token(once.id, once.secret.clone());
        async move { at.join(node, &proof, false).await.map(drop) }
    });
    let done = futures::future::join_all(joins).await;
    assert_eq!(done.iter().filter(|r| r.is_ok()).count(), 5, "{done:?}");
    let fresh = Registry::open(Arc::new(sim.store.clone()), setup("10.42.0.0/16", MASKS), sim.now).await.unwrap();
    let subnets: HashSet<_> = fresh.records().iter().map(|r| r.subnets.clone()).collect();
    assert_eq!((fresh.records().len(), subnets.len()), (5, 5));
}

#[tokio::test]
async fn a_full_disk_refuses_joins_and_tells_so_and_recovers() {
    let sim = Sim::new("10.42.0.0/16", MASKS).await;
    sim.store.limit_pages(1).await.unwrap();
    let big = Node::new(1);
    let mut refused = None;
    for _ in 0..200 {
        match sim.registry.mint(sim.now, Role::Agent, None, None, None, &"x".repeat(4000)).await {
            Ok(_) => {}
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    let refused = refused.expect("the disk is full");
    assert!(refused.code() == "store" && refused.to_string().contains("disk is full"), "{refused}");
    sim.store.limit_pages(1 << 20).await.unwrap();
    sim.join(&big, &Proof::Secret, false).await.unwrap();
}

/// A cluster without a server is none: nobody could join or change anything, and a restart would bring the server back.
#[tokio::test]
async fn the_only_server_stays() {
    let sim = Sim::new("10.42.0.0/16", MASKS).await;
    let server = |n| Node { role: Role::Server, ..Node::new(n) };
    let remove = |n: u8| Request::NodeRemove { name: format!("n{n}") };
    let first = sim.join(&server(1), &Proof::Local, false).await.unwrap();
    let agent = sim.join(&Node::new(2), &Proof::Secret, false).await.unwrap();
    let refused = sim.ask(remove(1)).await.unwrap_err();
    assert!(refused.code() == "last-server" && refused.to_string().contains("`n1` is the cluster's only server"));
    let refused = sim.registry.leave(sim.now, &first.id).await.unwrap_err();
    assert!(refused.code() == "last-server" && refused.to_string().contains("one other node would have none"));
    let second = sim.join(&server(3), &Proof::Local, false).await.unwrap();
    sim.ask(remove(1)).await.unwrap();
    assert_eq!(sim.registry.leave(sim.now, &second.id).await.unwrap_err().code(), "last-server");
    // the last node of all takes the cluster with it
    sim.registry.leave(sim.now, &agent.id).await.unwrap();
    sim.registry.leave(sim.now, &second.id).await.unwrap();
    let status = sim.ask(Request::ClusterStatus).await.unwrap();
    assert!(status["warnings"][0].as_str().unwrap().contains("no server is a member"), "{status}");
}

/// A backup on a new machine, or a data-dir that lost its `agent` folder: the only server is itself again.
#[tokio::test]
async fn the_only_server_takes_its_own_place() {
    let sim = Sim::new("10.42.0.0/16", MASKS).await;
    let server = |n| Node { role: Role::Server, ..Node::new(n) };
    sim.join(&server(1), &Proof::LocalAlone, false).await.unwrap();
    sim.join(&Node::new(2), &Proof::Secret, false).await.unwrap();
    let again = server(1);
    let shared = sim.join(&again, &Proof::Local, false).await.unwrap_err();
    assert_eq!(shared.code(), "name-taken", "where there may be others, it may be one of them");
    sim.join(&again, &Proof::LocalAlone, false).await.unwrap();
    let renamed = Node { name: "other".to_owned(), ..server(1) };
    sim.join(&renamed, &Proof::LocalAlone, false).await.unwrap();
    let names: Vec<_> = sim.registry.records().into_iter().map(|record| record.name).collect();
    assert_eq!(names, ["n2", "other"], "by its name, and by its address");
    assert_eq!(sim.subnets(&renamed), ["10.42.0.0/24"], "with what it had");
    assert_eq!(sim.subnets(&sim.joined(5).await), ["10.42.2.0/24"], "and that is nobody else's");
    let agent = Node { role: Role::Server, ..Node::new(2) };
    assert_eq!(sim.join(&agent, &Proof::LocalAlone, false).await.unwrap_err().code(), "name-taken", "not an agent's");
}

#[tokio::test]
async fn the_audit_log_tells_who_did_what_and_is_bounded() {
    let sim = Sim::new("10.42.0.0/16", MASKS).await;
    let token = sim.registry.mint(sim.now, Role::Agent, None, Some(1), None, "").await.unwrap();
    let proof = Proof::Token(token.id, token.secret.clone());
    sim.join(&Node::new(1), &proof, false).await.unwrap();
    sim.join(&Node::new(2), &proof, false).await.unwrap_err();
    sim.ask(Request::TokenRevoke { id: token.id.to_string() }).await.unwrap();
    let log = sim.registry.audit().await.unwrap();
    let what: Vec<_> = log.iter().map(|line| line.what.as_str()).collect();
    assert_eq!(what, ["create token", "join", "refuse: token-used-up", "revoke token"]);
    let text = serde_json::to_string(&log).unwrap();
    assert!(text.contains(&token.id.to_string()) && !text.contains(&random::hex(&token.secret.0)));
    for _ in 0..1100 {
        sim.registry.mint(sim.now, Role::Agent, None, None, None, "").await.unwrap();
    }
    assert_eq!(sim.registry.audit().await.unwrap().len(), 1000);
}

#[tokio::test]
async fn another_address_space_than_the_clusters_is_refused() {
    let sim = Sim::new("10.42.0.0/16", MASKS).await;
    let open = |cidr: &str, masks| Registry::open(Arc::new(sim.store.clone()), setup(cidr, masks), sim.now);
    for (cidr, masks) in [("10.43.0.0/16", MASKS), ("10.42.0.0/16", MaskSizes { v4: 25, v6: 64 })] {
        let error = open(cidr, masks).await.err().unwrap();
        assert!(matches!(error, OpenError::Row(_)) && error.to_string().contains("10.42.0.0/16"), "{error}");
    }
    assert!(open("10.42.0.0/16", MASKS).await.is_ok(), "positive control");
}
