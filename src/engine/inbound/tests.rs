use zerocopy::IntoBytes;

use super::*;
use crate::engine::testing::*;
use crate::engine::tx_batch::Piece;
use crate::wire::vnet_hdr::{self, VnetHdr};

/// A good packet from node 2 to node 1.
fn good() -> Vec<u8> {
    udp(false, 2, 1, payload(60)).bytes()
}

/// Delivers a buffer and a good datagram behind it: of the first, all `count` datagrams are dropped for that reason; the
/// second arrives.
fn refused(reason: &'static str, count: u64, buffer: &Buffer) {
    let mut node = Receiving::new(mesh(1));
    node.push(buffer);
    node.take(&good());
    let written = node.flush();
    assert_eq!(written.iter().map(|w| &w.packet).collect::<Vec<_>>(), [&good()], "the good one and nothing else");
    assert_eq!(drops(&node.stats), [(reason, count)]);
    assert_eq!(node.stats.sum(|w| w.flow.udp_rx_packets.get()), count + 1);
}

/// The good datagram with bytes changed.
fn spoilt(edits: &[(usize, u8)]) -> Buffer {
    let mut buffer = Buffer::one(2, 1, &good());
    for (at, value) in edits {
        buffer.bytes[*at] = *value;
    }
    buffer
}

fn accepted(buffer: &Buffer) -> Vec<Written> {
    let mut node = Receiving::new(mesh(1));
    node.push(buffer);
    let written = node.flush();
    assert_eq!(drops(&node.stats), []);
    written
}

#[test]
fn a_datagram_arrives_as_literal_bytes() {
    let packet = b"\x45\xb8\x00\x20\x00\x01\x40\x00\x40\x11\x23\xb4\x0a\x2a\x02\x01\x0a\x2a\x01\x01\x00\x01\x00\x02\x00\x0c\x00\x00data";
    let head = b"\x08\x00\x00\x00\x00\x00\x01\x00\x02\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x02\x08\x00";
    let mut node = Receiving::new(mesh(1));
    node.push(&Buffer { bytes: [&head[..], packet].concat(), ..Buffer::one(2, 1, &[]) });
    let written = node.flush();
    assert_eq!(written, [Written { vnet: VnetHdr::default(), packet: packet.to_vec(), segments: 1 }]);
}

#[test]
fn a_packet_lies_where_it_was_received() {
    let mut node = Inbound::new(Stats::new(1), 0, ALL);
    let mut arena = encapsulate(2, 1, &good());
    let len = arena.len();
    let source = "10.9.0.2:40000".parse().unwrap();
    let received = Received { at: 0, len, segment_len: None, source, tos: 0, truncated: false };
    node.push(&mesh(1), 0, &mut arena, received);
    node.finish(&mut arena);
    let front = (ENCAPSULATION - vnet_hdr::HEADER_LEN) as u32;
    assert_eq!(node.units()[0].pieces(), [Piece::Payload { at: front, len: len as u32 - front }]);
    assert_eq!(&arena[front as usize..ENCAPSULATION], VnetHdr::default().as_bytes());
}

#[test]
fn a_stranger_is_refused_before_anything_is_read() {
    let stranger = Buffer { source: "10.9.0.77".parse().unwrap(), ..Buffer::one(2, 1, &good()) };
    refused("unknown_source", 1, &stranger);
    refused("unknown_source", 1, &Buffer { truncated: true, bytes: vec![0xff; 9], ..stranger.clone() });
    let many = Buffer { source: stranger.source, ..Buffer::joined(2, 1, &vec![good(); 5]) };
    refused("unknown_source", 5, &many);
    let own = Buffer { source: "10.9.0.1".parse().unwrap(), ..stranger };
    refused("unknown_source", 1, &own);
}

#[test]
fn any_underlay_address_of_a_member_is_known() {
    let v6 = Buffer { source: "fd09::2".parse().unwrap(), ..Buffer::one(2, 1, &good()) };
    assert_eq!(accepted(&v6).len(), 1);
}

