//! The words of the admin socket: requests, answers and the views inside them.
//!
//! Owns the JSON field names that scripts rely on (fields may be added, never renamed) and how one line becomes a
//! request. It knows no socket and no meshd: both ends share these types and nothing else.
//!
//! Newline-delimited JSON, one document a line each way:
//!
//! ```text
//! -> {"version":1,"request":"peers"}
//! <- {"version":1,"ok":[…]}
//! <- {"version":1,"error":{"code":"denied","message":"…"}}
//! ```

pub mod capture;
pub mod why;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::membership::link;

/// The protocol that this release speaks. It changes only when an old reader would misunderstand a new answer.
pub const VERSION: u32 = 1;

/// The longest request line, newline included.
pub const MAX_REQUEST: usize = 64 * 1024;

/// What can be asked of meshd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Request {
    /// The other nodes, with counters: `Vec<PeerView>`.
    Peers,
    /// The engine's counters: `StatsView`.
    Stats,
    /// This node at a glance: `StatusView`.
    Status,
    /// The node list, this node included: `Vec<NodeView>`.
    Nodes,
    /// This node's public keys: `KeysView`.
    Keys,
    /// The whole way of a packet: `WhyView`.
    Why {
        /// Which packet.
        ask: why::Ask,
    },
    /// Who reaches whom in the mesh, and where to send echoes: `SurveyView`. Takes some seconds.
    Survey,
    /// Packets as they pass: `CaptureView`. What it shows is others' traffic, so it is not for everybody who may look.
    Capture {
        /// What of it.
        ask: capture::Ask,
    },
    /// Let a held-back node list through: a sentence that says what happened.
    NodesAccept,
    /// Something for the servers to answer, as JSON.
    Cluster {
        /// What.
        ask: link::Request,
    },
    /// What a foreign member has to run to be one: `ForeignView`.
    NodeCommands {
        /// Which.
        name: String,
        /// What the interface there is to be called.
        device: String,
        /// Where the private key of a WireGuard peer lies there.
        private_key_file: String,
    },
    /// Leave the cluster, take device and routes away, and stop: a sentence that says what happened.
    Leave {
        /// Also where no server can be told.
        force: bool,
    },
}

impl Request {
    /// The names of all requests, as they stand on the wire.
    pub const NAMES: [&'static str; 12] = [
        "peers",
        "stats",
        "status",
        "nodes",
        "keys",
        "why",
        "survey",
        "capture",
        "nodes-accept",
        "cluster",
        "node-commands",
        "leave",
    ];

    /// Whether the request changes anything, and therefore needs more than the permission to connect.
    pub fn changes(&self) -> bool {
        match self {
            Request::Peers | Request::Stats | Request::Status | Request::Nodes | Request::Keys => false,
            Request::Why { .. } | Request::NodeCommands { .. } | Request::Survey => false,
            Request::Cluster {
                ask:
                    link::Request::Nodes
                    | link::Request::TokenList
                    | link::Request::ClusterStatus
                    | link::Request::ClusterMatrix
                    | link::Request::ClusterAudit,
            } => false,
            Request::Capture { .. } | Request::NodesAccept | Request::Cluster { .. } | Request::Leave { .. } => true,
        }
    }

    /// What it is called on the wire; of a question for the servers, what that is called.
    pub fn name(&self) -> String {
        let tag = |document: Value, tag: &str| document.get(tag).and_then(Value::as_str).map(str::to_owned);
        match self {
            Request::Cluster { ask } => serde_json::to_value(ask).ok().and_then(|ask| tag(ask, "op")),
            other => serde_json::to_value(other).ok().and_then(|request| tag(request, "request")),
        }
        .unwrap_or_default()
    }

