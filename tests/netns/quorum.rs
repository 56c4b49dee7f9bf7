//! Servers with an etcd of their own that come back one after the other, and what the first of them says while it is alone.

use serde_json::Value;

use crate::joined::{create, has_peers};
use crate::mesh::Node;
use crate::servers::{good, patiently_ready, power_off, three, until_slowly};

/// What a server answers at this path: HTTP status and body. 0: nothing listens.
pub(crate) fn asked(node: &Node, path: &str) -> (u16, String) {
    let command = format!("curl -sk -m 5 -w ' %{{http_code}}' https://127.0.0.1:9345{path} || true");
    let answer = node.ns.sh(&command);
    let (body, code) = answer.rsplit_once(' ').unwrap_or(("", "0"));
    (code.trim().parse().unwrap_or(0), body.to_owned())
}

#[test]
fn a_server_that_comes_back_alone_says_what_is_missing() {
    let story = "a_server_that_comes_back_alone_says_what_is_missing";
    let Some(mesh) = three(story) else { return };
    let [a, b, c] = mesh.three(["a", "b", "c"]);
    let d = mesh.node("d");
    d.token(Some(&create(a, &[])));
    d.restart();
    has_peers(d, 3);
    assert_eq!(asked(a, "/readyz").0, 200, "positive control");
    let copy = a.dir.join("data/server/copy.json");
    until_slowly("the copy is up to date", a, || {
        std::fs::read_to_string(&copy).is_ok_and(|text| text.contains(r#"\"name\":\"d\""#))
    });
    let mode = std::os::unix::fs::MetadataExt::mode(&copy.metadata().unwrap());
    assert_eq!(mode & 0o777, 0o600);
    for node in [a, b, c] {
        power_off(node);
    }

    a.token(None);
    a.spawn();
    until_slowly("it listens", a, || asked(a, "/livez").0 == 200);
    let sidecar = a.sidecar();
    let missing = |body: &str| {
        ["no quorum: 1 of its 3 members answer, and 2 have to", "`b`", "`c`", "start meshd there", "cluster-reset"]
            .iter()
            .all(|part| body.contains(part))
    };
    until_slowly("it says what is missing", a, || matches!(asked(a, "/readyz"), (503, body) if missing(&body)));
    until_slowly("also to people", a, || {
        let status = a.ctl(&["cluster", "status"]);
        status.code == 1 && missing(&status.out) && a.ctl(&["status"]).out.contains("no quorum")
    });
    let refused = a.ctl(&["token", "create"]);
    assert!(refused.code == 1 && refused.err.contains("no quorum"), "{refused:?}");
    // what it has on its disk
    assert_eq!(a.json(&["nodes"]).as_array().unwrap().len(), 4);
    until_slowly("the agent finds it", a, || {
        let member = d.json(&["status"])["membership"].clone();
        member["connected"] == true && member["server"].as_str().is_some_and(|server| server.contains("10.9.0.1"))
    });
    has_peers(d, 3);
    assert_eq!(asked(a, "/v1/servers").0, 405, "and no more than it can");

    b.token(None);
    b.spawn();
    until_slowly("it is ready by itself", a, || asked(a, "/readyz").0 == 200);
    assert_eq!(a.sidecar(), sidecar, "without a restart");
    patiently_ready(b);
    let token = create(a, &[]);
    c.token(None);
    c.spawn();
    for node in [a, b, c] {
        patiently_ready(node);
        good(node, "3 servers, 1 may fail");
    }
    let e = mesh.node("e");
    e.token(Some(&token));
    e.restart();
    has_peers(e, 4);
    let ids = |node: &Node| {
        let nodes: Vec<Value> = node.json(&["nodes"]).as_array().unwrap().iter().map(|n| n["id"].clone()).collect();
        nodes
    };
    assert_eq!(ids(a), ids(c));
}
