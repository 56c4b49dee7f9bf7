//! What `meshctl top` shows: samples and keys in, rows out.
//!
//! Owns rates, order, filter and place. Knows no terminal, no clock and no socket.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyModifiers};

use crate::admin::protocol::{PeerState, PeerView, StatsView, TrafficView};
use crate::admin::units;

/// So many rates of each peer are kept for its trend.
pub const TREND: usize = 12;

/// What meshd said at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// `stats`.
    pub stats: StatsView,
    /// `peers`.
    pub peers: Vec<PeerView>,
    /// When, since some beginning.
    pub at: Duration,
}

/// What peers are ordered by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sort {
    /// The name.
    #[default]
    Name,
    /// Bits received a second.
    Rx,
    /// Bits sent a second.
    Tx,
    /// The round trip.
    Rtt,
    /// Lost probes.
    Loss,
}

/// A second's worth of traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Packets received.
    pub rx_packets: f64,
    /// Bits received.
    pub rx_bits: f64,
    /// Packets sent.
    pub tx_packets: f64,
    /// Bits sent.
    pub tx_bits: f64,
}

/// A peer's line.
#[derive(Debug, Clone, PartialEq)]
pub struct Row<'a> {
    /// What meshd says of it.
    pub peer: &'a PeerView,
    /// `None`: not known yet, or not any more.
    pub rates: Option<Rates>,
    /// Bits a second, both ways, the latest last.
    pub trend: Vec<u64>,
}

/// A reason for drops.
#[derive(Debug, Clone, PartialEq)]
pub struct Dropped<'a> {
    /// Its name.
    pub reason: &'a str,
    /// Packets since meshd started.
    pub total: u64,
    /// Packets a second.
    pub rate: Option<f64>,
}

/// Peers by what liveness says of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// They answer.
    pub up: usize,
    /// They stopped answering.
    pub down: usize,
    /// Nobody asks them, or they do not speak BFD.
    pub unknown: usize,
}

/// Everything that is shown.
#[derive(Debug, Default)]
pub struct State {
    now: Option<Sample>,
    before: Option<Sample>,
    trends: HashMap<String, VecDeque<u64>>,
    away: Option<String>,
    sort: Sort,
    reversed: bool,
    filter: String,
    typing: bool,
    paused: bool,
    help: bool,
    first: usize,
    /// Lines that peers had when they were drawn last.
    page: usize,
}

impl State {
    /// Takes a sample, unless nothing is to move.
    pub fn take(&mut self, sample: Sample) {
        self.away = None;
        if self.paused {
            return;
        }
        // counters of a meshd that was restarted began anew
        let goes_on = |old: &Sample| old.stats.uptime_ms <= sample.stats.uptime_ms && old.at < sample.at;
        self.before = self.now.take().filter(goes_on);
        if self.before.is_none() {
            self.trends.clear();
        }
        self.now = Some(sample);
        self.remember();
    }

    /// meshd does not answer; `why` says that to a person.
    pub fn away(&mut self, why: String) {
        self.away = Some(why);
    }

    /// Takes a key. Returns whether it is over.
    pub fn press(&mut self, key: KeyCode, with: KeyModifiers) -> bool {
        if with.contains(KeyModifiers::CONTROL) {
            return matches!(key, KeyCode::Char('c'));
        }
        if self.typing {
            self.typed(key);
            return false;
        }
        if std::mem::take(&mut self.help) {
            return key == KeyCode::Char('q');
        }
        match key {
            KeyCode::Char('q') => return true,
            KeyCode::Char('n') => self.sort_by(Sort::Name),
            KeyCode::Char('r') => self.sort_by(Sort::Rx),
            KeyCode::Char('t') => self.sort_by(Sort::Tx),
            KeyCode::Char('d') => self.sort_by(Sort::Rtt),
            KeyCode::Char('l') => self.sort_by(Sort::Loss),
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('?' | 'h') => self.help = true,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('j') | KeyCode::Down => self.first = self.first.saturating_add(1),
            KeyCode::Char('k') | KeyCode::Up => self.first = self.first.saturating_sub(1),
            KeyCode::PageDown => self.first = self.first.saturating_add(self.page.max(1)),
            KeyCode::PageUp => self.first = self.first.saturating_sub(self.page.max(1)),
            KeyCode::Char('g') | KeyCode::Home => self.first = 0,
            KeyCode::Char('G') | KeyCode::End => self.first = usize::MAX,
            _ => {}
        }
        false
    }

