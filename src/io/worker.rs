//! One thread of a worker, which takes each batch through the whole journey before it looks for the next (run to
//! completion). Threads share the peer table, which never changes, and hand queue pairs to each other ([`super::pairs`]).

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use socket2::Socket;

use super::pairs::{Load, Moves, Pair, Pairs, Ready, Set};
use super::spin::Spin;
use super::tap::{Side, Tally, Tap};
use super::tcp_ends;
use super::tun::{TunQueue, is_gone};
use super::udp::{Batch, UdpPort};
use crate::engine::big_tcp::BigTcp;
use crate::engine::coalesce::Accepts;
use crate::engine::drop::Drop;
use crate::engine::inbound::{Inbound, Received};
use crate::engine::outbound::{CutBehind, HEADROOM, Outbound};
use crate::engine::stats::{Stats, WorkerStats};
use crate::engine::tables::{ENCAPSULATION, PeerIndex, Tables};
use crate::engine::tunnel::Outbox;
use crate::engine::vigil::Vigil;
use crate::sys::sched;
use crate::sys::udp::Meta;
use crate::wire::ip::Packet;
use crate::wire::vnet_hdr;

/// Room for one frame: the offload header and the longest IP packet.
const FRAME: usize = 10 + 65_535;
/// Bytes after which a batch of reads is sent: larger ones fall out of the cache before they are.
const READ_BYTES: usize = 96 << 10;
/// Packets after which it is.
const READ_PACKETS: usize = 128;
/// So many batches at most are read and sent, one behind the other, while what was left over of one waits for the next. What may wait
/// lies in the buffer, so that they lie behind each other there as well; the last may be shorter.
const ROUNDS: usize = 4;
/// How often tunnels are told the time, and how many a worker looks at each time at least: each has its turn within four
/// times that.
const TUNNEL_TICK: Duration = Duration::from_millis(50);
const TUNNELS_A_TICK: usize = 256;
/// Datagrams after which packets have their turn again: a handshake costs some 100 µs, and after a start each peer wants one.
const LETTERS_A_TURN: usize = 32;
/// How often an idle worker looks whether there is a new table with tunnels.
const IDLE: Duration = Duration::from_secs(1);
/// How long a thread for what is no bulk traffic wants to run at a time, in nanoseconds: the kernel's least. Who asks for
/// less than those that have the processor is let in at once; it gets no more of it in all.
const SLICE_NS: u64 = 100_000;
/// Frames start at multiples of a cache line.
const ALIGN: usize = 64;

/// What a thread works with.
pub struct Worker {
    /// Its number, from 0: first each worker's for what comes by itself, then each one's for bulk traffic.
    pub thread: usize,
    /// How many workers there are.
    pub workers: usize,
    /// The queue pairs, of which some are its own.
    pub pairs: Arc<Pairs>,
    /// What the device takes.
    pub accepts: Accepts,
    /// One port for each address family.
    pub ports: Vec<UdpPort>,
    /// Sending sockets of each port.
    pub senders: u16,
    /// The peer table.
    pub tables: Arc<ArcSwap<Tables>>,
    /// Its counters among all threads'.
    pub stats: Stats,
    /// Who looks at packets.
    pub tap: Arc<Tap>,
    /// When meshd started.
    pub started: Instant,
    /// Closed from the other side to end the thread.
    pub stop: UnixStream,
    /// For how long it looks for the next packet before it sleeps.
    pub busy_poll: Duration,
    /// Whether super-packets leave uncut.
    pub cut_behind: Arc<CutBehind>,
    /// Whether those for this node itself may be longer than 64 KiB.
    pub big_tcp: Arc<BigTcp>,
}

