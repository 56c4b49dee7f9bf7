//! What a node list means for this node: the peer table, the routes, the addresses, the MTU.
//!
//! Pure: configuration, list and underlay in, one plan out. Does not know how any of it is put into effect.

use std::net::IpAddr;

use ipnet::IpNet;

use super::known::{Known, Reach, Wish};
use crate::config::{Config, Encryption, Mtu, OverlayAddress};
use crate::engine::tables::{ENCAPSULATION, Local, PeerSpec};
use crate::engine::tunnel;
use crate::key::PublicKey;
use crate::node::{Mac, Node, NodeList, NodeName, first_address};

/// Outer IP and UDP header, over IPv4 and IPv6: what any datagram costs.
const DATAGRAM_V4: u32 = 28;
const DATAGRAM_V6: u32 = 48;
/// Watched neighbours on either side of the ring.
const NEIGHBOURS: usize = 3;
/// IPv6 does not work below (RFC 8200 §5).
const V6_MIN_MTU: u32 = 1280;

/// One of this node's underlay addresses and the MTU of its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carrier {
    /// The address.
    pub ip: IpAddr,
    /// The link's MTU.
    pub mtu: u32,
}

/// Everything that follows from a node list.
#[derive(Debug, Clone)]
pub struct Plan {
    /// This node's VTEP MAC.
    pub mac: Mac,
    /// Overlay addresses of the TUN device.
    pub overlay: Vec<IpAddr>,
    /// The TUN device's MTU.
    pub mtu: u32,
    /// This node's subnets.
    pub own_subnets: Vec<IpNet>,
    /// All nodes' subnets.
    pub subnets: Vec<IpNet>,
    /// What the engine knows of this node.
    pub local: Local,
    /// What the engine knows of the others.
    pub peers: Vec<PeerSpec>,
    /// Things that somebody should know.
    pub warnings: Vec<String>,
}

/// Why a node list does not fit this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// `address` names an address that is not this node's to give.
    #[error("`address: {0}` lies in no subnet of this node: choose one of its subnets' addresses, or `first`")]
    AddressNotOurs(IpAddr),
    /// No room for an inner packet.
    #[error("the underlay's MTU of {0} leaves less than 576 bytes for the overlay; raise it")]
    UnderlayTooSmall(u32),
    /// IPv6 subnets need 1,280 bytes.
    #[error(
        "the overlay has IPv6 subnets, which need an MTU of 1280 (RFC 8200 §5), but it is {0}: raise the underlay's MTU or `mtu`, or leave IPv6 subnets out"
    )]
    MtuBelowIpv6(u32),
    /// A node is to be encrypted, and nobody knows its key.
    #[error(
        "node `{0}` is to be encrypted (`encryption: wireguard`) and has no `public-key` in the node list: add it          (`meshctl key show` prints it there), or give the node `encryption: none`"
    )]
    NoPublicKey(NodeName),
    /// Peers would encrypt for somebody else.
    #[error(
        "the node list says that this node's {what} is {listed}, but its private key belongs to {ours}: correct the list,          or put the right key into {file}"
    )]
    AnotherKey {
        /// Which of the keys.
        what: String,
        /// What the list says.
        listed: PublicKey,
        /// What is true.
        ours: String,
        /// The private key's file.
        file: String,
    },
}

impl Plan {
    /// Whether the overlay's IPv6 works. A start is refused where it does not; an underlay that shrinks later must not
    /// take IPv4 along.
    pub fn carries_its_ipv6(&self) -> Result<(), PlanError> {
        if self.mtu < V6_MIN_MTU && self.subnets.iter().any(|net| matches!(net, IpNet::V6(_))) {
            return Err(PlanError::MtuBelowIpv6(self.mtu));
        }
        Ok(())
    }
}

