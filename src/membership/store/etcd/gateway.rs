//! Calls to etcd through its own JSON gateway (`/v3/…`, HTTP/1.1): which member is asked, and what its answers mean.
//!
//! Owns connections, failover, TLS and the login. Knows no keys. The gateway is a part of every etcd since 3.4, so that a
//! build needs neither `protoc` nor a gRPC stack; what it costs is base64 around keys and values.

use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::trouble;
use crate::membership::settings::Secret;
use crate::membership::store::StoreError;

/// A connection is made in so long, or the next member is tried.
const CONNECT: Duration = Duration::from_secs(2);
/// etcd gives up on its own quorum after 7 s.
pub(super) const ANSWER: Duration = Duration::from_secs(8);
/// What was on its way to a leader that died is lost, which etcd itself finds out after those 7 s: the first try is shorter.
pub(super) const FIRST_ANSWER: Duration = Duration::from_secs(2);
/// All tries of one call together.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// A member that failed is the last choice for so long.
const AVOID: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
/// What is sent and not acknowledged for so long ends the connection: so a watch ends whose member is gone.
const UNACKNOWLEDGED: Duration = Duration::from_secs(8);
const IDLE: usize = 8;
const MAX_ANSWER: usize = 512 << 20;

/// Where an etcd is, and how one gets in.
#[derive(Clone, Default)]
pub struct Access {
    /// Hosts (without brackets) and client ports; the first ones are preferred.
    pub endpoints: Vec<(String, u16)>,
    /// TLS, where it is spoken.
    pub tls: Option<Arc<ClientConfig>>,
    /// User and password, where etcd's own authentication is on.
    pub user: Option<(String, Secret)>,
}

/// Why a call did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::membership) enum CallError {
    /// No connection: nothing was asked.
    Unreached(String),
    /// The connection or the answer was lost: whether it was done is unknown.
    Lost(String),
    /// etcd says no, with a gRPC code (<https://grpc.io/docs/guides/status-codes>).
    Refused { code: u64, message: String },
    /// What answers is no etcd of 3.4 or later.
    Stranger(String),
    /// One of the two does not take the other's certificate: nothing was asked.
    Tls { problem: String, fix: String },
}

/// A connection to a cluster, shared by its clones.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    endpoints: RwLock<Vec<Arc<Endpoint>>>,
    tls: RwLock<Option<Arc<ClientConfig>>>,
    user: Option<(String, Secret)>,
    token: Mutex<Option<String>>,
    idle: Mutex<Vec<Wire>>,
}

struct Endpoint {
    host: String,
    port: u16,
    failed: Mutex<Option<Instant>>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// One HTTP connection; its driver ends with it.
struct Wire {
    endpoint: Arc<Endpoint>,
    sender: SendRequest<Full<Bytes>>,
    driver: JoinSet<()>,
    /// Why the driver ended.
    ended: Arc<OnceLock<hyper::Error>>,
}

#[derive(Deserialize, Default)]
struct Refusal {
    #[serde(default, alias = "grpc_code")]
    code: u64,
    #[serde(default)]
    message: String,
}

impl Gateway {
    /// Connects when it is asked something.
    pub fn new(access: Access) -> Self {
        let gateway = Gateway(Arc::new(Inner {
            endpoints: RwLock::default(),
            tls: RwLock::new(access.tls),
            user: access.user,
            token: Mutex::default(),
            idle: Mutex::default(),
        }));
        gateway.set_endpoints(access.endpoints);
        gateway
    }

    /// Who is asked from now on. An empty list changes nothing.
    pub fn set_endpoints(&self, endpoints: Vec<(String, u16)>) {
        let mut known = self.0.endpoints.write().unwrap_or_else(PoisonError::into_inner);
        let same = known.len() == endpoints.len()
            && known.iter().zip(&endpoints).all(|(have, (host, port))| have.host == *host && have.port == *port);
        if !endpoints.is_empty() && !same {
            let new = |(host, port)| Arc::new(Endpoint { host, port, failed: Mutex::default() });
            *known = endpoints.into_iter().map(new).collect();
        }
    }

