//! One server and many nodes: what it costs. Prints figures; run by hand, since it takes a while:
//! `MESHD_SCALE_NODES=10000 cargo test --release --test membership_scale -- --ignored --nocapture`
//!
//! `MESHD_SCALE_STORE` is sqlite, etcd, mysql or postgres: a real one that is started for it, and whose load is told as well.
//! `MESHD_SCALE_SIDECAR` names another build of the server's program.
//!
//! The server is the real process. The nodes are real as far as the server can tell: each has its own key, certificate and TLS
//! connection, and polls as an agent does; only their lists are not kept.

#[path = "membership/etcds.rs"]
#[allow(dead_code)]
mod etcds;
#[path = "datastores/servers.rs"]
#[allow(dead_code)]
mod servers;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Method;
use meshd::membership::api::{JoinAnswer, JoinRequest, Myself, Poll, TokenProof};
use meshd::membership::client::Connection;
use meshd::membership::clock::Now;
use meshd::membership::link::{FromMeshd, FromSidecar, Hello, Request};
use meshd::membership::random;
use meshd::membership::record::{Mode, Role};
use meshd::membership::settings::{Datastore, Secret, Settings};
use meshd::membership::tls::{ClientIdentity, Trust};
use meshd::membership::token::Token;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::Deserialize;
use tokio::sync::{Semaphore, mpsc};

/// A poll's answer, of which only the revision is looked at.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "type")]
    kind: String,
    revision: Option<u64>,
    to: Option<u64>,
}

