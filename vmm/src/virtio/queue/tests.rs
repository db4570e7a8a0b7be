use std::io::{Read, Write};

use super::*;
use crate::virtio::testing::{
    DriverQueue, Guest, HOSTILE_MEMORY, INDIRECT, NEXT, Part, WRITE, hostile_ring, raw_descriptor,
};
use proptest::prelude::*;

const EVENT_IDX: u64 = 1 << 29;

/// Copies the readable part of a chain to its writable part.
fn echo(chain: Chain, memory: &Memory) -> Served {
    let (Ok(mut reader), Ok(mut writer)) = (chain.clone().reader(memory), chain.writer(memory))
    else {
        return Served::Done(0);
    };
    let mut data = vec![0; reader.available_bytes().min(writer.available_bytes()).min(1 << 16)];
    reader.read_exact(&mut data).unwrap();
    writer.write_all(&data).unwrap();
    Served::Done(u32::try_from(data.len()).unwrap())
}

fn serve_echo(queue: &mut VirtQueue) -> Result<(), QueueError> {
    let memory = Arc::clone(queue.memory());
    queue.serve(|chain| echo(chain, &memory))
}

#[test]
fn chains_are_served_in_order_over_many_laps() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(3, 8);
    for lap in 0..70_000_u32 / 4 {
        let sent: Vec<u16> = (0..4_u32)
            .map(|i| driver.add(&[Part::Read(&(lap * 4 + i).to_le_bytes()), Part::Write(4)]))
            .collect();
        serve_echo(&mut queue).unwrap();
        let used = driver.all_used();
        assert_eq!(used.iter().map(|used| used.head).collect::<Vec<_>>(), sent);
        assert_eq!(used[3].data, (lap * 4 + 3).to_le_bytes());
    }
    assert_eq!(guest.interrupt.take_queue(3), 70_000 / 4);
}

#[test]
fn a_stopped_chain_is_served_again() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    let heads = [driver.add(&[Part::Write(1)]), driver.add(&[Part::Write(1)])];
    let mut seen = Vec::new();
    queue
        .serve(|chain| {
            seen.push(chain.head_index());
            if seen.len() == 2 { Served::Stop } else { Served::Done(0) }
        })
        .unwrap();
    queue
        .serve(|chain| {
            seen.push(chain.head_index());
            Served::Done(0)
        })
        .unwrap();
    assert_eq!(seen, [heads[0], heads[1], heads[1]]);
    assert_eq!(driver.all_used().len(), 2);
}

#[test]
fn deferred_chains_complete_in_any_order() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    let heads = [driver.add(&[Part::Write(2)]), driver.add(&[Part::Write(2)])];
    queue.serve(|_| Served::Deferred).unwrap();
    assert_eq!(driver.used(), None);
    assert_eq!(guest.interrupt.take_queue(0), 0, "nothing was given back");
    queue.complete(heads[1], 2).unwrap();
    queue.complete(heads[0], 0).unwrap();
    assert_eq!(guest.interrupt.take_queue(0), 2);
    let order: Vec<u16> = driver.all_used().iter().map(|used| used.head).collect();
    assert_eq!(order, [heads[1], heads[0]]);
}

#[test]
fn the_driver_can_ask_for_no_interrupts() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    driver.set_flags(1);
    driver.add(&[Part::Write(1)]);
    serve_echo(&mut queue).unwrap();
    assert_eq!(guest.interrupt.take_queue(0), 0);
    driver.set_flags(0);
    serve_echo(&mut queue).unwrap();
    assert_eq!(guest.interrupt.take_queue(0), 0, "nothing new was given back");
    driver.add(&[Part::Write(1)]);
    serve_echo(&mut queue).unwrap();
    assert_eq!(guest.interrupt.take_queue(0), 1);
}

#[test]
fn the_event_index_spares_interrupts_and_notifications() {
    let guest = Guest::new();
    let mut driver = guest.driver(0, 8);
    let mut queue = driver.device(EVENT_IDX, Position::default());
    driver.set_used_event(2);
    for expected in [0, 0, 1, 0] {
        driver.add(&[Part::Write(1)]);
        serve_echo(&mut queue).unwrap();
        assert_eq!(guest.interrupt.take_queue(0), expected);
    }
    assert_eq!(driver.avail_event(), 4, "ring for the next chain");
}

