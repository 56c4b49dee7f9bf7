//! One connection to any of the three engines, and what differs between them in a statement.
//!
//! Statements are written once, with `?` for values and four words in braces: `{lock}` holds a row until the transaction
//! ends, `{now}` is the time in milliseconds by which leases end, `{beyond}` a value behind all keys with a prefix, and
//! `{upsert}` what turns an insert of a key into its update.

use std::time::Instant;

use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgRow};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection as _, Executor, Row as _};

/// The database ends a transaction of which it has heard nothing for so long: whoever began it has gone, stands still or is
/// cut off, and all others wait for it.
const IDLE_SECONDS: u32 = 5;

/// How to connect.
#[derive(Clone)]
pub(super) enum Options {
    /// A file, and when it was opened, from which its leases count: it has no clock but this process'.
    Sqlite(Box<SqliteConnectOptions>, Instant),
    MySql(Box<MySqlConnectOptions>),
    Postgres(Box<PgConnectOptions>),
}

/// A connection.
pub(super) enum Connection {
    Sqlite(SqliteConnection, Instant),
    MySql(MySqlConnection),
    Postgres(PgConnection),
}

/// A value that a statement takes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    /// Compares by its bytes, whatever the database's collation.
    Key(&'a str),
    Bytes(&'a [u8]),
    Number(i64),
    Maybe(Option<i64>),
}

/// A row that a statement gives.
pub(super) enum Row {
    Sqlite(SqliteRow),
    MySql(MySqlRow),
    Postgres(PgRow),
}

/// Binds values to a statement; a key is text in SQLite's tables and bytes in the others.
macro_rules! bound {
    ($text:expr, $values:expr, $key:path) => {{
        let mut query = sqlx::query(AssertSqlSafe($text));
        for value in $values {
            query = match *value {
                Value::Key(key) => query.bind($key(key)),
                Value::Bytes(bytes) => query.bind(bytes),
                Value::Number(number) => query.bind(number),
                Value::Maybe(number) => query.bind(number),
            };
        }
        query
    }};
}

impl Options {
    /// Connects, and sets the session up.
    pub(super) async fn connect(&self) -> Result<Connection, sqlx::Error> {
        match self {
            Options::Sqlite(options, opened) => Ok(Connection::Sqlite(options.connect().await?, *opened)),
            Options::MySql(options) => {
                let mut connection = options.connect().await?;
                // A row lock that somebody holds for so long is an error; reads of a Galera node wait for what others
                // have committed. Not every server knows every one.
                let isolation = "TRANSACTION ISOLATION LEVEL REPEATABLE READ";
                for setting in [isolation, "innodb_lock_wait_timeout = 5", "wsrep_sync_wait = 7"] {
                    set_mysql(&mut connection, setting).await?;
                }
                // Who stands still, or is cut off, in the middle of a transaction holds the lock that every writer needs.
                // MySQL knows no limit of a transaction alone: there who writes seldom connects anew.
                let idle = format!("idle_transaction_timeout = {IDLE_SECONDS}");
                if !set_mysql(&mut connection, &idle).await? {
                    set_mysql(&mut connection, &format!("wait_timeout = {}", 4 * IDLE_SECONDS)).await?;
                }
                Ok(Connection::MySql(connection))
            }
            Options::Postgres(options) => {
                let mut connection = options.connect().await?;
                let settings = format!(
                    "SET default_transaction_isolation = 'read committed'; SET lock_timeout = '5s';
                    SET statement_timeout = '15s'; SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s';
                    SELECT set_config('synchronous_commit', 'on', false)
                        WHERE current_setting('synchronous_commit') = 'off'"
                );
                sqlx::raw_sql(AssertSqlSafe(settings)).execute(&mut connection).await?;
                Ok(Connection::Postgres(connection))
            }
        }
    }
}

impl Connection {
    /// Runs a statement; how many rows it changed.
    pub(super) async fn run(&mut self, text: &str, values: &[Value<'_>]) -> Result<u64, sqlx::Error> {
        let text = self.dialect(text);
        Ok(match self {
            Connection::Sqlite(c, _) => bound!(text, values, same).execute(c).await?.rows_affected(),
            Connection::MySql(c) => bound!(text, values, str::as_bytes).execute(c).await?.rows_affected(),
            Connection::Postgres(c) => bound!(text, values, str::as_bytes).execute(c).await?.rows_affected(),
        })
    }

    /// The rows of a query.
    pub(super) async fn rows(&mut self, text: &str, values: &[Value<'_>]) -> Result<Vec<Row>, sqlx::Error> {
        let text = self.dialect(text);
        Ok(match self {
            Connection::Sqlite(c, _) => {
                bound!(text, values, same).fetch_all(c).await?.into_iter().map(Row::Sqlite).collect()
            }
            Connection::MySql(c) => {
                bound!(text, values, str::as_bytes).fetch_all(c).await?.into_iter().map(Row::MySql).collect()
            }
            Connection::Postgres(c) => {
                bound!(text, values, str::as_bytes).fetch_all(c).await?.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    /// Runs statements as they are, separated by semicolons.
    pub(super) async fn script(&mut self, text: impl Into<String>) -> Result<(), sqlx::Error> {
        let script = sqlx::raw_sql(AssertSqlSafe(text.into()));
        match self {
            Connection::Sqlite(c, _) => script.execute(c).await.map(drop),
            Connection::MySql(c) => script.execute(c).await.map(drop),
            Connection::Postgres(c) => script.execute(c).await.map(drop),
        }
    }

    /// Begins a transaction that will write.
    pub(super) async fn begin(&mut self) -> Result<(), sqlx::Error> {
        let begin = if matches!(self, Connection::Sqlite(..)) { "BEGIN IMMEDIATE" } else { "BEGIN" };
        self.script(begin).await
    }

    pub(super) async fn commit(&mut self) -> Result<(), sqlx::Error> {
        self.script("COMMIT").await
    }

    /// Takes everything back; whether the connection can be used further.
    pub(super) async fn rollback(&mut self) -> bool {
        // SQLite has done so already after some errors, and then says that there is nothing to take back
        self.script("ROLLBACK").await.is_ok() || matches!(self, Connection::Sqlite(..))
    }

    /// Ends it in good order.
    pub(super) async fn close(self) {
        let _ = match self {
            Connection::Sqlite(c, _) => c.close().await,
            Connection::MySql(c) => c.close().await,
            Connection::Postgres(c) => c.close().await,
        };
    }

    /// The statement in this engine's words.
    fn dialect(&self, text: &str) -> String {
        let now;
        let (lock, now, beyond, upsert) = match self {
            Connection::Sqlite(_, opened) => {
                now = opened.elapsed().as_millis().to_string();
                ("", now.as_str(), "CAST(? AS TEXT)", ON_CONFLICT)
            }
            Connection::MySql(_) => {
                let replace = "ON DUPLICATE KEY UPDATE value = VALUES(value), modified = VALUES(modified), \
                               lease = VALUES(lease)";
                (" FOR UPDATE", "CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)", "?", replace)
            }
            Connection::Postgres(_) => {
                (" FOR UPDATE", "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS bigint)", "?", ON_CONFLICT)
            }
        };
        let text = text.replace("{lock}", lock).replace("{now}", now).replace("{beyond}", beyond);
        let text = text.replace("{upsert}", upsert);
        if !matches!(self, Connection::Postgres(_)) {
            return text;
        }
        let mut numbered = String::with_capacity(text.len() + 16);
        for (at, part) in text.split('?').enumerate() {
            if at > 0 {
                numbered.push_str(&format!("${at}"));
            }
            numbered.push_str(part);
        }
        numbered
    }
}

const ON_CONFLICT: &str = "ON CONFLICT (name) DO UPDATE SET value = excluded.value, modified = excluded.modified, \
                           lease = excluded.lease";

impl Row {
    pub(super) fn number(&self, at: usize) -> Result<i64, sqlx::Error> {
        match self {
            Row::Sqlite(row) => row.try_get(at),
            Row::MySql(row) => row.try_get(at),
            Row::Postgres(row) => row.try_get(at),
        }
    }

    pub(super) fn maybe(&self, at: usize) -> Result<Option<i64>, sqlx::Error> {
        match self {
            Row::Sqlite(row) => row.try_get(at),
            Row::MySql(row) => row.try_get(at),
            Row::Postgres(row) => row.try_get(at),
        }
    }

    pub(super) fn bytes(&self, at: usize) -> Result<Option<Vec<u8>>, sqlx::Error> {
        match self {
            Row::Sqlite(row) => row.try_get(at),
            Row::MySql(row) => row.try_get(at),
            Row::Postgres(row) => row.try_get(at),
        }
    }

    pub(super) fn text(&self, at: usize) -> Result<String, sqlx::Error> {
        match self {
            Row::Sqlite(row) => row.try_get(at),
            Row::MySql(row) => row.try_get(at),
            Row::Postgres(row) => row.try_get(at),
        }
    }

    /// A key, where there is one.
    pub(super) fn key(&self, at: usize) -> Result<Option<String>, sqlx::Error> {
        if let Row::Sqlite(row) = self {
            return row.try_get(at);
        }
        let key = self.bytes(at)?.map(String::from_utf8).transpose();
        key.map_err(|error| sqlx::Error::Decode(error.into()))
    }
}

/// Whether this server knows the setting.
async fn set_mysql(connection: &mut MySqlConnection, setting: &str) -> Result<bool, sqlx::Error> {
    match connection.execute(AssertSqlSafe(format!("SET SESSION {setting}"))).await {
        Ok(_) => Ok(true),
        // ER_UNKNOWN_SYSTEM_VARIABLE
        Err(error) if mysql_number(&error) == Some(1193) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The number of a MySQL server's error.
pub(super) fn mysql_number(error: &sqlx::Error) -> Option<u16> {
    let error = error.as_database_error()?.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>()?;
    Some(error.number())
}

fn same(key: &str) -> &str {
    key
}
