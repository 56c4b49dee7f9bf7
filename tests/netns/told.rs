//! What meshctl tells of a real mesh.

use std::io::{Read, Write};

use serde_json::Value;

use crate::mesh::{Builder, V4, V6};
use crate::namespace::until;
use crate::traffic::{ping, tcp, udp};

#[track_caller]
fn has_fields(document: &Value, fields: &[&str]) {
    for field in fields {
        assert!(document.get(field).is_some(), "{field}: {document:#}");
    }
}

#[test]
fn documents_have_the_fields_that_scripts_rely_on() {
    let Some(mesh) = Builder::new("documents_have_the_fields_that_scripts_rely_on") else { return };
    let mesh = mesh.node("a").node("b").set("io", "tokio").member("m").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(&a.ns, b.overlay(V4));

    until("it answers", || a.json(&["peers"])[0]["state"] == "up");
    let peers = a.json(&["peers"]);
    let names: Vec<_> = peers.as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["b", "m"]);
    let peer = &peers[0];
    has_fields(peer, &["public_key", "rtt_us", "path_mtu", "tx_bytes", "rx_bytes"]);
    assert_eq!(peer["endpoint"], "10.9.0.2:8472");
    assert_eq!(peer["subnets"], serde_json::json!(["10.42.2.0/24", "fd42:0:0:2::/64"]));
    assert_eq!(peer["mac"], b.mac());
    assert_eq!((&peer["encryption"], &peer["state"]), (&"none".into(), &"up".into()));
    assert_eq!(peers[1]["state"], "unknown", "it never answered");
    assert_eq!((&peer["tx_packets"], &peer["rx_packets"]), (&3.into(), &3.into()));
    assert_eq!((&peer["tx_bytes"], &peer["rx_bytes"]), (&252.into(), &252.into()));
    assert!(peer["last_seen_ms"].as_u64().unwrap() < 20_000);
    assert_eq!(peers[1]["last_seen_ms"], Value::Null);

    let stats = a.stats();
    let fields = ["version", "uptime_ms", "workers", "offload_reasons", "originated", "consumed", "partial_csum_in"];
    has_fields(&stats, &fields);
    assert_eq!(stats["node"], "a");
    for side in ["tun", "udp"] {
        has_fields(&stats[side], &["rx_packets", "rx_bytes", "tx_packets", "tx_bytes"]);
    }
    assert!(["tun_tso", "tun_uso", "udp_gso", "udp_gro"].iter().all(|o| stats["offloads"][o].is_boolean()));
    let drops = [
        "no_route",
        "unknown_source",
        "bad_vxlan_header",
        "wrong_vni",
        "inner_source_not_allowed",
        "udp_queue_overflow",
        "tun_queue_overflow",
    ];
    assert!(drops.iter().all(|drop| stats["drops"][drop] == 0), "{stats:#}");
    let plain = b.stats();
    assert_eq!((&plain["io"], &plain["offloads"]["tun_tso"]), (&"tokio".into(), &false.into()));
    assert!(plain["offload_reasons"]["tun_tso"].as_str().unwrap().contains("plain packets"));

    let status = a.json(&["status"]);
    assert_eq!(status["overlay_addresses"], serde_json::json!(["10.42.1.1", "fd42:0:0:1::1"]));
    assert_eq!((&status["node"], &status["role"]), (&"a".into(), &"run".into()));
    assert_eq!((&status["ready"], &status["mtu"]), (&true.into(), &1450.into()));
    assert_eq!((&status["reasons"], &status["public_key"]), (&serde_json::json!([]), &Value::Null));
    assert_eq!(status["vtep_mac"], a.mac());

    let nodes = a.json(&["nodes"]);
    assert_eq!(nodes.as_array().unwrap().len(), 3);
    let fields = ["name", "id", "role", "state", "underlay", "subnets", "labels", "taints", "joined_at"];
    has_fields(&nodes[0], &fields);
    has_fields(&nodes[0], &["last_heartbeat"]);

    assert_eq!(a.stop(), 0);
    let gone = a.ctl(&["status"]);
    assert_eq!(gone.code, 3, "{gone:?}");
    assert!(gone.err.contains("meshd.sock"), "{gone:?}");
}

