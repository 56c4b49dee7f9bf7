//! Faults under load: the clients of a cluster whose servers are killed, stopped and cut off by `netns-scripts/chaos.sh`,
//! and whether what they were told is so in the end.
//!
//! `load` is that script's: it runs until there is a file `stop` in `CHAOS_DIR`, and fails where anything is wrong. That
//! each wrong is found is tested in `tampered`, always.

#[path = "chaos/flow.rs"]
mod flow;
#[path = "membership/harness.rs"]
#[allow(dead_code)]
mod harness;
#[path = "chaos/history.rs"]
mod history;
#[path = "chaos/load.rs"]
mod load;
#[path = "chaos/report.rs"]
mod report;
#[path = "chaos/tampered.rs"]
mod tampered;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use flow::Place;
use load::{Lab, Server};

fn var(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run netns-scripts/chaos.sh"))
}

/// `CHAOS_SERVERS`: NAME,ADDRESS,SOCKET …; `CHAOS_FLOW`: NAMESPACE,ADDRESS NAMESPACE,ADDRESS.
#[test]
#[ignore = "run by netns-scripts/chaos.sh"]
fn load() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let all = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, all).unwrap();
    let dir = PathBuf::from(var("CHAOS_DIR"));
    let count: usize = std::env::var("CHAOS_NODES").map_or(20, |n| n.parse().unwrap());
    let servers = var("CHAOS_SERVERS");
    let servers = servers.split_whitespace().map(|server| {
        let mut parts = server.split(',');
        let mut next = || parts.next().unwrap();
        Server { name: next().to_owned(), address: next().parse().unwrap(), socket: next().into() }
    });
    let lab = Arc::new(Lab {
        servers: servers.collect(),
        meshctl: var("MESHCTL").into(),
        history: Mutex::default(),
        stop: AtomicBool::new(false),
        chance: load::seed().into(),
        file: Mutex::new(File::create(dir.join("history")).unwrap()),
    });
    let places = var("CHAOS_FLOW");
    let places: Vec<Place> = places
        .split_whitespace()
        .map(|place| place.split_once(',').unwrap())
        .map(|(namespace, address)| Place { namespace: namespace.to_owned(), address: address.parse().unwrap() })
        .collect();

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let history = runtime.block_on(async {
        let (residents, times) = lab.settle(count).await;
        let at = |share: usize| times[(times.len() - 1) * share / 100];
        println!(
            "{count} agents at once, joined and connected: p50 {} ms, p99 {} ms, last {} ms",
            at(50),
            at(99),
            at(100)
        );
        let flows = [(0, 1), (1, 0)].map(|(a, b)| flow::start(&lab, places[a].clone(), places[b].clone()));
        let names: Vec<String> = residents.iter().map(|resident| resident.name.clone()).collect();
        let halves = names.split_at(names.len() / 2);
        std::fs::write(dir.join("ready"), "").unwrap();
        let mut workers = vec![
            tokio::spawn(lab.clone().race()),
            tokio::spawn(lab.clone().race()),
            tokio::spawn(lab.clone().revoke()),
            tokio::spawn(lab.clone().pulse()),
            tokio::spawn(lab.clone().look()),
        ];
        if std::env::var_os("CHAOS_QUIET").is_some() {
            workers.drain(..).for_each(|worker| worker.abort());
        } else {
            workers.push(tokio::spawn(lab.clone().drain(halves.0.to_vec())));
            workers.push(tokio::spawn(lab.clone().drain(halves.1.to_vec())));
        }
        load::asked_to_stop(&dir).await;
        lab.stop.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.await.unwrap();
        }
        tokio::task::spawn_blocking(move || flows.into_iter().for_each(|flow| flow.join().unwrap())).await.unwrap();
        assert!(residents.iter().all(|resident| resident.alive()), "an agent has ended");
        lab.ends(&residents).await;
        std::mem::take(&mut *lab.history.lock().unwrap())
    });
    runtime.shutdown_background();
    report::print(&history, &dir);
    let wrong = history::check(&history);
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
}
