use std::net::IpAddr;

use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;
use crate::engine::testing::*;
use crate::wire::transport::flags::{ACK, CWR, FIN, PSH};

/// Pushes one frame to a node 1 whose paths take 1,450 bytes; the inner packets that are sent.
fn send(vnet: VnetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut node = Sending::new(mesh(1));
    node.push(vnet, packet);
    let packets = node.packets();
    assert_eq!(drops(&node.stats), []);
    packets
}

/// Pushes one frame and a good packet behind it: the first is dropped for that reason, the second passes.
fn refused(reason: &'static str, vnet: VnetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut node = Sending::new(mesh(1));
    node.push(vnet, packet);
    let good = udp(false, 1, 2, payload(9)).bytes();
    node.push(VnetHdr::default(), &good);
    let (runs, errors) = node.flush();
    let sent: Vec<_> = runs.iter().flat_map(|run| &run.datagrams).collect();
    assert_eq!(sent, [&encapsulate(1, 2, &good)], "the good packet and nothing else");
    assert!(matches!(drops(&node.stats)[..], [(name, _)] if name == reason), "{reason}: {:?}", drops(&node.stats));
    errors
}

#[test]
fn a_single_packet_leaves_as_literal_bytes() {
    let packet = b"\x45\xb8\x00\x20\x00\x01\x40\x00\x40\x11\x23\xb4\x0a\x2a\x01\x01\x0a\x2a\x02\x01\x00\x01\x00\x02\x00\x0c\x00\x00data";
    let mut node = Sending::new(mesh(1));
    node.push(VnetHdr::default(), packet);
    let (runs, _) = node.flush();
    let head = b"\x08\x00\x00\x00\x00\x00\x01\x00\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01\x08\x00";
    assert_eq!(runs[0].datagrams, [[&head[..], packet].concat()]);
    assert_eq!((runs[0].endpoint, runs[0].tos), ("10.9.0.2:8472".parse().unwrap(), 0xb8));
}

#[test]
fn single_packets_of_both_families_leave_unchanged() {
    for v6 in [false, true] {
        for facts in [udp(v6, 1, 3, payload(100)), tcp(v6, 1, 3, payload(100)), tcp(v6, 1, 3, Vec::new())] {
            assert_eq!(send(VnetHdr::default(), &facts.bytes()), [facts.bytes()]);
        }
    }
}

#[test]
fn what_lies_behind_the_ip_length_stays_behind() {
    let packet = udp(false, 1, 2, payload(20)).bytes();
    let padded = [&packet[..], &[0; 7]].concat();
    assert_eq!(send(VnetHdr::default(), &padded), [packet]);
}

fn options() -> Vec<u8> {
    // security (copied), record route (not copied), end of options
    b"\x82\x04\xaa\xbb\x07\x07\x04\x01\x02\x03\x04\x00".to_vec()
}

fn extensions() -> Vec<(u8, Vec<u8>)> {
    vec![(0, vec![0, 1, 4, 0, 0, 0, 0]), (60, vec![1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])]
}

fn every_kind(len: usize) -> Vec<Facts> {
    let mut kinds = Vec::new();
    for v6 in [false, true] {
        for base in [tcp(v6, 1, 2, payload(len)), udp(v6, 1, 2, payload(len))] {
            kinds.push(base.clone());
            kinds.push(if v6 {
                Facts { extensions: extensions(), ..base }
            } else {
                Facts { options: options(), ..base }
            });
        }
    }
    kinds
}

#[test]
fn a_checksum_left_to_the_device_is_computed() {
    for len in [0, 1, 2, 63, 64, 65, 1001, 1340] {
        for right in every_kind(len) {
            let partial = Facts { check: Check::Pseudo, ..right.clone() };
            let sent = send(partial.needs_csum(), &partial.bytes());
            assert_eq!(sent, [right.bytes()], "{right:?}");
            assert_sound(&sent[0]);
        }
    }
}

/// A UDP payload whose checksum comes out as zero.
fn zero_sum(v6: bool) -> Facts {
    let mut facts = udp(v6, 1, 2, vec![0, 0, 1, 2]);
    let plain = facts.bytes();
    let check = &plain[facts.ip_len() + 6..facts.ip_len() + 8];
    facts.payload[..2].copy_from_slice(check);
    facts
}

