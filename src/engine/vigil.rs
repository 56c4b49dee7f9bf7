//! The watch over peers' lives and paths: begins BFD sessions that are wanted, gives running ones the time, and originates
//! their packets and the probes of the path MTU.
//!
//! Each worker keeps one. A session is looked after by the worker that receives its packets, since a peer may be held for
//! dead only by who has received everything that came. Wanted are sessions with peers that packets go to or come from, and
//! with a few neighbours: what a node does is the same in a mesh of any size. Does not know what keeps the time.

use std::net::IpAddr;

use super::tables::{Peer, PeerIndex, Tables};
use super::tunnel::{Outbox, Tunnel};
use crate::health::peer::{Liveness, Moment, SURVEYED};
use crate::wire::bfd::{self, Ends, Message};
use crate::wire::survey::{self, Entry, Report};

/// How often some peers are looked at, whether their sessions are wanted, in microseconds.
const LOOK_US: u64 = 50_000;
/// How many at least; else all within a second.
const LOOKS: usize = 256;
/// How many at most are made up for at once by a worker that slept.
const LOOKS_LATE: usize = 4_096;
/// Running sessions have their turn together, at most so often.
const TURN_US: u64 = 4_000;

/// One worker's.
#[derive(Debug)]
pub struct Vigil {
    worker: usize,
    workers: usize,
    threads: usize,
    /// Where the table was that `running` belongs to. The next one is made while it still exists.
    table: usize,
    running: Vec<PeerIndex>,
    next_turn_us: u64,
    next_look_us: u64,
    at: usize,
    /// What a session wants sent, and on which way.
    due: Vec<(Message, Option<u16>)>,
    /// A packet of BFD is made here.
    room: Vec<u8>,
}

/// What a turn of a session needs.
struct Turn<'t, 'o> {
    tables: &'t Tables,
    now_us: u64,
    settled_us: Option<u64>,
    data_socket: u16,
    outbox: &'o mut Outbox,
}

impl Vigil {
    /// For thread number `worker` of so many. The first `workers` of them begin sessions; one of the others has those alone
    /// whose packets come to it.
    pub fn new(worker: usize, workers: usize, threads: usize) -> Self {
        Vigil {
            worker,
            workers: workers.max(1),
            threads,
            table: 0,
            running: Vec::new(),
            next_turn_us: u64::MAX,
            next_look_us: 0,
            at: worker,
            due: Vec::new(),
            room: Vec::new(),
        }
    }

    /// Whether anything is due besides answers.
    pub fn is_due(&self, now_us: u64) -> bool {
        now_us >= self.next_turn_us
    }

    /// When it will be; `u64::MAX`: not unless a packet comes.
    pub fn next_turn_us(&self) -> u64 {
        self.next_turn_us
    }

    /// Whether it is time to look for traffic, which waits for a moment in which the worker is awake anyway.
    pub fn looks(&self, now_us: u64) -> bool {
        now_us >= self.next_look_us
    }

    /// Does what is due. `settled_us`: this worker has received whatever came before that time. `heard`: peers whose BFD
    /// packets came since the last turn; it is emptied.
    pub fn turn(
        &mut self,
        tables: &Tables,
        now_us: u64,
        settled_us: Option<u64>,
        heard: &mut Vec<PeerIndex>,
        data_socket: u16,
        outbox: &mut Outbox,
    ) {
        let mut turn = Turn { tables, now_us, settled_us, data_socket, outbox };
        let table = std::ptr::from_ref(tables).addr();
        if self.table != table {
            let resumes = std::mem::replace(&mut self.table, table) == 0;
            self.take_over(&turn, resumes);
        }
        for peer in heard.drain(..) {
            self.answer(&mut turn, peer);
            let deadline = self.give(&mut turn, peer);
            self.run(peer, deadline);
        }
        if now_us >= self.next_look_us {
            let missed = (now_us - self.next_look_us) / LOOK_US;
            self.next_look_us = now_us + LOOK_US;
            self.look(&mut turn, missed as usize);
        }
        if now_us >= self.next_turn_us {
            self.next_turn_us = u64::MAX;
            let mut running = std::mem::take(&mut self.running);
            running.retain(|peer| match self.give(&mut turn, *peer) {
                Some(deadline) => {
                    self.next_turn_us = self.next_turn_us.min(deadline.max(now_us + TURN_US));
                    true
                }
                None => false,
            });
            self.running = running;
        }
    }

