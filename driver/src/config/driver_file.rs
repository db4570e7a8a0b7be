//! The NixOS test framework's input to its driver: a JSON file, or the machines' start scripts one by one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn_vmm::spec::Number;
use serde::Deserialize;

use super::document::{Document, Key};
use super::report::{ConfigError, Report};
use super::{MachineFile, Script, TestConfig, VSOCK_OFFSET, read, variable_name};

/// The framework adds keys now and then, so unknown ones are ignored.
#[derive(Deserialize)]
struct DriverKeys {
    #[serde(default)]
    vms: BTreeMap<String, VmKeys>,
    #[serde(default)]
    containers: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(default)]
    vlans: Vec<Number>,
    global_timeout: Option<Timeout>,
    #[serde(default)]
    enable_ssh_backdoor: bool,
    test_script: PathBuf,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Timeout {
    Seconds(f64),
    Iso(String),
}

impl Timeout {
    /// # Errors
    /// The value, if it is not a time above 0.
    fn duration(self) -> Result<Duration, String> {
        let (given, seconds) = match self {
            Self::Seconds(seconds) => (seconds.to_string(), Some(seconds)),
            Self::Iso(text) => (format!("{text:?}"), iso_seconds(&text)),
        };
        let allowed = seconds.filter(|seconds| *seconds > 0.0);
        allowed.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).ok_or(given)
    }
}

/// Parses an ISO 8601 duration with units of fixed length, such as `PT1H30M` and `P1DT0.5S`, into seconds.
fn iso_seconds(text: &str) -> Option<f64> {
    let (days, time) = text.strip_prefix('P')?.split_once('T').unwrap_or((&text[1..], ""));
    if text.ends_with(['P', 'T']) {
        return None;
    }
    let mut seconds = 0.0;
    for (mut part, units) in [
        (days, &[('W', 604_800.0), ('D', 86_400.0)][..]),
        (time, &[('H', 3600.0), ('M', 60.0), ('S', 1.0)][..]),
    ] {
        for (unit, length) in units {
            if let Some((number, rest)) = part.split_once(*unit) {
                let digits = |c: char| c.is_ascii_digit() || c == '.' || c == ',';
                let number = Some(number).filter(|number| number.chars().all(digits))?;
                seconds += number.replace(',', ".").parse::<f64>().ok()? * length;
                part = rest;
            }
        }
        if !part.is_empty() {
            return None;
        }
    }
    Some(seconds)
}

#[derive(Deserialize)]
struct VmKeys {
    name: Option<String>,
    start_script: PathBuf,
}

impl TestConfig {
    /// Reads the JSON file of `nixos-test-driver --config`.
    ///
    /// # Errors
    /// If it, or a file it names, cannot be read or is invalid.
    pub fn from_driver_file(path: &Path) -> Result<Self, ConfigError> {
        let text = read(path)?;
        let known = |report: Report| {
            report.help(
                "this is the file that the NixOS test framework writes: an object with `vms`, \
                 `vlans`, `global_timeout` and `test_script`",
            )
        };
        let (document, value) = Document::json(path, &text).map_err(known)?;
        let raw: DriverKeys = document.typed(&Key::default(), value).map_err(known)?;
        let bad = |message: String| ConfigError::Key { path: path.to_owned(), message };
        if let Some(name) = raw.containers.keys().next() {
            let message = format!("`containers.{name}`: containers are not supported yet");
            return Err(bad(message));
        }
        let global_timeout = raw.global_timeout.map(|timeout| {
            timeout.duration().map_err(|given| {
                bad(format!(
                    "`global_timeout` is {given}; allowed: a number of seconds above 0, or an ISO \
                     8601 duration such as \"PT1H30M\""
                ))
            })
        });
        let mut files = Vec::with_capacity(raw.vms.len());
        for (key, vm) in raw.vms {
            let mut file = MachineFile::read(&vm.start_script)?;
            file.rename(vm.name.as_deref().unwrap_or(&key))?;
            files.push(file);
        }
        let mut test =
            Self::from_files(files, raw.vlans, &raw.test_script).map_err(|error| match error {
                ConfigError::Key { message, .. } => bad(message),
                other => other,
            })?;
        test.global_timeout = global_timeout.transpose()?;
        test.vsock_offset = raw.enable_ssh_backdoor.then_some(VSOCK_OFFSET);
        Ok(test)
    }

    /// Creates a test from machine files and a script.
    ///
    /// # Errors
    /// If there are too many machines, the script cannot be read, or two machines have the same name in it.
    pub fn from_files(
        mut files: Vec<MachineFile>,
        vlans: Vec<Number>,
        script: &Path,
    ) -> Result<Self, ConfigError> {
        let bad = |message| ConfigError::Key { path: script.to_owned(), message };
        files.sort_by(|a, b| a.name().cmp(b.name()));
        let most = Number::MAX.get();
        if files.len() > most.into() {
            return Err(bad(format!("there are {} machines; allowed: {most}", files.len())));
        }
        let mut variables = BTreeMap::new();
        for file in &files {
            let variable = variable_name(file.name());
            if let Some(other) = variables.insert(variable.clone(), file.name()) {
                let name = file.name();
                return Err(bad(format!(
                    "machines `{other}` and `{name}` would both be `{variable}` in the script"
                )));
            }
        }
        let name = script.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self {
            name,
            script: read_script(script)?,
            global_timeout: None,
            nodes: Vec::new(),
            files,
            more_vlans: vlans,
            vsock_offset: None,
            from_boot: false,
        })
    }

    /// Replaces the script by that of a file.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn replace_script(&mut self, script: &Path) -> Result<(), ConfigError> {
        self.script = read_script(script)?;
        Ok(())
    }
}

