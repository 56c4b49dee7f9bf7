//! BFD with other implementations: FRR's bfdd, and BIRD, which authenticates; on a machine with a kernel VXLAN device in the
//! management network.
//!
//! They know RFC 5881 and nothing of VXLAN, so the device gives them what RFC 8971 §5 asks for: the MAC 00-00-5E-00-52-02,
//! packets to 127.0.0.1 from outside, and a way back through the same device.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use crate::mesh::{Builder, Node, Run, V4, has, has_kernel_vxlan, skipped};
use crate::namespace::{Process, until};

const BFDD: &str = "/usr/lib/frr/bfdd";
const ZEBRA: &str = "/usr/lib/frr/zebra";

fn state(node: &Node, of: &str) -> String {
    let peers = node.json(&["peers"]);
    let peer = peers.as_array().unwrap().iter().find(|peer| peer["name"] == of).unwrap();
    peer["state"].as_str().unwrap().to_owned()
}

/// A device of `node` that a BFD daemon can use as if `peer` were its neighbour there.
fn management_device(node: &Node, peer: &Node) {
    node.ns.sh(&format!(
        "ip link add bfd0 address 00:00:5e:00:52:02 type vxlan id 4095 dstport 8472 local {here} dev ul0 nolearning
         echo 1 > /proc/sys/net/ipv4/conf/bfd0/route_localnet
         ip addr add 192.0.2.2 peer {there}/32 dev bfd0
         ip link set bfd0 up
         bridge fdb add {mac} dev bfd0 dst {there} self permanent
         ip neigh add {there} lladdr {mac} dev bfd0 nud permanent
         ip route del {there}/32 dev bfd0
         ip route add {there}/32 dev bfd0 table 100 src 192.0.2.2
         ip rule add oif bfd0 lookup 100",
        here = node.underlay(V4),
        there = peer.underlay(V4),
        mac = peer.mac(),
    ));
}

#[test]
fn frr_and_meshd_watch_each_other() {
    let story = "frr_and_meshd_watch_each_other";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_kernel_vxlan() || !std::path::Path::new(BFDD).exists() || !Run::of(id()).code.eq(&0) {
        return skipped(story, "this kernel has no VXLAN device, or FRR's bfdd is not installed (apt-get install frr)");
    }
    let mesh = mesh.node("a").kernel("k").start();
    let [a, k] = mesh.two(["a", "k"]);
    management_device(k, a);
    let dir = mesh.dir().join("frr");
    std::fs::create_dir(&dir).unwrap();
    let config = format!(
        "bfd\n peer {} interface bfd0\n  receive-interval 150\n  transmit-interval 150\n  detect-multiplier 6\n",
        a.underlay(V4)
    );
    std::fs::write(dir.join("bfdd.conf"), config).unwrap();
    std::fs::write(dir.join("zebra.conf"), "").unwrap();
    // both give up root, and keep their sockets there
    let open = format!("chmod 755 {0} && chown -R frr {1}", mesh.dir().display(), dir.display());
    assert_eq!(Run::of(shell(&open)).code, 0);
    let path = |name: &str| dir.join(name).into_os_string();
    let daemon = |program: &str, name: &str| {
        let mut command = k.ns.command(program);
        command.args(["-u", "frr", "-g", "frr", "--vty_socket"]).arg(&dir).arg("-z").arg(path("zserv.api"));
        command.arg("-f").arg(path(&format!("{name}.conf"))).arg("-i").arg(path(&format!("{name}.pid")));
        if name == "bfdd" {
            command.arg("--bfdctl").arg(path("bfdd.sock"));
        }
        Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()))
    };
    let _zebra = daemon(ZEBRA, "zebra");
    until("zebra listens", || dir.join("zserv.api").exists());
    let bfdd = daemon(BFDD, "bfdd");
    let frr = || Run::of(shell(&format!("vtysh --vty_socket {} -c 'show bfd peers'", dir.display()))).out;
    until("FRR says up", || frr().contains("Status: up"));
    until("meshd says up", || state(a, "k") == "up");
    assert_eq!(a.json(&["peers"])[0]["path_mtu"], 1450, "it answers no probes of ours");

    bfdd.signal(nix::sys::signal::Signal::SIGKILL);
    until("meshd sees that it is gone", || state(a, "k") == "down");
    drop(bfdd);
    let _bfdd = daemon(BFDD, "bfdd");
    until("they are up again", || state(a, "k") == "up" && frr().contains("Status: up"));
    // it knows no authentication: with a key alone it is not heard, and with `none` before it is
    let keys = mesh.dir().join("bfd.keys");
    std::fs::write(&keys, "7 correct-horse\n").unwrap();
    std::fs::set_permissions(&keys, PermissionsExt::from_mode(0o600)).unwrap();
    a.set("bfd-auth-key-file", Some(&keys.display().to_string()));
    a.restart();
    until("it is refused", || a.drops("bfd_not_authentic") > 2);
    until("neither says up", || state(a, "k") != "up" && !frr().contains("Status: up"));
    std::fs::write(&keys, "none\n7 correct-horse\n").unwrap();
    a.signal(nix::sys::signal::Signal::SIGHUP);
    until("both say up", || state(a, "k") == "up" && frr().contains("Status: up"));
    a.kill();
    until("FRR sees that meshd is gone", || frr().contains("Status: down"));
}

