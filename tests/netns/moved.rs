//! Servers with an etcd of their own that change while they run: their addresses, the names in their certificates, and the
//! certificates of their etcd.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::joined::{create, has_peers};
use crate::mesh::{Builder, Mesh, Node};
use crate::servers::{children, good, patiently_ready, three, until_slowly};
use crate::traffic::ping;

/// Three servers and an agent that has joined them.
fn three_and_an_agent(story: &'static str) -> Option<Mesh> {
    let mesh = three(story)?;
    let d = mesh.node("d");
    d.token(Some(&create(mesh.node("a"), &[])));
    d.restart();
    has_peers(d, 3);
    Some(mesh)
}

/// Gives the machine another address instead of the one that it has.
fn readdress(node: &Node, from: Ipv4Addr, to: Ipv4Addr) {
    node.ns.sh(&format!(
        "echo 1 >/proc/sys/net/ipv4/conf/ul0/promote_secondaries
         ip addr add {to}/24 dev ul0
         ip addr del {from}/24 dev ul0
         ip route replace default via 10.9.0.254"
    ));
}

fn membership(node: &Node) -> String {
    std::fs::read_to_string(node.dir.join("data/agent/membership.json")).unwrap()
}

#[test]
#[ignore = "a minute and a half: run with --ignored"]
fn servers_change_their_addresses_one_by_one() {
    let Some(mesh) = three_and_an_agent("servers_change_their_addresses_one_by_one") else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    let [d, e] = mesh.two(["d", "e"]);
    let token = create(a, &["--ttl", "1h"]);
    let old = |n: usize| Ipv4Addr::new(10, 9, 0, n as u8 + 1);
    let new = |n: usize| Ipv4Addr::new(10, 9, 0, n as u8 + 101);
    for (n, node) in [a, b, c].into_iter().enumerate() {
        assert_eq!(node.stop(), 0);
        readdress(node, old(n), new(n));
        // the last one says no address, and so follows its interface
        node.set("node-ip", Some(if n == 2 { "ul0".to_owned() } else { new(n).to_string() }.as_str()));
        node.token(None);
        node.spawn();
        patiently_ready(node);
        for node in [a, b, c] {
            good(node, "3 servers, 1 may fail");
        }
    }
    // one that moves under way
    let last = Ipv4Addr::new(10, 9, 0, 113);
    readdress(c, new(2), last);
    until_slowly("it has told the others", c, || c.log().contains("look for this server's at https://10.9.0.113:2380"));
    for node in [a, b, c] {
        good(node, "3 servers, 1 may fail");
        assert!(!node.log().contains("was removed by the others"), "no rejoin");
        until_slowly("only the new addresses are known", node, || {
            let addresses = node.json(&["cluster", "status"])["addresses"].to_string();
            addresses.contains("10.9.0.101:")
                && addresses.contains("10.9.0.102:")
                && addresses.contains("10.9.0.113:")
                && !(0..3).any(|n| addresses.contains(&format!("{}:", old(n))))
        });
    }
    until_slowly("the agent keeps where they are", d, || {
        let kept = membership(d);
        ["101", "102", "113"].iter().all(|n| kept.contains(&format!("https://10.9.0.{n}:9345")))
            && !(1..4).any(|n| kept.contains(&format!("https://10.9.0.{n}:9345")))
    });
    // and by that alone it finds them
    assert_eq!(d.stop(), 0);
    d.token(None);
    d.restart();
    until_slowly("it is connected", d, || d.json(&["status"])["membership"]["connected"] == true);
    has_peers(d, 3);
    for node in [a, b, c] {
        ping(&d.ns, node.given());
    }
    // a token of before says where no server is any more; a new one does
    e.token(Some(&create(b, &[])));
    e.restart();
    has_peers(e, 4);
    let servers = |token: &str| token.parse::<meshd::membership::token::Token>().unwrap().servers;
    assert!(servers(&token).iter().all(|server| server.host() != "10.9.0.101"));
}

/// Nobody can tell agents where the only server is but the server: they find it through the mesh, in which it stays where it is.
#[test]
fn the_only_server_moves_and_its_agents_find_it() {
    let Some(mesh) = Builder::new("the_only_server_moves_and_its_agents_find_it") else { return };
    let mesh = mesh.server("a").agent("b").agent("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    for node in [a, b, c] {
        // by IPv6 it would be where it was
        node.ns.sh("ip -6 addr flush dev ul0 scope global");
    }
    a.set("node-ip", Some("ul0"));
    a.restart();
    let token = create(a, &[]);
    for agent in [b, c] {
        agent.token(Some(&token));
        agent.restart();
    }
    for node in [a, b, c] {
        has_peers(node, 2);
    }
    // it cannot tell anybody while it still has the old one
    a.signal(Signal::SIGSTOP);
    readdress(a, Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(10, 9, 0, 101));
    a.signal(Signal::SIGCONT);
    for agent in [b, c] {
        until_slowly("the agent knows where the server is", agent, || {
            membership(agent).contains("https://10.9.0.101:9345")
                && agent.json(&["status"])["membership"]["connected"] == true
        });
    }
    for node in [a, b, c] {
        has_peers(node, 2);
        until_slowly("all peers are up", node, || {
            node.json(&["peers"]).as_array().unwrap().iter().all(|peer| peer["state"] == "up")
        });
    }
    ping(&b.ns, a.given());
    assert_eq!(a.ctl(&["node", "drain", "c"]).code, 0);
    until_slowly("a change is heard", b, || b.json(&["nodes"]).to_string().contains("draining"));
}

