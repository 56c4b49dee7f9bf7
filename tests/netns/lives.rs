//! Who is dead is noticed, and who is busy is not taken for dead.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::mesh::{Builder, Mesh, Node, V4, V6, has, has_kernel_vxlan, skipped};
use crate::namespace::{Process, until};
use crate::traffic::ping;

/// What `node` thinks of the others, by name.
fn state(node: &Node, of: &str) -> String {
    peer(node, of)["state"].as_str().unwrap().to_owned()
}

fn peer(node: &Node, of: &str) -> serde_json::Value {
    let peers = node.json(&["peers"]);
    peers.as_array().unwrap().iter().find(|peer| peer["name"] == of).unwrap().clone()
}

fn all_up(mesh: &Mesh, names: &[&str]) {
    for name in names {
        for other in names.iter().filter(|other| *other != name) {
            until("they know each other", || state(mesh.node(name), other) == "up");
        }
    }
}

/// Waits until `node` holds `of` for dead, and returns how long that took.
fn dies(node: &Node, of: &str, since: Instant) -> Duration {
    while state(node, of) != "down" {
        assert!(since.elapsed() < Duration::from_secs(5), "{of} is still {}", state(node, of));
        sleep(Duration::from_millis(5));
    }
    since.elapsed()
}

/// What becomes of a connection to `to`.
fn refused(node: &Node, to: std::net::IpAddr) -> ErrorKind {
    let connect = || TcpStream::connect_timeout(&(to, 9).into(), Duration::from_secs(2));
    node.ns.enter(connect).expect_err("nobody is there").kind()
}

fn a_death_is_seen(story: &'static str, encrypted: bool) {
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = if encrypted { mesh.encrypted() } else { mesh };
    let mesh = mesh.node("a").node("b").node("c").start();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    for family in [V4, V6] {
        ping(&a.ns, b.overlay(family));
        ping(&c.ns, b.overlay(family));
    }
    all_up(&mesh, &["a", "b", "c"]);
    let rtt = || peer(a, "b")["rtt_us"].as_u64();
    until("the round trip is measured", || rtt().is_some());
    println!("{story}: round trip {} µs", rtt().unwrap());
    assert!(rtt().unwrap() < 100_000);

    let killed = Instant::now();
    b.kill();
    let took = dies(a, "b", killed);
    println!("{story}: killed, down after {took:?} and {:?}", dies(c, "b", killed));
    assert!(took < Duration::from_millis(1_500), "{took:?}");
    for family in [V4, V6] {
        let before = Instant::now();
        let error = refused(a, b.overlay(family));
        assert_eq!(error, ErrorKind::HostUnreachable);
        assert!(before.elapsed() < Duration::from_millis(200), "{:?}", before.elapsed());
    }
    assert!(a.drops("peer_down") >= 2);
    assert_eq!(state(a, "c"), "up", "the others live on");
    until("it is in the log", || a.log().contains("b at 10.9.0.2:8472 does not answer any more"));
    let born = Instant::now();
    b.restart();
    until("it is up again", || state(a, "b") == "up");
    println!("{story}: up again {:?} after its start", born.elapsed());
    ping(&a.ns, b.overlay(V4));
    until("that is in the log too", || a.log().contains("b answers again"));
    all_up(&mesh, &["a", "b", "c"]);

    let cut = Instant::now();
    c.ns.sh("ip link set ul0 down");
    println!("{story}: link down, down after {:?}", dies(a, "c", cut));
    assert!(cut.elapsed() < Duration::from_millis(1_700));
    assert_eq!(state(a, "b"), "up");
    mesh.balances();
}

#[test]
fn a_death_is_seen_in_a_second_and_traffic_is_refused() {
    a_death_is_seen("a_death_is_seen_in_a_second_and_traffic_is_refused", false);
}

#[test]
fn a_death_is_seen_in_a_second_by_encrypted_nodes() {
    a_death_is_seen("a_death_is_seen_in_a_second_by_encrypted_nodes", true);
}

#[test]
fn nodes_know_each_other_over_ipv6_too() {
    for encrypted in [false, true] {
        let Some(mesh) = Builder::new("nodes_know_each_other_over_ipv6_too") else { return };
        let mesh = if encrypted { mesh.encrypted() } else { mesh };
        let mesh = mesh.over(V6).node("a").node("b").start();
        all_up(&mesh, &["a", "b"]);
        mesh.balances();
    }
}

