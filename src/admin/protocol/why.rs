//! The words of `why`: a packet that is asked about, and its whole way.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::PeerView;

/// Which packet is asked about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// An address, or a node's name.
    pub destination: String,
    /// The flow it belongs to; without one it is an ICMP echo.
    #[serde(default)]
    pub flow: Option<Flow>,
}

/// A transport flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Its protocol.
    pub protocol: Protocol,
    /// Its source port.
    pub source_port: u16,
    /// Its destination port.
    pub destination_port: u16,
}

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The whole way of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WhyView {
    /// What was asked about.
    pub asked: String,
    /// The address that this means.
    pub destination: Option<IpAddr>,
    /// Whether such a packet leaves for its peer.
    pub good: bool,
    /// In one sentence.
    pub verdict: String,
    /// What is wrong, or deserves a look; the first wrong one decides.
    pub findings: Vec<Finding>,
    /// The kernel's route.
    pub route: Option<RouteView>,
    /// The address that a local application would send from.
    pub source: Option<IpAddr>,
    /// The peer.
    pub peer: Option<PeerView>,
    /// Its prefix that holds the destination.
    pub prefix: Option<IpNet>,
    /// How long a packet may be.
    pub mtu: Option<MtuView>,
    /// How the flow is carried.
    pub carried: Option<CarriedView>,
    /// What was dropped on this node for reasons that fit; all peers together.
    pub drops: Vec<DropView>,
    /// An example packet from the outer IP header on.
    pub outer: Option<OuterView>,
}

/// Something that is wrong, or deserves a look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// For programs: `no_peer`, `route_elsewhere`, `no_session`, …
    pub kind: String,
    /// Whether the packet does not arrive because of it.
    pub bad: bool,
    /// For people.
    pub message: String,
    /// What to do: a command, or a key of the config.
    pub fix: Option<String>,
}

/// The kernel's route to the destination.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RouteView {
    /// As `ip route` writes it.
    pub text: String,
    /// `unicast`, `local`, `unreachable`, …
    pub kind: String,
    /// The prefix that won.
    pub prefix: Option<IpNet>,
    /// The device that it leads to.
    pub device: Option<String>,
    /// The next hop, where there is one.
    pub gateway: Option<IpAddr>,
    /// The address that the kernel sends from.
    pub source: Option<IpAddr>,
    /// Whether it leads into the mesh.
    pub to_mesh: bool,
    /// Whether meshd made it.
    pub ours: bool,
}

/// How long a packet may be, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MtuView {
    /// The TUN device's MTU.
    pub device: u32,
    /// The longest inner IP packet that the path to the peer takes.
    pub inner: u32,
    /// That packet on the underlay, outer IP header included.
    pub outer: u32,
    /// Whether probes found that out (RFC 8899); else it follows from this node's own link.
    #[serde(default)]
    pub measured: bool,
    /// The largest TCP payload (without options).
    pub tcp_payload: u32,
    /// The largest UDP payload.
    pub udp_payload: u32,
    /// The largest `ping -s`.
    pub ping_payload: u32,
}

/// How a flow is carried.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CarriedView {
    /// The worker, where there is but one; else the kernel picks a queue of the TUN device.
    pub worker: Option<u32>,
    /// How many workers there are.
    pub workers: u32,
    /// The lane, of an encrypted peer.
    pub lane: Option<u32>,
    /// The underlay address and port that the datagram comes from.
    pub from: Option<SocketAddr>,
    /// Where the datagram goes.
    pub to: Option<SocketAddr>,
    /// All outer source ports that flows to this peer can have.
    pub outer_source_ports: Vec<u16>,
}

/// A drop counter that fits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DropView {
    /// Its name.
    pub reason: String,
    /// Packets.
    pub packets: u64,
    /// What it means.
    pub meaning: String,
}

/// An example packet, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OuterView {
    /// All of it, from the outer IP header on. Of an encrypted packet: its headers, with zeros where WireGuard puts what
    /// only a real packet has.
    pub hex: String,
    /// Bytes that the whole packet has on the underlay.
    pub length: u32,
    /// Header by header.
    pub layers: Vec<LayerView>,
}

/// One header.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LayerView {
    /// `ipv4`, `ipv6`, `udp`, `vxlan`, `wireguard`, `ethernet`, `inner_ipv4`, …
    pub layer: String,
    /// Where it starts.
    pub offset: u32,
    /// Its bytes.
    pub hex: String,
    /// Its fields.
    pub fields: BTreeMap<String, String>,
}
