//! The journey out, TUN → UDP, in order:
//!
//! 1. **Classify**: is it an IP packet that the overlay carries (unicast, no ICMP that would change routes), which flow, what does the offload header ask for?
//! 2. **Admit**: does its source belong to this node? A receiver would refuse it otherwise; here the cause can be named.
//! 3. **Route**: the longest prefix in the table names the peer. For one that is dead the sender is told so.
//! 4. **Fit**: what is longer than the path takes is answered with an ICMP error, or fragmented where that is allowed (`fit`).
//! 5. **Segment**: a super-packet becomes segments, one behind the other in the batch's slab, unless somebody behind meshd cuts
//!    what lies in a tunnel ([`CutBehind`]): then its first ones fill up the super-packet before (`fill`).
//! 6. **Seal**: the VXLAN header goes before it; for an encrypted peer WireGuard writes the whole datagram, or the packet
//!    waits for a session.
//! 7. **Batch**: datagrams of equal length for one peer and socket become a run, which one send call carries.
//!
//! In the clear single packets are not copied: the encapsulation goes into the room before them, over the offload
//! header.

mod fill;
mod fit;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zerocopy::FromBytes;

use self::fill::Next;
use super::classify;
use super::drop::Drop;
use super::segment::{self, Gso, Offload, Segmenter};
use super::stats::{Flow, Stats, WorkerStats};
use super::tables::{ENCAPSULATION, Peer, PeerIndex, Tables};
use super::tunnel::{self, Outbox, Session};
use super::tx_batch::{Key, Piece, Run, TxBatch, Uncut};
use crate::health::peer::Liveness;
use crate::wire::icmp;
use crate::wire::ip::{self, Packet};
use crate::wire::transport::{self, Tcp, flags};
use crate::wire::vnet_hdr::{self, VnetHdr};

/// Bytes of room that must be free before the offload header of each packet read: the encapsulation reaches that far.
pub const HEADROOM: usize = ENCAPSULATION - vnet_hdr::HEADER_LEN;

/// ICMP errors that one worker sends at most in a hundred milliseconds (RFC 1812 §4.3.2.8 asks for a limit).
const ERRORS_PER_WINDOW: u32 = 100;

/// The longest UDP payload by its own length field (RFC 768).
const MAX_UDP: usize = 65_535 - transport::UDP_LEN;

/// Whether TCP super-packets for clear peers leave uncut, by the address family of the underlay: where the kernel takes
/// them so, and the network card, or nobody on a virtual link, cuts them.
#[derive(Debug, Default)]
pub struct CutBehind {
    /// Over IPv4.
    pub v4: AtomicBool,
    /// Over IPv6.
    pub v6: AtomicBool,
}

impl CutBehind {
    /// Switches both.
    pub fn set(&self, v4: bool, v6: bool) {
        self.v4.store(v4, Ordering::Relaxed);
        self.v6.store(v6, Ordering::Relaxed);
    }

    #[inline]
    fn takes(&self, endpoint: SocketAddr) -> bool {
        if endpoint.is_ipv4() { &self.v4 } else { &self.v6 }.load(Ordering::Relaxed)
    }
}

