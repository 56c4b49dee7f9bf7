//! Builds, connects and stops everything; what the parts do is theirs.
//!
//! Start: lock, node list, underlay, clashes, device, host, workers, admin socket. Then one loop waits for signals, the
//! node list, changes of the host, and workers that end; whatever happens, the whole desired state is worked out anew and
//! put into effect.

mod data_plane;
mod logging;
mod view;

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use self::data_plane::{DataPlane, Parts};
use self::logging::Logging;
use self::view::{Concern, Shared, lock};
use crate::admin::server;
use crate::admin::socket::{AdminSocket, SocketOptions};
use crate::config::load::Loader;
use crate::config::{Config, NodeIp, Workers};
use crate::control::nodes_file;
use crate::control::plan::{Carrier, Plan, plan};
use crate::control::reconcile::{Verdict, judge};
use crate::control::source::NodesFile;
use crate::engine::stats::{PeerStats, Stats};
use crate::engine::tables::Tables;
use crate::host::{self, Desired, Host, HostError, Preflight, Underlay, Watch, union};
use crate::node::{Node, NodeList, NodeName};

/// How often the node list file is looked at.
const POLL: Duration = Duration::from_millis(500);
/// How often what failed is tried again, and slow counters are read.
const TICK: Duration = Duration::from_secs(1);

/// Runs the data plane until it is told to stop. `loader` reads the configuration again at SIGHUP.
pub async fn run(config: Config, loader: Loader) -> anyhow::Result<()> {
    let logging = Logging::start(&config);
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    let (ended, mut workers_ended) = mpsc::unbounded_channel();

    let mut daemon = Daemon::start(config, ended).await?;
    let options = &daemon.config;
    let socket =
        SocketOptions { path: options.socket.clone(), mode: options.socket_mode, group: options.socket_group.clone() };
    let socket = AdminSocket::bind(&socket).context("cannot open the admin socket")?;
    let admin = tokio::spawn(server::serve(socket, daemon.shared.clone()));

    let mut host_changes = Watch::open()?;
    let mut poll = interval(POLL);
    let mut tick = interval(TICK);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tracing::info!("ready");
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => daemon.reload(&loader, &logging).await,
            () = daemon.shared.accept.notified() => daemon.accept().await,
            _ = poll.tick() => daemon.poll_nodes().await,
            _ = tick.tick() => daemon.tick().await,
            () = host_changes.changed() => daemon.host_changed().await,
            Some(why) = workers_ended.recv() => {
                daemon.plane = None; // its workers have all ended now, and what they had to say is the same
                while workers_ended.try_recv().is_ok() {}
                daemon.workers_ended(&why).await;
            }
        }
    }
    admin.abort();
    admin.await.ok();
    daemon.stop();
    Ok(())
}

/// An error and its causes in one line; a cause that the error itself quotes is not said twice.
pub fn told(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |told, cause| {
        let cause = cause.to_string();
        if told.contains(&cause) { told } else { format!("{told}: {cause}") }
    })
}

/// Removes the device, routes and rules that a stopped daemon leaves on purpose.
pub async fn cleanup(config: Config) -> anyhow::Result<()> {
    let tun = config.tun.as_str();
    let _lock = Lock::take(tun)?;
    let report = Host::open()?.cleanup(tun).await?;
    if let Some(what) = &report.foreign_device {
        println!("{tun} was left alone, since it is not meshd's: it is {what}");
    }
    if let Some(device) = &report.device {
        println!("removed the device {device}");
    }
    for route in &report.routes {
        println!("removed the route {route}");
    }
    if report.is_empty() {
        println!("nothing of meshd's is left here");
    }
    Ok(())
}

/// The right to run with a device's name: an abstract unix socket, which belongs to the network namespace as the device
/// does, and which the kernel frees however the process ends.
struct Lock(#[allow(dead_code)] UnixListener);

impl Lock {
    fn take(tun: &str) -> anyhow::Result<Self> {
        let address = UnixAddr::from_abstract_name(format!("meshd/{tun}")).context("cannot name the lock")?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Lock(listener)),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                bail!("another meshd is running with the device {tun}: stop it first, or set another `tun`")
            }
            Err(error) => Err(error).context(format!("cannot take the lock for the device {tun}")),
        }
    }
}

