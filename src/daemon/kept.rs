//! The node list on disk: the last accepted one, which a start without any server forwards by.
//!
//! Owns the file and when it is written: at once, and then not more often than the disk likes. A write happens beside
//! the daemon, which never waits for a disk; the old file stays until the new one is safe.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::view::{Concern, Shared};
use crate::config::load::{ReadError, read_regular};
use crate::control::records::Records;
use crate::control::saved::{self, Damaged};

/// Between two writes.
const PAUSE: Duration = Duration::from_millis(500);
/// Between two attempts.
const RETRY: Duration = Duration::from_secs(5);
/// How long the last write may hold up the end of meshd.
const LAST_WRITE: Duration = Duration::from_secs(3);
const MAX_BYTES: u64 = 256 << 20;

/// Why there is no kept list although there is a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeptError {
    #[error("cannot read the kept node list")]
    Read(#[source] ReadError),
    #[error("the kept node list {} is damaged ({source}): waiting for the servers' list, which replaces it", path.display())]
    Damaged { path: PathBuf, source: Damaged },
}

/// The file in a data directory.
pub(super) fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("nodes.json")
}

/// What was kept, if anything was.
pub(super) fn load(path: &Path) -> Result<Option<Records>, KeptError> {
    match read_regular(path, MAX_BYTES) {
        Ok((bytes, _)) => match saved::decode(&bytes) {
            Ok(records) => Ok(Some(records)),
            Err(source) => Err(KeptError::Damaged { path: path.to_owned(), source }),
        },
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(KeptError::Read(error)),
    }
}

/// Writes what is to be kept.
pub(super) struct Keeper {
    wanted: watch::Sender<Option<Arc<Records>>>,
    task: JoinHandle<()>,
}

impl Keeper {
    pub(super) fn start(path: PathBuf, shared: Arc<Shared>) -> Self {
        let (wanted, changes) = watch::channel(None);
        Keeper { wanted, task: tokio::spawn(keep(path, changes, shared)) }
    }

    /// Keeps this list from now on.
    pub(super) fn keep(&self, records: Arc<Records>) {
        self.wanted.send_replace(Some(records));
    }

    /// Keeps none any more.
    pub(super) fn forget(&self) {
        self.wanted.send_replace(None);
    }

    /// Ends when the last list is on disk.
    pub(super) async fn stop(self) {
        let Keeper { wanted, task } = self;
        drop(wanted);
        timeout(LAST_WRITE, task).await.ok();
    }
}

async fn keep(path: PathBuf, mut changes: watch::Receiver<Option<Arc<Records>>>, shared: Arc<Shared>) {
    while changes.changed().await.is_ok() {
        let mut pause = PAUSE;
        let records = changes.borrow_and_update().clone();
        let file = path.clone();
        let written = spawn_blocking(move || match records {
            Some(records) => write(&file, &records),
            None => remove(&file),
        });
        match written.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => shared.settled(Concern::Kept),
            Err(error) => {
                let message = format!(
                    "cannot keep the node list in {} ({error}): a restart without servers would find an older one",
                    path.display()
                );
                shared.problem(Concern::Kept, message);
                changes.mark_changed();
                pause = RETRY;
            }
        }
        sleep(pause).await;
    }
}

fn write(path: &Path, records: &Records) -> io::Result<()> {
    write_whole(path, &saved::encode(records)?)
}

/// The new file is whole and on disk before it takes the old one's name.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(folder)?.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_kept_and_a_damaged_one_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("new"));
        assert!(load(&path).unwrap().is_none());
        let records = Records::new("c".to_owned(), 3, vec![]);
        write(&path, &records).unwrap();
        write(&path, &Records::new("c".to_owned(), 4, vec![])).unwrap();
        assert_eq!(load(&path).unwrap().unwrap().revision, 4);
        assert_eq!(fs::read_dir(dir.path().join("new")).unwrap().count(), 1, "nothing else is left");

        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = anyhow::Error::new(load(&path).unwrap_err());
        assert!(error.to_string().contains("is damaged"), "{error}");
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(load(&path).unwrap().is_none());
        fs::create_dir(&path).unwrap();
        assert!(matches!(load(&path), Err(KeptError::Read(_))));
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path());
        write(&path, &Records::new("c".to_owned(), 3, vec![])).unwrap();
        fs::create_dir(path.with_extension("json.new")).unwrap();
        assert!(write(&path, &Records::new("c".to_owned(), 4, vec![])).is_err());
        assert_eq!(load(&path).unwrap().unwrap().revision, 3);
    }
}
