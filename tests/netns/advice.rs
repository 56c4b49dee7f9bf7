//! What `meshctl doctor` says is to be done, done word for word: each finding that can be provoked here is provoked, its own
//! command is run as it stands, and it is gone.
//!
//! Not here: what takes another kernel (its version, offloads), the whole machine's clock or receive buffer, or a second
//! machine's configuration; `src/doctor/checks/tests.rs` has those. nftables, routing and the key's file are in `doctor`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::doctor::{check, doctor, ill, well};
use crate::mesh::{Builder, MESHCTL, Node, Run, V4, has, has_kernel_vxlan, skipped};
use crate::namespace::{Process, until};
use crate::traffic::pings;

/// Runs a fix inside. Its first word is a command's, and what is not is a remark of the shell's.
#[track_caller]
fn follow(node: &Node, fix: &str) {
    node.ns.sh(fix);
}

/// That check is at that level, and tells so; returns its fix.
#[track_caller]
fn finds(node: &Node, name: &str, level: &str, words: &str) -> String {
    let (_, report) = doctor(node);
    let (now, found, fix) = check(&report, name);
    assert!(now == level && found.contains(words), "{name}: {words}: {report:#}");
    fix
}

#[track_caller]
fn is_ok(node: &Node, name: &str) {
    until(name, || check(&doctor(node).1, name).0 == "ok");
}

/// A process called `name` that holds a port of the node's.
fn holder(node: &Node, name: &str, socket: &str) -> Process {
    let program = node.dir.join(name);
    if !program.exists() {
        // a process is called what its file is called
        std::os::unix::fs::symlink(python().unwrap(), &program).unwrap();
    }
    let mut command = node.ns.command(program.to_str().unwrap());
    let script = format!(
        "import socket,time\ns=socket.socket(socket.AF_INET,socket.{socket}\nprint('bound',flush=True)\ntime.sleep(60)"
    );
    let process = Process::spawn(command.args(["-c", &script]).stdout(Stdio::null()));
    let pid = process.id();
    until("it is bound", || node.ns.succeeds(&format!("ss -Hlntup | grep -q pid={pid},")));
    process
}

/// The interpreter itself, where what is in the path may be a script that starts it.
fn python() -> Option<PathBuf> {
    let output = Command::new("python3").args(["-c", "import sys,os;print(os.path.realpath(sys.executable))"]).output();
    let path = PathBuf::from(String::from_utf8(output.ok()?.stdout).ok()?.trim());
    path.exists().then_some(path)
}

#[test]
fn who_has_a_port_is_sent_away() {
    let story = "who_has_a_port_is_sent_away";
    let Some(mesh) = Builder::new(story) else { return };
    if python().is_none() || !has("ss") {
        return skipped(story, "there is no `python3`, or no `ss`");
    }
    let mesh = mesh.node("a").node("b").build();
    let a = mesh.node("a");
    a.set("log", Some("info"));
    let udp = "SOCK_DGRAM)\ns.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEPORT,1)\ns.bind(('10.9.0.1',8472))";
    let mut vpnd = holder(a, "vpnd", udp);
    let fix = ill(a, "udp_port", "belongs to vpnd");
    assert!(fix.starts_with(&format!("kill {}", vpnd.id())), "{fix}");
    follow(a, &fix);
    vpnd.wait();
    well(a);

    std::fs::create_dir_all(a.dir.join("data/server")).unwrap();
    let tcp = "SOCK_STREAM)\ns.bind(('',9345))\ns.listen()";
    let mut nginx = holder(a, "nginx", tcp);
    follow(a, &ill(a, "server_port", "belongs to nginx"));
    nginx.wait();
    well(a);
    std::fs::remove_dir(a.dir.join("data/server")).unwrap();

    a.restart();
    well(a);
    let mut second = holder(a, "meshd", udp);
    let fix = ill(a, "udp_port", "two meshd share UDP 8472");
    assert_eq!(fix, format!("kill {}", second.id()), "the younger one");
    follow(a, &fix);
    second.wait();
    well(a);

    if has_kernel_vxlan() {
        a.stop();
        a.ns.sh("ip link add flannel.1 type vxlan id 1 dstport 8472 dev ul0 && ip link set flannel.1 up");
        let (of_port, of_device) = (ill(a, "udp_port", "flannel.1"), ill(a, "leftovers", "flannel's"));
        assert!(of_port.starts_with("ip link del flannel.1") && of_device.starts_with("ip link del flannel.1"));
        follow(a, &of_device);
        well(a);
        a.ns.sh("ip link add flannel.1 type vxlan id 1 dstport 8472 dev ul0 && ip link set flannel.1 up");
        follow(a, &of_port);
        well(a);
    }
}

