//! The reference model: what a node knows, and what therefore has to become of a packet. Lists instead of hash tables,
//! one packet at a time, nothing joined.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::reference::{self, GSO_TCPV4, GSO_TCPV6, GSO_UDP, Look, TCP, UDP, VNET, be16, l4_end, look};

/// What one node knows of the mesh.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    pub(crate) mac: [u8; 6],
    pub(crate) vni: u32,
    pub(crate) subnets: Vec<IpNet>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) mtu: usize,
    pub(crate) peers: Vec<Peer>,
}

#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) endpoint: SocketAddr,
    pub(crate) underlay: Vec<IpAddr>,
    pub(crate) mac: [u8; 6],
    pub(crate) subnets: Vec<IpNet>,
    pub(crate) mtu: usize,
}

/// What has to become of a frame from the TUN device.
#[derive(Debug)]
pub(crate) struct Out {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) fate: Fate,
}

#[derive(Debug)]
pub(crate) enum Fate {
    /// Dropped for this reason; `answer` is the MTU that the sender is told.
    Drop { reason: &'static str, answer: Option<usize> },
    /// Sent to that peer as these packets, `extra` more than were read.
    Sent { peer: usize, packets: Vec<Vec<u8>>, extra: u64 },
}

/// A sound TCP segment with a payload, which nobody has signed.
fn may_be_cut(packet: &[u8], seen: &reference::Look) -> bool {
    if seen.protocol != TCP || seen.fragment || seen.total < seen.l4 + 20 {
        return false;
    }
    let end = l4_end(packet, seen);
    if end < seen.l4 + 20 || end >= seen.total || reference::l4_sum(packet, seen) != 0xffff {
        return false;
    }
    let (mut at, options) = (0, &packet[seen.l4 + 20..end]);
    while at < options.len() && options[at] != 0 {
        match (options[at], options.get(at + 1)) {
            (1, _) => at += 1,
            (19 | 29, _) | (_, None | Some(0 | 1)) => return false,
            (_, Some(len)) => at += usize::from(*len),
        }
    }
    at <= options.len()
}

impl View {
    fn route(&self, to: IpAddr) -> Option<usize> {
        let nets = self.peers.iter().enumerate().flat_map(|(i, peer)| peer.subnets.iter().map(move |net| (i, net)));
        nets.filter(|(_, net)| net.contains(&to)).max_by_key(|(_, net)| net.prefix_len()).map(|(i, _)| i)
    }

    fn ours(&self, ip: IpAddr) -> bool {
        self.subnets.iter().any(|net| net.contains(&ip))
    }

    /// VXLAN and Ethernet header towards a peer.
    pub(crate) fn header(&self, peer: usize, v6: bool) -> Vec<u8> {
        let mut out = vec![8, 0, 0, 0];
        out.extend(&self.vni.to_be_bytes()[1..]);
        out.push(0);
        out.extend(self.peers[peer].mac);
        out.extend(self.mac);
        out.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
        out
    }

    pub(crate) fn out(&self, frame: &[u8]) -> Out {
        let drop = |reason, packets, bytes: usize| Out {
            packets,
            bytes: bytes as u64,
            fate: Fate::Drop { reason, answer: None },
        };
        let parsed = frame.get(VNET..).and_then(|packet| Some((look(packet)?, packet)));
        let Some((seen, packet)) = parsed else { return drop("malformed_packet", 1, frame.len().saturating_sub(VNET)) };
        let packet = &packet[..seen.total];
        let Ok(work) = Work::of(&frame[..VNET], &seen, packet) else { return drop("malformed_offload", 1, seen.total) };
        let (mut ready, size) = match work {
            Work::Ready => (vec![packet.to_vec()], None),
            Work::Checksum { start, offset } => {
                let mut packet = packet.to_vec();
                let check = !reference::sum(&[&packet[start..]]);
                let check = if check == 0 && seen.protocol == UDP { 0xffff } else { check };
                packet[start + offset..start + offset + 2].copy_from_slice(&check.to_be_bytes());
                (vec![packet], None)
            }
            Work::Cut(size) => (reference::cut(packet, size), Some(size)),
        };
        let (count, bytes) = (ready.len() as u64, ready.iter().map(Vec::len).sum());
        if !carried(seen.destination) {
            return drop("multicast", count, bytes);
        }
        if steers_routes(packet, &seen) {
            return drop("rogue_icmp_out", count, bytes);
        }
        if !self.ours(seen.source) && !self.addresses.contains(&seen.source) {
            return drop("source_not_ours", count, bytes);
        }
        let Some(peer) = self.route(seen.destination) else { return drop("no_route", count, bytes) };
        let mtu = self.peers[peer].mtu;
        if ready.iter().any(|packet| packet.len() > mtu) {
            let head = l4_end(packet, &seen);
            match size {
                None if !seen.v6 && !seen.df => ready = reference::fragments(&ready[0], mtu),
                Some(_) if seen.protocol == TCP => ready = reference::cut(packet, mtu - head),
                // an IPv6 sender goes no lower
                None if seen.v6 && mtu < 1280 && packet.len() <= 1280 && may_be_cut(&ready[0], &seen) => {
                    ready = reference::cut(&ready[0], mtu - head);
                }
                _ => {
                    let reason = "packet_too_big";
                    let told = if seen.v6 { mtu.max(1280) } else { mtu };
                    let fate = Fate::Drop { reason, answer: may_be_answered(packet, &seen).then_some(told) };
                    return Out { packets: count, bytes: bytes as u64, fate };
                }
            }
        }
        let extra = ready.len() as u64 - count;
        Out { packets: count, bytes: bytes as u64, fate: Fate::Sent { peer, packets: ready, extra } }
    }

