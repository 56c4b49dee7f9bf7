//! What the values of a configuration are, and how each is read from a text.
//!
//! Knows one value at a time: where a text came from is `layers`' matter, and whether the kernel agrees (an interface
//! exists, an address is ours) the host set-up's.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::yaml::nearest;
use crate::node::Encryption;
use crate::node::{NodeName, Vni};

/// This node's underlay addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeIp {
    /// Those of the default route's interface.
    Auto,
    /// The given ones: at least one, and at most one address for each family.
    Given(Vec<NodeIpSpec>),
}

/// One item of `node-ip`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeIpSpec {
    /// An address of this machine.
    Address(IpAddr),
    /// The addresses that an interface has.
    Interface(IfName),
}

/// A name that the kernel accepts for a network interface.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IfName(String);

/// Why a name cannot be an interface's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "an interface name has 1 to 15 bytes without blanks, `/`, `:` and `%`, and is not `.`, `..`, `all` or `default`"
)]
pub struct BadIfName;

/// The overlay address on the TUN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OverlayAddress {
    /// Network + 1 of the node's first subnet, for each family.
    First,
    /// The network's own address of the node's first subnet, for each family.
    Network,
    /// These: at most one for each family.
    Given(Vec<IpAddr>),
}

/// The TUN device's MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mtu {
    /// The largest that fits every peer's path.
    Auto,
    /// This; at least 576. Whether IPv6 (1280) fits is known only together with the node list.
    Fixed(NonZeroU16),
}

/// How many worker threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workers {
    /// One for each core.
    Auto,
    /// 1 to 64.
    Fixed(NonZeroU8),
}

/// The I/O back end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Io {
    /// The best that works here.
    Auto,
    /// recvmmsg and sendmmsg with offloads.
    Mmsg,
    /// The same by io_uring, where it can be had.
    Uring,
    /// tokio-tun, plain packets.
    Tokio,
}

/// How peers' lives are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bfd {
    /// Whether they are. If not, peers that ask are told so.
    pub enabled: bool,
    /// Milliseconds between two packets to a peer that answers, 50 to 10,000.
    pub interval_ms: u16,
    /// How many in a row may be missing, 3 to 50.
    pub multiplier: u8,
    /// The VXLAN network of these packets.
    pub vni: Vni,
}

impl Default for Bfd {
    fn default() -> Self {
        // RFC 8971's own management network is 1, which is also flannel's for data
        Bfd { enabled: true, interval_ms: 150, multiplier: 6, vni: Vni::MANAGEMENT }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl IfName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn default_tun() -> Self {
        IfName("mesh0".to_owned())
    }
}

impl FromStr for IfName {
    type Err = BadIfName;

    /// The kernel's `dev_valid_name`, and without `%` (a template) and the two names that sysctl gives a meaning.
    fn from_str(text: &str) -> Result<Self, BadIfName> {
        let bad_char = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
        let reserved = matches!(text, "." | ".." | "all" | "default");
        if (1..=15).contains(&text.len()) && !reserved && !text.contains(bad_char) {
            Ok(IfName(text.to_owned()))
        } else {
            Err(BadIfName)
        }
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for NodeIpSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeIpSpec::Address(ip) => ip.fmt(f),
            NodeIpSpec::Interface(name) => name.fmt(f),
        }
    }
}

/// A value, or what to write instead.
pub(crate) type Read<T> = Result<T, String>;

pub(crate) fn node_name(text: &str) -> Read<NodeName> {
    text.parse().map_err(|_| {
        "use 1 to 63 characters out of letters, digits, `.`, `_` and `-`, starting with a letter or digit; set node-name"
            .into()
    })
}

pub(crate) fn node_ip(text: &str) -> Read<NodeIpSpec> {
    // "10.9.0" and "fd00:1" are addresses with a mistake, not interfaces; `:` cannot be in an interface's name anyway.
    let meant_as_address = text.contains(':') || text.chars().all(|c| c.is_ascii_digit() || c == '.');
    match text.parse() {
        Ok(ip) => underlay(ip).map(NodeIpSpec::Address),
        Err(_) if meant_as_address => Err("this is not an IP address; write one without port and prefix length".into()),
        Err(_) => text
            .parse()
            .map(NodeIpSpec::Interface)
            .map_err(|error: BadIfName| format!("write an IP address or an interface's name ({error})")),
    }
}

