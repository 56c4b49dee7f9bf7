//! One small pure function a concern: facts in, what was found and its fix out.

pub mod firewall;

use std::collections::BTreeMap;
use std::net::IpAddr;

use self::firewall::{Fate, Probe};
use super::{Check, EtcdPort, Facts, Holder, Level};
use crate::admin::protocol::{Encryption, Role};

/// All checks, in the order in which they should be mended.
pub fn all(facts: &Facts) -> Vec<Check> {
    let one: &[fn(&Facts) -> Check] = &[
        daemon,
        configuration,
        udp_port,
        server_port,
        key_file,
        kernel,
        clock,
        mtu,
        offloads,
        rp_filter,
        ip_forward,
        forward_policy,
        firewalld,
        networkd,
        network_manager,
        duplicate_addresses,
        receive_buffer,
    ];
    let many: &[fn(&Facts) -> Vec<Check>] = &[etcd_ports, firewall_input, leftovers];
    one.iter().map(|check| check(facts)).chain(many.iter().flat_map(|check| check(facts))).collect()
}

/// Whether meshd runs and is ready.
pub fn daemon(facts: &Facts) -> Check {
    let name = "meshd";
    match &facts.daemon {
        None => {
            let why = facts.unreachable.as_deref().unwrap_or("it was not asked");
            let found =
                format!("no running meshd was reached, so only the machine and the configuration are looked at: {why}");
            Check::warning(name, found, "systemctl start meshd")
        }
        Some(daemon) if daemon.status.ready => {
            Check::ok(name, format!("{} is ready, {} peers", daemon.status.node, daemon.status.peers))
        }
        Some(daemon) => {
            let found = format!("{} is not ready: {}", daemon.status.node, daemon.status.reasons.join("; "));
            Check::bad(name, found, "meshctl status; journalctl -u meshd -n 50  # mend what is named there")
        }
    }
}

/// Whether meshd would start with the configuration.
pub fn configuration(facts: &Facts) -> Check {
    match &facts.config_problem {
        None => Check::ok("configuration", "meshd accepts it"),
        Some(problem) => Check::bad("configuration", problem.clone(), "meshd config check"),
    }
}

/// Whether the data port is meshd's, and nobody else's too.
pub fn udp_port(facts: &Facts) -> Check {
    let (name, port) = ("udp_port", facts.port);
    if facts.devices.is_none() {
        return Check::skipped(name, "netlink did not answer");
    }
    let (own, others) = split(&facts.udp, "meshd");
    if let Some(other) = stranger(&others, facts) {
        let found = format!("UDP {port} on {} belongs to {}", shown(other.ip), other.text);
        let fix = format!("{}  # or choose another port, the same on all nodes, with `port:`", other.remedy);
        return Check::bad(name, found, fix);
    }
    let mut pids: Vec<u32> = own.iter().filter_map(|holder| holder.process.as_ref().map(|(pid, _)| *pid)).collect();
    pids.sort_unstable();
    pids.dedup();
    match (pids.as_slice(), &facts.daemon) {
        ([first, second, ..], _) => {
            let found =
                format!("two meshd share UDP {port} (processes {first} and {second}): each gets half of the packets");
            Check::bad(name, found, format!("kill {second}"))
        }
        ([_], _) => Check::ok(name, format!("UDP {port} is meshd's")),
        ([], None) => Check::ok(name, format!("UDP {port} is free")),
        // Another namespace, or not enough privilege to see whose it is.
        ([], Some(daemon)) if daemon.status.ready => Check::warning(
            name,
            format!("meshd runs, but UDP {port} is not seen to be its own here"),
            "run this as root, in meshd's network namespace",
        ),
        ([], Some(_)) => Check::bad(name, format!("meshd runs, but does not listen on UDP {port}"), "meshctl status"),
    }
}

