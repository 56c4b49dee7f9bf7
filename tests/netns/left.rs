//! Who may not join, who is thrown out, who leaves, and who moves.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::joined::{create, has_peers};
use crate::mesh::Builder;
use crate::namespace::until;
use crate::traffic::{ping, pings};

#[test]
fn an_agent_waits_for_its_server_and_is_told_why_it_may_not_join() {
    let story = "an_agent_waits_for_its_server_and_is_told_why_it_may_not_join";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.server("a").agent("b").agent("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    a.restart();
    let revoked = create(a, &[]);
    let list = a.json(&["token", "list"]);
    let id = list.as_array().unwrap().iter().find(|t| t["description"] != "node-token").unwrap()["id"].clone();
    let done = a.ctl(&["token", "revoke", id.as_str().unwrap()]);
    assert_eq!(done.code, 0, "{done:?}");
    let good = create(a, &["--uses", "1", "--node", "c"]);
    assert_eq!(a.stop(), 0);

    // nobody is there: it waits, and says for whom
    c.token(Some(&good));
    c.spawn();
    until("it says what it waits for", || c.socket().exists() && c.reasons().contains("10.9.0.1:9345"));
    assert_eq!(c.ctl(&["status"]).code, 1);
    assert!(!c.ns.succeeds("ip link show mesh0"), "nothing is set up yet");
    a.restart();
    c.ready();
    ping(&c.ns, a.given());

    // who may not join reads why, and may try again with another token without a restart
    b.set("token", Some(&revoked));
    b.spawn();
    until("the revoked one is refused", || b.socket().exists() && b.reasons().contains("revoked"));
    b.set("token", Some(&good));
    b.signal(Signal::SIGHUP);
    until("one for another node is refused", || {
        let reasons = b.reasons();
        !reasons.contains("revoked") && reasons.contains("not a member yet")
    });
    println!("{story}: {}", b.reasons().trim());
    b.set("token", Some(&create(a, &[])));
    b.signal(Signal::SIGHUP);
    b.ready();
    ping(&b.ns, c.given());
    assert!(!b.log().contains("mesh1"), "{}", b.log());
}

#[test]
fn who_is_removed_is_cut_off_and_who_leaves_leaves_nothing() {
    let story = "who_is_removed_is_cut_off_and_who_leaves_leaves_nothing";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.server("a").agent("b").agent("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    a.restart();
    let token = create(a, &[]);
    for node in [b, c] {
        node.token(Some(&token));
        node.restart();
    }
    has_peers(b, 2);
    has_peers(c, 2);
    let (to_c, to_b) = (c.given(), b.given());
    ping(&b.ns, to_c);
    assert_eq!(a.ctl(&["node", "drain", "c"]).code, 0);
    until("everybody sees it draining", || {
        let nodes = b.json(&["nodes"]);
        nodes.as_array().unwrap().iter().any(|n| n["name"] == "c" && n["state"] == "draining")
    });
    assert!(pings(&b.ns, to_c), "it is still a peer");
    assert_eq!(a.ctl(&["node", "undrain", "c"]).code, 0);

    let start = Instant::now();
    let removed = a.ctl(&["node", "remove", "c"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    until("b has one peer", || b.json(&["peers"]).as_array().unwrap().len() == 1);
    until("c has none", || c.json(&["peers"]).as_array().unwrap().is_empty());
    println!("{story}: cut off on both sides after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(!pings(&b.ns, to_c) && !pings(&c.ns, to_b));
    assert!(c.reasons().contains("was removed from the cluster"), "{}", c.reasons());
    assert_eq!(c.json(&["status"])["ready"], false);
    assert!(c.ns.sh("ip route show proto 72").contains("unreachable"), "nothing leaves in clear by another way");
    let routes = || c.ns.sh("ip route show proto 72 | sort");
    let before = routes();
    c.ns.sh("ip link set ul0 mtu 1400");
    until("it follows its underlay", || c.json(&["status"])["mtu"] == 1340);
    assert_eq!(routes(), before, "also when its underlay changes");
    until("there is nothing to start from", || !c.dir.join("data/nodes.json").exists());

    let left = b.ctl(&["leave"]);
    assert_eq!(left.code, 0, "{left:?}");
    assert!(left.out.contains("b has left the cluster"), "{left:?}");
    until("meshd ended", || !b.socket().exists());
    assert!(!b.ns.succeeds("ip link show mesh0"));
    assert_eq!(b.ns.sh("ip route show proto 72; ip -6 route show proto 72"), "");
    assert!(!b.dir.join("data/nodes.json").exists() && !b.dir.join("data/agent/membership.json").exists());
    has_peers(a, 0);
    b.restart();
    has_peers(a, 1);
    ping(&b.ns, a.given());
}

#[test]
fn a_node_that_moves_is_found_again() {
    let story = "a_node_that_moves_is_found_again";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.server("a").agent("b").set("node-ip", "ul0").agent("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    b.ns.sh(
        "ip addr flush dev ul0 scope global; ip addr add 10.9.0.2/24 dev ul0; ip route replace default via 10.9.0.254",
    );
    a.restart();
    let token = create(a, &[]);
    for node in [b, c] {
        node.token(Some(&token));
        node.restart();
    }
    has_peers(c, 2);
    ping(&c.ns, b.given());
    b.ns.sh(
        "ip addr add 10.9.0.22/24 dev ul0; ip addr del 10.9.0.2/24 dev ul0; ip addr replace 10.9.0.22/24 dev ul0; \
             ip route replace default via 10.9.0.254",
    );
    let start = Instant::now();
    until("it is found again", || pings(&c.ns, b.given()));
    println!("{story}: found again after {:?}", start.elapsed());
    until("the list has the new address", || {
        let nodes = c.json(&["nodes"]);
        nodes.as_array().unwrap().iter().any(|n| n["name"] == "b" && n["underlay"][0] == "10.9.0.22")
    });

    // what others send to can be said, and changed without a restart
    b.set("advertise-address", Some("10.9.0.77"));
    b.signal(Signal::SIGHUP);
    until("the list has what was said", || {
        let nodes = a.json(&["nodes"]);
        nodes.as_array().unwrap().iter().any(|n| n["name"] == "b" && n["underlay"][0] == "10.9.0.77")
    });
    b.set("advertise-address", None);
    b.signal(Signal::SIGHUP);
    until("and takes it back", || pings(&c.ns, b.given()));
}

/// A machine image with somebody's data-dir in it: the last one to say where it is has the node's place, and the other says so.
#[test]
fn a_node_whose_place_a_clone_has_says_so() {
    let Some(mesh) = Builder::new("a_node_whose_place_a_clone_has_says_so") else { return };
    let mesh = mesh.server("a").agent("b").agent("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    a.restart();
    b.token(Some(&create(a, &[])));
    b.restart();
    has_peers(a, 1);
    ping(&b.ns, a.given());
    let copied = std::process::Command::new("cp").arg("-a").args([b.dir.join("data"), c.dir.join("data")]).status();
    assert!(copied.unwrap().success());
    c.set("node-name", Some("b"));
    c.token(None);
    c.restart();
    until("the clone has its place", || pings(&c.ns, a.given()));
    until("it says so", || b.reasons().contains("another machine runs with a copy of its data-dir"));
    assert_eq!(b.ctl(&["status"]).code, 1);
    assert_eq!(c.ctl(&["status"]).code, 0, "{}", c.reasons());
}

#[test]
fn servers_that_take_most_nodes_away_are_not_believed_at_once() {
    let Some(mesh) = Builder::new("servers_that_take_most_nodes_away_are_not_believed_at_once") else { return };
    let mesh = mesh.server("a").agent("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    a.restart();
    b.token(Some(&create(a, &[])));
    b.restart();
    for number in 101..107 {
        let (name, at) = (format!("x{number}"), format!("10.9.0.{number}"));
        let added = a.ctl(&["node", "add", &name, "--underlay", &at, "--mac", &format!("02:00:00:00:00:{number:x}")]);
        assert_eq!(added.code, 0, "{added:?}");
    }
    has_peers(b, 7);
    let sidecar = nix::unistd::Pid::from_raw(b.sidecar().unwrap() as i32);
    nix::sys::signal::kill(sidecar, Signal::SIGSTOP).unwrap();
    for number in 101..107 {
        assert_eq!(a.ctl(&["node", "remove", &format!("x{number}")]).code, 0);
    }
    // another one, which hears of all of it at once
    nix::sys::signal::kill(sidecar, Signal::SIGKILL).unwrap();
    until("it is held back", || b.reasons().contains("would remove 6 of 7 peers"));
    let status = b.ctl(&["status"]);
    assert!(status.code == 1 && status.out.contains("meshctl nodes accept"), "{status:?}");
    has_peers(b, 7);
    ping(&b.ns, a.given());
    let accepted = b.ctl(&["nodes", "accept"]);
    assert_eq!(accepted.code, 0, "{accepted:?}");
    has_peers(b, 1);
    b.ready();

    // and what was accepted is what a start without the server goes by
    a.kill();
    until("it is kept", || !std::fs::read_to_string(b.dir.join("data/nodes.json")).unwrap().contains("x101"));
    assert_eq!(b.stop(), 0);
    b.restart();
    has_peers(b, 1);
}
