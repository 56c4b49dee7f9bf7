//! A store that several servers share and that does not answer yet: until it does, reads are answered from the copy of it that
//! this server keeps on its disk, and nothing can be written.
//!
//! Owns the copy's file and the change-over, which happens once. Knows neither what the keys mean nor why the store is away:
//! who opens it says so.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::{KeyValue, LeaseId, Outcome, Revision, Snapshot, Store, StoreError, Txn, Watch};
use crate::membership::files::{self, FileError};

/// The format of the file.
const FORMAT: u32 = 1;
/// Some hundred thousand nodes.
const MAX_COPY: u64 = 256 << 20;

/// What a store had, in a file. It holds the cluster's keys.
#[derive(Serialize, Deserialize)]
struct Copy {
    meshd_copy: u32,
    revision: Revision,
    /// Keys, values, and the revisions that last wrote them.
    items: Vec<(String, String, Revision)>,
}

/// Writes what the store has to `path`, which only its owner may read. Values have to be text.
pub fn keep(path: &Path, store: &Snapshot) -> Result<(), FileError> {
    let text = |item: &KeyValue| Some((item.key.clone(), String::from_utf8(item.value.clone()).ok()?, item.modified));
    let items = store.items.iter().filter_map(text).collect();
    let copy = Copy { meshd_copy: FORMAT, revision: store.revision, items };
    files::write_atomic(path, &Zeroizing::new(serde_json::to_vec(&copy).unwrap_or_default()))
}

/// The copy; `None` where there is none that can be used, since it is only a copy.
pub fn kept(path: &Path) -> Option<Snapshot> {
    let bytes = Zeroizing::new(files::read_up_to(path, MAX_COPY).ok()??);
    let copy: Copy = serde_json::from_slice(&bytes)
        .inspect_err(|e| tracing::warn!("{}: damaged ({e}), and not used", path.display()))
        .ok()
        .filter(|copy: &Copy| copy.meshd_copy == FORMAT)?;
    let item = |(key, value, modified): (String, String, Revision)| KeyValue {
        key,
        value: value.into_bytes(),
        created: modified,
        modified,
        lease: None,
    };
    Some(Snapshot { revision: copy.revision, items: copy.items.into_iter().map(item).collect() })
}

/// The copy, and behind it the store once that answers.
pub struct Standby {
    copy: Snapshot,
    store: OnceLock<Arc<dyn Store>>,
    away: watch::Sender<Vec<String>>,
}

impl Standby {
    /// Answers from the copy.
    pub fn new(copy: Snapshot) -> Arc<Self> {
        let away = watch::Sender::new(vec!["the datastore is being opened".to_owned()]);
        Arc::new(Standby { copy, store: OnceLock::new(), away })
    }

    /// Why the store is away, a sentence a reason, with what to do. Nothing changes once it is there. Whether that is new.
    pub fn say(&self, reasons: Vec<String>) -> bool {
        self.away.send_if_modified(|said| {
            let other = self.store.get().is_none() && !reasons.is_empty() && *said != reasons;
            if other {
                *said = reasons;
            }
            other
        })
    }

    /// What was said last; empty once the store is there.
    pub fn away(&self) -> watch::Receiver<Vec<String>> {
        self.away.subscribe()
    }

    /// Everything goes to the store itself from now on. It still counts as away until [`Standby::present`].
    pub fn arrive(&self, store: Arc<dyn Store>) {
        // a second one changes nothing
        self.store.set(store).ok();
    }

    /// What the store holds is known: nobody goes by the copy any more.
    pub fn present(&self) {
        self.away.send_replace(vec![]);
    }

    fn store(&self) -> Result<&Arc<dyn Store>, StoreError> {
        self.store.get().ok_or_else(|| away(&self.away.borrow()))
    }
}

/// What somebody hears who wants to change something meanwhile.
pub fn away(reasons: &[String]) -> StoreError {
    StoreError::Unavailable { place: "the datastore does not answer".to_owned(), detail: reasons.join("; ") }
}

impl Store for Standby {
    fn range<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Snapshot, StoreError>> {
        if let Some(store) = self.store.get() {
            return store.range(prefix);
        }
        let items = self.copy.items.iter().filter(|item| item.key.starts_with(prefix)).cloned().collect();
        let copy = Snapshot { revision: self.copy.revision, items };
        Box::pin(async { Ok(copy) })
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        match self.store() {
            Ok(store) => store.txn(txn),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch, StoreError>> {
        match self.store() {
            Ok(store) => store.watch(prefix, after),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        match self.store() {
            Ok(store) => store.grant(ttl),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        match self.store() {
            Ok(store) => store.keep_alive(lease),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        match self.store() {
            Ok(store) => store.revoke(lease),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }
}
