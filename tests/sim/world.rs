//! The simulated network: nodes, links, virtual time, and the steps of a walk.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::Sabotage;
use crate::node::{Buffer, Datagram, Node, flow_key};
use crate::reference::{self, ACK, CWR, ECE, FIN, Head, PSH, Rng, SYN, TCP, TcpHead, UDP};

/// One step of a walk. What it does depends on its own seed and on the world it finds, so that a walk still makes sense
/// when steps are left out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    kind: Kind,
    seed: u64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Traffic,
    Rubbish,
    Hostile,
    Advance,
    Link,
    LinkMtu,
    List,
    Learn,
    Restart,
}

/// The steps of the walk with that number.
pub(crate) fn steps(seed: u64) -> Vec<Step> {
    let mut rng = Rng(seed ^ 0x57a1_c0de);
    let count = rng.range(8, 28);
    let mut one = || {
        let kind = match rng.below(100) {
            0..40 => Kind::Traffic,
            40..44 => Kind::Rubbish,
            44..50 => Kind::Hostile,
            50..70 => Kind::Advance,
            70..79 => Kind::Link,
            79..83 => Kind::LinkMtu,
            83..89 => Kind::List,
            89..97 => Kind::Learn,
            _ => Kind::Restart,
        };
        Step { kind, seed: rng.next() }
    };
    (0..count).map(|_| one()).collect()
}

/// What a link does to datagrams, one way. Chances are per mille.
#[derive(Debug, Clone, Copy)]
struct Link {
    latency_ms: u64,
    jitter_ms: u64,
    loss: u32,
    duplication: u32,
    corruption: u32,
    marking: u32,
    mtu: usize,
}

const CLEAN: Link =
    Link { latency_ms: 1, jitter_ms: 0, loss: 0, duplication: 0, corruption: 0, marking: 0, mtu: 65_535 };

/// A datagram on its way.
#[derive(Debug)]
struct Flight {
    arrives_ms: u64,
    number: u64,
    from: IpAddr,
    datagram: Datagram,
    corrupt: bool,
}

/// A node's entry in the list as it should be.
#[derive(Debug, Clone)]
struct Member {
    node: usize,
    underlay: Vec<IpAddr>,
    subnets: Vec<IpNet>,
}

pub(crate) struct World {
    nodes: Vec<Node>,
    list: Vec<Member>,
    links: Vec<Link>,
    flights: Vec<Flight>,
    last_arrival: Vec<u64>,
    now_ms: u64,
    number: u64,
    next_subnet: u16,
    next_address: u16,
    sabotage: Option<Sabotage>,
}

/// What a walk moved, so that a run can show that it did something.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moved {
    pub(crate) packets: u64,
    pub(crate) delivered: u64,
}

/// Nodes that a walk can have, those that join later included.
const MOST: usize = 8;

impl World {
    pub(crate) fn new(seed: u64, sabotage: Option<Sabotage>) -> Result<Self, String> {
        let mut rng = Rng(seed);
        let mut world = World {
            nodes: Vec::new(),
            list: Vec::new(),
            links: vec![CLEAN; MOST * MOST],
            flights: Vec::new(),
            last_arrival: vec![0; MOST * MOST],
            now_ms: 1,
            number: 0,
            next_subnet: 1,
            next_address: 1,
            sabotage: None,
        };
        for _ in 0..rng.range(2, 5) {
            world.add_node(&mut rng);
        }
        world.all_learn(true)?;
        world.sabotage = sabotage;
        Ok(world)
    }

    pub(crate) fn run(mut self, steps: &[Step]) -> Result<Moved, String> {
        let mut moved = Moved::default();
        for (number, step) in steps.iter().enumerate() {
            let mut rng = Rng(step.seed);
            let done = match step.kind {
                Kind::Traffic => self.traffic(&mut rng),
                Kind::Rubbish => self.rubbish(&mut rng),
                Kind::Hostile => self.hostile(&mut rng),
                Kind::Advance => self.advance(1 + rng.next() % 30, &mut rng),
                Kind::Link => self.change_link(&mut rng),
                Kind::LinkMtu => self.change_mtu(&mut rng),
                Kind::List => self.change_list(&mut rng),
                Kind::Learn => self.learn(&mut rng),
                Kind::Restart => {
                    let node = rng.below(self.nodes.len());
                    moved.packets += self.nodes[node].packets();
                    self.nodes[node].restart();
                    Ok(0)
                }
            };
            moved.delivered += done.map_err(|error| format!("step {number}, {:?}: {error}", step.kind))?;
        }
        moved.delivered += self.heals(&mut Rng(self.number)).map_err(|error| format!("healed: {error}"))?;
        moved.packets += self.nodes.iter().map(Node::packets).sum::<u64>();
        Ok(moved)
    }

