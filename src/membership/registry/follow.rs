//! Several servers over one store: what the others write becomes known here, and what this one hears is told to them.
//!
//! A node heartbeats at one server. Which one stands in the store, so that one server alone judges its silence; a server
//! is there as long as its lease is, and what heartbeat at one that is gone is judged by all.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::rows::{self, BadRow, ClusterRow, Plan};
use super::{OpenError, Refused, Registry, Writer};
use crate::membership::address::ServerAddress;
use crate::membership::clock::Now;
use crate::membership::store::{Event, KeyValue, LeaseId, Op, Outcome, Revision, Store, StoreError, Txn};

/// A server that is not heard for so long is gone.
const LEASE: Duration = Duration::from_secs(20);
/// It says that it is there this often.
const KEEP: Duration = Duration::from_secs(5);
/// The store is looked at this often, in case that it was emptied without a trace.
const LOOK: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(1);
/// A server that did not reach the store for so long sends its nodes to the others, before those take them for silent.
const AWAY: Duration = Duration::from_secs(12);

/// How this server is known to the others.
#[derive(Debug, Default)]
pub(super) struct Presence {
    lease: Option<LeaseId>,
    kept: Duration,
    said: Vec<ServerAddress>,
}

impl Registry {
    /// Keeps up with what other servers write. Ends where the store is no longer this cluster's.
    pub async fn follow(&self) -> OpenError {
        loop {
            let from = self.writer.lock().await.followed;
            let gone = match self.store.watch("", from).await {
                Ok(mut watch) => loop {
                    match timeout(LOOK, watch.recv()).await {
                        Ok(Some(Ok(events))) => {
                            let mut writer = self.writer.lock().await;
                            if let Err(error) = self.take(&mut writer, &events) {
                                break Some(error);
                            }
                            writer.followed = events.last().map_or(writer.followed, Event::revision);
                        }
                        Ok(Some(Err(error))) => break Some(error.into()),
                        Ok(None) => break None,
                        Err(_) => {
                            if let Err(error) = self.look().await {
                                break Some(error);
                            }
                        }
                    }
                },
                Err(error) => Some(error.into()),
            };
            match gone {
                Some(OpenError::Store(StoreError::Compacted { .. })) => {
                    // Too far behind, or a store that knows less than this server does.
                    if let Err(error) = self.look().await
                        && !passes(&error)
                    {
                        return error;
                    }
                    let mut writer = self.writer.lock().await;
                    if let Err(error) = self.reload(&mut writer).await {
                        tracing::warn!("{error}");
                    }
                }
                Some(error) if !passes(&error) => return error,
                _ => {}
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Whether the store still has this cluster.
    async fn look(&self) -> Result<(), OpenError> {
        self.look_at(&*self.store).await
    }

    /// Whether that store has this cluster.
    pub(super) async fn look_at(&self, store: &dyn Store) -> Result<(), OpenError> {
        self.look_in(&store.range(rows::CLUSTER).await?.items)
    }

    /// Whether these keys are of this cluster.
    pub(super) fn look_in(&self, found: &[KeyValue]) -> Result<(), OpenError> {
        match found.iter().find(|item| item.key == rows::CLUSTER) {
            Some(item) => self.is_ours(&item.value),
            None => Err(OpenError::Vanished { cluster: self.cluster.id.clone() }),
        }
    }

    fn is_ours(&self, value: &[u8]) -> Result<(), OpenError> {
        let found = rows::read::<ClusterRow>(rows::CLUSTER, value)?.id;
        if found == self.cluster.id {
            return Ok(());
        }
        Err(OpenError::OtherCluster { found, cluster: self.cluster.id.clone() })
    }

    /// Whether this server has not reached the store for some time, so that nobody learns what nodes tell it.
    pub fn is_away(&self, now: Now) -> bool {
        let heard = Duration::from_nanos(self.heard.load(Ordering::Relaxed));
        self.shared && !heard.is_zero() && now.mono.saturating_sub(heard) >= AWAY
    }

    /// Learns what others wrote until now. Where the store does not answer, an error.
    pub async fn catch(&self) -> Result<(), Refused> {
        if self.shared {
            let at = self.stored().await?;
            let mut writer = self.writer.lock().await;
            if writer.guard < at {
                self.catch_up(&mut writer).await;
            }
            if writer.guard < at || writer.stale {
                self.reload(&mut writer).await?;
            }
        }
        Ok(())
    }

    /// Whether all that was written until now is known here; if not, some more is, or is going to be read.
    pub(super) async fn is_current(&self, writer: &mut Writer) -> Result<bool, StoreError> {
        let current = !self.shared || self.stored().await? <= writer.guard;
        if !current {
            self.catch_up(writer).await;
        }
        Ok(current)
    }

    /// The revision of the last change, as the store has it.
    async fn stored(&self) -> Result<Revision, StoreError> {
        let found = self.store.range(rows::GUARD).await?;
        Ok(found.items.iter().find(|item| item.key == rows::GUARD).map_or(0, |item| item.modified))
    }

    /// Somebody came in between: what they wrote first.
    pub(super) async fn catch_up(&self, writer: &mut Writer) {
        let before = writer.guard;
        if let Ok(mut watch) = self.store.watch("", before).await
            && let Ok(Some(Ok(events))) = timeout(RETRY, watch.recv()).await
        {
            // an error shows in the reload
            let _ = self.take(writer, &events);
        }
        if writer.guard == before {
            writer.stale = true;
        }
    }

    /// What was written, perhaps by this server itself, becomes known. The events are of whole revisions.
    fn take(&self, writer: &mut Writer, events: &[Event]) -> Result<(), OpenError> {
        for of_one in events.chunk_by(|a, b| a.revision() == b.revision()) {
            let revision = of_one[0].revision();
            let known = revision <= writer.guard;
            let mut plan = Plan::default();
            let mut lines = Vec::new();
            let mut guarded = false;
            for event in of_one {
                let key = event.key();
                let value = match event {
                    Event::Put(kv) => Some(kv.value.as_slice()),
                    Event::Delete { .. } => None,
                };
                match (key, value) {
                    (rows::CLUSTER, Some(value)) => self.is_ours(value)?,
                    (rows::CLUSTER, None) => {
                        return Err(OpenError::Vanished { cluster: self.cluster.id.clone() });
                    }
                    (rows::GUARD, Some(_)) => guarded = true,
                    _ if key.starts_with(rows::AUDIT) => {
                        lines.push(if value.is_some() { Op::put(key, "") } else { Op::delete(key) });
                    }
                    _ if key.starts_with(rows::SERVER) || key.starts_with(rows::VIA) => self.met(key, value),
                    _ => note(&mut plan, key, value)?,
                }
            }
            if !known && guarded {
                self.make_known(&plan, &lines, revision);
                writer.guard = revision;
            }
        }
        Ok(())
    }

    /// Another server came or went, or a node found another server.
    fn met(&self, key: &str, value: Option<&[u8]>) {
        let mut health = self.health();
        let mut others = self.others();
        others.take(key, value);
        match (key.strip_prefix(rows::VIA), key.strip_prefix(rows::SERVER)) {
            (Some(node), _) if value.is_some_and(|server| server != self.me.as_bytes()) => health.forget(node),
            (_, Some(server)) if value.is_none() => {
                let now = Now::read();
                let left = others.via.iter().filter(|(_, via)| *via == server);
                left.for_each(|(node, _)| health.adopt(now, node));
            }
            _ => {}
        }
    }

    /// Tells the others that this server is there, where, and which nodes heartbeat here.
    pub(super) async fn show_presence(&self, now: Now) -> Result<(), Refused> {
        if !self.shared {
            return Ok(());
        }
        let mut presence = self.presence.lock().await;
        let own = self.servers.read().unwrap_or_else(PoisonError::into_inner).clone();
        let due = now.mono.saturating_sub(presence.kept) >= KEEP;
        if let Some(lease) = presence.lease.filter(|_| due) {
            match self.store.keep_alive(lease).await {
                Ok(()) => {
                    presence.kept = now.mono;
                    self.heard_store(now);
                }
                // this server stood still for too long: it is there anew
                Err(StoreError::NoLease) => presence.lease = None,
                Err(error) => return Err(error.into()),
            }
        }
        if presence.lease.is_none() || presence.said != own {
            let lease = match presence.lease {
                Some(lease) => lease,
                None => self.store.grant(LEASE).await?,
            };
            let key = format!("{}{}", rows::SERVER, self.me);
            let ops = vec![Op::Put { key, value: rows::json(&own), lease: Some(lease) }];
            self.store.txn(Txn { compares: vec![], ops }).await?;
            *presence = Presence { lease: Some(lease), kept: now.mono, said: own };
            self.heard_store(now);
        }
        let moved = std::mem::take(&mut *self.moved.lock().unwrap_or_else(PoisonError::into_inner));
        let moved: Vec<String> = moved.into_iter().filter(|id| self.has(id)).collect();
        for some in moved.chunks(100) {
            let ops = some.iter().map(|id| Op::put(format!("{}{id}", rows::VIA), self.me.as_bytes())).collect();
            if let Outcome::Done(_) = self.store.txn(Txn { compares: vec![], ops }).await? {
                let mut others = self.others();
                others.via.extend(some.iter().map(|id| (id.clone(), self.me.clone())));
            }
        }
        Ok(())
    }
}

impl Registry {
    pub(super) fn heard_store(&self, now: Now) {
        self.heard.store(u64::try_from(now.mono.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// What may pass by itself.
fn passes(error: &OpenError) -> bool {
    matches!(
        error,
        OpenError::Store(StoreError::Unavailable { .. } | StoreError::Full { .. } | StoreError::Compacted { .. })
    )
}

/// Adds what became of a key to the plan that made it so.
fn note(plan: &mut Plan, key: &str, value: Option<&[u8]>) -> Result<(), BadRow> {
    if let Some(id) = key.strip_prefix(rows::NODE) {
        match value {
            Some(value) => plan.put_nodes.push(rows::read(key, value)?),
            None => plan.drop_nodes.push(id.to_owned()),
        }
    } else if let Some(id) = key.strip_prefix(rows::GONE) {
        match value {
            Some(value) => plan.put_gone.push(rows::read(key, value)?),
            None => plan.drop_gone.push(id.to_owned()),
        }
    } else if let Some(id) = key.strip_prefix(rows::TOKEN) {
        match value {
            Some(value) => plan.put_tokens.push(rows::read(key, value)?),
            None => plan.drop_tokens.push(id.to_owned()),
        }
    }
    Ok(())
}
