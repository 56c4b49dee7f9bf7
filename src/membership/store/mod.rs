//! Where the servers keep what they know: keys and values with revisions, shaped by what etcd offers and SQL can do.
//!
//! Owns the trait and its words. Knows nothing of nodes and tokens: those are `registry`'s. A back end promises: what
//! [`Store::txn`] has acknowledged survives any crash; a transaction happens whole or not at all; revisions grow by one
//! with each transaction that changes something (by more where others write to the same etcd), and are never given twice.

pub mod check;
pub mod conformance;
pub mod endpoint;
pub mod etcd;
pub mod sql;
pub mod sqlite;
pub mod standby;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use self::sqlite::Sqlite;
use crate::membership::settings::Datastore;

/// The number of a change; the first is 1, and 0 stands for "never".
pub type Revision = u64;

/// A lease: the keys that are bound to it vanish when it is not kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// A key, its value, and when they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key, by convention a path without a leading slash.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that made the key.
    pub created: Revision,
    /// The revision that last wrote it.
    pub modified: Revision,
    /// The lease that it is bound to.
    pub lease: Option<LeaseId>,
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The key.
    pub key: String,
    /// Its modification revision must be this; 0: the key must not exist.
    pub modified: Revision,
}

/// A step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// Binds the key to a lease, which must exist.
        lease: Option<LeaseId>,
    },
    /// Removes a key; nothing happens where there is none.
    Delete {
        /// The key.
        key: String,
    },
}

impl Op {
    /// Writes a key without a lease.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Op::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Removes a key.
    pub fn delete(key: impl Into<String>) -> Self {
        Op::Delete { key: key.into() }
    }
}

/// All or nothing: where each comparison holds, each step is done, in order. No key may be written twice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// What must hold.
    pub compares: Vec<Compare>,
    /// What is then done.
    pub ops: Vec<Op>,
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is stored, as this revision.
    Done(Revision),
    /// A comparison failed, and nothing was changed.
    Conflict,
}

/// What was there at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The revision.
    pub revision: Revision,
    /// The keys, sorted.
    pub items: Vec<KeyValue>,
}

/// A copy of everything that any store can be filled from. It holds the cluster's keys.
#[derive(Serialize, Deserialize)]
struct Backup {
    /// The format.
    meshd_backup: u32,
    revision: Revision,
    /// Keys, and values in base64. What a lease held is left out.
    items: Vec<(String, String)>,
}

impl Snapshot {
    /// As a backup, JSON.
    pub fn to_backup(&self) -> Vec<u8> {
        let items = self.items.iter().filter(|item| item.lease.is_none());
        let items = items.map(|item| (item.key.clone(), STANDARD.encode(&item.value))).collect();
        serde_json::to_vec(&Backup { meshd_backup: 1, revision: self.revision, items }).unwrap_or_default()
    }

    /// From a backup, or why it is none.
    pub fn from_backup(bytes: &[u8]) -> Result<Self, String> {
        let backup: Backup = serde_json::from_slice(bytes).map_err(|e| format!("not a backup: {e}"))?;
        if backup.meshd_backup != 1 {
            return Err(format!("a backup of format {}, but this version knows 1", backup.meshd_backup));
        }
        let read = |(key, value): (String, String)| {
            let value = STANDARD.decode(value).map_err(|e| format!("`{key}`: {e}"))?;
            Ok(KeyValue { key, value, created: backup.revision, modified: backup.revision, lease: None })
        };
        let items = backup.items.into_iter().map(read).collect::<Result<Vec<_>, String>>()?;
        if items.is_empty() {
            Err("the backup is empty".to_owned())
        } else {
            Ok(Snapshot { revision: backup.revision, items })
        }
    }
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It was written.
    Put(KeyValue),
    /// It was removed.
    Delete {
        /// The key.
        key: String,
        /// When.
        revision: Revision,
    },
}

impl Event {
    /// The revision of the change.
    pub fn revision(&self) -> Revision {
        match self {
            Event::Put(kv) => kv.modified,
            Event::Delete { revision, .. } => *revision,
        }
    }

    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Event::Put(kv) => &kv.key,
            Event::Delete { key, .. } => key,
        }
    }
}

