//! Who is there: heartbeats, and what their absence means. Pure.
//!
//! Silence for [`GRACE`] makes a node not-ready. The purge clock of a silent node runs only while this server is up and more
//! than half of the nodes heartbeat, so that a fault on the servers' side purges nobody; it begins anew when the node, or
//! a peer that reaches it, speaks.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use crate::membership::clock::Now;
use crate::membership::matrix::Watched;

/// A node is asked to heartbeat this often.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// So long without a heartbeat makes a node not-ready.
pub const GRACE: Duration = Duration::from_secs(40);
/// A tick that comes this late says that the server stood still, and not that the nodes did.
const STANDSTILL: Duration = Duration::from_secs(5);

/// A node's last heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Beat {
    pub(super) at: Now,
    pub(super) observed: Option<IpAddr>,
    pub(super) reaches: Vec<String>,
    pub(super) paths: Vec<Watched>,
}

/// A node, as far as health is concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patient<'a> {
    pub(super) id: &'a str,
    pub(super) ready: bool,
    /// Whether its silence is this server's to judge: it heartbeats here, or the server where it did is gone.
    pub(super) mine: bool,
}

/// What should change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Verdict {
    pub(super) up: Vec<String>,
    pub(super) down: Vec<String>,
    pub(super) purge: Vec<String>,
}

/// So many nodes are judged in one transaction: etcd takes 128 steps, and a purge is five.
const PART: usize = 20;

impl Verdict {
    /// The same in parts that any store takes.
    pub(super) fn parts(self) -> Vec<Verdict> {
        let of = |ids: Vec<String>, part: fn(Vec<String>) -> Verdict| {
            ids.chunks(PART).map(|ids| part(ids.to_vec())).collect::<Vec<_>>()
        };
        let mut parts = of(self.purge, |purge| Verdict { purge, ..Verdict::default() });
        parts.extend(of(self.up, |up| Verdict { up, ..Verdict::default() }));
        parts.extend(of(self.down, |down| Verdict { down, ..Verdict::default() }));
        parts
    }
}

#[derive(Debug)]
pub(super) struct Health {
    pub(super) beats: HashMap<String, Beat>,
    /// How long each silent node has been away, on the purge clock.
    away: HashMap<String, Duration>,
    /// A node that was not heard yet counts from here: when it was first seen, or another server last heard it. So one
    /// that has just joined elsewhere is not taken for silent.
    since: HashMap<String, Duration>,
    ticked: Duration,
    /// From an earlier life of the server: when nodes were last heard, seconds since 1970. For people only.
    pub(super) remembered: HashMap<String, i64>,
}

impl Health {
    pub(super) fn new(now: Now, remembered: HashMap<String, i64>) -> Self {
        Health { beats: HashMap::new(), away: HashMap::new(), since: HashMap::new(), ticked: now.mono, remembered }
    }

    pub(super) fn beat(&mut self, id: &str, beat: Beat) {
        self.beats.insert(id.to_owned(), beat);
    }

    /// Another server hears this node now.
    pub(super) fn forget(&mut self, id: &str) {
        self.beats.remove(id);
        self.away.remove(id);
        self.since.remove(id);
    }

    /// The server that heard this node is gone: the node has the whole grace to find another.
    pub(super) fn adopt(&mut self, now: Now, id: &str) {
        self.since.insert(id.to_owned(), now.mono);
    }

    /// When a node was last heard, seconds since 1970.
    pub(super) fn last(&self, id: &str) -> Option<i64> {
        self.beats.get(id).map(|beat| beat.at.unix).or_else(|| self.remembered.get(id).copied())
    }

