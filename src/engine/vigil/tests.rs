use super::*;

use std::net::SocketAddr;
use std::sync::Arc;

use crate::engine::coalesce::Accepts;
use crate::engine::drop::Drop;
use crate::engine::inbound::{Inbound, Received};
use crate::engine::outbound::{HEADROOM, Outbound};
use crate::engine::stats::Stats;
use crate::engine::tables::{Local, PeerSpec};
use crate::engine::testing::{connect, encrypted_mesh, mesh, watched};
use crate::engine::tunnel::Policy;
use crate::health::peer::Verdict;
use crate::wire::ip::Packet;

const ALL: Accepts = Accepts { tso: true, uso: true };

struct Node {
    tables: Tables,
    stats: Stats,
    vigil: Vigil,
    inbound: Inbound,
    outbox: Outbox,
}

impl Node {
    fn new(tables: Tables) -> Self {
        let stats = Stats::new(1);
        let inbound = Inbound::new(stats.clone(), 0, ALL);
        Node { tables, stats, vigil: Vigil::new(0, 1, 1), inbound, outbox: Outbox::default() }
    }

    fn peer(&self, other: &Node) -> PeerIndex {
        self.tables.source(other.tables.local().addresses[0]).unwrap()
    }

    fn verdict(&self, other: &Node) -> Verdict {
        self.tables.liveness(self.peer(other)).unwrap().verdict()
    }

    fn turn(&mut self, now_us: u64) -> Vec<(SocketAddr, Vec<u8>)> {
        let mut heard = std::mem::take(self.inbound.heard());
        self.vigil.turn(&self.tables, now_us, Some(now_us), &mut heard, 1, &mut self.outbox);
        let letters = self.outbox.letters().map(|(letter, bytes)| (letter.to, bytes.to_vec())).collect();
        self.outbox.clear();
        letters
    }

    fn receive(&mut self, now_us: u64, source: SocketAddr, mut bytes: Vec<u8>) {
        let received = Received { at: 0, len: bytes.len(), segment_len: None, source, tos: 0, truncated: false };
        self.inbound.received_at(now_us);
        self.inbound.push(&self.tables, now_us / 1000, &mut bytes, received);
        assert!(self.inbound.units().is_empty(), "nothing of it reaches the TUN device");
    }

    fn consumed(&self) -> u64 {
        self.stats.sum(|worker| worker.flow.consumed_inbound.get())
    }
}

/// Lets two nodes talk for so long, in milliseconds; returns how many datagrams there were.
fn talk(a: &mut Node, b: &mut Node, from_ms: u64, to_ms: u64) -> usize {
    talk_over(a, b, from_ms, to_ms, usize::MAX)
}

/// The same over a path that takes datagrams of so many bytes.
fn talk_over(a: &mut Node, b: &mut Node, from_ms: u64, to_ms: u64, longest: usize) -> usize {
    let mut count = 0;
    for now_us in (from_ms..to_ms).map(|ms| ms * 1000) {
        for (to, bytes) in a.turn(now_us) {
            if to.ip() == b.tables.local().addresses[0] && bytes.len() <= longest {
                count += 1;
                b.receive(now_us, SocketAddr::new(a.tables.local().addresses[0], 8472), bytes);
            }
        }
        std::mem::swap(a, b);
        for (to, bytes) in a.turn(now_us) {
            if to.ip() == b.tables.local().addresses[0] && bytes.len() <= longest {
                count += 1;
                b.receive(now_us, SocketAddr::new(a.tables.local().addresses[0], 8472), bytes);
            }
        }
        std::mem::swap(a, b);
    }
    count
}

fn up(encrypted: bool) -> [Node; 2] {
    let tables = |own| if encrypted { encrypted_mesh(own, 1, Policy::Required) } else { mesh(own) };
    let [mut a, mut b] = [1, 2].map(|own| Node::new(watched(&tables(own))));
    if encrypted {
        connect(&a.tables, &b.tables);
    }
    a.tables.liveness(a.peer(&b)).unwrap().set_neighbour(true);
    let count = talk(&mut a, &mut b, 1_000, 4_000);
    assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Up, Verdict::Up), "encrypted: {encrypted}");
    assert_eq!((a.consumed() + b.consumed()) as usize, count);
    assert!(Drop::ALL.iter().all(|reason| a.stats.sum(|worker| worker.drops(*reason)) == 0));
    [a, b]
}

