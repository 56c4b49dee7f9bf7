//! What nodes and servers say to each other over HTTPS, as JSON. All of it is under `/v1`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::address::ServerAddress;
use super::authority::Kept;
use super::matrix::Watched;
use super::record::{Mode, NodeRecord, Role};
use super::settings::Secret;

/// What anybody may know: `GET /v1/ca`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaAnswer {
    /// The cluster's id.
    pub cluster: String,
    /// The CA's certificate, DER in base64.
    pub ca: String,
    /// SHA-256 of it, in hexadecimal.
    pub ca_hash: String,
    /// Whether the cluster has a shared secret to join with.
    pub shared_secret: bool,
}

/// What a node says of itself; it can change at any time (`PUT /v1/self`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Myself {
    /// Where it receives data.
    pub underlay: Vec<SocketAddr>,
    /// Its X25519 public keys in base64.
    pub public_keys: Vec<String>,
    /// How others are to send to it.
    pub encryption: Mode,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Taints.
    #[serde(default)]
    pub taints: Vec<String>,
}

/// What a node asks when it joins: `POST /v1/join`, and within `POST /v1/pake/finish` and `POST /v1/rejoin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The name that it wants.
    pub name: String,
    /// What it wants to be.
    pub role: Role,
    /// Everything that can change later.
    pub myself: Myself,
    /// Whether it wants one address instead of a subnet.
    #[serde(default)]
    pub control_only: bool,
    /// Certificate request, PKCS#10 DER in base64.
    pub request: String,
    /// Its clock, seconds since 1970.
    pub clock: i64,
    /// The token, where it joins by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<TokenProof>,
}

/// A token, without what is known anyway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenProof {
    /// Its id.
    pub id: String,
    /// Its secret, in hexadecimal.
    pub secret: Secret,
}

/// The answer to a join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// The node's id from now on.
    pub id: String,
    /// The cluster's id.
    pub cluster: String,
    /// The node's certificate, DER in base64.
    pub certificate: String,
    /// The CA's certificate, DER in base64.
    pub ca: String,
    /// All servers.
    pub servers: Vec<ServerAddress>,
}

/// `POST /v1/pake/start`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PakeStart {
    /// The node's SPAKE2 message, base64.
    pub message: String,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PakeStarted {
    /// The server's SPAKE2 message, base64.
    pub message: String,
}

/// `POST /v1/pake/finish`, on the same connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PakeFinish {
    /// The node's proof, base64.
    pub proof: String,
    /// What it wants.
    pub join: JoinRequest,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PakeFinished {
    /// The server's proof, base64.
    pub proof: String,
    /// The answer to the join.
    pub join: JoinAnswer,
}

/// `POST /v1/renew`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// Certificate request by the same key, DER in base64.
    pub request: String,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewAnswer {
    /// The new certificate, DER in base64.
    pub certificate: String,
}

/// `POST /v1/poll`: a heartbeat, which is answered when the node list changes or the interval is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poll {
    /// The node list's revision that the node has; `None`: none.
    pub revision: Option<u64>,
    /// Answer at once.
    #[serde(default)]
    pub no_wait: bool,
    /// Ids of nodes that its data path reaches: they are not purged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reaches: Vec<String>,
    /// How well it reaches those that it watches; of more than 16 the first count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<Watched>,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PollAnswer {
    /// What changed.
    #[serde(flatten)]
    pub news: News,
    /// All servers.
    #[serde(default)]
    pub servers: Vec<ServerAddress>,
    /// `cluster-cidr`
    #[serde(default)]
    pub cidrs: Vec<ipnet::IpNet>,
}

/// What changed in the node list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum News {
    /// Nothing.
    Same {
        /// The revision.
        revision: u64,
    },
    /// Some nodes.
    Delta {
        /// The revision that it starts from.
        from: u64,
        /// The revision afterwards.
        to: u64,
        /// New and changed nodes.
        upsert: Vec<NodeRecord>,
        /// Ids of nodes that are gone.
        remove: Vec<String>,
    },
    /// The whole list.
    List {
        /// Its revision.
        revision: u64,
        /// All nodes.
        nodes: Vec<NodeRecord>,
    },
}

/// `POST /v1/servers/join`: a server's node wants its etcd to be a member of the cluster's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerJoin {
    /// Where the member will be.
    pub address: IpAddr,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerJoined {
    /// The members' certificate authority, with its key.
    pub authority: Kept,
    /// What tells this etcd from another.
    pub token: String,
    /// All members, the new one included: names and peer URLs.
    pub members: Vec<(String, String)>,
}

/// The answer to `POST /v1/servers/promote`, which the new member repeats until it is so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promoted {
    /// Whether it is a full member.
    pub promoted: bool,
}

/// The answer to `POST /v1/servers`: as the quorum sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServersAnswer {
    /// The full members' names: the identities of their servers' keys.
    pub members: Vec<String>,
}

/// A member of the etcd that the servers run, as a server sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerMember {
    /// The identity of its server's key.
    pub name: String,
    /// Whether it is not a full one yet.
    pub learner: bool,
    /// Whether it answers.
    pub answers: bool,
    /// Whether it leads.
    pub leader: bool,
}

/// Every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorAnswer {
    /// For programs.
    pub code: String,
    /// For people: what, why, and what to do.
    pub message: String,
}
