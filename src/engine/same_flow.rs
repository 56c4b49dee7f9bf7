//! Whether two packets may be one super-packet: the comparisons of the kernel's own GRO (`inet_gro_receive`,
//! `ipv6_gro_receive`, `tcp_gro_receive`). `a` and `b` are two packets of the same kind, from their IP headers on.

use zerocopy::FromBytes;

use crate::wire::ip::Packet;
use crate::wire::transport::{self, Tcp, flags};

/// Everything of the IP headers but lengths, ids and checksums is equal.
#[inline]
pub(super) fn same_ip(packet: &Packet, a: &[u8], b: &[u8]) -> bool {
    if packet.is_v6() {
        same::<4>(a, b, 0) && same::<34>(a, b, 6)
    } else {
        same::<2>(a, b, 0) && same::<4>(a, b, 6) && same::<8>(a, b, 12)
    }
}

/// Everything of the TCP headers but sequence, FIN, PSH and checksum is equal, options too.
#[inline]
pub(super) fn same_tcp(packet: &Packet, a: &[u8], b: &[u8]) -> bool {
    let start = usize::from(packet.header_len);
    let (Some(a), Some(b)) = (a.get(start..), b.get(start..)) else { return false };
    let (Ok((a_tcp, _)), Ok((b_tcp, _))) = (Tcp::ref_from_prefix(a), Tcp::ref_from_prefix(b)) else { return false };
    let options = transport::TCP_MIN_LEN..b_tcp.header_len().max(transport::TCP_MIN_LEN);
    (a_tcp.flags ^ b_tcp.flags) & !(flags::FIN | flags::PSH) == 0
        && a_tcp.window == b_tcp.window
        && same::<4>(a, b, 0)
        && same::<5>(a, b, 8)
        && a_tcp.urgent == b_tcp.urgent
        && a.get(options.clone()).is_some_and(|a| Some(a) == b.get(options))
}

/// The ports are equal.
#[inline]
pub(super) fn same_ports(packet: &Packet, a: &[u8], b: &[u8]) -> bool {
    same::<4>(a, b, usize::from(packet.header_len))
}

/// `N` bytes from `at` on are there and equal. Of a fixed length, or each would be a call.
#[inline]
fn same<const N: usize>(a: &[u8], b: &[u8], at: usize) -> bool {
    let (a, b) = (a.get(at..).and_then(<[u8]>::first_chunk::<N>), b.get(at..).and_then(<[u8]>::first_chunk::<N>));
    a.is_some_and(|a| Some(a) == b)
}
