//! What kernel, offloads and permissions allow here, tried out: `meshd selftest`.
//!
//! In a network namespace of its own, which ends with it, the production parts carry real traffic of this kernel's own TCP
//! and UDP: TUN device, both engine halves, UDP sockets with segmentation and coalescing. What arrives is compared byte for
//! byte, since an offload that is offered may still be a lie. Nothing outside that namespace is touched.

mod mirror;

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use self::mirror::Mirror;
use crate::engine::big_tcp::{BigTcp, State};
use crate::host::{Desired, Host};
use crate::io::tun::TunDevice;
use crate::io::tunnel_gso::TunnelGso;
use crate::node::DEFAULT_PORT;

/// This side of the mirror.
const HERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 1))];
/// And beyond (both out of the prefixes for such tests, RFC 2544 and RFC 5180).
const BEYOND: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2)), IpAddr::V6(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 2))];
const TUN: &str = "selftest0";
const MTU: u16 = 1450;
/// What a TCP stream carries each way.
const STREAM: usize = 8 << 20;
/// Datagrams of each size.
const DATAGRAMS: usize = 45;
/// How long anything may stand still.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It does not work, and meshd does without.
    Off,
    /// meshd does not work with that.
    Bad,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was tried.
    pub name: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// What was seen, or the reason and the fix.
    pub detail: String,
}

/// All checks.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether meshd works here.
    pub good: bool,
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Check { name, outcome, detail } in &self.checks {
            let word = match outcome {
                Outcome::Ok => "ok",
                Outcome::Off => "off",
                Outcome::Bad => "BAD",
            };
            writeln!(f, "{name:<14} {word:<4} {detail}")?;
        }
        match (self.good, self.checks.iter().any(|check| check.outcome == Outcome::Off)) {
            (true, false) => writeln!(f, "\ngood: meshd runs here with everything it can use"),
            (true, true) => writeln!(f, "\ngood: meshd runs here, and does without what is off"),
            (false, _) => writeln!(f, "\nBAD: meshd does not run here; the first bad line says why"),
        }
    }
}

#[derive(Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn add(&mut self, name: &'static str, outcome: Outcome, detail: impl fmt::Display) {
        self.0.push(Check { name, outcome, detail: detail.to_string() });
    }

    fn tried(&mut self, name: &'static str, done: anyhow::Result<String>) {
        match done {
            Ok(detail) => self.add(name, Outcome::Ok, detail),
            Err(error) => self.add(name, Outcome::Bad, format!("{error:#}")),
        }
    }
}

/// Tries it all out. Takes some seconds.
pub fn run() -> Report {
    let mut checks = Checks::default();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    checks.add("kernel", Outcome::Ok, release.trim());
    // the namespace is that thread's, and ends with it
    let inside = std::thread::scope(|scope| scope.spawn(|| in_namespace(&mut checks)).join());
    if inside.is_err() {
        checks.add("selftest", Outcome::Bad, "it panicked: this is a bug of meshd's");
    }
    let good = checks.0.iter().all(|check| check.outcome != Outcome::Bad);
    Report { good, checks: checks.0 }
}

fn in_namespace(checks: &mut Checks) {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        let fix = "run it as root; in a container that needs CAP_SYS_ADMIN";
        return checks.add("namespace", Outcome::Bad, format!("no network namespace of its own: {error}; {fix}"));
    }
    checks.add("namespace", Outcome::Ok, "a network namespace of its own, which ends with this");
    if let Err(error) = within(checks) {
        checks.add("set-up", Outcome::Bad, format!("{error:#}"));
    }
}

