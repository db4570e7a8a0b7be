//! systemd's units.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Machine;
use super::bus::{Bus, BusError};
use super::exec::{ExecOptions, quote};
use super::session::{AgentSession, Session};
use crate::error::{Error, Result, chain};
use crate::retry::{retry, timed_out};

impl Machine {
    /// Runs `systemctl` with the arguments `query` (shell words), and returns its status and output. With `user`, asks
    /// that user's service manager.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub async fn systemctl(&self, query: &str, user: Option<&str>) -> Result<(i32, String)> {
        let command = match user {
            None => format!("systemctl {query}"),
            Some(user) => {
                let inner = format!("XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user {query}");
                format!("su -l {} --shell /bin/sh -c {}", quote(user), quote(&inner))
            }
        };
        self.execute(&command, ExecOptions::default()).await
    }

    /// All properties of a unit, by name.
    ///
    /// # Errors
    /// [`Error::Assertion`] if `systemctl show` fails; otherwise those of [`Machine::execute`].
    pub async fn get_unit_info(
        &self,
        unit: &str,
        user: Option<&str>,
    ) -> Result<BTreeMap<String, String>> {
        let query = format!("--no-pager show {}", quote(unit));
        let output = self.show(&query, "info", unit, user).await?;
        let property = |line: &str| {
            line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
        };
        Ok(output.lines().filter_map(property).collect())
    }

    /// A property of a unit.
    ///
    /// # Errors
    /// [`Error::Assertion`] if there is no such property or `systemctl show` fails; otherwise those of
    /// [`Machine::execute`].
    pub async fn get_unit_property(
        &self,
        unit: &str,
        property: &str,
        user: Option<&str>,
    ) -> Result<String> {
        let query = format!("--no-pager show {} --property={}", quote(unit), quote(property));
        let what = format!("property \"{property}\"");
        let output = self.show(&query, &what, unit, user).await?;
        let value = output.trim_end_matches('\n').strip_prefix(&format!("{property}="));
        value.map(str::to_owned).ok_or_else(|| {
            Error::Assertion(format!(
                "systemctl show --property \"{property}\" \"{unit}\"{} produced unexpected output: {output}",
                under(user)
            ))
        })
    }

    async fn show(
        &self,
        query: &str,
        what: &str,
        unit: &str,
        user: Option<&str>,
    ) -> Result<String> {
        match self.systemctl(query, user).await? {
            (0, output) => Ok(output),
            (status, _) => Err(Error::Assertion(format!(
                "retrieving systemctl {what} for unit \"{unit}\"{} failed with exit code {status}",
                under(user)
            ))),
        }
    }

    /// Checks that a unit is in a state: `active`, `inactive`, `failed`, …
    ///
    /// # Errors
    /// [`Error::Assertion`] if it is not; otherwise those of [`Self::get_unit_property`].
    pub async fn require_unit_state(&self, unit: &str, state: &str) -> Result<()> {
        let _step =
            self.nested(format_args!("checking if unit \"{unit}\" has reached state \"{state}\""));
        let is = self.get_unit_property(unit, "ActiveState", None).await?;
        if is == state {
            return Ok(());
        }
        // These are upstream's words, which tests match.
        Err(Error::Assertion(format!(
            "Expected unit '{unit}' to to be in state '{state}' but it is in state '{is}'"
        )))
    }

    /// Starts units (shell words, with or without options of `systemctl start`), and returns the status and output.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub async fn start_job(&self, units: &str, user: Option<&str>) -> Result<(i32, String)> {
        self.systemctl(&format!("start {units}"), user).await
    }

    /// Stops units (shell words, with or without options of `systemctl stop`), and returns the status and output.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub async fn stop_job(&self, units: &str, user: Option<&str>) -> Result<(i32, String)> {
        self.systemctl(&format!("stop {units}"), user).await
    }

    /// Waits until a unit is active. Over the agent systemd announces it; otherwise it is polled every second.
    ///
    /// # Errors
    /// [`Error::Assertion`] at once if it has failed or is inactive with no jobs pending, and after `timeout`;
    /// otherwise those of [`Machine::execute`].
    pub async fn wait_for_unit(
        &self,
        unit: &str,
        user: Option<&str>,
        timeout: Duration,
    ) -> Result<()> {
        let by = user.map_or(String::new(), |user| format!(" with user {user}"));
        let _step = self.nested(format_args!("waiting for unit {unit}{by}"));
        if let Session::Agent(agent) = self.session().await? {
            let watch = self.unless_ended(async {
                Ok(match Bus::connect(&agent, user).await {
                    Ok(bus) => watch(&bus, unit).await,
                    Err(error) => Err(Unwatched::Bus(error)),
                })
            });
            match self.inner.clock.timeout(timeout, watch).await {
                None => return Err(timed_out(timeout)),
                Some(answer) => match answer? {
                    Ok(()) => return Ok(()),
                    Err(Unwatched::Unit(error)) => return Err(error),
                    Err(Unwatched::Bus(error)) => {
                        tracing::debug!("asking systemctl each second: {}", chain(&error));
                    }
                },
            }
        }
        let probe = |_: bool| async { Ok(self.probe_unit(unit, user).await?.then_some(())) };
        retry(&self.inner.clock, probe, timeout).await
    }

    /// Waits until a unit is in a state: `active`, `inactive`, `activating`, `failed`, … Over the agent systemd
    /// announces changes; otherwise it is polled every second, and shorter states may be missed.
    ///
    /// # Errors
    /// [`Error::Assertion`] after `timeout`; otherwise those of [`Self::get_unit_property`].
    pub async fn wait_for_unit_active_state(
        &self,
        unit: &str,
        state: &str,
        user: Option<&str>,
        timeout: Duration,
    ) -> Result<()> {
        let by = user.map_or(String::new(), |user| format!(" with user {user}"));
        let _step = self.nested(format_args!("waiting for unit {unit} to be {state}{by}"));
        if let Session::Agent(agent) = self.session().await? {
            let watch = self.unless_ended(async { Ok(watch_for(&agent, unit, state, user).await) });
            match self.inner.clock.timeout(timeout, watch).await {
                None => return Err(timed_out(timeout)),
                Some(answer) => match answer? {
                    Ok(()) => return Ok(()),
                    Err(error) => tracing::debug!("asking systemctl: {}", chain(&error)),
                },
            }
        }
        let probe = |_: bool| async {
            let now = self.get_unit_property(unit, "ActiveState", user).await?;
            Ok((now == state).then_some(()))
        };
        retry(&self.inner.clock, probe, timeout).await
    }

    /// Whether a unit is active.
    async fn probe_unit(&self, unit: &str, user: Option<&str>) -> Result<bool> {
        match self.get_unit_property(unit, "ActiveState", user).await?.as_str() {
            "active" => return Ok(true),
            "failed" => return Err(failed(unit)),
            "inactive" => {}
            _ => return Ok(false),
        }
        let (_, jobs) = self.systemctl("list-jobs --full 2>&1", user).await?;
        if !jobs.contains("No jobs") {
            return Ok(false);
        }
        // A job may have ended in between.
        match self.get_unit_property(unit, "ActiveState", user).await?.as_str() {
            "inactive" => Err(idle(unit)),
            state => Ok(state == "active"),
        }
    }
}

