//! What workloads on this node are attached by: a CNI configuration and a `subnet.env` as flannel writes it.
//!
//! Pure: subnets and MTU in, texts out. Whoever writes them decides where and when.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

/// The file in a CNI configuration directory; the number decides which of several is taken.
pub const CNI_FILE: &str = "10-meshd.conflist";

/// A CNI configuration: a bridge with this node's subnets, addresses by host-local. Nothing is masqueraded, so that a pod's
/// address is its own on every node.
pub fn cni(own_subnets: &[IpNet], mtu: u32) -> String {
    let ranges: Vec<Value> = own_subnets.iter().map(|net| json!([{ "subnet": net.to_string() }])).collect();
    let mut routes = Vec::new();
    for (v6, dst) in [(false, "0.0.0.0/0"), (true, "::/0")] {
        if own_subnets.iter().any(|net| matches!(net, IpNet::V6(_)) == v6) {
            routes.push(json!({ "dst": dst }));
        }
    }
    let bridge = json!({
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": true,
        "ipMasq": false,
        "hairpinMode": true,
        "mtu": mtu,
        "ipam": { "type": "host-local", "ranges": ranges, "routes": routes },
    });
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    let list = json!({ "cniVersion": "1.0.0", "name": "meshd", "plugins": [bridge, portmap] });
    format!("{list:#}\n")
}

/// `subnet.env`: the network, this node's subnet with the bridge's address, the MTU. The network is the one of `networks` that
/// has the subnet: what the cluster gives out, however few have some of it now; else what is around all `subnets`.
pub fn subnet_env(networks: &[IpNet], subnets: &[IpNet], own_subnets: &[IpNet], mtu: u32) -> String {
    let mut text = String::new();
    for (v6, prefix) in [(false, "FLANNEL"), (true, "FLANNEL_IPV6")] {
        let of = |net: &&IpNet| matches!(net, IpNet::V6(_)) == v6;
        let Some(own) = own_subnets.iter().find(of) else { continue };
        let given = networks.iter().find(|network| network.contains(own)).copied();
        if let Some(network) = given.or_else(|| subnets.iter().filter(of).copied().reduce(around)) {
            text += &format!("{prefix}_NETWORK={network}\n");
        }
        text += &format!("{prefix}_SUBNET={}/{}\n", first(own), own.prefix_len());
    }
    text + &format!("FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n")
}

/// The longest prefix that both are in.
fn around(a: IpNet, b: IpNet) -> IpNet {
    let mut net = a;
    while !net.contains(&b) {
        let Some(wider) = net.supernet() else { return net };
        net = wider;
    }
    net
}

fn first(net: &IpNet) -> IpAddr {
    match net.network() {
        IpAddr::V4(ip) => IpAddr::V4(std::net::Ipv4Addr::from_bits(ip.to_bits().wrapping_add(1))),
        IpAddr::V6(ip) => IpAddr::V6(std::net::Ipv6Addr::from_bits(ip.to_bits().wrapping_add(1))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_cni_configuration_has_the_subnets_and_the_mtu() {
        let list: Value = serde_json::from_str(&cni(&nets(&["10.42.1.0/24", "fd42:0:0:1::/64"]), 1440)).unwrap();
        let bridge = &list["plugins"][0];
        assert_eq!((&bridge["mtu"], &bridge["ipMasq"]), (&json!(1440), &json!(false)));
        assert_eq!(bridge["ipam"]["ranges"], json!([[{"subnet": "10.42.1.0/24"}], [{"subnet": "fd42:0:0:1::/64"}]]));
        assert_eq!(bridge["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]));
        let v4: Value = serde_json::from_str(&cni(&nets(&["10.42.1.0/24"]), 1450)).unwrap();
        assert_eq!(v4["plugins"][0]["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}]));
    }

    #[test]
    fn a_subnet_env_is_as_flannel_writes_it() {
        let all = nets(&["10.42.0.0/24", "10.42.1.0/24", "10.42.7.0/24", "fd42::/64", "fd42:0:0:1::/64"]);
        let own = nets(&["10.42.1.0/24", "fd42:0:0:1::/64"]);
        let expected = "FLANNEL_NETWORK=10.42.0.0/21\nFLANNEL_SUBNET=10.42.1.1/24\nFLANNEL_IPV6_NETWORK=fd42::/63\n\
                        FLANNEL_IPV6_SUBNET=fd42:0:0:1::1/64\nFLANNEL_MTU=1440\nFLANNEL_IPMASQ=false\n";
        assert_eq!(subnet_env(&[], &all, &own, 1440), expected);
        let of_cluster = subnet_env(&nets(&["10.42.0.0/16", "fd42::/48"]), &all, &own, 1440);
        assert!(of_cluster.starts_with("FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.1.1/24\n"), "{of_cluster}");
        assert!(of_cluster.contains("FLANNEL_IPV6_NETWORK=fd42::/48\n"), "{of_cluster}");
        assert_eq!(around(all[0], all[0]), all[0]);
    }
}
