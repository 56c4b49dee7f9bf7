//! Servers with an etcd of their own: three from one and two joins at once, the death of the leader's node, and what a
//! person does about servers that are gone.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::joined::{create, has_peers};
use crate::mesh::{Builder, Mesh, Node, has, skipped};
use crate::quorum::asked;
use crate::traffic::{Probe, ping};

const SIDECAR: &str = env!("CARGO_BIN_EXE_mesh-sidecar");

pub(crate) fn builder(story: &'static str) -> Option<Builder> {
    for (tool, package) in [("etcd", "etcd-server"), ("curl", "curl")] {
        if !has(tool) {
            skipped(story, &format!("there is no `{tool}` (Debian: {package})"));
            return None;
        }
    }
    Builder::new(story)
}

/// Servers a, b and c, of which b and c join at once.
pub(crate) fn three(story: &'static str) -> Option<Mesh> {
    let mesh =
        builder(story)?.server("a").set("cluster-init", true).server("b").server("c").agent("d").agent("e").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    a.restart();
    let token = create(a, &["--role", "server"]);
    for node in [b, c] {
        node.token(Some(&token));
        node.spawn();
    }
    // in seconds: of two, one lets the other go first, and etcd waits a while in between
    let waits: Vec<_> = [b, c].into_iter().map(|node| node.ctl(&["status", "--wait", "60s"])).collect();
    for (node, wait) in [b, c].into_iter().zip(&waits) {
        assert_eq!(wait.code, 0, "{}: {wait:?}\n{}", node.name, node.log());
        assert!(node.log().contains("the other servers let this one's etcd in"), "{}", node.log());
    }
    assert!(waits.iter().any(|wait| wait.err.contains("waiting: not a full server yet")), "{waits:?}");
    for node in [a, b, c] {
        good(node, "3 servers, 1 may fail");
    }
    Some(mesh)
}

#[track_caller]
pub(crate) fn patiently_ready(node: &Node) {
    let wait = node.ctl(&["status", "--wait", "60s"]);
    assert_eq!(wait.code, 0, "{}: {wait:?}\n{}", node.name, node.log());
}

#[track_caller]
pub(crate) fn good(node: &Node, summary: &str) {
    until_slowly(&format!("{}: {summary}", node.name), node, || {
        let status = node.ctl(&["cluster", "status", "--json"]);
        let json: Value = serde_json::from_str(&status.out).unwrap_or_default();
        json["summary"] == summary && (status.code == 0 || summary.starts_with('2'))
    });
}

