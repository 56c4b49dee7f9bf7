//! An example packet: made byte for byte, and read back header by header.
//!
//! Owns what the sockets of `io::udp` have the kernel put before a datagram: TTL 64, Don't Fragment, identification 0, a
//! real UDP checksum. What only a real packet has (WireGuard's receiver index and counter, an IPv6 flow label) is zero.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, IpHeaders, IpNumber, Ipv4Header, Ipv6Header, PacketBuilder, TransportHeader, UdpHeader,
};

use crate::admin::protocol::why::{Flow, LayerView, OuterView, Protocol};
use crate::engine::tunnel;
use crate::node::Mac;
use crate::wire::vxlan;

const TTL: u8 = 64;

/// The first packet of a flow, without payload; without a flow, an ICMP echo request.
pub fn inner(source: IpAddr, destination: IpAddr, flow: Option<Flow>) -> Vec<u8> {
    let builder = match (source, destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), TTL),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), TTL),
        _ => return Vec::new(),
    };
    let mut bytes = Vec::new();
    // Writing into memory does not fail, and nothing here is too long.
    let written = match flow {
        Some(Flow { protocol: Protocol::Udp, source_port, destination_port }) => {
            builder.udp(source_port, destination_port).write(&mut bytes, &[])
        }
        Some(Flow { protocol: Protocol::Tcp, source_port, destination_port }) => {
            builder.tcp(source_port, destination_port, 0, u16::MAX).syn().write(&mut bytes, &[])
        }
        None if destination.is_ipv4() => builder.icmpv4_echo_request(1, 1).write(&mut bytes, &[]),
        None => builder.icmpv6_echo_request(1, 1).write(&mut bytes, &[]),
    };
    debug_assert!(written.is_ok());
    bytes
}

/// A WireGuard transport message with an inner packet of that length, as far as it can be known.
pub fn sealed(inner: usize) -> Vec<u8> {
    let mut message = vec![0; inner + tunnel::OVERHEAD];
    if let Some(kind) = message.first_mut() {
        *kind = 4;
    }
    message
}

/// The datagram's own headers before its payload, of which the first `shown` bytes are shown, and all of it decoded.
pub fn outer(from: SocketAddr, to: SocketAddr, payload: &[u8], shown: usize) -> Option<OuterView> {
    let payload_len = payload.len() + UdpHeader::LEN;
    let mut bytes = Vec::new();
    let udp = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let len = u16::try_from(payload_len).ok()?;
            let mut ip = Ipv4Header::new(len, TTL, IpNumber::UDP, source.octets(), destination.octets()).ok()?;
            ip.dont_fragment = true;
            ip.header_checksum = ip.calc_header_checksum();
            ip.write(&mut bytes).ok()?;
            UdpHeader::with_ipv4_checksum(from.port(), to.port(), &ip, payload).ok()?
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let ip = Ipv6Header {
                payload_length: u16::try_from(payload_len).ok()?,
                next_header: IpNumber::UDP,
                hop_limit: TTL,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv6Header::default()
            };
            ip.write(&mut bytes).ok()?;
            UdpHeader::with_ipv6_checksum(from.port(), to.port(), &ip, payload).ok()?
        }
        _ => return None,
    };
    // The checksum of what is sealed cannot be known.
    let udp = if shown < payload.len() { UdpHeader { checksum: 0, ..udp } } else { udp };
    udp.write(&mut bytes).ok()?;
    let shown = bytes.len() + shown;
    bytes.extend_from_slice(payload);
    Some(OuterView { hex: hex(bytes.get(..shown)?), length: bytes.len() as u32, layers: decode(&bytes) })
}

