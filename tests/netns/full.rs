//! Disks that are full: the log, the node list, all that lies on one. Packets are carried on.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::mesh::{Builder, MESHD, V4, V6};
use crate::namespace::{Process, until};
use crate::traffic::{Probe, ping, tcp};

#[test]
fn a_full_disk_stops_no_packet_and_is_said() {
    let Some(mesh) = Builder::new("a_full_disk_stops_no_packet_and_is_said") else { return };
    let mesh = mesh.node("a").node("b").member("c").build();
    let [a, b] = mesh.two(["a", "b"]);
    b.restart();
    let good = mesh.list(|_| true);
    // a tiny disk that only meshd and we, through /proc, can see
    let mount = mesh.dir().join("disk");
    fs::create_dir(&mount).unwrap();
    let at = mount.to_str().unwrap();
    a.set("nodes-file", Some(&format!("{at}/nodes.yaml")));
    a.set("data-dir", Some(&format!("{at}/data")));
    let text = mesh.dir().join("first.yaml");
    fs::write(&text, &good).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=256k none {at} && cp {} {at}/nodes.yaml && exec \"$@\" 2>>{at}/log",
        text.display()
    );
    a.spawn_under(&["unshare", "-m", "sh", "-c", &script, "sh"], &[]);
    a.ready();
    let disk = PathBuf::from(format!("/proc/{}/root{at}", a.pid()));
    let log = || fs::read_to_string(disk.join("log")).unwrap();
    assert!(log().contains("ready"));
    let probe = Probe::start(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4));

    let mut fill = OpenOptions::new().create(true).append(true).open(disk.join("fill")).unwrap();
    while fill.write_all(&[0; 512]).is_ok() {}
    let mut more = OpenOptions::new().append(true).open(disk.join("log")).unwrap();
    until("positive control: not even the log takes a line", || more.write_all(&[b'.'; 512]).is_err());
    let length = log().len();

    // many words that nobody can write down
    for number in 0..20 {
        a.set("log", Some(if number % 2 == 0 { "debug" } else { "info" }));
        a.signal(Signal::SIGHUP);
        assert_eq!(a.ctl(&["status"]).code, 0);
    }
    tcp(&a.ns, &b.ns, b.overlay(V6), 1 << 18);
    assert_eq!(log().len(), length, "positive control: nothing could be logged");

    // the list is written anew, but there is no room for it
    let list = disk.join("nodes.yaml");
    assert!(fs::write(&list, good.repeat(200)).is_err(), "positive control");
    until("that is said", || a.reasons().contains("the former node list stays in use"));
    assert_eq!(a.ctl(&["status"]).code, 1);
    assert_eq!(a.json(&["peers"]).as_array().unwrap().len(), 2);
    ping(&a.ns, b.overlay(V4));

    // room again
    drop(fill);
    fs::remove_file(disk.join("fill")).unwrap();
    fs::write(&list, mesh.list(|node| node.name != "c")).unwrap();
    until("it heals", || a.ctl(&["status"]).code == 0 && a.json(&["peers"]).as_array().unwrap().len() == 1);
    until("and logs again", || log().len() > length);
    let (sent, lost) = probe.end();
    assert!(sent > 50 && lost == 0, "{lost} of {sent} lost");
    mesh.balances();
    assert_eq!(a.stop(), 0);
}

/// Nobody takes a word from the beginning, also not the last one.
#[test]
fn a_log_that_takes_nothing_is_no_reason_to_stop() {
    let Some(mesh) = Builder::new("a_log_that_takes_nothing_is_no_reason_to_stop") else { return };
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    b.restart();
    a.set("log", Some("debug"));
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert!(full().write_all(b"x").is_err(), "positive control");
    let mut command = a.ns.command(MESHD);
    let config = a.config();
    a.set("log", Some("debug"));
    command.args(["run", "--config"]).arg(config).stdout(Stdio::from(full())).stderr(full());
    let mut daemon = Process::spawn(&mut command);
    a.ready();
    ping(&a.ns, b.overlay(V4));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
}
