//! Answers as text for people: aligned tables, and a sentence that says what to do when something is wrong.
//!
//! Pure: views in, text out. It knows neither the socket nor the terminal; whether there is colour, and what the last
//! sample of a watch was, it is told.

pub mod cluster;
pub mod doctor;
pub mod matrix;
pub mod test;
pub mod why;

use std::fmt::Write;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};

use super::protocol::{
    Encryption, JourneyView, NodeRole, NodeState, NodeView, PeerState, PeerView, Role, SessionView, StatsView,
    StatusView, TrafficView,
};
use super::reasons::explain;
use super::units;

/// How to draw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Look {
    /// With ANSI colours.
    pub colour: bool,
    /// Also what is zero.
    pub all: bool,
}

/// The sample before this one, and how long ago it was taken: what rates are computed from.
#[derive(Debug)]
pub struct Before<'a, T: ?Sized> {
    /// That sample.
    pub sample: &'a T,
    /// Between the two.
    pub passed: Duration,
}

// Derived, these would ask that the sample itself be copyable.
impl<T: ?Sized> Clone for Before<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: ?Sized> Copy for Before<'_, T> {}

/// `meshctl peers`.
pub fn peers(peers: &[PeerView], before: Option<Before<'_, [PeerView]>>, look: Look) -> String {
    if peers.is_empty() {
        return "No peers: join other nodes to the cluster, or add the other nodes to `nodes-file`; meshd notices by itself.\n"
            .to_owned();
    }
    let mut grid = Grid::new(&["NAME", "STATE", "ENDPOINT", "SUBNETS", "ENCRYPTION", "SEEN", ">RTT", ">LOSS", ">MTU"]);
    grid.headers(&[">TX PACKETS", ">TX", ">RX PACKETS", ">RX"]);
    if before.is_some() {
        grid.headers(&[">TX PPS", ">TX RATE", ">RX PPS", ">RX RATE"]);
    }
    for peer in peers {
        let (state, paint) = match peer.state {
            PeerState::Up => ("up", Paint::Good),
            PeerState::Down => ("down", Paint::Bad),
            PeerState::Unknown => ("unknown", Paint::Plain),
        };
        let mut cells = vec![
            peer.name.clone(),
            state.to_owned(),
            peer.endpoint.to_string(),
            shortened(&peer.subnets),
            session(peer),
            peer.last_seen_ms.map_or(dash(), |ms| units::span(ms) + " ago"),
            peer.rtt_us.map_or(dash(), units::round_trip),
            peer.loss_permille.map_or(dash(), units::permille),
            peer.path_mtu.to_string(),
            units::count(peer.tx_packets),
            units::bytes(peer.tx_bytes),
            units::count(peer.rx_packets),
            units::bytes(peer.rx_bytes),
        ];
        if let Some(before) = before {
            let old = before.sample.iter().find(|old| old.name == peer.name);
            cells.extend(rates(old.map(peer_traffic), peer_traffic(peer), before.passed));
        }
        grid.row(paint, cells);
    }
    let mut out = grid.draw(look);
    let down = peers.iter().filter(|p| p.state == PeerState::Down).count();
    if down > 0 {
        let _ = writeln!(
            out,
            "\n{down} of {} peers down: check that those nodes run, and that UDP to their endpoint passes each firewall.",
            peers.len()
        );
    }
    out
}

/// `meshctl stats`.
pub fn stats(stats: &StatsView, before: Option<Before<'_, StatsView>>, look: Look) -> String {
    // A counter that starts anew with a restarted meshd would give nonsense.
    let before = before.filter(|b| b.sample.uptime_ms <= stats.uptime_ms);
    let mut out = format!(
        "{}  meshd {}, up {}, io {}, {} worker{}\n\n",
        Paint::Bold.on(&clean(&stats.node), look),
        clean(&stats.version),
        units::span(stats.uptime_ms),
        clean(&stats.io),
        stats.workers,
        if stats.workers == 1 { "" } else { "s" },
    );
    out += &traffic(stats, before, look);
    out.push('\n');
    out += &journeys(stats, look);
    out.push('\n');
    out += &batches(stats, look);
    if stats.partial_csum_in > 0 || look.all {
        let _ = writeln!(
            out,
            "\nUnfinished checksums from kernel VXLAN devices, handed on to be finished: {}",
            units::count(stats.partial_csum_in)
        );
    }
    if stats.pairs_moved > 0 || look.all {
        let moved = units::count(stats.pairs_moved);
        let _ = writeln!(out, "\nQueues handed from one thread to another: {moved}");
    }
    out.push('\n');
    out += &offloads(stats, look);
    out.push('\n');
    out += &drops(stats, before, look);
    out
}

