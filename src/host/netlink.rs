//! The conversation with the kernel: one rtnetlink connection, plain copies of what it tells, and a few verbs.
//!
//! Owns the socket, timeouts, interrupted dumps and the translation of messages. Does not know what any of it is for.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use ipnet::IpNet;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use tokio::task::JoinHandle;

use super::HostError;

/// A connection that opens itself anew when it broke.
pub(super) struct Netlink(Mutex<Connection>);

struct Connection {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    fn open() -> Result<Self, HostError> {
        let failed = |source| HostError::Open { source };
        // Strict checking lets the kernel filter dumps (4.20 and later); without it every answer is filtered here.
        let (mut connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().or_else(|_| rtnetlink::new_connection()).map_err(failed)?;
        // The flag that says "interrupted" may sit on the closing message alone.
        connection.set_forward_done(true);
        Ok(Connection { handle, task: tokio::spawn(connection) })
    }
}

/// What to change.
#[derive(Debug, Clone)]
pub(super) enum Request {
    /// Change a link.
    SetLink(LinkMessage),
    /// Remove a link.
    DelLink(u32),
    /// Add an address; refused where it exists.
    AddAddress(Address),
    /// Remove an address.
    DelAddress(Address),
    /// Add a route; refused where any route has that prefix, table and metric.
    AddRoute(Route),
    /// Remove exactly that route.
    DelRoute(Route),
}

impl Netlink {
    /// Opens a connection in the network namespace of this thread.
    pub(super) fn open() -> Result<Self, HostError> {
        Ok(Netlink(Mutex::new(Connection::open()?)))
    }

    /// The link of that name.
    pub(super) async fn link(&self, name: &str) -> Result<Option<Link>, HostError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let doing = || format!("look at the device {name}");
        let mut found = None;
        let answer = self
            .ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST, doing, |m| {
                if let RouteNetlinkMessage::NewLink(m) = m {
                    found = Some(Link::from(&m));
                }
            })
            .await;
        match answer {
            Ok(_) => Ok(found),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All links.
    pub(super) async fn links(&self) -> Result<Vec<Link>, HostError> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump(message, "list the devices", |m| match m {
            RouteNetlinkMessage::NewLink(m) => Some(Link::from(&m)),
            _ => None,
        })
        .await
    }

    /// All addresses.
    pub(super) async fn addresses(&self) -> Result<Vec<Address>, HostError> {
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(message, "list the addresses", |m| match m {
            RouteNetlinkMessage::NewAddress(m) => Address::read(&m),
            _ => None,
        })
        .await
    }

