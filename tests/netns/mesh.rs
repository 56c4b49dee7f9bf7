//! A laboratory: nodes on one network, each in a namespace, with the real `meshd` in those that have one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use meshd::key::{self, SecretKey};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::namespace::{Namespace, PATIENCE, Process, run, until};

/// The address families; of the underlay or of the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}
pub(crate) use Family::{V4, V6};

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Runs meshd.
    Meshd,
    /// Runs `meshd server` or `meshd agent`, when the story starts it.
    Joins(&'static str),
    /// Has a kernel VXLAN device as flannel sets it up, and is in the node list.
    Kernel,
    /// Has nothing, and is in the node list: a test speaks for it.
    Member,
    /// Has nothing, and is in nobody's list.
    Stranger,
    /// Runs another implementation of WireGuard, and is in the node list.
    WireGuard(&'static str),
}

/// A mesh that is being described.
pub(crate) struct Builder {
    story: &'static str,
    nodes: Vec<(&'static str, Kind, BTreeMap<&'static str, String>)>,
    outer: Family,
    underlay_mtu: u32,
    profile: char,
    pods: bool,
    encrypted: bool,
}

impl Builder {
    /// Where namespaces cannot be had: none, and the reason is printed.
    pub(crate) fn new(story: &'static str) -> Option<Self> {
        if let Some(reason) = why_not() {
            skipped(story, &reason);
            return None;
        }
        Some(Builder {
            story,
            nodes: Vec::new(),
            outer: V4,
            underlay_mtu: 1500,
            profile: 'a',
            pods: false,
            encrypted: false,
        })
    }

    fn add(mut self, name: &'static str, kind: Kind) -> Self {
        self.nodes.push((name, kind, BTreeMap::new()));
        self
    }

    /// A node that runs meshd. Node number N is the N-th that is added.
    pub(crate) fn node(self, name: &'static str) -> Self {
        self.add(name, Kind::Meshd)
    }

    /// A node that serves the control plane.
    pub(crate) fn server(self, name: &'static str) -> Self {
        self.add(name, Kind::Joins("server"))
    }

    /// A node that joins.
    pub(crate) fn agent(self, name: &'static str) -> Self {
        self.add(name, Kind::Joins("agent"))
    }

    /// A node with a kernel VXLAN device.
    pub(crate) fn kernel(self, name: &'static str) -> Self {
        self.add(name, Kind::Kernel)
    }

    /// An address in the node list with nothing behind it.
    pub(crate) fn member(self, name: &'static str) -> Self {
        self.add(name, Kind::Member)
    }

    /// A machine on the same network.
    pub(crate) fn stranger(self, name: &'static str) -> Self {
        self.add(name, Kind::Stranger)
    }

    /// A configuration key of the node that was added last.
    pub(crate) fn set(mut self, key: &'static str, value: impl ToString) -> Self {
        self.nodes.last_mut().unwrap().2.insert(key, value.to_string());
        self
    }

    /// An IPv6 underlay.
    pub(crate) fn over(mut self, outer: Family) -> Self {
        self.outer = outer;
        self
    }

    pub(crate) fn underlay_mtu(mut self, mtu: u32) -> Self {
        self.underlay_mtu = mtu;
        self
    }

    /// What the underlay's network cards can do: `profile` of netns-scripts/lib.sh.
    pub(crate) fn profile(mut self, profile: char) -> Self {
        self.profile = profile;
        self
    }

    /// A pod behind a bridge on each node, which has the subnet's first address; the node's own is the network's.
    pub(crate) fn pods(mut self) -> Self {
        self.pods = true;
        self
    }

    /// A node that runs this program: `wireguard-go` or `boringtun-cli`. The mesh has to be encrypted.
    pub(crate) fn wireguard(self, name: &'static str, program: &'static str) -> Self {
        self.add(name, Kind::WireGuard(program))
    }

    /// Every node has a key; those with meshd encrypt.
    pub(crate) fn encrypted(mut self) -> Self {
        self.encrypted = true;
        self
    }

    /// Builds all of it, without any meshd.
    pub(crate) fn build(self) -> Mesh {
        Mesh::build(self)
    }

    /// Builds all of it, starts every meshd and waits until it is ready.
    pub(crate) fn start(self) -> Mesh {
        let mesh = self.build();
        mesh.start();
        mesh
    }
}

/// A mesh that is there.
pub(crate) struct Mesh {
    nodes: Vec<Node>,
    /// The network that the nodes are plugged into.
    pub(crate) switch: Namespace,
    dir: tempfile::TempDir,
    outer: Family,
}

impl Mesh {
    fn build(plan: Builder) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("meshd-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix(plan.story).tempdir().unwrap();
        let switch = Namespace::new(format!("{prefix}-switch"));
        switch.sh(&format!(
            "ip link add br0 mtu {mtu} type bridge forward_delay 0 mcast_snooping 0
             ip addr add 10.9.0.254/24 dev br0
             ip addr add fd09::fe/64 dev br0 nodad
             ip link set br0 up",
            mtu = plan.underlay_mtu
        ));
        let mut mesh = Mesh { nodes: Vec::new(), switch, dir, outer: plan.outer };
        for (number, (name, kind, mut settings)) in (1..).zip(plan.nodes) {
            let dir = mesh.dir.path().join(name);
            fs::create_dir(&dir).unwrap();
            let key = plan.encrypted.then(|| key::file::load_or_make(&dir.join("data/node.key")).unwrap().0);
            if plan.encrypted {
                settings.entry("encryption").or_insert_with(|| "wireguard".to_owned());
            }
            let node = Node {
                name,
                number,
                kind,
                ns: Namespace::new(format!("{prefix}-{name}")),
                pod: plan.pods.then(|| Namespace::new(format!("{prefix}-{name}-pod"))),
                outer: plan.outer,
                nodes_file: mesh.dir.path().join("nodes.yaml"),
                dir,
                settings: Mutex::new(settings),
                token: Mutex::new(None),
                daemon: Mutex::new(None),
                key,
            };
            node.plug(&mesh.switch, plan.underlay_mtu, plan.profile);
            node.make_pod();
            mesh.nodes.push(node);
        }
        mesh.make_kernel_nodes(plan.underlay_mtu);
        mesh.make_wireguard_nodes(plan.underlay_mtu);
        mesh.publish();
        mesh
    }

    /// Starts every meshd and waits until it is ready.
    pub(crate) fn start(&self) {
        self.meshd().for_each(Node::spawn);
        self.meshd().for_each(Node::ready);
    }

    #[track_caller]
    pub(crate) fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).unwrap()
    }

    #[track_caller]
    pub(crate) fn two(&self, names: [&str; 2]) -> [&Node; 2] {
        names.map(|name| self.node(name))
    }

    #[track_caller]
    pub(crate) fn three(&self, names: [&str; 3]) -> [&Node; 3] {
        names.map(|name| self.node(name))
    }

    fn meshd(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.kind == Kind::Meshd)
    }

    /// The node list that follows from the nodes, for all of them.
    pub(crate) fn publish(&self) {
        self.write_nodes(&self.list(|_| true));
    }

    /// A node list with those nodes.
    pub(crate) fn list(&self, wanted: impl Fn(&Node) -> bool) -> String {
        let members =
            self.nodes.iter().filter(|node| !matches!(node.kind, Kind::Stranger | Kind::Joins(_)) && wanted(node));
        members.fold("nodes:\n".to_owned(), |list, node| list + &node.entry())
    }

    /// Replaces the node list of all nodes in one go.
    pub(crate) fn write_nodes(&self, text: &str) {
        let new = self.dir.path().join("nodes.yaml.new");
        fs::write(&new, text).unwrap();
        fs::rename(&new, self.dir.path().join("nodes.yaml")).unwrap();
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Nothing was lost without a name: on every node, in each direction, what went in and was made came out, was
    /// dropped or was kept. Looks when the traffic has come to rest.
    #[track_caller]
    pub(crate) fn balances(&self) {
        for node in self.meshd() {
            let (mut before, start) = (Value::Null, Instant::now());
            until(&format!("the account of {} is at rest", node.name), || {
                let stats = node.stats();
                let moving = |stats: &Value| [stats["tun"].clone(), stats["udp"].clone(), stats["drops"].clone()];
                let rest = before.is_object() && moving(&before) == moving(&stats);
                // a worker that has to wait for a core may be in the middle of a packet
                let whole = start.elapsed() > PATIENCE / 2 || JOURNEYS.iter().all(|journey| adds_up(&stats[*journey]));
                before = stats;
                rest && whole
            });
            for direction in JOURNEYS {
                assert!(adds_up(&before[direction]), "{} {direction}: {before:#}", node.name);
            }
            let of = |side: &str, what: &str| before[side][what].as_u64().unwrap();
            assert_eq!(of("tun", "rx_packets"), of("outbound", "in"), "{before:#}");
            assert_eq!(of("udp", "tx_packets"), of("outbound", "out"), "{before:#}");
            assert_eq!(of("udp", "rx_packets"), of("inbound", "in"), "{before:#}");
            assert_eq!(of("tun", "tx_packets"), of("inbound", "out"), "{before:#}");
        }
    }

    /// And the kernel agrees: each frame that it handed to a reader of the device or took from a writer was counted. Only
    /// where no meshd was started twice, and none answered with an ICMP error.
    #[track_caller]
    pub(crate) fn balances_with_the_kernel(&self) {
        self.balances();
        for node in self.meshd() {
            // the kernel itself says something now and then, also between two looks; a frame that was lost stays lost
            until(&format!("{}: frames written and read are as the kernel counts them", node.name), || {
                let device = node.ns.sh("grep mesh0: /proc/net/dev");
                let counters: Vec<u64> = device.split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
                let batches = &node.stats()["batches"];
                batches["tun_writes"] == counters[1] && batches["tun_reads"] == counters[9]
            });
        }
    }

    fn make_wireguard_nodes(&self, underlay_mtu: u32) {
        for node in &self.nodes {
            if let Kind::WireGuard(program) = node.kind {
                let peers: Vec<_> = self.meshd().collect();
                node.start_wireguard(program, &peers, underlay_mtu);
            }
        }
    }

    /// Static neighbour, FDB entry and on-link route for each other node, as flannel makes them.
    fn make_kernel_nodes(&self, underlay_mtu: u32) {
        for node in self.nodes.iter().filter(|node| node.kind == Kind::Kernel) {
            let overhead = if self.outer == V4 { 50 } else { 70 };
            let mut script = format!(
                "ip link add vxlan0 address {mac} mtu {mtu} type vxlan id 1 dstport 8472 local {local} dev ul0 nolearning
                 ip addr add {v4}/32 dev vxlan0
                 ip addr add {v6}/128 dev vxlan0 nodad
                 ip link set vxlan0 up\n",
                mac = node.mac(),
                mtu = underlay_mtu - overhead,
                local = node.underlay(self.outer),
                v4 = node.overlay(V4),
                v6 = node.overlay(V6),
            );
            for peer in self.nodes.iter().filter(|peer| peer.number != node.number && peer.kind != Kind::Stranger) {
                let (mac, dst) = (peer.mac(), peer.underlay(self.outer));
                writeln!(script, "bridge fdb add {mac} dev vxlan0 dst {dst} self permanent").unwrap();
                for family in [V4, V6] {
                    writeln!(
                        script,
                        "ip neigh add {via} lladdr {mac} dev vxlan0 nud permanent
                         ip route add {subnet} via {via} dev vxlan0 onlink src {src}",
                        via = peer.overlay(family),
                        subnet = peer.subnet(family),
                        src = node.overlay(family),
                    )
                    .unwrap();
                }
            }
            node.ns.sh(&script);
        }
    }
}

