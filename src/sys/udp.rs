//! UDP sockets: options that no library sets, and sendmmsg/recvmmsg with `UDP_SEGMENT` and `UDP_GRO` (udp(7), ip(7)).

use std::io;
use std::marker::PhantomData;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use socket2::SockAddr;

use super::check;

const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;
const SO_MEMINFO: libc::c_int = 55;
const SK_MEMINFO_DROPS: usize = 8;

/// An option of a UDP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opt {
    /// Receive runs of equal-size datagrams as one buffer (`UDP_GRO`).
    Gro,
    /// Set DF and ignore what path-MTU discovery found: a datagram is sent as it is, or refused
    /// (`IP_PMTUDISC_PROBE`).
    MtuProbe {
        /// IPv6.
        v6: bool,
    },
    /// Tell the TOS or traffic class of what is received.
    ReceiveTos {
        /// IPv6.
        v6: bool,
    },
    /// No IPv6 flow label: the source port says what belongs together.
    NoFlowLabel,
    /// Room for received datagrams in bytes, beyond the system's limit.
    ReceiveBuffer(u32),
    /// Room for datagrams to send in bytes, beyond the system's limit.
    SendBuffer(u32),
}

/// linux/in6.h
const IPV6_AUTOFLOWLABEL: libc::c_int = 70;

/// Sets an option.
pub fn set(socket: BorrowedFd<'_>, option: Opt) -> io::Result<()> {
    let (level, name, value) = match option {
        Opt::Gro => (libc::SOL_UDP, UDP_GRO, 1),
        Opt::MtuProbe { v6: false } => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        Opt::MtuProbe { v6: true } => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
        Opt::ReceiveTos { v6: false } => (libc::IPPROTO_IP, libc::IP_RECVTOS, 1),
        Opt::ReceiveTos { v6: true } => (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1),
        Opt::NoFlowLabel => (libc::IPPROTO_IPV6, IPV6_AUTOFLOWLABEL, 0),
        Opt::ReceiveBuffer(bytes) => (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes as libc::c_int),
        Opt::SendBuffer(bytes) => (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes as libc::c_int),
    };
    let (fd, length) = (socket.as_raw_fd(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the kernel reads one int of the given length, which lives on this stack for the call.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) }).map(drop)
}

/// Whether the kernel knows `UDP_SEGMENT` on this socket.
pub fn knows_segment(socket: BorrowedFd<'_>) -> bool {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    let fd = socket.as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes into one int, both of which live on this stack for the call.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_UDP, UDP_SEGMENT, (&raw mut value).cast(), &raw mut length) };
    result == 0
}

/// Makes a socket that only sends: whatever arrives at it is discarded by the kernel (a classic BPF filter that accepts
/// no byte), so that it neither fills memory nor answers with an ICMP error.
pub fn discard_received(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut code = [libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }]; // BPF_RET | BPF_K, 0 bytes
    let program = libc::sock_fprog { len: 1, filter: code.as_mut_ptr() };
    let (fd, length) = (socket.as_raw_fd(), size_of::<libc::sock_fprog>() as libc::socklen_t);
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    // SAFETY: the kernel reads one sock_fprog and the one instruction it points to; both live on this stack.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const program).cast(), length) }).map(drop)
}

/// Has the kernel give each WireGuard transport message to a socket of the worker whose number is the lane in the message's
/// receiver index (bits 8 to 11), among the `workers` times `each` sockets that share this one's port. In the order in which
/// they were bound they belong to the workers in turn; the lowest bits of the peer's slot (bits 12 to 15) choose among a
/// worker's. All else is spread by the flow hash as before: the filter's answer is no socket's number then
/// (`reuseport_select_sock` falls back). Set on one of them, it holds for all (socket(7), `SO_ATTACH_REUSEPORT_CBPF`).
pub fn steer(socket: BorrowedFd<'_>, workers: u32, each: u32) -> io::Result<()> {
    const NOBODY: u32 = u32::MAX;
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let alu = |operation, k| op(libc::BPF_ALU | operation | libc::BPF_K, 0, 0, k);
    let (workers, each) = (workers.max(1), each.max(1));
    // the filter sees the datagram from its payload on
    let mut code = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // type 4 and three reserved bytes
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 10, 0x0400_0000),
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 5), // bits 8 to 15 of the little-endian receiver index
        alu(libc::BPF_RSH, 4),
        alu(libc::BPF_MOD, each),
        alu(libc::BPF_MUL, workers),
        op(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0),
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 5),
        alu(libc::BPF_AND, 0x0f),
        alu(libc::BPF_MOD, workers),
        op(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0, 0, 0),
        op(libc::BPF_RET | libc::BPF_A, 0, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, NOBODY),
    ];
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    let (fd, length) = (socket.as_raw_fd(), size_of::<libc::sock_fprog>() as libc::socklen_t);
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF);
    // SAFETY: the kernel reads one sock_fprog and the `len` instructions it points to; both live on this stack.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const program).cast(), length) }).map(drop)
}

