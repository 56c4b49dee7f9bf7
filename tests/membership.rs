//! Membership over real TLS on loopback: who gets in, who does not and why, and what everybody then knows.

#[path = "membership/harness.rs"]
mod harness;

use std::collections::HashSet;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Method;
use meshd::membership::agent::keep::Keep;
use meshd::membership::agent::{Agent, AgentError, Command, Heard, View};
use meshd::membership::api::{News, Poll, PollAnswer, RenewAnswer, RenewRequest};
use meshd::membership::authority::Authority;
use meshd::membership::client::{ClientError, Connection};
use meshd::membership::clock::Now;
use meshd::membership::link::{FromSidecar, Request};
use meshd::membership::record::{NodeRecord, Role};
use meshd::membership::settings::Secret;
use meshd::membership::tls::{self, LiveCertificate, Trust};
use meshd::membership::token::Token;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use harness::*;

fn code(result: Result<Joined, ClientError>) -> String {
    match result {
        Ok(_) => "joined".to_owned(),
        Err(ClientError::Refused { code, message }) => {
            assert!(message.len() > 20, "a reason for people: {message}");
            code
        }
        Err(other) => format!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_join_by_token_and_hear_of_each_other() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await.reveal();
    let (a, b) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut first = Node::start(agent_settings(a.path(), Some(token.reveal()), &[]), hello("a"));
    first.until("a joins", |s| s.joined && s.connected && s.problem.is_none()).await;
    let second = Node::start(agent_settings(b.path(), Some(token.reveal()), &[]), hello("b"));
    let nodes = first.until_nodes("a hears of b", |nodes| nodes.len() == 2).await;
    let at = Instant::now();
    second.until_nodes("b hears of a", |nodes| nodes.len() == 2).await;
    let subnets: Vec<_> = nodes.iter().map(|n| n.subnets[0].to_string()).collect();
    assert_eq!(subnets, ["10.42.0.0/24", "10.42.1.0/24"]);
    assert!(at.elapsed() < Duration::from_secs(2));
    // A whole list first, and then what changes.
    let mut lists = Vec::new();
    while let Ok(message) = first.out.try_recv() {
        lists.push(message);
    }
    assert!(matches!(&lists[0], FromSidecar::List { nodes, .. } if nodes.len() == 1), "{lists:?}");
    assert!(
        matches!(&lists[1], FromSidecar::Delta { upsert, remove, .. } if upsert[0].name == "b" && remove.is_empty()),
        "{lists:?}"
    );
    // An address that changes is told at once.
    let moved = underlay();
    second.hello.send_modify(|hello| hello.underlay = vec![moved]);
    first.until_nodes("b moved", |nodes| nodes.iter().any(|n| n.name == "b" && n.underlay == [moved])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_secret_lets_in_who_knows_it() {
    let dir = Arc::new(TempDir::new().unwrap());
    let mut with_secret = setup();
    with_secret.secret = Some(Secret::new("my-shared-secret"));
    let cluster = Cluster::open(dir, with_secret, "127.0.0.1:0".parse().unwrap()).await;
    let (a, b) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let good = Node::start(agent_settings(a.path(), Some("my-shared-secret"), &[cluster.address()]), hello("a"));
    good.until("the right secret joins", |s| s.joined && s.connected).await;
    let bad = Node::start(agent_settings(b.path(), Some("my-shared-secreT"), &[cluster.address()]), hello("b"));
    let status = bad.until("the wrong one does not", |s| s.problem.is_some()).await;
    assert!(status.problem.unwrap().contains("shared secret is wrong") && !status.joined);
    let store = std::fs::read(cluster.dir.path().join("db-wal")).unwrap_or_default();
    assert!(!contains(&store, b"my-shared-secret"), "the store has not the secret itself");
}

/// Takes TLS connections with a certificate of another CA, and tells what it was sent in them.
async fn stranger(ca: &Authority) -> (std::net::SocketAddr, tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>) {
    let leaf = ca.server_leaf(&["127.0.0.1".to_owned()], Now::read().date()).unwrap();
    let config = tls::server_config(ca.certificate(), LiveCertificate::new(&leaf).unwrap()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sent, got) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut heard = Vec::new();
            if let Ok(mut tls) = tokio_rustls::TlsAcceptor::from(config.clone()).accept(stream).await {
                let _ = tokio::time::timeout(Duration::from_millis(500), async {
                    while tls.read_buf(&mut heard).await.is_ok_and(|n| n > 0) {}
                })
                .await;
            }
            let _ = sent.send(heard);
        }
    });
    (address, got)
}

