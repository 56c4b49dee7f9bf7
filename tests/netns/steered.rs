//! Messages that would change routes, sent by a workload and by a peer: they are dropped and counted by name, and no host
//! and no pod takes another way. Multicast stays where it is.

use std::net::{IpAddr, SocketAddr};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::hostile::{OURS, frame, send_to, vxlan};
use crate::mesh::{Builder, Family, Node, V4, V6};
use crate::namespace::{Namespace, until};
use crate::traffic::{ping, receive};

/// The ways out of a host or a pod.
fn ways(ns: &Namespace) -> String {
    ns.sh("ip route show table all; ip route show cache
           ip -6 route show table all | sed 's/ expires [0-9]*sec//'; ip -6 route show cache")
}

/// All ICMP messages that steer, and an echo request; without checksum.
fn messages(family: Family, gateway: IpAddr, of: IpAddr) -> Vec<(Option<&'static str>, Vec<u8>)> {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    if family == V4 {
        // a redirect quotes the packet it is about: from the receiver to somewhere
        let quoted = [&[0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0][..], &octets(of), &[192, 0, 2, 1], &[0; 8]].concat();
        let redirect = [&[5, 1, 0, 0][..], &octets(gateway), &quoted].concat();
        let advertisement = [&[9, 0, 0, 0, 1, 2, 0, 60][..], &octets(gateway), &[0; 4]].concat();
        let echo = vec![8, 0, 0, 0, 0, 7, 0, 1];
        return vec![(Some("redirect"), redirect), (Some("advertisement"), advertisement), (None, echo)];
    }
    let target = octets("2001:db8::1".parse().unwrap());
    let redirect = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &octets(gateway), &target].concat();
    // a default router for half an hour, and a prefix
    let prefix = [&[3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &target].concat();
    let advertisement = [&[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0][..], &prefix].concat();
    let echo = vec![128, 0, 0, 0, 0, 7, 0, 1];
    vec![(Some("redirect"), redirect), (Some("advertisement"), advertisement), (None, echo)]
}

fn sum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A packet around an ICMP message, both with their checksums.
fn packet(source: IpAddr, destination: IpAddr, mut message: Vec<u8>) -> Vec<u8> {
    let len = message.len();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let check = sum(&[&message]);
            message[2..4].copy_from_slice(&check);
            let mut header = vec![0x45, 0, 0, (20 + len) as u8, 0, 1, 0, 0, 255, 1, 0, 0];
            header.extend([source.octets(), destination.octets()].concat());
            let check = sum(&[&header]);
            header[10..12].copy_from_slice(&check);
            [header, message].concat()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let ips = [source.octets(), destination.octets()].concat();
            let check = sum(&[&ips, &[0, len as u8, 0, 58], &message]);
            message[2..4].copy_from_slice(&check);
            [&[0x60, 0, 0, 0, 0, len as u8, 58, 255][..], &ips, &message].concat()
        }
        _ => panic!("two families"),
    }
}

