//! Hands this process's terminal to a guest.

use std::io::{self, IsTerminal, Stdin};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A terminal in raw mode until this is dropped.
pub struct RawTerminal {
    input: Stdin,
    before: Termios,
}

impl RawTerminal {
    /// Sets standard input to raw mode, if it is a terminal.
    ///
    /// # Errors
    /// If the terminal's mode cannot be changed.
    pub fn of_stdin() -> io::Result<Option<Self>> {
        let input = io::stdin();
        if !input.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&input)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&input, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { input, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // What was typed for the guest must not reach the shell.
        let _ = tcsetattr(&self.input, SetArg::TCSAFLUSH, &self.before);
    }
}