    fn typed(&mut self, key: KeyCode) {
        match key {
            KeyCode::Char(c) => self.filter.push(c),
            KeyCode::Backspace => _ = self.filter.pop(),
            KeyCode::Esc => (self.filter, self.typing) = (String::new(), false),
            KeyCode::Enter => self.typing = false,
            _ => {}
        }
        self.first = 0;
    }

    /// The same key again turns the order round.
    fn sort_by(&mut self, sort: Sort) {
        self.reversed = self.sort == sort && !self.reversed;
        (self.sort, self.first) = (sort, 0);
    }

    /// The engine, once meshd has answered.
    pub fn stats(&self) -> Option<&StatsView> {
        self.now.as_ref().map(|now| &now.stats)
    }

    /// Why meshd does not answer, where it does not.
    pub fn is_away(&self) -> Option<&str> {
        self.away.as_deref()
    }

    /// Whether nothing moves because a person wants that.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether the keys are to be explained.
    pub fn wants_help(&self) -> bool {
        self.help
    }

    /// What peers are ordered by, and whether the other way round.
    pub fn order(&self) -> (Sort, bool) {
        (self.sort, self.reversed)
    }

    /// The filter, and whether it is being typed.
    pub fn filter(&self) -> (&str, bool) {
        (&self.filter, self.typing)
    }

