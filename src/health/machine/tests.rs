use super::*;

use proptest::prelude::*;

const TIMERS: Timers = Timers { interval_us: 150_000, multiplier: 6 };
const MS: u64 = 1_000;

/// Two sessions and what is under way between them, in virtual time.
struct Pair {
    now_us: u64,
    sides: [Side; 2],
    wire: Vec<(u64, usize, Control)>,
    random: u64,
    loss_permille: u64,
    delay_us: u64,
    /// From the side of that number nothing comes through.
    mute: [bool; 2],
}

struct Side {
    session: Session,
    events: Vec<(u64, Happened)>,
    round_trips: Vec<u32>,
    sent: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Happened {
    Up,
    Dead,
    Told(Diagnostic),
    AdminDown,
}

impl Pair {
    fn new(seed: u64) -> Self {
        let side = |discriminator| {
            let mut session = Session::new(TIMERS, discriminator);
            session.start(0);
            Side { session, events: Vec::new(), round_trips: Vec::new(), sent: 0 }
        };
        let sides = [side(seed as u32 | 1), side((seed >> 32) as u32 | 2)];
        let random = seed | 1;
        Pair { now_us: 0, sides, wire: Vec::new(), random, loss_permille: 0, delay_us: 200, mute: [false; 2] }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 11
    }

    fn run(&mut self, for_us: u64) {
        let end = self.now_us + for_us;
        loop {
            let timers = self.sides.iter().map(|side| side.session.next_deadline());
            let next = timers.chain(self.wire.iter().map(|(at, ..)| *at)).min().unwrap().max(self.now_us);
            if next > end {
                self.now_us = end;
                return;
            }
            self.now_us = next;
            let mut due = Vec::new();
            self.wire.retain(|letter| {
                letter.0 > next || {
                    due.push(*letter);
                    false
                }
            });
            for (_, to, packet) in due {
                let side = &mut self.sides[to];
                assert!(side.session.admits(next, &packet), "what is lost closes no window");
                let outcome = side.session.receive(next, &packet);
                side.round_trips.extend(outcome.round_trip_us);
                let happened = match outcome.event {
                    Event::Up => Happened::Up,
                    Event::Down { diagnostic, .. } => Happened::Told(diagnostic),
                    Event::AdminDown => Happened::AdminDown,
                    Event::Nothing | Event::Stray => continue,
                };
                side.events.push((next, happened));
            }
            for from in 0..2 {
                if self.sides[from].session.expire(next) {
                    self.sides[from].events.push((next, Happened::Dead));
                }
                while let Some(packet) = self.sides[from].session.send(next) {
                    self.sides[from].sent += 1;
                    let lost = self.random() % 1000 < self.loss_permille;
                    if !lost && !self.mute[from] {
                        self.wire.push((next + self.delay_us, 1 - from, packet));
                    }
                }
            }
        }
    }

    fn states(&self) -> [State; 2] {
        [self.sides[0].session.state(), self.sides[1].session.state()]
    }

