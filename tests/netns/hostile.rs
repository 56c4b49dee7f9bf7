//! Bad input on the wire: each piece is counted once, under its name, and the next good packet passes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use etherparse::PacketBuilder;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::mesh::{Builder, Family, V4, V6};
use crate::namespace::until;
use crate::traffic::{content, receive};

/// A datagram and the reason it should be dropped for.
struct Bad {
    what: String,
    datagram: Vec<u8>,
    reason: &'static str,
}

fn bad(what: impl Into<String>, datagram: Vec<u8>, reason: &'static str) -> Bad {
    Bad { what: what.into(), datagram, reason }
}

pub(crate) const OURS: [u8; 6] = [0x0a, 0x58, 0x0a, 0x09, 0, 1];
const THEIRS: [u8; 6] = [0x0a, 0x58, 0x0a, 0x09, 0, 2];

pub(crate) fn udp(source: &str, destination: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => PacketBuilder::ipv4(source.octets(), destination.octets(), 64),
        (IpAddr::V6(source), IpAddr::V6(destination)) => PacketBuilder::ipv6(source.octets(), destination.octets(), 64),
        _ => panic!("two families"),
    };
    builder.udp(5000, port).write(&mut packet, payload).unwrap();
    packet
}

pub(crate) fn frame(to: [u8; 6], ether_type: u16, inner: &[u8]) -> Vec<u8> {
    [&to[..], &THEIRS, &ether_type.to_be_bytes(), inner].concat()
}

pub(crate) fn vxlan(frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0, 0, 0, 1, 0], frame].concat()
}

pub(crate) fn ipv4(inner: &[u8]) -> Vec<u8> {
    vxlan(&frame(OURS, 0x0800, inner))
}

pub(crate) fn ipv6(inner: &[u8]) -> Vec<u8> {
    vxlan(&frame(OURS, 0x86dd, inner))
}

fn bad_input() -> Vec<Bad> {
    let good = ipv4(&udp("10.42.2.1", "10.42.1.1", 7000, b"x"));
    let mut all = Vec::new();
    for len in [0, 1, 7] {
        all.push(bad(format!("cut to {len}"), good[..len].to_vec(), "bad_vxlan_header"));
    }
    for len in [8, 20, 21] {
        all.push(bad(format!("cut to {len}"), good[..len].to_vec(), "inner_not_ip"));
    }
    for len in 22..good.len() {
        all.push(bad(format!("cut to {len}"), good[..len].to_vec(), "bad_inner_packet"));
    }
    let changed = |at: usize, value: u8| {
        let mut datagram = good.clone();
        datagram[at] = value;
        datagram
    };
    let mut garbage = content(9, 1000);
    garbage[0] = 0;
    all.push(bad("garbage", garbage, "bad_vxlan_header"));
    all.push(bad("the longest datagram", vec![0; 65_507], "bad_vxlan_header"));
    let mut long = good.clone();
    long.resize(65_507, 0);
    long[30..34].fill(0xff);
    all.push(bad("the longest datagram, with a lie about its length", changed_len(long), "bad_inner_packet"));
    all.push(bad("no I flag", changed(0, 0), "bad_vxlan_header"));
    all.push(bad("another VNI", changed(6, 2), "wrong_vni"));
    all.push(bad("ARP", vxlan(&frame(OURS, 0x0806, &[0; 28])), "inner_not_ip"));
    all.push(bad("a VLAN tag", vxlan(&frame(OURS, 0x8100, &[0; 40])), "inner_not_ip"));
    all.push(bad("another VTEP's MAC", changed(13, 9), "bad_inner_mac"));
    all.push(bad(
        "IPv6 in an IPv4 frame",
        ipv4(&udp("fd42:0:0:2::1", "fd42:0:0:1::1", 7000, b"x")),
        "bad_inner_packet",
    ));
    for source in ["10.42.3.1", "10.42.1.9", "10.9.0.3", "192.0.2.1", "127.0.0.1"] {
        let inner = udp(source, "10.42.1.1", 7000, b"x");
        all.push(bad(format!("from {source}"), ipv4(&inner), "inner_source_not_allowed"));
    }
    for source in ["fd42:0:0:3::1", "fe80::1", "::1"] {
        let inner = udp(source, "fd42:0:0:1::1", 7000, b"x");
        all.push(bad(format!("from {source}"), ipv6(&inner), "inner_source_not_allowed"));
    }
    for destination in ["10.42.3.1", "10.42.2.1", "10.9.0.254", "224.0.0.1", "255.255.255.255", "127.0.0.1"] {
        let inner = udp("10.42.2.1", destination, 7000, b"x");
        all.push(bad(format!("to {destination}"), ipv4(&inner), "inner_destination_not_ours"));
    }
    for destination in ["fd42:0:0:3::1", "ff02::1", "::1", "fe80::1"] {
        let inner = udp("fd42:0:0:2::1", destination, 7000, b"x");
        all.push(bad(format!("to {destination}"), ipv6(&inner), "inner_destination_not_ours"));
    }
    // a tunnel in the tunnel, to where meshd listens
    let nested = udp("10.42.2.1", "10.9.0.1", 8472, &good);
    all.push(bad("VXLAN in VXLAN", ipv4(&nested), "inner_destination_not_ours"));
    all
}

