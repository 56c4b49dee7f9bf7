//! A node that is a member of a cluster: its list comes from the sidecar, and is kept for starts without one.
//!
//! Owns what membership means to the daemon: what this node says of itself, which list is offered, kept or refused, and
//! what happens to an expelled node and to one that leaves. How a list is put into effect is the daemon's, how the
//! sidecar is kept alive `supervisor`'s.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use ipnet::IpNet;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::kept::{self, Keeper};
use super::launcher::{Launcher, Launching, PROGRAM};
use super::member::{Leaving, MemberView};
use super::supervisor::{News, Sidecar};
use super::view::{Concern, Shared, lock};
use super::{Daemon, Source, attach, carriers, shortened, told};
use crate::config::{self, Config};
use crate::control::plan::plan;
use crate::control::records::Records;
use crate::membership::link::{FromSidecar, Hello, Peers, Status};
use crate::membership::matrix::most_telling;
use crate::membership::record::Role;
use crate::membership::settings::{Datastore, LogFormat, Secret, Settings};
use crate::node::NodeList;

/// A list that removes most peers is confirmed by a later revision that still does, this long afterwards.
const CONFIRMED_AFTER: Duration = Duration::from_secs(60);
/// How long a gap in the changes may last before the sidecar is started anew.
const GAP: Duration = Duration::from_secs(1);

/// What is known of peers is told this often at most.
const TELL_PEERS: Duration = Duration::from_secs(5);
/// Something of theirs came so recently.
const HEARD: Duration = Duration::from_secs(30);
/// So many at most; other nodes tell of others.
const MAX_HEARD: usize = 16;

/// How a member is started.
#[derive(Debug)]
pub struct Join {
    /// Server or agent.
    pub role: Role,
    /// What it joins with; a node that has joined needs none.
    pub token: Option<Secret>,
    /// Where a server keeps its state.
    pub datastore: Box<Datastore>,
    /// What starts and ends the sidecar.
    pub launcher: Launcher,
}

/// How a member joins; the rest of [`Join`].
struct Terms {
    role: Role,
    token: Option<Secret>,
    datastore: Box<Datastore>,
}

/// What the node of that data directory is in its cluster, if it has joined one.
pub fn joined(data_dir: &Path) -> Option<Joined> {
    let bytes = std::fs::read(data_dir.join("agent/membership.json")).ok()?;
    // whose file it is says what is wrong with it
    Some(serde_json::from_slice(&bytes).unwrap_or_default())
}

/// See [`joined`]. What cannot be read is not there.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Joined {
    /// The name that it joined under.
    pub name: Option<String>,
    /// As what.
    pub role: Option<Role>,
}

/// What comes from beside the daemon.
#[derive(Default)]
pub(super) struct Inbox {
    pub news: Option<mpsc::Receiver<News>>,
    pub leave: Option<mpsc::Receiver<Leaving>>,
}

/// The daemon's part of membership.
pub(super) struct Membership {
    join: Terms,
    sidecar: Sidecar,
    keeper: Keeper,
    view: Arc<MemberView>,
    /// What the sidecar said last, and since when that has a gap. Nothing before its first whole list.
    received: Option<Records>,
    gap: Option<Instant>,
    /// What the daemon was offered last.
    offered: Arc<Records>,
    /// What is held back, and since when.
    held: Option<(Arc<Records>, Instant)>,
    /// When the sidecar was last told what the data path knows of others.
    told_peers: Option<Instant>,
}

/// The channels of a member that is about to start.
pub(super) struct Ends {
    asks: mpsc::Receiver<super::supervisor::Ask>,
    news: mpsc::Sender<News>,
    view: Arc<MemberView>,
}

/// Makes the channels, since what is shared with the admin socket is there before the sidecar is.
pub(super) fn ends(role: Role) -> (Ends, Arc<MemberView>, Inbox) {
    let (ask, asks) = mpsc::channel(16);
    let (tell, news) = mpsc::channel(16);
    let (leave, leaving) = mpsc::channel(1);
    let view = Arc::new(MemberView::new(role, ask, leave));
    let inbox = Inbox { news: Some(news), leave: Some(leaving) };
    (Ends { asks, news: tell, view: view.clone() }, view, inbox)
}

impl Membership {
    pub(super) fn start(config: &Config, join: Join, ends: Ends, shared: &Arc<Shared>) -> io::Result<Self> {
        let Join { role, token, datastore, launcher } = join;
        let join = Terms { role, token, datastore };
        let sidecar = Sidecar::start(launcher.connect()?, settings(config, &join), ends.asks, ends.news);
        let keeper = Keeper::start(kept::path(&config.data_dir), shared.clone());
        Ok(Membership {
            join,
            sidecar,
            keeper,
            view: ends.view,
            received: None,
            gap: None,
            offered: Arc::default(),
            held: None,
            told_peers: None,
        })
    }