#[test]
fn truncated_datagrams() {
    refused("truncated_datagram", 1, &Buffer { truncated: true, ..Buffer::one(2, 1, &good()) });
    refused("truncated_datagram", 3, &Buffer { truncated: true, ..Buffer::joined(2, 1, &vec![good(); 3]) });
}

#[test]
fn bad_vxlan_headers() {
    for len in 0..8 {
        let mut short = spoilt(&[]);
        short.bytes.truncate(len);
        refused("bad_vxlan_header", 1, &short);
    }
    refused("bad_vxlan_header", 1, &spoilt(&[(0, 0)]));
    refused("bad_vxlan_header", 1, &spoilt(&[(0, 0xf7)]));
    for (at, value) in [(4, 1), (5, 1), (6, 0)] {
        refused("wrong_vni", 1, &spoilt(&[(at, value)]));
    }
}

#[test]
fn messages_that_would_change_routes() {
    for (v6, kind) in [(false, 5), (false, 9), (true, 134), (true, 137)] {
        let protocol = if v6 { 58 } else { 1 };
        let message = |kind| Facts { transport: Transport::Other(protocol), ..udp(v6, 2, 1, vec![kind; 16]) }.bytes();
        refused("rogue_icmp_in", 1, &Buffer::one(2, 1, &message(kind)));
        let ping = message(if v6 { 128 } else { 8 });
        assert_eq!(accepted(&Buffer::one(2, 1, &ping))[0].packet, ping, "other ICMP arrives");
    }
}

#[test]
fn reserved_bits_of_vxlan_are_ignored() {
    let reserved = spoilt(&[(0, 0xff), (1, 0xff), (2, 0xff), (3, 0xff), (7, 0xff)]);
    assert_eq!(accepted(&reserved)[0].packet, good());
}

#[test]
fn inner_frames_for_others() {
    refused("bad_inner_mac", 1, &spoilt(&[(13, 3)]));
    refused("bad_inner_mac", 1, &spoilt(&[(8, 3)]));
    let broadcast: Vec<_> = (8..14).map(|at| (at, 0xff)).collect();
    assert_eq!(accepted(&spoilt(&broadcast))[0].packet, good());
}

#[test]
fn inner_frames_without_ip() {
    for kind in [[0x08, 0x06], [0x81, 0x00], [0x88, 0xcc]] {
        refused("inner_not_ip", 1, &spoilt(&[(20, kind[0]), (21, kind[1])]));
    }
    for len in 8..22 {
        let mut short = spoilt(&[]);
        short.bytes.truncate(len);
        refused("inner_not_ip", 1, &short);
    }
}

#[test]
fn inner_packets_that_contradict_themselves() {
    refused("bad_inner_packet", 1, &spoilt(&[(20, 0x86), (21, 0xdd)]));
    refused("bad_inner_packet", 1, &spoilt(&[(22, 0x65)]));
    refused("bad_inner_packet", 1, &spoilt(&[(22, 0x44)]));
    refused("bad_inner_packet", 1, &spoilt(&[(25, 0xff)]));
    for len in [22, 30, 41, 42, 109] {
        let mut short = spoilt(&[]);
        short.bytes.truncate(len);
        refused("bad_inner_packet", 1, &short);
    }
}

#[test]
fn addresses_that_do_not_belong() {
    let packet = |source: &str, destination: &str| {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        Buffer::one(2, 1, &Facts { source, destination, ..udp(false, 2, 1, payload(9)) }.bytes())
    };
    for source in ["10.42.3.1", "10.42.1.1", "10.9.0.3", "10.9.0.1", "192.0.2.1", "224.0.0.1", "0.0.0.0", "127.0.0.1"] {
        refused("inner_source_not_allowed", 1, &packet(source, "10.42.1.1"));
    }
    for destination in ["10.42.2.1", "10.42.3.1", "10.9.0.1", "192.0.2.1", "224.0.0.1", "255.255.255.255", "127.0.0.1"]
    {
        refused("inner_destination_not_ours", 1, &packet("10.42.2.1", destination));
    }
    assert_eq!(accepted(&packet("10.42.2.200", "10.42.1.77")).len(), 1);
    assert_eq!(accepted(&packet("10.9.0.2", "10.42.1.1")).len(), 1, "a node answers pods from its own address");
}

