//! WireGuard with a peer: sessions, handshakes, roaming, and packets that wait for a session.
//!
//! The protocol is Donenfeld's "WireGuard: Next Generation Kernel Network Tunnel" (2017), here the whitepaper. `noise` has
//! the handshake, `cookie` the codes that keep floods off it, `session` the keys that come of it, `machine` all that for one
//! key of ours and one of a peer's, `lane` and `locked` the locks and the bounded, counted queue around a machine, `identity`
//! our keys.
//! In this file is the tunnel to a peer: which lane a packet takes, and how strictly the peer is encrypted.
//!
//! Between two meshd nodes there is a session for each **lane**: a pair of keys of its own, so that two workers encrypt for
//! one peer without sharing a lock, while each flow stays on one lane and in order. Other peers have lane 0 alone.
//!
//! Session indices carry where they belong: `slot << 12 | lane << 8 | generation`. The kernel steers a datagram by the lane
//! in there to the worker of that number (`sys::udp::steer`).

mod aead;
mod cookie;
mod identity;
mod lane;
mod limit;
mod locked;
mod machine;
mod message;
mod noise;
mod outbox;
mod session;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::atomic::AtomicCell;
use crossbeam::utils::CachePadded;
use zerocopy::FromBytes;

pub use self::identity::{Identity, Initiator};
use self::lane::Lane;
pub use self::limit::SourceLimit;
use self::locked::socket_of;
pub use self::locked::{Opened, Session};
use self::message::{CookieReply, DataHeader, Initiation, Response};
pub use self::noise::Heard;
use self::outbox::Letter;
pub use self::outbox::Outbox;
use super::drop::Drop;
use super::tables::PeerIndex;
use crate::key::{MAX_LANES, PresharedKey, PublicKey};

/// Bytes that a transport message adds to an inner packet: type, receiver, counter and the authentication tag.
pub const OVERHEAD: usize = 32;
/// Where the inner packet starts in a transport message.
pub const INNER_AT: usize = 16;
/// Peers that a table may have: what fits a session index beside lane and generation.
pub const MAX_SLOTS: u32 = 1 << 20;

/// How long after a first handshake a peer that changes from clear to encrypted may still have clear packets under way.
const PINNED_AFTER_MS: u64 = 1_000;
/// How long such a peer may take for that handshake. Afterwards it is encrypted or not reached.
const MIGRATION_MS: u64 = 30_000;

/// What a datagram is for whom, as far as that can be seen without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A handshake initiation: only a key tells whose.
    Initiation,
    /// A message of a session or of a handshake that we started: its index tells whose.
    For(u32),
}

/// Whether the bytes are a WireGuard message rather than VXLAN: the first byte is 1 to 4 and the next three are zero.
#[inline]
pub fn is_wireguard(datagram: &[u8]) -> bool {
    matches!(datagram, [1..=4, 0, 0, 0, ..])
}

/// What the bytes are.
#[inline]
pub fn kind(datagram: &[u8]) -> Result<Kind, Drop> {
    let receiver = match datagram.first() {
        Some(&message::DATA) if datagram.len() >= OVERHEAD => {
            DataHeader::ref_from_prefix(datagram).ok().map(|(header, _)| header.receiver)
        }
        Some(&message::INITIATION) if datagram.len() == size_of::<Initiation>() => return Ok(Kind::Initiation),
        Some(&message::RESPONSE) => Response::ref_from_bytes(datagram).ok().map(|message| message.receiver),
        Some(&message::COOKIE) => CookieReply::ref_from_bytes(datagram).ok().map(|message| message.receiver),
        _ => None,
    };
    receiver.map(|index| Kind::For(index.get())).ok_or(Drop::WireguardMalformed)
}

/// Slot and lane that a session index names.
#[inline]
pub fn place(index: u32) -> (u32, usize) {
    (index >> 12, (index >> 8) as usize % MAX_LANES)
}

/// How strictly a peer is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Policy {
    /// It may be: clear, until it starts a session.
    Willing,
    /// It was clear and is to be encrypted: clear until there is a session, or time is up.
    Migrating,
    /// Nothing goes to it or comes from it in clear.
    Required,
}

/// All lanes with one peer. Lives as long as the peer has these keys; the peer table shares it.
pub struct Tunnel {
    slot: u32,
    identity: Arc<Identity>,
    keys: Vec<PublicKey>,
    keepalive: Option<u16>,
    policy: AtomicU8,
    /// When the migration ends, in milliseconds since the start; 0: not decided yet.
    migrates_until: AtomicU64,
    endpoint: AtomicCell<SocketAddr>,
    preshared: Option<PresharedKey>,
    /// What the peer's answers say of our preshared key: nothing, that it is another, and that this was told.
    mismatch: AtomicU8,
    lanes: Box<[CachePadded<Lane>]>,
}

