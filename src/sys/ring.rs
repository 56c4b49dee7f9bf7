//! io_uring(7) for one worker: descriptors that are read all the time into buffers of the ring's own (multishot reads
//! and receives with provided buffers), and writes in batches.
//!
//! The ring is made with `IORING_SETUP_DEFER_TASKRUN`: the kernel fills buffers only inside [`Ring::wait`], in this
//! thread. So between two waits the memory belongs to the caller, as a buffer does that read(2) has filled.

use std::alloc::{self, Layout};
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use io_uring::types::{BufRingEntry, CancelBuilder, Fixed, RecvMsgOut, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::udp::{self, CONTROL_LEN, Meta};

/// Submissions that fit at once.
const ENTRIES: u32 = 128;
/// Buffers of one descriptor: a power of two, and together little more than what a core's cache holds.
const BUFFERS: u16 = 16;
/// Bytes of one buffer: the longest super-packet or GRO buffer with what goes before it. Not a power of two, so that the
/// fronts of buffers do not all fall into the same cache sets.
const STRIDE: usize = (64 << 10) + 9 * 64;
/// Where a page begins: what the kernel wants of a ring of buffers.
const PAGE: usize = 4096;
/// Marks a submission as a write; the number of the write is below.
const WRITE: u64 = 1 << 32;

/// Something that is read all the time.
#[derive(Debug, Clone, Copy)]
pub enum Source<'fd> {
    /// Frames by read(2), with so many bytes of room before each.
    Frames(BorrowedFd<'fd>, usize),
    /// Datagrams by recvmsg(2).
    Datagrams(BorrowedFd<'fd>),
    /// Readable once is all there is to know.
    Signal(BorrowedFd<'fd>),
}

/// What happened at a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A buffer was filled: to be given back.
    Filled {
        /// The source's number.
        source: usize,
        /// The buffer's number.
        buffer: u16,
        /// How many bytes.
        len: usize,
    },
    /// A [`Source::Signal`] became readable.
    Signalled(usize),
    /// Reading failed with this error number; it goes on with the next wait.
    Failed(usize, i32),
}

/// A ring with its sources. While it lives, the kernel may fill the buffers.
pub struct Ring {
    queue: Queue,
    buffers: Vec<Buffers>,
}

/// What is asked of the kernel, and what it answers.
pub struct Queue {
    uring: IoUring,
    sources: Vec<Reader>,
    /// What the receives are to hold; the kernel looks at the lengths in it for as long as they run.
    message: Box<libc::msghdr>,
    writes: Writes,
    /// Seen while writes were waited for.
    early: Vec<Event>,
}

#[derive(Clone, Copy)]
struct Reader {
    kind: Kind,
    armed: bool,
}

#[derive(Clone, Copy)]
enum Kind {
    Frames,
    Datagrams,
    Signal,
}

/// A batch of writes: scratch memory that is used again and again.
#[derive(Default)]
struct Writes {
    parts: Vec<libc::iovec>,
    /// Of each write the first part and how many.
    ranges: Vec<(usize, u32)>,
    /// How each ended.
    ended: Vec<i32>,
    open: usize,
}

/// Whether this kernel has what is needed (Linux 6.7), and whether a sandbox lets us use it.
pub fn supported() -> io::Result<()> {
    let ring = Ring::new(&[])?;
    let mut probe = io_uring::Probe::new();
    ring.queue.uring.submitter().register_probe(&mut probe)?;
    if probe.is_supported(opcode::ReadMulti::CODE) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel has no multishot read (Linux 6.7 has it)"))
}

impl Ring {
    /// A ring that reads these. To be made in the thread that uses it.
    pub fn new(sources: &[Source<'_>]) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(4 * ENTRIES)
            .build(ENTRIES)?;
        let fds: Vec<RawFd> = sources
            .iter()
            .map(|source| match source {
                Source::Frames(fd, _) | Source::Datagrams(fd) | Source::Signal(fd) => fd.as_raw_fd(),
            })
            .collect();
        if !fds.is_empty() {
            // the ring holds them from now on, whatever becomes of the descriptors
            uring.submitter().register_files(&fds)?;
        }
        let (mut readers, mut buffers) = (Vec::new(), Vec::new());
        for source in sources {
            let (kind, count, front) = match *source {
                Source::Frames(_, front) => (Kind::Frames, BUFFERS, front),
                Source::Datagrams(_) => (Kind::Datagrams, BUFFERS, 0),
                Source::Signal(_) => (Kind::Signal, 0, 0),
            };
            readers.push(Reader { kind, armed: false });
            buffers.push(Buffers::new(count, front));
        }
        let message = Box::new(shape());
        let queue = Queue { uring, sources: readers, message, writes: Writes::default(), early: Vec::new() };
        // from here on dropping waits for the kernel
        let mut ring = Ring { queue, buffers };
        for (group, buffers) in (0u16..).zip(&mut ring.buffers) {
            buffers.register(&ring.queue.uring, group)?;
        }
        Ok(ring)
    }

    /// The halves: the queue, and each source's buffers.
    pub fn split(&mut self) -> (&mut Queue, &mut [Buffers]) {
        (&mut self.queue, &mut self.buffers)
    }

    /// Waits until something happens, at most so long, and adds it to `events`. What stopped being read is read again.
    pub fn wait(&mut self, at_most: Duration, events: &mut Vec<Event>) -> io::Result<()> {
        let Queue { early, .. } = &mut self.queue;
        events.append(early);
        let at_most = if events.is_empty() { at_most } else { Duration::ZERO };
        self.queue.arm()?;
        let timeout = Timespec::from(at_most);
        match self.queue.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout)) {
            Ok(_) => {}
            // it took too long, or there is more than fits: what there is comes now, the rest next time
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => {}
            Err(error) => return Err(error),
        }
        self.queue.reap();
        events.append(&mut self.queue.early);
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // without a timeout this returns when no request is left that could write to a buffer
        let cancelled = self.queue.uring.submitter().register_sync_cancel(None, CancelBuilder::any());
        if cancelled.is_err_and(|error| error.raw_os_error() != Some(libc::ENOENT)) {
            // nobody knows what the kernel still does: the memory is given up
            std::mem::take(&mut self.buffers).into_iter().for_each(std::mem::forget);
            std::mem::forget(std::mem::replace(&mut self.queue.message, Box::new(shape())));
            std::mem::forget(std::mem::take(&mut self.queue.writes));
        }
        // closed alone, a ring gives its files back at some later time, and its sockets would receive until then
        self.queue.uring.submitter().unregister_files().ok();
    }
}

impl Queue {
    /// Has every source be read that is not.
    fn arm(&mut self) -> io::Result<()> {
        for index in 0..self.sources.len() {
            let Some(source) = self.sources.get_mut(index).filter(|source| !source.armed) else { continue };
            let (fd, group) = (Fixed(index as u32), index as u16);
            let entry = match source.kind {
                // this build() forgets that the descriptor is a registered one (io-uring 0.7.15)
                Kind::Frames => {
                    opcode::ReadMulti::new(fd, 0, group).offset(u64::MAX).build().flags(squeue::Flags::FIXED_FILE)
                }
                Kind::Datagrams => opcode::RecvMsgMulti::new(fd, &raw const *self.message, group).build(),
                Kind::Signal => opcode::PollAdd::new(fd, libc::POLLIN as u32).build(),
            };
            source.armed = true;
            self.push(&entry.user_data(index as u64))?;
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to lives until it has ended: buffers and `message` as long as the ring (see
            // Ring::drop), parts and data of writes until `write` returns. Descriptors are registered.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.uring.submit()?;
        }
    }

    /// Writes frames to source number `to`, in order. Returns how each ended: the bytes written, or a negative error number.
    ///
    /// A frame that cannot be written at once is refused, as by a descriptor that does not block.
    pub fn write<'d, F>(&mut self, to: usize, frames: impl Iterator<Item = F>) -> io::Result<&[i32]>
    where
        F: Iterator<Item = &'d [u8]>,
    {
        let Writes { parts, ranges, ended, open } = &mut self.writes;
        parts.clear();
        ranges.clear();
        for frame in frames {
            let first = parts.len();
            parts.extend(
                frame.map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }),
            );
            ranges.push((first, (parts.len() - first) as u32));
        }
        *open = ranges.len();
        ended.clear();
        ended.resize(ranges.len(), 0);
        for index in 0..self.writes.ranges.len() {
            let Some(&(first, count)) = self.writes.ranges.get(index) else { break };
            let parts = self.writes.parts.as_ptr().wrapping_add(first);
            let entry = opcode::Writev::new(Fixed(to as u32), parts, count).offset(u64::MAX).build();
            self.push(&entry.user_data(WRITE | index as u64))?;
        }
        self.uring.submit()?;
        self.reap();
        while self.writes.open > 0 {
            // the kernel has put one off
            self.uring.submit_and_wait(1)?;
            self.reap();
        }
        Ok(&self.writes.ended)
    }

    /// Takes what has ended.
    fn reap(&mut self) {
        let Queue { uring, sources, writes, early, .. } = self;
        for entry in uring.completion() {
            let (number, result) = (entry.user_data(), entry.result());
            if number & WRITE != 0 {
                if let Some(ended) = writes.ended.get_mut((number & !WRITE) as usize) {
                    *ended = result;
                }
                writes.open = writes.open.saturating_sub(1);
                continue;
            }
            let index = number as usize;
            let Some(source) = sources.get_mut(index) else { continue };
            source.armed &= cqueue::more(entry.flags());
            let buffer = cqueue::buffer_select(entry.flags());
            early.push(match (source.kind, buffer) {
                (Kind::Signal, _) => Event::Signalled(index),
                (_, Some(buffer)) => Event::Filled { source: index, buffer, len: result.max(0) as usize },
                // no buffer was left: there will be
                (_, None) if matches!(-result, libc::ENOBUFS | libc::ECANCELED | 0) => continue,
                (_, None) => Event::Failed(index, -result),
            });
        }
    }
}

