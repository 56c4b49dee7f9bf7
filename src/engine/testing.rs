//! What tests and benches of the engine share: packets from plain facts, and a node whose two journeys run without a
//! socket and are held to account after each batch.
//!
//! Nothing here is used by meshd itself. Checksums are computed a word at a time as RFC 1071 defines them, and segments
//! are built one by one from facts, so that neither is the code under test.

#![allow(missing_docs, clippy::indexing_slicing, clippy::unwrap_used, clippy::panic)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use zerocopy::{FromBytes, IntoBytes};

use super::big_tcp::BigTcp;
use super::coalesce::Accepts;
use super::drop::{Direction, Drop};
use super::inbound::{Inbound, Received};
use super::outbound::{CutBehind, HEADROOM, Outbound, Sent};
use super::stats::{PeerStats, Stats};
use super::tables::{ENCAPSULATION, Local, Peer, PeerSpec, Tables};
use super::tunnel::{Identity, Outbox, Policy, Tunnel};
use super::tx_batch::{MAX_BYTES, MAX_PARTS, MAX_SEGMENTS, Piece, Uncut};
use crate::health::machine::Timers;
use crate::health::peer::{Liveness, Settings};
use crate::key::SecretKey;
use crate::node::{Mac, NodeName, Vni};
use crate::wire::transport::flags;
use crate::wire::vnet_hdr::{self, VnetHdr};

/// The path MTU to each peer of [`mesh`].
pub const MTU: u16 = 1450;
/// A device that takes everything.
pub const ALL: Accepts = Accepts { tso: true, uso: true };
/// The don't-fragment flag.
pub const DF: u16 = 0x4000;

/// Node `own` of a mesh of nodes 1 to 4: node n has the underlay addresses 10.9.0.n and fd09::n, the subnets 10.42.n.0/24
/// and fd42:0:0:n::/64, of which the addresses [`itself`] are its own, and the MAC 02:00:00:00:00:0n.
pub fn mesh(own: u8) -> Tables {
    mesh_with_mtu(own, MTU)
}

/// The same with another path MTU.
pub fn mesh_with_mtu(own: u8, mtu: u16) -> Tables {
    let underlay = |n: u8| vec![IpAddr::from([10, 9, 0, n]), IpAddr::V6(Ipv6Addr::from(0xfd09 << 112 | u128::from(n)))];
    let v6 = |n: u8| Ipv6Addr::from(0xfd42 << 112 | u128::from(n) << 64);
    let subnets = |n: u8| {
        let nets: [IpNet; 2] =
            [Ipv4Net::new_assert(Ipv4Addr::new(10, 42, n, 0), 24).into(), Ipv6Net::new_assert(v6(n), 64).into()];
        nets.to_vec()
    };
    let mac = |n: u8| Mac([2, 0, 0, 0, 0, n]);
    let local = Local {
        mac: mac(own),
        vni: Vni::DEFAULT,
        subnets: subnets(own),
        addresses: underlay(own).into_iter().chain([false, true].map(|v6| itself(v6, own))).collect(),
        mtu,
        identity: None,
        former_identity: None,
        bfd_keys: None,
    };
    let spec = |n: u8| PeerSpec {
        name: format!("n{n}").parse().unwrap(),
        endpoint: SocketAddr::new(underlay(n)[0], 8472),
        underlay: underlay(n),
        mac: mac(n),
        subnets: subnets(n),
        mtu,
        stats: Arc::new(PeerStats::new(1)),
        tunnel: None,
        former: None,
        liveness: None,
    };
    Tables::new(local, (1..=4).filter(|n| *n != own).map(spec).collect())
}

/// The address of node `n` of [`mesh`] itself in its subnet; the others there are its pods'.
pub fn itself(v6: bool, n: u8) -> IpAddr {
    match v6 {
        true => IpAddr::V6(Ipv6Addr::from(0xfd42 << 112 | u128::from(n) << 64 | 254)),
        false => IpAddr::from([10, 42, n, 254]),
    }
}

/// The secret key of node `n` of [`encrypted_mesh`]: 32 times its number.
pub fn secret(n: u8) -> SecretKey {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode([n; 32]).parse().unwrap()
}