#[test]
fn who_does_not_speak_bfd_is_unknown() {
    let story = "who_does_not_speak_bfd_is_unknown";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_kernel_vxlan() {
        return skipped(story, "this kernel has no VXLAN device");
    }
    let mesh = mesh.node("a").node("b").set("io", "tokio").node("o").set("bfd", "off").kernel("k").start();
    let [a, b, o] = mesh.three(["a", "b", "o"]);
    let k = mesh.node("k");
    ping(&a.ns, k.overlay(V4));
    ping(&a.ns, o.overlay(V4));
    all_up(&mesh, &["a", "b"]);
    k.ns.sh("ip link set ul0 down");
    for _ in 0..20 {
        sleep(Duration::from_millis(100));
        assert_eq!([state(a, "k"), state(b, "k"), state(a, "o"), state(o, "a")], ["unknown"; 4]);
        assert_eq!(state(b, "a"), "up");
    }
    let killed = Instant::now();
    a.kill();
    println!("{story}: seen by a plain back end after {:?}", dies(b, "a", killed));
    a.restart();
    mesh.balances();
}

/// Round trip and loss, on each way that packets take.
#[test]
fn loss_is_measured_where_it_is() {
    let story = "loss_is_measured_where_it_is";
    for encrypted in [false, true] {
        let Some(mesh) = Builder::new(story) else { return };
        let mesh = if encrypted { mesh.encrypted() } else { mesh };
        let mesh = mesh.node("a").node("b").node("c").start();
        let [a, b, c] = mesh.three(["a", "b", "c"]);
        all_up(&mesh, &["a", "b", "c"]);
        c.ns.sh("nft add table inet f; nft 'add chain inet f in { type filter hook input priority 0; }'; \
             nft add rule inet f in ip saddr 10.9.0.1 udp dport 8472 numgen random mod 4 lt 1 counter drop");
        until("it is known what is lost", || {
            peer(a, "b")["loss_permille"].is_u64() && peer(a, "c")["loss_permille"].is_u64()
        });
        let lost = |of: &str| peer(a, of)["loss_permille"].as_u64().unwrap();
        // an answer that a busy machine holds up for long is lost, too: a quarter is more
        until("what c loses is seen", || lost("c") > 100 && lost("b") < lost("c") / 2);
        println!("{story}: {} and {}", peer(a, "b")["ways"], peer(a, "c")["ways"]);
        let ways = peer(a, "b")["ways"].as_array().unwrap().clone();
        assert!(
            ways.len() >= if encrypted { 1 } else { 8 } && ways.iter().all(|way| way["source_port"].as_u64() > Some(0))
        );
        assert_eq!(ways[0]["lane"].is_u64(), encrypted);
        ping(&a.ns, b.overlay(V4));
    }
}

/// Two packets in a hundred are lost, and every core has more to do than it can: nobody dies.
#[test]
fn who_is_busy_on_a_bad_network_is_not_dead() {
    let story = "who_is_busy_on_a_bad_network_is_not_dead";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").node("b").node("c").start();
    busy_on_a_bad_network(story, &mesh, Duration::from_secs(20));
}

