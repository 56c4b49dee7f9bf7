//! The servers' HTTPS endpoint: connections, and what bounds them.
//!
//! Owns the listener, the server's certificate and its renewal, time limits and connection limits. What is answered is in
//! `routes`; what is decided, in [`registry`](super::registry).

mod connection;
mod limiter;
mod openapi;
mod routes;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use self::connection::Routes;
use self::limiter::Limiter;
use super::authority::{self, AuthorityError};
use super::clock::Now;
use super::pake;
use super::registry::Registry;
use super::tls::{self, LiveCertificate, TlsError};

/// A client has so long for its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// And so long from one request to the next one's first byte, and from there to the end of its head.
const HEAD: Duration = Duration::from_secs(30);
/// A stranger's connection ends after so long, whatever it does.
const STRANGER: Duration = Duration::from_secs(60);
/// What is sent and not acknowledged for so long ends the connection.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// Connections in all.
const MAX_CONNECTIONS: usize = 65_536;
/// Strangers' connections from one address; a node's own count no more once its certificate is seen.
const MAX_STRANGERS: usize = 1024;
/// Descriptors that stay for files and the link.
const SPARE_FDS: usize = 128;

/// Why the endpoint does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address.
    #[error(
        "cannot listen on {address}: {source}; is another server running, or is `bind-address` not this machine's?"
    )]
    Bind {
        /// Which one.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its certificate.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The endpoint. It ends when this is dropped.
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

struct Shared {
    registry: Arc<Registry>,
    live: Arc<LiveCertificate>,
    limiter: Mutex<Limiter>,
    leaf: Mutex<Leaf>,
    strangers: Mutex<HashMap<IpAddr, usize>>,
}

struct Leaf {
    names: Vec<String>,
    renew_at: OffsetDateTime,
}

/// The other end of a connection.
struct Peer {
    address: SocketAddr,
    /// Of its certificate's key, where it showed one of the cluster's.
    identity: Option<String>,
    binding: pake::Binding,
    exchange: Mutex<Option<pake::Exchanged>>,
    /// The revision that it has, once it is to be told of what is after that.
    waits_for: Mutex<Option<u64>>,
}

impl Peer {
    fn waits_for(&self) -> MutexGuard<'_, Option<u64>> {
        self.waits_for.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Listens on `address`, and answers for the registry, under these names.
    pub async fn start(address: SocketAddr, registry: Arc<Registry>, names: &[String]) -> Result<Self, ServerError> {
        let listener = listen(address).map_err(|source| ServerError::Bind { address, source })?;
        let address = listener.local_addr().map_err(|source| ServerError::Bind { address, source })?;
        let leaf = registry.authority().server_leaf(names, Now::read().date())?;
        let live = LiveCertificate::new(&leaf)?;
        let config = tls::server_config(registry.authority().certificate(), live.clone())?;
        let shared = Arc::new(Shared {
            registry,
            live,
            limiter: Mutex::default(),
            leaf: Mutex::new(Leaf { names: names.to_vec(), renew_at: leaf.renew_at }),
            strangers: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, config, shared.clone()));
        tasks.spawn(keep_time(shared.clone()));
        let registry = shared.registry.clone();
        tasks.spawn(async move { registry.publish().await });
        Ok(Server { shared, address, _tasks: tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers under these names from now on, with a new certificate where they changed. Nobody has to join again.
    pub fn set_names(&self, names: &[String]) -> Result<(), ServerError> {
        let mut leaf = self.shared.leaf.lock().unwrap_or_else(PoisonError::into_inner);
        if leaf.names != names {
            leaf.names = names.to_vec();
            self.shared.reissue(&mut leaf)?;
        }
        Ok(())
    }
}

impl Shared {
    fn reissue(&self, leaf: &mut Leaf) -> Result<(), ServerError> {
        let new = self.registry.authority().server_leaf(&leaf.names, Now::read().date())?;
        self.live.replace(&new)?;
        leaf.renew_at = new.renew_at;
        tracing::info!(names = leaf.names.join(","), "new server certificate");
        Ok(())
    }

    /// Counts a stranger in, unless there are too many from there.
    fn enter(self: &Arc<Self>, ip: IpAddr) -> Option<Stranger> {
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = strangers.entry(ip).or_default();
        if *count >= MAX_STRANGERS {
            return None;
        }
        *count += 1;
        Some(Stranger { shared: self.clone(), ip })
    }
}

/// A connection without certificate; counted until this is dropped.
struct Stranger {
    shared: Arc<Shared>,
    ip: IpAddr,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut strangers = self.shared.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = strangers.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                strangers.remove(&self.ip);
            }
        }
    }
}

/// An IPv6 socket takes IPv4 too, where it is bound to the unspecified address.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let open = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(!address.ip().is_unspecified())?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        TcpListener::from_std(socket.into())
    };
    // A machine without IPv6 still has the default `[::]`.
    match open(address) {
        Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
            open(SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, address.port())))
        }
        other => other,
    }
}