const MATCHES: u8 = 0;
const DIFFERS: u8 = 1;
const DIFFERS_AND_TOLD: u8 = 2;

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("slot", &self.slot).field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// What can be said of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelFacts {
    /// Lanes that have a session, and lanes that there are.
    pub lanes_up: usize,
    /// How many there are.
    pub lanes: usize,
    /// How long ago the last handshake of lane 0 was completed.
    pub handshake_age: Option<Duration>,
    /// Packets that wait for a session.
    pub held: usize,
    /// Initiations of lane 0 since its last session.
    pub unanswered: u32,
}

impl Tunnel {
    /// A tunnel to the owner of `keys` at `endpoint`; `slot` is below [`MAX_SLOTS`] and no other tunnel's. It has as many
    /// lanes as both sides have keys. `keepalive`: seconds between packets that keep a NAT's mapping.
    pub fn new(
        slot: u32,
        identity: Arc<Identity>,
        keys: &[PublicKey],
        endpoint: SocketAddr,
        keepalive: Option<u16>,
        policy: Policy,
    ) -> Self {
        let lanes = keys.len().min(identity.lanes.len()).max(1);
        // later lanes follow when there is something for them
        let lane = |number| CachePadded::new(Lane::new(number == 0 && policy != Policy::Willing));
        Tunnel {
            slot,
            keys: keys.iter().take(lanes).copied().collect(),
            identity,
            keepalive,
            policy: AtomicU8::new(policy as u8),
            migrates_until: AtomicU64::new(0),
            endpoint: AtomicCell::new(endpoint),
            preshared: None,
            mismatch: AtomicU8::new(MATCHES),
            lanes: (0..lanes).map(lane).collect(),
        }
    }

    /// The same where both sides also have to know this key.
    pub fn with_preshared(self, preshared: Option<PresharedKey>) -> Self {
        Tunnel { preshared, ..self }
    }

    /// Whether both sides have to know a key besides their own.
    pub fn is_preshared(&self) -> bool {
        self.preshared.is_some()
    }

