use proptest::prelude::*;

use super::*;
use crate::engine::testing::*;
use crate::wire::transport::flags::{ACK, CWR, ECE, FIN, PSH, RST, SYN, URG};

/// Delivers packets from node 2 to node 1, each as a datagram of its own, in one batch.
fn deliver(packets: &[Vec<u8>]) -> Vec<Written> {
    let mut node = Receiving::new(mesh(1));
    packets.iter().for_each(|packet| node.take(packet));
    let written = node.flush();
    assert_eq!(drops(&node.stats), []);
    written
}

/// How many packets each write stands for.
fn shape(packets: &[Facts]) -> Vec<u16> {
    let written = deliver(&bytes_of(packets));
    // whatever was joined: cut again it is what came, in order
    assert_eq!(written.iter().flat_map(cut).collect::<Vec<_>>(), bytes_of(packets));
    written.iter().map(|w| w.segments).collect()
}

/// What a write is once it is cut again: the packets that node 2 would send for it.
fn cut(written: &Written) -> Vec<Vec<u8>> {
    let mut node = Sending::new(mesh_with_mtu(2, u16::MAX));
    node.push(written.vnet, &written.packet);
    let packets = node.packets();
    assert_eq!(packets.len(), usize::from(written.segments));
    packets
}

/// `count` consecutive segments of 1,000 bytes.
fn tcp_run(v6: bool, count: usize) -> Vec<Facts> {
    tcp(v6, 2, 1, payload(1000 * count)).segments(1000)
}

fn udp_run(v6: bool, count: usize) -> Vec<Facts> {
    udp(v6, 2, 1, payload(1000 * count)).segments(1000)
}

/// Three segments, of which the last two differ from the first by `change`: the first stays alone.
fn differs(run: Vec<Facts>, change: impl Fn(&mut Facts)) {
    let mut run = run;
    run.iter_mut().skip(1).for_each(change);
    assert_eq!(shape(&run), [1, 2]);
}

#[test]
fn consecutive_segments_become_one_super_packet() {
    for v6 in [false, true] {
        for whole in [tcp(v6, 2, 1, payload(44_300)), udp(v6, 2, 1, payload(44_300))] {
            let written = deliver(&bytes_of(&whole.segments(1000)));
            let partial = Facts { check: Check::Pseudo, ..whole };
            assert_eq!(written, [Written { vnet: partial.gso(1000), packet: partial.bytes(), segments: 45 }]);
        }
    }
}

#[test]
fn a_single_packet_is_not_touched() {
    for v6 in [false, true] {
        for facts in [tcp(v6, 2, 1, payload(100)), udp(v6, 2, 1, payload(100))] {
            assert_eq!(deliver(&[facts.bytes()])[0].packet, facts.bytes());
        }
    }
}

#[test]
fn nothing_is_joined_across_a_gap_or_backwards() {
    for v6 in [false, true] {
        let run = tcp_run(v6, 4);
        let pick = |order: [usize; 3]| order.map(|index| run[index].clone());
        assert_eq!(shape(&pick([0, 1, 3])), [2, 1]);
        assert_eq!(shape(&pick([1, 0, 2])), [1, 1, 1]);
        assert_eq!(shape(&pick([0, 0, 1])), [1, 2], "a repetition");
    }
}

#[test]
fn sequence_numbers_and_ids_wrap_within_a_super_packet() {
    let whole = Facts { id: 0xfffe, ..tcp(false, 2, 1, payload(5000)).with_sequence(0xffff_fc00) };
    assert_eq!(shape(&whole.segments(1000)), [5]);
}

#[test]
fn headers_that_differ_are_kept_apart() {
    for v6 in [false, true] {
        for run in [tcp_run(v6, 3), udp_run(v6, 3)] {
            differs(run.clone(), |f| f.tos = 4);
            differs(run.clone(), |f| f.tos = 2);
            differs(run.clone(), |f| f.ttl = 63);
            differs(run.clone(), |f| f.ports.0 += 1);
            differs(run.clone(), |f| f.ports.1 += 1);
        }
        let change = |edit: fn(&mut u32, &mut u8, &mut u16, &mut Vec<u8>)| {
            differs(tcp_run(v6, 3), |f| {
                if let Transport::Tcp { acknowledgement, flags, window, options, .. } = &mut f.transport {
                    edit(acknowledgement, flags, window, options);
                }
            });
        };
        change(|ack, _, _, _| *ack += 1);
        change(|_, flags, _, _| *flags |= ECE);
        change(|_, _, window, _| *window += 1);
        change(|_, _, _, options| options[11] = 9);
        change(|_, _, _, options| options.truncate(0));
    }
    for run in [tcp_run(false, 3), udp_run(false, 3)] {
        differs(run.clone(), |f| f.flags_offset = 0);
        differs(run.clone(), |f| f.flags_offset |= 0x8000);
        differs(run.clone(), |f| f.destination = "10.42.1.9".parse().unwrap());
        differs(run, |f| f.source = "10.42.2.9".parse().unwrap());
    }
    for run in [tcp_run(true, 3), udp_run(true, 3)] {
        differs(run.clone(), |f| f.flow_label += 1);
        differs(run, |f| f.source = "fd42:0:0:2::9".parse().unwrap());
    }
}

