//! The peer table: an immutable snapshot that says where a destination lives, who a datagram's source is and what this
//! node owns.
//!
//! A table is built whole from a node list and swapped in whole; it never changes, so that workers read it without a
//! lock. It does not know where the list came from, nor sockets.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use foldhash::fast::FixedState;
use ipnet::IpNet;

use super::stats::PeerStats;
use super::tunnel::{self, Identity, Tunnel};
use crate::health::path::Bounds;
use crate::health::peer::Liveness;
use crate::key::PublicKey;
use crate::node::{Mac, NodeName, Vni};
use crate::wire::transport::UDP_LEN;
use crate::wire::{bfd, ethernet, ip, vxlan};

/// Bytes that VXLAN puts before an inner IP packet: its own header and the inner Ethernet header.
pub const ENCAPSULATION: usize = vxlan::HEADER_LEN + ethernet::HEADER_LEN;

/// A peer's place in [`Tables::peers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerIndex(pub u32);

impl PeerIndex {
    /// No peer: a place that no table has.
    pub const NOBODY: PeerIndex = PeerIndex(u32::MAX);
}

/// What the engine knows of a peer.
#[derive(Debug, Clone)]
pub struct PeerSpec {
    /// Name in the node list.
    pub name: NodeName,
    /// Where datagrams to it go.
    pub endpoint: SocketAddr,
    /// All its underlay addresses: datagrams may come from them, and so may inner packets, since a node answers pods
    /// from its own address.
    pub underlay: Vec<IpAddr>,
    /// Its VTEP MAC.
    pub mac: Mac,
    /// What lives behind it.
    pub subnets: Vec<IpNet>,
    /// The longest inner packet that this node's own link takes.
    pub mtu: u16,
    /// Its counters.
    pub stats: Arc<PeerStats>,
    /// How it is encrypted; `None` for a peer without a key.
    pub tunnel: Option<Arc<Tunnel>>,
    /// After a change of keys, the tunnel before.
    pub former: Option<Arc<Tunnel>>,
    /// Whether it is alive; `None` where nobody watches.
    pub liveness: Option<Arc<Liveness>>,
}

/// What the engine knows of this node.
#[derive(Debug, Clone)]
pub struct Local {
    /// This node's VTEP MAC.
    pub mac: Mac,
    /// The network.
    pub vni: Vni,
    /// What lives behind this node.
    pub subnets: Vec<IpNet>,
    /// Its addresses: on the underlay and on the TUN device.
    pub addresses: Vec<IpAddr>,
    /// The TUN device's MTU.
    pub mtu: u16,
    /// This node's keys; without them no peer has a tunnel.
    pub identity: Option<Arc<Identity>>,
    /// The keys before the last change, while a peer may still use them.
    pub former_identity: Option<Arc<Identity>>,
    /// What BFD packets in the clear are authenticated by; `None`: by nothing.
    pub bfd_keys: Option<Arc<bfd::auth::Keys>>,
}

/// A peer in the table.
#[derive(Debug)]
pub struct Peer {
    /// What the table was built from.
    pub spec: PeerSpec,
    header: [u8; ENCAPSULATION],
}

impl Peer {
    /// The longest inner packet that the path takes: as it was measured, or what follows from this node's own link.
    #[inline]
    pub fn mtu(&self) -> u16 {
        self.spec.liveness.as_deref().map_or(self.spec.mtu, |liveness| liveness.mtu(self.spec.mtu))
    }

    /// Bytes around an inner packet on the underlay, outer IP header included, as packets to it travel now.
    pub fn overhead(&self) -> usize {
        let sealed = self.spec.tunnel.as_deref().is_some_and(Tunnel::seals);
        let ip = if self.spec.endpoint.is_ipv4() { ip::V4_MIN_LEN } else { ip::V6_LEN };
        ip + UDP_LEN + if sealed { tunnel::OVERHEAD } else { ENCAPSULATION }
    }

    /// How long packets to it could be, for the search of the path MTU.
    pub fn bounds(&self) -> Bounds {
        Bounds::new(self.overhead() as u16, self.spec.mtu, self.spec.endpoint.is_ipv6())
    }

