//! One connection to a server, and what can be asked on it.
//!
//! Owns how a server is reached and told from somebody else, and what the reasons are when that fails. Which server is
//! tried when is `balancer`'s matter, and what for, `agent`'s.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::address::ServerAddress;
use super::api::{CaAnswer, ErrorAnswer, JoinAnswer, JoinRequest, PakeFinish, PakeFinished, PakeStart, PakeStarted};
use super::pake;
use super::tls::{self, ClientIdentity, TlsError, Trust};

/// A server has so long to take a connection, and again for TLS.
const CONNECT: Duration = Duration::from_secs(5);
/// And for an answer, unless it waits for something on purpose.
const ANSWER: Duration = Duration::from_secs(15);
/// A whole list of the largest cluster fits.
const MAX_ANSWER: usize = 256 << 20;

/// Why a server did not give an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("the server {server} is not reached: {why}; is it started, and is TCP port {} open to it?", server.port())]
    Unreachable {
        /// Which.
        server: ServerAddress,
        /// Why.
        why: String,
    },
    /// It is not of this cluster.
    #[error(
        "{server} is not a server of this cluster: its certificate is not from the cluster's CA. Nothing secret was sent. \
         Check the address and the token"
    )]
    Stranger {
        /// Which.
        server: ServerAddress,
    },
    /// It is, but not under this name.
    #[error("the certificate of {server} does not name `{}`; on the server, add it to `tls-san`", server.host())]
    WrongName {
        /// Which.
        server: ServerAddress,
    },
    /// Its certificate is not of this time.
    #[error("the certificate of {server} is {what} by this node's clock; set the clock (NTP) here or there")]
    Clock {
        /// Which.
        server: ServerAddress,
        /// Not yet valid, or expired.
        what: &'static str,
    },
    /// It refuses our certificate.
    #[error("{server} does not take this node's certificate ({why}); check both clocks, or join again with a token")]
    NotTaken {
        /// Which.
        server: ServerAddress,
        /// In its words.
        why: String,
    },
    /// It knows another secret, or is somebody in the middle.
    #[error(
        "{server} does not know the shared secret, or somebody is in between; nothing that helps to guess it was sent. \
         Check `server` and `token`"
    )]
    Unproven {
        /// Which.
        server: ServerAddress,
    },
    /// The server's own words.
    #[error("{message}")]
    Refused {
        /// For programs.
        code: String,
        /// For people.
        message: String,
    },
    /// Something that is no answer.
    #[error("{server} gives no proper answer: {why}")]
    Garbled {
        /// Which.
        server: ServerAddress,
        /// How.
        why: String,
    },
    /// Ours.
    #[error("{0}")]
    Setup(String),
}

impl ClientError {
    /// The server's code, where it refused.
    pub fn code(&self) -> Option<&str> {
        match self {
            ClientError::Refused { code, .. } => Some(code),
            _ => None,
        }
    }
}

impl From<TlsError> for ClientError {
    fn from(error: TlsError) -> Self {
        ClientError::Setup(error.to_string())
    }
}

/// A connection to a server. It ends when this is dropped.
pub struct Connection {
    server: ServerAddress,
    sender: SendRequest<Full<Bytes>>,
    /// What the server presented: its certificate first.
    chain: Vec<CertificateDer<'static>>,
    exporter: [u8; 32],
    name: ServerName<'static>,
    _driver: JoinSet<()>,
}

