//! What other servers change in a store that they share: it becomes known here as it is stored, in the same order and under
//! the same revisions, so that a node that goes from one server to another is told what it missed and no more.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::rows::{self, BadRow, NodeRow, Plan};
use super::{Registry, Writer};
use crate::membership::clock::Now;
use crate::membership::store::{Event, Revision, StoreError};

/// A store that fails is asked again after so long.
const RETRY: Duration = Duration::from_millis(500);

impl Registry {
    /// Follows the store. Runs for ever; does nothing where nobody else writes to it.
    pub async fn follow(&self) {
        if !self.store.shared() {
            return std::future::pending().await;
        }
        let mut told = None;
        loop {
            let error = match self.follow_once().await {
                StoreError::Compacted { .. } => {
                    let mut writer = self.writer.lock().await;
                    match self.reload(&mut writer).await {
                        Ok(()) => continue,
                        Err(error) => error.to_string(),
                    }
                }
                error => error.to_string(),
            };
            if told.as_ref() != Some(&error) {
                tracing::warn!("the store cannot be followed: {error}");
                told = Some(error);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn follow_once(&self) -> StoreError {
        let seen = self.writer.lock().await.seen;
        let mut watch = match self.store.watch("", seen).await {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        self.following.store(true, Ordering::Relaxed);
        let error = loop {
            match watch.recv().await {
                Some(Ok(events)) => {
                    let mut writer = self.writer.lock().await;
                    if let Err(error) = self.absorb(&mut writer, events) {
                        tracing::error!("{error}");
                        writer.stale = true;
                    }
                }
                Some(Err(error)) => break error,
                None => {
                    break StoreError::Unavailable { place: "the store".to_owned(), detail: "it is closed".to_owned() };
                }
            }
        };
        self.following.store(false, Ordering::Relaxed);
        error
    }

    /// Makes whole revisions known, except those that are: what this server changed itself.
    fn absorb(&self, writer: &mut Writer, events: Vec<Event>) -> Result<(), BadRow> {
        let mut rest = events.as_slice();
        while let Some(first) = rest.first() {
            let revision = first.revision();
            let count = rest.iter().take_while(|event| event.revision() == revision).count();
            let (group, more) = rest.split_at(count);
            rest = more;
            group.iter().try_for_each(|event| self.absorb_health(event))?;
            if revision > writer.guard && group.iter().any(|event| event.key() == rows::GUARD) {
                self.absorb_change(group, revision)?;
                writer.guard = revision;
                self.guard.send_replace(revision);
            }
            writer.seen = writer.seen.max(revision);
        }
        Ok(())
    }

    fn absorb_change(&self, group: &[Event], revision: Revision) -> Result<(), BadRow> {
        let mut plan = Plan::default();
        let mut known = self.known_mut();
        for event in group {
            let key = event.key();
            let value = match event {
                Event::Put(kv) => Some(kv.value.as_slice()),
                Event::Delete { .. } => None,
            };
            if let Some(id) = key.strip_prefix(rows::NODE) {
                match value {
                    Some(value) => plan.put_nodes.push(rows::read::<NodeRow>(key, value)?),
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
            } else if let Some(id) = key.strip_prefix(rows::SERVER) {
                match value {
                    Some(value) => plan.put_servers.push((id.to_owned(), rows::read(key, value)?)),
                    None => plan.drop_servers.push(id.to_owned()),
                }
            } else if key.starts_with(rows::AUDIT) {
                match value {
                    Some(_) => known.state.audit.push_back(key.to_owned()),
                    None => known.state.audit.retain(|kept| kept != key),
                }
            }
        }
        known.state.apply(&plan);
        if plan.changes_list() {
            let upsert = plan.put_nodes.iter().map(|row| row.record.clone());
            known.feed.push(revision, upsert, &plan.drop_nodes);
        }
        self.changed.notify_one();
        Ok(())
    }

    fn absorb_health(&self, event: &Event) -> Result<(), BadRow> {
        let key = event.key();
        match (key.strip_prefix(rows::HEARD), event) {
            (Some(server), _) if server == self.instance => {}
            (Some(server), Event::Put(kv)) => {
                let ids: Vec<String> = rows::read(key, &kv.value)?;
                self.health().elsewhere(Now::read(), server, Some(ids));
            }
            (Some(server), Event::Delete { .. }) => self.health().elsewhere(Now::read(), server, None),
            (None, Event::Put(kv)) if key == rows::BEATS => {
                self.health().remembered = serde_json::from_slice(&kv.value).unwrap_or_default();
            }
            (None, _) if key == rows::DUTY => {
                let free = matches!(event, Event::Delete { .. });
                self.duty_free.store(free, Ordering::Relaxed);
            }
            _ => {}
        }
        Ok(())
    }
}
