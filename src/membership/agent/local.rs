//! A server's own node: the same as the agent does, without a network in between.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::keep::{Keep, KeepError};
use super::{Command, Heard, Relay, View, myself};
use crate::membership::api::JoinRequest;
use crate::membership::clock::Now;
use crate::membership::link::{FromSidecar, Hello, Refusal, Status};
use crate::membership::record::Role;
use crate::membership::registry::{INTERVAL, Proof, Refused, Registry};
use crate::membership::settings::Settings;

/// What the registry refuses is tried again after so long, or when `meshd` says something else.
const RETRY: Duration = Duration::from_secs(5);

/// Joins once, by a token: a server of a cluster that others have made.
pub async fn join(settings: &Settings, registry: &Registry, hello: &Hello, proof: &Proof) -> Result<(), JoinError> {
    let keep = Keep::open(&settings.data_dir)?;
    let request = request(settings, &keep, &hello.name, hello)?;
    let answer = registry.join(Now::read(), &request, proof, None).await?;
    keep.joined(&hello.name, Role::Server, &answer)?;
    Ok(())
}

/// Why a server does not become a member.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Its own files.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The cluster.
    #[error(transparent)]
    Refused(#[from] Refused),
}

pub(in crate::membership) fn request(
    settings: &Settings,
    keep: &Keep,
    name: &str,
    hello: &Hello,
) -> Result<JoinRequest, KeepError> {
    Ok(JoinRequest {
        name: name.to_owned(),
        role: Role::Server,
        myself: myself(settings, hello),
        control_only: settings.control_only,
        request: keep.request()?,
        clock: Now::read().unix,
        token: None,
    })
}

/// Runs until `meshd` is gone, or this node left or was removed.
pub async fn run(
    settings: Settings,
    registry: Arc<Registry>,
    heard: Heard,
    mut commands: mpsc::Receiver<Command>,
    view: View,
    out: mpsc::Sender<FromSidecar>,
) -> Result<(), KeepError> {
    let Heard { mut hello, reached } = heard;
    let keep = Keep::open(&settings.data_dir)?;
    let member = keep.membership()?;
    let name = member.map_or_else(|| hello.borrow().name.clone(), |member| member.name);
    let proof = if registry.is_shared() { Proof::Local } else { Proof::LocalAlone };
    let mut outlook = registry.outlook();
    let id = loop {
        let join = request(&settings, &keep, &name, &hello.borrow_and_update())?;
        match registry.join(Now::read(), &join, &proof, None).await {
            Ok(answer) => {
                keep.joined(&name, Role::Server, &answer)?;
                break answer.id;
            }
            Err(refused) => view.problem(refused.to_string()),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            _ = hello.changed() => {}
            Ok(()) = outlook.changed() => {}
            () = out.closed() => return Ok(()),
        }
    };
    let servers: Vec<String> = registry.servers().iter().map(ToString::to_string).collect();
    view.say(|status| {
        *status = Status {
            joined: true,
            connected: true,
            server: servers.first().cloned(),
            servers,
            problem: None,
            refused: false,
            progress: None,
        };
    });
    let mut refused = None;
    let mut relay = Relay {
        cluster: registry.cluster().to_owned(),
        cidrs: registry.cidrs().to_vec(),
        revision: None,
        sent: false,
        view: view.clone(),
        out: out.clone(),
    };
    let mut news = registry.watch();
    let mut beat = tokio::time::interval(INTERVAL);
    loop {
        if !registry.has(&id) {
            let reason = format!("node `{name}` was removed from the cluster, while it serves it");
            keep.forget()?;
            view.problem(reason.clone());
            let _ = out.send(FromSidecar::Expelled { reason }).await;
            return Ok(());
        }
        let away = outlook.borrow_and_update().clone();
        if away.is_empty() {
            match relay.take(registry.local_news(relay.revision)).await {
                Ok(true) => {}
                Ok(false) => continue,
                Err(_) => return Ok(()),
            }
        }
        // Without the store `meshd` goes by the list that it keeps itself, which may be the later one.
        view.say(|status| {
            status.connected = away.is_empty();
            status.problem = if away.is_empty() { refused.clone() } else { Some(away.join("; ")) };
        });
        tokio::select! {
            _ = beat.tick() => {
                let peers = reached.borrow().clone();
                registry.beat(Now::read(), &id, None, peers);
            },
            _ = news.changed() => {}
            () = out.closed() => return Ok(()),
            Ok(()) = hello.changed() => {
                let said = myself(&settings, &hello.borrow_and_update());
                let updated = registry.update(Now::read(), &id, &said).await;
                refused = updated.err().map(|refused| refused.to_string());
            }
            Ok(()) = outlook.changed() => {}
            Some(Command::Leave(answer)) = commands.recv() => {
                let left = registry.leave(Now::read(), &id).await;
                let gone = left.is_ok();
                let _ = answer.send(left.map_err(|refused| Refusal { message: refused.to_string() }));
                if gone {
                    keep.forget()?;
                    view.say(|status| *status = Status::default());
                    return Ok(());
                }
            }
        }
    }
}
