//! Super-packets that leave uncut: frames with their outer headers go into a TAP device of meshd's own, with an offload
//! header that says what lies in the tunnel (Linux ≥6.17), and a program in its ingress hook ([`crate::sys::bpf`]) hands them
//! to the neighbour. The network card cuts them, or on a virtual link nobody at all.
//!
//! A UDP socket cannot do that: what the kernel cuts for it are pieces of equal length, and each has to bring its own inner
//! headers.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::net::if_::if_nametoindex;
use zerocopy::{FromBytes, IntoBytes};

use super::udp::{OUTER_TTL, SEND_BUFFER};
use crate::engine::outbound::CutBehind;
use crate::engine::tables::ENCAPSULATION;
use crate::engine::tx_batch::{MAX_PARTS, Uncut};
use crate::sys::{bpf, tun};
use crate::wire::ip::protocol;
use crate::wire::transport::{TCP_CHECKSUM, UDP_CHECKSUM, UDP_LEN};
use crate::wire::vnet_hdr::{self, TunnelVnetHdr, VnetHdr};
use crate::wire::{ethernet, udp};

/// The offload header and the longest outer headers.
const MAX_FRONT: usize = size_of::<TunnelVnetHdr>() + ethernet::HEADER_LEN + 40 + UDP_LEN;

/// More than the device's queue holds.
const MOST_RETURNED: usize = 2048;

/// The Ethernet header is of no account: the redirection writes another one.
const ETHERNET: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

