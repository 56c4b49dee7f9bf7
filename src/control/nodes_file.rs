//! The static node list: YAML text to a [`NodeList`] in which nothing contradicts anything else.
//!
//! Owns the list's syntax and every rule that holds between its entries. Does no I/O, and does not know which entry is
//! this node's until [`own`] is asked.

mod error;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::error::{NoOwnEntry, NodesError, NodesProblem};
use crate::config::At;
use crate::config::yaml::{self, Entry, Kind, Malformed, MaxNodes, Tree};
use crate::config::{not_underlay, shorten};
use crate::key::{MAX_LANES, PublicKey};
use crate::node::{Encryption, Mac, Node, NodeList, NodeName, Preshared};

/// Reads a node list. An underlay address without a port gets `default_port`.
pub fn parse(text: &[u8], default_port: NonZeroU16) -> Result<NodeList, NodesError> {
    // 100,000 nodes with twelve prefixes each.
    const MAX: MaxNodes = MaxNodes(4_000_000);
    let tree = yaml::parse(text, MAX).map_err(|bad| malformed(bad, text))?;
    let list = entries(tree)?;
    let mut placed = Vec::with_capacity(list.len());
    for (i, tree) in list.into_iter().enumerate() {
        placed.push(node(tree, i + 1, default_port)?);
    }
    checked(placed)
}

/// The list, when nothing in it contradicts anything else.
pub(super) fn checked(mut placed: Vec<Placed>) -> Result<NodeList, NodesError> {
    names_are_unique(&mut placed)?;
    underlays_are_unique(&placed)?;
    macs_are_unique(&placed)?;
    keys_are_unique(&placed)?;
    let subnets = subnets_are_apart(&placed)?;
    no_underlay_within_a_subnet(&placed, &subnets)?;
    Ok(NodeList { nodes: placed.into_iter().map(|p| p.node).collect() })
}

/// This node's entry.
pub fn own<'l>(list: &'l NodeList, name: &NodeName) -> Result<&'l Node, NoOwnEntry> {
    list.get(name).ok_or_else(|| NoOwnEntry {
        name: name.clone(),
        some: list.nodes.iter().take(NoOwnEntry::SHOWN).map(|n| n.name.clone()).collect(),
        all: list.nodes.len(),
    })
}

/// A node, and where its parts stand.
pub(super) struct Placed {
    pub(super) node: Node,
    pub(super) at: At,
    pub(super) underlay_at: Vec<At>,
    pub(super) subnets_at: Vec<At>,
    pub(super) mac_at: At,
    pub(super) keys_at: Vec<At>,
}

const KEYS: [&str; 10] = [
    "name",
    "underlay",
    "subnets",
    "mac",
    "public-key",
    "lane-keys",
    "encryption",
    "keepalive",
    "preshared-key",
    "preshared-key-file",
];

fn entries(tree: Tree<'_>) -> Result<Vec<Tree<'_>>, NodesError> {
    let shape = |at, what: &str, wanted, found: &Kind<'_>| {
        let found = found.noun();
        fail(at, NodesProblem::WrongShape { what: what.to_owned(), wanted, found })
    };
    let top = match tree.kind {
        Kind::Map(top) => top,
        // Also what a file looks like that somebody is just about to write.
        Kind::Null => return Err(fail(tree.at, NodesProblem::NoNodes)),
        other => return Err(shape(tree.at, "the file", "`nodes:` and a list below it", &other)),
    };
    let mut list = None;
    for Entry { key, at, value } in top {
        match (&*key, value.kind) {
            ("nodes", Kind::List(nodes)) if !nodes.is_empty() => list = Some(nodes),
            ("nodes", Kind::List(_) | Kind::Null) => return Err(fail(at, NodesProblem::NoNodes)),
            ("nodes", other) => return Err(shape(value.at, "`nodes`", "a list of nodes", &other)),
            _ => return Err(fail(at, unknown(&key, &["nodes"]))),
        }
    }
    list.ok_or_else(|| fail(tree.at, NodesProblem::NoNodes))
}

