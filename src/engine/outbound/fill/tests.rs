use proptest::prelude::*;
use zerocopy::FromBytes;

use crate::engine::tables::ENCAPSULATION;
use crate::engine::testing::*;
use crate::wire::checksum::Sum;
use crate::wire::ip::{self, Packet};
use crate::wire::transport::Tcp;
use crate::wire::transport::flags::{ACK, CWR, FIN, PSH, URG};
use crate::wire::vnet_hdr::{self, VnetHdr};

/// What one segment carries where the overlay's MTU is 1,450.
fn size(v6: bool) -> usize {
    if v6 { 1378 } else { 1398 }
}

/// A stream as its sender's TCP hands it out.
struct Stream {
    facts: Facts,
    sequence: u32,
}

impl Stream {
    fn new(v6: bool) -> Self {
        Stream { facts: Facts { check: Check::Pseudo, ..tcp(v6, 1, 2, Vec::new()) }, sequence: 1000 }
    }

    /// The next `len` bytes of it.
    fn next(&mut self, len: usize) -> Facts {
        let facts = Facts { payload: payload(len), ..self.facts.clone() }.with_sequence(self.sequence);
        let segments = len.div_ceil(size(facts.is_v6())).max(1);
        self.sequence = self.sequence.wrapping_add(len as u32);
        self.facts.id = self.facts.id.wrapping_add(segments as u16);
        facts
    }

    /// The next so many full segments of it.
    fn segments(&mut self, count: usize) -> Facts {
        self.next(count * size(self.facts.is_v6()))
    }
}

fn node() -> Sending {
    Sending::new(mesh(1)).cut_behind(true, true)
}

/// As TCP hands it to the device.
fn push(node: &mut Sending, facts: &Facts) {
    let size = size(facts.is_v6());
    let vnet = if facts.payload.len() > size { facts.gso(size as u16) } else { facts.needs_csum() };
    node.push(vnet, &facts.bytes());
}

/// The inner packets that leave, those of super-packets as they are cut on their way.
fn cut(runs: &[SentRun]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for run in runs {
        let inner = run.datagrams.iter().map(|datagram| datagram[ENCAPSULATION..].to_vec());
        let Some(how) = run.uncut else {
            packets.extend(inner);
            continue;
        };
        let kind = if how.v6 { vnet_hdr::GSO_TCPV6 } else { vnet_hdr::GSO_TCPV4 };
        let ecn = if how.cwr { vnet_hdr::GSO_ECN } else { 0 };
        let vnet = VnetHdr::super_packet(kind | ecn, how.header_len, how.size, how.transport, 16);
        let mut cutter = Sending::new(mesh_with_mtu(1, u16::MAX));
        inner.for_each(|packet| cutter.push(vnet, &packet));
        packets.extend(cutter.packets());
    }
    packets
}

/// A packet without what may differ: PSH, and the id of one that is not to be fragmented. Its checksums are right.
fn plain(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let facts = Packet::parse(&packet).unwrap();
    let (head, rest) = packet.split_at_mut(usize::from(facts.header_len));
    assert!(facts.pseudo_sum(rest.len() as u16).bytes(rest).is_valid());
    if !facts.is_v6() {
        assert!(Sum::default().bytes(head).is_valid());
        let (header, _) = ip::V4::mut_from_prefix(head).unwrap();
        (header.id, header.checksum) = (0.into(), [0; 2]);
    }
    if facts.protocol == ip::protocol::TCP {
        let (tcp, _) = Tcp::mut_from_prefix(rest).unwrap();
        (tcp.flags, tcp.checksum) = (tcp.flags & !PSH, [0; 2]);
    }
    packet
}

/// The packets that these stand for.
fn expected(facts: &[Facts]) -> Vec<Vec<u8>> {
    let cut = |facts: &Facts| Facts { check: Check::Right, ..facts.clone() }.segments(size(facts.is_v6()));
    facts.iter().flat_map(cut).map(|segment| plain(&segment.bytes())).collect()
}

