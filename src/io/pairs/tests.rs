use std::net::UdpSocket;
use std::os::unix::net::{UnixDatagram, UnixStream};

use super::*;

/// Two workers with so many pairs each, spread over both; the other ends of their TUN queues, and the addresses of their sockets.
struct Node {
    pairs: Pairs,
    ends: Vec<UnixDatagram>,
    stops: Vec<UnixStream>,
    ready: Vec<Ready>,
}

const WORKERS: usize = 2;

fn node(each: usize) -> Node {
    let (mut queues, mut ends, mut sockets) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..WORKERS * each {
        let (here, there) = UnixDatagram::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        queues.push(TunQueue::of(here));
        ends.push(there);
        sockets.push(vec![Socket::from(UdpSocket::bind("127.0.0.1:0").unwrap())]);
    }
    let pairs = Pairs::new(queues, sockets, WORKERS, true).unwrap();
    pairs.spread.store(true, Ordering::Relaxed);
    let mut moves = Moves::default();
    for now_us in [0, PAUSE_US] {
        moves.turn(&pairs, 0, Set::default(), now_us, &WorkerStats::default()).unwrap();
    }
    let mut node = Node { pairs, ends, stops: Vec::new(), ready: Vec::new() };
    for thread in 0..2 * WORKERS {
        let (keep, stop) = UnixStream::pair().unwrap();
        node.ready.push(Ready::new(&node.pairs, thread, stop.as_fd()).unwrap());
        node.stops.extend([keep, stop]);
    }
    node
}

impl Node {
    /// The threads that are told of something in this pair's TUN queue, and those that are told of its sockets.
    fn told(&mut self, pair: usize) -> (Vec<usize>, Vec<usize>) {
        let (mut queue, mut socket) = (Vec::new(), Vec::new());
        for (thread, ready) in self.ready.iter_mut().enumerate() {
            assert!(!ready.wait(&self.pairs, thread, Duration::ZERO).unwrap());
            queue.extend(ready.queues.from(0).filter(|ready| *ready == pair).map(|_| thread));
            socket.extend(ready.sockets[0].from(0).filter(|ready| *ready == pair).map(|_| thread));
        }
        (queue, socket)
    }

    /// Something for the pair from both sides.
    fn feed(&self, pair: usize) {
        self.ends[pair].send(b"packet").unwrap();
        let to = self.pairs.get(pair).unwrap().sockets[0].local_addr().unwrap().as_socket().unwrap();
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"datagram", to).unwrap();
    }

    fn empty(&self, pair: usize) {
        let pair = self.pairs.get(pair).unwrap();
        pair.tun.read(&mut [0; 64]).unwrap();
        pair.sockets[0].recv(&mut [std::mem::MaybeUninit::uninit(); 64]).unwrap();
    }
}

fn only(pair: usize) -> Set {
    let mut set = Set::default();
    set.insert(pair);
    set
}

const MUCH: usize = BULK_BYTES as usize;

#[test]
fn sets_are_gone_through_from_any_member_on() {
    let mut set = Set::default();
    assert!(set.is_empty());
    [0, 3, 31, 63].into_iter().for_each(|pair| set.insert(pair));
    let from = |first| set.from(first).collect::<Vec<_>>();
    assert_eq!((from(0), from(1), from(3)), (vec![0, 3, 31, 63], vec![3, 31, 63, 0], vec![3, 31, 63, 0]));
    assert_eq!((from(63), from(64), from(32)), (vec![63, 0, 3, 31], vec![0, 3, 31, 63], vec![63, 0, 3, 31]));
    assert_eq!((set.len(), only(5).or(set).len(), Set::default().from(7).count()), (4, 5, 0));
}

#[test]
fn workers_share_pairs_evenly() {
    for workers in 1..=64 {
        let count = count(workers);
        assert_eq!(count % workers, 0, "{workers}");
        assert!(count <= AT_MOST && count >= workers.max(AT_LEAST), "{workers}: {count}");
    }
    assert_eq!((count(0), count(1), count(2), count(3), count(32), count(33)), (32, 32, 32, 33, 32, 33));
}

