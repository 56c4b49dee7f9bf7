//! What every store must do, as one test that any back end can run.

use std::time::Duration;

use super::{Compare, Event, Op, Outcome, Revision, Store, StoreError, Txn};

/// Runs every check against an empty store. Panics, naming what does not hold, where one fails.
pub async fn check(store: &dyn Store) {
    ranges_and_revisions(store).await;
    transactions(store).await;
    only_one_wins(store).await;
    watches(store).await;
    leases(store).await;
    odd_keys(store).await;
}

async fn ranges_and_revisions(store: &dyn Store) {
    let start = revision(store).await;
    assert!(list(store, "r/").await.is_empty(), "the store is not empty");
    let one = put(store, "r/b", b"1").await;
    assert_eq!(one, start + 1, "a change is one revision");
    let two = put(store, "r/a", b"2").await;
    put(store, "rx", b"not in the range").await;
    put(store, "r/b", b"3").await;
    let items = store.range("r/").await.expect("range").items;
    let keys: Vec<_> = items.iter().map(|kv| kv.key.as_str()).collect();
    assert_eq!(keys, ["r/a", "r/b"], "sorted, and the prefix alone");
    assert_eq!((items[0].created, items[0].modified), (two, two));
    assert_eq!((items[1].created, items[1].modified), (one, two + 2), "created stays, modified moves");
    let before = revision(store).await;
    assert_eq!(done(store, Txn { compares: vec![], ops: vec![Op::delete("r/none")] }).await, before, "nothing changed");
    done(store, Txn { compares: vec![], ops: vec![Op::delete("r/b")] }).await;
    let again = put(store, "r/b", b"4").await;
    let items = store.range("r/b").await.expect("range").items;
    assert_eq!(items[0].created, again, "a key that was removed begins anew");
}

async fn transactions(store: &dyn Store) {
    let at = put(store, "t/a", b"1").await;
    let stale = Txn {
        compares: vec![Compare { key: "t/a".into(), modified: at - 1 }],
        ops: vec![Op::put("t/a", *b"x"), Op::put("t/b", *b"x")],
    };
    assert_eq!(store.txn(stale).await, Ok(Outcome::Conflict));
    assert!(list(store, "t/b").await.is_empty(), "a conflict changes nothing");
    assert_eq!(revision(store).await, at, "and is no revision");
    let absent = |key: &str| Compare { key: key.into(), modified: 0 };
    let good = Txn {
        compares: vec![Compare { key: "t/a".into(), modified: at }, absent("t/b")],
        ops: vec![Op::put("t/a", *b"2"), Op::put("t/b", *b"2"), Op::delete("r/a")],
    };
    let rev = done(store, good).await;
    assert_eq!(rev, at + 1, "one revision for all its steps");
    let both = store.range("t/").await.expect("range");
    assert!(both.items.iter().all(|kv| kv.modified == rev && kv.value == b"2"));
    assert_eq!(
        store.txn(Txn { compares: vec![absent("t/b")], ops: vec![Op::put("t/b", *b"3")] }).await,
        Ok(Outcome::Conflict)
    );
}

async fn only_one_wins(store: &dyn Store) {
    let at = put(store, "w", b"").await;
    let tries = (0..20u8).map(|n| {
        let compares = vec![Compare { key: "w".into(), modified: at }];
        store.txn(Txn { compares, ops: vec![Op::put("w", [n])] })
    });
    let outcomes = futures::future::join_all(tries).await;
    let won = outcomes.iter().filter(|o| matches!(o, Ok(Outcome::Done(_)))).count();
    let lost = outcomes.iter().filter(|o| matches!(o, Ok(Outcome::Conflict))).count();
    assert_eq!((won, lost), (1, 19), "of those that compare with the same revision exactly one wins");
}

