//! SIOCETHTOOL: which offloads a network device has switched on (linux/ethtool.h).

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use socket2::{Domain, Socket, Type};

use super::{check, ifreq};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const GSTRINGS: u32 = 0x1b;
const GSSET_INFO: u32 = 0x37;
const GFEATURES: u32 = 0x3a;
const SS_FEATURES: u32 = 4;
/// Bytes of a feature's name, filled up with zeros.
const NAME: usize = 32;
/// More features than any kernel has.
const MOST: usize = 1024;

/// `struct ethtool_sset_info` with one count.
#[repr(C)]
struct SsetInfo {
    cmd: u32,
    reserved: u32,
    mask: u64,
    count: u32,
}

/// `struct ethtool_gstrings`
#[repr(C)]
struct Strings {
    cmd: u32,
    set: u32,
    len: u32,
    names: [[u8; NAME]; MOST],
}

/// `struct ethtool_get_features_block`
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Block {
    available: u32,
    requested: u32,
    active: u32,
    never_changed: u32,
}

/// `struct ethtool_gfeatures`
#[repr(C)]
struct Features {
    cmd: u32,
    size: u32,
    blocks: [Block; MOST / 32],
}

/// The features that are on, by the names that `ethtool -k` uses.
pub fn active(ifname: &str) -> io::Result<Vec<String>> {
    let socket =
        Socket::new(Domain::IPV4, Type::DGRAM, None).or_else(|_| Socket::new(Domain::IPV6, Type::DGRAM, None))?;
    let mut info = SsetInfo { cmd: GSSET_INFO, reserved: 0, mask: 1 << SS_FEATURES, count: 0 };
    ask(&socket, ifname, &mut info)?;
    let count = info.count as usize;
    if count > MOST {
        // the driver would write all of them, however many it was told that there is room for
        return Err(io::Error::other(format!("{count} features are more than the {MOST} that were to be expected")));
    }
    let mut strings =
        Box::new(Strings { cmd: GSTRINGS, set: SS_FEATURES, len: count as u32, names: [[0; NAME]; MOST] });
    ask(&socket, ifname, &mut *strings)?;
    let blocks = count.div_ceil(32);
    let mut features = Features { cmd: GFEATURES, size: blocks as u32, blocks: [Block::default(); MOST / 32] };
    ask(&socket, ifname, &mut features)?;
    let is_active =
        |number: usize| features.blocks.get(number / 32).is_some_and(|block| block.active & 1 << (number % 32) != 0);
    let name = |bytes: &[u8; NAME]| {
        let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    };
    let names = strings.names.iter().take(count).enumerate();
    Ok(names.filter(|(number, _)| is_active(*number)).map(|(_, bytes)| name(bytes)).collect())
}

/// Hands `request` to the driver of a device, which answers in the same place.
fn ask<T>(socket: &Socket, ifname: &str, request: &mut T) -> io::Result<()> {
    let mut ifreq = ifreq(ifname)?;
    debug_assert!(size_of::<T>() >= size_of::<SsetInfo>());
    ifreq.ifr_ifru.ifru_data = std::ptr::from_mut(request).cast();
    // SAFETY: SIOCETHTOOL reads and writes what ifru_data points to, which lives on for the call. The three requests of this
    // module have room for as much as is written: one count, that many names (which is at most MOST, or they are not asked
    // for; features are the same for all of a kernel's life), and `size` blocks, at most MOST / 32.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut ifreq) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_features_and_what_is_not_there_has_none() {
        let active = active("lo").unwrap();
        assert!(active.iter().any(|name| name == "tx-scatter-gather"), "{active:?}");
        assert!(!active.iter().any(|name| name == "tx-vlan-stag-hw-insert"), "it never has that: {active:?}");
        assert!(super::active("no-such-dev0").is_err());
    }
}
