//! The address space of the cluster: which subnet is whose, and which comes next. Pure.
//!
//! The lowest free subnet is next, as people expect; single addresses for control-only servers come from the other end.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::membership::settings::MaskSizes;

/// What the cluster hands out, and what is taken of it.
#[derive(Debug, Clone)]
pub(crate) struct Space {
    pools: Vec<Pool>,
    /// First address → last address, by family; no two overlap.
    taken: [BTreeMap<u128, u128>; 2],
}

#[derive(Debug, Clone)]
struct Pool {
    cidr: IpNet,
    mask: u8,
    /// Below this nothing is free.
    next: u128,
}

/// A `cluster-cidr` that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSpace {
    /// None at all.
    #[error("`cluster-cidr` is empty; give an IPv4 or an IPv6 prefix, or one of each")]
    Empty,
    /// Two of a family.
    #[error("`cluster-cidr` has two prefixes of one family; give one IPv4 and one IPv6 prefix at most")]
    Twice,
    /// The node size does not fit.
    #[error(
        "`node-cidr-mask-size` {mask} does not fit {cidr}: it must be longer than the cluster's prefix and leave two addresses"
    )]
    Mask {
        /// The cluster's prefix.
        cidr: IpNet,
        /// The size.
        mask: u8,
    },
}

/// Nothing is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exhausted {
    pub(crate) cidr: IpNet,
    pub(crate) mask: u8,
    pub(crate) used: usize,
}

impl Space {
    pub(crate) fn new(cidrs: &[IpNet], masks: MaskSizes) -> Result<Self, BadSpace> {
        let mut pools: Vec<Pool> = Vec::new();
        for cidr in cidrs {
            let cidr = cidr.trunc();
            let mask = if family(&cidr) == 0 { masks.v4 } else { masks.v6 };
            if mask == 0 || mask < cidr.prefix_len() || mask >= cidr.max_prefix_len() {
                return Err(BadSpace::Mask { cidr, mask });
            }
            if pools.iter().any(|pool| family(&pool.cidr) == family(&cidr)) {
                return Err(BadSpace::Twice);
            }
            pools.push(Pool { next: first(&cidr), cidr, mask });
        }
        if pools.is_empty() { Err(BadSpace::Empty) } else { Ok(Space { pools, taken: Default::default() }) }
    }

    /// Whether an address belongs to the cluster's prefixes.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        self.pools.iter().any(|pool| pool.cidr.contains(&address))
    }

    /// Whether any of it is taken.
    pub(crate) fn is_taken(&self, net: &IpNet) -> bool {
        self.blocker(family(net), first(net), last(net)).is_some()
    }

    /// Takes a prefix; one that is taken stays whose it was.
    pub(crate) fn take(&mut self, net: &IpNet) {
        if !self.is_taken(net) {
            self.taken[family(net)].insert(first(net), last(net));
        }
    }

    /// Gives a prefix back.
    pub(crate) fn free(&mut self, net: &IpNet) {
        let start = first(net);
        if self.taken[family(net)].get(&start) == Some(&last(net)) {
            self.taken[family(net)].remove(&start);
            for pool in self.pools.iter_mut().filter(|pool| family(&pool.cidr) == family(net)) {
                pool.next = pool.next.min(start.max(first(&pool.cidr)));
            }
        }
    }

    /// The next subnet of each family. Takes nothing yet; remembers how far it looked.
    pub(crate) fn next(&mut self) -> Result<Vec<IpNet>, Exhausted> {
        let mut nets = Vec::new();
        for at in 0..self.pools.len() {
            let Pool { cidr, mask, next } = self.pools[at].clone();
            let size = size(&cidr, mask);
            let mut start = next / size * size;
            let found = loop {
                let Some(end) = start.checked_add(size - 1).filter(|end| *end <= last(&cidr)) else { break None };
                match self.blocker(family(&cidr), start, end) {
                    None => break Some(start),
                    // Behind what is in the way, at the next multiple of the size.
                    Some(busy) => match (busy / size + 1).checked_mul(size) {
                        Some(behind) => start = behind,
                        None => break None,
                    },
                }
            };
            let Some(start) = found else {
                let used = self.taken[family(&cidr)].range(first(&cidr)..=last(&cidr)).count();
                return Err(Exhausted { cidr, mask, used });
            };
            self.pools[at].next = start;
            nets.push(net(&cidr, start, mask));
        }
        Ok(nets)
    }

    /// One address of each family, out of the last subnet that holds nothing but such.
    pub(crate) fn next_single(&self) -> Result<Vec<IpNet>, Exhausted> {
        let mut nets = Vec::new();
        for Pool { cidr, mask, .. } in &self.pools {
            let size = size(cidr, *mask);
            let mut block = last(cidr) - (size - 1);
            let found = 'found: loop {
                let whole = self.taken[family(cidr)].get(&block).is_some_and(|end| *end != block);
                if !whole {
                    // The first and the last address of a subnet mean something to many programs.
                    for address in block + 1..block + size.min(1 << 16) - 1 {
                        if self.blocker(family(cidr), address, address).is_none() {
                            break 'found Some(address);
                        }
                    }
                }
                match block.checked_sub(size).filter(|below| *below >= first(cidr)) {
                    Some(below) => block = below,
                    None => break None,
                }
            };
            let used = || self.taken[family(cidr)].range(first(cidr)..=last(cidr)).count();
            let address = found.ok_or_else(|| Exhausted { cidr: *cidr, mask: cidr.max_prefix_len(), used: used() })?;
            nets.push(net(cidr, address, cidr.max_prefix_len()));
        }
        Ok(nets)
    }

    /// The last address of something that is taken between the two.
    fn blocker(&self, family: usize, start: u128, end: u128) -> Option<u128> {
        self.taken[family].range(..=end).next_back().map(|(_, last)| *last).filter(|last| *last >= start)
    }
}

