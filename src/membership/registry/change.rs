//! How anything changes: decided on the copy in memory, stored with a comparison that nobody came in between, and only then
//! true and told to watchers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::found::Found;
use super::open::OpenError;
use super::rows::{self, AuditRow, Plan};
use super::space::Space;
use super::state::State;
use super::{Known, Refused, Registry, Writer};
use crate::membership::clock::Now;
use crate::membership::store::{Compare, Op, Outcome, Revision, StoreError, Txn};

/// A change is tried again at least so often, and for so long, when somebody came in between: where the store is slow and the
/// others write much, most tries meet another's.
const TRIES: usize = 20;
const PATIENCE: Duration = Duration::from_secs(10);
/// Lines that the audit log keeps.
const AUDIT_KEEP: usize = 1000;
/// Lines that one change removes at most, whatever there is too much: etcd takes 128 steps in a transaction.
const AUDIT_DROP: usize = 10;

impl Registry {
    /// Decides on what is known, stores it, and then makes it known. That nothing is to be changed is believed as it is.
    pub(super) async fn change<T>(
        &self,
        now: Now,
        decide: impl Fn(&mut State) -> Result<(T, Plan), Refused>,
    ) -> Result<T, Refused> {
        self.decide(now, false, decide).await
    }

    /// The same. `sure`: also a refusal, or that there is nothing to change, is about what the store has now, and not about
    /// what this server last heard of it: the others may have gone on without it.
    pub(super) async fn decide<T>(
        &self,
        now: Now,
        sure: bool,
        decide: impl Fn(&mut State) -> Result<(T, Plan), Refused>,
    ) -> Result<T, Refused> {
        let mut writer = self.writer.lock().await;
        let begun = tokio::time::Instant::now();
        let mut tries = 0;
        while tries < TRIES || begun.elapsed() < PATIENCE {
            tries += 1;
            if writer.stale {
                self.reload(&mut writer).await?;
            }
            let decided = decide(&mut self.known_mut().state);
            let (answer, plan) = match decided {
                Ok((answer, plan)) if !plan.is_empty() => (answer, plan),
                other => {
                    if sure && !self.is_current(&mut writer).await? {
                        continue;
                    }
                    return other.map(|(answer, _)| answer);
                }
            };
            let mut ops = plan.ops();
            ops.push(Op::put(rows::GUARD, ""));
            if plan.changes_list() {
                ops.push(Op::put(rows::LIST, ""));
            }
            let lines = self.audit_ops(now, &plan.audit, &mut writer);
            ops.extend(lines.iter().cloned());
            let compares = vec![Compare { key: rows::GUARD.to_owned(), modified: writer.guard }];
            match self.store.txn(Txn { compares, ops }).await {
                Ok(Outcome::Done(revision)) => {
                    writer.guard = revision;
                    self.counters.commits.fetch_add(1, Ordering::Relaxed);
                    self.heard_store(now);
                    self.settle(&plan, &lines, revision);
                    return Ok(answer);
                }
                Ok(Outcome::Conflict) => self.catch_up(&mut writer).await,
                Err(error) => {
                    writer.stale = !matches!(error, StoreError::Full { .. });
                    return Err(error.into());
                }
            }
        }
        Err(Refused::Busy)
    }

    pub(super) fn settle(&self, plan: &Plan, lines: &[Op], revision: Revision) {
        for line in &plan.audit {
            let AuditRow { what, node, token, from, .. } = line;
            tracing::info!(node, token, from, "{what}");
        }
        self.make_known(plan, lines, revision);
    }

    pub(super) fn make_known(&self, plan: &Plan, lines: &[Op], revision: Revision) {
        let mut known = self.known_mut();
        known.state.apply(plan);
        for line in lines {
            match line {
                Op::Put { key, .. } => drop(known.state.audit.insert(key.clone())),
                Op::Delete { key } => drop(known.state.audit.remove(key)),
            }
        }
        if plan.changes_list() {
            let upsert = plan.put_nodes.iter().map(|row| row.record.clone());
            known.feed.push(revision, upsert, &plan.drop_nodes);
            self.changed.notify_one();
        }
    }

    /// The log's new lines, and the removal of the oldest in their place.
    pub(super) fn audit_ops(&self, now: Now, lines: &[AuditRow], writer: &mut Writer) -> Vec<Op> {
        let mut ops = Vec::new();
        for line in lines {
            writer.audited += 1;
            let (time, count) = (now.unix.max(0), writer.audited % 100_000_000);
            // another server may write its line of that number in the same second
            let key = format!("{}{time:012}-{count:08}-{}", rows::AUDIT, &self.me[..8]);
            ops.push(Op::put(key, rows::json(line)));
        }
        let known = self.known();
        let spare = (known.state.audit.len() + ops.len()).saturating_sub(AUDIT_KEEP).min(lines.len() + AUDIT_DROP);
        // A key that is written in this transaction must not be dropped in it too.
        let fresh = |key: &&String| !ops.iter().any(|op| matches!(op, Op::Put { key: new, .. } if new == *key));
        let oldest: Vec<_> = known.state.audit.iter().filter(fresh).take(spare).map(Op::delete).collect();
        ops.extend(oldest);
        ops
    }

    pub(super) async fn reload(&self, writer: &mut Writer) -> Result<(), Refused> {
        let space =
            Space::new(&self.cluster.cidrs, self.cluster.masks).map_err(|e| Refused::BadRecord(e.to_string()))?;
        let found = Found::read(&*self.store, &space).await.map_err(|e| match e {
            OpenError::Store(error) => Refused::Store(error),
            other => Refused::BadRecord(other.to_string()),
        })?;
        if found.cluster.as_ref().map(|cluster| &cluster.id) != Some(&self.cluster.id) {
            let gone = OpenError::Vanished { cluster: self.cluster.id.clone() }.to_string();
            return Err(StoreError::Unfit { place: "datastore".to_owned(), problem: gone }.into());
        }
        *self.others() = found.others;
        *self.known_mut() = Known { state: found.state, feed: found.feed };
        writer.guard = found.guard;
        writer.followed = found.revision;
        writer.stale = false;
        self.changed.notify_one();
        Ok(())
    }
}
