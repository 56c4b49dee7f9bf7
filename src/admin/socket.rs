//! The admin socket's file: making it, taking over what a crashed meshd left, and removing it.
//!
//! Owns the path, its mode and its group. Knows nothing of what is said over it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// Who may connect when nothing else is configured: the owner and the group.
pub const DEFAULT_MODE: u32 = 0o660;

/// `sun_path` has 108 bytes, the last of which ends the string (unix(7)).
const MAX_PATH: usize = 107;

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where the socket is and who may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOptions {
    /// The file.
    pub path: PathBuf,
    /// Its permission bits.
    pub mode: u32,
    /// Its group, by name in /etc/group or by number; without one, that of the process.
    pub group: Option<String>,
}

impl SocketOptions {
    /// That path, with the default mode and group.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        SocketOptions { path: path.into(), mode: DEFAULT_MODE, group: None }
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A meshd is alive there.
    #[error(
        "another meshd answers on {}: stop it (`systemctl stop meshd`), or give this one its own `socket`", .0.display()
    )]
    Alive(PathBuf),
    /// Something else has that name.
    #[error("{} exists and is not a socket: remove it, or set `socket` to another path", .0.display())]
    NotASocket(PathBuf),
    /// The path does not fit a socket address.
    #[error("the socket path {} is too long: it has to fit {MAX_PATH} bytes; set `socket` to a shorter one", .0.display())]
    TooLong(PathBuf),
    /// No such group.
    #[error(
        "no group `{0}` in /etc/group: create it (`groupadd --system {0}`), or set `socket-group` to a group or a number"
    )]
    NoSuchGroup(String),
    /// The system refused a step.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The step.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A listening admin socket, whose file goes away with it.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl AdminSocket {
    /// Makes the socket. Needs no runtime, so that it can happen before privileges are dropped.
    ///
    /// Two processes that start in the same instant may both find a stale file, and the later one then has the name:
    /// whoever must exclude that takes its lock (for meshd, the one on the data port) first.
    pub fn bind(options: &SocketOptions) -> Result<Self, BindError> {
        let path = &options.path;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = parent.join(format!(".{}.sock", std::process::id()));
        if path.as_os_str().len().max(temporary.as_os_str().len()) > MAX_PATH {
            return Err(BindError::TooLong(path.clone()));
        }
        let gid = options.group.as_deref().map(gid_of).transpose()?;
        make_parent(parent)?;
        refuse_if_in_use(path)?;

        // What bears our own process id was left by a namesake that is gone.
        let _ = fs::remove_file(&temporary);
        let made = listen(&temporary, options.mode, gid).and_then(|listener| {
            let found = fs::symlink_metadata(&temporary).map_err(failed("look at", &temporary))?;
            fs::rename(&temporary, path).map_err(failed("create the socket", path))?;
            Ok(AdminSocket { listener, path: path.clone(), identity: (found.dev(), found.ino()) })
        });
        if made.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        made
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listener, non-blocking.
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        // Another meshd may have taken the name over meanwhile: its file stays.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A socket that has its owner and mode before anybody can connect: until `listen` the kernel refuses everyone, so the
/// umask never matters.
fn listen(path: &Path, mode: u32, gid: Option<u32>) -> Result<UnixListener, BindError> {
    let make = || -> io::Result<(Socket, SockAddr)> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok((socket, SockAddr::unix(path)?))
    };
    let (socket, address) = make().map_err(failed("create the socket", path))?;
    socket.bind(&address).map_err(failed("create the socket", path))?;
    if gid.is_some() {
        std::os::unix::fs::chown(path, None, gid).map_err(failed("set the group of", path))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of", path))?;
    socket.listen(BACKLOG).map_err(failed("listen on", path))?;
    Ok(UnixListener::from(OwnedFd::from(socket)))
}

fn make_parent(parent: &Path) -> Result<(), BindError> {
    if parent.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed("create the directory", parent))?;
    // Once more, since a strict umask would keep the socket's group out.
    fs::set_permissions(parent, fs::Permissions::from_mode(0o755)).map_err(failed("set the mode of", parent))
}

/// Lets a missing file and a stale socket pass; the latter is replaced by the rename.
fn refuse_if_in_use(path: &Path) -> Result<(), BindError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("look at", path)(e)),
    };
    if !found.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    // Non-blocking, since a live meshd with a full backlog would make us wait.
    let attempt = Socket::new(Domain::UNIX, Type::STREAM, None).and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    });
    match attempt {
        Ok(()) => Err(BindError::Alive(path.to_owned())),
        Err(e) => match e.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(()),
            io::ErrorKind::WouldBlock => Err(BindError::Alive(path.to_owned())),
            _ => Err(failed("find out who owns", path)(e)),
        },
    }
}

