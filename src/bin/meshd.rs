//! The daemon's command line: arguments, configuration, run; nothing else.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use meshd::config::load::{DEFAULT_PATH, DatastoreError, LoadError, Loader, TokenError};
use meshd::config::{self, Config, ConfigError, KEYS, NodeIp};
use meshd::control::nodes_file::{self, NoOwnEntry};
use meshd::control::source::{NodesFile, NodesFileError};
use meshd::daemon::{Join, Joined, ask, launcher};
use meshd::key::file::{BfdKeysError, load_bfd};
use meshd::key::{MAX_LANES, SecretKey};
use meshd::membership::record::Role;
use meshd::membership::settings::{Datastore, Secret};
use meshd::membership::store::check::Report;
use meshd::membership::token::PREFIX;

const FAILED: u8 = 1;
const USAGE: u8 = 2;

const EXAMPLES: &str = "\
Without a command, on a terminal: asks whether to join a cluster, and for what that needs.

Examples:
  meshd server                              the first node of a cluster
  MESHD_TOKEN=mesh1… meshd agent            joins it, with a token of `meshctl token create`
  meshd config check                        is /etc/meshd/config.yaml good?
  meshd datastore check                     can a server use the database of datastore-endpoint?
  meshd run --nodes-file /etc/meshd/nodes.yaml --node-name a     no servers, a list of nodes
  meshd run --config ./a.yaml --log debug   a flag wins over the file
  MESHD_PORT=4789 meshd run                 so does a variable; a flag wins over both
  meshd cleanup                             after the last stop, to leave no trace

A node list, with this node's own entry:
  nodes:
    - name: a
      underlay: 10.9.0.1
      subnets: [10.42.1.0/24]
    - name: b
      underlay: 10.9.0.2
      subnets: [10.42.2.0/24]

Exit codes: 0 clean stop (SIGTERM, SIGINT), 1 failure while running, 2 wrong usage or configuration.";

const RUN_HELP: &str = "\
Each flag is a key of the configuration file with two dashes, and an environment variable: `--node-name a`, \
`MESHD_NODE_NAME=a` and `node-name: a` say the same. A flag wins, then the variable, then the file. \
Lists are comma-separated or repeated flags.

SIGTERM and SIGINT stop it. The TUN device and an `unreachable` route for the mesh's prefixes stay behind, so that \
nothing leaves in clear by another way meanwhile; `meshd cleanup` removes them. SIGHUP reads the configuration again, \
and names what needs a restart. The nodes-file is read again by itself when it changes.

  meshd run --nodes-file /etc/meshd/nodes.yaml --node-name a

Exit codes: 0 clean stop, 1 failure while running, 2 wrong usage or configuration.";

const SERVER_HELP: &str = "\
A node that also serves the control plane, over HTTPS on port 9345. The first start makes the cluster: its authority, its \
state below `data-dir`, and a token for agents in <data-dir>/server/node-token. `meshctl token create` makes further ones.

  meshd server                                              with the defaults, in the foreground
  meshd server --cluster-cidr 10.42.0.0/16,fd42::/48        subnets of IPv6 as well
  MESHD_TOKEN=mesh1… meshd server                           one more server, with a token of the role `server`

Each flag is a key of the configuration file and an environment variable, as with `meshd run`.";

const AGENT_HELP: &str = "\
Joins a cluster with the token that `meshctl token create` on a server prints, or with a shared secret and `--server`. \
It waits and tries again while no server answers. A node that has joined needs neither token nor server again: it starts \
by the node list that it has kept, also without any server.

  MESHD_TOKEN=mesh1… meshd agent                            what `meshctl token create --print-join` prints
  meshd agent --token-file /etc/meshd/token --node-ip eth1  the underlay is at eth1

A token on the command line can be read by every user of this machine: MESHD_TOKEN or `--token-file` keep it apart.

Each flag is a key of the configuration file and an environment variable, as with `meshd run`.";

const DATASTORE_HELP: &str = "\
Connects as `meshd server` would, and looks: address, login, rights, encryption, format of the tables. Changes nothing. What \
is missing is printed as what to run in the database, such as a GRANT.

  MESHD_DATASTORE_ENDPOINT=mysql://mesh@db.example/meshd meshd datastore check --datastore-password-file /etc/meshd/db

