//! Who holds a port: processes by way of `/proc`, else a kernel tunnel device.
//!
//! Owns the reading of `/proc/net/udp`, `/proc/net/tcp` and of processes' descriptors; does not know what the port is for.

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::{fmt, io};

use super::facts::Link;

/// Tries to bind the port as a stranger would: without SO_REUSEPORT, under which two processes would share it silently.
pub(super) fn probe(ip: IpAddr, port: u16) -> io::Result<()> {
    UdpSocket::bind(SocketAddr::new(ip, port)).map(drop)
}

/// Who holds a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// A process, by id and name.
    Process(u32, String),
    /// A kernel VXLAN device, by name.
    Vxlan(String),
    /// A socket of the kernel's, or of a process that is hidden from us.
    Unknown,
}

impl Owner {
    /// A command that frees the port.
    pub(super) fn remedy(&self, port: u16) -> String {
        match self {
            Owner::Process(pid, _) => format!("kill {pid}"),
            Owner::Vxlan(name) => format!("ip link del {name}"),
            Owner::Unknown => format!("ss -tulpn sport = :{port}  # shows it"),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Process(pid, name) => write!(f, "{name} (process {pid})"),
            Owner::Vxlan(name) => write!(f, "{name} (kernel VXLAN device)"),
            Owner::Unknown => f.write_str("a kernel tunnel, or a process that meshd cannot see"),
        }
    }
}

/// Finds who keeps (`ip`, `port`) from being bound.
pub(super) fn owners(ip: IpAddr, port: u16, links: &[Link]) -> Vec<Owner> {
    let mut inodes = HashSet::new();
    for table in ["/proc/net/udp", "/proc/net/udp6"] {
        // No IPv6 in the kernel, no table.
        let text = fs::read_to_string(table).unwrap_or_default();
        inodes.extend(sockets(&text).filter(|s| s.port == port && s.excludes(ip)).map(|s| s.inode));
    }
    // The sockets of kernel devices have no inode.
    inodes.remove(&0);
    let mut owners = processes(&inodes);
    if owners.is_empty() {
        let vxlans = links.iter().filter(|l| l.vxlan_port == Some(port));
        owners.extend(vxlans.map(|l| Owner::Vxlan(l.name.clone())));
    }
    if owners.is_empty() {
        owners.push(Owner::Unknown);
    }
    owners
}

/// Sockets that hold a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// All of `/proc/net/udp`.
    Udp,
    /// Those of `/proc/net/tcp` that listen. Connections have the port as well, and once closed belong to nobody.
    Tcp,
}

/// Everybody who holds the port, each with the address: one for each process and address, however many sockets.
pub(super) fn holders(tables: &[String], kind: Kind, port: u16, links: &[Link]) -> Vec<(IpAddr, Owner)> {
    let mut found = Vec::new();
    let holds = |socket: &Socket| socket.port == port && (kind == Kind::Udp || socket.state == LISTEN);
    for socket in tables.iter().flat_map(|table| sockets(table)).filter(holds) {
        let mut owners = processes(&HashSet::from([socket.inode]));
        if owners.is_empty() {
            let vxlans = links.iter().filter(|l| l.vxlan_port == Some(port));
            owners.extend(vxlans.map(|l| Owner::Vxlan(l.name.clone())));
        }
        let owners = if owners.is_empty() { vec![Owner::Unknown] } else { owners };
        for owner in owners {
            if !found.contains(&(socket.ip, owner.clone())) {
                found.push((socket.ip, owner));
            }
        }
    }
    found
}

/// `TCP_LISTEN` of the kernel's.
const LISTEN: u8 = 0x0a;

/// A line of `/proc/net/udp`, `/proc/net/tcp` or those of IPv6.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    ip: IpAddr,
    port: u16,
    state: u8,
    inode: u64,
}

impl Socket {
    /// Whether it stands in the way of a socket on `ip`. An IPv6 wildcard may cover IPv4 as well.
    fn excludes(&self, ip: IpAddr) -> bool {
        self.ip == ip || self.ip.is_unspecified() && (self.ip.is_ipv6() || ip.is_ipv4())
    }
}

