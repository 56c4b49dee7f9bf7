//! Where TCP connections end: at a socket of this node, or elsewhere, where the firewall sends on what comes for this node.
//! Only the kernel knows, so it is asked; somebody would have to cut again what is too long for the way on.

use std::net::SocketAddr;

use super::Offer;
use crate::engine::classify;
use crate::wire::ip::Packet;

/// Flows of which it is known; a collision costs a question.
const SLOTS: usize = 256;
/// For how long an answer is believed.
const KNOWN_US: u64 = 10_000_000;
/// At most one question in so long: flows whose hashes collide would ask in turn, each batch.
const QUESTION_EACH_US: u64 = 2_000;

/// What is known of flows, by their hash.
#[derive(Debug)]
pub(super) struct Ends {
    slots: Box<[End; SLOTS]>,
    /// The hash of a flow that is to be asked for, the peer's end of it and ours.
    question: Option<(u32, (SocketAddr, SocketAddr))>,
    /// Before that nothing is asked.
    asks_from_us: u64,
    now_us: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct End {
    hash: u32,
    here: bool,
    until_us: u64,
}

impl Default for Ends {
    fn default() -> Self {
        Ends { slots: Box::new([End::default(); SLOTS]), question: None, asks_from_us: 0, now_us: 0 }
    }
}

impl Ends {
    /// The time.
    pub(super) fn set_now(&mut self, now_us: u64) {
        self.now_us = now_us;
    }

    /// Whether the flow is known to end at a socket of this node.
    #[inline]
    pub(super) fn is_here(&self, hash: u32) -> bool {
        self.known(hash).unwrap_or(false)
    }

    /// That is wanted for the flow of this packet: asked next time, if it is not known.
    #[cold]
    pub(super) fn want(&mut self, offer: &Offer<'_>, bytes: &[u8], hash: u32) {
        if self.known(hash).is_some() || self.now_us < self.asks_from_us {
            return;
        }
        self.asks_from_us = self.now_us + QUESTION_EACH_US;
        let Packet { source, destination, .. } = *offer.packet;
        let Some([a, b, c, d]) = classify::ports(offer.packet, bytes) else { return };
        let port = |hi, lo| u16::from_be_bytes([hi, lo]);
        let ends = (SocketAddr::new(source, port(a, b)), SocketAddr::new(destination, port(c, d)));
        self.question = Some((hash, ends));
    }

    /// Asks `is_here` what is wanted, if anything: the peer's end and ours.
    #[inline]
    pub(super) fn ask(&mut self, is_here: impl FnOnce((SocketAddr, SocketAddr)) -> bool) {
        let Some((hash, ends)) = self.question.take() else { return };
        if let Some(slot) = self.slots.get_mut(hash as usize % SLOTS) {
            *slot = End { hash, here: is_here(ends), until_us: self.now_us + KNOWN_US };
        }
    }

    #[inline]
    fn known(&self, hash: u32) -> Option<bool> {
        let end = self.slots.get(hash as usize % SLOTS)?;
        (end.hash == hash && self.now_us < end.until_us).then_some(end.here)
    }
}
