//! ChaCha20-Poly1305 (RFC 8439) as transport messages use it: no associated data, the nonce a counter.
//!
//! Which code does it is the machine's business: [`portable`] is always there, and whoever starts the engine may name a
//! faster one. Does not know sessions.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

/// Bytes of an authentication tag.
pub const TAG_LEN: usize = 16;

/// One key, for one direction of one session.
pub trait Aead: Send {
    /// Encrypts `text` where it lies, and returns the tag. A counter is used once.
    fn seal(&mut self, counter: u64, text: &mut [u8]) -> Option<[u8; TAG_LEN]>;

    /// Decrypts a ciphertext with its tag behind it where it lies. `None`: it was not sealed with this key and counter; what
    /// lies there then has no meaning.
    fn open(&mut self, counter: u64, sealed: &mut [u8]) -> Option<()>;
}

/// Takes a key into use.
pub type MakeAead = fn(&[u8; 32]) -> Box<dyn Aead>;

/// The one that works on every machine.
pub fn portable(key: &[u8; 32]) -> Box<dyn Aead> {
    Box::new(Ring(key_of(key)))
}

struct Ring(Option<LessSafeKey>);

impl Aead for Ring {
    #[inline]
    fn seal(&mut self, counter: u64, text: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        let tag = self.0.as_ref()?.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text).ok()?;
        tag.as_ref().try_into().ok()
    }

    #[inline]
    fn open(&mut self, counter: u64, sealed: &mut [u8]) -> Option<()> {
        self.0.as_ref()?.open_in_place(nonce(counter), Aad::empty(), sealed).ok().map(|_| ())
    }
}

pub(super) fn key_of(key: &[u8; 32]) -> Option<LessSafeKey> {
    // 32 bytes are what the algorithm wants
    UnboundKey::new(&CHACHA20_POLY1305, key).ok().map(LessSafeKey::new)
}

/// Four zero bytes and the counter, little endian (whitepaper §5.4.6).
pub(super) fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    for (to, from) in nonce.iter_mut().skip(4).zip(counter.to_le_bytes()) {
        *to = from;
    }
    Nonce::assume_unique_for_key(nonce)
}
