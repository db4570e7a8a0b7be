//! What differs by processor: a folder for each, whose modules have the same names. Nothing outside knows which it is.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
