//! Joining consecutive segments of a flow into a super-packet, so that the kernel's stack is walked once for many.
//!
//! The rules are those of the kernel's own GRO (`tcp_gro_receive`, `udp_gro_receive`, `inet_gro_receive`,
//! `ipv6_gro_receive`): what is joined can be cut again into the very same packets. Nothing is copied: the first segment's
//! headers are changed where they lie, further payloads are named by their places.
//!
//! A packet never overtakes another of its flow: it joins the last unit of its flow or starts a new one behind it.
//!
//! A PSH does not end what goes to this node itself: it asks to be delivered, which the end of a batch does for all of it. Over
//! IPv4 it may get longer than 64 KiB (BIG TCP), once it is known that a socket of this node has the connection: what the firewall
//! sends on somebody would have to cut again.

mod ends;

use std::net::SocketAddr;

use zerocopy::{FromBytes, IntoBytes};

use self::ends::Ends;
use super::classify;
use super::same_flow::{same_ip, same_ports, same_tcp};
use super::segment::{self, Gso, Segmenter};
use super::tables::PeerIndex;
use super::tx_batch::Piece;
use crate::wire::checksum::Sum;
use crate::wire::ip::{self, Packet, protocol};
use crate::wire::transport::{self, Tcp, Udp, flags};
use crate::wire::vnet_hdr::{self, VnetHdr};

/// Pieces that a unit lies in at most: as many segments of 1,398 bytes as fit [`LONGEST_HERE`], and a few.
pub const MAX_PIECES: usize = 192;
/// The kernel takes so many datagrams of UDP in one (`UDP_GRO_CNT_MAX`), and any number of TCP segments.
const MAX_UDP_SEGMENTS: usize = 64;
/// Bytes that a super-packet has at most, headers included: what the IP headers' lengths can say.
const LONGEST: usize = u16::MAX as usize;
/// The same where it is BIG TCP for this node itself. The kernel would take twice that; programs that capture expect no more
/// than 262,144 (`MAXIMUM_SNAPLEN` of libpcap).
const LONGEST_HERE: usize = (1 << 18) - 1;
/// Slots of the flow table; a collision costs a join, not an order.
const FLOW_SLOTS: usize = 512;

/// What the TUN device takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepts {
    /// TCP super-packets and packets without checksum: there is an offload header.
    pub tso: bool,
    /// UDP super-packets.
    pub uso: bool,
}

/// What one write to the TUN device carries: a packet, or segments that were joined.
#[derive(Debug)]
pub struct Unit {
    /// From whom.
    pub peer: PeerIndex,
    /// How many packets it stands for.
    pub segments: u16,
    /// Their bytes.
    pub bytes: u32,
    pieces: Vec<Piece>,
    packet: Packet,
    /// The transport facts of the first packet; `None` where nothing is to be known of them.
    first: Option<Segment>,
    payload: usize,
    flags: u8,
    id: Id,
    checksum: Checksum,
    authentic: bool,
    /// Nothing more may join.
    closed: bool,
}

impl Unit {
    /// The bytes in order, offload header first.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Whether it is longer than the length field of its IP header can say.
    pub fn is_big(&self) -> bool {
        self.length() > LONGEST
    }

    /// Its bytes as one packet, where it is one that others may join.
    fn length(&self) -> usize {
        self.first.map_or(0, |first| first.header_len + self.payload)
    }
}

/// IPv4 identification: counting up, or fixed, which an atomic packet's may be (RFC 6864 §4.1). Decided by the second
/// packet, as the kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Id {
    last: u16,
    fixed: bool,
}

/// What is known of the transport checksum of a unit's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checksum {
    /// Not looked at.
    Unknown,
    /// Verified.
    Valid,
    /// Never computed: the field holds the pseudo-header's sum.
    Unfinished,
    /// Wrong: the receiver is to drop it.
    Wrong,
}

/// The units of a batch.
#[derive(Debug)]
pub struct Coalescer {
    accepts: Accepts,
    units: Vec<Unit>,
    used: usize,
    slab: Vec<u8>,
    flows: Box<[FlowSlot; FLOW_SLOTS]>,
    generation: u32,
    ends: Ends,
}

#[derive(Debug, Clone, Copy, Default)]
struct FlowSlot {
    generation: u32,
    hash: u32,
    unit: u32,
}