    fn add_node(&mut self, rng: &mut Rng) {
        let underlay = self.addresses(rng);
        let vni = 0x01_02_03;
        let mtu = rng.pick(&[1500, 1500, 1400, 1360, 9000]);
        self.nodes.push(Node::new(self.nodes.len(), vni, underlay.clone(), mtu, rng));
        let subnets = self.subnets(rng);
        self.list.push(Member { node: self.nodes.len() - 1, underlay, subnets });
    }

    fn addresses(&mut self, rng: &mut Rng) -> Vec<IpAddr> {
        let n = self.next_address;
        self.next_address += 1;
        let v4 = IpAddr::V4(Ipv4Addr::new(10, 9, (n >> 8) as u8, n as u8));
        let v6 = IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, n));
        match rng.below(10) {
            0..6 => vec![v4],
            6..8 => vec![v6],
            8 => vec![v4, v6],
            _ => vec![v6, v4],
        }
    }

    fn subnets(&mut self, rng: &mut Rng) -> Vec<IpNet> {
        let mut one = |v6: bool| {
            let n = self.next_subnet;
            self.next_subnet += 1;
            let (hi, lo) = ((n >> 8) as u8, n as u8);
            let text = match (v6, rng.below(4)) {
                (true, 0) => format!("fd42:0:{n:x}::7/128"),
                (true, _) => format!("fd42:0:0:{n:x}::/64"),
                (false, 0) => format!("10.{}.{lo}.16/28", 80 + hi),
                (false, 1) => format!("10.{}.{lo}.9/32", 90 + hi),
                (false, _) => format!("10.{}.{lo}.0/24", 42 + hi),
            };
            text.parse().unwrap()
        };
        let mut subnets: Vec<IpNet> = vec![one(false), one(true)];
        if one(false).prefix_len() != 24 {
            subnets.push(one(false));
        }
        subnets
    }

    fn text(&self) -> String {
        let mut text = "nodes:\n".to_owned();
        for Member { node, underlay, subnets } in &self.list {
            let quoted = |items: Vec<String>| items.iter().map(|i| format!("\"{i}\"")).collect::<Vec<_>>().join(", ");
            let underlay = quoted(underlay.iter().map(ToString::to_string).collect());
            let subnets = quoted(subnets.iter().map(ToString::to_string).collect());
            text += &format!(
                "  - {{name: n{node:02}, underlay: [{underlay}], subnets: [{subnets}], mac: \"0a:58:0a:09:00:{node:02x}\"}}\n"
            );
        }
        text
    }

    fn all_learn(&mut self, accepted: bool) -> Result<(), String> {
        let text = self.text();
        self.nodes.iter_mut().try_for_each(|node| node.learn(&text, accepted))
    }

    fn learn(&mut self, rng: &mut Rng) -> Result<u64, String> {
        let (node, text) = (rng.below(self.nodes.len()), self.text());
        self.nodes[node].learn(&text, rng.per_mille(300))?;
        Ok(0)
    }

    fn change_list(&mut self, rng: &mut Rng) -> Result<u64, String> {
        let place = rng.below(self.list.len());
        match rng.below(6) {
            0 if self.nodes.len() < MOST => self.add_node(rng),
            1 | 2 if self.list.len() > 1 => _ = self.list.remove(place),
            3 => {
                let absent = (0..self.nodes.len()).find(|n| self.list.iter().all(|member| member.node != *n));
                if let Some(node) = absent {
                    let subnets = self.subnets(rng);
                    self.list.push(Member { node, underlay: self.nodes[node].underlay.clone(), subnets });
                }
            }
            4 => {
                let underlay = self.addresses(rng);
                self.nodes[self.list[place].node].underlay.clone_from(&underlay);
                self.list[place].underlay = underlay;
                // a node notices that its own address changed
                let text = self.text();
                self.nodes[self.list[place].node].learn(&text, true)?;
            }
            _ => self.list[place].subnets = self.subnets(rng),
        }
        Ok(0)
    }

    fn change_link(&mut self, rng: &mut Rng) -> Result<u64, String> {
        let n = self.nodes.len();
        let (a, b) = (rng.below(n), rng.below(n));
        let some = |rng: &mut Rng, most: usize| if rng.per_mille(400) { rng.below(most) as u32 } else { 0 };
        let link = match rng.below(4) {
            0 => CLEAN,
            1 => Link { loss: 1000, ..CLEAN },
            _ => Link {
                latency_ms: rng.next() % 20,
                jitter_ms: if rng.per_mille(400) { rng.next() % 10 } else { 0 },
                loss: some(rng, 300),
                duplication: some(rng, 300),
                corruption: some(rng, 300),
                marking: some(rng, 400),
                mtu: rng.pick(&[65_535, 65_535, 1500, 1400, 1280]),
            },
        };
        self.links[a * MOST + b] = link;
        if rng.per_mille(500) {
            self.links[b * MOST + a] = link;
        }
        Ok(0)
    }

    fn change_mtu(&mut self, rng: &mut Rng) -> Result<u64, String> {
        let node = rng.below(self.nodes.len());
        self.nodes[node].link_mtu = rng.pick(&[1500, 1400, 1360, 9000]);
        if rng.per_mille(500) {
            let text = self.text();
            self.nodes[node].learn(&text, false)?;
        }
        Ok(0)
    }

    /// Time passes, and what is due arrives.
    fn advance(&mut self, ms: u64, rng: &mut Rng) -> Result<u64, String> {
        self.now_ms += ms;
        Ok(self.deliver(true, rng)?.len() as u64)
    }

    fn deliver(&mut self, trouble: bool, rng: &mut Rng) -> Result<Vec<(usize, Vec<u8>)>, String> {
        let now = self.now_ms;
        let (mut due, later) =
            std::mem::take(&mut self.flights).into_iter().partition::<Vec<_>, _>(|f| f.arrives_ms <= now);
        self.flights = later;
        due.sort_by_key(|flight| (flight.arrives_ms, flight.number));
        let mut delivered = Vec::new();
        for index in 0..self.nodes.len() {
            let mut buffers: Vec<(u16, Buffer)> = Vec::new();
            for flight in due.iter().filter(|f| self.nodes[index].underlay.contains(&f.datagram.to.ip())) {
                let Datagram { socket, tos, bytes, .. } = &flight.datagram;
                let joins = rng.per_mille(700) && !flight.corrupt;
                match buffers.last_mut() {
                    Some((last, buffer)) if joins && last == socket && grows(buffer, flight.from, *tos, bytes) => {
                        buffer.segment_len.get_or_insert(buffer.bytes.len() as u16);
                        buffer.bytes.extend(bytes);
                    }
                    _ => {
                        // what is corrupt has a wrong outer checksum: a kernel never joins it
                        let socket = if flight.corrupt { u16::MAX } else { *socket };
                        let (from, tos, bytes) = (flight.from, *tos, bytes.clone());
                        let (segment_len, uncut) = (None, false);
                        buffers.push((socket, Buffer { from, tos, segment_len, uncut, truncated: false, bytes }));
                    }
                }
            }
            let mut rest: Vec<Buffer> = buffers.into_iter().map(|(_, buffer)| buffer).collect();
            while !rest.is_empty() {
                let batch: Vec<Buffer> = rest.drain(..rng.range(1, rest.len().min(40))).collect();
                let packets = self.nodes[index].udp_in(&batch, now, trouble, rng, &mut self.sabotage)?;
                delivered.extend(packets.into_iter().map(|packet| (index, packet)));
            }
        }
        Ok(delivered)
    }

    /// The underlay takes over what a node sent.
    fn send(&mut self, from: usize, datagrams: Vec<Datagram>, rng: &mut Rng) {
        for datagram in datagrams {
            let v6 = datagram.to.is_ipv6();
            let to = self.nodes.iter().position(|node| node.underlay.contains(&datagram.to.ip()));
            let source = self.nodes[from].underlay.iter().find(|ip| ip.is_ipv6() == v6).copied();
            let (Some(to), Some(source)) = (to, source) else { continue };
            let link = self.links[from * MOST + to];
            if rng.per_mille(link.loss) || datagram.bytes.len() + if v6 { 48 } else { 28 } > link.mtu {
                continue;
            }
            let copies = if rng.per_mille(link.duplication) { 2 } else { 1 };
            for _ in 0..copies {
                let mut datagram = datagram.clone();
                if rng.per_mille(link.marking) && (datagram.tos & 3 != 0 || rng.per_mille(200)) {
                    datagram.tos |= 3;
                }
                let corrupt = rng.per_mille(link.corruption);
                if corrupt {
                    corrupt_bytes(&mut datagram.bytes, rng);
                }
                let last = &mut self.last_arrival[from * MOST + to];
                let mut arrives_ms = self.now_ms + link.latency_ms;
                if link.jitter_ms > 0 {
                    arrives_ms += rng.next() % (link.jitter_ms + 1);
                } else {
                    arrives_ms = arrives_ms.max(*last);
                    *last = arrives_ms;
                }
                self.number += 1;
                self.flights.push(Flight { arrives_ms, number: self.number, from: source, datagram, corrupt });
            }
        }
    }

    fn push(&mut self, node: usize, frames: &[Vec<u8>], trouble: bool, rng: &mut Rng) -> Result<(), String> {
        let sent = self.nodes[node].tun_in(frames, self.now_ms, trouble, rng, &mut self.sabotage)?;
        self.send(node, sent, rng);
        Ok(())
    }

    /// Some frames of some flows to some places, good and bad ones.
    fn traffic(&mut self, rng: &mut Rng) -> Result<u64, String> {
        let node = rng.below(self.nodes.len());
        let mut frames = Vec::new();
        for _ in 0..rng.range(1, 4) {
            let peers = self.nodes[node].view.peers.len();
            let v6 = rng.per_mille(400);
            let to = match rng.below(20) {
                0 => rng
                    .pick(&["10.250.0.1", "224.0.0.5", "fd43::1", "ff02::1", "fe80::1", "255.255.255.255"])
                    .parse()
                    .unwrap(),
                _ if peers == 0 => continue,
                _ => {
                    let peer = &self.nodes[node].view.peers[rng.below(peers)];
                    let Some(ip) = host(&peer.subnets.clone(), v6, rng) else { continue };
                    ip
                }
            };
            let stranger = rng.per_mille(20);
            let from = if stranger { None } else { host(&self.nodes[node].view.subnets.clone(), to.is_ipv6(), rng) };
            let elsewhere = if to.is_ipv6() { "fd77::7" } else { "192.0.2.7" }.parse().unwrap();
            burst(&mut self.nodes[node], from.unwrap_or(elsewhere), to, rng, &mut frames);
        }
        self.push(node, &frames, true, rng)?;
        Ok(0)
    }

    /// Frames that no kernel hands over: cut off, with flipped bits, with offload headers that lie.
    fn rubbish(&mut self, rng: &mut Rng) -> Result<u64, String> {
        let node = rng.below(self.nodes.len());
        let mut frames = Vec::new();
        for _ in 0..rng.range(1, 6) {
            let peers = &self.nodes[node].view.peers;
            let to = peers.first().and_then(|peer| host(&peer.subnets.clone(), rng.per_mille(300), rng));
            let to = to.unwrap_or(IpAddr::V4(Ipv4Addr::new(10, 250, 0, 1)));
            let Some(from) = host(&self.nodes[node].view.subnets.clone(), to.is_ipv6(), rng) else { continue };
            burst(&mut self.nodes[node], from, to, rng, &mut frames);
        }
        frames.iter_mut().for_each(|frame| match rng.below(4) {
            0 => frame.truncate(rng.below(80)),
            1 => frame.iter_mut().take(10).for_each(|byte| *byte = rng.next() as u8 & 0x15),
            2 => corrupt_bytes(frame, rng),
            _ => *frame = rng.bytes(200),
        });
        self.push(node, &frames, true, rng)?;
        Ok(0)
    }

    /// Datagrams from strangers, spoofers, and kernels that left checksums and cutting to hardware that is not there.
    fn hostile(&mut self, rng: &mut Rng) -> Result<u64, String> {
        let index = rng.below(self.nodes.len());
        let view = self.nodes[index].view.clone();
        let mut buffers = Vec::new();
        for _ in 0..rng.range(1, 12) {
            let Some(peer) = (0..view.peers.len()).nth(rng.below(view.peers.len().max(1))) else { return Ok(0) };
            let v6 = rng.per_mille(400);
            let from = host(&view.peers[peer].subnets, v6, rng);
            let (Some(from), Some(to)) = (from, host(&view.subnets, v6, rng)) else { continue };
            let mut head = Head::new(from, to);
            head.tos = rng.pick(&[0, 1, 2, 3, 0xb8]);
            let payload = rng.range(1, 600);
            let mut follower = None;
            let mut tcp = TcpHead { ports: (1, 2), sequence: 7, ack: 8, flags: ACK, window: 9, options: Vec::new() };
            let mut buffer = Buffer {
                from: view.peers[peer].underlay[0],
                tos: rng.pick(&[0, 0, 0, 1, 2, 3]),
                segment_len: None,
                uncut: false,
                truncated: rng.per_mille(50),
                bytes: Vec::new(),
            };
            let mut packet = head.packet(TCP, &tcp.bytes(&rng.bytes(payload)));
            reference::finish_l4(&mut packet);
            let mut header = [8, 0, 0, 0].to_vec();
            header.extend(&view.vni.to_be_bytes()[1..]);
            header.push(0);
            header.extend(view.mac);
            header.extend(view.peers[peer].mac);
            header.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
            match rng.below(15) {
                0 => buffer.from = "192.0.2.99".parse().unwrap(),
                1 => header[0] = rng.pick(&[0, 4, 0xf7]),
                2 => header[4 + rng.below(3)] ^= 1 << rng.below(8),
                3 => header[8 + rng.below(6)] ^= 2,
                4 => header[8..14].fill(0xff),
                5 => header[20..22].copy_from_slice(&rng.pick(&[[8, 6], [0x86, 0xdd], [8, 0]])),
                6 => {
                    let stranger = if v6 { "fd66::1" } else { "10.251.0.1" }.parse().unwrap();
                    let other = view.peers.last().and_then(|p| host(&p.subnets, v6, rng)).unwrap_or(stranger);
                    head.source = rng.pick(&[stranger, other, to]);
                    packet = head.packet(TCP, &tcp.bytes(b"spoofed"));
                    reference::finish_l4(&mut packet);
                }
                7 => {
                    head.destination = if v6 { "fd66::1" } else { "224.0.0.1" }.parse().unwrap();
                    packet = head.packet(TCP, &tcp.bytes(b"elsewhere"));
                    reference::finish_l4(&mut packet);
                }
                8 => packet.extend([0; 18]),
                9 => packet.truncate(rng.below(packet.len())),
                10 => reference::unfinish_l4(&mut packet),
                11 => {
                    // a kernel VXLAN device over a virtual link: never cut
                    tcp.flags |= rng.pick(&[0, PSH, PSH | FIN]);
                    packet = head.packet(TCP, &tcp.bytes(&rng.bytes(view.mtu + rng.clone().below(8000))));
                    reference::unfinish_l4(&mut packet);
                }
                12 => {
                    let size = rng.range(200, 1300);
                    let mut single = head.packet(UDP, &reference::udp_bytes((5, 6), &rng.bytes(size)));
                    reference::finish_l4(&mut single);
                    buffers.push(Buffer {
                        bytes: [header.clone(), single].concat(),
                        truncated: false,
                        ..buffer.clone()
                    });
                    packet =
                        head.packet(UDP, &reference::udp_bytes((5, 6), &rng.bytes(view.mtu + rng.clone().below(8000))));
                    reference::unfinish_l4(&mut packet);
                    buffer.segment_len = Some(size as u16);
                    buffer.uncut = true;
                    buffer.truncated = false;
                    follower = rng.per_mille(700).then_some(size);
                }
                13 => {
                    // the stream of such a kernel: super-packets that end a write each
                    let size = view.mtu - if v6 { 60 } else { 40 };
                    for _ in 0..rng.range(1, 6) {
                        let len = size * rng.range(1, 16) + rng.pick(&[0, 0, 0, 7]);
                        tcp.flags = ACK | rng.pick(&[0, PSH, PSH]);
                        packet = head.packet(TCP, &tcp.bytes(&rng.bytes(len)));
                        reference::unfinish_l4(&mut packet);
                        let bytes = [header.clone(), packet.clone()].concat();
                        buffers.push(Buffer { bytes, truncated: false, ..buffer.clone() });
                        tcp.sequence = tcp.sequence.wrapping_add(len as u32);
                        head.id = head.id.wrapping_add(len.div_ceil(size) as u16);
                    }
                    packet = head.packet(TCP, &tcp.bytes(&rng.bytes(size)));
                    reference::unfinish_l4(&mut packet);
                }
                _ => {
                    header = rng.bytes(rng.clone().below(60));
                    packet.clear();
                }
            }
            let single = follower.map(|size| {
                let mut packet = head.packet(UDP, &reference::udp_bytes((5, 6), &rng.bytes(size)));
                reference::finish_l4(&mut packet);
                let bytes = [header.clone(), packet].concat();
                Buffer { bytes, segment_len: None, uncut: false, ..buffer.clone() }
            });
            header.extend(packet);
            buffer.bytes = header;
            buffers.push(buffer);
            buffers.extend(single);
        }
        let delivered = self.nodes[index].udp_in(&buffers, self.now_ms, true, rng, &mut self.sabotage)?;
        Ok(delivered.len() as u64)
    }

    /// All links are good, all nodes know the list, nothing is on its way any more: now each packet must arrive, once, as
    /// it was sent, in order within its flow, and only where it belongs.
    fn heals(&mut self, rng: &mut Rng) -> Result<u64, String> {
        self.links.fill(CLEAN);
        self.all_learn(true)?;
        self.now_ms += 1000;
        let mut count = self.deliver(false, rng)?.len() as u64;
        let members = self.list.clone();
        for from in &members {
            for to in &members {
                if from.node == to.node {
                    continue;
                }
                let view = &self.nodes[from.node].view;
                if !view.peers.iter().any(|peer| peer.name == self.nodes[to.node].name.to_string()) {
                    continue; // no address family in common
                }
                let mtu = self.nodes[from.node].link_mtu.min(self.nodes[to.node].link_mtu) as usize - 70;
                let (mut frames, mut sent) = (Vec::new(), Vec::<Vec<u8>>::new());
                let v6 = rng.per_mille(300);
                let (Some(a), Some(b)) = (host(&from.subnets, v6, rng), host(&to.subnets, v6, rng)) else { continue };
                burst(&mut self.nodes[from.node], a, b, rng, &mut frames);
                frames.retain(|frame| reference::unwrap(frame).is_ok_and(|all| all.iter().all(|p| p.len() <= mtu)));
                for frame in &frames {
                    sent.extend(reference::unwrap(frame)?);
                }
                self.push(from.node, &frames, false, rng)?;
                self.now_ms += 10;
                let arrived = self.deliver(false, rng)?;
                if let Some((node, _)) = arrived.iter().find(|(node, _)| *node != to.node) {
                    return Err(format!("a packet for node {} came out at node {node}", to.node));
                }
                let arrived: Vec<Vec<u8>> = arrived.into_iter().map(|(_, packet)| packet).collect();
                count += arrived.len() as u64;
                same_flows(&sent, &arrived)?;
            }
        }
        Ok(count)
    }
}

