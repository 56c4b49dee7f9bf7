//! A node with a kernel VXLAN device, set up as flannel does it, is a member like any other.

use std::collections::BTreeSet;

use nix::sys::socket::{setsockopt, sockopt};

use crate::hostile;
use crate::mesh::{Builder, V4, V6, has, has_kernel_vxlan, skipped, tshark};
use crate::namespace::Namespace;
use crate::traffic::{Capture, content, ping, receive, tcp, udp};

fn builder(story: &'static str) -> Option<Builder> {
    let builder = Builder::new(story)?;
    if !has_kernel_vxlan() {
        skipped(story, "this kernel has no VXLAN device");
        return None;
    }
    Some(builder)
}

#[test]
fn a_kernel_vxlan_device_is_a_member() {
    let Some(mesh) = builder("a_kernel_vxlan_device_is_a_member") else { return };
    let mesh = mesh.node("a").node("b").set("io", "tokio").kernel("k").start();
    talk(&mesh, &["a", "b"]);
    assert!(mesh.node("a").stats()["partial_csum_in"].as_u64().unwrap() > 0, "its virtual link finishes no checksum");
}

#[test]
fn a_kernel_vxlan_device_is_a_member_over_ipv6() {
    let Some(mesh) = builder("a_kernel_vxlan_device_is_a_member_over_ipv6") else { return };
    talk(&mesh.over(V6).node("a").kernel("k").start(), &["a"]);
}

#[test]
fn a_kernel_vxlan_device_is_a_member_where_checksums_are_computed() {
    let Some(mesh) = builder("a_kernel_vxlan_device_is_a_member_where_checksums_are_computed") else { return };
    talk(&mesh.profile('e').node("a").kernel("k").start(), &["a"]);
}

#[test]
fn pods_behind_a_kernel_vxlan_device_talk_to_pods_of_ours() {
    let Some(mesh) = builder("pods_behind_a_kernel_vxlan_device_talk_to_pods_of_ours") else { return };
    let mesh = mesh.pods().node("a").kernel("k").start();
    let [a, k] = mesh.two(["a", "k"]);
    for family in [V4, V6] {
        for (from, to) in [(a, k), (k, a)] {
            ping(from.pod(), to.pod_address(family));
            tcp(from.pod(), to.pod(), to.pod_address(family), 2 << 20);
        }
    }
    mesh.balances_with_the_kernel();
}

/// RFC 7348 §5 has reserved bits ignored; Linux' own device drops a frame with any of them set. We follow the RFC, and send
/// none, so that either understands us.
#[test]
fn reserved_bits_are_ignored_by_us_and_not_by_the_kernel() {
    let Some(mesh) = builder("reserved_bits_are_ignored_by_us_and_not_by_the_kernel") else { return };
    let mesh = mesh.node("a").member("m").kernel("k").start();
    let m = mesh.node("m");
    let sender = m.ns.udp(m.underlay(V4), 0);
    let reserved = [None, Some((0, 0x88)), Some((0, 0x0c)), Some((1, 1)), Some((3, 0xff)), Some((7, 1))];
    for (name, ours) in [("a", true), ("k", false)] {
        let node = mesh.node(name);
        let listener = node.ns.udp(node.overlay(V4), 7000);
        listener.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        let target = (node.underlay(V4), 8472).into();
        for (number, bits) in reserved.iter().enumerate() {
            let inner = hostile::udp("10.42.2.1", &node.overlay(V4).to_string(), 7000, &[number as u8]);
            let mut to = hostile::OURS;
            to[5] = node.number;
            let mut datagram = hostile::vxlan(&hostile::frame(to, 0x0800, &inner));
            if let Some((at, value)) = bits {
                datagram[*at] = *value;
            }
            hostile::send_to(&sender, target, &datagram);
            let mut buffer = [0xff; 4];
            let arrived = receive(&listener, &mut buffer).is_ok();
            assert!(!arrived || buffer[0] == number as u8);
            assert_eq!(arrived, ours || bits.is_none(), "{name}: {bits:?}; without any is the positive control");
        }
    }
    assert_eq!(mesh.node("a").drops("bad_vxlan_header"), 0);
    mesh.balances();
}

#[track_caller]
fn talk(mesh: &crate::mesh::Mesh, nodes: &[&str]) {
    let k = mesh.node("k");
    for node in nodes {
        let node = mesh.node(node);
        for family in [V4, V6] {
            ping(&node.ns, k.overlay(family));
            ping(&k.ns, node.overlay(family));
            tcp(&node.ns, &k.ns, k.overlay(family), 2 << 20);
            tcp(&k.ns, &node.ns, node.overlay(family), 2 << 20);
            udp(&node.ns, node.overlay(family), &k.ns, k.overlay(family), &[0, 1, 1400, 9000]);
            udp_segmented(&node.ns, node.overlay(family), &k.ns, k.overlay(family));
            udp_segmented(&k.ns, k.overlay(family), &node.ns, node.overlay(family));
        }
        assert_eq!(node.drops("bad_inner_packet") + node.drops("bad_vxlan_header"), 0);
    }
    mesh.balances_with_the_kernel();
}

