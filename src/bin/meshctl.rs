//! meshctl: what a person types to look at a running meshd and to steer it.
//!
//! Owns arguments, exit codes, colour and the watch loop. Questions and answers are `meshd::admin::client`'s, their
//! looks `meshd::admin::render`'s.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use ipnet::IpNet;
use meshd::admin::client::{Client, ClientError};
use meshd::admin::protocol::capture::{self, FilterView, SideView};
use meshd::admin::protocol::{ForeignView, PeerView, StatsView, TargetView, TokenMade, TokenView, why};
use meshd::admin::render::{self, Before, Look};
use meshd::admin::{DEFAULT_SOCKET, units};
use meshd::control::foreign;
use meshd::doctor;
use meshd::membership::link;
use meshd::membership::matrix::Matrix;
use meshd::membership::record::Role;
use meshd::node::DEFAULT_PORT;
use meshd::pcap;
use meshd::probe;
use meshd::top::{self, TopError};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

const HELP: &str = "\
Examples:
  meshctl status                    is this node good, and if not, why
  meshctl status --wait 30s         wait until it is, for a script that has just started meshd
  meshctl peers                     the other nodes, and what went to and came from each
  meshctl stats --watch             packets and bits a second, drops as they happen
  meshctl peers --json | jq '.[] | select(.state == \"down\") | .name'
  meshctl why 10.42.2.1             would a packet to there arrive, which way, and if not, why
  meshctl ping b                    echoes through the mesh, of sizes up to the longest that fits
  meshctl test                      who reaches whom, and echoes of all sizes to each node
  meshctl top                       the mesh as it lives: peers, rates, drops; `?` shows the keys
  meshctl doctor                    what is wrong with this machine, and the command that mends it
  meshctl --socket /run/meshd/b.sock nodes
  meshctl token create --print-join the line to paste on a new node (on a server)
  meshctl node remove c             c is no member any more, and cut off at once

Exit codes:
  0  answered
  1  the thing asked about is not good, or meshd refused
  2  the command line is wrong
  3  cannot reach meshd

Reading is for root and the socket's group, changing is for root.";

const CAPTURE_HELP: &str = "\
Examples:
  meshctl capture -w mesh.pcapng peer b tcp port 443     until Ctrl-C
  meshctl capture --time 10s drop                        what is dropped, the reason as its comment
  meshctl capture --inner -w - host 10.42.2.1 | tshark -r -
  meshctl capture --recorder 10000                       keep the headers of the last 10,000 packets
  meshctl capture --recorded -w before.pcapng            and write them, after something went wrong

Inner packets are on the interface of the TUN device's name, outer datagrams on `underlay`. Datagrams in the clear are also \
found by what they carry, encrypted ones by their outer addresses alone. One capture at a time; it slows meshd down while it \
runs, the flight recorder too.";

const TOP_HELP: &str = "\
Keys:
  n r t d l         order by name, received, sent, round trip (delay), loss; the same key again: the other way round
  /                 show peers whose name, endpoint, prefix or state has this in it; Enter keeps it, Esc ends it
  p, space          pause
  up down k j       one line; Page Up, Page Down, Home (g), End (G)
  ? h               the keys
  q, Ctrl-C         quit

Rates are of the last second. A meshd that is restarted is shown as away until it is back. For files and pipes there are \
`meshctl peers --watch` and `meshctl stats --watch`, with --json one document a line.";

const WHY_HELP: &str = "\
Examples:
  meshctl why 10.42.2.1                                 an ICMP echo to there
  meshctl why b                                         to the node b
  meshctl why 10.42.2.1 --proto tcp --sport 40000 --dport 443
                                                        this very flow: its lane, its outer source port
  meshctl why 10.42.2.1 --json | jq .verdict";

const ADD_HELP: &str = "\
Examples:
  meshctl node add k --underlay 10.9.0.7                        a kernel VXLAN device, in the clear
  meshctl node add w --underlay 10.9.0.8 --public-key BASE64    a stock WireGuard peer
  meshctl node commands k | ssh root@k sh                       again, when nodes have changed

