//! meshd: a user-space VXLAN overlay network and node-mesh data plane for Linux.
//!
//! Modules in the order in which data flows:
//!
//! | module | owns |
//! |---|---|
//! | [`config`], [`node`] | text → valid types; what a node is |
//! | [`control`] | where node lists come from, what a new one changes, what it means for this node |
//! | [`wire`] | what bytes mean |
//! | [`engine`] | the two journeys of a packet |
//! | [`health`] | whether peers are alive |
//! | [`io`], [`sys`] | descriptors, threads, time; system calls |
//! | [`host`] | device, addresses, routes and clashes through netlink |
//! | [`membership`] | who is a member: tokens, keys, node records (`mesh-sidecar`) |
//! | [`admin`] | the unix socket and what it shows |
//! | [`why`] | the whole way of a packet, worked out for whoever asks |
//! | [`probe`] | ICMP echoes through the mesh (`meshctl ping`) |
//! | [`top`] | the mesh as it lives, on a terminal (`meshctl top`) |
//! | [`pcap`] | captured packets as a file (`meshctl capture`) |
//! | [`doctor`] | what is wrong with this machine as a node, and what mends it |
//! | [`selftest`] | what kernel, offloads and permissions allow here, tried out |
//! | [`daemon`] | builds, connects and stops everything |
//! | [`limits`] | what the system allows this process |
//! | [`manual`] | man pages and shell completions, for packages |
//!
//! Invariants, each held by a test or a lint:
//!
//! - Arrows point one way: `wire ← engine ← io`. `wire`, `engine`, `node` and the pure parts of `control` and `config` know
//!   no socket, no clock, no thread (`tests/architecture.rs`).
//! - Only [`sys`] is unsafe, and each block there argues for itself.
//! - Bytes from the network never panic: no indexing and no `unwrap` in `wire` and `engine`.
//! - A packet on its way meets no allocation, lock, channel or log line (`tests/zero_alloc.rs`).
//! - A discarded packet has a named reason: what went in is what came out plus the drops.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod admin;
pub mod config;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod engine;
pub mod health;
pub mod host;
pub mod io;
pub mod key;
pub mod limits;
pub mod manual;
pub mod membership;
pub mod node;
pub mod pcap;
pub mod probe;
pub mod selftest;
pub mod sys;
pub mod top;
pub mod why;
pub mod wire;
