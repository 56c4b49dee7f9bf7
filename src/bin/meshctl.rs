//! meshctl: what a person types to look at a running meshd and to steer it.
//!
//! Owns arguments, exit codes, colour and the watch loop. Questions and answers are `meshd::admin::client`'s, their
//! looks `meshd::admin::render`'s.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use meshd::admin::client::{Client, ClientError};
use meshd::admin::protocol::{PeerView, StatsView};
use meshd::admin::render::{self, Before, Look};
use meshd::admin::{DEFAULT_SOCKET, units};
use serde::Serialize;

const HELP: &str = "\
Examples:
  meshctl status                    is this node good, and if not, why
  meshctl status --wait 30s         wait until it is, for a script that has just started meshd
  meshctl peers                     the other nodes, and what went to and came from each
  meshctl stats --watch             packets and bits a second, drops as they happen
  meshctl peers --json | jq '.[] | select(.state == \"down\") | .name'
  meshctl --socket /run/meshd/b.sock nodes

Exit codes:
  0  answered
  1  the thing asked about is not good, or meshd refused
  2  the command line is wrong
  3  cannot reach meshd

Reading is for root and the socket's group, changing is for root.";

/// Shows and steers the meshd on this machine.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, after_help = HELP, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// meshd's admin socket [default: $MESHD_SOCKET, or /run/meshd/meshd.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// One JSON document (with --watch: one a line) instead of a table
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The other nodes: endpoint, subnets, state, encryption, last seen, RTT, path MTU, traffic
    Peers {
        /// Again each second, with rates, until Ctrl-C
        #[arg(long)]
        watch: bool,
    },
    /// The engine: I/O, offloads, packets and bytes each way, batch sizes, drops by reason
    Stats {
        /// Again each second, with rates, until Ctrl-C
        #[arg(long)]
        watch: bool,
        /// Show what is zero, too
        #[arg(long)]
        all: bool,
    },
    /// This node at a glance; exit code 1 when it is not ready
    Status {
        /// Wait until it is ready, but not longer than this (500ms, 30s, 2m; 30s when left out)
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "30s", value_parser = units::parse_span)]
        wait: Option<Duration>,
    },
    /// The cluster's node list, this node included
    Nodes {
        #[command(subcommand)]
        action: Option<NodesAction>,
    },
}

#[derive(Debug, Subcommand)]
enum NodesAction {
    /// Let a node list through that meshd holds back since it removes more than half of the peers
    Accept,
}

/// Between two samples of a watch.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Between two questions of `status --wait`.
const WAIT_EVERY: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            // Whoever reads our output may stop when it has seen enough (`| head -1`).
            let closed = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
            if error.downcast_ref().is_some_and(closed) {
                return ExitCode::SUCCESS;
            }
            let _ = writeln!(io::stderr(), "meshctl: {error:#}");
            let unreachable = error.downcast_ref().is_some_and(ClientError::is_unreachable);
            ExitCode::from(if unreachable { 3 } else { 1 })
        }
    }
}

/// Whether what was asked about is good.
fn run(cli: &Cli) -> anyhow::Result<bool> {
    let socket = cli
        .common
        .socket
        .clone()
        .or_else(|| std::env::var_os("MESHD_SOCKET").filter(|s| !s.is_empty()).map(PathBuf::from))
        .unwrap_or_else(|| DEFAULT_SOCKET.into());
    let client = Client::new(socket);
    let screen = Screen::new(cli.common.json);
    match &cli.command {
        Command::Peers { watch } => {
            let draw = |now: &Vec<PeerView>, before: Option<Before<'_, Vec<PeerView>>>| {
                let before = before.map(|b| Before { sample: b.sample.as_slice(), passed: b.passed });
                render::peers(now, before, screen.look)
            };
            show(&screen, *watch, || client.peers(), draw)?;
        }
        Command::Stats { watch, all } => {
            let look = Look { all: *all, ..screen.look };
            let draw = |now: &StatsView, before: Option<Before<'_, StatsView>>| render::stats(now, before, look);
            show(&screen, *watch, || client.stats(), draw)?;
        }
        Command::Status { wait } => return status(&client, &screen, *wait),
        Command::Nodes { action: None } => {
            let nodes = client.nodes()?;
            screen.print(&nodes, || render::nodes(&nodes, screen.look))?;
        }
        Command::Nodes { action: Some(NodesAction::Accept) } => {
            #[derive(Serialize)]
            struct Accepted {
                accepted: bool,
                message: String,
            }
            let done = Accepted { accepted: true, message: client.accept_nodes()? };
            screen.print(&done, || format!("{}\n", done.message))?;
        }
    }
    Ok(true)
}

fn status(client: &Client, screen: &Screen, wait: Option<Duration>) -> anyhow::Result<bool> {
    let started = Instant::now();
    let left = || wait.map(|wait| wait.saturating_sub(started.elapsed())).filter(|left| !left.is_zero());
    let status = loop {
        // The last question is asked when the time is up: what is shown then is what is true then.
        let last = left().is_none();
        match client.status() {
            Ok(status) if status.ready || last => break status,
            Err(error) if last || !error.may_pass() => return Err(error.into()),
            _ => std::thread::sleep(left().unwrap_or_default().min(WAIT_EVERY)),
        }
    };
    screen.print(&status, || render::status(&status, screen.look))?;
    if !status.ready && screen.json {
        for reason in &status.reasons {
            let _ = writeln!(io::stderr(), "meshctl: not ready: {}", reason.escape_debug());
        }
    }
    Ok(status.ready)
}

/// Shows a document once, or again each second.
fn show<T: Serialize>(
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let interrupt = {
        let _guard = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
    };
    let mut interrupt = interrupt.context("cannot catch Ctrl-C")?;
    std::thread::spawn(move || {
        runtime.block_on(interrupt.recv());
        std::process::exit(0);
    });
    Ok(())
}

/// Standard output: a terminal, a file, or a pipe that may close.
struct Screen {
    json: bool,
    terminal: bool,
    look: Look,
}

impl Screen {
    fn new(json: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colour = terminal && !json && !dumb && !set("NO_COLOR");
        Screen { json, terminal, look: Look { colour, all: false } }
    }

    fn print(&self, document: &impl Serialize, text: impl Fn() -> String) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string(document)? + "\n" } else { text() };
        self.write(format_args!("{text}"))
    }

    /// One step of a watch: on a terminal it replaces the last one.
    fn frame(&self, document: &impl Serialize, text: impl Fn() -> String) -> anyhow::Result<()> {
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
