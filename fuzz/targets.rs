//! What the fuzz targets do with an input. The programs in `fuzz_targets/` and `tests/corpus.rs` share this file, so that
//! every input that was ever interesting is tried again by a plain `cargo test`.
//!
//! The engine is not only asked not to panic: what comes out is held against the simulation's reference model.

#![allow(dead_code, reason = "each fuzz program runs one of the targets")]

#[path = "../tests/sim/model.rs"]
mod model;
#[path = "../tests/reference/mod.rs"]
mod reference;

use std::net::IpAddr;
use std::sync::Arc;

use meshd::admin::protocol::{Answer, Request};
use meshd::config::{Config, Sources};
use meshd::control::nodes_file;
use meshd::engine::big_tcp::BigTcp;
use meshd::engine::coalesce::Accepts;
use meshd::engine::drop::{Direction, Drop};
use meshd::engine::inbound::{Inbound, Received};
use meshd::engine::outbound::{CutBehind, HEADROOM, Outbound, Sent};
use meshd::engine::stats::{PeerStats, Stats};
use meshd::engine::tables::{ENCAPSULATION, Local, PeerSpec, Tables};
use meshd::engine::testing;
use meshd::engine::tunnel::Policy;
use meshd::engine::tx_batch::Piece;
use meshd::health::machine::Timers;
use meshd::health::path::Bounds;
use meshd::health::peer::{Liveness, Moment, Settings, Verdict};
use meshd::node::{Mac, NodeName, Vni};
use meshd::wire::bfd;
use meshd::wire::checksum::Sum;
use meshd::wire::echo::Echo;
use meshd::wire::icmp;
use meshd::wire::ip::Packet;
use meshd::wire::vnet_hdr;
use model::{Fate, Peer, View};
use reference::{ACK, Head, TCP, TcpHead, VNET, be16, look};

/// The target of that name.
pub(crate) fn target(name: &str) -> Option<fn(&[u8])> {
    Some(match name {
        "wire" => wire,
        "outbound" => outbound,
        "inbound" => inbound,
        "round_trip" => round_trip,
        "tunnel" => tunnel,
        "bfd" => session,
        "config" => config,
        "nodes_file" => nodes_file,
        "admin" => admin,
        _ => return None,
    })
}

pub(crate) const TARGETS: [&str; 9] =
    ["wire", "outbound", "inbound", "round_trip", "tunnel", "bfd", "config", "nodes_file", "admin"];

/// The parsers, each against the one that was written by the book.
pub(crate) fn wire(data: &[u8]) {
    for v6 in [false, true] {
        icmp::read_too_big(data, v6);
    }
    let keys = bfd::auth::Keys::parse("7 correct-horse\nnone\n").expect("keys");
    for keys in [None, Some(&keys)] {
        bfd_packet(data, keys);
    }
    let (parsed, seen) = (Packet::parse(data), look(data));
    assert_eq!(parsed.is_ok(), seen.is_some(), "{parsed:?} {seen:?}");
    assert_eq!(Sum::default().bytes(data).fold(), reference::sum(&[data]).to_be_bytes());
    let (Ok(packet), Some(seen)) = (parsed, seen) else { return };
    assert_eq!((packet.source, packet.destination), (seen.source, seen.destination));
    assert_eq!((usize::from(packet.total_len), usize::from(packet.header_len)), (seen.total, seen.l4));
    let facts = (packet.protocol, packet.tos, packet.fragment, packet.is_v6());
    assert_eq!(facts, (seen.protocol, seen.tos, seen.fragment, seen.v6));
    let mut out = [0; icmp::MAX_LEN];
    if let Some(len) = icmp::too_big(&packet, data, 1280, &mut out) {
        let answer = look(&out[..len]).expect("an answer is a packet");
        assert_eq!((answer.total, answer.destination), (len, seen.source));
    }
}

