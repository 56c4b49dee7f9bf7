//! What the admin socket shows, read out of what the daemon shares.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use serde_json::Value;
use tokio::sync::Notify;

use super::data_plane::Facts;
use super::member::Member;
use super::privileges;
use crate::admin::protocol::{
    BatchesView, Encryption, ForeignView, JourneyView, KeysView, NodeRole, NodeState, NodeView, OffloadsView, PathView,
    PeerState, PeerView, Role, Search, SessionView, StatsView, StatusView, SuperPacketsView, SurveyView, TrafficView,
    WayView, capture, why,
};
use crate::admin::server::Mesh;
use crate::control::foreign::{Recipe, Setting, recipe};
use crate::control::records::Records;
use crate::engine::big_tcp;
use crate::engine::drop::{Direction, Drop};
use crate::engine::stats::{Flow, Stats};
use crate::engine::tables::{Peer, Tables};
use crate::engine::tunnel::Tunnel;
use crate::health::meter::Way;
use crate::health::path::State;
use crate::health::peer::{Liveness, Verdict};
use crate::io::tap::Tap;
use crate::membership::link;
use crate::membership::matrix::Watched;
use crate::node::{NodeList, NodeName};
use crate::sys::udp;

/// What daemon and admin socket share.
pub(super) struct Shared {
    pub node: NodeName,
    pub tun: String,
    pub port: u16,
    pub started: Instant,
    pub tables: Arc<ArcSwap<Tables>>,
    pub stats: Stats,
    pub tap: Arc<Tap>,
    pub list: ArcSwap<NodeList>,
    pub facts: Mutex<Option<Facts>>,
    pub overlay: Mutex<Vec<std::net::IpAddr>>,
    pub tun_drops: AtomicU64,
    /// What the kernel dropped at sockets that are closed by now.
    pub udp_drops_before: AtomicU64,
    problems: Mutex<BTreeMap<Concern, Told>>,
    held: Mutex<Option<NodeList>>,
    pub accept: Notify,
    pub member: Member,
}

/// What can be wrong; one line each in `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Concern {
    Expelled,
    Joining,
    Nodes,
    HeldBack,
    Underlay,
    Plan,
    Place,
    Host,
    Device,
    Config,
    Servers,
    Sidecar,
    Kept,
    Attach,
    HandshakeTime,
}

/// What was said of a concern.
#[derive(Debug, Clone)]
struct Told {
    message: String,
    /// Somebody is to mend something; else it is only waited for.
    fault: bool,
}

impl Concern {
    /// Whether packets cross all the same.
    fn is_a_note(self) -> bool {
        matches!(self, Concern::Servers | Concern::Sidecar | Concern::Kept | Concern::Attach | Concern::HandshakeTime)
    }
}

impl Shared {
    pub(super) fn new(node: NodeName, tun: String, port: u16, tables: Tables, stats: Stats) -> Self {
        Shared {
            node,
            tun,
            port,
            started: Instant::now(),
            tables: Arc::new(ArcSwap::from_pointee(tables)),
            stats,
            tap: Arc::default(),
            list: ArcSwap::default(),
            facts: Mutex::default(),
            overlay: Mutex::default(),
            tun_drops: AtomicU64::new(0),
            udp_drops_before: AtomicU64::new(0),
            problems: Mutex::default(),
            held: Mutex::default(),
            accept: Notify::new(),
            member: None,
        }
    }

    /// Something is wrong; it is logged when it is news.
    pub(super) fn problem(&self, concern: Concern, message: String) {
        self.tell(concern, Told { message, fault: true });
    }

    /// Something is not there yet, which is no fault.
    pub(super) fn waits(&self, concern: Concern, message: String) {
        self.tell(concern, Told { message, fault: false });
    }

    fn tell(&self, concern: Concern, told: Told) {
        let mut problems = lock(&self.problems);
        if problems.get(&concern).is_some_and(|before| before.message == told.message) {
            return;
        }
        match told.fault {
            true => tracing::warn!("{}", told.message),
            false => tracing::info!("{}", told.message),
        }
        problems.insert(concern, told);
    }

    /// A concern is settled. What came that was waited for is told by whom it concerns.
    pub(super) fn settled(&self, concern: Concern) {
        if let Some(Told { message, fault: true }) = lock(&self.problems).remove(&concern) {
            tracing::info!("settled: {message}");
        }
    }

