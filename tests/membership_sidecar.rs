//! The sidecar as a process: what `meshd` says to it over the link, what it answers, and what a `kill -9` does.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use meshd::membership::link::{FromMeshd, FromSidecar, Peers, Request};
use meshd::membership::matrix::{Matrix, Watched};
use meshd::membership::record::Role;
use meshd::membership::registry::{GRACE, INTERVAL};
use meshd::membership::settings::{PurgeAfter, Secret, Settings};
use meshd::membership::token::Token;
use tempfile::TempDir;

use self::sidecar::{PATIENCE, Sidecar};

mod sidecar;

fn server_settings(dir: &Path, port: u16) -> Settings {
    let mut settings = Settings::new(Role::Server, dir);
    settings.bind_address = ([127, 0, 0, 1], port).into();
    settings.cluster_cidr = vec!["10.42.0.0/16".parse().unwrap(), "fd00:42::/48".parse().unwrap()];
    settings.log = "warn".to_owned();
    settings
}

fn agent_settings(dir: &Path, token: Option<&str>) -> Settings {
    let mut settings = Settings::new(Role::Agent, dir);
    settings.token = token.map(Secret::new);
    settings.log = "warn".to_owned();
    settings
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn mint(server: &mut Sidecar) -> String {
    let made = server.ask(Request::TokenCreate { role: Role::Agent, ttl: Some(600), uses: Some(1), node: None });
    made.unwrap()["token"].as_str().unwrap().to_owned()
}

#[test]
fn a_server_and_an_agent_become_a_cluster_and_a_kill_loses_nothing() {
    let (s, a, b) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let settings = server_settings(s.path(), free_port());
    let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
    server.until("the server's node joins", |s| s.status.connected && s.nodes.len() == 1);
    assert_eq!(server.nodes[0].role, Role::Server);
    let subnets: Vec<_> = server.nodes[0].subnets.iter().map(ToString::to_string).collect();
    assert_eq!(subnets, ["10.42.0.0/24", "fd00:42::/64"], "dual stack");

    // The token that lies ready.
    let path = s.path().join("server/node-token");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let ready = std::fs::read_to_string(&path).unwrap();
    assert!(ready.trim().parse::<Token>().is_ok());
    let mut agent = Sidecar::start(&agent_settings(a.path(), Some(ready.trim())), "a", "10.9.0.2:8472");
    agent.until("the agent joins", |s| s.status.connected && s.nodes.len() == 2);
    server.until("the server's node hears it", |s| s.nodes.len() == 2);

    // Requests: servers answer all, agents what they know, and otherwise name a server.
    let refused = agent.ask(Request::TokenList).unwrap_err();
    assert!(refused.contains("https://127.0.0.1:"), "{refused}");
    assert_eq!(agent.ask(Request::Nodes).unwrap().as_array().unwrap().len(), 2);
    let nodes = server.ask(Request::Nodes).unwrap();
    assert_eq!((&nodes[0]["name"], &nodes[1]["name"]), (&"a".into(), &"s".into()));
    assert!(nodes[0]["last_heartbeat"].is_string() && nodes[0]["observed"] == "127.0.0.1", "{nodes}");
    assert_eq!(server.ask(Request::ClusterStatus).unwrap()["tolerance"], 0);
    let second = Request::TokenCreate { role: Role::Server, ttl: None, uses: None, node: None };
    let refused = server.ask(second).unwrap_err();
    assert!(refused.contains("datastore that they share"), "{refused}");
    server.ask(Request::NodeDrain { name: "a".to_owned() }).unwrap();
    agent.until("draining", |s| s.nodes.iter().any(|n| n.state == meshd::membership::record::State::Draining));
    let foreign = server.ask(Request::NodeAdd {
        name: "kernel".to_owned(),
        underlay: vec!["10.9.0.77:8472".parse().unwrap()],
        subnets: vec![],
        mac: Some("0a:58:0a:09:00:4d".to_owned()),
        public_key: None,
    });
    assert_eq!(foreign.unwrap()["subnets"][0], "10.42.2.0/24");
    assert!(server.ask(Request::NodeRemove { name: "nobody".to_owned() }).unwrap_err().contains("nobody"));

    // What was acknowledged is there after a kill at any moment: a token that was shown, a node that joined.
    agent.until("the agent hears of the foreign member", |s| s.nodes.len() == 3);
    let token = mint(&mut server);
    server.kill();
    agent.until("the agent notices", |s| !s.status.connected);
    assert_eq!(agent.ask(Request::Nodes).unwrap().as_array().unwrap().len(), 3, "from its copy");
    let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
    server.until("back, with its nodes", |s| s.status.connected && s.nodes.len() == 3);
    agent.until("the agent is back", |s| s.status.connected);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), ready, "the same token lies ready");
    let mut other = Sidecar::start(&agent_settings(b.path(), Some(&token)), "b", "10.9.0.3:8472");
    other.until("the token is good", |s| s.status.connected && s.nodes.len() == 4);

    // A backup of the running server.
    let copy = s.path().join("copy.db");
    let backup = |to: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-sidecar"));
        command.arg("backup").arg("--data-dir").arg(s.path()).arg(to).stderr(Stdio::null());
        command.status().unwrap().success()
    };
    assert!(backup(&copy) && !backup(&copy));
    assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);

    // `meshd` goes: so does the sidecar.
    for mut sidecar in [agent, other, server] {
        drop((sidecar.write, sidecar.read));
        let start = Instant::now();
        while sidecar.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(5), "it stays when the link closes");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What nodes say of each other is one table, on a server as on an agent.