#[test]
fn an_urgent_pointer_without_the_flag_is_kept() {
    differs(tcp_run(false, 3), |f| {
        if let Transport::Tcp { urgent, .. } = &mut f.transport {
            *urgent = 5;
        }
    });
}

#[test]
fn packets_of_two_peers_are_kept_apart() {
    // both may send from their own address only, so that one flow from two peers is a fault: joined it must not be
    let mut node = Receiving::new(mesh(1));
    for (index, facts) in tcp_run(false, 2).into_iter().enumerate() {
        let from = 2 + index as u8;
        let facts = Facts { source: [10, 9, 0, from].into(), ..facts };
        node.push(&Buffer { source: [10, 9, 0, from].into(), ..Buffer::one(from, 1, &facts.bytes()) });
    }
    assert_eq!(node.flush().len(), 2);
}

#[test]
fn ids_count_up_or_stay_where_fragmentation_is_forbidden() {
    let with = |ids: &[u16], flags_offset: u16| -> Vec<u16> {
        let run = tcp_run(false, ids.len());
        let run: Vec<_> =
            run.into_iter().zip(ids).map(|(f, id)| Facts { id: *id, flags_offset, ..f }.bytes()).collect();
        deliver(&run).iter().map(|w| w.segments).collect()
    };
    for flags in [0, DF] {
        assert_eq!(with(&[7, 8, 9], flags), [3]);
        assert_eq!(with(&[7, 8, 10], flags), [2, 1]);
        assert_eq!(with(&[7, 9, 10], flags), [1, 2]);
        assert_eq!(with(&[7, 6, 5], flags), [1, 1, 1]);
        assert_eq!(with(&[7, 8, 8], flags), [2, 1]);
    }
    assert_eq!(with(&[7, 7, 7], DF), [3], "fixed, which an atomic packet's may be");
    assert_eq!(with(&[0, 0, 1, 1], DF), [2, 2]);
    assert_eq!(with(&[7, 7, 7], 0), [1, 1, 1], "a receiver could mix up the fragments of those");
}

#[test]
fn push_and_fin_end_a_super_packet() {
    for flag in [PSH, FIN, PSH | FIN] {
        let mut run = tcp_run(false, 5);
        run[1] = run[1].clone().with_flags(ACK | flag);
        assert_eq!(shape(&run), [2, 3], "{flag}");
        let mut run = tcp_run(false, 3);
        run[0] = run[0].clone().with_flags(ACK | flag);
        assert_eq!(shape(&run), [1, 2], "{flag}");
    }
}

#[test]
fn what_changes_the_connection_stays_alone() {
    for v6 in [false, true] {
        for flag in [CWR, SYN, RST, URG] {
            let mut run = tcp_run(v6, 5);
            run[2] = run[2].clone().with_flags(ACK | flag);
            assert_eq!(shape(&run), [2, 1, 2], "{flag}");
            let all: Vec<_> = tcp_run(v6, 3).into_iter().map(|f| f.with_flags(ACK | flag)).collect();
            assert_eq!(shape(&all), [1, 1, 1], "{flag}");
        }
        let all: Vec<_> = tcp_run(v6, 3).into_iter().map(|f| f.with_flags(0)).collect();
        assert_eq!(shape(&all), [1, 1, 1], "without ACK");
    }
}

#[test]
fn a_pure_acknowledgement_stays_alone_and_in_its_place() {
    let mut run = tcp_run(false, 4);
    run.insert(2, Facts { payload: Vec::new(), ..run[2].clone() });
    run[3].id += 1;
    run[4].id += 1;
    assert_eq!(shape(&run), [2, 1, 2]);
}

