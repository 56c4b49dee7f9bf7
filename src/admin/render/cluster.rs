//! How what the servers answer looks to a person, and the commands that a token comes with.

use std::fmt::Write;

use serde_json::Value;

use super::{Grid, Look, Paint, clean, dash};
use crate::admin::protocol::{ForeignView, TokenView};
use crate::membership::link::AuditLine;

/// `meshctl token list`.
pub fn tokens(tokens: &[TokenView], look: Look) -> String {
    if tokens.is_empty() {
        return "No tokens: `meshctl token create` makes one.\n".to_owned();
    }
    let mut grid = Grid::new(&["ID", "ROLE", "NODE", "EXPIRES", ">USES LEFT", "CREATED", "DESCRIPTION"]);
    for token in tokens {
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(dash);
        let (expires, paint) = match token.revoked {
            true => ("revoked".to_owned(), Paint::Warn),
            false => (token.expires_at.clone().unwrap_or_else(|| "never".to_owned()), Paint::Plain),
        };
        grid.row(
            paint,
            vec![
                token.id.clone(),
                or_dash(&token.role),
                token.node.clone().unwrap_or_else(|| "any".to_owned()),
                expires,
                token.uses_left.map_or_else(|| "unlimited".to_owned(), |left| left.to_string()),
                or_dash(&token.created_at),
                or_dash(&token.description.clone().filter(|text| !text.is_empty())),
            ],
        );
    }
    grid.draw(look)
}

/// `meshctl cluster audit`.
pub fn audit(lines: &[AuditLine], look: Look) -> String {
    let mut grid = Grid::new(&["TIME", "WHAT", "NODE", "TOKEN", "FROM"]);
    for line in lines {
        let paint = if line.what.starts_with("refuse") { Paint::Warn } else { Paint::Plain };
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(dash);
        let cells =
            [Some(line.at.clone()), Some(line.what.clone()), line.node.clone(), line.token.clone(), line.from.clone()];
        grid.row(paint, cells.iter().map(or_dash).collect());
    }
    grid.draw(look)
}

/// `meshctl cluster status`: what there is, a line each, lists and mappings flattened.
pub fn status(status: &Value, look: Look) -> String {
    let mut out = String::new();
    let Value::Object(fields) = status else { return format!("{}\n", clean(&status.to_string())) };
    for (key, value) in fields {
        match value {
            Value::Array(items) if key == "warnings" => {
                for item in items {
                    let _ = writeln!(out, "{}: {}", Paint::Warn.on("warning", look), word(item));
                }
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                let _ = writeln!(out, "{key:<12}{}", items.len());
                for item in items {
                    let _ = writeln!(out, "{:<12}{}", "", word(item));
                }
            }
            _ => {
                let _ = writeln!(out, "{key:<12}{}", word(value));
            }
        }
    }
    out
}

/// Whether what `meshctl cluster status` shows is good.
pub fn is_good(status: &Value) -> bool {
    let has = |key: &str| status.get(key).is_some_and(|value| !value.is_null() && value != &Value::Bool(true));
    let warns = status.get("warnings").and_then(Value::as_array).is_some_and(|warnings| !warnings.is_empty());
    !has("problem") && !has("connected") && !warns
}

fn word(value: &Value) -> String {
    let text = match value {
        Value::Null => dash(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(word).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| format!("{key} {}", word(value))).collect::<Vec<_>>().join("  ")
        }
        other => other.to_string(),
    };
    clean(&text)
}

/// `meshctl node commands`: what a shell may be given, the notes as its comments.
pub fn recipe(foreign: &ForeignView) -> String {
    let notes = foreign.notes.iter().map(|note| format!("# {}\n", clean(note)));
    notes.chain(foreign.commands.iter().map(|command| format!("{}\n", clean(command)))).collect()
}

/// `meshctl token create --print-join`: one line to paste. The token is in the environment, where no list of processes
/// shows it.
pub fn join_line(token: &str, role: &str) -> String {
    format!("MESHD_TOKEN={token} meshd {role}\n")
}

/// `meshctl token create --print-script`: the same with what has to be there first; it may run twice.
pub fn join_script(token: &str, role: &str) -> String {
    format!(
        r#"#!/bin/sh
# Makes this machine a node of the cluster. Run it as root; running it again changes nothing.
set -eu
umask 077
say() {{ echo "meshd: $*" >&2; }}
[ "$(id -u)" = 0 ] || {{ say "run this as root"; exit 1; }}
command -v meshd >/dev/null || {{ say "meshd is not installed here: install its package first, then run this again"; exit 1; }}
[ -c /dev/net/tun ] || modprobe tun || {{ say "there is no /dev/net/tun"; exit 1; }}
if [ -e /var/lib/meshd/agent/membership.json ]; then
    say "this machine is a node already"
    exit 0
fi
MESHD_TOKEN='{token}'
export MESHD_TOKEN
if [ -d /run/systemd/system ] && systemctl cat meshd.service >/dev/null 2>&1; then
    mkdir -p /etc/meshd
    printf '%s\n' "$MESHD_TOKEN" >/etc/meshd/token
    printf 'ROLE={role}\nMESHD_TOKEN_FILE=/etc/meshd/token\n' >/etc/default/meshd
    systemctl enable meshd.service
    systemctl restart meshd.service
    exec meshctl status --wait 60s
fi
exec meshd {role}
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tokens_are_a_table() {
        let list = [
            TokenView {
                id: "t1".to_owned(),
                role: Some("agent".to_owned()),
                uses_left: Some(2),
                ..TokenView::default()
            },
            TokenView { id: "t2".to_owned(), node: Some("b".to_owned()), revoked: true, ..TokenView::default() },
        ];
        let expected = "\
ID  ROLE   NODE  EXPIRES  USES LEFT  CREATED  DESCRIPTION
t1  agent  any   never            2  -        -
t2  -      b     revoked  unlimited  -        -
";
        assert_eq!(tokens(&list, Look::default()), expected);
        assert!(tokens(&[], Look::default()).contains("token create"));
    }

    #[test]
    fn the_audit_log_is_a_table() {
        let at = "2026-11-20T09:00:00Z".to_owned();
        let line = AuditLine { at, what: "join".to_owned(), node: Some("a".to_owned()), token: None, from: None };
        let expected = "\
TIME                  WHAT  NODE  TOKEN  FROM
2026-11-20T09:00:00Z  join  a     -      -
";
        assert_eq!(audit(&[line], Look::default()), expected);
    }

    #[test]
    fn a_cluster_is_told_line_by_line() {
        let good =
            json!({"cluster": "c", "servers": [{"name": "a", "state": "ready"}], "tolerance": 0, "warnings": []});
        let text = status(&good, Look::default());
        assert!(text.contains("cluster     c\n") && text.contains("name a  state ready\n"), "{text}");
        assert!(is_good(&good));
        let bad = json!({"connected": false, "problem": "no server\u{1b}[0m", "warnings": ["x"]});
        assert!(!is_good(&bad) && !is_good(&json!({"connected": true, "warnings": ["x"]})));
        let text = status(&bad, Look::default());
        assert!(text.contains("warning: x\n") && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn printed_commands_keep_the_token_out_of_argument_lists() {
        assert_eq!(join_line("mesh1X", "agent"), "MESHD_TOKEN=mesh1X meshd agent\n");
        let script = join_script("mesh1X", "server");
        assert!(script.starts_with("#!/bin/sh\n") && script.contains("exec meshd server"));
        assert!(script.lines().filter(|line| line.contains("mesh1X")).all(|line| line == "MESHD_TOKEN='mesh1X'"));
    }
}
