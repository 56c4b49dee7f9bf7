use std::net::{IpAddr, SocketAddr};

use zerocopy::IntoBytes;

use super::lane::HELD_PACKETS;
use super::limit::PER_SOURCE;
use super::*;
use crate::engine::coalesce::Accepts;
use crate::engine::inbound::{Inbound, Received};
use crate::engine::outbound::{HEADROOM, Outbound, Sent};
use crate::engine::stats::Stats;
use crate::engine::tables::Tables;
use crate::engine::testing::{self, assert_conserved, drops, payload};
use crate::engine::tx_batch::Piece;
use crate::wire::vnet_hdr::{self, VnetHdr};

mod timers;

/// A node with one worker, and the keys that it knows of its peers.
struct Node {
    number: u8,
    tables: Tables,
    stats: Stats,
    outbound: Outbound,
    inbound: Inbound,
}

/// A datagram on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 9, 0, number], 8472))
}

/// How node `a` treats its peers.
struct Setup {
    lanes: usize,
    policy: Option<Policy>,
}

const ENCRYPTED: Setup = Setup { lanes: 1, policy: Some(Policy::Required) };

impl Node {
    fn new(number: u8, setup: &Setup) -> Self {
        let tables = match setup.policy {
            Some(policy) => testing::encrypted_mesh(number, setup.lanes, policy),
            None => testing::mesh(number),
        };
        let stats = Stats::new(1);
        let outbound = Outbound::new(stats.clone(), 0, 8);
        let inbound = Inbound::new(stats.clone(), 0, Accepts { tso: true, uso: true }).with_data_socket(8);
        Node { number, tables, stats, outbound, inbound }
    }

    fn tunnel(&self, of: u8) -> &Tunnel {
        let peer = self.tables.peers().iter().find(|peer| peer.spec.name.as_str() == format!("n{of}")).unwrap();
        peer.spec.tunnel.as_deref().unwrap()
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        drops(&self.stats)
    }

    /// Sends one packet or super-packet, and returns what leaves.
    fn send(&mut self, now_ms: u64, vnet: VnetHdr, packet: &[u8]) -> Vec<Datagram> {
        let mut arena = vec![0; HEADROOM];
        arena.extend(vnet.as_bytes());
        arena.extend(packet);
        let len = arena.len() - HEADROOM;
        self.outbound.push(&self.tables, now_ms, &mut arena, HEADROOM, len);
        self.flush(&arena)
    }

    fn flush(&mut self, arena: &[u8]) -> Vec<Datagram> {
        let from = address(self.number);
        let mut sent = Vec::new();
        let batch = self.outbound.batch();
        for run in batch.runs() {
            // the data port, or one of the pool
            let from = if run.key.socket == 8 { from } else { SocketAddr::new(from.ip(), 40_000 + run.key.socket) };
            for pieces in run.datagrams() {
                let bytes = pieces.iter().flat_map(|piece: &Piece| piece.of(arena, batch.slab()).to_vec()).collect();
                sent.push(Datagram { from, to: run.endpoint, bytes });
            }
            self.outbound.sent(&self.tables, run, Sent::All);
        }
        self.outbound.clear();
        assert_conserved(&self.stats);
        sent
    }

    /// Takes datagrams; returns the packets for the device and what is answered.
    fn take(&mut self, now_ms: u64, datagrams: &[Datagram]) -> (Vec<Vec<u8>>, Vec<Datagram>) {
        let mut arena = Vec::new();
        for Datagram { from, bytes, .. } in datagrams {
            let (at, len) = (arena.len(), bytes.len());
            arena.extend(bytes);
            let received = Received { at, len, segment_len: None, source: *from, tos: 0, truncated: false };
            self.inbound.push(&self.tables, now_ms, &mut arena, received);
        }
        self.inbound.finish(&mut arena);
        let mut packets = Vec::new();
        for unit in self.inbound.units() {
            let bytes: Vec<u8> =
                unit.pieces().iter().flat_map(|piece| piece.of(&arena, self.inbound.slab()).to_vec()).collect();
            packets.push(bytes[vnet_hdr::HEADER_LEN..].to_vec());
            self.inbound.written(unit, true);
        }
        self.inbound.clear();
        self.outbound.post(self.inbound.outbox());
        (packets, self.flush(&[]))
    }

