//! Stores in databases elsewhere, on real MariaDB and PostgreSQL servers that the tests start and end.
//!
//! One test an engine, since its server takes a second or two to start; each story has a database of its own, whose
//! character set or collation is the worst there is, since keys have to compare by their bytes everywhere.

mod cluster;
mod galera;
mod proxy;
mod refusals;
mod servers;
#[path = "../sidecar/mod.rs"]
mod sidecar;

use std::sync::Arc;
use std::time::Duration;

use meshd::membership::store::sql::Sql;
use meshd::membership::store::sql::remote;
use meshd::membership::store::{Compare, Event, Op, Outcome, Store, StoreError, Txn, Watch, conformance};

use self::proxy::Proxy;
use self::servers::{Kind, Server, block_on};

#[test]
fn mariadb() {
    all(Kind::MariaDb);
}

#[test]
fn postgresql() {
    all(Kind::Postgres);
}

fn all(kind: Kind) {
    let begun = std::time::Instant::now();
    let Some(mut server) = Server::start(kind, false) else { return };
    let told = |what: &str| println!("{kind:?}: {:>6.2} s  {what}", begun.elapsed().as_secs_f64());
    told("the server answers");
    block_on(async {
        let database = server.database("conforms").await;
        let store = open(&database).await;
        tokio::time::timeout(Duration::from_secs(60), conformance::check(&store)).await.unwrap();
        told("does what every store must");
        history_is_cut(&server).await;
        told("history is cut");
        several_start_at_once(&server).await;
        told("several start at once");
        writers_of_two_servers_queue(&server).await;
        told("writers of two servers queue");
        what_was_cut_is_done_once(&server).await;
        told("what was cut is done once");
        who_is_cut_off_holds_nobody_up(&server).await;
        told("who is cut off holds nobody up");
        sessions_are_killed(&server).await;
        told("sessions are killed");
        refusals::all(&server).await;
        told("refusals");
    });
    a_restart_under_a_watch(&mut server);
    told("a restart under a watch");
    cluster::two_servers(&server, &server);
    told("two servers");
}

async fn open(database: &meshd::membership::settings::Datastore) -> Sql {
    let endpoint = database.endpoint.as_ref().unwrap().reveal().to_owned();
    remote::open(database, &endpoint).await.unwrap()
}

async fn history_is_cut(server: &Server) {
    let store = open(&server.database("cut").await).await;
    for n in 0..10u8 {
        put(&store, "a", &[n]).await;
    }
    let mut early = store.watch("", 5).await.expect("positive control");
    assert_eq!(next(&mut early).await.len(), 5);
    store.compact(7).await.unwrap();
    for after in [0, 6] {
        assert_eq!(store.watch("", after).await.err(), Some(StoreError::Compacted { compacted: 7 }));
    }
    assert_eq!(next(&mut store.watch("", 7).await.unwrap()).await.len(), 3);
    assert_eq!(store.range("").await.unwrap().items[0].value, [9], "what is, stays");
    put(&store, "a", b"new").await;
    assert_eq!(next(&mut early).await.len(), 1, "who watches already notices nothing");
}

async fn several_start_at_once(server: &Server) {
    let database = server.database("crowd").await;
    let stores = futures::future::join_all((0..6).map(|_| open(&database))).await;
    for (n, store) in stores.iter().enumerate() {
        assert_eq!(put(store, &format!("{n}"), b"").await, n as u64 + 1);
    }
    assert_eq!(server.number("crowd", "SELECT COUNT(*) FROM meshd_schema").await, 1, "one migration, once");
}

