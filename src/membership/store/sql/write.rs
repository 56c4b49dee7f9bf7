//! One writing transaction, statement by statement.
//!
//! Knows what is written and in which order; not what happens when it fails, which is the store's to decide.

use super::connection::{Connection, Value};
use super::{schema, signed, unsigned};
use crate::membership::store::{LeaseId, Op, Outcome, Revision, StoreError, Txn};

/// So many revisions stay in the log; it is cut each [`CUT`].
const KEEP: u64 = 10_000;
const CUT: u64 = 1_000;
/// What a writing transaction is to do.
pub(super) enum Work {
    Txn(Txn),
    /// Ends a lease; where it is to be over already, only if it still is.
    End {
        lease: LeaseId,
        over: bool,
    },
    /// Drops the log up to a revision.
    Compact(Revision),
}

/// Why an attempt at a transaction failed.
pub(super) enum Failure {
    Sql(sqlx::Error),
    Store(StoreError),
    /// No answer in time.
    Slow,
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Failure::Sql(error)
    }
}

/// One transaction, from its beginning to its end. `perhaps` is the revision that an earlier attempt may have made.
pub(super) async fn attempt(
    c: &mut Connection,
    work: &Work,
    tag: i64,
    perhaps: &mut Option<Revision>,
) -> Result<Outcome, Failure> {
    c.begin().await?;
    let now = c.rows("SELECT revision FROM meshd_state WHERE id = 0{lock}", &[]).await?;
    let now = unsigned(schema::first(&now)?.number(0)?);
    if let Some(revision) = perhaps.take() {
        // The lock is ours, so whoever held that connection's transaction is done with it, one way or the other.
        let found = c.rows("SELECT tag FROM meshd_log WHERE revision = ?", &[Value::Number(signed(revision))]).await?;
        if found.first().map(|row| row.number(0)).transpose()? == Some(tag) {
            c.script("ROLLBACK").await?;
            return Ok(Outcome::Done(revision));
        }
    }
    let revision = now + 1;
    let mut changed = false;
    match work {
        Work::Txn(txn) => {
            for compare in &txn.compares {
                let found = c.rows("SELECT modified FROM meshd_kv WHERE name = ?", &[Value::Key(&compare.key)]).await?;
                let found = found.first().map(|row| row.number(0)).transpose()?.map_or(0, unsigned);
                if found != compare.modified {
                    c.script("ROLLBACK").await?;
                    return Ok(Outcome::Conflict);
                }
            }
            for op in &txn.ops {
                changed |= match op {
                    Op::Put { key, value, lease } => put(c, key, value, *lease, revision, tag).await?,
                    Op::Delete { key } => delete(c, key, revision, tag).await?,
                };
            }
        }
        Work::End { lease, over } => {
            let id = Value::Number(signed(lease.0));
            let ended = if *over { " AND ends <= {now}" } else { "" };
            if c.run(&format!("DELETE FROM meshd_lease WHERE id = ?{ended}"), &[id]).await? > 0 {
                for row in c.rows("SELECT name FROM meshd_kv WHERE lease = ?", &[id]).await? {
                    if let Some(key) = row.key(0)? {
                        changed |= delete(c, &key, revision, tag).await?;
                    }
                }
            }
        }
        Work::Compact(upto) => cut(c, *upto).await?,
    }
    if changed {
        c.run("UPDATE meshd_state SET revision = ? WHERE id = 0", &[Value::Number(signed(revision))]).await?;
        if revision.is_multiple_of(CUT) && revision > KEEP {
            cut(c, revision - KEEP).await?;
        }
        if let Connection::Postgres(_) = c {
            c.script("SELECT pg_notify('meshd', '')").await?;
        }
        *perhaps = Some(revision);
    }
    c.commit().await?;
    Ok(Outcome::Done(if changed { revision } else { now }))
}

async fn put(
    c: &mut Connection,
    key: &str,
    value: &[u8],
    lease: Option<LeaseId>,
    revision: Revision,
    tag: i64,
) -> Result<bool, Failure> {
    let lease = lease.map(|lease| signed(lease.0));
    if let Some(id) = lease {
        let alive = "SELECT ends FROM meshd_lease WHERE id = ? AND ends > {now}";
        if c.rows(alive, &[Value::Number(id)]).await?.is_empty() {
            return Err(Failure::Store(StoreError::NoLease));
        }
    }
    let number = Value::Number(signed(revision));
    let values = [Value::Key(key), Value::Bytes(value), number, number, Value::Maybe(lease)];
    c.run("INSERT INTO meshd_kv (name, value, created, modified, lease) VALUES (?, ?, ?, ?, ?) {upsert}", &values)
        .await?;
    let log = "INSERT INTO meshd_log (revision, name, value, created, lease, tag)
               SELECT modified, name, value, created, lease, ? FROM meshd_kv WHERE name = ?";
    c.run(log, &[Value::Number(tag), Value::Key(key)]).await?;
    Ok(true)
}

async fn delete(c: &mut Connection, key: &str, revision: Revision, tag: i64) -> Result<bool, Failure> {
    if c.run("DELETE FROM meshd_kv WHERE name = ?", &[Value::Key(key)]).await? == 0 {
        return Ok(false);
    }
    let log = "INSERT INTO meshd_log (revision, name, created, tag) VALUES (?, ?, 0, ?)";
    c.run(log, &[Value::Number(signed(revision)), Value::Key(key), Value::Number(tag)]).await?;
    Ok(true)
}

async fn cut(c: &mut Connection, upto: Revision) -> Result<(), sqlx::Error> {
    let upto = Value::Number(signed(upto));
    c.run("DELETE FROM meshd_log WHERE revision <= ?", &[upto]).await?;
    c.run("UPDATE meshd_state SET compacted = ? WHERE id = 0 AND compacted < ?", &[upto, upto]).await.map(drop)
}
