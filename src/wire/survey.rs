//! What one node asks another about the rest of the mesh, and the answer: whom it reaches, and how well.
//!
//! They travel as probes do (`wire::echo`), to BFD's echo port, and begin with the same 16 bytes:
//!
//! ```text
//! | 3 asks, 4 answers | wake | first entry    |
//! |             your discriminator            |
//! |                   number                  |
//! |                   number                  |
//! |   entries in all    |    entries in here  |
//! |                     0                     |
//! |      VTEP MAC                             |   an entry
//! |                     | state    | sealed   |
//! |    path MTU         |    0                |
//! |             round trip in µs              |
//! ```

use zerocopy::byteorder::network_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Entries of one answer: with them it fits every path.
pub const ENTRIES: usize = 64;

/// A question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// The receiver's discriminator of the BFD session between the two.
    pub yours: u32,
    /// What the answer has to quote.
    pub number: u64,
    /// The first entry that is wanted.
    pub first: u16,
    /// The receiver is to find out about all of its peers.
    pub wake: bool,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The receiver's discriminator of the BFD session between the two.
    pub yours: u32,
    /// As the question had it.
    pub number: u64,
    /// The first entry in here.
    pub first: u16,
    /// How many there are in all.
    pub total: u16,
    /// Entries, [`ENTRIES`] at most.
    pub entries: Vec<Entry>,
}

/// What the sender of an answer thinks of one of its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Which: its VTEP MAC.
    pub mac: [u8; 6],
    /// As BFD has it: 0 unknown, 1 up, 2 down.
    pub state: u8,
    /// Packets to it are encrypted.
    pub sealed: bool,
    /// The longest inner packet that reaches it.
    pub mtu: u16,
    /// Microseconds; 0: not measured.
    pub round_trip_us: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    kind: u8,
    wake: u8,
    first: U16,
    yours: U32,
    number: U64,
    total: U16,
    count: U16,
    zeros: [u8; 4],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    mac: [u8; 6],
    state: u8,
    sealed: u8,
    mtu: U16,
    zeros: [u8; 2],
    round_trip_us: U32,
}

const ASKS: u8 = 3;
const ANSWERS: u8 = 4;

impl Ask {
    /// Reads one.
    pub fn parse(bytes: &[u8]) -> Option<Ask> {
        let (head, _) = Head::ref_from_prefix(bytes).ok()?;
        let Head { wake, first, yours, number, .. } = head;
        (head.kind == ASKS).then(|| Ask {
            yours: yours.get(),
            number: number.get(),
            first: first.get(),
            wake: *wake != 0,
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        head(ASKS, self.wake, self.first, self.yours, self.number, (0, 0))
    }
}

impl Report {
    /// Reads one; what it lacks of its entries makes it none.
    pub fn parse(bytes: &[u8]) -> Option<Report> {
        let (head, rest) = Head::ref_from_prefix(bytes).ok()?;
        let count = usize::from(head.count.get());
        if head.kind != ANSWERS || count > ENTRIES {
            return None;
        }
        let mut report = Report {
            yours: head.yours.get(),
            number: head.number.get(),
            first: head.first.get(),
            total: head.total.get(),
            entries: Vec::with_capacity(count),
        };
        let mut rest = rest;
        for _ in 0..count {
            let (raw, behind) = RawEntry::ref_from_prefix(rest).ok()?;
            let RawEntry { mac, state, sealed, mtu, round_trip_us, .. } = raw;
            let (mtu, round_trip_us) = (mtu.get(), round_trip_us.get());
            report.entries.push(Entry { mac: *mac, state: *state, sealed: *sealed != 0, mtu, round_trip_us });
            rest = behind;
        }
        Some(report)
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let entries = self.entries.get(..self.entries.len().min(ENTRIES)).unwrap_or_default();
        let counts = (self.total, entries.len() as u16);
        let mut bytes = head(ANSWERS, false, self.first, self.yours, self.number, counts);
        for Entry { mac, state, sealed, mtu, round_trip_us } in entries {
            let (mac, state, sealed, zeros) = (*mac, *state, u8::from(*sealed), [0; 2]);
            let (mtu, round_trip_us) = ((*mtu).into(), (*round_trip_us).into());
            bytes.extend_from_slice(RawEntry { mac, state, sealed, mtu, zeros, round_trip_us }.as_bytes());
        }
        bytes
    }
}

fn head(kind: u8, wake: bool, first: u16, yours: u32, number: u64, (total, count): (u16, u16)) -> Vec<u8> {
    let head = Head {
        kind,
        wake: wake.into(),
        first: first.into(),
        yours: yours.into(),
        number: number.into(),
        total: total.into(),
        count: count.into(),
        zeros: [0; 4],
    };
    head.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_bytes() {
        let ask = Ask { yours: 1, number: 2, first: 64, wake: true };
        let bytes = b"\x03\x01\0\x40\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0";
        assert_eq!((ask.bytes(), Ask::parse(bytes)), (bytes.to_vec(), Some(ask)));
        let entry = Entry { mac: [2, 0, 0, 0, 0, 9], state: 1, sealed: true, mtu: 1440, round_trip_us: 131 };
        let report = Report { yours: 1, number: 2, first: 64, total: 65, entries: vec![entry] };
        let bytes = b"\x04\0\0\x40\0\0\0\x01\0\0\0\0\0\0\0\x02\0\x41\0\x01\0\0\0\0\
            \x02\0\0\0\0\x09\x01\x01\x05\xa0\0\0\0\0\0\x83";
        assert_eq!((report.bytes(), Report::parse(bytes)), (bytes.to_vec(), Some(report)));
        (0..bytes.len()).for_each(|len| assert_eq!(Report::parse(&bytes[..len]), None));
        assert_eq!((Report::parse(&ask.bytes()), Ask::parse(bytes)), (None, None));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80)) {
            _ = (Ask::parse(&bytes), Report::parse(&bytes));
        }
    }
}
