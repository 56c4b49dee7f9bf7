//! Starts and ends `mesh-sidecar` for a meshd that has given up what that takes.
//!
//! Owns the one process that keeps privileges: `mesh-launcher`, meshd's own program once more, which is started first of all,
//! starts and ends the sidecar beside that program when meshd says so, and ends with meshd. It reads single bytes and a
//! descriptor from meshd, and nothing from anybody else. When the sidecar is to run is `supervisor`'s.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::{membership, privileges};
use crate::membership::settings::LINK_FD;

/// The word that makes a meshd the launcher.
pub const VERB: &str = "launcher";
/// The sidecar's program, beside meshd's own or else in `PATH`.
pub(super) const PROGRAM: &str = "mesh-sidecar";
/// The variable that names the data-dir, as for meshd itself.
const DATA_DIR: &str = "MESHD_DATA_DIR";
/// Its own name in process lists.
const NAME: &std::ffi::CStr = c"mesh-launcher";
/// How long the sidecar may take to end by itself once its link is closed.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// Commands of one byte. With the first comes the sidecar's end of its link.
const START: u8 = b's';
const KILL: u8 = b'k';
const FORGET: u8 = b'f';

/// What the launcher says, a line each.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Started,
    Failed(String),
    Ended(String),
    Forgotten(Vec<String>),
}

/// The launcher, as meshd has it. It ends when this is dropped.
#[derive(Debug)]
pub struct Launcher(std::os::unix::net::UnixStream);

impl Launcher {
    /// Starts it. To be called while meshd has all its privileges.
    pub fn start(data_dir: &Path) -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        std::process::Command::new("/proc/self/exe")
            .arg0("mesh-launcher")
            .arg(VERB)
            .env(DATA_DIR, std::path::absolute(data_dir)?)
            .env_remove("MESHD_TOKEN")
            .env_remove(LINK_FD)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // Ctrl-C is for meshd
            .process_group(0)
            .spawn()?;
        Ok(Launcher(ours))
    }

    /// To be called within a runtime.
    pub(super) fn connect(self) -> io::Result<Launching> {
        self.0.set_nonblocking(true)?;
        Ok(Launching::new(UnixStream::from_std(self.0)?))
    }
}

/// The launcher, and what it says.
pub(super) struct Launching {
    write: OwnedWriteHalf,
    replies: Lines<BufReader<OwnedReadHalf>>,
    /// How the sidecar ended, once it has.
    ended: Option<String>,
}

impl Launching {
    fn new(socket: UnixStream) -> Self {
        let (read, write) = socket.into_split();
        Launching { write, replies: BufReader::new(read).lines(), ended: None }
    }

    /// One that is a task of this process, for tests.
    #[cfg(test)]
    pub(super) fn within(program: PathBuf, data_dir: PathBuf) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(serve(theirs, program, data_dir));
        Self::new(ours)
    }

    /// Starts a sidecar, whose predecessor has ended, and gives it the descriptor as its standard input.
    pub(super) async fn launch(&mut self, link: OwnedFd) -> Result<(), String> {
        self.ended = None;
        let links = [link.as_fd()];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut room);
        with.push(SendAncillaryMessage::ScmRights(&links));
        let socket: &UnixStream = self.write.as_ref();
        // there is room for a single byte: every command before has been read
        let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&[START])], &mut with, SendFlags::NOSIGNAL);
        sent.map_err(|_| gone())?;
        match self.reply().await {
            Some(Reply::Started) => Ok(()),
            Some(Reply::Failed(why)) => Err(why),
            _ => Err(gone()),
        }
    }

    /// How the sidecar ended, once it has. May be dropped and asked again.
    pub(super) async fn ended(&mut self) -> String {
        if let Some(how) = &self.ended {
            return how.clone();
        }
        let how = match self.reply().await {
            Some(Reply::Ended(how)) => how,
            _ => gone(),
        };
        self.ended.insert(how).clone()
    }

    /// Ends the sidecar at once.
    pub(super) async fn kill(&mut self) {
        self.write.write_all(&[KILL]).await.ok();
    }

    /// Removes what this node knows of its cluster. What could not be removed, in words.
    pub(super) async fn forget(&mut self) -> Vec<String> {
        self.write.write_all(&[FORGET]).await.ok();
        match self.reply().await {
            Some(Reply::Forgotten(problems)) => problems,
            _ => vec![gone()],
        }
    }

    async fn reply(&mut self) -> Option<Reply> {
        let line = self.replies.next_line().await.ok().flatten()?;
        serde_json::from_str(&line).ok()
    }
}

