//! The store of many servers: etcd 3.4 or later, over its JSON gateway.
//!
//! Keys lie below a prefix, so that an etcd may be shared; then its revision, which is the store's, grows by more than one
//! between two changes of ours. A cluster that came from another store has a `base`, which is added to etcd's revision, so
//! that revisions go on growing. Knows nothing of what the keys mean, nor of who runs the etcd.
//!
//! A transaction whose outcome is unknown is sent again, and never done twice: each writes a marker that is this
//! process's alone, and holds only while the marker is as this process last saw it. Where it is not, the marker's value
//! tells whether it was this very transaction that wrote it.

mod endpoint;
mod gateway;
mod rows;
mod trouble;

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc};

pub use self::endpoint::{check, look, open};
pub(in crate::membership) use self::gateway::CallError;
use self::gateway::{ANSWER, FIRST_ANSWER, OUT_OF_RANGE, PATIENCE, Stream};
pub use self::gateway::{Access, Gateway};
pub(in crate::membership) use self::rows::Number;
use self::rows::{Granted, Kept, Range, Status, Txned, Watched, key};
use super::{Event, KeyValue, LeaseId, Op, Outcome, Revision, Snapshot, Store, StoreError, Txn, Watch};
use crate::membership::random;

/// Where the keys lie, unless an endpoint says otherwise.
pub const PREFIX: &str = "meshd/";
/// The marker of a process that is gone vanishes after so long.
const MARKER_LIFE: Duration = Duration::from_secs(3600);
/// It is kept alive when a transaction comes and the last time was so long ago.
const MARKER_KEEP: Duration = Duration::from_secs(600);
/// The format of what is kept.
const FORMAT: u64 = 1;
/// Steps of one transaction of an import.
const IMPORT_STEPS: usize = 100;
/// And bytes, of etcd's limit of 1.5 MiB.
const IMPORT_BYTES: usize = 1 << 20;

/// The store.
#[derive(Clone)]
pub struct Etcd(Arc<Inner>);

struct Inner {
    gateway: Gateway,
    prefix: String,
    base: Revision,
    marker: Mutex<Marker>,
}

/// What is wrong with the first releases of 3.5: <https://github.com/etcd-io/etcd/issues/13766>.
const LOSES: &str =
    "etcd 3.5.0 to 3.5.2 may come to differ from the other members when it is killed; use 3.4, or 3.5.3 or later";

fn loses(version: &str) -> bool {
    ["3.5.0", "3.5.1", "3.5.2"].iter().any(|bad| version == *bad || version.starts_with(&format!("{bad}-")))
}

/// What tells that a transaction was done.
#[derive(Default)]
struct Marker {
    key: String,
    /// Its revision in etcd when last seen; 0: it is not there.
    modified: u64,
    count: u64,
    lease: Option<(LeaseId, Instant)>,
}

impl Etcd {
    /// Looks at the etcd, which must be there and let us in.
    pub async fn open(gateway: Gateway, prefix: &str) -> Result<Self, StoreError> {
        let told = |error| trouble::told(&gateway, prefix, error);
        let status: Status = gateway.ask("/v3/maintenance/status", &json!({})).await.map_err(told)?;
        let mut parts = status.version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        if (parts.next(), parts.next().unwrap_or(0)) < (Some(3), 4) {
            let problem = format!("it is version {}; use 3.4 or later", status.version);
            return Err(StoreError::Unfit { place: gateway.place(), problem });
        }
        if loses(&status.version) {
            tracing::warn!("{}: {LOSES} (it is {})", gateway.place(), status.version);
        }
        // A later release may keep something else there, and then says so in `format`, which this one does without.
        let format = number(&gateway, prefix, "format").await?.unwrap_or(FORMAT);
        if format > FORMAT {
            let (found, known) = (format.cast_signed(), FORMAT.cast_signed());
            return Err(StoreError::Newer { place: gateway.place(), found, known });
        }
        let base = number(&gateway, prefix, "base").await?.unwrap_or(0);
        let marker = Marker { key: key(prefix, &format!("m/{}", random::id())), ..Marker::default() };
        let inner = Inner { gateway, prefix: prefix.to_owned(), base, marker: Mutex::new(marker) };
        Ok(Etcd(Arc::new(inner)))
    }

