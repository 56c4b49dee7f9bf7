//! Packets that nobody may lose: numbered datagrams, both ways, between two nodes that no fault touches.

use std::collections::HashSet;
use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use super::history::What;
use super::load::{Lab, now};

const PAUSE: Duration = Duration::from_millis(5);
/// Where even the sender stood still for so long, the whole machine did, and with it both nodes.
const STANDSTILL: Duration = Duration::from_secs(1);
/// What was sent so long before it ended, and after, proves nothing.
const AROUND: Duration = Duration::from_secs(4);

/// An end: a namespace, and the node's address in the mesh.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) namespace: String,
    pub(crate) address: IpAddr,
}

impl Place {
    /// A socket stays in the namespace that it was made in.
    fn socket(&self) -> UdpSocket {
        let place = self.clone();
        let make = move || {
            let file = File::open(format!("/run/netns/{}", place.namespace)).unwrap();
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            UdpSocket::bind(SocketAddr::new(place.address, 0)).unwrap()
        };
        let socket = std::thread::spawn(make).join().unwrap();
        // what a machine that is busy for a second leaves unread
        let _ = socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20);
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        socket
    }
}

pub(crate) fn start(lab: &Arc<Lab>, from: Place, to: Place) -> JoinHandle<()> {
    let (sender, receiver) = (from.socket(), to.socket());
    let target = receiver.local_addr().unwrap();
    let (lab, sent) = (lab.clone(), Arc::new(AtomicU64::new(0)));
    let count = sent.clone();
    let speaking = lab.clone();
    let speaker = std::thread::spawn(move || {
        let (mut number, mut excused) = (0_u64, Vec::new());
        let mut last = Instant::now();
        let around = AROUND.as_millis() as u64 / PAUSE.as_millis() as u64;
        while !speaking.stopped() {
            if last.elapsed() > STANDSTILL {
                println!("the machine stood still for {:?}", last.elapsed());
                excused.push(number.saturating_sub(around)..number + around);
            }
            last = Instant::now();
            // one that cannot be sent is lost, too
            let _ = sender.send_to(&number.to_be_bytes(), target);
            number += 1;
            count.store(number, Ordering::Relaxed);
            std::thread::sleep(PAUSE);
        }
        excused
    });
    std::thread::spawn(move || {
        let begin = now();
        let mut seen = HashSet::new();
        let (mut last, mut worst) = (Instant::now(), Duration::ZERO);
        let mut over: Option<Instant> = None;
        let mut buffer = [0; 8];
        while over.is_none_or(|at| at.elapsed() < Duration::from_secs(2)) {
            if over.is_none() && lab.stopped() {
                over = Some(Instant::now());
            }
            if let Ok((8, _)) = receiver.recv_from(&mut buffer) {
                seen.insert(u64::from_be_bytes(buffer));
                worst = worst.max(last.elapsed());
                last = Instant::now();
            }
        }
        let excused = speaker.join().unwrap();
        let proves = |number: &u64| !excused.iter().any(|range| range.contains(number));
        let all: Vec<u64> = (0..sent.load(Ordering::Relaxed)).filter(proves).collect();
        let sent = all.len() as u64;
        let missing: Vec<u64> = all.into_iter().filter(|number| !seen.contains(number)).collect();
        let lost = missing.len() as u64;
        if lost > 0 {
            let missing = &missing[..missing.len().min(20)];
            let at: Vec<u64> = missing.iter().map(|number| begin + number * 5).collect();
            println!("lost: {missing:?}, sent from about {at:?} on");
        }
        let worst_gap_ms = worst.as_millis() as u64;
        let (from, to) = (from.namespace, to.namespace);
        lab.note(begin, What::Flow { from, to, sent, lost, worst_gap_ms });
    })
}