/// `underlay: [fd00::1]:8472` looks right to everybody who knows addresses, and is a list with a stray key to YAML.
fn malformed(bad: Malformed, text: &[u8]) -> NodesError {
    let line = bad.at.and_then(|at| text.split(|b| *b == b'\n').nth(at.line.saturating_sub(1) as usize));
    let bracketed = line.is_some_and(|line| line.windows(2).any(|pair| pair == b"]:"));
    let hint = if bracketed { "; put an address in brackets into quotes: `\"[fd00::1]:8472\"`" } else { "" };
    NodesError { at: bad.at, problem: NodesProblem::Yaml(format!("{}{hint}", bad.what)) }
}

fn node(tree: Tree<'_>, number: usize, default_port: NonZeroU16) -> Result<Placed, NodesError> {
    let at = tree.at;
    let Kind::Map(entries) = tree.kind else {
        let what = format!("entry {number}");
        let found = tree.kind.noun();
        return Err(fail(at, NodesProblem::WrongShape { what, wanted: "a mapping with `name` and `underlay`", found }));
    };
    let name = name(&entries, at, number)?;
    let mut placed = Placed {
        node: Node::named(name),
        at,
        underlay_at: Vec::new(),
        subnets_at: Vec::new(),
        mac_at: at,
        keys_at: Vec::new(),
    };
    let (mut has_key, mut lane_keys_at, mut preshared_at) = (false, None, None);
    for Entry { key, at, value } in entries {
        let name = placed.node.name.clone();
        has_key |= key == "public-key";
        match &*key {
            "name" => {}
            "underlay" => {
                for (at, text) in texts(value, &name, "underlay", true)? {
                    let address = underlay(&text, default_port).map_err(|why| {
                        fail(at, NodesProblem::BadUnderlay { node: name.clone(), value: shorten(&text), why })
                    })?;
                    placed.add_underlay(address, at)?;
                }
            }
            "subnets" => {
                for (at, text) in texts(value, &name, "subnets", true)? {
                    let net = subnet(&text).map_err(|why| {
                        fail(at, NodesProblem::BadSubnet { node: name.clone(), value: shorten(&text), why })
                    })?;
                    placed.node.subnets.push(net);
                    placed.subnets_at.push(at);
                }
            }
            "mac" => {
                for (at, text) in texts(value, &name, "mac", false)? {
                    placed.mac_at = at;
                    placed.node.mac =
                        text.parse().map_err(|source| fail(at, NodesProblem::BadMac { node: name.clone(), source }))?;
                }
            }
            "public-key" => {
                for (at, text) in texts(value, &name, "public-key", false)? {
                    let key = text.parse();
                    let key =
                        key.map_err(|source| fail(at, NodesProblem::BadPublicKey { node: name.clone(), source }))?;
                    placed.node.public_keys.insert(0, key);
                    placed.keys_at.insert(0, at);
                }
            }
            "lane-keys" => {
                for (at, text) in texts(value, &name, "lane-keys", true)? {
                    let key = text.parse();
                    let key =
                        key.map_err(|source| fail(at, NodesProblem::BadPublicKey { node: name.clone(), source }))?;
                    placed.node.public_keys.push(key);
                    placed.keys_at.push(at);
                    lane_keys_at = Some(at);
                }
            }
            "keepalive" => {
                for (at, text) in texts(value, &name, "keepalive", false)? {
                    let seconds = text.parse().ok().filter(|seconds| *seconds > 0);
                    let bad = || NodesProblem::BadKeepalive { node: name.clone(), value: shorten(&text) };
                    placed.node.keepalive = Some(seconds.ok_or_else(|| fail(at, bad()))?);
                }
            }
            "preshared-key" | "preshared-key-file" => {
                if preshared_at.replace(at).is_some() {
                    return Err(fail(at, NodesProblem::TwoPresharedKeys { node: name }));
                }
                for (at, text) in texts(value, &name, &key, false)? {
                    let bad = |source| fail(at, NodesProblem::BadPresharedKey { node: name.clone(), source });
                    placed.node.preshared = Some(match &*key {
                        "preshared-key" => Preshared::Key(text.parse().map_err(bad)?),
                        _ => Preshared::File(text.into_owned().into()),
                    });
                }
            }
            "encryption" => {
                for (at, text) in texts(value, &name, "encryption", false)? {
                    match &*text {
                        "none" => placed.node.encryption = Some(Encryption::None),
                        "wireguard" => placed.node.encryption = Some(Encryption::Wireguard),
                        _ => {
                            let value = shorten(&text);
                            return Err(fail(at, NodesProblem::BadEncryption { node: name, value }));
                        }
                    }
                }
            }
            _ => return Err(fail(at, unknown(&key, &KEYS))),
        }
    }
    if let Some(at) = lane_keys_at.filter(|_| !has_key || placed.node.public_keys.len() > MAX_LANES) {
        return Err(fail(at, NodesProblem::StrayLaneKeys { node: placed.node.name, most: MAX_LANES - 1 }));
    }
    if let Some(at) = preshared_at.filter(|_| !has_key) {
        return Err(fail(at, NodesProblem::StrayPresharedKey { node: placed.node.name }));
    }
    if placed.node.encryption == Some(Encryption::Wireguard) && !has_key {
        return Err(fail(at, NodesProblem::NoPublicKey { node: placed.node.name }));
    }
    if placed.node.underlay.is_empty() {
        return Err(fail(at, NodesProblem::NoUnderlay { node: placed.node.name }));
    }
    Ok(placed)
}

