//! The file that holds a node's secret key: base64, one line, readable by its owner alone.
//!
//! A key is written whole or not at all (a new file, synced, then renamed), and a file that cannot be read or understood is
//! an error: a node never gets another identity because a disk was full or a byte was lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::{PresharedKey, SecretKey};
use crate::config::load::{ReadError, read_regular};
use crate::wire::bfd::auth::{BadKeys, Keys};

/// A key that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// There is no such file, and none may be made.
    #[error("{}: there is no key; put the node's key there, or remove its `public-key` from the node list to get a new one", .0.display())]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("cannot read the private key")]
    Read(#[source] ReadError),
    /// Others may read it.
    #[error("{}: others may read the private key (mode {mode:o}); `chmod 600` it, and make a new key if somebody did", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds something else.
    #[error("{}: this is no private key: 44 characters of base64, as `meshd keygen` prints them, are expected; restore the file, or move it away to get a new key", .0.display())]
    NoKey(PathBuf),
    /// A new one cannot be kept.
    #[error("cannot keep a new private key in {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system has no randomness.
    #[error("cannot make a private key: {0}")]
    Random(getrandom::Error),
}

/// Reads the key in `path`.
pub fn load(path: &Path) -> Result<SecretKey, KeyFileError> {
    let (content, metadata) = match read_regular(path, MAX_BYTES) {
        Ok((content, metadata)) => (Zeroizing::new(content), metadata),
        Err(error) if error.is_missing() => return Err(KeyFileError::Missing(path.to_owned())),
        Err(error) => return Err(KeyFileError::Read(error)),
    };
    if metadata.mode() & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode: metadata.mode() & 0o777 });
    }
    let text = std::str::from_utf8(&content).map_err(|_| KeyFileError::NoKey(path.to_owned()))?;
    text.trim().parse().map_err(|_| KeyFileError::NoKey(path.to_owned()))
}

/// Reads the key in `path`, or makes one there. Returns whether it is new.
pub fn load_or_make(path: &Path) -> Result<(SecretKey, bool), KeyFileError> {
    match load(path) {
        Err(KeyFileError::Missing(_)) => {
            let key = SecretKey::generate().map_err(KeyFileError::Random)?;
            write(path, &key).map_err(|source| KeyFileError::Write { path: path.to_owned(), source })?;
            Ok((key, true))
        }
        loaded => loaded.map(|key| (key, false)),
    }
}

/// A preshared key that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PresharedFileError {
    /// It cannot be read.
    #[error("cannot read the preshared key")]
    Read(#[source] ReadError),
    /// Others may read it.
    #[error("{}: others may read the preshared key (mode {mode:o}); `chmod 600` it, and make a new key if somebody did", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds something else.
    #[error("{}: this is no preshared key: 44 characters of base64, as `wg genpsk` prints them, are expected", .0.display())]
    NoKey(PathBuf),
}

/// Reads the preshared key in `path`.
pub fn load_preshared(path: &Path) -> Result<PresharedKey, PresharedFileError> {
    let (content, metadata) = read_regular(path, MAX_BYTES).map_err(PresharedFileError::Read)?;
    let content = Zeroizing::new(content);
    if metadata.mode() & 0o077 != 0 {
        return Err(PresharedFileError::Exposed { path: path.to_owned(), mode: metadata.mode() & 0o777 });
    }
    let text = std::str::from_utf8(&content).ok().and_then(|text| text.trim().parse().ok());
    text.ok_or_else(|| PresharedFileError::NoKey(path.to_owned()))
}

/// Keys of BFD that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BfdKeysError {
    /// The file cannot be read.
    #[error("cannot read the bfd-auth-key-file")]
    Read(#[source] ReadError),
    /// Others may read it.
    #[error("{}: others may read the keys of BFD (mode {mode:o}); `chmod 600` it, and make new ones if somebody did", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds something else.
    #[error("{}: {problem}", path.display())]
    NoKeys {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: BadKeys,
    },
}

/// Reads the keys of BFD in `path`.
pub fn load_bfd(path: &Path) -> Result<Keys, BfdKeysError> {
    let (content, metadata) = read_regular(path, MAX_BYTES).map_err(BfdKeysError::Read)?;
    let content = Zeroizing::new(content);
    if metadata.mode() & 0o077 != 0 {
        return Err(BfdKeysError::Exposed { path: path.to_owned(), mode: metadata.mode() & 0o777 });
    }
    let keys = std::str::from_utf8(&content).map_err(|_| BadKeys::Empty).and_then(Keys::parse);
    keys.map_err(|problem| BfdKeysError::NoKeys { path: path.to_owned(), problem })
}

/// A key is 44 bytes; whoever edited the file may have left some lines behind.
const MAX_BYTES: u64 = 4096;

fn write(path: &Path, key: &SecretKey) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let new = dir.join(name);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(key.to_base64().as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        // never over a key that somebody put there meanwhile
        fs::hard_link(&new, path)?;
        File::open(dir)?.sync_all()
    })();
    fs::remove_file(&new).ok();
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state").join("node.key");
        assert!(matches!(load(&path), Err(KeyFileError::Missing(_))));
        let (made, new) = load_or_make(&path).unwrap();
        assert!(new);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let (again, new) = load_or_make(&path).unwrap();
        assert!(!new && again.public() == made.public());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_preshared_key_is_its_readers_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("psk");
        assert!(matches!(load_preshared(&path), Err(PresharedFileError::Read(_))));
        fs::write(&path, "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(load_preshared(&path), Err(PresharedFileError::Exposed { mode: 0o644, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let key = load_preshared(&path).unwrap();
        assert!(!format!("{key:?}").contains("hSDw"));
        fs::write(&path, "hSDw").unwrap();
        let error = load_preshared(&path).unwrap_err();
        assert!(error.to_string().contains("wg genpsk") && !error.to_string().contains("hSDw"), "{error}");
    }

    #[test]
    fn keys_of_bfd_are_their_readers_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bfd.keys");
        assert!(matches!(load_bfd(&path), Err(BfdKeysError::Read(_))));
        fs::write(&path, "1 hunter22\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = load_bfd(&path).unwrap_err();
        assert!(
            error.to_string().contains("bfd.keys: others may read") && error.to_string().contains("640"),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(load_bfd(&path).unwrap().to_string(), "1");
        fs::write(&path, "hunter22\n").unwrap();
        let error = load_bfd(&path).unwrap_err().to_string();
        assert!(error.contains("bfd.keys: line 1 is no key") && !error.contains("hunter"), "{error}");
    }

    #[test]
    fn what_is_damaged_or_exposed_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        let (key, _) = load_or_make(&path).unwrap();
        let good = fs::read(&path).unwrap();
        for end in 0..43 {
            fs::write(&path, &good[..end]).unwrap();
            assert!(matches!(load_or_make(&path), Err(KeyFileError::NoKey(_))), "cut at {end}");
            assert_eq!(fs::read(&path).unwrap(), good[..end]);
        }
        fs::write(&path, &good).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load(&path), Err(KeyFileError::Exposed { mode: 0o640, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        assert_eq!(load(&path).unwrap().public(), key.public());
    }
}
