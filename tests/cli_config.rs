//! The command line as a person and a script meet it: exit codes, messages, and which source wins.

use std::path::PathBuf;

use assert_cmd::Command;
use tempfile::TempDir;

/// The program without this machine's MESHD_ variables.
fn meshd(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshd"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MESHD_")) {
        command.env_remove(name);
    }
    command.args(args);
    command
}

struct Outcome {
    code: i32,
    out: String,
    err: String,
}

fn outcome(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

const NODES: &str = "nodes:
  - {name: a, underlay: 10.9.0.1, subnets: [10.42.1.0/24]}
  - {name: b, underlay: 10.9.0.2, subnets: [10.42.2.0/24]}
";

/// A directory with `config.yaml` and `nodes.yaml`; `NODES` in the first becomes the second's path.
fn files(config: &str, nodes: &str) -> (TempDir, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let nodes_path = path("nodes.yaml").display().to_string();
    std::fs::write(path("nodes.yaml"), nodes).unwrap();
    std::fs::write(path("config.yaml"), config.replace("NODES", &nodes_path)).unwrap();
    let config_path = path("config.yaml").display().to_string();
    (dir, config_path, nodes_path)
}

#[test]
fn a_good_configuration_is_ok_with_a_summary() {
    let (_dir, config, nodes) = files("node-name: a\nport: 4789\nnode-ip: 10.9.0.1\nnodes-file: NODES\n", NODES);
    let o = outcome(&mut meshd(&["config", "check", &config]));
    assert_eq!((o.code, o.err.as_str()), (0, ""));
    assert!(o.out.starts_with(&format!("{config}: ok\n")), "{}", o.out);
    assert!(o.out.contains("node a, underlay 10.9.0.1, device mesh0, UDP port 4789, VNI 1"), "{}", o.out);
    assert!(o.out.contains(&format!("{nodes}: ok\n")), "{}", o.out);
    assert!(o.out.contains("2 nodes with 2 subnets; this is a, at 10.9.0.1:4789"), "{}", o.out);
}

#[test]
fn a_wrong_configuration_is_exit_2_with_place_and_fix() {
    for (text, message) in [
        ("node-name: a\nport: 70000\n", ":2:7: `port` cannot be `70000`: use a number from 1 to 65535"),
        ("node-nmae: a\n", ":1:1: unknown key `node-nmae`; did you mean `node-name`?"),
        ("cluster: x\n", "`cluster` is not supported by this version yet"),
        ("port: [\n", "config.yaml:"),
    ] {
        let (_dir, config, _) = files(text, NODES);
        for args in
            [&["config", "check", &config][..], &["run", "--config", &config], &["cleanup", "--config", &config]]
        {
            let o = outcome(&mut meshd(args));
            assert_eq!((o.code, o.out.as_str()), (2, ""), "{args:?}: {}", o.err);
            assert!(o.err.starts_with("meshd: ") && o.err.contains(message), "{}", o.err);
            assert_eq!(o.err.lines().count(), 1, "{}", o.err);
        }
    }
}

#[test]
fn a_wrong_nodes_file_is_exit_2_with_its_own_place() {
    let overlap = NODES.replace("10.42.2.0/24", "10.42.0.0/16");
    let (_dir, config, nodes) = files("node-name: a\nnodes-file: NODES\n", &overlap);
    let o = outcome(&mut meshd(&["config", "check", &config]));
    assert_eq!(o.code, 2);
    let message = "subnet 10.42.0.0/16 of node `b` overlaps 10.42.1.0/24 of node `a`; change one of them";
    assert!(o.err.contains(&format!("{nodes}:3:")) && o.err.contains(message), "{}", o.err);

    let (_dir, config, nodes) = files("node-name: c\nnodes-file: NODES\n", NODES);
    let o = outcome(&mut meshd(&["config", "check", &config]));
    assert_eq!(o.code, 2);
    let message = format!("{nodes}: nodes-file has no entry named c; it has a, b; set node-name or add it");
    assert!(o.err.contains(&message), "{}", o.err);

    let (_dir, config, _) = files("node-name: a\nnodes-file: /nowhere/nodes.yaml\n", NODES);
    let o = outcome(&mut meshd(&["config", "check", &config]));
    assert_eq!(o.code, 2);
    assert!(o.err.contains("cannot read the nodes-file: /nowhere/nodes.yaml: No such file"), "{}", o.err);
}

#[test]
fn the_packaged_configuration_is_good_also_with_everything_switched_on() {
    let packaged = include_str!("../packaging/config.yaml");
    let all: String = packaged
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) && key.contains(": ") => {
                key.to_owned() + "\n"
            }
            _ => line.to_owned() + "\n",
        })
        // what the check opens is not on this machine
        .filter(|line| !["nodes-file", "bfd-auth-key-file"].iter().any(|key| line.starts_with(key)))
        .collect();
    assert!(all.contains("\nnode-name: one"), "{all}");
    for text in [packaged, &all] {
        let (_dir, config, _) = files(text, NODES);
        let o = outcome(&mut meshd(&["config", "check", &config]));
        assert_eq!((o.code, o.err.as_str()), (0, ""), "{text}");
    }
}

