//! Randomness, from the system.

use ring::rand::{SecureRandom, SystemRandom};

/// Random bytes, fit for keys.
///
/// # Panics
///
/// Where the kernel has no randomness to give, which on Linux does not happen after boot.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the kernel gives randomness");
    bytes
}

/// An identifier that nobody else has or guesses: 32 hexadecimal digits.
pub fn id() -> String {
    hex(&bytes::<16>())
}

/// A number below `bound` (at least 1), good enough to spread load.
pub fn below(bound: u64) -> u64 {
    u64::from_le_bytes(bytes()) % bound.max(1)
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
