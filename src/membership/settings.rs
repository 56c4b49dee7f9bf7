//! What `meshd` hands to the `mesh-sidecar` that it starts: the part of the configuration that membership needs.
//!
//! `meshd` makes a pair of connected unix stream sockets, starts the sidecar with one of them as **standard input** (or as
//! the descriptor that the environment variable [`LINK_FD`] names), and writes one line of JSON into the other: these settings.
//! The messages of [`link`](super::link) follow on the same socket, in both directions. The secrets in here are thus in no
//! argument list and no environment. A change of a setting is a restart of the sidecar, which costs no packet. When the
//! socket closes, the sidecar ends.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::record::Role;

/// The environment variable that names the link's descriptor, where it is not standard input.
pub const LINK_FD: &str = "MESHD_LINK_FD";

/// The TCP port of the servers.
pub const SERVER_PORT: u16 = 9345;

/// The settings, in the words of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// `meshd server` or `meshd agent`.
    pub role: Role,
    /// `data-dir`: the sidecar keeps its files in `agent/` and `server/` below it.
    pub data_dir: PathBuf,
    /// `bind-address`, server only.
    #[serde(default = "any_address")]
    pub bind_address: SocketAddr,
    /// `cluster-cidr`, server only: at least one, at most one a family.
    #[serde(default)]
    pub cluster_cidr: Vec<IpNet>,
    /// `node-cidr-mask-size`, server only.
    #[serde(default)]
    pub node_cidr_mask_size: MaskSizes,
    /// `tls-san`, server only: names and addresses that agents reach this server by.
    #[serde(default)]
    pub tls_san: Vec<String>,
    /// `server`: registration addresses, as in `https://host:9345`; port and scheme may be left out.
    #[serde(default)]
    pub servers: Vec<String>,
    /// `token` or what `token-file` holds, trimmed: a `mesh1…` token or a shared secret.
    #[serde(default)]
    pub token: Option<Secret>,
    /// `cluster-init`, server only.
    #[serde(default)]
    pub cluster_init: bool,
    /// `datastore-endpoint` and its company, server only.
    #[serde(default)]
    pub datastore: Datastore,
    /// `node-label`
    #[serde(default)]
    pub node_labels: BTreeMap<String, String>,
    /// `node-taint`, as in `key=value:effect`
    #[serde(default)]
    pub node_taints: Vec<String>,
    /// `control-only`, server only.
    #[serde(default)]
    pub control_only: bool,
    /// `purge-after`, server only.
    #[serde(default)]
    pub purge_after: PurgeAfter,
    /// `lb-server-port`: the local port that leads to the servers; `None`: off.
    #[serde(default)]
    pub lb_server_port: Option<u16>,
    /// `log`: a tracing filter.
    #[serde(default = "info")]
    pub log: String,
    /// `log-format`
    #[serde(default)]
    pub log_format: LogFormat,
}

impl Settings {
    /// Settings of that role and folder, and defaults for everything else.
    pub fn new(role: Role, data_dir: impl Into<PathBuf>) -> Self {
        Settings {
            role,
            data_dir: data_dir.into(),
            bind_address: any_address(),
            cluster_cidr: Vec::new(),
            node_cidr_mask_size: MaskSizes::default(),
            tls_san: Vec::new(),
            servers: Vec::new(),
            token: None,
            cluster_init: false,
            datastore: Datastore::default(),
            node_labels: BTreeMap::new(),
            node_taints: Vec::new(),
            control_only: false,
            purge_after: PurgeAfter::default(),
            lb_server_port: None,
            log: info(),
            log_format: LogFormat::default(),
        }
    }
}

/// Where servers keep their state, and how they get in. Files are here by their content: the sidecar may not read them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Datastore {
    /// `datastore-endpoint`, which may hold a password; `None`: SQLite in `data-dir`.
    pub endpoint: Option<Secret>,
    /// What `datastore-password-file` holds, trimmed; wins over the endpoint's.
    pub password: Option<Secret>,
    /// What `datastore-cafile` holds: certificates in PEM that the store's must come from.
    pub ca: Option<String>,
    /// What `datastore-certfile` holds: the certificate in PEM that is shown to the store.
    pub certificate: Option<String>,
    /// What `datastore-keyfile` holds: its key in PEM.
    pub key: Option<Secret>,
}

/// When a node that is away is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PurgeAfter {
    /// Never with one server, after an hour with several.
    #[default]
    Auto,
    /// Never.
    Off,
    /// After so many seconds.
    Seconds(u64),
}

impl PurgeAfter {
    /// How long that is in a cluster of so many servers; `None`: never.
    pub fn limit(self, servers: usize) -> Option<Duration> {
        match self {
            PurgeAfter::Auto if servers > 1 => Some(Duration::from_secs(3600)),
            PurgeAfter::Auto | PurgeAfter::Off => None,
            PurgeAfter::Seconds(seconds) => Some(Duration::from_secs(seconds)),
        }
    }
}

/// How large a node's subnets are, as prefix lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaskSizes {
    /// Of an IPv4 `cluster-cidr`.
    pub v4: u8,
    /// Of an IPv6 one.
    pub v6: u8,
}

impl Default for MaskSizes {
    fn default() -> Self {
        MaskSizes { v4: 24, v6: 64 }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// A text that no log shows and that is wiped from memory after use.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes the text over.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn any_address() -> SocketAddr {
    SocketAddr::from((Ipv6Addr::UNSPECIFIED, SERVER_PORT))
}

fn info() -> String {
    "info".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_has_a_default_and_secrets_are_not_shown() {
        let text = r#"{"role": "agent", "data-dir": "/x", "token": "hush", "servers": ["https://a:9345"]}"#;
        let settings: Settings = serde_json::from_str(text).unwrap();
        assert_eq!(settings.bind_address.port(), SERVER_PORT);
        assert_eq!(settings.token.as_ref().map(Secret::reveal), Some("hush"));
        assert!(!format!("{settings:?}").contains("hush"));
        assert_eq!(serde_json::from_value::<Settings>(serde_json::to_value(&settings).unwrap()).unwrap(), settings);
    }
}
