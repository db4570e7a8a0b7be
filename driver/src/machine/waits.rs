//! Waits for what no event announces: ports, sockets, files, a terminal's contents.
//!
//! Over the agent the guest itself polls, many times a second; over the backdoor's shell, which serves one call at a
//! time, each poll is a call, once a second.

use std::time::Duration;

use super::Machine;
use super::exec::{ExecOptions, last_probe, quote};
use super::session::{AgentSession, Session};
use crate::error::Result;
use crate::retry::{retry, timed_out};
use firn_agent_client::Condition;

/// Status of a command that timed out.
const TIMED_OUT: i32 = 124;
/// Timeout for a probe of a port that does not answer, in seconds.
const PROBE_SECONDS: u32 = 5;
/// How long a single poll by the agent may take.
const LOOK: Duration = Duration::from_secs(2);
/// Defines `nap`: bash can wait by itself, other shells have to start a program.
const NAP: &str = r#"nap() { sleep 0.05; }
if [ -n "${BASH_VERSION-}" ]; then eval 'exec {tick}<> <(:); nap() { read -rt 0.01 -u "$tick" || :; }'; fi"#;

impl Machine {
    /// Waits until `path`, which the guest's shell expands, exists.
    ///
    /// # Errors
    /// [`crate::Error::Assertion`] if it does not within `timeout`; otherwise those of [`Machine::execute`].
    pub async fn wait_for_file(&self, path: &str, timeout: Duration) -> Result<()> {
        let _step = self.nested(format_args!("waiting for file '{path}'"));
        let condition = is_plain(path).then(|| Condition::Exists(path.into()));
        self.wait_until(condition, &format!("test -e {path}"), timeout).await
    }

    /// Waits until something listens on a TCP port of `address`.
    ///
    /// # Errors
    /// Those of [`Self::wait_for_file`].
    pub async fn wait_for_open_port(
        &self,
        port: u16,
        address: &str,
        timeout: Duration,
    ) -> Result<()> {
        let _step = self.nested(format_args!("waiting for TCP port {port} on {address}"));
        let condition = Condition::PortOpen { host: address.to_owned(), port };
        self.wait_until(Some(condition), &probe_port(port, address), timeout).await
    }

    /// Waits until nothing listens on a TCP port of `address`.
    ///
    /// # Errors
    /// Those of [`Self::wait_for_file`].
    pub async fn wait_for_closed_port(
        &self,
        port: u16,
        address: &str,
        timeout: Duration,
    ) -> Result<()> {
        let _step =
            self.nested(format_args!("waiting for TCP port {port} on {address} to be closed"));
        let condition = Condition::PortClosed { host: address.to_owned(), port };
        let script = format!("! {}", probe_port(port, address));
        self.wait_until(Some(condition), &script, timeout).await
    }

    /// Waits until something listens on a UNIX datagram or stream socket. The guest's shell expands `path`.
    ///
    /// # Errors
    /// Those of [`Self::wait_for_file`].
    pub async fn wait_for_open_unix_socket(
        &self,
        path: &str,
        is_datagram: bool,
        timeout: Duration,
    ) -> Result<()> {
        let _step = self.nested(format_args!("waiting for UNIX socket {path}"));
        let kind = if is_datagram { "-uU" } else { "-U" };
        let condition = is_plain(path)
            .then(|| Condition::SocketOpen { path: path.into(), datagram: is_datagram });
        self.wait_until(condition, &format!("nc -z {kind} {path}"), timeout).await
    }

    /// The lines of a virtual terminal of the guest. Empty until something opens the terminal, which creates it.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub async fn get_tty_text(&self, tty: &str) -> Result<String> {
        let (device, screen) = (quote(&format!("/dev/tty{tty}")), quote(&format!("/dev/vcs{tty}")));
        let command = format!("fold -w \"$(stty -F {device} size | cut -d' ' -f2)\" {screen}");
        self.execute(&command, ExecOptions::default()).await.map(|(_, output)| output)
    }

    /// Waits until `find` finds a match on a virtual terminal. `what` is for the log.
    ///
    /// # Errors
    /// Those of [`Self::get_tty_text`] and of `find`; [`crate::Error::Assertion`] if it does not within `timeout`.
    pub async fn wait_until_tty_matches(
        &self,
        tty: &str,
        what: &str,
        find: impl Fn(&str) -> Result<bool> + Sync,
        timeout: Duration,
    ) -> Result<()> {
        let _step = self.nested(format_args!("waiting for {what} to appear on tty {tty}"));
        let find = &find;
        let probe = |last: bool| async move {
            let text = self.get_tty_text(tty).await?;
            if last {
                self.log(format_args!(
                    "last chance to match {what} on tty {tty}, which shows: {text}"
                ));
            }
            Ok(find(&text)?.then_some(()))
        };
        retry(&self.inner.clock, probe, timeout).await
    }

    /// Prints what a virtual terminal shows to the guest's journal, and so to the log.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub async fn dump_tty_contents(&self, tty: &str) -> Result<()> {
        let command = format!("fold -w 80 {} | systemd-cat", quote(&format!("/dev/vcs{tty}")));
        self.execute(&command, ExecOptions::default()).await.map(drop)
    }

    /// Waits for a condition through the agent, or through a shell, where `script` is the same condition.
    async fn wait_until(
        &self,
        condition: Option<Condition>,
        script: &str,
        timeout: Duration,
    ) -> Result<()> {
        if let Session::Agent(agent) = self.session().await? {
            if let Some(condition) = condition
                && self.watched(&agent, condition, timeout).await?
            {
                return Ok(());
            }
            let watch = format!("{NAP}\nuntil {script}; do nap; done");
            match self.probe(&watch, timeout).await? {
                0 => return Ok(()),
                TIMED_OUT => {
                    return match self.probe(script, last_probe(timeout)).await? {
                        0 => Ok(()),
                        _ => Err(timed_out(timeout)),
                    };
                }
                // The shell cannot evaluate the condition now, for example a pattern with too many matches.
                _ => {}
            }
        }
        let limit = last_probe(timeout);
        let probe =
            |_: bool| async move { Ok((self.probe(script, limit).await? == 0).then_some(())) };
        retry(&self.inner.clock, probe, timeout).await
    }

    /// Has the agent wait; false if it cannot.
    async fn watched(
        &self,
        agent: &AgentSession,
        condition: Condition,
        timeout: Duration,
    ) -> Result<bool> {
        // A wait without a budget polls once, which takes its time too.
        let budget = if timeout.is_zero() { LOOK } else { timeout };
        let wait = async {
            match agent.wait(condition).await {
                Err(error) if !error.lost() => Ok(false),
                answer => answer.map(|()| true),
            }
        };
        let wait = self.answered(wait, || "cannot wait".to_owned());
        let answer = self.inner.clock.timeout(budget, wait).await;
        answer.unwrap_or_else(|| Err(timed_out(timeout)))
    }

    async fn probe(&self, script: &str, timeout: Duration) -> Result<i32> {
        let options = ExecOptions { timeout: Some(timeout), ..ExecOptions::default() };
        self.execute(script, options).await.map(|(status, _)| status)
    }
}

/// Whether a shell would leave it unchanged, so that the agent can watch it.
fn is_plain(path: &str) -> bool {
    path.starts_with('/')
        && path.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+@:,".contains(c))
}

fn probe_port(port: u16, address: &str) -> String {
    format!("nc -z -w {PROBE_SECONDS} {} {port}", quote(address))
}
