//! When a worker looks for the next packet for a while before it sleeps: who is awake when a packet comes need not be woken,
//! which takes longer than most of a packet's journey.
//!
//! That pays where packets follow each other closely, so it is done where the last two did, as KVM does for processors that
//! halt (Documentation/virt/kvm/halt-polling.rst), and where they are few: of bulk traffic the more gathers the longer a
//! worker sleeps, and those who send and receive it have the core meanwhile.
//!
//! Nor where others want the core for long. Linux has who yields pay with what was left of its slice (`yield_task_fair`), and it
//! has the core back when those others are through; who sleeps is let in at once when it is woken.

use std::time::{Duration, Instant};

use crate::engine::stats::WorkerStats;

/// Bytes of one round that tell bulk traffic, and for how long they do.
const BULK_BYTES: u64 = 16 << 10;
const BULK_US: u64 = 1_000;
/// A thread that yielded and had the core back only after so long has lost it, in microseconds.
const LOST_US: u64 = 100;
/// Who lost it so often within so long sleeps instead of looking, for a while, in microseconds. Between short connections, whose
/// ends take turns with the worker on its core, it was lost 20 times a second; beside a bulk stream 500 times; beside a program
/// that computes each time, for 4 ms. A single loss tells nothing, however long: the machine may have been away.
const LOSSES: u32 = 4;
const WINDOW_US: u64 = 20_000;
const REST_US: u64 = 200_000;

/// Whether one worker goes on looking.
pub(super) struct Spin {
    at_most_us: u64,
    last_us: u64,
    until_us: u64,
    bytes: u64,
    calm_from_us: u64,
    /// How often it lost the core, and since when that is counted; `None`: it does not matter.
    lost: Option<(u32, u64)>,
}

impl Spin {
    /// `for_bulk`: the thread has nothing but bulk traffic, and goes on looking wherever others want its core.
    pub(super) fn new(busy_poll: Duration, for_bulk: bool) -> Self {
        let lost = (!for_bulk).then_some((0, 0));
        Spin { at_most_us: busy_poll.as_micros() as u64, last_us: 0, until_us: 0, bytes: 0, calm_from_us: 0, lost }
    }

    /// After each round: if nothing came, whoever else wants this core has it first, such as who is to send the next packet.
    pub(super) fn looked(&mut self, now_us: u64, stats: &WorkerStats) {
        if self.at_most_us == 0 {
            return;
        }
        let bytes = stats.flow.tun_rx_bytes.get() + stats.flow.udp_rx_bytes.get();
        if bytes == self.bytes {
            if self.goes_on(now_us) {
                let before = Instant::now();
                std::thread::yield_now();
                self.yielded(now_us, before.elapsed().as_micros() as u64);
            }
            return;
        }
        if bytes - self.bytes >= BULK_BYTES {
            self.calm_from_us = self.calm_from_us.max(now_us + BULK_US);
        }
        self.bytes = bytes;
        let close = now_us < self.last_us + self.at_most_us;
        self.until_us = if close && now_us >= self.calm_from_us { now_us + self.at_most_us } else { 0 };
        self.last_us = now_us;
    }

    /// Somebody else had the core for so long.
    fn yielded(&mut self, now_us: u64, took_us: u64) {
        let Some((losses, since_us)) = self.lost.as_mut().filter(|_| took_us >= LOST_US) else { return };
        if now_us > *since_us + WINDOW_US {
            (*losses, *since_us) = (0, now_us);
        }
        *losses += 1;
        if *losses >= LOSSES {
            *losses = 0;
            self.calm_from_us = now_us + took_us + REST_US;
            self.until_us = 0;
        }
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
        let mut spin = Spin::new(Duration::from_micros(50), false);
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
    fn who_loses_its_core_for_long_sleeps_for_a_while() {
        let stats = WorkerStats::default();
        let looks = |spin: &mut Spin, now_us: u64| {
            for packet_us in [now_us, now_us + 20] {
                stats.flow.udp_rx_bytes.add(90);
                spin.looked(packet_us, &stats);
            }
            spin.goes_on(now_us + 30)
        };
        let mut spin = Spin::new(Duration::from_micros(100), false);
        for now_us in [10_000, 12_000, 14_000, 16_000] {
            spin.yielded(now_us, LOST_US - 1);
            assert!(looks(&mut spin, now_us), "applications take their turns");
        }
        for now_us in [20_000, 25_000, 30_000] {
            spin.yielded(now_us, 4_000);
            assert!(looks(&mut spin, now_us + 4_000), "not yet");
        }
        spin.yielded(50_000, 250);
        assert!(looks(&mut spin, 50_300), "that was in another while");
        for now_us in [51_000, 52_000, 53_000] {
            spin.yielded(now_us, 250);
        }
        assert!(!looks(&mut spin, 53_300));
        assert!(!looks(&mut spin, 53_000 + REST_US));
        stats.flow.udp_rx_bytes.add(BULK_BYTES);
        spin.looked(53_100 + REST_US, &stats);
        assert!(!looks(&mut spin, 53_260 + REST_US), "bulk traffic does not end it before its time");
        assert!(looks(&mut spin, 54_200 + REST_US));

        let mut for_bulk = Spin::new(Duration::from_micros(100), true);
        looks(&mut for_bulk, 5_000); // counts from here
        (10..15).for_each(|ms| for_bulk.yielded(ms * 1_000, 4_000));
        assert!(looks(&mut for_bulk, 18_100));
    }

    #[test]
    fn off_is_off() {
        let stats = WorkerStats::default();
        let mut off = Spin::new(Duration::ZERO, false);
        for now_us in [10_000, 10_000] {
            stats.flow.udp_rx_bytes.add(90);
            off.looked(now_us, &stats);
            assert!(!off.goes_on(now_us));
        }
    }
}
