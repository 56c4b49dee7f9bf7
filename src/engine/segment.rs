//! Cutting a super-packet into segments: each is written whole, its payload copied in the pass that sums it.
//!
//! The copy costs less than it saves: the send call that would gather header and payload of each segment from two places
//! takes half as long again as one that finds all of them in a row.
//!
//! What comes out is what the kernel's own segmentation sends (`tcp_gso_segment`, `__udp_gso_segment`,
//! `inet_gso_segment`): ids count up, CWR goes with the first segment, FIN and PSH with the last, the last may be short.

use zerocopy::{FromBytes, IntoBytes};

use crate::wire::checksum::Sum;
use crate::wire::ip::{self, Packet, protocol};
use crate::wire::transport::{self, Tcp, Udp, flags, is_signed};
use crate::wire::vnet_hdr::{self, VnetHdr};

/// How a super-packet is to be cut, checked against the packet itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// Bytes of IP and transport header: what each segment starts with.
    pub header_len: usize,
    /// Payload bytes of each segment but the last.
    pub size: usize,
    /// Payload bytes of all.
    pub payload_len: usize,
}

impl Gso {
    /// A TCP segment that was not meant to be cut, as a super-packet of one. `None` for all else, and for one that carries a
    /// signature of its bytes (RFC 2385, RFC 5925) or whose checksum is wrong: what was damaged must not look sound.
    pub fn of_segment(packet: &Packet, bytes: &[u8]) -> Option<Gso> {
        let ip_len = usize::from(packet.header_len);
        if packet.protocol != protocol::TCP || packet.fragment {
            return None;
        }
        let transport = bytes.get(ip_len..usize::from(packet.total_len))?;
        if !packet.pseudo_sum(transport.len() as u16).bytes(transport).is_valid() {
            return None;
        }
        let (tcp, rest) = Tcp::ref_from_prefix(transport).ok()?;
        let transport_len = tcp.header_len();
        let options = rest.get(..transport_len.checked_sub(transport::TCP_MIN_LEN)?)?;
        let header_len = ip_len + transport_len;
        let payload_len = usize::from(packet.total_len).checked_sub(header_len).filter(|len| *len > 0)?;
        (!is_signed(options)).then_some(Gso { header_len, size: payload_len, payload_len })
    }

    /// How many segments come out, at least one.
    pub fn segments(&self) -> usize {
        self.payload_len.div_ceil(self.size).max(1)
    }

    /// Bytes of the longest segment's IP packet.
    pub fn packet_len(&self) -> usize {
        self.header_len + self.size.min(self.payload_len)
    }
}

/// What the offload header asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// The packet is complete.
    None,
    /// One packet, whose checksum from `start` on goes to `start + offset`.
    Checksum {
        /// First byte that the checksum covers, from the start of the packet.
        start: usize,
        /// Where it goes, from `start`.
        offset: usize,
    },
    /// A super-packet.
    Segment(Gso),
}

/// The offload header contradicts the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the offload header contradicts the packet")]
pub struct BadOffload;

