//! Everything that the registry knows, in memory, and what it decides from that. Pure: a decision is a [`Plan`], which
//! becomes true once it is stored.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use subtle::ConstantTimeEq;

use super::refused::Refused;
use super::rows::{AuditRow, GoneRow, How, NodeRow, Plan, TokenRow};
use super::space::{Exhausted, Space};
use crate::key::MAX_LANES;
use crate::membership::api::{JoinRequest, Myself};
use crate::membership::clock::{Now, rfc3339};
use crate::membership::random;
use crate::membership::record::{Mode, NodeRecord, Role, State as Health};
use crate::membership::token::{TokenId, TokenSecret};
use crate::node::{Mac, NodeName};

/// A freed subnet is given to nobody else for so long, in seconds.
pub const REST: i64 = 7 * 86_400;
/// Who was removed is remembered as long as its certificate could be good.
const REMEMBER: i64 = 366 * 86_400;
/// A node whose clock is further off could not use its certificate.
const MAX_SKEW: i64 = 86_400;
/// As long as a hash, and none.
const NO_HASH: &str = "----------------------------------------------------------------";
/// Rows of one kind that are tidied at once: etcd takes 128 steps in a transaction.
const MOST: usize = 40;
const MAX_LABELS: usize = 64;
const MAX_TEXT: usize = 256;

/// How somebody shows that it may join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// A token.
    Token(TokenId, TokenSecret),
    /// The shared secret, which was proven.
    Secret,
    /// A certificate of the cluster with this identity.
    Certificate(String),
    /// It is this very server's node.
    Local,
    /// The same where no other server can be: whoever was a server of this name or at this place before, was this one.
    LocalAlone,
}

/// What the registry knows.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) nodes: BTreeMap<String, NodeRow>,
    pub(super) by_name: HashMap<String, String>,
    pub(super) by_identity: HashMap<String, String>,
    by_key: HashMap<String, String>,
    by_address: HashMap<IpAddr, String>,
    /// By id.
    pub(super) gone: HashMap<String, GoneRow>,
    gone_by_identity: HashMap<String, String>,
    pub(super) tokens: BTreeMap<String, TokenRow>,
    /// Keys of the audit log, oldest first, exactly as they are stored: who forgot one would never have it removed.
    pub(super) audit: BTreeSet<String>,
    pub(super) space: Space,
}

impl State {
    pub(super) fn new(space: Space) -> Self {
        State {
            nodes: BTreeMap::new(),
            by_name: HashMap::new(),
            by_identity: HashMap::new(),
            by_key: HashMap::new(),
            by_address: HashMap::new(),
            gone: HashMap::new(),
            gone_by_identity: HashMap::new(),
            tokens: BTreeMap::new(),
            audit: BTreeSet::new(),
            space,
        }
    }

    /// What was stored becomes true.
    pub(super) fn apply(&mut self, plan: &Plan) {
        for id in &plan.drop_nodes {
            self.forget_node(id);
        }
        for id in &plan.drop_gone {
            self.forget_gone(id);
        }
        for row in &plan.put_gone {
            self.add_gone(row.clone());
        }
        for row in &plan.put_nodes {
            self.add_node(row.clone());
        }
        for row in &plan.put_tokens {
            self.tokens.insert(row.id.clone(), row.clone());
        }
        for id in &plan.drop_tokens {
            self.tokens.remove(id);
        }
    }

    pub(super) fn add_node(&mut self, row: NodeRow) {
        let id = row.record.id.clone();
        self.forget_node(&id);
        self.by_name.insert(row.record.name.clone(), id.clone());
        if !row.identity.is_empty() {
            self.by_identity.insert(row.identity.clone(), id.clone());
        }
        self.by_key.extend(row.record.public_keys.iter().map(|key| (key.clone(), id.clone())));
        self.by_address.extend(row.record.underlay.iter().map(|a| (a.ip(), id.clone())));
        row.record.subnets.iter().for_each(|net| self.space.take(net));
        self.nodes.insert(id, row);
    }

