//! ICMP errors that a router sends: when a packet does not fit, Fragmentation Needed (RFC 792, next-hop MTU: RFC 1191 §4)
//! and Packet Too Big (RFC 4443 §3.2); when nobody is there to take it, Host Unreachable (RFC 792) and Address Unreachable
//! (RFC 4443 §3.1).

use std::net::IpAddr;

use zerocopy::FromBytes;

use super::checksum::Sum;
use super::ip::{self, Packet};

/// The IPv4 header and 548 bytes of the packet: RFC 1812 §4.3.2.3 asks for as much as fits 576 bytes.
const V4_QUOTE: usize = 576 - ip::V4_MIN_LEN - 8;
/// As much of the packet as fits the minimum MTU: RFC 4443 §3.2.
const V6_QUOTE: usize = 1280 - ip::V6_LEN - 8;
/// Room for the longest error.
pub const MAX_LEN: usize = 1280;

/// Redirect: another gateway for a destination (RFC 792).
pub const V4_REDIRECT: u8 = 5;
/// Router advertisement (RFC 1256 §3).
pub const V4_ROUTER_ADVERTISEMENT: u8 = 9;
/// Router advertisement (RFC 4861 §4.2).
pub const V6_ROUTER_ADVERTISEMENT: u8 = 134;
/// Redirect (RFC 4861 §4.5).
pub const V6_REDIRECT: u8 = 137;

const DESTINATION_UNREACHABLE: u8 = 3;
const HOST_UNREACHABLE: u8 = 1;
const FRAGMENTATION_NEEDED: u8 = 4;
const V6_DESTINATION_UNREACHABLE: u8 = 1;
const ADDRESS_UNREACHABLE: u8 = 3;
const PACKET_TOO_BIG: u8 = 2;

/// Writes to the front of `out` the error that tells the sender of `packet` (whose bytes are `bytes`) that the path takes
/// no more than `mtu` bytes. Returns its length.
///
/// It comes from the packet's own destination, as the kernel's tunnels do it: a packet that arrives from an address of
/// this machine would be dropped as a martian.
///
/// `None` where RFC 1122 §3.2.2 and RFC 4443 §2.4(e) allow no error: about an ICMP error, a fragment other than the
/// first, a multicast or unspecified address, or where `out` is too small.
pub fn too_big(packet: &Packet, bytes: &[u8], mtu: u16, out: &mut [u8]) -> Option<usize> {
    let kind = match packet.is_v6() {
        false => (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED),
        true => (PACKET_TOO_BIG, 0),
    };
    error(packet, bytes, kind, u32::from(mtu), out)
}

/// The same for a packet whose destination cannot be reached at present.
pub fn unreachable(packet: &Packet, bytes: &[u8], out: &mut [u8]) -> Option<usize> {
    let kind = match packet.is_v6() {
        false => (DESTINATION_UNREACHABLE, HOST_UNREACHABLE),
        true => (V6_DESTINATION_UNREACHABLE, ADDRESS_UNREACHABLE),
    };
    error(packet, bytes, kind, 0, out)
}

fn error(packet: &Packet, bytes: &[u8], (kind, code): (u8, u8), value: u32, out: &mut [u8]) -> Option<usize> {
    let invites_no_error = |ip: IpAddr| ip.is_multicast() || ip.is_unspecified() || ip.is_loopback();
    if invites_no_error(packet.source) || packet.destination.is_multicast() || is_icmp_error(packet, bytes) {
        return None;
    }
    match (packet.source, packet.destination) {
        (IpAddr::V4(to), IpAddr::V4(from)) => {
            let later_fragment = {
                let (header, _) = ip::V4::ref_from_prefix(bytes).ok()?;
                header.flags_offset.get() & ip::V4_OFFSET != 0
            };
            if later_fragment {
                return None;
            }
            let quote = bytes.get(..usize::from(packet.total_len).min(V4_QUOTE))?;
            let length = ip::V4_MIN_LEN + 8 + quote.len();
            let out = out.get_mut(..length)?;
            let (header, message) = out.split_at_mut(ip::V4_MIN_LEN);
            let [hi, lo] = (length as u16).to_be_bytes();
            header.copy_from_slice(&[
                0x45,
                0xc0,
                hi,
                lo,
                0,
                0,
                0,
                0,
                64,
                ip::protocol::ICMP,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ]);
            put(header, 12, &from.octets())?;
            put(header, 16, &to.octets())?;
            let check = Sum::default().bytes(header).finish();
            put(header, 10, &check)?;
            write_message(message, kind, code, value, quote)?;
            let check = Sum::default().bytes(message).finish();
            put(message, 2, &check)?;
            Some(length)
        }
        (IpAddr::V6(to), IpAddr::V6(from)) => {
            let quote = bytes.get(..usize::from(packet.total_len).min(V6_QUOTE))?;
            let payload = 8 + quote.len();
            let out = out.get_mut(..ip::V6_LEN + payload)?;
            let (header, message) = out.split_at_mut(ip::V6_LEN);
            let [hi, lo] = (payload as u16).to_be_bytes();
            put(header, 0, &[0x60, 0, 0, 0, hi, lo, ip::protocol::ICMPV6, 64])?;
            put(header, 8, &from.octets())?;
            put(header, 24, &to.octets())?;
            write_message(message, kind, code, value, quote)?;
            let pseudo = Sum::pseudo_v6(&from, &to, ip::protocol::ICMPV6, payload as u16);
            let check = pseudo.bytes(message).finish();
            put(message, 2, &check)?;
            Some(ip::V6_LEN + payload)
        }
        _ => None,
    }
}

