//! What bytes mean: one file a protocol, each a view over bytes that somebody else owns.
//!
//! Views are plain `zerocopy` structs that mirror the header on the wire; constants carry the RFC's names. Nothing here
//! decides anything: whether a packet is welcome, where it goes and what is counted is `engine`'s. No view reads past
//! the slice it was given, and no function here panics on any input.

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod bfd;
pub mod checksum;
pub mod echo;
pub mod ethernet;
pub mod icmp;
pub mod ip;
pub mod survey;
pub mod transport;
pub mod udp;
pub mod vnet_hdr;
pub mod vxlan;
