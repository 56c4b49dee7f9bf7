//! The path MTU to one peer: Packetization Layer Path MTU Discovery for datagrams (DPLPMTUD, RFC 8899).
//!
//! Owns the state machine of RFC 8899 §5.2 and the search; every call takes `now` in microseconds, and
//! [`PathMtu::next_deadline`] says when the next one is due. Sizes are those of inner IP packets, the headers around them
//! being the same for all. Does not know what carries probes, nor who enforces what was found.
//!
//! Where it differs from the RFC, it is for traffic that is there already, and must not stall for seconds:
//!
//! - The size that follows from this node's own link is used until it proves wrong, instead of beginning with the base size
//!   (§5.2): every sender would be told a small MTU, and remember it for minutes.
//! - PROBE_TIMER is four round trips, within 0.12 and 3 s; §5.1.1 says never below 1 s, for who knows nothing of the path. Here
//!   the round trip is measured, BFD says all the while whether the peer is there, tries that nothing else arrived beside do
//!   not count, and a late answer to any of a probe's tries does. Probes stay a round trip apart, as §3 demands.
//! - What is too long by a router's word is not set back to the base size at once (§4.6.2, a SHOULD): anybody on the path could
//!   forge that. The size in use is probed first.

/// Probes of one size that go unanswered in a row before the size counts as too large (RFC 8899 §5.1.2, MAX_PROBES).
const MAX_PROBES: u8 = 3;
/// The same for a size that is in use: more than MAX_PROBES, as §4.3 has it.
const MAX_CONFIRMS: u8 = 4;
/// PROBE_TIMER (RFC 8899 §5.1.1; see above), in microseconds: four round trips, within these.
const PROBE_US: (u64, u64) = (120_000, 3_000_000);
/// Who sent nothing of any size for so long is not there, or not reached: two packets of BFD as it is by default.
const SILENCE_US: u64 = 300_000;
/// CONFIRMATION_TIMER: how often a size that packets travel with is confirmed (black-hole detection, RFC 8899 §4.3).
const CONFIRM_US: u64 = 400_000;
/// PMTU_RAISE_TIMER: how often something larger is tried. The RFC's ten minutes are for who pays for each probe.
const RAISE_US: u64 = 10_000_000;
/// How often the base size is tried where not even that arrives.
const ERROR_US: u64 = 1_000_000;
/// What was confirmed so recently is not doubted again because of what somebody says.
const HINT_US: u64 = 100_000;
/// For how long a result is good without a session.
const KEEP_US: u64 = 600_000_000;
/// After a probe's first try answers to any of its tries count; so far apart are the numbers of two probes.
const TRIES: u64 = 16;

/// Sizes of inner packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// What every path takes (MIN_PLPMTU).
    pub min: u16,
    /// What nearly every path takes (BASE_PLPMTU).
    pub base: u16,
    /// What this node's own link takes (MAX_PLPMTU).
    pub max: u16,
    /// Bytes around an inner packet on the underlay.
    pub overhead: u16,
}

impl Bounds {
    /// For paths whose outer headers take `overhead` bytes, and `max` as longest inner packet. The base size is the minimum
    /// MTU of IPv6 (1,280), over IPv4 too, where RFC 8899 §5.1.2 recommends 1,200; the minimum is that same or, over IPv4, what
    /// every host is able to reassemble (576), not the 68 bytes that §5.1.2 allows.
    pub fn new(overhead: u16, max: u16, v6: bool) -> Self {
        let inner = |outer: u16| outer.saturating_sub(overhead).min(max);
        Bounds { min: inner(if v6 { 1280 } else { 576 }), base: inner(1280), max, overhead }
    }
}

/// RFC 8899 §5.2, figure 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The peer is not there, or does not answer probes: what follows from this node's own link is used.
    Disabled,
    /// What was used does not arrive any more; whether the base size does is being found out.
    Base,
    /// Something larger is being looked for.
    Searching,
    /// The largest size is known.
    SearchComplete,
    /// Not even the base size arrives.
    Error,
}

