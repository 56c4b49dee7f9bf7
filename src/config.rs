//! Text to valid types: the configuration.
//!
//! Owns which keys there are, which source wins (a flag, then the environment, then the file), and what each value
//! means. Does no I/O and asks no clock: the caller brings the texts (`load` is the thin part that reads them). Does not
//! know whether an interface exists, a port is free or a node list is good.

mod error;
mod keys;
mod layers;
pub mod load;
mod values;
pub(crate) mod yaml;

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::ops::Deref;
use std::path::PathBuf;

pub use self::error::{ConfigError, Place, Problem};
pub(crate) use self::error::{did_you_mean, shorten};
pub use self::keys::{ENV_PREFIX, KEYS, Key};
use self::layers::Layers;
pub use self::layers::Sources;
pub(crate) use self::values::not_underlay;
pub use self::values::{
    BadIfName, Encryption, IfName, Io, LogFormat, Mtu, NodeIp, NodeIpSpec, OverlayAddress, Workers,
};
pub use self::yaml::At;
use crate::node::{DEFAULT_PORT, NodeName, Vni};

/// A valid configuration. Only [`Config::parse`] makes one, and it cannot be changed: read the settings through it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    settings: Settings,
    notices: Vec<String>,
}

/// The settings of a [`Config`], one field for each key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// `node-name`
    pub node_name: NodeName,
    /// `node-ip`
    pub node_ip: NodeIp,
    /// `advertise-address`: at most one for each family; empty means the same as `node-ip`.
    pub advertise_address: Vec<IpAddr>,
    /// `tun`
    pub tun: IfName,
    /// `address`
    pub address: OverlayAddress,
    /// `port`
    pub port: NonZeroU16,
    /// `vni`
    pub vni: Vni,
    /// `mtu`
    pub mtu: Mtu,
    /// `encryption`
    pub encryption: Encryption,
    /// `workers`
    pub workers: Workers,
    /// `io`
    pub io: Io,
    /// `data-dir`
    pub data_dir: PathBuf,
    /// `socket`
    pub socket: PathBuf,
    /// `socket-mode`: permission bits, at most `0o777`.
    pub socket_mode: u32,
    /// `socket-group`: a name or a number.
    pub socket_group: Option<String>,
    /// `nodes-file`
    pub nodes_file: Option<PathBuf>,
    /// `log`: a filter that tracing has accepted.
    pub log: String,
    /// `log-format`
    pub log_format: LogFormat,
}

/// What a new configuration changes, by key, in the documentation's order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LiveChanges {
    /// Keys whose change the running daemon takes over.
    pub live: Vec<&'static str>,
    /// Keys whose change waits for a restart.
    pub restart: Vec<&'static str>,
}

impl Config {
    /// Makes a configuration out of what the user wrote.
    pub fn parse(sources: &Sources) -> Result<Self, ConfigError> {
        let layers = Layers::new(sources)?;
        let settings = Settings {
            node_name: match layers.one("node-name", values::node_name)? {
                Some(name) => name,
                None => default_name(&sources.hostname)?,
            },
            node_ip: match layers.many("node-ip", values::node_ip, same_spec)? {
                given if given.is_empty() => NodeIp::Auto,
                given => NodeIp::Given(given),
            },
            advertise_address: layers.many("advertise-address", values::advertise_address, same_family)?,
            tun: layers.one("tun", values::tun)?.unwrap_or_else(IfName::default_tun),
            address: layers
                .many("address", values::overlay_address, same_overlay)?
                .into_iter()
                .reduce(both)
                .unwrap_or(OverlayAddress::First),
            port: layers.one("port", values::port)?.unwrap_or(PORT),
            vni: layers.one("vni", values::vni)?.unwrap_or(Vni::DEFAULT),
            mtu: layers.one("mtu", values::mtu)?.unwrap_or(Mtu::Auto),
            encryption: layers.one("encryption", values::encryption)?.unwrap_or(Encryption::None),
            workers: layers.one("workers", values::workers)?.unwrap_or(Workers::Auto),
            io: layers.one("io", values::io)?.unwrap_or(Io::Auto),
            data_dir: layers.one("data-dir", values::path)?.unwrap_or_else(|| "/var/lib/meshd".into()),
            socket: layers.one("socket", values::socket)?.unwrap_or_else(|| "/run/meshd/meshd.sock".into()),
            socket_mode: layers.one("socket-mode", values::socket_mode)?.unwrap_or(0o660),
            socket_group: layers.one("socket-group", values::socket_group)?,
            nodes_file: layers.one("nodes-file", values::path)?,
            log: layers.one("log", values::log)?.unwrap_or_else(|| "info".to_owned()),
            log_format: layers.one("log-format", values::log_format)?.unwrap_or(LogFormat::Text),
        };
        Ok(Config { settings, notices: layers.notices })
    }

