//! Decides where machines run.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use firn::log::colours_wanted;
use firn_vmm::probe::{self, KvmStatus};

use crate::{CarrierError, Options, exec};

/// Where machines run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// On KVM if it works here, else in the carrier.
    #[default]
    Auto,
    /// On KVM, or not at all.
    Kvm,
    /// In the carrier.
    Carrier,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// KVM.
    Kvm,
    /// The carrier; not because it was asked for if there is a reason.
    Carrier(Option<String>),
    /// It was KVM that was asked for.
    Refused(String),
}

impl FromStr for Accel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|accel| accel.as_str() == name).ok_or_else(|| {
            format!("{name:?} is no place for machines; allowed: auto, kvm, carrier")
        })
    }
}

impl Accel {
    /// All, in the order in which people read of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Kvm, Self::Carrier];

    /// The name people type.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Carrier => "carrier",
        }
    }

    /// What help says of it.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Auto => "On KVM if it works here, else in the carrier",
            Self::Kvm => "On KVM, or not at all",
            Self::Carrier => "In the carrier",
        }
    }

    /// Decides by what this host's KVM can do.
    #[must_use]
    pub fn decide(self) -> Decision {
        match self {
            Self::Carrier => Decision::Carrier(None),
            Self::Auto | Self::Kvm => self.decide_by(&probe::kvm()),
        }
    }

    fn decide_by(self, kvm: &KvmStatus) -> Decision {
        match self {
            Self::Carrier => Decision::Carrier(None),
            _ if kvm.usable() => Decision::Kvm,
            Self::Auto => Decision::Carrier(Some(kvm.to_string())),
            Self::Kvm => Decision::Refused(kvm.to_string()),
        }
    }
}

/// Runs a command that runs machines in a carrier that can write to `writable`; answers its exit status. With
/// `terminal` the command gets all that is typed at this process's terminal, key by key.
///
/// # Errors
/// When the carrier cannot be started or breaks down.
pub fn in_carrier(
    writable: Vec<PathBuf>,
    terminal: bool,
    command: impl IntoIterator<Item = OsString>,
) -> Result<u8, CarrierError> {
    let options = Options { writable, terminal, ..Options::default() };
    // Sockets and state belong on the carrier's own file system, where nothing is that users of the host have put into
    // their /tmp, and it has a pipe for stderr.
    let mut argv: Vec<OsString> = vec!["env".into(), "TMPDIR=/dev/shm".into()];
    if colours_wanted(&std::io::stderr()) {
        argv.push("CLICOLOR_FORCE=1".into());
    }
    argv.extend(command);
    exec(&options, argv)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_what_works() {
        let slow = KvmStatus::Interpreting { per_second: 1.6e6 };
        let fast = KvmStatus::Usable { per_second: 3e9 };
        assert_eq!(Accel::Auto.decide_by(&fast), Decision::Kvm);
        assert_eq!(Accel::Auto.decide_by(&slow), Decision::Carrier(Some(slow.to_string())));
        assert_eq!(
            Accel::Auto.decide_by(&KvmStatus::Absent),
            Decision::Carrier(Some("/dev/kvm does not exist".into()))
        );
        assert_eq!(Accel::Kvm.decide_by(&slow), Decision::Refused(slow.to_string()));
        assert_eq!(Accel::Carrier.decide_by(&fast), Decision::Carrier(None));
    }
}
