//! Whether the rules of a firewall let a packet in: nftables as JSON, iptables as `iptables-save` writes it.
//!
//! Walks the rules as the kernel does. A condition that is not understood may hold or not: a verdict is certain only when
//! it does not depend on one. Rules that nobody here can read are never called a fault.

use std::collections::HashMap;

use serde_json::Value;

/// The packet that is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe<'a> {
    /// `udp` or `tcp`.
    pub protocol: &'a str,
    /// Its destination port; `None`: of whatever flow.
    pub port: Option<u16>,
    /// The device it comes in on.
    pub device: &'a str,
    /// Where it is headed: `input` or `forward`.
    pub hook: &'a str,
    /// Whether it is IPv6.
    pub v6: bool,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It passes, as far as can be told.
    Passes,
    /// It is dropped, or may be: by what, and how to let it in.
    Dropped {
        /// Whether no condition that was not understood plays a part.
        certain: bool,
        /// The rule or policy.
        by: String,
        /// The command.
        fix: String,
    },
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Yes,
    No,
    Maybe,
}

impl Holds {
    fn and(self, other: Holds) -> Holds {
        match (self, other) {
            (Holds::No, _) | (_, Holds::No) => Holds::No,
            (Holds::Yes, Holds::Yes) => Holds::Yes,
            _ => Holds::Maybe,
        }
    }

    fn of(known: bool) -> Holds {
        if known { Holds::Yes } else { Holds::No }
    }

    fn not(self) -> Holds {
        match self {
            Holds::Yes => Holds::No,
            Holds::No => Holds::Yes,
            Holds::Maybe => Holds::Maybe,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Accept,
    Drop,
    Jump(String),
    Goto(String),
    Return,
    None,
}

#[derive(Debug, Clone)]
struct Rule {
    holds: Holds,
    action: Action,
    text: String,
}

/// A base chain, with everything that it can jump to.
struct Base<'a> {
    name: String,
    drops: bool,
    chains: &'a HashMap<String, Vec<Rule>>,
    start: &'a str,
    fix: String,
}

/// What walking a chain came to.
enum Walk {
    Accepted,
    Dropped {
        certain: bool,
        by: String,
    },
    /// The chain ended, or returned; whether something in it may have accepted.
    Through {
        maybe: bool,
    },
}

impl Base<'_> {
    fn fate(&self) -> Fate {
        let dropped = |certain, by| Fate::Dropped { certain, by, fix: self.fix.clone() };
        match self.walk(self.start, false, 0) {
            Walk::Accepted => Fate::Passes,
            Walk::Dropped { certain, by } => dropped(certain, by),
            Walk::Through { maybe } if self.drops => dropped(!maybe, format!("the policy drop of {}", self.name)),
            Walk::Through { .. } => Fate::Passes,
        }
    }

    /// A drop behind a condition that is not understood is left aside: it is most often meant for others (a blocklist).
    fn walk(&self, chain: &str, mut maybe: bool, depth: usize) -> Walk {
        // The kernel refuses loops; whatever is this deep is none of its rules.
        if depth > 16 {
            return Walk::Through { maybe: true };
        }
        for rule in self.chains.get(chain).into_iter().flatten().filter(|rule| rule.holds != Holds::No) {
            let sure = rule.holds == Holds::Yes;
            let walked = match &rule.action {
                Action::Accept => Walk::Accepted,
                Action::Drop => Walk::Dropped { certain: !maybe, by: format!("`{}` in {}", rule.text, self.name) },
                Action::Return if sure => break,
                Action::Return | Action::None => continue,
                Action::Jump(to) | Action::Goto(to) => self.walk(to, maybe, depth + 1),
            };
            match walked {
                Walk::Accepted | Walk::Dropped { .. } if sure => return walked,
                Walk::Accepted => maybe = true,
                Walk::Dropped { .. } => {}
                Walk::Through { maybe: now } => {
                    maybe = now;
                    if sure && matches!(rule.action, Action::Goto(_)) {
                        break;
                    }
                }
            }
        }
        Walk::Through { maybe }
    }
}

