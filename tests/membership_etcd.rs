//! The etcd store, against a real etcd: what every store must do, and what the death of members does to it.

#[path = "membership/etcds.rs"]
mod etcds;
#[path = "membership/harness.rs"]
#[allow(dead_code)]
mod harness;
#[path = "membership/secured.rs"]
mod secured;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use etcds::Etcds;
use meshd::membership::api::News;
use meshd::membership::clock::Now;
use meshd::membership::record::Role;
use meshd::membership::registry::{Registry, Setup};
use meshd::membership::server::Server;
use meshd::membership::settings::{Datastore, Secret};
use meshd::membership::store::etcd::{Access, Etcd, Gateway, PREFIX};
use meshd::membership::store::{Compare, Event, KeyValue, Op, Outcome, Store, StoreError, Txn, check, conformance};

fn put(key: &str, value: &[u8]) -> Txn {
    Txn { compares: vec![], ops: vec![Op::put(key, value)] }
}

#[tokio::test(flavor = "multi_thread")]
async fn does_what_every_store_must() {
    let Some(etcds) = Etcds::start("does_what_every_store_must", 1).await else { return };
    let store = etcds.store().await;
    tokio::time::timeout(Duration::from_secs(60), conformance::check(&store)).await.unwrap();
}

/// Servers over the store: what one stores, all know, under the same revisions.
#[tokio::test(flavor = "multi_thread")]
async fn servers_over_one_store_know_the_same() {
    let Some(etcds) = Etcds::start("servers_over_one_store_know_the_same", 1).await else { return };
    let mut servers = Vec::new();
    for _ in 0..3 {
        let store: Arc<dyn Store> = Arc::new(etcds.store().await);
        let setup = Setup { secret: Some(Secret::new("of them all")), shared: true, ..harness::setup() };
        let registry = Arc::new(Registry::open(store, setup, Now::read()).await.unwrap());
        let server = Server::start("127.0.0.1:0".parse().unwrap(), registry.clone(), &["127.0.0.1".to_owned()]).await;
        let followed = registry.clone();
        tokio::spawn(async move { panic!("{}", followed.follow().await) });
        servers.push((registry, server.unwrap()));
    }
    let registries: Vec<_> = servers.iter().map(|(registry, _)| registry.clone()).collect();
    let token = registries[0].mint(Now::read(), Role::Agent, None, None, None, "").await.unwrap();
    until("the token is known everywhere", || registries.iter().all(|r| r.is_good(Now::read(), &token))).await;

    // thirty at once, ten at each server
    let joins = (0..30).map(|n| {
        let (address, token) = (servers[n % 3].1.address().into(), token.clone());
        async move { drop(harness::join(&address, &token, &format!("n{n}"), Role::Agent).await.unwrap()) }
    });
    futures::future::join_all(joins).await;
    until("all know all", || registries.iter().all(|r| r.records().len() == 30)).await;
    let list = |r: &Arc<Registry>| r.records().into_iter().map(|n| (n.id, n.subnets)).collect::<Vec<_>>();
    assert!(registries.iter().all(|r| list(r) == list(&registries[0])), "and the same of all");
    let subnets: std::collections::HashSet<_> = list(&registries[0]).into_iter().flat_map(|(_, nets)| nets).collect();
    assert_eq!(subnets.len(), 30, "no subnet is there twice");
    let News::List { revision, .. } = registries[0].local_news(None) else { panic!("a list") };
    let late = harness::join(&servers[0].1.address().into(), &token, "late", Role::Agent).await.unwrap();
    until("all know it", || registries.iter().all(|r| r.has(&late.member.id))).await;
    for registry in &registries {
        let news = registry.local_news(Some(revision));
        assert!(matches!(&news, News::Delta { upsert, .. } if upsert.len() == 1), "a change, and no list: {news:?}");
    }
}