pub(crate) fn advertise_address(text: &str) -> Read<IpAddr> {
    underlay(ip(text)?)
}

pub(crate) fn tun(text: &str) -> Read<IfName> {
    match text.parse::<IfName>() {
        Ok(_) if text == "lo" => Err("that is the loopback device; choose another name".into()),
        Ok(name) => Ok(name),
        Err(error) => Err(error.to_string()),
    }
}

pub(crate) fn overlay_address(text: &str) -> Read<OverlayAddress> {
    match text {
        "first" => Ok(OverlayAddress::First),
        "network" => Ok(OverlayAddress::Network),
        _ => {
            let wanted = || String::from("use `first`, `network` or an IP address without prefix length");
            let ip = text.parse().map_err(|_| wanted())?;
            unicast(ip).map(|ip| OverlayAddress::Given(vec![ip]))
        }
    }
}

pub(crate) fn bfd(text: &str) -> Read<Bfd> {
    let mut bfd = Bfd::default();
    if text == "off" {
        return Ok(Bfd { enabled: false, ..bfd });
    }
    let wanted = || String::from("use `off`, or out of `interval`, `multiplier` and `vni` what is to differ");
    for (name, value) in text.split(',').map(|pair| pair.split_once('=').unwrap_or((pair, ""))) {
        match name.trim() {
            "interval" => {
                let ms = number(value.trim(), 50, 10_000).and_then(|ms| u16::try_from(ms).ok());
                bfd.interval_ms = ms.ok_or("`interval` is 50 to 10000 milliseconds")?;
            }
            "multiplier" => {
                let times = number(value.trim(), 3, 50).and_then(|times| u8::try_from(times).ok());
                bfd.multiplier = times.ok_or("`multiplier` is 3 to 50: fewer packets than three are lost too often")?;
            }
            "vni" => bfd.vni = vni(value.trim())?,
            _ => return Err(wanted()),
        }
    }
    Ok(bfd)
}

pub(crate) fn port(text: &str) -> Read<NonZeroU16> {
    number(text, 1, u16::MAX.into())
        .and_then(|n| u16::try_from(n).ok())
        .and_then(NonZeroU16::new)
        .ok_or_else(|| "use a number from 1 to 65535".into())
}

pub(crate) fn vni(text: &str) -> Read<Vni> {
    number(text, 0, u32::MAX).and_then(Vni::new).ok_or_else(|| "use a number from 0 to 16777215".into())
}

pub(crate) fn mtu(text: &str) -> Read<Mtu> {
    match text {
        "auto" => Ok(Mtu::Auto),
        _ => number(text, 576, u16::MAX.into())
            .and_then(|n| u16::try_from(n).ok())
            .and_then(NonZeroU16::new)
            .map(Mtu::Fixed)
            .ok_or_else(|| "use `auto` or a number from 576 (from 1280 with IPv6) to 65535".into()),
    }
}

pub(crate) fn encryption(text: &str) -> Read<Encryption> {
    match text {
        "none" => Ok(Encryption::None),
        "wireguard" => Ok(Encryption::Wireguard),
        _ => Err("use `none` (VXLAN in the clear) or `wireguard`".into()),
    }
}

pub(crate) fn workers(text: &str) -> Read<Workers> {
    match text {
        "auto" => Ok(Workers::Auto),
        _ => number(text, 1, 64)
            .and_then(|n| u8::try_from(n).ok())
            .and_then(NonZeroU8::new)
            .map(Workers::Fixed)
            .ok_or_else(|| "use `auto` or a number from 1 to 64".into()),
    }
}

pub(crate) fn busy_poll(text: &str) -> Read<Duration> {
    match text {
        "off" => Ok(Duration::ZERO),
        _ => number(text, 1, 10_000)
            .map(|micros| Duration::from_micros(micros.into()))
            .ok_or_else(|| "use `off` or a number of microseconds from 1 to 10000".into()),
    }
}

/// Whether something is used wherever it can be.
pub(crate) fn auto(text: &str) -> Read<bool> {
    match text {
        "auto" => Ok(true),
        "off" => Ok(false),
        _ => Err("use `auto` or `off`".into()),
    }
}

