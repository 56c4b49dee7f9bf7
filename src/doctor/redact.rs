//! Takes secrets out of text that somebody will send to somebody else.
//!
//! Two nets, of which one would do: what is known to be secret is removed wherever it stands, and what looks like one is
//! removed although nobody knows it. Public keys are the exception, since they are known.

use crate::config::KEYS;

/// What replaces a secret.
pub const REMOVED: &str = "[removed]";

/// Keys of the configuration whose values are secret.
const SECRET_KEYS: &[&str] = &["token", "secret", "password", "preshared-key", "private-key", "auth-key"];
/// How those end that only name a file.
const FILES: &[&str] = &["-file", "-keyfile"];
/// What a join token starts with.
const TOKEN: &str = "mesh1";
/// Characters of a 32-byte key in base64.
const KEY_LEN: usize = 44;

/// What must not get out, and what may.
#[derive(Debug, Clone, Default)]
pub struct Redactor {
    secrets: Vec<String>,
    public: Vec<String>,
}

impl Redactor {
    /// Removes `secrets` wherever they stand, and keeps the keys in `public`.
    pub fn new(secrets: impl IntoIterator<Item = String>, public: impl IntoIterator<Item = String>) -> Self {
        // What is that short is in half of all words, and no secret worth the name.
        let secrets = secrets.into_iter().map(|s| s.trim().to_owned()).filter(|s| s.len() >= 4).collect();
        Redactor { secrets, public: public.into_iter().collect() }
    }

    /// Any text.
    pub fn text(&self, text: &str) -> String {
        let known = self.secrets.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), REMOVED));
        known.split_inclusive('\n').map(|line| self.line(line)).collect()
    }

    /// A configuration: the values of the keys that are known and no secret, however they are written. What is mistyped may
    /// be anything, and what is in a comment may have been a value yesterday.
    pub fn config(&self, text: &str) -> String {
        let mut out = String::new();
        let mut inside: Option<usize> = None;
        for line in text.lines() {
            let (bare, indent) = (line.trim(), line.len() - line.trim_start().len());
            // A value goes on in lines that are indented deeper, or are empty.
            if inside.is_some_and(|key| bare.is_empty() || indent > key || bare.starts_with("- ")) {
                continue;
            }
            inside = None;
            if bare.starts_with('#') {
                out += &format!("# {REMOVED}\n");
                continue;
            }
            let line = line.split(" #").next().unwrap_or_default();
            let item = bare.starts_with("- ");
            if bare.is_empty() || bare == "---" || item && !bare.contains(": ") && !sounds_secret(bare) {
                out += &format!("{line}\n");
                continue;
            }
            let Some((front, value)) = line.split_once(':').filter(|_| !item) else {
                out += &format!("{REMOVED}\n");
                continue;
            };
            let value = value.trim();
            let goes_on = value.is_empty() || value.starts_with(['>', '|']);
            let key = front.trim().trim_matches(['"', '\'']);
            match KEYS.iter().find(|known| known.name == key) {
                _ if indent > 0 && !sounds_secret(bare) => out += &format!("{line}\n"),
                Some(key) if !(key.secret || value.starts_with('{') && sounds_secret(value)) => {
                    out += &format!("{line}\n");
                }
                Some(key) if key.name == "datastore-endpoint" && !goes_on => {
                    out += &format!("{front}: {}\n", endpoint(value));
                }
                _ => {
                    inside = Some(indent);
                    out += &format!("{front}: {REMOVED}\n");
                }
            }
        }
        self.text(&out)
    }

    fn line(&self, line: &str) -> String {
        let is_part = |c: char| c.is_ascii_alphanumeric() || "+/=-_.".contains(c);
        let mut out = String::new();
        let mut rest = without_passwords(line);
        while let Some(start) = rest.find(is_part) {
            let end = rest[start..].find(|c| !is_part(c)).map_or(rest.len(), |len| start + len);
            let word = rest[start..end].to_owned();
            out += &rest[..start];
            out += if self.looks_secret(&word) { REMOVED } else { &word };
            rest = rest[end..].to_owned();
        }
        out + &rest
    }

    fn looks_secret(&self, word: &str) -> bool {
        let word = word.trim_matches(|c| c == '-' || c == '.');
        // `MESHD_TOKEN=mesh1…` and `key=AAAA…=` are one word each.
        let value = word
            .split_once('=')
            .map_or(word, |(_, value)| if value.is_empty() { word } else { value.trim_start_matches('=') });
        let candidates = [word, value];
        candidates.iter().any(|word| {
            let token = word.find(TOKEN).is_some_and(|at| word.len() - at > TOKEN.len() + 8);
            let key = word.len() == KEY_LEN && word.ends_with('=') && !self.public.iter().any(|public| public == word);
            token || key
        })
    }
}

