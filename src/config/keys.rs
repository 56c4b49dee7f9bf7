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
    /// Whether the file may say it as a mapping; elsewhere that is `name=value,…`.
    pub mapping: bool,
    /// Whether SIGHUP applies a change to the running daemon.
    pub live: bool,
    /// Whether no message may show its value.
    pub secret: bool,
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
    changing(list("advertise-address", "ADDR", "What other nodes send to, one for each family", "node-ip")),
    key("tun", "NAME", "Name of the TUN device", "mesh0"),
    list(
        "address",
        "first|network|ADDR",
        "Overlay address on the TUN device: the first or the network address of this node's first subnet, or one for \
         each family",
        "first; network with cni-conf-dir or subnet-file",
    ),
    key("port", "1-65535", "UDP data port", "8472"),
    key("vni", "0-16777215", "VXLAN network identifier", "1"),
    live("mtu", "auto|576-65535", "MTU of the TUN device; auto fits every peer", "auto"),
    key(
        "encryption",
        "none|wireguard",
        "How to encrypt where the node list does not say: VXLAN in the clear, or WireGuard",
        "wireguard for `server` and `agent`, none for `run`",
    ),
    key(
        "private-key-file",
        "FILE",
        "This node's private key for WireGuard, made when it is missing and needed",
        "node.key in data-dir",
    ),
    mapping(
        "bfd",
        "off|interval=MS,multiplier=N,vni=N",
        "Liveness: how often peers are asked, how many answers may be missing, and the VXLAN network for that",
        "interval=150,multiplier=6,vni=4095",
    ),
    live(
        "bfd-auth-key-file",
        "FILE",
        "What authenticates liveness in the clear (RFC 5880, SHA1): lines of `ID KEY`, the first is sent, all are taken; \
         read again at SIGHUP",
        "none",
    ),
    key(
        "workers",
        "auto|1-64",
        "Workers, of two threads each, one for bulk traffic; auto is one for each core",
        "auto",
    ),
    key("io", "auto|mmsg|uring|tokio", "I/O back end", "auto"),
    key(
        "busy-poll",
        "off|1-10000",
        "Microseconds that a worker at most looks for the next packet before it sleeps, where few packets follow each other \
         closely: shorter round trips for processor time; not with `io: tokio`",
        "100",
    ),
    key(
        "tunnel-gso",
        "auto|off",
        "TCP super-packets in the clear leave uncut where the underlay's network card cuts what lies in a tunnel \
         (`ethtool -k`: tx-udp_tnl-csum-segmentation) and Linux is 6.17 or newer; they pass by the firewall's output hook, and never \
         leave so while this host has IPsec policies",
        "auto",
    ),
    key(
        "big-tcp",
        "auto|off",
        "TCP over IPv4 for this node itself is handed to its kernel in super-packets of up to 256 KiB, where that is Linux 6.6 or \
         newer; older programs that capture packets may not understand those; not with `io: tokio`",
        "auto",
    ),
    key("data-dir", "DIR", "Where state is kept", "/var/lib/meshd"),
    key("socket", "PATH", "Admin socket that meshctl talks to", "/run/meshd/meshd.sock"),
    key("socket-mode", "OCTAL", "Permissions of the admin socket", "0660"),
    key("socket-group", "GROUP", "Group that owns the admin socket", "meshd's own"),
    key(
        "metrics-address",
        "ADDR:PORT",
        "Where to serve metrics for Prometheus, over HTTP at /metrics: whoever reaches it may read them",
        "off",
    ),
    changing(list(
        "server",
        "https://HOST:9345",
        "Registration address of a cluster to join; several for several servers",
        "what the token says",
    )),
    changing(secret("token", "TOKEN", "Join token (`mesh1…`), or a shared secret together with `server`", "none")),
    live("token-file", "FILE|-", "File that holds the token; `-` is standard input", "none"),
    list("cluster-cidr", "PREFIX", "`meshd server`: prefixes that nodes get their subnets from", "10.42.0.0/16"),
    list(
        "node-cidr-mask-size",
        "LENGTH",
        "`meshd server`: prefix length of a node's subnets; up to 32 for IPv4, above for IPv6",
        "24,64",
    ),
    changing(list(
        "tls-san",
        "NAME|ADDR",
        "`meshd server`: further names and addresses that agents reach it by",
        "none",
    )),
    key("bind-address", "ADDR:PORT", "`meshd server`: where it serves the control plane", "[::]:9345"),
    key("cluster-init", "true|false", "`meshd server`: keep state in an etcd that servers run themselves", "false"),
    secret(
        "datastore-endpoint",
        "URL",
        "`meshd server`: where state is stored: sqlite://PATH, mysql://USER@HOST/DATABASE, postgres://USER@HOST/DATABASE or \
         etcd://HOST,HOST, the last three for several servers",
        "SQLite in data-dir",
    ),
    live("datastore-password-file", "FILE", "`meshd server`: the database's password", "the endpoint's"),
    live("datastore-cafile", "FILE", "`meshd server`: authority of the database's certificate (PEM)", "the system's"),
    live("datastore-certfile", "FILE", "`meshd server`: certificate that is shown to the database (PEM)", "none"),
    live("datastore-keyfile", "FILE", "`meshd server`: its private key (PEM)", "none"),
    changing(list("node-label", "KEY=VALUE", "Labels of this node", "none")),
    changing(list("node-taint", "KEY=VALUE:EFFECT", "Taints of this node", "none")),
    key("control-only", "true|false", "`meshd server`: no workload subnet, one overlay address", "false"),
    live(
        "purge-after",
        "off|TIME",
        "`meshd server`: forget a node that is away for so long (30m, 1h, 2d)",
        "off with one server, 1h with several",
    ),
    live(
        "lb-server-port",
        "off|PORT",
        "Local TCP port that leads to port 6443 of the servers, as RKE2's 6444 does",
        "off",
    ),
    live(
        "cni-conf-dir",
        "DIR",
        "Where to write a CNI configuration for this node's subnet (bridge, host-local)",
        "off",
    ),
    key("subnet-file", "FILE", "Where to write a flannel-style subnet.env for this node's subnet", "off"),
    live("nodes-file", "FILE", "Static node list, re-read when it changes", "none; `meshd run` needs one"),
    live("log", "FILTER", "What to log: error, warn, info, debug, trace, or a tracing filter", "info"),
    key("log-format", "text|json", "How to log", "text"),
];

/// Keys of the documentation that a later version brings: their error says so, instead of "unknown".
pub(crate) const LATER: &[&str] = &["cluster"];

/// The key of that name.
pub(crate) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

const fn key(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { name, value, list: false, mapping: false, live: false, secret: false, help, default }
}

const fn list(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { list: true, ..key(name, value, help, default) }
}

const fn mapping(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { mapping: true, ..key(name, value, help, default) }
}

const fn live(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { live: true, ..key(name, value, help, default) }
}

const fn secret(name: &'static str, value: &'static str, help: &'static str, default: &'static str) -> Key {
    Key { secret: true, ..key(name, value, help, default) }
}

/// The same key, whose change the running daemon takes over.
const fn changing(key: Key) -> Key {
    Key { live: true, ..key }
}
