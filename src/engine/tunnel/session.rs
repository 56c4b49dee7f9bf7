//! A session: two keys, the counters that make each message a new one, and the window that knows which were there.
//!
//! The halves are apart, so that one worker can seal while another opens. Knows no handshake.

use std::fmt;

use zerocopy::{FromBytes, IntoBytes};

use super::aead::{Aead, TAG_LEN};
use super::message::{self, DataHeader};
use super::noise::Transport;
use super::{INNER_AT, OVERHEAD};

/// Messages after which a session is to be replaced, and after which it is not used any more (whitepaper §6.1).
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// The half that seals.
pub(super) struct Sealing {
    aead: Aead,
    /// The peer's index of the session.
    remote: u32,
    counter: u64,
}

/// The half that opens.
pub(super) struct Opening {
    aead: Aead,
    /// Our index of the session.
    pub(super) local: u32,
    pub(super) born_ms: u64,
    /// We asked for it, and see to its successor.
    pub(super) initiator: bool,
    /// A last message has already made us ask for another.
    pub(super) late: bool,
    window: Window,
}

/// Why a message is not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unopened {
    Malformed,
    Replayed,
    NotAuthentic,
}

/// Both halves.
pub(super) fn pair(
    keys: &Transport,
    [local, remote]: [u32; 2],
    initiator: bool,
    now_ms: u64,
) -> Option<(Sealing, Opening)> {
    let sealing = Sealing { aead: Aead::new(&keys.seal)?, remote, counter: 0 };
    let window = Window::default();
    let opening = Opening { aead: Aead::new(&keys.open)?, local, born_ms: now_ms, initiator, late: false, window };
    Some((sealing, opening))
}

impl Sealing {
    /// Seals an inner packet of `len` bytes, which `write` appends, behind `out`. Returns the datagram's length; where that
    /// fails `out` is what it was.
    #[inline]
    pub(super) fn seal(
        &mut self,
        len: usize,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>) -> Option<()>,
    ) -> Option<usize> {
        let at = out.len();
        let sealed = self.seal_behind(at, len, out, write);
        if sealed.is_none() {
            out.truncate(at);
        }
        sealed
    }

    #[inline]
    fn seal_behind(
        &mut self,
        at: usize,
        len: usize,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>) -> Option<()>,
    ) -> Option<usize> {
        let counter = self.counter;
        if counter >= REJECT_AFTER_MESSAGES {
            return None;
        }
        let kind = message::kind(message::DATA);
        let header = DataHeader { kind, receiver: self.remote.into(), counter: counter.into() };
        out.reserve(len + OVERHEAD);
        out.extend_from_slice(header.as_bytes());
        write(out)?;
        let text = out.get_mut(at + INNER_AT..).filter(|text| text.len() == len)?;
        self.counter += 1;
        let tag = self.aead.seal(counter, text)?;
        out.extend_from_slice(&tag);
        Some(len + OVERHEAD)
    }

    /// Whether so many messages were sealed that there should be another session.
    pub(super) fn is_worn(&self) -> bool {
        self.counter >= REKEY_AFTER_MESSAGES
    }
}

impl Opening {
    /// Opens a transport message where it lies: the inner packet is at [`INNER_AT`] then. Returns its length.
    #[inline]
    pub(super) fn open(&mut self, message: &mut [u8]) -> Result<usize, Unopened> {
        let (header, sealed) = DataHeader::mut_from_prefix(message).map_err(|_| Unopened::Malformed)?;
        let len = sealed.len().checked_sub(TAG_LEN).ok_or(Unopened::Malformed)?;
        let counter = header.counter.get();
        if counter >= REJECT_AFTER_MESSAGES || !self.window.is_new(counter) {
            return Err(Unopened::Replayed);
        }
        self.aead.open(counter, sealed).ok_or(Unopened::NotAuthentic)?;
        self.window.mark(counter);
        Ok(len)
    }
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("local", &self.local).finish_non_exhaustive()
    }
}

/// Which of the last counters were there (RFC 6479): a ring of words, of which the newest is never full of the oldest.
struct Window {
    /// One more than the greatest counter.
    next: u64,
    words: [u64; WORDS as usize],
}

const WORDS: u64 = 64;
/// How far behind the greatest counter a message may be.
pub(super) const WINDOW: u64 = (WORDS - 1) * 64;

impl Default for Window {
    fn default() -> Self {
        Window { next: 0, words: [0; WORDS as usize] }
    }
}

impl Window {
    fn place(counter: u64) -> (usize, u64) {
        ((counter / 64 % WORDS) as usize, 1 << (counter % 64))
    }

    #[inline]
    fn is_new(&self, counter: u64) -> bool {
        if counter >= self.next {
            return true;
        }
        let (word, bit) = Self::place(counter);
        self.next - counter <= WINDOW && self.words.get(word).is_some_and(|word| word & bit == 0)
    }

    #[inline]
    fn mark(&mut self, counter: u64) {
        if counter >= self.next {
            // words between the greatest so far and this one hold counters of a round ago
            let (from, to) = (self.next.div_ceil(64), counter / 64);
            for word in (from..=to).take(WORDS as usize) {
                if let Some(word) = self.words.get_mut((word % WORDS) as usize) {
                    *word = 0;
                }
            }
            self.next = counter + 1;
        }
        let (word, bit) = Self::place(counter);
        if let Some(word) = self.words.get_mut(word) {
            *word |= bit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    fn take(window: &mut Window, counter: u64) -> bool {
        let new = window.is_new(counter);
        if new {
            window.mark(counter);
        }
        new
    }

    #[test]
    fn a_counter_is_taken_once_and_not_too_late() {
        let mut window = Window::default();
        assert!(take(&mut window, 0) && !take(&mut window, 0));
        assert!(take(&mut window, 5) && take(&mut window, 3) && !take(&mut window, 3));
        assert!(take(&mut window, WINDOW + 5));
        assert!(!take(&mut window, 4), "too late by one");
        assert!(take(&mut window, 6), "just in time");
        assert!(take(&mut window, 1 << 40) && !take(&mut window, WINDOW + 6));
    }

    proptest! {
        #[test]
        fn the_window_is_a_set_with_an_end(steps in prop::collection::vec((0u64..5_000, any::<bool>()), 1..400)) {
            let (mut window, mut seen, mut greatest) = (Window::default(), BTreeSet::new(), 0u64);
            for (step, back) in steps {
                let counter = if back { greatest.saturating_sub(step) } else { greatest + step % 700 };
                let expected = !seen.contains(&counter) && (seen.is_empty() || counter + WINDOW > greatest);
                prop_assert_eq!(take(&mut window, counter), expected, "{} of {}", counter, greatest);
                seen.insert(counter);
                greatest = greatest.max(counter);
            }
        }
    }
}