/// What was read is written as it was. The first key is the one that is sent by.
fn bfd_packet(data: &[u8], keys: Option<&bfd::auth::Keys>) {
    let Ok((_, message)) = bfd::read_packet(data, keys).or_else(|_| bfd::read_frame(data, keys)) else { return };
    let (source, destination) = ([10, 9, 0, 1].into(), [10, 9, 0, 2].into());
    let mut again = Vec::new();
    bfd::write_packet(&message, bfd::Ends { source, destination, source_port: 50_000 }, keys, &mut again);
    let read = bfd::read_packet(&again, keys);
    let same = match (&message, &read) {
        (bfd::Message::Echo(a, _), Ok((_, bfd::Message::Echo(b, _)))) => a == b,
        _ => read == Ok((destination, message)),
    };
    assert!(same, "{data:02x?}");
}

/// A peer's liveness, which hears whatever anybody says: `OP WAIT BYTES`, where OP says how much of a packet is put right.
/// Timers go on, what is sent is bounded, and an honest peer is up with it soon after.
pub(crate) fn session(data: &[u8]) {
    const MS: u64 = 1_000;
    let timers = Timers { interval_us: 150_000, multiplier: 6 };
    let settings = Settings { enabled: true, timers, vni: 4095, epoch: 1 };
    let keys = bfd::auth::Keys::parse("7 correct-horse\n").expect("keys");
    let (mut now_us, mut rest) = (1_000 * MS, data);
    let (ours, theirs) = (Liveness::new(settings, 7), Liveness::new(settings, 9));
    ours.set_neighbour(true);
    ours.look(now_us, 0);
    let bounds = Bounds { min: 526, base: 1230, max: 1450, overhead: 50 };
    let turn = |of: &Liveness, now_us: u64, said: &mut Vec<bfd::Message>| {
        let moment = Moment { now_us, settled_us: Some(now_us), last_seen_us: None };
        let next = of.turn(moment, bounds, 2, || 0, |message, _| said.push(message.clone()));
        of.answers(|message| said.push(message.clone()));
        assert!(next.is_none_or(|next| next > now_us), "{next:?} at {now_us}");
    };
    while let Some(([op, wait, a, b, c], behind)) = rest.split_first_chunk() {
        rest = behind;
        now_us += u64::from(*wait) * if op & 1 == 1 { 20 * MS } else { MS };
        let mut bytes = [0; bfd::SEALED_LEN];
        let take = rest.len().min(bfd::LEN);
        bytes[..take].copy_from_slice(&rest[..take]);
        rest = &rest[take..];
        let mut len = bfd::LEN;
        if op & 2 == 2 {
            bytes[0] = 0x20 | a & 0x1f;
            bytes[1] = b & 0xfa;
            bytes[2] = bytes[2].max(1);
            bytes[3] = bfd::LEN as u8;
            bytes[7] |= 1;
            if op & 4 == 4 {
                bytes[8..12].copy_from_slice(&7u32.to_be_bytes());
            }
        }
        let known = (op & 8 == 8).then_some(&keys);
        if let (true, Ok(control)) = (known.is_some(), bfd::Control::parse(&bytes[..len], None)) {
            let sequence = Some(bfd::auth::Sequence { number: u32::from(*c), meticulous: c & 1 == 1 });
            (bytes, len) = bfd::Control { sequence, ..control }.sealed_bytes(known);
        }
        let mut said = Vec::new();
        match bfd::Control::parse(&bytes[..len], known) {
            Ok(control) => _ = ours.heard(0, now_us, &control),
            Err(_) => {
                ours.heard_echo(now_us, &Echo { answer: c & 1 == 1, yours: 7, number: u64::from(*c), size: 9 }, 60)
            }
        }
        turn(&ours, now_us, &mut said);
        assert!(said.len() <= 16, "{said:?}");
    }
    // an honest one, on a network that does not lose; numbers are not at stake, since a key's holder is trusted with those
    let unnumbered = |message: &bfd::Message| match message {
        bfd::Message::Control(control) => Some(bfd::Control { sequence: None, ..*control }),
        _ => None,
    };
    theirs.set_neighbour(true);
    theirs.look(now_us, 0);
    for _ in 0..6_000 {
        now_us += MS;
        for (from, to) in [(&ours, &theirs), (&theirs, &ours)] {
            let mut said = Vec::new();
            turn(from, now_us, &mut said);
            said.iter().filter_map(unnumbered).for_each(|control| assert!(to.heard(0, now_us, &control)));
        }
    }
    assert_eq!((ours.verdict(), theirs.verdict()), (Verdict::Up, Verdict::Up));
}

