//! Files that hold state and secrets: readable for their owner alone, and replaced whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Makes a folder and its parents, for its owner alone; one that exists stays as it is.
pub fn ensure_dir(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(told(path))
}

/// Puts `bytes` at `path`, through a file beside it: after a crash there is the old content or the new.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    remove(&beside).map_err(told(&beside))?;
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(source) = written {
        let _ = fs::remove_file(&beside);
        return Err(FileError { path: path.to_owned(), source });
    }
    rename(&beside, path)
}

/// Renames, and syncs the folder, so that the new name survives a crash.
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::rename(from, to).map_err(told(to))?;
    let folder = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(told(folder))
}

/// Makes an empty file where there is none, for its owner alone.
pub fn ensure_file(path: &Path) -> Result<(), FileError> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path).map(drop).map_err(told(path))
}

/// Makes an empty file that must not exist yet, for its owner alone.
pub fn create_new(path: &Path) -> Result<(), FileError> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop).map_err(told(path))
}

/// The content, or `None` where there is no such file. A file over 16 MiB is an error.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    read_up_to(path, 16 << 20)
}

/// The content, or `None` where there is no such file. A file of more bytes is an error.
pub fn read_up_to(path: &Path, most: u64) -> Result<Option<Vec<u8>>, FileError> {
    match fs::metadata(path) {
        Ok(meta) if meta.len() > most => {
            let source = io::Error::new(io::ErrorKind::InvalidData, "larger than any file of this kind");
            Err(FileError { path: path.to_owned(), source })
        }
        Ok(_) => fs::read(path).map(Some).map_err(told(path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileError { path: path.to_owned(), source }),
    }
}

/// Removes a file that may be gone already.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn told(path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    |source| FileError { path, source }
}
