//! Errors as text.
//!
//! One rule holds in all of firn: a message says what its own level knows, and the cause is its `source`. An error of
//! another crate whose message repeats its causes is quoted in a message instead, and is no source.

use std::error::Error;
use std::iter::successors;

/// An error and its causes in one text.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let texts = successors(Some(error), |&error| error.source()).map(ToString::to_string);
    texts.collect::<Vec<_>>().join(": ")
}