/// Frames out of a TUN device: `CONTROL LENGTH LENGTH BYTES…`, where CONTROL says how much of a frame is put right, so
/// that the fuzzer gets past the gates without guessing addresses.
pub(crate) fn outbound(data: &[u8]) {
    let Some((&mtu, mut rest)) = data.split_first() else { return };
    let mut mesh = Mesh::new([1450, 1280, 576, 9000][usize::from(mtu & 3)], mtu);
    let mut frames = Vec::new();
    while let Some(([control, hi, lo], behind)) = rest.split_first_chunk().filter(|_| frames.len() < 16) {
        let len = usize::from(u16::from_be_bytes([*hi, *lo])).min(behind.len());
        let (frame, behind) = behind.split_at(len);
        rest = behind;
        let mut frame = frame.to_vec();
        if control & 1 == 1 {
            mend(frame.get_mut(VNET..).unwrap_or_default(), mesh.own(), mesh.others(), control & 2 == 2);
        }
        frames.push(frame);
    }
    mesh.send(&frames);
}

/// Datagrams: `ACCEPTS (CONTROL TOS SEGMENT SEGMENT LENGTH LENGTH BYTES…)…`.
pub(crate) fn inbound(data: &[u8]) {
    let Some((&accepts, mut rest)) = data.split_first() else { return };
    let mut mesh = Mesh::new(1450, accepts);
    let mut buffers = Vec::new();
    while let Some(([control, tos, s1, s2, hi, lo], behind)) = rest.split_first_chunk().filter(|_| buffers.len() < 32) {
        let len = usize::from(u16::from_be_bytes([*hi, *lo])).min(behind.len());
        let (bytes, behind) = behind.split_at(len);
        rest = behind;
        let mut bytes = bytes.to_vec();
        if control & 1 == 1 {
            mend(&mut bytes, mesh.others(), mesh.own(), control & 2 == 2);
            let v6 = bytes.first().is_some_and(|byte| byte >> 4 == 6);
            let mut whole = mesh.header_to_us(v6);
            whole.append(&mut bytes);
            bytes = whole;
        }
        let segment = u16::from_be_bytes([*s1, *s2]);
        let segment_len = (segment > 0 && control & 4 == 4).then_some(segment);
        let from = if control & 8 == 8 { "192.0.2.9" } else { "10.9.0.2" }.parse().unwrap();
        buffers.push((from, *tos, segment_len, control & 0x70 == 0x70, bytes));
    }
    mesh.receive(&buffers);
}

