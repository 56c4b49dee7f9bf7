//! Proving a shared secret without showing it: SPAKE2 with explicit key confirmation.
//!
//! Both sides mix into the confirmation the TLS exporter of their connection and the certificates that the server presented, so
//! that somebody in the middle, who has two connections, confirms neither. What a guesser learns from one run is whether
//! one guess was right. Pure: messages in, messages out.

use std::fmt;
use std::num::NonZeroU32;

use ring::{hmac, pbkdf2};
use sha2::{Digest, Sha256};
use spake2::{Ed25519Group, Identity, Password, Spake2};
use zeroize::Zeroizing;

/// What servers keep of a shared secret: enough to take part, and no way back to its text short of guessing.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier(Zeroizing<[u8; 32]>);

/// Guesses at a stolen store cost this much each.
const ROUNDS: NonZeroU32 = NonZeroU32::new(100_000).expect("not zero");
const CLIENT: &[u8] = b"meshd node";
const SERVER: &[u8] = b"meshd server";

impl Verifier {
    /// Stretches a secret; takes some ten milliseconds.
    pub fn new(secret: &str, cluster: &str) -> Self {
        let mut out = Zeroizing::new([0; 32]);
        let salt = [b"meshd shared secret v1 ", cluster.as_bytes()].concat();
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ROUNDS, &salt, secret.as_bytes(), &mut out[..]);
        Verifier(out)
    }

    /// From what was kept.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Verifier(Zeroizing::new(bytes))
    }

    /// What to keep.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What ties a run to one TLS connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The exporter of the connection.
    pub exporter: [u8; 32],
    /// The certificates that the server presented: SHA-256 over all of them.
    pub certificates: [u8; 32],
}

impl Binding {
    /// Binds to a connection and a chain.
    pub fn new(exporter: [u8; 32], chain: &[impl AsRef<[u8]>]) -> Self {
        let mut hash = Sha256::new();
        for certificate in chain {
            let certificate = certificate.as_ref();
            hash.update((certificate.len() as u64).to_be_bytes());
            hash.update(certificate);
        }
        Binding { exporter, certificates: hash.finalize().into() }
    }
}

/// One side that has sent its message and waits for the other's.
pub struct Started {
    state: Spake2<Ed25519Group>,
    sent: Vec<u8>,
    side: Side,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// Both messages are there: what to send as proof, and what to expect.
pub struct Exchanged {
    mine: hmac::Tag,
    key: hmac::Key,
    theirs: Vec<u8>,
}

/// The other side's message is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the key exchange message is malformed")]
pub struct BadMessage;

/// Begins as the joining node; the second part is the message to send.
pub fn client(verifier: &Verifier) -> (Started, Vec<u8>) {
    let (state, sent) = Spake2::start_a(&password(verifier), &Identity::new(CLIENT), &Identity::new(SERVER));
    (Started { state, sent: sent.clone(), side: Side::Client }, sent)
}

/// Begins as the server; the second part is the message to send.
pub fn server(verifier: &Verifier) -> (Started, Vec<u8>) {
    let (state, sent) = Spake2::start_b(&password(verifier), &Identity::new(CLIENT), &Identity::new(SERVER));
    (Started { state, sent: sent.clone(), side: Side::Server }, sent)
}

impl Started {
    /// Takes the other's message.
    pub fn finish(self, received: &[u8], binding: &Binding) -> Result<Exchanged, BadMessage> {
        let key = Zeroizing::new(self.state.finish(received).map_err(|_| BadMessage)?);
        let (a, b) = match self.side {
            Side::Client => (&self.sent[..], received),
            Side::Server => (received, &self.sent[..]),
        };
        let transcript = |who: &[u8]| {
            let mut text = Vec::new();
            for part in [who, a, b, &binding.exporter[..], &binding.certificates[..]] {
                text.extend_from_slice(&(part.len() as u64).to_be_bytes());
                text.extend_from_slice(part);
            }
            text
        };
        let (mine, theirs) = match self.side {
            Side::Client => (transcript(CLIENT), transcript(SERVER)),
            Side::Server => (transcript(SERVER), transcript(CLIENT)),
        };
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        Ok(Exchanged { mine: hmac::sign(&key, &mine), key, theirs })
    }
}

impl Exchanged {
    /// Proof for the other side that this one knows the secret.
    pub fn proof(&self) -> &[u8] {
        self.mine.as_ref()
    }

    /// Whether the other side's proof is right; takes the same time for every wrong one.
    pub fn confirms(&self, proof: &[u8]) -> bool {
        hmac::verify(&self.key, &self.theirs, proof).is_ok()
    }
}

fn password(verifier: &Verifier) -> Password {
    Password::new(verifier.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(a: &Verifier, b: &Verifier, at_a: &Binding, at_b: &Binding) -> (bool, bool) {
        let (client, to_server) = client(a);
        let (server, to_client) = server(b);
        let client = client.finish(&to_client, at_a).unwrap();
        let server = server.finish(&to_server, at_b).unwrap();
        (server.confirms(client.proof()), client.confirms(server.proof()))
    }

    #[test]
    fn only_the_same_secret_on_the_same_connection_confirms() {
        let right = Verifier::from_bytes([1; 32]);
        let here = Binding::new([5; 32], &[&b"leaf"[..], b"ca"]);
        assert_eq!(run(&right, &right, &here, &here), (true, true), "positive control");
        assert_eq!(run(&Verifier::from_bytes([2; 32]), &right, &here, &here), (false, false));
        assert_eq!(run(&right, &right, &Binding::new([6; 32], &[&b"leaf"[..], b"ca"]), &here), (false, false));
        assert_eq!(run(&right, &right, &Binding::new([5; 32], &[&b"leafc"[..], b"a"]), &here), (false, false));
    }

    #[test]
    fn messages_that_are_none_are_refused_and_none_confirms_itself() {
        let right = Verifier::from_bytes([1; 32]);
        let here = Binding::new([5; 32], &[b"leaf"]);
        for bad in [&b""[..], b"x", &[0; 33], &[0xff; 33], &[0; 1000]] {
            let (server, _) = server(&right);
            if let Ok(exchanged) = server.finish(bad, &here) {
                let own = exchanged.proof().to_vec();
                assert!(!exchanged.confirms(&own) && !exchanged.confirms(b""));
            }
        }
        let (reflected, sent) = client(&right);
        assert!(reflected.finish(&sent, &here).is_err(), "one's own message is none of the other side's");
    }

    #[test]
    fn the_secret_is_stretched_and_salted() {
        let one = Verifier::new("my-shared-secret", "a");
        assert_eq!(one, Verifier::new("my-shared-secret", "a"));
        assert_ne!(one, Verifier::new("my-shared-secret", "b"));
        assert_ne!(one, Verifier::new("my-shared-secreT", "a"));
    }
}