#[test]
fn one_peers_packet_does_not_admit_the_same_from_another() {
    let mut node = Receiving::new(mesh(1));
    node.take(&good());
    node.push(&Buffer { source: "10.9.0.3".parse().unwrap(), ..Buffer::one(2, 1, &good()) });
    node.take(&good());
    node.flush();
    assert_eq!(drops(&node.stats), [("inner_source_not_allowed", 1)]);
}

#[test]
fn ethernet_padding_is_cut_off() {
    let short = udp(false, 2, 1, payload(4)).bytes();
    let mut buffer = Buffer::one(2, 1, &short);
    buffer.bytes.extend([0; 14]);
    assert_eq!(accepted(&buffer)[0].packet, short);
    let padded: Vec<Vec<u8>> = vec![[&short[..], &[0; 14]].concat(); 3];
    let written = accepted(&Buffer::joined(2, 1, &padded));
    assert_eq!(written.iter().map(|w| w.segments).sum::<u16>(), 3);
}

#[test]
fn a_buffer_of_many_datagrams_is_taken_apart() {
    let mut packets: Vec<_> = (0..5).map(|id| Facts { id: 7 * id, ..udp(false, 2, 1, payload(60)) }.bytes()).collect();
    packets.push(udp(false, 2, 1, payload(10)).bytes());
    let written = accepted(&Buffer::joined(2, 1, &packets));
    assert_eq!(written.into_iter().map(|w| w.packet).collect::<Vec<_>>(), packets);
}

#[test]
fn each_datagram_of_a_buffer_is_judged_alone() {
    let foreign = udp(false, 3, 1, payload(60)).bytes();
    let mut buffer = Buffer::joined(2, 1, &[good(), foreign, good(), good()]);
    let step = usize::from(buffer.segment_len.unwrap());
    buffer.bytes[2 * step] = 0;
    buffer.bytes.truncate(4 * step - 1);
    let mut node = Receiving::new(mesh(1));
    node.push(&buffer);
    assert_eq!(node.flush().into_iter().map(|w| w.packet).collect::<Vec<_>>(), [good()]);
    let expected = [("bad_vxlan_header", 1), ("bad_inner_packet", 1), ("inner_source_not_allowed", 1)];
    assert_eq!(drops(&node.stats), expected);
}

#[test]
fn a_segment_length_of_nothing_or_of_all_is_one_datagram() {
    for segment_len in [None, Some(0), Some(110), Some(111), Some(u16::MAX)] {
        let buffer = Buffer { segment_len, ..Buffer::one(2, 1, &good()) };
        assert_eq!(accepted(&buffer)[0].packet, good());
    }
}

#[test]
fn a_peer_counts_what_it_sent() {
    let mut node = Receiving::new(mesh(1));
    node.push(&Buffer::joined(2, 1, &vec![good(); 3]));
    node.push(&Buffer { source: "10.9.0.3".parse().unwrap(), ..Buffer::one(2, 1, &good()) });
    node.flush();
    let of = |ip: &str| &node.tables.peer(node.tables.source(ip.parse().unwrap()).unwrap()).unwrap().spec.stats;
    let two = of("10.9.0.2");
    assert_eq!((two.sum(|p| p.rx_packets.get()), two.sum(|p| p.rx_bytes.get())), (3, 3 * good().len() as u64));
    assert_eq!(two.last_seen(), Some(7));
    assert_eq!(of("10.9.0.3").last_seen(), None, "what was refused is no sign of life");
}

