//! Who is dead, over a network that loses, delays and reorders: the production engines, watch and state machines of whole
//! nodes in virtual time. `SIM_HOURS=N` makes the quiet hour longer.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd::config::{Config, Sources};
use meshd::control::known::Known;
use meshd::control::nodes_file;
use meshd::control::plan::{Carrier, plan};
use meshd::engine::coalesce::Accepts;
use meshd::engine::drop::Drop;
use meshd::engine::inbound::{Inbound, Received};
use meshd::engine::stats::Stats;
use meshd::engine::tables::{PeerIndex, Tables};
use meshd::engine::tunnel::Outbox;
use meshd::engine::vigil::Vigil;
use meshd::health::machine::Timers;
use meshd::health::peer::{Settings, Verdict};
use meshd::wire::bfd::auth::Keys;

use crate::reference::Rng;

const MS: u64 = 1_000;
const SECOND: u64 = 1_000 * MS;
/// What 6 × 150 ms promise: the last packet may have left just before the death.
const DETECTION: u64 = 900 * MS;
/// Latency of the network, and the watch's turns, which are together.
const SLACK: u64 = 45 * MS;

struct Node {
    tables: Tables,
    stats: Stats,
    vigil: Vigil,
    inbound: Inbound,
    outbox: Outbox,
    alive: bool,
    /// What it thought of each other one when it was looked at last.
    thought: Vec<Verdict>,
}

/// When it arrives, its number, from whom, to whom, and what it is.
type Letter = (u64, u64, usize, usize, Vec<u8>);

struct World {
    now_us: u64,
    rng: Rng,
    keys: Option<Arc<Keys>>,
    nodes: Vec<Node>,
    started: u32,
    wire: BinaryHeap<Reverse<Letter>>,
    loss_permille: u32,
    /// Nothing gets from the first to the second.
    cut: Vec<(usize, usize)>,
    sent: u64,
    lost: u64,
    delivered: u64,
    /// When who held whom for dead.
    deaths: Vec<(u64, usize, usize)>,
}

fn underlay(node: usize) -> IpAddr {
    [10, 9, 0, node as u8 + 1].into()
}

impl World {
    fn new(seed: u64, nodes: usize, keys: Option<&str>) -> Self {
        let keys = keys.map(|text| Arc::new(Keys::parse(text).unwrap()));
        let mut world = World {
            now_us: SECOND,
            rng: Rng(seed),
            keys,
            nodes: Vec::new(),
            started: 0,
            wire: BinaryHeap::new(),
            loss_permille: 0,
            cut: Vec::new(),
            sent: 0,
            lost: 0,
            delivered: 0,
            deaths: Vec::new(),
        };
        world.nodes = (0..nodes).map(|number| world.born(number, nodes)).collect();
        world
    }

    /// A node as the daemon makes it, with discriminators that no former run had.
    fn born(&mut self, number: usize, of: usize) -> Node {
        self.started += 1;
        let entry = |n| format!("  - {{name: n{n:02}, underlay: {}, subnets: [10.42.{n}.0/24]}}\n", underlay(n));
        let text = format!("nodes:\n{}", (0..of).map(entry).collect::<String>());
        let file = Some(("sim.yaml".into(), format!("node-name: n{number:02}\n").into_bytes()));
        let config = Config::parse(&Sources { file, ..Sources::default() }).unwrap();
        let list = nodes_file::parse(text.as_bytes(), config.port).unwrap();
        let own = list.get(&config.node_name).unwrap().clone();
        let bfd = config.bfd;
        let timers = Timers { interval_us: u32::from(bfd.interval_ms) * 1000, multiplier: bfd.multiplier };
        // the process's clock begins at 0 with the world, so that its epoch is the same for all runs
        let settings = Settings { enabled: bfd.enabled, timers, vni: bfd.vni.get(), epoch: 0 };
        let mut known = Known::new(1, None).watching(settings, self.rng.next() as u32);
        known.set_bfd_keys(self.keys.clone());
        let carrier = Carrier { ip: underlay(number), mtu: 1500 };
        let plan = plan(&config, &list, &own, &[carrier], &mut known).unwrap();
        let stats = Stats::new(1);
        Node {
            tables: Tables::new(plan.local, plan.peers),
            vigil: Vigil::new(0, 1, 1),
            inbound: Inbound::new(stats.clone(), 0, Accepts { tso: true, uso: true }).with_data_socket(8),
            stats,
            outbox: Outbox::default(),
            alive: true,
            thought: vec![Verdict::Unknown; of],
        }
    }

