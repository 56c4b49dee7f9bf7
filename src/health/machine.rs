//! One BFD session (RFC 5880 §6): asynchronous mode. That echo packets are answered it says; they are not its own matter.
//! Where packets are authenticated, by whatever keys, it numbers them and holds theirs to their window.
//!
//! Owns the state machine and its timers; every call takes `now` in microseconds, and [`Session::next_deadline`] says when
//! the next one is due. Does not know what carries packets, whom the session is with, and what a death means.

use crate::wire::bfd::auth::Sequence;
use crate::wire::bfd::{Control, Diagnostic, State};

/// How often packets are sent while the session is not up, at most (RFC 5880 §6.8.3).
pub const SLOW_US: u32 = 1_000_000;
/// How often the round trip is measured by a poll sequence.
const POLL_US: u64 = 1_000_000;
/// The shortest interval between echo packets that are answered.
pub const ECHO_US: u32 = 4_000;
/// Who dies and comes back as the one that it was, has not died: so many times within [`FLAP_WINDOW_US`], and the local
/// detection time is doubled for the rest of it.
const FLAPS: u8 = 3;
const FLAP_WINDOW_US: u64 = 60_000_000;

/// The timers that one side wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    /// Between two packets while the session is up, in either direction.
    pub interval_us: u32,
    /// How many packets in a row may be missing.
    pub multiplier: u8,
}

/// A session.
///
/// RFC 5880 §6.2; what stands at an arrow is the state in the packet that was received, or a timer:
///
/// ```text
///                              +--+
///                              |  | UP, ADMIN DOWN, TIMER
///                              |  V
///                      DOWN  +------+  INIT
///               +------------|      |------------+
///               |            | DOWN |            |
///               |  +-------->|      |<--------+  |
///               |  |         +------+         |  |
///               |  |                          |  |
///               |  |               ADMIN DOWN,|  |
///               |  |ADMIN DOWN,          DOWN,|  |
///               |  |TIMER                TIMER|  |
///               V  |                          |  V
///             +------+                      +------+
///        +----|      |                      |      |----+
///    DOWN|    | INIT |--------------------->|  UP  |    |INIT, UP
///        +--->|      | INIT, UP             |      |<---+
///             +------+                      +------+
/// ```
///
/// A session begins, and after [`Session::stop`] stays, in AdminDown, where it sends nothing but answers.
#[derive(Debug)]
pub struct Session {
    timers: Timers,
    state: State,
    diagnostic: Diagnostic,
    mine: u32,
    remote: Remote,
    /// When a valid packet came last, or whatever else proves that the other side sends.
    heard_us: u64,
    next_tx_us: Option<u64>,
    /// A poll of the other side is to be answered.
    answer: bool,
    poll: Poll,
    flaps: Flaps,
    random: u32,
    numbers: Numbers,
    received: Option<Received>,
}

/// The sequence numbers of what is sent (bfd.XmitAuthSeq).
#[derive(Debug, Clone, Copy)]
struct Numbers {
    /// What a session has that begins at 0 µs.
    epoch: u32,
    next: Option<u32>,
}

/// So many a second pass from one start of a session to a later one: more than are ever sent, and half a circle is two years.
pub const NUMBERS_A_SECOND: u32 = 32;

impl Numbers {
    fn take(&mut self, now_us: u64) -> u32 {
        let begun = || (now_us / (1_000_000 / u64::from(NUMBERS_A_SECOND))) as u32;
        let number = self.next.unwrap_or_else(|| self.epoch.wrapping_add(begun()));
        self.next = Some(number.wrapping_add(1));
        number
    }
}

/// The last sequence number of the other side (bfd.RcvAuthSeq), and whose it was.
#[derive(Debug, Clone, Copy)]
struct Received {
    number: u32,
    meticulous: bool,
    discriminator: u32,
    at_us: u64,
}

/// What the other side said last.
#[derive(Debug, Clone, Copy)]
struct Remote {
    state: State,
    /// 0: not heard of.
    discriminator: u32,
    desired_tx_us: u32,
    required_rx_us: u32,
    required_echo_rx_us: u32,
    multiplier: u8,
    demand: bool,
}

const NOT_HEARD: Remote = Remote {
    state: State::Down,
    discriminator: 0,
    desired_tx_us: SLOW_US,
    required_rx_us: 1,
    required_echo_rx_us: 0,
    multiplier: 3,
    demand: false,
};

