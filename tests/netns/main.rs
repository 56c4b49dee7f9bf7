//! Whole-node stories: the real `meshd` and `meshctl`, in network namespaces.
//!
//! ```text
//!        node a                 switch                 node b
//!   ┌──────────────┐        ┌────────────┐        ┌──────────────┐
//!   │ ul0 10.9.0.1 ├────────┤    br0     ├────────┤ 10.9.0.2 ul0 │   fd09::N as well
//!   │ mesh0        │        │ 10.9.0.254 │        │        mesh0 │
//!   │  10.42.1.1   │        └────────────┘        │   10.42.2.1  │   fd42:0:0:N::1
//!   │ cni0         │    the default route leads   │         cni0 │
//!   └──┬───────────┘    here: what leaks is seen  └───────────┬──┘
//!   ┌──┴───────────┐                              ┌───────────┴──┐
//!   │ eth0         │                              │         eth0 │   a pod, where the story has pods
//!   │  10.42.1.2   │                              │   10.42.2.2  │   (then mesh0 has .0, cni0 .1)
//!   └──────────────┘                              └──────────────┘
//! ```
//!
//! Everything is made by the test, named after its process, and removed when it ends, also by a panic. Without root,
//! /dev/net/tun or a tool that is needed a story prints SKIPPED and the reason. Nothing is measured here: waiting ends
//! when what is waited for is so.

mod advice;
mod authentic;
mod big;
mod captured;
mod carried;
mod clock;
mod cni;
mod doctor;
mod encrypted;
mod figures;
mod flood;
mod foreign;
mod frr;
mod full;
mod hostile;
mod joined;
mod kernel_vxlan;
mod left;
mod lifecycle;
mod lives;
mod mesh;
mod moved;
mod mtu;
mod namespace;
mod nested;
mod order;
mod path;
mod pods;
mod preshared;
mod quorum;
mod refused;
mod reload;
mod rights;
mod rings;
mod scale;
mod servers;
mod shaken;
mod steered;
mod storms;
mod super_packets;
mod tested;
mod told;
mod top;
mod traffic;
mod uncut;
mod why;
