//! The time in this node's handshakes, which only ever grows: peers refuse an initiation that is no later than one they
//! took before, as a replay (WireGuard whitepaper §5.1).
//!
//! The wall clock is read once, at the start. Should somebody set it back before the next, that start goes on from a floor on
//! disk. The floor is a little ahead of what was used, so that it need not be written for each handshake: two seconds
//! after a start, and twice as far each time up to a minute, so that a node that restarts over and over hardly runs ahead
//! of the time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::task::{JoinHandle, spawn_blocking};

use super::kept;
use super::view::{Concern, Shared};
use crate::config::load::read_regular;
use crate::health::machine::NUMBERS_A_SECOND;

const FIRST_STEP_MS: u64 = 2_000;
const LAST_STEP_MS: u64 = 64_000;
/// Between two attempts, where it cannot be written.
const RETRY: Duration = Duration::from_secs(60);
const MAX_BYTES: u64 = 64;

/// What has been used, and promised to the disk. Times are in milliseconds since 1970.
pub(super) struct Stamps {
    path: PathBuf,
    started: Instant,
    /// The time at `started`.
    epoch_ms: u64,
    floor_ms: u64,
    step_ms: u64,
    writing: Option<(u64, JoinHandle<io::Result<()>>)>,
    failed: Option<Instant>,
}

impl Stamps {
    /// Reads the clock and the floor, and writes the next one.
    pub(super) fn start(data_dir: &Path, started: Instant) -> Self {
        let path = data_dir.join("handshake-time");
        let wall_ms = wall_ms();
        let floor_ms = load(&path).unwrap_or_else(|why| {
            tracing::warn!("{}: {why}; handshakes carry the time of the clock", path.display());
            0
        });
        // after a crash it is behind what was promised, and nobody set it back
        if wall_ms + LAST_STEP_MS < floor_ms {
            tracing::warn!(
                "the clock is {} s behind the time in this node's last handshakes, and was set back: they go on from there",
                (floor_ms - wall_ms) / 1000
            );
        }
        let now_ms = wall_ms.max(floor_ms + 1);
        let epoch_ms = now_ms.saturating_sub(started.elapsed().as_millis() as u64);
        let step_ms = FIRST_STEP_MS;
        let mut stamps = Stamps { path, started, epoch_ms, floor_ms, step_ms, writing: None, failed: None };
        match write(&stamps.path, now_ms + step_ms) {
            Ok(()) => stamps.floor_ms = now_ms + step_ms,
            // said at the first tick, which tries again
            Err(_) => stamps.floor_ms = 0,
        }
        stamps
    }

    /// The time at the start of meshd, in milliseconds since 1970: later than in any handshake before it.
    pub(super) fn epoch_ms(&self) -> u64 {
        self.epoch_ms
    }

    fn now_ms(&self) -> u64 {
        self.epoch_ms + self.started.elapsed().as_millis() as u64
    }

    /// To be called each second: writes the next floor before this one is reached, beside the caller.
    pub(super) async fn tick(&mut self, shared: &Arc<Shared>) {
        if let Some((floor_ms, task)) = self.writing.take_if(|(_, task)| task.is_finished()) {
            match task.await.unwrap_or_else(|ended| Err(io::Error::other(ended))) {
                Ok(()) => {
                    (self.floor_ms, self.failed) = (floor_ms, None);
                    shared.settled(Concern::HandshakeTime);
                }
                Err(error) => {
                    self.failed = Some(Instant::now());
                    let message = format!(
                        "{}: cannot be written ({error}); if the clock is set back before the next start, peers refuse \
                         this node's handshakes until it is as late again",
                        self.path.display()
                    );
                    shared.problem(Concern::HandshakeTime, message);
                }
            }
        }
        let waits = self.writing.is_some() || self.failed.is_some_and(|failed| failed.elapsed() < RETRY);
        let now_ms = self.now_ms();
        if waits || now_ms + FIRST_STEP_MS / 2 < self.floor_ms {
            return;
        }
        self.step_ms = (self.step_ms * 2).min(LAST_STEP_MS);
        let (path, floor_ms) = (self.path.clone(), now_ms + self.step_ms);
        self.writing = Some((floor_ms, spawn_blocking(move || write(&path, floor_ms))));
    }

    /// The last: nothing is promised ahead.
    pub(super) async fn stop(&mut self) {
        if let Some((_, task)) = self.writing.take() {
            task.await.ok();
        }
        let (path, now_ms) = (self.path.clone(), self.now_ms());
        if self.floor_ms > 0 {
            spawn_blocking(move || write(&path, now_ms)).await.ok();
        }
    }
}

/// What sequence numbers of BFD follow (`health::machine`): the clock when meshd started, in their steps, in a circle.
pub(super) fn bfd_epoch(started: Instant) -> u32 {
    let since_ms = wall_ms().saturating_sub(started.elapsed().as_millis() as u64);
    (since_ms * u64::from(NUMBERS_A_SECOND) / 1000) as u32
}

fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn load(path: &Path) -> Result<u64, String> {
    let content = match read_regular(path, MAX_BYTES) {
        Ok((content, _)) => content,
        Err(error) if error.is_missing() => return Ok(0),
        Err(error) => return Err(error.to_string()),
    };
    let text = std::str::from_utf8(&content).ok();
    // a century from now is no clock's
    let ms = text.and_then(|text| text.strip_suffix('\n')?.parse().ok()).filter(|ms| *ms < 1 << 43);
    ms.ok_or_else(|| "not the time in milliseconds that meshd writes there".to_owned())
}

fn write(path: &Path, floor_ms: u64) -> io::Result<()> {
    kept::write_whole(path, format!("{floor_ms}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_is_read_as_it_was_written_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handshake-time");
        assert_eq!(load(&path), Ok(0), "a first start");
        write(&path, 1_790_000_000_123).unwrap();
        assert_eq!(load(&path), Ok(1_790_000_000_123));
        let whole = std::fs::read(&path).unwrap();
        for end in 0..whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            assert!(load(&path).is_err(), "cut at {end}");
        }
        std::fs::write(&path, format!("{}\n", u64::MAX)).unwrap();
        assert!(load(&path).is_err(), "a floor that no clock would ever reach");
    }

    #[test]
    fn a_start_is_later_than_anything_before() {
        let dir = tempfile::tempdir().unwrap();
        let first = Stamps::start(dir.path(), Instant::now());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        assert!(first.epoch_ms().abs_diff(now) < 60_000);
        // the clock is a day behind
        let ahead = now + 86_400_000;
        write(&dir.path().join("handshake-time"), ahead).unwrap();
        let second = Stamps::start(dir.path(), Instant::now());
        assert!(second.epoch_ms() > ahead - 1 && second.epoch_ms() < ahead + 1_000);
        let third = Stamps::start(dir.path(), Instant::now());
        assert!(third.epoch_ms() > second.now_ms(), "even after a crash");
    }
}
