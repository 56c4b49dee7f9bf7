//! What is answered to whom.
//!
//! Anybody: `/livez`, `/readyz`, `/metrics`, `/v1/ca`, `/v1/openapi.json`, and the joins, which carry their own proof. Members,
//! by their certificate and their present state in the registry: what concerns themselves. Servers' nodes alone: what
//! `meshctl` asks for.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{Peer, Shared, connection, openapi};
use crate::membership::api::{
    CaAnswer, ErrorAnswer, JoinAnswer, JoinRequest, Myself, PakeFinish, PakeFinished, PakeStart, PakeStarted, Poll,
    Promoted, RenewAnswer, RenewRequest, ServerJoin, ServersAnswer, TokenProof,
};
use crate::membership::clock::Now;
use crate::membership::link;
use crate::membership::pake;
use crate::membership::random;
use crate::membership::record::Role;
use crate::membership::registry::{INTERVAL, Member, Proof, Refused, Registry};
use crate::membership::token::{SECRET_LEN, TokenId, TokenSecret};

/// The largest body of a request.
const MAX_BODY: usize = 64 << 10;
/// A client has so long to send it.
const BODY: Duration = Duration::from_secs(10);
/// A store that does not answer for so long is not ready.
const READY: Duration = Duration::from_secs(2);

type App = State<Arc<Shared>>;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/ca", get(ca))
        .route("/v1/openapi.json", get(async || json(StatusCode::OK, &openapi::document())))
        .route("/v1/join", post(join))
        .route("/v1/pake/start", post(pake_start))
        .route("/v1/pake/finish", post(pake_finish))
        .route("/v1/rejoin", post(rejoin))
        .route("/v1/poll", post(poll))
        .route("/v1/nodes", get(nodes))
        .route("/v1/matrix", get(matrix))
        .route("/v1/audit", get(audit))
        .route("/v1/self", put(update))
        .route("/v1/renew", post(renew))
        .route("/v1/leave", post(leave))
        .route("/v1/request", post(request))
        .route("/v1/servers", post(servers))
        .route("/v1/servers/join", post(server_join))
        .route("/v1/servers/promote", post(server_promote))
        .fallback(async || fail(StatusCode::NOT_FOUND, "not-found", "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            fail(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "this path takes another method")
        })
        .with_state(shared)
}

async fn readyz(State(app): App) -> Response {
    let away = app.registry.away();
    let reasons: Vec<String> = match timeout(READY, app.registry.check()).await {
        _ if !away.is_empty() => away,
        Ok(Ok(())) => vec![],
        Ok(Err(error)) => vec![error.to_string()],
        Err(_) => {
            let members = app.registry.members().map(|members| members.view()).unwrap_or_default();
            let all = members.iter().filter(|member| !member.learner).count();
            let there = members.iter().filter(|member| !member.learner && member.answers).count();
            let mut reasons = vec!["the store does not answer".to_owned()];
            if all > 0 && there <= all / 2 {
                reasons.push(format!("{there} of {all} servers' etcds answered last, and more than half have to"));
            }
            reasons
        }
    };
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(status, &serde_json::json!({ "ready": reasons.is_empty(), "reasons": reasons }))
}

async fn metrics(State(app): App) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.registry.metrics()).into_response()
}

async fn ca(State(app): App) -> Response {
    let authority = app.registry.authority();
    json(
        StatusCode::OK,
        &CaAnswer {
            cluster: app.registry.cluster().to_owned(),
            ca: STANDARD.encode(authority.certificate()),
            ca_hash: random::hex(&authority.hash()),
            shared_secret: app.registry.secret().is_some(),
        },
    )
}

async fn join(State(app): App, request: Request) -> Result<Response, Failure> {
    let peer = peer(&request)?;
    let join: JoinRequest = body(request).await?;
    let proof = match &join.token {
        Some(token) => proof(token)?,
        None => return Err(Refused::BadToken.into()),
    };
    if !app.registry.knows(&proof) && app.allows(peer.address.ip()) {
        // Another server may have made it a moment ago.
        app.registry.catch().await?;
    }
    let answer = admit(app.registry.clone(), join, proof, peer.address.ip()).await;
    if matches!(answer, Err(Refused::BadToken)) {
        return Err(app.failed(&peer, Refused::BadToken).into());
    }
    reply(answer)
}

