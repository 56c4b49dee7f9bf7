//! The node list and the configuration change while traffic runs.

use nix::sys::signal::Signal;

use crate::mesh::{Builder, V4, V6};
use crate::namespace::until;
use crate::traffic::{Probe, ping, pings, tcp};

#[test]
fn peers_come_go_and_move_and_the_others_lose_nothing() {
    let Some(mesh) = Builder::new("peers_come_go_and_move_and_the_others_lose_nothing") else { return };
    let mesh = mesh.node("a").node("b").node("c").build();
    mesh.write_nodes(&mesh.list(|node| node.name != "c"));
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    a.spawn();
    b.spawn();
    a.ready();
    b.ready();
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    assert!(!pings(&a.ns, c.overlay(V4)), "positive control: c is not there yet");

    // added
    mesh.publish();
    c.restart();
    until("c is a peer", || pings(&a.ns, c.overlay(V4)) && pings(&b.ns, c.overlay(V6)));
    tcp(&a.ns, &c.ns, c.overlay(V4), 1 << 18);

    // moved: its underlay address is another one
    c.set("node-ip", Some("10.9.0.77"));
    assert_eq!(c.stop(), 0);
    c.ns.sh(
        "ip addr del 10.9.0.3/24 dev ul0; ip addr add 10.9.0.77/24 dev ul0; ip route replace default via 10.9.0.254",
    );
    c.spawn();
    assert!(!pings(&a.ns, c.overlay(V4)), "positive control: the others still send to its old address");
    mesh.write_nodes(&(mesh.list(|node| node.name != "c") + &c.entry_at("10.9.0.77")));
    until("the others send to the new address", || pings(&a.ns, c.overlay(V4)));
    assert_eq!(a.json(&["peers"])[1]["endpoint"], "10.9.0.77:8472");

    // other subnets
    let moved = mesh.list(|node| node.name != "c") + &c.entry_at("10.9.0.77").replace("10.42.3.0/24", "10.42.33.0/24");
    mesh.write_nodes(&moved);
    let there = "10.42.33.1".parse().unwrap();
    until("the new subnet is reached", || pings(&a.ns, there));
    tcp(&a.ns, &c.ns, there, 1 << 18);
    assert!(!a.ns.succeeds("ip route get 10.42.3.1 | grep mesh0"), "the old subnet is not routed into the mesh");

    // removed
    mesh.write_nodes(&mesh.list(|node| node.name != "c"));
    until("c is no peer any more", || a.json(&["peers"]).as_array().unwrap().len() == 1);
    until("its packets are a stranger's", || {
        pings(&c.ns, a.overlay(V4));
        a.drops("unknown_source") > 0
    });

    let (sent, lost) = probe.end();
    assert!(sent > 50, "{sent}");
    assert_eq!(lost, 0, "of {sent} between the two that stayed");
    mesh.write_nodes(&moved);
    until("c has settled", || c.reasons().is_empty());
    mesh.balances();
}

#[test]
fn a_broken_list_changes_nothing_and_says_so() {
    let Some(mesh) = Builder::new("a_broken_list_changes_nothing_and_says_so") else { return };
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    let good = mesh.list(|_| true);
    let list_of_b = mesh.dir().join("b.yaml");
    std::fs::write(&list_of_b, &good).unwrap();
    b.set("nodes-file", list_of_b.to_str());
    mesh.start();
    let twice = good.replace("10.42.2.0/24", "10.42.1.128/25");
    for (bad, said) in [
        ("nodes:\n  - name: a\n    underlay: [\n", "nodes.yaml:"),
        (twice.as_str(), "overlap"),
        ("", "nodes"),
        (mesh.list(|node| node.name == "b").as_str(), "no entry named a"),
    ] {
        mesh.write_nodes(bad);
        until("it is said", || a.reasons().contains("the former node list stays in use"));
        let status = a.ctl(&["status"]);
        assert_eq!(status.code, 1, "{status:?}");
        assert!(status.out.contains(said), "{said}: {status:?}");
        ping(&a.ns, b.overlay(V4));
        mesh.write_nodes(&good);
        until("it heals", || a.ctl(&["status"]).code == 0);
    }
    std::fs::remove_file(mesh.dir().join("nodes.yaml")).unwrap();
    until("the missing file is named", || a.reasons().contains("nodes.yaml"));
    ping(&a.ns, b.overlay(V4));
    mesh.write_nodes(&good);
    until("it heals", || a.ctl(&["status"]).code == 0);
    mesh.balances();
}