#[test]
fn a_named_file_has_to_exist() {
    for args in [["run", "--config", "/nowhere/c.yaml"], ["config", "check", "/nowhere/c.yaml"]] {
        let o = outcome(&mut meshd(&args));
        assert_eq!(o.code, 2);
        assert!(o.err.contains("/nowhere/c.yaml: No such file"), "{}", o.err);
    }
    let dir = tempfile::tempdir().unwrap();
    let o = outcome(&mut meshd(&["config", "check", &dir.path().display().to_string()]));
    assert_eq!(o.code, 2);
    assert!(o.err.contains("not a regular file"), "{}", o.err);
}

#[test]
fn run_needs_a_node_list() {
    let (_dir, config, _) = files("node-name: a\n", NODES);
    let o = outcome(&mut meshd(&["run", "--config", &config]));
    assert_eq!(o.code, 2);
    assert!(o.err.contains("--nodes-file FILE"), "{}", o.err);
    let o = outcome(&mut meshd(&["config", "check", &config]));
    assert_eq!(o.code, 0);
    assert!(o.out.contains("no nodes-file"), "{}", o.out);
}

#[test]
fn a_bad_flag_and_a_bad_variable_are_named() {
    let (_dir, config, _) = files("node-name: a\nport: 1\n", NODES);
    let o = outcome(meshd(&["run", "--config", &config]).env("MESHD_PORT", "x"));
    assert_eq!(o.code, 2);
    assert!(o.err.contains("environment variable MESHD_PORT: `port` cannot be `x`"), "{}", o.err);
    let o = outcome(meshd(&["run", "--config", &config, "--port", "0"]).env("MESHD_PORT", "x"));
    assert_eq!(o.code, 2);
    assert!(o.err.contains("flag --port: `port` cannot be `0`"), "{}", o.err);
    // a switch needs no value, and takes one
    for (switch, fault) in [
        (&["--cluster-init", "--log", "debgu"][..], "--log"),
        (&["--cluster-init", "false", "--log", "debgu"], "--log"),
        (&["--cluster-init", "x"], "--cluster-init"),
    ] {
        let o = outcome(&mut meshd(&[&["server"], switch].concat()));
        assert_eq!(o.code, 2);
        assert!(o.err.contains(&format!("flag {fault}:")), "{switch:?}: {}", o.err);
    }
    let o = outcome(meshd(&["config", "check", &config]).env("MESHD_PORT", "4789").env("MESHD_PROT", "1"));
    assert_eq!(o.code, 0);
    assert!(o.out.contains("UDP port 4789"), "{}", o.out);
    assert!(o.err.contains("MESHD_PROT is not a setting; did you mean MESHD_PORT?"), "{}", o.err);
}

