//! The daemon's command line: arguments, configuration, run; nothing else.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, Parser, Subcommand};

use meshd::config::load::{DEFAULT_PATH, LoadError, Loader};
use meshd::config::{Config, ConfigError, KEYS, NodeIp};
use meshd::control::nodes_file::{self, NoOwnEntry};
use meshd::control::source::{NodesFile, NodesFileError};

const FAILED: u8 = 1;
const USAGE: u8 = 2;

const EXAMPLES: &str = "\
Examples:
  meshd config check                        is /etc/meshd/config.yaml good?
  meshd run --nodes-file /etc/meshd/nodes.yaml --node-name a
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

Exit codes: 0 clean stop, 1 failure while running, 2 wrong usage or configuration.";

const CHECK_HELP: &str = "\
Checks what `meshd run` would start with: the file, the MESHD_ variables, and the nodes-file that they name. \
Says the line, the column and the fix for what is wrong. Changes nothing and needs no privileges.

Exit codes: 0 good, 2 not good.";

/// User-space VXLAN mesh: carries the traffic between nodes over one UDP port.
#[derive(Parser)]
#[command(name = "meshd", version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the data plane with the peers of a nodes-file
    #[command(after_help = RUN_HELP)]
    Run(Settings),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigVerb),
    /// Remove the device, routes and rules that a stopped meshd leaves on purpose
    Cleanup(Settings),
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

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Verb::Run(Settings(loader)) => run(loader),
        Verb::Config(ConfigVerb::Check { file }) => check(Loader { path: file, flags: Vec::new() }),
        Verb::Cleanup(Settings(loader)) => cleanup(loader),
    };
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
    block_on(meshd::daemon::run(config, loader))
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
    let Some(path) = &config.nodes_file else {
        println!("  no nodes-file, which `meshd run` needs");
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    runtime.block_on(work)
}

/// 2 for what a person has to mend in a file or on the command line, wherever it was noticed.
fn code(error: &anyhow::Error) -> u8 {
    let theirs = error.is::<NoNodesFile>()
        || error.is::<LoadError>()
        || error.is::<ConfigError>()
        || error.is::<NodesFileError>()
        || error.is::<NoOwnEntry>();
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
        Ok(Settings(Loader { path: matches.get_one::<PathBuf>("config").cloned(), flags }))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
