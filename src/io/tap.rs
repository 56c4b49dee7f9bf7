//! A look at packets as they pass: `meshctl capture` and the flight recorder.
//!
//! While nobody looks it costs a worker one branch a batch: whoever looks has it take another path through the same code, on
//! which packets are copied here with what became of them. What is kept is bounded; what does not fit is counted. Knows no
//! file format and no filter language.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use crate::engine::classify;
use crate::engine::drop::Drop;
use crate::engine::stats::WorkerStats;
use crate::engine::tables::ENCAPSULATION;
use crate::engine::tunnel;
use crate::wire::ip::{self, Packet};
use crate::wire::transport::UDP_LEN;
use crate::wire::udp;

/// Bytes that wait to be fetched at most; without a reader for so long the capture ends.
const WAITING_BYTES: usize = 16 << 20;
const LEASE_US: u64 = 5_000_000;
/// Bytes that the flight recorder keeps of a packet: all headers.
pub const HEADERS: usize = 192;

/// Which packets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    /// Packets on the TUN device's side, or datagrams on the underlay's; `None`: both.
    pub side: Option<Side>,
    /// Each of these has a prefix that holds the source or the destination.
    pub nets: Vec<Vec<IpNet>>,
    /// Each of these is the source or the destination port.
    pub ports: Vec<u16>,
    /// The IP protocol.
    pub protocol: Option<u8>,
    /// Those alone that were dropped.
    pub dropped: bool,
    /// Bytes of each that are kept.
    pub snaplen: usize,
}

/// Where a packet was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// At the TUN device.
    Inner,
    /// On the underlay.
    Outer,
}

/// A packet that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When, in microseconds since meshd's start.
    pub at_us: u64,
    /// Where.
    pub side: Side,
    /// On its way out, to a peer.
    pub out: bool,
    /// Why it was dropped; `None`: it went on.
    pub dropped: Option<Drop>,
    /// Bytes that it has.
    pub len: u32,
    /// The first of them, from the IP header on.
    pub bytes: Vec<u8>,
}

/// What is shared between workers and who looks.
#[derive(Debug, Default)]
pub struct Tap {
    on: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    capture: Option<Capture>,
    recorder: Option<Recorder>,
}

#[derive(Debug)]
struct Capture {
    id: u64,
    filter: Filter,
    until_us: u64,
    waiting: VecDeque<Record>,
    bytes: usize,
    lost: u64,
}

#[derive(Debug)]
struct Recorder {
    packets: usize,
    ring: VecDeque<Record>,
}

impl Tap {
    /// Whether anybody looks.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Starts a capture, in place of the one there may be.
    pub fn capture(&self, now_us: u64, id: u64, filter: Filter) {
        let mut inner = self.lock();
        let until_us = now_us + LEASE_US;
        inner.capture = Some(Capture { id, filter, until_us, waiting: VecDeque::new(), bytes: 0, lost: 0 });
        self.settle(&inner);
    }

    /// What was captured since the last time, at most so many bytes, and how many did not fit since the beginning; `None`
    /// where another capture has taken its place.
    pub fn fetch(&self, now_us: u64, id: u64, bytes: usize) -> Option<(Vec<Record>, u64)> {
        let mut inner = self.lock();
        let capture = inner.capture.as_mut().filter(|capture| capture.id == id)?;
        capture.until_us = now_us + LEASE_US;
        let (mut taken, mut records) = (0, Vec::new());
        while taken < bytes
            && let Some(record) = capture.waiting.pop_front()
        {
            taken += record.bytes.len();
            records.push(record);
        }
        capture.bytes -= taken;
        Some((records, capture.lost))
    }

    /// Ends a capture.
    pub fn end(&self, id: u64) {
        let mut inner = self.lock();
        inner.capture.take_if(|capture| capture.id == id);
        self.settle(&inner);
    }

    /// Keeps the headers of the last so many packets from now on; 0: of none.
    pub fn record(&self, packets: usize) {
        let mut inner = self.lock();
        let ring = inner.recorder.take().map(|recorder| recorder.ring).unwrap_or_default();
        inner.recorder = (packets > 0).then_some(Recorder { packets, ring });
        self.settle(&inner);
    }

    /// How many packets are kept at most, and those that are; the oldest come first.
    pub fn recorded(&self) -> (usize, Vec<Record>) {
        match &self.lock().recorder {
            Some(recorder) => (recorder.packets, recorder.ring.iter().cloned().collect()),
            None => (0, Vec::new()),
        }
    }