#[test]
fn a_udp_checksum_of_zero_goes_out_as_all_ones() {
    for v6 in [false, true] {
        let facts = zero_sum(v6);
        let partial = Facts { check: Check::Pseudo, ..facts.clone() };
        let at = facts.ip_len() + 6;
        assert_eq!(send(partial.needs_csum(), &partial.bytes())[0][at..at + 2], [0xff, 0xff]);
        let two = Facts { payload: [&facts.payload[..], &facts.payload].concat(), check: Check::Pseudo, ..facts };
        for segment in send(two.gso(4), &two.bytes()) {
            assert_eq!(segment[at..at + 2], [0xff, 0xff]);
            assert_sound(&segment);
        }
    }
}

#[test]
fn super_packets_of_every_kind_are_cut_as_the_kernel_cuts_them() {
    for size in [1, 7, 500, 999, 1000] {
        for len in [size, size + 1, 3 * size - 1, 3 * size] {
            for facts in every_kind(len) {
                let partial = Facts { check: Check::Pseudo, ..facts };
                let sent = send(partial.gso(size as u16), &partial.bytes());
                assert_eq!(sent, bytes_of(&partial.segments(size)), "{len} in {size}");
                sent.iter().for_each(|packet| assert_sound(packet));
            }
        }
    }
}

#[test]
fn flags_ids_and_sequence_numbers_of_segments() {
    let base = tcp(false, 1, 2, payload(2500)).with_flags(ACK | CWR | PSH | FIN).with_sequence(0xffff_fffe);
    let base = Facts { id: 0xffff, ..base };
    let sent = send(base.gso(1000), &base.bytes());
    let fact = |at: usize, len: usize| sent.iter().map(|p| p[at..at + len].to_vec()).collect::<Vec<_>>();
    assert_eq!(fact(4, 2), [[0xff, 0xff], [0, 0], [0, 1]], "ids count up and wrap");
    assert_eq!(fact(24, 4), [[0xff, 0xff, 0xff, 0xfe], [0, 0, 3, 0xe6], [0, 0, 7, 0xce]], "so do sequence numbers");
    assert_eq!(fact(33, 1), [[ACK | CWR], [ACK], [ACK | PSH | FIN]], "CWR first, FIN and PSH last");
    assert_eq!(fact(2, 2), [[4, 0x1c], [4, 0x1c], [2, 0x28]], "the last is short");
}

#[test]
fn super_packets_fill_up_sends_also_across_their_borders() {
    let facts = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(64_000)) };
    let mut node = Sending::new(mesh(1));
    node.push(facts.gso(1398), &facts.bytes());
    let (runs, _) = node.flush();
    assert_eq!(runs.iter().map(|run| run.datagrams.len()).collect::<Vec<_>>(), [44, 2], "44 of 1,472 bytes fit");
    // 46 segments a packet, all but the last full: the rest of one goes with the front of the next
    let full = Facts { payload: payload(46 * 1398), ..facts.clone() };
    node.push(full.gso(1398), &full.bytes());
    node.push(full.gso(1398), &full.bytes());
    assert_eq!(node.flush().0.iter().map(|run| run.datagrams.len()).collect::<Vec<_>>(), [44, 44, 4]);
    let facts = Facts { payload: payload(44 * 1398), ..facts };
    node.push(facts.gso(1398), &facts.bytes());
    assert_eq!(node.flush().0.iter().map(|run| run.datagrams.len()).collect::<Vec<_>>(), [44]);
}

#[test]
fn a_super_packet_leaves_uncut_where_it_is_cut_behind() {
    for v6 in [false, true] {
        let facts = Facts { check: Check::Pseudo, ..tcp(v6, 1, 2, payload(64_000)) }.with_flags(ACK | CWR);
        let mut node = Sending::new(mesh(1)).cut_behind(true, false);
        node.push(facts.gso(1378), &facts.bytes());
        let (runs, _) = node.flush();
        let [run] = &runs[..] else { panic!("{} runs", runs.len()) };
        let transport = facts.ip_len() as u16;
        let how = Uncut { v6, cwr: true, transport, header_len: facts.gso(1378).hdr_len(), size: 1378 };
        assert_eq!((run.uncut, run.tos), (Some(how), facts.tos));
        assert_eq!(run.datagrams, [encapsulate(1, 2, &facts.bytes())], "as it came, encapsulated once");
        let flow = &node.stats.worker(0).unwrap().flow;
        let (segments, headers) = (47, usize::from(how.header_len));
        assert_eq!(
            (flow.tun_rx_packets.get(), flow.udp_tx_packets.get()),
            (segments, segments),
            "counts as its segments"
        );
        assert_eq!(flow.udp_tx_bytes.get() as usize, 64_000 + segments as usize * (headers + ENCAPSULATION));
        // and what such a link never cut arrives as one at the other end
        let mut other = Receiving::new(mesh(2));
        other.push(&Buffer::one(1, 2, &facts.bytes()));
        assert_eq!(other.flush().len(), 1);
        let written = other.stats.worker(0).unwrap().flow.tun_tx_packets.get();
        assert_eq!(written, 64_000_u64.div_ceil(1450 - headers as u64), "segments of the overlay's MTU");
    }
}

