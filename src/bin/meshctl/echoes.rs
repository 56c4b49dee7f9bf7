//! `ping` and `test`: echoes that meshctl sends itself, through the mesh.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use meshd::admin::client::Client;
use meshd::admin::protocol::{TargetView, why};
use meshd::admin::render;
use meshd::probe;
use serde_json::json;

use crate::screen::Screen;

pub(crate) fn ping(
    client: &Client,
    screen: &Screen,
    node: &str,
    count: u32,
    patience: Duration,
) -> anyhow::Result<bool> {
    let way = client.why(why::Ask { destination: node.to_owned(), flow: None })?;
    let (Some(to), Some(mtu)) = (way.destination, way.mtu) else {
        anyhow::bail!("{}; `meshctl why {node}` says more", way.verdict);
    };
    let asked = probe::Probe { to, from: way.source, sizes: probe::sizes(mtu.ping_payload), count, patience };
    let rows = probe::run(&asked).map_err(|error| no_echoes(to, &error))?;
    let good = rows.iter().all(|row| row.received == row.sent);
    let document = json!({"node": node, "destination": to, "good": good, "sizes": rows});
    screen.print(&document, || format!("{node} at {to}\n{}", render::why::ping(node, &rows, screen.look)))?;
    Ok(good)
}

/// meshctl sends them itself, so it needs the right and the place to.
fn no_echoes(to: IpAddr, error: &io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied => "; run it as root",
        io::ErrorKind::AddrNotAvailable => "; run it in the network namespace that meshd runs in",
        _ => "",
    };
    anyhow::anyhow!("cannot send echoes to {to}: {error}{hint}")
}

/// Echoes to so many addresses at once.
const AT_ONCE: usize = 16;

pub(crate) fn test(client: &Client, screen: &Screen, count: u32, patience: Duration) -> anyhow::Result<bool> {
    let survey = client.survey()?;
    let echoes = |target: &TargetView| {
        let TargetView { address: to, source, ping_payload, .. } = target;
        let asked = probe::Probe { to: *to, from: Some(*source), sizes: probe::sizes(*ping_payload), count, patience };
        let rows = probe::run(&asked).map_err(|error| no_echoes(*to, &error));
        rows.map(|sizes| render::test::Echoes::new(target, sizes))
    };
    let mut echoed = Vec::new();
    for targets in survey.targets.chunks(AT_ONCE) {
        let of_chunk: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = targets.iter().map(|target| scope.spawn(|| echoes(target))).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        for rows in of_chunk {
            echoed.push(rows.map_err(|_| anyhow::anyhow!("a thread that sends echoes panicked"))??);
        }
    }
    let report = render::test::Report::new(survey, echoed);
    screen.print(&report, || render::test::test(&report, screen.look))?;
    Ok(report.good)
}
