//! Every order in which threads may meet at what they share: the counters and the peer table. Loom runs each.
//!
//! The counter is the production file, on loom's atomics. Of the table the discipline is modelled: `arc_swap` is not ours
//! to prove, and stands here as a lock around a pointer; how workers and the daemon use it is what can go wrong.

#[path = "../src/engine/stats/counter.rs"]
#[allow(dead_code, unreachable_pub)]
mod counter;

mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

use std::sync::Mutex as StdMutex;

use counter::Counter;
use loom::sync::{Arc, Mutex};
use loom::thread;

#[test]
fn a_counter_loses_nothing_and_never_runs_backwards() {
    loom::model(|| {
        let counter = Arc::new(Counter::default());
        let shared = counter.clone();
        let owner = thread::spawn(move || {
            for n in [1, 2, 4] {
                shared.add(n);
            }
        });
        let seen = [counter.get(), counter.get()];
        assert!(seen.iter().all(|n| [0, 1, 3, 7].contains(n)), "{seen:?}");
        assert!(seen[0] <= seen[1], "{seen:?}");
        owner.join().unwrap();
        assert_eq!(counter.get(), 7);
    });
}

/// Sums over workers, each of which has a counter of its own, are exact at rest.
#[test]
fn workers_with_counters_of_their_own_add_up() {
    loom::model(|| {
        let counters = Arc::new([Counter::default(), Counter::default()]);
        let workers = [0, 1].map(|index| {
            let counters = counters.clone();
            thread::spawn(move || {
                counters[index].add(1);
                counters[index].add(1);
            })
        });
        let so_far: u64 = counters.iter().map(Counter::get).sum();
        assert!(so_far <= 4);
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(counters.iter().map(Counter::get).sum::<u64>(), 4);
    });
}

/// Positive control: with two writers a plain load and store does lose, and the search finds the order in which it does.
#[test]
fn two_writers_of_one_counter_are_found_out() {
    let totals = collect(|seen| {
        let counter = Arc::new(Counter::default());
        let shared = counter.clone();
        let other = thread::spawn(move || shared.add(1));
        counter.add(1);
        other.join().unwrap();
        seen(counter.get());
    });
    assert!(totals.contains(&1) && totals.contains(&2), "{totals:?}");
}

/// A peer table; says in which thread it was freed.
struct Table {
    number: u64,
    twice: u64,
    freed_by_worker: Arc<loom::sync::atomic::AtomicBool>,
    daemon: thread::ThreadId,
}

impl Table {
    fn new(number: u64, freed_by_worker: &Arc<loom::sync::atomic::AtomicBool>) -> Arc<Self> {
        let freed_by_worker = freed_by_worker.clone();
        Arc::new(Table { number, twice: 2 * number, freed_by_worker, daemon: thread::current().id() })
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if thread::current().id() != self.daemon {
            self.freed_by_worker.store(true, atomic::Ordering::Relaxed);
        }
    }
}

/// Two changes of the node list while a worker runs two batches. `keeps`: the daemon holds what it replaced until nobody
/// else does, as `Daemon::publish` and `Daemon::tick` do. Says whether the worker had to free a table.
fn changes_meet_batches(keeps: bool) -> bool {
    let freed_by_worker = Arc::new(loom::sync::atomic::AtomicBool::new(false));
    let shared = Arc::new(Mutex::new(Table::new(1, &freed_by_worker)));
    let tables = shared.clone();
    let worker = thread::spawn(move || {
        let mut cached = tables.lock().unwrap().clone();
        let mut last = 0;
        for _batch in 0..2 {
            // `Cache::load`: one look at the pointer, another table only where it is another
            let now = tables.lock().unwrap();
            if !Arc::ptr_eq(&cached, &now) {
                let new = now.clone();
                drop(now);
                cached = new;
            } else {
                drop(now);
            }
            assert_eq!(cached.twice, 2 * cached.number, "whole");
            assert!(cached.number >= last, "never an older one again");
            last = cached.number;
        }
    });
    let mut retired = Vec::new();
    for number in [2, 3] {
        let old = std::mem::replace(&mut *shared.lock().unwrap(), Table::new(number, &freed_by_worker));
        if keeps {
            retired.push(old);
        }
        retired.retain(|table| Arc::strong_count(table) > 1);
    }
    worker.join().unwrap();
    retired.retain(|table| Arc::strong_count(table) > 1);
    assert!(retired.is_empty(), "what nobody holds is freed by the next tick");
    assert_eq!(shared.lock().unwrap().number, 3);
    freed_by_worker.load(atomic::Ordering::Relaxed)
}

#[test]
fn a_worker_sees_whole_tables_in_order_and_never_frees_one() {
    let freed = collect(|seen| seen(changes_meet_batches(true)));
    assert!(!freed.contains(&true), "an allocation of a hundred thousand peers is not freed between two packets");
}

/// Positive control: without the daemon's hold it happens.
#[test]
fn without_the_hold_a_worker_frees_tables() {
    let freed = collect(|seen| seen(changes_meet_batches(false)));
    assert!(freed.contains(&true));
}

/// Runs every order, and returns what the runs told.
fn collect<T: Ord + Send + 'static>(run: impl Fn(&dyn Fn(T)) + Sync + Send + 'static) -> std::collections::BTreeSet<T> {
    let all = std::sync::Arc::new(StdMutex::new(std::collections::BTreeSet::new()));
    let told = all.clone();
    loom::model(move || run(&|value| _ = told.lock().unwrap().insert(value)));
    std::mem::take(&mut *all.lock().unwrap())
}
