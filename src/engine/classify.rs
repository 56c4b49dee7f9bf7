//! What a packet is to the engine: its flow, and whether the overlay carries it at all.

use std::net::IpAddr;

use zerocopy::FromBytes;

use crate::wire::icmp;
use crate::wire::ip::{self, Packet, protocol};

/// The ports of a TCP or UDP packet, as they lie on the wire; `None` for other protocols and for fragments, whose
/// transport header is missing or does not tell the flow of the next fragment.
#[inline]
pub fn ports(packet: &Packet, bytes: &[u8]) -> Option<[u8; 4]> {
    if packet.fragment || !matches!(packet.protocol, protocol::TCP | protocol::UDP) {
        return None;
    }
    let at = usize::from(packet.header_len);
    bytes.get(at..at + 4).and_then(|ports| ports.first_chunk().copied())
}

/// A hash over addresses, protocol and ports: packets of one flow share it, flows spread over its whole range
/// (RFC 7348 §5: the outer source port comes from such a hash, so that ECMP and RSS spread flows).
#[inline]
pub fn flow_hash(packet: &Packet, ports: Option<[u8; 4]>) -> u32 {
    let addresses = match (packet.source, packet.destination) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => u64::from(src.to_bits()) << 32 | u64::from(dst.to_bits()),
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let (src, dst) = (src.to_bits(), dst.to_bits());
            mix(src as u64 ^ (dst >> 64) as u64) ^ mix((src >> 64) as u64 ^ (dst as u64).rotate_left(32))
        }
        _ => 0, // Packet::parse() never mixes families
    };
    let rest = u64::from(u32::from_be_bytes(ports.unwrap_or_default())) << 8 | u64::from(packet.protocol);
    let hash = mix(mix(addresses) ^ rest);
    (hash >> 32) as u32
}

/// The finaliser of SplitMix64: each input bit changes each output bit with a chance of one half.
#[inline]
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Whether the destination is one that a layer-3 overlay carries: neither multicast, nor broadcast, nor link-local, nor
/// loopback, nor unspecified.
#[inline]
pub fn is_unicast(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            !(a >= 224 || a == 127 || a == 0 || (a == 169 && b == 254))
        }
        IpAddr::V6(ip) => {
            let [a, b, ..] = ip.octets();
            !(a == 0xff || (a == 0xfe && b & 0xc0 == 0x80) || ip.is_loopback() || ip.is_unspecified())
        }
    }
}