    /// The list that was offered is in effect.
    pub(super) fn accepted(&mut self) {
        self.held = None;
        let former = self.view.records.swap(self.offered.clone());
        if *former != *self.offered {
            self.keeper.keep(self.offered.clone());
        }
    }

    /// Whether the list that was offered says again what is held back. Else it is held back from now on.
    pub(super) fn confirms(&mut self) -> bool {
        match &self.held {
            Some((held, since)) => held.revision < self.offered.revision && since.elapsed() > CONFIRMED_AFTER,
            None => false,
        }
    }

    /// The list that was offered is held back.
    pub(super) fn hold(&mut self) {
        let since = self.held.take().map_or_else(Instant::now, |(_, since)| since);
        self.held = Some((self.offered.clone(), since));
    }

    /// The held-back list is the one that counts now.
    pub(super) fn release(&mut self) {
        if let Some((held, _)) = self.held.take() {
            self.offered = held;
        }
    }

    /// The configuration is another.
    pub(super) fn configure(&mut self, config: &Config) -> anyhow::Result<()> {
        if config.token_file != Some(config::TokenFile::StandardInput) {
            self.join.token = config::load::token(config)?;
        }
        if self.join.role == Role::Server {
            self.join.datastore = config::load::datastore(config)?.into();
        }
        self.sidecar.configure(settings(config, &self.join));
        Ok(())
    }

    /// The prefixes of the cluster, whoever has them.
    pub(super) fn prefixes(&self, list: &NodeList) -> Vec<IpNet> {
        self.offered.prefixes(list)
    }

    /// Which list is meant, for messages.
    pub(super) fn origin(&self) -> String {
        format!("the servers' node list (revision {})", self.offered.revision)
    }

    async fn stop(self) -> Option<Launching> {
        let launcher = self.sidecar.stop().await;
        self.keeper.stop().await;
        launcher
    }
}

impl Daemon {
    /// Starts by the kept list, where there is one.
    pub(super) async fn begin_as_kept(&mut self) {
        let path = kept::path(&self.config.data_dir);
        let records = match kept::load(&path) {
            Ok(Some(records)) => records,
            Ok(None) => return,
            Err(error) => return self.shared.problem(Concern::Kept, told(&anyhow!(error))),
        };
        let list = match records.list() {
            Ok(list) => self.as_configured(list),
            Err(error) => return self.shared.problem(Concern::Kept, format!("{}: {error}", path.display())),
        };
        tracing::info!("starting by the kept node list, revision {}: {} nodes", records.revision, list.nodes.len());
        let records = Arc::new(records);
        if let Source::Members(members) = &mut self.source {
            members.offered = records.clone();
            members.view.records.store(records);
        }
        self.offer(list, true).await;
    }

    /// Says who this node is, once that is known and whenever it changes.
    pub(super) fn say_hello(&self) {
        let Source::Members(members) = &self.source else { return };
        let port = self.config.port.get();
        let underlay: Vec<SocketAddr> = match self.config.advertise_address.as_slice() {
            [] => self.underlays.iter().map(|underlay| SocketAddr::new(underlay.ip, port)).collect(),
            given => given.iter().map(|ip| SocketAddr::new(*ip, port)).collect(),
        };
        if !underlay.is_empty() {
            let keys = self.known.identity().map(|identity| identity.public_keys()).unwrap_or_default();
            members.sidecar.hello(Hello {
                name: self.config.node_name.to_string(),
                underlay,
                public_keys: keys.iter().map(ToString::to_string).collect(),
                encryption: self.config.encryption,
            });
        }
    }

    /// What the sidecar said, all of it: many changes are one new list.
    pub(super) async fn heard(&mut self, first: News, inbox: &mut mpsc::Receiver<News>) {
        let mut changed = self.hear(first).await;
        while let Ok(news) = inbox.try_recv() {
            changed |= self.hear(news).await;
        }
        if changed {
            self.offer_received().await;
        }
    }

