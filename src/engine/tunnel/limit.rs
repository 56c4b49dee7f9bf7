//! Budgets of handshakes for each source address, for when many ask at once.

use std::net::IpAddr;

/// What one address may have in a second: cookies, which anybody can ask for in another's name, and handshakes, for which it
/// has proved by a cookie that it is where it says. Counts by a hash of the address; addresses that collide share a budget.
#[derive(Debug)]
pub struct SourceLimit {
    second: u64,
    cookies: Box<[u8; SOURCES]>,
    handshakes: Box<[u8; SOURCES]>,
}

const SOURCES: usize = 4096;
/// Of each. A handshake costs some 200 µs; a cookie is a datagram, and nobody is to be flooded with ours.
pub(super) const PER_SOURCE: u8 = 50;

impl Default for SourceLimit {
    fn default() -> Self {
        let none = || Box::new([0; SOURCES]);
        SourceLimit { second: 0, cookies: none(), handshakes: none() }
    }
}

impl SourceLimit {
    /// Whether no more cookies may go to this address.
    pub(super) fn is_spent(&mut self, source: IpAddr, now_ms: u64) -> bool {
        self.forget(now_ms);
        *count(&mut self.cookies, source) >= PER_SOURCE
    }

    /// A cookie goes to this address.
    pub(super) fn cookie(&mut self, source: IpAddr, now_ms: u64) {
        self.forget(now_ms);
        let count = count(&mut self.cookies, source);
        *count = count.saturating_add(1);
    }

    /// Whether one more handshake from this address may be looked at, which is counted.
    pub(super) fn allows(&mut self, source: IpAddr, now_ms: u64) -> bool {
        self.forget(now_ms);
        let count = count(&mut self.handshakes, source);
        *count = count.saturating_add(1);
        *count <= PER_SOURCE
    }

    fn forget(&mut self, now_ms: u64) {
        if self.second != now_ms / 1000 {
            self.second = now_ms / 1000;
            self.cookies.fill(0);
            self.handshakes.fill(0);
        }
    }
}

fn count(counts: &mut [u8; SOURCES], source: IpAddr) -> &mut u8 {
    let bits = match source {
        IpAddr::V4(ip) => u64::from(ip.to_bits()),
        // whoever has an IPv6 address has 2^64 of them
        IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64,
    };
    let slot = bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    // the slot has twelve bits
    #[allow(clippy::indexing_slicing)]
    &mut counts[slot as usize % SOURCES]
}
