//! The counters: the answer to `meshctl stats`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What crossed one side: `rx` is what meshd read from it, `tx` what it wrote. A super-packet counts as its segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TrafficView {
    /// Packets read.
    pub rx_packets: u64,
    /// Bytes read.
    pub rx_bytes: u64,
    /// Packets written.
    pub tx_packets: u64,
    /// Bytes written.
    pub tx_bytes: u64,
}

/// The account of one direction: `in + originated = out + dropped + consumed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JourneyView {
    /// Packets read.
    #[serde(rename = "in")]
    pub entered: u64,
    /// Packets that meshd made itself.
    pub originated: u64,
    /// Packets written.
    pub out: u64,
    /// Packets discarded, each with a reason.
    pub dropped: u64,
    /// Packets that meshd kept for itself.
    pub consumed: u64,
}

/// Which offloads are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OffloadsView {
    /// TCP super-packets from and to the TUN device.
    pub tun_tso: bool,
    /// UDP super-packets from and to the TUN device.
    pub tun_uso: bool,
    /// Many datagrams in one send.
    pub udp_gso: bool,
    /// Many datagrams in one receive.
    pub udp_gro: bool,
}

/// Whether super-packets of some kind are used: those that leave uncut, or BIG TCP.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SuperPacketsView {
    /// They are.
    pub on: bool,
    /// Why they are not.
    pub why: String,
    /// How many there were.
    pub super_packets: u64,
}

/// System calls and what they carried, for batch sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BatchesView {
    /// Reads from the TUN device.
    pub tun_reads: u64,
    /// Packets in them.
    pub tun_read_packets: u64,
    /// Receive calls on UDP sockets.
    pub udp_recv_calls: u64,
    /// Datagrams in them.
    pub udp_recv_datagrams: u64,
    /// Send calls on UDP sockets.
    pub udp_send_calls: u64,
    /// Datagrams in them.
    pub udp_send_datagrams: u64,
    /// Writes to the TUN device.
    pub tun_writes: u64,
    /// Segments in them.
    pub tun_write_segments: u64,
}

/// The engine at work.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StatsView {
    /// meshd's release.
    pub version: String,
    /// This node's name.
    pub node: String,
    /// Since meshd started.
    pub uptime_ms: u64,
    /// The I/O back end in use.
    pub io: String,
    /// Worker threads.
    pub workers: u32,
    /// Which offloads are on.
    pub offloads: OffloadsView,
    /// Offload → why it is off, or why it was switched off.
    pub offload_reasons: BTreeMap<String, String>,
    /// Whether TCP super-packets for clear peers leave uncut, for the network card to cut. Most cannot.
    #[serde(default)]
    pub tunnel_gso: SuperPacketsView,
    /// Whether TCP for this node itself is handed over in super-packets of more than 64 KiB.
    #[serde(default)]
    pub big_tcp: SuperPacketsView,
    /// The TUN side.
    pub tun: TrafficView,
    /// The UDP side.
    pub udp: TrafficView,
    /// Every drop reason, also at 0, with what the kernel dropped before meshd.
    pub drops: BTreeMap<String, u64>,
    /// Packets that meshd made itself, both directions.
    pub originated: u64,
    /// Packets that meshd kept for itself, both directions.
    pub consumed: u64,
    /// The account of TUN → UDP.
    pub outbound: JourneyView,
    /// The account of UDP → TUN.
    pub inbound: JourneyView,
    /// System calls and what they carried.
    pub batches: BatchesView,
    /// Packets that a kernel VXLAN device sent with an unfinished checksum.
    pub partial_csum_in: u64,
    /// How often a queue pair went to another thread: to one for bulk traffic or back, or to another worker. Another release's
    /// meshd may not say it.
    #[serde(default)]
    pub pairs_moved: u64,
}
