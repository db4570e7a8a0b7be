use super::*;

const AGE: Duration = Duration::from_secs(300);

fn mac(n: u32) -> Mac {
    let [a, b, c, d] = n.to_be_bytes();
    [2, 0, a, b, c, d]
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// The two indexes say the same.
fn check(table: &MacTable) {
    assert_eq!(table.entries.len(), table.by_age.values().map(BTreeSet::len).sum::<usize>());
    for (port, macs) in &table.by_age {
        assert!(!macs.is_empty());
        for (seen, mac) in macs {
            assert_eq!((table.entries[mac].port, table.entries[mac].seen), (*port, *seen));
        }
    }
}

#[test]
fn forgets_after_the_ageing_time_and_not_before() {
    let mut table = MacTable::new(AGE);
    table.learn(mac(1), 7, seconds(10));
    assert_eq!(table.find(mac(1), seconds(309)), Some(7));
    assert_eq!(table.find(mac(1), seconds(310)), None);
    table.learn(mac(1), 7, seconds(200));
    assert_eq!(table.find(mac(1), seconds(499)), Some(7));
    assert_eq!(table.find(mac(2), seconds(10)), None);
    check(&table);
}

#[test]
fn a_move_counts_at_once() {
    let mut table = MacTable::new(AGE);
    assert_eq!(table.learn(mac(1), 1, seconds(0)), None);
    assert_eq!(table.learn(mac(1), 2, seconds(0)), Some(1));
    assert_eq!(table.find(mac(1), seconds(0)), Some(2));
    assert!(!table.by_age.contains_key(&1));
    check(&table);
}

#[test]
fn a_full_port_loses_its_own_oldest() {
    let mut table = MacTable::new(AGE);
    table.learn(mac(u32::MAX), 2, seconds(0));
    let many = u32::try_from(MAX_MACS_PER_PORT).unwrap();
    for n in 0..many {
        table.learn(mac(n), 1, seconds(1));
    }
    // Seen again, so no longer the oldest.
    table.learn(mac(0), 1, seconds(5));
    for n in many..3 * many {
        table.learn(mac(n), 1, seconds(6));
        if n == many {
            assert_eq!(table.find(mac(0), seconds(6)), Some(1));
            assert_eq!(table.find(mac(1), seconds(6)), None);
        }
    }
    assert_eq!(table.entries.len(), MAX_MACS_PER_PORT + 1);
    assert_eq!(table.find(mac(u32::MAX), seconds(6)), Some(2));
    check(&table);
}

#[test]
fn a_full_table_takes_from_the_busiest_port() {
    let mut table = MacTable::new(AGE);
    let mut next = 0..;
    let mut learn = |table: &mut MacTable, port, count| {
        for n in next.by_ref().take(count) {
            table.learn(mac(n), port, seconds(1));
        }
    };
    learn(&mut table, 100, 3);
    for port in 0..8 {
        learn(&mut table, port, MAX_MACS_PER_PORT);
    }
    learn(&mut table, 101, 500);
    assert_eq!(table.entries.len(), MAX_MACS);
    assert_eq!(table.by_age[&100].len(), 3);
    assert_eq!(table.by_age[&101].len(), 500);
    check(&table);
}

#[test]
fn flushes_one_port_only_and_learns_no_groups() {
    let mut table = MacTable::new(AGE);
    table.learn(mac(1), 1, seconds(0));
    table.learn(mac(2), 2, seconds(0));
    table.learn([1, 0, 0x5e, 0, 0, 1], 1, seconds(0));
    table.learn([0xff; 6], 1, seconds(0));
    assert_eq!(table.entries.len(), 2);
    table.flush(1);
    table.flush(9);
    assert_eq!(table.find(mac(1), seconds(0)), None);
    assert_eq!(table.find(mac(2), seconds(0)), Some(2));
    check(&table);
}