fn name(entries: &[Entry<'_>], at: At, number: usize) -> Result<NodeName, NodesError> {
    let Some(entry) = entries.iter().find(|e| e.key == "name") else {
        return Err(fail(at, NodesProblem::NoName { number }));
    };
    match &entry.value.kind {
        Kind::Text(text) => text.parse().map_err(|bad| fail(entry.value.at, NodesProblem::BadName(bad))),
        Kind::Null => Err(fail(entry.at, NodesProblem::NoName { number })),
        other => {
            let what = format!("the `name` of entry {number}");
            Err(fail(entry.value.at, NodesProblem::WrongShape { what, wanted: "a word", found: other.noun() }))
        }
    }
}

/// The text, or the texts of a list where one may stand.
fn texts<'a>(
    value: Tree<'a>,
    node: &NodeName,
    key: &str,
    list: bool,
) -> Result<Vec<(At, std::borrow::Cow<'a, str>)>, NodesError> {
    let shape = |at, found: &Kind<'_>| {
        let what = format!("`{key}` of node `{node}`");
        let wanted = if list { "a value or a list of values" } else { "a single value" };
        fail(at, NodesProblem::WrongShape { what, wanted, found: found.noun() })
    };
    match value.kind {
        Kind::Text(text) => Ok(vec![(value.at, text)]),
        Kind::List(items) if list => items
            .into_iter()
            .map(|item| match item.kind {
                Kind::Text(text) => Ok((item.at, text)),
                other => Err(shape(item.at, &other)),
            })
            .collect(),
        other => Err(shape(value.at, &other)),
    }
}

impl Placed {
    pub(super) fn add_underlay(&mut self, address: SocketAddr, at: At) -> Result<(), NodesError> {
        if let Some(first) = self.node.underlay.iter().find(|u| u.is_ipv4() == address.is_ipv4()) {
            let node = self.node.name.clone();
            return Err(fail(at, NodesProblem::TwoOfAFamily { node, first: first.ip(), second: address.ip() }));
        }
        self.node.underlay.push(address);
        self.underlay_at.push(at);
        Ok(())
    }
}

