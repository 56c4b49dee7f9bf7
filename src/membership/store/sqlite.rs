//! The store of a single server: one SQLite database in WAL mode, synced at each commit.
//!
//! One connection does everything, so that writers queue and never meet. Every change is also in a log of the last
//! revisions, from which watches read. Knows nothing of what the keys mean.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Row, SqliteConnection};
use tokio::sync::{mpsc, watch};

use super::{Event, KeyValue, LeaseId, Op, Outcome, Revision, Snapshot, Store, StoreError, Txn, Watch};
use crate::membership::files;

/// The format of the database, by version: a database of version n has seen the first n.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
    INSERT INTO state VALUES (0, 0, 0);
    CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB NOT NULL, created INTEGER NOT NULL, modified INTEGER NOT NULL,
                     lease INTEGER) WITHOUT ROWID;
    CREATE TABLE log (revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB, created INTEGER NOT NULL, lease INTEGER,
                      PRIMARY KEY (revision, key)) WITHOUT ROWID;
    CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_ms INTEGER NOT NULL);
"];
/// So many revisions stay in the log, and up to twice as many before it is cut.
const KEEP: u64 = 10_000;
/// A restored database goes on this much later, so that no revision that somebody saw is given to something else.
const RESTORE_GAP: i64 = 1_000_000_000;
/// Events that a watch reads at once.
const WATCH_BATCH: i64 = 1000;

/// The store.
#[derive(Clone)]
pub struct Sqlite(Arc<Inner>);

struct Inner {
    pool: SqlitePool,
    path: PathBuf,
    revision: watch::Sender<Revision>,
    leases: Mutex<HashMap<u64, Lease>>,
    /// Locked as long as the store is open.
    _lock: File,
}

struct Lease {
    ttl: Duration,
    ends: Instant,
}

