//! meshd: a user-space VXLAN overlay network and node-mesh data plane for Linux.

pub mod admin;
pub mod engine;
pub mod io;
pub mod node;
pub mod sys;
pub mod wire;
