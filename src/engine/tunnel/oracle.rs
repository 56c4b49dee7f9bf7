//! The same protocol in another's hands: each of our machines against boringtun, either side first.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;

use super::message::{COOKIE, RESPONSE};
use super::*;
use crate::engine::testing;
use crate::key::SecretKey;

const SLOT: u32 = 5;
const PEER: PeerIndex = PeerIndex(0);

fn theirs() -> SocketAddr {
    SocketAddr::from(([10, 9, 0, 2], 51820))
}

/// Our end and theirs.
struct Pair {
    identity: Arc<Identity>,
    ours: Tunnel,
    theirs: Tunn,
    now_ms: u64,
    outbox: Outbox,
    room: Vec<u8>,
    sent: u16,
}

/// What somebody says.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// A datagram for the other.
    Datagram(Vec<u8>),
    /// An inner packet.
    Packet(Vec<u8>),
    Nothing,
    Refused,
}

impl Pair {
    fn new(preshared: [Option<u8>; 2]) -> Self {
        Pair::guarded(preshared, 1_000)
    }

    /// Where boringtun asks for cookies after so many handshakes a second.
    fn guarded(preshared: [Option<u8>; 2], limit: u64) -> Self {
        let (a, b) = (testing::secret(1), testing::secret(2));
        let identity = Arc::new(Identity::new(&a, 1));
        let ours = Tunnel::new(SLOT, identity.clone(), &[b.public()], theirs(), None, Policy::Required);
        let key = |n: u8| testing::secret(n).to_base64().parse().unwrap();
        let ours = ours.with_preshared(preshared[0].map(key));
        let secret = |key: &SecretKey| x25519::StaticSecret::from(key.secret().to_bytes());
        let public = x25519::PublicKey::from(&secret(&b));
        let limiter = Some(Arc::new(RateLimiter::new(&public, limit)));
        let peer = x25519::PublicKey::from(a.public().0);
        let theirs = Tunn::new(secret(&b), peer, preshared[1].map(|n| [n; 32]), None, 9, limiter);
        Pair { identity, ours, theirs, now_ms: 0, outbox: Outbox::default(), room: vec![0; 70_000], sent: 0 }
    }

    fn packet(&mut self) -> Vec<u8> {
        self.sent += 1;
        let len = usize::from(self.sent) * 37 % 1_380;
        let facts = testing::Facts { ports: (self.sent, 7), ..testing::udp(false, 1, 2, testing::payload(len)) };
        facts.bytes()
    }

    /// What we have to say, in order.
    fn ours_say(&mut self) -> Vec<Vec<u8>> {
        let said = self.outbox.letters().map(|(_, bytes)| bytes.to_vec()).collect();
        self.outbox.clear();
        said
    }

    fn we_ask(&mut self) -> Vec<u8> {
        self.ours.lane(PEER, 0).start(self.now_ms, 1, &mut self.outbox);
        let mut said = self.ours_say();
        assert_eq!(said.len(), 1);
        said.remove(0)
    }

    fn they_ask(&mut self) -> Vec<u8> {
        match self.theirs.format_handshake_initiation(&mut self.room, true) {
            TunnResult::WriteToNetwork(bytes) => bytes.to_vec(),
            _ => panic!("no initiation"),
        }
    }

    fn they_take(&mut self, datagram: &[u8]) -> Said {
        let from = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
        match self.theirs.decapsulate(Some(from), datagram, &mut self.room) {
            TunnResult::WriteToNetwork(bytes) => Said::Datagram(bytes.to_vec()),
            TunnResult::WriteToTunnelV4(packet, _) => Said::Packet(packet.to_vec()),
            TunnResult::Done => Said::Nothing,
            _ => Said::Refused,
        }
    }