/// What a router said about one of our datagrams: it did not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooBig {
    /// Who sent the datagram.
    pub source: IpAddr,
    /// Where it was to go.
    pub destination: IpAddr,
    /// What fits, outer IP header included; 0 where the router does not say (RFC 1191 §4).
    pub mtu: u32,
}

/// Reads what a raw ICMP socket receives: with its IP header over IPv4, from the ICMP header on over IPv6. `None` for all
/// but Fragmentation Needed and Packet Too Big about a UDP datagram.
pub fn read_too_big(bytes: &[u8], v6: bool) -> Option<TooBig> {
    let header_len = if v6 { 0 } else { usize::from(bytes.first()? & 0x0f) * 4 };
    let (head, quote) = bytes.get(header_len..)?.split_at_checked(8)?;
    let [kind, code, _, _, mtu @ ..] = *head.first_chunk::<8>()?;
    let (mtu, next_hop) = (u32::from_be_bytes(mtu), u32::from(u16::from_be_bytes([mtu[2], mtu[3]])));
    if v6 {
        let (header, _) = ip::V6::ref_from_prefix(quote).ok()?;
        let about = (kind, header.next_header) == (PACKET_TOO_BIG, ip::protocol::UDP);
        return about.then(|| TooBig { source: header.source.into(), destination: header.destination.into(), mtu });
    }
    let (header, _) = ip::V4::ref_from_prefix(quote).ok()?;
    let about = (kind, code, header.protocol) == (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED, ip::protocol::UDP);
    about.then(|| TooBig { source: header.source.into(), destination: header.destination.into(), mtu: next_hop })
}

/// Whether the packet is itself an ICMP error, or an ICMP message whose type cannot be read.
fn is_icmp_error(packet: &Packet, bytes: &[u8]) -> bool {
    let kind = bytes.get(usize::from(packet.header_len)).copied();
    match packet.protocol {
        // queries and their answers: RFC 792, RFC 950, RFC 1256
        ip::protocol::ICMP => !matches!(kind, Some(0 | 8 | 9 | 10 | 13..=18)),
        ip::protocol::ICMPV6 => !matches!(kind, Some(128..)),
        _ => false,
    }
}