#[test]
fn what_is_not_cut_behind_is_cut_here() {
    let big = |facts: Facts| Facts { check: Check::Pseudo, ..facts };
    let too_long = big(tcp(false, 1, 2, payload(65_486 - 52)));
    let fits = big(tcp(false, 1, 2, payload(65_485 - 52)));
    let one = big(tcp(false, 1, 2, payload(1000)));
    let datagrams = big(udp(false, 1, 2, payload(6000)));
    let uncut = |facts: &Facts, (v4, v6): (bool, bool), mtu: u16| {
        let mut node = Sending::new(mesh_with_mtu(1, mtu)).cut_behind(v4, v6);
        node.push(facts.gso(1398), &facts.bytes());
        let (runs, _) = node.flush();
        assert_eq!(drops(&node.stats), []);
        runs.iter().any(|run| run.uncut.is_some())
    };
    assert!(uncut(&fits, (true, false), 1450), "the positive control: the longest that a datagram holds");
    assert!(!uncut(&too_long, (true, true), 1450));
    assert!(!uncut(&fits, (false, true), 1450), "the underlay is IPv4");
    assert!(!uncut(&fits, (true, true), 1400), "the path takes less");
    assert!(!uncut(&one, (true, true), 1450), "nothing to cut");
    assert!(!uncut(&datagrams, (true, true), 1450), "UDP");
}

#[test]
fn an_uncut_super_packet_keeps_its_place_in_its_flow() {
    let big = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(5000)) };
    let small = tcp(false, 1, 2, payload(100));
    let mut node = Sending::new(mesh(1)).cut_behind(true, true);
    for _ in 0..2 {
        node.push(VnetHdr::default(), &small.bytes());
        node.push(big.gso(1398), &big.bytes());
    }
    node.push(VnetHdr::default(), &small.bytes());
    let (runs, _) = node.flush();
    let shape: Vec<_> = runs.iter().map(|run| run.uncut.is_some()).collect();
    assert_eq!(shape, [false, true, false, true, false]);
    assert!(runs.iter().all(|run| run.socket == runs[0].socket));
}

#[test]
fn no_send_has_more_than_64_segments_or_65507_bytes() {
    for (size, len, parts) in [(100, 6500, vec![64, 1]), (100, 6400, vec![64]), (8, 1600, vec![64, 64, 64, 8])] {
        let facts = Facts { check: Check::Pseudo, ..udp(false, 1, 2, payload(len)) };
        let mut node = Sending::new(mesh(1));
        node.push(facts.gso(size), &facts.bytes());
        let (runs, _) = node.flush();
        assert_eq!(runs.iter().map(|run| run.datagrams.len()).collect::<Vec<_>>(), parts, "{len} in {size}");
    }
    let mut node = Sending::new(mesh_with_mtu(1, 8950));
    let facts = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(65_400)) };
    node.push(facts.gso(8898), &facts.bytes());
    let (runs, _) = node.flush();
    assert_eq!(runs.iter().map(|run| run.datagrams.len()).collect::<Vec<_>>(), [7, 1]);
}

#[test]
fn small_packets_of_one_flow_share_a_send_until_one_is_shorter() {
    let mut node = Sending::new(mesh(1));
    for len in [64, 64, 20, 64] {
        node.push(VnetHdr::default(), &udp(false, 1, 2, payload(len)).bytes());
    }
    let (runs, _) = node.flush();
    assert_eq!(runs.iter().map(|run| run.datagrams.len()).collect::<Vec<_>>(), [3, 1]);
}

