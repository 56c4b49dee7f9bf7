//! Builds, connects and stops everything; what the parts do is theirs.
//!
//! Start: lock, node list, underlay, clashes, device, host, workers, admin socket. Then one loop waits for signals, the
//! node list, changes of the host, and workers that end; whatever happens, the whole desired state is worked out anew and
//! put into effect. The list is a file's, or a cluster's (`membership`), whose first one may be long in coming.

pub mod ask;
mod attach;
mod capture;
mod data_plane;
mod hints;
mod kept;
pub mod launcher;
mod lives;
mod logging;
mod member;
mod membership;
mod metrics;
mod nodes;
mod privileges;
mod reload;
mod stamps;
mod supervisor;
mod survey;
mod uncut;
mod view;
mod why;

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
use self::lives::Lives;
use self::logging::Logging;
use self::membership::{Inbox, Membership, ends};
pub use self::membership::{Join, Joined, joined};
use self::metrics::Metrics;
pub use self::privileges::settle;
use self::stamps::Stamps;
use self::uncut::UncutSwitch;
use self::view::{Concern, Shared, lock};
use crate::admin::server;
use crate::admin::socket::{AdminSocket, SocketOptions};
use crate::config::load::Loader;
use crate::config::{Bfd, Config, Encryption, NodeIp};
use crate::control::known::Known;
use crate::control::nodes_file;
use crate::control::plan::{Carrier, Plan, plan};
use crate::control::source::NodesFile;
use crate::engine::stats::Stats;
use crate::engine::tables::{Local, Tables};
use crate::engine::tunnel::Identity;
use crate::health::machine::Timers;
use crate::health::peer::Settings;
use crate::host::{self, Desired, Host, Preflight, Underlay, Watch, union};
use crate::io::pairs;
use crate::io::tcp_ends;
use crate::key::file::{self as key_file, KeyFileError};
use crate::limits;
use crate::node::{Node, NodeList};
use crate::wire::bfd::auth::Keys;

/// How often the node list file is looked at.
const POLL: Duration = Duration::from_millis(500);
/// How often what failed is tried again, and slow counters are read.
const TICK: Duration = Duration::from_secs(1);

/// How long a process that was killed may hold the lock behind its sockets, while the kernel takes its devices away.
const ENDING: Duration = Duration::from_millis(500);

/// Runs the data plane until it is told to stop: with the peers of a nodes-file, or as a member of a cluster. `loader`
/// reads the configuration again at SIGHUP.
pub async fn run(config: Config, loader: Loader, join: Option<Join>) -> anyhow::Result<()> {
    let logging = Logging::start(&config);
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    let (ended, mut workers_ended) = mpsc::unbounded_channel();
    for note in privileges::decide(&config, loader.path()) {
        tracing::info!("{note}");
    }

    let (mut daemon, mut inbox) = Daemon::start(config, join, ended).await?;
    let options = &daemon.config;
    let socket =
        SocketOptions { path: options.socket.clone(), mode: options.socket_mode, group: options.socket_group.clone() };
    let socket = AdminSocket::bind(&socket).context("cannot open the admin socket")?;
    let admin = tokio::spawn(server::serve(socket, daemon.shared.clone()));
    let metrics = match options.metrics_address {
        Some(address) => Some(tokio::spawn(Metrics::bind(address).await?.serve(daemon.shared.clone()))),
        None => None,
    };
    let hints = tokio::spawn(hints::listen(hints::open(), daemon.shared.clone()));
    settle();

    let mut host_changes = Watch::open()?;
    let mut poll = interval(POLL);
    let mut tick = interval(TICK);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    if daemon.begun {
        tracing::info!("ready");
    }
    let leaving = loop {
        tokio::select! {
            _ = terminate.recv() => break None,
            _ = interrupt.recv() => break None,
            Some(leaving) = next(&mut inbox.leave) => break Some(leaving),
            Some(news) = next(&mut inbox.news) => {
                if let Some(inbox) = &mut inbox.news {
                    daemon.heard(news, inbox).await;
                }
            }
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
    };
    match leaving {
        Some(leaving) => {
            leaving.done.send(daemon.leave(leaving.known).await).ok();
            sleep(Duration::from_millis(100)).await; // for the answer to reach who asked
        }
        None => daemon.stop().await,
    }
    hints.abort();
    metrics.inspect(|metrics| metrics.abort());
    admin.abort();
    admin.await.ok();
    Ok(())
}

/// What comes next, where anything comes from there at all.
async fn next<T>(inbox: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match inbox {
        Some(inbox) => inbox.recv().await,
        None => None,
    }
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
    let files = attach::detach(&config);
    for path in &files {
        println!("removed {path}");
    }
    if report.is_empty() && files.is_empty() {
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
        let patience = std::time::Instant::now() + ENDING;
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(listener) => return Ok(Lock(listener)),
                Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                    return Err(error).context(format!("cannot take the lock for the device {tun}"));
                }
                Err(_) if std::time::Instant::now() < patience => std::thread::sleep(Duration::from_millis(20)),
                Err(_) => bail!("another meshd is running with the device {tun}: stop it first, or set another `tun`"),
            }
        }
    }
}

