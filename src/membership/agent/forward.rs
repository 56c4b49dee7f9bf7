//! A local TCP address for whatever else on this machine needs the servers: 127.0.0.1:`lb-server-port` leads to port 6443
//! of a server that takes the connection, as RKE2's agents offer it to their kubelet.
//!
//! Knows the servers by [`Status`] alone, and nothing of what is spoken. A server that does not answer is asked last for a
//! while, and none is ever given up: if all failed lately, all are tried again.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::membership::address::ServerAddress;
use crate::membership::link::Status;
use crate::membership::random;

/// Where the servers offer their Kubernetes API.
const API_PORT: u16 = 6443;
/// A server that takes no connection within this time is passed over.
const CONNECT: Duration = Duration::from_secs(3);
/// For so long a server that failed is asked only when no other answers.
const DISTRUST: Duration = Duration::from_secs(10);
/// Data that a server has not acknowledged for so long ends the connection: it is gone.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// Connections at once.
const MAX_CONNECTIONS: usize = 1024;
/// Between two attempts to listen.
const RETRY: Duration = Duration::from_secs(5);

/// Listens for as long as it is polled. An address that is in use is waited for, with a word in the log.
pub(crate) async fn run(port: u16, status: watch::Receiver<Status>) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut told = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) if !told => {
                told = true;
                tracing::warn!(
                    "nothing balances to the servers at {address}: {error}; choose another `lb-server-port`"
                );
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    };
    tracing::info!("{address} leads to port {API_PORT} of the servers");
    serve(listener, API_PORT, status).await;
}

async fn serve(listener: TcpListener, upstream: u16, status: watch::Receiver<Status>) {
    let failed: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let (hosts, failed) = (hosts(&status.borrow().servers), failed.clone());
                tokio::spawn(async move {
                    if let Err(error) = carry(client, hosts, upstream, &failed).await {
                        tracing::debug!("to the servers: {error}");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!("a connection to the servers cannot be accepted: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The servers' hosts, each once, beginning anywhere.
fn hosts(servers: &[String]) -> Vec<String> {
    let parsed = servers.iter().filter_map(|server| server.parse::<ServerAddress>().ok());
    let mut hosts: Vec<String> = parsed.map(|server| server.host().to_owned()).collect();
    hosts.sort();
    hosts.dedup();
    let start = random::below(hosts.len().max(1) as u64) as usize;
    hosts.rotate_left(start);
    hosts
}

async fn carry(
    mut client: TcpStream,
    mut hosts: Vec<String>,
    port: u16,
    failed: &Mutex<HashMap<String, Instant>>,
) -> io::Result<()> {
    {
        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.retain(|_, at| at.elapsed() < DISTRUST);
        hosts.sort_by_key(|host| failed.contains_key(host)); // stable: else the order stays
    }
    let mut why = io::Error::new(io::ErrorKind::NotConnected, "no server is known yet");
    for host in hosts {
        let connected = timeout(CONNECT, TcpStream::connect((host.as_str(), port))).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(mut server) => {
                for stream in [&client, &server] {
                    stream.set_nodelay(true)?;
                }
                let socket = SockRef::from(&server);
                socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
                socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(Duration::from_secs(20)))?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await?;
                return Ok(());
            }
            Err(error) => {
                why = io::Error::new(error.kind(), format!("{host}, port {port}: {error}"));
                failed.lock().unwrap_or_else(PoisonError::into_inner).insert(host, Instant::now());
            }
        }
    }
    Err(why)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Servers on loopback addresses, of which those that are not started refuse.
    async fn greet(ip: &'static str, port: u16) -> tokio::task::JoinHandle<()> {
        let listener = TcpListener::bind((ip, port)).await.unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(ip.as_bytes()).await;
            }
        })
    }

    async fn who(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said).await;
        said
    }

    #[tokio::test]
    async fn a_connection_leads_to_a_server_that_answers() {
        let free = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let status = watch::Sender::new(Status::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, port, status.subscribe()));
        assert_eq!(who(address).await, "", "no server is known yet");

        let servers = ["127.0.0.2", "127.0.0.3", "127.0.0.4"];
        status.send_modify(|s| s.servers = servers.iter().map(|ip| format!("https://{ip}:9345")).collect());
        assert_eq!(who(address).await, "", "none listens");
        let (second, third) = (greet("127.0.0.3", port).await, greet("127.0.0.4", port).await);
        let mut seen = std::collections::HashSet::new();
        while seen.len() < 2 {
            seen.insert(who(address).await); // those that failed lately are tried all the same
        }
        assert!(!seen.contains(""), "one of them answers each time: {seen:?}");
        second.abort();
        let _ = second.await;
        for _ in 0..10 {
            assert_eq!(who(address).await, "127.0.0.4");
        }
        third.abort();
    }
}
