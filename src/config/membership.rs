//! What the values of the keys of `meshd server` and `meshd agent` are, and how each is read from a text.
//!
//! Knows one cluster's worth of words: registration addresses, tokens, prefixes to give out, labels. Whether a server
//! answers or a token is good, only the servers know.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net};

use super::error::{ConfigError, Place, Problem};
use super::layers::Layers;
use super::values::{self, Read};
use crate::membership::address::ServerAddress;
use crate::membership::settings::{MaskSizes, PurgeAfter, SERVER_PORT, Secret};
use crate::membership::store::endpoint::Endpoint;
use crate::membership::store::etcd;
use crate::membership::token::Credential;

/// `bind-address` unless it is set: every address, both families.
pub(super) const ANY_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), SERVER_PORT);

/// Where the token stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenFile {
    /// `-`
    StandardInput,
    /// A file.
    Path(PathBuf),
}

pub(super) fn server(text: &str) -> Read<String> {
    match text.parse::<ServerAddress>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("write a registration address such as `https://10.9.0.1:9345`".into()),
    }
}

/// A join token or a shared secret; what begins as a token and is none is never taken for a secret.
pub(super) fn token(text: &str) -> Read<Secret> {
    let text = text.trim();
    Credential::parse(text).map(|_| Secret::new(text)).map_err(|error| error.to_string())
}

pub(super) fn token_file(text: &str) -> Read<TokenFile> {
    if text == "-" { Ok(TokenFile::StandardInput) } else { values::path(text).map(TokenFile::Path) }
}

/// `token` and `token-file`, of which the one that was said by more weighty a source counts.
pub(super) fn tokens(layers: &Layers) -> Result<(Option<Secret>, Option<TokenFile>), ConfigError> {
    let (text, file) = (layers.one("token", token)?, layers.one("token-file", token_file)?);
    let (of_text, of_file) = (layers.place("token"), layers.place("token-file"));
    match (text, file) {
        (Some(_), Some(_)) if of_text.weight() == of_file.weight() => {
            let fix = "`token` is given in the same place; keep one of them".to_owned();
            let problem = Problem::BadValue { key: "token-file", value: "…".to_owned(), fix };
            Err(ConfigError { place: of_file, problem })
        }
        (Some(_), Some(file)) if of_file.weight() > of_text.weight() => Ok((None, Some(file))),
        (Some(text), Some(_)) => Ok((Some(text), None)),
        one => Ok(one),
    }
}

pub(super) fn cluster_cidr(layers: &Layers) -> Result<Vec<IpNet>, ConfigError> {
    let given = layers.many("cluster-cidr", cidr, same_family)?;
    let default = Ipv4Net::new(Ipv4Addr::new(10, 42, 0, 0), 16).map(IpNet::V4);
    Ok(if given.is_empty() { default.into_iter().collect() } else { given })
}

/// The sizes, each of which has to leave room for at least one node in its prefix.
pub(super) fn mask_sizes(layers: &Layers) -> Result<MaskSizes, ConfigError> {
    let mut sizes = MaskSizes::default();
    for length in layers.many("node-cidr-mask-size", mask_size, same_size)? {
        if length <= 32 { sizes.v4 = length } else { sizes.v6 = length }
    }
    for cidr in cluster_cidr(layers)? {
        let size = if matches!(cidr, IpNet::V4(_)) { sizes.v4 } else { sizes.v6 };
        if size < cidr.prefix_len() {
            let fix = format!("no subnet of that size fits `cluster-cidr: {cidr}`; use a longer one");
            let problem = Problem::BadValue { key: "node-cidr-mask-size", value: size.to_string(), fix };
            return Err(ConfigError { place: layers.place("node-cidr-mask-size"), problem });
        }
    }
    Ok(sizes)
}

/// `datastore-endpoint`; and `cluster-init`, which this version cannot.
pub(super) fn datastore(layers: &Layers) -> Result<Option<Secret>, ConfigError> {
    let endpoint = layers.one("datastore-endpoint", datastore_endpoint)?;
    let password = endpoint.as_ref().and_then(|text| Endpoint::parse(text.reveal()).ok()?.password);
    if let (Some(_), place @ Place::Flag(_)) = (password, layers.place("datastore-endpoint")) {
        let fix = "every user of this machine can read a password there; leave it out, and set datastore-password-file, or \
                   set MESHD_DATASTORE_ENDPOINT instead of the flag";
        let problem = Problem::BadValue { key: "datastore-endpoint", value: "…".to_owned(), fix: fix.to_owned() };
        return Err(ConfigError { place, problem });
    }
    Ok(endpoint)
}

pub(super) fn tls_san(text: &str) -> Read<String> {
    let name = text.strip_prefix("*.").unwrap_or(text);
    if text.parse::<IpAddr>().is_ok() || is_host(name) {
        Ok(text.to_owned())
    } else {
        Err("use a host name or an IP address, without scheme and port".into())
    }
}

pub(super) fn bind_address(text: &str) -> Read<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    match (text.parse::<SocketAddr>(), bare.parse::<IpAddr>()) {
        (Ok(address), _) if address.port() != 0 => Ok(address),
        (_, Ok(ip)) => Ok(SocketAddr::new(ip, SERVER_PORT)),
        _ => Err("use an address with a port, as in `[::]:9345` or `10.9.0.1:9345`".into()),
    }
}

