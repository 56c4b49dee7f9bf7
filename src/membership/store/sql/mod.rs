//! The store in SQL: what SQLite, MySQL and PostgreSQL have in common, which is nearly everything.
//!
//! A transaction begins by locking the one row that holds the revision, so that writers, of all servers, queue: revisions
//! have no gaps, and appear in order. Reads are one statement each, and thus of one moment. Every change is also in a log
//! of the last revisions, from which watches read; with it stands a tag that its writer drew, by which a writer whose
//! connection broke finds out whether its transaction was stored. Leases end by the database's clock. A server keeps three
//! connections, and with PostgreSQL a fourth that listens. Knows nothing of what the keys mean.

mod connection;
mod errors;
pub mod remote;
mod schema;
mod write;

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use sqlx::sqlite::SqliteConnectOptions;
use tokio::sync::{Mutex, MutexGuard, Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::connection::{Connection, Options, Row, Value};
use self::errors::Whose;
use self::write::{Failure, Work, attempt};
use super::{Event, KeyValue, LeaseId, Op, Outcome, Revision, Snapshot, Store, StoreError, Txn, Watch};
use crate::membership::random;

/// Revisions that a watch reads at once.
const WATCH_BATCH: u64 = 1000;
/// A statement or transaction that takes this long is given up, and its connection with it.
const LIMIT: Duration = Duration::from_secs(8);
const CONNECT: Duration = Duration::from_secs(5);
/// A write whose connection breaks is tried again for so long, and at least so often (this process may have stood still
/// meanwhile): a restart of the database is ridden out.
const PATIENCE: Duration = Duration::from_secs(10);
const TRIES: u64 = 3;
/// Which connection is for what; where there is but one, it does everything.
const WRITER: usize = 0;
const READER: usize = 1;
const TIMER: usize = 2;

const RANGE: &str = "SELECT s.revision, k.name, k.value, k.created, k.modified, k.lease FROM meshd_state s
    LEFT JOIN meshd_kv k ON k.name >= ? AND k.name < {beyond} WHERE s.id = 0 ORDER BY k.name";
const HISTORY: &str =
    "SELECT s.revision, s.compacted, l.revision, l.name, l.value, l.created, l.lease FROM meshd_state s
    LEFT JOIN meshd_log l ON l.revision > ? AND l.revision <= ? AND l.name >= ? AND l.name < {beyond}
    WHERE s.id = 0 ORDER BY l.revision, l.name";
const TICK: &str =
    "SELECT s.revision, (SELECT MIN(l.ends) FROM meshd_lease l), {now} FROM meshd_state s WHERE s.id = 0";

/// The store.
#[derive(Clone)]
pub struct Sql(Arc<Inner>);

struct Inner {
    whose: Whose,
    place: String,
    options: Options,
    slots: Vec<Mutex<Option<Connection>>>,
    closed: AtomicBool,
    revision: watch::Sender<Revision>,
    /// Something may be new.
    wake: Notify,
    /// What runs beside, and ends with the store.
    beside: StdMutex<JoinSet<()>>,
}

impl Sql {
    /// The tables are there, and the first connection is good.
    async fn start(whose: Whose, options: Options, first: Connection, every: Duration) -> Result<Self, StoreError> {
        let place = match &whose {
            Whose::File(path) => path.clone(),
            Whose::Server(endpoint) => endpoint.to_string(),
        };
        let connections = if matches!(options, Options::Sqlite(..)) { 1 } else { 3 };
        let mut slots: Vec<Mutex<Option<Connection>>> = (0..connections).map(|_| Mutex::default()).collect();
        slots[WRITER] = Mutex::new(Some(first));
        let store = Sql(Arc::new(Inner {
            whose,
            place,
            options,
            slots,
            closed: AtomicBool::new(false),
            revision: watch::Sender::new(0),
            wake: Notify::new(),
            beside: StdMutex::default(),
        }));
        let now = store.list("meshd/nothing").await?.revision;
        store.0.revision.send_replace(now);
        store.beside(keep_time(Arc::downgrade(&store.0), every));
        Ok(store)
    }

    /// Opens a file. Migrates it first; its leases begin anew, since no clock of the file's went on meanwhile.
    pub(super) async fn open_file(place: String, options: SqliteConnectOptions) -> Result<Self, StoreError> {
        let (whose, options) = (Whose::File(place.clone()), Options::Sqlite(Box::new(options), Instant::now()));
        let fail = |e: sqlx::Error| errors::told(&whose, &e);
        let mut first = options.connect().await.map_err(fail)?;
        let report = first.rows("PRAGMA quick_check(1)", &[]).await.map_err(fail)?;
        let report = schema::first(&report).and_then(|row| row.text(0)).map_err(fail)?;
        if report != "ok" {
            return Err(StoreError::Corrupt { place, detail: report });
        }
        schema::migrate(&mut first, &whose, &place).await?;
        first.run("UPDATE meshd_lease SET ends = {now} + ttl_ms", &[]).await.map_err(fail)?;
        Self::start(whose, options, first, Duration::from_millis(200)).await
    }

    /// Runs a statement that is the engine's own.
    pub(super) async fn script(&self, text: String) -> Result<(), StoreError> {
        let mut held = self.hold(WRITER).await?;
        let done = held.connection()?.script(text).await.map_err(|e| self.told(&e));
        held.give_back();
        done
    }

    /// Closes it after what is under way. Nothing can be asked afterwards.
    pub async fn close(&self) {
        self.0.closed.store(true, Ordering::Relaxed);
        self.0.beside.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
        for slot in &self.0.slots {
            if let Some(connection) = slot.lock().await.take() {
                connection.close().await;
            }
        }
    }

    /// Drops what the log holds up to a revision, which happens by itself only much later.
    #[doc(hidden)]
    pub async fn compact(&self, upto: Revision) -> Result<(), StoreError> {
        self.write(Work::Compact(upto)).await.map(drop)
    }

    fn beside(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.0.beside.lock().unwrap_or_else(PoisonError::into_inner).spawn(work);
    }

    fn told(&self, error: &sqlx::Error) -> StoreError {
        errors::told(&self.0.whose, error)
    }

    fn unavailable(&self, detail: impl Into<String>) -> StoreError {
        StoreError::Unavailable { place: self.0.place.clone(), detail: detail.into() }
    }

    fn slow(&self) -> StoreError {
        self.unavailable(format!("no answer in {} seconds", LIMIT.as_secs()))
    }

    /// A connection for this purpose alone, made where there is none.
    async fn hold(&self, purpose: usize) -> Result<Held<'_>, StoreError> {
        let mut slot = self.0.slots[purpose.min(self.0.slots.len() - 1)].lock().await;
        if self.0.closed.load(Ordering::Relaxed) {
            return Err(self.unavailable("the store is closed"));
        }
        let connection = match slot.take() {
            Some(connection) => connection,
            None => match timeout(CONNECT, self.0.options.connect()).await {
                Ok(connected) => connected.map_err(|e| self.told(&e))?,
                Err(_) => return Err(self.unavailable("cannot be reached: no answer in 5 seconds")),
            },
        };
        Ok(Held { slot, connection: Some(connection) })
    }

    /// Asks once, and once more over a new connection where the old one was gone: asking changes nothing.
    async fn ask(&self, purpose: usize, text: &str, values: &[Value<'_>]) -> Result<Vec<Row>, StoreError> {
        let mut last = None;
        for _ in 0..2 {
            let mut held = self.hold(purpose).await?;
            match timeout(LIMIT, held.connection()?.rows(text, values)).await {
                Ok(Ok(rows)) => {
                    held.give_back();
                    return Ok(rows);
                }
                Ok(Err(error)) if errors::is_lost(&error) || errors::is_conflict(&error) => {
                    last = Some(self.told(&error));
                }
                Ok(Err(error)) => return Err(self.told(&error)),
                Err(_) => last = Some(self.slow()),
            }
        }
        Err(last.unwrap_or_else(|| self.unavailable("no answer")))
    }

    /// Does a transaction until it is known what became of it: again where it met another, and where its connection broke
    /// only after a look at whether it was stored.
    async fn write(&self, work: Work) -> Result<Outcome, StoreError> {
        let begun = Instant::now();
        let tag = i64::from_le_bytes(random::bytes()) | 1;
        let mut perhaps = None;
        let mut tries = 0u64;
        loop {
            let failed = match self.try_write(&work, tag, &mut perhaps).await {
                Ok(outcome) => {
                    if let Outcome::Done(revision) = outcome {
                        self.0.revision.send_if_modified(|known| {
                            let newer = revision > *known;
                            *known = revision.max(*known);
                            newer
                        });
                    }
                    return Ok(outcome);
                }
                Err(failed) => failed,
            };
            tries += 1;
            let again = match &failed {
                Failure::Sql(error) => errors::is_conflict(error) || errors::is_lost(error),
                // cannot be reached at this moment
                Failure::Store(error) => tries > 1 && matches!(error, StoreError::Unavailable { .. }),
                Failure::Slow => true,
            };
            let enough = tries >= TRIES && begun.elapsed() > PATIENCE;
            if !again || enough || self.0.closed.load(Ordering::Relaxed) {
                return Err(match failed {
                    Failure::Sql(error) => self.told(&error),
                    Failure::Store(error) => error,
                    Failure::Slow => self.slow(),
                });
            }
            tokio::time::sleep(Duration::from_millis(5 + random::below(20 << tries.min(5)))).await;
        }
    }

    async fn try_write(&self, work: &Work, tag: i64, perhaps: &mut Option<Revision>) -> Result<Outcome, Failure> {
        let mut held = self.hold(WRITER).await.map_err(Failure::Store)?;
        let connection = held.connection().map_err(Failure::Store)?;
        let tried = timeout(LIMIT, attempt(connection, work, tag, perhaps)).await;
        let tried = tried.unwrap_or(Err(Failure::Slow));
        let whole = match &tried {
            Ok(_) => true,
            Err(Failure::Sql(error)) if error.as_database_error().is_none() => false,
            Err(Failure::Slow | Failure::Store(StoreError::Unavailable { .. })) => false,
            Err(_) => connection.rollback().await,
        };
        if whole {
            held.give_back();
        }
        tried
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        let beyond = beyond(prefix);
        let rows = self.ask(READER, RANGE, &[Value::Key(prefix), Value::Bytes(&beyond)]).await?;
        snapshot(&rows).map_err(|e| self.told(&e))
    }

    /// Whole revisions after `after`, and up to which revision there is no other.
    async fn history(&self, prefix: &str, after: Revision) -> Result<(Vec<Event>, Revision), StoreError> {
        let (beyond, most) = (beyond(prefix), after.saturating_add(WATCH_BATCH));
        let between = [Value::Number(signed(after)), Value::Number(signed(most))];
        let values = [between[0], between[1], Value::Key(prefix), Value::Bytes(&beyond)];
        let rows = self.ask(READER, HISTORY, &values).await?;
        let read = || {
            let state = schema::first(&rows)?;
            let (now, compacted) = (unsigned(state.number(0)?), unsigned(state.number(1)?));
            let events = rows.iter().filter_map(|row| event(row).transpose()).collect::<Result<Vec<_>, _>>()?;
            Ok((now, compacted, events))
        };
        let (now, compacted, events) = read().map_err(|e| self.told(&e))?;
        if after < compacted || after > now {
            return Err(StoreError::Compacted { compacted });
        }
        Ok((events, now.min(most)))
    }

    /// A change of one row of the leases, which may be done twice; how many there were.
    async fn change_lease(&self, text: &str, values: &[Value<'_>]) -> Result<u64, StoreError> {
        let mut last = None;
        for _ in 0..3 {
            let mut held = self.hold(WRITER).await?;
            match timeout(LIMIT, held.connection()?.run(text, values)).await {
                Ok(Ok(changed)) => {
                    held.give_back();
                    return Ok(changed);
                }
                Ok(Err(error)) if errors::is_duplicate(&error) => {
                    held.give_back();
                    return Ok(1);
                }
                Ok(Err(error)) if errors::is_lost(&error) || errors::is_conflict(&error) => {
                    last = Some(self.told(&error));
                }
                Ok(Err(error)) => return Err(self.told(&error)),
                Err(_) => last = Some(self.slow()),
            }
        }
        Err(last.unwrap_or_else(|| self.unavailable("no answer")))
    }

    /// In a task of its own, so that a caller that goes away never stops a transaction half-way.
    async fn apart<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        tokio::spawn(work).await.unwrap_or_else(|e| Err(self.unavailable(e.to_string())))
    }
}

impl Store for Sql {
    fn range<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Snapshot, StoreError>> {
        Box::pin(self.list(prefix))
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        let store = self.clone();
        Box::pin(self.apart(async move {
            let long = |op: &&Op| matches!(op, Op::Put { key, .. } if key.len() > schema::MAX_KEY);
            if let Some(Op::Put { key, .. }) = txn.ops.iter().find(long) {
                let problem = format!("a key of {} bytes; at most {} fit", key.len(), schema::MAX_KEY);
                return Err(StoreError::Unfit { place: store.0.place.clone(), problem });
            }
            store.write(Work::Txn(txn)).await
        }))
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch, StoreError>> {
        Box::pin(async move {
            let (first, upto) = self.history(prefix, after).await?;
            let (events, watch) = mpsc::channel(16);
            let newest = self.0.revision.subscribe();
            tokio::spawn(follow(Arc::downgrade(&self.0), newest, prefix.to_owned(), first, upto, events));
            Ok(watch)
        })
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        let store = self.clone();
        Box::pin(self.apart(async move {
            let id = i64::from_le_bytes(random::bytes()) & i64::MAX;
            let ttl = Value::Number(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX / 2));
            let text = "INSERT INTO meshd_lease (id, ttl_ms, ends) VALUES (?, ?, {now} + ?)";
            store.change_lease(text, &[Value::Number(id), ttl, ttl]).await?;
            Ok(LeaseId(unsigned(id)))
        }))
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        let store = self.clone();
        Box::pin(self.apart(async move {
            let text = "UPDATE meshd_lease SET ends = {now} + ttl_ms WHERE id = ? AND ends > {now}";
            match store.change_lease(text, &[Value::Number(signed(lease.0))]).await? {
                0 => Err(StoreError::NoLease),
                _ => Ok(()),
            }
        }))
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        let store = self.clone();
        Box::pin(self.apart(async move { store.write(Work::End { lease, over: false }).await.map(drop) }))
    }
}

/// A connection to a file, for what is done to it as a whole.
pub(super) struct OneFile {
    connection: Connection,
    whose: Whose,
    place: String,
}

impl OneFile {
    pub(super) async fn open(place: String, options: SqliteConnectOptions) -> Result<Self, StoreError> {
        let whose = Whose::File(place.clone());
        let connected = Options::Sqlite(Box::new(options), Instant::now()).connect().await;
        Ok(OneFile { connection: connected.map_err(|e| errors::told(&whose, &e))?, whose, place })
    }

    pub(super) async fn migrate(&mut self) -> Result<(), StoreError> {
        schema::migrate(&mut self.connection, &self.whose, &self.place).await
    }

    pub(super) async fn run(&mut self, text: &str, value: &str) -> Result<(), StoreError> {
        let done = self.connection.run(text, &[Value::Key(value)]).await;
        done.map(drop).map_err(|e| errors::told(&self.whose, &e))
    }

    pub(super) async fn script(&mut self, text: String) -> Result<(), StoreError> {
        self.connection.script(text).await.map_err(|e| errors::told(&self.whose, &e))
    }

    pub(super) async fn text(&mut self, text: &str) -> Result<String, StoreError> {
        let rows = self.connection.rows(text, &[]).await;
        let text = rows.and_then(|rows| schema::first(&rows)?.text(0));
        text.map_err(|e| errors::told(&self.whose, &e))
    }

    pub(super) async fn close(self) {
        self.connection.close().await;
    }
}

/// A connection that is somebody's for the moment. One that is not given back is cut: nobody knows its state.
struct Held<'a> {
    slot: MutexGuard<'a, Option<Connection>>,
    connection: Option<Connection>,
}

