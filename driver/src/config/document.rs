//! A TOML or JSON file between its text and its types: errors about a value are shown with its line.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;
use toml::de::{DeTable, DeValue};

use super::report::Report;

/// The path of a value: `nodes.server.disks[0].serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Key(Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Name(String),
    Index(usize),
}

impl Key {
    /// Appends a name.
    pub(super) fn name(&self, name: impl Into<String>) -> Self {
        self.with(Step::Name(name.into()))
    }

    /// Appends an index.
    pub(super) fn index(&self, index: usize) -> Self {
        self.with(Step::Index(index))
    }

    fn with(&self, step: Step) -> Self {
        Self(self.0.iter().cloned().chain([step]).collect())
    }

    /// The path that serde reports, below this one.
    fn below(&self, path: &serde_path_to_error::Path) -> Self {
        use serde_path_to_error::Segment;
        path.iter().fold(self.clone(), |key, segment| match segment {
            Segment::Map { key: name } | Segment::Enum { variant: name } => key.name(name),
            Segment::Seq { index } => key.index(*index),
            Segment::Unknown => key,
        })
    }
}

impl From<&str> for Key {
    fn from(name: &str) -> Self {
        Self::default().name(name)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.0.iter().enumerate() {
            match step {
                Step::Name(name) if at == 0 => f.write_str(name)?,
                Step::Name(name) => write!(f, ".{name}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// An error about the value of a key.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) key: Key,
    pub(super) message: String,
}

impl Problem {
    /// `message` may end in `; allowed: …`.
    pub(super) fn new(key: Key, message: impl fmt::Display) -> Self {
        Self { key, message: message.to_string() }
    }
}

/// A file's text and format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Document<'a> {
    path: &'a Path,
    text: &'a str,
    syntax: Syntax,
}

/// Which part of a key to point at. In JSON it is always the value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Key,
    Value,
}

#[derive(Clone, Copy, Debug)]
enum Syntax {
    Toml,
    Json,
}

impl<'a> Document<'a> {
    /// A JSON document that has been parsed already.
    pub(super) fn of_json(path: &'a Path, text: &'a str) -> Self {
        Self { path, text, syntax: Syntax::Json }
    }

    /// Parses TOML.
    pub(super) fn toml(path: &'a Path, text: &'a str) -> Result<(Self, Value), Report> {
        let document = Self { path, text, syntax: Syntax::Toml };
        let value = toml::from_str(text)
            .map_err(|e| Report::new(path, text, e.span().unwrap_or(0..0), e.message()))?;
        Ok((document, value))
    }

    /// Parses JSON.
    pub(super) fn json(path: &'a Path, text: &'a str) -> Result<(Self, Value), Report> {
        let document = Self::of_json(path, text);
        let value = serde_json::from_str(text).map_err(|error| {
            let at = offset(text, error.line(), error.column());
            let message = error.to_string();
            let message = message.rsplit_once(" at line ").map_or(&*message, |(text, _)| text);
            Report::new(path, text, at.saturating_sub(1)..at, message)
        })?;
        Ok((document, value))
    }

    /// The value at `key`, converted to its type.
    pub(super) fn typed<T: DeserializeOwned>(&self, key: &Key, value: Value) -> Result<T, Report> {
        serde_path_to_error::deserialize(value).map_err(|error| {
            let mut key = key.below(error.path());
            let message = error.inner().to_string();
            // serde names the table that has the key.
            let unknown = message.strip_prefix("unknown field `").and_then(|m| m.split_once('`'));
            let Some((unknown, _)) = unknown else {
                return self.report(&Problem { key, message });
            };
            if !matches!(key.0.last(), Some(Step::Name(last)) if last == unknown) {
                key = key.name(unknown);
            }
            let at = self.locate(&key, Part::Key);
            let report = Report::new(self.path, self.text, at, &message);
            match renamed(unknown) {
                Some(now) => report.help(now),
                None => report,
            }
        })
    }

    /// Formats an error.
    pub(super) fn report(&self, problem: &Problem) -> Report {
        let Problem { key, message } = problem;
        let (message, help) = match message.split_once("; allowed: ") {
            Some((message, allowed)) => (message, Some(format!("allowed: {allowed}"))),
            None => (message.as_str(), None),
        };
        let message = match key.0.is_empty() {
            true => message.to_owned(),
            false => format!("`{key}`: {message}"),
        };
        let report = Report::new(self.path, self.text, self.locate(key, Part::Value), message);
        match help {
            Some(help) => report.help(help),
            None => report,
        }
    }

    /// The position of `key` or its value, or of the nearest enclosing value that exists.
    pub(super) fn locate(&self, key: &Key, part: Part) -> Range<usize> {
        let found = match self.syntax {
            Syntax::Toml => locate_toml(self.text, &key.0, part),
            Syntax::Json => locate_json(self.text, &key.0),
        };
        found.unwrap_or(0..0)
    }

    /// The source text of the value of `key`.
    pub(super) fn literal(&self, key: &Key) -> &'a str {
        self.text.get(self.locate(key, Part::Value)).unwrap_or_default()
    }

    /// The line of a byte, from 1.
    pub(super) fn line(&self, at: usize) -> usize {
        self.text.get(..at).unwrap_or_default().matches('\n').count() + 1
    }
}

fn locate_toml(text: &str, steps: &[Step], part: Part) -> Option<Range<usize>> {
    let table = DeTable::parse(text).ok()?;
    let mut found = None;
    let mut here: Option<&DeValue<'_>> = None;
    let mut tables = Some(table.get_ref());
    for step in steps {
        let inner = match (step, here.take(), tables.take()) {
            (Step::Name(name), _, Some(table)) => {
                let Some((key, value)) = table.get_key_value(name.as_str()) else { break };
                found = Some(match (part, value.get_ref()) {
                    // A table may be long.
                    (Part::Key, _) | (_, DeValue::Table(_)) => key.span(),
                    (Part::Value, _) => value.span(),
                });
                value
            }
            (Step::Index(index), Some(DeValue::Array(array)), _) => {
                let Some(value) = array.get(*index) else { break };
                found = Some(value.span());
                value
            }
            _ => break,
        };
        here = Some(inner.get_ref());
        tables = match inner.get_ref() {
            DeValue::Table(table) => Some(table),
            _ => None,
        };
    }
    found
}

fn locate_json(text: &str, steps: &[Step]) -> Option<Range<usize>> {
    let mut here: &RawValue = serde_json::from_str(text).ok()?;
    let mut found = None;
    for step in steps {
        let next: Option<&RawValue> = match step {
            Step::Name(name) => {
                let members: Option<std::collections::BTreeMap<String, &RawValue>> =
                    serde_json::from_str(here.get()).ok();
                members.and_then(|members| members.get(name).copied())
            }
            Step::Index(index) => {
                let elements: Option<Vec<&RawValue>> = serde_json::from_str(here.get()).ok();
                elements.and_then(|elements| elements.get(*index).copied())
            }
        };
        let Some(next) = next else { break };
        // Both are slices of `text`.
        let start = (next.get().as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
        found = Some(start..start + next.get().len());
        here = next;
    }
    found
}

/// Returns the byte offset of a line and column, both counted from 1.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let mut at = (before + column).min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The current name of a key that was renamed.
fn renamed(key: &str) -> Option<&'static str> {
    Some(match key {
        "memory_size" | "memory_mib" => "it is `memory` now, in MiB",
        "path" => "a disk's image is `image` now",
        "create_size" | "size_mib" => "it is `size` now, in MiB",
        "ext4_label" => "it is `label` now",
        "empty_disks" => "an empty disk is `disks = [{ size = 512 }]` now",
        "shared_directories" => {
            "it is `shares` now, a list: `[[nodes.NAME.shares]]` with `tag`, `source` and `target`"
        }
        "host_loopback" => "it is `user_network.host_loopback`",
        "restrict_network" => "it is `user_network.restrict` now",
        "forward_ports" => "it is `user_network.forward_ports` now",
        "nets" => {
            "it is `vlans = [1, 2]` now, and `macs` for addresses that do not follow from the numbers"
        }
        _ => return None,
    })
}
