//! One simulated node: the production engines and tables, driven as a worker drives them, with every batch held against
//! the model and every counter against what it should have become.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd::config::{Config, Sources};
use meshd::control::known::Known;
use meshd::control::nodes_file;
use meshd::control::plan::{Carrier, plan};
use meshd::control::reconcile::{Verdict, judge};
use meshd::engine::big_tcp::BigTcp;
use meshd::engine::coalesce::Accepts;
use meshd::engine::drop::{Direction, Drop};
use meshd::engine::inbound::{Inbound, Received};
use meshd::engine::outbound::{HEADROOM, Outbound, Sent};
use meshd::engine::stats::{Stats, WorkerStats};
use meshd::engine::tables::{ENCAPSULATION, Tables};
use meshd::engine::tx_batch::Piece;
use meshd::node::{NodeList, NodeName};

use crate::Sabotage;
use crate::model::{Fate, View};
use crate::reference::{self, Rng, VNET, be16, look};

/// A datagram that left a node.
#[derive(Debug, Clone)]
pub(crate) struct Datagram {
    pub(crate) to: SocketAddr,
    pub(crate) socket: u16,
    pub(crate) tos: u8,
    pub(crate) bytes: Vec<u8>,
}

/// A buffer as a socket delivers it: one datagram, or several of one length.
#[derive(Debug, Clone)]
pub(crate) struct Buffer {
    pub(crate) from: IpAddr,
    pub(crate) tos: u8,
    pub(crate) segment_len: Option<u16>,
    /// It is one UDP super-packet that was never cut, into segments of `segment_len`.
    pub(crate) uncut: bool,
    pub(crate) truncated: bool,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) underlay: Vec<IpAddr>,
    pub(crate) link_mtu: u32,
    pub(crate) view: View,
    pub(crate) list: NodeList,
    pub(crate) sequence: [u32; 8],
    pub(crate) ip_id: u16,
    config: Config,
    workers: usize,
    accepts: Accepts,
    senders: u16,
    tables: Tables,
    known: Known,
    stats: Stats,
    out: Vec<Outbound>,
    inn: Vec<Inbound>,
}

type Check<T = ()> = Result<T, String>;

impl Node {
    pub(crate) fn new(number: usize, vni: u32, underlay: Vec<IpAddr>, link_mtu: u32, rng: &mut Rng) -> Self {
        let name: NodeName = format!("n{number:02}").parse().unwrap();
        let file = Some(("sim.yaml".into(), format!("vni: {vni}\nnode-name: {name}\n").into_bytes()));
        let config = Config::parse(&Sources { file, ..Sources::default() }).unwrap();
        let workers = rng.range(1, 2);
        let accepts = rng.pick(&[
            Accepts { tso: true, uso: true },
            Accepts { tso: true, uso: true },
            Accepts { tso: true, uso: false },
            Accepts { tso: false, uso: false },
        ]);
        let senders = rng.pick(&[1, 4, 8]);
        let local = meshd::engine::tables::Local {
            mac: name.derived_mac(),
            vni: config.vni,
            subnets: Vec::new(),
            addresses: Vec::new(),
            mtu: 1450,
            identity: None,
            former_identity: None,
            bfd_keys: None,
        };
        let view = View { mac: name.derived_mac().0, vni, mtu: 1450, ..View::default() };
        let mut node = Node {
            name,
            underlay,
            link_mtu,
            view,
            list: NodeList::default(),
            sequence: std::array::from_fn(|_| rng.next() as u32),
            ip_id: rng.next() as u16,
            config,
            workers,
            accepts,
            senders,
            tables: Tables::empty(local),
            known: Known::new(workers, None),
            stats: Stats::new(workers),
            out: Vec::new(),
            inn: Vec::new(),
        };
        node.restart();
        node
    }

    /// The process starts anew: counters and whatever was half done are gone, the last list is not.
    pub(crate) fn restart(&mut self) {
        self.stats = Stats::new(self.workers);
        self.out = (0..self.workers).map(|w| Outbound::new(self.stats.clone(), w, self.senders)).collect();
        let inbound = |w| Inbound::new(self.stats.clone(), w, self.accepts).with_big_tcp(Arc::new(BigTcp::on()));
        self.inn = (0..self.workers).map(inbound).collect();
        self.known = Known::new(self.workers, None);
        if !self.list.nodes.is_empty() {
            self.put_into_effect().ok();
        }
    }

