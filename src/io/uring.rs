//! A worker over io_uring: its TUN queue and its sockets are read all the time, one system call waits for all of them,
//! and frames are written to the TUN device a batch a call. The journeys are those of [`super::worker`].

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use arc_swap::cache::Cache;

use super::spin::Spin;
use super::tap::{Side, Tally};
use super::worker::{
    Clockwork, Look, Worker, WorkerError, patience, push_tapped, received, send, show_units, watch, write_errors,
};
use super::{tcp_ends, tun};
use crate::engine::inbound::Inbound;
use crate::engine::outbound::{HEADROOM, Outbound};
use crate::engine::vigil::Vigil;
use crate::sys::ring::{self, Event, Ring, Source};
use crate::wire::vnet_hdr;

/// The sources of a worker's ring: its queue, its stop signal, and its sockets.
const TUN: usize = 0;
const FIRST_PORT: usize = 2;
/// Room before each frame that is read.
const FRONT: usize = HEADROOM.next_multiple_of(64);
/// Bytes received after which they are written: larger batches fall out of the cache before they are.
const WRITE_BYTES: usize = 256 << 10;
/// Reads of the TUN device that may fail one after the other.
const FAILURES: u32 = 1000;

/// Whether this kernel, and whoever confines this process, lets a worker run this way.
pub fn supported() -> io::Result<()> {
    ring::supported()
}

/// Works until the other side of the worker's `stop` is closed.
pub fn run(worker: Worker) -> Result<(), WorkerError> {
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
    } = worker;
    let Some(pair) = pairs.get(thread) else { return Ok(()) };
    let mut ring = {
        let mut sources = vec![Source::Frames(pair.tun.as_fd(), FRONT), Source::Signal(stop.as_fd())];
        sources.extend(pair.sockets.iter().map(|socket| Source::Datagrams(socket.as_fd())));
        Ring::new(&sources).map_err(WorkerError::Ring)?
    };
    let mut tables = Cache::new(tables);
    let mut outbound = Outbound::new(stats.clone(), thread, senders).with_cut_behind(cut_behind);
    let inbound = Inbound::new(stats.clone(), thread, accepts).with_data_socket(outbound.data_socket());
    let mut inbound = inbound.with_big_tcp(big_tcp);
    let mut clockwork = Clockwork::new(thread, workers);
    let mut vigil = Vigil::new(thread, workers, workers);
    let Some(stats) = stats.worker(thread) else { return Ok(()) };
    let mut events = Vec::new();
    let mut wait = Duration::ZERO;
    let mut spin = Spin::new(busy_poll, false);
    let mut failures = 0u32;
    loop {
        events.clear();
        ring.wait(wait, &mut events).map_err(WorkerError::Ring)?;
        for event in &events {
            match *event {
                Event::Signalled(_) => return Ok(()),
                Event::Failed(TUN, libc::EBADFD | libc::EBADF | libc::ENODEV) => {
                    return Err(WorkerError::TunGone);
                }
                Event::Failed(TUN, libc::EINTR | libc::EAGAIN) => {}
                // a packet that the kernel cannot hand over, say: as long as others come
                Event::Failed(TUN, error) => {
                    failures += 1;
                    if failures > FAILURES {
                        return Err(WorkerError::Ring(io::Error::from_raw_os_error(error)));
                    }
                }
                Event::Filled { source: TUN, .. } => failures = 0,
                // an error that was pending on a socket is fetched by this; what is wrong shows at the next send
                Event::Failed(..) | Event::Filled { .. } => {}
            }
        }
        let now_us = started.elapsed().as_micros() as u64;
        let now_ms = now_us / 1000;
        let tables = tables.load();
        let tap = tap.is_on().then_some(Look { tap: &tap, now_us });
        let filled = |of: usize| {
            events.iter().filter_map(move |event| match *event {
                Event::Filled { source, buffer, len } if source == of => Some((buffer, len)),
                _ => None,
            })
        };
        let (queue, buffers) = ring.split();

        // TUN → UDP
        let Some(frames) = buffers.get_mut(TUN) else { return Ok(()) };
        let mut packets = 0;
        for (buffer, len) in filled(TUN) {
            let at = frames.at(buffer);
            let mut tally = tap.map(|tap| (tap, Tally::new(stats)));
            outbound.push(tables, now_ms, frames.memory_mut(), at, len);
            if let Some((look, tally)) = &mut tally {
                let packet = frames.memory().get(at + vnet_hdr::HEADER_LEN..at + len).unwrap_or_default();
                look.tap.packet(now_us, Side::Inner, true, tally.news(), packet);
            }
            packets += 1;
        }
        if packets > 0 {
            stats.flow.tun_reads.add(packets);
            write_errors(&pair.tun, &outbound, tap);
            send(&mut ports, &mut outbound, tables, frames.memory(), stats, tap);
            filled(TUN).for_each(|(buffer, _)| frames.give_back(buffer));
        }

        // UDP → TUN
        inbound.received_at(now_us);
        inbound.looked_at(tap.is_some());
        let mut received_any = false;
        for (number, port) in ports.iter().enumerate() {
            let source = FIRST_PORT + number;
            let Some(datagrams) = buffers.get_mut(source) else { continue };
            let mut waiting = filled(source).peekable();
            while waiting.peek().is_some() {
                let mut bytes = 0;
                received_any = true;
                stats.flow.udp_recv_calls.add(1);
                while bytes < WRITE_BYTES
                    && let Some((buffer, len)) = waiting.next()
                {
                    bytes += len;
                    stats.flow.udp_recv_buffers.add(1);
                    let Some(whole) = datagrams.datagrams(buffer, len).and_then(received) else { continue };
                    match tap {
                        None => inbound.push(tables, now_ms, datagrams.memory_mut(), whole),
                        Some(look) => {
                            let to = port.address();
                            push_tapped(&mut inbound, tables, now_ms, stats, datagrams.memory_mut(), whole, to, look);
                        }
                    }
                }
                inbound.finish(datagrams.memory_mut());
                if let Some(look) = tap {
                    show_units(&inbound, datagrams.memory(), look);
                }
                let (memory, slab) = (datagrams.memory(), inbound.slab());
                let frames =
                    inbound.units().iter().map(|unit| unit.pieces().iter().map(|piece| piece.of(memory, slab)));
                let ended = queue.write(TUN, frames).map_err(WorkerError::Ring)?;
                for (unit, ended) in inbound.units().iter().zip(ended) {
                    inbound.written(unit, *ended >= 0);
                    if *ended < 0 {
                        tun::refused(&inbound, unit, -*ended);
                    }
                }
                stats.flow.tun_writes.add(inbound.units().len() as u64);
                inbound.clear();
                tcp_ends::answer(&mut inbound);
            }
            filled(source).for_each(|(buffer, _)| datagrams.give_back(buffer));
        }

        // before somebody is held for dead, everything that came until now is received
        let look = vigil.is_due(now_us);
        watch(&mut vigil, tables, started, now_us, look && !received_any, &mut inbound, outbound.data_socket());
        let late = clockwork.turn(tables, now_ms, outbound.data_socket(), inbound.outbox());
        if !inbound.outbox().is_empty() {
            outbound.post(inbound.outbox());
            send(&mut ports, &mut outbound, tables, &[], stats, tap);
        }
        let busy = received_any || packets > 0;
        spin.looked(now_us, stats);
        wait = patience(late || busy || spin.goes_on(now_us), tables.has_tunnels(), &vigil, started);
    }
}