/// What nftables does with it.
pub fn nft(json: &str, probe: Probe<'_>) -> Option<Fate> {
    let document: Value = serde_json::from_str(json).ok()?;
    let items = document.get("nftables")?.as_array()?;
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let family_fits = |family: &str| family == "inet" || family == if probe.v6 { "ip6" } else { "ip" };
    let mut chains: HashMap<(String, String), HashMap<String, Vec<Rule>>> = HashMap::new();
    let mut bases = Vec::new();
    for item in items {
        if let Some(chain) = item.get("chain").filter(|chain| family_fits(&text(chain, "family"))) {
            let table = (text(chain, "family"), text(chain, "table"));
            chains.entry(table.clone()).or_default().entry(text(chain, "name")).or_default();
            if text(chain, "hook") == probe.hook && text(chain, "type") == "filter" {
                let priority = chain.get("prio").and_then(Value::as_i64).unwrap_or(0);
                bases.push((priority, table, text(chain, "name"), text(chain, "policy") == "drop"));
            }
        }
        if let Some(rule) = item.get("rule").filter(|rule| family_fits(&text(rule, "family"))) {
            let table = (text(rule, "family"), text(rule, "table"));
            let expressions = rule.get("expr").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let handle = rule.get("handle").and_then(Value::as_u64).unwrap_or_default();
            let rule = Rule { text: format!("rule {handle}: {}", words(expressions)), ..nft_rule(expressions, probe) };
            chains.entry(table).or_default().entry(text(item.get("rule")?, "chain")).or_default().push(rule);
        }
    }
    bases.sort_by_key(|(priority, ..)| *priority);
    let fates = bases.iter().filter_map(|(_, table, name, drops)| {
        let (family, table_name) = table;
        let lets_in = match probe.port {
            Some(port) => format!("{} dport {port} accept", probe.protocol),
            None => format!("iifname {} accept", probe.device),
        };
        let base = Base {
            name: format!("{family} {table_name} {name}"),
            drops: *drops,
            chains: chains.get(table)?,
            start: name,
            fix: format!("nft insert rule {family} {table_name} {name} {lets_in}"),
        };
        Some(base.fate())
    });
    Some(worst(fates))
}

/// Each base chain has its say; one that drops is enough.
fn worst(fates: impl Iterator<Item = Fate>) -> Fate {
    fates.fold(Fate::Passes, |worst, fate| match (&worst, &fate) {
        (Fate::Dropped { certain: true, .. }, _) => worst,
        (_, Fate::Dropped { .. }) => match (&worst, &fate) {
            (Fate::Dropped { .. }, Fate::Dropped { certain: false, .. }) => worst,
            _ => fate,
        },
        _ => worst,
    })
}

fn nft_rule(expressions: &[Value], probe: Probe<'_>) -> Rule {
    let mut rule = Rule { holds: Holds::Yes, action: Action::None, text: String::new() };
    for expression in expressions {
        let Some((kind, value)) = expression.as_object().and_then(|object| object.iter().next()) else { continue };
        let target = || value.get("target").and_then(Value::as_str).unwrap_or_default().to_owned();
        match kind.as_str() {
            "match" => rule.holds = rule.holds.and(nft_match(value, probe)),
            "accept" => rule.action = Action::Accept,
            "drop" | "reject" => rule.action = Action::Drop,
            "return" => rule.action = Action::Return,
            "jump" => rule.action = Action::Jump(target()),
            "goto" => rule.action = Action::Goto(target()),
            "counter" | "log" | "notrack" | "comment" | "mangle" => {}
            // `vmap`, `limit`, `xt` (a match or a target of iptables that nft cannot spell out), …
            "vmap" => {
                rule.holds = Holds::Maybe;
                rule.action = Action::Accept;
            }
            _ => rule.holds = rule.holds.and(Holds::Maybe),
        }
    }
    rule
}

