//! The engine alone: both journeys of small packets and of super-packets, by number of peers.
//!
//! One iteration is one batch, from the frames that were read to the counters of what was written, without the system
//! calls. The time for each packet is that of an iteration through its elements.

use std::net::IpAddr;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use meshd::engine::inbound::{Inbound, Received};
use meshd::engine::outbound::{HEADROOM, Outbound, Sent};
use meshd::engine::stats::Stats;
use meshd::engine::tables::{ENCAPSULATION, Tables};
use meshd::engine::testing::{ALL, Check, Facts, big_mesh, big_peer, payload, tcp, udp};
use meshd::wire::vnet_hdr::{self, VnetHdr};
use zerocopy::IntoBytes;

const SIZES: [usize; 3] = [10, 10_000, 100_000];
/// Small packets in a batch.
const SMALL: usize = 128;
/// Payload of a small packet: with its headers 64 bytes.
const SMALL_PAYLOAD: usize = 36;
/// Payload of a segment that fills the overlay's MTU, and segments of a super-packet of almost 64 KiB.
const SEGMENT: usize = 1398;
const SEGMENTS: usize = 45;

/// Whose packets a batch holds.
#[derive(Clone, Copy)]
enum Spread {
    OneFlow,
    AllPeers,
}

impl Spread {
    const BOTH: [(&'static str, Spread); 2] = [("one-flow", Spread::OneFlow), ("all-peers", Spread::AllPeers)];

    /// The peer of packet number `turn`; the order is one that no prefetcher guesses.
    fn peer(self, turn: usize, peers: usize) -> usize {
        match self {
            Spread::OneFlow => 1,
            Spread::AllPeers => 1 + turn.wrapping_mul(7919) % peers,
        }
    }
}

/// A packet between this node and a peer; addresses are set for each turn.
fn to_peer(base: Facts) -> Facts {
    Facts { source: big_peer(0).1.into(), destination: big_peer(1).1.into(), ..base }
}

fn from_peer(base: Facts) -> Facts {
    Facts { source: big_peer(1).1.into(), destination: big_peer(0).1.into(), ..base }
}

const V4_SOURCE: usize = 12;
const V4_DESTINATION: usize = 16;

fn put(arena: &mut [u8], at: usize, bytes: &[u8]) {
    arena[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Frames in the memory that a worker reads them into.
struct Frames {
    vnet: VnetHdr,
    arena: Vec<u8>,
    places: Vec<(usize, usize)>,
}

impl Frames {
    fn new(vnet: VnetHdr, packet: &[u8], count: usize) -> Self {
        let (mut arena, mut places) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let at = (arena.len() + HEADROOM).next_multiple_of(64);
            arena.resize(at + vnet_hdr::HEADER_LEN, 0);
            arena.extend(packet);
            places.push((at, vnet_hdr::HEADER_LEN + packet.len()));
        }
        Frames { vnet, arena, places }
    }

    fn send(&mut self, outbound: &mut Outbound, tables: &Tables, turn: &mut usize, spread: Spread) -> u64 {
        for &(at, len) in &self.places {
            *turn += 1;
            put(&mut self.arena, at, self.vnet.as_bytes());
            let destination = big_peer(spread.peer(*turn, tables.peers().len())).1;
            put(&mut self.arena, at + vnet_hdr::HEADER_LEN + V4_DESTINATION, &destination.octets());
            outbound.push(tables, 0, &mut self.arena, at, len);
        }
        let mut sent = 0;
        for run in outbound.batch().runs() {
            outbound.sent(tables, run, Sent::All);
            sent += u64::from(run.segments);
        }
        outbound.clear();
        sent
    }
}

fn outbound(c: &mut Criterion) {
    for peers in SIZES {
        let tables = big_mesh(peers);
        let small = to_peer(udp(false, 1, 2, payload(SMALL_PAYLOAD)));
        let large = to_peer(Facts { check: Check::Pseudo, ..tcp(false, 1, 2, payload(SEGMENT * SEGMENTS)) });
        let loads = [
            ("64B", Frames::new(VnetHdr::default(), &small.bytes(), SMALL), SMALL),
            ("64KiB", Frames::new(large.gso(SEGMENT as u16), &large.bytes(), 1), SEGMENTS),
        ];
        for (load, mut frames, packets) in loads {
            let mut group = c.benchmark_group(format!("engine/outbound/{load}"));
            group.throughput(Throughput::Elements(packets as u64));
            for (name, spread) in Spread::BOTH {
                let mut outbound = Outbound::new(Stats::new(1), 0, 8);
                let mut turn = 0;
                assert_eq!(frames.send(&mut outbound, &tables, &mut turn, spread), packets as u64);
                group.bench_function(BenchmarkId::new(name, peers), |b| {
                    b.iter(|| frames.send(&mut outbound, &tables, &mut turn, spread));
                });
            }
        }
    }
}

/// Buffers in the memory that a worker receives into. What the engine changes in a batch are the first bytes of
/// datagrams; they are put back before the next.
struct Buffers {
    arena: Vec<u8>,
    places: Vec<(usize, usize)>,
    segment_len: Option<u16>,
    heads: Vec<Vec<u8>>,
}

impl Buffers {
    fn new(tables: &Tables, buffers: &[Vec<Facts>]) -> Self {
        let mut out = Buffers { arena: Vec::new(), places: Vec::new(), segment_len: None, heads: Vec::new() };
        let vxlan = [[8, 0, 0, 0, 0, 0, 1, 0].as_slice(), &tables.local().mac.0, &[2, 0, 0, 0, 0, 9, 8, 0]].concat();
        for packets in buffers {
            let at = out.arena.len();
            for facts in packets {
                out.arena.extend(&vxlan);
                out.arena.extend(facts.bytes());
            }
            let step = ENCAPSULATION + packets[0].bytes().len();
            out.segment_len = (packets.len() > 1).then_some(step as u16);
            out.places.push((at, out.arena.len() - at));
            out.heads.push(out.arena[at..at + 80].to_vec());
        }
        out
    }

    fn receive(&mut self, inbound: &mut Inbound, tables: &Tables, turn: &mut usize, spread: Spread) -> u64 {
        for (&(at, len), head) in self.places.iter().zip(&self.heads) {
            *turn += 1;
            put(&mut self.arena, at, head);
            let (underlay, inner) = big_peer(spread.peer(*turn, tables.peers().len()));
            if matches!(spread, Spread::AllPeers) && self.segment_len.is_none() {
                put(&mut self.arena, at + ENCAPSULATION + V4_SOURCE, &inner.octets());
            }
            let source = if self.segment_len.is_some() { big_peer(1).0 } else { underlay };
            let source = IpAddr::V4(source);
            let received = Received {
                at,
                len,
                segment_len: self.segment_len,
                source: (source, 40_000).into(),
                tos: 0,
                truncated: false,
            };
            inbound.push(tables, 0, &mut self.arena, received);
        }
        inbound.finish(&mut self.arena);
        let mut written = 0;
        for unit in inbound.units() {
            inbound.written(unit, true);
            written += u64::from(unit.segments);
        }
        inbound.clear();
        written
    }
}

fn inbound(c: &mut Criterion) {
    for peers in SIZES {
        let tables = big_mesh(peers);
        let small = |id| Facts { id, ..from_peer(udp(false, 2, 1, payload(SMALL_PAYLOAD))) };
        let small: Vec<_> = (0..SMALL as u16).map(|id| vec![small(id)]).collect();
        let large = from_peer(tcp(false, 2, 1, payload(SEGMENT * SEGMENTS))).segments(SEGMENT);
        let loads = [
            ("64B", Buffers::new(&tables, &small), SMALL, &Spread::BOTH[..]),
            ("64KiB", Buffers::new(&tables, &[large]), SEGMENTS, &Spread::BOTH[..1]),
        ];
        for (load, mut buffers, packets, spreads) in loads {
            let mut group = c.benchmark_group(format!("engine/inbound/{load}"));
            group.throughput(Throughput::Elements(packets as u64));
            for (name, spread) in spreads {
                let mut inbound = Inbound::new(Stats::new(1), 0, ALL);
                let mut turn = 0;
                assert_eq!(buffers.receive(&mut inbound, &tables, &mut turn, *spread), packets as u64);
                group.bench_function(BenchmarkId::new(*name, peers), |b| {
                    b.iter(|| buffers.receive(&mut inbound, &tables, &mut turn, *spread));
                });
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
    targets = outbound, inbound
}
criterion_main!(benches);
