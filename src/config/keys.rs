//! The configuration keys: one table that the file, the environment, the command line and the help text share.
//!
//! Knows a key's name, shape and what a person reads about it; not what its values mean (`values`).

/// A configuration key.
#[derive(Debug)]
pub struct Key {
    /// Its name in the file; a flag is this with two dashes in front.
    pub name: &'static str,
    /// What stands for the value in the help text.
    pub value: &'static str,
    /// Whether it takes a list: comma-separated, or as repeated flags.
    pub list: bool,
    /// Whether SIGHUP applies a change to the running daemon.
    pub live: bool,
    /// What it means, in a sentence.
    pub help: &'static str,
    /// The default, as a person reads it.
    pub default: &'static str,
}

impl Key {
    /// The environment variable that sets it: `MESHD_NODE_NAME` for `node-name`.
    pub fn env(&self) -> String {
        format!("{ENV_PREFIX}{}", self.name.to_ascii_uppercase().replace('-', "_"))
    }
}

/// What the name of each environment variable that is meant for meshd starts with.
pub const ENV_PREFIX: &str = "MESHD_";

/// Every key that this version knows, in the order of the documentation.
pub const KEYS: &[Key] = &[
    key("node-name", "NAME", "This node's name; its own entry in the nodes-file has it", "the hostname"),
    list(
        "node-ip",
        "ADDR|IFACE",
        "Underlay address, one for each family, or the interface that has it",
        "the address of the default route's interface",
    ),
    list("advertise-address", "ADDR", "What other nodes send to, one for each family", "node-ip"),
    key("tun", "NAME", "Name of the TUN device", "mesh0"),
    list(
        "address",
        "first|network|ADDR",
        "Overlay address on the TUN device: the first or the network address of this node's first subnet, or one for \
         each family",
        "first",
    ),
    key("port", "1-65535", "UDP data port", "8472"),
    key("vni", "0-16777215", "VXLAN network identifier", "1"),
    live("mtu", "auto|576-65535", "MTU of the TUN device; auto fits every peer", "auto"),
    key("encryption", "none", "How to encrypt; this version cannot yet, so only `none`", "none"),
    key("workers", "auto|1-64", "Worker threads; auto is one for each core", "auto"),
    key("io", "auto|mmsg|tokio", "I/O back end", "auto"),
    key("data-dir", "DIR", "Where state is kept", "/var/lib/meshd"),
    key("socket", "PATH", "Admin socket that meshctl talks to", "/run/meshd/meshd.sock"),
    key("socket-mode", "OCTAL", "Permissions of the admin socket", "0660"),
    key("socket-group", "GROUP", "Group that owns the admin socket", "meshd's own"),
    live("nodes-file", "FILE", "Static node list, re-read when it changes", "none; `meshd run` needs one"),
    live("log", "FILTER", "What to log: error, warn, info, debug, trace, or a tracing filter", "info"),
    key("log-format", "text|json", "How to log", "text"),
];

/// Keys of the documentation that a later version brings: their error says so, instead of "unknown".
pub(crate) const LATER: &[&str] = &[
    "private-key-file",
    "metrics-address",
    "cluster-cidr",
    "node-cidr-mask-size",
    "server",
    "token",
    "token-file",
    "tls-san",
    "bind-address",
    "cluster-init",
    "datastore-endpoint",
    "node-label",
    "node-taint",
    "control-only",
    "bfd",
    "purge-after",
    "cni-conf-dir",
    "subnet-file",
    "cluster",
];

/// The key of that name.
pub(crate) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

const fn key(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { name, value, list: false, live: false, help, default }
}

const fn list(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { list: true, ..key(name, value, help, default) }
}

const fn live(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { live: true, ..key(name, value, help, default) }
}
