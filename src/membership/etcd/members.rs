//! The members of the cluster's own etcd: who becomes one, one at a time, and who is one no longer.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use serde::Deserialize;
use serde_json::{Value, json};

use super::PEER_PORT;
use super::kept::{Member, url};
use crate::membership::api::{ServerJoined, ServerMember};
use crate::membership::authority;
use crate::membership::store::etcd::{Access, Etcd, Gateway, Number};
use crate::membership::store::{Compare, LeaseId, Op, Outcome, Store, StoreError, Txn};

/// Who is becoming a member: a key, since no two may at once.
const JOINING: &str = "joining";
/// Who does not say that it goes on for so long has given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// A member that does not answer for so long is said not to.
const ANSWER: Duration = Duration::from_secs(2);

/// The members, through the one beside this server.
pub struct Members {
    store: Etcd,
    authority: authority::Kept,
    token: String,
    view: Mutex<Vec<ServerMember>>,
    peers: Mutex<Vec<(String, String)>>,
}

/// Why somebody is not admitted now.
#[derive(Debug, thiserror::Error)]
pub enum MembersError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Later.
    #[error("{0}")]
    Later(String),
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Listed {
    members: Vec<Raw>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
struct Raw {
    #[serde(rename = "ID")]
    id: Number,
    name: String,
    #[serde(rename = "peerURLs")]
    peers: Vec<String>,
    #[serde(rename = "clientURLs")]
    clients: Vec<String>,
    #[serde(rename = "isLearner")]
    learner: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    header: Header,
    leader: Number,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Header {
    member_id: Number,
}

impl Members {
    /// Those of this store.
    pub fn new(store: Etcd, authority: authority::Kept, token: String) -> Self {
        Members { store, authority, token, view: Mutex::default(), peers: Mutex::default() }
    }

    /// Makes `name` at `address` a learner, as soon as nobody else is becoming a member. What is left of an earlier try of
    /// its own, and of others that gave up, goes first. `taken` tells whether a name belongs to another server that is there.
    pub async fn admit(
        &self,
        name: &str,
        address: IpAddr,
        taken: impl Fn(&str) -> bool,
    ) -> Result<ServerJoined, MembersError> {
        self.lock(name).await?;
        let peer = url(address, PEER_PORT);
        for member in self.list().await? {
            let own = member.name == name;
            let same_place = member.peers.contains(&peer);
            if same_place && !own && !member.learner && taken(&member.name) {
                let why = format!("another server's etcd is at {address}: remove that server first, or set `node-ip`");
                return Err(MembersError::Later(why));
            }
            if own || same_place || member.learner {
                tracing::info!(address = peer, "an etcd member that is no more is removed");
                self.remove(member.id).await?;
            }
        }
        let ask = json!({ "peerURLs": [peer], "isLearner": true });
        let added: Listed = self.gateway().ask("/v3/cluster/member/add", &ask).await.map_err(|e| self.told(e))?;
        tracing::info!(address = peer, "a further etcd member joins");
        let members = added.members.into_iter().filter_map(|member| {
            let url = member.peers.first()?.clone();
            Some((if url == peer { name.to_owned() } else { member.name }, url))
        });
        let members = members.filter(|(name, _)| !name.is_empty()).collect();
        Ok(ServerJoined { authority: self.authority.clone(), token: self.token.clone(), members })
    }

    /// Makes the learner `name` a full member, if it has caught up.
    pub async fn promote(&self, name: &str) -> Result<bool, MembersError> {
        self.lock(name).await?;
        let Some(member) = self.list().await?.into_iter().find(|member| member.name == name) else {
            return Ok(false);
        };
        if member.learner {
            let ask = json!({ "ID": member.id.0.to_string() });
            if let Err(error) = self.gateway().ask::<Value>("/v3/cluster/member/promote", &ask).await {
                tracing::debug!("not yet promoted: {error:?}");
                return Ok(false);
            }
            tracing::info!(address = member.peers.join(","), "the etcd member has caught up");
        }
        self.unlock(name).await?;
        Ok(true)
    }

    /// The names of all members that are more than learners.
    pub async fn names(&self) -> Result<Vec<String>, MembersError> {
        // Not what this member thinks: what the quorum does.
        self.store.range(JOINING).await?;
        Ok(self.list().await?.into_iter().filter(|member| !member.learner).map(|member| member.name).collect())
    }

    /// Sees to it that the others look for the member `name` where it is: at this peer URL.
    pub async fn readdress(&self, name: &str, url: &str) -> Result<(), StoreError> {
        let members = self.list().await?;
        let Some(own) = members.iter().find(|member| member.name == name && member.peers != [url]) else {
            return Ok(());
        };
        let ask = json!({ "ID": own.id.0.to_string(), "peerURLs": [url] });
        let updated = self.gateway().ask::<Value>("/v3/cluster/member/update", &ask).await;
        updated.map_err(|error| self.gateway().told(error))?;
        tracing::info!("the etcd members look for this server's at {url} now");
        Ok(())
    }

    /// Looks at all members: whose server is gone is removed (`gone` tells by the name, and never of this one), the rest is
    /// asked how it is, and this server's own is to be known where it is.
    pub async fn look(
        &self,
        tls: Arc<ClientConfig>,
        member: &Member,
        gone: impl Fn(&str) -> bool,
    ) -> Result<(), StoreError> {
        let own = member.name.as_str();
        self.readdress(own, &member.peer_url()).await?;
        let members = self.list().await?;
        let mut seen = Vec::new();
        let (mut endpoints, mut peers) = (Vec::new(), Vec::new());
        for member in &members {
            if member.name != own && gone(&member.name) {
                tracing::warn!(address = member.peers.join(","), "the etcd member of a server that was removed goes");
                self.remove(member.id).await?;
                continue;
            }
            let endpoint = member.clients.first().and_then(|url| endpoint(url));
            let status = match &endpoint {
                Some(endpoint) => status(endpoint.clone(), tls.clone()).await,
                None => None,
            };
            seen.push(ServerMember {
                name: member.name.clone(),
                learner: member.learner,
                answers: status.is_some(),
                leader: status.is_some_and(|status| status.leader.0 != 0 && status.leader == status.header.member_id),
            });
            if let Some(endpoint) = endpoint.filter(|_| !member.learner) {
                let first = if member.name == own { 0 } else { endpoints.len() };
                endpoints.insert(first, endpoint);
                peers.extend(member.peers.first().map(|url| (member.name.clone(), url.clone())));
            }
        }
        self.gateway().set_endpoints(endpoints);
        *self.peers.lock().unwrap_or_else(PoisonError::into_inner) = peers;
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = seen;
        Ok(())
    }

    /// What the last look saw.
    pub fn view(&self) -> Vec<ServerMember> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The full members' names and peer URLs, as the last look saw them.
    pub fn peers(&self) -> Vec<(String, String)> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn lock(&self, name: &str) -> Result<(), MembersError> {
        let found = self.store.range(JOINING).await?.items.into_iter().find(|item| item.key == JOINING);
        match found {
            Some(kv) if kv.value == name.as_bytes() => {
                if let Some(lease) = kv.lease {
                    self.store.keep_alive(lease).await?;
                }
                Ok(())
            }
            Some(_) => Err(later()),
            None => {
                let lease: LeaseId = self.store.grant(PATIENCE).await?;
                let ops = vec![Op::Put { key: JOINING.into(), value: name.as_bytes().to_vec(), lease: Some(lease) }];
                let compares = vec![Compare { key: JOINING.into(), modified: 0 }];
                match self.store.txn(Txn { compares, ops }).await? {
                    Outcome::Done(_) => Ok(()),
                    Outcome::Conflict => Err(later()),
                }
            }
        }
    }

    async fn unlock(&self, name: &str) -> Result<(), StoreError> {
        let found = self.store.range(JOINING).await?.items;
        if let Some(lease) = found.iter().find(|kv| kv.value == name.as_bytes()).and_then(|kv| kv.lease) {
            self.store.revoke(lease).await?;
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Raw>, StoreError> {
        let listed: Listed =
            self.gateway().ask("/v3/cluster/member/list", &json!({})).await.map_err(|e| self.gateway().told(e))?;
        Ok(listed.members)
    }

    async fn remove(&self, id: Number) -> Result<(), StoreError> {
        let ask = json!({ "ID": id.0.to_string() });
        match self.gateway().ask::<Value>("/v3/cluster/member/remove", &ask).await {
            Err(error) if !error.is_not_found() => Err(self.gateway().told(error)),
            _ => Ok(()),
        }
    }

    fn told(&self, error: crate::membership::store::etcd::CallError) -> MembersError {
        match error.refusal() {
            Some(message) => MembersError::Later(format!("etcd admits no further member now: {message}")),
            None => self.gateway().told(error).into(),
        }
    }

    fn gateway(&self) -> &Gateway {
        self.store.gateway()
    }
}

async fn status(endpoint: (String, u16), tls: Arc<ClientConfig>) -> Option<Status> {
    let gateway = Gateway::new(Access { endpoints: vec![endpoint], tls: Some(tls), user: None });
    let nothing = json!({});
    let asked = gateway.once::<Status>("/v3/maintenance/status", &nothing, ANSWER);
    asked.await.ok()
}

fn endpoint(url: &str) -> Option<(String, u16)> {
    let address: std::net::SocketAddr = url.strip_prefix("https://")?.parse().ok()?;
    Some((address.ip().to_string(), address.port()))
}

fn later() -> MembersError {
    MembersError::Later("another server is joining; this one is next, by itself".to_owned())
}
