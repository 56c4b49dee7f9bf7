//! meshd's end of the admin socket: who is let in, for how long, and what they get.
//!
//! Owns limits, permissions and time-outs. What is answered comes from a [`Mesh`]; where the socket came from is
//! `socket`'s affair. Nothing a client does may cost the data plane anything: each client has a slot, a deadline and a
//! size, and a failing `accept` waits instead of spinning.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::protocol::{
    Answer, ErrorCode, ErrorView, ForeignView, KeysView, MAX_REQUEST, NodeView, Outcome, PeerView, Request, StatsView,
    StatusView, SurveyView, VERSION, capture, why,
};
use super::socket::AdminSocket;
use crate::membership::link;

/// What the socket tells and lets happen. Calls come from an async task: they must not wait for anything slow, and what
/// others have to answer is a future with an end.
pub trait Mesh: Send + Sync + 'static {
    /// The other nodes.
    fn peers(&self) -> Vec<PeerView>;
    /// The engine's counters.
    fn stats(&self) -> StatsView;
    /// This node at a glance.
    fn status(&self) -> StatusView;
    /// The node list, this node included.
    fn nodes(&self) -> BoxFuture<'_, Vec<NodeView>>;
    /// This node's public keys.
    fn keys(&self) -> KeysView;
    /// The whole way of a packet, or why the question makes no sense.
    fn why(&self, ask: why::Ask) -> BoxFuture<'_, Result<why::WhyView, String>>;
    /// Who reaches whom in the mesh.
    fn survey(&self) -> BoxFuture<'_, SurveyView>;
    /// Packets as they pass, or why there are none to see.
    fn capture(&self, ask: capture::Ask) -> Result<capture::CaptureView, String>;
    /// Lets a held-back node list through: a sentence that says what was done, or why nothing was.
    fn accept_nodes(&self) -> Result<String, String>;
    /// What the servers answer, or why there is no answer.
    fn cluster(&self, ask: link::Request) -> BoxFuture<'_, Result<Value, String>>;
    /// What a foreign member has to run, or why nobody can say.
    fn node_commands(
        &self,
        name: String,
        device: String,
        private_key_file: String,
    ) -> BoxFuture<'_, Result<ForeignView, String>>;
    /// Leaves the cluster and stops; with `force` also where no server can be told.
    fn leave(&self, force: bool) -> BoxFuture<'_, Result<String, String>>;
}

/// What clients may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Clients at once.
    pub clients: usize,
    /// How long a client may take to send a request line.
    pub idle: Duration,
    /// How long a client may take to read an answer.
    pub write: Duration,
    /// Longest request line.
    pub request: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { clients: 64, idle: Duration::from_secs(10), write: Duration::from_secs(10), request: MAX_REQUEST }
    }
}

/// Pause after a failed `accept`: with no file descriptor left it would fail again at once, for ever.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often a failing `accept` is logged.
const ACCEPT_LOG: Duration = Duration::from_secs(60);

/// Serves with the default [`Limits`] until the future is dropped, which also ends all clients and removes the
/// socket's file. It returns only when the listener cannot be used at all.
pub async fn serve(socket: AdminSocket, mesh: Arc<dyn Mesh>) -> io::Result<()> {
    serve_with(socket, mesh, Limits::default()).await
}

/// [`serve`] with other limits.
pub async fn serve_with(socket: AdminSocket, mesh: Arc<dyn Mesh>, limits: Limits) -> io::Result<()> {
    let listener = UnixListener::from_std(socket.listener()?)?;
    let own_uid = own_uid();
    let mut clients = JoinSet::new();
    let mut logged: Option<Instant> = None;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                if logged.is_none_or(|at| at.elapsed() >= ACCEPT_LOG) {
                    tracing::warn!(error = %e, path = %socket.path().display(), "the admin socket cannot accept clients");
                    logged = Some(Instant::now());
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while clients.try_join_next().is_some() {}
        if clients.len() >= limits.clients {
            turn_away(stream, limits.clients);
            continue;
        }
        let mesh = Arc::clone(&mesh);
        clients.spawn(async move {
            if let Err(e) = converse(stream, mesh.as_ref(), own_uid, &limits).await {
                tracing::debug!(error = %e, "an admin client went away");
            }
        });
    }
}

/// Whether a caller may change something: root, and the user that meshd runs as.
pub fn may_change(caller_uid: u32, own_uid: u32) -> bool {
    caller_uid == 0 || caller_uid == own_uid
}

/// The user that meshd runs as, told by the kernel; root alone where it does not tell.
fn own_uid() -> u32 {
    UnixStream::pair().and_then(|(one, _)| one.peer_cred()).map_or(0, |cred| cred.uid())
}

