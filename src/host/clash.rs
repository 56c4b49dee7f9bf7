//! What stands in meshd's way on this machine, told with its owner and the fix before anything is changed.
//!
//! Owns the rules of what a clash is. Changes nothing, and does not know whether anybody heeds it.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::ErrorKind;
use std::net::IpAddr;

use ipnet::IpNet;

use super::ensure::device_names;
use super::facts::{Address, Link, Route, TABLE_LOCAL};
use super::port::{self, Owner};
use super::prefixes::PrefixSet;
use super::{Host, HostError, OWNER_ALIAS, ROUTE_PROTOCOL};

/// What meshd is about to claim.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Preflight {
    /// The TUN device's name.
    pub tun: String,
    /// The UDP data port.
    pub port: u16,
    /// This node's underlay addresses.
    pub node_ips: Vec<IpAddr>,
    /// What is to be routed into the overlay: the union of all nodes' subnets.
    pub prefixes: Vec<IpNet>,
    /// This node's subnets, where bridges and their routes are at home.
    pub own_subnets: Vec<IpNet>,
}

/// Something that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clash {
    /// Which rule was broken.
    pub kind: ClashKind,
    /// What cannot be had.
    pub what: String,
    /// Who has it.
    pub owner: String,
    /// What to do: a command, or a key of the config.
    pub fix: String,
}

/// The kinds of clash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClashKind {
    /// The device's name is taken.
    Device,
    /// The UDP port is taken.
    Port,
    /// The node's address is not this machine's.
    NodeIp,
    /// The node's address lies inside the overlay.
    UnderlayInside,
    /// Another device has an address inside the overlay.
    Address,
    /// Another's route leads traffic for the overlay elsewhere.
    Route,
}

impl fmt::Display for Clash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}. Fix: {}", self.what, self.owner, self.fix)
    }
}

/// Why preflight did not pass.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It could not be found out.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something stands in the way; at least one.
    #[error("{}", lines(.0))]
    Clashes(Vec<Clash>),
}

fn lines(clashes: &[Clash]) -> String {
    clashes.iter().map(Clash::to_string).collect::<Vec<_>>().join("\n")
}

impl Host {
    /// Looks for whatever would clash, and changes nothing. What a meshd left that crashed is no clash; it is taken over.
    ///
    /// To be called before meshd's own sockets are bound, or it finds itself.
    pub async fn preflight(&self, preflight: &Preflight) -> Result<(), Refused> {
        let links = self.netlink.links().await?;
        let addresses = self.netlink.addresses().await?;
        let claimed = Claimed::new(preflight, &links);
        let routes = self.netlink.routes(None, |r| claimed.route_clashes(r)).await?;

        let mut clashes = Vec::new();
        clashes.extend(device_clash(&preflight.tun, &links));
        clashes.extend(underlay_inside(preflight, &claimed));
        for ip in &preflight.node_ips {
            clashes.extend(port_clash(*ip, preflight.port, &links, &addresses));
        }
        clashes.extend(claimed.clashes(&preflight.node_ips, &addresses, &routes));
        if clashes.is_empty() { Ok(()) } else { Err(Refused::Clashes(clashes)) }
    }
}

/// Case (a): the name is taken by what is not ours.
fn device_clash(tun: &str, links: &[Link]) -> Option<Clash> {
    let link = links.iter().find(|l| l.name == tun)?;
    let alias = link.alias.as_deref();
    if link.is_tun && alias == Some(OWNER_ALIAS) {
        return None;
    }
    let owner = match alias {
        Some(alias) => format!("it is {} with the alias {alias:?}, not meshd's", link.described()),
        None => format!("it is {} that meshd did not make (it has no alias {OWNER_ALIAS:?})", link.described()),
    };
    // What cannot be deleted should not be advised to be.
    let fix = match link.kind {
        Some(_) => format!("choose another name with `tun:`, or, if it is a leftover: ip link del {tun}"),
        None => "choose another name with `tun:`".to_owned(),
    };
    Some(Clash { kind: ClashKind::Device, what: format!("the device name {tun} is taken"), owner, fix })
}

