//! What each drop reason means, and what usually mends it.
//!
//! Owns the words for people; the names are the engine's. A name that is not here is shown without words.

/// One line on a drop reason: what happened, and the usual fix.
pub fn explain(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "no_route" => "no node has the destination in its subnets: check the destination, or the node list",
        "peer_down" => {
            "the peer does not answer, so the sender was told at once: see whether that node runs and is reached"
        }
        "packet_too_big" => {
            "larger than the path to the peer: the sender was told; if it goes on, let ICMP through, or lower `mtu`"
        }
        "malformed_packet" => "an application sent something that is no valid IP packet: look at raw-socket users here",
        "multicast" => {
            "multicast and broadcast do not cross the mesh: use unicast (mDNS, DHCP and the like stay local)"
        }
        "rogue_icmp_out" => "a workload here sent an ICMP redirect or a router advertisement: look at raw-socket users",
        "rogue_icmp_in" => {
            "a peer let an ICMP redirect or a router advertisement through, which meshd does not: look at that node"
        }
        "unknown_source" => {
            "a datagram from an address that is no member's: a node missing from the list, NAT between nodes, or a \
             stranger (let only nodes reach the port)"
        }
        "truncated_datagram" => "too short for its headers: something other than VXLAN sends to the port",
        "bad_vxlan_header" => "no VXLAN (RFC 7348): something else sends to the port, or a peer is misconfigured",
        "wrong_vni" => "another VXLAN network: give all nodes the same `vni`",
        "bfd_not_authentic" => {
            "BFD without authentication, or by a key that is not known here: give all nodes in the clear the same keys in \
             `bfd-auth-key-file`; if they have, somebody forges"
        }
        "bfd_replayed" => "a BFD packet again, or one out of its window: a duplicating network, or a replay",
        "bad_inner_mac" => {
            "for another VTEP's MAC: a kernel peer's FDB or ARP entry is stale, or `mac` in the nodes-file is wrong"
        }
        "inner_not_ip" => "neither IPv4 nor IPv6 inside (ARP, for one): mesh0 is layer 3; give kernel peers static ARP",
        "bad_inner_packet" => "the packet inside is damaged: look for a faulty NIC offload at the sender",
        "inner_source_not_allowed" => {
            "the packet inside comes from an address that is not its sender's: correct that node's `subnets`, or \
             masquerade there"
        }
        "inner_destination_not_ours" => {
            "the packet inside is for another node: the sender's node list is older than ours, or differs"
        }
        "no_session" => {
            "an encrypted peer did not answer a handshake in 5 s: it is down, its key in the list is another, or UDP is \
             blocked"
        }
        "wireguard_malformed" => "a WireGuard message of a wrong length: garbage, or a stranger",
        "wireguard_unknown_session" => {
            "encrypted for a session that is gone, as after a restart: a new one is made by itself; if it goes on, a \
             stranger sends"
        }
        "wireguard_not_authentic" => "forged or damaged on the way: somebody interferes, or a NIC corrupts",
        "wireguard_replayed" => "the same message again, or far too late: a duplicating network, or a replay",
        "handshake_refused" => {
            "a handshake by a key that is no member's, or for another key than ours: compare `meshctl key show` with \
             the node lists"
        }
        "handshake_replayed" => {
            "a handshake older than the last one: a replay, or that peer's clock was set back (we start one ourselves)"
        }
        "handshake_limited" => "more than 50 handshakes a second from one address: a flood",
        "clear_from_encrypted_peer" => {
            "VXLAN in the clear from a peer that is to be encrypted: its configuration differs, or somebody forges"
        }
        "udp_send_failed" => {
            "the kernel refused the datagram: check the underlay's route and the firewall's output rules"
        }
        "udp_buffer_full" => "the send queue was full: the underlay is slower than the traffic",
        "tun_write_failed" => "the kernel refused the packet: check that the TUN device is up",
        "udp_queue_overflow" => {
            "the kernel's receive queue overflowed: raise net.core.rmem_max and restart meshd, or give it more CPU"
        }
        "tun_queue_overflow" => {
            "the TUN queue overflowed: applications send faster than meshd may run; give it more CPU"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_reasons_have_one_line_and_others_none() {
        let known = "no_route peer_down packet_too_big malformed_packet multicast rogue_icmp_out rogue_icmp_in unknown_source truncated_datagram \
            bad_vxlan_header wrong_vni bad_inner_mac inner_not_ip bad_inner_packet inner_source_not_allowed \
            inner_destination_not_ours udp_send_failed udp_buffer_full tun_write_failed udp_queue_overflow \
            tun_queue_overflow no_session wireguard_malformed wireguard_unknown_session wireguard_not_authentic \
            wireguard_replayed handshake_refused handshake_replayed handshake_limited clear_from_encrypted_peer";
        for reason in known.split_whitespace() {
            let line = explain(reason).unwrap_or_else(|| panic!("{reason} has no words"));
            assert!(!line.contains('\n') && line.len() < 160, "{reason}: {line}");
        }
        assert_eq!(explain("from_the_future"), None);
    }
}
