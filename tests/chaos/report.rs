//! What a run looked like, in figures.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::history::{Answer, Entry, What};

/// A line of the script's: a fault, from when to when (ms since 1970), and when all servers were good again.
#[derive(Deserialize)]
struct Fault {
    fault: String,
    start: u64,
    end: u64,
    good: u64,
}

pub(crate) fn print(history: &[Entry], dir: &Path) {
    let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    let mut writes = Vec::new();
    for entry in history {
        let (what, done) = match &entry.what {
            What::Token { .. } => ("tokens made", true),
            What::Join { answer: Answer::Joined { .. }, .. } => ("joins", true),
            What::Join { answer: Answer::Refused { .. }, .. } => ("joins refused", true),
            What::Join { answer: Answer::Unknown { .. }, .. } => ("joins", false),
            What::Revoke { done, .. } => ("revocations", *done),
            What::Remove { done, .. } => ("removals", *done),
            What::Drain { done, .. } => ("drains", *done),
            What::Flow { from, to, sent, lost, worst_gap_ms } => {
                println!("{from} to {to}: {lost} of {sent} packets lost, at most {worst_gap_ms} ms between two");
                continue;
            }
            _ => continue,
        };
        let count = counts.entry(what).or_default();
        if done {
            count.0 += 1
        } else {
            count.1 += 1
        }
        if done && what != "joins refused" {
            writes.push(entry.end);
        }
    }
    for (what, (done, unknown)) in counts {
        println!("{what}: {done}, and {unknown} without a clear answer");
    }
    writes.sort_unstable();
    let text = std::fs::read_to_string(dir.join("faults")).unwrap_or_default();
    let mut faults: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
    for fault in text.lines().filter_map(|line| serde_json::from_str::<Fault>(line).ok()) {
        // from the last acknowledgement before it on
        let first = writes.partition_point(|at| *at <= fault.start).saturating_sub(1);
        let within = writes[first.min(writes.len())..].windows(2).take_while(|pair| pair[0] < fault.good);
        let silence = within.map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        faults.entry(fault.fault).or_default().push((silence, fault.good.saturating_sub(fault.end)));
    }
    println!("{:<22} {:>4}  {:>21}  {:>21}", "", "", "no write acknowledged", "all good after its end");
    println!(
        "{:<22} {:>4}  {:>10} {:>10}  {:>10} {:>10}",
        "fault", "n", "median ms", "worst ms", "median ms", "worst ms"
    );
    for (fault, times) in faults {
        let middle = |of: fn(&(u64, u64)) -> u64| {
            let mut all: Vec<u64> = times.iter().map(of).collect();
            all.sort_unstable();
            (all[all.len() / 2], all[all.len() - 1])
        };
        let (silence, good) = (middle(|t| t.0), middle(|t| t.1));
        println!("{fault:<22} {:>4}  {:>10} {:>10}  {:>10} {:>10}", times.len(), silence.0, silence.1, good.0, good.1);
    }
}