    /// The running sessions of a new table; idle ones go with the first turn.
    #[cold]
    fn take_over(&mut self, turn: &Turn<'_, '_>, resumes: bool) {
        self.running.clear();
        for index in (0..turn.tables.peers().len() as u32).map(PeerIndex) {
            let Some(liveness) = turn.tables.liveness(index).filter(|liveness| self.owns(index, liveness)) else {
                continue;
            };
            if resumes {
                liveness.resume(turn.now_us);
            }
            self.running.push(index);
        }
        self.at = self.worker;
        (self.next_turn_us, self.next_look_us) = (0, turn.now_us);
    }

    fn owns(&self, peer: PeerIndex, liveness: &Liveness) -> bool {
        let first = peer.0 as usize % self.workers;
        // there may be fewer threads than there were
        Some(liveness.owner(first)).filter(|owner| *owner < self.threads).unwrap_or(first) == self.worker
    }

    fn run(&mut self, peer: PeerIndex, deadline: Option<u64>) {
        let Some(deadline) = deadline else { return };
        self.next_turn_us = self.next_turn_us.min(deadline);
        if !self.running.contains(&peer) {
            self.running.push(peer);
        }
    }

    /// Looks at some of the peers, whether there is traffic, and at those of so many turns that it slept through.
    fn look(&mut self, turn: &mut Turn<'_, '_>, missed: usize) {
        if self.worker >= self.workers {
            return;
        }
        let peers = turn.tables.peers().len();
        let looks = (peers / self.workers / 20).max(LOOKS);
        let looks = looks.max(looks.saturating_mul(missed + 1).min(LOOKS_LATE));
        for _ in 0..looks {
            if self.at >= peers {
                self.at = self.worker;
                return;
            }
            let index = PeerIndex(self.at as u32);
            self.at += self.workers;
            let Some(peer) = turn.tables.peer(index) else { continue };
            let Some(liveness) = peer.spec.liveness.as_deref() else { continue };
            let traffic = peer.spec.stats.sum(|flow| flow.tx_packets.get().wrapping_add(flow.rx_packets.get()));
            if liveness.look(turn.now_us, traffic) && !self.running.contains(&index) {
                // it begins here, and goes on where its packets are received
                liveness.own(self.worker);
                let deadline = self.give(turn, index);
                self.run(index, deadline);
            }
        }
    }

    /// Answers the probes that came here.
    fn answer(&mut self, turn: &mut Turn<'_, '_>, index: PeerIndex) {
        let Some(liveness) = turn.tables.liveness(index) else { return };
        let due = &mut self.due;
        liveness.answers(|message| due.push((message.clone(), None)));
        self.post_all(turn, index);
    }

    /// Gives a session the time. Returns when it wants it again; `None` where it sleeps, or is another worker's.
    fn give(&mut self, turn: &mut Turn<'_, '_>, index: PeerIndex) -> Option<u64> {
        let peer = turn.tables.peer(index)?;
        let liveness = peer.spec.liveness.as_deref().filter(|liveness| self.owns(index, liveness))?;
        let stats = &peer.spec.stats;
        let sealed = peer.spec.tunnel.as_deref().is_some_and(Tunnel::seals);
        let keys = turn.tables.local().bfd_keys.as_deref().filter(|keys| !sealed && !keys.accept_none());
        // what anybody could have sent proves nothing where BFD has to be authentic
        let last_seen_us = stats.last_seen().map(|ms| ms * 1000).filter(|_| keys.is_none());
        let moment = Moment { now_us: turn.now_us, settled_us: turn.settled_us, last_seen_us };
        let sent_bytes = || stats.sum(|flow| flow.tx_bytes.get());
        let ways = match peer.spec.tunnel.as_deref().filter(|tunnel| tunnel.seals()) {
            Some(tunnel) => tunnel.keys().len(),
            None => usize::from(turn.data_socket),
        };
        let due = &mut self.due;
        let again =
            liveness.turn(moment, peer.bounds(), ways, sent_bytes, |message, way| due.push((message.clone(), way)));
        self.post_all(turn, index);
        again
    }

