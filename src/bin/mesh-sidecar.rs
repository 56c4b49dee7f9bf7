//! The sidecar's command line: `meshd` starts it without arguments; people use it for backups.

use std::io::{IsTerminal, Read, stderr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use meshd::membership::settings::{LINK_FD, LogFormat, Settings};
use meshd::membership::store::sqlite;
use meshd::membership::{etcd, privileges, sidecar};

/// The largest settings.
const MAX_SETTINGS: usize = 1 << 20;

const HELP: &str = "\
Examples:
  mesh-sidecar backup mesh.backup      on a server that runs; the file holds the cluster's keys
  mesh-sidecar restore mesh.backup     with meshd stopped on all servers
  mesh-sidecar cluster-reset           most servers are lost: this one goes on alone";

/// Membership for meshd, which starts it by itself. Without a command it expects meshd on its standard input.
#[derive(Parser)]
#[command(name = "mesh-sidecar", version, after_help = HELP)]
struct Cli {
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Write a copy of all that a server keeps of the cluster, while it runs. It holds the cluster's keys: keep it safe
    Backup {
        /// The server's data-dir
        #[arg(long, value_name = "DIR", default_value = "/var/lib/meshd")]
        data_dir: PathBuf,
        /// The file to write; it must not exist
        file: PathBuf,
    },
    /// After a loss of the quorum: make this server's etcd the only member, with all that it has. Stop meshd on all servers
    /// first; start this one, then the others, which join it again by themselves
    ClusterReset {
        /// The server's data-dir
        #[arg(long, value_name = "DIR", default_value = "/var/lib/meshd")]
        data_dir: PathBuf,
        /// Also while other servers of the cluster still answer
        #[arg(long)]
        force: bool,
    },
    /// Runs etcd, for as long as the sidecar runs
    #[command(hide = true)]
    RunEtcd {
        /// etcd and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Put such a copy in the place of what a server keeps. Stop meshd on all servers first
    Restore {
        /// The server's data-dir
        #[arg(long, value_name = "DIR", default_value = "/var/lib/meshd")]
        data_dir: PathBuf,
        /// Also while other servers of the cluster still answer
        #[arg(long)]
        force: bool,
        /// What `mesh-sidecar backup` wrote
        file: PathBuf,
    },
    /// Write man pages and shell completions
    #[command(hide = true)]
    Manual {
        /// Where to
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        None => run(),
        Some(Verb::RunEtcd { command }) => run_etcd(&command),
        Some(Verb::Manual { folder }) => meshd::manual::write(Cli::command(), &folder).map_err(Into::into),
        Some(Verb::ClusterReset { data_dir, force }) => cluster_reset(&data_dir, force),
        Some(Verb::Backup { data_dir, file }) if etcd::tools::is_here(&data_dir) => {
            block_on(async { Ok(etcd::tools::backup(&data_dir, &file).await?) }).map(|()| written(&file))
        }
        Some(Verb::Restore { data_dir, file, force }) if etcd::tools::is_here(&data_dir) => {
            block_on(async { Ok(etcd::tools::restore(&data_dir, &file, force).await?) }).and_then(|()| {
                eprintln!("mesh-sidecar: start meshd here and, once `meshctl cluster status` answers, on the other servers: they join this one again");
                give(&data_dir.join("server"))
            })
        }
        Some(Verb::Backup { data_dir, .. } | Verb::Restore { data_dir, .. })
            if sidecar::elsewhere(&data_dir).is_some() =>
        {
            let place = sidecar::elsewhere(&data_dir).unwrap_or_default();
            Err(anyhow::anyhow!(
                "this server's state is in {place}, not in its data-dir: back that up and restore it with its own tools \
                 (`mysqldump --single-transaction`, `pg_dump`), while no server runs that uses it"
            ))
        }
        Some(Verb::Backup { data_dir, file }) => {
            block_on(async { Ok(sqlite::backup(&data_dir.join(sidecar::DATABASE), &file).await?) })
                .map(|()| written(&file))
        }
        Some(Verb::Restore { data_dir, file, .. }) => restore(&data_dir, &file),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-sidecar: {}", meshd::daemon::told(&error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let mut link = UnixStream::from(link()?);
    let settings = settings(&mut link)?;
    start_log(&settings);
    // Before there is a second thread: privileges belong to threads.
    if let Some(warning) = privileges::drop_all(&settings.data_dir)? {
        tracing::warn!("{warning}");
    }
    link.set_nonblocking(true)?;
    block_on(async { Ok(sidecar::run(settings, tokio::net::UnixStream::from_std(link)?).await?) })
}

fn written(file: &std::path::Path) {
    eprintln!("mesh-sidecar: wrote {}, which holds the cluster's keys: keep it as secret as those", file.display());
}

fn restore(data_dir: &std::path::Path, file: &std::path::Path) -> anyhow::Result<()> {
    let database = data_dir.join(sidecar::DATABASE);
    let folder = database.parent().unwrap_or(data_dir);
    meshd::membership::files::ensure_dir(folder)?;
    let cluster = sidecar::served(data_dir)?;
    let restored = block_on(async { Ok(sqlite::restore(file, &database, cluster.as_deref()).await?) })?;
    give(folder)?;
    let as_of =
        restored.as_of.map(|at| format!(" as of {}", meshd::membership::clock::rfc3339(at))).unwrap_or_default();
    let former = restored.former.map(|path| format!("; what was there before is {} now", path.display()));
    eprintln!(
        "mesh-sidecar: restored{as_of}{}. What was changed later is as it was then: who was removed since is a member again, and \
         tokens made since are none (`meshctl cluster audit`). Start meshd again",
        former.unwrap_or_default()
    );
    Ok(())
}

/// Run by root, it must stay readable for the sidecar's account.
fn give(folder: &std::path::Path) -> anyhow::Result<()> {
    use std::os::unix::fs::{MetadataExt, lchown};
    let owner = folder.metadata()?;
    for entry in folder.read_dir()? {
        let entry = entry?;
        // not through a link, which that account can put there
        let kind = entry.file_type()?;
        if (kind.is_file() || kind.is_dir()) && entry.metadata()?.uid() != owner.uid() {
            lchown(entry.path(), Some(owner.uid()), Some(owner.gid()))?;
        }
        if kind.is_dir() {
            give(&entry.path())?;
        }
    }
    Ok(())
}

fn cluster_reset(data_dir: &std::path::Path, force: bool) -> anyhow::Result<()> {
    block_on(async { Ok(etcd::tools::reset(data_dir, force).await?) })?;
    eprintln!(
        "mesh-sidecar: start meshd here and, once `meshctl cluster status` answers, on the other servers: they join this one again"
    );
    give(&data_dir.join("server"))
}

/// Becomes etcd, which then ends when the sidecar does, however that ends.
fn run_etcd(command: &[std::ffi::OsString]) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt;
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    if rustix::process::getppid() != parent {
        bail!("the sidecar has ended");
    }
    let (program, arguments) = command.split_first().context("no program")?;
    Err(std::process::Command::new(program).args(arguments).exec().into())
}

/// The socket to meshd.
fn link() -> anyhow::Result<OwnedFd> {
    let fd = match std::env::var(LINK_FD) {
        Ok(number) => {
            let number: i32 = number.parse().with_context(|| format!("{LINK_FD} is not a descriptor"))?;
            let own = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())?;
            let flags = rustix::process::PidfdGetfdFlags::empty();
            rustix::process::pidfd_getfd(own, number, flags).with_context(|| format!("{LINK_FD}={number}"))?
        }
        Err(_) => std::io::stdin().as_fd().try_clone_to_owned()?,
    };
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    if kind != rustix::fs::FileType::Socket {
        bail!("meshd starts this by itself; run `meshd server` or `meshd agent`");
    }
    Ok(fd)
}

/// The first line, byte by byte, so that nothing behind it is taken.
fn settings(link: &mut UnixStream) -> anyhow::Result<Settings> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < MAX_SETTINGS {
        match link.read(&mut byte).context("cannot read the settings from meshd")? {
            0 => bail!("meshd closed the link before it sent the settings"),
            _ if byte == *b"\n" => {
                return serde_json::from_slice(&line).context("meshd sent no settings; are both of the same version?");
            }
            _ => line.extend(byte),
        }
    }
    bail!("meshd sent settings without end")
}

fn start_log(settings: &Settings) {
    let filter = EnvFilter::try_new(&settings.log).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr).with_target(false);
    let started = match settings.log_format {
        LogFormat::Text => log.with_ansi(stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().try_init(),
    };
    if let Err(error) = started {
        eprintln!("mesh-sidecar: no log: {error}");
    }
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(work)
}
