//! The terminal, while a secret is typed.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::check;

/// A terminal that shows nothing of what is typed, until this is dropped.
#[derive(Debug)]
pub struct Quiet<'t> {
    terminal: BorrowedFd<'t>,
    before: libc::termios,
}

/// Has the terminal show nothing but the end of the line.
pub fn quiet(terminal: &impl AsFd) -> io::Result<Quiet<'_>> {
    let terminal = terminal.as_fd();
    let mut before = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the descriptor is open as long as it is borrowed, and the kernel writes one termios into memory of that size.
    check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), before.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so the kernel has filled it in.
    let before = unsafe { before.assume_init() };
    let mut quiet = before;
    quiet.c_lflag &= !libc::ECHO;
    quiet.c_lflag |= libc::ECHONL;
    // what was typed before this question was not meant as its answer
    // SAFETY: the descriptor is open, and the pointer is to a whole termios that lives until the call returns.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSAFLUSH, &quiet) })?;
    Ok(Quiet { terminal, before })
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        // SAFETY: the descriptor is borrowed for as long as this lives, and the termios is the one that the kernel gave.
        unsafe { libc::tcsetattr(self.terminal.as_raw_fd(), libc::TCSANOW, &self.before) };
    }
}