#[test]
fn a_short_segment_ends_and_a_longer_one_starts_anew() {
    for whole in [tcp(false, 2, 1, Vec::new()), udp(false, 2, 1, Vec::new()), udp(true, 2, 1, Vec::new())] {
        let lengths = [1000, 1000, 999, 999, 1000, 1000];
        let mut sent = 0;
        let run = (0..).zip(lengths).map(|(index, len)| {
            let facts = Facts { payload: payload(len), id: whole.id + index, ..whole.clone() }.with_sequence(sent);
            sent += len as u32;
            facts
        });
        assert_eq!(shape(&run.collect::<Vec<_>>()), [3, 1, 2]);
    }
}

#[test]
fn udp_without_checksum_stays_alone() {
    for v6 in [false, true] {
        let run: Vec<_> = udp_run(v6, 3).into_iter().map(|f| Facts { check: Check::Field([0, 0]), ..f }).collect();
        assert_eq!(shape(&run), [1, 1, 1]);
        let mut run = udp_run(v6, 5);
        run[2].check = Check::Field([0, 0]);
        assert_eq!(shape(&run), [2, 1, 2]);
    }
}

#[test]
fn udp_whose_length_lies_stays_alone() {
    let mut packets = bytes_of(&udp_run(false, 3));
    packets[1][25] ^= 1;
    let written = deliver(&packets);
    assert_eq!(written.into_iter().map(|w| w.packet).collect::<Vec<_>>(), packets);
}

#[test]
fn empty_datagrams_stay_alone() {
    let run: Vec<_> = (0..3).map(|id| Facts { id, ..udp(false, 2, 1, Vec::new()) }).collect();
    assert_eq!(shape(&run), [1, 1, 1]);
}

#[test]
fn a_corrupt_packet_is_never_joined_and_never_flagged() {
    for v6 in [false, true] {
        for run in [tcp_run(v6, 5), udp_run(v6, 5)] {
            for spoilt in 0..5 {
                let mut run = run.clone();
                run[spoilt].check = Check::Corrupt;
                let written = deliver(&bytes_of(&run));
                let alone = written.iter().find(|w| w.packet == run[spoilt].bytes()).unwrap();
                assert_eq!((alone.vnet, alone.segments), (VnetHdr::default(), 1));
                assert_eq!(written.iter().flat_map(cut).collect::<Vec<_>>(), bytes_of(&run), "nothing else changed");
            }
        }
    }
}

#[test]
fn a_packet_with_a_corrupt_ip_header_is_never_joined_and_never_flagged() {
    for run in [tcp_run(false, 3), udp_run(false, 3)] {
        for spoilt in 0..3 {
            let mut packets = bytes_of(&run);
            packets[spoilt][10] ^= 0x20;
            let written = deliver(&packets);
            let alone = written.iter().find(|w| w.packet == packets[spoilt]).unwrap();
            assert_eq!((alone.vnet, alone.segments), (VnetHdr::default(), 1));
            assert_eq!(written.iter().flat_map(cut).collect::<Vec<_>>(), packets);
        }
    }
}

#[test]
fn finished_and_unfinished_packets_are_one() {
    for run in [tcp_run(false, 4), udp_run(true, 4)] {
        let mut mixed = run.clone();
        mixed[2].check = Check::Pseudo;
        mixed[3].check = Check::Pseudo;
        let written = deliver(&bytes_of(&mixed));
        assert_eq!(written.iter().map(|w| w.segments).collect::<Vec<_>>(), [4]);
        assert_eq!(
            written.iter().flat_map(cut).collect::<Vec<_>>(),
            bytes_of(&run),
            "and all are right when they are cut"
        );
    }
}

#[test]
fn ip_options_and_extension_headers_stay_alone() {
    let run: Vec<_> = tcp_run(false, 3).into_iter().map(|f| Facts { options: vec![1; 4], ..f }).collect();
    assert_eq!(shape(&run), [1, 1, 1]);
    let extension = || vec![(60, vec![0, 1, 4, 0, 0, 0, 0])];
    let run: Vec<_> = udp_run(true, 3).into_iter().map(|f| Facts { extensions: extension(), ..f }).collect();
    assert_eq!(shape(&run), [1, 1, 1]);
}

#[test]
fn other_protocols_pass_alone() {
    let icmp = (0..3).map(|id| Facts { transport: Transport::Other(1), id, ..udp(false, 2, 1, payload(64)) });
    assert_eq!(shape(&icmp.collect::<Vec<_>>()), [1, 1, 1]);
}

