//! TCP (RFC 9293 §3.1) and UDP (RFC 768) headers.

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a TCP header without options.
pub const TCP_MIN_LEN: usize = 20;
/// Where a TCP header holds its checksum.
pub const TCP_CHECKSUM: usize = 16;
/// Bytes of a UDP header.
pub const UDP_LEN: usize = 8;
/// Where a UDP header holds its checksum.
pub const UDP_CHECKSUM: usize = 6;

/// TCP flags in the order of the header (RFC 9293 §3.1, RFC 3168 §23.2).
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push function.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement field is significant.
    pub const ACK: u8 = 0x10;
    /// The urgent pointer is significant.
    pub const URG: u8 = 0x20;
    /// ECN echo.
    pub const ECE: u8 = 0x40;
    /// Congestion window reduced.
    pub const CWR: u8 = 0x80;
}

/// A TCP header without its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Tcp {
    /// Source port.
    pub source: U16,
    /// Destination port.
    pub destination: U16,
    /// Sequence number of the first payload byte.
    pub sequence: U32,
    /// Next sequence number that the sender expects.
    pub acknowledgement: U32,
    /// Header length in 32-bit words in the upper half, reserved bits in the lower.
    pub offset_reserved: u8,
    /// See [`flags`].
    pub flags: u8,
    /// Receive window.
    pub window: U16,
    /// Checksum over pseudo-header, header and payload.
    pub checksum: [u8; 2],
    /// Urgent pointer.
    pub urgent: U16,
}

impl Tcp {
    /// Bytes of the header with options: 0 to 60, below [`TCP_MIN_LEN`] when it lies.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.offset_reserved >> 4) * 4
    }
}

/// A UDP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Udp {
    /// Source port.
    pub source: U16,
    /// Destination port.
    pub destination: U16,
    /// Bytes of header and payload.
    pub length: U16,
    /// Checksum over pseudo-header, header and payload; 0 says that there is none (over IPv4).
    pub checksum: [u8; 2],
}

/// Whether TCP options hold a signature of the segment: MD5 (RFC 2385) or TCP-AO (RFC 5925). Options that cannot be read
/// count as one.
pub fn is_signed(mut options: &[u8]) -> bool {
    loop {
        let len = match options {
            [] | [0, ..] => return false,
            [1, ..] => 1,
            [19 | 29, ..] | [_, 0 | 1, ..] | [_] => return true,
            [_, len, ..] => usize::from(*len),
        };
        match options.get(len..) {
            Some(rest) => options = rest,
            None => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_bytes_of_tcp() {
        let bytes = b"\x14\x51\xa0\x1c\x00\x00\x00\x07\x00\x00\x00\x09\x80\x19\x01\xf6\xab\xcd\x00\x00";
        let (tcp, _) = Tcp::ref_from_prefix(bytes).unwrap();
        assert_eq!((tcp.source.get(), tcp.destination.get()), (5201, 40988));
        assert_eq!((tcp.sequence.get(), tcp.acknowledgement.get()), (7, 9));
        assert_eq!((tcp.header_len(), tcp.flags), (32, flags::ACK | flags::PSH | flags::FIN));
        assert_eq!((tcp.window.get(), tcp.checksum), (502, [0xab, 0xcd]));
        assert_eq!(&tcp.as_bytes()[TCP_CHECKSUM..TCP_CHECKSUM + 2], &[0xab, 0xcd]);
        assert!(Tcp::ref_from_prefix(&bytes[..19]).is_err());
    }

    #[test]
    fn literal_bytes_of_udp() {
        let bytes = b"\x00\x35\x14\xe9\x00\x0c\x12\x34data";
        let (udp, rest) = Udp::ref_from_prefix(bytes).unwrap();
        assert_eq!((udp.source.get(), udp.destination.get(), udp.length.get()), (53, 5353, 12));
        assert_eq!((udp.checksum, rest), ([0x12, 0x34], &b"data"[..]));
        assert_eq!(&udp.as_bytes()[UDP_CHECKSUM..], &[0x12, 0x34]);
    }
}