/// Exactly the same packets, each flow in the same order; ids of atomic packets have no meaning (RFC 6864 §4.1).
fn same_flows(sent: &[Vec<u8>], arrived: &[Vec<u8>]) -> Result<(), String> {
    let flows = |packets: &[Vec<u8>]| {
        let mut flows = std::collections::BTreeMap::<Vec<u8>, Vec<Vec<u8>>>::new();
        for packet in packets {
            let mut plain = packet.clone();
            if reference::look(packet).is_some_and(|l| !l.v6 && l.df && !l.fragment) {
                plain[4..6].fill(0);
                reference::finish_ip(&mut plain);
            }
            flows.entry(flow_key(packet)).or_default().push(plain);
        }
        flows
    };
    let (sent_flows, arrived_flows) = (flows(sent), flows(arrived));
    if sent_flows == arrived_flows {
        return Ok(());
    }
    let (a, b) = (sent.len(), arrived.len());
    Err(format!("{a} packets were sent, {b} came, or others: {sent_flows:02x?}\n{arrived_flows:02x?}"))
}

/// Whether a kernel would join the datagram to the buffer (`udp_gro_receive`).
fn grows(buffer: &Buffer, from: IpAddr, tos: u8, bytes: &[u8]) -> bool {
    let step = usize::from(buffer.segment_len.unwrap_or(buffer.bytes.len() as u16));
    let whole = step > 0 && buffer.bytes.len().is_multiple_of(step) && !bytes.is_empty();
    let fits = buffer.bytes.len() + bytes.len() <= 65_000 && buffer.bytes.len() / step.max(1) < 64;
    buffer.from == from && buffer.tos == tos && whole && fits && bytes.len() <= step
}