    /// The request as a line, newline included.
    pub fn to_line(&self) -> Result<String, serde_json::Error> {
        #[derive(Serialize)]
        struct Envelope<'a> {
            version: u32,
            #[serde(flatten)]
            request: &'a Request,
        }
        serde_json::to_string(&Envelope { version: VERSION, request: self }).map(|line| line + "\n")
    }

    /// Reads one line, with or without its newline.
    pub fn from_line(line: &[u8]) -> Result<Self, ErrorView> {
        let bad = |why: String| ErrorView {
            code: ErrorCode::BadRequest,
            message: format!("{why}; a request is one line such as {{\"version\":{VERSION},\"request\":\"peers\"}}"),
        };
        let document: Value = serde_json::from_slice(line).map_err(|e| bad(format!("this is not JSON ({e})")))?;
        let version = document.get("version").and_then(Value::as_u64).ok_or_else(|| bad("no `version`".to_owned()))?;
        if version != u64::from(VERSION) {
            return Err(ErrorView {
                code: ErrorCode::Version,
                message: format!(
                    "this meshd speaks protocol {VERSION}, the request is in protocol {version}: \
                     use the meshctl that came with it"
                ),
            });
        }
        let name = document.get("request").and_then(Value::as_str).ok_or_else(|| bad("no `request`".to_owned()))?;
        if !Self::NAMES.contains(&name) {
            let name: String = name.chars().take(40).collect();
            return Err(ErrorView {
                code: ErrorCode::UnknownRequest,
                message: format!("this meshd knows no request `{name}`; it knows {}", Self::NAMES.join(", ")),
            });
        }
        serde_json::from_value(document).map_err(|e| bad(e.to_string()))
    }
}

/// One answer line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer<T> {
    /// [`VERSION`] of the side that answers.
    pub version: u32,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome<T>,
}

/// The document asked for, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome<T> {
    /// The document asked for.
    Ok(T),
    /// Why there is none.
    Error(ErrorView),
}

/// Why a request was not answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorView {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what, where, and what to do.
    pub message: String,
}

/// The kinds of [`ErrorView`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// Not a request at all, or too long.
    BadRequest,
    /// A request that this meshd does not know.
    UnknownRequest,
    /// Another protocol version.
    Version,
    /// The caller may read but not change.
    Denied,
    /// Understood and permitted, but meshd declined.
    Refused,
    /// Too many clients at once.
    Busy,
    /// No request came in time.
    Timeout,
    /// A kind that this release does not know.
    #[serde(other)]
    Other,
}

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

/// What crossed one side: `rx` is what meshd read from it, `tx` what it wrote. A super-packet counts as its segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TrafficView {
    /// Packets read.
    pub rx_packets: u64,
    /// Bytes read.
    pub rx_bytes: u64,
    /// Packets written.
    pub tx_packets: u64,
    /// Bytes written.
    pub tx_bytes: u64,
}

/// The account of one direction: `in + originated = out + dropped + consumed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JourneyView {
    /// Packets read.
    #[serde(rename = "in")]
    pub entered: u64,
    /// Packets that meshd made itself.
    pub originated: u64,
    /// Packets written.
    pub out: u64,
    /// Packets discarded, each with a reason.
    pub dropped: u64,
    /// Packets that meshd kept for itself.
    pub consumed: u64,
}

/// Which offloads are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OffloadsView {
    /// TCP super-packets from and to the TUN device.
    pub tun_tso: bool,
    /// UDP super-packets from and to the TUN device.
    pub tun_uso: bool,
    /// Many datagrams in one send.
    pub udp_gso: bool,
    /// Many datagrams in one receive.
    pub udp_gro: bool,
}

/// System calls and what they carried, for batch sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BatchesView {
    /// Reads from the TUN device.
    pub tun_reads: u64,
    /// Packets in them.
    pub tun_read_packets: u64,
    /// Receive calls on UDP sockets.
    pub udp_recv_calls: u64,
    /// Datagrams in them.
    pub udp_recv_datagrams: u64,
    /// Send calls on UDP sockets.
    pub udp_send_calls: u64,
    /// Datagrams in them.
    pub udp_send_datagrams: u64,
    /// Writes to the TUN device.
    pub tun_writes: u64,
    /// Segments in them.
    pub tun_write_segments: u64,
}

/// The engine at work.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StatsView {
    /// meshd's release.
    pub version: String,
    /// This node's name.
    pub node: String,
    /// Since meshd started.
    pub uptime_ms: u64,
    /// The I/O back end in use.
    pub io: String,
    /// Worker threads.
    pub workers: u32,
    /// Which offloads are on.
    pub offloads: OffloadsView,
    /// Offload → why it is off, or why it was switched off.
    pub offload_reasons: BTreeMap<String, String>,
    /// The TUN side.
    pub tun: TrafficView,
    /// The UDP side.
    pub udp: TrafficView,
    /// Every drop reason, also at 0, with what the kernel dropped before meshd.
    pub drops: BTreeMap<String, u64>,
    /// Packets that meshd made itself, both directions.
    pub originated: u64,
    /// Packets that meshd kept for itself, both directions.
    pub consumed: u64,
    /// The account of TUN → UDP.
    pub outbound: JourneyView,
    /// The account of UDP → TUN.
    pub inbound: JourneyView,
    /// System calls and what they carried.
    pub batches: BatchesView,
    /// Packets that a kernel VXLAN device sent with an unfinished checksum.
    pub partial_csum_in: u64,
    /// How often a queue pair went to another thread: to one for bulk traffic or back, or to another worker. Another release's
    /// meshd may not say it.
    #[serde(default)]
    pub pairs_moved: u64,
}

