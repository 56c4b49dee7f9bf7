//! What encryption costs: the AEAD alone, and a whole message through a tunnel. One session, one core.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use meshd::engine::testing::{connect, encrypted_mesh, payload, udp};
use meshd::engine::tunnel::{Outbox, Policy};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

const LENGTHS: [usize; 3] = [64, 1400, 8900];

/// ChaCha20-Poly1305 (RFC 8439) as tunnels call it.
fn aead(c: &mut Criterion) {
    let mut group = c.benchmark_group("crypto/ring");
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).unwrap());
    for len in LENGTHS {
        group.throughput(Throughput::Bytes(len as u64));
        let (mut data, mut counter) = (payload(len), 0u64);
        group.bench_function(BenchmarkId::new("seal", len), |b| {
            b.iter(|| {
                counter += 1;
                key.seal_in_place_separate_tag(nonce(counter), Aad::empty(), black_box(&mut data)).unwrap()
            });
        });
        let mut sealed = payload(len);
        key.seal_in_place_append_tag(nonce(0), Aad::empty(), &mut sealed).unwrap();
        let mut room = sealed.clone();
        group.bench_function(BenchmarkId::new("open", len), |b| {
            b.iter(|| {
                room.copy_from_slice(&sealed);
                key.open_in_place(nonce(0), Aad::empty(), black_box(&mut room)).unwrap().len()
            });
        });
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

fn tunnel(c: &mut Criterion) {
    let mut group = c.benchmark_group("crypto/tunnel");
    let [a, b] = [1, 2].map(|node| encrypted_mesh(node, 1, Policy::Required));
    connect(&a, &b);
    let (to_b, to_a) = (a.source([10, 9, 0, 2].into()).unwrap(), b.source([10, 9, 0, 1].into()).unwrap());
    let (from_a, from_b) = (a.tunnel(to_b).unwrap(), b.tunnel(to_a).unwrap());
    for len in LENGTHS {
        let packet = udp(false, 1, 2, payload(len - 28)).bytes();
        group.throughput(Throughput::Bytes(len as u64));
        let mut sealed = Vec::new();
        group.bench_function(BenchmarkId::new("seal", len), |bench| {
            bench.iter(|| {
                sealed.clear();
                from_a.lane(to_b, 0).seal(black_box(&packet), &mut sealed)
            });
        });
        let mut outbox = Outbox::default();
        group.bench_function(BenchmarkId::new("open", len), |bench| {
            let fresh = || {
                let mut sealed = Vec::new();
                from_a.lane(to_b, 0).seal(&packet, &mut sealed).unwrap();
                sealed
            };
            let source = ([10, 9, 0, 1], 8472).into();
            bench.iter_batched(
                fresh,
                |mut sealed| {
                    let index = u32::from_le_bytes(sealed[4..8].try_into().unwrap());
                    from_b.lane(to_a, 0).open(index, &mut sealed, source, 0, 1, &mut outbox).unwrap();
                    sealed
                },
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = aead, tunnel
}
criterion_main!(benches);
