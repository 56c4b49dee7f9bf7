//! The engine against the kernel: the same super-packet cut by both, the same packets joined by both.
//!
//! ```text
//!   namespace meshd-gso-PID-TEST
//!   cut:    write ─► in0 (TUN, offload headers) ─► routing ─► out0 (TUN without offloads) ─► read single packets
//!   join:   write ─► in0 ─► routing ─► va0 ═ vb0 (GRO) ─► routing ─► out0 (TUN with offloads) ─► read super-packets
//! ```
//!
//! The kernel routes, so hop limits are one (two) lower on the way; the engine gets the packets as they are then. Needs
//! root, /dev/net/tun, iproute2 and, to join, ethtool; else it prints SKIPPED and why.

#[path = "reference/mod.rs"]
mod reference;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use meshd::engine::coalesce::Accepts;
use meshd::engine::inbound::{Inbound, Received};
use meshd::engine::outbound::{HEADROOM, Outbound};
use meshd::engine::stats::{PeerStats, Stats};
use meshd::engine::tables::{Local, PeerSpec, Tables};
use meshd::node::{Mac, Vni};
use meshd::sys::tun;
use reference::{ACK, CWR, ECE, FIN, Head, PSH, Rng, SYN, TCP, TcpHead, UDP, VNET, look};

const FROM: [&str; 2] = ["10.71.1.5", "fd71:1::5"];
const TO: [&str; 2] = ["10.71.2.5", "fd71:2::5"];

