//! What a kept world depends on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::kit::integrity::hex;

/// How many changed parts are named.
const NAMED: usize = 3;
/// Longer values are not shown in messages.
const SHOWN: usize = 40;

/// Everything that a world depends on: named parts, such as "kernel of machine a", each with its value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Key(BTreeMap<String, String>);

impl Key {
    /// Adds a part.
    pub(crate) fn add(&mut self, part: impl Into<String>, value: impl Into<String>) {
        self.0.insert(part.into(), value.into());
    }

    /// The name of the entry.
    pub(super) fn id(&self) -> String {
        let mut hash = Sha256::new();
        for text in self.0.iter().flat_map(|(part, value)| [part, value]) {
            // With lengths, so that no two keys look the same one after the other.
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hex(&hash.finalize())
    }

    /// In how many parts they differ.
    pub(super) fn distance(&self, other: &Self) -> usize {
        self.differing(other).len()
    }

    /// What has changed since `before`, in words.
    pub(super) fn changes_since(&self, before: &Self) -> String {
        let parts = self.differing(before);
        let mut said: Vec<String> = parts
            .iter()
            .take(NAMED)
            .map(|&part| match (before.0.get(part), self.0.get(part)) {
                (Some(before), Some(now)) if before.len().max(now.len()) <= SHOWN => {
                    format!("{part} has changed from {before} to {now}")
                }
                (Some(_), Some(_)) => format!("{part} has changed"),
                (None, _) => format!("{part} is new"),
                (Some(_), None) => format!("{part} is gone"),
            })
            .collect();
        if let Some(more @ 1..) = parts.len().checked_sub(NAMED) {
            said.push(format!("{more} more"));
        }
        said.join(", ")
    }

    fn differing<'a>(&'a self, other: &'a Self) -> Vec<&'a String> {
        let own = self.0.iter().filter(|(part, value)| other.0.get(*part) != Some(value));
        let gone = other.0.iter().filter(|(part, _)| !self.0.contains_key(*part));
        own.chain(gone).map(|(part, _)| part).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(parts: &[(&str, &str)]) -> Key {
        let mut key = Key::default();
        parts.iter().for_each(|(part, value)| key.add(*part, *value));
        key
    }

    #[test]
    fn it_says_what_has_changed() {
        let long = "x".repeat(50);
        let before = key(&[("firn", "1"), ("kernel of a", &long), ("memory of a", "512")]);
        assert_eq!(before.changes_since(&before), "");
        let now = key(&[("firn", "2"), ("kernel of a", "y"), ("disk of a", "z")]);
        assert_eq!(
            now.changes_since(&before),
            "disk of a is new, firn has changed from 1 to 2, kernel of a has changed, 1 more"
        );
        let now = key(&[("firn", "1"), ("kernel of a", &long)]);
        assert_eq!(now.changes_since(&before), "memory of a is gone");
        assert_eq!(now.distance(&before), 1);
    }

    #[test]
    fn no_two_keys_have_one_name() {
        let keys = [
            key(&[]),
            key(&[("a", "b")]),
            key(&[("ab", "")]),
            key(&[("", "ab")]),
            key(&[("a", ""), ("b", "")]),
        ];
        let names: std::collections::BTreeSet<String> = keys.iter().map(Key::id).collect();
        assert_eq!(names.len(), keys.len());
        assert!(names.iter().all(|name| name.len() == 64));
    }
}
