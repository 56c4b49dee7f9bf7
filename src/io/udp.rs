//! UDP sockets: those that receive on the data port, one a queue pair and address family, and for each thread a pool that
//! only sends, whose ports carry the entropy of the inner flows (RFC 7348 §5).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, Protocol, Socket, Type};

use super::pairs::AT_MOST;
use super::tunnel_gso::TunnelGso;
use crate::engine::drop::Drop;
use crate::engine::outbound::{Outbound, Sent};
use crate::engine::stats::WorkerStats;
use crate::engine::tables::Tables;
use crate::engine::tx_batch::{Piece, Run, TxBatch};
use crate::sys::poll::{self, PollFd};
use crate::sys::udp::{self, Meta, Opt, RecvBatch, SendBatch};

/// Room for received datagrams of each socket: at 20 Gbit/s three milliseconds.
const RECEIVE_BUFFER: u32 = 8 << 20;
pub(super) const SEND_BUFFER: u32 = 8 << 20;
/// How long a worker waits for room in a full send buffer before it drops, in milliseconds.
const SEND_PATIENCE_MS: u16 = 1;
/// Receive buffers: as many as single datagrams make a good super-packet.
const BUFFERS: usize = 64;
/// Bytes that one receive call should fetch: as many as stay in a core's cache until they are written.
const RECEIVE_BYTES: usize = 256 << 10;

/// What is taken for the length of a buffer's content before anything came.
const MEAN_LEN: usize = 2048;

/// Why a socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} on {address}: {source}")]
pub struct UdpError {
    what: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Offloads of UDP, shared by all workers so that they can be shown.
#[derive(Debug, Default)]
pub struct UdpOffloads {
    /// No socket of ours may use `UDP_SEGMENT`: the kernel does not know it.
    pub no_gso: AtomicBool,
    /// `UDP_SEGMENT` failed at a send and was switched off for that socket.
    pub gso_failed: AtomicBool,
    /// The kernel does not know `UDP_GRO`.
    pub no_gro: AtomicBool,
}

/// What one thread sends with and receives into, in one address family.
pub struct UdpPort {
    senders: Vec<Sender>,
    offloads: Arc<UdpOffloads>,
    buffers: RecvBatch,
    batch: SendBatch,
    /// For one datagram alone.
    single: SendBatch,
    /// Of the batch that is being sent: the run of each message.
    owners: Vec<u32>,
    /// For each run how many datagrams left, and why others did not.
    outcomes: Vec<(u16, Option<Drop>)>,
    /// Bytes of the buffers that were lately filled from each of the receiving sockets.
    mean_lens: Vec<usize>,
    v6: bool,
    address: SocketAddr,
    tunnel_gso: Option<Arc<TunnelGso>>,
    /// Headers before an uncut super-packet.
    front: Vec<u8>,
}

/// What one call received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Batch {
    /// So many buffers were filled.
    pub buffers: usize,
    /// The socket has given everything that had come when the call was made.
    pub emptied: bool,
}

struct Sender {
    socket: Socket,
    port: u16,
    gso: bool,
    /// Its buffer was full, and waiting did not help: no more of that until it was seen to have room.
    full: bool,
}

impl UdpPort {
    /// Opens the sockets to send from: one for each of `source_ports`, all shared with the other threads' of the same ports.
    /// Behind them `receiver` itself, whose source port is the data port: what WireGuard peers expect.
    ///
    /// A flow must have the same outer source port whichever thread sends it: the receiver spreads by it, and a flow
    /// whose port changed would move to another thread there, and could be reordered.
    pub fn open(
        address: SocketAddr,
        receiver: &Socket,
        source_ports: &[u16],
        offloads: &Arc<UdpOffloads>,
    ) -> Result<Self, UdpError> {
        let mut pool = Vec::new();
        for port in source_ports {
            let address = SocketAddr::new(address.ip(), *port);
            let fail = |what| move |source| UdpError { what, address, source };
            let socket = open(address).map_err(fail("open a socket"))?;
            socket.set_reuse_port(true).map_err(fail("share the port"))?;
            socket.bind(&address.into()).map_err(fail("send"))?;
            udp::discard_received(socket.as_fd()).map_err(fail("filter what a sending socket receives"))?;
            udp::set(socket.as_fd(), Opt::SendBuffer(SEND_BUFFER)).ok();
            let gso = udp::knows_segment(socket.as_fd());
            if !gso {
                offloads.no_gso.store(true, Ordering::Relaxed);
            }
            pool.push(Sender { socket, port: *port, gso, full: false });
        }
        let fail = |source| UdpError { what: "send", address, source };
        let socket = receiver.try_clone().map_err(fail)?;
        udp::set(socket.as_fd(), Opt::SendBuffer(SEND_BUFFER)).ok();
        let gso = udp::knows_segment(socket.as_fd());
        pool.push(Sender { socket, port: address.port(), gso, full: false });
        Ok(UdpPort {
            senders: pool,
            offloads: offloads.clone(),
            buffers: RecvBatch::new(BUFFERS),
            batch: SendBatch::default(),
            single: SendBatch::default(),
            owners: Vec::new(),
            outcomes: Vec::new(),
            mean_lens: vec![MEAN_LEN; AT_MOST],
            v6: address.is_ipv6(),
            address,
            tunnel_gso: None,
            front: Vec::with_capacity(128),
        })
    }