/// Revisions without gaps, watches in order and without loss, and exactly one winner where two want the same.
async fn writers_of_two_servers_queue(server: &Server) {
    const EACH: usize = 50;
    let database = server.database("pair").await;
    let (a, b) = (Arc::new(open(&database).await), Arc::new(open(&database).await));
    let mut watch = b.watch("", 0).await.unwrap();
    let writers = [a.clone(), b.clone()].into_iter().enumerate().map(|(who, store)| async move {
        let mut won = Vec::new();
        for n in 0..EACH {
            won.push(put(&*store, &format!("w/{who}/{n:03}"), b"x").await);
        }
        won
    });
    let mut revisions: Vec<u64> = futures::future::join_all(writers).await.concat();
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=2 * EACH as u64).collect::<Vec<_>>(), "no gap, none twice");
    let mut seen = Vec::new();
    while seen.len() < 2 * EACH {
        seen.extend(next(&mut watch).await.iter().map(Event::revision));
    }
    assert_eq!(seen, revisions, "in order");
    for round in 0..10 {
        let at = put(&*a, "prize", b"").await;
        let bid = |store: Arc<Sql>| async move {
            let compares = vec![Compare { key: "prize".to_owned(), modified: at }];
            store.txn(Txn { compares, ops: vec![Op::put("prize", *b"mine")] }).await.unwrap()
        };
        let (one, other) = tokio::join!(bid(a.clone()), bid(b.clone()));
        let winners = [one, other].iter().filter(|o| matches!(o, Outcome::Done(_))).count();
        assert_eq!(winners, 1, "round {round}");
    }
}

/// The connection is cut at each request of a transaction, before it gets through and before its answer does: the
/// transaction is done nevertheless, once, and says so.
async fn what_was_cut_is_done_once(server: &Server) {
    server.database("severed").await;
    let proxy = Proxy::start(server.port).await;
    let store = open(&server.at("severed", proxy.port)).await;
    let mut at = put(&store, "k", b"").await;
    let mut cuts = 0;
    for only_the_answer in [false, true] {
        for request in 0.. {
            assert!(request < 100, "a transaction is not that long");
            proxy.cut(request, only_the_answer);
            let compares = vec![Compare { key: "k".to_owned(), modified: at }];
            let value = format!("{only_the_answer} {request}").into_bytes();
            let done = store.txn(Txn { compares, ops: vec![Op::put("k", value.clone())] }).await;
            assert_eq!(done, Ok(Outcome::Done(at + 1)), "cut at request {request}, only the answer: {only_the_answer}");
            at += 1;
            let now = store.range("k").await.unwrap();
            assert_eq!((now.revision, &now.items[0].value), (at, &value));
            if !proxy.has_cut() {
                break;
            }
            cuts += 1;
        }
    }
    assert!(cuts > 8, "positive control: {cuts} cuts");
    // a lease made, kept and ended over a connection that breaks
    for request in 0..3 {
        proxy.cut(request, true);
        let lease = store.grant(Duration::from_secs(60)).await.unwrap();
        proxy.cut(request, true);
        store.keep_alive(lease).await.unwrap();
        proxy.cut(request, true);
        store.revoke(lease).await.unwrap();
        proxy.cut(-1, false);
        assert_eq!(store.keep_alive(lease).await, Err(StoreError::NoLease));
    }
    let leases = server.number("severed", "SELECT COUNT(*) FROM meshd_lease").await;
    assert_eq!(leases, 0);
}

/// A server vanishes behind a network that is gone in the middle of a transaction, with the lock that every writer needs. The
/// others go on; and once it is back its transaction is done, once.
async fn who_is_cut_off_holds_nobody_up(server: &Server) {
    let direct = open(&server.database("cut_off").await).await;
    let proxy = Proxy::start(server.port).await;
    let gone = open(&server.at("cut_off", proxy.port)).await;
    put(&gone, "warm", b"").await;
    assert!(!server.is_locked("cut_off").await, "positive control");
    // who looks for news asks over connections of its own, of which some fall into the silence: BEGIN, SELECT … FOR UPDATE
    let mut locked = false;
    for after in 2..10 {
        proxy.hush(after);
        let writer = tokio::spawn({
            let gone = gone.clone();
            async move { put(&gone, "gone", b"x").await }
        });
        proxy.hushed().await;
        locked = server.is_locked("cut_off").await;
        if locked {
            put(&direct, "others", b"x").await;
        }
        proxy.speak();
        writer.await.unwrap();
        if locked {
            break;
        }
    }
    assert!(locked, "positive control: the lock was held");
    let logged = "SELECT COUNT(*) FROM meshd_log";
    let revision = server.number("cut_off", "SELECT revision FROM meshd_state").await;
    assert_eq!(server.number("cut_off", logged).await, revision, "each once");
}

