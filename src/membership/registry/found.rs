//! What is in the store, read whole: at the start, and when it is not known what became of a change.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::feed::Feed;
use super::others::Others;
use super::rows::{self, BadRow, ClusterRow, GoneRow, NodeRow, TokenRow};
use super::space::Space;
use super::state::State;
use super::{OpenError, Setup};
use crate::membership::authority::{Authority, Kept};
use crate::membership::clock::Now;
use crate::membership::store::{Compare, Op, Outcome, Revision, Store, Txn};
use crate::membership::{pake, random};

/// Everything that is in the store.
pub(super) struct Found {
    pub(super) cluster: Option<ClusterRow>,
    pub(super) ca: Option<Kept>,
    pub(super) secret: Option<pake::Verifier>,
    pub(super) guard: Revision,
    /// When it was read, which may be long after the last change of the guard.
    pub(super) revision: Revision,
    pub(super) beats: HashMap<String, i64>,
    pub(super) state: State,
    pub(super) feed: Feed,
    pub(super) others: Others,
}

impl Found {
    pub(super) async fn read(store: &dyn Store, space: &Space) -> Result<Self, OpenError> {
        let snapshot = store.range("").await?;
        let revision = snapshot.revision;
        let mut state = State::new(space.clone());
        let (mut cluster, mut ca, mut secret) = (None, None, None);
        let (mut guard, mut list, mut beats) = (0, 0, HashMap::new());
        let mut others = Others::default();
        for item in snapshot.items {
            let (key, value) = (item.key.as_str(), item.value.as_slice());
            match key {
                rows::CLUSTER => cluster = Some(rows::read::<ClusterRow>(key, value)?),
                rows::CA => ca = Some(rows::read::<Kept>(key, value)?),
                rows::SECRET => {
                    let bytes = STANDARD.decode(value).ok().and_then(|bytes| bytes.try_into().ok());
                    let unreadable = || BadRow::Unreadable { key: key.to_owned(), detail: "not 32 bytes".to_owned() };
                    secret = Some(pake::Verifier::from_bytes(bytes.ok_or_else(unreadable)?));
                }
                rows::GUARD => guard = item.modified,
                rows::LIST => list = item.modified,
                // For people only: when it is damaged, nothing is lost.
                rows::BEATS => beats = serde_json::from_slice(value).unwrap_or_default(),
                _ if key.starts_with(rows::NODE) => state.add_node(rows::read::<NodeRow>(key, value)?),
                _ if key.starts_with(rows::GONE) => state.add_gone(rows::read::<GoneRow>(key, value)?),
                _ if key.starts_with(rows::TOKEN) => {
                    let row = rows::read::<TokenRow>(key, value)?;
                    state.tokens.insert(row.id.clone(), row);
                }
                _ if key.starts_with(rows::AUDIT) => drop(state.audit.insert(item.key)),
                _ => others.take(key, Some(value)),
            }
        }
        Ok(Found { cluster, ca, secret, guard, revision, beats, state, feed: Feed::new(list), others })
    }
}

/// Makes the cluster, in one step: there is no half of one. Whether it was this server that made it.
pub(super) async fn make(store: &dyn Store, setup: &Setup, now: Now) -> Result<bool, OpenError> {
    let id = setup.candidate.clone().unwrap_or_else(random::id);
    let (_, ca) = Authority::generate(&id, now.date())?;
    let secret = setup.secret.as_ref().map(|secret| pake::Verifier::new(secret.reveal(), &id));
    let row = ClusterRow { id, created_at: now.unix, cidrs: setup.cidrs.clone(), masks: setup.masks };
    let mut ops = vec![
        Op::put(rows::CLUSTER, rows::json(&row)),
        Op::put(rows::CA, rows::json(&ca)),
        Op::put(rows::GUARD, ""),
        Op::put(rows::LIST, ""),
    ];
    ops.extend(secret.map(|secret| Op::put(rows::SECRET, STANDARD.encode(secret.as_bytes()))));
    let compares = vec![Compare { key: rows::CLUSTER.to_owned(), modified: 0 }];
    Ok(matches!(store.txn(Txn { compares, ops }).await?, Outcome::Done(_)))
}