    /// The same with a way out for super-packets that leave uncut.
    pub fn with_tunnel_gso(self, tunnel_gso: Arc<TunnelGso>) -> Self {
        UdpPort { tunnel_gso: Some(tunnel_gso), ..self }
    }

    /// Where it receives.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where sending socket `number` sends from.
    pub fn source(&self, number: u16) -> SocketAddr {
        let port = self.senders.get(usize::from(number)).map_or(0, |sender| sender.port);
        SocketAddr::new(self.address.ip(), port)
    }

    /// Receives a batch from the node's receiving socket number `number` without waiting.
    pub fn receive(&mut self, socket: &Socket, number: usize) -> io::Result<Batch> {
        let Some(mean_len) = self.mean_lens.get_mut(number) else { return Ok(Batch::default()) };
        let limit = (RECEIVE_BYTES / (*mean_len).max(1)).clamp(4, BUFFERS);
        let buffers = self.buffers.receive(socket.as_fd(), limit)?;
        let bytes: usize = (0..buffers).filter_map(|index| self.buffers.meta(index)).map(|meta| meta.len).sum();
        *mean_len = (3 * *mean_len + bytes / buffers.max(1)) / 4;
        Ok(Batch { buffers, emptied: buffers < limit })
    }

    /// What was received into that buffer.
    pub fn meta(&self, index: usize) -> Option<Meta> {
        self.buffers.meta(index)
    }

    /// The memory that the buffers lie in.
    pub fn arena(&self) -> &[u8] {
        self.buffers.arena()
    }

    /// The same, to change packets in place.
    pub fn arena_mut(&mut self) -> &mut [u8] {
        self.buffers.arena_mut()
    }

    /// Sends those runs of the batch that go to this address family, payload out of `payload`, and has each counted.
    pub fn send(&mut self, outbound: &Outbound, tables: &Tables, payload: &[u8], stats: &WorkerStats) {
        let (batch, v6) = (outbound.batch(), self.is_v6());
        let ours = |run: &Run| run.endpoint.is_ipv6() == v6 && run.segments > 0;
        if !batch.runs().iter().any(ours) {
            return;
        }
        self.outcomes.clear();
        self.outcomes.resize(batch.runs().len(), (0, None));
        for number in 0..self.senders.len() {
            if batch.runs().iter().any(|run| ours(run) && usize::from(run.key.socket) == number) {
                self.send_through(number, batch, payload, stats);
            }
        }
        for (run, (sent, reason)) in batch.runs().iter().zip(&self.outcomes).filter(|(run, _)| ours(run)) {
            outbound.sent(tables, run, reason.map_or(Sent::All, |reason| Sent::Partly(*sent, reason)));
        }
    }

    /// All runs of one sending socket, in order: what goes by the socket in one stretch, as long as no uncut super-packet
    /// comes in between.
    fn send_through(&mut self, number: usize, batch: &TxBatch, payload: &[u8], stats: &WorkerStats) {
        let v6 = self.is_v6();
        if !batch.has_uncut() {
            return self.send_stretch(number, 0..batch.runs().len(), batch, payload, stats);
        }
        let ours = |run: &Run| run.endpoint.is_ipv6() == v6 && usize::from(run.key.socket) == number;
        let uncut = |from: usize| batch.runs().iter().skip(from).position(|run| ours(run) && run.uncut().is_some());
        let mut from = 0;
        while let Some(run) = batch.runs().get(from) {
            if ours(run) && run.uncut().is_some() {
                self.send_uncut(from, run, batch, payload, stats);
                from += 1;
                continue;
            }
            let end = uncut(from).map_or(batch.runs().len(), |next| from + next);
            self.send_stretch(number, from..end, batch, payload, stats);
            from = end;
        }
    }

