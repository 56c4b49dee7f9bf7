//! The conversation with the kernel: one rtnetlink connection, a few questions and a few changes.
//!
//! Owns the socket, timeouts, lost and interrupted answers. Does not know what any of it is for.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_MULTIPART, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteScope};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use tokio::task::JoinHandle;

use super::HostError;
use super::facts::{Address, Link, Route, family};

/// A connection that opens itself anew when it broke.
pub(super) struct Netlink(Mutex<Connection>);

struct Connection {
    handle: Handle,
    task: JoinHandle<()>,
    broken: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    fn open() -> Result<Self, HostError> {
        let failed = |source| HostError::Open { source };
        // Strict checking lets the kernel filter dumps (4.20 and later); without it every answer is filtered here.
        let (mut connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().or_else(|_| rtnetlink::new_connection()).map_err(failed)?;
        // Without its closing message an answer that broke off would look like a whole one; and that message alone may
        // carry the flag that says "interrupted".
        connection.set_forward_done(true);
        connection.set_forward_ack(true);
        Ok(Connection { handle, task: tokio::spawn(connection), broken: false })
    }
}

/// What to change.
#[derive(Debug, Clone)]
pub(super) enum Request {
    /// Change a link.
    SetLink(LinkMessage),
    /// Remove a link.
    DelLink(u32),
    /// Add an address; refused where it exists.
    AddAddress(Address),
    /// Remove an address.
    DelAddress(Address),
    /// Add a route; refused where any route has that prefix, table and metric.
    AddRoute(Route),
    /// Remove exactly that route.
    DelRoute(Route),
}

impl Netlink {
    /// Opens a connection in the network namespace of this thread.
    pub(super) fn open() -> Result<Self, HostError> {
        Ok(Netlink(Mutex::new(Connection::open()?)))
    }

    /// The link of that name.
    pub(super) async fn link(&self, name: &str) -> Result<Option<Link>, HostError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let doing = || format!("look at the device {name}");
        let mut found = None;
        let answer = self
            .ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST, doing, |m| {
                if let RouteNetlinkMessage::NewLink(m) = m {
                    found = Some(Link::from(&m));
                }
            })
            .await;
        match answer {
            Ok(_) => Ok(found),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All links.
    pub(super) async fn links(&self) -> Result<Vec<Link>, HostError> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump(message, "list the devices", |m| match m {
            RouteNetlinkMessage::NewLink(m) => Some(Link::from(&m)),
            _ => None,
        })
        .await
    }

    /// All addresses.
    pub(super) async fn addresses(&self) -> Result<Vec<Address>, HostError> {
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(message, "list the addresses", |m| match m {
            RouteNetlinkMessage::NewAddress(m) => Address::read(&m),
            _ => None,
        })
        .await
    }

