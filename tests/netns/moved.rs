//! Servers with an etcd of their own that change while they run: their addresses, the names in their certificates, and the
//! certificates of their etcd.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use base64::Engine as _;
use nix::sys::signal::Signal;

use crate::joined::{create, has_peers};
use crate::mesh::{Mesh, Node, has, skipped};
use crate::servers::{children, good, patiently_ready, three, until_slowly};
use crate::traffic::ping;

/// Three servers and an agent that has joined them.
fn three_and_an_agent(story: &'static str) -> Option<Mesh> {
    if !has("curl") {
        skipped(story, "there is no `curl`");
        return None;
    }
    let mesh = three(story)?;
    let d = mesh.node("d");
    d.token(Some(&create(mesh.node("a"), &[])));
    d.restart();
    has_peers(d, 3);
    Some(mesh)
}

/// Gives the machine another address instead of the one that it has.
fn readdress(node: &Node, from: Ipv4Addr, to: Ipv4Addr) {
    node.ns.sh(&format!(
        "echo 1 >/proc/sys/net/ipv4/conf/ul0/promote_secondaries
         ip addr add {to}/24 dev ul0
         ip addr del {from}/24 dev ul0
         ip route replace default via 10.9.0.254"
    ));
}

fn membership(node: &Node) -> String {
    std::fs::read_to_string(node.dir.join("data/agent/membership.json")).unwrap()
}

#[test]
#[ignore = "a minute and a half: run with --ignored"]
fn servers_change_their_addresses_one_by_one() {
    let Some(mesh) = three_and_an_agent("servers_change_their_addresses_one_by_one") else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    let [d, e] = mesh.two(["d", "e"]);
    let token = create(a, &["--ttl", "1h"]);
    let old = |n: usize| Ipv4Addr::new(10, 9, 0, n as u8 + 1);
    let new = |n: usize| Ipv4Addr::new(10, 9, 0, n as u8 + 101);
    for (n, node) in [a, b, c].into_iter().enumerate() {
        assert_eq!(node.stop(), 0);
        readdress(node, old(n), new(n));
        // the last one says no address, and so follows its interface
        node.set("node-ip", Some(if n == 2 { "ul0".to_owned() } else { new(n).to_string() }.as_str()));
        node.token(None);
        node.spawn();
        patiently_ready(node);
        for node in [a, b, c] {
            good(node, "3 servers, 1 may fail");
        }
    }
    // one that moves under way
    let last = Ipv4Addr::new(10, 9, 0, 113);
    readdress(c, new(2), last);
    until_slowly("it has told the others", c, || c.log().contains("look for this server's at https://10.9.0.113:2380"));
    for node in [a, b, c] {
        good(node, "3 servers, 1 may fail");
        assert!(!node.log().contains("was removed by the others"), "no rejoin");
        until_slowly("only the new addresses are known", node, || {
            let addresses = node.json(&["cluster", "status"])["addresses"].to_string();
            addresses.contains("10.9.0.101:")
                && addresses.contains("10.9.0.102:")
                && addresses.contains("10.9.0.113:")
                && !(0..3).any(|n| addresses.contains(&format!("{}:", old(n))))
        });
    }
    until_slowly("the agent keeps where they are", d, || {
        let kept = membership(d);
        ["101", "102", "113"].iter().all(|n| kept.contains(&format!("https://10.9.0.{n}:9345")))
            && !(1..4).any(|n| kept.contains(&format!("https://10.9.0.{n}:9345")))
    });
    // and by that alone it finds them
    assert_eq!(d.stop(), 0);
    d.token(None);
    d.restart();
    until_slowly("it is connected", d, || d.json(&["status"])["membership"]["connected"] == true);
    has_peers(d, 3);
    for node in [a, b, c] {
        ping(&d.ns, node.given());
    }
    // a token of before says where no server is any more; a new one does
    e.token(Some(&create(b, &[])));
    e.restart();
    has_peers(e, 4);
    let servers = |token: &str| token.parse::<meshd::membership::token::Token>().unwrap().servers;
    assert!(servers(&token).iter().all(|server| server.host() != "10.9.0.101"));
}
