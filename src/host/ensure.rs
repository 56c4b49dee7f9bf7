//! Brings the device and the routes to the desired state, whatever they are now.
//!
//! Owns what that state is and the order in which it is reached. At no moment may traffic for the cluster leave by
//! another route, so:
//!
//! 1. `unreachable` routes for the cluster's prefixes, at the worst metric, before all else: with them the rest may fail
//!    or lag, and packets are refused instead of leaving in clear;
//! 2. the device: alias, MTU, settings, up;
//! 3. addresses that are missing;
//! 4. routes into the device that are missing or different, and `unreachable` ones within what flows already;
//! 5. routes that are no more wanted, and only then
//! 6. addresses that are no more wanted (the kernel takes the routes that name one as their source along).
//!
//! Where the state is right nothing is sent but questions, so that no event is raised either. A step that fails does not
//! keep the later ones from being done.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::facts::{Address, Link, Route, TABLE_MAIN, UNICAST, UNREACHABLE};
use super::netlink::{Netlink, Request};
use super::prefixes::PrefixSet;
use super::sysctl::{self, Ipv6};
use super::{Host, HostError, OWNER_ALIAS, ROUTE_PROTOCOL};
use rtnetlink::LinkUnspec;

/// The state that the machine is to have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired {
    /// The TUN device's name.
    pub tun: String,
    /// Its MTU.
    pub mtu: u32,
    /// Overlay addresses, set as /32 and /128. The first of each family is the source of what this node sends.
    pub addresses: Vec<IpAddr>,
    /// What is routed into the device: the union of all nodes' subnets ([`super::union`]).
    pub routes: Vec<IpNet>,
    /// This node's subnets: never routed into the device; `unreachable` where no bridge has a route for them.
    pub own_subnets: Vec<IpNet>,
}

/// What [`Host::ensure`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// In the order in which they were made; empty when everything was right already.
    pub changes: Vec<Change>,
    /// What could not be done, and which meshd can live without.
    pub warnings: Vec<String>,
}

impl Report {
    /// Nothing had to be changed.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

/// One change to the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The device was marked as ours.
    Marked,
    /// The device's MTU.
    Mtu {
        /// What it was.
        from: u32,
        /// What it is.
        to: u32,
    },
    /// A setting below `/proc/sys`.
    Setting(String),
    /// The device was switched on.
    Up,
    /// An address was added to the device.
    AddressAdded(IpAddr),
    /// An address was removed from the device.
    AddressRemoved(IpNet),
    /// A route was added, as `ip route` writes it.
    RouteAdded(String),
    /// A route was removed.
    RouteRemoved(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Marked => write!(f, "device marked with the alias {OWNER_ALIAS}"),
            Change::Mtu { from, to } => write!(f, "MTU {from} -> {to}"),
            Change::Setting(setting) => f.write_str(setting),
            Change::Up => f.write_str("device up"),
            Change::AddressAdded(ip) => write!(f, "address {ip} added"),
            Change::AddressRemoved(net) => write!(f, "address {net} removed"),
            Change::RouteAdded(route) => write!(f, "route {route} added"),
            Change::RouteRemoved(route) => write!(f, "route {route} removed"),
        }
    }
}

impl Host {
    /// Brings device, addresses and routes to the desired state, and says what it had to change.
    ///
    /// Without the device the `unreachable` routes are still set, and the answer is [`HostError::NoDevice`]. After a
    /// failure the rest was done all the same; the error is the first one, further ones are logged.
    pub async fn ensure(&self, desired: &Desired) -> Result<Report, HostError> {
        let mut run = Run { netlink: &self.netlink, desired, report: Report::default(), problems: Vec::new() };
        if let Err(e) = run.all_steps().await {
            run.problems.push(e);
        }
        let mut problems = run.problems.into_iter();
        let first = problems.next();
        for further in problems {
            tracing::warn!("{further}");
        }
        first.map_or(Ok(run.report), Err)
    }
}

struct Run<'a> {
    netlink: &'a Netlink,
    desired: &'a Desired,
    report: Report,
    problems: Vec<HostError>,
}

