use super::*;
use crate::admin::protocol::MembershipView;

fn peer(name: &str, state: PeerState) -> PeerView {
    PeerView {
        name: name.to_owned(),
        endpoint: "10.9.0.2:8472".parse().unwrap(),
        subnets: vec!["10.42.2.0/24".parse().unwrap()],
        mac: "0a:58:0a:09:00:02".to_owned(),
        public_key: None,
        encryption: Encryption::None,
        preshared: false,
        session: None,
        state,
        last_seen_ms: None,
        rtt_us: None,
        path_mtu: 1500,
        path: None,
        loss_permille: None,
        ways: Vec::new(),
        tx_packets: 1_234_567,
        tx_bytes: 1_288_490_189,
        rx_packets: 0,
        rx_bytes: 0,
    }
}

fn sample() -> StatsView {
    StatsView {
        version: "0.1.0".to_owned(),
        node: "a".to_owned(),
        uptime_ms: 11_520_000,
        io: "mmsg".to_owned(),
        workers: 2,
        drops: [("no_route".to_owned(), 12), ("wrong_vni".to_owned(), 0), ("novel".to_owned(), 3)].into(),
        ..StatsView::default()
    }
}

const PLAIN: Look = Look { colour: false, all: false };

#[test]
fn peers_are_a_table() {
    let b =
        PeerView { last_seen_ms: Some(3_200), rtt_us: Some(180), loss_permille: Some(16), ..peer("b", PeerState::Up) };
    let long_name = peer("node-with-a-long-name", PeerState::Unknown);
    #[rustfmt::skip]
    let expected = "\
NAME                   STATE    ENDPOINT       SUBNETS       ENCRYPTION  SEEN       RTT   LOSS   MTU  TX PACKETS       TX  RX PACKETS   RX
b                      up       10.9.0.2:8472  10.42.2.0/24  none        3s ago  180 µs  1.6 %  1500   1,234,567  1.2 GiB           0  0 B
node-with-a-long-name  unknown  10.9.0.2:8472  10.42.2.0/24  none        -            -      -  1500   1,234,567  1.2 GiB           0  0 B
";
    assert_eq!(peers(&[b, long_name], None, PLAIN), expected);
}

#[test]
fn an_empty_list_says_what_to_do() {
    assert!(peers(&[], None, PLAIN).contains("add the other nodes to `nodes-file`"));
    assert!(nodes(&[], PLAIN).contains("meshctl status"));
}

#[test]
fn a_dead_peer_says_what_to_do_and_is_red() {
    let list = [peer("b", PeerState::Up), peer("c", PeerState::Down)];
    assert!(peers(&list, None, PLAIN).ends_with(
        "\n1 of 2 peers down: check that those nodes run, and that UDP to their endpoint passes each firewall.\n"
    ));
    let painted = peers(&list, None, Look { colour: true, all: false });
    assert!(painted.lines().nth(2).unwrap().starts_with("\x1b[31mc "), "{painted:?}");
    assert!(!peers(&list, None, PLAIN).contains('\x1b'));
    assert!(!peers(&list[..1], None, PLAIN).contains("down"));
}

#[test]
fn colour_does_not_move_columns() {
    let list = [peer("b", PeerState::Up), peer("c", PeerState::Down)];
    let mut painted = peers(&list, None, Look { colour: true, all: false });
    for code in ["\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[0m"] {
        painted = painted.replace(code, "");
    }
    assert_eq!(painted, peers(&list, None, PLAIN));
}

#[test]
fn rates_come_from_two_samples() {
    let now = [peer("b", PeerState::Up), peer("new", PeerState::Up)];
    let old = [PeerView { tx_packets: 1_000_000, tx_bytes: 0, ..peer("b", PeerState::Up) }];
    let text = peers(&now, Some(Before { sample: &old[..], passed: Duration::from_secs(2) }), PLAIN);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].ends_with("TX PPS     TX RATE  RX PPS  RX RATE"), "{text}");
    assert!(lines[1].ends_with("117.3k/s  5.2 Gbit/s     0/s  0 bit/s"), "{text}");
    assert!(lines[2].ends_with("  -           -       -        -"), "{text}");
}

#[test]
fn stats_show_what_was_dropped_and_why() {
    let text = stats(&sample(), None, PLAIN);
    assert!(text.starts_with("a  meshd 0.1.0, up 3h 12m, io mmsg, 2 workers\n\n"), "{text}");
    let drops = text.split("DROPS").nth(1).unwrap();
    assert_eq!(
        drops,
        "     PACKETS  MEANING AND USUAL FIX\n\
         no_route       12  no node has the destination in its subnets: check the destination, or the node list\n\
         novel           3\n"
    );
    let all = stats(&sample(), None, Look { all: true, ..PLAIN });
    assert!(all.contains("\nwrong_vni        0  another VXLAN network"), "{all}");
    assert!(stats(&StatsView::default(), None, PLAIN).ends_with("No drops.\n"));
}