/// A probe to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// What its answer has to quote.
    pub number: u64,
    /// Bytes of its inner IP packet.
    pub size: u16,
}

/// What is known of the circumstances at a turn.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances {
    /// Sizes.
    pub bounds: Bounds,
    /// The peer is there and answers probes.
    pub able: bool,
    /// The smoothed round trip, 0 where it is not known.
    pub round_trip_us: u32,
    /// When a packet of any size came last: who is silent altogether says nothing about sizes.
    pub heard_us: u64,
}

/// The path to a peer.
#[derive(Debug)]
pub struct PathMtu {
    state: State,
    bounds: Bounds,
    current: u16,
    /// The smallest size that failed; `None`: none did.
    failed: Option<u16>,
    /// One more than `current` was tried in this search.
    edge: bool,
    hint: Option<u16>,
    /// Any probe was ever answered.
    proved: bool,
    probe: Option<Probe>,
    confirm_us: u64,
    raise_us: u64,
    keep_until_us: u64,
    sent_bytes: u64,
    black_holes: u32,
    confirmed_us: Option<u64>,
    timeout_us: u64,
    numbers: u64,
}

#[derive(Debug, Clone, Copy)]
struct Probe {
    size: u16,
    number: u64,
    tries: u8,
    sent_us: u64,
}

impl PathMtu {
    /// Nothing is known. `seed` keeps numbers of probes from being those of a former run.
    pub fn new(seed: u64) -> Self {
        PathMtu {
            state: State::Disabled,
            bounds: Bounds { min: 0, base: 0, max: 0, overhead: 0 },
            current: 0,
            failed: None,
            edge: false,
            hint: None,
            proved: false,
            probe: None,
            confirm_us: 0,
            raise_us: 0,
            keep_until_us: 0,
            sent_bytes: 0,
            black_holes: 0,
            confirmed_us: None,
            timeout_us: PROBE_US.0,
            numbers: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }
    }

    /// The state.
    pub fn state(&self) -> State {
        self.state
    }

    /// How often what was used stopped arriving.
    pub fn black_holes(&self) -> u32 {
        self.black_holes
    }

    /// When a probe of the size in use was answered last.
    pub fn confirmed_us(&self) -> Option<u64> {
        self.confirmed_us
    }

    /// The longest inner packet that the path takes; `None` where nobody measures, so that what follows from this node's
    /// own link holds.
    pub fn limit(&self) -> Option<u16> {
        (self.proved && self.current > 0).then_some(self.current)
    }

    /// Whether the path takes less than this node's own link.
    pub fn is_narrow(&self) -> bool {
        self.limit().is_some_and(|limit| limit < self.bounds.max)
    }

    /// Lets time pass. Returns the probe that is due, if any. `sent_bytes` counts what was sent to the peer; it is asked for
    /// only when it matters.
    pub fn turn(&mut self, now_us: u64, now: Circumstances, sent_bytes: impl FnOnce() -> u64) -> Option<Ask> {
        if !now.able {
            self.rest(now_us);
            return None;
        }
        if self.bounds != now.bounds {
            self.rebound(now_us, now.bounds);
        }
        if self.state == State::Disabled {
            self.begin(now_us);
        }
        self.timeout_us = (4 * u64::from(now.round_trip_us)).clamp(PROBE_US.0, PROBE_US.1);
        if let Some(probe) = self.probe {
            if now_us < probe.sent_us + self.timeout_us {
                return None;
            }
            return self.unanswered(now_us, probe, now.heard_us);
        }
        let size = self.due(now_us, sent_bytes)?;
        Some(self.ask(now_us, size))
    }

