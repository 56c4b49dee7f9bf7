//! What the engine is measured against: packets are built, parsed, cut and checksummed here by the book, a byte at a time
//! and without a line of the engine's code, so that both would have to be wrong in the same way.

#![allow(dead_code, reason = "each test that includes this uses its own part")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const VNET: usize = 10;
pub(crate) const GSO_TCPV4: u8 = 1;
pub(crate) const GSO_TCPV6: u8 = 4;
pub(crate) const GSO_UDP: u8 = 5;
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const ECE: u8 = 0x40;
pub(crate) const CWR: u8 = 0x80;

/// SplitMix64: small, and every seed is a good one.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// `from` to `to`, both included.
    pub(crate) fn range(&mut self, from: usize, to: usize) -> usize {
        from + self.below(to + 1 - from)
    }

    pub(crate) fn per_mille(&mut self, chance: u32) -> bool {
        self.below(1000) < chance as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

/// RFC 1071, a word at a time; the folded sum, not complemented.
pub(crate) fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        let (pairs, odd) = part.as_chunks();
        sum += pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum::<u64>();
        sum += odd.first().map_or(0, |byte| u64::from(*byte) << 8);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a packet is, read by the book.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) v6: bool,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) total: usize,
    /// Where the transport header starts.
    pub(crate) l4: usize,
    pub(crate) protocol: u8,
    pub(crate) tos: u8,
    pub(crate) fragment: bool,
    pub(crate) df: bool,
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

pub(crate) fn look(bytes: &[u8]) -> Option<Look> {
    match bytes.first()? >> 4 {
        4 => {
            let l4 = usize::from(bytes[0] & 15) * 4;
            if bytes.len() < 20 {
                return None;
            }
            let total = usize::from(be16(bytes, 2));
            if l4 < 20 || total < l4 || total > bytes.len() {
                return None;
            }
            let address = |at: usize| IpAddr::V4(Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]));
            Some(Look {
                v6: false,
                source: address(12),
                destination: address(16),
                total,
                l4,
                protocol: bytes[9],
                tos: bytes[1],
                fragment: be16(bytes, 6) & 0x3fff != 0,
                df: be16(bytes, 6) & 0x4000 != 0,
            })
        }
        6 => {
            if bytes.len() < 40 {
                return None;
            }
            let total = 40 + usize::from(be16(bytes, 4));
            if total > bytes.len() || total > 65_535 {
                return None;
            }
            let (mut l4, mut next, mut fragment) = (40, bytes[6], false);
            for headers in 0.. {
                let len = match next {
                    0 | 43 | 60 | 51 | 44 if headers == 8 || l4 + 2 > total => return None,
                    0 | 43 | 60 => 8 * (usize::from(bytes[l4 + 1]) + 1),
                    51 => 4 * (usize::from(bytes[l4 + 1]) + 2),
                    44 => 8,
                    _ if headers == 8 => return None,
                    _ => break,
                };
                fragment = next == 44;
                next = bytes[l4];
                l4 += len;
                if l4 > total {
                    return None;
                }
                if fragment {
                    break;
                }
            }
            let address = |at: usize| {
                let octets: [u8; 16] = bytes[at..at + 16].try_into().unwrap();
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            Some(Look {
                v6: true,
                source: address(8),
                destination: address(24),
                total,
                l4,
                protocol: next,
                tos: bytes[0] << 4 | bytes[1] >> 4,
                fragment,
                df: true,
            })
        }
        _ => None,
    }
}

/// Where a transport protocol keeps its checksum.
pub(crate) fn check_offset(protocol: u8) -> usize {
    if protocol == TCP { 16 } else { 6 }
}

pub(crate) fn pseudo(packet: &[u8], look: &Look, length: usize) -> u16 {
    let addresses = if look.v6 { &packet[8..40] } else { &packet[12..20] };
    sum(&[addresses, &[0, look.protocol], &(length as u32).to_be_bytes()])
}

/// The sum over pseudo-header and transport: all ones in an intact packet.
pub(crate) fn l4_sum(packet: &[u8], look: &Look) -> u16 {
    let rest = &packet[look.l4..look.total];
    sum(&[&pseudo(packet, look, rest.len()).to_be_bytes(), rest])
}

