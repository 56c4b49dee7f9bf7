//! What is wrong with this machine as a node, and the command that mends it.
//!
//! Owns the report. `facts` collects from the kernel, the tools that are installed, the configuration and a running meshd;
//! `checks` judges, a pure function a concern, and never guesses: what could not be found out is said to be `skipped`.

pub mod bugreport;
pub mod checks;
pub mod facts;
pub mod redact;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;

use crate::admin::protocol::{NodeView, PeerView, StatsView, StatusView};
pub use crate::host::{Device, Holder};

/// How a concern fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing to do.
    Ok,
    /// It could not be found out.
    Skipped,
    /// It works, but not as it could, or not for everything.
    Warning,
    /// Something does not work because of it.
    Bad,
}

/// The outcome of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at: stable, scripts rely on it.
    pub name: &'static str,
    /// How it fares.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// A command that can be pasted as it stands, remarks behind a `#`; or what to do, where no command does it.
    pub fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Check { name, level: Level::Ok, found: found.into(), fix: None }
    }

    fn skipped(name: &'static str, found: impl Into<String>) -> Self {
        Check { name, level: Level::Skipped, found: found.into(), fix: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Check { name, level: Level::Warning, found: found.into(), fix: Some(fix.into()) }
    }

    fn bad(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Check { name, level: Level::Bad, found: found.into(), fix: Some(fix.into()) }
    }
}

/// All checks, in the order in which they should be mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing is bad.
    pub good: bool,
    /// Each check.
    pub checks: Vec<Check>,
}

/// Judges the facts.
pub fn report(facts: &Facts) -> Report {
    let checks = checks::all(facts);
    Report { good: checks.iter().all(|check| check.level != Level::Bad), checks }
}

/// A running meshd's own word.
#[derive(Debug, Clone, Default)]
pub struct Daemon {
    /// `status`.
    pub status: StatusView,
    /// `stats`.
    pub stats: StatsView,
    /// `peers`.
    pub peers: Vec<PeerView>,
    /// `nodes`.
    pub nodes: Vec<NodeView>,
}

/// An interface and what firewalld does with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Zone {
    /// The interface.
    pub device: String,
    /// Its zone.
    pub name: String,
    /// What the zone does with what nothing lets in: `default`, `ACCEPT`, `DROP`, …
    pub target: String,
    /// What is let in, as `8472/udp`.
    pub ports: Vec<String>,
}

/// A file's owner and permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileFact {
    /// Where.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
}

/// A port of the etcd that servers run themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdPort {
    /// Which.
    pub port: u16,
    /// Who has it and is not the sidecar's own etcd.
    pub others: Vec<Holder>,
    /// Whether the sidecar's own has it.
    pub own: bool,
}

/// Everything that the checks look at.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// A running meshd, where one was reached.
    pub daemon: Option<Daemon>,
    /// Why none was.
    pub unreachable: Option<String>,
    /// What is wrong with the configuration.
    pub config_problem: Option<String>,
    /// The TUN device's name.
    pub tun: String,
    /// The UDP data port.
    pub port: u16,
    /// The servers' TCP port, where this node is one.
    pub server_port: Option<u16>,
    /// This node's underlay addresses, as far as they are known.
    pub underlay: Vec<IpAddr>,
    /// All devices; `None`: netlink did not answer.
    pub devices: Option<Vec<Device>>,
    /// Who holds the UDP data port.
    pub udp: Vec<Holder>,
    /// Who holds the servers' TCP port.
    pub tcp: Vec<Holder>,
    /// The TCP ports of an etcd that servers run themselves, where this node is such a server or is to be one.
    pub etcd: Vec<EtcdPort>,
    /// `nft -j list ruleset`.
    pub nft: Option<String>,
    /// `iptables-save` (the legacy tables are in there alone).
    pub iptables: Option<String>,
    /// The kernel's release.
    pub release: String,
    /// Whether the clock is synchronised, where the kernel says so.
    pub synchronised: Option<bool>,
    /// Settings below /proc/sys/net, by their dotted names.
    pub sysctls: BTreeMap<String, String>,
    /// firewalld's zones of the underlay's devices; `None`: it does not run.
    pub zones: Option<Vec<Zone>>,
    /// Whether networkd removes routes that it does not know; `None`: it does not run.
    pub networkd_removes: Option<bool>,
    /// Whether NetworkManager leaves the TUN device alone; `None`: it does not run.
    pub network_manager_spares: Option<bool>,
    /// The private key's file, where there is one.
    pub key: Option<FileFact>,
}

impl Facts {
    fn sysctl(&self, name: &str) -> Option<&str> {
        self.sysctls.get(name).map(String::as_str)
    }

    fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().flatten().find(|device| device.name == name)
    }

    /// The devices that carry the underlay addresses.
    fn underlay_devices(&self) -> impl Iterator<Item = (&Device, IpAddr)> {
        let carries = |device: &Device, ip: IpAddr| device.addresses.iter().any(|net| net.addr() == ip);
        self.underlay.iter().filter_map(move |ip| {
            self.devices.iter().flatten().find(|device| carries(device, *ip)).map(|device| (device, *ip))
        })
    }
}