/// How many segments each send carries.
fn shape(runs: &[SentRun]) -> Vec<usize> {
    let count = |run: &SentRun| match run.uncut {
        Some(_) => cut(std::slice::from_ref(run)).len(),
        None => run.datagrams.len(),
    };
    runs.iter().map(count).collect()
}

/// What becomes of a stream whose super-packets have so many segments.
fn filled(v6: bool, counts: &[usize]) -> Vec<usize> {
    let (mut stream, mut node) = (Stream::new(v6), node());
    let pushed: Vec<_> = counts.iter().map(|count| stream.segments(*count)).collect();
    pushed.iter().for_each(|facts| push(&mut node, facts));
    let (runs, _) = node.flush();
    let packets = cut(&runs);
    assert_eq!(packets.iter().map(|packet| plain(packet)).collect::<Vec<_>>(), expected(&pushed));
    let ids = packets.iter().map(|packet| u16::from_be_bytes([packet[4], packet[5]]));
    assert!(v6 || ids.eq((100..).take(packets.len())), "they count up, or nobody could join them again");
    assert_eq!(drops(&node.stats), []);
    shape(&runs)
}

#[test]
fn the_rest_of_a_write_goes_with_the_next() {
    for v6 in [false, true] {
        let full = 65_215 / size(v6);
        assert_eq!(filled(v6, &[full, full, 2, full, full, 2]), [full, full, full, full, 4]);
        assert_eq!(filled(v6, &[full, 1, full, full]), [full, full - 1, full, 2], "a single segment, too");
    }
}

#[test]
fn a_super_packet_may_begin_with_a_single_segment_where_others_had_left_before() {
    let (mut stream, mut node) = (Stream::new(false), node());
    let mut batch = |counts: &[usize]| {
        counts.iter().for_each(|count| push(&mut node, &stream.segments(*count)));
        let (runs, _) = node.flush();
        let uncut = runs.iter().map(|run| run.uncut.is_some()).collect::<Vec<_>>();
        (shape(&runs), uncut)
    };
    assert_eq!(batch(&[1, 46]), (vec![1, 46], vec![false, true]), "not before");
    assert_eq!(batch(&[1, 46]), (vec![45, 2], vec![true, true]));
    assert_eq!(batch(&[1]), (vec![1], vec![false]), "alone it is a datagram as any other");
}

#[test]
fn single_segments_alone_fill_runs_of_their_own() {
    let (mut stream, mut node) = (Stream::new(false), node());
    let mut batch = |counts: &[usize]| {
        counts.iter().for_each(|count| push(&mut node, &stream.segments(*count)));
        shape(&node.flush().0)
    };
    assert_eq!(batch(&[46, 46]), [46, 46], "so that a single one may begin another");
    let shape = batch(&[1; 60]);
    assert_eq!((shape.iter().sum::<usize>(), shape.len()), (60, 3), "{shape:?}");
    assert_eq!(batch(&[1; 60]), [44, 16], "it was no bulk traffic any more");
}

#[test]
fn a_checksum_that_is_to_go_elsewhere_is_none_of_tcp() {
    for (offset, joined) in [(16, true), (14, false)] {
        let (mut stream, mut node) = (Stream::new(false), node());
        push(&mut node, &stream.segments(2));
        let facts = stream.segments(1);
        node.push(VnetHdr::needs_csum(20, offset), &facts.bytes());
        assert_eq!(node.flush().0.len() == 1, joined);
    }
}

#[test]
fn what_is_left_over_is_never_a_single_segment() {
    assert_eq!(filled(false, &[6, 41]), [45, 2]);
    assert_eq!(filled(false, &[6, 40]), [46], "all of it fits");
    assert_eq!(filled(false, &[45, 2]), [45, 2], "room for one of two");
    assert_eq!(filled(false, &[45, 1]), [46]);
}

#[test]
fn full_ones_stay_as_they_are_behind_one_that_is_almost_full() {
    assert_eq!(filled(false, &[45, 46, 46]), [45, 46, 46]);
    assert_eq!(filled(false, &[34, 46, 46]), [46, 46, 34], "a quarter is worth it");
}

