//! Filling up super-packets that leave uncut. An application writes, say, 128 KiB: TCP makes of that two super-packets of full
//! length and one of a segment or two, and that one costs each that it passes as much as a full one does, but for the copies.
//! So the first segments of what follows go to the end of the super-packet before, where the two could be one.
//!
//! When it is cut the segments are those that there would have been, but for two things: ids of packets that must not be
//! fragmented, which have no meaning (RFC 6864 §4.1), and where within a super-packet PSH is set. It asks to be delivered, and what
//! follows at once asks so too.

use zerocopy::FromBytes;

use crate::engine::same_flow::{same_ip, same_tcp};
use crate::engine::segment::{self, Gso};
use crate::engine::tables::ENCAPSULATION;
use crate::engine::tx_batch::{Piece, Run, Uncut};
use crate::wire::ip::{self, Packet, protocol};
use crate::wire::transport::{TCP_CHECKSUM, Tcp, flags};

/// What may be joined to nothing.
const ALONE: u8 = flags::SYN | flags::RST | flags::URG | flags::FIN | flags::CWR;

/// A TCP super-packet, or a single segment, that comes behind a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Next<'p> {
    pub(super) packet: &'p Packet,
    pub(super) gso: Gso,
    /// Where it starts in the arena.
    pub(super) start: usize,
}

impl<'p> Next<'p> {
    /// A single segment whose checksum is to be computed, from `unfinished.0` on, and is that of TCP.
    #[inline]
    pub(super) fn single(packet: &'p Packet, unfinished: (usize, usize), start: usize, arena: &[u8]) -> Option<Self> {
        let ip_len = usize::from(packet.header_len);
        if packet.protocol != protocol::TCP || packet.fragment || unfinished != (ip_len, TCP_CHECKSUM) {
            return None;
        }
        let (tcp, _) = Tcp::ref_from_prefix(arena.get(start + ip_len..)?).ok()?;
        let header_len = ip_len + tcp.header_len();
        let payload_len = usize::from(packet.total_len).checked_sub(header_len).filter(|len| *len > 0)?;
        Some(Next { packet, gso: Gso { header_len, size: payload_len, payload_len }, start })
    }

    /// Whether a super-packet that is cut like that may begin with this single segment.
    #[inline]
    pub(super) fn is_segment_of(&self, how: Uncut) -> bool {
        let Next { packet, gso, .. } = self;
        let (header_len, size) = (gso.header_len as u16, gso.payload_len as u16);
        how == Uncut { v6: packet.is_v6(), cwr: false, transport: packet.header_len, header_len, size }
    }

    /// Adds as many of its first segments to `run` as fit, if the two could be one super-packet. How many: never all but one, since
    /// a single segment would not be cut, and nobody else finishes its checksums.
    #[inline]
    pub(super) fn join(&self, run: &mut Run, slab: &mut [u8], arena: &mut [u8]) -> Option<usize> {
        self.follows(run, slab, arena)?;
        let (room, segments) = (run.room(), self.gso.segments());
        let moved = match room {
            _ if room >= segments => segments,
            _ if !run.is_short() => return None,
            _ => room - usize::from(room + 1 == segments), // what is short has room
        };
        if moved == 0 {
            return None;
        }
        self.move_segments(moved, run, slab, arena)?;
        Some(moved)
    }

    /// Whether it is the continuation of `run`.
    #[inline]
    fn follows(&self, run: &Run, slab: &[u8], arena: &[u8]) -> Option<()> {
        let Next { packet, gso, start } = *self;
        let how = run.may_grow()?;
        let plain = packet.header_len == if packet.is_v6() { ip::V6_LEN } else { ip::V4_MIN_LEN } as u16;
        let size = usize::from(how.size);
        let fits = gso.size == size || gso.segments() == 1 && gso.size < size;
        if !plain || !fits || how.v6 != packet.is_v6() || usize::from(how.header_len) != gso.header_len {
            return None;
        }
        let head = run.pieces().first()?.of(arena, slab).get(ENCAPSULATION..)?;
        let bytes = arena.get(start..start + gso.header_len)?;
        let transport = usize::from(packet.header_len);
        let (first, _) = Tcp::ref_from_prefix(head.get(transport..)?).ok()?;
        let (next, _) = Tcp::ref_from_prefix(bytes.get(transport..)?).ok()?;
        let atomic = packet.is_v6() || ip::V4::ref_from_prefix(bytes).ok()?.0.flags_offset.get() & ip::V4_DF != 0;
        let follows = next.sequence.get() == first.sequence.get().wrapping_add(run.payload() as u32)
            && (first.flags | next.flags) & ALONE == 0
            && atomic
            && same_ip(packet, head, bytes)
            && same_tcp(packet, head, bytes);
        follows.then_some(())
    }

    /// Its first `moved` segments become the end of `run`.
    #[inline]
    fn move_segments(&self, moved: usize, run: &mut Run, slab: &mut [u8], arena: &mut [u8]) -> Option<()> {
        let Next { packet, gso, start } = *self;
        let len = gso.payload_len.min(moved * gso.size);
        let transport = usize::from(packet.header_len);
        let (tcp, _) = Tcp::ref_from_prefix(arena.get(start + transport..)?).ok()?;
        let push = if len == gso.payload_len { tcp.flags & flags::PSH } else { 0 };
        let headers = run.pieces().first()?.of_mut(arena, slab).get_mut(ENCAPSULATION..)?;
        segment::set_length(packet, headers, gso.header_len + run.payload() + len)?;
        let (tcp, _) = Tcp::mut_from_prefix(headers.get_mut(transport..)?).ok()?;
        tcp.flags |= push;
        let piece = Piece::Payload { at: (start + gso.header_len) as u32, len: len as u32 };
        run.grow(moved, len + moved * gso.header_len, &[piece]);
        Some(())
    }

    /// Appends the headers of what is left of it, when `moved` segments are gone.
    #[inline]
    pub(super) fn write_rest(&self, moved: usize, arena: &[u8], slab: &mut Vec<u8>) -> Option<()> {
        let Next { packet, gso, start } = *self;
        let at = slab.len();
        slab.extend_from_slice(arena.get(start..start + gso.header_len)?);
        let headers = slab.get_mut(at..)?;
        if !packet.is_v6() {
            let (header, _) = ip::V4::mut_from_prefix(headers).ok()?;
            header.id = header.id.get().wrapping_add(moved as u16).into();
        }
        let (tcp, _) = Tcp::mut_from_prefix(headers.get_mut(usize::from(packet.header_len)..)?).ok()?;
        tcp.sequence = tcp.sequence.get().wrapping_add((moved * gso.size) as u32).into();
        segment::set_length(packet, headers, gso.header_len + gso.payload_len - moved * gso.size)
    }
}

#[cfg(test)]
mod tests;
