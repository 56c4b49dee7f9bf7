//! What `meshctl capture` and the flight recorder show, read by tshark.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::mesh::{Builder, MESHCTL, Node, Run, V4, V6, skipped};
use crate::namespace::{Process, until};
use crate::traffic::{ping, tcp};

pub(crate) fn has_tshark() -> bool {
    Command::new("tshark").arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// What tshark says: these fields of each packet that the filter lets through, one packet a line.
#[track_caller]
pub(crate) fn tshark(file: &Path, filter: &str, fields: &[&str]) -> Vec<String> {
    read_as("vxlan", file, filter, fields)
}

/// The same where port 8472 has that protocol.
#[track_caller]
fn read_as(protocol: &str, file: &Path, filter: &str, fields: &[&str]) -> Vec<String> {
    let mut command = Command::new("tshark");
    let port = format!("udp.port==8472,{protocol}");
    command.arg("-r").arg(file).args(["-d", &port, "-Y", filter, "-T", "fields", "-E", "separator= "]);
    fields.iter().for_each(|field| _ = command.args(["-e", field]));
    let run = Run::of(command);
    assert_eq!(run.code, 0, "{run:?}");
    run.out.lines().map(str::to_owned).collect()
}

/// A capture that runs.
pub(crate) fn capture(node: &Node, file: &Path, args: &[&str]) -> Process {
    let mut command = Command::new(MESHCTL);
    command.arg("--socket").arg(node.socket()).arg("capture").arg("-w").arg(file).args(args);
    let capture = Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
    // its head is written once meshd captures
    until("the capture has begun", || file.metadata().is_ok_and(|meta| meta.len() > 0));
    capture
}

#[track_caller]
pub(crate) fn ends(mut capture: Process) {
    capture.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(capture.wait(), 0);
}

fn a_mesh_is_captured(story: &'static str, encrypted: bool, io: &'static str) {
    let Some(mesh) = Builder::new(story) else { return };
    if !has_tshark() {
        return skipped(story, "`tshark` is not installed");
    }
    let mesh = if encrypted { mesh.encrypted() } else { mesh };
    let mesh = mesh.node("a").set("io", io).node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(&a.ns, b.overlay(V4));
    let file = mesh.dir().join("all.pcapng");
    let running = capture(a, &file, &[]);
    for family in [V4, V6] {
        ping(&a.ns, b.overlay(family));
        tcp(&a.ns, &b.ns, b.overlay(family), 1 << 17);
    }
    a.ns.sh("ip route add 10.42.99.1/32 dev mesh0");
    assert!(!a.ns.succeeds("ping -c 1 -W 1 10.42.99.1"), "nobody is there");
    ends(running);

    // every packet is sound, and on the interface that it was seen at
    let protocol = if encrypted { "wg" } else { "vxlan" };
    let read = |filter: &str| read_as(protocol, &file, filter, &["frame.number"]);
    assert_eq!(read("_ws.malformed"), [""; 0]);
    let inner = |filter: &str| read(&format!("frame.interface_id == 0 && {filter}")).len();
    let outer = |filter: &str| read(&format!("frame.interface_id == 1 && {filter}")).len();
    assert_eq!((inner("icmp.type == 8 && ip.dst == 10.42.2.1"), inner("icmp.type == 0")), (3, 3));
    assert_eq!((inner("icmpv6.type == 128"), inner("icmpv6.type == 129")), (3, 3));
    assert!(inner("tcp") > 10);
    let direction = tshark(&file, "frame.interface_id == 0 && icmp.type == 8", &["frame.packet_flags_direction"]);
    assert!(direction.iter().all(|flag| flag.ends_with('2')), "outbound: {direction:?}");
    if encrypted {
        assert!(outer("wg.type == 4") >= 12 && outer("icmp") == 0, "nothing of it in the clear");
    } else {
        assert_eq!((outer("icmp.type == 8"), outer("icmp.type == 0")), (3, 3), "within VXLAN");
        assert!(outer("bfd && vxlan.vni == 4095") > 0, "liveness is seen too");
    }
    assert_eq!(tshark(&file, "udp.checksum.status == 0 && frame.interface_id == 1", &["frame.number"]), [""; 0]);
    // and what was dropped says why
    let dropped = tshark(&file, "frame.comment contains \"dropped: no_route\"", &["frame.interface_id", "ip.dst"]);
    assert_eq!(dropped, ["0 10.42.99.1"]);
    // times are those of a clock
    let times = tshark(&file, "frame", &["frame.time_epoch"]);
    let now = Run::of({
        let mut date = Command::new("date");
        date.arg("+%s");
        date
    });
    let now: f64 = now.out.trim().parse().unwrap();
    let seen: f64 = times.first().unwrap().parse().unwrap();
    assert!((now - seen).abs() < 120.0, "{now} {seen}");
    mesh.balances();
}

#[test]
fn a_clear_mesh_is_captured() {
    a_mesh_is_captured("a_clear_mesh_is_captured", false, "auto");
}

#[test]
fn an_encrypted_mesh_is_captured() {
    a_mesh_is_captured("an_encrypted_mesh_is_captured", true, "auto");
}

#[test]
fn a_ring_is_captured_too() {
    a_mesh_is_captured("a_ring_is_captured_too", true, "uring");
}

#[test]
fn a_plain_back_end_is_captured_too() {
    a_mesh_is_captured("a_plain_back_end_is_captured_too", false, "tokio");
}

#[test]
fn filters_and_the_flight_recorder() {
    let story = "filters_and_the_flight_recorder";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_tshark() {
        return skipped(story, "`tshark` is not installed");
    }
    let mesh = mesh.node("a").node("b").stranger("s").start();
    let [a, b, s] = mesh.three(["a", "b", "s"]);
    let off = a.ctl(&["capture", "--recorded", "-w", "/dev/null"]);
    assert!(off.code == 1 && off.err.contains("--recorder"), "{off:?}");
    assert_eq!(a.ctl(&["capture", "--recorder", "500"]).code, 0);

    let (icmp, drops) = (mesh.dir().join("icmp.pcapng"), mesh.dir().join("drops.pcapng"));
    let running = capture(a, &icmp, &["peer", "b", "icmp"]);
    // in super-packets these are 64 packets, and as many outside
    tcp(&a.ns, &b.ns, b.overlay(V4), 4 << 20);
    ping(&a.ns, b.overlay(V4));
    ends(running);
    let [all, inner, outer] = ["frame", "icmp && frame.interface_id == 0", "icmp && frame.interface_id == 1"]
        .map(|filter| tshark(&icmp, filter, &["frame.number"]).len());
    assert_eq!((all, inner, outer), (12, 6, 6), "inside and outside, there and back");

    let running = capture(a, &drops, &["--outer", "drop"]);
    let spoofer = s.ns.udp(s.underlay(V4), 0);
    (0..3).for_each(|_| _ = spoofer.send_to(b"\x08\0\0\0\0\0\x01\0", (a.underlay(V4), 8472)).unwrap());
    ping(&a.ns, b.overlay(V4));
    until("they are counted", || a.drops("unknown_source") > 0);
    ends(running);
    let seen = tshark(&drops, "frame", &["ip.src", "frame.comment"]);
    assert!(
        !seen.is_empty() && seen.iter().all(|line| line.starts_with("10.9.0.3") && line.contains("unknown_source")),
        "{seen:?}"
    );

    let file = mesh.dir().join("recorded.pcapng");
    let run = a.ctl(&["capture", "--recorded", "-w", file.to_str().unwrap(), "--json"]);
    assert_eq!(run.code, 0, "{run:?}");
    let recorded = tshark(&file, "frame", &["frame.number"]).len();
    assert!((100..=500).contains(&recorded), "{recorded}");
    assert!(!tshark(&file, "frame.comment contains \"unknown_source\"", &["frame.number"]).is_empty());
    assert!(tshark(&file, "frame.cap_len > 192", &["frame.number"]).is_empty(), "headers alone");
    assert_eq!(a.ctl(&["capture", "--recorder", "0"]).code, 0);
    let wrong = a.ctl(&["capture", "nonsense"]);
    assert!(wrong.code == 1 && wrong.err.contains("nonsense"), "{wrong:?}");
    mesh.balances();
}