/// A server that finds more of the audit log than it wants removes that by and by, and not all in one change that etcd refuses.
#[tokio::test(flavor = "multi_thread")]
async fn too_long_an_audit_log_stops_no_change() {
    let Some(etcds) = Etcds::start("too_long_an_audit_log_stops_no_change", 1).await else { return };
    let store = etcds.store().await;
    let setup = || Setup { secret: Some(Secret::new("of them all")), shared: true, ..harness::setup() };
    let open = async || Registry::open(Arc::new(etcds.store().await), setup(), Now::read()).await.unwrap();
    drop(open().await);
    let key = |n: u64| format!("audit/{n:012}-{n:08}");
    for part in (0..1300).collect::<Vec<_>>().chunks(100) {
        let ops = part.iter().map(|n| Op::put(key(*n), *br#"{"at":0,"what":"join"}"#)).collect();
        store.txn(Txn { compares: vec![], ops }).await.unwrap();
    }
    // two at once, neither of which knows what the other removes
    let (one, other) = (open().await, open().await);
    for _ in 0..20 {
        for registry in [&one, &other] {
            registry.mint(Now::read(), Role::Agent, None, None, None, "").await.unwrap();
        }
    }
    assert_eq!(one.audit().await.unwrap().len(), 1000);
}

async fn until(what: &str, good: impl Fn() -> bool) {
    for _ in 0..600 {
        if good() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_is_not_fit_for_is_said() {
    let Some(etcds) = Etcds::start("what_it_is_not_fit_for_is_said", 1).await else { return };
    let store = etcds.store().await;
    let ops = (0..130).map(|n| Op::put(format!("{n}"), *b"x")).collect();
    let refused = store.txn(Txn { compares: vec![], ops }).await;
    assert!(matches!(&refused, Err(StoreError::Unfit { problem, .. }) if problem.contains("too many operations")));
    let refused = store.txn(put("big", &vec![0; 2 << 20])).await;
    assert!(matches!(&refused, Err(StoreError::Unfit { problem, .. }) if problem.contains("too large")), "{refused:?}");
    assert!(store.range("").await.unwrap().items.is_empty(), "nothing was changed");
    store.txn(put("small", b"x")).await.expect("positive control");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_and_a_password_are_needed_where_etcd_says_so() {
    let story = "a_user_and_a_password_are_needed_where_etcd_says_so";
    let Some(etcds) = Etcds::start(story, 1).await else { return };
    for line in ["user add root:pw", "user grant-role root root", "user add other:pw", "auth enable"] {
        etcds.ctl(line);
    }
    let open = async |user: Option<(&str, &str)>| {
        let user = user.map(|(name, password)| (name.to_owned(), Secret::new(password)));
        let access = Access { user, ..etcds.access() };
        let store = Etcd::open(Gateway::new(access), PREFIX).await?;
        store.txn(put("a", b"1")).await
    };
    for (user, hint) in [
        (None, "etcd://USER@HOST"),
        (Some(("root", "wrong")), "password is wrong"),
        (Some(("other", "pw")), "may not read and write"),
    ] {
        let refused = open(user).await.expect_err(hint);
        assert!(matches!(&refused, StoreError::Unfit { problem, .. } if problem.contains(hint)), "{refused:?}");
    }
    open(Some(("root", "pw"))).await.expect("positive control");

    // the same before a server starts, in so many words
    for (user, ok, hint) in [
        ("other:pw@", false, "role grant-permission --prefix=true meshd readwrite meshd/"),
        ("root:pw@", true, ""),
        ("", false, "USER@HOST"),
    ] {
        let (host, port) = etcds.access().endpoints[0].clone();
        let endpoint = Some(Secret::new(format!("etcd://{user}{host}:{port}")));
        let look = check::check(&Datastore { endpoint, ..Datastore::default() }, Path::new("x")).await;
        let told = serde_json::to_string(&look).unwrap();
        assert!(look.ok == ok && told.contains(hint) && !told.contains("pw@"), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_or_no_etcd_is_said() {
    let nobody = Access { endpoints: vec![("127.0.0.1".to_owned(), 1)], ..Access::default() };
    let opened = tokio::time::timeout(Duration::from_secs(2), Etcd::open(Gateway::new(nobody), PREFIX)).await;
    assert!(opened.is_err(), "it is waited for");
    let port = secured::serve(axum::Router::new()).await;
    let other = Access { endpoints: vec![("127.0.0.1".to_owned(), port)], ..Access::default() };
    let opened = Etcd::open(Gateway::new(other), PREFIX).await.err().expect("no etcd");
    assert!(opened.to_string().contains("is it an etcd of 3.4 or later?"), "{opened}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_from_another_store_goes_on_with_later_revisions() {
    let story = "what_came_from_another_store_goes_on_with_later_revisions";
    let Some(etcds) = Etcds::start(story, 1).await else { return };
    let first = etcds.store().await;
    first.txn(put("a", b"1")).await.unwrap();
    let mut before = first.range("").await.unwrap();
    let gateway = Gateway::new(etcds.access());
    assert!(Etcd::import(&gateway, PREFIX, &before).await.is_err(), "it is not empty");
    before.revision = 5_000_000;
    let one = before.items[0].clone();
    before.items.extend((0..250).map(|n| KeyValue { key: format!("more/{n:03}"), ..one.clone() }));
    Etcd::import(&gateway, "copy/", &before).await.unwrap();
    let copy = Etcd::open(gateway, "copy/").await.unwrap();
    let after = copy.range("").await.unwrap();
    assert!(after.revision > before.revision, "{}", after.revision);
    assert_eq!(after.items.len(), before.items.len());
    let stale = Compare { key: "a".to_owned(), modified: before.items[0].modified };
    let txn = Txn { compares: vec![stale], ops: vec![Op::put("a", *b"2")] };
    assert_eq!(copy.txn(txn).await, Ok(Outcome::Conflict), "who saw the other store reads again");
    assert!(matches!(copy.watch("", 17).await.err(), Some(StoreError::Compacted { .. })));
    let Ok(Outcome::Done(revision)) = copy.txn(put("a", b"2")).await else { panic!("it can be written") };
    let mut watch = copy.watch("a", revision - 1).await.unwrap();
    let seen = watch.recv().await.unwrap().unwrap();
    assert!(matches!(&seen[..], [Event::Put(kv)] if kv.key == "a" && kv.modified == revision), "{seen:?}");
    assert_eq!(first.range("").await.unwrap().items.len(), 1, "and the others' keys are not ours");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_and_none_is_done_twice_when_members_die() {
    let story = "no_acknowledged_write_is_lost_and_none_is_done_twice_when_members_die";
    let Some(mut etcds) = Etcds::start(story, 3).await else { return };
    let store = etcds.store().await;
    let mut watch = store.watch("n", 0).await.unwrap();
    let Ok(Outcome::Done(mut at)) = store.txn(put("n", b"0")).await else { panic!("it starts") };
    // Each is a compare-and-set on the one before: done twice or lost, the next would conflict.
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for n in 1..600u32 {
                let compares = vec![Compare { key: "n".to_owned(), modified: at }];
                let ops = vec![Op::put("n", n.to_string())];
                at = match store.txn(Txn { compares, ops }).await {
                    Ok(Outcome::Done(revision)) => revision,
                    other => panic!("{n}: {other:?}"),
                };
            }
        }
    });
    let mut killed = 0;
    while !writer.is_finished() && killed < 3 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let leader = etcds.leader().await;
        etcds.kill(leader);
        tokio::time::sleep(Duration::from_millis(300)).await;
        etcds.restart(leader);
        etcds.healthy().await;
        killed += 1;
    }
    tokio::time::timeout(Duration::from_secs(120), writer).await.unwrap().unwrap();
    assert!(killed > 0);
    assert_eq!(store.range("n").await.unwrap().items[0].value, b"599");
    let mut seen = Vec::new();
    while let Ok(Some(Ok(events))) = tokio::time::timeout(Duration::from_millis(500), watch.recv()).await {
        seen.extend(events.iter().map(|e| match e {
            Event::Put(kv) => String::from_utf8(kv.value.clone()).unwrap().parse::<usize>().unwrap(),
            Event::Delete { .. } => panic!("nothing is deleted"),
        }));
    }
    assert!(
        seen.iter().enumerate().all(|(n, value)| n == *value),
        "in order, each once, until the watch ended: {seen:?}"
    );
}