/// Datagrams that the sender's kernel cuts out of one write (UDP_SEGMENT), as late as the path allows.
#[track_caller]
fn udp_segmented(from: &Namespace, source: std::net::IpAddr, to: &Namespace, address: std::net::IpAddr) {
    const SIZE: usize = 1200;
    let (client, server) = (from.udp(source, 0), to.udp(address, 0));
    if setsockopt(&client, sockopt::UdpGsoSegment, &(SIZE as i32)).is_err() {
        return skipped("UDP_SEGMENT", "the kernel does not know it");
    }
    let data = content(7, 20 * SIZE + 77);
    assert_eq!(client.send_to(&data, server.local_addr().unwrap()).unwrap(), data.len());
    let mut buffer = vec![0; 65_536];
    for (number, piece) in data.chunks(SIZE).enumerate() {
        let (len, _) = receive(&server, &mut buffer).unwrap_or_else(|e| panic!("datagram {number} of {source}: {e}"));
        assert!(buffer[..len] == *piece, "datagram {number}: {len} bytes, not {}, or others", piece.len());
    }
}

/// What meshd puts on the wire, read by somebody else's decoder.
#[test]
fn a_capture_of_the_outer_packets_says_what_it_should() {
    let story = "a_capture_of_the_outer_packets_says_what_it_should";
    let Some(mesh) = Builder::new(story) else { return };
    if let Some(tool) = ["tshark", "tcpdump"].into_iter().find(|tool| !has(tool)) {
        return skipped(story, &format!("`{tool}` is not installed"));
    }
    // without the datagrams of liveness, which have a network of their own
    let mesh = mesh.profile('e').node("a").set("vni", 4711).set("bfd", "off");
    let mesh = mesh.node("b").set("vni", 4711).set("bfd", "off").start();
    let [a, b] = mesh.two(["a", "b"]);
    let capture = Capture::start(&b.ns, "ul0", "udp and src host 10.9.0.1", &mesh.dir().join("outer.pcap"));
    // sixteen flows; DSCP EF with ECT(0) is 0xba
    for port in 0..16 {
        let (client, server) = (a.ns.udp(a.overlay(V4), 20_000 + port), b.ns.udp(b.overlay(V4), 0));
        setsockopt(&client, sockopt::Ipv4Tos, &0xba).unwrap();
        client.send_to(b"a flow", server.local_addr().unwrap()).unwrap();
        receive(&server, &mut [0; 16]).unwrap();
    }
    ping(&a.ns, b.overlay(V6));
    tcp(&a.ns, &b.ns, b.overlay(V4), 100_000);
    let fields = [
        "vxlan.vni",
        "vxlan.flags",
        "eth.dst",
        "eth.src",
        "ip.ttl",
        "ip.flags.df",
        "ip.dsfield",
        "udp.srcport",
        "udp.dstport",
        "udp.checksum.status",
        "tcp.checksum.status",
    ];
    let rows = tshark(&capture.end(), &fields);
    assert!(rows.len() > 30, "{rows:?}");
    let mut source_ports = BTreeSet::new();
    let mut marked = 0;
    for row in &rows {
        let [vni, flags, dst, src, ttl, df, tos, from, to, udp, tcp] = row.as_slice() else { panic!("{row:?}") };
        let outer = |field: &str| field.split(',').next().unwrap_or_default().to_owned();
        let inner = |field: &str| field.split(',').nth(1).unwrap_or_default().to_owned();
        assert_eq!((vni.as_str(), flags.as_str()), ("4711", "0x0800"), "{row:?}");
        assert_eq!((inner(dst), inner(src)), (b.mac(), a.mac()), "{row:?}");
        assert_eq!((outer(ttl).as_str(), outer(to).as_str()), ("64", "8472"), "{row:?}");
        assert!(matches!(outer(df).as_str(), "1" | "True"), "{row:?}");
        assert!(udp.split(',').chain(tcp.split(',')).all(|status| status.is_empty() || status == "1"), "{row:?}");
        assert_ne!(outer(from), "8472", "{row:?}");
        if let [outer, inner] = tos.split(',').collect::<Vec<_>>()[..] {
            assert_eq!(outer, inner, "DSCP and ECN are copied: {row:?}");
            marked += usize::from(inner == "0xba");
        }
        source_ports.insert(outer(from));
    }
    assert_eq!(marked, 16);
    assert!(source_ports.len() > 2, "flows spread over source ports: {source_ports:?}");
    mesh.balances_with_the_kernel();
}