    pub(super) fn add_gone(&mut self, row: GoneRow) {
        self.forget_gone(&row.id.clone());
        row.subnets.iter().for_each(|net| self.space.take(net));
        if !row.identity.is_empty() {
            self.gone_by_identity.insert(row.identity.clone(), row.id.clone());
        }
        self.gone.insert(row.id.clone(), row);
    }

    fn forget_node(&mut self, id: &str) {
        let Some(row) = self.nodes.remove(id) else { return };
        self.by_name.remove(&row.record.name);
        self.by_identity.remove(&row.identity);
        row.record.public_keys.iter().for_each(|key| drop(self.by_key.remove(key)));
        row.record.underlay.iter().for_each(|a| drop(self.by_address.remove(&a.ip())));
        row.record.subnets.iter().for_each(|net| self.space.free(net));
    }

    fn forget_gone(&mut self, id: &str) {
        let Some(row) = self.gone.remove(id) else { return };
        if self.gone_by_identity.get(&row.identity).is_some_and(|of| of == id) {
            self.gone_by_identity.remove(&row.identity);
        }
        row.subnets.iter().for_each(|net| self.space.free(net));
    }

    pub(super) fn by_name(&self, name: &str) -> Result<&NodeRow, Refused> {
        let row = self.by_name.get(name).and_then(|id| self.nodes.get(id));
        row.ok_or_else(|| Refused::NoSuchNode(name.chars().take(80).collect()))
    }

    /// The member with this key, or why there is none.
    pub(super) fn member(&self, identity: &str) -> Result<&NodeRow, Refused> {
        if let Some(row) = self.by_identity.get(identity).and_then(|id| self.nodes.get(id)) {
            return Ok(row);
        }
        match self.gone_by_identity.get(identity).and_then(|id| self.gone.get(id)) {
            Some(gone) if gone.how == How::Purged => Err(Refused::Purged(why_gone(gone))),
            Some(gone) => Err(Refused::Removed(why_gone(gone))),
            None => Err(Refused::NotMember),
        }
    }

    /// A node joins, or asks again because it did not hear the answer: its row, and what to store (nothing, the second time).
    pub(super) fn join(
        &mut self,
        now: Now,
        join: &JoinRequest,
        identity: &str,
        proof: &Proof,
        from: Option<IpAddr>,
    ) -> Result<(NodeRow, Plan), Refused> {
        let token = self.check_proof(now, join, identity, proof)?;
        if (join.clock - now.unix).abs() > MAX_SKEW {
            return Err(Refused::ClockSkew(join.clock - now.unix));
        }
        if join.name.parse::<NodeName>().is_err() || join.role == Role::Foreign {
            return Err(Refused::BadRecord(format!(
                "`{}` cannot join: use a name of letters, digits, `.`, `_` and `-`, and role agent or server",
                shorten(&join.name)
            )));
        }
        let known = self.by_identity.get(identity).and_then(|id| self.nodes.get(id)).cloned();
        if let Some(mut row) = known {
            if row.record.name != join.name {
                return Err(Refused::KeyTaken(row.record.name));
            }
            self.check_myself(&join.myself, std::slice::from_ref(&row.record.id), OF_MESHD)?;
            let before = row.clone();
            set_myself(&mut row, &join.myself);
            let put_nodes = if row == before { vec![] } else { vec![row.clone()] };
            return Ok((row, Plan { put_nodes, ..Plan::default() }));
        }
        if let Some(token) = &token {
            check_usable(now, token)?;
        }
        let mut plan = Plan::default();
        if *proof == Proof::LocalAlone {
            for former in self.formerly(join) {
                plan.add_removal(removal(former, now, How::Replaced));
            }
        }
        let other = self.by_name.get(&join.name).and_then(|id| self.nodes.get(id));
        if let Some(other) = other.filter(|other| !plan.drop_nodes.contains(&other.record.id)) {
            // A token for this very name replaces a node that is not there any more.
            let meant = token.as_ref().is_some_and(|t| t.node.as_deref() == Some(&join.name));
            if !meant || other.ready {
                return Err(Refused::NameTaken(join.name.clone()));
            }
            plan = removal(other, now, How::Replaced);
        }
        self.check_myself(&join.myself, &plan.drop_nodes, OF_MESHD)?;
        let back = self.gone_by_identity.get(identity).and_then(|id| self.gone.get(id)).cloned();
        let subnets = match (proof, plan.put_gone.first_mut()) {
            // it is the same node, and nobody else has a claim
            (Proof::LocalAlone, Some(former)) => {
                let subnets = self.subnets_for(join, Some(former))?;
                former.subnets.retain(|net| !subnets.contains(net));
                subnets
            }
            _ => self.subnets_for(join, back.as_ref())?,
        };
        plan.drop_gone.extend(back.iter().map(|gone| gone.id.clone()));
        let id = match back {
            Some(back) => back.id,
            None => random::id(),
        };
        let mut row = NodeRow {
            record: NodeRecord {
                id: id.clone(),
                name: join.name.clone(),
                role: join.role,
                state: Health::Ready,
                underlay: vec![],
                subnets,
                mac: None,
                public_keys: vec![],
                encryption: Mode::None,
                labels: BTreeMap::new(),
                taints: vec![],
                joined_at: rfc3339(now.unix),
                last_heartbeat: None,
                observed: None,
            },
            identity: identity.to_owned(),
            token: token.as_ref().map(|t| t.id.clone()),
            draining: false,
            ready: true,
        };
        set_myself(&mut row, &join.myself);
        plan.audit.push(AuditRow {
            at: now.unix,
            what: "join".to_owned(),
            node: Some(join.name.clone()),
            token: row.token.clone(),
            from: from.map(|f| f.to_string()),
        });
        if let Some(mut token) = token
            && let Some(left) = &mut token.uses_left
        {
            *left = left.saturating_sub(1);
            plan.put_tokens.push(token);
        }
        plan.put_nodes.push(row.clone());
        Ok((row, plan))
    }