#[test]
fn transport_headers_that_lie_pass_alone() {
    for words in [0, 4, 15] {
        let mut packets = bytes_of(&tcp(false, 2, 1, payload(40)).segments(20));
        for packet in &mut packets {
            packet[32] = words << 4;
        }
        let written = deliver(&packets);
        assert!(written.iter().all(|w| w.vnet == VnetHdr::default()));
        assert_eq!(written.into_iter().map(|w| w.packet).collect::<Vec<_>>(), packets);
    }
}

#[test]
fn interleaved_flows_are_each_joined() {
    let a = tcp_run(false, 3);
    let b: Vec<_> = udp_run(true, 3);
    let c: Vec<_> = tcp_run(false, 3).into_iter().map(|f| Facts { ports: (1, 2), ..f }).collect();
    let packets: Vec<_> = (0..3).flat_map(|i| [a[i].bytes(), b[i].bytes(), c[i].bytes()]).collect();
    let written = deliver(&packets);
    assert_eq!(written.iter().map(|w| w.segments).collect::<Vec<_>>(), [3, 3, 3]);
}

#[test]
fn nothing_overtakes_a_fragment() {
    let run = tcp_run(false, 4);
    let fragment = Facts { flags_offset: 0x2000, transport: Transport::Other(6), ..run[1].clone() };
    let order = [&run[0], &run[1], &fragment, &run[2], &run[3]].map(Facts::bytes);
    let written = deliver(&order);
    assert_eq!(written.iter().map(|w| w.segments).collect::<Vec<_>>(), [2, 1, 2]);
    assert_eq!(written.iter().flat_map(cut).collect::<Vec<_>>(), order);
}

#[test]
fn nothing_overtakes_an_uncut_super_packet() {
    for v6 in [false, true] {
        let one = Facts { check: Check::Pseudo, id: 0, ..udp(v6, 2, 1, payload(500)) };
        let many = Facts { payload: payload(5000), ..one.clone() };
        let last = Facts { payload: vec![1; 500], ..one.clone() };
        let mut node = Receiving::new(mesh(1));
        node.take(&one.bytes());
        node.push(&Buffer { segment_len: Some(500), ..Buffer::one(2, 1, &many.bytes()) });
        node.take(&last.bytes());
        let packets: Vec<_> = node.flush().into_iter().map(|w| w.packet).collect();
        assert_eq!(packets, [one.bytes(), many.bytes(), last.bytes()]);
    }
}

#[test]
fn the_next_batch_starts_anew() {
    let mut node = Receiving::new(mesh(1));
    for facts in tcp_run(false, 3) {
        node.take(&facts.bytes());
        assert_eq!(node.flush().iter().map(|w| w.packet.clone()).collect::<Vec<_>>(), [facts.bytes()]);
    }
}

#[test]
fn a_super_packet_has_at_most_65535_bytes() {
    for v6 in [false, true] {
        let whole = tcp(v6, 2, 1, payload(70 * 1000));
        let run: Vec<_> = whole.segments(1000);
        let written = deliver(&bytes_of(&run));
        let most = (65_535 - whole.header_len()) / 1000;
        assert_eq!(written.iter().map(|w| usize::from(w.segments)).collect::<Vec<_>>(), [most, 70 - most]);
        // to the byte
        let exact = 65_535 - whole.header_len();
        for (len, writes) in [(exact, 1), (exact + 1, 2)] {
            let run = tcp(v6, 2, 1, payload(len)).segments(1300);
            assert_eq!(deliver(&bytes_of(&run)).len(), writes, "{len}");
        }
    }
}

#[test]
fn a_udp_super_packet_has_at_most_64_datagrams() {
    let run = udp(false, 2, 1, payload(100 * 150)).segments(100);
    assert_eq!(shape(&run), [64, 64, 22]);
}

#[test]
fn a_tcp_super_packet_has_at_most_192_segments_that_were_cut() {
    let run = tcp(false, 2, 1, payload(100 * 200)).segments(100);
    assert_eq!(shape(&run), [192, 8]);
}