pub(crate) fn io(text: &str) -> Read<Io> {
    match text {
        "auto" => Ok(Io::Auto),
        "mmsg" => Ok(Io::Mmsg),
        "tokio" => Ok(Io::Tokio),
        "uring" => Ok(Io::Uring),
        _ => Err("use `auto`, `mmsg`, `uring` or `tokio`".into()),
    }
}

pub(crate) fn listen(text: &str) -> Read<SocketAddr> {
    let address = text.parse::<SocketAddr>().ok().filter(|address| address.port() != 0);
    address.ok_or_else(|| "use an address with a port, as in `127.0.0.1:9346` or `[::1]:9346`".into())
}

pub(crate) fn path(text: &str) -> Read<PathBuf> {
    if text.is_empty() || text.contains('\0') { Err("use a path".into()) } else { Ok(PathBuf::from(text)) }
}

pub(crate) fn socket(text: &str) -> Read<PathBuf> {
    // unix(7): sun_path has 108 bytes, the last for the terminating NUL.
    if text.len() > 107 {
        return Err("a unix socket's path has at most 107 bytes; use a shorter one".into());
    }
    path(text)
}

pub(crate) fn socket_mode(text: &str) -> Read<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = !digits.is_empty() && digits.len() <= 4 && digits.chars().all(|c| c.is_digit(8));
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if octal && mode <= 0o777 => Ok(mode),
        _ => Err("use octal permissions from 0000 to 0777, such as 0660".into()),
    }
}

pub(crate) fn socket_group(text: &str) -> Read<String> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, ':' | '/' | ',');
    if text.is_empty() || text.len() > 32 || text.contains(bad) {
        Err("use a group's name or number".into())
    } else {
        Ok(text.to_owned())
    }
}

pub(crate) fn log(text: &str) -> Read<String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    const WANTED: &str =
        "use error, warn, info, debug, trace, off, or a tracing filter such as `info,meshd::host=debug`";
    // tracing-subscriber 0.3.23 slices behind `=` and the like by bytes, and panics on some text that is not ASCII.
    if text.trim().is_empty() || !text.is_ascii() || text.len() > 1024 {
        return Err(WANTED.into());
    }
    // `debgu` is a valid filter: everything from a module of that name. Nobody means that.
    for word in text.split(',').map(str::trim).filter(|w| !w.contains([':', '=', '[', '{'])) {
        let level = LEVELS.iter().any(|l| l.eq_ignore_ascii_case(word)) || word.parse::<u8>().is_ok_and(|n| n <= 5);
        match nearest(word, LEVELS) {
            Some(meant) if !level => return Err(format!("did you mean `{meant}`? {WANTED}")),
            _ => {}
        }
    }
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{WANTED} ({error})")),
    }
}

pub(crate) fn log_format(text: &str) -> Read<LogFormat> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("use `text` or `json`".into()),
    }
}

/// Why an address cannot be one end of the underlay between machines.
pub(crate) fn not_underlay(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("it is an IPv4 address in IPv6 form; write it as IPv4"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("it is link-local and means something else on each link; use a global or unique local address")
        }
        _ if ip.is_loopback() => Some("it is a loopback address, which no other machine reaches"),
        _ => not_unicast(ip),
    }
}

/// Why an address cannot be one host's.
fn not_unicast(ip: IpAddr) -> Option<&'static str> {
    match ip {
        _ if ip.is_unspecified() => Some("it is the unspecified address; write the machine's own"),
        _ if ip.is_multicast() => Some("it is a multicast address; write the machine's own"),
        IpAddr::V4(Ipv4Addr::BROADCAST) => Some("it is the broadcast address; write the machine's own"),
        _ => None,
    }
}

fn underlay(ip: IpAddr) -> Read<IpAddr> {
    not_underlay(ip).map_or(Ok(ip), |why| Err(why.into()))
}

fn unicast(ip: IpAddr) -> Read<IpAddr> {
    not_unicast(ip).map_or(Ok(ip), |why| Err(why.into()))
}

fn ip(text: &str) -> Read<IpAddr> {
    text.parse().map_err(|_| "use an IP address without port and prefix length".into())
}

/// Decimal digits and nothing else: no sign, no exponent, no hexadecimal.
pub(super) fn number(text: &str, min: u32, max: u32) -> Option<u32> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|n| digits && (min..=max).contains(n))
}
