//! The packet engine: bytes in, bytes and decisions out.
//!
//! [`outbound`] is the journey TUN → UDP, [`inbound`] is UDP → TUN; each is told in order in its file. Both work on
//! buffers that the caller owns and name what is to be sent as places in them; in the clear nothing but the segments of a
//! super-packet is copied. The engine knows no socket, no clock and no thread; whoever drives it hands it the time.

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod big_tcp;
pub mod classify;
pub mod coalesce;
pub mod drop;
pub mod inbound;
pub mod outbound;
mod same_flow;
pub mod segment;
pub mod stats;
pub mod tables;
#[doc(hidden)]
pub mod testing;
pub mod tunnel;
pub mod tx_batch;
pub mod vigil;
