//! A locked lane, and what is done with it: packets are sealed, messages opened and answered, handshakes begun.

use std::net::SocketAddr;
use std::sync::MutexGuard;

use zerocopy::IntoBytes;

use super::cookie::Admission;
use super::identity::Own;
use super::lane::{Lane, State};
use super::machine::{Ends, Machine, Untaken};
use super::message::{COOKIE, DATA, INITIATION, RESPONSE};
use super::noise::Heard;
use super::outbox::Letter;
use super::session::{Sealing, Unopened};
use super::{ECN, Outbox, Policy, Tunnel};
use crate::engine::drop::Drop;
use crate::engine::tables::PeerIndex;

/// A peer that may be reached in clear is not asked more often than this in a row.
const WILLING_TRIES: u32 = 6;

/// Which of a worker's sending sockets carries a lane. Lane 0 has the data port, since other implementations answer to
/// wherever they heard us last; the others have ports of their own, so that networks and NICs can tell them apart.
pub(super) fn socket_of(lane: usize, data_socket: u16) -> u16 {
    match lane {
        0 => data_socket,
        lane => (lane - 1) as u16 % data_socket.max(1),
    }
}

/// A locked lane: its sealing half while there is a session and packets leave, else its state.
pub struct Session<'t> {
    tunnel: &'t Tunnel,
    peer: PeerIndex,
    number: usize,
    lane: &'t Lane,
    sealing: Option<MutexGuard<'t, Option<Sealing>>>,
    state: Option<MutexGuard<'t, State>>,
}

/// What became of a received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// An inner packet of so many bytes, behind the first [`INNER_AT`](super::INNER_AT).
    Packet(usize),
    /// It was for the tunnel itself.
    Consumed,
}

impl<'t> Session<'t> {
    /// Locked for who receives, or sees after it.
    pub(super) fn inward(tunnel: &'t Tunnel, peer: PeerIndex, number: usize, lane: &'t Lane) -> Self {
        Session { tunnel, peer, number, lane, sealing: None, state: Some(lane.state()) }
    }

    /// Locked for who sends.
    #[inline]
    pub(super) fn outward(tunnel: &'t Tunnel, peer: PeerIndex, number: usize, lane: &'t Lane) -> Self {
        let mut sealing = lane.sealing();
        if sealing.is_some() {
            return Session { tunnel, peer, number, lane, sealing: Some(sealing), state: None };
        }
        std::mem::drop(sealing);
        let state = lane.state();
        // under this lock no session begins or ends
        sealing = lane.sealing();
        if sealing.is_some() {
            return Session { tunnel, peer, number, lane, sealing: Some(sealing), state: None };
        }
        Session { tunnel, peer, number, lane, sealing: None, state: Some(state) }
    }
}

impl<'t> Session<'t> {
    /// To whom.
    pub fn peer(&self) -> PeerIndex {
        self.peer
    }

    /// Which lane it is, and of which tunnel.
    pub fn is(&self, slot: u32, lane: usize) -> bool {
        (self.tunnel.slot(), self.number) == (slot, lane)
    }

    /// Whether there is a session.
    #[inline]
    pub fn is_up(&self) -> bool {
        self.sealing.is_some() || self.lane.is_up()
    }

