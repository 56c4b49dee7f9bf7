//! What is shared of one peer's liveness: the session, who looks after it, and the verdict that packets are judged by.
//!
//! Decides when a session is wanted and what its end means for traffic. The verdict is read without a lock; the session
//! is locked for as long as one packet or one timer takes. Knows no table and sends nothing.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::machine::{Event, Session, Timers};
use crate::wire::bfd::{Control, Diagnostic, State};

/// How long after the last packet to or from a peer its session is still wanted.
const WANTED_US: u64 = 60_000_000;
/// Under a load that leaves no moment in which everything is received, a death waits so much longer at most: receive
/// queues are shorter than that.
const UNSETTLED_US: u64 = 500_000;
/// A dead peer from which packets come for so long, and not a BFD packet among them, does not speak BFD any more.
const SILENT_US: u64 = 2_000_000;

/// How liveness is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Whether it is. If not, who asks is told so, and holds nobody for dead.
    pub enabled: bool,
    /// What this side wants.
    pub timers: Timers,
    /// The VXLAN network of BFD packets.
    pub vni: u32,
}

/// What is thought of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// It does not speak BFD, or nobody asks.
    Unknown = 0,
    /// It answers.
    Up = 1,
    /// It answered, and does so no more.
    Down = 2,
}

/// One peer's liveness.
#[derive(Debug)]
pub struct Liveness {
    settings: Settings,
    verdict: AtomicU8,
    /// 0: not measured.
    round_trip_us: AtomicU32,
    neighbour: AtomicBool,
    /// The worker that receives the peer's packets, plus one; 0: none came yet.
    owner: AtomicU32,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    session: Session,
    wanted_until_us: u64,
    /// The peer's packets when they were looked at last.
    traffic: Option<u64>,
    died_us: u64,
    heard_us: u64,
}

impl Liveness {
    /// Nothing is known yet. `discriminator` is no other session's.
    pub fn new(settings: Settings, discriminator: u32) -> Self {
        let inner = Inner {
            session: Session::new(settings.timers, discriminator),
            wanted_until_us: 0,
            traffic: None,
            died_us: 0,
            heard_us: 0,
        };
        Liveness {
            settings,
            verdict: AtomicU8::new(Verdict::Unknown as u8),
            round_trip_us: AtomicU32::new(0),
            neighbour: AtomicBool::new(false),
            owner: AtomicU32::new(0),
            inner: Mutex::new(inner),
        }
    }

    /// How it is watched.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// What is thought of the peer.
    pub fn verdict(&self) -> Verdict {
        match self.verdict.load(Ordering::Relaxed) {
            1 => Verdict::Up,
            2 => Verdict::Down,
            _ => Verdict::Unknown,
        }
    }

    /// Whether packets to the peer would be lost.
    #[inline]
    pub fn is_down(&self) -> bool {
        self.verdict.load(Ordering::Relaxed) == Verdict::Down as u8
    }

    /// The smoothed round trip, in microseconds; of an answering peer alone.
    pub fn round_trip_us(&self) -> Option<u32> {
        let known = self.verdict() == Verdict::Up;
        Some(self.round_trip_us.load(Ordering::Relaxed)).filter(|us| known && *us != 0)
    }

    /// Whether the peer is to be watched without traffic too.
    pub fn set_neighbour(&self, neighbour: bool) {
        self.neighbour.store(neighbour, Ordering::Relaxed);
    }

    /// The worker that looks after the session: the one that receives its packets, since nobody else knows whether
    /// any of them is waiting; `first` until some came.
    pub fn owner(&self, first: usize) -> usize {
        (self.owner.load(Ordering::Relaxed) as usize).checked_sub(1).unwrap_or(first)
    }

    /// Takes a packet of the peer's that `worker` received.
    pub fn heard(&self, worker: usize, now_us: u64, packet: &Control) {
        self.own(worker);
        let mut inner = self.lock();
        inner.heard_us = now_us;
        if inner.session.state() == State::AdminDown && !self.wakes(&mut inner, now_us, packet) {
            return;
        }
        let outcome = inner.session.receive(now_us, packet);
        if let Some(took) = outcome.round_trip_us {
            self.smooth(took);
        }
        match outcome.event {
            Event::Nothing | Event::Stray => {}
            Event::Up => {
                // also one that was dead for long, and that nobody has sent anything meanwhile
                inner.wanted_until_us = inner.wanted_until_us.max(now_us + WANTED_US);
                self.set(Verdict::Up);
            }
            // one way only: the other side does not hear us. What does not know our discriminator may be anybody's
            Event::Down(Diagnostic::EXPIRED) if packet.yours != 0 => {
                inner.died_us = now_us;
                self.set(Verdict::Down);
            }
            // it began anew, and packets reach it
            Event::Down(_) => self.set(Verdict::Unknown),
            Event::AdminDown => {
                self.set(Verdict::Unknown);
                inner.wanted_until_us = 0;
            }
        }
    }

