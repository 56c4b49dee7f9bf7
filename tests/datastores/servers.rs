//! Real database servers for the tests: a private data directory, a loopback port, a user that is not root.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use meshd::membership::settings::{Datastore, Secret};
use sqlx::{AssertSqlSafe, Connection, Executor, MySqlConnection, PgConnection};
use tempfile::TempDir;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    MariaDb,
    Postgres,
}

/// A running server. Ends when this is dropped, and with the thread that started it.
pub(crate) struct Server {
    pub(crate) kind: Kind,
    pub(crate) port: u16,
    program: PathBuf,
    dir: TempDir,
    child: Option<Child>,
    durable: bool,
    /// Further arguments.
    more: Vec<String>,
}

const ADMIN: &str = "boss";
const ADMIN_PASSWORD: &str = "of-the-house";
/// What `meshd` logs in with.
pub(crate) const USER: &str = "mesh";
pub(crate) const PASSWORD: &str = "hush-hush";

impl Server {
    /// `None`, with the reason on standard output, where the server is not installed.
    pub(crate) fn start(kind: Kind, durable: bool) -> Option<Server> {
        let server = Self::new(kind, durable)?;
        server.make();
        server.started()
    }

    /// Three MariaDB servers that are one Galera cluster; each gives the next all that it has.
    pub(crate) fn galera() -> Option<[Server; 3]> {
        let provider = "/usr/lib/galera/libgalera_smm.so";
        if !Path::new(provider).exists()
            || Command::new("rsync").arg("--version").stdout(Stdio::null()).status().is_err()
        {
            println!("SKIPPED: no {provider} here, or no `rsync`; install galera-4 and rsync");
            return None;
        }
        let ports: [u16; 9] = std::array::from_fn(|_| free_port());
        let all = format!("gcomm://127.0.0.1:{},127.0.0.1:{},127.0.0.1:{}", ports[0], ports[1], ports[2]);
        let mut nodes = Vec::new();
        for n in 0..3 {
            let mut node = Self::new(Kind::MariaDb, false)?;
            let (group, ist, sst) = (ports[n], ports[3 + n], ports[6 + n]);
            node.more = vec![
                "--binlog-format=ROW".to_owned(),
                "--innodb-autoinc-lock-mode=2".to_owned(),
                "--wsrep-on=ON".to_owned(),
                format!("--wsrep-provider={provider}"),
                format!("--wsrep-cluster-address={all}"),
                format!("--wsrep-node-address=127.0.0.1:{group}"),
                format!("--wsrep-node-name=n{n}"),
                format!(
                    "--wsrep-provider-options=gmcast.listen_addr=tcp://127.0.0.1:{group};ist.recv_addr=127.0.0.1:{ist};gcache.size=16M"
                ),
                "--wsrep-sst-method=rsync".to_owned(),
                format!("--wsrep-sst-receive-address=127.0.0.1:{sst}"),
            ];
            if n == 0 {
                node.make();
                node.more.push("--wsrep-new-cluster".to_owned());
            }
            node.run();
            // once there are others, it comes back to them
            node.more.retain(|argument| argument != "--wsrep-new-cluster");
            nodes.push(node);
        }
        nodes.try_into().ok()
    }

    fn started(mut self) -> Option<Server> {
        self.run();
        Some(self)
    }

