//! A packet on its way meets no allocation: once buffers have grown to what a load needs, both journeys leave the
//! allocator alone.

// A global allocator is an unsafe trait; nothing else here is unsafe.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::IpAddr;

use meshd::engine::coalesce::Accepts;
use meshd::engine::inbound::{Inbound, Received};
use meshd::engine::outbound::{HEADROOM, Outbound, Sent};
use meshd::engine::stats::Stats;
use meshd::engine::tables::{PeerIndex, Tables};
use meshd::engine::testing::{
    ALL, Buffer, Check, Facts, Sending, bytes_of, connect, encrypted_mesh, mesh, payload, tcp, udp, watched,
};
use meshd::engine::tunnel::{Outbox, Policy};
use meshd::engine::vigil::Vigil;
use meshd::health::peer::Verdict;
use meshd::wire::vnet_hdr::{self, VnetHdr};
use zerocopy::IntoBytes;

/// Counts what this thread asks for; the work is the system's.
struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // a thread that ends has no counter any more, and nobody to read it
    ASKED.try_with(|asked| asked.set(asked.get() + 1)).ok();
}

// SAFETY: each method hands its arguments unchanged to the system's allocator and returns what that returns, so that
// whatever the caller and `System` promise each other holds; the counter is a plain thread-local number without a
// destructor or lazy initialiser, so that counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller promises a layout of non-zero size, which is all that `System` asks.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: `pointer` came from this allocator with this layout, hence from `System`; the caller promises the size.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from this allocator with this layout, hence from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// How often `work` asks the allocator for memory.
fn allocations(mut work: impl FnMut()) -> u64 {
    let before = ASKED.get();
    work();
    ASKED.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1u8; 100]))), 1);
    assert_eq!(allocations(|| ()), 0);
}

/// Frames as a device delivers them.
type Frames = Vec<(VnetHdr, Vec<u8>)>;

/// Batches that follow each other for ever.
fn loads() -> Vec<(&'static str, Vec<Frames>)> {
    let unfinished = |facts: Facts| Facts { check: Check::Pseudo, ..facts };
    let bulk = |v6: bool, to: u8| {
        let facts = unfinished(tcp(v6, 1, to, payload(60_000)));
        (facts.gso(1370), facts.bytes())
    };
    let small = |n: u16| {
        let facts = Facts { ports: (n, 9), ..udp(n & 1 == 1, 1, 2 + (n % 3) as u8, payload(18 + usize::from(n % 5))) };
        (VnetHdr::default(), facts.bytes())
    };
    let datagrams = |v6: bool| {
        let facts = unfinished(udp(v6, 1, 2, payload(50_000)));
        (facts.gso(1000), facts.bytes())
    };
    let too_long = || (VnetHdr::default(), udp(true, 1, 2, payload(3000)).bytes());
    let fragmented = || (VnetHdr::default(), Facts { flags_offset: 0, ..udp(false, 1, 2, payload(3000)) }.bytes());
    let nowhere = || (VnetHdr::default(), udp(false, 1, 99, payload(30)).bytes());
    vec![
        ("TCP super-packets", vec![vec![bulk(false, 2), bulk(true, 2), bulk(false, 3)]]),
        ("small packets of many flows", vec![(0..128).map(small).collect(), (128..256).map(small).collect()]),
        ("UDP super-packets", vec![vec![datagrams(false), datagrams(true)]]),
        (
            "all of it",
            vec![
                vec![bulk(false, 2), small(1), datagrams(true), small(2), too_long(), bulk(true, 4)],
                vec![small(3), too_long(), nowhere(), fragmented(), datagrams(false)],
                (0..100).map(small).collect(),
                vec![bulk(false, 3), (VnetHdr::default(), vec![0x45; 7])],
            ],
        ),
    ]
}

const BATCHES: usize = 200;

#[test]
fn the_journey_out_allocates_nothing() {
    let tables = mesh(1);
    for (name, load) in loads() {
        let mut outbound = Outbound::new(Stats::new(1), 0, 8);
        let mut arena = vec![0; 1 << 20];
        let mut sent = 0;
        // time goes on, so that errors are not held back
        let mut run = |batches: std::ops::Range<usize>| {
            for batch in batches {
                let Some(frames) = load.get(batch % load.len()) else { continue };
                sent += send(&mut outbound, &tables, batch as u64 * 200, frames, &mut arena);
            }
        };
        run(0..2 * load.len());
        assert_eq!(allocations(|| run(0..BATCHES)), 0, "{name}");
        assert!(sent > BATCHES, "{name}: datagrams were sent");
    }
}