/// A label, key and value.
pub(super) type Label = (String, String);

pub(super) fn label(text: &str) -> Read<Label> {
    let wanted = || String::from("write `key=value`, in letters, digits, `-`, `_`, `.` and, in the key, `/`");
    let (key, value) = text.split_once('=').ok_or_else(wanted)?;
    if is_key(key) && is_word(value) { Ok((key.to_owned(), value.to_owned())) } else { Err(wanted()) }
}

pub(super) fn same_label(a: &Label, b: &Label) -> Option<&'static str> {
    (a.0 == b.0).then_some("this label is there twice; remove one")
}

pub(super) fn taint(text: &str) -> Read<String> {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    let wanted = || String::from("write `key=value:effect`, with NoSchedule, PreferNoSchedule or NoExecute");
    let (left, effect) = text.rsplit_once(':').ok_or_else(wanted)?;
    let (key, value) = left.split_once('=').unwrap_or((left, ""));
    let good = is_key(key) && is_word(value) && EFFECTS.contains(&effect);
    if good { Ok(text.to_owned()) } else { Err(wanted()) }
}

pub(super) fn yes_or_no(text: &str) -> Read<bool> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("use `true` or `false`".into()),
    }
}

pub(super) fn purge_after(text: &str) -> Read<PurgeAfter> {
    const WANTED: &str = "use `off`, or a time from 1m on, such as `30m`, `1h` or `2d`";
    if text == "off" {
        return Ok(PurgeAfter::Off);
    }
    let (digits, unit) = text.split_at(text.trim_end_matches(|c: char| !c.is_ascii_digit()).len());
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(WANTED.into()),
    };
    let seconds = values::number(digits, 1, 1_000_000).map(|n| u64::from(n) * unit);
    seconds.filter(|s| *s >= 60).map(PurgeAfter::Seconds).ok_or_else(|| WANTED.into())
}

/// A TCP port; `None` for `off`.
pub(super) fn lb_server_port(text: &str) -> Read<Option<u16>> {
    match (text, text.parse::<u16>()) {
        ("off", _) => Ok(None),
        (_, Ok(port)) if port != 0 => Ok(Some(port)),
        _ => Err("use `off`, or a TCP port, such as 6444".into()),
    }
}

fn cidr(text: &str) -> Read<IpNet> {
    let net: IpNet = text.parse().map_err(|_| String::from("write a prefix such as `10.42.0.0/16`"))?;
    if net.trunc() != net {
        return Err(format!("it has bits set behind the prefix; write `{}`", net.trunc()));
    }
    if net.prefix_len() < 8 || values::not_underlay(net.network()).is_some() {
        return Err("use a private unicast prefix such as `10.42.0.0/16` or `fd42::/48`".into());
    }
    Ok(net)
}

fn same_family(a: &IpNet, b: &IpNet) -> Option<&'static str> {
    let same = matches!((a, b), (IpNet::V4(_), IpNet::V4(_)) | (IpNet::V6(_), IpNet::V6(_)));
    same.then_some("there is another of the same family; give one IPv4 and one IPv6 prefix at most")
}

fn mask_size(text: &str) -> Read<u8> {
    let wanted = || "use a prefix length from 8 to 128; up to 32 it is for IPv4, above for IPv6".into();
    values::number(text, 8, 128).and_then(|n| u8::try_from(n).ok()).ok_or_else(wanted)
}

fn same_size(a: &u8, b: &u8) -> Option<&'static str> {
    ((*a <= 32) == (*b <= 32)).then_some("there is another for the same family; up to 32 it is for IPv4")
}

fn datastore_endpoint(text: &str) -> Read<Secret> {
    const WANTED: &str = "use `sqlite:///PATH`, `mysql://USER@HOST/DATABASE`, `postgres://USER@HOST/DATABASE` or \
                          `etcd://HOST:2379,HOST:2379`, or remove it for SQLite below `data-dir`";
    match text.split_once("://") {
        Some(("sqlite", path)) if path.is_empty() || path.starts_with('/') => Ok(Secret::new(text)),
        Some(("mysql" | "mariadb" | "postgres" | "postgresql", _)) => Endpoint::parse(text).map(|_| Secret::new(text)),
        Some(("etcd" | "etcds", _)) => etcd::check(text).map(|()| Secret::new(text)),
        _ => Err(WANTED.into()),
    }
}

/// A host name (RFC 1123 §2.1) or an IPv4 address.
fn is_host(text: &str) -> bool {
    let good = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    text.len() <= 253 && text.strip_suffix('.').unwrap_or(text).split('.').all(good)
}

/// As Kubernetes has it: an optional DNS prefix and a slash, then a word that is not empty.
fn is_key(text: &str) -> bool {
    let (prefix, name) = text.rsplit_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    prefix.is_none_or(is_host) && !name.is_empty() && is_word(name)
}

fn is_word(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: char| c.is_ascii_alphanumeric();
    text.len() <= 63 && text.chars().all(inner) && text.is_empty() | (text.starts_with(edge) && text.ends_with(edge))
}