impl Sqlite {
    /// Opens the database, or makes it, readable for its owner alone. Checks it first.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let lock = lock(path)?;
        let pool = connect(path).await?;
        let name = path.display().to_string();
        let report: String =
            sqlx::query("PRAGMA quick_check(1)").fetch_one(&pool).await.map_err(|e| failed(path, &e))?.get(0);
        if report != "ok" {
            return Err(StoreError::Corrupt { place: name, detail: report });
        }
        migrate(&pool, path).await?;
        let revision: i64 =
            sqlx::query("SELECT revision FROM state").fetch_one(&pool).await.map_err(|e| failed(path, &e))?.get(0);
        let mut leases = HashMap::new();
        let kept = sqlx::query("SELECT id, ttl_ms FROM lease").fetch_all(&pool).await.map_err(|e| failed(path, &e))?;
        for row in kept {
            let ttl = Duration::from_millis(unsigned(row.get(1)));
            leases.insert(unsigned(row.get(0)), Lease { ttl, ends: Instant::now() + ttl });
        }
        let store = Sqlite(Arc::new(Inner {
            pool,
            path: path.to_owned(),
            revision: watch::Sender::new(unsigned(revision)),
            leases: Mutex::new(leases),
            _lock: lock,
        }));
        tokio::spawn(expire_leases(Arc::downgrade(&store.0)));
        Ok(store)
    }

    /// Writes a copy that is whole as of now to `to`, which must not exist.
    pub async fn backup(&self, to: &Path) -> Result<(), StoreError> {
        copy_into(&self.0.pool, to).await
    }

    /// Closes the database after what is under way.
    pub async fn close(&self) {
        self.0.pool.close().await;
    }

    /// Lets the database grow to so many pages and no further, as a full disk would.
    #[doc(hidden)]
    pub async fn limit_pages(&self, pages: u32) -> Result<(), StoreError> {
        let pragma = format!("PRAGMA max_page_count = {pages}");
        let done = sqlx::query(sqlx::AssertSqlSafe(pragma)).execute(&self.0.pool).await;
        done.map(drop).map_err(|e| failed(&self.0.path, &e))
    }

    async fn commit(&self, txn: Txn) -> Result<Outcome, StoreError> {
        let inner = &self.0;
        let fail = |e: sqlx::Error| failed(&inner.path, &e);
        let mut tx = inner.pool.begin_with("BEGIN IMMEDIATE").await.map_err(fail)?;
        for compare in &txn.compares {
            let modified = modified(&mut tx, &compare.key).await.map_err(fail)?;
            if modified != compare.modified {
                return Ok(Outcome::Conflict);
            }
        }
        let revision = revision(&mut tx).await.map_err(fail)? + 1;
        let mut changed = false;
        for op in &txn.ops {
            changed |= self.apply(&mut tx, op, revision).await?;
        }
        if !changed {
            return Ok(Outcome::Done(revision - 1));
        }
        advance(&mut tx, revision).await.map_err(fail)?;
        tx.commit().await.map_err(fail)?;
        inner.revision.send_replace(revision);
        Ok(Outcome::Done(revision))
    }

    async fn apply(&self, tx: &mut SqliteConnection, op: &Op, revision: Revision) -> Result<bool, StoreError> {
        let fail = |e: sqlx::Error| failed(&self.0.path, &e);
        match op {
            Op::Put { key, value, lease } => {
                if lease.is_some_and(|lease| !self.leases().contains_key(&lease.0)) {
                    return Err(StoreError::NoLease);
                }
                let lease = lease.map(|lease| signed(lease.0));
                let created: i64 = sqlx::query(
                    "INSERT INTO kv (key, value, created, modified, lease) VALUES (?1, ?2, ?3, ?3, ?4)
                     ON CONFLICT (key) DO UPDATE SET value = ?2, modified = ?3, lease = ?4 RETURNING created",
                )
                .bind(key)
                .bind(value)
                .bind(signed(revision))
                .bind(lease)
                .fetch_one(&mut *tx)
                .await
                .map_err(fail)?
                .get(0);
                sqlx::query("INSERT INTO log (revision, key, value, created, lease) VALUES (?, ?, ?, ?, ?)")
                    .bind(signed(revision))
                    .bind(key)
                    .bind(value)
                    .bind(created)
                    .bind(lease)
                    .execute(&mut *tx)
                    .await
                    .map_err(fail)?;
                Ok(true)
            }
            Op::Delete { key } => {
                let gone = sqlx::query("DELETE FROM kv WHERE key = ?").bind(key).execute(&mut *tx).await;
                if gone.map_err(fail)?.rows_affected() == 0 {
                    return Ok(false);
                }
                sqlx::query("INSERT INTO log (revision, key, created) VALUES (?, ?, 0)")
                    .bind(signed(revision))
                    .bind(key)
                    .execute(&mut *tx)
                    .await
                    .map_err(fail)?;
                Ok(true)
            }
        }
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        let fail = |e: sqlx::Error| failed(&self.0.path, &e);
        let mut tx = self.0.pool.begin().await.map_err(fail)?;
        let revision = revision(&mut tx).await.map_err(fail)?;
        let rows = sqlx::query(
            "SELECT key, value, created, modified, lease FROM kv WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1
             ORDER BY key",
        )
        .bind(prefix)
        .fetch_all(&mut *tx)
        .await
        .map_err(fail)?;
        let items = rows
            .iter()
            .map(|row| KeyValue {
                key: row.get(0),
                value: row.get(1),
                created: unsigned(row.get(2)),
                modified: unsigned(row.get(3)),
                lease: row.get::<Option<i64>, _>(4).map(|id| LeaseId(unsigned(id))),
            })
            .collect();
        Ok(Snapshot { revision, items })
    }

    /// Whole revisions after `after`, and up to which revision there is no other.
    async fn history(&self, prefix: &str, after: Revision) -> Result<(Vec<Event>, Revision), StoreError> {
        let fail = |e: sqlx::Error| failed(&self.0.path, &e);
        let mut tx = self.0.pool.begin().await.map_err(fail)?;
        let state = sqlx::query("SELECT revision, compacted FROM state").fetch_one(&mut *tx).await.map_err(fail)?;
        let (now, compacted) = (unsigned(state.get(0)), unsigned(state.get(1)));
        if after < compacted || after > now {
            return Err(StoreError::Compacted { compacted });
        }
        let upto = signed(now).min(signed(after).saturating_add(WATCH_BATCH));
        let rows = sqlx::query(
            "SELECT revision, key, value, created, lease FROM log
             WHERE revision > ?1 AND revision <= ?2 AND substr(key, 1, length(?3)) = ?3 ORDER BY revision, key",
        )
        .bind(signed(after))
        .bind(upto)
        .bind(prefix)
        .fetch_all(&mut *tx)
        .await
        .map_err(fail)?;
        let events = rows.iter().map(event).collect();
        Ok((events, unsigned(upto)))
    }

    fn leases(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Lease>> {
        self.0.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn end_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        let fail = |e: sqlx::Error| failed(&self.0.path, &e);
        let mut tx = self.0.pool.begin_with("BEGIN IMMEDIATE").await.map_err(fail)?;
        let keys = sqlx::query("SELECT key FROM kv WHERE lease = ?").bind(signed(lease.0)).fetch_all(&mut *tx).await;
        let keys: Vec<String> = keys.map_err(fail)?.iter().map(|row| row.get(0)).collect();
        sqlx::query("DELETE FROM lease WHERE id = ?").bind(signed(lease.0)).execute(&mut *tx).await.map_err(fail)?;
        let revision = revision(&mut tx).await.map_err(fail)? + 1;
        let changed = !keys.is_empty();
        for key in keys {
            self.apply(&mut tx, &Op::Delete { key }, revision).await?;
        }
        if changed {
            advance(&mut tx, revision).await.map_err(fail)?;
        }
        tx.commit().await.map_err(fail)?;
        self.leases().remove(&lease.0);
        if changed {
            self.0.revision.send_replace(revision);
        }
        Ok(())
    }
}

