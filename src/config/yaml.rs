//! A YAML text as a small tree of texts with positions, and the nearest known word to an unknown one.
//!
//! Owns the limits that keep a hostile file cheap and the translation of the YAML library's errors. Knows no key and no
//! type: `mtu: 1e3`, a node named `no` and a socket mode `0660` stay the characters that were written, so that the
//! reader of a key decides what they mean, and an error can point at a line and column and show the value unchanged.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{DuplicateKeyPolicy, MergeKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Error, Location, Options, Spanned};

/// A position in a text: both count from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

/// A node of the document and where it starts.
#[derive(Debug)]
pub(crate) struct Tree<'a> {
    pub(crate) at: At,
    pub(crate) kind: Kind<'a>,
}

/// What stands at a place.
#[derive(Debug)]
pub(crate) enum Kind<'a> {
    /// Nothing, `~` or `null`.
    Null,
    /// A scalar as it was written (a quoted one without its quotes).
    Text(Cow<'a, str>),
    List(Vec<Tree<'a>>),
    Map(Vec<Entry<'a>>),
}

/// A key with its value.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) key: Cow<'a, str>,
    pub(crate) at: At,
    pub(crate) value: Tree<'a>,
}

impl Kind<'_> {
    /// How an error names it.
    pub(crate) fn noun(&self) -> &'static str {
        match self {
            Kind::Null => "nothing",
            Kind::Text(_) => "a single value",
            Kind::List(_) => "a list",
            Kind::Map(_) => "a mapping",
        }
    }
}

/// How many YAML nodes (values, keys, lists, mappings) a text may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaxNodes(pub(crate) usize);

/// Why a text is not usable YAML, and where that shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) at: Option<At>,
    pub(crate) what: String,
}

/// Reads one document.
pub(crate) fn parse(bytes: &[u8], max: MaxNodes) -> Result<Tree<'_>, Malformed> {
    let text = utf8(bytes)?;
    let raw: Raw<'_> = serde_saphyr::from_str_with_options(text, options(max)).map_err(|error| explain(&error, max))?;
    raw.into_tree(text)
}

/// The known word that an unknown one most likely meant: within two edits, or a third of a longer word.
pub(crate) fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let word: Vec<char> = word.chars().take(64).flat_map(char::to_lowercase).collect();
    let allowed = (word.len() / 3).clamp(2, 4).min(word.len().saturating_sub(1));
    known.into_iter().map(|k| (distance(&word, k), k)).filter(|(d, _)| *d <= allowed).min().map(|(_, k)| k)
}

fn utf8(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = String::from_utf8_lossy(bytes.get(..error.valid_up_to()).unwrap_or_default());
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Malformed {
            at: Some(At { line: saturate(line as u64), column: saturate(column as u64) }),
            what: "this byte is not UTF-8 text; save the file as UTF-8".to_owned(),
        }
    })
}

fn options(max: MaxNodes) -> Options {
    // Neither file needs anchors or deep nesting. What an alias repeats counts like what is written, and the bound on it
    // is small, so that a "billion laughs" text fails after at most a few thousand steps.
    const REPLAYED: usize = 4096;
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: max.0,
            max_events: max.0.saturating_mul(2),
            max_depth: 8,
            max_documents: 1,
            max_aliases: 256,
            max_anchors: 256,
            max_recorded_anchor_events: REPLAYED,
            max_total_scalar_bytes: 256 << 20,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: REPLAYED,
            max_replay_stack_depth: 4,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: MergeKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        emit_comments: false,
        with_snippet: false,
    }
}

fn explain(error: &Error, max: MaxNodes) -> Malformed {
    let location = error.location().filter(|l| l.line() > 0);
    let mut inner = error;
    while let Error::AliasError { error, .. } | Error::WithSnippet { error, .. } = inner {
        inner = error;
    }
    let what = match inner {
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => format!(
            "the file is too big, too deep or repeats too much through anchors; at most {} values, 8 levels and 256 \
             aliases are read",
            max.0
        ),
        Error::DuplicateMappingKey { key: Some(key), .. } => format!("duplicate key `{key}`; keep one of them"),
        Error::RecursiveReferencesRequireWeakTypes { .. } => {
            "an alias refers to what it is part of; remove it".to_owned()
        }
        other => {
            // The place stands before the message already.
            let text = other.to_string();
            let suffix =
                other.location().map(|l| format!(" at line {}, column {}", l.line(), l.column())).unwrap_or_default();
            text.strip_suffix(suffix.as_str()).unwrap_or(&text).to_owned()
        }
    };
    Malformed { at: location.map(at), what }
}

