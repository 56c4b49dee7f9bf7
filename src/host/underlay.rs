//! Which addresses the mesh is carried over: `node-ip` resolved against what the machine has.
//!
//! Owns the choice, as a pure function of links, addresses and default routes, and the overlay's MTU that follows.

use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressFlags;

use super::facts::{Address, Link, Route, TABLE_MAIN, UNICAST};
use super::{Host, HostError, OWNER_ALIAS, ROUTE_PROTOCOL};

/// One entry of `node-ip`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeIp {
    /// This address.
    Address(IpAddr),
    /// The first global address of each family of this interface.
    Interface(String),
}

impl FromStr for NodeIp {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.parse().map_or_else(|_| NodeIp::Interface(text.to_owned()), NodeIp::Address))
    }
}

/// An underlay address and the link that it is carried over: the one it is set on, but for an address on a loopback or
/// dummy device, as machines with routed addresses have, the one of the default route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// The address.
    pub ip: IpAddr,
    /// The link's index.
    pub ifindex: u32,
    /// The link's name.
    pub ifname: String,
    /// The link's MTU.
    pub mtu: u32,
}

/// Why `node-ip` gives no address.
#[derive(Debug, thiserror::Error)]
pub enum UnderlayError {
    /// The machine could not be looked at.
    #[error(transparent)]
    Host(#[from] HostError),
    /// `auto` found nothing.
    #[error("no default route leads to an interface with a global address; set `node-ip:` to one of: {candidates}")]
    NoDefaultRoute {
        /// Addresses to choose from.
        candidates: Candidates,
    },
    /// Not an address of this machine.
    #[error("node-ip {ip} is no address of this machine; it has: {candidates}")]
    NotAssigned {
        /// The address asked for.
        ip: IpAddr,
        /// Addresses to choose from.
        candidates: Candidates,
    },
    /// No such interface.
    #[error("node-ip names the interface {name:?}, which does not exist; addresses there are: {candidates}")]
    NoInterface {
        /// The name asked for.
        name: String,
        /// Addresses to choose from.
        candidates: Candidates,
    },
    /// An interface without an address to use.
    #[error("node-ip names the interface {name}, which has no global address; others there are: {candidates}")]
    NoAddress {
        /// The interface.
        name: String,
        /// Addresses to choose from.
        candidates: Candidates,
    },
    /// Two addresses for one family.
    #[error("node-ip gives two addresses of one family, {first} and {second}; leave one out")]
    Two {
        /// The one.
        first: IpAddr,
        /// The other.
        second: IpAddr,
    },
}

/// Addresses that could be a `node-ip`, each with its interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidates(pub Vec<(IpAddr, String)>);

impl fmt::Display for Candidates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (i, (ip, name)) in self.0.iter().enumerate() {
            write!(f, "{}{ip} ({name})", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl Host {
    /// Resolves `node-ip`; nothing wanted means `auto`: one address for each family that has a default route. At most
    /// one for each family comes back, IPv4 first.
    pub async fn underlay(&self, wanted: &[NodeIp]) -> Result<Vec<Underlay>, UnderlayError> {
        let mut machine = Machine {
            links: self.netlink.links().await?,
            addresses: self.netlink.addresses().await?,
            defaults: self.netlink.routes(None, is_default).await?,
        };
        machine.defaults.sort_by_key(|r| r.metric);
        machine.resolve(wanted)
    }
}

fn is_default(route: &Route) -> bool {
    route.dst.prefix_len() == 0
        && route.kind == UNICAST
        && route.table == TABLE_MAIN
        && route.protocol != ROUTE_PROTOCOL
        && route.oif.is_some()
}

/// What the choice is made from. Default routes come best first.
struct Machine {
    links: Vec<Link>,
    addresses: Vec<Address>,
    defaults: Vec<Route>,
}

impl Machine {
    fn resolve(&self, wanted: &[NodeIp]) -> Result<Vec<Underlay>, UnderlayError> {
        let mut found = if wanted.is_empty() { self.auto()? } else { Vec::new() };
        for entry in wanted {
            match entry {
                NodeIp::Address(ip) => found.push(self.by_address(*ip)?),
                NodeIp::Interface(name) => found.extend(self.by_interface(name)?),
            }
        }
        found.sort_by_key(|u| u.ip);
        found.dedup();
        for pair in found.windows(2) {
            if let [a, b] = pair
                && a.ip.is_ipv4() == b.ip.is_ipv4()
            {
                return Err(UnderlayError::Two { first: a.ip, second: b.ip });
            }
        }
        Ok(found)
    }

    fn auto(&self) -> Result<Vec<Underlay>, UnderlayError> {
        let best = |v4: bool| {
            let of_family = self.defaults.iter().filter(|r| r.dst.addr().is_ipv4() == v4);
            of_family.filter_map(|r| self.source_of(r)).next()
        };
        let found: Vec<Underlay> = [best(true), best(false)].into_iter().flatten().collect();
        if found.is_empty() { Err(UnderlayError::NoDefaultRoute { candidates: self.candidates() }) } else { Ok(found) }
    }

    /// The address that the kernel would send from: the route's own choice, else the one in the gateway's subnet (a
    /// virtual IP beside it is a /32 as a rule), else the first.
    fn source_of(&self, route: &Route) -> Option<Underlay> {
        let index = route.oif?;
        if let Some(address) = route.src.and_then(|ip| self.addresses.iter().find(|a| a.ip == ip)) {
            return self.underlay(address, index);
        }
        let usable = || self.of_interface(index).filter(|a| a.ip.is_ipv4() == route.dst.addr().is_ipv4());
        let beside_gateway =
            |a: &&Address| route.gateway.is_some_and(|g| a.net().is_some_and(|n: IpNet| n.contains(&g)));
        let chosen = usable().find(beside_gateway).or_else(|| usable().next())?;
        self.underlay(chosen, index)
    }

    fn by_address(&self, ip: IpAddr) -> Result<Underlay, UnderlayError> {
        let address = self.addresses.iter().find(|a| a.ip == ip);
        address
            .and_then(|a| self.underlay(a, self.carrier(a)))
            .ok_or_else(|| UnderlayError::NotAssigned { ip, candidates: self.candidates() })
    }

    fn by_interface(&self, name: &str) -> Result<Vec<Underlay>, UnderlayError> {
        let Some(link) = self.links.iter().find(|l| l.name == name) else {
            return Err(UnderlayError::NoInterface { name: name.to_owned(), candidates: self.candidates() });
        };
        let first = |v4: bool| self.of_interface(link.index).find(|a| a.ip.is_ipv4() == v4);
        let found: Vec<Underlay> = [first(true), first(false)]
            .into_iter()
            .flatten()
            .filter_map(|a| self.underlay(a, self.carrier(a)))
            .collect();
        if found.is_empty() {
            return Err(UnderlayError::NoAddress { name: name.to_owned(), candidates: self.candidates() });
        }
        Ok(found)
    }

    /// The addresses of an interface that can stand for this node: global, lasting, past the search for duplicates.
    fn of_interface(&self, index: u32) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(move |a| a.index == index && lasting(a))
    }

    fn candidates(&self) -> Candidates {
        let of = |a: &Address| {
            let link = self.links.iter().find(|l| l.index == a.index)?;
            (link.alias.as_deref() != Some(OWNER_ALIAS)).then(|| (a.ip, link.name.clone()))
        };
        Candidates(self.addresses.iter().filter(|a| lasting(a) && !a.ip.is_loopback()).filter_map(of).collect())
    }

    /// The index of the link that the address is carried over.
    fn carrier(&self, address: &Address) -> u32 {
        let internal = self.links.iter().any(|l| l.index == address.index && l.internal);
        let out = self.defaults.iter().filter(|_| internal).find(|r| r.dst.addr().is_ipv4() == address.ip.is_ipv4());
        out.and_then(|r| r.oif).unwrap_or(address.index)
    }

    fn underlay(&self, address: &Address, index: u32) -> Option<Underlay> {
        let link = self.links.iter().find(|l| l.index == index)?;
        Some(Underlay { ip: address.ip, ifindex: index, ifname: link.name.clone(), mtu: link.mtu })
    }
}

/// In IPv6 the flag `Secondary` means a temporary address (RFC 8981), which is gone tomorrow.
fn lasting(address: &Address) -> bool {
    let temporary = address.ip.is_ipv6() && address.flags.contains(AddressFlags::Secondary);
    address.global && address.usable() && !temporary && !address.flags.contains(AddressFlags::Deprecated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(
        links: &[(u32, &str, u32)],
        addresses: &[(u32, &str)],
        defaults: &[(u32, &str, Option<&str>)],
    ) -> Machine {
        Machine {
            links: links
                .iter()
                .map(|(index, name, mtu)| Link {
                    index: *index,
                    name: (*name).to_owned(),
                    mtu: *mtu,
                    ..Link::default()
                })
                .collect(),
            addresses: addresses
                .iter()
                .map(|(index, net)| {
                    let net: IpNet = net.parse().unwrap();
                    Address { prefix_len: net.prefix_len(), ..Address::ours(*index, net.addr()) }
                })
                .collect(),
            defaults: defaults
                .iter()
                .map(|(oif, gateway, src)| {
                    let gateway: IpAddr = gateway.parse().unwrap();
                    Route {
                        dst: if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" }.parse().unwrap(),
                        table: TABLE_MAIN,
                        metric: 0,
                        tos: 0,
                        protocol: 16,
                        kind: UNICAST,
                        oif: Some(*oif),
                        gateway: Some(gateway),
                        src: src.map(|s| s.parse().unwrap()),
                    }
                })
                .collect(),
        }
    }

    fn usual() -> Machine {
        machine(
            &[(1, "lo", 65536), (2, "eth0", 1500), (3, "eth1", 9000)],
            &[
                (2, "10.9.0.250/32"),
                (2, "10.9.0.1/24"),
                (2, "2001:db8::1/64"),
                (3, "192.168.7.1/24"),
                (3, "192.168.7.2/24"),
            ],
            &[(2, "10.9.0.254", None), (2, "fe80::1", None)],
        )
    }

    fn ips(found: Result<Vec<Underlay>, UnderlayError>) -> Vec<String> {
        found.unwrap().into_iter().map(|u| format!("{} {} {}", u.ip, u.ifname, u.mtu)).collect()
    }

    fn entries(text: &[&str]) -> Vec<NodeIp> {
        text.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn auto_takes_the_address_beside_the_gateway_and_no_virtual_one() {
        assert_eq!(ips(usual().resolve(&[])), ["10.9.0.1 eth0 1500", "2001:db8::1 eth0 1500"]);
    }

    #[test]
    fn auto_heeds_the_source_of_the_route() {
        let mut machine = usual();
        machine.defaults[0].src = Some("192.168.7.2".parse().unwrap());
        assert_eq!(ips(machine.resolve(&[]))[0], "192.168.7.2 eth0 1500", "sent through the route's link");
    }

    #[test]
    fn a_routed_address_is_carried_over_the_link_of_the_default_route() {
        let mut machine = usual();
        machine.links[0].internal = true;
        machine.addresses.push(Address::ours(1, "198.51.100.7".parse().unwrap()));
        assert_eq!(ips(machine.resolve(&entries(&["198.51.100.7"]))), ["198.51.100.7 eth0 1500"]);
        machine.defaults.clear();
        assert_eq!(ips(machine.resolve(&entries(&["198.51.100.7"]))), ["198.51.100.7 lo 65536"]);
    }

    #[test]
    fn auto_without_default_route_names_the_candidates() {
        let mut machine = usual();
        machine.defaults.clear();
        let text = machine.resolve(&[]).unwrap_err().to_string();
        assert!(text.contains("10.9.0.1 (eth0)") && text.contains("192.168.7.1 (eth1)"), "{text}");
    }

    #[test]
    fn an_interface_gives_its_first_address_of_each_family() {
        assert_eq!(ips(usual().resolve(&entries(&["eth1"]))), ["192.168.7.1 eth1 9000"]);
        assert_eq!(ips(usual().resolve(&entries(&["eth0"]))).len(), 2);
        assert!(matches!(usual().resolve(&entries(&["lo"])), Err(UnderlayError::NoAddress { .. })));
        assert!(matches!(usual().resolve(&entries(&["eth9"])), Err(UnderlayError::NoInterface { .. })));
    }

    #[test]
    fn addresses_are_checked_and_one_a_family_is_enough() {
        let both = entries(&["2001:db8::1", "192.168.7.2"]);
        assert_eq!(ips(usual().resolve(&both)), ["192.168.7.2 eth1 9000", "2001:db8::1 eth0 1500"]);
        let text = usual().resolve(&entries(&["10.9.0.7"])).unwrap_err().to_string();
        assert!(text.contains("10.9.0.7") && text.contains("10.9.0.1 (eth0)"), "{text}");
        assert!(matches!(usual().resolve(&entries(&["10.9.0.1", "eth1"])), Err(UnderlayError::Two { .. })));
        assert_eq!(ips(usual().resolve(&entries(&["10.9.0.1", "10.9.0.1"]))), ["10.9.0.1 eth0 1500"]);
    }

    #[test]
    fn what_does_not_last_is_passed_over() {
        let mut machine = usual();
        machine.addresses.insert(0, Address { flags: AddressFlags::Secondary, ..machine.addresses[2].clone() });
        machine.addresses[0].ip = "2001:db8::aaaa".parse().unwrap();
        machine.addresses.insert(0, Address { flags: AddressFlags::Tentative, ..machine.addresses[3].clone() });
        machine.addresses[0].ip = "2001:db8::bbbb".parse().unwrap();
        assert_eq!(ips(machine.resolve(&[]))[1], "2001:db8::1 eth0 1500");
        assert!(!machine.candidates().to_string().contains("aaaa"));
    }
}
