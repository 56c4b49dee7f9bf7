//! Queue pairs: a TUN queue and, for each address family, the socket whose flows go through it.
//!
//! A flow stays with its pair in both directions: the kernel gives a flow's packets to the TUN queue that its answers were
//! last written to (`tun_flow_update`), and spreads datagrams over the sockets by their ports. There are more pairs than
//! threads, so that few flows share a queue (stochastic fairness queueing, McKenney 1990), and each belongs to one thread at
//! a time, which hands it over whole: so a flow stays in order.
//!
//! Each worker has two threads. A pair that carries much is handed to the second of that worker which has the fewest. A thread
//! that carries bulk traffic uses up its share of a processor, and then waits for milliseconds wherever applications want that
//! processor too. One that does less is woken at once, so that other packets do not feel bulk traffic; FQ-CoDel tells sparse
//! and bulk flows apart for the same reason (RFC 8290 §4.2).
//!
//! All other pairs are with the first worker while it has time: a thread that has more to do is more often awake when a packet
//! comes, and to wake another takes longer than most of a packet's journey. Once it is busy they are spread over all workers
//! (the compacting engines of Snap: Marty et al., SOSP 2019, §2.4).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use socket2::Socket;

use super::tun::TunQueue;
use super::worker::WorkerError;
use crate::engine::stats::WorkerStats;
use crate::sys::poll::{self, PollFd};

/// A node has at least so many pairs.
const AT_LEAST: usize = 32;
/// And at most so many: a set of them is one word.
pub(super) const AT_MOST: usize = 64;
/// Address families, for each of which a pair may have a socket.
const FAMILIES: usize = 2;
/// Bytes that a pair carries within so many microseconds where it carries bulk traffic: 168 Mbit/s.
const BULK_BYTES: u64 = 1 << 20;
const BULK_US: u64 = 50_000;
/// A packet costs as much as so many bytes.
const PACKET_BYTES: u64 = 256;
/// It goes on as long as there are so many, and is over after so long without, in microseconds.
const STILL_BULK_BYTES: u64 = BULK_BYTES / 8;
const CALM_US: u64 = 1_000_000;
/// How often a thread looks for pairs that are to go although nothing came, in microseconds.
const LOOK_US: u64 = 250_000;
/// Between two owners a pair is left alone for so long at least, in microseconds: packets of the first may still be under way
/// in queues of another processor, and those of the second must not overtake them.
const PAUSE_US: u64 = 1_000;
/// The first worker is busy, and pairs are spread, when its rounds take so much of so long, in microseconds: nine tenths. That is
/// time on the wall: who waits for a processor needs help too.
const BUSY_US: u64 = LOAD_US / 10 * 9;
const LOAD_US: u64 = 50_000;
/// They are gathered again when the rounds of all workers together, those for bulk traffic aside, take no more than so much of so
/// long, in microseconds. It is long, so that who is busy now and then does not hand them to and fro.
const AT_EASE_US: u64 = EASE_US / 4 * 3;
const EASE_US: u64 = 3_000_000;
/// For how many rounds a thread for bulk traffic goes on with what it did not empty, before it asks what else there is.
const ROUNDS_ON: u32 = 3;
/// The owner of a pair that has none.
const NOBODY: usize = usize::MAX;
/// Who has left something unread for so long is not where it should be, in microseconds.
const NEGLECTED_US: u64 = 100_000;

/// A set of pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Set(u64);

impl Set {
    pub(super) fn insert(&mut self, pair: usize) {
        self.0 |= 1 << (pair % AT_MOST);
    }

    pub(super) fn remove(&mut self, pair: usize) {
        self.0 &= !(1 << (pair % AT_MOST));
    }

