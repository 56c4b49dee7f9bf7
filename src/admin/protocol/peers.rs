//! What is shown of other nodes: the answers to `meshctl peers` and `meshctl test`.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use crate::node::Encryption;

/// What liveness says of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// It answers.
    Up,
    /// It stopped answering.
    Down,
    /// Nobody probes it.
    #[default]
    Unknown,
}

/// Another node, as this one sees it. Packets and bytes are inner ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    /// The node's name.
    pub name: String,
    /// Where datagrams to it go.
    pub endpoint: SocketAddr,
    /// The prefixes behind it.
    pub subnets: Vec<IpNet>,
    /// Its VTEP MAC.
    pub mac: String,
    /// Its public key, where it encrypts.
    pub public_key: Option<String>,
    /// How datagrams to it are protected.
    pub encryption: Encryption,
    /// Both sides also have to know a preshared key.
    #[serde(default)]
    pub preshared: bool,
    /// Its WireGuard session, where it is encrypted.
    #[serde(default)]
    pub session: Option<SessionView>,
    /// What liveness says.
    pub state: PeerState,
    /// Age of the last datagram from it.
    pub last_seen_ms: Option<u64>,
    /// Smoothed round trip.
    pub rtt_us: Option<u64>,
    /// Of a thousand probes so many were lost, of the last 64.
    #[serde(default)]
    pub loss_permille: Option<u32>,
    /// The same for each way that packets to it take.
    #[serde(default)]
    pub ways: Vec<WayView>,
    /// The longest inner IP packet that the path to it takes.
    pub path_mtu: u32,
    /// How that is known; `None`: it follows from this node's own link.
    #[serde(default)]
    pub path: Option<PathView>,
    /// Inner packets sent to it.
    pub tx_packets: u64,
    /// Inner bytes sent to it.
    pub tx_bytes: u64,
    /// Inner packets received from it.
    pub rx_packets: u64,
    /// Inner bytes received from it.
    pub rx_bytes: u64,
}

/// One of the ways that packets to a peer take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayView {
    /// The outer source port.
    pub source_port: u16,
    /// The lane, where it is encrypted.
    pub lane: Option<u32>,
    /// Smoothed round trip.
    pub rtt_us: Option<u64>,
    /// Of a thousand probes so many were lost, of the last 64.
    pub loss_permille: Option<u32>,
}

/// What is known of the path to a peer (RFC 8899).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathView {
    /// How far the search is.
    pub search: Search,
    /// How long ago a probe of the size in use was answered.
    pub confirmed_ms: Option<u64>,
    /// How often the size in use stopped arriving.
    pub black_holes: u32,
}

/// The states of RFC 8899 §5.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Search {
    /// The peer does not answer probes at present; what was found before is kept for ten minutes.
    Disabled,
    /// What was in use does not arrive any more.
    Base,
    /// Something larger is being looked for.
    Searching,
    /// The largest size is known.
    SearchComplete,
    /// Not even the base size arrives.
    Error,
}

/// A WireGuard session with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SessionView {
    /// Age of the last handshake, while there is a session.
    pub handshake_age_ms: Option<u64>,
    /// Lanes that there are between the two nodes.
    pub lanes: usize,
    /// Those that have a session.
    pub lanes_up: usize,
    /// Packets that wait for one.
    pub waiting: usize,
    /// Handshakes that were started since the last session, and not answered.
    #[serde(default)]
    pub unanswered: u32,
    /// The peer answers as one with another preshared key would, or with none.
    #[serde(default)]
    pub another_preshared: bool,
}

/// Who reaches whom.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SurveyView {
    /// This node.
    pub node: String,
    /// What each node that answered thinks of each other.
    pub pairs: Vec<PairView>,
    /// Nodes that did not say what they think of others: they are down, do not speak BFD, or are not meshd.
    pub silent: Vec<String>,
    /// Where echoes of this node can be sent.
    pub targets: Vec<TargetView>,
}

/// One direction between two nodes, as its sender sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairView {
    /// Who sends.
    pub from: String,
    /// To whom.
    pub to: String,
    /// What its liveness says.
    pub state: PeerState,
    /// How datagrams are protected.
    pub encryption: Encryption,
    /// The longest inner IP packet.
    pub path_mtu: u32,
    /// The round trip.
    pub rtt_us: Option<u64>,
}

/// A node's address in the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetView {
    /// Its name.
    pub node: String,
    /// The address.
    pub address: IpAddr,
    /// This node's address of that family.
    pub source: IpAddr,
    /// The largest `ping -s`.
    pub ping_payload: u32,
}
