//! Variables in the strings of a machine file: `${VAR}` and `${VAR:-default}`.

use std::collections::BTreeMap;
use std::ffi::OsString;

use serde_json::Value;

use super::document::Key;

/// How deeply defaults may be nested.
const MAX_DEPTH: usize = 16;

/// The values of variables: overrides, then the environment.
#[derive(Clone, Debug, Default)]
pub struct Variables {
    own: BTreeMap<&'static str, OsString>,
    /// Unset variables stay as they are written.
    lenient: bool,
}

/// Why a string cannot be expanded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ExpandError {
    #[error("the variable {0} is not set")]
    Unset(String),
    #[error("the variable {0} is not UTF-8")]
    NotText(String),
    #[error("`{0}` is no variable; allowed: `${{NAME}}`, `${{NAME:-default}}`, and `$$` for `$`")]
    Syntax(String),
}

impl Variables {
    /// The environment at the time of the lookup, as scripts change it.
    #[must_use]
    pub fn of_environment() -> Self {
        Self::default()
    }

    /// Sets a variable, overriding the environment.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.own.insert(name, value.into());
        self
    }

    /// Leaves unset variables as they are written instead of failing.
    #[must_use]
    pub(super) fn lenient(mut self) -> Self {
        self.lenient = true;
        self
    }

    /// Expands the variables in all strings of a value; errors name the key of the string, below `at`.
    pub(super) fn expand_all(&self, value: &mut Value, at: &Key) -> Result<(), (Key, ExpandError)> {
        match value {
            Value::String(text) => {
                *text = self.expand(text).map_err(|error| (at.clone(), error))?
            }
            Value::Array(values) => {
                for (index, value) in values.iter_mut().enumerate() {
                    self.expand_all(value, &at.index(index))?;
                }
            }
            Value::Object(values) => {
                for (name, value) in values {
                    self.expand_all(value, &at.name(name.as_str()))?;
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
        Ok(())
    }

    /// Returns the value of a variable that is set and not empty.
    pub(super) fn get(&self, name: &str) -> Result<Option<String>, ExpandError> {
        let value = self.own.get(name).cloned().or_else(|| std::env::var_os(name));
        match value.map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value).filter(|value| !value.is_empty())),
            Some(Err(_)) => Err(ExpandError::NotText(name.to_owned())),
        }
    }

    /// Expands the variables in a text. As in a shell, the default also replaces an empty variable; without a default a
    /// variable may be empty, but must be set.
    pub(super) fn expand(&self, text: &str) -> Result<String, ExpandError> {
        self.expand_within(text, MAX_DEPTH)
    }

    fn expand_within(&self, text: &str, depth: usize) -> Result<String, ExpandError> {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            let behind = &rest[at + 1..];
            if let Some(next) = behind.strip_prefix('$') {
                out.push('$');
                rest = next;
                continue;
            }
            let bad = || ExpandError::Syntax(rest[at..].chars().take(40).collect());
            let body = behind.strip_prefix('{').ok_or_else(bad)?;
            let end = closing(body).filter(|_| depth > 0).ok_or_else(bad)?;
            let (name, default) = match body[..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&body[..end], None),
            };
            if !is_variable(name) {
                return Err(bad());
            }
            match (self.get(name)?, default) {
                (Some(value), _) => out.push_str(&value),
                (None, Some(default)) => out.push_str(&self.expand_within(default, depth - 1)?),
                (None, None) if self.is_set(name) => {}
                (None, None) if self.lenient => out.push_str(&rest[at..at + end + 3]),
                (None, None) => return Err(ExpandError::Unset(name.to_owned())),
            }
            rest = &body[end + 1..];
        }
        out.push_str(rest);
        Ok(out)
    }

    fn is_set(&self, name: &str) -> bool {
        self.own.contains_key(name) || std::env::var_os(name).is_some()
    }
}

/// The position of the brace that closes the one opened before `text`.
fn closing(text: &str) -> Option<usize> {
    let mut open = 0_usize;
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'$', Some(b'{')) => {
                open += 1;
                at += 1;
            }
            (b'$', Some(b'$')) => at += 1,
            (b'}', _) if open == 0 => return Some(at),
            (b'}', _) => open -= 1,
            _ => {}
        }
        at += 1;
    }
    None
}

fn is_variable(name: &str) -> bool {
    let first = name.chars().next();
    first.is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(text: &str) -> Result<String, ExpandError> {
        Variables::of_environment()
            .with("A", "1")
            .with("EMPTY", "")
            .with("DIR", "/state")
            .expand(text)
    }

    #[test]
    fn variables_and_defaults() {
        for (text, expanded) in [
            ("", ""),
            ("plain { text } :-", "plain { text } :-"),
            ("x${A}y${A}", "x1y1"),
            ("${FIRN_NOT_SET:-no}${A:-no}${EMPTY:-no}", "no1no"),
            ("<${EMPTY}>", "<>"),
            ("${FIRN_NOT_SET:-}", ""),
            ("${FIRN_NOT_SET:-${DIR}/xchg}", "/state/xchg"),
            ("${FIRN_NOT_SET:-${FIRN_NOR_THIS:-${A}}}}", "1}"),
            ("$$A $${A} ${FIRN_NOT_SET:-$$}", "$A ${A} $"),
            ("ä${A}ö", "ä1ö"),
        ] {
            assert_eq!(expand(text).as_deref(), Ok(expanded), "{text}");
        }
    }

    #[test]
    fn what_is_none() {
        assert_eq!(expand("${FIRN_NOT_SET}"), Err(ExpandError::Unset("FIRN_NOT_SET".into())));
        for text in ["$A", "a$", "${A", "${}", "${1}", "${A B}", "${A-x}", "$(ls)", "${A:-${A}"] {
            let error = expand(text).expect_err(text).to_string();
            assert!(error.contains("is no variable"), "{error}");
        }
        let deep = "${X:-".repeat(1000) + &"}".repeat(1000);
        assert!(matches!(expand(&deep), Err(ExpandError::Syntax(_))));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in "[$\\{\\}:A\\-ä]{0,40}") {
            let _ = expand(&text);
        }
    }
}
