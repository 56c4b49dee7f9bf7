use super::*;

use crate::admin::protocol::{NodeRole, NodeState, NodeView};
use crate::doctor::{Daemon, Device, FileFact, Zone, report};

fn holder(name: &str, pid: u32) -> Holder {
    Holder {
        ip: IpAddr::from([0; 4]),
        process: Some((pid, name.to_owned())),
        seen: true,
        text: format!("{name} (process {pid})"),
        remedy: format!("kill {pid}"),
    }
}

fn device(name: &str, mtu: u32, address: &str) -> Device {
    Device { name: name.to_owned(), mtu, up: true, addresses: vec![address.parse().unwrap()], ..Device::default() }
}

fn node(name: &str, ip: &str) -> NodeView {
    NodeView {
        name: name.to_owned(),
        id: name.to_owned(),
        role: NodeRole::Agent,
        state: NodeState::Ready,
        underlay: vec![ip.parse().unwrap()],
        subnets: vec!["10.42.1.0/24".parse().unwrap()],
        labels: Default::default(),
        taints: Vec::new(),
        joined_at: None,
        last_heartbeat: None,
        observed: None,
    }
}

/// A machine on which everything is as it should be, with a running meshd.
fn good() -> Facts {
    let mut daemon = Daemon { nodes: vec![node("a", "10.9.0.1"), node("b", "10.9.0.2")], ..Daemon::default() };
    daemon.status.node = "a".to_owned();
    daemon.status.ready = true;
    let o = &mut daemon.stats.offloads;
    (o.tun_tso, o.tun_uso, o.udp_gso, o.udp_gro) = (true, true, true, true);
    let sysctls =
        [("net.ipv4.ip_forward", "1"), ("net.ipv4.conf.all.rp_filter", "1"), ("net.core.rmem_max", "16777216")]
            .into_iter()
            .chain([("net.ipv4.conf.mesh0.rp_filter", "2")]);
    Facts {
        daemon: Some(daemon),
        tun: "mesh0".to_owned(),
        port: 8472,
        underlay: vec!["10.9.0.1".parse().unwrap()],
        devices: Some(vec![
            device("ul0", 1500, "10.9.0.1/24"),
            device("mesh0", 1450, "10.42.1.0/32"),
            device("cni0", 1450, "10.42.1.1/24"),
        ]),
        udp: vec![holder("meshd", 10)],
        nft: Some("{\"nftables\": []}".to_owned()),
        release: "6.18.44".to_owned(),
        synchronised: Some(true),
        sysctls: sysctls.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        key: Some(FileFact { path: "/k".to_owned(), mode: 0o600, uid: 0 }),
        ..Facts::default()
    }
}

/// Good facts with a change.
fn with(change: impl FnOnce(&mut Facts)) -> Facts {
    let mut facts = good();
    change(&mut facts);
    facts
}

fn daemon_of(facts: &mut Facts) -> &mut Daemon {
    facts.daemon.as_mut().unwrap()
}

#[track_caller]
fn level(check: Check, expected: Level, words: &str) {
    assert_eq!(check.level, expected, "{check:?}");
    assert!(check.found.contains(words), "{check:?}");
    assert_eq!(
        check.fix.is_some(),
        expected >= Level::Warning,
        "what is wrong has a fix, what is not has none: {check:?}"
    );
}

use Level::{Bad, Ok, Skipped, Warning};

#[test]
fn a_good_machine_is_good_throughout() {
    let report = report(&good());
    assert!(report.good);
    assert!(report.checks.iter().all(|check| check.level == Ok), "{:#?}", report.checks);
    assert_eq!(findings(&report.checks).count(), 0);
}

#[test]
fn nothing_known_is_nothing_bad() {
    let report = report(&Facts { tun: "mesh0".to_owned(), port: 8472, ..Facts::default() });
    assert!(report.good, "{:#?}", report.checks);
}

#[test]
fn meshd_itself() {
    level(daemon(&with(|f| f.daemon = None)), Warning, "no running meshd");
    let unready = with(|f| {
        daemon_of(f).status.ready = false;
        daemon_of(f).status.reasons = vec!["mesh0 is down".to_owned()];
    });
    level(daemon(&unready), Bad, "mesh0 is down");
    level(configuration(&with(|f| f.config_problem = Some("line 3".to_owned()))), Bad, "line 3");
}