/// Computes the transport checksum.
pub(crate) fn finish_l4(packet: &mut [u8]) {
    let look = look(packet).expect("a packet of ours");
    let at = look.l4 + check_offset(look.protocol);
    put16(packet, at, 0);
    let check = !l4_sum(packet, &look);
    put16(packet, at, if check == 0 && look.protocol == UDP { 0xffff } else { check });
}

/// Leaves the transport checksum to be computed by whoever sends the packet.
pub(crate) fn unfinish_l4(packet: &mut [u8]) {
    let look = look(packet).expect("a packet of ours");
    let sum = pseudo(packet, &look, look.total - look.l4);
    put16(packet, look.l4 + check_offset(look.protocol), sum);
}

pub(crate) fn finish_ip(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        let len = usize::from(packet[0] & 15) * 4;
        put16(packet, 10, 0);
        let check = !sum(&[&packet[..len]]);
        put16(packet, 10, check);
    }
}

/// What an IP header says besides its addresses.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) id: u16,
    /// Flags and fragment offset of IPv4.
    pub(crate) frag: u16,
    /// IPv4 options, or the body of an IPv6 extension header chain, whose first header is `extension`.
    pub(crate) options: Vec<u8>,
    pub(crate) extension: u8,
}

impl Head {
    pub(crate) fn new(source: IpAddr, destination: IpAddr) -> Self {
        Head { source, destination, tos: 0, ttl: 64, id: 0, frag: 0x4000, options: Vec::new(), extension: 0 }
    }

    pub(crate) fn packet(&self, protocol: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let len = 20 + self.options.len();
                packet.extend([0x40 | (len / 4) as u8, self.tos]);
                packet.extend(((len + rest.len()) as u16).to_be_bytes());
                packet.extend(self.id.to_be_bytes());
                packet.extend(self.frag.to_be_bytes());
                packet.extend([self.ttl, protocol, 0, 0]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let next = if self.options.is_empty() { protocol } else { self.extension };
                packet.extend([0x60 | self.tos >> 4, self.tos << 4, 0x0a, 0x0b]);
                packet.extend(((self.options.len() + rest.len()) as u16).to_be_bytes());
                packet.extend([next, self.ttl]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
            }
            _ => panic!("two families"),
        }
        packet.extend(&self.options);
        packet.extend(rest);
        finish_ip(&mut packet);
        packet
    }
}

#[derive(Debug, Clone)]
pub(crate) struct TcpHead {
    pub(crate) ports: (u16, u16),
    pub(crate) sequence: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) options: Vec<u8>,
}

impl TcpHead {
    pub(crate) fn bytes(&self, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.ports.0.to_be_bytes());
        out.extend(self.ports.1.to_be_bytes());
        out.extend(self.sequence.to_be_bytes());
        out.extend(self.ack.to_be_bytes());
        out.extend([((20 + self.options.len()) / 4 * 16) as u8, self.flags]);
        out.extend(self.window.to_be_bytes());
        out.extend([0; 4]);
        out.extend(&self.options);
        out.extend(payload);
        out
    }
}

pub(crate) fn udp_bytes(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(ports.0.to_be_bytes());
    out.extend(ports.1.to_be_bytes());
    out.extend((8 + payload.len() as u16).to_be_bytes());
    out.extend([0; 2]);
    out.extend(payload);
    out
}

/// Offload header, then the packet.
pub(crate) fn frame(
    flags: u8,
    gso_type: u8,
    hdr_len: usize,
    size: usize,
    start: usize,
    offset: usize,
    packet: &[u8],
) -> Vec<u8> {
    let mut out = vec![flags, gso_type];
    for value in [hdr_len, size, start, offset] {
        out.extend((value as u16).to_ne_bytes());
    }
    out.extend(packet);
    out
}

/// A packet that needs nothing.
pub(crate) fn plain_frame(packet: &[u8]) -> Vec<u8> {
    frame(0, 0, 0, 0, 0, 0, packet)
}

/// A packet whose checksum is still to be computed.
pub(crate) fn unfinished_frame(packet: &mut [u8]) -> Vec<u8> {
    unfinish_l4(packet);
    let look = look(packet).expect("a packet of ours");
    frame(1, 0, 0, 0, look.l4, check_offset(look.protocol), packet)
}

