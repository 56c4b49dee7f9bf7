//! The store of a single server: one SQLite database in WAL mode, synced at each commit.
//!
//! Owns the file: who may have it open, how it is copied and put back. One connection does everything, so that writers
//! queue and never meet; how, is [`sql`](super::sql)'s. Knows nothing of what the keys mean.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};

use super::sql::{OneFile, Sql};
use super::{LeaseId, Outcome, Revision, Snapshot, Store, StoreError, Txn, Watch};
use crate::membership::files;

/// A restored database goes on this much later, so that no revision that somebody saw is given to something else.
const RESTORE_GAP: i64 = 1_000_000_000;

/// The store.
#[derive(Clone)]
pub struct Sqlite {
    sql: Sql,
    path: PathBuf,
    /// Locked as long as the store is open.
    _lock: Arc<File>,
}

impl Sqlite {
    /// Opens the database, or makes it, readable for its owner alone. Checks it first.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let lock = lock(path)?;
        let sql = Sql::open_file(path.display().to_string(), options(path)?).await?;
        Ok(Sqlite { sql, path: path.to_owned(), _lock: Arc::new(lock) })
    }

    /// Writes a copy that is whole as of now to `to`, which must not exist.
    pub async fn backup(&self, to: &Path) -> Result<(), StoreError> {
        backup(&self.path, to).await
    }

    /// Closes the database after what is under way.
    pub async fn close(&self) {
        self.sql.close().await;
    }

    /// Lets the database grow to so many pages and no further, as a full disk would.
    #[doc(hidden)]
    pub async fn limit_pages(&self, pages: u32) -> Result<(), StoreError> {
        self.sql.script(format!("PRAGMA max_page_count = {pages}")).await
    }

    /// Drops what the log holds up to a revision.
    #[doc(hidden)]
    pub async fn compact(&self, upto: Revision) -> Result<(), StoreError> {
        self.sql.compact(upto).await
    }
}

