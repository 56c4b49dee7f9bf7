//! The same engine without offloads on the TUN side: tokio-tun, one plain packet a call.
//!
//! Runs where a kernel refuses offload headers, and wherever somebody sets `io: tokio`. One thread with a runtime of its
//! own; the sockets are those of the others.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use socket2::Socket;
use tokio::io::Interest;
use tokio::net::{UdpSocket, UnixStream};
use tokio::time::sleep;
use tokio_tun::Tun;

use super::tap::{Side, Tally, Tap};
use super::tun::{TunError, explain, is_gone};
use super::udp::UdpPort;
use super::worker::{Clockwork, Look, WorkerError, patience, send, take_in, watch};
use crate::engine::coalesce::Accepts;
use crate::engine::inbound::Inbound;
use crate::engine::outbound::{HEADROOM, Outbound};
use crate::engine::stats::{Stats, WorkerStats};
use crate::engine::tables::Tables;
use crate::engine::vigil::Vigil;
use crate::sys::tun as sys;
use crate::wire::vnet_hdr;

/// The offload header that the engine expects before a packet; all zero says that there is nothing left to do.
const FRONT: usize = (HEADROOM + vnet_hdr::HEADER_LEN).next_multiple_of(64);
const AT: usize = FRONT - vnet_hdr::HEADER_LEN;
/// Packets that are read before the runtime looks at the sockets again.
const READS: usize = 32;

/// What a plain worker needs; the device is opened on its own runtime.
pub struct Plain {
    /// The TUN device's name.
    pub name: String,
    /// Its sockets, one port for each address family.
    pub ports: Vec<UdpPort>,
    /// The sockets that receive, one for each port.
    pub receivers: Vec<Socket>,
    /// Sending sockets of each port.
    pub senders: u16,
    /// The peer table.
    pub tables: Arc<ArcSwap<Tables>>,
    /// Its counters.
    pub stats: Stats,
    /// Who looks at packets.
    pub tap: Arc<Tap>,
    /// When meshd started.
    pub started: Instant,
    /// Closed from the other side to end the worker.
    pub stop: StdUnixStream,
}

impl Plain {
    /// What such a device takes: nothing but finished packets.
    pub const ACCEPTS: Accepts = Accepts { tso: false, uso: false };

