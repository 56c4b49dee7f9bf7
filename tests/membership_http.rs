//! HTTP as any client may speak it to a server: a node that waits for news is taken out of the HTTP library's hands, and nobody
//! can tell.

#[allow(dead_code)]
#[path = "membership/harness.rs"]
mod harness;

use std::time::Duration;

use meshd::membership::clock::Now;
use meshd::membership::link::Request;
use meshd::membership::record::Role;
use meshd::membership::tls::{self, Trust};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use harness::*;

/// A connection with a node's certificate, on which the test writes its requests by hand.
struct Client {
    stream: TlsStream<TcpStream>,
    read: Vec<u8>,
}

/// Head, without the date, and body.
type Answer = (String, serde_json::Value);

impl Client {
    async fn new(cluster: &Cluster, node: &Joined) -> Self {
        let identity = node.keep.client_identity(&node.member);
        let (config, _) = tls::client_config(Trust::Ca(cluster.ca()), Some(identity)).unwrap();
        let tcp = TcpStream::connect(cluster.server.address()).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        Client { stream: TlsConnector::from(config).connect(name, tcp).await.unwrap(), read: Vec::new() }
    }

    async fn say(&mut self, bytes: &str) {
        self.stream.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// The next answer; `None`: the server ended the connection.
    async fn hear(&mut self) -> Option<Answer> {
        let more = async {
            loop {
                if let Some(end) = self.read.windows(4).position(|w| w == b"\r\n\r\n") {
                    let head = String::from_utf8(self.read[..end].to_vec()).unwrap();
                    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                    let length: usize = length.expect("a length").parse().unwrap();
                    if self.read.len() >= end + 4 + length {
                        let rest = self.read.split_off(end + 4 + length);
                        let body = serde_json::from_slice(&std::mem::replace(&mut self.read, rest)[end + 4..]);
                        assert!(head.contains("\r\ndate: "), "{head}");
                        let head = head.lines().filter(|l| !l.starts_with("date: ")).collect::<Vec<_>>().join("\n");
                        return Some((head, body.unwrap()));
                    }
                }
                if !self.stream.read_buf(&mut self.read).await.is_ok_and(|n| n > 0) {
                    assert_eq!(String::from_utf8_lossy(&self.read), "", "half an answer");
                    return None;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), more).await.expect("an answer, or an end")
    }
}

fn poll(version: &str, headers: &str, revision: u64) -> String {
    let body = format!("{{\"revision\":{revision}}}");
    format!("POST /v1/poll {version}\r\nhost: x\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
}

/// Drains a node, or no longer: all hear of it.
async fn change(cluster: &Cluster, drain: bool) {
    // so that whoever asked before waits by now
    tokio::time::sleep(Duration::from_millis(200)).await;
    let name = "b".to_owned();
    let request = if drain { Request::NodeDrain { name } } else { Request::NodeUndrain { name } };
    cluster.registry.request(Now::read(), &request).await.unwrap();
}

async fn two_nodes() -> (Cluster, Joined, Joined) {
    let cluster = cluster().await;
    let token = cluster.token(Role::Agent, None).await;
    let a = join(&cluster.address(), &token, "a", Role::Agent).await.unwrap();
    let b = join(&cluster.address(), &token, "b", Role::Agent).await.unwrap();
    (cluster, a, b)
}

/// The revision, once nothing changes any more: nodes that have just joined are heard, and become ready.
async fn settled(cluster: &Cluster, nodes: &[&Joined]) -> u64 {
    for node in nodes {
        let mut client = Client::new(cluster, node).await;
        client.say(&poll("HTTP/1.1", "connection: close\r\n", 0)).await;
        client.hear().await.unwrap();
    }
    let mut last = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let now = cluster.registry.revision();
        if now == last {
            return now;
        }
        last = now;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_is_answered_alike_by_whomever() {
    let (cluster, a, b) = two_nodes().await;
    let mut revision = settled(&cluster, &[&a, &b]).await;
    let mut client = Client::new(&cluster, &a).await;
    let mut other = Client::new(&cluster, &b).await;
    let mut answers: Vec<Answer> = Vec::new();
    for drain in [true, false, true, false] {
        // The one is left to wait, the other is the HTTP library's all the time.
        client.say(&poll("HTTP/1.1", "", revision)).await;
        other.say(&poll("HTTP/1.1", "connection: keep-alive\r\n", revision)).await;
        change(&cluster, drain).await;
        let (one, two) = (client.hear().await.unwrap(), other.hear().await.unwrap());
        assert_eq!(one, two);
        assert_eq!(one.1["type"], "delta", "{one:?}");
        assert_eq!(one.1["upsert"][0]["name"], "b");
        revision = one.1["to"].as_u64().unwrap();
        answers.push(one);
        // Other questions in between.
        for client in [&mut client, &mut other] {
            client.say("GET /v1/nodes HTTP/1.1\r\nhost: x\r\n\r\n").await;
            assert_eq!(client.hear().await.unwrap().1.as_array().unwrap().len(), 2);
        }
    }
    assert_eq!(
        answers[0].0,
        "HTTP/1.1 200 OK\ncontent-type: application/json\ncontent-length: ".to_owned()
            + answers[0].0.rsplit(' ').next().unwrap()
    );
    // A body in chunks, and a request that comes byte by byte.
    let chunks = format!("8\r\n{{\"revisi\r\n{:x}\r\non\":{revision}}}\r\n0\r\n\r\n", 5 + revision.to_string().len());
    client.say(&format!("POST /v1/poll HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{chunks}")).await;
    for byte in poll("HTTP/1.1", "", revision).chars() {
        other.say(&byte.to_string()).await;
    }
    change(&cluster, true).await;
    assert_eq!(client.hear().await, other.hear().await);
    // Who is removed hears it, and others what changed.
    let revision = cluster.registry.revision();
    let mut last = Client::new(&cluster, &b).await;
    client.say(&poll("HTTP/1.1", "", revision)).await;
    other.say(&poll("HTTP/1.1", "", revision)).await;
    last.say(&poll("HTTP/1.1", "connection: keep-alive\r\n", revision)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    cluster.registry.request(Now::read(), &Request::NodeRemove { name: "b".to_owned() }).await.unwrap();
    let removed = other.hear().await.unwrap();
    assert_eq!(removed.1["code"], "removed", "{removed:?}");
    assert_eq!(Some(removed), last.hear().await);
    assert_eq!(client.hear().await.unwrap().1["type"], "delta");
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_behind_one_that_waits_are_answered_after_it() {
    let (cluster, a, b) = two_nodes().await;
    let revision = settled(&cluster, &[&a, &b]).await;
    let waits = poll("HTTP/1.1", "", revision);
    let nodes = "GET /v1/nodes HTTP/1.1\r\nhost: x\r\n\r\n";
    let large = format!("GET /v1/nodes HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(6000));
    let many = nodes.repeat(200);
    // At once; while it waits; in two pieces; before it, too; more than the library's buffer, and half of one.
    let plans: [&[&str]; 6] = [
        &[&format!("{waits}{nodes}")],
        &[&waits, nodes],
        &[&format!("{waits}{}", &nodes[..9]), &nodes[9..]],
        &[&format!("{many}{waits}{nodes}")],
        &[&format!("{waits}{large}{large}"), &large],
        &[&format!("{waits}{waits}{nodes}")],
    ];
    let mut clients = Vec::new();
    for plan in plans {
        let mut client = Client::new(&cluster, &a).await;
        for part in plan {
            client.say(part).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        clients.push(client);
    }
    change(&cluster, true).await;
    let kinds = ["pn", "pn", "pn", &format!("{}pn", "n".repeat(200)), "pnnn", "ppn"];
    for (client, kinds) in clients.iter_mut().zip(kinds) {
        for kind in kinds.chars() {
            let (head, body) = client.hear().await.unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\n"), "{head}");
            assert_eq!(body["type"] == "delta", kind == 'p', "{body}");
            assert_eq!(body.is_array(), kind == 'n', "{body}");
        }
        // And it is a connection like any other.
        client.say(nodes).await;
        assert!(client.hear().await.unwrap().1.is_array());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_when_either_wants_it() {
    let (cluster, a, b) = two_nodes().await;
    let revision = settled(&cluster, &[&a, &b]).await;
    // Who says so, or speaks HTTP/1.0, is answered, and that is all.
    let mut clients = Vec::new();
    for (version, header) in [("HTTP/1.1", "connection: close\r\n"), ("HTTP/1.0", "")] {
        let mut client = Client::new(&cluster, &a).await;
        client.say(&poll(version, header, revision)).await;
        clients.push(client);
    }
    // Who goes while it waits is not waited for.
    let mut gone = Client::new(&cluster, &a).await;
    gone.say(&poll("HTTP/1.1", "", revision)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    gone.stream.shutdown().await.unwrap();
    assert_eq!(gone.hear().await, None, "the server ends it, too, and says nothing");
    change(&cluster, true).await;
    for client in &mut clients {
        assert_eq!(client.hear().await.unwrap().1["type"], "delta");
        assert_eq!(client.hear().await, None);
    }
    // Garbage instead of a request, on a connection that has waited.
    let mut client = Client::new(&cluster, &a).await;
    client.say(&poll("HTTP/1.1", "", revision)).await;
    assert_eq!(client.hear().await.unwrap().1["type"], "delta");
    client.say("\0\r\n\r\n").await;
    let mut answer = Vec::new();
    client.stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 400 Bad Request\r\n"), "{}", String::from_utf8_lossy(&answer));
}