impl Held<'_> {
    fn connection(&mut self) -> Result<&mut Connection, StoreError> {
        let gone = || StoreError::Unavailable { place: String::new(), detail: "the connection is gone".to_owned() };
        self.connection.as_mut().ok_or_else(gone)
    }

    fn give_back(mut self) {
        *self.slot = self.connection.take();
    }
}

fn snapshot(rows: &[Row]) -> Result<Snapshot, sqlx::Error> {
    let revision = unsigned(schema::first(rows)?.number(0)?);
    let mut items = Vec::with_capacity(rows.len());
    for row in rows {
        if let Some(key) = row.key(1)? {
            items.push(KeyValue {
                key,
                value: row.bytes(2)?.unwrap_or_default(),
                created: unsigned(row.number(3)?),
                modified: unsigned(row.number(4)?),
                lease: row.maybe(5)?.map(|id| LeaseId(unsigned(id))),
            });
        }
    }
    Ok(Snapshot { revision, items })
}

fn event(row: &Row) -> Result<Option<Event>, sqlx::Error> {
    let (Some(revision), Some(key)) = (row.maybe(2)?, row.key(3)?) else { return Ok(None) };
    let revision = unsigned(revision);
    Ok(Some(match row.bytes(4)? {
        Some(value) => Event::Put(KeyValue {
            key,
            value,
            created: unsigned(row.number(5)?),
            modified: revision,
            lease: row.maybe(6)?.map(|id| LeaseId(unsigned(id))),
        }),
        None => Event::Delete { key, revision },
    }))
}