/// [`mesh`] where each node has so many lanes with each other.
pub fn encrypted_mesh(own: u8, lanes: usize, policy: Policy) -> Tables {
    let clear = mesh(own);
    let identity = Arc::new(Identity::new(&secret(own), lanes));
    let peers = clear.peers().iter().map(|peer| {
        let of: u8 = peer.spec.name.as_str().trim_start_matches('n').parse().unwrap();
        let keys: Vec<_> = (0..lanes as u8).map(|lane| secret(of).lane(lane).public()).collect();
        let (slot, identity) = (u32::from(of), identity.clone());
        let tunnel = Some(Arc::new(Tunnel::new(slot, identity, &keys, peer.spec.endpoint, None, policy)));
        PeerSpec { tunnel, ..peer.spec.clone() }
    });
    let peers = peers.collect();
    Tables::new(Local { identity: Some(identity.clone()), ..clear.local().clone() }, peers)
}

/// The same peers, whose lives are watched.
pub fn watched(tables: &Tables) -> Tables {
    let timers = Timers { interval_us: 150_000, multiplier: 6 };
    let settings = Settings { enabled: true, timers, vni: Vni::MANAGEMENT.get(), epoch: 0 };
    let spec = |(peer, number): (&Peer, u32)| {
        let liveness = Some(Arc::new(Liveness::new(settings, number)));
        PeerSpec { liveness, ..peer.spec.clone() }
    };
    Tables::new(tables.local().clone(), tables.peers().iter().zip(100..).map(spec).collect())
}

/// Sessions on all lanes between two nodes of [`encrypted_mesh`].
pub fn connect(a: &Tables, b: &Tables) {
    let ends = [a, b].map(|tables| (tables, Inbound::new(Stats::new(1), 0, ALL)));
    let index = |tables: &Tables, ip| tables.source(ip).unwrap();
    let ip = |tables: &Tables| tables.local().addresses[0];
    let (peer, mut outbox) = (index(a, ip(b)), Outbox::default());
    let lanes = a.tunnel(peer).unwrap().facts().lanes;
    (0..lanes).for_each(|lane| a.tunnel(peer).unwrap().lane(peer, lane).start(0, 1, &mut outbox));
    let mut under_way: Vec<Vec<u8>> = outbox.letters().map(|(_, bytes)| bytes.to_vec()).collect();
    let [mut a, mut b] = ends;
    while !under_way.is_empty() {
        std::mem::swap(&mut a, &mut b);
        let ((tables, inbound), source) = (&mut a, SocketAddr::new(ip(b.0), 8472));
        for mut bytes in under_way {
            let received = Received { at: 0, len: bytes.len(), segment_len: None, source, tos: 0, truncated: false };
            inbound.push(tables, 0, &mut bytes, received);
        }
        under_way = inbound.outbox().letters().map(|(_, bytes)| bytes.to_vec()).collect();
        inbound.outbox().clear();
    }
}

/// Peer `index` of [`big_mesh`]: its underlay address and the first address of its subnet.
pub fn big_peer(index: usize) -> (Ipv4Addr, Ipv4Addr) {
    let index = index as u32;
    (Ipv4Addr::from(0xac10_0000 + index), Ipv4Addr::from(0x0a00_0000 + index * 64 + 1))
}

/// The specification of that peer.
pub fn big_peer_spec(index: usize) -> PeerSpec {
    let (underlay, inner) = big_peer(index);
    let name: NodeName = format!("peer-{index}").parse().unwrap();
    let v6 = Ipv6Addr::from(0xfd42 << 112 | (index as u128) << 64);
    PeerSpec {
        mac: name.derived_mac(),
        name,
        endpoint: SocketAddr::new(underlay.into(), 8472),
        underlay: vec![underlay.into()],
        subnets: vec![Ipv4Net::new_assert(inner, 26).trunc().into(), Ipv6Net::new_assert(v6, 64).into()],
        mtu: MTU,
        stats: Arc::new(PeerStats::new(1)),
        tunnel: None,
        former: None,
        liveness: None,
    }
}

/// A node of a big mesh, peer 0 of it, with `peers` others.
pub fn big_mesh(peers: usize) -> Tables {
    let own = big_peer_spec(0);
    let local = Local {
        mac: own.mac,
        vni: Vni::DEFAULT,
        subnets: own.subnets,
        addresses: own.underlay,
        mtu: MTU,
        identity: None,
        former_identity: None,
        bfd_keys: None,
    };
    Tables::new(local, (1..=peers).map(big_peer_spec).collect())
}

