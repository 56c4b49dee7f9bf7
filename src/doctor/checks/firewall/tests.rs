use super::*;

use serde_json::json;

const UDP: Probe<'static> = Probe { protocol: "udp", port: Some(8472), device: "ul0", hook: "input", v6: false };

fn chain(name: &str, hook: Option<(&str, &str)>) -> Value {
    let mut chain = json!({"family": "inet", "table": "filter", "name": name});
    if let Some((hook, policy)) = hook {
        chain["type"] = "filter".into();
        chain["hook"] = hook.into();
        chain["prio"] = 0.into();
        chain["policy"] = policy.into();
    }
    json!({"chain": chain})
}

fn rule(chain: &str, expressions: Value) -> Value {
    json!({"rule": {"family": "inet", "table": "filter", "chain": chain, "handle": 7, "expr": expressions}})
}

fn dport(right: Value) -> Value {
    json!({"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": right}})
}

fn meta(key: &str, right: Value) -> Value {
    json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}})
}

fn state(right: Value) -> Value {
    json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": right}})
}

fn saddr() -> Value {
    json!({"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.9.0.2"}})
}

fn fate(policy: &str, rules: Vec<Value>) -> Fate {
    let mut items = vec![json!({"metainfo": {}}), chain("in", Some(("input", policy))), chain("sub", None)];
    items.extend(rules);
    nft(&json!({"nftables": items}).to_string(), UDP).unwrap()
}

/// `Some(certain)` where it is dropped.
fn dropped(fate: Fate) -> Option<bool> {
    match fate {
        Fate::Passes => None,
        Fate::Dropped { certain, .. } => Some(certain),
    }
}

