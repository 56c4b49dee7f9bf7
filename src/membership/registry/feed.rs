//! What changed in the node list since a watcher last looked. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::membership::api::News;
use crate::membership::record::NodeRecord;

/// So many changes of a node are remembered; who is further behind gets the whole list.
const KEEP: usize = 50_000;

#[derive(Debug)]
pub(super) struct Feed {
    revision: u64,
    /// Nothing is known of changes up to this revision.
    floor: u64,
    changes: VecDeque<(u64, Change)>,
}

#[derive(Debug, Clone)]
enum Change {
    Upsert(Arc<NodeRecord>),
    Remove(String),
}

impl Feed {
    pub(super) fn new(revision: u64) -> Self {
        Feed { revision, floor: revision, changes: VecDeque::new() }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn push(&mut self, revision: u64, upsert: impl Iterator<Item = NodeRecord>, remove: &[String]) {
        self.revision = revision;
        self.changes.extend(remove.iter().map(|id| (revision, Change::Remove(id.clone()))));
        self.changes.extend(upsert.map(|record| (revision, Change::Upsert(Arc::new(record)))));
        while self.changes.len() > KEEP {
            if let Some((revision, _)) = self.changes.pop_front() {
                self.floor = revision;
            }
        }
    }

    /// What is new after `from`; `None`: list again.
    pub(super) fn since(&self, from: u64) -> Option<News> {
        if from == self.revision {
            return Some(News::Same { revision: from });
        }
        if from < self.floor || from > self.revision {
            return None;
        }
        let mut last: BTreeMap<&str, &Change> = BTreeMap::new();
        let start = self.changes.partition_point(|(revision, _)| *revision <= from);
        for (_, change) in self.changes.range(start..) {
            last.insert(change.id(), change);
        }
        let (mut upsert, mut remove) = (Vec::new(), Vec::new());
        for (id, change) in last {
            match change {
                Change::Upsert(record) => upsert.push(NodeRecord::clone(record)),
                Change::Remove(_) => remove.push(id.to_owned()),
            }
        }
        Some(News::Delta { from, to: self.revision, upsert, remove })
    }
}

impl Change {
    fn id(&self) -> &str {
        match self {
            Change::Upsert(record) => &record.id,
            Change::Remove(id) => id,
        }
    }
}
