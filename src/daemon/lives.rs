//! Tells the log which peers died and came back.
//!
//! Looks at verdicts now and then instead of being told of each: what a flapping peer does in between is skipped.

use std::collections::HashMap;

use crate::engine::tables::Tables;
use crate::health::peer::{Liveness, Verdict};
use crate::node::NodeName;

/// What was last said of each peer that was ever up.
#[derive(Default)]
pub(super) struct Lives(HashMap<NodeName, Verdict>);

impl Lives {
    pub(super) fn tell(&mut self, tables: &Tables) {
        for spec in tables.peers().iter().map(|peer| &peer.spec) {
            let verdict = spec.liveness.as_deref().map_or(Verdict::Unknown, Liveness::verdict);
            match (self.0.get(&spec.name).copied(), verdict) {
                (None | Some(Verdict::Up), Verdict::Unknown) => continue,
                (before, now) if before == Some(now) => continue,
                (_, Verdict::Down) => {
                    tracing::warn!(
                        peer = %spec.name,
                        "{} at {} does not answer any more: packets to it are refused with ICMP host unreachable",
                        spec.name,
                        spec.endpoint
                    );
                }
                (Some(Verdict::Down), Verdict::Up) => tracing::info!(peer = %spec.name, "{} answers again", spec.name),
                (Some(Verdict::Down), Verdict::Unknown) => {
                    tracing::info!(peer = %spec.name, "{} is there again, and is not watched", spec.name);
                }
                (_, Verdict::Up) => tracing::debug!(peer = %spec.name, "{} answers", spec.name),
                (_, Verdict::Unknown) => continue,
            }
            self.0.insert(spec.name.clone(), verdict);
        }
        if self.0.len() > tables.peers().len() {
            self.0.retain(|name, _| tables.peers().iter().any(|peer| peer.spec.name == *name));
        }
    }
}
