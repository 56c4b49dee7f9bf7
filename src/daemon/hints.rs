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

/// Listens, for as long as it is polled.
pub(super) async fn listen(shared: Arc<Shared>) {
    let family = |v6| {
        let shared = shared.clone();
        async move {
            if let Err(error) = of_family(&shared, v6).await {
                tracing::debug!("what routers say of the path MTU is not heard: {error}");
            }
        }
    };
    tokio::join!(family(false), family(true));
}

async fn of_family(shared: &Shared, v6: bool) -> io::Result<()> {
    let (domain, protocol) = if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(protocol))?;
    icmp::only_too_big(socket.as_fd(), v6)?;
    // tokio has no type for raw sockets; receiving is the same
    let socket = UdpSocket::from_std(socket.into())?;
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