/// What is to be in a transport checksum field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// The right checksum.
    Right,
    /// The folded pseudo-header sum: a packet whose checksum was never computed.
    Pseudo,
    /// This, whatever is right.
    Field([u8; 2]),
    /// One bit of the right one is wrong.
    Corrupt,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    Tcp {
        sequence: u32,
        acknowledgement: u32,
        flags: u8,
        window: u16,
        urgent: u16,
        options: Vec<u8>,
    },
    Udp,
    /// Any other protocol: only its payload.
    Other(u8),
}

/// The facts that one packet consists of.
#[derive(Debug, Clone)]
pub struct Facts {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ports: (u16, u16),
    pub tos: u8,
    pub ttl: u8,
    /// IPv4 only.
    pub id: u16,
    /// IPv4 only: flags and fragment offset.
    pub flags_offset: u16,
    /// IPv4 only, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 only.
    pub flow_label: u32,
    /// IPv6 only: kind and the bytes behind the "next header" byte, to a multiple of eight with it.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub transport: Transport,
    pub check: Check,
    pub payload: Vec<u8>,
}

/// A TCP packet with timestamps from host 1 of node `from` to host 1 of node `to`.
pub fn tcp(v6: bool, from: u8, to: u8, payload: Vec<u8>) -> Facts {
    let options = b"\x01\x01\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x02".to_vec();
    let (sequence, acknowledgement, window) = (1000, 77, 502);
    let transport = Transport::Tcp { sequence, acknowledgement, flags: flags::ACK, window, urgent: 0, options };
    Facts { transport, ..udp(v6, from, to, payload) }
}

/// A UDP datagram between the same.
pub fn udp(v6: bool, from: u8, to: u8, payload: Vec<u8>) -> Facts {
    let host = |n: u8| match v6 {
        true => IpAddr::V6(Ipv6Addr::from(0xfd42 << 112 | u128::from(n) << 64 | 1)),
        false => IpAddr::from([10, 42, n, 1]),
    };
    Facts {
        source: host(from),
        destination: host(to),
        ports: (40_000, 5201),
        tos: 0,
        ttl: 64,
        id: 100,
        flags_offset: DF,
        options: Vec::new(),
        flow_label: 0x1_2345,
        extensions: Vec::new(),
        transport: Transport::Udp,
        check: Check::Right,
        payload,
    }
}

/// Bytes that differ from place to place.
pub fn payload(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 21) as u8).collect()
}

/// The Internet checksum before it is complemented (RFC 1071), a word at a time.
pub fn slow_sum<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    sum as u16
}

impl Facts {
    pub fn is_v6(&self) -> bool {
        self.source.is_ipv6()
    }

    pub fn protocol(&self) -> u8 {
        match self.transport {
            Transport::Tcp { .. } => 6,
            Transport::Udp => 17,
            Transport::Other(protocol) => protocol,
        }
    }

    /// Bytes of the IP header with options or extension headers.
    pub fn ip_len(&self) -> usize {
        match self.is_v6() {
            true => 40 + self.extensions.iter().map(|(_, body)| 1 + body.len()).sum::<usize>(),
            false => 20 + self.options.len(),
        }
    }

    /// Bytes of all headers.
    pub fn header_len(&self) -> usize {
        self.ip_len()
            + match &self.transport {
                Transport::Tcp { options, .. } => 20 + options.len(),
                Transport::Udp => 8,
                Transport::Other(_) => 0,
            }
    }

    /// Sets TCP flags.
    pub fn with_flags(mut self, new: u8) -> Facts {
        if let Transport::Tcp { flags, .. } = &mut self.transport {
            *flags = new;
        }
        self
    }

    /// Sets the TCP sequence number.
    pub fn with_sequence(mut self, new: u32) -> Facts {
        if let Transport::Tcp { sequence, .. } = &mut self.transport {
            *sequence = new;
        }
        self
    }

