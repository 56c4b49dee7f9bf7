//! The journey out, TUN → UDP, in order:
//!
//! 1. **Classify**: is it an IP packet that the overlay carries, which flow, what does the offload header ask for?
//! 2. **Admit**: does its source belong to this node? A receiver would refuse it otherwise; here the cause can be named.
//! 3. **Route**: the longest prefix in the table names the peer.
//! 4. **Fit**: what is longer than the path takes is answered with an ICMP error, or fragmented where that is allowed.
//! 5. **Segment**: a super-packet becomes segments; only headers are written, payload stays where it was read.
//! 6. **Batch**: datagrams of equal length for one peer and socket become a run, which one send call carries.
//!
//! Small packets are not copied either: the encapsulation goes into the room before them, over the offload header.

use zerocopy::{FromBytes, IntoBytes};

use super::classify;
use super::drop::Drop;
use super::segment::{self, Gso, Offload, Segmenter};
use super::stats::{Flow, Stats, WorkerStats};
use super::tables::{ENCAPSULATION, Peer, Tables};
use super::tx_batch::{Key, MAX_BYTES, MAX_SEGMENTS, Piece, Run, TxBatch};
use crate::wire::checksum::Sum;
use crate::wire::icmp;
use crate::wire::ip::{self, Packet};
use crate::wire::vnet_hdr::{self, VnetHdr};

/// Bytes of room that must be free before the offload header of each packet read: the encapsulation reaches that far.
pub const HEADROOM: usize = ENCAPSULATION - vnet_hdr::HEADER_LEN;

/// ICMP errors that one worker sends at most in a hundred milliseconds (RFC 1812 §4.3.2.8 asks for a limit).
const ERRORS_PER_WINDOW: u32 = 100;

/// The outbound half of one worker's engine.
#[derive(Debug)]
pub struct Outbound {
    stats: Stats,
    worker: usize,
    sockets: u16,
    batch: TxBatch,
    errors: Vec<Span>,
    error_window: (u64, u32),
}

/// Some bytes of a slab.
#[derive(Debug, Clone, Copy)]
struct Span {
    at: usize,
    len: usize,
}

/// What became of a run when it was handed to a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// All of it left.
    All,
    /// So many datagrams left; the rest did not, for this reason.
    Partly(u16, Drop),
}

impl Outbound {
    /// The outbound half for worker number `worker`, which spreads flows over `sockets` sending sockets.
    pub fn new(stats: Stats, worker: usize, sockets: u16) -> Self {
        let (batch, errors) = (TxBatch::default(), Vec::with_capacity(ERRORS_PER_WINDOW as usize));
        Outbound { stats, worker, sockets: sockets.max(1), batch, errors, error_window: (0, 0) }
    }

    /// Takes one frame: an offload header at `arena[at]`, the packet behind it, `len` bytes in all, with at least
    /// [`HEADROOM`] bytes before it. Whatever becomes of it is counted.
    #[inline]
    pub fn push(&mut self, tables: &Tables, now_ms: u64, arena: &mut [u8], at: usize, len: usize) {
        let Err((reason, packets, bytes)) = self.journey(tables, now_ms, arena, at, len) else { return };
        if let Some(stats) = self.stats.worker(self.worker) {
            count_read(&stats.flow, packets, bytes);
            stats.drop(reason, packets);
        }
    }

    /// What is to be sent, in order.
    pub fn batch(&self) -> &TxBatch {
        &self.batch
    }

    /// Frames for the TUN device, offload header first: errors that answer packets which did not fit.
    pub fn errors(&self) -> impl Iterator<Item = &[u8]> {
        self.errors.iter().filter_map(|span| self.batch.slab().get(span.at..span.at + span.len))
    }

    /// Counts an error as written to the TUN device, or refused by it.
    pub fn error_written(&self, frame: &[u8], written: bool) {
        if let Some(WorkerStats { flow, .. }) = self.stats.worker(self.worker).filter(|_| written) {
            flow.originated_inbound.add(1);
            flow.tun_tx_packets.add(1);
            flow.tun_tx_bytes.add(frame.len().saturating_sub(vnet_hdr::HEADER_LEN) as u64);
        }
    }

