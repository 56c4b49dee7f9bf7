use super::*;

use std::os::unix::fs::PermissionsExt;

use crate::membership::record::{Mode, Role};

struct Lab {
    dir: tempfile::TempDir,
    asks: mpsc::Sender<Ask>,
    news: mpsc::Receiver<News>,
    sidecar: Sidecar,
}

/// A supervised shell script, for which `$log` is a file of its own.
fn lab(script: &str) -> Lab {
    lab_pinged(script, PING)
}

fn lab_pinged(script: &str, ping: Duration) -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join(PROGRAM);
    std::fs::write(&program, format!("#!/bin/bash\nlog={}/log\n{script}\n", dir.path().display())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (asks, questions) = mpsc::channel(4);
    let (tell, news) = mpsc::channel(4);
    let settings = Settings::new(Role::Agent, dir.path());
    let launcher = Launching::within(program, dir.path().to_owned());
    let sidecar = Sidecar::start_pinged(launcher, settings, questions, tell, ping);
    Lab { dir, asks, news, sidecar }
}

impl Lab {
    async fn next(&mut self) -> News {
        timeout(Duration::from_secs(20), self.news.recv()).await.expect("news in time").expect("a supervisor")
    }

    async fn down(&mut self) -> String {
        loop {
            if let News::Down(why) = self.next().await {
                return why;
            }
        }
    }

    async fn ask(&self) -> Option<Result<Value, Refusal>> {
        let (answer, answered) = oneshot::channel();
        self.asks.send(Ask { request: Request::TokenList, answer }).await.unwrap();
        timeout(Duration::from_secs(20), answered).await.expect("an answer in time").ok()
    }

    /// What the script has noted, once that is so many lines.
    async fn log(&self, lines: usize) -> String {
        let start = Instant::now();
        loop {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            if log.lines().count() >= lines || start.elapsed() > Duration::from_secs(20) {
                return log;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn hello(name: &str) -> Hello {
    Hello { name: name.to_owned(), underlay: vec![], public_keys: vec![], encryption: Mode::None }
}

#[tokio::test]
async fn settings_and_hello_come_first_and_answers_find_their_question() {
    let mut lab = lab(r#"
        read -r settings; echo "$settings" >>$log
        read -r hello; echo "$hello" >>$log
        read -r request; echo "$request" >>$log
        echo '{"type":"answer","id":99,"result":{"Ok":"not asked"}}' >&0
        echo '{"type":"answer","id":1,"result":{"Ok":["t"]}}' >&0
        read -r again; echo "$again" >>$log
        cat >/dev/null"#);
    assert!(matches!(lab.next().await, News::Up));
    lab.sidecar.hello(hello("a"));
    assert_eq!(lab.ask().await, Some(Ok(serde_json::json!(["t"]))));
    lab.sidecar.hello(hello("a"));
    lab.sidecar.hello(hello("b"));
    let log = lab.log(4).await;
    assert!(!log.contains("heard"), "nobody is missed: {log}");
    let lines: Vec<&str> = log.lines().collect();
    assert!(lines[0].contains("\"role\":\"agent\"") && lines[1].contains("\"name\":\"a\""), "{log}");
    assert!(lines[2].contains("token-list") && lines[3].contains("\"name\":\"b\""), "{log}");
    let start = Instant::now();
    lab.sidecar.stop().await;
    assert!(start.elapsed() < PATIENCE, "a closed socket is enough");
}

#[tokio::test]
async fn who_ends_is_started_again_and_meanwhile_the_question_is_refused() {
    let mut lab = lab("read -r settings; exit 7");
    let why = lab.down().await;
    assert!(why.contains("exit status: 7"), "{why}");
    let refusal = lab.ask().await;
    // either between two starts, or of one that ends without an answer
    assert!(matches!(&refusal, None | Some(Err(_))), "{refusal:?}");
    lab.down().await;
    lab.down().await;
}

#[tokio::test]
async fn nonsense_and_half_words_end_the_sidecar_and_not_meshd() {
    for (script, what) in [
        ("echo 'hello?' >&0; exec sleep 100", "does not understand"),
        ("echo '{\"type\":\"dance\"}' >&0; exec sleep 100", "does not understand"),
        ("head -c 100000 /dev/urandom >&0; exec sleep 100", "does not understand"),
        ("printf '{\"type\":\"status\"' >&0", "ended"),
        ("exec 0<&-; exec sleep 100", "closed its link"),
    ] {
        let mut lab = lab(&format!("read -r settings\n{script}"));
        let why = lab.down().await;
        assert!(why.contains(what), "{script}: {why}");
    }
}

#[tokio::test]
async fn who_answers_nothing_any_more_is_replaced() {
    let mut lab = lab_pinged("read -r settings; while read -r line; do :; done", Duration::from_millis(400));
    assert!(matches!(lab.next().await, News::Up));
    let start = Instant::now();
    let why = lab.down().await;
    assert!(why.contains("has not answered for 1 s"), "{why}");
    assert!(start.elapsed() > Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(matches!(lab.next().await, News::Up));

    let answers = "read -r settings; while read -r line; do echo '{\"type\":\"pong\"}' >&0; done";
    let mut well = lab_pinged(answers, Duration::from_millis(50));
    assert!(matches!(well.next().await, News::Up));
    assert!(timeout(Duration::from_secs(1), well.news.recv()).await.is_err(), "positive control");
}

#[tokio::test]
async fn a_missing_program_is_said() {
    let (_asks, questions) = mpsc::channel(1);
    let (tell, mut news) = mpsc::channel(4);
    let settings = Settings::new(Role::Agent, "/nowhere");
    let launcher = Launching::within("/nowhere/mesh-sidecar".into(), "/nowhere".into());
    let _sidecar = Sidecar::start(launcher, settings, questions, tell);
    let Some(News::Down(why)) = news.recv().await else { panic!() };
    assert!(why.contains("cannot start /nowhere/mesh-sidecar") && why.contains("beside meshd"), "{why}");
}

#[tokio::test]
async fn other_settings_are_another_sidecar_at_once() {
    let mut lab = lab("echo start >>$log; read -r settings; cat >/dev/null");
    assert!(matches!(lab.next().await, News::Up));
    assert_eq!(lab.log(1).await, "start\n");
    lab.sidecar.configure(Settings::new(Role::Agent, lab.dir.path()));
    lab.sidecar.configure(Settings::new(Role::Agent, "/other"));
    assert!(matches!(lab.next().await, News::Up));
    assert_eq!(lab.log(2).await, "start\nstart\n");
}

#[tokio::test]
async fn who_does_not_end_is_killed() {
    let mut lab = lab("trap '' TERM HUP; echo start >>$log; read -r settings; while :; do sleep 1; done");
    assert!(matches!(lab.next().await, News::Up));
    lab.log(1).await;
    let start = Instant::now();
    lab.sidecar.stop().await;
    assert!(start.elapsed() >= PATIENCE && start.elapsed() < PATIENCE * 3);
}
