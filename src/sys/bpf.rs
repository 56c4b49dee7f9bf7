//! bpf(2): one small program, which hands what a device receives to the neighbour that the routing table names, as this host's
//! own packets are, and gives back what has no way.
//!
//! It stands in the ingress hook of a device that meshd alone writes to (tcx, linux/bpf.h), so that neither forwarding
//! nor its firewall rules have a part in it: the packets are this host's, not somebody else's.

use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

// enum bpf_cmd, enum bpf_prog_type, enum bpf_attach_type
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const TCX_INGRESS: u32 = 46;

// Numbers of the helpers (linux/bpf.h, __BPF_FUNC_MAPPER).
const SKB_LOAD_BYTES: i32 = 26;
const REDIRECT: i32 = 23;
const FIB_LOOKUP: i32 = 69;
const REDIRECT_NEIGH: i32 = 152;

/// `BPF_FIB_LOOKUP_SKIP_NEIGH` (Linux 6.3): the neighbour is looked for by the redirection.
const SKIP_NEIGH: i32 = 4;

// struct __sk_buff
const SKB_QUEUE_MAPPING: i16 = 12;
const SKB_PROTOCOL: i16 = 16;
const SKB_IFINDEX: i16 = 40;

// struct bpf_fib_lookup, on the stack
const FIB: i16 = -64;
const FIB_FAMILY: i16 = FIB;
const FIB_L4_PROTOCOL: i16 = FIB + 1;
const FIB_PORTS: i16 = FIB + 2;
const FIB_IFINDEX: i16 = FIB + 8;
const FIB_SOURCE: i16 = FIB + 16;
const FIB_DESTINATION: i16 = FIB + 32;
const FIB_TOS: i16 = FIB + 12;
const FIB_LEN: i32 = 64;

// struct bpf_redir_neigh, below that
const NEXT: i16 = FIB - 24;
const NEXT_ADDRESS: i16 = NEXT + 4;
const NEXT_LEN: i32 = 20;

/// Ethernet header before the outer IP header.
const IP_AT: i32 = 14;

/// One instruction (struct bpf_insn).
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination register in the lower half, source register in the upper.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}
/// `destination = source`
const fn copy(destination: u8, source: u8) -> Instruction {
    op(0xbf, destination, source, 0, 0)
}
/// `destination = value`
const fn set(destination: u8, value: i32) -> Instruction {
    op(0xb7, destination, 0, 0, value)
}
/// `destination += value`
const fn add(destination: u8, value: i32) -> Instruction {
    op(0x07, destination, 0, 0, value)
}
/// `destination = *(u32 *)(source + offset)`
const fn load(destination: u8, source: u8, offset: i16) -> Instruction {
    op(0x61, destination, source, offset, 0)
}
/// `destination = *(u8 *)(source + offset)`
const fn load_byte(destination: u8, source: u8, offset: i16) -> Instruction {
    op(0x71, destination, source, offset, 0)
}
/// `*(u32 *)(destination + offset) = source`
const fn store(destination: u8, offset: i16, source: u8) -> Instruction {
    op(0x63, destination, source, offset, 0)
}
/// `*(u64 *)(stack + offset) = 0`
const fn zero(offset: i16) -> Instruction {
    op(0x7a, STACK, 0, offset, 0)
}
/// `*(u8 *)(stack + offset) = value`
const fn put(offset: i16, value: i32) -> Instruction {
    op(0x72, STACK, 0, offset, value)
}
/// Skips so many instructions where `register` is not `value`.
const fn skip_unless(register: u8, value: i32, count: i16) -> Instruction {
    op(0x55, register, 0, count, value)
}
/// Skips so many instructions.
const fn skip(count: i16) -> Instruction {
    op(0x05, 0, 0, count, 0)
}
const fn call(helper: i32) -> Instruction {
    op(0x85, 0, 0, 0, helper)
}
const EXIT: Instruction = op(0x95, 0, 0, 0, 0);
/// The frame pointer.
const STACK: u8 = 10;
/// Where the packet is kept.
const SKB: u8 = 6;

/// `len` bytes from `at` of the packet on go to the stack.
const fn read(at: i32, to: i16, len: i32) -> [Instruction; 6] {
    [copy(1, SKB), set(2, at), copy(3, STACK), add(3, to as i32), set(4, len), call(SKB_LOAD_BYTES)]
}

