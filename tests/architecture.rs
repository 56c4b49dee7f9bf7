//! The arrows of the house: what is pure knows no socket, no clock, no thread and no file, and only `sys` is unsafe.
//!
//! Reads the source as text, without comments, strings and test modules, and looks for words. That is coarse on purpose:
//! who wants to go round it has to write something that a reader of the change will see.

use std::fs;
use std::path::{Path, PathBuf};

/// Files and folders under `src` that turn bytes and time into bytes and decisions, and nothing else.
const PURE: &[&str] = &[
    "wire",
    "engine",
    "health",
    "node.rs",
    "key.rs",
    "control",
    "config.rs",
    "config",
    "admin/protocol.rs",
    "admin/protocol",
    "admin/reasons.rs",
    "admin/render.rs",
    "admin/units.rs",
    "why.rs",
    "why",
    "membership/address.rs",
    "membership/agent/balancer.rs",
    "membership/api.rs",
    "membership/authority.rs",
    "membership/link.rs",
    "membership/matrix.rs",
    "membership/pake.rs",
    "membership/record.rs",
    "membership/registry/feed.rs",
    "membership/registry/health.rs",
    "membership/registry/others.rs",
    "membership/registry/rows.rs",
    "membership/registry/space.rs",
    "membership/registry/state.rs",
    "membership/server/limiter.rs",
    "membership/settings.rs",
    "membership/store/endpoint.rs",
    "membership/token.rs",
    "doctor/checks.rs",
    "doctor/checks",
    "doctor/redact.rs",
    "top/draw.rs",
    "top/state.rs",
];
/// Except these, which say so themselves.
const NOT_PURE: &[&str] = &["control/source.rs", "config/load.rs"];

/// What no pure file mentions.
const IMPURE: &[&str] = &[
    "tokio",
    "libc",
    "socket2",
    "rtnetlink",
    "tokio_tun",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UnixListener",
    "UnixDatagram",
    "std::fs",
    "std::thread",
    "std::process",
    "std::env",
    "Instant::now",
    "SystemTime::now",
    "crate::sys",
    "crate::io",
    "crate::host",
    "crate::daemon",
];

/// Who must not know whom: files under the first mention none of the second.
const ARROWS: &[(&str, &[&str])] = &[
    ("wire", &["crate::engine", "crate::control", "crate::config", "crate::node", "crate::admin"]),
    ("health", &["crate::engine", "crate::control", "crate::config", "crate::node", "crate::admin"]),
    ("engine", &["crate::control", "crate::config", "crate::admin"]),
    ("sys", &["crate::engine", "crate::io", "crate::host", "crate::daemon", "crate::control", "crate::config"]),
    ("io", &["crate::host", "crate::control", "crate::config", "crate::admin", "crate::daemon"]),
    ("host", &["crate::io", "crate::engine", "crate::admin", "crate::daemon"]),
    (
        "node.rs",
        &["crate::engine", "crate::wire", "crate::control", "crate::config", "crate::admin", "crate::membership"],
    ),
    ("key.rs", &["crate::"]),
    ("control", &["crate::admin"]),
    ("admin", &["crate::io", "crate::sys", "crate::host", "crate::daemon"]),
    ("membership", &["crate::engine", "crate::io", "crate::host", "crate::daemon", "crate::admin", "crate::control"]),
    ("membership/store", &["crate::membership::registry", "crate::membership::server", "crate::membership::agent"]),
    ("membership/registry", &["crate::membership::server", "crate::membership::agent", "crate::membership::sidecar"]),
    ("bin", &["meshd::engine", "meshd::io", "meshd::sys", "meshd::wire"]),
];

/// Who may make system calls of our own.
const USERS_OF_SYS: &[&str] = &["sys", "io", "host", "daemon", "daemon.rs", "lib.rs"];

#[test]
fn pure_modules_know_no_io_no_clock_and_no_thread() {
    let mut found = Vec::new();
    for (name, code) in sources() {
        if is_in(&name, PURE) && !is_in(&name, NOT_PURE) {
            found.extend(mentions(&name, &code, IMPURE));
        }
    }
    assert!(found.is_empty(), "pure modules that are not:\n{}", found.join("\n"));
}

