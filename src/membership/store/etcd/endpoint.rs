//! `etcd://` and `etcds://`: an etcd that somebody else runs.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use serde_json::json;
use tokio::time::timeout;

use super::rows::Status;
use super::{Access, CallError, Etcd, FORMAT, Gateway, PREFIX, trouble};
use crate::membership::settings::{Datastore, Secret};
use crate::membership::store::StoreError;
use crate::membership::store::check::{Finding, Report};
use crate::membership::tls;

/// How long `meshd datastore check` waits for an answer.
const LOOK: Duration = Duration::from_secs(10);
/// etcd's client port.
const PORT: u16 = 2379;
/// Where Debian and its like keep the machine's certificate authorities.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Whether the endpoint can be read; the error says what is wrong.
pub fn check(endpoint: &str) -> Result<(), String> {
    Place::parse(endpoint).map(drop)
}

/// Opens the etcd of `datastore-endpoint`: `etcd://[USER[:PASSWORD]@]HOST[:2379][,HOST…][/PREFIX]`, `etcds` with TLS.
pub async fn open(datastore: &Datastore) -> Result<Etcd, StoreError> {
    let (access, prefix) = access(datastore).map_err(|problem| {
        let place = datastore.endpoint.as_ref().map_or("", |endpoint| endpoint.reveal());
        let place = place.split_once("://").map_or(place, |(scheme, _)| scheme);
        StoreError::Unfit { place: format!("{place}://…"), problem }
    })?;
    Etcd::open(Gateway::new(access), &prefix).await
}

/// Looks whether a server could use it, and changes nothing. Each of its members is asked by itself.
pub async fn look(datastore: &Datastore, shown: String) -> Report {
    let encrypted = Some(shown.starts_with("etcds://"));
    let mut report = Report { datastore: shown, ok: false, server: None, encrypted, format: None, findings: vec![] };
    let (access, prefix) = match access(datastore) {
        Ok(found) => found,
        Err(problem) => {
            let fix = "mend `datastore-endpoint` and what belongs to it; `meshd config check` reads it".to_owned();
            report.findings.push(Finding { problem, fix, warning: false });
            return report;
        }
    };
    let members = access.endpoints.iter().map(|endpoint| {
        let (host, port) = endpoint;
        let gateway = Gateway::new(Access { endpoints: vec![endpoint.clone()], ..access.clone() });
        let prefix = &prefix;
        async move {
            timeout(LOOK, look_at(gateway, prefix, encrypted == Some(true))).await.unwrap_or_else(|_| {
                let problem = format!("{host}:{port} does not answer in time");
                Err(Finding { problem, fix: health(host, *port), warning: false })
            })
        }
    });
    for looked in join_all(members).await {
        match looked {
            Ok((server, format, warning)) => {
                report.ok = true;
                report.findings.extend(warning.filter(|new| report.findings.iter().all(|known| known.fix != new.fix)));
                report.server.get_or_insert(server);
                report.format = Some(format);
            }
            // what is wrong with all of them is said once
            Err(finding) if report.findings.iter().any(|known| known.fix == finding.fix) => {}
            Err(finding) => report.findings.push(finding),
        }
    }
    report.findings.iter_mut().for_each(|finding| finding.warning = report.ok);
    report
}