    pub(super) fn has_problem(&self, concern: Concern) -> bool {
        lock(&self.problems).contains_key(&concern)
    }

    pub(super) fn hold(&self, list: Option<NodeList>) {
        *lock(&self.held) = list;
    }

    pub(super) fn take_held(&self) -> Option<NodeList> {
        lock(&self.held).take()
    }

    /// The data plane is closed; what the kernel counted at its sockets goes with them, and is kept here.
    pub(super) fn closed(&self) {
        if let Some(facts) = lock(&self.facts).take() {
            self.udp_drops_before.fetch_add(udp_drops(&facts), Ordering::Relaxed);
        }
    }

    /// Those of `names` from which something valid came within `time`.
    pub(super) fn heard_of(&self, mut names: BTreeMap<String, String>, time: Duration) -> BTreeMap<String, String> {
        let (now_ms, tables) = (self.started.elapsed().as_millis() as u64, self.tables.load());
        let recent = |seen: u64| u128::from(now_ms.saturating_sub(seen)) < time.as_millis();
        let heard: HashSet<&str> = tables
            .peers()
            .iter()
            .filter(|peer| peer.spec.stats.last_seen().is_some_and(recent))
            .map(|peer| peer.spec.name.as_str())
            .collect();
        names.retain(|name, _| heard.contains(name.as_str()));
        names
    }

    /// How well those are reached that are watched, by the ids of their records.
    pub(super) fn paths(&self, records: &Records) -> Vec<Watched> {
        let tables = self.tables.load();
        let ids: HashMap<&str, &str> =
            records.nodes.values().map(|record| (record.name.as_str(), record.id.as_str())).collect();
        let watched = tables.peers().iter().filter_map(|peer| {
            let liveness = peer.spec.liveness.as_deref()?;
            let up = match liveness.verdict() {
                Verdict::Unknown => return None,
                verdict => verdict == Verdict::Up,
            };
            let loss_permille = if up { liveness.measured().0.lost_permille() } else { None };
            let to = (*ids.get(peer.spec.name.as_str())?).to_owned();
            Some(Watched { to, up, rtt_us: liveness.round_trip_us(), loss_permille })
        });
        watched.collect()
    }

    pub(super) fn peer(&self, peer: &Peer, now_ms: u64) -> PeerView {
        let (spec, stats) = (&peer.spec, &peer.spec.stats);
        let sealed = spec.tunnel.as_ref().is_some_and(|tunnel| tunnel.seals());
        let heard = spec.tunnel.as_ref().filter(|_| sealed).map(|tunnel| tunnel.endpoint());
        let measured = spec.liveness.as_deref().filter(|liveness| liveness.verdict() == Verdict::Up);
        let measured = measured.map(Liveness::measured);
        PeerView {
            name: spec.name.to_string(),
            endpoint: heard.unwrap_or(spec.endpoint),
            subnets: spec.subnets.clone(),
            mac: spec.mac.to_string(),
            public_key: spec.tunnel.as_ref().and_then(|tunnel| tunnel.keys().first()).map(|key| key.to_string()),
            encryption: if sealed { Encryption::Wireguard } else { Encryption::None },
            preshared: spec.tunnel.as_ref().is_some_and(|tunnel| tunnel.is_preshared()),
            session: spec.tunnel.as_deref().filter(|_| sealed).map(session),
            state: match spec.liveness.as_deref().map(Liveness::verdict) {
                Some(Verdict::Up) => PeerState::Up,
                Some(Verdict::Down) => PeerState::Down,
                Some(Verdict::Unknown) | None => PeerState::Unknown,
            },
            last_seen_ms: stats.last_seen().map(|seen| now_ms.saturating_sub(seen)),
            rtt_us: spec.liveness.as_deref().and_then(Liveness::round_trip_us).map(u64::from),
            loss_permille: measured.as_ref().and_then(|(all, _)| all.lost_permille()),
            ways: measured.map(|(_, ways)| self.ways(peer, sealed, &ways)).unwrap_or_default(),
            path_mtu: u32::from(peer.mtu()),
            path: spec.liveness.as_deref().and_then(|liveness| path(liveness, now_ms)),
            tx_packets: stats.sum(|flow| flow.tx_packets.get()),
            tx_bytes: stats.sum(|flow| flow.tx_bytes.get()),
            rx_packets: stats.sum(|flow| flow.rx_packets.get()),
            rx_bytes: stats.sum(|flow| flow.rx_bytes.get()),
        }
    }
}

