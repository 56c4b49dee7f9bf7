//! Takes secrets out of text that somebody will send to somebody else.
//!
//! Two nets, of which one would do: what is known to be secret is removed wherever it stands, and what looks like one is
//! removed although nobody knows it. Public keys are the exception, since they are known.

/// What replaces a secret.
pub const REMOVED: &str = "[removed]";

/// Keys of the configuration whose values are secret.
const SECRET_KEYS: &[&str] = &["token", "secret", "password", "preshared-key", "private-key"];
/// Those that only sound so.
const NOT_SECRET: &[&str] = &["token-file", "private-key-file", "preshared-key-file", "public-key"];
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

    /// A configuration: also the values of secret keys, however they are written.
    pub fn config(&self, text: &str) -> String {
        let mut out = String::new();
        let mut inside: Option<usize> = None;
        for line in text.lines() {
            let indent = line.len() - line.trim_start().len();
            let blank = line.trim().is_empty();
            // A value goes on in lines that are indented deeper, or are empty.
            if inside.is_some_and(|key| blank || indent > key || line.trim_start().starts_with("- ")) {
                continue;
            }
            inside = None;
            match secret_key(line) {
                Some(front) => {
                    inside = Some(indent);
                    out += &format!("{front}: {REMOVED}\n");
                }
                None => out += &format!("{line}\n"),
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

/// The line up to its secret key's colon, if it has one.
fn secret_key(line: &str) -> Option<&str> {
    let (front, _) = line.split_once(':')?;
    let key = front.trim().trim_start_matches("- ").trim_matches(['"', '\'']).to_ascii_lowercase();
    let secret = SECRET_KEYS.iter().any(|secret| key.contains(secret)) && !NOT_SECRET.contains(&key.as_str());
    secret.then_some(front)
}

/// `scheme://user:password@host` without what is before the `@`.
fn without_passwords(line: &str) -> String {
    let Some((front, behind)) = line.split_once("://") else { return line.to_owned() };
    let end = behind.find(|c: char| c.is_whitespace() || "\"'/,".contains(c)).unwrap_or(behind.len());
    let (authority, rest) = behind.split_at(end);
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
            "node-name: a\ntoken: hunter22\ntoken-file: /run/token\n\"token\": >-\n  hunter22\n\n  more hunter22\n\
             tls-san: [x]\nprivate-key-file: /k\ndatastore-endpoint: mysql://r:hunter22@h/d # {TOKEN}\nport: 8472\n"
        );
        assert_eq!(
            redactor().config(&config),
            format!(
                "node-name: a\ntoken: {REMOVED}\ntoken-file: /run/token\n\"token\": {REMOVED}\ntls-san: [x]\n\
                 private-key-file: /k\ndatastore-endpoint: mysql://{REMOVED}@h/d # {REMOVED}\nport: 8472\n"
            )
        );
    }
}
