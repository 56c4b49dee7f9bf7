//! What a node is: names, MACs, VNIs and the validated node list.
//!
//! Owns the types that the node list, the host set-up, the engine's tables and the admin socket share. Knows nothing of
//! where a list comes from (`control`) or what is done with it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::key::{PresharedKey, PublicKey};

/// Default UDP data port: the one that flannel and the Linux kernel's VXLAN device use, not IANA's 4789.
pub const DEFAULT_PORT: u16 = 8472;

/// A node's name: 1–63 characters out of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a node name: use 1 to 63 characters out of letters, digits, `.`, `_` and `-`, starting with a letter or digit"
)]
pub struct BadNodeName(pub String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The VTEP MAC of a node whose list entry gives none: `02:` and the first five bytes of SHA-256(name), so that it
    /// survives restarts and re-installation.
    pub fn derived_mac(&self) -> Mac {
        let hash = Sha256::digest(self.0.as_bytes());
        let mut mac = [0x02, 0, 0, 0, 0, 0];
        for (to, from) in mac[1..].iter_mut().zip(hash.iter()) {
            *to = *from;
        }
        Mac(mac)
    }
}

impl FromStr for NodeName {
    type Err = BadNodeName;

    fn from_str(text: &str) -> Result<Self, BadNodeName> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if text.len() <= 63 && starts_well && text.chars().all(good) {
            Ok(NodeName(text.to_owned()))
        } else {
            Err(BadNodeName(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

/// Why a MAC was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a unicast MAC address: write six hexadecimal bytes, as in `0a:58:0a:09:00:01`, not all zero and with an even first byte"
)]
pub struct BadMac(pub String);

impl Mac {
    /// ff:ff:ff:ff:ff:ff
    pub const BROADCAST: Mac = Mac([0xff; 6]);
}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.chars().take(80).collect());
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+')).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        let multicast = mac[0] & 1 == 1;
        if parts.next().is_some() || multicast || mac == [0; 6] { Err(bad()) } else { Ok(Mac(mac)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A VXLAN network identifier: 24 bits (RFC 7348 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The one that is used when nobody says another: flannel's.
    pub const DEFAULT: Vni = Vni(1);
    /// The one for BFD when nobody says another.
    pub const MANAGEMENT: Vni = Vni(4095);

    /// A VNI, or `None` above 16,777,215.
    pub fn new(vni: u32) -> Option<Self> {
        (vni < 1 << 24).then_some(Vni(vni))
    }

    /// The identifier, 0 to 16,777,215.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// How packets to a node travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encryption {
    /// VXLAN in the clear.
    None,
    /// WireGuard.
    Wireguard,
}

/// A key that two nodes know besides their own, or where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Preshared {
    /// The key.
    Key(PresharedKey),
    /// A file that holds it, not read yet.
    File(PathBuf),
}

/// One member of the mesh, as a node list describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Unique in the list.
    pub name: NodeName,
    /// Where the node receives data: at least one, at most one for each address family.
    pub underlay: Vec<SocketAddr>,
    /// The prefixes that live behind the node; no two nodes' overlap.
    pub subnets: Vec<IpNet>,
    /// VTEP MAC, given or derived from the name.
    pub mac: Mac,
    /// Its own word about encryption; without one the configuration decides.
    pub encryption: Option<Encryption>,
    /// Its X25519 public keys, one a lane; the first is its identity. No two nodes share one.
    pub public_keys: Vec<PublicKey>,
    /// Seconds between packets that keep the mapping of a NAT before it.
    pub keepalive: Option<u16>,
    /// A key that this node and it know besides their own.
    pub preshared: Option<Preshared>,
}

impl Node {
    /// A node of which only the name is known.
    pub fn named(name: NodeName) -> Self {
        Node {
            mac: name.derived_mac(),
            name,
            underlay: Vec::new(),
            subnets: Vec::new(),
            encryption: None,
            public_keys: Vec::new(),
            keepalive: None,
            preshared: None,
        }
    }

    /// The key that this node and it know besides their own.
    pub fn preshared_key(&self) -> Option<&PresharedKey> {
        match &self.preshared {
            Some(Preshared::Key(key)) => Some(key),
            Some(Preshared::File(_)) | None => None,
        }
    }

    /// The node's underlay addresses without ports.
    pub fn underlay_ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.underlay.iter().map(SocketAddr::ip)
    }
}

/// A validated node list: only `control::nodes_file` (and later a control plane) makes one, so that whoever holds it
/// knows that names, MACs, endpoints and subnets are unique and that nothing overlaps.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeList {
    /// The nodes, sorted by name.
    pub nodes: Vec<Node>,
}

impl NodeList {
    /// The node of that name.
    pub fn get(&self, name: &NodeName) -> Option<&Node> {
        self.nodes.binary_search_by(|n| n.name.cmp(name)).ok().and_then(|i| self.nodes.get(i))
    }
}

/// Network + 1; of a subnet that is a single address, that one.
pub fn first_address(net: &IpNet) -> IpAddr {
    match net {
        IpNet::V4(net) if net.prefix_len() < 32 => Ipv4Addr::from_bits(net.network().to_bits().wrapping_add(1)).into(),
        IpNet::V6(net) if net.prefix_len() < 128 => Ipv6Addr::from_bits(net.network().to_bits().wrapping_add(1)).into(),
        _ => net.network(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!("a".parse::<NodeName>().is_ok());
        assert!("node-1.example_x".parse::<NodeName>().is_ok());
        for bad in ["", "-a", ".a", "a b", "a/b", "é", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_mac_is_derived_from_the_name() {
        // printf %s a | sha256sum  ->  ca978112ca...
        let name: NodeName = "a".parse().unwrap();
        assert_eq!(name.derived_mac().to_string(), "02:ca:97:81:12:ca");
    }

    #[test]
    fn macs_are_checked() {
        assert_eq!("0A:58:0a:09:00:01".parse::<Mac>().unwrap().to_string(), "0a:58:0a:09:00:01");
        for bad in [
            "",
            "0a:58:0a:09:00",
            "0a:58:0a:09:00:01:02",
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "ga:58:0a:09:00:01",
            "+a:58:0a:09:00:01",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_vni_has_24_bits() {
        assert_eq!(Vni::new(0xff_ffff).map(Vni::get), Some(0xff_ffff));
        assert_eq!(Vni::new(0x100_0000), None);
    }
}