    /// A new node list arrives. One that does not have this node, or removes most peers unasked, changes nothing.
    pub(crate) fn learn(&mut self, text: &str, accepted: bool) -> Check {
        let list = nodes_file::parse(text.as_bytes(), self.config.port).map_err(|e| format!("{e:?} in\n{text}"))?;
        if list.get(&self.name).is_none() {
            return Ok(());
        }
        let others = |list: &NodeList| -> Vec<NodeName> {
            list.nodes.iter().map(|n| n.name.clone()).filter(|name| *name != self.name).collect()
        };
        let (old, new) = (others(&self.list), others(&list));
        let gone = old.iter().filter(|name| !new.contains(name)).count();
        let hold = !accepted && old.len() >= 4 && gone * 2 > old.len();
        match judge(&self.list, &list, &self.name, accepted) {
            Verdict::HoldBack { .. } if hold => return Ok(()),
            Verdict::Apply(_) if !hold => {}
            verdict => return Err(format!("{verdict:?} for {old:?} -> {new:?}")),
        }
        self.list = list;
        self.put_into_effect()
    }

    fn put_into_effect(&mut self) -> Check {
        let own = self.list.get(&self.name).cloned().ok_or("no own entry")?;
        let carriers: Vec<_> = self.underlay.iter().map(|ip| Carrier { ip: *ip, mtu: self.link_mtu }).collect();
        let plan = plan(&self.config, &self.list, &own, &carriers, &mut self.known)
            .map_err(|error| format!("plan: {error}"))?;
        let room = |ip: &IpAddr| (self.link_mtu - if ip.is_ipv6() { 70 } else { 50 }) as usize;
        let mut view = View { mac: own.mac.0, vni: self.view.vni, subnets: own.subnets.clone(), ..View::default() };
        for node in self.list.nodes.iter().filter(|node| node.name != self.name) {
            let reachable = |to: &&SocketAddr| self.underlay.iter().any(|ip| ip.is_ipv6() == to.is_ipv6());
            let Some(endpoint) = node.underlay.iter().find(reachable) else { continue };
            view.peers.push(crate::model::Peer {
                name: node.name.to_string(),
                endpoint: *endpoint,
                underlay: node.underlay.iter().map(SocketAddr::ip).collect(),
                mac: node.mac.0,
                subnets: node.subnets.clone(),
                mtu: room(&endpoint.ip()),
            });
        }
        let by_peers = view.peers.iter().map(|peer| peer.mtu).min();
        view.mtu = by_peers.or_else(|| self.underlay.iter().map(room).min()).ok_or("no underlay")?;
        view.addresses = self.underlay.clone();
        view.addresses.extend(&plan.overlay);
        if plan.overlay.iter().any(|ip| !own.subnets.iter().any(|net| net.contains(ip))) {
            return Err(format!("overlay addresses {:?} out of {:?}", plan.overlay, own.subnets));
        }
        if plan.mtu as usize != view.mtu {
            return Err(format!("planned MTU {}, not {}", plan.mtu, view.mtu));
        }
        self.view = view;
        self.tables = Tables::new(plan.local, plan.peers);
        Ok(())
    }

