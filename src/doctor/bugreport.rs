//! `meshctl bugreport`: one archive with what somebody else needs to see, and without secrets.
//!
//! Owns what goes in, and the archive's format (ustar, POSIX.1-1988, which every `tar` reads). Everything passes the
//! redactor on its way in; the private key's file is never opened.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::Serialize;

use super::facts::{self, Places, output};
use super::redact::Redactor;
use crate::admin::client::Client;
use crate::admin::render::{self, Look};
use crate::config::load::{self, DEFAULT_PATH, Loader};

/// Lines of meshd's log.
const LOG_LINES: &str = "2000";

/// What the tools are asked: the file's name, and the command.
const COMMANDS: &[(&str, &[&str])] = &[
    ("link.txt", &["ip", "-d", "-s", "link", "show"]),
    ("address.txt", &["ip", "address", "show"]),
    ("route-4.txt", &["ip", "-4", "route", "show", "table", "all"]),
    ("route-6.txt", &["ip", "-6", "route", "show", "table", "all"]),
    ("rule.txt", &["ip", "rule", "show"]),
    ("neighbour.txt", &["ip", "neighbour", "show"]),
    ("udp-sockets.txt", &["ss", "-uanpm"]),
    ("nft.txt", &["nft", "list", "ruleset"]),
    ("iptables.txt", &["iptables-save"]),
    ("journal.txt", &["journalctl", "-u", "meshd", "-n", LOG_LINES, "--no-pager", "-o", "short-iso"]),
];

/// What the kernel says of itself.
const FILES: &[(&str, &str)] = &[
    ("kernel.txt", "/proc/version"),
    ("snmp.txt", "/proc/net/snmp"),
    ("softnet.txt", "/proc/net/softnet_stat"),
    ("os-release.txt", "/etc/os-release"),
];

/// Collects everything: name and text.
pub fn collect(client: &Client, places: &Places) -> Vec<(String, String)> {
    let facts = facts::collect(client, places);
    let report = super::report(&facts);
    let redactor = redactor(client, places);
    let mut files: Vec<(String, String)> = vec![
        ("status.json".to_owned(), document(client.status())),
        ("stats.json".to_owned(), document(client.stats())),
        ("peers.json".to_owned(), document(client.peers())),
        ("nodes.json".to_owned(), document(client.nodes())),
        ("keys.json".to_owned(), document(client.keys())),
        ("doctor.json".to_owned(), document::<_, io::Error>(Ok(&report))),
        ("doctor.txt".to_owned(), render::doctor::doctor(&report, Look::default())),
        ("version.txt".to_owned(), format!("meshctl {}\n", env!("CARGO_PKG_VERSION"))),
    ];
    for (name, path) in FILES {
        files.extend(fs::read_to_string(path).ok().map(|text| ((*name).to_owned(), text)));
    }
    for (name, command) in COMMANDS {
        let [tool, args @ ..] = command else { continue };
        files.extend(output(tool, args).map(|text| ((*name).to_owned(), text)));
    }
    let mut files: Vec<_> = files.into_iter().map(|(name, text)| (name, redactor.text(&text))).collect();
    let config = places.config.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
    files.extend(fs::read_to_string(config).ok().map(|text| ("config.yaml".to_owned(), redactor.config(&text))));
    files
}

/// Writes them into one archive that its owner alone can read.
pub fn write(path: &Path, files: &[(String, String)]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let modified = file.metadata()?.mtime().max(0) as u64;
    file.write_all(&archive(files, modified))?;
    file.sync_all()
}

/// A document, or why there is none.
fn document<T: Serialize, E: ToString>(answer: Result<T, E>) -> String {
    match answer.map_err(|error| error.to_string()) {
        Ok(document) => serde_json::to_string_pretty(&document).unwrap_or_else(|error| error.to_string()) + "\n",
        Err(error) => error + "\n",
    }
}

fn redactor(client: &Client, places: &Places) -> Redactor {
    let config = Loader { path: places.config.clone(), ..Loader::default() }.load().ok();
    let from_stdin = |config: &crate::config::Config| {
        matches!(config.token_file, Some(crate::config::TokenFile::StandardInput)) && config.token.is_none()
    };
    let token =
        config.as_ref().filter(|config| !from_stdin(config)).and_then(|config| load::token(config).ok().flatten());
    let made = config.as_ref().and_then(|config| fs::read_to_string(config.data_dir.join("server/node-token")).ok());
    let environment = std::env::var("MESHD_TOKEN").ok();
    let secrets = token.map(|token| token.reveal().to_owned()).into_iter().chain(made).chain(environment);
    let own = client.keys().ok().into_iter().flat_map(|keys| keys.public_key.into_iter().chain(keys.lane_keys));
    let peers = client.peers().ok().into_iter().flatten().filter_map(|peer| peer.public_key);
    Redactor::new(secrets, own.chain(peers))
}

/// The archive's bytes.
fn archive(files: &[(String, String)], modified: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, text) in files {
        out.extend_from_slice(&header(&format!("meshd-bugreport/{name}"), text.len(), modified));
        out.extend_from_slice(text.as_bytes());
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

const BLOCK: usize = 512;

/// A file's header: fields of fixed width, numbers in octal (POSIX.1-1988, `ustar`).
fn header(name: &str, len: usize, modified: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        if let Some(field) = block.get_mut(at..at + text.len()) {
            field.copy_from_slice(text.as_bytes());
        }
    };
    put(0, name);
    put(100, "0000600");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{len:011o}"));
    put(136, &format!("{modified:011o}"));
    // The checksum counts itself as blanks.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar");
    put(263, "00");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    if let Some(field) = block.get_mut(148..156) {
        field.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    block
}
