//! Round trip and loss on each of the ways to a peer: outer source ports, or lanes of its tunnel.
//!
//! A short probe twice a second, on one way after the other. Takes `now` in microseconds, and says what to send and when. Does
//! not know what carries it.

/// Between two probes.
const EVERY_US: u64 = 500_000;
/// A probe that is not answered by then is lost.
const LOST_US: u64 = 1_500_000;
/// Probes that are out at most.
const OUT: usize = 4;
/// More ways are not told apart.
const WAYS: usize = 16;

/// What was measured on one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Way {
    /// The smoothed round trip in microseconds; 0: not measured.
    pub round_trip_us: u32,
    /// The last probes, newest in the lowest bit; 1: lost.
    lost: u64,
    /// How many of them there are.
    probes: u8,
}

impl Way {
    /// How many of a thousand probes were lost, of the last 64; `None` before there were eight.
    pub fn lost_permille(&self) -> Option<u32> {
        (self.probes >= 8).then(|| self.lost.count_ones() * 1000 / u32::from(self.probes))
    }

    fn count(&mut self, lost: bool) {
        self.lost = self.lost << 1 | u64::from(lost);
        self.probes = self.probes.saturating_add(1).min(64);
    }

    fn took(&mut self, us: u64) {
        let us = u32::try_from(us).unwrap_or(u32::MAX).max(1);
        // one eighth of each new sample, as TCP does it (RFC 6298 §2.3)
        self.round_trip_us = match self.round_trip_us {
            0 => us,
            before => (before - before / 8).saturating_add(us / 8).max(1),
        };
    }
}

/// All ways to one peer.
#[derive(Debug)]
pub struct Meter {
    ways: Vec<Way>,
    all: Way,
    out: [Option<Out>; OUT],
    next_us: u64,
    numbers: u64,
}

#[derive(Debug, Clone, Copy)]
struct Out {
    number: u64,
    way: usize,
    sent_us: u64,
}

impl Meter {
    /// Nothing is known. `seed` keeps numbers of probes from being those of a former run.
    pub fn new(seed: u64) -> Self {
        let numbers = seed.wrapping_mul(0xd1b5_4a32_d192_ed03);
        Meter { ways: Vec::new(), all: Way::default(), out: [None; OUT], next_us: 0, numbers }
    }

    /// Lets time pass. Returns number and way of the probe that is due, if one is. There are so many ways.
    pub fn turn(&mut self, now_us: u64, ways: usize) -> Option<(u64, u16)> {
        for out in &mut self.out {
            if let Some(Out { way, .. }) = out.take_if(|out| now_us >= out.sent_us + LOST_US) {
                self.all.count(true);
                self.ways.get_mut(way).into_iter().for_each(|way| way.count(true));
            }
        }
        let ways = ways.clamp(1, WAYS);
        self.ways.resize(ways, Way::default());
        if now_us < self.next_us {
            return None;
        }
        let free = self.out.iter_mut().find(|out| out.is_none())?;
        self.next_us = now_us + EVERY_US;
        self.numbers = self.numbers.wrapping_add(1);
        let way = (self.numbers % ways as u64) as usize;
        *free = Some(Out { number: self.numbers, way, sent_us: now_us });
        Some((self.numbers, way as u16))
    }

    /// Takes an answer. Returns whether it was to one of these probes.
    pub fn answered(&mut self, now_us: u64, number: u64) -> bool {
        let mut taken = self.out.iter_mut().filter_map(|out| out.take_if(|out| out.number == number));
        let Some(Out { way, sent_us, .. }) = taken.next() else { return false };
        let took = now_us.saturating_sub(sent_us);
        self.all.count(false);
        self.all.took(took);
        if let Some(way) = self.ways.get_mut(way) {
            way.count(false);
            way.took(took);
        }
        true
    }

    /// The peer is not there: what is out says nothing.
    pub fn rest(&mut self) {
        self.out = [None; OUT];
    }

    /// When [`Meter::turn`] has something to do.
    pub fn next_deadline(&self) -> u64 {
        self.next_us
    }

    /// What was measured, all ways together.
    pub fn all(&self) -> Way {
        self.all
    }

    /// What was measured on each way.
    pub fn ways(&self) -> &[Way] {
        &self.ways
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000;

    #[test]
    fn ways_are_measured_apart() {
        let mut meter = Meter::new(3);
        let mut sent = 0;
        for now in (0..120_000).map(|ms| ms * MS) {
            if let Some((number, way)) = meter.turn(now, 4) {
                sent += 1;
                let lost = way == 2 || (way == 1 && (number / 4).is_multiple_of(4));
                if !lost {
                    let then = now + 100 * (u64::from(way) + 1);
                    assert!(meter.answered(then, number) && !meter.answered(then, number), "once");
                }
            }
        }
        assert_eq!(sent, 240, "twice a second");
        let ways: Vec<_> = meter.ways().iter().map(|way| (way.round_trip_us, way.lost_permille().unwrap())).collect();
        assert_eq!((ways[0], ways[2], ways[3]), ((100, 0), (0, 1000), (400, 0)));
        assert!((200..=280).contains(&ways[1].1), "{ways:?}");
        assert!((280..=340).contains(&meter.all().lost_permille().unwrap()), "{:?}", meter.all());
    }

    #[test]
    fn nothing_is_said_before_there_is_something_to_say() {
        let mut meter = Meter::new(3);
        assert_eq!((meter.all().lost_permille(), meter.ways().len()), (None, 0));
        meter.turn(0, 2);
        meter.rest();
        (0..100).for_each(|ms| _ = meter.turn(ms * MS, 0));
        assert_eq!(meter.all(), Way::default(), "what is out at the end of a session is not lost");
        assert!(!meter.answered(0, 0));
    }
}