    /// Whether all keys may be read and written. Nothing is: etcd looks at the rights for each branch of a transaction,
    /// whichever it takes.
    pub async fn may_write(&self) -> Result<(), StoreError> {
        let prefix = &self.0.prefix;
        let never = json!({ "key": self.key("check"), "target": "CREATE", "result": "LESS", "create_revision": "0" });
        let put = |name: &str| json!({ "request_put": { "key": key(prefix, name), "value": "" } });
        let read = json!({ "request_range": range_of(prefix, "") });
        let ask = json!({ "compare": [never], "success": [put("k/check"), put("m/check"), put("base"), read] });
        self.gateway().ask::<Value>("/v3/kv/txn", &ask).await.map(drop).map_err(|error| self.told(error))
    }

    /// Whether there is anything already.
    async fn is_empty(&self) -> Result<bool, StoreError> {
        let mut ask = range_of(&self.0.prefix, "");
        ask["limit"] = "1".into();
        ask["keys_only"] = true.into();
        let found: Range = self.gateway().ask("/v3/kv/range", &ask).await.map_err(|error| self.told(error))?;
        Ok(found.kvs.is_empty())
    }

    /// Fills an etcd that has nothing below `prefix` with what another store had. Until this has succeeded it is not to be
    /// opened. Whoever saw a revision of the other store finds that the history up to it is gone.
    pub async fn import(gateway: &Gateway, prefix: &str, from: &Snapshot) -> Result<(), StoreError> {
        let told = |error| gateway.told(error);
        let ask = range_of(prefix, "");
        let there: Range = gateway.ask("/v3/kv/range", &ask).await.map_err(told)?;
        if !there.kvs.is_empty() {
            let problem = format!("there are keys below `{prefix}` already");
            return Err(StoreError::Unfit { place: gateway.place(), problem });
        }
        let put = |name: &str, value: &[u8]| json!({ "request_put": { "key": key(prefix, name), "value": STANDARD.encode(value) } });
        let base = from.revision.saturating_add(1).to_string();
        let mut steps = vec![put("base", base.as_bytes())];
        let mut bytes = 0;
        // What a lease held is not taken along: who held it is not there any more.
        for item in from.items.iter().filter(|item| item.lease.is_none()) {
            if steps.len() >= IMPORT_STEPS || bytes + item.value.len() > IMPORT_BYTES {
                let _: Value = gateway.ask("/v3/kv/txn", &json!({ "success": steps })).await.map_err(told)?;
                (steps, bytes) = (vec![], 0);
            }
            bytes += item.key.len() + item.value.len();
            steps.push(put(&format!("k/{}", item.key), &item.value));
        }
        gateway.ask::<Value>("/v3/kv/txn", &json!({ "success": steps })).await.map(drop).map_err(told)
    }

    /// The connection, for who looks after the etcd itself.
    pub fn gateway(&self) -> &Gateway {
        &self.0.gateway
    }

    /// etcd's revision as the store's.
    fn outer(&self, revision: Number) -> Revision {
        revision.0.saturating_add(self.0.base)
    }

    /// And back; `None` where it is from before this etcd.
    fn inner(&self, revision: Revision) -> Option<u64> {
        if revision == 0 { Some(0) } else { revision.checked_sub(self.0.base).filter(|inner| *inner > 0) }
    }

    fn key(&self, name: &str) -> String {
        key(&self.0.prefix, &format!("k/{name}"))
    }

    fn key_value(&self, kept: Kept) -> KeyValue {
        KeyValue {
            key: self.name(&kept.key.0),
            value: kept.value.0,
            created: self.outer(kept.create_revision),
            modified: self.outer(kept.mod_revision),
            lease: Some(kept.lease.0).filter(|id| *id != 0).map(LeaseId),
        }
    }