/// Why super-packets cannot leave uncut.
#[derive(Debug, thiserror::Error)]
pub enum TunnelGsoError {
    /// The device.
    #[error("cannot make the TAP device {name}: {source}")]
    Device {
        /// Its name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// An older kernel.
    #[error("the kernel takes no super-packets in UDP tunnels from a TAP device (Linux 6.17 does): {0}")]
    Refused(#[source] io::Error),
    /// The program.
    #[error("cannot attach the program that hands frames of {name} to neighbours: {source}")]
    Program {
        /// The device's name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// The way out for super-packets that leave uncut. It has no device before it is of use.
#[derive(Debug)]
pub struct TunnelGso {
    /// The switch.
    pub cut_behind: Arc<CutBehind>,
    outlet: OnceLock<Outlet>,
    why_off: Mutex<String>,
}

/// The open device. It goes when this is dropped.
#[derive(Debug)]
struct Outlet {
    tap: File,
    name: String,
    failed: OnceLock<String>,
    _link: OwnedFd,
}

impl TunnelGso {
    /// Nothing leaves uncut yet, for this reason.
    pub fn off(why: impl Into<String>) -> Self {
        TunnelGso { cut_behind: Arc::default(), outlet: OnceLock::new(), why_off: Mutex::new(why.into()) }
    }

    /// Loads the program, for which CAP_BPF is needed; for all else CAP_NET_ADMIN is enough.
    pub fn load() -> io::Result<OwnedFd> {
        bpf::load_redirect()
    }

    /// The device's name, where meshd's own is `tun`.
    pub fn device(tun: &str) -> String {
        let end = tun.floor_char_boundary(libc::IFNAMSIZ - 1 - "-gso".len());
        format!("{}-gso", tun.get(..end).unwrap_or_default())
    }

    /// Makes the device, which is down yet, and attaches the program. Nothing leaves uncut before the switch says so.
    /// Where it is there already nothing happens.
    pub fn open(&self, tun: &str, program: &OwnedFd) -> Result<(), TunnelGsoError> {
        if self.outlet.get().is_none() {
            self.outlet.set(Outlet::open(Self::device(tun), program)?).ok();
        }
        Ok(())
    }

    /// Switches it on and off by address family. Once a write has failed it stays off.
    pub fn switch(&self, v4: bool, v6: bool, why_off: impl Into<String>) {
        self.cut_behind.set(v4, v6);
        // behind that, since a worker may find it failed at any time
        let failed = self.outlet.get().and_then(|outlet| outlet.failed.get());
        if failed.is_some() {
            self.cut_behind.set(false, false);
        }
        let why_off = failed.cloned().unwrap_or_else(|| why_off.into());
        *self.why_off.lock().unwrap_or_else(PoisonError::into_inner) = why_off;
    }

    /// Whether anything leaves uncut, and else why not.
    pub fn state(&self) -> Result<(), String> {
        if self.cut_behind.v4.load(Ordering::Relaxed) || self.cut_behind.v6.load(Ordering::Relaxed) {
            return Ok(());
        }
        let failed = self.outlet.get().and_then(|outlet| outlet.failed.get());
        let told = || self.why_off.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(failed.cloned().unwrap_or_else(told))
    }

    /// How many super-packets have come back since the last call, for want of a way.
    pub fn returned(&self) -> usize {
        let Some(Outlet { tap, .. }) = self.outlet.get() else { return 0 };
        let mut frame = [0; MAX_FRONT];
        let mut returned = 0;
        // what is longer than the buffer is cut off; the kernel says things of its own to a device, too
        for _ in 0..MOST_RETURNED {
            let Ok(len) = (&*tap).read(&mut frame) else { break };
            let header = frame.get(..len).and_then(|frame| VnetHdr::ref_from_prefix(frame).ok());
            let tunnel = vnet_hdr::GSO_UDP_TUNNEL_IPV4 | vnet_hdr::GSO_UDP_TUNNEL_IPV6;
            returned += usize::from(header.is_some_and(|(header, _)| header.gso_type & tunnel != 0));
        }
        returned
    }

    /// Whether a super-packet for which there is no route comes back as it should: all that can be tried without somebody to
    /// send to. `nowhere` is an address without a route.
    pub fn gives_back(&self, from: SocketAddr, nowhere: SocketAddr) -> io::Result<bool> {
        let how = Uncut { v6: false, cwr: false, transport: 20, header_len: 40, size: 1000 };
        let mut datagram = vec![0; ENCAPSULATION + 40 + 3000];
        let packet = datagram.get_mut(ENCAPSULATION..).unwrap_or_default();
        // IPv4 with TCP, and where that has its length
        for (at, byte) in [(0, 0x45), (2, 0x0b), (3, 0xe0), (8, 64), (9, protocol::TCP), (32, 0x50)] {
            packet.iter_mut().skip(at).take(1).for_each(|to| *to = byte);
        }
        self.returned();
        self.send((from, nowhere), 0, how, std::iter::once(datagram.as_slice()), &mut Vec::new())?;
        Ok(self.returned() == 1)
    }

    /// Sends a super-packet, encapsulated as `datagram`. `front` is scratch.
    pub(super) fn send<'d>(
        &self,
        ends: (SocketAddr, SocketAddr),
        tos: u8,
        how: Uncut,
        datagram: impl Iterator<Item = &'d [u8]> + Clone,
        front: &mut Vec<u8>,
    ) -> io::Result<()> {
        let outlet = self.outlet.get().ok_or(io::ErrorKind::NotConnected)?;
        front.clear();
        let len = datagram.clone().map(<[u8]>::len).sum();
        frame_front(ends, tos, how, len, front).ok_or(io::ErrorKind::InvalidInput)?;
        let mut slices = [IoSlice::new(front); 1 + MAX_PARTS];
        let mut count = 1;
        for part in datagram {
            *slices.get_mut(count).ok_or(io::ErrorKind::InvalidInput)? = IoSlice::new(part);
            count += 1;
        }
        let written = (&outlet.tap).write_vectored(slices.get(..count).unwrap_or_default());
        let Err(error) = written else { return Ok(()) };
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => {}
            // somebody switched the device off: until it is on again
            Some(libc::EIO) => self.cut_behind.set(false, false),
            // for good: what comes next is cut here
            _ => {
                outlet.failed.get_or_init(|| format!("a write to {} failed: {error}", outlet.name));
                self.cut_behind.set(false, false);
            }
        }
        Err(error)
    }
}

impl Outlet {
    fn open(name: String, program: &OwnedFd) -> Result<Self, TunnelGsoError> {
        let tap = tun::open_tap(&name).map_err(|source| TunnelGsoError::Device { name: name.clone(), source })?;
        // of what comes back, too, so that it does so uncut
        let tcp = tun::F_CSUM | tun::F_TSO4 | tun::F_TSO6 | tun::F_TSO_ECN;
        let tunnel = tun::F_UDP_TUNNEL_GSO | tun::F_UDP_TUNNEL_GSO_CSUM;
        tun::set_offload(&tap, tcp | tunnel).map_err(TunnelGsoError::Refused)?;
        tun::set_send_buffer(&tap, SEND_BUFFER as i32)
            .map_err(|source| TunnelGsoError::Device { name: name.clone(), source })?;
        let fail = |source| TunnelGsoError::Program { name: name.clone(), source };
        let ifindex = if_nametoindex(name.as_str()).map_err(|error| fail(error.into()))?;
        let link = bpf::attach_ingress(program, ifindex).map_err(fail)?;
        Ok(Outlet { tap, name, failed: OnceLock::new(), _link: link })
    }
}

/// What stands before the datagram in a frame: offload header, Ethernet, IP and UDP.
fn frame_front(
    (from, to): (SocketAddr, SocketAddr),
    tos: u8,
    how: Uncut,
    len: usize,
    front: &mut Vec<u8>,
) -> Option<()> {
    const AT: usize = size_of::<TunnelVnetHdr>();
    front.resize(AT, 0);
    front.extend_from_slice(&ETHERNET);
    let (ether_type, tunnel) = match to.is_ipv4() {
        true => (ethernet::IPV4, vnet_hdr::GSO_UDP_TUNNEL_IPV4),
        false => (ethernet::IPV6, vnet_hdr::GSO_UDP_TUNNEL_IPV6),
    };
    front.extend_from_slice(&ether_type.to_be_bytes());
    let pseudo = udp::headers(from, to, tos, OUTER_TTL, len, front)?;
    let outer_transport = front.len() - AT - UDP_LEN;
    let inner_network = outer_transport + UDP_LEN + ENCAPSULATION;
    let inner_transport = inner_network + usize::from(how.transport);
    let tcp = if how.v6 { vnet_hdr::GSO_TCPV6 } else { vnet_hdr::GSO_TCPV4 };
    let ecn = if how.cwr { vnet_hdr::GSO_ECN } else { 0 };
    let header_len = inner_network as u16 + how.header_len;
    let mut inner =
        VnetHdr::super_packet(tcp | ecn | tunnel, header_len, how.size, inner_transport as u16, TCP_CHECKSUM as u16);
    // begun here, and finished by who cuts. Over IPv4 there should be none (RFC 7348 §5), but without it Linux joins no
    // datagrams for a socket, as other meshd have (udp_gro_receive_segment)
    inner.flags |= vnet_hdr::UDP_TUNNEL_CSUM;
    let at = front.len() - UDP_LEN + UDP_CHECKSUM;
    front.get_mut(at..at + 2)?.copy_from_slice(&pseudo.fold());
    let header = TunnelVnetHdr::new(inner, outer_transport as u16, inner_network as u16);
    front.get_mut(..AT)?.copy_from_slice(header.as_bytes());
    debug_assert!(front.len() <= MAX_FRONT);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOW: Uncut = Uncut { v6: false, cwr: false, transport: 20, header_len: 52, size: 1398 };

    fn front(from: &str, to: &str, how: Uncut) -> Vec<u8> {
        let mut front = Vec::new();
        frame_front((from.parse().unwrap(), to.parse().unwrap()), 2, how, 1000, &mut front).unwrap();
        front
    }

    #[test]
    fn literal_bytes_over_ipv4() {
        let bytes = front("10.0.0.1:4660", "10.0.0.2:8472", HOW);
        // needs csum; TCP over IPv4 in a tunnel over IPv4; all headers, MSS; the inner TCP header, its checksum
        assert_eq!(bytes[..10], *b"\x09\x21\x74\x00\x76\x05\x54\x00\x10\x00");
        assert_eq!(bytes[10..20], [0; 10]);
        assert_eq!(bytes[20..24], *b"\x22\x00\x40\x00", "outer UDP at 34, inner IP at 64");
        assert_eq!(bytes[36..38], [8, 0]);
        assert_eq!(bytes[38..58], *b"\x45\x02\x04\x04\x00\x00\x40\x00\x40\x11\x22\xe5\x0a\x00\x00\x01\x0a\x00\x00\x02");
        // 0a00 + 1 + 0a00 + 2 + 17 + 1008, folded
        assert_eq!(bytes[58..], *b"\x12\x34\x21\x18\x03\xf0\x18\x04", "the checksum is begun");
    }

    #[test]
    fn literal_bytes_over_ipv6() {
        let bytes = front("[fd00::1]:4660", "[fd00::2]:8472", Uncut { v6: true, cwr: true, transport: 40, ..HOW });
        assert_eq!(bytes[..2], [1 | 8, 4 | 0x80 | 0x40]);
        assert_eq!(bytes[20..24], *b"\x36\x00\x54\x00", "outer UDP at 54, inner IP at 84");
        // fd00 + 1 + fd00 + 2 + 17 + 1008, folded
        assert_eq!(bytes[24 + 54 + 6..][..2], 0xfe05_u16.to_be_bytes());
    }

    #[test]
    fn the_devices_name_fits() {
        assert_eq!(TunnelGso::device("mesh0"), "mesh0-gso");
        assert_eq!(TunnelGso::device("a-long-name-012"), "a-long-name-gso");
    }
}
