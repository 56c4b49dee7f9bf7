//! `meshd::host` against a real kernel, each test alone in a network namespace of its own:
//!
//! ```text
//!   namespace meshd-host-PID-TEST
//!   ┌──────────────────────────────────────────────┐
//!   │ lo   under0 10.9.0.1/24, fd09::1/64  ══ peer0 │
//!   │ mesh0 (TUN), made by the test                 │
//!   └──────────────────────────────────────────────┘
//! ```
//!
//! A test runs its own binary again inside the namespace, since a namespace belongs to a process. Without root or
//! /dev/net/tun it prints SKIPPED and the reason.

mod clash;
mod harness;

use std::io::Read;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{assert_same, in_namespace, ip, nets, sh, succeeds, tun, whole_state};
use meshd::control::plan::overlay_mtu;
use meshd::host::{Change, Desired, Host, HostError, Report, UnderlayError, Watch, union};
use socket2::{Domain, Socket, Type};

#[test]
fn ensure_sets_everything_and_then_nothing() {
    in_namespace("ensure_sets_everything_and_then_nothing", async || {
        tun();
        let host = Host::open().unwrap();
        let first = host.ensure(&desired()).await.unwrap();
        for change in [Change::Marked, Change::Up, Change::AddressAdded(ip("10.42.1.1"))] {
            assert!(first.changes.contains(&change), "{first:?}");
        }
        assert_eq!(first.warnings, [""; 0]);

        let link = sh("ip -d link show mesh0");
        for part in ["mtu 1450", "alias meshd", ",UP", "addrgenmode none"] {
            assert!(link.contains(part), "{part}: {link}");
        }
        let addresses = sh("ip -o addr show dev mesh0");
        assert!(
            addresses.contains("inet 10.42.1.1/32 ") && addresses.contains("inet6 fd42:0:0:1::1/128 "),
            "{addresses}"
        );
        assert!(!addresses.contains("fe80"), "{addresses}");
        assert_eq!(
            sh("ip route show proto 72"),
            "10.42.0.0/16 dev mesh0 scope link src 10.42.1.1 linkdown \n\
             unreachable 10.42.0.0/16 metric 4294967295 \n\
             unreachable 10.42.1.0/24 metric 4294967295 \n"
        );
        let v6 = sh("ip -6 route show proto 72");
        assert!(v6.contains("fd42::/48 dev mesh0 src fd42:0:0:1::1 metric 1024"), "{v6}");
        assert!(v6.contains("unreachable fd42::/48 dev lo metric 4294967295"), "{v6}");
        assert!(v6.contains("unreachable fd42:0:0:1::/64 dev lo metric 4294967295"), "{v6}");
        for (key, value) in [
            ("ipv4/conf/mesh0/send_redirects", "0"),
            ("ipv4/conf/mesh0/rp_filter", "2"),
            ("ipv4/conf/mesh0/accept_redirects", "0"),
            ("ipv6/conf/mesh0/accept_redirects", "0"),
            ("ipv6/conf/mesh0/accept_ra", "0"),
        ] {
            assert_eq!(std::fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap().trim(), value, "{key}");
        }

        let state = whole_state();
        let second = host.ensure(&desired()).await.unwrap();
        assert_eq!(second, Report::default());
        assert_same(&state, "after the second time");
    });
}

#[test]
fn what_others_take_away_comes_back() {
    in_namespace("what_others_take_away_comes_back", async || {
        tun();
        let host = Host::open().unwrap();
        host.ensure(&desired()).await.unwrap();
        let right = whole_state();
        for harm in [
            "ip addr del 10.42.1.1/32 dev mesh0",
            "ip addr flush dev mesh0",
            "ip addr add 10.42.1.77/24 dev mesh0",
            "ip addr add 10.42.1.1/16 dev mesh0",
            "ip -6 addr del fd42:0:0:1::1/128 dev mesh0; ip -6 addr add fd42:0:0:1::1/64 dev mesh0",
            // The address that goes takes the source of the route along, which was right until then.
            "ip -6 addr del fd42:0:0:1::1/128 dev mesh0; ip -6 addr add fd42:0:0:1::1/64 dev mesh0; \
             ip -6 route replace fd42::/48 dev mesh0 proto 72 src fd42:0:0:1::1",
            "ip -6 addr add fe80::5/64 dev mesh0",
            "ip route del 10.42.0.0/16 dev mesh0",
            "ip route replace 10.42.0.0/16 dev mesh0",
            "ip route flush proto 72; ip -6 route flush proto 72",
            "ip route add 10.55.0.0/16 dev under0 proto 72 table 1000",
            "ip link set mesh0 mtu 1400",
            "ip link set mesh0 mtu 1200",
            "ip link set mesh0 down",
            "ip link set mesh0 alias other",
            "echo 1 > /proc/sys/net/ipv4/conf/mesh0/rp_filter; echo 2 > /proc/sys/net/ipv6/conf/mesh0/accept_ra",
            "echo 1 > /proc/sys/net/ipv6/conf/mesh0/disable_ipv6; echo 0 > /proc/sys/net/ipv6/conf/mesh0/disable_ipv6",
        ] {
            sh(harm);
            assert!(whole_state() != right, "positive control: {harm}");
            let report = host.ensure(&desired()).await.unwrap();
            assert!(!report.is_empty(), "{harm}");
            assert_same(&right, &format!("{harm}: {report:?}"));
            assert_eq!(host.ensure(&desired()).await.unwrap(), Report::default(), "{harm}");
        }
    });
}

