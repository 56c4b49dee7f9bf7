//! The journey in, UDP → TUN, in order:
//!
//! 1. **Demultiplex** on the first byte. VXLAN from a source that is no member's is dropped before anything is parsed;
//!    WireGuard comes from wherever its peer is, and proves who that is. A buffer may hold many datagrams of one length (GRO).
//! 2. **Open**: check and strip VXLAN and the inner Ethernet header, or decrypt. BFD packets end here: peers are asked
//!    whether they are alive in a VXLAN network of its own, or through the tunnel.
//! 3. **Admit**: the inner source belongs to the peer that sent it, the inner destination to this node, and
//!    it is no ICMP message that would change routes here.
//! 4. **ECN**: what the outer header learnt on its way goes into the inner one (RFC 6040).
//! 5. **Coalesce**: consecutive segments of a flow become one super-packet, across the datagrams of a whole batch.
//!
//! Packets are changed and handed on where they were received; the offload header goes over the encapsulation.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use zerocopy::FromBytes;

use super::big_tcp::BigTcp;
use super::classify;
use super::coalesce::{self, Accepts, Coalescer, Offer, Unit};
use super::drop::Drop;
use super::stats::Stats;
use super::tables::{ENCAPSULATION, Local, PeerIndex, Tables};
use super::tunnel::{self, Initiator, Kind, Opened, Outbox, Policy, Session, SourceLimit};
use crate::wire::bfd::{self, Message, Refused};
use crate::wire::ip::{Packet, protocol};
use crate::wire::{ethernet, vxlan};

/// One received buffer.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// Where it starts in the arena.
    pub at: usize,
    /// Its bytes.
    pub len: usize,
    /// Bytes of each datagram but the last, where the kernel joined several.
    pub segment_len: Option<u16>,
    /// Who sent it.
    pub source: SocketAddr,
    /// Outer DSCP and ECN.
    pub tos: u8,
    /// It was longer than the buffer.
    pub truncated: bool,
}

/// The inbound half of one worker's engine.
#[derive(Debug)]
pub struct Inbound {
    stats: Stats,
    worker: usize,
    coalescer: Coalescer,
    /// The last packet that was admitted: packets come in runs.
    admitted: Option<Admitted>,
    big_tcp: Arc<BigTcp>,
    /// Somebody looks at what is written, by programs that may not understand longer ones than 64 KiB.
    looked_at: bool,
    /// The number of the socket that sends from the data port.
    data_socket: u16,
    /// What tunnels want sent because of what came.
    outbox: Outbox,
    limit: SourceLimit,
    received_us: u64,
    heard: Vec<PeerIndex>,
}

/// What was found of a packet's addresses.
#[derive(Debug, Clone, Copy)]
struct Admitted {
    peer: PeerIndex,
    source: IpAddr,
    destination: IpAddr,
    /// The destination is this node itself.
    here: bool,
}

/// Where an inner packet lies, and whose it is.
struct Inner {
    peer: PeerIndex,
    start: usize,
    packet: Packet,
    /// It came out of an AEAD: its bytes are those that the peer sent.
    authentic: bool,
}

impl Inbound {
    /// The inbound half for worker number `worker`, whose TUN device takes `accepts`.
    pub fn new(stats: Stats, worker: usize, accepts: Accepts) -> Self {
        Inbound {
            stats,
            worker,
            coalescer: Coalescer::new(accepts),
            admitted: None,
            big_tcp: Arc::default(),
            looked_at: false,
            data_socket: 1,
            outbox: Outbox::default(),
            limit: SourceLimit::default(),
            received_us: 0,
            heard: Vec::new(),
        }
    }

    /// The same where the socket that sends from the data port has this number.
    pub fn with_data_socket(self, data_socket: u16) -> Self {
        Inbound { data_socket, ..self }
    }

    /// The same where super-packets for this node itself may be longer than 64 KiB.
    pub fn with_big_tcp(self, big_tcp: Arc<BigTcp>) -> Self {
        Inbound { big_tcp, ..self }
    }

    /// Whether somebody looks at what is written from now on.
    pub fn looked_at(&mut self, looked_at: bool) {
        self.looked_at = looked_at;
    }

