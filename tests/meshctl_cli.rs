//! meshctl, the real binary, against the admin socket with a made-up mesh behind it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use meshd::admin::protocol::{
    Encryption, ForeignView, KeysView, NodeRole, NodeState, NodeView, PeerState, PeerView, Request, StatsView,
    StatusView, SurveyView, capture, why,
};
use meshd::admin::server::{Limits, Mesh, serve_with};
use meshd::admin::socket::{AdminSocket, SocketOptions};
use meshd::membership::link;
use serde_json::{Value, json};

#[derive(Default)]
struct Fake {
    ready: AtomicBool,
    held_back: AtomicBool,
    asked: AtomicU64,
    many: bool,
}

impl Mesh for Fake {
    fn peers(&self) -> Vec<PeerView> {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        let peers = if self.many { 20_000 } else { 1 };
        let peer = |n| PeerView {
            name: format!("b{n}"),
            endpoint: "10.9.0.2:8472".parse().unwrap(),
            subnets: vec!["10.42.2.0/24".parse().unwrap(), "fd42:2::/64".parse().unwrap()],
            mac: "02:00:00:00:00:02".to_owned(),
            public_key: None,
            preshared: false,
            encryption: Encryption::None,
            session: None,
            state: PeerState::Unknown,
            last_seen_ms: None,
            rtt_us: None,
            path_mtu: 1500,
            path: None,
            loss_permille: None,
            ways: Vec::new(),
            tx_packets: 100_000 * asked,
            tx_bytes: 0,
            rx_packets: 0,
            rx_bytes: 0,
        };
        (0..peers).map(peer).collect()
    }

    fn stats(&self) -> StatsView {
        let mut stats = StatsView { node: "a".to_owned(), io: "mmsg".to_owned(), workers: 2, ..StatsView::default() };
        stats.drops.insert("no_route".to_owned(), 7);
        stats.drops.insert("wrong_vni".to_owned(), 0);
        stats.offload_reasons.insert("udp_gso".to_owned(), "switched off by configuration".to_owned());
        stats
    }

    fn status(&self) -> StatusView {
        let ready = self.ready.load(Ordering::Relaxed);
        let reasons = if ready { vec![] } else { vec!["mesh0 is down: `ip link set mesh0 up`".to_owned()] };
        StatusView { node: "a".to_owned(), ready, reasons, ..StatusView::default() }
    }

    fn nodes(&self) -> BoxFuture<'_, Vec<NodeView>> {
        let nodes = vec![NodeView {
            name: "a".to_owned(),
            id: "a".to_owned(),
            role: NodeRole::Agent,
            state: NodeState::Ready,
            underlay: vec!["10.9.0.1".parse().unwrap()],
            subnets: vec!["10.42.1.0/24".parse().unwrap()],
            labels: Default::default(),
            taints: vec![],
            joined_at: None,
            last_heartbeat: None,
            observed: None,
        }];
        ready(nodes).boxed()
    }

    fn keys(&self) -> KeysView {
        let ready = self.ready.load(Ordering::Relaxed);
        let lane_keys = if ready { vec!["LANE1=".to_owned()] } else { vec![] };
        KeysView { public_key: ready.then(|| "PUBLIC=".to_owned()), lane_keys }
    }

    fn why(&self, ask: why::Ask) -> BoxFuture<'_, Result<why::WhyView, String>> {
        let good = self.ready.load(Ordering::Relaxed);
        let verdict =
            format!("{:?}", ask.flow.map(|flow| (flow.protocol.name(), flow.source_port, flow.destination_port)));
        let finding = why::Finding {
            kind: "no_peer".to_owned(),
            bad: true,
            message: verdict.clone(),
            fix: Some("meshctl peers".to_owned()),
        };
        let findings = if good { vec![] } else { vec![finding] };
        ready(Ok(why::WhyView { asked: ask.destination, good, verdict, findings, ..Default::default() })).boxed()
    }

    fn survey(&self) -> BoxFuture<'_, SurveyView> {
        ready(SurveyView { node: "a".to_owned(), ..SurveyView::default() }).boxed()
    }

    fn capture(&self, _: capture::Ask) -> Result<capture::CaptureView, String> {
        Err("nothing passes here".to_owned())
    }

    fn accept_nodes(&self) -> Result<String, String> {
        if self.held_back.swap(false, Ordering::Relaxed) {
            Ok("accepted: 3 nodes removed".to_owned())
        } else {
            Err("no node list is held back: nothing to accept".to_owned())
        }
    }

    fn cluster(&self, ask: link::Request) -> BoxFuture<'_, Result<Value, String>> {
        ready(cluster(&ask)).boxed()
    }

    fn node_commands(
        &self,
        name: String,
        device: String,
        private_key_file: String,
    ) -> BoxFuture<'_, Result<ForeignView, String>> {
        let commands = vec![
            format!("ip link add {device} type wireguard"),
            format!("wg set {device} private-key {private_key_file}"),
        ];
        ready(Ok(ForeignView { name, commands, notes: vec!["again".to_owned()] })).boxed()
    }

    fn leave(&self, force: bool) -> BoxFuture<'_, Result<String, String>> {
        ready(if force { Ok("left".to_owned()) } else { Err("no server answers".to_owned()) }).boxed()
    }
}

