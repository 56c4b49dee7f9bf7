//! What a person does to a server's etcd from outside: backup, restore, and a start without the others.

use std::path::Path;

use super::CLIENT_PORT;
use super::kept::{Kept, Phase};
use super::managed::ManagedError;
use crate::membership::files;
use crate::membership::random;
use crate::membership::store::etcd::{Access, Etcd, Gateway, PREFIX};
use crate::membership::store::{Snapshot, Store, StoreError};

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

/// At its next start this server is the only one, with what is in `file`. It must not run.
pub async fn restore(data_dir: &Path, file: &Path) -> Result<(), ManagedError> {
    let kept = Kept::new(data_dir);
    let bytes = files::read(file)?.unwrap_or_default();
    Snapshot::from_backup(&bytes)
        .map_err(|detail| StoreError::Corrupt { place: file.display().to_string(), detail })?;
    let mut member = kept.member()?.ok_or(ManagedError::Removed)?;
    stopped(&member)?;
    kept.write_backup(&bytes)?;
    member.cluster = vec![(member.name.clone(), member.peer_url())];
    (member.phase, member.token) = (Phase::Filling, random::id());
    kept.write(&member)?;
    Ok(())
}

/// At its next start this server's etcd forgets all other members. It must not run.
pub fn reset(data_dir: &Path) -> Result<(), ManagedError> {
    let kept = Kept::new(data_dir);
    let mut member =
        kept.member()?.ok_or_else(|| ManagedError::Down(format!("{}: there is no etcd here", data_dir.display())))?;
    stopped(&member)?;
    if member.phase == Phase::Member {
        member.phase = Phase::Resetting;
        kept.write(&member)?;
    }
    Ok(())
}

fn stopped(member: &super::kept::Member) -> Result<(), ManagedError> {
    match std::net::TcpStream::connect_timeout(&(member.address, CLIENT_PORT).into(), std::time::Duration::from_secs(2))
    {
        Ok(_) => Err(ManagedError::Down("this server runs: stop meshd first".to_owned())),
        Err(_) => Ok(()),
    }
}
