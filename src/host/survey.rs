//! The machine as a doctor looks at it: links, addresses, who holds a port, the clock. Changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;

use ipnet::IpNet;

use super::facts::Link;
use super::port::{self, Kind, Owner};
use super::{Host, HostError};
use crate::sys::clock;

/// A device, as far as it can stand in meshd's way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// `tun`, `vxlan`, `bridge`, …; a physical device has none.
    pub kind: Option<String>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// UDP port, where it is a kernel VXLAN device.
    pub vxlan_port: Option<u16>,
    /// Its addresses, with their prefix lengths.
    pub addresses: Vec<IpNet>,
}

/// Who holds a port on one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The address; unspecified for all.
    pub ip: IpAddr,
    /// The process, where there is one and it can be seen.
    pub process: Option<(u32, String)>,
    /// Whether it is known who it is.
    pub seen: bool,
    /// In words.
    pub text: String,
    /// A command that frees the port.
    pub remedy: String,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Survey {
    /// All devices.
    pub devices: Vec<Device>,
    /// Who holds the UDP port.
    pub udp: Vec<Holder>,
    /// Who holds each TCP port.
    pub tcp: BTreeMap<u16, Vec<Holder>>,
    /// Whether the clock is synchronised, where the kernel says so.
    pub synchronised: Option<bool>,
}

impl Host {
    /// Looks at all of it.
    pub async fn survey(&self, udp: u16, tcp: &[u16]) -> Result<Survey, HostError> {
        let links = self.netlink.links().await?;
        let addresses = self.netlink.addresses().await?;
        let device = |link: &Link| Device {
            name: link.name.clone(),
            kind: link.kind.clone(),
            mtu: link.mtu,
            up: link.up,
            vxlan_port: link.vxlan_port,
            addresses: addresses.iter().filter(|a| a.index == link.index).filter_map(|a| a.net()).collect(),
        };
        Ok(Survey {
            devices: links.iter().map(device).collect(),
            udp: holders(Kind::Udp, udp, &links),
            tcp: tcp.iter().map(|port| (*port, holders(Kind::Tcp, *port, &links))).collect(),
            synchronised: clock::is_synchronised().ok(),
        })
    }
}

fn holders(kind: Kind, wanted: u16, links: &[Link]) -> Vec<Holder> {
    let tables = match kind {
        Kind::Udp => ["/proc/net/udp", "/proc/net/udp6"],
        Kind::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
    };
    let texts = tables.map(|table| fs::read_to_string(table).unwrap_or_default());
    let of = |(ip, owner): (IpAddr, Owner)| Holder {
        ip,
        text: owner.to_string(),
        remedy: owner.remedy(wanted),
        seen: !matches!(owner, Owner::Unknown),
        process: match owner {
            Owner::Process(pid, name) => Some((pid, name)),
            _ => None,
        },
    };
    port::holders(&texts, kind, wanted, links).into_iter().map(of).collect()
}