#[test]
fn peers_and_outer_tos_are_kept_apart() {
    let mut node = Sending::new(mesh(1));
    for (to, tos) in [(2, 0), (3, 0), (2, 0x2a), (3, 0)] {
        node.push(VnetHdr::default(), &Facts { tos, ..udp(false, 1, to, payload(64)) }.bytes());
    }
    let (runs, _) = node.flush();
    let shape: Vec<_> = runs.iter().map(|run| (run.endpoint.to_string(), run.tos, run.datagrams.len())).collect();
    let two = "10.9.0.2:8472".to_owned();
    assert_eq!(shape, [(two.clone(), 0, 1), ("10.9.0.3:8472".into(), 0, 2), (two, 0x2a, 1)]);
}

#[test]
fn a_super_packet_without_payload_is_one_datagram() {
    let facts = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, Vec::new()) };
    let mut node = Sending::new(mesh(1));
    (0..3).for_each(|_| node.push(facts.gso(1000), &facts.bytes()));
    let right = Facts { check: Check::Right, ..facts };
    assert_eq!(node.packets(), vec![right.bytes(); 3]);
}

fn with_flags(vnet: VnetHdr, flags: u8) -> VnetHdr {
    let mut vnet = vnet;
    vnet.flags = flags;
    vnet
}

#[test]
fn each_lie_of_the_offload_header_is_refused() {
    let t4 = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(3000)) };
    let t6 = Facts { check: Check::Pseudo, ..tcp(true, 1, 2, payload(3000)) };
    let u4 = Facts { check: Check::Pseudo, ..udp(false, 1, 2, payload(3000)) };
    let hdr = VnetHdr::super_packet;
    let bad_offset = |mut bytes: Vec<u8>, at: usize, words: u8| {
        bytes[at + 12] = words << 4;
        bytes
    };
    let small = udp(true, 1, 2, payload(100));
    let small4 = Facts { options: vec![1; 8], ..udp(false, 1, 2, payload(100)) };
    let fragment = Facts { flags_offset: 0x2000, ..t4.clone() };
    let lies: Vec<(&str, VnetHdr, Vec<u8>)> = vec![
        ("TCPv4 that is IPv6", hdr(1, 52, 1000, 40, 16), t6.bytes()),
        ("TCPv6 that is IPv4", hdr(4, 52, 1000, 20, 16), t4.bytes()),
        ("TCP that is UDP", hdr(1, 52, 1000, 20, 16), u4.bytes()),
        ("UDP that is TCP", hdr(5, 28, 1000, 20, 6), t4.bytes()),
        ("the UDP fragmentation offload of old", hdr(3, 28, 1000, 20, 6), u4.bytes()),
        ("an unknown kind", hdr(0x21, 52, 1000, 20, 16), t4.bytes()),
        ("segments of no size", hdr(1, 52, 0, 20, 16), t4.bytes()),
        ("without a checksum to compute", with_flags(t4.gso(1000), 0), t4.bytes()),
        ("checksum from another place", hdr(1, 52, 1000, 24, 16), t4.bytes()),
        ("checksum to another place", hdr(1, 52, 1000, 20, 6), t4.bytes()),
        ("a TCP header that is too short", t4.gso(1000), bad_offset(t4.bytes(), 20, 4)),
        (
            "a TCP header beyond the end",
            tcp(false, 1, 2, vec![]).gso(9),
            bad_offset(tcp(false, 1, 2, vec![]).bytes(), 20, 15),
        ),
        ("a fragment", fragment.gso(1000), fragment.bytes()),
        (
            "a super-packet without transport header",
            hdr(5, 28, 9, 20, 6),
            Facts { transport: Transport::Other(17), ..udp(false, 1, 2, payload(7)) }.bytes(),
        ),
        ("a checksum beyond the end", VnetHdr::needs_csum(20, 115), udp(false, 1, 2, payload(100)).bytes()),
        ("a checksum far beyond the end", VnetHdr::needs_csum(0xffff, 0xffff), udp(false, 1, 2, payload(100)).bytes()),
        ("a checksum over the IPv6 header", VnetHdr::needs_csum(20, 16), small.bytes()),
        ("a checksum over the IPv4 header", VnetHdr::needs_csum(0, 10), small.bytes()),
        ("a checksum over IPv4 options", VnetHdr::needs_csum(20, 6), small4.bytes()),
    ];
    for (lie, vnet, packet) in lies {
        println!("{lie}");
        refused("malformed_offload", vnet, &packet);
    }
}