/// A packet on offer: where it lies and what it is.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// From whom.
    pub peer: PeerIndex,
    /// Where the IP packet starts; [`vnet_hdr::HEADER_LEN`] bytes before it are free.
    pub at: usize,
    /// What it is.
    pub packet: &'a Packet,
    /// Its bytes were authenticated, so that its checksum need not be looked at before it is joined.
    pub authentic: bool,
    /// It goes to this node itself.
    pub here: bool,
    /// If so: what it joins may get longer than 64 KiB.
    pub big: bool,
}

/// The transport facts that decide about joining.
#[derive(Debug, Clone, Copy)]
struct Segment {
    header_len: usize,
    payload: usize,
    /// Payload bytes of each segment but the last, where it is a super-packet; else all of it.
    size: usize,
    sequence: u32,
    flags: u8,
    checksum: [u8; 2],
    /// May start a unit that others join.
    may_lead: bool,
}

impl Segment {
    /// Nothing may follow it in a super-packet.
    fn ends(&self, here: bool) -> bool {
        let ending = if here { flags::FIN } else { flags::PSH | flags::FIN };
        self.flags & ending != 0
    }

    /// How many packets it stands for.
    fn count(&self) -> usize {
        if self.is_super() { self.payload.div_ceil(self.size.max(1)) } else { 1 }
    }

    /// The same, and their bytes.
    fn stands_for(&self) -> (u16, u64) {
        let count = self.count();
        (u16::try_from(count).unwrap_or(u16::MAX), (self.payload + count * self.header_len) as u64)
    }

    /// Whether its last segment is shorter than one of `size` bytes.
    fn ends_short(&self, size: usize) -> bool {
        if self.is_super() { !self.payload.is_multiple_of(size) } else { self.payload < size }
    }

    /// Whether it was never cut, so that its checksum was not computed either.
    fn is_super(&self) -> bool {
        self.payload > self.size
    }
}

impl Coalescer {
    /// A coalescer for a TUN device that takes `accepts`.
    pub fn new(accepts: Accepts) -> Self {
        let flows = Box::new([FlowSlot::default(); FLOW_SLOTS]);
        Coalescer { accepts, units: Vec::new(), used: 0, slab: Vec::new(), flows, generation: 1, ends: Ends::default() }
    }

    /// The units so far; they can be written only after [`Coalescer::finish`].
    pub fn units(&self) -> &[Unit] {
        self.units.get(..self.used).unwrap_or_default()
    }

    /// The memory that [`Piece::Slab`] points into.
    pub fn slab(&self) -> &[u8] {
        &self.slab
    }

    /// The time.
    pub fn received_at(&mut self, now_us: u64) {
        self.ends.set_now(now_us);
    }

    /// Asks whether a TCP connection (the peer's end and ours) ends at a socket of this node, if that is to be known for
    /// super-packets of more than 64 KiB: once in a while for each.
    #[inline]
    pub fn ask(&mut self, is_here: impl FnOnce((SocketAddr, SocketAddr)) -> bool) {
        self.ends.ask(is_here);
    }

    /// Starts the next batch.
    pub fn clear(&mut self) {
        self.used = 0;
        self.slab.clear();
        self.forget_flows();
    }

    /// Takes a packet: joins it to the last unit of its flow, or starts a new one. Returns whether its checksum was
    /// never computed.
    #[inline]
    pub fn add(&mut self, arena: &[u8], offer: Offer<'_>) -> bool {
        let Offer { at, packet, .. } = offer;
        let bytes = arena.get(at..at + usize::from(packet.total_len)).unwrap_or_default();
        if packet.fragment {
            // the flow of a fragment cannot be told: whatever comes later must not join what came before
            self.forget_flows();
            self.start(offer, bytes, None, Checksum::Unknown);
            return false;
        }
        let Some(segment) = read_transport(packet, bytes) else {
            self.start(offer, bytes, None, Checksum::Unknown);
            return false;
        };
        if self.accepts.tso {
            let hash = classify::flow_hash(packet, classify::ports(packet, bytes));
            if let Some(checksum) = self.join(arena, offer, bytes, &segment, hash) {
                return checksum == Checksum::Unfinished;
            }
            self.next_is_last_of(hash);
        }
        let unfinished = is_unfinished(packet, bytes, &segment);
        let checksum = if unfinished { Checksum::Unfinished } else { Checksum::Unknown };
        self.start(offer, bytes, Some(segment), checksum);
        unfinished
    }

