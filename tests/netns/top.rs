//! `meshctl top` on a real terminal, above a real mesh: what it shows, and that the terminal is as it was when it ends.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::ttyname;

use crate::mesh::{Builder, MESHCTL, Node, V4, has, skipped};
use crate::namespace::{Process, run, until};
use crate::traffic::ping;

/// A program on a terminal of its own.
struct Terminal {
    process: Process,
    keyboard: File,
    /// Where the program is; kept open, so that what it leaves behind can be looked at.
    inside: OwnedFd,
    name: PathBuf,
    before: LocalFlags,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    fn start(command: &[&str]) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master: outside, slave: inside } = openpty(Some(&size), None).unwrap();
        let name = ttyname(&inside).unwrap();
        let open = || File::options().read(true).write(true).open(&name).unwrap();
        let before = tcgetattr(&inside).unwrap().local_flags;
        let mut program = Command::new("setsid");
        program.args(["--ctty", "setpriv", "--pdeathsig", "KILL", "--"]).args(command);
        program.stdin(Stdio::from(open())).stdout(Stdio::from(open())).stderr(Stdio::from(open()));
        program.env("TERM", "xterm-256color").env_remove("NO_COLOR").env_remove("RUST_BACKTRACE");
        let process = Process::spawn(&mut program);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(cells(24), cells(80), 0)));
        let (mut output, shown) = (File::from(outside.try_clone().unwrap()), screen.clone());
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut some) {
                shown.lock().unwrap().process(&some[..n]);
            }
        });
        Terminal { process, keyboard: File::from(outside), inside, name, before, screen }
    }

    fn top(node: &Node) -> Self {
        Terminal::start(&[MESHCTL, "--socket", node.socket().to_str().unwrap(), "top"])
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn resize(&self, columns: u16, rows: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(cells(rows), cells(columns));
        let (columns, rows) = (columns.to_string(), rows.to_string());
        run(Command::new("stty").arg("-F").arg(&self.name).args(["cols", &columns, "rows", &rows]));
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    /// Waits until that stands on the screen.
    #[track_caller]
    fn shows(&self, what: &str) {
        let mut last = String::new();
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until(what, || {
                last = self.text();
                last.contains(what)
            });
        }));
        assert!(seen.is_ok(), "{what:?} never stood there:\n{last}");
    }

    /// The fields of a peer's line.
    fn row(&self, peer: &str) -> Vec<String> {
        let text = self.text();
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(peer));
        line.into_iter().flat_map(str::split_whitespace).map(str::to_owned).collect()
    }

    /// It ends with that code, and the terminal is as it was.
    #[track_caller]
    fn ends(mut self, code: i32) -> String {
        let ended = self.process.wait();
        until("the screen of before is back", || !self.screen.lock().unwrap().screen().alternate_screen());
        until("and the cursor", || !self.screen.lock().unwrap().screen().hide_cursor());
        assert_eq!(tcgetattr(self.inside.as_fd()).unwrap().local_flags, self.before, "what is typed is seen again");
        assert_eq!(ended, code, "{}", self.text());
        self.text()
    }
}

fn cells(n: u16) -> NonZero<u16> {
    NonZero::new(n).unwrap()
}

#[test]
fn top_shows_the_mesh_and_gives_the_terminal_back() {
    let story = "top_shows_the_mesh_and_gives_the_terminal_back";
    let Some(mesh) = Builder::new(story) else { return };
    if !has("setsid") {
        return skipped(story, "`setsid` is not installed");
    }
    let mesh = mesh.node("a").node("b").start();
    let [a, b] = mesh.two(["a", "b"]);
    ping(&a.ns, b.overlay(V4));
    let mut top = Terminal::top(a);
    top.shows("▲NAME");
    top.shows("1 peer ");
    until("b is up", || top.row("b").get(1).is_some_and(|state| state == "up"));
    let raw = tcgetattr(top.inside.as_fd()).unwrap().local_flags;
    assert!(!raw.contains(LocalFlags::ICANON) && top.before.contains(LocalFlags::ICANON), "keys come at once");
    assert!(top.screen.lock().unwrap().screen().alternate_screen());
    until("rates are shown", || {
        a.ns.sh(&format!("ping -qc20 -i0.01 {}", b.overlay(V4)));
        let row = top.row("b");
        // packets received a second, before the bits of both ways
        row.len() >= 9 && row[row.len() - 4].parse::<f64>().is_ok_and(|rate| rate > 0.0)
    });
    top.press("/nobody\r");
    top.shows("No peer has that in it");
    top.press("\x1b");
    until("all are back", || !top.row("b").is_empty());
    top.press("r");
    top.shows("▼RX bit/s");
    top.press("?");
    top.shows("Page Up, Page Down");
    top.press("p");
    until("any key closes that", || !top.text().contains("Page Up, Page Down"));
    top.resize(130, 40);
    top.shows("TREND");
    // it goes away, and comes back as another process
    a.kill();
    top.shows("a: AWAY");
    assert!(!top.row("b").is_empty(), "what was known stays: {}", top.text());
    a.restart();
    until("it is back", || !top.text().contains("AWAY"));
    until("b is up again", || top.row("b").get(1).is_some_and(|state| state == "up"));
    top.press("q");
    top.ends(0);

    let mut top = Terminal::top(a);
    top.shows("NAME");
    top.press("\x03"); // Ctrl-C
    top.ends(0);
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        let top = Terminal::top(a);
        top.shows("NAME");
        top.process.signal(signal);
        top.ends(0);
    }
    let itself = std::env::current_exe().unwrap();
    let panics = ["--exact", "top::it_panics_on_a_terminal", "--ignored", "--nocapture"];
    let panics: Vec<&str> = std::iter::once(itself.to_str().unwrap()).chain(panics).collect();
    let said = Terminal::start(&panics).ends(101);
    assert!(said.contains("panicked at") && said.contains("on purpose"), "and it is seen why: {said}");

    a.stop();
    let nobody = Terminal::top(a).ends(3);
    assert!(nobody.contains("is meshd running?") || nobody.contains("nobody listens"), "{nobody}");
}

/// What the story above runs on a terminal.
#[test]
#[ignore = "it panics"]
fn it_panics_on_a_terminal() {
    if let Ok(_screen) = meshd::top::Screen::enter() {
        panic!("on purpose");
    }
}
