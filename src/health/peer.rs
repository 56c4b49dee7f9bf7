//! What is shared of one peer's liveness: the session, who looks after it, and the verdict that packets are judged by.
//!
//! Decides when a session is wanted and what its end means for traffic. The verdict is read without a lock; the session
//! is locked for as long as one packet or one timer takes. Knows no table and sends nothing.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::machine::{Event, Session, Timers};
use super::meter::{Meter, Way};
use super::path::{self, Bounds, Circumstances, PathMtu};
use crate::wire::bfd::{Control, Diagnostic, Message, State};
use crate::wire::echo::Echo;
use crate::wire::survey::{self, Entry, Report};

/// How long after the last packet to or from a peer its session is still wanted.
const WANTED_US: u64 = 60_000_000;
/// Under a load that leaves no moment in which everything is received, a death waits so much longer at most: receive
/// queues are shorter than that.
const UNSETTLED_US: u64 = 500_000;
/// A dead peer from which packets come for so long, and not a BFD packet among them, does not speak BFD any more.
const SILENT_US: u64 = 2_000_000;
/// Probes that wait for an answer between two turns, at most; a turn comes with each batch that is received.
const ANSWERS: usize = 8;

/// Between two times that a peer may have us find out about all others.
const WOKEN_US: u64 = 10_000_000;
/// A report has no more entries, and in a larger mesh nobody is asked to find out about everybody.
pub const SURVEYED: usize = 256;

/// How liveness is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Whether it is. If not, who asks is told so, and holds nobody for dead.
    pub enabled: bool,
    /// What this side wants.
    pub timers: Timers,
    /// The VXLAN network of BFD packets.
    pub vni: u32,
    /// What the sequence numbers of authenticated packets follow: the clock at 0 µs, in steps of
    /// [`machine::NUMBERS_A_SECOND`](super::machine::NUMBERS_A_SECOND).
    pub epoch: u32,
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
    discriminator: u32,
    verdict: AtomicU8,
    /// The longest inner packet that the path takes; 0: not measured.
    path_mtu: AtomicU16,
    /// The same where the path takes less than this node's own link, else 0.
    narrow: AtomicU16,
    /// 0: not measured.
    round_trip_us: AtomicU32,
    neighbour: AtomicBool,
    /// Somebody wants to know about the peer until then.
    awake_until_us: AtomicU64,
    /// The peer wants to know about all others.
    wakes_others: AtomicBool,
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
    path: PathMtu,
    meter: Meter,
    next_echo_us: u64,
    /// Number and size of probes that arrived.
    answers: Vec<(u64, u16)>,
    /// What the peer asks about others.
    asked: Option<survey::Ask>,
    woken_us: Option<u64>,
    survey: Option<Survey>,
}

/// What the peer says of others, as far as it has said it.
#[derive(Debug)]
struct Survey {
    number: u64,
    wake: bool,
    /// It is to be asked for the next entries.
    ask: bool,
    total: Option<usize>,
    entries: Vec<Entry>,
}

/// When a turn is, and what is known by then.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Now.
    pub now_us: u64,
    /// Whatever came before that time was received.
    pub settled_us: Option<u64>,
    /// When anything valid came from the peer.
    pub last_seen_us: Option<u64>,
}

/// What is known of the path to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathFacts {
    /// How far the search is.
    pub state: path::State,
    /// When the size in use was confirmed last.
    pub confirmed_us: Option<u64>,
    /// How often the size in use stopped arriving.
    pub black_holes: u32,
}

impl Liveness {
    /// Nothing is known yet. `discriminator` is no other session's.
    pub fn new(settings: Settings, discriminator: u32) -> Self {
        let inner = Inner {
            session: Session::new(settings.timers, discriminator).numbered_from(settings.epoch),
            wanted_until_us: 0,
            traffic: None,
            died_us: 0,
            heard_us: 0,
            path: PathMtu::new(u64::from(discriminator)),
            meter: Meter::new(u64::from(discriminator)),
            next_echo_us: 0,
            answers: Vec::new(),
            asked: None,
            woken_us: None,
            survey: None,
        };
        Liveness {
            settings,
            discriminator: discriminator.max(1),
            verdict: AtomicU8::new(Verdict::Unknown as u8),
            path_mtu: AtomicU16::new(0),
            narrow: AtomicU16::new(0),
            round_trip_us: AtomicU32::new(0),
            neighbour: AtomicBool::new(false),
            awake_until_us: AtomicU64::new(0),
            wakes_others: AtomicBool::new(false),
            owner: AtomicU32::new(0),
            inner: Mutex::new(inner),
        }
    }