struct Daemon {
    config: Config,
    host: Host,
    nodes_file: NodesFile,
    shared: Arc<Shared>,
    known: HashMap<NodeName, Arc<PeerStats>>,
    underlays: Vec<Underlay>,
    desired: Desired,
    plane: Option<DataPlane>,
    ended: mpsc::UnboundedSender<String>,
    /// Tables that a worker may still hold: the last owner frees them, and that must not be a worker.
    retired: Vec<Arc<Tables>>,
    tun_drops_before: Option<u64>,
    _lock: Lock,
}

impl Daemon {
    async fn start(config: Config, ended: mpsc::UnboundedSender<String>) -> anyhow::Result<Self> {
        let tun = config.tun.as_str().to_owned();
        let lock = Lock::take(&tun)?;
        let host = Host::open()?;
        let path = config.nodes_file.clone().ok_or_else(|| anyhow!("no nodes-file is set"))?;
        let mut nodes_file = NodesFile::new(path, config.port);
        let list = nodes_file.load()?;
        let own =
            nodes_file::own(&list, &config.node_name).with_context(|| nodes_file.path().display().to_string())?.clone();
        let underlays = resolve(&host, &config, &own).await?;

        let workers = match config.workers {
            Workers::Auto => std::thread::available_parallelism().map_or(1, usize::from).min(64),
            Workers::Fixed(workers) => usize::from(workers.get()),
        };
        let mut known = HashMap::new();
        let plan = plan(&config, &list, &own, &carriers(&underlays), &mut known, workers)?;
        plan.carries_its_ipv6()?;
        let desired = desired(&tun, &plan);
        host.preflight(&Preflight {
            tun: tun.clone(),
            port: config.port.get(),
            node_ips: underlays.iter().map(|underlay| underlay.ip).collect(),
            prefixes: desired.routes.clone(),
            own_subnets: plan.own_subnets.clone(),
        })
        .await?;

        let stats = Stats::new(workers);
        let port = config.port.get();
        let tables = Tables::empty(plan.local.clone());
        let shared = Arc::new(Shared::new(config.node_name.clone(), tun, port, tables, stats));
        let mut daemon = Daemon {
            config,
            host,
            nodes_file,
            shared,
            known,
            underlays,
            desired,
            plane: None,
            ended,
            retired: Vec::new(),
            tun_drops_before: None,
            _lock: lock,
        };
        daemon.publish(plan, &list, &own);
        daemon.start_plane().await?;
        Ok(daemon)
    }

    /// Opens device and sockets, sets up the host, and lets the workers begin.
    async fn start_plane(&mut self) -> anyhow::Result<()> {
        let shared = &self.shared;
        let parts = Parts {
            tun: shared.tun.clone(),
            io: self.config.io,
            addresses: self.underlays.iter().map(|underlay| underlay.ip).collect(),
            port: shared.port,
            tables: shared.tables.clone(),
            stats: shared.stats.clone(),
            started: shared.started,
            ended: self.ended.clone(),
        };
        let (mut plane, workers) = DataPlane::open(&parts)?;
        let report = self.host.ensure(&self.desired).await?;
        log_report(&report);
        plane.begin(workers, &self.ended)?;
        tracing::info!(
            io = plane.facts.io,
            workers = plane.facts.workers,
            tso = plane.facts.accepts.tso,
            uso = plane.facts.accepts.uso,
            "{} is up with MTU {}: {} peers over UDP port {}",
            shared.tun,
            self.desired.mtu,
            shared.tables.load().peers().len(),
            shared.port
        );
        *lock(&shared.facts) = Some(plane.facts.clone());
        self.plane = Some(plane);
        Ok(())
    }

    /// Hands a plan to the workers and to whoever asks.
    fn publish(&mut self, plan: Plan, list: &NodeList, own: &Node) {
        for warning in &plan.warnings {
            tracing::warn!("{warning}");
        }
        warn_of_own_entry(own, &self.underlays, &self.config);
        *lock(&self.shared.overlay) = plan.overlay;
        let tables = Arc::new(Tables::new(plan.local, plan.peers));
        self.retired.push(self.shared.tables.swap(tables));
        self.shared.list.store(Arc::new(list.clone()));
    }

    /// Works out the desired state from the present list and underlay, and puts it into effect: the peer table first, so
    /// that whatever is routed to the device already has its peer.
    async fn apply(&mut self, list: &NodeList) {
        let own = match nodes_file::own(list, &self.config.node_name) {
            Ok(own) => own.clone(),
            Err(error) => return self.shared.problem(Concern::Nodes, error.to_string()),
        };
        let workers = self.shared.stats.workers();
        let plan = match plan(&self.config, list, &own, &carriers(&self.underlays), &mut self.known, workers) {
            Ok(plan) => plan,
            Err(error) => return self.shared.problem(Concern::Plan, error.to_string()),
        };
        match plan.carries_its_ipv6() {
            Ok(()) => self.shared.settled(Concern::Plan),
            Err(error) => self.shared.problem(Concern::Plan, format!("{error}; IPv4 goes on meanwhile")),
        }
        self.desired = desired(&self.shared.tun, &plan);
        self.publish(plan, list, &own);
        self.ensure().await;
    }