#[test]
fn what_is_no_packet_is_malformed() {
    let good = udp(false, 1, 2, payload(10)).bytes();
    refused("malformed_packet", VnetHdr::default(), &[]);
    refused("malformed_packet", VnetHdr::default(), &[0x15; 40]);
    refused("malformed_packet", VnetHdr::default(), &good[..good.len() - 1]);
    refused("malformed_packet", VnetHdr::default(), &udp(true, 1, 2, payload(10)).bytes()[..39]);
    let mut node = Sending::new(mesh(1));
    let mut arena = [0; 200];
    for (at, len) in [(64, 5), (64, 0), (190, 60)] {
        node.outbound().push(&mesh(1), 0, &mut arena, at, len);
    }
    assert_eq!(drops(&node.stats), [("malformed_packet", 3)], "shorter than the offload header, outside the memory");
    node.flush();
}

#[test]
fn destinations_that_nobody_has() {
    let to = |v6, destination: &str| Facts { destination: destination.parse().unwrap(), ..udp(v6, 1, 2, payload(9)) };
    for ip in ["10.43.0.1", "10.42.9.1", "10.42.1.9"] {
        refused("no_route", VnetHdr::default(), &to(false, ip).bytes());
    }
    refused("no_route", VnetHdr::default(), &to(true, "fd42:0:0:9::1").bytes());
    for ip in ["224.0.0.251", "255.255.255.255", "169.254.0.1", "127.0.0.1", "0.0.0.0"] {
        refused("multicast", VnetHdr::default(), &to(false, ip).bytes());
    }
    for ip in ["ff02::1", "fe80::1", "::1"] {
        refused("multicast", VnetHdr::default(), &to(true, ip).bytes());
    }
}

#[test]
fn messages_that_would_change_routes_do_not_leave() {
    for (v6, kind) in [(false, 5), (false, 9), (true, 134), (true, 137)] {
        let protocol = if v6 { 58 } else { 1 };
        let message = |kind| Facts { transport: Transport::Other(protocol), ..udp(v6, 1, 2, vec![kind; 16]) }.bytes();
        refused("rogue_icmp_out", VnetHdr::default(), &message(kind));
        let ping = message(if v6 { 128 } else { 8 });
        assert_eq!(send(VnetHdr::default(), &ping), [ping], "other ICMP does");
    }
}

#[test]
fn a_source_that_a_receiver_would_refuse() {
    let from = |source: &str| Facts { source: source.parse().unwrap(), ..udp(false, 1, 2, payload(9)) }.bytes();
    refused("source_not_ours", VnetHdr::default(), &from("10.42.2.1"));
    refused("source_not_ours", VnetHdr::default(), &from("192.0.2.1"));
    assert_eq!(send(VnetHdr::default(), &from("10.9.0.1")), [from("10.9.0.1")], "a node's own address may");
}

#[test]
fn a_dropped_super_packet_counts_as_its_segments() {
    let facts = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(2500)) };
    let lost = Facts { destination: "10.77.0.1".parse().unwrap(), ..facts };
    let mut node = Sending::new(mesh(1));
    node.push(lost.gso(1000), &lost.bytes());
    assert_eq!(node.packets().len(), 0);
    assert_eq!(drops(&node.stats), [("no_route", 3)]);
    assert_eq!(node.stats.sum(|w| w.flow.tun_rx_bytes.get()), 2500 + 3 * 52);
}

