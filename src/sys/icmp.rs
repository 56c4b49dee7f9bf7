//! Raw ICMP sockets that receive one kind of error alone (raw(7), ipv6(7)): a machine that is pinged must not wake us.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

const ICMP_FILTER: libc::c_int = 1;
const ICMP6_FILTER: libc::c_int = 1;
const DESTINATION_UNREACHABLE: u32 = 3;
const PACKET_TOO_BIG: u32 = 2;

/// Has a raw socket receive nothing but Destination Unreachable, or Packet Too Big over IPv6. In both filters a set bit
/// keeps that type away (`struct icmp_filter`, RFC 3542 §3.2 as Linux has it).
pub fn only_too_big(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let mut filter = [u32::MAX; 8];
    let (level, name, words, kind) = match v6 {
        false => (libc::SOL_RAW, ICMP_FILTER, 1, DESTINATION_UNREACHABLE),
        true => (libc::IPPROTO_ICMPV6, ICMP6_FILTER, filter.len(), PACKET_TOO_BIG),
    };
    filter[0] &= !(1 << kind);
    let length = (words * size_of::<u32>()) as libc::socklen_t;
    let (fd, filter) = (socket.as_raw_fd(), filter.as_ptr());
    // SAFETY: the kernel reads `length` bytes, at most the eight words of the array, which lives on this stack for the call.
    check(unsafe { libc::setsockopt(fd, level, name, filter.cast(), length) }).map(drop)
}
