//! Which server is tried next. Pure.
//!
//! Servers that people configured and servers that were learnt are one set, which never shrinks to nothing: who fails is
//! only tried later. Among those that may be tried the choice is random, so that agents spread over the servers. Where none of
//! them answers, servers are tried through the mesh: who has moved has the same overlay address.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::membership::address::ServerAddress;

/// A server that failed once is tried again after so long; twice as long after each further failure.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// But never longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// After so many failures of each server it is not only one of them.
const SURE: u32 = 2;

#[derive(Debug, Default)]
pub(super) struct Balancer {
    configured: Vec<ServerAddress>,
    servers: BTreeMap<ServerAddress, Trouble>,
    overlay: BTreeMap<ServerAddress, Trouble>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Trouble {
    failures: u32,
    not_before: Duration,
}

impl Balancer {
    pub(super) fn new(configured: Vec<ServerAddress>, learnt: &[ServerAddress]) -> Self {
        let mut balancer = Balancer { configured, ..Balancer::default() };
        balancer.learn(learnt);
        balancer
    }

    /// The servers as a server tells them; the configured ones stay. Nothing changes where it tells of none.
    pub(super) fn learn(&mut self, learnt: &[ServerAddress]) {
        if learnt.is_empty() && !self.servers.is_empty() {
            return;
        }
        let all = self.configured.iter().chain(learnt);
        self.servers = all.map(|s| (s.clone(), self.servers.get(s).copied().unwrap_or_default())).collect();
    }

    /// Where servers are in the overlay.
    pub(super) fn learn_overlay(&mut self, learnt: impl Iterator<Item = ServerAddress>) {
        self.overlay = learnt.map(|s| (s.clone(), self.overlay.get(&s).copied().unwrap_or_default())).collect();
    }

    pub(super) fn servers(&self) -> Vec<ServerAddress> {
        self.servers.keys().cloned().collect()
    }

    /// The server to try now, or how long to wait for one. `random` picks among equals.
    pub(super) fn pick(&self, now: Duration, random: u64) -> Result<ServerAddress, Duration> {
        let is_ready = |(_, trouble): &(_, &Trouble)| trouble.not_before <= now;
        let nobody = self.servers.values().all(|trouble| trouble.failures >= SURE);
        let mesh = nobody && !self.servers.iter().any(|server| is_ready(&server));
        let among = if mesh { &self.overlay } else { &self.servers };
        let best = among.iter().filter(is_ready).map(|(_, t)| t.failures).min();
        let ready: Vec<_> = among
            .iter()
            .filter(|(_, t)| t.not_before <= now && Some(t.failures) == best)
            .map(|(server, _)| server)
            .collect();
        match ready.get(random as usize % ready.len().max(1)) {
            Some(server) => Ok((*server).clone()),
            None => {
                let soonest = self.servers.values().map(|t| t.not_before).min().unwrap_or(now + LONGEST_PAUSE);
                Err(soonest.saturating_sub(now))
            }
        }
    }

    fn trouble(&mut self, server: &ServerAddress) -> Option<&mut Trouble> {
        self.servers.get_mut(server).or_else(|| self.overlay.get_mut(server))
    }

    pub(super) fn worked(&mut self, server: &ServerAddress) {
        if let Some(trouble) = self.trouble(server) {
            *trouble = Trouble::default();
        }
    }

    /// It failed: later, and not all agents at once. `random` is the jitter.
    pub(super) fn failed(&mut self, server: &ServerAddress, now: Duration, random: u64) {
        if let Some(trouble) = self.trouble(server) {
            let pause = FIRST_PAUSE.saturating_mul(1 << trouble.failures.min(10)).min(LONGEST_PAUSE);
            let jitter = pause.mul_f64((random % 1000) as f64 / 1000.0 * 0.5);
            *trouble = Trouble { failures: trouble.failures.saturating_add(1), not_before: now + pause / 2 + jitter };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> ServerAddress {
        text.parse().unwrap()
    }

    #[test]
    fn who_fails_is_tried_later_and_nobody_is_given_up() {
        let (a, b) = (address("a"), address("b"));
        let mut balancer = Balancer::new(vec![a.clone()], std::slice::from_ref(&b));
        let mut now = Duration::ZERO;
        balancer.failed(&a, now, 7);
        assert_eq!(balancer.pick(now, 0), Ok(b.clone()));
        assert_eq!(balancer.pick(now, 1), Ok(b.clone()));
        for round in 0..1000 {
            balancer.failed(&a, now, round);
            balancer.failed(&b, now, round);
            let wait = balancer.pick(now, 0).unwrap_err();
            assert!(wait <= LONGEST_PAUSE, "{wait:?}");
            now += LONGEST_PAUSE;
            assert!(balancer.pick(now, round).is_ok(), "never empty");
        }
        balancer.worked(&a);
        assert_eq!(balancer.pick(now, 1), Ok(a));
    }

    #[test]
    fn where_no_server_answers_they_are_tried_through_the_mesh() {
        let (a, b, mesh) = (address("a"), address("b"), address("10.42.0.1"));
        let mut balancer = Balancer::new(vec![a.clone()], std::slice::from_ref(&b));
        balancer.learn_overlay([mesh.clone()].into_iter());
        let mut now = Duration::ZERO;
        for _ in 0..SURE {
            assert_ne!(balancer.pick(now, 0), Ok(mesh.clone()), "the servers come first");
            balancer.failed(&a, now, 0);
            balancer.failed(&b, now, 0);
            now += Duration::from_millis(300);
        }
        assert_eq!(balancer.pick(now, 0), Ok(mesh.clone()), "while they pause");
        balancer.failed(&mesh, now, 0);
        assert!(balancer.pick(now, 0).is_err());
        now += LONGEST_PAUSE;
        assert_ne!(balancer.pick(now, 0), Ok(mesh.clone()), "the servers come first");
        assert_eq!(balancer.servers(), [a, b], "it is no address that anybody was told");
    }

    #[test]
    fn what_is_learnt_replaces_what_was_learnt_and_not_what_was_configured() {
        let mut balancer = Balancer::new(vec![address("lb")], &[address("old")]);
        balancer.learn(&[address("new")]);
        assert_eq!(balancer.servers(), [address("lb"), address("new")]);
        balancer.learn(&[]);
        assert_eq!(balancer.servers(), [address("lb"), address("new")], "an empty list is no news");
    }

    #[test]
    fn agents_spread() {
        let balancer = Balancer::new(vec![], &[address("a"), address("b"), address("c")]);
        let picked: std::collections::HashSet<_> = (0..30).map(|n| balancer.pick(Duration::ZERO, n).unwrap()).collect();
        assert_eq!(picked.len(), 3);
    }
}
