//! BFD control packets (RFC 5880 §4.1), the UDP packets that carry them (RFC 5881 §4), and VXLAN frames of the management
//! network (RFC 8971 §5).
//!
//! ```text
//! |Vers |  Diag   |Sta|P|F|C|A|D|M|  Detect Mult  |    Length     |
//! |                       My Discriminator                        |
//! |                      Your Discriminator                       |
//! |                    Desired Min TX Interval                    |
//! |                   Required Min RX Interval                    |
//! |                 Required Min Echo RX Interval                 |
//! ```
//!
//! Behind it stands an authentication section ([`auth`]) where this node has keys and packets go in the clear; inside a
//! tunnel the tunnel authenticates. Probes of the path (`wire::echo`) travel the same way, to BFD's echo port.

//!
//! # RFC 8971
//!
//! As §5 has it: the management network's VNI, the inner MAC 00-00-5E-00-52-02 (the text's `00-52-02` is its end, below IANA's
//! 00-00-5E), the VTEP's own MAC and address as the source, an inner destination from 127/8 or ::ffff:127.0.0.0/104, TTL 255,
//! port 3784. As §4 has it, what comes in that network ends here and reaches no tenant; as §6 has it, its IP packet is held to
//! RFC 5881 §4 and §5; and as §3 and §9 ask, how many sessions two VTEPs can have is limited: to one. Different on purpose:
//!
//! - The network is 4095 unless said otherwise; the 1 that §4 allows as a default is the data network of meshd and flannel.
//! - Also taken are frames to the VTEP's own MAC, and packets to its own address (which §5 allows) or to ::1.
//! - §7 leaves echo packets out; here they measure the path. They go where control packets go, not to an address that has the
//!   peer forward them back (RFC 5881 §4): the peer's meshd answers them.
//!
//! However many polls and probes come, they are answered eight at a time at most; what comes from no member never gets here.

pub mod auth;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use zerocopy::byteorder::network_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use self::auth::{Keys, Sequence};
use super::checksum::Sum;
use super::echo::Echo;
use super::ip::{self, Packet, protocol};
use super::transport::{UDP_LEN, Udp};
use super::{ethernet, survey, udp, vxlan};

/// Bytes of a control packet without authentication.
pub const LEN: usize = 24;
/// The same with it.
pub const SEALED_LEN: usize = LEN + auth::LEN;
/// The UDP destination port of control packets (RFC 5881 §4).
pub const PORT: u16 = 3784;
/// The UDP destination port of echo packets, whose contents are the sender's matter (RFC 5881 §4).
pub const ECHO_PORT: u16 = 3785;
/// The UDP source ports start here (RFC 5881 §4).
pub const FIRST_SOURCE_PORT: u16 = 49152;
/// TTL and hop limit: what has another one came from further away (RFC 5881 §5, RFC 8971 §5).
pub const TTL: u8 = 255;
/// The inner destination MAC of frames of the management network, which has no tenants (RFC 8971 §5 and §8).
pub const MANAGEMENT_MAC: [u8; 6] = [0x00, 0x00, 0x5e, 0x00, 0x52, 0x02];

/// The session's state as its sender sees it (RFC 5880 §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Held down on purpose: says nothing of the path.
    AdminDown = 0,
    /// No session.
    Down = 1,
    /// The other side is heard, and does not yet hear us.
    Init = 2,
    /// Both hear each other.
    Up = 3,
}

/// Why the sender's session went down last (RFC 5880 §4.1). A number: what a newer sender means must not be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Diagnostic(pub u8);

impl Diagnostic {
    /// It did not.
    pub const NONE: Diagnostic = Diagnostic(0);
    /// Nothing was heard for the detection time.
    pub const EXPIRED: Diagnostic = Diagnostic(1);
    /// The other side said so.
    pub const NEIGHBOR_DOWN: Diagnostic = Diagnostic(3);
    /// On purpose.
    pub const ADMIN_DOWN: Diagnostic = Diagnostic(7);
}

