//! The TUN device with offload headers: its queues, and what it was found to offload.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use crate::engine::coalesce::{Accepts, MAX_PIECES, Unit};
use crate::engine::inbound::Inbound;
use crate::engine::tx_batch::Piece;
use crate::sys::tun;

/// Why the device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// There is no /dev/net/tun.
    #[error(
        "there is no /dev/net/tun: load the module with `modprobe tun`, or hand the device to the container (`--device /dev/net/tun`)"
    )]
    NoDevice,
    /// Not permitted.
    #[error(
        "no permission to make the TUN device {0}: meshd needs CAP_NET_ADMIN; run it as root, or give it that capability"
    )]
    Denied(String),
    /// Offload headers are refused.
    #[error("the TUN device {0} cannot have offload headers; `io: tokio` does without")]
    NoOffload(String),
    /// Another process uses the device.
    #[error("the TUN device {0} is in use by another process: stop that, or set another name with `tun:`")]
    Busy(String),
    /// Something else.
    #[error("cannot open the TUN device {name}: {source}")]
    Io {
        /// The device.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// An open device.
#[derive(Debug)]
pub struct TunDevice {
    /// Its queues.
    pub queues: Vec<TunQueue>,
    /// What it takes and hands over.
    pub accepts: Accepts,
    /// Why it offloads less than it could, by offload.
    pub reasons: Vec<(&'static str, String)>,
}

impl TunDevice {
    /// Opens `name` with so many queues, and switches on what it can offload.
    pub fn open(name: &str, queues: usize) -> Result<Self, TunError> {
        let open = |_| tun::open_queue(name).map(|file| TunQueue { file }).map_err(|error| explain(name, error));
        let queues = (0..queues.max(1)).map(open).collect::<Result<Vec<_>, _>>()?;
        let Some(TunQueue { file: first }) = queues.first() else { return Err(TunError::Busy(name.to_owned())) };
        let tcp = tun::F_CSUM | tun::F_TSO4 | tun::F_TSO6 | tun::F_TSO_ECN;
        let mut reasons = Vec::new();
        let uso = tun::set_offload(first, tcp | tun::F_USO4 | tun::F_USO6);
        if let Err(error) = &uso {
            let reason = format!("the kernel refuses UDP segmentation on a TUN device (Linux 6.2 has it): {error}");
            reasons.push(("tun_uso", reason));
        }
        let tso = if uso.is_ok() { Ok(()) } else { tun::set_offload(first, tcp) };
        if let Err(error) = &tso {
            reasons.push(("tun_tso", format!("the kernel refuses TCP segmentation on this TUN device: {error}")));
            tun::set_offload(first, 0).map_err(|error| explain(name, error))?;
        }
        let accepts = Accepts { tso: tso.is_ok(), uso: uso.is_ok() };
        Ok(TunDevice { queues, accepts, reasons })
    }
}

pub(super) fn explain(name: &str, error: io::Error) -> TunError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDevice,
        Some(libc::EPERM | libc::EACCES) => TunError::Denied(name.to_owned()),
        Some(libc::EINVAL) => TunError::NoOffload(name.to_owned()),
        Some(libc::EBUSY) => TunError::Busy(name.to_owned()),
        _ => TunError::Io { name: name.to_owned(), source: error },
    }
}

/// Says what the device's refusal of a unit means for those to come. Before Linux 6.6 it takes no more than some 68 KiB.
pub(super) fn refused(inbound: &Inbound, unit: &Unit, errno: i32) {
    match errno {
        libc::EMSGSIZE => inbound.refused(unit, true),
        libc::ENOBUFS | libc::ENOMEM => inbound.refused(unit, false),
        _ => {}
    }
}

/// So many pieces most units have at most.
const FEW_PIECES: usize = 16;

/// One queue.
#[derive(Debug)]
pub struct TunQueue {
    file: File,
}

impl TunQueue {
    /// Anything that can be read and written stands for a queue.
    #[cfg(test)]
    pub(super) fn of(file: impl Into<std::os::fd::OwnedFd>) -> Self {
        TunQueue { file: File::from(file.into()) }
    }

    /// To wait for it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Has the device stay when meshd ends: with it routes would go, and traffic for the mesh would leave by another
    /// way, in clear.
    pub fn keep_device(&self) -> io::Result<()> {
        tun::set_persist(&self.file, true)
    }

    /// Reads one frame, offload header first.
    #[inline]
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes the units of a batch, and has each counted.
    #[inline]
    pub(crate) fn write_units(&self, inbound: &Inbound, arena: &[u8]) {
        for unit in inbound.units() {
            let written = self.write_pieces(unit.pieces(), arena, inbound.slab());
            inbound.written(unit, written.is_ok());
            if let Err(error) = written {
                refused(inbound, unit, error.raw_os_error().unwrap_or(0));
            }
        }
    }

    /// Writes one frame that lies in pieces in the receive arena and the slab.
    #[inline]
    fn write_pieces(&self, pieces: &[Piece], arena: &[u8], slab: &[u8]) -> io::Result<()> {
        match pieces.len() {
            ..=FEW_PIECES => self.write_at_most::<FEW_PIECES>(pieces, arena, slab),
            _ => self.write_at_most::<MAX_PIECES>(pieces, arena, slab),
        }
    }

    #[inline]
    fn write_at_most<const N: usize>(&self, pieces: &[Piece], arena: &[u8], slab: &[u8]) -> io::Result<()> {
        if let [piece] = pieces {
            return self.write(piece.of(arena, slab));
        }
        let mut slices = [IoSlice::new(&[]); N];
        let count = pieces.len().min(N);
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(piece.of(arena, slab));
        }
        (&self.file).write_vectored(slices.get(..count).unwrap_or_default()).map(drop)
    }

    /// Writes one frame.
    #[inline]
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }
}

/// Whether a read failed because the device was deleted.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::ENODEV))
}