fn nft_match(value: &Value, probe: Probe<'_>) -> Holds {
    let (Some(left), Some(right)) = (value.get("left"), value.get("right")) else { return Holds::Maybe };
    let at = |path: &str| left.pointer(path).and_then(Value::as_str);
    let holds = match (at("/payload/protocol"), at("/payload/field"), at("/meta/key"), at("/ct/key")) {
        (Some(protocol @ ("udp" | "tcp")), Some("dport"), ..) => {
            let port = probe.port.map_or(Holds::Maybe, |port| contains(right, &|v| number(v, port.into())));
            Holds::of(protocol == probe.protocol).and(port)
        }
        (Some("th"), Some("dport"), ..) => {
            probe.port.map_or(Holds::Maybe, |port| contains(right, &|v| number(v, port.into())))
        }
        (Some(protocol @ ("udp" | "tcp" | "icmp" | "icmpv6")), ..) => {
            Holds::of(protocol == probe.protocol).and(Holds::Maybe)
        }
        (Some("ip"), Some("protocol"), ..) | (_, _, Some("l4proto"), _) => {
            if probe.port.is_none() {
                Holds::Maybe
            } else {
                contains(right, &|v| word(v, probe.protocol))
            }
        }
        (_, _, Some("nfproto"), _) => contains(right, &|v| word(v, if probe.v6 { "ipv6" } else { "ipv4" })),
        (_, _, Some("iifname" | "iif"), _) => contains(right, &|v| device(v, probe.device)),
        // The first packet of a flow is what has to be let in.
        (.., Some("state")) => contains(right, &|v| word(v, "new")),
        _ => Holds::Maybe,
    };
    match value.get("op").and_then(Value::as_str) {
        Some("==" | "in") => holds,
        Some("!=") => holds.not(),
        _ => Holds::Maybe,
    }
}

/// Whether a value, a list or a set holds what `is` looks for.
fn contains(value: &Value, is: &dyn Fn(&Value) -> Holds) -> Holds {
    let list = value.as_array().or_else(|| value.get("set").and_then(Value::as_array));
    let Some(list) = list else { return is(value) };
    let any = |any: Holds, one: Holds| if any == Holds::Yes || one == Holds::No { any } else { one };
    list.iter().map(|value| contains(value, is)).fold(Holds::No, any)
}

fn number(value: &Value, wanted: u64) -> Holds {
    if let Some(range) = value.get("range").and_then(Value::as_array) {
        return match range.as_slice() {
            [from, to] => match (from.as_u64(), to.as_u64()) {
                (Some(from), Some(to)) => Holds::of((from..=to).contains(&wanted)),
                _ => Holds::Maybe,
            },
            _ => Holds::Maybe,
        };
    }
    value.as_u64().map_or(Holds::Maybe, |n| Holds::of(n == wanted))
}

fn word(value: &Value, wanted: &str) -> Holds {
    match value.as_str() {
        Some(word) if word.starts_with('@') => Holds::Maybe,
        Some(word) => Holds::of(word == wanted),
        None => Holds::Maybe,
    }
}

fn device(value: &Value, wanted: &str) -> Holds {
    match value.as_str() {
        Some(pattern) => device_fits(pattern, '*', wanted),
        None => Holds::Maybe,
    }
}

fn device_fits(pattern: &str, wild: char, wanted: &str) -> Holds {
    match pattern.strip_suffix(wild) {
        Some(front) => Holds::of(wanted.starts_with(front)),
        None => Holds::of(pattern == wanted),
    }
}

/// A rule in a few words: its conditions' right sides and its verdict.
fn words(expressions: &[Value]) -> String {
    let of = |expression: &Value| {
        let (kind, value) = expression.as_object()?.iter().next()?;
        if kind != "match" {
            return (kind != "counter").then(|| kind.clone());
        }
        let left = value.get("left")?;
        let name = ["/payload/field", "/meta/key", "/ct/key"].iter().find_map(|path| left.pointer(path)?.as_str());
        let front = left.pointer("/payload/protocol").and_then(Value::as_str).map(|p| format!("{p} "));
        let right = value.get("right")?.to_string().replace('"', "");
        let op = value.get("op").and_then(Value::as_str).filter(|op| *op == "!=").map_or("", |_| "!= ");
        Some(format!("{}{} {op}{right}", front.unwrap_or_default(), name.unwrap_or("?")))
    };
    expressions.iter().filter_map(of).collect::<Vec<_>>().join(" ")
}