#[derive(Debug, Clone, Copy)]
enum Poll {
    Next {
        at_us: u64,
    },
    /// With more than one packet out an answer does not tell which it belongs to.
    Asked {
        at_us: u64,
        packets: u32,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Flaps {
    since_us: u64,
    returns: u8,
    /// The other side's discriminator when it was held for dead; one that was started anew has another.
    died: Option<u32>,
}

impl Flaps {
    fn returned(&mut self, now_us: u64) {
        if now_us >= self.since_us + FLAP_WINDOW_US {
            *self = Flaps { since_us: now_us, ..Flaps::default() };
        }
        self.returns = self.returns.saturating_add(1);
    }
}

/// What a received packet changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Nothing that matters outside.
    Nothing,
    /// It was for another session, such as that of a former run.
    Stray,
    /// Both sides hear each other.
    Up,
    /// The session was up, and the other side says that it is not any more.
    Down {
        /// Its reason.
        diagnostic: Diagnostic,
        /// It is the one that the session was up with: it names our discriminator, or has the same as before. Who hears
        /// nothing any more has forgotten ours (RFC 5880 §6.8.1).
        known: bool,
    },
    /// The other side holds its session down on purpose.
    AdminDown,
}

/// What a received packet brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What changed.
    pub event: Event,
    /// The round trip that it closed, in microseconds.
    pub round_trip_us: Option<u32>,
}

impl Session {
    /// A session in AdminDown. `discriminator` is not 0 and no other session's of this system.
    pub fn new(timers: Timers, discriminator: u32) -> Self {
        Session {
            timers,
            state: State::AdminDown,
            diagnostic: Diagnostic::NONE,
            mine: discriminator.max(1),
            remote: NOT_HEARD,
            heard_us: 0,
            next_tx_us: None,
            answer: false,
            poll: Poll::Next { at_us: 0 },
            flaps: Flaps::default(),
            random: discriminator | 1,
            numbers: Numbers { epoch: discriminator, next: None },
            received: None,
        }
    }

    /// The same where sequence numbers follow a clock, which read `epoch` at 0 µs in steps of [`NUMBERS_A_SECOND`]: those of
    /// a later run are ahead of all before, which random ones, as RFC 5880 §6.8.1 begins with, would not be.
    pub fn numbered_from(self, epoch: u32) -> Self {
        Session { numbers: Numbers { epoch, next: None }, ..self }
    }

    /// The state.
    pub fn state(&self) -> State {
        self.state
    }

    /// This side's discriminator.
    pub fn discriminator(&self) -> u32 {
        self.mine
    }

    /// The other side's discriminator and the shortest interval between echo packets, in microseconds, while it answers
    /// any (RFC 5880 §6.8.9).
    pub fn echoes(&self) -> Option<(u32, u32)> {
        let Remote { discriminator, required_echo_rx_us, state, .. } = self.remote;
        let up = self.state == State::Up && state == State::Up;
        (up && required_echo_rx_us != 0).then_some((discriminator, required_echo_rx_us))
    }

    /// Leaves AdminDown.
    pub fn start(&mut self, now_us: u64) {
        if self.state == State::AdminDown {
            self.become_down(now_us, Diagnostic::NONE);
            self.remote = NOT_HEARD;
        }
    }

    /// Goes to AdminDown, and says so once; again with [`Session::repeat`], instead of for a whole detection time
    /// (RFC 5880 §6.8.16).
    pub fn stop(&mut self, now_us: u64) {
        if self.state != State::AdminDown {
            self.become_down(now_us, Diagnostic::ADMIN_DOWN);
            self.state = State::AdminDown;
        }
    }

    /// In AdminDown: says so again, to somebody who seems not to know.
    pub fn repeat(&mut self, now_us: u64) {
        if self.state == State::AdminDown {
            self.next_tx_us.get_or_insert(now_us);
        }
    }

    /// Whether an authentic packet is none that came before (RFC 5880 §6.7.4); to be asked once for each, before
    /// [`Session::receive`]. What is not authenticated has no number and passes, since whoever read it has agreed to that.
    ///
    /// Other than in the RFC a new run of the other side, which has another discriminator, may be anywhere ahead: a meshd
    /// starts where its clock is, so that its restart need not last until the old number is forgotten, and the packets of
    /// its former runs are behind.
    pub fn admits(&mut self, now_us: u64, packet: &Control) -> bool {
        let Some(Sequence { number, meticulous }) = packet.sequence else { return true };
        let forgotten = 2 * self.detection_us();
        if let Some(last) = self.received.filter(|last| now_us < last.at_us + forgotten) {
            let another_run = packet.mine != last.discriminator;
            let furthest = if another_run { u32::MAX / 2 } else { 3 * u32::from(packet.multiplier) };
            if !(u32::from(meticulous)..=furthest).contains(&number.wrapping_sub(last.number)) {
                return false;
            }
        }
        // what is for another session moves no window of this one
        if packet.yours == 0 || packet.yours == self.mine {
            self.received = Some(Received { number, meticulous, discriminator: packet.mine, at_us: now_us });
        }
        true
    }

