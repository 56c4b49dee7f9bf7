//! Two servers over one database, as processes: what is done at one is true at the other, and a `kill -9` of one loses
//! nothing that it acknowledged.

use std::path::Path;
use std::time::{Duration, Instant};

use meshd::membership::address::ServerAddress;
use meshd::membership::link::{FromMeshd, Request};
use meshd::membership::record::Role;
use meshd::membership::settings::{Datastore, Secret, Settings};
use meshd::membership::token::Token;
use tempfile::TempDir;

use super::servers::{Server, block_on, free_port};
use super::sidecar::{PATIENCE, Sidecar};

/// The second of them may have another server of the same database.
pub(crate) fn two_servers(server: &Server, other: &Server) {
    let begun = Instant::now();
    let told = |what: &str| println!("{:?}: {:>6.2} s  - {what}", server.kind, begun.elapsed().as_secs_f64());
    let database = block_on(server.database("cluster"));
    let dirs: Vec<TempDir> = (0..6).map(|_| TempDir::new().unwrap()).collect();
    let at_other = other.at("cluster", other.port);
    let (a_settings, mut b_settings) = (settings(dirs[0].path(), &database), settings(dirs[1].path(), &at_other));
    let mut a = Sidecar::start(&a_settings, "a", "10.9.0.1:8472");
    a.until("a makes the cluster", |s| s.status.connected);

    told("a cluster is there");

    // Nobody serves a cluster by mistake; a token for servers makes it meant, once.
    ends_with(&b_settings, "already");
    let token = mint(&mut a, Role::Server);
    b_settings.token = Some(Secret::new(&token));
    let mut b = Sidecar::start(&b_settings, "b", "10.9.0.2:8472");
    b.until("b joins", |s| s.status.connected && s.nodes.len() == 2);
    a.until("a hears of b", |s| s.nodes.len() == 2);
    let mut c_settings = settings(dirs[2].path(), &database);
    c_settings.token = Some(Secret::new(&token));
    ends_with(&c_settings, "used up");

    told("a second server is there");

    // A token of a's is good at b; both hear of who joined.
    let token = mint(&mut a, Role::Agent);
    let mut agent = Sidecar::start(&agent_at(&b_settings, &token, dirs[3].path()), "n1", "10.9.0.11:8472");
    agent.until("an agent joins by way of b", |s| s.status.connected && s.nodes.len() == 3);
    a.until("a hears of it", |s| s.nodes.len() == 3);
    b.until("so does b", |s| s.nodes.len() == 3);

    // One use is one node, also where two servers are asked at once.
    let token = mint(&mut b, Role::Agent);
    let mut one = Sidecar::start(&agent_at(&a_settings, &token, dirs[4].path()), "n2", "10.9.0.12:8472");
    let mut other = Sidecar::start(&agent_at(&b_settings, &token, dirs[5].path()), "n3", "10.9.0.13:8472");
    told("an agent is there");
    let used_up = |s: &Sidecar| s.status.problem.as_ref().is_some_and(|problem| problem.contains("used up"));
    for racer in [&mut one, &mut other] {
        racer.until("in or out", |s| s.status.connected || used_up(s));
    }
    assert_eq!([&one, &other].iter().filter(|s| s.status.connected).count(), 1, "exactly one joined");
    a.until("a hears of the one", |s| s.nodes.len() == 4);
    b.until("so does b", |s| s.nodes.len() == 4);

    told("one of two won");

    // Killed in the middle of its writes.
    let mut acknowledged = Vec::new();
    for _ in 0..20 {
        acknowledged.push(mint(&mut b, Role::Agent).parse::<Token>().unwrap().id.to_string());
    }
    for id in 1000..1010 {
        b.say(&FromMeshd::Request { id, request: request(Role::Agent) });
    }
    b.kill();
    // the other server hears of each a moment later at most
    let begun = Instant::now();
    while !acknowledged.is_empty() {
        let kept = a.ask(Request::TokenList).unwrap();
        acknowledged.retain(|id| !kept.as_array().unwrap().iter().any(|token| token["id"] == **id));
        assert!(begun.elapsed() < PATIENCE, "lost: {acknowledged:?}");
    }
    told("nothing is lost");
    let status = a.ask(Request::ClusterStatus).unwrap();
    assert_eq!(status["datastore"], server.scheme(), "{status}");
    b_settings.token = None;
    let mut b = Sidecar::start(&b_settings, "b", "10.9.0.2:8472");
    b.until("b is back, without a token", |s| s.status.connected && s.nodes.len() == 4);
    told("the killed server is back");
    // who reaches whom: each server has rows of its own, and either of them shows all
    let matrix = |of: &mut Sidecar| of.ask(Request::ClusterMatrix).unwrap();
    let begun = Instant::now();
    while matrix(&mut a)["silent"].as_array().unwrap().len() + matrix(&mut b)["silent"].as_array().unwrap().len() > 0 {
        assert!(begun.elapsed() < PATIENCE, "{} {}", matrix(&mut a), matrix(&mut b));
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(matrix(&mut a)["missing"], serde_json::json!([]));
    b.kill();
    let left = matrix(&mut a);
    let b_address = ServerAddress::from(b_settings.bind_address).to_string();
    assert_eq!(left["missing"][0]["server"], b_address, "{left}");
    told("the matrix is whole, and says when it is not");
    for agent in [agent, one, other] {
        agent.kill();
    }

    // Somebody empties the database: nobody goes on as if nothing were, and nobody makes another cluster in it.
    block_on(server.admin("cluster", "DELETE FROM meshd_kv"));
    let begun = Instant::now();
    let gone = |problem: &Option<String>| problem.as_ref().is_some_and(|p| p.contains("no longer in its datastore"));
    while !gone(&a.status.problem) {
        assert!(begun.elapsed() < PATIENCE, "{:?}", a.status);
        a.hear();
    }
    told("an emptied database is noticed");
    assert!(!a.child.wait().unwrap().success());
    ends_with(&a_settings, "no longer in its datastore");
    assert_eq!(
        block_on(server.number("cluster", "SELECT COUNT(*) FROM meshd_kv WHERE name = 'cluster'")),
        0,
        "no new one"
    );
}

/// The sidecar ends, and says why.
fn ends_with(settings: &Settings, what: &str) {
    let mut sidecar = Sidecar::start(settings, "x", "10.9.0.99:8472");
    let begun = Instant::now();
    while !sidecar.status.problem.as_ref().is_some_and(|problem| problem.contains(what)) {
        assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", sidecar.status);
        sidecar.hear();
    }
    assert!(!sidecar.child.wait().unwrap().success());
}

fn settings(dir: &Path, database: &Datastore) -> Settings {
    let mut settings = Settings::new(Role::Server, dir);
    settings.bind_address = ([127, 0, 0, 1], free_port()).into();
    settings.cluster_cidr = vec!["10.42.0.0/16".parse().unwrap()];
    settings.datastore = database.clone();
    settings.log = "error".to_owned();
    settings
}

/// An agent that asks this server first, and knows no other.
fn agent_at(server: &Settings, token: &str, dir: &Path) -> Settings {
    let token = Token { servers: vec![ServerAddress::from(server.bind_address)], ..token.parse().unwrap() };
    let mut settings = Settings::new(Role::Agent, dir);
    settings.token = Some(Secret::new(token.reveal().reveal()));
    settings.log = "error".to_owned();
    settings
}

fn request(role: Role) -> Request {
    Request::TokenCreate { role, ttl: Some(600), uses: Some(1), node: None }
}

fn mint(server: &mut Sidecar, role: Role) -> String {
    server.ask(request(role)).unwrap()["token"].as_str().unwrap().to_owned()
}