    /// Takes an answer. Returns whether it was to a probe that is out.
    pub fn answered(&mut self, now_us: u64, number: u64, size: u16) -> bool {
        let Some(probe) = self.probe else { return false };
        let tries = number.wrapping_sub(probe.number);
        if tries > u64::from(probe.tries) || size < probe.size {
            return false;
        }
        self.probe = None;
        self.proved = true;
        if probe.size < self.current {
            return true; // of a size that is not in question any more
        }
        match self.state {
            State::Disabled => {}
            State::SearchComplete => {
                self.confirmed(now_us);
                self.hint = None; // who said otherwise was wrong
                if self.current < self.bounds.max && self.raise_us == 0 {
                    self.search();
                }
            }
            State::Base | State::Error | State::Searching => {
                let found = self.state != State::Searching;
                self.current = probe.size;
                self.confirmed(now_us);
                if found {
                    self.search();
                }
            }
        }
        true
    }

    /// Somebody on the path says that packets over `size` bytes do not fit: Fragmentation Needed or Packet Too Big. Nobody
    /// authenticates that; what is in use is confirmed now rather than later, and what was said is tried first
    /// (RFC 8899 §4.6.2).
    pub fn hint(&mut self, now_us: u64, size: u16) {
        if self.state == State::SearchComplete && size < self.current {
            self.hint = Some(size);
            let soon = self.confirmed_us.map_or(now_us, |us| now_us.max(us + HINT_US));
            self.confirm_us = self.confirm_us.min(soon);
            self.sent_bytes = 0;
        }
    }

    /// When [`PathMtu::turn`] has something to do.
    pub fn next_deadline(&self) -> u64 {
        if let Some(probe) = self.probe {
            return probe.sent_us + self.timeout_us;
        }
        match self.state {
            State::Disabled => u64::MAX,
            State::Base | State::Searching => 0,
            State::SearchComplete => self.confirm_us.min(self.raise()),
            State::Error => self.confirm_us,
        }
    }

    fn raise(&self) -> u64 {
        if self.current < self.bounds.max { self.raise_us } else { u64::MAX }
    }

    /// Nobody is there to ask. What was found is kept for a while: it is the best guess when the peer is back.
    pub fn rest(&mut self, now_us: u64) {
        if self.state != State::Disabled {
            self.state = State::Disabled;
            self.probe = None;
            self.keep_until_us = now_us + KEEP_US;
        } else if now_us >= self.keep_until_us {
            self.proved = false;
        }
    }

    fn begin(&mut self, now_us: u64) {
        if !self.proved {
            self.current = self.bounds.max;
        }
        self.state = State::SearchComplete;
        (self.failed, self.edge, self.hint) = (None, false, None);
        // to be confirmed whether or not there is traffic
        (self.confirm_us, self.raise_us, self.sent_bytes) = (now_us, 0, 0);
    }

    /// This node's own link has another MTU, or what goes around a packet has changed.
    fn rebound(&mut self, now_us: u64, bounds: Bounds) {
        let outer = self.current.saturating_add(self.bounds.overhead);
        let kept = outer.saturating_sub(bounds.overhead).clamp(bounds.min, bounds.max);
        // what only the own link has limited is limited by it still
        self.current = if self.current >= self.bounds.max { bounds.max } else { kept };
        self.bounds = bounds;
        self.probe = None;
        if self.state != State::Disabled {
            self.begin(now_us);
        }
    }

    /// What size is to be probed now.
    fn due(&mut self, now_us: u64, sent_bytes: impl FnOnce() -> u64) -> Option<u16> {
        match self.state {
            State::Disabled => None,
            State::Base => Some(self.bounds.base),
            State::Error => (now_us >= self.confirm_us).then_some(self.bounds.base),
            State::Searching => self.candidate(now_us),
            State::SearchComplete if now_us >= self.confirm_us => {
                let bytes = sent_bytes();
                let forced = self.sent_bytes == 0;
                // as many bytes as one packet in question has, or none of them left
                let used = bytes.saturating_sub(self.sent_bytes) > u64::from(self.bounds.base);
                self.sent_bytes = bytes.max(1);
                self.confirm_us = now_us + CONFIRM_US;
                (forced || (used && self.current > self.bounds.min)).then_some(self.current)
            }
            State::SearchComplete if now_us >= self.raise() => {
                self.search();
                self.candidate(now_us)
            }
            State::SearchComplete => None,
        }
    }