/// Servers that take everything down: what was asked comes back inside the answer.
fn cluster(ask: &link::Request) -> Result<Value, String> {
    match ask {
        link::Request::TokenCreate { .. } => Ok(json!({"token": "mesh1TOKEN", "id": "t1", "asked": ask})),
        link::Request::TokenList => Ok(json!([{"id": "t1", "role": "agent", "uses_left": 3}])),
        link::Request::NodeRemove { name } if name == "x" => Err("there is no node named x".to_owned()),
        link::Request::ClusterStatus => Ok(json!({"good": true, "servers": ["https://a:9345"]})),
        other => Ok(json!({"message": "done", "asked": other})),
    }
}

/// A served socket in a directory of its own, until dropped.
struct Served {
    dir: tempfile::TempDir,
    fake: Arc<Fake>,
    running: Option<(tokio::sync::oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Served {
    fn new() -> Self {
        Self::with(Fake::default(), Limits::default(), 0o660)
    }

    fn with(fake: Fake, limits: Limits, mode: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let socket =
            AdminSocket::bind(&SocketOptions { mode, ..SocketOptions::new(dir.path().join("meshd.sock")) }).unwrap();
        let fake = Arc::new(fake);
        let mesh: Arc<dyn Mesh> = fake.clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        // One thread drives everything, as in meshd itself.
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    ended = serve_with(socket, mesh, limits) => panic!("it ended by itself: {ended:?}"),
                    _ = stopped => {}
                }
            });
        });
        Served { dir, fake, running: Some((stop, thread)) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("meshd.sock")
    }

    fn ctl(&self, args: &[&str]) -> Output {
        ctl(&self.path(), args)
    }

    /// A connection without meshctl, which cannot hang the test.
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends raw bytes and reads one line.
    fn raw(&self, bytes: &[u8]) -> Value {
        let stream = self.connect();
        // A server that has read enough may close before we have sent everything.
        let _ = (&stream).write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        answer(&stream)
    }

    fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            assert!(thread.join().is_ok() || std::thread::panicking());
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
    }
}

fn answer(stream: &UnixStream) -> Value {
    let mut line = String::new();
    let _ = BufReader::new(stream).read_line(&mut line);
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
}

