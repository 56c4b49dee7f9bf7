//! Three MariaDB servers as one Galera cluster, and writers at different ones of them: what fails its certification is done
//! again, and nothing is done twice or lost, also when a node dies.

use std::sync::Arc;
use std::time::Duration;

use meshd::membership::store::{Compare, Event, Op, Outcome, Store, Txn, conformance};

use super::servers::{Server, block_on};
use super::{cluster, next, open, put};

#[test]
#[ignore = "a minute, and galera-4 and rsync: run with --ignored"]
fn galera() {
    let begun = std::time::Instant::now();
    let Some(mut nodes) = Server::galera() else { return };
    let told = |what: &str| println!("galera: {:>6.2} s  {what}", begun.elapsed().as_secs_f64());
    told("three nodes");
    block_on(async {
        let size = "SELECT CAST(VARIABLE_VALUE AS SIGNED) FROM information_schema.GLOBAL_STATUS WHERE VARIABLE_NAME = \
                    'wsrep_cluster_size'";
        assert_eq!(nodes[2].number("mysql", size).await, 3);
        let store = open(&nodes[1].database("conforms").await).await;
        tokio::time::timeout(Duration::from_secs(120), conformance::check(&store)).await.unwrap();
        told("does what every store must");
        writers_at_different_nodes(&nodes).await;
        told("writers at different nodes");
    });
    cluster::two_servers(&nodes[0], &nodes[1]);
    told("two servers of meshd at different nodes");
    a_node_dies(&mut nodes);
    told("a node died, and came back");
}

/// Each adds one, and none is lost: whoever is second at another node finds out when it commits.
async fn writers_at_different_nodes(nodes: &[Server; 3]) {
    const EACH: u64 = 100;
    let database = nodes[0].database("three").await;
    open(&database).await;
    let mut stores = Vec::new();
    for node in nodes {
        stores.push(Arc::new(open(&node.at("three", node.port)).await));
    }
    let first = put(&*stores[0], "n", b"0").await;
    let mut watch = stores[2].watch("n", first).await.unwrap();
    let clashes = async || {
        let mut all = 0;
        for node in nodes {
            for name in ["wsrep_local_cert_failures", "wsrep_local_bf_aborts"] {
                let query = format!(
                    "SELECT CAST(VARIABLE_VALUE AS SIGNED) FROM information_schema.GLOBAL_STATUS WHERE VARIABLE_NAME = '{name}'"
                );
                all += node.number("mysql", &query).await;
            }
        }
        all
    };
    let before = clashes().await;
    let start = std::time::Instant::now();
    let writers = stores.iter().map(|store| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut conflicts = 0;
            for _ in 0..EACH {
                loop {
                    let seen = store.range("n").await.unwrap().items.remove(0);
                    let n: u64 = String::from_utf8(seen.value).unwrap().parse().unwrap();
                    let compares = vec![Compare { key: "n".to_owned(), modified: seen.modified }];
                    let ops = vec![Op::put("n", (n + 1).to_string())];
                    match store.txn(Txn { compares, ops }).await.unwrap() {
                        Outcome::Done(_) => break,
                        Outcome::Conflict => conflicts += 1,
                    }
                }
            }
            conflicts
        })
    });
    let conflicts: u64 = futures::future::join_all(writers).await.into_iter().map(Result::unwrap).sum();
    let took = start.elapsed().as_secs_f64();
    println!(
        "galera: {} additions at three nodes in {took:.1} s: {conflicts} comparisons failed, {} certifications or aborts by \
         another node were done again",
        3 * EACH,
        clashes().await - before
    );
    for store in &stores {
        assert_eq!(store.range("n").await.unwrap().items[0].value, (3 * EACH).to_string().into_bytes());
    }
    let mut seen: Vec<u64> = Vec::new();
    while seen.len() < 3 * EACH as usize {
        seen.extend(next(&mut watch).await.iter().map(|event| match event {
            Event::Put(kv) => String::from_utf8(kv.value.clone()).unwrap().parse::<u64>().unwrap(),
            Event::Delete { .. } => panic!("nothing is deleted"),
        }));
    }
    assert_eq!(seen, (1..=3 * EACH).collect::<Vec<_>>(), "each once, in order, as the third node tells it");

    // whose lease is in the key is the one that may: never two
    for round in 0..20 {
        let bids = stores.iter().map(|store| async move {
            let lease = store.grant(Duration::from_secs(30)).await.unwrap();
            let compares = vec![Compare { key: "holder".to_owned(), modified: 0 }];
            let ops = vec![Op::Put { key: "holder".to_owned(), value: b"me".to_vec(), lease: Some(lease) }];
            (lease, store.txn(Txn { compares, ops }).await.unwrap())
        });
        let bids = futures::future::join_all(bids).await;
        let won: Vec<_> = bids.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Done(_))).collect();
        assert_eq!(won.len(), 1, "round {round}: {bids:?}");
        for (lease, _) in &bids {
            stores[round % 3].revoke(*lease).await.unwrap();
        }
        assert!(stores[0].range("holder").await.unwrap().items.is_empty(), "and it goes with its lease");
    }
}

fn a_node_dies(nodes: &mut [Server; 3]) {
    let database = block_on(nodes[0].database("dies"));
    let at_lost = nodes[1].at("dies", nodes[1].port);
    block_on(async {
        let kept = open(&database).await;
        let lost = open(&at_lost).await;
        let writes = tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 0..100_000u32 {
                let key = format!("k/{n:06}");
                match lost.txn(Txn { compares: vec![], ops: vec![Op::put(&key, *b"x")] }).await {
                    Ok(_) => acknowledged.push(key),
                    Err(_) => break,
                }
            }
            acknowledged
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        nodes[1].kill();
        let acknowledged = writes.await.unwrap();
        let there: Vec<String> = kept.range("k/").await.unwrap().items.into_iter().map(|kv| kv.key).collect();
        let missing: Vec<_> = acknowledged.iter().filter(|key| !there.contains(key)).collect();
        let (all, lost) = (acknowledged.len(), missing.len());
        println!("galera: {all} writes acknowledged by the node that was killed, {lost} of them missing");
        assert!(all > 0 && missing.is_empty(), "{missing:?}");
        put(&kept, "later", b"").await;
    });
    nodes[1].run();
    block_on(async {
        let back = open(&at_lost).await;
        assert_eq!(back.range("later").await.unwrap().items.len(), 1, "it has what it missed");
        put(&back, "again", b"").await;
    });
}
