//! WireGuard and VXLAN on the one port: meshd nodes, other implementations, and what must never be seen in clear.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use meshd::engine::tables::PeerIndex;
use meshd::engine::tunnel::{Identity, Outbox, Policy, Tunnel};
use meshd::key::SecretKey;
use nix::sys::signal::Signal;

use crate::carried::everything_between;
use crate::mesh::{Builder, Node, Run, V4, V6, has, skipped};
use crate::namespace::until;
use crate::traffic::{Capture, Probe, ping, pings, tcp, udp};

const MEGABYTE: usize = 1 << 20;

#[test]
fn two_encrypted_nodes_over_ipv4() {
    let Some(mesh) = Builder::new("two_encrypted_nodes_over_ipv4") else { return };
    let mesh = mesh.encrypted().node("a").set("io", "mmsg").node("b").set("io", "mmsg").start();
    let capture = Capture::start(&mesh.node("a").ns, "ul0", "udp port 8472", &mesh.dir().join("wire.pcap"));
    everything_between(&mesh, "a", "b");
    only_wireguard(capture);
    let [a, b] = mesh.two(["a", "b"]);
    let peer = &a.json(&["peers"])[0];
    assert_eq!((&peer["encryption"], &peer["public_key"]), (&"wireguard".into(), &b.public_key().into()));
    assert_eq!(peer["session"]["lanes"], 2, "{peer:#}");
    assert!(peer["session"]["handshake_age_ms"].is_u64(), "{peer:#}");
    assert_eq!(peer["path_mtu"], 1440);
    assert_eq!(a.json(&["status"])["public_key"], a.public_key());
    let device = a.ns.sh("ip -o link show mesh0");
    assert!(device.contains("mtu 1440 "), "60 bytes less than the underlay: {device}");
}

#[test]
fn two_encrypted_nodes_over_ipv6() {
    let Some(mesh) = Builder::new("two_encrypted_nodes_over_ipv6") else { return };
    let mesh = mesh.encrypted().over(V6).node("a").node("b").set("io", "tokio").start();
    everything_between(&mesh, "a", "b");
    assert_eq!(mesh.node("a").json(&["peers"])[0]["path_mtu"], 1420);
}

#[test]
fn encrypted_nodes_and_a_kernel_vxlan_device_in_one_mesh() {
    let Some(mesh) = Builder::new("encrypted_nodes_and_a_kernel_vxlan_device_in_one_mesh") else { return };
    let mesh = mesh.encrypted().node("a").node("b").kernel("k").start();
    let [a, b, k] = mesh.three(["a", "b", "k"]);
    everything_between(&mesh, "a", "b");
    for family in [V4, V6] {
        ping(&k.ns, a.overlay(family));
        tcp(&a.ns, &k.ns, k.overlay(family), MEGABYTE);
        tcp(&k.ns, &b.ns, b.overlay(family), MEGABYTE);
    }
    let encryption = |peer: &str| {
        let peers = a.json(&["peers"]);
        let peer = peers.as_array().unwrap().iter().find(|p| p["name"] == peer).unwrap().clone();
        peer["encryption"].as_str().unwrap().to_owned()
    };
    assert_eq!((encryption("b"), encryption("k")), ("wireguard".to_owned(), "none".to_owned()));
    mesh.balances();
}

#[test]
fn wireguard_go_is_a_member() {
    other_implementation("wireguard-go");
}

#[test]
fn boringtun_cli_is_a_member() {
    other_implementation("boringtun-cli");
}