#[test]
fn an_id_that_stays_is_no_super_packets() {
    let base = tcp(false, 2, 1, Vec::new());
    let size = uncut_size(&base);
    let unfinished = |from: usize, len: usize, id: u16| {
        let facts = Facts { id, payload: payload(len), check: Check::Pseudo, ..base.clone() };
        Buffer::one(2, 1, &facts.with_sequence(1000 + from as u32).bytes())
    };
    // of a super-packet ids count up: what has its id again, or the first of them, does not follow
    for (ids, expected) in [([7, 8, 11], [5].as_slice()), ([7, 7, 10], &[1, 4]), ([7, 8, 8], &[4, 1])] {
        let mut node = Receiving::new(mesh(1));
        node.push(&unfinished(0, size, ids[0]));
        node.push(&unfinished(size, size * 3, ids[1]));
        node.push(&unfinished(size * 4, size, ids[2]));
        let written = node.flush();
        assert_eq!(written.iter().map(|w| w.segments).collect::<Vec<_>>(), expected, "{ids:?}");
    }
}

/// For node 1 itself.
fn to_itself(facts: Facts) -> Facts {
    Facts { destination: itself(facts.is_v6(), 1), ..facts }
}

/// A buffer with a super-packet that was never cut.
fn uncut(facts: &Facts) -> Buffer {
    Buffer::one(2, 1, &Facts { check: Check::Pseudo, ..facts.clone() }.bytes())
}

/// The payload bytes of a segment of the super-packets of [`uncut`].
fn uncut_size(facts: &Facts) -> usize {
    usize::from(MTU) - facts.header_len()
}

/// The same as [`deliver`] where it is known that the flows end at sockets of this node, or do not.
fn deliver_known(packets: &[Vec<u8>], ends_here: bool) -> Vec<Written> {
    let mut node = Receiving::new(mesh(1));
    node.ends_here = ends_here;
    packets.iter().for_each(|packet| node.take(packet));
    node.flush();
    packets.iter().for_each(|packet| node.take(packet));
    node.flush()
}

#[test]
fn for_the_node_itself_a_super_packet_may_be_longer_than_64_kib() {
    let whole = to_itself(tcp(false, 2, 1, payload(150_500)));
    assert_eq!(
        deliver(&bytes_of(&whole.segments(1000))).len(),
        3,
        "it is not known whether a socket has the connection"
    );
    assert_eq!(deliver_known(&bytes_of(&whole.segments(1000)), false).len(), 3, "and then that none has");
    let written = deliver_known(&bytes_of(&whole.segments(1000)), true);
    let expected = Facts { check: Check::Pseudo, ..whole.clone() };
    assert_eq!(written, [Written { vnet: whole.gso(1000), packet: expected.bytes(), segments: 151 }]);
    assert_eq!(written[0].packet[2..4], [0, 0], "the kernel takes the length of the packet");

    let most = (262_143 - whole.header_len()) / 1390;
    let run = to_itself(tcp(false, 2, 1, payload(1390 * 200))).segments(1390);
    let shape: Vec<_> = deliver_known(&bytes_of(&run), true).iter().map(|w| usize::from(w.segments)).collect();
    assert_eq!(shape, [most, 200 - most]);
}

#[test]
fn for_all_others_it_may_not() {
    let others = [
        tcp(false, 2, 1, payload(100_000)),
        tcp(true, 2, 1, payload(100_000)),
        to_itself(tcp(true, 2, 1, payload(100_000))),
    ];
    for whole in others {
        assert_eq!(deliver_known(&bytes_of(&whole.segments(1000)), true).len(), 2);
    }
    assert_eq!(deliver_known(&bytes_of(&to_itself(udp(false, 2, 1, payload(90_000))).segments(1400)), true).len(), 2);
    let mut node = Receiving::new(mesh(1));
    node.inbound().looked_at(true);
    for _ in 0..2 {
        bytes_of(&to_itself(tcp(false, 2, 1, payload(100_000))).segments(1000)).iter().for_each(|p| node.take(p));
        assert_eq!(node.flush().len(), 2);
    }
}

#[test]
fn for_the_node_itself_push_ends_nothing_but_fin_does() {
    for v6 in [false, true] {
        for (flag, expected) in [(PSH, &[5][..]), (FIN, &[2, 3]), (PSH | FIN, &[2, 3])] {
            let mut run: Vec<_> = tcp_run(v6, 5).into_iter().map(to_itself).collect();
            run[1] = run[1].clone().with_flags(ACK | flag);
            let written = deliver(&bytes_of(&run));
            assert_eq!(written.iter().map(|w| w.segments).collect::<Vec<_>>(), expected, "{flag}");
            let at = run[0].ip_len() + 13;
            assert_eq!(written[0].packet[at], ACK | flag, "what it asked for it asks for still");
        }
    }
}

