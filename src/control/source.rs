//! The nodes-file, watched.
//!
//! Owns the reading and the question whether there is anything new; `nodes_file` says what a content means. Polls, because
//! an inotify watch follows an inode, while editors, configuration managers and mounted ConfigMaps replace the file.

use std::fs::Metadata;
use std::io;
use std::num::NonZeroU16;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::nodes_file::{self, NodesError};
use crate::config::load::{ReadError, read_regular};
use crate::key::file::{PresharedFileError, load_preshared};
use crate::node::{NodeList, NodeName, Preshared};

/// A node list file, and what was last seen of it.
#[derive(Debug)]
pub struct NodesFile {
    path: PathBuf,
    default_port: NonZeroU16,
    /// What the file looked like when it was read; `None` when it has to be read again in any case.
    seen: Option<Sight>,
    /// What was read, right or wrong.
    content: Option<[u8; 32]>,
    /// It names files with preshared keys.
    names_files: bool,
}

/// A node list that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NodesFileError {
    /// The file cannot be read.
    #[error("cannot read the nodes-file")]
    Read(#[source] ReadError),
    /// The content is wrong.
    #[error("{}:{error}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        error: Box<NodesError>,
    },
    /// It has preshared keys, and others may read it.
    #[error(
        "{}: it has a `preshared-key`, and others may read it (mode {mode:o}); `chmod 600` it, or keep the key in a file \
         of its own (`preshared-key-file`)", path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file that it names cannot be used.
    #[error("{}: node `{node}`", path.display())]
    Preshared {
        /// The list.
        path: PathBuf,
        /// The entry.
        node: NodeName,
        /// What is wrong.
        source: PresharedFileError,
    },
}

impl NodesFile {
    /// A file that nobody has looked at yet. An entry whose underlay has no port gets `default_port`.
    pub fn new(path: impl Into<PathBuf>, default_port: NonZeroU16) -> Self {
        NodesFile { path: path.into(), default_port, seen: None, content: None, names_files: false }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The list, if the content is another than the last time. What is wrong with a content, or with reading it, is said
    /// once, and again only after it has changed. A file that somebody is writing to is left alone until the next call.
    pub fn poll(&mut self) -> Result<Option<NodeList>, NodesFileError> {
        let clock = SystemTime::now();
        let now = Sight::of(std::fs::metadata(&self.path));
        // Whoever starts cannot wait, and there is no former list that half a new one could replace.
        let first = self.seen.is_none() && self.content.is_none();
        if !first && !now.is_news(self.seen.as_ref(), clock) {
            return Ok(None);
        }
        self.read(now, clock)
    }

    /// The list as it is now, changed or not.
    pub fn load(&mut self) -> Result<NodeList, NodesFileError> {
        self.content = None;
        let now = Sight::of(std::fs::metadata(&self.path));
        // Without a former content everything is news, so there is always a list.
        self.read(now, SystemTime::now()).map(Option::unwrap_or_default)
    }

    fn read(&mut self, now: Sight, clock: SystemTime) -> Result<Option<NodeList>, NodesFileError> {
        let (content, metadata) = match read_regular(&self.path, MAX_BYTES) {
            Ok(read) => read,
            Err(error) => {
                self.seen = Some(now);
                self.content = None;
                return Err(NodesFileError::Read(error));
            }
        };
        // Not what `now` says: the file may have been replaced between the two looks.
        let stamp = Stamp::of(&metadata);
        self.seen = stamp.is_final(clock).then_some(Sight::File(stamp));
        let digest: [u8; 32] = Sha256::digest(&content).into();
        // what the files say that it names may be something else all the same
        if self.content.replace(digest) == Some(digest) && !self.names_files {
            return Ok(None);
        }
        let mut list = nodes_file::parse(&content, self.default_port)
            .map_err(|error| NodesFileError::Content { path: self.path.clone(), error: Box::new(error) })?;
        self.names_files = false;
        self.read_preshared(&mut list, metadata.mode() & 0o777)?;
        Ok(Some(list))
    }

    fn read_preshared(&mut self, list: &mut NodeList, mode: u32) -> Result<(), NodesFileError> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        for node in &mut list.nodes {
            match &node.preshared {
                None => {}
                Some(Preshared::Key(_)) if mode & 0o077 != 0 => {
                    return Err(NodesFileError::Exposed { path: self.path.clone(), mode });
                }
                Some(Preshared::Key(_)) => {}
                Some(Preshared::File(file)) => {
                    self.names_files = true;
                    let key = load_preshared(&folder.join(file)).map_err(|source| NodesFileError::Preshared {
                        path: self.path.clone(),
                        node: node.name.clone(),
                        source,
                    })?;
                    node.preshared = Some(Preshared::Key(key));
                }
            }
        }
        Ok(())
    }
}

const MAX_BYTES: u64 = 256 << 20;

/// After a change the file has to be left alone for this long, or it is taken for half written.
const QUIET: Duration = Duration::from_millis(250);

/// Two writes within one tick of the file system's clock can leave the same stamp. Older than this, that is over.
const TICK: Duration = Duration::from_secs(2);

/// What a look at the path shows.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Sight {
    File(Stamp),
    Failed(io::ErrorKind),
}

