//! One lane of a tunnel: its sessions under two locks, and the packets that wait for the first. What is done with it is
//! `locked`'s.
//!
//! Who seals takes the lock of the sealing half alone, so that one worker can seal while another opens. Who takes both takes
//! the state's first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::machine::{Machine, Signs};
use super::session::Sealing;

/// Packets and bytes that wait for the session of one lane, and bytes that wait in all.
pub(super) const HELD_PACKETS: usize = 128;
const HELD_BYTES: usize = 96 << 10;
const HELD_BYTES_OF_ALL: usize = 32 << 20;
/// How long a packet waits for a session before it is discarded, in milliseconds.
const HELD_MS: u64 = 5_000;
/// How long after an unanswered initiation the next one goes out while packets wait, in milliseconds. The protocol's
/// own five seconds would be five seconds without a network after an outage; receivers take twenty a second.
const RETRY_MS: u64 = 1_000;
/// The same after ten in vain.
const SLOW_RETRY_MS: u64 = 2_000;
/// While nothing waits, the pause doubles up to this: dead peers must not cost anything.
const IDLE_RETRY_MS: u64 = 64_000;
/// How often a peer's message that cannot be used makes us start a handshake at most, in milliseconds.
const ANSWER_MS: u64 = 1_000;

/// Bit of [`Lane::up`]: there is a session.
const SESSION: u8 = 1;
/// Bit of [`Lane::up`]: somebody asked for a session already, so that no other packet has to take the lock for that.
const RECENT: u8 = 2;

pub(super) struct Lane {
    up: AtomicU8,
    sealing: Mutex<Option<Sealing>>,
    state: Mutex<State>,
    pub(super) signs: AtomicSigns,
}

/// What has crossed: see [`Signs`]. Written by whoever seals or opens, where that changes anything.
#[derive(Default)]
pub(super) struct AtomicSigns {
    sent: AtomicBool,
    awaiting: AtomicBool,
    owes: AtomicBool,
    traversed: AtomicBool,
}

fn set(flag: &AtomicBool, value: bool) {
    if flag.load(Ordering::Relaxed) != value {
        flag.store(value, Ordering::Relaxed);
    }
}

impl AtomicSigns {
    #[inline]
    pub(super) fn sealed(&self, packet: bool) {
        set(&self.owes, false);
        set(&self.traversed, true);
        if packet {
            set(&self.awaiting, true);
            set(&self.sent, true);
        }
    }

    #[inline]
    pub(super) fn opened(&self, packet: bool) {
        set(&self.awaiting, false);
        set(&self.traversed, true);
        if packet {
            set(&self.owes, true);
        }
    }

    /// What they say, to be asked at each tick. `worn`: see [`Signs`].
    pub(super) fn take(&self, worn: bool) -> Signs {
        Signs {
            sent: self.sent.swap(false, Ordering::Relaxed),
            awaiting: self.awaiting.load(Ordering::Relaxed),
            owes: self.owes.load(Ordering::Relaxed),
            traversed: self.traversed.swap(false, Ordering::Relaxed),
            worn,
        }
    }
}

pub(super) struct State {
    /// Made when it is needed for the first time: it costs 40 µs.
    pub(super) machine: Option<Box<Machine>>,
    pub(super) held: VecDeque<Held>,
    held_bytes: usize,
    /// A session is wanted although nothing waits for it.
    pub(super) wanted: bool,
    /// Initiations since the last session, and when the last one left; `None` after a session, or when one is urgent.
    pub(super) tries: u32,
    pub(super) tried_ms: Option<u64>,
    nudged_ms: Option<u64>,
    /// The time at the last tick.
    pub(super) ticked_ms: u64,
}

pub(super) struct Held {
    pub(super) packet: Vec<u8>,
    pub(super) tos: u8,
    since_ms: u64,
}

/// Bytes that wait for sessions with all peers.
static HELD_OF_ALL: AtomicUsize = AtomicUsize::new(0);

