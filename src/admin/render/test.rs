//! `meshctl test`: what nodes say of each other, and what became of echoes.

use std::fmt::Write;
use std::net::IpAddr;

use serde::Serialize;

use super::{Grid, Look, Paint, clean, dash, encryption};
use crate::admin::protocol::{PairView, PeerState, SurveyView, TargetView};
use crate::admin::units;
use crate::probe::Row;

/// Pairs that are shown one by one; of more only those that are not up.
const SHOWN: usize = 100;

/// Echoes to one address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Echoes {
    /// To whom.
    pub node: String,
    /// At which address.
    pub address: IpAddr,
    /// Whether all came back.
    pub good: bool,
    /// By size.
    pub sizes: Vec<Row>,
}

impl Echoes {
    /// To that target.
    pub fn new(target: &TargetView, sizes: Vec<Row>) -> Self {
        let good = sizes.iter().all(|row| row.received == row.sent);
        Echoes { node: target.node.clone(), address: target.address, good, sizes }
    }
}

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// This node.
    pub node: String,
    /// No echo was lost, and nobody holds a node for dead.
    pub good: bool,
    /// What each node that answered thinks of each other.
    pub pairs: Vec<PairView>,
    /// Nodes that did not say.
    pub silent: Vec<String>,
    /// Echoes from this node.
    pub echoes: Vec<Echoes>,
}

impl Report {
    /// Judges.
    pub fn new(survey: SurveyView, echoes: Vec<Echoes>) -> Self {
        let SurveyView { node, pairs, silent, targets: _ } = survey;
        let down = pairs.iter().any(|pair| pair.state == PeerState::Down);
        let good = !down && echoes.iter().all(|echoes| echoes.good);
        Report { node, good, pairs, silent, echoes }
    }
}

/// For people.
pub fn test(report: &Report, look: Look) -> String {
    if report.pairs.is_empty() {
        return "No peers: there is nothing to test.\n".to_owned();
    }
    let mut grid = Grid::new(&["FROM", "TO", "STATE", "ENCRYPTION", ">MTU", ">RTT"]);
    let few = report.pairs.len() <= SHOWN;
    for pair in report.pairs.iter().filter(|pair| few || pair.state != PeerState::Up) {
        let (state, paint) = match pair.state {
            PeerState::Up => ("up", Paint::Good),
            PeerState::Down => ("down", Paint::Bad),
            PeerState::Unknown => ("unknown", Paint::Plain),
        };
        let rtt = pair.rtt_us.map_or(dash(), units::round_trip);
        let how = encryption(pair.encryption).to_owned();
        let cells = [pair.from.clone(), pair.to.clone(), state.to_owned(), how, pair.path_mtu.to_string(), rtt];
        grid.row(paint, cells.to_vec());
    }
    let mut out = grid.draw(look);
    if !few {
        let up = report.pairs.iter().filter(|pair| pair.state == PeerState::Up).count();
        let _ = writeln!(out, "{up} of {} pairs are up; those are not shown.", report.pairs.len());
    }
    let mut grid = Grid::new(&["ECHOES TO", "ADDRESS", ">PAYLOADS", ">SENT", ">LOST", ">AVG", ">MAX"]);
    for echoes in &report.echoes {
        let sum = |field: fn(&Row) -> u32| echoes.sizes.iter().map(field).sum::<u32>();
        let (sent, received) = (sum(|row| row.sent), sum(|row| row.received));
        let sizes: Vec<String> = echoes.sizes.iter().map(|row| row.payload.to_string()).collect();
        let times: Vec<u64> = echoes.sizes.iter().filter_map(|row| row.avg_us).collect();
        let average = times.iter().sum::<u64>().checked_div(times.len() as u64);
        let slowest = echoes.sizes.iter().filter_map(|row| row.max_us).max();
        let time = |us: Option<u64>| us.map_or(dash(), units::round_trip);
        let cells = vec![
            echoes.node.clone(),
            echoes.address.to_string(),
            sizes.join(" "),
            sent.to_string(),
            (sent - received).to_string(),
            time(average),
            time(slowest),
        ];
        grid.row(if echoes.good { Paint::Plain } else { Paint::Bad }, cells);
    }
    let _ = write!(out, "\n{}", grid.draw(look));
    if !report.silent.is_empty() {
        let names: Vec<String> = report.silent.iter().map(|name| clean(name)).collect();
        let _ = writeln!(
            out,
            "\nNothing is known of what {} think{} of others: down, without BFD, or no meshd.",
            names.join(", "),
            if names.len() == 1 { "s" } else { "" }
        );
    }
    let (word, paint) = if report.good { ("good", Paint::Good) } else { ("BAD", Paint::Bad) };
    let lost: Vec<&str> = report.echoes.iter().filter(|echoes| !echoes.good).map(|e| e.node.as_str()).collect();
    let more = match lost.first() {
        Some(node) => format!(": `meshctl why {}` says what is known", clean(node)),
        None => String::new(),
    };
    let _ = writeln!(out, "\n{}{more}", paint.on(word, look));
    out
}