    fn peer(&self, of: usize, other: usize) -> PeerIndex {
        self.nodes[of].tables.source(underlay(other)).unwrap()
    }

    fn verdict(&self, of: usize, other: usize) -> Verdict {
        self.nodes[of].tables.liveness(self.peer(of, other)).unwrap().verdict()
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node].alive = false;
    }

    fn revive(&mut self, node: usize) {
        self.nodes[node] = self.born(node, self.nodes.len());
    }

    fn run(&mut self, for_us: u64) {
        let end = self.now_us + for_us;
        while self.now_us < end {
            // an idle worker sleeps for a second at most; in between it looks for traffic whenever it is awake
            let turns = self.nodes.iter().filter(|node| node.alive).map(|node| node.vigil.next_turn_us());
            let arrival = self.wire.peek().map(|Reverse((at, ..))| *at);
            let next = turns.chain(arrival).chain([self.now_us + SECOND, end]).min().unwrap();
            self.now_us = next.max(self.now_us + 1);
            let mut awake = vec![false; self.nodes.len()];
            while let Some(Reverse((at, ..))) = self.wire.peek() {
                if *at > self.now_us {
                    break;
                }
                let Some(Reverse((_, _, from, to, bytes))) = self.wire.pop() else { break };
                awake[to] = true;
                self.deliver(from, to, bytes);
            }
            for (number, awake) in awake.into_iter().enumerate() {
                let due = self.nodes[number].vigil.is_due(self.now_us) || self.nodes[number].vigil.looks(self.now_us);
                if self.nodes[number].alive && (awake || due) {
                    self.turn(number);
                }
            }
        }
    }

    fn deliver(&mut self, from: usize, to: usize, mut bytes: Vec<u8>) {
        let node = &mut self.nodes[to];
        if !node.alive {
            self.lost += 1;
            return;
        }
        self.delivered += 1;
        let source = SocketAddr::new(underlay(from), 8472);
        let received = Received { at: 0, len: bytes.len(), segment_len: None, source, tos: 0, truncated: false };
        node.inbound.received_at(self.now_us);
        node.inbound.push(&node.tables, self.now_us / 1000, &mut bytes, received);
    }

    fn turn(&mut self, number: usize) {
        let (now_us, node) = (self.now_us, &mut self.nodes[number]);
        let mut heard = std::mem::take(node.inbound.heard());
        node.vigil.turn(&node.tables, now_us, Some(now_us), &mut heard, 8, &mut node.outbox);
        let letters: Vec<_> = node.outbox.letters().map(|(letter, bytes)| (letter.to.ip(), bytes.to_vec())).collect();
        node.outbox.clear();
        for other in (0..self.nodes.len()).filter(|other| *other != number) {
            let (before, now) = (self.nodes[number].thought[other], self.verdict(number, other));
            if now == Verdict::Down && before != now {
                self.deaths.push((now_us, number, other));
            }
            self.nodes[number].thought[other] = now;
        }
        for (to, bytes) in letters {
            let to = (0..self.nodes.len()).find(|node| underlay(*node) == to).unwrap();
            self.sent += 1;
            if self.rng.per_mille(self.loss_permille) || self.cut.contains(&(number, to)) {
                self.lost += 1;
                continue;
            }
            // one in fifty takes a detour, and is overtaken
            let detour = if self.rng.per_mille(20) { 30 * MS } else { 0 };
            let at = now_us + 200 + self.rng.below(2_000) as u64 + detour;
            self.wire.push(Reverse((at, self.sent, number, to, bytes)));
        }
    }

    #[track_caller]
    fn all_up(&self) {
        for of in 0..self.nodes.len() {
            for other in (0..self.nodes.len()).filter(|other| *other != of) {
                assert_eq!(self.verdict(of, other), Verdict::Up, "{other} to {of} at {} s", self.now_us / SECOND);
            }
        }
    }

    fn drops(&self, reason: Drop) -> u64 {
        self.nodes.iter().map(|node| node.stats.sum(|worker| worker.drops(reason))).sum()
    }
}

const KEYS: Option<&str> = Some("1 correct-horse");

