//! The other servers of the cluster, as the store says: where they are reached, and which node heartbeats at which. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::rows;
use crate::membership::address::ServerAddress;

#[derive(Debug, Default)]
pub(super) struct Others {
    /// Servers that run, this one included, by the id that each drew at its start.
    pub(super) servers: BTreeMap<String, Vec<ServerAddress>>,
    /// Servers by the nodes that heartbeat there.
    pub(super) via: HashMap<String, String>,
}

impl Others {
    /// Takes a key that is there now, or (without a value) no longer is. Other keys mean nothing here.
    pub(super) fn take(&mut self, key: &str, value: Option<&[u8]>) {
        if let Some(server) = key.strip_prefix(rows::SERVER) {
            match value.map(|value| serde_json::from_slice(value).unwrap_or_default()) {
                Some(addresses) => drop(self.servers.insert(server.to_owned(), addresses)),
                None => drop(self.servers.remove(server)),
            }
        } else if let Some(node) = key.strip_prefix(rows::VIA) {
            match value {
                Some(server) => drop(self.via.insert(node.to_owned(), String::from_utf8_lossy(server).into_owned())),
                None => drop(self.via.remove(node)),
            }
        }
    }

    /// How many servers run. One that starts anew draws another id, and the one before stands there until its lease ends:
    /// by their addresses they are one.
    pub(super) fn count(&self) -> usize {
        self.servers.values().collect::<BTreeSet<_>>().len()
    }

    /// Whether the node is for this server to judge: it heartbeats here, or nowhere that runs.
    pub(super) fn is_mine(&self, me: &str, node: &str) -> bool {
        self.via.get(node).is_none_or(|server| server == me || !self.servers.contains_key(server))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_started_anew_is_one() {
        let mut others = Others::default();
        let at = |address: &str| serde_json::to_vec(&[address]).unwrap();
        others.take("server/before", Some(&at("https://192.0.2.1:9345")));
        others.take("server/after", Some(&at("https://192.0.2.1:9345")));
        assert_eq!(others.count(), 1);
        others.take("server/other", Some(&at("https://192.0.2.2:9345")));
        assert_eq!(others.count(), 2, "positive control");
        others.take("server/before", None);
        assert_eq!(others.count(), 2);
    }
}