/// Hosts that would follow, if anything came.
fn make_gullible(nodes: &[&Node]) {
    for node in nodes {
        for ns in [&node.ns, node.pod()] {
            ns.sh("for key in ipv4/conf/all/accept_redirects ipv4/conf/all/shared_media ipv6/conf/all/accept_redirects; do
                       echo 1 >/proc/sys/net/$key; done
                   echo 0 >/proc/sys/net/ipv4/conf/all/secure_redirects
                   for key in accept_redirects accept_ra; do
                       for file in /proc/sys/net/ipv[46]/conf/*/$key; do [ ! -e $file ] || echo 2 >$file || echo 1 >$file; done
                   done");
        }
    }
}

#[test]
fn a_peer_does_not_steer_our_routes() {
    let Some(mesh) = Builder::new("a_peer_does_not_steer_our_routes") else { return };
    let mesh = mesh.pods().node("a").member("m").start();
    let [a, m] = mesh.two(["a", "m"]);
    make_gullible(&[a]);
    let (attacker, target) = (m.ns.udp(m.underlay(V4), 8472), SocketAddr::new(a.underlay(V4), 8472));
    for family in [V4, V6] {
        let ether_type = if family == V4 { 0x0800 } else { 0x86dd };
        for destination in [a.overlay(family), a.pod_address(family)] {
            let source = m.overlay(family);
            for (what, message) in messages(family, source, destination) {
                let before = (ways(&a.ns), ways(a.pod()), a.drops("rogue_icmp_in"));
                let datagram = vxlan(&frame(OURS, ether_type, &packet(source, destination, message)));
                for _ in 0..3 {
                    send_to(&attacker, target, &datagram);
                }
                match what {
                    Some(what) => {
                        until(&format!("the {what} is counted"), || a.drops("rogue_icmp_in") == before.2 + 3);
                    }
                    None => {
                        let (len, _) = receive(&attacker, &mut [0; 256]).expect("positive control: echo is answered");
                        assert!(len > 22);
                    }
                }
                assert_eq!((ways(&a.ns), ways(a.pod())), (before.0, before.1), "{what:?}");
            }
        }
    }
    // as a router on the link would say it: from a link-local address, to all
    let (router, all) = ("fe80::1".parse().unwrap(), "ff02::1".parse().unwrap());
    let before = ways(&a.ns);
    for (what, message) in messages(V6, router, a.overlay(V6)) {
        for destination in [all, a.overlay(V6)] {
            let datagram = vxlan(&frame([0xff; 6], 0x86dd, &packet(router, destination, message.clone())));
            let drops = a.drops("inner_source_not_allowed");
            send_to(&attacker, target, &datagram);
            until(&format!("{what:?} is counted"), || a.drops("inner_source_not_allowed") == drops + 1);
        }
    }
    assert_eq!(ways(&a.ns), before);
    mesh.balances();
}

#[test]
fn a_workload_does_not_steer_others() {
    let Some(mesh) = Builder::new("a_workload_does_not_steer_others") else { return };
    let mesh = mesh.pods().node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    make_gullible(&[b]);
    for family in [V4, V6] {
        // the pod's own socket, as a workload with CAP_NET_RAW has one
        let (domain, protocol) =
            if family == V4 { (Domain::IPV4, Protocol::ICMPV4) } else { (Domain::IPV6, Protocol::ICMPV6) };
        let raw = a.pod().enter(|| Socket::new(domain, Type::RAW, Some(protocol))).unwrap();
        for destination in [b.overlay(family), b.pod_address(family)] {
            ping(a.pod(), destination);
            for (what, mut message) in messages(family, a.pod_address(family), destination) {
                if family == V4 {
                    let check = sum(&[&message]);
                    message[2..4].copy_from_slice(&check);
                }
                let before = (ways(&b.ns), ways(b.pod()), a.drops("rogue_icmp_out"));
                let arrived = b.stats()["tun"]["tx_packets"].as_u64().unwrap();
                for _ in 0..3 {
                    raw.send_to(&message, &SocketAddr::new(destination, 0).into()).unwrap();
                }
                match what {
                    Some(what) => {
                        until(&format!("the {what} is counted"), || a.drops("rogue_icmp_out") == before.2 + 3)
                    }
                    None => until("positive control: echo requests arrive", || {
                        b.stats()["tun"]["tx_packets"].as_u64().unwrap() >= arrived + 3
                    }),
                };
                assert_eq!((ways(&b.ns), ways(b.pod())), (before.0, before.1), "{what:?}");
            }
        }
    }
    assert_eq!(b.drops("rogue_icmp_in"), 0, "none got that far");
    mesh.balances();
}

#[test]
fn multicast_stays_where_it_is() {
    let Some(mesh) = Builder::new("multicast_stays_where_it_is") else { return };
    let mesh = mesh.pods().node("a").set("bfd", "off").node("b").set("bfd", "off").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(a.pod(), b.pod_address(V4));
    // the node's own, sent to the device; each group is one that somebody on b listens to
    let listener = b.ns.udp(IpAddr::from([0, 0, 0, 0]), 7000);
    let group = "239.1.2.3".parse().unwrap();
    b.ns.enter(|| listener.join_multicast_v4(&group, &"10.42.2.0".parse().unwrap())).unwrap();
    let sender = a.ns.udp(a.overlay(V4), 0);
    a.ns.sh("ip route add 239.0.0.0/8 dev mesh0");
    setsockopt(&sender, sockopt::Broadcast, &true).unwrap();
    let before = (a.drops("multicast"), b.stats()["udp"]["rx_packets"].as_u64());
    for _ in 0..5 {
        sender.send_to(b"to all", ("239.1.2.3", 7000)).unwrap();
    }
    until("they are counted", || a.drops("multicast") >= before.0 + 5);
    assert_eq!(b.stats()["udp"]["rx_packets"].as_u64(), before.1, "none left the node");
    sender.send_to(b"to one", (b.overlay(V4), 7000)).unwrap();
    let mut buffer = [0; 16];
    let (len, _) = receive(&listener, &mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"to one", "positive control");
    mesh.balances();
}