#[test]
fn a_refused_write_is_counted() {
    let stats = Stats::new(1);
    let mut node = Inbound::new(stats.clone(), 0, ALL);
    let packets = tcp(false, 2, 1, payload(3000)).segments(1000);
    let mut arena = Vec::new();
    for packet in bytes_of(&packets) {
        let datagram = encapsulate(2, 1, &packet);
        let (at, len) = (arena.len(), datagram.len());
        arena.extend(datagram);
        let source = "10.9.0.2:40000".parse().unwrap();
        node.push(&mesh(1), 0, &mut arena, Received { at, len, segment_len: None, source, tos: 0, truncated: false });
    }
    node.finish(&mut arena);
    assert_eq!(node.units().len(), 1);
    node.written(&node.units()[0], false);
    assert_eq!(drops(&stats), [("tun_write_failed", 3)]);
    assert_conserved(&stats);
}

#[test]
fn after_a_long_super_packet_was_refused_they_are_short_for_a_while() {
    let stats = Stats::new(1);
    let mut node = Inbound::new(stats.clone(), 0, ALL).with_big_tcp(Arc::new(BigTcp::on()));
    let to_us = Facts { destination: itself(false, 1), ..tcp(false, 2, 1, payload(100_000)) };
    let packets = bytes_of(&to_us.segments(1000));
    let mut lens = |at_us: u64, takes: bool| {
        let mut arena = Vec::new();
        node.received_at(at_us);
        for packet in &packets {
            let datagram = encapsulate(2, 1, packet);
            let (at, len) = (arena.len(), datagram.len());
            arena.extend(datagram);
            let source = "10.9.0.2:40000".parse().unwrap();
            let received = Received { at, len, segment_len: None, source, tos: 0, truncated: false };
            node.push(&mesh(1), 0, &mut arena, received);
        }
        node.finish(&mut arena);
        let lens: Vec<u16> = node.units().iter().map(|unit| unit.segments).collect();
        for unit in node.units() {
            node.written(unit, takes);
            if !takes {
                node.refused(unit, false);
            }
        }
        node.clear();
        node.ask(|_| true);
        lens
    };
    assert_eq!(lens(1, true), [65, 35], "not before it is known where the flow ends");
    assert_eq!(lens(5, true), [100]);
    assert_eq!(lens(1_000_000, false), [100]);
    assert_eq!(lens(10_999_999, false), [65, 35], "and that these are refused says nothing of long ones");
    assert_eq!(lens(11_000_000, true), [65, 35], "that is asked each ten seconds");
    assert_eq!(lens(11_000_001, true), [100]);
    assert_eq!(drops(&stats), [("tun_write_failed", 200)]);
    assert_eq!(stats.sum(|w| w.flow.big_writes.get()), 2);
    assert_conserved(&stats);
}

/// RFC 6040 §4.2, figure 4: for each inner codepoint what comes out with each outer one; `None` is a drop.
const FIGURE_4: [(u8, [Option<u8>; 4]); 4] = {
    let (not_ect, ect1, ect0, ce) = (0, 1, 2, 3);
    [
        // outer:      Not-ECT        ECT(1)         ECT(0)         CE
        (not_ect, [Some(not_ect), Some(not_ect), Some(not_ect), None]),
        (ect1, [Some(ect1), Some(ect1), Some(ect1), Some(ce)]),
        (ect0, [Some(ect0), Some(ect1), Some(ect0), Some(ce)]),
        (ce, [Some(ce), Some(ce), Some(ce), Some(ce)]),
    ]
};

#[test]
fn congestion_marks_follow_figure_4_of_rfc_6040() {
    for v6 in [false, true] {
        for (inner, row) in FIGURE_4 {
            for (outer, expected) in (0..4).zip(row) {
                for dscp in [0, 0xb8, 0xfc] {
                    for id in [0, 1, 0xfffe, 0xffff] {
                        let facts = Facts { tos: dscp | inner, id, ..udp(v6, 2, 1, payload(10)) };
                        let buffer = Buffer { tos: 0x48 | outer, ..Buffer::one(2, 1, &facts.bytes()) };
                        let Some(ecn) = expected else {
                            refused("ecn_not_capable", 1, &buffer);
                            continue;
                        };
                        let written = accepted(&buffer);
                        assert_eq!(written[0].packet, Facts { tos: dscp | ecn, ..facts }.bytes());
                        assert_sound(&written[0].packet);
                    }
                }
            }
        }
    }
}