/// Why a worker ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The TUN device was deleted.
    #[error("the TUN device is gone")]
    TunGone,
    /// Waiting failed.
    #[error("poll failed: {0}")]
    Poll(#[source] io::Error),
    /// io_uring refused something.
    #[error("io_uring failed: {0}")]
    Ring(#[source] io::Error),
}

impl Worker {
    /// Works until the other side of `stop` is closed.
    pub fn run(self) -> Result<(), WorkerError> {
        let Worker {
            thread,
            workers,
            pairs,
            accepts,
            mut ports,
            senders,
            tables,
            stats,
            tap,
            started,
            stop,
            busy_poll,
            cut_behind,
            big_tcp,
        } = self;
        let for_bulk = pairs.is_for_bulk(thread);
        if !for_bulk {
            sched::set_slice(SLICE_NS).ok(); // without it packets wait longer where processors are busy
        }
        let mut ready = Ready::new(&pairs, thread, stop.as_fd()).map_err(WorkerError::Poll)?;
        let mut tables = Cache::new(tables);
        let mut outbound = Outbound::new(stats.clone(), thread, senders).with_cut_behind(cut_behind);
        let inbound = Inbound::new(stats.clone(), thread, accepts).with_data_socket(outbound.data_socket());
        let mut inbound = inbound.with_big_tcp(big_tcp);
        let mut clockwork = Clockwork::new(thread, workers);
        let mut vigil = Vigil::new(thread, workers, stats.threads());
        let mut spin = Spin::new(busy_poll, for_bulk);
        let mut moves = Moves::default();
        let mut load = Load::default();
        let mut first = 0;
        let Some(stats) = stats.worker(thread) else { return Ok(()) };
        let mut frames = vec![0; ROUNDS * READ_BYTES + FRAME + 2 * ALIGN];
        let mut patience = Duration::ZERO;
        let mut goes_on = false;
        loop {
            if !goes_on && ready.wait(&pairs, thread, patience)? {
                return Ok(());
            }
            let mut concerned = ready.all();
            let now_us = started.elapsed().as_micros() as u64;
            let now_ms = now_us / 1000;
            let tables = tables.load();
            let tap = tap.is_on().then_some(Look { tap: &tap, now_us });
            if !ready.queues.is_empty() {
                let read = if tap.is_none() { read_and_send::<false> } else { read_and_send::<true> };
                let waiting = (&mut ready.queues, &mut first);
                read(&pairs, waiting, &mut ports, &mut outbound, tables, now_us, &mut frames, stats, tap)?;
            }
            // before somebody is held for dead, everything that came until now is received; a pair that is given to this
            // thread after the first question is in the second one's answer
            let look = vigil.is_due(now_us);
            let mut settled = look && !pairs.neglected(thread, now_us);
            if look && ready.wait(&pairs, thread, Duration::ZERO)? {
                return Ok(());
            }
            concerned = concerned.or(ready.all());
            for (family, (port, waiting)) in ports.iter_mut().zip(&mut ready.sockets).enumerate() {
                for number in waiting.from(0) {
                    let Some(pair) = pairs.get(number) else { continue };
                    let place = (number, family, pair);
                    if receive_and_write(port, place, &mut inbound, tables, started, now_us, stats, tap) {
                        waiting.remove(number);
                    }
                }
                settled &= waiting.is_empty();
            }
            watch(&mut vigil, tables, started, now_us, settled, &mut inbound, outbound.data_socket());
            let tunnels = tables.has_tunnels() && !for_bulk; // the other thread tells them the time
            let late = tunnels && clockwork.turn(tables, now_ms, outbound.data_socket(), inbound.outbox());
            if !inbound.outbox().is_empty() {
                outbound.post(inbound.outbox());
                send(&mut ports, &mut outbound, tables, &[], stats, tap);
            }
            let after_us = started.elapsed().as_micros() as u64;
            if load.turn(&pairs, thread, !concerned.is_empty(), now_us, after_us) {
                moves.look();
            }
            let gone = moves.turn(&pairs, thread, concerned, after_us, stats).map_err(WorkerError::Poll)?;
            goes_on = ready.goes_on(gone) && for_bulk;
            spin.looked(now_us, stats);
            let awake = !ready.all().is_empty() || late || spin.goes_on(now_us);
            patience = self::patience(awake, tunnels, &vigil, started);
            if let Some(due_us) = moves.due_us(&pairs, thread) {
                patience = patience.min(Duration::from_micros(due_us.saturating_sub(after_us)));
            }
        }
    }
}

/// Somebody looks at packets, and this is the time.
#[derive(Clone, Copy)]
pub(super) struct Look<'t> {
    pub(super) tap: &'t Tap,
    pub(super) now_us: u64,
}

