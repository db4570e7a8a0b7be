use super::*;

#[test]
fn addresses_that_mean_the_host_itself_are_not_let_through() {
    let sent = ["192.0.2.1", "10.0.2.2", "10.0.3.255", "223.255.255.255", "2001:db8::1", "fd00::7"];
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
    ];
    for address in sent {
        assert!(!never_sent(address.parse().unwrap()), "{address}");
    }
    for address in never {
        assert!(never_sent(address.parse().unwrap()), "{address}");
    }
}
