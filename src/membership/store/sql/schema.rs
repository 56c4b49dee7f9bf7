//! The tables: how they come into a database, version by version, and whether a login may use them.
//!
//! A database of version n has seen the first n migrations. Several servers may start at once: PostgreSQL and SQLite
//! migrate in a transaction behind a lock; MySQL commits at each CREATE, so there every statement must do no harm when it
//! is done twice.

use super::connection::{Connection, Row, Value};
use super::errors::{self, Whose};
use crate::membership::store::StoreError;

const SQLITE: &[&str] = &[
    "
    CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
    INSERT INTO state VALUES (0, 0, 0);
    CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB NOT NULL, created INTEGER NOT NULL, modified INTEGER NOT NULL,
                     lease INTEGER) WITHOUT ROWID;
    CREATE TABLE log (revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB, created INTEGER NOT NULL, lease INTEGER,
                      PRIMARY KEY (revision, key)) WITHOUT ROWID;
    CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_ms INTEGER NOT NULL);
    ",
    "
    ALTER TABLE state RENAME TO meshd_state;
    ALTER TABLE kv RENAME COLUMN key TO name;
    ALTER TABLE kv RENAME TO meshd_kv;
    ALTER TABLE log RENAME COLUMN key TO name;
    ALTER TABLE log ADD COLUMN tag INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE log RENAME TO meshd_log;
    CREATE TABLE meshd_lease (id INTEGER PRIMARY KEY, ttl_ms INTEGER NOT NULL, ends INTEGER NOT NULL);
    INSERT INTO meshd_lease SELECT id, ttl_ms, ttl_ms FROM lease;
    DROP TABLE lease;
    ",
];

/// Keys are bytes, so that no collation and no character set of the database has a say in what they are. A key's length
/// is bounded by what InnoDB puts into an index.
const MYSQL: &[&str] = &["
    CREATE TABLE IF NOT EXISTS meshd_state (id INT PRIMARY KEY, revision BIGINT NOT NULL, compacted BIGINT NOT NULL)
        ENGINE = InnoDB;
    INSERT IGNORE INTO meshd_state VALUES (0, 0, 0);
    CREATE TABLE IF NOT EXISTS meshd_kv (name VARBINARY(1024) PRIMARY KEY, value LONGBLOB NOT NULL,
        created BIGINT NOT NULL, modified BIGINT NOT NULL, lease BIGINT, INDEX (lease)) ENGINE = InnoDB ROW_FORMAT = DYNAMIC;
    CREATE TABLE IF NOT EXISTS meshd_log (revision BIGINT NOT NULL, name VARBINARY(1024) NOT NULL, value LONGBLOB,
        created BIGINT NOT NULL, lease BIGINT, tag BIGINT NOT NULL, PRIMARY KEY (revision, name))
        ENGINE = InnoDB ROW_FORMAT = DYNAMIC;
    CREATE TABLE IF NOT EXISTS meshd_lease (id BIGINT PRIMARY KEY, ttl_ms BIGINT NOT NULL, ends BIGINT NOT NULL)
        ENGINE = InnoDB;
"];

const POSTGRES: &[&str] = &["
    CREATE TABLE meshd_state (id INT PRIMARY KEY, revision BIGINT NOT NULL, compacted BIGINT NOT NULL);
    INSERT INTO meshd_state VALUES (0, 0, 0);
    CREATE TABLE meshd_kv (name BYTEA PRIMARY KEY, value BYTEA NOT NULL, created BIGINT NOT NULL,
        modified BIGINT NOT NULL, lease BIGINT);
    CREATE INDEX meshd_kv_lease ON meshd_kv (lease) WHERE lease IS NOT NULL;
    CREATE TABLE meshd_log (revision BIGINT NOT NULL, name BYTEA NOT NULL, value BYTEA, created BIGINT NOT NULL,
        lease BIGINT, tag BIGINT NOT NULL, PRIMARY KEY (revision, name));
    CREATE TABLE meshd_lease (id BIGINT PRIMARY KEY, ttl_ms BIGINT NOT NULL, ends BIGINT NOT NULL);
"];

/// The longest key, in bytes.
pub(super) const MAX_KEY: usize = 1024;
/// The tables, after `meshd_schema`.
const TABLES: [(&str, &str); 4] =
    [("meshd_state", "revision"), ("meshd_kv", "lease"), ("meshd_log", "lease"), ("meshd_lease", "ends")];
/// Of the lock that PostgreSQL's migrations are behind: "meshd" in ASCII.
const LOCK: i64 = 0x006d_6573_6864;

/// Brings the tables to this version.
pub(super) async fn migrate(connection: &mut Connection, whose: &Whose, place: &str) -> Result<(), StoreError> {
    let fail = |e: sqlx::Error| errors::told(whose, &e);
    let migrations = migrations(connection);
    let known = known(connection);
    let found = version(connection).await.map_err(fail)?;
    if found > known || found < 0 {
        return Err(StoreError::Newer { place: place.to_owned(), found, known });
    }
    if found == known {
        return Ok(());
    }
    match connection {
        Connection::MySql(_) => migrate_mysql(connection, migrations).await.map_err(fail),
        _ => {
            connection.begin().await.map_err(fail)?;
            let done = migrate_at_once(connection, migrations).await;
            if done.is_err() {
                connection.rollback().await;
            }
            done.map_err(fail)?;
            connection.commit().await.map_err(fail)
        }
    }
}

/// The version of the tables; 0 where there are none.
pub(super) async fn version(connection: &mut Connection) -> Result<i64, sqlx::Error> {
    if let Connection::Sqlite(..) = connection {
        return first(&connection.rows("PRAGMA user_version", &[]).await?)?.number(0);
    }
    match connection.rows("SELECT MAX(version) FROM meshd_schema", &[]).await {
        Ok(rows) => Ok(first(&rows)?.maybe(0)?.unwrap_or(0)),
        Err(error) if errors::is_no_table(&error) => Ok(0),
        Err(error) => Err(error),
    }
}

/// The latest version that is known here.
pub(super) fn known(connection: &Connection) -> i64 {
    migrations(connection).len() as i64
}

fn migrations(connection: &Connection) -> &'static [&'static str] {
    match connection {
        Connection::Sqlite(..) => SQLITE,
        Connection::MySql(_) => MYSQL,
        Connection::Postgres(_) => POSTGRES,
    }
}

async fn migrate_at_once(connection: &mut Connection, migrations: &[&str]) -> Result<(), sqlx::Error> {
    let postgres = matches!(connection, Connection::Postgres(_));
    if postgres {
        connection.script(format!("SELECT pg_advisory_xact_lock({LOCK})")).await?;
        connection.script("CREATE TABLE IF NOT EXISTS meshd_schema (version BIGINT PRIMARY KEY)").await?;
    }
    // again, now that nobody else migrates
    let found = usize::try_from(version(connection).await?).unwrap_or(0);
    for (at, script) in migrations.iter().enumerate().skip(found) {
        connection.script(*script).await?;
        let version = at + 1;
        let note = match connection {
            Connection::Postgres(_) => format!("INSERT INTO meshd_schema VALUES ({version})"),
            _ => format!("PRAGMA user_version = {version}"),
        };
        connection.script(note).await?;
    }
    Ok(())
}

async fn migrate_mysql(connection: &mut Connection, migrations: &[&str]) -> Result<(), sqlx::Error> {
    let table = "CREATE TABLE IF NOT EXISTS meshd_schema (version BIGINT PRIMARY KEY) ENGINE = InnoDB";
    connection.script(table).await?;
    let found = usize::try_from(version(connection).await?).unwrap_or(0);
    for (at, script) in migrations.iter().enumerate().skip(found) {
        for statement in script.split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
            connection.script(statement).await?;
        }
        connection.run("INSERT IGNORE INTO meshd_schema VALUES (?)", &[Value::Number(at as i64 + 1)]).await?;
    }
    Ok(())
}

