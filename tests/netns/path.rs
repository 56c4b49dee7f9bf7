//! The path MTU is found, and followed, where the underlay takes less in its middle than at its ends.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::mesh::{Builder, Mesh, Node, V4, V6, has_kernel_vxlan, skipped};
use crate::namespace::{Namespace, until};
use crate::traffic::{connect, ping, tcp};

fn peer(node: &Node, of: &str) -> Value {
    let peers = node.json(&["peers"]);
    peers.as_array().unwrap().iter().find(|peer| peer["name"] == of).unwrap().clone()
}

#[track_caller]
fn finds(node: &Node, of: &str, mtu: u32) -> Duration {
    until(&format!("{} finds that {mtu} bytes reach {of}", node.name), || {
        let peer = peer(node, of);
        peer["path_mtu"] == mtu && peer["path"]["search"] == "search-complete"
    })
}

/// What the switch takes on its way to each node. It drops the rest without a word.
fn underlay_takes(mesh: &Mesh, names: &[&str], mtu: u32) {
    for name in names {
        mesh.switch.sh(&format!("ip link set p-{name} mtu {mtu}"));
    }
}

/// A TCP stream that never ends, and for how long nothing of it arrived at most.
struct Stream {
    to: IpAddr,
    stop: Arc<AtomicBool>,
    worst_us: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Stream {
    fn start(from: &Namespace, to: &Namespace, address: IpAddr) -> Self {
        let (mut client, mut server) = connect(from, to, address);
        let stop = Arc::new(AtomicBool::new(false));
        let (worst_us, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (worst, count, told) = (worst_us.clone(), bytes.clone(), stop.clone());
        let send = move || {
            let block = vec![7; 64 << 10];
            // slow enough for a small machine that runs other tests beside
            while !told.load(Ordering::Relaxed) && client.write_all(&block).is_ok() {
                sleep(Duration::from_millis(5));
            }
        };
        let receive = move || {
            let mut room = vec![0; 64 << 10];
            let mut last = Instant::now();
            while let Ok(len) = server.read(&mut room) {
                worst.fetch_max(last.elapsed().as_micros() as u64, Ordering::Relaxed);
                last = Instant::now();
                count.fetch_add(len as u64, Ordering::Relaxed);
                if len == 0 {
                    return;
                }
            }
        };
        Stream {
            to: address,
            stop,
            worst_us,
            bytes,
            threads: vec![std::thread::spawn(send), std::thread::spawn(receive)],
        }
    }

    /// The longest pause since this was asked last.
    fn stall(&self) -> Duration {
        Duration::from_micros(self.worst_us.swap(0, Ordering::Relaxed))
    }

    #[track_caller]
    fn goes_on(&self) {
        let before = self.bytes.load(Ordering::Relaxed);
        until(&format!("the stream to {} goes on", self.to), || {
            self.bytes.load(Ordering::Relaxed) > before + (256 << 10)
        });
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// The underlay takes 1,500 bytes, then 1,280, then 1,500 again, while TCP runs over both families.
fn a_black_hole_is_left(story: &'static str, encrypted: bool) {
    let Some(mesh) = Builder::new(story) else { return };
    // each packet alone: a virtual switch lets super-packets through whose segments it would not
    let mesh = mesh.profile('c');
    let mesh = if encrypted { mesh.encrypted() } else { mesh };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let (overhead, names) = (if encrypted { 60 } else { 50 }, ["a", "b"]);
    finds(a, "b", 1500 - overhead);
    finds(b, "a", 1500 - overhead);
    let streams = [V4, V6].map(|family| Stream::start(&a.ns, &b.ns, b.overlay(family)));
    streams.iter().for_each(Stream::goes_on);
    sleep(Duration::from_secs(1));
    streams.iter().for_each(|stream| _ = stream.stall());

    underlay_takes(&mesh, &names, 1280);
    let took = finds(a, "b", 1280 - overhead);
    streams.iter().for_each(Stream::goes_on);
    let stalls = streams.each_ref().map(Stream::stall);
    println!("{story}: 1500 to 1280: known after {took:?}, TCP stood still for {stalls:?} (IPv4, IPv6)");
    assert!(peer(a, "b")["path"]["black_holes"].as_u64().unwrap() >= 1);
    assert_eq!(peer(a, "b")["state"], "up", "the peer is not dead");

    // who sends something else is told
    let refused = a.ns.output(&format!("ping -n -c 2 -i 0.2 -W 2 -M do -s 1400 {}", b.overlay(V4)));
    let text = String::from_utf8_lossy(&refused.stdout).into_owned() + &String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && text.contains(&format!("{}", 1280 - overhead)), "{text}");
    let why = a.json(&["why", "b"]);
    assert_eq!((&why["mtu"]["inner"], &why["mtu"]["measured"]), (&(1280 - overhead).into(), &true.into()), "{why:#}");
    for family in [V4, V6] {
        tcp(&a.ns, &b.ns, b.overlay(family), 1 << 18);
    }

    underlay_takes(&mesh, &names, 1500);
    let took = finds(a, "b", 1500 - overhead);
    streams.iter().for_each(Stream::goes_on);
    let stalls = streams.each_ref().map(Stream::stall);
    println!("{story}: 1280 to 1500: known after {took:?}, TCP stood still for {stalls:?}");
    streams.into_iter().for_each(Stream::end);
    mesh.balances();
}

#[test]
fn a_black_hole_is_left_in_the_clear() {
    a_black_hole_is_left("a_black_hole_is_left_in_the_clear", false);
}

#[test]
fn a_black_hole_is_left_through_a_tunnel() {
    a_black_hole_is_left("a_black_hole_is_left_through_a_tunnel", true);
}

/// One node's own link takes 9,000 bytes. Where the others' do too, that is found; where not, that as well, although nobody
/// says so.
#[test]
fn jumbo_is_used_between_those_who_have_it() {
    let story = "jumbo_is_used_between_those_who_have_it";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.profile('c').underlay_mtu(9000).node("a").node("b").node("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    underlay_takes(&mesh, &["c"], 1500);
    mesh.start();
    finds(a, "c", 1450);
    finds(a, "b", 8950);
    assert!(a.ns.succeeds(&format!("ping -n -c 1 -W 5 -M do -s 8922 {}", b.overlay(V4))));
    ping(&a.ns, c.overlay(V4));
    for to in [b, c] {
        tcp(&a.ns, &to.ns, to.overlay(V6), 1 << 19);
    }
    mesh.balances();
}

/// Peers that do not answer probes keep what follows from the link.
#[test]
fn who_answers_no_probe_keeps_the_mtu_of_the_link() {
    let story = "who_answers_no_probe_keeps_the_mtu_of_the_link";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_kernel_vxlan() {
        return skipped(story, "this kernel has no VXLAN device");
    }
    let mesh = mesh.profile('c').node("a").node("b").kernel("k").start();
    let [a, b, k] = mesh.three(["a", "b", "k"]);
    finds(a, "b", 1450);
    underlay_takes(&mesh, &["b", "k"], 1400);
    ping(&a.ns, k.overlay(V4));
    tcp(&a.ns, &b.ns, b.overlay(V4), 1 << 18);
    finds(a, "b", 1350);
    let k = peer(a, "k");
    assert_eq!((&k["path_mtu"], &k["path"]), (&1450.into(), &Value::Null));
    mesh.balances();
}

/// What a router says is taken for a hint: true, it saves the search; a lie changes nothing.
#[test]
fn routers_are_heard_and_not_believed() {
    let story = "routers_are_heard_and_not_believed";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.profile('c').node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    finds(a, "b", 1450);
    // a's packets go through the gateway, which says when they do not fit
    a.ns.sh("ip route add 10.9.0.2/32 via 10.9.0.254");
    tcp(&a.ns, &b.ns, b.overlay(V4), 1 << 18);
    finds(a, "b", 1450);
    mesh.switch.sh("ip route add 10.9.0.2/32 dev br0 mtu lock 1333");
    let stream = Stream::start(&a.ns, &b.ns, b.overlay(V4));
    let took = finds(a, "b", 1283);
    println!("{story}: known after {took:?}, TCP stood still for {:?}", stream.stall());
    stream.goes_on();
    stream.end();
    mesh.balances();
}
