//! What a mesh is for: packets between nodes arrive as they were sent.

use crate::mesh::{Builder, Mesh, V4, V6};
use crate::traffic::{ping, tcp, udp};

const MEGABYTE: usize = 1 << 20;

#[test]
fn two_nodes_over_ipv4() {
    let Some(mesh) = Builder::new("two_nodes_over_ipv4") else { return };
    let mesh = mesh.node("a").set("io", "mmsg").node("b").set("io", "mmsg").start();
    everything_between(&mesh, "a", "b");
    assert_eq!(mesh.node("a").stats()["io"], "mmsg");
}

#[test]
fn two_nodes_over_ipv6() {
    let Some(mesh) = Builder::new("two_nodes_over_ipv6") else { return };
    let mesh = mesh.over(V6).node("a").node("b").start();
    everything_between(&mesh, "a", "b");
}

#[test]
fn three_nodes_with_both_back_ends() {
    let Some(mesh) = Builder::new("three_nodes_with_both_back_ends") else { return };
    let mesh = mesh.node("a").set("io", "tokio").node("b").node("c").set("io", "tokio").start();
    assert_eq!(mesh.node("a").stats()["io"], "tokio");
    for (from, to) in [("a", "b"), ("c", "a")] {
        everything_between(&mesh, from, to);
    }
}

#[test]
fn tcp_over_an_underlay_that_does_not_segment_tunnels() {
    tcp_over('b');
}

#[test]
fn tcp_over_an_underlay_without_any_offload() {
    tcp_over('c');
}

#[test]
fn tcp_over_an_underlay_with_software_offloads() {
    tcp_over('d');
}

#[test]
fn tcp_over_an_underlay_where_checksums_are_computed() {
    tcp_over('e');
}

#[track_caller]
fn tcp_over(profile: char) {
    let Some(mesh) = Builder::new("tcp_over_an_underlay") else { return };
    let mesh = mesh.profile(profile).node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    for family in [V4, V6] {
        tcp(&a.ns, &b.ns, b.overlay(family), 2 * MEGABYTE);
        udp(&a.ns, a.overlay(family), &b.ns, b.overlay(family), &[1, 1400, 9000]);
    }
    mesh.balances_with_the_kernel();
}

#[track_caller]
pub(crate) fn everything_between(mesh: &Mesh, a: &str, b: &str) {
    let [a, b] = mesh.two([a, b]);
    for family in [V4, V6] {
        for (from, to) in [(a, b), (b, a)] {
            ping(&from.ns, to.overlay(family));
            tcp(&from.ns, &to.ns, to.overlay(family), MEGABYTE);
        }
        // small, full, just over the MTU, several fragments
        udp(&a.ns, a.overlay(family), &b.ns, b.overlay(family), &[0, 1, 64, 1400, 1500, 9000, 60_000]);
    }
    mesh.balances_with_the_kernel();
}
