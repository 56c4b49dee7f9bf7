//! Would a packet arrive, which way does it go, and if it would not: why?
//!
//! Owns the verdict: facts in (the peer table, the kernel's route, counters), one answer out. Collects nothing itself: it
//! knows no socket and no clock, and asks the engine's own functions, so that it cannot tell another story than they do.

pub mod example;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::admin::protocol::why::{
    Ask, CarriedView, DropView, Finding, Flow, MtuView, OuterView, Protocol, RouteView, WhyView,
};
use crate::admin::protocol::{Encryption, PeerState, PeerView};
use crate::admin::reasons;
use crate::engine::classify;
use crate::engine::tables::{Peer, Tables};
use crate::engine::tunnel;
use crate::health::peer::Liveness;
use crate::wire::ip::Packet;

/// What the answer is made of.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The question.
    pub ask: &'a Ask,
    /// The address that it means; `None`: no node has that name.
    pub destination: Option<IpAddr>,
    /// The peer table in use.
    pub tables: &'a Tables,
    /// What `peers` says of each peer.
    pub peers: &'a [PeerView],
    /// The kernel's route, or why that could not be found out; `Ok(None)`: it has none.
    pub route: Result<Option<RouteView>, String>,
    /// The TUN device's name.
    pub tun: &'a str,
    /// What keeps this node from being ready.
    pub problems: &'a [String],
    /// Worker threads; 0: the data plane does not run.
    pub workers: u32,
    /// The UDP data port.
    pub port: u16,
    /// The outer source ports on each of the node's underlay addresses.
    pub source_ports: &'a [(IpAddr, Vec<u16>)],
    /// The drop counters.
    pub drops: &'a BTreeMap<String, u64>,
}

/// Works out the answer.
pub fn explain(facts: &Facts<'_>) -> WhyView {
    let mut view = WhyView { asked: facts.ask.destination.clone(), ..WhyView::default() };
    let Some(destination) = facts.destination else {
        view.findings.push(bad(
            "no_such_node",
            format!("`{}` is neither an address nor the name of a node in the list", facts.ask.destination),
            "meshctl nodes (shows their names)",
        ));
        return judged(view, facts);
    };
    view.destination = Some(destination);
    let peer = facts.tables.route(destination).and_then(|index| facts.tables.peer(index));
    view.peer = peer.and_then(|peer| facts.peers.iter().find(|view| view.name == peer.spec.name.as_str()).cloned());
    view.prefix = peer.and_then(|peer| prefix(peer, destination));
    match &facts.route {
        Ok(route) => view.route.clone_from(route),
        Err(error) => view.findings.push(note("route_unknown", format!("the kernel's route is not known: {error}"))),
    }
    view.source = view.route.as_ref().and_then(|route| route.source);

    view.findings.extend(own(facts, destination));
    if view.findings.iter().all(|finding| !finding.bad) {
        match peer {
            Some(_) => view.findings.extend(routed(facts, destination)),
            None => view.findings.push(no_peer(facts, destination)),
        }
    }
    if let Some(peer) = peer {
        view.findings.extend(source(facts, view.source));
        view.findings.extend(view.peer.as_ref().and_then(session));
        view.findings.extend(view.peer.as_ref().and_then(heard));
        let example = packet(facts.ask.flow, view.source, destination);
        view.mtu = Some(mtu(facts.tables, peer, destination));
        let carried = carried(facts, peer, &example);
        view.outer = outer(peer, &carried, &example);
        view.carried = Some(carried);
        if let Some(mtu) = view.mtu.filter(|mtu| mtu.inner < mtu.device) {
            view.findings.push(note(
                "path_mtu",
                format!(
                    "the path takes {} bytes{}, {} has {}: TCP is cut to fit, other packets that are longer are refused",
                    mtu.inner,
                    if mtu.measured { " (measured)" } else { "" },
                    facts.tun,
                    mtu.device
                ),
            ));
        }
    }
    if facts.workers == 0 {
        view.findings.push(bad("no_data_plane", "meshd's data plane does not run".to_owned(), "meshctl status"));
    }
    if !facts.problems.is_empty() {
        let message = format!("this node is not ready: {}", facts.problems.join("; "));
        view.findings.push(Finding { fix: Some("meshctl status".to_owned()), ..note("not_ready", message) });
    }
    let encrypted = view.peer.as_ref().is_some_and(|peer| peer.encryption == Encryption::Wireguard);
    view.drops = drops(facts.drops, encrypted);
    judged(view, facts)
}