fn at(location: Location) -> At {
    At { line: saturate(location.line().max(1)), column: saturate(location.column().max(1)) }
}

fn saturate(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Levenshtein's distance, one row at a time.
fn distance(word: &[char], known: &str) -> usize {
    let mut row: Vec<usize> = (0..=word.len()).collect();
    for (i, k) in known.chars().enumerate() {
        let mut left = i + 1;
        let mut diagonal = i;
        let mut next = vec![left];
        for (w, above) in word.iter().zip(row.iter().skip(1)) {
            let swap = diagonal + usize::from(*w != k);
            left = swap.min(left + 1).min(above + 1);
            diagonal = *above;
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(usize::MAX)
}

/// What the YAML library hands over: scalars whose type it has guessed have lost their spelling, but not their place.
struct Raw<'a> {
    location: Location,
    kind: RawKind<'a>,
}

enum RawKind<'a> {
    Null,
    Text(Cow<'a, str>),
    Guessed(Location),
    List(Vec<Raw<'a>>),
    Map(Vec<(Raw<'a>, Raw<'a>)>),
}

impl<'a> Raw<'a> {
    fn into_tree(self, text: &'a str) -> Result<Tree<'a>, Malformed> {
        let at = at(self.location);
        let kind = match self.kind {
            RawKind::Null => Kind::Null,
            RawKind::Text(text) => Kind::Text(text),
            RawKind::Guessed(place) => Kind::Text(Cow::Borrowed(spelling(text, place).ok_or_else(|| Malformed {
                at: Some(at),
                what: "this value cannot be read; put it into quotes".to_owned(),
            })?)),
            RawKind::List(items) => {
                Kind::List(items.into_iter().map(|item| item.into_tree(text)).collect::<Result<_, _>>()?)
            }
            RawKind::Map(entries) => {
                Kind::Map(entries.into_iter().map(|(k, v)| entry(k, v, text)).collect::<Result<_, _>>()?)
            }
        };
        Ok(Tree { at, kind })
    }
}

fn entry<'a>(key: Raw<'a>, value: Raw<'a>, text: &'a str) -> Result<Entry<'a>, Malformed> {
    let key = key.into_tree(text)?;
    let at = key.at;
    match key.kind {
        Kind::Text(key) => Ok(Entry { key, at, value: value.into_tree(text)? }),
        other => Err(Malformed { at: Some(at), what: format!("a key has to be a word, not {}", other.noun()) }),
    }
}

/// The characters of a plain scalar. A tag or an anchor in front of it may belong to its place; neither is part of it.
fn spelling(text: &str, place: Location) -> Option<&str> {
    let start = usize::try_from(place.span().byte_offset()?).ok()?;
    let len = usize::try_from(place.span().byte_len()?).ok()?;
    let written = text.get(start..start.checked_add(len)?)?.trim();
    (!written.is_empty() && !written.starts_with(['!', '&', '*', '"', '\''])).then_some(written)
}

impl<'de> Deserialize<'de> for Raw<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let node = Spanned::<RawKind<'de>>::deserialize(deserializer)?;
        let kind = match node.value {
            RawKind::Guessed(_) => RawKind::Guessed(node.defined),
            kind => kind,
        };
        Ok(Raw { location: node.referenced, kind })
    }
}