/// Bytes that hold whom a datagram came from.
const NAME_LEN: usize = size_of::<libc::sockaddr_storage>();

/// The lengths of a received message's name and control bytes.
fn shape() -> libc::msghdr {
    // SAFETY: msghdr is plain data, for which all bits zero is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_namelen = NAME_LEN as libc::socklen_t;
    message.msg_controllen = CONTROL_LEN as _;
    message
}

/// The buffers of one source, and the ring in which the kernel finds those that are free.
pub struct Buffers {
    memory: Vec<u8>,
    count: u16,
    front: usize,
    free: NonNull<BufRingEntry>,
    tail: u16,
}

impl Buffers {
    fn new(count: u16, front: usize) -> Self {
        let free = match Self::layout(count) {
            // SAFETY: the layout is not empty.
            Some(layout) => match NonNull::new(unsafe { alloc::alloc_zeroed(layout) }) {
                Some(memory) => memory.cast(),
                None => alloc::handle_alloc_error(layout),
            },
            None => NonNull::dangling(),
        };
        Buffers { memory: vec![0; usize::from(count) * STRIDE], count, front, free, tail: 0 }
    }

    /// Of the ring of free buffers; a source that needs none has none.
    fn layout(count: u16) -> Option<Layout> {
        let bytes = usize::from(count) * size_of::<BufRingEntry>();
        Layout::from_size_align(bytes, PAGE).ok().filter(|layout| layout.size() > 0)
    }

