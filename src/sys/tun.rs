//! /dev/net/tun: opening a queue and setting what it offloads (linux/if_tun.h).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use super::{check, ifreq};

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETSNDBUF: libc::Ioctl = 0x4004_54d4;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// The device hands over packets whose checksum is still to be computed.
pub const F_CSUM: u32 = 0x01;
/// TCP super-packets over IPv4.
pub const F_TSO4: u32 = 0x02;
/// TCP super-packets over IPv6.
pub const F_TSO6: u32 = 0x04;
/// TCP super-packets with CWR.
pub const F_TSO_ECN: u32 = 0x08;
/// UDP super-packets over IPv4; never without [`F_USO6`].
pub const F_USO4: u32 = 0x20;
/// UDP super-packets over IPv6.
pub const F_USO6: u32 = 0x40;
/// Super-packets in UDP tunnels (Linux 6.17).
pub const F_UDP_TUNNEL_GSO: u32 = 0x80;
/// The same with an outer checksum; never without [`F_UDP_TUNNEL_GSO`].
pub const F_UDP_TUNNEL_GSO_CSUM: u32 = 0x100;

/// Opens one queue of the TUN device `name`, which is made if it does not exist: layer 3, with an offload header before
/// each packet, several queues, not blocking.
pub fn open_queue(name: &str) -> io::Result<File> {
    open(name, libc::IFF_TUN | libc::IFF_MULTI_QUEUE, 10)
}

/// Makes the TAP device `name`: layer 2, with an offload header before each frame that has room for what lies in a UDP tunnel
/// (24 bytes). It goes when it is closed.
pub fn open_tap(name: &str) -> io::Result<File> {
    open(name, libc::IFF_TAP, 24)
}

/// How many bytes may be under way that were written to this device and have not left the host.
pub fn set_send_buffer(queue: &impl AsRawFd, bytes: i32) -> io::Result<()> {
    // SAFETY: TUNSETSNDBUF reads one int, which lives on this stack for the call.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETSNDBUF, &raw const bytes) }).map(drop)
}

fn open(name: &str, kind: libc::c_int, header_size: libc::c_int) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let mut request = ifreq(name)?;
    let flags = kind | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives on this stack for the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives on this stack for the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header_size) })?;
    Ok(file)
}

/// Sets what the device (all its queues) hands over undone: an or of the `F_` values.
pub fn set_offload(queue: &impl AsRawFd, features: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(features)) }).map(drop)
}

/// Whether the device stays when the last queue is closed.
pub fn set_persist(queue: &impl AsRawFd, persist: bool) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETPERSIST, libc::c_ulong::from(persist)) }).map(drop)
}
