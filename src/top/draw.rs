//! How `meshctl top` looks.
//!
//! Owns what stands where, from 80×24 on (a smaller terminal shows less of the same). Knows no terminal: it draws into
//! whatever ratatui hands it.

use ratatui::Frame;
use ratatui::layout::{Constraint, Flex, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Table, Wrap};

use super::state::{self, Dropped, Rates, Sort, State, TREND};
use crate::admin::protocol::{PeerState, TrafficView};
use crate::admin::reasons::explain;
use crate::admin::units;

const KEYS: &[(&str, &str)] = &[
    ("n r t d l", "order by name, received, sent, round trip, loss; the same key again: the other way round"),
    ("/", "show peers whose name, endpoint, prefix or state has this in it; Enter keeps it, Esc ends it"),
    ("p, space", "pause; rates after it are those of the whole pause"),
    ("up down k j", "one line up or down; Page Up, Page Down, Home (g), End (G)"),
    ("? h", "this"),
    ("q, Ctrl-C", "quit"),
];

/// From this width on peers have a trend, and below that one no packet rates.
const WIDE: u16 = 80 + 1 + TREND as u16;
const NARROW: u16 = 80;

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, state: &mut State, colour: bool) {
    let paint = Paint { colour };
    let drops = state.drops().len();
    // what is dropped is worth a quarter of the lines at most, peers want the rest
    let most = usize::from(frame.area().height / 6).max(1);
    let shown = if drops > most { most + 1 } else { drops.max(1) };
    let heights = [1, 3, 1 + shown as u16].map(Constraint::Length);
    let [title, engine, dropped, peers, keys] =
        Layout::vertical(heights.into_iter().chain([Constraint::Min(2), Constraint::Length(1)])).areas(frame.area());
    frame.render_widget(headline(state, paint), title);
    frame.render_widget(sides(state, paint), engine);
    frame.render_widget(reasons(&state.drops(), most, paint), dropped);
    peer_table(frame, state, peers, paint);
    frame.render_widget(key_line(state, paint), keys);
    if state.wants_help() {
        help(frame, paint);
    }
}

/// Colours, or what stands for them where there are none.
#[derive(Debug, Clone, Copy)]
struct Paint {
    colour: bool,
}

impl Paint {
    fn bold(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    fn header(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    fn bad(self) -> Style {
        if self.colour { Style::new().fg(Color::Red) } else { self.bold() }
    }

    fn warn(self) -> Style {
        if self.colour { Style::new().fg(Color::Yellow) } else { Style::new() }
    }

    fn good(self) -> Style {
        if self.colour { Style::new().fg(Color::Green) } else { Style::new() }
    }
}

/// Who this is, and whether what stands below is of now.
fn headline<'a>(state: &'a State, paint: Paint) -> Line<'a> {
    let mut spans = Vec::new();
    if let Some(why) = state.is_away() {
        let node = state.stats().map_or("meshd", |stats| stats.node.as_str());
        return Line::from(vec![
            Span::styled(format!("{node}: AWAY "), paint.bad().add_modifier(Modifier::BOLD)),
            Span::raw(why),
        ]);
    }
    if let Some(stats) = state.stats() {
        let workers = if stats.workers == 1 { "worker" } else { "workers" };
        spans.push(Span::styled(stats.node.as_str(), paint.bold()));
        spans.push(Span::raw(format!(
            "  meshd {}, up {}, io {}, {} {workers}",
            stats.version,
            units::span(stats.uptime_ms),
            stats.io,
            stats.workers
        )));
    }
    if state.is_paused() {
        spans.push(Span::styled("  PAUSED", paint.warn().add_modifier(Modifier::BOLD)));
    }
    Line::from(spans)
}