    /// Opens the device, tells `opened`, and works until the other side of `stop` is closed.
    pub fn run(self, opened: impl FnOnce(Result<(), TunError>)) -> Result<(), WorkerError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(WorkerError::Poll)?;
        runtime.block_on(async {
            let tun = match open(&self.name) {
                Ok(tun) => tun,
                Err(error) => {
                    opened(Err(error));
                    return Ok(());
                }
            };
            opened(Ok(()));
            self.work(tun).await
        })
    }

    async fn work(self, tun: Tun) -> Result<(), WorkerError> {
        let Plain { receivers, mut ports, senders, tables, stats, tap, started, stop, .. } = self;
        let mut tables = Cache::new(tables);
        let mut outbound = Outbound::new(stats.clone(), 0, senders);
        let mut inbound = Inbound::new(stats.clone(), 0, Self::ACCEPTS).with_data_socket(outbound.data_socket());
        let mut clockwork = Clockwork::new(0, 1);
        let mut vigil = Vigil::new(0, 1, 1);
        let Some(stats) = stats.worker(0) else { return Ok(()) };
        let mut frame = vec![0; FRONT + 65_535];
        stop.set_nonblocking(true).map_err(WorkerError::Poll)?;
        let stop = UnixStream::from_std(stop).map_err(WorkerError::Poll)?;
        let ready = receivers
            .iter()
            .map(|socket| UdpSocket::from_std(socket.try_clone()?.into()))
            .collect::<io::Result<Vec<_>>>();
        let ready = ready.map_err(WorkerError::Poll)?;
        let mut packet = Vec::new();
        let (mut ticks, mut late) = (true, false);
        loop {
            let event = tokio::select! {
                read = tun.recv(frame.get_mut(FRONT..).unwrap_or_default()) => Event::Read(read),
                port = any(&ready) => Event::Port(port.map_err(WorkerError::Poll)?),
                _ = stop.readable() => return Ok(()),
                _ = sleep(patience(late, ticks, &vigil, started)) => Event::Tick,
            };
            let now_us = started.elapsed().as_micros() as u64;
            let now_ms = now_us / 1000;
            let tables = tables.load();
            ticks = tables.has_tunnels();
            let tap = tap.is_on().then_some(Look { tap: &tap, now_us });
            match event {
                Event::Read(read) => {
                    let mut first = Some(read);
                    for _ in 0..READS {
                        let read = match first.take() {
                            Some(read) => read,
                            None => tun.try_recv(frame.get_mut(FRONT..).unwrap_or_default()),
                        };
                        let len = match read {
                            Ok(len) => len,
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                            Err(error) if is_gone(&error) => return Err(WorkerError::TunGone),
                            Err(_) => break,
                        };
                        stats.flow.tun_reads.add(1);
                        frame.get_mut(AT..FRONT).unwrap_or_default().fill(0);
                        let tally = tap.map(|look| (look, Tally::new(stats)));
                        outbound.push(tables, now_ms, &mut frame, AT, len + vnet_hdr::HEADER_LEN);
                        if let Some((look, mut tally)) = tally {
                            let packet = frame.get(FRONT..FRONT + len).unwrap_or_default();
                            look.tap.packet(now_us, Side::Inner, true, tally.news(), packet);
                        }
                        for error in outbound.errors() {
                            let packet = error.get(vnet_hdr::HEADER_LEN..).unwrap_or_default();
                            outbound.error_written(error, tun.try_send(packet).is_ok());
                        }
                        send(&mut ports, &mut outbound, tables, &frame, stats, tap);
                    }
                }
                Event::Port(index) => {
                    let (Some(port), Some(socket), Some(ready)) =
                        (ports.get_mut(index), receivers.get(index), ready.get(index))
                    else {
                        continue;
                    };
                    // what would block is reported as such, so that tokio waits for the kernel again
                    let taken = ready.try_io(Interest::READABLE, || {
                        let batch = take_in(port, (socket, 0), &mut inbound, tables, started, now_ms, stats, tap);
                        if batch.buffers > 0 { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
                    });
                    if taken.is_err() {
                        continue;
                    }
                    write(port, &mut inbound, &tun, &mut packet, stats);
                }
                Event::Tick => {}
            }
            let mut settled = vigil.is_due(now_us);
            if settled {
                // before somebody is held for dead, everything that came until now is received
                for (port, socket) in ports.iter_mut().zip(&receivers) {
                    settled &= take_in(port, (socket, 0), &mut inbound, tables, started, now_ms, stats, tap).emptied;
                    write(port, &mut inbound, &tun, &mut packet, stats);
                }
            }
            watch(&mut vigil, tables, started, now_us, settled, &mut inbound, outbound.data_socket());
            late = clockwork.turn(tables, now_ms, outbound.data_socket(), inbound.outbox());
            if !inbound.outbox().is_empty() {
                outbound.post(inbound.outbox());
                send(&mut ports, &mut outbound, tables, &[], stats, tap);
            }
        }
    }
}

/// Writes what was received, a packet a call.
fn write(port: &UdpPort, inbound: &mut Inbound, tun: &Tun, packet: &mut Vec<u8>, stats: &WorkerStats) {
    for unit in inbound.units() {
        packet.clear();
        for piece in unit.pieces() {
            packet.extend_from_slice(piece.of(port.arena(), inbound.slab()));
        }
        let written = tun.try_send(packet.get(vnet_hdr::HEADER_LEN..).unwrap_or_default());
        inbound.written(unit, written.is_ok());
    }
    stats.flow.tun_writes.add(inbound.units().len() as u64);
    inbound.clear();
}

enum Event {
    Read(io::Result<usize>),
    Port(usize),
    Tick,
}

/// Opens the device as one that may have several queues, as the other back ends do: a device that a former run left can
/// be taken over only that way. The second queue is closed again.
fn open(name: &str) -> Result<Tun, TunError> {
    let other = |error: tokio_tun::Error| match error {
        tokio_tun::Error::IoError(source) => explain(name, source),
        tokio_tun::Error::NixError(errno) => explain(name, errno.into()),
    };
    let mut queues = Tun::builder().name(name).queues(2).persist().close_on_exec().build().map_err(other)?;
    queues.truncate(1);
    let tun = queues.pop().ok_or_else(|| TunError::Busy(name.to_owned()))?;
    // what a former run switched on survives in the device
    sys::set_offload(&tun, 0).map_err(|error| explain(name, error))?;
    Ok(tun)
}

/// The first of the ports that has something to read.
async fn any(ports: &[UdpSocket]) -> io::Result<usize> {
    let waits = ports.iter().map(|port| Box::pin(port.readable()));
    let (ready, index, _) = futures::future::select_all(waits).await;
    ready.map(|()| index)
}
