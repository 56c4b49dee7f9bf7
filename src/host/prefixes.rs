//! Sets of prefixes: their exact union, and whether one of them covers another.
//!
//! Pure; owns no more than arithmetic on prefixes.

use ipnet::IpNet;

/// The smallest list of prefixes that covers exactly the same addresses: host bits cleared, what is covered by another
/// left out, neighbours joined; sorted, IPv4 first. O(n log n).
pub fn union(nets: impl Iterator<Item = IpNet>) -> Vec<IpNet> {
    IpNet::aggregate(&nets.collect())
}

/// A union that answers "does one of these prefixes contain that one?" in O(log n).
#[derive(Debug, Clone, Default)]
pub(super) struct PrefixSet(Vec<IpNet>);

impl PrefixSet {
    /// The set of all addresses in `nets`.
    pub(super) fn new(nets: &[IpNet]) -> Self {
        PrefixSet(union(nets.iter().copied()))
    }

    /// The prefix of the union that contains all of `net`.
    pub(super) fn covering(&self, net: IpNet) -> Option<IpNet> {
        // The prefixes are disjoint and sorted, so that only the last one that does not start behind `net` can hold it.
        let after = self.0.partition_point(|p| p.network() <= net.network());
        let candidate = *self.0.get(after.checked_sub(1)?)?;
        candidate.contains(&net).then_some(candidate)
    }

    /// The prefixes of the union.
    pub(super) fn iter(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    fn nets(text: &[&str]) -> Vec<IpNet> {
        text.iter().map(|t| t.parse().unwrap()).collect()
    }

    fn joined(text: &[&str]) -> Vec<IpNet> {
        union(nets(text).into_iter())
    }

    #[test]
    fn neighbours_join_and_strangers_do_not() {
        assert_eq!(joined(&["10.42.1.0/24", "10.42.0.0/24"]), nets(&["10.42.0.0/23"]));
        assert_eq!(joined(&["10.42.1.0/24", "10.42.2.0/24"]), nets(&["10.42.1.0/24", "10.42.2.0/24"]));
        assert_eq!(joined(&["fd00:1::/64", "fd00:1:0:1::/64"]), nets(&["fd00:1::/63"]));
    }

    #[test]
    fn what_is_covered_or_doubled_is_left_out() {
        assert_eq!(joined(&["10.42.1.0/24", "10.42.0.0/16", "10.42.1.0/24"]), nets(&["10.42.0.0/16"]));
        assert_eq!(joined(&["10.42.1.7/24"]), nets(&["10.42.1.0/24"]));
        assert_eq!(joined(&[]), nets(&[]));
    }

    #[test]
    fn families_never_mix() {
        assert_eq!(joined(&["::a2a:0/112", "10.42.0.0/16"]), nets(&["10.42.0.0/16", "::a2a:0/112"]));
    }

    #[test]
    fn the_ends_of_the_address_space_are_safe() {
        assert_eq!(joined(&["0.0.0.0/1", "128.0.0.0/1"]), nets(&["0.0.0.0/0"]));
        assert_eq!(joined(&["255.255.255.255/32", "255.255.255.254/32"]), nets(&["255.255.255.254/31"]));
        assert_eq!(joined(&["::/1", "8000::/1"]), nets(&["::/0"]));
    }

    #[test]
    fn a_hundred_thousand_subnets_take_no_time() {
        let all = (0..100_000_u32).map(|i| IpNet::new(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + (i << 6))), 26).unwrap());
        let start = Instant::now();
        let whole = union(all.rev());
        let took = start.elapsed();
        let size: u64 = whole.iter().map(|n| 1_u64 << (32 - n.prefix_len())).sum();
        assert_eq!(size, 100_000 * 64);
        assert!(whole.len() < 17, "{whole:?}");
        assert!(took < Duration::from_secs(1), "{took:?}");
    }

    #[test]
    fn covering_means_equal_or_shorter() {
        let set = PrefixSet::new(&nets(&["10.42.0.0/16", "10.44.1.0/24", "fd00::/48"]));
        let covering = |text: &str| set.covering(text.parse().unwrap()).map(|p| p.to_string());
        assert_eq!(covering("10.42.0.0/16").as_deref(), Some("10.42.0.0/16"));
        assert_eq!(covering("10.42.255.255/32").as_deref(), Some("10.42.0.0/16"));
        assert_eq!(covering("10.44.1.128/25").as_deref(), Some("10.44.1.0/24"));
        assert_eq!(covering("fd00::1/128").as_deref(), Some("fd00::/48"));
        for outside in ["10.0.0.0/8", "0.0.0.0/0", "10.43.0.0/24", "10.44.0.0/23", "::/0", "fd01::/64", "1.1.1.1/32"] {
            assert_eq!(covering(outside), None, "{outside}");
        }
    }

    proptest! {
        // Eight bits of address, so that every address can be looked at.
        #[test]
        fn a_union_covers_exactly_what_its_parts_cover(parts in prop::collection::vec((any::<u8>(), 24_u8..=32), 0..20)) {
            let parts: Vec<IpNet> = parts
                .into_iter()
                .map(|(host, len)| IpNet::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, host)), len).unwrap())
                .collect();
            let whole = union(parts.iter().copied());
            for host in 0..=255_u8 {
                let ip = IpAddr::V4(Ipv4Addr::new(10, 0, 0, host));
                prop_assert_eq!(whole.iter().filter(|n| n.contains(&ip)).count(), usize::from(parts.iter().any(|n| n.contains(&ip))));
            }
            for pair in whole.windows(2) {
                prop_assert!(pair[0].network() < pair[1].network());
                prop_assert!(pair[0].supernet() != pair[1].supernet() || pair[0].prefix_len() != pair[1].prefix_len(), "{:?} could be joined", pair);
            }
        }
    }
}
