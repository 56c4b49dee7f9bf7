use super::*;

/// State Up, P, multiplier 6, 1 and 2, 150 ms both ways.
const BYTES: &[u8; LEN] = b"\x21\xe0\x06\x18\x00\x00\x00\x01\x00\x00\x00\x02\x00\x02\x49\xf0\x00\x02\x49\xf0\0\0\0\0";

pub(super) fn control() -> Control {
    Control {
        diagnostic: Diagnostic::EXPIRED,
        state: State::Up,
        poll: true,
        last: false,
        demand: false,
        multiplier: 6,
        mine: 1,
        yours: 2,
        desired_tx_us: 150_000,
        required_rx_us: 150_000,
        required_echo_rx_us: 0,
        sequence: None,
    }
}

fn message() -> Message {
    Message::Control(control())
}

fn changed(at: usize, byte: u8) -> Result<Control, Malformed> {
    let mut bytes = *BYTES;
    bytes[at] = byte;
    Control::parse(&bytes, None)
}

#[test]
fn literal_bytes() {
    assert_eq!(Control::parse(BYTES, None), Ok(control()));
    assert_eq!(&control().bytes(), BYTES);
    let last = Control { last: true, poll: false, demand: true, ..control() };
    assert_eq!(last.bytes()[1], 0xd2);
    assert_eq!(Control::parse(&last.bytes(), None), Ok(last));
}

#[test]
fn what_rfc_5880_says_to_discard_is_discarded() {
    assert_eq!(changed(0, 0x01), Err(Malformed::Version));
    assert_eq!(changed(0, 0x41), Err(Malformed::Version));
    assert_eq!(changed(3, 23), Err(Malformed::Length));
    assert_eq!(changed(3, 25), Err(Malformed::Length), "longer than what carries it");
    assert_eq!(changed(2, 0), Err(Malformed::Multiplier));
    assert_eq!(changed(1, 0xe1), Err(Malformed::Multipoint));
    assert_eq!(changed(7, 0), Err(Malformed::Discriminator));
    assert_eq!(changed(11, 0), Err(Malformed::Discriminator), "up, and does not know us");
    assert_eq!(changed(1, 0xe4), Err(Malformed::NotAuthentic));
    assert_eq!(Control::parse(&BYTES[..23], None), Err(Malformed::Length));
    let mut down = *BYTES;
    (down[1], down[11]) = (0x40, 0);
    assert_eq!(Control::parse(&down, None).map(|c| (c.state, c.yours)), Ok((State::Down, 0)));
    assert!(changed(0, 0x3f).is_ok(), "an unknown diagnostic is no reason");
}

#[test]
fn literal_frame() {
    let mut out = Vec::new();
    let from = ("10.9.0.1".parse().unwrap(), 49152);
    write_frame(&message(), 4095, [2, 0, 0, 0, 0, 7], from, None, &mut out);
    assert_eq!(&out[..22], b"\x08\0\0\0\0\x0f\xff\0\0\0\x5e\0\x52\x02\x02\0\0\0\0\x07\x08\0");
    assert_eq!(&out[22..32], b"\x45\xc0\0\x34\0\0\x40\0\xff\x11");
    assert_eq!(&out[34..42], b"\x0a\x09\0\x01\x7f\0\0\x01");
    assert_eq!(&out[42..48], b"\xc0\0\x0e\xc8\0\x20");
    assert_eq!(&out[50..], BYTES);
    assert!(Sum::default().bytes(&out[22..42]).is_valid());
    assert_eq!(read_frame(&out, None), Ok(("127.0.0.1".parse().unwrap(), message())));
}

#[test]
fn literal_frame_over_ipv6() {
    let mut out = Vec::new();
    let from = ("fd09::1".parse().unwrap(), 49152);
    write_frame(&message(), 0x010203, [2, 0, 0, 0, 0, 7], from, None, &mut out);
    assert_eq!(&out[..22], b"\x08\0\0\0\x01\x02\x03\0\0\0\x5e\0\x52\x02\x02\0\0\0\0\x07\x86\xdd");
    assert_eq!(out[22 + 6..22 + 8], [17, 255], "UDP, hop limit");
    assert_eq!(&out[22 + 24..22 + 40], b"\0\0\0\0\0\0\0\0\0\0\xff\xff\x7f\0\0\x01");
    assert_eq!(read_frame(&out, None), Ok(("::ffff:127.0.0.1".parse().unwrap(), message())));
}

#[test]
fn both_families_come_back_and_nothing_damaged_or_from_afar_does() {
    for (a, b) in [("10.9.0.1", "10.9.0.2"), ("fd00::1", "fd00::2")] {
        let (a, b): (IpAddr, IpAddr) = (a.parse().unwrap(), b.parse().unwrap());
        let mut out = Vec::new();
        write_packet(&message(), Ends { source: a, destination: b, source_port: 50_000 }, None, &mut out);
        assert!(etherparse::SlicedPacket::from_ip(&out).is_ok());
        assert_eq!(read_packet(&out, None), Ok((b, message())));
        for at in 0..out.len() {
            assert_eq!(read_packet(&out[..at], None), Err(Refused::Another));
        }
        let (last, at) = (out.len() - 1, out.len() - LEN - 2);
        out[last] ^= 1;
        assert_eq!(read_packet(&out, None), Err(Refused::Another), "damaged");
        let sum = [out[at], out[at + 1]];
        let pseudo = Packet::parse(&out).unwrap().pseudo_sum((UDP_LEN + LEN) as u16).finish();
        out[at..at + 2].copy_from_slice(&pseudo.map(|byte| !byte));
        assert!(read_packet(&out, None).is_ok(), "left unfinished by a kernel");
        out[at..at + 2].copy_from_slice(&sum);
        out[last] ^= 1;
        let ttl = if a.is_ipv4() { 8 } else { 7 };
        out[ttl] = 254;
        assert_eq!(read_packet(&out, None), Err(Refused::Another), "forwarded");
    }
    let mut out = Vec::new();
    let ends = Ends { source: "10.9.0.1".parse().unwrap(), destination: "fd00::2".parse().unwrap(), source_port: 1 };
    write_packet(&message(), ends, None, &mut out);
    assert!(out.is_empty());
    assert!(is_loopback("127.3.2.1".parse().unwrap()) && is_loopback("::ffff:127.0.0.1".parse().unwrap()));
    assert!(!is_loopback("10.9.0.1".parse().unwrap()) && !is_loopback("fd00::1".parse().unwrap()));
}

#[test]
fn a_probe_has_the_size_that_it_says() {
    let echo = Echo { answer: false, yours: 7, number: 9, size: 0 };
    for (a, b) in [("10.9.0.1", "10.9.0.2"), ("fd00::1", "fd00::2")] {
        let ends = Ends { source: a.parse().unwrap(), destination: b.parse().unwrap(), source_port: 50_000 };
        for size in [0, 60, 100, 1450, 8950] {
            let mut out = Vec::new();
            write_packet(&Message::Echo(echo, size), ends, None, &mut out);
            assert!(etherparse::SlicedPacket::from_ip(&out).is_ok());
            let least = if a.contains(':') { 72 } else { 52 };
            assert_eq!(out.len(), usize::from(size).max(least));
            let length = out.len() as u16;
            assert_eq!(read_packet(&out, None), Ok((ends.destination, Message::Echo(echo, length))));
        }
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..120)) {
        _ = Control::parse(&bytes, None);
        _ = read_packet(&bytes, None);
        _ = read_frame(&bytes, None);
    }
}
