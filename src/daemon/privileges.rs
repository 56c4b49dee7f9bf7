//! Which of the privileges that it was started with meshd keeps while it runs.
//!
//! Owns the choice and the giving up. Privileges belong to threads: each thread that is there before the main one has settled
//! calls [`settle`] for itself, later ones inherit. The sidecar's are `membership::privileges`'.

use std::path::Path;
use std::sync::OnceLock;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

use crate::config::{Config, TokenFile};

/// What is kept, once that is known.
static KEPT: OnceLock<CapsHashSet> = OnceLock::new();

/// What starts the sidecar under its own account and ends it, and no more.
const OF_LAUNCHER: [Capability; 7] = [
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_KILL,
];
const THROUGH_ALL: Capability = Capability::CAP_DAC_OVERRIDE;
const SEARCH: Capability = Capability::CAP_DAC_READ_SEARCH;

/// Decides what is kept: CAP_NET_ADMIN for device, routes and sockets, and what this configuration needs when sockets or files
/// are opened again. Names what is kept beside it, and why. To be called before there is a second thread.
pub(super) fn decide(config: &Config, file: &Path) -> Vec<String> {
    let mut notes = Vec::new();
    if let Err(error) = prctl::set_no_new_privs() {
        notes.push(format!("cannot set no_new_privs: {error}"));
    }
    let mut kept = CapsHashSet::from([Capability::CAP_NET_ADMIN]);
    if config.port.get() < 1024 {
        kept.insert(Capability::CAP_NET_BIND_SERVICE);
        notes.push(format!("CAP_NET_BIND_SERVICE is kept, since `port` is {}", config.port));
    }
    // Root without these two is a user like any other. They are given up for as long as it takes to see what that forbids.
    for capability in [THROUGH_ALL, SEARCH] {
        caps::drop(None, CapSet::Effective, capability).ok();
    }
    for path in written(config) {
        if is_forbidden(&path, Access::WRITE_OK | Access::EXEC_OK) && kept.insert(THROUGH_ALL) {
            notes.push(format!("CAP_DAC_OVERRIDE is kept, since {} belongs to somebody else", path.display()));
        }
    }
    for path in read(config, file) {
        if is_forbidden(path, Access::READ_OK) && !kept.contains(&THROUGH_ALL) && kept.insert(SEARCH) {
            notes.push(format!("CAP_DAC_READ_SEARCH is kept, since {} is readable for others alone", path.display()));
        }
    }
    let permitted = caps::read(None, CapSet::Permitted).unwrap_or_default();
    for capability in [THROUGH_ALL, SEARCH] {
        if permitted.contains(&capability) {
            caps::raise(None, CapSet::Effective, capability).ok();
        }
    }
    let kept: CapsHashSet = kept.intersection(&permitted).copied().collect();
    notes.retain(|_| !permitted.is_empty());
    KEPT.set(kept).ok();
    notes
}

/// Gives up, in the thread that calls it, all that was not decided to be kept.
pub fn settle() {
    let Some(kept) = KEPT.get() else { return };
    if let Err(error) = only(kept) {
        tracing::warn!("privileges that are not needed could not be given up: {error}");
    }
}

/// What this thread has, by name.
pub(super) fn present() -> Vec<String> {
    let mut names: Vec<String> =
        caps::read(None, CapSet::Permitted).unwrap_or_default().iter().map(ToString::to_string).collect();
    names.sort();
    names
}

/// Gives up what a launcher does not need.
pub(super) fn of_launcher() -> anyhow::Result<()> {
    prctl::set_no_new_privs()?;
    let permitted = caps::read(None, CapSet::Permitted)?;
    only(&OF_LAUNCHER.into_iter().filter(|capability| permitted.contains(capability)).collect())?;
    Ok(())
}

fn only(kept: &CapsHashSet) -> Result<(), caps::errors::CapsError> {
    // without CAP_SETPCAP there is no changing this set; a process that gains nothing at exec does not need it changed
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)?.difference(kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, kept)?;
    caps::set(None, CapSet::Permitted, kept)?;
    caps::clear(None, CapSet::Inheritable)
}

/// Folders in which files are made.
fn written(config: &Config) -> Vec<std::path::PathBuf> {
    let subnet_file = config.subnet_file.as_deref().and_then(Path::parent);
    [Some(config.data_dir.as_path()), config.cni_conf_dir.as_deref(), subnet_file]
        .into_iter()
        .flatten()
        .map(Path::to_owned)
        .collect()
}

/// Files that are read again at SIGHUP, or when they change.
fn read<'a>(config: &'a Config, file: &'a Path) -> Vec<&'a Path> {
    let token = match &config.token_file {
        Some(TokenFile::Path(path)) => Some(path.as_path()),
        _ => None,
    };
    let mut all = vec![file];
    let others = [
        &config.nodes_file,
        &config.private_key_file,
        &config.bfd_auth_key_file,
        &config.datastore_password_file,
        &config.datastore_cafile,
        &config.datastore_certfile,
        &config.datastore_keyfile,
    ];
    all.extend(others.into_iter().filter_map(|path| path.as_deref()).chain(token));
    all
}

fn is_forbidden(path: &Path, access: Access) -> bool {
    accessat(CWD, path, access, AtFlags::EACCESS) == Err(Errno::ACCESS)
}