/// Works out what `list` means for the node `own`, which is carried by `carriers`. `known` are the peers of the former
/// list: counters and sessions of those that stay are kept.
pub fn plan(
    config: &Config,
    list: &NodeList,
    own: &Node,
    carriers: &[Carrier],
    known: &mut Known,
) -> Result<Plan, PlanError> {
    let mut warnings = Vec::new();
    let mut ways = Vec::new();
    for node in list.nodes.iter().filter(|node| node.name != own.name) {
        match way(node, carriers) {
            Some(way) => ways.push((node, way)),
            None => warnings.push(format!(
                "node {} cannot be reached: its underlay has no address of a family that this node's node-ip has",
                node.name
            )),
        }
    }
    // an IPv4 packet has at most 65,535 bytes, whatever the link takes: the loopback device, which routed underlays use, says 65,536
    let longest = |carrier: &Carrier| if carrier.ip.is_ipv4() { carrier.mtu.min(65_535) } else { carrier.mtu };
    own_keys_are_ours(config, own, known)?;
    let mode = |node: &Node| node.encryption.unwrap_or(config.encryption);
    let has_tunnel = |node: &Node| known.identity().is_some() && !node.public_keys.is_empty();
    let encrypted = |node: &Node| mode(own) == Encryption::Wireguard && mode(node) == Encryption::Wireguard;
    if let Some((node, _)) = ways.iter().find(|(node, _)| encrypted(node) && !has_tunnel(node)) {
        let keyless = if node.public_keys.is_empty() { node } else { &own };
        return Err(PlanError::NoPublicKey(keyless.name.clone()));
    }
    // what a tunnel adds is more than what VXLAN does: a peer that may change from one to the other has room for both
    let room = |carrier: &Carrier, tunnel: bool| {
        let (mtu, v6) = (longest(carrier), carrier.ip.is_ipv6());
        if tunnel { tunnel_mtu(mtu, v6) } else { overlay_mtu(mtu, v6) }
    };
    let fits_all = ways.iter().map(|(node, (_, carrier))| room(carrier, has_tunnel(node))).min();
    let alone = || carriers.iter().map(|carrier| room(carrier, known.identity().is_some())).min();
    let path = fits_all.or_else(alone).unwrap_or(0).min(u32::from(u16::MAX));
    let mtu = match config.mtu {
        Mtu::Auto => path,
        Mtu::Fixed(mtu) => u32::from(mtu.get()),
    };
    if path < 576 {
        return Err(PlanError::UnderlayTooSmall(carriers.iter().map(|c| c.mtu).min().unwrap_or(0)));
    }
    let subnets: Vec<IpNet> = list.nodes.iter().flat_map(|node| node.subnets.iter().copied()).collect();
    if mtu > path {
        warnings.push(format!(
            "`mtu: {mtu}` is more than the underlay carries ({path}): longer packets are answered with \
             Fragmentation Needed; `mtu: auto` fits"
        ));
    }

    let overlay = overlay_addresses(&config.address, own)?;
    let addresses = carriers.iter().map(|carrier| carrier.ip).chain(overlay.iter().copied()).collect();
    let (identity, former_identity) = (known.identity().cloned(), known.former_identity().cloned());
    let local = Local {
        mac: own.mac,
        vni: config.vni,
        subnets: own.subnets.clone(),
        addresses,
        mtu: mtu as u16,
        identity,
        former_identity,
        bfd_keys: known.bfd_keys().cloned(),
    };
    // the other side knows no more of our lanes than our entry says
    let own_lanes = own.public_keys.len().max(1);
    let ring = ring(list, own);
    let peers: Vec<PeerSpec> = ways
        .into_iter()
        .map(|(node, (endpoint, carrier))| {
            let keys = node.public_keys.get(..own_lanes.min(node.public_keys.len())).unwrap_or_default();
            let preshared = node.preshared_key();
            let wish = Wish { keys, encrypted: encrypted(node), keepalive: node.keepalive, preshared };
            let Reach { stats, tunnel, former } = known.peer(&node.name, endpoint, wish);
            let liveness = known.liveness(&node.name, ring.contains(&&node.name));
            PeerSpec {
                name: node.name.clone(),
                endpoint,
                underlay: node.underlay_ips().collect(),
                mac: node.mac,
                subnets: node.subnets.clone(),
                mtu: room(&carrier, tunnel.is_some()).min(u32::from(u16::MAX)) as u16,
                stats,
                tunnel,
                former,
                liveness,
            }
        })
        .collect();
    known.retain(|name| peers.binary_search_by(|peer| peer.name.cmp(name)).is_ok());
    let own_subnets = own.subnets.clone();
    Ok(Plan { mac: own.mac, overlay, mtu, own_subnets, subnets, local, peers, warnings })
}

