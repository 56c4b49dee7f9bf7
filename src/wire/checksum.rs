//! The Internet checksum (RFC 1071): ones' complement sums that can be taken in parts and put together.
//!
//! Sums are kept in the machine's byte order: RFC 1071 §2(B) shows that the result is the same as long as it is stored
//! the way it was loaded, so that no byte is swapped on the way.

use std::net::{Ipv4Addr, Ipv6Addr};

/// A partial ones' complement sum over an even number of bytes so far (an odd tail counts as padded with zero, so only
/// the last part may be odd).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub struct Sum(u64);

impl Sum {
    /// Adds the bytes of `data`.
    #[inline]
    pub fn bytes(self, data: &[u8]) -> Sum {
        Sum(self.0 + sum(data))
    }

    /// Adds the bytes of `data` and appends them to `out`, in one pass over both.
    #[inline]
    pub fn copied(self, data: &[u8], out: &mut Vec<u8>) -> Sum {
        Sum(self.0 + data.chunks(LANES_HOLD).map(|data| copy_and_sum(data, out)).sum::<u64>())
    }

    /// Adds a number that stands in the packet in network byte order.
    #[inline]
    pub fn add_u16(self, value: u16) -> Sum {
        Sum(self.0 + u64::from(value.to_be()))
    }

    /// Adds another partial sum.
    #[inline]
    pub fn add_sum(self, other: Sum) -> Sum {
        Sum(self.0 + other.0)
    }

    /// Adds two bytes exactly as they lie in the packet, such as a checksum field.
    #[inline]
    pub fn add_bytes(self, bytes: [u8; 2]) -> Sum {
        Sum(self.0 + u64::from(u16::from_ne_bytes(bytes)))
    }

    /// The sum folded to 16 bits, not complemented: what a kernel leaves in the checksum field of a packet whose
    /// checksum is still to be computed (`CHECKSUM_PARTIAL`).
    #[inline]
    pub fn fold(self) -> [u8; 2] {
        fold(self.0).to_ne_bytes()
    }

    /// The checksum: the complement of the folded sum.
    #[inline]
    pub fn finish(self) -> [u8; 2] {
        (!fold(self.0)).to_ne_bytes()
    }

    /// Whether data that holds its own checksum is intact (RFC 1071 §1: the sum is all ones).
    #[inline]
    pub fn is_valid(self) -> bool {
        fold(self.0) == 0xffff
    }

    /// The pseudo-header of TCP and UDP over IPv4 (RFC 9293 §3.1).
    #[inline]
    pub fn pseudo_v4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, length: u16) -> Sum {
        let (src, dst) = (u32::from_ne_bytes(src.octets()), u32::from_ne_bytes(dst.octets()));
        Sum(u64::from(src) + u64::from(dst)).add_u16(u16::from(protocol)).add_u16(length)
    }

    /// The pseudo-header of upper layers over IPv6 (RFC 8200 §8.1), for lengths below 64 KiB.
    #[inline]
    pub fn pseudo_v6(src: &Ipv6Addr, dst: &Ipv6Addr, protocol: u8, length: u16) -> Sum {
        Sum::default().bytes(&src.octets()).bytes(&dst.octets()).add_u16(u16::from(protocol)).add_u16(length)
    }
}

/// How much may be summed in 32-bit lanes before one could overflow: each chunk adds at most 0xffff to a lane.
const LANES_HOLD: usize = 128 << 16;

/// Sums the 16-bit words of `data`.
#[inline]
fn sum(data: &[u8]) -> u64 {
    // headers and small packets: setting up the lanes would take longer than the sum
    if data.len() < 256 {
        return sum_short(data);
    }
    data.chunks(LANES_HOLD).map(sum_long).sum()
}

/// Two rows of 32-bit lanes take the low and high halves of each 32-bit word: shifts, masks and adds only, which
/// compilers turn into vector code on every machine. 32 lanes keep enough of it in flight: 51 GB/s where 8 lanes gave 26.
/// Where the machine has AVX2 (asked once, when it is first called) it is the same code compiled for that: twice as fast.
#[multiversion::multiversion(targets("x86_64+avx2"))]
fn sum_long(data: &[u8]) -> u64 {
    sum_lanes(data, |_| ())
}