/// Looks up the route of the frame by addresses, protocol and ports, and redirects it to its neighbour. Where there is none
/// the frame leaves by the device that it came from: whoever wrote it can read it there.
fn program() -> Vec<Instruction> {
    let read_outer = |family: i32, addresses: i32, len: i32, ports: i32| {
        [
            [put(FIB_FAMILY, family), put(FIB_L4_PROTOCOL, libc::IPPROTO_UDP)].as_slice(),
            &read(IP_AT + addresses, FIB_SOURCE, len),
            &read(IP_AT + addresses + len, FIB_DESTINATION, len),
            &read(IP_AT + ports, FIB_PORTS, 4),
        ]
        .concat()
    };
    let mut v4 = read_outer(libc::AF_INET, 12, 4, 20);
    v4.extend(read(IP_AT + 1, FIB_TOS, 1));
    let v6 = read_outer(libc::AF_INET6, 8, 16, 40);
    // the look-up leaves the next hop where the destination was
    let next = [load_byte(7, STACK, FIB_FAMILY), store(STACK, NEXT, 7)];
    let address =
        (0..4).flat_map(|word| [load(7, STACK, FIB_DESTINATION + 4 * word), store(STACK, NEXT_ADDRESS + 4 * word, 7)]);
    let neighbour = [copy(2, STACK), add(2, NEXT as i32), set(3, NEXT_LEN), set(4, 0), call(REDIRECT_NEIGH), EXIT];
    let on: Vec<Instruction> =
        next.into_iter().chain(address).chain([load(1, STACK, FIB_IFINDEX)]).chain(neighbour).collect();
    let zeroed: Vec<Instruction> = (0..8).map(|word| zero(FIB + 8 * word)).collect();
    [
        &[copy(SKB, 1)],
        zeroed.as_slice(),
        &[load(7, SKB, SKB_IFINDEX), store(STACK, FIB_IFINDEX, 7)],
        // no queue is recorded: else all would leave by the device's first, where a socket's go by their ports
        &[set(7, 0), store(SKB, SKB_QUEUE_MAPPING, 7)],
        &[load(7, SKB, SKB_PROTOCOL), skip_unless(7, i32::from((libc::ETH_P_IP as u16).to_be()), v4.len() as i16 + 1)],
        &v4,
        &[skip(v6.len() as i16)],
        &v6,
        &[copy(1, SKB), copy(2, STACK), add(2, FIB as i32), set(3, FIB_LEN), set(4, SKIP_NEIGH), call(FIB_LOOKUP)],
        &[skip_unless(0, 0, on.len() as i16)],
        &on,
        &[load(1, SKB, SKB_IFINDEX), set(2, 0), call(REDIRECT), EXIT],
    ]
    .concat()
}

/// The part of `union bpf_attr` that PROG_LOAD reads, up to `expected_attach_type`.
#[repr(C)]
struct Load {
    prog_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part that LINK_CREATE reads for tcx.
#[repr(C)]
struct Link {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    reserved: u32,
    expected_revision: u64,
}

/// Loads the program. Needs CAP_BPF and CAP_NET_ADMIN.
pub fn load_redirect() -> io::Result<OwnedFd> {
    let program = program();
    // helpers that look up routes are for programs under the GPL as well; this one may be used by that
    let license = c"Dual MIT/GPL";
    // SAFETY: all fields are integers, for which all bits zero is a value.
    let mut load: Load = unsafe { zeroed() };
    load.prog_type = PROG_TYPE_SCHED_CLS;
    load.count = program.len() as u32;
    load.instructions = program.as_ptr() as u64;
    load.license = license.as_ptr() as u64;
    load.expected_attach_type = TCX_INGRESS;
    for (to, from) in load.prog_name.iter_mut().zip(b"meshd_redirect") {
        *to = *from;
    }
    // SAFETY: bpf(2) reads the attributes, whose size is given, and the instructions and the licence that they point to,
    // which live on until behind the call; `count` is the number of instructions, the licence ends with a zero.
    let fd =
        check(unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) } as libc::c_int)?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts a program into the ingress hook of a device (Linux 6.6). It stays there until what comes back is closed.
pub fn attach_ingress(program: &OwnedFd, ifindex: u32) -> io::Result<OwnedFd> {
    let link = Link {
        program: program.as_raw_fd() as u32,
        ifindex,
        attach_type: TCX_INGRESS,
        flags: 0,
        relative: 0,
        reserved: 0,
        expected_revision: 0,
    };
    // SAFETY: bpf(2) reads the attributes, whose size is given.
    let fd = check(
        unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, &raw const link, size_of_val(&link)) } as libc::c_int
    )?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_end_where_the_next_part_begins() {
        let program = program();
        let at = |wanted: u8| program.iter().position(|one| one.code == wanted).unwrap();
        let (unless, over) = (at(0x55), at(0x05));
        assert_eq!(unless + 1 + program[unless].offset as usize, over + 1, "IPv6 begins behind the jump over it");
        let lookup = program.iter().position(|one| one.code == 0x85 && one.immediate == FIB_LOOKUP).unwrap();
        assert_eq!(over + 1 + program[over].offset as usize, lookup - 5, "both families end at the look-up");
        assert_eq!(program[lookup + 1].offset as usize + lookup + 2, program.len() - 4, "no route: back");
    }
}
