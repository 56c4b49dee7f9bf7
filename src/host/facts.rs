//! What the kernel tells of links, addresses and routes, as plain values, and the messages that name them.
//!
//! Pure; owns the translation between netlink attributes and what meshd looks at. Does not know how it is asked for.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType};

/// What the kernel tells of a device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) alias: Option<String>,
    /// `tun`, `vxlan`, `bridge`, …; a physical device has none.
    pub(super) kind: Option<String>,
    /// A TUN device, not a TAP one.
    pub(super) is_tun: bool,
    /// It leads nowhere: loopback or dummy.
    pub(super) internal: bool,
    /// UDP port, where it is a VXLAN device.
    pub(super) vxlan_port: Option<u16>,
    pub(super) tx_dropped: u64,
    /// The kernel knows how long IPv4 super-packets of this device may be: it takes those that say no length (Linux 6.3).
    pub(super) knows_big_tcp: bool,
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Link {
            index: message.header.index,
            up: flags.contains(LinkFlags::Up),
            internal: flags.contains(LinkFlags::Loopback),
            ..Link::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Stats64(stats) => link.tx_dropped = stats.tx_dropped,
                LinkAttribute::GroIpv4MaxSize(_) => link.knows_big_tcp = true,
                LinkAttribute::LinkInfo(infos) => link.read_info(infos, message.header.link_layer_type),
                _ => {}
            }
        }
        link
    }
}

impl Link {
    fn read_info(&mut self, infos: &[LinkInfo], layer: LinkLayerType) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => {
                    self.internal |= *kind == InfoKind::Dummy;
                    self.is_tun = *kind == InfoKind::Tun && layer == LinkLayerType::None;
                    self.kind = Some(kind.to_string());
                }
                LinkInfo::Data(InfoData::Vxlan(data)) => {
                    self.vxlan_port = data.iter().find_map(|d| match d {
                        InfoVxlan::Port(port) => Some(*port),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
    }

    /// "a bridge device", for messages.
    pub(super) fn described(&self) -> String {
        match (self.kind.as_deref(), self.is_tun) {
            (Some("tun"), true) => "a TUN device".to_owned(),
            (Some("tun"), false) => "a TAP device".to_owned(),
            (Some("vxlan"), _) => "a kernel VXLAN device".to_owned(),
            (Some(kind), _) => format!("a {kind} device"),
            (None, _) => "a hardware or loopback device".to_owned(),
        }
    }
}

/// An address of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) ip: IpAddr,
    pub(super) prefix_len: u8,
    pub(super) global: bool,
    pub(super) flags: AddressFlags,
}

impl Address {
    /// An address of ours: a host's, and no route or detection of duplicates beside it.
    pub(super) fn ours(index: u32, ip: IpAddr) -> Self {
        let (prefix_len, flags) = match ip {
            IpAddr::V4(_) => (32, AddressFlags::empty()),
            IpAddr::V6(_) => (128, AddressFlags::Nodad | AddressFlags::Noprefixroute),
        };
        Address { index, ip, prefix_len, global: true, flags }
    }

    pub(super) fn read(message: &AddressMessage) -> Option<Self> {
        let (mut local, mut address) = (None, None);
        let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
        for attribute in &message.attributes {
            match attribute {
                // On a link with a peer, IFA_ADDRESS is the peer's.
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                AddressAttribute::Flags(all) => flags = *all,
                _ => {}
            }
        }
        Some(Address {
            index: message.header.index,
            ip: local.or(address)?,
            prefix_len: message.header.prefix_len,
            global: message.header.scope == AddressScope::Universe,
            flags,
        })
    }

    pub(super) fn message(&self) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = family(self.ip);
        message.header.prefix_len = self.prefix_len;
        message.header.index = self.index;
        message.header.flags = AddressHeaderFlags::empty();
        message.attributes.push(AddressAttribute::Local(self.ip));
        message.attributes.push(AddressAttribute::Address(self.ip));
        if !self.flags.is_empty() {
            message.attributes.push(AddressAttribute::Flags(self.flags));
        }
        message
    }

    /// The address with its prefix length, host bits and all.
    pub(super) fn net(&self) -> Option<IpNet> {
        IpNet::new(self.ip, self.prefix_len).ok()
    }

    /// Whether the kernel lets a socket use it: not while duplicates are being looked for, or were found.
    pub(super) fn usable(&self) -> bool {
        !self.flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed)
    }
}

/// A route, as far as meshd looks at one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Route {
    pub(super) dst: IpNet,
    pub(super) table: u32,
    pub(super) metric: u32,
    pub(super) tos: u8,
    pub(super) protocol: u8,
    pub(super) kind: u8,
    pub(super) oif: Option<u32>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) src: Option<IpAddr>,
}