#[test]
fn in_the_clear_they_find_each_other_in_the_management_network() {
    let [mut a, b] = up(false);
    let sent = (4_000..4_400).flat_map(|ms| a.turn(ms * 1000)).find(|(to, _)| to.ip() == b.tables.local().addresses[0]);
    let (_, bytes) = sent.unwrap();
    assert_eq!(&bytes[..14], b"\x08\0\0\0\0\x0f\xff\0\0\0\x5e\0\x52\x02");
    assert_eq!(bytes.len(), 22 + 20 + 8 + 24);
}

fn with_keys(tables: &Tables, text: &str) -> Tables {
    let bfd_keys = Some(Arc::new(bfd::auth::Keys::parse(text).unwrap()));
    let specs = tables.peers().iter().map(|peer| peer.spec.clone()).collect();
    Tables::new(Local { bfd_keys, ..tables.local().clone() }, specs)
}

impl Node {
    fn knows(&mut self, keys: &str) {
        self.tables = with_keys(&self.tables, keys);
    }

    fn drops(&self, reason: Drop) -> u64 {
        self.stats.sum(|worker| worker.drops(reason))
    }
}

#[test]
fn with_a_key_nobody_without_is_heard() {
    let [mut a, mut b] = [1, 2].map(|own| Node::new(watched(&mesh(own))));
    a.knows("1 correct-horse");
    b.knows("1 correct-horse");
    a.tables.liveness(a.peer(&b)).unwrap().set_neighbour(true);
    talk(&mut a, &mut b, 1_000, 4_000);
    assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Up, Verdict::Up));
    assert_eq!((a.drops(Drop::BfdNotAuthentic), a.drops(Drop::BfdReplayed)), (0, 0));
    assert!(a.tables.liveness(a.peer(&b)).unwrap().path_mtu().is_some(), "probes go on");

    // what is said again is not heard again
    let source = SocketAddr::new(b.tables.local().addresses[0], 8472);
    let to_a = a.tables.local().addresses[0];
    let is_control = |bytes: &[u8]| bytes.len() == 22 + 28 + bfd::SEALED_LEN;
    let said = (4_000..4_400).flat_map(|ms| b.turn(ms * 1000)).find(|(to, bytes)| to.ip() == to_a && is_control(bytes));
    let (_, said) = said.unwrap();
    let consumed = a.consumed();
    a.receive(4_200_000, source, said.clone());
    assert_eq!((a.consumed(), a.drops(Drop::BfdReplayed)), (consumed + 1, 0));
    a.receive(4_200_001, source, said.clone());
    assert_eq!((a.consumed(), a.drops(Drop::BfdReplayed)), (consumed + 1, 1));
    let mut changed = said;
    *changed.last_mut().unwrap() ^= 1;
    a.receive(4_200_002, source, changed);
    assert_eq!(a.drops(Drop::WrongVni), 1, "its checksum is wrong");

    b.knows("2 battery-staple");
    talk(&mut a, &mut b, 4_400, 6_400);
    assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Down, Verdict::Down));
    let [by_a, by_b] = [&a, &b].map(|node| node.drops(Drop::BfdNotAuthentic));
    assert!(by_a > 0 && by_b > 0);
    b.tables = watched(&mesh(2));
    b.tables.liveness(b.peer(&a)).unwrap().set_neighbour(true);
    talk(&mut a, &mut b, 6_400, 9_400);
    assert!(a.drops(Drop::BfdNotAuthentic) > by_a && b.drops(Drop::BfdNotAuthentic) > by_b, "and none is none");
    assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Down, Verdict::Unknown));
}

#[test]
fn a_key_comes_changes_and_goes_without_a_flap() {
    let [mut a, mut b] = up(false);
    let stages = [
        "none\n1 old",
        "1 old\nnone",
        "1 old",
        "1 old\n2 new",
        "2 new\n1 old",
        "2 new",
        "2 new\nnone",
        "none\n2 new",
        "none",
    ];
    for (at, stage) in (4_000..).step_by(4_000).zip(stages) {
        for (node, ms) in [(true, at), (false, at + 2_000)] {
            if node { &mut a } else { &mut b }.knows(stage);
            for ms in (ms..ms + 2_000).step_by(50) {
                talk(&mut a, &mut b, ms, ms + 50);
                assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Up, Verdict::Up), "{stage} at {ms}");
            }
        }
    }
    for node in [&a, &b] {
        assert_eq!((node.drops(Drop::BfdNotAuthentic), node.drops(Drop::BfdReplayed)), (0, 0));
    }
}

