//! A cluster: a server, agents that join it by token, and what its control plane's failures cost the traffic, which is
//! nothing.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mesh::{Builder, MESHD, Mesh, Node, has, skipped};
use crate::namespace::until;
use crate::traffic::{Probe, ping, pings, tcp};

/// A server a and two agents, b and c, that have joined it.
pub(crate) fn cluster(story: &'static str) -> Option<Mesh> {
    let mesh = Builder::new(story)?.server("a").agent("b").agent("c").build();
    mesh.node("a").restart();
    let token = create(mesh.node("a"), &[]);
    for name in ["b", "c"] {
        mesh.node(name).token(Some(&token));
        mesh.node(name).restart();
    }
    for name in ["a", "b", "c"] {
        has_peers(mesh.node(name), 2);
    }
    Some(mesh)
}

#[track_caller]
pub(crate) fn create(server: &Node, more: &[&str]) -> String {
    let made = server.ctl(&[&["token", "create"], more].concat());
    assert_eq!((made.code, made.err.as_str()), (0, ""), "{made:?}");
    assert!(made.out.starts_with("mesh1") && made.out.lines().count() == 1, "{made:?}");
    made.out.trim().to_owned()
}

#[track_caller]
pub(crate) fn has_peers(node: &Node, peers: usize) {
    until(&format!("{} has {peers} peers", node.name), || {
        node.json(&["peers"]).as_array().is_some_and(|all| all.len() == peers)
    });
}

