//! The command line: what can be asked, and the help that teaches it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;
use meshd::admin::units;
use meshd::control::foreign;
use meshd::node::DEFAULT_PORT;

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
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// meshd's admin socket [default: $MESHD_SOCKET, or /run/meshd/meshd.sock]
    #[arg(long, global = true, value_name = "PATH", display_order = 900)]
    pub(crate) socket: Option<PathBuf>,
    /// One JSON document (with --watch: one a line) instead of a table
    #[arg(long, global = true, display_order = 901)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
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
pub(crate) struct WhyArgs {
    /// An IPv4 or IPv6 address, or a node's name
    #[arg(value_name = "DST")]
    pub(crate) destination: String,
    /// The flow's protocol [default: an ICMP echo]
    #[arg(long, value_parser = ["tcp", "udp"], requires_all = ["sport", "dport"])]
    pub(crate) proto: Option<String>,
    /// The flow's source port
    #[arg(long, value_name = "PORT", requires = "proto")]
    pub(crate) sport: Option<u16>,
    /// The flow's destination port
    #[arg(long, value_name = "PORT", requires = "proto")]
    pub(crate) dport: Option<u16>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyAction {
    /// Print the public key, and nothing else
    Show,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeAction {
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
pub(crate) struct There {
    /// What the interface there is to be called
    #[arg(long, value_name = "NAME", default_value = foreign::DEVICE)]
    pub(crate) device: String,
    /// Where a WireGuard peer's private key lies there
    #[arg(long, value_name = "PATH", default_value = foreign::PRIVATE_KEY_FILE)]
    pub(crate) private_key_file: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenAction {
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
pub(crate) enum ClusterAction {
    /// Servers, datastore, how many may fail
    Status,
    /// Who reaches whom, with round trip and loss, as the nodes themselves say
    Matrix,
    /// Who made, used and revoked tokens, who joined, was refused, removed, and went: the last 1,000 lines (on a server)
    Audit,
}

/// How long a token lives; `None` is for ever.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lifetime(pub(crate) Option<Duration>);

pub(crate) fn lifetime(text: &str) -> Result<Lifetime, String> {
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

pub(crate) fn underlay(text: &str) -> Result<SocketAddr, String> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let with_port = |ip: IpAddr| SocketAddr::new(ip, DEFAULT_PORT);
    text.parse().or_else(|_| bare.parse().map(with_port)).map_err(|_| {
        "write an IP address, or one with a port: `10.9.0.1`, `10.9.0.1:8472`, `[fd00::1]:8472`".to_owned()
    })
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodesAction {
    /// Let a node list through that meshd holds back since it removes more than half of the peers
    Accept,
}
