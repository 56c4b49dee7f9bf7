//! Writes what workloads are attached by, where the configuration asks for it, and again when subnet or MTU change.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use ipnet::IpNet;

use super::view::{Concern, Shared};
use crate::config::Config;
use crate::control::attach::{CNI_FILE, cni, subnet_env};
use crate::control::plan::Plan;

/// Brings the files up to date.
pub(super) fn attach(config: &Config, plan: &Plan, networks: &[IpNet], shared: &Shared) {
    let mut wanted = Vec::new();
    if let Some(folder) = &config.cni_conf_dir {
        wanted.push((folder.join(CNI_FILE), cni(&plan.own_subnets, plan.mtu)));
    }
    if let Some(path) = &config.subnet_file {
        wanted.push((path.clone(), subnet_env(networks, &plan.subnets, &plan.own_subnets, plan.mtu)));
    }
    for (path, text) in wanted {
        match write(&path, &text) {
            Ok(false) => {}
            Ok(true) => tracing::info!("wrote {}", path.display()),
            Err(error) => {
                let message = format!("cannot write {}: {error}", path.display());
                return shared.problem(Concern::Attach, message);
            }
        }
    }
    shared.settled(Concern::Attach);
}

/// Removes the files, where they are ours, and says which: no workload is to be attached any more to what is gone.
pub(super) fn detach(config: &Config) -> Vec<String> {
    let cni = config.cni_conf_dir.as_ref().map(|folder| (folder.join(CNI_FILE), "\"name\": \"meshd\""));
    let env = config.subnet_file.as_ref().map(|path| (path.clone(), "FLANNEL_SUBNET="));
    let ours =
        cni.into_iter().chain(env).filter(|(path, mark)| fs::read_to_string(path).is_ok_and(|t| t.contains(mark)));
    ours.filter(|(path, _)| fs::remove_file(path).is_ok()).map(|(path, _)| path.display().to_string()).collect()
}

/// Whoever reads the file sees the old text or the new, never a part.
fn write(path: &Path, text: &str) -> io::Result<bool> {
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    // a name that no CNI runtime takes for a configuration
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net.d/10-x.conflist");
        assert!(write(&path, "a").unwrap() && !write(&path, "a").unwrap() && write(&path, "b").unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "b");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