    /// Joins a packet to the last unit of its flow, if it can; what is known of its checksum then.
    #[inline]
    fn join(&mut self, arena: &[u8], offer: Offer<'_>, bytes: &[u8], segment: &Segment, hash: u32) -> Option<Checksum> {
        debug_assert!(offer.here || !offer.big, "what is sent on somebody would have to cut again");
        let may_be_big = offer.big && packet_may_be_big(offer.packet);
        let longest = if may_be_big && self.ends.is_here(hash) { LONGEST_HERE } else { LONGEST };
        let unit = self.last_of(hash)?;
        if unit.length() + segment.payload > longest {
            if may_be_big && longest == LONGEST {
                self.ends.want(&offer, bytes, hash);
            }
            return None;
        }
        unit.join(arena, offer, bytes, segment)
    }

    /// The last unit of the flow with this hash.
    #[inline]
    fn last_of(&mut self, hash: u32) -> Option<&mut Unit> {
        let slot = self.flows.get(hash as usize % FLOW_SLOTS)?;
        let known = slot.generation == self.generation && slot.hash == hash;
        self.units.get_mut(slot.unit as usize).filter(|_| known)
    }

    /// The next unit to be started is the last of the flow with this hash.
    #[inline]
    fn next_is_last_of(&mut self, hash: u32) {
        let slot = FlowSlot { generation: self.generation, hash, unit: self.used as u32 };
        if let Some(place) = self.flows.get_mut(hash as usize % FLOW_SLOTS) {
            *place = slot;
        }
    }

    /// Takes a super-packet with an unfinished checksum, to be cut into segments of `size` payload bytes. Returns how
    /// many packets it stands for, and their bytes.
    pub fn add_super(&mut self, arena: &[u8], offer: Offer<'_>, size: usize) -> (u16, u64) {
        let Offer { at, packet, .. } = offer;
        let bytes = arena.get(at..at + usize::from(packet.total_len)).unwrap_or_default();
        let size = size.max(1);
        let tcp = packet.protocol == protocol::TCP;
        let read = read_transport(packet, bytes);
        let segment = read.map(|segment| Segment { size, may_lead: segment.may_lead && tcp, ..segment });
        let hash = classify::flow_hash(packet, classify::ports(packet, bytes));
        let takes = self.accepts.tso && (tcp || self.accepts.uso);
        if let (Some(segment), false) = (&segment, takes) {
            self.next_is_last_of(hash);
            return self.cut(offer, bytes, segment).unwrap_or_default();
        }
        let joins = segment.as_ref().filter(|_| tcp);
        let joined = joins.and_then(|segment| self.join(arena, offer, bytes, segment, hash));
        if joined.is_none() {
            self.next_is_last_of(hash);
            let checksum = if segment.is_some() { Checksum::Unfinished } else { Checksum::Unknown };
            self.start(offer, bytes, segment, checksum);
        }
        segment.map_or((1, bytes.len() as u64), |segment| segment.stands_for())
    }

    /// Cuts a super-packet here, for a TUN device that takes none.
    fn cut(&mut self, offer: Offer<'_>, bytes: &[u8], segment: &Segment) -> Option<(u16, u64)> {
        let size = segment.size;
        let gso = Gso { header_len: segment.header_len, size, payload_len: segment.payload };
        let segmenter = Segmenter::new(offer.packet, gso, bytes)?;
        for index in 0..gso.segments() {
            let (from, len) = (gso.header_len + index * size, segmenter.payload_len(index));
            let at = self.slab.len();
            self.slab.extend_from_slice(VnetHdr::default().as_bytes());
            segmenter.write(index, bytes.get(from..from + len)?, &mut self.slab)?;
            let whole = Piece::Slab { at: at as u32, len: (self.slab.len() - at) as u32 };
            self.start(offer, bytes, None, Checksum::Unknown);
            let unit = self.units.get_mut(self.used - 1)?;
            unit.bytes = (gso.header_len + len) as u32;
            unit.pieces.clear();
            unit.pieces.push(whole);
        }
        Some(segment.stands_for())
    }