    /// A key without where it lies.
    fn name(&self, key: &[u8]) -> String {
        let start = (self.0.prefix.len() + "k/".len()).min(key.len());
        String::from_utf8_lossy(&key[start..]).into_owned()
    }

    async fn list(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        let ask = range_of(&self.0.prefix, prefix);
        let found: Range = self.0.gateway.ask("/v3/kv/range", &ask).await.map_err(|e| self.told(e))?;
        let revision = self.outer(found.header.revision);
        Ok(Snapshot { revision, items: found.kvs.into_iter().map(|kept| self.key_value(kept)).collect() })
    }

    async fn commit(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        let mut compares = Vec::with_capacity(txn.compares.len() + 2);
        for compare in &txn.compares {
            let Some(modified) = self.inner(compare.modified) else { return Ok(Outcome::Conflict) };
            compares.push(compare_mod(&self.key(&compare.key), modified));
        }
        let steps: Vec<Value> = txn.ops.iter().map(|op| self.step(op)).collect();
        if txn.ops.iter().any(|op| matches!(op, Op::Put { .. })) {
            let leased = txn.ops.iter().any(|op| matches!(op, Op::Put { lease: Some(_), .. }));
            return Ok(self.marked(&compares, &steps, leased).await?.unwrap_or(Outcome::Conflict));
        }
        // Where nothing is there to be removed nothing changes, so not the marker either.
        loop {
            let look = txn.ops.iter().map(|op| match op {
                Op::Put { key, .. } | Op::Delete { key } => {
                    json!({ "request_range": { "key": self.key(key), "keys_only": true } })
                }
            });
            let ask = json!({ "compare": compares, "success": look.collect::<Vec<_>>() });
            let seen: Txned = self.0.gateway.ask("/v3/kv/txn", &ask).await.map_err(|e| self.told(e))?;
            if !seen.succeeded {
                return Ok(Outcome::Conflict);
            }
            let there = seen.responses.into_iter().find_map(|r| r.response_range.kvs.into_iter().next());
            let Some(there) = there else { return Ok(Outcome::Done(self.outer(seen.header.revision))) };
            let mut compares = compares.clone();
            compares.push(compare_mod(&STANDARD.encode(&there.key.0), there.mod_revision.0));
            // A conflict may be about the key that was there: look again.
            if let Some(done) = self.marked(&compares, &steps, false).await? {
                return Ok(done);
            }
        }
    }

