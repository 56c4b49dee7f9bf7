//! Authentication of BFD control packets: Keyed SHA1 and Meticulous Keyed SHA1 (RFC 5880 §4.4 and §6.7.4).
//!
//! ```text
//! |   Auth Type   |   Auth Len    |  Auth Key ID  |   Reserved    |
//! |                        Sequence Number                        |
//! |                  Auth Key/Hash, 20 bytes …                    |
//! ```
//!
//! Owns the keys and what they prove; whether a sequence number is in its window is the session's matter.

use std::fmt;

use sha1::{Digest, Sha1};
use subtle::ConstantTimeEq;
use zerocopy::byteorder::network_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
use zeroize::Zeroizing;

/// Bytes of the section.
pub const LEN: usize = 28;
/// The longest key, in bytes: as long as the digest.
pub const MAX_KEY: usize = 20;
/// More lines than a change of keys needs are a mistake.
const MAX_KEYS: usize = 8;

const KEYED: u8 = 4;
const METICULOUS: u8 = 5;

/// A packet's place among those of its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// A number that grows, in a circle.
    pub number: u32,
    /// With each packet; else only now and then.
    pub meticulous: bool,
}

/// The keys that this node knows: the first one it sends by, all of them it takes.
pub struct Keys(Vec<Option<Key>>);

/// A key. Wiped when it goes, and never shown.
pub struct Key {
    id: u8,
    /// Filled up with zeros.
    secret: Zeroizing<[u8; MAX_KEY]>,
}

/// Why a text holds no keys. Says nothing of what stands there, which may be a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadKeys {
    /// There is none.
    #[error("there is no key in it; a line is `ID KEY`, as in `1 hex:` and 40 hexadecimal digits")]
    Empty,
    /// That line is none.
    #[error("line {0} is no key: expected are an ID of 0 to 255, a blank and the key, or `none` for packets without")]
    Line(usize),
    /// That line's key has another length, or is not what it says.
    #[error(
        "the key in line {0} is neither 1 to 20 printable characters without a blank nor `hex:` and 2 to 40 digits"
    )]
    Key(usize),
    /// Two lines have that ID, or none of two.
    #[error("line {0} has the ID of a line above; give each key its own")]
    Twice(usize),
    /// Nobody needs so many.
    #[error("there are more than 8 lines; a change of keys takes two")]
    TooMany,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    kind: u8,
    length: u8,
    key_id: u8,
    reserved: u8,
    sequence: U32,
    digest: [u8; MAX_KEY],
}

impl Keys {
    /// Reads lines of `ID KEY`, or `none`; empty ones and those that start with `#` are for people.
    pub fn parse(text: &str) -> Result<Keys, BadKeys> {
        let mut keys: Vec<Option<Key>> = Vec::new();
        for (number, line) in (1..).zip(text.lines()).map(|(number, line)| (number, line.trim())) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key = match line {
                "none" => None,
                line => Some(Key::parse(line, number)?),
            };
            let id = |key: &Option<Key>| key.as_ref().map(|key| key.id);
            if keys.iter().any(|other| id(other) == id(&key)) {
                return Err(BadKeys::Twice(number));
            }
            if keys.len() == MAX_KEYS {
                return Err(BadKeys::TooMany);
            }
            keys.push(key);
        }
        if keys.is_empty() { Err(BadKeys::Empty) } else { Ok(Keys(keys)) }
    }

    /// The IDs, the one that is sent first; `None` stands for packets without authentication.
    pub fn ids(&self) -> impl Iterator<Item = Option<u8>> + '_ {
        self.0.iter().map(|key| key.as_ref().map(|key| key.id))
    }

    /// What packets are sent by; `None`: without authentication.
    pub(super) fn first(&self) -> Option<&Key> {
        self.0.first().and_then(Option::as_ref)
    }

    /// Whether packets without authentication are taken, too.
    pub fn accept_none(&self) -> bool {
        self.0.iter().any(Option::is_none)
    }

    /// What a whole packet proves, whose last part is the section; `None`: nothing.
    pub(super) fn check(&self, packet: &[u8]) -> Option<Sequence> {
        let (front, section) = packet.split_at_checked(super::LEN)?;
        let raw = Raw::ref_from_bytes(section).ok()?;
        if usize::from(raw.length) != LEN || !matches!(raw.kind, KEYED | METICULOUS) {
            return None;
        }
        let key = self.0.iter().flatten().find(|key| key.id == raw.key_id)?;
        let digest = key.digest(front, section)?;
        let authentic = bool::from(digest.ct_eq(&raw.digest));
        authentic.then(|| Sequence { number: raw.sequence.get(), meticulous: raw.kind == METICULOUS })
    }
}