    /// Things that are no error but that somebody should read once, such as a `MESHD_` variable that means nothing.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// What differs in `new`, and whether it can be taken over without a restart.
    pub fn live_changes(&self, new: &Config) -> LiveChanges {
        let mut changes = LiveChanges::default();
        for key in KEYS.iter().filter(|key| self.differs(new, key.name)) {
            if key.live { &mut changes.live } else { &mut changes.restart }.push(key.name);
        }
        changes
    }

    fn differs(&self, new: &Config, key: &str) -> bool {
        let (a, b) = (&self.settings, &new.settings);
        match key {
            "node-name" => a.node_name != b.node_name,
            "node-ip" => a.node_ip != b.node_ip,
            "advertise-address" => a.advertise_address != b.advertise_address,
            "tun" => a.tun != b.tun,
            "address" => a.address != b.address,
            "port" => a.port != b.port,
            "vni" => a.vni != b.vni,
            "mtu" => a.mtu != b.mtu,
            "encryption" => a.encryption != b.encryption,
            "workers" => a.workers != b.workers,
            "io" => a.io != b.io,
            "data-dir" => a.data_dir != b.data_dir,
            "socket" => a.socket != b.socket,
            "socket-mode" => a.socket_mode != b.socket_mode,
            "socket-group" => a.socket_group != b.socket_group,
            "nodes-file" => a.nodes_file != b.nodes_file,
            "log" => a.log != b.log,
            "log-format" => a.log_format != b.log_format,
            _ => false,
        }
    }
}

impl Deref for Config {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.settings
    }
}

fn default_name(hostname: &str) -> Result<NodeName, ConfigError> {
    values::node_name(hostname).map_err(|_| ConfigError {
        place: Place::Default("node-name"),
        problem: Problem::BadValue {
            key: "node-name",
            value: hostname.to_owned(),
            fix: "this machine's hostname is not a node name; set node-name".to_owned(),
        },
    })
}

const PORT: NonZeroU16 = match NonZeroU16::new(DEFAULT_PORT) {
    Some(port) => port,
    None => panic!("port 0 is none"),
};

const ONE_EACH: &str = "there is another of the same family; give one IPv4 and one IPv6 address at most";

fn same_family(a: &IpAddr, b: &IpAddr) -> Option<&'static str> {
    (a.is_ipv4() == b.is_ipv4()).then_some(ONE_EACH)
}

fn same_spec(a: &NodeIpSpec, b: &NodeIpSpec) -> Option<&'static str> {
    match (a, b) {
        (NodeIpSpec::Address(a), NodeIpSpec::Address(b)) => same_family(a, b),
        _ => (a == b).then_some("it is there twice; remove one"),
    }
}

fn same_overlay(a: &OverlayAddress, b: &OverlayAddress) -> Option<&'static str> {
    match (a, b) {
        (OverlayAddress::Given(a), OverlayAddress::Given(b)) => {
            a.iter().find_map(|a| b.iter().find_map(|b| same_family(a, b)))
        }
        _ => Some("`first` and `network` stand alone"),
    }
}

fn both(a: OverlayAddress, b: OverlayAddress) -> OverlayAddress {
    match (a, b) {
        (OverlayAddress::Given(mut a), OverlayAddress::Given(b)) => {
            a.extend(b);
            OverlayAddress::Given(a)
        }
        (a, _) => a,
    }
}

#[cfg(test)]
mod tests;