    /// A batch from the TUN device. Returns what leaves the node; `trouble` makes sends fail.
    pub(crate) fn tun_in(
        &mut self,
        frames: &[Vec<u8>],
        now_ms: u64,
        trouble: bool,
        rng: &mut Rng,
        sabotage: &mut Option<Sabotage>,
    ) -> Check<Vec<Datagram>> {
        let before = self.account();
        let mut delta = Account::default();
        let worker = rng.below(self.workers);
        let mut arena = vec![0xa5; 64];
        let mut expected = Flows::default();
        let mut answers = Vec::new();
        let mut places = Vec::new();
        for frame in frames {
            let at = (arena.len() + HEADROOM).next_multiple_of(64);
            arena.resize(at, 0xa5);
            arena.extend(frame);
            places.push((at, frame.len()));
            let out = self.view.out(frame);
            delta.add("tun_rx_packets", out.packets);
            delta.add("tun_rx_bytes", out.bytes);
            match out.fate {
                Fate::Drop { reason, answer } => {
                    delta.add(reason, out.packets);
                    answers.extend(answer.map(|mtu| (mtu, frame[VNET..].to_vec())));
                }
                Fate::Sent { peer, packets, extra } => {
                    delta.add("originated_outbound", extra);
                    for packet in packets {
                        let mut datagram = self.view.header(peer, packet[0] >> 4 == 6);
                        datagram.extend(&packet);
                        expected.push(&packet, (self.view.peers[peer].endpoint, packet_tos(&packet), datagram));
                    }
                }
            }
        }
        let out = &mut self.out[worker];
        for (at, len) in places {
            out.push(&self.tables, now_ms, &mut arena, at, len);
        }
        let mut sent = Vec::new();
        let mut actual = Flows::default();
        for run in out.batch().runs() {
            let gather = |pieces: &[Piece]| -> Vec<u8> {
                pieces.iter().flat_map(|piece| piece.of(&arena, out.batch().slab()).iter().copied()).collect()
            };
            let datagrams: Vec<_> = run.datagrams().map(gather).collect();
            if gather(run.pieces()) != datagrams.concat() || datagrams.len() != usize::from(run.segments) {
                return Err(format!("a run of {} segments has {} datagrams", run.segments, datagrams.len()));
            }
            if run.segments > 64 || run.bytes > 65_507 || run.bytes as usize != datagrams.concat().len() {
                return Err(format!("a run of {} segments, {} bytes", run.segments, run.bytes));
            }
            let equal = datagrams.iter().rev().skip(1).all(|d| d.len() == usize::from(run.segment_len));
            if !equal || datagrams.last().is_none_or(|d| d.len() > usize::from(run.segment_len)) {
                return Err("a run of datagrams of several lengths".to_owned());
            }
            let bytes = |count: usize| -> u64 { datagrams.iter().take(count).map(|d| d.len() as u64).sum() };
            let inner = |count: usize| bytes(count) - (ENCAPSULATION * count) as u64;
            let outer = if run.endpoint.is_ipv6() { 48 } else { 28 };
            let too_long = datagrams.iter().any(|d| d.len() + outer > self.link_mtu as usize);
            let (count, outcome) = if too_long {
                delta.add("udp_send_failed", datagrams.len() as u64);
                (0, Sent::Partly(0, Drop::UdpSendFailed))
            } else if trouble && rng.per_mille(100) {
                let count = rng.below(datagrams.len() + 1);
                delta.add("udp_buffer_full", (datagrams.len() - count) as u64);
                (count, Sent::Partly(count as u16, Drop::UdpBufferFull))
            } else {
                (datagrams.len(), Sent::All)
            };
            out.sent(&self.tables, run, outcome);
            delta.add("udp_tx_packets", count as u64);
            delta.add("peer_tx_packets", count as u64);
            if count == datagrams.len() || count == 0 {
                delta.add("udp_tx_bytes", bytes(count));
                delta.add("peer_tx_bytes", inner(count));
            } else {
                // of a part only the share is counted
                delta.add("udp_tx_bytes", u64::from(run.bytes) * count as u64 / datagrams.len() as u64);
                delta.add("peer_tx_bytes", u64::from(run.inner_bytes) * count as u64 / datagrams.len() as u64);
            }
            for (index, bytes) in datagrams.into_iter().enumerate() {
                let packet = bytes.get(ENCAPSULATION..).unwrap_or_default().to_vec();
                actual.push(&packet, (run.endpoint, run.tos, bytes.clone()));
                if index < count && !Sabotage::hits(sabotage, Sabotage::Lose) {
                    let socket = run.key.socket;
                    sent.push(Datagram { to: run.endpoint, socket, tos: run.tos, bytes });
                }
            }
        }
        actual.equal(&expected, "sent")?;
        let errors: Vec<Vec<u8>> = out.errors().map(<[u8]>::to_vec).collect();
        if errors.len() != answers.len() {
            return Err(format!("{} errors for {} packets that do not fit", errors.len(), answers.len()));
        }
        for (error, (mtu, packet)) in errors.iter().zip(&answers) {
            check_answer(error, *mtu, packet)?;
            let written = !rng.per_mille(20);
            out.error_written(error, written);
            if written {
                delta.add("originated_inbound", 1);
                delta.add("tun_tx_packets", 1);
                delta.add("tun_tx_bytes", (error.len() - VNET) as u64);
            }
        }
        out.clear();
        self.settle(before, delta, sabotage)?;
        Ok(sent)
    }