Exit codes: 0 a server can use it, 1 it cannot, 2 wrong usage or configuration.";

const CLEANUP_HELP: &str = "\
Removes the device that `tun` names where meshd made it, the routes that meshd left, and what it wrote by `cni-conf-dir` and \
`subnet-file`; nothing else. Refused while meshd runs.

  meshd cleanup                  after the last stop
  meshd cleanup --tun mesh1      where `tun: mesh1` was set by a flag

Exit codes: 0 nothing of meshd's is left, 1 it failed, 2 wrong usage or configuration.";

const CHECK_HELP: &str = "\
Checks what meshd would start with: the file, the MESHD_ variables, and the nodes-file that they name. \
Says the line, the column and the fix for what is wrong. Changes nothing and needs no privileges.

Exit codes: 0 good, 2 not good.";

const KEYGEN_HELP: &str = "\
Prints a new private key on standard output and its public key on standard error, so that this keeps the one and shows \
the other:

  (umask 077; meshd keygen > /var/lib/meshd/node.key)

The public key goes into the node list, as `public-key` of this node's entry. With --lanes N the public keys of N - 1 \
further lanes follow, one a line, for `lane-keys`: sessions of their own between two meshd nodes, so that several \
workers encrypt for one peer. They follow from the same private key; give as many lanes as the node has workers.";

const SELFTEST_HELP: &str = "\
Carries real TCP and UDP of this kernel's through a TUN device, the engine and UDP sockets, with all offloads that the \
kernel offers, and compares every byte: an offload that is offered may still be a lie. Needs root (a network namespace of \
its own); nothing outside of that is touched, also while meshd runs. What the network card does is not seen here.

ok: works. off: does not, and meshd does without. BAD: meshd does not run here.

Exit codes: 0 meshd runs here, 1 it does not.";

/// User-space VXLAN mesh: carries the traffic between nodes over one UDP port.
#[derive(Parser)]
#[command(name = "meshd", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// A node that also serves the control plane
    #[command(after_help = SERVER_HELP)]
    Server(Settings),
    /// A node that joins a cluster
    #[command(after_help = AGENT_HELP)]
    Agent(Settings),
    /// Run the data plane with the peers of a nodes-file
    #[command(after_help = RUN_HELP)]
    Run(Settings),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigVerb),
    /// Look at where a server's state is to be stored
    #[command(subcommand)]
    Datastore(DatastoreVerb),
    /// Make a key for WireGuard: private on stdout, public on stderr
    #[command(after_help = KEYGEN_HELP)]
    Keygen {
        /// Public keys to print, one a lane
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=MAX_LANES as i64))]
        lanes: u8,
    },
    /// Try out what kernel, offloads and permissions allow here, in a throw-away network namespace
    #[command(after_help = SELFTEST_HELP)]
    Selftest {
        /// One JSON document instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Remove the device, routes and rules that a stopped meshd leaves on purpose
    #[command(after_help = CLEANUP_HELP)]
    Cleanup(Settings),
    /// Starts and ends mesh-sidecar for a meshd
    #[command(hide = true, name = launcher::VERB)]
    Launcher,
    /// Write man pages and shell completions
    #[command(hide = true)]
    Manual {
        /// Where to
        folder: PathBuf,
    },
}

#[derive(Subcommand)]
enum ConfigVerb {
    /// Say what is wrong, where, and how to mend it
    #[command(after_help = CHECK_HELP)]
    Check {
        /// Configuration file [default: /etc/meshd/config.yaml]
        file: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
enum DatastoreVerb {
    /// Say whether a server could use it, and what to run where it could not
    #[command(after_help = DATASTORE_HELP)]
    Check {
        /// One JSON document
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        settings: Settings,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        None => return bare(),
        Some(Verb::Server(Settings(loader))) => member(Role::Server, loader, true),
        Some(Verb::Agent(Settings(loader))) => member(Role::Agent, loader, true),
        Some(Verb::Run(Settings(loader))) => run(loader),
        Some(Verb::Config(ConfigVerb::Check { file })) => check(Loader { path: file, ..Loader::default() }),
        Some(Verb::Datastore(DatastoreVerb::Check { json, settings })) => return datastore_check(json, settings.0),
        Some(Verb::Keygen { lanes }) => keygen(lanes),
        Some(Verb::Selftest { json }) => return selftest(json),
        Some(Verb::Cleanup(Settings(loader))) => cleanup(loader),
        Some(Verb::Launcher) => launcher::run(),
        Some(Verb::Manual { folder }) => meshd::manual::write(Cli::command(), &folder).map_err(Into::into),
    };
    exit(done)
}

fn exit(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meshd: {}", meshd::daemon::told(&error));
            ExitCode::from(code(&error))
        }
    }
}

