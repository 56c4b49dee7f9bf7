//! What the stories of super-packets share: whether there are some of a kind on this kernel, and how many a node counted.

use serde_json::Value;

use crate::mesh::{Builder, Mesh, Node, skipped};

/// Those that leave uncut.
pub(crate) const TUNNEL_GSO: Kind = Kind { key: "tunnel_gso", since: "Linux 6.17" };
/// Those of more than 64 KiB for the node itself.
pub(crate) const BIG_TCP: Kind = Kind { key: "big_tcp", since: "Linux 6.6" };

pub(crate) struct Kind {
    /// Its key in the statistics.
    key: &'static str,
    /// What meshd says is needed for it.
    since: &'static str,
}

impl Kind {
    /// Two nodes, `a` and `b`, if this kernel takes such super-packets.
    #[track_caller]
    pub(crate) fn two_nodes(&self, story: &'static str, builder: Builder) -> Option<Mesh> {
        let mesh = builder.node("a").node("b").start();
        let why = self.why_off(mesh.node("a"));
        if why.contains(self.since) {
            skipped(story, &why);
            return None;
        }
        assert_eq!(why, "");
        Some(mesh)
    }

    /// Why there are none; empty where there are.
    #[track_caller]
    pub(crate) fn why_off(&self, node: &Node) -> String {
        let stats = node.stats();
        let why = stats[self.key]["why"].as_str().unwrap().to_owned();
        assert_eq!(stats[self.key]["on"], Value::Bool(why.is_empty()), "{why}");
        why
    }

    /// How many there have been.
    #[track_caller]
    pub(crate) fn count(&self, node: &Node) -> u64 {
        node.stats()[self.key]["super_packets"].as_u64().unwrap()
    }
}