    /// Which of a worker's sending sockets carries this lane.
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
        self.seal_with(packet.len(), out, |out| {
            out.extend_from_slice(packet);
            Some(())
        })
    }

    /// The same for a packet of `len` bytes that `write` appends.
    #[inline]
    pub fn seal_with(
        &mut self,
        len: usize,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>) -> Option<()>,
    ) -> Option<usize> {
        let sealed = match &mut self.sealing {
            Some(sealing) => sealing.as_mut()?.seal(len, out, write)?,
            None => self.lane.sealing().as_mut()?.seal(len, out, write)?,
        };
        self.lane.signs.sealed(len > 0);
        Some(sealed)
    }

    fn state(&mut self) -> &mut State {
        // never both, in this order
        self.sealing = None;
        let lane = self.lane;
        self.state.get_or_insert_with(|| lane.state())
    }

    /// Whether so many packets of so many bytes in all can wait for a session.
    pub fn can_hold(&mut self, packets: usize, bytes: usize) -> bool {
        self.state().can_hold(packets, bytes)
    }

    /// Keeps a packet until there is a session.
    pub fn hold(&mut self, packet: &[u8], tos: u8, now_ms: u64) {
        self.state().hold(packet, tos, now_ms);
    }

    /// Starts a handshake, unless one is under way.
    pub fn start(&mut self, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        let somebody = !self.state().held.is_empty();
        self.start_for(somebody, now_ms, data_socket, outbox);
    }

    pub(super) fn start_for(&mut self, somebody: bool, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        // not all peers of a node in the same millisecond
        let spread = u64::from(self.tunnel.slot() % 128);
        let (to, socket, wall_ms) = (self.endpoint(), self.socket(data_socket), self.tunnel.identity().wall_ms(now_ms));
        if !self.state().asks(somebody, spread, now_ms) {
            return;
        }
        if let Some((machine, ends)) = self.machine(now_ms)
            && let Some(message) = machine.initiate(ends, wall_ms, now_ms)
        {
            outbox.post(message.as_bytes(), to, socket);
        }
    }

    fn own(&self) -> Option<&'t Own> {
        self.tunnel.identity().lanes.get(self.number)
    }

    /// What does the protocol, and for whom. `None` where the peer's key is none.
    fn machine(&mut self, now_ms: u64) -> Option<(&mut Machine, Ends<'t>)> {
        let (own, theirs) = (self.own()?, self.tunnel.keys().get(self.number)?);
        let base = self.tunnel.slot() << 12 | (self.number as u32) << 8;
        let ends = Ends { own: &own.keys, theirs, preshared: self.tunnel.preshared() };
        let state = self.state();
        if state.machine.is_none() {
            state.machine = Machine::new(ends.own, theirs, base, now_ms).map(Box::new);
        }
        state.machine.as_deref_mut().map(|machine| (machine, ends))
    }

    /// Opens a received message where it lies. Its answers go into the outbox; the peer is answered at `source` from now
    /// on, once the message has proved to be the peer's.
    #[inline]
    pub fn open(
        &mut self,
        index: u32,
        message: &mut [u8],
        source: SocketAddr,
        now_ms: u64,
        data_socket: u16,
        outbox: &mut Outbox,
    ) -> Result<Opened, Drop> {
        match message.first() {
            Some(&DATA) => self.open_data(index, message, source, now_ms, data_socket, outbox),
            Some(&RESPONSE) => self.finish(message, source, now_ms, data_socket, outbox),
            Some(&COOKIE) => {
                let (machine, _) = self.machine(now_ms).ok_or(Drop::HandshakeRefused)?;
                machine.take_cookie(message, now_ms).map_err(|_| Drop::HandshakeRefused)?;
                Ok(Opened::Consumed)
            }
            Some(&INITIATION) => Err(Drop::HandshakeRefused), // `answer` takes them
            _ => Err(Drop::WireguardMalformed),
        }
    }

    #[inline]
    fn open_data(
        &mut self,
        index: u32,
        message: &mut [u8],
        source: SocketAddr,
        now_ms: u64,
        data_socket: u16,
        outbox: &mut Outbox,
    ) -> Result<Opened, Drop> {
        let machine = self.state().machine.as_deref_mut().ok_or(Drop::WireguardUnknownSession)?;
        let opened = machine.open(index, message, now_ms).ok_or(Drop::WireguardUnknownSession)?;
        let (len, begun) = opened.map_err(|unopened| match unopened {
            Unopened::Malformed => Drop::WireguardMalformed,
            Unopened::Replayed => Drop::WireguardReplayed,
            Unopened::NotAuthentic => Drop::WireguardNotAuthentic,
        })?;
        let last_call = len > 0 && machine.is_last_call(now_ms);
        self.lane.signs.opened(len > 0);
        self.heard_from(source);
        if last_call {
            self.state().wanted = true;
        }
        if let Some(sealing) = begun {
            self.begin(sealing, data_socket, outbox);
        }
        Ok(if len > 0 { Opened::Packet(len) } else { Opened::Consumed })
    }

    #[cold]
    fn finish(
        &mut self,
        message: &[u8],
        source: SocketAddr,
        now_ms: u64,
        data_socket: u16,
        outbox: &mut Outbox,
    ) -> Result<Opened, Drop> {
        let own = self.own().ok_or(Drop::HandshakeRefused)?;
        let (to, socket) = (self.endpoint(), self.socket(data_socket));
        let (machine, ends) = self.machine(now_ms).ok_or(Drop::HandshakeRefused)?;
        if !machine.awaits(message) || !own.guard.is_addressed(message) {
            return Err(Drop::HandshakeRefused);
        }
        let sender = message.get(4..8).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or_default();
        match own.guard.admit(message, u32::from_le_bytes(sender), source, now_ms) {
            Admission::Granted | Admission::Proved => {}
            Admission::Cookie(reply) => {
                outbox.post(&reply, source, socket);
                return Ok(Opened::Consumed); // whose it was is not proved
            }
            Admission::Refused => return Err(Drop::HandshakeRefused),
        }
        let sealing = machine.finish(ends, message, now_ms).map_err(|untaken| {
            if untaken == Untaken::NotThisPreshared {
                self.tunnel.answered_wrongly();
            }
            Drop::HandshakeRefused
        })?;
        self.tunnel.answered_rightly();
        self.lane.signs.opened(false);
        self.heard_from(source);
        let held = !self.state().held.is_empty();
        self.begin(sealing, data_socket, outbox);
        if !held {
            // the first message of a session tells the peer that it may use it
            self.keepalive(if self.number == 0 { source } else { to }, data_socket, outbox);
        }
        Ok(Opened::Consumed)
    }

    /// Answers an initiation.
    #[cold]
    pub fn answer(
        &mut self,
        heard: Heard,
        source: SocketAddr,
        now_ms: u64,
        data_socket: u16,
        outbox: &mut Outbox,
    ) -> Result<(), Drop> {
        let (to, socket) = (self.endpoint(), self.socket(data_socket));
        let (machine, ends) = self.machine(now_ms).ok_or(Drop::HandshakeRefused)?;
        match machine.answer(ends, heard, now_ms) {
            // where the peer is this does not prove: the initiation may be of before our restart, and sent again
            Ok(message) => outbox.post(message.as_bytes(), if self.number == 0 { source } else { to }, socket),
            Err(Untaken::Replayed) => {
                // authentic, but older than one that we took: replayed, or the peer's clock was set back
                self.state().nudge(now_ms);
                return Err(Drop::HandshakeReplayed);
            }
            Err(_) => return Err(Drop::HandshakeRefused),
        }
        Ok(())
    }

    /// The peer is there: it has proved it.
    #[inline]
    fn heard_from(&self, source: SocketAddr) {
        if self.number == 0 && self.endpoint() != source {
            self.tunnel.set_endpoint(source);
        }
    }

    /// Uses a session from now on, and sends what waited for it.
    fn begin(&mut self, sealing: Sealing, data_socket: u16, outbox: &mut Outbox) {
        let (to, socket, peer) = (self.endpoint(), self.socket(data_socket), self.peer);
        *self.lane.sealing() = Some(sealing);
        let state = self.state();
        state.wanted = false;
        state.tries = 0;
        state.tried_ms = None;
        while let Some(held) = self.state().unhold() {
            let (at, inner) = (outbox.slab.len(), held.packet.len() as u32);
            match self.seal(&held.packet, &mut outbox.slab) {
                Some(len) => {
                    let waited = Some((peer, inner));
                    outbox.letters.push(Letter { at, len, to, socket, tos: held.tos & ECN, waited });
                }
                None => outbox.expire(&held),
            }
        }
        self.lane.set_up(true);
    }

    fn keepalive(&mut self, to: SocketAddr, data_socket: u16, outbox: &mut Outbox) {
        let (at, socket) = (outbox.slab.len(), self.socket(data_socket));
        if let Some(len) = self.seal(&[], &mut outbox.slab) {
            outbox.letters.push(Letter { at, len, to, socket, tos: 0, waited: None });
        }
    }

    pub(super) fn tick(&mut self, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        let tunnel = self.tunnel;
        self.state().ticked_ms = now_ms;
        self.tick_machine(now_ms, data_socket, outbox);
        let (up, policy) = (self.lane.is_up(), tunnel.policy());
        let state = self.state();
        if policy == Policy::Willing && !up && state.tries >= WILLING_TRIES && state.held.is_empty() {
            (state.wanted, state.tries) = (false, 0);
        }
        state.wanted |= tunnel.keepalive().is_some() && policy != Policy::Willing && !up;
        if state.wanted || (!state.held.is_empty() && !up) {
            self.start(now_ms, data_socket, outbox);
        }
        let state = self.state();
        while let Some(held) = state.expired(now_ms) {
            outbox.expire(&held);
        }
    }

    fn tick_machine(&mut self, now_ms: u64, data_socket: u16, outbox: &mut Outbox) {
        let keepalive = self.tunnel.keepalive().filter(|_| self.number == 0);
        let worn = self.lane.sealing().as_ref().is_some_and(Sealing::is_worn);
        let signs = self.lane.signs.take(worn);
        let Some(machine) = self.state.as_mut().and_then(|state| state.machine.as_deref_mut()) else { return };
        let due = machine.tick(signs, keepalive, now_ms);
        if due.ended {
            *self.lane.sealing() = None;
            self.lane.set_up(false);
        }
        if due.session {
            self.state().wanted = true;
        }
        if due.keepalive {
            self.keepalive(self.endpoint(), data_socket, outbox);
        }
    }
}
