//! What the peer table costs: a look-up, building one, putting one in the place of another.

use std::hint::black_box;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use meshd::engine::tables::{PeerIndex, Tables};
use meshd::engine::testing::{big_mesh, big_peer, big_peer_spec};

const SIZES: [usize; 3] = [10, 10_000, 100_000];
/// Look-ups in one iteration, each for another peer, in an order that no prefetcher guesses.
const LOOKUPS: usize = 1024;

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("tables/lookup");
    group.throughput(Throughput::Elements(LOOKUPS as u64));
    for peers in SIZES {
        let tables = big_mesh(peers);
        let picks: Vec<usize> = (0..LOOKUPS).map(|i| 1 + i * 7919 % peers).collect();
        let v4: Vec<IpAddr> = picks.iter().map(|i| big_peer(*i).1.into()).collect();
        let v6: Vec<IpAddr> = picks.iter().filter_map(|i| Some(big_peer_spec(*i).subnets.get(1)?.addr())).collect();
        let underlay: Vec<IpAddr> = picks.iter().map(|i| big_peer(*i).0.into()).collect();
        let mut bench = |name, addresses: &[IpAddr], ask: &dyn Fn(IpAddr) -> Option<PeerIndex>| {
            group.bench_function(BenchmarkId::new(name, peers), |b| {
                b.iter(|| addresses.iter().filter(|ip| ask(black_box(**ip)).is_some()).count());
            });
        };
        bench("route-v4", &v4, &|ip| tables.route(ip));
        bench("route-v6", &v6, &|ip| tables.route(ip));
        bench("source", &underlay, &|ip| tables.source(ip));
    }
}

fn build_and_swap(c: &mut Criterion) {
    let mut group = c.benchmark_group("tables");
    group.sample_size(10);
    let peers = 100_000;
    let tables = big_mesh(peers);
    let specs: Vec<_> = (1..=peers).map(big_peer_spec).collect();
    let build = || Tables::new(tables.local().clone(), specs.clone());
    group.throughput(Throughput::Elements(peers as u64));
    group.bench_function(BenchmarkId::new("build", peers), |b| {
        b.iter_batched(
            || (tables.local().clone(), specs.clone()),
            |(local, specs)| Tables::new(local, specs),
            BatchSize::PerIteration,
        );
    });
    group.throughput(Throughput::Elements(1));
    let two = [Arc::new(build()), Arc::new(build())];
    let shared = Arc::new(ArcSwap::new(two[0].clone()));
    let mut reader = Cache::new(shared.clone());
    let mut turn = 0;
    group.bench_function(BenchmarkId::new("swap-and-see", peers), |b| {
        b.iter(|| {
            turn ^= 1;
            shared.store(two[turn].clone());
            reader.load().peers().len()
        });
    });
    group.bench_function(BenchmarkId::new("load", peers), |b| b.iter(|| reader.load().peers().len()));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
    targets = lookup, build_and_swap
}
criterion_main!(benches);
