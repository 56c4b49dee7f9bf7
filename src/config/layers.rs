//! Who said what: the file, the environment and the flags laid over one another.
//!
//! Knows names, shapes and places, and which source wins; not what a value means.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use super::error::{ConfigError, Place, Problem};
use super::keys::{self, ENV_PREFIX, KEYS, Key, LATER};
use super::values::Read;
use super::yaml::{self, Entry, Kind, MaxNodes, Tree};

/// What a configuration is made from. The caller has read it; parsing does no I/O.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Path, for messages, and content of the file. `None`: no file, so defaults.
    pub file: Option<(PathBuf, Vec<u8>)>,
    /// The environment. Variables without `MESHD_` are passed over.
    pub env: Vec<(OsString, OsString)>,
    /// Flags as key and value; a list's key may come several times.
    pub flags: Vec<(String, String)>,
    /// The machine's name, which is the node's unless `node-name` is set.
    pub hostname: String,
}

/// The winning texts by key, with a remark on each variable that nobody asked for.
pub(super) struct Layers {
    values: BTreeMap<&'static str, Vec<Said>>,
    pub(super) notices: Vec<String>,
}

/// One text and who said it.
struct Said {
    text: String,
    place: Place,
}

impl Layers {
    pub(super) fn new(sources: &Sources) -> Result<Self, ConfigError> {
        let mut layers = Layers { values: BTreeMap::new(), notices: Vec::new() };
        if let Some((path, content)) = &sources.file {
            layers.add_file(path, content)?;
        }
        layers.add_env(&sources.env)?;
        layers.add_flags(&sources.flags)?;
        Ok(layers)
    }

    /// The value of a key that takes one.
    pub(super) fn one<T>(&self, key: &'static str, read: fn(&str) -> Read<T>) -> Result<Option<T>, ConfigError> {
        match self.values.get(key).and_then(|said| said.last()) {
            Some(said) => said.read(key, read).map(Some),
            None => Ok(None),
        }
    }

    /// The values of a key that takes a list; empty when nobody gave it. `clash` names what two items may not share.
    pub(super) fn many<T>(
        &self,
        key: &'static str,
        read: fn(&str) -> Read<T>,
        clash: fn(&T, &T) -> Option<&'static str>,
    ) -> Result<Vec<T>, ConfigError> {
        let mut items: Vec<T> = Vec::new();
        for said in self.values.get(key).into_iter().flatten() {
            let item = said.read(key, read)?;
            if let Some(fix) = items.iter().find_map(|earlier| clash(earlier, &item)) {
                let problem = Problem::BadValue { key, value: said.text.clone(), fix: fix.to_owned() };
                return Err(ConfigError { place: said.place.clone(), problem });
            }
            items.push(item);
        }
        Ok(items)
    }

    /// Whether anybody gave a value.
    pub(super) fn says(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Where the value of a key came from.
    pub(super) fn place(&self, key: &'static str) -> Place {
        self.values.get(key).and_then(|said| said.last()).map_or(Place::Default(key), |said| said.place.clone())
    }

    fn add_file(&mut self, path: &std::path::Path, content: &[u8]) -> Result<(), ConfigError> {
        const MAX: MaxNodes = MaxNodes(10_000);
        let place = |at| Place::File { path: path.to_owned(), at };
        let tree = yaml::parse(content, MAX)
            .map_err(|bad| ConfigError { place: place(bad.at), problem: Problem::Yaml(bad.what) })?;
        let entries = match tree.kind {
            Kind::Null => return Ok(()),
            Kind::Map(entries) => entries,
            other => {
                let problem = Problem::NotAMapping { found: other.noun() };
                return Err(ConfigError { place: place(Some(tree.at)), problem });
            }
        };
        for Entry { key, at, value } in entries {
            let key = known(&key).map_err(|problem| ConfigError { place: place(Some(at)), problem })?;
            let here = value.at;
            let said = items(key, value)
                .map_err(|(at, problem)| ConfigError { place: place(Some(at)), problem })?
                .into_iter()
                .map(|(at, text)| Said { text, place: place(Some(at)) })
                .collect();
            self.put(key, said, place(Some(here)))?;
        }
        Ok(())
    }

    fn add_env(&mut self, env: &[(OsString, OsString)]) -> Result<(), ConfigError> {
        for (name, value) in env {
            let Some(name) = name.to_str().filter(|n| n.starts_with(ENV_PREFIX)) else { continue };
            let Some(key) = KEYS.iter().find(|key| key.env() == name) else {
                // Not an error: orchestrators and scripts put variables of that prefix there for reasons of their own.
                self.notices.push(unknown_variable(name));
                continue;
            };
            // Set to nothing is how a unit file or a compose file says "unset".
            if value.is_empty() {
                continue;
            }
            let place = Place::Env(name.to_owned());
            let Some(text) = value.to_str() else { return Err(ConfigError { place, problem: Problem::NotUtf8 }) };
            let said = split(key, text).map(|text| Said { text, place: place.clone() }).collect();
            self.put(key, said, place)?;
        }
        Ok(())
    }

    fn add_flags(&mut self, flags: &[(String, String)]) -> Result<(), ConfigError> {
        let mut given: BTreeMap<&'static str, (&'static Key, Vec<Said>)> = BTreeMap::new();
        for (name, text) in flags {
            let place = Place::Flag(name.clone());
            let key = known(name).map_err(|problem| ConfigError { place: place.clone(), problem })?;
            let said = split(key, text).map(|text| Said { text, place: place.clone() });
            given.entry(key.name).or_insert_with(|| (key, Vec::new())).1.extend(said);
        }
        for (name, (key, said)) in given {
            self.put(key, said, Place::Flag(name.to_owned()))?;
        }
        Ok(())
    }

