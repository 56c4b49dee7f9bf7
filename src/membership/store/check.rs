//! What a look at a store finds, before a server uses it.

use std::path::Path;

use serde::Serialize;

use super::endpoint::redacted;
use super::etcd;
use super::sql::remote;
use crate::membership::settings::Datastore;

/// What stands in the way of a store's use, with what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong.
    pub problem: String,
    /// What to run or to change.
    pub fix: String,
    /// Whether a server works nevertheless.
    pub warning: bool,
}

/// What a look at a store found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Which store, without secrets.
    pub datastore: String,
    /// Whether a server can use it.
    pub ok: bool,
    /// What answered, in its own words.
    pub server: Option<String>,
    /// Whether the connection was encrypted.
    pub encrypted: Option<bool>,
    /// The format of what is stored; 0: nothing yet.
    pub format: Option<i64>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Looks whether a server could use the store that `datastore-endpoint` names, and leaves everything as it is. SQLite at
/// `default` where it names none.
pub async fn check(datastore: &Datastore, default: &Path) -> Report {
    let endpoint = datastore.endpoint.as_ref().map_or("", |endpoint| endpoint.reveal());
    match endpoint.split_once("://") {
        Some(("mysql" | "mariadb" | "postgres" | "postgresql", _)) => remote::check(datastore, endpoint).await,
        Some(("etcd" | "etcds", _)) => etcd::look(datastore, redacted(endpoint)).await,
        Some((scheme, rest)) if scheme != "sqlite" || !rest.is_empty() => {
            let fits = scheme == "sqlite" && Path::new(rest).parent().is_some_and(Path::is_dir);
            let finding = Finding {
                problem: "there is no such folder, or no such kind of store".to_owned(),
                fix: "write `sqlite:///PATH` with a folder that is there, or the address of a database".to_owned(),
                warning: false,
            };
            let findings = if fits { vec![] } else { vec![finding] };
            Report { datastore: redacted(endpoint), ok: fits, server: None, encrypted: None, format: None, findings }
        }
        _ => Report {
            datastore: default.display().to_string(),
            ok: true,
            server: None,
            encrypted: None,
            format: None,
            findings: vec![],
        },
    }
}
