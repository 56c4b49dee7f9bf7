//! Real etcds on loopback.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use meshd::membership::store::etcd::{Access, Etcd, Gateway, PREFIX};
use tempfile::TempDir;

pub(crate) struct Etcds {
    members: Vec<Member>,
    dir: TempDir,
}

struct Member {
    client: u16,
    peer: u16,
    child: Option<Child>,
}

impl Etcds {
    /// That many, of one cluster. `None` where there is no etcd; then it says so.
    pub(crate) async fn start(story: &str, count: usize) -> Option<Self> {
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err() {
            println!("SKIPPED {story}: there is no `etcd` (Debian: etcd-server)");
            return None;
        }
        let ports: Vec<TcpListener> = (0..2 * count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let port = |n: usize| ports[n].local_addr().unwrap().port();
        let members = (0..count).map(|n| Member { client: port(2 * n), peer: port(2 * n + 1), child: None }).collect();
        drop(ports);
        let mut etcds = Etcds { members, dir: TempDir::new().unwrap() };
        for n in 0..count {
            etcds.restart(n);
        }
        etcds.healthy().await;
        Some(etcds)
    }

    pub(crate) fn restart(&mut self, n: usize) {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let cluster: Vec<_> = self.members.iter().enumerate().map(|(n, m)| format!("m{n}={}", url(m.peer))).collect();
        let member = &mut self.members[n];
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let child = Command::new("etcd")
            .args(["--name", &format!("m{n}"), "--data-dir"])
            .arg(self.dir.path().join(format!("m{n}")))
            .args(["--listen-client-urls", &url(member.client), "--advertise-client-urls", &url(member.client)])
            .args(["--listen-peer-urls", &url(member.peer), "--initial-advertise-peer-urls", &url(member.peer)])
            .args(["--initial-cluster", &cluster.join(","), "--logger", "zap"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        member.child = Some(child);
    }

    pub(crate) fn kill(&mut self, n: usize) {
        if let Some(mut child) = self.members[n].child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) async fn healthy(&self) {
        for _ in 0..300 {
            if (0..self.members.len()).all(|n| self.try_ctl(n, "endpoint health")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("etcd does not start: {}", std::fs::read_to_string(self.dir.path().join("log")).unwrap());
    }

    pub(crate) async fn leader(&self) -> usize {
        for _ in 0..100 {
            for (n, member) in self.members.iter().enumerate() {
                let out = self.etcdctl(member, "endpoint status").args(["-w", "simple"]).output().unwrap();
                if String::from_utf8_lossy(&out.stdout).split(", ").nth(4) == Some("true") {
                    return n;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("no leader");
    }

    pub(crate) fn access(&self) -> Access {
        let endpoints = self.members.iter().map(|m| ("127.0.0.1".to_owned(), m.client)).collect();
        Access { endpoints, ..Access::default() }
    }

    pub(crate) async fn store(&self) -> Etcd {
        Etcd::open(Gateway::new(self.access()), PREFIX).await.unwrap()
    }

    pub(crate) fn ctl(&self, line: &str) {
        assert!(self.try_ctl(0, line), "{line}");
    }

    fn try_ctl(&self, n: usize, line: &str) -> bool {
        self.etcdctl(&self.members[n], line).stderr(Stdio::null()).output().unwrap().status.success()
    }

    fn etcdctl(&self, member: &Member, line: &str) -> Command {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &format!("127.0.0.1:{}", member.client)]);
        command.args(["--command-timeout", "2s"]).args(line.split(' '));
        command
    }
}

impl Drop for Etcds {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(child) = &mut member.child {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