    /// The packet.
    pub fn bytes(&self) -> Vec<u8> {
        let body = self.transport_bytes();
        let mut out = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total = u16::try_from(self.ip_len() + body.len()).unwrap_or(0);
                out.extend([0x40 | (self.ip_len() / 4) as u8, self.tos]);
                out.extend(total.to_be_bytes());
                out.extend(self.id.to_be_bytes());
                out.extend(self.flags_offset.to_be_bytes());
                out.extend([self.ttl, self.protocol(), 0, 0]);
                out.extend(source.octets());
                out.extend(destination.octets());
                out.extend(&self.options);
                let check = !slow_sum([&out[..]]);
                out[10..12].copy_from_slice(&check.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let word = 6 << 28 | u32::from(self.tos) << 20 | self.flow_label;
                out.extend(word.to_be_bytes());
                out.extend(((self.ip_len() - 40 + body.len()) as u16).to_be_bytes());
                let mut kinds: Vec<u8> = self.extensions.iter().map(|(kind, _)| *kind).collect();
                kinds.push(self.protocol());
                out.extend([kinds[0], self.ttl]);
                out.extend(source.octets());
                out.extend(destination.octets());
                for ((_, body), next) in self.extensions.iter().zip(&kinds[1..]) {
                    out.push(*next);
                    out.extend(body);
                }
            }
            _ => panic!("addresses of two families"),
        }
        out.extend(body);
        out
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let at = match &self.transport {
            Transport::Other(_) => return self.payload.clone(),
            Transport::Tcp { sequence, acknowledgement, flags, window, urgent, options } => {
                out.extend(self.ports.0.to_be_bytes());
                out.extend(self.ports.1.to_be_bytes());
                out.extend(sequence.to_be_bytes());
                out.extend(acknowledgement.to_be_bytes());
                out.extend([(((20 + options.len()) / 4) << 4) as u8, *flags]);
                out.extend(window.to_be_bytes());
                out.extend([0, 0]);
                out.extend(urgent.to_be_bytes());
                out.extend(options);
                16
            }
            Transport::Udp => {
                out.extend(self.ports.0.to_be_bytes());
                out.extend(self.ports.1.to_be_bytes());
                out.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                out.extend([0, 0]);
                6
            }
        };
        out.extend(&self.payload);
        let pseudo = self.pseudo_header(out.len());
        let right = match !slow_sum([&pseudo[..], &out]) {
            0 if self.transport == Transport::Udp => 0xffff,
            check => check,
        };
        let field = match self.check {
            Check::Right => right.to_be_bytes(),
            Check::Pseudo => slow_sum([&pseudo[..]]).to_be_bytes(),
            Check::Field(field) => field,
            Check::Corrupt => (right ^ 0x0100).to_be_bytes(),
        };
        out[at..at + 2].copy_from_slice(&field);
        out
    }

    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for ip in [self.source, self.destination] {
            match ip {
                IpAddr::V4(ip) => out.extend(ip.octets()),
                IpAddr::V6(ip) => out.extend(ip.octets()),
            }
        }
        out.extend((length as u32).to_be_bytes());
        out.extend([0, 0, 0, self.protocol()]);
        out
    }

    /// What a kernel puts before this packet when it leaves the checksum to the device.
    pub fn needs_csum(&self) -> VnetHdr {
        let offset = if self.transport == Transport::Udp { 6 } else { 16 };
        VnetHdr::needs_csum(self.ip_len() as u16, offset)
    }

    /// What a kernel puts before a super-packet with segments of `size` payload bytes.
    pub fn gso(&self, size: u16) -> VnetHdr {
        let (kind, offset) = match (self.transport == Transport::Udp, self.is_v6()) {
            (true, _) => (vnet_hdr::GSO_UDP_L4, 6),
            (_, true) => (vnet_hdr::GSO_TCPV6, 16),
            (_, false) => (vnet_hdr::GSO_TCPV4, 16),
        };
        VnetHdr::super_packet(kind, self.header_len() as u16, size, self.ip_len() as u16, offset)
    }

    /// The segments that this super-packet stands for, each built from facts: ids count up, CWR with the first, FIN and
    /// PSH with the last.
    pub fn segments(&self, size: usize) -> Vec<Facts> {
        let count = self.payload.len().div_ceil(size).max(1);
        let chunks = self.payload.chunks(size).map(<[u8]>::to_vec);
        let chunks = chunks.chain(self.payload.is_empty().then(Vec::new));
        let segment = |(index, payload): (usize, Vec<u8>)| {
            let mut facts = Facts { payload, check: Check::Right, ..self.clone() };
            facts.id = self.id.wrapping_add(index as u16);
            if let Transport::Tcp { sequence, flags, .. } = &mut facts.transport {
                *sequence = sequence.wrapping_add((index * size) as u32);
                *flags &= !if index > 0 { flags::CWR } else { 0 };
                *flags &= !if index + 1 < count { flags::FIN | flags::PSH } else { 0 };
            }
            facts
        };
        chunks.enumerate().map(segment).collect()
    }
}

