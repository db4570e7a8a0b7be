use super::*;
use crate::{Forward, Gateway, GatewaySpec, Side};

#[test]
fn addresses_that_mean_the_host_itself_are_not_let_through() {
    let sent = [
        "192.0.2.1",
        "10.0.2.2",
        "10.0.3.255",
        "223.255.255.255",
        "2001:db8::1",
        "fd00::7",
        "64:ff9b::192.0.2.1",
    ];
    let never = [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.9.9.9",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "10.0.2.255",
        "::",
        "::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:192.0.2.1",
        "::127.0.0.1",
        "::ffff:0:127.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b::10.0.2.255",
        "64:ff9b:1::127.0.0.1",
        "2002:7f00:1::1",
        "2001:db8::5efe:127.0.0.1",
    ];
    for address in sent {
        assert!(!never_sent(address.parse().unwrap()), "{address}");
    }
    for address in never {
        assert!(never_sent(address.parse().unwrap()), "{address}");
    }
}

#[test]
fn the_hosts_own_link_is_not_the_guests() {
    for address in [
        "169.254.169.254",
        "169.254.0.1",
        "fe80::1",
        "febf::1",
        "64:ff9b::169.254.169.254",
        "2002:a9fe:a9fe::1",
    ] {
        assert!(link_local(address.parse().unwrap()), "{address}");
    }
    for address in ["169.253.1.1", "192.0.2.1", "2001:db8::1", "64:ff9b::192.0.2.1", "fec0::1"] {
        assert!(!link_local(address.parse().unwrap()), "{address}");
    }
}

/// Where a guest gets by TCP; DNS is asked at port 53.
async fn targets(spec: GatewaySpec, addresses: &[&str]) -> Vec<Target> {
    let gateway = Gateway::new(spec).await.unwrap();
    let target = |address: &&str| {
        gateway.inner.target(Some(Protocol::Tcp), SocketAddr::new(address.parse().unwrap(), 53))
    };
    addresses.iter().map(target).collect()
}

const PROHIBITED: Target = Target::Unreachable(Reason::Prohibited);

#[tokio::test]
async fn a_restricted_guest_cannot_even_ask_for_names() {
    let spec = GatewaySpec { restrict: true, ..GatewaySpec::default() };
    let all = ["10.0.2.3", "fd00::3", "10.0.2.2", "fd00::2", "192.0.2.1", "2001:db8::1"];
    assert_eq!(targets(spec, &all).await, [PROHIBITED; 6]);
}

#[tokio::test]
async fn the_hosts_loopback_can_be_kept_from_the_guest() {
    let addresses = ["10.0.2.2", "fd00::2", "10.0.2.3", "192.0.2.1", "169.254.169.254", "fe80::1"];
    let beyond = Target::Host("192.0.2.1:53".parse().unwrap());
    let gone = Target::Unreachable(Reason::Host);
    let [v4, v6] = ["127.0.0.1:53", "[::1]:53"].map(|own| Target::Host(own.parse().unwrap()));
    assert_eq!(
        targets(GatewaySpec::default(), &addresses).await,
        [v4, v6, Target::Dns, beyond, PROHIBITED, gone]
    );
    let spec = GatewaySpec { host_loopback: false, ..GatewaySpec::default() };
    assert_eq!(
        targets(spec, &addresses).await,
        [PROHIBITED, PROHIBITED, Target::Dns, beyond, PROHIBITED, gone]
    );
}

#[tokio::test]
async fn a_forward_leads_where_the_guest_may_not_go_itself() {
    let metadata = "169.254.169.254:53".parse().unwrap();
    let forward = Forward {
        from: Side::Guest,
        protocol: Protocol::Tcp,
        host: "127.0.0.1:8000".parse().unwrap(),
        guest: metadata,
    };
    for restrict in [false, true] {
        let spec = GatewaySpec { restrict, forwards: vec![forward], ..GatewaySpec::default() };
        assert_eq!(targets(spec, &["169.254.169.254"]).await, [Target::Host(forward.host)]);
    }
}
