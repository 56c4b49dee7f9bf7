//! A simulated network of production engines in virtual time, held against a reference model.
//!
//! ```text
//!   TUN frames ─► Outbound ─► links: latency, loss, reordering, duplication, corruption, marking, MTU
//!                   node                      │
//!   TUN frames ◄─ Inbound ◄───────────────────┘      nodes join, leave, move, restart, and learn of it late
//! ```
//!
//! A walk is made from one number. `SIM_WALKS=N cargo test --test sim` makes more of them, from `SIM_FIRST` on;
//! `SIM_SEED=N` repeats one, `SIM_STEPS=0,3,7` only these of its steps. A walk that fails is shrunk and printed as such a
//! command; a file `tests/regressions/NAME.seed` with `SEED: STEPS` in it is walked first from then on.

#[path = "../reference/mod.rs"]
mod reference;

mod lives;
mod model;
mod node;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use world::{Moved, Step, World, steps};

/// Walks of a plain `cargo test`.
const WALKS: u64 = 2000;

/// Something that a simulation must notice, done by the harness between engine and model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// A bit of a delivered packet flips.
    CorruptDelivered,
    /// A packet is not delivered, and nobody counts it.
    DropSilently,
    /// A packet is delivered twice.
    Duplicate,
    /// A batch is delivered in the wrong order.
    Swap,
    /// A datagram is counted as sent, and is not.
    Lose,
    /// A drop is counted that did not happen.
    Miscount,
}

impl Sabotage {
    fn hits(now: &mut Option<Sabotage>, wanted: Sabotage) -> bool {
        *now == Some(wanted)
    }
}

fn walk(seed: u64, steps: &[Step], sabotage: Option<Sabotage>) -> Result<Moved, String> {
    let walk = AssertUnwindSafe(|| World::new(seed, sabotage)?.run(steps));
    catch_unwind(walk).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(format!("panic: {}", text.or(panic.downcast_ref::<&str>().map(|t| (*t).to_owned())).unwrap_or_default()))
    })
}

/// Leaves steps out as long as the walk still fails; the indices of those that remain, and the error.
fn shrink(seed: u64, sabotage: Option<Sabotage>) -> Option<(Vec<usize>, String)> {
    let all = steps(seed);
    let attempt = |kept: &[usize]| walk(seed, &kept.iter().map(|i| all[*i]).collect::<Vec<_>>(), sabotage).err();
    let mut kept: Vec<usize> = (0..all.len()).collect();
    let mut error = attempt(&kept)?;
    let mut at = 0;
    while at < kept.len() {
        let mut fewer = kept.clone();
        fewer.remove(at);
        match attempt(&fewer) {
            Some(other) => (kept, error, at) = (fewer, other, 0),
            None => at += 1,
        }
    }
    Some((kept, error))
}

#[track_caller]
fn fail(seed: u64) -> ! {
    let (kept, error) = shrink(seed, None).unwrap_or_else(|| (Vec::new(), "it does not fail again".to_owned()));
    let kept: Vec<String> = kept.iter().map(ToString::to_string).collect();
    let kept = kept.join(",");
    panic!(
        "walk {seed} fails: {error}\n\nrepeat it:  SIM_SEED={seed} SIM_STEPS={kept} cargo test --test sim walks\n\
         keep it:    echo '{seed}: {kept}' >tests/regressions/NAME.seed\n"
    );
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not `{text}`")))
}

fn chosen(seed: u64, text: &str) -> Vec<Step> {
    let all = steps(seed);
    let indices = text.split(',').filter(|part| !part.trim().is_empty());
    indices.map(|part| all[part.trim().parse::<usize>().expect("a step's number")]).collect()
}

#[test]
fn walks() {
    if let Some(seed) = number("SIM_SEED") {
        match std::env::var("SIM_STEPS") {
            Ok(text) => _ = walk(seed, &chosen(seed, &text), None).unwrap_or_else(|error| panic!("{error}")),
            Err(_) if walk(seed, &steps(seed), None).is_err() => fail(seed),
            Err(_) => {}
        }
        return;
    }
    let (first, count) = (number("SIM_FIRST").unwrap_or(1), number("SIM_WALKS").unwrap_or(WALKS));
    let started = Instant::now();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let results: Vec<Result<Moved, u64>> = std::thread::scope(|scope| {
        let one = |worker: u64| {
            move || {
                let mut all = Moved::default();
                for seed in (first + worker..first + count).step_by(workers as usize) {
                    let moved = walk(seed, &steps(seed), None).map_err(|_| seed)?;
                    all.packets += moved.packets;
                    all.delivered += moved.delivered;
                }
                Ok(all)
            }
        };
        let threads: Vec<_> = (0..workers).map(|worker| scope.spawn(one(worker))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a walk's panic is caught")).collect()
    });
    if let Some(seed) = results.iter().filter_map(|result| result.as_ref().err()).min() {
        fail(*seed);
    }
    let sum = |read: fn(&Moved) -> u64| -> u64 { results.iter().flatten().map(read).sum() };
    let (packets, delivered) = (sum(|m| m.packets), sum(|m| m.delivered));
    eprintln!("{count} walks, {packets} packets, {delivered} delivered, {:.1} s", started.elapsed().as_secs_f64());
    assert!(delivered > count, "the walks carry next to nothing");
}

#[test]
fn regressions() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/regressions");
    for entry in std::fs::read_dir(folder).expect("tests/regressions") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "seed") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a readable file");
        for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
            let (seed, kept) = line.split_once(':').expect("SEED: STEPS");
            let seed = seed.trim().parse().expect("a seed");
            let steps = if kept.trim().is_empty() { steps(seed) } else { chosen(seed, kept) };
            if let Err(error) = walk(seed, &steps, None) {
                panic!("{}: {error}", path.display());
            }
        }
    }
}

#[test]
fn a_walk_is_the_same_each_time() {
    let once = |seed| walk(seed, &steps(seed), None).map(|moved| (moved.packets, moved.delivered));
    for seed in 1..20 {
        assert_eq!(once(seed), once(seed));
    }
}

/// The test of the test: each of these must turn walks red, and shrink to less than the whole.
#[test]
fn sabotage_is_noticed() {
    use Sabotage::{CorruptDelivered, DropSilently, Duplicate, Lose, Miscount, Swap};
    for sabotage in [CorruptDelivered, DropSilently, Duplicate, Swap, Lose, Miscount] {
        let noticed = (1..=100).find(|seed| walk(*seed, &steps(*seed), Some(sabotage)).is_err());
        let seed = noticed.unwrap_or_else(|| panic!("{sabotage:?} went unnoticed for 100 walks"));
        let (kept, error) = shrink(seed, Some(sabotage)).expect("it failed before");
        assert!(kept.len() <= 3, "{sabotage:?} in walk {seed} needs steps {kept:?}: {error}");
    }
}
