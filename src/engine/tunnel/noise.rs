//! The handshake: `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s` as WireGuard uses it (whitepaper §5.4.1 to §5.4.5).
//!
//! One message each way. The initiator knows whom it asks; the responder learns by the first message who that is
//! ([`receive`]), and decides then whether to go on. Both end with the keys of a session ([`Transport`]). No time, no
//! counters, no codes against floods: those are `machine`'s and `cookie`'s.

use blake2::{Blake2s256, Digest};
use hmac::{KeyInit, Mac, SimpleHmac};
use ring::aead::Aad;
use x25519_dalek::{PublicKey as Point, SharedSecret, StaticSecret};
use zeroize::Zeroizing;

use super::aead::{key_of, nonce};
use super::message::{self, Initiation, Response};
use crate::key::PublicKey;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// A symmetric key. Wiped when it is dropped.
pub(super) type Key = Zeroizing<[u8; 32]>;

/// A TAI64N stamp as an initiation carries it. Compares as the times do.
pub(super) type Stamp = [u8; 12];

/// The message is not what it would have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused;

/// The keys of a session.
pub(super) struct Transport {
    pub(super) seal: Key,
    pub(super) open: Key,
}

/// A node's own key pair.
pub(super) struct KeyPair {
    pub(super) secret: StaticSecret,
    pub(super) public: PublicKey,
}

impl KeyPair {
    /// A key pair for one handshake; `None` where the system has no randomness.
    fn ephemeral() -> Option<Self> {
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *bytes).ok()?;
        let secret = StaticSecret::from(*bytes);
        Some(KeyPair { public: PublicKey(Point::from(&secret).to_bytes()), secret })
    }

    /// The secret shared with the owner of a public key; none with one that any secret would give the same with.
    pub(super) fn shared_with(&self, public: &PublicKey) -> Result<Key, Refused> {
        contributory(self.secret.diffie_hellman(&Point::from(public.0)))
    }
}

fn contributory(shared: SharedSecret) -> Result<Key, Refused> {
    if shared.was_contributory() { Ok(Zeroizing::new(shared.to_bytes())) } else { Err(Refused) }
}

/// What both sides have said so far, as Noise keeps it: a chaining key and a hash.
struct Transcript {
    chain: Key,
    hash: [u8; 32],
}

impl Transcript {
    fn new(responder: &PublicKey) -> Self {
        let chain = hash(&[CONSTRUCTION]);
        let hash = hash(&[&hash(&[&chain, IDENTIFIER]), &responder.0]);
        Transcript { chain: Zeroizing::new(chain), hash }
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.hash = hash(&[&self.hash, data]);
    }

    fn mix_key(&mut self, input: &[u8]) {
        let [chain] = derive(&self.chain, input);
        self.chain = chain;
    }

    /// The same, and a key for the next ciphertext.
    fn mix_secret(&mut self, input: &[u8]) -> Key {
        let [chain, key] = derive(&self.chain, input);
        self.chain = chain;
        key
    }

    /// The same with a preshared key, which goes into the hash as well.
    fn mix_preshared(&mut self, preshared: &[u8; 32]) -> Key {
        let [chain, known, key] = derive(&self.chain, preshared);
        self.chain = chain;
        self.mix_hash(&*known);
        key
    }

    fn mix_ephemeral(&mut self, public: &[u8; 32]) {
        self.mix_hash(public);
        self.mix_key(public);
    }

    /// Seals `N` bytes into `M` = `N` + 16.
    fn seal<const N: usize, const M: usize>(&mut self, key: &Key, mut text: [u8; N]) -> Option<[u8; M]> {
        let tag = key_of(key)?.seal_in_place_separate_tag(nonce(0), Aad::from(self.hash), &mut text).ok()?;
        let mut sealed = [0; M];
        for (to, from) in sealed.iter_mut().zip(text.iter().chain(tag.as_ref())) {
            *to = *from;
        }
        self.mix_hash(&sealed);
        Some(sealed)
    }

    fn open<const N: usize>(&mut self, key: &Key, sealed: &[u8]) -> Result<[u8; N], Refused> {
        let mut room = sealed.to_vec();
        let key = key_of(key).ok_or(Refused)?;
        let text = key.open_in_place(nonce(0), Aad::from(self.hash), &mut room).map_err(|_| Refused)?;
        let text = (&*text).try_into().map_err(|_| Refused)?;
        self.mix_hash(sealed);
        Ok(text)
    }

    fn split(self) -> [Key; 2] {
        derive(&self.chain, &[])
    }
}

fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Blake2s256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().into()
}

fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> Key {
    let mut mac = <SimpleHmac<Blake2s256> as KeyInit>::new(&(*hmac_key(key)).into());
    parts.iter().for_each(|part| mac.update(part));
    Zeroizing::new(mac.finalize().into_bytes().into())
}

/// A key as HMAC wants it: one block, filled up with zeros (RFC 2104 §2).
fn hmac_key(key: &[u8; 32]) -> Zeroizing<[u8; 64]> {
    let mut block = Zeroizing::new([0; 64]);
    for (to, from) in block.iter_mut().zip(key) {
        *to = *from;
    }
    block
}