fn within(checks: &mut Checks) -> anyhow::Result<()> {
    let mut device = TunDevice::open(TUN, 1)?;
    checks.add("tun", Outcome::Ok, "/dev/net/tun, with offload headers and several queues");
    let why = |name: &str| device.reasons.iter().find(|(reason, _)| *reason == name).map(|(_, why)| why.clone());
    let offered = |name, on: bool| {
        let outcome = if on { Outcome::Ok } else { Outcome::Off };
        (name, outcome, why(name).unwrap_or_else(|| "offered by the kernel".to_owned()))
    };
    for (name, outcome, detail) in [offered("tun_tso", device.accepts.tso), offered("tun_uso", device.accepts.uso)] {
        checks.add(name, outcome, detail);
    }
    match Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)) {
        Ok(_) => checks.add("raw_icmp", Outcome::Ok, "what routers say of the path MTU is heard"),
        Err(error) => {
            let what = "path MTU discovery does without what routers say; CAP_NET_RAW allows it";
            checks.add("raw_icmp", Outcome::Off, format!("{error}: {what}"));
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    let report = runtime.block_on(set_up()).context("the device cannot be set up")?;
    checks.add("host", Outcome::Ok, report);
    match runtime.block_on(leaves_uncut()) {
        Ok(said) => checks.add("tunnel_gso", Outcome::Ok, said),
        Err(error) => checks.add("tunnel_gso", Outcome::Off, format!("{error:#}")),
    }
    let knows_big_tcp = runtime.block_on(async { Host::open()?.knows_big_tcp().await })?;
    let big_tcp = Arc::new(if knows_big_tcp { BigTcp::on() } else { BigTcp::default() });
    let queue = device.queues.pop().context("the device has no queue")?;
    let mirror = Mirror::start(queue, device.accepts, big_tcp.clone(), HERE, BEYOND, MTU)?;
    let offloads = mirror.offloads();
    for (name, missing, since) in [
        ("udp_gso", offloads.0, "UDP_SEGMENT (Linux 4.18 has it)"),
        ("udp_gro", offloads.1, "UDP_GRO (Linux 5.0 has it)"),
    ] {
        match missing {
            false => checks.add(name, Outcome::Ok, "offered by the kernel"),
            true => checks.add(name, Outcome::Off, format!("the kernel does not know {since}")),
        }
    }
    for (name, at) in [("tcp_ipv4", 0), ("tcp_ipv6", 1)] {
        checks.tried(name, counted(&mirror, || stream(HERE[at], BEYOND[at])));
    }
    match mirror.big_writes() {
        _ if !knows_big_tcp => checks.add("big_tcp", Outcome::Off, "the kernel does not know it (Linux 6.6 does)"),
        _ if big_tcp.state(0) != State::On => {
            checks.add(
                "big_tcp",
                Outcome::Off,
                "the kernel refused a super-packet of more than 64 KiB (Linux 6.6 takes them)",
            );
        }
        0 => checks.add("big_tcp", Outcome::Off, "no super-packet was longer than 64 KiB"),
        many => checks.add("big_tcp", Outcome::Ok, format!("{many} of those super-packets were longer than 64 KiB")),
    }
    for (name, at) in [("udp_ipv4", 0), ("udp_ipv6", 1)] {
        checks.tried(name, counted(&mirror, || datagrams(HERE[at], BEYOND[at])));
    }
    checks.tried("checksums", wrong_checksum(&mirror));
    if mirror.gso_failed() {
        checks.add("udp_gso", Outcome::Off, "a segmented send failed where the same datagrams alone left");
    }
    mirror.stop()
}

/// Whether super-packets could leave uncut, with a network card that cuts what lies in a tunnel.
async fn leaves_uncut() -> anyhow::Result<String> {
    let program = TunnelGso::load().context("the kernel takes no program for it")?;
    let way = TunnelGso::off("");
    way.open(TUN, &program)?;
    Host::open()?.ensure_outlet(&TunnelGso::device(TUN)).await.map_err(anyhow::Error::msg)?;
    let nowhere: [IpAddr; 2] =
        [Ipv4Addr::new(192, 0, 2, 1).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()];
    for (from, nowhere) in HERE.into_iter().zip(nowhere) {
        let ends = [from, nowhere].map(|ip| SocketAddr::new(ip, DEFAULT_PORT));
        let back = way.gives_back(ends[0], ends[1]).context("a super-packet is refused")?;
        anyhow::ensure!(back, "a super-packet to {nowhere}, for which there is no way, does not come back");
    }
    Ok("super-packets can leave uncut, where the network card cuts what lies in a tunnel (`ethtool -k`)".to_owned())
}

async fn set_up() -> anyhow::Result<String> {
    let host = Host::open()?;
    host.loopback_up().await?;
    let nets = |ips: [IpAddr; 2]| ips.map(IpNet::from).to_vec();
    let desired = Desired {
        tun: TUN.to_owned(),
        mtu: MTU.into(),
        addresses: HERE.to_vec(),
        routes: nets(BEYOND),
        own_subnets: Vec::new(),
    };
    host.ensure(&desired).await?;
    Ok("addresses, routes and settings of the device are as meshd wants them".to_owned())
}

/// Does it, and adds how packets were joined and cut meanwhile.
fn counted(mirror: &Mirror, work: impl FnOnce() -> anyhow::Result<String>) -> anyhow::Result<String> {
    let before = mirror.reflected();
    let done = work();
    let seen = mirror.reflected().since(before);
    match done {
        Ok(said) => Ok(format!("{said}; {seen}")),
        Err(error) => Err(error.context(format!("packets got lost or changed ({seen})"))),
    }
}

/// Bytes that look like nothing else.
fn content(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A stream each way at the same time.
fn stream(here: IpAddr, beyond: IpAddr) -> anyhow::Result<String> {
    let listener = TcpListener::bind(SocketAddr::new(here, 0))?;
    let target = SocketAddr::new(beyond, listener.local_addr()?.port());
    let client = TcpStream::connect_timeout(&target, PATIENCE).context("no connection")?;
    let (server, _) = listener.accept()?;
    let (there, back) = (content(1, STREAM), content(2, STREAM));
    let ends = [(&client, &there, &back), (&server, &back, &there)];
    for (socket, ..) in ends {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
    }
    std::thread::scope(|scope| {
        let senders = ends.map(|(socket, data, _)| scope.spawn(move || (&mut &*socket).write_all(data)));
        let readers = ends.map(|(socket, _, expected)| {
            scope.spawn(move || {
                let mut got = vec![0; expected.len()];
                (&mut &*socket).read_exact(&mut got)?;
                let wrong = got.iter().zip(expected).position(|(a, b)| a != b);
                wrong.map_or(Ok(()), |at| Err(changed(at)))
            })
        });
        for thread in senders.into_iter().chain(readers) {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")))?;
        }
        Ok::<_, io::Error>(())
    })?;
    Ok(format!("{} MiB each way arrived unchanged", STREAM >> 20))
}

fn changed(at: usize) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("byte {at} is another one than was sent"))
}