    fn we_take(&mut self, datagram: &[u8]) -> Said {
        let (mut bytes, now_ms) = (datagram.to_vec(), self.now_ms);
        let done = match kind(datagram) {
            Err(_) => return Said::Refused,
            Ok(Kind::Initiation) => {
                let found = self.identity.initiator(
                    datagram,
                    theirs(),
                    &mut SourceLimit::default(),
                    now_ms,
                    1,
                    &mut self.outbox,
                );
                match found {
                    Ok(Initiator::Heard(heard, 0)) => {
                        self.ours.lane(PEER, 0).answer(heard, theirs(), now_ms, 1, &mut self.outbox)
                    }
                    Ok(_) => Ok(()),
                    Err(reason) => Err(reason),
                }
            }
            Ok(Kind::For(index)) => {
                assert_eq!(index >> 8, SLOT << 4, "an index of ours");
                match self.ours.lane(PEER, 0).open(index, &mut bytes, theirs(), now_ms, 1, &mut self.outbox) {
                    Ok(Opened::Packet(len)) => return Said::Packet(bytes[INNER_AT..INNER_AT + len].to_vec()),
                    Ok(Opened::Consumed) => Ok(()),
                    Err(reason) => Err(reason),
                }
            }
        };
        match (done, self.ours_say().as_slice()) {
            (Err(_), _) => Said::Refused,
            (Ok(()), []) => Said::Nothing,
            (Ok(()), [one]) => Said::Datagram(one.clone()),
            (Ok(()), more) => panic!("{} answers", more.len()),
        }
    }

    /// A handshake that we began.
    fn finish_ours(&mut self, initiation: &[u8]) {
        let Said::Datagram(response) = self.they_take(initiation) else { panic!("no answer") };
        assert_eq!(response[0], RESPONSE);
        let Said::Datagram(first) = self.we_take(&response) else { panic!("not confirmed") };
        assert_eq!(self.they_take(&first), Said::Nothing, "an empty packet");
    }

    fn finish_theirs(&mut self, initiation: &[u8]) {
        let Said::Datagram(response) = self.we_take(initiation) else { panic!("no answer") };
        let Said::Datagram(first) = self.they_take(&response) else { panic!("not confirmed") };
        assert_eq!(self.we_take(&first), Said::Nothing);
    }

    fn exchange(&mut self, packets: usize) {
        for _ in 0..packets {
            let packet = self.packet();
            let mut sealed = Vec::new();
            self.ours.session(PEER, 0).seal(&packet, &mut sealed).unwrap();
            assert_eq!(self.they_take(&sealed), Said::Packet(packet.clone()));
            assert_eq!(self.they_take(&sealed), Said::Refused, "once");
            let sealed = match self.theirs.encapsulate(&packet, &mut self.room) {
                TunnResult::WriteToNetwork(bytes) => bytes.to_vec(),
                _ => panic!("not sealed"),
            };
            let mut forged = sealed.clone();
            let at = usize::from(self.sent) % forged.len();
            forged[at] ^= 1;
            if at >= 8 {
                assert_eq!(self.we_take(&forged), Said::Refused, "byte {at}");
            }
            assert_eq!(self.we_take(&sealed), Said::Packet(packet));
            assert_eq!(self.we_take(&sealed), Said::Refused, "once");
        }
    }
}

#[test]
fn either_asks_and_both_understand() {
    for preshared in [None, Some(77)] {
        let mut pair = Pair::new([preshared; 2]);
        let asked = pair.we_ask();
        pair.finish_ours(&asked);
        pair.exchange(50);
        let mut pair = Pair::new([preshared; 2]);
        let asked = pair.they_ask();
        pair.finish_theirs(&asked);
        pair.exchange(50);
    }
}