fn run(loader: Loader) -> anyhow::Result<()> {
    let config = loader.load()?;
    notice(&config);
    if config.nodes_file.is_none() {
        return Err(anyhow::Error::new(NoNodesFile { path: loader.path().to_owned() }));
    }
    block_on(meshd::daemon::run(config, loader, None))
}

/// Without a word on the command line: questions for who can answer them, else the usage.
fn bare() -> ExitCode {
    let configured = std::path::Path::new(DEFAULT_PATH).exists();
    let joined = Loader::default().load().ok().and_then(|config| meshd::daemon::joined(&config.data_dir));
    if configured || joined.is_some() || !ask::is_possible() {
        eprint!("{}", Cli::command().render_help());
        match joined {
            Some(joined) => eprintln!(
                "\nThis machine is a node of a cluster already: `meshd {}` starts it again.",
                joined.role.unwrap_or(Role::Agent).name()
            ),
            None if configured => {
                eprintln!("\n{DEFAULT_PATH} is there: start `meshd server`, `meshd agent` or `meshd run` by it.");
            }
            None => {}
        }
        return ExitCode::from(USAGE);
    }
    exit(ask::ask().and_then(|(role, loader)| member(role, loader, false)))
}

/// `shown`: flags are on the command line, where others see them.
fn member(role: Role, mut loader: Loader, shown: bool) -> anyhow::Result<()> {
    let mut config = loader.load()?;
    notice(&config);
    if shown && loader.flags.iter().any(|(key, _)| key == "token") {
        eprintln!(
            "meshd: every user of this machine can read `--token` in the list of processes; use MESHD_TOKEN or --token-file"
        );
    }
    let joined = meshd::daemon::joined(&config.data_dir);
    if let Some(Joined { name, role: was }) = &joined {
        if let Some(was) = was.filter(|was| *was != role) {
            return Err(
                NotItself::Role { was: was.name(), wanted: role.name(), data_dir: config.data_dir.clone() }.into()
            );
        }
        if let Some(name) = name.as_ref().filter(|name| **name != config.node_name.as_str()) {
            if config.says_node_name() {
                return Err(NotItself::Name { was: name.clone(), wanted: config.node_name.to_string() }.into());
            }
            eprintln!(
                "meshd: the machine is called {} now; the node goes on as {name}, as it joined",
                config.node_name
            );
            loader.name = Some(name.clone());
            config = loader.load()?;
        }
    }
    let joined = joined.is_some();
    let token = match config::load::token(&config) {
        Ok(token) => token,
        Err(error) if joined => {
            eprintln!("meshd: {error}; this node has joined already, so it goes on without");
            None
        }
        Err(error) => return Err(error.into()),
    };
    if joined && (token.is_some() || !config.servers.is_empty()) {
        eprintln!(
            "meshd: this node has joined already: `token` and `server` are not needed, and ignored, but that `server` is asked \
             where the servers that it knows do not answer; `meshctl leave` comes first to join another cluster"
        );
    } else if !joined {
        needs(role, token.as_ref(), &config)?;
    }
    let datastore = match role {
        Role::Server => config::load::datastore(&config)?,
        _ => Datastore::default(),
    };
    // before there is a second thread, and while there are all privileges
    let launcher = launcher::Launcher::start(&config.data_dir).context("cannot start the launcher of mesh-sidecar")?;
    block_on(meshd::daemon::run(config, loader, Some(Join { role, token, datastore: datastore.into(), launcher })))
}