impl Key {
    fn parse(line: &str, number: usize) -> Result<Key, BadKeys> {
        let (id, secret) = line.split_once(char::is_whitespace).ok_or(BadKeys::Line(number))?;
        let id = id.parse().map_err(|_| BadKeys::Line(number))?;
        let text = secret.trim_start().as_bytes();
        let mut secret = Zeroizing::new([0; MAX_KEY]);
        let written = match text.strip_prefix(b"hex:") {
            Some(digits) => {
                let nibble = |byte: u8| char::from(byte).to_digit(16).map(|nibble| nibble as u8);
                let (pairs, odd) = digits.as_chunks::<2>();
                let fits = odd.is_empty() && !pairs.is_empty() && pairs.len() <= MAX_KEY;
                let mut pairs = secret.iter_mut().zip(pairs);
                fits && pairs.all(|(to, [high, low])| {
                    nibble(*high).zip(nibble(*low)).map(|(high, low)| *to = high << 4 | low).is_some()
                })
            }
            None => {
                secret.iter_mut().zip(text).for_each(|(to, from)| *to = *from);
                (1..=MAX_KEY).contains(&text.len()) && text.iter().all(u8::is_ascii_graphic)
            }
        };
        if written { Ok(Key { id, secret }) } else { Err(BadKeys::Key(number)) }
    }

    /// Writes the section behind `front`.
    pub(super) fn seal(&self, front: &[u8], sequence: Sequence, section: &mut [u8]) {
        let Sequence { number, meticulous } = sequence;
        let kind = if meticulous { METICULOUS } else { KEYED };
        let Ok(raw) = Raw::mut_from_bytes(section) else { return };
        *raw = Raw {
            kind,
            length: LEN as u8,
            key_id: self.id,
            reserved: 0,
            sequence: number.into(),
            digest: [0; MAX_KEY],
        };
        if let Some(digest) = self.digest(front, section)
            && let Some(place) = section.get_mut(LEN - MAX_KEY..)
        {
            place.copy_from_slice(&digest);
        }
    }