/// `meshctl status`.
pub fn status(status: &StatusView, look: Look) -> String {
    let addresses: Vec<_> = status.overlay_addresses.iter().map(ToString::to_string).collect();
    let addresses = if addresses.is_empty() { "no address".to_owned() } else { addresses.join(", ") };
    let ready = if status.ready { Paint::Good.on("yes", look) } else { Paint::Bad.on("NO", look) };
    let role = match status.role {
        Role::Run => "run",
        Role::Server => "server",
        Role::Agent => "agent",
    };
    let mut out = String::new();
    let _ = writeln!(out, "ready    {ready}");
    let _ = writeln!(out, "node     {}, role {role}, meshd {}", clean(&status.node), clean(&status.version));
    let _ = writeln!(out, "overlay  {addresses} on {}, MTU {}", clean(&status.tun), status.mtu);
    let _ = writeln!(
        out,
        "vtep     MAC {}, VNI {}, UDP port {}, io {}",
        clean(&status.vtep_mac),
        status.vni,
        status.port,
        clean(&status.io)
    );
    match &status.public_key {
        Some(key) => out += &format!("key      {}\n", clean(key)),
        // the key of a member comes with membership
        None if status.membership.as_ref().is_some_and(|membership| !membership.joined) => {}
        None => out += "key      none: traffic is not encrypted\n",
    }
    match status.peers {
        0 if status.membership.is_some() => out += "peers    none: no other node is a member so far\n",
        0 => out += "peers    none: add the other nodes to `nodes-file`\n",
        n => out += &format!("peers    {n} (see `meshctl peers`)\n"),
    }
    if let Some(membership) = &status.membership {
        let state = match (membership.joined, membership.connected) {
            (false, _) => "not a member yet".to_owned(),
            (true, true) => format!("member, server {}", clean(membership.server.as_deref().unwrap_or("connected"))),
            (true, false) => "member, no server answers".to_owned(),
        };
        let revision = membership.revision.map(|n| format!(", node list {n}")).unwrap_or_default();
        let _ = writeln!(out, "cluster  {state}{revision}");
    }
    if !status.capabilities.is_empty() {
        let _ = writeln!(out, "rights   {}", clean(&status.capabilities.join(", ")));
    }
    for reason in &status.reasons {
        let word = if status.ready { Paint::Warn.on("note", look) } else { Paint::Bad.on("not ready", look) };
        let _ = writeln!(out, "{word}: {}", clean(reason));
    }
    if !status.ready {
        out.push_str("What to do: mend what is named above; meshd's log says more (`journalctl -u meshd`).\n");
    }
    out
}

/// `meshctl nodes`.
pub fn nodes(nodes: &[NodeView], look: Look) -> String {
    if nodes.is_empty() {
        return "There are no nodes yet: `meshctl status` says what this one waits for.\n".to_owned();
    }
    let mut grid = Grid::new(&["NAME", "ROLE", "STATE", "UNDERLAY", "SUBNETS", "LABELS", "TAINTS", "JOINED"]);
    for node in nodes {
        let role = match node.role {
            NodeRole::Server => "server",
            NodeRole::Agent => "agent",
            NodeRole::Foreign => "foreign",
        };
        let (state, paint) = match node.state {
            NodeState::Ready => ("ready", Paint::Plain),
            NodeState::NotReady => ("not-ready", Paint::Bad),
            NodeState::Draining => ("draining", Paint::Warn),
            NodeState::Left => ("left", Paint::Warn),
        };
        let labels: Vec<_> = node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        grid.row(
            paint,
            vec![
                node.name.clone(),
                role.to_owned(),
                state.to_owned(),
                shortened(&node.underlay),
                shortened(&node.subnets),
                shortened(&labels),
                shortened(&node.taints),
                node.joined_at.clone().unwrap_or_else(dash),
            ],
        );
    }
    grid.draw(look)
}