impl Run<'_> {
    async fn all_steps(&mut self) -> Result<(), HostError> {
        let tun = self.desired.tun.as_str();
        let mut have = self.our_routes().await?;
        let mut wanted = unreachable_routes(self.desired);
        if sysctl::ipv6(tun) == Ipv6::NotInKernel {
            wanted.retain(|r| r.dst.addr().is_ipv4());
        }
        let carried = Carried::of(&have);
        let (later, now) = wanted.iter().cloned().partition::<Vec<_>, _>(|route| carried.covers(route.dst));
        self.add_routes(missing(&now, &have), None).await?;

        let link = self.netlink.link(tun).await?.ok_or_else(|| HostError::NoDevice { tun: tun.to_owned() })?;
        if !link.is_tun {
            return Err(HostError::NotTun { tun: tun.to_owned(), kind: link.described() });
        }
        let changes_before = self.report.changes.len();
        self.set_up_link(&link).await;
        let ipv6 = self.check_ipv6();
        let addresses = self.add_addresses(link.index, ipv6).await?;
        if self.report.changes.len() > changes_before {
            // Switching a device, or IPv6 on it, takes routes along; an address that goes takes their source.
            have = self.our_routes().await?;
        }

        let into_tun: Vec<Route> =
            tun_routes(self.desired, link.index).into_iter().filter(|r| ipv6 || r.dst.addr().is_ipv4()).collect();
        self.add_routes(missing(&into_tun, &have), Some(link.index)).await?;
        self.add_routes(missing(&later, &have), None).await?;

        wanted.extend(into_tun);
        self.remove_routes(stale(&wanted, have), link.index).await;
        self.remove_addresses(addresses).await;
        Ok(())
    }

    async fn our_routes(&self) -> Result<Vec<Route>, HostError> {
        self.netlink.routes(Some(ROUTE_PROTOCOL), |_| true).await
    }

    /// Step 2. The MTU comes before the settings: from 1280 on the device has IPv6 settings, below it has none. Up comes
    /// last, since that is when the kernel would make a link-local address.
    async fn set_up_link(&mut self, link: &Link) {
        let tun = &self.desired.tun;
        if link.alias.as_deref() != Some(OWNER_ALIAS) {
            let message = LinkUnspec::new_with_index(link.index).alias(OWNER_ALIAS).build();
            let outcome = self.netlink.change(Request::SetLink(message), || format!("set the alias of {tun}")).await;
            self.note(outcome, || Change::Marked);
        }
        let (from, to) = (link.mtu, self.desired.mtu);
        if from != to {
            let message = LinkUnspec::new_with_index(link.index).mtu(to).build();
            let outcome =
                self.netlink.change(Request::SetLink(message), || format!("set the MTU of {tun} to {to}")).await;
            self.note(outcome, || Change::Mtu { from, to });
        }
        let settings = sysctl::apply(tun, sysctl::OVERLAY);
        self.report.changes.extend(settings.changed.into_iter().map(Change::Setting));
        self.report.warnings.extend(settings.failed);
        if !link.up {
            let message = LinkUnspec::new_with_index(link.index).up().build();
            let outcome = self.netlink.change(Request::SetLink(message), || format!("switch {tun} on")).await;
            self.note(outcome, || Change::Up);
        }
    }

    /// Whether IPv6 works on the device. That it does not is a problem only for who wants an IPv6 address there.
    fn check_ipv6(&mut self) -> bool {
        let tun = self.desired.tun.clone();
        let off = |place, fix| HostError::Ipv6Off { tun: tun.clone(), place, fix };
        let problem = match sysctl::ipv6(&tun) {
            Ipv6::On => return true,
            Ipv6::NotOnDevice if self.desired.mtu < IPV6_MIN_MTU => {
                HostError::MtuBelowIpv6 { tun: tun.clone(), mtu: self.desired.mtu }
            }
            Ipv6::NotOnDevice => off("on this device", format!("look whether {tun} still exists")),
            Ipv6::NotInKernel => off("in the kernel", "boot without ipv6.disable=1".to_owned()),
            Ipv6::Disabled => off(
                "by sysctl",
                format!("set it on: sysctl -w net.ipv6.conf.default.disable_ipv6=0 net.ipv6.conf.{tun}.disable_ipv6=0"),
            ),
        };
        if self.desired.addresses.iter().any(IpAddr::is_ipv6) {
            self.problems.push(problem);
        } else if self.desired.routes.iter().any(|r| r.addr().is_ipv6()) {
            self.report.warnings.push(format!("IPv6 routes are left out: {problem}"));
        }
        false
    }

    /// Step 3. Gives back what the device has and should not have.
    async fn add_addresses(&mut self, index: u32, ipv6: bool) -> Result<Vec<Address>, HostError> {
        let mut have = self.netlink.addresses().await?;
        have.retain(|a| a.index == index);
        let wanted: Vec<Address> = self
            .desired
            .addresses
            .iter()
            .filter(|ip| ipv6 || ip.is_ipv4())
            .map(|ip| Address::ours(index, *ip))
            .collect();
        let same = |a: &Address, b: &Address| (a.ip, a.prefix_len) == (b.ip, b.prefix_len);
        for address in &wanted {
            if have.iter().any(|a| same(a, address)) {
                continue;
            }
            // IPv6 knows an address once a device, whatever its prefix length.
            if let Some(other) = have.iter().find(|a| a.ip == address.ip && a.ip.is_ipv6()) {
                self.remove_addresses(vec![other.clone()]).await;
            }
            let doing = || format!("add {} to {}", address.ip, self.desired.tun);
            let outcome = self.netlink.change(Request::AddAddress(address.clone()), doing).await;
            self.note(outcome, || Change::AddressAdded(address.ip));
        }
        have.retain(|a| !wanted.iter().any(|w| same(a, w) || (a.ip == w.ip && a.ip.is_ipv6())));
        Ok(have)
    }

    /// Steps 1 and 4. What stands in the way is removed where it is a route into our own device, and named otherwise.
    async fn add_routes(&mut self, requests: Vec<(Route, Request)>, tun: Option<u32>) -> Result<(), HostError> {
        if requests.is_empty() {
            return Ok(());
        }
        let mut taken = Vec::new();
        for (route, adds, outcome) in self.change_routes(requests).await {
            match outcome {
                Ok(false) if adds => taken.push(route),
                outcome => self.note_route(&route, adds, outcome),
            }
        }
        if taken.is_empty() {
            return Ok(());
        }

        let keys: HashSet<_> = taken.iter().map(Route::key).collect();
        let occupants = self.netlink.routes(None, |r| keys.contains(&r.key())).await?;
        let occupants: HashMap<_, Route> = occupants.into_iter().map(|r| (r.key(), r)).collect();
        let names = device_names(&self.netlink.links().await?);
        let mut again = Vec::new();
        for route in taken {
            match occupants.get(&route.key()) {
                Some(other) if *other == route => {}
                Some(other) if other.oif.is_some() && other.oif != tun => self.problems.push(HostError::RouteTaken {
                    prefix: route.dst,
                    owner: other.described(|index| names.get(&index).cloned()),
                }),
                Some(other) if other.oif.is_none() => {
                    // An `unreachable` of someone else's refuses the packets just as well.
                    if route.kind == UNICAST {
                        let owner = other.described(|index| names.get(&index).cloned());
                        self.problems.push(HostError::RouteTaken { prefix: route.dst, owner });
                    }
                }
                Some(other) => {
                    again.push((other.clone(), Request::DelRoute(other.clone())));
                    again.push((route.clone(), Request::AddRoute(route)));
                }
                // Gone meanwhile.
                None => again.push((route.clone(), Request::AddRoute(route))),
            }
        }
        for (route, adds, outcome) in self.change_routes(again).await {
            self.note_route(&route, adds, outcome);
        }
        Ok(())
    }

    /// Step 5. Routes into the device go before the `unreachable` ones behind them.
    async fn remove_routes(&mut self, mut routes: Vec<Route>, tun: u32) {
        // What is routed into the device goes last: an `unreachable` prefix that outlived it would beat the wider
        // route that takes its place.
        routes.sort_by_key(|r| r.oif == Some(tun));
        let requests = routes.into_iter().map(|r| (r.clone(), Request::DelRoute(r))).collect();
        for (route, adds, outcome) in self.change_routes(requests).await {
            self.note_route(&route, adds, outcome);
        }
    }

    /// Step 6.
    async fn remove_addresses(&mut self, addresses: Vec<Address>) {
        for address in addresses {
            let doing = || format!("remove {} from {}", address.ip, self.desired.tun);
            let outcome = self.netlink.change(Request::DelAddress(address.clone()), doing).await;
            if let Some(net) = address.net() {
                self.note(outcome, || Change::AddressRemoved(net));
            }
        }
    }

    async fn change_routes(&self, requests: Vec<(Route, Request)>) -> Vec<(Route, bool, Result<bool, HostError>)> {
        let tun = &self.desired.tun;
        let tagged = requests
            .into_iter()
            .map(|(route, request)| ((route, matches!(request, Request::AddRoute(_))), request))
            .collect();
        let doing = |(route, adds): &(Route, bool)| {
            let verb = if *adds { "add" } else { "remove" };
            format!("{verb} the route {}", route.described(|_| Some(tun.clone())))
        };
        let outcomes = self.netlink.change_routes(tagged, doing).await;
        outcomes.into_iter().map(|((route, adds), outcome)| (route, adds, outcome)).collect()
    }

    fn note_route(&mut self, route: &Route, added: bool, outcome: Result<bool, HostError>) {
        let tun = self.desired.tun.clone();
        let route = route.described(|_| Some(tun.clone()));
        self.note(outcome, || if added { Change::RouteAdded(route) } else { Change::RouteRemoved(route) });
    }

    fn note(&mut self, outcome: Result<bool, HostError>, change: impl FnOnce() -> Change) {
        match outcome {
            Ok(true) => self.report.changes.push(change()),
            Ok(false) => {}
            Err(e) => self.problems.push(e),
        }
    }
}