/// Whether the servers' port is the sidecar's.
pub fn server_port(facts: &Facts) -> Check {
    let name = "server_port";
    let Some(port) = facts.server_port else { return Check::ok(name, "this node is no server") };
    let (own, others) = split(&facts.tcp, "mesh-sidecar");
    match (own.as_slice(), stranger(&others, facts), &facts.daemon) {
        ([], Some(other), _) => {
            let found = format!("TCP {port} on {} belongs to {}", shown(other.ip), other.text);
            Check::bad(name, found, format!("{}  # or set another `bind-address:`", other.remedy))
        }
        ([], None, Some(_)) if !others.is_empty() => {
            Check::warning(name, format!("somebody listens on TCP {port}, and it is not seen who"), "run this as root")
        }
        ([], None, Some(_)) => Check::bad(
            name,
            format!("this node is a server, but nobody listens on TCP {port}"),
            "meshctl cluster status",
        ),
        ([], None, None) => Check::ok(name, format!("TCP {port} is free")),
        _ => Check::ok(name, format!("TCP {port} is mesh-sidecar's")),
    }
}

/// Whether the ports of the etcd that servers run are that etcd's.
pub fn etcd_ports(facts: &Facts) -> Vec<Check> {
    let name = "etcd_port";
    let look = |at: &EtcdPort| {
        let port = at.port;
        match (at.others.first(), at.own, &facts.daemon) {
            (Some(other), own, _) => {
                let service = other.process.as_ref().is_some_and(|(_, process)| process.starts_with("etcd"));
                let also = if own {
                    ", and so does the servers' own etcd"
                } else {
                    ", so that the servers' own etcd has none"
                };
                let found = format!("TCP {port} on {} belongs to {}{also}", shown(other.ip), other.text);
                let fix = match service {
                    true => "systemctl disable --now etcd".to_owned(),
                    false => other.remedy.clone(),
                };
                Check::bad(name, found, fix)
            }
            (None, true, _) => Check::ok(name, format!("TCP {port} is the servers' own etcd's")),
            (None, false, None) => Check::ok(name, format!("TCP {port} is free")),
            (None, false, Some(_)) => {
                let found = format!("this server's etcd does not listen on TCP {port}");
                Check::bad(name, found, "meshctl cluster status; journalctl -u meshd -n 50")
            }
        }
    };
    facts.etcd.iter().map(look).collect()
}

/// The TCP ports that other nodes reach this one on.
fn tcp_ports(facts: &Facts) -> impl Iterator<Item = u16> {
    facts.server_port.into_iter().chain(facts.etcd.iter().map(|at| at.port))
}

/// The kernel cuts a process's name at 15 bytes.
fn split<'a>(holders: &'a [Holder], name: &str) -> (Vec<&'a Holder>, Vec<&'a Holder>) {
    let is_own = |holder: &&Holder| holder.process.as_ref().is_some_and(|(_, process)| process.starts_with(name));
    holders.iter().partition(is_own)
}

/// Who is not meshd. Whom this user cannot see may be meshd itself, where that says that it is well.
fn stranger<'a>(others: &[&'a Holder], facts: &Facts) -> Option<&'a Holder> {
    let well = facts.daemon.as_ref().is_some_and(|daemon| daemon.status.ready);
    others.iter().find(|other| other.seen || !well).copied()
}

fn shown(ip: IpAddr) -> String {
    if ip.is_unspecified() { "all addresses".to_owned() } else { ip.to_string() }
}