    /// Sends what is due, now that the session is not locked any more: sealing takes a lane's lock, under which others wait
    /// for the session's.
    fn post_all(&mut self, turn: &mut Turn<'_, '_>, index: PeerIndex) {
        let mut due = std::mem::take(&mut self.due);
        for (message, way) in due.drain(..) {
            self.post(turn, index, &message, way);
        }
        self.due = due;
    }

    /// Sends a packet the way that packets to the peer go: on this one of several, or on the one that BFD has.
    fn post(&mut self, turn: &mut Turn<'_, '_>, index: PeerIndex, message: &Message, way: Option<u16>) {
        let Some(peer) = turn.tables.peer(index) else { return };
        let (spec, local) = (&peer.spec, turn.tables.local());
        let Some(liveness) = spec.liveness.as_deref() else { return };
        let same_family = |ip: &&IpAddr| ip.is_ipv4() == spec.endpoint.is_ipv4();
        // underlay addresses come first
        let Some(own) = local.addresses.iter().find(same_family).copied() else { return };
        // one and the same source port: the peer's kernel hands all of them to one worker
        let spread = liveness.discriminator() as u16;
        let source_port = bfd::FIRST_SOURCE_PORT + spread % (u16::MAX - bfd::FIRST_SOURCE_PORT);
        let filled;
        let message = match message {
            Message::Report(report) => {
                let wake = liveness.wakes_others().then_some(turn.now_us);
                filled = Message::Report(reported(turn.tables, report, wake));
                &filled
            }
            message => message,
        };
        self.room.clear();
        if let Some(tunnel) = spec.tunnel.as_deref().filter(|tunnel| tunnel.seals()) {
            let Some(theirs) = spec.underlay.iter().find(same_family).copied() else { return };
            bfd::write_packet(message, Ends { source: own, destination: theirs, source_port }, None, &mut self.room);
            let lane = usize::from(way.unwrap_or(0));
            tunnel.originate(index, lane, &self.room, turn.now_us / 1000, turn.data_socket, turn.outbox);
        } else {
            let vni = liveness.settings().vni;
            let keys = local.bfd_keys.as_deref();
            bfd::write_frame(message, vni, local.mac.0, (own, source_port), keys, &mut self.room);
            let socket = way.unwrap_or(spread) % turn.data_socket.max(1);
            turn.outbox.originate(&self.room, spec.endpoint, socket, bfd::TOS);
        }
    }
}

/// The answer with what this node thinks of its peers. `wake`: all of them are to be watched, from now on for a while.
#[cold]
fn reported(tables: &Tables, empty: &Report, wake: Option<u64>) -> Report {
    let peers = tables.peers();
    let entry = |peer: &Peer| {
        let liveness = peer.spec.liveness.as_deref();
        Entry {
            mac: peer.spec.mac.0,
            state: liveness.map_or(0, |liveness| liveness.verdict() as u8),
            sealed: peer.spec.tunnel.as_deref().is_some_and(Tunnel::seals),
            mtu: peer.mtu(),
            round_trip_us: liveness.and_then(Liveness::round_trip_us).unwrap_or(0),
        }
    };
    if let Some(now_us) = wake.filter(|_| peers.len() <= SURVEYED) {
        peers.iter().filter_map(|peer| peer.spec.liveness.as_deref()).for_each(|liveness| liveness.wake(now_us));
    }
    let entries = peers.iter().skip(usize::from(empty.first)).take(survey::ENTRIES).map(entry).collect();
    Report { total: peers.len().min(SURVEYED) as u16, entries, ..empty.clone() }
}

#[cfg(test)]
mod tests;
