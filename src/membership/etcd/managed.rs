//! The life of this server's etcd member, from nothing to a store that can be opened; each step survives a crash.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::CLIENT_PORT;
use super::join::{self, Joiner};
use super::kept::{Kept, KeptError, Member, Phase};
use super::members::Members;
use super::outlook::Outlook;
use super::process::{self, Process};
use crate::membership::agent::AgentError;
use crate::membership::agent::keep::{Keep, KeepError};
use crate::membership::authority::{self, Authority, AuthorityError};
use crate::membership::client::ClientError;
use crate::membership::clock::Now;
use crate::membership::files::{self, FileError};
use crate::membership::link::Hello;
use crate::membership::random;
use crate::membership::registry::{Refused, Registry};
use crate::membership::settings::Settings;
use crate::membership::store::etcd::{Access, Etcd, Gateway, PREFIX};
use crate::membership::store::sqlite::Sqlite;
use crate::membership::store::{Store, StoreError};
use crate::membership::token::Credential;

/// A member that does not become a full one within so long asks anew.
const CATCH_UP: Duration = Duration::from_secs(120);
/// Its own etcd is waited for so long before the reason is looked for.
const ANSWER: Duration = Duration::from_secs(10);
/// The others are looked at this often.
const LOOK: Duration = Duration::from_secs(2);
/// Who leaves waits so long for the others to let it go.
const PARTING: Duration = Duration::from_secs(20);

/// Why there is no etcd.
#[derive(Debug, thiserror::Error)]
pub enum ManagedError {
    /// Its files.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// The node's.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// Others.
    #[error(transparent)]
    File(#[from] FileError),
    /// What it was told to join.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The other servers.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No program.
    #[error(
        "`cluster-init` and further servers need etcd 3.4 or later on this machine, and there is none: install it (Debian: \
         apt-get install etcd-server), without starting its service"
    )]
    NoProgram,
    /// It does not run.
    #[error("{0}")]
    Down(String),
    /// It has something else already.
    #[error(
        "`server` (or a `mesh1…` token) joins this server to a cluster, but {} holds a cluster of its own: move that file away to \
         join, or remove `server`",
        .0.display()
    )]
    OwnCluster(PathBuf),
    /// Where it is.
    #[error("this node says no underlay address that its etcd could have; set `node-ip`")]
    NoAddress,
    /// Others run on.
    #[error(
        "other servers of this cluster still answer: {}. They would go on with what they have, and not know of this one. Stop meshd on \
         them first; they join this server again when they are started after it. `--force` goes on nevertheless: for a server \
         that can never be stopped, and that nobody will reach again",
        .0.join(", ")
    )]
    OthersAnswer(Vec<String>),
    /// It was a member.
    #[error("{0}")]
    Expelled(String),
    /// The others removed this member, so it joins anew.
    #[error("this server's etcd member was removed by the others; it joins them again")]
    Removed,
}

impl ManagedError {
    /// Whether it is only not this server's turn.
    pub fn is_later(&self) -> bool {
        matches!(self, ManagedError::Client(error) if error.code() == Some("later"))
    }

    /// Whether it may pass by itself.
    pub fn may_pass(&self) -> bool {
        match self {
            ManagedError::File(_) | ManagedError::Down(_) | ManagedError::NoProgram | ManagedError::NoAddress => true,
            ManagedError::Kept(KeptError::File(_)) | ManagedError::Client(_) => true,
            ManagedError::Store(error) => !matches!(error, StoreError::Corrupt { .. } | StoreError::Newer { .. }),
            _ => false,
        }
    }
}

/// This server's member.
pub struct Managed {
    kept: Kept,
    database: PathBuf,
    member: Option<Member>,
    process: Option<Process>,
    gateway: Option<Gateway>,
    progress: watch::Sender<Option<String>>,
}

impl Managed {
    /// Where this server's state is in an etcd of its own, or is to be.
    pub fn find(settings: &Settings, database: &str) -> Result<Option<Self>, ManagedError> {
        let kept = Kept::new(&settings.data_dir);
        let member = kept.member()?;
        let token = settings.token.as_ref().and_then(|token| Credential::parse(token.reveal()).ok());
        let joins = !settings.servers.is_empty() || matches!(token, Some(Credential::Token(_)));
        let database = settings.data_dir.join(database);
        let elsewhere = settings.datastore.endpoint.as_ref().is_some_and(|endpoint| !endpoint.reveal().is_empty());
        if member.is_none() && (elsewhere || !(settings.cluster_init || joins)) {
            return Ok(None);
        }
        if member.is_none() && joins && database.exists() {
            return Err(ManagedError::OwnCluster(database));
        }
        Ok(Some(Managed { kept, database, member, process: None, gateway: None, progress: watch::Sender::new(None) }))
    }