/// Pings and streams both ways, each side as the one that begins; then either side restarts, then the other one moves.
#[track_caller]
fn other_implementation(program: &'static str) {
    let Some(mesh) = Builder::new("another_implementation_is_a_member") else { return };
    if let Some(tool) = [program, "wg"].into_iter().find(|tool| !has(tool)) {
        return skipped("another_implementation_is_a_member", &format!("`{tool}` is not installed"));
    }
    let mesh = mesh.encrypted().node("a").wireguard("w", program).node("c").start();
    let [a, w, c] = mesh.three(["a", "w", "c"]);
    // meshd begins with one, is begun with by the other
    ping(&a.ns, w.overlay(V4));
    ping(&w.ns, c.overlay(V4));
    for family in [V4, V6] {
        for (from, to) in [(a, w), (w, a), (c, w), (w, c)] {
            ping(&from.ns, to.overlay(family));
            tcp(&from.ns, &to.ns, to.overlay(family), MEGABYTE);
        }
        udp(&a.ns, a.overlay(family), &w.ns, w.overlay(family), &[0, 1, 64, 1400, 9000]);
    }
    // it is heard from another port: meshd follows
    w.ns.sh(&format!("wg set {} listen-port 9999", w.wg()));
    ping(&w.ns, a.overlay(V4));
    assert_eq!(endpoint(a, "w"), "10.9.0.2:9999");
    tcp(&a.ns, &w.ns, w.overlay(V4), MEGABYTE);
    w.ns.sh(&format!("wg set {} listen-port 8472", w.wg()));
    ping(&w.ns, a.overlay(V4));
    // meshd restarts: its peer still has a session that nobody knows any more
    a.kill();
    a.restart();
    until("the tunnel is mended", || pings(&w.ns, a.overlay(V4)));
    tcp(&a.ns, &w.ns, w.overlay(V4), MEGABYTE);
    // the other side restarts
    w.kill();
    w.start_wireguard(program, &[a, c], 1500);
    until("the tunnel is mended", || pings(&a.ns, w.overlay(V4)));
    tcp(&w.ns, &a.ns, a.overlay(V4), MEGABYTE);
    mesh.balances();
}

#[track_caller]
fn endpoint(node: &Node, peer: &str) -> String {
    let peers = node.json(&["peers"]);
    let peer = peers.as_array().unwrap().iter().find(|p| p["name"] == peer).unwrap();
    peer["endpoint"].as_str().unwrap().to_owned()
}

/// From the moment on at which meshd has set up the host, with and without a peer that answers, nothing of the overlay is
/// to be seen on the underlay; the same without encryption is.
#[test]
fn nothing_is_ever_seen_in_clear() {
    const PATTERN: &str = "5ec7e75ec7e7";
    for encrypted in [true, false] {
        let Some(mesh) = Builder::new("nothing_is_ever_seen_in_clear") else { return };
        let mesh = if encrypted { mesh.encrypted() } else { mesh };
        let mesh = mesh.node("a").node("b").member("nobody").build();
        let [a, b, nobody] = mesh.three(["a", "b", "nobody"]);
        let capture = Capture::start(&mesh.switch, "br0", "udp or icmp", &mesh.dir().join("wire.pcap"));
        let (peer, nobody): (IpAddr, IpAddr) = (b.overlay(V4), nobody.overlay(V4));
        a.spawn();
        until("a has set up the host", || a.ns.succeeds("ip route get 10.42.2.1 | grep mesh0"));
        let talk = |to: IpAddr, count: u32| {
            a.ns.output(&format!("ping -q -n -c {count} -i 0.02 -W 0.1 -p {PATTERN} {to}"));
        };
        std::thread::scope(|scope| {
            // b is not there yet, comes, goes, comes again
            let talking = scope.spawn(|| (0..8).for_each(|_| talk(peer, 10)));
            talk(nobody, 5);
            b.spawn();
            b.ready();
            b.kill();
            b.restart();
            talking.join().unwrap();
        });
        until("they talk", || pings(&a.ns, peer));
        talk(peer, 5);
        let bytes = std::fs::read(capture.end()).unwrap();
        let seen = bytes.windows(6).any(|bytes| bytes == [0x5e, 0xc7, 0xe7, 0x5e, 0xc7, 0xe7]);
        assert_eq!(seen, !encrypted, "encrypted: {encrypted}");
    }
}

#[test]
fn a_restart_under_traffic_heals_by_itself() {
    let Some(mesh) = Builder::new("a_restart_under_traffic_heals_by_itself") else { return };
    let mesh = mesh.encrypted().node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    for _ in 0..2 {
        let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
        until("traffic runs", || a.json(&["peers"])[0]["rx_packets"].as_u64() > Some(20));
        b.kill();
        b.restart();
        until("b hears a again", || b.json(&["peers"])[0]["rx_packets"].as_u64() > Some(5));
        ping(&a.ns, b.overlay(V4));
        ping(&b.ns, a.overlay(V6));
        probe.end();
    }
    tcp(&a.ns, &b.ns, b.overlay(V4), MEGABYTE);
}

