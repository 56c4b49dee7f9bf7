//! `capture`: packets from meshd into a file.

use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use meshd::admin::client::Client;
use meshd::admin::protocol::capture::{self, FilterView};
use meshd::pcap;
use serde_json::json;

use crate::screen::{Screen, interrupted};

/// Between two looks for packets.
const FETCH_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn wanted(client: &Client, words: &[String]) -> anyhow::Result<FilterView> {
    let peers = if words.is_empty() { Vec::new() } else { client.peers()? };
    pcap::filter(words, &peers).map_err(|error| anyhow::anyhow!("{error}"))
}

/// Writes packets to a file: what the flight recorder holds, or what passes from now on.
pub(crate) fn capture(
    client: &Client,
    screen: &Screen,
    path: &Path,
    wanted: Option<(FilterView, Option<u64>, Option<Duration>)>,
) -> anyhow::Result<()> {
    let standard = path.as_os_str() == "-";
    // made when there is something to write: what stands there from an earlier time is lost for nothing otherwise
    let out = || -> anyhow::Result<Box<dyn Write>> {
        if standard {
            return Ok(Box::new(io::stdout().lock()));
        }
        let file = std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Box::new(file))
    };
    let (packets, lost) = match wanted {
        None => {
            let view = client.capture(capture::Ask::Recorded)?;
            if view.keeps == 0 {
                anyhow::bail!("the flight recorder is off: `meshctl capture --recorder 10000` switches it on");
            }
            let mut file = pcap::File::start(out()?, &view)?;
            file.add(&view.packets)?;
            (file.packets(), 0)
        }
        Some((filter, count, time)) => follow(client, out, filter, count, time)?,
    };
    let text = format!(
        "{packets} packets in {}{}",
        path.display(),
        if lost > 0 { format!(", {lost} more did not fit: narrow the filter") } else { String::new() }
    );
    if standard {
        let _ = writeln!(io::stderr(), "meshctl: {text}");
        return Ok(());
    }
    screen.print(&json!({"file": path, "packets": packets, "lost": lost}), || format!("{text}\n"))
}

/// Writes packets as they pass. Returns how many, and how many did not fit.
fn follow(
    client: &Client,
    out: impl FnOnce() -> anyhow::Result<Box<dyn Write>>,
    filter: FilterView,
    count: Option<u64>,
    time: Option<Duration>,
) -> anyhow::Result<(u64, u64)> {
    let begun = client.capture(capture::Ask::Begin { filter })?;
    let out = out().inspect_err(|_| _ = client.capture(capture::Ask::End { id: begun.id }))?;
    let mut file = pcap::File::start(out, &begun)?;
    file.add(&[])?;
    let (stop, start) = (interrupted()?, Instant::now());
    let _ = writeln!(io::stderr(), "meshctl: capturing; Ctrl-C ends");
    loop {
        let ends = stop.load(Ordering::Relaxed) || time.is_some_and(|time| start.elapsed() >= time);
        let view = client.capture(capture::Ask::Fetch { id: begun.id })?;
        let left = count.map_or(u64::MAX, |count| count - file.packets());
        let take = view.packets.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        file.add(view.packets.get(..take).unwrap_or_default())?;
        if count.is_some_and(|count| file.packets() >= count) || (ends && view.packets.is_empty()) {
            client.capture(capture::Ask::End { id: begun.id })?;
            return Ok((file.packets(), view.lost));
        }
        if view.packets.is_empty() {
            std::thread::sleep(FETCH_EVERY);
        }
    }
}