    /// Whether this server came to others, whose cluster it is.
    pub fn joined(&self) -> bool {
        self.member.as_ref().is_some_and(|member| member.joined)
    }

    /// Whether it has been a full member, with a store that other servers share.
    pub fn is_member(&self) -> bool {
        self.member.as_ref().is_some_and(|member| member.phase == Phase::Member)
    }

    /// What a server that joins others waits for, for people.
    pub fn progress(&self) -> watch::Receiver<Option<String>> {
        self.progress.subscribe()
    }

    fn tell(&self, progress: &str) {
        self.progress.send_replace(Some(progress.to_owned()));
    }

    /// For who wants to know why the store does not answer, while it is being opened.
    pub fn outlook(&self) -> Option<Outlook> {
        Some(Outlook::new(self.kept.clone(), self.member.clone()?))
    }

    /// The cluster that it joined.
    pub fn cluster(&self, settings: &Settings) -> Result<Option<String>, ManagedError> {
        Ok(Keep::open(&settings.data_dir)?.membership()?.map(|member| member.cluster))
    }

    /// The store, once there is one. To be called again where that fails.
    pub async fn store(&mut self, settings: &Settings, hello: &Hello) -> Result<(Etcd, Arc<Members>), ManagedError> {
        let address = hello.underlay.first().map(|address| address.ip()).ok_or(ManagedError::NoAddress)?;
        let program = process::find().ok_or(ManagedError::NoProgram)?;
        let member = match self.member.clone() {
            Some(member) if member.address != address => self.moved(member, address).await?,
            Some(member) => member,
            None => self.begin(settings, address)?,
        };
        let member = match member.phase {
            Phase::Filling => self.fill(program, member).await?,
            Phase::Joining => self.join(program, member, settings, hello).await?,
            Phase::Resetting => self.reset(program, member).await?,
            Phase::Member => self.resume(program, member, settings, hello).await?,
        };
        let store = match self.open(&member).await {
            Err(ManagedError::Removed) => {
                self.forget().await?;
                return Err(ManagedError::Removed);
            }
            other => other?,
        };
        let authority = self.kept.authority()?.ok_or(ManagedError::Authority(AuthorityError::Damaged))?;
        let members = Members::new(store.clone(), authority, member.token.clone());
        if let Err(error) = members.readdress(&member.name, &member.peer_url()).await {
            tracing::warn!("{error}");
        }
        self.gateway = Some(store.gateway().clone());
        Ok((store, Arc::new(members)))
    }

    /// Looks after it: members whose server is gone, certificates, this server's address. Ends with what ends this member.
    pub async fn maintain(
        &mut self,
        registry: &Registry,
        members: &Members,
        hello: &watch::Receiver<Hello>,
    ) -> ManagedError {
        let mut last = String::new();
        let mut seen = None;
        loop {
            tokio::time::sleep(LOOK).await;
            // seen twice: an interface may be without its first address for a moment
            let address = hello.borrow().underlay.first().map(|address| address.ip());
            let before = std::mem::replace(&mut seen, address);
            let moved = address.filter(|_| before == address).zip(self.member.clone());
            if let Some((address, member)) = moved.filter(|(address, member)| *address != member.address)
                && let Err(error) = self.restart_at(member, address).await
            {
                return error;
            }
            let Some((member, process)) = self.member.as_ref().zip(self.process.as_ref()) else {
                return ManagedError::Removed;
            };
            if process.fare().removed {
                return ManagedError::Removed;
            }
            self.renew(member);
            // Whoever was removed may have joined again: only what the store says now is good enough for that.
            let sure = registry.catch().await.is_ok();
            let gone =
                |name: &str| sure && matches!(registry.member(name), Err(Refused::Removed(_) | Refused::Purged(_)));
            let looked = match self.kept.client() {
                Ok(tls) => members.look(tls, member, gone).await.map_err(ManagedError::from),
                Err(error) => Err(error.into()),
            };
            // Whom to ask when this server comes back, and the others have gone on without it.
            let peers = members.peers();
            if looked.is_ok() && !peers.is_empty() && peers != member.cluster {
                let known = Member { cluster: peers, ..member.clone() };
                if let Err(error) = self.keep(&known) {
                    tracing::warn!("{error}");
                }
            }
            let error = looked.err().map(|error| error.to_string()).unwrap_or_default();
            if error != last && !error.is_empty() {
                tracing::warn!("{error}");
            }
            last = error;
        }
    }

