//! Traffic between namespaces: pings, streams whose content is compared, datagrams.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::namespace::{Namespace, PATIENCE, Process, until};

/// Three echo requests, each of which must be answered.
#[track_caller]
pub(crate) fn ping(from: &Namespace, to: IpAddr) {
    for number in 1..=3 {
        // one at a time: where ping had one answer, it waits for the next no longer than twice as long as that took
        let output = from.output(&format!("ping -n -c 1 -W 5 {to} || true"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(" 1 received"), "{} to {to}, number {number}: {text}", from.name());
    }
}

/// Whether one echo request is answered within a second.
pub(crate) fn pings(from: &Namespace, to: IpAddr) -> bool {
    from.succeeds(&format!("ping -n -q -c 1 -W 1 {to}"))
}

/// A datagram each ten milliseconds, which the other side sends back, until it is asked for the loss. Each is waited for
/// before the next, so that what is still on its way is never taken for lost.
pub(crate) struct Probe {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    count: Arc<[AtomicU64; 2]>,
}

impl Probe {
    #[track_caller]
    pub(crate) fn start(from: &Namespace, source: IpAddr, to: &Namespace, address: IpAddr) -> Self {
        let (client, server) = (from.udp(source, 0), to.udp(address, 0));
        let target = server.local_addr().unwrap();
        client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (asked, told) = (stop.clone(), stop.clone());
        let count = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let counts = count.clone();
        let echo = move || {
            let mut buffer = [0; 8];
            let mut last = false;
            // once more after the stop, for what was sent just before
            while !last {
                last = told.load(Ordering::Relaxed);
                while let Ok((len, sender)) = receive(&server, &mut buffer) {
                    server.send_to(&buffer[..len], sender).ok();
                }
            }
        };
        let ask = move || {
            for number in 0_u64.. {
                if asked.load(Ordering::Relaxed) {
                    return;
                }
                let sent = client.send_to(&number.to_be_bytes(), target);
                let mut buffer = [0; 8];
                let answered = sent.is_ok()
                    && loop {
                        match receive(&client, &mut buffer) {
                            Ok(_) if buffer == number.to_be_bytes() => break true,
                            Ok(_) => {} // the answer to one that was given up
                            Err(_) => break false,
                        }
                    };
                counts[0].fetch_add(1, Ordering::Relaxed);
                counts[1].fetch_add(u64::from(!answered), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        Probe { stop, threads: vec![std::thread::spawn(ask), std::thread::spawn(echo)], count }
    }

    /// How many were sent, and how many were not answered.
    #[track_caller]
    pub(crate) fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        let [sent, lost] = &*self.count;
        (sent.load(Ordering::Relaxed), lost.load(Ordering::Relaxed))
    }
}

/// Bytes that look like nothing else, and differ by seed.
pub(crate) fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut all = Vec::with_capacity(bytes + 8);
    while all.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    all.truncate(bytes);
    all
}

/// One connection to `address`, which carries so many bytes each way at the same time; they arrive as they were sent.
#[track_caller]
pub(crate) fn tcp(from: &Namespace, to: &Namespace, address: IpAddr, bytes: usize) {
    tcp_by(from, to, address, address, bytes);
}

/// The same, where who is asked for at `by` answers at `address`.
#[track_caller]
pub(crate) fn tcp_by(from: &Namespace, to: &Namespace, by: IpAddr, address: IpAddr, bytes: usize) {
    let (client, server) = connect_by(from, to, by, address);
    let (there, back) = (content(1, bytes), content(2, bytes));
    std::thread::scope(|scope| {
        for (socket, data) in [(&client, &there), (&server, &back)] {
            scope.spawn(move || {
                let mut socket = socket;
                socket.write_all(data).unwrap();
                socket.shutdown(Shutdown::Write).unwrap();
            });
        }
        let readers = [(&server, &there), (&client, &back)].map(|(socket, expected)| {
            scope.spawn(move || {
                let mut socket = socket;
                let mut got = Vec::with_capacity(expected.len());
                socket.read_to_end(&mut got).unwrap_or_else(|e| panic!("after {} bytes: {e}", got.len()));
                let wrong = got.iter().zip(expected).position(|(a, b)| a != b);
                assert_eq!((got.len(), wrong), (expected.len(), None), "length, and first byte that differs");
            })
        });
        for reader in readers {
            reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

/// A connection: the client's end and the server's.
#[track_caller]
pub(crate) fn connect(from: &Namespace, to: &Namespace, address: IpAddr) -> (TcpStream, TcpStream) {
    connect_by(from, to, address, address)
}

#[track_caller]
fn connect_by(from: &Namespace, to: &Namespace, by: IpAddr, address: IpAddr) -> (TcpStream, TcpStream) {
    let listener = to.enter(|| TcpListener::bind(SocketAddr::new(address, 0))).unwrap();
    let target = SocketAddr::new(by, listener.local_addr().unwrap().port());
    let client = from.enter(|| TcpStream::connect_timeout(&target, PATIENCE));
    let client = client.unwrap_or_else(|e| panic!("{} to {target}: {e}", from.name()));
    let (server, _) = listener.accept().unwrap();
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (client, server)
}

/// Datagrams of each of these lengths from `source` to `address` and back again, one after the other.
#[track_caller]
pub(crate) fn udp(from: &Namespace, source: IpAddr, to: &Namespace, address: IpAddr, lengths: &[usize]) {
    let (client, server) = (from.udp(source, 0), to.udp(address, 0));
    let target = server.local_addr().unwrap();
    let mut buffer = vec![0; 65_536];
    for (seed, length) in (3..).zip(lengths) {
        let data = content(seed, *length);
        client.send_to(&data, target).unwrap_or_else(|e| panic!("{length} bytes: {e}"));
        let (got, sender) = receive(&server, &mut buffer)
            .unwrap_or_else(|e| panic!("{length} bytes there: {e}\n{}", kernel_counters(to)));
        assert!(buffer[..got] == data, "{length} bytes there: {got} others");
        server.send_to(&data, sender).unwrap();
        let (got, _) = receive(&client, &mut buffer)
            .unwrap_or_else(|e| panic!("{length} bytes back: {e}\n{}", kernel_counters(from)));
        assert!(buffer[..got] == data, "{length} bytes back: {got} others");
    }
}

/// Where the receiver's kernel may have thrown something away.
fn kernel_counters(ns: &Namespace) -> String {
    String::from_utf8_lossy(&ns.output("nstat -as | grep -E 'Reasm|Discard|Err' || true").stdout).into_owned()
}

/// The next datagram. A child of another test that ends may interrupt the wait.
pub(crate) fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// tcpdump on one device, from when it listens until it is asked for its file.
pub(crate) struct Capture {
    process: Process,
    file: PathBuf,
}

impl Capture {
    #[track_caller]
    pub(crate) fn start(ns: &Namespace, device: &str, filter: &str, file: &Path) -> Self {
        let errors = file.with_extension("err");
        let mut command = ns.command("tcpdump");
        command.args(["-n", "-i", device, "-U", "--immediate-mode", "-Z", "root", "-B", "8192", "-w"]);
        command.arg(file).arg(filter).stderr(std::fs::File::create(&errors).unwrap());
        let process = Process::spawn(&mut command);
        until("tcpdump listens", || std::fs::read_to_string(&errors).is_ok_and(|e| e.contains("listening on")));
        Capture { process, file: file.to_owned() }
    }

    /// Ends it.
    #[track_caller]
    pub(crate) fn end(mut self) -> PathBuf {
        self.process.signal(Signal::SIGINT);
        self.process.wait();
        self.file.clone()
    }

    /// Ends it, and returns each packet as tcpdump prints it.
    #[track_caller]
    pub(crate) fn lines(self) -> Vec<String> {
        let file = self.end();
        let mut command = std::process::Command::new("tcpdump");
        let text = crate::namespace::run(command.args(["-n", "-r"]).arg(file));
        text.lines().map(str::to_owned).collect()
    }
}
