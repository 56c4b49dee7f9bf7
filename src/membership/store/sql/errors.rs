//! What an engine's error means for the store, and what a person is to do about it.

use sqlx::postgres::PgDatabaseError;

use super::connection::mysql_number;
use crate::membership::store::StoreError;
use crate::membership::store::endpoint::{Endpoint, Engine};

/// Whose error it is.
#[derive(Debug, Clone)]
pub(super) enum Whose {
    /// Of a file.
    File(String),
    /// Of a database elsewhere.
    Server(Endpoint),
}

/// Whether the same transaction may succeed when it is done again: it was the victim of a deadlock or of Galera's
/// certification, or waited too long for a lock.
pub(super) fn is_conflict(error: &sqlx::Error) -> bool {
    // ER_LOCK_WAIT_TIMEOUT, ER_LOCK_DEADLOCK, and MariaDB's ER_CHECKREAD
    matches!(mysql_number(error), Some(1205 | 1213 | 1020))
        || matches!(sqlstate(error).as_deref(), Some("40001" | "40P01" | "55P03"))
}

/// Whether the connection is gone, or the server is about to go: another connection may do better.
pub(super) fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() != std::io::ErrorKind::InvalidData,
        sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        // shutting down, killed, starting, too many, not prepared yet (Galera), read-only (a former primary), idle for
        // too long (1159; MySQL: 4031)
        _ => {
            let number = mysql_number(error);
            matches!(number, Some(1040 | 1047 | 1053 | 1077 | 1079 | 1080 | 1159 | 1290 | 1317 | 1836 | 1927 | 4031))
                || sqlstate(error).is_some_and(|s| s.starts_with("57P") || s.starts_with("08") || s == "25006")
                || matches!(sqlstate(error).as_deref(), Some("53300" | "25P03"))
        }
    }
}

/// Whether a table is not there.
pub(super) fn is_no_table(error: &sqlx::Error) -> bool {
    mysql_number(error) == Some(1146) || sqlstate(error).as_deref() == Some("42P01")
}

/// Whether the engine says that this user may not.
pub(super) fn is_denied(error: &sqlx::Error) -> bool {
    matches!(mysql_number(error), Some(1044 | 1142 | 1143 | 1227)) || sqlstate(error).as_deref() == Some("42501")
}

/// Whether a row with the same key is there already.
pub(super) fn is_duplicate(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.is_unique_violation())
}

/// The error in the store's words.
pub(super) fn told(whose: &Whose, error: &sqlx::Error) -> StoreError {
    match whose {
        Whose::File(place) => of_file(place.clone(), error),
        Whose::Server(endpoint) => of_server(endpoint, error),
    }
}

/// SQLite's result codes (the low byte of the extended ones): 11 CORRUPT, 13 FULL, 26 NOTADB.
fn of_file(place: String, error: &sqlx::Error) -> StoreError {
    let code = error.as_database_error().and_then(|e| e.code()).and_then(|code| code.parse::<u32>().ok());
    match code.map(|code| code & 0xff) {
        Some(13) => StoreError::Full { place },
        Some(11 | 26) => StoreError::Corrupt { place, detail: error.to_string() },
        _ => StoreError::Unavailable { place, detail: error.to_string() },
    }
}

fn of_server(endpoint: &Endpoint, error: &sqlx::Error) -> StoreError {
    let place = endpoint.to_string();
    let unfit = |problem: String| StoreError::Unfit { place: place.clone(), problem };
    let (user, database) = (&endpoint.user, &endpoint.database);
    let state = sqlstate(error);
    let state = state.as_deref();
    match mysql_number(error) {
        // wrong password, a host that no user may come from, a user without a password
        Some(1045 | 1130 | 1698) => return unfit(wrong_login(endpoint)),
        Some(1049) => return unfit(no_database(endpoint)),
        Some(1044 | 1142 | 1143 | 1227) => {
            return unfit(format!("{user} may not do what meshd needs ({}); run: {}", said(error), grant(endpoint)));
        }
        Some(1146) => return unfit(tables_gone()),
        Some(1021 | 1114) => return StoreError::Full { place },
        _ => {}
    }
    match (endpoint.engine, state) {
        (Engine::Postgres, Some("28P01" | "28000")) => return unfit(wrong_login(endpoint)),
        (Engine::Postgres, Some("3D000")) => return unfit(no_database(endpoint)),
        (Engine::Postgres, Some("42501")) => {
            return unfit(format!("{user} may not do what meshd needs ({}); run: {}", said(error), grant(endpoint)));
        }
        (Engine::Postgres, Some("42P01")) => return unfit(tables_gone()),
        (Engine::Postgres, Some("53100")) => return StoreError::Full { place },
        _ => {}
    }
    match error {
        sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            unfit(wrong_tls(&error.to_string()))
        }
        sqlx::Error::Tls(error) => unfit(wrong_tls(&error.to_string())),
        sqlx::Error::Configuration(error) => unfit(error.to_string()),
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnIndexOutOfBounds { .. } => {
            unfit(format!(
                "the tables are not meshd's ({error}) in database {database}; give meshd a database of its own"
            ))
        }
        sqlx::Error::Io(error) => StoreError::Unavailable { place, detail: format!("cannot be reached: {error}") },
        error => StoreError::Unavailable { place, detail: said(error) },
    }
}

/// What somebody with the rights to do so runs, so that this login can do its work.
pub(super) fn grant(endpoint: &Endpoint) -> String {
    let (user, database) = (&endpoint.user, &endpoint.database);
    match endpoint.engine {
        Engine::MySql => format!(
            "GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX ON {}.* TO {}@'%';",
            back_quoted(database),
            quoted(user)
        ),
        Engine::Postgres => format!("ALTER DATABASE {} OWNER TO {};", double_quoted(database), double_quoted(user)),
    }
}

/// What makes the database.
pub(super) fn create(endpoint: &Endpoint) -> String {
    match endpoint.engine {
        Engine::MySql => {
            format!("CREATE DATABASE {} CHARACTER SET utf8mb4; {}", back_quoted(&endpoint.database), grant(endpoint))
        }
        Engine::Postgres => {
            format!("CREATE DATABASE {} OWNER {};", double_quoted(&endpoint.database), double_quoted(&endpoint.user))
        }
    }
}

fn no_database(endpoint: &Endpoint) -> String {
    format!("there is no database {}; run: {}", endpoint.database, create(endpoint))
}

fn wrong_login(endpoint: &Endpoint) -> String {
    let user = &endpoint.user;
    let make = match endpoint.engine {
        Engine::MySql => format!("CREATE USER {}@'%' IDENTIFIED BY '…';", quoted(user)),
        Engine::Postgres => format!("CREATE ROLE {} LOGIN PASSWORD '…';", double_quoted(user)),
    };
    format!(
        "the database does not let {user} in; check user and password (datastore-password-file, or in the endpoint), and that \
         this user may come from this machine; where there is no such user yet: {make}"
    )
}

fn wrong_tls(why: &str) -> String {
    format!(
        "no encrypted connection ({why}); give the authority of its certificate with datastore-cafile, or say \
         `?sslmode=require` to encrypt without checking it, `?sslmode=disable` not to encrypt"
    )
}

fn tables_gone() -> String {
    "meshd's tables are gone from the database; restore them from a backup. Nothing is served until then".to_owned()
}

/// The server's own sentence, without a library's around it.
fn said(error: &sqlx::Error) -> String {
    error.as_database_error().map_or_else(|| error.to_string(), |error| error.message().to_owned())
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?.code().to_owned())
}

fn back_quoted(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

fn double_quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}