/// How many addresses a subnet has.
fn size(cidr: &IpNet, mask: u8) -> u128 {
    1 << (cidr.max_prefix_len() - mask)
}

fn family(net: &IpNet) -> usize {
    usize::from(net.addr().is_ipv6())
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn first(net: &IpNet) -> u128 {
    number(net.network())
}

fn last(net: &IpNet) -> u128 {
    number(net.broadcast())
}

fn net(like: &IpNet, start: u128, mask: u8) -> IpNet {
    match like {
        IpNet::V4(_) => Ipv4Net::new_assert(Ipv4Addr::from(start as u32), mask).into(),
        IpNet::V6(_) => Ipv6Net::new_assert(Ipv6Addr::from(start), mask).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    fn space(cidrs: &[&str], v4: u8, v6: u8) -> Space {
        Space::new(&nets(cidrs), MaskSizes { v4, v6 }).unwrap()
    }

    fn take_next(space: &mut Space) -> Vec<String> {
        let next = space.next().unwrap();
        next.iter().for_each(|net| space.take(net));
        next.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_lowest_free_one_is_next_in_each_family() {
        let mut space = space(&["10.42.0.0/16", "fd00:42::/48"], 24, 64);
        assert_eq!(take_next(&mut space), ["10.42.0.0/24", "fd00:42::/64"]);
        assert_eq!(take_next(&mut space), ["10.42.1.0/24", "fd00:42:0:1::/64"]);
        assert_eq!(take_next(&mut space), ["10.42.2.0/24", "fd00:42:0:2::/64"]);
        space.free(&"10.42.1.0/24".parse().unwrap());
        assert_eq!(take_next(&mut space), ["10.42.1.0/24", "fd00:42:0:3::/64"]);
    }

    #[test]
    fn it_goes_round_what_others_have_and_ends() {
        let mut space = space(&["10.0.0.0/22"], 24, 64);
        nets(&["10.0.0.128/25", "10.0.2.7/32"]).iter().for_each(|net| space.take(net));
        assert!(space.is_taken(&"10.0.0.0/16".parse().unwrap()) && !space.is_taken(&"10.0.1.0/24".parse().unwrap()));
        assert_eq!(take_next(&mut space), ["10.0.1.0/24"]);
        assert_eq!(take_next(&mut space), ["10.0.3.0/24"]);
        assert_eq!(space.next(), Err(Exhausted { cidr: "10.0.0.0/22".parse().unwrap(), mask: 24, used: 4 }));
        space.free(&"10.0.2.7/32".parse().unwrap());
        assert_eq!(take_next(&mut space), ["10.0.2.0/24"], "positive control");
    }

    #[test]
    fn the_whole_space_is_handed_out_once() {
        let mut space = space(&["255.255.0.0/16"], 28, 64);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..4096 {
            assert!(seen.insert(take_next(&mut space)));
        }
        assert!(space.next().is_err());
        let mut top = self::space(&["ffff:ffff:ffff:ffff::/64"], 24, 127);
        assert_eq!(take_next(&mut top), ["ffff:ffff:ffff:ffff::/127"]);
    }

    #[test]
    fn single_addresses_come_from_the_other_end() {
        let mut space = space(&["10.0.0.0/23", "fd00::/48"], 24, 64);
        let one = space.next_single().unwrap();
        assert_eq!(one, nets(&["10.0.1.1/32", "fd00:0:0:ffff::1/128"]));
        one.iter().for_each(|net| space.take(net));
        assert_eq!(space.next_single().unwrap()[0].to_string(), "10.0.1.2/32");
        assert_eq!(take_next(&mut space)[0], "10.0.0.0/24");
        assert!(space.next().is_err(), "the last subnet has single addresses in it");
        assert!(space.next_single().is_ok());
    }

    #[test]
    fn a_space_that_cannot_be_is_refused() {
        let new = |cidrs: &[&str], v4| Space::new(&nets(cidrs), MaskSizes { v4, v6: 64 }).err();
        assert_eq!(new(&[], 24), Some(BadSpace::Empty));
        assert_eq!(new(&["10.0.0.0/16", "10.1.0.0/16"], 24), Some(BadSpace::Twice));
        assert!(matches!(new(&["10.0.0.0/16"], 15), Some(BadSpace::Mask { .. })));
        assert!(matches!(new(&["10.0.0.0/16"], 32), Some(BadSpace::Mask { .. })));
        assert!(matches!(new(&["10.0.0.0/16"], 99), Some(BadSpace::Mask { .. })));
        assert_eq!(new(&["10.0.0.0/24"], 24), None);
    }
}
