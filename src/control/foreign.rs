//! What a foreign member has to be told, since nobody tells it: the commands that make a kernel VXLAN device or a stock
//! WireGuard interface a node of the cluster, as flannel sets one up.
//!
//! Pure: records in, command lines out. Nothing of what others chose gets into them but addresses, MACs and keys. All of
//! them may run twice, so that a list that changed is followed by running them again.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::key::PublicKey;
use crate::membership::record::{Mode, NodeRecord, Role, State};
use crate::node::{Mac, NodeName, Vni, first_address};

/// What the interface of a foreign member is called, unless it is said.
pub const DEVICE: &str = "mesh0";
/// Where its private key lies, unless it is said.
pub const PRIVATE_KEY_FILE: &str = "/etc/wireguard/private.key";

/// What is the same for all of them.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The cluster's VNI.
    pub vni: Vni,
    /// What fits every path, as this node knows it.
    pub mtu: u32,
    /// What the interface there is to be called.
    pub device: String,
    /// Where the private key of a WireGuard peer lies.
    pub private_key_file: String,
}

/// What to run, and what a person should know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recipe {
    /// One shell command each, to be run as root in this order.
    pub commands: Vec<String>,
    /// A sentence each.
    pub notes: Vec<String>,
}

/// Why there is no recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRecipe {
    /// It runs meshd, which needs none.
    #[error("node `{0}` runs meshd, which sets itself up: only foreign members need commands")]
    NotForeign(String),
    /// A name that would be something else to a shell or to the kernel.
    #[error("`{0}` cannot be the interface's name there: use 1 to 15 letters, digits, `.`, `_` and `-`")]
    BadDevice(String),
    /// Nothing that could be connected.
    #[error("node `{0}` has no underlay address, or no subnet")]
    Empty(String),
}

/// The commands for `node`, which is to reach `all` others.
pub fn recipe<'r>(
    node: &NodeRecord,
    all: impl IntoIterator<Item = &'r NodeRecord>,
    setting: &Setting,
) -> Result<Recipe, NoRecipe> {
    if node.role != Role::Foreign {
        return Err(NoRecipe::NotForeign(node.name.clone()));
    }
    let device = setting.device.as_str();
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !(1..16).contains(&device.len()) || !device.chars().all(good) || !device.starts_with(char::is_alphanumeric) {
        return Err(NoRecipe::BadDevice(device.chars().take(40).collect()));
    }
    let own: Vec<IpAddr> = [false, true]
        .into_iter()
        .filter_map(|v6| node.subnets.iter().find(|net| is_v6(net) == v6))
        .map(first_address)
        .collect();
    let Some(local) = node.underlay.first().filter(|_| !own.is_empty()) else {
        return Err(NoRecipe::Empty(node.name.clone()));
    };
    let mut others: Vec<_> =
        all.into_iter().filter(|other| other.id != node.id && other.state != State::Left).collect();
    others.sort_by(|a, b| a.name.cmp(&b.name));
    let plan = Plan { node, device, local, own, setting };
    Ok(if node.encryption == Mode::Wireguard { plan.wireguard(&others) } else { plan.vxlan(&others) })
}

struct Plan<'p> {
    node: &'p NodeRecord,
    device: &'p str,
    local: &'p SocketAddr,
    /// Its overlay addresses, at most one for each family.
    own: Vec<IpAddr>,
    setting: &'p Setting,
}

