//! An etcd that somebody else runs, with TLS, certificates for clients, users and rights: what stands in the way is said, and
//! what is said to be run mends it; and what may happen to it behind a server's back.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use meshd::membership::clock::Now;
use meshd::membership::record::Role;
use meshd::membership::registry::{OpenError, Registry, Setup};
use meshd::membership::server::Server;
use meshd::membership::settings::{Datastore, Secret};
use meshd::membership::store::check::{self, Report};
use meshd::membership::store::standby::{self, Standby};
use meshd::membership::store::{self, StoreError, conformance};

use crate::etcds::{Etcds, Tls};
use crate::{harness, until};

/// How `mesh` gets in, once it may.
fn datastore(etcds: &Etcds) -> Datastore {
    let (certificate, key) = etcds.tls().leaf(0, None);
    Datastore {
        endpoint: Some(Secret::new(format!("etcds://mesh@127.0.0.1:{}", etcds.port()))),
        password: Some(Secret::new("hush-hush")),
        ca: Some(etcds.tls().ca.clone()),
        certificate: Some(certificate),
        key: Some(Secret::new(key)),
    }
}

async fn look(datastore: &Datastore) -> Report {
    let report = check::check(datastore, Path::new("x")).await;
    assert!(!format!("{report:?}").contains("hush"), "{report:?}");
    report
}

async fn refused(datastore: &Datastore, problem: &str, fix: &str) {
    let report = look(datastore).await;
    let found = report.findings.iter().any(|f| f.problem.contains(problem) && f.fix.contains(fix) && !f.warning);
    assert!(!report.ok && found, "{problem}, {fix}: {report:#?}");
}

async fn good(datastore: &Datastore, format: i64) {
    let report = look(datastore).await;
    // of the release that is installed here, whatever it is, there may be something to say
    let fine = report.findings.iter().all(|finding| finding.warning && finding.fix.contains("3.5.3 or later"));
    assert!(report.ok && fine && report.format == Some(format), "{report:#?}");
    assert!(report.server.unwrap().contains(", version 3."));
}

async fn secured(story: &str) -> Option<Etcds> {
    let mut etcds = Etcds::secured(story).await?;
    for line in ["user add root:pw", "user grant-role root root", "user add mesh:hush-hush", "auth enable"] {
        etcds.ctl(line);
    }
    etcds.root = Some("root:pw");
    Some(etcds)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_the_way_is_said_and_what_is_said_mends_it() {
    let story = "what_stands_in_the_way_is_said_and_what_is_said_mends_it";
    let Some(etcds) = secured(story).await else { return };
    let mesh = datastore(&etcds);
    refused(
        &mesh,
        "may not read and write the keys below `meshd/`",
        "grant-permission --prefix=true meshd readwrite meshd/",
    )
    .await;
    // half of it
    etcds.ctl("role add half");
    etcds.ctl("role grant-permission --prefix=true half read meshd/");
    etcds.ctl("user grant-role mesh half");
    refused(&mesh, "may not read and write", "user grant-role mesh meshd").await;
    let report = look(&mesh).await;
    for command in report.findings[0].fix.split("; ") {
        etcds.ctl(command.strip_prefix("etcdctl ").unwrap());
    }
    good(&mesh, 0).await;
    let store = store::open(&mesh, Path::new("x")).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), conformance::check(&*store)).await.unwrap();
    let before = store.range("").await.unwrap();

    let at = |endpoint: String| Datastore { endpoint: Some(Secret::new(endpoint)), ..mesh.clone() };
    let port = etcds.port();
    let wrong = Datastore { password: Some(Secret::new("hush-hush?")), ..mesh.clone() };
    refused(&wrong, "password is wrong", "datastore-password-file").await;
    let anonymous = Datastore { password: None, ..at(format!("etcds://127.0.0.1:{port}")) };
    refused(&anonymous, "user and a password", "etcd://USER@HOST").await;
    let other = Datastore { ca: Some(Tls::new().ca), ..mesh.clone() };
    refused(&other, "not from an authority", "datastore-cafile").await;
    refused(&at(format!("etcds://mesh@localhost:{port}")), "does not name this host", "datastore-endpoint").await;
    let plain = Datastore { ca: None, certificate: None, key: None, ..at(format!("etcd://mesh@127.0.0.1:{port}")) };
    refused(&plain, "closed", "if it speaks TLS, write `etcds://`").await;
    let (certificate, key) = etcds.tls().leaf(366, None);
    let expired = Datastore { certificate: Some(certificate), key: Some(Secret::new(key)), ..mesh.clone() };
    refused(&expired, "does not take this server's certificate", "datastore-certfile").await;
    let (certificate, key) = Tls::new().leaf(0, None);
    let strange = Datastore { certificate: Some(certificate), key: Some(Secret::new(key)), ..mesh.clone() };
    refused(&strange, "does not take this server's certificate", "datastore-certfile").await;
    let (certificate, key) = etcds.tls().leaf(0, Some("mesh"));
    let named = Datastore { certificate: Some(certificate), key: Some(Secret::new(key)), ..mesh.clone() };
    refused(&named, "a common name while users have to log in", "without a common name").await;
    let without = Datastore { certificate: None, key: None, ..mesh.clone() };
    refused(&without, "does not take this server's certificate", "datastore-certfile").await;
    refused(&at("etcds://mesh@127.0.0.1:1".to_owned()), "cannot be reached", "endpoint health").await;
    // of two members one: a server works with that
    let report = look(&at(format!("etcds://mesh@127.0.0.1:1,127.0.0.1:{port}"))).await;
    assert!(report.ok && report.findings.iter().all(|finding| finding.warning), "{report:#?}");
    let away = report.findings.iter().filter(|finding| finding.fix.contains("endpoint health")).count();
    assert_eq!(away, 1, "{report:#?}");
    // etcd takes another certificate while it runs
    etcds.certify(366);
    refused(&mesh, "its certificate has expired", "--cert-file").await;
    etcds.certify(0);
    good(&mesh, 1).await;
    // what a later release has written
    etcds.ctl("put meshd/format 2");
    refused(&mesh, "has format 2, but this version knows 1", "meshd").await;
    let newer = store::open(&mesh, Path::new("x")).await.err();
    assert!(matches!(newer, Some(StoreError::Newer { found: 2, known: 1, .. })), "{newer:?}");
    etcds.ctl("del meshd/format");
    good(&mesh, 1).await;
    let after = store.range("").await.unwrap();
    assert_eq!(before.items, after.items, "nothing has changed");
    assert_eq!(before.revision + 2, after.revision, "but by etcdctl");
}