    /// VXLAN and Ethernet header of a packet to this peer.
    #[inline]
    pub fn header(&self, v6: bool) -> [u8; ENCAPSULATION] {
        let mut header = self.header;
        let [.., hi, lo] = &mut header;
        [*hi, *lo] = if v6 { ethernet::IPV6 } else { ethernet::IPV4 }.to_be_bytes();
        header
    }
}

/// The snapshot.
#[derive(Debug)]
pub struct Tables {
    local: Local,
    /// The same as `local.subnets`.
    ours: Prefixes,
    peers: Vec<Peer>,
    routes: Lpm,
    sources: HashMap<IpAddr, PeerIndex, FixedState>,
    slots: HashMap<u32, PeerIndex, FixedState>,
    /// Who has a key, present or former.
    keys: HashMap<PublicKey, PeerIndex, FixedState>,
    has_clear_peers: bool,
}

impl Tables {
    /// Builds the table. The caller has validated the list: where subnets or addresses repeat, the last one wins.
    pub fn new(local: Local, specs: Vec<PeerSpec>) -> Self {
        let mut routes = Lpm::default();
        let mut sources = HashMap::with_capacity_and_hasher(specs.len(), FixedState::default());
        let mut peers = Vec::with_capacity(specs.len());
        let (mut slots, mut keys) = (HashMap::default(), HashMap::default());
        for (index, spec) in (0u32..).zip(specs) {
            for tunnel in spec.former.iter().chain(&spec.tunnel) {
                slots.insert(tunnel.slot(), PeerIndex(index));
                keys.extend(tunnel.keys().iter().map(|key| (*key, PeerIndex(index))));
            }
            for subnet in &spec.subnets {
                routes.insert(*subnet, PeerIndex(index));
            }
            for ip in &spec.underlay {
                sources.insert(*ip, PeerIndex(index));
            }
            let header = encapsulation(&local, &spec);
            peers.push(Peer { spec, header });
        }
        routes.sort();
        let ours = Prefixes::new(&local.subnets);
        let has_clear_peers = peers.iter().any(|peer: &Peer| peer.spec.tunnel.is_none());
        Tables { local, ours, peers, routes, sources, slots, keys, has_clear_peers }
    }

    /// A table without a peer.
    pub fn empty(local: Local) -> Self {
        Tables::new(local, Vec::new())
    }

    /// This node.
    #[inline]
    pub fn local(&self) -> &Local {
        &self.local
    }

    /// All peers.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// The peer at that place.
    #[inline]
    pub fn peer(&self, index: PeerIndex) -> Option<&Peer> {
        self.peers.get(index.0 as usize)
    }

    /// The peer with the longest prefix that holds `destination`.
    #[inline]
    pub fn route(&self, destination: IpAddr) -> Option<PeerIndex> {
        self.routes.get(destination)
    }

    /// The member whose underlay address this is.
    #[inline]
    pub fn source(&self, underlay: IpAddr) -> Option<PeerIndex> {
        self.sources.get(&underlay).copied()
    }

    /// Whom a WireGuard session index belongs to, and which of the peer's lanes.
    #[inline]
    pub fn session(&self, index: u32) -> Option<(PeerIndex, &Tunnel, usize)> {
        let (slot, lane) = tunnel::place(index);
        let index = *self.slots.get(&slot)?;
        let PeerSpec { tunnel, former, .. } = &self.peer(index)?.spec;
        let tunnel = tunnel.iter().chain(former).find(|tunnel| tunnel.slot() == slot)?;
        Some((index, tunnel, lane))
    }

    /// Whom an initiation concerns: the key that it comes from, and our keys and lane that it is for.
    pub fn answerer(&self, key: &PublicKey, ours: &Arc<Identity>, lane: usize) -> Option<(PeerIndex, &Tunnel)> {
        let index = *self.keys.get(key)?;
        let PeerSpec { tunnel, former, .. } = &self.peer(index)?.spec;
        let tunnel = tunnel.iter().chain(former).find(|tunnel| tunnel.answers(ours, key, lane))?;
        Some((index, tunnel))
    }

    /// The peer's tunnel, if it has one.
    #[inline]
    pub fn tunnel(&self, peer: PeerIndex) -> Option<&Tunnel> {
        self.peer(peer)?.spec.tunnel.as_deref()
    }

