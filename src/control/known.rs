//! What outlives a node list: the counters of each peer, its tunnel with the sessions in it, and its liveness.
//!
//! A new list changes a peer; it does not make another one. Decides what becomes of a tunnel when a peer's key, endpoint or
//! encryption changes. Pure: knows no list's origin.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::engine::stats::PeerStats;
use crate::engine::tunnel::{Identity, MAX_SLOTS, Policy, Tunnel};
use crate::health::peer::{Liveness, Settings};
use crate::key::{PresharedKey, PublicKey};
use crate::node::NodeName;
use crate::wire::bfd::auth::Keys;

/// The peers that there were in the last list.
#[derive(Debug)]
pub struct Known {
    threads: usize,
    identity: Option<Arc<Identity>>,
    /// The keys before the last change, while a peer may still use them.
    former_identity: Option<Arc<Identity>>,
    /// How peers' lives are watched; nobody does without.
    bfd: Option<Settings>,
    bfd_keys: Option<Arc<Keys>>,
    /// The next session's.
    discriminator: u32,
    peers: HashMap<NodeName, Peer>,
    free_slots: Vec<u32>,
    slots: u32,
    /// How often [`Known::retire`] has been called.
    age: u32,
}

#[derive(Debug)]
struct Peer {
    stats: Arc<PeerStats>,
    tunnel: Option<Arc<Tunnel>>,
    former: Option<Former>,
    liveness: Option<Arc<Liveness>>,
    endpoint: SocketAddr,
    /// The last list wanted it encrypted, whatever has become of the tunnel since.
    encrypted: bool,
}

/// The tunnel that a change of keys has replaced, and the age at which that was.
#[derive(Debug, Clone)]
struct Former {
    tunnel: Arc<Tunnel>,
    since: u32,
}

/// How the engine reaches a peer.
#[derive(Debug, Clone)]
pub struct Reach {
    /// Its counters.
    pub stats: Arc<PeerStats>,
    /// Its tunnel, if it has a key.
    pub tunnel: Option<Arc<Tunnel>>,
    /// After a change of keys, on either side, the tunnel before: it is used until the new one has a session.
    pub former: Option<Arc<Tunnel>>,
}

/// Calls of [`Known::retire`], one a second, after which what a change of keys has replaced is forgotten.
const FORMER_LASTS: u32 = 60;

/// What a list says of a peer's encryption.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'l> {
    /// The peer's public keys, one a lane; none if it has none.
    pub keys: &'l [PublicKey],
    /// Packets to and from it are to be encrypted.
    pub encrypted: bool,
    /// Seconds between packets that keep a NAT's mapping.
    pub keepalive: Option<u16>,
    /// A key that both ends know besides.
    pub preshared: Option<&'l PresharedKey>,
}

impl Known {
    /// Nobody yet. Counters are made for so many threads; without an identity there are no tunnels.
    pub fn new(threads: usize, identity: Option<Arc<Identity>>) -> Self {
        Known {
            threads,
            identity,
            former_identity: None,
            bfd: None,
            bfd_keys: None,
            discriminator: 0,
            peers: HashMap::new(),
            free_slots: Vec::new(),
            slots: 0,
            age: 0,
        }
    }

    /// The same where peers' lives are watched. `first` is the first session's discriminator: a former run's should be
    /// others, and nobody should guess them (RFC 5880 §6.8.1).
    pub fn watching(self, bfd: Settings, first: u32) -> Self {
        Known { bfd: Some(bfd), discriminator: first, ..self }
    }

    /// The liveness of a peer, as far as it is known. `neighbour`: it is watched without traffic too.
    pub fn liveness(&mut self, name: &NodeName, neighbour: bool) -> Option<Arc<Liveness>> {
        let (bfd, peer) = (self.bfd?, self.peers.get_mut(name)?);
        let discriminator = &mut self.discriminator;
        let liveness = peer.liveness.get_or_insert_with(|| {
            *discriminator = discriminator.wrapping_add(1).max(1);
            Arc::new(Liveness::new(bfd, *discriminator))
        });
        liveness.set_neighbour(neighbour);
        Some(liveness.clone())
    }