impl Shared {
    /// What was measured on each way, by the outer source port.
    fn ways(&self, peer: &Peer, sealed: bool, ways: &[Way]) -> Vec<WayView> {
        let facts = lock(&self.facts);
        let same_family = |(ip, _): &&(std::net::IpAddr, Vec<u16>)| ip.is_ipv4() == peer.spec.endpoint.is_ipv4();
        let ports = facts.as_ref().and_then(|facts| facts.source_ports.iter().find(same_family));
        let ports = ports.map(|(_, ports)| ports.as_slice()).unwrap_or_default();
        let view = |(number, way): (usize, &Way)| {
            // lane 0 has the data port, the others those behind it
            let at = if sealed { number.checked_sub(1) } else { Some(number) };
            WayView {
                source_port: at.and_then(|at| ports.get(at)).copied().unwrap_or(self.port),
                lane: sealed.then_some(number as u32),
                rtt_us: Some(u64::from(way.round_trip_us)).filter(|us| *us > 0),
                loss_permille: way.lost_permille(),
            }
        };
        ways.iter().enumerate().map(view).collect()
    }
}

fn path(liveness: &Liveness, now_ms: u64) -> Option<PathView> {
    liveness.path_mtu()?;
    let facts = liveness.path();
    let search = match facts.state {
        State::Disabled => Search::Disabled,
        State::Base => Search::Base,
        State::Searching => Search::Searching,
        State::SearchComplete => Search::SearchComplete,
        State::Error => Search::Error,
    };
    let confirmed_ms = facts.confirmed_us.map(|us| now_ms.saturating_sub(us / 1000));
    Some(PathView { search, confirmed_ms, black_holes: facts.black_holes })
}

fn session(tunnel: &Tunnel) -> SessionView {
    let facts = tunnel.facts();
    SessionView {
        handshake_age_ms: facts.handshake_age.map(|age| age.as_millis() as u64),
        lanes: facts.lanes,
        lanes_up: facts.lanes_up,
        waiting: facts.held,
        unanswered: facts.unanswered,
        another_preshared: tunnel.has_another_preshared(),
    }
}

/// What the kernel dropped at the receiving sockets.
fn udp_drops(facts: &Facts) -> u64 {
    facts.receivers.iter().map(|socket| u64::from(udp::drops(socket.as_fd()).unwrap_or(0))).sum()
}

impl Mesh for Shared {
    fn peers(&self) -> Vec<PeerView> {
        let now_ms = self.started.elapsed().as_millis() as u64;
        self.tables.load().peers().iter().map(|peer| self.peer(peer, now_ms)).collect()
    }