    /// Whether a packet makes an idle session begin: the other side wants one, or has one with a former run of ours.
    fn wakes(&self, inner: &mut Inner, now_us: u64, packet: &Control) -> bool {
        // in AdminDown it only learns whom to answer
        let stray = inner.session.receive(now_us, packet).event == Event::Stray;
        let begins = stray || matches!(packet.state, State::Down | State::Init);
        if packet.state == State::AdminDown {
            return false;
        }
        if self.settings.enabled && begins {
            inner.session.start(now_us);
            inner.wanted_until_us = now_us + WANTED_US;
            return true;
        }
        inner.session.repeat(now_us);
        false
    }

    /// Nobody received anything for a while, and now somebody does: what was not heard meanwhile does not count.
    pub fn resume(&self, now_us: u64) {
        self.lock().session.sign_of_life(now_us);
    }

    /// Makes `worker` look after the session, until its packets say otherwise.
    pub fn own(&self, worker: usize) {
        self.owner.store(worker as u32 + 1, Ordering::Relaxed);
    }

    /// Begins a session that is wanted: `traffic` counts the packets to and from the peer. Returns whether it began.
    pub fn look(&self, now_us: u64, traffic: u64) -> bool {
        if !self.settings.enabled {
            return false;
        }
        let mut inner = self.lock();
        if inner.traffic.replace(traffic).unwrap_or(0) != traffic {
            inner.wanted_until_us = now_us + WANTED_US;
        }
        let begins = inner.session.state() == State::AdminDown && self.is_wanted(&inner, now_us);
        if begins {
            inner.session.start(now_us);
        }
        begins
    }

    fn is_wanted(&self, inner: &Inner, now_us: u64) -> bool {
        self.neighbour.load(Ordering::Relaxed) || now_us < inner.wanted_until_us
    }

    /// Lets time pass, and gives what is to be sent to `send`. `settled_us`: whatever came before that time
    /// was received. `last_seen_us`: when anything valid came from the peer. Returns when to come again; `None` while the session is idle.
    pub fn turn(
        &self,
        now_us: u64,
        settled_us: Option<u64>,
        last_seen_us: Option<u64>,
        mut send: impl FnMut(&Control),
    ) -> Option<u64> {
        let mut inner = self.lock();
        if let Some(seen) = last_seen_us {
            inner.session.sign_of_life(seen);
            let mute = seen > inner.died_us + SILENT_US && seen > inner.heard_us + SILENT_US;
            if self.verdict() == Verdict::Down && mute {
                self.set(Verdict::Unknown);
            }
        }
        let sure = |expires: u64| settled_us.is_some_and(|us| us >= expires) || now_us >= expires + UNSETTLED_US;
        if inner.session.expires().is_some_and(sure) && inner.session.expire(now_us) {
            inner.died_us = now_us;
            self.set(Verdict::Down);
        }
        if !self.is_wanted(&inner, now_us) && self.verdict() != Verdict::Down {
            inner.session.stop(now_us);
            self.set(Verdict::Unknown);
        }
        while let Some(packet) = inner.session.send(now_us) {
            send(&packet);
        }
        (inner.session.state() != State::AdminDown).then(|| inner.session.next_deadline())
    }

    fn set(&self, verdict: Verdict) {
        self.verdict.store(verdict as u8, Ordering::Relaxed);
    }

