//! What one batch will send: runs of datagrams that one send call each can carry.
//!
//! A run is a sequence of datagrams of equal length (the last may be shorter) for the same socket and peer with the same
//! outer TOS: what `UDP_SEGMENT` takes in one message. The batch holds places, not bytes: what was written anew in its own
//! slab, all else where the caller's buffer has it. It does not know sockets.

use std::net::SocketAddr;

use super::tables::{ENCAPSULATION, PeerIndex};

/// A UDP send with more segments fails with EINVAL before Linux 6.10 (`UDP_MAX_SEGMENTS`).
pub const MAX_SEGMENTS: usize = 64;
/// The longest UDP payload over IPv4: 65,535 minus both headers. IPv6 would take 20 bytes more.
pub const MAX_BYTES: usize = 65_507;

/// Some bytes of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// In the batch's own slab.
    Slab {
        /// From here.
        at: u32,
        /// So many bytes.
        len: u32,
    },
    /// In the buffer that holds what was read.
    Payload {
        /// From here.
        at: u32,
        /// So many bytes.
        len: u32,
    },
}

impl Piece {
    /// The bytes, where the piece's place exists.
    #[inline]
    pub fn of<'a>(&self, payload: &'a [u8], slab: &'a [u8]) -> &'a [u8] {
        let (from, at, len) = match *self {
            Piece::Slab { at, len } => (slab, at as usize, len as usize),
            Piece::Payload { at, len } => (payload, at as usize, len as usize),
        };
        from.get(at..at + len).unwrap_or_default()
    }

    fn len(&self) -> usize {
        match *self {
            Piece::Slab { len, .. } | Piece::Payload { len, .. } => len as usize,
        }
    }
}

/// Where datagrams go: only those with the same key can share a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Which of the worker's sending sockets: the flow hash's bucket.
    pub socket: u16,
    /// To whom.
    pub peer: PeerIndex,
}

/// How a TCP super-packet that leaves uncut is to be cut on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uncut {
    /// Whether the inner packet is IPv6.
    pub v6: bool,
    /// Whether it carries CWR, which belongs to the first segment.
    pub cwr: bool,
    /// Bytes of the inner IP header.
    pub transport: u16,
    /// Bytes of all inner headers.
    pub header_len: u16,
    /// Payload bytes of each segment but the last.
    pub size: u16,
}

/// A run of datagrams.
#[derive(Debug)]
pub struct Run {
    /// Socket and peer.
    pub key: Key,
    /// The peer's address.
    pub endpoint: SocketAddr,
    /// Outer DSCP and ECN.
    pub tos: u8,
    /// Bytes of each datagram but the last.
    pub segment_len: u16,
    /// How many datagrams; of an uncut super-packet as many as it becomes.
    pub segments: u16,
    /// Bytes of all those.
    pub bytes: u32,
    /// Bytes of the inner packets.
    pub inner_bytes: u32,
    /// It is one super-packet, and its only piece the datagram that somebody behind meshd will cut.
    pub uncut: Option<Uncut>,
    closed: bool,
    pieces: Vec<Piece>,
}

impl Run {
    /// The bytes in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pieces of each datagram; an uncut super-packet is one.
    pub fn datagrams(&self) -> impl Iterator<Item = &[Piece]> {
        let mut rest = self.pieces.as_slice();
        std::iter::from_fn(move || {
            let mut bytes = 0;
            let ends = |piece: &Piece| {
                bytes += piece.len();
                bytes >= usize::from(self.segment_len)
            };
            let count = rest.iter().position(ends).map_or(rest.len(), |last| last + 1);
            let (datagram, behind) = rest.split_at_checked(count).filter(|_| count > 0)?;
            rest = behind;
            Some(datagram)
        })
    }

    fn takes(&self, tos: u8, len: usize) -> bool {
        !self.closed
            && self.tos == tos
            && len <= usize::from(self.segment_len)
            && usize::from(self.segments) < MAX_SEGMENTS
            && self.bytes as usize + len <= MAX_BYTES
    }
}

/// The batch. Runs are sent in the order in which they were opened; within a key that keeps the order of its datagrams.
#[derive(Debug, Default)]
pub struct TxBatch {
    runs: Vec<Run>,
    used: usize,
    has_uncut: bool,
    slab: Vec<u8>,
}

impl TxBatch {
    /// The runs so far.
    pub fn runs(&self) -> &[Run] {
        self.runs.get(..self.used).unwrap_or_default()
    }

    /// Whether any run is a super-packet that leaves uncut.
    #[inline]
    pub fn has_uncut(&self) -> bool {
        self.has_uncut
    }

    /// The memory that [`Piece::Slab`] points into.
    pub fn slab(&self) -> &[u8] {
        &self.slab
    }

    /// The slab, to append to.
    #[inline]
    pub fn slab_mut(&mut self) -> &mut Vec<u8> {
        &mut self.slab
    }

    /// Forgets everything; memory is kept.
    pub fn clear(&mut self) {
        self.used = 0;
        self.has_uncut = false;
        self.slab.clear();
    }

