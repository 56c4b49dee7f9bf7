//! This node's keys, and what each handshake message meets first: is it for one of them, and is there time for it?

use std::fmt;
use std::net::SocketAddr;

use x25519_dalek::StaticSecret;
use zerocopy::FromBytes;

use super::cookie::{Admission, Guard};
use super::message::Initiation;
use super::noise::{self, Heard, KeyPair};
use super::{Outbox, SourceLimit};
use crate::engine::drop::Drop;
use crate::key::{MAX_LANES, PublicKey, SecretKey};

/// This node's keys, one a lane.
pub struct Identity {
    pub(super) lanes: Vec<Own>,
    epoch_ms: u64,
}

pub(super) struct Own {
    pub(super) keys: KeyPair,
    pub(super) guard: Guard,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.public_key()).finish()
    }
}

/// Who sent an initiation, and on which of our lanes; or what to do instead.
pub enum Initiator {
    /// Who it says it is, on this lane. The tunnel finds out whether that is true.
    Heard(Heard, usize),
    /// The sender has to prove its address first: the answer was put into the outbox.
    Cookie,
}

impl Identity {
    /// An identity with so many lanes, at least one and at most [`MAX_LANES`].
    pub fn new(key: &SecretKey, lanes: usize) -> Self {
        let own = |lane| {
            let secret: StaticSecret = key.lane(lane).secret().clone();
            let public = key.lane(lane).public();
            Own { guard: Guard::new(&public), keys: KeyPair { secret, public } }
        };
        Identity { lanes: (0..lanes.clamp(1, MAX_LANES) as u8).map(own).collect(), epoch_ms: 0 }
    }

    /// The same whose initiations carry the time: `epoch_ms` is the start in milliseconds since 1970, and later than
    /// any initiation of an earlier run. Without it stamps begin in 1970.
    pub fn started_at(self, epoch_ms: u64) -> Self {
        Identity { epoch_ms, ..self }
    }

    /// Milliseconds since 1970, about.
    pub(super) fn wall_ms(&self, now_ms: u64) -> u64 {
        self.epoch_ms.saturating_add(now_ms)
    }

    /// The node's public key.
    pub fn public_key(&self) -> Option<PublicKey> {
        self.lanes.first().map(|own| own.keys.public)
    }

    /// The public key of each lane.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.lanes.iter().map(|own| own.keys.public).collect()
    }

    /// To be called each second: forgets how many handshake messages there were.
    pub fn second_passed(&self) {
        self.lanes.iter().for_each(|own| own.guard.second_passed());
    }

    /// Finds out who sent an initiation. Costs a Diffie-Hellman computation: of these there are few a second, or else only for
    /// senders that have proved their address, each within its limit.
    pub fn initiator(
        &self,
        datagram: &[u8],
        source: SocketAddr,
        limit: &mut SourceLimit,
        now_ms: u64,
        data_socket: u16,
        outbox: &mut Outbox,
    ) -> Result<Initiator, Drop> {
        let message = Initiation::ref_from_bytes(datagram).map_err(|_| Drop::WireguardMalformed)?;
        let ip = source.ip();
        if message.mac2 == [0; 16] && limit.is_spent(ip, now_ms) {
            return Err(Drop::HandshakeLimited); // and costs next to nothing
        }
        let ours = self.lanes.iter().enumerate().find(|(_, own)| own.guard.is_addressed(datagram));
        let (lane, own) = ours.ok_or(Drop::HandshakeRefused)?;
        match own.guard.admit(datagram, message.sender.get(), source, now_ms) {
            Admission::Granted => {}
            Admission::Proved if limit.allows(ip, now_ms) => {}
            Admission::Proved => return Err(Drop::HandshakeLimited),
            Admission::Cookie(reply) => {
                limit.cookie(ip, now_ms);
                outbox.post(&reply, source, data_socket);
                return Ok(Initiator::Cookie);
            }
            Admission::Refused => return Err(Drop::HandshakeRefused),
        }
        let heard = noise::receive(&own.keys, message).map_err(|_| Drop::HandshakeRefused)?;
        Ok(Initiator::Heard(heard, lane))
    }
}

impl Heard {
    /// Whose initiation it says it is.
    pub fn key(&self) -> PublicKey {
        self.key
    }
}