    /// One eighth of each new sample, as TCP does it (RFC 6298 §2.3).
    fn smooth(&self, took_us: u32) {
        let took = took_us.max(1);
        let smoothed = match self.round_trip_us.load(Ordering::Relaxed) {
            0 => took,
            before => (before - before / 8).saturating_add(took / 8).max(1),
        };
        self.round_trip_us.store(smoothed, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // a session is changed by code that does not panic half-way
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000;
    const SETTINGS: Settings =
        Settings { enabled: true, timers: Timers { interval_us: 150_000, multiplier: 6 }, vni: 4095 };

    /// Lets two sides talk from `from` to `to`, in milliseconds, a step a millisecond. A side of which `None` is given is
    /// dead.
    fn talk(sides: [Option<&Liveness>; 2], from: u64, to: u64, seen: Option<u64>) -> usize {
        let mut sent = 0;
        for now in (from..to).map(|ms| ms * MS) {
            let mut under_way = Vec::new();
            for (number, side) in sides.iter().enumerate() {
                let Some(side) = side else { continue };
                side.turn(now, Some(now), seen, |packet| under_way.push((1 - number, *packet)));
            }
            sent += under_way.len();
            for (to, packet) in under_way {
                if let Some(side) = sides[to] {
                    side.heard(0, now, &packet);
                }
            }
        }
        sent
    }

    fn pair() -> [Liveness; 2] {
        [Liveness::new(SETTINGS, 1), Liveness::new(SETTINGS, 1000)]
    }

    #[test]
    fn traffic_wakes_both_sides_and_its_end_lets_both_sleep() {
        let [a, b] = pair();
        let both = [Some(&a), Some(&b)];
        assert_eq!(talk(both, 0, 1_000, None), 0, "nobody asks");
        a.look(1_000 * MS, 1);
        talk(both, 1_000, 3_000, None);
        assert_eq!((a.verdict(), b.verdict()), (Verdict::Up, Verdict::Up));
        assert!(a.round_trip_us().is_some());
        b.look(3_000 * MS, 1);
        talk(both, 3_000, 64_000, None);
        assert_eq!((a.verdict(), b.verdict()), (Verdict::Unknown, Verdict::Unknown));
        assert!(talk(both, 64_000, 200_000, None) <= 2, "and nobody is woken by the other again");
    }

    #[test]
    fn a_death_stays_known_and_ends_with_the_first_round() {
        let [a, b] = pair();
        a.set_neighbour(true);
        a.look(0, 0);
        talk([Some(&a), Some(&b)], 0, 3_000, None);
        talk([Some(&a), None], 3_000, 3_905, None);
        assert!(a.is_down());
        a.set_neighbour(false);
        talk([Some(&a), None], 3_905, 200_000, None);
        assert!(a.is_down(), "also when nothing has been sent for long");
        let reborn = Liveness::new(SETTINGS, 5000);
        talk([Some(&a), Some(&reborn)], 200_000, 201_100, None);
        assert_eq!((a.verdict(), reborn.verdict()), (Verdict::Up, Verdict::Up));
    }

    #[test]
    fn who_restarts_in_time_was_never_dead() {
        let [a, b] = pair();
        a.set_neighbour(true);
        a.look(0, 0);
        talk([Some(&a), Some(&b)], 0, 3_000, None);
        let reborn = Liveness::new(SETTINGS, 5000);
        for ms in 3_300..5_000 {
            talk([Some(&a), Some(&reborn)], ms, ms + 1, None);
            assert!(!a.is_down());
        }
        assert_eq!(
            (a.verdict(), reborn.verdict()),
            (Verdict::Up, Verdict::Up),
            "an idle one is woken by what it missed"
        );
    }

    #[test]
    fn who_never_answers_is_unknown() {
        let [a, _] = pair();
        a.set_neighbour(true);
        a.look(0, 0);
        let sent = talk([Some(&a), None], 0, 60_000, None);
        assert_eq!(a.verdict(), Verdict::Unknown);
        assert!((59..=82).contains(&sent), "once a second or a little more often: {sent}");
    }

    #[test]
    fn who_has_it_switched_off_is_unknown_and_says_so() {
        let [a, b] = pair();
        a.set_neighbour(true);
        a.look(0, 0);
        talk([Some(&a), Some(&b)], 0, 3_000, None);
        let off = Liveness::new(Settings { enabled: false, ..SETTINGS }, 5000);
        off.look(3_000 * MS, 99);
        talk([Some(&a), Some(&off)], 3_000, 60_000, None);
        assert_eq!((a.verdict(), off.verdict()), (Verdict::Unknown, Verdict::Unknown));
    }

    #[test]
    fn a_dead_peer_that_comes_back_without_bfd_is_unknown() {
        let [a, b] = pair();
        a.set_neighbour(true);
        a.look(0, 0);
        talk([Some(&a), Some(&b)], 0, 3_000, None);
        talk([Some(&a), None], 3_000, 5_000, Some(2_990 * MS));
        assert!(a.is_down());
        talk([Some(&a), None], 5_000, 5_100, Some(5_000 * MS));
        assert!(a.is_down(), "not at the first packet, which may have been under way");
        talk([Some(&a), None], 8_000, 8_001, Some(8_000 * MS));
        assert_eq!(a.verdict(), Verdict::Unknown);
    }

    #[test]
    fn a_busy_worker_declares_nobody_dead_before_it_has_received_everything() {
        let [a, b] = pair();
        a.set_neighbour(true);
        a.look(0, 0);
        talk([Some(&a), Some(&b)], 0, 3_000, None);
        a.turn(4_200 * MS, None, None, |_| {});
        assert_eq!(a.verdict(), Verdict::Up);
        a.turn(5_000 * MS, None, None, |_| {});
        assert!(a.is_down(), "but not for ever");
    }
}