fn contains(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|w| w == needle)
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_in_the_middle_with_another_ca_is_sent_nothing() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await;
    let (evil, _) = Authority::generate("evil", Now::read().date()).unwrap();
    let (address, mut heard) = stranger(&evil).await;
    let refused = join(&address.into(), &token, "a", Role::Agent).await.err().unwrap();
    assert!(matches!(refused, ClientError::Stranger { .. }), "{refused}");
    assert_eq!(heard.recv().await.unwrap(), b"", "not one byte within TLS");
    // Positive control: to the CA that the token names, the secret is sent.
    let trusting = Token { ca_hash: evil.hash(), ..token.clone() };
    let _ = tokio::time::timeout(Duration::from_secs(1), join(&address.into(), &trusting, "a", Role::Agent)).await;
    let secret = meshd::membership::random::hex(&token.secret.0);
    assert!(contains(&heard.recv().await.unwrap(), secret.as_bytes()));
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_in_the_middle_of_the_secret_proof_learns_nothing_and_passes_nothing() {
    let dir = Arc::new(TempDir::new().unwrap());
    let mut with_secret = setup();
    with_secret.secret = Some(Secret::new("my-shared-secret"));
    let cluster = Cluster::open(dir, with_secret, "127.0.0.1:0".parse().unwrap()).await;
    // Ends the node's TLS with its own certificate, and speaks TLS of its own to the server.
    let (evil, _) = Authority::generate("evil", Now::read().date()).unwrap();
    let leaf = evil.server_leaf(&["127.0.0.1".to_owned()], Now::read().date()).unwrap();
    let config = tls::server_config(evil.certificate(), LiveCertificate::new(&leaf).unwrap()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let middle = listener.local_addr().unwrap();
    let target = cluster.server.address();
    let (seen, mut said) = tokio::sync::mpsc::unbounded_channel::<u8>();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let node = tokio_rustls::TlsAcceptor::from(config).accept(stream).await.unwrap();
        let (client, _) = tls::client_config(Trust::Unproven, None).unwrap();
        let server = TcpStream::connect(target).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let server = tokio_rustls::TlsConnector::from(client).connect(name, server).await.unwrap();
        let (mut node_read, mut node_write) = tokio::io::split(node);
        let (mut server_read, mut server_write) = tokio::io::split(server);
        tokio::spawn(async move { tokio::io::copy(&mut server_read, &mut node_write).await });
        let mut buffer = vec![0; 4096];
        while let Ok(n @ 1..) = node_read.read(&mut buffer).await {
            buffer[..n].iter().for_each(|byte| seen.send(*byte).unwrap());
            server_write.write_all(&buffer[..n]).await.unwrap();
        }
    });
    let folder = TempDir::new().unwrap();
    let keep = Keep::open(folder.path()).unwrap();
    let mut connection = Connection::open(&middle.into(), Trust::Unproven, None).await.unwrap();
    let ask = connection.join_by_secret("my-shared-secret", request(&keep, "a", Role::Agent)).await;
    assert!(matches!(&ask, Err(ClientError::Refused { code, .. }) if code == "wrong-secret"), "{ask:?}");
    drop(connection);
    let mut heard = Vec::new();
    while let Ok(Some(byte)) = tokio::time::timeout(Duration::from_millis(300), said.recv()).await {
        heard.push(byte);
    }
    assert!(contains(&heard, b"/v1/pake/finish"), "positive control: it was in the middle");
    assert!(!contains(&heard, b"my-shared-secret"));
    assert!(cluster.registry.records().is_empty());
    // Positive control: without anybody in between the same secret joins.
    let mut direct = Connection::open(&cluster.address(), Trust::Unproven, None).await.unwrap();
    direct.join_by_secret("my-shared-secret", request(&keep, "a", Role::Agent)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_tells_its_reason() {
    let cluster = cluster().await;
    let address = cluster.address();
    let now = Now::read();
    let registry = &cluster.registry;
    let good = cluster.token(Role::Agent, None).await;

    let past = Now { unix: now.unix - 100, ..now };
    let expired = registry.mint(past, Role::Agent, Some(50), None, None, "").await.unwrap();
    assert_eq!(code(join(&address, &expired, "x", Role::Agent).await), "token-expired");

    let once = cluster.token(Role::Agent, Some(1)).await;
    let first = join(&address, &once, "a", Role::Agent).await.unwrap();
    assert_eq!(code(join(&address, &once, "b", Role::Agent).await), "token-used-up");
    // The node that used it may ask again: it did not hear the answer.
    let again = join_raw(&address, &first.keep, &once, request(&first.keep, "a", Role::Agent)).await.unwrap();
    assert_eq!(again.id, first.member.id);

    let revoked = cluster.token(Role::Agent, None).await;
    registry.request(now, &Request::TokenRevoke { id: revoked.id.to_string() }).await.unwrap();
    assert_eq!(code(join(&address, &revoked, "x", Role::Agent).await), "token-revoked");

    assert_eq!(code(join(&address, &good, "x", Role::Server).await), "wrong-role");
    let bound = registry.mint(now, Role::Agent, None, None, Some("c"), "").await.unwrap();
    assert_eq!(code(join(&address, &bound, "x", Role::Agent).await), "wrong-node");
    assert_eq!(code(join(&address, &bound, "c", Role::Agent).await), "joined", "positive control");
    assert_eq!(code(join(&address, &good, "a", Role::Agent).await), "name-taken");

    let mut guess = good.clone();
    guess.secret.0[0] ^= 1;
    assert_eq!(code(join(&address, &guess, "x", Role::Agent).await), "bad-token");

    let folder = TempDir::new().unwrap();
    let keep = Keep::open(folder.path()).unwrap();
    let ask = |change: &dyn Fn(&mut meshd::membership::api::JoinRequest)| {
        let mut join = request(&keep, "x", Role::Agent);
        change(&mut join);
        join_raw(&address, &keep, &good, join)
    };
    let refused = |result: Result<_, ClientError>| result.err().and_then(|e| e.code().map(str::to_owned)).unwrap();
    assert_eq!(refused(ask(&|j| j.clock -= 3 * 86_400).await), "clock-skew");
    for bad in ["x'; DROP TABLE kv; --", "", "../../etc", &"x".repeat(64)] {
        assert_eq!(refused(ask(&|j| j.name = bad.to_owned()).await), "bad-record", "{bad}");
    }
    for bad in ["127.0.0.1:1", "224.0.0.1:1", "10.42.7.7:1", "0.0.0.0:1", "169.254.1.1:1", "10.9.9.9:0", "[::1]:1"] {
        assert_eq!(refused(ask(&|j| j.myself.underlay = vec![bad.parse().unwrap()]).await), "bad-record", "{bad}");
    }
    let taken = registry.records()[0].clone();
    assert_eq!(refused(ask(&|j| j.myself.underlay = taken.underlay.clone()).await), "bad-record");
    assert_eq!(refused(ask(&|j| j.myself.public_keys = taken.public_keys.clone()).await), "bad-record");
    assert_eq!(refused(ask(&|j| j.myself.public_keys = vec!["AAAA".to_owned()]).await), "bad-record");
    ask(&|j| drop(j.myself.labels.insert("a'; DROP TABLE kv; --".to_owned(), "\u{1F980}".to_owned()))).await.unwrap();
    assert_eq!(registry.records().len(), 3, "positive control: and nothing but these");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_at_once_get_fifty_subnets_and_one_use_is_one_join() {
    let cluster = cluster().await;
    let address = cluster.address();
    let many = cluster.token(Role::Agent, None).await;
    let joins = (0..50).map(|n| {
        let (address, many) = (address.clone(), many.clone());
        tokio::spawn(async move { join(&address, &many, &format!("n{n}"), Role::Agent).await.map(drop) })
    });
    let start = Instant::now();
    for done in futures::future::join_all(joins).await {
        done.unwrap().unwrap();
    }
    eprintln!("50 joins at once: {:?}", start.elapsed());
    let records = cluster.registry.records();
    let subnets: HashSet<_> = records.iter().flat_map(|r| r.subnets.clone()).collect();
    assert_eq!((records.len(), subnets.len()), (50, 50));

    let once = cluster.token(Role::Agent, Some(1)).await;
    let joins = (0..100).map(|n| {
        let (address, once) = (address.clone(), once.clone());
        tokio::spawn(async move { code(join(&address, &once, &format!("m{n}"), Role::Agent).await) })
    });
    let mut codes: Vec<_> = futures::future::join_all(joins).await.into_iter().map(Result::unwrap).collect();
    codes.sort();
    assert_eq!(codes.iter().filter(|c| *c == "joined").count(), 1, "{codes:?}");
    assert_eq!(codes.iter().filter(|c| *c == "token-used-up").count(), 99, "{codes:?}");
    assert_eq!(cluster.registry.records().len(), 51);
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_survive_a_restart_of_the_server_and_their_own_without_a_token() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, Some(1)).await.reveal();
    let folder = TempDir::new().unwrap();
    let said = hello("a");
    let mut node = Node::start(agent_settings(folder.path(), Some(token.reveal()), &[]), said.clone());
    node.until("joins", |s| s.connected).await;
    let before = cluster.registry.records();
    let (dir, setup, address) = cluster.stop().await;
    node.until("notices", |s| !s.connected && s.joined && s.problem.is_some()).await;
    let cluster = Cluster::open(dir, setup, address).await;
    node.until("comes back", |s| s.connected && s.problem.is_none()).await;
    let same = |r: &[NodeRecord]| r.iter().map(|n| (n.id.clone(), n.subnets.clone())).collect::<Vec<_>>();
    assert_eq!(same(&cluster.registry.records()), same(&before));
    // The list was not sent again: nothing in it has changed.
    let mut lists = 0;
    while let Ok(message) = node.out.try_recv() {
        lists += usize::from(matches!(message, FromSidecar::List { .. }));
    }
    assert_eq!(lists, 1);
    node.task.abort();
    let node = Node::start(agent_settings(folder.path(), None, &[]), said);
    node.until("starts without a token", |s| s.connected).await;
    assert_eq!(cluster.registry.records().len(), 1);
    node.until_nodes("and has the list", |nodes| nodes.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_removed_is_told_and_others_hear_it_and_who_leaves_leaves() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await.reveal();
    let folders: Vec<_> = (0..3).map(|_| TempDir::new().unwrap()).collect();
    let mut nodes: Vec<Node> = Vec::new();
    for (name, folder) in ["a", "b", "c"].iter().zip(&folders) {
        nodes.push(Node::start(agent_settings(folder.path(), Some(token.reveal()), &[]), hello(name)));
        nodes.last().unwrap().until("joins", |s| s.connected).await;
    }
    nodes[0].until_nodes("three", |nodes| nodes.len() == 3).await;
    let start = Instant::now();
    let gone = cluster.registry.request(Now::read(), &Request::NodeRemove { name: "b".to_owned() }).await.unwrap();
    assert_eq!(gone["removed"], true);
    let status = nodes[1].until("b is told", |s| !s.joined && !s.connected).await;
    assert!(status.problem.as_ref().unwrap().contains("removed"), "{status:?}");
    nodes[0].until_nodes("a hears it", |nodes| nodes.len() == 2).await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let mut expelled = false;
    while let Ok(message) = nodes[1].out.try_recv() {
        expelled |= matches!(message, FromSidecar::Expelled { .. });
    }
    assert!(expelled);
    let (answer, left) = tokio::sync::oneshot::channel();
    nodes[2].commands.send(Command::Leave(answer)).await.map_err(drop).unwrap();
    left.await.unwrap().unwrap();
    nodes[0].until_nodes("a is alone", |nodes| nodes.len() == 1).await;
    // Each needs a token to come back, and gets the subnet that it had.
    let again = Node::start(agent_settings(folders[1].path(), Some(token.reveal()), &[]), hello("b"));
    again.until("b is back", |s| s.connected).await;
    let back = nodes[0].until_nodes("two", |nodes| nodes.len() == 2).await;
    assert_eq!(back[1].subnets[0].to_string(), "10.42.1.0/24");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_mints_nothing_and_touches_nobody() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await;
    let agent = join(&cluster.address(), &token, "a", Role::Agent).await.unwrap();
    let other = join(&cluster.address(), &token, "b", Role::Agent).await.unwrap();
    let mint = Request::TokenCreate { role: Role::Server, ttl: None, uses: None, node: None };
    let mut connection = agent.connect(&cluster).await;
    for forbidden in [mint.clone(), Request::NodeRemove { name: "b".to_owned() }, Request::TokenList] {
        let result = connection.ask::<serde_json::Value>(Method::POST, "/v1/request", &forbidden).await;
        assert_eq!(result.unwrap_err().code(), Some("not-allowed"), "{forbidden:?}");
    }
    let mut stranger = Connection::open(&cluster.address(), Trust::Ca(cluster.ca()), None).await.unwrap();
    let result = stranger.ask::<serde_json::Value>(Method::POST, "/v1/request", &mint).await;
    assert_eq!(result.unwrap_err().code(), Some("no-certificate"));
    let other_key = RenewRequest { request: other.keep.request().unwrap() };
    let result = connection.ask::<RenewAnswer>(Method::POST, "/v1/renew", &other_key).await;
    assert_eq!(result.unwrap_err().code(), Some("not-allowed"), "a certificate for another's key");
    // Positive controls.
    let own = RenewRequest { request: agent.keep.request().unwrap() };
    connection.ask::<RenewAnswer>(Method::POST, "/v1/renew", &own).await.unwrap();
    let servers = cluster.token(Role::Server, None).await;
    let server = join(&cluster.address(), &servers, "s", Role::Server).await.unwrap();
    let minted: serde_json::Value =
        server.connect(&cluster).await.ask(Method::POST, "/v1/request", &mint).await.unwrap();
    assert!(minted["token"].as_str().unwrap().starts_with("mesh1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_others_are_worth_nothing() {
    let (cluster, foreign) = (cluster().await, cluster().await);
    let token = foreign.token(Role::Agent, None).await;
    let spy = join(&foreign.address(), &token, "a", Role::Agent).await.unwrap();
    let identity = spy.keep.client_identity(&spy.member);
    let mut connection = Connection::open(&cluster.address(), Trust::Ca(cluster.ca()), Some(identity)).await.unwrap();
    let poll = Poll { revision: None, no_wait: true, reaches: vec![], paths: vec![] };
    let refused = connection.ask::<PollAnswer>(Method::POST, "/v1/poll", &poll).await.unwrap_err();
    assert!(matches!(refused, ClientError::NotTaken { .. } | ClientError::Unreachable { .. }), "{refused}");
    let own = cluster.token(Role::Agent, None).await;
    let member = join(&cluster.address(), &own, "a", Role::Agent).await.unwrap();
    let answer: PollAnswer = member.connect(&cluster).await.ask(Method::POST, "/v1/poll", &poll).await.unwrap();
    assert!(matches!(answer.news, News::List { nodes, .. } if nodes.len() == 1), "positive control");
    // An agent's certificate does not make a server: it has no serverAuth.
    let request = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, member.keep.request().unwrap());
    let leaf = cluster.registry.authority().node_leaf(&request.unwrap(), "127.0.0.1", Now::read().date()).unwrap();
    let chain = [leaf.into(), cluster.ca()];
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    assert!(tls::check_chain(&chain, &cluster.ca(), &name, rustls::pki_types::UnixTime::now()).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn names_change_under_running_agents() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await;
    let by_name = format!("https://localhost:{}", cluster.server.address().port()).parse().unwrap();
    let folder = TempDir::new().unwrap();
    let node = Node::start(agent_settings(folder.path(), Some(token.reveal().reveal()), &[]), hello("a"));
    node.until("joins", |s| s.connected).await;
    cluster.server.set_names(&["127.0.0.1".to_owned()]).unwrap();
    let refused = join(&by_name, &token, "b", Role::Agent).await.err().unwrap();
    assert!(matches!(refused, ClientError::WrongName { .. }) && refused.to_string().contains("tls-san"), "{refused}");
    cluster.server.set_names(&["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    assert_eq!(code(join(&by_name, &token, "b", Role::Agent).await), "joined");
    node.until_nodes("a is still there", |nodes| nodes.len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_harms_nobody() {
    let cluster = cluster().await;
    let target = cluster.server.address();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 10_000], &[0x16, 3, 1, 0xff, 0xff, 1, 0, 0], b""] {
        let mut stream = TcpStream::connect(target).await.unwrap();
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.unwrap();
        assert!(answer.len() < 200);
    }
    let mut connection = Connection::open(&cluster.address(), Trust::Ca(cluster.ca()), None).await.unwrap();
    for path in ["/v1/join", "/v1/pake/start", "/v1/pake/finish"] {
        for body in [
            serde_json::json!(null),
            serde_json::json!([]),
            serde_json::json!({"name": 5}),
            serde_json::json!({"message": "%", "proof": "%"}),
            serde_json::json!("x".repeat(60_000)),
        ] {
            let refused = connection.ask::<serde_json::Value>(Method::POST, path, &body).await.unwrap_err();
            let code = refused.code().unwrap().to_owned();
            assert!(["bad-request", "bad-token", "no-secret"].contains(&code.as_str()), "{path}: {code}");
        }
    }
    let mut huge = Connection::open(&cluster.address(), Trust::Ca(cluster.ca()), None).await.unwrap();
    let body = "x".repeat(50 << 20);
    let refused = huge.ask::<serde_json::Value>(Method::POST, "/v1/join", &body).await.unwrap_err();
    assert!(refused.code() == Some("too-large") || matches!(refused, ClientError::Unreachable { .. }), "{refused}");
    let refused = connection.get::<serde_json::Value>("/v1/none").await.unwrap_err();
    assert_eq!(refused.code(), Some("not-found"));
    let ready: serde_json::Value = connection.get("/readyz").await.unwrap();
    assert_eq!(ready["ready"], true, "positive control");
    let document: serde_json::Value = connection.get("/v1/openapi.json").await.unwrap();
    assert_eq!(document["openapi"], "3.1.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_and_slow_connections_harm_nobody() {
    let cluster = cluster().await;
    let target = cluster.server.address();
    // More than one address may have: those beyond are closed at once.
    let mut idle = Vec::new();
    for _ in 0..1500 {
        idle.push(TcpStream::connect(target).await.unwrap());
    }
    // long before the handshake's time limit would close them all
    let begun = Instant::now();
    let mut closed = 0;
    while closed < 400 && begun.elapsed() < Duration::from_secs(8) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let ended =
            |stream: &TcpStream| !matches!(stream.try_read(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
        closed = idle.iter().filter(|stream| ended(stream)).count();
    }
    assert!(closed >= 400, "{closed}");
    // The handshake's time limit makes room for a real node, which retries until then.
    let token = cluster.token(Role::Agent, None).await.reveal();
    let folder = TempDir::new().unwrap();
    let node = Node::start(agent_settings(folder.path(), Some(token.reveal()), &[]), hello("a"));
    node.until("joins in spite of them", |s| s.connected).await;
    // Who is slow with a body is cut off, and others are served meanwhile.
    let (client, _) = tls::client_config(Trust::Ca(cluster.ca()), None).unwrap();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let tcp = TcpStream::connect(target).await.unwrap();
    let mut slow = tokio_rustls::TlsConnector::from(client).connect(name, tcp).await.unwrap();
    let head = "POST /v1/join HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{";
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(15), slow.read_buf(&mut answer)).await;
    assert!(read.is_ok() && contains(&answer, b"408"), "{}", String::from_utf8_lossy(&answer));
    assert!(node.view.status.borrow().connected, "positive control: {:?}", node.view.status.borrow());
}

#[tokio::test(flavor = "multi_thread")]
async fn guessers_are_slowed_down_and_a_real_join_is_not() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await;
    let mut wrong = token.clone();
    wrong.secret.0[3] ^= 0x80;
    let folder = TempDir::new().unwrap();
    let keep = Keep::open(folder.path()).unwrap();
    let mut codes: Vec<String> = Vec::new();
    let mut connection = Connection::open(&cluster.address(), Trust::Ca(cluster.ca()), None).await.unwrap();
    let mut guess = request(&keep, "x", Role::Agent);
    guess.token = Some(meshd::membership::api::TokenProof {
        id: wrong.id.to_string(),
        secret: Secret::new(meshd::membership::random::hex(&wrong.secret.0)),
    });
    let start = Instant::now();
    for _ in 0..1000 {
        let refused = connection.ask::<serde_json::Value>(Method::POST, "/v1/join", &guess).await.unwrap_err();
        codes.push(refused.code().unwrap().to_owned());
    }
    eprintln!("1000 guesses: {:?}", start.elapsed());
    let looked_at = codes.iter().filter(|c| *c == "bad-token").count();
    assert!(looked_at <= 60, "{looked_at}");
    assert_eq!(codes.last().unwrap(), "too-many-attempts");
    let start = Instant::now();
    assert_eq!(code(join(&cluster.address(), &token, "a", Role::Agent).await), "joined", "from the same address");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_waits_for_its_server_and_says_so() {
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let dir = Arc::new(TempDir::new().unwrap());
    let mut with_secret = setup();
    with_secret.secret = Some(Secret::new("s3cret-s3cret"));
    let folder = TempDir::new().unwrap();
    let node = Node::start(agent_settings(folder.path(), Some("s3cret-s3cret"), &[port.into()]), hello("a"));
    let status = node.until("says so", |s| s.problem.is_some()).await;
    let problem = status.problem.unwrap();
    assert!(problem.contains("waiting for a server") && problem.contains(&port.port().to_string()), "{problem}");
    let _cluster = Cluster::open(dir, with_secret, port).await;
    node.until("joins at last", |s| s.connected && s.problem.is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_state_is_an_error_and_never_a_new_key() {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await.reveal();
    let folder = TempDir::new().unwrap();
    let node = Node::start(agent_settings(folder.path(), Some(token.reveal()), &[]), hello("a"));
    node.until("joins", |s| s.connected).await;
    node.task.abort();
    let start = || {
        let heard = Heard {
            hello: tokio::sync::watch::channel(hello("a")).1,
            reached: tokio::sync::watch::channel(Default::default()).1,
        };
        let (_, orders) = tokio::sync::mpsc::channel(1);
        let (out, _) = tokio::sync::mpsc::channel(1);
        Agent::new(agent_settings(folder.path(), Some(token.reveal()), &[]), heard, orders, View::default(), out)
            .map(drop)
    };
    assert!(start().is_ok(), "positive control");
    for file in ["identity.key", "membership.json"] {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.path().join("agent").join(file);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let good = std::fs::read(&path).unwrap();
        for cut in [0, 1, good.len() / 2, good.len() - 2] {
            std::fs::write(&path, &good[..cut]).unwrap();
            let error = start().err().unwrap_or_else(|| panic!("{file} cut at {cut} was taken"));
            assert!(matches!(error, AgentError::Keep(_)), "{error}");
            assert!(error.to_string().contains(file), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), &good[..cut], "left as it is");
        }
        std::fs::remove_file(&path).unwrap();
        let gone = start();
        if file == "identity.key" {
            assert!(gone.is_err(), "a membership without its key");
        }
        std::fs::write(&path, &good).unwrap();
    }
    assert!(start().is_ok());
}
