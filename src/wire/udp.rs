//! Whole UDP packets (RFC 768) over IPv4 or IPv6, where this node makes one itself.
//!
//! What it carries of others is never built here: that keeps the headers that it came with.

use std::net::{IpAddr, SocketAddr};

use zerocopy::IntoBytes;

use super::checksum::Sum;
use super::ip::{self, protocol};
use super::transport::{UDP_CHECKSUM, UDP_LEN};

/// Appends an IP packet that carries `payload`, filled up with zeros to `padded` bytes, to `out`; DF is set. `None`, and
/// nothing is appended, for addresses of two families and for what is longer than a packet can be.
pub fn write(
    from: SocketAddr,
    to: SocketAddr,
    tos: u8,
    ttl: u8,
    payload: &[u8],
    padded: usize,
    out: &mut Vec<u8>,
) -> Option<()> {
    let len = payload.len().max(padded);
    let pseudo = headers(from, to, tos, ttl, len, out)?;
    let at = out.len() - UDP_LEN;
    // zeros add nothing
    let udp = out.get_mut(at..)?;
    let sum = pseudo.bytes(udp).bytes(payload).finish();
    // 0 would say that there is none
    let sum = if sum == [0; 2] { [0xff; 2] } else { sum };
    udp.iter_mut().skip(UDP_CHECKSUM).zip(sum).for_each(|(to, from)| *to = from);
    out.extend_from_slice(payload);
    out.resize(out.len() + len - payload.len(), 0);
    Some(())
}

/// Appends the IP and the UDP header of a datagram of `len` bytes, as [`write`] does, to `out`. The UDP checksum is 0; comes
/// back what it starts with: the pseudo-header's sum.
pub fn headers(from: SocketAddr, to: SocketAddr, tos: u8, ttl: u8, len: usize, out: &mut Vec<u8>) -> Option<Sum> {
    let udp_len = u16::try_from(UDP_LEN + len).ok()?;
    let pseudo = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = ip::V4 {
                version_ihl: 0x45,
                tos,
                total_len: udp_len.checked_add(ip::V4_MIN_LEN as u16)?.into(),
                id: 0.into(),
                flags_offset: ip::V4_DF.into(),
                ttl,
                protocol: protocol::UDP,
                checksum: [0; 2],
                source: source.octets(),
                destination: destination.octets(),
            };
            header.checksum = Sum::default().bytes(header.as_bytes()).finish();
            out.extend_from_slice(header.as_bytes());
            Sum::pseudo_v4(source, destination, protocol::UDP, udp_len)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = ip::V6 {
                version_class_flow: (6 << 28 | u32::from(tos) << 20).into(),
                payload_len: udp_len.into(),
                next_header: protocol::UDP,
                hop_limit: ttl,
                source: source.octets(),
                destination: destination.octets(),
            };
            out.extend_from_slice(header.as_bytes());
            Sum::pseudo_v6(&source, &destination, protocol::UDP, udp_len)
        }
        _ => return None,
    };
    out.extend([from.port(), to.port(), udp_len, 0].into_iter().flat_map(u16::to_be_bytes));
    Some(pseudo)
}