fn error_code(answer: &Value) -> &str {
    answer["error"]["code"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

fn meshctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshctl"));
    command.env_remove("MESHD_SOCKET").stdin(Stdio::null());
    command
}

fn ctl(socket: &Path, args: &[&str]) -> Output {
    meshctl().arg("--socket").arg(socket).args(args).output().unwrap()
}

fn waiting(socket: &Path) -> Child {
    let wait = ["status", "--wait", "30s"];
    meshctl().arg("--socket").arg(socket).args(wait).stdout(Stdio::piped()).spawn().unwrap()
}

fn out(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn err(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn json(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", err(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn words(text: &str) -> BTreeSet<&str> {
    text.split_whitespace().collect()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

#[test]
fn the_public_key_stands_alone() {
    let served = Served::new();
    let none = served.ctl(&["key", "show"]);
    assert_eq!((none.status.code(), out(&none)), (Some(1), ""));
    assert!(err(&none).contains("encryption: wireguard"), "{}", err(&none));
    let none = served.ctl(&["key", "show", "--json"]);
    assert_eq!((none.status.code(), out(&none)), (Some(1), "{\"public_key\":null,\"lane_keys\":[]}\n"));
    served.fake.ready.store(true, Ordering::Relaxed);
    assert_eq!(out(&served.ctl(&["key", "show"])), "PUBLIC=\n");
    assert_eq!(
        json(&served.ctl(&["key", "show", "--json"])),
        json!({"public_key": "PUBLIC=", "lane_keys": ["LANE1="]})
    );
}

#[test]
fn why_has_the_verdict_first_and_as_exit_code() {
    let served = Served::new();
    let flow = ["why", "b", "--proto", "tcp", "--sport", "4000", "--dport", "443"];
    let bad = served.ctl(&flow);
    assert_eq!(bad.status.code(), Some(1), "{}", err(&bad));
    let text = out(&bad);
    assert!(text.starts_with("BAD: Some((\"tcp\", 4000, 443))\n  fix: meshctl peers\n"), "{text}");
    served.fake.ready.store(true, Ordering::Relaxed);
    let good = served.ctl(&["why", "10.42.2.1"]);
    assert_eq!(good.status.code(), Some(0), "{}", err(&good));
    assert!(out(&good).starts_with("good: None\n"), "{}", out(&good));
    assert_eq!(json(&served.ctl(&["why", "10.42.2.1", "--json"]))["good"], true);
    for wrong in
        [&["why"][..], &["why", "b", "--proto", "tcp"], &["why", "b", "--sport", "1"], &["why", "b", "--proto", "x"]]
    {
        assert_eq!(served.ctl(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn top_wants_a_terminal_and_names_what_does_not() {
    let served = Served::new();
    for args in [&["top"][..], &["top", "--json"]] {
        let refused = served.ctl(args);
        assert_eq!((refused.status.code(), out(&refused)), (Some(2), ""), "{}", err(&refused));
        assert!(err(&refused).contains("meshctl peers --watch") && err(&refused).contains("meshctl stats --watch"));
    }
}

#[test]
fn a_capture_that_never_began_leaves_the_file_of_before() {
    let served = Served::new();
    let file = served.dir.path().join("before.pcapng");
    fs::write(&file, "of before").unwrap();
    let path = file.to_str().unwrap();
    for args in [&["capture", "--time", "1s", "-w", path][..], &["capture", "--recorded", "-w", path]] {
        let refused = served.ctl(args);
        assert_eq!(refused.status.code(), Some(1), "{}", err(&refused));
        assert!(err(&refused).contains("nothing passes here"), "{}", err(&refused));
        assert_eq!(fs::read_to_string(&file).unwrap(), "of before");
    }
}

#[test]
fn a_bugreport_has_no_secrets() {
    let served = Served::new();
    let dir = served.dir.path();
    let (token, key) = ("mesh1qqqsyqcyq5rqwzqfpg9scrgwpugpzysn", "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=");
    let (config, archive) = (dir.join("config.yaml"), dir.join("report.tar"));
    fs::create_dir(dir.join("data")).unwrap();
    fs::write(dir.join("data/node.key"), key).unwrap();
    let text = format!("node-name: planted-name\ndata-dir: {}\n# {key}\ntoken: {token}\n", dir.join("data").display());
    fs::write(&config, &text).unwrap();
    let (archive_arg, config_arg) = (archive.to_str().unwrap(), config.to_str().unwrap());
    let made = served.ctl(&["bugreport", "-o", archive_arg, "--config", config_arg]);
    assert_eq!(made.status.code(), Some(0), "{}", err(&made));
    let bytes = fs::read(&archive).unwrap();
    let has = |what: &str| bytes.windows(what.len()).any(|window| window == what.as_bytes());
    assert!(!has(token) && !has(key) && !has(&token[..12]) && !has(&key[..12]), "a secret is in it");
    assert!(has("planted-name") && has("[removed]"), "positive control: the configuration is in it");
    assert_eq!(fs::metadata(&archive).unwrap().mode() & 0o777, 0o600);

    let list = Command::new("tar").arg("tf").arg(&archive).output().unwrap();
    assert!(list.status.success(), "{}", err(&list));
    let names = words(out(&list));
    for name in ["status.json", "stats.json", "peers.json", "doctor.json", "doctor.txt", "config.yaml", "kernel.txt"] {
        assert!(names.contains(format!("meshd-bugreport/{name}").as_str()), "{name}: {names:?}");
    }
    let status = Command::new("tar").arg("xOf").arg(&archive).arg("meshd-bugreport/status.json").output().unwrap();
    assert_eq!(json(&status)["node"], "a");

    // what meshd itself says, and without any meshd
    let alone = ctl(&dir.join("nobody.sock"), &["bugreport", "-o", archive_arg, "--config", config_arg, "--json"]);
    assert!(json(&alone)["contents"].as_array().unwrap().contains(&json!("doctor.txt")));
    let nowhere = served.ctl(&["bugreport", "-o", "/does/not/exist.tar", "--config", config_arg]);
    assert_eq!(nowhere.status.code(), Some(1), "{}", err(&nowhere));
}

#[test]
fn people_get_tables() {
    let served = Served::new();
    served.fake.ready.store(true, Ordering::Relaxed);
    for (args, header, row) in [
        (&["peers"][..], "NAME  STATE", "b0    unknown  10.9.0.2:8472  10.42.2.0/24, fd42:2::/64  none"),
        (&["stats"], "SIDE  RX PACKETS", "no_route        7  no node has the destination"),
        (&["status"], "ready    yes", "node     a, role run"),
        (&["nodes"], "NAME  ROLE", "a     agent  ready  10.9.0.1  10.42.1.0/24"),
    ] {
        let output = served.ctl(args);
        assert_eq!(output.status.code(), Some(0), "{}", err(&output));
        assert!(out(&output).contains(header) && out(&output).contains(row), "{args:?}: {}", out(&output));
        assert!(!out(&output).contains('\x1b'), "colour without a terminal");
        assert_eq!(err(&output), "");
    }
    assert!(!out(&served.ctl(&["stats"])).contains("wrong_vni"));
    assert!(out(&served.ctl(&["stats", "--all"])).contains("wrong_vni"));
}

#[test]
fn scripts_get_the_documented_fields() {
    let served = Served::new();
    served.fake.ready.store(true, Ordering::Relaxed);

    let peers = json(&served.ctl(&["peers", "--json"]));
    let expected = "name endpoint subnets mac public_key encryption preshared session state last_seen_ms rtt_us loss_permille ways path_mtu path \
        tx_packets tx_bytes rx_packets rx_bytes";
    assert_eq!(keys(&peers[0]), words(expected));
    assert_eq!(peers[0]["state"], "unknown");
    assert_eq!(peers[0]["encryption"], "none");
    assert_eq!(peers[0]["public_key"], Value::Null);
    assert_eq!(peers[0]["endpoint"], "10.9.0.2:8472");
    assert_eq!(peers[0]["subnets"][0], "10.42.2.0/24");

    let stats = json(&served.ctl(&["stats", "--json"]));
    let expected = "version node uptime_ms io workers offloads offload_reasons tunnel_gso big_tcp tun udp drops originated consumed \
        outbound inbound batches partial_csum_in pairs_moved";
    assert_eq!(keys(&stats), words(expected));
    assert_eq!(keys(&stats["offloads"]), words("tun_tso tun_uso udp_gso udp_gro"));
    assert_eq!(keys(&stats["tunnel_gso"]), words("on why super_packets"));
    assert_eq!(keys(&stats["big_tcp"]), words("on why super_packets"));
    assert_eq!(stats["offloads"]["tun_tso"], false);
    for side in ["tun", "udp"] {
        assert_eq!(keys(&stats[side]), words("rx_packets rx_bytes tx_packets tx_bytes"));
    }
    for journey in ["outbound", "inbound"] {
        assert_eq!(keys(&stats[journey]), words("in originated out dropped consumed"));
    }
    let expected = "tun_reads tun_read_packets udp_recv_calls udp_recv_datagrams udp_send_calls udp_send_datagrams \
        tun_writes tun_write_segments";
    assert_eq!(keys(&stats["batches"]), words(expected));
    assert_eq!(stats["drops"]["no_route"], 7);
    assert_eq!(stats["drops"]["wrong_vni"], 0, "reasons at 0 are listed");

    let status = json(&served.ctl(&["status", "--json"]));
    let expected = "node role overlay_addresses vtep_mac public_key mtu ready reasons tun io port vni peers version \
        membership";
    assert_eq!(keys(&status), words(expected));
    assert_eq!((&status["role"], &status["ready"]), (&Value::from("run"), &Value::from(true)));

    let nodes = json(&served.ctl(&["nodes", "--json"]));
    let expected = "name id role state underlay subnets labels taints joined_at last_heartbeat observed";
    assert_eq!(keys(&nodes[0]), words(expected));
    assert_eq!((&nodes[0]["role"], &nodes[0]["state"]), (&Value::from("agent"), &Value::from("ready")));
}

#[test]
fn options_stand_before_or_after_the_subcommand() {
    let served = Served::new();
    let path = served.path();
    let path = path.to_str().unwrap();
    let before = meshctl().args(["--json", "--socket", path, "nodes"]).output().unwrap();
    let after = meshctl().args(["nodes", "--socket", path, "--json"]).output().unwrap();
    let mixed = meshctl().args(["--json", "nodes", "--socket", path]).output().unwrap();
    let environment = meshctl().env("MESHD_SOCKET", path).args(["nodes", "--json"]).output().unwrap();
    let flag_wins = meshctl().env("MESHD_SOCKET", "/nowhere").args(["nodes", "--json", "--socket", path]).output();
    for output in [before, after, mixed, environment, flag_wins.unwrap()] {
        assert_eq!(json(&output)[0]["name"], "a");
    }
}

#[test]
fn exit_code_1_when_not_ready() {
    let served = Served::new();
    let output = served.ctl(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(out(&output).contains("not ready: mesh0 is down: `ip link set mesh0 up`"), "{}", out(&output));
    assert!(out(&output).contains("What to do"));
    let output = served.ctl(&["--json", "status"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["ready"], false);
    served.fake.ready.store(true, Ordering::Relaxed);
    assert_eq!(served.ctl(&["status"]).status.code(), Some(0));
}

#[test]
fn status_waits_until_it_is_good() {
    let served = Served::new();
    let started = Instant::now();
    assert_eq!(served.ctl(&["status", "--wait", "300ms"]).status.code(), Some(1));
    assert!(started.elapsed() >= Duration::from_millis(300));
    let waiting = waiting(&served.path());
    std::thread::sleep(Duration::from_millis(300));
    served.fake.ready.store(true, Ordering::Relaxed);
    assert_eq!(waiting.wait_with_output().unwrap().status.code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn status_waits_for_a_meshd_that_is_still_starting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meshd.sock");
    assert_eq!(ctl(&path, &["status", "--wait", "300ms"]).status.code(), Some(3));
    let waiting = waiting(&path);
    std::thread::sleep(Duration::from_millis(300));
    let served = Served::new();
    served.fake.ready.store(true, Ordering::Relaxed);
    fs::rename(served.path(), &path).unwrap();
    assert_eq!(waiting.wait_with_output().unwrap().status.code(), Some(0));
}

#[test]
fn exit_code_2_for_a_wrong_command_line() {
    let served = Served::new();
    for args in [
        &["dance"][..],
        &["peers", "--dance"],
        &["status", "--wait", "soon"],
        &["status", "--wait", "30"],
        &["nodes", "refuse"],
        &[],
    ] {
        let output = served.ctl(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", err(&output));
        assert_eq!(out(&output), "");
    }
    assert_eq!(served.ctl(&["peers"]).status.code(), Some(0));
}

#[test]
fn exit_code_3_when_meshd_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("meshd.sock");
    let output = ctl(&path, &["peers", "--json"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(out(&output), "");
    assert!(err(&output).contains("systemctl status meshd") && err(&output).contains(path.to_str().unwrap()));
    fs::write(&path, "").unwrap();
    let output = ctl(&path, &["peers"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(err(&output).contains("is not a socket"), "{}", err(&output));
}

#[test]
fn a_list_is_accepted_once() {
    let served = Served::new();
    let output = served.ctl(&["nodes", "accept"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("no node list is held back"), "{}", err(&output));
    served.fake.held_back.store(true, Ordering::Relaxed);
    let output = served.ctl(&["nodes", "accept"]);
    assert_eq!((output.status.code(), out(&output)), (Some(0), "accepted: 3 nodes removed\n"));
    served.fake.held_back.store(true, Ordering::Relaxed);
    assert_eq!(json(&served.ctl(&["nodes", "accept", "--json"]))["accepted"], true);
}

#[test]
fn others_may_look_but_not_change() {
    if !is_root() {
        println!("SKIPPED: needs root, to run meshctl as another user");
        return;
    }
    let served = Served::with(Fake::default(), Limits::default(), 0o666);
    served.fake.held_back.store(true, Ordering::Relaxed);
    // Another user may not be able to reach the build directory.
    let copy = served.dir.path().join("meshctl");
    fs::copy(env!("CARGO_BIN_EXE_meshctl"), &copy).unwrap();
    let as_nobody = |socket: &Path, args: &[&str]| {
        Command::new(&copy).uid(65_534).gid(65_534).arg("--socket").arg(socket).args(args).output().unwrap()
    };
    assert_eq!(json(&as_nobody(&served.path(), &["nodes", "--json"]))[0]["name"], "a");
    let output = as_nobody(&served.path(), &["nodes", "accept"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("user 65534 may look but not change"), "{}", err(&output));
    assert!(served.fake.held_back.load(Ordering::Relaxed));
    assert_eq!(served.ctl(&["nodes", "accept"]).status.code(), Some(0));

    let closed = Served::new();
    let output = as_nobody(&closed.path(), &["nodes"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(err(&output).contains("no permission") && err(&output).contains("mode 0660"), "{}", err(&output));
}

#[test]
fn a_hundred_idle_clients_do_not_lock_others_out_for_ever() {
    let limits = Limits { idle: Duration::from_secs(2), ..Limits::default() };
    let served = Served::with(Fake::default(), limits, 0o660);
    let idle: Vec<_> = (0..100).map(|_| served.connect()).collect();
    assert_eq!(error_code(&answer(idle.last().unwrap())), "busy", "the hundredth is told");
    let output = served.ctl(&["peers"]);
    assert_eq!(output.status.code(), Some(3), "{}", out(&output));
    assert!(err(&output).contains("try again"), "{}", err(&output));
    assert_eq!(error_code(&answer(idle.first().unwrap())), "timeout");
    assert_eq!(served.ctl(&["peers"]).status.code(), Some(0));
}

#[test]
fn without_file_descriptors_it_waits_and_recovers() {
    // The limit is the process's own, so this needs another process.
    let again = "ulimit -n 48 && exec \"$0\" --exact starved_of_file_descriptors --ignored --test-threads=1";
    let output = Command::new("sh").args(["-c", again]).arg(std::env::current_exe().unwrap()).output().unwrap();
    assert!(output.status.success() && out(&output).contains("1 passed"), "{}{}", out(&output), err(&output));
}

#[test]
#[ignore = "takes all file descriptors: run by without_file_descriptors_it_waits_and_recovers"]
fn starved_of_file_descriptors() {
    use std::os::unix::fs::FileExt;
    let served = Served::new();
    let stat = fs::File::open("/proc/self/stat").unwrap();
    // proc_pid_stat(5): fields 14 and 15, in ticks of 10 ms.
    let ticks = || -> u64 {
        let mut text = [0; 1024];
        let n = stat.read_at(&mut text, 0).unwrap();
        let text = String::from_utf8_lossy(&text[..n]).into_owned();
        let fields: Vec<_> = text.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    // Answered and kept open: the server has all that it needs, and gives nothing back meanwhile.
    let first = served.connect();
    (&first).write_all(Request::Nodes.to_line().unwrap().as_bytes()).unwrap();
    assert_eq!(answer(&first)["ok"][0]["name"], "a");
    let mut held: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).take(1000).collect();
    assert!(held.len() < 48, "ulimit has no effect");
    held.pop();
    let client = served.connect();
    (&client).write_all(Request::Nodes.to_line().unwrap().as_bytes()).unwrap();
    let before = ticks();
    client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    assert!((&client).read(&mut [0]).is_err(), "accepted without a file descriptor");
    let spent = ticks() - before;
    assert!(spent < 20, "it spins: {spent} ticks in a second");
    held.clear();
    assert_eq!(answer(&client)["ok"][0]["name"], "a");
}

#[test]
fn one_connection_carries_many_requests() {
    let served = Served::new();
    let stream = served.connect();
    for request in [Request::Peers, Request::Stats, Request::Status, Request::Nodes] {
        (&stream).write_all(request.to_line().unwrap().as_bytes()).unwrap();
        let answer = answer(&stream);
        assert_eq!(answer["version"], 1);
        assert!(answer.get("ok").is_some(), "{answer}");
    }
}

#[test]
fn garbage_gets_an_answer_and_the_next_one_is_served() {
    let served = Served::new();
    let mut oversized = vec![b'x'; 70_000];
    oversized.push(b'\n');
    let endless = vec![b'['; 1 << 20];
    for bad in [&b"\xff\xfe\0\n"[..], b"hello", b"\n", b"{}\n", &oversized, &endless] {
        assert_eq!(error_code(&served.raw(bad)), "bad-request");
    }
    assert_eq!(error_code(&served.raw(b"{\"version\":1,\"request\":\"dance\"}\n")), "unknown-request");
    assert_eq!(error_code(&served.raw(b"{\"version\":9,\"request\":\"peers\"}\n")), "version");
    let padded = format!("{{\"version\":1,\"request\":\"nodes\"{}}}\n", " ".repeat(60_000));
    assert_eq!(served.raw(padded.as_bytes())["ok"][0]["name"], "a", "just below the limit");
    assert_eq!(served.raw(b"{\"version\":1,\"request\":\"nodes\"}")["ok"][0]["name"], "a", "no newline at the end");
}

#[test]
fn a_client_that_does_not_read_is_let_go() {
    let limits = Limits { clients: 1, write: Duration::from_millis(300), ..Limits::default() };
    let served = Served::with(Fake { many: true, ..Fake::default() }, limits, 0o660);
    let stuck = served.connect();
    (&stuck).write_all(Request::Peers.to_line().unwrap().as_bytes()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(15);
    while served.ctl(&["nodes"]).status.code() != Some(0) {
        assert!(Instant::now() < deadline, "the only place is never given back");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn an_answer_for_many_peers_arrives_whole() {
    let served = Served::with(Fake { many: true, ..Fake::default() }, Limits::default(), 0o660);
    assert_eq!(json(&served.ctl(&["peers", "--json"])).as_array().unwrap().len(), 20_000);
    assert_eq!(out(&served.ctl(&["peers"])).lines().count(), 20_001);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let served = Served::with(Fake { many: true, ..Fake::default() }, Limits::default(), 0o660);
    for args in [&["peers"][..], &["peers", "--json", "--watch"], &["peers", "--watch"]] {
        let mut child = meshctl()
            .arg("--socket")
            .arg(served.path())
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 10];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), err(&output)), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn a_watch_repeats_with_rates_and_ends_on_interrupt() {
    let served = Served::new();
    let watch = |args: &[&str]| {
        let mut child = meshctl().arg("--socket").arg(served.path()).args(args).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let taken: Vec<String> = lines.by_ref().take(5).collect();
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        assert!(lines.count() < 1000);
        assert_eq!(child.wait().unwrap().code(), Some(0), "{taken:?}");
        taken
    };
    let lines = watch(&["stats", "--watch", "--json"]);
    for line in &lines {
        assert_eq!(serde_json::from_str::<Value>(line).unwrap()["node"], "a");
    }
    let lines = watch(&["peers", "--watch"]);
    assert!(lines[0].ends_with("RX PACKETS   RX"), "{lines:?}");
    assert!(lines[3].contains("TX PPS") && lines[4].contains("k/s"), "{lines:?}");
}

#[test]
fn a_script_s_watch_ends_with_meshd() {
    let mut served = Served::new();
    let mut child = meshctl()
        .arg("--socket")
        .arg(served.path())
        .args(["stats", "--watch", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().is_some());
    served.stop();
    assert!(lines.count() < 1000);
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn a_stopped_server_leaves_no_file_and_a_killed_one_is_replaced() {
    let mut served = Served::new();
    assert!(served.path().exists());
    served.stop();
    assert!(!served.path().exists());
    drop(std::os::unix::net::UnixListener::bind(served.path()).unwrap());
    let output = served.ctl(&["nodes"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(err(&output).contains("nobody listens"), "{}", err(&output));
    assert!(AdminSocket::bind(&SocketOptions::new(served.path())).is_ok());
}

#[test]
fn a_second_meshd_is_refused_while_the_first_one_serves() {
    let served = Served::new();
    let error = AdminSocket::bind(&SocketOptions::new(served.path())).unwrap_err();
    assert!(error.to_string().contains("another meshd answers on"), "{error}");
    assert_eq!(served.ctl(&["nodes"]).status.code(), Some(0));
}

#[test]
fn help_teaches() {
    let output = meshctl().arg("--help").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    for word in ["Examples:", "Exit codes:", "--socket", "--json", "peers", "stats", "status", "nodes", "MESHD_SOCKET"]
    {
        assert!(out(&output).contains(word), "{word}");
    }
}

#[test]
fn a_token_stands_alone_on_standard_output() {
    let served = Served::new();
    let text = |args: &[&str]| {
        let output = served.ctl(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(text(&["token", "create"]), "mesh1TOKEN\n");
    assert_eq!(text(&["token", "create", "--print-join"]), "MESHD_TOKEN=mesh1TOKEN meshd agent\n");
    assert_eq!(
        text(&["token", "create", "--print-join", "--role", "server", "--ttl", "never", "--uses", "1", "--node", "b"]),
        "MESHD_TOKEN=mesh1TOKEN meshd server\n"
    );
    let script = text(&["token", "create", "--print-script"]);
    let checked = Command::new("sh").args(["-n", "-c", &script]).status().unwrap();
    assert!(checked.success(), "{script}");
    let made: Value = serde_json::from_str(&text(&["token", "create", "--json"])).unwrap();
    assert_eq!((&made["token"], &made["id"]), (&json!("mesh1TOKEN"), &json!("t1")));
    assert!(text(&["token", "list"]).contains("t1  agent"), "{}", text(&["token", "list"]));
    let made: Value = serde_json::from_str(&text(&["token", "create", "--print-join", "--json"])).unwrap();
    assert_eq!(made["join"], json!("MESHD_TOKEN=mesh1TOKEN meshd agent\n"));
    let made: Value = serde_json::from_str(&text(&["token", "create", "--print-script", "--json"])).unwrap();
    assert_eq!(made["script"], json!(script));
    assert!(text(&["token", "create", "--ttl", "7d", "--json"]).contains("mesh1TOKEN"));
    assert!(text(&["token", "revoke", "t1"]).contains("the token t1 is revoked"));
}

#[test]
fn nodes_are_changed_and_refusals_are_told() {
    let served = Served::new();
    for args in [&["node", "drain", "b"][..], &["node", "undrain", "b"], &["node", "remove", "b"]] {
        let output = served.ctl(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stdout).starts_with("b is "), "{output:?}");
    }
    let add = [
        "node",
        "add",
        "x",
        "--underlay",
        "10.9.0.9,fd00::9",
        "--subnet",
        "10.42.9.0/24",
        "--mac",
        "02:00:00:00:00:09",
    ];
    let output = served.ctl(&[&add[..], &["--json"]].concat());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["asked"]["underlay"], json!(["10.9.0.9:8472", "[fd00::9]:8472"]));
    assert_eq!(answer["asked"]["subnets"], json!(["10.42.9.0/24"]));

    assert_eq!(answer["commands"][0], "ip link add mesh0 type wireguard");
    let text = String::from_utf8(served.ctl(&add).stdout).unwrap();
    let expected = "# x is a member\n# To be run there, as root:\n# again\nip link add mesh0 type wireguard\n";
    assert!(text.starts_with(expected), "it is for a shell, all of it: {text}");
    let output = served.ctl(&["node", "commands", "x", "--device", "wg7", "--private-key-file", "/k"]);
    let expected = "# again\nip link add wg7 type wireguard\nwg set wg7 private-key /k\n";
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "what a shell may be given");

    let output = served.ctl(&["node", "remove", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no node named x"), "{output:?}");
    let token = |more: &[&'static str]| [&["token", "create"], more].concat();
    for wrong in
        [&["node", "add", "x"][..], &token(&["--role", "boss"]), &token(&["--ttl", "x"]), &token(&["--ttl", "0s"])]
    {
        assert_eq!(served.ctl(wrong).status.code(), Some(2), "{wrong:?}");
    }
    assert_eq!(served.ctl(&["cluster", "status"]).status.code(), Some(0));
    assert_eq!(served.ctl(&["leave"]).status.code(), Some(1));
    let left = served.ctl(&["leave", "--force", "--json"]);
    assert_eq!(left.status.code(), Some(0));
    assert_eq!(serde_json::from_slice::<Value>(&left.stdout).unwrap()["left"], json!(true));
}