/// A stream of one flow: cut by the sender, joined by the receiver, cut again. Ten bytes describe a packet.
pub(crate) fn round_trip(data: &[u8]) {
    let Some(([kind, mss, split], rest)) = data.split_first_chunk() else { return };
    let v6 = kind & 1 == 1;
    let protocol = if kind & 2 == 2 { 17 } else { TCP };
    let mut sender = Mesh::new(1450, 0xff);
    let mut receiver = Mesh::mirror(&sender, kind >> 2);
    let [from, to] = [sender.own(), sender.others()].map(|(v4, six)| if v6 { six } else { v4 });
    let mut head = Head::new(from, to);
    let options = if kind & 0x80 == 0 { vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2] } else { Vec::new() };
    let mut tcp = TcpHead { ports: (40_000, 5201), sequence: u32::MAX - 3000, ack: 1, flags: ACK, window: 99, options };
    let mut frames = Vec::new();
    let pattern: Vec<u8> = (0..6_000).map(|i| i as u8).collect();
    let mut budget = 400;
    for [change, size_hi, size_lo, flags, tos, ttl, gap, fill, id, frag] in rest.as_chunks().0.iter().take(40) {
        let room = 1450 - 20 - if v6 { 40 } else { 20 } - tcp.options.len();
        let size = usize::from(u16::from_be_bytes([*size_hi, *size_lo]));
        let step = (usize::from(*mss) * 6 + 1).min(room);
        tcp.flags = if change & 1 == 1 { *flags } else { ACK | flags & 8 };
        head.tos = if change & 2 == 2 { *tos } else { 0 };
        head.ttl = if change & 4 == 4 { *ttl } else { 64 };
        head.frag = if *frag & 1 == 1 { 0 } else { 0x4000 };
        if change & 8 == 8 {
            tcp.sequence = tcp.sequence.wrapping_add(u32::from(*gap));
        }
        if change & 16 == 16 {
            head.id = head.id.wrapping_add(u16::from(*id));
        }
        let cut = change & 0x60 == 0x60;
        // up to more segments than one send takes, and no more packets than are judged in half a millisecond
        let len = if cut { size % 5_000.min(step * 80) } else { size.min(step) };
        budget -= len.div_ceil(step) as i32 * 4 + len as i32 / 256;
        if budget < 0 {
            break;
        }
        let payload = &pattern[usize::from(*fill)..][..len];
        let body = if protocol == TCP { tcp.bytes(payload) } else { reference::udp_bytes((7, 8), payload) };
        let mut packet = head.packet(protocol, &body);
        if protocol == TCP && change & 0x80 == 0x80 {
            let urgent = look(&packet).unwrap().l4 + 19;
            packet[urgent] = *gap; // an urgent pointer that means nothing
        }
        if cut && len > 0 {
            frames.push(reference::super_frame(&mut packet, step, tcp.flags & 0x80 != 0));
            head.id = head.id.wrapping_add(len.div_ceil(step) as u16);
        } else {
            reference::finish_l4(&mut packet);
            frames.push(reference::plain_frame(&packet));
            head.id = head.id.wrapping_add(u16::from(*frag & 2 == 0));
        }
        tcp.sequence = tcp.sequence.wrapping_add(len as u32);
    }
    let first = sender.send(&frames);
    let split = usize::from(*split).max(1);
    let (tos, from) = (0, "10.9.0.1".parse().unwrap());
    let mut joined = Vec::new();
    for batch in first.chunks(split) {
        let buffers: Vec<_> = batch.iter().map(|datagram| (from, tos, None, false, datagram.clone())).collect();
        joined.extend(receiver.receive(&buffers));
    }
    let second = sender.send(&joined);
    assert_eq!(first.len(), second.len());
    for (a, b) in first.iter().zip(&second) {
        let plain = |datagram: &[u8]| {
            let mut packet = datagram[22..].to_vec();
            if !v6 && be16(&packet, 6) == 0x4000 {
                packet[4..6].fill(0); // RFC 6864 §4.1: an atomic packet's id has no meaning
                reference::finish_ip(&mut packet);
            }
            packet
        };
        assert_eq!(plain(a), plain(b));
    }
}

/// Datagrams of a peer with a session, whole, damaged, replayed or made up: only what the peer sealed comes out, each once.
pub(crate) fn tunnel(data: &[u8]) {
    let [a, b] = [1, 2].map(|node| testing::encrypted_mesh(node, 1, Policy::Required));
    testing::connect(&a, &b);
    let to_b = a.source([10, 9, 0, 2].into()).unwrap();
    let stats = Stats::new(1);
    let mut inbound = Inbound::new(stats.clone(), 0, Accepts { tso: true, uso: true });
    let mut last: Vec<u8> = Vec::new();
    let mut rest = data;
    for number in 0..64u16 {
        let [op, x, y, behind @ ..] = rest else { break };
        rest = behind;
        let facts = testing::Facts { ports: (number, 7), ..testing::udp(false, 1, 2, vec![*x; usize::from(*y)]) };
        let packet = facts.bytes();
        if op % 6 == 5 {
            // another session, or one that comes to nothing since a byte was changed
            let damage = (x & 1 == 1).then_some(usize::from(*y));
            another_session([&a, &b], u64::from(number + 1) * 100_000, damage);
            last.clear();
            continue;
        }
        let mut sealed = Vec::new();
        a.tunnel(to_b).unwrap().lane(to_b, 0).seal(&packet, &mut sealed).unwrap();
        let mut expected = 0;
        let (bytes, port) = match op % 6 {
            0 => {
                expected = 1;
                last.clone_from(&sealed);
                (sealed, 8472)
            }
            1 => {
                let at = usize::from(u16::from_be_bytes([*x, *y])) % sealed.len();
                sealed[at] ^= (op >> 3).max(1);
                (sealed, 8472)
            }
            2 => (last.clone(), 8472),
            3 => {
                // the head of a real message, and whatever the input has behind it
                let (body, behind) = rest.split_at(usize::from(*y).min(rest.len()));
                rest = behind;
                (sealed[..16].iter().chain(body).copied().collect(), 9)
            }
            _ => {
                let (body, behind) = rest.split_at(usize::from(*y).min(rest.len()));
                rest = behind;
                ([x % 8, 0, 0, 0].iter().chain(body).copied().collect(), 9)
            }
        };
        let mut arena = bytes;
        let received = Received {
            at: 0,
            len: arena.len(),
            segment_len: (op & 0x80 != 0).then_some(u16::from(*y) + 1),
            source: ([10, 9, 0, 1], port).into(),
            tos: 0,
            truncated: false,
        };
        let joined = received.segment_len.is_some_and(|size| usize::from(size) < received.len);
        if joined {
            last.clear(); // cut apart it did not come
        }
        inbound.push(&b, 0, &mut arena, received);
        inbound.finish(&mut arena);
        let units = inbound.units();
        assert!(units.len() <= expected || joined, "operation {op}");
        assert!(units.len() == expected || joined, "operation {op}: the peer's own packet is lost");
        for unit in units {
            let bytes: Vec<u8> =
                unit.pieces().iter().flat_map(|piece| piece.of(&arena, inbound.slab()).to_vec()).collect();
            assert_eq!(bytes[VNET..], packet);
            inbound.written(unit, true);
        }
        inbound.clear();
        inbound.outbox().clear();
        testing::assert_conserved(&stats);
    }
}

