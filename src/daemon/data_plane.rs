//! The running data plane: device, sockets and worker threads, started and stopped as one.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use socket2::Socket;
use tokio::sync::mpsc::UnboundedSender;

use crate::config::Io;
use crate::engine::big_tcp::BigTcp;
use crate::engine::coalesce::Accepts;
use crate::engine::stats::Stats;
use crate::engine::tables::Tables;
use crate::io::pairs::{self, Pairs};
use crate::io::plain::Plain;
use crate::io::tap::Tap;
use crate::io::tun::{TunDevice, TunError};
use crate::io::tunnel_gso::TunnelGso;
use crate::io::udp::{self, UdpError, UdpOffloads, UdpPort};
use crate::io::uring;
use crate::io::worker::{Worker, WorkerError};
use crate::sys::udp::steer;

/// Sending sockets of each thread and address family: so many outer source ports spread a node pair's flows.
const SENDERS: u16 = 16;

/// Why there are none with the plain back end.
pub(super) const NO_SUPER_PACKETS: &str = "`io: tokio` hands over plain packets";

/// Reserved source ports of one address.
type Sources = Vec<(Socket, u16)>;

/// What the data plane is made of.
pub(super) struct Parts {
    pub tun: String,
    pub io: Io,
    pub workers: usize,
    pub busy_poll: Duration,
    pub tunnel_gso: Arc<TunnelGso>,
    /// Else why there is none.
    pub big_tcp: Result<(), String>,
    pub addresses: Vec<IpAddr>,
    pub port: u16,
    pub tables: Arc<ArcSwap<Tables>>,
    pub stats: Stats,
    pub tap: Arc<Tap>,
    pub started: Instant,
    pub ended: UnboundedSender<String>,
}

