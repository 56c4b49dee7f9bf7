//! What a new node list changes, and whether it may be applied without asking.
//!
//! Pure: two lists in, a verdict out. Does not know where a list comes from or who applies it.

use std::cmp::Ordering;
use std::fmt;

use crate::node::{Encryption, NodeList, NodeName};

/// What differs between two lists, for the log. A peer is every node but this one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// Peers that only the new list has.
    pub added: Vec<NodeName>,
    /// Peers that only the old list has.
    pub removed: Vec<NodeName>,
    /// Peers whose addresses, subnets or MAC are others now.
    pub changed: Vec<NodeName>,
    /// How many of the changed ones were encrypted by the old list and are in clear by the new one.
    pub exposed_count: usize,
    /// How many peers are as before.
    pub unchanged_count: usize,
    /// Whether this node's own entry is another now.
    pub own_changed: bool,
}

/// What to do with a new list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Apply it.
    Apply(Change),
    /// It takes too much from at least four peers at once: ask a person first, the old list stays.
    HoldBack {
        /// What it takes.
        what: Loss,
        /// From how many peers, which is more than half.
        from: usize,
        /// Peers that there are.
        of: usize,
    },
}

/// What a list may take from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Its place in the mesh.
    Membership,
    /// The encryption of what is sent to it.
    Encryption,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Apply(change) => change.fmt(f),
            Verdict::HoldBack { what: Loss::Membership, from, of } => write!(f, "would remove {from} of {of} peers"),
            Verdict::HoldBack { what: Loss::Encryption, from, of } => {
                write!(f, "would end the encryption of {from} of {of} peers")
            }
        }
    }
}

/// Below this number of peers a list that removes most of them is everyday work.
const GUARDED_FROM: usize = 4;

/// Compares, and holds back what looks like a truncated or mixed-up list unless somebody has `accepted` it.
pub fn judge(old: &NodeList, new: &NodeList, own: &NodeName, accepted: bool) -> Verdict {
    let change = diff(old, new, own);
    let removed = change.removed.len();
    let of = removed + change.changed.len() + change.unchanged_count;
    let losses = [(Loss::Membership, removed), (Loss::Encryption, change.exposed_count)];
    match losses.into_iter().find(|(_, from)| from * 2 > of) {
        Some((what, from)) if !accepted && of >= GUARDED_FROM => Verdict::HoldBack { what, from, of },
        _ => Verdict::Apply(change),
    }
}

/// Walks both lists at once: they are sorted by name.
pub fn diff(old: &NodeList, new: &NodeList, own: &NodeName) -> Change {
    let mut change = Change::default();
    let mut olds = old.nodes.iter().peekable();
    let mut news = new.nodes.iter().peekable();
    loop {
        let order = match (olds.peek(), news.peek()) {
            (Some(o), Some(n)) => o.name.cmp(&n.name),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return change,
        };
        let o = if order.is_le() { olds.next() } else { None };
        let n = if order.is_ge() { news.next() } else { None };
        match (o, n) {
            (Some(node), _) | (_, Some(node)) if node.name == *own => change.own_changed = o != n,
            (Some(o), Some(n)) if o == n => change.unchanged_count += 1,
            (Some(o), Some(n)) => {
                let sealed = Some(Encryption::Wireguard);
                change.exposed_count += usize::from(o.encryption == sealed && n.encryption != sealed);
                change.changed.push(n.name.clone());
            }
            (Some(o), None) => change.removed.push(o.name.clone()),
            (None, Some(n)) => change.added.push(n.name.clone()),
            (None, None) => {}
        }
    }
}

impl Change {
    /// Whether both lists say the same.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty() && !self.own_changed
    }
}

impl fmt::Display for Change {
    /// `added b, c; changed d; 12 unchanged`: names while there are few, then how many.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, names) in [("added", &self.added), ("removed", &self.removed), ("changed", &self.changed)] {
            write_names(f, what, names)?;
        }
        if self.own_changed {
            f.write_str("own entry changed; ")?;
        }
        write!(f, "{} unchanged", self.unchanged_count)
    }
}