impl Store for Sqlite {
    fn range<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Snapshot, StoreError>> {
        Box::pin(self.list(prefix))
    }

    /// In a task of its own, so that a caller that goes away never stops a transaction half-way.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        let store = self.clone();
        Box::pin(joined(self, async move { store.commit(txn).await }))
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch, StoreError>> {
        Box::pin(async move {
            let (first, upto) = self.history(prefix, after).await?;
            let (events, watch) = mpsc::channel(16);
            tokio::spawn(follow(self.clone(), prefix.to_owned(), first, upto, events));
            Ok(watch)
        })
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        let store = self.clone();
        Box::pin(joined(self, async move {
            let ms = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
            let row = sqlx::query("INSERT INTO lease (ttl_ms) VALUES (?) RETURNING id").bind(ms);
            let row = row.fetch_one(&store.0.pool).await.map_err(|e| failed(&store.0.path, &e))?;
            let id = unsigned(row.get(0));
            store.leases().insert(id, Lease { ttl, ends: Instant::now() + ttl });
            Ok(LeaseId(id))
        }))
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        let kept = match self.leases().get_mut(&lease.0) {
            Some(kept) => {
                kept.ends = Instant::now() + kept.ttl;
                Ok(())
            }
            None => Err(StoreError::NoLease),
        };
        Box::pin(std::future::ready(kept))
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        let store = self.clone();
        Box::pin(joined(self, async move { store.end_lease(lease).await }))
    }
}

