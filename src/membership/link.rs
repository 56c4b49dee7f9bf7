//! What `meshd` and `mesh-sidecar` say to each other over the socket that the sidecar inherits: one JSON document a line,
//! either side at any time.
//!
//! `meshd` says who this node is and passes on what `meshctl` asks; the sidecar says which nodes there are and how
//! membership fares. Either may come back after the other died: `Hello` and a whole [`FromSidecar::List`] come first on a new
//! socket, so nothing depends on what was said before.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::matrix::Watched;
use super::record::{Mode, NodeRecord};

/// A message from `meshd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromMeshd {
    /// Who this node is; said again whenever any of it changes. The first one starts the sidecar's work.
    Hello(Hello),
    /// Something that `meshctl` asked of `meshd`, for the servers to answer. See [`Request`].
    Request {
        /// Repeated in the answer.
        id: u64,
        /// What is asked.
        request: Request,
    },
    /// What the data path knows of others. Holds until it is said again.
    Peers(Peers),
    /// `tls-san` is another now, and everything else of the settings as it was.
    Names {
        /// The whole list.
        tls_san: Vec<String>,
    },
    /// Is anybody there? [`FromSidecar::Pong`] says so.
    Ping,
}

/// What the data path knows of other nodes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Peers {
    /// Ids of nodes that it hears, and the servers do not: they are not to be purged.
    pub heard: Vec<String>,
    /// How well it reaches those that it watches.
    #[serde(default)]
    pub paths: Vec<Watched>,
}

/// What the data plane knows of this node, and the servers should.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// `node-name`
    pub name: String,
    /// `advertise-address` or the underlay's addresses, with the data port.
    pub underlay: Vec<SocketAddr>,
    /// Public keys in base64, one a lane.
    pub public_keys: Vec<String>,
    /// What this node wants others to use.
    pub encryption: Mode,
}

/// What may be asked of the servers, by the words of `meshctl`. Answers are JSON, as `meshctl --json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// `meshctl nodes`: an array of [`NodeRecord`]s; from the copy on disk, with a notice, where no server answers.
    Nodes,
    /// `meshctl node add`: a foreign member, of which only what a user gives is set.
    NodeAdd {
        /// Its name.
        name: String,
        /// Where it receives data.
        underlay: Vec<SocketAddr>,
        /// Its prefixes; empty: the servers choose.
        subnets: Vec<ipnet::IpNet>,
        /// The MAC of its VXLAN device.
        mac: Option<String>,
        /// WireGuard public key; without it VXLAN.
        public_key: Option<String>,
    },
    /// `meshctl node drain NAME`
    NodeDrain {
        /// The node.
        name: String,
    },
    /// `meshctl node undrain NAME`
    NodeUndrain {
        /// The node.
        name: String,
    },
    /// `meshctl node remove NAME`
    NodeRemove {
        /// The node.
        name: String,
    },
    /// `meshctl leave`: this node goes. The answer comes when the servers know.
    Leave,
    /// `meshctl token create`: the answer has `token` and `id`.
    TokenCreate {
        /// `agent` or `server`.
        role: super::record::Role,
        /// Seconds; `None`: no expiry.
        ttl: Option<u64>,
        /// How many joins; `None`: unlimited.
        uses: Option<u32>,
        /// Only for this node.
        node: Option<String>,
    },
    /// `meshctl token list`: an array of `{id, role, node, expires_at, uses_left, created_at, description}`.
    TokenList,
    /// `meshctl token revoke ID`
    TokenRevoke {
        /// The token's id.
        id: String,
    },
    /// `meshctl cluster status`
    ClusterStatus,
    /// `meshctl cluster matrix`: the answer is a [`Matrix`](super::matrix::Matrix).
    ClusterMatrix,
    /// `meshctl cluster audit`: an array of [`AuditLine`]s, the oldest first.
    ClusterAudit,
}

/// Something that somebody may want to know later: who made, used or revoked a token, who joined, was refused or went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditLine {
    /// When, RFC 3339.
    pub at: String,
    /// What.
    pub what: String,
    /// Whom it concerns.
    pub node: Option<String>,
    /// The id of a token.
    pub token: Option<String>,
    /// Where it was asked from, where that is known.
    pub from: Option<String>,
}

/// A message from the sidecar.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromSidecar {
    /// The whole node list.
    List {
        /// The store's revision: grows with each change.
        revision: u64,
        /// The cluster's id, so that nobody takes one cluster's list for another's.
        cluster: String,
        /// `cluster-cidr`: what is for these prefixes never leaves but through the mesh.
        #[serde(default)]
        cidrs: Vec<ipnet::IpNet>,
        /// All nodes, this one included.
        nodes: Vec<NodeRecord>,
    },
    /// What changed since a revision; a gap makes `meshd` ask for nothing: the sidecar sends a list after each reconnect.
    Delta {
        /// The revision that this builds on.
        from: u64,
        /// The revision afterwards.
        to: u64,
        /// Nodes that are new or changed.
        upsert: Vec<NodeRecord>,
        /// Ids of nodes that are gone.
        remove: Vec<String>,
    },
    /// How membership fares; whenever it changes.
    Status(Status),
    /// The answer to [`FromMeshd::Request`].
    Answer {
        /// The request's.
        id: u64,
        /// The answer, or why there is none.
        result: Result<Value, Refusal>,
    },
    /// The answer to [`FromMeshd::Ping`].
    Pong,
    /// This node was removed from the cluster: no peer will talk to it any more.
    Expelled {
        /// Who removed it, or what else happened.
        reason: String,
    },
}

/// How membership fares.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Status {
    /// Whether this node has joined, now or earlier.
    pub joined: bool,
    /// Whether a server answers now.
    pub connected: bool,
    /// Which server.
    pub server: Option<String>,
    /// All known servers.
    pub servers: Vec<String>,
    /// What is wrong, and what to do.
    pub problem: Option<String>,
    /// Whether that is what a server answered, which is to say that servers are there.
    #[serde(default)]
    pub refused: bool,
    /// What a server that is joining waits for, while nothing is wrong.
    #[serde(default)]
    pub progress: Option<String>,
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What, why, and what to do.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_survives_the_link() {
        let there_and_back = |message: FromSidecar| {
            let line = serde_json::to_string(&message).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<FromSidecar>(&line).unwrap(), message, "{line}");
        };
        there_and_back(FromSidecar::List { revision: 1, cluster: "c".into(), cidrs: vec![], nodes: vec![] });
        there_and_back(FromSidecar::Delta { from: 1, to: 2, upsert: vec![], remove: vec!["x".into()] });
        there_and_back(FromSidecar::Status(Status { joined: true, ..Status::default() }));
        there_and_back(FromSidecar::Answer { id: 1, result: Ok(Value::Null) });
        there_and_back(FromSidecar::Answer { id: 2, result: Err(Refusal { message: "no".into() }) });
        there_and_back(FromSidecar::Pong);
        there_and_back(FromSidecar::Expelled { reason: "removed".into() });
    }
}