const JOURNEYS: [&str; 2] = ["outbound", "inbound"];

/// What went in and was made came out, was dropped or was kept.
fn adds_up(journey: &Value) -> bool {
    let of = |what: &str| journey[what].as_u64().unwrap();
    of("in") + of("originated") == of("out") + of("dropped") + of("consumed")
}

/// One machine of the mesh. Number N has the underlay addresses 10.9.0.N and fd09::N, the subnets 10.42.N.0/24 and
/// fd42:0:0:N::/64, and the VTEP MAC 0a:58:0a:09:00:N.
pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) number: u8,
    kind: Kind,
    pub(crate) ns: Namespace,
    pod: Option<Namespace>,
    outer: Family,
    nodes_file: PathBuf,
    pub(crate) dir: PathBuf,
    settings: Mutex<BTreeMap<&'static str, String>>,
    token: Mutex<Option<String>>,
    daemon: Mutex<Option<Process>>,
    key: Option<SecretKey>,
}

impl Node {
    pub(crate) fn underlay(&self, family: Family) -> IpAddr {
        match family {
            V4 => Ipv4Addr::new(10, 9, 0, self.number).into(),
            V6 => Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, self.number.into()).into(),
        }
    }

    pub(crate) fn subnet(&self, family: Family) -> String {
        let network = self.host(0, family);
        if family == V4 { format!("{network}/24") } else { format!("{network}/64") }
    }

    /// An address of the subnet.
    pub(crate) fn host(&self, host: u8, family: Family) -> IpAddr {
        match family {
            V4 => Ipv4Addr::new(10, 42, self.number, host).into(),
            V6 => Ipv6Addr::new(0xfd42, 0, 0, self.number.into(), 0, 0, 0, host.into()).into(),
        }
    }

    /// The node's address in the overlay.
    pub(crate) fn overlay(&self, family: Family) -> IpAddr {
        self.host(if self.pod.is_some() { 0 } else { 1 }, family)
    }

    pub(crate) fn mac(&self) -> String {
        format!("0a:58:0a:09:00:{:02x}", self.number)
    }

    #[track_caller]
    pub(crate) fn pod(&self) -> &Namespace {
        self.pod.as_ref().expect("the mesh has pods")
    }

    pub(crate) fn pod_address(&self, family: Family) -> IpAddr {
        self.host(2, family)
    }

    /// Its entry in the node list.
    pub(crate) fn entry(&self) -> String {
        self.entry_at(&self.underlay(self.outer).to_string())
    }

    pub(crate) fn entry_at(&self, underlay: &str) -> String {
        let mut entry = format!(
            "  - name: {}\n    underlay: \"{underlay}\"\n    subnets: [{}, \"{}\"]\n    mac: \"{}\"\n",
            self.name,
            self.subnet(V4),
            self.subnet(V6),
            self.mac()
        );
        match (&self.key, self.kind) {
            (Some(_), Kind::Kernel) => entry += "    encryption: none\n",
            (Some(key), Kind::Meshd) => {
                writeln!(entry, "    public-key: {}\n    lane-keys: [{}]", key.public(), key.lane(1).public()).unwrap();
            }
            (Some(key), _) => writeln!(entry, "    public-key: {}", key.public()).unwrap(),
            (None, _) => {}
        }
        entry
    }

    /// The node's public key.
    pub(crate) fn public_key(&self) -> String {
        self.key.as_ref().expect("the mesh is encrypted").public().to_string()
    }

    /// The public key of its second lane.
    pub(crate) fn lane_key(&self) -> String {
        self.key.as_ref().expect("the mesh is encrypted").lane(1).public().to_string()
    }

    /// The interface of another WireGuard implementation. Its control socket lies in a directory that all namespaces
    /// share, so it has to be nobody else's name.
    pub(crate) fn wg(&self) -> String {
        // the namespace's name has the process and the number of the mesh in it
        let mesh = self.ns.name().split('-').nth(2).unwrap_or_default().to_owned();
        format!("w{}m{mesh}n{}", std::process::id() % 1_000_000, self.number)
    }

    /// Starts the other implementation and gives it its peers.
    pub(crate) fn start_wireguard(&self, program: &str, peers: &[&Node], underlay_mtu: u32) {
        let wg = self.wg();
        // a killed one's may outlive it by a moment
        until("the former interface is gone", || !self.ns.succeeds(&format!("ip link show dev {wg}")));
        let mut command = self.ns.command(program);
        match program {
            "boringtun-cli" => command.args(["--foreground", "--disable-drop-privileges", &wg]),
            _ => command.args(["--foreground", &wg]).env("WG_PROCESS_FOREGROUND", "1"),
        };
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let process = Process::spawn(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log));
        *self.daemon() = Some(process);
        until("the interface is there", || self.ns.succeeds(&format!("wg show {wg}")));
        let (overhead, key) = (if self.outer == V4 { 60 } else { 80 }, self.dir.join("data/node.key"));
        let mut script = format!(
            "wg set {wg} private-key {key} listen-port 8472
             ip addr add {v4}/32 dev {wg}
             ip addr add {v6}/128 dev {wg} nodad
             ip link set {wg} mtu {mtu} up\n",
            key = key.display(),
            v4 = self.overlay(V4),
            v6 = self.overlay(V6),
            mtu = underlay_mtu - overhead,
        );
        for peer in peers {
            let (s4, s6) = (peer.subnet(V4), peer.subnet(V6));
            let at = std::net::SocketAddr::new(peer.underlay(self.outer), 8472);
            writeln!(
                script,
                "wg set {wg} peer {} allowed-ips {s4},{s6} endpoint {at}
                 ip route add {s4} dev {wg} src {}
                 ip route add {s6} dev {wg} src {}",
                peer.public_key(),
                self.overlay(V4),
                self.overlay(V6)
            )
            .unwrap();
        }
        self.ns.sh(&script);
    }

    fn plug(&self, switch: &Namespace, mtu: u32, profile: char) {
        let Node { name, .. } = self;
        self.ns.sh(&format!(
            "ip link add ul0 mtu {mtu} type veth peer name p-{name} mtu {mtu} netns {}
             ip addr add {}/24 dev ul0
             ip addr add {}/64 dev ul0 nodad
             ip link set ul0 up
             ip route add default via 10.9.0.254
             ip route add default via fd09::fe",
            switch.name(),
            self.underlay(V4),
            self.underlay(V6),
        ));
        switch.sh(&format!("ip link set p-{name} master br0 up"));
        let tunnel = "tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off";
        let rest = match profile {
            'a' => return,
            'b' => "gro on",
            'c' => "tso off tx-udp-segmentation off gso off gro off",
            'd' => "tso off tx-udp-segmentation off gso on gro on",
            'e' => "tso off tx-udp-segmentation off gso on gro on tx off rx off",
            other => panic!("there is no profile {other}"),
        };
        self.ns.sh(&format!("ethtool -K ul0 {tunnel} {rest}"));
    }

    fn make_pod(&self) {
        let Some(pod) = &self.pod else { return };
        let (first4, first6) = (self.host(1, V4), self.host(1, V6));
        self.ns.sh(&format!(
            "ip link add cni0 type bridge forward_delay 0
             ip addr add {first4}/24 dev cni0
             ip addr add {first6}/64 dev cni0 nodad
             ip link set cni0 up
             ip link add pod0 type veth peer name eth0 netns {}
             ip link set pod0 master cni0 up",
            pod.name()
        ));
        pod.sh(&format!(
            "ip addr add {}/24 dev eth0
             ip addr add {}/64 dev eth0 nodad
             ip link set eth0 up
             ip route add default via {first4}
             ip route add default via {first6}",
            self.pod_address(V4),
            self.pod_address(V6)
        ));
    }

    /// Changes a key of the configuration file; `None` takes it out.
    pub(crate) fn set(&self, key: &'static str, value: Option<&str>) {
        let mut settings = self.settings.lock().unwrap();
        match value {
            Some(value) => settings.insert(key, value.to_owned()),
            None => settings.remove(key),
        };
        drop(settings);
        self.write_config();
    }

    fn write_config(&self) {
        let mut all = BTreeMap::from([
            ("node-name", self.name.to_owned()),
            ("node-ip", format!("\"{}\"", self.underlay(self.outer))),
            ("nodes-file", self.nodes_file.display().to_string()),
            ("data-dir", self.dir.join("data").display().to_string()),
            ("socket", self.socket().display().to_string()),
        ]);
        if matches!(self.kind, Kind::Joins(_)) {
            all.remove("nodes-file");
        }
        if self.pod.is_some() {
            all.insert("address", "network".to_owned());
        }
        all.extend(self.settings.lock().unwrap().clone());
        let text: String = all.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| format!("{k}: {v}\n")).collect();
        fs::write(self.config(), text).unwrap();
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join("config.yaml")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("meshd.sock")
    }

    /// `meshd` with these arguments and this node's configuration, in the node's namespace.
    pub(crate) fn meshd(&self, verb: &str) -> Command {
        self.write_config();
        let mut command = self.ns.command(MESHD);
        command.args([verb, "--config"]).arg(self.config());
        command
    }

    /// Starts meshd without waiting for it; one that still runs is killed before.
    pub(crate) fn spawn(&self) {
        drop(self.daemon().take());
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let verb = if let Kind::Joins(verb) = self.kind { verb } else { "run" };
        let mut command = self.meshd(verb);
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("MESHD_")) {
            command.env_remove(key);
        }
        command.envs(self.token.lock().unwrap().iter().map(|token| ("MESHD_TOKEN", token)));
        *self.daemon() = Some(Process::spawn(command.stdout(Stdio::null()).stderr(log)));
    }

    /// The token that it is started with from now on, in the environment.
    pub(crate) fn token(&self, token: Option<&str>) {
        *self.token.lock().unwrap() = token.map(str::to_owned);
    }

    /// Its overlay address as meshd has it: the servers' gift.
    #[track_caller]
    pub(crate) fn given(&self) -> IpAddr {
        let status = self.json(&["status"]);
        let address = status["overlay_addresses"][0].as_str().unwrap_or_else(|| panic!("{}: {status:#}", self.name));
        address.parse().unwrap()
    }

    /// The process id of its sidecar, whose parent is the launcher.
    #[track_caller]
    pub(crate) fn sidecar(&self) -> Option<u32> {
        child(self.launcher()?, "mesh-sidecar")
    }

    /// The process id of what starts its sidecar.
    #[track_caller]
    pub(crate) fn launcher(&self) -> Option<u32> {
        child(self.pid(), "mesh-launcher")
    }

    /// The same with another command before it, such as `unshare … --`.
    pub(crate) fn spawn_under(&self, front: &[&str], environment: &[(&str, &str)]) {
        drop(self.daemon().take());
        self.write_config();
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        let verb = if let Kind::Joins(verb) = self.kind { verb } else { "run" };
        let mut command = self.ns.command(front[0]);
        command.args(&front[1..]).arg(MESHD).args([verb, "--config"]).arg(self.config());
        command.envs(self.token.lock().unwrap().iter().map(|token| ("MESHD_TOKEN", token)));
        command.envs(environment.iter().copied()).stdout(Stdio::null()).stderr(log);
        *self.daemon() = Some(Process::spawn(&mut command));
    }

    /// CPU time that meshd has used, in milliseconds.
    pub(crate) fn cpu_ms(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        ticks * 10 // USER_HZ is 100
    }

    /// Waits until meshd says that it is ready.
    #[track_caller]
    pub(crate) fn ready(&self) {
        let wait = self.ctl(&["status", "--wait", "20s"]);
        assert_eq!(wait.code, 0, "{}: {wait:?}\n{}", self.name, self.log());
    }

    #[track_caller]
    pub(crate) fn restart(&self) {
        self.spawn();
        self.ready();
    }

    /// Runs a `meshd` that is expected to end by itself.
    #[track_caller]
    pub(crate) fn try_meshd(&self, verb: &str) -> Run {
        Run::of(self.meshd(verb))
    }

    /// Sends SIGTERM, and returns the exit code.
    #[track_caller]
    pub(crate) fn stop(&self) -> i32 {
        let mut daemon = self.daemon().take().expect("it runs");
        daemon.signal(Signal::SIGTERM);
        daemon.wait()
    }

    #[track_caller]
    pub(crate) fn kill(&self) {
        self.signal(Signal::SIGKILL);
        self.daemon().take().expect("it runs").wait();
    }

    #[track_caller]
    pub(crate) fn signal(&self, signal: Signal) {
        self.daemon().as_ref().expect("it runs").signal(signal);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.daemon().as_ref().expect("it runs").id()
    }

    fn daemon(&self) -> MutexGuard<'_, Option<Process>> {
        self.daemon.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub(crate) fn ctl(&self, args: &[&str]) -> Run {
        let mut command = Command::new(MESHCTL);
        command.arg("--socket").arg(self.socket()).args(args);
        Run::of(command)
    }

    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let answer = self.ctl(&[args, &["--json"]].concat());
        serde_json::from_str(&answer.out).unwrap_or_else(|e| panic!("{}: {args:?}: {e}: {answer:?}", self.name))
    }

    #[track_caller]
    pub(crate) fn stats(&self) -> Value {
        self.json(&["stats"])
    }

    #[track_caller]
    pub(crate) fn drops(&self, reason: &str) -> u64 {
        self.stats()["drops"][reason].as_u64().unwrap_or_else(|| panic!("there is no drop counter {reason}"))
    }

    /// The reasons why it is not ready, one a line.
    #[track_caller]
    pub(crate) fn reasons(&self) -> String {
        let status = self.json(&["status"]);
        status["reasons"].as_array().unwrap().iter().map(|r| r.as_str().unwrap().to_owned() + "\n").collect()
    }

    /// Everything in the namespace that meshd might change, without what changes by itself.
    pub(crate) fn host_state(&self) -> String {
        self.ns.sh("ip -o link show | sed 's/ state [A-Z]*//'; ip -o addr show | sed 's/ valid_lft.*//'; \
             ip route show table all; ip -6 route show table all | sed 's/ expires [0-9]*sec//'; \
             ss -Hlnuapt | sed 's/ *users:.*//' | awk '{ $3 = $4 = \"\"; print }' | sort")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() && matches!(self.kind, Kind::Meshd | Kind::Joins(_)) {
            eprintln!("--- stats and log of meshd on {}\n{}{}", self.name, self.ctl(&["stats"]).out, self.log());
        }
        self.daemon().take();
    }
}

