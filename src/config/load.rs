//! The reading behind a configuration: files, environment, hostname.
//!
//! Owns bounded reads that never hang on something that is not a file. Everything that can be decided without I/O is
//! decided in [`Config::parse`].

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Config, ConfigError, Sources, TokenFile};
use crate::membership::settings::{Datastore, Secret};
use crate::membership::token::{BadToken, Credential};

/// The file that is read when nobody names one.
pub const DEFAULT_PATH: &str = "/etc/meshd/config.yaml";

const MAX_CONFIG: u64 = 1 << 20;

/// How to get the configuration: once at the start, and again at each SIGHUP.
#[derive(Debug, Clone, Default)]
pub struct Loader {
    /// The file of `--config`; `None` for the default one, which may be missing.
    pub path: Option<PathBuf>,
    /// Flags as key and value.
    pub flags: Vec<(String, String)>,
    /// What the node is called where `node-name` does not say it; `None` for the machine's name.
    pub name: Option<String>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the configuration")]
    Read(#[source] ReadError),
    /// The file, the environment or a flag is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not there, or not for us.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, a pipe, a device or a socket.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// What is none.
        path: PathBuf,
    },
    /// Longer than anything sensible.
    #[error("{}: larger than {max} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        max: u64,
    },
}

/// Why there is no token although one is to be read.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token-file: {0}")]
    Read(#[source] ReadError),
    /// Its content is no token.
    #[error("token-file {path}: {source}")]
    Bad {
        /// The file.
        path: String,
        /// What is wrong.
        source: BadToken,
    },
}

/// The token that `token` or `token-file` brings.
pub fn token(config: &Config) -> Result<Option<Secret>, TokenError> {
    if let Some(token) = &config.token {
        return Ok(Some(token.clone()));
    }
    let (path, bytes) = match &config.token_file {
        None => return Ok(None),
        Some(TokenFile::Path(path)) => {
            (path.display().to_string(), read_regular(path, MAX_TOKEN).map_err(TokenError::Read)?.0)
        }
        Some(TokenFile::StandardInput) => {
            let mut bytes = Vec::new();
            io::stdin()
                .lock()
                .take(MAX_TOKEN)
                .read_to_end(&mut bytes)
                .map_err(|source| TokenError::Read(ReadError::Io { path: "standard input".into(), source }))?;
            ("-".to_owned(), bytes)
        }
    };
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    Credential::parse(text).map_err(|source| TokenError::Bad { path, source })?;
    Ok(Some(Secret::new(text)))
}

/// A file of the datastore's that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatastoreError {
    /// It cannot be read.
    #[error("cannot read the {0}: {1}")]
    Read(&'static str, #[source] ReadError),
    /// It is not what it should be.
    #[error("{key} {}: {what}", path.display())]
    Bad {
        /// Which key names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// `datastore-endpoint`, with what the files beside it hold.
pub fn datastore(config: &Config) -> Result<Datastore, DatastoreError> {
    let text = |key: &'static str, path: &Option<PathBuf>, begins: &str| {
        let Some(path) = path else { return Ok(None) };
        let bad = |what| DatastoreError::Bad { key, path: path.clone(), what };
        let bytes = read_regular(path, MAX_TOKEN).map_err(|error| DatastoreError::Read(key, error))?.0;
        let text = String::from_utf8(bytes).map_err(|_| bad("not a text"))?;
        if text.trim().is_empty() || !text.contains(begins) {
            return Err(bad(if begins.is_empty() { "it is empty" } else { "no PEM of that kind is in it" }));
        }
        Ok(Some(text.trim().to_owned()))
    };
    Ok(Datastore {
        endpoint: config.datastore_endpoint.clone(),
        password: text("datastore-password-file", &config.datastore_password_file, "")?.map(Secret::new),
        ca: text("datastore-cafile", &config.datastore_cafile, "-----BEGIN CERTIFICATE-----")?,
        certificate: text("datastore-certfile", &config.datastore_certfile, "-----BEGIN CERTIFICATE-----")?,
        key: text("datastore-keyfile", &config.datastore_keyfile, "PRIVATE KEY-----")?.map(Secret::new),
    })
}

const MAX_TOKEN: u64 = 64 << 10;

impl ReadError {
    /// Whether the file does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(self, ReadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

impl Loader {
    /// Reads and parses.
    pub fn load(&self) -> Result<Config, LoadError> {
        Ok(Config::parse(&self.sources()?)?)
    }

    /// The file that is read, or would be if it existed.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(DEFAULT_PATH))
    }

    fn sources(&self) -> Result<Sources, LoadError> {
        let file = match read_regular(self.path(), MAX_CONFIG) {
            Ok((content, _)) => Some((self.path().to_owned(), content)),
            Err(error) if self.path.is_none() && error.is_missing() => None,
            Err(error) => return Err(LoadError::Read(error)),
        };
        let hostname = self.name.clone().unwrap_or_else(hostname);
        Ok(Sources { file, env: std::env::vars_os().collect(), flags: self.flags.clone(), hostname })
    }
}

/// The whole content of a regular file of at most `max` bytes, and what the file was before it was read.
pub(crate) fn read_regular(path: &Path, max: u64) -> Result<(Vec<u8>, Metadata), ReadError> {
    let failed = |source| ReadError::Io { path: path.to_owned(), source };
    // Without O_NONBLOCK opening a pipe waits for a writer, for ever if need be. Regular files do not care.
    let file: File = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(ReadError::NotAFile { path: path.to_owned() });
    }
    let mut content = Vec::new();
    // It may grow meanwhile, so the limit is on what is read and not on the size.
    file.take(max + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > max {
        return Err(ReadError::TooLarge { path: path.to_owned(), max });
    }
    Ok((content, metadata))
}

/// The hostname of this UTS namespace; empty when it cannot be read, which parsing then refuses with the fix.
fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}
