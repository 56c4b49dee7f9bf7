use super::*;

use proptest::prelude::*;

fn sources(file: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Sources {
    Sources {
        file: Some(("c.yaml".into(), file.into())),
        env: env.iter().map(|(k, v)| (k.into(), v.into())).collect(),
        flags: flags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        hostname: "host-1".to_owned(),
    }
}

fn parse(file: &str) -> Result<Config, ConfigError> {
    Config::parse(&sources(file, &[], &[]))
}

fn message(file: &str) -> String {
    parse(file).expect_err(file).to_string()
}

#[test]
fn without_any_source_there_are_the_documented_defaults() {
    for file in [None, Some(("c.yaml".into(), Vec::new())), Some(("c.yaml".into(), b"# nothing\n".to_vec()))] {
        let config = Config::parse(&Sources { file, hostname: "host-1".into(), ..Sources::default() }).unwrap();
        assert_eq!(config.node_name.as_str(), "host-1");
        assert_eq!(config.node_ip, NodeIp::Auto);
        assert!(config.advertise_address.is_empty());
        assert_eq!(config.tun.as_str(), "mesh0");
        assert_eq!(config.address, OverlayAddress::First);
        assert_eq!(config.port.get(), 8472);
        assert_eq!(config.vni.get(), 1);
        assert_eq!(config.mtu, Mtu::Auto);
        assert_eq!(config.encryption, Encryption::None);
        assert_eq!(config.bfd, Bfd { enabled: true, interval_ms: 150, multiplier: 6, vni: Vni::new(4095).unwrap() });
        assert_eq!(config.workers, Workers::Auto);
        assert_eq!((config.io, config.busy_poll), (Io::Auto, Duration::from_micros(100)));
        assert_eq!(config.data_dir, PathBuf::from("/var/lib/meshd"));
        assert_eq!(config.socket, PathBuf::from("/run/meshd/meshd.sock"));
        assert_eq!(config.socket_mode, 0o660);
        assert_eq!(config.socket_group, None);
        assert_eq!(config.nodes_file, None);
        assert_eq!(config.log, "info");
        assert_eq!(config.log_format, LogFormat::Text);
        assert!(config.notices().is_empty());
    }
}

#[test]
fn bfd_is_a_mapping_in_the_file_and_pairs_elsewhere() {
    let bfd = |text: &str| parse(text).map(|config| config.bfd);
    let wanted = Bfd { enabled: true, interval_ms: 50, multiplier: 3, vni: Vni::new(4095).unwrap() };
    assert_eq!(bfd("bfd: {interval: 50, multiplier: 3}\n").unwrap(), wanted);
    assert_eq!(bfd("bfd:\n  interval: 50\n  multiplier: 3\n").unwrap(), wanted);
    assert_eq!(bfd("bfd: interval=50,multiplier=3\n").unwrap(), wanted);
    let flags = Config::parse(&sources("bfd: off", &[], &[("bfd", "multiplier=3,interval=50,vni=4095")])).unwrap();
    assert_eq!(flags.bfd, wanted);
    assert!(!bfd("bfd: off\n").unwrap().enabled);
    for (text, says) in [
        ("bfd: {interval: 3}\n", "50 to 10000"),
        ("bfd: {multiplier: 2}\n", "3 to 50"),
        ("bfd: {vni: 1}\n", "one and the same network"),
        ("vni: 4095\n", "one and the same network"),
        ("bfd: {intervall: 50}\n", "use `off`"),
        ("bfd: on\n", "use `off`"),
        ("bfd: {interval: [50]}\n", "a mapping of single values"),
        ("bfd: [50]\n", "a mapping of single values"),
    ] {
        assert!(message(text).contains(says), "{text}: {}", message(text));
    }
    assert!(parse("mtu: {a: 1}\n").unwrap_err().to_string().contains("a single value"));
}

#[test]
fn every_key_can_be_set() {
    let config = parse(
        "node-name: a\nnode-ip: [10.9.0.1, fd00::1]\nadvertise-address: 192.0.2.7\ntun: m1\naddress: 10.42.0.9\n\
         port: 4789\nvni: 7\nmtu: 1400\nencryption: none\nworkers: 3\nio: tokio\nbusy-poll: 50\ntunnel-gso: off\nbig-tcp: off\ndata-dir: /d\nsocket: /s\n\
         socket-mode: 0600\nsocket-group: adm\nnodes-file: /n.yaml\nlog: debug,meshd::io=warn\nlog-format: json\n",
    )
    .unwrap();
    let v4: IpAddr = "10.9.0.1".parse().unwrap();
    let v6: IpAddr = "fd00::1".parse().unwrap();
    assert_eq!(config.node_name.as_str(), "a");
    assert_eq!(config.node_ip, NodeIp::Given(vec![NodeIpSpec::Address(v4), NodeIpSpec::Address(v6)]));
    assert_eq!(config.advertise_address, ["192.0.2.7".parse::<IpAddr>().unwrap()]);
    assert_eq!(config.tun.as_str(), "m1");
    assert_eq!(config.address, OverlayAddress::Given(vec!["10.42.0.9".parse().unwrap()]));
    assert_eq!((config.port.get(), config.vni.get()), (4789, 7));
    assert_eq!(config.mtu, Mtu::Fixed(NonZeroU16::new(1400).unwrap()));
    assert_eq!(config.workers, Workers::Fixed(3.try_into().unwrap()));
    assert_eq!((config.io, config.busy_poll), (Io::Tokio, Duration::from_micros(50)));
    assert!(!config.tunnel_gso && !config.big_tcp);
    assert!(
        config.notices().iter().any(|notice| notice.contains("`busy-poll` does nothing")),
        "{:?}",
        config.notices()
    );
    assert_eq!((config.data_dir.to_str(), config.socket.to_str()), (Some("/d"), Some("/s")));
    assert_eq!(config.socket_mode, 0o600);
    assert_eq!(config.socket_group.as_deref(), Some("adm"));
    assert_eq!(config.nodes_file, Some("/n.yaml".into()));
    assert_eq!(config.log, "debug,meshd::io=warn");
    assert_eq!(config.log_format, LogFormat::Json);
}

#[test]
fn a_flag_beats_the_environment_which_beats_the_file() {
    let file = "port: 1\nvni: 1\nmtu: 1300\n";
    let env = [("MESHD_PORT", "2"), ("MESHD_VNI", "2"), ("MESHD_NODE_IP", "10.0.0.1,eth1"), ("MESHD_TUN", "")];
    let flags = [("port", "3"), ("advertise-address", "10.0.0.2"), ("advertise-address", "fd00::2")];
    let config = Config::parse(&sources(file, &env, &flags)).unwrap();
    assert_eq!((config.port.get(), config.vni.get()), (3, 2));
    assert_eq!(config.mtu, Mtu::Fixed(NonZeroU16::new(1300).unwrap()));
    assert_eq!(config.advertise_address.len(), 2);
    assert!(matches!(&config.node_ip, NodeIp::Given(specs) if specs.len() == 2));
    assert_eq!(config.tun.as_str(), "mesh0", "an empty variable is as good as none");
}

#[test]
fn an_error_names_the_source_of_the_bad_value() {
    assert_eq!(message("tun: a\nport: 70000\n"), "c.yaml:2:7: `port` cannot be `70000`: use a number from 1 to 65535");
    let env = Config::parse(&sources("port: 1", &[("MESHD_PORT", "x")], &[])).unwrap_err().to_string();
    assert_eq!(env, "environment variable MESHD_PORT: `port` cannot be `x`: use a number from 1 to 65535");
    let flag = Config::parse(&sources("port: 1", &[("MESHD_PORT", "2")], &[("port", "0")])).unwrap_err().to_string();
    assert_eq!(flag, "flag --port: `port` cannot be `0`: use a number from 1 to 65535");
    let host = Config::parse(&Sources { hostname: "-".into(), ..Sources::default() }).unwrap_err().to_string();
    assert!(host.starts_with("default of `node-name`: `node-name` cannot be `-`"), "{host}");
    assert!(Config::parse(&Sources { hostname: "-".into(), ..sources("node-name: a", &[], &[]) }).is_ok());
    let second = message("node-ip: [10.0.0.1,\n  10.0.0.2]\n");
    assert!(second.starts_with("c.yaml:2:3: `node-ip` cannot be `10.0.0.2`: there is another"), "{second}");
}

#[test]
fn unknown_keys_are_refused_with_a_suggestion() {
    assert_eq!(message("mtu: 1400\nnode-nmae: a\n"), "c.yaml:2:1: unknown key `node-nmae`; did you mean `node-name`?");
    assert_eq!(message("node_name: a\n"), "c.yaml:1:1: unknown key `node_name`; did you mean `node-name`?");
    assert_eq!(message("something-else: a\n"), "c.yaml:1:1: unknown key `something-else`");
    assert_eq!(message("cluster: {x: 3}\n"), "c.yaml:1:1: `cluster` is not supported by this version yet; remove it");
    assert!(parse("mtu: 1400\nnode-name: a\n").is_ok());
}

#[test]
fn unknown_variables_are_noticed_and_ignored() {
    let env = [("MESHD_PROT", "1"), ("MESHD_CLUSTER", "1"), ("MESHD_SERVICE_HOST", "1"), ("PATH", "/bin")];
    let config = Config::parse(&sources("", &env, &[])).unwrap();
    let notices = config.notices();
    assert_eq!(notices.len(), 3);
    assert!(notices[0].contains("MESHD_PROT is not a setting; did you mean MESHD_PORT?"), "{notices:?}");
    assert!(notices[1].contains("not supported by this version"), "{notices:?}");
}

#[test]
fn bad_values_are_refused_and_good_ones_beside_them_are_not() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("node-name", &["a", "no", "1e5", "n.b-c_d"], &["-a", "a b", "é"]),
        (
            "node-ip",
            &["10.0.0.1", "fd00::1", "eth0", "eth0.100", "[10.0.0.1, fd00::1]", "10.0.0.1, fd00::1", "[eth0, eth1]"],
            &[
                "0.0.0.0",
                "127.0.0.1",
                "224.0.0.1",
                "255.255.255.255",
                "fe80::1",
                "'::'",
                "'::1'",
                "::ffff:10.0.0.1",
                "10.0.0.1/24",
                "10.0.0.1:8472",
                "10.0.0",
                "averyveryverylongname",
                "[fd00::1, fd00::2]",
                "[eth0, eth0]",
                "[[10.0.0.1]]",
                "[]",
                "''",
                "{a: b}",
                "10.0.0.1,",
            ],
        ),
        ("advertise-address", &["10.0.0.1", "[10.0.0.1, fd00::1]"], &["eth0", "fe80::1", "[10.0.0.1, 10.0.0.2]"]),
        ("tun", &["mesh0", "abcdefghijklmno", "1"], &["abcdefghijklmnop", "a/b", "a b", ".", "..", "a%d", "lo", "all"]),
        (
            "address",
            &["first", "network", "10.0.0.1", "[10.0.0.1, fd00::1]"],
            &["last", "10.0.0.1/32", "[first, 10.0.0.1]", "[10.0.0.1, 10.0.0.2]", "0.0.0.0", "ff02::1"],
        ),
        ("port", &["1", "65535", "'8472'"], &["0", "65536", "-1", "+1", "0x10", "1e3", "8472.0", "[1]", "{}"]),
        ("vni", &["0", "16777215"], &["16777216", "-1", "x"]),
        ("mtu", &["auto", "576", "65535"], &["575", "65536", "Auto", "1400.5"]),
        ("encryption", &["none", "wireguard"], &["off", "None"]),
        ("private-key-file", &["/x", "x"], &["''", "[/x]"]),
        ("workers", &["auto", "1", "64"], &["0", "65", "many"]),
        ("io", &["auto", "mmsg", "uring", "tokio"], &["iouring", "epoll"]),
        ("busy-poll", &["off", "1", "10000"], &["0", "10001", "50us", "-1", "on"]),
        ("tunnel-gso", &["auto", "off"], &["on", "0"]),
        ("big-tcp", &["auto", "off"], &["on", "262144"]),
        ("data-dir", &["/x", "x"], &["''", "[/x]"]),
        (
            "socket",
            &["/x"],
            &[
                "''",
                "/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
            ],
        ),
        ("socket-mode", &["0660", "\"0660\"", "660", "0o600", "0"], &["0888", "1777", "rw", "00660", "-660", "0x1ff"]),
        ("socket-group", &["adm", "1000"], &["a b", "a:b", "''"]),
        (
            "log",
            &["info", "DEBUG", "meshd=trace,info", "info,meshd::io=debug", "off"],
            &["debgu", "inof", "a=b=c", "''"],
        ),
        ("log-format", &["text", "json"], &["xml"]),
    ];
    assert_eq!(cases.len() + 1 + OTHERS.len(), KEYS.len(), "all but nodes-file");
    for (key, good, bad) in cases {
        for value in *good {
            assert!(
                parse(&format!("{key}: {value}\n")).is_ok(),
                "{key}: {value}: {:?}",
                parse(&format!("{key}: {value}\n"))
            );
        }
        for value in *bad {
            let message = message(&format!("{key}: {value}\n"));
            assert!(message.starts_with("c.yaml:1:") && message.contains(key), "{message}");
        }
    }
    assert_eq!(parse("socket-mode: 660").unwrap().socket_mode, 0o660);
}