#[test]
fn stats_account_for_each_direction() {
    let mut view = sample();
    view.outbound = JourneyView { entered: 1000, originated: 5, out: 990, dropped: 12, consumed: 3 };
    view.batches.tun_reads = 100;
    view.batches.tun_read_packets = 1250;
    view.offload_reasons.insert("udp_gso".to_owned(), "the send failed with EIO".to_owned());
    let text = stats(&view, None, PLAIN);
    #[rustfmt::skip]
    let account = "\
JOURNEY        IN  ORIGINATED  OUT  CONSUMED  DROPPED
tun to udp  1,000           5  990         3       12
udp to tun      0           0    0         0        0
";
    assert!(text.contains(account), "{text}");
    assert!(text.contains("\ntun read       100    1,250    12.5\n"), "{text}");
    assert!(text.contains("\nudp_gso     off    the send failed with EIO\n"), "{text}");
}

#[test]
fn a_restart_gives_no_rate() {
    let old = StatsView { uptime_ms: 99_999_999, ..sample() };
    let passed = Duration::from_secs(1);
    assert!(!stats(&sample(), Some(Before { sample: &old, passed }), PLAIN).contains("PPS"));
    let old = StatsView { uptime_ms: 11_519_000, ..sample() };
    assert!(stats(&sample(), Some(Before { sample: &old, passed }), PLAIN).contains("PPS"));
}

#[test]
fn status_is_a_line_a_concern() {
    let view = StatusView {
        node: "a".to_owned(),
        overlay_addresses: vec!["10.42.1.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        vtep_mac: "02:00:00:00:00:01".to_owned(),
        mtu: 1450,
        ready: true,
        tun: "mesh0".to_owned(),
        io: "mmsg".to_owned(),
        port: 8472,
        vni: 1,
        peers: 2,
        version: "0.1.0".to_owned(),
        ..StatusView::default()
    };
    let expected = "\
ready    yes
node     a, role run, meshd 0.1.0
overlay  10.42.1.1, fd00::1 on mesh0, MTU 1450
vtep     MAC 02:00:00:00:00:01, VNI 1, UDP port 8472, io mmsg
key      none: traffic is not encrypted
peers    2 (see `meshctl peers`)
";
    assert_eq!(status(&view, PLAIN), expected);
    let reasons = vec!["mesh0 is down: `ip link set mesh0 up`".to_owned()];
    let text = status(&StatusView { ready: false, reasons, ..view }, PLAIN);
    assert!(text.starts_with("ready    NO\n"), "{text}");
    assert!(text.contains("\nnot ready: mesh0 is down: `ip link set mesh0 up`\nWhat to do: "), "{text}");
}

/// Keys come with membership: until then nothing is sent at all, in the clear or not.
#[test]
fn who_waits_to_join_is_not_told_that_it_does_not_encrypt() {
    let member = |joined| StatusView {
        membership: Some(MembershipView { joined, ..MembershipView::default() }),
        ..StatusView::default()
    };
    assert!(!status(&member(false), PLAIN).contains("not encrypted"));
    assert!(status(&member(true), PLAIN).contains("not encrypted"));
}

#[test]
fn nodes_are_a_table() {
    let node = NodeView {
        name: "a".to_owned(),
        id: "a".to_owned(),
        role: NodeRole::Agent,
        state: NodeState::Ready,
        underlay: vec!["10.9.0.1".parse().unwrap()],
        subnets: ["10.42.1.0/24", "10.43.1.0/24", "10.44.1.0/24", "10.45.1.0/24"].map(|s| s.parse().unwrap()).to_vec(),
        labels: [("zone".to_owned(), "x".to_owned())].into(),
        taints: Vec::new(),
        joined_at: None,
        last_heartbeat: None,
        observed: None,
    };
    #[rustfmt::skip]
    let expected = "\
NAME  ROLE   STATE  UNDERLAY  SUBNETS                                       LABELS  TAINTS  JOINED
a     agent  ready  10.9.0.1  10.42.1.0/24, 10.43.1.0/24, 10.44.1.0/24, +1  zone=x  -       -
";
    assert_eq!(nodes(&[node], PLAIN), expected);
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let text = peers(&[peer("b\x1b[2J\nc", PeerState::Up)], None, PLAIN);
    assert!(!text.contains('\x1b'));
    assert_eq!(text.lines().count(), 2);
}
