//! MySQL and PostgreSQL: how a server gets in, and what stands in its way.

use std::time::Duration;

use sqlx::mysql::{MySqlConnectOptions, MySqlSslMode};
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions, PgSslMode};
use tokio::time::timeout;

use super::connection::{Connection, Options};
use super::errors::{self, Whose};
use super::{CONNECT, Sql, schema};
use crate::membership::settings::Datastore;
use crate::membership::store::StoreError;
use crate::membership::store::check::{Finding, Report};
use crate::membership::store::endpoint::{Endpoint, Engine, TlsMode};

/// How often a server asks whether there is something new. PostgreSQL says so itself; asking is the net below that.
const POLL_MYSQL: Duration = Duration::from_millis(200);
const POLL_POSTGRES: Duration = Duration::from_millis(500);

/// Opens the database, and makes or migrates the tables.
pub async fn open(datastore: &Datastore, text: &str) -> Result<Sql, StoreError> {
    let (endpoint, options) = how(datastore, text)?;
    let place = endpoint.to_string();
    let whose = Whose::Server(endpoint.clone());
    let fail = |e: sqlx::Error| errors::told(&whose, &e);
    let mut first = connect(&whose, &options).await?;
    schema::migrate(&mut first, &whose, &place).await?;
    let denied = schema::denied(&mut first).await.map_err(fail)?;
    if !denied.is_empty() {
        let problem = format!("{} may not {}; run: {}", endpoint.user, denied.join(", "), errors::grant(&endpoint));
        return Err(StoreError::Unfit { place, problem });
    }
    if !endpoint.is_local() && !is_encrypted(&mut first).await.map_err(fail)? {
        tracing::warn!("{place}: the connection is not encrypted, and the cluster's keys cross it; {ENCRYPT}");
    }
    let every = if let Options::MySql(_) = options { POLL_MYSQL } else { POLL_POSTGRES };
    let store = Sql::start(whose, options.clone(), first, every).await?;
    if let Options::Postgres(options) = options {
        store.beside(listen(std::sync::Arc::downgrade(&store.0), *options));
    }
    Ok(store)
}

/// Looks whether a server could use the database, and leaves everything as it is.
pub async fn check(datastore: &Datastore, text: &str) -> Report {
    let mut report = Report {
        datastore: crate::membership::store::endpoint::redacted(text),
        ok: false,
        server: None,
        encrypted: None,
        format: None,
        findings: vec![],
    };
    match how(datastore, text) {
        Ok((endpoint, options)) => {
            if let Err(error) = look(&endpoint, &options, &mut report).await {
                report.findings.push(finding(&error));
            }
        }
        Err(error) => report.findings.push(finding(&error)),
    }
    report.ok = report.findings.iter().all(|finding| finding.warning);
    report
}

const ENCRYPT: &str = "let the database offer TLS, and say `?sslmode=verify-full` with datastore-cafile";

async fn look(endpoint: &Endpoint, options: &Options, report: &mut Report) -> Result<(), StoreError> {
    let whose = Whose::Server(endpoint.clone());
    let fail = |e: sqlx::Error| errors::told(&whose, &e);
    let mut c = connect(&whose, options).await?;
    let version = match c {
        Connection::Postgres(_) => "SELECT current_setting('server_version')",
        _ => "SELECT VERSION()",
    };
    let rows = c.rows(version, &[]).await.map_err(fail)?;
    report.server = schema::first(&rows).and_then(|row| row.text(0)).ok();
    let encrypted = is_encrypted(&mut c).await.map_err(fail)?;
    report.encrypted = Some(encrypted);
    if !encrypted && !endpoint.is_local() {
        let problem = "the connection is not encrypted, and the cluster's keys cross it".to_owned();
        report.findings.push(Finding { problem, fix: ENCRYPT.to_owned(), warning: true });
    }
    let found = schema::version(&mut c).await.map_err(fail)?;
    report.format = Some(found);
    let known = schema::known(&c);
    if found > known || found < 0 {
        return Err(StoreError::Newer { place: endpoint.to_string(), found, known });
    }
    let denied = if found > 0 {
        schema::denied(&mut c).await.map_err(fail)?
    } else {
        schema::cannot_create(&mut c).await.map_err(fail)?
    };
    if !denied.is_empty() {
        let problem = format!("{} may not {}", endpoint.user, denied.join(", "));
        report.findings.push(Finding { problem, fix: errors::grant(endpoint), warning: false });
    }
    if let Some(finding) = durability(&mut c).await.map_err(fail)? {
        report.findings.push(finding);
    }
    c.close().await;
    Ok(())
}

/// Whether what the database has acknowledged survives its crash.
async fn durability(c: &mut Connection) -> Result<Option<Finding>, sqlx::Error> {
    let (asked, good, fix) = match c {
        Connection::Postgres(_) => {
            ("SELECT current_setting('fsync')", "on", "set `fsync = on` in postgresql.conf, and reload")
        }
        _ => (
            "SELECT CAST(@@innodb_flush_log_at_trx_commit AS CHAR)",
            "1",
            "SET GLOBAL innodb_flush_log_at_trx_commit = 1; (a Galera cluster may do without)",
        ),
    };
    let rows = c.rows(asked, &[]).await?;
    let found = schema::first(&rows)?.text(0)?;
    let problem = "what the database has acknowledged may be lost when its machine crashes".to_owned();
    Ok((found != good).then(|| Finding { problem, fix: fix.to_owned(), warning: true }))
}

