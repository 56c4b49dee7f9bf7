//! Clients of a cluster: they make, use and revoke tokens, join, remove and drain nodes, at whichever server, and write down
//! what they were told. Nodes that stay run the agent itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use meshd::membership::address::ServerAddress;
use meshd::membership::agent::View;
use meshd::membership::agent::keep::Keep;
use meshd::membership::client::ClientError;
use meshd::membership::link::Hello;
use meshd::membership::random;
use meshd::membership::record::{Mode, Role};
use meshd::membership::token::Token;
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::harness;
use super::history::{self, Answer, Entry, What};

/// Who does not answer in so long has given no answer.
const PATIENCE: Duration = Duration::from_secs(25);

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// A server, as its clients see it.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) address: ServerAddress,
    pub(crate) socket: PathBuf,
}

/// The cluster, and what was written down.
pub(crate) struct Lab {
    pub(crate) servers: Vec<Server>,
    pub(crate) meshctl: PathBuf,
    pub(crate) history: Mutex<Vec<Entry>>,
    pub(crate) stop: AtomicBool,
    /// What the choices follow from.
    pub(crate) chance: AtomicU64,
    pub(crate) file: Mutex<File>,
}

/// A node that stays.
pub(crate) struct Resident {
    pub(crate) name: String,
    pub(crate) view: View,
    node: harness::Node,
    _dir: TempDir,
}

