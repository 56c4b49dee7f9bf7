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
mod members;
mod peers;
mod stats;
pub mod why;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::members::*;
pub use self::peers::*;
pub use self::stats::*;
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