/// A control packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// Why the session went down last.
    pub diagnostic: Diagnostic,
    /// The sender's state.
    pub state: State,
    /// P: answer at once.
    pub poll: bool,
    /// F: this is the answer.
    pub last: bool,
    /// D: the sender wants no periodic packets.
    pub demand: bool,
    /// How many of the sender's packets may be missing; never 0.
    pub multiplier: u8,
    /// The sender's number for the session; never 0.
    pub mine: u32,
    /// The receiver's number for it; 0 while the sender does not know it.
    pub yours: u32,
    /// The shortest interval at which the sender would like to send, in microseconds.
    pub desired_tx_us: u32,
    /// The shortest interval at which it can receive; 0: it wants no periodic packets.
    pub required_rx_us: u32,
    /// The shortest interval at which it answers echo packets; 0: it does not.
    pub required_echo_rx_us: u32,
    /// Its place among the sender's packets, which it has where it is authenticated.
    pub sequence: Option<Sequence>,
}

/// What comes in packets of this kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Of a session.
    Control(Control),
    /// A probe, or an answer to one, and how many bytes its IP packet has.
    Echo(Echo, u16),
    /// A question about the rest of the mesh.
    Ask(survey::Ask),
    /// The answer to one.
    Report(survey::Report),
}

/// Why bytes are no control packet that a session could take (RFC 5880 §6.8.6, its checks in order).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not version 1.
    #[error("not version 1")]
    Version,
    /// Shorter than its fields, or its length field lies.
    #[error("wrong length")]
    Length,
    /// The multiplier is 0.
    #[error("the detection multiplier is 0")]
    Multiplier,
    /// The multipoint bit is set.
    #[error("the multipoint bit is set")]
    Multipoint,
    /// It has no discriminator, or lacks ours where it has to know it.
    #[error("a discriminator is missing")]
    Discriminator,
    /// It is not authenticated as agreed: not at all, by another key, or although nobody agreed to it.
    #[error("not authenticated by a key that is known here")]
    NotAuthentic,
}

/// Why an IP packet gives no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is none, or damaged.
    Another,
    /// [`Malformed::NotAuthentic`].
    NotAuthentic,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    version_diagnostic: u8,
    state_flags: u8,
    multiplier: u8,
    length: u8,
    mine: U32,
    yours: U32,
    desired_tx: U32,
    required_rx: U32,
    required_echo_rx: U32,
}

const VERSION: u8 = 1;
const POLL: u8 = 0x20;
const FINAL: u8 = 0x10;
const AUTHENTICATED: u8 = 0x04;
const DEMAND: u8 = 0x02;
const MULTIPOINT: u8 = 0x01;

impl Control {
    /// Reads what a UDP datagram to [`PORT`] carries; with `keys` it has to be authentic by one of them, without it must
    /// not say that it is (RFC 5880 §6.8.6).
    pub fn parse(bytes: &[u8], keys: Option<&Keys>) -> Result<Control, Malformed> {
        let (raw, _) = Raw::ref_from_prefix(bytes).map_err(|_| Malformed::Length)?;
        if raw.version_diagnostic >> 5 != VERSION {
            return Err(Malformed::Version);
        }
        if usize::from(raw.length) < LEN || usize::from(raw.length) > bytes.len() {
            return Err(Malformed::Length);
        }
        if raw.multiplier == 0 {
            return Err(Malformed::Multiplier);
        }
        if raw.state_flags & MULTIPOINT != 0 {
            return Err(Malformed::Multipoint);
        }
        let state = match raw.state_flags >> 6 {
            0 => State::AdminDown,
            1 => State::Down,
            2 => State::Init,
            _ => State::Up,
        };
        let must_know_us = matches!(state, State::Init | State::Up);
        if raw.mine.get() == 0 || (raw.yours.get() == 0 && must_know_us) {
            return Err(Malformed::Discriminator);
        }
        let whole = bytes.get(..usize::from(raw.length)).ok_or(Malformed::Length)?;
        let sequence = match (raw.state_flags & AUTHENTICATED != 0, keys) {
            (true, Some(keys)) => Some(keys.check(whole).ok_or(Malformed::NotAuthentic)?),
            (true, None) => return Err(Malformed::NotAuthentic),
            (false, Some(keys)) if !keys.accept_none() => return Err(Malformed::NotAuthentic),
            (false, _) => None,
        };
        Ok(Control {
            diagnostic: Diagnostic(raw.version_diagnostic & 0x1f),
            state,
            poll: raw.state_flags & POLL != 0,
            last: raw.state_flags & FINAL != 0,
            demand: raw.state_flags & DEMAND != 0,
            multiplier: raw.multiplier,
            mine: raw.mine.get(),
            yours: raw.yours.get(),
            desired_tx_us: raw.desired_tx.get(),
            required_rx_us: raw.required_rx.get(),
            required_echo_rx_us: raw.required_echo_rx.get(),
            sequence,
        })
    }

