//! The header that a TUN device with `IFF_VNET_HDR` puts before each packet: `struct virtio_net_hdr` of
//! linux/virtio_net.h (virtio 1.2 §5.1.6), in the machine's byte order, 10 bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header.
pub const HEADER_LEN: usize = 10;

/// `flags`: the checksum from `csum_start` on is still to be computed; the field holds the pseudo-header's sum.
pub const NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum was verified.
pub const DATA_VALID: u8 = 2;

/// `gso_type`: one packet as it stands.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4, to be cut into segments of `gso_size`.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP, to be cut into datagrams of `gso_size` (USO; Linux ≥6.2).
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type`, together with a TCP one: the super-packet carries CWR.
pub const GSO_ECN: u8 = 0x80;
/// `gso_type`, together with another: the super-packet lies in a UDP tunnel over IPv4 (Linux ≥6.17).
pub const GSO_UDP_TUNNEL_IPV4: u8 = 0x20;
/// `gso_type`, together with another: in a UDP tunnel over IPv6.
pub const GSO_UDP_TUNNEL_IPV6: u8 = 0x40;
/// `flags`, with a UDP tunnel: the outer checksum, too, is to be computed; its field holds the pseudo-header's sum.
pub const UDP_TUNNEL_CSUM: u8 = 8;

/// `struct virtio_net_hdr`. The multi-byte fields are kept as bytes, since the header lies at any address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct VnetHdr {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` values.
    pub gso_type: u8,
    hdr_len: [u8; 2],
    gso_size: [u8; 2],
    csum_start: [u8; 2],
    csum_offset: [u8; 2],
}

impl VnetHdr {
    /// A header for one super-packet whose transport header starts at `csum_start`, with the checksum field
    /// `csum_offset` behind that.
    pub fn super_packet(gso_type: u8, hdr_len: u16, gso_size: u16, csum_start: u16, csum_offset: u16) -> Self {
        VnetHdr {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: hdr_len.to_ne_bytes(),
            gso_size: gso_size.to_ne_bytes(),
            csum_start: csum_start.to_ne_bytes(),
            csum_offset: csum_offset.to_ne_bytes(),
        }
    }

    /// A header for one packet whose checksum the receiver is to complete.
    pub fn needs_csum(csum_start: u16, csum_offset: u16) -> Self {
        VnetHdr::super_packet(GSO_NONE, 0, 0, csum_start, csum_offset)
    }

    /// A header for one packet whose checksum was verified.
    pub fn data_valid() -> Self {
        VnetHdr { flags: DATA_VALID, ..VnetHdr::default() }
    }

    /// Bytes of all headers, a hint that a kernel need not get right.
    pub fn hdr_len(&self) -> u16 {
        u16::from_ne_bytes(self.hdr_len)
    }

    /// Payload bytes of each segment.
    pub fn gso_size(&self) -> u16 {
        u16::from_ne_bytes(self.gso_size)
    }

    /// Where checksumming starts, from the first byte of the packet.
    pub fn csum_start(&self) -> u16 {
        u16::from_ne_bytes(self.csum_start)
    }

    /// Where the checksum lies, from `csum_start`.
    pub fn csum_offset(&self) -> u16 {
        u16::from_ne_bytes(self.csum_offset)
    }
}

/// `struct virtio_net_hdr_v1_hash_tunnel`, 24 bytes: the header before a super-packet that is in a UDP tunnel already
/// (virtio 1.4 §5.1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TunnelVnetHdr {
    /// The inner packet; places are counted from the first byte of the frame, though.
    pub inner: VnetHdr,
    num_buffers: [u8; 2],
    hash: [u8; 8],
    outer_transport: [u8; 2],
    inner_network: [u8; 2],
}

impl TunnelVnetHdr {
    /// A header for a frame whose outer UDP header, and whose inner IP header, are at these places.
    pub fn new(inner: VnetHdr, outer_transport: u16, inner_network: u16) -> Self {
        TunnelVnetHdr {
            inner,
            num_buffers: [0; 2],
            hash: [0; 8],
            outer_transport: outer_transport.to_le_bytes(),
            inner_network: inner_network.to_le_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn literal_bytes() {
        let bytes = b"\x01\x01\x34\x00\x76\x05\x14\x00\x10\x00";
        let header = VnetHdr::super_packet(GSO_TCPV4, 52, 1398, 20, 16);
        assert_eq!(header.as_bytes(), bytes);
        let (read, _) = VnetHdr::read_from_prefix(bytes).unwrap();
        assert_eq!(read, header);
        assert_eq!((read.hdr_len(), read.gso_size(), read.csum_start(), read.csum_offset()), (52, 1398, 20, 16));
        assert!(VnetHdr::read_from_prefix(&bytes[..9]).is_err());
        let tunnel = TunnelVnetHdr::new(header, 34, 64);
        assert_eq!(tunnel.as_bytes(), [&bytes[..], &[0; 10], b"\x22\x00\x40\x00"].concat());
    }
}
