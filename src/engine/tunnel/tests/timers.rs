//! What is due when (whitepaper §6): two nodes through minutes of virtual time.

use super::*;

const SECOND: u64 = 1_000;

/// Gives both nodes the time, ten times a second, up to `until_ms`. Returns which messages node 1 and node 2 sent, and when
/// (in tenths of a second), other peers' left out.
fn pass(pair: &mut Pair, from_ms: u64, until_ms: u64) -> [Vec<(u64, u8, usize)>; 2] {
    let mut said = [Vec::new(), Vec::new()];
    for now in (from_ms..=until_ms).step_by(100) {
        for number in [1, 2] {
            let node = if number == 1 { &mut pair.0 } else { &mut pair.1 };
            let other = address(3 - number).ip();
            let mut under_way: Vec<_> = node.tick(now).into_iter().filter(|sent| sent.to.ip() == other).collect();
            while !under_way.is_empty() {
                let mut answers = Vec::new();
                for sent in under_way {
                    let by = usize::from(sent.from != address(1));
                    said[by].push((now / 100, sent.bytes[0], sent.bytes.len()));
                    let taker = if sent.to == address(1) { &mut pair.0 } else { &mut pair.1 };
                    answers.extend(taker.take(now, &[sent]).1);
                }
                under_way = answers;
            }
        }
    }
    said
}

fn say(pair: &mut Pair, now_ms: u64, from: u8) {
    let packet = udp(from, 3 - from, 100);
    let node = if from == 1 { &mut pair.0 } else { &mut pair.1 };
    let sent = node.send(now_ms, VnetHdr::default(), &packet);
    assert_eq!(pair.carry(now_ms, sent)[usize::from(2 - from)], [packet], "at {now_ms}");
}

fn asked(said: &[(u64, u8, usize)]) -> Vec<u64> {
    said.iter().filter(|(_, kind, _)| *kind == 1).map(|(tenths, ..)| *tenths).collect()
}

#[test]
fn what_comes_is_answered_within_ten_seconds_if_with_nothing() {
    let mut pair = Pair::connected(&ENCRYPTED);
    pass(&mut pair, 0, 30 * SECOND);
    say(&mut pair, 31 * SECOND, 1);
    let said = pass(&mut pair, 31 * SECOND, 60 * SECOND);
    assert_eq!(said[1], [(410, 4, OVERHEAD)], "node 2: one empty packet, after ten seconds");
    assert!(said[0].is_empty(), "node 1: an empty packet is no reason for one");
}

#[test]
fn idle_tunnels_are_silent_and_come_back() {
    let mut pair = Pair::connected(&ENCRYPTED);
    pass(&mut pair, 0, 20 * SECOND);
    let said = pass(&mut pair, 20 * SECOND, 400 * SECOND);
    assert_eq!(said, [vec![], vec![]]);
    assert!(!pair.0.tunnel(2).is_up(0) && !pair.1.tunnel(1).is_up(0), "a session ends after 180 s");
    let packet = udp(2, 1, 9);
    let sent = pair.1.send(401 * SECOND, VnetHdr::default(), &packet);
    assert_eq!(sent[0].bytes[0], 1);
    assert_eq!(pair.carry(401 * SECOND, sent)[0], [packet]);
}

#[test]
fn who_asked_asks_again_after_two_minutes_and_nothing_is_lost() {
    let mut pair = Pair::connected(&ENCRYPTED);
    let mut said = [Vec::new(), Vec::new()];
    for second in 1..600 {
        say(&mut pair, second * SECOND, 1);
        say(&mut pair, second * SECOND + 10, 2);
        let [one, two] = pass(&mut pair, second * SECOND + 50, second * SECOND + 950);
        said[0].extend(asked(&one));
        said[1].extend(asked(&two));
    }
    assert!(said[1].is_empty(), "who was asked does not ask: {said:?}");
    assert_eq!(said[0].len(), 4, "{:?}", said[0]);
    let gaps: Vec<u64> = said[0].windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.iter().all(|gap| (1_200..1_220).contains(gap)), "{gaps:?}");
    assert_eq!((pair.0.drops(), pair.1.drops()), (vec![], vec![]));
}

#[test]
fn who_receives_only_asks_before_the_session_ends() {
    let mut pair = Pair::connected(&ENCRYPTED);
    let mut said = Vec::new();
    // node 1 asked for the session, and hears from node 2 alone; what it answers with is empty
    for second in (1..330).step_by(3) {
        say(&mut pair, second * SECOND, 2);
        let [one, two] = pass(&mut pair, second * SECOND + 50, second * SECOND + 2_950);
        said.extend(asked(&one));
        assert!(asked(&two).is_empty(), "at {second} s");
    }
    assert_eq!(said.len(), 1, "{said:?}");
    assert!((1_650..1_690).contains(&said[0]), "{said:?}");
    assert_eq!((pair.0.drops(), pair.1.drops()), (vec![], vec![]));
}

#[test]
fn who_is_not_answered_asks_after_fifteen_seconds() {
    let mut pair = Pair::connected(&ENCRYPTED);
    pass(&mut pair, 0, 20 * SECOND);
    // what it says is lost
    pair.0.send(21 * SECOND, VnetHdr::default(), &udp(1, 2, 100));
    let said = pass(&mut pair, 21 * SECOND, 60 * SECOND);
    assert_eq!(asked(&said[0]), [360], "and is answered then");
    assert!(pair.0.tunnel(2).is_up(0));
}

#[test]
fn with_a_keepalive_something_crosses_every_so_often() {
    let mut node = Node::new(1, &ENCRYPTED);
    let peer = node.tables.source([10, 9, 0, 2].into()).unwrap();
    let local = node.tables.local().clone();
    let mut specs: Vec<_> = node.tables.peers().iter().map(|peer| peer.spec.clone()).collect();
    let (identity, spec) = (local.identity.clone().unwrap(), &mut specs[peer.0 as usize]);
    let tunnel = Tunnel::new(2, identity, node.tunnel(2).keys(), address(2), Some(25), Policy::Required);
    spec.tunnel = Some(Arc::new(tunnel));
    node.tables = Tables::new(local, specs);
    let mut pair = Pair(node, Node::new(2, &ENCRYPTED));
    pass(&mut pair, 0, SECOND);
    let said = pass(&mut pair, 2 * SECOND, 112 * SECOND);
    let empty = said[0].iter().filter(|(_, kind, len)| (*kind, *len) == (4, OVERHEAD)).count();
    assert_eq!(empty, 4, "{:?}", said[0]);
}