/// Changes as they come: each message holds those of one or more whole revisions, in order. Ends with an error.
pub type Watch = mpsc::Receiver<Result<Vec<Event>, StoreError>>;

/// Why a store did not do what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There is no room. Nothing was changed.
    #[error("{place}: the disk is full, so nothing was changed; make room, and try again")]
    Full {
        /// Which store.
        place: String,
    },
    /// What is stored is not what was written.
    #[error("{place}: the database is damaged ({detail}); restore a backup with `mesh-sidecar restore`")]
    Corrupt {
        /// Which store.
        place: String,
        /// In the engine's words.
        detail: String,
    },
    /// Written by a later release.
    #[error("{place}: the database has format {found}, but this version knows {known}; use a newer version")]
    Newer {
        /// Which store.
        place: String,
        /// The format found.
        found: i64,
        /// The latest format that is known here.
        known: i64,
    },
    /// Another process has it.
    #[error("{place}: another mesh-sidecar uses this database: stop its meshd first")]
    InUse {
        /// Which store.
        place: String,
    },
    /// The history that a watch wants is gone: list again.
    #[error("the history up to revision {compacted} is gone; list again")]
    Compacted {
        /// The oldest revision to watch from.
        compacted: Revision,
    },
    /// A lease that there is not, or no longer.
    #[error("there is no such lease")]
    NoLease,
    /// Not usable as it is; a person has to change something. Nothing was changed.
    #[error("{place}: {problem}")]
    Unfit {
        /// Which store.
        place: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Everything else: the outcome of what was asked is unknown.
    #[error("{place}: {detail}")]
    Unavailable {
        /// Which store.
        place: String,
        /// In the engine's words.
        detail: String,
    },
}

/// Opens the store that `datastore-endpoint` names, by its scheme; SQLite at `default` where it names none.
pub async fn open(datastore: &Datastore, default: &Path) -> Result<Arc<dyn Store>, StoreError> {
    let endpoint = datastore.endpoint.as_ref().map_or("", |endpoint| endpoint.reveal());
    let (scheme, rest) = endpoint.split_once("://").unwrap_or((endpoint, ""));
    match scheme {
        "" | "sqlite" => {
            let path = if rest.is_empty() { default } else { Path::new(rest) };
            Ok(Arc::new(Sqlite::open(path).await?))
        }
        "etcd" | "etcds" => Ok(Arc::new(etcd::open(datastore).await?)),
        "mysql" | "mariadb" | "postgres" | "postgresql" => Ok(Arc::new(sql::remote::open(datastore, endpoint).await?)),
        _ => {
            // It may hold a password: what stands before it is enough.
            let problem = "not supported by this version; leave `datastore-endpoint` out for SQLite in `data-dir`";
            Err(StoreError::Unfit { place: format!("{scheme}://…"), problem: problem.to_owned() })
        }
    }
}

/// Whether the store is one that several servers share.
pub fn is_shared(datastore: &Datastore) -> bool {
    kind(datastore) != "sqlite"
}

/// What kind of store it is, in a word.
pub fn kind(datastore: &Datastore) -> &'static str {
    let endpoint = datastore.endpoint.as_ref().map_or("", |endpoint| endpoint.reveal());
    match endpoint.split_once("://").map_or("", |(scheme, _)| scheme) {
        "mysql" | "mariadb" => "mysql",
        "postgres" | "postgresql" => "postgres",
        "etcd" | "etcds" => "etcd",
        _ => "sqlite",
    }
}

/// A store.
pub trait Store: Send + Sync + 'static {
    /// All keys that start with `prefix`, at one revision.
    fn range<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Snapshot, StoreError>>;

    /// Does a transaction; when this returns [`Outcome::Done`], it is stored.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, StoreError>>;

    /// Changes of keys that start with `prefix`, after revision `after`, or [`StoreError::Compacted`].
    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch, StoreError>>;

    /// Makes a lease that ends after `ttl`, counted from its last keep-alive. A restart of the store may lengthen it.
    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>>;

    /// Starts a lease's time again.
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Ends a lease, and removes its keys.
    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;
}