fn gone() -> String {
    "meshd's mesh-launcher has ended, without which no mesh-sidecar can be started: restart meshd".to_owned()
}

/// Is the launcher, until meshd ends.
pub fn run() -> anyhow::Result<()> {
    let data_dir = std::env::var_os(DATA_DIR).context("meshd starts this by itself")?;
    nix::sys::prctl::set_name(NAME)?;
    privileges::of_launcher()?;
    let socket = std::os::unix::net::UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // what is meant for meshd, such as a signal to a whole group, is not for whoever ends with it
        let _deaf = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        serve(UnixStream::from_std(socket)?, program(), data_dir.into()).await;
        Ok(())
    })
}

/// Beside meshd's own program where there is one: both come out of one release.
fn program() -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(|folder| folder.join(PROGRAM));
    beside.filter(|path| path.exists()).unwrap_or_else(|| PROGRAM.into())
}

/// Does what it is told until the other end is closed.
async fn serve(socket: UnixStream, program: PathBuf, data_dir: PathBuf) {
    let mut sidecar: Option<Child> = None;
    loop {
        let reply = tokio::select! {
            command = receive(&socket) => match command {
                Ok((START, Some(link))) => match spawn(&program, link) {
                    Ok(child) => {
                        sidecar = Some(child);
                        Reply::Started
                    }
                    Err(error) => {
                        let program = program.display();
                        Reply::Failed(format!("cannot start {program}: {error}; it belongs beside meshd's own program"))
                    }
                },
                Ok((KILL, _)) => {
                    if let Some(child) = &mut sidecar {
                        child.start_kill().ok();
                    }
                    continue;
                }
                Ok((FORGET, _)) => Reply::Forgotten(membership::forget(&data_dir)),
                _ => break,
            },
            how = ended(&mut sidecar) => {
                sidecar = None;
                Reply::Ended(how)
            }
        };
        let line = serde_json::to_string(&reply).unwrap_or_default() + "\n";
        let mut left = line.as_bytes();
        while !left.is_empty() {
            let written = socket.async_io(Interest::WRITABLE, || socket.try_write(left)).await;
            match written {
                Ok(n) => left = left.get(n..).unwrap_or_default(),
                Err(_) => break,
            }
        }
    }
    if let Some(mut child) = sidecar
        && timeout(PATIENCE, child.wait()).await.is_err()
    {
        child.kill().await.ok();
    }
}

/// A command, and what came with it.
async fn receive(socket: &UnixStream) -> io::Result<(u8, Option<OwnedFd>)> {
    let take = || {
        let mut byte = [0];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = RecvAncillaryBuffer::new(&mut room);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut with, flags)?;
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let links = with.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut links) => links.next(),
            _ => None,
        });
        Ok((byte[0], links.last()))
    };
    socket.async_io(Interest::READABLE, take).await
}

/// The sidecar, with its end of the link as its standard input. It is ended with `Child`, and ends by itself when the link
/// is closed.
fn spawn(program: &Path, link: OwnedFd) -> io::Result<Child> {
    Command::new(program)
        .stdin(Stdio::from(link))
        .stdout(Stdio::null())
        .env_remove("MESHD_TOKEN")
        .env_remove(LINK_FD)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

async fn ended(child: &mut Option<Child>) -> String {
    match child {
        Some(child) => match child.wait().await {
            Ok(status) => format!("{PROGRAM} ended ({status})"),
            Err(error) => format!("{PROGRAM} ended ({error})"),
        },
        None => std::future::pending().await,
    }
}
