//! Foreign members of a cluster: exactly what `meshctl node add` prints is run on a machine without meshd.

use std::net::IpAddr;

use crate::joined::{create, has_peers};
use crate::mesh::{Builder, Mesh, Node, has, has_kernel_vxlan, skipped};
use crate::namespace::run;
use crate::traffic::{ping, tcp};

const MEGABYTE: usize = 1 << 20;

/// A server a, an agent b, an agent c that has not joined yet, and a machine k that is to be a foreign member.
fn cluster(mesh: Builder) -> Mesh {
    let mesh = mesh.server("a").agent("b").agent("c").stranger("k").build();
    mesh.node("a").restart();
    let token = create(mesh.node("a"), &[]);
    for name in ["b", "c"] {
        mesh.node(name).token(Some(&token));
    }
    mesh.node("b").restart();
    has_peers(mesh.node("a"), 1);
    mesh
}

/// Adds k, gives what is printed to a shell there as it stands, and returns its overlay address.
#[track_caller]
fn add(mesh: &Mesh, more: &[&str]) -> IpAddr {
    let [a, k] = mesh.two(["a", "k"]);
    let added = a.ctl(&[&["node", "add", "k", "--underlay", "10.9.0.4"], more].concat());
    assert_eq!(added.code, 0, "{added:?}");
    k.ns.sh(&format!("set -e\n{}", added.out));
    for name in ["a", "b"] {
        has_peers(mesh.node(name), 2);
    }
    let (nodes, named) = (a.json(&["nodes"]), |node: &&serde_json::Value| node["name"] == "k");
    let subnet = nodes.as_array().unwrap().iter().find(named).unwrap()["subnets"][0].as_str().unwrap();
    subnet.parse::<ipnet::IpNet>().unwrap().hosts().next().unwrap()
}

#[track_caller]
fn everybody_talks(mesh: &Mesh, address: IpAddr, nodes: &[&str]) {
    let k = mesh.node("k");
    for node in nodes.iter().map(|name| mesh.node(name)) {
        ping(&k.ns, node.given());
        ping(&node.ns, address);
        tcp(&k.ns, &node.ns, node.given(), MEGABYTE);
        tcp(&node.ns, &k.ns, address, MEGABYTE);
    }
}

/// A node comes; what `node commands` prints then is given to a shell as it stands, over what is there.
#[track_caller]
fn another_comes(mesh: &Mesh, more: &[&str]) {
    let [c, k] = mesh.two(["c", "k"]);
    c.restart();
    has_peers(c, 3);
    let printed = c.ctl(&[&["node", "commands", "k"], more].concat());
    assert_eq!(printed.code, 0, "an agent knows them, too: {printed:?}");
    k.ns.sh(&printed.out);
}

#[track_caller]
fn encryption(node: &Node, of: &str) -> String {
    let peers = node.json(&["peers"]);
    let peer = peers.as_array().unwrap().iter().find(|peer| peer["name"] == of).unwrap().clone();
    peer["encryption"].as_str().unwrap().to_owned()
}

#[test]
fn a_kernel_vxlan_device_joins_by_the_printed_commands() {
    let story = "a_kernel_vxlan_device_joins_by_the_printed_commands";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_kernel_vxlan() {
        return skipped(story, "this kernel has no VXLAN devices");
    }
    let mesh = cluster(mesh);
    let address = add(&mesh, &[]);
    everybody_talks(&mesh, address, &["a", "b"]);
    another_comes(&mesh, &[]);
    everybody_talks(&mesh, address, &["b", "c"]);
    let [a, b] = mesh.two(["a", "b"]);
    assert_eq!((encryption(a, "k"), encryption(a, "b")), ("none".to_owned(), "wireguard".to_owned()));
    let refused = a.ctl(&["node", "commands", "b"]);
    assert!(refused.code == 1 && refused.err.contains("runs meshd"), "{refused:?}");
    let refused = b.ctl(&["node", "commands", "k", "--device", "x;reboot"]);
    assert!(refused.code == 1 && refused.err.contains("interface's name"), "{refused:?}");
    // who is removed is heard no more
    assert_eq!(a.ctl(&["node", "remove", "k"]).code, 0);
    has_peers(b, 2);
    assert!(!crate::traffic::pings(&mesh.node("k").ns, b.given()));
}

/// Ends the implementation of WireGuard that runs in user space.
struct Interface<'n>(&'n Node);

impl Drop for Interface<'_> {
    fn drop(&mut self) {
        self.0.ns.output(&format!("ip link del {}", self.0.wg()));
    }
}

#[test]
fn a_stock_wireguard_peer_joins_by_the_printed_commands() {
    let story = "a_stock_wireguard_peer_joins_by_the_printed_commands";
    let Some(mesh) = Builder::new(story) else { return };
    if let Some(tool) = ["wg", "wireguard-go"].into_iter().find(|tool| !has(tool)) {
        return skipped(story, &format!("`{tool}` is not installed"));
    }
    let mesh = cluster(mesh);
    let k = mesh.node("k");
    let file = k.dir.join("private key");
    run(std::process::Command::new("sh").args(["-ec", "umask 077; wg genkey >\"$0\""]).arg(&file));
    let public = k.ns.sh(&format!("wg pubkey <'{}'", file.display()));
    let wg = k.wg();
    let there = ["--device", &wg, "--private-key-file", file.to_str().unwrap()];
    let _interface = Interface(k);
    let address = add(&mesh, &[&["--public-key", public.trim()][..], &there].concat());
    everybody_talks(&mesh, address, &["a", "b"]);
    another_comes(&mesh, &there);
    everybody_talks(&mesh, address, &["b", "c"]);
    assert_eq!(encryption(mesh.node("b"), "k"), "wireguard");
}
