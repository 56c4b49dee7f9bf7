//! ChaCha20-Poly1305 (RFC 8439) as transport messages use it: no associated data, the nonce a counter.
//!
//! The code is ring's: see benches/README.md for what else was tried. Does not know sessions.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

/// Bytes of an authentication tag.
pub(super) const TAG_LEN: usize = 16;

/// One key, for one direction of one session.
pub(super) struct Aead(LessSafeKey);

impl Aead {
    pub(super) fn new(key: &[u8; 32]) -> Option<Self> {
        key_of(key).map(Aead)
    }

    /// Encrypts `text` where it lies, and returns the tag. A counter is used once.
    #[inline]
    pub(super) fn seal(&self, counter: u64, text: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        let tag = self.0.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text).ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Decrypts a ciphertext with its tag behind it where it lies. `None`: it was not sealed with this key and counter; what
    /// lies there then has no meaning.
    #[inline]
    pub(super) fn open(&self, counter: u64, sealed: &mut [u8]) -> Option<()> {
        self.0.open_in_place(nonce(counter), Aad::empty(), sealed).ok().map(|_| ())
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