fn write_message(message: &mut [u8], kind: u8, code: u8, value: u32, quote: &[u8]) -> Option<()> {
    let [a, b, c, d] = value.to_be_bytes();
    put(message, 0, &[kind, code, 0, 0, a, b, c, d])?;
    put(message, 8, quote)
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) -> Option<()> {
    out.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_fragmentation_needed() {
        let udp = b"\x45\x00\x00\x20\x00\x01\x40\x00\x40\x11\x26\xac\x0a\x00\x00\x01\x0a\x00\x00\x02\x00\x01\x00\x02\x00\x0c\x00\x00data";
        let packet = Packet::parse(udp).unwrap();
        let mut out = [0; MAX_LEN];
        let n = too_big(&packet, udp, 1400, &mut out).unwrap();
        let head = b"\x45\xc0\x00\x3c\x00\x00\x00\x00\x40\x01";
        assert_eq!(&out[..10], head);
        assert_eq!(&out[12..28][..8], b"\x0a\x00\x00\x02\x0a\x00\x00\x01");
        assert_eq!(&out[20..22], &[3, 4]);
        assert_eq!(&out[24..28], &[0, 0, 5, 0x78]);
        assert_eq!(&out[28..n], udp);
        let parsed = etherparse::SlicedPacket::from_ip(&out[..n]).unwrap();
        assert!(matches!(parsed.transport, Some(etherparse::TransportSlice::Icmpv4(_))));
        assert!(Sum::default().bytes(&out[..20]).is_valid());
        assert!(Sum::default().bytes(&out[20..n]).is_valid());
    }

    #[test]
    fn packet_too_big_has_a_valid_checksum_and_fits_1280() {
        let mut bytes = vec![0x60, 0, 0, 0, 0x05, 0x78, 59, 64];
        let (a, b): (std::net::Ipv6Addr, std::net::Ipv6Addr) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        bytes.extend(a.octets());
        bytes.extend(b.octets());
        bytes.extend(vec![7; 1400]);
        let packet = Packet::parse(&bytes).unwrap();
        let mut out = [0; MAX_LEN];
        let n = too_big(&packet, &bytes, 1280, &mut out).unwrap();
        assert_eq!(n, 1280);
        assert_eq!(&out[40..42], &[2, 0]);
        assert_eq!(&out[44..48], &[0, 0, 5, 0]);
        assert!(Sum::pseudo_v6(&b, &a, 58, 1240).bytes(&out[40..n]).is_valid());
    }

    #[test]
    fn unreachable_is_told_in_both_families() {
        let udp = b"\x45\x00\x00\x1c\x00\x01\x40\x00\x40\x11\x00\x00\x0a\x00\x00\x01\x0a\x00\x00\x02\x00\x01\x00\x02\x00\x08\x00\x00";
        let mut out = [0; MAX_LEN];
        let n = unreachable(&Packet::parse(udp).unwrap(), udp, &mut out).unwrap();
        assert_eq!(&out[20..22], &[3, 1]);
        assert_eq!(&out[24..28], &[0; 4]);
        assert!(Sum::default().bytes(&out[20..n]).is_valid());
        let mut v6 = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
        let (a, b): (std::net::Ipv6Addr, std::net::Ipv6Addr) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        v6.extend(a.octets());
        v6.extend(b.octets());
        let n = unreachable(&Packet::parse(&v6).unwrap(), &v6, &mut out).unwrap();
        assert_eq!(&out[40..42], &[1, 3]);
        assert!(Sum::pseudo_v6(&b, &a, 58, (n - 40) as u16).bytes(&out[40..n]).is_valid());
    }

    #[test]
    fn what_a_router_says_is_read() {
        let (v4, v6): ([IpAddr; 2], [IpAddr; 2]) = (
            ["10.9.0.1".parse().unwrap(), "10.9.0.2".parse().unwrap()],
            ["fd09::1".parse().unwrap(), "fd09::2".parse().unwrap()],
        );
        for [source, destination] in [v4, v6] {
            let mut datagram = Vec::new();
            let ends = crate::wire::bfd::Ends { source, destination, source_port: 8472 };
            let echo = crate::wire::echo::Echo { answer: false, yours: 1, number: 1, size: 0 };
            crate::wire::bfd::write_packet(&crate::wire::bfd::Message::Echo(echo, 1500), ends, None, &mut datagram);
            let (mut out, v6) = ([0; MAX_LEN], source.is_ipv6());
            let packet = Packet::parse(&datagram).unwrap();
            let len = too_big(&packet, &datagram, 1280, &mut out).unwrap();
            let received = &out[if v6 { ip::V6_LEN } else { 0 }..len];
            assert_eq!(read_too_big(received, v6), Some(TooBig { source, destination, mtu: 1280 }));
            (0..48).for_each(|len| assert_eq!(read_too_big(&received[..len.min(if v6 { 47 } else { 46 })], v6), None));
            let len = unreachable(&packet, &datagram, &mut out).unwrap();
            assert_eq!(read_too_big(&out[if v6 { ip::V6_LEN } else { 0 }..len], v6), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80)) {
            _ = (read_too_big(&bytes, false), read_too_big(&bytes, true));
        }
    }

    #[test]
    fn no_error_about_an_error() {
        let mut icmp = b"\x45\x00\x00\x1c\x00\x01\x40\x00\x40\x01\x00\x00\x0a\x00\x00\x01\x0a\x00\x00\x02\x08\x00\x00\x00\x00\x00\x00\x00".to_vec();
        let mut out = [0; MAX_LEN];
        let mut ask = |bytes: &[u8]| too_big(&Packet::parse(bytes).unwrap(), bytes, 1400, &mut out);
        assert!(ask(&icmp).is_some(), "an echo request may be answered");
        icmp[20] = 3;
        assert!(ask(&icmp).is_none(), "an error may not");
        icmp[20] = 8;
        icmp[7] = 1;
        assert!(ask(&icmp).is_none(), "nor a later fragment");
        icmp[7] = 0;
        icmp[16] = 224;
        assert!(ask(&icmp).is_none(), "nor multicast");
    }
}
