//! Devices' settings under `/proc/sys/net`, which follows the thread's network namespace.
//!
//! Owns which settings a device gets and why; does not know whether it exists.

use std::fs;
use std::path::{Path, PathBuf};

/// How far IPv6 can be used on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ipv6 {
    /// As usual.
    On,
    /// The kernel has none (`ipv6.disable=1`).
    NotInKernel,
    /// Switched off by `disable_ipv6`.
    Disabled,
    /// The device has none: its MTU is below 1280.
    NotOnDevice,
}

/// Looks how far IPv6 can be used on the device.
pub(super) fn ipv6(tun: &str) -> Ipv6 {
    if !Path::new("/proc/sys/net/ipv6").exists() {
        return Ipv6::NotInKernel;
    }
    match fs::read_to_string(path("ipv6", tun, "disable_ipv6")) {
        Ok(value) if value.trim() == "0" => Ipv6::On,
        Ok(_) => Ipv6::Disabled,
        Err(_) => Ipv6::NotOnDevice,
    }
}

/// What became of the settings.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// `net.ipv4.conf.mesh0.rp_filter = 2` for each that was changed.
    pub(super) changed: Vec<String>,
    /// What could not be set, and why.
    pub(super) failed: Vec<String>,
}

/// Sets what is not yet as it should be.
pub(super) fn apply(device: &str, settings: &[(&str, &str, &str)]) -> Applied {
    let mut applied = Applied::default();
    for (family, key, value) in settings {
        let file = path(family, device, key);
        // IPv6 may be off, and an old kernel may lack a setting: then there is nothing to set.
        let Ok(now) = fs::read_to_string(&file) else { continue };
        if now.trim() == *value {
            continue;
        }
        let name = format!("net.{family}.conf.{device}.{key} = {value}");
        match fs::write(&file, value) {
            Ok(()) => applied.changed.push(name),
            Err(e) => applied.failed.push(format!("cannot set {name}: {e}")),
        }
    }
    applied
}

fn path(family: &str, tun: &str, key: &str) -> PathBuf {
    ["/proc/sys/net", family, "conf", tun, key].iter().collect()
}

/// Of the overlay's device.
pub(super) const OVERLAY: &[(&str, &str, &str)] = &[
    // A packet that would leave through the device it came from has no better way that a redirect could name.
    ("ipv4", "send_redirects", "0"),
    // Loose: a node answers pods from its underlay address, whose route does not point to the overlay. The kernel takes
    // the greater of this and `all`, so that a strict `all` (1) does not win.
    ("ipv4", "rp_filter", "2"),
    // Routes come from the node list alone.
    ("ipv4", "accept_redirects", "0"),
    ("ipv6", "accept_redirects", "0"),
    ("ipv6", "accept_ra", "0"),
    // None: a link-local address would bring router solicitations into an overlay that has no links.
    ("ipv6", "addr_gen_mode", "1"),
];

/// Of a device into which meshd writes what leaves this host.
pub(super) const OUTLET: &[(&str, &str, &str)] = &[
    // The program in its ingress hook asks for routes as a router does, which the device must be allowed to be.
    ("ipv4", "forwarding", "1"),
    ("ipv6", "forwarding", "1"),
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "addr_gen_mode", "1"),
];