/// What goes through the TUN device and the UDP sockets.
fn sides(state: &State, paint: Paint) -> Table<'static> {
    let row = |(name, total, rates): (&str, TrafficView, Option<Rates>)| {
        let rates = four(rates);
        let totals = [units::bytes(total.rx_bytes), units::bytes(total.tx_bytes)];
        Row::new(std::iter::once(Cell::from(name.to_owned())).chain(rates.into_iter().chain(totals).map(right)))
    };
    let header = ["RX pkt/s", "RX bit/s", "TX pkt/s", "TX bit/s", "RX in all", "TX in all"];
    let cells = std::iter::once(Cell::from("SIDE")).chain(header.map(|text| right(text.to_owned())));
    let widths = [6, 9, 9, 9, 9, 11, 11].map(Constraint::Length);
    Table::new(state.engine().into_iter().flatten().map(row), widths).header(Row::new(cells).style(paint.header()))
}

/// Why packets were dropped, as far as there is room.
fn reasons<'a>(drops: &[Dropped<'a>], most: usize, paint: Paint) -> Table<'a> {
    let header = [Cell::from("DROPS"), right("PACKETS".to_owned()), right("pkt/s".to_owned()), "MEANING".into()];
    let mut rows: Vec<Row<'a>> = drops
        .iter()
        .take(most)
        .map(|drop| {
            let rate = drop.rate.map_or_else(dash, units::short);
            let style = if drop.rate.is_some_and(|rate| rate > 0.0) { paint.warn() } else { Style::new() };
            let meaning = explain(drop.reason).unwrap_or_default();
            let (reason, total) = (Cell::from(drop.reason), units::count(drop.total));
            Row::new([reason, right(total), right(rate), meaning.into()]).style(style)
        })
        .collect();
    match drops.len() {
        0 => rows.push(Row::new(["none"])),
        all if all > most => {
            rows.push(Row::new([format!("and {} more reasons: meshctl stats", all - most)]));
        }
        _ => {}
    }
    let widths = [Constraint::Length(27), Constraint::Length(11), Constraint::Length(8), Constraint::Min(8)];
    Table::new(rows, widths).header(Row::new(header).style(paint.header()))
}

fn peer_table(frame: &mut Frame<'_>, state: &mut State, area: Rect, paint: Paint) {
    let (packets, trend) = (area.width >= NARROW, area.width >= WIDE);
    let page = usize::from(area.height.saturating_sub(1));
    let count = state.rows().len();
    let first = state.scrolled(count, page);
    let rows = state.rows();
    let lines = rows.iter().skip(first).take(page).map(|row| {
        let peer = row.peer;
        let (word, style) = match peer.state {
            PeerState::Up => ("up", paint.good()),
            PeerState::Down => ("down", paint.bad()),
            PeerState::Unknown => ("unknown", Style::new()),
        };
        let mut cells = vec![
            Cell::from(peer.name.as_str()),
            Cell::from(word).style(style),
            right(peer.rtt_us.map_or_else(dash, units::round_trip)),
            right(peer.loss_permille.map_or_else(dash, units::permille)),
            right(peer.path_mtu.to_string()),
        ];
        let [rx_packets, rx_bits, tx_packets, tx_bits] = four(row.rates).map(right);
        match packets {
            true => cells.extend([rx_packets, rx_bits, tx_packets, tx_bits]),
            false => cells.extend([rx_bits, tx_bits]),
        }
        if trend {
            cells.push(bars(&row.trend).into());
        }
        Row::new(cells)
    });
    let mut columns = vec![
        (title("NAME", Some(Sort::Name), state), Constraint::Min(8)),
        (Cell::from("STATE"), Constraint::Length(7)),
        (right(title_text("RTT", Some(Sort::Rtt), state)), Constraint::Length(8)),
        (right(title_text("LOSS", Some(Sort::Loss), state)), Constraint::Length(7)),
        (right("MTU".to_owned()), Constraint::Length(5)),
    ];
    let rate = |text: &str, sort| (right(title_text(text, sort, state)), Constraint::Length(9));
    match packets {
        true => columns.extend([
            rate("RX pkt/s", None),
            rate("RX bit/s", Some(Sort::Rx)),
            rate("TX pkt/s", None),
            rate("TX bit/s", Some(Sort::Tx)),
        ]),
        false => columns.extend([rate("RX bit/s", Some(Sort::Rx)), rate("TX bit/s", Some(Sort::Tx))]),
    }
    if trend {
        columns.push((Cell::from("TREND"), Constraint::Length(TREND as u16)));
    }
    let (header, widths): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    let table = Table::new(lines, widths).column_spacing(1).header(Row::new(header).style(paint.header()));
    frame.render_widget(table, area);
    if count == 0 && area.height > 1 {
        let none = match state.filter().0 {
            "" => "No peers: join other nodes to the cluster, or add the other nodes to `nodes-file`.",
            _ => "No peer has that in it; Esc shows all.",
        };
        frame.render_widget(Line::from(none), Rect { y: area.y + 1, height: 1, ..area });
    }
}

