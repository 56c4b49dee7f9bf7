//! Start, stop, crash, take-over, clean-up, and what stands in the way of a start.

use nix::sys::signal::Signal;

use crate::mesh::{Builder, V4, V6, has, skipped};
use crate::namespace::until;
use crate::traffic::{Capture, Probe, ping, pings, tcp};

#[test]
fn a_stop_leaves_the_way_out_shut_and_cleanup_opens_it() {
    let story = "a_stop_leaves_the_way_out_shut_and_cleanup_opens_it";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("tcpdump") {
        return skipped(story, "`tcpdump` is not installed");
    }
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(&a.ns, b.overlay(V4));
    mesh.balances();
    let running = a.try_meshd("cleanup");
    assert_eq!(running.code, 1, "{running:?}");
    assert!(running.err.contains("another meshd is running"), "{running:?}");

    let filter = "host 10.42.2.1 or host fd42:0:0:2::1";
    let capture = Capture::start(&a.ns, "ul0", filter, &mesh.dir().join("leak.pcap"));
    assert_eq!(a.stop(), 0);
    let log = a.log();
    let last = log.lines().last().unwrap();
    assert!(last.contains("stopped") && last.contains("10.42.") && last.contains("`meshd cleanup` removes"), "{last}");
    assert!(a.ns.succeeds("ip link show mesh0"));
    assert!(a.ns.sh("ip route show proto 72").contains("unreachable 10.42."));
    for family in [V4, V6] {
        assert!(!pings(&a.ns, b.overlay(family)));
    }
    assert!(!a.socket().exists());
    a.ns.sh("ip link del mesh0");
    for family in [V4, V6] {
        assert!(!pings(&a.ns, b.overlay(family)), "also without the device");
    }
    let leaked = capture.lines();
    assert!(leaked.is_empty(), "{leaked:#?}");

    let done = a.try_meshd("cleanup");
    assert_eq!(done.code, 0, "{done:?}");
    assert!(done.out.contains("removed the route"), "{done:?}");
    assert_eq!(a.ns.sh("ip route show proto 72; ip -6 route show proto 72"), "");
    let again = a.try_meshd("cleanup");
    assert!(again.code == 0 && again.out.contains("nothing of meshd's is left"), "{again:?}");
    let capture = Capture::start(&a.ns, "ul0", filter, &mesh.dir().join("control.pcap"));
    for family in [V4, V6] {
        pings(&a.ns, b.overlay(family));
    }
    until("positive control: now it leaves by the default route", || {
        pings(&a.ns, b.overlay(V4));
        std::fs::metadata(mesh.dir().join("control.pcap")).is_ok_and(|file| file.len() > 24)
    });
    assert!(!capture.lines().is_empty());

    a.restart();
    ping(&a.ns, b.overlay(V4));
    assert_eq!(a.stop(), 0);
    let done = a.try_meshd("cleanup");
    assert!(done.out.contains("removed the device mesh0"), "{done:?}");
    assert!(!a.ns.succeeds("ip link show mesh0"));
}

#[test]
fn a_restart_and_a_crash_are_taken_over() {
    let Some(mesh) = Builder::new("a_restart_and_a_crash_are_taken_over") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let right = a.host_state();
    let same = |when: &str| {
        let ours = |state: &str| {
            let mut lines: Vec<_> = state.lines().filter(|l| l.contains("mesh0") || l.contains("proto 72")).collect();
            // a device that goes with its process, and comes with another number and address
            lines.retain(|line| !line.contains("mesh0-gso"));
            lines.sort_unstable();
            lines.join("\n")
        };
        assert_eq!(ours(&a.host_state()), ours(&right), "{when}");
    };
    // the stream outlives both: meshd keeps no state of it
    let (mut client, mut server) = crate::traffic::connect(&a.ns, &b.ns, b.overlay(V4));
    let mut say = |what: &[u8]| {
        use std::io::{Read, Write};
        client.write_all(what).unwrap();
        let mut heard = vec![0; what.len()];
        server.read_exact(&mut heard).unwrap();
        assert_eq!(heard, what);
    };
    say(b"before");
    assert_eq!(a.stop(), 0);
    a.restart();
    same("after a restart");
    say(b"after a restart");
    a.kill();
    assert!(a.socket().exists(), "positive control: it was not a clean stop");
    assert!(a.ns.succeeds("ip link show mesh0"));
    a.restart();
    same("after a crash");
    say(b"after a crash");
    for io in ["tokio", "mmsg"] {
        a.set("io", Some(io));
        a.kill();
        a.restart();
        assert_eq!(a.stats()["io"], io);
        tcp(&a.ns, &b.ns, b.overlay(V6), 1 << 19);
        same("after a crash and with another back end");
    }
    a.signal(Signal::SIGINT);
    until("SIGINT ends it, too", || a.log().lines().last().unwrap().contains("stopped"));
    mesh.node("a").restart();
    mesh.balances();
}

#[test]
fn what_stands_in_the_way_is_named_and_nothing_was_changed() {
    let Some(mesh) = Builder::new("what_stands_in_the_way_is_named_and_nothing_was_changed") else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let probe = Probe::start(&b.ns, b.overlay(V4), &a.ns, a.overlay(V4));
    let refused = |said: &[&str]| {
        let before = a.host_state();
        let run = a.try_meshd("run");
        assert_eq!(run.code, 1, "{run:?}");
        for word in said {
            assert!(run.err.contains(word), "{word}: {run:?}");
        }
        let after = a.host_state();
        assert!(before == after, "{said:?}\n--- before\n{before}\n--- after\n{after}");
    };

    // a second one, on the same device, and on another one with the same port and subnets
    refused(&["another meshd is running with the device mesh0"]);
    a.set("tun", Some("mesh1"));
    refused(&["8472", "10.9.0.1"]);
    a.set("tun", None);
    let (sent, lost) = probe.end();
    assert_eq!(lost, 0, "of {sent}: the first one is not disturbed");
    assert_eq!(a.ctl(&["status"]).code, 0);

    assert_eq!(a.stop(), 0);
    assert_eq!(a.try_meshd("cleanup").code, 0);
    let holder = a.ns.udp(a.underlay(V4), 8472);
    refused(&["8472", &format!("(process {})", std::process::id())]);
    drop(holder);

    let vxlan = "ip link add flannel.1 type vxlan id 1 dstport 8472 local 10.9.0.1 dev ul0 nolearning";
    if a.ns.succeeds(&format!("{vxlan} && ip link set flannel.1 up")) {
        refused(&["8472", "flannel.1", "ip link del flannel.1"]);
        a.ns.sh("ip link del flannel.1");
    }

    for (make, undo, said) in [
        ("ip route add 10.42.2.0/24 via 10.9.0.254", "ip route del 10.42.2.0/24", "ip route del 10.42.2.0/24"),
        ("ip link add mesh0 type bridge", "ip link del mesh0", "ip link del mesh0"),
        ("ip addr add 10.42.2.9/24 dev ul0", "ip addr del 10.42.2.9/24 dev ul0", "ip addr del 10.42.2.9/24"),
    ] {
        a.ns.sh(make);
        refused(&[said]);
        a.ns.sh(undo);
    }
    a.set("node-ip", Some("10.9.0.99"));
    refused(&["10.9.0.99", "10.9.0.1 (ul0)"]);
    a.set("node-ip", None);

    a.restart();
    ping(&b.ns, a.overlay(V4));
    mesh.balances();
}