fn write_names(f: &mut fmt::Formatter<'_>, what: &str, names: &[NodeName]) -> fmt::Result {
    const SHOWN: usize = 8;
    let Some((first, rest)) = names.split_first() else { return Ok(()) };
    write!(f, "{what} {first}")?;
    for name in rest.iter().take(SHOWN - 1) {
        write!(f, ", {name}")?;
    }
    match names.len().saturating_sub(SHOWN) {
        0 => f.write_str("; "),
        more => write!(f, " and {more} more; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Node;

    fn list(names: &[&str]) -> NodeList {
        let node = |name: &str, i: usize| {
            let name: NodeName = name.trim_end_matches('*').parse().unwrap();
            Node { underlay: vec![([10, 9, 0, i as u8], 8472).into()], ..Node::named(name) }
        };
        // A star moves the node, an address of 200 is nobody else's.
        let nodes = names.iter().map(|n| node(n, if n.ends_with('*') { 200 } else { 1 }));
        let mut nodes: Vec<Node> = nodes.collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        NodeList { nodes }
    }

    fn names(names: &[NodeName]) -> Vec<&str> {
        names.iter().map(NodeName::as_str).collect()
    }

    fn own() -> NodeName {
        "own".parse().unwrap()
    }

    #[test]
    fn each_kind_of_difference_is_told() {
        let change = diff(&list(&["a", "b", "c", "own"]), &list(&["b*", "c", "d", "own"]), &own());
        assert_eq!(names(&change.added), ["d"]);
        assert_eq!(names(&change.removed), ["a"]);
        assert_eq!(names(&change.changed), ["b"]);
        assert_eq!((change.unchanged_count, change.own_changed), (1, false));
        assert_eq!(change.to_string(), "added d; removed a; changed b; 1 unchanged");
        assert!(diff(&list(&["a", "own"]), &list(&["a", "own"]), &own()).is_empty());
    }

    #[test]
    fn the_own_entry_is_no_peer() {
        let change = diff(&list(&["a", "own"]), &list(&["a", "own*"]), &own());
        assert!(change.own_changed && change.changed.is_empty() && !change.is_empty());
        assert_eq!(change.to_string(), "own entry changed; 1 unchanged");
        assert!(diff(&list(&[]), &list(&["own"]), &own()).added.is_empty());
        assert!(diff(&list(&["own"]), &list(&[]), &own()).own_changed);
    }

    #[test]
    fn many_names_become_a_number() {
        let many = list(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]);
        assert_eq!(diff(&list(&[]), &many, &own()).to_string(), "added a, b, c, d, e, f, g, h and 2 more; 0 unchanged");
    }

    #[test]
    fn a_list_that_removes_more_than_half_of_four_is_held_back() {
        let four = list(&["a", "b", "c", "d", "own"]);
        let held = judge(&four, &list(&["a", "own"]), &own(), false);
        assert_eq!(held, Verdict::HoldBack { what: Loss::Membership, from: 3, of: 4 });
        let emptied = judge(&four, &list(&["own"]), &own(), false);
        assert_eq!(emptied, Verdict::HoldBack { what: Loss::Membership, from: 4, of: 4 });
        // New ones do not make up for those that go.
        let swapped = judge(&four, &list(&["a", "x", "y", "z", "own"]), &own(), false);
        assert_eq!(swapped, Verdict::HoldBack { what: Loss::Membership, from: 3, of: 4 });

        assert!(matches!(judge(&four, &list(&["a", "own"]), &own(), true), Verdict::Apply(_)), "accepted");
        assert!(matches!(judge(&four, &list(&["a", "b", "own"]), &own(), false), Verdict::Apply(_)), "exactly half");
        let three = list(&["a", "b", "c", "own"]);
        assert!(matches!(judge(&three, &list(&["own"]), &own(), false), Verdict::Apply(_)), "only three");
        assert!(matches!(judge(&list(&[]), &four, &own(), false), Verdict::Apply(_)), "the first list");
    }

    #[test]
    fn a_list_that_ends_the_encryption_of_more_than_half_of_four_is_held_back() {
        let with = |names: &[&str], sealed: usize| {
            let mut list = list(names);
            for (at, node) in list.nodes.iter_mut().enumerate() {
                node.encryption = Some(if at < sealed { Encryption::Wireguard } else { Encryption::None });
            }
            list
        };
        let names = ["a", "b", "c", "d", "own"];
        let held = judge(&with(&names, 5), &with(&names, 1), &own(), false);
        assert_eq!(held, Verdict::HoldBack { what: Loss::Encryption, from: 3, of: 4 });
        assert_eq!(held.to_string(), "would end the encryption of 3 of 4 peers");
        assert!(matches!(judge(&with(&names, 5), &with(&names, 2), &own(), false), Verdict::Apply(_)), "exactly half");
        assert!(matches!(judge(&with(&names, 5), &with(&names, 1), &own(), true), Verdict::Apply(_)), "accepted");
        assert!(matches!(judge(&with(&names, 1), &with(&names, 5), &own(), false), Verdict::Apply(_)), "begun");
    }
}