/// The names of the devices by index.
pub(super) fn device_names(links: &[Link]) -> HashMap<u32, String> {
    links.iter().map(|l| (l.index, l.name.clone())).collect()
}

/// What has no other way is refused: the cluster's prefixes, so that nothing leaves in clear when the device is gone, and
/// our own subnets, so that a packet for an absent local pod does not go back into the overlay.
fn unreachable_routes(desired: &Desired) -> Vec<Route> {
    let mut prefixes: Vec<IpNet> = PrefixSet::new(&desired.routes).iter().collect();
    prefixes.extend(desired.own_subnets.iter().map(IpNet::trunc));
    prefixes.sort_unstable();
    prefixes.dedup();
    prefixes.into_iter().map(|dst| Route { metric: WORST_METRIC, kind: UNREACHABLE, ..route(dst) }).collect()
}

/// The cluster's prefixes lead into the device, but for those that are ours alone: there the route would stand in the
/// place of the pod bridge's.
fn tun_routes(desired: &Desired, tun: u32) -> Vec<Route> {
    let own = PrefixSet::new(&desired.own_subnets);
    let source = |v4: bool| desired.addresses.iter().copied().find(|a| a.is_ipv4() == v4);
    let (v4, v6) = (source(true), source(false));
    PrefixSet::new(&desired.routes)
        .iter()
        .filter(|dst| own.covering(*dst).is_none())
        .map(|dst| {
            let (metric, src) = if dst.addr().is_ipv4() { (0, v4) } else { (IPV6_DEFAULT_METRIC, v6) };
            Route { metric, src, oif: Some(tun), ..route(dst) }
        })
        .collect()
}

