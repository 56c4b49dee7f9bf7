//! One worker: a thread that owns one TUN queue and its own sockets, and takes each batch through the whole journey
//! before it looks for the next (run to completion). Workers share the peer table, which never changes, and nothing else.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;

use super::tun::TunQueue;
use super::udp::UdpPort;
use crate::engine::coalesce::Accepts;
use crate::engine::inbound::{Inbound, Received};
use crate::engine::outbound::{HEADROOM, Outbound};
use crate::engine::stats::{Stats, WorkerStats};
use crate::engine::tables::Tables;
use crate::sys::poll::{self, PollFd};
use crate::sys::udp::Meta;

/// Room for one frame: the offload header and the longest IP packet.
const FRAME: usize = 10 + 65_535;
/// Bytes after which a batch of reads is sent: larger ones fall out of the cache before they are.
const READ_BYTES: usize = 96 << 10;
/// Packets after which it is.
const READ_PACKETS: usize = 128;
/// Rounds of a busy worker between two looks at whether it is to stop.
const LOOK_UP: u32 = 32;
/// Frames start at multiples of a cache line.
const ALIGN: usize = 64;

/// What a worker owns.
pub struct Worker {
    /// Its number, from 0.
    pub index: usize,
    /// Its TUN queue.
    pub tun: TunQueue,
    /// What the device takes.
    pub accepts: Accepts,
    /// Its sockets, one port for each address family.
    pub ports: Vec<UdpPort>,
    /// Sending sockets of each port.
    pub senders: u16,
    /// The peer table.
    pub tables: Arc<ArcSwap<Tables>>,
    /// Its counters among all workers'.
    pub stats: Stats,
    /// When meshd started.
    pub started: Instant,
    /// Closed from the other side to end the worker.
    pub stop: UnixStream,
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
}

impl Worker {
    /// Works until the other side of `stop` is closed.
    pub fn run(self) -> Result<(), WorkerError> {
        let Worker { index, mut tun, accepts, mut ports, senders, tables, stats, started, stop } = self;
        let mut tables = Cache::new(tables);
        let mut outbound = Outbound::new(stats.clone(), index, senders);
        let mut inbound = Inbound::new(stats.clone(), index, accepts);
        let Some(stats) = stats.worker(index) else { return Ok(()) };
        let mut frames = vec![0; READ_BYTES + FRAME + 2 * ALIGN];
        let mut tun_ready = true;
        let mut ports_ready = vec![true; ports.len()];
        let mut rounds = 0u32;
        loop {
            let now_ms = started.elapsed().as_millis() as u64;
            let tables = tables.load();
            if tun_ready {
                tun_ready = read_and_send(&mut tun, &mut ports, &mut outbound, tables, now_ms, &mut frames, stats)?;
            }
            for (port, ready) in ports.iter_mut().zip(&mut ports_ready) {
                if *ready {
                    *ready = receive_and_write(port, &mut tun, &mut inbound, tables, now_ms, stats);
                }
            }
            let busy = tun_ready || ports_ready.contains(&true);
            rounds = rounds.wrapping_add(1);
            if busy && !rounds.is_multiple_of(LOOK_UP) {
                continue;
            }
            // under endless load there is no sleep, yet somebody may want the worker to stop
            let patience = if busy { Some(0) } else { None };
            let asked_to_stop = sleep(&tun, &ports, &stop, patience, &mut tun_ready, &mut ports_ready)?;
            stats.flow.sleeps.add(u64::from(!busy));
            if asked_to_stop {
                return Ok(());
            }
        }
    }
}

