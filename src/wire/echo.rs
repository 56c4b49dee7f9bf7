//! Probes of the path to a peer and the answers to them, as BFD echo packets (RFC 5880 §5: their contents are the sender's
//! matter) between meshd nodes.
//!
//! ```text
//! | 1 asks, 2 answers |   0   | what arrived  |
//! |             your discriminator            |
//! |                   number                  |
//! |                   number                  |
//! |                     0                     |
//! |                     0                     |
//! |     zeros up to the size of the probe …
//! ```
//!
//! Unlike RFC 5880's, they are not looped back whole: the answer is short and says what arrived, so that a probe tells of one
//! direction alone (the feedback that RFC 8899 §3 and §4.2 ask for), and its number tells it from all others (§4.1).

use zerocopy::byteorder::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of one without what fills it up: as many as a control packet has.
pub const LEN: usize = 24;

/// A probe, or an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo {
    /// It answers one.
    pub answer: bool,
    /// The receiver's discriminator of the BFD session between the two.
    pub yours: u32,
    /// What tells this probe from others; an answer quotes it.
    pub number: u64,
    /// In an answer: bytes of the inner IP packet that arrived.
    pub size: u16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    kind: u8,
    zero: u8,
    size: U16,
    yours: U32,
    number: U64,
    zeros: [u8; 8],
}

const ASKS: u8 = 1;
const ANSWERS: u8 = 2;

impl Echo {
    /// Reads what a UDP datagram carries; `None` for what meshd did not send.
    pub fn parse(bytes: &[u8]) -> Option<Echo> {
        let (raw, _) = Raw::ref_from_prefix(bytes).ok()?;
        let answer = match raw.kind {
            ASKS => false,
            ANSWERS => true,
            _ => return None,
        };
        Some(Echo { answer, yours: raw.yours.get(), number: raw.number.get(), size: raw.size.get() })
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; LEN] {
        let kind = if self.answer { ANSWERS } else { ASKS };
        let (size, yours, number) = (self.size.into(), self.yours.into(), self.number.into());
        zerocopy::transmute!(Raw { kind, zero: 0, size, yours, number, zeros: [0; 8] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_bytes() {
        let echo = Echo { answer: true, yours: 0x01020304, number: 5, size: 1450 };
        let bytes = b"\x02\0\x05\xaa\x01\x02\x03\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\0";
        assert_eq!(&echo.bytes(), bytes);
        assert_eq!(Echo::parse(bytes), Some(echo));
        assert_eq!(Echo::parse(&bytes[..23]), None);
        assert_eq!(Echo::parse(&[0; 24]), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..40)) {
            _ = Echo::parse(&bytes);
        }
    }
}