fn route(dst: IpNet) -> Route {
    Route {
        dst,
        table: TABLE_MAIN,
        metric: 0,
        tos: 0,
        protocol: ROUTE_PROTOCOL,
        kind: UNICAST,
        oif: None,
        gateway: None,
        src: None,
    }
}

/// What makes `have` contain all of `wanted`. A route of ours that differs in source or device is removed first, since
/// no two share a key; meanwhile the `unreachable` one behind it refuses the packets.
fn missing(wanted: &[Route], have: &[Route]) -> Vec<(Route, Request)> {
    let present: HashSet<&Route> = have.iter().collect();
    let by_key: HashMap<_, &Route> = have.iter().map(|r| (r.key(), r)).collect();
    let mut requests = Vec::new();
    for route in wanted.iter().filter(|r| !present.contains(r)) {
        if let Some(different) = by_key.get(&route.key()) {
            requests.push(((*different).clone(), Request::DelRoute((*different).clone())));
        }
        requests.push((route.clone(), Request::AddRoute(route.clone())));
    }
    requests
}

/// What is ours and not wanted. One that shares its key with a wanted route was replaced by it: removing it now would
/// remove that one, since IPv6 does not look at the source.
fn stale(wanted: &[Route], have: Vec<Route>) -> Vec<Route> {
    let keys: HashSet<_> = wanted.iter().map(Route::key).collect();
    have.into_iter().filter(|r| !keys.contains(&r.key())).collect()
}

/// What our routes carry into the device already, and refuse where the device fails.
///
/// The longest prefix wins before any metric counts: an `unreachable` route within a wider one into the device would
/// refuse traffic that flows, until a route into the device for the narrower prefix stands beside it. So it is added
/// after that; meanwhile the wider `unreachable` route does its work.
struct Carried {
    into_device: PrefixSet,
    unreachable: PrefixSet,
}