    /// The routes of all tables that `keep` keeps; with `protocol`, only those that carry it.
    pub(super) async fn routes(
        &self,
        protocol: Option<u8>,
        mut keep: impl FnMut(&Route) -> bool,
    ) -> Result<Vec<Route>, HostError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.protocol = protocol.unwrap_or(0).into();
            let routes = self
                .dump(RouteNetlinkMessage::GetRoute(message), "list the routes", |m| match m {
                    // A kernel without IPv6 answers a question about IPv6 routes with its IPv4 ones.
                    RouteNetlinkMessage::NewRoute(m) if m.header.address_family == family => Route::read(&m)
                        .filter(|r| protocol.is_none_or(|wanted| r.protocol == wanted))
                        .filter(|r| keep(r)),
                    _ => None,
                })
                .await?;
            all.extend(routes);
        }
        Ok(all)
    }

    /// Carries out one change. `Ok(false)` when there was nothing to do: it existed already, or was gone.
    pub(super) async fn change(&self, request: Request, doing: impl Fn() -> String) -> Result<bool, HostError> {
        let (message, flags, moot) = request.message();
        match self.ask(message, NLM_F_REQUEST | NLM_F_ACK | flags, doing, |_| {}).await {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error().is_some_and(|code| moot.contains(&code)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Carries out many route changes in their order, several under way at a time, and gives the outcome of each.
    pub(super) async fn change_routes<T>(
        &self,
        changes: Vec<(T, Request)>,
        doing: impl Fn(&T) -> String,
    ) -> Vec<(T, Result<bool, HostError>)> {
        let doing = &doing;
        // The kernel works on a request while it is being sent, and `buffered` starts them in order.
        stream::iter(changes)
            .map(|(what, request)| async move {
                let outcome = self.change(request, || doing(&what)).await;
                (what, outcome)
            })
            .buffered(32)
            .collect()
            .await
    }

    /// Collects what `pick` picks out of a dump; begins again when the kernel says that it changed meanwhile.
    async fn dump<T>(
        &self,
        message: RouteNetlinkMessage,
        doing: &str,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, HostError> {
        let mut picked = Vec::new();
        for _ in 0..DUMP_TRIES {
            picked.clear();
            let whole = self
                .ask(
                    message.clone(),
                    NLM_F_REQUEST | NLM_F_DUMP,
                    || doing.to_owned(),
                    |m| {
                        picked.extend(pick(m));
                    },
                )
                .await?;
            if whole {
                break;
            }
        }
        // Under endless change the last look has to do: whatever it missed raises an event, and is looked at again.
        Ok(picked)
    }

    /// Sends one request and hands each answer to `take`. `Ok(false)` when a dump was interrupted by a change.
    async fn ask(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        doing: impl Fn() -> String,
        mut take: impl FnMut(RouteNetlinkMessage),
    ) -> Result<bool, HostError> {
        let mut whole = true;
        let mut answers = self.send(message, flags).map_err(|e| e.unwrap_or(HostError::Lost { doing: doing() }))?;
        loop {
            let Ok(answer) = tokio::time::timeout(ANSWER_TIMEOUT, answers.next()).await else {
                self.lock().task.abort();
                return Err(HostError::Lost { doing: doing() });
            };
            let Some(answer) = answer else { return Ok(whole) };
            whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(m) => take(m),
                NetlinkPayload::Error(e) if e.code.is_some() => {
                    return Err(HostError::refused(doing(), e.to_io()));
                }
                _ => {}
            }
        }
    }

    /// Hands a request to the connection, which is opened anew where its task has ended.
    fn send(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + use<>, Option<HostError>> {
        let mut connection = self.lock();
        if connection.task.is_finished() {
            *connection = Connection::open().map_err(Some)?;
        }
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        connection.handle.request(message).map_err(|_| None)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Request {
    /// The message, its flags, and the errors that mean that there was nothing to do.
    fn message(self) -> (RouteNetlinkMessage, u16, &'static [i32]) {
        match self {
            Request::SetLink(message) => (RouteNetlinkMessage::SetLink(message), 0, &[]),
            Request::DelLink(index) => {
                let mut message = LinkMessage::default();
                message.header.index = index;
                (RouteNetlinkMessage::DelLink(message), 0, &[libc::ENODEV])
            }
            Request::AddAddress(address) => {
                (RouteNetlinkMessage::NewAddress(address.message()), NLM_F_CREATE | NLM_F_EXCL, &[libc::EEXIST])
            }
            Request::DelAddress(address) => {
                (RouteNetlinkMessage::DelAddress(address.message()), 0, &[libc::EADDRNOTAVAIL])
            }
            Request::AddRoute(route) => {
                (RouteNetlinkMessage::NewRoute(route.message()), NLM_F_CREATE | NLM_F_EXCL, &[libc::EEXIST])
            }
            Request::DelRoute(route) => {
                let mut message = route.message();
                // As `ip route del`: the scope is no part of what names the route.
                message.header.scope = RouteScope::NoWhere;
                (RouteNetlinkMessage::DelRoute(message), 0, &[libc::ESRCH])
            }
        }
    }
}

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
    /// UDP port, where it is a VXLAN device.
    pub(super) vxlan_port: Option<u16>,
    pub(super) tx_dropped: u64,
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let mut link =
            Link { index: message.header.index, up: message.header.flags.contains(LinkFlags::Up), ..Link::default() };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Stats64(stats) => link.tx_dropped = stats.tx_dropped,
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

    fn read(message: &AddressMessage) -> Option<Self> {
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

    fn message(&self) -> AddressMessage {
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
    fn read(message: &RouteMessage) -> Option<Self> {
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

    fn message(&self) -> RouteMessage {
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

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn kind_name(kind: u8) -> &'static str {
    match kind {
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

/// The kernel answers at once; whoever waits longer waits for a reply that was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const DUMP_TRIES: usize = 5;
