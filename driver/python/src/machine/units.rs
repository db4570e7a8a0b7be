//! systemd's units.

use std::collections::BTreeMap;

use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::DEFAULT;
use crate::duration::Timeout;

#[pymethods]
impl PyMachine {
    /// Run systemctl with the arguments `q` (shell words). Returns its exit status and output.
    ///
    /// user: ask this user's service manager instead of the system's.
    #[pyo3(signature = (q, user = None))]
    fn systemctl(&self, py: Python<'_>, q: &str, user: Option<&str>) -> PyResult<(i32, String)> {
        self.call(py, |machine| machine.systemctl(q, user))
    }

    /// Wait until a unit is active.
    ///
    /// user: the unit belongs to this user's service manager.
    /// timeout: seconds or a timedelta; 900 seconds by default.
    ///
    /// Raises RequestedAssertionFailed at once if the unit has failed, or is inactive with no job pending; and when the
    /// timeout runs out.
    #[pyo3(
        signature = (unit, user = None, timeout = DEFAULT),
        text_signature = "($self, unit, user=None, timeout=900)"
    )]
    fn wait_for_unit(
        &self,
        py: Python<'_>,
        unit: &str,
        user: Option<&str>,
        timeout: Timeout,
    ) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_unit(unit, user, timeout.0))
    }

    /// Wait until a unit's ActiveState is `state`: active, reloading, inactive, failed, activating or deactivating.
    ///
    /// Unlike wait_for_unit(), this keeps waiting whatever other state the unit is in. Without firn's agent in the guest it
    /// polls every second and may miss a shorter state.
    ///
    /// user: the unit belongs to this user's service manager.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed when it runs out.
    #[pyo3(
        signature = (unit, state, user = None, timeout = DEFAULT),
        text_signature = "($self, unit, state, user=None, timeout=900)"
    )]
    fn wait_for_unit_active_state(
        &self,
        py: Python<'_>,
        unit: &str,
        state: &str,
        user: Option<&str>,
        timeout: Timeout,
    ) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_unit_active_state(unit, state, user, timeout.0))
    }

    /// Return all properties of a unit as a dict, as `systemctl show` prints them.
    ///
    /// Raises RequestedAssertionFailed if systemctl fails.
    #[pyo3(signature = (unit, user = None))]
    fn get_unit_info(
        &self,
        py: Python<'_>,
        unit: &str,
        user: Option<&str>,
    ) -> PyResult<BTreeMap<String, String>> {
        self.call(py, |machine| machine.get_unit_info(unit, user))
    }

    /// Return a property of a unit, as `systemctl show` prints it.
    ///
    /// Raises RequestedAssertionFailed if there is no such property, or systemctl fails.
    #[pyo3(signature = (unit, property, user = None))]
    fn get_unit_property(
        &self,
        py: Python<'_>,
        unit: &str,
        property: &str,
        user: Option<&str>,
    ) -> PyResult<String> {
        self.call(py, |machine| machine.get_unit_property(unit, property, user))
    }

    /// Raise RequestedAssertionFailed unless a unit's ActiveState is `require_state`.
    #[pyo3(signature = (unit, require_state = "active"))]
    fn require_unit_state(&self, py: Python<'_>, unit: &str, require_state: &str) -> PyResult<()> {
        self.call(py, |machine| machine.require_unit_state(unit, require_state))
    }

    /// Start units, as `systemctl start` does. Returns its exit status and output.
    ///
    /// user: the name of a user whose own manager does it.
    #[pyo3(signature = (jobname, user = None))]
    fn start_job(
        &self,
        py: Python<'_>,
        jobname: &str,
        user: Option<&str>,
    ) -> PyResult<(i32, String)> {
        self.call(py, |machine| machine.start_job(jobname, user))
    }

    /// Stop units, as `systemctl stop` does. Returns its exit status and output.
    ///
    /// user: the name of a user whose own manager does it.
    #[pyo3(signature = (jobname, user = None))]
    fn stop_job(
        &self,
        py: Python<'_>,
        jobname: &str,
        user: Option<&str>,
    ) -> PyResult<(i32, String)> {
        self.call(py, |machine| machine.stop_job(jobname, user))
    }
}
