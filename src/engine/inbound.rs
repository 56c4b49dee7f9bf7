//! The journey in, UDP → TUN, in order:
//!
//! 1. **Demultiplex**: a datagram whose source is no member's is dropped before anything is parsed. A buffer may hold
//!    many datagrams of one length (GRO).
//! 2. **Open**: check and strip VXLAN and the inner Ethernet header.
//! 3. **Admit**: the inner source belongs to the peer that sent it, the inner destination to this node.
//! 4. **ECN**: what the outer header learnt on its way goes into the inner one (RFC 6040).
//! 5. **Coalesce**: consecutive segments of a flow become one super-packet, across the datagrams of a whole batch.
//!
//! Packets are changed and handed on where they were received; the offload header goes over the encapsulation.

use std::net::IpAddr;

use zerocopy::FromBytes;

use super::coalesce::{self, Accepts, Coalescer, Offer, Unit};
use super::drop::Drop;
use super::stats::Stats;
use super::tables::{ENCAPSULATION, PeerIndex, Tables};
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
    pub source: IpAddr,
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
    /// The last inner source that was admitted, and the peer it belongs to: packets come in runs.
    admitted: Option<(IpAddr, PeerIndex)>,
}

impl Inbound {
    /// The inbound half for worker number `worker`, whose TUN device takes `accepts`.
    pub fn new(stats: Stats, worker: usize, accepts: Accepts) -> Self {
        Inbound { stats, worker, coalescer: Coalescer::new(accepts), admitted: None }
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
        let Some(peer) = tables.source(received.source) else { return stats.drop(Drop::UnknownSource, datagrams) };
        if received.truncated {
            return stats.drop(Drop::TruncatedDatagram, datagrams);
        }
        let (mut packets, mut bytes, mut uncut) = (0, 0, 0);
        let mut offset = 0;
        loop {
            let size = step.min(len - offset);
            match self.journey(tables, arena, at + offset, size, peer, received) {
                Ok((extra, inner)) => {
                    uncut += extra;
                    packets += 1 + extra;
                    bytes += inner;
                }
                Err(reason) => self.drop(reason),
            }
            offset += size;
            if offset >= len {
                break;
            }
        }
        if let Some(stats) = self.stats.worker(self.worker).filter(|_| uncut > 0) {
            stats.flow.udp_rx_packets.add(uncut);
        }
        let flow = tables.peer(peer).and_then(|peer| peer.spec.stats.worker(self.worker));
        if let Some(flow) = flow.filter(|_| packets > 0) {
            flow.rx_packets.add(packets);
            flow.rx_bytes.add(bytes);
            flow.last_seen.set(now_ms + 1);
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

    /// The headers that the units' pieces point into.
    pub fn slab(&self) -> &[u8] {
        self.coalescer.slab()
    }

    /// Counts a unit as written, or as refused by the TUN device.
    pub fn written(&self, unit: &Unit, written: bool) {
        let Some(stats) = self.stats.worker(self.worker) else { return };
        if written {
            stats.flow.tun_tx_packets.add(u64::from(unit.segments));
            stats.flow.tun_tx_bytes.add(u64::from(unit.bytes));
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

    /// One datagram. Returns how many packets more than one it stands for, and the bytes of all.
    #[inline]
    fn journey(
        &mut self,
        tables: &Tables,
        arena: &mut [u8],
        at: usize,
        len: usize,
        peer: PeerIndex,
        received: Received,
    ) -> Result<(u64, u64), Drop> {
        // 2. open
        let datagram = arena.get_mut(at..at + len).ok_or(Drop::BadVxlanHeader)?;
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
        let mut packet = Packet::parse(inner).map_err(|_| Drop::BadInnerPacket)?;
        if packet.is_v6() != v6 {
            return Err(Drop::BadInnerPacket);
        }

        // 3. admit
        if self.admitted != Some((packet.source, peer)) {
            if !tables.may_send(peer, packet.source) {
                return Err(Drop::InnerSourceNotAllowed);
            }
            self.admitted = Some((packet.source, peer));
        }
        if !tables.is_behind_us(packet.destination) {
            return Err(Drop::InnerDestinationNotOurs);
        }

        // 4. ECN
        let start = at + ENCAPSULATION;
        let total = usize::from(packet.total_len);
        let bytes = arena.get_mut(start..start + total).ok_or(Drop::BadInnerPacket)?;
        packet.tos = decapsulate_ecn(bytes, packet.tos, received.tos).ok_or(Drop::EcnNotCapable)?;

        // 5. coalesce
        let offer = Offer { peer, at: start, packet: &packet };
        let unfinished = match super_size(&packet, bytes, local.mtu, len, received) {
            Some(size) => {
                let before = self.units().len();
                let segments = self.coalescer.add_super(arena, offer, size);
                if let Some(stats) = self.stats.worker(self.worker) {
                    stats.flow.partial_csum_in.add(u64::from(segments));
                }
                let bytes =
                    self.units().get(before..).unwrap_or_default().iter().map(|unit| u64::from(unit.bytes)).sum();
                return Ok((u64::from(segments).saturating_sub(1), bytes));
            }
            None => self.coalescer.add(arena, offer),
        };
        if let Some(stats) = self.stats.worker(self.worker).filter(|_| unfinished) {
            stats.flow.partial_csum_in.add(1);
        }
        Ok((0, total as u64))
    }
}

/// Bytes of each datagram in a buffer.
///
/// A kernel VXLAN device over a virtual link hands over UDP super-packets as one datagram that was never cut, and the
/// socket tells the size of the *inner* segments: such a datagram's inner packet fills the whole buffer.
fn datagram_len(buffer: &[u8], segment_len: Option<u16>) -> usize {
    let whole = buffer.len().max(1);
    let Some(step) = segment_len.map(usize::from).filter(|step| *step > 0 && *step < whole) else { return whole };
    if is_one_frame(buffer) { whole } else { step }
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