/// Makes the IPv4 total length longer than what is there.
fn changed_len(mut datagram: Vec<u8>) -> Vec<u8> {
    datagram[24..26].copy_from_slice(&u16::MAX.to_be_bytes());
    datagram
}

#[test]
fn bad_datagrams_of_a_member_are_counted_by_name() {
    each_is_counted("mmsg", V4);
}

#[test]
fn bad_datagrams_over_an_ipv6_underlay_are_counted_by_name() {
    each_is_counted("mmsg", V6);
}

#[test]
fn bad_datagrams_of_a_member_are_counted_by_name_with_io_uring() {
    each_is_counted("uring", V4);
}

#[test]
fn bad_datagrams_of_a_member_are_counted_by_name_with_the_plain_back_end() {
    each_is_counted("tokio", V4);
}

#[track_caller]
fn each_is_counted(io: &str, outer: Family) {
    let Some(mesh) = Builder::new("each_is_counted") else { return };
    let mesh = mesh.over(outer).node("a").set("io", io).member("m").member("c").start();
    let [a, m] = mesh.two(["a", "m"]);
    let (attacker, target) = (m.ns.udp(m.underlay(outer), 0), SocketAddr::new(a.underlay(outer), 8472));
    let listeners = [V4, V6].map(|family| a.ns.udp(a.overlay(family), 7000));
    let drops = || {
        let mut drops: BTreeMap<String, u64> = serde_json::from_value(a.stats()["drops"].clone()).unwrap();
        drops.remove("multicast"); // the kernel itself says something on each device that comes up
        drops
    };
    let good = [
        ipv4(&udp("10.42.2.1", "10.42.1.1", 7000, b"good")),
        ipv6(&udp("fd42:0:0:2::1", "fd42:0:0:1::1", 7000, b"good")),
    ];
    let good_passes = |after: &str| {
        for (good, listener) in good.iter().zip(&listeners) {
            send_to(&attacker, target, good);
            let mut buffer = [0; 16];
            let (len, _) =
                receive(listener, &mut buffer).unwrap_or_else(|e| panic!("the good packet after {after}: {e}"));
            assert_eq!(&buffer[..len], b"good", "{after}");
        }
    };
    good_passes("nothing (positive control)");
    let mut expected = drops();
    assert!(expected.values().all(|n| *n == 0), "{expected:?}");
    for Bad { what, datagram, reason } in bad_input() {
        for _ in 0..3 {
            send_to(&attacker, target, &datagram);
        }
        good_passes(&what);
        *expected.get_mut(reason).unwrap_or_else(|| panic!("there is no counter {reason}")) += 3;
        until(&format!("{what} is counted as {reason}: {:?}", drops()), || drops()[reason] >= expected[reason]);
        assert_eq!(drops(), expected, "{what}");
    }
    // a whole batch at once, such as GRO may join
    for _ in 0..200 {
        send_to(&attacker, target, &ipv4(&udp("10.42.3.1", "10.42.1.1", 7000, b"x")));
    }
    good_passes("200 at once");
    *expected.get_mut("inner_source_not_allowed").unwrap() += 200;
    until("all 200 are counted", || drops() == expected);
    mesh.balances();
}

