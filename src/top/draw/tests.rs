use super::*;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyModifiers};

use crate::top::state::tests::{peer, sample, three};

fn drawn(state: &mut State, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, state, true)).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    (0..height).map(line).collect()
}

#[test]
fn all_of_it_on_80_by_24() {
    let lines = drawn(&mut three(), 80, 24);
    let expected = [
        "one  meshd 1.2.3, up 1m 2s, io mmsg, 2 workers",
        "SIDE    RX pkt/s  RX bit/s  TX pkt/s  TX bit/s   RX in all   TX in all",
        "tun        10.0k      8.0M         0         0     1.9 MiB         0 B",
        "udp        20.0k     16.0M         0         0     3.8 MiB         0 B",
        "DROPS                           PACKETS    pkt/s MEANING",
    ];
    assert_eq!(lines[..5], expected);
    assert!(lines[5].starts_with("peer_down                             6        3 "), "{lines:#?}");
    assert!(lines[6].starts_with("no_route                              5        0 "), "{lines:#?}");
    let peers = [
        "▲NAME     STATE        RTT    LOSS   MTU  RX pkt/s  RX bit/s  TX pkt/s  TX bit/s",
        "a         unknown        -       -  1450         0         0         0         0",
        "b         up        900 µs   1.6 %  1450      1.2k      1.0M         0         0",
        "c         down      400 µs       -  1450         0         0     12.5k     10.0M",
    ];
    assert_eq!(lines[7..11], peers);
    assert_eq!(lines[23], "3 peers, 1 down, 1 unknown  q quit  n/r/t/d/l sort  / filter  p pause  ? help");
}

#[test]
fn any_size_will_do() {
    let mut state = three();
    for (width, height) in [(1, 1), (10, 3), (40, 10), (79, 24), (93, 24), (400, 120)] {
        drawn(&mut state, width, height);
        state.press(KeyCode::Char('?'), KeyModifiers::NONE);
        drawn(&mut state, width, height);
        state.press(KeyCode::Esc, KeyModifiers::NONE);
    }
    let titles = |lines: Vec<String>| lines.iter().filter(|line| line.contains("RX pkt/s")).count();
    assert_eq!((titles(drawn(&mut state, 60, 24)), titles(drawn(&mut state, 80, 24))), (1, 2), "less on a narrow one");
    let wide = drawn(&mut state, 120, 24).join("\n");
    assert!(wide.contains("TREND") && wide.contains('█'), "{wide}");
}

#[test]
fn a_thousand_peers_scroll() {
    let peers = |second: u64| (0..1000).map(|n| peer(&format!("n{n:03}"), "up", None, None, [second * n, 0])).collect();
    let mut state = State::default();
    state.take(sample(1, peers(1), &[]));
    state.take(sample(2, peers(2), &[]));
    let lines = drawn(&mut state, 80, 24);
    assert!(lines[7].starts_with("n000") && lines[22].starts_with("n015"), "{lines:#?}");
    assert!(lines[23].starts_with("1,000 peers  q quit"), "{lines:#?}");
    state.press(KeyCode::End, KeyModifiers::NONE);
    assert!(drawn(&mut state, 80, 24)[22].starts_with("n999"));
    state.press(KeyCode::Char('r'), KeyModifiers::NONE);
    let lines = drawn(&mut state, 80, 24);
    assert!(lines[6].contains("▼RX bit/s") && lines[7].starts_with("n999"), "{lines:#?}");
}

#[test]
fn what_a_person_has_to_know_stands_there() {
    let mut state = three();
    state.press(KeyCode::Char('p'), KeyModifiers::NONE);
    assert!(drawn(&mut state, 80, 24)[0].ends_with("PAUSED"));
    state.press(KeyCode::Char('p'), KeyModifiers::NONE);
    state.away("nobody listens on /run/meshd/meshd.sock".to_owned());
    let lines = drawn(&mut state, 80, 24);
    assert_eq!(lines[0], "one: AWAY nobody listens on /run/meshd/meshd.sock");
    assert!(lines[9].ends_with("-         -         -         -"), "{lines:#?}");
    state.press(KeyCode::Char('/'), KeyModifiers::NONE);
    state.press(KeyCode::Char('x'), KeyModifiers::NONE);
    let lines = drawn(&mut state, 80, 24);
    assert_eq!((lines[8].as_str(), lines[23].as_str()), ("No peer has that in it; Esc shows all.", "filter: x█"));
    state.press(KeyCode::Esc, KeyModifiers::NONE);
    state.press(KeyCode::Char('?'), KeyModifiers::NONE);
    let help = drawn(&mut state, 80, 24).join("\n");
    assert!(help.contains("order by name") && help.contains("Keys"), "{help}");
    let mut none = State::default();
    none.take(sample(1, Vec::new(), &[]));
    let lines = drawn(&mut none, 80, 24);
    assert!(lines[5] == "none" && lines[7].starts_with("No peers:"), "{lines:#?}");
}

#[test]
fn names_with_commands_for_the_terminal_are_harmless() {
    let mut state = State::default();
    state.take(sample(1, vec![peer("a\u{1b}[2Jb\n", "up", None, None, [0, 0])], &[("x\u{1b}]0;y\u{7}", 3)]));
    let text = drawn(&mut state, 80, 24).join("");
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
