//! WireGuard between one key of ours and one of a peer's: which sessions there are, and what is due when (whitepaper §6).
//!
//! ```text
//!   we ask:         initiate ──► pending ──finish──► current                (previous ◄── what was current)
//!   we are asked:   answer ──► next ──first message by it──► current
//! ```
//!
//! Every call takes the time; nothing here waits, sends or locks. Whether to try again what was not answered is decided by
//! the lane, which knows whether anything waits.

use zerocopy::{FromBytes, IntoBytes};

use super::cookie::{Jar, Labels};
use super::message::{Initiation, Response};
use super::noise::{self, Heard, Initiated, Key, KeyPair, Stamp, Transport};
use super::session::{self, Opening, Sealing, Unopened};
use crate::key::PublicKey;

/// Who asked for a session asks for the next after so many milliseconds, where it is used.
pub(super) const REKEY_AFTER_MS: u64 = 120_000;
/// A session is not used any more after so many.
pub(super) const REJECT_AFTER_MS: u64 = 180_000;
/// An answer that came later is not waited for.
const REKEY_ATTEMPT_MS: u64 = 90_000;
/// What was received is answered within this time, if with nothing then with an empty packet.
const KEEPALIVE_MS: u64 = 10_000;
/// What was sent and not answered within this time makes us ask for another session.
const UNANSWERED_MS: u64 = 15_000;
/// Who receives only asks for the next session so long before the end of this one.
const LAST_CALL_MS: u64 = 165_000;

/// Between whom: ours, theirs, and what both know besides.
#[derive(Clone, Copy)]
pub(super) struct Ends<'a> {
    pub(super) own: &'a KeyPair,
    pub(super) theirs: &'a PublicKey,
    pub(super) preshared: &'a [u8; 32],
}

pub(super) struct Machine {
    static_static: Key,
    labels: Labels,
    jar: Jar,
    /// The first of the session indices that are this machine's: 256, of which the last byte is the generation.
    base: u32,
    generation: u8,
    /// Our last two initiations: an answer to the first may come after the second has left.
    pending: [Option<Pending>; 2],
    previous: Option<Box<Opening>>,
    current: Option<Box<Opening>>,
    /// What we answered with, until the peer uses it.
    next: Option<(Box<Opening>, Sealing)>,
    /// The greatest stamp that the peer has asked with.
    heard: Stamp,
    /// The time in our last stamp.
    stamped_ms: u64,
    unanswered_since: Option<u64>,
    owes_since: Option<u64>,
    traversed_ms: u64,
}

struct Pending {
    index: u32,
    initiated: Initiated,
    since_ms: u64,
    /// Answers that are still looked at: each costs two Diffie-Hellman computations, and anybody could have sent it.
    answers: u8,
}

const ANSWERS: u8 = 8;

/// Why a message of a handshake is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Untaken {
    /// It is not what it would have to be, or answers nothing.
    Refused,
    /// It is authentic, but no newer than one before.
    Replayed,
    /// An answer to our question, of which only the end is wrong: what a peer with another preshared key would say.
    NotThisPreshared,
}

/// What packets have crossed since the last tick, and which were the last.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Signs {
    /// We sent an inner packet.
    pub(super) sent: bool,
    /// We sent one, and nothing has come since.
    pub(super) awaiting: bool,
    /// One came, and we have sent nothing since.
    pub(super) owes: bool,
    /// Anything crossed.
    pub(super) traversed: bool,
    /// So much was sealed that there should be other keys.
    pub(super) worn: bool,
}

/// What is due.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// Another session is wanted.
    pub(super) session: bool,
    /// An empty packet is to be sent.
    pub(super) keepalive: bool,
    /// The session that was used is over.
    pub(super) ended: bool,
}

impl Machine {
    /// `None` for a key of the peer's with which no secret can be shared.
    pub(super) fn new(own: &KeyPair, theirs: &PublicKey, base: u32, now_ms: u64) -> Option<Self> {
        Some(Machine {
            static_static: own.shared_with(theirs).ok()?,
            labels: Labels::of(theirs),
            jar: Jar::default(),
            base,
            generation: 0,
            pending: [None, None],
            previous: None,
            current: None,
            next: None,
            heard: [0; 12],
            stamped_ms: 0,
            unanswered_since: None,
            owes_since: None,
            traversed_ms: now_ms,
        })
    }