    /// This server is no member of the cluster any more: its etcd stays until the others have let it go, or it is alone.
    pub async fn part(&mut self, members: &Members) -> Result<bool, ManagedError> {
        if members.view().iter().filter(|member| !member.learner).count() <= 1 {
            return Ok(false);
        }
        let start = Instant::now();
        while self.process.as_ref().is_some_and(|process| !process.fare().removed) && start.elapsed() < PARTING {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        self.forget().await?;
        Ok(true)
    }

    /// Ends the process, and puts the data aside.
    pub async fn forget(&mut self) -> Result<(), ManagedError> {
        if let Some(process) = self.process.take() {
            process.stop().await;
        }
        self.kept.forget()?;
        self.member = self.kept.member()?;
        Ok(())
    }

    /// This server has another address now. Other members reach this one there as soon as it has told them, which it can,
    /// since it reaches them.
    async fn moved(&mut self, mut member: Member, address: IpAddr) -> Result<Member, ManagedError> {
        tracing::info!("the etcd member moves from {} to {address}", member.address);
        if let Some(process) = self.process.take() {
            process.stop().await;
        }
        member.address = address;
        let url = member.peer_url();
        for (name, known) in &mut member.cluster {
            if *name == member.name {
                known.clone_from(&url);
            }
        }
        self.keep(&member)?;
        Ok(member)
    }

    async fn restart_at(&mut self, member: Member, address: IpAddr) -> Result<(), ManagedError> {
        let program = process::find().ok_or(ManagedError::NoProgram)?;
        let member = self.moved(member, address).await?;
        self.run(program, &member)?;
        if let Some(gateway) = &self.gateway {
            // the others are added by the next look at the members
            gateway.set_endpoints(vec![(address.to_string(), CLIENT_PORT)]);
        }
        Ok(())
    }

    fn begin(&mut self, settings: &Settings, address: IpAddr) -> Result<Member, ManagedError> {
        let token = settings.token.as_ref().and_then(|token| Credential::parse(token.reveal()).ok());
        let keep = Keep::open(&settings.data_dir)?;
        let was_member = keep.membership()?.is_some() && !self.database.exists();
        let joins = !settings.servers.is_empty() || matches!(token, Some(Credential::Token(_)));
        let mut member = Member {
            phase: if joins || was_member { Phase::Joining } else { Phase::Filling },
            name: keep.identity()?,
            address,
            token: random::id(),
            cluster: vec![],
            joined: joins || was_member,
        };
        if member.phase == Phase::Filling {
            member.cluster = vec![(member.name.clone(), member.peer_url())];
            if self.kept.authority()?.is_none() {
                let (_, ca) = Authority::generate("datastore", Now::read().date())?;
                self.kept.write_authority(&ca)?;
            }
        }
        self.keep(&member)?;
        Ok(member)
    }

    /// The first member: a backup or the SQLite database of a single server, if there is one, becomes its content.
    async fn fill(&mut self, program: PathBuf, mut member: Member) -> Result<Member, ManagedError> {
        if self.process.is_none() {
            self.kept.put_aside()?;
        }
        self.run(program, &member)?;
        let gateway = self.connect(&member).await?;
        let from = match self.kept.backup()? {
            Some(backup) => Some(backup),
            None if self.database.exists() => {
                let sqlite = Sqlite::open(&self.database).await?;
                let all = sqlite.range("").await?;
                sqlite.close().await;
                Some(all)
            }
            None => None,
        };
        if let Some(from) = from {
            tracing::info!(keys = from.items.len(), "the state of before goes into etcd");
            if let Err(error) = Etcd::import(&gateway, PREFIX, &from).await {
                // Half of it may be there: from the beginning.
                if let Some(process) = self.process.take() {
                    process.stop().await;
                }
                return Err(error.into());
            }
        }
        member.phase = Phase::Member;
        self.keep(&member)?;
        self.kept.drop_backup()?;
        if self.database.exists() {
            let aside = self.database.with_extension("db.before-etcd");
            files::rename(&self.database, &aside)?;
            tracing::info!("{} was the state until now, and is not used any more", aside.display());
        }
        Ok(member)
    }

    async fn join(
        &mut self,
        program: PathBuf,
        mut member: Member,
        settings: &Settings,
        hello: &Hello,
    ) -> Result<Member, ManagedError> {
        self.tell("this server's node joins the cluster");
        let joiner = Joiner::open(settings, hello, &member).await?;
        self.tell(
            "the other servers let this one's etcd in, one server at a time; etcd itself waits until five seconds after the last \
             one",
        );
        let answer = match joiner.ask(member.address).await {
            Err(ManagedError::Client(ClientError::Refused { code, message })) if code == "removed" => {
                self.forget().await?;
                join::forget(&settings.data_dir)?;
                return Err(ManagedError::Expelled(message));
            }
            other => other?,
        };
        // Each time it asks it is a new member, so what an earlier one had is of no use.
        if let Some(process) = self.process.take() {
            process.stop().await;
        }
        self.kept.put_aside()?;
        self.kept.write_authority(&answer.authority)?;
        (member.token, member.cluster, member.joined) = (answer.token, answer.members, true);
        self.keep(&member)?;
        self.run(program, &member)?;
        self.tell("this server's etcd fetches what the others have");
        let start = Instant::now();
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            match joiner.promoted().await {
                Ok(true) => break,
                Err(error) if !error.may_pass() => return Err(error),
                _ => {}
            }
            if start.elapsed() > CATCH_UP {
                let fare = self.process.as_ref().map(Process::fare).unwrap_or_default();
                let why = fare.problem.unwrap_or_else(|| "it has not caught up".to_owned());
                return Err(ManagedError::Down(format!("this server's etcd is no full member yet: {why}")));
            }
        }
        member.phase = Phase::Member;
        self.keep(&member)?;
        self.progress.send_replace(None);
        tracing::info!("this server's etcd is a full member");
        Ok(member)
    }