    fn tick(&mut self, now_ms: u64) -> Vec<Datagram> {
        for (index, peer) in (0..).zip(self.tables.peers()) {
            let tunnel = peer.spec.tunnel.as_ref().unwrap();
            tunnel.tick(PeerIndex(index), now_ms, 8, self.inbound.outbox());
        }
        self.outbound.post(self.inbound.outbox());
        self.flush(&[])
    }
}

/// Two nodes, numbers 1 and 2, and a network without loss.
struct Pair(Node, Node);

impl Pair {
    fn new(setup: &Setup) -> Self {
        Pair(Node::new(1, setup), Node::new(2, setup))
    }

    /// Carries datagrams to and fro until nobody has anything to say. Returns what nodes 1 and 2 hand to their devices.
    fn carry(&mut self, now_ms: u64, datagrams: Vec<Datagram>) -> [Vec<Vec<u8>>; 2] {
        let mut delivered = [Vec::new(), Vec::new()];
        let mut under_way = datagrams;
        while !under_way.is_empty() {
            let mut answers = Vec::new();
            for (node, delivered) in [&mut self.0, &mut self.1].into_iter().zip(&mut delivered) {
                let ours: Vec<_> = under_way
                    .iter()
                    .filter(|datagram| datagram.to.ip() == address(node.number).ip())
                    .cloned()
                    .collect();
                let (packets, more) = node.take(now_ms, &ours);
                delivered.extend(packets);
                answers.extend(more);
            }
            under_way = answers;
        }
        delivered
    }

    /// A session between the two.
    fn connected(setup: &Setup) -> Self {
        let mut pair = Pair::new(setup);
        let first = udp(1, 2, 100);
        let sent = pair.0.send(0, VnetHdr::default(), &first);
        assert_eq!(pair.carry(0, sent)[1], [first]);
        pair
    }
}

fn udp(from: u8, to: u8, len: usize) -> Vec<u8> {
    testing::udp(false, from, to, payload(len)).bytes()
}

#[test]
fn the_first_packet_waits_for_the_handshake_and_arrives() {
    let mut pair = Pair::new(&ENCRYPTED);
    let packet = udp(1, 2, 100);
    let sent = pair.0.send(0, VnetHdr::default(), &packet);
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].bytes[0], sent[0].bytes.len()), (1, 148), "an initiation, and nothing in clear");
    assert_eq!(pair.carry(0, sent)[1], std::slice::from_ref(&packet));
    assert!(pair.0.tunnel(2).is_up(0) && pair.1.tunnel(1).is_up(0));
    let back = udp(2, 1, 50);
    let sent = pair.1.send(0, VnetHdr::default(), &back);
    assert_eq!((sent[0].bytes[0], sent[0].bytes.len()), (4, back.len() + OVERHEAD));
    assert_eq!(sent[0].from, address(2), "from the data port");
    assert_eq!(pair.carry(0, sent)[0], [back]);
    assert_eq!((pair.0.drops(), pair.1.drops()), (vec![], vec![]));
}

#[test]
fn a_super_packet_is_sealed_segment_by_segment_and_joined_again() {
    for lanes in [1, 2] {
        let setup = Setup { lanes, ..ENCRYPTED };
        let mut pair = Pair::connected(&setup);
        let facts = testing::tcp(false, 1, 2, payload(20_000));
        for round in 0..3 {
            let sent = pair.0.send(0, facts.gso(1000), &facts.bytes());
            let sealed = sent.iter().filter(|datagram| datagram.bytes[0] == 4).count();
            assert_eq!(sealed, 20, "lanes {lanes}, round {round}");
            let got = pair.carry(0, sent);
            assert_eq!(got[1].len(), 1, "one super-packet");
            assert_eq!(got[1][0].len(), facts.bytes().len());
            let tick = pair.0.tick(0); // later lanes get their sessions
            pair.carry(0, tick);
        }
    }
}