/// What the filter table of `iptables-save` does with it.
pub fn iptables(text: &str, probe: Probe<'_>) -> Option<Fate> {
    let start = if probe.hook == "forward" { "FORWARD" } else { "INPUT" };
    let filter = text.split_once("*filter")?.1;
    let filter = filter.split_once("COMMIT").map_or(filter, |(filter, _)| filter);
    let mut chains: HashMap<String, Vec<Rule>> = HashMap::new();
    let mut drops = false;
    for line in filter.lines() {
        if let Some(policy) = line.strip_prefix(&format!(":{start} ")) {
            drops = policy.starts_with("DROP");
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
            chains.entry(chain.to_owned()).or_default().push(iptables_rule(line, rule, probe));
        }
    }
    let tool = if probe.v6 { "ip6tables" } else { "iptables" };
    let lets_in = match probe.port {
        Some(port) => format!("-p {} --dport {port}", probe.protocol),
        None => format!("-i {}", probe.device),
    };
    let fix = format!("{tool} -I {start} {lets_in} -j ACCEPT");
    let base = Base { name: format!("{tool} {start}"), drops, chains: &chains, start, fix };
    Some(base.fate())
}

fn iptables_rule(line: &str, rule: &str, probe: Probe<'_>) -> Rule {
    let mut parsed = Rule { holds: Holds::Yes, action: Action::None, text: line.to_owned() };
    let mut words = rule.split_ascii_whitespace();
    let mut negated = false;
    while let Some(word) = words.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        let holds = match word {
            "-p" => {
                let protocol = words.next();
                if probe.port.is_none() { Holds::Maybe } else { Holds::of(protocol == Some(probe.protocol)) }
            }
            "-i" => words.next().map_or(Holds::Maybe, |name| device_fits(name, '+', probe.device)),
            "--dport" | "--dports" => match (words.next(), probe.port) {
                (Some(ports), Some(port)) => Holds::of(ports.split(',').any(|range| in_range(range, port))),
                _ => Holds::Maybe,
            },
            "--ctstate" | "--state" => {
                words.next().map_or(Holds::Maybe, |states| Holds::of(states.split(',').any(|state| state == "NEW")))
            }
            "-m" => {
                // What these look at follows as words of its own.
                let known = ["udp", "tcp", "multiport", "conntrack", "state", "comment"];
                Holds::of(true).and(match words.next() {
                    Some(name) if known.contains(&name) => Holds::Yes,
                    _ => Holds::Maybe,
                })
            }
            "--comment" => {
                // A comment with blanks stands in quotes.
                let quoted = words.next().is_some_and(|word| word.starts_with('"') && !word[1..].ends_with('"'));
                if quoted {
                    words.by_ref().find(|word| word.ends_with('"'));
                }
                Holds::Yes
            }
            "-j" | "-g" => {
                parsed.action = match (words.next().unwrap_or_default(), word) {
                    ("ACCEPT", _) => Action::Accept,
                    ("DROP" | "REJECT", _) => Action::Drop,
                    ("RETURN", _) => Action::Return,
                    (chain, "-g") => Action::Goto(chain.to_owned()),
                    (chain, _) => Action::Jump(chain.to_owned()),
                };
                // The rest belongs to the target.
                break;
            }
            _ => Holds::Maybe,
        };
        parsed.holds = parsed.holds.and(if negated { holds.not() } else { holds });
        negated = false;
    }
    parsed
}

fn in_range(range: &str, port: u16) -> bool {
    let (from, to) = range.split_once(':').unwrap_or((range, range));
    let read = |text: &str, empty| if text.is_empty() { Some(empty) } else { text.parse().ok() };
    matches!((read(from, 0), read(to, u16::MAX)), (Some(from), Some(to)) if (from..=to).contains(&port))
}

#[cfg(test)]
mod tests;