/// TUN → UDP, out of all queues that have something, in rounds of a batch each. Those that it empties leave the set.
#[allow(clippy::too_many_arguments)]
fn read_and_send<const TAPPED: bool>(
    pairs: &Pairs,
    (ready, first): (&mut Set, &mut usize),
    ports: &mut [UdpPort],
    outbound: &mut Outbound,
    tables: &Tables,
    now_us: u64,
    frames: &mut [u8],
    stats: &WorkerStats,
    tap: Option<Look<'_>>,
) -> Result<(), WorkerError> {
    let now_ms = now_us / 1000;
    let (mut at, start) = (ALIGN, *first);
    for round in 1..=ROUNDS {
        let mut tally = TAPPED.then(|| Tally::new(stats));
        let (mut packets, mut last) = (0, None);
        let (share, end) = (ready.len().max(1), (at + READ_BYTES + FRAME).min(frames.len()));
        // there may not be room for all: who had none is the first next time, else who comes behind the last; rounds begin with
        // the same, since what was set aside is theirs
        for number in ready.from(start) {
            *first = number;
            if at + FRAME > end {
                break;
            }
            *first = number + 1;
            let Some(pair) = pairs.get(number) else { continue };
            let (begin, before, enough) = (at, packets, packets + READ_PACKETS.div_ceil(share));
            while at < begin + READ_BYTES / share && packets < enough {
                let Some(room) = frames.get_mut(at..at + FRAME) else { break };
                let len = match pair.tun.read(room) {
                    Ok(len) => len,
                    Err(error) if is_gone(&error) => return Err(WorkerError::TunGone),
                    Err(_) => {
                        ready.remove(number);
                        break;
                    }
                };
                outbound.push(tables, now_ms, frames, at, len);
                if TAPPED && let (Some(tap), Some(tally)) = (tap, &mut tally) {
                    let packet = frames.get(at + vnet_hdr::HEADER_LEN..at + len).unwrap_or_default();
                    tap.tap.packet(tap.now_us, Side::Inner, true, tally.news(), packet);
                }
                packets += 1;
                // the next frame's headroom must not reach into this one
                at = (at + len + HEADROOM).next_multiple_of(ALIGN);
            }
            if at >= begin + READ_BYTES / share && round < ROUNDS {
                outbound.more_follows();
            }
            pair.carried(at - begin, packets - before, now_us);
            last = Some(&pair.tun);
        }
        stats.flow.tun_reads.add(packets as u64);
        let goes_on = outbound.set_aside();
        if goes_on && !outbound.batch().needs_payload() {
            at = ALIGN;
        }
        if let Some(tun) = last {
            write_errors(tun, outbound, tap);
        }
        send(ports, outbound, tables, frames, stats, tap);
        if !goes_on {
            break;
        }
    }
    Ok(())
}

/// Answers what did not fit or had nowhere to go.
pub(super) fn write_errors(tun: &TunQueue, outbound: &Outbound, tap: Option<Look<'_>>) {
    for frame in outbound.errors() {
        let written = tun.write(frame).is_ok();
        outbound.error_written(frame, written);
        if let Some(look) = tap {
            let packet = frame.get(vnet_hdr::HEADER_LEN..).unwrap_or_default();
            look.tap.packet(look.now_us, Side::Inner, false, None, packet);
        }
    }
}

/// Sends the batch, and starts the next.
pub(super) fn send(
    ports: &mut [UdpPort],
    outbound: &mut Outbound,
    tables: &Tables,
    frames: &[u8],
    stats: &WorkerStats,
    tap: Option<Look<'_>>,
) {
    let tally = tap.map(|tap| (tap, Tally::new(stats)));
    for port in &mut *ports {
        port.send(outbound, tables, frames, stats);
    }
    if let Some((tap, mut tally)) = tally {
        // which of the batch were refused the kernel does not say for each
        show_sent(tap, ports, outbound, frames, tally.news());
    }
    outbound.clear();
}

#[cold]
fn show_sent(look: Look<'_>, ports: &[UdpPort], outbound: &Outbound, frames: &[u8], dropped: Option<Drop>) {
    let batch = outbound.batch();
    for run in batch.runs() {
        let port = ports.iter().find(|port| port.address().is_ipv4() == run.endpoint.is_ipv4());
        let Some(from) = port.map(|port| port.source(run.key.socket)) else { continue };
        for datagram in run.datagrams() {
            let bytes: Vec<u8> = datagram.iter().flat_map(|piece| piece.of(frames, batch.slab())).copied().collect();
            look.tap.datagram(look.now_us, true, dropped, (from, run.endpoint), run.tos, &bytes);
        }
    }
}

/// Gives BFD sessions their turn: those whose packets came, and all when they are due. `received_us`: when receiving began.
pub(super) fn watch(
    vigil: &mut Vigil,
    tables: &Tables,
    started: Instant,
    received_us: u64,
    settled: bool,
    inbound: &mut Inbound,
    data_socket: u16,
) {
    if !vigil.is_due(received_us) && !vigil.looks(received_us) && inbound.heard().is_empty() {
        return;
    }
    // a poll is timed from when it leaves
    let now_us = started.elapsed().as_micros() as u64;
    let mut heard = std::mem::take(inbound.heard());
    let settled = settled.then_some(received_us);
    vigil.turn(tables, now_us, settled, &mut heard, data_socket, inbound.outbox());
    *inbound.heard() = heard;
}

