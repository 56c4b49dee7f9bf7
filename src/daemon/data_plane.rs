//! The running data plane: device, sockets and worker threads, started and stopped as one.

use std::net::{IpAddr, SocketAddr};
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
use crate::engine::coalesce::Accepts;
use crate::engine::stats::Stats;
use crate::engine::tables::Tables;
use crate::io::plain::Plain;
use crate::io::tap::Tap;
use crate::io::tun::{TunDevice, TunError};
use crate::io::udp::{self, UdpError, UdpOffloads, UdpPort};
use crate::io::uring;
use crate::io::worker::{Worker, WorkerError};

/// Sending sockets of each worker and address family: so many outer source ports spread a node pair's flows.
const SENDERS: u16 = 8;

/// Reserved source ports of one address.
type Sources = Vec<(Socket, u16)>;

/// What the data plane is made of.
pub(super) struct Parts {
    pub tun: String,
    pub io: Io,
    pub busy_poll: Duration,
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
    #[error("cannot start a thread: {0}")]
    Thread(#[source] std::io::Error),
}

impl DataPlane {
    /// Opens device and sockets. Workers wait for [`DataPlane::begin`], so that the host can be set up in between; only
    /// the plain back end works from now on.
    pub(super) fn open(parts: &Parts) -> Result<(Self, Vec<Worker>), StartError> {
        let offloads = Arc::new(UdpOffloads::default());
        let mut reasons = Vec::new();
        let device = match parts.io {
            Io::Tokio => None,
            Io::Mmsg | Io::Uring => Some(TunDevice::open(&parts.tun, parts.stats.workers())?),
            Io::Auto => match TunDevice::open(&parts.tun, parts.stats.workers()) {
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
            Some(device) => Self::open_workers(parts, device, offloads),
            None => Self::open_plain(parts, offloads, reasons).map(|plane| (plane, Vec::new())),
        }
    }

    fn open_workers(
        parts: &Parts,
        mut device: TunDevice,
        offloads: Arc<UdpOffloads>,
    ) -> Result<(Self, Vec<Worker>), StartError> {
        let uring = parts.io == Io::Uring && {
            let refused = uring::supported().err();
            if let Some(error) = &refused {
                tracing::warn!("io_uring cannot be used here, so `io: mmsg` is: {error}");
            }
            refused.is_none()
        };
        let mut plane = DataPlane {
            facts: Facts {
                io: if uring { "uring" } else { "mmsg" },
                workers: device.queues.len(),
                accepts: device.accepts,
                offloads: offloads.clone(),
                reasons: std::mem::take(&mut device.reasons),
                receivers: Arc::default(),
                source_ports: Vec::new(),
            },
            stops: Vec::new(),
            threads: Vec::new(),
        };
        let mut receivers = Vec::new();
        let mut workers = Vec::new();
        let sources = reserve(parts)?;
        plane.facts.source_ports = numbers(parts, &sources);
        for (index, tun) in std::mem::take(&mut device.queues).into_iter().enumerate() {
            let ports = open_ports(parts, &sources, &offloads)?;
            receivers.extend(ports.iter().filter_map(|port| port.watch().ok()));
            let (stop, stopped) = UnixStream::pair().map_err(StartError::Thread)?;
            plane.stops.push(stop);
            workers.push(Worker {
                index,
                tun,
                accepts: device.accepts,
                ports,
                senders: SENDERS,
                tables: parts.tables.clone(),
                stats: parts.stats.clone(),
                tap: parts.tap.clone(),
                started: parts.started,
                stop: stopped,
                busy_poll: parts.busy_poll,
            });
        }
        for port in workers.first().map(|worker| worker.ports.as_slice()).unwrap_or_default() {
            if let Err(error) = port.steer(workers.len()) {
                tracing::debug!("the kernel spreads WireGuard sessions over workers by itself: {error}");
            }
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
        let ports = open_ports(parts, &sources, &offloads)?;
        let receivers = ports.iter().filter_map(|port| port.watch().ok()).collect();
        let (stop, stopped) = UnixStream::pair().map_err(StartError::Thread)?;
        let plain = Plain {
            name: parts.tun.clone(),
            ports,
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
                reasons.push((offload, "`io: tokio` hands over plain packets".to_owned()));
            }
        }
        let facts = Facts {
            io: "tokio",
            workers: 1,
            accepts: Plain::ACCEPTS,
            offloads,
            reasons,
            receivers: Arc::new(receivers),
            source_ports: numbers(parts, &sources),
        };
        Ok(DataPlane { facts, stops: vec![stop], threads: vec![thread] })
    }

    /// Has the device stay when meshd ends, and the workers begin.
    pub(super) fn begin(&mut self, workers: Vec<Worker>, ended: &UnboundedSender<String>) -> Result<(), StartError> {
        if let Some(worker) = workers.first() {
            worker.tun.keep_device().map_err(StartError::Keep)?;
        }
        let run = if self.facts.io == "uring" { uring::run } else { Worker::run };
        for worker in workers {
            let name = format!("worker-{}", worker.index);
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

fn open_ports(parts: &Parts, sources: &[Sources], offloads: &Arc<UdpOffloads>) -> Result<Vec<UdpPort>, UdpError> {
    let open = |(ip, sources): (&IpAddr, &Sources)| {
        let ports: Vec<u16> = sources.iter().map(|(_, port)| *port).collect();
        UdpPort::open(SocketAddr::new(*ip, parts.port), &ports, offloads)
    };
    parts.addresses.iter().zip(sources).map(open).collect()
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