    fn put(&mut self, key: &'static Key, said: Vec<Said>, place: Place) -> Result<(), ConfigError> {
        if said.is_empty() || said.iter().all(|s| s.text.is_empty()) {
            return Err(ConfigError { place, problem: Problem::NoValue { key: key.name, default: key.default } });
        }
        self.values.insert(key.name, said);
        Ok(())
    }
}

impl Said {
    fn read<T>(&self, key: &'static str, read: fn(&str) -> Read<T>) -> Result<T, ConfigError> {
        read(&self.text).map_err(|fix| {
            let secret = keys::find(key).is_some_and(|key| key.secret);
            let value = if secret { "…".to_owned() } else { self.text.clone() };
            ConfigError { place: self.place.clone(), problem: Problem::BadValue { key, value, fix } }
        })
    }
}

fn known(name: &str) -> Result<&'static Key, Problem> {
    keys::find(name).ok_or_else(|| {
        let key = super::error::shorten(name);
        if LATER.contains(&name) {
            Problem::LaterKey { key }
        } else {
            Problem::UnknownKey { key, suggestion: yaml::nearest(name, KEYS.iter().map(|k| k.name)) }
        }
    })
}

fn unknown_variable(name: &str) -> String {
    let suffix = name.strip_prefix(ENV_PREFIX).unwrap_or(name).to_ascii_lowercase().replace('_', "-");
    let key = yaml::nearest(&suffix, KEYS.iter().map(|k| k.name)).and_then(keys::find);
    let later = LATER.contains(&suffix.as_str());
    let what = match key {
        _ if later => "is not supported by this version yet".to_owned(),
        Some(key) => format!("is not a setting; did you mean {}?", key.env()),
        None => "is not a setting".to_owned(),
    };
    format!("environment variable {} {what}; it is ignored", super::error::shorten(name))
}

fn items(key: &'static Key, value: Tree<'_>) -> Result<Vec<(yaml::At, String)>, (yaml::At, Problem)> {
    let wanted = match (key.list, key.mapping) {
        (true, _) => "a value or a list of values",
        (_, true) => "a mapping of single values",
        _ => "a single value",
    };
    let shape = |found: &Kind<'_>| Problem::WrongShape { key: key.name, wanted, found: found.noun() };
    match value.kind {
        Kind::Null => Ok(Vec::new()),
        Kind::Text(text) => Ok(split(key, &text).map(|text| (value.at, text)).collect()),
        Kind::List(list) if key.list => list
            .into_iter()
            .map(|item| match item.kind {
                Kind::Text(text) => Ok((item.at, text.into_owned())),
                other => Err((item.at, shape(&other))),
            })
            .collect(),
        Kind::Map(entries) if key.mapping => {
            let pairs = entries.into_iter().map(|Entry { key: name, value, .. }| match value.kind {
                Kind::Text(text) => Ok(format!("{name}={text}")),
                other => Err((value.at, shape(&other))),
            });
            Ok(vec![(value.at, pairs.collect::<Result<Vec<_>, _>>()?.join(","))])
        }
        other => Err((value.at, shape(&other))),
    }
}

fn split<'t>(key: &Key, text: &'t str) -> impl Iterator<Item = String> + 't {
    let list = key.list;
    text.split(move |c| list && c == ',').map(move |part| if list { part.trim() } else { part }.to_owned())
}
