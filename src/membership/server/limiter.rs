//! How often a source may guess. Pure.
//!
//! Only failures count, and whoever shows a good token is never asked here, so a guesser locks nobody out but those who
//! guess from its own address. IPv6 sources count by /64, since a host has all of one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// Failures that a source has at once.
const BURST: f64 = 20.0;
/// One more each so many seconds.
const REFILL: f64 = 3.0;
/// Sources that are remembered.
const MAX_SOURCES: usize = 20_000;

#[derive(Debug, Default)]
pub(crate) struct Limiter {
    sources: HashMap<u64, Failures>,
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: f64,
    at: Duration,
}

impl Failures {
    fn now(&self, now: Duration) -> f64 {
        (self.count - now.saturating_sub(self.at).as_secs_f64() / REFILL).max(0.0)
    }
}

impl Limiter {
    /// Whether an attempt from there is looked at.
    pub(crate) fn allows(&self, source: IpAddr, now: Duration) -> bool {
        self.sources.get(&key(source)).is_none_or(|failures| failures.now(now) + 1.0 <= BURST)
    }

    /// An attempt from there failed.
    pub(crate) fn failed(&mut self, source: IpAddr, now: Duration) {
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&key(source)) {
            self.sources.retain(|_, failures| failures.now(now) > 0.0);
            if self.sources.len() >= MAX_SOURCES {
                self.sources.clear();
            }
        }
        let failures = self.sources.entry(key(source)).or_insert(Failures { count: 0.0, at: now });
        *failures = Failures { count: (failures.now(now) + 1.0).min(BURST), at: now };
    }
}

fn key(source: IpAddr) -> u64 {
    match source.to_canonical() {
        IpAddr::V4(v4) => u64::from(u32::from(v4)),
        IpAddr::V6(v6) => (u128::from(v6) >> 64) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guesser_is_slowed_down_and_nobody_else() {
        let (bad, good): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let mut limiter = Limiter::default();
        let mut looked_at = 0;
        for ms in 0..60_000 {
            let now = Duration::from_millis(ms);
            if limiter.allows(bad, now) {
                looked_at += 1;
                limiter.failed(bad, now);
            }
        }
        assert!((20..=45).contains(&looked_at), "{looked_at} in a minute");
        assert!(limiter.allows(good, Duration::from_secs(60)));
        assert!(limiter.allows(bad, Duration::from_secs(130)), "and it may again, later");
    }

    #[test]
    fn a_prefix_is_one_source_and_memory_is_bounded() {
        let mut limiter = Limiter::default();
        for n in 0..100u128 {
            limiter.failed(IpAddr::from((0x2001_0db8_u128 << 96 | n).to_be_bytes()), Duration::ZERO);
        }
        assert!(!limiter.allows("2001:db8::ffff".parse().unwrap(), Duration::ZERO));
        assert!(limiter.allows("2001:db8:1::1".parse().unwrap(), Duration::ZERO));
        for n in 0..100_000u32 {
            limiter.failed(IpAddr::from(n.to_be_bytes()), Duration::ZERO);
        }
        assert!(limiter.sources.len() <= MAX_SOURCES);
    }
}