    /// What has to be written to the TUN device for a datagram, or why nothing. `inner_size`: it is a UDP super-packet
    /// that was never cut.
    pub(crate) fn arrive(
        &self,
        from: IpAddr,
        tos: u8,
        datagram: &[u8],
        inner_size: Option<usize>,
        truncated: bool,
    ) -> Result<(usize, Vec<Vec<u8>>), &'static str> {
        if let ([kind @ 1..=4, 0, 0, 0, ..], false) = (datagram, truncated) {
            // WireGuard, of which nobody here has a key
            return Err(match (kind, datagram.len()) {
                (1, 148) => "handshake_refused",
                (2, 92) | (3, 64) | (4, 32..) => "wireguard_unknown_session",
                _ => "wireguard_malformed",
            });
        }
        let peer = self.peers.iter().position(|peer| peer.underlay.contains(&from)).ok_or("unknown_source")?;
        if datagram.len() < 8 || datagram[0] & 8 == 0 {
            return Err("bad_vxlan_header");
        }
        if datagram[4..7] != self.vni.to_be_bytes()[1..] {
            return Err("wrong_vni");
        }
        let frame = &datagram[8..];
        if frame.len() < 14 {
            return Err("inner_not_ip");
        }
        if frame[..6] != self.mac && frame[..6] != [0xff; 6] {
            return Err("bad_inner_mac");
        }
        let kind = be16(frame, 12);
        if kind != 0x800 && kind != 0x86dd {
            return Err("inner_not_ip");
        }
        let seen = look(&frame[14..]).filter(|seen| seen.v6 == (kind == 0x86dd)).ok_or("bad_inner_packet")?;
        if self.route(seen.source) != Some(peer) && !self.peers[peer].underlay.contains(&seen.source) {
            return Err("inner_source_not_allowed");
        }
        if !self.ours(seen.destination) {
            return Err("inner_destination_not_ours");
        }
        let mut packet = frame[14..14 + seen.total].to_vec();
        if steers_routes(&packet, &seen) {
            return Err("rogue_icmp_in");
        }
        let ecn = match (seen.tos & 3, tos & 3) {
            (0, 3) => return Err("ecn_not_capable"),
            (1 | 2, 3) => 3,
            (2, 1) => 1,
            (inner, _) => inner,
        };
        set_ecn(&mut packet, &seen, ecn);
        Ok((peer, self.finish(packet, &seen, inner_size)))
    }