async fn accept(listener: TcpListener, config: Arc<ServerConfig>, shared: Arc<Shared>) {
    let acceptor = TlsAcceptor::from(config);
    let slots = Arc::new(Semaphore::new(max_connections()));
    let routes = TowerToHyperService::new(routes::router(shared.clone()));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or a connection that is gone already.
                tracing::warn!("a connection cannot be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, shared, routes) = (acceptor.clone(), shared.clone(), routes.clone());
        connections.spawn(async move {
            serve(stream, from, acceptor, shared, routes).await;
            drop(slot);
        });
    }
}

async fn serve(stream: TcpStream, from: SocketAddr, acceptor: TlsAcceptor, shared: Arc<Shared>, routes: Routes) {
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    let Some(stranger) = shared.enter(from.ip()) else { return };
    if let Err(error) = tune(&stream) {
        tracing::debug!("{from}: {error}");
    }
    let live = shared.live.current();
    // In boxes of their own: what a handshake needs is given back after it, and no state is there twice.
    let stream = match Box::pin(timeout(HANDSHAKE, acceptor.accept(stream))).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!("{from}: no TLS: {error}"),
        Err(_) => return tracing::debug!("{from}: no TLS in time"),
    };
    let connection = stream.get_ref().1;
    let identity = connection.peer_certificates().and_then(|c| authority::identity_of_certificate(c.first()?));
    let Ok(exporter) = tls::exporter(connection) else { return };
    // a certificate outlives the membership: who was removed is a stranger
    let known = identity.as_deref().is_some_and(|identity| shared.registry.member(identity).is_ok());
    let peer = Arc::new(Peer {
        address: from,
        identity,
        binding: pake::Binding::new(exporter, &live.cert),
        exchange: Mutex::new(None),
        waits_for: Mutex::new(None),
    });
    drop(live); // a connection lives long
    let served = connection::converse(stream, peer, shared.clone(), routes);
    let result = if known {
        drop(stranger);
        served.await
    } else {
        let result = timeout(STRANGER, served).await.unwrap_or(Ok(()));
        drop(stranger);
        result
    };
    if let Err(error) = result {
        tracing::debug!("{from}: {error}");
    }
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    let alive = TcpKeepalive::new().with_time(Duration::from_secs(20)).with_interval(Duration::from_secs(5));
    socket.set_tcp_keepalive(&alive)
}

/// Readiness, purging, and the server's own certificate.
async fn keep_time(shared: Arc<Shared>) {
    let mut last_error = String::new();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = Now::read();
        match shared.registry.tick(now).await {
            Ok(()) => last_error.clear(),
            Err(error) => {
                let error = error.to_string();
                if error != last_error {
                    tracing::warn!("{error}");
                    last_error = error;
                }
            }
        }
        let mut leaf = shared.leaf.lock().unwrap_or_else(PoisonError::into_inner);
        if authority::is_due(leaf.renew_at, now.date())
            && let Err(error) = shared.reissue(&mut leaf)
        {
            tracing::warn!("the server's certificate cannot be renewed: {error}");
            leaf.renew_at = now.date() + time::Duration::hours(1);
        }
    }
}

/// As many as there are descriptors for, after asking for all that this process may have.
fn max_connections() -> usize {
    crate::limits::descriptors().unwrap_or(MAX_CONNECTIONS).saturating_sub(SPARE_FDS).clamp(16, MAX_CONNECTIONS)
}
