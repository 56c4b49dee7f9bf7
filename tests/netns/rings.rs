//! `io: uring`: a worker over io_uring beside one over mmsg, and where io_uring is refused.

use crate::mesh::{Builder, V4, V6, has, skipped};
use crate::namespace::until;
use crate::traffic::{ping, pings, tcp, udp};

#[test]
fn a_ring_carries_what_other_workers_do() {
    for encrypted in [false, true] {
        let Some(mesh) = Builder::new("a_ring_carries_what_other_workers_do") else { return };
        let mesh = if encrypted { mesh.encrypted() } else { mesh };
        let mesh = mesh.node("a").set("io", "uring").node("b").set("io", "mmsg").node("c").set("io", "uring").start();
        let [a, b, c] = mesh.three(["a", "b", "c"]);
        assert_eq!([a, b, c].map(|node| node.stats()["io"].as_str().unwrap().to_owned()), ["uring", "mmsg", "uring"]);
        for (from, to) in [(a, b), (b, a), (a, c)] {
            for family in [V4, V6] {
                ping(&from.ns, to.overlay(family));
                tcp(&from.ns, &to.ns, to.overlay(family), 32 << 20);
                udp(&from.ns, from.overlay(family), &to.ns, to.overlay(family), &[1200; 500]);
            }
        }
        // its sources end with the device, and begin anew with the next
        a.ns.sh("ip link del mesh0");
        until("a new device carries", || pings(&a.ns, b.overlay(V4)));
        assert_eq!(a.stats()["io"], "uring");
        mesh.balances();
    }
}

#[test]
fn without_io_uring_there_is_mmsg_and_a_line_in_the_log() {
    let story = "without_io_uring_there_is_mmsg_and_a_line_in_the_log";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("strace") {
        return skipped(story, "strace is not installed");
    }
    let mesh = mesh.node("a").set("io", "uring").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    b.restart();
    // as a sandbox does that does not know the call; the tracer stands aside, so that the pid is meshd's
    let trace = mesh.dir().join("trace");
    let inject = ["-e", "trace=io_uring_setup", "-e", "inject=io_uring_setup:error=EPERM", "-o"];
    let front = [&["strace", "-D", "-f", "-qq"][..], &inject, &[trace.to_str().unwrap()]].concat();
    a.spawn_under(&front, &[]);
    a.ready();
    ping(&a.ns, b.overlay(V4));
    assert_eq!(a.stats()["io"], "mmsg");
    assert!(a.log().contains("io_uring cannot be used here"), "{}", a.log());
    a.restart();
    assert_eq!(a.stats()["io"], "uring", "positive control: without the sandbox it can");
}