/// Servers know who reaches whom, and every node shows it.
#[test]
fn who_is_dead_for_whom_is_seen_at_every_node() {
    let story = "who_is_dead_for_whom_is_seen_at_every_node";
    let Some(mesh) = cluster(story) else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    let of = |node: &Node, from: &str, to: &str| {
        let matrix = node.json(&["cluster", "matrix"]);
        let row = matrix["rows"].as_array().unwrap().iter().find(|row| row["from"] == from).cloned();
        row.and_then(|row| row["to"].as_array().unwrap().iter().find(|path| path["to"] == to).cloned())
    };
    let pairs = [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")];
    for node in [a, b] {
        for (from, to) in pairs {
            until("all pairs are up, and measured", || {
                of(node, from, to).is_some_and(|path| path["up"] == true && path["rtt_us"].as_u64() > Some(0))
            });
        }
    }
    let shown = b.ctl(&["cluster", "matrix"]);
    println!("{}", shown.out);
    assert!(shown.code == 0 && shown.out.contains("3 nodes, 6 pairs up, 0 down"), "{shown:?}");
    c.kill();
    for node in [a, b] {
        until("c is dead for both", || {
            ["a", "b"].iter().all(|from| of(node, from, "c").is_some_and(|path| path["up"] == false))
        });
    }
    assert!(of(b, "a", "b").is_some_and(|path| path["up"] == true));
    // without a server: what is known is nothing, and that is said
    a.kill();
    let shown = b.ctl(&["cluster", "matrix"]);
    assert!(shown.code == 0 && shown.out.contains("what nodes told this server is not here"), "{shown:?}");
}

#[test]
fn a_server_and_agents_are_a_mesh() {
    let story = "a_server_and_agents_are_a_mesh";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.server("a").agent("b").agent("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    a.restart();
    let token = create(a, &["--ttl", "1h", "--uses", "1"]);
    b.token(Some(&token));
    let start = Instant::now();
    b.spawn();
    b.ready();
    let joined = start.elapsed();
    let server = a.given();
    until("the first packet", || b.ns.succeeds(&format!("ping -n -q -c 1 -W 0.1 {server}")));
    println!("{story}: joined and ready after {joined:?}, first packet answered after {:?}", start.elapsed());

    let agents = a.dir.join("data/server/node-token");
    c.set("token-file", Some(&agents.display().to_string()));
    c.restart();
    for node in [a, b, c] {
        has_peers(node, 2);
    }
    for (from, to) in [(a, b), (b, a), (b, c), (c, b), (a, c), (c, a)] {
        ping(&from.ns, to.given());
    }
    for node in [a, b, c] {
        let way = node.ns.sh("ip route get 10.42.200.1");
        assert!(way.contains("dev mesh0"), "what is nobody's in the cluster leaves by no other way: {way}");
    }
    tcp(&b.ns, &c.ns, c.given(), 3_000_000);

    let nodes = b.json(&["nodes"]);
    let named = |name: &str| nodes.as_array().unwrap().iter().find(|n| n["name"] == name).unwrap().clone();
    assert_eq!((&named("a")["role"], &named("c")["role"]), (&"server".into(), &"agent".into()), "{nodes:#}");
    assert!(nodes.as_array().unwrap().iter().all(|n| n["state"] == "ready" && n["joined_at"].is_string()), "{nodes:#}");
    assert!(b.json(&["peers"]).as_array().unwrap().iter().all(|p| p["encryption"] == "wireguard"));
    let status = b.json(&["status"]);
    assert_eq!((&status["role"], &status["ready"]), (&"agent".into(), &true.into()), "{status:#}");
    assert_eq!(status["membership"]["connected"], true, "{status:#}");
    assert!(b.ctl(&["status"]).out.contains("cluster  member, server https://10.9.0.1:9345"));
    assert_eq!(a.ctl(&["cluster", "status"]).code, 0);

    let refused = b.ctl(&["token", "create"]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("https://10.9.0.1:9345"), "an agent names a server: {refused:?}");
    for node in [a, b, c] {
        assert!(!node.log().contains(&token), "{}", node.log());
    }
    let environment = std::fs::read(format!("/proc/{}/environ", b.sidecar().unwrap())).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains(&token), "the sidecar's environment has no token");
    // the account of each: nothing was lost without a name
    mesh.balances();
}

#[test]
fn a_sidecar_that_dies_or_hangs_costs_no_packet_and_no_peer() {
    let story = "a_sidecar_that_dies_or_hangs_costs_no_packet_and_no_peer";
    let Some(mesh) = cluster(story) else { return };
    let [b, c] = mesh.two(["b", "c"]);
    ping(&b.ns, c.given());
    let probe = Probe::start(&b.ns, b.given(), &c.ns, c.given());
    for _ in 0..8 {
        let pid = b.sidecar().expect("it runs");
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        until("another one runs", || b.sidecar().is_some_and(|new| new != pid));
        assert_eq!(b.json(&["peers"]).as_array().unwrap().len(), 2);
        assert_eq!(b.json(&["status"])["ready"], true);
    }
    let pid = Pid::from_raw(b.sidecar().unwrap() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let start = Instant::now();
    let late = b.ctl(&["cluster", "status"]);
    assert!(late.code == 1 && late.err.contains("no answer within"), "{late:?}");
    assert!(start.elapsed() < Duration::from_secs(15));
    assert_eq!(b.json(&["nodes"]).as_array().unwrap().len(), 3, "what is known here is shown all the same");
    kill(pid, Signal::SIGCONT).unwrap();
    let (sent, lost) = probe.end();
    println!("{story}: 8 kills and a hang: {lost} of {sent} lost");
    assert_eq!(lost, 0, "of {sent}");
    assert!(sent > 500, "{sent}");
    until("it is well again", || b.json(&["status"])["membership"]["connected"] == true);

    let probe = Probe::start(&b.ns, b.given(), &c.ns, c.given());
    std::thread::sleep(Duration::from_millis(200));
    b.ns.sh("ip link set mesh0 down");
    std::thread::sleep(Duration::from_millis(300));
    assert!(probe.end().1 > 0, "positive control: the probe sees a loss");
}

#[test]
fn without_any_server_everything_goes_on_also_from_a_cold_start() {
    let story = "without_any_server_everything_goes_on_also_from_a_cold_start";
    let Some(mesh) = cluster(story) else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    ping(&b.ns, c.given());
    let (there, here) = (c.given(), b.given());
    let probe = Probe::start(&b.ns, here, &c.ns, there);
    a.kill();
    until("it is noticed", || b.reasons().contains("no server answers"));
    assert_eq!(b.json(&["status"])["ready"], true, "which is no reason not to be ready");
    std::thread::sleep(Duration::from_secs(2));
    let (sent, lost) = probe.end();
    println!("{story}: server killed: {lost} of {sent} lost");
    assert_eq!(lost, 0, "of {sent}");

    b.kill();
    b.token(None);
    let start = Instant::now();
    b.spawn();
    until("the first packet", || b.ns.succeeds(&format!("ping -n -q -c 1 -W 0.1 {there}")));
    println!("{story}: cold start without a server: first packet answered after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    b.ready();
    assert_eq!(b.given(), here, "the same address");

    // half a file is no list: it says so, and waits for a server
    assert_eq!(b.stop(), 0);
    let kept = b.dir.join("data/nodes.json");
    let bytes = std::fs::read(&kept).unwrap();
    std::fs::write(&kept, &bytes[..bytes.len() / 2]).unwrap();
    b.spawn();
    until("it says what is wrong", || b.socket().exists() && b.reasons().contains("is damaged"));
    let status = b.json(&["status"]);
    assert_eq!((&status["ready"], &status["peers"]), (&false.into(), &0.into()), "{status:#}");
    a.restart();
    b.ready();
    until("they talk again", || pings(&b.ns, there));
    assert_eq!(b.given(), here);
    until("the file is whole again", || std::fs::read(&kept).is_ok_and(|new| new.len() >= bytes.len()));
}

/// What bare `meshd` asks on a terminal, from the question to the first packet.
#[test]
fn who_pastes_the_token_on_a_terminal_is_a_member() {
    let story = "who_pastes_the_token_on_a_terminal_is_a_member";
    if !has("script") || std::path::Path::new("/etc/meshd/config.yaml").exists() {
        return skipped(story, "there is no `script`, or there is an /etc/meshd/config.yaml");
    }
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.server("a").agent("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    a.restart();
    let token = create(a, &[]);
    let mut command = b.ns.command("script");
    command
        .args(["-qefc", &format!("exec {MESHD}")])
        .arg(b.dir.join("typescript"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    for (key, value) in [("NODE_NAME", "b"), ("NODE_IP", "10.9.0.2")] {
        command.env(format!("MESHD_{key}"), value);
    }
    command.env("MESHD_DATA_DIR", b.dir.join("data")).env("MESHD_SOCKET", b.socket());
    let mut terminal = command.spawn().unwrap();
    let mut keyboard = terminal.stdin.take().unwrap();
    let screen = || std::fs::read_to_string(b.dir.join("typescript")).unwrap_or_default();
    for (question, answer) in [("[y/N] ", "y"), ("(not shown): ", token.as_str())] {
        until(question, || screen().contains(question));
        writeln!(keyboard, "{answer}").unwrap();
    }
    b.ready();
    ping(&b.ns, a.given());
    assert!(!screen().contains("mesh1"), "{}", screen());
    keyboard.write_all(b"\x03").unwrap(); // Ctrl-C
    let code = terminal.wait().unwrap().code();
    assert_eq!(code, Some(0), "{}", screen());
    assert!(screen().contains("stopped"), "{}", screen());
}
