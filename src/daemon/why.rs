//! The facts for `why`, read out of what the daemon shares and asked of the kernel.

use std::net::IpAddr;
use std::time::Duration;

use super::view::{Shared, lock};
use crate::admin::protocol::why::{Ask, RouteView, WhyView};
use crate::admin::server::Mesh;
use crate::host::Host;
use crate::node::{NodeName, first_address};
use crate::why::{self, Facts};

/// How long the kernel may take to answer.
const KERNEL: Duration = Duration::from_secs(5);

impl Shared {
    /// The whole way of a packet.
    pub(super) async fn explain(&self, ask: Ask) -> Result<WhyView, String> {
        let destination = match ask.destination.parse::<IpAddr>() {
            Ok(ip) => Some(ip),
            Err(_) => self.address_of(&ask.destination)?,
        };
        let route = match destination {
            Some(destination) => self.route(destination).await,
            None => Ok(None),
        };
        let status = self.status();
        let problems = if status.ready { Vec::new() } else { status.reasons };
        let (workers, source_ports) = lock(&self.facts)
            .as_ref()
            .map_or((0, Vec::new()), |facts| (facts.workers as u32, facts.source_ports.clone()));
        let (tables, peers, drops) = (self.tables.load_full(), self.peers(), self.stats().drops);
        Ok(why::explain(&Facts {
            ask: &ask,
            destination,
            tables: &tables,
            peers: &peers,
            route,
            tun: &self.tun,
            problems: &problems,
            workers,
            port: self.port,
            source_ports: &source_ports,
            drops: &drops,
        }))
    }

    /// The overlay address of a node of the list: as this node has its own, the network's or the first.
    fn address_of(&self, name: &str) -> Result<Option<IpAddr>, String> {
        let Ok(name) = name.parse::<NodeName>() else { return Ok(None) };
        let list = self.list.load();
        let overlay = lock(&self.overlay).clone();
        if name == self.node {
            return Ok(overlay.first().copied());
        }
        let Some(node) = list.get(&name) else { return Ok(None) };
        let Some(subnet) = node.subnets.first() else {
            return Err(format!("{name} has no subnet, so there is no address of it in the mesh"));
        };
        let own = list.get(&self.node).and_then(|own| own.subnets.first());
        let network = own.is_some_and(|own| overlay.contains(&own.network()) && own.network() != first_address(own));
        Ok(Some(if network { subnet.network() } else { first_address(subnet) }))
    }

    async fn route(&self, destination: IpAddr) -> Result<Option<RouteView>, String> {
        let lookup = async { Host::open()?.lookup(destination).await };
        let found = tokio::time::timeout(KERNEL, lookup).await.map_err(|_| "the kernel does not answer".to_owned())?;
        let found = found.map_err(|error| error.to_string())?;
        Ok(found.map(|found| RouteView {
            to_mesh: found.kind == "unicast" && found.device.as_deref() == Some(self.tun.as_str()),
            text: found.text,
            kind: found.kind.to_owned(),
            prefix: Some(found.prefix),
            device: found.device,
            gateway: found.gateway,
            source: found.source,
            ours: found.ours,
        }))
    }
}