#[test]
fn a_stranger_is_dropped_before_anything_is_parsed() {
    let Some(mesh) = Builder::new("a_stranger_is_dropped_before_anything_is_parsed") else { return };
    let mesh = mesh.node("a").member("m").stranger("x").start();
    let [a, m, x] = mesh.three(["a", "m", "x"]);
    let (member, stranger) = (m.ns.udp(m.underlay(V4), 0), x.ns.udp(x.underlay(V4), 8472));
    let listener = a.ns.udp(a.overlay(V4), 7000);
    let good = ipv4(&udp("10.42.2.1", "10.42.1.1", 7000, b"good"));
    for (number, datagram) in bad_input().into_iter().map(|bad| bad.datagram).chain([good.clone()]).enumerate() {
        send(&stranger, &datagram);
        until("it is counted", || a.drops("unknown_source") == number as u64 + 1);
    }
    stranger.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    assert!(receive(&stranger, &mut [0; 64]).is_err(), "and not answered");
    send(&member, &good);
    assert_eq!(receive(&listener, &mut [0; 16]).unwrap().0, 4, "positive control: of a member the same is taken");
    let stats = a.stats();
    assert_eq!(stats["inbound"]["dropped"], stats["drops"]["unknown_source"], "{stats:#}");
    mesh.balances();
}

/// Datagrams larger than the underlay carries in one piece, and runs that GRO joins to 64 KiB.
#[test]
fn large_datagrams_are_judged_like_small_ones() {
    for outer in [V4, V6] {
        let Some(mesh) = Builder::new("large_datagrams_are_judged_like_small_ones") else { return };
        let mesh = mesh.over(outer).node("a").member("m").member("c").start();
        let [a, m] = mesh.two(["a", "m"]);
        let (sender, target) = (m.ns.udp(m.underlay(outer), 0), SocketAddr::new(a.underlay(outer), 8472));
        let listener = a.ns.udp(a.overlay(V4), 7000);
        let mut buffer = vec![0; 65_536];
        // longer than either MTU: cut and put together again by the kernels, outside meshd's sight
        for len in [1500, 9000, 40_000, 65_000] {
            let data = content(len as u64, len);
            send_to(&sender, target, &ipv4(&udp("10.42.2.1", "10.42.1.1", 7000, &data)));
            let (got, _) = receive(&listener, &mut buffer).unwrap_or_else(|e| panic!("{len} bytes: {e}"));
            assert!(buffer[..got] == data, "{len}: {got}");
            send_to(&sender, target, &ipv4(&udp("10.42.3.1", "10.42.1.1", 7000, &data)));
        }
        until("the forged ones are counted", || a.drops("inner_source_not_allowed") == 4);

        // one send of 45 datagrams, of which each third is good and the others are bad in two ways
        let of = |source: &str, vni: u8| {
            let mut datagram = ipv4(&udp(source, "10.42.1.1", 7000, &content(5, 1300)));
            datagram[6] = vni;
            datagram
        };
        let kinds = [of("10.42.2.1", 1), of("10.42.3.1", 1), of("10.42.2.1", 2)];
        let all: Vec<u8> = (0..45).flat_map(|index| kinds[index % 3].clone()).collect();
        setsockopt(&sender, sockopt::UdpGsoSegment, &(kinds[0].len() as i32)).unwrap();
        send_to(&sender, target, &all);
        for number in 0..15 {
            let (got, _) = receive(&listener, &mut buffer).unwrap_or_else(|e| panic!("number {number}: {e}"));
            assert!(buffer[..got] == content(5, 1300), "number {number}");
        }
        until("and each bad one", || a.drops("inner_source_not_allowed") == 19 && a.drops("wrong_vni") == 15);
        mesh.balances();
    }
}

