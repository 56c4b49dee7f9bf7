//! meshctl: what a person types to look at a running meshd and to steer it.
//!
//! Owns exit codes, and which question a command is. Questions and answers are `meshd::admin::client`'s, their
//! looks `meshd::admin::render`'s.

mod args;
mod cluster;
mod echoes;
mod packets;
mod screen;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{CommandFactory, Parser};
use meshd::admin::DEFAULT_SOCKET;
use meshd::admin::client::{Client, ClientError};
use meshd::admin::protocol::capture::{self, FilterView, SideView};
use meshd::admin::protocol::{PeerView, StatsView, why};
use meshd::admin::render::{self, Before, Look};
use meshd::doctor;
use meshd::membership::link;
use meshd::membership::matrix::Matrix;
use meshd::top::{self, TopError};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::SignalKind;

use self::args::{Cli, ClusterAction, Command, KeyAction, NodesAction, WhyArgs};
use self::cluster::{node, token};
use self::echoes::{ping, test};
use self::packets::{capture, wanted};
use self::screen::{Screen, on_signal, show};

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
        Command::Top => top(&client, &screen)?,
        Command::Status { wait } => return status(&client, &screen, *wait),
        Command::Nodes { action: None } => {
            let nodes = client.nodes()?;
            let membership = client.status().ok().and_then(|status| status.membership);
            if let Some(membership) = membership.filter(|membership| !membership.connected) {
                let revision = membership.revision.map(|revision| format!(", revision {revision}")).unwrap_or_default();
                let why = membership.problem.map(|why| format!(" ({why})")).unwrap_or_default();
                let _ = writeln!(
                    io::stderr(),
                    "meshctl: no server answers{why}: this is the copy here{revision}, as it last was"
                );
            }
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
        Command::Manual { folder } => meshd::manual::write(Cli::command(), folder)?,
        Command::Key(KeyAction::Show) => return key(&client, &screen),
        Command::Why(args) => return why(&client, &screen, args),
        Command::Ping { destination, count, timeout } => {
            return ping(&client, &screen, destination, *count, *timeout);
        }
        Command::Capture { write, inner, outer, count, time, snaplen, recorder, recorded, filter } => {
            let side = match (inner, outer) {
                (true, _) => Some(SideView::Inner),
                (_, true) => Some(SideView::Outer),
                _ => None,
            };
            if let Some(packets) = recorder {
                let view = client.capture(capture::Ask::Record { packets: *packets })?;
                let text = match view.keeps {
                    0 => "the flight recorder is off\n".to_owned(),
                    n => format!(
                        "the headers of the last {n} packets are kept: `meshctl capture --recorded` writes them\n"
                    ),
                };
                screen.print(&json!({"keeps": view.keeps}), || text.clone())?;
                return Ok(true);
            }
            let filter = FilterView { side, snaplen: *snaplen as usize, ..wanted(&client, filter)? };
            let file = write.clone().unwrap_or_else(|| "meshd.pcapng".into());
            let wanted = if *recorded { None } else { Some((filter, *count, *time)) };
            capture(&client, &screen, &file, wanted)?;
        }
        Command::Test { count, timeout } => return test(&client, &screen, *count, *timeout),
        Command::Doctor { config } => {
            let facts = doctor::facts::collect(&client, &doctor::facts::Places { config: config.clone() });
            let report = doctor::report(&facts);
            screen.print(&report, || render::doctor::doctor(&report, screen.look))?;
            return Ok(report.good);
        }
        Command::Bugreport { output, config } => {
            let files = doctor::bugreport::collect(&client, &doctor::facts::Places { config: config.clone() });
            doctor::bugreport::write(output, &files).with_context(|| format!("cannot write {}", output.display()))?;
            let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
            let done = json!({"file": output, "contents": names});
            let text = format!(
                "{}: {} files, tokens and private keys removed; look through it before you send it (`tar xf`)\n",
                output.display(),
                names.len()
            );
            screen.print(&done, || text.clone())?;
        }
        Command::Node(action) => node(&client, &screen, action)?,
        Command::Token(action) => token(&client, &screen, action)?,
        Command::Cluster(ClusterAction::Status) => {
            let status: Value = client.cluster(link::Request::ClusterStatus)?;
            screen.print(&status, || render::cluster::status(&status, screen.look))?;
            return Ok(render::cluster::is_good(&status));
        }
        Command::Cluster(ClusterAction::Matrix) => {
            let matrix: Matrix = client.cluster(link::Request::ClusterMatrix)?;
            screen.print(&matrix, || render::matrix::matrix(&matrix, screen.look))?;
        }
        Command::Cluster(ClusterAction::Audit) => {
            let lines: Vec<link::AuditLine> = client.cluster(link::Request::ClusterAudit)?;
            screen.print(&lines, || render::cluster::audit(&lines, screen.look))?;
        }
        Command::Leave { force } => {
            let done = json!({"left": true, "message": client.leave(*force)?});
            screen.print(&done, || format!("{}\n", done["message"].as_str().unwrap_or_default()))?;
        }
    }
    Ok(true)
}

