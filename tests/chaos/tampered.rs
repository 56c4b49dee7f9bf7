//! Each way in which a history can be wrong is found: the check is worth nothing otherwise.

use std::collections::BTreeSet;

use super::history::{Answer, Entry, Node, Token, What, check};

fn at(time: u64, what: What) -> Entry {
    Entry { start: time, end: time + 5, what }
}

fn text(text: &str) -> String {
    text.to_owned()
}

fn node(n: u32, name: &str, draining: bool) -> Node {
    Node { id: format!("id{n}"), name: text(name), subnets: vec![format!("10.64.{n}.0/24")], draining }
}

fn join(time: u64, token: &str, name: &str, answer: Answer) -> Entry {
    at(time, What::Join { server: text("b"), token: text(token), name: text(name), answer })
}

fn joined(n: u32) -> Answer {
    Answer::Joined { id: format!("id{n}") }
}

fn refused(code: &str) -> Answer {
    Answer::Refused { code: text(code) }
}

/// A history in which all is well.
fn good() -> Vec<Entry> {
    let a = || text("a");
    let token = |time, id: &str, single| at(time, What::Token { server: a(), id: text(id), single });
    let nodes = vec![node(1, "resident", true), node(2, "winner", false), node(4, "lucky", false)];
    let tokens = vec![
        Token { id: text("many"), uses_left: None, revoked: true },
        Token { id: text("one"), uses_left: Some(0), revoked: false },
    ];
    let mut all = vec![
        token(10, "one", true),
        token(20, "many", false),
        join(30, "one", "winner", joined(2)),
        join(31, "one", "winner", joined(2)),
        join(32, "one", "loser", refused("token-used-up")),
        join(40, "many", "gone", joined(3)),
        join(41, "many", "lucky", Answer::Unknown { why: text("lost") }),
        at(50, What::Revoke { server: a(), token: text("many"), done: true }),
        join(60, "many", "late", refused("token-revoked")),
        at(70, What::Remove { server: a(), name: text("gone"), done: true }),
        at(80, What::Drain { server: a(), name: text("resident"), draining: false, done: true }),
        at(81, What::Drain { server: a(), name: text("resident"), draining: true, done: true }),
        at(90, What::Seen { server: a(), nodes: nodes.clone() }),
        at(95, What::Flow { from: text("p"), to: text("q"), sent: 1000, lost: 0, worst_gap_ms: 9 }),
    ];
    let ids: BTreeSet<String> = nodes.iter().map(|node| node.id.clone()).collect();
    for server in ["a", "b", "c"] {
        let (nodes, tokens) = (nodes.clone(), tokens.clone());
        all.push(at(100, What::End { server: text(server), nodes, tokens }));
    }
    all.push(at(101, What::Resident { name: text("resident"), connected: true, ids }));
    all
}

/// Changes what all servers tell in the end.
fn ends(history: &mut [Entry], change: impl Fn(&mut Vec<Node>, &mut Vec<Token>)) {
    for entry in history {
        match &mut entry.what {
            What::End { nodes, tokens, .. } => change(nodes, tokens),
            What::Resident { ids, .. } => {
                let mut nodes: Vec<Node> = ids.iter().map(|id| Node { id: id.clone(), ..node(0, id, false) }).collect();
                change(&mut nodes, &mut vec![]);
                *ids = nodes.into_iter().map(|node| node.id).collect();
            }
            _ => {}
        }
    }
}

#[test]
fn a_good_history_is_good() {
    assert_eq!(check(&good()), Vec::<String>::new());
}

#[test]
fn what_was_tampered_with_is_found() {
    type Tamper = fn(&mut Vec<Entry>);
    let ways: [(&str, Tamper); 18] = [
        ("winner joined as id2, which was acknowledged", |h| ends(h, |nodes, _| nodes.retain(|n| n.id != "id2"))),
        ("token many was acknowledged", |h| ends(h, |_, tokens| tokens.retain(|t| t.id != "many"))),
        ("many's revocation", |h| ends(h, |_, tokens| tokens.iter_mut().for_each(|t| t.revoked = false))),
        ("token one is revoked, which nobody", |h| {
            ends(h, |_, tokens| tokens.iter_mut().for_each(|t| t.revoked = true))
        }),
        ("gone's removal", |h| ends(h, |nodes, _| nodes.push(node(3, "gone", false)))),
        ("resident: what was last", |h| ends(h, |nodes, _| nodes.iter_mut().for_each(|n| n.draining = false))),
        ("may be used again", |h| {
            ends(h, |_, tokens| tokens.iter_mut().filter(|t| t.id == "one").for_each(|t| t.uses_left = Some(1)));
        }),
        ("for one node, and let in 2", |h| h.push(join(33, "one", "second", joined(9)))),
        ("for one node, and let in 2", |h| {
            h.push(join(33, "one", "second", Answer::Unknown { why: text("lost") }));
            ends(h, |nodes, _| nodes.push(node(9, "second", false)));
        }),
        ("let nobody in", |h| {
            ends(h, |nodes, _| nodes.retain(|n| n.id != "id2"));
            h.iter_mut().for_each(|entry| {
                if let What::Join { token, answer, .. } = &mut entry.what
                    && token == "one"
                {
                    *answer = refused("token-used-up");
                }
            });
        }),
        ("one node and was given the ids", |h| h.push(join(34, "one", "winner", joined(8)))),
        ("joined with token many, which was revoked before", |h| h.push(join(61, "many", "later", joined(7)))),
        ("for no reason: bad-token", |h| h.push(join(45, "many", "early", refused("bad-token")))),
        ("for no reason: token-revoked", |h| h.push(join(35, "many", "early", refused("token-revoked")))),
        ("different nodes or tokens", |h| {
            if let Some(Entry { what: What::End { nodes, .. }, .. }) =
                h.iter_mut().rfind(|entry| matches!(entry.what, What::End { .. }))
            {
                nodes.clear();
            }
        }),
        ("10.64.2.0/24 is", |h| {
            h.push(at(
                92,
                What::Seen {
                    server: text("c"),
                    nodes: vec![node(2, "x", false)].into_iter().map(|n| Node { id: text("id5"), ..n }).collect(),
                },
            ))
        }),
        ("1 of 1000 packets", |h| {
            h.iter_mut().for_each(|entry| {
                if let What::Flow { lost, .. } = &mut entry.what {
                    *lost = 1;
                }
            })
        }),
        ("resident ends connected: false", |h| {
            h.iter_mut().for_each(|entry| {
                if let What::Resident { connected, .. } = &mut entry.what {
                    *connected = false;
                }
            })
        }),
    ];
    for (expected, tamper) in ways {
        let mut history = good();
        tamper(&mut history);
        let wrong = check(&history);
        assert!(wrong.iter().any(|line| line.contains(expected)), "{expected}: {wrong:?}");
    }
}