    /// Brings the host to the desired state; what fails is tried again with the next tick.
    async fn ensure(&mut self) {
        match self.host.ensure(&self.desired).await {
            Ok(report) => {
                log_report(&report);
                self.shared.settled(Concern::Host);
            }
            Err(error) => {
                let gone = matches!(error, HostError::NoDevice { .. });
                self.shared.problem(Concern::Host, error.to_string());
                // renamed or moved to another namespace: the workers, who hold it, notice nothing
                if gone && self.plane.is_some() {
                    self.restart_plane().await;
                    if self.plane.is_some() {
                        self.shared.settled(Concern::Host);
                    }
                }
            }
        }
    }

    async fn poll_nodes(&mut self) {
        match self.nodes_file.poll() {
            Ok(None) => {}
            Ok(Some(list)) => {
                self.shared.settled(Concern::Nodes);
                self.offer(list, false).await;
            }
            Err(error) => {
                let error = anyhow!(error);
                self.shared.problem(Concern::Nodes, format!("{}; the former node list stays in use", told(&error)));
            }
        }
    }

    /// A new list: applied, or held back when it would remove most peers.
    async fn offer(&mut self, list: NodeList, accepted: bool) {
        let old = self.shared.list.load_full();
        if let Err(error) = nodes_file::own(&list, &self.config.node_name) {
            let message = format!("{}: {error}; the former node list stays in use", self.nodes_file.path().display());
            return self.shared.problem(Concern::Nodes, message);
        }
        match judge(&old, &list, &self.config.node_name, accepted) {
            Verdict::HoldBack { removed, of } => {
                let message = format!(
                    "the new node list would remove {removed} of {of} peers, so it is held back: \
                     `meshctl nodes accept` applies it"
                );
                self.shared.problem(Concern::HeldBack, message);
                self.shared.hold(Some(list));
            }
            Verdict::Apply(change) => {
                self.shared.hold(None);
                self.shared.settled(Concern::HeldBack);
                if !change.is_empty() {
                    tracing::info!("node list: {change}");
                }
                self.apply(&list).await;
            }
        }
    }

    async fn accept(&mut self) {
        if let Some(list) = self.shared.take_held() {
            self.offer(list, true).await;
        }
    }

    /// Links, addresses or routes changed, by us or by others.
    async fn host_changed(&mut self) {
        let list = self.shared.list.load_full();
        let Ok(own) = nodes_file::own(&list, &self.config.node_name) else { return };
        match resolve(&self.host, &self.config, own).await {
            Ok(underlays) => {
                self.shared.settled(Concern::Underlay);
                let ips = |all: &[Underlay]| all.iter().map(|underlay| underlay.ip).collect::<Vec<_>>();
                let moved = ips(&underlays) != ips(&self.underlays);
                let changed = carriers(&underlays) != carriers(&self.underlays);
                self.underlays = underlays;
                if moved {
                    tracing::info!("the underlay address is another now: opening the sockets anew");
                    self.restart_plane().await;
                }
                if changed {
                    return self.apply(&list).await;
                }
            }
            Err(error) => self.shared.problem(Concern::Underlay, told(&error)),
        }
        self.ensure().await;
    }

    async fn workers_ended(&mut self, why: &str) {
        self.shared.problem(Concern::Device, format!("{why}; starting the data plane anew"));
        self.restart_plane().await;
    }