/// A fragment of an outer packet that never becomes whole, and one that lies over another, are the kernel's to drop: meshd
/// sees neither, and goes on.
#[test]
fn outer_fragments_that_never_become_whole() {
    let Some(mesh) = Builder::new("outer_fragments_that_never_become_whole") else { return };
    let mesh = mesh.node("a").member("m").start();
    let [a, m] = mesh.two(["a", "m"]);
    let whole = ipv4(&udp("10.42.2.1", "10.42.1.1", 7000, &content(1, 3000)));
    let mut datagram = Vec::new();
    PacketBuilder::ipv4([10, 9, 0, 2], [10, 9, 0, 1], 64).udp(5000, 8472).write(&mut datagram, &whole).unwrap();
    let payload = datagram.split_off(20);
    let fragment = |id: u16, at: usize, len: usize, more: bool| {
        let mut packet = datagram.clone();
        packet.extend(&payload[at..at + len]);
        let flags = (at / 8) as u16 | if more { 0x2000 } else { 0 };
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        packet // the kernel fills in length and checksum
    };
    let raw = m.ns.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))).unwrap();
    let send_raw = |packet: &[u8]| {
        raw.send_to(packet, &SocketAddr::new(a.underlay(V4), 0).into()).unwrap();
    };
    let listener = a.ns.udp(a.overlay(V4), 7000);
    let rest = payload.len() - 1480;
    for id in 1..200 {
        send_raw(&fragment(id, 0, 1480, true)); // without an end
        send_raw(&fragment(1000 + id, 1480, rest.min(1480), true)); // without a beginning
        send_raw(&fragment(2000 + id, 0, 1480, true)); // overlapping
        send_raw(&fragment(2000 + id, 1472, 1480, true));
    }
    assert_eq!(a.stats()["udp"]["rx_packets"], 0, "none is a datagram");
    // positive control: the same, complete
    send_raw(&fragment(9000, 0, 1480, true));
    send_raw(&fragment(9000, 1480, 1480, true));
    send_raw(&fragment(9000, 2960, payload.len() - 2960, false));
    let mut buffer = vec![0; 65_536];
    let (got, _) = receive(&listener, &mut buffer).unwrap();
    assert!(buffer[..got] == content(1, 3000), "{got}");
    mesh.balances();
}

/// From the inside: what this node may not send never leaves.
#[test]
fn what_may_not_leave_is_counted_by_name() {
    let Some(mesh) = Builder::new("what_may_not_leave_is_counted_by_name") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    a.ns.sh("ip addr add 192.0.2.7/32 dev lo; ip route add 10.43.0.0/16 dev mesh0; ip route add 239.0.0.0/8 dev mesh0");
    let source: IpAddr = "192.0.2.7".parse().unwrap();
    for (from, to, reason) in [
        (source, b.overlay(V4), "source_not_ours"),
        (a.overlay(V4), "10.43.0.1".parse().unwrap(), "no_route"),
        (a.overlay(V4), "239.1.2.3".parse().unwrap(), "multicast"),
    ] {
        let socket = a.ns.udp(from, 0);
        let before = a.drops(reason);
        for _ in 0..5 {
            socket.send_to(b"out", (to, 7000)).unwrap();
        }
        until(reason, || a.drops(reason) == before + 5);
    }
    crate::traffic::ping(&a.ns, b.overlay(V4));
    mesh.balances();
}

#[track_caller]
fn send(socket: &UdpSocket, datagram: &[u8]) {
    send_to(socket, "10.9.0.1:8472".parse().unwrap(), datagram);
}

#[track_caller]
pub(crate) fn send_to(socket: &UdpSocket, target: SocketAddr, datagram: &[u8]) {
    // a pending ICMP error is reported once, instead of sending
    if socket.send_to(datagram, target).is_err() {
        socket.send_to(datagram, target).unwrap();
    }
}
