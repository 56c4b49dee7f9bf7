//! The etcd process: started, watched, started again; its log becomes part of ours.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::kept::{Kept, Member};
use super::{CLIENT_PORT, PEER_PORT, Phase};
use crate::membership::store::etcd::{Access, Gateway};

/// Where etcd may be when the environment does not say.
const FOLDERS: [&str; 5] = ["/usr/bin", "/usr/local/bin", "/bin", "/usr/sbin", "/opt/bin"];
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// One that ran for so long starts again without a pause.
const STEADY: Duration = Duration::from_secs(30);
/// A member that does not answer for so long, while it runs, hangs.
const HUNG: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_secs(5);
/// It ends by itself within so long, or is killed.
const ENDING: Duration = Duration::from_secs(5);

/// How the process fares.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Fare {
    /// What it last complained of, while it does not run.
    pub(super) problem: Option<String>,
    /// The others removed this member.
    pub(super) removed: bool,
}

/// The running process; it ends when this is dropped.
pub(super) struct Process {
    fare: watch::Receiver<Fare>,
    stop: watch::Sender<bool>,
    task: JoinSet<()>,
}

/// Finds etcd.
pub(super) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(FOLDERS.iter().map(PathBuf::from));
    folders.map(|folder| folder.join("etcd")).find(|file| file.is_file())
}

impl Process {
    pub(super) fn start(program: PathBuf, kept: Kept, member: Member) -> Self {
        let (told, fare) = watch::channel(Fare::default());
        let (stop, stopped) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(supervise(program, kept, member, told, stopped));
        Process { fare, stop, task }
    }

    pub(super) fn fare(&self) -> Fare {
        self.fare.borrow().clone()
    }

    /// Ends it, and waits until it has ended.
    pub(super) async fn stop(mut self) {
        self.stop.send_replace(true);
        while self.task.join_next().await.is_some() {}
    }
}

