//! `meshctl why` and `meshctl key show` tell what is true: each fault is made, found and named, and gone when it is mended.

use std::net::UdpSocket;

use serde_json::Value;

use crate::mesh::{Builder, MESHCTL, Node, Run, V4, V6, has, skipped, tshark};
use crate::namespace::until;
use crate::traffic::{Capture, ping};

/// Exit code, and the first thing that is wrong.
#[track_caller]
fn why(node: &Node, destination: &str) -> (i32, String, Value) {
    let code = node.ctl(&["why", destination]).code;
    let view = node.json(&["why", destination]);
    let findings = view["findings"].as_array().unwrap();
    let wrong = findings.iter().find(|finding| finding["bad"] == true).map_or("", |f| f["kind"].as_str().unwrap());
    (code, wrong.to_owned(), view.clone())
}

#[track_caller]
fn good(node: &Node, destination: &str) -> Value {
    let (code, wrong, view) = why(node, destination);
    assert_eq!((code, wrong.as_str()), (0, ""), "{view:#}");
    view
}

#[track_caller]
fn bad(node: &Node, destination: &str, kind: &str) -> Value {
    let (code, wrong, view) = why(node, destination);
    assert_eq!((code, wrong.as_str()), (1, kind), "{view:#}");
    view
}

/// What to do about the first thing that is wrong.
#[track_caller]
fn fix(view: &Value) -> &str {
    let findings = view["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["bad"] == true).and_then(|f| f["fix"].as_str()).unwrap()
}

#[test]
fn why_finds_the_route_that_wins() {
    let Some(mesh) = Builder::new("why_finds_the_route_that_wins") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    for family in [V4, V6] {
        let to = b.overlay(family).to_string();
        let view = good(a, &to);
        assert_eq!(view["route"]["device"], "mesh0", "{view:#}");
        assert_eq!(view["peer"]["name"], "b");
        assert_eq!(view["source"], a.overlay(family).to_string());
        ping(&a.ns, b.overlay(family));
    }
    assert_eq!(good(a, "b")["destination"], b.overlay(V4).to_string(), "a name means the node's address");

    for (family, stolen) in [(V4, "10.42.2.0/25"), (V6, "fd42:0:0:2::/65")] {
        let to = b.overlay(family).to_string();
        a.ns.sh(&format!("ip route add {stolen} dev ul0 proto static"));
        let view = bad(a, &to, "route_elsewhere");
        assert!(view["verdict"].as_str().unwrap().contains(&format!("{stolen} dev ul0 proto static")), "{view:#}");
        a.ns.sh(fix(&view));
        good(a, &to);
        a.ns.sh(&format!("ip route add unreachable {stolen} metric 5"));
        let view = bad(a, &to, "route_elsewhere");
        a.ns.sh(fix(&view));
        good(a, &to);
    }

    bad(a, "10.43.0.1", "no_peer");
    bad(a, &a.overlay(V4).to_string(), "own_address");
    bad(a, "a", "own_address");
    bad(a, "10.42.1.77", "own_subnet");
    bad(a, "10.9.0.2", "underlay_address");
    bad(a, "nobody", "no_such_node");
    let none = a.ctl(&["key", "show"]);
    assert_eq!((none.code, none.out.as_str()), (1, ""), "{none:?}");
}

#[test]
fn why_finds_the_session_that_is_missing() {
    let Some(mesh) = Builder::new("why_finds_the_session_that_is_missing") else { return };
    let mesh = mesh.encrypted().node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    a.restart();
    until("a handshake has been tried", || a.json(&["why", "b"])["findings"][0]["kind"] == "no_session");
    let view = bad(a, "b", "no_session");
    assert!(fix(&view).contains(&b.public_key()), "{view:#}");
    b.restart();
    until("there is a session", || a.json(&["why", "b"])["good"] == true);
    ping(&a.ns, b.overlay(V4));
    let view = good(a, "b");
    assert_eq!(view["peer"]["encryption"], "wireguard");
    assert!(view["peer"]["session"]["handshake_age_ms"].is_u64(), "{view:#}");
    assert_eq!(view["outer"]["layers"][2]["layer"], "wireguard");
    for node in [a, b] {
        assert_eq!(node.ctl(&["key", "show"]).out, format!("{}\n", node.public_key()));
    }
}

#[test]
fn ping_counts_what_comes_back() {
    let Some(mesh) = Builder::new("ping_counts_what_comes_back") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let ctl = |to: &str| {
        let mut command = a.ns.command(MESHCTL);
        command.arg("--socket").arg(a.socket()).args(["ping", to, "--json", "--count", "2", "--timeout", "2s"]);
        Run::of(command)
    };
    for to in ["b".to_owned(), b.overlay(V6).to_string()] {
        let run = ctl(&to);
        let view: Value = serde_json::from_str(&run.out).unwrap_or_else(|error| panic!("{error}: {run:?}"));
        assert_eq!((run.code, &view["good"]), (0, &Value::Bool(true)), "{view:#}");
        let sizes = view["sizes"].as_array().unwrap();
        let longest = if to == "b" { 1450 - 28 } else { 1450 - 48 };
        assert_eq!(sizes.last().unwrap()["payload"], longest, "{view:#}");
        assert!(sizes.iter().all(|row| row["received"] == 2 && row["min_us"].is_u64()), "{view:#}");
    }
    // long packets get lost on the way: a black hole that short ones do not see
    if !has("nft") {
        return skipped("ping_counts_what_comes_back", "`nft` is not installed");
    }
    b.ns.sh("nft add table inet t; nft add chain inet t in '{ type filter hook input priority 0; }'
         nft add rule inet t in udp dport 8472 udp length 1000-2000 drop");
    let run = ctl("b");
    let view: Value = serde_json::from_str(&run.out).unwrap_or_else(|error| panic!("{error}: {run:?}"));
    assert_eq!((run.code, &view["good"]), (1, &Value::Bool(false)), "{view:#}");
    let sizes = view["sizes"].as_array().unwrap();
    assert_eq!((&sizes[0]["received"], &sizes[3]["received"]), (&2.into(), &0.into()), "{view:#}");
    assert_eq!(ctl("10.43.0.1").code, 1);
}

#[test]
fn the_outer_header_is_the_one_on_the_wire() {
    let story = "the_outer_header_is_the_one_on_the_wire";
    let Some(mesh) = Builder::new(story) else { return };
    if let Some(tool) = ["tshark", "tcpdump"].into_iter().find(|tool| !has(tool)) {
        return skipped(story, &format!("`{tool}` is not installed"));
    }
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let to = b.overlay(V4);
    let capture = Capture::start(&a.ns, "ul0", "udp and src host 10.9.0.1", &mesh.dir().join("outer.pcap"));
    let socket: UdpSocket = a.ns.udp(a.overlay(V4), 4001);
    socket.send_to(&[], (to, 5001)).unwrap();
    let flow = ["why", &to.to_string(), "--proto", "udp", "--sport", "4001", "--dport", "5001"];
    until("it left", || a.json(&flow)["peer"]["tx_packets"] != 0);
    let view = a.json(&flow);
    std::thread::sleep(std::time::Duration::from_millis(200));
    let fields =
        ["udp.srcport", "udp.dstport", "ip.ttl", "ip.flags.df", "vxlan.vni", "eth.dst", "ip.id", "udp.checksum"];
    let rows = tshark(&capture.end(), &fields);
    let row = rows.iter().find(|row| row[0].ends_with(",4001")).unwrap_or_else(|| panic!("{rows:?}"));
    let layer = |name: &str| {
        let layers = view["outer"]["layers"].as_array().unwrap();
        layers.iter().find(|layer| layer["layer"] == name).unwrap_or_else(|| panic!("{name}: {view:#}"))["fields"]
            .clone()
    };
    let text = |name: &str, field: &str| layer(name)[field].as_str().unwrap().to_owned();
    assert_eq!(row[0], format!("{},4001", text("udp", "source_port")), "{view:#}");
    assert_eq!(row[1], "8472,5001");
    assert_eq!(row[2].split(',').next(), Some(text("ipv4", "ttl").as_str()));
    assert_eq!(row[4], text("vxlan", "vni"));
    assert!(row[5].ends_with(&text("ethernet", "destination")), "{row:?}");
    assert_eq!(
        row[6].split(',').next().map(|id| u16::from_str_radix(&id[2..], 16).unwrap().to_string()),
        Some(text("ipv4", "id"))
    );
}
