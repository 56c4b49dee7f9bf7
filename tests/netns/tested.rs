//! `meshctl test`: all pairs, both families, all sizes. `meshd selftest`: what this machine can do.

use serde_json::Value;

use crate::mesh::{Builder, MESHCTL, MESHD, Node, Run, V4, V6, has_kernel_vxlan, skipped};
use crate::namespace::until;

/// The answer and whether it is good, which the exit code says too.
#[track_caller]
fn tested(node: &Node) -> Value {
    let run = run(node, &["--json", "--timeout", "500ms"]);
    let answer: Value = serde_json::from_str(&run.out).unwrap_or_else(|error| panic!("{error}: {run:?}"));
    assert_eq!(run.code, if answer["good"] == true { 0 } else { 1 }, "{run:?}");
    answer
}

/// Echoes are sent by meshctl itself, so it runs where the node is.
#[track_caller]
fn run(node: &Node, args: &[&str]) -> Run {
    let mut command = node.ns.command(MESHCTL);
    command.arg("--socket").arg(node.socket()).arg("test").args(args);
    Run::of(command)
}

fn pairs(answer: &Value) -> Vec<String> {
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let pair = |pair: &Value| ["from", "to", "state"].map(|field| word(&pair[field])).join(" ");
    answer["pairs"].as_array().unwrap().iter().map(pair).collect()
}

#[test]
fn everybody_is_asked_about_everybody() {
    let story = "everybody_is_asked_about_everybody";
    for encrypted in [false, true] {
        let Some(mesh) = Builder::new(story) else { return };
        let mesh = if encrypted { mesh.encrypted() } else { mesh };
        let mesh = mesh.node("a").node("b").node("c").start();
        let [a, b, c] = mesh.three(["a", "b", "c"]);
        let answer = tested(a);
        assert_eq!(pairs(&answer), ["a b up", "a c up", "b a up", "b c up", "c a up", "c b up"], "{answer:#}");
        assert_eq!((&answer["good"], &answer["silent"]), (&true.into(), &serde_json::json!([])));
        let mtu = if encrypted { 1440 } else { 1450 };
        for pair in answer["pairs"].as_array().unwrap() {
            assert_eq!(pair["path_mtu"], mtu);
            assert_eq!(pair["encryption"], if encrypted { "wireguard" } else { "none" });
        }
        let echoes = answer["echoes"].as_array().unwrap();
        let to: Vec<_> = echoes.iter().map(|echo| echo["address"].as_str().unwrap()).collect();
        assert_eq!(to, ["10.42.2.1", "fd42:0:0:2::1", "10.42.3.1", "fd42:0:0:3::1"]);
        for echo in echoes {
            let sizes = echo["sizes"].as_array().unwrap();
            let headers = if echo["address"].as_str().unwrap().contains(':') { 48 } else { 28 };
            assert_eq!(sizes.last().unwrap()["payload"], mtu - headers, "up to the MTU");
        }
        let text = run(a, &[]).out;
        assert!(text.contains("good") && text.contains("ECHOES TO"), "{text}");

        c.kill();
        let dead = |node: &Node| node.json(&["peers"])[1]["state"] == "down";
        until("it is noticed", || dead(a) && dead(b));
        let answer = tested(a);
        assert_eq!((&answer["good"], &answer["silent"]), (&false.into(), &serde_json::json!(["c"])));
        let seen = pairs(&answer);
        assert!(["a b up", "a c down", "b a up", "b c down"].iter().all(|pair| seen.contains(&(*pair).to_owned())));
        c.restart();
        mesh.balances();
    }
}

#[test]
fn who_is_no_meshd_is_echoed_and_not_asked() {
    let story = "who_is_no_meshd_is_echoed_and_not_asked";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_kernel_vxlan() {
        return skipped(story, "this kernel has no VXLAN device");
    }
    let mesh = mesh.node("a").node("b").kernel("k").start();
    let answer = tested(mesh.node("a"));
    assert_eq!(pairs(&answer), ["a b up", "a k unknown", "b a up", "b k unknown"]);
    assert_eq!((&answer["good"], &answer["silent"]), (&true.into(), &serde_json::json!(["k"])));
    assert_eq!(answer["echoes"].as_array().unwrap().len(), 4);
    let k = mesh.node("k");
    assert_eq!([k.overlay(V4).to_string(), k.overlay(V6).to_string()], ["10.42.3.1", "fd42:0:0:3::1"]);
    mesh.balances();
}

#[test]
fn the_machine_that_runs_these_tests_passes_its_selftest() {
    let story = "the_machine_that_runs_these_tests_passes_its_selftest";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").node("b").start();
    let a = mesh.node("a");
    let before = a.host_state();
    let mut command = a.ns.command(MESHD);
    command.args(["selftest", "--json"]);
    let run = Run::of(command);
    let report: Value = serde_json::from_str(&run.out).unwrap_or_else(|error| panic!("{error}: {run:?}"));
    assert_eq!((run.code, &report["good"]), (0, &true.into()), "{report:#}");
    let names: Vec<_> = report["checks"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    for name in ["tun_tso", "udp_gso", "tcp_ipv4", "tcp_ipv6", "udp_ipv4", "udp_ipv6", "checksums"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert_eq!(a.host_state(), before, "nothing of it is left");

    let mut nobody = a.ns.command("setpriv");
    nobody.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", "--", MESHD, "selftest"]);
    let run = Run::of(nobody);
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.out.contains("BAD") && run.out.contains("run it as root"), "{run:?}");
    mesh.balances();
}
