//! The four messages of WireGuard (whitepaper §5.4): where their fields lie.
//!
//! Integers are little endian. Knows no meaning.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const INITIATION: u8 = 1;
pub(super) const RESPONSE: u8 = 2;
pub(super) const COOKIE: u8 = 3;
pub(super) const DATA: u8 = 4;

/// Both codes at the end of a handshake message.
pub(super) const MACS_LEN: usize = 32;

/// The first message: who wants a session.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Initiation {
    pub(super) kind: [u8; 4],
    pub(super) sender: U32,
    pub(super) ephemeral: [u8; 32],
    pub(super) sealed_static: [u8; 48],
    pub(super) sealed_stamp: [u8; 28],
    pub(super) mac1: [u8; 16],
    pub(super) mac2: [u8; 16],
}

/// The second: it is there.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Response {
    pub(super) kind: [u8; 4],
    pub(super) sender: U32,
    pub(super) receiver: U32,
    pub(super) ephemeral: [u8; 32],
    pub(super) sealed_nothing: [u8; 16],
    pub(super) mac1: [u8; 16],
    pub(super) mac2: [u8; 16],
}

/// Instead of an answer: prove first that you are where you say.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct CookieReply {
    pub(super) kind: [u8; 4],
    pub(super) receiver: U32,
    pub(super) nonce: [u8; 24],
    pub(super) sealed_cookie: [u8; 32],
}

/// What is before the ciphertext of a transport message.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct DataHeader {
    pub(super) kind: [u8; 4],
    pub(super) receiver: U32,
    pub(super) counter: U64,
}

pub(super) const fn kind(of: u8) -> [u8; 4] {
    [of, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_lengths_of_the_protocol() {
        let lengths =
            [size_of::<Initiation>(), size_of::<Response>(), size_of::<CookieReply>(), size_of::<DataHeader>()];
        assert_eq!(lengths, [148, 92, 64, 16]);
    }
}