/// What answers, the format of what it holds (0: nothing), and what is to be warned of.
async fn look_at(gateway: Gateway, prefix: &str, encrypted: bool) -> Result<(String, i64, Option<Finding>), Finding> {
    let place = gateway.place();
    let user = gateway.user().unwrap_or("USER").to_owned();
    let finding = |problem: String, fix: String| Finding { problem, fix, warning: false };
    let asked = gateway.once::<Status>("/v3/maintenance/status", &json!({}), LOOK).await;
    let status = asked.map_err(|error| {
        let fix = match &error {
            CallError::Tls { problem, fix } => return finding(problem.clone(), fix.clone()),
            CallError::Lost(_) if !encrypted => {
                let (host, port) = gateway.first();
                format!("if it speaks TLS, write `etcds://` and set `datastore-cafile`; else: {}", health(&host, port))
            }
            CallError::Unreached(_) | CallError::Lost(_) => {
                let (host, port) = gateway.first();
                health(&host, port)
            }
            CallError::Stranger(_) => "write the address of an etcd (its client port, 2379) in `datastore-endpoint`".to_owned(),
            CallError::Refused { message, .. } if message.contains("user name is empty") => {
                "write `etcd://USER@HOST:2379`, and set `datastore-password-file`".to_owned()
            }
            CallError::Refused { .. } => {
                format!("set `datastore-password-file` right; or, as root: etcdctl user add {user}, etcdctl user passwd {user}")
            }
        };
        finding(gateway.told(error).to_string(), fix)
    })?;
    let version = status.version;
    let tried = async {
        let etcd = Etcd::open(gateway, prefix).await?;
        etcd.may_write().await?;
        Ok::<_, StoreError>(if etcd.is_empty().await? { 0 } else { FORMAT.cast_signed() })
    };
    let format = tried.await.map_err(|error| {
        let fix = match &error {
            StoreError::Unfit { problem, .. } if problem.contains("grant-permission") => trouble::grant(&user, prefix),
            StoreError::Unfit { problem, .. }
                if problem.contains("user name is empty") || problem.contains("wants a user") =>
            {
                "write `etcd://USER@HOST:2379`, and set `datastore-password-file`".to_owned()
            }
            StoreError::Unfit { .. } => "install etcd 3.4 or later there".to_owned(),
            StoreError::Newer { .. } => "install the meshd of the cluster's other servers here".to_owned(),
            StoreError::Corrupt { .. } => format!("restore a backup of the keys below `{prefix}`"),
            _ => "ETCDCTL_API=3 etcdctl endpoint status --cluster".to_owned(),
        };
        finding(error.to_string(), fix)
    })?;
    let warning = super::loses(&version).then(|| {
        let fix = "install etcd 3.4, or 3.5.3 or later, on each of its machines".to_owned();
        Finding { warning: true, ..finding(format!("{place}: {} (it is {version})", super::LOSES), fix) }
    });
    Ok((format!("{place}, version {version}"), format, warning))
}

fn health(host: &str, port: u16) -> String {
    format!(
        "start it, and open TCP port {port} to this machine; there: ETCDCTL_API=3 etcdctl --endpoints={host}:{port} endpoint health"
    )
}

/// What an endpoint says.
struct Place<'a> {
    scheme: &'a str,
    endpoints: Vec<(String, u16)>,
    user: Option<(&'a str, Option<&'a str>)>,
    prefix: &'a str,
}

impl<'a> Place<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("write `etcd://HOST:2379,HOST:2379`")?;
        let (user, rest) = match rest.rsplit_once('@') {
            Some((user, rest)) => (Some(user), rest),
            None => (None, rest),
        };
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let endpoints = hosts.split(',').map(|host| self::host(host.trim())).collect::<Result<Vec<_>, _>>()?;
        let user = user.map(|user| user.split_once(':').map_or((user, None), |(user, word)| (user, Some(word))));
        Ok(Place { scheme, endpoints, user, prefix: prefix.trim_end_matches('/') })
    }
}