impl Plan<'_> {
    fn vxlan(&self, others: &[&NodeRecord]) -> Recipe {
        let Plan { device, setting: Setting { vni, mtu, .. }, local, .. } = self;
        let (ip, port) = (local.ip(), local.port());
        let mut recipe = self.start();
        match mac(self.node) {
            Some(mac) => recipe.commands.push(format!(
                "ip link show dev {device} >/dev/null 2>&1 || ip link add {device} address {mac} mtu {mtu} \
                 type vxlan id {} dstport {port} local {ip} nolearning",
                vni.get()
            )),
            None => recipe.notes.push("its MAC cannot be read".to_owned()),
        }
        self.addresses(&mut recipe);
        for other in others {
            let Some(at) = other.underlay.iter().find(|at| at.is_ipv4() == local.is_ipv4()) else {
                let family = if local.is_ipv4() { "IPv4" } else { "IPv6" };
                recipe.notes.push(format!("{} has no {family} underlay address, so it is out of reach", other.name));
                continue;
            };
            let (true, Some(mac)) = (other.role != Role::Foreign || other.encryption == Mode::None, mac(other)) else {
                recipe.notes.push(format!("{} speaks WireGuard alone, so it is out of reach", other.name));
                continue;
            };
            let port = if at.port() == port { String::new() } else { format!(" port {}", at.port()) };
            recipe.commands.push(format!("bridge fdb replace {mac} dev {device} dst {}{port} self permanent", at.ip()));
            for net in &other.subnets {
                let Some(source) = self.source(net) else { continue };
                let via = first_address(net);
                recipe.commands.push(format!("ip neigh replace {via} lladdr {mac} dev {device} nud permanent"));
                recipe.commands.push(format!("ip route replace {net} via {via} dev {device} onlink src {source}"));
            }
        }
        recipe
    }

    fn wireguard(&self, others: &[&NodeRecord]) -> Recipe {
        let Plan { device, setting, local, .. } = self;
        let mut recipe = self.start();
        recipe.commands.push(format!(
            "ip link show dev {device} >/dev/null 2>&1 || ip link add {device} type wireguard || \
             wireguard-go {device}"
        ));
        let key = quoted(&setting.private_key_file);
        recipe.commands.push(format!("wg set {device} private-key {key} listen-port {}", local.port()));
        recipe.notes.push(format!("{} is the private key that belongs to the public key it was added with", key));
        recipe.commands.push(format!("ip link set dev {device} mtu {}", setting.mtu));
        self.addresses(&mut recipe);
        for other in others {
            let key = other.public_keys.first().and_then(|key| key.parse::<PublicKey>().ok());
            let same = other.underlay.iter().find(|at| at.is_ipv4() == local.is_ipv4());
            let (Some(key), Some(at)) = (key, same.or(other.underlay.first())) else {
                recipe.notes.push(format!("{} does not speak WireGuard, so it is out of reach", other.name));
                continue;
            };
            let nets: Vec<_> = other.subnets.iter().filter(|net| self.source(net).is_some()).collect();
            let allowed = nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            recipe.commands.push(format!("wg set {device} peer {key} endpoint {at} allowed-ips {allowed}"));
            for net in nets {
                let source = self.source(net).map(|source| format!(" src {source}")).unwrap_or_default();
                recipe.commands.push(format!("ip route replace {net} dev {device}{source}"));
            }
        }
        recipe
    }

    fn start(&self) -> Recipe {
        let Setting { device, private_key_file: key, .. } = self.setting;
        let mut again = format!("meshctl node commands {}", self.node.name);
        if device != DEVICE {
            again += &format!(" --device {device}");
        }
        if key != PRIVATE_KEY_FILE && self.node.encryption == Mode::Wireguard {
            again += &format!(" --private-key-file {}", quoted(key));
        }
        let again = format!(
            "these commands know the nodes of today: when nodes come, go or move, run what `{again}` prints then"
        );
        Recipe { commands: Vec::new(), notes: vec![again] }
    }

    fn addresses(&self, recipe: &mut Recipe) {
        let device = self.device;
        for ip in &self.own {
            let (length, nodad) = if ip.is_ipv4() { (32, "") } else { (128, " nodad") };
            recipe.commands.push(format!("ip addr replace {ip}/{length} dev {device}{nodad}"));
        }
        recipe.commands.push(format!("ip link set dev {device} up"));
    }

    /// The own address of the family of `net`.
    fn source(&self, net: &IpNet) -> Option<&IpAddr> {
        self.own.iter().find(|ip| ip.is_ipv6() == is_v6(net))
    }
}

fn mac(record: &NodeRecord) -> Option<Mac> {
    match &record.mac {
        Some(mac) => mac.parse().ok(),
        None => record.name.parse::<NodeName>().ok().map(|name| name.derived_mac()),
    }
}

fn is_v6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

