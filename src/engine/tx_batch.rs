//! What one batch will send: runs of datagrams that one send call each can carry.
//!
//! A run is a sequence of datagrams of equal length (the last may be shorter) for the same socket and peer with the same
//! outer TOS: what `UDP_SEGMENT` takes in one message. The batch holds places, not bytes: what was written anew in its own
//! slab, all else where the caller's buffer has it. It does not know sockets.
//!
//! Where there may be more to be read than one batch takes, that goes in rounds: a run that is short yet, and whose queue may have
//! more, is set aside for the next round instead of being sent as it is.

use std::net::SocketAddr;

use super::tables::{ENCAPSULATION, PeerIndex};

/// A UDP send with more segments fails with EINVAL before Linux 6.10 (`UDP_MAX_SEGMENTS`).
pub const MAX_SEGMENTS: usize = 64;
/// The longest UDP payload over IPv4: 65,535 minus both headers. IPv6 would take 20 bytes more.
pub const MAX_BYTES: usize = 65_507;

/// Payload bytes that TCP gives a super-packet at most: 64 KiB less `MAX_TCP_HEADER` and one (`sk_dst_gso_max_size`). With more those of
/// full length would take one segment each from the next.
const FULL: usize = 65_215;

/// Pieces of an uncut super-packet at most. With the headers before them they are as many as the kernel has room for
/// without an allocation (`UIO_FASTIOV`).
pub const MAX_PARTS: usize = 7;

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

    /// The same, to change them.
    #[inline]
    pub fn of_mut<'a>(&self, payload: &'a mut [u8], slab: &'a mut [u8]) -> &'a mut [u8] {
        let (from, at, len) = match *self {
            Piece::Slab { at, len } => (slab, at as usize, len as usize),
            Piece::Payload { at, len } => (payload, at as usize, len as usize),
        };
        from.get_mut(at..at + len).unwrap_or_default()
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
    /// It is one super-packet, or may become one.
    uncut: Option<Uncut>,
    closed: bool,
    waits: bool,
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

    /// Whether it is one super-packet that somebody behind meshd will cut: its pieces are one datagram, with all headers in the
    /// first.
    #[inline]
    pub fn uncut(&self) -> Option<Uncut> {
        self.uncut.filter(|_| self.segments > 1)
    }

    /// The same, or a single segment that may become one.
    #[inline]
    pub(super) fn may_grow(&self) -> Option<Uncut> {
        self.uncut
    }

    /// How many more segments fit into this super-packet.
    #[inline]
    pub(super) fn room(&self) -> usize {
        let (size, payload) = (self.uncut.map_or(1, |how| usize::from(how.size).max(1)), self.payload());
        let open = payload.is_multiple_of(size) && self.pieces.len() < MAX_PARTS;
        if open { FULL.saturating_sub(payload) / size } else { 0 }
    }

    /// Payload bytes of this super-packet.
    #[inline]
    pub(super) fn payload(&self) -> usize {
        let headers = usize::from(self.segments) * self.uncut.map_or(0, |how| usize::from(how.header_len));
        (self.inner_bytes as usize).saturating_sub(headers)
    }

    /// Whether so much fits yet that it is worth to wait for it, or to split what follows: a quarter.
    #[inline]
    pub(super) fn is_short(&self) -> bool {
        match self.uncut {
            Some(_) => self.room() > 0 && self.payload() <= FULL / 4 * 3,
            None => {
                self.takes(self.tos, usize::from(self.segment_len))
                    && usize::from(self.segments) <= MAX_SEGMENTS / 4 * 3
                    && self.bytes as usize <= MAX_BYTES / 4 * 3
            }
        }
    }

    fn takes(&self, tos: u8, len: usize) -> bool {
        !self.closed
            && self.tos == tos
            && len <= usize::from(self.segment_len)
            && usize::from(self.segments) < MAX_SEGMENTS
            && self.bytes as usize + len <= MAX_BYTES
    }
}

/// The batch. Within a key runs are sent in the order in which they were opened, and have their datagrams in order.
#[derive(Debug, Default)]
pub struct TxBatch {
    runs: Vec<Run>,
    used: usize,
    has_uncut: bool,
    /// The last super-packet that was to leave uncut, of this batch or an earlier one.
    recent_uncut: Option<(Key, Uncut)>,
    /// The run that took something last.
    last: usize,
    /// So many, the last ones, are set aside.
    aside: usize,
    slab: Vec<u8>,
    /// What becomes the slab when something was set aside.
    spare: Vec<u8>,
}

impl TxBatch {
    /// What is to be sent.
    pub fn runs(&self) -> &[Run] {
        self.runs.get(..self.used - self.aside).unwrap_or_default()
    }

    /// More may follow on what came last: the run that it went into may wait for that.
    #[inline]
    pub fn more_follows(&mut self) {
        if let Some(run) = self.runs.get_mut(..self.used).and_then(|runs| runs.get_mut(self.last)) {
            run.waits = true;
        }
    }

