//! Calls about the serial console.

use std::time::Duration;

use regex::Regex;

use super::Machine;
use crate::error::Result;

impl Machine {
    /// Everything the guest has printed on its serial console since its start.
    #[must_use]
    pub fn get_console_log(&self) -> String {
        self.inner.console.text()
    }

    /// Types into the guest's serial console.
    ///
    /// # Errors
    /// If the machine is not running.
    pub async fn send_console(&self, chars: &str) -> Result<()> {
        self.send_console_bytes(chars.as_bytes().to_vec()).await
    }

    /// Types bytes into the guest's serial console.
    ///
    /// # Errors
    /// If the machine is not running or does not accept them.
    pub async fn send_console_bytes(&self, bytes: Vec<u8>) -> Result<()> {
        self.run()?;
        self.inner.backend.type_in(bytes).await
    }

    /// Consumes and returns the next line of the serial console.
    ///
    /// # Errors
    /// If none comes within `timeout`.
    pub async fn next_console_line(&self, timeout: Duration) -> Result<String> {
        self.inner.console.next_line(timeout).await
    }

    /// The number of lines of the serial console not consumed yet.
    #[must_use]
    pub fn console_lines_left(&self) -> usize {
        self.inner.console.lines_left()
    }

    /// Waits until the regular expression matches the serial console's output that no earlier call has
    /// consumed. Consumes the output up to the end of the match's line.
    ///
    /// # Errors
    /// If it does not match within `timeout`, or the guest ends.
    pub async fn wait_for_console_text(
        &self,
        regex: &Regex,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let find = |text: &str| Ok(regex.find(text).map(|found| found.end()));
        self.wait_for_console(regex.as_str(), find, timeout).await
    }

    /// The same for any search: `find` returns where in the text its match ends. `what` is for the log.
    ///
    /// # Errors
    /// Those of [`Self::wait_for_console_text`] and of `find`.
    pub async fn wait_for_console(
        &self,
        what: &str,
        find: impl FnMut(&str) -> Result<Option<usize>>,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let _step = self.nested(format_args!("waiting for {what} to appear on console"));
        self.unless_ended(self.inner.console.wait_for_text(find, timeout)).await
    }
}