    fn register(&mut self, uring: &IoUring, group: u16) -> io::Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let at = self.free.as_ptr() as u64;
        // SAFETY: `count` entries lie there, aligned to a page, until the Ring has waited for the kernel (Ring::drop).
        unsafe { uring.submitter().register_buf_ring_with_flags(at, self.count, group, 0) }?;
        (0..self.count).for_each(|buffer| self.give_back(buffer));
        Ok(())
    }

    /// Where the bytes start that were read into this buffer.
    pub fn at(&self, buffer: u16) -> usize {
        usize::from(buffer) * STRIDE + self.front
    }

    /// All buffers.
    pub fn memory(&self) -> &[u8] {
        &self.memory
    }

    /// The same, to change packets in place.
    pub fn memory_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    /// What was received into this buffer; `None` if the kernel wrote something else than that.
    pub fn datagrams(&self, buffer: u16, len: usize) -> Option<Meta> {
        let at = self.at(buffer);
        let bytes = self.memory.get(at..at + len)?;
        let out = RecvMsgOut::parse(bytes, &shape()).ok()?;
        let truncated = out.is_payload_truncated();
        let payload = len - out.payload_data().len();
        udp::meta((at + payload, out.payload_data().len()), truncated, out.name_data(), out.control_data())
    }

    /// Lets the kernel fill the buffer again.
    pub fn give_back(&mut self, buffer: u16) {
        if buffer >= self.count {
            return;
        }
        let slot = usize::from(self.tail % self.count);
        let Some(memory) = self.memory.get_mut(usize::from(buffer) * STRIDE + self.front..) else { return };
        let room = STRIDE - self.front;
        // SAFETY: `slot` is below `count`, and so many entries lie there.
        let entry = unsafe { self.free.add(slot) };
        // SAFETY: it is aligned and initialised with zeroes; the kernel reads it only after the tail says so.
        let entry = unsafe { &mut *entry.as_ptr() };
        entry.set_addr(memory.as_mut_ptr() as u64);
        entry.set_len(room.min(memory.len()) as u32);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: this is the ring's first entry, within which the tail lies (io_uring_setup_buf_ring(3)).
        let tail = unsafe { BufRingEntry::tail(self.free.as_ptr()) };
        // SAFETY: it is aligned, lives as long as the buffers, and only this thread writes it; the kernel reads it as an atomic.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.count) {
            // SAFETY: it was allocated with this layout, and the kernel is done with it (Ring::drop).
            unsafe { alloc::dealloc(self.free.as_ptr().cast(), layout) };
        }
    }
}
