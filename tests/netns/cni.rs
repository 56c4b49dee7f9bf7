//! Pods by the standard CNI plugins, called as a container runtime calls them, with the configuration that meshd writes.

use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::joined::{create, has_peers};
use crate::mesh::{Builder, Node, skipped};
use crate::namespace::{Namespace, until};
use crate::traffic::{ping, receive, tcp};

/// Where distributions and upstream have the plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

struct Pod {
    ns: Namespace,
    address: IpAddr,
}

#[test]
fn pods_of_the_standard_plugins_reach_each_other() {
    let story = "pods_of_the_standard_plugins_reach_each_other";
    let Some(mesh) = Builder::new(story) else { return };
    let has_all = |folder: &&str| {
        ["bridge", "host-local", "portmap"].iter().all(|plugin| Path::new(folder).join(plugin).exists())
    };
    let Some(plugins) = PLUGINS.into_iter().find(has_all) else {
        return skipped(story, "there are no CNI plugins (Debian: containernetworking-plugins)");
    };
    let mesh = mesh.server("a").agent("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    for node in [a, b] {
        node.set("cni-conf-dir", Some(&node.dir.join("net.d").display().to_string()));
        node.set("subnet-file", Some(&node.dir.join("subnet.env").display().to_string()));
    }
    a.restart();
    b.token(Some(&create(a, &[])));
    b.restart();
    has_peers(a, 1);
    // the MTU may be another once there is a peer; the files follow
    for node in [a, b] {
        let mtu = node.json(&["status"])["mtu"].to_string();
        until("subnet.env has the MTU", || {
            let text = std::fs::read_to_string(node.dir.join("subnet.env")).unwrap_or_default();
            text.contains(&format!("FLANNEL_MTU={mtu}\n")) && text.contains("FLANNEL_NETWORK=10.42.0.0/16\n")
        });
    }
    let pods = [(a, "1"), (a, "2"), (b, "1")].map(|(node, name)| pod(plugins, node, name));
    let [first, beside, there] = &pods;
    for (from, to) in [(first, there), (there, first), (first, beside)] {
        ping(&from.ns, to.address);
        tcp(&from.ns, &to.ns, to.address, 1 << 20);
        assert_eq!(seen_as(&from.ns, &to.ns, to.address), from.address, "a pod's address is its own everywhere");
    }
    // nodes and pods of others
    ping(&first.ns, b.given());
    ping(&b.ns, first.address);
    assert_eq!(seen_as(&first.ns, &b.ns, b.given()), first.address);
    assert_eq!(seen_as(&b.ns, &first.ns, first.address), b.given());
    for (node, pod) in [(a, first), (b, there)] {
        let mtu = node.json(&["status"])["mtu"].to_string();
        assert!(pod.ns.sh("ip -o link show eth0").contains(&format!("mtu {mtu} ")), "{mtu}");
        // a full packet goes, one byte more is the pod's own kernel to refuse
        let fits = mtu.parse::<u32>().unwrap() - 28;
        let other = if std::ptr::eq(node, a) { there.address } else { first.address };
        let full = |size: u32| pod.ns.succeeds(&format!("ping -n -q -c 1 -W 2 -M do -s {size} {other}"));
        assert!(full(fits) && !full(fits + 1), "{fits}");
    }
    // nothing is attached any more to what is gone
    let left = b.ctl(&["leave"]);
    assert!(left.code == 0 && left.out.contains("subnet.env"), "{left:?}");
    assert!(!b.dir.join("subnet.env").exists() && std::fs::read_dir(b.dir.join("net.d")).unwrap().next().is_none());
}

/// The address that a datagram from `from` comes from, as who receives it at `address` sees it.
#[track_caller]
fn seen_as(from: &Namespace, to: &Namespace, address: IpAddr) -> IpAddr {
    let (client, server) = (from.udp("0.0.0.0".parse().unwrap(), 0), to.udp(address, 0));
    client.send_to(b"who am I", server.local_addr().unwrap()).unwrap();
    receive(&server, &mut [0; 16]).unwrap().1.ip()
}

/// A pod on a node, by each plugin of the list in its turn.
#[track_caller]
fn pod(plugins: &str, node: &Node, name: &str) -> Pod {
    let ns = Namespace::new(format!("{}-pod{name}", node.ns.name()));
    let list = std::fs::read(node.dir.join("net.d/10-meshd.conflist")).unwrap();
    let list: Value = serde_json::from_slice(&list).unwrap();
    // host-local's memory is the machine's: each node gets a folder of its own for it
    let memory = node.dir.join("cni");
    std::fs::create_dir_all(&memory).unwrap();
    let mut result = Value::Null;
    for plugin in list["plugins"].as_array().unwrap() {
        let mut given = plugin.clone();
        given["name"] = list["name"].clone();
        given["cniVersion"] = list["cniVersion"].clone();
        if given["ipam"].is_object() {
            given["ipam"]["dataDir"] = json!(memory);
        }
        if !result.is_null() {
            given["prevResult"] = result.clone();
        }
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", node.ns.name()])
            .arg(Path::new(plugins).join(plugin["type"].as_str().unwrap()))
            .envs([("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "eth0"), ("CNI_PATH", plugins)])
            .env("CNI_CONTAINERID", ns.name())
            .env("CNI_NETNS", format!("/run/netns/{}", ns.name()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(given.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{plugin:#}: {said}");
        result = serde_json::from_slice(&output.stdout).unwrap();
    }
    let address: ipnet::IpNet = result["ips"][0]["address"].as_str().unwrap().parse().unwrap();
    Pod { ns, address: address.addr() }
}