    /// Whether the node list is another now.
    async fn hear(&mut self, news: News) -> bool {
        let Source::Members(members) = &mut self.source else { return false };
        match news {
            News::Up => {
                members.received = None;
                members.gap = None;
                self.shared.settled(Concern::Sidecar);
            }
            News::Down(why) => {
                lock(&members.view.status).connected = false;
                let meanwhile = if self.begun { "; the node list stays in use meanwhile" } else { "" };
                let message = format!("{why}: it is being started again{meanwhile}");
                self.shared.problem(Concern::Sidecar, message);
            }
            News::Said(said) => match *said {
                FromSidecar::List { revision, cluster, cidrs, nodes } => {
                    let ours = members.view.records.load().cluster.clone();
                    if !ours.is_empty() && ours != cluster {
                        let message = format!(
                            "{PROGRAM} has the node list of cluster {cluster}, but this node belongs to {ours}: \
                             `meshctl leave --force` leaves that one first"
                        );
                        self.shared.problem(Concern::Nodes, message);
                        return false;
                    }
                    members.gap = None;
                    members.received = Some(Records::new(cluster, revision, nodes).within(cidrs));
                    return true;
                }
                FromSidecar::Delta { from, to, upsert, remove } => {
                    let changed = members.received.as_mut().map(|all| all.change(from, to, upsert, &remove));
                    if let Some(Ok(())) = changed {
                        return true;
                    }
                    members.gap.get_or_insert_with(Instant::now);
                }
                FromSidecar::Status(status) => self.fares(status),
                FromSidecar::Expelled { reason } => self.expelled(&reason).await,
                FromSidecar::Answer { .. } | FromSidecar::Pong => {}
            },
        }
        false
    }

    async fn offer_received(&mut self) {
        let Source::Members(members) = &mut self.source else { return };
        let Some(received) = &members.received else { return };
        match received.list() {
            Ok(list) => {
                members.offered = Arc::new(received.clone());
                self.shared.settled(Concern::Nodes);
                self.shared.settled(Concern::Expelled);
                let list = self.as_configured(list);
                self.offer(list, false).await;
            }
            Err(error) => self.shared.problem(Concern::Nodes, format!("{error}; the former node list stays in use")),
        }
    }

    /// Whether this node encrypts is its own configuration's to say: no server turns that off.
    fn as_configured(&self, mut list: NodeList) -> NodeList {
        if let Some(own) = list.nodes.iter_mut().find(|node| node.name == self.config.node_name) {
            own.encryption = Some(self.config.encryption);
        }
        list
    }

    /// How membership fares, for `status` and the log.
    fn fares(&mut self, status: Status) {
        let Source::Members(members) = &self.source else { return };
        let (problem, progress) = (status.problem.clone(), status.progress.clone());
        let servers = shortened(&status.servers);
        let (joined, connected) = (status.joined, status.connected);
        let answer = if status.refused { "the servers refuse this node" } else { "no server answers" };
        *lock(&members.view.status) = status;
        if self.shared.has_problem(Concern::Expelled) {
            return; // which says it all
        }
        if self.begun {
            match problem {
                None if connected => self.shared.settled(Concern::Servers),
                None => {
                    self.shared.waits(Concern::Servers, "no server was asked yet: the node list is the kept one".into())
                }
                Some(problem) => self.shared.problem(
                    Concern::Servers,
                    format!("{answer} ({problem}): the node list stays in use, and nothing else changes"),
                ),
            }
            return;
        }
        let asked = if servers == "nothing" { String::new() } else { format!(" of {servers}") };
        match (problem, joined) {
            (None, _) if progress.is_some() => {
                let progress = progress.unwrap_or_default();
                self.shared.waits(Concern::Joining, format!("not a full server yet: {progress}"));
            }
            (Some(problem), true) => {
                self.shared.problem(Concern::Joining, format!("waiting for the node list{asked}: {problem}"));
            }
            (Some(problem), false) => self.shared.problem(Concern::Joining, format!("not a member yet: {problem}")),
            (None, true) => self.shared.waits(Concern::Joining, format!("a member; waiting for the node list{asked}")),
            (None, false) => {
                self.shared.waits(Concern::Joining, format!("not a member yet; waiting for an answer{asked}"))
            }
        }
    }

    /// Nobody of the cluster talks to this node any more, and it to nobody.
    async fn expelled(&mut self, reason: &str) {
        let Source::Members(members) = &mut self.source else { return };
        members.keeper.forget();
        members.held = None;
        members.received = None;
        members.offered = Arc::default();
        members.view.records.store(Arc::default());
        self.shared.hold(None);
        self.shared.settled(Concern::HeldBack);
        let message = format!(
            "this node was removed from the cluster ({reason}): it has no peers any more; to join again, \
             give it a new token and restart it"
        );
        self.shared.problem(Concern::Expelled, message);
        let own = self.shared.list.load().get(&self.config.node_name).cloned();
        let Some(own) = own else { return };
        let alone = NodeList { nodes: vec![own.clone()] };
        match plan(&self.config, &alone, &own, &carriers(&self.underlays), &mut self.known) {
            // the routes stay: what was for the cluster must not leave in clear by another way now
            Ok(plan) => self.publish(plan, &alone, &own),
            Err(error) => self.shared.problem(Concern::Plan, error.to_string()),
        }
    }