struct Fake {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl Fake {
    fn identity(&self) -> ClientIdentity {
        let key = PrivatePkcs8KeyDer::from(self.key.serialized_der().to_vec()).into();
        ClientIdentity { certificate: self.certificate.clone(), key }
    }
}

async fn join(server: SocketAddr, token: &Token, n: u32) -> Fake {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let join = JoinRequest {
        name: format!("node-{n}"),
        role: Role::Agent,
        myself: Myself {
            underlay: vec![SocketAddr::new(Ipv4Addr::from(0xac10_0000 + n).into(), 8472)],
            public_keys: vec![STANDARD.encode(random::bytes::<32>())],
            encryption: Mode::Wireguard,
            labels: BTreeMap::new(),
            taints: vec![],
        },
        control_only: false,
        request: STANDARD.encode(CertificateParams::default().serialize_request(&key).unwrap().der()),
        clock: Now::read().unix,
        token: Some(TokenProof { id: token.id.to_string(), secret: Secret::new(random::hex(&token.secret.0)) }),
    };
    let mut connection = Connection::open(&server.into(), Trust::Hash(token.ca_hash), None).await.unwrap();
    let answer: JoinAnswer = connection.ask(Method::POST, "/v1/join", &join).await.unwrap();
    Fake { key, certificate: STANDARD.decode(answer.certificate).unwrap().into() }
}

/// CPU seconds, resident KiB, and peak KiB.
fn usage(pid: u32) -> (f64, u64, u64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kib = |key: &str| {
        let line = status.lines().find(|l| l.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (ticks / 100.0, kib("VmRSS:"), kib("VmHWM:"))
}

/// The store that the server uses.
enum Place {
    Sqlite(std::path::PathBuf),
    Etcd(Box<etcds::Etcds>),
    Sql(servers::Server),
}

/// What it has done so far.
struct Load {
    revision: u64,
    /// Statements of a database; proposals of etcd.
    asked: u64,
    cpu: f64,
}

impl Place {
    async fn start(kind: &str, dir: &std::path::Path) -> (Self, Datastore) {
        match kind {
            "sqlite" => (Place::Sqlite(dir.join(meshd::membership::sidecar::DATABASE)), Datastore::default()),
            "etcd" => {
                let etcds = etcds::Etcds::start("many_nodes", 1).await.expect("it is installed");
                let endpoint = Some(Secret::new(format!("etcd://127.0.0.1:{}", etcds.port())));
                (Place::Etcd(Box::new(etcds)), Datastore { endpoint, ..Datastore::default() })
            }
            "mysql" | "postgres" => {
                let kind = if kind == "mysql" { servers::Kind::MariaDb } else { servers::Kind::Postgres };
                let server =
                    tokio::task::block_in_place(|| servers::Server::start(kind, true)).expect("it is installed");
                let datastore = server.database("scale").await;
                (Place::Sql(server), datastore)
            }
            other => panic!("MESHD_SCALE_STORE is sqlite, etcd, mysql or postgres, and not {other}"),
        }
    }

    /// TCP connections to it.
    fn connections(&self) -> usize {
        let port = match self {
            Place::Sqlite(_) => return 0,
            Place::Etcd(etcds) => etcds.port(),
            Place::Sql(server) => server.port,
        };
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let to = format!(":{port:04X}");
        let there = |line: &&str| {
            let mut fields = line.split_whitespace().skip(2);
            fields.next().is_some_and(|remote| remote.ends_with(&to)) && fields.next() == Some("01")
        };
        table.lines().filter(there).count()
    }

    async fn load(&self) -> Load {
        match self {
            Place::Sqlite(path) => {
                let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path).read_only(true);
                let mut c = sqlx::ConnectOptions::connect(&options).await.unwrap();
                let revision: i64 =
                    sqlx::query_scalar("SELECT revision FROM meshd_state").fetch_one(&mut c).await.unwrap();
                Load { revision: revision as u64, asked: 0, cpu: 0.0 }
            }
            Place::Etcd(etcds) => {
                let (revision, index) = etcds.progress();
                Load { revision, asked: index, cpu: cpu_of(&["etcd"]) }
            }
            Place::Sql(server) => {
                let asked = match server.kind {
                    servers::Kind::MariaDb => {
                        "SELECT CAST(variable_value AS SIGNED) FROM information_schema.global_status
                         WHERE variable_name = 'QUESTIONS'"
                    }
                    servers::Kind::Postgres => {
                        "SELECT CAST(xact_commit + xact_rollback AS int8) FROM pg_stat_database WHERE datname = 'scale'"
                    }
                };
                let asked = server.number("scale", asked).await as u64;
                let revision = server.number("scale", "SELECT revision FROM meshd_state").await as u64;
                Load { revision, asked, cpu: cpu_of(&["mariadbd", "postgres"]) }
            }
        }
    }
}

/// CPU seconds of all processes of these names below this one.
fn cpu_of(names: &[&str]) -> f64 {
    let mut processes = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let (head, tail) = stat.rsplit_once(')').unwrap();
        let name = head.split_once('(').unwrap().1.to_owned();
        let fields: Vec<u64> = tail.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0)).collect();
        // ended children count for their parent
        processes.insert(pid, (fields[0] as u32, name, fields[10] + fields[11] + fields[12] + fields[13]));
    }
    let mine = |mut pid: u32| {
        while let Some((parent, ..)) = processes.get(&pid) {
            if *parent == std::process::id() {
                return true;
            }
            pid = *parent;
        }
        false
    };
    let all = processes.iter().filter(|(pid, (_, name, _))| names.contains(&name.as_str()) && mine(**pid));
    all.map(|(_, (_, _, ticks))| *ticks as f64 / 100.0).sum()
}

fn percentile(sorted: &[Duration], p: usize) -> Duration {
    sorted[(sorted.len() - 1) * p / 100]
}

