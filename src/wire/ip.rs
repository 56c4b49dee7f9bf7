//! IPv4 (RFC 791 §3.1) and IPv6 (RFC 8200 §3, extension headers §4).
//!
//! [`Packet::parse`] reads either into the few facts that forwarding needs: lengths that were checked, addresses, where
//! the transport header starts, whether the packet is a fragment.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::Sum;

/// Bytes of an IPv4 header without options.
pub const V4_MIN_LEN: usize = 20;
/// Bytes of the fixed IPv6 header.
pub const V6_LEN: usize = 40;
/// Don't Fragment, in the flags and offset field.
pub const V4_DF: u16 = 0x4000;
/// More Fragments.
pub const V4_MF: u16 = 0x2000;
/// The fragment offset's bits.
pub const V4_OFFSET: u16 = 0x1fff;

/// Protocol numbers (IANA; RFC 8200 §4 for the extension headers).
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
}

/// An IPv4 header without its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct V4 {
    /// Version in the upper half, header length in 32-bit words in the lower.
    pub version_ihl: u8,
    /// DSCP (RFC 2474) and, in the lower two bits, ECN (RFC 3168).
    pub tos: u8,
    /// Bytes of header and payload.
    pub total_len: U16,
    /// Identification.
    pub id: U16,
    /// [`V4_DF`], [`V4_MF`] and the fragment offset.
    pub flags_offset: U16,
    /// Time to live.
    pub ttl: u8,
    /// What follows.
    pub protocol: u8,
    /// Checksum over the header.
    pub checksum: [u8; 2],
    /// Source address.
    pub source: [u8; 4],
    /// Destination address.
    pub destination: [u8; 4],
}

/// The fixed IPv6 header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct V6 {
    /// Version (4 bits), traffic class (8) and flow label (20).
    pub version_class_flow: U32,
    /// Bytes behind this header.
    pub payload_len: U16,
    /// What follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
}

impl V6 {
    /// Traffic class: DSCP and ECN, as `tos` of IPv4.
    #[inline]
    pub fn traffic_class(&self) -> u8 {
        (self.version_class_flow.get() >> 20) as u8
    }
}

/// What forwarding needs to know of one IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Bytes of the packet, at most as many as were given.
    pub total_len: u16,
    /// Bytes of the IP header with options and extension headers; where the transport header starts.
    pub header_len: u16,
    /// The transport protocol: what follows the headers.
    pub protocol: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Whether this is a fragment, so that no transport header may be read or the checksum does not cover it.
    pub fragment: bool,
}

/// Why bytes are no IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Neither version 4 nor 6.
    #[error("IP version is neither 4 nor 6")]
    Version,
    /// The header or the packet is longer than the bytes there are, or its lengths contradict each other.
    #[error("a length points outside the packet")]
    Length,
    /// More extension headers than anybody sends.
    #[error("too many extension headers")]
    Extensions,
}

/// Nobody sends more; a chain of tiny headers must not cost time.
const MAX_EXTENSIONS: usize = 8;

impl Packet {
    /// Reads the packet at the front of `bytes`; what is behind its own length is padding.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Packet, Malformed> {
        match bytes.first().map(|first| first >> 4) {
            Some(4) => parse_v4(bytes),
            Some(6) => parse_v6(bytes),
            Some(_) => Err(Malformed::Version),
            None => Err(Malformed::Length),
        }
    }

    /// Bytes behind the IP header.
    #[inline]
    pub fn payload_len(&self) -> u16 {
        self.total_len.saturating_sub(self.header_len)
    }

    /// The sum of the transport's pseudo-header for a payload of that length.
    #[inline]
    pub fn pseudo_sum(&self, length: u16) -> Sum {
        match (&self.source, &self.destination) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => Sum::pseudo_v4(*src, *dst, self.protocol, length),
            (IpAddr::V6(src), IpAddr::V6(dst)) => Sum::pseudo_v6(src, dst, self.protocol, length),
            _ => Sum::default(), // parse() never mixes families
        }
    }

    /// Whether the packet is IPv6.
    #[inline]
    pub fn is_v6(&self) -> bool {
        self.source.is_ipv6()
    }
}

#[inline]
fn parse_v4(bytes: &[u8]) -> Result<Packet, Malformed> {
    let (header, _) = V4::ref_from_prefix(bytes).map_err(|_| Malformed::Length)?;
    let header_len = usize::from(header.version_ihl & 0x0f) * 4;
    let total_len = usize::from(header.total_len.get());
    if header_len < V4_MIN_LEN || total_len < header_len || total_len > bytes.len() {
        return Err(Malformed::Length);
    }
    Ok(Packet {
        source: IpAddr::V4(Ipv4Addr::from(header.source)),
        destination: IpAddr::V4(Ipv4Addr::from(header.destination)),
        total_len: total_len as u16,
        header_len: header_len as u16,
        protocol: header.protocol,
        tos: header.tos,
        fragment: header.flags_offset.get() & (V4_MF | V4_OFFSET) != 0,
    })
}

#[inline]
fn parse_v6(bytes: &[u8]) -> Result<Packet, Malformed> {
    let (header, rest) = V6::ref_from_prefix(bytes).map_err(|_| Malformed::Length)?;
    let payload_len = usize::from(header.payload_len.get());
    let total_len = u16::try_from(V6_LEN + payload_len).map_err(|_| Malformed::Length)?;
    let payload = rest.get(..payload_len).ok_or(Malformed::Length)?;
    let (protocol, extensions, fragment) = skip_extensions(header.next_header, payload)?;
    Ok(Packet {
        source: IpAddr::V6(Ipv6Addr::from(header.source)),
        destination: IpAddr::V6(Ipv6Addr::from(header.destination)),
        total_len,
        header_len: (V6_LEN + extensions) as u16,
        protocol,
        tos: header.traffic_class(),
        fragment,
    })
}

