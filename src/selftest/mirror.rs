//! A mesh of one: whatever the kernel sends to the far side goes out through one engine half, over a real UDP socket back to
//! this very machine, in through the other half, and is handed to the kernel as if the far side had sent it.
//!
//! On its way source and destination change places, so that the kernel talks to itself; that leaves each checksum as it is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use ipnet::IpNet;
use socket2::Socket;

use crate::engine::big_tcp::BigTcp;
use crate::engine::coalesce::Accepts;
use crate::engine::inbound::{Inbound, Received};
use crate::engine::outbound::{HEADROOM, Outbound};
use crate::engine::stats::{PeerStats, Stats};
use crate::engine::tables::{Local, PeerSpec, Tables};
use crate::io::tcp_ends;
use crate::io::tun::TunQueue;
use crate::io::udp::{self, Batch, UdpOffloads, UdpPort};
use crate::node::{DEFAULT_PORT, Mac, Vni};
use crate::wire::checksum::Sum;
use crate::wire::ip::protocol;
use crate::wire::vnet_hdr;

/// What an injected datagram holds.
pub(super) const GOLDEN: &[u8] = b"meshd selftest: golden frame";

/// Room for one frame.
const FRAME: usize = 10 + 65_535;
const SENDERS: u16 = 4;
const BATCH: usize = 64;

/// A running mirror.
pub(super) struct Mirror {
    stats: Stats,
    offloads: Arc<UdpOffloads>,
    stop: Arc<AtomicBool>,
    inject: Arc<Mutex<Option<Vec<u8>>>>,
    thread: JoinHandle<()>,
}

/// What went through a mirror.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reflected {
    reads: u64,
    read_packets: u64,
    sends: u64,
    datagrams: u64,
    buffers: u64,
    writes: u64,
    written_packets: u64,
}

impl Reflected {
    pub(super) fn since(self, before: Self) -> Self {
        Reflected {
            reads: self.reads - before.reads,
            read_packets: self.read_packets - before.read_packets,
            sends: self.sends - before.sends,
            datagrams: self.datagrams - before.datagrams,
            buffers: self.buffers - before.buffers,
            writes: self.writes - before.writes,
            written_packets: self.written_packets - before.written_packets,
        }
    }
}

impl fmt::Display for Reflected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = |packets: u64, calls: u64| packets as f64 / calls.max(1) as f64;
        write!(
            f,
            "{} packets; {:.1} a TUN read, {:.1} a message sent, {:.1} a buffer received, {:.1} a TUN write",
            self.read_packets,
            each(self.read_packets, self.reads),
            each(self.datagrams, self.sends),
            each(self.datagrams, self.buffers),
            each(self.written_packets, self.writes)
        )
    }
}

impl Mirror {
    pub(super) fn start(
        tun: TunQueue,
        accepts: Accepts,
        big_tcp: Arc<BigTcp>,
        here: [IpAddr; 2],
        beyond: [IpAddr; 2],
        mtu: u16,
    ) -> anyhow::Result<Self> {
        let (stats, offloads) = (Stats::new(1), Arc::new(UdpOffloads::default()));
        let underlay = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DEFAULT_PORT);
        let reserved = udp::reserve(underlay.ip(), SENDERS)?;
        let ports: Vec<u16> = reserved.iter().map(|(_, port)| *port).collect();
        let socket = udp::receiver(underlay, &offloads)?;
        let port = UdpPort::open(underlay, &socket, &ports, &offloads)?;
        let outbound = Outbound::new(stats.clone(), 0, SENDERS);
        let inbound = Inbound::new(stats.clone(), 0, accepts).with_big_tcp(big_tcp);
        // what goes out is swapped already: it comes from beyond
        let there = tables(beyond, here, underlay, mtu)?;
        let home = tables(here, beyond, underlay, mtu)?;
        let (stop, inject) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None::<Vec<u8>>)));
        let (asked, frame, counted) = (stop.clone(), inject.clone(), stats.clone());
        let work = move || {
            let _ports = reserved;
            let started = Instant::now();
            let mut carrier = Carrier { tun, socket, port, outbound, inbound, there, home, stats: counted };
            let mut frames = vec![0; BATCH * (FRAME + HEADROOM + 64)];
            while !asked.load(Ordering::Relaxed) {
                let golden = frame.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(frame) = golden {
                    carrier.tun.write(&frame).ok();
                }
                let now_ms = started.elapsed().as_millis() as u64;
                if !(carrier.out(now_ms, &mut frames) | carrier.back(now_ms)) {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        };
        let thread =
            std::thread::Builder::new().name("mirror".to_owned()).spawn(work).context("cannot start a thread")?;
        Ok(Mirror { stats, offloads, stop, inject, thread })
    }

    /// Whether the kernel lacks UDP_SEGMENT, and UDP_GRO.
    pub(super) fn offloads(&self) -> (bool, bool) {
        (self.offloads.no_gso.load(Ordering::Relaxed), self.offloads.no_gro.load(Ordering::Relaxed))
    }

    /// How many super-packets of more than 64 KiB the device took.
    pub(super) fn big_writes(&self) -> u64 {
        self.stats.sum(|worker| worker.flow.big_writes.get())
    }

    pub(super) fn gso_failed(&self) -> bool {
        self.offloads.gso_failed.load(Ordering::Relaxed)
    }

    pub(super) fn reflected(&self) -> Reflected {
        let sum = |read: fn(&crate::engine::stats::Flow) -> u64| self.stats.sum(|worker| read(&worker.flow));
        Reflected {
            reads: sum(|flow| flow.tun_reads.get()),
            read_packets: sum(|flow| flow.tun_rx_packets.get()),
            sends: sum(|flow| flow.udp_send_messages.get()),
            datagrams: sum(|flow| flow.udp_tx_packets.get()),
            buffers: sum(|flow| flow.udp_recv_buffers.get()),
            writes: sum(|flow| flow.tun_writes.get()),
            written_packets: sum(|flow| flow.tun_tx_packets.get()),
        }
    }

    /// Writes a UDP datagram to the device. Its checksum is off by `flip`; `unfinished`: the kernel is to complete it.
    pub(super) fn inject(&self, from: IpAddr, to: IpAddr, port: u16, flip: u8, unfinished: bool) -> anyhow::Result<()> {
        let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) else { anyhow::bail!("golden frames are IPv4") };
        let udp_len = (8 + GOLDEN.len()) as u16;
        let mut udp =
            [&40_000u16.to_be_bytes()[..], &port.to_be_bytes(), &udp_len.to_be_bytes(), &[0; 2], GOLDEN].concat();
        let pseudo = Sum::pseudo_v4(from, to, protocol::UDP, udp_len);
        let mut sum = if unfinished { pseudo.finish().map(|byte| !byte) } else { pseudo.bytes(&udp).finish() };
        sum[1] ^= flip;
        udp[6..8].copy_from_slice(&sum);
        let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol::UDP, 0, 0];
        ip[2..4].copy_from_slice(&(20 + udp_len).to_be_bytes());
        ip.extend(from.octets().into_iter().chain(to.octets()));
        let check = Sum::default().bytes(&ip).finish();
        ip[10..12].copy_from_slice(&check);
        let mut vnet = [0; vnet_hdr::HEADER_LEN];
        if unfinished {
            // NEEDS_CSUM; from byte 20 on, to byte 6 behind that
            vnet[0] = vnet_hdr::NEEDS_CSUM;
            vnet[6..8].copy_from_slice(&20u16.to_ne_bytes());
            vnet[8..10].copy_from_slice(&6u16.to_ne_bytes());
        }
        let frame = [&vnet[..], &ip, &udp].concat();
        *self.inject.lock().unwrap_or_else(PoisonError::into_inner) = Some(frame);
        Ok(())
    }

    pub(super) fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the data path panicked: this is a bug of meshd's"))
    }
}