    /// Counts what became of a run.
    pub fn sent(&self, tables: &Tables, run: &Run, outcome: Sent) {
        let Some(stats) = self.stats.worker(self.worker) else { return };
        let segments = u64::from(run.segments);
        let sent = match outcome {
            Sent::All => segments,
            Sent::Partly(sent, reason) => {
                let sent = u64::from(sent).min(segments);
                stats.drop(reason, segments - sent);
                sent
            }
        };
        let of =
            |bytes: u32| if sent == segments { u64::from(bytes) } else { u64::from(bytes) * sent / segments.max(1) };
        stats.flow.udp_tx_packets.add(sent);
        stats.flow.udp_tx_bytes.add(of(run.bytes));
        let peer = tables.peer(run.key.peer).and_then(|peer| peer.spec.stats.worker(self.worker));
        if let Some(peer) = peer {
            peer.tx_packets.add(sent);
            peer.tx_bytes.add(of(run.inner_bytes));
        }
    }

    /// Starts the next batch.
    pub fn clear(&mut self) {
        self.batch.clear();
        self.errors.clear();
    }

    #[inline]
    fn journey(
        &mut self,
        tables: &Tables,
        now_ms: u64,
        arena: &mut [u8],
        at: usize,
        len: usize,
    ) -> Result<(), (Drop, u64, u64)> {
        // 1. classify
        let malformed = (Drop::MalformedPacket, 1, len.saturating_sub(vnet_hdr::HEADER_LEN) as u64);
        let start = at + vnet_hdr::HEADER_LEN;
        let frame = arena.get(at..at + len).ok_or(malformed)?;
        let (vnet, bytes) = VnetHdr::read_from_prefix(frame).map_err(|_| malformed)?;
        let packet = Packet::parse(bytes).map_err(|_| malformed)?;
        let total_len = usize::from(packet.total_len);
        let bytes = bytes.get(..total_len).ok_or(malformed)?;
        let offload = Offload::of(&vnet, &packet, bytes).map_err(|_| (Drop::MalformedOffload, 1, total_len as u64))?;
        let (packets, all_bytes) = match offload {
            Offload::Segment(gso) => {
                (gso.segments() as u64, (gso.payload_len + gso.segments() * gso.header_len) as u64)
            }
            _ => (1, total_len as u64),
        };
        let drop = |reason| (reason, packets, all_bytes);
        if !classify::is_unicast(packet.destination) {
            return Err(drop(Drop::Multicast));
        }
        let hash = classify::flow_hash(&packet, classify::ports(&packet, bytes));

        // 2. admit
        if !tables.is_ours(packet.source) {
            return Err(drop(Drop::SourceNotOurs));
        }

        // 3. route
        let index = tables.route(packet.destination).ok_or(drop(Drop::NoRoute))?;
        let peer = tables.peer(index).ok_or(drop(Drop::NoRoute))?;
        let key = Key { socket: (hash % u32::from(self.sockets)) as u16, peer: index };
        let route = Route { peer, key };

        // 4. fit
        let longest = match offload {
            Offload::Segment(gso) => gso.packet_len(),
            _ => total_len,
        };
        if longest > usize::from(peer.spec.mtu) {
            return match self.does_not_fit(route, now_ms, &packet, offload, arena, start) {
                Some(()) => {
                    self.count(packets, all_bytes);
                    Ok(())
                }
                None => Err(drop(Drop::PacketTooBig)),
            };
        }

        // 5. segment, 6. batch
        let queued = match offload {
            Offload::Segment(gso) => self.segment(route, &packet, gso, bytes, start),
            Offload::Checksum { start: from, offset } => {
                self.single(route, &packet, Some((from, offset)), arena, start)
            }
            Offload::None => self.single(route, &packet, None, arena, start),
        };
        queued.ok_or(drop(Drop::MalformedOffload))?;
        self.count(packets, all_bytes);
        Ok(())
    }

    /// One packet: the encapsulation goes before it, where the offload header was.
    #[inline]
    fn single(
        &mut self,
        Route { peer, key }: Route<'_>,
        packet: &Packet,
        checksum: Option<(usize, usize)>,
        arena: &mut [u8],
        start: usize,
    ) -> Option<()> {
        let inner = usize::from(packet.total_len);
        if let Some((from, offset)) = checksum {
            segment::complete_checksum(packet, arena.get_mut(start..start + inner)?, from, offset)?;
        }
        let at = start.checked_sub(ENCAPSULATION)?;
        *arena.get_mut(at..start)?.first_chunk_mut()? = peer.header(packet.is_v6());
        let len = ENCAPSULATION + inner;
        let piece = Piece::Payload { at: at as u32, len: len as u32 };
        self.batch.open(key, peer.spec.endpoint, packet.tos, len, 1).push(len, inner, &[piece]);
        Some(())
    }