    /// After a loss of the quorum: the only member, with all that it has.
    async fn reset(&mut self, program: PathBuf, mut member: Member) -> Result<Member, ManagedError> {
        self.run(program.clone(), &member)?;
        self.connect(&member).await?;
        self.open(&member).await?;
        if let Some(process) = self.process.take() {
            process.stop().await;
        }
        member.phase = Phase::Member;
        member.cluster = vec![(member.name.clone(), member.peer_url())];
        self.keep(&member)?;
        tracing::warn!("this server's etcd is the only member now; the other servers join it again when they start");
        self.run(program, &member)?;
        Ok(member)
    }

    async fn resume(
        &mut self,
        program: PathBuf,
        member: Member,
        settings: &Settings,
        hello: &Hello,
    ) -> Result<Member, ManagedError> {
        if self.process.as_ref().is_some_and(|process| process.fare().removed) {
            self.forget().await?;
            return Err(ManagedError::Removed);
        }
        // While this one was away the others may have gone on without it, or have been restored.
        if self.process.is_none() && Keep::open(&settings.data_dir)?.membership()?.is_some() {
            let joiner = Joiner::open(settings, hello, &member).await?;
            if joiner.is_member(&member.name).await == Some(false) {
                self.forget().await?;
                return Err(ManagedError::Removed);
            }
        }
        self.run(program, &member)?;
        Ok(member)
    }

    /// Starts it, if it does not run.
    fn run(&mut self, program: PathBuf, member: &Member) -> Result<(), ManagedError> {
        if self.process.is_some() {
            self.renew(member);
        } else {
            self.certify(member)?;
            self.process = Some(Process::start(program, self.kept.clone(), member.clone()));
        }
        Ok(())
    }

    /// A new certificate in good time. etcd reads it for each handshake, so nothing is interrupted.
    fn renew(&self, member: &Member) {
        if self.kept.renew_at().is_none_or(|at| authority::is_due(at, Now::read().date())) {
            match self.certify(member) {
                Ok(()) => tracing::info!("the etcd member's certificate was renewed"),
                Err(error) => tracing::warn!("the etcd member's certificate cannot be renewed: {error}"),
            }
        }
    }

    fn certify(&self, member: &Member) -> Result<(), ManagedError> {
        self.kept.certify(member.address, Now::read().date())?;
        if let Some(gateway) = &self.gateway {
            gateway.set_tls(self.kept.client()?);
        }
        Ok(())
    }

    async fn connect(&self, member: &Member) -> Result<Gateway, ManagedError> {
        let endpoints = vec![(member.address.to_string(), CLIENT_PORT)];
        let gateway = Gateway::new(Access { endpoints, tls: Some(self.kept.client()?), user: None });
        let start = Instant::now();
        while start.elapsed() < ANSWER {
            if gateway.answers().await {
                return Ok(gateway);
            }
            if self.process.as_ref().is_some_and(|process| process.fare().removed) {
                return Err(ManagedError::Removed);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let fare = self.process.as_ref().map(Process::fare).unwrap_or_default();
        Err(ManagedError::Down(fare.problem.unwrap_or_else(|| "this server's etcd does not answer".to_owned())))
    }

    async fn open(&self, member: &Member) -> Result<Etcd, ManagedError> {
        let gateway = self.connect(member).await?;
        Ok(Etcd::open(gateway, PREFIX).await?)
    }

    fn keep(&mut self, member: &Member) -> Result<(), ManagedError> {
        self.kept.write(member)?;
        self.member = Some(member.clone());
        Ok(())
    }
}