#[test]
fn what_does_not_fit_is_answered_to_its_sender() {
    let facts = udp(false, 1, 2, payload(1423));
    let errors = refused("packet_too_big", VnetHdr::default(), &facts.bytes());
    let [error] = &errors[..] else { panic!("{errors:?}") };
    let (vnet, error) = VnetHdr::read_from_prefix(error).unwrap();
    assert_eq!(vnet, VnetHdr::default());
    assert_sound(error);
    let parsed = Packet::parse(error).unwrap();
    assert_eq!((parsed.source, parsed.destination), (facts.destination, facts.source));
    assert_eq!(error[20..28], [3, 4, error[22], error[23], 0, 0, 0x05, 0xaa], "fragmentation needed, 1450");
    assert_eq!(error[28..], facts.bytes()[..548]);

    let facts = udp(true, 1, 2, payload(1403));
    let errors = refused("packet_too_big", VnetHdr::default(), &facts.bytes());
    let error = &errors[0][vnet_hdr::HEADER_LEN..];
    assert_sound(error);
    assert_eq!(error.len(), 1280);
    assert_eq!(error[40..42], [2, 0]);
    assert_eq!(error[44..48], [0, 0, 0x05, 0xaa]);
    assert_eq!(error[48..], facts.bytes()[..1232]);

    let fits = udp(true, 1, 2, payload(1402));
    assert_eq!(send(VnetHdr::default(), &fits.bytes()), [fits.bytes()]);
    let fits = udp(false, 1, 2, payload(1422));
    assert_eq!(send(VnetHdr::default(), &fits.bytes()), [fits.bytes()]);
}

#[test]
fn a_super_packet_whose_segments_do_not_fit_is_cut_smaller_where_that_is_ours_to_do() {
    for v6 in [false, true] {
        let facts = Facts { check: Check::Pseudo, ..tcp(v6, 1, 2, payload(4000)) };
        let fits = if v6 { 1378 } else { 1398 };
        assert_eq!(send(facts.gso(fits), &facts.bytes()).len(), 3);
        let cut = send(facts.gso(fits + 100), &facts.bytes());
        assert_eq!(cut, send(facts.gso(fits), &facts.bytes()), "as if the sender had known");
        // datagrams are the sender's
        let facts = Facts { check: Check::Pseudo, ..udp(v6, 1, 2, payload(4000)) };
        let fits = if v6 { 1402 } else { 1422 };
        assert_eq!(send(facts.gso(fits), &facts.bytes()).len(), 3);
        assert_eq!(refused("packet_too_big", facts.gso(fits + 1), &facts.bytes()).len(), 1);
    }
}

/// What is known of a path is stricter than this node's own link.
fn over(mtu: u16) -> Sending {
    let tables = crate::engine::testing::watched(&mesh(1));
    for index in 0..tables.peers().len() as u32 {
        tables.liveness(PeerIndex(index)).unwrap().found(mtu);
    }
    Sending::new(tables)
}

#[test]
fn the_path_mtu_decides() {
    let fits = udp(false, 1, 2, payload(1372));
    let mut node = over(1400);
    node.push(VnetHdr::default(), &fits.bytes());
    assert_eq!(node.packets(), [fits.bytes()]);
    node.push(VnetHdr::default(), &udp(false, 1, 2, payload(1373)).bytes());
    let (_, errors) = node.flush();
    assert_eq!(errors[0][10 + 26..10 + 28], 1400u16.to_be_bytes());
    let facts = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(4000)) };
    node.push(facts.gso(1398), &facts.bytes());
    assert_eq!(node.packets(), send(facts.gso(1348), &facts.bytes()));
}

#[test]
fn ipv6_goes_on_where_the_path_takes_less_than_it_needs() {
    let mut node = over(1230);
    let facts = tcp(true, 1, 2, payload(1280 - 72));
    node.push(VnetHdr::default(), &facts.bytes());
    let halves = node.packets();
    assert_eq!(halves.iter().map(Vec::len).collect::<Vec<_>>(), [1230, 1280 - 1230 + 72]);
    halves.iter().for_each(|packet| assert_sound(packet));
    assert_eq!([&halves[0][72..], &halves[1][72..]].concat(), facts.payload);
    let damaged = Facts { check: Check::Field([1, 2]), ..facts };
    node.push(VnetHdr::default(), &damaged.bytes());
    assert_eq!(node.packets().len(), 0, "that must not become sound");
    // longer ones have a sender that can be told
    node.push(VnetHdr::default(), &tcp(true, 1, 2, payload(1281 - 72)).bytes());
    assert_eq!((node.packets().len(), drops(&node.stats)), (0, vec![("packet_too_big", 2)]));
}

#[test]
fn errors_are_limited_to_a_hundred_in_a_tenth_of_a_second() {
    let long = udp(false, 1, 2, payload(2000)).bytes();
    let mut node = Sending::new(mesh(1));
    for (now_ms, errors) in [(1000, 100), (1099, 0), (1100, 100)] {
        node.now_ms = now_ms;
        (0..130).for_each(|_| node.push(VnetHdr::default(), &long));
        assert_eq!(node.flush().1.len(), errors, "at {now_ms}");
    }
    assert_eq!(drops(&node.stats), [("packet_too_big", 390)], "all are counted");
    assert_eq!(node.stats.sum(|w| w.flow.originated_inbound.get()), 200);
}

