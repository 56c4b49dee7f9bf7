//! One question to the kernel by netlink (netlink(7)), of a family for which there is no library here.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr};

const NLM_F_REQUEST: u16 = 1;
/// Bytes of `nlmsghdr`, which stands before each message.
pub const HEADER: usize = 16;

/// Asks with a message of `kind` and returns the answer, header first: its kind is that of an error where there is none.
/// `None` where this kernel does not have the family. Concerns the network namespace of this thread. Does not wait, but for
/// what the kernel does before it answers.
pub fn ask(family: isize, kind: u16, body: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut socket = match Socket::new(family) {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
        Err(error) => return Err(error),
    };
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut question = Vec::with_capacity(HEADER + body.len());
    question.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    question.extend(kind.to_ne_bytes());
    question.extend(NLM_F_REQUEST.to_ne_bytes());
    question.resize(HEADER, 0);
    question.extend(body);
    socket.send(&question, 0)?;
    // the kernel answers before it returns from the send
    let mut answer = Vec::with_capacity(1024);
    socket.recv(&mut answer, libc::MSG_DONTWAIT)?;
    Ok(Some(answer))
}

/// What kind of message an answer is.
pub fn kind(answer: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?))
}