/// A handshake of a with b. Where a byte of the initiation is damaged, b does not answer.
fn another_session([a, b]: [&Tables; 2], now_ms: u64, damage: Option<usize>) {
    let to_b = a.source([10, 9, 0, 2].into()).unwrap();
    let mut outbox = meshd::engine::tunnel::Outbox::default();
    a.tunnel(to_b).unwrap().lane(to_b, 0).start(now_ms, 8, &mut outbox);
    let mut message: Vec<u8> = outbox.letters().flat_map(|(_, bytes)| bytes.to_vec()).collect();
    assert_eq!(message.len(), 148);
    if let Some(at) = damage {
        message[at % 148] ^= 1;
    }
    // the code that proves an address is looked at under load alone
    let counts = damage.is_none_or(|at| at % 148 >= 132);
    for (tables, from, len) in [(b, 1, 92), (a, 2, 32), (b, 1, 0)] {
        let mut inbound = Inbound::new(Stats::new(1), 0, Accepts { tso: true, uso: true });
        let source = ([10, 9, 0, from], 8472).into();
        let received = Received { at: 0, len: message.len(), segment_len: None, source, tos: 0, truncated: false };
        inbound.push(tables, now_ms, &mut message, received);
        message = inbound.outbox().letters().flat_map(|(_, bytes)| bytes.to_vec()).collect();
        assert_eq!(message.len(), if counts { len } else { 0 });
        if message.is_empty() {
            return;
        }
    }
}

/// A configuration file.
pub(crate) fn config(data: &[u8]) {
    let file = Some(("fuzz.yaml".into(), data.to_vec()));
    match Config::parse(&Sources { file, hostname: "fuzz".to_owned(), ..Sources::default() }) {
        Ok(config) => {
            let same = config.live_changes(&config);
            assert!(same.live.is_empty() && same.restart.is_empty());
        }
        Err(error) => assert!(!error.to_string().is_empty() && error.to_string().len() < 4096, "{error}"),
    }
}

/// A node list.
pub(crate) fn nodes_file(data: &[u8]) {
    match nodes_file::parse(data, 8472.try_into().unwrap()) {
        Ok(list) => {
            assert!(list.nodes.windows(2).all(|pair| pair[0].name < pair[1].name));
            let subnets: Vec<_> = list.nodes.iter().flat_map(|node| &node.subnets).collect();
            let apart = |a: &ipnet::IpNet, b: &ipnet::IpNet| !a.contains(b) && !b.contains(a);
            for (at, subnet) in subnets.iter().enumerate().take(50) {
                assert!(subnets[..at].iter().all(|other| apart(subnet, other)));
            }
            assert!(list.nodes.iter().all(|node| !node.underlay.is_empty()));
        }
        Err(error) => assert!(!error.to_string().is_empty() && error.to_string().len() < 4096, "{error}"),
    }
}