/// For how long a worker may wait: not at all while it is busy, else until tunnels or a session are due. Whole milliseconds.
pub(super) fn patience(busy: bool, has_tunnels: bool, vigil: &Vigil, started: Instant) -> Duration {
    let longest = match (busy, has_tunnels) {
        (true, _) => Duration::ZERO,
        (false, true) => TUNNEL_TICK,
        (false, false) => IDLE,
    };
    let now_us = started.elapsed().as_micros() as u64;
    longest.min(Duration::from_millis(vigil.next_turn_us().saturating_sub(now_us).div_ceil(1000)))
}

/// Tells tunnels the time, some of them each tick: those that belong to this worker.
pub(super) struct Clockwork {
    worker: usize,
    workers: usize,
    next_ms: u64,
    at: usize,
    second: u64,
}

impl Clockwork {
    pub(super) fn new(worker: usize, workers: usize) -> Self {
        Clockwork { worker, workers: workers.max(1), next_ms: 0, at: worker, second: 0 }
    }

    /// Does what is due, and returns whether there is more.
    pub(super) fn turn(&mut self, tables: &Tables, now_ms: u64, data_socket: u16, outbox: &mut Outbox) -> bool {
        if now_ms < self.next_ms || !tables.has_tunnels() {
            return false;
        }
        self.next_ms = now_ms + TUNNEL_TICK.as_millis() as u64;
        if let Some(identity) = tables.local().identity.as_ref().filter(|_| self.worker == 0)
            && self.second != now_ms / 1000
        {
            self.second = now_ms / 1000;
            identity.second_passed();
        }
        let peers = tables.peers().len();
        let turns = (peers / self.workers / 4).max(TUNNELS_A_TICK);
        for _ in 0..turns {
            if self.at >= peers {
                self.at = self.worker;
                break;
            }
            let peer = PeerIndex(self.at as u32);
            let spec = tables.peer(peer).map(|peer| &peer.spec);
            for tunnel in spec.into_iter().flat_map(|spec| spec.tunnel.iter().chain(&spec.former)) {
                tunnel.tick(peer, now_ms, data_socket, outbox);
            }
            self.at += self.workers;
            if outbox.len() >= LETTERS_A_TURN {
                self.next_ms = now_ms;
                return true;
            }
        }
        false
    }
}

/// A batch UDP → TUN. Returns whether that was all.
#[allow(clippy::too_many_arguments)]
fn receive_and_write(
    port: &mut UdpPort,
    (number, family, pair): (usize, usize, &Pair),
    inbound: &mut Inbound,
    tables: &Tables,
    started: Instant,
    now_us: u64,
    stats: &WorkerStats,
    tap: Option<Look<'_>>,
) -> bool {
    let before = stats.flow.udp_rx_bytes.get();
    let Some(socket) = pair.sockets.get(family) else { return true };
    let Batch { buffers, emptied } =
        take_in(port, (socket, number), inbound, tables, started, now_us / 1000, stats, tap);
    pair.tun.write_units(inbound, port.arena());
    stats.flow.tun_writes.add(inbound.units().len() as u64);
    inbound.clear();
    tcp_ends::answer(inbound);
    let bytes = stats.flow.udp_rx_bytes.get() - before;
    pair.carried(bytes as usize, buffers, now_us);
    pair.received(now_us);
    emptied
}

/// Receives a batch and takes it through the engine, up to what is to be written.
#[allow(clippy::too_many_arguments)]
pub(super) fn take_in(
    port: &mut UdpPort,
    (socket, number): (&Socket, usize),
    inbound: &mut Inbound,
    tables: &Tables,
    started: Instant,
    now_ms: u64,
    stats: &WorkerStats,
    tap: Option<Look<'_>>,
) -> Batch {
    let batch = match port.receive(socket, number) {
        Ok(batch) => batch,
        // an error that was pending on the socket is fetched by this; what is wrong shows at the next send
        Err(error) => return Batch { buffers: 0, emptied: error.kind() == io::ErrorKind::WouldBlock },
    };
    inbound.received_at(started.elapsed().as_micros() as u64);
    inbound.looked_at(tap.is_some());
    stats.flow.udp_recv_calls.add(1);
    stats.flow.udp_recv_buffers.add(batch.buffers as u64);
    let to = port.address();
    for index in 0..batch.buffers {
        let Some(received) = port.meta(index).and_then(received) else { continue };
        match tap {
            None => inbound.push(tables, now_ms, port.arena_mut(), received),
            Some(look) => push_tapped(inbound, tables, now_ms, stats, port.arena_mut(), received, to, look),
        }
    }
    inbound.finish(port.arena_mut());
    if let Some(look) = tap {
        show_units(inbound, port.arena(), look);
    }
    batch
}