async fn pake_start(State(app): App, request: Request) -> Result<Response, Failure> {
    let peer = peer(&request)?;
    let start: PakeStart = body(request).await?;
    let verifier = app.registry.secret().ok_or(Refused::NoSecret)?;
    if !app.allows(peer.address.ip()) {
        return Err(Refused::TooMany.into());
    }
    let (started, message) = pake::server(verifier);
    let received = STANDARD.decode(&start.message).map_err(|_| malformed("message is not base64"))?;
    let exchanged = started.finish(&received, &peer.binding).map_err(|e| malformed(&e.to_string()))?;
    *peer.exchange.lock().unwrap_or_else(PoisonError::into_inner) = Some(exchanged);
    Ok(json(StatusCode::OK, &PakeStarted { message: STANDARD.encode(message) }))
}

async fn pake_finish(State(app): App, request: Request) -> Result<Response, Failure> {
    let peer = peer(&request)?;
    let finish: PakeFinish = body(request).await?;
    let proof = STANDARD.decode(&finish.proof).map_err(|_| malformed("proof is not base64"))?;
    // Taken out: one start is one guess.
    let exchanged = peer.exchange.lock().unwrap_or_else(PoisonError::into_inner).take();
    let exchanged = exchanged.ok_or_else(|| malformed("there was no /v1/pake/start on this connection"))?;
    if !app.allows(peer.address.ip()) {
        return Err(Refused::TooMany.into());
    }
    if !exchanged.confirms(&proof) {
        return Err(app.failed(&peer, Refused::WrongSecret).into());
    }
    let proof = STANDARD.encode(exchanged.proof());
    let joined = admit(app.registry.clone(), finish.join, Proof::Secret, peer.address.ip()).await;
    reply(joined.map(|join| PakeFinished { proof, join }))
}

/// Who was purged, or is unknown to a store that was restored, comes back with its certificate.
async fn rejoin(State(app): App, request: Request) -> Result<Response, Failure> {
    let peer = peer(&request)?;
    let identity = peer.identity.clone().ok_or(Refused::NotMember)?;
    let join: JoinRequest = body(request).await?;
    if join.role == Role::Server {
        // What a certificate does not say is not believed.
        return Err(Refused::NotAllowed.into());
    }
    reply(admit(app.registry.clone(), join, Proof::Certificate(identity), peer.address.ip()).await)
}

async fn poll(State(app): App, request: Request) -> Result<Response, Failure> {
    let may_leave = connection::may_leave(&request);
    let (peer, member) = app.member(peer(&request)?).await?;
    let poll: Poll = body(request).await?;
    let registry = &app.registry;
    let peers = link::Peers { heard: poll.reaches, paths: poll.paths };
    registry.beat(Now::read(), &member.id, Some(peer.address.ip()), peers);
    if registry.is_away(Now::read()) {
        return Err(Refused::Away.into());
    }
    if poll.revision.is_some_and(|from| from > registry.revision()) {
        // It comes from a server that knows more; from this one it would get the list of before.
        registry.catch().await?;
    }
    match poll.revision.filter(|_| !poll.no_wait) {
        Some(from) if may_leave => {
            // `connection` answers.
            *peer.waits_for() = Some(from);
            std::future::pending().await
        }
        Some(from) => Ok(news(&app, &peer, from).await),
        None => Ok(ready_made(registry.news(poll.revision))),
    }
}

/// Waits for what is after this revision, and then tells it.
pub(super) async fn news(app: &Shared, peer: &Peer, from: u64) -> Response {
    let _ = timeout(INTERVAL, app.registry.wait_for_news(from)).await;
    // It may have been removed meanwhile.
    match app.registry.member(peer.identity.as_deref().unwrap_or_default()) {
        Ok(_) => ready_made(app.registry.news(Some(from))),
        Err(refused) => Failure::from(refused).into_response(),
    }
}