async fn watches(store: &dyn Store) {
    let start = revision(store).await;
    put(store, "o/a", b"1").await;
    put(store, "other", b"1").await;
    let mut watch = store.watch("o/", start).await.expect("watch");
    done(store, Txn { compares: vec![], ops: vec![Op::delete("o/a"), Op::put("o/b", *b"2")] }).await;
    let mut seen: Vec<Event> = Vec::new();
    while seen.len() < 3 {
        let next = tokio::time::timeout(Duration::from_secs(5), watch.recv()).await.expect("a watch is prompt");
        seen.extend(next.expect("goes on").expect("no error"));
    }
    let what: Vec<_> = seen.iter().map(|e| (e.key(), e.revision() - start, matches!(e, Event::Put(_)))).collect();
    assert_eq!(
        what,
        [("o/a", 1, true), ("o/a", 3, false), ("o/b", 3, true)],
        "from the past into the present, in order"
    );
    let mut resumed = store.watch("o/", start + 1).await.expect("watch");
    let next = resumed.recv().await.expect("goes on").expect("no error");
    assert_eq!(next.len(), 2, "resumes behind its revision: {next:?}");
    let future = revision(store).await + 1000;
    let refused = store.watch("o/", future).await.err();
    assert!(
        matches!(refused, Some(StoreError::Compacted { .. })),
        "a revision that never was: list again; {refused:?}"
    );
}

async fn leases(store: &dyn Store) {
    let ttl = Duration::from_millis(1000);
    let (kept, lost) = (store.grant(ttl).await.expect("grant"), store.grant(ttl).await.expect("grant"));
    assert_ne!(kept, lost);
    let leased = |key: &str, lease| Op::Put { key: key.into(), value: vec![], lease: Some(lease) };
    done(store, Txn { compares: vec![], ops: vec![leased("l/kept", kept), leased("l/lost", lost)] }).await;
    // A store may lengthen a lease, but not for ever.
    let mut left = list(store, "l/").await;
    for _ in 0..40 {
        assert!(left.contains(&"l/kept".to_owned()), "a lease that is kept stays");
        if left.len() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
        store.keep_alive(kept).await.expect("keep alive");
        left = list(store, "l/").await;
    }
    assert_eq!(left, ["l/kept"], "a lease that nobody keeps takes its keys along");
    assert_eq!(store.keep_alive(lost).await, Err(StoreError::NoLease));
    let dead = Txn { compares: vec![], ops: vec![leased("l/dead", lost)] };
    assert_eq!(store.txn(dead).await, Err(StoreError::NoLease));
    store.revoke(kept).await.expect("revoke");
    assert!(list(store, "l/").await.is_empty(), "and so does one that is revoked");
}

async fn odd_keys(store: &dyn Store) {
    for key in ["q/'; DROP TABLE kv; --", "q/%_*?[a]", "q/\u{1F980}\"\\", "q/"] {
        put(store, key, b"x").await;
        assert!(list(store, key).await.contains(&key.to_owned()), "{key:?}");
    }
    assert_eq!(list(store, "q/%").await.len(), 1, "no wildcard in a prefix");
    // by their bytes: no case, no accent, no trailing blank is like another
    let keys = ["y/", "y/A", "y/a", "y/a ", "y/a\u{301}", "y/\u{e1}"];
    for key in keys.iter().rev() {
        put(store, key, key.as_bytes()).await;
    }
    assert_eq!(list(store, "y/").await, keys, "sorted by bytes, and none is another");
    assert_eq!(list(store, "y/a").await, keys[2..5], "nor in a prefix");
    let big = vec![0xa5; 1 << 20];
    put(store, "q/big", &big).await;
    assert_eq!(store.range("q/big").await.expect("range").items[0].value, big);
}

async fn revision(store: &dyn Store) -> Revision {
    store.range("nothing-here").await.expect("range").revision
}

async fn list(store: &dyn Store, prefix: &str) -> Vec<String> {
    store.range(prefix).await.expect("range").items.into_iter().map(|kv| kv.key).collect()
}

async fn put(store: &dyn Store, key: &str, value: &[u8]) -> Revision {
    done(store, Txn { compares: vec![], ops: vec![Op::put(key, value)] }).await
}

async fn done(store: &dyn Store, txn: Txn) -> Revision {
    match store.txn(txn).await {
        Ok(Outcome::Done(revision)) => revision,
        other => panic!("the transaction should be done: {other:?}"),
    }
}