    /// A batch from the underlay. Returns the packets that come out of the TUN device.
    pub(crate) fn udp_in(
        &mut self,
        buffers: &[Buffer],
        now_ms: u64,
        trouble: bool,
        rng: &mut Rng,
        sabotage: &mut Option<Sabotage>,
    ) -> Check<Vec<Vec<u8>>> {
        let before = self.account();
        let mut delta = Account::default();
        // of what is for the node itself PSH may be missing
        let told = |packet: Vec<u8>| match look(&packet) {
            Some(seen) if self.view.addresses.contains(&seen.destination) => reference::without_push(packet),
            _ => packet,
        };
        let mut expected = Flows::default();
        let mut arena = Vec::new();
        let mut received = Vec::new();
        for buffer in buffers {
            let at = arena.len();
            arena.extend(&buffer.bytes);
            arena.resize((at + buffer.bytes.len() + 64).next_multiple_of(64), 0x5a);
            let Buffer { from, tos, segment_len, truncated, .. } = *buffer;
            received.push(Received {
                at,
                len: buffer.bytes.len(),
                segment_len,
                source: (from, 40_000).into(),
                tos,
                truncated,
            });
            delta.add("udp_rx_bytes", buffer.bytes.len() as u64);
            let step = match segment_len {
                Some(step) if !buffer.uncut => usize::from(step),
                _ => buffer.bytes.len().max(1),
            };
            let mut datagrams: Vec<&[u8]> = buffer.bytes.chunks(step).collect();
            if datagrams.is_empty() {
                datagrams.push(&[]);
            }
            let inner_size = segment_len.filter(|_| buffer.uncut).map(usize::from);
            for datagram in datagrams {
                let fate = match self.view.arrive(from, tos, datagram, inner_size, truncated) {
                    Err(reason) if reason == "unknown_source" || !truncated => Err(reason),
                    _ if truncated => Err("truncated_datagram"),
                    fate => fate,
                };
                match fate {
                    Ok((_, packets)) => {
                        delta.add("udp_rx_packets", packets.len() as u64);
                        if packets.len() > 1 {
                            // counts as its segments, each with its headers
                            let whole = look(&datagram[22..]).map_or(0, |seen| seen.total);
                            let cut: usize = packets.iter().map(Vec::len).sum();
                            delta.add("udp_rx_bytes", (cut - whole + 22 * (packets.len() - 1)) as u64);
                        }
                        delta.add("peer_rx_packets", packets.len() as u64);
                        delta.add("peer_rx_bytes", packets.iter().map(|p| p.len() as u64).sum());
                        packets.into_iter().map(&told).for_each(|p| expected.push(&p.clone(), (p, 0)));
                    }
                    Err(reason) => {
                        delta.add("udp_rx_packets", 1);
                        delta.add(reason, 1);
                    }
                }
            }
        }
        let worker = rng.below(self.workers);
        let inn = &mut self.inn[worker];
        inn.received_at(now_ms * 1000);
        for received in received {
            inn.push(&self.tables, now_ms, &mut arena, received);
        }
        inn.finish(&mut arena);
        let (mut actual, mut delivered) = (Flows::default(), Vec::new());
        let mut units: Vec<_> = inn.units().iter().collect();
        if units.len() > 1 && Sabotage::hits(sabotage, Sabotage::Swap) {
            units.reverse();
        }
        for unit in units {
            if Sabotage::hits(sabotage, Sabotage::DropSilently) {
                continue;
            }
            let mut frame: Vec<u8> =
                unit.pieces().iter().flat_map(|piece| piece.of(&arena, inn.slab()).iter().copied()).collect();
            if Sabotage::hits(sabotage, Sabotage::CorruptDelivered) {
                *frame.last_mut().ok_or("an empty unit")? ^= 0x40;
            }
            let gso = frame.get(1).copied().unwrap_or(0);
            if frame.first().is_some_and(|flags| *flags != 0) && !self.accepts.tso || gso == 5 && !self.accepts.uso {
                return Err("an offload that the device does not take".to_owned());
            }
            let packets = reference::unwrap(&frame)?;
            let bytes: usize = packets.iter().map(Vec::len).sum();
            if packets.len() != usize::from(unit.segments) || bytes != unit.bytes as usize {
                let (segments, unit_bytes) = (unit.segments, unit.bytes);
                return Err(format!("a unit of {segments}, {unit_bytes} bytes, is {}, {bytes}", packets.len()));
            }
            let head_id = frame.get(VNET + 4..VNET + 6).map_or(0, |id| be16(id, 0));
            let written = !(trouble && rng.per_mille(20));
            inn.written(unit, written);
            delta.add(if written { "tun_tx_packets" } else { "tun_write_failed" }, packets.len() as u64);
            delta.add("tun_tx_bytes", if written { bytes as u64 } else { 0 });
            let twice = Sabotage::hits(sabotage, Sabotage::Duplicate);
            for packet in packets {
                let seen = told(packet.clone());
                actual.push(&packet, (seen.clone(), head_id));
                if twice {
                    actual.push(&packet, (seen, head_id));
                }
                if written {
                    delivered.push(packet);
                }
            }
        }
        actual.equal_ids(expected)?;
        inn.clear();
        inn.ask(|_| !rng.per_mille(200));
        self.settle(before, delta, sabotage)?;
        Ok(delivered)
    }

