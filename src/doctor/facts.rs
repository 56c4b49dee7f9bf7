//! Collects what the checks look at: from netlink, /proc, the tools that are installed, the configuration, a running meshd.
//!
//! Changes nothing, and needs nothing of it to succeed: what is missing is `None`, and its check says so.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Daemon, EtcdPort, Facts, FileFact, Holder, Zone};
use crate::admin::client::{Client, ClientError};
use crate::admin::protocol::Role;
use crate::config::load::Loader;
use crate::config::{Config, NodeIp};
use crate::host::{self, Host};
use crate::membership::etcd::{CLIENT_PORT, PEER_PORT};

/// Where to look.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// The configuration's file; `None`: the default one.
    pub config: Option<PathBuf>,
}

/// Collects all of it. Runs tools, and waits for them.
pub fn collect(client: &Client, places: &Places) -> Facts {
    let mut facts = Facts { tun: "mesh0".to_owned(), port: crate::node::DEFAULT_PORT, ..Facts::default() };
    match daemon(client) {
        Ok(daemon) => facts.daemon = Some(daemon),
        Err(error) => facts.unreachable = Some(error.to_string()),
    }
    let config = match (Loader { path: places.config.clone(), ..Loader::default() }).load() {
        Ok(config) => Some(config),
        Err(error) => {
            facts.config_problem = Some(crate::daemon::told(&error.into()));
            None
        }
    };
    let mut server = None;
    if let Some(config) = &config {
        facts.tun = config.tun.as_str().to_owned();
        facts.port = config.port.get();
        facts.key = file(&config.private_key_path());
        server = config.data_dir.join("server").is_dir().then_some(());
    }
    if let Some(daemon) = &facts.daemon {
        // Who runs is right about itself: the file may have changed since.
        facts.tun.clone_from(&daemon.status.tun);
        facts.port = daemon.status.port;
        server = (daemon.status.role == Role::Server).then_some(());
        let own = daemon.nodes.iter().find(|node| node.name == daemon.status.node);
        facts.underlay = own.map(|own| own.underlay.clone()).unwrap_or_default();
    }
    facts.server_port = server.map(|()| config.as_ref().map_or(9345, |config| config.bind_address.port()));
    host(&mut facts, config.as_ref());
    facts.nft = output("nft", &["-j", "list", "ruleset"]);
    facts.iptables = output("iptables-save", &[]);
    facts.release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    for name in ["net.ipv4.ip_forward", "net.ipv4.conf.all.rp_filter", "net.core.rmem_max"] {
        facts.sysctls.extend(sysctl(name).map(|value| (name.to_owned(), value)));
    }
    let own = format!("net.ipv4.conf.{}.rp_filter", facts.tun);
    let path = ["/proc/sys/net/ipv4/conf", &facts.tun, "rp_filter"].iter().collect::<PathBuf>();
    facts.sysctls.extend(read(path).map(|value| (own, value)));
    facts.zones = zones(&facts);
    facts.networkd_removes = networkd();
    facts.network_manager_spares = network_manager(&facts.tun);
    facts
}

/// A running meshd's word.
fn daemon(client: &Client) -> Result<Daemon, ClientError> {
    // A member asks its servers for the nodes, and they may be away.
    let nodes = client.nodes().unwrap_or_default();
    Ok(Daemon { status: client.status()?, stats: client.stats()?, peers: client.peers()?, nodes })
}

fn host(facts: &mut Facts, config: Option<&Config>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async {
        let Ok(host) = Host::open() else { return };
        if facts.underlay.is_empty() {
            facts.underlay = underlay(&host, config).await;
        }
        let server = facts.server_port.unwrap_or(9345);
        if let Ok(mut survey) = host.survey(facts.port, &[server, CLIENT_PORT, PEER_PORT]).await {
            facts.devices = Some(survey.devices);
            facts.udp = survey.udp;
            facts.tcp = survey.tcp.remove(&server).unwrap_or_default();
            if runs_etcd(config) {
                facts.etcd = survey.tcp.into_iter().map(etcd_port).collect();
            }
            facts.synchronised = survey.synchronised;
        }
    });
}

/// Whether servers run an etcd themselves, and this node is one of them or is to be.
fn runs_etcd(config: Option<&Config>) -> bool {
    config.is_some_and(|config| {
        let began = config.data_dir.join("server/etcd/member.json").exists();
        config.datastore_endpoint.is_none() && (config.cluster_init || began)
    })
}

fn etcd_port((port, holders): (u16, Vec<Holder>)) -> EtcdPort {
    let (own, others): (Vec<_>, Vec<_>) = holders.into_iter().partition(|holder| {
        holder.process.as_ref().is_some_and(|(pid, name)| name.starts_with("etcd") && parent(*pid) == "mesh-sidecar")
    });
    EtcdPort { port, others, own: !own.is_empty() }
}