/// Bytes as hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads a datagram header by header, from the outer IP header on, as far as it makes sense.
pub fn decode(bytes: &[u8]) -> Vec<LayerView> {
    let mut reader = Reader { bytes, at: 0, layers: Vec::new() };
    reader.outer();
    reader.layers
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    layers: Vec<LayerView>,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    fn add<const N: usize>(&mut self, layer: &str, len: usize, fields: [(&str, String); N]) {
        let fields: BTreeMap<_, _> = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let shown = hex(self.rest().get(..len).unwrap_or_default());
        self.layers.push(LayerView { layer: layer.to_owned(), offset: self.at as u32, hex: shown, fields });
        self.at += len;
    }

    fn outer(&mut self) -> Option<()> {
        self.ip("")?;
        let (udp, behind) = UdpHeader::from_slice(self.rest()).ok()?;
        let checksum = match (udp.checksum, tunnel::is_wireguard(behind)) {
            (_, true) => "of the sealed packet".to_owned(),
            (sum, false) => format!("{sum:#06x}"),
        };
        self.add(
            "udp",
            UdpHeader::LEN,
            [
                ("source_port", udp.source_port.to_string()),
                ("destination_port", udp.destination_port.to_string()),
                ("length", udp.length.to_string()),
                ("checksum", checksum),
            ],
        );
        if tunnel::is_wireguard(behind) {
            let unknown = || "known to the session alone".to_owned();
            self.add(
                "wireguard",
                tunnel::INNER_AT,
                [("type", "4 (transport)".to_owned()), ("receiver", unknown()), ("counter", unknown())],
            );
            return Some(());
        }
        let [flags, _, _, _, a, b, c, _] = *self.rest().first_chunk::<{ vxlan::HEADER_LEN }>()?;
        let vni = u32::from_be_bytes([0, a, b, c]);
        self.add("vxlan", vxlan::HEADER_LEN, [("flags", format!("{flags:#04x}")), ("vni", vni.to_string())]);
        let (ethernet, _) = Ethernet2Header::from_slice(self.rest()).ok()?;
        let kind = match ethernet.ether_type {
            EtherType::IPV4 => "IPv4".to_owned(),
            EtherType::IPV6 => "IPv6".to_owned(),
            other => format!("{:#06x}", other.0),
        };
        self.add(
            "ethernet",
            Ethernet2Header::LEN,
            [
                ("destination", Mac(ethernet.destination).to_string()),
                ("source", Mac(ethernet.source).to_string()),
                ("type", kind),
            ],
        );
        self.ip("inner_")
    }

    fn ip(&mut self, front: &str) -> Option<()> {
        let (headers, payload) = IpHeaders::from_slice(self.rest()).ok()?;
        let number = payload.ip_number;
        match &headers {
            IpHeaders::Ipv4(ip, _) => self.add(
                &format!("{front}ipv4"),
                ip.header_len(),
                [
                    ("source", std::net::Ipv4Addr::from(ip.source).to_string()),
                    ("destination", std::net::Ipv4Addr::from(ip.destination).to_string()),
                    ("length", ip.total_len.to_string()),
                    ("ttl", ip.time_to_live.to_string()),
                    ("tos", format!("{:#04x}", ip.dscp.value() << 2 | ip.ecn.value())),
                    ("id", ip.identification.to_string()),
                    ("dont_fragment", ip.dont_fragment.to_string()),
                    ("protocol", ip.protocol.0.to_string()),
                    ("checksum", format!("{:#06x}", ip.header_checksum)),
                ],
            ),
            IpHeaders::Ipv6(ip, _) => self.add(
                &format!("{front}ipv6"),
                Ipv6Header::LEN,
                [
                    ("source", std::net::Ipv6Addr::from(ip.source).to_string()),
                    ("destination", std::net::Ipv6Addr::from(ip.destination).to_string()),
                    ("payload_length", ip.payload_length.to_string()),
                    ("hop_limit", ip.hop_limit.to_string()),
                    ("flow_label", "by the kernel".to_owned()),
                    ("next_header", ip.next_header.0.to_string()),
                ],
            ),
        }
        if !front.is_empty() {
            self.transport(number);
        }
        Some(())
    }

    fn transport(&mut self, number: IpNumber) {
        let rest = self.rest();
        let header = match number {
            IpNumber::UDP => UdpHeader::from_slice(rest).ok().map(|(udp, _)| TransportHeader::Udp(udp)),
            IpNumber::TCP => etherparse::TcpHeader::from_slice(rest).ok().map(|(tcp, _)| TransportHeader::Tcp(tcp)),
            _ => None,
        };
        match header {
            Some(TransportHeader::Udp(udp)) => self.add(
                "inner_udp",
                UdpHeader::LEN,
                [("source_port", udp.source_port.to_string()), ("destination_port", udp.destination_port.to_string())],
            ),
            Some(TransportHeader::Tcp(tcp)) => self.add(
                "inner_tcp",
                tcp.header_len(),
                [
                    ("source_port", tcp.source_port.to_string()),
                    ("destination_port", tcp.destination_port.to_string()),
                    ("flags", if tcp.syn { "SYN" } else { "-" }.to_owned()),
                ],
            ),
            _ => {
                let kind = rest.first().copied().unwrap_or_default().to_string();
                self.add("inner_icmp", rest.len(), [("type", kind)]);
            }
        }
    }
}