/// The same for data that is copied: 40 % more than the sum alone, where a pass of its own adds 70 %.
#[multiversion::multiversion(targets("x86_64+avx2"))]
fn copy_and_sum(data: &[u8], out: &mut Vec<u8>) -> u64 {
    out.reserve(data.len());
    sum_lanes(data, |part| out.extend_from_slice(part))
}

/// Shows each part to `seen` while it is in registers. Inlined always: it must be compiled for the machine that its
/// caller is compiled for.
#[inline(always)]
fn sum_lanes(data: &[u8], mut seen: impl FnMut(&[u8])) -> u64 {
    let (chunks, rest) = data.as_chunks::<128>();
    let (mut low, mut high) = ([0u32; 32], [0u32; 32]);
    for chunk in chunks {
        seen(chunk);
        let (words, _) = chunk.as_chunks::<4>();
        for ((low, high), word) in low.iter_mut().zip(&mut high).zip(words) {
            let word = u32::from_ne_bytes(*word);
            *low += word & 0xffff;
            *high += word >> 16;
        }
    }
    seen(rest);
    low.iter().chain(&high).map(|lane| u64::from(*lane)).sum::<u64>() + sum_short(rest)
}

#[inline]
fn sum_short(data: &[u8]) -> u64 {
    let (words, rest) = data.as_chunks::<4>();
    let mut total: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let (pairs, rest) = rest.as_chunks::<2>();
    total += pairs.iter().map(|pair| u64::from(u16::from_ne_bytes(*pair))).sum::<u64>();
    if let [odd] = rest {
        total += u64::from(u16::from_ne_bytes([*odd, 0]));
    }
    total
}

#[inline]
fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, a word at a time.
    fn slow(data: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_be_bytes()
    }

    #[test]
    fn the_example_of_rfc_1071_section_3() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().bytes(&data).fold(), [0xdd, 0xf2]);
        assert_eq!(Sum::default().bytes(&data).finish(), [0x22, 0x0d]);
    }

    #[test]
    fn every_length_agrees_with_the_definition() {
        let data: Vec<u8> = (0..70_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
        for len in (0..300).chain([1398, 1399, 1448, 65_535, 70_000]) {
            assert_eq!(Sum::default().bytes(&data[..len]).fold(), slow(&data[..len]), "{len}");
            let mut copy = Vec::new();
            assert_eq!(Sum::default().copied(&data[..len], &mut copy).fold(), slow(&data[..len]), "{len}");
            assert_eq!(copy, data[..len]);
        }
        let ones = vec![0xff; LANES_HOLD + 33];
        assert_eq!(Sum::default().bytes(&ones).fold(), slow(&ones));
        let mut copy = vec![1];
        assert_eq!(Sum::default().copied(&ones, &mut copy).fold(), slow(&ones));
        assert_eq!((copy.len(), copy.last()), (1 + ones.len(), Some(&0xff)));
    }

    #[test]
    fn parts_add_up_and_a_stored_checksum_validates() {
        let mut data = *b"\x45\x00\x00\x73\x00\x00\x40\x00\x40\x11\x00\x00\xc0\xa8\x00\x01\xc0\xa8\x00\xc7";
        let check = Sum::default().bytes(&data[..10]).bytes(&data[10..]).finish();
        assert_eq!(check, [0xb8, 0x61]);
        data[10..12].copy_from_slice(&check);
        assert!(Sum::default().bytes(&data).is_valid());
        data[3] ^= 1;
        assert!(!Sum::default().bytes(&data).is_valid());
    }

    #[test]
    fn pseudo_headers_are_those_of_the_rfcs() {
        let (a, b) = (Ipv4Addr::new(192, 168, 0, 1), Ipv4Addr::new(192, 168, 0, 199));
        let bytes = b"\xc0\xa8\x00\x01\xc0\xa8\x00\xc7\x00\x06\x01\x02";
        assert_eq!(Sum::pseudo_v4(a, b, 6, 0x102).fold(), slow(bytes));
        let (a, b): (Ipv6Addr, Ipv6Addr) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        let mut bytes = Vec::new();
        bytes.extend(a.octets());
        bytes.extend(b.octets());
        bytes.extend([0, 0, 0x01, 0x02, 0, 0, 0, 17]);
        assert_eq!(Sum::pseudo_v6(&a, &b, 17, 0x102).fold(), slow(&bytes));
    }
}
