use super::*;

use crate::engine::stats::Stats;
use crate::engine::testing::{Facts, payload, udp};

fn datagram(port: u16) -> Vec<u8> {
    Facts { ports: (port, 53), ..udp(false, 1, 2, payload(40)) }.bytes()
}

fn filter() -> Filter {
    Filter { snaplen: 1000, ..Filter::default() }
}

#[test]
fn nobody_looks_until_somebody_does_and_after_the_last() {
    let tap = Tap::default();
    assert!(!tap.is_on());
    tap.capture(0, 1, filter());
    assert!(tap.is_on());
    tap.packet(1, Side::Inner, true, None, &datagram(1));
    let (records, lost) = tap.fetch(2, 1, usize::MAX).unwrap();
    assert_eq!((records.len(), lost, &records[0].bytes), (1, 0, &datagram(1)));
    tap.capture(3, 2, filter());
    assert!(tap.fetch(4, 1, 1).is_none(), "another one took its place");
    tap.end(1);
    assert!(tap.is_on(), "that was not its");
    tap.packet(4 + LEASE_US, Side::Inner, true, None, &datagram(1));
    assert!(!tap.is_on(), "who does not come back is gone");
    tap.record(2);
    assert!(tap.is_on());
    tap.record(0);
    assert!(!tap.is_on());
}

#[test]
fn memory_is_bounded_and_what_does_not_fit_is_counted() {
    let tap = Tap::default();
    tap.capture(0, 1, Filter { snaplen: 65_535, ..filter() });
    let packet = udp(false, 1, 2, payload(60_000)).bytes();
    let fits = WAITING_BYTES / packet.len() + 1;
    (0..fits + 7).for_each(|_| tap.packet(0, Side::Inner, true, None, &packet));
    let mut got = 0;
    while let (records, 7) = tap.fetch(0, 1, 1 << 20).unwrap() {
        if records.is_empty() {
            break;
        }
        got += records.len();
    }
    assert_eq!(got, fits);
    tap.record(3);
    (0..10).for_each(|port| tap.packet(0, Side::Inner, true, None, &datagram(port)));
    let (most, kept) = tap.recorded();
    assert_eq!((most, kept.len()), (3, 3));
    assert_eq!(kept[2].bytes, datagram(9));
    tap.packet(0, Side::Inner, true, Some(Drop::NoRoute), &packet);
    let (_, kept) = tap.recorded();
    assert_eq!(
        (kept[2].bytes.len(), kept[2].len as usize, kept[2].dropped),
        (HEADERS, packet.len(), Some(Drop::NoRoute))
    );
}

#[test]
fn filters() {
    let packet = datagram(1234);
    let net = |text: &str| vec![text.parse::<IpNet>().unwrap()];
    let ask = |filter: &Filter, dropped| filter.takes(Side::Inner, dropped, &packet);
    for (yes, no) in [
        (Filter { ports: vec![1234, 53], ..filter() }, Filter { ports: vec![1234, 54], ..filter() }),
        (Filter { protocol: Some(17), ..filter() }, Filter { protocol: Some(6), ..filter() }),
        (
            Filter { nets: vec![net("10.42.0.0/16")], ..filter() },
            Filter { nets: vec![net("10.43.0.0/16")], ..filter() },
        ),
        (Filter { side: Some(Side::Inner), ..filter() }, Filter { side: Some(Side::Outer), ..filter() }),
    ] {
        assert!(ask(&yes, None) && !ask(&no, None), "{yes:?} {no:?}");
    }
    let drops = Filter { dropped: true, ..filter() };
    assert!(!ask(&drops, None) && ask(&drops, Some(Drop::NoRoute)));
    // an outer datagram is taken for what it carries
    let ends = ("10.9.0.1:9".parse().unwrap(), "10.9.0.2:8472".parse().unwrap());
    let payload = [&[8, 0, 0, 0, 0, 0, 1, 0][..], &[0; 14], &packet].concat();
    let bytes = outer(ends.0, ends.1, 0, &payload).unwrap();
    let takes = |filter: Filter| filter.takes(Side::Outer, None, &bytes);
    assert!(takes(Filter { ports: vec![1234], ..filter() }) && takes(Filter { ports: vec![8472], ..filter() }));
    assert!(!takes(Filter { ports: vec![77], ..filter() }));
}

#[test]
fn made_up_headers_are_sound() {
    for (from, to) in [("10.9.0.1:9", "10.9.0.2:8472"), ("[fd00::1]:9", "[fd00::2]:8472")] {
        let bytes = outer(from.parse().unwrap(), to.parse().unwrap(), 2, b"payload").unwrap();
        crate::engine::testing::assert_sound(&bytes);
    }
}

#[test]
fn a_reason_is_the_counter_that_moved() {
    let stats = Stats::new(1);
    let worker = stats.worker(0).unwrap();
    worker.drop(Drop::NoRoute, 5);
    let mut tally = Tally::new(worker);
    assert_eq!(tally.news(), None);
    worker.drop(Drop::PacketTooBig, 44);
    assert_eq!((tally.news(), tally.news()), (Some(Drop::PacketTooBig), None));
}
