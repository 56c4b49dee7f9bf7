//! `meshctl doctor` finds what is provoked, names it, and its own advice mends it.

use std::process::Stdio;

use serde_json::Value;

use crate::joined::{create, has_peers};
use crate::mesh::{Builder, MESHCTL, Node, Run, V4, has, skipped};
use crate::namespace::{Process, until};
use crate::traffic::{ping, pings};

/// Its report, and its exit code. It runs inside, as a person on the node would run it.
#[track_caller]
pub(crate) fn doctor(node: &Node) -> (i32, Value) {
    let mut command = node.ns.command(MESHCTL);
    command.arg("--socket").arg(node.socket()).args(["doctor", "--json", "--config"]).arg(node.config());
    let run = Run::of(command);
    let report = serde_json::from_str(&run.out).unwrap_or_else(|error| panic!("{error}: {run:?}"));
    (run.code, report)
}

/// The checks of that name: state, words and fix.
pub(crate) fn check(report: &Value, name: &str) -> (String, String, String) {
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let checks = report["checks"].as_array().unwrap();
    let found: Vec<_> = checks.iter().filter(|check| check["name"] == name).collect();
    let worst = found.iter().find(|check| check["level"] == "bad").or(found.first());
    let worst = worst.unwrap_or_else(|| panic!("there is no check {name}: {report:#}"));
    (text(worst, "level"), text(worst, "found"), text(worst, "fix"))
}

/// Nothing is bad.
#[track_caller]
pub(crate) fn well(node: &Node) -> Value {
    let (code, report) = doctor(node);
    assert_eq!((code, &report["good"]), (0, &Value::Bool(true)), "{report:#}");
    report
}

/// That check is bad, and tells so; returns its fix.
#[track_caller]
pub(crate) fn ill(node: &Node, name: &str, words: &str) -> String {
    let (code, report) = doctor(node);
    let (level, found, fix) = check(&report, name);
    assert_eq!((code, level.as_str()), (1, "bad"), "{name}: {report:#}");
    assert!(found.contains(words), "{words}: {report:#}");
    fix
}

#[test]
fn the_doctor_finds_what_is_provoked() {
    let story = "the_doctor_finds_what_is_provoked";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let report = well(a);
    assert!(check(&report, "udp_port").1.contains("is meshd's"), "{report:#}");
    assert_eq!(check(&report, "mtu").0, "ok", "{report:#}");
    ping(&a.ns, b.overlay(V4));

    // strict reverse-path filtering on the mesh's device
    a.ns.sh("sysctl -qw net.ipv4.conf.mesh0.rp_filter=1");
    let (code, now) = doctor(a);
    // meshd may have mended it already
    if code == 1 {
        let fix = check(&now, "rp_filter").2;
        a.ns.sh(&fix);
    }
    until("that is mended", || check(&doctor(a).1, "rp_filter").0 == "ok");

    // what another overlay left
    a.ns.sh("ip link add flannel.1 type bridge");
    assert_eq!(check(&doctor(a).1, "leftovers").0, "warning");
    a.ns.sh("ip link del flannel.1");

    a.ns.sh("sysctl -qw net.ipv4.ip_forward=0");
    let (level, _, fix) = check(&doctor(a).1, "ip_forward");
    assert_eq!(level, "warning");
    a.ns.sh(&format!("{fix} >/dev/null"));
    assert_eq!(check(&well(a), "ip_forward").0, "ok");

    if !has("nft") {
        return skipped(story, "`nft` is not installed");
    }
    a.ns.sh("nft add table inet t; nft add chain inet t in '{ type filter hook input priority 0; policy accept; }'
         nft add rule inet t in udp dport 8473 drop");
    well(a);
    a.ns.sh("nft add rule inet t in udp dport 8472 counter drop");
    let fix = ill(a, "firewall", "udp dport 8472 drop");
    assert!(!b.ns.succeeds(&format!("ping -c1 -W1 {}", a.overlay(V4))), "positive control: it does drop");
    a.ns.sh(&fix);
    well(a);
    // each held the other for dead meanwhile
    until("they talk again", || pings(&b.ns, a.overlay(V4)));

    a.ns.sh("nft add chain inet t through '{ type filter hook forward priority 0; policy drop; }'");
    let (level, _, fix) = check(&doctor(a).1, "forward_policy");
    assert_eq!(level, "warning");
    a.ns.sh(&fix);
    assert_eq!(check(&well(a), "forward_policy").0, "ok");
}

#[test]
fn the_doctor_names_who_has_the_port() {
    let story = "the_doctor_names_who_has_the_port";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").node("b").build();
    let a = mesh.node("a");
    a.set("log", Some("info"));
    let report = well(a);
    assert_eq!(check(&report, "meshd").0, "warning", "it does not run: {report:#}");
    assert!(check(&report, "udp_port").1.contains("is free"), "{report:#}");

    let holder = a.ns.udp(a.underlay(V4), 8472);
    let fix = ill(a, "udp_port", &format!("(process {})", std::process::id()));
    assert!(fix.contains("kill"), "{fix}");
    drop(holder);
    well(a);

    if crate::mesh::has_kernel_vxlan() {
        a.ns.sh("ip link add flannel.1 type vxlan id 1 dstport 8472 dev ul0 && ip link set flannel.1 up");
        ill(a, "udp_port", "flannel.1 (kernel VXLAN device)");
        ill(a, "leftovers", "flannel's");
        a.ns.sh("ip link del flannel.1");
        well(a);
    }

    let data = a.dir.join("data");
    std::fs::create_dir_all(&data).unwrap();
    let key = data.join("node.key");
    std::fs::write(&key, "x").unwrap();
    a.ns.sh(&format!("chmod 644 {}", key.display()));
    let fix = ill(a, "key_file", "mode 0644");
    a.ns.sh(&fix);
    well(a);

    a.set("prot", Some("1"));
    ill(a, "configuration", "did you mean `port`");
    a.set("prot", None);
    a.restart();
    well(a);
    // a second binder shares the port by SO_REUSEPORT, and takes half of the packets
    let mut second = a.ns.command("python3");
    second.args([
        "-c",
        "import socket,time\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n\
        s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEPORT,1)\ns.bind(('10.9.0.1',8472))\ntime.sleep(60)",
    ]);
    if has("python3") {
        let second = Process::spawn(&mut second);
        until("it shares the port", || doctor(a).0 == 1);
        ill(a, "udp_port", "python3");
        drop(second);
        until("it is gone", || doctor(a).0 == 0);
    }
}

/// What is secret in a data directory: each line of each file that has a private key or a token in it, and its file.
fn secrets(dir: &std::path::Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            found.extend(secrets(&path));
        }
        let Some(text) = kind.is_file().then(|| std::fs::read_to_string(&path).ok()).flatten() else { continue };
        let name = path.display().to_string();
        let pem = text.split("-----BEGIN").filter(|part| part.contains("PRIVATE KEY"));
        let pem: Vec<&str> = pem.flat_map(|part| part.split("-----END").next().unwrap().split(['\n', '\\'])).collect();
        let plain: Vec<&str> = match name.rsplit('/').next().unwrap() {
            "node.key" | "node-token" => text.lines().collect(),
            _ => Vec::new(),
        };
        let words =
            pem.into_iter().chain(plain).flat_map(|line| line.split(|c: char| !c.is_ascii_graphic() || c == '"'));
        found.extend(words.filter(|word| word.len() >= 20).map(|word| (name.clone(), word.to_owned())));
    }
    found
}