/// What takes an election, or several.
#[track_caller]
pub(crate) fn until_slowly(what: &str, node: &Node, good: impl Fn() -> bool) {
    let start = Instant::now();
    while !good() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{what}: {}\n{}",
            node.ctl(&["cluster", "status"]).out,
            node.log()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The name of the server whose etcd leads.
fn leader(node: &Node) -> String {
    let mut name = String::new();
    for _ in 0..300 {
        let status = node.json(&["cluster", "status"]);
        let servers = status["servers"].as_array().cloned().unwrap_or_default();
        if let Some(leader) = servers.iter().find(|server| server["datastore"] == "leader") {
            name = leader["name"].as_str().unwrap_or_default().to_owned();
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!name.is_empty(), "no leader: {}", node.ctl(&["cluster", "status"]).out);
    name
}

/// The process ids of what the sidecar runs.
pub(crate) fn children(node: &Node) -> Vec<u32> {
    let Some(sidecar) = node.sidecar() else { return vec![] };
    let mut pids = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{sidecar}/task")).into_iter().flatten().flatten() {
        let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    pids
}

/// Sends it to the node's etcd, and waits until another one runs.
#[track_caller]
fn etcd_is_replaced(node: &Node, signal: Signal) {
    let before = children(node);
    assert_eq!(before.len(), 1, "{before:?}");
    kill(Pid::from_raw(before[0].cast_signed()), signal).unwrap();
    until_slowly("another etcd runs", node, || matches!(&children(node)[..], [pid] if *pid != before[0]));
}

/// All at once, as a machine that loses its power.
pub(crate) fn power_off(node: &Node) {
    for pid in children(node).into_iter().chain(node.sidecar()) {
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
    }
    node.kill();
}

#[test]
fn three_servers_outlive_the_leaders_node() {
    let story = "three_servers_outlive_the_leaders_node";
    let start = Instant::now();
    let Some(mesh) = three(story) else { return };
    println!("{story}: three servers after {:?}", start.elapsed());
    let a = mesh.node("a");
    let lost = leader(a);
    let rest: Vec<&Node> = ["a", "b", "c"].iter().filter(|name| **name != lost).map(|name| mesh.node(name)).collect();
    let [d, e] = mesh.two(["d", "e"]);
    let token = create(rest[0], &[]);
    d.token(Some(&token));
    d.restart();
    has_peers(d, 3);
    ping(&d.ns, rest[0].given());

    let probe = Probe::start(&d.ns, d.given(), &rest[0].ns, rest[0].given());
    let dead = mesh.node(&lost);
    power_off(dead);
    let start = Instant::now();
    e.token(Some(&token));
    e.spawn();
    patiently_ready(e);
    println!("{story}: another agent joined {:?} after the leader's node died", start.elapsed());
    has_peers(e, 4);
    ping(&e.ns, rest[1].given());
    let (sent, missing) = probe.end();
    println!("{story}: {missing} of {sent} lost meanwhile");
    assert_eq!(missing, 0, "of {sent}");
    until_slowly("it is noticed", rest[0], || {
        let status = rest[0].ctl(&["cluster", "status"]);
        status.code == 1 && status.out.contains("3 servers, none may fail")
    });

    dead.spawn();
    patiently_ready(dead);
    for node in ["a", "b", "c"] {
        good(mesh.node(node), "3 servers, 1 may fail");
    }
    has_peers(dead, 4);
    etcd_is_replaced(dead, Signal::SIGKILL);
    until_slowly("it is a member again", dead, || dead.ctl(&["token", "create"]).code == 0);
    for node in ["a", "b", "c", "d", "e"] {
        let log = mesh.node(node).log();
        assert!(!log.contains(&token) && !log.contains("PRIVATE KEY"), "{log}");
    }
}

#[test]
#[ignore = "half a minute: run with --ignored"]
fn a_server_is_removed_and_another_takes_its_place() {
    let story = "a_server_is_removed_and_another_takes_its_place";
    let Some(mesh) = three(story) else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    power_off(c);
    let removed = a.ctl(&["node", "remove", "c"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    good(a, "2 servers, none may fail");
    assert!(a.ctl(&["cluster", "status"]).out.contains("2 servers tolerate no more"), "an even number is warned of");
    // a member that does not know yet learns it, and needs a token to come back
    c.token(None);
    c.spawn();
    until_slowly("it is told", c, || c.log().contains("was removed from the cluster"));
    c.kill();
    std::fs::remove_dir_all(c.dir.join("data")).unwrap();
    let token = create(b, &["--role", "server"]);
    c.token(Some(&token));
    c.spawn();
    patiently_ready(c);
    for node in [a, b, c] {
        good(node, "3 servers, 1 may fail");
    }
    // one that runs goes by itself
    assert_eq!(c.ctl(&["leave"]).code, 0);
    good(a, "2 servers, none may fail");
}

#[test]
#[ignore = "a minute: run with --ignored"]
fn an_etcd_that_hangs_is_replaced() {
    let Some(plan) = builder("an_etcd_that_hangs_is_replaced") else { return };
    let mesh = plan.server("a").set("cluster-init", true).build();
    let a = mesh.node("a");
    a.restart();
    create(a, &[]);
    etcd_is_replaced(a, Signal::SIGSTOP);
    until_slowly("it works again", a, || a.ctl(&["token", "create"]).code == 0);
}

#[test]
#[ignore = "half a minute: run with --ignored"]
fn a_lost_quorum_is_recovered_and_a_backup_restored() {
    let story = "a_lost_quorum_is_recovered_and_a_backup_restored";
    let Some(mesh) = three(story) else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    let d = mesh.node("d");
    let token = create(a, &[]);
    let copy = a.dir.join("copy").display().to_string();
    let data = a.dir.join("data").display().to_string();
    let tool = |verb: &str, more: &str| a.ns.sh(&format!("{SIDECAR} {verb} --data-dir {data} {more}"));
    tool("backup", &copy);
    d.token(Some(&token));
    d.restart();
    has_peers(d, 3);
    power_off(b);
    power_off(c);
    until_slowly("nothing can be changed", a, || a.ctl(&["token", "create"]).code == 1);
    assert!(!a.ns.succeeds(&format!("{SIDECAR} cluster-reset --data-dir {data}")), "not while it runs");
    assert_eq!(a.stop(), 0);
    // one that is there, without a quorum, goes on to say whose it is
    b.token(None);
    b.spawn();
    until_slowly("it listens", b, || asked(b, "/livez").0 == 200);
    let refused = a.ns.output(&format!("{SIDECAR} cluster-reset --data-dir {data}"));
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && told.contains("still answer: https://10.9.0.2:9345") && told.contains("--force")
    );
    let kept = std::fs::read_to_string(a.dir.join("data/server/etcd/member.json")).unwrap();
    assert!(kept.contains(r#""phase": "member""#), "nothing has changed: {kept}");
    tool("cluster-reset", "--force");
    power_off(b);
    a.spawn();
    patiently_ready(a);
    good(a, "1 server, none may fail");
    assert_eq!(a.json(&["nodes"]).as_array().unwrap().len(), 4, "nothing was lost");
    for node in [b, c] {
        node.token(None);
        node.spawn();
    }
    for node in [b, c] {
        patiently_ready(node);
        good(node, "3 servers, 1 may fail");
    }
    has_peers(d, 3);

    // d joined after the backup: it comes back by its certificate
    assert_eq!(a.stop(), 0);
    assert!(!a.ns.succeeds(&format!("{SIDECAR} restore --data-dir {data} {copy}")), "while others serve the cluster");
    for node in [b, c] {
        assert_eq!(node.stop(), 0);
    }
    tool("restore", &copy);
    a.spawn();
    patiently_ready(a);
    // not before: the others would be a quorum of what was
    good(a, "1 server, none may fail");
    for node in [b, c] {
        node.spawn();
    }
    for node in [b, c] {
        patiently_ready(node);
        good(node, "3 servers, 1 may fail");
    }
    until_slowly("the agent is back", a, || a.json(&["nodes"]).as_array().is_some_and(|nodes| nodes.len() == 4));
    has_peers(d, 3);
    ping(&d.ns, a.given());
}

#[test]
#[ignore = "half half a minute: run with --ignored"]
fn a_single_server_becomes_three_and_nobody_joins_again() {
    let story = "a_single_server_becomes_three_and_nobody_joins_again";
    let Some(plan) = builder(story) else { return };
    let mesh = plan.server("a").server("b").agent("d").build();
    let [a, b, d] = mesh.three(["a", "b", "d"]);
    a.restart();
    d.token(Some(&create(a, &[])));
    d.restart();
    has_peers(d, 1);
    let refused = a.ctl(&["token", "create", "--role", "server"]);
    assert!(refused.code == 1 && refused.err.contains("cluster-init"), "{refused:?}");
    let before = a.json(&["nodes"]);
    let probe = Probe::start(&d.ns, d.given(), &a.ns, a.given());
    assert_eq!(a.stop(), 0);
    let _ = probe.end();
    a.set("cluster-init", Some("true"));
    a.restart();
    until_slowly("the agent is connected", d, || d.json(&["status"])["membership"]["connected"] == true);
    let ids = |nodes: &Value| nodes.as_array().unwrap().iter().map(|n| n["id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids(&a.json(&["nodes"])), ids(&before), "the same nodes");
    assert!(!d.log().contains("a member again"), "{}", d.log());
    b.token(Some(&create(a, &["--role", "server"])));
    b.spawn();
    patiently_ready(b);
    good(b, "2 servers, none may fail");
    has_peers(d, 2);
    ping(&d.ns, b.given());
}
