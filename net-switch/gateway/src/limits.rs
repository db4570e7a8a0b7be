//! How much a guest may have open at a time.

/// All descriptors that the limits below add up to.
const ALL: usize = CONNECTIONS + FLOWS + QUESTIONS;
/// Most connections.
const CONNECTIONS: usize = 4096;
/// Most flows of datagrams.
const FLOWS: usize = 1024;
/// Most questions about names.
const QUESTIONS: usize = 128;

/// Most of everything. What is new comes in, and what has waited for longest makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Connections.
    pub connections: usize,
    /// Connections among them that one side has not answered yet.
    pub half_open: usize,
    /// Those to one address.
    pub half_open_to_one: usize,
    /// Sockets for datagrams.
    pub sockets: usize,
    /// Flows of datagrams. Fewer than sockets, for one that made room takes a moment to close.
    pub flows: usize,
    /// Questions about names.
    pub questions: usize,
}

impl Limits {
    /// The limits of a gateway that may have `descriptors` open.
    pub fn new(descriptors: usize) -> Self {
        let part = |most: usize| most.min(most.saturating_mul(descriptors) / ALL).max(1);
        let connections = part(CONNECTIONS);
        let sockets = part(FLOWS);
        Self {
            connections,
            half_open: connections.div_ceil(4),
            half_open_to_one: connections.div_ceil(8),
            sockets,
            flows: sockets - sockets / 4,
            questions: part(QUESTIONS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_stays_within_the_descriptors() {
        for descriptors in [10, 64, 1000, ALL, 1_000_000, usize::MAX] {
            let limits = Limits::new(descriptors);
            let all = limits.connections + limits.sockets + limits.questions;
            assert!(all <= descriptors.min(ALL), "{descriptors}: {limits:?}");
            assert!(limits.half_open_to_one <= limits.half_open, "{limits:?}");
            assert!(limits.half_open <= limits.connections && limits.flows > 0, "{limits:?}");
        }
        assert_eq!(Limits::new(usize::MAX).connections, CONNECTIONS);
    }
}