/// The bytes of each.
pub fn bytes_of(facts: &[Facts]) -> Vec<Vec<u8>> {
    facts.iter().map(Facts::bytes).collect()
}

/// The datagram that carries a packet between nodes of [`mesh`].
pub fn encapsulate(from: u8, to: u8, packet: &[u8]) -> Vec<u8> {
    let kind = if packet.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] };
    let mut out = vec![0x08, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from];
    out.extend(kind);
    out.extend(packet);
    out
}

/// All drops that were counted, by name.
pub fn drops(stats: &Stats) -> Vec<(&'static str, u64)> {
    let count = |reason: &Drop| (reason.name(), stats.sum(|worker| worker.drops(*reason)));
    Drop::ALL.iter().map(count).filter(|(_, n)| *n > 0).collect()
}

/// Panics unless packets in and packets made are packets out and packets dropped, in both directions.
pub fn assert_conserved(stats: &Stats) {
    let dropped = |direction| {
        let reasons = Drop::ALL.iter().filter(|reason| reason.direction() == direction);
        reasons.map(|reason| stats.sum(|worker| worker.drops(*reason))).sum::<u64>()
    };
    let came = stats.sum(|w| w.flow.tun_rx_packets.get() + w.flow.originated_outbound.get());
    let went = stats.sum(|w| w.flow.udp_tx_packets.get() + w.flow.consumed_outbound.get());
    assert_eq!(came, went + dropped(Direction::Outbound), "outbound: {:?}", drops(stats));
    let came = stats.sum(|w| w.flow.udp_rx_packets.get() + w.flow.originated_inbound.get());
    let went = stats.sum(|w| w.flow.tun_tx_packets.get() + w.flow.consumed_inbound.get());
    assert_eq!(came, went + dropped(Direction::Inbound), "inbound: {:?}", drops(stats));
}

/// The journey out of one node.
pub struct Sending {
    pub tables: Tables,
    pub stats: Stats,
    pub now_ms: u64,
    outbound: Outbound,
    arena: Vec<u8>,
    end: usize,
}

/// One send call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentRun {
    pub socket: u16,
    pub endpoint: SocketAddr,
    pub tos: u8,
    pub segment_len: u16,
    pub uncut: Option<Uncut>,
    pub datagrams: Vec<Vec<u8>>,
}

impl Sending {
    pub fn new(tables: Tables) -> Self {
        let stats = Stats::new(1);
        let outbound = Outbound::new(stats.clone(), 0, 8);
        Sending { tables, stats, now_ms: 0, outbound, arena: Vec::new(), end: 0 }
    }

    /// The same where super-packets over IPv4, or IPv6, are cut behind it.
    pub fn cut_behind(self, v4: bool, v6: bool) -> Self {
        let outbound = self.outbound.with_cut_behind(Arc::new(CutBehind { v4: v4.into(), v6: v6.into() }));
        Sending { outbound, ..self }
    }

    /// Takes a frame as the device delivers it.
    pub fn push(&mut self, vnet: VnetHdr, packet: &[u8]) {
        let at = (self.end + HEADROOM).next_multiple_of(64);
        self.end = at + vnet_hdr::HEADER_LEN + packet.len();
        self.arena.resize(self.end, 0xee);
        self.arena[at..at + vnet_hdr::HEADER_LEN].copy_from_slice(vnet.as_bytes());
        self.arena[at + vnet_hdr::HEADER_LEN..self.end].copy_from_slice(packet);
        self.outbound.push(&self.tables, self.now_ms, &mut self.arena, at, self.end - at);
    }

