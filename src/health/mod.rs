//! Whether peers are alive, and how long packets to them may be.
//!
//! [`machine`] is BFD itself, [`path`] finds out the path MTU, [`meter`] round trip and loss; [`peer`] is what workers, the engine and the admin socket share of one peer's session. Pure:
//! bytes, time and counters in, packets and verdicts out. Who sends them, and when somebody looks, is `engine::vigil`'s.

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod machine;
pub mod meter;
pub mod path;
pub mod peer;
