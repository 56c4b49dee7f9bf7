//! The host around meshd shakes: others change it, links flap, processes are held. All of it is put right again.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::mesh::{Builder, Node, V4, V6};
use crate::namespace::until;
use crate::traffic::{Probe, connect, content, ping, pings, tcp};

/// Tells how long it took, past the test harness, which keeps what a test prints to itself.
fn recovered(what: &str, after: Duration) {
    writeln!(std::io::stderr(), "recovered in {:4} ms: {what}", after.as_millis()).ok();
}

/// The part of the host that is meshd's.
fn ours(node: &Node) -> String {
    node.ns.sh("ip -o link show dev mesh0 2>/dev/null | sed 's/^[0-9]*: //; s/ state [A-Z]*//; s/qlen.*//'
         ip -o addr show dev mesh0 2>/dev/null | sed 's/^[0-9]*: //; s/ valid_lft.*//'
         ip route show table all proto 72; ip -6 route show table all proto 72
         cat /proc/sys/net/ipv4/conf/mesh0/rp_filter /proc/sys/net/ipv4/conf/mesh0/send_redirects 2>/dev/null || true")
}

#[test]
fn what_others_change_on_the_device_is_restored() {
    for io in ["mmsg", "tokio"] {
        let Some(mesh) = Builder::new("what_others_change_on_the_device_is_restored") else { return };
        let mesh = mesh.node("a").set("io", io).node("b").start();
        let [a, b] = mesh.two(["a", "b"]);
        ping(&a.ns, b.overlay(V4));
        let right = ours(a);
        let moved_away = format!("ip link set mesh0 netns {}", mesh.switch.name());
        for harm in [
            "ip addr flush dev mesh0",
            "ip addr add 10.42.1.9/24 dev mesh0",
            "ip route flush proto 72; ip -6 route flush proto 72",
            "ip route replace 10.42.0.0/16 via 10.9.0.254",
            "ip link set mesh0 mtu 1300",
            "ip link set mesh0 down",
            "ip link del mesh0",
            "ip link set mesh0 down; ip link set mesh0 name other0",
            &moved_away,
            "echo 1 > /proc/sys/net/ipv4/conf/mesh0/rp_filter",
        ] {
            a.ns.sh(harm);
            let took = until(harm, || ours(a) == right && pings(&a.ns, b.overlay(V4)));
            recovered(&format!("{io}: {harm}"), took);
            ping(&b.ns, a.overlay(V4));
            ping(&a.ns, b.overlay(V6));
            until("it says that all is well", || a.ctl(&["status"]).code == 0);
            a.ns.sh(
                "ip link del other0 2>/dev/null || true; ip route del 10.42.0.0/16 via 10.9.0.254 2>/dev/null || true",
            );
        }
        tcp(&a.ns, &b.ns, b.overlay(V4), 1 << 19);
        mesh.balances();
    }
}

#[test]
fn an_underlay_link_that_flaps_carries_again() {
    let Some(mesh) = Builder::new("an_underlay_link_that_flaps_carries_again") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let (mut client, mut server) = connect(&a.ns, &b.ns, b.overlay(V4));
    for (ns, device) in [(&a.ns, "ul0"), (&mesh.switch, "p-a"), (&mesh.switch, "p-b")] {
        ns.sh(&format!("ip link set {device} down"));
        assert!(!pings(&a.ns, b.overlay(V4)), "positive control: {device}");
        ns.sh(&format!("ip link set {device} up"));
        recovered(&format!("{device} down and up"), until("it carries again", || pings(&a.ns, b.overlay(V4))));
        use std::io::Read;
        client.write_all(b"still there").unwrap();
        let mut heard = [0; 11];
        server.read_exact(&mut heard).unwrap();
    }
    a.ns.sh("ip route replace default via 10.9.0.254");
    until("it says that all is well", || a.ctl(&["status"]).code == 0);
    mesh.balances();
}

#[test]
fn an_underlay_mtu_that_changes_is_followed() {
    let Some(mesh) = Builder::new("an_underlay_mtu_that_changes_is_followed") else { return };
    let mesh = mesh.node("a").node("b").build();
    // without IPv6 subnets, since those need 1280 bytes inside the tunnel
    let both = mesh.list(|_| true);
    let v4_only = both.lines().map(|line| match line.find(", \"fd42") {
        Some(at) => format!("{}]\n", &line[..at]),
        None => format!("{line}\n"),
    });
    mesh.write_nodes(&v4_only.collect::<String>());
    mesh.start();
    let [a, b] = mesh.two(["a", "b"]);
    let has_mtu = |node: &Node, mtu: u32| node.ns.sh("ip link show mesh0").contains(&format!("mtu {mtu} "));
    let (client, server) = connect(&a.ns, &b.ns, b.overlay(V4));
    for mtu in [1280, 1500, 1400, 1500] {
        for node in [a, b] {
            node.ns.sh(&format!("ip link set ul0 mtu {mtu}"));
        }
        let took = until("both devices follow", || [a, b].iter().all(|node| has_mtu(node, mtu - 50)));
        recovered(&format!("underlay MTU {mtu}"), took);
        // the stream that was there before goes on
        let data = content(u64::from(mtu), 300_000);
        std::thread::scope(|scope| {
            scope.spawn(|| (&client).write_all(&data).unwrap());
            let mut got = vec![0; data.len()];
            std::io::Read::read_exact(&mut (&server), &mut got).unwrap();
            assert!(got == data, "MTU {mtu}");
        });
        let fits = mtu - 50 - 28;
        // a larger path is used once a probe has crossed it
        let ping = format!("ping -n -c 1 -W 1 -M do -s {fits} {}", b.overlay(V4));
        until(&format!("the longest packet fits {mtu}"), || a.ns.succeeds(&ping));
    }
    mesh.balances();
}

/// The overlay has IPv6 subnets, for which the smaller underlay is too small: that is said, and IPv4 goes on.
#[test]
fn an_underlay_mtu_too_small_for_ipv6_does_not_stop_ipv4() {
    let Some(mesh) = Builder::new("an_underlay_mtu_too_small_for_ipv6_does_not_stop_ipv4") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    for node in [a, b] {
        node.ns.sh("ip link set ul0 mtu 1280");
    }
    until("it is said", || a.reasons().contains("1280"));
    let took = until("long streams go on", || {
        tcp(&a.ns, &b.ns, b.overlay(V4), 300_000);
        true
    });
    recovered("underlay MTU 1280 with IPv6 subnets", took);
    for node in [a, b] {
        node.ns.sh("ip link set ul0 mtu 1500");
    }
    until("it heals", || a.ctl(&["status"]).code == 0 && b.ctl(&["status"]).code == 0);
    for family in [V4, V6] {
        tcp(&a.ns, &b.ns, b.overlay(family), 300_000);
    }
    mesh.balances();
}

#[test]
fn another_underlay_address_is_followed() {
    let Some(mesh) = Builder::new("another_underlay_address_is_followed") else { return };
    let mesh = mesh.node("a").set("node-ip", "ul0").node("b").node("c").start();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    // the interface has both families, so the node is reached by the list's; here that is IPv4
    ping(&a.ns, b.overlay(V4));
    let probe = Probe::start(&c.ns, c.overlay(V4), &b.ns, b.overlay(V4));
    a.ns.sh(
        "ip addr del 10.9.0.1/24 dev ul0; ip addr add 10.9.0.91/24 dev ul0; ip route replace default via 10.9.0.254",
    );
    let list = "nodes:\n".to_owned() + &a.entry_at("10.9.0.91") + &b.entry() + &c.entry();
    mesh.write_nodes(&list);
    let took = until("both ways carry again", || pings(&a.ns, b.overlay(V4)) && pings(&c.ns, a.overlay(V6)));
    recovered("underlay address replaced, told to the others at the same time", took);
    let (sent, lost) = probe.end();
    assert_eq!(lost, 0, "of {sent} between the two others");
    until("it says that all is well", || a.ctl(&["status"]).code == 0);
    mesh.balances();
}

#[test]
fn a_process_that_was_held_goes_on() {
    let Some(mesh) = Builder::new("a_process_that_was_held_goes_on") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(&a.ns, b.overlay(V4));
    a.signal(Signal::SIGSTOP);
    assert!(!pings(&a.ns, b.overlay(V4)), "positive control");
    // more than the queues hold
    let (out, back) = (a.ns.udp(a.overlay(V4), 0), b.ns.udp(b.overlay(V4), 0));
    for _ in 0..3000 {
        out.send_to(&[0; 100], (b.overlay(V4), 7000)).ok();
        back.send_to(&[0; 100], (a.overlay(V4), 7000)).ok();
    }
    a.ns.sh("ip addr flush dev mesh0");
    a.signal(Signal::SIGCONT);
    recovered("SIGSTOP, SIGCONT", until("it carries again", || pings(&a.ns, b.overlay(V4))));
    until("what the kernel dropped meanwhile is counted", || a.drops("tun_queue_overflow") > 0);
    tcp(&a.ns, &b.ns, b.overlay(V6), 1 << 19);
    mesh.balances();
}

#[test]
fn clients_of_the_socket_cost_the_data_plane_nothing() {
    let Some(mesh) = Builder::new("clients_of_the_socket_cost_the_data_plane_nothing") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    // more than it serves at once
    let clients: Vec<_> = (0..100).filter_map(|_| UnixStream::connect(a.socket()).ok()).collect();
    let busy = a.ctl(&["status"]);
    assert!(busy.code != 0 && busy.err.contains("clients"), "positive control: {busy:?}");
    ping(&a.ns, b.overlay(V6));
    drop(clients);
    until("it answers again", || a.ctl(&["status"]).code == 0);

    // and with no descriptor left at all
    let open = std::fs::read_dir(format!("/proc/{}/fd", a.pid())).unwrap().count();
    let limit = |n: usize| a.ns.sh(&format!("prlimit --pid {} --nofile={n}:4096", a.pid()));
    limit(open + 3);
    let clients: Vec<_> = (0..20).filter_map(|_| UnixStream::connect(a.socket()).ok()).collect();
    until("it is logged", || a.log().contains("cannot accept clients"));
    ping(&a.ns, b.overlay(V4));
    tcp(&a.ns, &b.ns, b.overlay(V6), 1 << 19);
    drop(clients);
    limit(1024);
    until("it answers again", || a.ctl(&["status"]).code == 0);
    let (sent, lost) = probe.end();
    assert_eq!(lost, 0, "of {sent}");
    mesh.balances();
}