/// The same for half an hour, or `MESHD_BAD_SECONDS`, with TCP between all pairs besides; prints how many deaths were false.
#[test]
#[ignore = "takes half an hour"]
fn half_an_hour_on_a_bad_network() {
    let story = "half_an_hour_on_a_bad_network";
    let seconds = std::env::var("MESHD_BAD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_800);
    let Some(mesh) = Builder::new(story) else { return };
    if !has("iperf3") {
        return skipped(story, "`iperf3` is not installed");
    }
    let mesh = mesh.node("a").node("b").node("c").start();
    let nodes = mesh.three(["a", "b", "c"]);
    let quiet = |command: &mut Command| Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let _servers = nodes.map(|node| quiet(node.ns.command("iperf3").args(["-s", "-p", "5201"])));
    sleep(Duration::from_millis(500));
    let _clients = [(0, 1), (1, 2), (2, 0)].map(|(from, to): (usize, usize)| {
        let mut client = nodes[from].ns.command("iperf3");
        client.args(["-t", &(seconds + 60).to_string(), "-c", &nodes[to].overlay(V4).to_string()]);
        quiet(&mut client)
    });
    busy_on_a_bad_network(story, &mesh, Duration::from_secs(seconds));
}

fn busy_on_a_bad_network(story: &str, mesh: &Mesh, for_so_long: Duration) {
    let nodes = mesh.three(["a", "b", "c"]);
    all_up(mesh, &["a", "b", "c"]);
    for node in nodes {
        node.ns.sh("nft add table inet f; nft 'add chain inet f in { type filter hook input priority 0; }'; \
             nft add rule inet f in udp dport 8472 numgen random mod 100 lt 2 counter drop");
    }
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let burn = || Process::spawn(Command::new("sh").args(["-c", "while :; do :; done"]));
    let burners: Vec<Process> = (0..2 * cores).map(|_| burn()).collect();
    let stood = Standstills::watch();
    let start = Instant::now();
    let (mut looks, mut told, mut excused, mut wrong) = (0, 0, 0, 0);
    while start.elapsed() < for_so_long {
        looks += 1;
        for node in nodes {
            let peers = node.ctl(&["--json", "peers"]);
            let up = serde_json::from_str::<serde_json::Value>(&peers.out)
                .is_ok_and(|peers| peers.as_array().unwrap().iter().all(|peer| peer["state"] == "up"));
            let in_log = node.log().matches("does not answer").count();
            let all: usize = nodes.iter().map(|node| node.log().matches("does not answer").count()).sum();
            if up && all <= told {
                continue;
            }
            let deaths = (all - told).max(1);
            if stood.lately() {
                excused += deaths
            } else {
                wrong += deaths
            }
            println!("{story}: {}: up {up}, {in_log} deaths in its log, after {:?}", node.name, start.elapsed());
            told = all;
        }
        sleep(Duration::from_millis(100));
    }
    drop(burners);
    let (times, longest) = stood.end();
    println!(
        "{story}: {:?}, looked at {looks} times: {wrong} false deaths; {times} times nothing here ran for {:?} and more, \
         {longest:?} at most, and {excused} deaths followed on that",
        start.elapsed(),
        Standstills::LEAST
    );
    for node in nodes {
        let dropped = node.ns.sh("nft list chain inet f in");
        println!("{story}: {}", dropped.lines().find(|line| line.contains("counter")).unwrap_or_default().trim());
    }
    assert_eq!(wrong, 0);
}

/// Who is stopped from outside for as long as a death takes has not lived meanwhile, and others say so rightly.
struct Standstills {
    seen: Arc<Mutex<Vec<(Instant, Duration)>>>,
    ends: Arc<AtomicBool>,
}

impl Standstills {
    const LEAST: Duration = Duration::from_millis(700);

    fn watch() -> Self {
        let (seen, ends) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<AtomicBool>::default());
        let (told, over) = (seen.clone(), ends.clone());
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let before = Instant::now();
                sleep(Duration::from_millis(20));
                if before.elapsed() >= Self::LEAST {
                    told.lock().unwrap().push((Instant::now(), before.elapsed()));
                }
            }
        });
        Standstills { seen, ends }
    }

    fn lately(&self) -> bool {
        self.seen.lock().unwrap().last().is_some_and(|(at, _)| at.elapsed() < Duration::from_secs(10))
    }

    fn end(self) -> (usize, Duration) {
        self.ends.store(true, Ordering::Relaxed);
        let seen = self.seen.lock().unwrap();
        (seen.len(), seen.iter().map(|(_, long)| *long).max().unwrap_or_default())
    }
}

