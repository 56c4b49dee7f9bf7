//! Real etcds on loopback.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use meshd::membership::clock::Now;
use meshd::membership::store::etcd::{Access, Etcd, Gateway, PREFIX};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;

pub(crate) struct Etcds {
    members: Vec<Member>,
    dir: TempDir,
    tls: Option<Tls>,
    /// Who `etcdctl` logs in as.
    pub(crate) root: Option<&'static str>,
}

/// What both sides of TLS have, PEM.
pub(crate) struct Tls {
    authority: Issuer<'static, KeyPair>,
    pub(crate) ca: String,
}

impl Tls {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap().pem();
        Tls { authority: Issuer::new(params, key), ca }
    }

    /// A certificate for either side, made so many days ago and good for a year, and its key.
    pub(crate) fn leaf(&self, since_days: i64, common_name: Option<&str>) -> (String, String) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let day = |days: i64| Now { unix: Now::read().unix + days * 86_400, ..Now::read() }.date();
        (params.not_before, params.not_after) = (day(-since_days - 1), day(365 - since_days));
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.authority).unwrap().pem(), key.serialize_pem())
    }
}

struct Member {
    client: u16,
    peer: u16,
    child: Option<Child>,
}

impl Etcds {
    /// That many, of one cluster. `None` where there is no etcd; then it says so.
    pub(crate) async fn start(story: &str, count: usize) -> Option<Self> {
        Self::begin(story, count, None).await
    }

    /// One that speaks TLS, and wants a certificate of its clients.
    pub(crate) async fn secured(story: &str) -> Option<Self> {
        Self::begin(story, 1, Some(Tls::new())).await
    }

    async fn begin(story: &str, count: usize, tls: Option<Tls>) -> Option<Self> {
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err() {
            println!("SKIPPED {story}: there is no `etcd` (Debian: etcd-server)");
            return None;
        }
        let ports: Vec<TcpListener> = (0..2 * count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let port = |n: usize| ports[n].local_addr().unwrap().port();
        let members = (0..count).map(|n| Member { client: port(2 * n), peer: port(2 * n + 1), child: None }).collect();
        drop(ports);
        let mut etcds = Etcds { members, dir: TempDir::new().unwrap(), tls, root: None };
        if let Some(tls) = &etcds.tls {
            std::fs::write(etcds.file("ca"), &tls.ca).unwrap();
            etcds.certify(0);
        }
        for n in 0..count {
            etcds.restart(n);
        }
        etcds.healthy().await;
        Some(etcds)
    }

    pub(crate) fn tls(&self) -> &Tls {
        self.tls.as_ref().expect("it speaks TLS")
    }

    pub(crate) fn port(&self) -> u16 {
        self.members[0].client
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Gives it another certificate, made so many days ago.
    pub(crate) fn certify(&self, since_days: i64) {
        let (certificate, key) = self.tls().leaf(since_days, None);
        std::fs::write(self.file("key"), key.clone() + &certificate).unwrap();
    }

    pub(crate) fn restart(&mut self, n: usize) {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut secured = Vec::new();
        if self.tls.is_some() {
            for (flag, file) in [("--cert-file", "key"), ("--key-file", "key"), ("--trusted-ca-file", "ca")] {
                secured.extend([flag.to_owned(), self.file(file).display().to_string()]);
            }
            secured.push("--client-cert-auth".to_owned());
        }
        let cluster: Vec<_> = self.members.iter().enumerate().map(|(n, m)| format!("m{n}={}", url(m.peer))).collect();
        let member = &mut self.members[n];
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let child = Command::new("etcd")
            .args(["--name", &format!("m{n}"), "--data-dir"])
            .arg(self.dir.path().join(format!("m{n}")))
            .args(["--listen-client-urls", &format!("{scheme}://127.0.0.1:{}", member.client)])
            .args(["--advertise-client-urls", &format!("{scheme}://127.0.0.1:{}", member.client)])
            .args(secured)
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

    /// The revision, and how many proposals its log holds.
    #[allow(dead_code)] // of interest to `membership_scale` alone
    pub(crate) fn progress(&self) -> (u64, u64) {
        let out = self.etcdctl(&self.members[0], "endpoint status").args(["-w", "json"]).output().unwrap();
        let all: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let status = &all[0]["Status"];
        (status["header"]["revision"].as_u64().unwrap(), status["raftIndex"].as_u64().unwrap())
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

    #[track_caller]
    pub(crate) fn ctl(&self, line: &str) {
        let out = self.etcdctl(&self.members[0], line).output().unwrap();
        assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn try_ctl(&self, n: usize, line: &str) -> bool {
        self.etcdctl(&self.members[n], line).stderr(Stdio::null()).output().unwrap().status.success()
    }

    fn etcdctl(&self, member: &Member, line: &str) -> Command {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3");
        if self.tls.is_none() {
            command.args(["--endpoints", &format!("127.0.0.1:{}", member.client)]);
        }
        if self.tls.is_some() {
            command.args(["--endpoints", &format!("https://127.0.0.1:{}", member.client)]);
            for (flag, file) in [("--cacert", "ca"), ("--cert", "client"), ("--key", "client")] {
                command.arg(flag).arg(self.file(file));
            }
            let (certificate, key) = self.tls().leaf(0, None);
            std::fs::write(self.file("client"), key + &certificate).unwrap();
        }
        command.args(self.root.iter().flat_map(|root| ["--user", root]));
        command.args(["--command-timeout", "5s"]).args(line.split(' '));
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