/// How this meshd was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Data plane alone, peers from a nodes-file.
    #[default]
    Run,
    /// A member that also serves the control plane.
    Server,
    /// A member.
    Agent,
}

/// This node at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StatusView {
    /// This node's name.
    pub node: String,
    /// How it was started.
    pub role: Role,
    /// The addresses on the TUN device.
    pub overlay_addresses: Vec<IpAddr>,
    /// This node's VTEP MAC.
    pub vtep_mac: String,
    /// This node's public key, where it encrypts.
    pub public_key: Option<String>,
    /// The TUN device's MTU.
    pub mtu: u32,
    /// Whether packets can cross.
    pub ready: bool,
    /// What stands in the way, or deserves a look: a sentence each.
    pub reasons: Vec<String>,
    /// The TUN device's name.
    pub tun: String,
    /// The I/O back end in use.
    pub io: String,
    /// The UDP data port.
    pub port: u16,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// How many other nodes the list has.
    pub peers: u64,
    /// meshd's release.
    pub version: String,
    /// How membership fares, for a server or an agent.
    #[serde(default)]
    pub membership: Option<MembershipView>,
    /// The capabilities that meshd runs with; left out where there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
}

/// This node's public keys. The private one is nobody's but meshd's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KeysView {
    /// The node's identity, and the key of its first lane; `None` where nothing is encrypted.
    pub public_key: Option<String>,
    /// Those of its further lanes, as `lane-keys` in a nodes-file has them.
    pub lane_keys: Vec<String>,
}

/// How membership fares.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MembershipView {
    /// Whether this node has joined, now or earlier.
    pub joined: bool,
    /// Whether a server answers now.
    pub connected: bool,
    /// Which one.
    pub server: Option<String>,
    /// All known servers.
    pub servers: Vec<String>,
    /// What is wrong, and what to do.
    pub problem: Option<String>,
    /// The cluster's id, once there is a node list.
    pub cluster: Option<String>,
    /// The revision of the node list in use.
    pub revision: Option<u64>,
}

/// A token that was made. It is shown this once: servers keep only a hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenMade {
    /// The token itself.
    pub token: String,
    /// What `token list` and `token revoke` call it.
    pub id: String,
}

/// What a foreign member has to run to be one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ForeignView {
    /// Its name.
    pub name: String,
    /// One shell command each, to be run there as root in this order; they may run again.
    pub commands: Vec<String>,
    /// What a person should know: a sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A token, without what makes it one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TokenView {
    /// For `token revoke`.
    pub id: String,
    /// What a node that joins with it becomes.
    #[serde(default)]
    pub role: Option<String>,
    /// The one node that it is for.
    #[serde(default)]
    pub node: Option<String>,
    /// RFC 3339; `None`: never.
    #[serde(default)]
    pub expires_at: Option<String>,
    /// `None`: unlimited.
    #[serde(default)]
    pub uses_left: Option<u64>,
    /// RFC 3339.
    #[serde(default)]
    pub created_at: Option<String>,
    /// Nobody joins with it any more.
    #[serde(default)]
    pub revoked: bool,
    /// Where it came from.
    #[serde(default)]
    pub description: Option<String>,
}

/// What a node is in its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Serves the control plane.
    Server,
    /// A meshd that does not; each node of a static list.
    Agent,
    /// A kernel VXLAN device or a stock WireGuard peer.
    Foreign,
}

/// What the cluster says of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// A member.
    Ready,
    /// A member that does not report.
    NotReady,
    /// A member on its way out.
    Draining,
    /// Gone.
    Left,
}