fn send(outbound: &mut Outbound, tables: &Tables, now_ms: u64, frames: &Frames, arena: &mut [u8]) -> usize {
    let mut at = 64;
    for (vnet, packet) in frames {
        let end = at + vnet_hdr::HEADER_LEN + packet.len();
        let Some(room) = arena.get_mut(at..end) else { continue };
        let (front, behind) = room.split_at_mut(vnet_hdr::HEADER_LEN);
        front.copy_from_slice(vnet.as_bytes());
        behind.copy_from_slice(packet);
        outbound.push(tables, now_ms, arena, at, end - at);
        at = (end + HEADROOM).next_multiple_of(64);
    }
    let mut sent = 0;
    for run in outbound.batch().runs() {
        sent += run.datagrams().map(|pieces| pieces.len().min(1)).sum::<usize>();
        outbound.sent(tables, run, Sent::All);
    }
    outbound.errors().for_each(|error| outbound.error_written(error, true));
    outbound.clear();
    sent
}

/// What arrives when node 1 sends these frames to node 2: every run as one joined buffer, or each datagram alone.
fn arrivals(frames: &Frames, alone: bool) -> Vec<Buffer> {
    let mut sender = Sending::new(mesh(1));
    frames.iter().for_each(|(vnet, packet)| sender.push(*vnet, packet));
    let source = IpAddr::from([10, 9, 0, 1]);
    let buffer = |segment_len, bytes| Buffer { source, tos: 0, segment_len, truncated: false, bytes };
    let mut buffers = Vec::new();
    for run in sender.flush().0 {
        if alone {
            buffers.extend(run.datagrams.into_iter().map(|datagram| buffer(None, datagram)));
        } else {
            let segment_len = (run.datagrams.len() > 1).then_some(run.segment_len);
            buffers.push(buffer(segment_len, run.datagrams.concat()));
        }
    }
    buffers
}

#[test]
fn the_journey_in_allocates_nothing() {
    let tables = mesh(2);
    let uncut = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(30_000)) }.bytes();
    for accepts in [ALL, Accepts { tso: false, uso: false }] {
        for (name, load) in loads() {
            for alone in [false, true] {
                let mut load: Vec<Vec<Buffer>> = load.iter().map(|frames| arrivals(frames, alone)).collect();
                load[0].push(Buffer::one(1, 2, &uncut));
                load[0].push(Buffer { source: [192, 0, 2, 1].into(), ..Buffer::one(1, 2, &uncut) });
                let spoilt = bytes_of(&tcp(false, 1, 2, payload(3000)).segments(1000));
                load[0].push(Buffer::joined(1, 2, &[spoilt[0].clone(), vec![0; spoilt[0].len()], spoilt[1].clone()]));
                let mut inbound = Inbound::new(Stats::new(1), 0, accepts);
                let mut arena = vec![0; 2 << 20];
                let mut written = 0;
                let mut run = |batches: usize| {
                    for batch in 0..batches {
                        let Some(buffers) = load.get(batch % load.len()) else { continue };
                        written += receive(&mut inbound, &tables, buffers, &mut arena);
                    }
                };
                run(2 * load.len());
                let asked = allocations(|| run(BATCHES));
                assert_eq!(asked, 0, "{name}, {accepts:?}, each alone: {alone}");
                assert!(written > BATCHES, "{name}: packets were written");
            }
        }
    }
}

fn receive(inbound: &mut Inbound, tables: &Tables, buffers: &[Buffer], arena: &mut [u8]) -> usize {
    let mut at = 0;
    for Buffer { source, tos, segment_len, truncated, bytes } in buffers {
        let len = bytes.len();
        let Some(room) = arena.get_mut(at..at + len) else { continue };
        room.copy_from_slice(bytes);
        let received = Received {
            at,
            len,
            segment_len: *segment_len,
            source: (*source, 40_000).into(),
            tos: *tos,
            truncated: *truncated,
        };
        inbound.push(tables, 1, arena, received);
        at += len;
    }
    inbound.finish(arena);
    inbound.units().iter().for_each(|unit| inbound.written(unit, true));
    let written = inbound.units().len();
    inbound.clear();
    written
}

