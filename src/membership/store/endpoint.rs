//! `datastore-endpoint` for a database elsewhere: `mysql://` and `postgres://` addresses, read. Pure.
//!
//! Knows what such an address says, and how it may be shown: without its password. Whether somebody answers there is the
//! back end's to find out.

use std::fmt;

use percent_encoding::percent_decode_str;

use crate::membership::settings::Secret;

/// What speaks behind an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// MySQL, MariaDB, and Galera clusters of them.
    MySql,
    /// PostgreSQL.
    Postgres,
}

/// Whether the connection is encrypted, in libpq's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    /// Never.
    Disable,
    /// Where the server can, without a look at its certificate.
    Prefer,
    /// Always, without a look at its certificate.
    Require,
    /// Always, with a certificate of a known authority.
    VerifyCa,
    /// Always, with one that names the host, too.
    VerifyFull,
}

/// An address of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// What is there.
    pub engine: Engine,
    /// Host name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Who logs in.
    pub user: String,
    /// With which password.
    pub password: Option<Secret>,
    /// The database.
    pub database: String,
    /// `sslmode`, where it was given.
    pub tls: Option<TlsMode>,
}

/// What an address should look like, for messages.
pub const WANTED: &str = "write `mysql://USER@HOST:3306/DATABASE` or `postgres://USER@HOST:5432/DATABASE`";

impl Endpoint {
    /// Reads an address; the error says what is wrong, and shows no part of it that may be secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or(WANTED)?;
        let (engine, default) = match scheme {
            "mysql" | "mariadb" => (Engine::MySql, 3306),
            "postgres" | "postgresql" => (Engine::Postgres, 5432),
            _ => return Err(WANTED.to_owned()),
        };
        let (rest, options) = rest.split_once('?').unwrap_or((rest, ""));
        // a password may hold an `@` or a `/`, as people write them
        let (login, rest) = rest.rsplit_once('@').ok_or_else(|| format!("it has no user; {WANTED}"))?;
        let (user, password) = login.split_once(':').map_or((login, None), |(user, word)| (user, Some(word)));
        let (place, database) = rest.split_once('/').ok_or_else(|| format!("it has no database; {WANTED}"))?;
        // as Go programs write it
        let place = place.strip_prefix("tcp(").and_then(|p| p.strip_suffix(')')).unwrap_or(place);
        let (host, port) = split_port(place, default)?;
        let (user, database) = (decoded(user)?, decoded(database)?);
        for (what, text) in [("user", &user), ("host", &host), ("database", &database)] {
            if text.is_empty() || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
                return Err(format!("it has no {what}, or one with blanks; {WANTED}"));
            }
        }
        let password = password.filter(|word| !word.is_empty()).map(decoded).transpose()?.map(Secret::new);
        Ok(Endpoint { engine, host, port, user, password, database, tls: tls(options)? })
    }

    /// Whether it leads to this very machine.
    pub fn is_local(&self) -> bool {
        self.host == "localhost" || self.host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// The scheme, as it is shown.
    pub fn scheme(&self) -> &'static str {
        match self.engine {
            Engine::MySql => "mysql",
            Engine::Postgres => "postgres",
        }
    }
}

/// Without the password.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        write!(f, "{}://{}@{host}:{}/{}", self.scheme(), self.user, self.port, self.database)
    }
}

/// Any address as it may be shown, also one that cannot be read.
pub fn redacted(text: &str) -> String {
    if let Ok(endpoint) = Endpoint::parse(text) {
        return endpoint.to_string();
    }
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    match rest.rsplit_once('@') {
        Some((_, place)) => format!("{scheme}://…@{}", place.split('?').next().unwrap_or_default()),
        None if scheme.is_empty() => "…".to_owned(),
        None => format!("{scheme}://{}", rest.split('?').next().unwrap_or_default()),
    }
}