/// How many datagrams the kernel discarded at this socket, mostly because its buffer was full (`SO_MEMINFO`).
pub fn drops(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = [0u32; SK_MEMINFO_DROPS + 1];
    let mut length = size_of_val(&info) as libc::socklen_t;
    let fd = socket.as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes into the array, which lives on this stack for the call.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, SO_MEMINFO, info.as_mut_ptr().cast(), &raw mut length) })?;
    Ok(info.last().copied().unwrap_or(0))
}

/// Room for the control messages of one message: two of at most four bytes of data each.
pub(super) const CONTROL_LEN: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

/// Datagrams to send: scratch memory that is used again and again.
#[derive(Default)]
pub struct SendBatch {
    parts: Vec<libc::iovec>,
    messages: Vec<Message>,
    headers: Vec<libc::mmsghdr>,
}

// SAFETY: the raw pointers in here are written by `Sending` and read by its `send` only, while it borrows what they
// point to; between two of those they are dead.
unsafe impl Send for SendBatch {}

struct Message {
    to: SockAddr,
    control: Control,
    control_len: usize,
    first_part: usize,
    parts: usize,
}

/// A batch that is being put together out of bytes that live for `'d`.
pub struct Sending<'s, 'd> {
    batch: &'s mut SendBatch,
    data: PhantomData<&'d [u8]>,
}

impl SendBatch {
    /// Starts a batch.
    pub fn start<'d>(&mut self) -> Sending<'_, 'd> {
        self.parts.clear();
        self.messages.clear();
        Sending { batch: self, data: PhantomData }
    }
}

impl<'d> Sending<'_, 'd> {
    /// Starts a message to `to` with this outer TOS. With `segment` the kernel cuts it into datagrams of that many bytes.
    pub fn message(&mut self, to: SocketAddr, tos: u8, segment: Option<u16>) {
        let mut control = Control([0; CONTROL_LEN]);
        let mut at = 0;
        if let Some(segment) = segment {
            at += put_control(&mut control, at, libc::SOL_UDP, UDP_SEGMENT, &segment.to_ne_bytes());
        }
        if tos != 0 {
            let value = libc::c_int::from(tos).to_ne_bytes();
            let (level, kind) = match to {
                SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            at += put_control(&mut control, at, level, kind, &value);
        }
        let (first_part, to) = (self.batch.parts.len(), SockAddr::from(to));
        self.batch.messages.push(Message { to, control, control_len: at, first_part, parts: 0 });
    }

    /// Adds bytes to the message.
    #[inline]
    pub fn part(&mut self, bytes: &'d [u8]) {
        let base: *mut libc::c_void = bytes.as_ptr().cast_mut().cast();
        let Some(message) = self.batch.messages.last_mut() else { return };
        // what lies directly behind the last part goes with it: the kernel's work grows with the number of parts
        let last = self.batch.parts.last_mut().filter(|_| message.parts > 0);
        if let Some(last) = last.filter(|last| last.iov_base.wrapping_byte_add(last.iov_len) == base) {
            last.iov_len += bytes.len();
            return;
        }
        self.batch.parts.push(libc::iovec { iov_base: base, iov_len: bytes.len() });
        message.parts += 1;
    }

    /// How many messages there are.
    pub fn len(&self) -> usize {
        self.batch.messages.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.batch.messages.is_empty()
    }

    /// Sends the messages from number `from` on, and returns how many left. An error concerns the first of them: nothing
    /// left then.
    pub fn send(&mut self, socket: BorrowedFd<'_>, from: usize) -> io::Result<usize> {
        let SendBatch { parts, messages, headers } = &mut *self.batch;
        headers.clear();
        for message in messages.iter_mut().skip(from) {
            // SAFETY: msghdr is plain data, for which all bits zero is a value.
            let mut header: libc::mmsghdr = unsafe { zeroed() };
            header.msg_hdr.msg_name = message.to.as_ptr().cast_mut().cast();
            header.msg_hdr.msg_namelen = message.to.len();
            header.msg_hdr.msg_iov = parts.as_mut_ptr().wrapping_add(message.first_part);
            header.msg_hdr.msg_iovlen = message.parts as _;
            if message.control_len > 0 {
                header.msg_hdr.msg_control = message.control.0.as_mut_ptr().cast();
                header.msg_hdr.msg_controllen = message.control_len as _;
            }
            headers.push(header);
        }
        let (fd, count) = (socket.as_raw_fd(), headers.len() as libc::c_uint);
        // musl's function of that name is a loop of sendmsg. Its structures are those of the kernel, with zeroes for the
        // upper halves of what it holds to be ints.
        // SAFETY: sendmmsg(2) reads `count` headers. Each points to the address and control bytes of a message in
        // `messages` and to `parts` iovecs from `first_part` on (message() and part() count them together); neither
        // vector changes during the call. The iovecs point to slices that are borrowed for 'd, which outlives `self`.
        let sent = unsafe { libc::syscall(libc::SYS_sendmmsg, fd, headers.as_mut_ptr(), count, libc::MSG_DONTWAIT) };
        Ok(check(sent as libc::c_int)? as usize)
    }
}

