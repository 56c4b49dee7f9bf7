//! The words of `capture`: which packets, and those that were seen.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What a capture is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Ask {
    /// Begin; whoever captured before gets no more.
    Begin {
        /// Which packets.
        filter: FilterView,
    },
    /// What was seen since. Without such a question for some seconds the capture ends.
    Fetch {
        /// Which capture.
        id: u64,
    },
    /// End.
    End {
        /// Which capture.
        id: u64,
    },
    /// Keep the headers of the last so many packets from now on; 0: of none.
    Record {
        /// How many.
        packets: usize,
    },
    /// What the flight recorder holds.
    Recorded,
}

/// Which packets: all that is said has to hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FilterView {
    /// At the TUN device alone (`inner`), or on the underlay alone (`outer`).
    pub side: Option<SideView>,
    /// Of each of these one prefix holds the source or the destination.
    pub nets: Vec<Vec<IpNet>>,
    /// Each of these is the source or the destination port.
    pub ports: Vec<u16>,
    /// The IP protocol.
    pub protocol: Option<u8>,
    /// Those alone that were dropped.
    pub dropped: bool,
    /// Bytes of each packet that are kept.
    pub snaplen: usize,
}

/// Where a packet was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SideView {
    /// At the TUN device.
    Inner,
    /// On the underlay.
    Outer,
}

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CaptureView {
    /// The capture's number.
    pub id: u64,
    /// The TUN device's name.
    pub tun: String,
    /// Microseconds since meshd's start.
    pub now_us: u64,
    /// The packets, in order.
    pub packets: Vec<PacketView>,
    /// Packets that did not fit since the capture's beginning.
    pub lost: u64,
    /// Of the flight recorder: packets that it keeps at most; 0: it is off.
    #[serde(default)]
    pub keeps: usize,
}

/// A packet that was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketView {
    /// When, in microseconds since meshd's start.
    pub at_us: u64,
    /// Where.
    pub side: SideView,
    /// On its way to a peer, or from one.
    pub out: bool,
    /// Why it was dropped.
    pub dropped: Option<String>,
    /// Bytes that it has.
    pub length: u32,
    /// The first of them, from the IP header on, in base64.
    pub bytes: String,
}
