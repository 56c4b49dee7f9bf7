//! What stands in the way is named with its owner, and the fix that is told fixes it.

use std::net::{IpAddr, SocketAddr};

use meshd::host::{Clash, ClashKind, Desired, Host, HostError, Preflight, Refused};
use socket2::{Domain, Socket, Type};

use crate::desired;
use crate::harness::{in_namespace, ip, sh, tun, whole_state};

#[test]
fn a_clean_machine_and_our_leftovers_pass_preflight() {
    in_namespace("clash::a_clean_machine_and_our_leftovers_pass_preflight", async || {
        let host = Host::open().unwrap();
        assert_eq!(clashes(&host, &preflight()).await, []);
        tun();
        host.ensure(&desired()).await.unwrap();
        // A bridge for the local pods, and routes that are less specific.
        sh("ip link add cni0 type bridge; ip addr add 10.42.1.1/24 dev cni0; ip link set cni0 up");
        sh("ip route add 10.0.0.0/8 via 10.9.0.254; ip route add 10.42.1.128/25 dev cni0");
        assert_eq!(clashes(&host, &preflight()).await, []);
    });
}

#[test]
fn a_device_that_is_not_ours_clashes() {
    in_namespace("clash::a_device_that_is_not_ours_clashes", async || {
        let host = Host::open().unwrap();
        for (make, kind) in [
            ("ip link add mesh0 type bridge", "a bridge device"),
            ("ip tuntap add mode tun name mesh0", "a TUN device"),
            ("ip tuntap add mode tap name mesh0", "a TAP device"),
        ] {
            sh(make);
            let clash = only(clashes(&host, &preflight()).await);
            assert_eq!(clash.kind, ClashKind::Device);
            assert!(clash.owner.contains(kind), "{clash}");
            assert!(clash.fix.contains("ip link del mesh0"), "{clash}");
            sh("ip link del mesh0");
        }
        sh("ip link add mesh0 type bridge");
        let before = whole_state();
        assert!(matches!(host.ensure(&desired()).await, Err(HostError::NotTun { .. })));
        assert_eq!(sh("ip link show mesh0"), before.lines().take(2).fold(String::new(), |all, l| all + l + "\n"));
    });
}

#[test]
fn a_taken_port_names_its_owner() {
    in_namespace("clash::a_taken_port_names_its_owner", async || {
        let host = Host::open().unwrap();

        let me = format!("(process {})", std::process::id());
        for bind in ["10.9.0.1", "0.0.0.0", "::"] {
            let holder = hold(ip(bind), 8472);
            let clash = only(clashes(&host, &preflight()).await);
            assert_eq!(clash.kind, ClashKind::Port);
            assert!(clash.what.contains("8472") && clash.what.contains("10.9.0.1"), "{clash}");
            assert!(clash.owner.contains("host_netns") && clash.owner.contains(&me), "{bind}: {clash}");
            assert!(clash.fix.contains("kill ") && clash.fix.contains("`port:`"), "{clash}");
            drop(holder);
        }
        assert_eq!(clashes(&host, &preflight()).await, []);

        sh("ip link add flannel.1 type vxlan id 1 dstport 8472 local 10.9.0.1 dev under0 nolearning");
        sh(
            "ip link add other.2 type vxlan id 2 dstport 4789 dev under0; ip link set other.2 up; ip link set flannel.1 up",
        );
        let clash = only(clashes(&host, &preflight()).await);
        assert_eq!(clash.owner, "it belongs to flannel.1 (kernel VXLAN device)");
        assert!(clash.fix.contains("ip link del flannel.1"), "{clash}");
        assert_eq!(clashes(&host, &Preflight { port: 8473, ..preflight() }).await, []);
        sh("ip link del flannel.1");
        assert_eq!(clashes(&host, &preflight()).await, []);

        let v6 = Preflight { node_ips: vec![ip("fd09::1")], ..preflight() };
        assert_eq!(clashes(&host, &v6).await, []);
        let _holder = hold(ip("fd09::1"), 8472);
        let clash = only(clashes(&host, &v6).await);
        assert!(clash.owner.contains(&me), "{clash}");
    });
}