async fn nodes(State(app): App, request: Request) -> Result<Response, Failure> {
    app.member(peer(&request)?).await?;
    Ok(json(StatusCode::OK, &app.registry.records()))
}

async fn matrix(State(app): App, request: Request) -> Result<Response, Failure> {
    app.member(peer(&request)?).await?;
    Ok(json(StatusCode::OK, &app.registry.matrix(Now::read())))
}

async fn audit(State(app): App, request: Request) -> Result<Response, Failure> {
    let (_, member) = app.member(peer(&request)?).await?;
    if member.role != Role::Server {
        return Err(Refused::NotAllowed.into());
    }
    reply(app.registry.audit().await.map_err(Refused::from))
}

async fn update(State(app): App, request: Request) -> Result<Response, Failure> {
    let (_, member) = app.member(peer(&request)?).await?;
    let myself: Myself = body(request).await?;
    let registry = app.registry.clone();
    reply(whole(async move { registry.update(Now::read(), &member.id, &myself).await }).await)
}

async fn renew(State(app): App, request: Request) -> Result<Response, Failure> {
    let (peer, member) = app.member(peer(&request)?).await?;
    let renew: RenewRequest = body(request).await?;
    let csr = STANDARD.decode(&renew.request).map_err(|_| malformed("request is not base64"))?;
    let identity = peer.identity.as_deref().unwrap_or_default();
    let renewed = app.registry.renew(Now::read(), &member, identity, &csr);
    reply(renewed.map(|certificate| RenewAnswer { certificate: STANDARD.encode(certificate) }))
}

async fn leave(State(app): App, request: Request) -> Result<Response, Failure> {
    let (_, member) = app.member(peer(&request)?).await?;
    let registry = app.registry.clone();
    reply(whole(async move { registry.leave(Now::read(), &member.id).await }).await)
}

/// Who the members of the servers' own etcd are.
async fn servers(State(app): App, request: Request) -> Result<Response, Failure> {
    app.server(peer(&request)?).await?;
    let members = app.registry.members()?.names().await.map_err(Refused::from)?;
    Ok(json(StatusCode::OK, &ServersAnswer { members }))
}

/// A further server's etcd becomes a member.
async fn server_join(State(app): App, request: Request) -> Result<Response, Failure> {
    let (peer, member) = app.server(peer(&request)?).await?;
    let join: ServerJoin = body(request).await?;
    let (registry, name) = (app.registry.clone(), peer.identity.clone().unwrap_or_default());
    tracing::info!(node = member.name, address = join.address.to_string(), "a server asks to join");
    reply(
        whole(async move {
            let taken = |name: &str| registry.member(name).is_ok();
            Ok(registry.members()?.admit(&name, join.address, taken).await?)
        })
        .await,
    )
}

async fn server_promote(State(app): App, request: Request) -> Result<Response, Failure> {
    let (peer, _) = app.server(peer(&request)?).await?;
    let (registry, name) = (app.registry.clone(), peer.identity.clone().unwrap_or_default());
    reply(whole(async move { Ok(Promoted { promoted: registry.members()?.promote(&name).await? }) }).await)
}

/// What `meshctl` asks on another server.
async fn request(State(app): App, request: Request) -> Result<Response, Failure> {
    let (_, member) = app.member(peer(&request)?).await?;
    if member.role != Role::Server {
        return Err(Refused::NotAllowed.into());
    }
    let asked: link::Request = body(request).await?;
    let registry = app.registry.clone();
    reply(whole(async move { registry.request(Now::read(), &asked).await }).await)
}