/// A node with `own` addresses whose only peer, at `underlay`, has `theirs`.
fn tables(own: [IpAddr; 2], theirs: [IpAddr; 2], underlay: SocketAddr, mtu: u16) -> anyhow::Result<Tables> {
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    let nets = |ips: [IpAddr; 2]| ips.map(IpNet::from).to_vec();
    let local = Local {
        mac,
        vni: Vni::DEFAULT,
        subnets: nets(own),
        addresses: own.to_vec(),
        mtu,
        identity: None,
        former_identity: None,
        bfd_keys: None,
    };
    let peer = PeerSpec {
        name: "mirror".parse()?,
        endpoint: underlay,
        underlay: vec![underlay.ip()],
        mac,
        subnets: nets(theirs),
        mtu,
        stats: Arc::new(PeerStats::new(1)),
        tunnel: None,
        former: None,
        liveness: None,
    };
    Ok(Tables::new(local, vec![peer]))
}

struct Carrier {
    tun: TunQueue,
    socket: Socket,
    port: UdpPort,
    outbound: Outbound,
    inbound: Inbound,
    there: Tables,
    home: Tables,
    stats: Stats,
}

impl Carrier {
    /// A batch out. Returns whether there was anything.
    fn out(&mut self, now_ms: u64, frames: &mut [u8]) -> bool {
        let Some(stats) = self.stats.worker(0) else { return false };
        let (mut at, mut reads) = (HEADROOM.next_multiple_of(64), 0);
        while reads < BATCH {
            let Some(room) = frames.get_mut(at..at + FRAME) else { break };
            let Ok(len) = self.tun.read(room) else { break };
            swap(&mut room[vnet_hdr::HEADER_LEN..len]);
            self.outbound.push(&self.there, now_ms, frames, at, len);
            at = (at + len + HEADROOM).next_multiple_of(64);
            reads += 1;
        }
        if reads > 0 {
            stats.flow.tun_reads.add(reads as u64);
            self.port.send(&self.outbound, &self.there, frames, stats);
            self.outbound.clear();
        }
        reads > 0
    }

    /// A batch back. Returns whether there was anything.
    fn back(&mut self, now_ms: u64) -> bool {
        let Some(stats) = self.stats.worker(0) else { return false };
        let Ok(Batch { buffers, .. }) = self.port.receive(&self.socket, 0) else { return false };
        stats.flow.udp_recv_buffers.add(buffers as u64);
        self.inbound.received_at(now_ms * 1000);
        for index in 0..buffers {
            let Some(meta) = self.port.meta(index) else { continue };
            let Some(source) = meta.source else { continue };
            let (at, len, segment_len) = (meta.at, meta.len, meta.segment_len);
            let received = Received { at, len, segment_len, source, tos: meta.tos, truncated: meta.truncated };
            self.inbound.push(&self.home, now_ms, self.port.arena_mut(), received);
        }
        self.inbound.finish(self.port.arena_mut());
        self.tun.write_units(&self.inbound, self.port.arena());
        stats.flow.tun_writes.add(self.inbound.units().len() as u64);
        self.inbound.clear();
        tcp_ends::answer(&mut self.inbound);
        buffers > 0
    }
}

/// Source and destination change places.
fn swap(packet: &mut [u8]) {
    let (at, len) = if packet.first().is_some_and(|first| first >> 4 == 6) { (8, 16) } else { (12, 4) };
    if let Some((source, destination)) = packet.get_mut(at..at + 2 * len).map(|both| both.split_at_mut(len)) {
        source.swap_with_slice(destination);
    }
}
