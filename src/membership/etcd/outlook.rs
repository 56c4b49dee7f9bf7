//! Why the servers' etcd does not answer: which of its members are there, as this one sees it before there is a quorum.

use std::net::SocketAddr;

use futures::future::join_all;

use super::kept::{Kept, Member};
use super::{CLIENT_PORT, PEER_PORT};
use crate::membership::store::etcd::{Access, Gateway};

/// The members as this one last knew them.
pub struct Outlook {
    kept: Kept,
    own: Member,
}

impl Outlook {
    pub(super) fn new(kept: Kept, own: Member) -> Self {
        Outlook { kept, own }
    }

    /// What is missing and what to do, a sentence each. `called` tells what people call the server of a member.
    pub async fn reasons(&self, called: impl Fn(&str) -> Option<String>) -> Vec<String> {
        let asked = self.own.cluster.iter().map(|(name, url)| self.ask(name, url));
        let answers: Vec<_> = join_all(asked).await;
        let (all, there) = (answers.len(), answers.iter().filter(|(_, answer)| answer.is_ok()).count());
        let quorum = all / 2 + 1;
        let mut reasons = vec![match there >= quorum {
            true => format!("the servers' etcd is about to elect a leader: {there} of its {all} members are there"),
            false => {
                format!("the servers' etcd has no quorum: {there} of its {all} members answer, and {quorum} have to")
            }
        }];
        for (name, answer) in answers {
            let Err(why) = answer else { continue };
            reasons.push(match (name == self.own.name, called(name)) {
                (true, _) => format!("this server's own etcd: {why}"),
                (false, called) => {
                    let called = called.map(|name| format!(" `{name}`")).unwrap_or_default();
                    format!(
                        "the etcd of server{called}: {why}: start meshd there, and let servers reach each other on TCP ports \
                         {CLIENT_PORT} and {PEER_PORT}"
                    )
                }
            });
        }
        if there < quorum {
            reasons.push(
                "if so many servers are lost for good: stop meshd on all, run `mesh-sidecar cluster-reset` on this one, and \
                 start it"
                    .to_owned(),
            );
        }
        reasons
    }

    async fn ask<'a>(&self, name: &'a str, url: &str) -> (&'a str, Result<(), String>) {
        let endpoint = url.strip_prefix("https://").and_then(|place| place.parse::<SocketAddr>().ok());
        let answer = match (endpoint, self.kept.client()) {
            (Some(at), Ok(tls)) => {
                let endpoints = vec![(at.ip().to_string(), at.port())];
                Gateway::new(Access { endpoints, tls: Some(tls), user: None }).is_there().await
            }
            (None, _) => Err("its address cannot be read".to_owned()),
            (_, Err(error)) => Err(error.to_string()),
        };
        (name, answer)
    }
}