#[test]
fn the_ports_of_the_servers_own_etcd() {
    assert!(etcd_ports(&good()).is_empty(), "where servers run none, nobody asks");
    let one = |at: EtcdPort| etcd_ports(&with(|f| f.etcd = vec![at.clone()])).remove(0);
    let port = EtcdPort { port: 2379, others: vec![], own: true };
    level(one(port.clone()), Ok, "TCP 2379 is the servers' own");
    level(one(EtcdPort { own: false, ..port.clone() }), Bad, "does not listen on TCP 2379");
    let others = vec![holder("etcd", 7)];
    let check = one(EtcdPort { others, own: false, ..port.clone() });
    assert_eq!(check.fix.as_deref(), Some("systemctl disable --now etcd"));
    level(check, Bad, "etcd (process 7)");
    let check = one(EtcdPort { others: vec![holder("nginx", 7)], ..port });
    assert_eq!(check.fix.as_deref(), Some("kill 7"));
}

#[test]
fn ports_have_owners() {
    level(udp_port(&with(|f| f.udp = vec![holder("vpnd", 7)])), Bad, "vpnd (process 7)");
    level(udp_port(&with(|f| f.udp.push(holder("socat", 7)))), Bad, "socat");
    level(udp_port(&with(|f| f.udp.push(holder("meshd", 11)))), Bad, "processes 10 and 11");
    level(udp_port(&with(|f| f.udp.push(holder("meshd", 10)))), Ok, "is meshd's");
    level(udp_port(&with(|f| f.udp.clear())), Warning, "not seen");
    level(udp_port(&with(|f| (f.udp, f.daemon) = (vec![], None))), Ok, "is free");
    let kernel = Holder { process: None, text: "vx0 (kernel VXLAN device)".to_owned(), ..holder("", 0) };
    level(udp_port(&with(|f| f.udp = vec![kernel.clone()])), Bad, "vx0");
    let unseen = Holder { seen: false, text: "a process that meshd cannot see".to_owned(), ..kernel };
    level(udp_port(&with(|f| f.udp = vec![unseen.clone()])), Warning, "not seen");
    level(udp_port(&with(|f| (f.udp, f.daemon) = (vec![unseen], None))), Bad, "cannot see");

    level(server_port(&good()), Ok, "no server");
    let server = |tcp: Vec<Holder>| with(|f| (f.server_port, f.tcp) = (Some(9345), tcp));
    level(server_port(&server(vec![holder("mesh-sidecar", 3)])), Ok, "mesh-sidecar's");
    level(server_port(&server(vec![holder("nginx", 3)])), Bad, "nginx");
    level(server_port(&server(vec![])), Bad, "nobody listens");
}

#[test]
fn firewalls() {
    let rules = |hook: &str, policy: &str| {
        let chain = format!(
            r#"{{"family":"inet","table":"f","name":"c","type":"filter","hook":"{hook}","prio":0,"policy":"{policy}"}}"#
        );
        with(|f| f.nft = Some(format!("{{\"nftables\":[{{\"chain\":{chain}}}]}}")))
    };
    let first = |facts: &Facts| firewall_input(facts).remove(0);
    level(first(&rules("input", "accept")), Ok, "UDP 8472");
    level(first(&rules("input", "drop")), Bad, "policy drop of inet f c");
    level(first(&rules("forward", "drop")), Ok, "");
    level(forward_policy(&rules("forward", "drop")), Warning, "policy drop");
    level(forward_policy(&rules("input", "drop")), Ok, "");
    let server = Facts { server_port: Some(9345), ..rules("input", "drop") };
    level(firewall_input(&server).remove(1), Bad, "TCP 9345");
    let legacy = with(|f| f.iptables = Some("*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\nCOMMIT\n".to_owned()));
    level(first(&legacy), Bad, "iptables INPUT");
    level(forward_policy(&legacy), Warning, "iptables FORWARD");
    level(first(&with(|f| f.nft = None)), Skipped, "neither");
}

#[test]
fn mtus_fit() {
    let of = |ul: u32, tun: u32| {
        with(|f| f.devices = Some(vec![device("ul0", ul, "10.9.0.1/24"), device("mesh0", tun, "10.42.1.0/32")]))
    };
    level(mtu(&of(1500, 1450)), Ok, "mesh0 has 1450");
    level(mtu(&of(1400, 1450)), Bad, "need 1500 bytes");
    level(mtu(&of(1300, 1250)), Warning, "1280");
    level(mtu(&with(|f| f.underlay.clear())), Skipped, "not known");
    level(mtu(&with(|f| f.devices = None)), Skipped, "netlink");
}