/// Brings a watch what it waits for. While the database is away, it waits for that, too.
async fn follow(
    store: Weak<Inner>,
    mut newest: watch::Receiver<Revision>,
    prefix: String,
    first: Vec<Event>,
    mut upto: Revision,
    to: mpsc::Sender<Result<Vec<Event>, StoreError>>,
) {
    let mut events = first;
    loop {
        if !events.is_empty() && to.send(Ok(events)).await.is_err() {
            return;
        }
        // What is lower than this watch has seen is a change, too: another database, or an older one. The history says so.
        if *newest.borrow() <= upto {
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = to.closed() => return,
            }
        }
        events = Vec::new();
        let Some(store) = store.upgrade().map(Sql) else { return };
        match store.history(&prefix, upto).await {
            Ok((next, seen)) => (events, upto) = (next, seen),
            Err(StoreError::Unavailable { .. }) if !store.0.closed.load(Ordering::Relaxed) => {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(500)) => {}
                    () = to.closed() => return,
                }
            }
            Err(error) => {
                let _ = to.send(Err(error)).await;
                return;
            }
        }
    }
}

/// Looks for what other servers wrote, and ends leases that are over.
async fn keep_time(store: Weak<Inner>, every: Duration) {
    let mut away = false;
    loop {
        let Some(inner) = store.upgrade().map(Sql) else { return };
        let _ = timeout(every, inner.0.wake.notified()).await;
        match inner.tick().await {
            Ok(()) if away => {
                tracing::info!("{} answers again", inner.0.place);
                away = false;
            }
            Ok(()) => {}
            Err(error) if !away => {
                tracing::warn!("{error}");
                away = true;
            }
            Err(_) => {}
        }
    }
}

impl Sql {
    async fn tick(&self) -> Result<(), StoreError> {
        let rows = self.ask(TIMER, TICK, &[]).await?;
        let read = || {
            let row = schema::first(&rows)?;
            Ok((unsigned(row.number(0)?), row.maybe(1)?, row.number(2)?))
        };
        let (revision, ends, now) = read().map_err(|e| self.told(&e))?;
        // Also where it is lower, which whoever watches has to hear; but a write of ours that came meanwhile is no news.
        let known = *self.0.revision.borrow();
        if revision > known || revision + 1 < known {
            self.0.revision.send_replace(revision);
        }
        if ends.is_some_and(|ends| ends <= now) {
            for row in self.ask(TIMER, "SELECT id FROM meshd_lease WHERE ends <= {now}", &[]).await? {
                let lease = LeaseId(unsigned(row.number(0).map_err(|e| self.told(&e))?));
                self.write(Work::End { lease, over: true }).await?;
            }
        }
        Ok(())
    }
}

/// Behind every key with this prefix: keys are UTF-8, which has no such byte.
fn beyond(prefix: &str) -> Vec<u8> {
    [prefix.as_bytes(), &[0xff]].concat()
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