#[test]
fn a_quick_restart_with_a_key_is_no_death() {
    let [mut a, mut b] = [1, 2].map(|own| Node::new(watched(&mesh(own))));
    a.knows("1 correct-horse");
    b.knows("1 correct-horse");
    a.tables.liveness(a.peer(&b)).unwrap().set_neighbour(true);
    talk(&mut a, &mut b, 1_000, 4_000);
    for at in [4_000, 8_000] {
        let Node { tables, .. } = Node::new(watched(&mesh(2)));
        let specs = tables.peers().iter().map(|peer| {
            let liveness = peer.spec.liveness.as_deref().unwrap();
            let settings = liveness.settings();
            let liveness = Some(Arc::new(Liveness::new(settings, 500 + at as u32 + liveness.discriminator())));
            PeerSpec { liveness, ..peer.spec.clone() }
        });
        b = Node::new(Tables::new(tables.local().clone(), specs.collect()));
        b.knows("1 correct-horse");
        for ms in (at + 300..at + 4_000).step_by(50) {
            talk(&mut a, &mut b, ms, ms + 50);
            assert_ne!(a.verdict(&b), Verdict::Down, "at {ms}");
        }
        assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Up, Verdict::Up));
    }
}

#[test]
fn an_encrypted_pair_talks_through_its_tunnel() {
    let [mut a, mut b] = up(true);
    let (source, clear) = (SocketAddr::new(b.tables.local().addresses[0], 8472), up(false)[1].turn(4_200_000));
    for (_, bytes) in clear {
        a.receive(4_200_000, source, bytes);
    }
    assert!(a.stats.sum(|worker| worker.drops(Drop::ClearFromEncryptedPeer)) > 0, "nobody speaks for it in the clear");
    assert!(talk(&mut a, &mut b, 4_200, 5_200) > 10);
    a.knows("1 correct-horse");
    assert!(talk(&mut a, &mut b, 5_200, 8_200) > 30);
    assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Up, Verdict::Up), "the tunnel has authenticated it");
}

#[test]
fn the_path_mtu_is_found_whichever_way_packets_go() {
    for encrypted in [false, true] {
        let [mut a, mut b] = up(encrypted);
        let (peer, overhead) = (a.peer(&b), if encrypted { 32 } else { 22 });
        let mtu = |a: &Node| a.tables.peer(peer).unwrap().mtu();
        let own = a.tables.peer(peer).unwrap().spec.mtu;
        talk(&mut a, &mut b, 4_000, 5_000);
        assert_eq!((mtu(&a), a.tables.liveness(peer).unwrap().path_mtu()), (own, Some(own)));
        for ms in (5_000..12_000).step_by(100) {
            let flow = a.tables.peer(peer).unwrap().spec.stats.worker(0).unwrap();
            flow.tx_bytes.add(10_000);
            talk_over(&mut a, &mut b, ms, ms + 100, 1333 + overhead);
        }
        assert_eq!(mtu(&a), 1333, "encrypted: {encrypted}");
        assert_eq!(a.tables.liveness(peer).unwrap().path().black_holes, 1);
        assert_eq!(mtu(&b), own, "who sends nothing does not look");
        assert_eq!((a.verdict(&b), b.verdict(&a)), (Verdict::Up, Verdict::Up));
    }
}

#[test]
fn packets_to_a_dead_peer_are_answered_at_once() {
    let [mut a, b] = up(false);
    (4_000..5_000).for_each(|ms| _ = a.turn(ms * 1000));
    assert_eq!(a.verdict(&b), Verdict::Down);
    let packets: [&[u8]; 2] = [
        b"\x45\0\0\x1c\0\x01\0\0\x40\x11\0\0\x0a\x2a\x01\x05\x0a\x2a\x02\x05\0\x01\0\x02\0\x08\0\0",
        b"\x60\0\0\0\0\x08\x11\x40\xfd\x42\0\0\0\0\0\x01\0\0\0\0\0\0\0\x05\xfd\x42\0\0\0\0\0\x02\0\0\0\0\0\0\0\x05\0\x01\0\x02\0\x08\0\0",
    ];
    for (packet, kind) in packets.into_iter().zip([[3, 1], [1, 3]]) {
        let stats = Stats::new(1);
        let mut outbound = Outbound::new(stats.clone(), 0, 1);
        let mut arena = vec![0; HEADROOM + 10];
        arena.extend_from_slice(packet);
        outbound.push(&a.tables, 5_000, &mut arena, HEADROOM, 10 + packet.len());
        assert!(outbound.batch().runs().is_empty());
        assert_eq!(stats.sum(|worker| worker.drops(Drop::PeerDown)), 1);
        let error = outbound.errors().next().unwrap()[10..].to_vec();
        let parsed = Packet::parse(&error).unwrap();
        assert_eq!(error[usize::from(parsed.header_len)..][..2], kind);
        assert_eq!(parsed.destination, Packet::parse(packet).unwrap().source);
    }
}