#[test]
fn a_live_mesh_becomes_encrypted_a_node_at_a_time_without_a_loss() {
    let Some(mesh) = Builder::new("a_live_mesh_becomes_encrypted_a_node_at_a_time_without_a_loss") else { return };
    let mesh = mesh.encrypted().node("a").set("encryption", "none").node("b").set("encryption", "none").start();
    let [a, b] = mesh.two(["a", "b"]);
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    let encryption = |node: &Node| node.json(&["peers"])[0]["encryption"].as_str().unwrap().to_owned();
    until("traffic runs", || a.json(&["peers"])[0]["rx_packets"].as_u64() > Some(20));
    assert_eq!((encryption(a), encryption(b)), ("none".to_owned(), "none".to_owned()));
    let say = |names: &[&str]| {
        let entry = |node: &Node| {
            let own = if names.contains(&node.name) { "wireguard" } else { "none" };
            format!("{}    encryption: {own}\n", node.entry())
        };
        mesh.write_nodes(&format!("nodes:\n{}{}", entry(a), entry(b)));
    };
    say(&["a"]);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!((encryption(a), encryption(b)), ("none".to_owned(), "none".to_owned()), "one of two is not enough");
    say(&["a", "b"]);
    until("both encrypt", || encryption(a) == "wireguard" && encryption(b) == "wireguard");
    let capture = Capture::start(&a.ns, "ul0", "udp port 8472", &mesh.dir().join("wire.pcap"));
    std::thread::sleep(std::time::Duration::from_millis(1500));
    only_wireguard(capture);
    let (sent, lost) = probe.end();
    assert!(sent > 100 && lost == 0, "{lost} of {sent} lost");
    mesh.balances();
}

/// Initiations that are valid for a node's key, from somebody who is no member, at as many addresses as he likes.
pub(crate) struct Flood {
    initiations: Vec<Vec<u8>>,
    sockets: Vec<UdpSocket>,
    target: SocketAddr,
}

impl Flood {
    pub(crate) fn new(from: &Node, victim: &Node) -> Self {
        const ADDRESSES: u8 = 50;
        let attacker = Arc::new(Identity::new(&SecretKey::generate().unwrap(), 1));
        let key = victim.public_key().parse().unwrap();
        let target = SocketAddr::new(victim.underlay(V4), 8472);
        let initiations = (0..500).map(|slot| {
            let tunnel = Tunnel::new(slot, attacker.clone(), &[key], target, None, Policy::Required);
            let mut outbox = Outbox::default();
            tunnel.lane(PeerIndex(0), 0).start(0, 1, &mut outbox);
            outbox.letters().map(|(_, bytes)| bytes.to_vec()).next().unwrap()
        });
        let sockets = (0..ADDRESSES).map(|n| {
            let ip = IpAddr::from([10, 9, 0, 100 + n]);
            from.ns.sh(&format!("ip addr add {ip}/24 dev ul0"));
            from.ns.udp(ip, 0)
        });
        Flood { initiations: initiations.collect(), sockets: sockets.collect(), target }
    }

    /// As fast as it goes, and at most 50,000 a second. Returns how many left.
    pub(crate) fn run(&self, seconds: f64) -> u64 {
        let start = std::time::Instant::now();
        let mut sent = 0u64;
        while start.elapsed().as_secs_f64() < seconds {
            if sent as f64 > start.elapsed().as_secs_f64() * 50_000.0 {
                std::thread::sleep(std::time::Duration::from_millis(1));
                continue;
            }
            for (initiation, socket) in self.initiations.iter().zip(self.sockets.iter().cycle()) {
                sent += u64::from(socket.send_to(initiation, self.target).is_ok());
            }
        }
        sent
    }
}

/// Whoever has a session does not feel a flood of handshakes, and who needs a new one gets it.
#[test]
fn a_flood_of_handshakes_is_not_felt() {
    let Some(mesh) = Builder::new("a_flood_of_handshakes_is_not_felt") else { return };
    let mesh = mesh.encrypted().node("a").node("b").stranger("s").start();
    let [a, b, s] = mesh.three(["a", "b", "s"]);
    ping(&a.ns, b.overlay(V4));
    let flood = Flood::new(s, a);
    let before = a.stats();
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    let sent = flood.run(2.0);
    let (asked, lost) = probe.end();
    let stats = a.stats();
    let of = |name: &str| stats["drops"][name].as_u64().unwrap() - before["drops"][name].as_u64().unwrap();
    let consumed = stats["inbound"]["consumed"].as_u64().unwrap() - before["inbound"]["consumed"].as_u64().unwrap();
    let seen = of("handshake_refused") + of("handshake_limited") + of("udp_queue_overflow") + consumed;
    // a busy machine's kernel may drop many before they are anybody's
    assert!(sent > 5_000 && seen > 2_000, "{seen} of {sent}");
    assert!(asked > 0 && lost * 100 <= asked.max(100), "{lost} of {asked} lost");
    // a member that needs a session while it goes on
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run(6.0));
        b.kill();
        b.restart();
        until("b is back", || pings(&b.ns, a.overlay(V4)));
        flooding.join().unwrap();
    });
    mesh.balances();
}