    /// A run that takes one more datagram of `len` bytes: the last one of this key, or a new one.
    ///
    /// Only the last run of a key is looked at, so that a datagram never overtakes an earlier one.
    #[inline]
    pub fn open(&mut self, key: Key, endpoint: SocketAddr, tos: u8, len: usize) -> &mut Run {
        let last = self.runs().iter().rposition(|run| run.key == key);
        let index = match last {
            Some(index) if self.runs().get(index).is_some_and(|run| run.takes(tos, len)) => index,
            _ => self.add(key, endpoint, tos, len),
        };
        // add() and rposition() give indices of runs that exist
        #[allow(clippy::indexing_slicing)]
        &mut self.runs[index]
    }

    /// A run of one datagram, whatever there is of this key: for what belongs to no peer, where a key names no endpoint.
    pub fn open_alone(&mut self, key: Key, endpoint: SocketAddr, tos: u8, len: usize) -> &mut Run {
        let index = self.add(key, endpoint, tos, len);
        // add() gives the index of a run that exists
        #[allow(clippy::indexing_slicing)]
        let run = &mut self.runs[index];
        run.closed = true;
        run
    }

    /// A super-packet with its encapsulation in one piece, which stands for so many datagrams of so many bytes in all.
    pub fn add_uncut(
        &mut self,
        key: Key,
        endpoint: SocketAddr,
        tos: u8,
        how: Uncut,
        stands_for: (usize, usize),
        piece: Piece,
    ) {
        let (segments, bytes) = stands_for;
        let inner = bytes.saturating_sub(segments * ENCAPSULATION);
        let index = self.add(key, endpoint, tos, piece.len());
        self.has_uncut = true;
        let Some(run) = self.runs.get_mut(index) else { return };
        run.push(piece.len(), inner, &[piece]);
        (run.uncut, run.closed) = (Some(how), true);
        (run.segments, run.bytes) = (segments as u16, bytes as u32);
    }

    fn add(&mut self, key: Key, endpoint: SocketAddr, tos: u8, len: usize) -> usize {
        let index = self.used;
        self.used += 1;
        match self.runs.get_mut(index) {
            Some(run) => {
                run.pieces.clear();
                let pieces = std::mem::take(&mut run.pieces);
                *run = Run::new(key, endpoint, tos, len, pieces);
            }
            None => self.runs.push(Run::new(key, endpoint, tos, len, Vec::with_capacity(2 * MAX_SEGMENTS))),
        }
        index
    }
}

impl Run {
    fn new(key: Key, endpoint: SocketAddr, tos: u8, len: usize, pieces: Vec<Piece>) -> Self {
        let segment_len = len as u16; // at most MAX_BYTES
        Run {
            key,
            endpoint,
            tos,
            segment_len,
            segments: 0,
            bytes: 0,
            inner_bytes: 0,
            uncut: None,
            closed: false,
            pieces,
        }
    }

    /// Adds a datagram of `len` bytes that consists of these pieces and carries an inner packet of `inner` bytes.
    #[inline]
    pub fn push(&mut self, len: usize, inner: usize, pieces: &[Piece]) {
        self.pieces.extend_from_slice(pieces);
        self.segments += 1;
        self.bytes += len as u32;
        self.inner_bytes += inner as u32;
        self.closed |= len != usize::from(self.segment_len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(socket: u16) -> Key {
        Key { socket, peer: PeerIndex(0) }
    }

    fn add(batch: &mut TxBatch, socket: u16, tos: u8, len: usize) {
        let endpoint = "10.0.0.1:1".parse().unwrap();
        let piece = Piece::Payload { at: 0, len: len as u32 };
        batch.open(key(socket), endpoint, tos, len).push(len, len, &[piece]);
    }

    fn shape(batch: &TxBatch) -> Vec<(u16, u8, u16, u16)> {
        batch.runs().iter().map(|r| (r.key.socket, r.tos, r.segment_len, r.segments)).collect()
    }

    #[test]
    fn equal_lengths_share_a_run_and_a_short_one_ends_it() {
        let mut batch = TxBatch::default();
        for len in [100, 100, 60, 60, 100] {
            add(&mut batch, 0, 0, len);
        }
        assert_eq!(shape(&batch), [(0, 0, 100, 3), (0, 0, 60, 1), (0, 0, 100, 1)]);
        let lengths: Vec<_> = batch.runs()[0].datagrams().map(|d| d.iter().map(Piece::len).sum::<usize>()).collect();
        assert_eq!(lengths, [100, 100, 60]);
    }

    #[test]
    fn nothing_overtakes_within_a_key() {
        let mut batch = TxBatch::default();
        for (socket, tos) in [(0, 0), (1, 0), (0, 2), (1, 0), (0, 0)] {
            add(&mut batch, socket, tos, 100);
        }
        assert_eq!(shape(&batch), [(0, 0, 100, 1), (1, 0, 100, 2), (0, 2, 100, 1), (0, 0, 100, 1)]);
    }

    #[test]
    fn limits_of_a_send_hold() {
        let mut batch = TxBatch::default();
        (0..130).for_each(|_| add(&mut batch, 0, 0, 64));
        assert_eq!(shape(&batch), [(0, 0, 64, 64), (0, 0, 64, 64), (0, 0, 64, 2)]);
        batch.clear();
        (0..46).for_each(|_| add(&mut batch, 0, 0, 1472));
        assert_eq!(shape(&batch), [(0, 0, 1472, 44), (0, 0, 1472, 2)]);
        assert!(batch.runs().iter().all(|r| r.bytes as usize <= MAX_BYTES));
    }
}