fn corrupt_bytes(bytes: &mut Vec<u8>, rng: &mut Rng) {
    match rng.below(8) {
        0 => bytes.truncate(rng.below(bytes.len() + 1)),
        1 => bytes.extend(rng.bytes(rng.clone().range(1, 40))),
        _ => {
            // headers are hit more often than their share of the bytes would have it
            let reach = if rng.per_mille(700) { bytes.len().min(90) } else { bytes.len() };
            let at = rng.below(reach);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << rng.below(8);
            }
        }
    }
}

/// An address in one of the subnets of that family.
fn host(subnets: &[IpNet], v6: bool, rng: &mut Rng) -> Option<IpAddr> {
    let of: Vec<_> = subnets.iter().filter(|net| matches!(net, IpNet::V6(_)) == v6).collect();
    match of.get(rng.below(of.len()))? {
        IpNet::V4(net) => {
            let hosts = (1u32 << (32 - net.prefix_len())).min(4);
            Some(IpAddr::V4(Ipv4Addr::from_bits(net.network().to_bits() + rng.below(hosts as usize) as u32)))
        }
        IpNet::V6(net) if net.prefix_len() < 128 => {
            Some(IpAddr::V6(Ipv6Addr::from_bits(net.network().to_bits() + rng.below(4) as u128)))
        }
        IpNet::V6(net) => Some(IpAddr::V6(net.network())),
    }
}