#[test]
fn a_list_without_most_peers_waits_for_a_person() {
    let Some(mesh) = Builder::new("a_list_without_most_peers_waits_for_a_person") else { return };
    let mesh = mesh.node("a").node("b").member("c").member("d").member("e").build();
    let [a, b] = mesh.two(["a", "b"]);
    a.spawn();
    a.ready();
    let peers = || a.json(&["peers"]).as_array().unwrap().len();
    assert_eq!(peers(), 4);
    let refused = a.ctl(&["nodes", "accept"]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("nothing to accept"), "{refused:?}");

    // half of them is everyday work
    mesh.write_nodes(&mesh.list(|node| !["d", "e"].contains(&node.name)));
    until("half of four may go", || peers() == 2);
    mesh.publish();
    until("and come back", || peers() == 4);

    mesh.write_nodes(&mesh.list(|node| ["a", "b"].contains(&node.name)));
    until("it is held back", || a.reasons().contains("meshctl nodes accept"));
    assert_eq!((a.ctl(&["status"]).code, peers()), (1, 4));
    b.spawn();
    b.ready();
    ping(&a.ns, b.overlay(V4));
    let accepted = a.ctl(&["nodes", "accept"]);
    assert_eq!(accepted.code, 0, "{accepted:?}");
    until("it is applied", || peers() == 1 && a.ctl(&["status"]).code == 0);
    ping(&a.ns, b.overlay(V4));
    mesh.balances();
}

#[test]
fn sighup_applies_what_can_change_and_names_the_rest() {
    let Some(mesh) = Builder::new("sighup_applies_what_can_change_and_names_the_rest") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    assert!(!a.log().contains("INFO taken over"));

    let log_taken_over = || a.log().matches("taken over: log").count();
    let has_mtu = |mtu: u32| a.ns.sh("ip link show mesh0").contains(&format!("mtu {mtu} "));
    for (level, count) in [("debug", 1), ("error", 2)] {
        a.set("log", Some(level));
        a.signal(Signal::SIGHUP);
        until("the log level is taken over", || log_taken_over() == count);
    }
    a.set("mtu", Some("1400"));
    a.signal(Signal::SIGHUP);
    until("the MTU is taken over", || has_mtu(1400));
    a.set("mtu", Some("1390"));
    a.set("log", Some("info"));
    a.signal(Signal::SIGHUP);
    until("the MTU is taken over again", || has_mtu(1390));
    assert!(!a.log().contains("taken over: mtu"), "at level error that is not said");
    a.set("mtu", None);
    a.signal(Signal::SIGHUP);
    until("but at level info it is", || a.log().contains("taken over: mtu") && has_mtu(1450));

    a.set("vni", Some("77"));
    a.signal(Signal::SIGHUP);
    until("what cannot change is named", || a.log().contains("`vni` cannot change while meshd runs"));
    a.set("vni", None);
    a.set("prot", Some("1"));
    a.signal(Signal::SIGHUP);
    until("a mistake is told", || a.reasons().contains("did you mean `port`"));
    assert!(a.reasons().contains("the former configuration stays"));
    a.set("prot", None);
    a.signal(Signal::SIGHUP);
    until("and settled", || a.ctl(&["status"]).code == 0);
    let (sent, lost) = probe.end();
    assert_eq!(lost, 0, "of {sent}");
    mesh.balances();
}