    /// Writes the offload headers, and the changed headers of joined packets. Call once, after the last `add`.
    pub fn finish(&mut self, arena: &mut [u8]) {
        let accepts = self.accepts;
        for unit in self.units.get(..self.used).unwrap_or_default() {
            let Some(head) = unit.head() else { continue };
            let Some(head) = arena.get_mut(head) else { continue };
            let Some((vnet, packet)) = head.split_at_mut_checked(vnet_hdr::HEADER_LEN) else { continue };
            unit.finish(accepts, packet).unwrap_or_default().write_to(vnet).ok();
        }
    }

    fn forget_flows(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.generation == 0 {
            self.flows.fill(FlowSlot::default());
            self.generation = 1;
        }
    }

    fn start(&mut self, offer: Offer<'_>, bytes: &[u8], segment: Option<Segment>, checksum: Checksum) {
        let Offer { peer, at, packet, authentic, here, .. } = offer;
        let mut pieces = self.units.get_mut(self.used).map(|unit| std::mem::take(&mut unit.pieces)).unwrap_or_default();
        pieces.clear();
        let (at, len) = (at.saturating_sub(vnet_hdr::HEADER_LEN), vnet_hdr::HEADER_LEN + bytes.len());
        pieces.push(Piece::Payload { at: at as u32, len: len as u32 });
        let takes_more = self.accepts.tso && (packet.protocol == protocol::TCP || self.accepts.uso);
        let leads = takes_more && segment.is_some_and(|s| s.may_lead && !s.ends_short(s.size) && !s.ends(here));
        let segments = segment.map_or(1, |s| s.count());
        let headers = segment.map_or(0, |s| s.header_len * (segments - 1));
        let unit = Unit {
            peer,
            segments: u16::try_from(segments).unwrap_or(u16::MAX),
            bytes: u32::from(packet.total_len) + headers as u32,
            pieces,
            packet: *packet,
            first: segment,
            payload: segment.map_or(0, |s| s.payload),
            flags: segment.map_or(0, |s| s.flags),
            id: Id { last: ip_id(packet, bytes).wrapping_add(segments as u16 - 1), fixed: false },
            checksum,
            authentic,
            closed: !leads,
        };
        match self.units.get_mut(self.used) {
            Some(place) => *place = unit,
            None => self.units.push(unit),
        }
        self.used += 1;
    }
}

impl Unit {
    /// Where the first packet lies, offload header first, if it is in the receive buffer.
    fn head(&self) -> Option<std::ops::Range<usize>> {
        match self.pieces.first()? {
            Piece::Payload { at, len } => Some(*at as usize..(*at + *len) as usize),
            Piece::Slab { .. } => None,
        }
    }

    /// Joins a packet, or a super-packet, if the two are consecutive segments of one flow; what is known of its checksum then.
    #[inline]
    fn join(&mut self, arena: &[u8], offer: Offer<'_>, bytes: &[u8], segment: &Segment) -> Option<Checksum> {
        let Offer { peer, at, packet, authentic, here, .. } = offer;
        let first = self.first.filter(|_| !self.closed)?;
        let head = arena.get(self.head()?)?.get(vnet_hdr::HEADER_LEN..)?;
        let udp = packet.protocol == protocol::UDP;
        let fits = self.peer == peer
            && self.authentic == authentic
            && segment.header_len == first.header_len
            && segment.payload > 0
            && (segment.size == first.size || segment.size < first.size && !segment.is_super())
            && self.pieces.len() < if udp { MAX_UDP_SEGMENTS } else { MAX_PIECES };
        let alike = fits
            && same_ip(packet, head, bytes)
            && if udp { segment.may_lead && same_ports(packet, head, bytes) } else { same_tcp(packet, head, bytes) }
            && (udp || segment.sequence == first.sequence.wrapping_add(self.payload as u32));
        if !alike {
            return None;
        }
        let id = if packet.is_v6() { self.id } else { self.next_id(head, ip_id(packet, bytes), segment.count())? };

        // the kernel will believe the joined packet's checksum: each part must be right, or unfinished
        if self.checksum == Checksum::Unknown {
            self.checksum = if authentic { Checksum::Valid } else { verify(&self.packet, head, &first) };
        }
        let checksum = match authentic {
            _ if segment.is_super() => Checksum::Unfinished,
            true if is_unfinished(packet, bytes, segment) => Checksum::Unfinished,
            true => Checksum::Valid,
            false => verify(packet, bytes, segment),
        };
        if self.checksum == Checksum::Wrong || checksum == Checksum::Wrong {
            self.closed = true;
            return None;
        }
        let count = segment.count();
        self.id = id;
        self.pieces.push(Piece::Payload { at: (at + segment.header_len) as u32, len: segment.payload as u32 });
        self.segments += count as u16;
        self.bytes += u32::from(packet.total_len) + (segment.header_len * (count - 1)) as u32;
        self.payload += segment.payload;
        self.flags |= segment.flags;
        self.closed = segment.ends_short(first.size) || segment.ends(here);
        Some(checksum)
    }