/// A column's title, marked where peers are ordered by it.
fn title_text(text: &str, sort: Option<Sort>, state: &State) -> String {
    let (by, reversed) = state.order();
    if sort != Some(by) {
        return text.to_owned();
    }
    // names begin with the least, numbers with the most
    let up = (by == Sort::Name) != reversed;
    format!("{}{text}", if up { '▲' } else { '▼' })
}

fn title(text: &str, sort: Option<Sort>, state: &State) -> Cell<'static> {
    Cell::from(title_text(text, sort, state))
}

fn right(text: String) -> Cell<'static> {
    Cell::from(Line::from(text).right_aligned())
}

fn dash() -> String {
    "-".to_owned()
}

/// Packets and bits received, packets and bits sent.
fn four(rates: Option<Rates>) -> [String; 4] {
    match rates {
        None => std::array::from_fn(|_| dash()),
        Some(Rates { rx_packets, rx_bits, tx_packets, tx_bits }) => {
            [rx_packets, rx_bits, tx_packets, tx_bits].map(units::short)
        }
    }
}

/// A bar a value, the largest being full.
fn bars(trend: &[u64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = trend.iter().copied().max().unwrap_or(0).max(1);
    let bar = |value: &u64| match *value {
        0 => ' ',
        value => BARS.get((u128::from(value) * 7 / u128::from(most)) as usize).copied().unwrap_or('█'),
    };
    trend.iter().map(bar).collect()
}

/// How many there are and which are shown; and the keys, or what is being typed.
fn key_line<'a>(state: &'a State, paint: Paint) -> Line<'a> {
    let (filter, typing) = state.filter();
    if typing {
        return Line::from(vec![Span::styled("filter: ", paint.bold()), Span::raw(filter), Span::raw("█")]);
    }
    let state::Census { up, down, unknown } = state.census();
    let all = up + down + unknown;
    let peers = if all == 1 { "peer" } else { "peers" };
    let mut spans = vec![Span::raw(format!("{} {peers}", units::count(all as u64)))];
    if down > 0 {
        spans.push(Span::styled(format!(", {down} down"), paint.bad()));
    }
    if unknown > 0 {
        spans.push(Span::raw(format!(", {unknown} unknown")));
    }
    if !filter.is_empty() {
        spans.push(Span::styled(format!(", filter {filter}"), paint.warn()));
    }
    spans.push(Span::raw("  q quit  n/r/t/d/l sort  / filter  p pause  ? help"));
    Line::from(spans)
}

fn help(frame: &mut Frame<'_>, paint: Paint) {
    let width = frame.area().width.min(76);
    let lines: Vec<Line<'_>> = KEYS
        .iter()
        .map(|(keys, what)| Line::from(vec![Span::styled(format!("{keys:<13}"), paint.bold()), Span::raw(*what)]))
        .collect();
    let text = Paragraph::new(lines).wrap(Wrap { trim: true }).block(Block::bordered().title(" Keys "));
    let height = frame.area().height.min(12);
    let [area] = Layout::horizontal([Constraint::Length(width)]).flex(Flex::Center).areas(frame.area());
    let [area] = Layout::vertical([Constraint::Length(height)]).flex(Flex::Center).areas(area);
    frame.render_widget(Clear, area);
    frame.render_widget(text, area);
}

#[cfg(test)]
mod tests;
