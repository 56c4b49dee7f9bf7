//! The admin socket: what a running meshd tells about itself, and what it lets an administrator change.
//!
//! Owns the words of the unix socket (`protocol`), its file (`socket`), both ends (`server`, `client`), and how answers
//! look to a person (`render`, `reasons`, `units`). It does not know the engine, the node list or the host: whatever
//! implements [`server::Mesh`] hands over plain views.

pub mod client;
pub mod protocol;
pub mod reasons;
pub mod render;
pub mod server;
pub mod socket;
pub mod units;

/// Where meshd listens unless its configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/meshd/meshd.sock";