/// What a command that ended did.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    #[track_caller]
    pub(crate) fn of(mut command: Command) -> Self {
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("MESHD_") {
                command.env_remove(key);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // a command that does not end is ended from outside, so that the test fails instead of hanging
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        let (done, told) = std::sync::mpsc::channel::<()>();
        let guard = std::thread::spawn(move || {
            if told.recv_timeout(2 * crate::namespace::PATIENCE).is_err_and(|e| e.to_string().contains("timed out")) {
                nix::sys::signal::kill(pid, Signal::SIGKILL).ok();
            }
        });
        let output = child.wait_with_output().unwrap();
        drop(done);
        guard.join().unwrap();
        Run {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The child of that name.
fn child(pid: u32, name: &str) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let is_it = |pid: &&str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
    children.split_whitespace().find(is_it).and_then(|pid| pid.parse().ok())
}

/// Says why a story was not told. Not by `eprintln!`, which the test harness keeps to itself.
pub(crate) fn skipped(story: &str, reason: &str) {
    writeln!(std::io::stderr(), "SKIPPED {story}: {reason}").ok();
}

fn why_not() -> Option<String> {
    if fs::metadata("/proc/self").is_ok_and(|m| m.uid() != 0) {
        return Some("needs root".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("there is no /dev/net/tun".to_owned());
    }
    let tools = ["ip", "bridge", "ss", "ping", "ethtool", "setpriv"];
    if let Some(tool) = tools.into_iter().find(|tool| !has(tool)) {
        return Some(format!("`{tool}` is not installed"));
    }
    static MAY: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    let may = MAY.get_or_init(|| {
        let name = format!("meshd-{}-try", std::process::id());
        let ip = |verb: &str| Command::new("ip").args(["netns", verb, &name]).stderr(Stdio::null()).status();
        ip("add").is_ok_and(|status| status.success()) && ip("del").is_ok_and(|status| status.success())
    });
    (!may).then(|| "network namespaces cannot be made here".to_owned())
}

/// Whether a tool is installed.
pub(crate) fn has(tool: &str) -> bool {
    Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().is_ok_and(|o| o.status.success())
}

/// Whether this kernel has VXLAN devices.
pub(crate) fn has_kernel_vxlan() -> bool {
    let ns = Namespace::new(
        format!("meshd-{}-vx-{:?}", std::process::id(), std::thread::current().id()).replace(['(', ')'], ""),
    );
    ns.succeeds("ip link add vx type vxlan id 1 dstport 8472")
}

/// A second look at a file that a command writes.
pub(crate) fn tshark(file: &Path, fields: &[&str]) -> Vec<Vec<String>> {
    let mut command = Command::new("tshark");
    command.arg("-r").arg(file).args(["-T", "fields", "-E", "occurrence=a", "-o", "udp.check_checksum:TRUE"]);
    command.args(["-o", "tcp.check_checksum:TRUE"]);
    command.args(["-d", "udp.port==8472,vxlan"]);
    for field in fields {
        command.args(["-e", field]);
    }
    run(&mut command).lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

pub(crate) const MESHD: &str = env!("CARGO_BIN_EXE_meshd");
pub(crate) const MESHCTL: &str = env!("CARGO_BIN_EXE_meshctl");