fn finding(error: &StoreError) -> Finding {
    let text = match error {
        StoreError::Unfit { problem, .. } => problem.clone(),
        StoreError::Unavailable { detail, .. } => {
            let fix = "start the database, or mend the address or the network between".to_owned();
            return Finding { problem: detail.clone(), fix, warning: false };
        }
        other => other.to_string(),
    };
    let (problem, fix) = text.split_once("; run: ").or_else(|| text.split_once("; ")).unwrap_or((&text, ""));
    Finding { problem: problem.to_owned(), fix: fix.to_owned(), warning: false }
}

async fn connect(whose: &Whose, options: &Options) -> Result<Connection, StoreError> {
    let Whose::Server(endpoint) = whose else { return Err(StoreError::NoLease) };
    match timeout(CONNECT, options.connect()).await {
        Ok(connected) => connected.map_err(|e| errors::told(whose, &e)),
        Err(_) => Err(StoreError::Unavailable {
            place: endpoint.to_string(),
            detail: "cannot be reached: no answer in 5 seconds; is the address right, and no firewall between?"
                .to_owned(),
        }),
    }
}

async fn is_encrypted(c: &mut Connection) -> Result<bool, sqlx::Error> {
    match c {
        Connection::Postgres(_) => {
            let asked = "SELECT CAST(ssl AS int8) FROM (SELECT CASE WHEN ssl THEN 1 ELSE 0 END AS ssl FROM pg_stat_ssl \
                         WHERE pid = pg_backend_pid()) AS mine";
            let rows = c.rows(asked, &[]).await?;
            Ok(rows.first().map(|row| row.number(0)).transpose()? == Some(1))
        }
        _ => {
            let rows = c.rows("SHOW SESSION STATUS LIKE 'Ssl_cipher'", &[]).await?;
            Ok(rows.first().map(|row| row.text(1)).transpose()?.is_some_and(|cipher| !cipher.is_empty()))
        }
    }
}

/// The address and everything that stands beside it in the configuration, in the libraries' words.
fn how(datastore: &Datastore, text: &str) -> Result<(Endpoint, Options), StoreError> {
    let unfit = |problem: String| {
        let place = crate::membership::store::endpoint::redacted(text);
        StoreError::Unfit { place, problem }
    };
    let endpoint = Endpoint::parse(text).map_err(unfit)?;
    if datastore.certificate.is_some() != datastore.key.is_some() {
        return Err(unfit("datastore-certfile and datastore-keyfile go together; give both, or none".to_owned()));
    }
    let password = datastore.password.as_ref().or(endpoint.password.as_ref());
    // Who gives an authority wants it checked.
    let strict = if datastore.ca.is_some() { TlsMode::VerifyFull } else { TlsMode::Prefer };
    let tls = endpoint.tls.unwrap_or(strict);
    let options = match endpoint.engine {
        Engine::MySql => {
            let mode = match tls {
                TlsMode::Disable => MySqlSslMode::Disabled,
                TlsMode::Prefer => MySqlSslMode::Preferred,
                TlsMode::Require => MySqlSslMode::Required,
                TlsMode::VerifyCa => MySqlSslMode::VerifyCa,
                TlsMode::VerifyFull => MySqlSslMode::VerifyIdentity,
            };
            let mut options = MySqlConnectOptions::new()
                .host(&endpoint.host)
                .port(endpoint.port)
                .username(&endpoint.user)
                .database(&endpoint.database)
                .ssl_mode(mode);
            if let Some(password) = password {
                options = options.password(password.reveal());
            }
            if let Some(ca) = &datastore.ca {
                options = options.ssl_ca_from_pem(ca.clone().into_bytes());
            }
            if let (Some(certificate), Some(key)) = (&datastore.certificate, &datastore.key) {
                options = options.ssl_client_cert_from_pem(certificate).ssl_client_key_from_pem(key.reveal());
            }
            Options::MySql(Box::new(options))
        }
        Engine::Postgres => {
            let mode = match tls {
                TlsMode::Disable => PgSslMode::Disable,
                TlsMode::Prefer => PgSslMode::Prefer,
                TlsMode::Require => PgSslMode::Require,
                TlsMode::VerifyCa => PgSslMode::VerifyCa,
                TlsMode::VerifyFull => PgSslMode::VerifyFull,
            };
            let mut options = PgConnectOptions::new_without_pgpass()
                .host(&endpoint.host)
                .port(endpoint.port)
                .username(&endpoint.user)
                .database(&endpoint.database)
                .application_name("meshd")
                .ssl_mode(mode);
            if let Some(password) = password {
                options = options.password(password.reveal());
            }
            if let Some(ca) = &datastore.ca {
                options = options.ssl_root_cert_from_pem(ca.clone().into_bytes());
            }
            if let (Some(certificate), Some(key)) = (&datastore.certificate, &datastore.key) {
                options = options.ssl_client_cert_from_pem(certificate).ssl_client_key_from_pem(key.reveal());
            }
            Options::Postgres(Box::new(options))
        }
    };
    Ok((endpoint, options))
}

/// Wakes whoever looks for news when PostgreSQL says that there is some. Without it, they look a little later.
async fn listen(store: std::sync::Weak<super::Inner>, options: PgConnectOptions) {
    let pool = PgPoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None).connect_lazy_with(options);
    loop {
        let Ok(mut listener) = PgListener::connect_with(&pool).await else {
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        };
        if listener.listen("meshd").await.is_ok() {
            while listener.recv().await.is_ok() {
                let Some(inner) = store.upgrade() else { return };
                inner.wake.notify_one();
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