#[inline]
pub(super) fn received(meta: Meta) -> Option<Received> {
    let Meta { at, len, segment_len, tos, truncated, source } = meta;
    Some(Received { at, len, segment_len, source: source?, tos, truncated })
}

/// Takes one buffer through the engine while somebody looks: a datagram at a time, so that it is known what became of each.
#[cold]
#[allow(clippy::too_many_arguments)]
pub(super) fn push_tapped(
    inbound: &mut Inbound,
    tables: &Tables,
    now_ms: u64,
    stats: &WorkerStats,
    memory: &mut [u8],
    whole: Received,
    to: SocketAddr,
    Look { tap, now_us }: Look<'_>,
) {
    let mut tally = Tally::new(stats);
    let buffer = memory.get(whole.at..whole.at + whole.len).unwrap_or_default();
    let step = whole.segment_len.map_or(whole.len, usize::from).clamp(1, whole.len.max(1));
    // a kernel VXLAN device may hand over one frame that was never cut
    let inner = buffer.get(ENCAPSULATION..).and_then(|inner| Packet::parse(inner).ok());
    let one = inner.is_some_and(|inner| usize::from(inner.total_len) + ENCAPSULATION == whole.len);
    let step = if one { whole.len } else { step };
    for at in (0..whole.len).step_by(step.max(1)) {
        let len = step.min(whole.len - at);
        let part = Received { at: whole.at + at, len, segment_len: whole.segment_len.filter(|_| one), ..whole };
        // it is decrypted where it lies
        let bytes = memory.get(part.at..part.at + len).unwrap_or_default().to_vec();
        inbound.push(tables, now_ms, memory, part);
        tap.datagram(now_us, false, tally.news(), (whole.source, to), whole.tos, &bytes);
    }
}

/// Shows what is about to be written.
#[cold]
pub(super) fn show_units(inbound: &Inbound, memory: &[u8], look: Look<'_>) {
    for unit in inbound.units() {
        let pieces = unit.pieces().iter().flat_map(|piece| piece.of(memory, inbound.slab()));
        let frame: Vec<u8> = pieces.copied().skip(vnet_hdr::HEADER_LEN).collect();
        look.tap.packet(look.now_us, Side::Inner, false, None, &frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::engine::stats::PeerStats;
    use crate::engine::tables::{Local, PeerSpec};
    use crate::engine::tunnel::{Identity, Policy, Tunnel};
    use crate::key::SecretKey;
    use crate::node::{Mac, NodeName, Vni};

    #[test]
    fn handshakes_with_all_peers_at_once_let_packets_through_in_between() {
        let identity = Arc::new(Identity::new(&SecretKey::generate().unwrap(), 1));
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        let spec = |slot: u32| {
            let endpoint = SocketAddr::from(([10, 9, 0, slot as u8], 8472));
            let keys = [SecretKey::generate().unwrap().public()];
            let tunnel = Tunnel::new(slot, identity.clone(), &keys, endpoint, None, Policy::Required);
            let name: NodeName = format!("n{slot}").parse().unwrap();
            let stats = Arc::new(PeerStats::new(1));
            let (underlay, tunnel) = (vec![endpoint.ip()], Some(Arc::new(tunnel)));
            PeerSpec {
                name,
                endpoint,
                underlay,
                mac,
                subnets: vec![],
                mtu: 1440,
                stats,
                tunnel,
                former: None,
                liveness: None,
            }
        };
        let vni = Vni::DEFAULT;
        let local = Local {
            mac,
            vni,
            subnets: vec![],
            addresses: vec![],
            mtu: 1440,
            identity: Some(identity.clone()),
            former_identity: None,
            bfd_keys: None,
        };
        let tables = Tables::new(local, (1..=100).map(spec).collect());
        let (mut clockwork, mut outbox, mut sent) = (Clockwork::new(0, 1), Outbox::default(), Vec::new());
        while clockwork.turn(&tables, 0, 8, &mut outbox) {
            sent.push(outbox.len());
            outbox.clear();
        }
        assert_eq!((sent, outbox.len()), (vec![LETTERS_A_TURN; 3], 4), "each peer once");
    }
}
