//! The SQLite store: what every store must do, and what a disk and a `kill -9` do to it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use meshd::membership::store::sqlite::{self, Sqlite};
use meshd::membership::store::{Op, Outcome, Store, StoreError, Txn, conformance};

fn txn(key: &str, value: &[u8]) -> Txn {
    Txn { compares: vec![], ops: vec![Op::put(key, value)] }
}

#[tokio::test(flavor = "multi_thread")]
async fn does_what_every_store_must() {
    let dir = tempfile::tempdir().unwrap();
    let store = Sqlite::open(&dir.path().join("db")).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), conformance::check(&store)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let store = Sqlite::open(&dir.path().join("db")).await.unwrap();
    store.txn(txn("a", b"1")).await.unwrap();
    store.limit_pages(1).await.unwrap(); // less than there are: no further page
    let refused = store.txn(txn("b", &vec![7; 1 << 20])).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert_eq!(store.range("").await.unwrap().items.len(), 1, "nothing of it is there");
    store.limit_pages(1 << 20).await.unwrap();
    assert!(matches!(store.txn(txn("b", &vec![7; 1 << 20])).await, Ok(Outcome::Done(2))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_newer_or_busy_database_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = Sqlite::open(&path).await.unwrap();
    for n in 0..200 {
        store.txn(txn(&format!("k/{n}"), &[n as u8; 300])).await.unwrap();
    }
    assert!(matches!(Sqlite::open(&path).await.err(), Some(StoreError::InUse { .. })));
    store.close().await;
    drop(store);
    tokio::time::sleep(Duration::from_millis(500)).await; // the lease task lets go
    let good = std::fs::read(&path).unwrap();

    let mut damaged = good.clone();
    let len = damaged.len();
    damaged[4096 * 2..len].iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(&path, &damaged).unwrap();
    let error = Sqlite::open(&path).await.err().expect("damaged");
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("restore"), "{error}");

    std::fs::write(&path, b"this is no database at all, only a text that is long enough to be looked at").unwrap();
    assert!(matches!(Sqlite::open(&path).await.err(), Some(StoreError::Corrupt { .. })));

    let mut newer = good.clone();
    newer[60..64].copy_from_slice(&77u32.to_be_bytes()); // user_version, https://sqlite.org/fileformat.html §1.3
    std::fs::write(&path, &newer).unwrap();
    assert!(matches!(Sqlite::open(&path).await.err(), Some(StoreError::Newer { found: 77, .. })));

    std::fs::write(&path, &good).unwrap();
    assert_eq!(Sqlite::open(&path).await.unwrap().range("k/").await.unwrap().items.len(), 200, "positive control");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_restored_with_later_revisions() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("db"), dir.path().join("copy"));
    let store = Sqlite::open(&path).await.unwrap();
    store.txn(txn("a", b"1")).await.unwrap();
    store.txn(txn("cluster", br#"{"id":"c"}"#)).await.unwrap();
    store.txn(txn("audit/001800000000-00000001-x", b"{}")).await.unwrap();
    sqlite::backup(&path, &copy).await.unwrap();
    assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(sqlite::backup(&path, &copy).await.is_err(), "no backup is overwritten");
    store.txn(txn("b", b"2")).await.unwrap();
    assert!(matches!(sqlite::restore(&copy, &path, None).await, Err(StoreError::InUse { .. })));
    store.close().await;
    drop(store);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(sqlite::restore(Path::new("/dev/null"), &path, None).await.is_err(), "no backup, nothing changed");
    let refused = sqlite::restore(&copy, &path, Some("x")).await.unwrap_err().to_string();
    assert!(refused.contains("a backup of cluster c, and this server belongs to x"), "{refused}");
    let restored = sqlite::restore(&copy, &path, Some("c")).await.unwrap();
    assert_eq!(restored.as_of, Some(1_800_000_000));
    let former = Sqlite::open(&restored.former.unwrap()).await.unwrap();
    assert!(former.range("").await.unwrap().items.iter().any(|kv| kv.key == "b"), "what was there is there still");
    former.close().await;
    drop(former);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let store = Sqlite::open(&path).await.unwrap();
    let back = store.range("").await.unwrap();
    assert_eq!(back.items.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>()[..1], ["a"]);
    assert!(!back.items.iter().any(|kv| kv.key == "b"));
    assert!(back.revision > 1_000_000, "{}", back.revision);
    assert!(matches!(store.watch("", 2).await.err(), Some(StoreError::Compacted { .. })));
}

const WRITER: &str = "MESHD_TEST_STORE_WRITER";

/// Not a test: the process that `kill_9_loses_nothing_acknowledged` kills.
#[tokio::test(flavor = "multi_thread")]
async fn writer() {
    let Ok(path) = std::env::var(WRITER) else { return };
    let store = Sqlite::open(Path::new(&path)).await.unwrap();
    let start = store.range("").await.unwrap().items.len();
    for n in start.. {
        store.txn(txn(&format!("{n:08}"), &[n as u8; 200])).await.unwrap();
        eprintln!("stored {n:08}");
    }
}

#[test]
fn kill_9_loses_nothing_acknowledged() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let mut acknowledged = Vec::new();
    for round in 0..8 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--nocapture"])
            .env(WRITER, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let before = acknowledged.len();
        for line in lines.map_while(Result::ok) {
            acknowledged.extend(line.strip_prefix("stored ").map(str::to_owned));
            if acknowledged.len() == before + 20 + 7 * round {
                child.kill().unwrap(); // SIGKILL; what is still in the pipe is read below
            }
        }
        child.wait().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let kept: Vec<String> = runtime.block_on(async {
            let store = Sqlite::open(&path).await.unwrap();
            store.range("").await.unwrap().items.into_iter().map(|kv| kv.key).collect()
        });
        assert!(acknowledged.len() >= before + 20, "round {round}: the writer wrote");
        assert!(acknowledged.iter().all(|key| kept.contains(key)), "round {round}: lost");
        assert!(kept.len() <= acknowledged.len() + 1, "round {round}: at most one was stored and not yet told");
        acknowledged = kept;
    }
}
