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

    /// Something came, or nothing did: then whoever else wants this core has it first, such as who is to send the next packet.
    pub(super) fn looked(&mut self, found: bool, now_us: u64, stats: &WorkerStats) {
        if self.at_most_us == 0 {
            return;
        }
        if !found {
            if self.goes_on(now_us) {
                std::thread::yield_now();
            }
            return;
        }
        let bytes = stats.flow.tun_rx_bytes.get() + stats.flow.udp_rx_bytes.get();
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
        spin.looked(true, 10_100, &stats);
        assert!(!spin.goes_on(10_100), "nothing came shortly before");
        spin.looked(true, 10_149, &stats);
        spin.looked(false, 10_198, &stats);
        assert!(spin.goes_on(10_198));
        assert!(!spin.goes_on(10_199), "what found nothing does not count");
        spin.looked(true, 10_250, &stats);
        assert!(!spin.goes_on(10_250), "that was too long");
        spin.looked(true, 10_260, &stats);
        assert!(spin.goes_on(10_309) && !spin.goes_on(10_310));

        stats.flow.tun_rx_bytes.add(65_000);
        spin.looked(true, 10_300, &stats);
        assert!(!spin.goes_on(10_300), "bulk traffic");
        stats.flow.udp_rx_bytes.add(52);
        spin.looked(true, 10_330, &stats);
        assert!(!spin.goes_on(10_330), "and what is between");
        spin.looked(true, 11_290, &stats);
        spin.looked(true, 11_310, &stats);
        assert!(spin.goes_on(11_310), "it is over");

        let mut off = Spin::new(Duration::ZERO);
        off.looked(true, 100, &stats);
        off.looked(true, 100, &stats);
        assert!(!off.goes_on(100));
    }
}