/// A node of the list, this one included. Times are RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Unique in the list.
    pub name: String,
    /// The node's identity; in a static list its name.
    pub id: String,
    /// What it is.
    pub role: NodeRole,
    /// How it is.
    pub state: NodeState,
    /// Its underlay addresses.
    pub underlay: Vec<IpAddr>,
    /// The prefixes behind it.
    pub subnets: Vec<IpNet>,
    /// Labels, by key.
    pub labels: BTreeMap<String, String>,
    /// Taints, as `key=value:effect`.
    pub taints: Vec<String>,
    /// When it joined.
    pub joined_at: Option<String>,
    /// When it last reported.
    pub last_heartbeat: Option<String>,
    /// The address that the servers see it connect from.
    #[serde(default)]
    pub observed: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_wire() {
        assert_eq!(Request::Peers.to_line().unwrap(), "{\"version\":1,\"request\":\"peers\"}\n");
        let all = [
            Request::Peers,
            Request::Stats,
            Request::Status,
            Request::Nodes,
            Request::Keys,
            Request::Why { ask: why::Ask { destination: "b".to_owned(), flow: None } },
            Request::Survey,
            Request::Capture { ask: capture::Ask::Fetch { id: 7 } },
            Request::NodesAccept,
            Request::Cluster { ask: link::Request::TokenRevoke { id: "x".to_owned() } },
            Request::NodeCommands {
                name: "k".to_owned(),
                device: "mesh0".to_owned(),
                private_key_file: "/key".to_owned(),
            },
            Request::Leave { force: true },
        ];
        for (request, name) in all.iter().zip(Request::NAMES) {
            let line = request.to_line().unwrap();
            assert!(line.contains(&format!("\"{name}\"")), "{line}");
            assert_eq!(Request::from_line(line.as_bytes()).as_ref(), Ok(request));
        }
        assert_eq!(all.len(), Request::NAMES.len());
    }

    #[test]
    fn looking_is_told_from_changing() {
        let cluster = |ask| Request::Cluster { ask };
        assert!(!cluster(link::Request::TokenList).changes() && !cluster(link::Request::ClusterStatus).changes());
        assert!(cluster(link::Request::Leave).changes() && Request::Leave { force: false }.changes());
        assert!(cluster(link::Request::NodeRemove { name: "a".to_owned() }).changes());
        let create = link::Request::TokenCreate {
            role: crate::membership::record::Role::Agent,
            ttl: None,
            uses: None,
            node: None,
        };
        assert!(cluster(create).changes());
    }

    #[test]
    fn a_bad_request_is_named() {
        let code = |line: &[u8]| Request::from_line(line).map_err(|e| e.code);
        assert_eq!(code(b"{\"version\":1,\"request\":\"peers\",\"later\":true}\r\n"), Ok(Request::Peers));
        for bad in [
            &b""[..],
            b"\n",
            b"peers\n",
            b"[]",
            b"null",
            b"{}",
            b"\xff\xfe\n",
            b"{\"version\":1}",
            b"{\"version\":-1,\"request\":\"peers\"}",
            b"{\"version\":1,\"request\":7}",
            b"{\"version\":1,\"request\":\"peers\"",
        ] {
            assert_eq!(code(bad), Err(ErrorCode::BadRequest), "{}", String::from_utf8_lossy(bad));
        }
        assert_eq!(code("[".repeat(60_000).as_bytes()), Err(ErrorCode::BadRequest));
        assert_eq!(code(b"{\"version\":1,\"request\":\"dance\"}"), Err(ErrorCode::UnknownRequest));
        assert_eq!(code(b"{\"version\":2,\"request\":\"dance\"}"), Err(ErrorCode::Version));
    }

    #[test]
    fn an_answer_survives_the_wire() {
        let good: Answer<u32> = Answer { version: 1, outcome: Outcome::Ok(7) };
        assert_eq!(serde_json::to_string(&good).unwrap(), r#"{"version":1,"ok":7}"#);
        assert_eq!(serde_json::from_str::<Answer<u32>>(r#"{"version":1,"ok":7,"new":1}"#).unwrap(), good);
        let bad = r#"{"version":1,"error":{"code":"from-the-future","message":"no"}}"#;
        let bad: Answer<u32> = serde_json::from_str(bad).unwrap();
        let error = ErrorView { code: ErrorCode::Other, message: "no".to_owned() };
        assert_eq!(bad.outcome, Outcome::Error(error));
    }

    #[test]
    fn enums_have_the_documented_words() {
        let word = |v: Value| v.as_str().unwrap().to_owned();
        assert_eq!(word(serde_json::to_value(Encryption::Wireguard).unwrap()), "wireguard");
        assert_eq!(word(serde_json::to_value(PeerState::Unknown).unwrap()), "unknown");
        assert_eq!(word(serde_json::to_value(NodeState::NotReady).unwrap()), "not-ready");
        assert_eq!(word(serde_json::to_value(NodeRole::Foreign).unwrap()), "foreign");
        assert_eq!(word(serde_json::to_value(Role::Run).unwrap()), "run");
    }
}