    /// Does it once, however often it has to be asked for. `None`: a comparison failed.
    async fn marked(&self, compares: &[Value], steps: &[Value], leased: bool) -> Result<Option<Outcome>, StoreError> {
        let start = Instant::now();
        // One after the other: the marker tells of the last one alone.
        let mut marker = self.0.marker.lock().await;
        marker.count += 1;
        let value = marker.count.to_string().into_bytes();
        let (mut renewed, mut patience) = (false, FIRST_ANSWER);
        loop {
            let lease = self.marker_lease(&mut marker).await?;
            let mut compares = compares.to_vec();
            compares.push(compare_mod(&marker.key, marker.modified));
            let mut steps = steps.to_vec();
            let own = json!({ "key": marker.key, "value": STANDARD.encode(&value), "lease": lease.0.to_string() });
            steps.push(json!({ "request_put": own }));
            let look = json!([{ "request_range": { "key": marker.key } }]);
            let ask = json!({ "compare": compares, "success": steps, "failure": look });
            match self.0.gateway.once::<Txned>("/v3/kv/txn", &ask, patience).await {
                Ok(done) if done.succeeded => {
                    marker.modified = done.header.revision.0;
                    return Ok(Some(Outcome::Done(self.outer(done.header.revision))));
                }
                Ok(failed) => {
                    let own = failed.responses.into_iter().find_map(|r| r.response_range.kvs.into_iter().next());
                    let modified = own.as_ref().map_or(0, |own| own.mod_revision.0);
                    let moved = std::mem::replace(&mut marker.modified, modified) != modified;
                    match own {
                        Some(own) if own.value.0 == value => {
                            return Ok(Some(Outcome::Done(self.outer(own.mod_revision))));
                        }
                        // It is not as it was thought to be: its lease ended, or an earlier transaction was done after all.
                        _ if moved => continue,
                        _ => return Ok(None),
                    }
                }
                Err(error) if error.may_pass() && start.elapsed() < PATIENCE => {
                    tracing::debug!("etcd: {error:?}, which is tried again");
                    patience = (patience * 2).min(ANSWER);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => {
                    let error = self.told(error);
                    if error == StoreError::NoLease && !renewed {
                        // It may be the marker's: with another one, it is known whose it was.
                        renewed = true;
                        marker.lease = None;
                        continue;
                    }
                    if error == StoreError::NoLease && !leased {
                        let detail = "leases end at once; are the members' clocks right?".to_owned();
                        return Err(StoreError::Unavailable { place: self.0.gateway.place(), detail });
                    }
                    return Err(error);
                }
            }
        }
    }

    async fn marker_lease(&self, marker: &mut Marker) -> Result<LeaseId, StoreError> {
        if let Some((lease, kept)) = marker.lease {
            if kept.elapsed() < MARKER_KEEP {
                return Ok(lease);
            }
            if self.keep(lease).await.is_ok() {
                marker.lease = Some((lease, Instant::now()));
                return Ok(lease);
            }
        }
        let lease = self.granted(MARKER_LIFE).await?;
        marker.lease = Some((lease, Instant::now()));
        Ok(lease)
    }

    fn step(&self, op: &Op) -> Value {
        match op {
            Op::Put { key, value, lease } => {
                let lease = lease.map_or(0, |lease| lease.0).to_string();
                json!({ "request_put": { "key": self.key(key), "value": STANDARD.encode(value), "lease": lease } })
            }
            Op::Delete { key } => json!({ "request_delete_range": { "key": self.key(key) } }),
        }
    }

    async fn granted(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let seconds = (ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).max(1);
        let ask = json!({ "TTL": seconds.to_string() });
        let granted: Granted = self.0.gateway.ask("/v3/lease/grant", &ask).await.map_err(|e| self.told(e))?;
        Ok(LeaseId(granted.id.0))
    }

    async fn keep(&self, lease: LeaseId) -> Result<(), StoreError> {
        let ask = json!({ "ID": lease.0.to_string() });
        let kept: rows::KeptAlive = self.0.gateway.ask("/v3/lease/keepalive", &ask).await.map_err(|e| self.told(e))?;
        // A lease that there is not has no time left: that is how etcd says so here.
        if kept.result.ttl.0 == 0 { Err(StoreError::NoLease) } else { Ok(()) }
    }

    async fn ended(&self, lease: LeaseId) -> Result<(), StoreError> {
        let ask = json!({ "ID": lease.0.to_string() });
        match self.0.gateway.ask::<Value>("/v3/lease/revoke", &ask).await.map_err(|e| self.told(e)) {
            Ok(_) | Err(StoreError::NoLease) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn watched(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let compacted = |compacted| StoreError::Compacted { compacted };
        let after = match self.inner(after) {
            Some(inner) => inner,
            None => return Err(compacted(self.0.base)),
        };
        if after > 0 {
            // Reading as of then fails where then is not yet, or not any more.
            let ask = json!({ "key": key(&self.0.prefix, "base"), "revision": after.to_string(), "keys_only": true });
            match self.0.gateway.ask::<Value>("/v3/kv/range", &ask).await {
                Err(CallError::Refused { code: OUT_OF_RANGE, .. }) => {
                    return Err(compacted(after.saturating_add(self.0.base)));
                }
                other => other.map(drop).map_err(|e| self.told(e))?,
            }
        }
        let mut create = range_of(&self.0.prefix, prefix);
        create["start_revision"] = (after + 1).to_string().into();
        let ask = json!({ "create_request": create });
        let mut stream = self.0.gateway.stream("/v3/watch", &ask).await.map_err(|e| self.told(e))?;
        let created: Watched = stream.next().await.map_err(|e| self.told(e))?;
        if created.canceled {
            return Err(self.canceled(&created));
        }
        let (to, watch) = mpsc::channel(16);
        tokio::spawn(follow(self.clone(), stream, created, to));
        Ok(watch)
    }

    fn canceled(&self, watched: &Watched) -> StoreError {
        if watched.compact_revision.0 > 0 {
            return StoreError::Compacted { compacted: self.outer(watched.compact_revision) };
        }
        StoreError::Unavailable { place: self.0.gateway.place(), detail: watched.cancel_reason.clone() }
    }

    fn told(&self, error: CallError) -> StoreError {
        trouble::told(&self.0.gateway, &self.0.prefix, error)
    }
}

impl Store for Etcd {
    fn range<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Snapshot, StoreError>> {
        Box::pin(self.list(prefix))
    }

    /// In a task of its own: who does not wait for the answer would leave the marker unknown.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, StoreError>> {
        let store = self.clone();
        Box::pin(async move {
            let done = tokio::spawn(async move { store.commit(&txn).await });
            done.await.unwrap_or_else(|e| {
                Err(StoreError::Unavailable { place: self.0.gateway.place(), detail: e.to_string() })
            })
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch, StoreError>> {
        Box::pin(self.watched(prefix, after))
    }

    /// In whole seconds, and not less than the etcd's own least, which is 2 s by default.
    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId, StoreError>> {
        Box::pin(self.granted(ttl))
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.keep(lease))
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.ended(lease))
    }
}

async fn follow(store: Etcd, mut stream: Stream, first: Watched, to: mpsc::Sender<Result<Vec<Event>, StoreError>>) {
    let mut watched = first;
    loop {
        if watched.canceled {
            let _ = to.send(Err(store.canceled(&watched))).await;
            return;
        }
        let events: Vec<Event> = std::mem::take(&mut watched.events)
            .into_iter()
            .map(|change| match change.kind.as_deref() {
                Some("DELETE") => {
                    Event::Delete { key: store.name(&change.kv.key.0), revision: store.outer(change.kv.mod_revision) }
                }
                _ => Event::Put(store.key_value(change.kv)),
            })
            .collect();
        if !events.is_empty() && to.send(Ok(events)).await.is_err() {
            return;
        }
        tokio::select! {
            next = stream.next() => match next {
                Ok(next) => watched = next,
                Err(error) => {
                    let _ = to.send(Err(store.told(error))).await;
                    return;
                }
            },
            () = to.closed() => return,
        }
    }
}

/// All keys below `prefix` that start with `name`.
fn range_of(prefix: &str, name: &str) -> Value {
    let start = format!("{prefix}k/{name}").into_bytes();
    let mut end = start.clone();
    // UTF-8 has no byte 0xff, and `k/` is never empty, so the last byte can grow.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    json!({ "key": STANDARD.encode(start), "range_end": STANDARD.encode(end) })
}

fn compare_mod(key: &str, modified: u64) -> Value {
    json!({ "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": modified.to_string() })
}

/// A key beside the cluster's that holds a number.
async fn number(gateway: &Gateway, prefix: &str, name: &str) -> Result<Option<u64>, StoreError> {
    let ask = json!({ "key": key(prefix, name) });
    let found: Range =
        gateway.ask("/v3/kv/range", &ask).await.map_err(|error| trouble::told(gateway, prefix, error))?;
    let Some(kept) = found.kvs.first() else { return Ok(None) };
    let value = std::str::from_utf8(&kept.value.0).ok().and_then(|text| text.parse().ok());
    let detail = format!("{prefix}{name} is no number");
    value.map(Some).ok_or_else(|| StoreError::Corrupt { place: gateway.place(), detail })
}
