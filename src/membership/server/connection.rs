//! A connection, from its first request to its end.
//!
//! HTTP is hyper's, which keeps two buffers of 8 KiB as long as it has the connection. A node's connection waits nearly all
//! of its life, and there are ten thousand of them: hyper has it only while somebody speaks. Who asks for news is left to
//! wait here, with nothing but the revision that it has, and is answered here, too. Whatever else is asked, and by clients
//! that say how they want the connection treated, hyper sees to the end.

use std::io::{self, Write as _};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, Version, header};
use axum::response::Response;
use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::{HEAD, Peer, Shared, routes};
use crate::membership::clock::Now;

/// The answers, to be given over connections.
pub(super) type Routes = TowerToHyperService<axum::Router>;

/// Whether a request may be answered here: where the client says nothing of the connection, HTTP/1.1 keeps it (RFC 9112 §9.3).
pub(super) fn may_leave(request: &Request) -> bool {
    let says = |name| request.headers().contains_key(name);
    request.version() == Version::HTTP_11 && !says(header::CONNECTION) && !says(header::EXPECT)
}

/// Answers whatever is asked, until one of the two ends it.
pub(super) async fn converse(
    stream: TlsStream<TcpStream>,
    peer: Arc<Peer>,
    shared: Arc<Shared>,
    routes: Routes,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut stream = Stream { tls: stream, ahead: Bytes::new(), flushed: Arc::new(AtomicBool::new(true)) };
    while timeout(HEAD, stream.speaks()).await.is_ok_and(|speaks| speaks) {
        // In a box of its own: gone while the connection waits.
        let (left, from) = match Box::pin(serve(stream, &peer, &routes)).await? {
            Some(left) => left,
            None => return Ok(()),
        };
        stream = left;
        let answer = tokio::select! {
            answer = routes::news(&shared, &peer, from) => answer,
            () = stream.ends() => break,
        };
        stream.answer(answer).await?;
    }
    Ok(stream.tls.shutdown().await?)
}

/// Has hyper serve it, until it ends, or somebody waits for what is after a revision.
async fn serve(stream: Stream, peer: &Arc<Peer>, routes: &Routes) -> Result<Option<(Stream, u64)>, hyper::Error> {
    let flushed = stream.flushed.clone();
    let service = service_fn(|mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        hyper::service::Service::call(routes, request)
    });
    let mut served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    let from = std::future::poll_fn(|cx| {
        if let Poll::Ready(ended) = Pin::new(&mut served).poll(cx) {
            return Poll::Ready(ended.map(|()| None));
        }
        // Answers to what was asked before have to be on their way.
        match flushed.load(Ordering::Relaxed).then(|| peer.waits_for().take()).flatten() {
            Some(from) => Poll::Ready(Ok(Some(from))),
            None => Poll::Pending,
        }
    });
    let Some(from) = from.await? else { return Ok(None) };
    let parts = served.into_parts();
    let mut stream = parts.io.into_inner();
    if !parts.read_buf.is_empty() {
        // A copy of its own, since these few bytes hold the whole buffer.
        stream.ahead = [&parts.read_buf[..], &stream.ahead[..]].concat().into();
    }
    Ok(Some((stream, from)))
}

/// A TLS stream, with what was already read from it.
struct Stream {
    tls: TlsStream<TcpStream>,
    ahead: Bytes,
    /// Whether all that was written is on its way.
    flushed: Arc<AtomicBool>,
}

impl Stream {
    /// Waits for the first byte of a request; `false`: there will be none.
    async fn speaks(&mut self) -> bool {
        std::future::poll_fn(|cx| {
            if !self.ahead.is_empty() {
                return Poll::Ready(true);
            }
            let mut byte = [0];
            let mut buffer = ReadBuf::new(&mut byte);
            let read = ready!(Pin::new(&mut self.tls).poll_read(cx, &mut buffer));
            self.ahead = Bytes::copy_from_slice(buffer.filled());
            Poll::Ready(read.is_ok() && !self.ahead.is_empty())
        })
        .await
    }

    /// Waits for its end. A client that asks for more before it is answered is not read any further.
    async fn ends(&mut self) {
        if self.speaks().await {
            std::future::pending::<()>().await;
        }
    }

    /// Answers as hyper does.
    async fn answer(&mut self, answer: Response) -> io::Result<()> {
        let (parts, body) = answer.into_parts();
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        let mut answer = Bytes::from(head(parts.status, &parts.headers, body.len())).chain(body);
        self.tls.write_all_buf(&mut answer).await?;
        self.tls.flush().await
    }
}

/// The head of an answer (RFC 9112 §4).
fn head(status: StatusCode, headers: &HeaderMap, length: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(256);
    let _ = write!(head, "HTTP/1.1 {status}\r\n");
    for (name, value) in headers {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    let _ = write!(head, "content-length: {length}\r\ndate: {}\r\n\r\n", Now::read().http_date());
    head
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            return Pin::new(&mut self.tls).poll_read(cx, into);
        }
        let part = self.ahead.len().min(into.remaining());
        into.put_slice(&self.ahead.split_to(part));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.flushed.store(false, Ordering::Relaxed);
        Pin::new(&mut self.tls).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.flushed.store(false, Ordering::Relaxed);
        Pin::new(&mut self.tls).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes when it has written everything
        let flushed = ready!(Pin::new(&mut self.tls).poll_flush(cx));
        self.flushed.store(flushed.is_ok(), Ordering::Relaxed);
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
