use super::*;

use crate::admin::protocol::SessionView;
use crate::engine::outbound::{HEADROOM, Outbound};
use crate::engine::stats::Stats;
use crate::engine::tables::ENCAPSULATION;
use crate::engine::testing::{connect, encrypted_mesh, mesh, mesh_with_mtu};
use crate::engine::tunnel::Policy;
use crate::wire::vnet_hdr;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn peers(tables: &Tables) -> Vec<PeerView> {
    let view = |peer: &Peer| {
        let tunnel = peer.spec.tunnel.as_ref().map(|tunnel| tunnel.facts());
        PeerView {
            name: peer.spec.name.to_string(),
            endpoint: peer.spec.endpoint,
            subnets: peer.spec.subnets.clone(),
            mac: peer.spec.mac.to_string(),
            public_key: None,
            preshared: false,
            encryption: if tunnel.is_some() { Encryption::Wireguard } else { Encryption::None },
            session: tunnel.map(|facts| SessionView {
                lanes: facts.lanes,
                lanes_up: facts.lanes_up,
                unanswered: facts.unanswered,
                ..SessionView::default()
            }),
            state: PeerState::Unknown,
            last_seen_ms: None,
            rtt_us: None,
            path_mtu: 1450,
            path: None,
            loss_permille: None,
            ways: Vec::new(),
            tx_packets: 0,
            tx_bytes: 0,
            rx_packets: 0,
            rx_bytes: 0,
        }
    };
    tables.peers().iter().map(view).collect()
}

fn to_mesh(source: &str) -> RouteView {
    RouteView {
        text: "10.42.0.0/16 dev mesh0 proto 72".to_owned(),
        kind: "unicast".to_owned(),
        device: Some("mesh0".to_owned()),
        source: Some(ip(source)),
        to_mesh: true,
        ours: true,
        ..RouteView::default()
    }
}

const PORTS: [u16; 8] = [40000, 40001, 40002, 40003, 40004, 40005, 40006, 40007];