#[test]
fn wrong_usage_is_exit_2_and_help_is_not() {
    for args in
        [&[][..], &["fly"], &["run", "--fly"], &["run", "--port", "1", "--port", "2"], &["config"], &["run", "x"]]
    {
        let o = outcome(&mut meshd(args));
        assert_eq!((o.code, o.out.as_str()), (2, ""), "{args:?}");
        assert!(o.err.contains("Usage: meshd"), "{args:?}: {}", o.err);
    }
    let o = outcome(&mut meshd(&["--version"]));
    assert_eq!((o.code, o.out.as_str()), (0, concat!("meshd ", env!("CARGO_PKG_VERSION"), "\n")));
    let o = outcome(&mut meshd(&["--help"]));
    assert_eq!(o.code, 0);
    for word in ["Examples:", "meshd config check", "Exit codes: 0", "nodes:"] {
        assert!(o.out.contains(word), "{word}");
    }
}

#[test]
fn every_key_is_a_flag_with_help() {
    let o = outcome(&mut meshd(&["run", "--help"]));
    assert_eq!(o.code, 0);
    for key in meshd::config::KEYS {
        let value = if key.value == "true|false" { "[<true|false>]".to_owned() } else { format!("<{}>", key.value) };
        assert!(o.out.contains(&format!("--{} {value}", key.name)), "{}", key.name);
    }
}

#[test]
fn an_agent_without_anything_to_join_with_is_told_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().display().to_string();
    let agent = |more: &[&str]| {
        let args = [&["agent", "--node-name", "a", "--data-dir", &data][..], more].concat();
        outcome(&mut meshd(&args))
    };
    for (more, part) in [
        (&[][..], "`meshctl token create` on a server prints a token; set MESHD_TOKEN"),
        (&["--server", "https://10.9.0.1:9345"], "`server` alone lets nobody in"),
        (&["--token", "mesh1AAAA"], "flag --token: `token` cannot be `…`: the token is damaged"),
        (&["--token", "hush", "--token-file", "/nowhere/token"], "`token` is given in the same place; keep one"),
        (&["--token-file", "/nowhere/token"], "cannot read the token-file: /nowhere/token: No such file"),
    ] {
        let o = outcome_is_2(agent(more));
        assert!(o.contains(part), "{more:?}: {o}");
    }
    // it works, and somebody should know once who else can read it
    let o = agent(&["--token", "hush"]);
    let lines: Vec<_> = o.err.lines().collect();
    assert!(o.code == 2 && lines.len() == 2 && !o.err.contains("hush"), "{}", o.err);
    assert!(lines[0].contains("list of processes; use MESHD_TOKEN"), "{}", o.err);
    assert!(lines[1].contains("give --server https://HOST:9345 with it"), "{}", o.err);
    let file = dir.path().join("token");
    std::fs::write(&file, "mesh1 AAAA\n").unwrap();
    let o = outcome_is_2(agent(&["--token-file", &file.display().to_string()]));
    assert!(o.contains(&format!("token-file {}: the token has a blank", file.display())), "{o}");
    let mut piped = meshd(&["agent", "--node-name", "a", "--data-dir", &data, "--token-file", "-"]);
    let o = outcome_is_2(outcome(piped.write_stdin("mesh1AAAA\n")));
    assert!(o.contains("token-file -: the token is damaged"), "{o}");
}

fn outcome_is_2(o: Outcome) -> String {
    assert_eq!((o.code, o.out.as_str()), (2, ""), "{}", o.err);
    assert_eq!(o.err.lines().count(), 1, "{}", o.err);
    o.err
}

/// Whoever starts another role than the one it joined as, or under another name, would make a second cluster, or a second node.
#[test]
fn a_node_that_has_joined_stays_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().display().to_string();
    std::fs::create_dir(dir.path().join("agent")).unwrap();
    std::fs::write(dir.path().join("agent/membership.json"), r#"{"name":"a","role":"agent"}"#).unwrap();
    let started = |args: &[&str]| outcome_is_2(outcome(&mut meshd(&[args, &["--data-dir", &data]].concat())));
    let o = started(&["server", "--node-name", "a"]);
    assert!(o.contains("as `agent`, so start `meshd agent`") && o.contains("meshctl leave"), "{o}");
    let o = started(&["agent", "--node-name", "b"]);
    assert!(o.contains("joined as `a`, so `node-name` cannot be `b`"), "{o}");
    assert!(!dir.path().join("server").exists(), "nothing was made");
}