#[test]
fn a_pair_belongs_to_one_thread_and_goes_to_another_while_it_carries_much() {
    let mut node = node(2);
    node.feed(3);
    assert_eq!(node.told(3), (vec![1], vec![1]), "at home");
    assert_eq!(node.told(1), (vec![], vec![]), "nothing came");

    let (mut here, mut there, pair, stats) = (Moves::default(), Moves::default(), only(3), WorkerStats::default());
    node.pairs.get(3).unwrap().carried(MUCH - 1, 0, 500);
    here.turn(&node.pairs, 1, pair, 500, &stats).unwrap();
    assert_eq!((node.told(3), here.due_us(&node.pairs, 1)), ((vec![1], vec![1]), Some(500 + LOOK_US)), "not yet much");
    node.pairs.get(3).unwrap().carried(1, 0, 600);
    here.turn(&node.pairs, 1, pair, 600, &stats).unwrap();
    assert_eq!((node.told(3), here.due_us(&node.pairs, 1)), ((vec![], vec![]), Some(600 + PAUSE_US)), "on its way");
    here.turn(&node.pairs, 1, Set::default(), 599 + PAUSE_US, &stats).unwrap();
    assert_eq!(node.told(3), (vec![], vec![]), "still");
    here.turn(&node.pairs, 1, Set::default(), 600 + PAUSE_US, &stats).unwrap();
    assert_eq!(
        (node.told(3), here.due_us(&node.pairs, 1)),
        ((vec![3], vec![3]), Some(500 + LOOK_US)),
        "what came meanwhile waited"
    );

    there.turn(&node.pairs, 3, Set::default(), 599 + CALM_US, &stats).unwrap();
    assert_eq!(node.told(3), (vec![3], vec![3]), "for a while");
    let quiet = there.due_us(&node.pairs, 3).unwrap();
    assert!(quiet >= 600 + CALM_US, "{quiet}");
    there.turn(&node.pairs, 3, Set::default(), quiet, &stats).unwrap();
    there.turn(&node.pairs, 3, Set::default(), quiet + PAUSE_US, &stats).unwrap();
    assert_eq!(node.told(3), (vec![1], vec![1]), "home again, though nothing came");
    assert_eq!(there.due_us(&node.pairs, 3), None);
    assert_eq!(stats.flow.pairs_moved.get(), 2);
}

#[test]
fn what_comes_slowly_is_not_much_and_many_small_packets_are() {
    let node = node(1);
    let slow = node.pairs.get(0).unwrap();
    for turn in 0..100 {
        slow.carried(MUCH / 2, 0, turn * (BULK_US + 1));
        assert!(!slow.carries_bulk(turn * (BULK_US + 1)), "{turn}");
    }
    let last = 100 * (BULK_US + 1);
    slow.carried(0, MUCH / PACKET_BYTES as usize, last);
    assert!(slow.carries_bulk(last));
}

#[test]
fn bulk_traffic_goes_to_the_thread_that_has_least_of_it() {
    let (mut node, stats) = (node(2), WorkerStats::default());
    for pair in [0, 2, 1, 3] {
        node.pairs.get(pair).unwrap().carried(MUCH, 0, 10);
        let mut moves = Moves::default();
        moves.turn(&node.pairs, pair % WORKERS, only(pair), 10, &stats).unwrap();
        moves.turn(&node.pairs, pair % WORKERS, Set::default(), 10 + PAUSE_US, &stats).unwrap();
        node.feed(pair);
    }
    let at = [0, 1, 2, 3].map(|pair| node.told(pair).0);
    // the first at home, the second evens it out, then again
    assert_eq!(at, [vec![2], vec![3], vec![3], vec![2]]);
}

/// Rounds of the first two threads every 10 ms, each of so many microseconds. Returns when pairs were spread.
fn rounds(node: &Node, state: &mut [(Load, Moves); 2], times: std::ops::Range<u64>, busy_us: [u64; 2]) -> Vec<u64> {
    let mut spread = Vec::new();
    for now_us in times.step_by(10_000) {
        for (thread, (load, moves)) in state.iter_mut().enumerate() {
            let busy_us = busy_us[thread];
            if load.turn(&node.pairs, thread, busy_us > 0, now_us - busy_us, now_us) {
                spread.push(now_us);
                moves.look();
            }
            moves.turn(&node.pairs, thread, Set::default(), now_us, &WorkerStats::default()).unwrap();
        }
    }
    spread
}