fn read_script(path: &Path) -> Result<Script, ConfigError> {
    Ok(Script { text: read(path)?, file: path.to_owned(), line: 1 })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    const MACHINE: &str = "#!/usr/bin/firn run\n{\"firn\": 1, \"name\": \"x\", \"kernel\": \"/k\", \
                           \"vlans\": [3]}";

    /// Creates a script `test-script`, a machine file `run-vm` and a QEMU start script `qemu`.
    fn files() -> TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in [
            ("test-script", "start_all()\n"),
            ("run-vm", MACHINE),
            ("qemu", "#!/bin/sh\nexec qemu-kvm\n"),
        ] {
            fs::write(dir.path().join(name), text).expect("written");
        }
        dir
    }

    /// Reads a driver file; `DIR` in it is the directory of [`files`].
    fn read(json: &str) -> Result<TestConfig, ConfigError> {
        let dir = files();
        let path = dir.path().join("config.json");
        fs::write(&path, json.replace("DIR", &dir.path().display().to_string())).expect("written");
        TestConfig::from_driver_file(&path)
    }

    #[test]
    fn the_frameworks_file() {
        let test = read(
            r#"{"vms": {"b-1": {"name": "b-1", "start_script": "DIR/run-vm", "new": 1},
                        "a": {"start_script": "DIR/run-vm"}},
                "containers": {}, "vlans": [1], "global_timeout": 3600, "enable_ssh_backdoor": true,
                "test_script": "DIR/test-script", "some_new_key": {"x": []}}"#,
        )
        .expect("valid");
        let names: Vec<_> = test.files.iter().map(MachineFile::name).collect();
        assert_eq!(names, ["a", "b-1"]);
        let vlans: Vec<u8> = test.vlans().into_iter().map(Number::get).collect();
        assert_eq!(vlans, [1, 3]);
        assert_eq!(test.global_timeout, Some(Duration::from_secs(3600)));
        assert!(test.vsock_offset == Some(2) && test.nodes.is_empty());
        assert_eq!((test.script.text.as_str(), test.script.line), ("start_all()\n", 1));
    }

    #[test]
    fn a_timeout_as_text() {
        for (text, seconds) in [
            ("PT1H", Some(3600.0)),
            ("PT1H30M", Some(5400.0)),
            ("P1DT0.5S", Some(86_400.5)),
            ("P1W", Some(604_800.0)),
            ("PT0,25S", Some(0.25)),
            ("PT90M", Some(5400.0)),
        ] {
            assert_eq!(iso_seconds(text), seconds, "{text}");
        }
        for text in
            ["", "P", "PT", "1H", "P1H", "PT1", "PT1S2M", "PT-1S", "P1Y", "P1M", "PTS", "PT1HT"]
        {
            assert_eq!(iso_seconds(text), None, "{text}");
        }
        let test = read(r#"{"global_timeout": "PT1M30S", "test_script": "DIR/test-script"}"#);
        assert_eq!(test.expect("valid").global_timeout, Some(Duration::from_secs(90)));
    }

    #[test]
    fn another_script() {
        let mut test = read(r#"{"test_script": "DIR/test-script"}"#).expect("valid");
        let dir = files();
        test.replace_script(&dir.path().join("qemu")).expect("it is there");
        assert_eq!(test.script.text, "#!/bin/sh\nexec qemu-kvm\n");
        test.replace_script(&dir.path().join("gone")).expect_err("it is not there");
    }

    #[test]
    fn what_makes_no_sense() {
        let script = r#""test_script": "DIR/test-script""#;
        for (json, said) in [
            ("{}".to_owned(), "missing field `test_script`"),
            ("[]".to_owned(), "`vms`, `vlans`"),
            (r#"{"test_script": "DIR/gone"}"#.to_owned(), "/gone"),
            (
                format!(r#"{{{script}, "containers": {{"c": {{}}}}}}"#),
                "containers are not supported yet",
            ),
            (format!(r#"{{{script}, "global_timeout": 0}}"#), "`global_timeout` is 0; allowed: "),
            (
                format!(r#"{{{script}, "global_timeout": "1 hour"}}"#),
                "`global_timeout` is \"1 hour\"; allowed: ",
            ),
            (format!(r#"{{{script}, "vlans": [1, 255]}}"#), "`vlans[1]`: 255 cannot be used"),
            (
                format!(r#"{{{script}, "vms": {{"a": {{"start_script": "DIR/qemu"}}}}}}"#),
                "/qemu is no machine file of firn, it is a program that nobody may execute",
            ),
            (
                format!(r#"{{{script}, "vms": {{"a b": {{"start_script": "DIR/run-vm"}}}}}}"#),
                "`name`: \"a b\" cannot be used",
            ),
            (
                format!(
                    r#"{{{script}, "vms": {{"a-b": {{"start_script": "DIR/run-vm"}},
                                           "a_b": {{"start_script": "DIR/run-vm"}}}}}}"#
                ),
                "`a-b` and `a_b` would both be `a_b`",
            ),
        ] {
            let error = read(&json).expect_err(&json).to_string();
            assert!(error.contains(said), "{said:?} is not in {error}");
        }
    }
}