impl Store for Sqlite {
    fn range<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Snapshot, StoreError>> {
        self.sql.range(prefix)
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        self.sql.txn(txn)
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch, StoreError>> {
        self.sql.watch(prefix, after)
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        self.sql.grant(ttl)
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.sql.keep_alive(lease)
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.sql.revoke(lease)
    }
}

/// What a restored backup is.
#[derive(Debug)]
pub struct Restored {
    /// When what is in it last changed, in seconds of Unix time, where its audit log says so.
    pub as_of: Option<i64>,
    /// Where what was there before lies now.
    pub former: Option<PathBuf>,
}

/// Checks the backup at `from`, and puts it in the place of the database at `path`, which nobody may have open. `cluster`: the
/// id of the one that it has to be of.
pub async fn restore(from: &Path, path: &Path, cluster: Option<&str>) -> Result<Restored, StoreError> {
    let _lock = lock(path)?;
    let fresh = path.with_extension("restore");
    let io = |e: std::io::Error| StoreError::Unavailable { place: from.display().to_string(), detail: e.to_string() };
    let bytes = std::fs::read(from).map_err(io)?;
    if !bytes.starts_with(b"SQLite format 3\0") {
        let detail = "not a backup of a database".to_owned();
        return Err(StoreError::Corrupt { place: from.display().to_string(), detail });
    }
    for leftover in with_sidefiles(&fresh) {
        files::remove(&leftover).map_err(io)?;
    }
    files::write_atomic(&fresh, &bytes).map_err(|e| files_failed(path, &e))?;
    let mut opened = OneFile::open(from.display().to_string(), options(&fresh)?).await?;
    let prepared = prepare_restored(&mut opened, from, cluster).await;
    opened.close().await;
    let as_of = prepared?;
    let former = match path.exists() {
        true => Some(set_aside(path).map_err(|e| files_failed(path, &e))?),
        false => None,
    };
    // The old write-ahead log must not be replayed over the new database.
    for old in with_sidefiles(path).into_iter().skip(1).chain(with_sidefiles(&fresh).into_iter().skip(1)) {
        files::remove(&old).map_err(io)?;
    }
    files::rename(&fresh, path).map_err(|e| files_failed(path, &e))?;
    Ok(Restored { as_of, former })
}

/// Moves the database away, with what SQLite keeps beside it; what was moved before goes. Where to.
fn set_aside(path: &Path) -> Result<PathBuf, files::FileError> {
    let former = path.with_extension("former");
    for (is, was) in with_sidefiles(path).iter().zip(with_sidefiles(&former)) {
        files::remove(&was).map_err(|source| files::FileError { path: was.clone(), source })?;
        if is.exists() {
            files::rename(is, &was)?;
        }
    }
    Ok(former)
}

/// A copy of the database at `path` that is whole as of now, to `to`; the server may run meanwhile.
pub async fn backup(path: &Path, to: &Path) -> Result<(), StoreError> {
    if !path.exists() {
        let detail = "there is no database here".to_owned();
        return Err(StoreError::Unavailable { place: path.display().to_string(), detail });
    }
    let mut opened = OneFile::open(path.display().to_string(), options(path)?).await?;
    let copied = copy_into(&mut opened, to).await;
    opened.close().await;
    copied
}

async fn copy_into(database: &mut OneFile, to: &Path) -> Result<(), StoreError> {
    // The copy holds the cluster's keys: the file is there, and its owner's alone, before SQLite fills it.
    files::create_new(to).map_err(|e| match e.source.kind() {
        std::io::ErrorKind::AlreadyExists => StoreError::Unfit {
            place: to.display().to_string(),
            problem: "there is a file of that name, which a backup does not overwrite: give it another".to_owned(),
        },
        _ => files_failed(to, &e),
    })?;
    database.run("VACUUM INTO ?", &to.to_string_lossy()).await?;
    File::open(to)
        .and_then(|file| file.sync_all())
        .map_err(|e| StoreError::Unavailable { place: to.display().to_string(), detail: e.to_string() })
}

/// When what is in it last changed, as its audit log says.
async fn prepare_restored(
    database: &mut OneFile,
    from: &Path,
    cluster: Option<&str>,
) -> Result<Option<i64>, StoreError> {
    let report = database.text("PRAGMA integrity_check(1)").await?;
    if report != "ok" {
        return Err(StoreError::Corrupt { place: from.display().to_string(), detail: report });
    }
    database.migrate().await?;
    let of =
        database.text("SELECT CAST(coalesce(max(value), '') AS TEXT) FROM meshd_kv WHERE name = 'cluster'").await?;
    let of = serde_json::from_str::<serde_json::Value>(&of).unwrap_or_default();
    let of = of.get("id").and_then(|id| id.as_str()).unwrap_or("none");
    if let Some(cluster) = cluster.filter(|cluster| *cluster != of) {
        let problem = format!(
            "this is a backup of cluster {of}, and this server belongs to {cluster}; nothing was changed. To have it serve that \
             one instead, move the data-dir's `server` and `agent` folders away first"
        );
        return Err(StoreError::Unfit { place: from.display().to_string(), problem });
    }
    // the key of a line begins with its time
    let last = "SELECT coalesce(max(CAST(name AS TEXT)), '') FROM meshd_kv WHERE name LIKE 'audit/%'";
    let last = database.text(last).await?;
    let as_of = last.strip_prefix("audit/").and_then(|key| key.split('-').next()?.parse().ok());
    // Who compares with, or resumes from, what was there before the restore must notice it.
    database
        .script(format!(
            "UPDATE meshd_state SET revision = revision + {RESTORE_GAP}, compacted = revision + {RESTORE_GAP};
             UPDATE meshd_kv SET modified = (SELECT revision FROM meshd_state);
             DELETE FROM meshd_log;
             PRAGMA wal_checkpoint(TRUNCATE)"
        ))
        .await?;
    Ok(as_of)
}

/// How to open the file, which is made where there is none.
fn options(path: &Path) -> Result<SqliteConnectOptions, StoreError> {
    files::ensure_file(path).map_err(|e| files_failed(path, &e))?;
    Ok(SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(5)))
}

/// Locks the database for this process.
fn lock(path: &Path) -> Result<File, StoreError> {
    let place = path.display().to_string();
    let lock = path.with_extension("lock");
    files::ensure_file(&lock).map_err(|e| files_failed(path, &e))?;
    let unavailable = |e: std::io::Error| StoreError::Unavailable { place: place.clone(), detail: e.to_string() };
    let file = File::open(&lock).map_err(unavailable)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::InUse { place }),
        Err(std::fs::TryLockError::Error(error)) => Err(unavailable(error)),
    }
}

/// The database and the files that SQLite keeps beside it.
fn with_sidefiles(path: &Path) -> Vec<PathBuf> {
    ["", "-wal", "-shm"]
        .iter()
        .map(|end| {
            let mut name = path.as_os_str().to_owned();
            name.push(end);
            PathBuf::from(name)
        })
        .collect()
}

fn files_failed(path: &Path, error: &files::FileError) -> StoreError {
    if error.source.kind() == std::io::ErrorKind::StorageFull {
        return StoreError::Full { place: path.display().to_string() };
    }
    StoreError::Unavailable { place: error.path.display().to_string(), detail: error.to_string() }
}