/// Walks the extension headers (RFC 8200 §4) and returns the transport protocol, the bytes walked over and whether a
/// fragment header was among them.
#[inline]
fn skip_extensions(first: u8, payload: &[u8]) -> Result<(u8, usize, bool), Malformed> {
    let (mut next, mut at) = (first, 0usize);
    for _ in 0..MAX_EXTENSIONS {
        let unit = match next {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION => 8,
            protocol::AUTHENTICATION => 4, // RFC 4302 §2.2: in 4-byte units, minus two
            protocol::FRAGMENT => 0,
            _ => return Ok((next, at, false)),
        };
        let Some([following, length]) = payload.get(at..at + 2).and_then(|two| two.first_chunk()) else {
            return Err(Malformed::Length);
        };
        let bytes = match unit {
            0 => 8,
            4 => (usize::from(*length) + 2) * 4,
            _ => (usize::from(*length) + 1) * 8,
        };
        at += bytes;
        if at > payload.len() {
            return Err(Malformed::Length);
        }
        if next == protocol::FRAGMENT {
            // what follows the fragment header belongs to the first fragment only: nothing more is read
            return Ok((*following, at, true));
        }
        next = *following;
    }
    Err(Malformed::Extensions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4_OPTIONS: &[u8] = b"\x46\xb9\x00\x1c\x12\x34\x40\x00\x3f\x11\x00\x00\x0a\x2a\x01\x01\x0a\x2a\x02\x02\
        \x94\x04\x00\x00data";

    #[test]
    fn literal_ipv4_with_options() {
        let packet = Packet::parse(V4_OPTIONS).unwrap();
        assert_eq!(packet.source, "10.42.1.1".parse::<IpAddr>().unwrap());
        assert_eq!(packet.destination, "10.42.2.2".parse::<IpAddr>().unwrap());
        assert_eq!((packet.total_len, packet.header_len, packet.payload_len()), (28, 24, 4));
        assert_eq!((packet.protocol, packet.tos, packet.fragment), (protocol::UDP, 0xb9, false));
    }

    #[test]
    fn ipv4_fragments_are_told() {
        for (field, fragment) in [([0x40, 0], false), ([0x20, 0], true), ([0, 1], true), ([0x60, 0], true)] {
            let mut bytes = V4_OPTIONS.to_vec();
            bytes[6..8].copy_from_slice(&field);
            assert_eq!(Packet::parse(&bytes).unwrap().fragment, fragment, "{field:?}");
        }
    }

    #[test]
    fn ipv4_lengths_that_lie() {
        assert_eq!(Packet::parse(&[]), Err(Malformed::Length));
        assert_eq!(Packet::parse(&V4_OPTIONS[..27]), Err(Malformed::Length));
        for (at, value) in [(0, 0x44), (0, 0x4f), (3, 23), (2, 0xff)] {
            let mut bytes = V4_OPTIONS.to_vec();
            bytes[at] = value;
            assert_eq!(Packet::parse(&bytes), Err(Malformed::Length), "{at} {value}");
        }
        let mut bytes = V4_OPTIONS.to_vec();
        bytes[0] = 0x56;
        assert_eq!(Packet::parse(&bytes), Err(Malformed::Version));
        bytes[0] = 0x46;
        bytes.extend([0; 18]); // Ethernet padding
        assert_eq!(Packet::parse(&bytes).unwrap().total_len, 28);
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x6b, 0x90, 0x00, 0x05, 0, payload.len() as u8, next, 64];
        bytes.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        bytes.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn literal_ipv6_with_extension_headers() {
        let packet = Packet::parse(&v6(17, b"\x00\x01\x00\x02\x00\x08\x00\x00")).unwrap();
        assert_eq!((packet.total_len, packet.header_len, packet.protocol, packet.tos), (48, 40, 17, 0xb9));
        // hop-by-hop of 8, destination options of 16, then TCP
        let mut chain = vec![60, 0, 1, 4, 0, 0, 0, 0, 6, 1, 1, 12];
        chain.extend([0; 12]);
        chain.extend([0; 20]);
        let packet = Packet::parse(&v6(0, &chain)).unwrap();
        assert_eq!((packet.header_len, packet.protocol, packet.fragment), (64, 6, false));
        let packet = Packet::parse(&v6(44, &[17, 0, 0, 1, 0, 0, 0, 9, 1, 2])).unwrap();
        assert_eq!((packet.header_len, packet.protocol, packet.fragment), (48, 17, true));
        // authentication header of (4 + 2) * 4 bytes
        let mut chain = vec![6, 4];
        chain.extend([0; 42]);
        assert_eq!(Packet::parse(&v6(51, &chain)).unwrap().header_len, 64);
    }

    #[test]
    fn ipv6_lengths_that_lie() {
        let good = v6(17, &[0; 8]);
        assert_eq!(Packet::parse(&good[..47]), Err(Malformed::Length));
        assert_eq!(Packet::parse(&good[..39]), Err(Malformed::Length));
        assert_eq!(Packet::parse(&v6(0, &[6, 3, 0, 0, 0, 0, 0, 0])), Err(Malformed::Length));
        assert_eq!(Packet::parse(&v6(0, &[6])), Err(Malformed::Length));
        assert_eq!(Packet::parse(&v6(0, &[0; 80])), Err(Malformed::Extensions));
    }
}