/// The outbound half of one worker's engine.
#[derive(Debug)]
pub struct Outbound {
    stats: Stats,
    worker: usize,
    sockets: u16,
    cut_behind: Arc<CutBehind>,
    batch: TxBatch,
    errors: Vec<Span>,
    error_window: (u64, u32),
    /// An inner packet in one piece, for WireGuard.
    whole: Vec<u8>,
    /// Handshakes that packets of this batch have started.
    outbox: Outbox,
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
        Outbound {
            stats,
            worker,
            sockets: sockets.max(1),
            cut_behind: Arc::default(),
            batch: TxBatch::default(),
            errors: Vec::with_capacity(ERRORS_PER_WINDOW as usize),
            error_window: (0, 0),
            whole: Vec::new(),
            outbox: Outbox::default(),
        }
    }

    /// The same where super-packets leave uncut while that is so.
    pub fn with_cut_behind(self, cut_behind: Arc<CutBehind>) -> Self {
        Outbound { cut_behind, ..self }
    }

    /// The number of the socket that sends from the data port: the one behind the pool.
    pub fn data_socket(&self) -> u16 {
        self.sockets
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

    /// Adds what tunnels want sent to the batch, counts it, and empties the outbox.
    pub fn post(&mut self, outbox: &mut Outbox) {
        let Some(stats) = self.stats.worker(self.worker) else { return };
        for (letter, bytes) in outbox.letters() {
            let slab = self.batch.slab_mut();
            let (at, len) = (slab.len() as u32, bytes.len());
            slab.extend_from_slice(bytes);
            let (inner, run) = match letter.waited {
                Some((peer, inner)) => {
                    count_read(&stats.flow, 1, u64::from(inner));
                    let key = Key { socket: letter.socket, peer };
                    (inner as usize, self.batch.open(key, letter.to, letter.tos, len))
                }
                None => {
                    stats.flow.originated_outbound.add(1);
                    let key = Key { socket: letter.socket, peer: PeerIndex::NOBODY };
                    (0, self.batch.open_alone(key, letter.to, letter.tos, len))
                }
            };
            run.push(len, inner, &[Piece::Slab { at, len: len as u32 }]);
        }
        let (packets, bytes) = outbox.expired();
        count_read(&stats.flow, packets, bytes);
        stats.drop(Drop::NoSession, packets);
        outbox.clear();
    }

    /// What is to be sent, in order.
    pub fn batch(&self) -> &TxBatch {
        &self.batch
    }

    /// Frames for the TUN device, offload header first: errors that answer packets which did not fit or had nowhere to go.
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

    /// More may follow on what came last: it may wait for that ([`Outbound::set_aside`]).
    #[inline]
    pub fn more_follows(&mut self) {
        self.batch.more_follows();
    }

    /// Ends a round, before the batch is sent: runs that are short, and may wait, are left for the next. Returns whether there are
    /// any, so that there must be another round.
    pub fn set_aside(&mut self) -> bool {
        self.batch.set_aside()
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
        if classify::steers_routes(&packet, bytes) {
            return Err(drop(Drop::RogueIcmpOut));
        }
        let hash = classify::flow_hash(&packet, classify::ports(&packet, bytes));

        // 2. admit
        if !tables.is_ours(packet.source) {
            return Err(drop(Drop::SourceNotOurs));
        }

        // 3. route
        let index = tables.route(packet.destination).ok_or(drop(Drop::NoRoute))?;
        let peer = tables.peer(index).ok_or(drop(Drop::NoRoute))?;
        if peer.spec.liveness.as_deref().is_some_and(Liveness::is_down) {
            self.answer(now_ms, |room| icmp::unreachable(&packet, bytes, room));
            return Err(drop(Drop::PeerDown));
        }
        let parcel = Parcel { packet, offload, start, now_ms };
        match peer.spec.tunnel.as_deref().filter(|tunnel| tunnel.seals()) {
            None => {
                let key = Key { socket: (hash % u32::from(self.sockets)) as u16, peer: index };
                let mut route = Route { peer, key, endpoint: peer.spec.endpoint, way: Clear };
                self.carry(&mut route, &parcel, arena).map_err(drop)?;
                self.count(packets, all_bytes);
                Ok(())
            }
            Some(tunnel) => {
                // after a change of keys, until the new ones have a session
                let former = peer.spec.former.as_deref().filter(|former| former.is_up(0) && !tunnel.is_up(0));
                let session = former.unwrap_or(tunnel).session(index, hash);
                let key = Key { socket: session.socket(self.sockets), peer: index };
                let route = Route { peer, key, endpoint: session.endpoint(), way: session };
                self.carry_sealed(route, &parcel, packets, all_bytes, arena).map_err(drop)
            }
        }
    }

    /// To a peer that is encrypted, whose lane is locked. Not part of its caller: the clear path must not pay for it.
    #[inline(never)]
    fn carry_sealed<'t>(
        &mut self,
        mut route: Route<'t, Session<'t>>,
        parcel: &Parcel,
        packets: u64,
        bytes: u64,
        arena: &mut [u8],
    ) -> Result<(), Drop> {
        if !route.way.is_up() && !route.way.can_hold(packets as usize, bytes as usize) {
            return Err(Drop::NoSession);
        }
        self.carry(&mut route, parcel, arena)?;
        let mut session = route.way;
        if session.is_up() {
            self.count(packets, bytes);
            return Ok(());
        }
        // what waits is counted when it leaves, or is discarded
        session.start(parcel.now_ms, self.sockets, &mut self.outbox);
        std::mem::drop(session);
        let mut outbox = std::mem::take(&mut self.outbox);
        self.post(&mut outbox);
        self.outbox = outbox;
        Ok(())
    }

    #[inline]
    fn carry<'t, W: Way<'t>>(
        &mut self,
        route: &mut Route<'t, W>,
        parcel: &Parcel,
        arena: &mut [u8],
    ) -> Result<(), Drop> {
        let Parcel { packet, offload, start, .. } = parcel;
        let total = usize::from(packet.total_len);

        // 4. fit
        let longest = match offload {
            Offload::Segment(gso) => gso.packet_len(),
            _ => total,
        };
        if longest > usize::from(route.peer.mtu()) {
            return self.does_not_fit(route, parcel, arena).ok_or(Drop::PacketTooBig);
        }

        // 5. segment, 6. seal, 7. batch
        let queued = match *offload {
            Offload::Segment(gso)
                if route.way.session().is_none() && self.leaves_uncut(route.endpoint, packet, gso) =>
            {
                self.uncut(route, parcel, gso, arena)
            }
            Offload::Segment(gso) => {
                let bytes = arena.get(*start..start + total).ok_or(Drop::MalformedOffload)?;
                self.segment(route, parcel, gso, bytes)
            }
            Offload::Checksum { start: from, offset } => self.single(route, parcel, Some((from, offset)), arena),
            Offload::None => self.single(route, parcel, None, arena),
        };
        queued.ok_or(Drop::MalformedOffload)
    }

    /// One packet: in the clear the encapsulation goes before it, where the offload header was.
    #[inline]
    fn single<'t, W: Way<'t>>(
        &mut self,
        route: &mut Route<'t, W>,
        parcel: &Parcel,
        checksum: Option<(usize, usize)>,
        arena: &mut [u8],
    ) -> Option<()> {
        let Parcel { packet, start, now_ms, .. } = parcel;
        let start = *start;
        let inner = usize::from(packet.total_len);
        let Route { key, endpoint, .. } = *route;
        let segment = match checksum {
            Some(unfinished) if route.way.session().is_none() && self.cut_behind.takes(endpoint) => {
                Next::single(packet, unfinished, start, arena)
            }
            _ => None,
        };
        let joins = segment.filter(|_| self.batch.has_uncut());
        if joins.and_then(|next| self.fill(key, endpoint, &next, arena)).is_some() {
            return Some(());
        }
        if let Some((from, offset)) = checksum {
            segment::complete_checksum(packet, arena.get_mut(start..start + inner)?, from, offset)?;
        }
        if let Some(session) = route.way.session() {
            let whole = arena.get(start..start + inner)?;
            return seal(&mut self.batch, key, endpoint, session, *now_ms, packet.tos, whole);
        }
        let at = start.checked_sub(ENCAPSULATION)?;
        *arena.get_mut(at..start)?.first_chunk_mut()? = route.peer.header(packet.is_v6());
        let len = ENCAPSULATION + inner;
        let piece = Piece::Payload { at: at as u32, len: len as u32 };
        if let Some(next) = segment
            && let Some(how) = self.batch.recent_uncut(key).filter(|how| next.is_segment_of(*how))
        {
            self.batch.add_uncut(key, endpoint, packet.tos, how, (1, inner), &[piece]);
            return Some(());
        }
        self.batch.open(key, endpoint, packet.tos, len).push(len, inner, &[piece]);
        Some(())
    }

    #[inline]
    fn leaves_uncut(&self, endpoint: SocketAddr, packet: &Packet, gso: Gso) -> bool {
        let outer = if endpoint.is_ipv4() { ip::V4_MIN_LEN } else { 0 };
        packet.protocol == ip::protocol::TCP
            && gso.segments() > 1
            && usize::from(packet.total_len) + ENCAPSULATION + outer <= MAX_UDP
            && self.cut_behind.takes(endpoint)
    }

    /// Fills up the last run of this key. How many segments of `next` it took.
    #[inline]
    fn fill(&mut self, key: Key, endpoint: SocketAddr, next: &Next<'_>, arena: &mut [u8]) -> Option<usize> {
        let (run, slab) = self.batch.last_of(key).filter(|(run, _)| run.endpoint == endpoint)?;
        next.join(run, slab, arena)
    }

    /// A super-packet that is cut behind meshd: it fills up the one before, and the encapsulation goes before what is left.
    #[inline]
    fn uncut<'t, W: Way<'t>>(
        &mut self,
        route: &Route<'t, W>,
        parcel: &Parcel,
        gso: Gso,
        arena: &mut [u8],
    ) -> Option<()> {
        let Parcel { packet, start, .. } = parcel;
        let (tcp, _) = Tcp::ref_from_prefix(arena.get(start + usize::from(packet.header_len)..)?).ok()?;
        let how = Uncut {
            v6: packet.is_v6(),
            cwr: tcp.flags & flags::CWR != 0,
            transport: packet.header_len,
            header_len: gso.header_len as u16,
            size: gso.size as u16,
        };
        let next = Next { packet, gso, start: *start };
        let Route { key, endpoint, .. } = *route;
        let moved = self.fill(key, endpoint, &next, arena).unwrap_or(0);
        let segments = gso.segments() - moved;
        if segments == 0 {
            return Some(());
        }
        let encapsulation = route.peer.header(packet.is_v6());
        let (payload, from) = (gso.payload_len - moved * gso.size, start + gso.header_len + moved * gso.size);
        let stands_for = (segments, segments * gso.header_len + payload);
        if moved == 0 {
            let at = start.checked_sub(ENCAPSULATION)?;
            *arena.get_mut(at..*start)?.first_chunk_mut()? = encapsulation;
            let piece = Piece::Payload { at: at as u32, len: (ENCAPSULATION + gso.header_len + payload) as u32 };
            self.batch.add_uncut(key, endpoint, packet.tos, how, stands_for, &[piece]);
            return Some(());
        }
        let slab = self.batch.slab_mut();
        let at = slab.len();
        slab.extend_from_slice(&encapsulation);
        next.write_rest(moved, arena, slab)?;
        let head = Piece::Slab { at: at as u32, len: (ENCAPSULATION + gso.header_len) as u32 };
        let payload = Piece::Payload { at: from as u32, len: payload as u32 };
        self.batch.add_uncut(key, endpoint, packet.tos, how, stands_for, &[head, payload]);
        Some(())
    }

    /// A super-packet: its segments go into the slab. They fill up runs, also across super-packets: a 64 KiB one does
    /// not fit one send, and its rest goes with the next.
    #[inline]
    fn segment<'t, W: Way<'t>>(
        &mut self,
        route: &mut Route<'t, W>,
        parcel: &Parcel,
        gso: Gso,
        bytes: &[u8],
    ) -> Option<()> {
        let Parcel { packet, now_ms, .. } = parcel;
        let Route { peer, key, endpoint, way } = route;
        let segmenter = Segmenter::new(packet, gso, bytes)?;
        let encapsulation = peer.header(packet.is_v6());
        let payload = bytes.get(gso.header_len..)?;
        for index in 0..gso.segments() {
            let (from, len) = (index * gso.size, segmenter.payload_len(index));
            let payload = payload.get(from..from + len)?;
            if let Some(session) = way.session() {
                let write = |to: &mut Vec<u8>| segmenter.write(index, payload, to);
                if session.is_up() {
                    let inner = gso.header_len + len;
                    seal_with(&mut self.batch, *key, *endpoint, session, packet.tos, inner, write)?;
                    continue;
                }
                self.whole.clear();
                write(&mut self.whole)?;
                session.hold(&self.whole, packet.tos, *now_ms);
                continue;
            }
            let slab = self.batch.slab_mut();
            let at = slab.len();
            slab.extend_from_slice(&encapsulation);
            segmenter.write(index, payload, slab)?;
            let inner = gso.header_len + len;
            let whole = ENCAPSULATION + inner;
            let piece = Piece::Slab { at: at as u32, len: whole as u32 };
            self.batch.open(*key, *endpoint, packet.tos, whole).push(whole, inner, &[piece]);
        }
        Some(())
    }

    /// Answers a packet with the ICMP error that `write` writes, unless there were too many.
    #[cold]
    fn answer(&mut self, now_ms: u64, write: impl FnOnce(&mut [u8]) -> Option<usize>) {
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
        let len = write(room).map_or(0, |len| len + vnet_hdr::HEADER_LEN);
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

    /// Counts packets that came out of one that had to be cut; those that wait are counted when they leave.
    fn originated<'t, W: Way<'t>>(&self, route: &mut Route<'t, W>, packets: usize) {
        let waits = route.way.session().is_some_and(|session| !session.is_up());
        if let Some(stats) = self.stats.worker(self.worker).filter(|_| !waits) {
            stats.flow.originated_outbound.add(packets as u64);
        }
    }
}

