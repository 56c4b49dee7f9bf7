//! How a registry comes to be: the cluster that is in the store, or a new one, and whether it is the one that is meant.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use tokio::sync::{Notify, watch};

use super::found::{self, Found};
use super::health::Health;
use super::rows::{self, BadRow, ClusterRow};
use super::space::Space;
use super::{Counters, Known, Registry, Writer};
use crate::membership::authority::{Authority, AuthorityError};
use crate::membership::clock::Now;
use crate::membership::files::FileError;
use crate::membership::pake;
use crate::membership::random;
use crate::membership::settings::{MaskSizes, PurgeAfter, Secret};
use crate::membership::store::{Op, Store, StoreError, Txn};

/// What a cluster is made with, and what is known of the one that should be there.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// `cluster-cidr`; empty: the one of the cluster that is there.
    pub cidrs: Vec<IpNet>,
    /// `node-cidr-mask-size`
    pub masks: MaskSizes,
    /// The pre-shared secret, where one was given.
    pub secret: Option<Secret>,
    /// `purge-after`
    pub purge_after: PurgeAfter,
    /// Whether other servers use the store, too.
    pub shared: bool,
    /// The cluster that this server has served before: nothing else will do.
    pub cluster: Option<String>,
    /// The id of a cluster that this server makes, or has just made.
    pub candidate: Option<String>,
    /// SHA-256 of the CA of the cluster that this server is to join, as its token says.
    pub ca: Option<[u8; 32]>,
    /// Whether the cluster has to be there already, for another reason: `server` was given.
    pub join: bool,
    /// What kind of store it is, in a word; for people.
    pub datastore: &'static str,
}

/// Why there is no registry.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its content is wrong.
    #[error(transparent)]
    Row(#[from] BadRow),
    /// The copy of it.
    #[error(transparent)]
    File(#[from] FileError),
    /// The CA.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The cluster that was there is not.
    #[error(
        "cluster {cluster}, which this server belongs to, is no longer in its datastore: it was emptied, or is another one. Nothing \
         is served. Restore the datastore from a backup, or set `datastore-endpoint` right; to give that cluster up for good, \
         remove the data-dir's `server` and `agent` folders"
    )]
    Vanished {
        /// Its id.
        cluster: String,
    },
    /// Another cluster is there.
    #[error(
        "the datastore holds cluster {found}, but this server belongs to {cluster}: one database is for one cluster. Set \
         `datastore-endpoint` right"
    )]
    OtherCluster {
        /// The one that is there.
        found: String,
        /// The one that should be.
        cluster: String,
    },
    /// A cluster is there, and nothing says that this server is meant to serve it.
    #[error(
        "the datastore holds cluster {found} already: to add this server to it, give it a token that `meshctl token create --role \
         server` made there, or its shared secret; for a cluster of its own, give it another database. If it is a server of it \
         whose data-dir was lost, write {found} into the file server/cluster-id there"
    )]
    Stranger {
        /// The one that is there.
        found: String,
    },
    /// A token for a cluster that is not there.
    #[error(
        "`token` or `server` joins a cluster that is not the one in the datastore; set `datastore-endpoint` to that of its servers"
    )]
    OtherToken,
    /// Another secret than the cluster's.
    #[error("`token` is not the shared secret that this cluster was made with; use the one of its other servers")]
    OtherSecret,
    /// Somebody else makes a cluster in it.
    #[error("another server makes a cluster in this store at the same time; start again")]
    Race,
}

impl Registry {
    /// Opens the cluster in this store, or makes one. Stretching a secret takes a moment.
    pub async fn open(store: Arc<dyn Store>, setup: Setup, now: Now) -> Result<Self, OpenError> {
        let mut setup = setup;
        if setup.cidrs.is_empty()
            && let Some(row) = store.range(rows::CLUSTER).await?.items.iter().find(|item| item.key == rows::CLUSTER)
        {
            let row: ClusterRow = rows::read(rows::CLUSTER, &row.value)?;
            (setup.cidrs, setup.masks) = (row.cidrs, row.masks);
        }
        let space = Space::new(&setup.cidrs, setup.masks).map_err(BadRow::from)?;
        let mut found = Found::read(&*store, &space).await?;
        let mut made = false;
        if found.cluster.is_none() {
            if let Some(cluster) = setup.cluster {
                return Err(OpenError::Vanished { cluster });
            }
            if setup.ca.is_some() || setup.join {
                return Err(OpenError::OtherToken);
            }
            made = found::make(&*store, &setup, now).await?;
            found = Found::read(&*store, &space).await?;
        }
        let (Some(cluster), Some(ca)) = (found.cluster, found.ca) else { return Err(OpenError::Race) };
        let authority = Authority::load(&ca)?;
        if let Some(was) = setup.cluster.as_ref().filter(|was| **was != cluster.id) {
            return Err(OpenError::OtherCluster { found: cluster.id, cluster: was.clone() });
        }
        if setup.ca.is_some_and(|hash| hash != authority.hash()) {
            return Err(OpenError::OtherToken);
        }
        made |= setup.candidate.as_ref() == Some(&cluster.id);
        let verifier = setup.secret.as_ref().map(|secret| pake::Verifier::new(secret.reveal(), &cluster.id));
        if setup.shared && !made {
            if verifier.is_some() && found.secret != verifier {
                return Err(OpenError::OtherSecret);
            }
            if setup.cluster.is_none() && setup.ca.is_none() && verifier.is_none() {
                return Err(OpenError::Stranger { found: cluster.id });
            }
        }
        if cluster.cidrs != setup.cidrs || cluster.masks != setup.masks {
            let was = cluster.cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let masks = format!("{}, {}", cluster.masks.v4, cluster.masks.v6);
            return Err(BadRow::OtherSpace { was, masks }.into());
        }
        let secret = match verifier {
            Some(verifier) => {
                if found.secret.as_ref() != Some(&verifier) {
                    let ops = vec![Op::put(rows::SECRET, STANDARD.encode(verifier.as_bytes()))];
                    store.txn(Txn { compares: vec![], ops }).await?;
                }
                Some(verifier)
            }
            None => found.secret,
        };
        let revision = found.feed.revision();
        Ok(Registry {
            store,
            authority,
            cluster,
            secret,
            purge_after: setup.purge_after,
            known: RwLock::new(Known { state: found.state, feed: found.feed }),
            writer: tokio::sync::Mutex::new(Writer {
                guard: found.guard,
                followed: found.revision,
                stale: false,
                audited: 0,
                flushed: now.mono,
                tidied: Duration::ZERO,
            }),
            health: Mutex::new(Health::new(now, found.beats)),
            servers: RwLock::default(),
            members: OnceLock::new(),
            away: OnceLock::new(),
            shared: setup.shared,
            datastore: setup.datastore,
            me: random::id(),
            others: Mutex::new(found.others),
            moved: Mutex::default(),
            presence: tokio::sync::Mutex::default(),
            heard: AtomicU64::new(0),
            published: watch::Sender::new(revision),
            changed: Notify::new(),
            answers: Mutex::default(),
            refused_at: AtomicI64::new(0),
            counters: Counters::default(),
        })
    }
}