    /// Completes what a kernel never finished.
    fn finish(&self, mut packet: Vec<u8>, seen: &Look, inner_size: Option<usize>) -> Vec<Vec<u8>> {
        let header = if seen.protocol == TCP { 20 } else { 8 };
        if seen.fragment || !matches!(seen.protocol, TCP | UDP) || packet.len() < seen.l4 + header {
            return vec![packet];
        }
        let end = l4_end(&packet, seen);
        let field = be16(&packet, seen.l4 + reference::check_offset(seen.protocol));
        let sum = reference::pseudo(&packet, seen, packet.len() - seen.l4);
        let unfinished = field == sum || (seen.protocol == UDP && sum == 0 && field == 0xffff);
        let lies = end < seen.l4 + header || end > packet.len();
        if lies || !unfinished || reference::l4_sum(&packet, seen) == 0xffff || !header_is_good(&packet, seen) {
            return vec![packet];
        }
        match (seen.protocol, inner_size) {
            (UDP, Some(size)) if end + size < packet.len() => return reference::cut(&packet, size),
            (TCP, _) if packet.len() > self.mtu && self.mtu >= 2 * end => {
                return reference::cut(&packet, self.mtu - end);
            }
            _ => {}
        }
        reference::finish_l4(&mut packet);
        vec![packet]
    }
}

fn header_is_good(packet: &[u8], seen: &Look) -> bool {
    seen.v6 || reference::sum(&[&packet[..seen.l4]]) == 0xffff
}

/// What the offload header of a frame asks for.
enum Work {
    Ready,
    Checksum { start: usize, offset: usize },
    Cut(usize),
}

impl Work {
    fn of(vnet: &[u8], seen: &Look, packet: &[u8]) -> Result<Work, ()> {
        let number = |at: usize| usize::from(u16::from_ne_bytes([vnet[at], vnet[at + 1]]));
        let (size, start, offset) = (number(4), number(6), number(8));
        let needs = vnet[0] & 1 == 1;
        let protocol = match (vnet[1] & 0x7f, seen.v6) {
            (0, _) if !needs => return Ok(Work::Ready),
            (0, _) if start >= seen.l4 && start + offset + 2 <= seen.total => {
                return Ok(Work::Checksum { start, offset });
            }
            (GSO_TCPV4, false) | (GSO_TCPV6, true) => TCP,
            (GSO_UDP, _) => UDP,
            _ => return Err(()),
        };
        let header = if protocol == TCP { 20 } else { 8 };
        let agrees = needs
            && !seen.fragment
            && seen.protocol == protocol
            && start == seen.l4
            && offset == reference::check_offset(protocol)
            && size > 0
            && packet.len() >= seen.l4 + header
            && l4_end(packet, seen) >= seen.l4 + header
            && l4_end(packet, seen) <= packet.len();
        if agrees { Ok(Work::Cut(size)) } else { Err(()) }
    }
}

fn carried(to: IpAddr) -> bool {
    match to {
        IpAddr::V4(ip) => !(ip.octets()[0] >= 224 || ip.is_loopback() || ip.octets()[0] == 0 || ip.is_link_local()),
        IpAddr::V6(ip) => !(ip.is_multicast() || ip.is_unicast_link_local() || ip.is_loopback() || ip.is_unspecified()),
    }
}

/// RFC 1122 §3.2.2, RFC 4443 §2.4: no error about an error or a later fragment.
fn may_be_answered(packet: &[u8], seen: &Look) -> bool {
    let kind = packet.get(seen.l4).copied();
    match seen.protocol {
        1 => matches!(kind, Some(0 | 8 | 9 | 10 | 13..=18)) && be16(packet, 6) & 0x1fff == 0,
        58 => matches!(kind, Some(128..)),
        _ => seen.v6 || be16(packet, 6) & 0x1fff == 0,
    }
}

/// Redirects and router advertisements; IPv4 also where the rest of the message comes in later fragments.
fn steers_routes(packet: &[u8], seen: &Look) -> bool {
    match (seen.v6, seen.protocol, packet.get(seen.l4)) {
        (false, 1, Some(5 | 9)) => be16(packet, 6) & 0x1fff == 0,
        (true, 58, Some(134 | 137)) => !seen.fragment,
        _ => false,
    }
}

fn set_ecn(packet: &mut [u8], seen: &Look, ecn: u8) {
    if seen.tos & 3 == ecn {
        return;
    }
    if seen.v6 {
        packet[1] = packet[1] & 0xcf | ecn << 4;
        return;
    }
    // a header checksum that was wrong stays wrong: RFC 1624 §3
    let old = be16(packet, 0);
    packet[1] = packet[1] & 0xfc | ecn;
    let parts = [!be16(packet, 10), !old, be16(packet, 0)].map(u16::to_be_bytes);
    let check = !reference::sum(&[&parts.concat()]);
    packet[10..12].copy_from_slice(&check.to_be_bytes());
}
