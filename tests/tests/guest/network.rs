//! Cards, addresses and vlans.

use firn::{Driver, Machine};
use firn_tests::{PATIENCE, noise, output, with_machines};

fn machine<'a>(driver: &'a Driver, name: &str) -> &'a Machine {
    driver.machine(name).unwrap()
}

/// Pings each target: an address or name, and options before it.
async fn reaches(from: &Machine, targets: &[&str]) {
    for target in targets {
        from.succeed(&[&format!("ping -c 1 {target}")], None).await.unwrap();
    }
}

/// How many IPv4 packets the kernel of `machine` was given, ARP and frames for others not counted.
async fn ipv4_packets(machine: &Machine) -> u64 {
    let column = "awk '/^Ip: [0-9]/ { print $4 }' /proc/net/snmp";
    output(machine, column).await.parse().unwrap()
}

/// A counter of `eth1`.
async fn counter(machine: &Machine, name: &str) -> u64 {
    output(machine, &format!("cat /sys/class/net/eth1/statistics/{name}")).await.parse().unwrap()
}

/// `a` is on vlan 1, `c` on vlan 2, `b` on both.
const LINE: &str = "[nodes.a]\nvlans = [1]\n[nodes.b]\nvlans = [1, 2]\n[nodes.c]\nvlans = [2]";

#[test]
fn machines_on_one_vlan_reach_each_other_and_no_others() {
    with_machines(LINE, async |driver| {
        driver.start_all().await.unwrap();
        let (a, b, c) = (machine(driver, "a"), machine(driver, "b"), machine(driver, "c"));
        reaches(a, &["b", "-4 b", "-6 b", "192.168.1.2", "2001:db8:1::2"]).await;
        reaches(b, &["a", "-4 a", "-6 a", "192.168.1.1", "2001:db8:1::1"]).await;
        reaches(b, &["c", "-6 c", "192.168.2.3", "2001:db8:2::3"]).await;
        reaches(c, &["192.168.2.2", "2001:db8:2::2"]).await;
        cards_have_their_names_and_addresses(a, b, c).await;
        nothing_leaks(a, b, c).await;
    });
}

async fn cards_have_their_names_and_addresses(a: &Machine, b: &Machine, c: &Machine) {
    /// That of the user network.
    const USER: &str = "eth0 52:54:00:12:34:56";

    let cards = "cd /sys/class/net; for card in eth*; do echo $card $(cat $card/address); done";
    assert_eq!(output(a, cards).await, format!("{USER}\neth1 52:54:00:12:01:01"));
    let both = format!("{USER}\neth1 52:54:00:12:01:02\neth2 52:54:00:12:02:02");
    assert_eq!(output(b, cards).await, both);
    assert_eq!(output(c, cards).await, format!("{USER}\neth1 52:54:00:12:02:03"));
}

/// Even if `a` and `c` believe that they are on one network and know each other's hardware address.
async fn nothing_leaks(a: &Machine, b: &Machine, c: &Machine) {
    output(a, "ip addr add 192.168.2.1/24 dev eth1; arp -s 192.168.2.3 52:54:00:12:02:03").await;
    output(c, "ip addr add 192.168.1.3/24 dev eth1; arp -s 192.168.1.1 52:54:00:12:01:01").await;
    let before = (ipv4_packets(b).await, ipv4_packets(c).await);
    let sent = counter(a, "tx_packets").await;
    let ping = "ping -c 10 -i 0.1 -W 1";
    a.fail(&[&format!("{ping} 192.168.2.3"), &format!("{ping} 192.168.1.255")], None)
        .await
        .unwrap();
    c.fail(&[&format!("{ping} 192.168.1.1")], None).await.unwrap();
    assert!(counter(a, "tx_packets").await >= sent + 20);
    // The same frames, where they belong and where they do not.
    assert!(ipv4_packets(b).await >= before.0 + 10, "b got no broadcasts");
    assert_eq!(ipv4_packets(c).await, before.1, "frames of vlan 1 came to vlan 2");
}

#[test]
fn block_pulls_the_cable_of_the_first_vlan_only() {
    with_machines("[nodes.a]\nvlans = [1, 2]\n[nodes.b]\nvlans = [1, 2]", async |driver| {
        driver.start_all().await.unwrap();
        let (a, b) = (machine(driver, "a"), machine(driver, "b"));
        let carrier = async |value: u8| {
            let command = format!("[ $(cat /sys/class/net/eth1/carrier) = {value} ]");
            a.wait_until_succeeds(&command, PATIENCE, None).await.unwrap();
        };
        reaches(b, &["a", "192.168.2.1"]).await;
        carrier(1).await;
        a.block();
        carrier(0).await;
        b.fail(&["ping -c 1 -W 1 a"], None).await.unwrap();
        a.fail(&["ping -c 1 -W 1 b"], None).await.unwrap();
        reaches(b, &["192.168.2.1"]).await;
        assert_eq!(output(a, "cat /sys/class/net/eth2/carrier").await, "1");
        a.unblock();
        carrier(1).await;
        b.wait_until_succeeds("ping -c 1 -W 2 a", PATIENCE, None).await.unwrap();
        a.wait_until_succeeds("ping -c 1 -W 2 b", PATIENCE, None).await.unwrap();
    });
}

/// The size of what is transferred: odd, so that nothing comes out even.
const TRANSFER: usize = 100 << 20 | 1;

#[test]
fn big_tcp_segments_pass_whole() {
    let nodes = "[nodes.a]\nmemory = 768\n[nodes.b]\nmemory = 768";
    with_machines(nodes, async |driver| {
        driver.start_all().await.unwrap();
        let (a, b) = (machine(driver, "a"), machine(driver, "b"));
        let data = noise(TRANSFER);
        std::fs::write(a.shared_dir().join("data"), &data).unwrap();
        output(a, "cp /tmp/shared/data /tmp/data").await;
        let before = [counter(a, "tx_bytes").await, counter(a, "tx_packets").await];
        let before_b = [counter(b, "rx_bytes").await, counter(b, "rx_packets").await];

        // Sends by sendfile; nc would by the kibibyte, from which TCP makes small segments.
        output(a, "httpd -p 5000 -h /tmp >/dev/null 2>&1").await;
        let fetch = "now() { cut -d ' ' -f 1 /proc/uptime; }; start=$(now); \
            wget -q -O /tmp/received http://a:5000/data; echo $start $(now)";
        let times = output(b, fetch).await;
        let times: Vec<f64> = times.split(' ').map(|time| time.parse().unwrap()).collect();

        let sent = [counter(a, "tx_bytes").await, counter(a, "tx_packets").await];
        let received = [counter(b, "rx_bytes").await, counter(b, "rx_packets").await];
        let average = |[bytes, packets]: [u64; 2], before: [u64; 2]| {
            (bytes - before[0]) / (packets - before[1])
        };
        let (sent, received) = (average(sent, before), average(received, before_b));
        eprintln!(
            "figure: TCP from guest to guest: {TRANSFER} bytes in {:.2} s, {sent} bytes a packet",
            times[1] - times[0]
        );
        // Cut to Ethernet's size they would have 1,514 at most.
        assert!(sent > 5_000, "{sent} bytes a packet sent");
        assert!(received > 5_000, "{received} bytes a packet received");

        output(b, "cp /tmp/received /tmp/shared/received").await;
        let received = std::fs::read(b.shared_dir().join("received")).unwrap();
        assert!(received == data, "{} of {TRANSFER} bytes, or others", received.len());
    });
}