/// Whether a key within a mapping may be one whose value is secret.
fn sounds_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    SECRET_KEYS.iter().any(|secret| key.contains(secret)) && !FILES.iter().any(|end| key.ends_with(end))
}

/// A datastore's address: its kind and its hosts, and nothing of what stands around them.
fn endpoint(value: &str) -> String {
    let value = value.trim_matches(['"', '\'']);
    let Some((scheme, rest)) = value.split_once("://") else { return REMOVED.to_owned() };
    // a password may hold what should have been percent-encoded, a `?` too
    if rest.split_once('?').is_some_and(|(_, options)| options.contains('@')) {
        return REMOVED.to_owned();
    }
    let (rest, options) = rest.split_once('?').unwrap_or((rest, ""));
    let options = if options.is_empty() { String::new() } else { format!("?{REMOVED}") };
    match rest.rsplit_once('@') {
        Some((_, hosts)) => format!("{scheme}://{REMOVED}@{hosts}{options}"),
        // what stands behind a colon and is no port may be a password whose end is missing
        None if hosts_alone(rest) => format!("{scheme}://{rest}{options}"),
        None => REMOVED.to_owned(),
    }
}

/// Whether a datastore's address without its scheme, user and options is hosts and ports, and a path behind them.
fn hosts_alone(rest: &str) -> bool {
    let hosts = rest.split('/').next().unwrap_or_default();
    let port = |host: &str| host.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_ok());
    hosts.split(',').all(|host| host.ends_with(']') || port(host))
}