/// What changes when a file is written, replaced or given other permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Unlike the time of modification nobody can set this one back.
    changed: (i64, i64),
}

impl Sight {
    fn of(look: io::Result<Metadata>) -> Self {
        match look {
            Ok(metadata) => Sight::File(Stamp::of(&metadata)),
            Err(error) => Sight::Failed(error.kind()),
        }
    }

    fn is_news(&self, seen: Option<&Sight>, clock: SystemTime) -> bool {
        let half_written = match self {
            Sight::File(stamp) => stamp.age(clock).is_some_and(|age| age < QUIET),
            Sight::Failed(_) => false,
        };
        seen != Some(self) && !half_written
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether a later change is sure to show in the stamp.
    fn is_final(&self, clock: SystemTime) -> bool {
        self.age(clock).is_some_and(|age| age > TICK)
    }

    /// `None` when the clock was set back meanwhile.
    fn age(&self, clock: SystemTime) -> Option<Duration> {
        let (seconds, nanoseconds) = self.changed;
        let since_epoch = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanoseconds).ok()?);
        clock.duration_since(UNIX_EPOCH.checked_add(since_epoch)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;

    const GOOD: &str = "nodes: [{name: a, underlay: 10.9.0.1}]\n";
    const OTHER: &str = "nodes: [{name: b, underlay: 10.9.0.1}]\n";
    const BAD: &str = "nodes: [{name: a}]\n";

    fn file(dir: &tempfile::TempDir, text: &str) -> PathBuf {
        let path = dir.path().join("nodes.yaml");
        fs::write(&path, text).unwrap();
        path
    }

    fn watch(path: &Path) -> NodesFile {
        NodesFile::new(path, NonZeroU16::new(8472).unwrap())
    }

    fn rest() {
        std::thread::sleep(QUIET + Duration::from_millis(50));
    }

    #[test]
    fn a_change_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, GOOD);
        let mut nodes = watch(&path);
        assert_eq!(nodes.poll().unwrap().unwrap().nodes.len(), 1);
        assert!(nodes.poll().unwrap().is_none());
        fs::write(&path, OTHER).unwrap();
        assert!(nodes.poll().unwrap().is_none(), "may be half written");
        rest();
        assert_eq!(nodes.poll().unwrap().unwrap().nodes[0].name.as_str(), "b");
        assert!(nodes.poll().unwrap().is_none());
        fs::write(&path, OTHER).unwrap();
        rest();
        assert!(nodes.poll().unwrap().is_none(), "the same text again");
        assert_eq!(nodes.load().unwrap().nodes.len(), 1, "unless asked for");
    }

    #[test]
    fn a_replaced_file_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, GOOD);
        let mut nodes = watch(&path);
        nodes.poll().unwrap().unwrap();
        let new = dir.path().join("new");
        fs::write(&new, OTHER).unwrap();
        fs::rename(&new, &path).unwrap();
        rest();
        assert!(nodes.poll().unwrap().is_some());
    }

    #[test]
    fn a_mistake_is_told_once_and_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, BAD);
        let mut nodes = watch(&path);
        let error = nodes.poll().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}:1:9: node `a` has no `underlay`", path.display())), "{error}");
        rest();
        assert!(nodes.poll().unwrap().is_none());
        fs::write(&path, GOOD).unwrap();
        rest();
        assert!(nodes.poll().unwrap().is_some());
    }

    #[test]
    fn a_missing_file_is_told_once_and_picked_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, GOOD);
        let mut nodes = watch(&path);
        nodes.poll().unwrap().unwrap();
        fs::remove_file(&path).unwrap();
        assert!(matches!(nodes.poll(), Err(NodesFileError::Read(error)) if error.is_missing()));
        assert!(nodes.poll().unwrap().is_none());
        fs::write(&path, GOOD).unwrap();
        assert!(nodes.poll().unwrap().is_none(), "may be half written");
        rest();
        assert!(nodes.poll().unwrap().is_some());
    }

    #[test]
    fn what_is_no_file_is_refused_and_does_not_hang() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for path in [dir.path(), &fifo, Path::new("/dev/zero")] {
            let error = watch(path).poll().unwrap_err();
            assert!(matches!(error, NodesFileError::Read(ReadError::NotAFile { .. })), "{error:?}");
        }
        assert!(watch(&file(&dir, GOOD)).poll().is_ok());
    }

    #[test]
    fn a_stamp_is_trusted_when_it_is_old_enough() {
        let at = |seconds| UNIX_EPOCH + Duration::from_millis(seconds);
        let stamp = Stamp { device: 1, inode: 2, size: 3, modified: (10, 0), changed: (10, 0) };
        let sight = Sight::File(stamp);
        assert!(!stamp.is_final(at(11_000)) && stamp.is_final(at(12_001)));
        assert!(!sight.is_news(None, at(10_100)) && sight.is_news(None, at(10_250)));
        assert!(!sight.is_news(Some(&sight.clone()), at(20_000)));
        assert!(sight.is_news(Some(&Sight::File(Stamp { inode: 9, ..stamp })), at(20_000)));
        assert!(!stamp.is_final(at(9_000)) && sight.is_news(None, at(9_000)), "the clock was set back");
    }
}
