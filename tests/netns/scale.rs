//! Ten thousand nodes in the list of one. `netns-scripts/scale.sh` does it with a hundred thousand, and measures.

use std::fmt::Write;

use crate::mesh::{Builder, V4};
use crate::namespace::until;
use crate::traffic::{Probe, ping};

const NODES: usize = 10_000;

/// Nodes that are only in the list; `moved` has another address in its second version.
fn others(moved: Option<usize>) -> String {
    let mut list = String::new();
    for i in 0..NODES {
        let (hi, lo) = (i >> 8, i & 255);
        let net = if moved == Some(i) { 21 } else { 20 };
        writeln!(list, "  - name: n{i}\n    underlay: 172.{net}.{hi}.{lo}\n    subnets: [10.{}.{lo}.0/24]", 128 + hi)
            .unwrap();
    }
    list
}

#[test]
fn ten_thousand_nodes() {
    let Some(mesh) = Builder::new("ten_thousand_nodes") else { return };
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    b.restart();
    let own = mesh.list(|_| true);
    let file = mesh.dir().join("many.yaml");
    let write = |text: &str| {
        let new = mesh.dir().join("many.new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, &file).unwrap();
    };
    write(&(own.clone() + &others(None)));
    a.set("nodes-file", file.to_str());
    a.restart();
    ping(&a.ns, b.overlay(V4));
    let endpoint = |name: &str| {
        let peers = a.json(&["peers"]);
        let peers = peers.as_array().unwrap();
        assert_eq!(peers.len(), NODES + 1);
        peers.iter().find(|peer| peer["name"] == name).unwrap()["endpoint"].as_str().unwrap().to_owned()
    };
    assert_eq!(endpoint("n9999"), "172.20.39.15:8472");
    let status = std::fs::read_to_string(format!("/proc/{}/status", a.pid())).unwrap();
    let rss: usize = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(rss < (64 << 10) + 16 * NODES, "{rss} KiB");

    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    write(&(own.clone() + &others(Some(9999))));
    until("the one that moved has moved", || endpoint("n9999") == "172.21.39.15:8472");
    write(&own);
    until("a list without most is held back", || a.reasons().contains("meshctl nodes accept"));
    assert_eq!(endpoint("n1"), "172.20.0.1:8472");
    let (sent, lost) = probe.end();
    assert!(sent > 50 && lost == 0, "{lost} of {sent}");
    mesh.balances();
}