#[test]
fn a_drop_rule_is_found_and_named() {
    let drop = |right| rule("in", json!([dport(right), {"counter": null}, {"drop": null}]));
    let Fate::Dropped { certain: true, by, fix } = fate("accept", vec![drop(json!(8472))]) else { panic!("it passes") };
    assert_eq!(by, "`rule 7: udp dport 8472 drop` in inet filter in");
    assert_eq!(fix, "nft insert rule inet filter in udp dport 8472 accept");
    for hit in [json!({"set": [53, 8472]}), json!({"range": [8000, 9000]}), json!({"set": [{"range": [1, 9000]}]})] {
        assert_eq!(dropped(fate("accept", vec![drop(hit.clone())])), Some(true), "{hit}");
    }
    for miss in [json!(8473), json!({"set": [53, 80]}), json!({"range": [1, 8471]})] {
        assert_eq!(dropped(fate("accept", vec![drop(miss.clone())])), None, "{miss}");
    }
    let accept = rule("in", json!([dport(json!(8472)), {"accept": null}]));
    assert_eq!(dropped(fate("accept", vec![accept, drop(json!(8472))])), None, "the advice helps");
    let tcp = json!({"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 8472}});
    assert_eq!(dropped(fate("accept", vec![rule("in", json!([tcp, {"drop": null}]))])), None);
}

#[test]
fn a_policy_of_drop_needs_a_rule_that_lets_in() {
    let accept = |conditions: Value| {
        let mut all = conditions.as_array().unwrap().clone();
        all.push(json!({"accept": null}));
        rule("in", Value::from(all))
    };
    assert_eq!(dropped(fate("drop", vec![])), Some(true));
    assert_eq!(dropped(fate("drop", vec![accept(json!([state(json!(["established", "related"]))]))])), Some(true));
    assert_eq!(dropped(fate("drop", vec![accept(json!([meta("iifname", json!("lo"))]))])), Some(true));
    assert_eq!(
        dropped(fate("drop", vec![accept(json!([meta("l4proto", json!({"set": ["tcp", "icmp"]}))]))])),
        Some(true)
    );
    assert_eq!(dropped(fate("drop", vec![accept(json!([meta("iifname", json!("ul*"))]))])), None);
    assert_eq!(dropped(fate("drop", vec![accept(json!([dport(json!(8472))]))])), None);
    let members = accept(json!([saddr(), dport(json!(8472))]));
    assert_eq!(dropped(fate("drop", vec![members])), Some(false), "who is let in is not known");
}

#[test]
fn jumps_are_followed() {
    let jump = |kind: &str| rule("in", json!([{kind: {"target": "sub"}}]));
    let drop = rule("sub", json!([dport(json!(8472)), {"drop": null}]));
    let accept = rule("sub", json!([dport(json!(8472)), {"accept": null}]));
    let back = rule("sub", json!([{"return": null}]));
    assert_eq!(dropped(fate("accept", vec![jump("jump"), drop.clone()])), Some(true));
    assert_eq!(dropped(fate("drop", vec![jump("jump"), accept.clone()])), None);
    assert_eq!(dropped(fate("drop", vec![jump("goto"), accept])), None);
    assert_eq!(dropped(fate("accept", vec![jump("jump"), back, drop])), None);
    let looped = rule("sub", json!([{"jump": {"target": "sub"}}]));
    assert_eq!(dropped(fate("accept", vec![jump("jump"), looped])), None);
}

#[test]
fn what_is_not_understood_is_no_fault() {
    let strange = rule("in", json!([{"xt": {"type": "match", "name": "recent"}}, {"drop": null}]));
    assert_eq!(dropped(fate("accept", vec![strange])), None);
    let blocked = rule("in", json!([saddr(), {"drop": null}]));
    assert_eq!(dropped(fate("accept", vec![blocked])), None);
    assert_eq!(nft("no json", UDP), None);
    assert_eq!(nft("{}", UDP), None);
    // another family's, and another hook's
    let v6 = json!({"nftables": [{"chain": {"family": "ip6", "table": "t", "name": "in", "type": "filter",
        "hook": "input", "prio": 0, "policy": "drop"}}]});
    assert_eq!(nft(&v6.to_string(), UDP), Some(Fate::Passes));
    assert_eq!(nft(&v6.to_string(), Probe { v6: true, ..UDP }).and_then(dropped), Some(true));
    assert_eq!(nft(&v6.to_string(), Probe { v6: true, hook: "forward", ..UDP }), Some(Fate::Passes));
}

#[test]
fn iptables_is_read_as_it_is_saved() {
    let save = |policy: &str, rules: &str| {
        format!(
            "# x\n*nat\n:INPUT DROP [0:0]\nCOMMIT\n*filter\n:INPUT {policy} [0:0]\n:FORWARD DROP [0:0]\n:F2B - [0:0]\n{rules}\nCOMMIT\n"
        )
    };
    let of = |policy: &str, rules: &str| iptables(&save(policy, rules), UDP).and_then(dropped);
    assert_eq!(of("ACCEPT", ""), None);
    assert_eq!(of("DROP", ""), Some(true));
    assert_eq!(of("ACCEPT", "-A INPUT -p udp -m udp --dport 8472 -j DROP"), Some(true));
    assert_eq!(of("ACCEPT", "-A INPUT -p udp -m udp --dport 8473 -j DROP"), None);
    assert_eq!(of("ACCEPT", "-A INPUT -p tcp -m tcp --dport 8472 -j DROP"), None);
    assert_eq!(
        of("ACCEPT", "-A INPUT -p udp -m multiport --dports 53,8000:9000 -j REJECT --reject-with x"),
        Some(true)
    );
    assert_eq!(of("DROP", "-A INPUT -p udp -m udp --dport 8472 -m comment --comment \"the mesh\" -j ACCEPT"), None);
    assert_eq!(of("DROP", "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"), Some(true));
    assert_eq!(of("DROP", "-A INPUT -i lo -j ACCEPT"), Some(true));
    assert_eq!(of("DROP", "-A INPUT ! -i lo -j ACCEPT"), None);
    assert_eq!(of("DROP", "-A INPUT -s 10.9.0.2/32 -p udp -m udp --dport 8472 -j ACCEPT"), Some(false));
    assert_eq!(of("ACCEPT", "-A INPUT -j F2B\n-A F2B -p udp -m udp --dport 8472 -j DROP"), Some(true));
    assert_eq!(of("ACCEPT", "-A INPUT -j F2B\n-A F2B -j RETURN\n-A F2B -j DROP"), None);
    let forward = Probe { port: None, device: "mesh0", hook: "forward", ..UDP };
    let Some(Fate::Dropped { certain: true, fix, .. }) = iptables(&save("ACCEPT", ""), forward) else { panic!() };
    assert_eq!(fix, "iptables -I FORWARD -i mesh0 -j ACCEPT");
    let open = save("ACCEPT", "-A FORWARD -i mesh+ -j ACCEPT");
    assert_eq!(iptables(&open, forward), Some(Fate::Passes));
    assert_eq!(iptables("", UDP), None);
}