    /// How long ago the session was made that is used now, in milliseconds.
    pub(super) fn age(&self, now_ms: u64) -> Option<u64> {
        self.current.as_ref().map(|current| now_ms.saturating_sub(current.born_ms))
    }

    fn openings(&self) -> impl Iterator<Item = &Opening> {
        let next = self.next.as_ref().map(|(next, _)| &**next);
        self.current.as_deref().into_iter().chain(next).chain(self.previous.as_deref())
    }

    /// A session index that nothing has.
    fn index(&mut self) -> u32 {
        loop {
            self.generation = self.generation.wrapping_add(1);
            let index = self.base | u32::from(self.generation);
            let taken = self.openings().any(|opening| opening.local == index)
                || self.pending.iter().flatten().any(|pending| pending.index == index);
            if !taken {
                return index; // at most five of 256 are taken
            }
        }
    }

    /// Asks for a session. `wall_ms`: milliseconds since 1970, about; stamps grow even where it does not.
    pub(super) fn initiate(&mut self, ends: Ends<'_>, wall_ms: u64, now_ms: u64) -> Option<Initiation> {
        self.stamped_ms = wall_ms.max(self.stamped_ms + 1);
        let (index, stamp) = (self.index(), noise::stamp(self.stamped_ms));
        let (initiated, mut message) = noise::initiate(ends.own, ends.theirs, &self.static_static, index, stamp)?;
        self.jar.sign(&self.labels, index, message.as_mut_bytes(), now_ms)?;
        let [first, second] = &mut self.pending;
        *first = second.replace(Pending { index, initiated, since_ms: now_ms, answers: ANSWERS });
        Some(message)
    }

    /// Answers the peer, who is asking. The session is used once the peer has used it.
    pub(super) fn answer(&mut self, ends: Ends<'_>, mut heard: Heard, now_ms: u64) -> Result<Response, Untaken> {
        let stamp = heard.stamp(&self.static_static).map_err(|_| Untaken::Refused)?;
        if stamp <= self.heard {
            return Err(Untaken::Replayed);
        }
        let (index, remote) = (self.index(), heard.sender);
        let (keys, mut message) = heard.answer(ends.preshared, index).ok_or(Untaken::Refused)?;
        self.jar.sign(&self.labels, index, message.as_mut_bytes(), now_ms).ok_or(Untaken::Refused)?;
        self.heard = stamp;
        let pair = session::pair(&keys, [index, remote], false, now_ms);
        let (sealing, opening) = pair.ok_or(Untaken::Refused)?;
        self.next = Some((Box::new(opening), sealing));
        Ok(message)
    }

    /// Whether a message is an answer to a question that is still open.
    pub(super) fn awaits(&self, message: &[u8]) -> bool {
        Response::ref_from_bytes(message).is_ok_and(|message| self.asked(message).is_some())
    }

    fn asked(&self, message: &Response) -> Option<&Pending> {
        let is_answered = |pending: &&Pending| pending.index == message.receiver.get() && pending.answers > 0;
        self.pending.iter().flatten().find(is_answered)
    }

    /// Takes the peer's answer: from now on this is the session.
    pub(super) fn finish(&mut self, ends: Ends<'_>, message: &[u8], now_ms: u64) -> Result<Sealing, Untaken> {
        let message = Response::ref_from_bytes(message).map_err(|_| Untaken::Refused)?;
        let Pending { index, initiated, .. } = self.asked(message).ok_or(Untaken::Refused)?;
        let [local, remote] = [*index, message.sender.get()];
        let keys: Transport = match initiated.finish(ends.own, ends.preshared, message) {
            Ok(keys) => keys,
            Err(_) => {
                for pending in self.pending.iter_mut().flatten().filter(|pending| pending.index == local) {
                    pending.answers = pending.answers.saturating_sub(1);
                }
                return Err(Untaken::NotThisPreshared);
            }
        };
        let (sealing, opening) = session::pair(&keys, [local, remote], true, now_ms).ok_or(Untaken::Refused)?;
        self.pending = [None, None];
        // what the peer asked for meanwhile it may be using already
        self.previous = self.next.take().map(|(next, _)| next).or_else(|| self.current.take());
        self.begin(Box::new(opening), now_ms);
        Ok(sealing)
    }