    /// Takes a packet (RFC 5880 §6.8.6; what can be seen in it alone `wire` has checked).
    pub fn receive(&mut self, now_us: u64, packet: &Control) -> Outcome {
        let mut outcome = Outcome { event: Event::Nothing, round_trip_us: None };
        if packet.yours != 0 && packet.yours != self.mine {
            outcome.event = Event::Stray;
            return outcome;
        }
        let known = packet.yours != 0 || packet.mine == self.remote.discriminator;
        self.remote = Remote {
            state: packet.state,
            discriminator: packet.mine,
            desired_tx_us: packet.desired_tx_us,
            required_rx_us: packet.required_rx_us,
            required_echo_rx_us: packet.required_echo_rx_us,
            multiplier: packet.multiplier,
            demand: packet.demand,
        };
        if let (true, Poll::Asked { at_us, packets }) = (packet.last, self.poll) {
            self.poll = Poll::Next { at_us: at_us + POLL_US };
            let took = u32::try_from(now_us.saturating_sub(at_us)).unwrap_or(u32::MAX);
            outcome.round_trip_us = Some(took).filter(|_| packets == 1);
        }
        if self.state == State::AdminDown {
            return outcome;
        }
        self.heard_us = self.heard_us.max(now_us);
        outcome.event = match (self.state, packet.state) {
            (State::Init | State::Up, State::AdminDown) => {
                self.become_down(now_us, Diagnostic::NEIGHBOR_DOWN);
                Event::AdminDown
            }
            (_, State::AdminDown) => Event::AdminDown,
            (State::Down, State::Down) => {
                self.enter(State::Init, now_us);
                Event::Nothing
            }
            (State::Down, State::Init) | (State::Init, State::Init | State::Up) => {
                self.enter(State::Up, now_us);
                self.diagnostic = Diagnostic::NONE;
                if self.flaps.died.take() == Some(packet.mine) {
                    self.flaps.returned(now_us);
                }
                self.poll = Poll::Next { at_us: now_us };
                Event::Up
            }
            (State::Up, State::Down) => {
                self.become_down(now_us, Diagnostic::NEIGHBOR_DOWN);
                Event::Down { diagnostic: packet.diagnostic, known }
            }
            _ => Event::Nothing,
        };
        self.answer |= packet.poll;
        self.bring_forward(now_us);
        outcome
    }

    /// Something else than BFD came from the other side at `at_us`: it sends. What it does not hear of us it says itself.
    /// (RFC 5880 §6.8.4 counts control packets alone; what must be authentic, the caller sees to.)
    pub fn sign_of_life(&mut self, at_us: u64) {
        if self.state == State::Up {
            self.heard_us = self.heard_us.max(at_us);
        }
    }

    /// When the session dies unless something is heard.
    pub fn expires(&self) -> Option<u64> {
        matches!(self.state, State::Init | State::Up).then(|| self.heard_us + self.detection_us())
    }

    /// Ends a session that has heard nothing for the detection time (RFC 5880 §6.8.4). Returns whether it was up. The
    /// caller has seen to it that everything that came before `now` was received.
    pub fn expire(&mut self, now_us: u64) -> bool {
        if self.expires().is_none_or(|expires| now_us < expires) {
            return false;
        }
        let was_up = self.state == State::Up;
        if was_up {
            self.flaps.died = Some(self.remote.discriminator);
        }
        self.become_down(now_us, Diagnostic::EXPIRED);
        was_up
    }

    /// The packet that is due, if any; to be called until there is none.
    pub fn send(&mut self, now_us: u64) -> Option<Control> {
        if std::mem::take(&mut self.answer) {
            return Some(Control { last: true, ..self.packet(now_us) });
        }
        if self.next_tx_us.is_none_or(|at| now_us < at) {
            return None;
        }
        // RFC 5880 §6.8.1: what was not heard for so long is another session when it comes back
        if self.state == State::Down && now_us >= self.heard_us + self.detection_us() {
            self.remote = NOT_HEARD;
        }
        let poll = self.state == State::Up && self.ask(now_us);
        self.next_tx_us = self.interval_us().map(|interval| now_us + self.jittered(interval));
        Some(Control { poll, ..self.packet(now_us) })
    }