/// Checks the backup at `from`, and puts it in the place of the database at `path`, which nobody may have open.
pub async fn restore(from: &Path, path: &Path) -> Result<(), StoreError> {
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
    let pool = connect(&fresh).await.map_err(|e| at(from, e))?;
    let prepared = prepare_restored(&pool, from).await;
    pool.close().await;
    prepared?;
    // The old write-ahead log must not be replayed over the new database.
    for old in with_sidefiles(path).into_iter().skip(1).chain(with_sidefiles(&fresh).into_iter().skip(1)) {
        files::remove(&old).map_err(io)?;
    }
    files::rename(&fresh, path).map_err(|e| files_failed(path, &e))
}

/// A copy of the database at `path` that is whole as of now, to `to`; the server may run meanwhile.
pub async fn backup(path: &Path, to: &Path) -> Result<(), StoreError> {
    if !path.exists() {
        let detail = "there is no database here".to_owned();
        return Err(StoreError::Unavailable { place: path.display().to_string(), detail });
    }
    let pool = connect(path).await?;
    let copied = copy_into(&pool, to).await;
    pool.close().await;
    copied
}

async fn copy_into(pool: &SqlitePool, to: &Path) -> Result<(), StoreError> {
    // The copy holds the cluster's keys: the file is there, and its owner's alone, before SQLite fills it.
    files::create_new(to).map_err(|e| files_failed(to, &e))?;
    let target = to.to_string_lossy().into_owned();
    sqlx::query("VACUUM INTO ?").bind(target).execute(pool).await.map_err(|e| failed(to, &e))?;
    File::open(to)
        .and_then(|file| file.sync_all())
        .map_err(|e| StoreError::Unavailable { place: to.display().to_string(), detail: e.to_string() })
}

async fn prepare_restored(pool: &SqlitePool, from: &Path) -> Result<(), StoreError> {
    let fail = |e: sqlx::Error| failed(from, &e);
    let report: String = sqlx::query("PRAGMA integrity_check(1)").fetch_one(pool).await.map_err(fail)?.get(0);
    if report != "ok" {
        return Err(StoreError::Corrupt { place: from.display().to_string(), detail: report });
    }
    migrate(pool, from).await?;
    sqlx::query("UPDATE state SET revision = revision + ?1, compacted = revision + ?1")
        .bind(RESTORE_GAP)
        .execute(pool)
        .await
        .map_err(fail)?;
    // Who compares with, or resumes from, what was there before the restore must notice it.
    sqlx::query("UPDATE kv SET modified = (SELECT revision FROM state)").execute(pool).await.map_err(fail)?;
    sqlx::query("DELETE FROM log").execute(pool).await.map_err(fail)?;
    sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(pool).await.map(drop).map_err(fail)
}

async fn connect(path: &Path) -> Result<SqlitePool, StoreError> {
    files::ensure_file(path).map_err(|e| files_failed(path, &e))?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(5));
    let pool = SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
    pool.connect_with(options).await.map_err(|e| failed(path, &e))
}

async fn migrate(pool: &SqlitePool, path: &Path) -> Result<(), StoreError> {
    let fail = |e: sqlx::Error| failed(path, &e);
    let found: i64 = sqlx::query("PRAGMA user_version").fetch_one(pool).await.map_err(fail)?.get(0);
    let known = MIGRATIONS.len() as i64;
    if found > known || found < 0 {
        return Err(StoreError::Newer { place: path.display().to_string(), found, known });
    }
    for (version, script) in MIGRATIONS.iter().enumerate().skip(found as usize) {
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.map_err(fail)?;
        sqlx::raw_sql(*script).execute(&mut *tx).await.map_err(fail)?;
        let pragma = format!("PRAGMA user_version = {}", version + 1);
        sqlx::query(sqlx::AssertSqlSafe(pragma)).execute(&mut *tx).await.map_err(fail)?;
        tx.commit().await.map_err(fail)?;
    }
    Ok(())
}

async fn revision(tx: &mut SqliteConnection) -> Result<Revision, sqlx::Error> {
    Ok(unsigned(sqlx::query("SELECT revision FROM state").fetch_one(tx).await?.get(0)))
}

