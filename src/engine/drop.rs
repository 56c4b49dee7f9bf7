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
    /// An ICMP redirect or a router advertisement: a workload does not steer another's routes.
    RogueIcmpOut = "rogue_icmp_out", Outbound;
    /// The source address does not belong to this node: the receiver would refuse it.
    SourceNotOurs = "source_not_ours", Outbound;
    /// No peer has the destination.
    NoRoute = "no_route", Outbound;
    /// The peer has stopped answering; the sender was told.
    PeerDown = "peer_down", Outbound;
    /// Longer than the path to the peer takes, and not to be fragmented; the sender was told.
    PacketTooBig = "packet_too_big", Outbound;
    /// The peer is to be encrypted, and no session came up in time, or too much waited for it.
    NoSession = "no_session", Outbound;
    /// The underlay has no way to the peer, or refused the datagram.
    UdpSendFailed = "udp_send_failed", Outbound;
    /// The underlay's send buffer stayed full.
    UdpBufferFull = "udp_buffer_full", Outbound;

    /// The datagram's source address is no member's.
    UnknownSource = "unknown_source", Inbound;
    /// The datagram did not fit the receive buffer.
    TruncatedDatagram = "truncated_datagram", Inbound;
    /// A WireGuard message type with a wrong length.
    WireguardMalformed = "wireguard_malformed", Inbound;
    /// A WireGuard message of a session that does not exist (any more): its sender will make a new one.
    WireguardUnknownSession = "wireguard_unknown_session", Inbound;
    /// A WireGuard message that was forged or damaged.
    WireguardNotAuthentic = "wireguard_not_authentic", Inbound;
    /// A WireGuard message that came already, or more than 1,024 behind the newest.
    WireguardReplayed = "wireguard_replayed", Inbound;
    /// A handshake for another key than ours, from a key that is no member's, or that nobody asked for.
    HandshakeRefused = "handshake_refused", Inbound;
    /// A handshake that is older than one that was taken.
    HandshakeReplayed = "handshake_replayed", Inbound;
    /// More handshakes from one address than it may start.
    HandshakeLimited = "handshake_limited", Inbound;
    /// VXLAN from a peer that is to be encrypted.
    ClearFromEncryptedPeer = "clear_from_encrypted_peer", Inbound;
    /// Shorter than a VXLAN header, or without the I flag.
    BadVxlanHeader = "bad_vxlan_header", Inbound;
    /// Another VXLAN network.
    WrongVni = "wrong_vni", Inbound;
    /// A BFD packet in the clear without authentication, or by another key than ours.
    BfdNotAuthentic = "bfd_not_authentic", Inbound;
    /// An authenticated BFD packet that came already, or whose number is too far ahead.
    BfdReplayed = "bfd_replayed", Inbound;
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
    /// An ICMP redirect or a router advertisement: a peer does not steer our routes.
    RogueIcmpIn = "rogue_icmp_in", Inbound;
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