    /// A super-packet: for each segment headers into the slab, payload where it is. What does not fit one send goes as
    /// equal parts.
    #[inline]
    fn segment(&mut self, route: Route<'_>, packet: &Packet, gso: Gso, bytes: &[u8], start: usize) -> Option<()> {
        let Route { peer, key } = route;
        let segmenter = Segmenter::new(packet, gso, bytes)?;
        let encapsulation = peer.header(packet.is_v6());
        let header_len = ENCAPSULATION + gso.header_len;
        let (segments, full) = (gso.segments(), header_len + gso.size);
        let fit = (MAX_BYTES / full).clamp(1, MAX_SEGMENTS);
        let part = segments.div_ceil(segments.div_ceil(fit));
        let payload = bytes.get(gso.header_len..)?;
        let mut index = 0;
        while index < segments {
            let end = (index + part).min(segments);
            // the last segment of all may be short: a part of that one alone is a run of its own length
            let first_len = header_len + segmenter.payload_len(index);
            self.batch.open(key, peer.spec.endpoint, packet.tos, first_len, end - index);
            while index < end {
                let from = index * gso.size;
                let len = segmenter.payload_len(index);
                let slab = self.batch.slab_mut();
                let at = slab.len();
                slab.extend_from_slice(&encapsulation);
                segmenter.write(index, payload.get(from..from + len)?, slab)?;
                let pieces = [
                    Piece::Header { at: at as u32, len: header_len as u32 },
                    Piece::Payload { at: (start + gso.header_len + from) as u32, len: len as u32 },
                ];
                let whole = header_len + len;
                let run = self.batch.open(key, peer.spec.endpoint, packet.tos, whole, 1);
                run.push(whole, gso.header_len + len, &pieces);
                index += 1;
            }
        }
        Some(())
    }

    /// A packet that is longer than the path takes: cut smaller or fragmented where its sender allows that
    /// (`Some`), else refused, with an ICMP error to the sender (`None`).
    #[cold]
    fn does_not_fit(
        &mut self,
        route: Route<'_>,
        now_ms: u64,
        packet: &Packet,
        offload: Offload,
        arena: &mut [u8],
        start: usize,
    ) -> Option<()> {
        let total = usize::from(packet.total_len);
        let mtu = usize::from(route.peer.spec.mtu);
        let may_fragment = !packet.is_v6() && {
            let (header, _) = ip::V4::ref_from_prefix(arena.get(start..start + total)?).ok()?;
            header.flags_offset.get() & ip::V4_DF == 0
        };
        if may_fragment {
            match offload {
                Offload::None => return self.fragment(route, packet, arena, start),
                Offload::Checksum { start: from, offset } => {
                    segment::complete_checksum(packet, arena.get_mut(start..start + total)?, from, offset)?;
                    return self.fragment(route, packet, arena, start);
                }
                Offload::Segment(gso) if packet.protocol == ip::protocol::TCP && gso.header_len + 8 <= mtu => {
                    let smaller = Gso { size: mtu - gso.header_len, ..gso };
                    let extra = smaller.segments() - gso.segments();
                    self.segment(route, packet, smaller, arena.get(start..start + total)?, start)?;
                    self.originated(extra);
                    return Some(());
                }
                Offload::Segment(_) => {}
            }
        }
        self.answer_too_big(now_ms, packet, route.peer.spec.mtu, arena.get(start..start + total)?);
        None
    }