#[test]
fn a_short_end_and_too_many_pieces_end_it() {
    let (mut stream, mut node) = (Stream::new(false), node());
    for len in [2 * 1398, 500, 2 * 1398] {
        push(&mut node, &stream.next(len));
    }
    assert_eq!(shape(&node.flush().0), [3, 2]);
    assert_eq!(filled(false, &[2; 9]), [14, 4]);
}

#[test]
fn what_was_asked_to_be_delivered_still_is() {
    let (mut stream, mut node) = (Stream::new(false), node());
    push(&mut node, &stream.segments(2));
    push(&mut node, &stream.segments(2).with_flags(ACK | PSH));
    let (runs, _) = node.flush();
    let flags: Vec<_> = cut(&runs).iter().map(|packet| packet[33]).collect();
    assert_eq!((shape(&runs), flags), (vec![4], vec![ACK, ACK, ACK, ACK | PSH]));
}

#[test]
fn only_what_could_be_one_becomes_one() {
    for v6 in [false, true] {
        let joins = |change: &dyn Fn(&mut Facts)| {
            let (mut stream, mut node) = (Stream::new(v6), node());
            push(&mut node, &stream.segments(2));
            let mut next = stream.segments(2);
            change(&mut next);
            push(&mut node, &next);
            node.flush().0.len() == 1
        };
        assert!(joins(&|_| {}), "the positive control");
        assert!(!joins(&|facts| *facts = facts.clone().with_sequence(1001 + 2 * size(v6) as u32)), "a gap");
        assert!(!joins(&|facts| facts.tos = 2));
        assert!(!joins(&|facts| facts.ttl = 63));
        for flag in [FIN, CWR, URG] {
            assert!(!joins(&|facts| *facts = facts.clone().with_flags(ACK | flag)), "{flag:#x}");
        }
        let tcp = |facts: &mut Facts, number: usize| {
            let Transport::Tcp { acknowledgement, window, options, .. } = &mut facts.transport else { return };
            match number {
                0 => *acknowledgement += 1,
                1 => *window += 1,
                _ => options[7] += 1,
            }
        };
        for number in 0..3 {
            assert!(!joins(&|facts| tcp(facts, number)), "{number}");
        }
    }
    // where the second alone may not be joined because of its IP header, it is the same for both
    let alike = |change: &dyn Fn(&mut Facts)| {
        let mut stream = Stream::new(false);
        change(&mut stream.facts);
        let mut node = node();
        (0..2).for_each(|_| push(&mut node, &stream.segments(2)));
        node.flush().0.len() == 1
    };
    assert!(alike(&|_| {}), "the positive control");
    assert!(!alike(&|facts| facts.flags_offset = 0), "ids count where fragments may be made");
}

#[test]
fn ip_options_are_left_alone() {
    // 1,450 with eight bytes of options
    let (mut node, mut at) = (node(), 0);
    for _ in 0..2 {
        let options = Facts { options: vec![1; 8], check: Check::Pseudo, ..tcp(false, 1, 2, payload(2 * 1390)) };
        let facts = options.with_sequence(1000 + at);
        node.push(facts.gso(1390), &facts.bytes());
        at += 2 * 1390;
    }
    assert_eq!(node.flush().0.len(), 2);
}

#[test]
fn another_flow_with_the_same_key_keeps_its_place() {
    let (mut one, mut node) = (Stream::new(false), node());
    let mut other = Stream::new(false);
    let socket = |ports| {
        let mut node = Sending::new(mesh(1));
        node.push(VnetHdr::default(), &Facts { ports, ..tcp(false, 1, 2, Vec::new()) }.bytes());
        node.flush().0[0].socket
    };
    let ours = socket(one.facts.ports);
    other.facts.ports = (40_001..).map(|port| (port, 5201)).find(|ports| socket(*ports) == ours).unwrap();
    push(&mut node, &one.segments(2));
    push(&mut node, &other.segments(2));
    push(&mut node, &one.segments(2));
    assert_eq!(shape(&node.flush().0), [2, 2, 2]);
}