/// A super-packet.
pub(crate) fn super_frame(packet: &mut [u8], size: usize, ecn: bool) -> Vec<u8> {
    unfinish_l4(packet);
    let look = look(packet).expect("a packet of ours");
    let kind = match (look.protocol, look.v6) {
        (UDP, _) => GSO_UDP,
        (_, false) => GSO_TCPV4,
        (_, true) => GSO_TCPV6,
    };
    let kind = if ecn { kind | 0x80 } else { kind };
    frame(1, kind, l4_end(packet, &look), size, look.l4, check_offset(look.protocol), packet)
}

/// Where the payload starts.
pub(crate) fn l4_end(packet: &[u8], look: &Look) -> usize {
    look.l4 + if look.protocol == TCP { usize::from(packet[look.l4 + 12] >> 4) * 4 } else { 8 }
}

/// Cuts a super-packet as `tcp_gso_segment` and `__udp_gso_segment` do.
pub(crate) fn cut(packet: &[u8], size: usize) -> Vec<Vec<u8>> {
    let look = look(packet).expect("a packet of ours");
    let end = l4_end(packet, &look);
    let payload = &packet[end..look.total];
    let count = payload.len().div_ceil(size).max(1);
    let mut out = Vec::new();
    for index in 0..count {
        let part = &payload[(index * size).min(payload.len())..((index + 1) * size).min(payload.len())];
        let mut piece = packet[..end].to_vec();
        piece.extend(part);
        let total = piece.len();
        if look.v6 {
            put16(&mut piece, 4, (total - 40) as u16);
        } else {
            put16(&mut piece, 2, total as u16);
            put16(&mut piece, 4, be16(packet, 4).wrapping_add(index as u16));
        }
        if look.protocol == TCP {
            let sequence = be32(packet, look.l4 + 4).wrapping_add((index * size) as u32);
            piece[look.l4 + 4..look.l4 + 8].copy_from_slice(&sequence.to_be_bytes());
            if index > 0 {
                piece[look.l4 + 13] &= !CWR;
            }
            if index + 1 < count {
                piece[look.l4 + 13] &= !(FIN | PSH);
            }
        } else {
            put16(&mut piece, look.l4 + 4, (total - look.l4) as u16);
        }
        finish_ip(&mut piece);
        finish_l4(&mut piece);
        out.push(piece);
    }
    out
}

/// Fragments an IPv4 packet to `mtu` (RFC 791 §3.2); options without the copied flag stay with the first.
pub(crate) fn fragments(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    let header = usize::from(packet[0] & 15) * 4;
    let room = (mtu - header) / 8 * 8;
    let payload = &packet[header..usize::from(be16(packet, 2))];
    let field = be16(packet, 6);
    let parts: Vec<_> = payload.chunks(room).collect();
    let last = parts.len() - 1;
    let piece = |(index, part): (usize, &&[u8])| {
        let mut piece = packet[..header].to_vec();
        piece.extend(*part);
        let total = piece.len() as u16;
        put16(&mut piece, 2, total);
        let more = if index < last { 0x2000 } else { 0 };
        let mut at = 20;
        while index > 0 && at < header && piece[at] != 0 {
            let len = if piece[at] == 1 { 1 } else { usize::from(*piece.get(at + 1).unwrap_or(&0)) };
            if len == 0 || at + len > header {
                break;
            }
            if piece[at] & 0x80 == 0 {
                piece[at..at + len].fill(1);
            }
            at += len;
        }
        put16(&mut piece, 6, (field & 0xe000 | more) | ((field & 0x1fff) + (index * room / 8) as u16));
        finish_ip(&mut piece);
        piece
    };
    parts.iter().enumerate().map(piece).collect()
}