    /// One super-packet, as it is.
    fn send_uncut(&mut self, index: usize, run: &Run, batch: &TxBatch, payload: &[u8], stats: &WorkerStats) {
        let ends = (self.source(run.key.socket), run.endpoint);
        let UdpPort { tunnel_gso, front, outcomes, .. } = self;
        let (Some(outcome), Some(how)) = (outcomes.get_mut(index), run.uncut()) else { return };
        let parts = run.pieces().iter().map(|piece| piece.of(payload, batch.slab()));
        let Some(way) = tunnel_gso else { return outcome.1 = Some(Drop::UdpSendFailed) };
        match way.send(ends, run.tos, how, parts, front) {
            Ok(()) => stats.flow.uncut_sends.add(1),
            Err(error) => {
                let full = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM));
                outcome.1 = Some(if full { Drop::UdpBufferFull } else { Drop::UdpSendFailed });
            }
        }
    }

    /// Those of the runs `range` that go by this socket, none of them uncut.
    fn send_stretch(
        &mut self,
        number: usize,
        range: Range<usize>,
        batch: &TxBatch,
        payload: &[u8],
        stats: &WorkerStats,
    ) {
        let v6 = self.is_v6();
        let UdpPort { senders, offloads, batch: scratch, single, owners, outcomes, .. } = self;
        let Some(Sender { socket, gso, full, .. }) = senders.get_mut(number) else { return };
        let socket = socket.as_fd();
        let mut sending = scratch.start();
        owners.clear();
        for (index, run) in (0u32..).zip(batch.runs()).skip(range.start).take(range.len()) {
            if run.endpoint.is_ipv6() != v6 || usize::from(run.key.socket) != number || run.segments == 0 {
                continue;
            }
            if *gso || run.segments == 1 {
                let segment = (run.segments > 1).then_some(run.segment_len);
                sending.message(run.endpoint, run.tos, segment);
                owners.push(index);
                run.pieces().iter().for_each(|piece| sending.part(piece.of(payload, batch.slab())));
            } else {
                for datagram in run.datagrams() {
                    sending.message(run.endpoint, run.tos, None);
                    owners.push(index);
                    datagram.iter().for_each(|piece| sending.part(piece.of(payload, batch.slab())));
                }
            }
        }
        let mut from = 0;
        let mut waited = false;
        while from < sending.len() {
            stats.flow.udp_send_calls.add(1);
            let error = match sending.send(socket, from) {
                Ok(sent) => {
                    stats.flow.udp_send_messages.add(sent as u64);
                    for owner in owners.iter().skip(from).take(sent.max(1)) {
                        let Some(run) = batch.runs().get(*owner as usize) else { continue };
                        let Some((count, _)) = outcomes.get_mut(*owner as usize) else { continue };
                        *count += if *gso { run.segments } else { 1 };
                    }
                    from += sent.max(1);
                    continue;
                }
                Err(error) => error,
            };
            let Some(owner) = owners.get(from).map(|owner| *owner as usize) else { break };
            let Some(run) = batch.runs().get(owner) else { break };
            let reason = match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) if !waited => {
                    waited = true; // once a batch: a peer without room must not hold up the others
                    let mut room = [PollFd::new(socket, poll::WRITABLE)];
                    poll::poll(&mut room, Some(if *full { 0 } else { SEND_PATIENCE_MS })).ok();
                    let [room] = room;
                    *full = room.happened() == 0;
                    continue;
                }
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Drop::UdpBufferFull,
                // Some kernels and devices advertise UDP_SEGMENT and refuse it at the send; others say the same of a peer
                // that has no route. One datagram alone tells: if it leaves, segmentation was to blame.
                Some(libc::EIO | libc::EINVAL) if *gso && run.segments > 1 => {
                    let mut alone = run.datagrams().take(1);
                    if send_singly(single, socket, run, &mut alone, batch, payload, stats) == 1 {
                        *gso = false;
                        break;
                    }
                    Drop::UdpSendFailed
                }
                _ => Drop::UdpSendFailed,
            };
            if let Some((_, cause)) = outcomes.get_mut(owner) {
                *cause = Some(reason);
            }
            from += 1;
        }
        if from >= sending.len() || *gso {
            return;
        }
        // this socket does without segmentation from now on; of the first run one datagram has left
        offloads.gso_failed.store(true, Ordering::Relaxed);
        for (index, owner) in owners.iter().skip(from).enumerate() {
            let Some(run) = batch.runs().get(*owner as usize) else { continue };
            let already = usize::from(index == 0);
            let mut rest = run.datagrams().skip(already);
            let sent = send_singly(single, socket, run, &mut rest, batch, payload, stats) + already as u16;
            if let Some((count, reason)) = outcomes.get_mut(*owner as usize) {
                *count = sent;
                *reason = (sent < run.segments).then_some(Drop::UdpSendFailed);
            }
        }
    }

    fn is_v6(&self) -> bool {
        self.v6
    }
}

