//! Wrong files and machines that lack something: the message says what, where and what to do.

use std::os::unix::net::UnixListener;
use std::process::Command;

use crate::mesh::{Builder, MESHD, Run, V4, has, skipped};
use crate::traffic::ping;

#[test]
fn wrong_files_are_exit_2_and_name_the_line() {
    let Some(mesh) = Builder::new("wrong_files_are_exit_2_and_name_the_line") else { return };
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    let good = mesh.list(|_| true);
    let clean = a.host_state();
    for (bad, said) in [
        (good.replace("10.42.2.0/24", "10.42.1.128/25"), "nodes.yaml:8:"),
        (good.replace("10.9.0.2", "10.9.0.1"), "nodes.yaml:7:"),
        (good.replace("10.42.2.0/24", "0.0.0.0/0"), "nodes.yaml:8:"),
        (good.replace("name: b", "name: a"), "nodes.yaml:6:"),
        (good.replace("10.9.0.2", "10.42.1.9"), "nodes.yaml:7:"),
        (mesh.list(|node| node.name == "b"), "nodes.yaml"),
        ("nodes: [".to_owned(), "nodes.yaml:"),
    ] {
        mesh.write_nodes(&bad);
        let run = a.try_meshd("run");
        assert_eq!(run.code, 2, "{said}: {run:?}");
        assert!(run.err.contains(said), "{said}: {run:?}");
        assert_eq!(a.host_state(), clean);
    }
    mesh.write_nodes(&good);
    for (key, value, said) in [("prot", "1", "did you mean `port`"), ("port", "0", "port"), ("vni", "17000000", "vni")]
    {
        a.set(key, Some(value));
        let run = a.try_meshd("run");
        assert_eq!(run.code, 2, "{run:?}");
        assert!(run.err.contains(said) && run.err.contains("config.yaml:"), "{run:?}");
        a.set(key, None);
    }
    let mut missing = Command::new(MESHD);
    missing.args(["run", "--config", "/does/not/exist.yaml"]);
    assert_eq!(Run::of(missing).code, 2);
    assert_eq!(a.host_state(), clean);
    mesh.start();
    ping(&a.ns, b.overlay(V4));
    mesh.balances();
}

#[test]
fn what_the_machine_lacks_is_said() {
    let Some(mesh) = Builder::new("what_the_machine_lacks_is_said") else { return };
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    let clean = a.host_state();
    for io in ["mmsg", "tokio"] {
        a.set("io", Some(io));
        let config = a.config();
        let without = |front: &[&str]| {
            let mut command = a.ns.command(front[0]);
            command.args(&front[1..]).arg(MESHD).args(["run", "--config"]).arg(&config);
            let run = Run::of(command);
            assert_eq!(run.code, 1, "{io}: {run:?}");
            assert_eq!(a.host_state(), clean, "{io}");
            run.err
        };
        let error = without(&["unshare", "-m", "sh", "-c", "mount -t tmpfs none /dev/net && exec \"$@\"", "sh"]);
        assert!(error.contains("no /dev/net/tun") && error.contains("modprobe tun"), "{io}: {error}");
        let error = without(&["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"]);
        assert!(error.contains("CAP_NET_ADMIN"), "{io}: {error}");
    }
    a.set("io", None);

    // somebody else's socket is not taken away
    let listener = UnixListener::bind(a.socket()).unwrap();
    let run = a.try_meshd("run");
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.err.contains("meshd.sock"), "{run:?}");
    drop(listener);
    // what the listener left behind is nobody's
    mesh.start();
    ping(&a.ns, b.overlay(V4));
    mesh.balances();
}

#[test]
fn meshd_runs_with_net_admin_alone() {
    let story = "meshd_runs_with_net_admin_alone";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("capsh") {
        return skipped(story, "`capsh` is not installed");
    }
    let mesh = mesh.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    b.restart();
    a.set("log", Some("info"));
    let mut command = a.ns.command("setpriv");
    command.args(["--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin", "--", MESHD, "run", "--config"]);
    command.arg(a.config());
    let _process = crate::namespace::Process::spawn(&mut command);
    a.ready();
    ping(&a.ns, b.overlay(V4));
}