fn judged(mut view: WhyView, facts: &Facts<'_>) -> WhyView {
    view.good = view.findings.iter().all(|finding| !finding.bad);
    let to = view.destination.map_or_else(|| view.asked.clone(), |ip| ip.to_string());
    view.verdict = match (view.findings.iter().find(|finding| finding.bad), &view.peer) {
        (Some(wrong), _) => wrong.message.clone(),
        (None, Some(peer)) => {
            let how = match peer.encryption {
                Encryption::Wireguard => "encrypted",
                Encryption::None => "in the clear",
            };
            format!("packets to {to} leave through {} for {} at {}, {how}", facts.tun, peer.name, peer.endpoint)
        }
        (None, None) => format!("nothing is known of {to}"),
    };
    view
}

fn bad(kind: &str, message: String, fix: impl Into<String>) -> Finding {
    Finding { kind: kind.to_owned(), bad: true, message, fix: Some(fix.into()) }
}

fn note(kind: &str, message: String) -> Finding {
    Finding { kind: kind.to_owned(), bad: false, message, fix: None }
}

/// What the mesh has nothing to do with.
fn own(facts: &Facts<'_>, destination: IpAddr) -> Option<Finding> {
    let local = facts.tables.local();
    if local.addresses.contains(&destination) {
        let message = format!("{destination} is this node itself: such a packet never leaves it");
        return Some(bad("own_address", message, "ask for another node's address"));
    }
    if let Some(subnet) = local.subnets.iter().find(|subnet| subnet.contains(&destination)) {
        let message =
            format!("{destination} lies in this node's own subnet {subnet}: such a packet does not cross the mesh");
        return Some(bad("own_subnet", message, format!("ip route get {destination} (shows the local way)")));
    }
    if let Some(peer) = facts.tables.source(destination).and_then(|index| facts.tables.peer(index)) {
        let message =
            format!("{destination} is the underlay address of {}: it is reached beside the mesh", peer.spec.name);
        return Some(bad("underlay_address", message, format!("meshctl why {}", peer.spec.name)));
    }
    if destination.is_loopback() {
        let message = format!("{destination} is this machine's own loopback address: such a packet never leaves it");
        return Some(bad("loopback", message, "ask for a node, or for an address in its subnets"));
    }
    if !classify::is_unicast(destination) {
        let message = format!("{destination} is no unicast address: the mesh is layer 3, and carries unicast alone");
        return Some(bad("not_unicast", message, "use unicast"));
    }
    None
}

fn no_peer(facts: &Facts<'_>, destination: IpAddr) -> Finding {
    let peers = facts.tables.peers().len();
    let route = match &facts.route {
        Ok(Some(route)) if route.to_mesh => format!(", although `{}` leads here", route.text),
        _ => String::new(),
    };
    bad(
        "no_peer",
        format!("no node has {destination} in its subnets ({peers} peers are known){route}"),
        "meshctl peers (shows all subnets); a node that is missing has to join, or to be added to the nodes-file",
    )
}

