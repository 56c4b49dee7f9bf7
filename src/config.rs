//! Text to valid types: the configuration.
//!
//! Owns which keys there are, which source wins (a flag, then the environment, then the file), and what each value
//! means. Does no I/O and asks no clock: the caller brings the texts (`load` is the thin part that reads them). Does not
//! know whether an interface exists, a port is free or a node list is good.

mod error;
mod keys;
mod layers;
pub mod load;
mod membership;
mod values;
pub(crate) mod yaml;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

pub use self::error::{ConfigError, Place, Problem};
pub(crate) use self::error::{did_you_mean, shorten};
pub use self::keys::{ENV_PREFIX, KEYS, Key};
use self::layers::Layers;
pub use self::layers::Sources;
pub use self::membership::TokenFile;
pub(crate) use self::values::not_underlay;
pub use self::values::{BadIfName, Bfd, IfName, Io, LogFormat, Mtu, NodeIp, NodeIpSpec, OverlayAddress, Workers};
pub use self::yaml::At;
use crate::membership::settings::{MaskSizes, PurgeAfter, Secret};
pub use crate::node::Encryption;
use crate::node::{DEFAULT_PORT, NodeName, Vni};

/// A valid configuration. Only [`Config::parse`] makes one, and it cannot be changed: read the settings through it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    settings: Settings,
    says_encryption: bool,
    says_node_name: bool,
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
    /// `private-key-file`; `None`: `node.key` in `data-dir`.
    pub private_key_file: Option<PathBuf>,
    /// `bfd`
    pub bfd: Bfd,
    /// `bfd-auth-key-file`; `None`: BFD in the clear is not authenticated.
    pub bfd_auth_key_file: Option<PathBuf>,
    /// `workers`
    pub workers: Workers,
    /// `io`
    pub io: Io,
    /// `busy-poll`; zero is off.
    pub busy_poll: Duration,
    /// `tunnel-gso`
    pub tunnel_gso: bool,
    /// `big-tcp`
    pub big_tcp: bool,
    /// `data-dir`
    pub data_dir: PathBuf,
    /// `socket`
    pub socket: PathBuf,
    /// `socket-mode`: permission bits, at most `0o777`.
    pub socket_mode: u32,
    /// `socket-group`: a name or a number.
    pub socket_group: Option<String>,
    /// `server`: as written, each a host with an optional scheme and port.
    pub servers: Vec<String>,
    /// `token`
    pub token: Option<Secret>,
    /// `token-file`
    pub token_file: Option<TokenFile>,
    /// `cluster-cidr`: one or two, of different families.
    pub cluster_cidr: Vec<IpNet>,
    /// `node-cidr-mask-size`
    pub node_cidr_mask_size: MaskSizes,
    /// `tls-san`
    pub tls_san: Vec<String>,
    /// `bind-address`
    pub bind_address: SocketAddr,
    /// `cluster-init`
    pub cluster_init: bool,
    /// `datastore-endpoint`: `None` is SQLite in `data-dir`.
    pub datastore_endpoint: Option<Secret>,
    /// `datastore-password-file`
    pub datastore_password_file: Option<PathBuf>,
    /// `datastore-cafile`
    pub datastore_cafile: Option<PathBuf>,
    /// `datastore-certfile`
    pub datastore_certfile: Option<PathBuf>,
    /// `datastore-keyfile`
    pub datastore_keyfile: Option<PathBuf>,
    /// `node-label`
    pub node_labels: BTreeMap<String, String>,
    /// `node-taint`
    pub node_taints: Vec<String>,
    /// `control-only`
    pub control_only: bool,
    /// `purge-after`
    pub purge_after: PurgeAfter,
    /// `lb-server-port`; `None` is off.
    pub lb_server_port: Option<u16>,
    /// `metrics-address`: `None` is off.
    pub metrics_address: Option<SocketAddr>,
    /// `cni-conf-dir`
    pub cni_conf_dir: Option<PathBuf>,
    /// `subnet-file`
    pub subnet_file: Option<PathBuf>,
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
        let (token, token_file) = membership::tokens(&layers)?;
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
            address: layers.many("address", values::overlay_address, same_overlay)?.into_iter().reduce(both).unwrap_or(
                if layers.says("cni-conf-dir") || layers.says("subnet-file") {
                    // network + 1 is the bridge's
                    OverlayAddress::Network
                } else {
                    OverlayAddress::First
                },
            ),
            port: layers.one("port", values::port)?.unwrap_or(PORT),
            vni: layers.one("vni", values::vni)?.unwrap_or(Vni::DEFAULT),
            mtu: layers.one("mtu", values::mtu)?.unwrap_or(Mtu::Auto),
            encryption: layers.one("encryption", values::encryption)?.unwrap_or(Encryption::None),
            private_key_file: layers.one("private-key-file", values::path)?,
            bfd: bfd(&layers)?,
            bfd_auth_key_file: layers.one("bfd-auth-key-file", values::path)?,
            workers: layers.one("workers", values::workers)?.unwrap_or(Workers::Auto),
            io: layers.one("io", values::io)?.unwrap_or(Io::Auto),
            busy_poll: layers.one("busy-poll", values::busy_poll)?.unwrap_or(BUSY_POLL),
            tunnel_gso: layers.one("tunnel-gso", values::auto)?.unwrap_or(true),
            big_tcp: layers.one("big-tcp", values::auto)?.unwrap_or(true),
            data_dir: layers.one("data-dir", values::path)?.unwrap_or_else(|| "/var/lib/meshd".into()),
            socket: layers.one("socket", values::socket)?.unwrap_or_else(|| "/run/meshd/meshd.sock".into()),
            socket_mode: layers.one("socket-mode", values::socket_mode)?.unwrap_or(0o660),
            socket_group: layers.one("socket-group", values::socket_group)?,
            servers: layers.many("server", membership::server, same_text)?,
            token,
            token_file,
            cluster_cidr: membership::cluster_cidr(&layers)?,
            node_cidr_mask_size: membership::mask_sizes(&layers)?,
            tls_san: layers.many("tls-san", membership::tls_san, same_text)?,
            bind_address: layers.one("bind-address", membership::bind_address)?.unwrap_or(membership::ANY_ADDRESS),
            cluster_init: layers.one("cluster-init", membership::yes_or_no)?.unwrap_or(false),
            datastore_endpoint: membership::datastore(&layers)?,
            datastore_password_file: layers.one("datastore-password-file", values::path)?,
            datastore_cafile: layers.one("datastore-cafile", values::path)?,
            datastore_certfile: layers.one("datastore-certfile", values::path)?,
            datastore_keyfile: layers.one("datastore-keyfile", values::path)?,
            node_labels: layers.many("node-label", membership::label, membership::same_label)?.into_iter().collect(),
            node_taints: layers.many("node-taint", membership::taint, same_text)?,
            control_only: layers.one("control-only", membership::yes_or_no)?.unwrap_or(false),
            purge_after: layers.one("purge-after", membership::purge_after)?.unwrap_or_default(),
            lb_server_port: layers.one("lb-server-port", membership::lb_server_port)?.flatten(),
            metrics_address: layers.one("metrics-address", values::listen)?,
            cni_conf_dir: layers.one("cni-conf-dir", values::path)?,
            subnet_file: layers.one("subnet-file", values::path)?,
            nodes_file: layers.one("nodes-file", values::path)?,
            log: layers.one("log", values::log)?.unwrap_or_else(|| "info".to_owned()),
            log_format: layers.one("log-format", values::log_format)?.unwrap_or(LogFormat::Text),
        };
        let says_encryption = layers.says("encryption");
        let says_node_name = layers.says("node-name");
        let says_busy_poll = layers.says("busy-poll");
        let mut notices = layers.notices;
        if settings.io == Io::Tokio && says_busy_poll && !settings.busy_poll.is_zero() {
            notices.push("`busy-poll` does nothing with `io: tokio`; use `auto`, `mmsg` or `uring`".to_owned());
        }
        Ok(Config { settings, says_encryption, says_node_name, notices })
    }

    /// The same for a member of a cluster, whose default differs: keys come with membership, so it encrypts.
    pub fn of_member(mut self) -> Self {
        if !self.says_encryption {
            self.settings.encryption = Encryption::Wireguard;
        }
        self
    }

    /// Whether somebody chose `node-name`; else it is the machine's.
    pub fn says_node_name(&self) -> bool {
        self.says_node_name
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
            "private-key-file" => a.private_key_file != b.private_key_file,
            "bfd" => a.bfd != b.bfd,
            "bfd-auth-key-file" => a.bfd_auth_key_file != b.bfd_auth_key_file,
            "workers" => a.workers != b.workers,
            "io" => a.io != b.io,
            "busy-poll" => a.busy_poll != b.busy_poll,
            "tunnel-gso" => a.tunnel_gso != b.tunnel_gso,
            "big-tcp" => a.big_tcp != b.big_tcp,
            "data-dir" => a.data_dir != b.data_dir,
            "socket" => a.socket != b.socket,
            "socket-mode" => a.socket_mode != b.socket_mode,
            "socket-group" => a.socket_group != b.socket_group,
            "metrics-address" => a.metrics_address != b.metrics_address,
            "server" => a.servers != b.servers,
            "token" => a.token != b.token,
            "token-file" => a.token_file != b.token_file,
            "cluster-cidr" => a.cluster_cidr != b.cluster_cidr,
            "node-cidr-mask-size" => a.node_cidr_mask_size != b.node_cidr_mask_size,
            "tls-san" => a.tls_san != b.tls_san,
            "bind-address" => a.bind_address != b.bind_address,
            "cluster-init" => a.cluster_init != b.cluster_init,
            "datastore-endpoint" => a.datastore_endpoint != b.datastore_endpoint,
            "datastore-password-file" => a.datastore_password_file != b.datastore_password_file,
            "datastore-cafile" => a.datastore_cafile != b.datastore_cafile,
            "datastore-certfile" => a.datastore_certfile != b.datastore_certfile,
            "datastore-keyfile" => a.datastore_keyfile != b.datastore_keyfile,
            "node-label" => a.node_labels != b.node_labels,
            "node-taint" => a.node_taints != b.node_taints,
            "control-only" => a.control_only != b.control_only,
            "purge-after" => a.purge_after != b.purge_after,
            "lb-server-port" => a.lb_server_port != b.lb_server_port,
            "cni-conf-dir" => a.cni_conf_dir != b.cni_conf_dir,
            "subnet-file" => a.subnet_file != b.subnet_file,
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

impl Settings {
    /// Where this node's private key is.
    pub fn private_key_path(&self) -> PathBuf {
        self.private_key_file.clone().unwrap_or_else(|| self.data_dir.join("node.key"))
    }
}

fn bfd(layers: &Layers) -> Result<Bfd, ConfigError> {
    let bfd = layers.one("bfd", values::bfd)?.unwrap_or_default();
    let data = layers.one("vni", values::vni)?.unwrap_or(Vni::DEFAULT);
    if bfd.vni == data {
        let key = if layers.says("bfd") { "bfd" } else { "vni" };
        let fix = "`vni` and the `vni` of `bfd` are one and the same network; give them different ones".to_owned();
        return Err(ConfigError {
            place: layers.place(key),
            problem: Problem::BadValue { key, value: data.get().to_string(), fix },
        });
    }
    Ok(bfd)
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

/// Two round trips between nodes that need not be woken.
const BUSY_POLL: Duration = Duration::from_micros(100);
const PORT: NonZeroU16 = match NonZeroU16::new(DEFAULT_PORT) {
    Some(port) => port,
    None => panic!("port 0 is none"),
};

const ONE_EACH: &str = "there is another of the same family; give one IPv4 and one IPv6 address at most";

fn same_text(a: &String, b: &String) -> Option<&'static str> {
    (a == b).then_some("it is there twice; remove one")
}

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