    /// Asks whether a TCP connection (the peer's end and ours) ends at a socket of this node, if that is to be known.
    #[inline]
    pub fn ask(&mut self, is_here: impl FnOnce((SocketAddr, SocketAddr)) -> bool) {
        self.coalescer.ask(is_here);
    }

    /// The device refused a unit: for want of memory, or, `for_good`, since it takes none of that length.
    #[cold]
    pub fn refused(&self, unit: &Unit, for_good: bool) {
        if unit.is_big() {
            self.big_tcp.refused(self.received_us, for_good);
        }
    }

    /// What tunnels want sent because of what came.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Takes a received buffer. Whatever becomes of its datagrams is counted.
    #[inline]
    pub fn push(&mut self, tables: &Tables, now_ms: u64, arena: &mut [u8], received: Received) {
        let Received { at, len, .. } = received;
        let Some(stats) = self.stats.worker(self.worker) else { return };
        let Some(buffer) = arena.get_mut(at..at + len) else { return };

        // 1. demultiplex
        let step = datagram_len(buffer, received.segment_len);
        let datagrams = len.div_ceil(step).max(1) as u64;
        stats.flow.udp_rx_packets.add(datagrams);
        stats.flow.udp_rx_bytes.add(len as u64);
        let member = tables.source(received.source.ip());
        if received.truncated {
            let reason = if member.is_some() { Drop::TruncatedDatagram } else { Drop::UnknownSource };
            return stats.drop(reason, datagrams);
        }
        let mut session = None;
        let mut tally = Tally { peer: PeerIndex::NOBODY, packets: 0, bytes: 0 };
        let mut offset = 0;
        loop {
            let (at, size) = (at + offset, step.min(len - offset));
            match self.journey(tables, now_ms, arena, at, size, member, received, &mut session) {
                Ok(Some((peer, packets, bytes))) => {
                    if peer != tally.peer {
                        self.seen(tables, now_ms, &tally);
                        tally = Tally { peer, packets: 0, bytes: 0 };
                    }
                    tally.packets += packets;
                    tally.bytes += bytes;
                }
                Ok(None) => self.consumed(),
                Err(reason) => self.drop(reason),
            }
            offset += size;
            if offset >= len {
                break;
            }
        }
        self.seen(tables, now_ms, &tally);
    }

    fn seen(&self, tables: &Tables, now_ms: u64, tally: &Tally) {
        let flow = tables.peer(tally.peer).and_then(|peer| peer.spec.stats.worker(self.worker));
        if let Some(flow) = flow {
            flow.rx_packets.add(tally.packets);
            flow.rx_bytes.add(tally.bytes);
            flow.last_seen.set(now_ms + 1);
        }
    }

    #[cold]
    fn consumed(&self) {
        if let Some(stats) = self.stats.worker(self.worker) {
            stats.flow.consumed_inbound.add(1);
        }
    }

    #[cold]
    fn drop(&self, reason: Drop) {
        if let Some(stats) = self.stats.worker(self.worker) {
            stats.drop(reason, 1);
        }
    }

    /// Ends the batch: after this the units may be written.
    pub fn finish(&mut self, arena: &mut [u8]) {
        self.coalescer.finish(arena);
    }

    /// What is to be written to the TUN device, in order.
    pub fn units(&self) -> &[Unit] {
        self.coalescer.units()
    }

    /// The slab that the units' pieces point into.
    pub fn slab(&self) -> &[u8] {
        self.coalescer.slab()
    }

    /// Counts a unit as written, or as refused by the TUN device.
    pub fn written(&self, unit: &Unit, written: bool) {
        let Some(stats) = self.stats.worker(self.worker) else { return };
        if written {
            stats.flow.tun_tx_packets.add(u64::from(unit.segments));
            stats.flow.tun_tx_bytes.add(u64::from(unit.bytes));
            stats.flow.big_writes.add(u64::from(unit.is_big()));
        } else {
            stats.drop(Drop::TunWriteFailed, u64::from(unit.segments));
        }
    }

    /// Starts the next batch.
    pub fn clear(&mut self) {
        self.coalescer.clear();
        // the table may be another one by the next batch
        self.admitted = None;
    }