    /// New connections show this from now on.
    pub fn set_tls(&self, tls: Arc<ClientConfig>) {
        *self.0.tls.write().unwrap_or_else(PoisonError::into_inner) = Some(tls);
        lock(&self.0.idle).clear();
    }

    /// Whether the member answers at all, with a quorum or without.
    pub async fn answers(&self) -> bool {
        !matches!(
            self.once::<Value>("/v3/maintenance/status", &json!({}), ANSWER).await,
            Err(CallError::Unreached(_) | CallError::Lost(_))
        )
    }

    /// Whether an etcd's HTTP server is there, be it only for other members; else why not. Unlike everything else this is
    /// answered by a member that has not found its quorum yet.
    pub async fn is_there(&self) -> Result<(), String> {
        let asked = async {
            let mut wire = self.wire().await?;
            let request = Request::get("/version").header("host", wire.endpoint.to_string());
            let request = request.body(Full::default()).map_err(|e| CallError::Unreached(e.to_string()))?;
            wire.sender.send_request(request).await.map_err(|e| CallError::Lost(e.to_string()))
        };
        match timeout(CONNECT, asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(CallError::Unreached(why) | CallError::Lost(why) | CallError::Stranger(why))) => Err(why),
            Ok(Err(CallError::Refused { message, .. } | CallError::Tls { problem: message, .. })) => Err(message),
            Err(_) => Err(format!("{} does not answer", self.place())),
        }
    }

    /// The first of its members.
    pub(super) fn first(&self) -> (String, u16) {
        self.endpoints().first().map(|first| (first.host.clone(), first.port)).unwrap_or_default()
    }

    /// Who logs in.
    pub(super) fn user(&self) -> Option<&str> {
        self.0.user.as_ref().map(|(name, _)| name.as_str())
    }

    /// What errors call it: its members, and nothing secret.
    pub fn place(&self) -> String {
        let all: Vec<String> = self.endpoints().iter().map(ToString::to_string).collect();
        format!("etcd at {}", all.join(","))
    }

