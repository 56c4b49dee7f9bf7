//! What it costs to read bytes: checksums and headers.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use meshd::engine::testing::{Facts, encapsulate, payload, tcp};
use meshd::wire::checksum::Sum;
use meshd::wire::ip::Packet;
use meshd::wire::{ethernet, vxlan};
use zerocopy::FromBytes;

fn checksum(c: &mut Criterion) {
    let mut group = c.benchmark_group("wire/checksum");
    for len in [64, 1400, 65_536] {
        let data = payload(len);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::from_parameter(len), |b| {
            b.iter(|| Sum::default().bytes(black_box(&data)).finish());
        });
    }
}

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("wire/parse");
    group.throughput(Throughput::Elements(1));
    let extensions = vec![(0, vec![0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 1, 4, 0, 0, 0, 0])];
    let v6 = tcp(true, 1, 2, payload(64));
    let packets = [
        ("ipv4", tcp(false, 1, 2, payload(64)).bytes()),
        ("ipv6", v6.bytes()),
        ("ipv6-extensions", Facts { extensions, ..v6 }.bytes()),
    ];
    for (name, packet) in &packets {
        group.bench_function(*name, |b| b.iter(|| Packet::parse(black_box(packet))));
    }
    let datagram = encapsulate(1, 2, &packets[0].1);
    group.bench_function("vxlan-ethernet-ipv4", |b| {
        b.iter(|| {
            let (vxlan, frame) = vxlan::Header::ref_from_prefix(black_box(&datagram)).ok()?;
            let (ethernet, inner) = ethernet::Header::ref_from_prefix(frame).ok()?;
            Some((vxlan.vni(), ethernet.ether_type.get(), Packet::parse(inner).ok()?))
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500));
    targets = checksum, parse
}
criterion_main!(benches);