async fn supervise(
    program: PathBuf,
    kept: Kept,
    member: Member,
    told: watch::Sender<Fare>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let start = Instant::now();
        let mut child = match command(&program, &kept, &member).spawn() {
            Ok(child) => child,
            Err(error) => {
                tracing::warn!("etcd cannot be started: {error}");
                told.send_modify(|fare| fare.problem = Some(format!("{}: {error}", program.display())));
                tokio::time::sleep(LONGEST_PAUSE).await;
                continue;
            }
        };
        tracing::info!("etcd runs");
        let log = child.stderr.take();
        let ended = tokio::select! {
            ended = run(&mut child, log, &kept, &member, &told) => ended,
            () = told_to_stop(&mut stopped) => {
                end(&mut child).await;
                return;
            }
        };
        if told.borrow().removed {
            tracing::warn!("etcd ended, since its member was removed by the others");
            return;
        }
        tracing::warn!("etcd ended ({ended}); it starts again");
        if start.elapsed() >= STEADY {
            pause = FIRST_PAUSE;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = told_to_stop(&mut stopped) => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn told_to_stop(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// Until it ends, or is ended because it hangs.
async fn run(
    child: &mut Child,
    log: Option<impl AsyncRead + Unpin>,
    kept: &Kept,
    member: &Member,
    told: &watch::Sender<Fare>,
) -> String {
    let last = std::sync::Mutex::new(None);
    let logged = async {
        let Some(log) = log else { return std::future::pending().await };
        let mut lines = BufReader::new(log).split(b'\n');
        while let Ok(Some(line)) = lines.next_segment().await {
            if let Some(complaint) = fold(&String::from_utf8_lossy(&line)) {
                if complaint.contains("permanently removed") {
                    told.send_modify(|fare| fare.removed = true);
                }
                *last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(complaint);
            }
        }
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        ended = child.wait() => ended.map_or_else(|e| e.to_string(), |status| status.to_string()),
        () = hangs(kept, member, told) => {
            tracing::error!("etcd does not answer for {} s, so it is killed", HUNG.as_secs());
            let _ = child.kill().await;
            "it hung".to_owned()
        }
        () = logged => "unreachable".to_owned(),
    };
    let last = last.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let problem = last.map_or_else(|| ended.clone(), |last| format!("{ended}: {last}"));
    told.send_modify(|fare| fare.problem = Some(format!("etcd does not run ({problem})")));
    ended
}

/// Returns when it has answered nothing for too long. Until it has found a quorum only its peer port answers.
async fn hangs(kept: &Kept, member: &Member, told: &watch::Sender<Fare>) {
    let mut answered = Instant::now();
    let mut began = false;
    loop {
        tokio::time::sleep(LOOK).await;
        let Ok(tls) = kept.client() else { continue };
        let at = |port| {
            let endpoints = vec![(member.address.to_string(), port)];
            Gateway::new(Access { endpoints, tls: Some(tls.clone()), user: None })
        };
        if at(CLIENT_PORT).answers().await {
            (answered, began) = (Instant::now(), true);
            told.send_if_modified(|fare| fare.problem.take().is_some());
        } else if !began && at(PEER_PORT).is_there().await.is_ok() {
            answered = Instant::now();
        } else if answered.elapsed() >= HUNG {
            return;
        }
    }
}

async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed())) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    if tokio::time::timeout(ENDING, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

fn command(program: &Path, kept: &Kept, member: &Member) -> Command {
    // Through the sidecar's own program, which sees to it that etcd ends with the sidecar.
    // By this name, since an upgrade may have put another program in the place of this one.
    let own = "/proc/self/exe";
    let listen = if is_own(member.address) { member.address } else { unspecified(member.address) };
    let cluster: Vec<String> = member.cluster.iter().map(|(name, url)| format!("{name}={url}")).collect();
    let certificate = kept.certificate().display().to_string();
    let roots = kept.roots().display().to_string();
    let state = if member.cluster.len() == 1 { "new" } else { "existing" };
    let mut command = Command::new(own);
    // A variable of the environment would win over what is said here.
    command.env_clear().arg("run-etcd").arg(program).arg("--data-dir").arg(kept.data());
    let pairs = [
        ("--name", member.name.as_str()),
        ("--listen-client-urls", &super::kept::url(listen, CLIENT_PORT)),
        ("--advertise-client-urls", &member.client_url()),
        ("--listen-peer-urls", &super::kept::url(listen, PEER_PORT)),
        ("--initial-advertise-peer-urls", &member.peer_url()),
        ("--initial-cluster", &cluster.join(",")),
        ("--initial-cluster-state", state),
        ("--initial-cluster-token", &member.token),
        ("--cert-file", &certificate),
        ("--key-file", &certificate),
        ("--trusted-ca-file", &roots),
        ("--peer-cert-file", &certificate),
        ("--peer-key-file", &certificate),
        ("--peer-trusted-ca-file", &roots),
        ("--auto-compaction-mode", "periodic"),
        ("--auto-compaction-retention", "1h"),
        ("--logger", "zap"),
        ("--log-outputs", "stderr"),
    ];
    pairs.iter().for_each(|(flag, value)| {
        command.args([*flag, *value]);
    });
    command.args(["--client-cert-auth", "--peer-client-cert-auth"]);
    if member.phase == Phase::Resetting {
        command.arg("--force-new-cluster");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn is_own(address: IpAddr) -> bool {
    std::net::TcpListener::bind((address, 0)).is_ok()
}

fn unspecified(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    }
}

/// Takes a line of etcd's log into ours. What it says, where it is a complaint.
fn fold(line: &str) -> Option<String> {
    let Ok(Value::Object(fields)) = serde_json::from_str::<Value>(line) else {
        tracing::debug!("etcd: {line}");
        return None;
    };
    let text = |key: &str| fields.get(key).and_then(Value::as_str).unwrap_or_default();
    let mut message = text("msg").to_owned();
    for key in ["error", "reason", "remote-peer-id"] {
        if let Some(value) = fields.get(key) {
            message.push_str(&format!("; {key}: {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)));
        }
    }
    match text("level") {
        // What etcd finds normal matters to who looks for a fault, and what it warns of is mostly a slow disk or a peer
        // that is away, of which `cluster status` tells.
        "debug" | "info" => tracing::trace!("etcd: {message}"),
        "warn" => tracing::debug!("etcd: {message}"),
        _ => tracing::warn!("etcd: {message}"),
    }
    let removed = message.contains("permanently removed");
    (removed || !matches!(text("level"), "debug" | "info" | "warn")).then_some(message)
}