    /// What a node says of itself changes.
    pub(super) fn update(&self, id: &str, myself: &Myself) -> Result<Plan, Refused> {
        let mut row = self.nodes.get(id).ok_or(Refused::NotMember)?.clone();
        self.check_myself(myself, &[id.to_owned()], OF_MESHD)?;
        set_myself(&mut row, myself);
        let changed = self.nodes.get(id) != Some(&row);
        Ok(Plan { put_nodes: if changed { vec![row] } else { vec![] }, ..Plan::default() })
    }

    /// A member that speaks none of our protocols.
    pub(super) fn add_foreign(
        &mut self,
        now: Now,
        name: &str,
        underlay: &[SocketAddr],
        subnets: &[IpNet],
        mac: Option<&str>,
        public_key: Option<&str>,
    ) -> Result<(NodeRow, Plan), Refused> {
        let bad = |what: String| Refused::BadRecord(what);
        let name: NodeName = name.parse().map_err(|e: crate::node::BadNodeName| bad(e.to_string()))?;
        if self.by_name.contains_key(name.as_str()) {
            return Err(Refused::NameTaken(name.to_string()));
        }
        let mac = mac.map(|mac| mac.parse::<Mac>().map_err(|e| bad(e.to_string()))).transpose()?;
        let key_list: Vec<String> = public_key.iter().map(|key| (*key).to_owned()).collect();
        let encryption = if key_list.is_empty() { Mode::None } else { Mode::Wireguard };
        let myself = Myself {
            underlay: underlay.to_vec(),
            public_keys: key_list,
            encryption,
            labels: BTreeMap::new(),
            taints: vec![],
        };
        self.check_myself(&myself, &[], OF_FOREIGN)?;
        for (at, net) in subnets.iter().enumerate() {
            if net.prefix_len() == 0 || net.trunc() != *net {
                return Err(bad(format!("{net} cannot be a node's subnet; give a prefix such as 10.99.1.0/24")));
            }
            let twice = subnets.iter().take(at).any(|other| other.contains(net) || net.contains(other));
            if twice || self.space.is_taken(net) {
                return Err(bad(format!("{net} overlaps another node's subnet or one that rests; choose another")));
            }
            let within = |ip: &IpAddr| net.contains(ip);
            if self.by_address.keys().any(within) || underlay.iter().any(|address| within(&address.ip())) {
                return Err(bad(format!("a node's underlay address lies within {net}; choose another")));
            }
        }
        let subnets = match subnets {
            [] => self.space.next().map_err(exhausted)?,
            given => given.to_vec(),
        };
        let mut row = NodeRow {
            record: NodeRecord {
                id: random::id(),
                name: name.to_string(),
                role: Role::Foreign,
                state: Health::Ready,
                underlay: vec![],
                subnets,
                mac: mac.map(|mac| mac.to_string()),
                public_keys: vec![],
                encryption,
                labels: BTreeMap::new(),
                taints: vec![],
                joined_at: rfc3339(now.unix),
                last_heartbeat: None,
                observed: None,
            },
            identity: String::new(),
            token: None,
            draining: false,
            ready: true,
        };
        set_myself(&mut row, &myself);
        let audit = vec![audit(now, "add foreign node", Some(name.as_str()), None)];
        Ok((row.clone(), Plan { put_nodes: vec![row], audit, ..Plan::default() }))
    }