#[test]
fn super_packets_that_were_never_cut_are_joined() {
    for (v6, here) in [(false, false), (false, true), (true, true)] {
        let base = tcp(v6, 2, 1, Vec::new());
        let base = if here { to_itself(base) } else { base };
        let size = uncut_size(&base);
        let whole = Facts { payload: payload(size * 9 + 17), ..base };
        // two super-packets, the second with a short end, then what follows it
        let parts = [(0, size * 4), (size * 4, size * 9 + 17)];
        let part = |(from, to): (usize, usize)| Facts {
            payload: whole.payload[from..to].to_vec(),
            id: whole.id + (from / size) as u16,
            ..whole.clone().with_sequence(1000 + from as u32)
        };
        let mut node = Receiving::new(mesh(1));
        parts.iter().for_each(|place| node.push(&uncut(&part(*place))));
        node.push(&Buffer::one(2, 1, &advance(&part(parts[1]), size * 5 + 17).bytes()));
        let written = node.flush();
        let expected = Facts { check: Check::Pseudo, ..whole.clone() };
        assert_eq!(written[0], Written { vnet: whole.gso(size as u16), packet: expected.bytes(), segments: 10 });
        assert_eq!(written.len(), 2, "nothing follows a short segment");
        assert_eq!(node.stats.sum(|w| w.flow.partial_csum_in.get()), 10);

        // a gap, another TTL, another id, a segment that was cut: all stay apart
        let follow = part(parts[1]);
        let mut others = vec![advance(&follow, 1), Facts { ttl: 63, ..follow.clone() }];
        others.extend((!v6).then(|| Facts { id: follow.id + 1, ..follow.clone() }));
        for (index, other) in others.iter().enumerate() {
            node.push(&uncut(&part(parts[0])));
            node.push(&uncut(other));
            assert_eq!(node.flush().len(), 2, "{index}");
        }
        node.push(&uncut(&part(parts[0])));
        node.push(&Buffer::one(2, 1, &part((size * 4, size * 5)).bytes()));
        assert_eq!(node.flush().len(), 1, "finished and unfinished");
    }
}

#[test]
fn a_device_takes_only_what_it_says() {
    for (accepts, writes) in
        [(ALL, [1, 1]), (Accepts { tso: true, uso: false }, [1, 3]), (Accepts { tso: false, uso: false }, [3, 3])]
    {
        for (run, writes) in [tcp_run(false, 3), udp_run(true, 3)].iter().zip(writes) {
            let mut node = Receiving::with(mesh(1), accepts);
            run.iter().for_each(|facts| node.take(&facts.bytes()));
            assert_eq!(node.flush().len(), writes, "{accepts:?}");
        }
    }
}

/// What happens next to one of a few flows.
#[derive(Debug, Clone)]
struct Event {
    flow: usize,
    len: usize,
    what: What,
    /// Goes into the buffer of the datagram before, where the kernel could have joined them.
    joined: bool,
    flush: bool,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Next,
    Gap,
    Repeat,
    Flags(u8),
    Tos(u8),
    Ttl(u8),
    Window(u16),
    Urgent(u16),
    Id(u16),
    Unfinished,
    Corrupt,
    NoChecksum,
    Fragment,
    Ack(u32),
}

fn event() -> impl Strategy<Value = Event> {
    let what = prop_oneof![
        20 => Just(What::Next),
        1 => Just(What::Gap),
        1 => Just(What::Repeat),
        2 => prop::sample::select(vec![PSH, FIN, PSH | FIN, CWR, ECE, SYN, RST, URG]).prop_map(What::Flags),
        1 => (0u8..4).prop_map(What::Tos),
        1 => (60u8..64).prop_map(What::Ttl),
        1 => (500u16..503).prop_map(What::Window),
        1 => (0u16..3).prop_map(What::Urgent),
        1 => any::<u16>().prop_map(What::Id),
        3 => Just(What::Unfinished),
        1 => Just(What::Corrupt),
        1 => Just(What::NoChecksum),
        1 => Just(What::Fragment),
        1 => (1u32..3).prop_map(What::Ack),
    ];
    let len = prop_oneof![6 => Just(500usize), 1 => Just(0usize), 1 => 1usize..1300];
    let flow = prop_oneof![3 => 0usize..3, 1 => 0usize..FLOWS];
    (flow, len, what, any::<bool>(), 0u8..30).prop_map(|(flow, len, what, joined, flush)| Event {
        flow,
        len,
        what,
        joined,
        flush: flush == 0,
    })
}

const FLOWS: usize = 8;