    /// Asks until a member answers, for something that may be done twice.
    pub(in crate::membership) async fn ask<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &Value,
    ) -> Result<T, CallError> {
        let start = Instant::now();
        let mut patience = FIRST_ANSWER;
        loop {
            let error = match self.once(path, body, patience).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            patience = (patience * 2).min(ANSWER);
            if !error.may_pass() || start.elapsed() + PAUSE >= PATIENCE {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Asks the best member once.
    pub(in crate::membership) async fn once<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &Value,
        patience: Duration,
    ) -> Result<T, CallError> {
        let wire = self.wire().await?;
        let endpoint = wire.endpoint.clone();
        let answer = match timeout(patience, self.exchange(wire, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(CallError::Lost(format!("{endpoint} does not answer in time"))),
        };
        *lock(&endpoint.failed) = match &answer {
            Err(error) if error.may_pass() => Some(Instant::now()),
            _ => None,
        };
        answer
    }

    /// Asks for a stream of answers.
    pub(super) async fn stream(&self, path: &str, body: &Value) -> Result<Stream, CallError> {
        let mut wire = self.wire().await?;
        let sent = timeout(ANSWER, self.send(&mut wire, path, body)).await;
        let response = sent.map_err(|_| CallError::Lost(format!("{} does not answer in time", wire.endpoint)))??;
        if !response.status().is_success() {
            let endpoint = wire.endpoint.clone();
            return Err(refusal(&endpoint, response.status().as_u16(), &collect(&endpoint, response).await?));
        }
        Ok(Stream { body: response.into_body(), buffer: BytesMut::new(), wire })
    }

    async fn exchange<T: DeserializeOwned>(&self, mut wire: Wire, path: &str, body: &Value) -> Result<T, CallError> {
        let response = self.send(&mut wire, path, body).await?;
        let status = response.status();
        let bytes = collect(&wire.endpoint, response).await?;
        if !status.is_success() {
            let refused = refusal(&wire.endpoint, status.as_u16(), &bytes);
            if matches!(refused, CallError::Refused { code: UNAUTHENTICATED, .. }) {
                lock(&self.0.token).take();
            }
            return Err(refused);
        }
        let stranger = |e| CallError::Stranger(format!("{} answers what no etcd does ({e})", wire.endpoint));
        let answer = serde_json::from_slice(&bytes).map_err(stranger)?;
        let mut idle = lock(&self.0.idle);
        if idle.len() < IDLE && wire.sender.is_ready() {
            idle.push(wire);
        }
        Ok(answer)
    }

    async fn send(&self, wire: &mut Wire, path: &str, body: &Value) -> Result<Response<Incoming>, CallError> {
        let token = self.token(wire).await?;
        post(wire, path, body, token.as_deref()).await
    }

    /// The token of a login, where etcd asks for one.
    async fn token(&self, wire: &mut Wire) -> Result<Option<String>, CallError> {
        #[derive(Deserialize)]
        struct Login {
            #[serde(default)]
            token: String,
        }
        let Some((name, password)) = &self.0.user else { return Ok(None) };
        if let Some(token) = lock(&self.0.token).clone() {
            return Ok(Some(token));
        }
        let body = json!({ "name": name, "password": password.reveal() });
        let response = post(wire, "/v3/auth/authenticate", &body, None).await?;
        let status = response.status();
        let bytes = collect(&wire.endpoint, response).await?;
        if !status.is_success() {
            return match refusal(&wire.endpoint, status.as_u16(), &bytes) {
                CallError::Refused { code: FAILED_PRECONDITION, message } if message.contains("not enabled") => {
                    Ok(None)
                }
                error => Err(error),
            };
        }
        let login: Login = serde_json::from_slice(&bytes)
            .map_err(|e| CallError::Stranger(format!("{} answers a login with something else ({e})", wire.endpoint)))?;
        *lock(&self.0.token) = Some(login.token.clone());
        Ok(Some(login.token))
    }

    async fn wire(&self) -> Result<Wire, CallError> {
        let endpoint = self.choose()?;
        {
            let mut idle = lock(&self.0.idle);
            idle.retain(|wire| wire.sender.is_ready());
            if let Some(at) = idle.iter().position(|wire| Arc::ptr_eq(&wire.endpoint, &endpoint)) {
                return Ok(idle.swap_remove(at));
            }
        }
        let tls = self.0.tls.read().unwrap_or_else(PoisonError::into_inner).clone();
        match timeout(CONNECT, connect(&endpoint, tls)).await {
            Ok(Ok(wire)) => Ok(wire),
            failed => {
                *lock(&endpoint.failed) = Some(Instant::now());
                Err(match failed {
                    Ok(Err(error)) => trouble::tls(&endpoint.to_string(), &*error)
                        .unwrap_or_else(|| CallError::Unreached(format!("{endpoint} cannot be reached ({error})"))),
                    _ => CallError::Unreached(format!("{endpoint} cannot be reached (it does not answer)")),
                })
            }
        }
    }

    /// The first that did not fail lately; else the one whose failure is the longest ago.
    fn choose(&self) -> Result<Arc<Endpoint>, CallError> {
        let good = |endpoint: &&Arc<Endpoint>| lock(&endpoint.failed).is_none_or(|at| at.elapsed() >= AVOID);
        let all = self.endpoints();
        let chosen = all.iter().find(good).or_else(|| all.iter().min_by_key(|e| *lock(&e.failed)));
        chosen.cloned().ok_or_else(|| CallError::Unreached("no endpoint is known".to_owned()))
    }

    fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.0.endpoints.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same error, for who uses a store.
    pub(in crate::membership) fn told(&self, error: CallError) -> StoreError {
        let place = self.place();
        let unfit = |problem: &str| StoreError::Unfit { place: place.clone(), problem: problem.to_owned() };
        match error {
            CallError::Unreached(detail) | CallError::Lost(detail) => StoreError::Unavailable { place, detail },
            // certificates are renewed, also somebody else's
            CallError::Tls { problem, fix } => StoreError::Unavailable { place, detail: format!("{problem}: {fix}") },
            CallError::Stranger(problem) => unfit(&problem),
            CallError::Refused { code: NOT_FOUND, message } if message.contains("lease") => StoreError::NoLease,
            CallError::Refused { code: RESOURCE_EXHAUSTED, message } if message.contains("space") => {
                StoreError::Full { place }
            }
            CallError::Refused { code: PERMISSION_DENIED, message } => unfit(&message),
            CallError::Refused { code: INVALID_ARGUMENT, message } if message.contains("authentication failed") => {
                unfit("the user or the password is wrong")
            }
            CallError::Refused { code: INVALID_ARGUMENT, message } if message.contains("user name is empty") => {
                unfit("it wants a user and a password: write `etcd://USER@HOST:2379` and set the password")
            }
            CallError::Refused { code: RESOURCE_EXHAUSTED, message } if message.contains("larger than max") => {
                unfit("the request is too large")
            }
            CallError::Refused { code: INVALID_ARGUMENT, message } => unfit(&message),
            CallError::Refused { message, .. } => StoreError::Unavailable { place, detail: message },
        }
    }
}

impl CallError {
    /// Whether etcd says that there is no such thing.
    pub(in crate::membership) fn is_not_found(&self) -> bool {
        matches!(self, CallError::Refused { code: NOT_FOUND, .. })
    }

    /// What etcd says, where it says no.
    pub(in crate::membership) fn refusal(&self) -> Option<&str> {
        match self {
            CallError::Refused { message, .. } => Some(message),
            _ => None,
        }
    }

    /// Whether another try, or another member, may do better.
    pub(in crate::membership) fn may_pass(&self) -> bool {
        match self {
            CallError::Unreached(_) | CallError::Lost(_) | CallError::Tls { .. } => true,
            CallError::Refused { code, message } => {
                matches!(*code, UNKNOWN | DEADLINE_EXCEEDED | INTERNAL | UNAVAILABLE | UNAUTHENTICATED)
                    || message.contains("too many requests")
            }
            CallError::Stranger(_) => false,
        }
    }
}

const UNKNOWN: u64 = 2;
pub(super) const INVALID_ARGUMENT: u64 = 3;
const DEADLINE_EXCEEDED: u64 = 4;
pub(super) const NOT_FOUND: u64 = 5;
pub(super) const PERMISSION_DENIED: u64 = 7;
const RESOURCE_EXHAUSTED: u64 = 8;
const FAILED_PRECONDITION: u64 = 9;
pub(super) const OUT_OF_RANGE: u64 = 11;
const INTERNAL: u64 = 13;
const UNAVAILABLE: u64 = 14;
const UNAUTHENTICATED: u64 = 16;

/// Answers that come one by one: a JSON document a line.
pub(super) struct Stream {
    body: Incoming,
    buffer: BytesMut,
    wire: Wire,
}

impl Stream {
    /// The next answer's `result`. Waits for as long as it takes.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<T, CallError> {
        #[derive(Deserialize)]
        struct Line<T> {
            result: Option<T>,
            error: Option<Refusal>,
        }
        let endpoint = &self.wire.endpoint;
        let mut searched = 0;
        let end = loop {
            if let Some(at) = self.buffer[searched..].iter().position(|byte| *byte == b'\n') {
                break searched + at;
            }
            searched = self.buffer.len();
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(CallError::Lost(format!("{endpoint}: {error}"))),
                None => return Err(CallError::Lost(format!("{endpoint} ended the watch"))),
            }
            if self.buffer.len() > MAX_ANSWER {
                return Err(CallError::Stranger(format!("{endpoint} answers without end")));
            }
        };
        let line = self.buffer.split_to(end + 1);
        let stranger = |why: String| CallError::Stranger(format!("{endpoint} answers what no etcd does ({why})"));
        match serde_json::from_slice(&line).map_err(|e| stranger(e.to_string()))? {
            Line { result: Some(result), .. } => Ok(result),
            Line { error: Some(Refusal { code, message }), .. } => Err(CallError::Refused { code, message }),
            _ => Err(stranger("neither result nor error".to_owned())),
        }
    }
}

