//! What meshd, its launcher and its sidecar may do once they run, and that they get by with it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::joined::{create, has_peers};
use crate::mesh::{Builder, MESHCTL, Node, Run, V4, has, skipped};
use crate::namespace::until;
use crate::traffic::{ping, pings};

const NET_ADMIN: u64 = 1 << 12;
const DAC_READ_SEARCH: u64 = 1 << 2;
/// CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID and SETPCAP.
const OF_LAUNCHER: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8;
/// Somebody whom nobody knows.
const SOMEBODY: u32 = 64321;

/// What `/proc` says of one thread.
#[derive(Debug, PartialEq)]
struct Rights {
    effective: u64,
    permitted: u64,
    bounding: u64,
    /// Those that a program which it starts would get.
    handed_on: u64,
    no_new: bool,
    uid: u32,
}

impl Rights {
    fn of(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {status}"));
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        let set = |name| u64::from_str_radix(&field(name), 16).unwrap();
        Rights {
            effective: set("CapEff:"),
            permitted: set("CapPrm:"),
            bounding: set("CapBnd:"),
            handed_on: set("CapInh:") | set("CapAmb:"),
            no_new: field("NoNewPrivs:") == "1",
            uid: field("Uid:").parse().unwrap(),
        }
    }

    /// Those of each thread of the process.
    fn of_all(pid: u32) -> Vec<Self> {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        threads.map(|thread| Self::of(&fs::read_to_string(thread.unwrap().path().join("status")).unwrap())).collect()
    }

    fn only(kept: u64) -> Self {
        Rights { effective: kept, permitted: kept, bounding: kept, handed_on: 0, no_new: true, uid: 0 }
    }
}

#[track_caller]
fn has_only(node: &Node, kept: u64) {
    let rights = Rights::of_all(node.pid());
    assert!(rights.len() > 1, "workers are threads: {rights:?}");
    for thread in rights {
        assert_eq!(thread, Rights::only(kept), "{}: {}", node.name, node.log());
    }
}

#[test]
fn meshd_keeps_net_admin_alone_and_everything_works() {
    let story = "meshd_keeps_net_admin_alone_and_everything_works";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.encrypted().node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let before = Rights::of(&a.ns.sh("cat /proc/self/status"));
    assert!(before.effective & !NET_ADMIN != 0 && !before.no_new, "control: it was started with more: {before:?}");
    has_only(a, NET_ADMIN);
    assert_eq!(a.json(&["status"])["capabilities"], serde_json::json!(["CAP_NET_ADMIN"]));
    ping(&a.ns, b.overlay(V4));

    // everything that is done again while it runs
    a.ns.sh("ip link del mesh0");
    until("the device is back", || pings(&a.ns, b.overlay(V4)));
    let (setting, route) = ("/proc/sys/net/ipv4/conf/mesh0/rp_filter", "10.42.2.0/24 dev mesh0");
    a.ns.sh(&format!("echo 1 >{setting}; ip route del {route}; ip link set mesh0 down; ip link set mesh0 up"));
    until("the setting is back", || a.ns.sh(&format!("cat {setting}")).trim() == "2");
    until("the routes are back", || pings(&a.ns, b.overlay(V4)));
    a.set("mtu", Some("1300"));
    a.signal(Signal::SIGHUP);
    until("the MTU is another", || a.ns.sh("cat /proc/sys/net/ipv6/conf/mesh0/mtu").trim() == "1300");
    a.ns.sh("ip addr del 10.9.0.1/24 dev ul0; sleep 0.2; ip addr add 10.9.0.1/24 dev ul0");
    until("the underlay address is back", || pings(&a.ns, b.overlay(V4)));
    let mut echoes = a.ns.command(MESHCTL); // its echoes leave from where it runs
    echoes.arg("--socket").arg(a.socket()).args(["ping", "b"]);
    let answer = Run::of(echoes);
    assert_eq!(answer.code, 0, "{answer:?}");
    has_only(a, NET_ADMIN);
    assert_eq!(a.stop(), 0);
    assert!(!a.socket().exists());
}

