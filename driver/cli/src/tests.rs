use clap::CommandFactory;

use super::*;

#[test]
fn the_command_line_makes_sense() {
    Cli::command().debug_assert();
}

#[test]
fn the_help_teaches() {
    let help = Cli::command().render_help().to_string();
    for word in ["test", "doctor", "Examples:", "Exit status", "[nodes.machine1]"] {
        assert!(help.contains(word), "{help}");
    }
}

#[test]
fn the_test_file_in_the_help_is_one() {
    let text = AFTER_HELP.split_once("A test is a TOML file:\n").expect("it is there").1;
    let text = text.split_once("\n\nExit").expect("it ends").0.replace("\n  ", "\n");
    let test =
        firn::config::TestConfig::from_toml(text.trim_start(), std::path::Path::new("ping.toml"));
    assert_eq!(test.expect("a valid test").nodes.len(), 2);
}
