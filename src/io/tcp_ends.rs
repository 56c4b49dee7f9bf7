//! Whether a TCP connection ends at a socket of this node: what comes for its address the firewall may send on elsewhere.
//!
//! Owns one question of the netlink family SOCK_DIAG (linux/inet_diag.h), for which there is no library here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;

use crate::engine::inbound::Inbound;
use crate::sys::netlink::{self, HEADER};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Bytes of `inet_diag_req_v2`.
const REQUEST: usize = 56;
/// Where the answer has the socket's state, and the one in which it waits for connections (`TCP_LISTEN`).
const STATE: usize = HEADER + 1;
const LISTENS: u8 = 10;

/// Asks the kernel what the engine wants to know, if it does: some ten microseconds, once in a while for each fast flow.
#[inline]
pub(crate) fn answer(inbound: &mut Inbound) {
    // who cannot be told so does without
    inbound.ask(|(theirs, ours)| is_here(ours, theirs).unwrap_or(false));
}

/// Whether the kernel tells of sockets. The first who asks may have it load a module (`tcp_diag`) and wait for that, which is
/// nothing for a worker.
pub(crate) fn are_told() -> io::Result<bool> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let ours = listener.local_addr()?;
    Ok(state(ours, SocketAddr::new(ours.ip(), 1))?.is_some())
}

/// Whether a socket in the network namespace of this thread has that connection. Needs no privilege.
#[cold]
fn is_here(ours: SocketAddr, theirs: SocketAddr) -> io::Result<bool> {
    // one that listens at the address is no connection
    Ok(state(ours, theirs)?.is_some_and(|state| state != LISTENS))
}

/// The state of the socket that would get what comes from there; `None` where there is none.
fn state(ours: SocketAddr, theirs: SocketAddr) -> io::Result<Option<u8>> {
    let question = question(ours, theirs);
    let Some(answer) = netlink::ask(NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, &question)? else { return Ok(None) };
    let tells = netlink::kind(&answer) == Some(SOCK_DIAG_BY_FAMILY);
    Ok(answer.get(STATE).copied().filter(|_| tells))
}

fn question(ours: SocketAddr, theirs: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST);
    let family = if ours.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    bytes.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes()); // in any state
    bytes.extend(ours.port().to_be_bytes());
    bytes.extend(theirs.port().to_be_bytes());
    for end in [ours, theirs] {
        let mut address = [0; 16];
        match end.ip() {
            IpAddr::V4(ip) => address.iter_mut().zip(ip.octets()).for_each(|(to, byte)| *to = byte),
            IpAddr::V6(ip) => address = ip.octets(),
        }
        bytes.extend(address);
    }
    bytes.extend(0u32.to_ne_bytes()); // on any device
    bytes.extend([0xff; 8]); // whichever socket (INET_DIAG_NOCOOKIE)
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn this_kernel_tells_of_sockets() {
        assert!(are_told().unwrap());
    }

    #[test]
    fn a_connection_is_found_from_both_its_ends_and_a_listener_is_none() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (server, _) = listener.accept().unwrap();
            for socket in [&client, &server] {
                let (ours, theirs) = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
                assert!(is_here(ours, theirs).unwrap());
            }
            let ours = listener.local_addr().unwrap();
            let nobody = SocketAddr::new(ours.ip(), 1);
            assert!(!is_here(ours, nobody).unwrap(), "only the listener has that address");
            drop(listener);
            assert!(!is_here(ours, nobody).unwrap());
        }
    }
}