/// Why a wait for a unit ended.
enum Unwatched {
    /// The unit will not become active.
    Unit(Error),
    /// The unit cannot be watched.
    Bus(BusError),
}

impl From<BusError> for Unwatched {
    fn from(error: BusError) -> Self {
        Self::Bus(error)
    }
}

/// Waits until a unit is active, by systemd's events.
async fn watch(bus: &Bus, unit: &str) -> std::result::Result<(), Unwatched> {
    let mut changes = bus.watch_unit(unit).await?;
    loop {
        changes.mark_seen();
        match bus.active_state(&changes).await?.as_str() {
            "active" => return Ok(()),
            "failed" => return Err(Unwatched::Unit(failed(unit))),
            // The state once more: a job may have ended in between.
            "inactive"
                if bus.pending_jobs().await? == 0
                    && bus.active_state(&changes).await? == "inactive" =>
            {
                return Err(Unwatched::Unit(idle(unit)));
            }
            _ => changes.next().await?,
        }
    }
}

/// Waits until a unit is in a state, by systemd's events.
async fn watch_for(
    agent: &AgentSession,
    unit: &str,
    state: &str,
    user: Option<&str>,
) -> std::result::Result<(), BusError> {
    let bus = Bus::connect(agent, user).await?;
    let mut changes = bus.watch_unit(unit).await?;
    loop {
        changes.mark_seen();
        if bus.active_state(&changes).await? == state {
            return Ok(());
        }
        changes.next().await?;
    }
}

fn failed(unit: &str) -> Error {
    Error::Assertion(format!("unit \"{unit}\" reached state \"failed\""))
}

fn idle(unit: &str) -> Error {
    Error::Assertion(format!("unit \"{unit}\" is inactive and there are no pending jobs"))
}

fn under(user: Option<&str>) -> String {
    user.map_or(String::new(), |user| format!(" under user \"{user}\""))
}