/// Datagrams of several sizes, each in a burst, so that they are joined on their way.
fn datagrams(here: IpAddr, beyond: IpAddr) -> anyhow::Result<String> {
    let receiver = UdpSocket::bind(SocketAddr::new(here, 0))?;
    let sender = UdpSocket::bind(SocketAddr::new(here, 0))?;
    sender.connect(SocketAddr::new(beyond, receiver.local_addr()?.port()))?;
    receiver.set_read_timeout(Some(PATIENCE))?;
    let headers = if here.is_ipv4() { 28 } else { 48 };
    let longest = usize::from(MTU) - headers;
    let mut room = vec![0; 1 << 16];
    let (mut sent, mut seed) = (0, 1);
    for len in [1, 36, 500, 1200, longest] {
        let burst: Vec<Vec<u8>> = (0..DATAGRAMS).map(|n| content(seed + n as u32, len)).collect();
        seed += DATAGRAMS as u32;
        // longer ones as one super-packet, which the device hands over uncut where it can
        if len >= 500 && setsockopt(&sender, UdpGsoSegment, &(len as i32)).is_ok() {
            sender.send(&burst.concat())?;
        } else {
            burst.iter().try_for_each(|datagram| sender.send(datagram).map(drop))?;
        }
        for (number, datagram) in burst.iter().enumerate() {
            let got = receiver.recv(&mut room).with_context(|| format!("datagram {number} of {len} bytes"))?;
            if room.get(..got) != Some(datagram.as_slice()) {
                anyhow::bail!("datagram {number} of {len} bytes is another one, of {got} bytes");
            }
            sent += 1;
        }
    }
    Ok(format!("{sent} datagrams arrived unchanged, in order"))
}

/// A datagram whose checksum is wrong must not be taken, one whose checksum is right must.
fn wrong_checksum(mirror: &Mirror) -> anyhow::Result<String> {
    let receiver = UdpSocket::bind(SocketAddr::new(HERE[0], 0))?;
    receiver.set_read_timeout(Some(Duration::from_millis(300)))?;
    let port = receiver.local_addr()?.port();
    let mut room = [0; 64];
    for (flip, unfinished) in [(0, false), (0, true), (1, false)] {
        mirror.inject(BEYOND[0], HERE[0], port, flip, unfinished)?;
        match receiver.recv(&mut room) {
            Ok(_) if flip != 0 => anyhow::bail!("the kernel takes a datagram whose checksum is wrong"),
            Ok(len) if room.get(..len) != Some(mirror::GOLDEN) => anyhow::bail!("a datagram arrived changed"),
            Err(error) if flip == 0 => {
                let what = if unfinished { "to be completed by the kernel" } else { "that is right" };
                return Err(error).context(format!("a datagram with a checksum {what} did not arrive"));
            }
            _ => {}
        }
    }
    Ok("right and unfinished ones are taken, a wrong one is not".to_owned())
}
