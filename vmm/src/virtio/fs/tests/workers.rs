use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use virtiofsd::fuse::{InHeader, Opcode};
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::EventFd;

use super::super::server::{Fuse, Session, is_quick};
use crate::event_loop::new_event;
use crate::virtio::DeviceError;
use crate::virtio::pool::Pool;
use crate::virtio::queue::Chain;
use crate::virtio::testing::{DriverQueue, Guest, Part};

/// Tells who serves each request, and answers when told to; `None` makes it panic.
struct Puppet {
    began: Mutex<Sender<ThreadId>>,
    orders: Mutex<Receiver<Option<u32>>>,
}

impl Fuse for Puppet {
    fn serve(&self, _chain: &Chain) -> u32 {
        let began = self.began.lock().unwrap();
        began.send(thread::current().id()).unwrap();
        drop(began);
        let order = self.orders.lock().unwrap().recv().unwrap();
        order.expect("ordered to panic")
    }
    fn serve_quickly(&self, chain: &Chain) -> Option<u32> {
        is_quick(chain).then(|| self.serve(chain))
    }
    fn end_session(&self) {}
    fn save(&self) -> Session {
        Session::Unmounted
    }
    fn restore(&self, _session: &Session) -> io::Result<()> {
        Ok(())
    }
}

struct Stage {
    driver: DriverQueue,
    pool: Pool,
    alarm: Arc<EventFd>,
    began: Receiver<ThreadId>,
    orders: Sender<Option<u32>>,
}

fn stage() -> Stage {
    let guest = Guest::new();
    let (driver, queue) = guest.queue(0, 256);
    let (tell, began) = channel();
    let (orders, listen) = channel();
    let puppet = Puppet { began: Mutex::new(tell), orders: Mutex::new(listen) };
    let alarm = Arc::new(new_event().unwrap());
    let server: Arc<dyn Fuse> = Arc::new(puppet);
    let pool = Pool::new("test".into(), Box::new(server), Arc::clone(&alarm), vec![Some(queue)]);
    Stage { driver, pool, alarm, began, orders }
}

#[test]
fn ringing_does_not_wait_and_draining_does() {
    let mut stage = stage();
    for _ in 0..3 {
        stage.driver.add(&[Part::Write(8)]);
    }
    stage.pool.run().unwrap();
    stage.began.recv().unwrap();
    assert_eq!(stage.driver.used(), None);
    let orders = stage.orders.clone();
    thread::scope(|scope| {
        let drained = scope.spawn(|| stage.pool.drain());
        assert!(!drained.is_finished());
        for written in 1..=3 {
            orders.send(Some(written)).unwrap();
        }
        drained.join().unwrap();
    });
    let mut written: Vec<u32> = stage.driver.all_used().iter().map(|used| used.len).collect();
    written.sort_unstable();
    assert_eq!(written, [1, 2, 3]);
}

#[test]
fn a_panic_costs_the_device_and_gives_the_chain_back() {
    let mut stage = stage();
    let head = stage.driver.add(&[Part::Write(8)]);
    stage.pool.run().unwrap();
    stage.orders.send(None).unwrap();
    stage.began.recv().unwrap();
    stage.pool.drain();
    let used = stage.driver.used().unwrap();
    assert_eq!((used.head, used.len), (head, 0));
    assert_eq!(stage.alarm.read().unwrap(), 1);
    assert!(matches!(stage.pool.run(), Err(DeviceError::Request(_))));
    // From here on it leaves the queue alone.
    stage.driver.add(&[Part::Write(8)]);
    stage.pool.run().unwrap();
    stage.pool.drain();
    assert_eq!(stage.driver.used(), None);
}

fn getattr() -> InHeader {
    InHeader { opcode: Opcode::Getattr as u32, ..Default::default() }
}

#[test]
fn quick_requests_are_served_by_the_one_who_rings() {
    let mut stage = stage();
    stage.driver.add(&[Part::Read(getattr().as_slice())]);
    stage.orders.send(Some(0)).unwrap();
    stage.pool.run().unwrap();
    assert!(stage.driver.used().is_some());
    assert_eq!(stage.began.recv().unwrap(), thread::current().id());

    stage.driver.add(&[Part::Write(8)]);
    stage.orders.send(Some(8)).unwrap();
    stage.pool.run().unwrap();
    stage.pool.drain();
    assert_ne!(stage.began.recv().unwrap(), thread::current().id());
}

#[test]
fn who_rings_is_let_go_after_a_while() {
    let mut stage = stage();
    for _ in 0..100 {
        stage.driver.add(&[Part::Read(getattr().as_slice())]);
        stage.orders.send(Some(0)).unwrap();
    }
    stage.pool.run().unwrap();
    stage.pool.drain();
    assert_eq!(stage.driver.all_used().len(), 100);
    let me = thread::current().id();
    assert_eq!(stage.began.try_iter().filter(|&id| id == me).count(), 64);
}

#[test]
fn a_panic_on_the_ringing_thread_costs_the_device_too() {
    let mut stage = stage();
    stage.driver.add(&[Part::Read(getattr().as_slice())]);
    stage.orders.send(None).unwrap();
    assert!(matches!(stage.pool.run(), Err(DeviceError::Request(_))));
    assert_eq!(stage.driver.used().unwrap().len, 0);
}

#[test]
fn broken_rings_are_told_to_the_one_who_rings() {
    let mut stage = stage();
    stage.driver.set_available(1000);
    assert!(matches!(stage.pool.run(), Err(DeviceError::Queue { index: 0, .. })));
    stage.pool.drain();
}

#[test]
fn dropping_finishes_what_is_under_way() {
    let mut stage = stage();
    stage.driver.add(&[Part::Write(8)]);
    stage.pool.run().unwrap();
    stage.began.recv().unwrap();
    stage.orders.send(Some(7)).unwrap();
    drop(stage.pool);
    assert_eq!(stage.driver.used().unwrap().len, 7);
}