/// Whether a firewall lets in what the mesh needs.
pub fn firewall_input(facts: &Facts) -> Vec<Check> {
    let name = "firewall";
    if facts.nft.is_none() && facts.iptables.is_none() {
        return vec![Check::skipped(name, "neither nft nor iptables-save answers here")];
    }
    let wanted = std::iter::once(("udp", facts.port)).chain(tcp_ports(facts).map(|port| ("tcp", port)));
    let devices: Vec<(String, bool)> =
        match facts.underlay_devices().map(|(d, ip)| (d.name.clone(), ip.is_ipv6())).collect::<Vec<_>>() {
            none if none.is_empty() => vec![("?".to_owned(), false)],
            some => some,
        };
    let mut checks = Vec::new();
    for (protocol, port) in wanted {
        let fates = devices
            .iter()
            .map(|(device, v6)| fate(facts, Probe { protocol, port: Some(port), device, hook: "input", v6: *v6 }));
        let what = format!("{} {port}", protocol.to_uppercase());
        checks.push(match fates.reduce(worse) {
            Some(Fate::Dropped { certain: true, by, fix }) => {
                Check::bad(name, format!("{what} is dropped by {by}"), fix)
            }
            Some(Fate::Dropped { by, fix, .. }) => {
                Check::warning(name, format!("{what} may be dropped by {by}: rules before it are not understood"), fix)
            }
            _ => Check::ok(name, format!("no rule is known to drop {what}")),
        });
    }
    checks
}

fn fate(facts: &Facts, probe: Probe<'_>) -> Fate {
    let nft = facts.nft.as_deref().and_then(|json| firewall::nft(json, probe));
    // iptables-save speaks of IPv4 alone.
    let iptables = facts.iptables.as_deref().filter(|_| !probe.v6).and_then(|text| firewall::iptables(text, probe));
    nft.into_iter().chain(iptables).reduce(worse).unwrap_or(Fate::Passes)
}

fn worse(one: Fate, other: Fate) -> Fate {
    let rank = |fate: &Fate| match fate {
        Fate::Passes => 0,
        Fate::Dropped { certain: false, .. } => 1,
        Fate::Dropped { certain: true, .. } => 2,
    };
    if rank(&other) > rank(&one) { other } else { one }
}

/// Whether what comes out of the mesh is let through to pods.
pub fn forward_policy(facts: &Facts) -> Check {
    let name = "forward_policy";
    if facts.nft.is_none() && facts.iptables.is_none() {
        return Check::skipped(name, "neither nft nor iptables-save answers here");
    }
    let probe = Probe { protocol: "tcp", port: None, device: &facts.tun, hook: "forward", v6: false };
    match worse(fate(facts, probe), fate(facts, Probe { v6: true, ..probe })) {
        Fate::Dropped { certain: true, by, fix } => Check::warning(
            name,
            format!("what comes out of {} for pods or other machines is dropped by {by}", facts.tun),
            fix,
        ),
        Fate::Dropped { by, fix, .. } => {
            let found = format!(
                "what comes out of {} for pods may be dropped by {by}: rules before it are not understood",
                facts.tun
            );
            Check::warning(name, found, fix)
        }
        Fate::Passes => Check::ok(name, format!("no rule is known to drop what {} forwards", facts.tun)),
    }
}

/// Whether a packet of mesh0 fits the underlay.
pub fn mtu(facts: &Facts) -> Check {
    let name = "mtu";
    if facts.devices.is_none() {
        return Check::skipped(name, "netlink did not answer");
    }
    let Some((underlay, ip)) = facts.underlay_devices().min_by_key(|(device, _)| device.mtu) else {
        return Check::skipped(name, "the underlay's device is not known");
    };
    let Some(tun) = facts.device(&facts.tun) else {
        return Check::ok(name, format!("{} has {}, and there is no {} yet", underlay.name, underlay.mtu, facts.tun));
    };
    let sealed = facts.daemon.iter().flat_map(|d| &d.peers).any(|peer| peer.encryption == Encryption::Wireguard);
    let overhead = if sealed { 60 } else { 50 } + if ip.is_ipv6() { 20 } else { 0 };
    let fits = underlay.mtu.saturating_sub(overhead);
    let both = format!("{} has {}, {} has {}", underlay.name, underlay.mtu, tun.name, tun.mtu);
    if tun.mtu > fits {
        let fix = format!("ip link set {} mtu {fits}  # and leave `mtu:` out of the configuration (auto)", tun.name);
        return Check::bad(name, format!("{both}: its longest packets need {} bytes", tun.mtu + overhead), fix);
    }
    if tun.mtu < 1280 {
        return Check::warning(
            name,
            format!("{both}: IPv6 needs 1280"),
            format!("ip link set {} mtu 1500", underlay.name),
        );
    }
    Check::ok(name, both)
}

