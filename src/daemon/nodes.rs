//! The node list: whether a new one is taken, and how it is put into effect.

use std::sync::Arc;

use anyhow::anyhow;

use super::view::{Concern, lock};
use super::{Daemon, Source, attach, carriers, desired, log_report, misplaced, told};
use crate::control::nodes_file;
use crate::control::plan::{Plan, plan};
use crate::control::reconcile::{Verdict, judge};
use crate::engine::tables::Tables;
use crate::host::HostError;
use crate::node::{Node, NodeList};

impl Daemon {
    pub(super) async fn poll_nodes(&mut self) {
        self.lives.tell(&self.shared.tables.load());
        let Source::File(nodes_file) = &mut self.source else { return };
        match nodes_file.poll() {
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

    /// A new list: applied, or held back when it would take too much from most peers.
    pub(super) async fn offer(&mut self, list: NodeList, accepted: bool) {
        let old = self.shared.list.load_full();
        if let Err(error) = nodes_file::own(&list, &self.config.node_name) {
            let message = match &self.source {
                Source::File(file) => format!("{}: {error}", file.path().display()),
                Source::Members(members) => {
                    format!("{} has no node named {}", members.origin(), self.config.node_name)
                }
                Source::None => return,
            };
            return self.shared.problem(Concern::Nodes, format!("{message}; the former node list stays in use"));
        }
        let confirmed = match &mut self.source {
            Source::Members(members) => members.confirms(),
            _ => false,
        };
        match judge(&old, &list, &self.config.node_name, accepted || confirmed) {
            verdict @ Verdict::HoldBack { .. } => {
                let message =
                    format!("the new node list {verdict}, so it is held back: `meshctl nodes accept` applies it");
                self.shared.problem(Concern::HeldBack, message);
                self.shared.hold(Some(list));
                if let Source::Members(members) = &mut self.source {
                    members.hold();
                }
            }
            Verdict::Apply(change) => {
                self.shared.hold(None);
                self.shared.settled(Concern::HeldBack);
                if !change.is_empty() {
                    tracing::info!("node list: {change}");
                }
                if self.begun {
                    self.apply(&list).await;
                } else if let Err(error) = self.begin(&list).await {
                    return self.shared.problem(Concern::Joining, told(&error));
                } else {
                    self.restart_plane().await;
                    self.shared.settled(Concern::Joining);
                    self.say_hello();
                }
                if let Source::Members(members) = &mut self.source {
                    members.accepted();
                }
            }
        }
    }

    pub(super) async fn accept(&mut self) {
        if let Some(list) = self.shared.take_held() {
            if let Source::Members(members) = &mut self.source {
                members.release();
            }
            self.offer(list, true).await;
        }
    }

    /// Works out the desired state from the present list and underlay, and puts it into effect: the peer table first, so
    /// that whatever is routed to the device already has its peer.
    pub(super) async fn apply(&mut self, list: &NodeList) {
        let own = match nodes_file::own(list, &self.config.node_name) {
            Ok(own) => own.clone(),
            Err(error) => return self.shared.problem(Concern::Nodes, error.to_string()),
        };
        match self.identity(&own) {
            Ok(identity) => {
                if self.known.set_identity(identity) {
                    self.say_hello();
                }
            }
            Err(error) => return self.shared.problem(Concern::Plan, told(&anyhow!(error))),
        }
        let plan = match plan(&self.config, list, &own, &carriers(&self.underlays), &mut self.known) {
            Ok(plan) => plan,
            Err(error) => return self.shared.problem(Concern::Plan, error.to_string()),
        };
        match plan.carries_its_ipv6() {
            Ok(()) => self.shared.settled(Concern::Plan),
            Err(error) => self.shared.problem(Concern::Plan, format!("{error}; IPv4 goes on meanwhile")),
        }
        let desired = desired(&self.shared.tun, &plan, self.cluster_prefixes(list));
        let former = std::mem::replace(&mut self.desired, desired);
        if self.shared.has_problem(Concern::Expelled) {
            // the list is this node alone: what is for the cluster must not leave in clear by another way
            self.desired.routes = former.routes;
        }
        self.publish(plan, list, &own);
        self.ensure().await;
    }

    /// Hands a plan to the workers and to whoever asks.
    pub(super) fn publish(&mut self, plan: Plan, list: &NodeList, own: &Node) {
        for warning in &plan.warnings {
            tracing::warn!("{warning}");
        }
        let member = matches!(self.source, Source::Members(_));
        match misplaced(own, &self.underlays, &self.config, member) {
            Some(message) if member => self.shared.problem(Concern::Place, message),
            Some(message) => tracing::warn!("{message}"),
            None => self.shared.settled(Concern::Place),
        }
        if let Some(endpoint) = own.underlay.iter().find(|endpoint| endpoint.port() != self.config.port.get()) {
            tracing::warn!("peers send to {endpoint}, but `port` is {}", self.config.port);
        }
        attach::attach(&self.config, &plan, &self.cluster_prefixes(list), &self.shared);
        *lock(&self.shared.overlay) = plan.overlay;
        let tables = Arc::new(Tables::new(plan.local, plan.peers));
        self.retired.push(self.shared.tables.swap(tables));
        self.shared.list.store(Arc::new(list.clone()));
    }

    /// Brings the host to the desired state; what fails is tried again with the next tick.
    pub(super) async fn ensure(&mut self) {
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
}