/// The nodes that this one watches whether or not there is traffic: those next to it in the ring of all names. Both ends of
/// such a pair see it that way, and everybody is watched by as many in a mesh of any size.
fn ring<'l>(list: &'l NodeList, own: &Node) -> Vec<&'l NodeName> {
    let nodes = &list.nodes; // sorted by name
    let before = nodes.iter().rev().skip_while(|node| node.name >= own.name).chain(nodes.iter().rev());
    let after = nodes.iter().skip_while(|node| node.name <= own.name).chain(nodes.iter());
    let others = |node: &&Node| node.name != own.name;
    let mut ring: Vec<&NodeName> = before.filter(others).take(NEIGHBOURS).map(|node| &node.name).collect();
    ring.extend(after.filter(others).take(NEIGHBOURS).map(|node| &node.name));
    ring
}

/// How a node is reached: the first of its addresses of a family that we have.
fn way(node: &Node, carriers: &[Carrier]) -> Option<(std::net::SocketAddr, Carrier)> {
    node.underlay.iter().find_map(|endpoint| {
        let carrier = carriers.iter().find(|carrier| carrier.ip.is_ipv4() == endpoint.is_ipv4())?;
        Some((*endpoint, *carrier))
    })
}

/// The longest inner packet that VXLAN carries over an underlay link of that MTU: 50 bytes less over IPv4, 70 over IPv6.
pub fn overlay_mtu(underlay_mtu: u32, is_v6: bool) -> u32 {
    room_in_datagram(underlay_mtu, is_v6, ENCAPSULATION)
}

/// The same where WireGuard carries it: 60 bytes less over IPv4, 80 over IPv6.
pub fn tunnel_mtu(underlay_mtu: u32, is_v6: bool) -> u32 {
    room_in_datagram(underlay_mtu, is_v6, tunnel::OVERHEAD)
}

/// What an outer IP and UDP header and `encapsulation` bytes leave of a link's MTU.
fn room_in_datagram(underlay_mtu: u32, is_v6: bool, encapsulation: usize) -> u32 {
    let headers = if is_v6 { DATAGRAM_V6 } else { DATAGRAM_V4 };
    underlay_mtu.saturating_sub(headers + encapsulation as u32)
}

/// Whether peers that follow the list encrypt for keys that this node has.
fn own_keys_are_ours(config: &Config, own: &Node, known: &Known) -> Result<(), PlanError> {
    let Some(identity) = known.identity() else { return Ok(()) };
    let ours = identity.public_keys();
    // a key that was just changed here is still to be changed in the list
    let before = known.former_identity().map(|former| former.public_keys()).unwrap_or_default();
    if own.public_keys.first().is_some_and(|listed| before.first() == Some(listed)) {
        return Ok(());
    }
    for (lane, listed) in own.public_keys.iter().enumerate() {
        // lanes beyond our workers are others' business: they are never used
        if ours.get(lane).is_some_and(|ours| ours != listed) || (lane == 0 && ours.is_empty()) {
            return Err(PlanError::AnotherKey {
                what: if lane == 0 { "`public-key`".to_owned() } else { format!("key of lane {lane}") },
                listed: *listed,
                ours: ours.get(lane).map(PublicKey::to_string).unwrap_or_default(),
                file: config.private_key_path().display().to_string(),
            });
        }
    }
    Ok(())
}

