//! The two codes behind a handshake message, and the cookie that goes into the second (whitepaper §5.4.4 and §5.4.7).
//!
//! The first shows that the sender knows whom it talks to; without it a message is not even looked at. Under load a sender
//! must also show, by the second, that it receives what is sent to its address. Knows no handshake.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};

use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::AeadInOut;
use subtle::ConstantTimeEq;
use zerocopy::{FromBytes, IntoBytes};

use super::message::{self, CookieReply, MACS_LEN};
use crate::key::PublicKey;

/// Handshake messages a second from which on a sender must first prove, by a cookie, that its address is its own.
const MESSAGES_BEFORE_COOKIES: u32 = 200;
/// How long the secret behind cookies lasts, in milliseconds.
const SECRET_MS: u64 = 120_000;
/// How long a cookie is used, in milliseconds: somewhat shorter, since it was under way.
const COOKIE_MS: u64 = 115_000;

type Code = [u8; 16];

/// What is derived from a public key for the messages to its owner.
pub(super) struct Labels {
    mac1: [u8; 32],
    cookie: [u8; 32],
}

impl Labels {
    pub(super) fn of(key: &PublicKey) -> Self {
        let labelled = |label: &[u8]| Blake2s256::new().chain_update(label).chain_update(key.0).finalize().into();
        Labels { mac1: labelled(b"mac1----"), cookie: labelled(b"cookie--") }
    }
}

fn code(key: &[u8], parts: &[&[u8]]) -> Code {
    // keys are 16 or 32 bytes, which the algorithm takes
    let Ok(mut mac) = <Blake2sMac<U16> as KeyInit>::new_from_slice(key) else { return [0; 16] };
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

/// Splits off the two codes.
fn codes(message: &[u8]) -> Option<(&[u8], &Code, &Code)> {
    let (body, codes) = message.split_at_checked(message.len().checked_sub(MACS_LEN)?)?;
    let ([mac1, mac2], []) = codes.as_chunks() else { return None };
    Some((body, mac1, mac2))
}

/// The side that is asked.
pub(super) struct Guard {
    labels: Labels,
    secret: [u8; 32],
    /// Messages in this second.
    count: AtomicU32,
}

/// Whether a message is looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Since there are few.
    Granted,
    /// Since its sender is where it says.
    Proved,
    /// This goes back instead.
    Cookie([u8; 64]),
    /// No.
    Refused,
}

impl Guard {
    pub(super) fn new(own: &PublicKey) -> Self {
        let mut secret = [0; 32];
        // without randomness there is no handshake either: `KeyPair::ephemeral`
        getrandom::fill(&mut secret).ok();
        Guard { labels: Labels::of(own), secret, count: AtomicU32::new(0) }
    }

    /// To be called each second.
    pub(super) fn second_passed(&self) {
        self.count.store(0, Ordering::Relaxed);
    }

    /// Whether a handshake message is by somebody who knows this key.
    pub(super) fn is_addressed(&self, message: &[u8]) -> bool {
        codes(message).is_some_and(|(body, mac1, _)| code(&self.labels.mac1, &[body]).ct_eq(mac1).into())
    }

    /// Whether it is looked at, after [`Guard::is_addressed`]. `sender`: its session index.
    pub(super) fn admit(&self, message: &[u8], sender: u32, source: SocketAddr, now_ms: u64) -> Admission {
        if self.count.fetch_add(1, Ordering::Relaxed) < MESSAGES_BEFORE_COOKIES {
            return Admission::Granted;
        }
        let Some((body, mac1, mac2)) = codes(message) else { return Admission::Refused };
        let cookie = self.cookie(source, now_ms);
        if bool::from(code(&cookie, &[body, mac1]).ct_eq(mac2)) {
            return Admission::Proved;
        }
        self.reply(cookie, mac1, sender).map_or(Admission::Refused, Admission::Cookie)
    }

    fn cookie(&self, source: SocketAddr, now_ms: u64) -> Code {
        let ip = match source.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let period = (now_ms / SECRET_MS).to_le_bytes();
        code(&self.secret, &[&period, &ip, &source.port().to_le_bytes()])
    }

    fn reply(&self, mut cookie: Code, mac1: &Code, sender: u32) -> Option<[u8; 64]> {
        let mut nonce = [0; 24];
        getrandom::fill(&mut nonce).ok()?;
        let cipher = XChaCha20Poly1305::new(&self.labels.cookie.into());
        let tag = cipher.encrypt_inout_detached(&nonce.into(), mac1, cookie.as_mut_slice().into()).ok()?;
        let mut sealed_cookie = [0; 32];
        sealed_cookie.iter_mut().zip(cookie.iter().chain(tag.iter())).for_each(|(to, from)| *to = *from);
        let reply = CookieReply { kind: message::kind(message::COOKIE), receiver: sender.into(), nonce, sealed_cookie };
        reply.as_bytes().try_into().ok()
    }
}

/// The side that asks.
#[derive(Default)]
pub(super) struct Jar {
    cookie: Option<(Code, u64)>,
    /// Session index and first code of our last message: what a reply has to answer.
    last: Option<(u32, Code)>,
}

impl Jar {
    /// Writes both codes of a message.
    pub(super) fn sign(&mut self, theirs: &Labels, sender: u32, message: &mut [u8], now_ms: u64) -> Option<()> {
        let (body, codes) = message.split_at_mut_checked(message.len().checked_sub(MACS_LEN)?)?;
        let ([mac1, mac2], []) = codes.as_chunks_mut() else { return None };
        *mac1 = code(&theirs.mac1, &[body]);
        let fresh = self.cookie.filter(|(_, since_ms)| now_ms < since_ms + COOKIE_MS);
        *mac2 = fresh.map_or([0; 16], |(cookie, _)| code(&cookie, &[body, &*mac1]));
        self.last = Some((sender, *mac1));
        Some(())
    }

    /// Takes a cookie, if it answers our last message; one each.
    pub(super) fn take(&mut self, theirs: &Labels, message: &[u8], now_ms: u64) -> Option<()> {
        let reply = CookieReply::ref_from_bytes(message).ok()?;
        let (_, mac1) = self.last.filter(|(sender, _)| *sender == reply.receiver.get())?;
        let (sealed, tag) = reply.sealed_cookie.split_first_chunk::<16>()?;
        let (mut cookie, tag): (Code, Code) = (*sealed, tag.try_into().ok()?);
        let cipher = XChaCha20Poly1305::new(&theirs.cookie.into());
        let nonce = reply.nonce.into();
        cipher.decrypt_inout_detached(&nonce, &mac1, cookie.as_mut_slice().into(), &tag.into()).ok()?;
        self.cookie = Some((cookie, now_ms));
        self.last = None;
        Some(())
    }
}