/// Somebody kills every session again and again: what was acknowledged is there, and nothing is there twice.
async fn sessions_are_killed(server: &Server) {
    const WRITES: u32 = 150;
    let database = server.database("killed").await;
    let store = Arc::new(open(&database).await);
    let mut watch = store.watch("", 0).await.unwrap();
    let writer = {
        let store = store.clone();
        tokio::spawn(async move {
            for n in 0..WRITES {
                assert_eq!(put(&*store, &format!("{n:04}"), b"x").await, u64::from(n) + 1);
            }
        })
    };
    let mut kills = 0;
    while !writer.is_finished() {
        match server.kind {
            Kind::Postgres => {
                let kill =
                    "SELECT COUNT(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'meshd'";
                kills += server.number("killed", kill).await;
            }
            Kind::MariaDb => {
                server.admin("killed", &format!("KILL USER {}", servers::USER)).await;
                kills += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    writer.await.unwrap();
    assert!(kills > 1, "positive control: {kills} kills");
    let mut seen = Vec::new();
    while seen.len() < WRITES as usize {
        seen.extend(next(&mut watch).await.iter().map(Event::revision));
    }
    assert_eq!(seen, (1..=u64::from(WRITES)).collect::<Vec<_>>(), "the watch lost nothing either");
}

fn a_restart_under_a_watch(server: &mut Server) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (store, mut watch) = runtime.block_on(async {
        let store = open(&server.database("restart").await).await;
        put(&store, "a", b"1").await;
        let watch = store.watch("", 0).await.unwrap();
        (store, watch)
    });
    assert_eq!(runtime.block_on(next(&mut watch)).len(), 1);
    server.kill();
    let (waiting, asked) = (store.clone(), store.clone());
    let written = runtime.spawn(async move { put(&waiting, "b", b"2").await });
    let error = runtime.block_on(async move { asked.range("").await.unwrap_err() });
    assert!(matches!(&error, StoreError::Unavailable { .. }), "{error}");
    server.run();
    runtime.block_on(async {
        assert_eq!(written.await.unwrap(), 2, "a write waits for it");
        assert_eq!(next(&mut watch).await.iter().map(Event::key).collect::<Vec<_>>(), ["b"], "and so does a watch");
    });
}

async fn put(store: &dyn Store, key: &str, value: &[u8]) -> u64 {
    match store.txn(Txn { compares: vec![], ops: vec![Op::put(key, value)] }).await {
        Ok(Outcome::Done(revision)) => revision,
        other => panic!("{key}: {other:?}"),
    }
}

async fn next(watch: &mut Watch) -> Vec<Event> {
    let next = tokio::time::timeout(Duration::from_secs(20), watch.recv()).await.expect("a watch goes on");
    next.expect("goes on").expect("no error")
}

/// Not a test: how many transactions a second, and how many connections. `cargo test --test datastores -- --ignored`
#[test]
#[ignore = "a measurement"]
fn rates() {
    for kind in [Kind::MariaDb, Kind::Postgres] {
        let Some(server) = Server::start(kind, true) else { continue };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let database = server.database("rates").await;
            let (a, b) = (Arc::new(open(&database).await), Arc::new(open(&database).await));
            let _watch = a.watch("", 0).await.unwrap();
            for (who, stores, at_once) in
                [("one server", vec![&a], 1), ("one server", vec![&a], 16), ("two", vec![&a, &b], 16)]
            {
                let begun = std::time::Instant::now();
                let each = 500 / at_once;
                let writers = stores.iter().flat_map(|store| {
                    (0..at_once).map(move |n| async move {
                        for _ in 0..each {
                            put(&***store, &format!("k/{n}"), &[7; 300]).await;
                        }
                    })
                });
                let writers: Vec<_> = writers.collect();
                let count = writers.len() * each;
                futures::future::join_all(writers).await;
                let rate = count as f64 / begun.elapsed().as_secs_f64();
                println!("{kind:?}: {who}, {at_once} at once: {rate:.0} transactions a second");
            }
            let count = match kind {
                Kind::MariaDb => {
                    format!("SELECT COUNT(*) FROM information_schema.processlist WHERE user = '{}'", servers::USER)
                }
                Kind::Postgres => "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = 'meshd'".to_owned(),
            };
            let connections = server.number("rates", &count).await;
            println!("{kind:?}: {} connections a server", connections as f64 / 2.0);
        });
    }
}