fn traffic(stats: &StatsView, before: Option<Before<'_, StatsView>>, look: Look) -> String {
    let mut grid = Grid::new(&["SIDE", ">RX PACKETS", ">RX", ">TX PACKETS", ">TX"]);
    if before.is_some() {
        grid.headers(&[">RX PPS", ">RX RATE", ">TX PPS", ">TX RATE"]);
    }
    for (name, now, old) in
        [("tun", stats.tun, before.map(|b| b.sample.tun)), ("udp", stats.udp, before.map(|b| b.sample.udp))]
    {
        let mut cells = vec![
            name.to_owned(),
            units::count(now.rx_packets),
            units::bytes(now.rx_bytes),
            units::count(now.tx_packets),
            units::bytes(now.tx_bytes),
        ];
        if let Some(before) = before {
            let [tx_packets, tx_bits, rx_packets, rx_bits] = rates(old, now, before.passed);
            cells.extend([rx_packets, rx_bits, tx_packets, tx_bits]);
        }
        grid.row(Paint::Plain, cells);
    }
    grid.draw(look)
}

fn journeys(stats: &StatsView, look: Look) -> String {
    let mut grid = Grid::new(&["JOURNEY", ">IN", ">ORIGINATED", ">OUT", ">CONSUMED", ">DROPPED"]);
    let mut add = |name: &str, journey: &JourneyView| {
        let numbers = [journey.entered, journey.originated, journey.out, journey.consumed, journey.dropped];
        grid.row(Paint::Plain, std::iter::once(name.to_owned()).chain(numbers.map(units::count)).collect());
    };
    add("tun to udp", &stats.outbound);
    add("udp to tun", &stats.inbound);
    grid.draw(look)
}

fn batches(stats: &StatsView, look: Look) -> String {
    let mut grid = Grid::new(&["BATCHES", ">CALLS", ">PACKETS", ">A CALL"]);
    let mut add = |name: &str, calls: u64, packets: u64| {
        let each = if calls == 0 { dash() } else { format!("{:.1}", packets as f64 / calls as f64) };
        grid.row(Paint::Plain, vec![name.to_owned(), units::count(calls), units::count(packets), each]);
    };
    let b = &stats.batches;
    add("tun read", b.tun_reads, b.tun_read_packets);
    add("udp send", b.udp_send_calls, b.udp_send_datagrams);
    add("udp receive", b.udp_recv_calls, b.udp_recv_datagrams);
    add("tun write", b.tun_writes, b.tun_write_segments);
    grid.draw(look)
}

fn offloads(stats: &StatsView, look: Look) -> String {
    let mut grid = Grid::new(&["OFFLOAD", "STATE", "WHY"]);
    let o = stats.offloads;
    for (name, on) in [("tun_tso", o.tun_tso), ("tun_uso", o.tun_uso), ("udp_gso", o.udp_gso), ("udp_gro", o.udp_gro)] {
        let why = stats.offload_reasons.get(name).cloned().unwrap_or_default();
        let (state, paint) = if on { ("on", Paint::Plain) } else { ("off", Paint::Warn) };
        grid.row(paint, vec![name.to_owned(), state.to_owned(), why]);
    }
    // most network cards, or older kernels, cannot do that: nothing to be warned of
    for (name, used) in [("tunnel_gso", &stats.tunnel_gso), ("big_tcp", &stats.big_tcp)] {
        let state = if used.on { "on" } else { "off" };
        grid.row(Paint::Plain, vec![name.to_owned(), state.to_owned(), used.why.clone()]);
    }
    grid.draw(look)
}

