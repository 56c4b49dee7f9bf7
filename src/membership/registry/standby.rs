//! A server whose store does not answer yet: what it tells by the copy on its disk, and how it goes over to the store.
//!
//! Members are known by the copy, so that they may heartbeat and read. Nothing that the copy does not say is taken for a no:
//! who is unknown to it may have joined since. Nobody's node list changes by it, since it may be older than theirs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{OpenError, Refused, Registry, rows};
use crate::membership::etcd::Members;
use crate::membership::store::standby::{self, Standby};
use crate::membership::store::{Revision, Store};

/// The copy is this much behind at most; longer by a second for each hundred nodes.
const PACE: Duration = Duration::from_secs(10);
/// Between two attempts to read a store that has just come.
const AGAIN: Duration = Duration::from_secs(1);

impl Registry {
    /// Says that the store of this registry is away.
    pub fn set_standby(&self, standby: &Standby) {
        let _ = self.away.set(standby.away());
    }

    /// Why the store does not answer yet, where this server still waits for it; empty once it has.
    pub fn away(&self) -> Vec<String> {
        self.away.get().map(|away| away.borrow().clone()).unwrap_or_default()
    }

    /// The same, as it changes.
    pub fn outlook(&self) -> watch::Receiver<Vec<String>> {
        self.away.get().cloned().unwrap_or_else(|| watch::channel(vec![]).1)
    }

    /// An error while the store is away.
    pub(super) fn present(&self) -> Result<(), Refused> {
        match self.away() {
            reasons if reasons.is_empty() => Ok(()),
            reasons => Err(standby::away(&reasons).into()),
        }
    }

    /// The store is there: from now on it is what counts, if it is this cluster's.
    pub async fn arrive(
        &self,
        standby: &Standby,
        store: Arc<dyn Store>,
        members: Option<Arc<Members>>,
    ) -> Result<(), OpenError> {
        self.look_at(&*store).await?;
        let mut writer = self.writer.lock().await;
        if let Some(members) = members {
            self.set_members(members);
        }
        writer.stale = true;
        standby.arrive(store);
        // before that the list would be the copy's, and somebody's later one would go back to it
        while let Err(error) = self.reload(&mut writer).await {
            tracing::warn!("{error}");
            tokio::time::sleep(AGAIN).await;
        }
        standby.present();
        Ok(())
    }

    /// Waits until there is a later list than `from`; for ever while the store is away.
    pub async fn wait_for_news(&self, from: Revision) {
        let (mut news, mut away) = (self.watch(), self.outlook());
        // the other ends go with the registry
        let _ = away.wait_for(Vec::is_empty).await;
        let _ = news.wait_for(|revision| *revision != from && *revision > from).await;
    }

    /// Keeps a copy of the store at `path`, for the next start without it. Runs for ever.
    pub async fn keep_copy(&self, path: &Path) {
        let mut last = None;
        loop {
            let mut outlook = self.outlook();
            let _ = outlook.wait_for(Vec::is_empty).await;
            let as_of = (self.writer.lock().await.guard, self.servers());
            if last.as_ref() != Some(&as_of) {
                match self.copy(path).await {
                    Ok(()) => last = Some(as_of),
                    Err(error) => tracing::warn!("the copy of the datastore: {error}"),
                }
            }
            let nodes = self.known().state.nodes.len() as u64;
            tokio::time::sleep(PACE + Duration::from_secs(nodes / 100)).await;
        }
    }

    async fn copy(&self, path: &Path) -> Result<(), OpenError> {
        let mut all = self.store.range("").await?;
        self.look_in(&all.items)?;
        all.items.retain(|item| !item.key.starts_with(rows::AUDIT));
        let path = path.to_owned();
        let written = tokio::task::spawn_blocking(move || standby::keep(&path, &all)).await;
        Ok(written.unwrap_or(Ok(()))?)
    }

    /// What people call the node with this identity.
    pub fn name_of(&self, identity: &str) -> Option<String> {
        self.known().state.member(identity).ok().map(|row| row.record.name.clone())
    }
}
