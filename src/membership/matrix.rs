//! Who reaches whom, and how well, as the nodes themselves say: what a node tells with its heartbeat, what a server has of
//! it, and the whole out of several servers' parts. Pure.
//!
//! A node tells of at most [`MAX_PATHS`] peers, whatever the mesh's size; a server keeps the newest word of each node that
//! heartbeats there, in memory alone.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Peers that a node tells of, at most: those that are down first.
pub const MAX_PATHS: usize = 16;
/// Nodes that are named in metrics, at most.
const NAMED: usize = 32;

/// What a node thinks of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    /// The peer: the id of its record; in a [`Row`] its name.
    pub to: String,
    /// Whether it answers.
    pub up: bool,
    /// The smoothed round trip, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u32>,
    /// Probes of a thousand that were lost lately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_permille: Option<u32>,
}

/// What one node says of others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub from: String,
    /// How long ago it said so, in milliseconds.
    pub age_ms: u64,
    /// Others by name, sorted.
    pub to: Vec<Watched>,
}

/// What one server knows: `GET /v1/matrix`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Part {
    /// A row for each node that heartbeats at this server.
    pub rows: Vec<Row>,
}

/// A server whose part is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Its address.
    pub server: String,
    /// Why.
    pub problem: String,
}

/// `meshctl cluster matrix`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Matrix {
    /// All nodes, sorted.
    pub nodes: Vec<String>,
    /// Rows, sorted by name.
    pub rows: Vec<Row>,
    /// Nodes of which no server that answered has a row.
    pub silent: Vec<String>,
    /// Servers that did not answer: rows of nodes that heartbeat there are not here.
    pub missing: Vec<Missing>,
}

/// What a node tells: the down ones, then those that lose most, then by id, as many as may be.
pub fn most_telling(mut paths: Vec<Watched>) -> Vec<Watched> {
    let worst = |path: &Watched| (path.up, std::cmp::Reverse(path.loss_permille.unwrap_or(0)));
    paths.sort_by(|a, b| worst(a).cmp(&worst(b)).then_with(|| a.to.cmp(&b.to)));
    paths.truncate(MAX_PATHS);
    paths
}

/// The whole out of parts; of two rows of a node the newer one counts. `all`: the names of all nodes that could have one.
pub fn whole(parts: Vec<Part>, all: impl IntoIterator<Item = String>, mut missing: Vec<Missing>) -> Matrix {
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    for row in parts.into_iter().flat_map(|part| part.rows) {
        if rows.get(&row.from).is_none_or(|other| row.age_ms < other.age_ms) {
            rows.insert(row.from.clone(), row);
        }
    }
    let all: BTreeSet<String> = all.into_iter().collect();
    let silent = all.iter().filter(|name| !rows.contains_key(*name)).cloned().collect();
    let named = rows.values().flat_map(|row| row.to.iter().map(|path| &path.to).chain([&row.from]));
    let nodes: BTreeSet<String> = named.cloned().chain(all).collect();
    missing.sort_by(|a, b| a.server.cmp(&b.server));
    Matrix { nodes: nodes.into_iter().collect(), rows: rows.into_values().collect(), silent, missing }
}

/// In Prometheus' text format, of a size that does not grow with the mesh.
pub fn metrics(part: &Part) -> String {
    let paths = || part.rows.iter().flat_map(|row| &row.to);
    let (up, down) = (paths().filter(|path| path.up).count(), paths().filter(|path| !path.up).count());
    let longest = paths().filter_map(|path| path.rtt_us).max().unwrap_or(0);
    let worst = paths().filter_map(|path| path.loss_permille).max().unwrap_or(0);
    let mut text = format!(
        "# HELP meshd_pairs Directed pairs of nodes, as nodes that heartbeat at this server see them.\n\
         # TYPE meshd_pairs gauge\nmeshd_pairs{{state=\"up\"}} {up}\nmeshd_pairs{{state=\"down\"}} {down}\n\
         # HELP meshd_pair_rtt_max_seconds The longest round trip among them.\n# TYPE meshd_pair_rtt_max_seconds gauge\n\
         meshd_pair_rtt_max_seconds {}\n\
         # HELP meshd_pair_loss_max_ratio The worst loss among them.\n# TYPE meshd_pair_loss_max_ratio gauge\n\
         meshd_pair_loss_max_ratio {}\n",
        f64::from(longest) / 1e6,
        f64::from(worst) / 1e3,
    );
    let mut by_node: BTreeMap<&str, u32> = BTreeMap::new();
    paths().filter(|path| !path.up).for_each(|path| *by_node.entry(&path.to).or_default() += 1);
    let mut by_node: Vec<_> = by_node.into_iter().collect();
    by_node.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    text.push_str("# HELP meshd_node_down_for Nodes that hold this one for dead; the 32 with the most.\n");
    text.push_str("# TYPE meshd_node_down_for gauge\n");
    for (name, count) in by_node.into_iter().take(NAMED) {
        text.push_str(&format!("meshd_node_down_for{{node=\"{name}\"}} {count}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(to: &str, up: bool, loss: u32) -> Watched {
        Watched { to: to.to_owned(), up, rtt_us: up.then_some(800), loss_permille: up.then_some(loss) }
    }

    fn row(from: &str, age_ms: u64, to: Vec<Watched>) -> Row {
        Row { from: from.to_owned(), age_ms, to }
    }

    #[test]
    fn a_node_tells_as_much_in_a_mesh_of_any_size_and_the_worst_first() {
        let many = (0..1_000).map(|n| path(&format!("{n:04}"), n != 700, (n == 800).into()));
        let told = most_telling(many.collect());
        assert_eq!(told.len(), MAX_PATHS);
        let names: Vec<_> = told.iter().take(3).map(|path| path.to.as_str()).collect();
        assert_eq!(names, ["0700", "0800", "0000"]);
    }

    #[test]
    fn parts_are_one_whole_and_what_is_missing_is_named() {
        let one = Part { rows: vec![row("b", 9_000, vec![path("a", false, 0)]), row("a", 5, vec![])] };
        let two = Part { rows: vec![row("b", 100, vec![path("k", true, 0)])] };
        let gone = Missing { server: "https://c:9345".to_owned(), problem: "no".to_owned() };
        let matrix = whole(vec![one, two], ["a", "b", "c"].map(str::to_owned), vec![gone.clone()]);
        assert_eq!(matrix.nodes, ["a", "b", "c", "k"]);
        assert_eq!(matrix.rows.iter().map(|row| row.age_ms).collect::<Vec<_>>(), [5, 100], "the newer one");
        assert_eq!((matrix.silent, matrix.missing), (vec!["c".to_owned()], vec![gone]));
    }

    #[test]
    fn metrics_do_not_grow() {
        let rows = (0..200)
            .map(|n| row(&format!("n{n}"), 1, (0..16).map(|m| path(&format!("m{}", n + m), false, 0)).collect()));
        let text = metrics(&Part { rows: rows.collect() });
        assert!(text.contains("meshd_pairs{state=\"down\"} 3200\n") && text.contains("meshd_pairs{state=\"up\"} 0\n"));
        assert_eq!(text.matches("meshd_node_down_for{").count(), NAMED);
        let one = metrics(&Part { rows: vec![row("a", 1, vec![path("b", true, 25)])] });
        assert!(
            one.contains("meshd_pair_rtt_max_seconds 0.0008\nb") || one.contains("meshd_pair_rtt_max_seconds 0.0008\n")
        );
        assert!(one.contains("meshd_pair_loss_max_ratio 0.025\n"), "{one}");
    }
}
