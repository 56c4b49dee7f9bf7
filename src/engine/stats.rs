//! Counters: one padded block a thread, written by that thread alone and read by whoever asks.
//!
//! A counter has one writer, so adding is a load and a store: no locked instruction and no shared cache line on the way
//! of a packet. Readers may see one counter a batch earlier than its neighbour; at rest the sums are exact.

use std::sync::Arc;

use crossbeam::utils::CachePadded;

pub use self::counter::Counter;
use super::drop::{self, Drop};

mod counter;
/// What `counter` is made of; `tests/interleavings.rs` puts its own in this place.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $name { $($(#[$fdoc])* pub $field: Counter,)* }

        impl $name {
            /// The counters' values, by name.
            pub fn values(&self) -> [(&'static str, u64); [$(stringify!($field)),*].len()] {
                [$((stringify!($field), self.$field.get()),)*]
            }
        }
    };
}

counters! {
    /// What one worker did. "Packets" are inner packets; a super-packet counts as its segments.
    Flow {
        /// Packets read from the TUN device.
        tun_rx_packets,
        /// Their bytes.
        tun_rx_bytes,
        /// Packets written to the TUN device.
        tun_tx_packets,
        /// Their bytes.
        tun_tx_bytes,
        /// Datagrams received.
        udp_rx_packets,
        /// Their payload bytes.
        udp_rx_bytes,
        /// Datagrams sent.
        udp_tx_packets,
        /// Their payload bytes.
        udp_tx_bytes,
        /// Packets that meshd made itself on the way out: fragments beyond the first of a packet that it had to cut.
        originated_outbound,
        /// Packets that meshd made itself for the TUN device (ICMP errors).
        originated_inbound,
        /// Packets from the TUN device that meshd kept for itself.
        consumed_outbound,
        /// Datagrams that meshd kept for itself.
        consumed_inbound,
        /// Reads from the TUN device.
        tun_reads,
        /// Writes to the TUN device.
        tun_writes,
        /// Receive calls on UDP sockets that returned something.
        udp_recv_calls,
        /// Buffers that they filled; a buffer holds one datagram or, with GRO, many.
        udp_recv_buffers,
        /// Send calls on UDP sockets.
        udp_send_calls,
        /// Messages that they carried; a message is one datagram or, with GSO, many.
        udp_send_messages,
        /// Super-packets that left uncut, to be cut behind meshd.
        uncut_sends,
        /// Super-packets of more than 64 KiB that were written.
        big_writes,
        /// Packets from a kernel VXLAN device whose checksum was never computed, handed on to be completed.
        partial_csum_in,
        /// Times that another thread got a queue pair from this one.
        pairs_moved,
    }
}

/// One worker's counters.
#[derive(Debug)]
pub struct WorkerStats {
    /// What went by.
    pub flow: Flow,
    drops: [Counter; drop::COUNT],
}

impl Default for WorkerStats {
    fn default() -> Self {
        WorkerStats { flow: Flow::default(), drops: std::array::from_fn(|_| Counter::default()) }
    }
}

impl WorkerStats {
    /// Counts `packets` discarded packets.
    #[inline]
    pub fn drop(&self, reason: Drop, packets: u64) {
        if let Some(counter) = self.drops.get(reason as usize) {
            counter.add(packets);
        }
    }

    /// How many packets were discarded for this reason.
    pub fn drops(&self, reason: Drop) -> u64 {
        self.drops.get(reason as usize).map_or(0, Counter::get)
    }
}

/// All workers' counters.
#[derive(Debug, Clone)]
pub struct Stats(Arc<[CachePadded<WorkerStats>]>);

impl Stats {
    /// Counters for so many threads, all zero.
    pub fn new(threads: usize) -> Self {
        Stats((0..threads).map(|_| CachePadded::default()).collect())
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.0.len()
    }

    /// One worker's counters.
    pub fn worker(&self, index: usize) -> Option<&WorkerStats> {
        self.0.get(index).map(|padded| &**padded)
    }

    /// The sum of a counter over all workers.
    pub fn sum(&self, read: impl Fn(&WorkerStats) -> u64) -> u64 {
        self.0.iter().map(|worker| read(worker)).sum()
    }
}

counters! {
    /// What one worker exchanged with one peer: inner packets and bytes.
    PeerFlow {
        /// Packets sent.
        tx_packets,
        /// Bytes sent.
        tx_bytes,
        /// Packets received.
        rx_packets,
        /// Bytes received.
        rx_bytes,
        /// Milliseconds since the start of meshd when something valid came last, plus one; 0 for never.
        last_seen,
    }
}

/// One peer's counters, one padded block a worker. They outlive changes of the node list.
#[derive(Debug)]
pub struct PeerStats(Box<[CachePadded<PeerFlow>]>);

impl PeerStats {
    /// Counters for so many workers, all zero.
    pub fn new(workers: usize) -> Self {
        PeerStats((0..workers).map(|_| CachePadded::default()).collect())
    }

    /// One worker's block.
    #[inline]
    pub fn worker(&self, index: usize) -> Option<&PeerFlow> {
        self.0.get(index).map(|padded| &**padded)
    }

    /// The sum of a counter over all workers.
    pub fn sum(&self, read: impl Fn(&PeerFlow) -> u64) -> u64 {
        self.0.iter().map(|block| read(block)).sum()
    }

    /// When something valid came last, in milliseconds since the start of meshd.
    pub fn last_seen(&self) -> Option<u64> {
        self.0.iter().map(|block| block.last_seen.get()).max().and_then(|seen| seen.checked_sub(1))
    }
}
