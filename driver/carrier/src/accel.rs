//! Decides where machines run, and re-runs a command there.

use std::ffi::OsString;
use std::str::FromStr;

use firn::log::colours_wanted;
use firn_vmm::probe::{self, KvmStatus};
use thiserror::Error;

use crate::{CarrierError, Options, exec};

/// Where machines run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// On KVM if it works here, else in the carrier.
    #[default]
    Auto,
    /// On KVM only.
    Kvm,
    /// In the carrier.
    Carrier,
    /// Here, where firn's own may not start; those under QEMU do.
    None,
}

/// The decision.
#[derive(Debug, PartialEq)]
enum Decision {
    Here,
    /// In the carrier; with the reason, unless the user asked for it.
    Carrier(Option<String>),
    Refused(String),
}

/// KVM was asked for and does not work.
#[derive(Debug, Error)]
#[error("{0}; `--accel carrier` does not need it")]
pub struct NoKvm(String);

impl FromStr for Accel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|accel| accel.as_str() == name).ok_or_else(|| {
            format!("{name:?} is not an accelerator; allowed: auto, kvm, carrier, none")
        })
    }
}

impl Accel {
    /// All, in the order of the help text.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Kvm, Self::Carrier, Self::None];

    /// The name that users type.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Carrier => "carrier",
            Self::None => "none",
        }
    }

    /// Its help text.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Auto => "On KVM if it works here, else in the carrier",
            Self::Kvm => "On KVM only",
            Self::Carrier => "In the carrier",
            Self::None => "Here, without a look at KVM, which machines under QEMU do without",
        }
    }

    /// Whether machines can run in this process. If not, the command must [`run_again`] in the carrier; unless the user
    /// asked for that, this prints the reason on stderr.
    ///
    /// # Errors
    /// If they should run on KVM and it does not work.
    pub fn runs_here(self) -> Result<bool, NoKvm> {
        // The probe takes a moment, and the carrier does not need it.
        let decision = match self {
            Self::Carrier => Decision::Carrier(None),
            Self::None => Decision::Here,
            Self::Auto | Self::Kvm => self.decide_by(&probe::kvm()),
        };
        match decision {
            Decision::Here => Ok(true),
            Decision::Refused(reason) => Err(NoKvm(reason)),
            Decision::Carrier(reason) => {
                if let Some(reason) = reason {
                    eprintln!("{reason}: using the carrier");
                }
                Ok(false)
            }
        }
    }

    fn decide_by(self, kvm: &KvmStatus) -> Decision {
        match self {
            Self::Carrier => Decision::Carrier(None),
            Self::None => Decision::Here,
            _ if kvm.usable() => Decision::Here,
            Self::Auto => Decision::Carrier(Some(kvm.to_string())),
            Self::Kvm => Decision::Refused(kvm.to_string()),
        }
    }
}

/// The directory where runs in a carrier keep their state.
pub(crate) const STATE_DIR: &str = "/dev/shm";

/// Runs a command that runs machines in a carrier, and returns its exit status.
///
/// # Errors
/// If the carrier cannot be started or breaks down.
pub fn run_again(
    options: &Options,
    command: impl IntoIterator<Item = OsString>,
) -> Result<u8, CarrierError> {
    // Sockets and state belong on the carrier's own file system, away from what users of the host have put into their
    // /tmp, and it has a pipe for stderr.
    let mut argv: Vec<OsString> = vec!["env".into(), format!("TMPDIR={STATE_DIR}").into()];
    if colours_wanted(&std::io::stderr()) {
        argv.push("CLICOLOR_FORCE=1".into());
    }
    argv.extend(command);
    exec(options, argv)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_what_works() {
        let slow = KvmStatus::Interpreting { per_second: 1.6e6 };
        let fast = KvmStatus::Usable { per_second: 3e9 };
        assert_eq!(Accel::Auto.decide_by(&fast), Decision::Here);
        assert_eq!(Accel::Auto.decide_by(&slow), Decision::Carrier(Some(slow.to_string())));
        assert_eq!(
            Accel::Auto.decide_by(&KvmStatus::Absent),
            Decision::Carrier(Some("/dev/kvm does not exist".into()))
        );
        assert_eq!(Accel::Kvm.decide_by(&slow), Decision::Refused(slow.to_string()));
        assert_eq!(Accel::Carrier.decide_by(&fast), Decision::Carrier(None));
        assert_eq!(Accel::None.decide_by(&slow), Decision::Here);
    }
}
