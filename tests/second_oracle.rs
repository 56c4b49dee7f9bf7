//! Segmentation and coalescing against another implementation of both, tun-rs: what it cuts and joins is what the engine cuts
//! and joins, byte for byte. The kernel is the first oracle (`kernel_gso.rs`); this one needs no device and no root.
//!
//! Where tun-rs is known to differ from the kernel the packet is left out: it repeats CWR on every segment, and joins
//! no segment with FIN, which GRO does.

use meshd::engine::testing::{Buffer, Check, Facts, MTU, Receiving, Sending, Transport, mesh, payload, tcp, udp};
use meshd::wire::transport::flags::{self, FIN};
use proptest::prelude::*;
use tun_rs::{GROTable, VIRTIO_NET_HDR_LEN, VirtioNetHdr, gso_split};
use zerocopy::IntoBytes;

/// A super-packet as a device hands it over, and the payload bytes of its segments.
fn super_packet() -> impl Strategy<Value = (Facts, u16)> {
    let shape = (any::<(bool, bool)>(), 1usize..60_000, 1u16..1378, any::<[u8; 8]>());
    shape.prop_map(|((v6, is_tcp), len, size, [id, sequence, bits, tos, ttl, port, start, _])| {
        // UDP: at most 64 segments, as the kernel makes them
        let len = len.min(usize::from(size) * if is_tcp { 60 } else { 50 }).max(1);
        let base = if is_tcp { tcp(v6, 1, 2, payload(len)) } else { udp(v6, 1, 2, payload(len)) };
        let mut facts = Facts {
            check: Check::Pseudo,
            id: u16::from_be_bytes([id, start]),
            tos: tos & !3,
            ttl: ttl.max(1),
            ports: (1024 + u16::from(port), 80),
            ..base
        };
        if let Transport::Tcp { sequence: number, flags: set, .. } = &mut facts.transport {
            *number = u32::from_be_bytes([0xff, sequence, 0xff, start]);
            *set = flags::ACK | bits & (flags::PSH | flags::FIN);
        }
        (facts, size)
    })
}

fn ours(facts: &Facts, size: u16) -> Vec<Vec<u8>> {
    let mut node = Sending::new(mesh(1));
    node.push(facts.gso(size), &facts.bytes());
    node.packets()
}

fn theirs(facts: &Facts, size: u16) -> Vec<Vec<u8>> {
    let vnet = facts.gso(size);
    let header = VirtioNetHdr {
        flags: vnet.flags,
        gso_type: vnet.gso_type,
        hdr_len: facts.header_len() as u16,
        gso_size: size,
        csum_start: vnet.csum_start(),
        csum_offset: vnet.csum_offset(),
    };
    let mut rooms = vec![vec![0; usize::from(MTU) + 100]; 128];
    let mut sizes = vec![0; rooms.len()];
    let count = gso_split(&mut facts.bytes(), header, &mut rooms, &mut sizes, 0, facts.is_v6()).unwrap();
    rooms.into_iter().zip(sizes).take(count).map(|(room, size)| room[..size].to_vec()).collect()
}

/// What tun-rs makes of packets that arrive together: its first buffer, which the others of the flow were joined to.
fn joined_by_them(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut buffers: Vec<Vec<u8>> = packets
        .iter()
        .map(|packet| {
            let mut buffer = Vec::with_capacity(1 << 17);
            buffer.extend([0; VIRTIO_NET_HDR_LEN]);
            buffer.extend(packet);
            buffer
        })
        .collect();
    GROTable::new().apply_gro(&mut buffers, VIRTIO_NET_HDR_LEN, true).unwrap();
    buffers.swap_remove(0)
}

fn joined_by_us(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut node = Receiving::new(mesh(2));
    packets.iter().for_each(|packet| node.push(&Buffer::one(1, 2, packet)));
    let first = node.flush().swap_remove(0);
    [first.vnet.as_bytes(), &first.packet].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_cut_is_what_tun_rs_cuts((facts, size) in super_packet()) {
        prop_assert_eq!(ours(&facts, size), theirs(&facts, size));
    }

    #[test]
    fn what_is_joined_is_what_tun_rs_joins((facts, size) in super_packet()) {
        let packets = theirs(&facts, size);
        let fin = matches!(facts.transport, Transport::Tcp { flags, .. } if flags & FIN != 0);
        prop_assume!(packets.len() > 1 && !fin);
        prop_assert_eq!(joined_by_us(&packets), joined_by_them(&packets));
    }
}