#[test]
fn a_foreign_node_ip_lists_the_ones_there_are() {
    in_namespace("clash::a_foreign_node_ip_lists_the_ones_there_are", async || {
        let host = Host::open().unwrap();
        let wrong = Preflight { node_ips: vec![ip("10.9.0.77")], ..preflight() };
        let clash = only(clashes(&host, &wrong).await);
        assert_eq!(clash.kind, ClashKind::NodeIp);
        assert!(clash.owner.contains("10.9.0.1 (under0)"), "{clash}");

        sh("ip addr add 10.42.7.1/32 dev lo");
        let inside = Preflight { node_ips: vec![ip("10.42.7.1")], ..preflight() };
        let clash = only(clashes(&host, &inside).await);
        assert_eq!(clash.kind, ClashKind::UnderlayInside);
        assert!(clash.what.contains("10.42.7.1") && clash.what.contains("10.42.0.0/16"), "{clash}");
    });
}

#[test]
fn routes_and_addresses_inside_the_overlay_clash() {
    in_namespace("clash::routes_and_addresses_inside_the_overlay_clash", async || {
        let host = Host::open().unwrap();
        for (route, fix) in [
            ("10.42.0.0/16 via 10.9.0.254", "ip route del 10.42.0.0/16 via 10.9.0.254 dev under0 proto boot"),
            ("10.42.2.0/24 via 10.9.0.2 proto bird", "ip route del 10.42.2.0/24 via 10.9.0.2 dev under0 proto bird"),
            ("10.42.2.0/24 dev under0 table 77", "ip route del 10.42.2.0/24 dev under0 table 77 proto boot"),
            ("blackhole 10.42.3.0/24", "ip route del blackhole 10.42.3.0/24 proto boot"),
            (
                "fd42:0:0:2::/64 via fd09::2",
                "ip -6 route del fd42:0:0:2::/64 via fd09::2 dev under0 proto boot metric 1024",
            ),
        ] {
            sh(&format!("ip route add {route}"));
            let clash = only(clashes(&host, &preflight()).await);
            assert_eq!(clash.kind, ClashKind::Route);
            assert!(clash.fix.starts_with(fix), "{clash}");
            sh(fix);
            assert_eq!(clashes(&host, &preflight()).await, [], "the fix fixes it: {fix}");
        }
        for address in ["10.42.2.5/24", "fd42:0:0:2::5/64"] {
            sh(&format!("ip addr add {address} dev under0 nodad"));
            let clash = only(clashes(&host, &preflight()).await);
            assert_eq!(clash.kind, ClashKind::Address);
            let fix = format!("ip addr del {address} dev under0");
            assert!(clash.fix.starts_with(&fix), "{clash}");
            sh(&fix);
            assert_eq!(clashes(&host, &preflight()).await, []);
        }
    });
}

fn preflight() -> Preflight {
    let Desired { tun, routes, own_subnets, .. } = desired();
    Preflight { tun, port: 8472, node_ips: vec![ip("10.9.0.1")], prefixes: routes, own_subnets }
}

async fn clashes(host: &Host, preflight: &Preflight) -> Vec<Clash> {
    match host.preflight(preflight).await {
        Ok(()) => Vec::new(),
        Err(Refused::Clashes(clashes)) => clashes,
        Err(Refused::Host(e)) => panic!("{e}"),
    }
}

#[track_caller]
fn only(clashes: Vec<Clash>) -> Clash {
    assert_eq!(clashes.len(), 1, "{clashes:#?}");
    clashes.into_iter().next().unwrap()
}

/// Holds a UDP port as meshd's workers do, shared with whoever says SO_REUSEPORT too.
fn hold(ip: IpAddr, port: u16) -> Socket {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(ip, port)), Type::DGRAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&SocketAddr::new(ip, port).into()).unwrap();
    socket
}
