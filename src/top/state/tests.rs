use super::*;

use serde_json::json;

/// A peer of which only what is said here matters.
pub(in crate::top) fn peer(
    name: &str,
    state: &str,
    rtt_us: Option<u64>,
    loss: Option<u32>,
    bytes: [u64; 2],
) -> PeerView {
    serde_json::from_value(json!({
        "name": name, "endpoint": "10.9.0.2:8472", "subnets": ["10.42.2.0/24"], "mac": "02:00:00:00:00:02",
        "public_key": null, "encryption": "none", "state": state, "last_seen_ms": 5, "rtt_us": rtt_us,
        "loss_permille": loss, "path_mtu": 1450, "rx_packets": bytes[0] / 100, "rx_bytes": bytes[0],
        "tx_packets": bytes[1] / 100, "tx_bytes": bytes[1],
    }))
    .unwrap()
}

pub(in crate::top) fn sample(second: u64, peers: Vec<PeerView>, drops: &[(&str, u64)]) -> Sample {
    let side = |bytes: u64| TrafficView { rx_packets: bytes / 100, rx_bytes: bytes, ..TrafficView::default() };
    let stats = StatsView {
        version: "1.2.3".to_owned(),
        node: "one".to_owned(),
        uptime_ms: 60_000 + second * 1000,
        io: "mmsg".to_owned(),
        workers: 2,
        tun: side(second * 1_000_000),
        udp: side(second * 2_000_000),
        drops: drops.iter().map(|(reason, n)| ((*reason).to_owned(), *n)).collect(),
        ..StatsView::default()
    };
    Sample { stats, peers, at: Duration::from_secs(second) }
}

/// Three peers, of which b sends, c receives and a does neither; seen twice, a second apart.
pub(in crate::top) fn three() -> State {
    let at = |second: u64| {
        let b = peer("b", "up", Some(900), Some(16), [second * 125_000, 0]);
        let c = peer("c", "down", Some(400), None, [0, second * 1_250_000]);
        sample(
            second,
            vec![peer("a", "unknown", None, None, [7, 7]), b, c],
            &[("no_route", 5), ("peer_down", second * 3)],
        )
    };
    let mut state = State::default();
    state.take(at(1));
    state.take(at(2));
    state
}

fn press(state: &mut State, keys: &str) {
    for key in keys.chars() {
        assert!(!state.press(KeyCode::Char(key), KeyModifiers::NONE), "{key}");
    }
}

fn names(state: &State) -> Vec<&str> {
    state.rows().iter().map(|row| row.peer.name.as_str()).collect()
}

#[test]
fn rates_are_what_grew_between_two_samples() {
    let mut state = State::default();
    assert!(state.rows().is_empty() && state.engine().is_none() && state.drops().is_empty());
    state.take(sample(1, vec![peer("b", "up", None, None, [100, 0])], &[]));
    assert_eq!(state.rows()[0].rates, None, "one sample has no rates");
    let state = three();
    let rows = state.rows();
    assert_eq!(rows[0].rates, Some(Rates::default()));
    assert_eq!(rows[1].rates, Some(Rates { rx_packets: 1250.0, rx_bits: 1e6, ..Rates::default() }));
    assert_eq!(rows[2].rates.unwrap().tx_bits, 1e7);
    let [(_, tun, tun_rates), (_, _, udp_rates)] = state.engine().unwrap();
    assert_eq!((tun.rx_bytes, tun_rates.unwrap().rx_bits, udp_rates.unwrap().rx_bits), (2_000_000, 8e6, 16e6));
    assert_eq!(state.census(), Census { up: 1, down: 1, unknown: 1 });
    assert_eq!(rows[1].trend, [1_000_000]);
}

#[test]
fn what_is_dropped_now_comes_first() {
    let state = three();
    let drops: Vec<_> = state.drops().iter().map(|drop| (drop.reason, drop.total, drop.rate)).collect();
    assert_eq!(drops, [("peer_down", 6, Some(3.0)), ("no_route", 5, Some(0.0))]);
}

#[test]
fn keys_order() {
    let mut state = three();
    for (keys, expected) in [
        ("", ["a", "b", "c"]),
        ("n", ["c", "b", "a"]),
        ("n", ["a", "b", "c"]),
        ("r", ["b", "a", "c"]),
        ("t", ["c", "a", "b"]),
        ("d", ["b", "c", "a"]),
        // who has no round trip is last either way
        ("d", ["c", "b", "a"]),
        ("l", ["b", "a", "c"]),
        ("q?", ["b", "a", "c"]),
    ] {
        if keys == "q?" {
            assert!(state.press(KeyCode::Char('q'), KeyModifiers::NONE));
            continue;
        }
        press(&mut state, keys);
        assert_eq!(names(&state), expected, "{keys}");
    }
    assert!(state.press(KeyCode::Char('c'), KeyModifiers::CONTROL), "Ctrl-C ends it");
}

