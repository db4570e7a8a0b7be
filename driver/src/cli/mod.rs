//! The command line.
//!
//! Each subcommand is a file here with `pub struct Args` (clap) and
//! `pub fn run(args: &Args) -> anyhow::Result<ExitCode>`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::log::colours_wanted;
