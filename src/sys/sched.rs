//! sched_setattr(2): how long a thread wants to run at a time.

use std::io;
use std::mem::{size_of, zeroed};

use super::check;

/// Asks for time slices of so many nanoseconds for the calling thread, which keeps its policy and niceness. Shorter slices
/// come sooner: who asks for less than the thread that runs takes its place as soon as it wakes. It is no more time in all
/// (EEVDF; Linux 6.12 has it, older ones ignore it).
pub fn set_slice(slice_ns: u64) -> io::Result<()> {
    // SAFETY: sched_attr is plain data, for which all bits zero is a value.
    let mut attributes: libc::sched_attr = unsafe { zeroed() };
    let size = size_of::<libc::sched_attr>() as libc::c_uint;
    // SAFETY: sched_getattr(2) writes at most `size` bytes of this thread's attributes (thread 0 is the calling one) into one
    // sched_attr, which lives on this stack for the call.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } as libc::c_int)?;
    attributes.sched_runtime = slice_ns;
    // SAFETY: sched_setattr(2) reads one sched_attr, whose size stands in it.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } as libc::c_int).map(drop)
}