async fn connect(
    endpoint: &Arc<Endpoint>,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Wire, Box<dyn Error + Send + Sync>> {
    let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(&stream);
    let alive = TcpKeepalive::new().with_time(Duration::from_secs(4)).with_interval(Duration::from_secs(2));
    let _ = socket.set_tcp_keepalive(&alive);
    let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let mut driver = JoinSet::new();
    let ended = Arc::new(OnceLock::new());
    async fn told(connection: impl Future<Output = Result<(), hyper::Error>>, ended: Arc<OnceLock<hyper::Error>>) {
        if let Err(error) = connection.await {
            let _ = ended.set(error);
        }
    }
    let sender = match tls {
        Some(config) => {
            let name = ServerName::try_from(endpoint.host.clone())?;
            let stream = TlsConnector::from(config).connect(name, stream).await?;
            let (sender, connection) = handshake(TokioIo::new(stream)).await?;
            driver.spawn(told(connection, ended.clone()));
            sender
        }
        None => {
            let (sender, connection) = handshake(TokioIo::new(stream)).await?;
            driver.spawn(told(connection, ended.clone()));
            sender
        }
    };
    Ok(Wire { endpoint: endpoint.clone(), sender, driver, ended })
}

async fn post(
    wire: &mut Wire,
    path: &str,
    body: &impl Serialize,
    token: Option<&str>,
) -> Result<Response<Incoming>, CallError> {
    let endpoint = wire.endpoint.clone();
    let bytes = serde_json::to_vec(body).map_err(|e| CallError::Unreached(e.to_string()))?;
    let mut request = Request::builder().method(Method::POST).uri(path).header("host", endpoint.to_string());
    if let Some(token) = token {
        request = request.header("authorization", token);
    }
    let request = request.body(Full::new(bytes.into())).map_err(|e| CallError::Unreached(e.to_string()))?;
    let sent = async {
        wire.sender.ready().await?;
        wire.sender.send_request(request).await
    };
    match sent.await {
        Ok(response) => Ok(response),
        Err(error) => Err(lost(wire, &error).await),
    }
}

/// TLS 1.3 refuses a client's certificate only after the client holds the handshake for done: then the connection ends, and
/// its driver knows why.
async fn lost(wire: &mut Wire, error: &hyper::Error) -> CallError {
    let _ = timeout(PAUSE, wire.driver.join_next()).await;
    let error = wire.ended.get().unwrap_or(error);
    let place = wire.endpoint.to_string();
    trouble::tls(&place, error).unwrap_or_else(|| {
        let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        CallError::Lost(format!("{place}: {why}"))
    })
}

async fn collect(endpoint: &Endpoint, response: Response<Incoming>) -> Result<Bytes, CallError> {
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    Ok(body.map_err(|e| CallError::Lost(format!("{endpoint}: {e}")))?.to_bytes())
}

fn refusal(endpoint: &Endpoint, status: u16, body: &[u8]) -> CallError {
    match serde_json::from_slice::<Refusal>(body) {
        Ok(Refusal { code, message }) if code != 0 => CallError::Refused { code, message },
        _ if status >= 500 => CallError::Lost(format!("{endpoint} answers HTTP status {status}")),
        // etcd takes a common name for a user's, but not here, and says no to be sure that nobody relies on it
        _ if String::from_utf8_lossy(body).contains("CommonName") => CallError::Tls {
            problem: format!("{endpoint} takes no client's certificate with a common name while users have to log in"),
            fix: "set `datastore-certfile` to a certificate without a common name (CN)".to_owned(),
        },
        _ => CallError::Stranger(format!("{endpoint} answers HTTP status {status}; is it an etcd of 3.4 or later?")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