#[test]
fn keys_filter() {
    let mut state = three();
    press(&mut state, "/DoW");
    assert_eq!((names(&state).len(), state.filter()), (0, ("DoW", true)), "part of a state is none");
    press(&mut state, "nq");
    assert_eq!(state.filter().0, "DoWnq", "letters are letters while one types");
    state.press(KeyCode::Backspace, KeyModifiers::NONE);
    state.press(KeyCode::Enter, KeyModifiers::NONE);
    assert_eq!((names(&state), state.filter()), (vec!["c"], ("DoWn", false)));
    state.press(KeyCode::Esc, KeyModifiers::NONE);
    assert_eq!(names(&state).len(), 3);
    press(&mut state, "/8472");
    assert_eq!(names(&state).len(), 3);
    state.press(KeyCode::Esc, KeyModifiers::NONE);
    press(&mut state, "/B");
    assert_eq!(names(&state), ["b"]);
    assert!(state.press(KeyCode::Char('c'), KeyModifiers::CONTROL), "while one types, too");
}

#[test]
fn a_pause_holds_everything_and_its_rates_are_of_all_of_it() {
    let mut state = three();
    press(&mut state, "p");
    let more = |second: u64| sample(second, vec![peer("b", "up", None, None, [second * 1_000_000, 0])], &[]);
    state.take(more(3));
    assert_eq!((names(&state).len(), state.is_paused()), (3, true));
    press(&mut state, " ");
    state.take(more(6));
    let rows = state.rows();
    assert_eq!((rows.len(), rows[0].rates.unwrap().rx_bits), (1, (6_000_000.0 - 250_000.0) * 8.0 / 4.0));
}

#[test]
fn a_meshd_that_was_restarted_has_no_rates_at_first() {
    let mut state = three();
    state.away("nobody listens".to_owned());
    assert_eq!(state.is_away(), Some("nobody listens"));
    assert!(state.rows().iter().all(|row| row.rates.is_none()), "what was is not what is");
    assert_eq!((state.rows().len(), state.drops()[0].rate), (3, None));
    let mut anew = sample(9, vec![peer("b", "up", None, None, [10, 10])], &[]);
    anew.stats.uptime_ms = 500;
    state.take(anew);
    assert_eq!((state.is_away(), state.rows()[0].rates, state.rows()[0].trend.len()), (None, None, 0));
    let mut next = sample(10, vec![peer("b", "up", None, None, [20, 10])], &[]);
    next.stats.uptime_ms = 1_500;
    state.take(next);
    assert_eq!(state.rows()[0].rates.unwrap().rx_bits, 80.0);
}

#[test]
fn scrolling_stops_at_both_ends() {
    let mut state = State::default();
    let key = |state: &mut State, code| assert!(!state.press(code, KeyModifiers::NONE));
    assert_eq!(state.scrolled(100, 10), 0);
    key(&mut state, KeyCode::Up);
    assert_eq!(state.scrolled(100, 10), 0);
    key(&mut state, KeyCode::PageDown);
    key(&mut state, KeyCode::Down);
    assert_eq!(state.scrolled(100, 10), 11);
    key(&mut state, KeyCode::End);
    assert_eq!(state.scrolled(100, 10), 90);
    key(&mut state, KeyCode::Up);
    assert_eq!(state.scrolled(100, 10), 89);
    // a larger terminal, fewer peers
    assert_eq!(state.scrolled(20, 30), 0);
    key(&mut state, KeyCode::End);
    key(&mut state, KeyCode::Home);
    assert_eq!(state.scrolled(100, 10), 0);
}

#[test]
fn trends_are_short_and_of_those_who_are_there() {
    let mut state = State::default();
    for second in 1..30 {
        let mut peers = vec![peer("b", "up", None, None, [second * second * 125, 0])];
        if second < 20 {
            peers.push(peer("gone", "up", None, None, [0, 0]));
        }
        state.take(sample(second, peers, &[]));
    }
    let trend = &state.rows()[0].trend;
    assert_eq!((trend.len(), trend[TREND - 1]), (TREND, (29 * 29 - 28 * 28) * 1000));
    assert_eq!(state.trends.len(), 1);
}