#[test]
fn a_log_filter_on_which_tracing_would_panic_is_refused() {
    for filter in ["\u{2028}\u{ff10}=", "é=info"] {
        assert!(Config::parse(&sources("", &[], &[("log", filter)])).is_err(), "{filter:?}");
    }
    assert!(Config::parse(&sources("", &[], &[("log", "e=info")])).is_ok());
}

#[test]
fn a_file_that_is_no_configuration_is_refused() {
    assert_eq!(message("port: 1\nport: 2\n"), "c.yaml:2:1: duplicate key `port`; keep one of them");
    assert_eq!(message("- port\n"), "c.yaml:1:1: a configuration is lines of `key: value`, but here is a list");
    assert_eq!(message("port:\n"), "c.yaml:1:5: `port` has no value; give it one, or remove it for the default (8472)");
    assert!(message("port: {a: 1}\n").contains("`port` takes a single value, but here is a mapping"));
    assert!(message("port: [\n").starts_with("c.yaml:"));
    assert!(message("port: 1\n---\nport: 2\n").starts_with("c.yaml:"));
    let bytes = Sources { file: Some(("c.yaml".into(), b"port: 1\ntun: \xff\n".to_vec())), ..sources("", &[], &[]) };
    assert!(Config::parse(&bytes).unwrap_err().to_string().starts_with("c.yaml:2:6: this byte is not UTF-8"));
    assert!(parse("port: 1\n").is_ok());
}

