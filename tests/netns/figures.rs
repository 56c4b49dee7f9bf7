//! Figures that take minutes, so that they are run by hand:
//! `cargo test --test netns figures -- --ignored --nocapture --test-threads 1`, with `MESHD_OUTAGE_SECONDS` for how long
//! the servers are away (180 when left out).

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::encrypted::Flood;
use crate::joined::{cluster, create, has_peers};
use crate::mesh::{Builder, V4, has, skipped};
use crate::namespace::until;
use crate::traffic::{Probe, ping};

#[test]
#[ignore = "prints figures"]
fn from_a_join_to_the_first_packet() {
    let story = "from_a_join_to_the_first_packet";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.server("a").agent("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    a.restart();
    let (token, server) = (create(a, &[]), a.given());
    b.token(Some(&token));
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let start = Instant::now();
            b.spawn();
            until("the first packet", || b.ns.succeeds(&format!("ping -n -q -c 1 -W 0.05 {server}")));
            let took = start.elapsed();
            assert_eq!(b.ctl(&["leave"]).code, 0);
            until("meshd ended", || !b.socket().exists());
            has_peers(a, 0);
            took
        })
        .collect();
    times.sort();
    println!(
        "{story}: from the start of meshd with a token to the first packet: p50 {:?}, p99 {:?}",
        times[9], times[19]
    );
}

#[test]
#[ignore = "prints figures"]
fn a_hundred_kills_of_the_sidecar() {
    let story = "a_hundred_kills_of_the_sidecar";
    let Some(mesh) = cluster(story) else { return };
    let [b, c] = mesh.two(["b", "c"]);
    ping(&b.ns, c.given());
    let probe = Probe::start(&b.ns, b.given(), &c.ns, c.given());
    for _ in 0..100 {
        let pid = b.sidecar().expect("it runs");
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        until("another one runs", || b.sidecar().is_some_and(|new| new != pid));
        assert_eq!(b.json(&["peers"]).as_array().unwrap().len(), 2);
    }
    let (sent, lost) = probe.end();
    println!("{story}: {lost} of {sent} lost");
    assert_eq!(lost, 0, "of {sent}");
}

#[test]
#[ignore = "prints figures"]
fn minutes_without_a_server() {
    let story = "minutes_without_a_server";
    let seconds = std::env::var("MESHD_OUTAGE_SECONDS").map_or(180, |text| text.parse().unwrap());
    let Some(mesh) = cluster(story) else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    ping(&b.ns, c.given());
    let probe = Probe::start(&b.ns, b.given(), &c.ns, c.given());
    a.kill();
    std::thread::sleep(Duration::from_secs(seconds));
    let nodes = b.ctl(&["nodes"]);
    assert!(nodes.code == 0 && nodes.err.contains("no server answers"), "{nodes:?}");
    assert_eq!(b.json(&["peers"]).as_array().unwrap().len(), 2);
    let (sent, lost) = probe.end();
    println!("{story}: the only server away for {seconds} s: {lost} of {sent} lost");
    assert_eq!(lost, 0, "of {sent}");
}

/// A stopped sidecar answers no ping: it is ended, and another one takes over.
#[test]
#[ignore = "prints figures"]
fn a_sidecar_that_hangs_is_replaced() {
    let story = "a_sidecar_that_hangs_is_replaced";
    let Some(mesh) = cluster(story) else { return };
    let [b, c] = mesh.two(["b", "c"]);
    ping(&b.ns, c.given());
    let probe = Probe::start(&b.ns, b.given(), &c.ns, c.given());
    let (pid, start) = (b.sidecar().unwrap(), Instant::now());
    kill(Pid::from_raw(pid as i32), Signal::SIGSTOP).unwrap();
    while b.sidecar().is_none_or(|new| new == pid) {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", b.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    let took = start.elapsed();
    until("it is well again", || b.json(&["status"])["membership"]["connected"] == true);
    let (sent, lost) = probe.end();
    println!("{story}: after {took:?}; {lost} of {sent} lost");
    assert_eq!(lost, 0, "of {sent}");
}

/// What a flood of 50,000 handshakes a second costs those that have a session, and who needs one.
#[test]
#[ignore = "prints figures"]
fn a_flood_of_handshakes_in_figures() {
    let story = "a_flood_of_handshakes_in_figures";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("iperf3") {
        return skipped(story, "`iperf3` is not installed");
    }
    let mesh = mesh.encrypted().node("a").node("b").stranger("s").start();
    let [a, b, s] = mesh.three(["a", "b", "s"]);
    ping(&a.ns, b.overlay(V4));
    let flood = Flood::new(s, a);
    let stream = || {
        a.ns.sh("iperf3 -s -1 -D >/dev/null");
        std::thread::sleep(Duration::from_millis(200));
        let out = b.ns.output(&format!("iperf3 -c {} -C cubic -t 4 -J", a.overlay(V4)));
        let answer: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        answer["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9
    };
    let probed = |seconds: f64, flooding: bool| {
        let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
        let sent = match flooding {
            true => flood.run(seconds),
            false => {
                std::thread::sleep(Duration::from_secs_f64(seconds));
                0
            }
        };
        (probe.end(), sent)
    };
    let ((asked, lost), _) = probed(4.0, false);
    println!("{story}: at peace {lost} of {asked} lost, {:.2} Gbit/s", stream());
    let memory = memory_kib(a.pid());
    let ((asked, lost), sent) = probed(4.0, true);
    let rate = std::thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run(5.0));
        let rate = stream();
        flooding.join().unwrap();
        rate
    });
    println!("{story}: {} a second: {lost} of {asked} lost, {rate:.2} Gbit/s", sent / 4);
    println!("{story}: memory +{} KiB", memory_kib(a.pid()).saturating_sub(memory));
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run(8.0));
        b.kill();
        b.restart();
        let start = Instant::now();
        until("b is back", || b.ns.succeeds(&format!("ping -n -q -c 1 -W 0.1 {}", a.overlay(V4))));
        println!("{story}: b, restarted, has a session {:?} after it is ready", start.elapsed());
        flooding.join().unwrap();
    });
}

fn memory_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
