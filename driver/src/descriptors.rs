//! The process's limit on open files, and each machine's part of it.
//!
//! All machines of a run live in this process, and guests make it open files: one for each remembered file of a share,
//! one for each connection. Each machine has a part of its own, and there is a reserve: with all guests at their
//! limits, the driver and every guest still work.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The most that the process asks for: the usual system limit (`man 5 proc`, `nr_open`).
const MOST: u64 = 1 << 20;
/// The driver's reserve: at most this, and at most a fourth.
const RESERVE: u64 = 1024;
/// The most that a user network needs.
const NETWORK: u64 = 5248;

/// A machine's part, returned when dropped.
#[derive(Debug)]
pub(crate) struct Part {
    size: u64,
    pool: &'static Pool,
}

/// The unassigned part.
#[derive(Debug)]
struct Pool(Mutex<u64>);

impl Part {
    /// How many files its user network may open.
    pub(crate) fn network(&self) -> usize {
        usize::try_from(self.network_part()).unwrap_or(usize::MAX)
    }

    /// How many files its monitor may open.
    pub(crate) fn monitor(&self) -> u64 {
        self.size - self.network_part()
    }

    fn network_part(&self) -> u64 {
        (self.size / 4).min(NETWORK)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        *self.pool.free() += self.size;
    }
}

impl Pool {
    fn free(&self) -> std::sync::MutexGuard<'_, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Equal parts of three fourths of what is free; the rest is for later machines.
    fn parts(&'static self, count: usize) -> Vec<Arc<Part>> {
        let mut free = self.free();
        let machines = u64::try_from(count).unwrap_or(u64::MAX);
        let size = (*free / 4 * 3).checked_div(machines).unwrap_or(0);
        *free -= size * machines;
        std::iter::repeat_with(|| Arc::new(Part { size, pool: self })).take(count).collect()
    }

    /// Half of what is free, so that something is always left.
    fn part(&'static self) -> Arc<Part> {
        let mut free = self.free();
        let size = *free / 2;
        *free -= size;
        Arc::new(Part { size, pool: self })
    }
}

/// Returns a quota for each machine of a test.
pub(crate) fn parts(count: usize) -> Vec<Arc<Part>> {
    of_process().parts(count)
}

/// Returns a quota for one more machine.
pub(crate) fn part() -> Arc<Part> {
    of_process().part()
}

fn of_process() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let limit = raised();
        Pool(Mutex::new(limit - RESERVE.min(limit / 4)))
    })
}

/// Returns the process's limit, raised as far as permitted.
fn raised() -> u64 {
    // POSIX guarantees 20, should the limit be unknown.
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 20 };
    let wanted = hard.min(MOST);
    if soft < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).is_ok() {
        return wanted;
    }
    soft.min(MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(size: u64) -> &'static Pool {
        Box::leak(Box::new(Pool(Mutex::new(size))))
    }

    #[test]
    fn each_machine_has_its_part_and_there_is_one_for_the_next() {
        let pool = pool(8000);
        let test = pool.parts(3);
        assert!(test.iter().all(|part| part.size == 2000));
        let more: Vec<_> = (0..3).map(|_| pool.part()).collect();
        assert_eq!(more.iter().map(|part| part.size).collect::<Vec<_>>(), [1000, 500, 250]);
        drop(test);
        assert_eq!(*pool.free(), 6250);
        drop(more);
        assert_eq!(*pool.free(), 8000);
        assert!(pool.parts(0).is_empty());
    }

    #[test]
    fn a_part_is_divided_without_rest() {
        for size in [0, 1, 100, 1 << 20] {
            let part = &pool(2 * size).part();
            assert_eq!(part.monitor() + u64::try_from(part.network()).expect("it fits"), size);
        }
        let large = pool(1 << 20).part();
        assert_eq!(u64::try_from(large.network()), Ok(NETWORK));
    }

    #[test]
    fn the_process_has_more_than_its_machines() {
        let limit = raised();
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        assert!(limit <= soft && *of_process().free() < limit, "{limit} of {soft}");
    }
}
