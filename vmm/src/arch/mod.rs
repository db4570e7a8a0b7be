//! What differs by processor.

pub mod x86_64;