#[test]
fn who_reaches_whom_is_known_at_every_node() {
    let (s, a) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let settings = server_settings(s.path(), free_port());
    let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
    server.until("the server's node joins", |s| s.status.connected && s.nodes.len() == 1);
    let mut agent = Sidecar::start(&agent_settings(a.path(), Some(&mint(&mut server))), "a", "10.9.0.2:8472");
    agent.until("the agent joins", |s| s.status.connected && s.nodes.len() == 2);
    let id = |name: &str| agent.nodes.iter().find(|node| node.name == name).unwrap().id.clone();
    let [of_s, of_a] = ["s", "a"].map(id);
    let watched = |to: &str, up| Watched { to: to.to_owned(), up, rtt_us: Some(800), loss_permille: Some(20) };
    // somebody who is no member any more is in nobody's row
    server.say(&FromMeshd::Peers(Peers { heard: vec![], paths: vec![watched(&of_a, false), watched("gone", true)] }));
    agent.say(&FromMeshd::Peers(Peers { heard: vec![], paths: vec![watched(&of_s, true)] }));
    let begun = Instant::now();
    let told = |matrix: &Matrix| matrix.rows.len() == 2 && matrix.rows.iter().all(|row| row.to.len() == 1);
    let [there, here] = [&mut agent, &mut server].map(|node| {
        loop {
            let matrix: Matrix = serde_json::from_value(node.ask(Request::ClusterMatrix).unwrap()).unwrap();
            if told(&matrix) {
                break matrix;
            }
            assert!(begun.elapsed() < 2 * PATIENCE, "{matrix:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    for matrix in [&there, &here] {
        assert_eq!((&matrix.nodes, &matrix.silent, &matrix.missing), (&vec!["a".into(), "s".into()], &vec![], &vec![]));
        assert_eq!(matrix.rows[0].to, [watched("s", true)]);
        assert_eq!(matrix.rows[1].to, [watched("a", false)]);
    }
    // without a server the agent says what is missing, and not that all is well
    server.kill();
    agent.until("the agent notices", |s| !s.status.connected);
    let matrix: Matrix = serde_json::from_value(agent.ask(Request::ClusterMatrix).unwrap()).unwrap();
    assert_eq!((matrix.rows.len(), matrix.silent.len(), matrix.missing.len()), (0, 2, 1), "{matrix:?}");
    assert!(matrix.missing[0].server.contains("127.0.0.1"), "{matrix:?}");
    agent.kill();
}

/// What `meshd` says of its peers reaches the servers with the next heartbeat.
#[test]
#[ignore = "takes more than a minute"]
fn who_is_heard_by_a_ready_node_is_not_purged() {
    let (s, a, b) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut settings = server_settings(s.path(), free_port());
    settings.purge_after = PurgeAfter::Seconds(2);
    let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
    server.until("starts", |s| s.status.connected);
    let (for_a, for_b) = (mint(&mut server), mint(&mut server));
    let mut one = Sidecar::start(&agent_settings(a.path(), Some(&for_a)), "a", "10.9.0.2:8472");
    one.until("joins", |s| s.status.connected);
    let mut two = Sidecar::start(&agent_settings(b.path(), Some(&for_b)), "b", "10.9.0.3:8472");
    two.until("joins", |s| s.status.connected && s.nodes.len() == 3);
    let id = two.nodes.iter().find(|node| node.name == "b").unwrap().id.clone();
    one.say(&FromMeshd::Peers(Peers { heard: vec![id], paths: vec![] }));
    one.say(&FromMeshd::Ping);
    while !matches!(one.hear(), FromSidecar::Pong) {}
    two.kill();
    let quiet = |server: &mut Sidecar, time: Duration| {
        std::thread::sleep(time);
        server.ask(Request::Nodes).unwrap().as_array().unwrap().clone()
    };
    let nodes = quiet(&mut server, GRACE + INTERVAL + Duration::from_secs(5));
    assert_eq!(
        (nodes.len(), &nodes[1]["name"], &nodes[1]["state"]),
        (3, &"b".into(), &"not-ready".into()),
        "{nodes:?}"
    );
    one.say(&FromMeshd::Peers(Peers::default()));
    let nodes = quiet(&mut server, INTERVAL * 2 + Duration::from_secs(5));
    assert_eq!(nodes.len(), 2, "positive control: {nodes:?}");
    server.kill();
    one.kill();
}

#[test]
fn a_server_that_is_killed_while_many_tokens_are_made_keeps_each_that_was_shown() {
    let dir = TempDir::new().unwrap();
    let settings = server_settings(dir.path(), free_port());
    let mut shown: Vec<String> = Vec::new();
    for round in 0..4 {
        let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
        server.until("starts", |s| s.status.connected);
        let list = server.ask(Request::TokenList).unwrap();
        let ids: Vec<_> = list.as_array().unwrap().iter().filter_map(|t| t["id"].as_str()).collect();
        for token in &shown {
            let id = token.parse::<Token>().unwrap().id.to_string();
            assert!(ids.contains(&id.as_str()), "round {round}: {id} was shown and is lost");
        }
        shown.extend((0..10 + round).map(|_| mint(&mut server)));
        server.kill();
    }
    assert!(shown.len() > 40);
}

/// `MESHD_TOKEN` in a unit file stays there, and who has served a cluster is still its server.
#[test]
fn a_server_that_is_started_with_a_token_of_its_own_cluster_goes_on() {
    let (dir, stranger) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let settings = server_settings(dir.path(), free_port());
    let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
    server.until("starts", |s| s.status.connected);
    let token = mint(&mut server);
    server.kill();
    let with = |token: &str| Settings { token: Some(Secret::new(token)), ..settings.clone() };
    let mut server = Sidecar::start(&with(&token), "s", "10.9.0.1:8472");
    server.until("a member goes on", |s| s.status.connected && s.nodes.len() == 1);
    server.kill();
    std::fs::remove_dir_all(dir.path().join("agent")).unwrap();
    let mut server = Sidecar::start(&with(&token), "t", "10.9.0.2:8472");
    server.until("so does who was none any more", |s| s.status.connected && s.nodes.len() == 2);
    server.kill();

    std::fs::remove_dir_all(dir.path().join("agent")).unwrap();
    let mut other = Sidecar::start(&server_settings(stranger.path(), free_port()), "o", "10.9.0.9:8472");
    other.until("another cluster", |s| s.status.connected);
    ends_with(&with(&mint(&mut other)), "holds a cluster of its own");
    other.kill();
}

/// The sidecar ends by itself, and says this.
fn ends_with(settings: &Settings, what: &str) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_mesh-sidecar"))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = serde_json::to_string(settings).unwrap();
    lines.push_str("\n{\"type\":\"hello\",\"name\":\"s\",\"underlay\":[\"10.9.0.1:8472\"],\"public_keys\":[],\"encryption\":\"none\"}\n");
    (&ours).write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(what), "{said}");
    let told = BufReader::new(ours).lines().map_while(Result::ok).any(|line| line.contains("\"problem\":\""));
    assert!(told, "meshd is told why, too");
}

#[test]
fn it_runs_without_privileges_and_refuses_what_it_cannot_do() {
    let dir = TempDir::new().unwrap();
    let settings = server_settings(dir.path(), free_port());
    let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
    server.until("starts", |s| s.status.connected);
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).unwrap().trim().to_owned();
    assert_eq!((line("CapEff:"), line("CapPrm:"), line("NoNewPrivs:")), ("0".repeat(16), "0".repeat(16), "1".into()));
    let maps = std::fs::read_to_string(format!("/proc/{}/cmdline", server.child.id())).unwrap();
    assert!(!maps.contains("mesh1"));
    server.kill();

    let mut other = settings.clone();
    other.cluster_cidr = vec!["10.43.0.0/16".parse().unwrap()];
    ends_with(&other, "cluster-cidr");
    let mut other = settings.clone();
    other.datastore.endpoint = Some(Secret::new("cassandra://user:hush@db/mesh"));
    ends_with(&other, "cassandra://…");
    let empty = TempDir::new().unwrap();
    ends_with(&agent_settings(empty.path(), None), "token");
    ends_with(&agent_settings(empty.path(), Some("mesh1xxxx")), "damaged");
    ends_with(&agent_settings(empty.path(), Some("my-shared-secret")), "`server`");
}

#[test]
fn a_pre_shared_secret_lies_in_the_node_token_file_and_joins() {
    let (s, a) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut settings = server_settings(s.path(), free_port());
    settings.token = Some(Secret::new("my-shared-secret"));
    let mut server = Sidecar::start(&settings, "s", "10.9.0.1:8472");
    server.until("starts", |s| s.status.connected);
    assert_eq!(std::fs::read_to_string(s.path().join("server/node-token")).unwrap(), "my-shared-secret");
    let mut joining = agent_settings(a.path(), Some("my-shared-secret"));
    joining.servers = vec![format!("https://{}", settings.bind_address)];
    let mut agent = Sidecar::start(&joining, "a", "10.9.0.2:8472");
    agent.until("joins", |s| s.status.connected && s.nodes.len() == 2);
    let left = agent.ask(Request::Leave).unwrap();
    assert_eq!(left["left"], true);
    server.until("is alone", |s| s.nodes.len() == 1);
    for mut sidecar in [server, agent] {
        sidecar.child.kill().unwrap();
        sidecar.child.wait().unwrap();
    }
}
