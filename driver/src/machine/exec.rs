//! Runs commands in the guest.

use std::borrow::Cow;
use std::time::Duration;

use super::Machine;
use super::session::Command;
use crate::error::{Error, MachineError, Result};
use crate::retry::retry;

/// The default timeout of commands and waits.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(900);
/// How long a command's output may stay open after its exit before the log mentions it.
const LINGER: Duration = Duration::from_secs(2);

/// The least time that the last attempt of a wait gets, however small its budget.
const LAST_PROBE: Duration = Duration::from_secs(5);

/// How many characters of a command messages show.
const SHOWN: usize = 1000;

/// The time that the last attempt of a wait with this budget gets.
pub(super) fn last_probe(budget: Duration) -> Duration {
    budget.max(LAST_PROBE)
}

/// How [`Machine::execute`] runs a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecOptions {
    /// Whether to return the command's exit status. If not, it is -1, even if the machine ends meanwhile.
    pub check_return: bool,
    /// Whether to wait for the command and its output. If not, the call returns -2 and no output at once.
    pub check_output: bool,
    /// The command is killed after this time, and its status is 124. Zero means no limit, as for `timeout`.
    pub timeout: Option<Duration>,
}

impl Default for ExecOptions {
    fn default() -> Self {
        Self { check_return: true, check_output: true, timeout: Some(DEFAULT_TIMEOUT) }
    }
}

impl ExecOptions {
    fn with_timeout(timeout: Option<Duration>) -> Self {
        Self { timeout, ..Self::default() }
    }

    /// The status returned if the command's own is not wanted.
    fn unasked(self) -> Option<(i32, String)> {
        match (self.check_output, self.check_return) {
            (false, _) => Some((-2, String::new())),
            (true, false) => Some((-1, String::new())),
            (true, true) => None,
        }
    }
}

impl Machine {
    /// Runs a shell command as root. Waits until its standard output is closed, and returns its status and output, at
    /// most 256 MiB. Its standard error goes to the guest's console.
    ///
    /// # Errors
    /// If the machine cannot be started, ends, or loses its agent.
    pub async fn execute(&self, command: &str, options: ExecOptions) -> Result<(i32, String)> {
        let session = self.session().await?;
        // bash ignores NUL bytes in what it reads.
        let script = command.replace('\0', "");
        let timeout = options.timeout.filter(|timeout| !timeout.is_zero());
        let run = async {
            let command_line = Command { script: session.as_argument(script).await?, timeout };
            if !options.check_output {
                session.spawn(command_line).await?;
                return Ok((-2, String::new()));
            }
            let lingering = || {
                self.inner.log.warning(format_args!(
                    "command `{}` has ended, but something still holds its standard output open; \
                     waiting for that",
                    shown(command)
                ));
            };
            let output = session.run(command_line, LINGER, lingering).await?;
            let status = if options.check_return { output.status } else { -1 };
            let stdout = String::from_utf8(output.stdout);
            let stdout =
                stdout.unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
            Ok((status, stdout))
        };
        let answer = self.answered(run, || format!("cannot run `{}`", shown(command))).await;
        match (answer, options.unasked()) {
            // For example `poweroff -f`.
            (
                Err(Error::Machine(MachineError::Ended { .. } | MachineError::AgentLost { .. })),
                Some(unasked),
            ) => Ok(unasked),
            (answer, _) => answer,
        }
    }

    /// Runs commands that must all succeed, and returns their joined output.
    ///
    /// # Errors
    /// [`Error::Assertion`] if one fails; otherwise those of [`Self::execute`].
    pub async fn succeed(&self, commands: &[&str], timeout: Option<Duration>) -> Result<String> {
        let mut all = String::new();
        for command in commands {
            let shown = shown(command);
            let _step = self.nested(format_args!("must succeed: {shown}"));
            let (status, output) =
                self.execute(command, ExecOptions::with_timeout(timeout)).await?;
            if status != 0 {
                self.log(format_args!("output: {output}"));
                return Err(Error::Assertion(format!(
                    "command `{shown}` failed (exit code {status})"
                )));
            }
            all.push_str(&output);
        }
        Ok(all)
    }

    /// Runs commands that must all fail, and returns their joined output.
    ///
    /// # Errors
    /// [`Error::Assertion`] if one succeeds; otherwise those of [`Self::execute`].
    pub async fn fail(&self, commands: &[&str], timeout: Option<Duration>) -> Result<String> {
        let mut all = String::new();
        for command in commands {
            let shown = shown(command);
            let _step = self.nested(format_args!("must fail: {shown}"));
            let (status, output) =
                self.execute(command, ExecOptions::with_timeout(timeout)).await?;
            if status == 0 {
                return Err(Error::Assertion(format!("command `{shown}` unexpectedly succeeded")));
            }
            all.push_str(&output);
        }
        Ok(all)
    }

    /// Runs a command every second until it succeeds, and returns its output. An attempt that takes longer than
    /// `attempt_timeout` is killed.
    ///
    /// # Errors
    /// [`Error::Assertion`] if it does not within `timeout`; otherwise those of [`Self::execute`].
    pub async fn wait_until_succeeds(
        &self,
        command: &str,
        timeout: Duration,
        attempt_timeout: Option<Duration>,
    ) -> Result<String> {
        let _step = self.nested(format_args!("waiting for success: {}", shown(command)));
        self.try_until(command, timeout, attempt_timeout, |status| status == 0).await
    }

    /// Runs a command every second until it fails, and returns its output. An attempt that takes longer than
    /// `attempt_timeout` is killed and counts as failed.
    ///
    /// # Errors
    /// [`Error::Assertion`] if it never fails within `timeout`; otherwise those of [`Self::execute`].
    pub async fn wait_until_fails(
        &self,
        command: &str,
        timeout: Duration,
        attempt_timeout: Option<Duration>,
    ) -> Result<String> {
        let _step = self.nested(format_args!("waiting for failure: {}", shown(command)));
        self.try_until(command, timeout, attempt_timeout, |status| status != 0).await
    }

    async fn try_until(
        &self,
        command: &str,
        timeout: Duration,
        attempt_timeout: Option<Duration>,
        done: impl Fn(i32) -> bool + Sync,
    ) -> Result<String> {
        let clock = &self.inner.clock;
        let deadline = clock.now().saturating_add(timeout);
        let done = &done;
        let probe = |last: bool| async move {
            // An attempt without a limit of its own gets the rest of the budget.
            let left = match last {
                true => last_probe(timeout),
                false => deadline.saturating_sub(clock.now()),
            };
            let limit = attempt_timeout.unwrap_or(left).max(Duration::from_millis(1));
            let (status, output) =
                self.execute(command, ExecOptions::with_timeout(Some(limit))).await?;
            Ok(done(status).then_some(output))
        };
        retry(clock, probe, timeout).await
    }

    /// Sleeps in guest time.
    ///
    /// # Errors
    /// Those of [`Self::succeed`].
    pub async fn sleep(&self, time: Duration) -> Result<()> {
        let command = format!("sleep {}", time.as_secs_f64());
        self.succeed(&[&command], None).await.map(drop)
    }
}

/// A command as messages show it: long ones are cut.
fn shown(command: &str) -> Cow<'_, str> {
    match command.char_indices().nth(SHOWN) {
        None => command.into(),
        Some((end, _)) => format!("{}… ({} bytes in all)", &command[..end], command.len()).into(),
    }
}

/// A word of the shell's language.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