/// What meshd runs with, and why not with more.
pub fn offloads(facts: &Facts) -> Check {
    let name = "offloads";
    let Some(daemon) = &facts.daemon else { return Check::skipped(name, "meshd tries them when it starts") };
    let o = daemon.stats.offloads;
    let all = [("tun_tso", o.tun_tso), ("tun_uso", o.tun_uso), ("udp_gso", o.udp_gso), ("udp_gro", o.udp_gro)];
    let why =
        |name: &str| daemon.stats.offload_reasons.get(name).cloned().unwrap_or_else(|| "no reason is known".to_owned());
    let off: Vec<String> =
        all.iter().filter(|(_, on)| !on).map(|(name, _)| format!("{name} is off: {}", why(name))).collect();
    if off.is_empty() {
        return Check::ok(name, format!("io {}, all offloads are on", daemon.stats.io));
    }
    Check::warning(
        name,
        format!("io {}, {}", daemon.stats.io, off.join("; ")),
        "a newer kernel (6.2 has them all), and `io: auto`",
    )
}

/// What the kernel's version has.
pub fn kernel(facts: &Facts) -> Check {
    let name = "kernel";
    let mut numbers = facts.release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let said = |rest: &str| format!("Linux {}{rest}", facts.release);
    match version {
        (0, _) => Check::skipped(name, "its release is not known"),
        old if old < (5, 0) => Check::bad(name, said(" is too old: UDP_GRO is of 5.0"), "install Linux 6.2 or newer"),
        old if old < (6, 2) => {
            let found = said(": UDP super-packets on the TUN device (USO) are of 6.2, so that UDP is slower");
            Check::warning(name, found, "install Linux 6.2 or newer")
        }
        _ => Check::ok(name, said(" has all that is used")),
    }
}

/// Whether the clock can be trusted: certificates, tokens and handshakes go by it.
pub fn clock(facts: &Facts) -> Check {
    match facts.synchronised {
        None => Check::skipped("clock", "the kernel does not say"),
        Some(true) => Check::ok("clock", "it is synchronised"),
        Some(false) => {
            let found = "nothing synchronises it: certificates and tokens go by it, and so do new handshakes";
            Check::warning("clock", found, "timedatectl set-ntp true")
        }
    }
}

/// What other overlays have left, or still use.
pub fn leftovers(facts: &Facts) -> Vec<Check> {
    let name = "leftovers";
    let Some(devices) = &facts.devices else { return vec![Check::skipped(name, "netlink did not answer")] };
    let known = [
        ("flannel.1", "flannel"),
        ("flannel-v6.1", "flannel"),
        ("flannel-wg", "flannel"),
        ("cilium_vxlan", "Cilium"),
        ("cilium_host", "Cilium"),
        ("vxlan.calico", "Calico"),
        ("vxlan-v6.calico", "Calico"),
        ("weave", "Weave Net"),
    ];
    let mut checks = Vec::new();
    for device in devices {
        let of = known.iter().find(|(known, _)| *known == device.name).map(|(_, whose)| *whose);
        let same_port = device.vxlan_port == Some(facts.port);
        let fix = format!("ip link del {}  # if it is a leftover", device.name);
        match (of, same_port) {
            (whose, true) => {
                let whose = whose.map(|whose| format!(", {whose}'s")).unwrap_or_default();
                let found = format!("{} (a kernel VXLAN device{whose}) has UDP {}", device.name, facts.port);
                checks.push(Check::bad(name, found, fix));
            }
            (Some(whose), false) => {
                checks.push(Check::warning(
                    name,
                    format!("{} is {whose}'s: two overlays, or a leftover", device.name),
                    fix,
                ));
            }
            (None, false) => {}
        }
    }
    let own = facts.daemon.iter().flat_map(|d| d.nodes.iter().filter(|node| node.name == d.status.node));
    let own: Vec<_> = own.flat_map(|node| node.subnets.clone()).collect();
    for (device, net) in
        devices.iter().filter(|d| d.name == "cni0").flat_map(|d| d.addresses.iter().map(move |a| (d, a)))
    {
        let link_local = matches!(net.addr(), IpAddr::V6(ip) if ip.is_unicast_link_local());
        if !own.is_empty() && !link_local && !own.iter().any(|subnet| subnet.contains(net)) {
            let found =
                format!("{} has {net}, which is not in this node's subnet: pods there are not reached", device.name);
            checks.push(Check::bad(
                name,
                found,
                format!("ip link del {}  # the CNI plugin makes it anew", device.name),
            ));
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(name, "no other overlay's devices"));
    }
    checks
}

