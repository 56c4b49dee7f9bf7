//! Giving up what the sidecar does not need: root, capabilities, and the way back to them.

use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;

use nix::sys::prctl;
use nix::unistd::{Gid, Uid, User, setgroups, setresgid, setresuid};

use super::files;

/// The account that the sidecar runs as, where it exists.
pub const ACCOUNT: &str = "mesh-sidecar";

/// Why privileges could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {detail}")]
pub struct PrivilegeError {
    what: &'static str,
    detail: String,
}

/// Becomes the account, where that is possible, and keeps no capability in any case. What to warn of, if anything. To be
/// called before there is a second thread.
pub fn drop_all(data_dir: &Path) -> Result<Option<String>, PrivilegeError> {
    let failed = |what| move |detail: String| PrivilegeError { what, detail };
    prctl::set_no_new_privs().map_err(|e| failed("set no_new_privs")(e.to_string()))?;
    let mut warning = None;
    if Uid::effective().is_root() {
        match usable(data_dir) {
            Ok(account) => {
                become_account(&account).map_err(|e| failed("become the account mesh-sidecar")(e.to_string()))?
            }
            Err(why) => {
                let user = Uid::effective();
                warning = Some(format!("{why}, so the sidecar keeps the user {user}, without capabilities"));
            }
        }
    }
    for set in [caps::CapSet::Ambient, caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Inheritable] {
        caps::clear(None, set).map_err(|e| failed("drop capabilities")(e.to_string()))?;
    }
    Ok(warning)
}

/// The account, once its folders below the data-dir are its own.
fn usable(data_dir: &Path) -> Result<User, String> {
    let account = User::from_name(ACCOUNT).map_err(|e| e.to_string())?;
    let account = account.ok_or_else(|| format!("there is no account {ACCOUNT}"))?;
    for folder in data_dir.ancestors() {
        if !folder.as_os_str().is_empty() && !can_enter(folder, &account) {
            return Err(format!("the account {ACCOUNT} cannot enter {}", folder.display()));
        }
    }
    for name in ["agent", "server"] {
        let folder = data_dir.join(name);
        own(&folder, &account).map_err(|e| format!("{} cannot be given to {ACCOUNT} ({e})", folder.display()))?;
    }
    Ok(account)
}

fn can_enter(folder: &Path, account: &User) -> bool {
    let Ok(meta) = folder.metadata() else { return false };
    let bit = if meta.uid() == account.uid.as_raw() {
        0o100
    } else if meta.gid() == account.gid.as_raw() {
        0o010
    } else {
        0o001
    };
    meta.is_dir() && meta.mode() & bit != 0
}

/// Makes the folder, and gives it and the files in it to the account. A link in it is left alone.
fn own(folder: &Path, account: &User) -> Result<(), String> {
    files::ensure_dir(folder).map_err(|e| e.to_string())?;
    // never through a link: the account, whose folder this is, can put one there between two looks
    let (uid, gid) = (account.uid.as_raw(), account.gid.as_raw());
    let give = |path: &Path| lchown(path, Some(uid), Some(gid)).map_err(|e| e.to_string());
    for entry in folder.read_dir().map_err(|e| e.to_string())? {
        let entry = entry.map_err(|e| e.to_string())?;
        match entry.file_type() {
            Ok(kind) if kind.is_file() => give(&entry.path())?,
            Ok(kind) if kind.is_dir() => own(&entry.path(), account)?,
            _ => {}
        }
    }
    give(folder)
}

fn become_account(account: &User) -> nix::Result<()> {
    let (uid, gid): (Uid, Gid) = (account.uid, account.gid);
    setgroups(&[gid])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}
