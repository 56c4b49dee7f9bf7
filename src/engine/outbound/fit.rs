//! What becomes of packets that are longer than the path takes.

use zerocopy::{FromBytes, IntoBytes};

use super::{Outbound, Parcel, Route, Way, seal};
use crate::engine::segment::{self, Gso, Offload};
use crate::engine::tables::ENCAPSULATION;
use crate::engine::tx_batch::Piece;
use crate::wire::checksum::Sum;
use crate::wire::icmp;
use crate::wire::ip;

/// The shortest MTU that an IPv6 sender takes notice of (RFC 8200 §5).
const V6_MIN_MTU: usize = 1280;

impl Outbound {
    /// A packet that is longer than the path takes: cut smaller or fragmented where that is allowed (`Some`), else refused,
    /// with an ICMP error to the sender (`None`).
    ///
    /// A TCP super-packet is cut in any case, its segments being this side's choice. Its sender is not told: it would
    /// remember a small MTU for minutes, and cutting costs nothing.
    #[cold]
    pub(super) fn does_not_fit<'t, W: Way<'t>>(
        &mut self,
        route: &mut Route<'t, W>,
        parcel: &Parcel,
        arena: &mut [u8],
    ) -> Option<()> {
        let Parcel { packet, offload, start, now_ms } = parcel;
        let start = *start;
        let total = usize::from(packet.total_len);
        let mtu = usize::from(route.peer.mtu());
        let bytes = arena.get(start..start + total)?;
        let super_packet = match *offload {
            Offload::Segment(gso) if packet.protocol == ip::protocol::TCP => Some(gso),
            // no IPv6 sender goes below (RFC 8201 §4), whatever it is told
            _ if packet.is_v6() && mtu < V6_MIN_MTU && total <= V6_MIN_MTU => {
                self.whole.clear();
                self.whole.extend_from_slice(bytes);
                if let Offload::Checksum { start: from, offset } = *offload {
                    segment::complete_checksum(packet, &mut self.whole, from, offset)?;
                }
                Gso::of_segment(packet, &self.whole)
            }
            _ => None,
        };
        if let Some(gso) = super_packet.filter(|gso| gso.header_len + 8 <= mtu) {
            let smaller = Gso { size: mtu - gso.header_len, ..gso };
            let extra = smaller.segments() - gso.segments();
            self.segment(route, parcel, smaller, bytes)?;
            self.originated(route, extra);
            return Some(());
        }
        let may_fragment = !packet.is_v6() && {
            let (header, _) = ip::V4::ref_from_prefix(bytes).ok()?;
            header.flags_offset.get() & ip::V4_DF == 0
        };
        match *offload {
            Offload::None if may_fragment => return self.fragment(route, parcel, arena),
            Offload::Checksum { start: from, offset } if may_fragment => {
                segment::complete_checksum(packet, arena.get_mut(start..start + total)?, from, offset)?;
                return self.fragment(route, parcel, arena);
            }
            _ => {}
        }
        let told = if packet.is_v6() { mtu.max(V6_MIN_MTU) } else { mtu };
        let bytes = arena.get(start..start + total)?;
        self.answer(*now_ms, |room| icmp::too_big(packet, bytes, told as u16, room));
        None
    }

    /// Fragments an IPv4 packet (RFC 791 §3.2).
    fn fragment<'t, W: Way<'t>>(&mut self, route: &mut Route<'t, W>, parcel: &Parcel, arena: &[u8]) -> Option<()> {
        let Parcel { packet, start, now_ms, .. } = parcel;
        let Route { peer, key, endpoint, way } = &mut *route;
        let bytes = arena.get(*start..start + usize::from(packet.total_len))?;
        let (header, payload) = bytes.split_at_checked(usize::from(packet.header_len))?;
        let (fixed, options) = ip::V4::ref_from_prefix(header).ok()?;
        let room = usize::from(peer.mtu()).checked_sub(header.len())? & !7;
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
            made += 1;
            if let Some(session) = way.session() {
                self.whole.clear();
                self.whole.extend_from_slice(slab.get(at + ENCAPSULATION..)?);
                self.whole.extend_from_slice(part);
                slab.truncate(at);
                seal(&mut self.batch, *key, *endpoint, session, *now_ms, packet.tos, &self.whole)?;
                continue;
            }
            let header_len = ENCAPSULATION + header.len();
            let pieces = [
                Piece::Slab { at: at as u32, len: header_len as u32 },
                Piece::Payload { at: (start + header.len() + index * room) as u32, len: part.len() as u32 },
            ];
            let whole = header_len + part.len();
            let run = self.batch.open(*key, *endpoint, packet.tos, whole);
            run.push(whole, header.len() + part.len(), &pieces);
        }
        self.originated(route, made.saturating_sub(1));
        Some(())
    }
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
