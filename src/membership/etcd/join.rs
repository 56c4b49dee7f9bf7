//! A further server on its way into the cluster: a node like any other first, then a member of the cluster's etcd.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hyper::Method;
use rustls::pki_types::CertificateDer;

use super::kept::Member;
use super::managed::ManagedError;
use crate::membership::address::ServerAddress;
use crate::membership::agent::keep::{Keep, Membership};
use crate::membership::agent::{AgentError, ask_to_join, local};
use crate::membership::api::{Promoted, ServerJoin, ServerJoined, ServersAnswer};
use crate::membership::client::{ClientError, Connection};
use crate::membership::link::Hello;
use crate::membership::record::Role;
use crate::membership::settings::{SERVER_PORT, Settings};
use crate::membership::tls::Trust;
use crate::membership::token::Credential;

/// A server that does not answer for so long is not asked whether this one is a member.
const LOOK: Duration = Duration::from_secs(3);

/// This server's node, and the servers that it can ask.
pub(super) struct Joiner {
    keep: Keep,
    pub(super) member: Membership,
    servers: Vec<ServerAddress>,
}

impl Joiner {
    /// The node as it has joined, now or earlier.
    pub(super) async fn open(settings: &Settings, hello: &Hello, own: &Member) -> Result<Self, ManagedError> {
        let keep = Keep::open(&settings.data_dir)?;
        let mut servers: Vec<ServerAddress> =
            settings.servers.iter().map(|s| s.parse()).collect::<Result<_, _>>().map_err(AgentError::Address)?;
        if let Some(member) = keep.membership()? {
            servers.extend(known_servers(own, &member));
            let mut seen = BTreeSet::new();
            servers.retain(|server| *server.host() != own.address.to_string() && seen.insert(server.clone()));
            return Ok(Joiner { keep, member, servers });
        }
        let token = settings.token.as_ref().ok_or(AgentError::NoToken)?;
        let credential = Credential::parse(token.reveal()).map_err(AgentError::Token)?;
        if let Credential::Token(token) = &credential {
            servers.extend(token.servers.iter().cloned());
        }
        let mut last = AgentError::NoServer.into();
        for server in &servers {
            let request = local::request(settings, &keep, &hello.name, hello)?;
            match ask_to_join(server, &credential, request, &mut 0).await {
                Ok(answer) => {
                    let member = keep.joined(&hello.name, Role::Server, &answer)?;
                    tracing::info!(id = member.id, cluster = member.cluster, "joined through {server}");
                    return Ok(Joiner { keep, member, servers });
                }
                Err(error) => last = ManagedError::Client(error),
            }
        }
        Err(last)
    }

    /// Asks to become a member of the etcd.
    pub(super) async fn ask(&self, address: IpAddr) -> Result<ServerJoined, ManagedError> {
        self.any(Method::POST, "/v1/servers/join", &ServerJoin { address }).await
    }

    /// Asks to become a full one.
    pub(super) async fn promoted(&self) -> Result<bool, ManagedError> {
        Ok(self.any::<Promoted>(Method::POST, "/v1/servers/promote", &()).await?.promoted)
    }

    /// Whether the other servers think that this one is a member; all are asked at once. `None`: nobody answers.
    pub(super) async fn is_member(&self, name: &str) -> Option<bool> {
        let asked = self.servers.iter().map(|server| async move {
            let asked = self.one::<ServersAnswer>(server, Method::POST, "/v1/servers", &());
            match tokio::time::timeout(LOOK, asked).await {
                Ok(Ok(answer)) => Some(answer.members.iter().any(|member| member == name)),
                Ok(Err(ClientError::Refused { code, .. })) if code == "removed" => Some(false),
                _ => None,
            }
        });
        let mut answers: FuturesUnordered<_> = asked.collect();
        while let Some(answer) = answers.next().await {
            if answer.is_some() {
                return answer;
            }
        }
        None
    }

    async fn any<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<T, ManagedError> {
        let mut last = ManagedError::Agent(AgentError::NoServer);
        for server in &self.servers {
            match self.one(server, method.clone(), path, body).await {
                Ok(answer) => return Ok(answer),
                // Who answers is right; the others may be away.
                Err(error @ ClientError::Refused { .. }) => return Err(error.into()),
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    async fn one<T: serde::de::DeserializeOwned>(
        &self,
        server: &ServerAddress,
        method: Method,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<T, ClientError> {
        let ca = CertificateDer::from(STANDARD.decode(&self.member.ca).unwrap_or_default());
        let identity = Some(self.keep.client_identity(&self.member));
        Connection::open(server, Trust::Ca(ca), identity).await?.ask(method, path, body).await
    }
}

/// Where the other servers are, as far as this one knows: where their etcds are, and what it was told last.
pub(super) fn known_servers(own: &Member, member: &Membership) -> BTreeSet<ServerAddress> {
    // all listen on one port, as a rule
    let port = member.servers.first().map_or(SERVER_PORT, ServerAddress::port);
    let peers = own.cluster.iter().filter_map(|(_, url)| url.strip_prefix("https://")?.parse::<SocketAddr>().ok());
    let peers = peers.map(|peer| ServerAddress::from(SocketAddr::new(peer.ip(), port)));
    let here = own.address.to_string();
    peers.chain(member.servers.iter().cloned()).filter(|server| server.host() != here).collect()
}

/// This node is a member of the cluster no longer.
pub(super) fn forget(data_dir: &Path) -> Result<(), ManagedError> {
    Ok(Keep::open(data_dir)?.forget()?)
}
