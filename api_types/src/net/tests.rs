use super::*;
use crate::ByteSize;

fn parse(text: &str) -> Result<NetSpec, ParseNetError> {
    text.parse()
}

fn user(text: &str) -> UserNet {
    match parse(text).unwrap().kind {
        NetKind::User(user) => user,
        other => panic!("{text} is {other:?}"),
    }
}

#[test]
fn a_plain_kind_has_every_default() {
    assert_eq!(parse("user").unwrap(), NetSpec::default());
    let net = user("user");
    assert_eq!((net.guest_address().to_string().as_str(), net.host_loopback), ("10.0.2.15", false));
    assert!(net.ipv4 && net.ipv6 && net.dns);
    assert!(matches!(parse("passt").unwrap().kind, NetKind::Passt(_)));
}

#[test]
fn what_user_mode_nat_is_told_is_read() {
    let net = user(
        "user,forward=tcp:2222:22,host-loopback,forward=udp:0.0.0.0:53:10.1.0.9:5353,network=10.1.0.0/16,\
         address=10.1.7.7,ipv6=off,dns=9.9.9.9,dns=1.1.1.1",
    );
    assert_eq!((net.forward.len(), net.host_loopback, net.ipv6), (2, true, false));
    assert_eq!((net.dns_servers.len(), net.guest_address()), (2, Ipv4Addr::new(10, 1, 7, 7)));
    assert!(!user("user,dns=off").dns);
}

#[test]
fn what_every_kind_is_told_is_read() {
    let net =
        parse("tap,name=tap0,queues=4,mac=52:54:00:00:00:09,mtu=9000,bytes-per-second=10M,bytes-burst=20M");
    let net = net.unwrap();
    assert_eq!(net.kind, NetKind::Tap(HostDevice { name: "tap0".to_owned() }));
    assert_eq!((net.queues, net.mtu), (Some(4), Some(9000)));
    assert_eq!(net.limits.bytes_burst, Some(ByteSize(20 << 20)));
    assert_eq!(net.mac.unwrap().to_string(), "52:54:00:00:00:09");
}

#[test]
fn what_cannot_be_is_named_in_one_line() {
    let wrong: [(&str, &str); 26] = [
        ("", "the kinds are"),
        ("bridge", "'bridge'"),
        ("user,", "unknown option ''"),
        ("user,fast", "unknown option 'fast'"),
        ("user,name=x", "unknown option 'name=x'"),
        ("tap,name=t,forward=tcp:1:1", "unknown option 'forward=tcp:1:1' of --net tap"),
        ("user,host-loopback=yes", "host-loopback=yes"),
        ("user,host-loopback,host-loopback", "given twice"),
        ("user,mtu=9", "1280 to 65520"),
        ("user,ipv6=off,mtu=9", "576 to 65520"),
        ("user,mtu=jumbo", "mtu=jumbo"),
        ("user,queues=0", "queues=0"),
        ("user,mac=01:00:5e:00:00:01", "01:00:5e:00:00:01"),
        ("tap", "name"),
        ("tap,name=a/b", "a/b"),
        ("macvtap,name=averyveryverylongname", "averyveryverylongname"),
        ("user,address=10.9.9.9", "10.9.9.9 cannot be the guest's: expected an address of 10.0.2.0/24"),
        ("user,address=10.0.2.2", "10.0.2.2"),
        ("user,forward=tcp:80:10.0.3.15:80", "10.0.3.15"),
        ("user,prefix=fd00:1::/64,forward=tcp:80:[fd00:2::5]:80", "fd00:2::5 is outside"),
        ("user,ipv6=off,forward=tcp:80:[fd00:2::5]:80", "IPv6 is switched off"),
        ("user,forward=tcp:80:80,forward=tcp:127.0.0.1:80:81", "forwarded already"),
        ("user,ipv4=off,ipv6=off", "--net none"),
        ("user,ipv4=perhaps", "on or off"),
        ("user,dns=example.org", "example.org"),
        ("user,bytes-burst=1M", "bytes-per-second"),
    ];
    for (text, named) in wrong {
        let error = parse(text).expect_err(text).to_string();
        assert!(error.contains(named) && !error.contains('\n'), "{text}: {error}");
    }
}

#[test]
fn a_machine_without_the_option_has_user_nat_and_none_has_none() {
    let interfaces =
        |texts: &[&str]| NetArgument::interfaces(texts.iter().map(|text| text.parse().unwrap()).collect());
    assert_eq!(interfaces(&[]).unwrap(), [NetSpec::default()]);
    assert_eq!(interfaces(&["none"]).unwrap(), []);
    assert_eq!(interfaces(&["user", "tap,name=t"]).unwrap().len(), 2);
    assert_eq!(interfaces(&["none", "user"]), Err(ParseNetError::NoneAndOthers));
    assert!(matches!("none,mtu=1500".parse::<NetArgument>(), Err(ParseNetError::NoneOption(_))));
}

#[test]
fn documents_spell_it_as_the_command_line_does() {
    for text in [
        "user",
        "user,forward=tcp:2222:22,forward=udp:[::]:53:10.0.2.15:53,host-loopback,dns=9.9.9.9",
        "user,ipv4=off,prefix=fd00:1::/64,dns=off,mtu=65520",
        "user,network=192.168.7.0/24,address=192.168.7.9,ipv6=off",
        "tap,name=tap0,mac=52:54:00:00:00:09,queues=2,operations-per-second=5",
        "macvtap,name=mv0",
        "passt,forward=tcp:8080:80",
    ] {
        let spec = parse(text).unwrap();
        assert_eq!(spec.to_string(), text);
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<NetSpec>(&json).unwrap(), spec, "{json}");
    }
    let spec: NetSpec =
        serde_json::from_str(r#"{"kind": {"user": {"forward": ["tcp:2222:22"]}}, "mtu": 9000}"#).unwrap();
    assert_eq!(spec, parse("user,forward=tcp:2222:22,mtu=9000").unwrap());
    assert!(serde_json::from_str::<NetSpec>(r#"{"kind": {"user": {"hostloopback": true}}}"#).is_err());
}
