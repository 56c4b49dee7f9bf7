//! Super-packets that leave uncut, where the underlay's network card says that it cuts what lies in a tunnel. A virtual link
//! says so too, and cuts nothing.

use crate::mesh::{Builder, Family, Mesh, Node, V4, V6, skipped};
use crate::namespace::until;
use crate::super_packets::TUNNEL_GSO;
use crate::traffic::tcp;

const MEGABYTES: usize = 4 << 20;

/// Two nodes over a link that takes super-packets in tunnels, if this kernel does.
fn two_nodes(story: &'static str, outer: Family) -> Option<Mesh> {
    TUNNEL_GSO.two_nodes(story, Builder::new(story)?.over(outer))
}

/// Carries some megabytes; how many super-packets of the sender left uncut.
#[track_caller]
fn carry(from: &Node, to: &Node, family: Family) -> u64 {
    let before = TUNNEL_GSO.count(from);
    tcp(&from.ns, &to.ns, to.overlay(family), MEGABYTES);
    TUNNEL_GSO.count(from) - before
}

#[test]
fn super_packets_leave_uncut_over_ipv4() {
    leave_uncut("super_packets_leave_uncut_over_ipv4", V4);
}

#[test]
fn super_packets_leave_uncut_over_ipv6() {
    leave_uncut("super_packets_leave_uncut_over_ipv6", V6);
}

/// Whatever the firewall and the settings say of forwarding: these packets are the host's own.
#[track_caller]
fn leave_uncut(story: &'static str, outer: Family) {
    let Some(mesh) = two_nodes(story, outer) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    for node in [a, b] {
        // sets it for every device, ours among them, which meshd notices
        node.ns.sh("for f in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 0 >/proc/sys/net/$f; done");
        until("the device may ask for routes again", || {
            let settings =
                node.ns.sh("cat /proc/sys/net/ipv[46]/conf/mesh0-gso/forwarding /proc/sys/net/ipv4/ip_forward");
            settings.split_whitespace().eq(["1", "1", "0"])
        });
        for tables in ["iptables", "ip6tables"] {
            // where it is there
            node.ns.succeeds(&format!("{tables} -P FORWARD DROP"));
        }
    }
    for family in [V4, V6] {
        for (from, to) in [(a, b), (b, a)] {
            assert!(carry(from, to, family) > 0, "{} to {} by {family:?}", from.overlay(family), to.overlay(family));
        }
        assert_eq!(a.drops("bad_inner_packet") + b.drops("bad_inner_packet"), 0);
    }
    assert!(b.stats()["partial_csum_in"].as_u64().unwrap() > 0, "nobody has computed their checksums");
    mesh.balances_with_the_kernel();
}

#[test]
fn pods_super_packets_leave_uncut() {
    let story = "pods_super_packets_leave_uncut";
    let Some(mesh) = Builder::new(story).and_then(|builder| TUNNEL_GSO.two_nodes(story, builder.pods())) else {
        return;
    };
    let [a, b] = mesh.two(["a", "b"]);
    for family in [V4, V6] {
        tcp(a.pod(), b.pod(), b.pod_address(family), MEGABYTES);
    }
    assert!(TUNNEL_GSO.count(a) > 0);
    mesh.balances_with_the_kernel();
}

#[test]
fn it_follows_what_the_network_card_says() {
    let Some(mesh) = two_nodes("it_follows_what_the_network_card_says", V4) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    assert!(carry(a, b, V4) > 0);
    for feature in ["tx-udp_tnl-csum-segmentation", "tx-tcp-segmentation"] {
        a.ns.sh(&format!("ethtool -K ul0 {feature} off"));
        until("super-packets are cut here", || TUNNEL_GSO.why_off(a).contains(feature));
        assert_eq!(carry(a, b, V4), 0);
        a.ns.sh(&format!("ethtool -K ul0 {feature} on"));
        until("super-packets leave uncut again", || TUNNEL_GSO.why_off(a).is_empty());
        assert!(carry(a, b, V4) > 0);
    }
    mesh.balances_with_the_kernel();
}