#[test]
fn what_is_no_bfd_in_the_management_network_is_another_network() {
    let [mut a, b] = up(false);
    let source = SocketAddr::new(b.tables.local().addresses[0], 8472);
    let mut frame = b"\x08\0\0\0\0\x0f\xff\0\0\0\x5e\0\x52\x02\x02\0\0\0\0\x02\x08\0".to_vec();
    frame
        .extend_from_slice(b"\x45\0\0\x1c\0\x01\0\0\xff\x11\0\0\x0a\x2a\x02\x05\x0a\x2a\x01\x05\0\x01\0\x02\0\x08\0\0");
    let before = a.consumed();
    a.receive(4_000_000, source, frame);
    assert_eq!((a.stats.sum(|worker| worker.drops(Drop::WrongVni)), a.consumed()), (1, before));
}

/// RFC 8971 §4 to §6.
#[test]
fn a_frame_of_the_management_network_is_for_this_vtep_and_from_nearby() {
    let [mut a, mut b] = up(false);
    let source = SocketAddr::new(b.tables.local().addresses[0], 8472);
    let to_a = a.tables.local().addresses[0];
    let is_control = |bytes: &[u8]| bytes[44..46] == bfd::PORT.to_be_bytes();
    let said = (4_000..4_400).flat_map(|ms| b.turn(ms * 1000)).find(|(to, bytes)| to.ip() == to_a && is_control(bytes));
    let (_, good) = said.unwrap();
    let (own_mac, own) = (a.tables.local().mac.0, a.tables.local().addresses[0]);
    let to = |destination: &str, ttl: u8, mac: [u8; 6]| {
        let destination = if destination == "own" { own } else { destination.parse().unwrap() };
        let mut frame = good[..22].to_vec();
        frame[8..14].copy_from_slice(&mac);
        let control = bfd::Control::parse(&good[50..], None).unwrap();
        let ends = Ends { source: source.ip(), destination, source_port: 50_000 };
        bfd::write_packet(&Message::Control(control), ends, None, &mut frame);
        frame[30] = ttl;
        frame
    };
    let taken = |a: &mut Node, frame| {
        let before = (a.consumed(), a.drops(Drop::WrongVni));
        a.receive(4_400_000, source, frame);
        match (a.consumed() - before.0, a.drops(Drop::WrongVni) - before.1) {
            (1, 0) => true,
            (0, 1) => false,
            other => panic!("{other:?}"),
        }
    };
    assert!(taken(&mut a, good.clone()));
    for (destination, ttl, mac, wanted) in [
        ("127.0.0.1", 255, bfd::MANAGEMENT_MAC, true),
        ("127.9.9.9", 255, bfd::MANAGEMENT_MAC, true),
        ("own", 255, bfd::MANAGEMENT_MAC, true),
        ("127.0.0.1", 255, own_mac, true),
        ("127.0.0.1", 254, bfd::MANAGEMENT_MAC, false),
        ("127.0.0.1", 255, [2, 0, 0, 0, 0, 99], false),
        ("127.0.0.1", 255, [0xff; 6], false),
        // a tenant's
        ("10.42.1.5", 255, bfd::MANAGEMENT_MAC, false),
        ("10.42.2.5", 255, bfd::MANAGEMENT_MAC, false),
    ] {
        assert_eq!(taken(&mut a, to(destination, ttl, mac)), wanted, "{destination} {ttl} {mac:?}");
    }
}

/// The cost of a node in a mesh of a thousand: a constant.
#[test]
fn a_thousand_peers_without_traffic_cost_what_the_neighbours_cost() {
    let tables = crate::engine::testing::big_mesh(1_000);
    let mut a = Node::new(watched(&tables));
    (0..6).for_each(|n| a.tables.liveness(PeerIndex(n * 100)).unwrap().set_neighbour(true));
    let sent: usize = (1_000..11_000).map(|ms| a.turn(ms * 1000).len()).sum();
    assert!((54..=84).contains(&sent), "six a second or a little more often, and not a thousand: {sent}");
    a.tables.peer(PeerIndex(7)).unwrap().spec.stats.worker(0).unwrap().tx_packets.add(1);
    let more: usize = (11_000..21_000).map(|ms| a.turn(ms * 1000).len()).sum();
    assert!(more > sent, "and the one with traffic");
    assert!(a.vigil.running.len() == 7);
}