/// A packet under way, once it was read: what it is, where it starts in the arena, and the time.
struct Parcel {
    packet: Packet,
    offload: Offload,
    start: usize,
    now_ms: u64,
}

/// To whom a packet goes, through which socket, and in which way.
struct Route<'t, W> {
    peer: &'t Peer,
    key: Key,
    endpoint: SocketAddr,
    way: W,
}

/// In the clear, or sealed by a session, under its lock: the journey is compiled for each, so that what concerns sessions
/// costs a clear packet nothing.
trait Way<'t> {
    /// What seals packets.
    fn session(&mut self) -> Option<&mut Session<'t>>;
}

struct Clear;

impl<'t> Way<'t> for Clear {
    #[inline(always)]
    fn session(&mut self) -> Option<&mut Session<'t>> {
        None
    }
}

impl<'t> Way<'t> for Session<'t> {
    #[inline(always)]
    fn session(&mut self) -> Option<&mut Session<'t>> {
        Some(self)
    }
}

/// Seals a whole inner packet into the batch, or has it wait for a session.
#[inline]
fn seal(
    batch: &mut TxBatch,
    key: Key,
    endpoint: SocketAddr,
    session: &mut Session<'_>,
    now_ms: u64,
    tos: u8,
    packet: &[u8],
) -> Option<()> {
    if !session.is_up() {
        session.hold(packet, tos, now_ms);
        return Some(());
    }
    seal_with(batch, key, endpoint, session, tos, packet.len(), |to| {
        to.extend_from_slice(packet);
        Some(())
    })
}

/// Seals an inner packet of `inner` bytes, which `write` appends, into the batch.
#[inline]
fn seal_with(
    batch: &mut TxBatch,
    key: Key,
    endpoint: SocketAddr,
    session: &mut Session<'_>,
    tos: u8,
    inner: usize,
    write: impl FnOnce(&mut Vec<u8>) -> Option<()>,
) -> Option<()> {
    let slab = batch.slab_mut();
    let at = slab.len();
    let len = session.seal_with(inner, slab, write)?;
    let piece = Piece::Slab { at: at as u32, len: len as u32 };
    batch.open(key, endpoint, tos & tunnel::ECN, len).push(len, inner, &[piece]);
    Some(())
}

fn count_read(flow: &Flow, packets: u64, bytes: u64) {
    flow.tun_rx_packets.add(packets);
    flow.tun_rx_bytes.add(bytes);
}

#[cfg(test)]
mod tests;