    pub(super) fn drain(&self, now: Now, name: &str, draining: bool) -> Result<Plan, Refused> {
        let mut row = self.by_name(name)?.clone();
        if row.draining == draining {
            return Ok(Plan::default());
        }
        row.draining = draining;
        row.settle();
        let audit = vec![audit(now, if draining { "drain" } else { "undrain" }, Some(name), None)];
        Ok(Plan { put_nodes: vec![row], audit, ..Plan::default() })
    }

    pub(super) fn remove(&self, now: Now, id: &str, how: How) -> Result<Plan, Refused> {
        let row = self.nodes.get(id).ok_or(Refused::NotMember)?;
        let servers = self.nodes.values().filter(|row| row.record.role == Role::Server).count();
        if row.record.role == Role::Server && servers == 1 {
            // foreign members ask no server for anything
            let runs_meshd = |other: &&NodeRow| other.record.role != Role::Foreign && other.record.id != row.record.id;
            let others = self.nodes.values().filter(runs_meshd).count();
            match how {
                How::Removed => return Err(Refused::LastServer(row.record.name.clone())),
                How::Left if others > 0 => return Err(Refused::LeavesNone { others }),
                _ => {}
            }
        }
        Ok(removal(row, now, how))
    }

    pub(super) fn revoke(&self, now: Now, id: &str) -> Result<Plan, Refused> {
        let mut row = self.tokens.get(id).ok_or_else(|| Refused::NoSuchToken(shorten(id)))?.clone();
        row.revoked = true;
        let audit = vec![audit(now, "revoke token", None, Some(id))];
        Ok(Plan { put_tokens: vec![row], audit, ..Plan::default() })
    }

    /// Rests that are over, and tokens that nobody asks about any more.
    pub(super) fn tidy(&self, now: Now) -> Plan {
        let mut plan = Plan::default();
        for row in self.gone.values() {
            let since = now.unix - row.at;
            if since > REMEMBER || (since > REST && row.how == How::Purged) {
                plan.drop_gone.push(row.id.clone());
            } else if since > REST && !row.subnets.is_empty() {
                plan.put_gone.push(GoneRow { subnets: vec![], ..row.clone() });
            }
        }
        let over = |t: &TokenRow| t.expires_at.is_some_and(|at| now.unix - at > REST);
        plan.drop_tokens = self.tokens.values().filter(|t| over(t)).map(|t| t.id.clone()).take(MOST).collect();
        // The rest has time until the next time.
        plan.drop_gone.truncate(MOST);
        plan.put_gone.truncate(MOST);
        plan
    }

    /// The token, where there is one. A node that has joined already may show the one that it joined by, in any state.
    fn check_proof(
        &self,
        now: Now,
        join: &JoinRequest,
        identity: &str,
        proof: &Proof,
    ) -> Result<Option<TokenRow>, Refused> {
        match proof {
            Proof::Local | Proof::LocalAlone | Proof::Secret => Ok(None),
            Proof::Certificate(shown) => {
                if shown != identity {
                    return Err(Refused::NotAllowed);
                }
                match self.gone_by_identity.get(identity).and_then(|id| self.gone.get(id)) {
                    Some(gone) if gone.how != How::Purged => Err(Refused::Removed(why_gone(gone))),
                    _ => Ok(None),
                }
            }
            Proof::Token(id, secret) => {
                let row = self.token(id, secret)?;
                let joined_by_it = self.by_identity.get(identity).and_then(|id| self.nodes.get(id));
                if joined_by_it.is_some_and(|node| node.token.as_ref() == Some(&row.id)) {
                    return Ok(None);
                }
                check_usable(now, row)?;
                if row.role != join.role {
                    return Err(Refused::WrongRole { id: row.id.clone(), is: row.role, wanted: join.role });
                }
                match &row.node {
                    Some(node) if *node != join.name => {
                        Err(Refused::WrongNode { id: row.id.clone(), node: node.clone() })
                    }
                    _ => Ok(Some(row.clone())),
                }
            }
        }
    }