    /// One datagram. Returns whose it was, how many packets it stands for, and the bytes of all; `None` where it was for
    /// the tunnel itself.
    #[inline]
    #[allow(clippy::too_many_arguments)]
    fn journey<'t>(
        &mut self,
        tables: &'t Tables,
        now_ms: u64,
        arena: &mut [u8],
        at: usize,
        len: usize,
        member: Option<PeerIndex>,
        received: Received,
        session: &mut Option<Session<'t>>,
    ) -> Result<Option<(PeerIndex, u64, u64)>, Drop> {
        // 2. open
        let datagram = arena.get_mut(at..at + len).ok_or(Drop::BadVxlanHeader)?;
        if tunnel::is_wireguard(datagram) {
            return self.sealed_journey(tables, now_ms, arena, at, len, member, received, session);
        }
        let peer = member.ok_or(Drop::UnknownSource)?;
        if tables.tunnel(peer).is_some_and(|tunnel| tunnel.policy() == Policy::Required) {
            return Err(Drop::ClearFromEncryptedPeer);
        }
        let packet = match open_vxlan(tables, datagram) {
            Err(Drop::WrongVni) => return self.bfd_frame(tables, now_ms, peer, datagram).map(|()| None),
            opened => opened?,
        };
        let inner = Inner { peer, start: at + ENCAPSULATION, packet, authentic: false };
        self.deliver(tables, now_ms, arena, inner, len, received)
    }

    /// The same for a WireGuard message. Not part of its caller: the clear path must not pay for it.
    #[inline(never)]
    #[allow(clippy::too_many_arguments)]
    fn sealed_journey<'t>(
        &mut self,
        tables: &'t Tables,
        now_ms: u64,
        arena: &mut [u8],
        at: usize,
        len: usize,
        member: Option<PeerIndex>,
        received: Received,
        session: &mut Option<Session<'t>>,
    ) -> Result<Option<(PeerIndex, u64, u64)>, Drop> {
        let datagram = arena.get_mut(at..at + len).ok_or(Drop::WireguardMalformed)?;
        let Some((peer, bytes)) = self.decrypt(tables, now_ms, datagram, member, received, session)? else {
            return Ok(None);
        };
        let packet = Packet::parse(bytes).map_err(|_| Drop::BadInnerPacket)?;
        let inner = Inner { peer, start: at + tunnel::INNER_AT, packet, authentic: true };
        self.deliver(tables, now_ms, arena, inner, len, received)
    }

    /// What came out of a datagram of `len` bytes. Inlined always: it is compiled for clear and for decrypted packets.
    #[inline(always)]
    fn deliver(
        &mut self,
        tables: &Tables,
        now_ms: u64,
        arena: &mut [u8],
        inner: Inner,
        len: usize,
        received: Received,
    ) -> Result<Option<(PeerIndex, u64, u64)>, Drop> {
        let Inner { peer, start, mut packet, authentic } = inner;
        let local = tables.local();

        // 3. admit
        let known = self
            .admitted
            .filter(|last| last.peer == peer && last.source == packet.source && last.destination == packet.destination);
        let here = match known {
            Some(last) => last.here,
            None => match self.admit(tables, peer, &packet) {
                Ok(here) => here,
                Err(reason) => {
                    // one that moves sends its BFD packets from an address that the node list has a little later
                    let bytes = arena.get(start..start + usize::from(packet.total_len)).unwrap_or_default();
                    let liveness = authentic && self.is_bfd_packet(tables, now_ms, peer, bytes);
                    return if liveness { Ok(None) } else { Err(reason) };
                }
            },
        };
        let total = usize::from(packet.total_len);
        let bytes = arena.get_mut(start..start + total).ok_or(Drop::BadInnerPacket)?;
        if classify::steers_routes(&packet, bytes) {
            return Err(Drop::RogueIcmpIn);
        }

        // 4. ECN
        packet.tos = decapsulate_ecn(bytes, packet.tos, received.tos).ok_or(Drop::EcnNotCapable)?;

        // 5. coalesce
        let big = here && !self.looked_at && self.big_tcp.may(self.received_us);
        let offer = Offer { peer, at: start, packet: &packet, authentic, here, big };
        let size = if authentic { None } else { super_size(&packet, bytes, local.mtu, len, received) };
        let unfinished = match size {
            Some(size) => {
                let (segments, bytes) = self.coalescer.add_super(arena, offer, size);
                if let Some(stats) = self.stats.worker(self.worker) {
                    let others = u64::from(segments).saturating_sub(1);
                    stats.flow.partial_csum_in.add(u64::from(segments));
                    stats.flow.udp_rx_packets.add(others);
                    // as if it had come in its segments, each with its headers: so its sender counts it
                    let headers = bytes.saturating_sub(total as u64) + others * ENCAPSULATION as u64;
                    stats.flow.udp_rx_bytes.add(headers);
                }
                return Ok(Some((peer, u64::from(segments).max(1), bytes)));
            }
            None => self.coalescer.add(arena, offer),
        };
        if let Some(stats) = self.stats.worker(self.worker).filter(|_| unfinished) {
            stats.flow.partial_csum_in.add(1);
        }
        Ok(Some((peer, 1, total as u64)))
    }

    /// Whether this peer may send such a packet here; if so, whether it is for this node itself.
    #[inline]
    fn admit(&mut self, tables: &Tables, peer: PeerIndex, packet: &Packet) -> Result<bool, Drop> {
        let Packet { source, destination, .. } = *packet;
        let known = self.admitted.is_some_and(|last| last.peer == peer && last.source == source);
        if !known && !tables.may_send(peer, source) {
            return Err(Drop::InnerSourceNotAllowed);
        }
        if !tables.is_behind_us(destination) {
            return Err(Drop::InnerDestinationNotOurs);
        }
        let here = tables.local().addresses.contains(&destination);
        self.admitted = Some(Admitted { peer, source, destination, here });
        Ok(here)
    }

    /// Decrypts a WireGuard message where it lies: the inner packet is at [`tunnel::INNER_AT`] then. `None` where it was
    /// for the tunnel itself.
    #[inline]
    fn decrypt<'t, 'd>(
        &mut self,
        tables: &'t Tables,
        now_ms: u64,
        datagram: &'d mut [u8],
        member: Option<PeerIndex>,
        received: Received,
        session: &mut Option<Session<'t>>,
    ) -> Result<Option<(PeerIndex, &'d [u8])>, Drop> {
        let index = match tunnel::kind(datagram)? {
            Kind::For(index) => index,
            Kind::Initiation => {
                *session = None; // of two lanes only one is ever locked
                return self.initiation(tables, now_ms, datagram, received).map(|()| None);
            }
        };
        let (slot, lane) = tunnel::place(index);
        if !session.as_ref().is_some_and(|session| session.is(slot, lane)) {
            *session = None;
            let Some((peer, tunnel, lane)) = tables.session(index) else {
                session_lost(tables, member, lane, now_ms);
                return Err(Drop::WireguardUnknownSession);
            };
            *session = Some(tunnel.lane(peer, lane));
        }
        let open = session.as_mut().ok_or(Drop::WireguardUnknownSession)?;
        let opened = open.open(index, datagram, received.source, now_ms, self.data_socket, &mut self.outbox);
        match opened {
            Ok(Opened::Packet(len)) => {
                let place = datagram.get(tunnel::INNER_AT..).and_then(|rest| rest.get(..len));
                Ok(Some((open.peer(), place.ok_or(Drop::WireguardMalformed)?)))
            }
            Ok(Opened::Consumed) => {
                self.seen(tables, now_ms, &Tally { peer: open.peer(), packets: 0, bytes: 0 });
                Ok(None)
            }
            Err(reason) => {
                if reason == Drop::WireguardUnknownSession {
                    *session = None; // of two lanes only one is ever locked
                    session_lost(tables, member, lane, now_ms);
                }
                Err(reason)
            }
        }
    }

    #[cold]
    fn initiation(&mut self, tables: &Tables, now_ms: u64, datagram: &[u8], received: Received) -> Result<(), Drop> {
        let Received { source, .. } = received;
        let Local { identity, former_identity, .. } = tables.local();
        let limit = &mut self.limit;
        if identity.is_none() {
            return Err(Drop::HandshakeRefused);
        }
        let mut found = Err(Drop::HandshakeRefused);
        for ours in identity.iter().chain(former_identity) {
            let initiator = ours.initiator(datagram, source, limit, now_ms, self.data_socket, &mut self.outbox);
            found = initiator.map(|initiator| (ours, initiator));
            // for which of our keys it is the first bytes tell; all else is said by the one that it is for
            if !matches!(found, Err(Drop::HandshakeRefused)) {
                break;
            }
        }
        let (ours, Initiator::Heard(heard, lane)) = found? else { return Ok(()) };
        let (peer, tunnel) = tables.answerer(&heard.key(), ours, lane).ok_or(Drop::HandshakeRefused)?;
        let mut session = tunnel.lane(peer, lane);
        session.answer(heard, source, now_ms, self.data_socket, &mut self.outbox)?;
        self.seen(tables, now_ms, &Tally { peer, packets: 0, bytes: 0 });
        Ok(())
    }
}

