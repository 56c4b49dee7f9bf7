//! Liveness in the clear with keys: who has none, or another, is not heard, and keys change without a flap.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::captured::{capture, ends, has_tshark, tshark};
use crate::mesh::{Builder, Node, skipped};
use crate::namespace::until;

fn state(node: &Node, of: &str) -> String {
    let peers = node.json(&["peers"]);
    let peer = peers.as_array().unwrap().iter().find(|peer| peer["name"] == of).unwrap();
    peer["state"].as_str().unwrap().to_owned()
}

fn write(path: &Path, keys: &str) {
    fs::write(path, keys).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
}

#[test]
fn who_has_another_key_is_not_heard() {
    let story = "who_has_another_key_is_not_heard";
    let Some(mesh) = Builder::new(story) else { return };
    if !has_tshark() {
        return skipped(story, "`tshark` is not installed");
    }
    let mesh = mesh.node("a").node("b").node("c").build();
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    let key_of = |node: &Node| mesh.dir().join(format!("{}.keys", node.ns.name()));
    for (node, keys) in [(a, "7 correct-horse\n"), (b, "7 correct-horse\n"), (c, "7 battery-staple\n")] {
        write(&key_of(node), keys);
        node.set("bfd-auth-key-file", Some(&key_of(node).display().to_string()));
    }
    mesh.start();
    until("a and b know each other", || state(a, "b") == "up" && state(b, "a") == "up");
    until("c is refused", || a.drops("bfd_not_authentic") > 2 && c.drops("bfd_not_authentic") > 2);
    assert_eq!([state(a, "c"), state(c, "a")], ["unknown"; 2]);
    assert!(!fs::read_to_string(a.config()).unwrap().contains("correct-horse") && !a.log().contains("correct-horse"));
    assert!(a.log().contains("by the keys 7 of"), "{}", a.log());

    let file = mesh.dir().join("bfd.pcapng");
    let running = capture(a, &file, &["--outer"]);
    sleep(Duration::from_secs(1));
    ends(running);
    let fields = ["bfd.auth.type", "bfd.auth.len", "bfd.auth.key", "bfd.auth.seq_num", "bfd.message_length"];
    let seen = tshark(&file, "bfd && ip.src==10.9.0.1 && !_ws.malformed", &fields);
    let rows: Vec<Vec<u64>> = seen.iter().map(|row| row.split(' ').map(number).collect()).collect();
    assert!(rows.len() > 5 && rows.iter().all(|row| row[..3] == [5, 28, 7] && row[4] == 52), "{seen:?}");

    // the key changes, a node at a time, and both sides stay up
    let stages = ["7 correct-horse\n8 tr0ub4dor\n", "8 tr0ub4dor\n7 correct-horse\n", "8 tr0ub4dor\n"];
    for stage in stages {
        for node in [a, b] {
            write(&key_of(node), stage);
            node.signal(Signal::SIGHUP);
            let ids: String = stage.lines().map(|line| &line[..1]).collect::<Vec<_>>().join(", ");
            until("it is taken over", || node.log().contains(&format!("by the keys {ids} of")));
            let since = Instant::now();
            while since.elapsed() < Duration::from_millis(1_500) {
                assert_eq!([state(a, "b"), state(b, "a")], ["up"; 2]);
                sleep(Duration::from_millis(50));
            }
        }
    }
    assert!(!a.log().contains("does not answer") && !b.log().contains("does not answer"));
    // what is damaged is named, and changes nothing
    fs::write(key_of(a), "tr0ub4dor\n").unwrap();
    a.signal(Signal::SIGHUP);
    until("it is refused", || a.reasons().contains("line 1 is no key"));
    assert!(a.reasons().contains("the former keys stay") && !a.log().contains("tr0ub4dor"), "{}", a.reasons());
    assert_eq!(state(a, "b"), "up");
    // and it is no start either
    fs::set_permissions(key_of(c), PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(c.stop(), 0);
    let refused = c.try_meshd("run");
    assert!(refused.code == 2 && refused.err.contains("others may read the keys of BFD (mode 644)"), "{refused:?}");
    // the third learns the key, and is one of them
    write(&key_of(c), "8 tr0ub4dor\n");
    write(&key_of(a), "8 tr0ub4dor\n");
    c.restart();
    until("all are up", || state(c, "a") == "up" && state(b, "c") == "up");
    mesh.balances();
}

fn number(text: &str) -> u64 {
    let digits = text.strip_prefix("0x");
    digits.map_or_else(|| text.parse(), |digits| u64::from_str_radix(digits, 16)).unwrap_or_else(|_| panic!("{text}"))
}