    pub(super) fn without(self, other: Set) -> Set {
        Set(self.0 & !other.0)
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub(super) fn or(self, other: Set) -> Set {
        Set(self.0 | other.0)
    }

    /// Its members, from `first` on and then those before it.
    pub(super) fn from(self, first: usize) -> impl Iterator<Item = usize> {
        let turn = (first % AT_MOST) as u32;
        let mut rest = self.0.rotate_right(turn);
        std::iter::from_fn(move || {
            let next = rest.trailing_zeros();
            rest &= rest.wrapping_sub(1);
            (next < u64::BITS).then_some((next + turn) as usize % AT_MOST)
        })
    }
}

/// One pair.
#[derive(Debug)]
pub struct Pair {
    /// The TUN queue.
    pub tun: TunQueue,
    /// The sockets, in the order of the node's addresses.
    pub sockets: Vec<Socket>,
    owner: AtomicUsize,
    // The owner's alone to write. Times in microseconds.
    /// When its sockets were last read.
    received_us: AtomicU64,
    /// What it carried since when.
    bytes: AtomicU64,
    since_us: AtomicU64,
    /// Until when that is taken for bulk traffic.
    bulk_until_us: AtomicU64,
}

/// All pairs of a node.
#[derive(Debug)]
pub struct Pairs {
    pairs: Vec<Pair>,
    threads: Vec<Thread>,
    workers: usize,
    /// The first worker has too much to do for all that is not bulk traffic.
    spread: AtomicBool,
}

#[derive(Debug)]
struct Thread {
    epoll: OwnedFd,
    pairs: AtomicUsize,
    /// How long its rounds took so far, in microseconds on the wall; a worker's first thread's alone.
    busy_us: AtomicU64,
}

/// How many pairs so many workers share: as many each.
pub fn count(workers: usize) -> usize {
    let workers = workers.clamp(1, AT_MOST);
    workers * AT_LEAST.div_ceil(workers)
}

/// How many threads so many workers have: one each for what comes by itself, then one each for bulk traffic.
pub fn threads(workers: usize) -> usize {
    2 * workers
}

impl Pairs {
    /// Puts queues and sockets together, and gives them to the first worker. With `waiting` off nobody has them, for threads
    /// that wait in another way.
    pub fn new(queues: Vec<TunQueue>, sockets: Vec<Vec<Socket>>, workers: usize, waiting: bool) -> io::Result<Self> {
        let workers = workers.max(1);
        let thread = |_| {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            Ok(Thread { epoll, pairs: AtomicUsize::new(0), busy_us: AtomicU64::new(0) })
        };
        let threads = (0..if waiting { threads(workers) } else { 0 }).map(thread).collect::<io::Result<Vec<_>>>()?;
        let pair = |(tun, sockets)| Pair {
            tun,
            sockets,
            owner: AtomicUsize::new(NOBODY),
            received_us: AtomicU64::default(),
            bytes: AtomicU64::default(),
            since_us: AtomicU64::default(),
            bulk_until_us: AtomicU64::default(),
        };
        let pairs = queues.into_iter().zip(sockets).map(pair).collect();
        let pairs = Pairs { pairs, threads, workers, spread: AtomicBool::new(false) };
        for number in 0..pairs.pairs.len() {
            pairs.give(number, pairs.home(number))?;
        }
        Ok(pairs)
    }

    /// One of them.
    pub fn get(&self, pair: usize) -> Option<&Pair> {
        self.pairs.get(pair)
    }

    /// Whether a thread is there for bulk traffic.
    pub(super) fn is_for_bulk(&self, thread: usize) -> bool {
        thread >= self.workers
    }

    /// The thread that has a pair while it carries little.
    fn home(&self, pair: usize) -> usize {
        if self.spread.load(Ordering::Relaxed) { pair % self.workers } else { 0 }
    }

    /// The thread that a pair is to go to: home, or to whom has the fewest of those for bulk traffic, its own worker's first.
    fn next(&self, pair: usize, bulk: bool) -> usize {
        if !bulk {
            return self.home(pair);
        }
        let load = |thread: &usize| {
            self.threads.get(*thread).map_or(usize::MAX, |thread| thread.pairs.load(Ordering::Relaxed))
        };
        (0..self.workers).map(|turn| self.workers + (pair + turn) % self.workers).min_by_key(load).unwrap_or(0)
    }

    /// Whether a pair is where it belongs.
    fn belongs(&self, pair: usize, bulk: bool, thread: usize) -> bool {
        if bulk { self.is_for_bulk(thread) } else { self.home(pair) == thread }
    }

    /// How long the rounds of all workers' first threads took together.
    fn busy_us(&self) -> u64 {
        self.threads.iter().take(self.workers).map(|thread| thread.busy_us.load(Ordering::Relaxed)).sum()
    }

    /// Takes a pair from its owner, who calls this and does not touch it any more.
    fn release(&self, number: usize) -> io::Result<()> {
        let Some(pair) = self.pairs.get(number) else { return Ok(()) };
        let owner = pair.owner.load(Ordering::Relaxed);
        pair.owner.store(NOBODY, Ordering::Release);
        if let Some(thread) = self.threads.get(owner) {
            thread.pairs.fetch_sub(1, Ordering::Relaxed);
            pair.sources().try_for_each(|source| epoll::delete(&thread.epoll, source))?;
        }
        Ok(())
    }

    /// Gives a pair that nobody has to a thread.
    fn give(&self, number: usize, to: usize) -> io::Result<()> {
        let (Some(pair), Some(thread)) = (self.pairs.get(number), self.threads.get(to)) else { return Ok(()) };
        thread.pairs.fetch_add(1, Ordering::Relaxed);
        for (kind, source) in (0..).zip(pair.sources()) {
            let data = epoll::EventData::new_u64(kind << 8 | number as u64);
            epoll::add(&thread.epoll, source, data, epoll::EventFlags::IN)?;
        }
        // who has it now may have read from it already, but does not hand it on before all that is done
        pair.owner.store(to, Ordering::Release);
        Ok(())
    }

