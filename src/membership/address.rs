//! Registration addresses: where servers are reached, as people write them.
//!
//! Owns the text form alone; names are resolved by `client`, again at each attempt.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::settings::SERVER_PORT;

/// A server's address: `https://host:9345`, where host is a name, an IPv4 address or an IPv6 address in brackets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerAddress {
    /// A name or an address, without brackets.
    host: String,
    port: u16,
}

/// Why an address was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a server's address: write it as https://HOST:{SERVER_PORT}, where HOST is a name or an address")]
pub struct BadServerAddress(String);

impl ServerAddress {
    /// The name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for ServerAddress {
    fn from(address: SocketAddr) -> Self {
        ServerAddress { host: address.ip().to_canonical().to_string(), port: address.port() }
    }
}

impl FromStr for ServerAddress {
    type Err = BadServerAddress;

    fn from_str(text: &str) -> Result<Self, BadServerAddress> {
        let bad = || BadServerAddress(text.chars().filter(|c| !c.is_control()).take(80).collect());
        let rest = match text.split_once("://") {
            Some(("https", rest)) => rest,
            Some(_) => return Err(bad()),
            None => text,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if let Ok(address) = rest.parse::<SocketAddr>() {
            return if address.port() == 0 { Err(bad()) } else { Ok(address.into()) };
        }
        let bare = rest.strip_prefix('[').and_then(|r| r.strip_suffix(']')).unwrap_or(rest);
        if let Ok(address) = bare.parse::<Ipv6Addr>() {
            return Ok(ServerAddress { host: IpAddr::V6(address).to_string(), port: SERVER_PORT });
        }
        let (host, port) = match rest.split_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?),
            None => (rest, SERVER_PORT),
        };
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let named = (1..=253).contains(&host.len()) && host.chars().all(good) && !host.starts_with(['-', '.']);
        if named { Ok(ServerAddress { host: host.to_ascii_lowercase(), port }) } else { Err(bad()) }
    }
}

impl TryFrom<String> for ServerAddress {
    type Error = BadServerAddress;

    fn try_from(text: String) -> Result<Self, BadServerAddress> {
        text.parse()
    }
}

impl From<ServerAddress> for String {
    fn from(address: ServerAddress) -> String {
        address.to_string()
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "https://{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_understood() {
        for (written, meant) in [
            ("https://a.example:9345", "https://a.example:9345"),
            ("https://A.example/", "https://a.example:9345"),
            ("10.9.0.1", "https://10.9.0.1:9345"),
            ("10.9.0.1:1", "https://10.9.0.1:1"),
            ("https://[2001:db8::1]:7", "https://[2001:db8::1]:7"),
            ("2001:db8::1", "https://[2001:db8::1]:9345"),
        ] {
            assert_eq!(written.parse::<ServerAddress>().unwrap().to_string(), meant, "{written}");
        }
        for bad in ["", "http://a", "https://", "a:0", "a:99999", "a b", "a/b", "https://a:1/x", "-a", "[a]"] {
            assert!(bad.parse::<ServerAddress>().is_err(), "{bad:?}");
        }
    }
}
