//! WireGuard with a peer: sessions, handshakes, roaming, and packets that wait for a session.
//!
//! The only file that names boringtun, which does the protocol (Donenfeld, "WireGuard: Next Generation Kernel Network
//! Tunnel", 2017) for one pair of keys. Here is what it leaves to its user: which of many peers a message is for, who may
//! send from where, when to try again, and a bounded, counted queue.
//!
//! Between two meshd nodes there is a session for each **lane**: a pair of keys of its own, so that two workers encrypt for
//! one peer without sharing a lock, while each flow stays on one lane and in order. Other peers have lane 0 alone.
//!
//! Session indices carry where they belong: `slot << 12 | lane << 8 | generation`. The kernel steers a datagram by the lane
//! in there to the worker of that number (`sys::udp::steer`).

mod limit;
mod outbox;

use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519;
use crossbeam::atomic::AtomicCell;
use crossbeam::utils::CachePadded;

pub use self::limit::SourceLimit;
use self::outbox::Letter;
pub use self::outbox::Outbox;
use super::drop::Drop;
use super::tables::PeerIndex;
use crate::key::{MAX_LANES, PublicKey, SecretKey};

/// Bytes that a transport message adds to an inner packet: type, receiver, counter and the authentication tag.
pub const OVERHEAD: usize = 32;
/// Where the inner packet starts in a transport message.
pub const INNER_AT: usize = 16;
/// Peers that a table may have: what fits a session index beside lane and generation.
pub const MAX_SLOTS: u32 = 1 << 20;

/// Handshake messages a second from which on a sender must first prove, by a cookie, that its address is its own.
const HANDSHAKES_BEFORE_COOKIES: u64 = 200;
/// The longest handshake message, and so what boringtun wants as room at least.
const HANDSHAKE_LEN: usize = 148;
/// Packets and bytes that wait for the session of one lane, and bytes that wait in all.
const HELD_PACKETS: usize = 128;
const HELD_BYTES: usize = 96 << 10;
const HELD_BYTES_OF_ALL: usize = 32 << 20;
/// How long a packet waits for a session before it is discarded, in milliseconds.
const HELD_MS: u64 = 5_000;
/// How long after an unanswered initiation the next one goes out while packets wait, in milliseconds. The protocol's
/// own five seconds would be five seconds without a network after an outage; receivers take twenty a second.
const RETRY_MS: u64 = 1_000;
/// The same after ten in vain.
const SLOW_RETRY_MS: u64 = 2_000;
/// While nothing waits, the pause doubles up to this: dead peers must not cost anything.
const IDLE_RETRY_MS: u64 = 64_000;
/// How often a peer's message that cannot be used makes us start a handshake at most, in milliseconds.
const ANSWER_MS: u64 = 1_000;
/// How long after a first handshake a peer that changes from clear to encrypted may still have clear packets under way.
const PINNED_AFTER_MS: u64 = 1_000;
/// How long such a peer may take for that handshake. Afterwards it is encrypted or not reached.
const MIGRATION_MS: u64 = 30_000;

/// This node's keys, one a lane.
pub struct Identity {
    lanes: Vec<Own>,
}

struct Own {
    secret: x25519::StaticSecret,
    public: x25519::PublicKey,
    limiter: Arc<RateLimiter>,
    /// Never under load: sees only whether a message is for this key.
    addressed: RateLimiter,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.public_key()).finish()
    }
}

impl Identity {
    /// An identity with so many lanes, at least one and at most [`MAX_LANES`].
    pub fn new(key: &SecretKey, lanes: usize) -> Self {
        let own = |lane| {
            let secret = key.lane(lane).secret().clone();
            let public = x25519::PublicKey::from(&secret);
            let limiter = Arc::new(RateLimiter::new(&public, HANDSHAKES_BEFORE_COOKIES));
            Own { limiter, addressed: RateLimiter::new(&public, u64::MAX), secret, public }
        };
        Identity { lanes: (0..lanes.clamp(1, MAX_LANES) as u8).map(own).collect() }
    }

    /// The node's public key.
    pub fn public_key(&self) -> Option<PublicKey> {
        self.lanes.first().map(|own| PublicKey(own.public.to_bytes()))
    }