    /// Ends the round, as a worker does: what is sent, and what errors go back to the device. Every limit of a send call and every
    /// count is checked.
    pub fn flush(&mut self) -> (Vec<SentRun>, Vec<Vec<u8>>) {
        let goes_on = self.outbound.set_aside();
        let needs_arena = self.outbound.batch().needs_payload();
        let batch = self.outbound.batch();
        let mut sent = Vec::new();
        for run in batch.runs() {
            let bytes_of = |pieces: &[Piece]| -> Vec<u8> {
                pieces.iter().flat_map(|piece| piece.of(&self.arena, batch.slab()).to_vec()).collect()
            };
            let datagrams: Vec<Vec<u8>> = run.datagrams().map(bytes_of).collect();
            assert_eq!(datagrams.concat(), bytes_of(run.pieces()));
            let (socket, endpoint) = (run.key.socket, run.endpoint);
            if run.uncut().is_some() {
                assert_eq!((datagrams.len(), batch.has_uncut()), (1, true));
                assert!(run.pieces().len() <= MAX_PARTS);
                assert_eq!(run.bytes as usize - ENCAPSULATION * usize::from(run.segments), run.inner_bytes as usize);
                self.outbound.sent(&self.tables, run, Sent::All);
                sent.push(SentRun { socket, endpoint, tos: run.tos, segment_len: 0, uncut: run.uncut(), datagrams });
                continue;
            }
            assert_eq!(datagrams.len(), usize::from(run.segments), "{run:?}");
            assert!(datagrams.len() <= MAX_SEGMENTS);
            let bytes: usize = datagrams.iter().map(Vec::len).sum();
            assert!(bytes <= MAX_BYTES);
            assert_eq!(bytes, run.bytes as usize);
            assert_eq!(bytes - ENCAPSULATION * datagrams.len(), run.inner_bytes as usize);
            let (last, full) = datagrams.split_last().unwrap();
            assert!(full.iter().all(|datagram| datagram.len() == usize::from(run.segment_len)));
            assert!(last.len() <= usize::from(run.segment_len));
            self.outbound.sent(&self.tables, run, Sent::All);
            let segment_len = run.segment_len;
            sent.push(SentRun { socket, endpoint, tos: run.tos, segment_len, uncut: None, datagrams });
        }
        let errors: Vec<Vec<u8>> = self.outbound.errors().map(<[u8]>::to_vec).collect();
        errors.iter().for_each(|error| self.outbound.error_written(error, true));
        self.outbound.clear();
        if !needs_arena {
            self.end = 0;
            self.arena.clear(); // nothing of it is to be looked at any more
        }
        if !goes_on {
            assert_conserved(&self.stats);
        }
        (sent, errors)
    }

    /// The engine's half itself.
    pub fn outbound(&mut self) -> &mut Outbound {
        &mut self.outbound
    }

    /// Ends the batch: the inner packets that are sent, in the order of the sends.
    pub fn packets(&mut self) -> Vec<Vec<u8>> {
        let (runs, _) = self.flush();
        runs.iter().flat_map(|run| &run.datagrams).map(|datagram| datagram[ENCAPSULATION..].to_vec()).collect()
    }
}

/// The journey into one node.
pub struct Receiving {
    pub tables: Tables,
    pub stats: Stats,
    /// Whether TCP connections end at sockets of this node, if that is asked.
    pub ends_here: bool,
    inbound: Inbound,
    arena: Vec<u8>,
}

/// One received buffer.
#[derive(Debug, Clone)]
pub struct Buffer {
    pub source: IpAddr,
    pub tos: u8,
    pub segment_len: Option<u16>,
    pub truncated: bool,
    pub bytes: Vec<u8>,
}

impl Buffer {
    /// One datagram from node `from` to node `to` of [`mesh`].
    pub fn one(from: u8, to: u8, packet: &[u8]) -> Self {
        let source = IpAddr::from([10, 9, 0, from]);
        Buffer { source, tos: 0, segment_len: None, truncated: false, bytes: encapsulate(from, to, packet) }
    }

