use super::*;

const MS: u64 = 1_000;
const BOUNDS: Bounds = Bounds { min: 526, base: 1230, max: 1450, overhead: 50 };

/// A path that takes so many bytes and is silent about the rest, with a round trip of a millisecond.
struct Lab {
    path: PathMtu,
    bounds: Bounds,
    takes: u16,
    /// Nothing arrives at all.
    dead: bool,
    /// Of each hundred probes so many are lost, by a fixed sequence.
    lost: u32,
    able: bool,
    bytes: u64,
    now: u64,
    probes: Vec<u16>,
    random: u32,
}

impl Lab {
    fn new(takes: u16) -> Self {
        let path = PathMtu::new(7);
        let (probes, bytes, random) = (Vec::new(), 0, 1);
        Lab { path, bounds: BOUNDS, takes, dead: false, lost: 0, able: true, bytes, now: 1_000 * MS, probes, random }
    }

    /// Lets so many milliseconds pass, in each of which packets of the largest size are sent where `busy`.
    fn run(&mut self, ms: u64, busy: bool) -> &mut Self {
        for _ in 0..ms {
            self.now += MS;
            self.bytes += if busy { u64::from(self.bounds.max) } else { 0 };
            let heard_us = if self.dead { 0 } else { self.now };
            let now = Circumstances { bounds: self.bounds, able: self.able, round_trip_us: 1_000, heard_us };
            let bytes = self.bytes;
            if let Some(ask) = self.path.turn(self.now, now, || bytes) {
                self.probes.push(ask.size);
                self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if ask.size <= self.takes && !self.dead && (self.random >> 8) % 100 >= self.lost {
                    assert!(self.path.answered(self.now + MS / 2, ask.number, ask.size));
                }
            }
            let limit = self.path.limit().unwrap_or(self.bounds.max);
            assert!((self.bounds.min..=self.bounds.max).contains(&limit));
        }
        self
    }

    fn found(&self) -> (State, Option<u16>) {
        (self.path.state(), self.path.limit())
    }

    /// Until no longer packet than the path takes is sent.
    fn heals(&mut self) -> u64 {
        let start = self.now;
        while self.path.limit().unwrap_or(self.bounds.max) > self.takes {
            self.run(1, true);
            assert!(self.now < start + 10_000 * MS, "{:?}", self.path);
        }
        (self.now - start) / MS
    }
}

#[test]
fn what_fits_from_the_beginning_costs_one_probe() {
    let mut lab = Lab::new(1450);
    lab.run(10_000, false);
    assert_eq!((lab.found(), lab.probes.as_slice()), ((State::SearchComplete, Some(1450)), &[1450][..]));
    assert_eq!(lab.path.black_holes(), 0);
}

#[test]
fn traffic_is_watched_and_silence_is_not() {
    let mut lab = Lab::new(1450);
    lab.run(1_000, false).run(10_000, true);
    assert!((22..=30).contains(&lab.probes.len()), "some times a second: {}", lab.probes.len());
    let before = lab.probes.len();
    lab.run(60_000, false);
    assert!(lab.probes.len() <= before + 1);
}

#[test]
fn any_path_is_found_to_the_byte() {
    for takes in (1230..1450).chain([1449]) {
        let mut lab = Lab::new(takes);
        lab.run(6_000, true);
        assert_eq!(lab.found(), (State::SearchComplete, Some(takes)), "{:?}", lab.probes);
    }
    for takes in [1500, 8949, 8950, 20_000, 65_000] {
        let mut lab = Lab::new(takes);
        lab.bounds = Bounds::new(50, 65_485, false);
        lab.run(20_000, true);
        assert_eq!(lab.found(), (State::SearchComplete, Some(takes)), "{:?}", lab.probes);
    }
}

#[test]
fn a_black_hole_is_left_within_what_tcp_bears() {
    for takes in [1230, 1300, 1449, 600] {
        let mut lab = Lab::new(1450);
        lab.run(3_000, true);
        lab.takes = takes;
        let took = lab.heals();
        assert!(took <= if takes >= 1230 { 1_000 } else { 1_600 }, "{takes}: {took} ms");
        assert_eq!(lab.path.black_holes(), 1);
        lab.takes = 1450;
        lab.run(15_000, true);
        assert_eq!(lab.found(), (State::SearchComplete, Some(1450)), "and back");
    }
}

#[test]
fn less_than_the_base_size_is_an_error_that_ends() {
    let mut lab = Lab::new(1450);
    lab.run(3_000, true);
    lab.takes = 1000;
    lab.run(10_000, true);
    assert_eq!(lab.found(), (State::Error, Some(526)));
    lab.takes = 1300;
    lab.run(10_000, true);
    assert_eq!(lab.found(), (State::SearchComplete, Some(1300)));
}