/// `scheme://user:password@host` without what is before the `@`.
fn without_passwords(line: &str) -> String {
    let Some((front, behind)) = line.split_once("://") else { return line.to_owned() };
    // a password may hold what should have been percent-encoded: rather too much goes than too little
    let word = behind.find(|c: char| c.is_whitespace() || "\"'".contains(c)).unwrap_or(behind.len());
    let at = behind.get(..word).and_then(|word| word.rfind('@')).unwrap_or(0);
    let end = behind.get(at..).and_then(|rest| rest.find(|c: char| c.is_whitespace() || "\"'/,".contains(c)));
    let (authority, rest) = behind.split_at(end.map_or(behind.len(), |end| at + end));
    let host = authority.rsplit_once('@').map_or(authority.to_owned(), |(_, host)| format!("{REMOVED}@{host}"));
    format!("{front}://{host}{}", without_passwords(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "mesh1qqqsyqcyq5rqwzqfpg9scrgwpugpzysn";
    const KEY: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
    const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

    fn redactor() -> Redactor {
        Redactor::new(["a shared secret\n".to_owned()], [PUBLIC.to_owned()])
    }

    #[test]
    fn what_looks_secret_goes_wherever_it_stands() {
        for line in [
            format!("x {TOKEN} y\n"),
            format!("MESHD_TOKEN={TOKEN} meshd agent"),
            format!("{{\"token\":\"{TOKEN}\"}}"),
            format!("key {KEY}"),
            format!("key={KEY},"),
            format!("\"{KEY}\""),
            "with a shared secret in it".to_owned(),
            "mysql://root:hunter22@db:3306/x and postgres://u:hunter22@h".to_owned(),
            "mysql://root:hun/ter22,@hunter22@db:3306/x".to_owned(),
            "etcds://u:hunter22@h1,h2/where".to_owned(),
        ] {
            let text = redactor().text(&line);
            assert!(text.contains(REMOVED), "{text}");
            for secret in [TOKEN, KEY, "a shared secret", "hunter22"] {
                assert!(!text.contains(secret), "{text}");
            }
        }
    }

    #[test]
    fn what_is_not_secret_stays() {
        for line in [
            "etcd://h1,h2,h3/some/where and https://[fd00::1]:9345".to_owned(),
            format!("{{\"public_key\":\"{PUBLIC}\"}}\n"),
            "a 10.9.0.1:8472, fd00::1/64 — 0a:58:0a:09:00:01\n".to_owned(),
            "server: https://10.9.0.1:9345\nmesh1 is a prefix, mesh0 a device\n".to_owned(),
        ] {
            assert_eq!(redactor().text(&line), line);
        }
    }

    #[test]
    fn a_configuration_keeps_all_but_its_secrets() {
        let config = format!(
            "# {KEY}\nnode-name: a\ntoken: hunter22\ntoken-file: /run/token\n\"token\": >-\n  hunter22\n\n  more hunter22\n\
             tls-san:\n- x\nbfd:\n  interval: 150\nprivate-key-file: /k\nbfd-auth-key-file: /b\n\
             datastore-endpoint: mysql://r:hunter22@h/d?sslmode=hunter22 # {TOKEN}\nport: 8472\n"
        );
        assert_eq!(
            redactor().config(&config),
            format!(
                "# {REMOVED}\nnode-name: a\ntoken: {REMOVED}\ntoken-file: /run/token\n\"token\": {REMOVED}\n\
                 tls-san:\n- x\nbfd:\n  interval: 150\nprivate-key-file: /k\nbfd-auth-key-file: /b\n\
                 datastore-endpoint: mysql://{REMOVED}@h/d?{REMOVED}\nport: 8472\n"
            )
        );
    }

    #[test]
    fn what_is_mistyped_in_a_configuration_is_not_shown_either() {
        for line in [
            "tokn: hunter22",
            "tokn:\n  - hunter22",
            "bfd-auth-key: 1 hunter22",
            "{token: hunter22, port: 1}",
            "password = hunter22",
            "bfd:\n  password: hunter22",
            "datastore-endpoint: mysql//u:hunter22@h/x",
            "datastore-endpoint: postgres://u@h/x?password=hunter22",
            "datastore-endpoint: mysql://u:hunt/hunter22@h/x",
            "datastore-endpoint: mysql://u:hunter22?x@h/x",
            "datastore-endpoint: mysql://u:hunter22 #x@h/x",
            "datastore-endpoint: mysql://u:hunter22,h:1/x",
            "datastore-endpoint:\n  postgres://u@h/x?password=hunter22",
            "datastore-endpoint: >-\n  postgres://u@h/x?password=hunter22",
            "# datastore-endpoint: postgres://u@h/x?password=hunter22",
            "#token: hunter22",
            "log: info # token: hunter22",
            "  # token: hunter22",
            "- token: hunter22",
            "bfd:\n  - password: hunter22",
            "bfd: {interval: 150, password: hunter22}",
            "bfd: {interval: 150,\n  multiplier: 6, password: hunter22}",
        ] {
            let text = redactor().config(&format!("node-name: seen\n{line}\nport: 1\n"));
            assert!(!text.contains("hunter22"), "{line}: {text}");
            assert!(text.contains("node-name: seen") && text.contains("port: 1"), "positive control: {text}");
        }
    }
}