fn sockets(table: &str) -> impl Iterator<Item = Socket> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (ip, port) = fields.nth(1)?.split_once(':')?;
        Some(Socket {
            ip: address(ip)?,
            port: u16::from_str_radix(port, 16).ok()?,
            // After the remote address.
            state: u8::from_str_radix(fields.nth(1)?, 16).ok()?,
            // After queues, timer, retransmissions, user and timeout.
            inode: fields.nth(5)?.parse().ok()?,
        })
    })
}

/// Words of eight hexadecimal digits, each in the machine's byte order.
fn address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let octets = <[u8; 16]>::try_from(words.concat()).ok()?;
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
}

/// The processes that hold one of the sockets open.
fn processes(inodes: &HashSet<u64>) -> Vec<Owner> {
    let mut found = Vec::new();
    if inodes.is_empty() {
        return found;
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end, or belong to another user, while it is being looked at.
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else { continue };
        let holds = descriptors
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok())
            .any(|target| target.to_str().and_then(inode).is_some_and(|i| inodes.contains(&i)));
        if holds {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(Owner::Process(pid, name.trim().to_owned()));
        }
    }
    found
}

fn inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    // The table is in the machine's byte order; this one comes from a little-endian machine.
    #[cfg(target_endian = "little")]
    #[test]
    fn reads_the_tables_of_the_kernel() {
        let v4 = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n  \
            312: 0100090A:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 41234 2 0000000000000000 0\n  \
            400: 00000000:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 2 0000000000000000 0\n";
        let read: Vec<Socket> = sockets(v4).collect();
        assert_eq!(read[0], Socket { ip: "10.9.0.1".parse().unwrap(), port: 8472, state: 7, inode: 41234 });
        assert_eq!(read[1], Socket { ip: "0.0.0.0".parse().unwrap(), port: 8472, state: 7, inode: 0 });
        assert_eq!(
            address("000000FD000000000000000001000000"),
            Some("fd00::1".parse().unwrap()),
            "one word for every four bytes"
        );
    }

    #[test]
    fn garbage_is_no_socket() {
        assert_eq!(sockets("head\n\n1: zz:1 0\n2: 0100090A:99999 0 0 0 0 0 0 0 5\n").count(), 0);
        assert_eq!(inode("socket:[12]"), Some(12));
        assert_eq!(inode("anon_inode:[eventpoll]"), None);
    }

    // A connection that is over (06) has its port for a minute more, and no inode.
    #[test]
    fn a_tcp_port_is_held_by_who_listens() {
        let table = "head\n\
            0: 0100007F:094B 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 41234 1 0 100 0 0 10 0\n\
            1: 0200007F:094B 0200007F:9C40 06 00000000:00000000 03:00001770 00000000 0 0 0 3 0\n"
            .to_owned();
        let all = |kind| holders(std::slice::from_ref(&table), kind, 2379, &[]).len();
        assert_eq!((all(Kind::Tcp), all(Kind::Udp)), (1, 2));
    }

    #[test]
    fn a_wildcard_stands_in_the_way_of_its_family() {
        let excludes = |held: &str, wanted: &str| {
            Socket { ip: held.parse().unwrap(), port: 1, state: 7, inode: 1 }.excludes(wanted.parse().unwrap())
        };
        assert!(excludes("0.0.0.0", "10.9.0.1"));
        assert!(excludes("::", "10.9.0.1"));
        assert!(excludes("::", "fd00::1"));
        assert!(excludes("10.9.0.1", "10.9.0.1"));
        assert!(!excludes("0.0.0.0", "fd00::1"));
        assert!(!excludes("10.9.0.2", "10.9.0.1"));
    }

    #[test]
    fn this_process_is_found_by_its_port() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let ip = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(probe(ip, port).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let found = owners(ip, port, &[]);
        assert!(matches!(found.as_slice(), [Owner::Process(pid, _)] if *pid == std::process::id()), "{found:?}");
        drop(socket);
        assert!(probe(ip, port).is_ok());
    }
}