/// Whether the kernel would take what comes out of the mesh for forged.
pub fn rp_filter(facts: &Facts) -> Check {
    let name = "rp_filter";
    let read =
        |device: &str| facts.sysctl(&format!("net.ipv4.conf.{device}.rp_filter")).and_then(|v| v.parse::<u8>().ok());
    let Some(all) = read("all") else { return Check::skipped(name, "it cannot be read") };
    match read(&facts.tun) {
        // The kernel takes the greater of the two; 1 is strict, 2 is loose.
        Some(own) if all.max(own) == 1 => {
            let found =
                format!("strict on {}: a node that answers pods from its underlay address is not heard", facts.tun);
            Check::bad(name, found, format!("sysctl -w net.ipv4.conf.{}.rp_filter=2", facts.tun))
        }
        Some(_) => Check::ok(name, format!("not strict on {}", facts.tun)),
        None => Check::ok(name, "meshd sets it loose on its own device"),
    }
}

/// Whether pods and machines behind this node can be reached.
pub fn ip_forward(facts: &Facts) -> Check {
    let name = "ip_forward";
    let Some(v4) = facts.sysctl("net.ipv4.ip_forward") else { return Check::skipped(name, "it cannot be read") };
    if v4.trim() == "0" {
        let found = "off: this node itself is reached, pods and machines behind it are not";
        return Check::warning(name, found, "sysctl -w net.ipv4.ip_forward=1");
    }
    Check::ok(name, "on")
}

/// What firewalld lets in.
pub fn firewalld(facts: &Facts) -> Check {
    let name = "firewalld";
    let Some(zones) = &facts.zones else { return Check::ok(name, "it does not run") };
    let wanted =
        std::iter::once(format!("{}/udp", facts.port)).chain(tcp_ports(facts).map(|port| format!("{port}/tcp")));
    for port in wanted {
        let closed = |zone: &&super::Zone| zone.target != "ACCEPT" && !zone.ports.contains(&port);
        if let Some(zone) = zones.iter().filter(|zone| zone.device != facts.tun).find(closed) {
            let found = format!("the zone {} of {} does not let {port} in", zone.name, zone.device);
            let fix =
                format!("firewall-cmd --permanent --zone={} --add-port={port} && firewall-cmd --reload", zone.name);
            return Check::bad(name, found, fix);
        }
    }
    match zones.iter().find(|zone| zone.device == facts.tun && zone.target != "ACCEPT") {
        Some(zone) => {
            let found = format!(
                "{} is in the zone {}, which does not let all of the mesh's traffic in",
                zone.device, zone.name
            );
            let fix = format!(
                "firewall-cmd --permanent --zone=trusted --add-interface={} && firewall-cmd --reload",
                zone.device
            );
            Check::warning(name, found, fix)
        }
        None => Check::ok(name, "the ports are open"),
    }
}

/// Whether networkd deletes meshd's routes when it restarts.
pub fn networkd(facts: &Facts) -> Check {
    match facts.networkd_removes {
        None => Check::ok("networkd", "systemd-networkd does not run"),
        Some(false) => Check::ok("networkd", "it leaves foreign routes alone"),
        Some(true) => Check::warning(
            "networkd",
            "it deletes routes that it does not know when it restarts (meshd restores its own within seconds)",
            "mkdir -p /etc/systemd/networkd.conf.d && printf '[Network]\\nManageForeignRoutes=no\\n\
             ManageForeignRoutingPolicyRules=no\\n' >/etc/systemd/networkd.conf.d/meshd.conf && systemctl restart \
             systemd-networkd",
        ),
    }
}

