use super::*;

use proptest::prelude::*;

const PORT: NonZeroU16 = NonZeroU16::new(8472).unwrap();

fn read(text: &str) -> Result<NodeList, NodesError> {
    parse(text.as_bytes(), PORT)
}

fn message(text: &str) -> String {
    read(text).expect_err(text).to_string()
}

/// The message for a second node with this line in it, beside one that has 10.9.0.1 and 10.42.1.0/24.
fn beside_a(line: &str) -> Result<NodeList, NodesError> {
    let underlay = if line.contains("underlay") { "" } else { "    underlay: 10.9.0.2\n" };
    read(&format!(
        "nodes:\n  - name: a\n    underlay: 10.9.0.1\n    subnets: [10.42.1.0/24]\n  - name: b\n{underlay}    {line}\n"
    ))
}

fn refused(line: &str, words: &[&str]) {
    let message = beside_a(line).expect_err(line).to_string();
    for word in words {
        assert!(message.contains(word), "{line}: {message}");
    }
}

#[test]
fn the_documented_example_is_read() {
    let list = read(
        "nodes:\n\
         \x20 - name: b\n\
         \x20   underlay: [10.9.0.2, \"[fd00::2]:9000\"]\n\
         \x20   subnets: [10.42.2.0/24, fd42:2::/64]\n\
         \x20   public-key: AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\
         \x20   encryption: none\n\
         \x20 - name: a\n\
         \x20   underlay: 10.9.0.1            # a comment\n\
         \x20   subnets: [10.42.1.0/24]\n\
         \x20   mac: 0a:58:0a:09:00:01\n",
    )
    .unwrap();
    let names: Vec<&str> = list.nodes.iter().map(|n| n.name.as_str()).collect();
    assert_eq!(names, ["a", "b"], "sorted");
    let (a, b) = (&list.nodes[0], &list.nodes[1]);
    assert_eq!(a.underlay, ["10.9.0.1:8472".parse().unwrap()]);
    assert_eq!(a.mac.to_string(), "0a:58:0a:09:00:01");
    assert_eq!(a.subnets, ["10.42.1.0/24".parse().unwrap()]);
    assert_eq!(b.underlay, ["10.9.0.2:8472".parse().unwrap(), "[fd00::2]:9000".parse().unwrap()]);
    assert_eq!(b.mac, b.name.derived_mac());
    assert_eq!(b.subnets.len(), 2);
}

#[test]
fn the_own_entry_is_found_or_asked_for() {
    let list = read("nodes: [{name: a, underlay: 10.9.0.1}, {name: b, underlay: 10.9.0.2}]").unwrap();
    assert_eq!(own(&list, &"b".parse().unwrap()).unwrap().underlay[0].to_string(), "10.9.0.2:8472");
    let error = own(&list, &"c".parse().unwrap()).unwrap_err().to_string();
    assert_eq!(error, "nodes-file has no entry named c; it has a, b; set node-name or add it");
    let nodes: Vec<String> = (1..=20).map(|i| format!("{{name: n{i:02}, underlay: 10.9.0.{i}}}")).collect();
    let many = read(&format!("nodes: [{}]", nodes.join(", "))).unwrap();
    let error = own(&many, &"c".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("n07, n08 and 12 more;"), "{error}");
}

#[test]
fn a_file_without_nodes_is_refused() {
    for text in ["", "# nothing yet\n", "nodes:\n", "nodes: []\n", "{}\n"] {
        assert!(message(text).contains("no nodes are listed"), "{text:?}: {}", message(text));
    }
    assert_eq!(message("- name: a\n"), "1:1: the file should be `nodes:` and a list below it, but is a list");
    assert_eq!(message("nodes: a\n"), "1:8: `nodes` should be a list of nodes, but is a single value");
    assert_eq!(message("node: []\n"), "1:1: unknown key `node`; did you mean `nodes`?");
    assert!(message("nodes: [a]\n").starts_with("1:9: entry 1 should be a mapping"));
    assert!(message("nodes: [{underlay: 10.9.0.1}]\n").contains("entry 1 has no `name`"));
    assert!(message("nodes: [{name: [a], underlay: 10.9.0.1}]\n").contains("`name` of entry 1 should be a word"));
    assert!(read("nodes: [{name: a, underlay: 10.9.0.1}]\n").is_ok());
}

