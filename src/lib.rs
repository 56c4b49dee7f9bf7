//! meshd: a user-space VXLAN overlay network and node-mesh data plane for Linux.

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