/// Case (b): the port cannot be bound.
fn port_clash(ip: IpAddr, port: u16, links: &[Link], addresses: &[Address]) -> Option<Clash> {
    let error = port::probe(ip, port).err()?;
    let clash = |kind, what, owner, fix| Some(Clash { kind, what, owner, fix });
    match error.kind() {
        ErrorKind::AddrInUse => {
            let owners = port::owners(ip, port, links);
            let names: Vec<String> = owners.iter().map(Owner::to_string).collect();
            let remedies: Vec<String> = owners.iter().map(|o| o.remedy(port)).collect();
            clash(
                ClashKind::Port,
                format!("UDP port {port} on {ip} is taken"),
                format!("it belongs to {}", names.join(" and ")),
                format!("{}, or choose another port, the same on all nodes, with `port:`", remedies.join("; ")),
            )
        }
        ErrorKind::AddrNotAvailable => {
            let what = format!("node-ip {ip} cannot be used");
            if addresses.iter().any(|a| a.ip == ip && !a.usable()) {
                let owner = "the kernel is still looking for duplicates of it, or has found one".to_owned();
                return clash(ClashKind::NodeIp, what, owner, format!("look at it with: ip addr show to {ip}"));
            }
            let names = device_names(links);
            let candidates: Vec<String> = addresses
                .iter()
                .filter(|a| a.global && a.ip.is_ipv4() == ip.is_ipv4())
                .map(|a| format!("{} ({})", a.ip, names.get(&a.index).map_or("?", String::as_str)))
                .collect();
            let candidates = if candidates.is_empty() { "none".to_owned() } else { candidates.join(", ") };
            clash(
                ClashKind::NodeIp,
                what,
                format!("it is no address of this machine, which has: {candidates}"),
                "set `node-ip:` to one of these, or leave it out".to_owned(),
            )
        }
        _ => clash(
            ClashKind::Port,
            format!("UDP port {port} on {ip} cannot be bound"),
            error.to_string(),
            "choose another port with `port:`, or run meshd as root".to_owned(),
        ),
    }
}

/// Case (d): the encapsulated packets would be routed into the overlay again.
fn underlay_inside(preflight: &Preflight, claimed: &Claimed<'_>) -> Vec<Clash> {
    let inside = |ip: &IpAddr| Some((*ip, claimed.prefixes.covering(IpNet::from(*ip))?));
    let clash = |(ip, prefix)| Clash {
        kind: ClashKind::UnderlayInside,
        what: format!("node-ip {ip} lies inside the overlay's {prefix}"),
        owner: "an underlay address is what the overlay is carried over, and cannot be part of it".to_owned(),
        fix: "give the nodes subnets apart from the underlay's, or set `node-ip:` to an address outside them"
            .to_owned(),
    };
    preflight.node_ips.iter().filter_map(inside).map(clash).collect()
}

/// Case (c): where traffic for the overlay is led elsewhere.
struct Claimed<'a> {
    prefixes: PrefixSet,
    own: PrefixSet,
    names: HashMap<u32, String>,
    tun: &'a str,
}

impl<'a> Claimed<'a> {
    fn new(preflight: &'a Preflight, links: &[Link]) -> Self {
        Claimed {
            prefixes: PrefixSet::new(&preflight.prefixes),
            own: PrefixSet::new(&preflight.own_subnets),
            names: device_names(links),
            tun: &preflight.tun,
        }
    }

    /// As specific as one of our prefixes or more: it would win, or share a key with ours. Inside our own subnets that
    /// is how local pods are reached.
    fn route_clashes(&self, route: &Route) -> bool {
        route.protocol != ROUTE_PROTOCOL
            && route.table != TABLE_LOCAL
            && !self.is_tun(route.oif)
            && self.prefixes.covering(route.dst).is_some()
            && self.own.covering(route.dst).is_none()
    }