/// What can be said of a lane.
pub(super) struct LaneFacts {
    pub(super) held: usize,
    pub(super) tries: u32,
    pub(super) age_ms: Option<u64>,
}

impl Lane {
    pub(super) fn new(wanted: bool) -> Self {
        let state = State {
            machine: None,
            held: VecDeque::new(),
            held_bytes: 0,
            wanted,
            tries: 0,
            tried_ms: None,
            nudged_ms: None,
            ticked_ms: 0,
        };
        Lane {
            up: AtomicU8::new(0),
            sealing: Mutex::new(None),
            state: Mutex::new(state),
            signs: AtomicSigns::default(),
        }
    }

    #[inline]
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed) & SESSION != 0
    }

    /// Asks for a session some time.
    pub(super) fn want(&self) {
        if self.up.fetch_or(RECENT, Ordering::Relaxed) & RECENT == 0 {
            self.state().wanted = true;
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // a state is changed by code that does not panic half-way; whoever held it has counted its loss already
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(super) fn sealing(&self) -> MutexGuard<'_, Option<Sealing>> {
        self.sealing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is a session from now on, or none. Under the state's lock.
    pub(super) fn set_up(&self, up: bool) {
        self.up.store(if up { SESSION } else { 0 }, Ordering::Relaxed);
    }

    pub(super) fn facts(&self) -> LaneFacts {
        let state = self.state();
        let age_ms = state.machine.as_ref().and_then(|machine| machine.age(state.ticked_ms));
        LaneFacts { held: state.held.len(), tries: state.tries, age_ms }
    }
}

impl State {
    pub(super) fn nudge(&mut self, now_ms: u64) {
        if self.nudged_ms.is_none_or(|nudged| now_ms >= nudged + ANSWER_MS) {
            self.nudged_ms = Some(now_ms);
            self.wanted = true;
            self.tried_ms = None;
        }
    }

    /// Whether so many packets of so many bytes in all can wait.
    pub(super) fn can_hold(&self, packets: usize, bytes: usize) -> bool {
        self.held.len() + packets <= HELD_PACKETS
            && self.held_bytes + bytes <= HELD_BYTES
            && HELD_OF_ALL.load(Ordering::Relaxed) + bytes <= HELD_BYTES_OF_ALL
    }

    pub(super) fn hold(&mut self, packet: &[u8], tos: u8, now_ms: u64) {
        self.held_bytes += packet.len();
        HELD_OF_ALL.fetch_add(packet.len(), Ordering::Relaxed);
        self.held.push_back(Held { packet: packet.to_vec(), tos, since_ms: now_ms });
    }

    /// The next that waited, if it did for too long.
    pub(super) fn expired(&mut self, now_ms: u64) -> Option<Held> {
        self.held.front().filter(|held| now_ms >= held.since_ms + HELD_MS)?;
        self.unhold()
    }

    /// Whether it is time to ask again, and that it is done. `somebody` waits for it; `spread`: milliseconds later, so that not
    /// all peers are asked in the same moment.
    pub(super) fn asks(&mut self, somebody: bool, spread: u64, now_ms: u64) -> bool {
        let pause = match (somebody, self.tries) {
            (false, tries) => (RETRY_MS << tries.min(8)).min(IDLE_RETRY_MS),
            (true, ..10) => RETRY_MS,
            (true, _) => SLOW_RETRY_MS,
        };
        if self.tried_ms.is_some_and(|tried| now_ms < tried + pause + spread) {
            return false;
        }
        self.tries = self.tries.saturating_add(1);
        self.tried_ms = Some(now_ms);
        true
    }

    pub(super) fn unhold(&mut self) -> Option<Held> {
        let held = self.held.pop_front()?;
        self.held_bytes -= held.packet.len();
        HELD_OF_ALL.fetch_sub(held.packet.len(), Ordering::Relaxed);
        Some(held)
    }
}

impl std::ops::Drop for State {
    fn drop(&mut self) {
        HELD_OF_ALL.fetch_sub(self.held_bytes, Ordering::Relaxed);
    }
}