#[test]
fn no_error_answers_what_must_not_be_answered() {
    let base = Facts { transport: Transport::Other(1), ..udp(false, 1, 2, payload(1500)) };
    let with_type = |kind: u8| {
        let mut payload = base.payload.clone();
        payload[0] = kind;
        Facts { payload, ..base.clone() }.bytes()
    };
    assert_eq!(refused("packet_too_big", VnetHdr::default(), &with_type(3)).len(), 0, "an error");
    assert_eq!(refused("packet_too_big", VnetHdr::default(), &with_type(8)).len(), 1, "a query");
    let later = Facts { flags_offset: DF | 100, ..udp(false, 1, 2, payload(1500)) };
    assert_eq!(refused("packet_too_big", VnetHdr::default(), &later.bytes()).len(), 0, "a later fragment");
}

/// Puts fragments of one packet together again; each is checked alone.
fn reassemble(fragments: &[Vec<u8>]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (index, fragment) in fragments.iter().enumerate() {
        let header = etherparse::Ipv4HeaderSlice::from_slice(fragment).unwrap();
        assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
        assert_eq!(usize::from(header.total_len()), fragment.len());
        assert!(fragment.len() <= usize::from(MTU));
        assert_eq!(header.more_fragments(), index + 1 < fragments.len());
        assert_eq!(header.fragments_offset().byte_offset() as usize, payload.len());
        payload.extend(&fragment[header.slice().len()..]);
    }
    payload
}

#[test]
fn a_packet_that_may_be_fragmented_is() {
    for len in [1431, 2000, 2848, 2849, 10_000] {
        let facts = Facts { flags_offset: 0, options: options(), ..udp(false, 1, 2, payload(len)) };
        let partial = Facts { check: Check::Pseudo, ..facts.clone() };
        for (vnet, packet) in [(VnetHdr::default(), &facts), (partial.needs_csum(), &partial)] {
            let mut node = Sending::new(mesh(1));
            node.push(vnet, &packet.bytes());
            let sent = node.packets();
            assert_eq!(sent.len(), (len + 8).div_ceil(1416));
            assert_eq!(reassemble(&sent), facts.bytes()[32..]);
            assert_eq!(sent[0][20..32], options()[..], "the first has all options");
            for later in &sent[1..] {
                assert_eq!(
                    later[20..32],
                    *b"\x82\x04\xaa\xbb\x01\x01\x01\x01\x01\x01\x01\x00",
                    "others the copied ones"
                );
            }
            assert!(sent.iter().all(|fragment| fragment[4..6] == facts.id.to_be_bytes()));
            assert_eq!(node.stats.sum(|w| w.flow.originated_outbound.get()), sent.len() as u64 - 1);
        }
    }
}

#[test]
fn a_fragment_that_does_not_fit_is_fragmented_again() {
    let facts = Facts { flags_offset: 0x2000 | 50, ..udp(false, 1, 2, payload(1992)) };
    let sent = send(VnetHdr::default(), &facts.bytes());
    let fields: Vec<_> = sent.iter().map(|f| u16::from_be_bytes([f[6], f[7]])).collect();
    assert_eq!(fields, [0x2000 | 50, 0x2000 | (50 + 1424 / 8)], "more fragments follow the last one, too");
    let ends = Facts { flags_offset: 50, ..facts };
    let sent = send(VnetHdr::default(), &ends.bytes());
    assert_eq!(u16::from_be_bytes([sent[1][6], sent[1][7]]), 50 + 1424 / 8);
}

#[test]
fn options_that_lie_about_their_length_neither_hang_nor_spill() {
    for options in [b"\x07\x00\x01\x01", b"\x07\xff\x01\x01", b"\x07\x01\x07\x01", b"\x01\x01\x01\x07"] {
        let facts = Facts { flags_offset: 0, options: options.to_vec(), ..udp(false, 1, 2, payload(2000)) };
        assert_eq!(reassemble(&send(VnetHdr::default(), &facts.bytes())), facts.bytes()[24..]);
    }
}