/// Whether the server's certificate names this host, by a client that knows the cluster's CA and nothing else.
fn names(node: &Node, host: &str) -> bool {
    let member: serde_json::Value = serde_json::from_str(&membership(node)).unwrap();
    let ca: PathBuf = node.dir.join("ca.pem");
    let der = member["ca"].as_str().unwrap();
    let lines: Vec<&str> = der.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    std::fs::write(&ca, format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n")))
        .unwrap();
    node.ns.succeeds(&format!(
        "curl -s -o /dev/null -m 5 --cacert {} --resolve {host}:9345:127.0.0.1 https://{host}:9345/livez",
        ca.display()
    ))
}

#[test]
fn names_of_three_servers_change_live() {
    let Some(mesh) = three_and_an_agent("names_of_three_servers_change_live") else { return };
    let servers = mesh.three(["a", "b", "c"]);
    let d = mesh.node("d");
    let before: Vec<_> = servers.iter().map(|node| (node.sidecar(), children(node))).collect();
    let host = |node: &Node| format!("{}.example.org", node.name);
    for node in servers {
        assert!(names(node, node.name) && !names(node, &host(node)), "control");
        node.set("tls-san", Some(&format!("[{}]", host(node))));
        node.signal(Signal::SIGHUP);
    }
    for node in servers {
        until_slowly("its certificate has the name", node, || names(node, &host(node)));
        for other in servers.iter().filter(|other| other.name != node.name) {
            assert!(!names(node, &host(other)), "and that of nobody else");
        }
    }
    until_slowly("the agent is told", d, || servers.iter().all(|node| membership(d).contains(&host(node))));
    for node in servers {
        node.set("tls-san", None);
        node.signal(Signal::SIGHUP);
        until_slowly("it is gone again", node, || !names(node, &host(node)));
        good(node, "3 servers, 1 may fail");
    }
    let after: Vec<_> = servers.iter().map(|node| (node.sidecar(), children(node))).collect();
    assert_eq!(before, after, "neither the sidecars nor their etcds were started anew");
    assert_eq!(d.log().matches("joined through").count(), 1, "{}", d.log());
}

#[test]
fn certificates_of_the_servers_etcd_are_renewed_under_way() {
    use meshd::membership::clock::Now;
    use meshd::membership::etcd::Kept;
    let Some(mesh) = three_and_an_agent("certificates_of_the_servers_etcd_are_renewed_under_way") else { return };
    let servers = mesh.three(["a", "b", "c"]);
    let a = servers[0];
    let before: Vec<_> = servers.iter().map(|node| children(node)).collect();
    let enters = |node: &Node, pem: &std::path::Path| {
        let folder = node.dir.join("data/server/etcd");
        let files = format!("--cacert {}/ca.pem --cert {pem} --key {pem}", folder.display(), pem = pem.display());
        node.ns.succeeds(&format!("curl -s -m 5 -o /dev/null {files} https://10.9.0.{}:2379/version", node.number))
    };
    // made a year ago, they end in a moment
    let year_ago = Now { unix: Now::read().unix - 365 * 86_400 + 3, ..Now::read() };
    for node in servers {
        let kept = Kept::new(&node.dir.join("data"));
        let address = format!("10.9.0.{}", node.number).parse().unwrap();
        let pem = kept.certificate();
        kept.certify(address, year_ago.date()).unwrap();
        std::fs::copy(&pem, node.dir.join("old.pem")).unwrap();
        until_slowly("it is renewed", node, || kept.renew_at().is_some_and(|at| at > Now::read().date()));
        until_slowly("the old one has ended", node, || !enters(node, &node.dir.join("old.pem")));
        assert!(enters(node, &pem), "{}", node.log());
    }
    // new connections between the members, by the new certificates, wherever this kernel can end those that are there
    for node in servers {
        node.ns.sh("ss -K dport = 2380 >/dev/null 2>&1 || true; ss -K dport = 2379 >/dev/null 2>&1 || true");
    }
    create(a, &[]);
    for node in servers {
        good(node, "3 servers, 1 may fail");
        assert!(node.log().contains("the etcd member's certificate was renewed"), "{}", node.log());
    }
    assert_eq!(before, servers.iter().map(|node| children(node)).collect::<Vec<_>>(), "no etcd was started anew");
}