fn overlay_addresses(wanted: &OverlayAddress, own: &Node) -> Result<Vec<IpAddr>, PlanError> {
    let first_of = |v6: bool| own.subnets.iter().find(|net| matches!(net, IpNet::V6(_)) == v6);
    let network = || [false, true].into_iter().filter_map(first_of);
    match wanted {
        OverlayAddress::Network => Ok(network().map(IpNet::network).collect()),
        OverlayAddress::First => Ok(network().map(first_address).collect()),
        OverlayAddress::Given(given) => {
            let stray = given.iter().find(|ip| !own.subnets.iter().any(|net| net.contains(*ip)));
            stray.map_or_else(|| Ok(given.clone()), |ip| Err(PlanError::AddressNotOurs(*ip)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::Arc;

    use crate::config::Sources;
    use crate::control::nodes_file;

    const LIST: &str = "nodes:
  - {name: a, underlay: [10.9.0.1, 'fd00::1'], subnets: [10.42.1.0/24, 'fd42:0:0:1::/64']}
  - {name: b, underlay: 10.9.0.2, subnets: [10.42.2.0/24]}
  - {name: c, underlay: 'fd00::3', subnets: ['fd42:0:0:3::/64']}
";

    fn config(text: &str) -> Config {
        let file = Some(("test.yaml".into(), text.as_bytes().to_vec()));
        let sources = Sources { file, env: Vec::new(), flags: Vec::new(), hostname: "a".to_owned() };
        Config::parse(&sources).unwrap()
    }

    fn make(config_text: &str, list: &str, carriers: &[(&str, u32)]) -> Result<Plan, PlanError> {
        let config = config(config_text);
        let list = nodes_file::parse(list.as_bytes(), config.port).unwrap();
        let own = list.get(&config.node_name).unwrap();
        let carriers: Vec<_> =
            carriers.iter().map(|(ip, mtu)| Carrier { ip: ip.parse().unwrap(), mtu: *mtu }).collect();
        plan(&config, &list, own, &carriers, &mut Known::new(2, None))
    }

    #[test]
    fn the_mtu_is_the_smallest_that_fits_every_peer() {
        let both = [("10.9.0.1", 1500), ("fd00::1", 1500)];
        let plan = make("", LIST, &both).unwrap();
        assert_eq!(plan.mtu, 1430);
        assert_eq!(plan.peers.iter().map(|p| p.mtu).collect::<Vec<_>>(), [1450, 1430]);
        assert_eq!(plan.overlay, ["10.42.1.1".parse::<IpAddr>().unwrap(), "fd42:0:0:1::1".parse().unwrap()]);
        assert!(plan.warnings.is_empty());
        let jumbo = make(
            "",
            &LIST.replace("  - {name: c, underlay: 'fd00::3', subnets: ['fd42:0:0:3::/64']}\n", ""),
            &[("10.9.0.1", 9000)],
        );
        assert_eq!(jumbo.unwrap().mtu, 8950);
    }

    #[test]
    fn no_link_takes_more_than_an_ip_packet() {
        let alone = "nodes:\n  - {name: a, underlay: 10.9.0.1, subnets: 10.42.1.0/24}\n";
        let plan = make("", alone, &[("10.9.0.1", 65_536)]).unwrap();
        assert_eq!(plan.mtu, 65_485, "with 22 bytes of VXLAN and Ethernet it fills a UDP datagram of 65,507");
    }

    #[test]
    fn the_overlay_is_smaller_by_what_the_tunnel_adds() {
        assert_eq!(overlay_mtu(1500, false), 1450);
        assert_eq!(overlay_mtu(1500, true), 1430);
        assert_eq!(overlay_mtu(40, true), 0);
    }

    #[test]
    fn a_peer_of_another_family_is_named() {
        let plan = make("", LIST, &[("10.9.0.1", 1500)]).unwrap();
        assert_eq!(plan.peers.len(), 1);
        assert!(plan.warnings[0].contains("node c cannot be reached"), "{:?}", plan.warnings);
        assert_eq!(plan.subnets.len(), 4, "its subnets are still the mesh's: they must not leave by another way");
    }

    #[test]
    fn a_fixed_mtu_stands_and_warns_when_it_does_not_fit() {
        assert!(make("mtu: 1400", LIST, &[("10.9.0.1", 1500)]).unwrap().warnings.len() == 1);
        let plan = make("mtu: 1500", LIST, &[("10.9.0.1", 1500)]).unwrap();
        assert_eq!((plan.mtu, plan.peers[0].mtu), (1500, 1450));
        assert!(plan.warnings.iter().any(|w| w.contains("more than the underlay carries")));
        let small = make("mtu: 1200", LIST, &[("10.9.0.1", 1500)]).unwrap();
        assert_eq!(small.carries_its_ipv6().unwrap_err(), PlanError::MtuBelowIpv6(1200));
        let shrunk = make("", LIST, &[("10.9.0.1", 1280)]).unwrap();
        assert_eq!((shrunk.mtu, shrunk.peers[0].mtu), (1230, 1230), "IPv4 goes on with what fits");
        assert_eq!(shrunk.carries_its_ipv6().unwrap_err(), PlanError::MtuBelowIpv6(1230));
        assert_eq!(make("", LIST, &[("10.9.0.1", 600)]).unwrap_err(), PlanError::UnderlayTooSmall(600));
    }

    #[test]
    fn each_node_is_watched_by_as_many_in_a_mesh_of_any_size_and_both_ends_agree() {
        let list = |nodes: usize| {
            let line = |n| {
                format!("  - {{name: n{n:03}, underlay: 10.9.{}.{}, subnets: 10.42.{n}.0/24}}\n", n / 200, n % 200 + 1)
            };
            format!("nodes:\n{}", (0..nodes).map(line).collect::<String>())
        };
        for (nodes, neighbours) in [(1, 0), (2, 1), (3, 2), (6, 5), (8, 6), (200, 6)] {
            let list = nodes_file::parse(list(nodes).as_bytes(), config("").port).unwrap();
            let rings: Vec<Vec<&NodeName>> = list.nodes.iter().map(|own| ring(&list, own)).collect();
            for (own, ring) in list.nodes.iter().zip(&rings) {
                let mut distinct = ring.clone();
                distinct.sort();
                distinct.dedup();
                assert_eq!(distinct.len(), neighbours, "{nodes}");
                assert!(!distinct.contains(&&own.name));
                for name in distinct {
                    let at = list.nodes.iter().position(|node| node.name == *name).unwrap();
                    assert!(rings[at].contains(&&own.name), "{} watches {name}, and not the other way", own.name);
                }
            }
        }
    }

    #[test]
    fn overlay_addresses() {
        let ips = |text: &str| make(text, LIST, &[("10.9.0.1", 1500)]).map(|p| p.overlay);
        assert_eq!(ips("address: network").unwrap()[0], "10.42.1.0".parse::<IpAddr>().unwrap());
        assert_eq!(ips("address: 10.42.1.77").unwrap(), ["10.42.1.77".parse::<IpAddr>().unwrap()]);
        let foreign = "10.42.2.1".parse().unwrap();
        assert_eq!(ips("address: 10.42.2.1").unwrap_err(), PlanError::AddressNotOurs(foreign));
        let single = LIST.replace("10.42.1.0/24", "10.42.1.9/32");
        let plan = make("", &single, &[("10.9.0.1", 1500)]).unwrap();
        assert_eq!(plan.overlay[0], "10.42.1.9".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn counters_of_a_peer_that_stays_are_kept() {
        let config = config("");
        let list = nodes_file::parse(LIST.as_bytes(), config.port).unwrap();
        let own = list.get(&config.node_name).unwrap();
        let carriers = [Carrier { ip: "10.9.0.1".parse().unwrap(), mtu: 1500 }];
        let mut known = Known::new(1, None);
        let first = plan(&config, &list, own, &carriers, &mut known).unwrap();
        let second = plan(&config, &list, own, &carriers, &mut known).unwrap();
        assert!(Arc::ptr_eq(&first.peers[0].stats, &second.peers[0].stats));
        let alone = NodeList { nodes: vec![own.clone()] };
        plan(&config, &alone, own, &carriers, &mut known).unwrap();
        assert!(known.is_empty());
    }
}
