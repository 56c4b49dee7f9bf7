//! What routers say about datagrams that did not fit, handed on as hints.
//!
//! Anybody can forge an ICMP error, so that nothing follows from one but that the size in use is probed now rather than half a
//! second later. Without the privilege for a raw socket there are no hints, and black holes are found all the same.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use super::view::Shared;
use crate::engine::tables::Tables;
use crate::sys::icmp;
use crate::wire::icmp::{TooBig, read_too_big};

/// A raw socket for each family, where this process may have them. To be called while it may.
pub(super) fn open() -> Vec<(UdpSocket, bool)> {
    let mut sockets = Vec::new();
    for v6 in [false, true] {
        match of_family(v6) {
            Ok(socket) => sockets.push((socket, v6)),
            Err(error) => tracing::debug!("what routers say of the path MTU is not heard: {error}"),
        }
    }
    sockets
}

/// Listens, for as long as it is polled.
pub(super) async fn listen(sockets: Vec<(UdpSocket, bool)>, shared: Arc<Shared>) {
    let each = sockets.iter().map(|(socket, v6)| {
        let shared = shared.clone();
        async move {
            if let Err(error) = listen_to(socket, *v6, &shared).await {
                tracing::debug!("what routers say of the path MTU is not heard any more: {error}");
            }
        }
    });
    futures::future::join_all(each).await;
}

fn of_family(v6: bool) -> io::Result<UdpSocket> {
    let (domain, protocol) = if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(protocol))?;
    icmp::only_too_big(socket.as_fd(), v6)?;
    // tokio has no type for raw sockets; receiving is the same
    UdpSocket::from_std(socket.into())
}

async fn listen_to(socket: &UdpSocket, v6: bool, shared: &Shared) -> io::Result<()> {
    let mut room = [0; 256];
    loop {
        let len = socket.recv(&mut room).await?;
        if let Some(said) = read_too_big(room.get(..len).unwrap_or_default(), v6) {
            let now_us = shared.started.elapsed().as_micros() as u64;
            hand_on(&shared.tables.load(), now_us, said);
        }
    }
}

fn hand_on(tables: &Tables, now_us: u64, said: TooBig) {
    if !tables.local().addresses.contains(&said.source) {
        return;
    }
    let Some(peer) = tables.source(said.destination).and_then(|index| tables.peer(index)) else { return };
    let inner = (said.mtu as usize).saturating_sub(peer.overhead());
    if let Some(liveness) = peer.spec.liveness.as_deref() {
        liveness.hint(now_us, u16::try_from(inner).unwrap_or(u16::MAX));
    }
}