    /// Takes a cookie.
    pub(super) fn take_cookie(&mut self, message: &[u8], now_ms: u64) -> Result<(), Untaken> {
        self.jar.take(&self.labels, message, now_ms).ok_or(Untaken::Refused)
    }

    fn begin(&mut self, opening: Box<Opening>, now_ms: u64) {
        self.current = Some(opening);
        self.unanswered_since = None;
        self.owes_since = None;
        self.traversed_ms = now_ms;
    }

    /// Opens a transport message where it lies. Returns the length of what is in it, and for the first message of a
    /// session the half that seals: it is used from now on. `None`: there is no such session.
    #[inline]
    pub(super) fn open(
        &mut self,
        index: u32,
        message: &mut [u8],
        now_ms: u64,
    ) -> Option<Result<(usize, Option<Sealing>), Unopened>> {
        let fits = |opening: &Opening| opening.local == index && now_ms < opening.born_ms + REJECT_AFTER_MS;
        if let Some(current) = self.current.as_deref_mut().filter(|current| fits(current)) {
            return Some(current.open(message).map(|len| (len, None)));
        }
        self.open_other(message, now_ms, fits)
    }

    #[cold]
    fn open_other(
        &mut self,
        message: &mut [u8],
        now_ms: u64,
        fits: impl Fn(&Opening) -> bool,
    ) -> Option<Result<(usize, Option<Sealing>), Unopened>> {
        if let Some((mut next, sealing)) = self.next.take_if(|(next, _)| fits(next)) {
            let opened = next.open(message);
            let Ok(len) = opened else {
                self.next = Some((next, sealing));
                return Some(opened.map(|len| (len, None)));
            };
            self.previous = self.current.take();
            self.begin(next, now_ms);
            return Some(Ok((len, Some(sealing))));
        }
        let previous = self.previous.as_deref_mut().filter(|previous| fits(previous))?;
        Some(previous.open(message).map(|len| (len, None)))
    }

    /// Whether what was just received is the last call to ask for another session: once a session.
    #[inline]
    pub(super) fn is_last_call(&mut self, now_ms: u64) -> bool {
        let Some(current) = self.current.as_deref_mut() else { return false };
        if !current.initiator || current.late || now_ms < current.born_ms + LAST_CALL_MS {
            return false;
        }
        current.late = true;
        true
    }

    /// Lets time pass. `keepalive`: seconds without a packet after which an empty one goes out, for a NAT.
    pub(super) fn tick(&mut self, signs: Signs, keepalive: Option<u16>, now_ms: u64) -> Due {
        let over = |opening: &Opening| now_ms >= opening.born_ms + REJECT_AFTER_MS;
        self.previous.take_if(|previous| over(previous));
        self.next.take_if(|(next, _)| over(next));
        let ended = self.current.take_if(|current| over(current)).is_some();
        for pending in &mut self.pending {
            pending.take_if(|pending| now_ms >= pending.since_ms + REKEY_ATTEMPT_MS);
        }
        let mut due = Due { ended, ..Due::default() };
        if signs.traversed {
            self.traversed_ms = now_ms;
        }
        let since = |place: &mut Option<u64>, holds: bool| match holds {
            true => Some(*place.get_or_insert(now_ms)),
            false => {
                *place = None;
                None
            }
        };
        let unanswered = since(&mut self.unanswered_since, signs.awaiting);
        let owes = since(&mut self.owes_since, signs.owes);
        let Some(current) = self.current.as_deref() else { return due };
        let aged = current.initiator && signs.sent && now_ms >= current.born_ms + REKEY_AFTER_MS;
        due.session = aged || signs.worn;
        if unanswered.is_some_and(|since| now_ms >= since + UNANSWERED_MS) {
            self.unanswered_since = Some(now_ms); // and again after as long
            due.session = true;
        }
        let quiet = |seconds: u16| now_ms >= self.traversed_ms + u64::from(seconds) * 1000;
        due.keepalive = owes.is_some_and(|since| now_ms >= since + KEEPALIVE_MS) || keepalive.is_some_and(quiet);
        due
    }
}