#[test]
fn a_wrong_header_checksum_stays_wrong_when_a_mark_is_set() {
    let mut packet = Facts { tos: 2, ..udp(false, 2, 1, payload(10)) }.bytes();
    packet[10] ^= 0x40;
    let written = accepted(&Buffer { tos: 3, ..Buffer::one(2, 1, &packet) });
    assert_eq!(written[0].packet[1], 3);
    assert_ne!(slow_sum([&written[0].packet[..20]]), 0xffff);
}

/// A buffer with what a kernel VXLAN device over a virtual link hands over: one frame that was never cut.
fn uncut(facts: &Facts, segment_len: Option<u16>) -> Buffer {
    Buffer { segment_len, ..Buffer::one(2, 1, &facts.bytes()) }
}

#[test]
fn an_uncut_udp_super_packet_is_one_frame() {
    for v6 in [false, true] {
        for (size, len) in [(1000, 9500), (500, 1000), (100, 150)] {
            let facts = Facts { check: Check::Pseudo, ..udp(v6, 2, 1, payload(len)) };
            let mut node = Receiving::new(mesh(1));
            node.push(&uncut(&facts, Some(size)));
            let count = len.div_ceil(size.into()) as u16;
            let expected = Written { vnet: facts.gso(size), packet: facts.bytes(), segments: count };
            assert_eq!(node.flush(), [expected], "{len} in {size}");
            assert_eq!(node.stats.sum(|w| w.flow.partial_csum_in.get()), u64::from(count));
            assert_eq!(node.stats.sum(|w| w.flow.tun_tx_packets.get()), u64::from(count));
            let bytes = len + usize::from(count) * facts.header_len();
            assert_eq!(node.stats.sum(|w| w.flow.tun_tx_bytes.get()), bytes as u64);
        }
    }
}

#[test]
fn a_corrupt_uncut_packet_is_not_flagged() {
    for check in [Check::Corrupt, Check::Field([0x12, 0x34])] {
        let datagram = Facts { check, ..udp(false, 2, 1, payload(9500)) };
        let stream = Facts { check, ..tcp(false, 2, 1, payload(9500)) };
        for (facts, segment_len) in [(datagram, Some(1000)), (stream, None)] {
            let expected = Written { vnet: VnetHdr::default(), packet: facts.bytes(), segments: 1 };
            assert_eq!(accepted(&uncut(&facts, segment_len)), [expected]);
        }
    }
}

#[test]
fn an_uncut_tcp_super_packet_gets_segments_of_the_overlay_mtu() {
    for v6 in [false, true] {
        let facts = Facts { check: Check::Pseudo, ..tcp(v6, 2, 1, payload(9500)) };
        let size = MTU - facts.header_len() as u16;
        let mut node = Receiving::new(mesh(1));
        node.push(&uncut(&facts, None));
        let expected = Written { vnet: facts.gso(size), packet: facts.bytes(), segments: 7 };
        assert_eq!(node.flush(), [expected]);
        assert_eq!(node.stats.sum(|w| w.flow.partial_csum_in.get()), 7);
    }
}

#[test]
fn unfinished_packets_are_handed_on_to_be_completed() {
    for v6 in [false, true] {
        for base in [tcp(v6, 2, 1, payload(100)), udp(v6, 2, 1, payload(100)), tcp(v6, 2, 1, Vec::new())] {
            let facts = Facts { check: Check::Pseudo, ..base };
            let mut node = Receiving::new(mesh(1));
            node.take(&facts.bytes());
            let expected = Written { vnet: facts.needs_csum(), packet: facts.bytes(), segments: 1 };
            assert_eq!(node.flush(), [expected]);
            assert_eq!(node.stats.sum(|w| w.flow.partial_csum_in.get()), 1);
        }
    }
}

