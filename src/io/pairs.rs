//! Queue pairs: a TUN queue and, for each address family, the socket whose flows go through it.
//!
//! A flow stays with its pair in both directions: the kernel gives a flow's packets to the TUN queue that its answers were
//! last written to (`tun_flow_update`), and spreads datagrams over the sockets by their ports. There are more pairs than
//! threads, so that few flows share a queue (stochastic fairness queueing, McKenney 1990), and each belongs to one thread at
//! a time, which hands it over whole: so nothing is ever reordered within a flow.
//!
//! Each worker has two threads. One waits for all its pairs; a pair that carries much at once is handed to the other, whose
//! thread is the one with the fewest. A thread that carries bulk traffic uses up its share of a processor and then has to wait
//! for milliseconds wherever applications want that processor too; one that does little is woken at once. The kernel tells new
//! and old flows apart for the same reason (FQ-CoDel, RFC 8290 §4.1).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use socket2::Socket;

use super::tun::TunQueue;
use super::worker::WorkerError;
use crate::sys::poll::{self, PollFd};

/// A node has at least so many pairs.
const AT_LEAST: usize = 32;
/// And at most so many: a set of them is one word.
const AT_MOST: usize = 64;
/// Address families, for each of which a pair may have a socket.
const FAMILIES: usize = 2;
/// Who has left something unread for so long is not where it should be, in microseconds.
const NEGLECTED_US: u64 = 100_000;

/// A set of pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Set(u64);

impl Set {
    pub(super) fn insert(&mut self, pair: usize) {
        self.0 |= 1 << (pair % AT_MOST);
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
    /// When its owner last read its sockets, in microseconds.
    received_us: AtomicU64,
}

/// All pairs of a node.
#[derive(Debug)]
pub struct Pairs {
    pairs: Vec<Pair>,
    threads: Vec<Thread>,
    workers: usize,
}

#[derive(Debug)]
struct Thread {
    epoll: OwnedFd,
    pairs: AtomicUsize,
}

/// How many pairs so many workers share: as many each.
pub fn count(workers: usize) -> usize {
    let workers = workers.clamp(1, AT_MOST);
    let each = (std::env::var("PAIRS").ok().and_then(|p| p.parse().ok()).unwrap_or(AT_LEAST) / workers).max(1);
    workers * each
}

impl Pairs {
    /// Puts queues and sockets together, and gives each worker's first thread its pairs: number `n` to worker `n` modulo
    /// their number.
    pub fn new(queues: Vec<TunQueue>, sockets: Vec<Vec<Socket>>, workers: usize) -> io::Result<Self> {
        let workers = workers.max(1);
        let thread = |_| {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            Ok(Thread { epoll, pairs: AtomicUsize::new(0) })
        };
        let threads = (0..2 * workers).map(thread).collect::<io::Result<Vec<_>>>()?;
        let pair = |((number, tun), sockets)| {
            let owner = AtomicUsize::new(number % workers);
            Pair { tun, sockets, owner, received_us: AtomicU64::new(0) }
        };
        let pairs = queues.into_iter().enumerate().zip(sockets).map(pair).collect();
        let pairs = Pairs { pairs, threads, workers };
        for number in 0..pairs.pairs.len() {
            pairs.register(number, number % workers)?;
        }
        Ok(pairs)
    }

