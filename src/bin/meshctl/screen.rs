//! Standard output, watches, and the signals that end them.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use meshd::admin::client::ClientError;
use meshd::admin::render::{Before, Look};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

/// Between two samples of a watch.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Shows a document once, or again each second.
pub(crate) fn show<T: Serialize>(
    screen: &Screen,
    watch: bool,
    ask: impl Fn() -> Result<T, ClientError>,
    draw: impl Fn(&T, Option<Before<'_, T>>) -> String,
) -> anyhow::Result<()> {
    let mut before = (ask()?, Instant::now());
    if !watch {
        return screen.print(&before.0, || draw(&before.0, None));
    }
    end_on_interrupt()?;
    screen.frame(&before.0, || draw(&before.0, None))?;
    loop {
        std::thread::sleep(WATCH_EVERY.saturating_sub(before.1.elapsed()));
        let sample = match ask() {
            Ok(sample) => sample,
            // A person who watches wants to see meshd come back; a script wants to know that it is gone.
            Err(error) if screen.terminal && !screen.json && error.may_pass() => {
                screen.frame(&(), || format!("{error}\n\nStill trying; Ctrl-C ends.\n"))?;
                std::thread::sleep(WATCH_EVERY);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let now = (sample, Instant::now());
        let passed = now.1.duration_since(before.1);
        screen.frame(&now.0, || draw(&now.0, Some(Before { sample: &before.0, passed })))?;
        before = now;
    }
}

/// Ctrl-C is how a watch ends, so it is no failure. A thread of its own, since the watch may be waiting for meshd.
fn end_on_interrupt() -> anyhow::Result<()> {
    on_signal(&INTERRUPTS, || std::process::exit(0))
}

/// Becomes true with Ctrl-C, or SIGTERM.
pub(crate) fn interrupted() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    on_signal(&INTERRUPTS, move || told.store(true, Ordering::Relaxed))?;
    Ok(stop)
}

const INTERRUPTS: [SignalKind; 2] = [SignalKind::interrupt(), SignalKind::terminate()];

/// With the first of these signals, once.
pub(crate) fn on_signal(kinds: &[SignalKind], then: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let signals = {
        let _guard = runtime.enter();
        kinds.iter().map(|kind| signal(*kind)).collect::<io::Result<Vec<_>>>()
    };
    let mut signals = signals.context("cannot catch Ctrl-C")?;
    std::thread::spawn(move || {
        runtime.block_on(futures::future::select_all(signals.iter_mut().map(|signal| Box::pin(signal.recv()))));
        then();
    });
    Ok(())
}

/// Standard output: a terminal, a file, or a pipe that may close.
pub(crate) struct Screen {
    pub(crate) json: bool,
    pub(crate) terminal: bool,
    pub(crate) look: Look,
}

impl Screen {
    pub(crate) fn new(json: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colour = terminal && !json && !dumb && !set("NO_COLOR");
        Screen { json, terminal, look: Look { colour, all: false } }
    }

    pub(crate) fn print(&self, document: &impl Serialize, text: impl Fn() -> String) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string(document)? + "\n" } else { text() };
        self.write(format_args!("{text}"))
    }

    /// One step of a watch: on a terminal it replaces the last one.
    pub(crate) fn frame(&self, document: &impl Serialize, text: impl Fn() -> String) -> anyhow::Result<()> {
        match (self.json, self.terminal) {
            (true, _) => self.print(document, text),
            // Overwritten in place and only then cleared below: clearing first would flicker.
            (false, true) => self.write(format_args!("\x1b[H{}\x1b[J", text().replace('\n', "\x1b[K\n"))),
            (false, false) => self.write(format_args!("{}\n", text())),
        }
    }

    fn write(&self, text: fmt::Arguments<'_>) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        out.write_fmt(text)?;
        Ok(out.flush()?)
    }
}