    /// What BFD packets in the clear are authenticated by.
    pub fn bfd_keys(&self) -> Option<&Arc<Keys>> {
        self.bfd_keys.as_ref()
    }

    /// Perhaps others than before: sessions go on with them.
    pub fn set_bfd_keys(&mut self, keys: Option<Arc<Keys>>) {
        self.bfd_keys = keys;
    }

    /// This node's keys.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        self.identity.as_ref()
    }

    /// The keys before the last change, while a peer may still use them.
    pub fn former_identity(&self) -> Option<&Arc<Identity>> {
        self.former_identity.as_ref()
    }

    /// This node's keys, perhaps others than before: then sessions of the former go on until those of the new ones are
    /// there. Returns whether they are others.
    pub fn set_identity(&mut self, identity: Option<Arc<Identity>>) -> bool {
        let keys = |identity: &Option<Arc<Identity>>| identity.as_ref().map(|identity| identity.public_keys());
        let others = keys(&identity) != keys(&self.identity);
        if others {
            self.former_identity = std::mem::replace(&mut self.identity, identity);
        }
        others
    }

    /// To be called each second: forgets what a change of keys replaced a minute ago. Returns whether the peer table has to
    /// be made anew.
    pub fn retire(&mut self) -> bool {
        self.age = self.age.wrapping_add(1);
        let (age, free) = (self.age, &mut self.free_slots);
        let mut some_went = false;
        for peer in self.peers.values_mut() {
            if let Some(former) = peer.former.take_if(|former| age.wrapping_sub(former.since) >= FORMER_LASTS) {
                free.push(former.tunnel.slot());
                some_went = true;
            }
        }
        if some_went && self.peers.values().all(|peer| peer.former.is_none()) {
            self.former_identity = None;
        }
        some_went
    }

    /// How many peers there are.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// How a peer is reached: the former counters, and the former tunnel where it fits.
    pub fn peer(&mut self, name: &NodeName, endpoint: SocketAddr, wish: Wish<'_>) -> Reach {
        let peer = match self.peers.remove(name) {
            Some(peer) => self.changed(peer, endpoint, wish),
            None => {
                let tunnel = self.make(endpoint, wish, Policy::Required);
                Peer {
                    stats: Arc::new(PeerStats::new(self.threads)),
                    tunnel,
                    former: None,
                    liveness: None,
                    endpoint,
                    encrypted: wish.encrypted,
                }
            }
        };
        let Peer { stats, tunnel, former, .. } = &peer;
        let former = former.as_ref().map(|former| former.tunnel.clone());
        let reach = Reach { stats: stats.clone(), tunnel: tunnel.clone(), former };
        self.peers.insert(name.clone(), peer);
        reach
    }

    /// Forgets the peers for which `stays` is false.
    pub fn retain(&mut self, stays: impl Fn(&NodeName) -> bool) {
        let free = &mut self.free_slots;
        self.peers.retain(|name, peer| {
            let stays = stays(name);
            if !stays {
                free.extend(peer.tunnel.as_ref().map(|tunnel| tunnel.slot()));
                free.extend(peer.former.as_ref().map(|former| former.tunnel.slot()));
            }
            stays
        });
    }

    fn changed(&mut self, peer: Peer, endpoint: SocketAddr, wish: Wish<'_>) -> Peer {
        let Peer { stats, tunnel, mut former, liveness, endpoint: listed, encrypted: was_encrypted } = peer;
        let moved = listed != endpoint;
        let same = |tunnel: &Tunnel, identity: &Arc<Identity>| {
            tunnel.is_between(identity, wish.keys, wish.keepalive, wish.preshared)
        };
        let tunnel = match tunnel {
            Some(tunnel)
                if self.identity.as_ref().is_some_and(|identity| same(&tunnel, identity))
                    && (wish.encrypted || tunnel.policy() == Policy::Willing) =>
            {
                // where it was heard stays, unless the list says something new
                if moved {
                    tunnel.set_endpoint(endpoint);
                }
                if wish.encrypted && tunnel.policy() == Policy::Willing {
                    tunnel.set_policy(Policy::Migrating);
                }
                Some(tunnel)
            }
            Some(before) => {
                // where it was heard last is where the new handshake has the best chances
                let heard = if moved { endpoint } else { before.endpoint() };
                let new = self.make(heard, wish, Policy::Required);
                let replaces = |new: &Arc<Tunnel>| new.policy() == Policy::Required && before.seals();
                let outlived = match new.as_ref().is_some_and(replaces) {
                    true => former.replace(Former { tunnel: before, since: self.age }).map(|former| former.tunnel),
                    false => Some(before),
                };
                self.free_slots.extend(outlived.map(|tunnel| tunnel.slot()));
                new
            }
            // what went in clear until now goes on until the first handshake
            None if !was_encrypted => self.make(endpoint, wish, Policy::Migrating),
            None => self.make(endpoint, wish, Policy::Required),
        };
        if tunnel.as_ref().is_none_or(|tunnel| tunnel.policy() != Policy::Required) {
            self.free_slots.extend(former.take().map(|former| former.tunnel.slot()));
        }
        Peer { stats, tunnel, former, liveness, endpoint, encrypted: wish.encrypted }
    }

    fn make(&mut self, endpoint: SocketAddr, wish: Wish<'_>, encrypted: Policy) -> Option<Arc<Tunnel>> {
        let identity = self.identity.clone().filter(|_| !wish.keys.is_empty())?;
        let slot = self.free_slots.pop().or_else(|| {
            let slot = Some(self.slots).filter(|slot| *slot < MAX_SLOTS)?;
            self.slots += 1;
            Some(slot)
        })?;
        let policy = if wish.encrypted { encrypted } else { Policy::Willing };
        let tunnel = Tunnel::new(slot, identity, wish.keys, endpoint, wish.keepalive, policy);
        Some(Arc::new(tunnel.with_preshared(wish.preshared.cloned())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::key::SecretKey;

    fn known() -> Known {
        Known::new(1, Some(Arc::new(Identity::new(&SecretKey::generate().unwrap(), 2))))
    }

    fn key() -> PublicKey {
        SecretKey::generate().unwrap().public()
    }

    fn reach(known: &mut Known, keys: &[PublicKey], encrypted: bool) -> Reach {
        let wish = Wish { keys, encrypted, keepalive: None, preshared: None };
        known.peer(&"b".parse().unwrap(), "10.9.0.2:8472".parse().unwrap(), wish)
    }

    fn get(known: &mut Known, keys: &[PublicKey], encrypted: bool) -> Option<Arc<Tunnel>> {
        reach(known, keys, encrypted).tunnel
    }

    #[test]
    fn a_peer_that_is_new_is_encrypted_from_its_first_packet() {
        let (mut known, key) = (known(), key());
        assert_eq!(get(&mut known, &[key], true).unwrap().policy(), Policy::Required);
        let again = get(&mut known, &[key], true).unwrap();
        assert_eq!(again.policy(), Policy::Required);
    }

    #[test]
    fn a_peer_that_was_clear_migrates_whether_it_had_a_key_or_not() {
        let key = key();
        for keys_before in [vec![], vec![key]] {
            let mut known = known();
            let before = get(&mut known, &keys_before, false);
            assert!(before.is_none_or(|tunnel| tunnel.policy() == Policy::Willing));
            assert_eq!(get(&mut known, &[key], true).unwrap().policy(), Policy::Migrating);
            assert_eq!(get(&mut known, &[key], true).unwrap().policy(), Policy::Migrating, "and goes on doing so");
        }
    }

    #[test]
    fn another_key_is_another_tunnel_and_never_clear() {
        let mut known = known();
        let first = get(&mut known, &[key()], true).unwrap();
        let second = get(&mut known, &[key()], true).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(second.policy(), Policy::Required);
    }

    #[test]
    fn after_a_change_of_keys_the_former_tunnel_serves_for_a_minute() {
        let (mut known, key) = (known(), key());
        let first = get(&mut known, &[key], true).unwrap();
        // of ours
        known.set_identity(Some(Arc::new(Identity::new(&SecretKey::generate().unwrap(), 2))));
        let after = reach(&mut known, &[key], true);
        assert!(Arc::ptr_eq(after.former.as_ref().unwrap(), &first) && known.former_identity().is_some());
        let second = after.tunnel.unwrap();
        assert!(!Arc::ptr_eq(&first, &second) && second.slot() != first.slot());
        assert_eq!(second.policy(), Policy::Required);
        // of the peer's, before the minute is over
        let after = reach(&mut known, &[self::key()], true);
        assert!(Arc::ptr_eq(after.former.as_ref().unwrap(), &second), "one is enough");
        let gone: Vec<bool> = (0..FORMER_LASTS).map(|_| known.retire()).collect();
        assert_eq!(gone.iter().filter(|gone| **gone).count(), 1);
        assert!(known.former_identity().is_none());
        let last = reach(&mut known, after.tunnel.as_ref().unwrap().keys(), true);
        assert!(last.former.is_none() && Arc::ptr_eq(&last.tunnel.unwrap(), &after.tunnel.unwrap()));
    }

    #[test]
    fn another_key_of_our_own_is_never_clear() {
        let (mut known, key) = (known(), key());
        let first = get(&mut known, &[key], true).unwrap();
        known.set_identity(Some(Arc::new(Identity::new(&SecretKey::generate().unwrap(), 2))));
        let second = get(&mut known, &[key], true).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(second.policy(), Policy::Required, "what was encrypted does not go in clear meanwhile");
    }

    #[test]
    fn what_had_to_be_encrypted_and_could_not_is_not_clear_later() {
        // no tunnel for want of a key of our own: nothing went, and nothing goes before the handshake
        let mut known = Known::new(1, None);
        let key = key();
        assert!(get(&mut known, &[key], true).is_none());
        known.set_identity(Some(Arc::new(Identity::new(&SecretKey::generate().unwrap(), 2))));
        assert_eq!(get(&mut known, &[key], true).unwrap().policy(), Policy::Required);
    }

    #[test]
    fn a_peer_that_is_gone_is_forgotten() {
        let mut known = known();
        let first = get(&mut known, &[key()], true).unwrap();
        known.retain(|_| false);
        assert!(known.is_empty());
        let second = get(&mut known, &[key()], true).unwrap();
        assert_eq!((first.slot(), known.len()), (second.slot(), 1));
    }

    #[test]
    fn a_roamed_peer_stays_where_it_is_until_the_list_says_another_place() {
        let (mut known, key, name) = (known(), key(), "b".parse().unwrap());
        let at = |known: &mut Known, endpoint: &str| {
            let wish = Wish { keys: &[key], encrypted: true, keepalive: None, preshared: None };
            known.peer(&name, endpoint.parse().unwrap(), wish).tunnel.unwrap()
        };
        let tunnel = at(&mut known, "10.9.0.2:8472");
        tunnel.set_endpoint("192.0.2.7:999".parse().unwrap());
        assert_eq!(at(&mut known, "10.9.0.2:8472").endpoint(), "192.0.2.7:999".parse().unwrap());
        assert_eq!(at(&mut known, "10.9.0.3:8472").endpoint(), "10.9.0.3:8472".parse().unwrap());
    }

    #[test]
    fn without_a_key_of_our_own_there_is_no_tunnel() {
        let mut known = Known::new(1, None);
        assert!(get(&mut known, &[key()], false).is_none());
    }
}