#[test]
fn members_are_well_and_their_secrets_stay_with_them() {
    let story = "members_are_well_and_their_secrets_stay_with_them";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.server("a").agent("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    a.restart();
    let token = create(a, &[]);
    b.set("token", Some(&token));
    b.restart();
    has_peers(b, 1);
    ping(&b.ns, a.given());
    let report = well(a);
    assert!(check(&report, "server_port").1.contains("mesh-sidecar's"), "{report:#}");
    assert!(check(&well(b), "server_port").1.contains("no server"));
    let why = b.json(&["why", "a"]);
    assert_eq!((&why["good"], &why["destination"]), (&true.into(), &a.given().to_string().into()), "{why:#}");

    for (node, secret) in [(b, token.as_str()), (a, token.as_str())] {
        let archive = node.dir.join("report.tar");
        let mut command = node.ns.command(MESHCTL);
        command.arg("--socket").arg(node.socket()).arg("bugreport").arg("-o").arg(&archive);
        command.arg("--config").arg(node.config());
        let run = Run::of(command);
        assert_eq!(run.code, 0, "{run:?}");
        let bytes = std::fs::read(&archive).unwrap();
        let has = |what: &str| bytes.windows(what.len()).any(|window| window == what.as_bytes());
        assert!(!has(secret), "{}: the token is in it", node.name);
        let secrets = secrets(&node.dir.join("data"));
        for file in ["identity.key", "node.key"] {
            assert!(
                secrets.iter().any(|(name, _)| name.ends_with(file)),
                "positive control: {file} is there to be found"
            );
        }
        for (file, secret) in &secrets {
            assert!(!has(secret), "{}: {file} is in it", node.name);
        }
        assert!(has(node.ctl(&["key", "show"]).out.trim()), "positive control: the public key is in it");
    }
    let config = std::fs::read_to_string(b.config()).unwrap();
    assert!(config.contains(&token), "positive control: the token was there to be found");
}

#[test]
fn the_doctor_looks_at_the_servers_own_etcd() {
    let story = "the_doctor_looks_at_the_servers_own_etcd";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("etcd") || !has("nft") {
        return skipped(story, "there is no `etcd` (Debian: etcd-server), or no `nft`");
    }
    let mesh = mesh.server("a").set("cluster-init", true).build();
    let a = mesh.node("a");
    a.set("log", Some("info"));
    assert!(check(&well(a), "etcd_port").1.contains("is free"));

    // as a service of the machine's own
    let data = a.dir.join("other");
    let mut command = a.ns.command("etcd");
    let other = Process::spawn(command.arg("--data-dir").arg(&data).stdout(Stdio::null()).stderr(Stdio::null()));
    until("it listens", || a.ns.succeeds("ss -Hltn sport = 2379 | grep -q 2379"));
    let fix = ill(a, "etcd_port", "belongs to etcd");
    assert_eq!(fix, "systemctl disable --now etcd");
    drop(other);
    until("it has ended", || !a.ns.succeeds("ss -Hltn sport = 2379 | grep -q 2379"));

    a.restart();
    // while it starts its sockets may change hands
    until("its own has the ports", || check(&doctor(a).1, "etcd_port").1.contains("the servers' own etcd's"));
    well(a);
    a.ns.sh("nft add table inet t; nft add chain inet t in '{ type filter hook input priority 0; policy accept; }'
         nft add rule inet t in tcp dport 2380 counter drop");
    let fix = ill(a, "firewall", "tcp dport 2380 drop");
    a.ns.sh(&fix);
    well(a);
}
