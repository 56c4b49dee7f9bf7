//! Tunnels in the tunnel: a workload that talks VXLAN to a node, and node lists that lead in a circle.

use std::net::SocketAddr;

use crate::hostile::{frame, ipv4, send_to, udp, vxlan};
use crate::mesh::{Builder, V4};
use crate::namespace::until;
use crate::traffic::{ping, receive};

#[test]
fn a_workload_that_talks_vxlan_to_a_node_is_a_stranger() {
    let Some(mesh) = Builder::new("a_workload_that_talks_vxlan_to_a_node_is_a_stranger") else { return };
    // what reaches the third node is counted
    let mesh = mesh.pods().node("a").set("bfd", "off").node("b").set("bfd", "off").node("c").set("bfd", "off").start();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    ping(a.pod(), b.pod_address(V4));
    let pod = a.pod().udp(a.pod_address(V4), 8472);
    let listener = b.pod().udp(b.pod_address(V4), 7000);
    let to_b = |inner: &[u8]| {
        let mut mac = crate::hostile::OURS;
        mac[5] = b.number;
        vxlan(&frame(mac, 0x0800, inner))
    };
    // to the nodes themselves, past the mesh: its own node and another
    for node in [a, b] {
        let before = node.drops("unknown_source");
        for _ in 0..5 {
            send_to(&pod, (node.underlay(V4), 8472).into(), &to_b(&udp("10.42.1.2", "10.42.2.2", 7000, b"forged")));
        }
        until("the pod is no member", || node.drops("unknown_source") == before + 5);
    }
    // through the mesh, to where the other node's data port is not
    let dropped = b.stats()["inbound"]["dropped"].clone();
    for _ in 0..5 {
        send_to(&pod, (b.overlay(V4), 8472).into(), &to_b(&udp("10.42.1.2", "10.42.2.2", 7000, b"forged")));
    }
    ping(a.pod(), b.overlay(V4));
    assert_eq!(b.stats()["inbound"]["dropped"], dropped, "a packet like any other; nobody opens it");

    // where nodes masquerade what leaves the mesh, a pod does look like its node: then it may do what its node may, and
    // no more. Neither other nodes' addresses inside, nor a way on to a node's data port.
    a.ns.sh("nft add table ip nat; nft 'add chain ip nat post { type nat hook postrouting priority 100; }'
             nft add rule ip nat post ip saddr 10.42.1.0/24 oif ul0 masquerade");
    let masqueraded = a.pod().udp(a.pod_address(V4), 0);
    let target = SocketAddr::new(b.underlay(V4), 8472);
    let good = to_b(&udp("10.42.1.2", "10.42.2.2", 7000, b"its own"));
    send_to(&masqueraded, target, &good);
    let mut buffer = [0; 64];
    let (len, _) = receive(&listener, &mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"its own", "positive control");
    for (inner, reason) in [
        (udp("10.42.3.2", "10.42.2.2", 7000, b"forged"), "inner_source_not_allowed"),
        (udp("10.42.1.2", "10.9.0.2", 8472, &good), "inner_destination_not_ours"),
        (udp("10.42.1.2", "10.9.0.3", 8472, &good), "inner_destination_not_ours"),
        (udp("10.42.1.2", "10.42.3.2", 8472, &ipv4(&good)), "inner_destination_not_ours"),
    ] {
        let before = (b.drops(reason), c.stats()["udp"]["rx_packets"].clone());
        for _ in 0..5 {
            send_to(&masqueraded, target, &to_b(&inner));
        }
        until(reason, || b.drops(reason) == before.0 + 5);
        assert_eq!(c.stats()["udp"]["rx_packets"], before.1, "nothing goes on to a third node");
    }
    mesh.balances();
}

/// Two nodes whose lists differ, so that each takes a subnet for the other's: a packet goes one way once.
#[test]
fn lists_that_lead_in_a_circle_do_not_let_a_packet_circle() {
    let Some(mesh) = Builder::new("lists_that_lead_in_a_circle_do_not_let_a_packet_circle") else { return };
    let mesh = mesh.node("a").set("bfd", "off").node("b").set("bfd", "off").build();
    let [a, b] = mesh.two(["a", "b"]);
    let good = mesh.list(|_| true);
    let lists = [(a, "10.42.2.0/24"), (b, "10.42.1.0/24")];
    for (node, of_the_other) in lists {
        let file = mesh.dir().join(format!("{}.yaml", node.name));
        std::fs::write(&file, good.replace(of_the_other, &format!("{of_the_other}, 10.42.77.0/24"))).unwrap();
        node.set("nodes-file", file.to_str());
    }
    mesh.start();
    ping(&a.ns, b.overlay(V4)); // positive control
    let counts = || [a, b].map(|node| node.stats()["udp"]["tx_packets"].as_u64().unwrap());
    let before = counts();
    let socket = a.ns.udp(a.overlay(V4), 0);
    for _ in 0..10 {
        socket.send_to(b"round", "10.42.77.1:7000").unwrap();
    }
    until("each ends at the other side", || b.drops("inner_destination_not_ours") == 10);
    assert_eq!(counts(), [before[0] + 10, before[1]], "each crossed once");
    assert_eq!(a.drops("inner_destination_not_ours"), 0);
    mesh.balances();
}

/// A packet that two hosts route to each other dies of its hop limit: the kernels count it down, and we hand it on as it is.
#[test]
fn the_hop_limit_is_counted_down_by_the_hosts() {
    let Some(mesh) = Builder::new("the_hop_limit_is_counted_down_by_the_hosts") else { return };
    let mesh = mesh.pods().node("a").set("bfd", "off").node("b").set("bfd", "off").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(a.pod(), b.pod_address(V4));
    // pod, node a, node b, pod: it takes three to arrive
    for (hops, arrives) in [(1, false), (2, false), (3, true)] {
        let ping = format!("ping -n -c 1 -W 2 -t {hops} {}", b.pod_address(V4));
        assert_eq!(a.pod().succeeds(&ping), arrives, "{hops} hops");
    }
    // b sends back what a pod that it has not would get
    b.ns.sh("ip route replace 10.42.2.99/32 via 10.42.1.0 dev mesh0 onlink");
    let before = b.stats()["udp"]["tx_packets"].as_u64().unwrap();
    let socket = a.pod().udp(a.pod_address(V4), 0);
    for _ in 0..10 {
        socket.send_to(b"back and forth", "10.42.2.99:7000").unwrap();
    }
    until("b may not send on what is not its own", || b.drops("source_not_ours") >= 10);
    let after = b.stats()["udp"]["tx_packets"].as_u64().unwrap();
    assert!(after < before + 10, "{before} {after}");
    mesh.balances();
}
