//! The machine around the data plane: the TUN device's address, MTU and settings, routes, clashes, the underlay.
//!
//! Owns everything that is done through netlink and `/proc/sys/net`, and what it left there: the device that carries
//! the alias [`OWNER_ALIAS`] and the routes that carry [`ROUTE_PROTOCOL`]; nothing else is ever changed or removed. It
//! does not create the device (`io` does), knows no peers and no packets, and never reads `/sys`, which may belong to
//! another network namespace.

mod clash;
mod cleanup;
mod ensure;
mod facts;
mod lookup;
mod netlink;
mod port;
mod prefixes;
mod survey;
mod sysctl;
mod underlay;
mod watch;
mod xfrm;

use std::io;

use ipnet::IpNet;
use rtnetlink::LinkUnspec;

use self::netlink::Request;

pub use clash::{Clash, ClashKind, Preflight, Refused};
pub use cleanup::CleanupReport;
pub use ensure::{Change, Desired, Report};
pub use lookup::Lookup;
pub use prefixes::union;
pub use survey::{Device, Holder, Survey};
pub use underlay::{NodeIp, Underlay, UnderlayError};
pub use watch::Watch;
pub use xfrm::outgoing_policies;

/// The route protocol number that marks a route as meshd's (`ip route show proto 72`).
pub const ROUTE_PROTOCOL: u8 = 72;

/// The alias that marks a device as meshd's (`ip link show`).
pub const OWNER_ALIAS: &str = "meshd";

/// The loopback device's index, in every namespace.
const LOOPBACK: u32 = 1;

/// The machine that meshd runs on, as far as it is reached through netlink.
///
/// Lives in the network namespace of the thread that opened it, and on the tokio runtime it was opened in, which needs
/// I/O and time enabled. A connection that breaks is opened anew with the next call. One meshd a namespace: a second one
/// would take the first one's routes for leftovers.
pub struct Host {
    netlink: netlink::Netlink,
}

impl Host {
    /// Opens a connection to the kernel. Needs no privilege; most changes then need CAP_NET_ADMIN.
    pub fn open() -> Result<Self, HostError> {
        Ok(Host { netlink: netlink::Netlink::open()? })
    }

    /// Switches the loopback device on, as a namespace that was just made needs it.
    pub async fn loopback_up(&self) -> Result<(), HostError> {
        let message = LinkUnspec::new_with_index(LOOPBACK).up().build();
        let done = self.netlink.change(Request::SetLink(message), || "switch on the loopback device".to_owned()).await;
        done.map(drop)
    }

    /// Has a TAP device, into which meshd writes what leaves this host, on and with the settings for that. It gets no
    /// addresses. Without a setting it is of no use.
    pub async fn ensure_outlet(&self, tap: &str) -> Result<(), String> {
        let link = self.netlink.link(tap).await.map_err(|error| error.to_string())?;
        let link = link.ok_or_else(|| HostError::NoDevice { tun: tap.to_owned() }.to_string())?;
        let applied = sysctl::apply(tap, sysctl::OUTLET);
        applied.changed.iter().for_each(|change| tracing::info!("{change}"));
        if let Some(failure) = applied.failed.into_iter().next() {
            return Err(failure);
        }
        if link.up {
            return Ok(());
        }
        let message = LinkUnspec::new_with_index(link.index).up().build();
        let done = self.netlink.change(Request::SetLink(message), || format!("switch on {tap}")).await;
        done.map(drop).map_err(|error| error.to_string())
    }

    /// Whether the kernel takes TCP super-packets over IPv4 of more than 64 KiB (Linux 6.3; from a TUN device 6.6).
    pub async fn knows_big_tcp(&self) -> Result<bool, HostError> {
        Ok(self.netlink.links().await?.iter().any(|link| link.knows_big_tcp))
    }

    /// Packets that the kernel dropped before meshd read them from the device, because its queue was full; since the
    /// device was made.
    pub async fn tun_drops(&self, tun: &str) -> Result<u64, HostError> {
        match self.netlink.link(tun).await? {
            Some(link) => Ok(link.tx_dropped),
            None => Err(HostError::NoDevice { tun: tun.to_owned() }),
        }
    }
}

/// Why the machine could not be read or brought to the desired state.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {source}")]
    Open {
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Not permitted.
    #[error("cannot {doing}: {source}; run meshd as root or give it CAP_NET_ADMIN")]
    Denied {
        /// What was tried.
        doing: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot {doing}: {source}")]
    Kernel {
        /// What was tried.
        doing: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel's answer did not arrive.
    #[error("cannot {doing}: the kernel's answer was lost; the next try opens a new netlink socket")]
    Lost {
        /// What was tried.
        doing: String,
    },
    /// The device is gone.
    #[error("there is no device {tun}; it was deleted or renamed, and has to be created again")]
    NoDevice {
        /// Its name.
        tun: String,
    },
    /// The device is another one.
    #[error("{tun} is {kind}, not a TUN device; choose another name (`tun:` in the config)")]
    NotTun {
        /// Its name.
        tun: String,
        /// What it is.
        kind: String,
    },
    /// Another's route sits where one of ours belongs.
    #[error("the route to {prefix} is taken by `{owner}`; remove it: ip {}route del {owner}",
        if prefix.addr().is_ipv4() { "" } else { "-6 " })]
    RouteTaken {
        /// The prefix that cannot be routed into the overlay.
        prefix: IpNet,
        /// The route in the way.
        owner: String,
    },
    /// IPv6 is wanted and switched off.
    #[error("{tun} cannot have an IPv6 address: IPv6 is off {place}; {fix}, or leave IPv6 subnets out")]
    Ipv6Off {
        /// The device.
        tun: String,
        /// Where it is off.
        place: &'static str,
        /// How to switch it on.
        fix: String,
    },
    /// IPv6 is wanted over a link that is too small for it.
    #[error(
        "{tun} cannot have an IPv6 address: its MTU is {mtu}, and IPv6 needs 1280 (RFC 8200 §5); \
         raise the underlay's MTU, or leave IPv6 subnets out"
    )]
    MtuBelowIpv6 {
        /// The device.
        tun: String,
        /// Its MTU.
        mtu: u32,
    },
}

impl HostError {
    fn refused(doing: String, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::PermissionDenied {
            HostError::Denied { doing, source }
        } else {
            HostError::Kernel { doing, source }
        }
    }

    fn raw_os_error(&self) -> Option<i32> {
        match self {
            HostError::Open { source } | HostError::Denied { source, .. } | HostError::Kernel { source, .. } => {
                source.raw_os_error()
            }
            _ => None,
        }
    }
}