impl<'de> Deserialize<'de> for RawKind<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = RawKind<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value, a list or a mapping")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(RawKind::Null)
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(RawKind::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(RawKind::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_string<E>(self, text: String) -> Result<Self::Value, E> {
        Ok(RawKind::Text(Cow::Owned(text)))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(RawKind::Guessed(Location::UNKNOWN))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(RawKind::Guessed(Location::UNKNOWN))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(RawKind::Guessed(Location::UNKNOWN))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(RawKind::Guessed(Location::UNKNOWN))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(RawKind::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(RawKind::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> Vec<(String, u32, u32, Kind<'_>)> {
        match parse(text.as_bytes(), MaxNodes(1000)).unwrap().kind {
            Kind::Map(entries) => entries
                .into_iter()
                .map(|e| (e.key.into_owned(), e.value.at.line, e.value.at.column, e.value.kind))
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    fn texts(text: &str) -> Vec<String> {
        let text_of = |kind| match kind {
            Kind::Text(t) => Cow::into_owned(t),
            other => panic!("{other:?}"),
        };
        map(text).into_iter().map(|(_, _, _, kind)| text_of(kind)).collect()
    }

    #[test]
    fn a_scalar_keeps_its_spelling() {
        let text =
            "a: 0660\nb: no\nc: 1e5\nd: 'on'\ne: \"x\\ty\"\nf: .nan\ng: 0x10\nh: -1\ni: 1_000\nj: !!str 12\nk: 10.9";
        assert_eq!(texts(text), ["0660", "no", "1e5", "on", "x\ty", ".nan", "0x10", "-1", "1_000", "12", "10.9"]);
    }

    #[test]
    fn an_anchored_or_tagged_scalar_keeps_its_spelling_or_is_refused() {
        assert_eq!(texts("a: &x 12\nb: *x\n"), ["12", "12"]);
        if let Ok(tree) = parse(b"a: !!int 12\n", MaxNodes(1000)) {
            assert!(format!("{tree:?}").contains("\"12\""), "{tree:?}");
        }
    }

    #[test]
    fn places_count_characters() {
        let entries = map("# é\na: 1\n\"é\": [x,\n  2]\n");
        assert_eq!((entries[0].1, entries[0].2), (2, 4));
        let Kind::List(items) = &entries[1].3 else { panic!() };
        assert_eq!(items[0].at, At { line: 3, column: 7 });
        assert_eq!(items[1].at, At { line: 4, column: 3 });
    }

    #[test]
    fn an_empty_text_is_nothing() {
        for text in ["", "# only a comment\n", "---\n", "~\n"] {
            assert!(matches!(parse(text.as_bytes(), MaxNodes(10)).unwrap().kind, Kind::Null), "{text:?}");
        }
    }

    #[test]
    fn duplicate_keys_and_merge_keys_are_refused() {
        let error = parse(b"a: 1\nb: 2\na: 3\n", MaxNodes(100)).unwrap_err();
        assert_eq!(error.at, Some(At { line: 3, column: 1 }));
        assert!(error.what.contains("duplicate"), "{}", error.what);
        assert!(parse(b"x: &x {a: 1}\ny: {<<: *x}\n", MaxNodes(100)).is_err());
    }

    #[test]
    fn bytes_that_are_not_utf8_are_shown() {
        let error = parse(b"a: 1\nb: \xff\n", MaxNodes(100)).unwrap_err();
        assert_eq!(error.at, Some(At { line: 2, column: 4 }));
    }

    #[test]
    fn a_bomb_is_refused_quickly() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let refs = vec![format!("*a{}", i - 1); 10].join(", ");
            text += &format!("a{i}: &a{i} [{refs}]\n");
        }
        let error = parse(text.as_bytes(), MaxNodes(100_000)).unwrap_err();
        assert!(error.what.contains("repeats too much"), "{}", error.what);
        assert!(parse("[".repeat(100_000).as_bytes(), MaxNodes(100_000)).is_err());
        assert!(parse("- x\n".repeat(1000).as_bytes(), MaxNodes(100)).is_err());
        assert!(parse("- x\n".repeat(90).as_bytes(), MaxNodes(100)).is_ok());
    }

    #[test]
    fn a_near_miss_is_suggested() {
        assert_eq!(nearest("node-nmae", ["node-name", "node-ip"]), Some("node-name"));
        assert_eq!(nearest("prot", ["port", "io"]), Some("port"));
        assert_eq!(nearest("MTU", ["mtu", "tun"]), Some("mtu"));
        assert_eq!(nearest("colour", ["port", "io", "mtu"]), None);
        assert_eq!(nearest("", ["port"]), None);
    }
}