/// Liveness: what is taken out before admission.
impl Inbound {
    /// The time, finer than in milliseconds, at which what comes next was received.
    pub fn received_at(&mut self, now_us: u64) {
        self.received_us = now_us;
        self.coalescer.received_at(now_us);
    }

    /// Peers that BFD packets came from, since this was emptied.
    pub fn heard(&mut self) -> &mut Vec<PeerIndex> {
        &mut self.heard
    }

    /// Takes a frame of the management network, which goes no further whatever it is (RFC 8971 §4 and §6).
    #[cold]
    fn bfd_frame(&mut self, tables: &Tables, now_ms: u64, peer: PeerIndex, datagram: &[u8]) -> Result<(), Drop> {
        let liveness = tables.liveness(peer).ok_or(Drop::WrongVni)?;
        let (vxlan, frame) = vxlan::Header::ref_from_prefix(datagram).map_err(|_| Drop::WrongVni)?;
        let (ethernet, _) = ethernet::Header::ref_from_prefix(frame).map_err(|_| Drop::WrongVni)?;
        let for_us = [bfd::MANAGEMENT_MAC, tables.local().mac.0].contains(&ethernet.destination);
        if vxlan.vni() != liveness.settings().vni || !for_us {
            return Err(Drop::WrongVni);
        }
        let (destination, message) =
            bfd::read_frame(datagram, tables.local().bfd_keys.as_deref()).map_err(|refused| match refused {
                Refused::Another => Drop::WrongVni,
                Refused::NotAuthentic => Drop::BfdNotAuthentic,
            })?;
        if !bfd::is_loopback(destination) && !tables.local().addresses.contains(&destination) {
            return Err(Drop::WrongVni);
        }
        self.take(tables, now_ms, peer, &message)
    }