fn access(datastore: &Datastore) -> Result<(Access, String), String> {
    let text = datastore.endpoint.as_ref().map_or("", |endpoint| endpoint.reveal());
    let Place { scheme, endpoints, user, prefix } = Place::parse(text)?;
    let user = match user {
        None if datastore.password.is_some() => {
            return Err("there is a password and no user: write `etcd://USER@HOST:2379`".to_owned());
        }
        None => None,
        Some((name, word)) => {
            let word = datastore.password.clone().or_else(|| word.map(|word| Secret::new(unescaped(word))));
            let word = word.ok_or("the user has no password: set `datastore-password-file`")?;
            Some((unescaped(name), word))
        }
    };
    let identity = datastore.certificate.as_deref().zip(datastore.key.as_ref());
    let wants_tls = datastore.ca.is_some() || datastore.certificate.is_some() || datastore.key.is_some();
    let tls = match scheme {
        "etcds" => {
            let system = || std::fs::read_to_string(SYSTEM_ROOTS).map_err(|e| format!("{SYSTEM_ROOTS}: {e}"));
            let roots = datastore.ca.clone().map_or_else(system, Ok)?;
            let config = tls::datastore_config(&roots, identity.map(|(pem, key)| (pem, key.reveal())));
            Some(Arc::new(config.map_err(|e| e.to_string())?))
        }
        _ if wants_tls => return Err("certificates are for TLS: write `etcds://HOST:2379`".to_owned()),
        _ => None,
    };
    let prefix = match prefix {
        "" => PREFIX.to_owned(),
        given => format!("{given}/"),
    };
    Ok((Access { endpoints, tls, user }, prefix))
}

/// `HOST`, `HOST:PORT`, `[IPv6]`, `[IPv6]:PORT`
fn host(text: &str) -> Result<(String, u16), String> {
    let bad = || format!("`{}` is no host: write `HOST:2379`, `[IPv6]:2379`", text.escape_debug());
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, rest)) => {
            (host, rest.strip_prefix(':').map_or(if rest.is_empty() { Some(PORT) } else { None }, number))
        }
        None => text.split_once(':').map_or((text, Some(PORT)), |(host, port)| (host, number(port))),
    };
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    match port {
        Some(port) if !host.is_empty() && host.chars().all(good) => Ok((host.to_owned(), port)),
        _ => Err(bad()),
    }
}

fn number(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0)
}

/// RFC 3986 §2.1: `%40` is an `@`.
fn unescaped(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(endpoint: &str) -> Result<(Access, String), String> {
        access(&Datastore { endpoint: Some(Secret::new(endpoint)), ..Datastore::default() })
    }

    #[test]
    fn releases_that_lose_are_known() {
        assert!(["3.5.0", "3.5.2", "3.5.1-rc.1"].iter().all(|version| super::super::loses(version)));
        assert!(["3.4.23", "3.5.3", "3.5.21", "3.6.0"].iter().all(|version| !super::super::loses(version)));
    }

    #[test]
    fn endpoints_are_understood() {
        let (one, prefix) = read("etcd://a,b:1,[2001:db8::1],[::1]:7").unwrap();
        let hosts: Vec<_> = one.endpoints.iter().map(|(host, port)| (host.as_str(), *port)).collect();
        assert_eq!(hosts, [("a", 2379), ("b", 1), ("2001:db8::1", 2379), ("::1", 7)]);
        assert_eq!((prefix.as_str(), one.user.is_none(), one.tls.is_none()), ("meshd/", true, true));
        let (two, prefix) = read("etcd://me:a%40b%25@h/some/where/").unwrap();
        let (name, word) = two.user.unwrap();
        assert_eq!((name.as_str(), word.reveal(), prefix.as_str()), ("me", "a@b%", "some/where/"));
        for (bad, hint) in [
            ("etcd://", "is no host"),
            ("etcd://a,,b", "is no host"),
            ("etcd://a:0", "is no host"),
            ("etcd://a:x", "is no host"),
            ("etcd://me@a", "datastore-password-file"),
        ] {
            let error = read(bad).err().unwrap_or_default();
            assert!(error.contains(hint), "{bad}: {error}");
        }
        let mut datastore = Datastore { endpoint: Some(Secret::new("etcd://a")), ..Datastore::default() };
        datastore.ca = Some(String::new());
        assert!(access(&datastore).err().unwrap().contains("etcds://"));
        datastore.endpoint = Some(Secret::new("etcds://a"));
        assert!(access(&datastore).err().unwrap().contains("certificate"), "an empty CA file");
    }
}