    /// Tries again what waits for better times, and tells of peers that the servers miss.
    pub(super) async fn tick_membership(&mut self) {
        let Source::Members(members) = &mut self.source else { return };
        if members.told_peers.is_none_or(|at| at.elapsed() >= TELL_PEERS) {
            members.told_peers = Some(Instant::now());
            let missed = members.view.records.load().missed(&self.config.node_name);
            // most of the time nobody is
            let heard = if missed.is_empty() { missed } else { self.shared.heard_of(missed, HEARD) };
            let heard = heard.into_values().take(MAX_HEARD).collect();
            let paths = most_telling(self.shared.paths(&members.view.records.load()));
            members.sidecar.peers(Peers { heard, paths });
        }
        if members.gap.is_some_and(|since| since.elapsed() > GAP) {
            members.gap = None;
            tracing::warn!("changes of the node list are missing: starting {PROGRAM} anew for the whole of it");
            members.sidecar.restart();
        }
        if !self.begun {
            if members.received.is_some() {
                self.offer_received().await;
            } else if !members.offered.nodes.is_empty() {
                self.begin_as_kept().await;
            }
        }
    }

    /// Ends what is beside the daemon, except for the launcher.
    pub(super) async fn stop_membership(&mut self) -> Option<Launching> {
        match std::mem::replace(&mut self.source, Source::None) {
            Source::Members(members) => members.stop().await,
            _ => None,
        }
    }

    /// Takes everything away: peers, device, routes, and what this node knows of the cluster. `known`: whether the servers
    /// know.
    pub(super) async fn leave(mut self, known: bool) -> String {
        self.plane = None;
        if let Source::Members(members) = &self.source {
            members.keeper.forget();
        }
        let launcher = self.stop_membership().await;
        let name = &self.config.node_name;
        let mut told = match known {
            true => vec![format!("{name} has left the cluster")],
            false => vec![format!(
                "{name} has left the cluster, of which the servers know nothing: run `meshctl node remove {name}` on one of them"
            )],
        };
        match launcher {
            Some(mut launcher) => told.extend(launcher.forget().await),
            None => told.extend(forget(&self.config.data_dir)),
        }
        let server = self.config.data_dir.join("server");
        if server.exists() {
            told.push(format!("{} stays, since it may hold the cluster's state", server.display()));
        }
        match self.host.cleanup(self.config.tun.as_str()).await {
            Ok(report) => {
                let device = report.device.iter().map(|device| format!("the device {device}"));
                let files = attach::detach(&self.config);
                let removed: Vec<String> = device.chain(files).chain(report.routes).collect();
                told.push(format!("removed {}", shortened(&removed)));
            }
            Err(error) => told.push(format!("`meshd cleanup` has to be run, since not everything went: {error}")),
        }
        let told = told.join("; ");
        tracing::info!("{told}");
        told
    }
}

/// Removes what a node knows of its cluster: files of the sidecar's account. What could not be removed, in words. The key
/// stays: it is what the servers know this node by, should it come back.
pub(super) fn forget(data_dir: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    for name in ["membership.json", "membership.json.expelled", "nodes.json"] {
        let path = data_dir.join("agent").join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                problems.push(format!("{} is still there ({error}): remove it before joining again", path.display()));
            }
            _ => {}
        }
    }
    problems
}

/// The part of the configuration that is the sidecar's.
fn settings(config: &Config, join: &Terms) -> Settings {
    let mut settings = Settings::new(join.role, &config.data_dir);
    settings.servers = config.servers.clone();
    settings.token = join.token.clone();
    settings.node_labels = config.node_labels.clone();
    settings.node_taints = config.node_taints.clone();
    settings.log = config.log.clone();
    settings.log_format = match config.log_format {
        config::LogFormat::Text => LogFormat::Text,
        config::LogFormat::Json => LogFormat::Json,
    };
    if join.role == Role::Server {
        settings.bind_address = config.bind_address;
        settings.cluster_cidr = config.cluster_cidr.clone();
        settings.node_cidr_mask_size = config.node_cidr_mask_size;
        settings.tls_san = config.tls_san.clone();
        settings.cluster_init = config.cluster_init;
        settings.datastore = (*join.datastore).clone();
        settings.control_only = config.control_only;
        settings.purge_after = config.purge_after;
    }
    settings.lb_server_port = config.lb_server_port;
    settings
}
