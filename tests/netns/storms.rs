//! Errors by the thousand at the edges: the underlay refuses, its queue stays full or has no room, the TUN device is down.
//! Nothing ends, nothing spins, everything is counted. How fast the rest goes on meanwhile is `netns-scripts/storm.sh`'s to
//! measure.

use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Ipv4RecvErr;

use crate::mesh::{Builder, Mesh, Node, V4};
use crate::namespace::until;
use crate::traffic::{Probe, ping, pings, tcp};

const STORM: u64 = 2000;

/// A storm of datagrams in portions that the TUN queue holds.
#[track_caller]
fn blow(from: &Node, to: &Node, datagrams: u64) {
    let socket = from.ns.udp(from.overlay(V4), 0);
    for number in 0..datagrams {
        socket.send_to(&[7; 900], (to.overlay(V4), 7000)).unwrap();
        if number % 100 == 99 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What the underlay refused, or what the TUN queue could not hold where meshd was not let run.
fn drops(node: &Node) -> u64 {
    let drops = &node.stats()["drops"];
    ["udp_send_failed", "tun_queue_overflow"].iter().map(|reason| drops[reason].as_u64().unwrap()).sum()
}

/// With nothing to do it uses no CPU time worth a word, whatever the state of its sockets is.
#[track_caller]
fn does_not_spin(node: &Node) {
    let (start, before) = (Instant::now(), node.cpu_ms());
    std::thread::sleep(Duration::from_secs(1));
    let (wall, used) = (start.elapsed().as_millis() as u64, node.cpu_ms() - before);
    assert!(used * 4 < wall, "{}: {used} ms of CPU in {wall} ms, without traffic", node.name);
}

#[test]
fn an_underlay_that_refuses_one_peer() {
    for io in ["mmsg", "uring", "tokio"] {
        let Some(mesh) = Builder::new("an_underlay_that_refuses_one_peer") else { return };
        // liveness would notice the same, and its packets would be refused as well
        let mesh =
            mesh.node("a").set("io", io).set("bfd", "off").node("b").set("bfd", "off").node("c").set("bfd", "off");
        let mesh = mesh.start();
        let [a, b, c] = mesh.three(["a", "b", "c"]);
        ping(&a.ns, c.overlay(V4));
        // EINVAL, EACCES, EHOSTUNREACH, and the firewall's EPERM
        let table = "nft add table inet f; nft 'add chain inet f out { type filter hook output priority 0; }'";
        for (harm, mend) in [
            ("ip route add blackhole 10.9.0.3/32", "ip route del blackhole 10.9.0.3/32"),
            ("ip route add prohibit 10.9.0.3/32", "ip route del prohibit 10.9.0.3/32"),
            ("ip route add unreachable 10.9.0.3/32", "ip route del unreachable 10.9.0.3/32"),
            (
                &*format!("{table}; nft add rule inet f out ip daddr 10.9.0.3 udp dport 8472 drop"),
                "nft delete table inet f",
            ),
        ] {
            let pid = a.pid();
            a.ns.sh(harm);
            assert!(!pings(&a.ns, c.overlay(V4)), "positive control: {harm}");
            let (before, refused) = (drops(a), a.drops("udp_send_failed"));
            let overflow = a.drops("tun_queue_overflow");
            let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
            blow(a, c, STORM);
            tcp(&a.ns, &b.ns, b.overlay(V4), 1 << 18);
            until(&format!("{harm}: each is counted"), || drops(a) >= before + STORM);
            assert!(a.drops("udp_send_failed") > refused, "{harm}");
            does_not_spin(a);
            // on a machine so busy that the TUN queue overflowed, that may have cost the probe something, too
            let (sent, lost) = probe.end();
            let others = drops(a) - before - STORM;
            let overflowed = a.drops("tun_queue_overflow") > overflow;
            assert!(sent > 5 && (lost == 0 && others == 0 || overflowed), "{harm}: {lost} of {sent}, {others} more");
            a.ns.sh(mend);
            ping(&a.ns, c.overlay(V4));
            assert_eq!(a.pid(), pid);
            assert!(io == "tokio" || a.stats()["offloads"]["udp_gso"] == true, "{harm}: offloads are not to blame");
        }
        mesh.balances();
    }
}

#[test]
fn an_underlay_that_is_down() {
    let Some(mesh) = Builder::new("an_underlay_that_is_down") else { return };
    let mesh = mesh.node("a").set("bfd", "off").node("b").set("bfd", "off").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(&a.ns, b.overlay(V4));
    let before = drops(a);
    a.ns.sh("ip link set ul0 down");
    blow(a, b, STORM);
    until("each is counted", || drops(a) == before + STORM);
    does_not_spin(a);
    a.ns.sh("ip link set ul0 up; ip route replace default via 10.9.0.254");
    until("it carries again", || pings(&a.ns, b.overlay(V4)));
    mesh.balances();
}

/// A queue that hardly empties: the sockets' room is used up (EAGAIN).
#[test]
fn an_underlay_whose_queue_stays_full() {
    for io in ["mmsg", "uring", "tokio"] {
        let Some(mesh) = Builder::new("an_underlay_whose_queue_stays_full") else { return };
        let mesh = mesh.node("a").set("io", io).node("b").start();
        let [a, b] = mesh.two(["a", "b"]);
        ping(&a.ns, b.overlay(V4));
        a.ns.sh("tc qdisc add dev ul0 root tbf rate 1mbit burst 10kb limit 1gb");
        let start = Instant::now();
        let cpu = a.cpu_ms();
        // one flow has one socket, whose room is 8 MiB by our reckoning and twice that by the kernel's
        let socket = a.ns.udp(a.overlay(V4), 0);
        until("there is no room", || {
            for _ in 0..1000 {
                socket.send_to(&[7; 1400], (b.overlay(V4), 7000)).ok();
            }
            a.drops("udp_buffer_full") > 0
        });
        let full = a.drops("udp_buffer_full");
        for _ in 0..200 {
            socket.send_to(&[7; 1400], (b.overlay(V4), 7000)).ok();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(a.drops("udp_buffer_full") > full, "positive control: still none");
        let (wall, used) = (start.elapsed().as_millis() as u64, a.cpu_ms() - cpu);
        assert!(used < 2 * wall, "{used} ms of CPU in {wall} ms on all threads");
        does_not_spin(a);
        assert_eq!(a.ctl(&["status"]).code, 0);
        a.ns.sh("tc qdisc del dev ul0 root");
        ping(&a.ns, b.overlay(V4));
        mesh.balances();
    }
}

/// A link that has no room any more (ENOBUFS). The kernel keeps that from a UDP socket which does not ask for it with
/// IP_RECVERR, so the story asks in meshd's place, on meshd's own sockets.
#[test]
fn an_underlay_without_buffers() {
    for io in ["mmsg", "uring", "tokio"] {
        let Some(mesh) = Builder::new("an_underlay_without_buffers") else { return };
        let mesh = mesh.node("a").set("io", io).set("bfd", "off").node("b").set("bfd", "off").start();
        let [a, b] = mesh.two(["a", "b"]);
        ping(&a.ns, b.overlay(V4));
        a.ns.sh("tc qdisc add dev ul0 root tbf rate 1mbit burst 10kb limit 12kb");
        let dropped = || a.ns.sh("tc -s qdisc show dev ul0").contains("dropped 0,");
        blow(a, b, STORM);
        until("the link drops", || !dropped());
        assert_eq!(a.drops("udp_buffer_full"), 0, "positive control: meshd is not told");
        tell_of_local_errors(a.pid());
        let pid = a.pid();
        blow(a, b, STORM);
        until("each error is counted", || a.drops("udp_buffer_full") > STORM / 4);
        does_not_spin(a);
        assert_eq!((a.pid(), a.ctl(&["status"]).code), (pid, 0));
        a.ns.sh("tc qdisc del dev ul0 root");
        ping(&a.ns, b.overlay(V4));
        tcp(&a.ns, &b.ns, b.overlay(V4), 1 << 18);
        assert!(io == "tokio" || a.stats()["offloads"]["udp_gso"] == true, "offloads are not to blame");
    }
}

/// Sets IP_RECVERR on each UDP socket of a process.
fn tell_of_local_errors(pid: u32) {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let process = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let mut told = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|what| what.to_string_lossy().starts_with("socket:")) {
            let number = entry.file_name().to_string_lossy().parse().unwrap();
            let Ok(socket) = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else { continue };
            told += u32::from(setsockopt(&socket, Ipv4RecvErr, &true).is_ok());
        }
    }
    assert!(told > 0, "no UDP socket in {pid}");
}

/// Each write to a TUN device that is down fails (EIO); meshd sets it up again and again.
#[test]
fn a_tun_device_that_refuses() {
    for io in ["mmsg", "uring", "tokio"] {
        let Some(mesh) = Builder::new("a_tun_device_that_refuses") else { return };
        let mesh = mesh.node("a").node("b").set("io", io).start();
        let [a, b] = mesh.two(["a", "b"]);
        refuses(&mesh, a, b);
    }
}

#[track_caller]
fn refuses(mesh: &Mesh, a: &Node, b: &Node) {
    ping(&a.ns, b.overlay(V4));
    let pid = b.pid();
    let mut storms = 0;
    until("some fell into the gap", || {
        b.ns.sh("ip link set mesh0 down");
        blow(a, b, 300);
        storms += 1;
        storms > 5 && b.drops("tun_write_failed") > 300
    });
    until("it is up again", || pings(&a.ns, b.overlay(V4)));
    does_not_spin(b);
    assert_eq!(b.pid(), pid);
    assert_eq!(b.ctl(&["status"]).code, 0);
    mesh.balances();
}