pub(super) fn underlay(text: &str, default_port: NonZeroU16) -> Result<SocketAddr, String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    let address = match (bare.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
        (Ok(ip), _) => SocketAddr::new(ip, default_port.get()),
        (_, Ok(SocketAddr::V6(v6))) if v6.scope_id() != 0 => return Err("leave out the zone (`%...`)".to_owned()),
        (_, Ok(address)) if address.port() == 0 => return Err("use a port from 1 to 65535".to_owned()),
        (_, Ok(address)) => address,
        _ => return Err("write an IP address, or one with a port: `10.9.0.1:8472`, `\"[fd00::1]:8472\"`".to_owned()),
    };
    not_underlay(address.ip()).map_or(Ok(address), |why| Err(why.to_owned()))
}

pub(super) fn subnet(text: &str) -> Result<IpNet, String> {
    let net: IpNet = match (text.parse(), text.parse::<IpAddr>()) {
        (Ok(net), _) => net,
        (_, Ok(ip)) => {
            return Err(format!("say how long the prefix is; for this one address write `{}`", IpNet::from(ip)));
        }
        _ => return Err("write a prefix such as `10.42.1.0/24`".to_owned()),
    };
    if net.prefix_len() == 0 {
        return Err("a default route cannot live behind a node; write the prefixes that do".to_owned());
    }
    if net.trunc() != net {
        return Err(format!("it has bits set behind the prefix; write `{}`", net.trunc()));
    }
    match special(&net) {
        Some((range, what)) => Err(format!("it meets {range} ({what}), which is never routed; use another prefix")),
        None => Ok(net),
    }
}

/// The range with a meaning of its own that the prefix is in, or includes.
fn special(net: &IpNet) -> Option<(IpNet, &'static str)> {
    let v4 = |a, b, len| Ipv4Net::new(Ipv4Addr::new(a, b, 0, 0), len).map(IpNet::V4);
    let v6 = |a, len| Ipv6Net::new(Ipv6Addr::new(a, 0, 0, 0, 0, 0, 0, 0), len).map(IpNet::V6);
    let mapped = Ipv6Net::new(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), 96).map(IpNet::V6);
    let ranges = [
        (v4(0, 0, 8), "\"this network\""),
        (v4(127, 0, 8), "loopback"),
        (v4(169, 254, 16), "link-local"),
        (v4(224, 0, 4), "multicast"),
        (Ok(IpNet::from(IpAddr::V4(Ipv4Addr::BROADCAST))), "broadcast"),
        (Ok(IpNet::from(IpAddr::V6(Ipv6Addr::UNSPECIFIED))), "unspecified"),
        (Ok(IpNet::from(IpAddr::V6(Ipv6Addr::LOCALHOST))), "loopback"),
        (mapped, "IPv4 in IPv6"),
        (v6(0xfe80, 10), "link-local"),
        (v6(0xff00, 8), "multicast"),
    ];
    ranges.into_iter().find_map(|(range, what)| {
        let range = range.ok()?;
        (range.contains(net) || net.contains(&range)).then_some((range, what))
    })
}

fn names_are_unique(placed: &mut [Placed]) -> Result<(), NodesError> {
    // Stable, so of two entries with one name the later in the file is the one that is blamed.
    placed.sort_by(|a, b| a.node.name.cmp(&b.node.name));
    match placed.windows(2).find_map(|pair| match pair {
        [a, b] if a.node.name == b.node.name => Some((a, b)),
        _ => None,
    }) {
        Some((a, b)) => Err(fail(b.at, NodesProblem::SameName { name: b.node.name.clone(), first: a.at.line })),
        None => Ok(()),
    }
}