/// A request to the admin socket, and the same bytes as an answer.
pub(crate) fn admin(data: &[u8]) {
    match Request::from_line(data) {
        Ok(request) => {
            let line = request.to_line().expect("a request can be written");
            assert_eq!(Request::from_line(line.as_bytes()), Ok(request));
        }
        Err(error) => assert!(error.message.len() < 1024, "{}", error.message),
    }
    _ = serde_json::from_slice::<Answer<serde_json::Value>>(data);
}

/// The datagram without what may differ where segments fill up the super-packet before: PSH, and the id of a packet that is not to be
/// fragmented. Where the checksums are right they are right for that.
fn without_push_and_id(datagram: &[u8]) -> Vec<u8> {
    let (header, packet) = datagram.split_at(ENCAPSULATION);
    let mut packet = reference::without_push(packet.to_vec());
    let seen = look(&packet).filter(|seen| seen.protocol == TCP && packet[0] >> 4 == 4 && packet[6] & 0x40 != 0);
    if seen.is_some() {
        packet[4..6].fill(0);
        reference::finish_ip(&mut packet);
    }
    [header, &packet].concat()
}

/// Puts addresses right, and the checksums where `deep`.
fn mend(packet: &mut [u8], source: (IpAddr, IpAddr), destination: (IpAddr, IpAddr), deep: bool) {
    let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let (from, to) = if v6 { (source.1, destination.1) } else { (source.0, destination.0) };
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let bytes = [octets(from), octets(to)].concat();
    let at = if v6 { 8 } else { 12 };
    if let Some(place) = packet.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(&bytes);
    }
    let fits = |seen: &reference::Look| !seen.fragment && matches!(seen.protocol, 6 | 17) && seen.total >= seen.l4 + 18;
    if deep && look(packet).is_some_and(|seen| fits(&seen)) {
        reference::finish_ip(packet);
        reference::finish_l4(packet);
    }
}

/// Source, TOS, segment size, whether it was cut off, bytes.
type Arrival = (IpAddr, u8, Option<u16>, bool, Vec<u8>);

/// One node's engine with one peer, and the model of both.
struct Mesh {
    view: View,
    tables: Tables,
    stats: Stats,
    accepts: Accepts,
    out: Outbound,
    inn: Inbound,
}

impl Mesh {
    fn new(mtu: u16, bits: u8) -> Self {
        Mesh::between([1, 2], mtu, bits)
    }

    fn mirror(other: &Mesh, bits: u8) -> Self {
        Mesh::between([2, 1], other.view.mtu as u16, bits)
    }

    fn between([own, other]: [u8; 2], mtu: u16, bits: u8) -> Self {
        let subnets = |n: u8| {
            let nets = [format!("10.42.{n}.0/24"), format!("fd42:0:0:{n}::/64")];
            nets.iter().map(|net| net.parse().unwrap()).collect::<Vec<ipnet::IpNet>>()
        };
        let mac = |n| [2, 0, 0, 0, 0, n];
        let underlay: IpAddr = [10, 9, 0, other].into();
        let local = Local {
            mac: Mac(mac(own)),
            vni: Vni::DEFAULT,
            subnets: subnets(own),
            addresses: vec![[10, 9, 0, own].into(), [10, 42, own, 0].into()],
            mtu,
            identity: None,
            former_identity: None,
            bfd_keys: None,
        };
        let name: NodeName = "other".parse().unwrap();
        let spec = PeerSpec {
            name,
            endpoint: (underlay, 8472).into(),
            underlay: vec![underlay],
            mac: Mac(mac(other)),
            subnets: subnets(other),
            mtu,
            stats: Arc::new(PeerStats::new(1)),
            tunnel: None,
            former: None,
            liveness: None,
        };
        let view = View {
            mac: mac(own),
            vni: 1,
            subnets: subnets(own),
            addresses: local.addresses.clone(),
            mtu: usize::from(mtu),
            peers: vec![Peer {
                name: "other".to_owned(),
                endpoint: spec.endpoint,
                underlay: spec.underlay.clone(),
                mac: mac(other),
                subnets: subnets(other),
                mtu: usize::from(mtu),
            }],
        };
        let stats = Stats::new(1);
        let accepts = Accepts { tso: bits & 4 != 0, uso: bits & 12 == 12 };
        let cut_behind = CutBehind { v4: (bits & 16 != 0).into(), ..CutBehind::default() };
        let out = Outbound::new(stats.clone(), 0, 4).with_cut_behind(Arc::new(cut_behind));
        let inn = Inbound::new(stats.clone(), 0, accepts).with_big_tcp(Arc::new(BigTcp::on()));
        Mesh { view, tables: Tables::new(local, vec![spec]), stats, accepts, out, inn }
    }

