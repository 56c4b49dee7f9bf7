//! Which cluster a server has served, and in which store: files in its data directory.

use std::path::Path;

use super::SidecarError;
use crate::membership::files::{self, FileError};
use crate::membership::random;
use crate::membership::settings::Datastore;
use crate::membership::store::endpoint::redacted;

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

/// Where the state of a server with this data directory is, when that is a store elsewhere, which has tools of its own.
pub fn elsewhere(data_dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(data_dir.join(CLUSTER_ID)).ok()?;
    let place = text.lines().nth(1)?.trim().to_owned();
    (!place.is_empty() && !place.starts_with("sqlite:")).then_some(place)
}
