//! The wall clock jumps while meshd runs, and over a restart. Its clock alone: libfaketime stands between it and the C
//! library, so that the machine's own is never touched.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::mesh::{Builder, Node, V4, V6, has, skipped};
use crate::namespace::until;
use crate::traffic::{Probe, ping, pings, receive, tcp};

fn library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
    folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|file| file.exists())
}

/// Sets the clock so many seconds from the true time.
fn set(clock: &Path, seconds: i64) {
    std::fs::write(clock, format!("{seconds:+}\n")).unwrap();
}

/// What the node's own log says the time is, in years from now.
fn year_in_log(node: &Node) -> i32 {
    let log = node.log();
    let year = |text: &str| text.get(..4).and_then(|year| year.parse::<i32>().ok());
    log.lines().rev().find_map(year).unwrap_or_else(|| panic!("no time in the log: {log}"))
}

const HOUR: i64 = 3600;
const YEAR: i64 = 366 * 24 * HOUR;

#[test]
fn jumps_of_the_wall_clock_lose_nothing() {
    let story = "jumps_of_the_wall_clock_lose_nothing";
    let Some(mesh) = Builder::new(story) else { return };
    let Some(library) = library() else { return skipped(story, "libfaketime is not installed") };
    let mesh = mesh.node("a").node("b").member("m").build();
    let [a, b] = mesh.two(["a", "b"]);
    let clock = mesh.dir().join("clock");
    set(&clock, 0);
    let environment = [
        ("LD_PRELOAD", library.to_str().unwrap()),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    let start = || {
        a.spawn_under(&["env"], &environment);
        a.ready();
    };
    start();
    b.restart();
    let this_year = year_in_log(b);
    assert_eq!(year_in_log(a), this_year);
    let peers = || a.json(&["peers"]).as_array().unwrap().len();
    let uptime = || a.stats()["uptime_ms"].as_u64().unwrap();
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));
    let mut last_uptime = uptime();
    for (number, jump) in [HOUR, -HOUR, YEAR, -YEAR, YEAR, 0].into_iter().enumerate() {
        set(&clock, jump);
        // what does look at a clock goes on as well: a changed list, and back, and a log that says when
        mesh.write_nodes(&mesh.list(|node| node.name != "m"));
        until(&format!("a list is taken over at {jump:+} s"), || peers() == 1);
        mesh.publish();
        until(&format!("and another at {jump:+} s"), || peers() == 2);
        a.set("log", Some(if number % 2 == 0 { "debug" } else { "info" }));
        a.signal(Signal::SIGHUP);
        let expected = this_year + (jump / YEAR) as i32;
        until("positive control: meshd does see another time", || {
            (year_in_log(a) - expected).abs() <= i32::from(jump.abs() == HOUR)
        });
        let now = uptime();
        assert!(now > last_uptime && now < last_uptime + 60_000, "{last_uptime} {now}: uptime does not jump");
        last_uptime = now;
        let seen = a.json(&["peers"])[0]["last_seen_ms"].as_u64().unwrap();
        assert!(seen < 60_000, "{seen}: nor does the age of what was heard");
    }
    let (sent, lost) = probe.end();
    assert!(sent > 50 && lost == 0, "{lost} of {sent} lost");

    for jump in [HOUR, -HOUR, YEAR, -YEAR] {
        assert_eq!(a.stop(), 0);
        set(&clock, jump);
        start();
        ping(&a.ns, b.overlay(V4));
        tcp(&a.ns, &b.ns, b.overlay(V6), 1 << 18);
        assert_eq!(a.ctl(&["status"]).code, 0);
    }
    mesh.balances();
}

/// Peers refuse handshakes that are no later than those before. meshd keeps how late its own were.
#[test]
fn a_clock_set_back_over_a_restart_locks_nobody_out() {
    let story = "a_clock_set_back_over_a_restart_locks_nobody_out";
    const DAY: i64 = 24 * HOUR;
    let Some(mesh) = Builder::new(story) else { return };
    let Some(library) = library() else { return skipped(story, "libfaketime is not installed") };
    if let Some(tool) = ["wireguard-go", "wg"].into_iter().find(|tool| !has(tool)) {
        return skipped(story, &format!("`{tool}` is not installed"));
    }
    // a meshd would ask by itself when it is asked too early
    let mesh = mesh.encrypted().node("a").set("bfd", "off").wireguard("w", "wireguard-go").build();
    let [a, w] = mesh.two(["a", "w"]);
    let clock = mesh.dir().join("clock");
    let start = |offset: i64| {
        set(&clock, offset);
        let environment = [
            ("LD_PRELOAD", library.to_str().unwrap()),
            ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ];
        a.spawn_under(&["env"], &environment);
        a.ready();
    };
    let listener = w.ns.udp(w.overlay(V4), 7000);
    let talk = || {
        ping(&a.ns, w.overlay(V4));
        // the last word is a's, or w would ask for a session by itself before long
        a.ns.udp(a.overlay(V4), 0).send_to(b"over", (w.overlay(V4), 7000)).unwrap();
        assert_eq!(receive(&listener, &mut [0; 16]).unwrap().0, 4);
    };
    start(0);
    talk();
    assert_eq!(a.stop(), 0);
    start(-DAY);
    talk();
    assert!(a.log().contains("was set back"), "{}", a.log());
    a.kill();
    start(-DAY);
    talk();

    // positive control: without what was kept w refuses
    assert_eq!(a.stop(), 0);
    std::fs::remove_file(a.dir.join("data/handshake-time")).unwrap();
    start(-DAY);
    let tried = || a.json(&["peers"])[0]["session"]["unanswered"].as_u64().unwrap();
    for _ in 0..3 {
        assert!(!pings(&a.ns, w.overlay(V4)));
    }
    assert!(tried() >= 1);
    assert_eq!(a.stop(), 0);
    start(0);
    talk();
    mesh.balances();
}

/// The other clock, which nobody can set: it starts anywhere.
#[test]
fn it_starts_at_any_time_since_boot() {
    let story = "it_starts_at_any_time_since_boot";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("unshare") || !mesh_has_time_namespaces() {
        return skipped(story, "this kernel has no time namespaces");
    }
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    b.restart();
    for offset in ["31536000", "3153600000"] {
        let offsets = ["--monotonic", offset, "--boottime", offset];
        a.spawn_under(&[&["unshare", "-T", "--fork", "--kill-child"], &offsets[..], &["--"]].concat(), &[]);
        a.ready();
        ping(&a.ns, b.overlay(V4));
        let uptime = a.stats()["uptime_ms"].as_u64().unwrap();
        assert!(uptime < 60_000, "{uptime}");
        // the signal goes to the one that waits outside, which takes meshd along
        a.kill();
        until("it has ended", || a.ctl(&["status"]).code == 3);
    }
    mesh.node("a").restart();
    ping(&a.ns, b.overlay(V4));
    mesh.balances();
}

fn mesh_has_time_namespaces() -> bool {
    Path::new("/proc/self/ns/time").exists()
}