#[test]
fn what_the_kernel_has() {
    for (release, expected) in [("6.18.44-fc", Ok), ("6.2.0", Ok), ("6.1.0-18-amd64", Warning), ("5.0", Warning)] {
        level(kernel(&with(|f| f.release = release.to_owned())), expected, release);
    }
    level(kernel(&with(|f| f.release = "4.19.0".to_owned())), Bad, "too old");
    level(kernel(&with(|f| f.release.clear())), Skipped, "");
    let off = with(|f| {
        daemon_of(f).stats.offloads.tun_uso = false;
        daemon_of(f).stats.offload_reasons.insert("tun_uso".to_owned(), "Linux 6.2 has it".to_owned());
    });
    level(offloads(&off), Warning, "tun_uso is off: Linux 6.2 has it");
    level(offloads(&with(|f| f.daemon = None)), Skipped, "");
    level(clock(&with(|f| f.synchronised = Some(false))), Warning, "nothing synchronises");
    level(clock(&with(|f| f.synchronised = None)), Skipped, "");
}

#[test]
fn what_others_left() {
    let also = |new: Device| with(|f| f.devices.as_mut().unwrap().push(new));
    let first = |facts: &Facts| leftovers(facts).remove(0);
    let vxlan = |name: &str, port| Device { vxlan_port: Some(port), ..device(name, 1450, "10.8.0.0/32") };
    level(first(&also(vxlan("flannel.1", 8472))), Bad, "flannel's");
    level(first(&also(vxlan("vx9", 8472))), Bad, "vx9");
    level(first(&also(vxlan("vxlan.calico", 4789))), Warning, "Calico's");
    level(first(&also(vxlan("vx9", 4789))), Ok, "");
    level(first(&also(device("cilium_host", 1500, "10.8.0.1/32"))), Warning, "Cilium's");
    let bridge = |net: &str| with(|f| f.devices = Some(vec![device("cni0", 1450, net)]));
    level(first(&bridge("10.42.7.1/24")), Bad, "10.42.7.1/24");
    level(first(&bridge("10.42.1.1/24")), Ok, "");
    level(first(&bridge("fe80::1/64")), Ok, "");
}

#[test]
fn settings() {
    let set = |name: &str, value: &str| with(|f| _ = f.sysctls.insert(name.to_owned(), value.to_owned()));
    level(rp_filter(&set("net.ipv4.conf.mesh0.rp_filter", "0")), Bad, "strict on mesh0");
    level(rp_filter(&set("net.ipv4.conf.all.rp_filter", "2")), Ok, "");
    level(rp_filter(&with(|f| _ = f.sysctls.remove("net.ipv4.conf.mesh0.rp_filter"))), Ok, "its own device");
    level(rp_filter(&with(|f| f.sysctls.clear())), Skipped, "");
    level(ip_forward(&set("net.ipv4.ip_forward", "0")), Warning, "off");
    level(receive_buffer(&set("net.core.rmem_max", "212992")), Ok, "212992");
    let lost = with(|f| _ = daemon_of(f).stats.drops.insert("udp_queue_overflow".to_owned(), 5));
    level(receive_buffer(&lost), Warning, "5 datagrams");
    level(key_file(&with(|f| f.key.as_mut().unwrap().mode = 0o640)), Bad, "mode 0640");
    level(key_file(&with(|f| f.key = None)), Ok, "no private key");
}

#[test]
fn other_managers() {
    let zone = |device: &str, target: &str, ports: &[&str]| Zone {
        device: device.to_owned(),
        name: "public".to_owned(),
        target: target.to_owned(),
        ports: ports.iter().map(|port| (*port).to_owned()).collect(),
    };
    let zones = |zones: Vec<Zone>| with(|f| f.zones = Some(zones));
    level(firewalld(&zones(vec![zone("ul0", "default", &[])])), Bad, "8472/udp");
    level(firewalld(&zones(vec![zone("ul0", "default", &["8472/udp"])])), Ok, "");
    level(firewalld(&zones(vec![zone("ul0", "ACCEPT", &[]), zone("mesh0", "default", &[])])), Warning, "mesh0 is in");
    level(networkd(&with(|f| f.networkd_removes = Some(true))), Warning, "deletes routes");
    level(networkd(&with(|f| f.networkd_removes = Some(false))), Ok, "");
    level(network_manager(&with(|f| f.network_manager_spares = Some(false))), Warning, "mesh0");
    level(network_manager(&with(|f| f.network_manager_spares = Some(true))), Ok, "");
}

#[test]
fn two_nodes_with_one_address() {
    let twice = with(|f| daemon_of(f).nodes.push(node("c", "10.9.0.2")));
    level(duplicate_addresses(&twice), Bad, "b and c both say that 10.9.0.2");
    level(duplicate_addresses(&with(|f| f.daemon = None)), Skipped, "");
}
