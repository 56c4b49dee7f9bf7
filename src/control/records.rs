//! The cluster's records to a [`NodeList`], by the rules of the static list.
//!
//! Owns what was received, in the order of revisions, and which records are nodes to talk to. Pure: does not know over
//! what the records came, or what is done with the list.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use ipnet::IpNet;

use super::nodes_file::{self, NodesProblem, Placed};
use crate::config::{At, shorten};
use crate::key::{MAX_LANES, PublicKey};
use crate::membership::record::{NodeRecord, State};
use crate::node::{Encryption, Node, NodeList, NodeName};

/// One a family.
const MAX_CIDRS: usize = 2;

/// What the servers say, as of one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Records {
    /// The cluster's id.
    pub cluster: String,
    /// The store's revision.
    pub revision: u64,
    /// The cluster's prefixes, as the servers say.
    pub cidrs: Vec<IpNet>,
    /// The nodes, by id.
    pub nodes: BTreeMap<String, NodeRecord>,
}

/// A delta that builds on something else than what is here: whoever sent it has to send the whole list again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a change from revision {from} does not fit the node list of revision {here}")]
pub struct Gap {
    /// What the delta builds on.
    pub from: u64,
    /// What is here.
    pub here: u64,
}

/// Why records are no node list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the servers' node list (revision {revision}) is refused: {problem}")]
pub struct RecordsError {
    /// The revision.
    pub revision: u64,
    /// What is wrong, and with which node.
    pub problem: Box<NodesProblem>,
}

impl Records {
    /// A whole list.
    pub fn new(cluster: String, revision: u64, nodes: Vec<NodeRecord>) -> Self {
        let nodes = nodes.into_iter().map(|record| (record.id.clone(), record)).collect();
        Records { cluster, revision, cidrs: Vec::new(), nodes }
    }

    /// The same in a cluster with these prefixes.
    pub fn within(self, cidrs: Vec<IpNet>) -> Self {
        Records { cidrs, ..self }
    }

    /// The cluster's prefixes: what is for them goes through the mesh or nowhere, also while nobody has it. Left out is
    /// what cannot be routed, or would catch what the nodes of `list` send each other.
    pub fn prefixes(&self, list: &NodeList) -> Vec<IpNet> {
        let catches = |net: &IpNet| list.nodes.iter().flat_map(Node::underlay_ips).any(|ip| net.contains(&ip));
        let good = |net: &&IpNet| nodes_file::subnet(&net.to_string()).is_ok() && !catches(net);
        self.cidrs.iter().filter(good).take(MAX_CIDRS).copied().collect()
    }

    /// Takes a change over.
    pub fn change(&mut self, from: u64, to: u64, upsert: Vec<NodeRecord>, remove: &[String]) -> Result<(), Gap> {
        if from != self.revision {
            return Err(Gap { from, here: self.revision });
        }
        for id in remove {
            self.nodes.remove(id);
        }
        self.nodes.extend(upsert.into_iter().map(|record| (record.id.clone(), record)));
        self.revision = to;
        Ok(())
    }

    /// The nodes to talk to. Those that left are none.
    pub fn list(&self) -> Result<NodeList, RecordsError> {
        let there = self.nodes.values().filter(|record| record.state != State::Left);
        let placed = (1..).zip(there).map(|(number, record)| placed(record, number));
        placed
            .collect::<Result<_, _>>()
            .and_then(|placed| nodes_file::checked(placed).map_err(|error| error.problem))
            .map_err(|problem| RecordsError { revision: self.revision, problem: Box::new(problem) })
    }

    /// The others that the servers do not hear: their ids by name.
    pub fn missed(&self, own: &NodeName) -> BTreeMap<String, String> {
        let missed = self.nodes.values().filter(|r| r.state == State::NotReady && r.name != own.as_str());
        missed.map(|record| (record.name.clone(), record.id.clone())).collect()
    }

    /// The record of that name among those that have not left.
    pub fn named(&self, name: &NodeName) -> Option<&NodeRecord> {
        self.nodes.values().find(|record| record.name == name.as_str() && record.state != State::Left)
    }
}

