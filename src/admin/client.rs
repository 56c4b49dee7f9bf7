//! meshctl's end of the admin socket.
//!
//! Owns one question and its answer, with time-outs, and errors that say what to do. A connection a question: a client
//! that watches survives a restart of meshd. It knows nothing of how answers look to a person.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{DeserializeOwned, IgnoredAny};
use socket2::{Domain, SockAddr, Socket, Type};

use super::protocol::{
    Answer, ErrorCode, ErrorView, ForeignView, KeysView, NodeView, Outcome, PeerView, Request, StatsView, StatusView,
    SurveyView, VERSION, capture, why,
};
use super::socket::group_name;
use crate::membership::link;

/// How long a connect, a write or a read may take.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an answer of the servers may take: more than meshd itself waits.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(20);

/// The longest answer: what a hundred thousand peers need, several times over.
const MAX_ANSWER: u64 = 256 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no such file.
    #[error(
        "no socket at {}: is meshd running? Look with `systemctl status meshd`, or start `meshd run --config FILE`; \
         for a meshd whose `socket` is elsewhere give --socket", .0.display()
    )]
    NoSocket(PathBuf),
    /// The file is something else.
    #[error("{} is not a socket: give --socket the `socket` of meshd's configuration", .0.display())]
    NotASocket(PathBuf),
    /// The file is there, nobody listens.
    #[error(
        "nobody listens on {}: meshd stopped without removing it; look with `systemctl status meshd`, then start it \
         again", .0.display()
    )]
    Refused(PathBuf),
    /// The file's mode keeps this user out.
    #[error("{}", denied(.path, .owner))]
    Denied {
        /// The file.
        path: PathBuf,
        /// Its user, group and mode, where this user may know.
        owner: Option<(u32, u32, u32)>,
    },
    /// No answer in time.
    #[error("meshd does not answer on {}: look at its log (`journalctl -u meshd`)", .0.display())]
    Timeout(PathBuf),
    /// The connection failed.
    #[error("cannot talk to meshd on {}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The answer makes no sense.
    #[error(
        "what answers on {} is not this release's meshd ({what}): use the meshctl that came with it, or restart meshd \
         after an upgrade", path.display()
    )]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        what: String,
    },
    /// meshd answered, with an error.
    #[error(transparent)]
    Answered(#[from] ErrorView),
}

impl ClientError {
    /// Whether meshd was not reached at all (rather than reached, and unwilling).
    pub fn is_unreachable(&self) -> bool {
        match self {
            ClientError::Answered(error) => {
                matches!(error.code, ErrorCode::Busy | ErrorCode::Timeout | ErrorCode::Version)
            }
            _ => true,
        }
    }

    /// Whether asking again a little later may help.
    pub fn may_pass(&self) -> bool {
        match self {
            ClientError::NoSocket(_) | ClientError::Refused(_) | ClientError::Timeout(_) | ClientError::Io { .. } => {
                true
            }
            ClientError::Answered(error) => matches!(error.code, ErrorCode::Busy | ErrorCode::Timeout),
            ClientError::NotASocket(_) | ClientError::Denied { .. } | ClientError::Mismatch { .. } => false,
        }
    }
}

/// Asks one meshd.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
}

