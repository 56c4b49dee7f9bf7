//! Which route the kernel itself would take to an address, policy rules and all.

use std::net::IpAddr;

use ipnet::IpNet;

use super::ensure::device_names;
use super::facts::{Route, kind_name};
use super::{Host, HostError, ROUTE_PROTOCOL};

/// The route that the kernel takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// The prefix that won.
    pub prefix: IpNet,
    /// `unicast`, `local`, `unreachable`, …
    pub kind: &'static str,
    /// The device that it leads to.
    pub device: Option<String>,
    /// The next hop, where there is one.
    pub gateway: Option<IpAddr>,
    /// The address that the kernel sends from.
    pub source: Option<IpAddr>,
    /// As `ip route` writes it, and accepts it back.
    pub text: String,
    /// Whether meshd made it.
    pub ours: bool,
}

impl Host {
    /// Asks the kernel for its route to an address; `None` where it has none.
    pub async fn lookup(&self, to: IpAddr) -> Result<Option<Lookup>, HostError> {
        let names = device_names(&self.netlink.links().await?);
        let described = |route: &Route| route.described(|index| names.get(&index).cloned());
        let matched = match self.netlink.route_to(to, true).await {
            Ok(matched) => matched,
            // The kernel answers with the error that a packet would meet. Which route says so is found in its tables.
            Err(error) if is_verdict(&error) => {
                let covering = self.netlink.routes(None, |route| route.dst.contains(&to)).await?;
                let best = covering.into_iter().max_by_key(|r| (r.dst.prefix_len(), std::cmp::Reverse(r.metric)));
                return Ok(best.filter(|route| route.kind != super::facts::UNICAST).map(|route| Lookup {
                    prefix: route.dst,
                    kind: kind_name(route.kind),
                    device: None,
                    gateway: None,
                    source: None,
                    text: described(&route),
                    ours: route.protocol == ROUTE_PROTOCOL,
                }));
            }
            Err(error) => return Err(error),
        };
        let Some(matched) = matched else { return Ok(None) };
        // The answer without the match says what the kernel makes of it: the source address above all.
        let taken = self.netlink.route_to(to, false).await.ok().flatten();
        let name = |index: Option<u32>| index.and_then(|index| names.get(&index).cloned());
        Ok(Some(Lookup {
            prefix: matched.dst,
            kind: kind_name(matched.kind),
            device: name(taken.as_ref().and_then(|route| route.oif).or(matched.oif)),
            gateway: taken.as_ref().and_then(|route| route.gateway).or(matched.gateway),
            source: taken.and_then(|route| route.src).or(matched.src),
            text: described(&matched),
            ours: matched.protocol == ROUTE_PROTOCOL,
        }))
    }
}

/// ENETUNREACH, EHOSTUNREACH, EACCES and EINVAL are what `unreachable`, `prohibit`, `blackhole` and no route at all give.
fn is_verdict(error: &HostError) -> bool {
    let verdicts = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL];
    error.raw_os_error().is_some_and(|code| verdicts.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_way_to_oneself_is_local() {
        let host = Host::open().unwrap();
        let lookup = host.lookup("127.0.0.1".parse().unwrap()).await.unwrap().unwrap();
        assert_eq!(lookup.kind, "local", "{lookup:?}");
    }
}