#[test]
fn a_super_packet_that_may_be_fragmented_is_cut_smaller() {
    let facts = tcp(false, 1, 2, payload(5000)).with_flags(ACK | PSH);
    let facts = Facts { flags_offset: 0, check: Check::Pseudo, ..facts };
    let mut node = Sending::new(mesh(1));
    node.push(facts.gso(2500), &facts.bytes());
    assert_eq!(node.packets(), bytes_of(&facts.segments(1398)));
    assert_eq!(node.stats.sum(|w| w.flow.tun_rx_packets.get()), 2);
    assert_eq!(node.stats.sum(|w| w.flow.originated_outbound.get()), 2, "two became four");
}

#[test]
fn what_a_socket_refused_is_counted() {
    let mut node = Sending::new(mesh(1));
    for len in [100, 100, 100] {
        node.push(VnetHdr::default(), &udp(false, 1, 2, payload(len)).bytes());
    }
    let outbound = node.outbound();
    for run in outbound.batch().runs() {
        outbound.sent(&mesh(1), run, Sent::Partly(1, Drop::UdpBufferFull));
    }
    outbound.clear();
    assert_conserved(&node.stats);
    assert_eq!(drops(&node.stats), [("udp_buffer_full", 2)]);
}

#[test]
fn a_peer_counts_what_it_is_sent() {
    let mut node = Sending::new(mesh(1));
    let facts = Facts { check: Check::Pseudo, ..tcp(false, 1, 3, payload(3000)) };
    node.push(facts.gso(1000), &facts.bytes());
    node.packets();
    let of = |ip: &str| {
        let ip: IpAddr = ip.parse().unwrap();
        let stats = &node.tables.peer(node.tables.route(ip).unwrap()).unwrap().spec.stats;
        (stats.sum(|p| p.tx_packets.get()), stats.sum(|p| p.tx_bytes.get()))
    };
    assert_eq!(of("10.42.3.1"), (3, 3000 + 3 * 52));
    assert_eq!(of("10.42.2.1"), (0, 0));
}

/// Super-packets of every kind, with everything that is not fixed chosen at random.
fn super_packet() -> impl Strategy<Value = (Facts, usize)> {
    let kind = (any::<bool>(), any::<bool>(), any::<bool>(), any::<u8>());
    let numbers = (any::<u16>(), any::<u32>(), any::<u32>(), any::<u16>(), any::<u8>(), any::<(u16, u16)>());
    let shape = (1usize..1300, 1usize..70, 0usize..1300);
    (kind, numbers, shape).prop_map(|((v6, is_tcp, extra, flags), numbers, (size, count, short))| {
        let (id, sequence, acknowledgement, window, tos, ports) = numbers;
        let len = (size * count).saturating_sub(short % size).min(60_000);
        let mut facts = udp(v6, 1, 2, payload(len));
        facts = Facts { id, tos, ports, check: Check::Pseudo, ..facts };
        if is_tcp {
            let options = if extra { b"\x01\x01\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x02".to_vec() } else { Vec::new() };
            facts.transport = Transport::Tcp { sequence, acknowledgement, flags, window, urgent: 0, options };
        }
        if extra && v6 {
            facts.extensions = extensions();
        } else if extra {
            facts.options = options();
        }
        (facts, size)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_super_packet_becomes_the_segments_it_stands_for((facts, size) in super_packet()) {
        let sent = send(facts.gso(size as u16), &facts.bytes());
        prop_assert_eq!(&sent, &bytes_of(&facts.segments(size)));
        sent.iter().for_each(|packet| assert_sound(packet));
    }

    #[test]
    fn no_bytes_and_no_offload_header_break_the_books(
        vnet in any::<[u8; 10]>(),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        (facts, _) in super_packet(),
        edits in proptest::collection::vec((0usize..80, any::<u8>()), 0..4),
    ) {
        let mut node = Sending::new(mesh(1));
        let (vnet, _) = VnetHdr::read_from_prefix(&vnet).unwrap();
        node.push(vnet, &noise);
        let mut packet = facts.bytes();
        node.push(vnet, &packet);
        for (at, value) in edits {
            if let Some(byte) = packet.get_mut(at) {
                *byte = value;
            }
        }
        let mut likely = with_flags(vnet, 1);
        likely.gso_type &= 7;
        node.push(likely, &packet);
        node.push(facts.gso(1000), &packet);
        node.push(VnetHdr::default(), &packet);
        node.flush();
    }
}