    /// One packet, as an IP packet's bytes.
    pub(super) fn packet(&self, now_us: u64, side: Side, out: bool, dropped: Option<Drop>, bytes: &[u8]) {
        let mut inner = self.lock();
        let Inner { capture, recorder } = &mut *inner;
        let record = |snaplen: usize| {
            let kept = bytes.get(..snaplen).unwrap_or(bytes).to_vec();
            Record { at_us: now_us, side, out, dropped, len: bytes.len() as u32, bytes: kept }
        };
        if let Some(recorder) = recorder {
            while recorder.ring.len() >= recorder.packets {
                recorder.ring.pop_front();
            }
            recorder.ring.push_back(record(HEADERS));
        }
        if capture.as_ref().is_some_and(|capture| now_us > capture.until_us) {
            *capture = None;
            self.settle(&inner);
        } else if let Some(capture) = capture.as_mut().filter(|capture| capture.filter.takes(side, dropped, bytes)) {
            if capture.bytes >= WAITING_BYTES {
                capture.lost += 1;
                return;
            }
            let record = record(capture.filter.snaplen);
            capture.bytes += record.bytes.len();
            capture.waiting.push_back(record);
        }
    }

    /// One datagram, for which the IP and UDP headers that the kernel makes or took away are made up.
    pub(super) fn datagram(
        &self,
        now_us: u64,
        out: bool,
        dropped: Option<Drop>,
        (from, to): (SocketAddr, SocketAddr),
        tos: u8,
        payload: &[u8],
    ) {
        if let Some(packet) = outer(from, to, tos, payload) {
            self.packet(now_us, Side::Outer, out, dropped, &packet);
        }
    }

    fn settle(&self, inner: &Inner) {
        self.on.store(inner.capture.is_some() || inner.recorder.is_some(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // what is in there is plain data
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Filter {
    fn takes(&self, side: Side, dropped: Option<Drop>, bytes: &[u8]) -> bool {
        if self.side.is_some_and(|wanted| wanted != side) || (self.dropped && dropped.is_none()) {
            return false;
        }
        let whole = Packet::parse(bytes).ok().map(|packet| (packet, bytes));
        let mut seen = whole.into_iter().chain(whole.filter(|_| side == Side::Outer).and_then(carried));
        let unfiltered = self.nets.is_empty() && self.ports.is_empty() && self.protocol.is_none();
        unfiltered || seen.any(|(packet, bytes)| self.fits(&packet, bytes))
    }

    fn fits(&self, packet: &Packet, bytes: &[u8]) -> bool {
        let [a, b, c, d] = classify::ports(packet, bytes).unwrap_or_default();
        let ports = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
        let ends = |net: &IpNet| net.contains(&packet.source) || net.contains(&packet.destination);
        self.nets.iter().all(|nets| nets.iter().any(ends))
            && self.ports.iter().all(|port| ports.contains(port))
            && self.protocol.is_none_or(|wanted| wanted == packet.protocol)
    }
}

/// The packet that a VXLAN datagram carries.
fn carried((packet, bytes): (Packet, &[u8])) -> Option<(Packet, &[u8])> {
    let payload = bytes.get(usize::from(packet.header_len) + UDP_LEN..).filter(|bytes| !tunnel::is_wireguard(bytes))?;
    let inner = payload.get(ENCAPSULATION..)?;
    Some((Packet::parse(inner).ok()?, inner))
}

/// What each drop counter of a worker says: how a packet ended is how they changed.
pub(super) struct Tally<'w>(&'w WorkerStats, Vec<u64>);

impl<'w> Tally<'w> {
    pub(super) fn new(stats: &'w WorkerStats) -> Self {
        Tally(stats, Drop::ALL.iter().map(|reason| stats.drops(*reason)).collect())
    }

    /// The reason that was counted since this was asked last, if one was.
    pub(super) fn news(&mut self) -> Option<Drop> {
        let mut news = None;
        for (reason, before) in Drop::ALL.iter().zip(&mut self.1) {
            let now = self.0.drops(*reason);
            news = news.or((now != *before).then_some(*reason));
            *before = now;
        }
        news
    }
}

fn outer(from: SocketAddr, to: SocketAddr, tos: u8, payload: &[u8]) -> Option<Vec<u8>> {
    const TTL: u8 = 64;
    let mut packet = Vec::with_capacity(ip::V6_LEN + UDP_LEN + payload.len());
    udp::write(from, to, tos, TTL, payload, 0, &mut packet).map(|()| packet)
}

#[cfg(test)]
mod tests;