#[test]
fn without_device_the_cluster_is_unreachable() {
    in_namespace("without_device_the_cluster_is_unreachable", async || {
        let host = Host::open().unwrap();
        assert!(sh("ip route get 10.42.2.1").contains("via 10.9.0.254"), "positive control: the default route");
        assert!(matches!(host.ensure(&desired()).await, Err(HostError::NoDevice { .. })));
        assert!(!succeeds("ip route get 10.42.2.1"));
        assert!(!succeeds("ip -6 route get fd42:0:0:2::1"));

        tun();
        host.ensure(&desired()).await.unwrap();
        assert!(sh("ip route get 10.42.2.1").contains("dev mesh0 src 10.42.1.1"));
        assert!(sh("ip -6 route get fd42:0:0:2::1").contains("dev mesh0"));
        assert!(!succeeds("ip route get 10.42.1.9"), "an absent local pod does not go back into the overlay");
        sh("ip link del mesh0");
        assert!(!succeeds("ip route get 10.42.2.1"));
        assert!(!succeeds("ip -6 route get fd42:0:0:2::1"));
    });
}

#[test]
fn not_one_packet_leaves_by_another_way_meanwhile() {
    in_namespace("not_one_packet_leaves_by_another_way_meanwhile", async || {
        // Without these a packet that leaves would wait for a neighbour's answer instead of being counted.
        sh("ip neigh add 10.9.0.254 lladdr 02:00:00:00:00:01 dev under0; \
            ip neigh add fd09::fe lladdr 02:00:00:00:00:01 dev under0");
        let host = Host::open().unwrap();
        let sockets = ["0.0.0.0:0", "[::]:0"].map(|a| std::net::UdpSocket::bind(a).unwrap());
        let send = move || {
            for target in ["10.42.2.1:9", "10.42.200.1:9", "[fd42:0:0:2::1]:9"] {
                let socket = &sockets[usize::from(target.starts_with('['))];
                socket.send_to(b"secret", target).ok();
            }
        };
        let mut wiretap = Wiretap::new();
        send();
        assert_eq!(wiretap.seen(b"secret").len(), 6, "positive control: without meshd all three leave, and arrive");

        let wide = desired();
        let narrow = Desired {
            addresses: vec![ip("10.42.7.1"), ip("fd42:0:0:7::1")],
            routes: nets(&["10.42.2.0/24", "10.42.200.0/24", "10.42.7.0/24", "fd42:0:0:2::/64", "fd42:0:0:7::/64"]),
            own_subnets: nets(&["10.42.7.0/24", "fd42:0:0:7::/64"]),
            ..desired()
        };
        tun();
        host.ensure(&wide).await.unwrap();
        let (stop, mut rounds) = (Arc::new(AtomicBool::new(false)), 0);
        let stopped = Arc::clone(&stop);
        let sender = std::thread::spawn(move || {
            let mut sent = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                send();
                sent += 3;
            }
            sent
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            host.ensure(&narrow).await.unwrap();
            host.ensure(&wide).await.unwrap();
            sh("ip addr flush dev mesh0; ip link set mesh0 down");
            host.ensure(&wide).await.unwrap();
            sh("ip link del mesh0; ip tuntap add mode tun name mesh0 multi_queue vnet_hdr");
            host.ensure(&wide).await.unwrap();
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let sent = sender.join().unwrap();
        assert!(sent > 1000 && rounds > 2, "{sent} packets, {rounds} rounds");
        let leaked = wiretap.seen(b"secret");
        assert!(leaked.is_empty(), "{} of {sent} packets in {rounds} rounds: {:?}", leaked.len(), leaked.first());
    });
}

#[test]
fn not_one_packet_is_refused_while_prefixes_join_and_part() {
    in_namespace("not_one_packet_is_refused_while_prefixes_join_and_part", async || {
        tun();
        let host = Host::open().unwrap();
        let with = |routes: &[&str]| Desired { routes: nets(routes), ..desired() };
        let apart = with(&["10.42.1.0/24", "10.42.2.0/24", "fd42:0:0:1::/64", "fd42:0:0:2::/64"]);
        let joined = with(&["10.42.1.0/24", "10.42.2.0/23", "fd42:0:0:1::/64", "fd42:0:0:2::/63"]);
        host.ensure(&apart).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sockets = ["10.42.1.1:0", "[fd42:0:0:1::1]:0"].map(|a| std::net::UdpSocket::bind(a).unwrap());
        let sender = std::thread::spawn(move || {
            let (mut sent, mut refused) = (0_u64, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                for (socket, target) in sockets.iter().zip(["10.42.2.1:9", "[fd42:0:0:2::1]:9"]) {
                    sent += 1;
                    refused.extend(socket.send_to(b"x", target).err().map(|e| format!("{target}: {e}")));
                }
            }
            (sent, refused)
        });
        for _ in 0..200 {
            host.ensure(&joined).await.unwrap();
            host.ensure(&apart).await.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        let (sent, refused) = sender.join().unwrap();
        assert!(sent > 1000, "{sent}");
        assert!(refused.is_empty(), "{} of {sent}: {:?}", refused.len(), refused.first());
    });
}

#[test]
fn subnets_may_change_and_foreign_routes_stay() {
    in_namespace("subnets_may_change_and_foreign_routes_stay", async || {
        tun();
        sh("ip link add cni0 type bridge; ip addr add 10.42.1.1/24 dev cni0; ip link set cni0 up");
        sh("ip route add 10.77.0.0/16 via 10.9.0.254 proto static; ip -6 route add fd77::/48 dev under0 proto bird");
        sh("ip route add 10.42.9.0/24 via 10.9.0.254 proto static metric 50");
        let foreign = || {
            sh("ip route show; ip -6 route show")
                .lines()
                .filter(|l| !l.contains("proto 72"))
                .collect::<Vec<_>>()
                .join("\n")
        };
        let before = foreign();
        let host = Host::open().unwrap();
        let mut desired = Desired {
            addresses: vec![ip("10.42.1.0")],
            routes: nets(&["10.42.1.0/24", "10.42.2.0/24"]),
            own_subnets: nets(&["10.42.1.0/24"]),
            ..desired()
        };
        host.ensure(&desired).await.unwrap();
        assert!(sh("ip route get 10.42.1.9").contains("dev cni0"), "local pods are reached through the bridge");

        desired.routes = nets(&["10.42.2.0/23", "10.43.0.0/16"]);
        desired.own_subnets = nets(&["10.43.7.0/24"]);
        desired.addresses = vec![ip("10.43.7.0")];
        let report = host.ensure(&desired).await.unwrap();
        let position = |wanted: &str| {
            report
                .changes
                .iter()
                .position(|c| c.to_string() == wanted)
                .unwrap_or_else(|| panic!("{wanted}: {report:?}"))
        };
        let added = position("route 10.42.2.0/23 dev mesh0 proto 72 added");
        assert!(position("route unreachable 10.42.2.0/23 proto 72 metric 4294967295 added") < added);
        assert!(position("address 10.43.7.0 added") < added);
        assert!(added < position("route 10.42.2.0/24 dev mesh0 proto 72 removed"));
        assert!(position("route 10.42.2.0/24 dev mesh0 proto 72 removed") < position("address 10.42.1.0/32 removed"));
        assert_eq!(
            sh("ip route show proto 72"),
            "10.42.2.0/23 dev mesh0 scope link src 10.43.7.0 linkdown \n\
             unreachable 10.42.2.0/23 metric 4294967295 \n\
             10.43.0.0/16 dev mesh0 scope link src 10.43.7.0 linkdown \n\
             unreachable 10.43.0.0/16 metric 4294967295 \n\
             unreachable 10.43.7.0/24 metric 4294967295 \n"
        );

        // The same routes from another address.
        desired.addresses = vec![ip("10.43.7.9")];
        host.ensure(&desired).await.unwrap();
        assert!(sh("ip route show proto 72 dev mesh0").lines().all(|l| l.contains("src 10.43.7.9")));
        assert_eq!(host.ensure(&desired).await.unwrap(), Report::default());
        assert_eq!(foreign(), before);
    });
}

#[test]
fn a_foreign_route_in_the_place_of_ours_is_named_and_kept() {
    in_namespace("a_foreign_route_in_the_place_of_ours_is_named_and_kept", async || {
        tun();
        let host = Host::open().unwrap();
        host.ensure(&desired()).await.unwrap();
        sh("ip route replace 10.42.0.0/16 via 10.9.0.254 proto static");
        sh("ip addr flush dev mesh0");
        let error = host.ensure(&desired()).await.unwrap_err().to_string();
        assert!(error.contains("ip route del 10.42.0.0/16 via 10.9.0.254 dev under0 proto static"), "{error}");
        assert!(sh("ip route show 10.42.0.0/16").contains("via 10.9.0.254"));
        assert!(sh("ip -o addr show dev mesh0").contains("10.42.1.1/32"), "the rest is done all the same");
        sh("ip route del 10.42.0.0/16 via 10.9.0.254 dev under0 proto static");
        host.ensure(&desired()).await.unwrap();
        assert!(sh("ip route get 10.42.2.1").contains("dev mesh0"));
    });
}

#[test]
fn ipv6_is_missed_only_where_it_is_wanted() {
    in_namespace("ipv6_is_missed_only_where_it_is_wanted", async || {
        sh("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
        tun();
        let host = Host::open().unwrap();
        let error = host.ensure(&desired()).await.unwrap_err();
        assert!(matches!(error, HostError::Ipv6Off { .. }), "{error}");
        assert!(sh("ip route get 10.42.2.1").contains("dev mesh0"), "IPv4 works meanwhile");
        assert!(!succeeds("ip -6 route get fd42:0:0:2::1"), "and IPv6 does not leave another way");

        let v4_alone = Desired { addresses: vec![ip("10.42.1.1")], ..desired() };
        let report = host.ensure(&v4_alone).await.unwrap();
        assert_eq!(report.changes, []);
        assert_eq!(report.warnings.len(), 1, "{report:?}");

        // Off on the whole machine: routes are possible all the same.
        sh("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; ip -6 route flush proto 72");
        let report = host.ensure(&v4_alone).await.unwrap();
        assert!(report.changes.iter().all(|c| c.to_string().starts_with("route unreachable fd42:")), "{report:?}");
        assert_eq!(host.ensure(&v4_alone).await.unwrap().changes, []);
        sh("for d in all lo under0; do echo 0 > /proc/sys/net/ipv6/conf/$d/disable_ipv6; done");

        let too_small = Desired { mtu: 1230, ..desired() };
        sh("echo 0 > /proc/sys/net/ipv6/conf/mesh0/disable_ipv6");
        let error = host.ensure(&too_small).await.unwrap_err();
        assert!(matches!(error, HostError::MtuBelowIpv6 { mtu: 1230, .. }), "{error}");
        // The kernel gives the device new IPv6 settings when its MTU grows again.
        sh("echo 0 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
        host.ensure(&desired()).await.unwrap();
        assert_eq!(host.ensure(&desired()).await.unwrap(), Report::default());
        let addresses = sh("ip -o addr show dev mesh0");
        assert!(addresses.contains("fd42:0:0:1::1/128") && !addresses.contains("fe80"), "{addresses}");
    });
}

#[test]
fn a_thousand_scattered_subnets_take_less_than_two_seconds() {
    in_namespace("a_thousand_scattered_subnets_take_less_than_two_seconds", async || {
        tun();
        let host = Host::open().unwrap();
        // Every other /24, so that nothing can be drawn together.
        let scattered = (0..1000_u32).map(|i| format!("10.{}.{}.0/24", 100 + i / 128, i % 128 * 2).parse().unwrap());
        let desired = Desired { routes: union(scattered), ..desired() };
        assert_eq!(desired.routes.len(), 1000);
        let start = Instant::now();
        host.ensure(&desired).await.unwrap();
        let first = start.elapsed();
        assert_eq!(sh("ip route show proto 72 dev mesh0").lines().count(), 1000);
        let start = Instant::now();
        assert!(host.ensure(&desired).await.unwrap().is_empty());
        let second = start.elapsed();
        eprintln!("1,000 subnets: {first:?}, again {second:?}");
        assert!(first < Duration::from_secs(2), "{first:?}");
        assert!(second < Duration::from_secs(1), "{second:?}");
    });
}

#[test]
fn cleanup_takes_all_that_is_ours_and_nothing_else() {
    in_namespace("cleanup_takes_all_that_is_ours_and_nothing_else", async || {
        let host = Host::open().unwrap();
        let before = whole_state();
        assert!(host.cleanup("mesh0").await.unwrap().is_empty());
        tun();
        host.ensure(&desired()).await.unwrap();
        sh("ip route add 10.55.0.0/16 dev under0 proto 72 table 1000");
        let report = host.cleanup("mesh0").await.unwrap();
        assert_eq!(report.device.as_deref(), Some("mesh0"));
        assert_eq!(report.foreign_device, None);
        assert_eq!(report.routes.len(), 7, "{report:?}");
        assert!(report.routes.contains(&"10.42.0.0/16 dev mesh0 proto 72".to_owned()), "{report:?}");
        assert!(report.routes.contains(&"10.55.0.0/16 dev under0 table 1000 proto 72".to_owned()), "{report:?}");
        assert_same(&before, "after cleanup");
        assert!(host.cleanup("mesh0").await.unwrap().is_empty());

        tun();
        sh("ip link set mesh0 alias 'my vpn'; ip route add unreachable 10.42.0.0/16 proto 72");
        let report = host.cleanup("mesh0").await.unwrap();
        assert_eq!(report.device, None);
        assert!(report.foreign_device.as_deref().is_some_and(|d| d.contains("my vpn")), "{report:?}");
        assert_eq!(report.routes, ["unreachable 10.42.0.0/16 proto 72"]);
        assert!(succeeds("ip link show mesh0"));
    });
}

#[test]
fn the_underlay_is_found() {
    in_namespace("the_underlay_is_found", async || {
        let host = Host::open().unwrap();
        sh("ip link set under0 mtu 1400; ip addr add 10.9.0.200/32 dev under0");
        let found = host.underlay(&[]).await.unwrap();
        let shown: Vec<_> = found.iter().map(|u| format!("{} {} {}", u.ip, u.ifname, u.mtu)).collect();
        assert_eq!(shown, ["10.9.0.1 under0 1400", "fd09::1 under0 1400"]);
        assert_eq!(overlay_mtu(found[0].mtu, false), 1350);
        let named = host.underlay(&["under0".parse().unwrap()]).await.unwrap();
        assert_eq!(named, found);
        let given = host.underlay(&["fd09::1".parse().unwrap()]).await.unwrap();
        assert_eq!(given, found[1..]);
        let error = host.underlay(&["10.9.0.9".parse().unwrap()]).await.unwrap_err();
        assert!(error.to_string().contains("10.9.0.1 (under0)"), "{error}");
        sh("ip route del default; ip -6 route del default");
        assert!(matches!(host.underlay(&[]).await, Err(UnderlayError::NoDefaultRoute { .. })));
    });
}

#[test]
fn changes_are_noticed_and_mended_and_then_it_is_quiet() {
    in_namespace("changes_are_noticed_and_mended_and_then_it_is_quiet", async || {
        tun();
        let host = Host::open().unwrap();
        let mut watch = Watch::open().unwrap();
        let quiet = Duration::from_millis(500);
        host.ensure(&desired()).await.unwrap();
        watch.changed().await;
        host.ensure(&desired()).await.unwrap();
        while tokio::time::timeout(quiet, watch.changed()).await.is_ok() {}
        let right = whole_state();

        for harm in [
            "ip addr flush dev mesh0",
            "ip route del 10.42.0.0/16 dev mesh0",
            "ip -6 route flush proto 72",
            "ip link set mesh0 mtu 1300",
            "ip link set mesh0 down",
            "echo 1 > /proc/sys/net/ipv4/conf/mesh0/rp_filter",
        ] {
            let start = Instant::now();
            sh(harm);
            assert!(whole_state() != right, "positive control: {harm}");
            let heard = tokio::time::timeout(Duration::from_secs(2), watch.changed()).await;
            assert!(heard.is_ok(), "{harm}");
            host.ensure(&desired()).await.unwrap();
            assert_same(&right, harm);
            assert!(start.elapsed() < Duration::from_secs(2), "{harm}: {:?}", start.elapsed());
            // Mending raises an event of its own; the look that follows changes nothing, and then it ends.
            let mut events = 0;
            while tokio::time::timeout(quiet, watch.changed()).await.is_ok() {
                assert!(host.ensure(&desired()).await.unwrap().is_empty(), "{harm}");
                events += 1;
            }
            assert!(events <= 2, "{harm}: {events}");
        }

        // A burst that overflows the socket's buffer (ENOBUFS) is a change like any other, and told in few pieces.
        let batch: String =
            (0..20_000).map(|i| format!("route add 10.{}.{}.0/24 dev lo\n", 100 + i / 256, i % 256)).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), batch).unwrap();
        sh(&format!("ip -batch {}", file.path().display()));
        let mut events = 0;
        while tokio::time::timeout(quiet, watch.changed()).await.is_ok() {
            events += 1;
        }
        assert!((1..=2).contains(&events), "{events}");
        sh("ip link set mesh0 mtu 1300");
        assert!(tokio::time::timeout(Duration::from_secs(2), watch.changed()).await.is_ok(), "and it listens on");
    });
}

#[test]
fn a_dropped_wait_loses_no_change() {
    in_namespace("a_dropped_wait_loses_no_change", async || {
        let mut watch = Watch::open().unwrap();
        sh("ip link set under0 mtu 1400");
        assert!(
            tokio::time::timeout(Duration::from_millis(20), watch.changed()).await.is_err(),
            "still drawn together"
        );
        assert!(tokio::time::timeout(Duration::from_secs(1), watch.changed()).await.is_ok());
        assert!(tokio::time::timeout(Duration::from_millis(400), watch.changed()).await.is_err());
    });
}

#[test]
fn packets_that_nobody_reads_are_counted() {
    in_namespace("packets_that_nobody_reads_are_counted", async || {
        let host = Host::open().unwrap();
        assert!(matches!(host.tun_drops("mesh0").await, Err(HostError::NoDevice { .. })));
        // Held open and never read: its queue takes 500 packets, the rest is dropped.
        let _queue = tokio_tun::Tun::builder().name("mesh0").build().unwrap();
        host.ensure(&desired()).await.unwrap();
        assert_eq!(host.tun_drops("mesh0").await.unwrap(), 0);
        let socket = std::net::UdpSocket::bind("10.42.1.1:0").unwrap();
        for _ in 0..700 {
            socket.send_to(b"x", "10.42.2.1:9").ok();
        }
        let drops = host.tun_drops("mesh0").await.unwrap();
        assert!((150..=700).contains(&drops), "{drops}");
    });
}

#[test]
fn without_privilege_the_error_says_what_is_needed() {
    in_namespace("without_privilege_the_error_says_what_is_needed", async || {
        if std::env::var_os(UNPRIVILEGED).is_some() {
            let error = Host::open().unwrap().ensure(&desired()).await.unwrap_err();
            assert!(matches!(error, HostError::Denied { .. }), "{error:?}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
            return;
        }
        tun();
        let output = Command::new("setpriv")
            .args(["--bounding-set=-all", "--inh-caps=-all"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "without_privilege_the_error_says_what_is_needed", "--nocapture"])
            .env(UNPRIVILEGED, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
}

fn desired() -> Desired {
    Desired {
        tun: "mesh0".to_owned(),
        mtu: 1450,
        addresses: vec![ip("10.42.1.1"), ip("fd42:0:0:1::1")],
        routes: nets(&["10.42.0.0/16", "fd42::/48"]),
        own_subnets: nets(&["10.42.1.0/24", "fd42:0:0:1::/64"]),
    }
}

/// Sees every frame that any device of the namespace sends or receives.
struct Wiretap(Socket);

impl Wiretap {
    fn new() -> Self {
        let all = i32::from(u16::to_be(0x0003)); // ETH_P_ALL
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(all.into())).unwrap();
        socket.set_nonblocking(true).unwrap();
        Wiretap(socket)
    }

    /// The frames since the last call that carry this.
    fn seen(&mut self, payload: &[u8]) -> Vec<String> {
        let mut buffer = [0; 2048];
        let mut seen = Vec::new();
        while let Ok(length) = self.0.read(&mut buffer) {
            if buffer[..length].windows(payload.len()).any(|w| w == payload) {
                seen.push(buffer[..length].iter().map(|b| format!("{b:02x}")).collect());
            }
        }
        seen
    }
}

const UNPRIVILEGED: &str = "MESHD_HOST_TEST_UNPRIVILEGED";