/// A running data plane. Dropping it stops the workers and waits for them.
pub(super) struct DataPlane {
    pub facts: Facts,
    stops: Vec<UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

/// What can be said of a running data plane.
#[derive(Clone)]
pub(super) struct Facts {
    pub io: &'static str,
    pub workers: usize,
    pub accepts: Accepts,
    pub offloads: Arc<UdpOffloads>,
    pub tunnel_gso: Arc<TunnelGso>,
    pub big_tcp: Result<Arc<BigTcp>, String>,
    pub reasons: Vec<(&'static str, String)>,
    pub receivers: Arc<Vec<Socket>>,
    /// The outer source ports that flows are spread over, for each of the node's addresses.
    pub source_ports: Vec<(IpAddr, Vec<u16>)>,
}

/// Why the data plane cannot be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Tun(#[from] TunError),
    #[error(transparent)]
    Udp(#[from] UdpError),
    #[error("cannot make the TUN device stay: {0}")]
    Keep(#[source] std::io::Error),
    #[error("cannot wait for packets: {0}")]
    Wait(#[source] std::io::Error),
    #[error("cannot start a thread: {0}")]
    Thread(#[source] std::io::Error),
}

impl DataPlane {
    /// Opens device and sockets. Workers wait for [`DataPlane::begin`], so that the host can be set up in between; only
    /// the plain back end works from now on.
    pub(super) fn open(parts: &Parts) -> Result<(Self, Vec<Worker>), StartError> {
        let offloads = Arc::new(UdpOffloads::default());
        let mut reasons = Vec::new();
        let uring = parts.io == Io::Uring && {
            let refused = uring::supported().err();
            if let Some(error) = &refused {
                tracing::warn!("io_uring cannot be used here, so `io: mmsg` is: {error}");
            }
            refused.is_none()
        };
        let queues = if uring { parts.workers } else { pairs::count(parts.workers) };
        let device = match parts.io {
            Io::Tokio => None,
            Io::Mmsg | Io::Uring => Some(TunDevice::open(&parts.tun, queues)?),
            Io::Auto => match TunDevice::open(&parts.tun, queues) {
                Ok(device) => Some(device),
                Err(error @ TunError::NoOffload(_)) => {
                    tracing::warn!("{error}: using that");
                    reasons.push(("tun_tso", error.to_string()));
                    None
                }
                Err(error) => return Err(error.into()),
            },
        };
        match device {
            Some(device) => Self::open_workers(parts, device, uring, offloads),
            None => Self::open_plain(parts, offloads, reasons).map(|plane| (plane, Vec::new())),
        }
    }

    fn open_workers(
        parts: &Parts,
        mut device: TunDevice,
        uring: bool,
        offloads: Arc<UdpOffloads>,
    ) -> Result<(Self, Vec<Worker>), StartError> {
        let big_tcp = match &parts.big_tcp {
            Ok(()) if !device.accepts.tso => Err("the TUN device takes no super-packets".to_owned()),
            decided => decided.clone().map(|()| Arc::new(BigTcp::on())),
        };
        let mut plane = DataPlane {
            facts: Facts {
                io: if uring { "uring" } else { "mmsg" },
                workers: parts.workers,
                accepts: device.accepts,
                offloads: offloads.clone(),
                tunnel_gso: parts.tunnel_gso.clone(),
                big_tcp: big_tcp.clone(),
                reasons: std::mem::take(&mut device.reasons),
                receivers: Arc::default(),
                source_ports: Vec::new(),
            },
            stops: Vec::new(),
            threads: Vec::new(),
        };
        let sources = reserve(parts)?;
        plane.facts.source_ports = numbers(parts, &sources);
        let queues = std::mem::take(&mut device.queues);
        let sockets = queues.iter().map(|_| open_receivers(parts, &offloads)).collect::<Result<Vec<_>, _>>()?;
        let each = (queues.len() / parts.workers.max(1)) as u32;
        for socket in sockets.first().into_iter().flatten() {
            if let Err(error) = steer(socket.as_fd(), parts.workers as u32, each) {
                tracing::debug!("the kernel spreads WireGuard sessions over workers by itself: {error}");
            }
        }
        let receivers = sockets.iter().flatten().filter_map(|socket| socket.try_clone().ok()).collect();
        let count = queues.len().max(1);
        let pairs = Arc::new(Pairs::new(queues, sockets, parts.workers, !uring).map_err(StartError::Wait)?);
        let threads = if uring { parts.workers } else { pairs::threads(parts.workers) };
        let mut workers = Vec::new();
        for thread in 0..threads {
            // what leaves by the data port has a buffer of its own a thread
            let pair = pairs.get(thread % count);
            let sockets = pair.map(|pair| pair.sockets.as_slice()).unwrap_or_default();
            let (stop, stopped) = UnixStream::pair().map_err(StartError::Thread)?;
            plane.stops.push(stop);
            workers.push(Worker {
                thread,
                workers: parts.workers,
                pairs: pairs.clone(),
                accepts: device.accepts,
                ports: open_ports(parts, sockets, &sources, &offloads)?,
                senders: SENDERS,
                tables: parts.tables.clone(),
                stats: parts.stats.clone(),
                tap: parts.tap.clone(),
                started: parts.started,
                stop: stopped,
                busy_poll: parts.busy_poll,
                cut_behind: parts.tunnel_gso.cut_behind.clone(),
                big_tcp: big_tcp.clone().unwrap_or_default(),
            });
        }
        plane.facts.receivers = Arc::new(receivers);
        Ok((plane, workers))
    }

    fn open_plain(
        parts: &Parts,
        offloads: Arc<UdpOffloads>,
        mut reasons: Vec<(&'static str, String)>,
    ) -> Result<Self, StartError> {
        let sources = reserve(parts)?;
        let sockets = open_receivers(parts, &offloads)?;
        let ports = open_ports(parts, &sockets, &sources, &offloads)?;
        let receivers = sockets.iter().filter_map(|socket| socket.try_clone().ok()).collect();
        let (stop, stopped) = UnixStream::pair().map_err(StartError::Thread)?;
        let plain = Plain {
            name: parts.tun.clone(),
            ports,
            receivers: sockets,
            senders: SENDERS,
            tables: parts.tables.clone(),
            stats: parts.stats.clone(),
            tap: parts.tap.clone(),
            started: parts.started,
            stop: stopped,
        };
        let (tell, opened) = mpsc::channel();
        let ended = parts.ended.clone();
        let thread = spawn("plain".to_owned(), ended, move || plain.run(|result| _ = tell.send(result)))?;
        opened.recv().unwrap_or(Err(TunError::Busy(parts.tun.clone())))?;
        if reasons.is_empty() {
            for offload in ["tun_tso", "tun_uso"] {
                reasons.push((offload, NO_SUPER_PACKETS.to_owned()));
            }
        }
        let facts = Facts {
            io: "tokio",
            workers: 1,
            accepts: Plain::ACCEPTS,
            offloads,
            tunnel_gso: Arc::new(TunnelGso::off(NO_SUPER_PACKETS)),
            big_tcp: Err(NO_SUPER_PACKETS.to_owned()),
            reasons,
            receivers: Arc::new(receivers),
            source_ports: numbers(parts, &sources),
        };
        Ok(DataPlane { facts, stops: vec![stop], threads: vec![thread] })
    }

    /// Has the device stay when meshd ends, and the workers begin.
    pub(super) fn begin(&mut self, workers: Vec<Worker>, ended: &UnboundedSender<String>) -> Result<(), StartError> {
        if let Some(pair) = workers.first().and_then(|worker| worker.pairs.get(0)) {
            pair.tun.keep_device().map_err(StartError::Keep)?;
        }
        let run = if self.facts.io == "uring" { uring::run } else { Worker::run };
        for worker in workers {
            let name = match worker.thread.checked_sub(worker.workers) {
                None => format!("worker-{}", worker.thread),
                Some(number) => format!("bulk-{number}"),
            };
            self.threads.push(spawn(name, ended.clone(), move || run(worker))?);
        }
        Ok(())
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.stops.clear();
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

/// The outer source ports on each of the node's addresses.
fn reserve(parts: &Parts) -> Result<Vec<Sources>, UdpError> {
    parts.addresses.iter().map(|ip| udp::reserve(*ip, SENDERS)).collect()
}

fn numbers(parts: &Parts, sources: &[Sources]) -> Vec<(IpAddr, Vec<u16>)> {
    let of = |(ip, sources): (&IpAddr, &Sources)| (*ip, sources.iter().map(|(_, port)| *port).collect());
    parts.addresses.iter().zip(sources).map(of).collect()
}

/// One more socket on each of the node's addresses that receives.
fn open_receivers(parts: &Parts, offloads: &UdpOffloads) -> Result<Vec<Socket>, UdpError> {
    parts.addresses.iter().map(|ip| udp::receiver(SocketAddr::new(*ip, parts.port), offloads)).collect()
}

fn open_ports(
    parts: &Parts,
    receivers: &[Socket],
    sources: &[Sources],
    offloads: &Arc<UdpOffloads>,
) -> Result<Vec<UdpPort>, UdpError> {
    let open = |((ip, sources), receiver): ((&IpAddr, &Sources), &Socket)| {
        let ports: Vec<u16> = sources.iter().map(|(_, port)| *port).collect();
        let port = UdpPort::open(SocketAddr::new(*ip, parts.port), receiver, &ports, offloads)?;
        Ok(port.with_tunnel_gso(parts.tunnel_gso.clone()))
    };
    parts.addresses.iter().zip(sources).zip(receivers).map(open).collect()
}

/// A thread that tells when its work ends without having been stopped, however it does.
fn spawn(
    name: String,
    ended: UnboundedSender<String>,
    work: impl FnOnce() -> Result<(), WorkerError> + Send + 'static,
) -> Result<JoinHandle<()>, StartError> {
    let told = name.clone();
    let run = move || {
        super::privileges::settle(); // all that it needs is open
        let why = match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it panicked".to_owned(),
        };
        ended.send(format!("{told}: {why}")).ok();
    };
    std::thread::Builder::new().name(name).spawn(run).map_err(StartError::Thread)
}