#[test]
fn sessions_follow_one_another_and_the_last_is_still_read() {
    let mut pair = Pair::new([None; 2]);
    let asked = pair.we_ask();
    pair.finish_ours(&asked);
    for round in 0..40 {
        pair.now_ms += 2_000;
        let (packet, mut late) = (pair.packet(), Vec::new());
        pair.ours.session(PEER, 0).seal(&packet, &mut late).unwrap();
        let theirs_late = match pair.theirs.encapsulate(&packet, &mut pair.room) {
            TunnResult::WriteToNetwork(bytes) => bytes.to_vec(),
            _ => panic!("not sealed"),
        };
        if round % 3 == 0 {
            let asked = pair.they_ask();
            pair.finish_theirs(&asked);
        } else {
            let asked = pair.we_ask();
            pair.finish_ours(&asked);
        }
        assert_eq!(pair.they_take(&late), Said::Packet(packet.clone()), "round {round}");
        assert_eq!(pair.we_take(&theirs_late), Said::Packet(packet), "round {round}");
        pair.exchange(3);
    }
}

#[test]
fn both_ask_at_once() {
    let mut pair = Pair::new([None; 2]);
    let (ours, theirs) = (pair.we_ask(), pair.they_ask());
    let Said::Datagram(to_us) = pair.they_take(&ours) else { panic!("no answer") };
    let Said::Datagram(to_them) = pair.we_take(&theirs) else { panic!("no answer") };
    if let Said::Datagram(first) = pair.we_take(&to_us) {
        pair.they_take(&first);
    }
    if let Said::Datagram(first) = pair.they_take(&to_them) {
        pair.we_take(&first);
    }
    pair.exchange(10);
}

#[test]
fn another_preshared_key_makes_no_session() {
    for preshared in [[Some(1), Some(2)], [None, Some(2)], [Some(1), None]] {
        let mut pair = Pair::new(preshared);
        let asked = pair.we_ask();
        let Said::Datagram(response) = pair.they_take(&asked) else { panic!("no answer") };
        assert_eq!(pair.we_take(&response), Said::Refused);
        assert!(!pair.ours.is_up(0));
        assert!(pair.ours.another_preshared_is_news() && !pair.ours.another_preshared_is_news(), "told once");
        let asked = pair.they_ask();
        let Said::Datagram(response) = pair.we_take(&asked) else { panic!("no answer") };
        assert_eq!(pair.they_take(&response), Said::Refused);
    }
}

#[test]
fn we_prove_our_address_where_they_ask_for_that() {
    let mut pair = Pair::guarded([None; 2], 0);
    let asked = pair.we_ask();
    let Said::Datagram(reply) = pair.they_take(&asked) else { panic!("no answer") };
    assert_eq!(reply[0], COOKIE);
    let mut forged = reply.clone();
    forged[40] ^= 1;
    assert_eq!(pair.we_take(&forged), Said::Refused);
    assert_eq!(pair.we_take(&reply), Said::Nothing);
    assert_eq!(pair.we_take(&reply), Said::Refused, "one for each message");
    pair.now_ms += 3_000;
    let asked = pair.we_ask();
    pair.finish_ours(&asked);
    pair.exchange(3);
}

#[test]
fn they_prove_theirs_where_we_do() {
    let mut pair = Pair::new([None; 2]);
    let asked = pair.they_ask();
    for _ in 0..300 {
        // many have asked in this second
        let mut limit = SourceLimit::default();
        pair.identity.initiator(&asked, theirs(), &mut limit, 0, 1, &mut Outbox::default()).ok();
    }
    let Said::Datagram(reply) = pair.we_take(&asked) else { panic!("no answer") };
    assert_eq!(reply[0], COOKIE);
    assert_eq!(pair.they_take(&reply), Said::Nothing);
    let again = pair.they_ask();
    pair.finish_theirs(&again);
    pair.exchange(3);
    // the same question from elsewhere proves nothing
    let third = pair.they_ask();
    let elsewhere = SocketAddr::from(([203, 0, 113, 9], 9));
    let mut outbox = Outbox::default();
    let answer = pair.identity.initiator(&third, elsewhere, &mut SourceLimit::default(), 0, 1, &mut outbox);
    assert!(matches!(answer, Ok(Initiator::Cookie)));
}