/// What is missing for a first join. A server with neither makes a cluster of its own.
fn needs(role: Role, token: Option<&Secret>, config: &Config) -> Result<(), Missing> {
    let whole = token.is_some_and(|token| token.reveal().starts_with(PREFIX));
    let shared = config.datastore_endpoint.as_ref().is_some_and(|e| !e.reveal().starts_with("sqlite:"));
    match (token, config.servers.is_empty()) {
        (None, true) if role == Role::Server => Ok(()),
        (None, true) => Err(Missing::Both),
        // the database is what lets a server in
        (None, false) if role == Role::Server && shared => Ok(()),
        (None, false) => Err(Missing::Token),
        // a server's own shared secret, with which its agents will join
        (Some(_), true) if !whole && role != Role::Server => Err(Missing::Server),
        _ => Ok(()),
    }
}

fn keygen(lanes: u8) -> anyhow::Result<()> {
    let key = SecretKey::generate().context("cannot make a key")?;
    // what cannot be kept must not be named either
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", *key.to_base64()).and_then(|()| out.flush()).context("cannot write the private key")?;
    for lane in 0..lanes {
        eprintln!("{}", key.lane(lane).public());
    }
    Ok(())
}

fn selftest(json: bool) -> ExitCode {
    let report = meshd::selftest::run();
    let text = if json { serde_json::to_string(&report).unwrap_or_default() + "\n" } else { report.to_string() };
    let written = std::io::stdout().write_all(text.as_bytes());
    ExitCode::from(if report.good && written.is_ok() { 0 } else { FAILED })
}

fn datastore_check(json: bool, loader: Loader) -> ExitCode {
    let report = loader.load().map_err(anyhow::Error::new).and_then(|config| {
        notice(&config);
        let datastore = config::load::datastore(&config)?;
        let default = config.data_dir.join(meshd::membership::sidecar::DATABASE);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(meshd::membership::store::check::check(&datastore, &default)))
    });
    let report = match report {
        Ok(report) => report,
        Err(error) => return exit(Err(error)),
    };
    let text = if json { serde_json::to_string_pretty(&report).unwrap_or_default() } else { told_of(&report) };
    // who does not read on has seen enough
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    if report.ok { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

fn told_of(report: &Report) -> String {
    let mut lines = vec![format!("{}: {}", report.datastore, if report.ok { "ok" } else { "not usable" })];
    lines.extend(report.server.as_ref().map(|server| format!("  server     {server}")));
    lines.extend(report.encrypted.map(|yes| format!("  encrypted  {}", if yes { "yes" } else { "no" })));
    lines.extend(report.format.map(|format| match format {
        0 => "  tables     none yet; the first server makes them".to_owned(),
        format => format!("  tables     format {format}"),
    }));
    for finding in &report.findings {
        lines.push(format!("  {}: {}", if finding.warning { "warning" } else { "missing" }, finding.problem));
        lines.push(format!("    {}", finding.fix));
    }
    lines.join("\n")
}

fn cleanup(loader: Loader) -> anyhow::Result<()> {
    let config = loader.load()?;
    notice(&config);
    block_on(meshd::daemon::cleanup(config))
}

fn check(loader: Loader) -> anyhow::Result<()> {
    let config = loader.load()?;
    notice(&config);
    let file = loader.path().display();
    if loader.path.is_none() && !loader.path().exists() {
        println!("{file}: not there, so the defaults apply");
    } else {
        println!("{file}: ok");
    }
    println!("  {}", summary(&config));
    if let Some(path) = &config.bfd_auth_key_file {
        println!("{}: ok, with the keys {}", path.display(), load_bfd(path)?);
    }
    let Some(path) = &config.nodes_file else {
        println!("  no nodes-file, which `meshd run` needs; `meshd server` and `meshd agent` need none");
        return Ok(());
    };
    let list = NodesFile::new(path, config.port).load()?;
    let own = nodes_file::own(&list, &config.node_name).with_context(|| path.display().to_string())?;
    println!("{}: ok", path.display());
    let subnets: usize = list.nodes.iter().map(|n| n.subnets.len()).sum();
    let underlay: Vec<String> = own.underlay.iter().map(ToString::to_string).collect();
    println!(
        "  {} nodes with {subnets} subnets; this is {}, at {}",
        list.nodes.len(),
        own.name,
        underlay.join(" and ")
    );
    Ok(())
}

fn summary(config: &Config) -> String {
    let node_ip = match &config.node_ip {
        NodeIp::Auto => "the default route's interface".to_owned(),
        NodeIp::Given(specs) => specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "),
    };
    format!(
        "node {}, underlay {node_ip}, device {}, UDP port {}, VNI {}",
        config.node_name,
        config.tun,
        config.port,
        config.vni.get()
    )
}

fn notice(config: &Config) {
    for notice in config.notices() {
        eprintln!("meshd: {notice}");
    }
}

fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_start(meshd::daemon::settle)
        .build()
        .context("cannot start tokio")?;
    runtime.block_on(work)
}