/// Where node lists come from.
enum Source {
    File(NodesFile),
    Members(Membership),
    /// Nowhere any more.
    None,
}

struct Daemon {
    config: Config,
    host: Host,
    /// How many there are, as long as this process runs.
    workers: usize,
    source: Source,
    shared: Arc<Shared>,
    known: Known,
    lives: Lives,
    underlays: Vec<Underlay>,
    desired: Desired,
    /// Whether a node list is in effect.
    begun: bool,
    plane: Option<DataPlane>,
    ended: mpsc::UnboundedSender<String>,
    /// Tables that a worker may still hold: the last owner frees them, and that must not be a worker.
    retired: Vec<Arc<Tables>>,
    tun_drops_before: Option<u64>,
    uncut: UncutSwitch,
    /// The time in handshakes, once this node has a key.
    stamps: Option<Stamps>,
    _lock: Lock,
}

impl Daemon {
    async fn start(
        config: Config,
        join: Option<Join>,
        ended: mpsc::UnboundedSender<String>,
    ) -> anyhow::Result<(Self, Inbox)> {
        let config = if join.is_some() { config.of_member() } else { config };
        let tun = config.tun.as_str().to_owned();
        let lock = Lock::take(&tun)?;
        let host = Host::open()?;
        // queues, sockets and what waits for them: with 64 workers and two address families some 3,000
        limits::descriptors();
        // once and for all: counters are made for so many threads
        let workers = limits::workers(config.workers);
        let threads = pairs::threads(workers);
        let mac = config.node_name.derived_mac();
        let local = Local {
            mac,
            vni: config.vni,
            subnets: Vec::new(),
            addresses: Vec::new(),
            mtu: 0,
            identity: None,
            former_identity: None,
            bfd_keys: None,
        };
        let (tables, stats) = (Tables::empty(local), Stats::new(threads));
        let mut shared = Shared::new(config.node_name.clone(), tun.clone(), config.port.get(), tables, stats);
        let (ends, inbox) = match &join {
            Some(join) => {
                let (ends, view, inbox) = ends(join.role);
                shared.member = Some(view);
                (Some(ends), inbox)
            }
            None => (None, Inbox::default()),
        };
        let settings = watching(&config, stamps::bfd_epoch(shared.started));
        let mut daemon = Daemon {
            host,
            workers,
            source: Source::None,
            shared: Arc::new(shared),
            known: Known::new(threads, None).watching(settings, getrandom::u32().unwrap_or(1)),
            lives: Lives::default(),
            underlays: Vec::new(),
            desired: Desired { tun, mtu: 0, addresses: Vec::new(), routes: Vec::new(), own_subnets: Vec::new() },
            begun: false,
            plane: None,
            ended,
            retired: Vec::new(),
            tun_drops_before: None,
            uncut: UncutSwitch::new(&config),
            stamps: None,
            _lock: lock,
            config,
        };
        daemon.known.set_bfd_keys(bfd_keys(&daemon.config)?);
        match join.zip(ends) {
            Some((join, ends)) => daemon.start_member(join, ends).await?,
            None => daemon.start_static().await?,
        }
        Ok((daemon, inbox))
    }