/// As a word of a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::records::tests::record;

    const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

    fn setting() -> Setting {
        Setting {
            vni: Vni::DEFAULT,
            mtu: 1440,
            device: "mesh0".to_owned(),
            private_key_file: "/etc/wireguard/my key".to_owned(),
        }
    }

    fn foreign(key: Option<&str>) -> NodeRecord {
        let mut node = record("k", 9);
        node.role = Role::Foreign;
        node.subnets.push("fd42:0:0:9::/64".parse().unwrap());
        node.public_keys = key.iter().map(|key| (*key).to_owned()).collect();
        node.encryption = if key.is_some() { Mode::Wireguard } else { Mode::None };
        node
    }

    fn others() -> Vec<NodeRecord> {
        let mut a = record("a", 1);
        a.public_keys = vec![KEY.to_owned(), "x".to_owned()];
        a.encryption = Mode::Wireguard;
        a.subnets.push("fd42:0:0:1::/64".parse().unwrap());
        let mut b = record("b", 2);
        b.subnets = vec!["10.42.255.2/32".parse().unwrap()];
        b.underlay = vec![([10, 9, 0, 2], 9999).into()];
        let mut left = record("c", 3);
        left.state = State::Left;
        vec![b, a, left]
    }

    #[test]
    fn a_kernel_device_is_set_up_as_flannel_does() {
        let node = foreign(None);
        let all = [others(), vec![node.clone()]].concat();
        let recipe = recipe(&node, &all, &setting()).unwrap();
        let (own, a, b) = (mac(&node).unwrap(), mac(&all[1]).unwrap(), mac(&all[0]).unwrap());
        let expected = format!(
            "ip link show dev mesh0 >/dev/null 2>&1 || ip link add mesh0 address {own} mtu 1440 type vxlan id 1 dstport 8472 local 10.9.0.9 nolearning
ip addr replace 10.42.9.1/32 dev mesh0
ip addr replace fd42:0:0:9::1/128 dev mesh0 nodad
ip link set dev mesh0 up
bridge fdb replace {a} dev mesh0 dst 10.9.0.1 self permanent
ip neigh replace 10.42.1.1 lladdr {a} dev mesh0 nud permanent
ip route replace 10.42.1.0/24 via 10.42.1.1 dev mesh0 onlink src 10.42.9.1
ip neigh replace fd42:0:0:1::1 lladdr {a} dev mesh0 nud permanent
ip route replace fd42:0:0:1::/64 via fd42:0:0:1::1 dev mesh0 onlink src fd42:0:0:9::1
bridge fdb replace {b} dev mesh0 dst 10.9.0.2 port 9999 self permanent
ip neigh replace 10.42.255.2 lladdr {b} dev mesh0 nud permanent
ip route replace 10.42.255.2/32 via 10.42.255.2 dev mesh0 onlink src 10.42.9.1"
        );
        assert_eq!(recipe.commands.join("\n"), expected);
        assert_eq!(recipe.notes.len(), 1, "{recipe:?}");
    }

    #[test]
    fn a_wireguard_peer_knows_every_key() {
        let node = foreign(Some(KEY));
        let recipe = recipe(&node, &others(), &setting()).unwrap();
        let expected = format!(
            "ip link show dev mesh0 >/dev/null 2>&1 || ip link add mesh0 type wireguard || wireguard-go mesh0
wg set mesh0 private-key '/etc/wireguard/my key' listen-port 8472
ip link set dev mesh0 mtu 1440
ip addr replace 10.42.9.1/32 dev mesh0
ip addr replace fd42:0:0:9::1/128 dev mesh0 nodad
ip link set dev mesh0 up
wg set mesh0 peer {KEY} endpoint 10.9.0.1:8472 allowed-ips 10.42.1.0/24,fd42:0:0:1::/64
ip route replace 10.42.1.0/24 dev mesh0 src 10.42.9.1
ip route replace fd42:0:0:1::/64 dev mesh0 src fd42:0:0:9::1"
        );
        assert_eq!(recipe.commands.join("\n"), expected);
        assert!(recipe.notes.iter().any(|note| note.starts_with("b does not speak WireGuard")), "{recipe:?}");
        let again = "`meshctl node commands k --private-key-file '/etc/wireguard/my key'`";
        assert!(recipe.notes[0].contains(again), "{recipe:?}");
    }

    #[test]
    fn who_needs_none_gets_none() {
        let told = |node: &NodeRecord, device: &str| {
            let setting = Setting { device: device.to_owned(), ..setting() };
            recipe(node, &others(), &setting).unwrap_err().to_string()
        };
        assert!(told(&record("a", 1), "mesh0").contains("runs meshd"));
        for device in ["", "a b", "$(reboot)", "-x", "an-interface-name-too-long"] {
            assert!(told(&foreign(None), device).contains("cannot be the interface's name"), "{device}");
        }
        let mut empty = foreign(None);
        empty.underlay.clear();
        assert!(told(&empty, "mesh0").contains("no underlay"));
    }
}