    /// The id state after so many packets from this id on, or `None` where it does not follow. Those of a super-packet count
    /// up.
    #[inline]
    fn next_id(&self, head: &[u8], id: u16, count: usize) -> Option<Id> {
        let atomic = head.get(6)? & (ip::V4_DF >> 8) as u8 != 0;
        let fixed = if self.segments == 1 { atomic && id == self.id.last } else { self.id.fixed };
        let follows = if fixed { id == self.id.last } else { id == self.id.last.wrapping_add(1) };
        let last = id.wrapping_add(count as u16 - 1);
        (follows && !(fixed && count > 1)).then_some(Id { last, fixed })
    }

    /// Makes the first packet's headers those of the whole, and says what goes into the offload header; `None` where
    /// that has nothing to say.
    fn finish(&self, accepts: Accepts, packet: &mut [u8]) -> Option<VnetHdr> {
        let first = self.first?;
        let start = usize::from(self.packet.header_len);
        let (tcp, v6) = (self.packet.protocol == protocol::TCP, self.packet.is_v6());
        let offset = if tcp { transport::TCP_CHECKSUM } else { transport::UDP_CHECKSUM };
        let (start_u16, offset_u16) = (self.packet.header_len, offset as u16);
        if self.segments == 1 {
            return match self.checksum {
                Checksum::Unfinished if accepts.tso => Some(VnetHdr::needs_csum(start_u16, offset_u16)),
                Checksum::Unfinished => {
                    segment::complete_checksum(&self.packet, packet, start, offset)?;
                    None
                }
                Checksum::Valid if accepts.tso => Some(VnetHdr::data_valid()),
                _ => None,
            };
        }
        segment::set_length(&self.packet, packet, first.header_len + self.payload)?;
        let gso_type = if tcp {
            let (header, _) = Tcp::mut_from_prefix(packet.get_mut(start..)?).ok()?;
            header.flags |= self.flags & (flags::PSH | flags::FIN);
            if v6 { vnet_hdr::GSO_TCPV6 } else { vnet_hdr::GSO_TCPV4 }
        } else {
            vnet_hdr::GSO_UDP_L4
        };
        let size = u16::try_from(first.size).ok()?;
        Some(VnetHdr::super_packet(gso_type, first.header_len as u16, size, start_u16, offset_u16))
    }
}

/// BIG TCP is for TCP over IPv4 alone.
#[inline]
fn packet_may_be_big(packet: &Packet) -> bool {
    packet.protocol == protocol::TCP && !packet.is_v6()
}

