//! Floods: from strangers, of whom nothing passes and who get no answer, and from members, faster than meshd may read.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};

use crate::hostile::{ipv4, send_to, udp};
use crate::mesh::{Builder, V4, has, skipped};
use crate::namespace::until;
use crate::traffic::{Capture, receive};

#[test]
fn a_million_spoofed_packets_are_a_million_drops() {
    let story = "a_million_spoofed_packets_are_a_million_drops";
    const MILLION: u64 = 1_000_000;
    const AT_ONCE: u64 = 50;
    const SOURCES: u64 = 16;
    let Some(mesh) = Builder::new(story) else { return };
    if !has("tcpdump") {
        return skipped(story, "`tcpdump` is not installed");
    }
    let mesh = mesh.node("a").set("bfd", "off").member("m").stranger("x").start();
    let [a, m, x] = mesh.three(["a", "m", "x"]);
    let listener = a.ns.udp(a.overlay(V4), 7000);
    let target = SocketAddr::new(a.underlay(V4), 8472);
    // in all but its outer source what a member would send
    let good = ipv4(&udp("10.42.2.1", "10.42.1.1", 7000, b"good"));
    let member = m.ns.udp(m.underlay(V4), 0);
    send_to(&member, target, &good);
    assert_eq!(receive(&listener, &mut [0; 16]).unwrap().0, 4, "positive control: a member is heard");

    let capture = Capture::start(&x.ns, "ul0", "src host 10.9.0.1 and not arp", &mesh.dir().join("answers.pcap"));
    let senders: Vec<_> = (0..SOURCES)
        .map(|number| {
            let ip = IpAddr::from([10, 9, 0, 100 + number as u8]);
            x.ns.sh(&format!("ip addr add {ip}/24 dev ul0"));
            let socket = x.ns.udp(ip, if number % 2 == 0 { 8472 } else { 0 });
            // many at a time, which the kernel cuts; they arrive as a run
            setsockopt(&socket, sockopt::UdpGsoSegment, &(good.len() as i32)).unwrap();
            socket
        })
        .collect();
    let before = a.stats();
    let run = good.repeat(AT_ONCE as usize);
    let counted = || a.drops("unknown_source") + a.drops("udp_queue_overflow");
    for (number, socket) in (0..MILLION / AT_ONCE).zip(senders.iter().cycle()) {
        socket.send_to(&run, target).unwrap();
        let sent = (number + 1) * AT_ONCE;
        if sent.is_multiple_of(MILLION / 20) {
            // no faster than they are read: then no kernel has to drop any
            until("these are counted", || counted() >= sent);
        }
    }
    until("a million is counted", || counted() >= MILLION);
    let after = a.stats();
    assert_eq!(after["drops"]["unknown_source"], MILLION, "{after:#}");
    assert_eq!(after["drops"]["udp_queue_overflow"], 0, "{after:#}");
    let received = |stats: &serde_json::Value| stats["udp"]["rx_packets"].as_u64().unwrap();
    assert_eq!(received(&after) - received(&before), MILLION);
    for side in [["tun", "tx_packets"], ["udp", "tx_packets"]] {
        assert_eq!(before[side[0]][side[1]], after[side[0]][side[1]], "nothing was delivered, nothing was answered");
    }
    listener.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(receive(&listener, &mut [0; 16]).is_err(), "nobody heard any");

    // positive control of the capture: a port where nobody listens is answered for by the kernel
    senders[1].send_to(b"x", (a.underlay(V4), 9)).unwrap();
    let file = mesh.dir().join("answers.pcap");
    until("that is captured", || std::fs::metadata(&file).is_ok_and(|file| file.len() > 24));
    let answers = capture.lines();
    assert!(answers.iter().all(|line| line.contains("udp port 9 unreachable")), "{answers:#?}");
    listener.set_read_timeout(Some(crate::namespace::PATIENCE)).unwrap();
    send_to(&member, target, &good);
    assert_eq!(receive(&listener, &mut [0; 16]).unwrap().0, 4, "and a member is still heard");
    mesh.balances();
}

/// What the kernel drops before us, since we were not let run, is counted too, and stays counted when the sockets are
/// opened anew.
#[test]
fn a_receive_queue_that_overflows_is_counted() {
    const SENT: u64 = 30_000;
    for io in ["mmsg", "uring", "tokio"] {
        let Some(mesh) = Builder::new("a_receive_queue_that_overflows_is_counted") else { return };
        let mesh = mesh.node("a").set("io", io).set("log", "debug").member("m").start();
        let [a, m] = mesh.two(["a", "m"]);
        let target = SocketAddr::new(a.underlay(V4), 8472);
        let good = ipv4(&udp("10.42.2.1", "10.42.1.1", 9, &[0; 1200]));
        let sender = m.ns.udp(m.underlay(V4), 0);
        send_to(&sender, target, &good);
        until("positive control: without haste none is lost", || a.stats()["udp"]["rx_packets"] == 1);
        assert_eq!(a.drops("udp_queue_overflow"), 0);
        a.signal(Signal::SIGSTOP);
        for _ in 1..SENT {
            send_to(&sender, target, &good);
        }
        a.signal(Signal::SIGCONT);
        let all = || {
            let stats = a.stats();
            let of = |value: &serde_json::Value| value.as_u64().unwrap();
            (of(&stats["udp"]["rx_packets"]), of(&stats["drops"]["udp_queue_overflow"]))
        };
        until(&format!("received and lost are what was sent: {:?}", all()), || all().0 + all().1 == SENT);
        let (received, lost) = all();
        assert!(lost > 0 && received > 0, "{received} {lost}");
        // new sockets, which know nothing of that
        a.ns.sh("ip link del mesh0");
        until("the device is there again", || {
            a.log().matches("mesh0 is up").count() == 2 && a.ctl(&["status"]).code == 0
        });
        assert_eq!(all(), (received, lost), "{io}");
        mesh.balances();
    }
}
