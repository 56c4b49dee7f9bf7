//! Pods behind a bridge on each node: forwarded traffic, with the offloads of a virtual link.

use crate::mesh::{Builder, Node, V4, V6};
use crate::traffic::{ping, tcp, udp};

#[test]
fn pods_reach_pods_and_nodes() {
    let Some(mesh) = Builder::new("pods_reach_pods_and_nodes") else { return };
    let mesh = mesh.pods().node("a").node("b").set("io", "tokio").node("c").start();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    assert_eq!(a.json(&["status"])["overlay_addresses"][0], "10.42.1.0");
    for family in [V4, V6] {
        for (from, to) in [(a, b), (c, a)] {
            ping(from.pod(), to.pod_address(family));
            ping(from.pod(), to.overlay(family));
            tcp(from.pod(), to.pod(), to.pod_address(family), 2 << 20);
            udp(from.pod(), from.pod_address(family), to.pod(), to.pod_address(family), &[1, 1400, 9000]);
        }
    }
    // super-packets of a pod stay whole up to meshd: far fewer reads than packets
    let batches = c.stats()["batches"].clone();
    let of = |what: &str| batches[what].as_u64().unwrap();
    assert!(of("udp_send_calls") * 2 < of("tun_read_packets"), "{batches:#}");
    mesh.balances_with_the_kernel();
}

/// The request goes by the underlay, since the address is one of the underlay; the answer, from that address to a pod,
/// goes by the overlay. A receiver that took overlay sources alone would drop it.
#[test]
fn a_node_answers_pods_from_its_underlay_address() {
    let Some(mesh) = Builder::new("a_node_answers_pods_from_its_underlay_address") else { return };
    let mesh = mesh.pods().node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    let both = |node: &Node| format!("[\"{}\", \"{}\"]", node.underlay(V4), node.underlay(V6));
    let entry = |node: &Node| node.entry().replace(&format!("\"{}\"", node.underlay(V4)), &both(node));
    mesh.write_nodes(&format!("nodes:\n{}{}", entry(a), entry(b)));
    for node in [a, b] {
        node.set("node-ip", Some(&both(node)));
    }
    mesh.start();
    for family in [V4, V6] {
        let before = a.stats()["udp"]["rx_packets"].as_u64().unwrap();
        ping(a.pod(), b.underlay(family));
        assert!(a.stats()["udp"]["rx_packets"].as_u64().unwrap() >= before + 3, "the answers came by the overlay");
        tcp(a.pod(), &b.ns, b.underlay(family), 1 << 20);
    }
    assert_eq!(a.drops("inner_source_not_allowed") + b.drops("source_not_ours"), 0);
    mesh.balances_with_the_kernel();
}