#[test]
fn a_queue_goes_on_from_its_position() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    driver.add(&[Part::Read(b"a"), Part::Write(1)]);
    serve_echo(&mut queue).unwrap();
    driver.add(&[Part::Read(b"b"), Part::Write(1)]);
    let position = queue.position();
    assert_eq!(position, Position { next_avail: 1, next_used: 1 });
    drop(queue);
    serve_echo(&mut driver.device(0, position)).unwrap();
    let data: Vec<_> = driver.all_used().into_iter().map(|used| used.data).collect();
    assert_eq!(data, [b"a", b"b"]);
}

#[test]
fn indirect_tables_are_followed_once() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    let (text, answer, table) = (guest.alloc(2), guest.alloc(2), guest.alloc(32));
    guest.write(text, b"hi");
    guest.write(table, &raw_descriptor(text, 2, NEXT, 1));
    guest.write(table + 16, &raw_descriptor(answer, 2, WRITE, 0));
    driver.set_descriptor(0, table, 32, INDIRECT, 0);
    driver.offer(0);
    serve_echo(&mut queue).unwrap();
    assert_eq!(guest.read(answer, 2), b"hi");

    // A table in a table ends the chain.
    guest.write(table, &raw_descriptor(table, 32, INDIRECT, 0));
    driver.offer(0);
    let mut descriptors = None;
    queue
        .serve(|chain| {
            descriptors = Some(chain.count());
            Served::Done(0)
        })
        .unwrap();
    assert_eq!(descriptors, Some(0));
}

#[test]
fn a_loop_of_descriptors_ends() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    driver.set_descriptor(0, 0x2000, 1, NEXT, 1);
    driver.set_descriptor(1, 0x2000, 1, NEXT, 0);
    driver.offer(0);
    let mut descriptors = 0;
    queue
        .serve(|chain| {
            descriptors += chain.count();
            Served::Done(0)
        })
        .unwrap();
    assert_eq!(descriptors, 8, "no more than the table has");
}

#[test]
fn more_chains_than_places_break_the_queue() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    driver.set_available(9);
    assert!(matches!(serve_echo(&mut queue), Err(QueueError::BadAvailable)));
}

#[test]
fn a_head_outside_the_table_breaks_the_queue_when_given_back() {
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 8);
    driver.offer(8);
    assert!(serve_echo(&mut queue).is_err());
}

#[test]
fn rings_outside_memory_are_refused() {
    let guest = Guest::with_memory(0x8000);
    let interrupt = Arc::clone(&guest.interrupt) as Arc<dyn Interrupt>;
    for (table, avail, used) in
        [(0x7ff0, 0x1000, 0x2000), (0x1000, 0x7ffe, 0x2000), (0x1000, 0x2000, u64::MAX - 3)]
    {
        let mut queue = Queue::new(8).unwrap();
        queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_ready(true);
        let memory = Arc::clone(&guest.memory);
        let queue = VirtQueue::new(0, queue, memory, Arc::clone(&interrupt));
        assert!(matches!(queue, Err(QueueError::BadRings)));
    }
}

proptest! {
    /// However a driver fills its rings, each chain offered is looked at once and in bounds.
    #[test]
    fn hostile_rings_cost_bounded_work(
        rings in prop::collection::vec(hostile_ring(), 1..4),
        features in prop_oneof![Just(0), Just(EVENT_IDX)],
    ) {
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let mut driver: DriverQueue = guest.driver(0, 16);
        let mut queue = driver.device(features, Position::default());
        for ring in &rings {
            driver.corrupt(ring);
            let mut served = 0_u32;
            let memory = Arc::clone(&guest.memory);
            // Only reads: a device that writes over the rings may find new chains, a bounded
            // number for each write.
            let _ = queue.serve(|chain| {
                served += 1;
                let bytes = chain.reader(&memory).map_or(0, |reader| reader.available_bytes());
                assert!(bytes <= 16 * HOSTILE_MEMORY.max(1 << 16) * 16);
                Served::Done(0)
            });
            prop_assert!(served <= 1 << 16, "{served} chains");
        }
    }
}