/// Sends datagrams of a run one by one, and returns how many left.
#[cold]
fn send_singly(
    scratch: &mut SendBatch,
    socket: BorrowedFd<'_>,
    run: &Run,
    datagrams: &mut dyn Iterator<Item = &[Piece]>,
    batch: &TxBatch,
    payload: &[u8],
    stats: &WorkerStats,
) -> u16 {
    let mut left = 0;
    for datagram in datagrams {
        let mut sending = scratch.start();
        sending.message(run.endpoint, run.tos, None);
        datagram.iter().for_each(|piece| sending.part(piece.of(payload, batch.slab())));
        stats.flow.udp_send_calls.add(1);
        if sending.send(socket, 0).is_ok() {
            stats.flow.udp_send_messages.add(1);
            left += 1;
        }
    }
    left
}

/// Opens a socket that receives on `address`, which all others of this process share.
pub fn receiver(address: SocketAddr, offloads: &UdpOffloads) -> Result<Socket, UdpError> {
    let fail = |what| move |source| UdpError { what, address, source };
    let socket = open(address).map_err(fail("open a socket"))?;
    socket.set_reuse_port(true).map_err(fail("share the port"))?;
    socket.bind(&address.into()).map_err(fail("receive"))?;
    udp::set(socket.as_fd(), Opt::ReceiveTos { v6: address.is_ipv6() }).map_err(fail("receive the TOS"))?;
    // without the privilege the system's default has to do
    udp::set(socket.as_fd(), Opt::ReceiveBuffer(RECEIVE_BUFFER)).ok();
    if udp::set(socket.as_fd(), Opt::Gro).is_err() {
        offloads.no_gro.store(true, Ordering::Relaxed);
    }
    Ok(socket)
}

/// Reserves so many outer source ports on this address: sockets that hold the ports until workers share them.
pub fn reserve(address: IpAddr, ports: u16) -> Result<Vec<(Socket, u16)>, UdpError> {
    let any = SocketAddr::new(address, 0);
    let fail = |source| UdpError { what: "reserve a source port", address: any, source };
    let one = |_| {
        let socket = open(any)?;
        socket.set_reuse_port(true)?;
        socket.bind(&any.into())?;
        udp::discard_received(socket.as_fd())?;
        let port = socket.local_addr()?.as_socket().map_or(0, |address| address.port());
        Ok((socket, port))
    };
    (0..ports.max(1)).map(one).collect::<io::Result<_>>().map_err(fail)
}

fn open(address: SocketAddr) -> io::Result<Socket> {
    let v6 = address.is_ipv6();
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    udp::set(socket.as_fd(), Opt::MtuProbe { v6 })?;
    if v6 {
        socket.set_only_v6(true)?;
        // what leaves by another way (`tunnel_gso`) has none either, and a flow must not take two
        udp::set(socket.as_fd(), Opt::NoFlowLabel).ok();
        socket.set_unicast_hops_v6(OUTER_TTL.into())?;
    } else {
        socket.set_ttl_v4(OUTER_TTL.into())?;
    }
    Ok(socket)
}

/// Outer TTL and hop limit.
pub(super) const OUTER_TTL: u8 = 64;