/// Who is above another device says that it takes everything.
#[test]
fn it_follows_what_the_device_below_says() {
    let story = "it_follows_what_the_device_below_says";
    let Some(mesh) = two_nodes(story, V4) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    assert_eq!(a.stop(), 0);
    if !a.ns.succeeds("ip link add above0 link ul0 type macvlan mode bridge") {
        return skipped(story, "this kernel has no macvlan");
    }
    a.ns.sh(&format!(
        "ip addr flush dev ul0 scope global
         ip addr add {}/24 dev above0
         ip link set above0 up
         ip route add default via 10.9.0.254",
        a.underlay(V4)
    ));
    a.restart();
    until("super-packets leave uncut by it", || TUNNEL_GSO.why_off(a).is_empty());
    assert!(carry(a, b, V4) > 0);
    a.ns.sh("ethtool -K ul0 tx-udp_tnl-csum-segmentation off");
    until("super-packets are cut here", || TUNNEL_GSO.why_off(a).contains("ul0 does not cut"));
    assert!(a.ns.sh("ethtool -k above0").contains("tx-udp_tnl-csum-segmentation: on"), "it goes on saying so");
    assert_eq!(carry(a, b, V4), 0);
}

/// For sockets Linux joins only what has an outer checksum.
#[test]
fn what_somebody_cuts_on_its_way_is_joined_again() {
    for (story, outer) in [("what_somebody_cuts_over_ipv4", V4), ("what_somebody_cuts_over_ipv6", V6)] {
        let Some(mesh) = two_nodes(story, outer) else { return };
        let [a, b] = mesh.two(["a", "b"]);
        // as a network card does; one that hands on checksums would not be believed where the link is virtual
        mesh.switch.sh("ethtool -K p-b tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off tso off tx off");
        b.ns.sh("ethtool -K ul0 gro on");
        // those that a socket was given: joined ones are one
        let counter = match outer {
            V4 => "/^Udp: [0-9]/ { print $2 }",
            V6 => "/^Udp6InDatagrams/ { print $2 }",
        };
        let given =
            || b.ns.sh(&format!("awk '{counter}' /proc/net/snmp /proc/net/snmp6")).trim().parse::<u64>().unwrap();
        let received = || b.stats()["udp"]["rx_packets"].as_u64().unwrap();
        for family in [V4, V6] {
            let before = (received(), given());
            assert!(carry(a, b, family) > 0);
            let after = (received(), given());
            let (datagrams, given) = (after.0 - before.0, after.1 - before.1);
            assert!(given > 0 && datagrams > 4 * given, "the kernel joins them: {datagrams} in {given}");
        }
        assert_eq!(b.stats()["partial_csum_in"], 0, "they were cut, and their checksums computed");
        assert_eq!(b.drops("bad_inner_packet"), 0);
        mesh.balances_with_the_kernel();
    }
}

/// What goes by the redirection would pass by IPsec.
#[test]
fn nothing_leaves_uncut_where_ipsec_encrypts_what_this_host_sends() {
    let Some(mesh) = two_nodes("nothing_leaves_uncut_where_ipsec_encrypts", V4) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    let policy = "dir out src 192.0.2.1 dst 192.0.2.2";
    let template = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode transport";
    if !a.ns.succeeds(&format!("ip xfrm policy add {policy} {template}")) {
        return skipped("nothing_leaves_uncut_where_ipsec_encrypts", "this kernel has no IPsec");
    }
    until("super-packets are cut here", || TUNNEL_GSO.why_off(a).contains("1 IPsec policies"));
    assert_eq!(carry(a, b, V4), 0);
    a.ns.sh(&format!("ip xfrm policy delete {policy}"));
    until("super-packets leave uncut again", || TUNNEL_GSO.why_off(a).is_empty());
    assert!(carry(a, b, V4) > 0);
}

/// A rule that only forwarded packets meet: the redirection finds no way, where sockets find one.
#[test]
fn what_finds_no_way_comes_back_and_the_rest_is_cut_here() {
    comes_back("what_finds_no_way_comes_back", V4, "ip rule");
}