#[test]
fn flows_spread_over_lanes_that_have_ports_of_their_own() {
    let mut pair = Pair::connected(&Setup { lanes: 2, ..ENCRYPTED });
    let mut sources = std::collections::BTreeSet::new();
    for round in 0..3 {
        for port in 0..32u16 {
            let mut packet = testing::udp(false, 1, 2, payload(64));
            packet.ports.0 = 1000 + port;
            let packet = packet.bytes();
            let sent = pair.0.send(round * 1000, VnetHdr::default(), &packet);
            sources.extend(sent.iter().filter(|datagram| datagram.bytes[0] == 4).map(|datagram| datagram.from.port()));
            assert_eq!(pair.carry(round * 1000, sent)[1], [packet]);
        }
        let tick = pair.0.tick(round * 1000);
        pair.carry(round * 1000, tick);
    }
    assert_eq!(sources.len(), 2, "{sources:?}");
    assert!(sources.contains(&8472));
    assert_eq!(pair.0.tunnel(2).facts().lanes_up, 2);
}

#[test]
fn what_is_replayed_forged_or_foreign_is_dropped_by_name() {
    let mut pair = Pair::connected(&ENCRYPTED);
    let packet = udp(1, 2, 100);
    let sent = pair.0.send(0, VnetHdr::default(), &packet);
    assert_eq!(pair.1.take(0, &sent).0, std::slice::from_ref(&packet));
    assert_eq!(pair.1.take(0, &sent).0.len(), 0, "again");
    let mut forged = pair.0.send(0, VnetHdr::default(), &packet);
    forged[0].bytes[40] ^= 1;
    assert_eq!(pair.1.take(0, &forged).0.len(), 0);
    let mut foreign = forged.clone();
    foreign[0].bytes[4..8].fill(0x77);
    assert_eq!(pair.1.take(0, &foreign).0.len(), 0);
    let garbage: Vec<_> = [1u8, 2, 3, 4]
        .into_iter()
        .flat_map(|kind| [4usize, 5, 20, 64, 92, 148, 1400].map(|len| (kind, len)))
        .map(|(kind, len)| {
            let mut bytes = vec![0xa5; len];
            bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            Datagram { from: address(1), to: address(2), bytes }
        })
        .collect();
    let (packets, answers) = pair.1.take(0, &garbage);
    assert_eq!((packets.len(), answers.len()), (0, 0), "and nothing is answered");
    let counted: Vec<_> = pair.1.drops();
    for name in [
        "wireguard_replayed",
        "wireguard_not_authentic",
        "wireguard_unknown_session",
        "wireguard_malformed",
        "handshake_refused",
    ] {
        assert!(counted.iter().any(|(reason, _)| *reason == name), "{name} in {counted:?}");
    }
    let sent = pair.0.send(0, VnetHdr::default(), &packet);
    assert_eq!(pair.1.take(0, &sent).0, [packet], "the next good one passes");
}

#[test]
fn a_replayed_initiation_resets_nothing() {
    let mut pair = Pair::new(&ENCRYPTED);
    let packet = udp(1, 2, 100);
    let initiation = pair.0.send(0, VnetHdr::default(), &packet);
    pair.carry(0, initiation.clone());
    assert!(pair.1.tunnel(1).is_up(0));
    let (_, answers) = pair.1.take(5_000, &initiation);
    assert!(answers.is_empty());
    assert_eq!(pair.1.drops(), [("handshake_replayed", 1)]);
    let sent = pair.0.send(0, VnetHdr::default(), &packet);
    assert_eq!(pair.carry(0, sent)[1], [packet]);
}