    /// Whether there is something in a socket that nobody has now, or that another thread has not looked at for long: then
    /// nobody knows what came.
    pub(super) fn neglected(&self, thread: usize, now_us: u64) -> bool {
        let away = |pair: &&Pair| match pair.owner.load(Ordering::Acquire) {
            NOBODY => true,
            owner => owner != thread && now_us > pair.received_us.load(Ordering::Relaxed) + NEGLECTED_US,
        };
        self.pairs.iter().filter(away).flat_map(|pair| &pair.sockets).any(|socket| {
            let mut readable = [PollFd::new(socket.as_fd(), poll::READABLE)];
            poll::poll(&mut readable, Some(0)).ok();
            let [readable] = readable;
            readable.happened() != 0
        })
    }
}

impl Pair {
    /// Notes what went through it.
    #[inline]
    pub(super) fn carried(&self, bytes: usize, packets: usize, now_us: u64) {
        let begins = now_us > self.since_us.load(Ordering::Relaxed) + BULK_US;
        let before = if begins { 0 } else { self.bytes.load(Ordering::Relaxed) };
        let bytes = before + bytes as u64 + packets as u64 * PACKET_BYTES;
        if begins {
            self.since_us.store(now_us, Ordering::Relaxed);
        }
        self.bytes.store(bytes, Ordering::Relaxed);
        let much = if self.carries_bulk(now_us) { STILL_BULK_BYTES } else { BULK_BYTES };
        if bytes >= much {
            self.bulk_until_us.store(now_us + CALM_US, Ordering::Relaxed);
        }
    }

    fn carries_bulk(&self, now_us: u64) -> bool {
        now_us < self.bulk_until_us.load(Ordering::Relaxed)
    }

    /// Notes that the owner has read the sockets.
    pub(super) fn received(&self, now_us: u64) {
        self.received_us.store(now_us, Ordering::Relaxed);
    }

    /// The TUN queue, then the sockets.
    fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.tun.as_fd()).chain(self.sockets.iter().take(FAMILIES).map(AsFd::as_fd))
    }
}

/// Pairs on their way from one thread to others.
pub(super) struct Moves {
    under_way: Vec<Move>,
    next_look_us: u64,
}

struct Move {
    pair: usize,
    bulk: bool,
    due_us: u64,
}

impl Default for Moves {
    fn default() -> Self {
        Moves { under_way: Vec::with_capacity(AT_MOST), next_look_us: 0 }
    }
}

impl Moves {
    /// After a round that concerned these pairs: sends off what does not belong here, which is returned, and lets arrive what is
    /// due.
    pub(super) fn turn(
        &mut self,
        pairs: &Pairs,
        thread: usize,
        concerned: Set,
        now_us: u64,
        stats: &WorkerStats,
    ) -> io::Result<Set> {
        let mut gone = Set::default();
        let mut looked_at = concerned;
        if now_us >= self.next_look_us {
            // those of which nothing came as well
            self.next_look_us = now_us + LOOK_US;
            (0..pairs.pairs.len()).for_each(|pair| looked_at.insert(pair));
        }
        for number in looked_at.from(0) {
            let Some(pair) = pairs.get(number).filter(|pair| pair.owner.load(Ordering::Acquire) == thread) else {
                continue;
            };
            let bulk = pair.carries_bulk(now_us);
            if pairs.belongs(number, bulk, thread) {
                continue;
            }
            pairs.release(number)?;
            gone.insert(number);
            stats.flow.pairs_moved.add(1);
            self.under_way.push(Move { pair: number, bulk, due_us: now_us + PAUSE_US });
        }
        let mut due = self.under_way.extract_if(.., |a_move| a_move.due_us <= now_us);
        due.try_for_each(|Move { pair, bulk, .. }| pairs.give(pair, pairs.next(pair, bulk)))?;
        Ok(gone)
    }

    /// Pairs are spread: looks at all of them in the next turn.
    pub(super) fn look(&mut self) {
        self.next_look_us = 0;
    }

    /// When it is to have a turn even if nothing comes.
    pub(super) fn due_us(&self, pairs: &Pairs, thread: usize) -> Option<u64> {
        let owns = pairs.threads.get(thread).is_some_and(|thread| thread.pairs.load(Ordering::Relaxed) > 0);
        // the first has them unless they are to go, and then it has just been told
        let look = (owns && thread > 0).then_some(self.next_look_us);
        self.under_way.iter().map(|a_move| a_move.due_us).chain(look).min()
    }
}

