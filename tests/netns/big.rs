//! BIG TCP: super-packets of more than 64 KiB for the node itself, as meshd hands them to its kernel.

use crate::captured::{capture, ends};
use crate::mesh::{Builder, Mesh, Node, V4, V6, skipped};
use crate::namespace::until;
use crate::super_packets::BIG_TCP;
use crate::traffic::{tcp, tcp_by};

const MEGABYTES: usize = 4 << 20;

/// Carries streams until some of it came in long super-packets: how many wait for each other is up to the machine.
#[track_caller]
fn comes_in_long_ones(from: &Node, to: &Node) {
    let before = BIG_TCP.count(to);
    until("some of a stream comes in long super-packets", || {
        tcp(&from.ns, &to.ns, to.overlay(V4), MEGABYTES);
        BIG_TCP.count(to) > before
    });
}

#[track_caller]
fn both_ways(story: &'static str, builder: Builder) -> Option<Mesh> {
    let mesh = BIG_TCP.two_nodes(story, builder)?;
    let [a, b] = mesh.two(["a", "b"]);
    comes_in_long_ones(a, b);
    comes_in_long_ones(b, a);
    let before = [BIG_TCP.count(a), BIG_TCP.count(b)];
    tcp(&a.ns, &b.ns, b.overlay(V6), MEGABYTES);
    assert_eq!([BIG_TCP.count(a), BIG_TCP.count(b)], before, "over IPv6 there are none");
    mesh.balances_with_the_kernel();
    Some(mesh)
}

#[test]
fn a_node_gets_its_streams_in_long_super_packets() {
    let story = "a_node_gets_its_streams_in_long_super_packets";
    let Some(mesh) = Builder::new(story).and_then(|builder| both_ways(story, builder)) else { return };
    // what was cut before it left is joined as well
    let [a, b] = mesh.two(["a", "b"]);
    a.set("tunnel-gso", Some("off"));
    assert_eq!(a.stop(), 0);
    a.restart();
    comes_in_long_ones(a, b);
    // with another back end it is the same
    b.set("io", Some("uring"));
    assert_eq!(b.stop(), 0);
    b.restart();
    comes_in_long_ones(a, b);
    mesh.balances();
}

#[test]
fn what_was_decrypted_comes_in_them_too() {
    let story = "what_was_decrypted_comes_in_them_too";
    Builder::new(story).and_then(|builder| both_ways(story, builder.encrypted()));
}

/// What is forwarded somebody may have to cut again: where it leaves, or in a program that reads packets.
#[test]
fn pods_get_none() {
    let story = "pods_get_none";
    let Some(mesh) = Builder::new(story).and_then(|builder| BIG_TCP.two_nodes(story, builder.pods())) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    comes_in_long_ones(a, b);
    let before = BIG_TCP.count(b);
    for _ in 0..3 {
        tcp(a.pod(), b.pod(), b.pod_address(V4), MEGABYTES);
    }
    assert_eq!(BIG_TCP.count(b), before);
    mesh.balances_with_the_kernel();
}

/// The firewall sends on what came for the node: to a device that takes only shorter ones, so the kernel would have to cut it.
#[test]
fn what_the_firewall_sends_on_comes_in_none() {
    let story = "what_the_firewall_sends_on_comes_in_none";
    let Some(mesh) = Builder::new(story).and_then(|builder| BIG_TCP.two_nodes(story, builder.pods())) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    let (node, pod) = (b.overlay(V4), b.pod_address(V4));
    if !b.ns.succeeds(&format!("iptables -t nat -A PREROUTING -p tcp -d {node} -j DNAT --to-destination {pod}")) {
        return skipped(story, "needs iptables with NAT");
    }
    let before = BIG_TCP.count(b);
    for _ in 0..3 {
        tcp_by(&a.ns, b.pod(), node, pod, MEGABYTES);
    }
    assert_eq!(BIG_TCP.count(b), before);
    b.ns.sh("iptables -t nat -F");
    comes_in_long_ones(a, b);
}

/// Who captures gets what every program that reads captures understands.
#[test]
fn while_somebody_looks_there_are_none() {
    let story = "while_somebody_looks_there_are_none";
    let Some(mesh) = Builder::new(story).and_then(|builder| BIG_TCP.two_nodes(story, builder)) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    comes_in_long_ones(a, b);
    let file = mesh.dir().join("stream.pcapng");
    let running = capture(b, &file, &["--snaplen", "100", "tcp"]);
    let before = BIG_TCP.count(b);
    for _ in 0..3 {
        tcp(&a.ns, &b.ns, b.overlay(V4), MEGABYTES);
    }
    assert_eq!(BIG_TCP.count(b), before);
    ends(running);
    assert!(file.metadata().unwrap().len() > 1000);
    until("nobody looks any more", || {
        tcp(&a.ns, &b.ns, b.overlay(V4), MEGABYTES);
        BIG_TCP.count(b) > before
    });
}

#[test]
fn they_can_be_switched_off() {
    let Some(builder) = Builder::new("they_can_be_switched_off") else { return };
    let mesh = builder.node("a").node("b").set("big-tcp", "off").start();
    let [a, b] = mesh.two(["a", "b"]);
    assert_eq!(BIG_TCP.why_off(b), "`big-tcp: off`");
    for _ in 0..3 {
        tcp(&a.ns, &b.ns, b.overlay(V4), MEGABYTES);
    }
    assert_eq!(BIG_TCP.count(b), 0);
    b.set("big-tcp", Some("auto"));
    b.set("io", Some("tokio"));
    assert_eq!(b.stop(), 0);
    b.restart();
    assert!(BIG_TCP.why_off(b).contains("hands over plain packets"), "{}", BIG_TCP.why_off(b));
    b.set("io", None);
    assert_eq!(b.stop(), 0);
    b.restart();
    if BIG_TCP.why_off(b).is_empty() {
        comes_in_long_ones(a, b);
    }
}
