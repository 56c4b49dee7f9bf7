//! What stands in the way of a store's use is an error that says so and what to do; doing that is the positive control.

use meshd::membership::settings::{Datastore, Secret};
use meshd::membership::store::sql::remote;
use meshd::membership::store::{Op, Store, StoreError, Txn};

use super::servers::{Kind, PASSWORD, Server, USER, free_port};

pub(crate) async fn all(server: &Server) {
    login_and_address(server).await;
    rights(server).await;
    tables(server).await;
    encryption(server).await;
}

async fn refused(database: &Datastore, parts: &[&str]) -> StoreError {
    let endpoint = database.endpoint.as_ref().unwrap().reveal().to_owned();
    let error = remote::open(database, &endpoint).await.err().expect("refused");
    let report = remote::check(database, &endpoint).await;
    assert!(!report.ok, "{report:?}");
    for part in parts {
        assert!(error.to_string().contains(part), "{part}: {error}");
        let found = report.findings.iter().any(|f| f.problem.contains(part) || f.fix.contains(part));
        assert!(found, "{part}: {report:?}");
    }
    let all = format!("{error} {report:?}");
    assert!(!all.contains(PASSWORD), "{all}");
    error
}

async fn good(database: &Datastore) {
    let endpoint = database.endpoint.as_ref().unwrap().reveal().to_owned();
    let report = remote::check(database, &endpoint).await;
    assert!(report.ok, "{report:?}");
    remote::open(database, &endpoint).await.expect("positive control");
    let report = remote::check(database, &endpoint).await;
    assert!(report.ok && report.format == Some(1) && report.server.is_some(), "{report:?}");
}

async fn login_and_address(server: &Server) {
    let database = server.database("login").await;
    let nobody = server.at("login", free_port());
    let error = refused(&nobody, &["cannot be reached"]).await;
    assert!(matches!(error, StoreError::Unavailable { .. }), "may pass by itself: {error:?}");
    let wrong = Datastore { password: Some(Secret::new("guess")), ..database.clone() };
    let error = refused(&wrong, &["does not let mesh in"]).await;
    assert!(matches!(error, StoreError::Unfit { .. }), "{error:?}");
    assert!(error.to_string().contains(&format!("{}://mesh@127.0.0.1:", server.scheme())), "{error}");
    let missing = server.at("nowhere", server.port);
    if server.kind == Kind::Postgres {
        refused(&missing, &["no database nowhere", "CREATE DATABASE \"nowhere\" OWNER \"mesh\""]).await;
    }
    good(&database).await;
}

async fn rights(server: &Server) {
    server.user().await;
    let database = server.at("rightless", server.port);
    match server.kind {
        Kind::MariaDb => {
            server.admin("mysql", "CREATE DATABASE rightless").await;
            let error = refused(&database, &["GRANT SELECT, INSERT"]).await;
            let grant = error.to_string().split_once("run: ").unwrap().1.to_owned();
            server
                .admin("mysql", &format!("GRANT SELECT, INSERT, UPDATE, CREATE, DROP ON rightless.* TO {USER}@'%'"))
                .await;
            refused(&database, &["DELETE on meshd_kv", "GRANT SELECT, INSERT"]).await;
            server.admin("mysql", grant.trim_end_matches(';')).await;
            // what is missing is a database, and the login may know that
            server.admin("mysql", &format!("GRANT SELECT ON nowhere.* TO {USER}@'%'")).await;
            refused(&server.at("nowhere", server.port), &["no database nowhere", "CREATE DATABASE `nowhere`"]).await;
        }
        Kind::Postgres => {
            server.admin("postgres", "CREATE DATABASE rightless").await;
            let error = refused(&database, &["ALTER DATABASE \"rightless\" OWNER TO \"mesh\""]).await;
            let grant = error.to_string().split_once("run: ").unwrap().1.to_owned();
            server.admin("postgres", grant.trim_end_matches(';')).await;
        }
    }
    good(&database).await;
}

async fn tables(server: &Server) {
    let database = server.database("versions").await;
    good(&database).await;
    server.admin("versions", "INSERT INTO meshd_schema VALUES (77)").await;
    let error = refused(&database, &["77", "newer version"]).await;
    assert!(matches!(error, StoreError::Newer { found: 77, known: 1, .. }), "{error:?}");
    server.admin("versions", "DELETE FROM meshd_schema WHERE version = 77").await;
    good(&database).await;

    // behind the back of a server that runs
    let endpoint = database.endpoint.as_ref().unwrap().reveal().to_owned();
    let store = remote::open(&database, &endpoint).await.unwrap();
    let write = || Txn { compares: vec![], ops: vec![Op::put("a", *b"1")] };
    store.txn(write()).await.unwrap();
    for table in ["state", "kv", "log", "lease"] {
        server.admin("versions", &format!("DROP TABLE meshd_{table}")).await;
    }
    for error in [store.txn(write()).await.map(drop), store.range("").await.map(drop)] {
        let error = error.unwrap_err();
        assert!(
            matches!(error, StoreError::Unfit { .. }) && error.to_string().contains("tables are gone"),
            "{error:?}"
        );
    }
    refused(&database, &["tables are gone"]).await;
}

/// The servers of these tests offer no encryption, or one with a certificate of their own.
async fn encryption(server: &Server) {
    let plain = server.database("plain").await;
    let endpoint = |mode: &str| {
        let text = plain.endpoint.as_ref().unwrap().reveal();
        Datastore { endpoint: Some(Secret::new(format!("{text}?sslmode={mode}"))), ..plain.clone() }
    };
    refused(&endpoint("verify-full"), &["no encrypted connection", "datastore-cafile"]).await;
    good(&endpoint("disable")).await;
    let half = Datastore { certificate: Some("x".to_owned()), ..plain.clone() };
    refused(&half, &["go together"]).await;
}
