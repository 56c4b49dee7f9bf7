//! Runs `mesh-sidecar` and speaks with it: has it started, started again when it ends, and ended when meshd ends.
//!
//! Owns when it runs, its socket and the bounds on what comes out of it. It does not know what a node list is good for: all
//! that the sidecar says is handed on, and the daemon never waits for any of it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

use super::launcher::{Launching, PATIENCE, PROGRAM};
use crate::membership::link::{FromMeshd, FromSidecar, Hello, Peers, Refusal, Request};
use crate::membership::settings::Settings;

/// The first pause before a new start, which doubles up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// Who ran for so long did not fail at its start.
const STEADY: Duration = Duration::from_secs(10);
/// How long it may leave what we say unread.
const DEAF: Duration = Duration::from_secs(10);
/// It is asked whether it is there so often, and ended when it has said nothing to so many.
const PING: Duration = Duration::from_secs(10);
const UNANSWERED: u32 = 3;
/// The longest message: what a hundred thousand nodes need.
const MAX_LINE: u64 = 128 << 20;

/// What happens beside the daemon.
#[derive(Debug)]
pub(super) enum News {
    /// The sidecar runs.
    Up,
    /// It said something.
    Said(Box<FromSidecar>),
    /// It does not run, for this reason; it is being started again.
    Down(String),
}

/// A question for the sidecar. Whoever asks hears nothing when the sidecar ends before it has answered.
pub(super) struct Ask {
    pub request: Request,
    pub answer: oneshot::Sender<Result<Value, Refusal>>,
}

/// The supervised sidecar. Dropping it ends the process without waiting; [`Sidecar::stop`] waits.
pub(super) struct Sidecar {
    settings: watch::Sender<Settings>,
    hello: watch::Sender<Option<Hello>>,
    peers: watch::Sender<Peers>,
    task: JoinHandle<Launching>,
}

impl Sidecar {
    /// Has the launcher start it. `asks` is where questions come from.
    pub(super) fn start(
        launcher: Launching,
        settings: Settings,
        asks: mpsc::Receiver<Ask>,
        news: mpsc::Sender<News>,
    ) -> Self {
        Self::start_pinged(launcher, settings, asks, news, PING)
    }

    fn start_pinged(
        launcher: Launching,
        settings: Settings,
        asks: mpsc::Receiver<Ask>,
        news: mpsc::Sender<News>,
        ping: Duration,
    ) -> Self {
        let (settings, given) = watch::channel(settings);
        let (hello, said) = watch::channel(None);
        let (peers, known) = watch::channel(Peers::default());
        let supervisor = Supervisor { launcher, settings: given, hello: said, peers: known, asks, news, ping };
        Sidecar { settings, hello, peers, task: tokio::spawn(supervisor.supervise()) }
    }

    /// Says who this node is, now and to each new sidecar. The first time lets the sidecar begin.
    pub(super) fn hello(&self, hello: Hello) {
        self.hello.send_if_modified(|former| former.replace(hello.clone()).as_ref() != Some(&hello));
    }

    /// Says what the data path knows of others.
    pub(super) fn peers(&self, peers: Peers) {
        self.peers.send_if_modified(|former| {
            let other = *former != peers;
            *former = peers;
            other
        });
    }

    /// Other settings are another sidecar, but for a server's names.
    pub(super) fn configure(&self, settings: Settings) {
        self.settings.send_if_modified(|former| {
            let other = *former != settings;
            *former = settings;
            other
        });
    }

    /// Ends it for another one, which says everything anew.
    pub(super) fn restart(&self) {
        self.settings.send_modify(|_| {});
    }

    /// Ends it, and waits until it has. The launcher is free then.
    pub(super) async fn stop(self) -> Option<Launching> {
        let Sidecar { settings, hello, peers, task } = self;
        drop((settings, hello, peers));
        let ended = timeout(PATIENCE + Duration::from_secs(1), task).await;
        if ended.is_err() {
            tracing::warn!("{PROGRAM} does not end");
        }
        ended.ok()?.ok()
    }
}