    fn clashes(&self, node_ips: &[IpAddr], addresses: &[Address], routes: &[Route]) -> Vec<Clash> {
        let addresses: Vec<&Address> = addresses
            .iter()
            .filter(|a| !self.is_tun(Some(a.index)) && !node_ips.contains(&a.ip))
            .filter(|a| self.own.covering(IpNet::from(a.ip)).is_none())
            .filter(|a| self.prefixes.covering(IpNet::from(a.ip)).is_some())
            .collect();
        // The kernel's own route beside an address goes with it, and needs no complaint of its own.
        let connected: HashSet<(u32, IpNet)> =
            addresses.iter().filter_map(|a| Some((a.index, a.net()?.trunc()))).collect();
        let follows = |r: &&Route| {
            r.protocol == KERNEL_PROTOCOL && r.oif.is_some_and(|index| connected.contains(&(index, r.dst)))
        };
        let address_clashes = addresses.iter().map(|a| self.address_clash(a));
        let route_clashes = routes.iter().filter(|r| !follows(r)).map(|r| self.route_clash(r));
        address_clashes.chain(route_clashes).collect()
    }

    fn address_clash(&self, address: &Address) -> Clash {
        let device = self.names.get(&address.index).cloned().unwrap_or_else(|| format!("if{}", address.index));
        let net = address.net().map_or_else(|| address.ip.to_string(), |n| n.to_string());
        Clash {
            kind: ClashKind::Address,
            what: format!("the address {net} lies inside another node's subnet"),
            owner: format!("it is set on {device}"),
            fix: format!("ip addr del {net} dev {device}, or give the nodes other subnets"),
        }
    }

    fn route_clash(&self, route: &Route) -> Clash {
        let text = route.described(|index| self.names.get(&index).cloned());
        let ours = self.prefixes.covering(route.dst).unwrap_or(route.dst);
        let family = if route.dst.addr().is_ipv4() { "" } else { "-6 " };
        Clash {
            kind: ClashKind::Route,
            what: format!("traffic for the overlay's {ours} would leave by another route"),
            owner: text.clone(),
            fix: format!("ip {family}route del {text}, or give the nodes other subnets"),
        }
    }

    fn is_tun(&self, index: Option<u32>) -> bool {
        index.and_then(|i| self.names.get(&i)).is_some_and(|name| name == self.tun)
    }
}

/// `RTPROT_KERNEL`
const KERNEL_PROTOCOL: u8 = 2;

#[cfg(test)]
mod tests {
    use super::super::facts::{TABLE_MAIN, UNICAST};
    use super::*;