/// A batch TUN → UDP. Returns whether there may be more.
fn read_and_send(
    tun: &mut TunQueue,
    ports: &mut [UdpPort],
    outbound: &mut Outbound,
    tables: &Tables,
    now_ms: u64,
    frames: &mut [u8],
    stats: &WorkerStats,
) -> Result<bool, WorkerError> {
    let (mut at, mut packets, mut more) = (ALIGN, 0, true);
    while packets < READ_PACKETS && at < READ_BYTES {
        let Some(room) = frames.get_mut(at..at + FRAME) else { break };
        let len = match tun.read(room) {
            Ok(len) => len,
            Err(error) => {
                more = match error.raw_os_error() {
                    Some(libc::EBADFD | libc::EBADF | libc::ENODEV) => return Err(WorkerError::TunGone),
                    Some(libc::EINTR) => true,
                    _ => false,
                };
                break;
            }
        };
        outbound.push(tables, now_ms, frames, at, len);
        packets += 1;
        // the next frame's headroom must not reach into this one
        at = (at + len + HEADROOM).next_multiple_of(ALIGN);
    }
    if packets == 0 {
        return Ok(more);
    }
    stats.flow.tun_reads.add(packets as u64);
    for port in ports {
        port.send(outbound, tables, frames, stats);
    }
    for frame in outbound.errors() {
        let written = tun.write(frame).is_ok();
        outbound.error_written(frame, written);
    }
    outbound.clear();
    Ok(more)
}

/// A batch UDP → TUN. Returns whether there may be more.
fn receive_and_write(
    port: &mut UdpPort,
    tun: &mut TunQueue,
    inbound: &mut Inbound,
    tables: &Tables,
    now_ms: u64,
    stats: &WorkerStats,
) -> bool {
    let more = take_in(port, inbound, tables, now_ms, stats);
    for unit in inbound.units() {
        let written = tun.write_pieces(unit.pieces(), port.arena(), inbound.slab()).is_ok();
        inbound.written(unit, written);
    }
    stats.flow.tun_writes.add(inbound.units().len() as u64);
    inbound.clear();
    more
}

/// Receives a batch and takes it through the engine, up to what is to be written. Returns whether there may be more.
pub(super) fn take_in(
    port: &mut UdpPort,
    inbound: &mut Inbound,
    tables: &Tables,
    now_ms: u64,
    stats: &WorkerStats,
) -> bool {
    let buffers = match port.receive() {
        Ok(buffers) => buffers,
        // an error that was pending on the socket is fetched by this; what is wrong shows at the next send
        Err(error) => return error.kind() == io::ErrorKind::Interrupted,
    };
    stats.flow.udp_recv_calls.add(1);
    stats.flow.udp_recv_buffers.add(buffers as u64);
    for index in 0..buffers {
        let Some(meta) = port.meta(index) else { continue };
        let Some(source) = meta.source else { continue };
        let Meta { at, len, segment_len, tos, truncated, .. } = meta;
        let received = Received { at, len, segment_len, source, tos, truncated };
        inbound.push(tables, now_ms, port.arena_mut(), received);
    }
    inbound.finish(port.arena_mut());
    buffers > 0
}

/// Waits until there is something to do, at most so long. Returns whether the worker is to stop.
fn sleep(
    tun: &TunQueue,
    ports: &[UdpPort],
    stop: &UnixStream,
    patience_ms: Option<u16>,
    tun_ready: &mut bool,
    ports_ready: &mut [bool],
) -> Result<bool, WorkerError> {
    let idle = || PollFd::new(stop.as_fd(), 0);
    // TUN, stop, and a port for each of two address families
    let mut fds = [PollFd::new(tun.as_fd(), poll::READABLE), PollFd::new(stop.as_fd(), poll::READABLE), idle(), idle()];
    for (slot, port) in fds.iter_mut().skip(2).zip(ports) {
        *slot = PollFd::new(port.as_fd(), poll::READABLE);
    }
    poll::poll(&mut fds, patience_ms).map_err(WorkerError::Poll)?;
    let [tun, stop, ports @ ..] = fds;
    if tun.happened() & poll::BROKEN != 0 {
        return Err(WorkerError::TunGone);
    }
    *tun_ready = tun.happened() != 0;
    for (ready, port) in ports_ready.iter_mut().zip(ports) {
        *ready = port.happened() != 0;
    }
    Ok(stop.happened() != 0)
}