/// Meticulous Keyed SHA1 and the plain one, with an implementation that is not ours.
#[test]
fn bird_and_meshd_authenticate_each_other() {
    let story = "bird_and_meshd_authenticate_each_other";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_kernel_vxlan() || !has("bird") {
        return skipped(story, "this kernel has no VXLAN device, or `bird` is not installed (apt-get install bird2)");
    }
    let mesh = mesh.node("a").kernel("k").build();
    let [a, k] = mesh.two(["a", "k"]);
    let keys = mesh.dir().join("bfd.keys");
    std::fs::write(&keys, "7 correct-horse\n").unwrap();
    std::fs::set_permissions(&keys, PermissionsExt::from_mode(0o600)).unwrap();
    a.set("bfd-auth-key-file", Some(&keys.display().to_string()));
    mesh.start();
    management_device(k, a);
    let [config, control, log] = ["bird.conf", "bird.ctl", "bird.log"].map(|name| mesh.dir().join(name));
    let bird = |kind: &str, password: &str| {
        let text = format!(
            "router id 192.0.2.2;
             protocol device {{}}
             protocol bfd {{
               debug all;
               interface \"bfd0\" {{
                 interval 150 ms; multiplier 6; authentication {kind} sha1; password \"{password}\" {{ id 7; }};
               }};
               neighbor {} dev \"bfd0\" local 192.0.2.2;
             }}",
            a.underlay(V4)
        );
        std::fs::write(&config, text).unwrap();
        std::fs::remove_file(&log).ok();
        let mut command = k.ns.command("bird");
        command.arg("-f").arg("-D").arg(&log).arg("-c").arg(&config).arg("-s").arg(&control);
        Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()))
    };
    // what it did last; birdc wants a terminal
    let session = || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let change = text.lines().rev().find(|line| line.contains("changed state from"));
        change.and_then(|line| line.rsplit(' ').next()).unwrap_or("nothing").to_owned()
    };
    for kind in ["meticulous keyed", "keyed"] {
        let running = bird(kind, "correct-horse");
        until("BIRD says up", || session() == "Up");
        until("meshd says up", || state(a, "k") == "up");
        let refused = a.drops("bfd_not_authentic");
        std::thread::sleep(std::time::Duration::from_secs(2));
        assert_eq!((state(a, "k").as_str(), a.drops("bfd_not_authentic")), ("up", refused), "{kind}: {}", session());
        running.signal(nix::sys::signal::Signal::SIGKILL);
        until("meshd sees that it is gone", || state(a, "k") == "down");
    }
    let refused = a.drops("bfd_not_authentic");
    let running = bird("meticulous keyed", "correct-horsf");
    until("another key is refused", || a.drops("bfd_not_authentic") > refused + 2);
    assert_eq!((state(a, "k").as_str(), session().as_str()), ("down", "nothing"));
    drop(running);
    mesh.balances();
}

fn id() -> Command {
    shell("id frr && command -v vtysh")
}

fn shell(command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    shell
}