#[test]
fn pairs_are_with_the_first_worker_while_it_has_time() {
    let (mut node, mut state) = (node(1), <[(Load, Moves); 2]>::default());
    node.pairs.spread.store(false, Ordering::Relaxed);
    node.feed(1);
    assert_eq!(node.told(1).0, [1], "who has it lets it go");
    assert_eq!(state[1].1.due_us(&node.pairs, 1), Some(0), "without being woken");
    assert!(rounds(&node, &mut state, 1_000_000..1_050_000, [0, 0]).is_empty());
    assert_eq!(node.told(1), (vec![0], vec![0]));
    assert_eq!(state[1].1.due_us(&node.pairs, 1), None);

    assert!(rounds(&node, &mut state, 2_000_000..3_950_000, [8_500, 0]).is_empty(), "not quite busy");
    assert_eq!(node.told(1).0, [0]);
    assert_eq!(rounds(&node, &mut state, 3_950_000..4_100_000, [9_500, 0]), [4_000_000]);
    assert_eq!(node.told(1), (vec![1], vec![1]));
    assert_eq!(node.told(0), (vec![], vec![]));

    rounds(&node, &mut state, 4_100_000..6_990_000, [0, 0]);
    assert_eq!(node.told(1).0, [1], "what came before they were spread says nothing of ease");
    rounds(&node, &mut state, 6_990_000..7_400_000, [0, 0]);
    assert_eq!(node.told(1).0, [0]);

    assert_eq!(rounds(&node, &mut state, 7_400_000..7_600_000, [10_000, 0]).len(), 1);
    rounds(&node, &mut state, 7_600_000..15_000_000, [4_000, 4_000]);
    assert_eq!(node.told(1).0, [1], "four tenths each are too much for one");
    rounds(&node, &mut state, 15_000_000..22_000_000, [4_000, 3_000]);
    assert_eq!(node.told(1).0, [0]);
}

#[test]
fn all_begin_with_the_first_worker() {
    let queues = (0..4).map(|_| TunQueue::of(UnixDatagram::unbound().unwrap())).collect();
    let pairs = Pairs::new(queues, (0..4).map(|_| Vec::new()).collect(), WORKERS, true).unwrap();
    assert_eq!([0, 1, 2, 3].map(|pair| pairs.get(pair).unwrap().owner.load(Ordering::Relaxed)), [0; 4]);
}

#[test]
fn a_thread_goes_on_with_what_it_did_not_empty_for_some_rounds() {
    let mut node = node(2);
    node.feed(1);
    node.feed(3);
    let ready = &mut node.ready[1];
    assert!(!ready.wait(&node.pairs, 1, Duration::ZERO).unwrap());
    ready.queues.remove(1);
    let rounds = (0..10).take_while(|_| ready.goes_on(Set::default())).count();
    assert_eq!(rounds, ROUNDS_ON as usize, "then it asks again");
    assert_eq!((ready.queues, ready.sockets[0]), (only(3), only(1).or(only(3))));
    assert!(ready.goes_on(only(3)), "what is gone is not its any more");
    assert_eq!((ready.queues, ready.sockets[0]), (Set::default(), only(1)));
    assert!(!ready.goes_on(only(1)), "nothing is left");
}

#[test]
fn what_another_thread_does_not_look_at_is_noticed() {
    let node = node(1);
    let pair = node.pairs.get(0).unwrap();
    let late = 1_000 + NEGLECTED_US;
    let neglected = |now_us| [0, 1, 2, 3].map(|thread| node.pairs.neglected(thread, now_us));
    assert_eq!(neglected(late), [false; 4], "nothing came");
    node.feed(0);
    assert_eq!(neglected(late), [false, true, true, true], "who has it receives it");
    pair.received(1_000);
    assert_eq!(neglected(late), [false; 4], "who has it has looked");
    assert_eq!(neglected(late + 1), [false, true, true, true]);
    node.pairs.release(0).unwrap();
    assert_eq!(neglected(1_000), [true; 4], "nobody has it");
    node.pairs.give(0, 2).unwrap();
    assert_eq!(neglected(late + 1), [true, true, false, true]);
    node.empty(0);
    assert_eq!(neglected(late + 1), [false; 4]);
}

#[test]
fn a_thread_is_told_to_stop() {
    let mut node = node(1);
    node.stops.remove(0);
    let stops = [0, 1, 2, 3].map(|thread| node.ready[thread].wait(&node.pairs, thread, Duration::ZERO).unwrap());
    assert_eq!(stops, [true, false, false, false]);
}
