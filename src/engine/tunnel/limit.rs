//! A budget of handshakes for each source address, for what boringtun's own limiter lets through.

use std::net::IpAddr;

/// How many handshakes one address may start: after a cookie a sender is known to be where it says, and boringtun's
/// limiter lets it through. Counts by a hash of the address; addresses that collide share a budget.
#[derive(Debug)]
pub struct SourceLimit {
    second: u64,
    counts: Box<[u8; SOURCES]>,
}

const SOURCES: usize = 4096;
/// Initiations that one address may have looked at a second. Each costs some 200 µs.
pub(super) const PER_SOURCE: u8 = 50;

impl Default for SourceLimit {
    fn default() -> Self {
        SourceLimit { second: 0, counts: Box::new([0; SOURCES]) }
    }
}

impl SourceLimit {
    /// Whether no more from this address may be looked at.
    pub fn is_spent(&mut self, source: IpAddr, now_ms: u64) -> bool {
        *self.count(source, now_ms) >= PER_SOURCE
    }

    /// Whether one more from this address may be looked at, which is counted.
    pub fn allows(&mut self, source: IpAddr, now_ms: u64) -> bool {
        let count = self.count(source, now_ms);
        *count = count.saturating_add(1);
        *count <= PER_SOURCE
    }

    fn count(&mut self, source: IpAddr, now_ms: u64) -> &mut u8 {
        if self.second != now_ms / 1000 {
            self.second = now_ms / 1000;
            self.counts.fill(0);
        }
        let bits = match source {
            IpAddr::V4(ip) => u64::from(ip.to_bits()),
            // whoever has an IPv6 address has 2^64 of them
            IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64,
        };
        let slot = bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        // the slot has twelve bits
        #[allow(clippy::indexing_slicing)]
        &mut self.counts[slot as usize % SOURCES]
    }
}