    /// The digest of the packet with the key where the digest stands.
    fn digest(&self, front: &[u8], section: &[u8]) -> Option<[u8; MAX_KEY]> {
        let mut sum = Sha1::new();
        sum.update(front);
        sum.update(section.get(..LEN - MAX_KEY)?);
        sum.update(&self.secret[..]);
        Some(sum.finalize().into())
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}

/// `7, 6, none`: the IDs, for a log.
impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, id) in self.ids().enumerate() {
            let before = if at == 0 { "" } else { ", " };
            match id {
                Some(id) => write!(f, "{before}{id}")?,
                None => write!(f, "{before}none")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::wire::bfd::{Control, Diagnostic, Malformed, SEALED_LEN};

    fn keys(text: &str) -> Keys {
        Keys::parse(text).unwrap()
    }

    fn control() -> Control {
        let sequence = Some(Sequence { number: 0x0102_0304, meticulous: true });
        Control { diagnostic: Diagnostic::NONE, poll: false, sequence, ..super::super::tests::control() }
    }

    /// RFC 5880 §4.4 by hand; the digest is that of `printf … | sha1sum` over the packet with the key in its place.
    const SEALED: &[u8; SEALED_LEN] =
        b"\x20\xc4\x06\x34\x00\x00\x00\x01\x00\x00\x00\x02\x00\x02\x49\xf0\x00\x02\x49\xf0\0\0\0\0\
        \x05\x1c\x07\x00\x01\x02\x03\x04\
        \x0f\x9e\x71\x2a\x63\x3a\x88\xc0\xb6\x47\x86\xd1\x34\x13\x96\xa4\xcc\x96\xfd\x2e";

    #[test]
    fn literal_bytes() {
        let keys = keys("7 correct-horse\n");
        let (bytes, len) = control().sealed_bytes(Some(&keys));
        assert_eq!((&bytes, len), (SEALED, SEALED_LEN));
        assert_eq!(Control::parse(SEALED, Some(&keys)), Ok(control()));
    }

    #[test]
    fn nothing_else_is_authentic() {
        let keys = keys("7 correct-horse\n");
        for bit in 0..SEALED_LEN * 8 {
            let mut bytes = *SEALED;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Control::parse(&bytes, Some(&keys)).is_err(), "bit {bit}");
        }
        let mut longer = SEALED.to_vec();
        longer.push(0);
        assert!(Control::parse(&longer, Some(&keys)).is_ok(), "what follows is not its own");
        longer[3] += 1;
        assert_eq!(Control::parse(&longer, Some(&keys)), Err(Malformed::NotAuthentic));
        for other in ["7 correct-hors", "7 correct-horsf", "6 correct-horse", "none"] {
            let other = Keys::parse(other).unwrap();
            assert_eq!(Control::parse(SEALED, Some(&other)), Err(Malformed::NotAuthentic));
        }
        assert_eq!(Control::parse(SEALED, None), Err(Malformed::NotAuthentic), "which nobody here agreed to");
        let bare = control().bytes();
        assert_eq!(Control::parse(&bare, Some(&keys)), Err(Malformed::NotAuthentic));
        assert!(Control::parse(&bare, None).is_ok());
    }

    #[test]
    fn both_types_are_taken_and_keys_change_one_node_after_the_other() {
        let keyed = Control { sequence: Some(Sequence { number: 9, meticulous: false }), ..control() };
        let bare = Control { sequence: None, ..control() };
        let stages = ["1 old", "1 old\n2 new", "2 new\n1 old", "2 new"].map(keys);
        let begins = ["none\n1 old", "1 old\nnone", "1 old"].map(keys);
        for stages in [&stages[..], &begins[..]] {
            for (a, b) in stages.windows(2).map(|pair| (&pair[0], &pair[1])) {
                for (from, to) in [(a, b), (b, a), (a, a)] {
                    for sent in [control(), keyed] {
                        let (bytes, len) = sent.sealed_bytes(Some(from));
                        let wanted = if from.first().is_some() { sent } else { bare };
                        assert_eq!(Control::parse(&bytes[..len], Some(to)), Ok(wanted), "{from} to {to}");
                    }
                }
            }
        }
        let (bytes, len) = control().sealed_bytes(Some(&stages[0]));
        assert!(Control::parse(&bytes[..len], Some(&stages[3])).is_err(), "not two steps at once");
    }

    #[test]
    fn a_file_is_read_or_named_without_its_contents() {
        let good = keys("# the new one first\n\n 2  hex:00112233445566778899aabbccddeeff00112233\n255 x\nnone\n");
        assert_eq!(good.ids().collect::<Vec<_>>(), [Some(2), Some(255), None]);
        assert_eq!(
            (good.to_string().as_str(), format!("{good:?}").as_str()),
            ("2, 255, none", "[Some(2), Some(255), None]")
        );
        assert_eq!(good.first().unwrap().secret[..4], [0, 0x11, 0x22, 0x33]);
        for (text, error) in [
            ("", BadKeys::Empty),
            ("# x\n", BadKeys::Empty),
            ("1 a\nhunter22\n", BadKeys::Line(2)),
            ("256 hunter22", BadKeys::Line(1)),
            ("-1 hunter22", BadKeys::Line(1)),
            ("1 hunter22 hunter22", BadKeys::Key(1)),
            ("1 hunter22hunter22hunter22", BadKeys::Key(1)),
            ("1 hex:hunter22", BadKeys::Key(1)),
            ("1 hex:", BadKeys::Key(1)),
            ("1 hex:012", BadKeys::Key(1)),
            ("1 hunter22\n1 hunter23", BadKeys::Twice(2)),
            ("none\nnone", BadKeys::Twice(2)),
        ] {
            let found = Keys::parse(text).map(|_| ()).unwrap_err();
            assert_eq!(found, error, "{text}");
            assert!(!found.to_string().contains("hunter"));
        }
        let nine: String = (0..9).map(|id| format!("{id} x\n")).collect();
        assert_eq!(Keys::parse(&nine).map(|_| ()).unwrap_err(), BadKeys::TooMany);
    }
}