    /// Its bytes, and how many of them count: with an authentication section where `keys` have one to send.
    pub fn sealed_bytes(&self, keys: Option<&Keys>) -> ([u8; SEALED_LEN], usize) {
        let mut sealed = [0; SEALED_LEN];
        let (packet, section) = sealed.split_at_mut(LEN);
        packet.copy_from_slice(&self.bytes());
        let Some((key, sequence)) = keys.and_then(Keys::first).zip(self.sequence) else { return (sealed, LEN) };
        if let [_, state_flags, _, length, ..] = packet {
            *state_flags |= AUTHENTICATED;
            *length = SEALED_LEN as u8;
        }
        key.seal(packet, sequence, section);
        (sealed, SEALED_LEN)
    }

    /// Its bytes without authentication.
    pub fn bytes(&self) -> [u8; LEN] {
        let flag = |set, bit| if set { bit } else { 0 };
        let raw = Raw {
            version_diagnostic: VERSION << 5 | self.diagnostic.0 & 0x1f,
            state_flags: (self.state as u8) << 6
                | flag(self.poll, POLL)
                | flag(self.last, FINAL)
                | flag(self.demand, DEMAND),
            multiplier: self.multiplier,
            length: LEN as u8,
            mine: self.mine.into(),
            yours: self.yours.into(),
            desired_tx: self.desired_tx_us.into(),
            required_rx: self.required_rx_us.into(),
            required_echo_rx: self.required_echo_rx_us.into(),
        };
        zerocopy::transmute!(raw)
    }
}

/// The two ends of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Inner source address: the VTEP's.
    pub source: IpAddr,
    /// Inner destination address.
    pub destination: IpAddr,
    /// UDP source port.
    pub source_port: u16,
}

/// Appends the IP packet that carries `message` to `out`; addresses of two families give nothing. An echo packet is filled
/// up with zeros to the bytes that its message says. `keys` authenticate a control packet.
pub fn write_packet(message: &Message, ends: Ends, keys: Option<&Keys>, out: &mut Vec<u8>) {
    let Ends { source, destination, source_port } = ends;
    let ip_len = if source.is_ipv4() { ip::V4_MIN_LEN } else { ip::V6_LEN };
    let (control, echo, survey);
    let (bytes, port, padded): (&[u8], u16, usize) = match message {
        Message::Control(message) => {
            control = message.sealed_bytes(keys);
            (control.0.get(..control.1).unwrap_or_default(), PORT, 0)
        }
        Message::Echo(message, size) => {
            echo = message.bytes();
            (&echo, ECHO_PORT, usize::from(*size).saturating_sub(ip_len + UDP_LEN))
        }
        Message::Ask(message) => {
            survey = message.bytes();
            (&survey, ECHO_PORT, 0)
        }
        Message::Report(message) => {
            survey = message.bytes();
            (&survey, ECHO_PORT, 0)
        }
    };
    let (from, to) = (SocketAddr::new(source, source_port), SocketAddr::new(destination, port));
    // of two families: there is nothing to send
    let _ = udp::write(from, to, TOS, TTL, bytes, padded, out);
}

/// The TOS of control packets: CS6, network control (RFC 4594 §3.2).
pub const TOS: u8 = 0xc0;