/// A record as an entry of a list. Its number stands where an entry of a file has its line.
fn placed(record: &NodeRecord, number: u32) -> Result<Placed, NodesProblem> {
    let at = At { line: number, column: 1 };
    let name: NodeName = record.name.parse().map_err(NodesProblem::BadName)?;
    let node = || name.clone();
    let mac = match &record.mac {
        Some(mac) => mac.parse().map_err(|source| NodesProblem::BadMac { node: node(), source })?,
        None => name.derived_mac(),
    };
    let bad_key = |source| NodesProblem::BadPublicKey { node: node(), source };
    let public_keys: Vec<PublicKey> =
        record.public_keys.iter().map(|key| key.parse()).collect::<Result<_, _>>().map_err(bad_key)?;
    if public_keys.len() > MAX_LANES || (record.encryption == Encryption::Wireguard && public_keys.is_empty()) {
        return Err(NodesProblem::NoPublicKey { node: node() });
    }
    let keys_at = vec![at; public_keys.len()];
    let encryption = Some(record.encryption);
    let mut placed = Placed {
        node: Node { mac, encryption, public_keys, ..Node::named(node()) },
        at,
        underlay_at: Vec::new(),
        subnets_at: Vec::new(),
        mac_at: at,
        keys_at,
    };
    for address in &record.underlay {
        let text = address.to_string();
        let address = nodes_file::underlay(&text, NonZeroU16::MIN).map_err(|why| NodesProblem::BadUnderlay {
            node: node(),
            value: shorten(&text),
            why,
        })?;
        placed.add_underlay(address, at).map_err(|error| error.problem)?;
    }
    if placed.node.underlay.is_empty() {
        return Err(NodesProblem::NoUnderlay { node: node() });
    }
    for net in &record.subnets {
        let text = net.to_string();
        let net = nodes_file::subnet(&text).map_err(|why| NodesProblem::BadSubnet {
            node: node(),
            value: shorten(&text),
            why,
        })?;
        placed.node.subnets.push(net);
        placed.subnets_at.push(at);
    }
    Ok(placed)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::membership::record::{Mode, Role};

    /// Node number N: 10.9.0.N, 10.42.N.0/24.
    pub(crate) fn record(name: &str, number: u8) -> NodeRecord {
        NodeRecord {
            id: format!("id-{name}"),
            name: name.to_owned(),
            role: Role::Agent,
            state: State::Ready,
            underlay: vec![([10, 9, 0, number], 8472).into()],
            subnets: vec![format!("10.42.{number}.0/24").parse().unwrap()],
            mac: None,
            public_keys: Vec::new(),
            encryption: Mode::None,
            labels: BTreeMap::new(),
            taints: Vec::new(),
            joined_at: "2026-11-20T00:00:00Z".to_owned(),
            last_heartbeat: None,
            observed: None,
        }
    }

    fn records(nodes: Vec<NodeRecord>) -> Records {
        Records::new("c".to_owned(), 7, nodes)
    }

    #[test]
    fn records_are_nodes_unless_they_left() {
        let mut left = record("b", 1); // its addresses are another's by now
        left.state = State::Left;
        let mut draining = record("c", 3);
        draining.state = State::Draining;
        let records = records(vec![draining, left, record("a", 1)]);
        let list = records.list().unwrap();
        assert_eq!(list.nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["a", "c"]);
        assert_eq!(list.nodes[0].mac, list.nodes[0].name.derived_mac());
        assert!(records.missed(&"a".parse().unwrap()).is_empty());
        let mut away = records.clone();
        away.nodes.values_mut().for_each(|record| record.state = State::NotReady);
        assert_eq!(away.missed(&"a".parse().unwrap()).into_values().collect::<Vec<_>>(), ["id-b", "id-c"]);
        assert!(records.named(&"b".parse().unwrap()).is_none());
        assert_eq!(records.named(&"a".parse().unwrap()).unwrap().id, "id-a");
    }

    #[test]
    fn a_bad_record_is_named() {
        let bad = |change: fn(&mut NodeRecord)| {
            let mut second = record("b", 2);
            change(&mut second);
            records(vec![record("a", 1), second]).list().unwrap_err().to_string()
        };
        for (change, what) in [
            ((|r| r.name = "a b".into()) as fn(&mut NodeRecord), "`a b` is not a node name"),
            (|r| r.name = "a".into(), "node `a` is there twice"),
            (|r| r.underlay.clear(), "node `b` has no `underlay`"),
            (|r| r.underlay = vec![([127, 0, 0, 1], 8472).into()], "loopback"),
            (|r| r.underlay = vec![([10, 9, 0, 2], 0).into()], "port from 1 to 65535"),
            (|r| r.underlay = vec![([10, 9, 0, 1], 9).into()], "nodes `a` and `b` have the same underlay"),
            (|r| r.underlay = vec![([10, 42, 1, 1], 9).into()], "node `b`: underlay address 10.42.1.1 lies in subnet"),
            (|r| r.subnets = vec!["0.0.0.0/0".parse().unwrap()], "node `b`: `0.0.0.0/0` cannot be its subnet"),
            (|r| r.subnets = vec!["10.42.0.0/16".parse().unwrap()], "subnet 10.42.0.0/16 of node `b` overlaps"),
            (|r| r.mac = Some("02:ca:97:81:12:ca".into()), "nodes `a` and `b` have the same MAC"),
            (|r| r.mac = Some("x".into()), "node `b`: `x` is not a unicast MAC"),
            (|r| r.encryption = Mode::Wireguard, "node `b` is to be encrypted and has no `public-key`"),
            (|r| r.public_keys = vec!["x".into()], "node `b`: a public key is"),
        ] {
            let error = bad(change);
            assert!(error.contains(what) && error.contains("(revision 7) is refused"), "{what}: {error}");
        }
    }

    #[test]
    fn the_clusters_prefixes_are_claimed_but_not_the_underlay() {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        let claimed = |cidrs: &[&str]| {
            let records = records(vec![record("a", 1)]).within(nets(cidrs));
            records.prefixes(&records.list().unwrap())
        };
        assert_eq!(claimed(&["10.42.0.0/16", "fd42::/48"]), nets(&["10.42.0.0/16", "fd42::/48"]));
        assert_eq!(claimed(&["10.0.0.0/8", "0.0.0.0/0", "127.0.0.0/8", "::/0", "fd42::/48"]), nets(&["fd42::/48"]));
    }

    #[test]
    fn changes_build_on_one_another() {
        let mut all = records(vec![record("a", 1), record("b", 2)]);
        all.change(7, 9, vec![record("c", 3), record("a", 4)], &["id-b".to_owned(), "id-x".to_owned()]).unwrap();
        assert_eq!((all.revision, all.nodes.len()), (9, 2));
        assert_eq!(all.nodes["id-a"].underlay[0].ip().to_string(), "10.9.0.4");
        assert_eq!(all.change(8, 10, vec![], &[]), Err(Gap { from: 8, here: 9 }));
        assert_eq!(all.revision, 9);
    }
}