#[test]
fn neither_journey_of_an_encrypted_packet_allocates() {
    for lanes in [1, 2] {
        let policy = meshd::engine::tunnel::Policy::Required;
        let [a, b] = [1, 2].map(|node| encrypted_mesh(node, lanes, policy));
        connect(&a, &b);
        let mut outbound = Outbound::new(Stats::new(1), 0, 8);
        let mut inbound = Inbound::new(Stats::new(1), 0, ALL);
        let facts = Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(60_000)) };
        let small = udp(true, 1, 2, payload(64)).bytes();
        let frames = [(facts.gso(1300), facts.bytes()), (VnetHdr::default(), small)];
        let (mut arena, mut wire) = (vec![0; 1 << 18], vec![0; 1 << 18]);
        let mut written = 0;
        let mut run = |batches: usize| {
            for _ in 0..batches {
                let mut at = 64;
                for (vnet, packet) in &frames {
                    let end = at + vnet_hdr::HEADER_LEN + packet.len();
                    arena[at..at + vnet_hdr::HEADER_LEN].copy_from_slice(vnet.as_bytes());
                    arena[at + vnet_hdr::HEADER_LEN..end].copy_from_slice(packet);
                    outbound.push(&a, 0, &mut arena, at, end - at);
                    at = (end + HEADROOM).next_multiple_of(64);
                }
                let mut end = 0;
                for run in outbound.batch().runs() {
                    let start = end;
                    for piece in run.pieces() {
                        let bytes = piece.of(&arena, outbound.batch().slab());
                        wire[end..end + bytes.len()].copy_from_slice(bytes);
                        end += bytes.len();
                    }
                    let (len, source) = (end - start, ([10, 9, 0, 1], 8472).into());
                    let segment_len = (run.segments > 1).then_some(run.segment_len);
                    let received = Received { at: start, len, segment_len, source, tos: 0, truncated: false };
                    inbound.push(&b, 0, &mut wire, received);
                    outbound.sent(&a, run, Sent::All);
                }
                outbound.clear();
                inbound.finish(&mut wire);
                inbound.units().iter().for_each(|unit| inbound.written(unit, true));
                written += inbound.units().len();
                inbound.clear();
            }
        };
        run(4);
        assert_eq!(allocations(|| run(BATCHES)), 0, "{lanes} lanes");
        assert_eq!(written, 2 * (BATCHES + 4), "a super-packet and a small one each time");
    }
}

/// One end of a pair that asks each other whether it lives.
struct Watcher {
    tables: Tables,
    vigil: Vigil,
    inbound: Inbound,
    outbound: Outbound,
    outbox: Outbox,
    heard: Vec<PeerIndex>,
}

#[test]
fn who_is_watched_for_long_allocates_nothing() {
    for encrypted in [false, true] {
        let tables = |own| watched(&if encrypted { encrypted_mesh(own, 1, Policy::Required) } else { mesh(own) });
        let mut pair = [1, 2].map(|own| Watcher {
            tables: tables(own),
            vigil: Vigil::new(0, 1, 1),
            inbound: Inbound::new(Stats::new(1), 0, ALL),
            outbound: Outbound::new(Stats::new(1), 0, 1),
            outbox: Outbox::default(),
            heard: Vec::with_capacity(8),
        });
        if encrypted {
            connect(&pair[0].tables, &pair[1].tables);
        }
        let address = |watcher: &Watcher| watcher.tables.local().addresses[0];
        let peer = pair[0].tables.source(address(&pair[1])).unwrap();
        pair[0].tables.liveness(peer).unwrap().set_neighbour(true);
        let mut datagram = Vec::with_capacity(256);
        let mut talk = |from_ms: u64, to_ms: u64| {
            for now_ms in from_ms..to_ms {
                for _ in 0..2 {
                    pair.reverse();
                    let [from, to] = &mut pair;
                    let (ours, theirs, now_us) = (address(from), address(to), now_ms * 1000);
                    std::mem::swap(&mut from.heard, from.inbound.heard());
                    from.vigil.turn(&from.tables, now_us, Some(now_us), &mut from.heard, 1, &mut from.outbox);
                    for (letter, bytes) in from.outbox.letters().filter(|(letter, _)| letter.to.ip() == theirs) {
                        datagram.clear();
                        datagram.extend_from_slice(bytes);
                        let source = std::net::SocketAddr::new(ours, letter.to.port());
                        let len = bytes.len();
                        let received = Received { at: 0, len, segment_len: None, source, tos: 0, truncated: false };
                        to.inbound.push(&to.tables, now_ms, &mut datagram, received);
                    }
                    from.outbound.post(&mut from.outbox);
                    from.outbound.clear();
                }
            }
        };
        talk(1_000, 8_000);
        let asked = allocations(|| talk(8_000, 20_000));
        assert_eq!(pair[0].tables.liveness(peer).unwrap().verdict(), Verdict::Up, "positive control");
        assert_eq!(asked, 0, "encrypted: {encrypted}");
    }
}