impl Offload {
    /// Reads what `vnet` asks for, believing nothing that `packet` (whose bytes are `bytes`) does not confirm.
    #[inline]
    pub fn of(vnet: &VnetHdr, packet: &Packet, bytes: &[u8]) -> Result<Offload, BadOffload> {
        let (start, offset) = (usize::from(vnet.csum_start()), usize::from(vnet.csum_offset()));
        let needs_csum = vnet.flags & vnet_hdr::NEEDS_CSUM != 0;
        let expected = match vnet.gso_type & !vnet_hdr::GSO_ECN {
            vnet_hdr::GSO_NONE if !needs_csum => return Ok(Offload::None),
            vnet_hdr::GSO_NONE => {
                let behind_ip = start >= usize::from(packet.header_len);
                let inside = behind_ip && start + offset + 2 <= usize::from(packet.total_len);
                return if inside { Ok(Offload::Checksum { start, offset }) } else { Err(BadOffload) };
            }
            vnet_hdr::GSO_TCPV4 if !packet.is_v6() => (protocol::TCP, transport::TCP_CHECKSUM),
            vnet_hdr::GSO_TCPV6 if packet.is_v6() => (protocol::TCP, transport::TCP_CHECKSUM),
            vnet_hdr::GSO_UDP_L4 => (protocol::UDP, transport::UDP_CHECKSUM),
            _ => return Err(BadOffload),
        };
        let ip_len = usize::from(packet.header_len);
        if packet.fragment || !needs_csum || (packet.protocol, offset) != expected || start != ip_len {
            return Err(BadOffload);
        }
        let transport_len = match packet.protocol {
            protocol::TCP => {
                let (tcp, _) = Tcp::ref_from_prefix(bytes.get(ip_len..).unwrap_or_default()).map_err(|_| BadOffload)?;
                tcp.header_len()
            }
            _ => transport::UDP_LEN,
        };
        let header_len = ip_len + transport_len;
        let payload_len = usize::from(packet.total_len).checked_sub(header_len).ok_or(BadOffload)?;
        let size = usize::from(vnet.gso_size());
        if transport_len < transport::UDP_LEN
            || (packet.protocol == protocol::TCP && transport_len < transport::TCP_MIN_LEN)
            || size == 0
        {
            return Err(BadOffload);
        }
        Ok(Offload::Segment(Gso { header_len, size, payload_len }))
    }
}

/// Computes the checksum of one packet in place; the field holds the pseudo-header's sum.
#[inline]
pub fn complete_checksum(packet: &Packet, bytes: &mut [u8], start: usize, offset: usize) -> Option<()> {
    let covered = bytes.get_mut(start..usize::from(packet.total_len))?;
    let check = Sum::default().bytes(covered).finish();
    let check = if packet.protocol == protocol::UDP { no_zero(check) } else { check };
    covered.get_mut(offset..offset + 2)?.copy_from_slice(&check);
    Some(())
}

/// Makes the headers of a packet those of a super-packet of `whole` bytes: its lengths, and for a checksum the
/// pseudo-header's sum. Over IPv4 what is longer than 64 KiB gets no length (BIG TCP), so that its receiver takes the packet's own.
#[inline]
pub fn set_length(packet: &Packet, headers: &mut [u8], whole: usize) -> Option<()> {
    let (ip_header, rest) = headers.split_at_mut_checked(usize::from(packet.header_len))?;
    let total = u16::try_from(whole).unwrap_or(0);
    let length = whole.checked_sub(ip_header.len())?;
    if packet.is_v6() {
        let (header, _) = ip::V6::mut_from_prefix(ip_header).ok()?;
        header.payload_len = total.checked_sub(ip::V6_LEN as u16)?.into();
    } else {
        let (header, options) = ip::V4::mut_from_prefix(ip_header).ok()?;
        header.total_len = total.into();
        header.checksum = [0; 2];
        header.checksum = Sum::default().bytes(header.as_bytes()).bytes(options).finish();
    }
    let pseudo = packet.pseudo_sum(length as u16).add_u16((length >> 16) as u16).fold();
    if packet.protocol == protocol::TCP {
        Tcp::mut_from_prefix(rest).ok()?.0.checksum = pseudo;
    } else {
        let (header, _) = Udp::mut_from_prefix(rest).ok()?;
        (header.length, header.checksum) = ((length as u16).into(), pseudo);
    }
    Some(())
}

/// A UDP checksum of zero would mean that there is none (RFC 768).
#[inline]
pub fn no_zero(check: [u8; 2]) -> [u8; 2] {
    if check == [0, 0] { [0xff, 0xff] } else { check }
}

/// Writes one segment after another.
#[derive(Debug)]
pub struct Segmenter<'a> {
    headers: &'a [u8],
    gso: Gso,
    v6: bool,
    tcp: bool,
    transport: usize,
    ip_sum: Sum,
    id: u16,
    transport_sum: Sum,
    sequence: u32,
    flags: u8,
}