/// The flows: TCP and UDP, both families, ids that count up or stay; two of each four share their addresses.
fn flow(index: usize) -> Facts {
    let (v6, is_tcp) = (index & 1 == 1, index & 2 == 0);
    let base = if is_tcp { tcp(v6, 2, 1, Vec::new()) } else { udp(v6, 2, 1, Vec::new()) };
    Facts { ports: (index as u16, 80), flags_offset: if index >= 4 { DF } else { 0 }, ..base }
}

/// What a packet is told apart by: its flow, or for a fragment all flows of its addresses.
fn belongs(packet: &[u8], index: usize) -> bool {
    let v6 = packet[0] >> 4 == 6;
    if v6 != (index & 1 == 1) {
        return false;
    }
    let fragment = !v6 && u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
    let at = if v6 { 40 } else { 20 };
    fragment || packet[at..at + 2] == (index as u16).to_be_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// The heart of the matter: whatever comes, what the device is handed stands for exactly these packets, byte for
    /// byte and in order within each flow.
    #[test]
    fn cut_again_any_stream_is_what_came(events in proptest::collection::vec(event(), 1..150)) {
        let mut flows: Vec<Facts> = (0..FLOWS).map(flow).collect();
        let mut node = Receiving::new(mesh(1));
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        let mut corrupt = Vec::new();
        let mut waiting: Vec<Vec<u8>> = Vec::new();
        for Event { flow, len, what, joined, flush } in events {
            let state = &mut flows[flow];
            let mut facts = Facts { payload: payload(len), ..state.clone() };
            match what {
                What::Gap => facts = advance(&facts, 77),
                What::Repeat => facts = advance(&facts, 0_usize.wrapping_sub(len)),
                What::Flags(flags) => facts = facts.with_flags(ACK | flags),
                What::Tos(tos) => facts.tos = tos,
                What::Ttl(ttl) => facts.ttl = ttl,
                What::Id(id) => facts.id = id,
                What::Unfinished => facts.check = Check::Pseudo,
                What::Corrupt => facts.check = Check::Corrupt,
                What::NoChecksum if facts.transport == Transport::Udp => facts.check = Check::Field([0, 0]),
                What::Fragment if !facts.is_v6() => facts.flags_offset = 0x2000,
                _ => {}
            }
            if let Transport::Tcp { window, urgent, acknowledgement, .. } = &mut facts.transport {
                match what {
                    What::Window(new) => *window = new,
                    What::Urgent(new) => *urgent = new,
                    What::Ack(new) => *acknowledgement = new,
                    _ => {}
                }
            }
            let packet = facts.bytes();
            let finished = match facts.check {
                Check::Pseudo => Facts { check: Check::Right, ..facts.clone() }.bytes(),
                _ => packet.clone(),
            };
            if facts.check == Check::Corrupt {
                corrupt.push(packet.clone());
            }
            *state = advance(&Facts { flags_offset: state.flags_offset, tos: state.tos, ttl: state.ttl, check: Check::Right, ..facts.with_flags(ACK) }, len);
            state.id = state.id.wrapping_add(1);
            expected.push(finished);

            let fits = waiting.last().is_some_and(|last| {
                last.len() == waiting[0].len() && packet.len() <= last.len() && waiting.len() < 64
            });
            let alone = !(joined && fits);
            if alone && !waiting.is_empty() {
                node.push(&Buffer::joined(2, 1, &waiting));
                waiting.clear();
            }
            waiting.push(packet);
            if flush {
                node.push(&Buffer::joined(2, 1, &waiting));
                waiting.clear();
                got.extend(node.flush());
            }
        }
        if !waiting.is_empty() {
            node.push(&Buffer::joined(2, 1, &waiting));
        }
        got.extend(node.flush());
        for written in &got {
            let flagged = written.vnet != VnetHdr::default();
            prop_assert!(!(flagged && corrupt.contains(&written.packet)), "a corrupt packet was flagged");
        }
        let packets: Vec<Vec<u8>> = got.iter().flat_map(cut).collect();
        prop_assert_eq!(packets.len(), expected.len());
        for flow in 0..FLOWS {
            let of = |all: &[Vec<u8>]| all.iter().filter(|p| belongs(p, flow)).cloned().collect::<Vec<_>>();
            prop_assert_eq!(of(&packets), of(&expected), "flow {}", flow);
        }
    }

    /// For the node itself what is written cannot be cut again, but carries the same bytes at the same places of the stream.
    #[test]
    fn for_the_node_itself_a_stream_stays_what_it_was(
        parts in proptest::collection::vec((1usize..130_000, any::<bool>(), prop_oneof![3 => Just(0), 1 => Just(PSH), 1 => Just(FIN)], 0u8..8), 1..12),
        v6 in any::<bool>(),
    ) {
        let mut stream = to_itself(tcp(v6, 2, 1, Vec::new())).with_sequence(0xffff_0000);
        let size = uncut_size(&stream);
        let mut node = Receiving::new(mesh(1));
        let before = Facts { payload: payload(100_000), ..stream.clone() };
        before.segments(1000).iter().for_each(|segment| node.take(&segment.bytes()));
        node.flush();
        let mut expected: Vec<(u32, Vec<u8>)> = Vec::new();
        let mut packets = 0;
        for (len, cut, flag, gap) in parts {
            let len = if cut { len } else { len.min(60_000) };
            stream = advance(&stream, usize::from(gap == 0));
            let part = Facts { payload: payload(len), ..stream.clone().with_flags(ACK | flag) };
            let Transport::Tcp { sequence, .. } = part.transport else { unreachable!() };
            expected.push((sequence, part.payload.clone()));
            let segments = part.segments(size);
            packets += segments.len();
            if cut || segments.len() == 1 {
                segments.iter().for_each(|segment| node.take(&segment.bytes()));
            } else {
                node.push(&uncut(&part));
            }
            stream = Facts { id: stream.id.wrapping_add(segments.len() as u16), ..advance(&stream, len) };
        }
        let written = node.flush();
        let at = stream.ip_len();
        let got = written.iter().map(|Written { packet, .. }| {
            let sequence = u32::from_be_bytes(packet[at + 4..at + 8].try_into().unwrap());
            (sequence, packet[stream.header_len()..].to_vec())
        });
        prop_assert_eq!(runs(got), runs(expected.into_iter()));
        prop_assert_eq!(written.iter().map(|w| usize::from(w.segments)).sum::<usize>(), packets);
        let longest = if v6 { 65_535 } else { 262_143 };
        prop_assert!(written.iter().all(|w| w.packet.len() <= longest));
    }

    /// The other way round: a super-packet that was cut comes out as the same bytes, as one or, where limits or flags
    /// say so, a few.
    #[test]
    fn joined_again_a_super_packet_carries_the_same_bytes(
        (v6, is_tcp) in any::<(bool, bool)>(),
        // with 72 bytes of headers at most that fits the MTU of 1450
        size in 1usize..=1378,
        len in 1usize..60_000,
        alone in any::<bool>(),
    ) {
        let len = len.min(size * 60);
        let base = if is_tcp { tcp(v6, 1, 2, payload(len)) } else { udp(v6, 1, 2, payload(len)) };
        let whole = Facts { check: Check::Pseudo, ..base };
        let mut sender = Sending::new(mesh(1));
        sender.push(whole.gso(size as u16), &whole.bytes());
        let mut receiver = Receiving::new(mesh(2));
        for run in sender.flush().0 {
            let packets: Vec<_> = run.datagrams.iter().map(|d| d[22..].to_vec()).collect();
            if alone {
                packets.iter().for_each(|packet| receiver.push(&Buffer::one(1, 2, packet)));
            } else {
                receiver.push(&Buffer::joined(1, 2, &packets));
            }
        }
        let written = receiver.flush();
        prop_assert_eq!(written.len(), 1);
        if len > size {
            prop_assert_eq!(written[0].vnet, whole.gso(size as u16));
            prop_assert_eq!(&written[0].packet, &whole.bytes());
        } else {
            prop_assert_eq!(&written[0].packet, &Facts { check: Check::Right, ..whole }.bytes());
        }
    }
}

/// Parts of a stream with the numbers they start at, those that follow each other as one.
fn runs(parts: impl Iterator<Item = (u32, Vec<u8>)>) -> Vec<(u32, Vec<u8>)> {
    let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
    for (sequence, bytes) in parts {
        match runs.last_mut() {
            Some((from, run)) if from.wrapping_add(run.len() as u32) == sequence => run.extend(bytes),
            _ => runs.push((sequence, bytes)),
        }
    }
    runs
}

/// The flow `len` bytes further on.
fn advance(facts: &Facts, len: usize) -> Facts {
    match facts.transport {
        Transport::Tcp { sequence, .. } => facts.clone().with_sequence(sequence.wrapping_add(len as u32)),
        _ => facts.clone(),
    }
}