    /// Takes a packet that came through the tunnel, which has authenticated its peer. Neither of its addresses matters: they are
    /// underlay addresses, and who moves knows its new one before the other does. Which session it is for, it says itself.
    #[cold]
    fn is_bfd_packet(&mut self, tables: &Tables, now_ms: u64, peer: PeerIndex, bytes: &[u8]) -> bool {
        bfd::read_packet(bytes, None).is_ok_and(|(_, message)| self.take(tables, now_ms, peer, &message).is_ok())
    }

    fn take(&mut self, tables: &Tables, now_ms: u64, peer: PeerIndex, message: &Message) -> Result<(), Drop> {
        let liveness = tables.liveness(peer).ok_or(Drop::WrongVni)?;
        let now_us = self.received_us.max(now_ms * 1000);
        match message {
            Message::Control(control) => {
                if !liveness.heard(self.worker, now_us, control) {
                    return Err(Drop::BfdReplayed);
                }
            }
            Message::Echo(echo, size) => liveness.heard_echo(now_us, echo, *size),
            Message::Ask(_) | Message::Report(_) => liveness.heard_survey(self.worker, message),
        }
        if self.heard.last() != Some(&peer) {
            self.heard.push(peer);
        }
        self.seen(tables, now_ms, &Tally { peer, packets: 0, bytes: 0 });
        Ok(())
    }
}

/// What one peer sent within a buffer.
struct Tally {
    peer: PeerIndex,
    packets: u64,
    bytes: u64,
}

/// A member sends by a session that we do not have: after our restart it still has its own.
#[cold]
fn session_lost(tables: &Tables, member: Option<PeerIndex>, lane: usize, now_ms: u64) {
    if let Some(tunnel) = member.and_then(|peer| tables.tunnel(peer)) {
        tunnel.nudge(lane, now_ms);
    }
}