    /// Fragments an IPv4 packet (RFC 791 §3.2).
    fn fragment(&mut self, route: Route<'_>, packet: &Packet, arena: &[u8], start: usize) -> Option<()> {
        let Route { peer, key } = route;
        let bytes = arena.get(start..start + usize::from(packet.total_len))?;
        let (header, payload) = bytes.split_at_checked(usize::from(packet.header_len))?;
        let (fixed, options) = ip::V4::ref_from_prefix(header).ok()?;
        let room = usize::from(peer.spec.mtu).checked_sub(header.len())? & !7;
        if room == 0 {
            return None;
        }
        let (flags, offset) = (fixed.flags_offset.get() & !ip::V4_OFFSET, fixed.flags_offset.get() & ip::V4_OFFSET);
        let encapsulation = peer.header(false);
        let mut made = 0usize;
        for (index, part) in payload.chunks(room).enumerate() {
            let last = (index + 1) * room >= payload.len();
            let more = if last { 0 } else { ip::V4_MF };
            let mut head = ip::V4 {
                total_len: ((header.len() + part.len()) as u16).into(),
                flags_offset: (flags | more | (offset + (index * room / 8) as u16)).into(),
                checksum: [0; 2],
                ..*fixed
            };
            let slab = self.batch.slab_mut();
            let at = slab.len();
            slab.extend_from_slice(&encapsulation);
            slab.extend_from_slice(&[0; ip::V4_MIN_LEN]);
            slab.extend_from_slice(options);
            if index > 0 {
                keep_copied_options(slab.get_mut(at + ENCAPSULATION + ip::V4_MIN_LEN..)?);
            }
            let sum = Sum::default().bytes(head.as_bytes());
            head.checksum = sum.bytes(slab.get(at + ENCAPSULATION + ip::V4_MIN_LEN..)?).finish();
            let place = slab.get_mut(at + ENCAPSULATION..)?.get_mut(..ip::V4_MIN_LEN)?;
            place.copy_from_slice(head.as_bytes());
            let header_len = ENCAPSULATION + header.len();
            let pieces = [
                Piece::Header { at: at as u32, len: header_len as u32 },
                Piece::Payload { at: (start + header.len() + index * room) as u32, len: part.len() as u32 },
            ];
            let whole = header_len + part.len();
            let run = self.batch.open(key, peer.spec.endpoint, packet.tos, whole, 1);
            run.push(whole, header.len() + part.len(), &pieces);
            made += 1;
        }
        self.originated(made.saturating_sub(1));
        Some(())
    }

    fn answer_too_big(&mut self, now_ms: u64, packet: &Packet, mtu: u16, bytes: &[u8]) {
        let window = now_ms / 100;
        if self.error_window.0 != window {
            self.error_window = (window, 0);
        }
        if self.error_window.1 >= ERRORS_PER_WINDOW {
            return;
        }
        let slab = self.batch.slab_mut();
        let at = slab.len();
        slab.extend_from_slice(&[0; vnet_hdr::HEADER_LEN]);
        slab.resize(at + vnet_hdr::HEADER_LEN + icmp::MAX_LEN, 0);
        let room = slab.get_mut(at + vnet_hdr::HEADER_LEN..).unwrap_or_default();
        let len = icmp::too_big(packet, bytes, mtu, room).map_or(0, |len| len + vnet_hdr::HEADER_LEN);
        slab.truncate(at + len);
        if len > 0 {
            self.errors.push(Span { at, len });
            self.error_window.1 += 1;
        }
    }

    #[inline]
    fn count(&self, packets: u64, bytes: u64) {
        if let Some(stats) = self.stats.worker(self.worker) {
            count_read(&stats.flow, packets, bytes);
        }
    }

    fn originated(&self, packets: usize) {
        if let Some(stats) = self.stats.worker(self.worker) {
            stats.flow.originated_outbound.add(packets as u64);
        }
    }
}

/// To whom a packet goes, and through which socket.
#[derive(Clone, Copy)]
struct Route<'a> {
    peer: &'a Peer,
    key: Key,
}

fn count_read(flow: &Flow, packets: u64, bytes: u64) {
    flow.tun_rx_packets.add(packets);
    flow.tun_rx_bytes.add(bytes);
}

/// Turns the options that only the first fragment carries into no-operations (RFC 791 §3.1: the copied flag).
fn keep_copied_options(options: &mut [u8]) {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const COPIED: u8 = 0x80;
    let mut at = 0;
    while let Some(&kind) = options.get(at) {
        let len = match kind {
            END => return,
            NO_OPERATION => 1,
            _ => options.get(at + 1).copied().map_or(0, usize::from),
        };
        let Some(option) = options.get_mut(at..at + len).filter(|_| len > 0) else { return };
        if kind & COPIED == 0 {
            option.fill(NO_OPERATION);
        }
        at += len;
    }
}

#[cfg(test)]
mod tests;
