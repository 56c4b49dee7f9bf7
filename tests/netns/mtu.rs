//! Packets that do not fit are cut before they leave, or their sender is told.

use crate::mesh::{Builder, V4, V6};
use crate::traffic::{ping, tcp, udp};

fn mtu_of(node: &crate::mesh::Node) -> String {
    let link = node.ns.sh("ip -o link show mesh0");
    link.split_whitespace().skip_while(|word| *word != "mtu").nth(1).unwrap().to_owned()
}

#[test]
fn the_mtu_follows_the_underlay() {
    for (outer, underlay, overlay) in [(V4, 1500, "1450"), (V6, 1500, "1430"), (V4, 9000, "8950")] {
        let Some(mesh) = Builder::new("the_mtu_follows_the_underlay") else { return };
        let mesh = mesh.over(outer).underlay_mtu(underlay).node("a").node("b").start();
        let [a, b] = mesh.two(["a", "b"]);
        assert_eq!(mtu_of(a), overlay);
        assert_eq!(a.json(&["status"])["mtu"].to_string(), overlay);
        let fits = overlay.parse::<usize>().unwrap() - 28;
        assert!(a.ns.succeeds(&format!("ping -n -c 1 -W 5 -M do -s {fits} {}", b.overlay(V4))));
        tcp(&a.ns, &b.ns, b.overlay(V6), 1 << 19);
        mesh.balances();
    }
}

#[test]
fn a_device_that_is_too_large_by_hand_tells_senders() {
    let Some(mesh) = Builder::new("a_device_that_is_too_large_by_hand_tells_senders") else { return };
    let mesh = mesh.node("a").set("mtu", 1500).node("b").set("mtu", 1500).start();
    let [a, b] = mesh.two(["a", "b"]);
    assert_eq!(mtu_of(a), "1500");
    let ping_of = |size: usize, to| a.ns.output(&format!("ping -n -c 2 -i 0.2 -W 2 -M do -s {size} {to}"));
    let fits = ping_of(1450 - 28, b.overlay(V4));
    assert!(fits.status.success(), "positive control: {}", String::from_utf8_lossy(&fits.stdout));
    let refused = ping_of(1451 - 28, b.overlay(V4));
    let text = String::from_utf8_lossy(&refused.stdout).into_owned() + &String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && text.contains("mtu") && text.contains("1450"), "{text}");
    let refused = ping_of(1451 - 48, b.overlay(V6));
    let text = String::from_utf8_lossy(&refused.stdout).into_owned() + &String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && text.contains("1450"), "{text}");
    let stats = a.stats();
    assert!(stats["drops"]["packet_too_big"].as_u64().unwrap() >= 2 && stats["originated"].as_u64().unwrap() >= 2);

    // TCP is cut to fit, or learns the path's MTU; datagrams that may be fragmented are
    a.ns.sh("ip route flush cache; ip -6 route flush cache");
    for family in [V4, V6] {
        tcp(&a.ns, &b.ns, b.overlay(family), 1 << 20);
    }
    // who sends datagrams that may not has to have been told
    for (from, to) in [(a, b), (b, a)] {
        from.ns.output(&format!("ping -n -c 1 -W 1 -M do -s 1472 {} || true", to.overlay(V4)));
    }
    assert!(a.ns.succeeds(&format!("ping -n -c 1 -W 5 -M dont -s 1460 {}", b.overlay(V4))), "without DF it arrives");
    udp(&a.ns, a.overlay(V4), &b.ns, b.overlay(V4), &[1400, 1472, 9000]);
    ping(&b.ns, a.overlay(V4));
    mesh.balances();
}

#[test]
fn pods_with_a_larger_mtu_are_told() {
    let Some(mesh) = Builder::new("pods_with_a_larger_mtu_are_told") else { return };
    let mesh = mesh.pods().node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    for (from, to) in [(a, b), (b, a)] {
        let refused = from.pod().output(&format!("ping -n -c 2 -i 0.2 -W 2 -M do -s 1472 {}", to.pod_address(V4)));
        let text = String::from_utf8_lossy(&refused.stdout).into_owned() + &String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && text.contains("1450"), "{text}");
    }
    // both have learnt it, and cut their datagrams
    udp(a.pod(), a.pod_address(V4), b.pod(), b.pod_address(V4), &[1472, 9000]);
    for family in [V4, V6] {
        tcp(a.pod(), b.pod(), b.pod_address(family), 1 << 20);
    }
    mesh.balances();
}