#[test]
#[ignore = "takes minutes; prints figures"]
fn many_nodes() {
    let limit = getrlimit(Resource::Nofile); // a connection each
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let count: u32 = std::env::var("MESHD_SCALE_NODES").map_or(1000, |n| n.parse().unwrap());
    let dir = tempfile::TempDir::new().unwrap();
    let address: SocketAddr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let kind = std::env::var("MESHD_SCALE_STORE").unwrap_or_else(|_| "sqlite".to_owned());
    let (place, datastore) = runtime.block_on(Place::start(&kind, dir.path()));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let program =
        std::env::var("MESHD_SCALE_SIDECAR").unwrap_or_else(|_| env!("CARGO_BIN_EXE_mesh-sidecar").to_owned());
    let mut child = Command::new(program).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
    let pid = child.id();
    let mut settings = Settings::new(Role::Server, dir.path());
    settings.bind_address = address;
    settings.datastore = datastore;
    settings.cluster_cidr = vec!["10.0.0.0/8".parse().unwrap()];
    settings.log = std::env::var("MESHD_SCALE_LOG").unwrap_or_else(|_| "error".to_owned());
    let say = |message: serde_json::Value| (&ours).write_all(format!("{message}\n").as_bytes()).unwrap();
    let mut lines = BufReader::new(ours.try_clone().unwrap()).lines();
    say(serde_json::to_value(&settings).unwrap());
    let hello = Hello {
        name: "server".to_owned(),
        underlay: vec!["192.0.2.1:8472".parse().unwrap()],
        public_keys: vec![],
        encryption: Mode::None,
    };
    say(serde_json::to_value(FromMeshd::Hello(hello)).unwrap());
    while !lines.next().unwrap().unwrap().contains("\"list\"") {}
    let request = Request::TokenCreate { role: Role::Agent, ttl: None, uses: None, node: None };
    say(serde_json::to_value(FromMeshd::Request { id: 1, request }).unwrap());
    let token: Token = loop {
        let line = lines.next().unwrap().unwrap();
        if let FromSidecar::Answer { result, .. } = serde_json::from_str(&line).unwrap() {
            break result.unwrap()["token"].as_str().unwrap().parse().unwrap();
        }
    };
    std::thread::spawn(move || lines.for_each(drop)); // as meshd would

    runtime.block_on(async {
        let (_, rss, _) = usage(pid);
        println!("start: {rss} KiB resident; {kind}, {} connections", place.connections());
        for (what, at_once) in [("alone", 1), ("50 at once", 50)] {
            let mut times = Vec::new();
            for round in 0..20 / at_once.min(5) {
                let joins = (0..at_once).map(|n| {
                    let (token, n) = (token.clone(), count + at_once * (100 + round) + n);
                    tokio::spawn(async move {
                        let start = Instant::now();
                        join(address, &token, n).await;
                        start.elapsed()
                    })
                });
                for join in joins.collect::<Vec<_>>() {
                    times.push(join.await.unwrap());
                }
            }
            times.sort();
            println!("joins, {what}: p50 {:.1?}, p99 {:.1?} of {}", percentile(&times, 50), percentile(&times, 99), times.len());
        }
        let told = |what: &str, seconds: f64, before: &Load, after: &Load| {
            let per_second = |n: u64| n as f64 / seconds;
            println!(
                "{kind}, {what}: {:.2} revisions a second, {:.2} statements or proposals a second, {:.1} % of a core, {} connections",
                per_second(after.revision - before.revision),
                per_second(after.asked - before.asked),
                (after.cpu - before.cpu) / seconds * 100.0,
                place.connections()
            );
        };
        let loaded = place.load().await;
        let (begin, (cpu, ..)) = (Instant::now(), usage(pid));
        let gate = Arc::new(Semaphore::new(50));
        let joins: Vec<_> = (0..count)
            .map(|n| {
                let (gate, token) = (gate.clone(), token.clone());
                tokio::spawn(async move {
                    let _turn = gate.acquire().await.unwrap();
                    let start = Instant::now();
                    (join(address, &token, n).await, start.elapsed())
                })
            })
            .collect();
        let (mut fakes, mut times) = (Vec::new(), Vec::new());
        for join in joins {
            let (fake, time) = join.await.unwrap();
            fakes.push(fake);
            times.push(time);
        }
        times.sort();
        let (took, used) = (begin.elapsed(), usage(pid));
        println!(
            "{count} joins, 50 at once: {took:.1?} ({:.0}/s), p50 {:.1?}, p99 {:.1?}; server {:.1} s CPU, {} KiB resident",
            f64::from(count) / took.as_secs_f64(),
            percentile(&times, 50),
            percentile(&times, 99),
            used.0 - cpu,
            used.1
        );
        told("joins", took.as_secs_f64(), &loaded, &place.load().await);

        // One whole list, to know where the others start, and how long and large it is.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let ca = Trust::Hash(token.ca_hash);
        let mut first = Connection::open(&address.into(), ca.clone(), Some(fakes[0].identity())).await.unwrap();
        let start = Instant::now();
        let poll = Poll { revision: None, no_wait: true, reaches: vec![], paths: vec![] };
        let whole: serde_json::Value = first.ask(Method::POST, "/v1/poll", &poll).await.unwrap();
        let size = serde_json::to_vec(&whole).unwrap().len();
        let revision = whole["revision"].as_u64().unwrap();
        println!("whole list: {size} bytes, {:.1?}", start.elapsed());
        drop(first);

        let begin = Instant::now();
        let before = usage(pid);
        let (heard, mut news) = mpsc::unbounded_channel::<(u64, Instant)>();
        let gate = Arc::new(Semaphore::new(100));
        let (connected, mut connections) = mpsc::unbounded_channel::<()>();
        for fake in fakes {
            let (heard, gate, ca, connected) = (heard.clone(), gate.clone(), ca.clone(), connected.clone());
            tokio::spawn(async move {
                let turn = gate.acquire_owned().await.unwrap();
                let mut connection = Connection::open(&address.into(), ca.clone(), Some(fake.identity())).await.unwrap();
                drop(turn);
                connected.send(()).unwrap();
                let mut revision = revision;
                loop {
                    let poll = Poll { revision: Some(revision), no_wait: false, reaches: vec![], paths: vec![] };
                    let wait = Duration::from_secs(60);
                    let answer = match connection.ask_patiently::<Answer>("/v1/poll", &poll, wait).await {
                        Ok(answer) => answer,
                        Err(error) if error.code() == Some("removed") => return,
                        Err(error) => {
                            // As an agent would, without its pauses.
                            println!("again: {error}");
                            let again = Connection::open(&address.into(), ca.clone(), Some(fake.identity())).await;
                            connection = again.unwrap();
                            continue;
                        }
                    };
                    assert_ne!(answer.kind, "list");
                    let now = answer.to.or(answer.revision).unwrap();
                    if now != revision {
                        revision = now;
                        let _ = heard.send((revision, Instant::now()));
                    }
                }
            });
        }
        for _ in 0..count {
            connections.recv().await.unwrap();
        }
        let used = usage(pid);
        println!(
            "{count} connections with certificates: {:.1?}; server {:.1} s CPU, {} KiB resident",
            begin.elapsed(),
            used.0 - before.0,
            used.1
        );
        tokio::time::sleep(Duration::from_secs(12)).await;
        let seconds: u64 = std::env::var("MESHD_SCALE_SECONDS").map_or(30, |n| n.parse().unwrap());
        let loaded = place.load().await;
        let (begin, before) = (Instant::now(), usage(pid));
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let (used, took) = (usage(pid), begin.elapsed());
        told("heartbeats", took.as_secs_f64(), &loaded, &place.load().await);
        println!(
            "heartbeats of {count} nodes: {:.1} % of a core, {} KiB resident, {} KiB at most",
            (used.0 - before.0) / took.as_secs_f64() * 100.0,
            used.1,
            used.2
        );
        // 64 MiB, and 16 KiB a node; a debug build's may be larger.
        let limit = (64 << 10) + 16 * u64::from(count);
        assert!(cfg!(debug_assertions) || used.2 <= limit, "{} KiB resident at most, and not {limit}", used.2);

        for (id, request) in [
            (2, Request::NodeDrain { name: "node-1".to_owned() }),
            (3, Request::NodeRemove { name: "node-2".to_owned() }),
        ] {
            while news.try_recv().is_ok() {}
            let (start, before) = (Instant::now(), usage(pid));
            let removes = matches!(request, Request::NodeRemove { .. });
            say(serde_json::to_value(FromMeshd::Request { id, request }).unwrap());
            // Who is removed hears that it was, and no news.
            let wanted = if removes { count - 1 } else { count };
            let mut last = start;
            for _ in 0..wanted {
                let (_, at) = tokio::time::timeout(Duration::from_secs(60), news.recv()).await.unwrap().unwrap();
                last = last.max(at);
            }
            println!(
                "a change is heard by {wanted} nodes within {:.2?}; server {:.2} s CPU",
                last - start,
                usage(pid).0 - before.0
            );
        }
    });
    runtime.shutdown_background();
    child.kill().unwrap();
    child.wait().unwrap();
}
