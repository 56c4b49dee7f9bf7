//! What is shown of the cluster: its nodes, its tokens, and how this node fares in it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

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