    /// Datagrams of equal length, a short last one allowed, joined as the kernel does.
    pub fn joined(from: u8, to: u8, packets: &[Vec<u8>]) -> Self {
        let datagrams: Vec<_> = packets.iter().map(|packet| encapsulate(from, to, packet)).collect();
        let segment_len = (packets.len() > 1).then(|| datagrams[0].len() as u16);
        Buffer { segment_len, bytes: datagrams.concat(), ..Buffer::one(from, to, &[]) }
    }
}

/// One write to the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    pub vnet: VnetHdr,
    pub packet: Vec<u8>,
    /// How many packets it is counted as.
    pub segments: u16,
}

impl Receiving {
    pub fn new(tables: Tables) -> Self {
        Receiving::with(tables, ALL)
    }

    pub fn with(tables: Tables, accepts: Accepts) -> Self {
        let stats = Stats::new(1);
        let inbound = Inbound::new(stats.clone(), 0, accepts).with_big_tcp(Arc::new(BigTcp::on()));
        Receiving { tables, inbound, stats, arena: Vec::new(), ends_here: true }
    }

    /// The engine's half itself.
    pub fn inbound(&mut self) -> &mut Inbound {
        &mut self.inbound
    }

    pub fn push(&mut self, buffer: &Buffer) {
        let (at, len) = (self.arena.len(), buffer.bytes.len());
        self.arena.extend(&buffer.bytes);
        let Buffer { segment_len, source, tos, truncated, .. } = *buffer;
        let source = SocketAddr::new(source, 40_000);
        let received = Received { at, len, segment_len, source, tos, truncated };
        self.inbound.push(&self.tables, 7, &mut self.arena, received);
    }

    /// Takes one packet from node 2 to node 1 as a datagram of its own.
    pub fn take(&mut self, packet: &[u8]) {
        self.push(&Buffer::one(2, 1, packet));
    }

    /// Ends the batch: what is written to the device, with every count checked.
    pub fn flush(&mut self) -> Vec<Written> {
        self.inbound.finish(&mut self.arena);
        let mut written = Vec::new();
        for unit in self.inbound.units() {
            let bytes: Vec<u8> =
                unit.pieces().iter().flat_map(|piece| piece.of(&self.arena, self.inbound.slab()).to_vec()).collect();
            let (vnet, packet) = VnetHdr::read_from_prefix(&bytes).unwrap();
            written.push(Written { vnet, packet: packet.to_vec(), segments: unit.segments });
            self.inbound.written(unit, true);
        }
        self.inbound.clear();
        self.inbound.ask(|_| self.ends_here);
        self.arena.clear();
        assert_conserved(&self.stats);
        written
    }
}

/// Panics unless an independent parser finds the packet well formed, with right checksums.
#[cfg(test)]
pub(crate) fn assert_sound(packet: &[u8]) {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    let parsed = SlicedPacket::from_ip(packet).unwrap_or_else(|error| panic!("{error}: {packet:02x?}"));
    match (&parsed.net, &parsed.transport) {
        (Some(NetSlice::Ipv4(ip)), transport) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(usize::from(header.total_len), packet.len());
            let (source, destination) = (header.source, header.destination);
            match transport {
                Some(TransportSlice::Tcp(tcp)) => {
                    assert_eq!(tcp.checksum(), tcp.calc_checksum_ipv4(source, destination).unwrap());
                }
                Some(TransportSlice::Udp(udp)) => {
                    let right = udp.to_header().calc_checksum_ipv4_raw(source, destination, udp.payload()).unwrap();
                    assert_eq!(udp.checksum(), if right == 0 { 0xffff } else { right });
                }
                _ => {}
            }
        }
        (Some(NetSlice::Ipv6(ip)), transport) => {
            let header = ip.header().to_header();
            assert_eq!(usize::from(header.payload_length) + 40, packet.len());
            let (source, destination) = (header.source, header.destination);
            match transport {
                Some(TransportSlice::Tcp(tcp)) => {
                    assert_eq!(tcp.checksum(), tcp.calc_checksum_ipv6(source, destination).unwrap());
                }
                Some(TransportSlice::Udp(udp)) => {
                    let right = udp.to_header().calc_checksum_ipv6_raw(source, destination, udp.payload()).unwrap();
                    assert_eq!(udp.checksum(), if right == 0 { 0xffff } else { right });
                }
                _ => {}
            }
        }
        _ => panic!("no IP packet: {packet:02x?}"),
    }
}
