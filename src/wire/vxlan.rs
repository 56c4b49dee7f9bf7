//! The VXLAN header (RFC 7348 §5).
//!
//! ```text
//! |R|R|R|R|I|R|R|R|            Reserved                           |
//! |                VXLAN Network Identifier (VNI) |   Reserved    |
//! ```

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header.
pub const HEADER_LEN: usize = 8;
/// The I flag: the VNI is valid. It MUST be set (RFC 7348 §5). It also tells VXLAN from WireGuard on a shared port, whose
/// first byte is a message type from 1 to 4.
pub const FLAG_I: u8 = 0x08;

/// A VXLAN header.
///
/// Reserved bits are sent as zero and ignored on receipt, as RFC 7348 §5 says it: a sender that gives them a meaning (the
/// group policy extension) is then still heard. Linux' own device is stricter, and drops a frame with any of them set; it
/// never sees one from here. What would make the rest of the datagram something else than Ethernet (VXLAN-GPE) does not
/// get past the checks of the inner frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Flags, of which only I has a meaning.
    pub flags: u8,
    /// Reserved.
    pub reserved1: [u8; 3],
    /// VXLAN network identifier.
    pub vni: [u8; 3],
    /// Reserved.
    pub reserved2: u8,
}

impl Header {
    /// The header for a network: `vni` is taken modulo 2²⁴.
    pub fn new(vni: u32) -> Self {
        let [_, a, b, c] = vni.to_be_bytes();
        Header { flags: FLAG_I, reserved1: [0; 3], vni: [a, b, c], reserved2: 0 }
    }

    /// The network identifier.
    #[inline]
    pub fn vni(&self) -> u32 {
        let [a, b, c] = self.vni;
        u32::from_be_bytes([0, a, b, c])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_bytes() {
        let bytes = b"\x08\x00\x00\x00\x12\x34\x56\x00rest";
        let (header, rest) = Header::ref_from_prefix(bytes).unwrap();
        assert_eq!((header.flags, header.vni(), rest), (FLAG_I, 0x12_3456, &b"rest"[..]));
        assert_eq!(Header::new(0x12_3456).as_bytes(), &bytes[..8]);
        assert!(Header::ref_from_prefix(&bytes[..7]).is_err());
    }
}
