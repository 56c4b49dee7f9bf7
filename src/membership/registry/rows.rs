//! What the registry keeps in the store: one JSON document a key, and what a change of it is. Pure.

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::space::BadSpace;
use crate::membership::clock::rfc3339;
use crate::membership::link::AuditLine;
use crate::membership::record::{NodeRecord, Role, State as Health};
use crate::membership::settings::MaskSizes;
use crate::membership::store::Op;

pub(super) const CLUSTER: &str = "cluster";
pub(super) const CA: &str = "ca";
pub(super) const SECRET: &str = "secret";
/// Written by each change: who compares with it knows that nobody came in between.
pub(super) const GUARD: &str = "guard";
/// Written by each change of the node list: its revision is the list's.
pub(super) const LIST: &str = "list";
pub(super) const BEATS: &str = "beats";
/// A server that runs, bound to its lease: where it is reached.
pub(super) const SERVER: &str = "server/";
/// Which server a node heartbeats at.
pub(super) const VIA: &str = "via/";
pub(super) const NODE: &str = "node/";
pub(super) const GONE: &str = "gone/";
pub(super) const TOKEN: &str = "token/";
pub(super) const AUDIT: &str = "audit/";

/// The cluster itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClusterRow {
    pub(super) id: String,
    pub(super) created_at: i64,
    pub(super) cidrs: Vec<IpNet>,
    pub(super) masks: MaskSizes,
}

/// A member.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct NodeRow {
    pub(super) record: NodeRecord,
    /// Its certificate's key ([`identity_of_request`](crate::membership::authority::identity_of_request)); empty for foreign members.
    pub(super) identity: String,
    /// The token that it joined by.
    pub(super) token: Option<String>,
    pub(super) draining: bool,
    pub(super) ready: bool,
}

impl NodeRow {
    /// What the record says of its state.
    pub(super) fn settle(&mut self) {
        self.record.state = match (self.ready, self.draining) {
            (false, _) => Health::NotReady,
            (true, true) => Health::Draining,
            (true, false) => Health::Ready,
        };
    }
}

/// Somebody who was a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GoneRow {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) identity: String,
    /// They rest for it, until its rest is over.
    pub(super) subnets: Vec<IpNet>,
    pub(super) at: i64,
    pub(super) how: How,
}

/// How somebody stopped being a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum How {
    /// A person removed it.
    Removed,
    /// Another took its name.
    Replaced,
    /// It went itself.
    Left,
    /// It was away for too long, and may come back.
    Purged,
}

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TokenRow {
    pub(super) id: String,
    /// SHA-256 of the secret, in hexadecimal.
    pub(super) hash: String,
    pub(super) role: Role,
    pub(super) node: Option<String>,
    pub(super) expires_at: Option<i64>,
    pub(super) uses_left: Option<u32>,
    pub(super) created_at: i64,
    pub(super) revoked: bool,
    pub(super) description: String,
}

/// Something that somebody may want to know later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AuditRow {
    pub(super) at: i64,
    pub(super) what: String,
    pub(super) node: Option<String>,
    pub(super) token: Option<String>,
    pub(super) from: Option<String>,
}

impl From<AuditRow> for AuditLine {
    fn from(row: AuditRow) -> Self {
        let AuditRow { at, what, node, token, from } = row;
        AuditLine { at: rfc3339(at), what, node, token, from }
    }
}

/// A change that was decided, and is not stored yet.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Plan {
    pub(super) put_nodes: Vec<NodeRow>,
    /// Ids.
    pub(super) drop_nodes: Vec<String>,
    pub(super) put_gone: Vec<GoneRow>,
    /// Ids.
    pub(super) drop_gone: Vec<String>,
    pub(super) put_tokens: Vec<TokenRow>,
    pub(super) drop_tokens: Vec<String>,
    pub(super) audit: Vec<AuditRow>,
}

impl Plan {
    pub(super) fn is_empty(&self) -> bool {
        *self == Plan::default()
    }

    /// Removes that node, too.
    pub(super) fn add_removal(&mut self, removal: Plan) {
        self.drop_nodes.extend(removal.drop_nodes);
        self.put_gone.extend(removal.put_gone);
        self.audit.extend(removal.audit);
    }

    pub(super) fn changes_list(&self) -> bool {
        !self.put_nodes.is_empty() || !self.drop_nodes.is_empty()
    }

    /// The steps of the transaction, apart from the guard.
    pub(super) fn ops(&self) -> Vec<Op> {
        let mut ops = Vec::new();
        ops.extend(self.put_nodes.iter().map(|row| Op::put(format!("{NODE}{}", row.record.id), json(row))));
        ops.extend(
            self.drop_nodes.iter().flat_map(|id| [Op::delete(format!("{NODE}{id}")), Op::delete(format!("{VIA}{id}"))]),
        );
        ops.extend(self.put_gone.iter().map(|row| Op::put(format!("{GONE}{}", row.id), json(row))));
        ops.extend(self.drop_gone.iter().map(|id| Op::delete(format!("{GONE}{id}"))));
        ops.extend(self.put_tokens.iter().map(|row| Op::put(format!("{TOKEN}{}", row.id), json(row))));
        ops.extend(self.drop_tokens.iter().map(|id| Op::delete(format!("{TOKEN}{id}"))));
        ops
    }
}

/// What is in the store is not what was put there.
#[derive(Debug, thiserror::Error)]
pub enum BadRow {
    /// A document that cannot be read.
    #[error("the store's `{key}` cannot be read ({detail}); restore a backup, or use the version that wrote it")]
    Unreadable {
        /// The key.
        key: String,
        /// What is wrong.
        detail: String,
    },
    /// Its address space cannot be.
    #[error(transparent)]
    Space(#[from] BadSpace),
    /// Another space than the one that nodes have subnets of.
    #[error(
        "this cluster was made with cluster-cidr {was} and node-cidr-mask-size {masks}, and the configuration says otherwise; \
         set them back"
    )]
    OtherSpace {
        /// As it was.
        was: String,
        /// As it was.
        masks: String,
    },
}

pub(super) fn json(row: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(row).unwrap_or_default()
}

pub(super) fn read<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, BadRow> {
    serde_json::from_slice(value).map_err(|e| BadRow::Unreadable { key: key.to_owned(), detail: e.to_string() })
}
