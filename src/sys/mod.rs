//! The only unsafe code: system calls that no library wraps, each behind a safe function that argues for it.
//!
//! Knows no policy: which options are set, and what an error means, is `io`'s.

#![allow(unsafe_code)]

pub mod bpf;
pub mod clock;
pub mod ethtool;
pub mod icmp;
pub mod netlink;
pub mod poll;
pub mod ring;
pub mod sched;
pub mod terminal;
pub mod tun;
pub mod udp;

use std::io;

/// The result of a system call: −1 means that `errno` says why.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A request about the network device `name` (netdevice(7)), all else in it zero. ENAMETOOLONG for what is no device's name.
fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data, for which all bits zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}