impl Carried {
    fn of(have: &[Route]) -> Self {
        let of = |kind| {
            let in_main = have.iter().filter(|r| r.table == TABLE_MAIN && r.kind == kind);
            PrefixSet::new(&in_main.map(|r| r.dst).collect::<Vec<_>>())
        };
        Carried { into_device: of(UNICAST), unreachable: of(UNREACHABLE) }
    }

    fn covers(&self, net: IpNet) -> bool {
        self.into_device.covering(net).is_some() && self.unreachable.covering(net).is_some()
    }
}

/// Loses against every other route for the same prefix.
const WORST_METRIC: u32 = u32::MAX;
/// What the kernel makes of "no metric" in IPv6 (`IP6_RT_PRIO_USER`).
const IPV6_DEFAULT_METRIC: u32 = 1024;
const IPV6_MIN_MTU: u32 = 1280;

#[cfg(test)]
mod tests {
    use super::*;

    fn desired(routes: &[&str], own: &[&str]) -> Desired {
        Desired {
            tun: "mesh0".to_owned(),
            mtu: 1450,
            addresses: vec!["10.42.1.1".parse().unwrap(), "fd00:1::1".parse().unwrap(), "10.42.1.9".parse().unwrap()],
            routes: routes.iter().map(|t| t.parse().unwrap()).collect(),
            own_subnets: own.iter().map(|t| t.parse().unwrap()).collect(),
        }
    }

    fn written(routes: &[Route]) -> Vec<String> {
        routes.iter().map(|r| r.described(|_| Some("mesh0".to_owned()))).collect()
    }

    #[test]
    fn every_prefix_and_own_subnet_is_refused_at_the_worst_metric() {
        let all = unreachable_routes(&desired(&["10.42.0.0/16", "fd00::/48"], &["10.42.1.0/24", "10.42.1.0/24"]));
        assert_eq!(
            written(&all),
            [
                "unreachable 10.42.0.0/16 proto 72 metric 4294967295",
                "unreachable 10.42.1.0/24 proto 72 metric 4294967295",
                "unreachable fd00::/48 proto 72 metric 4294967295",
            ]
        );
    }

    #[test]
    fn routes_lead_into_the_device_but_never_to_our_own_subnet() {
        let desired =
            desired(&["10.42.1.0/24", "10.42.3.0/24", "10.42.6.0/23", "fd00::/48"], &["10.42.1.0/24", "10.42.7.0/24"]);
        let routes = tun_routes(&desired, 7);
        assert_eq!(
            written(&routes),
            [
                "10.42.3.0/24 dev mesh0 proto 72",
                "10.42.6.0/23 dev mesh0 proto 72",
                "fd00::/48 dev mesh0 proto 72 metric 1024"
            ]
        );
        assert_eq!(routes[0].src, Some("10.42.1.1".parse().unwrap()));
        assert_eq!(routes[2].src, Some("fd00:1::1".parse().unwrap()));
    }

    #[test]
    fn nothing_is_missing_or_stale_when_all_is_there() {
        let desired = desired(&["10.42.0.0/16", "fd00::/48"], &["10.42.1.0/24"]);
        let mut all = unreachable_routes(&desired);
        all.extend(tun_routes(&desired, 7));
        assert!(missing(&all, &all).is_empty());
        assert!(stale(&all, all.clone()).is_empty());
    }

    #[test]
    fn a_route_with_another_source_is_replaced_and_not_removed_later() {
        let wanted = tun_routes(&desired(&["10.42.0.0/16"], &[]), 7);
        let old = vec![Route { src: Some("10.42.9.1".parse().unwrap()), ..wanted[0].clone() }];
        let requests = missing(&wanted, &old);
        assert!(
            matches!(requests.as_slice(), [(a, Request::DelRoute(_)), (b, Request::AddRoute(_))] if *a == old[0] && *b == wanted[0])
        );
        assert!(stale(&wanted, old).is_empty());
    }

    #[test]
    fn what_is_no_more_wanted_is_stale_in_any_table() {
        let wanted = tun_routes(&desired(&["10.42.0.0/16"], &[]), 7);
        let old = vec![
            wanted[0].clone(),
            Route { dst: "10.99.0.0/16".parse().unwrap(), ..wanted[0].clone() },
            Route { table: 1000, ..wanted[0].clone() },
        ];
        assert_eq!(stale(&wanted, old.clone()), old[1..]);
    }
}
