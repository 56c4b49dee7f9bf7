//! What the admin socket shows and does of membership: the part of [`Shared`](super::view::Shared) that only a server or
//! an agent has.
//!
//! Owns how long meshd waits for the servers on behalf of `meshctl`. What the servers say is theirs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::launcher::PROGRAM;
use super::supervisor::Ask;
use super::view::lock;
use crate::admin::protocol::{MembershipView, NodeRole, NodeState, NodeView, Role};
use crate::control::records::Records;
use crate::membership::link::{Request, Status};
use crate::membership::record::{self, NodeRecord, State};

/// How long the servers may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long for something that is also known here, if less freshly.
const FRESH: Duration = Duration::from_secs(2);

/// What the daemon and the admin socket share of membership.
pub(super) struct MemberView {
    role: record::Role,
    /// What the sidecar said last.
    pub status: Mutex<Status>,
    /// The node list in use.
    pub records: ArcSwap<Records>,
    asks: mpsc::Sender<Ask>,
    leave: mpsc::Sender<Leaving>,
}

/// Somebody wants this node to leave, and waits to be told.
pub(super) struct Leaving {
    /// Whether the servers know of it.
    pub known: bool,
    pub done: oneshot::Sender<String>,
}

impl MemberView {
    pub(super) fn new(role: record::Role, asks: mpsc::Sender<Ask>, leave: mpsc::Sender<Leaving>) -> Self {
        MemberView { role, status: Mutex::default(), records: ArcSwap::default(), asks, leave }
    }

    pub(super) fn role(&self) -> Role {
        match self.role {
            record::Role::Server => Role::Server,
            record::Role::Agent | record::Role::Foreign => Role::Agent,
        }
    }

    pub(super) fn view(&self) -> MembershipView {
        let status = lock(&self.status).clone();
        let records = self.records.load();
        let known = !records.cluster.is_empty();
        MembershipView {
            joined: status.joined || known,
            connected: status.connected,
            server: status.server,
            servers: status.servers,
            problem: status.problem,
            cluster: known.then(|| records.cluster.clone()),
            revision: known.then_some(records.revision),
        }
    }

    /// The node list as the servers have it, or else as it is in use here.
    pub(super) async fn nodes(&self) -> Vec<NodeView> {
        let connected = lock(&self.status).connected;
        if connected && let Ok(Ok(answer)) = timeout(FRESH, self.ask(Request::Nodes)).await {
            match serde_json::from_value::<Vec<NodeRecord>>(answer) {
                Ok(records) => return sorted(records.iter()),
                Err(error) => tracing::warn!("the servers' answer about the nodes makes no sense: {error}"),
            }
        }
        sorted(self.records.load().nodes.values())
    }

    /// The record of that node and the list in use here, which may be about to hear of it.
    pub(super) async fn foreign(&self, name: &str) -> Result<(NodeRecord, Arc<Records>), String> {
        let shown: String = name.chars().take(63).collect();
        let name = name.parse().map_err(|_| format!("there is no node named {shown:?}"))?;
        let unknown = || {
            format!(
                "the node list in use here has no node named {shown}: `meshctl nodes` shows the servers' list, `meshctl \
                 status` whether this node follows it"
            )
        };
        // nobody waits for a node that the servers do not have either
        if self.records.load().named(&name).is_none() && !self.nodes().await.iter().any(|node| node.name == shown) {
            return Err(unknown());
        }
        let end = tokio::time::Instant::now() + FRESH;
        loop {
            let records = self.records.load_full();
            if let Some(node) = records.named(&name) {
                return Ok((node.clone(), records));
            }
            if tokio::time::Instant::now() > end {
                return Err(unknown());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn ask(&self, request: Request) -> Result<Value, String> {
        let (answer, answered) = oneshot::channel();
        let gone =
            || format!("{PROGRAM} ended before it answered: meshd starts it again, try once more in some seconds");
        let late = || {
            format!(
                "no answer within {} s: look at `meshctl status` for what is wrong with the servers",
                ANSWER.as_secs()
            )
        };
        let asked = async {
            self.asks.send(Ask { request, answer }).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())
        };
        let result = timeout(ANSWER, asked).await.map_err(|_| late())??;
        result.map_err(|refusal| refusal.message)
    }

    /// Tells the servers, and then the daemon, which takes everything away.
    pub(super) async fn leave(&self, force: bool) -> Result<String, String> {
        let told = self.ask(Request::Leave).await;
        let known = told.is_ok();
        if let Err(why) = told {
            if !force {
                return Err(format!("{why}; `meshctl leave --force` leaves without telling the servers"));
            }
            tracing::warn!("leaving without the servers' knowledge: {why}");
        }
        let (done, told) = oneshot::channel();
        let stopping = || "meshd is stopping already".to_owned();
        self.leave.send(Leaving { done, known }).await.map_err(|_| stopping())?;
        told.await.map_err(|_| stopping())
    }
}

fn sorted<'r>(records: impl Iterator<Item = &'r NodeRecord>) -> Vec<NodeView> {
    let by_name: BTreeMap<_, _> = records.map(|record| ((&record.name, &record.id), record)).collect();
    by_name.into_values().map(node_view).collect()
}

fn node_view(record: &NodeRecord) -> NodeView {
    NodeView {
        name: record.name.clone(),
        id: record.id.clone(),
        role: match record.role {
            record::Role::Server => NodeRole::Server,
            record::Role::Agent => NodeRole::Agent,
            record::Role::Foreign => NodeRole::Foreign,
        },
        state: match record.state {
            State::Ready => NodeState::Ready,
            State::NotReady => NodeState::NotReady,
            State::Draining => NodeState::Draining,
            State::Left => NodeState::Left,
        },
        underlay: record.underlay.iter().map(std::net::SocketAddr::ip).collect(),
        subnets: record.subnets.clone(),
        labels: record.labels.clone(),
        taints: record.taints.clone(),
        joined_at: Some(record.joined_at.clone()),
        last_heartbeat: record.last_heartbeat.clone(),
        observed: record.observed.clone(),
    }
}

/// Shared between the daemon and the socket, where there is membership.
pub(super) type Member = Option<Arc<MemberView>>;