/// Checks VXLAN and Ethernet header, and reads the IP packet behind them.
#[inline]
fn open_vxlan(tables: &Tables, datagram: &[u8]) -> Result<Packet, Drop> {
    let (vxlan, frame) = vxlan::Header::ref_from_prefix(datagram).map_err(|_| Drop::BadVxlanHeader)?;
    if vxlan.flags & vxlan::FLAG_I == 0 {
        return Err(Drop::BadVxlanHeader);
    }
    let local = tables.local();
    if vxlan.vni() != local.vni.get() {
        return Err(Drop::WrongVni);
    }
    let (ethernet, inner) = ethernet::Header::ref_from_prefix(frame).map_err(|_| Drop::InnerNotIp)?;
    if ethernet.destination != local.mac.0 && ethernet.destination != [0xff; 6] {
        return Err(Drop::BadInnerMac);
    }
    let v6 = match ethernet.ether_type.get() {
        ethernet::IPV4 => false,
        ethernet::IPV6 => true,
        _ => return Err(Drop::InnerNotIp),
    };
    let packet = Packet::parse(inner).map_err(|_| Drop::BadInnerPacket)?;
    if packet.is_v6() == v6 { Ok(packet) } else { Err(Drop::BadInnerPacket) }
}

/// Bytes of each datagram in a buffer.
///
/// A kernel VXLAN device over a virtual link hands over UDP super-packets as one datagram that was never cut, and the
/// socket tells the size of the *inner* segments: such a datagram's inner packet fills the whole buffer.
fn datagram_len(buffer: &[u8], segment_len: Option<u16>) -> usize {
    let whole = buffer.len().max(1);
    let Some(step) = segment_len.map(usize::from).filter(|step| *step > 0 && *step < whole) else { return whole };
    if !tunnel::is_wireguard(buffer) && is_one_frame(buffer) { whole } else { step }
}

/// Whether the inner packet of the first datagram reaches exactly to the end of the buffer.
fn is_one_frame(buffer: &[u8]) -> bool {
    let Some(inner) = buffer.get(ENCAPSULATION..) else { return false };
    Packet::parse(inner).is_ok_and(|packet| usize::from(packet.total_len) == inner.len())
}

/// The payload bytes of each segment, where the packet is a super-packet that was never cut.
#[inline]
fn super_size(packet: &Packet, bytes: &[u8], mtu: u16, len: usize, received: Received) -> Option<usize> {
    match received.segment_len.map(usize::from) {
        // a joined buffer that is one frame: UDP, however short it is, or it would become one datagram
        Some(size) if packet.protocol == protocol::UDP && len == received.len && size > 0 && size < len => {
            coalesce::unfinished_udp(packet, bytes).then_some(size)
        }
        _ if packet.total_len > mtu => coalesce::unfinished_super(packet, bytes, mtu),
        _ => None,
    }
}

/// Takes over what the outer ECN field says (RFC 6040 §4.2, figure 4) and returns the inner TOS; `None` where the packet
/// must be dropped, since its transport would take no notice of congestion.
#[inline]
fn decapsulate_ecn(bytes: &mut [u8], inner_tos: u8, outer_tos: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    let ecn = match (inner_tos & 3, outer_tos & 3) {
        (NOT_ECT, CE) => return None,
        (ECT0 | ECT1, CE) => CE,
        (ECT0, ECT1) => ECT1,
        (inner, _) => inner,
    };
    if ecn == inner_tos & 3 {
        return Some(inner_tos);
    }
    let tos = inner_tos & !3 | ecn;
    set_tos(bytes, inner_tos, tos)?;
    Some(tos)
}

#[cold]
fn set_tos(bytes: &mut [u8], old: u8, new: u8) -> Option<()> {
    if bytes.first()? >> 4 == 6 {
        let byte = bytes.get_mut(1)?;
        *byte = *byte & 0x0f | new << 4;
        return Some(());
    }
    *bytes.get_mut(1)? = new;
    // RFC 1624 §3: HC' = ~(~HC + ~m + m'); m is the first word, of which only the low byte changes
    let [hi, lo] = bytes.get(10..12)?.first_chunk().copied()?;
    let sum = u32::from(!u16::from_be_bytes([hi, lo])) + u32::from(!u16::from(old)) + u32::from(new);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    *bytes.get_mut(10..12)?.first_chunk_mut()? = (!(sum as u16)).to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests;
