//! The Ethernet II header (IEEE 802.3 §3.2), the outermost thing inside VXLAN.

use zerocopy::byteorder::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header.
pub const HEADER_LEN: usize = 14;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;

/// An Ethernet II header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Destination address.
    pub destination: [u8; 6],
    /// Source address.
    pub source: [u8; 6],
    /// What follows.
    pub ether_type: U16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_bytes() {
        let bytes = b"\x02\x00\x00\x00\x00\x0a\x02\x00\x00\x00\x00\x0b\x86\xdd\x60";
        let (header, rest) = Header::ref_from_prefix(bytes).unwrap();
        assert_eq!(header.destination, [2, 0, 0, 0, 0, 0x0a]);
        assert_eq!(header.source, [2, 0, 0, 0, 0, 0x0b]);
        assert_eq!(header.ether_type.get(), IPV6);
        assert_eq!(rest, b"\x60");
        assert_eq!(header.as_bytes(), &bytes[..HEADER_LEN]);
        assert!(Header::ref_from_prefix(&bytes[..13]).is_err());
    }
}