/// One line and out. The socket's buffer is empty and non-blocking, so this neither waits nor needs a task.
fn turn_away(stream: UnixStream, clients: usize) {
    let error = ErrorView {
        code: ErrorCode::Busy,
        message: format!("{clients} clients are connected already: try again in some seconds"),
    };
    if let Ok(line) = line::<()>(Outcome::Error(error)) {
        let _ = stream.into_std().and_then(|mut stream| io::Write::write(&mut stream, &line));
    }
}

/// Answers request lines until the client ends, idles or sends something that is no request.
async fn converse(stream: UnixStream, mesh: &dyn Mesh, own_uid: u32, limits: &Limits) -> io::Result<()> {
    let caller_uid = stream.peer_cred()?.uid();
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut request = Vec::new();
    loop {
        request.clear();
        let cap = u64::try_from(limits.request).unwrap_or(u64::MAX);
        // One byte more than allowed tells a request that is too long from one that just fits.
        let mut capped = (&mut read).take(cap.saturating_add(1));
        let (outcome, last) = match timeout(limits.idle, capped.read_until(b'\n', &mut request)).await {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(n)) if n > limits.request => {
                (refusal(ErrorCode::BadRequest, format!("a request may have {} bytes", limits.request)), true)
            }
            Ok(Ok(_)) => match Request::from_line(&request) {
                Ok(request) => (answer(request, mesh, caller_uid, own_uid).await, false),
                Err(error) => (line::<()>(Outcome::Error(error.clone())), error.code == ErrorCode::BadRequest),
            },
            Ok(Err(e)) => return Err(e),
            Err(_) => (refusal(ErrorCode::Timeout, format!("no request within {} s", limits.idle.as_secs_f32())), true),
        };
        timeout(limits.write, write.write_all(&outcome?)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        if last {
            return Ok(());
        }
    }
}

async fn answer(request: Request, mesh: &dyn Mesh, caller_uid: u32, own_uid: u32) -> io::Result<Vec<u8>> {
    if request.changes() && !may_change(caller_uid, own_uid) {
        let message = format!("user {caller_uid} may look but not change anything: run it as root (`sudo meshctl …`)");
        return refusal(ErrorCode::Denied, message);
    }
    let change = request.changes().then(|| request.name());
    let done = match request {
        Request::Peers => return line(Outcome::Ok(mesh.peers())),
        Request::Stats => return line(Outcome::Ok(mesh.stats())),
        Request::Status => return line(Outcome::Ok(mesh.status())),
        Request::Nodes => return line(Outcome::Ok(mesh.nodes().await)),
        Request::Keys => return line(Outcome::Ok(mesh.keys())),
        Request::Why { ask } => {
            return match mesh.why(ask).await {
                Ok(view) => line(Outcome::Ok(view)),
                Err(message) => refusal(ErrorCode::Refused, message),
            };
        }
        Request::Survey => return line(Outcome::Ok(mesh.survey().await)),
        Request::Capture { ask } => {
            if matches!(ask, capture::Ask::Begin { .. } | capture::Ask::Record { .. }) {
                tracing::info!(uid = caller_uid, "packets are captured through the admin socket");
            }
            return match mesh.capture(ask) {
                Ok(view) => line(Outcome::Ok(view)),
                Err(message) => refusal(ErrorCode::Refused, message),
            };
        }
        Request::NodesAccept => mesh.accept_nodes().map(Value::from),
        Request::Cluster { ask } => mesh.cluster(ask).await,
        Request::NodeCommands { name, device, private_key_file } => {
            match mesh.node_commands(name, device, private_key_file).await {
                Ok(view) => return line(Outcome::Ok(view)),
                Err(message) => Err(message),
            }
        }
        Request::Leave { force } => mesh.leave(force).await.map(Value::from),
    };
    match done {
        Ok(document) => {
            if let Some(change) = change {
                tracing::info!(uid = caller_uid, "{change}: done through the admin socket");
            }
            line(Outcome::Ok(document))
        }
        Err(message) => refusal(ErrorCode::Refused, message),
    }
}

fn refusal(code: ErrorCode, message: String) -> io::Result<Vec<u8>> {
    line::<()>(Outcome::Error(ErrorView { code, message }))
}

fn line<T: Serialize>(outcome: Outcome<T>) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Answer { version: VERSION, outcome })?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_meshd_itself_may_change() {
        assert!(may_change(0, 990));
        assert!(may_change(990, 990));
        assert!(!may_change(1000, 990));
        assert!(!may_change(1000, 0));
    }

    #[tokio::test]
    async fn the_own_uid_is_that_of_the_process() {
        use std::os::unix::fs::MetadataExt;
        assert_eq!(own_uid(), std::fs::metadata("/proc/self").unwrap().uid());
    }
}