    /// A start by a nodes-file, in which everything has to be right.
    async fn start_static(&mut self) -> anyhow::Result<()> {
        let path = self.config.nodes_file.clone().ok_or_else(|| anyhow!("no nodes-file is set"))?;
        let mut nodes_file = NodesFile::new(path, self.config.port);
        let list = nodes_file.load()?;
        nodes_file::own(&list, &self.config.node_name).with_context(|| nodes_file.path().display().to_string())?;
        self.source = Source::File(nodes_file);
        self.begin(&list).await?;
        self.start_plane().await
    }

    /// A start as a member: by the kept list, or with none until the servers send it.
    async fn start_member(&mut self, join: Join, ends: membership::Ends) -> anyhow::Result<()> {
        // the key comes before the list, since others learn it from us
        let nobody = Node::named(self.config.node_name.clone());
        let identity = self.identity(&nobody)?;
        self.known.set_identity(identity);
        match resolve(&self.host, &self.config, None).await {
            Ok(underlays) => self.underlays = underlays,
            Err(error) => self.shared.problem(Concern::Underlay, told(&error)),
        }
        self.host.preflight(&self.preflight()).await?;
        self.source = Source::Members(Membership::start(&self.config, join, ends, &self.shared)?);
        self.begin_as_kept().await;
        if !self.begun && !self.shared.has_problem(Concern::Joining) {
            self.shared.waits(Concern::Joining, "no node list yet: waiting for mesh-sidecar".to_owned());
        }
        self.say_hello();
        Ok(())
    }

    /// What goes through the mesh or nowhere, whether a node has it or not.
    fn cluster_prefixes(&self, list: &NodeList) -> Vec<IpNet> {
        match &self.source {
            Source::Members(members) => members.prefixes(list),
            Source::File(_) | Source::None => Vec::new(),
        }
    }

    fn preflight(&self) -> Preflight {
        Preflight {
            tun: self.desired.tun.clone(),
            port: self.config.port.get(),
            node_ips: self.underlays.iter().map(|underlay| underlay.ip).collect(),
            prefixes: self.desired.routes.clone(),
            own_subnets: self.desired.own_subnets.clone(),
        }
    }

    /// Puts the first list into effect, except for the data plane itself.
    async fn begin(&mut self, list: &NodeList) -> anyhow::Result<()> {
        let own = nodes_file::own(list, &self.config.node_name)?.clone();
        self.underlays = resolve(&self.host, &self.config, Some(&own)).await?;
        let identity = self.identity(&own)?;
        self.known.set_identity(identity);
        let plan = plan(&self.config, list, &own, &carriers(&self.underlays), &mut self.known)?;
        plan.carries_its_ipv6()?;
        self.desired = desired(&self.shared.tun, &plan, self.cluster_prefixes(list));
        self.host.preflight(&self.preflight()).await?;
        self.publish(plan, list, &own);
        self.begun = true;
        Ok(())
    }