    fn host(subnets: &[ipnet::IpNet]) -> (IpAddr, IpAddr) {
        (subnets[0].network(), subnets[1].network())
    }

    fn own(&self) -> (IpAddr, IpAddr) {
        Mesh::host(&self.view.subnets)
    }

    fn others(&self) -> (IpAddr, IpAddr) {
        Mesh::host(&self.view.peers[0].subnets)
    }

    fn header_to_us(&self, v6: bool) -> Vec<u8> {
        let mut header = self.view.header(0, v6);
        let (to, from) = (self.view.mac, self.view.peers[0].mac);
        header[8..14].copy_from_slice(&to);
        header[14..20].copy_from_slice(&from);
        header
    }

    /// Frames through the journey out; the datagrams.
    fn send(&mut self, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let (mut arena, mut places, mut expected) = (vec![0xa5; 64], Vec::new(), Vec::new());
        for frame in frames {
            let at = (arena.len() + HEADROOM).next_multiple_of(64);
            arena.resize(at, 0xa5);
            arena.extend(frame);
            places.push((at, frame.len()));
            if let Fate::Sent { peer, packets, .. } = self.view.out(frame).fate {
                let whole = |packet: Vec<u8>| [self.view.header(peer, packet[0] >> 4 == 6), packet].concat();
                expected.extend(packets.into_iter().map(whole));
            }
        }
        let out = &mut self.out;
        let mut datagrams: Vec<Vec<u8>> = Vec::new();
        // in two rounds: what is short of the first waits for the second
        let (first, second) = places.split_at(places.len() / 2);
        for (round, places) in [first, second].into_iter().enumerate() {
            for (at, len) in places {
                out.push(&self.tables, 1, &mut arena, *at, *len);
            }
            if round == 0 {
                out.more_follows();
            }
            out.set_aside();
            for run in out.batch().runs() {
                let gather = |pieces: &[Piece]| -> Vec<u8> {
                    pieces.iter().map(|piece| piece.of(&arena, out.batch().slab())).collect::<Vec<_>>().concat()
                };
                if let Some(how) = run.uncut() {
                    let datagram = gather(run.pieces());
                    let (header, inner) = datagram.split_at(ENCAPSULATION);
                    let kind = if how.v6 { vnet_hdr::GSO_TCPV6 } else { vnet_hdr::GSO_TCPV4 };
                    let ecn = if how.cwr { vnet_hdr::GSO_ECN } else { 0 };
                    let fields = [how.header_len, how.size, how.transport, 16].map(u16::to_ne_bytes).concat();
                    let vnet = [&[vnet_hdr::NEEDS_CSUM, kind | ecn], fields.as_slice()].concat();
                    let packets = reference::unwrap(&[vnet.as_slice(), inner].concat()).expect("a kernel cuts it");
                    assert_eq!(packets.len(), usize::from(run.segments));
                    let cut: Vec<Vec<u8>> = packets.iter().map(|packet| [header, packet].concat()).collect();
                    assert_eq!(run.bytes as usize, cut.concat().len());
                    datagrams.extend(cut);
                    out.sent(&self.tables, run, Sent::All);
                    continue;
                }
                let of_run: Vec<_> = run.datagrams().map(gather).collect();
                assert_eq!(of_run.len(), usize::from(run.segments));
                assert_eq!(of_run.concat(), gather(run.pieces()));
                assert!(run.segments <= 64 && run.bytes <= 65_507 && run.bytes as usize == of_run.concat().len());
                datagrams.extend(of_run);
                out.sent(&self.tables, run, Sent::All);
            }
            out.errors().for_each(|error| out.error_written(error, true));
            out.clear();
        }
        self.balanced();
        if datagrams != expected {
            // flows may overtake each other
            let (mut a, mut b) = (datagrams.clone(), expected);
            a.sort();
            b.sort();
            if a != b {
                for side in [&mut a, &mut b] {
                    side.iter_mut().for_each(|datagram| *datagram = without_push_and_id(datagram));
                    side.sort();
                }
            }
            assert_eq!(a, b);
        }
        datagrams
    }

