//! What tunnels want sent, until the outbound half takes it over: datagrams in one slab, each with its way.
//!
//! Knows nothing of what they mean, and no socket.

use std::net::SocketAddr;

use super::lane::Held;
use crate::engine::tables::PeerIndex;

/// What tunnels want sent: handshakes, answers, keepalives, and packets that have waited for a session.
#[derive(Debug, Default)]
pub struct Outbox {
    pub(super) slab: Vec<u8>,
    pub(super) letters: Vec<Letter>,
    pub(super) expired: (u64, u64),
}

/// One datagram of an [`Outbox`].
#[derive(Debug, Clone, Copy)]
pub struct Letter {
    pub(super) at: usize,
    pub(super) len: usize,
    /// Where to.
    pub to: SocketAddr,
    /// Through which of the worker's sockets.
    pub socket: u16,
    /// Outer TOS.
    pub tos: u8,
    /// For a packet that has waited: its peer, and how many bytes the inner packet has.
    pub waited: Option<(PeerIndex, u32)>,
}

impl Outbox {
    /// How many datagrams there are.
    pub fn len(&self) -> usize {
        self.letters.len()
    }

    /// Whether there is nothing in it, and nothing to count.
    pub fn is_empty(&self) -> bool {
        self.letters.is_empty() && self.expired == (0, 0)
    }

    /// The datagrams.
    pub fn letters(&self) -> impl Iterator<Item = (&Letter, &[u8])> {
        self.letters.iter().filter_map(|letter| Some((letter, self.slab.get(letter.at..letter.at + letter.len)?)))
    }

    /// Packets that waited too long, and their bytes.
    pub fn expired(&self) -> (u64, u64) {
        self.expired
    }

    /// Empties it; memory is kept.
    pub fn clear(&mut self) {
        self.slab.clear();
        self.letters.clear();
        self.expired = (0, 0);
    }

    pub(super) fn expire(&mut self, held: &Held) {
        self.expired.0 += 1;
        self.expired.1 += held.packet.len() as u64;
    }

    pub(super) fn post(&mut self, message: &[u8], to: SocketAddr, socket: u16) {
        self.originate(message, to, socket, 0);
    }

    /// Adds a datagram of this node's own.
    pub fn originate(&mut self, message: &[u8], to: SocketAddr, socket: u16, tos: u8) {
        let at = self.slab.len();
        self.slab.extend_from_slice(message);
        self.letters.push(Letter { at, len: message.len(), to, socket, tos, waited: None });
    }
}