impl Lab {
    pub(crate) fn note(&self, start: u64, what: What) {
        let entry = Entry { start, end: now(), what };
        let line = serde_json::to_string(&entry).unwrap();
        writeln!(self.file.lock().unwrap(), "{line}").unwrap();
        self.history.lock().unwrap().push(entry);
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// SplitMix64.
    pub(crate) fn below(&self, n: usize) -> usize {
        let mut z = self.chance.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % n
    }

    fn any(&self) -> Server {
        self.servers[self.below(self.servers.len())].clone()
    }

    /// `meshctl --json` on a server. Anything but a clear yes is no answer.
    pub(crate) async fn ctl(&self, server: &Server, args: &[&str]) -> Result<Value, String> {
        let mut command = tokio::process::Command::new(&self.meshctl);
        command.arg("--socket").arg(&server.socket).arg("--json").args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let done = timeout(PATIENCE, command.output()).await.map_err(|_| "no answer in time".to_owned())?;
        let done = done.map_err(|e| e.to_string())?;
        if !done.status.success() {
            return Err(String::from_utf8_lossy(&done.stderr).trim().to_owned());
        }
        serde_json::from_slice(&done.stdout).map_err(|e| e.to_string())
    }

    async fn token(&self, single: bool) -> Option<Token> {
        let (server, start) = (self.any(), now());
        let args: &[&str] = if single { &["token", "create", "--uses", "1"] } else { &["token", "create"] };
        let made = self.ctl(&server, args).await.ok()?;
        let token: Token = made["token"].as_str()?.parse().ok()?;
        self.note(start, What::Token { server: server.name, id: token.id.to_string(), single });
        Some(token)
    }

    /// One try.
    async fn join(&self, keep: &Keep, token: &Token, name: &str) -> Answer {
        let (server, start) = (self.any(), now());
        let mut request = harness::request(keep, name, Role::Agent);
        request.myself.underlay = vec![underlay(name)];
        let asked = timeout(PATIENCE, harness::join_raw(&server.address, keep, token, request)).await;
        let answer = match asked {
            Err(_) => Answer::Unknown { why: "no answer in time".to_owned() },
            Ok(Ok(joined)) => Answer::Joined { id: joined.id },
            // whether it was stored is not known, or it is to be tried again
            Ok(Err(ClientError::Refused { code, message })) if ["store", "busy", "later"].contains(&&*code) => {
                Answer::Unknown { why: message }
            }
            Ok(Err(ClientError::Refused { code, .. })) => Answer::Refused { code },
            Ok(Err(other)) => Answer::Unknown { why: other.to_string() },
        };
        let what = What::Join { server: server.name, token: token.id.to_string(), name: name.to_owned(), answer };
        self.note(start, what.clone());
        let What::Join { answer, .. } = what else { unreachable!() };
        answer
    }

    /// Tries until there is an answer, or no time.
    async fn join_at_last(&self, token: &Token, name: &str) -> Answer {
        let dir = TempDir::new().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        for _ in 0..8 {
            match self.join(&keep, token, name).await {
                Answer::Unknown { .. } if !self.stopped() => sleep(Duration::from_secs(1)).await,
                answer => return answer,
            }
        }
        Answer::Unknown { why: "given up".to_owned() }
    }

    async fn remove(&self, name: &str) {
        let (server, start) = (self.any(), now());
        let done = self.ctl(&server, &["node", "remove", name]).await.is_ok();
        self.note(start, What::Remove { server: server.name, name: name.to_owned(), done });
    }

    /// Three keys at once, for a token that is for one.
    pub(crate) async fn race(self: Arc<Self>) {
        while !self.stopped() {
            sleep(Duration::from_millis(100 + self.below(200) as u64)).await;
            let Some(token) = self.token(true).await else { continue };
            let names = [new_name(), new_name(), new_name()];
            let joins = names.iter().map(|name| self.join_at_last(&token, name));
            let answers = futures::future::join_all(joins).await;
            for (name, answer) in names.iter().zip(answers) {
                if matches!(answer, Answer::Joined { .. }) && self.below(2) == 0 {
                    self.remove(name).await;
                }
            }
        }
    }

    /// A token for many, used before and after it is revoked.
    pub(crate) async fn revoke(self: Arc<Self>) {
        while !self.stopped() {
            sleep(Duration::from_millis(100 + self.below(400) as u64)).await;
            let Some(token) = self.token(false).await else { continue };
            self.join_at_last(&token, &new_name()).await;
            let (server, start, id) = (self.any(), now(), token.id.to_string());
            let done = self.ctl(&server, &["token", "revoke", &id]).await.is_ok();
            self.note(start, What::Revoke { server: server.name, token: id, done });
            if done {
                self.join_at_last(&token, &new_name()).await;
            }
        }
    }

    /// Drains and undrains these, each until an answer is missing.
    pub(crate) async fn drain(self: Arc<Self>, names: Vec<String>) {
        for name in names {
            let mut draining = false;
            loop {
                sleep(Duration::from_millis(50 + self.below(250) as u64)).await;
                if self.stopped() {
                    return;
                }
                // twice the same is an order, too
                draining = if self.below(4) == 0 { draining } else { !draining };
                let (server, start) = (self.any(), now());
                let verb = if draining { "drain" } else { "undrain" };
                let done = self.ctl(&server, &["node", verb, &name]).await.is_ok();
                self.note(start, What::Drain { server: server.name, name: name.clone(), draining, done });
                if !done {
                    break;
                }
            }
        }
    }

    /// A write each 200 ms, whatever became of those before: so it is seen how long there was no answer to any.
    pub(crate) async fn pulse(self: Arc<Self>) {
        let mut beats = tokio::task::JoinSet::new();
        while !self.stopped() {
            sleep(Duration::from_millis(200)).await;
            while beats.try_join_next().is_some() {}
            let lab = self.clone();
            beats.spawn(async move { drop(lab.token(false).await) });
        }
        while beats.join_next().await.is_some() {}
    }

    /// What servers tell in between.
    pub(crate) async fn look(self: Arc<Self>) {
        while !self.stopped() {
            sleep(Duration::from_millis(700)).await;
            let (server, start) = (self.any(), now());
            if let Ok(nodes) = self.nodes(&server).await {
                self.note(start, What::Seen { server: server.name, nodes });
            }
        }
    }

    async fn nodes(&self, server: &Server) -> Result<Vec<history::Node>, String> {
        let nodes = self.ctl(server, &["nodes"]).await?;
        let nodes = nodes.as_array().ok_or("no array")?.iter().map(|node| history::Node {
            id: text(&node["id"]),
            name: text(&node["name"]),
            subnets: node["subnets"].as_array().into_iter().flatten().map(text).collect(),
            draining: node["state"] == "draining",
        });
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort();
        Ok(nodes)
    }

    async fn tokens(&self, server: &Server) -> Result<Vec<history::Token>, String> {
        let tokens = self.ctl(server, &["token", "list"]).await?;
        let tokens = tokens.as_array().ok_or("no array")?.iter().map(|token| history::Token {
            id: text(&token["id"]),
            uses_left: token["uses_left"].as_u64().map(|n| n as u32),
            revoked: token["revoked"] == true,
        });
        let mut tokens: Vec<_> = tokens.collect();
        tokens.sort();
        Ok(tokens)
    }

    /// Waits until all tell the same, and writes down what; or what each tells when they do not come to agree.
    pub(crate) async fn ends(&self, residents: &[Resident]) {
        let start = Instant::now();
        loop {
            let mut told = Vec::new();
            for server in &self.servers {
                let both =
                    (self.nodes(server).await.unwrap_or_default(), self.tokens(server).await.unwrap_or_default());
                told.push(both);
            }
            let ids: std::collections::BTreeSet<String> = told[0].0.iter().map(|node| node.id.clone()).collect();
            let heard = |resident: &Resident| {
                let ids_there: std::collections::BTreeSet<String> =
                    resident.view.nodes().into_iter().map(|node| node.id).collect();
                (resident.view.status.borrow().connected, ids_there)
            };
            let agree = told.iter().all(|both| *both == told[0]) && !told[0].0.is_empty();
            if (agree && residents.iter().all(|r| heard(r) == (true, ids.clone()))) || start.elapsed().as_secs() > 90 {
                for (server, (nodes, tokens)) in self.servers.iter().zip(told) {
                    self.note(now(), What::End { server: server.name.clone(), nodes, tokens });
                }
                for resident in residents {
                    let (connected, ids) = heard(resident);
                    self.note(now(), What::Resident { name: resident.name.clone(), connected, ids });
                }
                return;
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// So many agents, at once; how long it took each to be connected with a list, in ms and sorted.
    pub(crate) async fn settle(&self, count: usize) -> (Vec<Resident>, Vec<u64>) {
        let token = loop {
            match self.token(false).await {
                Some(token) => break token,
                None => sleep(Duration::from_millis(500)).await,
            }
        };
        let servers: Vec<ServerAddress> = self.servers.iter().map(|server| server.address.clone()).collect();
        let start = Instant::now();
        let begun = (0..count).map(|n| {
            let (dir, name) = (TempDir::new().unwrap(), format!("resident-{n}"));
            let hello = Hello {
                name: name.clone(),
                underlay: vec![underlay(&name)],
                public_keys: harness::myself().public_keys,
                encryption: Mode::Wireguard,
            };
            let secret = token.reveal();
            let mut node =
                harness::Node::start(harness::agent_settings(dir.path(), Some(secret.reveal()), &servers), hello);
            let (_, closed) = tokio::sync::mpsc::channel(1);
            let mut out = std::mem::replace(&mut node.out, closed);
            // as meshd would
            tokio::spawn(async move { while out.recv().await.is_some() {} });
            Resident { name, view: node.view.clone(), node, _dir: dir }
        });
        let residents: Vec<Resident> = begun.collect();
        let waits = residents.iter().map(|resident| async {
            let mut status = resident.view.status.subscribe();
            let connected = timeout(Duration::from_secs(300), status.wait_for(|status| status.connected)).await;
            assert!(connected.is_ok(), "{} does not join: {:?}", resident.name, resident.view.status.borrow());
            start.elapsed().as_millis() as u64
        });
        let mut times = futures::future::join_all(waits).await;
        times.sort_unstable();
        (residents, times)
    }
}

impl Resident {
    pub(crate) fn alive(&self) -> bool {
        !self.node.task.is_finished()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn new_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("n{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Where nobody is, and the same for a name each time: who asks again is the same node.
fn underlay(name: &str) -> SocketAddr {
    static GIVEN: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());
    let mut given = GIVEN.lock().unwrap();
    let next = given.len() as u32;
    let n = *given.entry(name.to_owned()).or_insert(next);
    SocketAddr::new(Ipv4Addr::from(0xac10_0000 + n).into(), 8472)
}

/// The file into which a shell's word comes.
pub(crate) async fn asked_to_stop(dir: &Path) {
    while !dir.join("stop").exists() {
        sleep(Duration::from_millis(100)).await;
    }
}

/// A seed that differs by purpose.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("CHAOS_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| random::below(u64::MAX))
}