    /// The peer's liveness, if anybody watches it.
    #[inline]
    pub fn liveness(&self, peer: PeerIndex) -> Option<&Liveness> {
        self.peer(peer)?.spec.liveness.as_deref()
    }

    /// Whether any peer has a tunnel.
    #[inline]
    pub fn has_tunnels(&self) -> bool {
        !self.slots.is_empty()
    }

    /// Whether any peer has none.
    pub fn has_clear_peers(&self) -> bool {
        self.has_clear_peers
    }

    /// Whether a packet from `source` may come from this node.
    #[inline]
    pub fn is_ours(&self, source: IpAddr) -> bool {
        self.ours.contains(source) || self.local.addresses.contains(&source)
    }

    /// Whether a packet to `destination` may end at or behind this node.
    #[inline]
    pub fn is_behind_us(&self, destination: IpAddr) -> bool {
        self.ours.contains(destination)
    }

    /// Whether a packet from `source` may come from that peer.
    #[inline]
    pub fn may_send(&self, index: PeerIndex, source: IpAddr) -> bool {
        self.routes.get(source) == Some(index) || self.peer(index).is_some_and(|p| p.spec.underlay.contains(&source))
    }
}

/// A few prefixes as masks and networks: each packet is looked for here, and making the mask out of the prefix length
/// each time was a quarter of a small packet's way out.
#[derive(Debug)]
struct Prefixes {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl Prefixes {
    fn new(nets: &[IpNet]) -> Self {
        let mut prefixes = Prefixes { v4: Vec::new(), v6: Vec::new() };
        for net in nets {
            match net {
                IpNet::V4(net) => prefixes.v4.push((net.netmask().to_bits(), net.network().to_bits())),
                IpNet::V6(net) => prefixes.v6.push((net.netmask().to_bits(), net.network().to_bits())),
            }
        }
        prefixes
    }

    #[inline]
    fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.iter().any(|(mask, net)| ip.to_bits() & mask == *net),
            IpAddr::V6(ip) => self.v6.iter().any(|(mask, net)| ip.to_bits() & mask == *net),
        }
    }
}

fn encapsulation(local: &Local, spec: &PeerSpec) -> [u8; ENCAPSULATION] {
    let mut header = [0; ENCAPSULATION];
    let vxlan = vxlan::Header::new(local.vni.get());
    let [a, b, c] = vxlan.vni;
    let parts = [vxlan.flags, 0, 0, 0, a, b, c, 0].into_iter().chain(spec.mac.0).chain(local.mac.0);
    for (to, from) in header.iter_mut().zip(parts) {
        *to = from;
    }
    header
}

/// Longest prefix match: a hash table for each prefix length in use, longest first.
///
/// Clusters use one or two lengths a family, so that a look-up is one or two probes however many peers there are; a list
/// that uses every length costs 33 or 129 probes, not a wrong answer.
#[derive(Debug, Default)]
struct Lpm {
    v4: Vec<Length<u32>>,
    v6: Vec<Length<u128>>,
}

#[derive(Debug)]
struct Length<K> {
    mask: K,
    nets: HashMap<K, PeerIndex, FixedState>,
}

impl Lpm {
    fn insert(&mut self, net: IpNet, peer: PeerIndex) {
        match net {
            IpNet::V4(net) => insert(&mut self.v4, net.netmask().to_bits(), net.network().to_bits(), peer),
            IpNet::V6(net) => insert(&mut self.v6, net.netmask().to_bits(), net.network().to_bits(), peer),
        }
    }

    fn sort(&mut self) {
        self.v4.sort_by_key(|length| std::cmp::Reverse(length.mask));
        self.v6.sort_by_key(|length| std::cmp::Reverse(length.mask));
    }

    #[inline]
    fn get(&self, ip: IpAddr) -> Option<PeerIndex> {
        match ip {
            IpAddr::V4(ip) => get(&self.v4, Ipv4Addr::to_bits(ip)),
            IpAddr::V6(ip) => get(&self.v6, Ipv6Addr::to_bits(ip)),
        }
    }
}