    /// The token with this id and secret.
    pub(super) fn token(&self, id: &TokenId, secret: &TokenSecret) -> Result<&TokenRow, Refused> {
        let row = self.tokens.get(&id.to_string());
        // An unknown token costs the same comparison, so that the time tells nobody which ids exist.
        let hash = random::hex(&secret.hash());
        let kept = row.map_or(NO_HASH, |row| &row.hash);
        let same: bool = hash.as_bytes().ct_eq(kept.as_bytes()).into();
        row.filter(|_| same).ok_or(Refused::BadToken)
    }

    /// The subnets that it had, where they still rest for it; else the next ones.
    fn subnets_for(&mut self, join: &JoinRequest, back: Option<&GoneRow>) -> Result<Vec<IpNet>, Refused> {
        let single = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
        match back {
            Some(gone) if !gone.subnets.is_empty() && gone.subnets.iter().all(single) == join.control_only => {
                Ok(gone.subnets.clone())
            }
            _ if join.control_only => self.space.next_single().map_err(exhausted),
            _ => self.space.next().map_err(exhausted),
        }
    }

    /// The servers that have the name, an address or a key of the one that joins.
    fn formerly<'s>(&'s self, join: &'s JoinRequest) -> impl Iterator<Item = &'s NodeRow> {
        let Myself { underlay, public_keys, .. } = &join.myself;
        self.nodes.values().filter(move |row| {
            let of = &row.record;
            let same_place = of.underlay.iter().any(|a| underlay.iter().any(|b| a.ip() == b.ip()));
            let same = of.name == join.name || same_place || of.public_keys.iter().any(|key| public_keys.contains(key));
            same && of.role == Role::Server
        })
    }

    /// What a node says of itself must be possible, and nobody else's: nobody's but those of `own`, ids that are its own.
    fn check_myself(&self, myself: &Myself, own: &[String], words: Words) -> Result<(), Refused> {
        let bad = |what: String| Err(Refused::BadRecord(what));
        let Words { underlay, public_key } = words;
        if myself.underlay.is_empty() {
            return bad(format!("the node says no underlay address; {underlay}"));
        }
        for (at, address) in myself.underlay.iter().enumerate() {
            let ip = address.ip();
            if !is_underlay(ip) || address.port() == 0 {
                return bad(format!("{address} cannot be an underlay address; {underlay}"));
            }
            if self.space.contains(ip) {
                return bad(format!("{ip} lies within cluster-cidr, so it cannot be an underlay address; {underlay}"));
            }
            if self.space.is_taken(&IpNet::from(ip)) {
                return bad(format!(
                    "{ip} lies within a node's subnet, so it cannot be an underlay address; {underlay}"
                ));
            }
            if myself.underlay.iter().take(at).any(|other| other.is_ipv4() == address.is_ipv4()) {
                return bad("there are two underlay addresses of one family; give one of each at most".to_owned());
            }
            if let Some(other) = self.by_address.get(&ip).filter(|id| !own.contains(id)) {
                let name = self.nodes.get(other).map_or("another node", |row| &row.record.name);
                return bad(format!("the underlay address {ip} is that of node `{name}`; {underlay}"));
            }
        }
        for (at, key) in myself.public_keys.iter().enumerate() {
            let decoded = STANDARD.decode(key).unwrap_or_default();
            if decoded.len() != 32 || decoded.iter().all(|b| *b == 0) || STANDARD.encode(&decoded) != *key {
                return bad("a public key is not 32 bytes in base64".to_owned());
            }
            let of_another = self.by_key.get(key).is_some_and(|id| !own.contains(id));
            if of_another || myself.public_keys.iter().take(at).any(|other| other == key) {
                return bad(format!("the public key is that of another node; {public_key}"));
            }
        }
        let long = |text: &String| text.len() > MAX_TEXT || text.chars().any(char::is_control);
        let too_much = myself.public_keys.len() > MAX_LANES
            || myself.labels.len() > MAX_LABELS
            || myself.taints.len() > MAX_LABELS
            || myself.labels.iter().any(|(key, value)| long(key) || long(value))
            || myself.taints.iter().any(long);
        if too_much {
            return bad(format!(
                "too many or too long labels, taints or keys; at most {MAX_LABELS} of up to {MAX_TEXT} bytes each"
            ));
        }
        if myself.encryption == Mode::Wireguard && myself.public_keys.is_empty() {
            return bad("the node wants encryption `wireguard` and has no public key".to_owned());
        }
        Ok(())
    }
}