    fn forget(&mut self) {
        self.sides.iter_mut().for_each(|side| side.events.clear());
    }
}

fn packet(state: State) -> Control {
    Control {
        diagnostic: Diagnostic::NONE,
        state,
        poll: false,
        last: false,
        demand: false,
        multiplier: 6,
        mine: 9,
        yours: 7,
        desired_tx_us: 150_000,
        required_rx_us: 150_000,
        required_echo_rx_us: 0,
        sequence: None,
    }
}

/// RFC 5880 §6.8.7 with §6.8.3: the interval changes as the session comes up, which is said by a poll sequence until it is
/// answered, also to who wants no periodic packets.
#[test]
fn who_wants_no_periodic_packets_is_polled_all_the_same() {
    let mut session = Session::new(TIMERS, 7);
    session.start(0);
    assert!(session.send(0).is_some_and(|first| !first.poll));
    let demand = |state| Control { demand: true, ..packet(state) };
    session.receive(10 * MS, &Control { yours: 0, ..packet(State::Down) });
    assert_eq!(session.send(10 * MS).map(|sent| sent.state), Some(State::Init));
    assert_eq!(session.receive(20 * MS, &demand(State::Up)).event, Event::Up);
    assert_eq!(session.send(20 * MS).map(|sent| (sent.state, sent.poll, sent.demand)), Some((State::Up, true, false)));
    assert_eq!(session.send(180 * MS).map(|sent| sent.poll), Some(true), "until it is answered");
    session.receive(181 * MS, &Control { last: true, ..demand(State::Up) });
    assert!((181..700).all(|ms| session.send(ms * MS).is_none()), "and then nothing");
    // positive control: without the demand bit packets go on
    session.receive(700 * MS, &packet(State::Up));
    assert!((700..900).any(|ms| session.send(ms * MS).is_some()));
}

fn session_in(state: State) -> Session {
    let mut session = Session::new(TIMERS, 7);
    session.start(0);
    match state {
        State::AdminDown => session.stop(0),
        State::Down => {}
        State::Init => _ = session.receive(0, &packet(State::Down)),
        State::Up => _ = session.receive(0, &packet(State::Init)),
    }
    assert_eq!(session.state(), state);
    session
}

#[test]
fn every_arrow_of_the_diagram() {
    use State::{AdminDown, Down, Init, Up};
    let table = [
        (Down, [(AdminDown, Down), (Down, Init), (Init, Up), (Up, Down)]),
        (Init, [(AdminDown, Down), (Down, Init), (Init, Up), (Up, Up)]),
        (Up, [(AdminDown, Down), (Down, Down), (Init, Up), (Up, Up)]),
        (AdminDown, [(AdminDown, AdminDown), (Down, AdminDown), (Init, AdminDown), (Up, AdminDown)]),
    ];
    for (from, arrows) in table {
        for (heard, to) in arrows {
            let mut session = session_in(from);
            session.receive(10, &packet(heard));
            assert_eq!(session.state(), to, "{from:?} hears {heard:?}");
        }
    }
    for (from, up) in [(Init, false), (Up, true)] {
        let mut session = session_in(from);
        assert!(!session.expire(899_999));
        assert_eq!(session.expire(900_000), up);
        assert_eq!((session.state(), session.diagnostic), (Down, Diagnostic::EXPIRED));
    }
}

#[test]
fn the_detection_time_is_the_others_multiplier_and_the_longer_interval() {
    let mut session = session_in(State::Up);
    session.receive(0, &Control { multiplier: 3, desired_tx_us: 50_000, ..packet(State::Up) });
    assert_eq!(session.expires(), Some(450_000));
    session.receive(0, &Control { multiplier: 3, desired_tx_us: 400_000, ..packet(State::Up) });
    assert_eq!(session.expires(), Some(1_200_000));
}

#[test]
fn packets_are_slow_until_the_session_is_up_and_jittered() {
    let count = |session: &mut Session, until_us: u64| {
        let mut gaps = Vec::new();
        let (mut now, mut last) = (0, None);
        while now <= until_us {
            while session.send(now).is_some() {
                gaps.extend(last.map(|last| now - last));
                last = Some(now);
            }
            now += MS;
        }
        gaps
    };
    let slow = count(&mut session_in(State::Down), 20_000_000);
    assert!(slow.iter().all(|gap| (750_000..=1_001_000).contains(gap)), "{slow:?}");
    let mut up = session_in(State::Up);
    let fast = count(&mut up, 20_000_000);
    assert!(fast.iter().all(|gap| (112_000..=151_000).contains(gap)), "{fast:?}");
    assert!(fast.iter().any(|gap| *gap < 120_000) && fast.iter().any(|gap| *gap > 140_000), "{fast:?}");
    up.receive(0, &Control { required_rx_us: 300_000, ..packet(State::Up) });
    let asked = count(&mut up, 20_000_000);
    assert!(asked.iter().skip(1).all(|gap| *gap >= 225_000), "{asked:?}");
    up.receive(0, &Control { required_rx_us: 0, ..packet(State::Up) });
    assert!(count(&mut up, 5_000_000).len() <= 1, "it wants none");
}

#[test]
fn a_poll_is_answered_at_once_and_once() {
    let mut session = session_in(State::Up);
    while session.send(1).is_some() {}
    session.receive(2, &Control { poll: true, ..packet(State::Up) });
    assert!(session.next_deadline() <= 2);
    let answer = session.send(2).unwrap();
    assert!(answer.last && !answer.poll);
    assert_eq!(session.send(2), None);
}

#[test]
fn polls_measure_the_round_trip_once_a_second() {
    let mut pair = Pair::new(5);
    pair.delay_us = 2_500;
    pair.run(30_000 * MS);
    for side in &pair.sides {
        assert!((20..=31).contains(&side.round_trips.len()), "{}", side.round_trips.len());
        assert!(side.round_trips.iter().all(|took| *took == 5_000), "{:?}", side.round_trips);
    }
}

#[test]
fn an_answer_that_may_belong_to_either_of_two_polls_measures_nothing() {
    let mut session = session_in(State::Up);
    while !session.send(0).is_some_and(|packet| packet.poll) {}
    let again = session.next_deadline();
    assert!(session.send(again).unwrap().poll, "it goes on until it is answered");
    let answer = Control { last: true, ..packet(State::Up) };
    assert_eq!(session.receive(again + 10, &answer).round_trip_us, None);
}

#[test]
fn a_stray_packet_changes_nothing() {
    let mut session = session_in(State::Up);
    let stray = Control { yours: 8, ..packet(State::Down) };
    assert_eq!(session.receive(5, &stray).event, Event::Stray);
    assert_eq!((session.state(), session.expires()), (State::Up, Some(900_000)));
}

#[test]
fn other_packets_are_signs_of_life_while_it_is_up() {
    let mut session = session_in(State::Up);
    session.sign_of_life(500_000);
    assert_eq!(session.expires(), Some(1_400_000));
    let mut init = session_in(State::Init);
    init.sign_of_life(500_000);
    assert_eq!(init.expires(), Some(900_000));
}

#[test]
fn who_stops_is_no_dead_node() {
    let mut pair = Pair::new(77);
    pair.run(3_000 * MS);
    assert_eq!(pair.states(), [State::Up; 2]);
    pair.forget();
    let now = pair.now_us;
    pair.sides[0].session.stop(now);
    let sent = pair.sides[0].sent;
    pair.run(5_000 * MS);
    assert_eq!(pair.states(), [State::AdminDown, State::Down]);
    assert!(pair.sides[1].events.iter().all(|(_, event)| *event == Happened::AdminDown), "{:?}", pair.sides[1].events);
    assert_eq!(pair.sides[0].sent - sent, 1, "it says so once");
    let now = pair.now_us;
    pair.sides[0].session.start(now);
    pair.run(1_500 * MS);
    assert_eq!(pair.states(), [State::Up; 2]);
}

#[test]
fn one_way_silence_is_told_by_who_notices_it() {
    let mut pair = Pair::new(11);
    pair.run(3_000 * MS);
    pair.forget();
    pair.mute[0] = true;
    pair.run(1_100 * MS);
    assert_eq!(pair.sides[1].events[0].1, Happened::Dead);
    assert_eq!(pair.sides[0].events[0].1, Happened::Told(Diagnostic::EXPIRED), "before its own time is up");
}

#[test]
fn a_session_that_flaps_is_given_more_time() {
    let mut pair = Pair::new(3);
    let mut took = Vec::new();
    for _ in 0..4 {
        pair.mute = [false; 2];
        pair.run(4_000 * MS);
        assert_eq!(pair.states(), [State::Up; 2]);
        pair.forget();
        let cut = pair.now_us;
        pair.mute = [true; 2];
        pair.run(3_000 * MS);
        took.push((pair.sides[0].events[0].0 - cut) / MS);
    }
    assert!(took[..3].iter().all(|ms| *ms <= 900), "{took:?}");
    assert!((1_000..=1_800).contains(&took[3]), "{took:?}");
    pair.mute = [false; 2];
    pair.run(80_000 * MS);
    pair.forget();
    let cut = pair.now_us;
    pair.mute = [true; 2];
    pair.run(3_000 * MS);
    assert!(pair.sides[0].events[0].0 - cut <= 900 * MS, "after a quiet minute as before");
}

#[test]
fn who_is_killed_and_started_again_does_not_flap() {
    let mut pair = Pair::new(3);
    for number in 0..6 {
        pair.mute = [false; 2];
        pair.run(4_000 * MS);
        pair.forget();
        let cut = pair.now_us;
        pair.mute = [true; 2];
        pair.run(3_000 * MS);
        assert!(pair.sides[0].events[0].0 - cut <= 900 * MS, "{number}");
        pair.sides[1].session = Session::new(TIMERS, 1_000 + number);
        pair.sides[1].session.start(pair.now_us);
    }
}

#[test]
fn no_false_death_at_two_percent_of_loss_in_six_hours() {
    let mut pair = Pair::new(0x1234_5678_9abc_def1);
    pair.run(10_000 * MS);
    assert_eq!(pair.states(), [State::Up; 2]);
    pair.forget();
    pair.loss_permille = 20;
    // two times 165,000 windows of six packets, each lost with 6.4e-11
    pair.run(6 * 3_600_000 * MS);
    assert!(pair.sides.iter().all(|side| side.events.is_empty()), "{:?}", pair.sides[0].events);
}

fn numbered(number: u32, meticulous: bool) -> Control {
    Control { sequence: Some(Sequence { number, meticulous }), ..packet(State::Up) }
}

#[test]
fn a_number_is_taken_once_and_within_its_window() {
    let mut session = session_in(State::Up);
    assert!(session.admits(0, &numbered(u32::MAX - 3, true)), "the first one says where they are");
    for (number, taken) in [
        (u32::MAX - 3, false),
        (u32::MAX - 4, false),
        (u32::MAX - 2, true),
        (u32::MAX - 2, false),
        (15, true), // 18 ahead, past the end of the circle
        (34, false),
        (14, false),
        (33, true),
    ] {
        assert_eq!(session.admits(1, &numbered(number, true)), taken, "{number}");
    }
    // Keyed SHA1 need not count each packet
    for (number, taken) in [(33, true), (33, true), (32, false), (51, true), (70, false)] {
        assert_eq!(session.admits(2, &numbered(number, false)), taken, "{number}");
    }
    assert!(!session.send(200_000).unwrap().sequence.unwrap().meticulous, "and is answered in kind");
    assert!(!session.admits(3, &numbered(51, true)), "a meticulous one does");
    let unnumbered = packet(State::Up);
    assert!(session.admits(3, &unnumbered), "whoever read it agreed to that");
}

#[test]
fn a_number_is_forgotten_after_twice_the_detection_time() {
    let mut session = session_in(State::Up);
    session.receive(0, &packet(State::Up));
    assert!(session.admits(0, &numbered(1_000, true)));
    assert!(!session.admits(1_799_999, &numbered(7, true)));
    assert!(session.admits(1_800_000, &numbered(7, true)));
}

#[test]
fn a_new_run_is_ahead_and_its_former_packets_are_behind() {
    let mut session = session_in(State::Up);
    let run = |number, mine, yours| Control { mine, yours, ..numbered(number, true) };
    assert!(session.admits(0, &run(1_000, 9, 7)));
    assert!(!session.admits(1, &run(990, 8, 0)), "a replay of the run before");
    assert!(!session.admits(1, &run(5_000, 9, 7)), "this run is not so far");
    assert!(session.admits(1, &run(5_000, 10, 0)), "started anew");
    assert!(!session.admits(2, &run(1_001, 9, 7)), "a replay again");
    assert!(session.admits(2, &run(5_001, 10, 7)));
    assert!(session.admits(3, &run(5_010, 10, 6)), "for another session of ours");
    assert!(session.admits(3, &run(5_002, 10, 7)), "which moves nothing");
}

#[test]
fn numbers_follow_the_clock_over_a_restart_and_each_packet_within_a_run() {
    let first = |session: &mut Session, now_us| session.send(now_us).unwrap().sequence.unwrap();
    let mut session = Session::new(TIMERS, 7).numbered_from(1_000);
    session.start(10_000_000);
    assert_eq!(first(&mut session, 10_000_000), Sequence { number: 1_320, meticulous: true });
    assert_eq!(first(&mut session, 12_000_000).number, 1_321);
    let most = Timers { interval_us: 50_000, multiplier: 3 };
    let mut session = Session::new(most, 7).numbered_from(0);
    session.start(0);
    session.receive(0, &Control { required_rx_us: 50_000, ..packet(State::Init) });
    let mut last = 0;
    for now_us in (0..3_600_000_000).step_by(1_000) {
        while let Some(packet) = session.send(now_us) {
            last = packet.sequence.unwrap().number;
        }
    }
    assert!(last > 3_600 * 20 && last < 3_600 * NUMBERS_A_SECOND, "{last}: a later start is always ahead");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn two_sessions_find_each_other_on_a_bad_network(seed: u64, loss in 0u64..300, delay in 1u64..40_000) {
        let mut pair = Pair::new(seed);
        (pair.loss_permille, pair.delay_us) = (loss, delay);
        pair.run(30_000 * MS);
        pair.loss_permille = 0;
        pair.run(4_000 * MS);
        prop_assert_eq!(pair.states(), [State::Up; 2]);
    }

    #[test]
    fn a_death_is_noticed_within_the_detection_time(seed: u64, after in 2_000u64..9_000) {
        let mut pair = Pair::new(seed);
        pair.run(after * MS);
        prop_assert_eq!(pair.states(), [State::Up; 2]);
        pair.forget();
        let cut = pair.now_us;
        pair.mute = [true; 2];
        pair.run(1_000 * MS);
        for side in &pair.sides {
            let (at, event) = side.events[0];
            prop_assert_eq!(event, Happened::Dead);
            prop_assert!(at - cut <= 900 * MS + pair.delay_us && at - cut >= 700 * MS, "{}", at - cut);
        }
        pair.mute = [false; 2];
        pair.run(1_100 * MS);
        prop_assert_eq!(pair.states(), [State::Up; 2], "up again on the first good round");
    }

    #[test]
    fn any_sequence_of_packets_leaves_timers_that_go_on(
        packets in proptest::collection::vec((0u8..4, any::<(bool, bool, bool)>(), any::<(u8, u32, u32)>(), 0u64..3_000_000), 1..60)
    ) {
        let mut session = Session::new(TIMERS, 7);
        session.start(0);
        let mut now = 0;
        for (state, (poll, last, demand), (multiplier, tx, rx), wait) in packets {
            now += wait;
            let state = [State::AdminDown, State::Down, State::Init, State::Up][usize::from(state)];
            let heard = Control { poll, last, demand, multiplier: multiplier.max(1), desired_tx_us: tx, required_rx_us: rx, ..packet(state) };
            session.receive(now, &heard);
            session.expire(now);
            let sent = std::iter::from_fn(|| session.send(now)).take(10).count();
            prop_assert!(sent <= 2, "one answer and one periodic packet");
            prop_assert!(session.next_deadline() > now);
        }
    }
}