/// Whether the kernel leads the packet into the mesh.
fn routed(facts: &Facts<'_>, destination: IpAddr) -> Option<Finding> {
    let family = if destination.is_ipv4() { "" } else { "-6 " };
    let again = "meshctl status; meshd restores its routes within seconds while it runs";
    let route = facts.route.as_ref().ok()?;
    let Some(route) = route else {
        return Some(bad("no_route", format!("the kernel has no route to {destination}"), again));
    };
    if route.to_mesh {
        return None;
    }
    if route.ours {
        let message = format!("meshd's own `{}` keeps packets from leaving in clear by another way", route.text);
        return Some(bad("held_route", message, again));
    }
    let place = match (&route.device, route.kind.as_str()) {
        (Some(device), "unicast") => format!("to {device}"),
        (_, kind) => format!("nowhere ({kind})"),
    };
    Some(bad(
        "route_elsewhere",
        format!("the kernel routes {destination} {place}, not to {}: `{}` wins", facts.tun, route.text),
        format!("ip {family}route del {}", route.text),
    ))
}

/// Whether the peer would take the packet from the address that the kernel sends from.
fn source(facts: &Facts<'_>, source: Option<IpAddr>) -> Option<Finding> {
    let source = source.filter(|source| !facts.tables.is_ours(*source))?;
    Some(bad(
        "source_not_ours",
        format!("the kernel would send from {source}, which is not this node's in the mesh: peers refuse it"),
        "give the route or the application a source address of this node (`meshctl status` shows them)",
    ))
}

fn session(peer: &PeerView) -> Option<Finding> {
    let session = peer.session.filter(|session| session.lanes_up == 0)?;
    if session.unanswered == 0 {
        return Some(note("idle", format!("{} has no session at present: the next packet starts one", peer.name)));
    }
    if session.another_preshared {
        return Some(bad(
            "another_preshared_key",
            format!("{} answers handshakes as a peer with another preshared key does, or with none", peer.name),
            format!(
                "give the entry of {} and its entry of this node the same `preshared-key-file`, or none",
                peer.name
            ),
        ));
    }
    let tried = match session.unanswered {
        1 => "the handshake was not answered".to_owned(),
        n => format!("{n} handshakes were not answered"),
    };
    Some(bad(
        "no_session",
        format!("{} is encrypted and there is no session with it: {tried}", peer.name),
        format!(
            "on {}: meshctl status (does it run?), meshctl key show (is it {}?), meshctl doctor (is UDP {} let in?)",
            peer.name,
            peer.public_key.as_deref().unwrap_or("the key in the list"),
            peer.endpoint.port()
        ),
    ))
}

fn heard(peer: &PeerView) -> Option<Finding> {
    match (peer.state, peer.last_seen_ms) {
        (PeerState::Down, _) => Some(bad(
            "peer_down",
            format!("{} does not answer: it is down", peer.name),
            format!("on {}: meshctl status, meshctl doctor", peer.name),
        )),
        (_, None) if peer.tx_packets > 0 => Some(Finding {
            fix: Some(format!("on {}: meshctl doctor (is UDP {} let in?)", peer.name, peer.endpoint.port())),
            ..note("never_heard", format!("nothing ever came from {}, to which packets were sent", peer.name))
        }),
        _ => None,
    }
}

fn prefix(peer: &Peer, destination: IpAddr) -> Option<IpNet> {
    peer.spec.subnets.iter().filter(|net| net.contains(&destination)).max_by_key(|net| net.prefix_len()).copied()
}

fn mtu(tables: &Tables, peer: &Peer, destination: IpAddr) -> MtuView {
    let (inner, header) = (u32::from(peer.mtu()), if destination.is_ipv4() { 20 } else { 40 });
    let device = u32::from(tables.local().mtu);
    let longest = inner.min(device);
    MtuView {
        device,
        inner,
        outer: inner + peer.overhead() as u32,
        measured: peer.spec.liveness.as_deref().and_then(Liveness::path_mtu).is_some(),
        tcp_payload: longest.saturating_sub(header + 20),
        udp_payload: longest.saturating_sub(header + 8),
        ping_payload: longest.saturating_sub(header + 8),
    }
}

