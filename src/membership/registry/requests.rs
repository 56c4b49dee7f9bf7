//! What `meshctl` asks, answered from the registry. Who may ask is the caller's matter.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::health::GRACE;
use super::refused::Refused;
use super::rows::How;
use super::{Registry, with_health};
use crate::membership::api::ServerMember;
use crate::membership::clock::{Now, rfc3339};
use crate::membership::link::Request;
use crate::membership::matrix::{self, Part, Row, Watched};
use crate::membership::record::{NodeRecord, Role, State as Readiness};
use crate::membership::token::TokenId;

impl Registry {
    /// Answers a request, in the JSON of `meshctl --json`. `Leave` is for the caller, who knows which node it is.
    pub async fn request(&self, now: Now, request: &Request) -> Result<Value, Refused> {
        match request {
            Request::Nodes => Ok(json!(self.records())),
            Request::NodeAdd { name, underlay, subnets, mac, public_key } => {
                let (mac, key) = (mac.as_deref(), public_key.as_deref());
                let row =
                    self.decide(now, true, |state| state.add_foreign(now, name, underlay, subnets, mac, key)).await?;
                Ok(json!(row.record))
            }
            Request::NodeDrain { name } => {
                self.decide(now, true, |state| Ok(((), state.drain(now, name, true)?))).await?;
                Ok(json!({ "name": name, "draining": true }))
            }
            Request::NodeUndrain { name } => {
                self.decide(now, true, |state| Ok(((), state.drain(now, name, false)?))).await?;
                Ok(json!({ "name": name, "draining": false }))
            }
            Request::NodeRemove { name } => {
                let id = self
                    .decide(now, true, |state| {
                        let id = state.by_name(name)?.record.id.clone();
                        let plan = state.remove(now, &id, How::Removed)?;
                        Ok((id, plan))
                    })
                    .await?;
                Ok(json!({ "name": name, "id": id, "removed": true }))
            }
            Request::Leave => Err(Refused::NotHere),
            Request::TokenCreate { role, ttl, uses, node } => {
                let token = self.mint(now, *role, *ttl, *uses, node.as_deref(), "").await?;
                Ok(json!({ "token": token.reveal().reveal(), "id": token.id.to_string() }))
            }
            Request::TokenList => Ok(self.token_list()),
            Request::TokenRevoke { id } => {
                // a whole token pasted here would be a secret in the answer and the log: what it was is not said
                let id: TokenId = id.parse().map_err(|_| Refused::NoTokenId)?;
                self.decide(now, true, |state| Ok(((), state.revoke(now, &id.to_string())?))).await?;
                Ok(json!({ "id": id.to_string(), "revoked": true }))
            }
            Request::ClusterStatus => Ok(self.cluster_status(now)),
            Request::ClusterMatrix => Ok(json!(self.matrix(now))),
            Request::ClusterAudit => Ok(json!(self.audit().await?)),
        }
    }

    /// All nodes, sorted by name, with their last heartbeats.
    pub fn records(&self) -> Vec<NodeRecord> {
        let known = self.known();
        let health = self.health();
        let mut records: Vec<_> = known.state.nodes.values().map(|row| with_health(&row.record, &health)).collect();
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records
    }

    /// What the nodes that heartbeat here say of others. Who is no member any more is not in it.
    pub fn matrix(&self, now: Now) -> Part {
        let known = self.known();
        let name = |id: &str| known.state.nodes.get(id).map(|row| row.record.name.clone());
        let health = self.health();
        let rows = health.beats.iter().filter_map(|(id, beat)| {
            let named = beat.paths.iter().filter_map(|path| Some(Watched { to: name(&path.to)?, ..path.clone() }));
            let mut to: Vec<Watched> = named.collect();
            to.sort_by(|a, b| a.to.cmp(&b.to));
            let age = now.mono.saturating_sub(beat.at.mono);
            // who is silent for so long is not-ready, and what it said then is no news
            (age < GRACE).then_some(())?;
            Some(Row { from: name(id)?, age_ms: age.as_millis() as u64, to })
        });
        let mut part = Part { rows: rows.collect() };
        part.rows.sort_by(|a, b| a.from.cmp(&b.from));
        part
    }

    fn token_list(&self) -> Value {
        let known = self.known();
        let tokens = known.state.tokens.values().map(|row| {
            json!({
                "id": row.id,
                "role": row.role,
                "node": row.node,
                "expires_at": row.expires_at.map(rfc3339),
                "uses_left": row.uses_left,
                "created_at": rfc3339(row.created_at),
                "revoked": row.revoked,
                "description": row.description,
            })
        });
        Value::Array(tokens.collect())
    }