/// Writes one control message as CMSG_FIRSTHDR, CMSG_DATA and CMSG_SPACE of cmsg(3) lay it out, and returns its space.
fn put_control(control: &mut Control, at: usize, level: i32, kind: i32, data: &[u8]) -> usize {
    // SAFETY: a pure computation on the length.
    let length = unsafe { libc::CMSG_LEN(data.len() as u32) };
    // SAFETY: likewise.
    let space = unsafe { libc::CMSG_SPACE(data.len() as u32) };
    // SAFETY: cmsghdr is plain data, for which all bits zero is a value; some C libraries name its padding.
    let mut header: libc::cmsghdr = unsafe { zeroed() };
    header.cmsg_len = length as _;
    header.cmsg_level = level;
    header.cmsg_type = kind;
    let data_at = at + length as usize - data.len();
    if at + space as usize <= CONTROL_LEN {
        // SAFETY: cmsghdr is plain data without padding, and as many bytes as it has are read from it.
        let header =
            unsafe { std::slice::from_raw_parts((&raw const header).cast::<u8>(), size_of::<libc::cmsghdr>()) };
        for (to, from) in control.0.iter_mut().skip(at).zip(header) {
            *to = *from;
        }
        for (to, from) in control.0.iter_mut().skip(data_at).zip(data) {
            *to = *from;
        }
    }
    space as usize
}

/// Bytes of one receive buffer: the longest that GRO hands over.
pub const BUFFER_LEN: usize = 65_536;
/// From one buffer to the next. Not a power of two: the fronts of buffers must not all fall into the same cache sets.
const STRIDE: usize = BUFFER_LEN + 17 * 64;

/// Buffers to receive into, used again and again.
pub struct RecvBatch {
    arena: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    parts: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

// SAFETY: the raw pointers in `headers` and `parts` point into the vectors of this same struct and are renewed before
// each call that uses them.
unsafe impl Send for RecvBatch {}

/// What the kernel says of one received buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Where it starts in the arena.
    pub at: usize,
    /// Its bytes.
    pub len: usize,
    /// Bytes of each datagram but the last, where the kernel joined several (`UDP_GRO`).
    pub segment_len: Option<u16>,
    /// Who sent it; `None` for an address family that the socket does not have.
    pub source: Option<SocketAddr>,
    /// TOS or traffic class.
    pub tos: u8,
    /// It was longer than the buffer.
    pub truncated: bool,
}

impl RecvBatch {
    /// So many buffers. Memory is touched only where something was received.
    pub fn new(buffers: usize) -> Self {
        // SAFETY: sockaddr_storage is plain data, for which all bits zero is a value.
        let name = unsafe { zeroed() };
        // SAFETY: likewise mmsghdr.
        let header = unsafe { zeroed() };
        let part = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        RecvBatch {
            arena: vec![0; buffers * STRIDE],
            names: vec![name; buffers],
            controls: vec![Control([0; CONTROL_LEN]); buffers],
            parts: vec![part; buffers],
            headers: vec![header; buffers],
        }
    }

    /// The memory that [`Meta::at`] points into.
    pub fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// The same, to change packets in place.
    pub fn arena_mut(&mut self) -> &mut [u8] {
        &mut self.arena
    }