#[test]
fn what_was_said_is_tried_at_once_and_never_trusted() {
    let mut lab = Lab::new(1450);
    lab.run(3_000, true);
    for _ in 0..100 {
        lab.path.hint(lab.now, 600);
        lab.run(10, true);
        assert_eq!(lab.path.limit(), Some(1450), "a lie");
    }
    lab.run(450, true);
    lab.takes = 1400;
    let before = lab.probes.len();
    lab.path.hint(lab.now, 1400);
    let told = lab.heals();
    lab.run(3_000, true);
    assert_eq!(lab.found(), (State::SearchComplete, Some(1400)));
    assert!(told < 1_000, "{told}");
    let sizes: Vec<_> = lab.probes[before..].iter().filter(|size| ![1450, 1400].contains(*size)).copied().collect();
    assert_eq!(sizes[..2], [1230, 1401], "no search: {sizes:?}");
}

#[test]
fn a_peer_that_answers_no_probe_keeps_what_follows_from_the_link() {
    let mut lab = Lab::new(0);
    lab.run(60_000, true);
    assert_eq!((lab.path.limit(), lab.path.black_holes()), (None, 0));
    assert!(lab.probes.len() <= 8, "{:?}", lab.probes);
}

#[test]
fn an_outage_says_nothing_about_sizes() {
    let mut lab = Lab::new(1450);
    lab.run(3_000, true);
    lab.dead = true;
    lab.run(20_000, true);
    assert_eq!(lab.path.limit(), Some(1450));
    lab.dead = false;
    lab.run(3_000, true);
    assert_eq!((lab.found(), lab.path.black_holes()), ((State::SearchComplete, Some(1450)), 0));
}

#[test]
fn loss_is_no_black_hole() {
    let mut lab = Lab::new(1450);
    lab.lost = 2;
    lab.run(600_000, true);
    assert_eq!((lab.path.limit(), lab.path.black_holes()), (Some(1450), 0));
}

#[test]
fn without_a_session_the_result_is_kept_for_a_while() {
    let mut lab = Lab::new(1400);
    lab.run(6_000, true);
    lab.able = false;
    lab.run(599_000, true);
    assert_eq!(lab.found(), (State::Disabled, Some(1400)));
    lab.able = true;
    lab.run(1_000, true);
    assert_eq!(lab.path.black_holes(), 0, "it began with what it knew");
    lab.able = false;
    lab.run(601_000, true);
    assert_eq!(lab.path.limit(), None);
}

#[test]
fn another_link_or_another_encapsulation_begins_with_what_is_known() {
    let mut lab = Lab::new(1400);
    lab.run(6_000, true);
    lab.bounds = Bounds::new(60, 1440, false);
    lab.takes = 1390;
    lab.run(1, true);
    assert_eq!(lab.path.limit(), Some(1390));
    lab.bounds = Bounds::new(60, 8940, false);
    lab.takes = 8940;
    lab.run(2_000, true);
    assert_eq!(lab.found(), (State::SearchComplete, Some(8940)), "a jumbo link, found at once: {:?}", lab.probes);
    lab.bounds = Bounds::new(60, 1000, false);
    lab.run(1, true);
    assert_eq!(lab.path.limit(), Some(1000));
}

#[test]
fn an_answer_that_nobody_asked_for_is_none() {
    let mut lab = Lab::new(1450);
    assert!(!lab.path.answered(0, 0, 9000));
    lab.takes = 0;
    lab.run(1, true);
    let number = lab.path.numbers;
    for wrong in [number.wrapping_sub(1), number + 1, 0] {
        assert!(!lab.path.answered(lab.now, wrong, 1450));
    }
    assert!(!lab.path.answered(lab.now, number, 1449), "less arrived than was sent");
    assert!(lab.path.answered(lab.now, number, 1450));
    assert!(!lab.path.answered(lab.now, number, 1450), "once");
}

proptest::proptest! {
    #[test]
    fn whatever_the_path_does_sizes_stay_within_bounds(steps in proptest::collection::vec((0u16..2000, 1u64..3_000, proptest::prelude::any::<[bool; 3]>(), 0u16..3000), 1..20)) {
        let mut lab = Lab::new(1450);
        for (takes, ms, [able, dead, busy], hint) in steps {
            (lab.takes, lab.able, lab.dead, lab.lost) = (takes, able, dead, u32::from(hint % 20));
            lab.path.hint(lab.now, hint);
            lab.run(ms, busy);
            let probes_a_second = lab.probes.len() as u64 * 1_000 / ms.max(1_000);
            assert!(probes_a_second <= 60, "{probes_a_second}");
            lab.probes.clear();
        }
    }
}