    /// The public key of each lane.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.lanes.iter().map(|own| PublicKey(own.public.to_bytes())).collect()
    }

    /// To be called each second: forgets how many handshake messages there were.
    pub fn second_passed(&self) {
        self.lanes.iter().for_each(|own| own.limiter.reset_count());
    }
}

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
    match Tunn::parse_incoming_packet(datagram) {
        Ok(Packet::HandshakeInit(_)) => Ok(Kind::Initiation),
        Ok(Packet::HandshakeResponse(message)) => Ok(Kind::For(message.receiver_idx)),
        Ok(Packet::PacketCookieReply(message)) => Ok(Kind::For(message.receiver_idx)),
        Ok(Packet::PacketData(message)) => Ok(Kind::For(message.receiver_idx)),
        Err(_) => Err(Drop::WireguardMalformed),
    }
}

/// Slot and lane that a session index names.
#[inline]
pub fn place(index: u32) -> (u32, usize) {
    (index >> 12, (index >> 8) as usize % MAX_LANES)
}

/// Who sent an initiation, and on which of our lanes; or what to do instead.
pub enum Initiator {
    /// The owner of this key.
    Key(PublicKey, usize),
    /// The sender has to prove its address first: the answer was put into the outbox.
    Cookie,
}

impl Identity {
    /// Finds out who sent an initiation. Costs a Diffie-Hellman computation, which the limiters bound: `allows` says how
    /// many may come from one address. It is asked only of messages by somebody who knows our key: anybody can send
    /// garbage in a peer's name.
    pub fn initiator(
        &self,
        datagram: &[u8],
        source: SocketAddr,
        mut allows: impl FnMut(IpAddr) -> bool,
        data_socket: u16,
        outbox: &mut Outbox,
    ) -> Result<Initiator, Drop> {
        let mut cookie = [0; HANDSHAKE_LEN];
        for (lane, own) in self.lanes.iter().enumerate() {
            if own.addressed.verify_packet(None, datagram, &mut []).is_err() {
                continue; // perhaps for another lane
            }
            if !allows(source.ip()) {
                return Err(Drop::HandshakeLimited);
            }
            match own.limiter.verify_packet(Some(source.ip()), datagram, &mut cookie) {
                Ok(Packet::HandshakeInit(message)) => {
                    let half = parse_handshake_anon(&own.secret, &own.public, &message);
                    let half = half.map_err(|_| Drop::HandshakeRefused)?;
                    return Ok(Initiator::Key(PublicKey(half.peer_static_public), lane));
                }
                Err(TunnResult::WriteToNetwork(reply)) => {
                    outbox.post(reply, source, data_socket);
                    return Ok(Initiator::Cookie);
                }
                _ => break,
            }
        }
        Err(Drop::HandshakeRefused)
    }
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
    lanes: Box<[CachePadded<Lane>]>,
}

struct Lane {
    /// There is a session: what is sealed now can be opened.
    up: AtomicU8,
    state: Mutex<State>,
}

struct State {
    /// Made when it is needed for the first time: it costs 40 µs and some kilobytes.
    tunn: Option<Box<Tunn>>,
    held: VecDeque<Held>,
    held_bytes: usize,
    /// A session is wanted although nothing waits for it.
    wanted: bool,
    /// Initiations since the last session, and when the last one left; `None` after a session, or when one is urgent.
    tries: u32,
    tried_ms: Option<u64>,
    nudged_ms: Option<u64>,
}

struct Held {
    packet: Vec<u8>,
    tos: u8,
    since_ms: u64,
}