impl Client {
    /// For the meshd at that socket.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Client { path: path.into(), timeout: DEFAULT_TIMEOUT }
    }

    /// With another time-out.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Client { timeout, ..self }
    }

    /// The other nodes.
    pub fn peers(&self) -> Result<Vec<PeerView>, ClientError> {
        self.ask(&Request::Peers)
    }

    /// The engine's counters.
    pub fn stats(&self) -> Result<StatsView, ClientError> {
        self.ask(&Request::Stats)
    }

    /// The node at a glance.
    pub fn status(&self) -> Result<StatusView, ClientError> {
        self.ask(&Request::Status)
    }

    /// The node list.
    pub fn nodes(&self) -> Result<Vec<NodeView>, ClientError> {
        self.ask(&Request::Nodes)
    }

    /// This node's public keys.
    pub fn keys(&self) -> Result<KeysView, ClientError> {
        self.ask(&Request::Keys)
    }

    /// The whole way of a packet.
    pub fn why(&self, ask: why::Ask) -> Result<why::WhyView, ClientError> {
        self.patient().ask(&Request::Why { ask })
    }

    /// Who reaches whom in the mesh.
    pub fn survey(&self) -> Result<SurveyView, ClientError> {
        self.patient().ask(&Request::Survey)
    }

    /// Packets as they pass.
    pub fn capture(&self, ask: capture::Ask) -> Result<capture::CaptureView, ClientError> {
        self.ask(&Request::Capture { ask })
    }

    /// Lets a held-back node list through; the sentence says what happened.
    pub fn accept_nodes(&self) -> Result<String, ClientError> {
        self.ask(&Request::NodesAccept)
    }

    /// What the servers answer.
    pub fn cluster<T: DeserializeOwned>(&self, ask: link::Request) -> Result<T, ClientError> {
        self.patient().ask(&Request::Cluster { ask })
    }

    /// What a foreign member has to run to be one.
    pub fn node_commands(&self, name: &str, device: &str, private_key_file: &str) -> Result<ForeignView, ClientError> {
        let (name, device, key) = (name.to_owned(), device.to_owned(), private_key_file.to_owned());
        self.patient().ask(&Request::NodeCommands { name, device, private_key_file: key })
    }

    /// Leaves the cluster; the sentence says what happened.
    pub fn leave(&self, force: bool) -> Result<String, ClientError> {
        self.patient().ask(&Request::Leave { force })
    }

    /// The servers may be far away, and meshd waits for them longer than we for it.
    fn patient(&self) -> Self {
        self.clone().with_timeout(self.timeout.max(CLUSTER_TIMEOUT))
    }

    fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, ClientError> {
        let mut stream = self.connect().map_err(|e| self.failed(e))?;
        let line = request.to_line().map_err(|e| self.mismatch(e.to_string()))?;
        // A meshd that turns us away answers and closes before it has read anything: then the answer counts, not the
        // broken pipe.
        let written = stream.write_all(line.as_bytes());
        let mut answer = Vec::new();
        let read = BufReader::new(stream.take(MAX_ANSWER)).read_until(b'\n', &mut answer);
        if answer.last() != Some(&b'\n') {
            read.and(written).map_err(|e| self.failed(e))?;
            let what = "it closed the connection before the answer was whole; it may be stopping";
            return Err(self.failed(io::Error::new(io::ErrorKind::UnexpectedEof, what)));
        }
        self.understand(&answer)
    }

    fn understand<T: DeserializeOwned>(&self, answer: &[u8]) -> Result<T, ClientError> {
        match serde_json::from_slice::<Answer<T>>(answer) {
            Ok(Answer { version: VERSION, outcome: Outcome::Ok(document) }) => Ok(document),
            Ok(Answer { version: VERSION, outcome: Outcome::Error(error) }) => Err(error.into()),
            Ok(Answer { version, .. }) => Err(self.mismatch(format!("it speaks protocol {version}"))),
            Err(e) => Err(self.mismatch(match serde_json::from_slice::<Answer<IgnoredAny>>(answer) {
                Ok(Answer { version, .. }) if version != VERSION => format!("it speaks protocol {version}"),
                _ => e.to_string(),
            })),
        }
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let address = SockAddr::unix(&self.path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_read_timeout(Some(self.timeout))?;
        // Also bounds the wait for a place in a full backlog.
        socket.set_write_timeout(Some(self.timeout))?;
        socket.connect(&address)?;
        Ok(UnixStream::from(OwnedFd::from(socket)))
    }

    fn failed(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        let found = fs::metadata(&path).ok();
        match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket(path),
            io::ErrorKind::ConnectionRefused if found.as_ref().is_some_and(|m| !m.file_type().is_socket()) => {
                ClientError::NotASocket(path)
            }
            io::ErrorKind::ConnectionRefused => ClientError::Refused(path),
            io::ErrorKind::PermissionDenied => {
                ClientError::Denied { path, owner: found.map(|m| (m.uid(), m.gid(), m.mode() & 0o7777)) }
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Timeout(path),
            _ => ClientError::Io { path, cause: source },
        }
    }

    fn mismatch(&self, what: String) -> ClientError {
        ClientError::Mismatch { path: self.path.clone(), what }
    }
}

fn denied(path: &Path, owner: &Option<(u32, u32, u32)>) -> String {
    let path = path.display();
    match owner {
        Some((uid, gid, mode)) => {
            let group = group_name(*gid).unwrap_or_else(|| gid.to_string());
            format!(
                "no permission for {path}: it is for user {uid} and group {group} (mode {mode:04o}); run it as root, or \
                 join the group (`sudo usermod -aG {group} $USER`, then log in again)"
            )
        }
        None => format!("no permission for {path} or the directory it is in: run it as root (`sudo meshctl …`)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn ask(path: &Path) -> ClientError {
        Client::new(path).with_timeout(Duration::from_millis(200)).status().unwrap_err()
    }

    #[test]
    fn who_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meshd.sock");
        assert!(matches!(ask(&path), ClientError::NoSocket(_)));
        assert!(ask(&path).to_string().contains("systemctl status meshd"));
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(ask(&path), ClientError::Refused(_)));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert!(matches!(ask(&path), ClientError::NotASocket(_)));
        assert!(matches!(ask(dir.path()), ClientError::NotASocket(_)));
    }

    #[test]
    fn silence_and_nonsense_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meshd.sock");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(ask(&path), ClientError::Timeout(_)), "nobody accepts");
        let replies: [(&[u8], bool, &str); 6] = [
            (b"", true, "before the answer was whole"),
            (b"half a li", true, "before the answer was whole"),
            (b"\xff\n", false, "expected value"),
            (b"{\"version\":2,\"ok\":{\"new\":true}}\n", false, "protocol 2"),
            (b"{\"version\":1,\"ok\":{}}\n", false, "missing field"),
            (b"{\"version\":1,\"error\":{\"code\":\"busy\",\"message\":\"later\"}}\n", true, "later"),
        ];
        let server = std::thread::spawn(move || {
            let (_timed_out, _) = listener.accept().unwrap();
            for (reply, _, _) in replies {
                let (mut stream, _) = listener.accept().unwrap();
                BufReader::new(&stream).read_until(b'\n', &mut Vec::new()).unwrap();
                stream.write_all(reply).unwrap();
            }
        });
        for (_, may_pass, what) in replies {
            let error = ask(&path);
            assert!(error.to_string().contains(what), "{error}");
            assert!(error.is_unreachable() && error.may_pass() == may_pass, "{error:?}");
        }
        server.join().unwrap();
    }

    #[test]
    fn a_denied_user_reads_who_may() {
        let text = denied(Path::new("/run/meshd/meshd.sock"), &Some((0, 0, 0o660)));
        assert!(text.contains("user 0 and group root (mode 0660)"), "{text}");
        assert!(text.contains("usermod -aG root"), "{text}");
    }
}
