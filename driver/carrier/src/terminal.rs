//! This process's terminal, handed to a guest.

use std::io::{self, IsTerminal, Stdin};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A terminal that passes every key on, until this is dropped.
pub struct RawTerminal {
    input: Stdin,
    before: Termios,
}

impl RawTerminal {
    /// Makes standard input raw, if it is a terminal.
    ///
    /// # Errors
    /// If the terminal does not let itself be changed.
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
        // What was typed for the guest must not be taken for a shell's command.
        let _ = tcsetattr(&self.input, SetArg::TCSAFLUSH, &self.before);
    }
}