    /// This side's number for the session.
    pub fn discriminator(&self) -> u32 {
        self.discriminator
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

    /// The longest inner packet that the path is known to take; `None` where that was not measured.
    #[inline]
    pub fn path_mtu(&self) -> Option<u16> {
        Some(self.path_mtu.load(Ordering::Relaxed)).filter(|mtu| *mtu != 0)
    }

    /// The longest inner packet that may be sent, where this node's own link takes `own`. Follows that at once: a path that
    /// was no narrower than the link is taken to be so still, until a probe says otherwise. Else senders would be told of an
    /// MTU that is about to be out of date, and keep it for ten minutes.
    #[inline]
    pub fn mtu(&self, own: u16) -> u16 {
        match self.narrow.load(Ordering::Relaxed) {
            0 => own,
            narrow => narrow.min(own),
        }
    }

    /// As if the path had been measured.
    #[cfg(test)]
    pub fn found(&self, mtu: u16) {
        self.path_mtu.store(mtu, Ordering::Relaxed);
        self.narrow.store(mtu, Ordering::Relaxed);
    }

    /// What is known of the path.
    pub fn path(&self) -> PathFacts {
        let path = &self.lock().path;
        PathFacts { state: path.state(), confirmed_us: path.confirmed_us(), black_holes: path.black_holes() }
    }

    /// Round trip and loss: of all ways together, and of each.
    pub fn measured(&self) -> (Way, Vec<Way>) {
        let meter = &self.lock().meter;
        (meter.all(), meter.ways().to_vec())
    }

    /// Somebody on the path says that inner packets over `size` bytes do not fit.
    pub fn hint(&self, now_us: u64, size: u16) {
        self.lock().path.hint(now_us, size);
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

    /// Takes a packet of the peer's that `worker` received. Returns whether it was none that came before.
    #[must_use]
    pub fn heard(&self, worker: usize, now_us: u64, packet: &Control) -> bool {
        self.own(worker);
        let mut inner = self.lock();
        if !inner.session.admits(now_us, packet) {
            return false;
        }
        inner.heard_us = now_us;
        if inner.session.state() == State::AdminDown && !self.wakes(&mut inner, now_us, packet) {
            return true;
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
            // one way only: the other side does not hear us. What knows neither discriminator may be anybody's
            Event::Down { diagnostic: Diagnostic::EXPIRED, known: true } => {
                inner.died_us = now_us;
                self.set(Verdict::Down);
            }
            // it began anew, and packets reach it
            Event::Down { .. } => self.set(Verdict::Unknown),
            Event::AdminDown => {
                self.set(Verdict::Unknown);
                inner.wanted_until_us = 0;
            }
        }
        true
    }

    /// Takes an echo packet of the peer's, whichever worker received it: they take all the ways there are. Its IP packet had
    /// `size` bytes.
    pub fn heard_echo(&self, now_us: u64, echo: &Echo, size: u16) {
        let mut inner = self.lock();
        // RFC 5880 §6.8.9: only while the session is up; and this one, not another run's
        if inner.session.state() != State::Up || echo.yours != inner.session.discriminator() {
            return;
        }
        if echo.answer {
            if !inner.meter.answered(now_us, echo.number) {
                inner.path.answered(now_us, echo.number, echo.size);
                self.publish(&inner);
            }
        } else if inner.answers.len() < ANSWERS {
            inner.answers.push((echo.number, size));
        }
    }

    /// Has the peer watched for a while, whether or not there is traffic.
    pub fn wake(&self, now_us: u64) {
        self.awake_until_us.fetch_max(now_us + WANTED_US, Ordering::Relaxed);
    }

    /// Whether the peer has just asked for all others to be watched.
    pub fn wakes_others(&self) -> bool {
        self.wakes_others.swap(false, Ordering::Relaxed)
    }

    /// Asks the peer what it thinks of others; again, where that is under way and no answer came. With `wake` it finds out
    /// about all of them.
    pub fn survey(&self, number: u64, wake: bool) {
        let mut inner = self.lock();
        match &mut inner.survey {
            Some(survey) if survey.number == number => survey.ask = true,
            other => *other = Some(Survey { number, wake, ask: true, total: None, entries: Vec::new() }),
        }
    }

    /// The answer, once it is whole.
    pub fn surveyed(&self, number: u64) -> Option<Vec<Entry>> {
        let inner = self.lock();
        let survey = inner.survey.as_ref().filter(|survey| survey.number == number)?;
        (survey.total == Some(survey.entries.len())).then(|| survey.entries.clone())
    }

    /// Takes a question about others, or a part of an answer.
    pub fn heard_survey(&self, worker: usize, message: &Message) {
        self.own(worker);
        let mut inner = self.lock();
        let (state, mine) = (inner.session.state(), inner.session.discriminator());
        match message {
            Message::Ask(ask) if state == State::Up && ask.yours == mine => inner.asked = Some(*ask),
            Message::Report(report) if state == State::Up && report.yours == mine => {
                let Some(survey) = inner.survey.as_mut().filter(|survey| survey.number == report.number) else {
                    return;
                };
                let total = usize::from(report.total).min(SURVEYED);
                if usize::from(report.first) == survey.entries.len() {
                    let room = total.saturating_sub(survey.entries.len());
                    survey.entries.extend(report.entries.iter().take(room));
                    survey.total = Some(total);
                    survey.ask = survey.entries.len() < total && !report.entries.is_empty();
                }
            }
            _ => {}
        }
    }

    fn publish(&self, inner: &Inner) {
        let limit = inner.path.limit();
        self.path_mtu.store(limit.unwrap_or(0), Ordering::Relaxed);
        self.narrow.store(limit.filter(|_| inner.path.is_narrow()).unwrap_or(0), Ordering::Relaxed);
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
        if inner.session.state() == State::AdminDown {
            inner.path.rest(now_us);
            self.publish(&inner);
        }
        begins
    }

    fn is_wanted(&self, inner: &Inner, now_us: u64) -> bool {
        let awake = || now_us < self.awake_until_us.load(Ordering::Relaxed);
        self.neighbour.load(Ordering::Relaxed) || now_us < inner.wanted_until_us || awake()
    }

    /// The answers to probes that arrived, on whichever way: they wait for no turn.
    pub fn answers(&self, mut send: impl FnMut(&Message)) {
        let mut inner = self.lock();
        let Some((yours, _)) = inner.session.echoes() else { return inner.answers.clear() };
        for (number, size) in inner.answers.drain(..) {
            send(&Message::Echo(Echo { answer: true, yours, number, size }, 0));
        }
    }

    /// Lets time pass, and gives what is to be sent to `send`, with the way where that matters. `bounds`: how long packets to
    /// the peer could be, `ways` how many ways they take, and `sent_bytes` counts those that were sent. Returns when to come
    /// again; `None` while the session is idle.
    pub fn turn(
        &self,
        moment: Moment,
        bounds: Bounds,
        ways: usize,
        sent_bytes: impl FnOnce() -> u64,
        mut send: impl FnMut(&Message, Option<u16>),
    ) -> Option<u64> {
        let Moment { now_us, settled_us, last_seen_us } = moment;
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
            send(&Message::Control(packet), None);
        }
        let probes_us = self.probe(&mut inner, now_us, bounds, ways, sent_bytes, send);
        let running = inner.session.state() != State::AdminDown;
        running.then(|| inner.session.next_deadline().min(probes_us))
    }

    /// Sends the probe that is due, and what there is to be said of others. Returns when the next one is due.
    fn probe(
        &self,
        inner: &mut Inner,
        now_us: u64,
        bounds: Bounds,
        ways: usize,
        sent_bytes: impl FnOnce() -> u64,
        mut send: impl FnMut(&Message, Option<u16>),
    ) -> u64 {
        let echoes = inner.session.echoes();
        let (yours, interval_us) = echoes.unwrap_or((0, 0));
        if let Some(ask) = inner.asked.take().filter(|_| yours != 0) {
            if ask.wake && inner.woken_us.is_none_or(|us| now_us >= us + WOKEN_US) {
                inner.woken_us = Some(now_us);
                self.wakes_others.store(true, Ordering::Relaxed);
            }
            // who sends it knows the others, and fills it in
            let survey::Ask { number, first, .. } = ask;
            send(&Message::Report(Report { yours, number, first, total: 0, entries: Vec::new() }), None);
        }
        if let Some(survey) = inner.survey.as_mut().filter(|survey| survey.ask && yours != 0) {
            survey.ask = false;
            let (number, first, wake) = (survey.number, survey.entries.len() as u16, survey.wake);
            send(&Message::Ask(survey::Ask { yours, number, first, wake }), None);
        }
        let (able, round_trip_us) = (echoes.is_some(), self.round_trip_us.load(Ordering::Relaxed));
        if !able || now_us >= inner.next_echo_us {
            let now = Circumstances { bounds, able, round_trip_us, heard_us: inner.heard_us };
            if let Some(ask) = inner.path.turn(now_us, now, sent_bytes) {
                inner.next_echo_us = now_us + u64::from(interval_us);
                send(&Message::Echo(Echo { answer: false, yours, number: ask.number, size: 0 }, ask.size), None);
            }
            self.publish(inner);
        }
        if !able {
            inner.meter.rest();
            return u64::MAX;
        }
        if let Some((number, way)) = inner.meter.turn(now_us, ways) {
            send(&Message::Echo(Echo { answer: false, yours, number, size: 0 }, 0), Some(way));
        }
        inner.path.next_deadline().max(inner.next_echo_us).min(inner.meter.next_deadline())
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
        Settings { enabled: true, timers: Timers { interval_us: 150_000, multiplier: 6 }, vni: 4095, epoch: 0 };

    const BOUNDS: Bounds = Bounds { min: 526, base: 1230, max: 1450, overhead: 50 };

    /// Lets two sides talk from `from` to `to`, in milliseconds, a step a millisecond. A side of which `None` is given is
    /// dead.
    fn talk(sides: [Option<&Liveness>; 2], from: u64, to: u64, seen: Option<u64>) -> usize {
        let mut sent = 0;
        for now in (from..to).map(|ms| ms * MS) {
            let mut under_way = Vec::new();
            for (number, side) in sides.iter().enumerate() {
                let Some(side) = side else { continue };
                let moment = Moment { now_us: now, settled_us: Some(now), last_seen_us: seen };
                side.turn(moment, BOUNDS, 1, || 0, |message, _| under_way.push((1 - number, message.clone())));
                side.answers(|message| under_way.push((1 - number, message.clone())));
            }
            for (to, message) in under_way {
                match (message, sides[to]) {
                    (Message::Control(packet), side) => {
                        sent += 1;
                        side.inspect(|side| assert!(side.heard(0, now, &packet)));
                    }
                    (Message::Echo(echo, size), Some(side)) => side.heard_echo(now, &echo, size),
                    _ => {}
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
    fn one_way_is_dead_on_both_sides_and_a_stranger_kills_nobody() {
        let [a, b] = pair();
        a.set_neighbour(true);
        a.look(0, 0);
        talk([Some(&a), Some(&b)], 0, 3_000, None);
        let turn = |of: &Liveness, ms: u64| {
            let moment = Moment { now_us: ms * MS, settled_us: Some(ms * MS), last_seen_us: None };
            let mut said = Vec::new();
            of.turn(moment, BOUNDS, 1, || 0, |message, _| said.extend(control(message)));
            said
        };
        // a hears b; b does not hear a
        for ms in 3_000..4_000 {
            turn(&a, ms);
            for packet in turn(&b, ms) {
                assert!(a.heard(0, ms * MS, &packet));
            }
        }
        assert_eq!((a.verdict(), b.verdict()), (Verdict::Down, Verdict::Down));
        talk([Some(&a), Some(&b)], 4_000, 6_000, None);
        assert_eq!((a.verdict(), b.verdict()), (Verdict::Up, Verdict::Up));
        let said = (6_000..6_200).find_map(|ms| turn(&b, ms).pop()).unwrap();
        let stranger = Control { mine: 77, yours: 0, ..said };
        let forged = Control { state: State::Down, diagnostic: Diagnostic::EXPIRED, ..stranger };
        assert!(a.heard(0, 6_200 * MS, &forged));
        assert_eq!(a.verdict(), Verdict::Unknown, "which ends a session, and no traffic");
    }

    fn control(message: &Message) -> Option<Control> {
        match message {
            Message::Control(control) => Some(*control),
            _ => None,
        }
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
        let at = |ms: u64| Moment { now_us: ms * MS, settled_us: None, last_seen_us: None };
        a.turn(at(4_200), BOUNDS, 1, || 0, |_, _| {});
        assert_eq!(a.verdict(), Verdict::Up);
        a.turn(at(5_000), BOUNDS, 1, || 0, |_, _| {});
        assert!(a.is_down(), "but not for ever");
    }
}