    /// Every counter is what it was plus what had to be added, and what went in is what came out plus the drops.
    fn settle(&self, before: Account, delta: Account, sabotage: &mut Option<Sabotage>) -> Check {
        if Sabotage::hits(sabotage, Sabotage::Miscount) {
            self.stats.worker(0).ok_or("no worker")?.drop(Drop::NoRoute, 1);
        }
        let after = self.account();
        let mut wanted = before.0;
        for (name, n) in delta.0 {
            *wanted.entry(name).or_default() += n;
        }
        for (name, n) in &after.0 {
            let want = wanted.get(name).copied().unwrap_or(0);
            if *n != want {
                return Err(format!("{}: {name} is {n}, should be {want}", self.name));
            }
        }
        let flow = |read: fn(&WorkerStats) -> u64| self.stats.sum(read);
        let dropped = |direction| -> u64 {
            let drops = Drop::ALL.iter().filter(|reason| reason.direction() == direction);
            drops.map(|reason| self.stats.sum(|worker| worker.drops(*reason))).sum()
        };
        let entered = flow(|w| w.flow.tun_rx_packets.get() + w.flow.originated_outbound.get());
        let left = flow(|w| w.flow.udp_tx_packets.get() + w.flow.consumed_outbound.get());
        if entered != left + dropped(Direction::Outbound) {
            return Err(format!("{}: outbound {entered} in, {left} out", self.name));
        }
        let entered = flow(|w| w.flow.udp_rx_packets.get() + w.flow.originated_inbound.get());
        let left = flow(|w| w.flow.tun_tx_packets.get() + w.flow.consumed_inbound.get());
        if entered != left + dropped(Direction::Inbound) {
            return Err(format!("{}: inbound {entered} in, {left} out", self.name));
        }
        Ok(())
    }

    fn account(&self) -> Account {
        const COUNTED: [&str; 12] = [
            "tun_rx_packets",
            "tun_rx_bytes",
            "tun_tx_packets",
            "tun_tx_bytes",
            "udp_rx_packets",
            "udp_rx_bytes",
            "udp_tx_packets",
            "udp_tx_bytes",
            "originated_outbound",
            "originated_inbound",
            "consumed_outbound",
            "consumed_inbound",
        ];
        let mut account = Account::default();
        for worker in (0..self.workers).filter_map(|w| self.stats.worker(w)) {
            for (name, value) in worker.flow.values().into_iter().filter(|(name, _)| COUNTED.contains(name)) {
                account.add(name, value);
            }
            Drop::ALL.iter().for_each(|reason| account.add(reason.name(), worker.drops(*reason)));
        }
        for peer in self.tables.peers() {
            let stats = &peer.spec.stats;
            account.add("peer_tx_packets", stats.sum(|flow| flow.tx_packets.get()));
            account.add("peer_tx_bytes", stats.sum(|flow| flow.tx_bytes.get()));
            account.add("peer_rx_packets", stats.sum(|flow| flow.rx_packets.get()));
            account.add("peer_rx_bytes", stats.sum(|flow| flow.rx_bytes.get()));
        }
        account
    }