    /// Whether the peer answers as one with another preshared key would, or with none, or without where there should be
    /// none. Says so once, and again after a session.
    pub fn another_preshared_is_news(&self) -> bool {
        let news = (DIFFERS, DIFFERS_AND_TOLD);
        self.mismatch.compare_exchange(news.0, news.1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Whether the peer's last answer was such.
    pub fn has_another_preshared(&self) -> bool {
        self.mismatch.load(Ordering::Relaxed) != MATCHES
    }

    fn answered_wrongly(&self) {
        self.mismatch.compare_exchange(MATCHES, DIFFERS, Ordering::Relaxed, Ordering::Relaxed).ok();
    }

    fn answered_rightly(&self) {
        self.mismatch.store(MATCHES, Ordering::Relaxed);
    }

    fn preshared(&self) -> &[u8; 32] {
        self.preshared.as_ref().map_or(&[0; 32], PresharedKey::bytes)
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn keepalive(&self) -> Option<u16> {
        self.keepalive
    }

    /// Its place in session indices.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Whether it was made for these keys, ours, theirs and what both know besides.
    pub fn is_between(
        &self,
        ours: &Arc<Identity>,
        keys: &[PublicKey],
        keepalive: Option<u16>,
        preshared: Option<&PresharedKey>,
    ) -> bool {
        let lanes = keys.len().min(ours.lanes.len());
        self.identity.public_keys() == ours.public_keys()
            && self.keys.as_slice() == keys.get(..lanes).unwrap_or_default()
            && self.keepalive == keepalive
            && self.preshared.as_ref() == preshared
    }

    /// Whether an initiation by this key for one of these keys of ours, on this lane, is the tunnel's business.
    pub fn answers(&self, ours: &Arc<Identity>, theirs: &PublicKey, lane: usize) -> bool {
        Arc::ptr_eq(&self.identity, ours) && self.keys.get(lane) == Some(theirs)
    }

    /// The peer's public keys, one a lane.
    pub fn keys(&self) -> &[PublicKey] {
        &self.keys
    }

    /// Where the peer was heard last, or should be.
    #[inline]
    pub fn endpoint(&self) -> SocketAddr {
        self.endpoint.load()
    }

    /// Sends to another address from now on: the node list has changed.
    pub fn set_endpoint(&self, endpoint: SocketAddr) {
        self.endpoint.store(endpoint);
    }

    /// How strictly the peer is encrypted.
    #[inline]
    pub fn policy(&self) -> Policy {
        match self.policy.load(Ordering::Relaxed) {
            0 => Policy::Willing,
            1 => Policy::Migrating,
            _ => Policy::Required,
        }
    }

    /// Changes that. A peer that was clear migrates; nothing leads back from [`Policy::Required`] but a new tunnel.
    pub fn set_policy(&self, policy: Policy) {
        self.migrates_until.store(0, Ordering::Relaxed);
        self.policy.store(policy as u8, Ordering::Relaxed);
        if let Some(lane) = self.lanes.first().filter(|_| policy != Policy::Willing) {
            lane.state().wanted = true;
        }
    }

    /// Whether packets to the peer are sealed: always where that is required, else while there is a session.
    #[inline]
    pub fn seals(&self) -> bool {
        self.policy() == Policy::Required || self.is_up(0)
    }

    /// Whether that lane has a session.
    #[inline]
    pub fn is_up(&self, lane: usize) -> bool {
        self.lanes.get(lane).is_some_and(|lane| lane.is_up())
    }

    /// Which lane would carry flows with this hash now, and which of a worker's sending sockets; changes nothing.
    pub fn carrier(&self, flow: u32, data_socket: u16) -> (usize, u16) {
        let lane = flow as usize % self.lanes.len().max(1);
        let lane = if lane > 0 && !self.is_up(lane) { 0 } else { lane };
        (lane, socket_of(lane, data_socket))
    }

    /// Locks the lane that carries flows with this hash: lane 0 as long as theirs has no session.
    #[inline]
    pub fn session(&self, peer: PeerIndex, flow: u32) -> Session<'_> {
        let mut number = flow as usize % self.lanes.len().max(1);
        if number > 0 && !self.is_up(number) {
            self.at(number).1.want();
            number = 0;
        }
        let (number, lane) = self.at(number);
        Session::outward(self, peer, number, lane)
    }

    /// Locks a lane for who receives. A number that is none means lane 0.
    #[inline]
    pub fn lane(&self, peer: PeerIndex, lane: usize) -> Session<'_> {
        let (number, lane) = self.at(lane);
        Session::inward(self, peer, number, lane)
    }

    #[inline]
    fn at(&self, lane: usize) -> (usize, &Lane) {
        let number = if lane < self.lanes.len() { lane } else { 0 };
        // a tunnel has a lane at least: new() sees to that
        #[allow(clippy::indexing_slicing)]
        (number, &self.lanes[number])
    }

    /// Starts a handshake on a lane soon, since the peer uses a session there that we do not have: we restarted. Each lane
    /// has its own sessions, and the peer answers on the lane that its flows are on, whichever ours are. At most once a
    /// second, since anybody can make us believe that.
    pub fn nudge(&self, lane: usize, now_ms: u64) {
        let Some(lane) = self.lanes.get(lane) else { return };
        lane.state().nudge(now_ms);
    }

    /// Sends a packet of this node's own through that lane, or through lane 0 while it has no session. Without a session there
    /// it starts a handshake instead, as eagerly as if something waited for it.
    pub fn originate(
        &self,
        peer: PeerIndex,
        lane: usize,
        packet: &[u8],
        now_ms: u64,
        data_socket: u16,
        outbox: &mut Outbox,
    ) {
        let (number, lane) = self.at(if self.is_up(lane) { lane } else { 0 });
        let mut session = Session::outward(self, peer, number, lane);
        if !session.is_up() {
            return session.start_for(true, now_ms, data_socket, outbox);
        }
        let (at, to, socket) = (outbox.slab.len(), session.endpoint(), session.socket(data_socket));
        if let Some(len) = session.seal(packet, &mut outbox.slab) {
            outbox.letters.push(Letter { at, len, to, socket, tos: 0, waited: None });
        }
    }

    /// Lets time pass: retries, new sessions for old ones, keepalives, packets that waited too long. To be called a few
    /// times a second.
    pub fn tick(&self, peer: PeerIndex, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        self.end_migration(now_ms);
        for lane in 0..self.lanes.len() {
            self.lane(peer, lane).tick(now_ms, data_socket, outbox);
        }
    }

    fn end_migration(&self, now_ms: u64) {
        if self.policy() != Policy::Migrating {
            return;
        }
        let until = self.migrates_until.load(Ordering::Relaxed);
        if until == 0 {
            self.migrates_until.store(now_ms + MIGRATION_MS, Ordering::Relaxed);
        } else if now_ms >= until {
            self.policy.store(Policy::Required as u8, Ordering::Relaxed);
        } else if self.is_up(0) {
            self.migrates_until.store(until.min(now_ms + PINNED_AFTER_MS), Ordering::Relaxed);
        }
    }

    /// What can be said of it.
    pub fn facts(&self) -> TunnelFacts {
        let mut facts = TunnelFacts {
            lanes_up: (0..self.lanes.len()).filter(|lane| self.is_up(*lane)).count(),
            lanes: self.lanes.len(),
            handshake_age: None,
            held: 0,
            unanswered: 0,
        };
        for (number, lane) in self.lanes.iter().enumerate() {
            let of = lane.facts();
            facts.held += of.held;
            if number == 0 {
                facts.unanswered = of.tries;
                facts.handshake_age = of.age_ms.map(Duration::from_millis);
            }
        }
        facts
    }
}

/// The ECN bits of a TOS byte. The inner DSCP stays inside: it would tell what the packet is.
pub const ECN: u8 = 3;

#[cfg(test)]
mod tests;

#[cfg(test)]
mod oracle;