/// How much a worker's first thread has to do, by which pairs are spread or gathered.
#[derive(Default)]
pub(super) struct Load {
    busy_us: u64,
    since_us: u64,
    /// The first's alone: what all had done, and when.
    all_us: u64,
    all_since_us: u64,
}

impl Load {
    /// After a round that began at `began_us`, with something to do or none. Returns whether pairs are spread from now on.
    pub(super) fn turn(&mut self, pairs: &Pairs, thread: usize, busy: bool, began_us: u64, now_us: u64) -> bool {
        if pairs.is_for_bulk(thread) || pairs.workers == 1 {
            return false;
        }
        self.busy_us += if busy { now_us - began_us } else { 0 };
        if now_us < self.since_us + LOAD_US {
            return false;
        }
        if let Some(thread) = pairs.threads.get(thread) {
            thread.busy_us.fetch_add(self.busy_us, Ordering::Relaxed);
        }
        let is_busy = self.busy_us * LOAD_US >= BUSY_US * (now_us - self.since_us);
        (self.busy_us, self.since_us) = (0, now_us);
        if thread > 0 {
            return false;
        }
        let (all_us, took_us) = (pairs.busy_us(), now_us - self.all_since_us);
        let at_ease = took_us >= EASE_US && (all_us - self.all_us) * EASE_US <= AT_EASE_US * took_us;
        let was_spread = pairs.spread.load(Ordering::Relaxed);
        let spread = if was_spread { !at_ease } else { is_busy };
        pairs.spread.store(spread, Ordering::Relaxed);
        if !was_spread || took_us >= EASE_US {
            (self.all_us, self.all_since_us) = (all_us, now_us);
        }
        spread && !was_spread
    }
}

/// What a thread found when it last waited, and has not emptied since.
pub(super) struct Ready {
    events: Vec<epoll::Event>,
    rounds: u32,
    /// Pairs whose TUN queue has something.
    pub(super) queues: Set,
    /// Those of whose sockets, for each address family, one has.
    pub(super) sockets: [Set; FAMILIES],
}

impl Ready {
    const STOP: u64 = u64::MAX;

    /// All of those.
    pub(super) fn all(&self) -> Set {
        self.sockets.iter().fold(self.queues, |all, sockets| all.or(*sockets))
    }

    /// Has `thread` learn of the other side of `stop` being closed as well.
    pub(super) fn new(pairs: &Pairs, thread: usize, stop: BorrowedFd<'_>) -> io::Result<Self> {
        if let Some(thread) = pairs.threads.get(thread) {
            epoll::add(&thread.epoll, stop, epoll::EventData::new_u64(Self::STOP), epoll::EventFlags::IN)?;
        }
        let events = Vec::with_capacity(1 + pairs.pairs.len() * (1 + FAMILIES));
        Ok(Ready { events, rounds: 0, queues: Set::default(), sockets: [Set::default(); FAMILIES] })
    }

    /// After a round, and without those that are `gone`: whether something is left to go on with, which is so for some rounds.
    /// To ask what there is each time cost one TCP stream a tenth.
    pub(super) fn goes_on(&mut self, gone: Set) -> bool {
        self.queues = self.queues.without(gone);
        self.sockets = self.sockets.map(|sockets| sockets.without(gone));
        let goes_on = self.rounds < ROUNDS_ON && !self.all().is_empty();
        self.rounds = if goes_on { self.rounds + 1 } else { 0 };
        goes_on
    }

    /// Waits until there is something to do, at most so long. Returns whether the thread is to stop.
    pub(super) fn wait(&mut self, pairs: &Pairs, thread: usize, patience: Duration) -> Result<bool, WorkerError> {
        self.events.clear();
        (self.queues, self.sockets) = (Set::default(), [Set::default(); FAMILIES]);
        let Some(thread) = pairs.threads.get(thread) else { return Ok(true) };
        let patience = Timespec { tv_sec: patience.as_secs() as _, tv_nsec: patience.subsec_nanos().into() };
        match epoll::wait(&thread.epoll, spare_capacity(&mut self.events), Some(&patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(WorkerError::Poll(error.into())),
        }
        for event in &self.events {
            let (flags, data) = (event.flags, event.data.u64());
            if data == Self::STOP {
                return Ok(true);
            }
            let (kind, pair) = ((data >> 8) as usize, data as usize & 0xff);
            match self.sockets.get_mut(kind.wrapping_sub(1)) {
                Some(sockets) => sockets.insert(pair),
                None if flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP) => {
                    return Err(WorkerError::TunGone);
                }
                None => self.queues.insert(pair),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests;
