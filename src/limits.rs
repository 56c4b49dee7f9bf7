//! What the system allows this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::Workers;

/// How many workers that is here, 1 to 64.
pub fn workers(wanted: Workers) -> usize {
    match wanted {
        Workers::Auto => std::thread::available_parallelism().map_or(1, usize::from).min(64),
        Workers::Fixed(workers) => usize::from(workers.get()),
    }
}

/// How many descriptors this process may have, after asking for all that it may; `None`: any number.
pub fn descriptors() -> Option<usize> {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.and_then(|n| usize::try_from(n).ok())
}