/// Whether the packet would have its receiver change routes: an ICMP redirect (RFC 792; RFC 4861 §4.5) or a router
/// advertisement (RFC 1256 §3; RFC 4861 §4.2). Both are a router's word on its own link, and the overlay is none.
///
/// A later fragment has no ICMP header; IPv6 hosts take neither message from fragments (RFC 6980 §5).
#[inline]
pub fn steers_routes(packet: &Packet, bytes: &[u8]) -> bool {
    if !matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6) {
        return false;
    }
    let kind = bytes.get(usize::from(packet.header_len)).copied();
    if packet.is_v6() {
        let steers = matches!(kind, Some(icmp::V6_ROUTER_ADVERTISEMENT | icmp::V6_REDIRECT));
        return steers && packet.protocol == protocol::ICMPV6 && !packet.fragment;
    }
    let is_first = ip::V4::ref_from_prefix(bytes).is_ok_and(|(ip, _)| ip.flags_offset.get() & ip::V4_OFFSET == 0);
    let steers = matches!(kind, Some(icmp::V4_REDIRECT | icmp::V4_ROUTER_ADVERTISEMENT));
    steers && packet.protocol == protocol::ICMP && is_first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(src: &str, dst: &str, protocol: u8) -> Packet {
        Packet {
            source: src.parse().unwrap(),
            destination: dst.parse().unwrap(),
            total_len: 100,
            header_len: 20,
            protocol,
            tos: 0,
            fragment: false,
        }
    }

    #[test]
    fn flows_spread_over_buckets() {
        for (src, dst) in [("10.42.1.1", "10.42.2.1"), ("fd42::1", "fd42:1::1")] {
            let packet = packet(src, dst, protocol::TCP);
            let mut buckets = [0; 8];
            for port in 0..8000u16 {
                let [a, b] = (20_000 + port).to_be_bytes();
                buckets[flow_hash(&packet, Some([a, b, 0x14, 0x51])) as usize % 8] += 1;
            }
            assert!(buckets.iter().all(|n| (850..1150).contains(n)), "{buckets:?}");
        }
    }

    #[test]
    fn each_part_of_the_flow_counts() {
        let base = packet("fd42::1", "fd42:1::1", protocol::TCP);
        let hash = flow_hash(&base, Some([1, 2, 3, 4]));
        assert_eq!(hash, flow_hash(&base, Some([1, 2, 3, 4])));
        assert_ne!(hash, flow_hash(&base, Some([1, 2, 3, 5])));
        assert_ne!(hash, flow_hash(&packet("fd42::2", "fd42:1::1", protocol::TCP), Some([1, 2, 3, 4])));
        assert_ne!(hash, flow_hash(&packet("fd42::1", "fd42:1::2", protocol::TCP), Some([1, 2, 3, 4])));
        assert_ne!(hash, flow_hash(&packet("fd42::1", "fd42:1::1", protocol::UDP), Some([1, 2, 3, 4])));
    }

    #[test]
    fn fragments_have_no_ports() {
        let bytes = [0; 40];
        let mut packet = packet("10.42.1.1", "10.42.2.1", protocol::UDP);
        assert_eq!(ports(&packet, &bytes), Some([0; 4]));
        packet.fragment = true;
        assert_eq!(ports(&packet, &bytes), None);
        packet.fragment = false;
        assert_eq!(ports(&packet, &bytes[..22]), None);
        packet.protocol = protocol::ICMP;
        assert_eq!(ports(&packet, &bytes), None);
    }

    #[test]
    fn what_steers_routes() {
        let v4 = |protocol: u8, flags_offset: [u8; 2], kind: u8| {
            let mut bytes =
                b"\x45\0\0\x1c\0\x01\0\0\x40\0\0\0\x0a\x2a\x02\x01\x0a\x2a\x01\x01\0\x01\0\0\0\0\0\0".to_vec();
            bytes[6..8].copy_from_slice(&flags_offset);
            (bytes[9], bytes[20]) = (protocol, kind);
            steers_routes(&Packet::parse(&bytes).unwrap(), &bytes)
        };
        assert!(v4(1, [0, 0], 5) && v4(1, [0x40, 0], 9));
        assert!(v4(1, [0x20, 0], 5), "the first fragment has the header");
        assert!(!v4(1, [0, 9], 5), "a later one has none");
        assert!(!v4(1, [0, 0], 8) && !v4(17, [0, 0], 5) && !v4(58, [0, 0], 5));

        let v6 = |next: u8, behind: &[u8]| {
            let mut bytes = vec![0x60, 0, 0, 0, 0, behind.len() as u8, next, 255];
            bytes.extend([[0xfd; 16], [0xfc; 16]].concat());
            bytes.extend(behind);
            steers_routes(&Packet::parse(&bytes).unwrap(), &bytes)
        };
        assert!(v6(58, &[134, 0, 0, 0]) && v6(58, &[137, 0, 0, 0]));
        assert!(v6(60, &[58, 0, 0, 0, 0, 0, 0, 0, 134, 0, 0, 0]), "behind an extension header");
        assert!(!v6(44, &[58, 0, 0, 1, 0, 0, 0, 0, 134, 0, 0, 0]), "no host takes it from a fragment");
        assert!(!v6(58, &[128]) && !v6(58, &[135]) && !v6(58, &[]) && !v6(1, &[5]) && !v6(17, &[134]));
    }

    #[test]
    fn what_is_unicast() {
        for good in ["10.42.1.1", "169.253.1.1", "223.255.255.255", "fd42::1", "2001:db8::1"] {
            assert!(is_unicast(good.parse().unwrap()), "{good}");
        }
        for bad in
            ["224.0.0.1", "255.255.255.255", "127.0.0.1", "0.0.0.0", "169.254.1.1", "ff02::1", "fe80::1", "::1", "::"]
        {
            assert!(!is_unicast(bad.parse().unwrap()), "{bad}");
        }
    }
}
