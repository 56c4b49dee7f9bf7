//! One server and many nodes: what it costs. Prints figures; run by hand, since it takes a while:
//! `MESHD_SCALE_NODES=10000 cargo test --release --test membership_scale -- --ignored --nocapture`
//!
//! The server is the real process. The nodes are real as far as the server can tell: each has its own key, certificate and TLS
//! connection, and polls as an agent does; only their lists are not kept.

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
use meshd::membership::settings::{Secret, Settings};
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
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_mesh-sidecar")).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
    let pid = child.id();
    let mut settings = Settings::new(Role::Server, dir.path());
    settings.bind_address = address;
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

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (_, rss, _) = usage(pid);
        println!("start: {rss} KiB resident");
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
        let (begin, before) = (Instant::now(), usage(pid));
        tokio::time::sleep(Duration::from_secs(30)).await;
        let used = usage(pid);
        println!(
            "heartbeats of {count} nodes: {:.1} % of a core, {} KiB resident, {} KiB at most",
            (used.0 - before.0) / begin.elapsed().as_secs_f64() * 100.0,
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
