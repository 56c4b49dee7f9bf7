//! poll(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// Something to read, or an error to fetch by reading.
pub const READABLE: i16 = libc::POLLIN;
/// Room to write.
pub const WRITABLE: i16 = libc::POLLOUT;
/// The other end is gone, or the device is.
pub const BROKEN: i16 = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;

/// One descriptor to wait for.
#[derive(Debug)]
#[repr(transparent)]
pub struct PollFd<'a>(libc::pollfd, std::marker::PhantomData<BorrowedFd<'a>>);

impl<'a> PollFd<'a> {
    /// Waits for `events` on `fd`.
    pub fn new(fd: BorrowedFd<'a>, events: i16) -> Self {
        PollFd(libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }, std::marker::PhantomData)
    }

    /// What happened.
    pub fn happened(&self) -> i16 {
        self.0.revents
    }
}

/// Waits until something happens, for ever or so many milliseconds. An interrupting signal counts as nothing happening.
pub fn poll(fds: &mut [PollFd<'_>], timeout_ms: Option<u16>) -> io::Result<()> {
    let timeout = timeout_ms.map_or(-1, libc::c_int::from);
    let count = fds.len() as libc::nfds_t;
    // SAFETY: PollFd is repr(transparent) over pollfd; pointer and count are those of one exclusively borrowed slice,
    // whose descriptors are borrowed for as long.
    let result = check(unsafe { libc::poll(fds.as_mut_ptr().cast(), count, timeout) });
    match result {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        other => other.map(drop),
    }
}
