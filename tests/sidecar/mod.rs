//! The sidecar as a process, with the test in `meshd`'s place at the other end of its link.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use meshd::membership::link::{FromMeshd, FromSidecar, Hello, Request, Status};
use meshd::membership::record::{Mode, NodeRecord};
use meshd::membership::settings::Settings;
use serde_json::Value;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A sidecar, and `meshd`'s end of its link.
pub(crate) struct Sidecar {
    pub(crate) child: Child,
    pub(crate) write: UnixStream,
    pub(crate) read: BufReader<UnixStream>,
    pub(crate) asked: u64,
    pub(crate) status: Status,
    pub(crate) nodes: Vec<NodeRecord>,
}

impl Sidecar {
    pub(crate) fn start(settings: &Settings, name: &str, underlay: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child =
            Command::new(env!("CARGO_BIN_EXE_mesh-sidecar")).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut sidecar = Sidecar {
            child,
            write: ours.try_clone().unwrap(),
            read: BufReader::new(ours),
            asked: 0,
            status: Status::default(),
            nodes: vec![],
        };
        sidecar.say(settings);
        sidecar.say(&FromMeshd::Hello(Hello {
            name: name.to_owned(),
            underlay: vec![underlay.parse().unwrap()],
            public_keys: vec![],
            encryption: Mode::None,
        }));
        sidecar
    }

    pub(crate) fn say(&mut self, message: &impl serde::Serialize) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        self.write.write_all(&line).unwrap();
    }

    pub(crate) fn hear(&mut self) -> FromSidecar {
        let mut line = String::new();
        assert!(self.read.read_line(&mut line).unwrap() > 0, "the sidecar has ended");
        let message: FromSidecar = serde_json::from_str(&line).unwrap();
        match &message {
            FromSidecar::Status(status) => self.status = status.clone(),
            FromSidecar::List { nodes, .. } => self.nodes = nodes.clone(),
            FromSidecar::Delta { upsert, remove, .. } => {
                self.nodes.retain(|n| !remove.contains(&n.id) && !upsert.iter().any(|u| u.id == n.id));
                self.nodes.extend(upsert.iter().cloned());
            }
            _ => {}
        }
        message
    }

    pub(crate) fn until(&mut self, what: &str, good: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !good(self) {
            assert!(start.elapsed() < PATIENCE, "{what}: {:?}", self.status);
            self.hear();
        }
    }

    pub(crate) fn ask(&mut self, request: Request) -> Result<Value, String> {
        self.asked += 1;
        let id = self.asked;
        self.say(&FromMeshd::Request { id, request });
        loop {
            if let FromSidecar::Answer { id: of, result } = self.hear()
                && of == id
            {
                return result.map_err(|refusal| refusal.message);
            }
        }
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
