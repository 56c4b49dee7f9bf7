//! What was asked of the servers, when, and what they answered; and what may not be, whatever happened meanwhile.
//!
//! An operation without a clear answer may have been done, may be done later, or never: nothing is concluded from it. What
//! was acknowledged is held against what all servers say in the end.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::{Deserialize, Serialize};

/// Times are milliseconds since 1970, by one clock that no fault touches.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) start: u64,
    pub(crate) end: u64,
    #[serde(flatten)]
    pub(crate) what: What,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub(crate) enum What {
    /// Only acknowledged ones: of another nobody knows the id.
    Token {
        server: String,
        id: String,
        single: bool,
    },
    /// One key's try. Each key has a name of its own, and tries one token.
    Join {
        server: String,
        token: String,
        name: String,
        answer: Answer,
    },
    Revoke {
        server: String,
        token: String,
        done: bool,
    },
    Remove {
        server: String,
        name: String,
        done: bool,
    },
    /// Of one node, one after the other, and none after one that was not acknowledged.
    Drain {
        server: String,
        name: String,
        draining: bool,
        done: bool,
    },
    /// What a server told in between.
    Seen {
        server: String,
        nodes: Vec<Node>,
    },
    /// What it tells in the end.
    End {
        server: String,
        nodes: Vec<Node>,
        tokens: Vec<Token>,
    },
    /// A node that stayed, in the end.
    Resident {
        name: String,
        connected: bool,
        ids: BTreeSet<String>,
    },
    /// The data plane.
    Flow {
        from: String,
        to: String,
        sent: u64,
        lost: u64,
        worst_gap_ms: u64,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    Joined { id: String },
    Refused { code: String },
    Unknown { why: String },
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Node {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) subnets: Vec<String>,
    pub(crate) draining: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Token {
    pub(crate) id: String,
    pub(crate) uses_left: Option<u32>,
    pub(crate) revoked: bool,
}

/// A name's tries.
#[derive(Default)]
struct Tried<'a> {
    token: &'a str,
    first: u64,
    ids: BTreeSet<&'a str>,
    unknown: bool,
}

/// Everything that is wrong.
pub(crate) fn check(history: &[Entry]) -> Vec<String> {
    let mut wrong = Vec::new();
    let ends: Vec<_> = history
        .iter()
        .filter_map(|entry| match &entry.what {
            What::End { server, nodes, tokens } => Some((server, nodes, tokens)),
            _ => None,
        })
        .collect();
    let Some((first, nodes, tokens)) = ends.first() else { return vec!["no server tells how it ended".to_owned()] };
    for (server, others, other_tokens) in &ends[1..] {
        if others != nodes || other_tokens != tokens {
            wrong.push(format!("{first} and {server} end with different nodes or tokens"));
        }
    }
    let by_name: HashMap<&str, &Node> = nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    let by_token: HashMap<&str, &Token> = tokens.iter().map(|token| (token.id.as_str(), token)).collect();
    if by_name.len() != nodes.len() {
        wrong.push("two nodes have one name".to_owned());
    }

    let mut made: HashMap<&str, (u64, bool)> = HashMap::new();
    let mut asked_to_revoke: HashMap<&str, u64> = HashMap::new();
    let mut revoked: HashMap<&str, u64> = HashMap::new();
    let mut asked_to_remove: HashSet<&str> = HashSet::new();
    let mut tried: BTreeMap<&str, Tried<'_>> = BTreeMap::new();
    let mut drains: BTreeMap<&str, Vec<(bool, bool)>> = BTreeMap::new();
    for entry in history {
        match &entry.what {
            What::Token { id, single, .. } => drop(made.insert(id, (entry.end, *single))),
            What::Revoke { token, done, .. } => {
                asked_to_revoke.entry(token).or_insert(entry.start);
                if *done {
                    revoked.entry(token).or_insert(entry.end);
                }
            }
            What::Remove { name, .. } => drop(asked_to_remove.insert(name)),
            What::Drain { name, draining, done, .. } => drains.entry(name).or_default().push((*draining, *done)),
            What::Join { token, name, answer, .. } => {
                let tries = tried.entry(name).or_insert_with(|| Tried { first: entry.start, ..Tried::default() });
                tries.token = token;
                tries.first = tries.first.min(entry.start);
                match answer {
                    Answer::Joined { id } => drop(tries.ids.insert(id)),
                    Answer::Unknown { .. } => tries.unknown = true,
                    Answer::Refused { .. } => {}
                }
            }
            _ => {}
        }
    }

    for (id, (_, single)) in &made {
        let Some(token) = by_token.get(id) else {
            wrong.push(format!("token {id} was acknowledged and is lost"));
            continue;
        };
        if revoked.contains_key(id) && !token.revoked {
            wrong.push(format!("token {id}'s revocation was acknowledged and is lost"));
        }
        if token.revoked && !asked_to_revoke.contains_key(id) {
            wrong.push(format!("token {id} is revoked, which nobody asked for"));
        }
        let mine: Vec<_> = tried.iter().filter(|(_, tries)| tries.token == *id).collect();
        if *single {
            let joined: BTreeSet<&str> = mine
                .iter()
                .flat_map(|(name, tries)| {
                    tries.ids.iter().copied().chain(by_name.get(*name).map(|node| node.id.as_str()))
                })
                .collect();
            if joined.len() > 1 {
                wrong.push(format!("token {id} is for one node, and let in {}", joined.len()));
            }
            if !joined.is_empty() && token.uses_left != Some(0) {
                wrong.push(format!("token {id} was used, and may be used again: {:?}", token.uses_left));
            }
            if !mine.is_empty() && joined.is_empty() && mine.iter().all(|(_, tries)| !tries.unknown) {
                wrong.push(format!("token {id} let nobody in, and each was told so"));
            }
        }
    }

    for (name, tries) in &tried {
        if tries.ids.len() > 1 {
            wrong.push(format!("{name} is one node and was given the ids {:?}", tries.ids));
        }
        let there = by_name.get(name);
        if let Some(id) = tries.ids.first()
            && !asked_to_remove.contains(name)
            && there.is_none_or(|node| node.id != *id)
        {
            wrong.push(format!("{name} joined as {id}, which was acknowledged and is lost"));
        }
        let too_late = revoked.get(tries.token).is_some_and(|at| tries.first > *at);
        if too_late && (there.is_some() || !tries.ids.is_empty()) {
            wrong.push(format!("{name} joined with token {}, which was revoked before", tries.token));
        }
        if there.is_some() && tries.ids.is_empty() && !tries.unknown {
            wrong.push(format!("{name} was refused each time and is a member"));
        }
    }

    for entry in history {
        match &entry.what {
            What::Remove { name, done: true, .. } if by_name.contains_key(name.as_str()) => {
                wrong.push(format!("{name}'s removal was acknowledged and is lost"));
            }
            What::Join { server, token, name, answer: Answer::Refused { code } } => {
                let single = made.get(token.as_str()).is_some_and(|(_, single)| *single);
                let right = match code.as_str() {
                    "token-used-up" => single,
                    "token-revoked" => asked_to_revoke.get(token.as_str()).is_some_and(|at| *at < entry.end),
                    _ => false,
                };
                if !right {
                    wrong.push(format!("{server} refuses {name} with token {token} for no reason: {code}"));
                }
            }
            What::Resident { name, connected, ids } => {
                let all: BTreeSet<String> = nodes.iter().map(|node| node.id.clone()).collect();
                if !connected || *ids != all {
                    let (more, less) = (ids.difference(&all).count(), all.difference(ids).count());
                    wrong.push(format!(
                        "{name} ends connected: {connected}, with {more} nodes that are not there, and without {less}"
                    ));
                }
            }
            What::Flow { from, to, sent, lost, .. } if *sent == 0 || *lost > 0 => {
                wrong.push(format!("{lost} of {sent} packets from {from} to {to} were lost"));
            }
            _ => {}
        }
    }

    for (name, tries) in &drains {
        let last = tries.iter().rev().find(|(_, done)| *done).map(|(draining, _)| *draining);
        let perhaps = tries.iter().rev().take_while(|(_, done)| !done).map(|(draining, _)| *draining);
        let allowed: Vec<bool> = perhaps.chain([last.unwrap_or(false)]).collect();
        if by_name.get(name).is_some_and(|node| !allowed.contains(&node.draining)) {
            wrong.push(format!("{name}: what was last acknowledged (draining: {last:?}) is lost"));
        }
    }
    wrong.extend(subnets(history));
    wrong.sort();
    wrong.dedup();
    wrong
}

/// A subnet has one owner ever (a freed one rests), and a node keeps its own.
fn subnets(history: &[Entry]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut owners: HashMap<&str, &str> = HashMap::new();
    let mut owned: HashMap<&str, &[String]> = HashMap::new();
    for entry in history {
        let (What::Seen { nodes, server } | What::End { nodes, server, .. }) = &entry.what else { continue };
        for node in nodes {
            if node.subnets.is_empty() {
                wrong.push(format!("{server}: {} has no subnet", node.name));
            }
            if *owned.entry(&node.id).or_insert(&node.subnets) != node.subnets {
                wrong.push(format!("{server}: {} has other subnets than before", node.name));
            }
            for subnet in &node.subnets {
                let owner = owners.entry(subnet).or_insert(&node.id);
                if *owner != node.id {
                    wrong.push(format!("{server}: {subnet} is {}'s and was {owner}'s", node.id));
                }
            }
        }
    }
    wrong
}
