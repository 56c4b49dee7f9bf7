//! A node as the control plane knows it: what servers store, agents receive and `meshd` turns into its peer table.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What a node is to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It also serves the control plane.
    Server,
    /// It joined one.
    Agent,
    /// It speaks VXLAN or WireGuard, and nothing else of ours.
    Foreign,
}

impl Role {
    /// In the user's words.
    pub fn name(self) -> &'static str {
        match self {
            Role::Server => "server",
            Role::Agent => "agent",
            Role::Foreign => "foreign",
        }
    }
}

/// What the servers think of a node's health and life cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its heartbeats arrive.
    Ready,
    /// They do not.
    NotReady,
    /// It is to be relieved of its work: others should open no new flows to its services.
    Draining,
    /// It left, or is leaving: nobody sends to it any more.
    Left,
}

/// How packets to a node travel.
pub use crate::node::Encryption as Mode;

/// One node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Given by the servers at the first join, never used again for another node.
    pub id: String,
    /// Unique among the nodes that there are.
    pub name: String,
    /// Server, agent or foreign.
    pub role: Role,
    /// Its state.
    pub state: State,
    /// Where it receives data: at most one for each address family.
    pub underlay: Vec<SocketAddr>,
    /// The prefixes that the servers gave it.
    pub subnets: Vec<IpNet>,
    /// VTEP MAC, where it is not derived from the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Its X25519 public keys in base64, one a lane; the first is the node's identity. Empty where it cannot encrypt.
    #[serde(default)]
    pub public_keys: Vec<String>,
    /// How others send to it.
    pub encryption: Mode,
    /// Labels, as in Kubernetes.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Taints, `key=value:effect`.
    #[serde(default)]
    pub taints: Vec<String>,
    /// When it joined, RFC 3339.
    pub joined_at: String,
    /// When its last heartbeat came, RFC 3339. Not part of what makes a new revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heartbeat: Option<String>,
    /// The address that the servers see it connect from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<String>,
}