    /// To be called about once a second, with all nodes that can heartbeat.
    pub(super) fn tick(&mut self, now: Now, nodes: &[Patient<'_>], purge_after: Option<Duration>) -> Verdict {
        let passed = now.mono.saturating_sub(self.ticked);
        self.ticked = now.mono;
        let stood_still = passed > STANDSTILL;
        if stood_still {
            self.since.values_mut().for_each(|since| *since += passed);
            self.beats.values_mut().for_each(|beat| beat.at.mono += passed);
        }
        for node in nodes {
            if !self.since.contains_key(node.id) {
                self.since.insert(node.id.to_owned(), now.mono);
            }
        }
        let fresh = |health: &Health, id: &str| {
            let first = health.since.get(id).copied().unwrap_or(now.mono);
            let since = health.beats.get(id).map_or(first, |beat| beat.at.mono);
            now.mono.saturating_sub(since) < GRACE
        };
        let heard = |health: &Health, id: &str| health.beats.contains_key(id) && fresh(health, id);
        let mut verdict = Verdict::default();
        for node in nodes.iter().filter(|node| node.mine) {
            match (node.ready, heard(self, node.id)) {
                (false, true) => verdict.up.push(node.id.to_owned()),
                (true, false) if !fresh(self, node.id) => verdict.down.push(node.id.to_owned()),
                _ => {}
            }
        }
        let there = nodes.iter().filter(|node| if node.mine { heard(self, node.id) } else { node.ready }).count();
        let reached: HashSet<&str> = self
            .beats
            .iter()
            .filter(|(id, _)| heard(self, id))
            .flat_map(|(_, beat)| beat.reaches.iter().map(String::as_str))
            .collect();
        let known: HashSet<&str> = nodes.iter().map(|node| node.id).collect();
        let mine: HashSet<&str> = nodes.iter().filter(|node| node.mine).map(|node| node.id).collect();
        let silent = |id: &str| mine.contains(id) && !heard(self, id) && !reached.contains(id);
        let counts = there * 2 > nodes.len() && !stood_still;
        let mut away: HashMap<String, Duration> =
            self.away.iter().filter(|(id, _)| silent(id)).map(|(id, d)| (id.clone(), *d)).collect();
        if let Some(limit) = purge_after.filter(|_| counts) {
            for node in nodes.iter().filter(|node| silent(node.id)) {
                let time = away.entry(node.id.to_owned()).or_default();
                *time += passed;
                if *time >= limit {
                    verdict.purge.push(node.id.to_owned());
                }
            }
        }
        self.away = away;
        self.beats.retain(|id, _| known.contains(id.as_str()));
        self.since.retain(|id, _| known.contains(id.as_str()));
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sim {
        health: Health,
        now: Now,
        ready: HashMap<&'static str, bool>,
        purged: Vec<String>,
    }

    const HOUR: u64 = 3600;

    impl Sim {
        fn new(names: &[&'static str]) -> Self {
            let now = Now { unix: 1_800_000_000, mono: Duration::from_secs(1000) };
            let ready = names.iter().map(|n| (*n, true)).collect();
            Sim { health: Health::new(now, HashMap::new()), now, ready, purged: vec![] }
        }

        /// Runs for so many seconds with heartbeats of these.
        fn run(&mut self, seconds: u64, alive: &[&str], reaches: &[&str]) {
            for second in 0..seconds {
                self.now.mono += Duration::from_secs(1);
                self.now.unix += 1;
                if second % 10 == 0 {
                    for id in alive {
                        let reaches = reaches.iter().map(|r| (*r).to_owned()).collect();
                        self.health.beat(id, Beat { at: self.now, observed: None, reaches, paths: vec![] });
                    }
                }
                self.tick();
            }
        }

        fn tick(&mut self) {
            let nodes: Vec<_> =
                self.ready.iter().map(|(id, ready)| Patient { id, ready: *ready, mine: true }).collect();
            let verdict = self.health.tick(self.now, &nodes, Some(Duration::from_secs(HOUR)));
            for id in verdict.up {
                *self.ready.get_mut(id.as_str()).unwrap() = true;
            }
            for id in verdict.down {
                *self.ready.get_mut(id.as_str()).unwrap() = false;
            }
            for id in verdict.purge {
                self.ready.remove(id.as_str());
                self.purged.push(id);
            }
        }
    }

    #[test]
    fn silence_makes_not_ready_and_a_word_makes_ready() {
        let mut sim = Sim::new(&["a", "b"]);
        sim.run(60, &["a", "b"], &[]);
        sim.run(30, &["a"], &[]);
        assert!(sim.ready["b"], "not before the grace is over");
        sim.run(20, &["a"], &[]);
        assert!(sim.ready["a"] && !sim.ready["b"]);
        sim.run(2, &["a", "b"], &[]);
        assert!(sim.ready["b"]);
    }

    #[test]
    fn a_node_that_is_away_for_an_hour_is_purged_where_most_are_there() {
        let mut sim = Sim::new(&["a", "b", "c"]);
        sim.run(60, &["a", "b", "c"], &[]);
        sim.run(HOUR, &["a", "b"], &[]);
        assert!(sim.purged.is_empty(), "the grace is not part of the hour");
        sim.run(60, &["a", "b"], &[]);
        assert_eq!(sim.purged, ["c"]);
    }

    #[test]
    fn who_has_just_joined_another_server_is_not_silent() {
        let mut sim = Sim::new(&["a"]);
        sim.run(100, &["a"], &[]);
        sim.ready.insert("b", true);
        sim.run(30, &["a"], &[]);
        assert!(sim.ready["b"], "the other server says in a moment that it hears it");
        sim.run(20, &["a"], &[]);
        assert!(!sim.ready["b"], "positive control");
    }

    #[test]
    fn nobody_is_purged_where_half_or_more_are_silent() {
        let mut sim = Sim::new(&["a", "b", "c", "d"]);
        sim.run(60, &["a", "b", "c", "d"], &[]);
        sim.run(10 * HOUR, &["a", "b"], &[]);
        assert!(sim.purged.is_empty());
    }

    #[test]
    fn a_server_that_was_away_or_stood_still_purges_nobody() {
        let mut sim = Sim::new(&["a", "b", "c"]);
        sim.run(60, &["a", "b", "c"], &[]);
        sim.now.mono += Duration::from_secs(61 * 60);
        sim.now.unix += 365 * 86_400;
        sim.tick();
        assert!(sim.purged.is_empty() && sim.ready.values().all(|ready| *ready), "61 minutes of standstill");
        sim.health = Health::new(sim.now, HashMap::new());
        sim.run(30, &["a", "b", "c"], &[]);
        assert!(sim.purged.is_empty() && sim.ready.values().all(|ready| *ready), "a restart");
    }

    #[test]
    fn a_node_that_a_peer_reaches_stays() {
        let mut sim = Sim::new(&["a", "b", "c"]);
        sim.run(60, &["a", "b", "c"], &[]);
        sim.run(3 * HOUR, &["a", "b"], &["c"]);
        assert!(sim.purged.is_empty() && !sim.ready["c"]);
        sim.run(HOUR + 1, &["a", "b"], &[]);
        assert_eq!(sim.purged, ["c"], "positive control");
    }
}