    async fn restart_plane(&mut self) {
        self.plane = None;
        *lock(&self.shared.facts) = None;
        let deadline = Instant::now() + TICK;
        loop {
            match self.start_plane().await {
                Ok(()) => return self.shared.settled(Concern::Device),
                Err(error) => self.shared.problem(Concern::Device, told(&error)),
            }
            if Instant::now() > deadline {
                return; // the next tick goes on
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn tick(&mut self) {
        if self.plane.is_none() {
            self.restart_plane().await;
        }
        if self.shared.has_problem(Concern::Host) || self.shared.has_problem(Concern::Underlay) {
            self.host_changed().await;
        }
        if let Ok(drops) = self.host.tun_drops(&self.shared.tun).await {
            // the device may be older than this run, and its counter with it
            let before = *self.tun_drops_before.get_or_insert(drops);
            if drops < before {
                self.tun_drops_before = Some(0);
            }
            self.shared.tun_drops.store(drops.saturating_sub(before), Ordering::Relaxed);
        }
        self.retired.retain(|tables| Arc::strong_count(tables) > 1);
    }

    /// SIGHUP: reads the configuration and the node list again.
    async fn reload(&mut self, loader: &Loader, logging: &Logging) {
        let new = match loader.load() {
            Ok(new) => new,
            Err(error) => {
                let error = anyhow!(error);
                return self
                    .shared
                    .problem(Concern::Config, format!("{}; the former configuration stays", told(&error)));
            }
        };
        self.shared.settled(Concern::Config);
        let changes = self.config.live_changes(&new);
        for key in &changes.restart {
            tracing::warn!("`{key}` cannot change while meshd runs: restart it to take that over");
        }
        if !changes.live.is_empty() {
            tracing::info!("taken over: {}", changes.live.join(", "));
        }
        if changes.live.contains(&"log") {
            logging.filter(&new.log);
        }
        if let Some(path) = new.nodes_file.as_ref().filter(|_| changes.live.contains(&"nodes-file")) {
            self.nodes_file = NodesFile::new(path.clone(), self.config.port);
        }
        if changes.restart.is_empty() {
            self.config = new;
            let list = self.shared.list.load_full();
            self.apply(&list).await;
        }
        self.poll_nodes().await;
    }

    fn stop(mut self) {
        self.plane = None;
        let prefixes = self.desired.routes.iter().map(ToString::to_string).collect::<Vec<_>>();
        tracing::info!(
            "stopped; {} and `unreachable` routes for {} stay, so that nothing leaves in clear by another way: \
             `meshd cleanup` removes them",
            self.shared.tun,
            shortened(&prefixes)
        );
    }
}

fn shortened(all: &[String]) -> String {
    match all {
        [] => "nothing".to_owned(),
        few if few.len() <= 4 => few.join(", "),
        many => format!(
            "{} and {} more prefixes",
            many.iter().take(3).cloned().collect::<Vec<_>>().join(", "),
            many.len() - 3
        ),
    }
}

/// This node's underlay addresses. Without `node-ip` those of the own entry that this machine has, since that is where
/// peers send; else those of the default route's interface.
async fn resolve(host: &Host, config: &Config, own: &Node) -> anyhow::Result<Vec<Underlay>> {
    let given: Vec<host::NodeIp> = match &config.node_ip {
        NodeIp::Given(specs) => specs.iter().filter_map(|spec| spec.to_string().parse().ok()).collect(),
        NodeIp::Auto => {
            let entry: Vec<_> = own.underlay_ips().map(host::NodeIp::Address).collect();
            if let Ok(underlays) = host.underlay(&entry).await {
                return Ok(underlays);
            }
            Vec::new()
        }
    };
    host.underlay(&given).await.context("this node's underlay address (`node-ip`)")
}

fn carriers(underlays: &[Underlay]) -> Vec<Carrier> {
    underlays.iter().map(|underlay| Carrier { ip: underlay.ip, mtu: underlay.mtu }).collect()
}

fn desired(tun: &str, plan: &Plan) -> Desired {
    let routes: Vec<IpNet> = union(plan.subnets.iter().copied());
    Desired {
        tun: tun.to_owned(),
        mtu: plan.mtu,
        addresses: plan.overlay.clone(),
        routes,
        own_subnets: plan.own_subnets.clone(),
    }
}

fn warn_of_own_entry(own: &Node, underlays: &[Underlay], config: &Config) {
    let advertised = |ip: &IpAddr| own.underlay_ips().any(|own| own == *ip) || !config.advertise_address.is_empty();
    for underlay in underlays.iter().filter(|underlay| !advertised(&underlay.ip)) {
        tracing::warn!(
            "this node sends from {}, but its entry in the node list has other addresses: peers will drop what it sends, \
             unless something translates addresses in between",
            underlay.ip
        );
    }
    if let Some(endpoint) = own.underlay.iter().find(|endpoint| endpoint.port() != config.port.get()) {
        tracing::warn!("peers send to {endpoint}, but `port` is {}", config.port);
    }
}

fn log_report(report: &host::Report) {
    for change in &report.changes {
        tracing::info!("{change}");
    }
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
}
