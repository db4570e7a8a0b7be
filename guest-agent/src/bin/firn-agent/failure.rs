//! Error messages for the host and the console.

use std::io;

use firn_guest_agent::protocol::Failure;
use nix::errno::Errno;

/// Says what was attempted when an operation failed.
pub trait Context<T> {
    /// Turns the error into a [`Failure`] that starts with `what`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| {
            let errno = error.raw_os_error();
            let reason = errno.map_or_else(
                || error.to_string(),
                |errno| Errno::from_raw(errno).desc().to_owned(),
            );
            Failure { message: format!("{}: {reason}", what()), errno }
        })
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(io::Error::from).context(what)
    }
}

/// A failure without an error number.
pub fn failure(message: impl Into<String>) -> Failure {
    Failure { message: message.into(), errno: None }
}
