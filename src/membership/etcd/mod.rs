//! The etcd that servers run themselves: one member beside each server, as its child.
//!
//! Owns the member's files, process and certificates, how further servers become members, and how those go whose server
//! is no member of the cluster any more. What is kept in it, [`registry`](super::registry) knows; how it is asked,
//! [`store::etcd`](super::store::etcd).
//!
//! The members trust a certificate authority of their own, not the cluster's: a node's certificate opens no datastore.

pub mod join;
pub mod kept;
pub mod managed;
pub mod members;
mod outlook;
mod process;
pub mod tools;

pub use self::kept::{Kept, KeptError, Phase};
pub use self::managed::{Managed, ManagedError};
pub use self::members::Members;
pub use self::outlook::Outlook;

/// Where members are asked.
pub const CLIENT_PORT: u16 = 2379;
/// Where members talk to each other.
pub const PEER_PORT: u16 = 2380;
