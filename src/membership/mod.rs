//! What makes a mesh out of machines: who is a member, by which key, with which subnets.
//!
//! Runs in `mesh-sidecar`, a process of its own without capabilities, except for [`link`], [`record`] and
//! [`settings`], which are what it and `meshd` say to each other. Knows nothing of packets.

pub mod address;
pub mod agent;
pub mod api;
pub mod authority;
pub mod client;
pub mod clock;
pub mod etcd;
pub mod files;
pub mod link;
pub mod matrix;
pub mod pake;
pub mod privileges;
pub mod random;
pub mod record;
pub mod registry;
pub mod server;
pub mod settings;
pub mod sidecar;
pub mod store;
pub mod tls;
pub mod token;
