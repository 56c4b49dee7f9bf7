//! What a person does to a server's etcd from outside: backup, restore, and a start without the others.

use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::join_all;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::kept::{Kept, Member, Phase};
use super::managed::ManagedError;
use super::{CLIENT_PORT, join};
use crate::membership::agent::keep::Keep;
use crate::membership::api::CaAnswer;
use crate::membership::client::Connection;
use crate::membership::files;
use crate::membership::random;
use crate::membership::store::etcd::{Access, Etcd, Gateway, PREFIX};
use crate::membership::store::{Snapshot, Store, StoreError};
use crate::membership::tls::Trust;

/// Who does not answer for so long is not there.
const LOOK: Duration = Duration::from_secs(3);
/// An etcd that was told to end has so long for it.
const ENDING: Duration = Duration::from_secs(6);

/// Whether a server with this data-dir has an etcd of its own.
pub fn is_here(data_dir: &Path) -> bool {
    matches!(Kept::new(data_dir).member(), Ok(Some(_)))
}

/// Writes all that the cluster has, as of one revision, to `file`, which must not exist. The server has to run.
pub async fn backup(data_dir: &Path, file: &Path) -> Result<(), ManagedError> {
    let kept = Kept::new(data_dir);
    let Some(member) = kept.member()? else { return Err(ManagedError::Removed) };
    let endpoints = vec![(member.address.to_string(), CLIENT_PORT)];
    let gateway = Gateway::new(Access { endpoints, tls: Some(kept.client()?), user: None });
    let all = Etcd::open(gateway, PREFIX).await?.range("").await?;
    files::create_new(file)?;
    Ok(files::write_atomic(file, &all.to_backup())?)
}

/// At its next start this server is the only one, with what is in `file`. It must not run, and no other server either, unless
/// `force` says so.
pub async fn restore(data_dir: &Path, file: &Path, force: bool) -> Result<(), ManagedError> {
    let kept = Kept::new(data_dir);
    let bytes = files::read(file)?.unwrap_or_default();
    Snapshot::from_backup(&bytes)
        .map_err(|detail| StoreError::Corrupt { place: file.display().to_string(), detail })?;
    let mut member = kept.member()?.ok_or(ManagedError::Removed)?;
    stopped(&member).await?;
    alone(data_dir, &member, force).await?;
    kept.write_backup(&bytes)?;
    member.cluster = vec![(member.name.clone(), member.peer_url())];
    (member.phase, member.token) = (Phase::Filling, random::id());
    kept.write(&member)?;
    Ok(())
}

/// At its next start this server's etcd forgets all other members. It must not run, and no other server either, unless `force`
/// says so.
pub async fn reset(data_dir: &Path, force: bool) -> Result<(), ManagedError> {
    let kept = Kept::new(data_dir);
    let mut member =
        kept.member()?.ok_or_else(|| ManagedError::Down(format!("{}: there is no etcd here", data_dir.display())))?;
    stopped(&member).await?;
    alone(data_dir, &member, force).await?;
    if member.phase == Phase::Member {
        member.phase = Phase::Resetting;
        kept.write(&member)?;
    }
    Ok(())
}

/// A moment ago it may have been told to.
async fn stopped(member: &Member) -> Result<(), ManagedError> {
    let start = Instant::now();
    loop {
        let connected = TcpStream::connect((member.address, CLIENT_PORT));
        match timeout(LOOK, connected).await {
            Ok(Ok(_)) if start.elapsed() < ENDING => tokio::time::sleep(LOOK / 10).await,
            Ok(Ok(_)) => return Err(ManagedError::Down("this server runs: stop meshd first".to_owned())),
            _ => return Ok(()),
        }
    }
}

/// Whether no other server of the cluster answers, with a quorum or without.
async fn alone(data_dir: &Path, own: &Member, force: bool) -> Result<(), ManagedError> {
    let keep = Keep::open(data_dir)?;
    let Some(member) = keep.membership()?.filter(|_| !force) else { return Ok(()) };
    let ca = CertificateDer::from(STANDARD.decode(&member.ca).unwrap_or_default());
    let asked = join::known_servers(own, &member).into_iter().map(|server| {
        let trust = Trust::Ca(ca.clone());
        let cluster = member.cluster.as_str();
        async move {
            let answer = async { Connection::open(&server, trust, None).await?.get::<CaAnswer>("/v1/ca").await };
            let same = matches!(timeout(LOOK, answer).await, Ok(Ok(answer)) if answer.cluster == cluster);
            same.then(|| server.to_string())
        }
    });
    let there: Vec<String> = join_all(asked).await.into_iter().flatten().collect();
    if there.is_empty() { Ok(()) } else { Err(ManagedError::OthersAnswer(there)) }
}
