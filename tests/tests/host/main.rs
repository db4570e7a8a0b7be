//! Tests that run on the host itself.

mod carrier;
