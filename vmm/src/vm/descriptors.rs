//! How many files each part of a machine may have open.

use crate::spec::MachineSpec;
use crate::virtio::vsock;

/// What a machine without devices has open: KVM's files, consoles, the event loop.
const BASE: u64 = 32;
/// What a vCPU has.
const VCPU: u64 = 2;
/// What a device has at most: an event for each queue and for acknowledged interrupts, its own file or socket.
const DEVICE: u64 = 16;
/// What the threads of a share open temporarily.
const SHARE: u64 = 32;
/// What a disk has below it, for the longest chain of backing files.
const BACKING: u64 = 48;
/// The vsock device may use one in this many of the guest's descriptors.
const VSOCK: u64 = 8;

/// How many descriptors the guest can make devices keep open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Each share.
    pub share: u64,
    /// The vsock device.
    pub vsock: usize,
}

impl Parts {
    /// Those of devices that are served to a machine in another process.
    #[must_use]
    pub fn of_served(shares: usize, vsock: bool, descriptors: u64) -> Self {
        Counts { shares: count(shares), vsock, ..Counts::default() }.divide(descriptors)
    }
}

/// The parts of a machine that take descriptors.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    cores: u64,
    shares: u64,
    /// Other devices.
    devices: u64,
    /// Disks that may have backing files.
    backing: u64,
    vsock: bool,
}

impl Counts {
    pub(super) fn of(spec: &MachineSpec) -> Counts {
        let backing = spec.disks.iter().filter(|disk| !disk.backing.is_empty()).count();
        let images = count(spec.shares.iter().filter(|share| share.image).count());
        Counts {
            cores: spec.cores.into(),
            shares: count(spec.shares.len()) - images,
            // A console, an entropy source, a balloon, a vsock, a screen, a keyboard, a tablet.
            devices: images + count(spec.nets.len()) + count(spec.disks.len()) + 7,
            backing: count(backing),
            vsock: spec.vsock.is_some(),
        }
    }

    /// What it needs for itself.
    fn own(self) -> u64 {
        let devices = DEVICE * (self.shares + self.devices);
        BASE + VCPU * self.cores + devices + SHARE * self.shares + BACKING * self.backing
    }

    /// Divides what a machine may have open in all: what it needs itself, and the rest among the devices that open
    /// more at the guest's request.
    pub(super) fn divide(self, descriptors: u64) -> Parts {
        let rest = descriptors.saturating_sub(self.own());
        let vsock = if self.vsock { rest / VSOCK } else { 0 };
        let vsock = vsock.min(count(vsock::MAX_CONNECTIONS));
        Parts {
            share: (rest - vsock).checked_div(self.shares).unwrap_or(0),
            vsock: usize::try_from(vsock).unwrap_or(vsock::MAX_CONNECTIONS),
        }
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_stays_within_its_descriptors() {
        for descriptors in [0, 100, 500, 1000, 100_000, u64::MAX] {
            for shares in 0..9 {
                for vsock in [false, true] {
                    let counts = Counts { cores: 2, shares, devices: 9, backing: 1, vsock };
                    let parts = counts.divide(descriptors);
                    let given = shares * parts.share + count(parts.vsock);
                    let own = counts.own().min(descriptors);
                    assert!(own + given <= descriptors, "{counts:?}: {parts:?} of {descriptors}");
                    assert!(parts.vsock <= vsock::MAX_CONNECTIONS);
                }
            }
        }
        let two = Counts { cores: 1, shares: 2, devices: 5, backing: 0, vsock: true };
        let parts = two.divide(10_000);
        assert_eq!(parts.vsock, 256);
        assert!((4000..5000).contains(&parts.share), "{parts:?}");
        assert_eq!(Counts { vsock: false, ..two }.divide(10_000).vsock, 0);
        let served = Parts::of_served(3, true, 10_000);
        assert!(served.vsock == 256 && (3000..3300).contains(&served.share), "{served:?}");
    }
}
