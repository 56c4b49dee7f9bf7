//! What etcd's JSON gateway says, as far as it matters here: 64-bit numbers are strings, bytes are base64, and what is
//! zero or empty is left out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};

/// A 64-bit number, in quotes or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::membership) struct Number(pub(in crate::membership) u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either<'a> {
            Text(std::borrow::Cow<'a, str>),
            Number(u64),
        }
        match Either::deserialize(from)? {
            Either::Text(text) => text.parse().map(Number).map_err(serde::de::Error::custom),
            Either::Number(number) => Ok(Number(number)),
        }
    }
}

/// Bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Binary(pub(super) Vec<u8>);

impl<'de> Deserialize<'de> for Binary {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
        STANDARD.decode(text.as_bytes()).map(Binary).map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Header {
    pub(super) revision: Number,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Kept {
    pub(super) key: Binary,
    pub(super) value: Binary,
    pub(super) create_revision: Number,
    pub(super) mod_revision: Number,
    pub(super) lease: Number,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Range {
    pub(super) header: Header,
    pub(super) kvs: Vec<Kept>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Txned {
    pub(super) header: Header,
    pub(super) succeeded: bool,
    pub(super) responses: Vec<Step>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Step {
    pub(super) response_range: Range,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Granted {
    #[serde(rename = "ID")]
    pub(super) id: Number,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct KeptAlive {
    pub(super) result: Left,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Left {
    #[serde(rename = "TTL")]
    pub(super) ttl: Number,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Status {
    pub(super) version: String,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Watched {
    pub(super) canceled: bool,
    pub(super) compact_revision: Number,
    pub(super) cancel_reason: String,
    pub(super) events: Vec<Change>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(default)]
pub(super) struct Change {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) kv: Kept,
}

/// A key below `prefix`, as the gateway wants it.
pub(super) fn key(prefix: &str, name: &str) -> String {
    STANDARD.encode(format!("{prefix}{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_strings_and_nothing_is_left_out() {
        let range: Range = serde_json::from_str(
            r#"{"header":{"revision":"7"},"kvs":[{"key":"YQ==","mod_revision":3,"lease":"9041998790840536075"}]}"#,
        )
        .unwrap();
        assert_eq!((range.header.revision, &range.kvs[0].key.0), (Number(7), &b"a".to_vec()));
        assert_eq!((range.kvs[0].mod_revision, range.kvs[0].create_revision), (Number(3), Number(0)));
        assert_eq!(range.kvs[0].lease, Number(9_041_998_790_840_536_075));
        assert!(serde_json::from_str::<Range>(r#"{"kvs":[{"key":"*"}]}"#).is_err());
        assert!(serde_json::from_str::<Range>(r#"{"header":{"revision":"-1"}}"#).is_err());
    }
}