    fn link(index: u32, name: &str, kind: Option<&str>, is_tun: bool, alias: Option<&str>) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            is_tun,
            alias: alias.map(str::to_owned),
            ..Link::default()
        }
    }

    fn address(index: u32, net: &str) -> Address {
        let net: IpNet = net.parse().unwrap();
        Address { prefix_len: net.prefix_len(), ..Address::ours(index, net.addr()) }
    }

    fn route(dst: &str, oif: u32, protocol: u8) -> Route {
        Route {
            dst: dst.parse().unwrap(),
            table: TABLE_MAIN,
            metric: 0,
            tos: 0,
            protocol,
            kind: UNICAST,
            oif: Some(oif),
            gateway: None,
            src: None,
        }
    }

    fn preflight() -> Preflight {
        Preflight {
            tun: "mesh0".to_owned(),
            port: 8472,
            node_ips: vec!["10.9.0.1".parse().unwrap()],
            prefixes: vec!["10.42.0.0/16".parse().unwrap(), "fd00:42::/48".parse().unwrap()],
            own_subnets: vec!["10.42.1.0/24".parse().unwrap()],
        }
    }

    fn links() -> Vec<Link> {
        vec![
            link(2, "eth0", None, false, None),
            link(3, "mesh0", Some("tun"), true, Some("meshd")),
            link(4, "cni0", Some("bridge"), false, None),
        ]
    }

    #[test]
    fn a_device_of_ours_is_taken_over_and_any_other_named() {
        let clash = |l: Link| device_clash("mesh0", &[l]).map(|c| c.to_string());
        assert_eq!(clash(link(3, "mesh0", Some("tun"), true, Some("meshd"))), None);
        assert_eq!(clash(link(3, "mesh1", Some("bridge"), false, None)), None);
        let bridge = clash(link(3, "mesh0", Some("bridge"), false, None)).unwrap();
        assert!(bridge.contains("a bridge device") && bridge.contains("ip link del mesh0"), "{bridge}");
        let tap = clash(link(3, "mesh0", Some("tun"), false, Some("meshd"))).unwrap();
        assert!(tap.contains("a TAP device"), "{tap}");
        let vpn = clash(link(3, "mesh0", Some("tun"), true, Some("my vpn"))).unwrap();
        assert!(vpn.contains("my vpn"), "{vpn}");
        let nic = clash(link(3, "mesh0", None, false, None)).unwrap();
        assert!(!nic.contains("ip link del"), "{nic}");
    }

    #[test]
    fn only_routes_that_would_win_clash() {
        let (preflight, links) = (preflight(), links());
        let claimed = Claimed::new(&preflight, &links);
        for (dst, oif, protocol, expected) in [
            ("10.42.0.0/16", 2, 4, true),
            ("10.42.2.0/24", 2, 186, true),
            ("fd00:42:0:1::/64", 2, 9, true),
            ("0.0.0.0/0", 2, 16, false),
            ("10.0.0.0/8", 2, 4, false),
            ("10.43.0.0/16", 2, 4, false),
            ("10.42.1.0/24", 4, 2, false),
            ("10.42.1.7/32", 4, 4, false),
            ("10.42.2.0/24", 2, ROUTE_PROTOCOL, false),
            ("10.42.2.0/24", 3, 4, false),
        ] {
            assert_eq!(claimed.route_clashes(&route(dst, oif, protocol)), expected, "{dst}");
        }
        assert!(!claimed.route_clashes(&Route { table: TABLE_LOCAL, ..route("10.42.2.1/32", 2, 2) }));
    }

    #[test]
    fn an_address_is_told_once_with_its_connected_route() {
        let (preflight, links) = (preflight(), links());
        let claimed = Claimed::new(&preflight, &links);
        let addresses = [address(2, "10.42.2.5/24"), address(4, "10.42.1.1/24"), address(3, "10.42.1.1/32")];
        let routes = [route("10.42.2.0/24", 2, 2), route("10.42.3.0/24", 2, 4)];
        let told: Vec<_> = claimed.clashes(&[], &addresses, &routes).iter().map(Clash::to_string).collect();
        assert_eq!(
            told,
            [
                "the address 10.42.2.5/24 lies inside another node's subnet: it is set on eth0. \
                 Fix: ip addr del 10.42.2.5/24 dev eth0, or give the nodes other subnets",
                "traffic for the overlay's 10.42.0.0/16 would leave by another route: 10.42.3.0/24 dev eth0 proto static. \
                 Fix: ip route del 10.42.3.0/24 dev eth0 proto static, or give the nodes other subnets",
            ]
        );
    }

    #[test]
    fn an_underlay_inside_the_overlay_is_told_once() {
        let mut preflight = preflight();
        preflight.node_ips = vec!["10.42.1.1".parse().unwrap(), "10.9.0.1".parse().unwrap()];
        let links = links();
        let claimed = Claimed::new(&preflight, &links);
        assert_eq!(underlay_inside(&preflight, &claimed).len(), 1);
        assert!(claimed.clashes(&preflight.node_ips, &[address(2, "10.42.1.1/24")], &[]).is_empty());
    }
}