#[test]
fn two_in_a_hundred_lost_for_an_hour_kill_nobody() {
    let hours = crate::number("SIM_HOURS").unwrap_or(1);
    for keys in [None, KEYS] {
        let mut world = World::new(7, 4, keys);
        world.run(5 * SECOND);
        world.all_up();
        world.loss_permille = 20;
        // half the time with keys: digests are slow in a debug build
        for _ in 0..hours * if keys.is_some() { 30 } else { 60 } {
            world.run(60 * SECOND);
            world.all_up();
        }
        assert_eq!(world.deaths, [], "not one");
        let World { sent, lost, delivered, .. } = world;
        eprintln!("{sent} packets, {lost} lost, {} refused as replayed", world.drops(Drop::BfdReplayed));
        assert!((150..250).contains(&(lost * 10_000 / sent)), "{lost} of {sent}");
        assert_eq!(sent, lost + delivered + world.wire.len() as u64);
        let consumed: u64 = world.nodes.iter().map(|node| node.stats.sum(|w| w.flow.consumed_inbound.get())).sum();
        let replayed = world.drops(Drop::BfdReplayed);
        assert_eq!(delivered, consumed + replayed, "each was taken, or came too late to count");
        assert_eq!(replayed > 0, keys.is_some(), "those that were overtaken");
    }
    // the control: a network on which they do die
    let mut world = World::new(7, 4, None);
    world.run(5 * SECOND);
    world.loss_permille = 700;
    world.run(60 * SECOND);
    assert!(world.deaths.len() > 10, "{}", world.deaths.len());
}

#[test]
fn a_death_is_seen_in_time_and_only_that_one() {
    for keys in [None, KEYS] {
        let mut world = World::new(11, 4, keys);
        world.loss_permille = 20;
        world.run(10 * SECOND);
        world.all_up();
        let mut longest = 0;
        for round in 0..40 {
            let wait = world.rng.below(3_000) as u64 * MS;
            world.run(wait);
            world.deaths.clear();
            let (victim, killed) = (round % 4, world.now_us);
            world.kill(victim);
            world.run(DETECTION + SLACK);
            let mut seen: Vec<_> = world.deaths.iter().map(|(_, of, dead)| (*of, *dead)).collect();
            seen.sort_unstable();
            let wanted: Vec<_> = (0..4).filter(|of| *of != victim).map(|of| (of, victim)).collect();
            assert_eq!(seen, wanted, "round {round}");
            longest = longest.max(world.deaths.iter().map(|(at, ..)| at - killed).max().unwrap());
            world.revive(victim);
            world.run(6 * SECOND);
            world.all_up();
            assert_eq!(world.deaths.len(), 3, "its return kills nobody");
        }
        eprintln!("the longest took {} ms", longest / MS);
    }
}

#[test]
fn one_way_is_no_way_and_both_sides_know() {
    let mut world = World::new(13, 4, KEYS);
    world.run(10 * SECOND);
    for round in 0..20 {
        world.deaths.clear();
        world.cut = vec![(0, 1)];
        // who is not heard is told so by the other, whose own time is up
        world.run(DETECTION + 2 * SLACK);
        let mut seen: Vec<_> = world.deaths.iter().map(|(_, of, dead)| (*of, *dead)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [(0, 1), (1, 0)], "round {round}");
        world.cut.clear();
        world.run(70 * SECOND);
        world.all_up();
    }
}

/// A link that is there for a second and away for a second, for ten minutes.
#[test]
fn a_link_that_flaps_dies_a_few_times_a_minute() {
    let mut world = World::new(17, 4, None);
    world.run(10 * SECOND);
    let mut by_minute = Vec::new();
    for _ in 0..10 {
        world.deaths.clear();
        for _ in 0..27 {
            world.cut = vec![(0, 1), (1, 0)];
            world.run(1_100 * MS);
            world.cut.clear();
            world.run(1_100 * MS);
        }
        assert!(world.deaths.iter().all(|(_, of, dead)| of + dead == 1), "nobody else");
        by_minute.push(world.deaths.iter().filter(|(_, of, _)| *of == 0).count());
    }
    eprintln!("deaths a minute: {by_minute:?}");
    // three in each minute that begins with the first of them; ten minutes here begin and end within others
    assert!(by_minute.iter().sum::<usize>() <= 3 * 11, "{by_minute:?}");
    assert!(by_minute[0] >= 3, "{by_minute:?}: at first it is seen each time");
    world.run(5 * SECOND);
    world.all_up();
    // what is longer than the damped time is seen still, and so is everything after a quiet minute
    for wait in [0, 70] {
        world.run(wait * SECOND);
        world.deaths.clear();
        let cut = world.now_us;
        world.cut = vec![(0, 1), (1, 0)];
        world.run(3 * SECOND);
        assert_eq!(world.deaths.len(), 2);
        let within = if wait == 0 { 2 } else { 1 } * DETECTION + SLACK;
        assert!(world.deaths.iter().all(|(at, ..)| at - cut <= within));
        world.cut.clear();
        // each side says something once a second, and the first thing that is heard is an answer
        world.run(SECOND + SLACK);
        world.all_up();
    }
}