/// What one application sends at once.
fn burst(node: &mut Node, from: IpAddr, to: IpAddr, rng: &mut Rng, frames: &mut Vec<Vec<u8>>) {
    let mtu = node.view.mtu;
    let flow = rng.below(4);
    let ports = (40_000 + flow as u16, 5201);
    let mut head = Head::new(from, to);
    head.tos = rng.pick(&[0, 0, 0, 2, 1, 3, 0xb8, 0xba]);
    head.ttl = rng.pick(&[64, 63, 1]);
    head.id = node.ip_id;
    head.frag = if rng.per_mille(700) { 0x4000 } else { 0 };
    if rng.per_mille(60) {
        (head.options, head.extension) = if from.is_ipv6() {
            (vec![if flow < 2 { 6 } else { 17 }, 0, 1, 4, 0, 0, 0, 0], 60)
        } else {
            (vec![0x94, 4, 0, 0], 0)
        };
    }
    let extra = head.options.len() + if from.is_ipv6() { 40 } else { 20 };
    let mut tcp = TcpHead {
        ports,
        sequence: node.sequence[flow],
        ack: 77,
        flags: ACK | rng.pick(&[0, 0, 0, 0, PSH, PSH, FIN | PSH, ECE, CWR, SYN]),
        window: 512,
        options: if rng.per_mille(800) { [&[1, 1, 8, 10][..], &rng.bytes(8)].concat() } else { Vec::new() },
    };
    let mss = (mtu - extra - 20 - tcp.options.len()).min(65_000);
    let protocol = if flow < 2 { TCP } else { UDP };
    match (rng.below(10), protocol) {
        (0..4, TCP) => {
            let size = match rng.below(8) {
                0 => rng.range(1, mss),
                1 => mss + rng.range(1, 200),
                _ => mss,
            };
            let most = if rng.per_mille(30) { 64_000 } else { 5 * mss };
            let payload = rng.bytes(rng.clone().range(1, most.min(64_000)));
            node.sequence[flow] = tcp.sequence.wrapping_add(payload.len() as u32);
            node.ip_id = node.ip_id.wrapping_add(payload.len().div_ceil(size) as u16);
            let mut packet = head.packet(TCP, &tcp.bytes(&payload));
            frames.push(reference::super_frame(&mut packet, size, tcp.flags & CWR != 0));
        }
        (4..9, TCP) => {
            // segments that a kernel without offloads, or a forwarder, hands over one by one
            let count = rng.range(1, 8);
            let (size, step) = (rng.range(1, mss.min(400)), u16::from(rng.per_mille(800)));
            tcp.flags &= !(SYN | CWR);
            let last_flags = std::mem::replace(&mut tcp.flags, ACK);
            for index in 0..count {
                let last = index + 1 == count;
                let len = if last { rng.range(0, size) } else { size };
                if last {
                    tcp.flags = last_flags;
                }
                match rng.below(60) {
                    0 => tcp.sequence = tcp.sequence.wrapping_add(5),
                    1 => tcp.window += 1,
                    2 => head.tos ^= 4,
                    3 => head.ttl += 1,
                    4 => tcp.ack += 1,
                    5 => head.id = head.id.wrapping_add(9),
                    6 => head.frag ^= 0x4000,
                    7 if !tcp.options.is_empty() => tcp.options[7] ^= 1,
                    _ => {}
                }
                let mut packet = head.packet(TCP, &tcp.bytes(&rng.bytes(len)));
                reference::finish_l4(&mut packet);
                frames.push(if rng.per_mille(300) {
                    reference::unfinished_frame(&mut packet)
                } else {
                    reference::plain_frame(&packet)
                });
                tcp.sequence = tcp.sequence.wrapping_add(len as u32);
                head.id = head.id.wrapping_add(step);
            }
            (node.sequence[flow], node.ip_id) = (tcp.sequence, head.id.wrapping_add(1));
        }
        (0..3, UDP) => {
            let size = rng.range(1, mtu - extra - 8);
            let payload = rng.bytes(rng.clone().range(1, (6 * size).min(60_000)));
            node.ip_id = node.ip_id.wrapping_add(payload.len().div_ceil(size) as u16);
            let mut packet = head.packet(UDP, &reference::udp_bytes(ports, &payload));
            frames.push(reference::super_frame(&mut packet, size, false));
        }
        (3..8, UDP) => {
            let size = rng.range(1, 300);
            for _ in 0..rng.range(1, 10) {
                let len = if rng.per_mille(800) { size } else { rng.range(0, size) };
                let mut packet = head.packet(UDP, &reference::udp_bytes(ports, &rng.bytes(len)));
                reference::finish_l4(&mut packet);
                if !from.is_ipv6() && rng.per_mille(50) {
                    let at = reference::look(&packet).map_or(0, |look| look.l4) + 6;
                    packet[at..at + 2].fill(0);
                }
                frames.push(reference::plain_frame(&packet));
                head.id = head.id.wrapping_add(1);
            }
            node.ip_id = head.id;
        }
        (8, _) => {
            // fragments, and what must be fragmented or answered
            if rng.per_mille(500) && !from.is_ipv6() {
                head.options.clear();
                let mut packet =
                    head.packet(UDP, &reference::udp_bytes(ports, &rng.bytes(mtu + rng.clone().below(2000))));
                reference::finish_l4(&mut packet);
                frames.push(reference::plain_frame(&packet));
            } else if from.is_ipv6() {
                (head.options, head.extension) = (vec![17, 0, 0, rng.pick(&[1, 8]), 0, 0, 0, 9], 44);
                frames.push(reference::plain_frame(&head.packet(UDP, &rng.bytes(100))));
            } else {
                head.frag = rng.pick(&[0x2000, 0x2010, 0x0010]);
                head.options.clear();
                frames.push(reference::plain_frame(
                    &head.packet(UDP, &rng.bytes(if rng.clone().per_mille(200) { mtu } else { 64 })),
                ));
            }
        }
        _ => {
            let mut echo = vec![8, 0, 0, 0, 0, 1, 0, flow as u8];
            echo.extend(rng.bytes(if rng.clone().per_mille(100) { mtu } else { 56 }));
            if from.is_ipv6() {
                echo[0] = 128;
                let mut packet = head.packet(58, &echo);
                let look = reference::look(&packet).expect("a packet of ours");
                let check = !reference::l4_sum(&packet, &look);
                packet[look.l4 + 2..look.l4 + 4].copy_from_slice(&check.to_be_bytes());
                frames.push(reference::plain_frame(&packet));
            } else {
                let check = !reference::sum(&[&echo]);
                echo[2..4].copy_from_slice(&check.to_be_bytes());
                frames.push(reference::plain_frame(&head.packet(1, &echo)));
            }
        }
    }
}
