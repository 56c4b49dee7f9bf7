//! A network namespace for each test, and what the tests do in it.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn nets<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &[&str]) -> Vec<T> {
    text.iter().map(|t| t.parse().unwrap()).collect()
}

/// A TUN device as meshd makes it.
pub(crate) fn tun() {
    sh("ip tuntap add mode tun name mesh0 multi_queue vnet_hdr");
}

/// All that `ensure` may touch, and what it may not. Without what changes by itself: counters and lifetimes.
pub(crate) fn whole_state() -> String {
    sh("ip link show dev mesh0 2>/dev/null; ip -o addr show | sed 's/ valid_lft.*//'; \
        ip route show table all; ip -6 route show table all | sed 's/ expires [0-9]*sec//'; \
        grep -s . /proc/sys/net/ipv[46]/conf/mesh0/* | grep -v 'stable_secret\\|/disable_ipv6'; true")
}

/// Shows the difference alone, the state being long.
#[track_caller]
pub(crate) fn assert_same(before: &str, context: &str) {
    let now = whole_state();
    let only_in =
        |a: &str, b: &str| a.lines().filter(|l| !b.lines().any(|m| m == *l)).map(str::to_owned).collect::<Vec<_>>();
    let (gone, new) = (only_in(before, &now), only_in(&now, before));
    assert!(now == before, "{context}\ngone: {gone:#?}\nnew: {new:#?}");
}

#[track_caller]
pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").arg("-c").arg(command).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command}\n{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

pub(crate) fn succeeds(command: &str) -> bool {
    Command::new("sh").arg("-c").arg(command).output().unwrap().status.success()
}

/// Runs `body` in a namespace of its own: makes the namespace and runs this binary, for this test alone, inside it.
pub(crate) fn in_namespace(test: &str, body: impl AsyncFnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body());
        return;
    }
    if let Some(reason) = why_not() {
        eprintln!("SKIPPED {test}: {reason}");
        return;
    }
    let namespace = Namespace::new(test);
    let output = Command::new("ip")
        .args(["netns", "exec", &namespace.0])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprint!("{err}");
    assert!(output.status.success() && out.contains("1 passed"), "{out}");
}

fn why_not() -> Option<&'static str> {
    if std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() != 0) {
        return Some("needs root");
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("there is no /dev/net/tun");
    }
    if !succeeds("ip netns list") {
        return Some("needs iproute2");
    }
    None
}

/// A network namespace with an underlay, removed when dropped.
struct Namespace(String);

impl Namespace {
    fn new(test: &str) -> Self {
        let namespace = Namespace(format!("meshd-host-{}-{test}", std::process::id()));
        let name = &namespace.0;
        sh(&format!("ip netns add {name}"));
        sh(&format!(
            "ip netns exec {name} sh -ec '
                ip link set lo up
                ip link add under0 type veth peer name peer0
                ip link set under0 addrgenmode none
                ip link set peer0 addrgenmode none
                ip link set under0 up
                ip link set peer0 up
                ip addr add 10.9.0.1/24 dev under0
                ip -6 addr add fd09::1/64 dev under0 nodad
                ip route add default via 10.9.0.254
                ip -6 route add default via fd09::fe
'"
        ));
        namespace
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Command::new("ip").args(["netns", "del", &self.0]).status().ok();
    }
}

const INSIDE: &str = "MESHD_HOST_TEST_INSIDE";
