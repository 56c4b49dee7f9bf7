//! Notices that links, addresses, routes or settings changed, whoever changed them.
//!
//! Owns a netlink socket in the multicast groups. Does not look at what changed: whoever hears of it compares the whole
//! state anyway, so that a lost message loses nothing.

use std::io;
use std::time::Duration;

use rtnetlink::MulticastGroup;
use rtnetlink::proto::sys::{AsyncSocket, AsyncSocketExt, TokioSocket};
use rtnetlink::sys::SocketAddr;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use tokio::time::Instant;

use super::HostError;

/// A stream of "something changed", with bursts drawn together.
pub struct Watch {
    socket: TokioSocket,
    /// A change was seen, and is told at this time.
    due: Option<Instant>,
}

impl Watch {
    /// Listens in the network namespace of this thread, from now on. Needs no privilege.
    pub fn open() -> Result<Self, HostError> {
        Ok(Watch { socket: listen().map_err(|source| HostError::Open { source })?, due: None })
    }

    /// Waits until something changed. Tells it 100 ms after the first sign, so that a burst counts once; what happens
    /// later is told by the next call. Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        let due = match self.due {
            Some(due) => due,
            None => {
                self.first_sign().await;
                *self.due.insert(Instant::now() + DEBOUNCE)
            }
        };
        tokio::time::sleep_until(due).await;
        self.drain();
        self.due = None;
    }

    async fn first_sign(&mut self) {
        let mut message = Vec::with_capacity(MESSAGE);
        match self.socket.recv(&mut message).await {
            Ok(()) => {}
            // So much happened that the kernel threw messages away. That, too, is a change.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(e) => {
                tracing::warn!("watching links, addresses and routes failed ({e}); starting anew");
                // At most one try each time that `changed` is told: a broken socket does not spin.
                match listen() {
                    Ok(socket) => self.socket = socket,
                    Err(e) => tracing::warn!("cannot watch links, addresses and routes: {e}"),
                }
            }
        }
    }

    /// Takes what has come meanwhile, up to a bound: under endless change the rest raises the next event.
    fn drain(&mut self) {
        let mut message = Vec::with_capacity(MESSAGE);
        for _ in 0..DRAIN_LIMIT {
            message.clear();
            match self.socket.socket_ref().recv(&mut message, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
}

fn listen() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    let groups = GROUPS.iter().fold(0, |all, group| all | 1 << (*group as u32 - 1));
    socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    // Settings such as rp_filter.
    MulticastGroup::Ipv4Netconf,
    MulticastGroup::Ipv6Netconf,
];
const DEBOUNCE: Duration = Duration::from_millis(100);
/// The contents are of no interest: what does not fit may be cut off.
const MESSAGE: usize = 64;
const DRAIN_LIMIT: usize = 100_000;