impl Connection {
    /// Connects, trusting as told, and showing this node's certificate where there is one. Names are resolved each time.
    pub async fn open(
        server: &ServerAddress,
        trust: Trust,
        identity: Option<ClientIdentity>,
    ) -> Result<Self, ClientError> {
        let unreachable = |why: String| ClientError::Unreachable { server: server.clone(), why };
        let name = ServerName::try_from(server.host().to_owned()).map_err(|e| unreachable(e.to_string()))?;
        let (config, presented) = tls::client_config(trust, identity)?;
        let addresses = tokio::net::lookup_host((server.host(), server.port()));
        let addresses = match timeout(CONNECT, addresses).await {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => return Err(unreachable(format!("its name does not resolve ({error})"))),
            Err(_) => return Err(unreachable("its name does not resolve in time".to_owned())),
        };
        let mut last = unreachable("its name has no address".to_owned());
        for address in addresses {
            match timeout(CONNECT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    let _ = stream.set_nodelay(true);
                    let stream = secure(server, stream, config, name.clone()).await?;
                    let exporter = tls::exporter(stream.get_ref().1)
                        .map_err(|e| ClientError::Garbled { server: server.clone(), why: e.to_string() })?;
                    let chain = presented.get().cloned().unwrap_or_default();
                    let garbled = |e: hyper::Error| ClientError::Garbled { server: server.clone(), why: e.to_string() };
                    let (sender, driver) = handshake(TokioIo::new(stream)).await.map_err(garbled)?;
                    let mut tasks = JoinSet::new();
                    tasks.spawn(async move {
                        if let Err(error) = driver.await {
                            tracing::debug!("connection to a server ended: {error}");
                        }
                    });
                    return Ok(Connection { server: server.clone(), sender, chain, exporter, name, _driver: tasks });
                }
                Ok(Err(error)) => last = unreachable(error.to_string()),
                Err(_) => last = unreachable("it does not answer".to_owned()),
            }
        }
        Err(last)
    }

    /// Which server this is.
    pub fn server(&self) -> &ServerAddress {
        &self.server
    }

    /// Asks for something that takes a body.
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| ClientError::Setup(e.to_string()))?;
        self.send(method, path, body, ANSWER).await
    }

    /// Asks for something that the server may take its time for.
    pub async fn ask_patiently<T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| ClientError::Setup(e.to_string()))?;
        self.send(Method::POST, path, body, ANSWER + patience).await
    }

    /// Asks for something.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ClientError> {
        self.send(Method::GET, path, vec![], ANSWER).await
    }

    /// Joins by proving the shared secret. The CA in the answer is proven by it too.
    pub async fn join_by_secret(&mut self, secret: &str, join: JoinRequest) -> Result<JoinAnswer, ClientError> {
        let about: CaAnswer = self.get("/v1/ca").await?;
        if !about.shared_secret {
            let message = "this cluster has no shared secret; join with a token (`meshctl token create` on a server)";
            return Err(ClientError::Refused { code: "no-secret".to_owned(), message: message.to_owned() });
        }
        let (secret, cluster) = (secret.to_owned(), about.cluster);
        let stretched = tokio::task::spawn_blocking(move || pake::Verifier::new(&secret, &cluster)).await;
        let verifier = stretched.map_err(|e| ClientError::Setup(e.to_string()))?;
        let (started, message) = pake::client(&verifier);
        let answer: PakeStarted =
            self.ask(Method::POST, "/v1/pake/start", &PakeStart { message: STANDARD.encode(message) }).await?;
        let server = self.server.clone();
        let unproven = || ClientError::Unproven { server: server.clone() };
        let received = STANDARD.decode(&answer.message).map_err(|_| unproven())?;
        let binding = pake::Binding::new(self.exporter, &self.chain);
        let exchanged = started.finish(&received, &binding).map_err(|_| unproven())?;
        let finish = PakeFinish { proof: STANDARD.encode(exchanged.proof()), join };
        let finished: PakeFinished = self.ask(Method::POST, "/v1/pake/finish", &finish).await?;
        let proof = STANDARD.decode(&finished.proof).unwrap_or_default();
        let ca = STANDARD.decode(&finished.join.ca).unwrap_or_default();
        // The proof covers the chain that was presented, so the CA is believed only if it is in there.
        let presented = self.chain.iter().find(|c| Sha256::digest(c)[..] == Sha256::digest(&ca)[..]);
        let presented = presented.filter(|_| exchanged.confirms(&proof)).ok_or_else(unproven)?;
        tls::check_chain(&self.chain, presented, &self.name, UnixTime::now())
            .map_err(|error| told(&self.server, &error).unwrap_or_else(unproven))?;
        Ok(finished.join)
    }

    async fn send<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        patience: Duration,
    ) -> Result<T, ClientError> {
        let server = self.server.clone();
        let garbled = |why: String| ClientError::Garbled { server: server.clone(), why };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", format!("{}:{}", bracketed(server.host()), server.port()))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| ClientError::Setup(e.to_string()))?;
        let work = async {
            self.sender.ready().await.map_err(|e| lost(&server, &e))?;
            let response = self.sender.send_request(request).await.map_err(|e| lost(&server, &e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok::<_, ClientError>((status, body.map_err(|e| garbled(e.to_string()))?.to_bytes()))
        };
        let (status, bytes) = match timeout(patience, work).await {
            Ok(done) => done?,
            Err(_) => {
                return Err(ClientError::Unreachable { server, why: "it does not answer in time".to_owned() });
            }
        };
        if status == StatusCode::OK {
            return serde_json::from_slice(&bytes).map_err(|e| garbled(e.to_string()));
        }
        match serde_json::from_slice::<ErrorAnswer>(&bytes) {
            Ok(answer) => Err(ClientError::Refused { code: answer.code, message: answer.message }),
            Err(_) => Err(garbled(format!("HTTP status {status}"))),
        }
    }
}

/// Drives TLS to its end on a new connection.
async fn secure(
    server: &ServerAddress,
    stream: TcpStream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, ClientError> {
    let unreachable = |why: String| ClientError::Unreachable { server: server.clone(), why };
    match timeout(CONNECT, TlsConnector::from(config).connect(name, stream)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(tls_error(&error)
            .and_then(|e| told(server, e))
            .unwrap_or_else(|| unreachable(format!("no TLS ({error})")))),
        Err(_) => Err(unreachable("it does not speak TLS".to_owned())),
    }
}

/// In a client's certificate the server finds fault only after the handshake, as far as TLS 1.3's client sees.
fn lost(server: &ServerAddress, error: &hyper::Error) -> ClientError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(told) = error.downcast_ref::<io::Error>().and_then(tls_error).and_then(|e| told(server, e)) {
            return told;
        }
        source = error.source();
    }
    ClientError::Unreachable { server: server.clone(), why: format!("the connection ended ({error})") }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref::<rustls::Error>()
}

/// TLS' reasons in words that help.
fn told(server: &ServerAddress, error: &rustls::Error) -> Option<ClientError> {
    use rustls::AlertDescription as Alert;
    let server = server.clone();
    match error {
        rustls::Error::InvalidCertificate(why) => Some(match why {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                ClientError::Clock { server, what: "expired" }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                ClientError::Clock { server, what: "not valid yet" }
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                ClientError::WrongName { server }
            }
            _ => ClientError::Stranger { server },
        }),
        rustls::Error::AlertReceived(
            alert @ (Alert::CertificateExpired
            | Alert::CertificateRequired
            | Alert::CertificateUnknown
            | Alert::BadCertificate
            | Alert::UnknownCA),
        ) => Some(ClientError::NotTaken { server, why: format!("{alert:?}") }),
        _ => None,
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}