/// What is promised of the time until a death is seen, measured: `cargo test --test netns -- --ignored hundred --nocapture`.
#[test]
#[ignore = "takes some minutes"]
fn a_hundred_kills() {
    let story = "a_hundred_kills";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    let kills = std::env::var("KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    let mut took = Vec::new();
    for _ in 0..kills {
        until("both are up", || state(a, "b") == "up" && state(b, "a") == "up");
        sleep(Duration::from_millis(300));
        let killed = Instant::now();
        b.kill();
        took.push(dies(a, "b", killed));
        b.restart();
    }
    took.sort();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    println!("{story}: {} kills, p50 {:?}, p99 {:?}, most {:?}", took.len(), at(50), at(99), at(100));
    assert!(at(100) < Duration::from_millis(1_500));
}

/// A link that comes and goes costs a few deaths, and not one change of a route; it is up again with the first good round.
#[test]
fn a_link_that_flaps_is_not_believed_for_long() {
    let story = "a_link_that_flaps_is_not_believed_for_long";
    let Some(mesh) = Builder::new(story) else { return };
    let mesh = mesh.node("a").node("b").node("c").start();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    all_up(&mesh, &["a", "b", "c"]);
    let routes = mesh.dir().join("routes");
    let file = std::fs::File::create(&routes).unwrap();
    let monitor = Process::spawn(a.ns.command("ip").args(["monitor", "route"]).stdout(file));
    let changes = || std::fs::read_to_string(&routes).unwrap().lines().count();
    // that it is heard, and how it looks when a route does change
    until("the monitor sees changes", || {
        a.ns.sh("ip route add 10.99.0.0/24 dev mesh0; ip route del 10.99.0.0/24 dev mesh0");
        changes() >= 2
    });
    sleep(Duration::from_millis(500));
    let before = changes();

    b.ns.sh("nft add table inet f; nft 'add chain inet f in { type filter hook input priority 0; }'");
    let cut = || _ = b.ns.sh("nft add rule inet f in ip saddr 10.9.0.1 udp dport 8472 drop");
    let mend = || _ = b.ns.sh("nft flush chain inet f in");
    let (mut deaths, mut last) = (Vec::new(), "up".to_owned());
    let mut look_for = |ms| {
        let (since, before) = (Instant::now(), deaths.len());
        while since.elapsed() < Duration::from_millis(ms) {
            let now = state(a, "b");
            if now == "down" && last != "down" {
                deaths.push(Instant::now());
            }
            last = now;
            sleep(Duration::from_millis(20));
        }
        deaths.len() - before
    };
    let flaps: Vec<usize> = (0..9)
        .map(|_| {
            cut();
            let seen = look_for(1_200);
            mend();
            seen + look_for(1_200)
        })
        .collect();
    println!("{story}: deaths of each flap {flaps:?}, {} lines about b", a.log().matches("b at 10.9.0.2").count());
    assert!(flaps[0] == 1 && flaps.iter().sum::<usize>() <= 4, "{flaps:?}");
    assert!(a.log().matches("does not answer any more").count() <= 4, "{}", a.log());
    assert_eq!(changes(), before, "{}", std::fs::read_to_string(&routes).unwrap());
    assert_eq!(state(a, "c"), "up");
    until("up again", || state(a, "b") == "up" && state(b, "a") == "up");
    ping(&a.ns, b.overlay(V4));
    // and a death is a death
    let killed = Instant::now();
    c.kill();
    println!("{story}: another one's death is seen after {:?}", dies(a, "c", killed));
    let killed = Instant::now();
    b.kill();
    println!("{story}: and b's after {:?}", dies(a, "b", killed));
    drop(monitor);
}

/// What it costs a node to watch others, in a mesh of 10, 100 and 1,000 of which it watches six without traffic:
/// `cargo test --release --test netns what_liveness_costs -- --ignored --nocapture`.
#[test]
#[ignore = "prints figures"]
fn what_liveness_costs() {
    let story = "what_liveness_costs";
    let Some(mesh) = Builder::new(story) else { return };
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    let mesh = names.into_iter().fold(mesh, Builder::node).start();
    let d = mesh.node("d");
    let list = mesh.list(|_| true);
    for size in [10, 100, 1_000] {
        // the others' names are behind: the real ones are each other's neighbours
        let more = (names.len()..size).map(|n| {
            let (high, low) = (n / 256, n % 256);
            format!("  - {{name: z{n:04}, underlay: 10.9.{}.{low}, subnets: [10.43.{high}.{low}/32]}}\n", 100 + high)
        });
        mesh.write_nodes(&(list.clone() + &more.collect::<String>()));
        until("the list is known", || d.json(&["peers"]).as_array().unwrap().len() == size - 1);
        all_up(&mesh, &["c", "d", "e"]);
        sleep(Duration::from_secs(3));
        let now = || (Instant::now(), d.cpu_ms(), d.stats()["udp"].clone());
        let (start, cpu, udp) = now();
        sleep(Duration::from_secs(30));
        let (end, cpu_after, udp_after) = now();
        let seconds = (end - start).as_secs_f64();
        let a_second = |key: &str| (udp_after[key].as_u64().unwrap() - udp[key].as_u64().unwrap()) as f64 / seconds;
        println!(
            "{story}: {size} nodes: {:.2} % of a core, {:.0} packets out, {:.0} in, {:.1} kB out a second",
            (cpu_after - cpu) as f64 / seconds / 10.0,
            a_second("tx_packets"),
            a_second("rx_packets"),
            a_second("tx_bytes") / 1e3,
        );
    }
}