#[test]
fn what_finds_no_way_comes_back_over_ipv6() {
    comes_back("what_finds_no_way_comes_back_over_ipv6", V6, "ip -6 rule");
}

#[track_caller]
fn comes_back(story: &'static str, outer: Family, rule: &str) {
    let Some(mesh) = two_nodes(story, outer) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    assert!(carry(a, b, V4) > 0);
    a.ns.sh(&format!("{rule} add iif mesh0-gso blackhole"));
    carry(a, b, V4);
    assert!(TUNNEL_GSO.why_off(a).contains("some came back"), "{}", TUNNEL_GSO.why_off(a));
    assert_eq!(carry(a, b, V4), 0);
    mesh.balances_with_the_kernel();
}

#[test]
fn somebody_switches_its_device_off() {
    let Some(mesh) = two_nodes("somebody_switches_its_device_off", V4) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    a.ns.sh("ip link set mesh0-gso down");
    carry(a, b, V4);
    until("it is on again", || TUNNEL_GSO.why_off(a).is_empty());
    assert!(carry(a, b, V4) > 0);
    mesh.balances();
}

/// Who cannot have the device is not for ever trying: each try would be news of a device.
#[test]
fn a_device_of_that_name_is_left_alone() {
    let Some(builder) = Builder::new("a_device_of_that_name_is_left_alone") else { return };
    let mesh = builder.node("a").node("b").build();
    let [a, b] = mesh.two(["a", "b"]);
    a.ns.sh("ip link add mesh0-gso type veth peer name other");
    a.restart();
    b.restart();
    assert_eq!(carry(a, b, V4), 0);
    assert!(TUNNEL_GSO.why_off(a).contains("mesh0-gso"), "{}", TUNNEL_GSO.why_off(a));
    assert_eq!(a.log().matches("mesh0-gso").count(), 0, "{}", a.log());
    mesh.balances_with_the_kernel();
}

#[test]
fn without_its_device_it_does_without() {
    let Some(mesh) = two_nodes("without_its_device_it_does_without", V4) else { return };
    let [a, b] = mesh.two(["a", "b"]);
    assert!(carry(a, b, V4) > 0);
    a.ns.sh("ip link del mesh0-gso");
    assert_eq!(carry(a, b, V4), 0, "the first is lost, and sent again by TCP");
    assert!(TUNNEL_GSO.why_off(a).contains("a write to mesh0-gso failed"), "{}", TUNNEL_GSO.why_off(a));
    assert!(a.drops("udp_send_failed") > 0);
    mesh.balances();
}

#[test]
fn it_can_be_switched_off_and_is_not_there_without_peers_in_the_clear() {
    let Some(builder) = Builder::new("it_can_be_switched_off") else { return };
    let mesh = builder.node("a").set("tunnel-gso", "off").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    assert_eq!(TUNNEL_GSO.why_off(a), "`tunnel-gso: off`");
    assert_eq!(carry(a, b, V4), 0);
    assert!(!a.ns.succeeds("ip link show mesh0-gso"));
    a.set("tunnel-gso", Some("auto"));
    a.set("io", Some("tokio"));
    assert_eq!(a.stop(), 0);
    a.restart();
    assert!(TUNNEL_GSO.why_off(a).contains("hands over plain packets"), "{}", TUNNEL_GSO.why_off(a));
    assert!(!a.ns.succeeds("ip link show mesh0-gso"));
    if TUNNEL_GSO.why_off(b).is_empty() {
        a.set("io", Some("uring"));
        assert_eq!(a.stop(), 0);
        a.restart();
        assert!(carry(a, b, V4) > 0);
    }
    drop(mesh);
    let Some(builder) = Builder::new("it_is_not_there_without_peers_in_the_clear") else { return };
    let mesh = builder.encrypted().node("a").node("b").start();
    let a = mesh.node("a");
    let why = TUNNEL_GSO.why_off(a);
    assert!(why.contains("no peer in the clear") || why.contains("Linux 6.17"), "{why}");
    assert!(!a.ns.succeeds("ip link show mesh0-gso"));
}