    /// Receives into at most `limit` buffers without waiting, and returns how many were filled.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        let buffers = self.headers.len().min(limit);
        let per_buffer = self.arena.chunks_exact_mut(STRIDE).zip(&mut self.names).zip(&mut self.controls);
        for (((memory, name), control), (part, header)) in
            per_buffer.zip(self.parts.iter_mut().zip(&mut self.headers)).take(buffers)
        {
            *part = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: BUFFER_LEN };
            let message = &mut header.msg_hdr;
            message.msg_name = (&raw mut *name).cast();
            message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            message.msg_iov = &raw mut *part;
            message.msg_iovlen = 1;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = CONTROL_LEN as _;
            message.msg_flags = 0;
        }
        let (fd, count) = (socket.as_raw_fd(), buffers as libc::c_uint);
        // SAFETY: recvmmsg(2) fills at most `count` headers, which is at most their number. Each points to one name,
        // control buffer and iovec of this struct, set just above with their own lengths; each iovec points to
        // BUFFER_LEN bytes of its own chunk of the arena, which is longer. All are exclusively borrowed.
        let received = check(unsafe {
            libc::recvmmsg(fd, self.headers.as_mut_ptr(), count, libc::MSG_DONTWAIT as _, std::ptr::null_mut())
        })?;
        Ok(received as usize)
    }

    /// What was received into buffer `index` by the last call.
    pub fn meta(&self, index: usize) -> Option<Meta> {
        let (header, name) = (self.headers.get(index)?, self.names.get(index)?);
        let place = (index * STRIDE, (header.msg_len as usize).min(BUFFER_LEN));
        let truncated = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
        // SAFETY: the header was filled by recvmmsg, which set msg_controllen to the bytes that it wrote to msg_control,
        // memory of this struct.
        Some(unsafe { described(place, truncated, source(name), &header.msg_hdr) })
    }
}

/// What a received message's name and control bytes say; `None` where they are longer than this module asks for.
pub(super) fn meta(place: (usize, usize), truncated: bool, name: &[u8], control: &[u8]) -> Option<Meta> {
    // SAFETY: sockaddr_storage is plain data, for which all bits zero is a value.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    if name.len() > size_of_val(&storage) || control.len() > CONTROL_LEN {
        return None;
    }
    // SAFETY: no more bytes than the storage has, which is plain data.
    unsafe { std::ptr::copy_nonoverlapping(name.as_ptr(), (&raw mut storage).cast(), name.len()) };
    let mut aligned = Control([0; CONTROL_LEN]);
    aligned.0.get_mut(..control.len())?.copy_from_slice(control);
    // SAFETY: msghdr is plain data, for which all bits zero is a value.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_control = aligned.0.as_mut_ptr().cast();
    header.msg_controllen = control.len() as _;
    // SAFETY: msg_control points to so many bytes that the kernel wrote, copied into this frame's `aligned`.
    Some(unsafe { described(place, truncated, source(&storage), &header) })
}

/// # Safety
/// `header.msg_control` points to `msg_controllen` bytes of control messages as the kernel writes them.
unsafe fn described(
    (at, len): (usize, usize),
    truncated: bool,
    source: Option<SocketAddr>,
    header: &libc::msghdr,
) -> Meta {
    let mut meta = Meta { at, len, segment_len: None, source, tos: 0, truncated };
    // SAFETY: as the caller says; CMSG_FIRSTHDR and CMSG_NXTHDR stay within those bytes (cmsg(3)).
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: null, or a control message that the kernel wrote there.
    while let Some(message) = unsafe { next.as_ref() } {
        // SAFETY: as above; the kernel aligns control messages.
        let data = unsafe { libc::CMSG_DATA(message) };
        match (message.cmsg_level, message.cmsg_type) {
            (libc::SOL_UDP, UDP_GRO) => {
                // SAFETY: the kernel puts an int here.
                let size = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                meta.segment_len = u16::try_from(size).ok().filter(|size| *size > 0);
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: the kernel puts one byte here.
                meta.tos = unsafe { data.read() };
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                // SAFETY: the kernel puts an int here.
                meta.tos = unsafe { data.cast::<libc::c_int>().read_unaligned() } as u8;
            }
            _ => {}
        }
        // SAFETY: as above.
        next = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    meta
}

fn source(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that this is a sockaddr_in, which is shorter than sockaddr_storage and not more
            // strictly aligned.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
            Some(SocketAddr::new(IpAddr::V4(ip), u16::from_be(name.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: likewise for sockaddr_in6.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            Some(SocketAddr::new(IpAddr::V6(ip), u16::from_be(name.sin6_port)))
        }
        _ => None,
    }
}