/// The name of a process's parent.
fn parent(pid: u32) -> String {
    let status = read(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or_default().trim();
    read(format!("/proc/{parent}/comm")).unwrap_or_default()
}

/// Where meshd would be carried, by the configuration.
async fn underlay(host: &Host, config: Option<&Config>) -> Vec<IpAddr> {
    let wanted: Vec<host::NodeIp> = match config.map(|config| &config.node_ip) {
        Some(NodeIp::Given(specs)) => specs.iter().filter_map(|spec| spec.to_string().parse().ok()).collect(),
        _ => Vec::new(),
    };
    let found = host.underlay(&wanted).await;
    found.map(|found| found.into_iter().map(|underlay| underlay.ip).collect()).unwrap_or_default()
}

fn file(path: &Path) -> Option<FileFact> {
    let metadata = fs::metadata(path).ok()?;
    Some(FileFact { path: path.display().to_string(), mode: metadata.mode() & 0o777, uid: metadata.uid() })
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn sysctl(name: &str) -> Option<String> {
    read(Path::new("/proc/sys").join(name.replace('.', "/")))
}

/// What a tool prints, where it is installed and succeeds.
pub(super) fn output(tool: &str, args: &[&str]) -> Option<String> {
    let mut command = Command::new(tool);
    command.args(args).stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn zones(facts: &Facts) -> Option<Vec<Zone>> {
    let ask = |args: &[&str]| output("firewall-cmd", args).map(|text| text.trim().to_owned());
    ask(&["--state"]).filter(|state| state == "running")?;
    let default = ask(&["--get-default-zone"]).unwrap_or_default();
    let mut devices: Vec<String> = facts.underlay_devices().map(|(device, _)| device.name.clone()).collect();
    devices.push(facts.tun.clone());
    devices.dedup();
    let zone = |device: String| {
        let name = ask(&[&format!("--get-zone-of-interface={device}")]).unwrap_or_else(|| default.clone());
        let list = ask(&[&format!("--zone={name}"), "--list-all"]).unwrap_or_default();
        let field = |key: &str| list.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap_or_default().trim();
        let ports = field("ports:").split_ascii_whitespace().map(str::to_owned).collect();
        Zone { target: field("target:").to_owned(), ports, name, device }
    };
    Some(devices.into_iter().map(zone).collect())
}

/// Whether networkd runs and removes foreign routes, which it does unless it is told not to.
fn networkd() -> Option<bool> {
    Path::new("/run/systemd/netif/state").exists().then_some(())?;
    let places = ["/usr/lib/systemd", "/run/systemd", "/etc/systemd"];
    let files = places.iter().flat_map(|place| {
        let mut files = vec![Path::new(place).join("networkd.conf")];
        files.extend(conf_files(&Path::new(place).join("networkd.conf.d")));
        files
    });
    let text: String = files.filter_map(read).map(|text| text + "\n").collect();
    Some(removes_foreign_routes(&text))
}

/// The last word in the files counts.
fn removes_foreign_routes(text: &str) -> bool {
    let mut values = text.lines().rev().filter_map(|line| line.trim().strip_prefix("ManageForeignRoutes="));
    values.next().is_none_or(|value| !matches!(value.trim(), "no" | "false" | "0" | "off"))
}

/// Whether NetworkManager runs and is told to leave the device alone.
fn network_manager(tun: &str) -> Option<bool> {
    Path::new("/run/NetworkManager").exists().then_some(())?;
    let places = ["/usr/lib/NetworkManager", "/run/NetworkManager", "/etc/NetworkManager"];
    let files = places.iter().flat_map(|place| {
        let mut files = vec![Path::new(place).join("NetworkManager.conf")];
        files.extend(conf_files(&Path::new(place).join("conf.d")));
        files
    });
    Some(files.filter_map(read).any(|text| spares(&text, tun)))
}

fn spares(text: &str, tun: &str) -> bool {
    let fits = |pattern: &str| match pattern.trim().strip_prefix("interface-name:") {
        Some(name) => name == tun || name.strip_suffix('*').is_some_and(|front| tun.starts_with(front)),
        None => false,
    };
    let lists = text.lines().filter_map(|line| line.trim().strip_prefix("unmanaged-devices"));
    lists.flat_map(|line| line.trim_start_matches(['+', '=', ' ']).split([';', ','])).any(fits)
}

fn conf_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "conf")).collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_foreign_routes_counts() {
        assert!(removes_foreign_routes(""));
        assert!(removes_foreign_routes("[Network]\n#ManageForeignRoutes=no\n"));
        assert!(!removes_foreign_routes("[Network]\nManageForeignRoutes=no\n"));
        assert!(removes_foreign_routes("[Network]\nManageForeignRoutes=no\n\nManageForeignRoutes=yes\n"));
    }

    #[test]
    fn network_manager_names_devices_by_pattern() {
        for good in ["unmanaged-devices=interface-name:mesh0", "unmanaged-devices+=mac:00:11;interface-name:mesh*"] {
            assert!(spares(good, "mesh0"), "{good}");
        }
        for bad in ["", "unmanaged-devices=interface-name:eth0", "# unmanaged-devices=interface-name:mesh0"] {
            assert!(!spares(bad, "mesh0"), "{bad}");
        }
    }

    #[test]
    fn a_tool_that_is_not_there_says_nothing() {
        assert_eq!(output("meshd-no-such-tool", &[]), None);
        assert_eq!(output("sh", &["-c", "echo no; exit 1"]), None);
        assert_eq!(output("sh", &["-c", "echo yes"]).as_deref(), Some("yes\n"));
    }
}