    /// When [`Session::send`] or [`Session::expire`] has something to do.
    pub fn next_deadline(&self) -> u64 {
        let tx = if self.answer { Some(0) } else { self.next_tx_us };
        tx.into_iter().chain(self.expires()).min().unwrap_or(u64::MAX)
    }

    /// RFC 5880 §6.8.4; longer while the session flaps.
    fn detection_us(&self) -> u64 {
        let interval = self.remote.desired_tx_us.max(self.timers.interval_us);
        let damped = self.flaps.returns >= FLAPS && self.heard_us < self.flaps.since_us + FLAP_WINDOW_US;
        u64::from(interval) * u64::from(self.remote.multiplier) * if damped { 2 } else { 1 }
    }

    fn enter(&mut self, state: State, now_us: u64) {
        self.state = state;
        // RFC 5880 §6.8.7: a change is told at once
        self.next_tx_us = Some(now_us);
    }

    fn become_down(&mut self, now_us: u64, diagnostic: Diagnostic) {
        self.diagnostic = diagnostic;
        self.answer = false;
        self.poll = Poll::Next { at_us: now_us };
        self.enter(State::Down, now_us);
    }

    /// The other side may have asked for more than what is planned; for less, the next packet sees to it. Who wants no
    /// periodic packets is told of a change nevertheless.
    fn bring_forward(&mut self, now_us: u64) {
        let latest = self.interval_us().map(|interval| now_us + interval);
        self.next_tx_us = match (self.next_tx_us, latest) {
            (Some(planned), Some(latest)) => Some(planned.min(latest)),
            (planned, None) => planned.filter(|at| *at <= now_us),
            (None, latest) => latest,
        };
    }

    /// RFC 5880 §6.8.7: the interval between periodic packets; `None` where there are none.
    fn interval_us(&self) -> Option<u64> {
        let both_up = self.state == State::Up && self.remote.state == State::Up;
        let quiet = self.remote.demand && both_up && matches!(self.poll, Poll::Next { .. });
        if self.state == State::AdminDown || quiet || self.remote.required_rx_us == 0 {
            return None;
        }
        Some(u64::from(self.desired_tx_us().max(self.remote.required_rx_us)))
    }

    fn desired_tx_us(&self) -> u32 {
        if self.state == State::Up { self.timers.interval_us } else { self.timers.interval_us.max(SLOW_US) }
    }

    /// Whether this packet polls. The first of a sequence is timed; it goes on until it is answered (RFC 5880 §6.5).
    fn ask(&mut self, now_us: u64) -> bool {
        match &mut self.poll {
            Poll::Next { at_us } if now_us < *at_us => return false,
            Poll::Next { .. } => self.poll = Poll::Asked { at_us: now_us, packets: 1 },
            Poll::Asked { packets, .. } => *packets = packets.saturating_add(1),
        }
        true
    }

    /// 75 to 100 % of the interval, or 90 % with a multiplier of 1 (RFC 5880 §6.8.7).
    fn jittered(&mut self, interval_us: u64) -> u64 {
        // xorshift32 (Marsaglia, 2003): it only has to keep nodes from marching in step
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        let most = if self.timers.multiplier == 1 { 15 } else { 25 };
        interval_us * 3 / 4 + interval_us * most * u64::from(self.random % 1024) / (100 * 1024)
    }

    fn packet(&mut self, now_us: u64) -> Control {
        // one who does without has a session of that type, and takes no other (RFC 5880 §6.7.4)
        let meticulous = self.received.is_none_or(|last| last.meticulous);
        let sequence = Some(Sequence { number: self.numbers.take(now_us), meticulous });
        Control {
            diagnostic: self.diagnostic,
            state: self.state,
            poll: false,
            last: false,
            demand: false,
            multiplier: self.timers.multiplier,
            mine: self.mine,
            yours: self.remote.discriminator,
            desired_tx_us: self.desired_tx_us(),
            required_rx_us: self.timers.interval_us,
            required_echo_rx_us: ECHO_US,
            sequence,
        }
    }
}

#[cfg(test)]
mod tests;