#[test]
fn segments_are_those_of_the_kernel() {
    in_namespace("segments_are_those_of_the_kernel", &["ip"], || {
        let mut input = tun::open_queue("in0").unwrap();
        let mut output = tun::open_queue("out0").unwrap();
        tun::set_offload(&output, 0).unwrap();
        sh("ip link set in0 mtu 65535 up; ip link set out0 mtu 9000 up
            ip addr add 10.71.1.1/24 dev in0; ip route add 10.71.2.0/24 dev out0
            ip -6 addr add fd71:1::1/64 dev in0 nodad; ip -6 route add fd71:2::/64 dev out0");
        let mut count = 0;
        for Super { name, mut packet, size, ecn } in super_packets() {
            let frame = reference::super_frame(&mut packet, size, ecn);
            drain(&mut output);
            input.write_all(&frame).unwrap_or_else(|error| panic!("{name}: {error}"));
            hop(&mut packet, 1);
            let ours = cut(&reference::super_frame(&mut packet, size, ecn));
            let kernels: Vec<Vec<u8>> =
                read(&mut output, Some(ours.len())).iter().map(|f| f[VNET..].to_vec()).collect();
            assert_eq!(kernels.len(), ours.len(), "{name}: pieces of {} bytes in steps of {size}", packet.len());
            for (number, (kernel, our)) in kernels.iter().zip(&ours).enumerate() {
                assert!(kernel == our, "{name}, piece {number}:\n{kernel:02x?}\n{our:02x?}");
            }
            count += ours.len();
        }
        eprintln!("{count} segments are equal byte for byte");
    });
}

struct Super {
    name: String,
    packet: Vec<u8>,
    size: usize,
    ecn: bool,
}

fn super_packets() -> Vec<Super> {
    let mut rng = Rng(71);
    let mut all = Vec::new();
    let stamps = [&[1, 1, 8, 10][..], &[9; 8]].concat();
    let shapes = [(1, 60), (7, 50), (999, 999 * 3), (1001, 5000), (1400, 1400 * 2 + 1), (1448, 64_000), (1398, 20_001)];
    for v6 in [0, 1] {
        for (size, payload) in shapes {
            for flags in [0, PSH, FIN | PSH, CWR | PSH, ECE, CWR | ECE | FIN | PSH] {
                for (variant, options) in [Vec::new(), stamps.clone()].into_iter().enumerate() {
                    let mut head = Head::new(FROM[v6].parse().unwrap(), TO[v6].parse().unwrap());
                    head.id = rng.pick(&[0, 1, 0xfffe, 0x1234]);
                    head.frag = rng.pick(&[0, 0x4000]);
                    head.tos = rng.pick(&[0, 1, 2, 3, 0xba]);
                    if variant == 1 && flags == PSH {
                        // destination options; no-operations
                        (head.options, head.extension) =
                            if v6 == 1 { (vec![TCP, 0, 1, 4, 0, 0, 0, 0], 60) } else { (vec![1; 4], 0) };
                    }
                    let sequence = rng.pick(&[0, 1, u32::MAX - 700]);
                    let ports = (rng.next() as u16 | 1, 443);
                    let tcp = TcpHead { ports, sequence, ack: 5, flags: ACK | flags, window: 77, options };
                    let packet = head.packet(TCP, &tcp.bytes(&rng.bytes(payload)));
                    let name = format!("TCP v6={v6} size={size} payload={payload} flags={flags:#x} options={variant}");
                    all.push(Super { name, packet, size, ecn: flags & CWR != 0 });
                }
            }
        }
        for (size, payload) in [(1, 60), (7, 50), (999, 999 * 3), (1400, 1400 * 2 + 1), (1472, 60_000), (500, 33_001)] {
            for extended in [false, true] {
                let mut head = Head::new(FROM[v6].parse().unwrap(), TO[v6].parse().unwrap());
                (head.id, head.frag) = (0xfffe, rng.pick(&[0, 0x4000]));
                head.tos = rng.pick(&[0, 2, 0xb8]);
                if extended {
                    (head.options, head.extension) =
                        if v6 == 1 { (vec![UDP, 0, 1, 4, 0, 0, 0, 0], 60) } else { (vec![1; 4], 0) };
                }
                let packet = head.packet(UDP, &reference::udp_bytes((999, 53), &rng.bytes(payload)));
                let name = format!("UDP v6={v6} size={size} payload={payload} extended={extended}");
                all.push(Super { name, packet, size, ecn: false });
            }
        }
        // a payload for which the checksum of a segment is zero, which UDP sends as all ones
        let head = Head { id: 1, ..Head::new(FROM[v6].parse().unwrap(), TO[v6].parse().unwrap()) };
        let mut payload = vec![0; 20];
        let mut single = head.packet(UDP, &reference::udp_bytes((999, 53), &payload[..10]));
        reference::finish_l4(&mut single);
        let check = reference::look(&single).unwrap().l4 + 6;
        payload[..2].copy_from_slice(&single[check..check + 2]);
        let packet = head.packet(UDP, &reference::udp_bytes((999, 53), &payload));
        assert_eq!(reference::cut(&packet, 10)[0][check..check + 2], [0xff; 2]);
        all.push(Super { name: format!("UDP v6={v6} checksum zero"), packet, size: 10, ecn: false });
    }
    all
}

/// Where the engine does something else than the kernel on purpose.
const STRICTER: [(&str, &str); 3] = [
    ("TCP v6 extension header", "rare, and not worth a rule of its own: packets pass singly"),
    ("TCP v4 urgent pointer without URG", "the first one's would stand for all: the segments would differ"),
    ("TCP v4 leads with CWR", "CWR belongs to one segment; older kernels join behind it"),
];

/// Where the kernel joins too, but cuts again before the packets can be seen here: its own devices are told of a fixed id
/// (`SKB_GSO_TCP_FIXEDID`), a TUN device cannot be. Ids of atomic packets have no meaning (RFC 6864 §4.1).
const CUT_AGAIN: [&str; 2] = ["TCP v4 fixed id, DF", "TCP v4 id fixed, then counting"];

#[test]
fn joined_packets_are_those_of_the_kernel() {
    in_namespace("joined_packets_are_those_of_the_kernel", &["ip", "ethtool"], || {
        let mut input = tun::open_queue("in0").unwrap();
        let mut output = tun::open_queue("out0").unwrap();
        let offloads = tun::F_CSUM | tun::F_TSO4 | tun::F_TSO6 | tun::F_TSO_ECN | tun::F_USO4 | tun::F_USO6;
        if tun::set_offload(&output, offloads).is_err() {
            eprintln!("SKIPPED: this kernel has no USO on TUN devices (6.2 has)");
            return;
        }
        sh("ip link add va0 address 02:00:00:00:00:0a type veth peer name vb0 address 02:00:00:00:00:0b
            ethtool -K va0 tso off tx-tcp-mangleid-segmentation off >/dev/null 2>&1 || ethtool -K va0 tso off
            ethtool -K va0 tx off; ethtool -K vb0 gro on rx-udp-gro-forwarding on
            echo 30000000 >/sys/class/net/vb0/gro_flush_timeout; echo 100 >/sys/class/net/vb0/napi_defer_hard_irqs
            ip link set in0 up; ip link set out0 mtu 1500 up; ip link set va0 up; ip link set vb0 up
            ip addr add 10.71.1.1/24 dev in0; ip addr add 10.71.9.1/24 dev va0
            ip neigh add 10.71.9.2 lladdr 02:00:00:00:00:0b dev va0 nud permanent
            ip route add 10.71.2.0/24 via 10.71.9.2 dev va0
            ip rule add iif vb0 lookup 100; ip route add 10.71.2.0/24 dev out0 table 100
            ip -6 addr add fd71:1::1/64 dev in0 nodad; ip -6 addr add fd71:9::1/64 dev va0 nodad
            ip -6 neigh add fd71:9::2 lladdr 02:00:00:00:00:0b dev va0 nud permanent
            ip -6 route add fd71:2::/64 via fd71:9::2 dev va0
            ip -6 rule add iif vb0 lookup 100; ip -6 route add fd71:2::/64 dev out0 table 100");
        std::thread::sleep(Duration::from_millis(100));
        let (mut seen, mut differences) = (BTreeSet::new(), Vec::new());
        for (name, packets) in streams() {
            let mut arrived = packets.clone();
            arrived.iter_mut().for_each(|packet| hop(packet, 2));
            let ours = shape(&join(&arrived));
            let stricter = STRICTER.iter().any(|(case, _)| *case == name);
            let cut_again = CUT_AGAIN.contains(&name);
            // the kernel's timer may fire between two packets: once in a few times it does not
            let mut kernels = Vec::new();
            let agreed = (0..6).any(|_| {
                drain(&mut output);
                packets.iter().for_each(|packet| input.write_all(&reference::plain_frame(packet)).unwrap());
                kernels = shape(&read(&mut output, None));
                match (stricter, cut_again) {
                    (true, _) => kernels.len() < ours.len(),
                    (_, true) => kernels.len() > ours.len(),
                    // the kernel lets a corrupt packet overtake those that it holds
                    _ if name.ends_with("wrong checksum") => sorted(&kernels) == sorted(&ours),
                    _ => kernels == ours,
                }
            });
            let lengths =
                |shapes: &[Shape]| shapes.iter().map(|(p, kind, size)| (p.len(), *kind, *size)).collect::<Vec<_>>();
            let (k, o) = (lengths(&kernels), lengths(&ours));
            if !agreed && stricter && kernels == ours {
                eprintln!("{name}: this kernel is as strict as meshd");
            } else if !agreed {
                differences.push(format!("{name}: kernel {k:?}, meshd {o:?}"));
            }
            seen.insert(name);
        }
        assert!(differences.is_empty(), "{}", differences.join("\n"));
        assert!(STRICTER.iter().all(|(case, _)| seen.contains(*case)), "a case that does not exist");
        eprintln!(
            "{} streams are joined as the kernel does, {} on purpose not",
            seen.len() - STRICTER.len(),
            STRICTER.len()
        );
    });
}

/// Streams of one flow each.
fn streams() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let mut all = Vec::new();
    let tcp = |v6: usize, edit: &dyn Fn(usize, &mut Head, &mut TcpHead, &mut usize)| -> Vec<Vec<u8>> {
        let mut rng = Rng(5);
        let mut sequence = u32::MAX - 2000;
        let one = |index| {
            let mut head =
                Head { id: 100 + index as u16, ..Head::new(FROM[v6].parse().unwrap(), TO[v6].parse().unwrap()) };
            let options = [&[1, 1, 8, 10][..], &[9; 8]].concat();
            let mut tcp = TcpHead { ports: (1000, 2000), sequence, ack: 5, flags: ACK, window: 77, options };
            let mut len = 1000;
            edit(index, &mut head, &mut tcp, &mut len);
            sequence = tcp.sequence.wrapping_add(len as u32);
            let mut packet = head.packet(TCP, &tcp.bytes(&rng.bytes(len)));
            reference::finish_l4(&mut packet);
            packet
        };
        (0..6).map(one).collect()
    };
    all.push(("TCP v4", tcp(0, &|_, _, _, _| {})));
    all.push(("TCP v6", tcp(1, &|_, _, _, _| {})));
    all.push(("TCP v4 short last", tcp(0, &|i, _, _, len| *len = if i == 5 { 333 } else { 1000 })));
    all.push(("TCP v4 odd", tcp(0, &|_, _, _, len| *len = 999)));
    all.push(("TCP v4 short in the middle", tcp(0, &|i, _, _, len| *len = if i == 2 { 333 } else { 1000 })));
    all.push(("TCP v4 longer than the first", tcp(0, &|i, _, _, len| *len = if i == 2 { 1200 } else { 1000 })));
    all.push(("TCP v4 PSH at the end", tcp(0, &|i, _, t, _| t.flags |= if i == 5 { PSH } else { 0 })));
    all.push(("TCP v4 PSH in the middle", tcp(0, &|i, _, t, _| t.flags |= if i == 2 { PSH } else { 0 })));
    all.push(("TCP v6 PSH first", tcp(1, &|i, _, t, _| t.flags |= if i == 0 { PSH } else { 0 })));
    all.push(("TCP v4 FIN", tcp(0, &|i, _, t, _| t.flags |= if i == 4 { FIN } else { 0 })));
    all.push(("TCP v4 ECE on all", tcp(0, &|_, _, t, _| t.flags |= ECE)));
    all.push(("TCP v4 ECE on some", tcp(0, &|i, _, t, _| t.flags |= if i > 2 { ECE } else { 0 })));
    all.push(("TCP v4 CWR in the middle", tcp(0, &|i, _, t, _| t.flags |= if i == 3 { CWR } else { 0 })));
    all.push(("TCP v4 leads with CWR", tcp(0, &|i, _, t, _| t.flags |= if i == 0 { CWR } else { 0 })));
    all.push(("TCP v4 SYN", tcp(0, &|i, _, t, _| t.flags = if i == 0 { SYN } else { ACK })));
    all.push(("TCP v4 gap", tcp(0, &|i, _, t, _| t.sequence = t.sequence.wrapping_add(u32::from(i == 3)))));
    all.push(("TCP v6 overlap", tcp(1, &|i, _, t, _| t.sequence = t.sequence.wrapping_sub(u32::from(i == 3)))));
    all.push(("TCP v4 window", tcp(0, &|i, _, t, _| t.window += u16::from(i > 2))));
    all.push(("TCP v4 ack", tcp(0, &|i, _, t, _| t.ack += u32::from(i > 2))));
    all.push(("TCP v4 timestamps", tcp(0, &|i, _, t, _| t.options[7] += u8::from(i > 2))));
    all.push(("TCP v4 no options", tcp(0, &|_, _, t, _| t.options.clear())));
    all.push(("TCP v4 TOS", tcp(0, &|i, h, _, _| h.tos = if i > 2 { 4 } else { 0 })));
    all.push(("TCP v4 ECN", tcp(0, &|i, h, _, _| h.tos = if i == 2 { 3 } else { 2 })));
    all.push(("TCP v6 traffic class", tcp(1, &|i, h, _, _| h.tos = if i > 2 { 4 } else { 0 })));
    all.push(("TCP v4 TTL", tcp(0, &|i, h, _, _| h.ttl = if i > 2 { 60 } else { 64 })));
    all.push(("TCP v6 hop limit", tcp(1, &|i, h, _, _| h.ttl = if i > 2 { 60 } else { 64 })));
    all.push(("TCP v4 fixed id, DF", tcp(0, &|_, h, _, _| h.id = 0)));
    all.push(("TCP v4 fixed id, no DF", tcp(0, &|_, h, _, _| (h.id, h.frag) = (7, 0))));
    all.push(("TCP v4 counting id, no DF", tcp(0, &|_, h, _, _| h.frag = 0)));
    all.push(("TCP v4 DF on some", tcp(0, &|i, h, _, _| h.frag = if i > 2 { 0 } else { 0x4000 })));
    all.push(("TCP v4 id with a gap, no DF", tcp(0, &|i, h, _, _| (h.id, h.frag) = (100 + 2 * i as u16, 0))));
    all.push(("TCP v4 id fixed, then counting", tcp(0, &|i, h, _, _| h.id = if i < 3 { 7 } else { 5 + i as u16 })));
    all.push(("TCP v4 IP options", tcp(0, &|_, h, _, _| h.options = vec![1; 4])));
    all.push((
        "TCP v6 extension header",
        tcp(1, &|_, h, _, _| (h.options, h.extension) = (vec![TCP, 0, 1, 4, 0, 0, 0, 0], 60)),
    ));
    all.push(("TCP v4 pure ACK between", tcp(0, &|i, _, _, len| *len = if i == 3 { 0 } else { 1000 })));
    let mut bad = tcp(0, &|_, _, _, _| {});
    bad[3][700] ^= 1;
    all.push(("TCP v4 wrong checksum", bad));
    let mut urgent = tcp(0, &|_, _, _, _| {});
    for packet in &mut urgent[3..] {
        packet[20 + 19] = 9;
        reference::finish_l4(packet);
    }
    all.push(("TCP v4 urgent pointer without URG", urgent));

    let udp = |v6: usize, count: usize, edit: &dyn Fn(usize, &mut Head, &mut usize)| -> Vec<Vec<u8>> {
        let mut rng = Rng(6);
        let one = |index| {
            let mut head =
                Head { id: 100 + index as u16, ..Head::new(FROM[v6].parse().unwrap(), TO[v6].parse().unwrap()) };
            let mut len = 900;
            edit(index, &mut head, &mut len);
            let mut packet = head.packet(UDP, &reference::udp_bytes((1000, 2000), &rng.bytes(len)));
            reference::finish_l4(&mut packet);
            packet
        };
        (0..count).map(one).collect()
    };
    all.push(("UDP v4", udp(0, 6, &|_, _, _| {})));
    all.push(("UDP v6", udp(1, 6, &|_, _, _| {})));
    all.push(("UDP v4 short last", udp(0, 6, &|i, _, len| *len = if i == 5 { 9 } else { 900 })));
    all.push(("UDP v4 short in the middle", udp(0, 6, &|i, _, len| *len = if i == 2 { 9 } else { 900 })));
    all.push(("UDP v6 longer than the first", udp(1, 6, &|i, _, len| *len = if i == 2 { 1000 } else { 900 })));
    all.push(("UDP v4 more than 64", udp(0, 70, &|_, _, len| *len = 100)));
    all.push(("UDP v4 TOS", udp(0, 6, &|i, h, _| h.tos = if i > 2 { 4 } else { 0 })));
    let mut none = udp(0, 6, &|_, _, _| {});
    none.iter_mut().for_each(|packet| packet[26..28].fill(0));
    all.push(("UDP without checksum", none));
    all
}

type Shape = (Vec<u8>, u8, u16);

/// Packet, kind of super-packet and segment size; of single packets just the packet.
fn shape(frames: &[Vec<u8>]) -> Vec<Shape> {
    let one = |frame: &Vec<u8>| {
        let kind = frame[1] & 0x7f;
        let mut packet = frame[VNET..].to_vec();
        if frame[0] & 1 == 1 && kind == 0 {
            reference::finish_l4(&mut packet);
        }
        (packet, kind, if kind == 0 { 0 } else { u16::from_ne_bytes([frame[4], frame[5]]) })
    };
    frames.iter().map(one).collect()
}

fn sorted(shapes: &[Shape]) -> Vec<Shape> {
    let mut shapes = shapes.to_vec();
    shapes.sort();
    shapes
}

fn tables(own: usize, other: usize) -> Tables {
    let subnets =
        |n: usize| vec![format!("10.71.{n}.0/24").parse().unwrap(), format!("fd71:{n}::/64").parse().unwrap()];
    let mac = |n: usize| Mac([2, 0, 0, 0, 0, n as u8]);
    let local = Local {
        mac: mac(own),
        vni: Vni::DEFAULT,
        subnets: subnets(own),
        addresses: Vec::new(),
        mtu: 9000,
        identity: None,
        former_identity: None,
        bfd_keys: None,
    };
    let underlay = std::net::IpAddr::from([10, 9, 0, other as u8]);
    let spec = PeerSpec {
        name: "other".parse().unwrap(),
        endpoint: (underlay, 8472).into(),
        underlay: vec![underlay],
        mac: mac(other),
        subnets: subnets(other),
        mtu: 9000,
        stats: Arc::new(PeerStats::new(1)),
        tunnel: None,
        former: None,
        liveness: None,
    };
    Tables::new(local, vec![spec])
}

/// What the engine sends for a frame, without encapsulation.
fn cut(frame: &[u8]) -> Vec<Vec<u8>> {
    let mut out = Outbound::new(Stats::new(1), 0, 1);
    let mut arena = vec![0; HEADROOM];
    arena.extend(frame);
    out.push(&tables(1, 2), 1, &mut arena, HEADROOM, frame.len());
    let batch = out.batch();
    let whole = |pieces: &[meshd::engine::tx_batch::Piece]| -> Vec<u8> {
        pieces.iter().flat_map(|piece| piece.of(&arena, batch.slab())).copied().skip(22).collect()
    };
    batch.runs().iter().flat_map(|run| run.datagrams().map(whole)).collect()
}

/// The frames that the engine writes for packets that arrive in one batch.
fn join(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut inn = Inbound::new(Stats::new(1), 0, Accepts { tso: true, uso: true });
    let (tables, mut arena) = (tables(2, 1), Vec::new());
    for packet in packets {
        let v6 = packet[0] >> 4 == 6;
        let at = arena.len();
        arena.extend([8, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
        arena.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
        arena.extend(packet);
        let (source, len) = (([10, 9, 0, 1], 40_000).into(), arena.len() - at);
        inn.push(
            &tables,
            1,
            &mut arena,
            Received { at, len, segment_len: None, source, tos: look(packet).unwrap().tos, truncated: false },
        );
    }
    inn.finish(&mut arena);
    let whole = |unit: &meshd::engine::coalesce::Unit| -> Vec<u8> {
        unit.pieces().iter().flat_map(|piece| piece.of(&arena, inn.slab())).copied().collect()
    };
    inn.units().iter().map(whole).collect()
}

/// What so many routers leave of the hop limit.
fn hop(packet: &mut [u8], routers: u8) {
    packet[if packet[0] >> 4 == 6 { 7 } else { 8 }] -= routers;
    reference::finish_ip(packet);
}

/// Reads what comes for us: so many frames, or until nothing more does.
fn read(tun: &mut File, count: Option<usize>) -> Vec<Vec<u8>> {
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut buffer = vec![0; 70_000];
    let (mut quiet, started) = (Instant::now(), Instant::now());
    loop {
        match tun.read(&mut buffer) {
            Ok(len) => {
                let to = look(&buffer[VNET..len]).map(|look| look.destination.to_string());
                if to.is_some_and(|to| TO.contains(&to.as_str())) {
                    frames.push(buffer[..len].to_vec());
                    quiet = Instant::now();
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let enough = count.is_some_and(|count| frames.len() >= count);
                let patience = match (enough, frames.is_empty()) {
                    (true, _) => 1,
                    (false, true) => 500,
                    (false, false) => 120,
                };
                if quiet.elapsed().as_millis() >= patience || started.elapsed().as_secs() > 5 {
                    return frames;
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            Err(error) => panic!("reading the TUN device: {error}"),
        }
    }
}

fn drain(tun: &mut File) {
    let mut buffer = vec![0; 70_000];
    while tun.read(&mut buffer).is_ok() {}
}

const INSIDE: &str = "MESHD_GSO_TEST_INSIDE";

/// Runs `body` in a namespace of its own: makes it and runs this binary, for this test alone, inside it.
fn in_namespace(test: &str, tools: &[&str], body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        sh("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
            for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done; ip link set lo up");
        return body();
    }
    if let Some(reason) = why_not(tools) {
        eprintln!("SKIPPED {test}: {reason}");
        return;
    }
    let namespace = Namespace(format!("meshd-gso-{}-{test}", std::process::id()));
    sh(&format!("ip netns add {}", namespace.0));
    let output = Command::new("ip")
        .args(["netns", "exec", &namespace.0])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprint!("{err}");
    assert!(output.status.success() && out.contains("1 passed"), "{out}");
}

fn why_not(tools: &[&str]) -> Option<String> {
    if std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() != 0) {
        return Some("needs root".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("there is no /dev/net/tun".to_owned());
    }
    let found = |tool: &&str| {
        Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().is_ok_and(|o| o.status.success())
    };
    if let Some(tool) = tools.iter().find(|tool| !found(tool)) {
        return Some(format!("needs {tool}"));
    }
    let probe = Command::new("ip").args(["netns", "list"]).output();
    if probe.is_ok_and(|output| output.status.success()) { None } else { Some("cannot make namespaces".to_owned()) }
}

/// Removed when dropped.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        Command::new("ip").args(["netns", "del", &self.0]).status().ok();
    }
}

#[track_caller]
fn sh(command: &str) {
    let output = Command::new("sh").arg("-ec").arg(command).output().unwrap();
    assert!(output.status.success(), "{command}\n{}", String::from_utf8_lossy(&output.stderr));
}