/// What a kernel makes of a frame that is written to its TUN device: one or more finished packets. Whatever the offload
/// header and the packet disagree about is an error.
pub(crate) fn unwrap(frame: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    if frame.len() > VNET + usize::from(u16::MAX) {
        let parts = shorter(frame)?.iter().map(|part| unwrap(part)).collect::<Result<Vec<_>, _>>()?;
        return Ok(parts.concat());
    }
    if frame.len() < VNET {
        return Err("a frame without an offload header".to_owned());
    }
    let (vnet, packet) = frame.split_at(VNET);
    let number = |at: usize| usize::from(u16::from_ne_bytes([vnet[at], vnet[at + 1]]));
    let (hdr_len, size, start, offset) = (number(2), number(4), number(6), number(8));
    let seen = look(packet);
    if vnet[0] & 1 == 0 {
        return if vnet[1] == 0 { Ok(vec![packet.to_vec()]) } else { Err("GSO without NEEDS_CSUM".to_owned()) };
    }
    let look = seen.ok_or("an offload header before what is no packet")?;
    if look.total != packet.len() || start != look.l4 || offset != check_offset(look.protocol) || look.fragment {
        return Err(format!("the offload header points to {start}+{offset} of {look:?}, {} bytes", packet.len()));
    }
    let field = be16(packet, start + offset);
    if field != pseudo(packet, &look, look.total - look.l4) && !(look.protocol == UDP && field == 0xffff) {
        return Err(format!("{field:04x} is not the sum of the pseudo-header of {look:?}"));
    }
    if vnet[1] == 0 {
        let mut packet = packet.to_vec();
        finish_l4(&mut packet);
        return Ok(vec![packet]);
    }
    let expected = match (look.protocol, look.v6) {
        (TCP, false) => GSO_TCPV4,
        (TCP, true) => GSO_TCPV6,
        (UDP, _) => GSO_UDP,
        _ => return Err("GSO of another protocol".to_owned()),
    };
    if vnet[1] & 0x7f != expected || hdr_len != l4_end(packet, &look) || size == 0 {
        return Err(format!("gso_type {} hdr_len {hdr_len} size {size} before {look:?}", vnet[1]));
    }
    if !look.v6 && sum(&[&packet[..look.l4]]) != 0xffff {
        return Err("a super-packet with a wrong header checksum".to_owned());
    }
    if look.protocol == UDP && usize::from(be16(packet, look.l4 + 4)) != look.total - look.l4 {
        return Err("a UDP super-packet with another length".to_owned());
    }
    Ok(cut(packet, size))
}

/// A TCP super-packet over IPv4 of more than 64 KiB, which says no length (BIG TCP), as shorter ones that do.
fn shorter(frame: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let (vnet, packet) = frame.split_at(VNET);
    let mut first = packet[..usize::from(u16::MAX)].to_vec();
    put16(&mut first, 2, u16::MAX);
    let look = look(&first).filter(|look| !look.v6 && look.protocol == TCP).ok_or("no TCP over IPv4 is so long")?;
    let head = l4_end(&first, &look);
    let size = usize::from(u16::from_ne_bytes([vnet[4], vnet[5]])).max(1);
    if be16(packet, 2) != 0 || sum(&[&packet[..look.l4]]) != 0xffff || packet.len() > (1 << 18) - 1 {
        return Err(format!("{} bytes that say {}, or with a wrong header checksum", packet.len(), be16(packet, 2)));
    }
    if be16(packet, look.l4 + 16) != pseudo(packet, &look, packet.len() - look.l4) {
        return Err("not the sum of the pseudo-header with all of the length".to_owned());
    }
    let segments = 20_000 / size + 1;
    let payload = &packet[head..];
    let parts = payload.chunks(segments * size).enumerate().map(|(index, chunk)| {
        let mut part = [&packet[..head], chunk].concat();
        let len = part.len();
        put16(&mut part, 2, len as u16);
        put16(&mut part, 4, be16(packet, 4).wrapping_add((index * segments) as u16));
        let sequence = be32(packet, look.l4 + 4).wrapping_add((index * segments * size) as u32);
        part[look.l4 + 4..look.l4 + 8].copy_from_slice(&sequence.to_be_bytes());
        if (index + 1) * segments * size < payload.len() {
            part[look.l4 + 13] &= !(PSH | FIN);
        }
        let sum = pseudo(&part, &look, len - look.l4);
        put16(&mut part, look.l4 + 16, sum);
        finish_ip(&mut part);
        [vnet, &part].concat()
    });
    Ok(parts.collect())
}

/// The packet without PSH: of what is for a node itself it may be missing.
pub(crate) fn without_push(mut packet: Vec<u8>) -> Vec<u8> {
    let Some(seen) = look(&packet).filter(|seen| seen.protocol == TCP && !seen.fragment) else { return packet };
    if seen.total >= seen.l4 + 20 && packet[seen.l4 + 13] & PSH != 0 && l4_sum(&packet, &seen) == 0xffff {
        packet[seen.l4 + 13] &= !PSH;
        finish_l4(&mut packet);
    }
    packet
}

/// A short hash of many packets, to compare runs.
pub(crate) fn digest(packets: &[Vec<u8>]) -> u64 {
    packets.iter().flatten().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}