/// Appends the VXLAN datagram of the management network `vni` that carries `message` from the VTEP `source` with that MAC.
///
/// As RFC 8971 §5 has it: a MAC that belongs to no tenant, and an inner destination from 127/8 or ::ffff:127.0.0.0/104,
/// which no tenant can have either.
pub fn write_frame(
    message: &Message,
    vni: u32,
    mac: [u8; 6],
    from: (IpAddr, u16),
    keys: Option<&Keys>,
    out: &mut Vec<u8>,
) {
    let (source, source_port) = from;
    let (destination, ether_type) = match source {
        IpAddr::V4(_) => (IpAddr::V4(Ipv4Addr::LOCALHOST), ethernet::IPV4),
        IpAddr::V6(_) => (IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()), ethernet::IPV6),
    };
    let frame = ethernet::Header { destination: MANAGEMENT_MAC, source: mac, ether_type: ether_type.into() };
    out.extend_from_slice(vxlan::Header::new(vni).as_bytes());
    out.extend_from_slice(frame.as_bytes());
    write_packet(message, Ends { source, destination, source_port }, keys, out);
}

/// The message in an IP packet and where it was sent to; refuses anything else, and what did not start with [`TTL`] or is
/// damaged. `keys`: as for [`Control::parse`].
pub fn read_packet(bytes: &[u8], keys: Option<&Keys>) -> Result<(IpAddr, Message), Refused> {
    let packet = Packet::parse(bytes).map_err(|_| Refused::Another)?;
    let (port, payload) = read_udp(&packet, bytes).ok_or(Refused::Another)?;
    let destination = packet.destination;
    if port == PORT {
        return match Control::parse(payload, keys) {
            Ok(control) => Ok((destination, Message::Control(control))),
            Err(Malformed::NotAuthentic) => Err(Refused::NotAuthentic),
            Err(_) => Err(Refused::Another),
        };
    }
    let echo = Echo::parse(payload).map(|echo| Message::Echo(echo, packet.total_len));
    let ask = || survey::Ask::parse(payload).map(Message::Ask);
    let message = echo.or_else(ask).or_else(|| survey::Report::parse(payload).map(Message::Report));
    message.map(|message| (destination, message)).ok_or(Refused::Another)
}

/// The port that the datagram goes to, and what it carries.
fn read_udp<'b>(packet: &Packet, bytes: &'b [u8]) -> Option<(u16, &'b [u8])> {
    let ttl = if packet.is_v6() { bytes.get(7) } else { bytes.get(8) };
    if packet.protocol != protocol::UDP || packet.fragment || ttl != Some(&TTL) {
        return None;
    }
    let datagram = bytes.get(usize::from(packet.header_len)..usize::from(packet.total_len))?;
    let (udp, _) = Udp::ref_from_prefix(datagram).ok()?;
    let datagram = datagram.get(..usize::from(udp.length.get()))?;
    let length = udp.length.get();
    let pseudo = match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => Sum::pseudo_v4(source, destination, protocol::UDP, length),
        (IpAddr::V6(source), IpAddr::V6(destination)) => Sum::pseudo_v6(&source, &destination, protocol::UDP, length),
        _ => return None,
    };
    let unsummed = udp.checksum == [0; 2] && !packet.is_v6();
    // a kernel VXLAN device over a virtual link leaves the rest of the sum to somebody who never does it
    let unfinished = udp.checksum == pseudo.finish().map(|byte| !byte);
    let port = udp.destination.get();
    if !matches!(port, PORT | ECHO_PORT) || !(unsummed || unfinished || pseudo.bytes(datagram).is_valid()) {
        return None;
    }
    Some((port, datagram.get(UDP_LEN..)?))
}

/// Reads a VXLAN datagram of the management network, whose VNI the caller knows to be that.
pub fn read_frame(datagram: &[u8], keys: Option<&Keys>) -> Result<(IpAddr, Message), Refused> {
    read_packet(datagram.get(vxlan::HEADER_LEN + ethernet::HEADER_LEN..).ok_or(Refused::Another)?, keys)
}

/// Whether it is one of those addresses that frames of the management network go to.
pub fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()) || ip == Ipv6Addr::LOCALHOST,
    }
}

#[cfg(test)]
mod tests;
