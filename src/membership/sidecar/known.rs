//! Which cluster a server has served, and in which store: files in its data directory.

use std::path::Path;

use super::{DATABASE, NODE_TOKEN, SidecarError};
use crate::membership::agent::keep::Keep;
use crate::membership::etcd::{Kept, ManagedError};
use crate::membership::files::{self, FileError};
use crate::membership::random;
use crate::membership::settings::{Datastore, Settings};
use crate::membership::store;
use crate::membership::store::endpoint::redacted;
use crate::membership::token::{Credential, Token};

/// Which cluster a server has served, and, on its second line, in which store it is.
const CLUSTER_ID: &str = "server/cluster-id";
/// The id of a cluster that is about to be made.
const CANDIDATE: &str = "server/cluster-id.new";

/// What the data directory says of the cluster that this server serves.
pub(super) struct Known {
    pub(super) cluster: Option<String>,
}

impl Known {
    pub(super) fn read(data_dir: &Path) -> Result<Self, SidecarError> {
        let text = files::read(&data_dir.join(CLUSTER_ID))?;
        let text = text.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let first = text.and_then(|text| text.lines().next().map(|line| line.trim().to_owned()));
        Ok(Known { cluster: first.filter(|line| !line.is_empty()) })
    }

    /// The id of a cluster that this server may make: it stands on the disk before the cluster is there, so that a crash
    /// in between leaves nobody with a cluster that is not theirs.
    pub(super) fn candidate(&self, data_dir: &Path) -> Result<String, SidecarError> {
        let path = data_dir.join(CANDIDATE);
        let kept = files::read(&path)?.and_then(|bytes| String::from_utf8(bytes).ok()).filter(|id| id.len() == 32);
        if let Some(id) = kept {
            return Ok(id);
        }
        let id = random::id();
        if self.cluster.is_none() {
            files::write_atomic(&path, id.as_bytes())?;
        }
        Ok(id)
    }

    pub(super) fn write(data_dir: &Path, cluster: &str, datastore: &Datastore) -> Result<(), SidecarError> {
        let place = datastore.endpoint.as_ref().map_or_else(|| "sqlite://".to_owned(), |e| redacted(e.reveal()));
        let (path, text) = (data_dir.join(CLUSTER_ID), format!("{cluster}\n{place}\n"));
        if files::read(&path)?.as_deref() != Some(text.as_bytes()) {
            files::write_atomic(&path, text.as_bytes())?;
        }
        let candidate = data_dir.join(CANDIDATE);
        Ok(files::remove(&candidate).map_err(|source| FileError { path: candidate, source })?)
    }
}

/// The settings of a server, without a `token` and a `server` that are not for it: one that serves a cluster out of a file
/// has joined nothing else by them, and may have been started with the token of its own cluster, which others join by.
pub(super) fn without_own_token(mut settings: Settings) -> Result<Settings, SidecarError> {
    let token = settings.token.as_ref().and_then(|token| Credential::parse(token.reveal()).ok());
    let whole = if let Some(Credential::Token(token)) = &token { Some(token) } else { None };
    let serves = Known::read(&settings.data_dir)?
        .cluster
        .filter(|_| settings.data_dir.join(DATABASE).exists() && !store::is_shared(&settings.datastore));
    let Some(cluster) = serves.filter(|_| whole.is_some() || !settings.servers.is_empty()) else { return Ok(settings) };
    if Kept::new(&settings.data_dir).member().map_err(ManagedError::from)?.is_some() {
        return Ok(settings);
    }
    let member = Keep::open(&settings.data_dir)?.membership()?.is_some_and(|member| member.cluster == cluster);
    let ready = files::read(&settings.data_dir.join(NODE_TOKEN))?.and_then(|bytes| String::from_utf8(bytes).ok());
    let ready = ready.and_then(|text| text.trim().parse::<Token>().ok());
    let same = ready.is_some_and(|ready| whole.is_some_and(|token| token.ca_hash == ready.ca_hash));
    if member || same {
        tracing::warn!(
            "this server serves cluster {cluster} already: `token` and `server` are not needed, and ignored"
        );
        settings.servers.clear();
        // a shared secret is what others join its cluster by
        settings.token = settings.token.filter(|_| whole.is_none());
    }
    Ok(settings)
}

/// Which cluster the server with this data directory serves, if it has served one.
pub fn served(data_dir: &Path) -> Result<Option<String>, SidecarError> {
    Ok(Known::read(data_dir)?.cluster)
}

/// Where the state of a server with this data directory is, when that is a store elsewhere, which has tools of its own.
pub fn elsewhere(data_dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(data_dir.join(CLUSTER_ID)).ok()?;
    let place = text.lines().nth(1)?.trim().to_owned();
    (!place.is_empty() && !place.starts_with("sqlite:")).then_some(place)
}
