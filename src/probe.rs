//! ICMP echoes through the mesh, of several sizes up to the longest that fits: what `meshctl ping` does.
//!
//! Owns a raw socket and the waiting. Which address a node has, and what fits, it is told.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::wire::checksum::Sum;

/// Bytes of an ICMP echo's header.
const HEADER: usize = 8;

/// What became of the echoes of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Row {
    /// Bytes behind the ICMP header, as `ping -s` counts them.
    pub payload: u32,
    /// Echoes that were sent.
    pub sent: u32,
    /// Those that came back.
    pub received: u32,
    /// The fastest round trip.
    pub min_us: Option<u64>,
    /// The mean.
    pub avg_us: Option<u64>,
    /// The slowest.
    pub max_us: Option<u64>,
}

/// Where to, and how much.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The address.
    pub to: IpAddr,
    /// The address to send from; `None`: the kernel chooses.
    pub from: Option<IpAddr>,
    /// Payloads.
    pub sizes: Vec<u32>,
    /// Echoes of each size.
    pub count: u32,
    /// How long one may take.
    pub patience: Duration,
}

/// Payloads worth a look below the longest: none, an ordinary one, half, all.
pub fn sizes(longest: u32) -> Vec<u32> {
    let mut sizes: Vec<u32> = [16, 56, longest / 2, longest].into_iter().filter(|size| *size <= longest).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Sends one echo after the other and waits for each.
pub fn run(probe: &Probe) -> io::Result<Vec<Row>> {
    let v6 = probe.to.is_ipv6();
    let (domain, protocol) = if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    if let Some(from) = probe.from {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    socket.connect(&SocketAddr::new(probe.to, 0).into())?;
    let id = std::process::id() as u16;
    let mut sequence = 0u16;
    let mut rows = Vec::new();
    for payload in &probe.sizes {
        let mut times = Vec::new();
        for _ in 0..probe.count {
            sequence = sequence.wrapping_add(1);
            let start = Instant::now();
            // What the kernel refuses (unreachable, too long) is lost like what never comes back.
            let sent = socket.send(&echo(v6, id, sequence, *payload as usize)).is_ok();
            if sent && wait(&socket, v6, (id, sequence), start + probe.patience)? {
                times.push(start.elapsed().as_micros() as u64);
            }
        }
        let received = times.len() as u32;
        rows.push(Row {
            payload: *payload,
            sent: probe.count,
            received,
            min_us: times.iter().min().copied(),
            avg_us: times.iter().sum::<u64>().checked_div(received.into()),
            max_us: times.iter().max().copied(),
        });
    }
    Ok(rows)
}

/// An echo request (RFC 792, RFC 4443 §4.1). For ICMPv6 the kernel writes the checksum.
fn echo(v6: bool, id: u16, sequence: u16, payload: usize) -> Vec<u8> {
    let mut bytes = vec![if v6 { 128 } else { 8 }, 0, 0, 0];
    bytes.extend(id.to_be_bytes().into_iter().chain(sequence.to_be_bytes()));
    bytes.extend((0..payload).map(|at| at as u8));
    if !v6 {
        let sum = Sum::default().bytes(&bytes).finish();
        if let Some(place) = bytes.get_mut(2..4) {
            place.copy_from_slice(&sum);
        }
    }
    bytes
}

/// Whether the answer comes in time. A raw socket hears others' answers as well.
fn wait(socket: &Socket, v6: bool, wanted: (u16, u16), until: Instant) -> io::Result<bool> {
    let mut room = vec![0; 1 << 16];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        socket.set_read_timeout(Some(left))?;
        match (&mut &*socket).read(&mut room) {
            Ok(len) if answers(room.get(..len).unwrap_or_default(), v6) == Some(wanted) => return Ok(true),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(false);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // An ICMP error that came back: this one is lost.
            Err(_) => return Ok(false),
        }
    }
}

/// Identifier and sequence number of an echo reply. IPv4 hands over its own header, too.
fn answers(bytes: &[u8], v6: bool) -> Option<(u16, u16)> {
    let at = if v6 { 0 } else { usize::from(bytes.first()? & 0x0f) * 4 };
    let [kind, _, _, _, id @ ..] = bytes.get(at..)?.first_chunk::<HEADER>()?;
    let [a, b, c, d] = id;
    (*kind == if v6 { 129 } else { 0 }).then(|| (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_go_up_to_what_fits() {
        assert_eq!(sizes(1422), [16, 56, 711, 1422]);
        assert_eq!(sizes(56), [16, 28, 56]);
        assert_eq!(sizes(8), [4, 8]);
    }

    #[test]
    fn an_echo_is_told_from_the_rest() {
        let request = echo(false, 7, 9, 5);
        assert!(Sum::default().bytes(&request).is_valid(), "its checksum is right");
        let mut reply = [vec![0x45; 20], request].concat();
        assert_eq!(answers(&reply, false), None, "a request is no answer");
        reply[20] = 0;
        assert_eq!(answers(&reply, false), Some((7, 9)));
        assert_eq!(answers(&reply[..27], false), None);
        assert_eq!(answers(&[], false), None);
        let mut reply = echo(true, 7, 9, 0);
        reply[0] = 129;
        assert_eq!(answers(&reply, true), Some((7, 9)));
    }
}