struct Supervisor {
    launcher: Launching,
    settings: watch::Receiver<Settings>,
    hello: watch::Receiver<Option<Hello>>,
    peers: watch::Receiver<Peers>,
    asks: mpsc::Receiver<Ask>,
    news: mpsc::Sender<News>,
    /// Between two questions whether it is there.
    ping: Duration,
}

/// Why a sidecar is no more.
enum End {
    /// meshd stops.
    Stop,
    /// Its settings are others now.
    Configured,
    /// It failed.
    Failed(String),
}

impl Supervisor {
    async fn supervise(mut self) -> Launching {
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            let why = match self.run().await {
                End::Stop => return self.launcher,
                End::Configured => continue,
                End::Failed(why) => why,
            };
            if started.elapsed() > STEADY {
                pause = FIRST_PAUSE;
            }
            if self.news.send(News::Down(why.clone())).await.is_err() || self.rest(pause, &why).await.is_none() {
                return self.launcher;
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Waits, and tells whoever asks meanwhile that nobody is there. `None` when meshd stops.
    async fn rest(&mut self, pause: Duration, why: &str) -> Option<()> {
        let over = sleep(pause);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return Some(()),
                changed = self.settings.changed() => return changed.ok(),
                Some(ask) = self.asks.recv() => {
                    let message = format!("{PROGRAM} is being started again ({why}): try again in some seconds");
                    ask.answer.send(Err(Refusal { message })).ok();
                }
            }
        }
    }

    /// One sidecar, from its start to its end.
    async fn run(&mut self) -> End {
        let settings = self.settings.borrow_and_update().clone();
        let link = match UnixStream::pair() {
            Ok((ours, theirs)) => match theirs.into_std().and_then(|link| link.set_nonblocking(false).map(|()| link)) {
                Ok(theirs) => self.launcher.launch(OwnedFd::from(theirs)).await.map(|()| ours),
                Err(error) => Err(error.to_string()),
            },
            Err(error) => Err(error.to_string()),
        };
        let link = match link {
            Ok(link) => link,
            Err(why) => return End::Failed(why),
        };
        let end = self.converse(settings, link).await;
        // the socket is closed by now, which is its word to end; who has failed already gets no time to think about it
        let patience = if matches!(end, End::Failed(_)) { Duration::ZERO } else { PATIENCE };
        if timeout(patience, self.launcher.ended()).await.is_err() {
            self.launcher.kill().await;
            self.launcher.ended().await;
        }
        end
    }