/// What mends what a node says of itself.
#[derive(Clone, Copy)]
struct Words {
    underlay: &'static str,
    public_key: &'static str,
}

/// Where meshd runs: keys of its configuration.
const OF_MESHD: Words = Words {
    underlay: "set `node-ip` or `advertise-address` to one that is this node's own",
    public_key: "was this machine cloned? Remove its `private-key-file`",
};
/// Where it does not: flags of `meshctl node add`.
const OF_FOREIGN: Words = Words {
    underlay: "give `--underlay` the address at which it receives data",
    public_key: "give `--public-key` its own",
};

/// A line for the audit log.
pub(super) fn audit(now: Now, what: &str, node: Option<&str>, token: Option<&str>) -> AuditRow {
    AuditRow {
        at: now.unix,
        what: what.to_owned(),
        node: node.map(str::to_owned),
        token: token.map(str::to_owned),
        from: None,
    }
}

/// Whether a node can be reached there at all.
fn is_underlay(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !(ip.is_loopback() || ip.is_multicast() || ip.is_unspecified() || link_local)
}

fn set_myself(row: &mut NodeRow, myself: &Myself) {
    row.record.underlay = myself.underlay.clone();
    row.record.public_keys = myself.public_keys.clone();
    row.record.encryption = myself.encryption;
    row.record.labels = myself.labels.clone();
    row.record.taints = myself.taints.clone();
    row.settle();
}

fn removal(row: &NodeRow, now: Now, how: How) -> Plan {
    let what = match how {
        How::Removed => "remove",
        How::Replaced => "replace",
        How::Left => "leave",
        How::Purged => "purge",
    };
    Plan {
        drop_nodes: vec![row.record.id.clone()],
        put_gone: vec![GoneRow {
            id: row.record.id.clone(),
            name: row.record.name.clone(),
            identity: row.identity.clone(),
            subnets: row.record.subnets.clone(),
            at: now.unix,
            how,
        }],
        audit: vec![audit(now, what, Some(&row.record.name), None)],
        ..Plan::default()
    }
}

fn why_gone(gone: &GoneRow) -> String {
    let (name, at) = (&gone.name, rfc3339(gone.at));
    match gone.how {
        How::Removed => {
            format!("node `{name}` was removed from the cluster at {at}; to be a member again, join with a token")
        }
        How::Replaced => format!("node `{name}` was replaced by another of that name at {at}"),
        How::Left => format!("node `{name}` left the cluster at {at}; to be a member again, join with a token"),
        How::Purged => format!("node `{name}` was away for too long and was purged at {at}"),
    }
}

fn check_usable(now: Now, token: &TokenRow) -> Result<(), Refused> {
    if token.revoked {
        Err(Refused::TokenRevoked(token.id.clone()))
    } else if token.expires_at.is_some_and(|at| at <= now.unix) {
        Err(Refused::TokenExpired(token.id.clone()))
    } else if token.uses_left == Some(0) {
        Err(Refused::TokenUsedUp(token.id.clone()))
    } else {
        Ok(())
    }
}

fn exhausted(e: Exhausted) -> Refused {
    Refused::Exhausted { cidr: e.cidr, mask: e.mask, used: e.used }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_default).collect()
}