#[test]
fn arrows_point_one_way() {
    let mut found = Vec::new();
    for (name, code) in sources() {
        for (from, not) in ARROWS {
            if is_in(&name, &[from]) {
                found.extend(mentions(&name, &code, not));
            }
        }
        if !is_in(&name, USERS_OF_SYS) {
            found.extend(mentions(&name, &code, &["crate::sys", "meshd::sys"]));
        }
    }
    assert!(found.is_empty(), "arrows that point the wrong way:\n{}", found.join("\n"));
}

#[test]
fn only_sys_is_unsafe() {
    let mut found = Vec::new();
    for (name, code) in sources() {
        if !is_in(&name, &["sys"]) {
            found.extend(mentions(&name, &code, &["unsafe", "allow(unsafe_code)", "expect(unsafe_code)"]));
        }
    }
    assert!(found.is_empty(), "unsafe outside src/sys:\n{}", found.join("\n"));
}

/// Someone sets the clock an hour or a year back or on: nothing that carries packets notices, since nothing reads it. The
/// four that do compare it with the time of a file, are membership's, where certificates and tokens expire, begin the time in
/// handshakes, which never goes back, and date captured packets for meshctl; each is tested with clocks of its own.
#[test]
fn four_read_the_wall_clock() {
    let mut found = Vec::new();
    for (name, code) in sources() {
        let read = mentions(&name, &code, &["SystemTime", "UNIX_EPOCH", "clock_gettime", "gettimeofday", "chrono"]);
        match name.as_str() {
            "control/source.rs" | "membership/clock.rs" | "daemon/stamps.rs" | "pcap.rs" => {
                assert!(!read.is_empty(), "positive control")
            }
            _ => found.extend(read),
        }
    }
    assert!(found.is_empty(), "the wall clock is read:\n{}", found.join("\n"));
}

#[test]
fn the_lists_name_what_exists() {
    let lists = PURE.iter().chain(NOT_PURE).chain(ARROWS.iter().map(|(from, _)| from)).chain(USERS_OF_SYS);
    for name in lists {
        assert!(src().join(name).exists(), "src/{name} is gone: this test would watch nothing");
    }
    let names: Vec<_> = sources().into_iter().map(|(name, _)| name).collect();
    for expected in ["wire/ip.rs", "engine/inbound.rs", "io/worker.rs", "sys/udp.rs"] {
        assert!(names.iter().any(|name| name == expected), "{expected} was not read");
    }
}

#[test]
fn the_scanner_finds_what_is_planted() {
    let planted = |text: &str| mentions("engine/x.rs", &code_of(text), IMPURE).len();
    assert_eq!(planted("use tokio::time;"), 1);
    assert_eq!(planted("use std::net::{IpAddr, UdpSocket};"), 1);
    assert_eq!(planted("let now = std::time::Instant::now();"), 1);
    assert_eq!(planted("use std::{\n    fmt,\n    fs::File,\n};"), 1, "in a group");
    assert_eq!(planted("use std::{fmt, net::{IpAddr, TcpStream}, thread};"), 2, "in groups within groups");
    assert_eq!(planted("use crate::{wire::ip, sys::{self, poll}};"), 1);
    assert_eq!(planted("use std::fs; use crate::io::udp;"), 2);
    assert_eq!(planted("use super::super::sys::poll;"), 1, "by way of the parents");
    assert_eq!(
        planted("// tokio\n/// crate::sys\n/* libc */ let x = \"std::fs\";"),
        0,
        "comments and strings do not count"
    );
    assert_eq!(planted("let url = \"//\"; use libc::c_int;"), 1, "a string is no comment");
    assert_eq!(planted("let quote = '\"'; use libc::c_int; let other = '\"';"), 1, "nor is a character a string");
    assert_eq!(planted("fn libcall() {} struct MyUdpSockets;"), 0, "whole words only");
    assert_eq!(
        planted("fn f() {}\n#[cfg(test)]\nmod tests { use std::fs; fn g() { {} } }\nuse libc::c_int;"),
        1,
        "tests may"
    );
    assert_eq!(mentions("wire/x.rs", &code_of("fn f() { unsafe { g() } }"), &["unsafe"]).len(), 1);
    assert_eq!(mentions("wire/x.rs", &code_of("#![deny(unsafe_code)]"), &["unsafe"]).len(), 0);
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every source file but tests: its name under `src`, and its code.
fn sources() -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut folders = vec![src()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(src()).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
                out.push((name, code_of(&fs::read_to_string(path).unwrap())));
            }
        }
    }
    out
}

