//! What machines of the process have in common, for as long as one of them has it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Values by what they were made from.
pub(crate) struct Common<K, T>(Mutex<Vec<(K, Slot<T>)>>);

/// Locked while its value is made: only those wait who want the same.
type Slot<T> = Arc<Mutex<Weak<T>>>;

impl<K: PartialEq, T> Common<K, T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// The value of `key`. If nobody has it, `make` makes it.
    pub(crate) fn get<E>(&self, key: K, make: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let slot = self.slot(key);
        let mut slot = lock(&slot);
        if let Some(value) = slot.upgrade() {
            return Ok(value);
        }
        let value = Arc::new(make()?);
        *slot = Arc::downgrade(&value);
        Ok(value)
    }

    fn slot(&self, key: K) -> Slot<T> {
        let mut slots = lock(&self.0);
        // Whoever makes one holds its slot; nobody else takes one while the list is locked.
        slots.retain(|(_, slot)| Arc::strong_count(slot) > 1 || lock(slot).strong_count() > 0);
        if let Some((_, slot)) = slots.iter().find(|(other, _)| *other == key) {
            return Arc::clone(slot);
        }
        let slot = Slot::default();
        slots.push((key, Arc::clone(&slot)));
        slot
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_value_while_somebody_has_it() {
        let common: Common<u8, u8> = Common::new();
        let get = |key, value| common.get(key, || Ok::<_, ()>(value)).unwrap();
        let first = get(1, 10);
        assert!(Arc::ptr_eq(&first, &get(1, 11)));
        assert_eq!(*get(2, 20), 20);
        drop(first);
        assert_eq!(*get(1, 12), 12);
        assert_eq!(common.get(3, || Err("none")), Err("none"));
        assert_eq!(*get(3, 30), 30);
        get(4, 40);
        assert!(lock(&common.0).len() <= 2, "what nobody has is forgotten");
    }

    #[test]
    fn only_those_wait_who_want_the_same() {
        let common: Common<u8, u8> = Common::new();
        let (begun, begins) = channel();
        let (end, ends) = channel();
        let common = &common;
        thread::scope(|scope| {
            let slow = scope.spawn(move || {
                common.get(1, || {
                    begun.send(()).unwrap();
                    ends.recv_timeout(Duration::from_secs(60)).map(|()| 1)
                })
            });
            begins.recv().unwrap();
            assert_eq!(common.get(2, || Ok::<_, ()>(2)).as_deref(), Ok(&2));
            let same = scope.spawn(|| common.get(1, || Ok::<_, ()>(3)).unwrap());
            end.send(()).unwrap();
            let value = slow.join().unwrap().unwrap();
            assert_eq!((*value, *same.join().unwrap()), (1, 1));
        });
    }
}