#[test]
fn an_unfinished_packet_with_a_corrupt_header_is_not_flagged() {
    let facts = Facts { check: Check::Pseudo, ..tcp(false, 2, 1, payload(100)) };
    let mut packet = facts.bytes();
    packet[8] = 63;
    let written = accepted(&Buffer::one(2, 1, &packet));
    assert_eq!(written, [Written { vnet: VnetHdr::default(), packet, segments: 1 }]);
}

#[test]
fn a_device_without_offloads_gets_finished_packets() {
    for uso_only_missing in [false, true] {
        let accepts = Accepts { tso: uso_only_missing, uso: false };
        for v6 in [false, true] {
            for facts in [tcp(v6, 2, 1, payload(9500)), udp(v6, 2, 1, payload(9500)), udp(v6, 2, 1, payload(900))] {
                let facts = Facts { check: Check::Pseudo, ..facts };
                let is_udp = facts.transport == Transport::Udp;
                if uso_only_missing && !is_udp {
                    continue;
                }
                let size = if is_udp { 400 } else { MTU - facts.header_len() as u16 };
                let mut node = Receiving::with(mesh(1), accepts);
                node.push(&uncut(&facts, is_udp.then_some(size)));
                let written = node.flush();
                assert!(written.iter().all(|w| w.vnet == VnetHdr::default() && w.segments == 1));
                let packets: Vec<_> = written.into_iter().map(|w| w.packet).collect();
                assert_eq!(packets, bytes_of(&facts.segments(size.into())));
                packets.iter().for_each(|packet| assert_sound(packet));
            }
            let right = udp(v6, 2, 1, payload(100));
            let mut node = Receiving::with(mesh(1), Accepts { tso: false, uso: false });
            node.take(&Facts { check: Check::Pseudo, ..right.clone() }.bytes());
            node.take(&right.bytes());
            let packets: Vec<_> = node.flush().into_iter().map(|w| w.packet).collect();
            assert_eq!(packets, [right.bytes(), right.bytes()]);
        }
    }
}

#[test]
fn headers_longer_than_the_path_do_not_make_segments_of_a_byte() {
    let facts = tcp(true, 2, 1, payload(20_000));
    let padding = std::iter::once(164).chain(std::iter::repeat_n(0, 1318)).collect();
    let facts = Facts { extensions: vec![(60, padding)], check: Check::Pseudo, ..facts };
    assert_eq!(accepted(&uncut(&facts, None))[0].segments, 1);
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let facts = prop_oneof![
            (any::<bool>(), 0usize..1400).prop_map(|(v6, len)| tcp(v6, 2, 1, payload(len))),
            (any::<bool>(), 0usize..9000).prop_map(|(v6, len)| udp(v6, 2, 1, payload(len))),
            (any::<bool>(), 0usize..9000)
                .prop_map(|(v6, len)| Facts { check: Check::Pseudo, ..tcp(v6, 2, 1, payload(len)) }),
        ];
        let edits = proptest::collection::vec((0usize..120, any::<u8>()), 0..4);
        let spoilt = (facts, edits, any::<prop::sample::Index>()).prop_map(|(facts, edits, cut)| {
            let mut bytes = encapsulate(2, 1, &facts.bytes());
            for (at, value) in edits {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            if cut.index(4) == 0 {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        });
        prop_oneof![3 => spoilt, 1 => proptest::collection::vec(any::<u8>(), 0..300)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_datagram_breaks_the_books_or_keeps_the_next_good_one_out(
            datagrams in proptest::collection::vec((bytes(), any::<Option<u16>>(), any::<u8>()), 1..6),
            tso in any::<bool>(),
            uso in any::<bool>(),
        ) {
            let mut node = Receiving::with(mesh(1), Accepts { tso, uso });
            for (bytes, segment_len, tos) in datagrams {
                node.push(&Buffer { bytes, segment_len, tos, ..Buffer::one(2, 1, &[]) });
            }
            // another flow than any above
            let good = Facts { ports: (9, 9), ..udp(false, 2, 1, payload(60)) }.bytes();
            node.take(&good);
            prop_assert_eq!(&node.flush().pop().unwrap().packet, &good);
        }
    }
}
