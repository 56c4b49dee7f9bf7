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
//! | [`io`], [`sys`] | descriptors, threads, time; system calls |
//! | [`host`] | device, addresses, routes and clashes through netlink |
//! | [`admin`] | the unix socket and what it shows |
//! | [`daemon`] | builds, connects and stops everything |
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
pub mod engine;
pub mod host;
pub mod io;
pub mod node;
pub mod sys;
pub mod wire;