/// Whether NetworkManager takes hold of the device.
pub fn network_manager(facts: &Facts) -> Check {
    match facts.network_manager_spares {
        None => Check::ok("network_manager", "NetworkManager does not run"),
        Some(true) => Check::ok("network_manager", format!("it leaves {} alone", facts.tun)),
        Some(false) => Check::warning(
            "network_manager",
            format!("it may take hold of {}", facts.tun),
            format!(
                "printf '[keyfile]\\nunmanaged-devices=interface-name:{}\\n' >/etc/NetworkManager/conf.d/meshd.conf && \
                 systemctl reload NetworkManager",
                facts.tun
            ),
        ),
    }
}

/// Whether two nodes claim one underlay address.
pub fn duplicate_addresses(facts: &Facts) -> Check {
    let name = "duplicate_addresses";
    let Some(daemon) = &facts.daemon else { return Check::skipped(name, "the node list is meshd's to tell") };
    if daemon.nodes.is_empty() {
        return Check::skipped(name, "no node list was answered");
    }
    let mut owners: BTreeMap<IpAddr, &str> = BTreeMap::new();
    for node in &daemon.nodes {
        for ip in &node.underlay {
            if let Some(other) = owners.insert(*ip, &node.name).filter(|other| *other != node.name) {
                let found =
                    format!("{other} and {} both say that {ip} is theirs: only one of them is reached", node.name);
                return Check::bad(name, found, format!("set `node-ip:` on {} to an address of its own", node.name));
            }
        }
    }
    Check::ok(name, format!("{} nodes, each with addresses of its own", daemon.nodes.len()))
}

/// Whether bursts find room.
pub fn receive_buffer(facts: &Facts) -> Check {
    let name = "receive_buffer";
    let lost = facts.daemon.as_ref().and_then(|d| d.stats.drops.get("udp_queue_overflow")).copied().unwrap_or(0);
    let Some(max) = facts.sysctl("net.core.rmem_max").and_then(|v| v.parse::<u64>().ok()) else {
        return Check::skipped(name, "net.core.rmem_max cannot be read");
    };
    let fix = format!("sysctl -w net.core.rmem_max={RMEM_WANTED} && systemctl restart meshd");
    match (lost, max < RMEM_WANTED) {
        (1.., _) => Check::warning(name, format!("{lost} datagrams found no room in the receive queue"), fix),
        // With CAP_NET_ADMIN meshd gets what it asks for, whatever the limit.
        (_, true) => Check::ok(name, format!("net.core.rmem_max is {max}; nothing was lost so far")),
        (_, false) => Check::ok(name, format!("net.core.rmem_max is {max}")),
    }
}

const RMEM_WANTED: u64 = 8 << 20;

/// Whether others can read the private key.
pub fn key_file(facts: &Facts) -> Check {
    match &facts.key {
        None => {
            let member = facts.daemon.as_ref().is_some_and(|daemon| daemon.status.role != Role::Run);
            if member {
                return Check::skipped("key_file", "the private key's file is not seen from here");
            }
            Check::ok("key_file", "there is no private key")
        }
        Some(file) if file.mode & 0o077 != 0 => Check::bad(
            "key_file",
            format!("{} can be read by others (mode {:04o}): meshd refuses it", file.path, file.mode),
            format!("chmod 600 {}", file.path),
        ),
        Some(file) => Check::ok("key_file", format!("{} is its owner's alone", file.path)),
    }
}

/// What deserves a look.
pub fn findings(checks: &[Check]) -> impl Iterator<Item = &Check> {
    checks.iter().filter(|check| check.level > Level::Skipped)
}

#[cfg(test)]
mod tests;