    /// Opens device and sockets, sets up the host, and lets the workers begin.
    async fn start_plane(&mut self) -> anyhow::Result<()> {
        let shared = &self.shared;
        let parts = Parts {
            tun: shared.tun.clone(),
            io: self.config.io,
            workers: self.workers,
            busy_poll: self.config.busy_poll,
            tunnel_gso: self.uncut.way.clone(),
            big_tcp: self.takes_big_tcp().await,
            addresses: self.underlays.iter().map(|underlay| underlay.ip).collect(),
            port: shared.port,
            tables: shared.tables.clone(),
            stats: shared.stats.clone(),
            tap: shared.tap.clone(),
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
        self.look_who_cuts().await;
        Ok(())
    }

    /// Whether super-packets for this node itself may be longer than 64 KiB; else why not.
    async fn takes_big_tcp(&self) -> Result<(), String> {
        if !self.config.big_tcp {
            return Err("`big-tcp: off`".to_owned());
        }
        match self.host.knows_big_tcp().await {
            Ok(true) => {}
            Ok(false) => return Err("the kernel does not know it (Linux 6.6 does)".to_owned()),
            Err(error) => return Err(format!("whether the kernel knows it cannot be read: {error}")),
        }
        match tcp_ends::are_told() {
            Ok(true) => Ok(()),
            Ok(false) => Err("the kernel does not tell of sockets (tcp_diag)".to_owned()),
            Err(error) => Err(format!("the kernel does not tell of sockets: {error}")),
        }
    }

    /// This node's keys, where it needs any: made when they are missing, unless the node list knows them already.
    fn identity(&mut self, own: &Node) -> Result<Option<Arc<Identity>>, KeyFileError> {
        let config = &self.config;
        let wireguard = own.encryption.unwrap_or(config.encryption) == Encryption::Wireguard;
        let path = config.private_key_path();
        let key = match own.public_keys.is_empty() {
            true if !wireguard => return Ok(None),
            true => {
                let (key, new) = key_file::load_or_make(&path)?;
                if new {
                    tracing::info!("made a private key in {}; its public key is {}", path.display(), key.public());
                }
                key
            }
            false => key_file::load(&path)?,
        };
        let (shared, workers) = (&self.shared, self.workers);
        let stamps = self.stamps.get_or_insert_with(|| Stamps::start(&config.data_dir, shared.started));
        let identity = Identity::new(&key, workers).started_at(stamps.epoch_ms());
        Ok(Some(Arc::new(identity)))
    }

    /// Links, addresses or routes changed, by us or by others.
    async fn host_changed(&mut self) {
        let list = self.shared.list.load_full();
        match resolve(&self.host, &self.config, list.get(&self.config.node_name)).await {
            Ok(underlays) => {
                self.shared.settled(Concern::Underlay);
                let ips = |all: &[Underlay]| all.iter().map(|underlay| underlay.ip).collect::<Vec<_>>();
                let moved = ips(&underlays) != ips(&self.underlays);
                let changed = carriers(&underlays) != carriers(&self.underlays);
                self.underlays = underlays;
                self.say_hello();
                if moved && self.begun {
                    tracing::info!("the underlay address is another now: opening the sockets anew");
                    self.restart_plane().await;
                }
                if changed && self.begun {
                    return self.apply(&list).await;
                }
            }
            Err(error) => self.shared.problem(Concern::Underlay, told(&error)),
        }
        if self.begun {
            self.ensure().await;
            self.look_who_cuts().await;
        }
    }

    /// Whether super-packets leave uncut from now on.
    async fn look_who_cuts(&mut self) {
        let clear = self.shared.tables.load().has_clear_peers();
        let super_packets = self.plane.as_ref().is_some_and(|plane| plane.facts.accepts.tso);
        self.uncut.look(&self.host, &self.shared.tun, &self.underlays, clear, super_packets).await;
    }

    async fn workers_ended(&mut self, why: &str) {
        self.shared.problem(Concern::Device, format!("{why}; starting the data plane anew"));
        self.restart_plane().await;
    }

    async fn restart_plane(&mut self) {
        self.plane = None;
        self.shared.closed();
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
        self.tick_membership().await;
        if let Some(stamps) = &mut self.stamps {
            stamps.tick(&self.shared).await;
        }
        self.tell_of_preshared();
        if self.begun && self.plane.is_none() {
            self.restart_plane().await;
        }
        if self.shared.has_problem(Concern::Host) || self.shared.has_problem(Concern::Underlay) {
            self.host_changed().await;
        }
        if self.known.retire() {
            let list = self.shared.list.load_full();
            self.apply(&list).await;
        }
        if let Ok(drops) = self.host.tun_drops(&self.shared.tun).await {
            // the device may be older than this run, and its counter with it; a new one counts from zero again
            let before = self.tun_drops_before.replace(drops).unwrap_or(drops);
            self.shared.tun_drops.fetch_add(drops.checked_sub(before).unwrap_or(drops), Ordering::Relaxed);
        }
        self.retired.retain(|tables| Arc::strong_count(tables) > 1);
        if self.begun {
            self.look_who_cuts().await;
        }
    }

    /// Names the peers whose answers only another preshared key explains.
    fn tell_of_preshared(&self) {
        for peer in self.shared.tables.load().peers() {
            let Some(tunnel) = peer.spec.tunnel.as_ref().filter(|tunnel| tunnel.another_preshared_is_news()) else {
                continue;
            };
            let ours = if tunnel.is_preshared() { "with a `preshared-key`" } else { "without one" };
            tracing::warn!(
                "node {} answers handshakes as a peer with another preshared key does, or with none where there should \
                 be one: its entry here is {ours}, and no session comes up until both sides agree",
                peer.spec.name
            );
        }
    }

    async fn stop(mut self) {
        self.plane = None;
        if let Some(stamps) = &mut self.stamps {
            stamps.stop().await;
        }
        drop(self.stop_membership().await);
        if !self.begun {
            return tracing::info!("stopped; nothing was set up");
        }
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
async fn resolve(host: &Host, config: &Config, own: Option<&Node>) -> anyhow::Result<Vec<Underlay>> {
    let given: Vec<host::NodeIp> = match &config.node_ip {
        NodeIp::Given(specs) => specs.iter().filter_map(|spec| spec.to_string().parse().ok()).collect(),
        NodeIp::Auto => {
            let entry: Vec<_> = own.into_iter().flat_map(Node::underlay_ips).map(host::NodeIp::Address).collect();
            match host.underlay(&entry).await {
                Ok(underlays) if !entry.is_empty() => return Ok(underlays),
                _ => Vec::new(),
            }
        }
    };
    host.underlay(&given).await.context("this node's underlay address (`node-ip`)")
}

fn watching(config: &Config, epoch: u32) -> Settings {
    let Bfd { enabled, interval_ms, multiplier, vni } = config.bfd;
    let timers = Timers { interval_us: u32::from(interval_ms) * 1000, multiplier };
    Settings { enabled, timers, vni: vni.get(), epoch }
}

/// What authenticates BFD in the clear.
fn bfd_keys(config: &Config) -> anyhow::Result<Option<Arc<Keys>>> {
    let Some(path) = &config.bfd_auth_key_file else { return Ok(None) };
    let keys = key_file::load_bfd(path)?;
    tracing::info!("BFD in the clear is authenticated, by the keys {keys} of {}: the first is sent", path.display());
    Ok(Some(Arc::new(keys)))
}

fn carriers(underlays: &[Underlay]) -> Vec<Carrier> {
    underlays.iter().map(|underlay| Carrier { ip: underlay.ip, mtu: underlay.mtu }).collect()
}

fn desired(tun: &str, plan: &Plan, cluster: Vec<IpNet>) -> Desired {
    let routes: Vec<IpNet> = union(plan.subnets.iter().copied().chain(cluster));
    Desired {
        tun: tun.to_owned(),
        mtu: plan.mtu,
        addresses: plan.overlay.clone(),
        routes,
        own_subnets: plan.own_subnets.clone(),
    }
}

/// Where peers do not send to this node, by its entry in the node list: of a member it says what the node itself told.
fn misplaced(own: &Node, underlays: &[Underlay], config: &Config, member: bool) -> Option<String> {
    let advertised = |ip: &IpAddr| own.underlay_ips().any(|own| own == *ip) || !config.advertise_address.is_empty();
    let from = underlays.iter().find(|underlay| !advertised(&underlay.ip))?.ip;
    let told = shortened(&own.underlay_ips().map(|ip| ip.to_string()).collect::<Vec<_>>());
    Some(match member {
        true => format!(
            "this node sends from {from}, but the cluster has it at {told}: if it has not just moved, another machine runs with a \
             copy of its data-dir, and has its place; give that one a name and a data-dir of its own"
        ),
        false => format!(
            "this node sends from {from}, but its entry in the node list has {told}: peers will drop what it sends, unless \
             something translates addresses in between"
        ),
    })
}

fn log_report(report: &host::Report) {
    for change in &report.changes {
        tracing::info!("{change}");
    }
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
}