impl<'a> Segmenter<'a> {
    /// A segmenter for the super-packet `packet` whose bytes start with `headers` (`gso.header_len` bytes at least).
    #[inline]
    pub fn new(packet: &Packet, gso: Gso, bytes: &'a [u8]) -> Option<Self> {
        let headers = bytes.get(..gso.header_len)?;
        let transport = usize::from(packet.header_len);
        let (ip_header, transport_header) = headers.split_at_checked(transport)?;
        let (tcp, v6) = (packet.protocol == protocol::TCP, packet.is_v6());
        let (mut id, mut ip_sum) = (0, Sum::default());
        if !v6 {
            let (header, options) = ip::V4::ref_from_prefix(ip_header).ok()?;
            id = header.id.get();
            let fixed = ip::V4 { total_len: 0.into(), id: 0.into(), checksum: [0; 2], ..*header };
            ip_sum = Sum::default().bytes(fixed.as_bytes()).bytes(options);
        }
        let pseudo = packet.pseudo_sum(0);
        let (mut sequence, mut tcp_flags) = (0, 0);
        let transport_sum = if tcp {
            let (header, options) = Tcp::ref_from_prefix(transport_header).ok()?;
            (sequence, tcp_flags) = (header.sequence.get(), header.flags);
            let fixed = Tcp { sequence: 0.into(), flags: 0, checksum: [0; 2], ..*header };
            pseudo.bytes(fixed.as_bytes()).bytes(options)
        } else {
            pseudo.bytes(transport_header.get(..4)?)
        };
        Some(Segmenter { headers, gso, v6, tcp, transport, ip_sum, id, transport_sum, sequence, flags: tcp_flags })
    }

    /// Payload bytes of segment `index`.
    #[inline]
    pub fn payload_len(&self, index: usize) -> usize {
        self.gso.payload_len.saturating_sub(index * self.gso.size).min(self.gso.size)
    }

    /// Appends segment `index`, whose payload is `payload`, to `out`.
    #[inline]
    pub fn write(&self, index: usize, payload: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let at = out.len();
        let total = (self.gso.header_len + payload.len()) as u16;
        let length = total - self.transport as u16;
        out.reserve(usize::from(total));
        out.extend_from_slice(self.headers);
        let sum = self.transport_sum.copied(payload, out).add_u16(length);
        let headers = out.get_mut(at..)?;
        let (ip_header, transport) = headers.split_at_mut_checked(self.transport)?;
        if self.v6 {
            let length = total - ip::V6_LEN as u16;
            put(ip_header, 4, length.to_be_bytes())?;
        } else {
            let id = self.id.wrapping_add(index as u16);
            let check = self.ip_sum.add_u16(total).add_u16(id).finish();
            put(ip_header, 2, total.to_be_bytes())?;
            put(ip_header, 4, id.to_be_bytes())?;
            put(ip_header, 10, check)?;
        }
        if self.tcp {
            let sequence = self.sequence.wrapping_add((index * self.gso.size) as u32).to_be_bytes();
            let mut tcp_flags = self.flags;
            if index > 0 {
                tcp_flags &= !flags::CWR;
            }
            if index + 1 < self.gso.segments() {
                tcp_flags &= !(flags::FIN | flags::PSH);
            }
            let check = sum.bytes(&sequence).add_bytes([0, tcp_flags]).finish();
            put(transport, 4, sequence)?;
            put(transport, 13, [tcp_flags])?;
            put(transport, transport::TCP_CHECKSUM, check)?;
        } else {
            let check = no_zero(sum.add_u16(length).finish());
            put(transport, 4, length.to_be_bytes())?;
            put(transport, transport::UDP_CHECKSUM, check)?;
        }
        Some(())
    }
}

#[inline]
fn put<const N: usize>(out: &mut [u8], at: usize, bytes: [u8; N]) -> Option<()> {
    *out.get_mut(at..)?.first_chunk_mut()? = bytes;
    Some(())
}
