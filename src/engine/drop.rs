//! Why a packet was discarded. A drop is a value: each has a name that is a counter, so that what went in is what came
//! out plus the drops.

/// Which journey a packet was on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the TUN device to a peer.
    Outbound,
    /// From a peer to the TUN device.
    Inbound,
}

macro_rules! drops {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $direction:ident;)*) => {
        /// A reason to discard a packet.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Drop { $($(#[$doc])* $variant,)* }

        impl Drop {
            /// Every reason, in the order of the journeys.
            pub const ALL: &[Drop] = &[$(Drop::$variant,)*];

            /// The counter's name: stable, scripts rely on it.
            pub fn name(self) -> &'static str {
                match self { $(Drop::$variant => $name,)* }
            }

            /// The journey on which it happens.
            pub fn direction(self) -> Direction {
                match self { $(Drop::$variant => Direction::$direction,)* }
            }
        }
    };
}

drops! {
    /// What the TUN device delivered is no IP packet.
    MalformedPacket = "malformed_packet", Outbound;
    /// The TUN device's offload header contradicts the packet behind it.
    MalformedOffload = "malformed_offload", Outbound;
    /// A multicast, broadcast or link-local destination: the overlay is layer 3 and carries unicast.
    Multicast = "multicast", Outbound;
    /// The source address does not belong to this node: the receiver would refuse it.
    SourceNotOurs = "source_not_ours", Outbound;
    /// No peer has the destination.
    NoRoute = "no_route", Outbound;
    /// Longer than the path to the peer takes, and not to be fragmented; the sender was told.
    PacketTooBig = "packet_too_big", Outbound;
    /// The underlay has no way to the peer, or refused the datagram.
    UdpSendFailed = "udp_send_failed", Outbound;
    /// The underlay's send buffer stayed full.
    UdpBufferFull = "udp_buffer_full", Outbound;

    /// The datagram's source address is no member's.
    UnknownSource = "unknown_source", Inbound;
    /// The datagram did not fit the receive buffer.
    TruncatedDatagram = "truncated_datagram", Inbound;
    /// Shorter than a VXLAN header, or without the I flag.
    BadVxlanHeader = "bad_vxlan_header", Inbound;
    /// Another VXLAN network.
    WrongVni = "wrong_vni", Inbound;
    /// The inner frame is addressed to another VTEP.
    BadInnerMac = "bad_inner_mac", Inbound;
    /// The inner frame carries neither IPv4 nor IPv6.
    InnerNotIp = "inner_not_ip", Inbound;
    /// The inner frame's IP packet is cut off or contradicts itself.
    BadInnerPacket = "bad_inner_packet", Inbound;
    /// The inner source does not belong to the peer that sent it.
    InnerSourceNotAllowed = "inner_source_not_allowed", Inbound;
    /// The inner destination is not of this node.
    InnerDestinationNotOurs = "inner_destination_not_ours", Inbound;
    /// The outer header says "congestion experienced", the inner transport cannot be told (RFC 6040 §4.2).
    EcnNotCapable = "ecn_not_capable", Inbound;
    /// The TUN device refused the packet.
    TunWriteFailed = "tun_write_failed", Inbound;
}

/// How many reasons there are.
pub const COUNT: usize = Drop::ALL.len();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_in_snake_case() {
        let mut names: Vec<_> = Drop::ALL.iter().map(|d| d.name()).collect();
        assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), COUNT);
        assert!(Drop::ALL.iter().enumerate().all(|(i, d)| *d as usize == i));
    }
}
