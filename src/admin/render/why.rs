//! `meshctl why` for people: the verdict, then the way step by step.

use std::fmt::Write;
use std::net::SocketAddr;

use super::{Grid, Look, Paint, clean, session};
use crate::admin::protocol::why::{OuterView, WhyView};
use crate::admin::units;
use crate::probe::Row;

/// `meshctl why`.
pub fn why(view: &WhyView, look: Look) -> String {
    let (word, paint) = if view.good { ("good", Paint::Good) } else { ("BAD", Paint::Bad) };
    let mut out = format!("{}: {}\n", paint.on(word, look), clean(&view.verdict));
    let mut said_first = view.good;
    for finding in &view.findings {
        // The first wrong one is the verdict, and needs no second telling.
        if finding.bad && !said_first {
            said_first = true;
        } else {
            let (word, paint) = if finding.bad { ("bad", Paint::Bad) } else { ("note", Paint::Warn) };
            let _ = writeln!(out, "{}: {}", paint.on(word, look), clean(&finding.message));
        }
        if let Some(fix) = &finding.fix {
            let _ = writeln!(out, "  fix: {}", clean(fix));
        }
    }
    out.push('\n');
    out += &way(view);
    if !view.drops.is_empty() {
        let mut grid = Grid::new(&["DROPS HERE, ALL PEERS", ">PACKETS", "MEANING AND USUAL FIX"]);
        for drop in &view.drops {
            grid.row(Paint::Warn, vec![drop.reason.clone(), units::count(drop.packets), drop.meaning.clone()]);
        }
        let _ = write!(out, "\n{}", grid.draw(look));
    }
    if let Some(outer) = &view.outer {
        let _ = write!(out, "\n{}", bytes(outer, look));
    }
    out
}

fn way(view: &WhyView) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<9} {}", clean(&text));
    };
    if let Some(destination) = view.destination {
        line("to", destination.to_string());
    }
    match &view.route {
        Some(route) => line("route", route.text.clone()),
        None => line("route", "none".to_owned()),
    }
    if let Some(source) = view.source {
        line("source", source.to_string());
    }
    if let Some(peer) = &view.peer {
        let prefix = view.prefix.map(|prefix| format!(", by its {prefix}")).unwrap_or_default();
        line("peer", format!("{}{prefix}", peer.name));
        line("endpoint", peer.endpoint.to_string());
        let lanes = peer.session.map(|s| format!(", {} of {} lanes up, {} waiting", s.lanes_up, s.lanes, s.waiting));
        line("sealed", session(peer) + &lanes.unwrap_or_default());
        let seen = peer.last_seen_ms.map_or("never".to_owned(), |ms| units::span(ms) + " ago");
        line("seen", seen);
        line(
            "traffic",
            format!(
                "sent {} packets ({}), received {} ({})",
                units::count(peer.tx_packets),
                units::bytes(peer.tx_bytes),
                units::count(peer.rx_packets),
                units::bytes(peer.rx_bytes)
            ),
        );
    }
    if let Some(mtu) = &view.mtu {
        let measured = if mtu.measured { " (measured)" } else { "" };
        line("mtu", format!("{} inside, {} on the underlay{measured}; device {}", mtu.inner, mtu.outer, mtu.device));
        line(
            "payload",
            format!("at most TCP {}, UDP {}, ping -s {}", mtu.tcp_payload, mtu.udp_payload, mtu.ping_payload),
        );
    }
    if let Some(carried) = &view.carried {
        let worker = match carried.worker {
            Some(worker) => format!("worker {worker}"),
            None => format!("one of {} workers", carried.workers),
        };
        let lane = carried.lane.map(|lane| format!(", lane {lane}")).unwrap_or_default();
        let address = |address: Option<SocketAddr>| address.map_or("?".to_owned(), |address| address.to_string());
        line("carried", format!("{worker}{lane}, {} > {}", address(carried.from), address(carried.to)));
    }
    out
}

/// `meshctl ping`: a line a size.
pub fn ping(to: &str, rows: &[Row], look: Look) -> String {
    let mut grid = Grid::new(&[">PAYLOAD", ">SENT", ">RECEIVED", ">MIN", ">AVG", ">MAX"]);
    for row in rows {
        let paint = if row.received < row.sent { Paint::Bad } else { Paint::Plain };
        let time = |us: Option<u64>| us.map_or("-".to_owned(), units::round_trip);
        let counts = [row.payload, row.sent, row.received].map(|n| n.to_string());
        let times = [row.min_us, row.avg_us, row.max_us].map(time);
        grid.row(paint, counts.into_iter().chain(times).collect());
    }
    let mut out = grid.draw(look);
    let (sent, received) = rows.iter().fold((0, 0), |(s, r), row| (s + row.sent, r + row.received));
    if received < sent {
        let lost = format!("{} of {sent} lost", sent - received);
        let _ = writeln!(out, "\n{}: `meshctl why {}` says what is known", Paint::Bad.on(&lost, look), clean(to));
    }
    out
}

/// Header by header, and the hex of each.
fn bytes(outer: &OuterView, look: Look) -> String {
    let mut grid = Grid::new(&["HEADER", ">AT", "BYTES", "DECODED"]);
    for layer in &outer.layers {
        let fields: Vec<String> = layer.fields.iter().map(|(name, value)| format!("{name} {value}")).collect();
        grid.row(
            Paint::Plain,
            vec![layer.layer.clone(), layer.offset.to_string(), layer.hex.clone(), fields.join(", ")],
        );
    }
    format!("{}An example packet, {} bytes on the underlay.\n", grid.draw(look), outer.length)
}