/// `RTN_UNICAST`: a route to somewhere.
pub(super) const UNICAST: u8 = 1;
/// `RTN_UNREACHABLE`: an ICMP error for whoever asks.
pub(super) const UNREACHABLE: u8 = 7;
/// The main routing table.
pub(super) const TABLE_MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;
/// The kernel's own table of local and broadcast addresses.
pub(super) const TABLE_LOCAL: u32 = 255;

impl Route {
    pub(super) fn read(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let any = match header.address_family {
            AddressFamily::Inet => IpAddr::from([0; 4]),
            _ => IpAddr::from([0; 16]),
        };
        let mut route = Route {
            dst: IpNet::new(any, 0).ok()?,
            table: u32::from(header.table),
            metric: 0,
            tos: header.tos,
            protocol: header.protocol.into(),
            kind: header.kind.into(),
            oif: None,
            gateway: None,
            src: None,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => {
                    route.dst = IpNet::new(ip(address)?, header.destination_prefix_length).ok()?;
                }
                RouteAttribute::Table(table) => route.table = *table,
                RouteAttribute::Priority(metric) => route.metric = *metric,
                RouteAttribute::Oif(index) => route.oif = Some(*index),
                RouteAttribute::Gateway(address) => route.gateway = ip(address),
                RouteAttribute::PrefSource(address) => route.src = ip(address),
                RouteAttribute::MultiPath(hops) => {
                    let first = hops.first();
                    route.oif = route.oif.or(first.map(|h| h.interface_index));
                    route.gateway = route.gateway.or(first.and_then(|h| {
                        h.attributes.iter().find_map(|a| match a {
                            RouteAttribute::Gateway(address) => ip(address),
                            _ => None,
                        })
                    }));
                }
                _ => {}
            }
        }
        // IPv6 hangs an unreachable route on the loopback device, IPv4 on none.
        if route.kind != UNICAST {
            route.oif = None;
        }
        Some(route)
    }

    pub(super) fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family(self.dst.addr());
        message.header.destination_prefix_length = self.dst.prefix_len();
        message.header.tos = self.tos;
        message.header.table = u8::try_from(self.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        message.header.protocol = self.protocol.into();
        message.header.kind = RouteType::from(self.kind);
        message.header.scope = match (self.kind, self.gateway, self.dst) {
            (UNICAST, None, IpNet::V4(_)) => RouteScope::Link,
            _ => RouteScope::Universe,
        };
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Destination(self.dst.network().into()));
        attributes.push(RouteAttribute::Table(self.table));
        attributes.push(RouteAttribute::Priority(self.metric));
        attributes.extend(self.oif.map(RouteAttribute::Oif));
        attributes.extend(self.gateway.map(|g| RouteAttribute::Gateway(g.into())));
        attributes.extend(self.src.map(|s| RouteAttribute::PrefSource(s.into())));
        message
    }

    /// What two routes cannot share.
    pub(super) fn key(&self) -> (IpNet, u32, u32, u8) {
        (self.dst, self.table, self.metric, self.tos)
    }

    /// The route as `ip route` writes it; `name` names devices.
    pub(super) fn described(&self, name: impl Fn(u32) -> Option<String>) -> String {
        let mut text = match self.kind {
            UNICAST => self.dst.to_string(),
            kind => format!("{} {}", kind_name(kind), self.dst),
        };
        let mut add = |part: fmt::Arguments<'_>| {
            text.push(' ');
            text.push_str(&part.to_string());
        };
        if let Some(gateway) = self.gateway {
            add(format_args!("via {gateway}"));
        }
        if let Some(index) = self.oif {
            add(format_args!("dev {}", name(index).unwrap_or_else(|| format!("if{index}"))));
        }
        if self.table != TABLE_MAIN {
            add(format_args!("table {}", self.table));
        }
        match protocol_name(self.protocol) {
            Some(known) => add(format_args!("proto {known}")),
            None => add(format_args!("proto {}", self.protocol)),
        }
        if self.metric != 0 {
            add(format_args!("metric {}", self.metric));
        }
        text
    }
}

pub(super) fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

pub(super) fn kind_name(kind: u8) -> &'static str {
    match kind {
        UNICAST => "unicast",
        2 => "local",
        3 => "broadcast",
        4 => "anycast",
        5 => "multicast",
        6 => "blackhole",
        UNREACHABLE => "unreachable",
        8 => "prohibit",
        9 => "throw",
        _ => "special",
    }
}

/// Names from iproute2's `rt_protos`, which `ip route` accepts back.
fn protocol_name(protocol: u8) -> Option<&'static str> {
    Some(match protocol {
        1 => "redirect",
        2 => "kernel",
        3 => "boot",
        4 => "static",
        9 => "ra",
        11 => "zebra",
        12 => "bird",
        16 => "dhcp",
        18 => "keepalived",
        42 => "babel",
        186 => "bgp",
        187 => "isis",
        188 => "ospf",
        _ => return None,
    })
}