fn drops(stats: &StatsView, before: Option<Before<'_, StatsView>>, look: Look) -> String {
    if !look.all && stats.drops.values().all(|n| *n == 0) {
        return "No drops.\n".to_owned();
    }
    let mut grid = Grid::new(&["DROPS", ">PACKETS"]);
    if before.is_some() {
        grid.headers(&[">PPS"]);
    }
    grid.headers(&["MEANING AND USUAL FIX"]);
    for (reason, n) in stats.drops.iter().filter(|(_, n)| look.all || **n > 0) {
        let mut cells = vec![reason.clone(), units::count(*n)];
        if let Some(before) = before {
            let old = before.sample.drops.get(reason).copied().unwrap_or(0);
            cells.push(units::rate(old, *n, before.passed).map_or(dash(), units::packet_rate));
        }
        cells.push(explain(reason).unwrap_or_default().to_owned());
        grid.row(if *n > 0 { Paint::Warn } else { Paint::Plain }, cells);
    }
    grid.draw(look)
}

fn peer_traffic(peer: &PeerView) -> TrafficView {
    TrafficView {
        rx_packets: peer.rx_packets,
        rx_bytes: peer.rx_bytes,
        tx_packets: peer.tx_packets,
        tx_bytes: peer.tx_bytes,
    }
}

/// Packets and bits a second: sent, then received.
fn rates(old: Option<TrafficView>, now: TrafficView, passed: Duration) -> [String; 4] {
    let packets = |field: fn(&TrafficView) -> u64| {
        old.and_then(|old| units::rate(field(&old), field(&now), passed)).map_or(dash(), units::packet_rate)
    };
    let bits = |field: fn(&TrafficView) -> u64| {
        old.and_then(|old| units::rate(field(&old), field(&now), passed)).map_or(dash(), |r| units::bit_rate(r * 8.0))
    };
    [packets(|t| t.tx_packets), bits(|t| t.tx_bytes), packets(|t| t.rx_packets), bits(|t| t.rx_bytes)]
}

/// How a peer is encrypted, and since when its session has its present keys.
fn session(peer: &PeerView) -> String {
    let word = encryption(peer.encryption);
    match peer.session {
        Some(SessionView { handshake_age_ms: Some(age), .. }) => format!("{word}, {}", units::span(age)),
        Some(_) => format!("{word}, no session"),
        None => word.to_owned(),
    }
}

fn encryption(encryption: Encryption) -> &'static str {
    match encryption {
        Encryption::None => "none",
        Encryption::Wireguard => "wireguard",
    }
}

fn dash() -> String {
    "-".to_owned()
}

/// The first three; a table's line has to end somewhere, and `--json` has them all.
fn shortened<T: ToString>(list: &[T]) -> String {
    let mut shown: Vec<String> = list.iter().take(3).map(ToString::to_string).collect();
    if list.len() > shown.len() {
        shown.push(format!("+{}", list.len() - shown.len()));
    }
    if shown.is_empty() { dash() } else { shown.join(", ") }
}

/// What a terminal could mistake for a command becomes visible instead.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Paint {
    Plain,
    Bold,
    Good,
    Warn,
    Bad,
}

impl Paint {
    fn on(self, text: &str, look: Look) -> String {
        let code = match self {
            Paint::Plain => return text.to_owned(),
            Paint::Bold => "1",
            Paint::Good => "32",
            Paint::Warn => "33",
            Paint::Bad => "31",
        };
        if look.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A table without lines, whose rows are painted whole: colour inside a cell would count as its width.
struct Grid {
    headers: Vec<&'static str>,
    rows: Vec<(Paint, Vec<String>)>,
}

impl Grid {
    /// Columns; a leading `>` aligns to the right.
    fn new(headers: &[&'static str]) -> Self {
        Grid { headers: headers.to_vec(), rows: Vec::new() }
    }

    fn headers(&mut self, more: &[&'static str]) {
        self.headers.extend_from_slice(more);
    }

    fn row(&mut self, paint: Paint, cells: Vec<String>) {
        self.rows.push((paint, cells.iter().map(|cell| clean(cell)).collect()));
    }

    fn draw(self, look: Look) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(self.headers.iter().map(|h| h.trim_start_matches('>')));
        let (paints, rows): (Vec<_>, Vec<_>) = self.rows.into_iter().unzip();
        table.add_rows(rows);
        for (column, header) in table.column_iter_mut().zip(&self.headers) {
            column.set_padding((0, 2));
            if header.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let paints = std::iter::once(Paint::Bold).chain(paints);
        table.lines().zip(paints).map(|(line, paint)| paint.on(line.trim_end(), look) + "\n").collect()
    }
}

#[cfg(test)]
mod tests;