fn underlays_are_unique(placed: &[Placed]) -> Result<(), NodesError> {
    // Without ports: who sent a datagram is told by its source address alone.
    let mut owners: HashMap<IpAddr, &NodeName> = HashMap::with_capacity(placed.len());
    for p in placed {
        for (address, at) in p.node.underlay.iter().zip(&p.underlay_at) {
            if let Some(first) = owners.insert(address.ip(), &p.node.name) {
                let (first, second) = (first.clone(), p.node.name.clone());
                return Err(fail(*at, NodesProblem::SharedUnderlay { ip: address.ip(), first, second }));
            }
        }
    }
    Ok(())
}

fn macs_are_unique(placed: &[Placed]) -> Result<(), NodesError> {
    let mut owners: HashMap<Mac, &NodeName> = HashMap::with_capacity(placed.len());
    for p in placed {
        if let Some(first) = owners.insert(p.node.mac, &p.node.name) {
            let (first, second) = (first.clone(), p.node.name.clone());
            return Err(fail(p.mac_at, NodesProblem::SharedMac { mac: p.node.mac, first, second }));
        }
    }
    Ok(())
}

fn keys_are_unique(placed: &[Placed]) -> Result<(), NodesError> {
    let mut owners: HashMap<PublicKey, &NodeName> = HashMap::new();
    for p in placed {
        for (key, at) in p.node.public_keys.iter().zip(&p.keys_at) {
            if let Some(first) = owners.insert(*key, &p.node.name) {
                let (first, second) = (first.clone(), p.node.name.clone());
                return Err(fail(*at, NodesProblem::SharedKey { key: *key, first, second }));
            }
        }
    }
    Ok(())
}

/// A prefix, its owner and its place.
type Owned<'p> = (IpNet, &'p NodeName, At);

/// All prefixes, in order.
fn subnets_are_apart(placed: &[Placed]) -> Result<Vec<Owned<'_>>, NodesError> {
    let mut all: Vec<Owned<'_>> = placed
        .iter()
        .flat_map(|p| p.node.subnets.iter().zip(&p.subnets_at).map(|(net, at)| (*net, &p.node.name, *at)))
        .collect();
    // In the order of network addresses, the shorter prefix first, a prefix that includes others stands directly before
    // one of them, because prefixes nest or are apart. So neighbours are all that has to be compared.
    all.sort_unstable_by_key(|(net, _, at)| (net.network(), net.prefix_len(), *at));
    for pair in all.windows(2) {
        if let [a, b] = pair
            && a.0.contains(&b.0)
        {
            // Blame the place further down: the upper one was there first.
            let (first, second) = if a.2 <= b.2 { (a, b) } else { (b, a) };
            let problem = NodesProblem::Overlap {
                first: first.0,
                first_owner: first.1.clone(),
                second: second.0,
                second_owner: second.1.clone(),
            };
            return Err(fail(second.2, problem));
        }
    }
    Ok(all)
}

/// Such a datagram would go into the tunnel that it comes out of.
fn no_underlay_within_a_subnet(placed: &[Placed], subnets: &[Owned<'_>]) -> Result<(), NodesError> {
    for p in placed {
        for (address, at) in p.node.underlay.iter().zip(&p.underlay_at) {
            let ip = address.ip();
            let after = subnets.partition_point(|(net, _, _)| net.network() <= ip);
            let before = after.checked_sub(1).and_then(|i| subnets.get(i));
            if let Some((net, owner, _)) = before.filter(|(net, _, _)| net.contains(&ip)) {
                let (node, owner) = (p.node.name.clone(), (*owner).clone());
                return Err(fail(*at, NodesProblem::UnderlayInSubnet { ip, node, subnet: *net, owner }));
            }
        }
    }
    Ok(())
}

fn unknown(key: &str, known: &[&'static str]) -> NodesProblem {
    NodesProblem::UnknownKey { key: shorten(key), suggestion: yaml::nearest(key, known.iter().copied()) }
}

pub(super) fn fail(at: At, problem: NodesProblem) -> NodesError {
    NodesError { at: Some(at), problem }
}

#[cfg(test)]
mod tests;