fn insert<K: Copy + Eq + Hash>(lengths: &mut Vec<Length<K>>, mask: K, net: K, peer: PeerIndex) {
    match lengths.iter_mut().find(|length| length.mask == mask) {
        Some(length) => _ = length.nets.insert(net, peer),
        None => {
            let mut nets = HashMap::with_hasher(FixedState::default());
            nets.insert(net, peer);
            lengths.push(Length { mask, nets });
        }
    }
}

#[inline]
fn get<K: Copy + Eq + Hash + std::ops::BitAnd<Output = K>>(lengths: &[Length<K>], ip: K) -> Option<PeerIndex> {
    lengths.iter().find_map(|length| length.nets.get(&(ip & length.mask)).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, underlay: &str, subnets: &[&str]) -> PeerSpec {
        let name: NodeName = name.parse().unwrap();
        PeerSpec {
            mac: name.derived_mac(),
            name,
            endpoint: SocketAddr::new(underlay.parse().unwrap(), 8472),
            underlay: vec![underlay.parse().unwrap()],
            subnets: subnets.iter().map(|s| s.parse().unwrap()).collect(),
            mtu: 1450,
            stats: Arc::new(PeerStats::new(1)),
            tunnel: None,
            former: None,
            liveness: None,
        }
    }

    fn local() -> Local {
        Local {
            mac: Mac([2, 0, 0, 0, 0, 1]),
            vni: Vni::new(0x010203).unwrap(),
            subnets: vec!["10.42.1.0/24".parse().unwrap()],
            addresses: vec!["10.9.0.1".parse().unwrap()],
            mtu: 1450,
            identity: None,
            former_identity: None,
            bfd_keys: None,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_longest_prefix_wins() {
        let tables = Tables::new(
            local(),
            vec![
                spec("b", "10.9.0.2", &["10.42.0.0/16", "fd42::/32"]),
                spec("c", "10.9.0.3", &["10.42.2.0/24", "10.42.2.7/32"]),
                spec("d", "fd00::4", &["10.42.2.128/25", "fd42:0:1::/48"]),
            ],
        );
        let name = |text| tables.route(ip(text)).and_then(|i| tables.peer(i)).map(|p| p.spec.name.to_string());
        assert_eq!(name("10.42.9.9").as_deref(), Some("b"));
        assert_eq!(name("10.42.2.1").as_deref(), Some("c"));
        assert_eq!(name("10.42.2.200").as_deref(), Some("d"));
        assert_eq!(name("10.43.0.1"), None);
        assert_eq!(name("fd42:0:1::1").as_deref(), Some("d"));
        assert_eq!(name("fd42:0:2::1").as_deref(), Some("b"));
        assert_eq!(name("fd43::1"), None);
        assert_eq!(tables.source(ip("fd00::4")), Some(PeerIndex(2)));
        assert_eq!(tables.source(ip("10.9.0.9")), None);
    }

    #[test]
    fn who_may_send_what() {
        let tables = Tables::new(local(), vec![spec("b", "10.9.0.2", &["10.42.2.0/24"]), spec("c", "10.9.0.3", &[])]);
        let b = PeerIndex(0);
        assert!(tables.may_send(b, ip("10.42.2.9")));
        assert!(tables.may_send(b, ip("10.9.0.2")), "a node answers pods from its underlay address");
        assert!(!tables.may_send(PeerIndex(1), ip("10.42.2.9")));
        assert!(!tables.may_send(b, ip("10.42.1.9")));
        assert!(tables.is_ours(ip("10.42.1.9")) && tables.is_ours(ip("10.9.0.1")) && !tables.is_ours(ip("10.42.2.9")));
        assert!(tables.is_behind_us(ip("10.42.1.9")) && !tables.is_behind_us(ip("10.9.0.1")));
    }

    #[test]
    fn the_header_is_vxlan_then_ethernet() {
        let tables = Tables::new(local(), vec![spec("a", "10.9.0.2", &[])]);
        let header = tables.peer(PeerIndex(0)).unwrap().header(false);
        assert_eq!(&header, b"\x08\0\0\0\x01\x02\x03\0\x02\xca\x97\x81\x12\xca\x02\0\0\0\0\x01\x08\0");
        assert_eq!(&tables.peer(PeerIndex(0)).unwrap().header(true)[20..], b"\x86\xdd");
    }
}
