//! When a worker looks for the next packet for a while before it sleeps: who is awake when a packet comes need not be woken,
//! which takes longer than most of a packet's journey.
//!
//! That pays where packets follow each other closely, so it is done where the last two did, as KVM does for processors that
//! halt (Documentation/virt/kvm/halt-polling.rst), and where they are few: of bulk traffic the more gathers the longer a
//! worker sleeps, and those who send and receive it have the core meanwhile.

use std::time::Duration;

use crate::engine::stats::WorkerStats;

/// Bytes of one round that tell bulk traffic, and for how long they do.
const BULK_BYTES: u64 = 16 << 10;
const BULK_US: u64 = 1_000;

/// Whether one worker goes on looking.
pub(super) struct Spin {
    at_most_us: u64,
    last_us: u64,
    until_us: u64,
    bytes: u64,
    calm_from_us: u64,
}

impl Spin {
    pub(super) fn new(busy_poll: Duration) -> Self {
        Spin { at_most_us: busy_poll.as_micros() as u64, last_us: 0, until_us: 0, bytes: 0, calm_from_us: 0 }
    }

    /// After each round: if nothing came, whoever else wants this core has it first, such as who is to send the next packet.
    pub(super) fn looked(&mut self, now_us: u64, stats: &WorkerStats) {
        if self.at_most_us == 0 {
            return;
        }
        let bytes = stats.flow.tun_rx_bytes.get() + stats.flow.udp_rx_bytes.get();
        if bytes == self.bytes {
            if self.goes_on(now_us) {
                std::thread::yield_now();
            }
            return;
        }
        if bytes - self.bytes >= BULK_BYTES {
            self.calm_from_us = now_us + BULK_US;
        }
        self.bytes = bytes;
        let close = now_us < self.last_us + self.at_most_us;
        self.until_us = if close && now_us >= self.calm_from_us { now_us + self.at_most_us } else { 0 };
        self.last_us = now_us;
    }

    /// Whether the worker does not sleep yet.
    pub(super) fn goes_on(&self, now_us: u64) -> bool {
        now_us < self.until_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_polls_busily_where_few_packets_follow_each_other_closely() {
        let stats = WorkerStats::default();
        let mut spin = Spin::new(Duration::from_micros(50));
        let mut round = |now_us, received| {
            stats.flow.udp_rx_bytes.add(received);
            spin.looked(now_us, &stats);
            [0, 49, 50].map(|later| spin.goes_on(now_us + later))
        };
        assert_eq!(round(10_100, 90), [false; 3], "nothing came shortly before");
        assert_eq!(round(10_101, 0), [false; 3]);
        assert_eq!(round(10_149, 90), [true, true, false]);
        assert_eq!(round(10_198, 0), [true, false, false], "what found nothing does not count");
        assert_eq!(round(10_250, 90), [false; 3], "that was too long");
        assert_eq!(round(10_260, 90), [true, true, false]);
        assert_eq!(round(10_300, 65_000), [false; 3], "bulk traffic");
        assert_eq!(round(10_330, 90), [false; 3], "and what is between");
        assert_eq!(round(11_290, 90), [false; 3]);
        assert_eq!(round(11_310, 90), [true, true, false], "it is over");
    }

    #[test]
    fn off_is_off() {
        let stats = WorkerStats::default();
        let mut off = Spin::new(Duration::ZERO);
        for now_us in [10_000, 10_000] {
            stats.flow.udp_rx_bytes.add(90);
            off.looked(now_us, &stats);
            assert!(!off.goes_on(now_us));
        }
    }
}