#[test]
fn keys_and_names_are_checked() {
    refused("subnet: [10.42.2.0/24]", &["7:5:", "unknown key `subnet`; did you mean `subnets`?"]);
    refused("colour: red", &["unknown key `colour`"]);
    refused("mac: {a: b}", &["`mac` of node `b` should be a single value, but is a mapping"]);
    refused("subnets:", &["`subnets` of node `b` should be a value or a list of values, but is nothing"]);
    assert!(message("nodes: [{name: -a, underlay: 10.9.0.1}]").contains("not a node name"));
    assert_eq!(
        message("nodes:\n- {name: a, underlay: 10.9.0.1}\n- {name: a, underlay: 10.9.0.2}\n"),
        "3:3: node `a` is there twice, first in line 2; rename or remove one"
    );
    // Words that YAML would rather have as booleans and numbers.
    let list = read("nodes: [{name: no, underlay: 10.9.0.1}, {name: 1e5, underlay: 10.9.0.2}]").unwrap();
    assert!(list.get(&"no".parse().unwrap()).is_some() && list.get(&"1e5".parse().unwrap()).is_some());
}

#[test]
fn underlays_are_checked() {
    for good in ["10.9.0.2", "10.9.0.2:1", "fd00::1", "'[fd00::1]'", "'[fd00::1]:8472'", "[10.9.0.2, fd00::1]"] {
        assert!(beside_a(&format!("underlay: {good}")).is_ok(), "{good}: {:?}", beside_a(&format!("underlay: {good}")));
    }
    for (bad, why) in [
        ("127.0.0.1", "loopback"),
        ("'::1'", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("'::'", "unspecified"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("fe80::1", "link-local"),
        ("'::ffff:10.9.0.2'", "write it as IPv4"),
        ("'[fd00::1%3]:80'", "zone"),
        ("10.9.0.2:0", "port from 1 to 65535"),
        ("10.9.0.2:65536", "write an IP address"),
        ("10.9.0.2/24", "write an IP address"),
        ("host.example", "write an IP address"),
        ("''", "write an IP address"),
        ("[]", "has no `underlay`"),
        ("[10.9.0.2, 10.9.0.3]", "two underlay addresses of one family, 10.9.0.2 and 10.9.0.3"),
        ("10.9.0.1:9", "nodes `a` and `b` have the same underlay address 10.9.0.1"),
        ("10.42.1.7", "underlay address 10.42.1.7 lies in subnet 10.42.1.0/24 of node `a`"),
    ] {
        refused(&format!("underlay: {bad}"), &[why]);
    }
    assert!(message("nodes: [{name: a}]").contains("node `a` has no `underlay`"));
    refused("underlay: [fd00::1]:8472", &["put an address in brackets into quotes: `\"[fd00::1]:8472\"`"]);
    refused("underlay: fd00::1\n    subnets: [fd00::/64]", &["lies in subnet fd00::/64 of node `b`"]);
}

#[test]
fn subnets_are_checked() {
    for good in ["[]", "10.42.2.0/24", "[10.42.2.0/24, 10.42.3.0/24, fd42::/64]", "[10.42.0.255/32]", "[10.42.2.0/23]"]
    {
        assert!(beside_a(&format!("subnets: {good}")).is_ok(), "{good}");
    }
    for (bad, why) in [
        ("[10.42.2.1/24]", "write `10.42.2.0/24`"),
        ("[10.42.2.1]", "write `10.42.2.1/32`"),
        ("[fd42::1]", "write `fd42::1/128`"),
        ("[10.42.2.0/33]", "such as `10.42.1.0/24`"),
        ("[0.0.0.0/0]", "default route"),
        ("['::/0']", "default route"),
        ("[0.0.0.0/1]", "meets 0.0.0.0/8"),
        ("[127.1.0.0/16]", "meets 127.0.0.0/8 (loopback)"),
        ("[169.254.0.0/24]", "link-local"),
        ("[224.0.0.0/3]", "multicast"),
        ("[fe80::/64]", "link-local"),
        ("[ff00::/8]", "multicast"),
        ("['::1/128']", "loopback"),
        ("['::ffff:10.0.0.0/104']", "IPv4 in IPv6"),
        ("[10.42.1.0/24]", "subnet 10.42.1.0/24 of node `b` overlaps 10.42.1.0/24 of node `a`"),
        ("[10.42.1.128/25]", "subnet 10.42.1.128/25 of node `b` overlaps 10.42.1.0/24 of node `a`"),
        ("[10.42.0.0/16]", "subnet 10.42.0.0/16 of node `b` overlaps 10.42.1.0/24 of node `a`"),
        ("[10.7.0.0/16, 10.7.3.0/24]", "node `b`: subnets 10.7.0.0/16 and 10.7.3.0/24 overlap"),
    ] {
        refused(&format!("subnets: {bad}"), &["7:", why]);
    }
}

#[test]
fn macs_keys_and_encryption_are_checked() {
    assert!(beside_a("mac: 02:00:00:00:00:01").is_ok());
    refused("mac: 01:00:00:00:00:01", &["node `b`", "not a unicast MAC"]);
    let a = "a".parse::<NodeName>().unwrap().derived_mac();
    refused(&format!("mac: {a}"), &["7:10:", "nodes `a` and `b` have the same MAC 02:ca:97:81:12:ca"]);
    assert!(beside_a("encryption: none").is_ok());
    refused("encryption: wireguard", &["node `b` is to be encrypted and has no `public-key`"]);
    refused("encryption: off", &["`encryption` cannot be `off`"]);
    let key = "public-key: HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";
    assert!(beside_a(key).is_ok());
    let list = beside_a(&format!("{key}\n    encryption: wireguard\n    keepalive: 25")).unwrap();
    let b = list.get(&"b".parse().unwrap()).unwrap();
    assert_eq!((b.encryption, b.public_keys.len(), b.keepalive), (Some(Encryption::Wireguard), 1, Some(25)));
    refused("lane-keys: [hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=]", &["go with a `public-key`"]);
    refused(
        &format!("{key}\n    lane-keys: HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="),
        &["8:", "the same public key"],
    );
    let lanes = beside_a(&format!("lane-keys: hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n    {key}")).unwrap();
    let keys = &lanes.get(&"b".parse().unwrap()).unwrap().public_keys;
    assert!(keys[0].to_string().starts_with("HIgo") && keys[1].to_string().starts_with("hSDw"), "{keys:?}");
    refused(&format!("{key}\n    preshared-key: abc"), &["8:", "preshared key is not 32 bytes", "wg genpsk"]);
    refused(&format!("preshared-key-file: /k\n    {key}\n    preshared-key: abc"), &["9:", "keep one of them"]);
    refused("preshared-key-file: /k", &["no `public-key`"]);
    let preshared = beside_a(&format!("{key}\n    preshared-key-file: /k")).unwrap();
    let b = preshared.get(&"b".parse().unwrap()).unwrap();
    assert_eq!(b.preshared, Some(Preshared::File("/k".into())));
    let secret = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
    let preshared = beside_a(&format!("{key}\n    preshared-key: {secret}")).unwrap();
    assert!(preshared.get(&"b".parse().unwrap()).unwrap().preshared_key().is_some());
    assert!(!format!("{preshared:?}").contains("hSDw"), "not shown");
    refused("keepalive: 0", &["seconds from 1 to 65535"]);
    for bad in
        ["HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw", "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8yk1=", "base64", "''"]
    {
        refused(&format!("public-key: {bad}"), &["not 32 bytes in base64"]);
    }
}

/// Prefixes that often overlap.
fn prefix() -> impl Strategy<Value = IpNet> {
    (0..64u32, 20..=32u8)
        .prop_map(|(i, len)| IpNet::V4(Ipv4Net::new(Ipv4Addr::from(0x0a2a_0000 | (i << 6)), len).unwrap()).trunc())
}

proptest! {
    #[test]
    fn overlaps_are_found_exactly_when_there_are_any(nets in proptest::collection::vec(prefix(), 1..8)) {
        let mut text = "nodes:\n".to_owned();
        for (i, net) in nets.iter().enumerate() {
            text += &format!("- {{name: n{i}, underlay: 10.9.0.{}, subnets: [{net}]}}\n", i + 1);
        }
        let overlap = nets.iter().enumerate().any(|(i, a)| {
            nets.iter().skip(i + 1).any(|b| a.contains(b) || b.contains(a))
        });
        prop_assert_eq!(read(&text).is_err(), overlap);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in any::<Vec<u8>>()) {
        let _ = parse(&text, PORT);
    }

    #[test]
    fn no_value_makes_a_key_panic(key in 0..KEYS.len(), value in any::<String>()) {
        let quoted = serde_json::to_string(&value).unwrap();
        let _ = read(&format!("nodes: [{{name: a, underlay: 10.9.0.1, {}: {quoted}}}]", KEYS[key]));
        let _ = read(&format!("nodes: [{{name: a, {}: {quoted}}}]", KEYS[key]));
        let _ = read(&format!("nodes: [{{name: a, {}: {value}}}]", KEYS[key]));
    }
}