What is printed is for the shell of the foreign machine: commands, and all else as comments.";

const TOKEN_HELP: &str = "\
Examples:
  meshctl token create --print-join                     the line to paste on a new node
  meshctl token create --uses 1 --node b --ttl 30m      for the node b alone, once, for half an hour
  meshctl token create --role server                    for another server
  meshctl token create --print-script | ssh root@b sh   join b from here";

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
    #[arg(long, global = true, value_name = "PATH", display_order = 900)]
    socket: Option<PathBuf>,
    /// One JSON document (with --watch: one a line) instead of a table
    #[arg(long, global = true, display_order = 901)]
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
    /// The mesh as it lives, on a terminal: peers with rates, the engine, drops; sorted and filtered by keys
    #[command(after_help = TOP_HELP)]
    Top,
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
    /// The whole way of a packet: route, peer, session, MTU, outer header; exit code 1 when it would not arrive
    #[command(after_help = WHY_HELP)]
    Why(WhyArgs),
    /// Echoes to a node through the mesh, of sizes up to the longest that fits; exit code 1 when one is lost
    Ping {
        /// A node's name, or an overlay address
        #[arg(value_name = "NODE")]
        destination: String,
        /// Echoes of each size
        #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: u32,
        /// How long an answer may take
        #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::parse_span)]
        timeout: Duration,
    },
    /// Who reaches whom in the mesh, and echoes of all sizes to each node over IPv4 and IPv6; exit code 1 when one is lost
    Test {
        /// Echoes of each size
        #[arg(short, long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
        count: u32,
        /// How long an answer may take
        #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::parse_span)]
        timeout: Duration,
    },
    /// Packets as they pass, inside and outside, dropped ones with the reason, as pcapng; and the flight recorder
    #[command(after_help = CAPTURE_HELP)]
    Capture {
        /// Where to; `-`: standard output, for `| wireshark -k -i -` [default: meshd.pcapng]
        #[arg(short, long, value_name = "FILE")]
        write: Option<PathBuf>,
        /// Packets at the TUN device alone
        #[arg(long, conflicts_with = "outer")]
        inner: bool,
        /// Datagrams on the underlay alone
        #[arg(long)]
        outer: bool,
        /// End after so many packets
        #[arg(short, long, value_name = "N")]
        count: Option<u64>,
        /// End after this time [default: Ctrl-C ends it]
        #[arg(long, value_name = "TIME", value_parser = units::parse_span)]
        time: Option<Duration>,
        /// Bytes of each packet that are kept
        #[arg(short, long, value_name = "BYTES", default_value_t = 65_535, value_parser = clap::value_parser!(u32).range(20..=65_535))]
        snaplen: u32,
        /// Have the flight recorder keep the headers of the last N packets from now on; 0 switches it off
        #[arg(long, value_name = "N", conflicts_with_all = ["recorded", "write", "filter"])]
        recorder: Option<usize>,
        /// Write what the flight recorder holds, and end
        #[arg(long, conflicts_with = "filter")]
        recorded: bool,
        /// host ADDR, net PREFIX, peer NAME, port N, tcp, udp, icmp, drop: all have to hold
        #[arg(value_name = "FILTER")]
        filter: Vec<String>,
    },
    /// What is wrong with this machine as a node, and the command that mends it; also without a running meshd
    Doctor {
        /// meshd's configuration file [default: /etc/meshd/config.yaml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// One archive with what somebody else needs to see of this node; secrets are removed
    Bugreport {
        /// Where to
        #[arg(short, long, value_name = "FILE", default_value = "meshd-bugreport.tar")]
        output: PathBuf,
        /// meshd's configuration file [default: /etc/meshd/config.yaml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// This node's key
    #[command(subcommand)]
    Key(KeyAction),
    /// Change a node of the cluster (on a server)
    #[command(subcommand)]
    Node(NodeAction),
    /// Make, list and revoke join tokens (on a server)
    #[command(subcommand)]
    Token(TokenAction),
    /// The cluster as a whole
    #[command(subcommand)]
    Cluster(ClusterAction),
    /// Leave the cluster: withdraws this node, removes device and routes, and stops meshd
    Leave {
        /// Also where no server can be told
        #[arg(long)]
        force: bool,
    },
    /// Write man pages and shell completions
    #[command(hide = true)]
    Manual {
        /// Where to
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
struct WhyArgs {
    /// An IPv4 or IPv6 address, or a node's name
    #[arg(value_name = "DST")]
    destination: String,
    /// The flow's protocol [default: an ICMP echo]
    #[arg(long, value_parser = ["tcp", "udp"], requires_all = ["sport", "dport"])]
    proto: Option<String>,
    /// The flow's source port
    #[arg(long, value_name = "PORT", requires = "proto")]
    sport: Option<u16>,
    /// The flow's destination port
    #[arg(long, value_name = "PORT", requires = "proto")]
    dport: Option<u16>,
}

#[derive(Debug, Subcommand)]
enum KeyAction {
    /// Print the public key, and nothing else
    Show,
}

#[derive(Debug, Subcommand)]
enum NodeAction {
    /// Add a foreign member: a kernel VXLAN device or a stock WireGuard peer
    #[command(after_help = ADD_HELP)]
    Add {
        /// Its name
        name: String,
        /// Where it receives data: an address, or one with a port; one for each family
        #[arg(long, required = true, value_name = "ADDR[:PORT]", value_delimiter = ',', value_parser = underlay)]
        underlay: Vec<SocketAddr>,
        /// The prefixes behind it [default: the servers choose]
        #[arg(long = "subnet", value_name = "PREFIX", value_delimiter = ',')]
        subnets: Vec<IpNet>,
        /// MAC of its VXLAN device
        #[arg(long)]
        mac: Option<String>,
        /// WireGuard public key; without it VXLAN in the clear
        #[arg(long, value_name = "BASE64")]
        public_key: Option<String>,
        #[command(flatten)]
        there: There,
    },
    /// Print what a foreign member has to run, again: the nodes may be others by now
    Commands {
        /// Its name
        name: String,
        #[command(flatten)]
        there: There,
    },
    /// Have others open no new flows to a node's services
    Drain {
        /// The node
        name: String,
    },
    /// Take a drain back
    Undrain {
        /// The node
        name: String,
    },
    /// Remove a node: nobody talks to it any more
    Remove {
        /// The node
        name: String,
    },
}

/// How things are called on a foreign machine.
#[derive(Debug, Args)]
struct There {
    /// What the interface there is to be called
    #[arg(long, value_name = "NAME", default_value = foreign::DEVICE)]
    device: String,
    /// Where a WireGuard peer's private key lies there
    #[arg(long, value_name = "PATH", default_value = foreign::PRIVATE_KEY_FILE)]
    private_key_file: String,
}

#[derive(Debug, Subcommand)]
enum TokenAction {
    /// Print a new token, and nothing else
    #[command(after_help = TOKEN_HELP)]
    Create {
        /// What a node that joins with it becomes
        #[arg(long, default_value = "agent", value_parser = ["agent", "server"])]
        role: String,
        /// How long it is good for (30m, 24h, or `never`)
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lifetime)]
        ttl: Lifetime,
        /// How many nodes may join with it [default: unlimited]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        uses: Option<u32>,
        /// The one node that it is for
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
        /// Print the command to paste on the new node instead
        #[arg(long, conflicts_with = "print_script")]
        print_join: bool,
        /// Print a script to run there instead
        #[arg(long)]
        print_script: bool,
    },
    /// The tokens that there are; what makes them tokens is not shown
    List,
    /// Nobody joins with a token any more; who has stays
    Revoke {
        /// Its id, as `token list` shows it
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum ClusterAction {
    /// Servers, datastore, how many may fail
    Status,
    /// Who reaches whom, with round trip and loss, as the nodes themselves say
    Matrix,
    /// Who made, used and revoked tokens, who joined, was refused, removed, and went: the last 1,000 lines (on a server)
    Audit,
}

/// How long a token lives; `None` is for ever.
#[derive(Debug, Clone, Copy)]
struct Lifetime(Option<Duration>);

fn lifetime(text: &str) -> Result<Lifetime, String> {
    match text {
        "never" => Ok(Lifetime(None)),
        text => match units::parse_span(text)? {
            span if span < Duration::from_secs(1) => {
                Err("a token lives for a second at least, or `never` ends".to_owned())
            }
            span => Ok(Lifetime(Some(span))),
        },
    }
}

fn underlay(text: &str) -> Result<SocketAddr, String> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let with_port = |ip: IpAddr| SocketAddr::new(ip, DEFAULT_PORT);
    text.parse().or_else(|_| bare.parse().map(with_port)).map_err(|_| {
        "write an IP address, or one with a port: `10.9.0.1`, `10.9.0.1:8472`, `[fd00::1]:8472`".to_owned()
    })
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

fn ping(client: &Client, screen: &Screen, node: &str, count: u32, patience: Duration) -> anyhow::Result<bool> {
    let way = client.why(why::Ask { destination: node.to_owned(), flow: None })?;
    let (Some(to), Some(mtu)) = (way.destination, way.mtu) else {
        anyhow::bail!("{}; `meshctl why {node}` says more", way.verdict);
    };
    let asked = probe::Probe { to, from: way.source, sizes: probe::sizes(mtu.ping_payload), count, patience };
    let rows = probe::run(&asked).map_err(|error| no_echoes(to, &error))?;
    let good = rows.iter().all(|row| row.received == row.sent);
    let document = json!({"node": node, "destination": to, "good": good, "sizes": rows});
    screen.print(&document, || format!("{node} at {to}\n{}", render::why::ping(node, &rows, screen.look)))?;
    Ok(good)
}

/// meshctl sends them itself, so it needs the right and the place to.
fn no_echoes(to: IpAddr, error: &io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied => "; run it as root",
        io::ErrorKind::AddrNotAvailable => "; run it in the network namespace that meshd runs in",
        _ => "",
    };
    anyhow::anyhow!("cannot send echoes to {to}: {error}{hint}")
}

/// Between two looks for packets.
const FETCH_EVERY: Duration = Duration::from_millis(100);

fn wanted(client: &Client, words: &[String]) -> anyhow::Result<FilterView> {
    let peers = if words.is_empty() { Vec::new() } else { client.peers()? };
    pcap::filter(words, &peers).map_err(|error| anyhow::anyhow!("{error}"))
}

/// Writes packets to a file: what the flight recorder holds, or what passes from now on.
fn capture(
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

/// Echoes to so many addresses at once.
const AT_ONCE: usize = 16;

fn test(client: &Client, screen: &Screen, count: u32, patience: Duration) -> anyhow::Result<bool> {
    let survey = client.survey()?;
    let echoes = |target: &TargetView| {
        let TargetView { address: to, source, ping_payload, .. } = target;
        let asked = probe::Probe { to: *to, from: Some(*source), sizes: probe::sizes(*ping_payload), count, patience };
        let rows = probe::run(&asked).map_err(|error| no_echoes(*to, &error));
        rows.map(|sizes| render::test::Echoes::new(target, sizes))
    };
    let mut echoed = Vec::new();
    for targets in survey.targets.chunks(AT_ONCE) {
        let of_chunk: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = targets.iter().map(|target| scope.spawn(|| echoes(target))).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        for rows in of_chunk {
            echoed.push(rows.map_err(|_| anyhow::anyhow!("a thread that sends echoes panicked"))??);
        }
    }
    let report = render::test::Report::new(survey, echoed);
    screen.print(&report, || render::test::test(&report, screen.look))?;
    Ok(report.good)
}

fn node(client: &Client, screen: &Screen, action: &NodeAction) -> anyhow::Result<()> {
    let (request, done) = match action {
        NodeAction::Commands { name, there } => {
            let foreign = client.node_commands(name, &there.device, &there.private_key_file)?;
            return screen.print(&foreign, || render::cluster::recipe(&foreign));
        }
        NodeAction::Add { name, underlay, subnets, mac, public_key, there: _ } => (
            link::Request::NodeAdd {
                name: name.clone(),
                underlay: underlay.clone(),
                subnets: subnets.clone(),
                mac: mac.clone(),
                public_key: public_key.clone(),
            },
            format!("{name} is a member"),
        ),
        NodeAction::Drain { name } => (
            link::Request::NodeDrain { name: name.clone() },
            format!(
                "{name} is draining: others open no new flows to its services; `meshctl node undrain {name}` ends that"
            ),
        ),
        NodeAction::Undrain { name } => {
            (link::Request::NodeUndrain { name: name.clone() }, format!("{name} is drained no more"))
        }
        NodeAction::Remove { name } => (
            link::Request::NodeRemove { name: name.clone() },
            format!(
                "{name} is removed: nobody talks to it any more; to come back it needs a new token, or `meshctl node add` where meshd does not run"
            ),
        ),
    };
    let mut answer: Value = client.cluster(request)?;
    let mut recipe = String::new();
    if let NodeAction::Add { name, there, .. } = action {
        // it is a member by now, whatever becomes of the rest
        let foreign = client.node_commands(name, &there.device, &there.private_key_file).unwrap_or_else(|error| {
            let later = format!("what to run there is not known yet ({error}): try `meshctl node commands {name}`");
            ForeignView { name: name.clone(), commands: Vec::new(), notes: vec![later] }
        });
        recipe = format!("# To be run there, as root:\n{}", render::cluster::recipe(&foreign));
        if let Value::Object(fields) = &mut answer {
            fields.insert("commands".to_owned(), json!(foreign.commands));
            fields.insert("notes".to_owned(), json!(foreign.notes));
        }
    }
    screen.print(&answer, || {
        let subnets = answer.get("subnets").and_then(Value::as_array).into_iter().flatten();
        let subnets: Vec<&str> = subnets.filter_map(Value::as_str).collect();
        let subnets = if subnets.is_empty() { String::new() } else { format!(", with {}", subnets.join(" and ")) };
        // with a recipe all of it may be handed to a shell there
        let comment = if recipe.is_empty() { "" } else { "# " };
        format!("{comment}{done}{subnets}\n{recipe}")
    })
}

fn token(client: &Client, screen: &Screen, action: &TokenAction) -> anyhow::Result<()> {
    match action {
        TokenAction::Create { role, ttl: Lifetime(ttl), uses, node, print_join, print_script } => {
            let request = link::Request::TokenCreate {
                role: if role == "server" { Role::Server } else { Role::Agent },
                ttl: ttl.map(|ttl| ttl.as_secs()),
                uses: *uses,
                node: node.clone(),
            };
            let made: TokenMade = client.cluster(request)?;
            let print = match (print_join, print_script) {
                (true, _) => Some(("join", render::cluster::join_line(&made.token, role))),
                (_, true) => Some(("script", render::cluster::join_script(&made.token, role))),
                _ => None,
            };
            let mut document = json!(made);
            if let Some((key, text)) = &print {
                document[key] = json!(text);
            }
            screen.print(&document, || {
                print.as_ref().map_or_else(|| format!("{}\n", made.token), |(_, text)| text.clone())
            })
        }
        TokenAction::List => {
            let tokens: Vec<TokenView> = client.cluster(link::Request::TokenList)?;
            screen.print(&tokens, || render::cluster::tokens(&tokens, screen.look))
        }
        TokenAction::Revoke { id } => {
            let answer: Value = client.cluster(link::Request::TokenRevoke { id: id.clone() })?;
            let id = answer.get("id").and_then(Value::as_str).unwrap_or(id);
            screen.print(&answer, || format!("the token {id} is revoked: nobody joins with it any more\n"))
        }
    }
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
    on_signal(&INTERRUPTS, || std::process::exit(0))
}

/// Becomes true with Ctrl-C, or SIGTERM.
fn interrupted() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    on_signal(&INTERRUPTS, move || told.store(true, Ordering::Relaxed))?;
    Ok(stop)
}

const INTERRUPTS: [SignalKind; 2] = [SignalKind::interrupt(), SignalKind::terminate()];

/// With the first of these signals, once.
fn on_signal(kinds: &[SignalKind], then: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
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
