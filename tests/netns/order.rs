//! Flows over queues and threads: each stays in order, whatever thread carries it.

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};

use crate::mesh::{Builder, Node, V4};
use crate::namespace::until;
use crate::traffic::receive;

/// Bytes of a datagram; its first eight are its number.
const SIZE: usize = 1200;
/// Datagrams a send.
const RUN: usize = 40;
/// Flows beside each other, of which each sends half as much as the one before.
const UNEQUAL: [u32; 6] = [1, 2, 4, 8, 16, 32];
/// As many flows that send the same.
const EQUAL: [u32; 64] = [1; 64];

/// Numbered datagrams in flows of which each sends every so many rounds, as fast as they go, for so long. Returns for each
/// flow the numbers that arrived, in the order in which they did.
fn flows(from: &Node, to: &Node, every: &[u32], lasting: Duration) -> Vec<Vec<u64>> {
    let address = to.overlay(V4);
    let sinks: Vec<UdpSocket> = (7300..).zip(every).map(|(port, _)| to.ns.udp(address, port)).collect();
    let sources: Vec<UdpSocket> = every.iter().map(|_| from.ns.udp(from.overlay(V4), 0)).collect();
    std::thread::scope(|scope| {
        let collectors: Vec<_> = sinks.iter().map(|sink| scope.spawn(move || arrived(sink))).collect();
        scope.spawn(|| send(&sources, every, address, Instant::now() + lasting));
        collectors.into_iter().map(|collector| collector.join().unwrap()).collect()
    })
}

fn send(sources: &[UdpSocket], every: &[u32], address: IpAddr, sent_until: Instant) {
    for source in sources {
        setsockopt(source, sockopt::UdpGsoSegment, &(SIZE as i32)).unwrap();
    }
    let mut numbers = vec![0u64; sources.len()];
    let mut run = vec![0; SIZE * RUN];
    for round in 0u32.. {
        if Instant::now() >= sent_until {
            return;
        }
        for (port, ((source, number), every)) in (7300..).zip(sources.iter().zip(&mut numbers).zip(every)) {
            if !round.is_multiple_of(*every) {
                continue;
            }
            for datagram in run.chunks_exact_mut(SIZE) {
                *number += 1;
                datagram[..8].copy_from_slice(&number.to_be_bytes());
            }
            let to = SockaddrStorage::from(SocketAddr::new(address, port));
            // a queue may be full: then they are lost
            sendmsg(source.as_raw_fd(), &[IoSlice::new(&run)], &[], MsgFlags::empty(), Some(&to)).ok();
        }
    }
}

/// What comes until nothing does for half a second.
fn arrived(sink: &UdpSocket) -> Vec<u64> {
    sink.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let (mut numbers, mut buffer) = (Vec::new(), [0; 2 * SIZE]);
    while let Ok((len, _)) = receive(sink, &mut buffer) {
        assert_eq!(len, SIZE);
        numbers.push(u64::from_be_bytes(buffer[..8].try_into().unwrap()));
    }
    numbers
}

/// How many came after one that was sent later, or twice.
fn late(numbers: &[u64]) -> usize {
    let (mut last, mut late) = (0, 0);
    for number in numbers {
        late += usize::from(*number <= last);
        last = last.max(*number);
    }
    late
}

#[test]
fn late_ones_are_counted() {
    assert_eq!((late(&[1, 2, 5, 9]), late(&[2, 1, 3]), late(&[3, 1, 2, 4]), late(&[1, 1])), (0, 1, 2, 1));
}

#[test]
fn flows_stay_in_order_while_they_change_threads() {
    for (workers, encrypted) in [(1, false), (2, false), (4, false), (2, true)] {
        let Some(mesh) = Builder::new("flows_stay_in_order_while_they_change_threads") else { return };
        let mesh = if encrypted { mesh.encrypted() } else { mesh };
        let mesh = mesh.node("a").set("workers", workers).node("b").set("workers", workers).start();
        let [a, b] = mesh.two(["a", "b"]);
        if encrypted {
            // until a lane has its session its flows go over the first, and change then
            until("all lanes have sessions", || {
                flows(a, b, &UNEQUAL, Duration::from_millis(1));
                [a, b].map(|node| node.json(&["peers"])[0]["session"]["lanes_up"].clone()) == [2, 2]
            });
        }
        let moved = || [a, b].iter().map(|node| node.stats()["pairs_moved"].as_u64().unwrap()).sum::<u64>();
        // a busy machine may be too slow for bulk traffic at first
        until("queues changed their thread", || {
            for flow in flows(a, b, &UNEQUAL, Duration::from_millis(1500)) {
                assert!(flow.len() > RUN, "{} arrived", flow.len());
                assert_eq!(late(&flow), 0, "of {} with {workers} workers", flow.len());
            }
            moved() > 0
        });
        let there = moved();
        until("they are home again", || {
            for flow in flows(a, b, &UNEQUAL, Duration::from_millis(1)) {
                assert_eq!(late(&flow), 0);
            }
            moved() > there
        });
        mesh.balances();
    }
}

#[test]
fn flows_stay_in_order_while_queues_are_spread_over_workers() {
    let Some(mesh) = Builder::new("flows_stay_in_order_while_queues_are_spread_over_workers") else { return };
    let mesh = mesh.node("a").set("workers", 4).node("b").set("workers", 4).start();
    let [a, b] = mesh.two(["a", "b"]);
    let moved = || [a, b].map(|node| node.stats()["pairs_moved"].as_u64().unwrap());
    // many flows of which none is bulk traffic, all together more than one thread of an unoptimised build can carry
    let round = |lasting| {
        for flow in flows(a, b, &EQUAL, lasting) {
            assert_eq!(late(&flow), 0, "of {}", flow.len());
        }
    };
    until("queues were spread", || {
        round(Duration::from_secs(1));
        moved().into_iter().max() >= Some(24)
    });
    let there = moved();
    until("they are gathered again", || {
        std::thread::sleep(Duration::from_secs(1));
        round(Duration::from_millis(1));
        moved().iter().zip(there).all(|(now, there)| *now > there)
    });
    mesh.balances();
}