/// Bytes that wait for sessions with all peers.
static HELD_OF_ALL: AtomicUsize = AtomicUsize::new(0);

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
        let lane = |number| {
            let state = State {
                tunn: None,
                held: VecDeque::new(),
                held_bytes: 0,
                // later lanes follow when there is something for them
                wanted: number == 0 && policy != Policy::Willing,
                tries: 0,
                tried_ms: None,
                nudged_ms: None,
            };
            CachePadded::new(Lane { up: AtomicU8::new(0), state: Mutex::new(state) })
        };
        Tunnel {
            slot,
            keys: keys.iter().take(lanes).copied().collect(),
            identity,
            keepalive,
            policy: AtomicU8::new(policy as u8),
            migrates_until: AtomicU64::new(0),
            endpoint: AtomicCell::new(endpoint),
            lanes: (0..lanes).map(lane).collect(),
        }
    }

    /// Its place in session indices.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Whether it was made for these keys, ours and theirs.
    pub fn is_between(&self, ours: &Arc<Identity>, keys: &[PublicKey], keepalive: Option<u16>) -> bool {
        let lanes = keys.len().min(ours.lanes.len());
        self.identity.public_keys() == ours.public_keys()
            && self.keys.as_slice() == keys.get(..lanes).unwrap_or_default()
            && self.keepalive == keepalive
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
            lock(lane).wanted = true;
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
        self.lanes.get(lane).is_some_and(|lane| lane.up.load(Ordering::Relaxed) & SESSION != 0)
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
        let lane = flow as usize % self.lanes.len().max(1);
        if lane > 0 && !self.is_up(lane) {
            if let Some(lane) = self.lanes.get(lane) {
                want(lane);
            }
            return self.lane(peer, 0);
        }
        self.lane(peer, lane)
    }

    /// Locks a lane. A number that is none means lane 0.
    #[inline]
    pub fn lane(&self, peer: PeerIndex, lane: usize) -> Session<'_> {
        let number = if lane < self.lanes.len() { lane } else { 0 };
        // a tunnel has a lane at least: new() sees to that
        #[allow(clippy::indexing_slicing)]
        let lane = &self.lanes[number];
        Session { tunnel: self, peer, number, lane, state: lock(lane) }
    }

    /// Starts a handshake on a lane soon, since the peer uses a session there that we do not have: we restarted. Each lane
    /// has its own sessions, and the peer answers on the lane that its flows are on, whichever ours are. At most once a
    /// second, since anybody can make us believe that.
    pub fn nudge(&self, lane: usize, now_ms: u64) {
        let Some(lane) = self.lanes.get(lane) else { return };
        lock(lane).nudge(now_ms);
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
        let mut session = self.lane(peer, if self.is_up(lane) { lane } else { 0 });
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
            let state = lock(lane);
            facts.held += state.held.len();
            if number == 0 {
                facts.unanswered = state.tries;
                facts.handshake_age = state.tunn.as_ref().and_then(|tunn| tunn.time_since_last_handshake());
            }
        }
        facts
    }
}

impl State {
    fn nudge(&mut self, now_ms: u64) {
        if self.nudged_ms.is_none_or(|nudged| now_ms >= nudged + ANSWER_MS) {
            self.nudged_ms = Some(now_ms);
            self.wanted = true;
            self.tried_ms = None;
        }
    }
}

impl std::ops::Drop for State {
    fn drop(&mut self) {
        HELD_OF_ALL.fetch_sub(self.held_bytes, Ordering::Relaxed);
    }
}

/// Bit of [`Lane::up`]: there is a session.
const SESSION: u8 = 1;
/// Bit of [`Lane::up`]: somebody asked for a session already, so that no other packet has to take the lock for that.
const RECENT: u8 = 2;

fn want(lane: &Lane) {
    if lane.up.fetch_or(RECENT, Ordering::Relaxed) & RECENT == 0 {
        lock(lane).wanted = true;
    }
}

fn lock(lane: &Lane) -> MutexGuard<'_, State> {
    // a state is changed by code that does not panic half-way; whoever held it has counted its loss already
    lane.state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn socket_of(lane: usize, data_socket: u16) -> u16 {
    match lane {
        0 => data_socket,
        lane => (lane - 1) as u16 % data_socket.max(1),
    }
}

/// A locked lane.
pub struct Session<'t> {
    tunnel: &'t Tunnel,
    peer: PeerIndex,
    number: usize,
    lane: &'t Lane,
    state: MutexGuard<'t, State>,
}

/// What became of a received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// An inner packet of so many bytes.
    Packet(usize),
    /// It was for the tunnel itself.
    Consumed,
}

