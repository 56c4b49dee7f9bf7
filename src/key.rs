//! X25519 keys as WireGuard uses and writes them: 32 bytes, in base64 on paper.
//!
//! Owns their text form, how they are made and how a node's lane keys follow from its own. Secret keys are wiped when they
//! are dropped and never shown. Knows no file (`key::file` does) and no protocol.

pub mod file;

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize, Zeroizing};

/// Lanes that a node has at most: each is a WireGuard session of its own between two meshd nodes.
pub const MAX_LANES: usize = 16;

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// Text that is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not 32 bytes in base64 (44 characters, the last is `=`)")]
pub struct BadKey;

impl FromStr for PublicKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        decode(text).map(|bytes| PublicKey(*bytes))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A secret key. Not shown by `Debug`, wiped when dropped.
#[derive(Clone)]
pub struct SecretKey(StaticSecret);

impl SecretKey {
    /// A new one out of the system's randomness.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        let key = SecretKey(StaticSecret::from(bytes));
        bytes.zeroize();
        Ok(key)
    }

    /// Its public key.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&self.0).to_bytes())
    }

    /// The key of a lane: that of lane 0 is the node's own, the others follow from it (SHA-256 over a label, the lane's
    /// number and the key), so that one file holds them all.
    pub fn lane(&self, lane: u8) -> SecretKey {
        if lane == 0 {
            return self.clone();
        }
        let hash = Sha256::new().chain_update(b"meshd lane key").chain_update([lane]).chain_update(self.0.as_bytes());
        let mut bytes: [u8; 32] = hash.finalize().into();
        let key = SecretKey(StaticSecret::from(bytes));
        bytes.zeroize();
        key
    }

    /// Its text, for a key file or a person who asked for it.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0.as_bytes()))
    }

    pub(crate) fn secret(&self) -> &StaticSecret {
        &self.0
    }
}

impl FromStr for SecretKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        decode(text).map(|bytes| SecretKey(StaticSecret::from(*bytes)))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// A key that both ends of a tunnel know besides their own. Not shown by `Debug`, wiped when dropped.
#[derive(Clone)]
pub struct PresharedKey(Zeroizing<[u8; 32]>);

impl PresharedKey {
    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for PresharedKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for PresharedKey {}

impl FromStr for PresharedKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        decode(text).map(PresharedKey)
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

fn decode(text: &str) -> Result<Zeroizing<[u8; 32]>, BadKey> {
    let bytes = Zeroizing::new(STANDARD.decode(text).map_err(|_| BadKey)?);
    bytes.as_slice().try_into().map(Zeroizing::new).map_err(|_| BadKey)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_key_are_one() {
        // RFC 7748 §6.1
        let secret: SecretKey = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=".parse().unwrap();
        assert_eq!(secret.public().to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
        assert_eq!(*secret.to_base64(), "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=");
        for bad in
            ["", "AAAA", "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo", "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmp="]
        {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn lanes_have_keys_of_their_own() {
        let secret = SecretKey::generate().unwrap();
        let mut keys: Vec<_> = (0..MAX_LANES as u8).map(|lane| secret.lane(lane).public()).collect();
        assert_eq!(keys[0], secret.public());
        assert_eq!(secret.lane(3).public(), secret.lane(3).public());
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), MAX_LANES);
    }

    #[test]
    fn a_secret_is_not_shown() {
        let secret = SecretKey::generate().unwrap();
        assert!(!format!("{secret:?}").contains(&*secret.to_base64()));
    }
}