fn setup(cluster: Option<&str>, secret: Option<&str>) -> Setup {
    Setup { shared: true, cluster: cluster.map(str::to_owned), secret: secret.map(Secret::new), ..harness::setup() }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_etcd_is_for_one_cluster_and_one_that_is_emptied_is_noticed() {
    let story = "one_etcd_is_for_one_cluster_and_one_that_is_emptied_is_noticed";
    let Some(etcds) = secured(story).await else { return };
    etcds.ctl("user grant-role mesh root");
    let mesh = datastore(&etcds);
    let open = async |setup: Setup| {
        let store = store::open(&mesh, Path::new("x")).await.unwrap();
        Registry::open(store, setup, Now::read()).await
    };
    let registry = Arc::new(open(setup(None, Some("of them all"))).await.unwrap());
    let ours = registry.cluster().to_owned();
    let store = store::open(&mesh, Path::new("x")).await.unwrap();
    let before = store.range("").await.unwrap();
    let other = open(setup(Some("another"), None)).await.err();
    assert!(matches!(&other, Some(OpenError::OtherCluster { found, .. }) if *found == ours), "{other:?}");
    let stranger = open(setup(None, None)).await.err();
    assert!(matches!(&stranger, Some(OpenError::Stranger { found }) if *found == ours), "{stranger:?}");
    assert!(matches!(open(setup(None, Some("a guess"))).await.err(), Some(OpenError::OtherSecret)));
    assert_eq!(store.range("").await.unwrap(), before, "nothing has changed");
    open(setup(Some(&ours), None)).await.expect("positive control");

    let followed = registry.clone();
    let follower = tokio::spawn(async move { followed.follow().await });
    etcds.ctl("del --prefix meshd/");
    let gone = tokio::time::timeout(Duration::from_secs(30), follower).await.unwrap().unwrap();
    assert!(matches!(&gone, OpenError::Vanished { cluster } if *cluster == ours), "{gone}");
    assert!(gone.to_string().contains("Restore the datastore from a backup"), "{gone}");
    let vanished = open(setup(Some(&ours), None)).await.err();
    assert!(matches!(&vanished, Some(OpenError::Vanished { cluster }) if *cluster == ours), "{vanished:?}");
    assert!(store.range("").await.unwrap().items.is_empty(), "and no other cluster was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_without_its_etcd() {
    let story = "a_server_starts_without_its_etcd";
    let Some(mut etcds) = Etcds::start(story, 1).await else { return };
    let dir = tempfile::TempDir::new().unwrap();
    let copy = dir.path().join("copy.json");
    let secret = Some("of them all");
    let first =
        Arc::new(Registry::open(Arc::new(etcds.store().await), setup(None, secret), Now::read()).await.unwrap());
    let listen = async |registry: &Arc<Registry>| {
        let names = ["127.0.0.1".to_owned()];
        Server::start("127.0.0.1:0".parse().unwrap(), registry.clone(), &names).await.unwrap()
    };
    let server = listen(&first).await;
    let token = first.mint(Now::read(), Role::Agent, None, None, None, "").await.unwrap();
    let known = harness::join(&server.address().into(), &token, "known", Role::Agent).await.unwrap();
    let keeper = first.clone();
    let path = copy.clone();
    tokio::spawn(async move { keeper.keep_copy(&path).await });
    until("the copy is there", || copy.exists()).await;
    let late = harness::join(&server.address().into(), &token, "late", Role::Agent).await.unwrap();
    let records = first.records();
    drop(server);
    etcds.kill(0);

    // a start without the store, by a copy that knows one of the two
    let standby = Standby::new(standby::kept(&copy).unwrap());
    let ours = first.cluster().to_owned();
    let registry = Arc::new(Registry::open(standby.clone(), setup(Some(&ours), secret), Now::read()).await.unwrap());
    registry.set_standby(&standby);
    let followed = registry.clone();
    tokio::spawn(async move { panic!("{}", followed.follow().await) });
    standby.say(vec!["etcd is away: start it".to_owned()]);
    let server = listen(&registry).await;
    let address = server.address().into();
    let of = async |node: &harness::Joined| {
        let identity = node.keep.client_identity(&node.member);
        let trust = meshd::membership::tls::Trust::Ca(registry.authority().certificate().clone());
        meshd::membership::client::Connection::open(&address, trust, Some(identity)).await.unwrap()
    };
    let readyz = async || of(&known).await.get::<serde_json::Value>("/readyz").await;
    assert!(readyz().await.is_err(), "503");
    let nodes = of(&known).await.get::<Vec<meshd::membership::record::NodeRecord>>("/v1/nodes").await.unwrap();
    assert_eq!(nodes.len(), 1, "what was so when the copy was made");
    // who came later is told to wait, and not that it is nobody
    let told = of(&late).await.get::<serde_json::Value>("/v1/nodes").await.unwrap_err();
    assert_eq!(told.code(), Some("store"), "{told}");
    let refused = harness::join(&address, &token, "new", Role::Agent).await.err().unwrap();
    assert!(refused.code() == Some("store") && refused.to_string().contains("etcd is away"), "{refused}");
    assert!(registry.mint(Now::read(), Role::Agent, None, None, None, "").await.is_err(), "nothing can be changed");

    etcds.restart(0);
    etcds.healthy().await;
    registry.arrive(&standby, Arc::new(etcds.store().await), None).await.unwrap();
    assert!(registry.away().is_empty() && readyz().await.is_ok());
    let ids =
        |records: Vec<meshd::membership::record::NodeRecord>| records.into_iter().map(|r| r.id).collect::<Vec<_>>();
    assert_eq!(ids(registry.records()), ids(records));
    drop(harness::join(&address, &token, "new", Role::Agent).await.expect("positive control"));
}

/// Something that is not quite an etcd. Returns its port.
pub(crate) async fn serve(app: axum::Router) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper_util::service::TowerToHyperService::new(app.clone());
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_too_old_is_said() {
    let version = axum::routing::post(async || axum::Json(serde_json::json!({ "version": "3.3.27" })));
    let port = serve(axum::Router::new().route("/v3/maintenance/status", version)).await;
    let endpoint = Some(Secret::new(format!("etcd://127.0.0.1:{port}")));
    refused(
        &Datastore { endpoint, ..Datastore::default() },
        "it is version 3.3.27; use 3.4 or later",
        "install etcd 3.4",
    )
    .await;
}