impl Session<'_> {
    /// To whom.
    pub fn peer(&self) -> PeerIndex {
        self.peer
    }

    /// Which lane it is, and of which tunnel.
    pub fn is(&self, slot: u32, lane: usize) -> bool {
        (self.tunnel.slot, self.number) == (slot, lane)
    }

    /// Whether there is a session.
    #[inline]
    pub fn is_up(&self) -> bool {
        self.lane.up.load(Ordering::Relaxed) & SESSION != 0
    }

    /// Which of a worker's sending sockets carries this lane. Lane 0 has the data port, since other implementations
    /// answer to wherever they heard us last; the others have ports of their own, so that networks and NICs can tell
    /// them apart.
    #[inline]
    pub fn socket(&self, data_socket: u16) -> u16 {
        socket_of(self.number, data_socket)
    }

    /// Where to.
    #[inline]
    pub fn endpoint(&self) -> SocketAddr {
        self.tunnel.endpoint()
    }

    /// Seals an inner packet behind `out`, and returns the datagram's length. Only when the session is up.
    #[inline]
    pub fn seal(&mut self, packet: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        let tunn = self.state.tunn.as_mut()?;
        let at = out.len();
        out.resize(at + (packet.len() + OVERHEAD).max(HANDSHAKE_LEN), 0);
        let len = match tunn.encapsulate(packet, out.get_mut(at..)?) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            _ => 0,
        };
        out.truncate(at + len);
        (len > 0).then_some(len)
    }

    /// Whether so many packets of so many bytes in all can wait for a session.
    pub fn can_hold(&self, packets: usize, bytes: usize) -> bool {
        self.state.held.len() + packets <= HELD_PACKETS
            && self.state.held_bytes + bytes <= HELD_BYTES
            && HELD_OF_ALL.load(Ordering::Relaxed) + bytes <= HELD_BYTES_OF_ALL
    }

    /// Keeps a packet until there is a session.
    pub fn hold(&mut self, packet: &[u8], tos: u8, now_ms: u64) {
        self.state.held_bytes += packet.len();
        HELD_OF_ALL.fetch_add(packet.len(), Ordering::Relaxed);
        self.state.held.push_back(Held { packet: packet.to_vec(), tos, since_ms: now_ms });
    }

    /// Starts a handshake, unless one is under way.
    pub fn start(&mut self, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        self.start_for(!self.state.held.is_empty(), now_ms, data_socket, outbox);
    }

    fn start_for(&mut self, somebody: bool, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        let tries = self.state.tries;
        let pause = match somebody {
            false => (RETRY_MS << tries.min(8)).min(IDLE_RETRY_MS),
            true if tries < 10 => RETRY_MS,
            true => SLOW_RETRY_MS,
        };
        // not all peers of a node in the same millisecond
        let pause = pause + u64::from(self.tunnel.slot % 128);
        if self.state.tried_ms.is_some_and(|tried| now_ms < tried + pause) {
            return;
        }
        self.state.tries = tries.saturating_add(1);
        self.state.tried_ms = Some(now_ms);
        let (to, socket) = (self.endpoint(), self.socket(data_socket));
        let mut room = [0; HANDSHAKE_LEN];
        if let TunnResult::WriteToNetwork(message) = self.tunn().format_handshake_initiation(&mut room, true) {
            outbox.post(message, to, socket);
        }
    }

    /// Opens a received message into `room`, which is longer than the message. Its answers go into the outbox; the peer
    /// is answered at `source` from now on, once that message has proved to be the peer's.
    #[inline]
    pub fn open(
        &mut self,
        message: &[u8],
        source: SocketAddr,
        now_ms: u64,
        data_socket: u16,
        room: &mut [u8],
        outbox: &mut Outbox,
    ) -> Result<Opened, Drop> {
        let handshake = message.first() != Some(&DATA);
        let (to, socket) = (self.endpoint(), self.socket(data_socket));
        let opened = match self.tunn().decapsulate(Some(source.ip()), message, room) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Opened::Packet(packet.len())
            }
            TunnResult::Done => Opened::Consumed,
            TunnResult::WriteToNetwork(answer) if answer.first() == Some(&COOKIE) => {
                outbox.post(answer, source, socket);
                return Ok(Opened::Consumed); // whose it was is not proved
            }
            TunnResult::WriteToNetwork(answer) => {
                outbox.post(answer, if self.number == 0 { source } else { to }, socket);
                Opened::Consumed
            }
            TunnResult::Err(WireGuardError::WrongTai64nTimestamp) => {
                // authentic, but older than one that we took: replayed, or the peer's clock was set back
                self.state.nudge(now_ms);
                return Err(Drop::HandshakeReplayed);
            }
            TunnResult::Err(error) => return Err(reason(&error, handshake)),
        };
        // a cookie says nothing of where the peer is: anybody who saw our message can have made it up. An initiation may
        // be of before our restart, and sent again by somebody else: only what follows it proves the peer
        let fresh = matches!(message.first(), Some(&(RESPONSE | DATA)));
        if fresh && self.number == 0 && to != source {
            self.tunnel.endpoint.store(source);
        }
        if handshake || !self.is_up() {
            self.refresh(data_socket, outbox);
        }
        Ok(opened)
    }

    fn tick(&mut self, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        if self.state.tunn.is_some() {
            let (to, socket) = (self.endpoint(), self.socket(data_socket));
            let mut room = [0; HANDSHAKE_LEN];
            // ConnectionExpired: boringtun gives up after 90 s. Whether to go on is decided below.
            if let TunnResult::WriteToNetwork(message) = self.tunn().update_timers(&mut room) {
                outbox.post(message, to, socket);
            }
            self.refresh(data_socket, outbox);
        }
        if self.tunnel.keepalive.is_some() && self.tunnel.policy() != Policy::Willing && !self.is_up() {
            self.state.wanted = true;
        }
        if self.state.wanted || (!self.state.held.is_empty() && !self.is_up()) {
            self.start(now_ms, data_socket, outbox);
        }
        while self.state.held.front().is_some_and(|held| now_ms >= held.since_ms + HELD_MS) {
            if let Some(held) = self.unhold() {
                outbox.expire(&held);
            }
        }
    }

    /// Sees whether there is a session, and sends what waited for it.
    fn refresh(&mut self, data_socket: u16, outbox: &mut Outbox) {
        let age = self.state.tunn.as_ref().and_then(|tunn| tunn.time_since_last_handshake());
        let was = self.is_up();
        if age.is_none() {
            if was {
                self.lane.up.store(0, Ordering::Relaxed);
            }
            return;
        }
        // an older session is no answer to a wish for a new one
        if !was || age.is_some_and(|age| age < Duration::from_millis(RETRY_MS)) {
            self.state.wanted = false;
            self.state.tries = 0;
            self.state.tried_ms = None;
        }
        let (to, socket, peer) = (self.endpoint(), self.socket(data_socket), self.peer);
        while let Some(held) = self.unhold() {
            let (at, inner) = (outbox.slab.len(), held.packet.len() as u32);
            let mut slab = std::mem::take(&mut outbox.slab);
            let len = self.seal(&held.packet, &mut slab).unwrap_or(0);
            outbox.slab = slab;
            if len > 0 {
                let waited = Some((peer, inner));
                outbox.letters.push(Letter { at, len, to, socket, tos: held.tos & ECN, waited });
            } else {
                outbox.expire(&held);
            }
        }
        self.lane.up.store(SESSION, Ordering::Relaxed);
    }

    fn unhold(&mut self) -> Option<Held> {
        let held = self.state.held.pop_front()?;
        self.state.held_bytes -= held.packet.len();
        HELD_OF_ALL.fetch_sub(held.packet.len(), Ordering::Relaxed);
        Some(held)
    }

    fn tunn(&mut self) -> &mut Tunn {
        let Tunnel { identity, keys, slot, keepalive, .. } = self.tunnel;
        let number = self.number;
        self.state.tunn.get_or_insert_with(|| {
            // new() made as many lanes as both sides have keys, and one at least
            #[allow(clippy::indexing_slicing)]
            let own = &identity.lanes[number];
            let theirs = keys.get(number).map_or([0; 32], |key| key.0).into();
            let (index, keepalive) = (slot << 4 | number as u32, keepalive.filter(|_| number == 0));
            let limiter = Some(own.limiter.clone());
            Box::new(Tunn::new(own.secret.clone(), theirs, None, keepalive, index, limiter))
        })
    }
}

/// Message types.
const RESPONSE: u8 = 2;
const COOKIE: u8 = 3;
const DATA: u8 = 4;
/// The ECN bits of a TOS byte. The inner DSCP stays inside: it would tell what the packet is.
pub const ECN: u8 = 3;

fn reason(error: &WireGuardError, handshake: bool) -> Drop {
    match error {
        WireGuardError::InvalidAeadTag if !handshake => Drop::WireguardNotAuthentic,
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => Drop::WireguardReplayed,
        WireGuardError::WrongIndex | WireGuardError::NoCurrentSession => Drop::WireguardUnknownSession,
        WireGuardError::InvalidPacket if !handshake => Drop::BadInnerPacket,
        _ => Drop::HandshakeRefused,
    }
}

#[cfg(test)]
mod tests;