#[test]
fn a_key_is_changed_without_a_loss() {
    let Some(mesh) = Builder::new("a_key_is_changed_without_a_loss") else { return };
    let mesh = mesh.encrypted().node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    until("traffic runs", || a.json(&["peers"])[0]["rx_packets"].as_u64() > Some(20));
    // the new key first, then the list; b reads it when it is told to
    let new = SecretKey::generate().unwrap();
    std::fs::write(b.dir.join("data/node.key"), new.to_base64().as_bytes()).unwrap();
    b.signal(Signal::SIGHUP);
    until("b has the new key", || b.json(&["status"])["public_key"] == new.public().to_string());
    let lines = mesh.list(|_| true);
    let list = lines.lines().map(|line| match line.contains(&b.public_key()) {
        true => format!("    public-key: {}\n", new.public()),
        false => format!("{line}\n"),
    });
    // the lane keys go with the key
    let list = list.collect::<String>().replace(&b.lane_key(), &new.lane(1).public().to_string());
    std::thread::sleep(std::time::Duration::from_millis(500));
    mesh.write_nodes(&list);
    let shown = || a.json(&["peers"])[0]["public_key"] == new.public().to_string();
    until("a has taken it over", shown);
    until("by a session of its own", || a.json(&["peers"])[0]["session"]["handshake_age_ms"].is_u64());
    std::thread::sleep(std::time::Duration::from_millis(500));
    let (sent, lost) = probe.end();
    assert!(sent > 20 && lost == 0, "{lost} of {sent} lost");
    tcp(&a.ns, &b.ns, b.overlay(V4), MEGABYTE);
    mesh.balances();
}

#[test]
fn keys_that_do_not_fit_are_refused_with_the_fix() {
    let Some(mesh) = Builder::new("keys_that_do_not_fit_are_refused_with_the_fix") else { return };
    let mesh = mesh.encrypted().node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    let refused = |code: i32, words: &[&str]| {
        let run: Run = a.try_meshd("run");
        assert_eq!(run.code, code, "{run:?}");
        for word in words {
            assert!(run.err.contains(word), "{word}: {}", run.err);
        }
    };
    let good = mesh.list(|_| true);
    mesh.write_nodes(&good.replace(&a.public_key(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="));
    refused(1, &["`public-key` is hSDw", &a.public_key(), "node.key"]);
    let without = good.lines().filter(|line| !line.contains(&b.public_key()) && !line.contains("lane-keys"));
    mesh.write_nodes(&without.map(|line| format!("{line}\n")).collect::<String>());
    refused(1, &["node `b` is to be encrypted", "has no `public-key`", "`encryption: none`"]);
    mesh.write_nodes(&good);
    a.ns.sh(&format!("chmod 644 {0}/data/node.key", a.dir.display()));
    refused(1, &["others may read the private key", "chmod 600"]);
    a.ns.sh(&format!("chmod 600 {0}/data/node.key; mv {0}/data/node.key {0}/key", a.dir.display()));
    refused(1, &["there is no key"]);
    assert!(!a.dir.join("data/node.key").exists(), "no new identity behind the node list's back");
    // positive control
    a.ns.sh(&format!("mv {0}/key {0}/data/node.key", a.dir.display()));
    mesh.start();
    ping(&a.ns, b.overlay(V4));
}

/// Each datagram on the data port is WireGuard's.
#[track_caller]
fn only_wireguard(capture: Capture) {
    let file = capture.end();
    let count = |filter: &str| {
        let mut command = std::process::Command::new("tcpdump");
        crate::namespace::run(command.args(["-n", "-r"]).arg(&file).arg(filter)).lines().count()
    };
    // without GSO frames of more than one datagram the payload starts behind the outer headers
    let wireguard = count("udp[8] >= 1 and udp[8] <= 4 and udp[9:2] = 0");
    assert!(wireguard > 10, "{wireguard}");
    assert_eq!(count("ip and udp and not (udp[8] >= 1 and udp[8] <= 4 and udp[9:2] = 0)"), 0);
}