    /// Packets that it took in from both sides since it started.
    pub(crate) fn packets(&self) -> u64 {
        self.stats.sum(|w| w.flow.tun_rx_packets.get() + w.flow.udp_rx_packets.get())
    }
}

/// Counters by name.
#[derive(Debug, Default, Clone)]
struct Account(BTreeMap<&'static str, u64>);

impl Account {
    fn add(&mut self, name: &'static str, n: u64) {
        *self.0.entry(name).or_default() += n;
    }
}

/// Items by flow, in order within each.
#[derive(Debug)]
struct Flows<T>(BTreeMap<Vec<u8>, Vec<T>>);

impl<T> Default for Flows<T> {
    fn default() -> Self {
        Flows(BTreeMap::new())
    }
}

impl<T> Flows<T> {
    fn push(&mut self, packet: &[u8], item: T) {
        self.0.entry(flow_key(packet)).or_default().push(item);
    }
}

impl<T: PartialEq + std::fmt::Debug> Flows<T> {
    fn equal(&self, expected: &Self, what: &str) -> Check {
        for key in self.0.keys().chain(expected.0.keys()) {
            let (a, b) = (self.0.get(key), expected.0.get(key));
            if a == b {
                continue;
            }
            let (a, b) = (a.map_or(&[][..], Vec::as_slice), b.map_or(&[][..], Vec::as_slice));
            let differ = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
            let (n, m) = (a.len(), b.len());
            let (a, b) = (a.get(differ), b.get(differ));
            return Err(format!(
                "{what}: {n} of a flow, should be {m}; number {differ}:\n  is     {a:02x?}\n  should {b:02x?}"
            ));
        }
        Ok(())
    }
}

impl Flows<(Vec<u8>, u16)> {
    /// Equal, but that an atomic packet's fixed id may count up where packets were joined: an offload header cannot say
    /// "fixed", and such an id has no meaning (RFC 6864 §4.1).
    fn equal_ids(mut self, expected: Self) -> Check {
        for (key, is) in &mut self.0 {
            let Some(should) = expected.0.get(key) else { continue };
            for ((is, head_id), (should, _)) in is.iter_mut().zip(should) {
                let atomic =
                    |p: &[u8]| look(p).is_some_and(|l| !l.v6 && l.df && reference::sum(&[&p[..l.l4]]) == 0xffff);
                if is != should && atomic(is) && atomic(should) && be16(should, 4) == *head_id {
                    let id = be16(should, 4).to_be_bytes();
                    is[4..6].copy_from_slice(&id);
                    reference::finish_ip(is);
                }
                *head_id = 0;
            }
        }
        self.equal(&expected, "delivered")
    }
}

/// Addresses, protocol and ports.
pub(crate) fn flow_key(packet: &[u8]) -> Vec<u8> {
    let Some(look) = look(packet) else { return Vec::new() };
    let mut key = if look.v6 { packet[8..40].to_vec() } else { packet[12..20].to_vec() };
    key.push(look.protocol);
    if !look.fragment && matches!(look.protocol, 6 | 17) {
        key.extend(packet[look.l4..].iter().take(4));
    }
    key
}

fn packet_tos(packet: &[u8]) -> u8 {
    look(packet).map_or(0, |look| look.tos)
}

/// An ICMP error says the MTU, quotes the packet and goes to its sender.
fn check_answer(frame: &[u8], mtu: usize, packet: &[u8]) -> Check {
    let error = &frame[VNET..];
    let (seen, about) = (look(error).ok_or("an error that is no packet")?, look(packet).ok_or("about what?")?);
    let rest = &error[seen.l4..];
    let (right, limit) = if seen.v6 {
        (seen.protocol == 58 && rest[..2] == [2, 0] && reference::l4_sum(error, &seen) == 0xffff, 1280)
    } else {
        (seen.protocol == 1 && rest[..2] == [3, 4] && reference::sum(&[rest]) == 0xffff, 576)
    };
    let quoted = packet.starts_with(&rest[8..]);
    let told = reference::be32(rest, 4) as usize;
    if !right || !quoted || seen.destination != about.source || error.len() > limit || told != mtu {
        return Err(format!("a wrong answer to a packet that does not fit {mtu}: {error:02x?}"));
    }
    Ok(())
}