    /// One of them.
    pub fn get(&self, pair: usize) -> Option<&Pair> {
        self.pairs.get(pair)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Pair> {
        self.pairs.iter()
    }

    /// Those that belong to a thread.
    pub(super) fn of(&self, thread: usize) -> Set {
        let mut set = Set::default();
        for (number, pair) in self.pairs.iter().enumerate() {
            if pair.owner.load(Ordering::Acquire) == thread {
                set.insert(number);
            }
        }
        set
    }

    /// Whether a thread is there for bulk traffic.
    pub(super) fn is_for_bulk(&self, thread: usize) -> bool {
        thread >= self.workers
    }

    /// Hands a pair to the thread for bulk traffic that has the fewest.
    pub(super) fn hand_to_bulk(&self, pair: usize) -> io::Result<()> {
        let home = pair % self.workers;
        // its own worker's first
        let candidates = (0..self.workers).map(|turn| self.workers + (home + turn) % self.workers);
        let few = |thread: &usize| {
            self.threads.get(*thread).map_or(usize::MAX, |thread| thread.pairs.load(Ordering::Relaxed))
        };
        candidates.min_by_key(few).map_or(Ok(()), |to| self.hand_over(pair, to))
    }

    /// Hands a pair back.
    pub(super) fn hand_home(&self, pair: usize) -> io::Result<()> {
        self.hand_over(pair, pair % self.workers)
    }

    /// To be called by the pair's owner, which does not touch it any more.
    fn hand_over(&self, number: usize, to: usize) -> io::Result<()> {
        let Some(pair) = self.pairs.get(number) else { return Ok(()) };
        if let Some(from) = self.threads.get(pair.owner.load(Ordering::Relaxed)) {
            for source in pair.sources() {
                epoll::delete(&from.epoll, source)?;
            }
            from.pairs.fetch_sub(1, Ordering::Relaxed);
        }
        pair.owner.store(to, Ordering::Release);
        self.register(number, to)
    }

    fn register(&self, number: usize, thread: usize) -> io::Result<()> {
        let (Some(pair), Some(thread)) = (self.pairs.get(number), self.threads.get(thread)) else { return Ok(()) };
        thread.pairs.fetch_add(1, Ordering::Relaxed);
        for (kind, source) in (0..).zip(pair.sources()) {
            let data = epoll::EventData::new_u64(kind << 8 | number as u64);
            epoll::add(&thread.epoll, source, data, epoll::EventFlags::IN)?;
        }
        Ok(())
    }

    /// Whether there is something in a socket that this thread handed over, which who has it now has not looked at for long:
    /// then nobody knows what came.
    pub(super) fn neglected(&self, thread: usize, now_us: u64) -> bool {
        let away = |(number, pair): &(usize, &Pair)| {
            number % self.workers == thread
                && pair.owner.load(Ordering::Relaxed) != thread
                && now_us > pair.received_us.load(Ordering::Relaxed) + NEGLECTED_US
        };
        self.pairs.iter().enumerate().filter(away).flat_map(|(_, pair)| &pair.sockets).any(|socket| {
            let mut readable = [PollFd::new(socket.as_fd(), poll::READABLE)];
            poll::poll(&mut readable, Some(0)).ok();
            let [readable] = readable;
            readable.happened() != 0
        })
    }
}

impl Pair {
    /// Notes that the owner has read the sockets.
    pub(super) fn received(&self, now_us: u64) {
        self.received_us.store(now_us, Ordering::Relaxed);
    }

    /// The TUN queue, then the sockets.
    fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.tun.as_fd()).chain(self.sockets.iter().map(AsFd::as_fd))
    }
}

/// What a thread found when it last waited.
pub(super) struct Ready {
    events: Vec<epoll::Event>,
    /// Pairs whose TUN queue has something.
    pub(super) queues: Set,
    /// Those of whose sockets, for each address family, one has.
    pub(super) sockets: [Set; FAMILIES],
}

impl Ready {
    const STOP: u64 = u64::MAX;

    /// Has `thread` learn of the other side of `stop` being closed as well.
    pub(super) fn new(pairs: &Pairs, thread: usize, stop: BorrowedFd<'_>) -> io::Result<Self> {
        if let Some(thread) = pairs.threads.get(thread) {
            epoll::add(&thread.epoll, stop, epoll::EventData::new_u64(Self::STOP), epoll::EventFlags::IN)?;
        }
        let events = Vec::with_capacity(1 + pairs.pairs.len() * (1 + FAMILIES));
        Ok(Ready { events, queues: Set::default(), sockets: [Set::default(); FAMILIES] })
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