#[test]
fn what_is_short_waits_while_more_follows() {
    let (mut stream, mut node) = (Stream::new(false), node());
    let mut round = |counts: &[usize], more: bool| {
        counts.iter().for_each(|count| push(&mut node, &stream.segments(*count)));
        if more {
            node.outbound().more_follows();
        }
        shape(&node.flush().0)
    };
    assert_eq!(round(&[46, 2], true), [46]);
    assert_eq!(round(&[46, 46], true), [46, 46]);
    assert_eq!(round(&[], true), [2], "it waits for what comes next alone");
    assert_eq!(round(&[46, 2], false), [46, 2], "nothing follows");
    assert_eq!(round(&[40], true), [40], "almost full");
}

#[derive(Debug, Clone)]
struct Event {
    flow: usize,
    len: usize,
    what: What,
    more: bool,
    flush: bool,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Next,
    Push,
    Gap,
    Window,
    Cwr,
    Datagram,
}

fn event() -> impl Strategy<Value = Event> {
    let what = prop_oneof![
        12 => Just(What::Next),
        4 => Just(What::Push),
        1 => Just(What::Gap),
        1 => Just(What::Window),
        1 => Just(What::Cwr),
        2 => Just(What::Datagram),
    ];
    let len = prop_oneof![
        4 => Just(46 * 1398),
        4 => (1..46_usize).prop_map(|count| count * 1398),
        3 => Just(1398),
        2 => 1..65_000_usize,
    ];
    let event = (0..4_usize, len, what, prop::bool::ANY, prop::bool::weighted(0.3));
    event.prop_map(|(flow, len, what, more, flush)| Event { flow, len, what, more, flush })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Few ports, so that flows share keys; some of them are cut here, since their peer's underlay is not cut behind.
    #[test]
    fn each_flow_is_what_it_was(events in proptest::collection::vec(event(), 1..80), v4: bool) {
        let mut node = Sending::new(mesh(1)).cut_behind(v4, false);
        let mut flows: Vec<Stream> = (0..4).map(|_| Stream::new(false)).collect();
        flows.iter_mut().zip(40_000..).for_each(|(flow, port)| flow.facts.ports.0 = port);
        flows[0].sequence = u32::MAX - 50_000;
        let (mut pushed, mut sent) = (vec![Vec::new(); 8], vec![Vec::new(); 8]);
        for Event { flow, len, what, more, flush } in events {
            let stream = &mut flows[flow];
            if let (What::Window, Transport::Tcp { window, .. }) = (what, &mut stream.facts.transport) {
                *window += 1;
            }
            if let What::Gap = what {
                stream.sequence = stream.sequence.wrapping_add(77);
            }
            let mut facts = match what {
                What::Datagram => Facts { ports: stream.facts.ports, ..udp(false, 1, 2, payload(1 + len % 1300)) },
                _ => stream.next(len),
            };
            match what {
                What::Push => facts = facts.with_flags(ACK | PSH),
                What::Cwr => facts = facts.with_flags(ACK | CWR),
                _ => {}
            }
            if let What::Datagram = what {
                node.push(VnetHdr::default(), &facts.bytes());
                pushed[4 + flow].push(facts);
            } else {
                push(&mut node, &facts);
                pushed[flow].push(facts);
            }
            if more {
                node.outbound().more_follows();
            }
            if flush {
                collect(&node.flush().0, &mut sent);
            }
        }
        // what was set aside in the first is sent in the second
        (0..2).for_each(|_| collect(&node.flush().0, &mut sent));
        for (pushed, sent) in pushed.iter().zip(&sent) {
            prop_assert!(expected(pushed) == *sent);
        }
        prop_assert_eq!(drops(&node.stats), []);
    }
}

/// Adds what is sent to its flow, known by its source port: TCP, and behind that UDP.
fn collect(runs: &[SentRun], sent: &mut [Vec<Vec<u8>>]) {
    for run in runs {
        assert!(run.uncut.is_none() || run.datagrams[0].len() <= 65_507);
        let packets = cut(std::slice::from_ref(run));
        assert!(run.uncut.is_none() || packets.len() > 1);
        for packet in packets {
            let port = u16::from_be_bytes([packet[20], packet[21]]);
            let udp = packet[9] == ip::protocol::UDP;
            sent[usize::from(port - 40_000) + 4 * usize::from(udp)].push(plain(&packet));
        }
    }
}