/// `N` keys out of one (HKDF, RFC 5869, with HMAC-BLAKE2s).
fn derive<const N: usize>(chain: &Key, input: &[u8]) -> [Key; N] {
    let secret = hmac(chain, &[input]);
    let mut last: Option<Key> = None;
    let mut number = 0u8;
    [(); N].map(|()| {
        number += 1;
        let key = match &last {
            None => hmac(&secret, &[&[number]]),
            Some(last) => hmac(&secret, &[&**last, &[number]]),
        };
        last = Some(key.clone());
        key
    })
}

/// An initiation that is under way.
pub(super) struct Initiated {
    transcript: Transcript,
    ephemeral: KeyPair,
}

/// Asks the owner of `theirs` for a session. The codes of the message are still missing.
pub(super) fn initiate(
    own: &KeyPair,
    theirs: &PublicKey,
    static_static: &Key,
    sender: u32,
    stamp: Stamp,
) -> Option<(Initiated, Initiation)> {
    let ephemeral = KeyPair::ephemeral()?;
    let mut transcript = Transcript::new(theirs);
    transcript.mix_ephemeral(&ephemeral.public.0);
    let key = transcript.mix_secret(&*ephemeral.shared_with(theirs).ok()?);
    let sealed_static = transcript.seal(&key, own.public.0)?;
    let key = transcript.mix_secret(&**static_static);
    let sealed_stamp = transcript.seal(&key, stamp)?;
    let message = Initiation {
        kind: message::kind(message::INITIATION),
        sender: sender.into(),
        ephemeral: ephemeral.public.0,
        sealed_static,
        sealed_stamp,
        mac1: [0; 16],
        mac2: [0; 16],
    };
    Some((Initiated { transcript, ephemeral }, message))
}

/// An initiation of which only the sender is known.
pub struct Heard {
    transcript: Transcript,
    /// Who it says it is: whoever knows our public key could have written that.
    pub(super) key: PublicKey,
    pub(super) sender: u32,
    ephemeral: PublicKey,
    sealed_stamp: [u8; 28],
}

/// Reads who sent an initiation: one Diffie-Hellman computation.
pub(super) fn receive(own: &KeyPair, message: &Initiation) -> Result<Heard, Refused> {
    let mut transcript = Transcript::new(&own.public);
    let ephemeral = PublicKey(message.ephemeral);
    transcript.mix_ephemeral(&ephemeral.0);
    let key = transcript.mix_secret(&*own.shared_with(&ephemeral)?);
    let key = PublicKey(transcript.open(&key, &message.sealed_static)?);
    Ok(Heard { transcript, key, sender: message.sender.get(), ephemeral, sealed_stamp: message.sealed_stamp })
}

impl Heard {
    /// The stamp; that it can be read proves the sender.
    pub(super) fn stamp(&mut self, static_static: &Key) -> Result<Stamp, Refused> {
        let key = self.transcript.mix_secret(&**static_static);
        self.transcript.open(&key, &self.sealed_stamp)
    }

    /// Answers, after [`Heard::stamp`]. The codes of the message are still missing.
    pub(super) fn answer(mut self, preshared: &[u8; 32], sender: u32) -> Option<(Transport, Response)> {
        let ephemeral = KeyPair::ephemeral()?;
        let transcript = &mut self.transcript;
        transcript.mix_ephemeral(&ephemeral.public.0);
        transcript.mix_key(&*ephemeral.shared_with(&self.ephemeral).ok()?);
        transcript.mix_key(&*ephemeral.shared_with(&self.key).ok()?);
        let key = transcript.mix_preshared(preshared);
        let sealed_nothing = transcript.seal(&key, [])?;
        let message = Response {
            kind: message::kind(message::RESPONSE),
            sender: sender.into(),
            receiver: self.sender.into(),
            ephemeral: ephemeral.public.0,
            sealed_nothing,
            mac1: [0; 16],
            mac2: [0; 16],
        };
        let [open, seal] = self.transcript.split();
        Some((Transport { seal, open }, message))
    }
}

impl Initiated {
    /// Takes the answer. It may be somebody else's: then the next is still awaited.
    pub(super) fn finish(&self, own: &KeyPair, preshared: &[u8; 32], message: &Response) -> Result<Transport, Refused> {
        let mut transcript = Transcript { chain: self.transcript.chain.clone(), hash: self.transcript.hash };
        let theirs = PublicKey(message.ephemeral);
        transcript.mix_ephemeral(&theirs.0);
        transcript.mix_key(&*self.ephemeral.shared_with(&theirs)?);
        transcript.mix_key(&*own.shared_with(&theirs)?);
        let key = transcript.mix_preshared(preshared);
        let [] = transcript.open(&key, &message.sealed_nothing)?;
        let [seal, open] = transcript.split();
        Ok(Transport { seal, open })
    }
}

/// A stamp: TAI64N of so many milliseconds since 1970, leap seconds left out.
pub(super) fn stamp(epoch_ms: u64) -> Stamp {
    const TAI64: u64 = (1 << 62) + 10;
    let (seconds, nanoseconds) = (TAI64 + epoch_ms / 1000, (epoch_ms % 1000) as u32 * 1_000_000);
    let mut stamp = [0; 12];
    let bytes = seconds.to_be_bytes().into_iter().chain(nanoseconds.to_be_bytes());
    stamp.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    stamp
}