    /// The routes of all tables that `keep` keeps; with `protocol`, only those that carry it.
    pub(super) async fn routes(
        &self,
        protocol: Option<u8>,
        mut keep: impl FnMut(&Route) -> bool,
    ) -> Result<Vec<Route>, HostError> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.protocol = protocol.unwrap_or(0).into();
            let routes = self
                .dump(RouteNetlinkMessage::GetRoute(message), "list the routes", |m| match m {
                    // A kernel without IPv6 answers a question about IPv6 routes with its IPv4 ones.
                    RouteNetlinkMessage::NewRoute(m) if m.header.address_family == family => Route::read(&m)
                        .filter(|r| protocol.is_none_or(|wanted| r.protocol == wanted))
                        .filter(|r| keep(r)),
                    _ => None,
                })
                .await?;
            all.extend(routes);
        }
        Ok(all)
    }

    /// The route that the kernel takes to an address: as it stands in its table with `matched`, else as it is used.
    pub(super) async fn route_to(&self, to: IpAddr, matched: bool) -> Result<Option<Route>, HostError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(to);
        message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
        message.header.flags = if matched { RouteFlags::FibMatch } else { RouteFlags::LookupTable };
        message.attributes.push(RouteAttribute::Destination(to.into()));
        let mut found = None;
        let doing = || format!("look up the route to {to}");
        self.ask(RouteNetlinkMessage::GetRoute(message), NLM_F_REQUEST, doing, |m| {
            if let RouteNetlinkMessage::NewRoute(m) = m {
                found = Route::read(&m);
            }
        })
        .await?;
        Ok(found)
    }

    /// Carries out one change. `Ok(false)` when there was nothing to do: it existed already, or was gone.
    pub(super) async fn change(&self, request: Request, doing: impl Fn() -> String) -> Result<bool, HostError> {
        let (message, flags, moot) = request.message();
        match self.ask(message, NLM_F_REQUEST | NLM_F_ACK | flags, doing, |_| {}).await {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error().is_some_and(|code| moot.contains(&code)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Carries out many route changes in their order, several under way at a time, and gives the outcome of each.
    pub(super) async fn change_routes<T>(
        &self,
        changes: Vec<(T, Request)>,
        doing: impl Fn(&T) -> String,
    ) -> Vec<(T, Result<bool, HostError>)> {
        let doing = &doing;
        // The kernel works on a request while it is being sent, and `buffered` starts them in order.
        stream::iter(changes)
            .map(|(what, request)| async move {
                let outcome = self.change(request, || doing(&what)).await;
                (what, outcome)
            })
            .buffered(32)
            .collect()
            .await
    }

    /// Collects what `pick` picks out of a dump; begins again when the kernel says that it changed meanwhile.
    async fn dump<T>(
        &self,
        message: RouteNetlinkMessage,
        doing: &str,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, HostError> {
        let mut picked = Vec::new();
        for _ in 0..DUMP_TRIES {
            picked.clear();
            let whole = self
                .ask(
                    message.clone(),
                    NLM_F_REQUEST | NLM_F_DUMP,
                    || doing.to_owned(),
                    |m| {
                        picked.extend(pick(m));
                    },
                )
                .await?;
            if whole {
                break;
            }
        }
        // Under endless change the last look has to do: whatever it missed raises an event, and is looked at again.
        Ok(picked)
    }

    /// Sends one request and hands each answer to `take`. `Ok(false)` when a dump was interrupted by a change.
    async fn ask(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        doing: impl Fn() -> String,
        mut take: impl FnMut(RouteNetlinkMessage),
    ) -> Result<bool, HostError> {
        let (mut whole, mut ended) = (true, false);
        let mut answers = self.send(message, flags).map_err(|e| e.unwrap_or_else(|| self.lost(doing())))?;
        while let Some(answer) =
            tokio::time::timeout(ANSWER_TIMEOUT, answers.next()).await.map_err(|_| self.lost(doing()))?
        {
            whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(m) => {
                    ended |= answer.header.flags & NLM_F_MULTIPART == 0;
                    take(m);
                }
                NetlinkPayload::Error(e) if e.code.is_some() => return Err(HostError::refused(doing(), e.to_io())),
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => ended = true,
                _ => {}
            }
        }
        if ended { Ok(whole) } else { Err(self.lost(doing())) }
    }

    /// Hands a request to the connection, which is opened anew where its task has ended.
    fn send(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + use<>, Option<HostError>> {
        let mut connection = self.lock();
        if connection.broken || connection.task.is_finished() {
            *connection = Connection::open().map_err(Some)?;
        }
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        connection.handle.request(message).map_err(|_| None)
    }

    fn lost(&self, doing: String) -> HostError {
        self.lock().broken = true;
        HostError::Lost { doing }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Request {
    /// The message, its flags, and the errors that mean that there was nothing to do.
    fn message(self) -> (RouteNetlinkMessage, u16, &'static [i32]) {
        match self {
            Request::SetLink(message) => (RouteNetlinkMessage::SetLink(message), 0, &[]),
            Request::DelLink(index) => {
                let mut message = LinkMessage::default();
                message.header.index = index;
                (RouteNetlinkMessage::DelLink(message), 0, &[libc::ENODEV])
            }
            Request::AddAddress(address) => {
                (RouteNetlinkMessage::NewAddress(address.message()), NLM_F_CREATE | NLM_F_EXCL, &[libc::EEXIST])
            }
            Request::DelAddress(address) => {
                (RouteNetlinkMessage::DelAddress(address.message()), 0, &[libc::EADDRNOTAVAIL])
            }
            Request::AddRoute(route) => {
                (RouteNetlinkMessage::NewRoute(route.message()), NLM_F_CREATE | NLM_F_EXCL, &[libc::EEXIST])
            }
            Request::DelRoute(route) => {
                let mut message = route.message();
                // As `ip route del`: the scope is no part of what names the route.
                message.header.scope = RouteScope::NoWhere;
                (RouteNetlinkMessage::DelRoute(message), 0, &[libc::ESRCH])
            }
        }
    }
}

/// The kernel answers at once; whoever waits longer waits for a reply that was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const DUMP_TRIES: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_breaks_is_told_and_opened_anew() {
        let netlink = Netlink::open().unwrap();
        assert!(!netlink.links().await.unwrap().is_empty());
        let (answer, ()) = tokio::join!(netlink.links(), async { netlink.lock().task.abort() });
        assert!(matches!(answer, Err(HostError::Lost { .. })), "{answer:?}");
        assert!(!netlink.links().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_device_that_does_not_exist_is_no_error() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.link("meshd-no-such").await.unwrap(), None);
        assert_eq!(netlink.link("lo").await.unwrap().map(|l| (l.name, l.internal)), Some(("lo".to_owned(), true)));
    }
}
