//! When super-packets for this node itself may be longer than 64 KiB (BIG TCP). One for all workers.

use std::sync::atomic::{AtomicU64, Ordering};

/// For how long they stay short when a long one was refused: at first, and at most. It doubles each time.
const REST_US: u64 = 10_000_000;
const LONGEST_REST_US: u64 = 3_600_000_000;
const NEVER: u64 = u64::MAX;

/// The switch. Times are in microseconds, of the clock that tells [`super::inbound::Inbound`] when it received.
#[derive(Debug)]
pub struct BigTcp {
    from_us: AtomicU64,
    rest_us: AtomicU64,
}

/// How things are with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// They may be long.
    On,
    /// One was refused: they may be long again in so many microseconds.
    Rests(u64),
    /// They never may.
    Off,
}

/// Never on.
impl Default for BigTcp {
    fn default() -> Self {
        BigTcp { from_us: AtomicU64::new(NEVER), rest_us: AtomicU64::new(REST_US) }
    }
}

impl BigTcp {
    /// On until one is refused.
    pub fn on() -> Self {
        BigTcp { from_us: AtomicU64::new(0), ..BigTcp::default() }
    }

    /// Whether they may be long now.
    #[inline]
    pub fn may(&self, now_us: u64) -> bool {
        now_us >= self.from_us.load(Ordering::Relaxed)
    }

    /// The kernel refused a long one: for want of memory in large pieces, or, `for_good`, since it takes none.
    pub fn refused(&self, now_us: u64, for_good: bool) {
        let from_us = self.from_us.load(Ordering::Relaxed);
        if now_us < from_us {
            return; // one of the same batch, or another worker's
        }
        let rest_us = self.rest_us.load(Ordering::Relaxed);
        let until_us = if for_good { NEVER } else { now_us + rest_us };
        if self.from_us.compare_exchange(from_us, until_us, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.rest_us.store(LONGEST_REST_US.min(2 * rest_us), Ordering::Relaxed);
        }
    }

    /// How things are now.
    pub fn state(&self, now_us: u64) -> State {
        match self.from_us.load(Ordering::Relaxed) {
            NEVER => State::Off,
            from_us if now_us < from_us => State::Rests(from_us - now_us),
            _ => State::On,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rests_longer_each_time_and_one_batch_counts_once() {
        let big = BigTcp::on();
        assert_eq!((big.may(0), big.state(0)), (true, State::On));
        for _ in 0..3 {
            big.refused(5, false);
        }
        assert_eq!(big.state(5), State::Rests(10_000_000));
        assert!(!big.may(10_000_004) && big.may(10_000_005));
        big.refused(20_000_000, false);
        assert_eq!(big.state(20_000_000), State::Rests(20_000_000));
        let mut now_us = 0;
        for _ in 0..20 {
            now_us += 4_000_000_000;
            big.refused(now_us, false);
        }
        assert_eq!(big.state(now_us), State::Rests(3_600_000_000));
    }

    #[test]
    fn it_can_be_off_for_good() {
        let big = BigTcp::on();
        big.refused(1, true);
        big.refused(2, false);
        assert_eq!((big.may(NEVER - 1), big.state(3)), (false, State::Off));
        assert_eq!(BigTcp::default().state(0), State::Off);
    }
}
