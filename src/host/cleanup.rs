//! Takes away what a stopped meshd leaves on purpose.
//!
//! Owns the removal of what carries our marks; does not know whether a meshd is still running.

use super::ensure::device_names;
use super::netlink::Request;
use super::{Host, HostError, OWNER_ALIAS, ROUTE_PROTOCOL};

/// What [`Host::cleanup`] found and removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CleanupReport {
    /// The device that was removed.
    pub device: Option<String>,
    /// A device of that name that is not ours, and was left alone: what it is.
    pub foreign_device: Option<String>,
    /// The routes that were removed, as `ip route` writes them.
    pub routes: Vec<String>,
}

impl CleanupReport {
    /// There was nothing to remove.
    pub fn is_empty(&self) -> bool {
        self.device.is_none() && self.routes.is_empty()
    }
}

impl Host {
    /// Removes the device, where it is ours, and every route of ours. Safe to repeat.
    ///
    /// The device goes first: until the last moment the `unreachable` routes keep traffic from leaving in clear. Who
    /// calls this makes sure that no meshd is running.
    pub async fn cleanup(&self, tun: &str) -> Result<CleanupReport, HostError> {
        let mut report = CleanupReport::default();
        // Listed before the device goes, so that its routes are named too: the kernel removes those along with it.
        let routes = self.netlink.routes(Some(ROUTE_PROTOCOL), |_| true).await?;
        let names = device_names(&self.netlink.links().await?);
        if let Some(link) = self.netlink.link(tun).await? {
            if link.is_tun && link.alias.as_deref() == Some(OWNER_ALIAS) {
                let doing = || format!("remove the device {tun}");
                if self.netlink.change(Request::DelLink(link.index), doing).await? {
                    report.device = Some(tun.to_owned());
                }
            } else {
                report.foreign_device = Some(match link.alias.as_deref() {
                    Some(alias) => format!("{tun} is {} with the alias {alias:?}", link.described()),
                    None => format!("{tun} is {} without meshd's alias", link.described()),
                });
            }
        }
        for route in routes {
            let text = route.described(|index| names.get(&index).cloned());
            let went_with_the_device = report.device.is_some()
                && route.oif.is_some_and(|index| names.get(&index).is_some_and(|name| name == tun));
            let request = Request::DelRoute(route);
            if went_with_the_device || self.netlink.change(request, || format!("remove the route {text}")).await? {
                report.routes.push(text);
            }
        }
        Ok(report)
    }
}