    fn search(&mut self) {
        self.state = State::Searching;
        self.edge = false;
        // in a later search what failed before is tried again
        if self.raise_us != 0 {
            self.failed = None;
        }
    }

    /// The size to try next: what somebody said, then the largest, then one more than is known (there may be nothing to
    /// find), then the middle. Ends the search where there is none.
    fn candidate(&mut self, now_us: u64) -> Option<u16> {
        let (low, high) = (self.current, self.failed.map_or(self.bounds.max + 1, |failed| failed));
        let next = if high <= low + 1 {
            None
        } else if let Some(hint) = self.hint.take().filter(|hint| (low + 1..high).contains(hint)) {
            Some(hint)
        } else if self.failed.is_none() {
            Some(self.bounds.max)
        } else if !std::mem::replace(&mut self.edge, true) {
            Some(low + 1)
        } else {
            Some(low + (high - low) / 2)
        };
        if next.is_none() {
            self.state = State::SearchComplete;
            self.raise_us = now_us + RAISE_US;
            self.confirm_us = self.confirm_us.max(now_us);
        }
        next
    }

    fn confirmed(&mut self, now_us: u64) {
        self.confirmed_us = Some(now_us);
        self.confirm_us = now_us + CONFIRM_US;
    }

    fn ask(&mut self, now_us: u64, size: u16) -> Ask {
        self.numbers = self.numbers.wrapping_add(TRIES);
        let probe = Probe { size, number: self.numbers, tries: 0, sent_us: now_us };
        self.probe = Some(probe);
        Ask { number: probe.number, size }
    }

    /// A probe was not answered in time: once more, or its size is too large.
    fn unanswered(&mut self, now_us: u64, probe: Probe, heard_us: u64) -> Option<Ask> {
        let most = match self.state {
            State::SearchComplete | State::Base => MAX_CONFIRMS,
            // nobody waits for it, and meanwhile what is in use is not confirmed
            State::Searching if self.raise_us != 0 => 1,
            _ => MAX_PROBES,
        };
        // where nothing else arrived either, that says nothing about the size
        let counts = u8::from(heard_us + SILENCE_US >= now_us);
        if probe.tries + counts < most {
            let again = Probe { tries: probe.tries + counts, sent_us: now_us, ..probe };
            self.probe = Some(again);
            return Some(Ask { number: probe.number + u64::from(again.tries), size: probe.size });
        }
        self.probe = None;
        match self.state {
            State::Disabled => return None,
            State::Searching => self.failed = Some(probe.size),
            State::Base | State::Error => {
                if !self.proved {
                    // it does not answer probes of any size
                    self.state = State::SearchComplete;
                    self.current = self.bounds.max;
                    (self.confirm_us, self.raise_us) = (now_us + KEEP_US, u64::MAX);
                    return None;
                }
                self.state = State::Error;
                self.current = self.bounds.min;
                self.confirm_us = now_us + ERROR_US;
                return None;
            }
            State::SearchComplete => self.black_hole(now_us),
        }
        let size = self.due(now_us, || 0)?;
        Some(self.ask(now_us, size))
    }

    /// The size in use does not arrive any more (RFC 8899 §4.3).
    fn black_hole(&mut self, now_us: u64) {
        self.black_holes += u32::from(self.proved);
        self.failed = Some(self.current);
        (self.raise_us, self.edge) = (0, false);
        if self.current <= self.bounds.base {
            self.state = State::Error;
            self.current = self.bounds.min;
            self.confirm_us = now_us;
        } else {
            self.state = State::Base;
            self.current = self.bounds.base;
        }
    }
}

#[cfg(test)]
mod tests;