/// A super-packet counts as its segments on both sides, so that in a closed mesh of two what one sent the other received.
#[test]
fn what_one_sent_the_other_received() {
    let Some(mesh) = Builder::new("what_one_sent_the_other_received") else { return };
    // what is compared must not grow in between
    let mesh = mesh.node("a").set("bfd", "off").node("b").set("bfd", "off").start();
    let [a, b] = mesh.two(["a", "b"]);
    for family in [V4, V6] {
        ping(&a.ns, b.overlay(family));
        tcp(&a.ns, &b.ns, b.overlay(family), 4 << 20);
        udp(&a.ns, a.overlay(family), &b.ns, b.overlay(family), &[1, 1400, 9000]);
    }
    mesh.balances_with_the_kernel();
    let (sa, sb) = (a.stats(), b.stats());
    assert!(
        sa["offloads"]["tun_tso"] == true && sa["batches"]["tun_reads"].as_u64() < sa["tun"]["rx_packets"].as_u64()
    );
    if sa["drops"]["udp_queue_overflow"] == 0 && sb["drops"]["udp_queue_overflow"] == 0 {
        for what in ["packets", "bytes"] {
            let (tx, rx) = (format!("tx_{what}"), format!("rx_{what}"));
            assert_eq!(sa["udp"][&tx], sb["udp"][&rx], "{what}: {sa:#} {sb:#}");
            assert_eq!(sb["udp"][&tx], sa["udp"][&rx], "{what}: {sa:#} {sb:#}");
        }
    }
    // what each kernel says to all neighbours when a device comes up is dropped before
    let of = |stats: &Value, side: &str, what: &str| stats[side][what].as_u64().unwrap();
    assert_eq!(of(&sa, "tun", "rx_packets") - of(&sa, "outbound", "dropped"), of(&sb, "tun", "tx_packets"));
    let (pa, pb) = (a.json(&["peers"]), b.json(&["peers"]));
    assert_eq!(pa[0]["tx_packets"], sa["udp"]["tx_packets"]);
    assert_eq!(pb[0]["rx_packets"], sa["udp"]["tx_packets"]);
    until("people get a table", || a.ctl(&["peers"]).out.contains("10.9.0.2:8472"));
}

/// Over HTTP, where somebody asked for it, and nowhere else.
#[test]
fn metrics_are_what_meshctl_says() {
    let story = "metrics_are_what_meshctl_says";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").set("metrics-address", "127.0.0.1:9346").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(&a.ns, b.overlay(V4));
    until("it answers", || a.json(&["peers"])[0]["state"] == "up");
    let get = |path: &str| {
        a.ns.enter(|| {
            let mut stream = std::net::TcpStream::connect("127.0.0.1:9346").unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
    };
    let text = get("/metrics");
    assert!(text.starts_with("HTTP/1.1 200") && text.trim_end().ends_with("# EOF"), "{text}");
    for line in [
        "meshd_ready{node=\"a\"} 1",
        "meshd_mtu_bytes{node=\"a\"} 1450",
        "meshd_peer_up{peer=\"b\"} 1",
        "meshd_peer_packets_total{peer=\"b\",direction=\"tx\"} 3",
        "meshd_drops_total{reason=\"no_route\"} 0",
        "meshd_peer_path_mtu_bytes{peer=\"b\"} 1450",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(get("/").starts_with("HTTP/1.1 404"));
    assert!(!a.ns.succeeds("ss -Hltn | grep -v :9346 | grep ."), "no other TCP port");
    assert!(!b.ns.succeeds("ss -Hltn | grep ."), "nor without the key");
}