fn is_in(name: &str, places: &[&str]) -> bool {
    places.iter().any(|place| name == *place || name.strip_prefix(place).is_some_and(|rest| rest.starts_with('/')))
}

/// One line for each word that the code mentions.
fn mentions(name: &str, code: &str, words: &[&str]) -> Vec<String> {
    let paths = spell_out_groups(code);
    words.iter().filter(|word| contains_word(&paths, word)).map(|word| format!("src/{name}: {word}")).collect()
}

fn contains_word(code: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back().is_some_and(part_of_word);
        let open_end = word.ends_with(':');
        let after = code[at + word.len()..].chars().next().is_some_and(part_of_word);
        !before && (open_end || !after)
    })
}

/// The code without comments, the contents of strings, and modules under `#[cfg(test)]`.
fn code_of(text: &str) -> String {
    let mut out = String::new();
    let chars: Vec<char> = text.chars().collect();
    let mut at = 0;
    let starts = |at: usize, what: &str| chars[at..].iter().copied().take(what.len()).eq(what.chars());
    while at < chars.len() {
        if starts(at, "//") {
            at += chars[at..].iter().position(|c| *c == '\n').unwrap_or(chars.len() - at);
        } else if starts(at, "/*") {
            at += 2;
            while at < chars.len() && !starts(at, "*/") {
                at += 1;
            }
            at += 2;
        } else if chars[at] == '"' {
            at += 1;
            while at < chars.len() && chars[at] != '"' {
                at += if chars[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
            out.push_str("\"\"");
        } else if chars[at] == '\'' && chars.get(at + 2) == Some(&'\'') {
            at += 3;
        } else if chars[at] == '\'' && chars.get(at + 1) == Some(&'\\') {
            at += 3;
            at += chars[at..].iter().position(|c| *c == '\'').map_or(0, |n| n + 1);
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    without_tests(&out)
}

fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let Some(start) = code.find(MARK) else { return code.to_owned() };
    let behind = &code[start + MARK.len()..];
    let mut depth = 0;
    let end = behind.char_indices().find(|(_, c)| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0 && (*c == '}' || *c == ';')
    });
    let rest = end.map_or("", |(at, _)| &behind[at + 1..]);
    code[..start].to_owned() + &without_tests(rest)
}

/// The code with each path of a `use` group written out behind it, and paths by way of parents as paths from the root.
fn spell_out_groups(code: &str) -> String {
    let mut out = String::new();
    for statement in code.split_inclusive(';') {
        let Some(at) = statement.find("use ").filter(|_| statement.contains('{') && !statement.contains("fn ")) else {
            out.push_str(statement);
            continue;
        };
        out.push_str(&statement[..at]);
        let tree: String = statement[at + 4..].trim_end_matches(';').split_whitespace().collect();
        let mut paths = Vec::new();
        spell_out(&tree, "", &mut paths);
        paths.iter().for_each(|path| out.push_str(&format!("use {path};\n")));
    }
    while out.contains("super::super::") {
        out = out.replace("super::super::", "super::");
    }
    out.replace("super::", "crate::")
}

fn spell_out(tree: &str, prefix: &str, paths: &mut Vec<String>) {
    let mut depth = 0;
    let parts = tree.split(|c| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    });
    for part in parts.filter(|part| !part.is_empty()) {
        match part.split_once('{') {
            Some((head, group)) => {
                spell_out(group.strip_suffix('}').unwrap_or(group), &format!("{prefix}{head}"), paths);
            }
            None => paths.push(format!("{prefix}{part}")),
        }
    }
}