/// 2 for what a person has to mend in a file or on the command line, wherever it was noticed.
fn code(error: &anyhow::Error) -> u8 {
    let theirs = error.is::<NoNodesFile>()
        || error.is::<LoadError>()
        || error.is::<ConfigError>()
        || error.is::<NodesFileError>()
        || error.is::<NoOwnEntry>()
        || error.is::<TokenError>()
        || error.is::<BfdKeysError>()
        || error.is::<DatastoreError>()
        || error.is::<Missing>()
        || error.is::<NotItself>();
    if theirs { USAGE } else { FAILED }
}

#[derive(Debug, thiserror::Error)]
#[error(
    "nobody says who the peers are: write a node list and set `nodes-file` in {}, or give --nodes-file FILE \
     (`meshd --help` shows one)",
    path.display()
)]
struct NoNodesFile {
    path: PathBuf,
}

/// What is started is not the node whose data directory it is.
#[derive(Debug, thiserror::Error)]
enum NotItself {
    #[error(
        "the node of {} is a member of a cluster as `{was}`, so start `meshd {was}`; to make it `{wanted}`, have it leave \
         first (`meshctl leave`), and join again",
        data_dir.display()
    )]
    Role { was: &'static str, wanted: &'static str, data_dir: PathBuf },
    #[error(
        "this node joined as `{was}`, so `node-name` cannot be `{wanted}`: set it back, or remove it; for another name, have it \
         leave first (`meshctl leave`), and join again"
    )]
    Name { was: String, wanted: String },
}

/// What a node cannot join without.
#[derive(Debug, thiserror::Error)]
enum Missing {
    #[error(
        "this node is no member yet, and there is nothing to join with: `meshctl token create` on a server prints a token; \
         set MESHD_TOKEN to it, or give --token-file FILE (`meshd server` starts a new cluster)"
    )]
    Both,
    #[error(
        "`server` alone lets nobody in: `meshctl token create` on a server prints a token; set MESHD_TOKEN to it, or give \
         --token-file FILE"
    )]
    Token,
    #[error(
        "`token` is a shared secret, which does not say where the cluster is: give --server https://HOST:9345 with it"
    )]
    Server,
}

/// `--config`, and a flag for each key of the configuration: the same table as the file's, so that none is missing.
struct Settings(Loader);

impl Args for Settings {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help(format!("Configuration file [default: {DEFAULT_PATH}, which may be missing]"));
        KEYS.iter().fold(command.arg(config), |command, key| {
            let arg = Arg::new(key.name)
                .long(key.name)
                .value_name(key.value)
                .action(if key.list { ArgAction::Append } else { ArgAction::Set })
                // So that `--port -1` is a wrong port, and not an unknown flag.
                .allow_negative_numbers(true)
                .help(format!("{} [default: {}]", key.help, key.default))
                .help_heading("Configuration keys");
            // `--cluster-init` alone is what others' users are used to
            let arg = if key.value == "true|false" { arg.num_args(0..=1).default_missing_value("true") } else { arg };
            command.arg(arg)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Settings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Vec::new();
        for key in KEYS {
            let given = matches.get_many::<String>(key.name).into_iter().flatten();
            flags.extend(given.map(|value| (key.name.to_owned(), value.clone())));
        }
        Ok(Settings(Loader { path: matches.get_one::<PathBuf>("config").cloned(), flags, name: None }))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