    fn stats(&self) -> StatsView {
        let sum = |read: fn(&Flow) -> u64| self.stats.sum(|worker| read(&worker.flow));
        let facts = lock(&self.facts).clone();
        let drops_of = |reason: Drop| self.stats.sum(|worker| worker.drops(reason));
        let dropped = |direction| {
            Drop::ALL.iter().filter(|reason| reason.direction() == direction).map(|reason| drops_of(*reason)).sum()
        };
        let mut drops: BTreeMap<String, u64> =
            Drop::ALL.iter().map(|reason| (reason.name().to_owned(), drops_of(*reason))).collect();
        let overflow = facts.as_ref().map_or(0, udp_drops) + self.udp_drops_before.load(Ordering::Relaxed);
        drops.insert("udp_queue_overflow".to_owned(), overflow);
        drops.insert("tun_queue_overflow".to_owned(), self.tun_drops.load(Ordering::Relaxed));
        let tun = TrafficView {
            rx_packets: sum(|f| f.tun_rx_packets.get()),
            rx_bytes: sum(|f| f.tun_rx_bytes.get()),
            tx_packets: sum(|f| f.tun_tx_packets.get()),
            tx_bytes: sum(|f| f.tun_tx_bytes.get()),
        };
        let udp = TrafficView {
            rx_packets: sum(|f| f.udp_rx_packets.get()),
            rx_bytes: sum(|f| f.udp_rx_bytes.get()),
            tx_packets: sum(|f| f.udp_tx_packets.get()),
            tx_bytes: sum(|f| f.udp_tx_bytes.get()),
        };
        let outbound = JourneyView {
            entered: tun.rx_packets,
            originated: sum(|f| f.originated_outbound.get()),
            out: udp.tx_packets,
            dropped: dropped(Direction::Outbound),
            consumed: sum(|f| f.consumed_outbound.get()),
        };
        let inbound = JourneyView {
            entered: udp.rx_packets,
            originated: sum(|f| f.originated_inbound.get()),
            out: tun.tx_packets,
            dropped: dropped(Direction::Inbound),
            consumed: sum(|f| f.consumed_inbound.get()),
        };
        StatsView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.to_string(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            io: facts.as_ref().map_or("none", |facts| facts.io).to_owned(),
            workers: facts.as_ref().map_or(0, |facts| facts.workers as u32),
            offloads: facts.as_ref().map(offloads).unwrap_or_default(),
            offload_reasons: facts.as_ref().map(offload_reasons).unwrap_or_default(),
            tunnel_gso: used(facts.as_ref().map(|facts| facts.tunnel_gso.state()), sum(|f| f.uncut_sends.get())),
            big_tcp: used(facts.as_ref().map(|facts| long_ones(facts, self.started)), sum(|f| f.big_writes.get())),
            tun,
            udp,
            drops,
            originated: outbound.originated + inbound.originated,
            consumed: outbound.consumed + inbound.consumed,
            outbound,
            inbound,
            batches: BatchesView {
                tun_reads: sum(|f| f.tun_reads.get()),
                tun_read_packets: tun.rx_packets,
                udp_recv_calls: sum(|f| f.udp_recv_calls.get()),
                udp_recv_datagrams: udp.rx_packets,
                udp_send_calls: sum(|f| f.udp_send_calls.get()),
                udp_send_datagrams: udp.tx_packets,
                tun_writes: sum(|f| f.tun_writes.get()),
                tun_write_segments: tun.tx_packets,
            },
            partial_csum_in: sum(|f| f.partial_csum_in.get()),
            pairs_moved: sum(|f| f.pairs_moved.get()),
        }
    }

    fn status(&self) -> StatusView {
        let tables = self.tables.load();
        let local = tables.local();
        let problems = lock(&self.problems).clone();
        let reasons = problems.values().map(|told| told.message.clone()).collect();
        StatusView {
            node: self.node.to_string(),
            role: self.member.as_ref().map_or(Role::Run, |member| member.role()),
            overlay_addresses: lock(&self.overlay).clone(),
            vtep_mac: local.mac.to_string(),
            public_key: self
                .tables
                .load()
                .local()
                .identity
                .as_ref()
                .and_then(|identity| identity.public_key())
                .map(|key| key.to_string()),
            mtu: u32::from(local.mtu),
            ready: problems.keys().all(|concern| concern.is_a_note()),
            reasons,
            tun: self.tun.clone(),
            io: lock(&self.facts).as_ref().map_or("none", |facts| facts.io).to_owned(),
            port: self.port,
            vni: local.vni.get(),
            peers: tables.peers().len() as u64,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            membership: self.member.as_ref().map(|member| member.view()),
            capabilities: privileges::present(),
        }
    }