    async fn converse(&mut self, mut settings: Settings, link: UnixStream) -> End {
        let (read, mut write) = link.into_split();
        let (said, mut lines) = mpsc::channel(16);
        let reader = Reader(tokio::spawn(read_lines(read, said)));
        if let Err(why) = say(&mut write, &settings).await {
            return End::Failed(why);
        }
        if self.news.send(News::Up).await.is_err() {
            return End::Stop;
        }
        self.hello.mark_changed();
        if *self.peers.borrow_and_update() != Peers::default() {
            self.peers.mark_changed();
        }
        let mut ping = interval_at(Instant::now() + self.ping, self.ping);
        // after a standstill it gets its time to answer like everybody
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unanswered = 0;
        let mut pending: HashMap<u64, oneshot::Sender<Result<Value, Refusal>>> = HashMap::new();
        let mut last_id = 0;
        let end = loop {
            let message = tokio::select! {
                // in this order: who this node is comes before what is asked, and a sidecar that talks without end comes last
                biased;
                changed = self.settings.changed() => match changed {
                    Ok(()) => match names_alone(&mut settings, &self.settings.borrow_and_update()) {
                        Some(names) => names,
                        None => break End::Configured,
                    },
                    Err(_) => break End::Stop,
                },
                changed = self.hello.changed() => match (changed, self.hello.borrow_and_update().clone()) {
                    (Err(_), _) => break End::Stop,
                    (Ok(()), None) => continue,
                    (Ok(()), Some(hello)) => FromMeshd::Hello(hello),
                },
                changed = self.peers.changed() => match changed {
                    Err(_) => break End::Stop,
                    Ok(()) => FromMeshd::Peers(self.peers.borrow_and_update().clone()),
                },
                _ = ping.tick() => {
                    if unanswered == UNANSWERED {
                        break End::Failed(format!("{PROGRAM} has not answered for {} s", (self.ping * unanswered).as_secs()));
                    }
                    unanswered += 1;
                    FromMeshd::Ping
                }
                Some(Ask { request, answer }) = self.asks.recv() => {
                    last_id += 1;
                    pending.retain(|_, answer| !answer.is_closed());
                    pending.insert(last_id, answer);
                    FromMeshd::Request { id: last_id, request }
                }
                line = lines.recv() => match line {
                    Some(Ok(FromSidecar::Pong)) => {
                        unanswered = 0;
                        continue;
                    }
                    Some(Ok(FromSidecar::Answer { id, result })) => {
                        if let Some(answer) = pending.remove(&id) {
                            answer.send(result).ok();
                        }
                        continue;
                    }
                    Some(Ok(message)) => match self.news.send(News::Said(Box::new(message))).await {
                        Ok(()) => continue,
                        Err(_) => break End::Stop,
                    },
                    Some(Err(why)) => break End::Failed(why),
                    None => break End::Failed(ended(&mut self.launcher).await),
                },
            };
            if let Err(why) = say(&mut write, &message).await {
                break End::Failed(why);
            }
        };
        drop(reader);
        end
    }
}

/// What a running sidecar is told, where its settings differ by what may change under way: a server's names. A restart would
/// take its etcd along.
fn names_alone(settings: &mut Settings, new: &Settings) -> Option<FromMeshd> {
    if settings.tls_san == new.tls_san {
        return None;
    }
    settings.tls_san.clone_from(&new.tls_san);
    (settings == new).then(|| FromMeshd::Names { tls_san: new.tls_san.clone() })
}

/// Ends the reading with whoever reads.
struct Reader(JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn say(write: &mut (impl AsyncWriteExt + Unpin), message: &impl serde::Serialize) -> Result<(), String> {
    let mut line = serde_json::to_vec(message).map_err(|error| error.to_string())?;
    line.push(b'\n');
    match timeout(DEAF, write.write_all(&line)).await {
        Ok(Ok(())) => Ok(()),
        // that it ended is the reader's to say, and how; this would only come first now and then
        Ok(Err(_)) => Ok(()),
        Err(_) => Err(format!("{PROGRAM} reads nothing any more")),
    }
}

/// Hands on each message, until the link is closed or something comes that is none.
async fn read_lines(read: OwnedReadHalf, said: mpsc::Sender<Result<FromSidecar, String>>) {
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let message = match (&mut read).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) if line.last() == Some(&b'\n') => serde_json::from_slice(&line)
                .map_err(|error| format!("{PROGRAM} said something that this meshd does not understand ({error})")),
            Ok(n) if n as u64 >= MAX_LINE => Err(format!("{PROGRAM} said more than {MAX_LINE} bytes at once")),
            Ok(_) => return, // it ended in the middle of a word
        };
        let last = message.is_err();
        if said.send(message).await.is_err() || last {
            return;
        }
        if line.capacity() > 1 << 20 {
            line = Vec::new();
        }
    }
}

async fn ended(launcher: &mut Launching) -> String {
    let ended = timeout(Duration::from_millis(500), launcher.ended()).await;
    ended.unwrap_or_else(|_| format!("{PROGRAM} closed its link"))
}

#[cfg(test)]
mod tests;