/// What this login may not do with the tables, found by statements that change nothing: each table with the right.
pub(super) async fn denied(connection: &mut Connection) -> Result<Vec<String>, sqlx::Error> {
    let mut denied = Vec::new();
    for (table, column) in TABLES {
        for (right, statement) in [
            ("SELECT", format!("SELECT 1 FROM {table} WHERE 1 = 0")),
            ("INSERT", format!("INSERT INTO {table} SELECT * FROM {table} WHERE 1 = 0")),
            ("UPDATE", format!("UPDATE {table} SET {column} = {column} WHERE 1 = 0")),
            ("DELETE", format!("DELETE FROM {table} WHERE 1 = 0")),
        ] {
            match connection.script(statement).await {
                Ok(()) => {}
                Err(error) if errors::is_denied(&error) => denied.push(format!("{right} on {table}")),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(denied)
}

/// Whether this login may make the tables; where it may, nothing of the try stays.
pub(super) async fn cannot_create(connection: &mut Connection) -> Result<Vec<String>, sqlx::Error> {
    let table = "meshd_check_of_rights";
    if let Connection::Postgres(_) = connection {
        connection.begin().await?;
    }
    let made = connection.script(format!("CREATE TABLE {table} (id INT PRIMARY KEY)")).await;
    let undone = match connection {
        Connection::Postgres(_) => connection.script("ROLLBACK").await,
        _ if made.is_ok() => connection.script(format!("DROP TABLE {table}")).await,
        _ => Ok(()),
    };
    let mut denied = Vec::new();
    for (right, done) in [("CREATE tables", made), ("DROP tables", undone)] {
        match done {
            Err(error) if errors::is_denied(&error) => denied.push(right.to_owned()),
            done => done?,
        }
    }
    Ok(denied)
}

pub(super) fn first(rows: &[Row]) -> Result<&Row, sqlx::Error> {
    rows.first().ok_or(sqlx::Error::RowNotFound)
}
