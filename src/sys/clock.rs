//! Whether the kernel takes its clock for synchronised.

use std::io;
use std::mem::MaybeUninit;

use super::check;

/// Whether something (NTP, PTP) has told the kernel that its clock is right, and tells it again and again.
pub fn is_synchronised() -> io::Result<bool> {
    let mut timex = MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: `modes` is 0, so that nothing is changed and no privilege is needed; the kernel writes one timex into memory
    // of that size, which lives until the call returns.
    let state = check(unsafe { libc::adjtimex(timex.as_mut_ptr()) })?;
    Ok(state != libc::TIME_ERROR)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernel_answers() {
        super::is_synchronised().unwrap();
    }
}