#[test]
fn clear_and_encrypted_do_not_mix() {
    let mut pair = Pair::connected(&ENCRYPTED);
    let packet = udp(1, 2, 100);
    let clear = Datagram { from: address(1), to: address(2), bytes: testing::encapsulate(1, 2, &packet) };
    assert_eq!(pair.1.take(0, std::slice::from_ref(&clear)).0.len(), 0);
    assert_eq!(pair.1.drops(), [("clear_from_encrypted_peer", 1)]);
    let mut open = Node::new(2, &Setup { lanes: 1, policy: None });
    assert_eq!(open.take(0, &[clear]).0, [packet], "a peer without a tunnel may");
}

#[test]
fn an_inner_source_that_is_another_peers_is_refused() {
    let mut pair = Pair::connected(&ENCRYPTED);
    // node 1 seals for node 2 a packet that claims to come from node 3
    let packet = testing::udp(false, 3, 2, payload(10)).bytes();
    let tunnel = pair.0.tunnel(2);
    let mut bytes = Vec::new();
    tunnel.lane(PeerIndex(0), 0).seal(&packet, &mut bytes).unwrap();
    let forged = Datagram { from: address(1), to: address(2), bytes };
    assert_eq!(pair.1.take(0, &[forged]).0.len(), 0);
    assert_eq!(pair.1.drops(), [("inner_source_not_allowed", 1)]);
}

#[test]
fn a_peer_moves_only_by_what_it_has_authenticated() {
    let mut pair = Pair::connected(&ENCRYPTED);
    let elsewhere: SocketAddr = "192.0.2.9:1234".parse().unwrap();
    let packet = udp(1, 2, 100);
    let mut forged = pair.0.send(0, VnetHdr::default(), &packet);
    forged[0].from = elsewhere;
    let good = forged.clone();
    forged[0].bytes[30] ^= 1;
    pair.1.take(0, &forged);
    assert_eq!(pair.1.tunnel(1).endpoint(), address(1));
    assert_eq!(pair.1.take(0, &good).0, [packet]);
    assert_eq!(pair.1.tunnel(1).endpoint(), elsewhere);
    pair.1.take(0, &good);
    assert_eq!(pair.1.drops(), [("wireguard_not_authentic", 1), ("wireguard_replayed", 1)]);
    let answer = pair.1.send(0, VnetHdr::default(), &udp(2, 1, 9));
    assert_eq!(answer[0].to, elsewhere);
}

#[test]
fn a_restarted_node_is_heard_at_once() {
    let mut pair = Pair::connected(&ENCRYPTED);
    pair.1 = Node::new(2, &ENCRYPTED);
    let packet = udp(1, 2, 100);
    // node 1 still has its session; node 2 cannot read this, and says so by a handshake of its own
    let lost = pair.0.send(10_000, VnetHdr::default(), &packet);
    assert_eq!(pair.carry(10_000, lost)[1].len(), 0);
    assert_eq!(pair.1.drops(), [("wireguard_unknown_session", 1)]);
    let tick = pair.1.tick(10_050);
    pair.carry(10_050, tick);
    let sent = pair.0.send(10_100, VnetHdr::default(), &packet);
    assert_eq!(pair.carry(10_100, sent)[1], [packet]);
}

#[test]
fn a_peer_that_does_not_answer_is_asked_each_second_while_something_waits() {
    let mut node = Node::new(1, &ENCRYPTED);
    let packet = udp(1, 2, 100);
    let first = node.send(0, VnetHdr::default(), &packet);
    assert_eq!(first.len(), 1);
    assert_eq!(node.send(10, VnetHdr::default(), &packet).len(), 0, "one is under way");
    let mut asked = Vec::new();
    for now in (50..=8_000).step_by(50) {
        let to_two = node.tick(now).into_iter().filter(|datagram| datagram.to == address(2)).count();
        if to_two > 0 {
            asked.push(now);
        }
    }
    assert!(asked.len() >= 4 && asked[0] >= 1_000, "{asked:?}");
    assert!(asked.windows(2).all(|pair| pair[1] - pair[0] >= 1_000), "{asked:?}");
    assert_eq!(node.drops(), [("no_session", 2)], "what waited five seconds is discarded, and counted");
}