fn split_port(place: &str, default: u16) -> Result<(String, u16), String> {
    let bad = |port: &str| format!("`{}` is no port; use 1 to 65535", port.chars().take(20).collect::<String>());
    let number = |port: &str| port.parse().ok().filter(|port: &u16| *port != 0).ok_or_else(|| bad(port));
    if let Some((host, rest)) = place.strip_prefix('[').and_then(|p| p.split_once(']')) {
        let port = rest.strip_prefix(':').map_or(Ok(default), number)?;
        return Ok((host.to_owned(), port));
    }
    match place.rsplit_once(':') {
        Some((host, port)) => Ok((host.to_owned(), number(port)?)),
        None => Ok((place.to_owned(), default)),
    }
}

fn decoded(text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(|text| text.into_owned()).map_err(|_| "a %-sequence in it is not UTF-8".to_owned())
}

fn tls(options: &str) -> Result<Option<TlsMode>, String> {
    let mut mode = None;
    for option in options.split('&').filter(|option| !option.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        if !matches!(key, "sslmode" | "ssl-mode") {
            let key: String = key.chars().take(30).collect();
            return Err(format!(
                "it has the option `{key}`, but only `sslmode` may stand there; certificates come with datastore-cafile, \
                 datastore-certfile and datastore-keyfile"
            ));
        }
        mode = Some(match value.to_ascii_lowercase().as_str() {
            "disable" | "disabled" => TlsMode::Disable,
            "prefer" | "preferred" => TlsMode::Prefer,
            "require" | "required" => TlsMode::Require,
            "verify-ca" | "verify_ca" => TlsMode::VerifyCa,
            "verify-full" | "verify_identity" => TlsMode::VerifyFull,
            _ => return Err("`sslmode` is disable, prefer, require, verify-ca or verify-full".to_owned()),
        });
    }
    Ok(mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown_without_their_password() {
        let all = Endpoint::parse("mysql://mesh:p%40ss:w/rd@[fd00::5]:3307/meshd?sslmode=verify-full").unwrap();
        assert_eq!((all.host.as_str(), all.port, all.user.as_str()), ("fd00::5", 3307, "mesh"));
        assert_eq!(all.password.as_ref().map(|p| p.reveal()), Some("p@ss:w/rd"));
        assert_eq!((all.tls, all.database.as_str()), (Some(TlsMode::VerifyFull), "meshd"));
        assert_eq!(all.to_string(), "mysql://mesh@[fd00::5]:3307/meshd");
        let go = Endpoint::parse("mysql://u:p@tcp(db.example:3306)/d").unwrap();
        assert_eq!(go.to_string(), "mysql://u@db.example:3306/d");
        let short = Endpoint::parse("postgresql://u@db/d").unwrap();
        assert_eq!((short.port, short.password, short.tls), (5432, None, None));
        let debug = format!("{all:?}");
        assert!(!debug.contains("p@ss"), "{debug}");
    }

    #[test]
    fn what_is_wrong_is_said_and_nothing_secret_is_shown() {
        for (text, part) in [
            ("mysql://db/meshd", "no user"),
            ("mysql://u:hush@db", "no database"),
            ("mysql://u:hush@db/", "no database"),
            ("mysql://u:hush@/d", "no host"),
            ("mysql://:hush@db/d", "no user"),
            ("mysql://u:hush@db:0/d", "no port"),
            ("mysql://u:hush@db:http/d", "no port"),
            ("mysql://u:hush@db/d?sslmode=maybe", "verify-full"),
            ("mysql://u:hush@db/d?password=hush", "only `sslmode`"),
            ("mysql://u:%ff@db/d", "UTF-8"),
            ("oracle://u:hush@db/d", "mysql://"),
            ("hush", "mysql://"),
        ] {
            let error = Endpoint::parse(text).unwrap_err();
            assert!(error.contains(part) && !error.contains("hush"), "{text}: {error}");
            assert!(!redacted(text).contains("hush"), "{text}");
        }
        assert_eq!(redacted("etcd://u:hush@h1,h2"), "etcd://…@h1,h2");
    }
}
