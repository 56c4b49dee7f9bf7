//! The shell around the engine: owns descriptors, threads and the time.
//!
//! A [`worker`] thread runs each batch to completion, out of the [queue pairs](pairs) that are its own; `spin` says when it
//! sleeps. [`plain`] is the same engine over tokio and tokio-tun, for where offloads are refused, [`uring`] the same
//! worker over io_uring. What a packet means is `engine`'s.

pub mod pairs;
pub mod plain;
mod spin;
pub mod tap;
pub(crate) mod tcp_ends;
pub mod tun;
pub mod tunnel_gso;
pub mod udp;
pub mod uring;
pub mod worker;