/// The example packet: the first of the flow, without payload.
fn packet(flow: Option<Flow>, source: Option<IpAddr>, destination: IpAddr) -> Vec<u8> {
    let nobody = if destination.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    let source = source.filter(|source| source.is_ipv4() == destination.is_ipv4()).unwrap_or(nobody);
    example::inner(source, destination, flow)
}

fn carried(facts: &Facts<'_>, peer: &Peer, example: &[u8]) -> CarriedView {
    let tunnel = peer.spec.tunnel.as_deref().filter(|tunnel| tunnel.seals());
    let to = tunnel.map_or(peer.spec.endpoint, |tunnel| tunnel.endpoint());
    let own = facts.source_ports.iter().find(|(ip, _)| ip.is_ipv4() == to.is_ipv4());
    let ports = own.map(|(_, ports)| ports.clone()).unwrap_or_default();
    let hash =
        Packet::parse(example).map_or(0, |packet| classify::flow_hash(&packet, classify::ports(&packet, example)));
    let count = ports.len().max(1) as u16;
    let (lane, socket) = match tunnel {
        Some(tunnel) => {
            let (lane, socket) = tunnel.carrier(hash, count);
            (Some(lane as u32), socket)
        }
        None => (None, (hash % u32::from(count)) as u16),
    };
    // The socket behind the pool sends from the data port.
    let port = ports.get(usize::from(socket)).copied().unwrap_or(facts.port);
    let outer_source_ports = match tunnel.map(|tunnel| tunnel.facts().lanes) {
        None => ports,
        Some(lanes) => std::iter::once(facts.port).chain(ports.into_iter().take(lanes.saturating_sub(1))).collect(),
    };
    CarriedView {
        worker: (facts.workers == 1).then_some(0),
        workers: facts.workers,
        lane,
        from: own.map(|(ip, _)| SocketAddr::new(*ip, port)),
        to: Some(to),
        outer_source_ports,
    }
}

fn outer(peer: &Peer, carried: &CarriedView, inner: &[u8]) -> Option<OuterView> {
    let (from, to) = (carried.from?, carried.to?);
    let v6 = inner.first().is_some_and(|first| first >> 4 == 6);
    let payload = match carried.lane {
        Some(_) => example::sealed(inner.len()),
        None => [peer.header(v6).as_slice(), inner].concat(),
    };
    let shown = if carried.lane.is_some() { tunnel::INNER_AT } else { payload.len() };
    example::outer(from, to, &payload, shown)
}

/// Reasons for which a packet on this way, or its answer, is dropped here.
fn drops(counted: &BTreeMap<String, u64>, encrypted: bool) -> Vec<DropView> {
    let always = ["no_route", "source_not_ours", "packet_too_big", "udp_send_failed", "udp_buffer_full"];
    let back = ["inner_source_not_allowed", "inner_destination_not_ours", "tun_write_failed"];
    let kernel = ["tun_queue_overflow", "udp_queue_overflow"];
    let clear = ["unknown_source", "bad_vxlan_header", "wrong_vni", "bad_inner_mac"];
    let sealed = [
        "no_session",
        "clear_from_encrypted_peer",
        "handshake_refused",
        "handshake_replayed",
        "handshake_limited",
        "wireguard_unknown_session",
        "wireguard_not_authentic",
    ];
    let special = if encrypted { &sealed[..] } else { &clear[..] };
    let of = |reason: &&str| {
        let packets = counted.get(*reason).copied().filter(|packets| *packets > 0)?;
        let meaning = reasons::explain(reason).unwrap_or_default().to_owned();
        Some(DropView { reason: (*reason).to_owned(), packets, meaning })
    };
    always.iter().chain(special).chain(&back).chain(&kernel).filter_map(of).collect()
}

impl Protocol {
    /// As `--proto` has it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

#[cfg(test)]
mod tests;
