//! Preshared keys: between meshd nodes and with another implementation; with the wrong one nothing comes up, and who has it
//! is told so.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::mesh::{Builder, Node, V4, has, skipped};
use crate::namespace::until;
use crate::traffic::{ping, pings, tcp};

const MEGABYTE: usize = 1 << 20;
const RIGHT: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
const WRONG: &str = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";

#[test]
fn a_preshared_key_has_to_be_right_on_both_sides() {
    let story = "a_preshared_key_has_to_be_right_on_both_sides";
    let Some(mesh) = Builder::new(story) else { return };
    if let Some(tool) = ["wireguard-go", "wg"].into_iter().find(|tool| !has(tool)) {
        return skipped(story, &format!("`{tool}` is not installed"));
    }
    let mesh = mesh.encrypted().node("a").wireguard("w", "wireguard-go").node("c").build();
    let [a, w, c] = mesh.three(["a", "w", "c"]);
    let (right, wrong) = (mesh.dir().join("right.psk"), mesh.dir().join("wrong.psk"));
    write(&right, RIGHT, 0o600);
    write(&wrong, WRONG, 0o600);
    // one list for all: each pair has the same key
    let list = mesh.list(|_| true).replace("    mac:", "    preshared-key-file: right.psk\n    mac:");
    mesh.write_nodes(&list);
    let knows = |peer: &Node, key: &Path| {
        w.ns.sh(&format!("wg set {} peer {} preshared-key {}", w.wg(), peer.public_key(), key.display()));
    };
    knows(a, &right);
    knows(c, &wrong);
    mesh.start();

    // c asks w, and w answers with the wrong key; a does better
    assert!(!pings(&c.ns, w.overlay(V4)));
    until("c says why", || c.log().contains("node w answers handshakes as a peer with another preshared key"));
    assert!(view(c, "w")["session"]["handshake_age_ms"].is_null());
    let why = c.ctl(&["why", &w.overlay(V4).to_string()]);
    assert!(why.code == 1 && why.out.contains("another preshared key"), "{why:?}");
    ping(&a.ns, w.overlay(V4));
    tcp(&w.ns, &a.ns, a.overlay(V4), MEGABYTE);
    ping(&a.ns, c.overlay(V4));
    tcp(&c.ns, &a.ns, a.overlay(V4), MEGABYTE);
    assert!(!a.log().contains("another preshared key"), "{}", a.log());
    // and once the keys are the same
    knows(c, &right);
    until("c has a session with w", || pings(&c.ns, w.overlay(V4)));
    tcp(&c.ns, &w.ns, w.overlay(V4), MEGABYTE);

    // another key in the list is another tunnel: sessions with the former go on until the new has one, and w refuses that
    mesh.write_nodes(&list.replacen("right.psk", "wrong.psk", 1));
    until("it is taken over", || c.log().contains("node a answers handshakes as a peer with another preshared key"));
    mesh.write_nodes(&list);
    until("and back", || pings(&c.ns, a.overlay(V4)));

    // nowhere to be read
    for node in [a, c] {
        assert_eq!(view(node, "w")["preshared"], true);
        let shown = ["peers", "status", "stats", "nodes"].map(|what| node.json(&[what]).to_string()).concat();
        for secret in [RIGHT, WRONG] {
            assert!(!shown.contains(secret) && !node.log().contains(secret));
        }
    }
    mesh.balances();
}

#[test]
fn a_preshared_key_that_others_may_read_is_refused() {
    let Some(mesh) = Builder::new("a_preshared_key_that_others_may_read_is_refused") else { return };
    let mesh = mesh.encrypted().node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    let list = mesh.list(|_| true);
    let refused = |words: &[&str]| {
        let run = a.try_meshd("run");
        assert_eq!(run.code, 2, "{run:?}");
        assert!(words.iter().all(|word| run.err.contains(word)) && !run.err.contains(RIGHT), "{words:?} {run:?}");
    };
    let key = mesh.dir().join("psk");
    mesh.write_nodes(&list.replace("    mac:", "    preshared-key-file: psk\n    mac:"));
    refused(&["node `a`", "psk"]);
    write(&key, RIGHT, 0o644);
    refused(&["others may read the preshared key", "chmod 600"]);
    write(&key, "short", 0o600);
    refused(&["no preshared key", "wg genpsk"]);
    // in the list itself
    let within = list.replace("    mac:", &format!("    preshared-key: {RIGHT}\n    mac:"));
    mesh.write_nodes(&within);
    refused(&["others may read it", "chmod 600", "preshared-key-file"]);
    fs::set_permissions(mesh.dir().join("nodes.yaml"), fs::Permissions::from_mode(0o600)).unwrap();
    mesh.start();
    ping(&a.ns, b.overlay(V4));
    assert_eq!(view(a, "b")["preshared"], true);
    mesh.balances();
}

fn write(file: &Path, key: &str, mode: u32) {
    fs::write(file, format!("{key}\n")).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
}

#[track_caller]
fn view(node: &Node, peer: &str) -> serde_json::Value {
    let peers = node.json(&["peers"]);
    peers.as_array().unwrap().iter().find(|view| view["name"] == peer).unwrap().clone()
}