/// The answer for a destination, with a change to otherwise good facts.
fn asked(tables: &Tables, destination: &str, flow: Option<Flow>, change: impl FnOnce(&mut Facts<'_>)) -> WhyView {
    let ask = Ask { destination: destination.to_owned(), flow };
    let drops = BTreeMap::from([("no_route".to_owned(), 3), ("wrong_vni".to_owned(), 0), ("no_session".to_owned(), 2)]);
    let source_ports = [(ip("10.9.0.1"), PORTS.to_vec())];
    let mut facts = Facts {
        ask: &ask,
        destination: destination.parse().ok(),
        tables,
        peers: &peers(tables),
        route: Ok(Some(to_mesh(if destination.contains(':') { "fd42:0:0:1::1" } else { "10.42.1.1" }))),
        tun: "mesh0",
        problems: &[],
        workers: 2,
        port: 8472,
        source_ports: &source_ports,
        drops: &drops,
    };
    change(&mut facts);
    explain(&facts)
}

/// The first thing that is wrong.
fn wrong(view: &WhyView) -> &str {
    let finding = view.findings.iter().find(|finding| finding.bad);
    finding.map_or("", |finding| {
        assert_eq!(view.verdict, finding.message);
        assert!(finding.fix.is_some());
        finding.kind.as_str()
    })
}

#[test]
fn a_good_way_is_told_whole() {
    let view = asked(&mesh(1), "10.42.2.9", None, |_| {});
    assert!(view.good && view.findings.is_empty(), "{view:?}");
    assert_eq!(view.verdict, "packets to 10.42.2.9 leave through mesh0 for n2 at 10.9.0.2:8472, in the clear");
    assert_eq!(view.prefix, Some("10.42.2.0/24".parse().unwrap()));
    let mtu = view.mtu.unwrap();
    assert_eq!(
        (mtu.inner, mtu.outer, mtu.tcp_payload, mtu.udp_payload, mtu.ping_payload),
        (1450, 1500, 1410, 1422, 1422)
    );
    let drops: Vec<_> = view.drops.iter().map(|drop| (drop.reason.as_str(), drop.packets)).collect();
    assert_eq!(drops, [("no_route", 3)], "only what counts, and fits a clear peer");
}

#[test]
fn the_example_is_what_the_engine_sends() {
    for (flow, destination) in [
        (Some(Flow { protocol: Protocol::Udp, source_port: 4000, destination_port: 53 }), "10.42.2.9"),
        (Some(Flow { protocol: Protocol::Tcp, source_port: 40001, destination_port: 443 }), "10.42.3.9"),
        (Some(Flow { protocol: Protocol::Udp, source_port: 7, destination_port: 9 }), "fd42:0:0:2::9"),
        (None, "10.42.4.1"),
        (None, "fd42:0:0:3::1"),
    ] {
        let tables = mesh(1);
        let view = asked(&tables, destination, flow, |_| {});
        assert!(view.good, "{view:?}");
        let source = if destination.contains(':') { "fd42:0:0:1::1" } else { "10.42.1.1" };
        let packet = example::inner(ip(source), ip(destination), flow);
        let mut arena = vec![0; HEADROOM + vnet_hdr::HEADER_LEN];
        arena.extend_from_slice(&packet);
        let len = arena.len() - HEADROOM;
        let mut engine = Outbound::new(Stats::new(1), 0, PORTS.len() as u16);
        engine.push(&tables, 0, &mut arena, HEADROOM, len);
        let run = engine.batch().runs().first().expect("it is sent");
        let carried = view.carried.unwrap();
        assert_eq!(carried.from.unwrap().port(), PORTS[usize::from(run.key.socket)], "{destination}");
        assert_eq!(carried.to, Some(tables.peer(run.key.peer).unwrap().spec.endpoint));
        let outer = view.outer.unwrap();
        let sent = example::hex(&arena[HEADROOM + vnet_hdr::HEADER_LEN - ENCAPSULATION..]);
        assert_eq!(outer.hex[2 * 28..], sent, "{destination}");
        assert_eq!(outer.length as usize, outer.hex.len() / 2);
        let told: usize = outer.layers.iter().map(|layer| layer.hex.len()).sum();
        assert_eq!(told, outer.hex.len(), "every byte is decoded: {:?}", outer.layers);
        let vxlan = outer.layers.iter().find(|layer| layer.layer == "vxlan").unwrap();
        assert_eq!(vxlan.fields["vni"], "1");
    }
}

#[test]
fn what_the_mesh_has_nothing_to_do_with() {
    let tables = mesh(1);
    for (destination, kind) in [
        ("10.9.0.1", "own_address"),
        ("10.42.1.7", "own_subnet"),
        ("10.9.0.2", "underlay_address"),
        ("224.0.0.1", "not_unicast"),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("10.43.0.1", "no_peer"),
        ("fd43::1", "no_peer"),
        ("nobody", "no_such_node"),
    ] {
        let view = asked(&tables, destination, None, |_| {});
        assert!(!view.good);
        assert_eq!(wrong(&view), kind, "{destination}: {view:?}");
    }
}

#[test]
fn a_route_elsewhere_is_named_with_its_owner() {
    let tables = mesh(1);
    let stolen = || RouteView {
        text: "10.42.2.0/25 via 10.9.0.254 dev ul0 proto bird".to_owned(),
        device: Some("ul0".to_owned()),
        to_mesh: false,
        ours: false,
        ..to_mesh("10.42.1.1")
    };
    let view = asked(&tables, "10.42.2.9", None, |facts| facts.route = Ok(Some(stolen())));
    assert_eq!(wrong(&view), "route_elsewhere");
    assert!(view.verdict.contains("to ul0") && view.verdict.contains("proto bird"), "{}", view.verdict);
    assert_eq!(view.findings[0].fix.as_deref(), Some("ip route del 10.42.2.0/25 via 10.9.0.254 dev ul0 proto bird"));
    let held = RouteView { kind: "unreachable".to_owned(), to_mesh: false, device: None, ..to_mesh("10.42.1.1") };
    assert_eq!(wrong(&asked(&tables, "10.42.2.9", None, |facts| facts.route = Ok(Some(held)))), "held_route");
    assert_eq!(wrong(&asked(&tables, "10.42.2.9", None, |facts| facts.route = Ok(None))), "no_route");
    let unknown = asked(&tables, "10.42.2.9", None, |facts| facts.route = Err("netlink is shut".to_owned()));
    assert!(unknown.good && unknown.findings[0].kind == "route_unknown", "what is not known is no fault");
    let view = asked(&tables, "10.42.2.9", None, |facts| facts.route = Ok(Some(to_mesh("192.0.2.1"))));
    assert_eq!(wrong(&view), "source_not_ours");
    assert_eq!(wrong(&asked(&tables, "10.42.2.9", None, |facts| facts.workers = 0)), "no_data_plane");
}

#[test]
fn an_encrypted_peer_needs_a_session() {
    let (a, b) = (encrypted_mesh(1, 2, Policy::Required), encrypted_mesh(2, 2, Policy::Required));
    let view = asked(&a, "10.42.2.9", None, |_| {});
    assert!(view.good && view.findings[0].kind == "idle", "nothing was tried yet: {view:?}");
    let peer = a.route(ip("10.42.2.9")).unwrap();
    a.tunnel(peer).unwrap().lane(peer, 0).start(0, 8, &mut Default::default());
    let view = asked(&a, "10.42.2.9", None, |_| {});
    assert_eq!(wrong(&view), "no_session");
    assert_eq!(view.carried.unwrap().from.unwrap().port(), 8472, "lane 0 has the data port");
    connect(&a, &b);
    let view = asked(&a, "10.42.2.9", None, |_| {});
    assert!(view.good, "{view:?}");
    assert_eq!(view.mtu.unwrap().outer, 1450 + 60);
    assert!(view.verdict.ends_with("encrypted"));
    let outer = view.outer.unwrap();
    assert_eq!(outer.length as usize, 20 + 8 + 32 + 28);
    assert_eq!(outer.hex.len() / 2, 20 + 8 + 16);
    assert_eq!(outer.layers.last().unwrap().layer, "wireguard");
    assert_eq!(view.drops.iter().map(|drop| drop.reason.as_str()).collect::<Vec<_>>(), ["no_route", "no_session"]);
    let ports = |n: u16| Some(Flow { protocol: Protocol::Udp, source_port: n, destination_port: 1 });
    let from = |n| asked(&a, "10.42.2.9", ports(n), |_| {}).carried.unwrap();
    let lanes: std::collections::BTreeMap<_, _> = (0..20).map(from).map(|c| (c.lane, c.from.unwrap().port())).collect();
    assert_eq!(lanes, [(Some(0), 8472), (Some(1), 40000)].into(), "each lane has a port of its own");
}

#[test]
fn notes_do_not_make_it_bad() {
    static PROBLEMS: [String; 1] = [String::new()];
    let view = asked(&mesh(1), "10.42.2.9", None, |facts| facts.problems = &PROBLEMS);
    assert!(view.good && view.findings.iter().any(|finding| finding.kind == "not_ready"));
    let narrow = mesh_with_mtu(1, 1300);
    let view = asked(&narrow, "10.42.2.9", None, |_| {});
    assert!(view.good && view.mtu.unwrap().inner == 1300);
}