/// Reads the transport header of a packet that is no fragment.
#[inline]
fn read_transport(packet: &Packet, bytes: &[u8]) -> Option<Segment> {
    let start = usize::from(packet.header_len);
    // GRO joins nothing with IP options or extension headers
    let plain_ip = start == if packet.is_v6() { ip::V6_LEN } else { ip::V4_MIN_LEN };
    let rest = bytes.get(start..usize::from(packet.total_len))?;
    match packet.protocol {
        protocol::TCP => {
            let (tcp, _) = Tcp::ref_from_prefix(rest).ok()?;
            let header = tcp.header_len();
            let payload = rest.len().checked_sub(header).filter(|_| header >= transport::TCP_MIN_LEN)?;
            let alone = flags::SYN | flags::RST | flags::URG | flags::CWR;
            let may_lead = plain_ip && payload > 0 && tcp.flags & (alone | flags::ACK) == flags::ACK;
            let (sequence, flags, checksum) = (tcp.sequence.get(), tcp.flags, tcp.checksum);
            Some(Segment { header_len: start + header, payload, size: payload, sequence, flags, checksum, may_lead })
        }
        protocol::UDP => {
            let (udp, _) = Udp::ref_from_prefix(rest).ok()?;
            let payload = rest.len() - transport::UDP_LEN;
            let whole = usize::from(udp.length.get()) == rest.len();
            // a datagram without checksum has to stay without one: RFC 768, RFC 6935 for IPv6
            let may_lead = plain_ip && whole && payload > 0 && udp.checksum != [0, 0];
            let (header_len, checksum) = (start + transport::UDP_LEN, udp.checksum);
            Some(Segment { header_len, payload, size: payload, sequence: 0, flags: 0, checksum, may_lead })
        }
        _ => None,
    }
}

fn ip_id(packet: &Packet, bytes: &[u8]) -> u16 {
    match packet.is_v6() {
        true => 0,
        false => bytes.get(4..6).and_then(|id| id.first_chunk()).map_or(0, |id| u16::from_be_bytes(*id)),
    }
}

/// Whether the transport checksum, and the header checksum of IPv4, are right.
#[inline]
fn verify(packet: &Packet, bytes: &[u8], segment: &Segment) -> Checksum {
    let Some(rest) = bytes.get(usize::from(packet.header_len)..).filter(|_| header_is_right(packet, bytes)) else {
        return Checksum::Wrong;
    };
    let pseudo = packet.pseudo_sum(packet.payload_len());
    if pseudo.bytes(rest).is_valid() {
        Checksum::Valid
    } else if is_pseudo_sum(pseudo, packet, segment) {
        Checksum::Unfinished
    } else {
        Checksum::Wrong
    }
}

/// Whether the checksum of an IPv4 header is right; IPv6 has none.
#[inline]
fn header_is_right(packet: &Packet, bytes: &[u8]) -> bool {
    packet.is_v6()
        || bytes.get(..usize::from(packet.header_len)).is_some_and(|header| Sum::default().bytes(header).is_valid())
}

/// Whether the checksum was never computed: the field holds just what a kernel leaves there for hardware that is to
/// finish it, and that is not by chance the right one.
#[inline]
fn is_unfinished(packet: &Packet, bytes: &[u8], segment: &Segment) -> bool {
    let pseudo = packet.pseudo_sum(packet.payload_len());
    is_pseudo_sum(pseudo, packet, segment) && verify(packet, bytes, segment) == Checksum::Unfinished
}

#[inline]
fn is_pseudo_sum(pseudo: Sum, packet: &Packet, segment: &Segment) -> bool {
    let sum = pseudo.fold();
    segment.checksum == sum || (packet.protocol == protocol::UDP && segment.checksum == segment::no_zero(sum))
}

/// Whether a UDP datagram's checksum was never computed.
pub fn unfinished_udp(packet: &Packet, bytes: &[u8]) -> bool {
    let segment = read_transport(packet, bytes).filter(|_| !packet.fragment && packet.protocol == protocol::UDP);
    segment.is_some_and(|segment| is_unfinished(packet, bytes, &segment))
}

/// Whether a packet is longer than `mtu` and its checksum was never computed: a super-packet of a kernel whose virtual
/// link never cut it. Returns the payload bytes of the segments that it is to be cut into.
pub fn unfinished_super(packet: &Packet, bytes: &[u8], mtu: u16) -> Option<usize> {
    if packet.total_len <= mtu || packet.fragment || packet.protocol != protocol::TCP {
        return None;
    }
    let segment = read_transport(packet, bytes)?;
    // a kernel's segments are mostly payload: less would let one datagram become thousands of headers
    let size = usize::from(mtu).checked_sub(segment.header_len).filter(|size| *size >= segment.header_len)?;
    // by chance the sum may be right as well: to compute it once more does no harm, to look would take as long
    let pseudo = packet.pseudo_sum(packet.payload_len());
    (header_is_right(packet, bytes) && is_pseudo_sum(pseudo, packet, &segment)).then_some(size)
}

#[cfg(test)]
mod tests;