    fn new(kind: Kind, durable: bool) -> Option<Server> {
        let Some(program) = find(kind) else {
            println!("SKIPPED: no {kind:?} server here; install mariadb-server and postgresql");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
        if is_root() {
            let owner = format!("{0}:", user(kind));
            assert!(Command::new("chown").arg(owner).arg(&data).status().unwrap().success());
        }
        Some(Server { kind, port: free_port(), program, dir, child: None, durable, more: vec![] })
    }

    fn make(&self) {
        let data = self.data();
        let mut make = match self.kind {
            Kind::MariaDb => {
                let mut make = as_user(self.kind, Path::new("mariadb-install-db"));
                make.arg("--no-defaults").arg(format!("--datadir={}", data.display()));
                make.args(["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]);
                make
            }
            Kind::Postgres => {
                let secret = self.dir.path().join("password");
                std::fs::write(&secret, ADMIN_PASSWORD).unwrap();
                let mut make = as_user(self.kind, &self.program.with_file_name("initdb"));
                make.arg("-D").arg(&data).arg(format!("--pwfile={}", secret.display()));
                make.args(["-U", ADMIN, "--auth=md5", "--no-sync", "--locale=C", "-E", "UTF8"]);
                make
            }
        };
        let done = make.current_dir(self.dir.path()).output().expect("make the database");
        assert!(done.status.success(), "{make:?}: {}", String::from_utf8_lossy(&done.stderr));
        if self.kind == Kind::MariaDb {
            let sql = format!(
                "CREATE OR REPLACE USER '{ADMIN}'@'%' IDENTIFIED BY '{ADMIN_PASSWORD}';\n\
                 GRANT ALL ON *.* TO '{ADMIN}'@'%' WITH GRANT OPTION;\n"
            );
            std::fs::write(self.dir.path().join("init.sql"), sql).unwrap();
        }
    }

    /// Starts it, and waits until it answers.
    pub(crate) fn run(&mut self) {
        let data = self.data();
        let mut run = as_user(self.kind, &self.program);
        match self.kind {
            Kind::MariaDb => {
                run.arg("--no-defaults").arg(format!("--datadir={}", data.display()));
                run.arg(format!("--socket={}", data.join("socket").display()));
                let init = self.dir.path().join("init.sql");
                run.args(init.exists().then(|| format!("--init-file={}", init.display())));
                run.args(&self.more);
                run.arg(format!("--port={}", self.port));
                run.args(["--bind-address=127.0.0.1", "--skip-name-resolve", "--innodb-buffer-pool-size=32M"]);
                let flush = if self.durable { 1 } else { 2 };
                run.arg(format!("--innodb-flush-log-at-trx-commit={flush}"));
            }
            Kind::Postgres => {
                run.arg("-D").arg(&data).arg("-k").arg(&data);
                run.args([
                    "-h",
                    "127.0.0.1",
                    "-p",
                    &self.port.to_string(),
                    "-c",
                    "shared_buffers=16MB",
                    "-c",
                    "password_encryption=md5",
                ]);
                if !self.durable {
                    run.args(["-c", "fsync=off"]);
                }
            }
        }
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        run.current_dir(self.dir.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(run.spawn().expect("start the database"));
        let begun = Instant::now();
        while !block_on(self.answers()) {
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?} does not answer: {}", self.kind, log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // PostgreSQL's children outlive a SIGKILL of their parent for a moment: SIGQUIT is its immediate end
            let signal = if self.kind == Kind::Postgres { "-QUIT" } else { "-KILL" };
            let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
            let _ = child.wait();
        }
    }

    async fn answers(&self) -> bool {
        match self.kind {
            Kind::MariaDb => MySqlConnection::connect(&self.admin_url("mysql")).await.is_ok(),
            Kind::Postgres => PgConnection::connect(&self.admin_url("postgres")).await.is_ok(),
        }
    }

    /// Runs statements as somebody who may do everything, in this database.
    pub(crate) async fn admin(&self, database: &str, statements: &str) {
        for statement in statements.split(";\n").map(str::trim).filter(|s| !s.is_empty()) {
            let sql = sqlx::raw_sql(AssertSqlSafe(statement.to_owned()));
            match self.kind {
                Kind::MariaDb => {
                    let mut c = MySqlConnection::connect(&self.admin_url(database)).await.unwrap();
                    c.execute(sql).await.map(drop)
                }
                Kind::Postgres => {
                    let mut c = PgConnection::connect(&self.admin_url(database)).await.unwrap();
                    c.execute(sql).await.map(drop)
                }
            }
            .unwrap_or_else(|e| panic!("{statement}: {e}"));
        }
    }

    /// The first column of the first row.
    pub(crate) async fn number(&self, database: &str, query: &str) -> i64 {
        let query = AssertSqlSafe(query.to_owned());
        match self.kind {
            Kind::MariaDb => {
                let mut c = MySqlConnection::connect(&self.admin_url(database)).await.unwrap();
                sqlx::query_scalar(query).fetch_one(&mut c).await.unwrap()
            }
            Kind::Postgres => {
                let mut c = PgConnection::connect(&self.admin_url(database)).await.unwrap();
                sqlx::query_scalar(query).fetch_one(&mut c).await.unwrap()
            }
        }
    }

    /// Whether some writer holds the lock that all need.
    pub(crate) async fn is_locked(&self, database: &str) -> bool {
        let ask = "SELECT CAST(revision AS CHAR(20)) FROM meshd_state WHERE id = 0 FOR UPDATE NOWAIT";
        match self.kind {
            Kind::MariaDb => {
                let mut c = MySqlConnection::connect(&self.admin_url(database)).await.unwrap();
                c.execute(ask).await.is_err()
            }
            Kind::Postgres => {
                let mut c = PgConnection::connect(&self.admin_url(database)).await.unwrap();
                c.execute(ask).await.is_err()
            }
        }
    }

    /// A database for `meshd`, whose user may do what it has to.
    pub(crate) async fn database(&self, name: &str) -> Datastore {
        self.user().await;
        match self.kind {
            Kind::MariaDb => {
                // a collation that takes `a` and `A` for the same
                let sql = format!(
                    "CREATE DATABASE {name} CHARACTER SET latin1 COLLATE latin1_swedish_ci;\n
                     GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX ON {name}.* TO {USER}@'%';\n"
                );
                self.admin("mysql", &sql).await;
            }
            Kind::Postgres => {
                // a character set that cannot hold every key
                let sql = format!("CREATE DATABASE {name} OWNER {USER} ENCODING 'LATIN1' TEMPLATE template0");
                self.admin("postgres", &sql).await;
            }
        }
        self.at(name, self.port)
    }

    /// `meshd`'s user, which may do nothing yet.
    pub(crate) async fn user(&self) {
        match self.kind {
            Kind::MariaDb => {
                let sql = format!("CREATE USER IF NOT EXISTS {USER}@'%' IDENTIFIED BY '{PASSWORD}'");
                self.admin("mysql", &sql).await;
            }
            Kind::Postgres => {
                let sql = format!(
                    "DO $$ BEGIN CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'; \
                     EXCEPTION WHEN duplicate_object THEN NULL; END $$"
                );
                self.admin("postgres", &sql).await;
            }
        }
    }

    /// The endpoint of a database, perhaps by way of another port.
    pub(crate) fn at(&self, name: &str, port: u16) -> Datastore {
        let scheme = self.scheme();
        Datastore {
            endpoint: Some(Secret::new(format!("{scheme}://{USER}@127.0.0.1:{port}/{name}"))),
            password: Some(Secret::new(PASSWORD)),
            ..Datastore::default()
        }
    }

    pub(crate) fn scheme(&self) -> &'static str {
        match self.kind {
            Kind::MariaDb => "mysql",
            Kind::Postgres => "postgres",
        }
    }

    fn admin_url(&self, database: &str) -> String {
        format!("{}://{ADMIN}:{ADMIN_PASSWORD}@127.0.0.1:{}/{database}", self.scheme(), self.port)
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child
            && self.kind == Kind::MariaDb
        {
            let _ = child.kill();
        }
        self.kill();
    }
}

/// As the database's own user where this is root: PostgreSQL refuses root. The database ends with this thread.
fn as_user(kind: Kind, program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={}", user(kind))).arg(format!("--regid={}", user(kind)));
    command.args(["--clear-groups", "--pdeathsig=KILL"]).arg(program);
    command
}

fn user(kind: Kind) -> &'static str {
    match kind {
        Kind::MariaDb => "mysql",
        Kind::Postgres => "postgres",
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Where the server's program is: PostgreSQL's stands in no PATH.
fn find(kind: Kind) -> Option<PathBuf> {
    let name = match kind {
        Kind::MariaDb => "mariadbd",
        Kind::Postgres => "postgres",
    };
    let mut folders: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|all| all.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    folders.sort();
    folders.reverse();
    folders.extend(["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"].map(PathBuf::from));
    folders.into_iter().map(|folder| folder.join(name)).find(|program| program.is_file())
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}