impl Shared {
    /// The member at the other end, in its present state.
    async fn member(&self, peer: Arc<Peer>) -> Result<(Arc<Peer>, Member), Failure> {
        let unknown = || fail(StatusCode::UNAUTHORIZED, "no-certificate", "this needs a node's certificate");
        let identity = peer.identity.as_ref().ok_or_else(unknown)?;
        let member = match self.registry.member(identity) {
            Ok(member) => member,
            Err(_) => {
                // Another server may have let it in: who is told that it is no member gives its membership up.
                self.registry.catch().await?;
                self.registry.member(identity)?
            }
        };
        Ok((peer, member))
    }

    /// The same, if it is a server's node.
    async fn server(&self, peer: Arc<Peer>) -> Result<(Arc<Peer>, Member), Failure> {
        let (peer, member) = self.member(peer).await?;
        if member.role == Role::Server { Ok((peer, member)) } else { Err(Refused::NotAllowed.into()) }
    }

    fn allows(&self, source: IpAddr) -> bool {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).allows(source, Now::read().mono)
    }

    /// Counts a failure; what to say of it.
    fn failed(&self, peer: &Peer, why: Refused) -> Refused {
        let (source, now) = (peer.address.ip(), Now::read().mono);
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        if !limiter.allows(source, now) {
            return Refused::TooMany;
        }
        limiter.failed(source, now);
        tracing::warn!("{source}: {why}");
        why
    }
}

async fn admit(registry: Arc<Registry>, join: JoinRequest, proof: Proof, from: IpAddr) -> Result<JoinAnswer, Refused> {
    whole(async move { registry.join(Now::read(), &join, &proof, Some(from)).await }).await
}

/// In a task of its own, so that a client that goes away never leaves a change stored and not known.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Refused>> + Send + 'static,
) -> Result<T, Refused> {
    tokio::spawn(work).await.unwrap_or(Err(Refused::Busy))
}

fn proof(token: &TokenProof) -> Result<Proof, Refused> {
    let id: TokenId = token.id.parse().map_err(|_| Refused::BadToken)?;
    let digits = token.secret.reveal();
    let mut secret = TokenSecret([0; SECRET_LEN]);
    if digits.len() != 2 * SECRET_LEN || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Refused::BadToken);
    }
    for (byte, at) in secret.0.iter_mut().zip((0..digits.len()).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| Refused::BadToken)?;
    }
    Ok(Proof::Token(id, secret))
}

fn peer(request: &Request) -> Result<Arc<Peer>, Failure> {
    let peer = request.extensions().get::<Arc<Peer>>().cloned();
    peer.ok_or_else(|| fail(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the connection is not known"))
}

async fn body<T: DeserializeOwned>(request: Request) -> Result<T, Failure> {
    let read = timeout(BODY, Limited::new(request.into_body(), MAX_BODY).collect()).await;
    let bytes: Bytes = match read {
        Ok(Ok(whole)) => whole.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(fail(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "the body is larger than 64 KiB"));
        }
        Ok(Err(_)) => return Err(malformed("the body does not come to its end")),
        Err(_) => return Err(fail(StatusCode::REQUEST_TIMEOUT, "too-slow", "the body did not come in 10 seconds")),
    };
    serde_json::from_slice(&bytes).map_err(|error| malformed(&error.to_string()))
}

fn reply(result: Result<impl Serialize, Refused>) -> Result<Response, Failure> {
    Ok(json(StatusCode::OK, &result?))
}

/// An answer that is not a success.
struct Failure {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let status = StatusCode::from_u16(refused.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Failure { status, code: refused.code(), message: refused.to_string() }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        json(self.status, &ErrorAnswer { code: self.code.to_owned(), message: self.message })
    }
}

fn malformed(what: &str) -> Failure {
    fail(StatusCode::BAD_REQUEST, "bad-request", what)
}

fn fail(status: StatusCode, code: &'static str, message: &str) -> Failure {
    Failure { status, code, message: message.to_owned() }
}

fn json(status: StatusCode, answer: &impl Serialize) -> Response {
    let mut response = ready_made(serde_json::to_vec(answer).unwrap_or_default());
    *response.status_mut() = status;
    response
}

/// A success, of an answer that is JSON already.
fn ready_made(answer: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], answer.into()).into_response()
}
