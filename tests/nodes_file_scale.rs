//! A node list as large as they get: within the limits, and in reasonable time.

use std::fmt::Write;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use meshd::control::nodes_file;

#[test]
#[ignore = "slow without optimisation: cargo test --release --test nodes_file_scale -- --ignored --nocapture"]
fn a_hundred_thousand_dual_stack_nodes() {
    let mut text = "nodes:\n".to_owned();
    for i in 0..100_000u32 {
        let [_, b, c, d] = i.to_be_bytes();
        let (low, hi, mid, lo) = (i & 0xffff, i >> 12, (i >> 4) & 255, (i & 15) << 4);
        writeln!(text, "  - name: node-{i}.example.net").unwrap();
        writeln!(text, "    underlay: [172.{}.{c}.{d}, fd00::{b:x}:{low:x}]", 16 + b).unwrap();
        writeln!(text, "    subnets: [10.{hi}.{mid}.{lo}/28, fd42:{b:x}:{low:x}::/64]").unwrap();
    }
    let start = Instant::now();
    let list = nodes_file::parse(text.as_bytes(), NonZeroU16::new(8472).unwrap()).unwrap();
    let took = start.elapsed();
    println!("{} nodes, {} bytes: {took:?}", list.nodes.len(), text.len());
    assert_eq!(list.nodes.len(), 100_000);
    assert!(cfg!(debug_assertions) || took < Duration::from_secs(5), "{took:?}");
}