#[test]
fn not_more_waits_than_there_is_room_for() {
    let mut node = Node::new(1, &ENCRYPTED);
    let packet = udp(1, 2, 1000);
    for _ in 0..200 {
        node.send(0, VnetHdr::default(), &packet);
    }
    let held = node.tunnel(2).facts().held;
    assert!(held > 50 && held <= HELD_PACKETS, "{held}");
    assert_eq!(node.drops(), [("no_session", 200 - held as u64)]);
    let tcp = testing::tcp(false, 1, 3, payload(60_000));
    assert!(node.send(0, tcp.gso(1000), &tcp.bytes()).len() == 1, "a whole window waits as well");
    assert_eq!(node.tunnel(3).facts().held, 60);
}

#[test]
fn a_dead_peer_that_nobody_talks_to_is_asked_ever_more_rarely() {
    let mut node = Node::new(1, &ENCRYPTED);
    let mut asked = 0;
    for now in (0..600_000).step_by(100) {
        asked += node.tick(now).into_iter().filter(|datagram| datagram.to == address(2)).count();
    }
    assert!((8..=22).contains(&asked), "{asked} initiations in ten minutes");
}

#[test]
fn a_clear_peer_becomes_encrypted_without_a_loss() {
    let clear = Setup { lanes: 1, policy: Some(Policy::Willing) };
    let mut pair = Pair::new(&clear);
    let packet = udp(1, 2, 100);
    let exchange = |pair: &mut Pair, now| {
        let sent = pair.0.send(now, VnetHdr::default(), &packet);
        let kind = sent[0].bytes[0];
        assert_eq!(pair.carry(now, sent)[1], std::slice::from_ref(&packet), "at {now}");
        let back = udp(2, 1, 30);
        let sent = pair.1.send(now, VnetHdr::default(), &back);
        assert_eq!(pair.carry(now, sent)[0], [back], "at {now}");
        kind
    };
    assert_eq!(exchange(&mut pair, 0), 8);
    // node 1 learns first that node 2 is to be encrypted
    pair.0.tunnel(2).set_policy(Policy::Migrating);
    assert_eq!(exchange(&mut pair, 10), 8, "no handshake yet");
    let tick = pair.0.tick(50);
    pair.carry(50, tick);
    assert_eq!(exchange(&mut pair, 60), 4);
    for now in (100..1_400).step_by(50) {
        let tick = pair.0.tick(now);
        pair.carry(now, tick);
        assert_eq!(exchange(&mut pair, now), 4);
    }
    assert_eq!(pair.0.tunnel(2).policy(), Policy::Required, "there is no way back");
    let clear = Datagram { from: address(2), to: address(1), bytes: testing::encapsulate(2, 1, &udp(2, 1, 3)) };
    pair.0.take(1_500, &[clear]);
    assert_eq!(pair.0.drops(), [("clear_from_encrypted_peer", 1)]);
    assert_eq!(pair.1.drops(), []);
}

#[test]
fn a_peer_that_cannot_be_migrated_is_not_reached_in_clear_for_ever() {
    let mut node = Node::new(1, &Setup { lanes: 1, policy: Some(Policy::Migrating) });
    let packet = udp(1, 2, 100);
    node.tick(0);
    assert_eq!(node.send(100, VnetHdr::default(), &packet)[0].bytes[0], 8);
    for now in (0..31_000).step_by(500) {
        node.tick(now);
    }
    let sent = node.send(31_100, VnetHdr::default(), &packet);
    assert!(sent.iter().all(|datagram| datagram.bytes[0] == 1), "{sent:?}");
}