    /// How many peers there are, by state.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for peer in self.peers() {
            match peer.state {
                PeerState::Up => census.up += 1,
                PeerState::Down => census.down += 1,
                PeerState::Unknown => census.unknown += 1,
            }
        }
        census
    }

    /// What goes through the TUN device and through the UDP sockets.
    pub fn engine(&self) -> Option<[(&'static str, TrafficView, Option<Rates>); 2]> {
        let now = self.now.as_ref()?;
        let old = self.recent();
        let rate = |side: fn(&StatsView) -> TrafficView| {
            old.and_then(|old| rates(side(&old.stats), side(&now.stats), now.at - old.at))
        };
        Some([("tun", now.stats.tun, rate(|stats| stats.tun)), ("udp", now.stats.udp, rate(|stats| stats.udp))])
    }

    /// Why packets were dropped: what happens now first, then what happened most.
    pub fn drops(&self) -> Vec<Dropped<'_>> {
        let Some(now) = &self.now else { return Vec::new() };
        let old = self.recent();
        let mut drops: Vec<Dropped<'_>> = now
            .stats
            .drops
            .iter()
            .filter(|(_, total)| **total > 0)
            .map(|(reason, total)| {
                let before = |old: &Sample| old.stats.drops.get(reason).copied().unwrap_or(0);
                let rate = old.and_then(|old| units::rate(before(old), *total, now.at - old.at));
                Dropped { reason, total: *total, rate }
            })
            .collect();
        let key = |drop: &Dropped<'_>| (drop.rate.unwrap_or(0.0), drop.total);
        drops.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap_or(Ordering::Equal));
        drops
    }

    /// The peers that the filter lets through, in order.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let old: HashMap<&str, &PeerView> =
            self.recent().into_iter().flat_map(|old| &old.peers).map(|peer| (peer.name.as_str(), peer)).collect();
        let passed = self.recent().zip(self.now.as_ref()).map(|(old, now)| now.at - old.at);
        let wanted = self.filter.to_lowercase();
        let mut rows: Vec<Row<'_>> = self
            .peers()
            .iter()
            .filter(|peer| fits(peer, &wanted))
            .map(|peer| {
                let before = old.get(peer.name.as_str()).map(|old| traffic(old));
                let rates = before.zip(passed).and_then(|(before, passed)| rates(before, traffic(peer), passed));
                let trend = self.trends.get(&peer.name).map(|trend| trend.iter().copied().collect());
                Row { peer, rates, trend: trend.unwrap_or_default() }
            })
            .collect();
        rows.sort_by(|a, b| self.compare(a, b));
        rows
    }

    /// The first row that is shown, of `rows` on `page` lines; what keys asked for beyond the end is brought back.
    pub fn scrolled(&mut self, rows: usize, page: usize) -> usize {
        self.page = page;
        self.first = self.first.min(rows.saturating_sub(page));
        self.first
    }

    /// Names go up, numbers down; who has no number comes last either way.
    fn compare(&self, a: &Row<'_>, b: &Row<'_>) -> Ordering {
        let number = |row: &Row<'_>| match self.sort {
            Sort::Name => None,
            Sort::Rx => row.rates.map(|rates| rates.rx_bits),
            Sort::Tx => row.rates.map(|rates| rates.tx_bits),
            Sort::Rtt => row.peer.rtt_us.map(|us| us as f64),
            Sort::Loss => row.peer.loss_permille.map(f64::from),
        };
        let names = a.peer.name.cmp(&b.peer.name);
        match (number(a), number(b)) {
            (Some(x), Some(y)) => {
                let down = y.total_cmp(&x);
                if self.reversed { down.reverse() } else { down }.then(names)
            }
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) if self.sort == Sort::Name && self.reversed => names.reverse(),
            (None, None) => names,
        }
    }

    fn peers(&self) -> &[PeerView] {
        self.now.as_ref().map_or(&[], |now| &now.peers)
    }

    /// The sample before the last, while the two say what goes on now.
    fn recent(&self) -> Option<&Sample> {
        self.before.as_ref().filter(|_| self.away.is_none())
    }

    fn remember(&mut self) {
        let (Some(now), Some(old)) = (&self.now, &self.before) else { return };
        let passed = now.at - old.at;
        let old: HashMap<&str, TrafficView> =
            old.peers.iter().map(|peer| (peer.name.as_str(), traffic(peer))).collect();
        let mut trends = HashMap::with_capacity(now.peers.len());
        for peer in &now.peers {
            let mut trend = self.trends.remove(&peer.name).unwrap_or_default();
            let rates = old.get(peer.name.as_str()).and_then(|old| rates(*old, traffic(peer), passed));
            trend.push_back(rates.map_or(0, |rates| (rates.rx_bits + rates.tx_bits) as u64));
            while trend.len() > TREND {
                trend.pop_front();
            }
            trends.insert(peer.name.clone(), trend);
        }
        self.trends = trends;
    }
}

/// The filter is part of the name, the endpoint, a prefix or the state.
fn fits(peer: &PeerView, wanted: &str) -> bool {
    let state = match peer.state {
        PeerState::Up => "up",
        PeerState::Down => "down",
        PeerState::Unknown => "unknown",
    };
    wanted.is_empty()
        || state == wanted
        || peer.name.to_lowercase().contains(wanted)
        || peer.endpoint.to_string().contains(wanted)
        || peer.subnets.iter().any(|subnet| subnet.to_string().contains(wanted))
}

fn traffic(peer: &PeerView) -> TrafficView {
    let PeerView { rx_packets, rx_bytes, tx_packets, tx_bytes, .. } = *peer;
    TrafficView { rx_packets, rx_bytes, tx_packets, tx_bytes }
}

fn rates(old: TrafficView, now: TrafficView, passed: Duration) -> Option<Rates> {
    Some(Rates {
        rx_packets: units::rate(old.rx_packets, now.rx_packets, passed)?,
        rx_bits: units::rate(old.rx_bytes, now.rx_bytes, passed)? * 8.0,
        tx_packets: units::rate(old.tx_packets, now.tx_packets, passed)?,
        tx_bits: units::rate(old.tx_bytes, now.tx_bytes, passed)? * 8.0,
    })
}

#[cfg(test)]
pub(super) mod tests;