async fn modified(tx: &mut SqliteConnection, key: &str) -> Result<Revision, sqlx::Error> {
    let row = sqlx::query("SELECT modified FROM kv WHERE key = ?").bind(key).fetch_optional(tx).await?;
    Ok(row.map_or(0, |row| unsigned(row.get(0))))
}

/// Sets the revision, and cuts the log now and then.
async fn advance(tx: &mut SqliteConnection, revision: Revision) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE state SET revision = ?").bind(signed(revision)).execute(&mut *tx).await?;
    if revision.is_multiple_of(KEEP) && revision > KEEP {
        let upto = signed(revision - KEEP);
        sqlx::query("DELETE FROM log WHERE revision <= ?").bind(upto).execute(&mut *tx).await?;
        sqlx::query("UPDATE state SET compacted = max(compacted, ?)").bind(upto).execute(&mut *tx).await?;
    }
    Ok(())
}

fn event(row: &sqlx::sqlite::SqliteRow) -> Event {
    let (revision, key) = (unsigned(row.get(0)), row.get(1));
    match row.get::<Option<Vec<u8>>, _>(2) {
        Some(value) => Event::Put(KeyValue {
            key,
            value,
            created: unsigned(row.get(3)),
            modified: revision,
            lease: row.get::<Option<i64>, _>(4).map(|id| LeaseId(unsigned(id))),
        }),
        None => Event::Delete { key, revision },
    }
}

async fn follow(
    store: Sqlite,
    prefix: String,
    first: Vec<Event>,
    mut upto: Revision,
    to: mpsc::Sender<Result<Vec<Event>, StoreError>>,
) {
    let mut newest = store.0.revision.subscribe();
    let mut events = first;
    loop {
        if !events.is_empty() && to.send(Ok(events)).await.is_err() {
            return;
        }
        if *newest.borrow_and_update() <= upto {
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = to.closed() => return,
            }
        }
        match store.history(&prefix, upto).await {
            Ok((next, seen)) => (events, upto) = (next, seen),
            Err(error) => {
                let _ = to.send(Err(error)).await;
                return;
            }
        }
    }
}

async fn expire_leases(store: std::sync::Weak<Inner>) {
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let Some(store) = store.upgrade().map(Sqlite) else { return };
        let now = Instant::now();
        let over: Vec<u64> = store.leases().iter().filter(|(_, l)| l.ends <= now).map(|(id, _)| *id).collect();
        for id in over {
            if let Err(error) = store.end_lease(LeaseId(id)).await {
                tracing::warn!("a lease cannot end yet: {error}");
            }
        }
    }
}

async fn joined<T: Send + 'static>(
    store: &Sqlite,
    work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::spawn(work).await.unwrap_or_else(|e| {
        Err(StoreError::Unavailable { place: store.0.path.display().to_string(), detail: e.to_string() })
    })
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

/// SQLite's result codes (the low byte of the extended ones): 11 CORRUPT, 13 FULL, 26 NOTADB.
fn failed(path: &Path, error: &sqlx::Error) -> StoreError {
    let place = path.display().to_string();
    let code = error.as_database_error().and_then(|e| e.code()).and_then(|code| code.parse::<u32>().ok());
    match code.map(|code| code & 0xff) {
        Some(13) => StoreError::Full { place },
        Some(11 | 26) => StoreError::Corrupt { place, detail: error.to_string() },
        _ => StoreError::Unavailable { place, detail: error.to_string() },
    }
}

fn files_failed(path: &Path, error: &files::FileError) -> StoreError {
    if error.source.kind() == std::io::ErrorKind::StorageFull {
        return StoreError::Full { place: path.display().to_string() };
    }
    StoreError::Unavailable { place: error.path.display().to_string(), detail: error.to_string() }
}

/// The same error, about another file.
fn at(path: &Path, error: StoreError) -> StoreError {
    match error {
        StoreError::Corrupt { detail, .. } => StoreError::Corrupt { place: path.display().to_string(), detail },
        other => other,
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