#[test]
fn a_flood_of_initiations_is_answered_with_cookies_and_a_real_peer_gets_through() {
    let mut pair = Pair::new(&ENCRYPTED);
    let attacker = Node::new(4, &ENCRYPTED);
    let mut cookies = 0;
    for n in 0..2_000u16 {
        // valid for node 2's key, from addresses that are not the sender's
        let mut outbox = Outbox::default();
        attacker.tunnel(2).lane(PeerIndex(0), 0).start(u64::from(n) * 100_000, 8, &mut outbox);
        let Some((_, bytes)) = outbox.letters().next() else { panic!("no initiation") };
        let from = SocketAddr::from(([192, 168, (n >> 8) as u8, n as u8], 9));
        let (_, answers) = pair.1.take(1_000, &[Datagram { from, to: address(2), bytes: bytes.to_vec() }]);
        cookies += answers.iter().filter(|datagram| datagram.bytes[0] == 3).count();
    }
    assert!(cookies > 1_500, "{cookies}");
    // the real one is asked for a cookie first, and answers with it
    let packet = udp(1, 2, 100);
    let sent = pair.0.send(1_000, VnetHdr::default(), &packet);
    assert_eq!(pair.carry(1_000, sent)[1].len(), 0);
    let again = pair.0.tick(2_500);
    let again: Vec<_> = again.into_iter().filter(|datagram| datagram.to == address(2)).collect();
    assert_eq!(pair.carry(2_500, again)[1], [packet]);
}

#[test]
fn garbage_in_the_name_of_a_peer_does_not_keep_it_from_a_handshake() {
    let mut pair = Pair::new(&ENCRYPTED);
    let mut garbage = vec![7; 148];
    garbage[..4].copy_from_slice(&[1, 0, 0, 0]);
    for _ in 0..1_000 {
        pair.1.take(1_000, &[Datagram { from: address(1), to: address(2), bytes: garbage.clone() }]);
    }
    let packet = udp(1, 2, 100);
    let sent = pair.0.send(1_000, VnetHdr::default(), &packet);
    assert_eq!(pair.carry(1_000, sent)[1], [packet]);
    assert_eq!(pair.1.drops(), [("handshake_refused", 1_000)]);
}

#[test]
fn an_initiation_of_before_our_restart_moves_nobody() {
    let mut pair = Pair::new(&ENCRYPTED);
    let sent = pair.0.send(0, VnetHdr::default(), &udp(1, 2, 100));
    let old = sent.iter().find(|datagram| datagram.bytes[0] == 1).unwrap().bytes.clone();
    pair.carry(0, sent);
    pair.1 = Node::new(2, &ENCRYPTED);
    let elsewhere = SocketAddr::from(([203, 0, 113, 9], 9));
    let (_, answers) = pair.1.take(100, &[Datagram { from: elsewhere, to: address(2), bytes: old }]);
    assert!(answers.iter().any(|answer| answer.bytes[0] == 2 && answer.to == elsewhere), "as to anybody");
    assert_eq!(pair.1.tunnel(1).endpoint(), address(1), "but nothing else goes there");
}

#[test]
fn one_address_cannot_make_us_work_without_end() {
    let mut limit = SourceLimit::default();
    let flood: IpAddr = "192.0.2.1".parse().unwrap();
    let allowed = (0..10_000).filter(|_| limit.allows(flood, 500)).count();
    assert_eq!(allowed, usize::from(PER_SOURCE));
    assert!(limit.allows("192.0.2.2".parse().unwrap(), 500), "others are not concerned");
    assert!(limit.allows(flood, 1_500), "and in the next second it may again");
    assert!(!limit.is_spent(flood, 1_600), "cookies are another matter");
    (0..PER_SOURCE).for_each(|_| limit.cookie(flood, 1_600));
    assert!(limit.is_spent(flood, 1_600) && limit.allows(flood, 1_600));
    assert!(!limit.is_spent(flood, 2_000));
}

#[test]
fn what_is_wireguard() {
    assert!(is_wireguard(&[4, 0, 0, 0, 9]) && is_wireguard(&[1, 0, 0, 0]));
    for vxlan in [&[8u8, 0, 0, 0, 0, 0, 1, 0][..], &[4, 0, 0, 1], &[0, 0, 0, 0], &[5, 0, 0, 0], &[1, 0, 0], &[]] {
        assert!(!is_wireguard(vxlan), "{vxlan:?}");
    }
}