    fn cluster_status(&self, now: Now) -> Value {
        let records = self.records();
        let count = |state: Readiness| records.iter().filter(|r| r.state == state).count();
        let members = self.members.get().map(|members| members.view()).unwrap_or_default();
        let servers: Vec<_> = records
            .iter()
            .filter(|r| r.role == Role::Server)
            .map(|r| {
                let mut server = json!({ "name": r.name, "id": r.id, "state": r.state, "underlay": r.underlay });
                if let Some(member) = members.iter().find(|member| self.is_of(member, &r.id)) {
                    server["datastore"] = json!(word(member));
                }
                server
            })
            .collect();
        let mut warnings = Vec::new();
        let workers = records.iter().any(|r| r.subnets.iter().any(|net| net.prefix_len() < net.max_prefix_len()));
        if !records.is_empty() && !workers {
            warnings.push("no node carries a workload subnet: all are control-only".to_owned());
        }
        let mut away = self.away();
        if away.is_empty() && self.is_away(now) {
            away.push("the datastore has not answered for some time; `/readyz` of this server says more".to_owned());
        }
        let (tolerance, summary) = if !away.is_empty() {
            warnings.extend(away);
            (0, Some("the datastore does not answer: nothing can be changed".to_owned()))
        } else if self.members.get().is_some() {
            let voters: Vec<_> = members.iter().filter(|member| !member.learner).collect();
            let quorum = voters.len() / 2 + 1;
            let there = voters.iter().filter(|member| member.answers).count();
            warnings.extend(about(&voters, there));
            let tolerance = there.saturating_sub(quorum);
            let plural = if voters.len() == 1 { "" } else { "s" };
            let may = if tolerance == 0 { "none".to_owned() } else { tolerance.to_string() };
            // none are known until they were looked at
            let summary = format!("{} server{plural}, {may} may fail", voters.len());
            (tolerance, (!voters.is_empty()).then_some(summary))
        } else {
            // One SQLite store is one server: it may not fail. Of servers over a shared store all but one may, as far as
            // they are concerned. Forwarding goes on without any.
            let all = self.others().count();
            let (tolerance, plural) = (all.saturating_sub(1), if all == 1 { "" } else { "s" });
            let may = if tolerance == 0 { "none".to_owned() } else { tolerance.to_string() };
            let summary = format!("{all} server{plural}, {may} may fail, as long as the datastore answers");
            (tolerance, (self.is_shared() && all > 0).then_some(summary))
        };
        if servers.is_empty() {
            let only = "no server is a member: restart meshd on this node, which then joins again, or restore a backup";
            warnings.push(only.to_owned());
        }
        let mut status = json!({
            "cluster": self.cluster(),
            "datastore": if self.datastore.is_empty() { "sqlite" } else { self.datastore },
            "revision": *self.published.borrow(),
            "addresses": self.servers(),
            "servers": servers,
            "tolerance": tolerance,
            "nodes": {
                "ready": count(Readiness::Ready),
                "not-ready": count(Readiness::NotReady),
                "draining": count(Readiness::Draining),
            },
            "warnings": warnings,
        });
        if let Some(summary) = summary {
            status["summary"] = json!(summary);
        }
        status
    }

    fn is_of(&self, member: &ServerMember, id: &str) -> bool {
        self.known().state.nodes.get(id).is_some_and(|row| row.identity == member.name)
    }

    /// Counters and gauges in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let records = self.records();
        let mut text = String::from("# HELP meshd_nodes Members of the cluster.\n# TYPE meshd_nodes gauge\n");
        for of in [Role::Server, Role::Agent, Role::Foreign] {
            for (state, name) in
                [(Readiness::Ready, "ready"), (Readiness::NotReady, "not-ready"), (Readiness::Draining, "draining")]
            {
                let count = records.iter().filter(|r| r.role == of && r.state == state).count();
                text.push_str(&format!("meshd_nodes{{role=\"{}\",state=\"{name}\"}} {count}\n", of.name()));
            }
        }
        let counters = &self.counters;
        for (name, help, value) in [
            ("meshd_joins_total", "Joins that were answered.", &counters.joins),
            ("meshd_join_refusals_total", "Joins that were refused.", &counters.refusals),
            ("meshd_heartbeats_total", "Heartbeats.", &counters.beats),
            ("meshd_commits_total", "Changes that were stored.", &counters.commits),
        ] {
            let value = value.load(Ordering::Relaxed);
            text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n"));
        }
        let revision = *self.published.borrow();
        text.push_str("# HELP meshd_list_revision Revision of the node list.\n# TYPE meshd_list_revision gauge\n");
        text.push_str(&format!("meshd_list_revision {revision}\n"));
        text.push_str(&matrix::metrics(&self.matrix(Now::read())));
        text
    }
}

/// What a person should know of the members.
fn about(voters: &[&ServerMember], there: usize) -> Vec<String> {
    let (all, quorum) = (voters.len(), voters.len() / 2 + 1);
    let mut warnings = Vec::new();
    if there < all && there >= quorum {
        let left = there - quorum;
        warnings
            .push(format!("the datastore of {} of {all} servers does not answer; {left} more may fail", all - there));
    }
    if all > 0 && there < quorum {
        warnings.push(format!(
            "the datastore of {} of {all} servers does not answer, which is too many: nothing can be changed",
            all - there
        ));
    }
    if all > 0 && all % 2 == 0 {
        warnings.push(format!("{all} servers tolerate no more failures than {}: add one, or remove one", all - 1));
    }
    warnings
}

fn word(member: &ServerMember) -> &'static str {
    match member {
        ServerMember { answers: false, .. } => "no answer",
        ServerMember { learner: true, .. } => "joining",
        ServerMember { leader: true, .. } => "leader",
        _ => "follower",
    }
}