fn gid_of(group: &str) -> Result<u32, BindError> {
    if let Ok(gid) = group.parse() {
        return Ok(gid);
    }
    let groups = fs::read_to_string("/etc/group").map_err(failed("read", Path::new("/etc/group")))?;
    find_gid(&groups, group).ok_or_else(|| BindError::NoSuchGroup(group.to_owned()))
}

/// group(5): `name:password:gid:members`.
fn find_gid(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

/// The name of a group, for messages.
pub(super) fn group_name(gid: u32) -> Option<String> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BindError {
    let path = path.to_owned();
    move |source| BindError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn options(dir: &tempfile::TempDir) -> SocketOptions {
        SocketOptions::new(dir.path().join("meshd.sock"))
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_file_comes_with_its_mode_and_goes_with_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let options = SocketOptions { path: dir.path().join("new/deep/meshd.sock"), mode: 0o600, group: None };
        let socket = AdminSocket::bind(&options).unwrap();
        let parent = dir.path().join("new/deep");
        assert_eq!(fs::metadata(&parent).unwrap().mode() & 0o777, 0o755);
        assert_eq!(fs::metadata(socket.path()).unwrap().mode() & 0o777, 0o600);
        assert_eq!(names(&parent), ["meshd.sock"]);
        assert!(UnixStream::connect(socket.path()).is_ok());
        drop(socket);
        assert!(names(&parent).is_empty());
    }

    #[test]
    fn the_default_mode_is_for_owner_and_group() {
        let dir = tempfile::tempdir().unwrap();
        let own = fs::metadata(dir.path()).unwrap().gid();
        let socket = AdminSocket::bind(&SocketOptions { group: Some(own.to_string()), ..options(&dir) }).unwrap();
        let found = fs::metadata(socket.path()).unwrap();
        assert_eq!((found.mode() & 0o777, found.gid()), (0o660, own));
    }

    #[test]
    fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir);
        drop(UnixListener::bind(&options.path).unwrap());
        assert!(options.path.exists(), "std leaves the file, as a killed meshd does");
        let first = AdminSocket::bind(&options).unwrap();
        assert!(matches!(AdminSocket::bind(&options), Err(BindError::Alive(_))));
        assert!(UnixStream::connect(&options.path).is_ok(), "the first one still answers");
        drop(first);
        assert!(AdminSocket::bind(&options).is_ok());
    }

    #[test]
    fn a_live_one_with_a_full_backlog_is_seen_as_alive() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir);
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&options.path).unwrap()).unwrap();
        socket.listen(0).unwrap();
        let _fills_it = UnixStream::connect(&options.path).unwrap();
        assert!(matches!(AdminSocket::bind(&options), Err(BindError::Alive(_))));
    }

    #[test]
    fn what_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir);
        fs::write(&options.path, "precious").unwrap();
        assert!(matches!(AdminSocket::bind(&options), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&options.path).unwrap(), b"precious");
        fs::remove_file(&options.path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &options.path).unwrap();
        assert!(matches!(AdminSocket::bind(&options), Err(BindError::NotASocket(_))));
        assert_eq!(names(dir.path()), ["meshd.sock"]);
    }

    #[test]
    fn a_successor_s_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir);
        let old = AdminSocket::bind(&options).unwrap();
        fs::rename(&options.path, dir.path().join("aside")).unwrap();
        let new = AdminSocket::bind(&options).unwrap();
        drop(old);
        assert!(UnixStream::connect(new.path()).is_ok());
    }

    #[test]
    fn paths_and_groups_are_checked() {
        let long = SocketOptions::new(format!("/tmp/{}", "x".repeat(120)));
        assert!(matches!(AdminSocket::bind(&long), Err(BindError::TooLong(_))));
        let dir = tempfile::tempdir().unwrap();
        let nobody = SocketOptions { group: Some("no such group".to_owned()), ..options(&dir) };
        assert!(matches!(AdminSocket::bind(&nobody), Err(BindError::NoSuchGroup(_))));
        assert!(names(dir.path()).is_empty());
        let groups = "root:x:0:\nadm:x:4:syslog,me\nbroken\nmesh:x:991:\n";
        assert_eq!(find_gid(groups, "mesh"), Some(991));
        assert_eq!(find_gid(groups, "broken"), None);
        assert_eq!(find_gid(groups, "x"), None);
    }
}
