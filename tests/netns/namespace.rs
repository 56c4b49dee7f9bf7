//! Network namespaces: made, entered, and removed again whatever happens.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A namespace of the test's own. Dropping it removes it, and every device in it.
pub(crate) struct Namespace(String);

impl Namespace {
    /// Makes it, with `lo` up, forwarding as a node has it, and none of the host's defaults that would surprise.
    pub(crate) fn new(name: String) -> Self {
        run(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Namespace(name);
        namespace.enter(|| {
            for (key, value) in [
                ("ipv4/ip_forward", "1"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                ("ipv4/conf/all/send_redirects", "0"),
                ("ipv4/conf/default/send_redirects", "0"),
                ("ipv4/tcp_congestion_control", "cubic"),
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv6/conf/all/accept_ra", "0"),
                ("ipv6/conf/default/accept_ra", "0"),
                ("ipv6/conf/all/forwarding", "1"),
                ("ipv6/conf/default/forwarding", "1"),
            ] {
                std::fs::write(format!("/proc/sys/net/{key}"), value).ok();
            }
        });
        namespace.sh("ip link set lo up");
        namespace
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.0)
    }

    /// Runs `body` in a thread that is in the namespace. Sockets that it returns stay there.
    #[track_caller]
    pub(crate) fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            let file = File::open(self.path()).unwrap();
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            body()
        };
        match std::thread::scope(|scope| scope.spawn(inside).join()) {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// What a shell command prints; it must succeed.
    #[track_caller]
    pub(crate) fn sh(&self, command: &str) -> String {
        let output = self.output(command);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "in {}: {command}\n{text}{errors}", self.0);
        text
    }

    pub(crate) fn succeeds(&self, command: &str) -> bool {
        self.output(command).status.success()
    }

    pub(crate) fn output(&self, command: &str) -> Output {
        self.enter(|| Command::new("sh").args(["-ec", command]).stdin(Stdio::null()).output().unwrap())
    }

    /// A command that runs inside until it is dropped, and not longer than this test's thread.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, "setpriv", "--pdeathsig", "KILL", "--", program]);
        command.stdin(Stdio::null());
        command
    }

    /// A UDP socket inside, with an end to its patience.
    #[track_caller]
    pub(crate) fn udp(&self, address: IpAddr, port: u16) -> UdpSocket {
        let socket = self.enter(|| UdpSocket::bind(SocketAddr::new(address, port))).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Command::new("ip").args(["netns", "del", &self.0]).stderr(Stdio::null()).status().ok();
    }
}

/// A process of ours: ended when dropped.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn spawn(command: &mut Command) -> Self {
        Process(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.id() as i32), signal).unwrap();
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended, and with which code; -1 where a signal ended it.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        self.0.try_wait().unwrap().map(|status| status.code().unwrap_or(-1))
    }

    #[track_caller]
    pub(crate) fn wait(&mut self) -> i32 {
        let mut code = None;
        until("the process ends", || {
            code = self.ended();
            code.is_some()
        });
        code.unwrap_or(-1)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|status| status.is_none()) {
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }
}

/// How long anything may take before the test gives up: far more than it does take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until it is so, and says how long that took.
#[track_caller]
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    start.elapsed()
}

#[track_caller]
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
