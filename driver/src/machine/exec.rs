//! Runs commands in the guest.

use std::borrow::Cow;
use std::time::Duration;

use super::Machine;
use super::session::Command;
use crate::error::{Error, MachineError, Result};
use crate::retry::retry;

/// How long a command may run unless its caller says otherwise, and how long a wait may take.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(900);
/// How long a command's output may stay open after its end before the log says so.
const LINGER: Duration = Duration::from_secs(2);

/// What the last probe of a wait may take at least, be its budget as small as it will.
const LAST_PROBE: Duration = Duration::from_secs(5);

/// Characters of a command that messages show.
const SHOWN: usize = 1000;

/// What the last probe of a wait with this budget may take.
pub(super) fn last_probe(budget: Duration) -> Duration {
    budget.max(LAST_PROBE)
}

/// How [`Machine::execute`] runs a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecOptions {
    /// Whether to answer the command's exit status; otherwise it is -1, also if the machine ends meanwhile.
    pub check_return: bool,
    /// Whether to wait for the command and its output; otherwise the answer is -2 and no output, at once.
    pub check_output: bool,
    /// After this long the command is killed, and its status is 124. Zero is no limit, as `timeout` has it.
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

    /// The answer to who does not ask how the command ended.
    fn unasked(self) -> Option<(i32, String)> {
        match (self.check_output, self.check_return) {
            (false, _) => Some((-2, String::new())),
            (true, false) => Some((-1, String::new())),
            (true, true) => None,
        }
    }
}

impl Machine {
    /// Runs a shell command as root. Waits until its standard output is closed, and answers its status and
    /// what it printed there, which may be 256 MiB at most. Its standard error goes to the guest's console.
    ///
    /// # Errors
    /// If the machine cannot be started, or ends, or loses its agent.
    pub async fn execute(&self, command: &str, options: ExecOptions) -> Result<(i32, String)> {
        let session = self.session().await?;
        // What bash reads it reads without NUL bytes.
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
            // `poweroff -f`, say.
            (
                Err(Error::Machine(MachineError::Ended { .. } | MachineError::AgentLost { .. })),
                Some(unasked),
            ) => Ok(unasked),
            (answer, _) => answer,
        }
    }

    /// Runs commands that must all exit with 0, and answers their outputs joined.
    ///
    /// # Errors
    /// [`Error::Assertion`] if one does not; else as [`Self::execute`].
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

    /// Runs commands none of which may exit with 0, and answers their outputs joined.
    ///
    /// # Errors
    /// [`Error::Assertion`] if one does; else as [`Self::execute`].
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

    /// Runs a command each second until it exits with 0, and answers its output then. A try that takes longer
    /// than `attempt_timeout` is given up.
    ///
    /// # Errors
    /// [`Error::Assertion`] if it does not within `timeout`; else as [`Self::execute`].
    pub async fn wait_until_succeeds(
        &self,
        command: &str,
        timeout: Duration,
        attempt_timeout: Option<Duration>,
    ) -> Result<String> {
        let _step = self.nested(format_args!("waiting for success: {}", shown(command)));
        self.try_until(command, timeout, attempt_timeout, |status| status == 0).await
    }

    /// Runs a command each second until it does not exit with 0, and answers its output then. A try that takes
    /// longer than `attempt_timeout` is given up, and counts as failed.
    ///
    /// # Errors
    /// [`Error::Assertion`] if it always does within `timeout`; else as [`Self::execute`].
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
            // A try without a limit of its own has what is left of the budget.
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
    /// As [`Self::succeed`].
    pub async fn sleep(&self, time: Duration) -> Result<()> {
        let command = format!("sleep {}", time.as_secs_f64());
        self.succeed(&[&command], None).await.map(drop)
    }
}

/// A command as messages show it: of a long one the beginning.
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
