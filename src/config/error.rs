//! What is wrong with a configuration: where, what, and what to do.

use std::fmt;
use std::path::PathBuf;

use super::yaml::At;

/// A configuration that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct ConfigError {
    /// The source, and the place in it.
    pub place: Place,
    /// What is wrong there.
    pub problem: Problem,
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The configuration file.
    File {
        /// Its path as given.
        path: PathBuf,
        /// Line and column, where they are known.
        at: Option<At>,
    },
    /// An environment variable, by its name.
    Env(String),
    /// A command-line flag, by the name of its key.
    Flag(String),
    /// Nobody gave a value: the default of that key.
    Default(&'static str),
}

impl Place {
    /// What a source says counts more than what one of less weight says.
    pub(super) fn weight(&self) -> u8 {
        match self {
            Place::Default(_) => 0,
            Place::File { .. } => 1,
            Place::Env(_) => 2,
            Place::Flag(_) => 3,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, at: Some(At { line, column }) } => write!(f, "{}:{line}:{column}", path.display()),
            Place::File { path, at: None } => write!(f, "{}", path.display()),
            Place::Env(name) => write!(f, "environment variable {name}"),
            Place::Flag(key) => write!(f, "flag --{key}"),
            Place::Default(key) => write!(f, "default of `{key}`"),
        }
    }
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A key that no version has.
    #[error("unknown key `{key}`{}", did_you_mean(*.suggestion))]
    UnknownKey {
        /// As written.
        key: String,
        /// The known key nearest to it.
        suggestion: Option<&'static str>,
    },
    /// A key of a later version.
    #[error("`{key}` is not supported by this version yet; remove it")]
    LaterKey {
        /// The key.
        key: String,
    },
    /// A value that the key does not take.
    #[error("`{key}` cannot be `{}`: {fix}", shorten(value))]
    BadValue {
        /// The key.
        key: &'static str,
        /// As written.
        value: String,
        /// What to write instead.
        fix: String,
    },
    /// `key:` and nothing behind it.
    #[error("`{key}` has no value; give it one, or remove it for the default ({default})")]
    NoValue {
        /// The key.
        key: &'static str,
        /// What it is when it is left out.
        default: &'static str,
    },
    /// A list or mapping where a value belongs, or the other way round.
    #[error("`{key}` takes {wanted}, but here is {found}")]
    WrongShape {
        /// The key.
        key: &'static str,
        /// What belongs here.
        wanted: &'static str,
        /// What is here.
        found: &'static str,
    },
    /// The file holds something else than keys with values.
    #[error("a configuration is lines of `key: value`, but here is {found}")]
    NotAMapping {
        /// What is here.
        found: &'static str,
    },
    /// A variable or flag that is no text.
    #[error("the value is not UTF-8 text")]
    NotUtf8,
    /// Not YAML, or more of it than is read.
    #[error("{0}")]
    Yaml(String),
}

/// `; did you mean ...?`, where there is something near.
pub(crate) fn did_you_mean(suggestion: Option<&str>) -> String {
    suggestion.map(|s| format!("; did you mean `{s}`?")).unwrap_or_default()
}

/// A value for a message: control characters shown as escapes, and not longer than a line.
pub(crate) fn shorten(value: &str) -> String {
    const MAX: usize = 80;
    let mut short: String = value.chars().take(MAX).flat_map(printable).collect();
    if value.chars().nth(MAX).is_some() {
        short.push('…');
    }
    short
}

fn printable(c: char) -> Vec<char> {
    if c.is_control() { c.escape_default().collect() } else { vec![c] }
}