    fn nodes(&self) -> BoxFuture<'_, Vec<NodeView>> {
        if let Some(member) = &self.member {
            return member.nodes().boxed();
        }
        let view = |node: &crate::node::Node| NodeView {
            name: node.name.to_string(),
            id: node.name.to_string(),
            role: NodeRole::Agent,
            state: NodeState::Ready,
            underlay: node.underlay_ips().collect(),
            subnets: node.subnets.clone(),
            labels: BTreeMap::new(),
            taints: Vec::new(),
            joined_at: None,
            last_heartbeat: None,
            observed: None,
        };
        ready(self.list.load().nodes.iter().map(view).collect()).boxed()
    }

    fn keys(&self) -> KeysView {
        let tables = self.tables.load();
        let keys = tables.local().identity.as_ref().map(|identity| identity.public_keys()).unwrap_or_default();
        let mut keys = keys.iter().map(ToString::to_string);
        KeysView { public_key: keys.next(), lane_keys: keys.collect() }
    }

    fn why(&self, ask: why::Ask) -> BoxFuture<'_, Result<why::WhyView, String>> {
        self.explain(ask).boxed()
    }

    fn survey(&self) -> BoxFuture<'_, SurveyView> {
        self.ask_around().boxed()
    }

    fn capture(&self, ask: capture::Ask) -> Result<capture::CaptureView, String> {
        self.captured(ask)
    }

    fn accept_nodes(&self) -> Result<String, String> {
        let nodes = lock(&self.held).as_ref().map(|list| list.nodes.len());
        let Some(nodes) = nodes else {
            return Err("no node list is held back: there is nothing to accept".to_owned());
        };
        self.accept.notify_one();
        Ok(format!("accepted: the node list with {nodes} nodes is being applied"))
    }

    fn cluster(&self, ask: link::Request) -> BoxFuture<'_, Result<Value, String>> {
        match &self.member {
            Some(member) => member.ask(ask).boxed(),
            None => ready(Err(NO_CLUSTER.to_owned())).boxed(),
        }
    }

    fn node_commands(
        &self,
        name: String,
        device: String,
        private_key_file: String,
    ) -> BoxFuture<'_, Result<ForeignView, String>> {
        let Some(member) = &self.member else { return ready(Err(NO_CLUSTER.to_owned())).boxed() };
        async move {
            let (node, all) = member.foreign(&name).await?;
            let local = self.tables.load().local().clone();
            let setting = Setting { vni: local.vni, mtu: u32::from(local.mtu), device, private_key_file };
            let Recipe { commands, notes } = recipe(&node, all.nodes.values(), &setting).map_err(|e| e.to_string())?;
            Ok(ForeignView { name, commands, notes })
        }
        .boxed()
    }

    fn leave(&self, force: bool) -> BoxFuture<'_, Result<String, String>> {
        match &self.member {
            Some(member) => member.leave(force).boxed(),
            None => ready(Err(NO_CLUSTER.to_owned())).boxed(),
        }
    }
}

const NO_CLUSTER: &str = "this meshd has its peers from a nodes-file, so there are no servers to ask: change that file, or \
                          join a cluster with `meshd agent`";

fn offloads(facts: &Facts) -> OffloadsView {
    OffloadsView {
        tun_tso: facts.accepts.tso,
        tun_uso: facts.accepts.uso,
        udp_gso: !facts.offloads.no_gso.load(Ordering::Relaxed) && !facts.offloads.gso_failed.load(Ordering::Relaxed),
        udp_gro: !facts.offloads.no_gro.load(Ordering::Relaxed),
    }
}

fn long_ones(facts: &Facts, started: Instant) -> Result<(), String> {
    match facts.big_tcp.as_ref().map_err(Clone::clone)?.state(started.elapsed().as_micros() as u64) {
        big_tcp::State::On => Ok(()),
        big_tcp::State::Rests(us) => {
            Err(format!("the kernel had no room for one: they are short for {} s more", us / 1_000_000))
        }
        big_tcp::State::Off => Err("the kernel refused one as too long (Linux 6.6 takes them)".to_owned()),
    }
}

fn used(state: Option<Result<(), String>>, super_packets: u64) -> SuperPacketsView {
    let on = state.as_ref().is_some_and(Result::is_ok);
    SuperPacketsView { on, why: state.and_then(Result::err).unwrap_or_default(), super_packets }
}

fn offload_reasons(facts: &Facts) -> BTreeMap<String, String> {
    let mut reasons: BTreeMap<String, String> =
        facts.reasons.iter().map(|(offload, why)| ((*offload).to_owned(), why.clone())).collect();
    let mut add = |set: bool, offload: &str, why: &str| {
        if set {
            reasons.insert(offload.to_owned(), why.to_owned());
        }
    };
    let offloads = &facts.offloads;
    add(offloads.no_gso.load(Ordering::Relaxed), "udp_gso", "the kernel does not know UDP_SEGMENT (Linux 4.18 has it)");
    let failed =
        "a segmented send failed where the same datagrams alone left: the link's driver cannot be trusted with it";
    add(offloads.gso_failed.load(Ordering::Relaxed), "udp_gso", failed);
    add(offloads.no_gro.load(Ordering::Relaxed), "udp_gro", "the kernel does not know UDP_GRO (Linux 5.0 has it)");
    reasons
}

/// A panic while a lock was held leaves plain data behind, which is still good to show.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
