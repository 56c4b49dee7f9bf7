//! Bare `meshd` on a terminal: a real one, which `script` makes.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A program on a terminal of its own, and all that was shown there.
struct Terminal {
    script: Child,
    keyboard: ChildStdin,
    screen: Arc<Mutex<String>>,
}

impl Terminal {
    fn start(command: &str) -> Self {
        let mut script = Command::new("script");
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MESHD_")) {
            script.env_remove(name);
        }
        let mut script =
            script.args(["-qec", command, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut output, shown) = (script.stdout.take().unwrap(), screen.clone());
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut some) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&some[..n]));
            }
        });
        Terminal { keyboard: script.stdin.take().unwrap(), script, screen }
    }

    /// Waits until the question stands there so many times, and answers it.
    fn answer(&mut self, question: &str, times: usize, answer: &str) {
        let start = Instant::now();
        while self.screen().matches(question).count() < times {
            assert!(start.elapsed() < Duration::from_secs(20), "{question:?} never came: {:?}", self.screen());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.keyboard.write_all(answer.as_bytes()).unwrap();
    }

    fn screen(&self) -> String {
        self.screen.lock().unwrap().clone()
    }

    fn end(&mut self) -> i32 {
        self.script.wait().unwrap().code().unwrap()
    }
}

fn why_not() -> Option<&'static str> {
    if std::path::Path::new("/etc/meshd/config.yaml").exists() {
        return Some("/etc/meshd/config.yaml is there, so bare meshd asks nothing");
    }
    let script = Command::new("script").arg("--version").stdout(Stdio::null()).status();
    script.is_err().then_some("there is no `script`")
}

#[test]
fn a_token_is_asked_for_and_not_shown() {
    if let Some(reason) = why_not() {
        println!("SKIPPED a_token_is_asked_for_and_not_shown: {reason}");
        return;
    }
    let mut terminal = Terminal::start(env!("CARGO_BIN_EXE_meshd"));
    terminal.answer("Join an existing cluster? [y/N] ", 1, "y\n");
    terminal.answer("Token (not shown): ", 1, "mesh1hush\n");
    terminal.answer("Token (not shown): ", 2, "\n");
    terminal.answer("Token (not shown): ", 3, "mesh1hush\n");
    assert_eq!(terminal.end(), 1);
    let screen = terminal.screen();
    assert!(screen.contains("the token is damaged") && screen.contains("nothing is started"), "{screen}");
    assert!(!screen.contains("hush"), "{screen}");
    assert!(screen.contains("> y\r") || screen.contains("] y"), "what is no secret is shown: {screen}");
}

#[test]
fn no_answer_is_not_a_no() {
    if let Some(reason) = why_not() {
        println!("SKIPPED no_answer_is_not_a_no: {reason}");
        return;
    }
    let mut terminal = Terminal::start(env!("CARGO_BIN_EXE_meshd"));
    terminal.answer("Join an existing cluster? [y/N] ", 1, "\x04");
    assert_eq!(terminal.end(), 1);
    assert!(terminal.screen().contains("nothing is started"), "{}", terminal.screen());
}

#[test]
fn a_shared_secret_needs_a_server() {
    if let Some(reason) = why_not() {
        println!("SKIPPED a_shared_secret_needs_a_server: {reason}");
        return;
    }
    let mut terminal = Terminal::start(env!("CARGO_BIN_EXE_meshd"));
    terminal.answer("Join an existing cluster? [y/N] ", 1, "perhaps\n");
    terminal.answer("Join an existing cluster? [y/N] ", 2, "yes\n");
    terminal.answer("Token (not shown): ", 1, "hush hush\n");
    for time in 1..=3 {
        terminal.answer("which server (https://host:9345)? ", time, "http://10.9.0.1\n");
    }
    assert_eq!(terminal.end(), 1);
    let screen = terminal.screen();
    assert!(screen.contains("`server` cannot be `http://10.9.0.1`") && !screen.contains("flag"), "{screen}");
    assert!(screen.contains("neither yes nor no") && screen.contains("nothing is started"), "{screen}");
    assert!(!screen.contains("hush"), "{screen}");
}
