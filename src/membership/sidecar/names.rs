//! Where a server is reached: what its certificate names, what agents are told, and the token that lies ready.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use super::{NODE_TOKEN, SidecarError};
use crate::membership::address::ServerAddress;
use crate::membership::clock::Now;
use crate::membership::files;
use crate::membership::link::Hello;
use crate::membership::record::Role;
use crate::membership::registry::Registry;
use crate::membership::server::Server;
use crate::membership::settings::Settings;
use crate::membership::token::Token;

/// Follows the node's addresses and `tls-san`: what the certificate names, and where servers are said to be.
pub(super) async fn keep_names(
    settings: &Settings,
    mut hello: watch::Receiver<Hello>,
    mut named: watch::Receiver<Vec<String>>,
    registry: Arc<Registry>,
    server: &Server,
) {
    // what came while the server was starting
    named.mark_changed();
    loop {
        let changed = tokio::select! {
            changed = hello.changed() => changed,
            changed = named.changed() => changed,
        };
        if changed.is_err() {
            return std::future::pending().await;
        }
        let said = hello.borrow_and_update().clone();
        let settings = Settings { tls_san: named.borrow_and_update().clone(), ..settings.clone() };
        registry.set_servers(addresses(&settings, &said, server.address()));
        if let Err(error) = server.set_names(&names(&settings, &said)) {
            tracing::error!("{error}");
        }
        if let Err(error) = refresh_node_token(&settings, &registry).await {
            tracing::warn!("{error}");
        }
    }
}

pub(super) async fn refresh_node_token(settings: &Settings, registry: &Registry) -> Result<(), SidecarError> {
    if settings.token.is_none() {
        node_token(&settings.data_dir.join(NODE_TOKEN), registry).await?;
    }
    Ok(())
}

/// The token that lies ready: made once, and written again when the servers' addresses changed.
pub(super) async fn node_token(path: &Path, registry: &Registry) -> Result<(), SidecarError> {
    let kept = files::read(path)?.and_then(|bytes| String::from_utf8(bytes).ok());
    let kept = kept.and_then(|text| text.parse::<Token>().ok()).filter(|token| registry.is_good(Now::read(), token));
    let token = match kept {
        Some(token) if token.servers == registry.servers() => return Ok(()),
        Some(token) => Token { servers: registry.servers(), ..token },
        None => registry.mint(Now::read(), Role::Agent, None, None, None, "node-token").await?,
    };
    let text = token.reveal();
    Ok(files::write_atomic(path, format!("{}\n", text.reveal()).as_bytes())?)
}

/// What the server's certificate names: what people configured, and what this machine is called and reached by.
pub(super) fn names(settings: &Settings, hello: &Hello) -> Vec<String> {
    let mut names: BTreeSet<String> = settings.tls_san.iter().cloned().collect();
    names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    names.extend(hello.underlay.iter().map(|address| address.ip().to_string()));
    if !settings.bind_address.ip().is_unspecified() {
        names.insert(settings.bind_address.ip().to_string());
    }
    let usable = |name: &str| rustls::pki_types::DnsName::try_from(name.to_owned()).is_ok();
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    names.extend(hostname.into_iter().chain([hello.name.clone()]).filter(|name| usable(name)));
    let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    names.extend(own_addresses().into_iter().filter(|ip| !link_local(ip)).map(|ip| ip.to_string()));
    names.into_iter().collect()
}

fn own_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return vec![] };
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .collect()
}

/// Where agents are told to find this server.
pub(super) fn addresses(settings: &Settings, hello: &Hello, bound: SocketAddr) -> Vec<ServerAddress> {
    if !bound.ip().is_unspecified() {
        return vec![bound.into()];
    }
    let own = hello.underlay.iter().map(|address| SocketAddr::new(address.ip(), bound.port()).into());
    // A name that people gave may lead here in a way that this machine cannot know.
    let given = settings.tls_san.iter().filter_map(|name| {
        let host = if name.contains(':') { format!("[{name}]") } else { name.clone() };
        format!("https://{host}:{}", bound.port()).parse().ok()
    });
    let mut all: Vec<ServerAddress> = Vec::new();
    for address in own.chain(given) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}