#[test]
fn what_a_configuration_needs_beside_is_kept_and_told() {
    let Some(mesh) = Builder::new("what_a_configuration_needs_beside_is_kept_and_told") else { return };
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    let folder = mesh.dir().join("home");
    let list = folder.join("nodes.yaml");
    fs::create_dir(&folder).unwrap();
    fs::write(&list, mesh.list(|_| true).replace("10.42.2.0/24", "10.42.22.0/24")).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    chown(&folder, Some(SOMEBODY), None).unwrap();
    a.set("nodes-file", Some(list.to_str().unwrap()));
    a.restart();
    b.restart();
    has_only(b, NET_ADMIN);
    has_only(a, NET_ADMIN | DAC_READ_SEARCH);
    assert!(a.log().contains("CAP_DAC_READ_SEARCH is kept, since"), "{}", a.log());
    assert!(!pings(&a.ns, b.overlay(V4)), "positive control: the list says otherwise");
    fs::write(&list, mesh.list(|_| true)).unwrap();
    until("a change of the list is seen", || pings(&a.ns, b.overlay(V4)));
}

#[test]
fn the_sidecar_has_its_own_account_and_is_started_again_under_it() {
    let story = "the_sidecar_has_its_own_account_and_is_started_again_under_it";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("mount") {
        return skipped(story, "`mount` is not installed");
    }
    let mesh = mesh.server("a").agent("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    // an account that only these two see, and a folder that it can enter
    let passwd = mesh.dir().join("passwd");
    let known = fs::read_to_string("/etc/passwd").unwrap();
    let known: String =
        known.lines().filter(|line| !line.starts_with("mesh-sidecar:")).map(|l| format!("{l}\n")).collect();
    fs::write(&passwd, known + &format!("mesh-sidecar:x:{SOMEBODY}:{SOMEBODY}::/:/usr/sbin/nologin\n")).unwrap();
    for folder in [mesh.dir(), &a.dir, &b.dir] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let script = format!("mount --bind {} /etc/passwd && exec \"$@\"", passwd.display());
    let front = ["sh", "-c", &script, "sh"];
    a.spawn_under(&front, &[]);
    a.ready();
    b.token(Some(&create(a, &[])));
    b.spawn_under(&front, &[]);
    b.ready();
    has_peers(a, 1);
    for node in [a, b] {
        has_only(node, NET_ADMIN);
        assert_eq!(Rights::of_all(node.launcher().unwrap()), [Rights::only(OF_LAUNCHER)]);
    }
    let is_right = |pid| {
        Rights::of_all(pid).iter().all(|thread| {
            thread.uid == SOMEBODY && thread.effective | thread.permitted | thread.handed_on == 0 && thread.no_new
        })
    };
    let first = a.sidecar().unwrap();
    assert!(is_right(first), "{:?}", Rights::of_all(first));
    assert!(!is_right(a.pid()), "positive control");
    kill(Pid::from_raw(first.cast_signed()), Signal::SIGKILL).unwrap();
    until("another one runs", || a.sidecar().is_some_and(|new| new != first && is_right(new)));
    until("it serves", || b.json(&["status"])["membership"]["connected"] == true);
    ping(&b.ns, a.given());

    // one that does not end by itself is another user's, and is ended all the same
    let stopped = b.sidecar().unwrap();
    kill(Pid::from_raw(stopped.cast_signed()), Signal::SIGSTOP).unwrap();
    b.signal(Signal::SIGHUP);
    b.set("log", Some("debug"));
    b.signal(Signal::SIGHUP);
    until("it is replaced", || b.sidecar().is_some_and(|new| new != stopped && is_right(new)));
    until("it is well again", || b.json(&["status"])["membership"]["connected"] == true);

    // its files are that user's, too
    assert!(b.dir.join("data/agent/membership.json").exists());
    let left = b.ctl(&["leave"]);
    assert!(left.code == 0 && !left.out.contains("still there"), "{left:?}");
    assert!(!b.dir.join("data/agent/membership.json").exists());

    // and who kills meshd gets rid of all of them
    let (launcher, sidecar) = (a.launcher().unwrap(), a.sidecar().unwrap());
    a.kill();
    for pid in [launcher, sidecar] {
        until("it has ended", || !fs::exists(format!("/proc/{pid}/exe")).unwrap_or(false));
    }
}
