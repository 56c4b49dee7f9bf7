//! A TCP proxy that cuts a connection at a chosen moment, before a request gets through or before its answer does; or lets
//! nothing through from then on, and cuts nothing either, as a network that is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub(crate) struct Proxy {
    pub(crate) port: u16,
    /// Requests that still get through; the next one is the one that is cut. Negative: nothing is cut.
    left: Arc<AtomicI64>,
    /// Whether the request that is cut gets through, and only its answer does not.
    answers: Arc<AtomicI64>,
    /// Whether nothing gets through any more.
    silence: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(to: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (left, answers) = (Arc::new(AtomicI64::new(-1)), Arc::new(AtomicI64::new(0)));
        let mut tasks = JoinSet::new();
        let (requests, only_answers) = (left.clone(), answers.clone());
        let silence = watch::Sender::new(false);
        let hushed = silence.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { continue };
                connections.spawn(carry(client, server, requests.clone(), only_answers.clone(), hushed.clone()));
            }
        });
        Proxy { port, left, answers, silence, _tasks: tasks }
    }

    /// Lets so many further requests through, and then nothing, either way, on any connection.
    pub(crate) fn hush(&self, after: i64) {
        self.answers.store(HUSH, Ordering::SeqCst);
        self.left.store(after, Ordering::SeqCst);
    }

    /// Returns when nothing gets through any more.
    pub(crate) async fn hushed(&self) {
        let _ = self.silence.subscribe().wait_for(|silent| *silent).await;
    }

    /// Lets everything through, what has waited as well.
    pub(crate) fn speak(&self) {
        self.silence.send_replace(false);
    }

    /// Cuts once, after so many further requests.
    pub(crate) fn cut(&self, after: i64, only_the_answer: bool) {
        self.answers.store(only_the_answer.into(), Ordering::SeqCst);
        self.left.store(after, Ordering::SeqCst);
    }

    /// Whether what `cut` asked for has happened; it will not any more.
    pub(crate) fn has_cut(&self) -> bool {
        self.left.swap(-1, Ordering::SeqCst) < 0
    }
}

/// In the place of whether only an answer is cut.
const HUSH: i64 = 2;

async fn carry(
    client: TcpStream,
    server: TcpStream,
    left: Arc<AtomicI64>,
    answers: Arc<AtomicI64>,
    hushed: watch::Sender<bool>,
) {
    let (mut back_heard, mut forth_heard) = (hushed.subscribe(), hushed.subscribe());
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let silent = Arc::new(AtomicBool::new(false));
    let silence = silent.clone();
    let back = async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
            let _ = back_heard.wait_for(|silent| !silent).await;
            if silent.load(Ordering::SeqCst) || to_client.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    };
    let forth = async move {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Ok(n @ 1..) = from_client.read(&mut buffer).await else { return };
            let now = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| (n >= 0).then_some(n - 1));
            let hush = now == Ok(0) && answers.load(Ordering::SeqCst) == HUSH;
            if hush {
                hushed.send_replace(true);
            }
            let _ = forth_heard.wait_for(|silent| !silent).await;
            let cut = now == Ok(0) && !hush;
            if cut && answers.load(Ordering::SeqCst) == 0 {
                return;
            }
            if cut {
                silence.store(true, Ordering::SeqCst);
            }
            if to_server.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = back => {}
        () = forth => {}
    }
}