#[test]
fn settings_and_devices_are_put_right() {
    let story = "settings_and_devices_are_put_right";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    well(a);
    for (device, whose) in [("flannel-wg", "flannel"), ("cilium_host", "Cilium"), ("vxlan.calico", "Calico")] {
        a.ns.sh(&format!("ip link add {device} type bridge"));
        follow(a, &finds(a, "leftovers", "warning", whose));
        is_ok(a, "leftovers");
    }
    a.ns.sh("ip link add cni0 type bridge && ip addr add 10.99.0.1/24 dev cni0");
    follow(a, &ill(a, "leftovers", "cni0 has 10.99.0.1/24"));
    is_ok(a, "leftovers");

    a.ns.sh("ip link set ul0 mtu 1300");
    until("that is seen", || check(&doctor(a).1, "mtu").0 == "warning");
    follow(a, &finds(a, "mtu", "warning", "IPv6 needs 1280"));
    is_ok(a, "mtu");

    // a stopped meshd leaves its device, and does not put it right by itself
    a.stop();
    a.ns.sh("sysctl -qw net.ipv4.conf.mesh0.rp_filter=1; ip link set mesh0 mtu 1500");
    follow(a, &ill(a, "rp_filter", "strict on mesh0"));
    is_ok(a, "rp_filter");
    follow(a, &ill(a, "mtu", "mesh0 has 1500"));
    is_ok(a, "mtu");
    a.restart();
    until("they talk", || pings(&a.ns, b.overlay(V4)));
    well(a);
}

#[test]
fn rules_of_iptables_are_opened() {
    let story = "rules_of_iptables_are_opened";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("iptables") || !has("iptables-save") {
        return skipped(story, "there is no `iptables`");
    }
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    if !a.ns.succeeds("iptables -w -P INPUT ACCEPT && iptables-save | grep -q INPUT") {
        return skipped(story, "iptables does not work here");
    }
    // what is tried with is let in
    let closed = "iptables -w -A INPUT -p icmp -j ACCEPT; iptables -w -P INPUT DROP";
    for rules in ["iptables -w -A INPUT -p udp -m udp --dport 8472 -j DROP", closed] {
        a.ns.sh(rules);
        let fix = ill(a, "firewall", "UDP 8472 is dropped by");
        until("it does drop", || !pings(&b.ns, a.overlay(V4)));
        follow(a, &fix);
        is_ok(a, "firewall");
        until("they talk again", || pings(&b.ns, a.overlay(V4)));
        a.ns.sh("iptables -w -P INPUT ACCEPT; iptables -w -F INPUT");
    }
    a.ns.sh("iptables -w -P FORWARD DROP");
    follow(a, &finds(a, "forward_policy", "warning", "is dropped by"));
    is_ok(a, "forward_policy");
}

/// A view of the file system in which the machine has what a story gives it: an empty /run and an /etc with little in it.
struct Guise {
    process: Process,
    tools: PathBuf,
}

impl Guise {
    fn new(node: &Node) -> Self {
        let tools = node.dir.join("tools");
        std::fs::create_dir_all(&tools).unwrap();
        // the file is what is tried here; who would read it again does not run
        node.ns.sh(&format!("printf '#!/bin/sh\\n' >{0}/systemctl; chmod 755 {0}/systemctl", tools.display()));
        let ready = node.dir.join("guise");
        std::fs::remove_file(&ready).ok();
        let script = format!(
            "mount -t tmpfs none /run && mount -t tmpfs none /etc && mkdir -p /etc/systemd /etc/NetworkManager/conf.d \
             && touch {} && exec sleep 60",
            ready.display()
        );
        let process = Process::spawn(node.ns.command("unshare").args(["--mount", "sh", "-c", &script]));
        until("the view is there", || ready.exists());
        Guise { process, tools }
    }

    fn sh(&self, script: &str) -> Run {
        let mut command = Command::new("nsenter");
        let path = format!("{}:{}", self.tools.display(), std::env::var("PATH").unwrap_or_default());
        command.args(["-t", &self.process.id().to_string(), "--mount", "--net", "sh", "-ec", script]).env("PATH", path);
        Run::of(command)
    }

    #[track_caller]
    fn check(&self, node: &Node, name: &str) -> (String, String, String) {
        let (socket, config) = (node.socket(), node.config());
        let script = format!("{MESHCTL} --socket {} doctor --json --config {}", socket.display(), config.display());
        let run = self.sh(&script);
        let report: Value = serde_json::from_str(&run.out).unwrap_or_else(|error| panic!("{error}: {run:?}"));
        check(&report, name)
    }
}

#[test]
fn who_takes_routes_or_the_device_is_told_not_to() {
    let story = "who_takes_routes_or_the_device_is_told_not_to";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("nsenter") || !has("unshare") {
        return skipped(story, "there is no `nsenter`, or no `unshare`");
    }
    let mesh = mesh.node("a").node("b").start();
    let a = mesh.node("a");
    let guise = Guise::new(a);
    let signs = [
        ("networkd", "mkdir -p /run/systemd/netif && touch /run/systemd/netif/state", "deletes routes"),
        ("network_manager", "mkdir -p /run/NetworkManager", "may take hold of mesh0"),
    ];
    for (name, sign, words) in signs {
        assert_eq!(guise.check(a, name).0, "ok", "{name} does not run");
        guise.sh(sign);
        let (level, found, fix) = guise.check(a, name);
        assert!(level == "warning" && found.contains(words), "{found}");
        let run = guise.sh(&fix);
        assert_eq!(run.code, 0, "{fix}: {run:?}");
        assert_eq!(guise.check(a, name).0, "ok", "{fix}");
    }
}