    /// Sets aside the runs that may wait and are short: they are no part of this batch, and the first ones of the next. Returns
    /// whether there are any.
    pub fn set_aside(&mut self) -> bool {
        for index in (0..self.used).rev() {
            let Some([run, behind @ ..]) = self.runs.get_mut(index..self.used) else { break };
            // a flow that has something in it may have more behind it
            let waits =
                std::mem::take(&mut run.waits) && run.is_short() && behind.iter().all(|other| other.key != run.key);
            if let Some(to_send) = self.runs.get_mut(index..self.used - self.aside).filter(|_| waits) {
                to_send.rotate_left(1);
                self.aside += 1;
            }
        }
        self.aside > 0
    }

    /// Whether anything that was set aside lies in the caller's buffer.
    pub fn needs_payload(&self) -> bool {
        let aside = self.runs.get(self.used - self.aside..self.used).unwrap_or_default();
        aside.iter().flat_map(|run| &run.pieces).any(|piece| matches!(piece, Piece::Payload { .. }))
    }

    /// The last run of this key, with the slab.
    #[inline]
    pub(super) fn last_of(&mut self, key: Key) -> Option<(&mut Run, &mut [u8])> {
        let index = self.runs().iter().rposition(|run| run.key == key)?;
        self.last = index;
        Some((self.runs.get_mut(index)?, &mut self.slab))
    }

    /// Whether any run is a super-packet that leaves uncut, or may become one.
    #[inline]
    pub fn has_uncut(&self) -> bool {
        self.has_uncut
    }

    /// How the last super-packet of all was to be cut, if it had this key: a full segment may be the beginning of another. It is not
    /// where the one before was nothing but single segments either: they fill runs of their own better.
    #[inline]
    pub(super) fn recent_uncut(&mut self, key: Key) -> Option<Uncut> {
        let (_, how) = self.recent_uncut.filter(|(recent, _)| *recent == key)?;
        let last = self.runs().iter().rfind(|run| run.key == key);
        if last.is_some_and(|run| run.uncut.is_some() && run.pieces.len() == usize::from(run.segments)) {
            self.recent_uncut = None;
        }
        self.recent_uncut.map(|_| how)
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

    /// Starts the next batch, with what was set aside. Memory is kept.
    pub fn clear(&mut self) {
        if let Some(runs) = self.runs.get_mut(..self.used).filter(|_| self.aside > 0) {
            runs.rotate_right(self.aside);
        }
        (self.used, self.aside) = (self.aside, 0);
        self.last = usize::MAX;
        let runs = self.runs.get_mut(..self.used).unwrap_or_default();
        self.has_uncut = runs.iter().any(|run| run.uncut.is_some());
        if runs.is_empty() {
            return self.slab.clear();
        }
        // else the slab would grow from round to round, out of the cache
        for piece in runs.iter_mut().flat_map(|run| &mut run.pieces) {
            let bytes = piece.of(&[], &self.slab);
            if let Piece::Slab { at, .. } = piece {
                *at = self.spare.len() as u32;
                self.spare.extend_from_slice(bytes);
            }
        }
        std::mem::swap(&mut self.slab, &mut self.spare);
        self.spare.clear();
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
        self.last = index;
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

    /// A super-packet, encapsulated, that stands for so many segments with so many bytes in all; or a single segment that may
    /// become one, complete as it is.
    pub fn add_uncut(
        &mut self,
        key: Key,
        endpoint: SocketAddr,
        tos: u8,
        how: Uncut,
        stands_for: (usize, usize),
        pieces: &[Piece],
    ) {
        let index = self.add(key, endpoint, tos, 0);
        (self.has_uncut, self.last) = (true, index);
        if stands_for.0 > 1 {
            self.recent_uncut = Some((key, how));
        }
        let Some(run) = self.runs.get_mut(index) else { return };
        (run.uncut, run.closed) = (Some(how), true);
        let (segments, inner) = stands_for;
        run.grow(segments, inner, pieces);
    }

    fn add(&mut self, key: Key, endpoint: SocketAddr, tos: u8, len: usize) -> usize {
        debug_assert_eq!(self.aside, 0, "nothing is added between set_aside() and clear()");
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
            waits: false,
            pieces,
        }
    }

    /// Lengthens an uncut super-packet by so many segments, which have so many bytes in all when they are cut.
    pub(super) fn grow(&mut self, segments: usize, inner: usize, pieces: &[Piece]) {
        self.pieces.extend_from_slice(pieces);
        self.segment_len += pieces.iter().map(Piece::len).sum::<usize>() as u16;
        self.segments += segments as u16;
        self.bytes += (segments * ENCAPSULATION + inner) as u32;
        self.inner_bytes += inner as u32;
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