/// On a terminal alone; anything else is a wrong command line.
fn top(client: &Client, screen: &Screen) -> anyhow::Result<()> {
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if screen.json || dumb || !screen.terminal || !io::stdin().is_terminal() {
        let why = "`meshctl top` draws on a terminal and reads its keys, and this is none: use `meshctl peers --watch` or \
                   `meshctl stats --watch`, with --json for a script";
        Cli::command().error(clap::error::ErrorKind::ArgumentConflict, why).exit();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    // whoever takes the terminal away wants it to end, even where it was told not to care (nohup)
    on_signal(
        &[SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()],
        move || {
            told.store(true, Ordering::Relaxed);
            // reading keys does not come back from a terminal that is gone
            std::thread::sleep(Duration::from_secs(1));
            top::give_back();
            std::process::exit(1);
        },
    )?;
    top::run(client, screen.look.colour, &stop).map_err(|error| match error {
        // known by its kind to whoever chooses the exit code
        TopError::Client(error) => error.into(),
        other => other.into(),
    })
}

fn key(client: &Client, screen: &Screen) -> anyhow::Result<bool> {
    let keys = client.keys()?;
    screen.print(&keys, || keys.public_key.iter().map(|key| format!("{key}\n")).collect())?;
    if keys.public_key.is_none() {
        let _ = writeln!(
            io::stderr(),
            "meshctl: this node has no key, since it encrypts nothing: set `encryption: wireguard` in meshd's \
             configuration and restart it; it then makes one"
        );
    }
    Ok(keys.public_key.is_some())
}

fn why(client: &Client, screen: &Screen, args: &WhyArgs) -> anyhow::Result<bool> {
    let flow = match (args.proto.as_deref(), args.sport, args.dport) {
        (Some(protocol), Some(source_port), Some(destination_port)) => {
            let protocol = if protocol == "tcp" { why::Protocol::Tcp } else { why::Protocol::Udp };
            Some(why::Flow { protocol, source_port, destination_port })
        }
        _ => None,
    };
    let answer = client.why(why::Ask { destination: args.destination.clone(), flow })?;
    screen.print(&answer, || render::why::why(&answer, screen.look))?;
    Ok(answer.good)
}

fn status(client: &Client, screen: &Screen, wait: Option<Duration>) -> anyhow::Result<bool> {
    let started = Instant::now();
    let left = || wait.map(|wait| wait.saturating_sub(started.elapsed())).filter(|left| !left.is_zero());
    let mut told = Vec::new();
    let status = loop {
        // The last question is asked when the time is up: what is shown then is what is true then.
        let last = left().is_none();
        match client.status() {
            Ok(status) if status.ready || last => break status,
            Err(error) if last || !error.may_pass() => return Err(error.into()),
            Ok(status) if !screen.json && status.reasons != told => {
                let waits = status.reasons.iter().map(|reason| reason.escape_debug().to_string()).collect::<Vec<_>>();
                let _ = writeln!(io::stderr(), "meshctl: waiting: {}", waits.join("; "));
                told = status.reasons;
            }
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