    /// Datagrams through the journey in; the frames for the TUN device.
    fn receive(&mut self, buffers: &[Arrival]) -> Vec<Vec<u8>> {
        let (mut arena, mut received, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for (from, tos, segment_len, truncated, bytes) in buffers {
            let at = arena.len();
            arena.extend(bytes);
            arena.resize((at + bytes.len() + 64).next_multiple_of(64), 0x5a);
            let (source, tos, segment_len, truncated) = (*from, *tos, *segment_len, *truncated);
            received.push(Received {
                at,
                len: bytes.len(),
                segment_len,
                source: (source, 40_000).into(),
                tos,
                truncated,
            });
            let one = |inner: &[u8]| look(inner).is_some_and(|seen| seen.total == inner.len());
            let uncut =
                segment_len.is_some_and(|size| usize::from(size) < bytes.len()) && bytes.get(22..).is_some_and(one);
            let step = segment_len.filter(|_| !uncut).map_or(bytes.len(), usize::from).max(1);
            let inner_size = segment_len.filter(|_| uncut).map(usize::from);
            for datagram in bytes.chunks(step) {
                if let (Ok((_, packets)), false) =
                    (self.view.arrive(source, tos, datagram, inner_size, truncated), truncated)
                {
                    expected.extend(packets);
                }
            }
        }
        for received in received {
            self.inn.push(&self.tables, 1, &mut arena, received);
        }
        self.inn.finish(&mut arena);
        let (mut frames, mut packets) = (Vec::new(), Vec::new());
        for unit in self.inn.units() {
            let pieces = unit.pieces().iter().map(|piece| piece.of(&arena, self.inn.slab()));
            let frame = pieces.collect::<Vec<_>>().concat();
            assert!(frame[0] == 0 || self.accepts.tso);
            assert!(frame[1] != 5 || self.accepts.uso);
            let of_unit = reference::unwrap(&frame).expect("a kernel takes the frame");
            assert_eq!(of_unit.len(), usize::from(unit.segments));
            self.inn.written(unit, true);
            packets.extend(of_unit);
            frames.push(frame);
        }
        self.inn.clear();
        self.inn.ask(|_| true);
        self.balanced();
        let plain = |packets: Vec<Vec<u8>>| {
            let atomic = |p: &[u8]| look(p).is_some_and(|l| !l.v6 && l.df && reference::sum(&[&p[..l.l4]]) == 0xffff);
            let one = |mut packet: Vec<u8>| {
                if atomic(&packet) {
                    packet[4..6].fill(0);
                    reference::finish_ip(&mut packet);
                }
                packet
            };
            packets.into_iter().map(one).collect::<Vec<_>>()
        };
        let told = |packet: Vec<u8>| match look(&packet) {
            Some(seen) if self.view.addresses.contains(&seen.destination) => reference::without_push(packet),
            _ => packet,
        };
        let [mut a, mut b] = [packets, expected].map(|all| plain(all.into_iter().map(told).collect()));
        if a != b {
            a.sort();
            b.sort();
            assert_eq!(a, b);
        }
        frames
    }

    /// What went in is what came out plus the drops.
    fn balanced(&self) {
        let dropped = |direction| -> u64 {
            let drops = Drop::ALL.iter().filter(|reason| reason.direction() == direction);
            drops.map(|reason| self.stats.sum(|worker| worker.drops(*reason))).sum()
        };
        let flow = &self.stats.worker(0).unwrap().flow;
        let entered = flow.tun_rx_packets.get() + flow.originated_outbound.get();
        assert_eq!(entered, flow.udp_tx_packets.get() + dropped(Direction::Outbound));
        let entered = flow.udp_rx_packets.get() + flow.originated_inbound.get();
        assert_eq!(entered, flow.tun_tx_packets.get() + dropped(Direction::Inbound));
    }
}
