//! What is wrong with a node list: where, what, and what to do.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::{At, did_you_mean};
use crate::key::{BadKey, PublicKey};
use crate::node::{BadMac, BadNodeName, Mac, NodeName};

/// A node list that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", place(*.at))]
pub struct NodesError {
    /// Line and column, where they are known.
    pub at: Option<At>,
    /// What is wrong there.
    pub problem: NodesProblem,
}

fn place(at: Option<At>) -> String {
    at.map(|At { line, column }| format!("{line}:{column}: ")).unwrap_or_default()
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the message of each variant says what it is, and its fields are the message's words")]
pub enum NodesProblem {
    #[error("{0}")]
    Yaml(String),
    #[error("no nodes are listed; a list has at least this node's own entry: `nodes:` and below it `- name: ...`")]
    NoNodes,
    #[error("{what} should be {wanted}, but is {found}")]
    WrongShape { what: String, wanted: &'static str, found: &'static str },
    #[error("unknown key `{key}`{}", did_you_mean(*.suggestion))]
    UnknownKey { key: String, suggestion: Option<&'static str> },
    #[error("entry {number} has no `name`; give it one")]
    NoName { number: usize },
    #[error("{0}")]
    BadName(BadNodeName),
    #[error("node `{node}` has no `underlay`; write the address that others send to, as in `underlay: 10.9.0.1`")]
    NoUnderlay { node: NodeName },
    #[error("node `{node}`: `{value}` cannot be its underlay address: {why}")]
    BadUnderlay { node: NodeName, value: String, why: String },
    #[error("node `{node}` has two underlay addresses of one family, {first} and {second}; keep one of them")]
    TwoOfAFamily { node: NodeName, first: IpAddr, second: IpAddr },
    #[error("node `{node}`: `{value}` cannot be its subnet: {why}")]
    BadSubnet { node: NodeName, value: String, why: String },
    #[error("node `{node}`: {source}")]
    BadMac { node: NodeName, source: BadMac },
    #[error("node `{node}`: a public key is {source}")]
    BadPublicKey { node: NodeName, source: BadKey },
    #[error("node `{node}` is to be encrypted and has no `public-key`; add it (`meshctl key show` prints it there)")]
    NoPublicKey { node: NodeName },
    #[error("node `{node}`: `lane-keys` go with a `public-key`, and are {most} at most")]
    StrayLaneKeys { node: NodeName, most: usize },
    #[error("nodes `{first}` and `{second}` have the same public key {key}; each lane of each node needs its own")]
    SharedKey { key: PublicKey, first: NodeName, second: NodeName },
    #[error("node `{node}`: `keepalive` cannot be `{value}`; give seconds from 1 to 65535, or remove it")]
    BadKeepalive { node: NodeName, value: String },
    #[error("node `{node}`: its preshared key is {source}; `wg genpsk` makes one")]
    BadPresharedKey { node: NodeName, source: BadKey },
    #[error("node `{node}` has a `preshared-key` and a `preshared-key-file`; keep one of them")]
    TwoPresharedKeys { node: NodeName },
    #[error("node `{node}` has a preshared key and no `public-key`; a tunnel needs both")]
    StrayPresharedKey { node: NodeName },
    #[error("node `{node}`: `encryption` cannot be `{value}`; use `none` or `wireguard`, or remove it")]
    BadEncryption { node: NodeName, value: String },
    #[error("node `{name}` is there twice, first in line {first}; rename or remove one")]
    SameName { name: NodeName, first: u32 },
    #[error("nodes `{first}` and `{second}` have the same underlay address {ip}; each needs its own")]
    SharedUnderlay { ip: IpAddr, first: NodeName, second: NodeName },
    #[error("nodes `{first}` and `{second}` have the same MAC {mac}; give one of them another `mac`")]
    SharedMac { mac: Mac, first: NodeName, second: NodeName },
    #[error("{}", overlap(*.first, first_owner, *.second, second_owner))]
    Overlap { first: IpNet, first_owner: NodeName, second: IpNet, second_owner: NodeName },
    #[error(
        "node `{node}`: underlay address {ip} lies in subnet {subnet} of node `{owner}`, so that its datagrams would go \
         into the tunnel; use an address outside of all subnets"
    )]
    UnderlayInSubnet { ip: IpAddr, node: NodeName, subnet: IpNet, owner: NodeName },
}

fn overlap(first: IpNet, first_owner: &NodeName, second: IpNet, second_owner: &NodeName) -> String {
    if first_owner == second_owner {
        format!("node `{first_owner}`: subnets {first} and {second} overlap; keep one of them")
    } else {
        format!("subnet {second} of node `{second_owner}` overlaps {first} of node `{first_owner}`; change one of them")
    }
}

/// A list in which this node is missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct NoOwnEntry {
    /// This node's name.
    pub name: NodeName,
    /// A few of the names that are there.
    pub some: Vec<NodeName>,
    /// How many there are.
    pub all: usize,
}

impl NoOwnEntry {
    pub(super) const SHOWN: usize = 8;
}

impl fmt::Display for NoOwnEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nodes-file has no entry named {}; it has ", self.name)?;
        for (i, name) in self.some.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{name}")?;
        }
        match self.all.saturating_sub(self.some.len()) {
            _ if self.all == 0 => write!(f, "none")?,
            0 => {}
            more => write!(f, " and {more} more")?,
        }
        write!(f, "; set node-name or add it")
    }
}