#[test]
fn changes_are_sorted_into_live_and_restart() {
    let old = parse("").unwrap();
    let new = parse("log: debug\nmtu: 1400\nnodes-file: /n\nport: 9\ntun: x\n").unwrap();
    let changes = old.live_changes(&new);
    assert_eq!(changes.live, ["mtu", "nodes-file", "log"]);
    assert_eq!(changes.restart, ["tun", "port"]);
    assert_eq!(old.live_changes(&old), LiveChanges::default());
}

#[test]
fn no_key_is_forgotten_when_comparing() {
    let values = [
        "a",
        "eth0",
        "10.0.0.1",
        "t",
        "network",
        "1",
        "2",
        "1400",
        "wireguard",
        "/k",
        "2",
        "uring",
        "50",
        "off",
        "off",
        "/d",
        "/s",
        "0600",
        "g",
        "/n",
        "debug",
        "json",
    ];
    let old = parse("").unwrap();
    assert_eq!(values.len() + OTHERS.len(), KEYS.len());
    let others = |key: &Key| OTHERS.iter().find(|(name, _)| *name == key.name).map(|(_, value)| *value);
    let mut values = values.into_iter();
    let mut value_of = |key: &Key| others(key).or_else(|| values.next());
    let all: Vec<_> = KEYS.iter().filter_map(|key| Some((key, value_of(key)?))).collect();
    // these change the default of `address` as well
    let alone = |key: &Key| !matches!(key.name, "cni-conf-dir" | "subnet-file");
    for (key, value) in all.into_iter().filter(|(key, _)| alone(key)) {
        let new = parse(&format!("{}: {value}", key.name)).unwrap();
        let changes = old.live_changes(&new);
        let (there, elsewhere) =
            if key.live { (changes.live, changes.restart) } else { (changes.restart, changes.live) };
        assert_eq!(there, [key.name]);
        assert!(elsewhere.is_empty());
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in any::<Vec<u8>>()) {
        let _ = Config::parse(&Sources { file: Some(("c".into(), text)), ..Sources::default() });
    }

    #[test]
    fn no_yaml_like_text_makes_the_parser_panic(text in "([a-z-]{1,9}|port|node-ip|[:,\\[\\]{}&*!|>'\"#~ \n0-9<-]){0,40}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_log_filter_makes_the_parser_panic(filter in "[a-z:=,\\[\\]{}\". *\\\\0-9$/-]{0,40}") {
        let _ = Config::parse(&sources("", &[], &[("log", &filter)]));
    }

    #[test]
    fn no_value_makes_a_key_panic(key in 0..KEYS.len(), value in any::<String>()) {
        let _ = Config::parse(&sources("", &[], &[(KEYS[key].name, &value)]));
    }
}

/// The keys of `meshd server` and `meshd agent`, each with a value that is not the default.
const OTHERS: [(&str, &str); 23] = [
    ("bfd", "off"),
    ("bfd-auth-key-file", "/b"),
    ("server", "a"),
    ("token", "t"),
    ("token-file", "/t"),
    ("cluster-cidr", "10.43.0.0/16"),
    ("node-cidr-mask-size", "25"),
    ("tls-san", "a"),
    ("bind-address", "10.9.0.1"),
    ("cluster-init", "true"),
    ("datastore-endpoint", "sqlite:///x"),
    ("datastore-password-file", "/p"),
    ("datastore-cafile", "/ca"),
    ("datastore-certfile", "/ce"),
    ("datastore-keyfile", "/k"),
    ("node-label", "a=b"),
    ("node-taint", "a:NoExecute"),
    ("control-only", "true"),
    ("purge-after", "1h"),
    ("lb-server-port", "6444"),
    ("cni-conf-dir", "/c"),
    ("subnet-file", "/e"),
    ("metrics-address", "127.0.0.1:9346"),
];

#[test]
fn membership_keys_are_read() {
    let config = parse(
        "server: [10.9.0.1, 'https://b.example:9345', '[fd00::1]:9345']\ntoken: hush-hush\n\
         cluster-cidr: 10.42.0.0/16, fd42::/48\nnode-cidr-mask-size: [25, 72]\ntls-san: [mesh.example, 192.0.2.1]\n\
         bind-address: 10.9.0.1\ndatastore-endpoint: sqlite:///x/y.db\nnode-label: zone=a, example.org/x=\n\
         node-taint: CriticalAddonsOnly=true:NoExecute\ncontrol-only: true\npurge-after: 2d\ncluster-init: false\n\
         lb-server-port: 6444\n",
    )
    .unwrap();
    assert_eq!(config.servers, ["10.9.0.1", "https://b.example:9345", "[fd00::1]:9345"]);
    assert_eq!(config.token.as_ref().map(|token| token.reveal()), Some("hush-hush"));
    assert_eq!(parse("token-file: '-'").unwrap().token_file, Some(TokenFile::StandardInput));
    assert_eq!(config.cluster_cidr.len(), 2);
    assert_eq!((config.node_cidr_mask_size.v4, config.node_cidr_mask_size.v6), (25, 72));
    assert_eq!(config.bind_address.to_string(), "10.9.0.1:9345");
    assert_eq!(config.node_labels.get("example.org/x").map(String::as_str), Some(""));
    assert_eq!(config.node_taints, ["CriticalAddonsOnly=true:NoExecute"]);
    assert!(config.control_only);
    assert_eq!((config.purge_after, config.lb_server_port), (PurgeAfter::Seconds(172_800), Some(6444)));

    let config = parse("").unwrap();
    assert_eq!(config.cluster_cidr, ["10.42.0.0/16".parse().unwrap()]);
    assert_eq!(config.bind_address.to_string(), "[::]:9345");
    assert_eq!(
        (config.purge_after, config.control_only, config.datastore_endpoint.is_none()),
        (PurgeAfter::Auto, false, true)
    );
}

#[test]
fn wrong_membership_values_are_named() {
    for (text, part) in [
        ("server: http://a:9345", "registration address"),
        ("server: https://a/b", "registration address"),
        ("server: https://a:0", "registration address"),
        ("cluster-cidr: 10.42.1.0/16", "write `10.42.0.0/16`"),
        ("cluster-cidr: [10.42.0.0/16, 10.43.0.0/16]", "another of the same family"),
        ("cluster-cidr: 0.0.0.0/0", "private unicast prefix"),
        ("cluster-cidr: 10.42.0.0/24\nnode-cidr-mask-size: 16", "no subnet of that size fits"),
        ("node-cidr-mask-size: [24, 25]", "for the same family"),
        ("node-cidr-mask-size: 129", "from 8 to 128"),
        ("bind-address: host:9345", "use an address with a port"),
        ("metrics-address: '9346'", "use an address with a port"),
        ("cluster-init: maybe", "true"),
        ("datastore-endpoint: etcd://h1,,h2", "is no host"),
        ("datastore-endpoint: mysql://hush@/d", "no host"),
        ("datastore-endpoint: postgres://u:hush@h", "no database"),
        ("datastore-endpoint: mysql://u:hush@h/d?ssl=1", "only `sslmode`"),
        ("datastore-endpoint: x.db", "use `sqlite:///PATH`"),
        ("node-label: a", "write `key=value`"),
        ("node-label: [a=1, a=2]", "there twice"),
        ("node-taint: a=b:Never", "NoSchedule"),
        ("control-only: yes", "use `true` or `false`"),
        ("purge-after: 10s", "from 1m on"),
        ("purge-after: 1w", "from 1m on"),
        ("lb-server-port: 0", "use `off`, or a TCP port"),
        ("tls-san: https://a", "host name or an IP address"),
        ("token: mesh1AAAA", "the token is damaged"),
        ("token: mesh1 AAAA", "has a blank or line break in it"),
    ] {
        let message = message(text);
        assert!(message.contains(part), "{text}: {message}");
        assert!(!message.contains("hush"), "{text}: {message}");
    }
}

#[test]
fn a_token_is_never_shown() {
    let config = parse("token: hush-hush\n").unwrap();
    assert!(!format!("{config:?}").contains("hush"), "{config:?}");
    for bad in ["token: mesh1hush\n", "token: \"mesh1hush\\thush\"\n", "token: [hush]\n"] {
        assert!(!message(bad).contains("hush"), "{}", message(bad));
    }
    let env = Config::parse(&sources("", &[("MESHD_TOKEN", "mesh1hush")], &[])).unwrap_err().to_string();
    assert!(env.contains("MESHD_TOKEN") && !env.contains("hush"), "{env}");
    let changed = config.live_changes(&parse("token: other\nadvertise-address: 192.0.2.1\n").unwrap());
    assert_eq!((changed.live.as_slice(), changed.restart.len()), (&["advertise-address", "token"][..], 0));
}

#[test]
fn of_token_and_token_file_the_weightier_source_counts() {
    let given = |file: &str, env: &[(&str, &str)], flags: &[(&str, &str)]| Config::parse(&sources(file, env, flags));
    let config = given("token: hush\n", &[("MESHD_TOKEN_FILE", "/t")], &[]).unwrap();
    assert!(config.token.is_none() && config.token_file.is_some());
    assert!(config.notices().is_empty(), "{:?}", config.notices());
    let config = given("token-file: /t\n", &[("MESHD_TOKEN_FILE", "/t")], &[("token", "hush")]).unwrap();
    assert!(config.token.is_some() && config.token_file.is_none());
    for both in [
        given("token: hush\ntoken-file: /t\n", &[], &[]),
        given("", &[("MESHD_TOKEN", "hush"), ("MESHD_TOKEN_FILE", "/t")], &[]),
        given("", &[], &[("token", "hush"), ("token-file", "/t")]),
    ] {
        let message = both.unwrap_err().to_string();
        assert!(message.contains("keep one of them") && !message.contains("hush"), "{message}");
    }
}

#[test]
fn where_a_bridge_has_the_first_address_the_node_has_the_networks() {
    assert_eq!(parse("subnet-file: /x\n").unwrap().address, OverlayAddress::Network);
    assert_eq!(parse("cni-conf-dir: /x\naddress: first\n").unwrap().address, OverlayAddress::First);
}

#[test]
fn a_member_encrypts_unless_told_otherwise() {
    assert_eq!(parse("").unwrap().encryption, Encryption::None);
    assert_eq!(parse("").unwrap().of_member().encryption, Encryption::Wireguard);
    assert_eq!(parse("encryption: none\n").unwrap().of_member().encryption, Encryption::None);
}
