//! The two ends of a flow-control window: see the module's documentation.

use super::WINDOW;

/// The sender's end: what it may still send.
#[derive(Debug)]
pub struct SendWindow(u32);

impl Default for SendWindow {
    fn default() -> Self {
        Self(WINDOW)
    }
}

impl SendWindow {
    /// What may be sent at the moment.
    #[must_use]
    pub fn open(&self) -> u32 {
        self.0
    }

    /// Takes `cost` out; false, and nothing taken, if it is not open that far.
    #[must_use]
    pub fn spend(&mut self, cost: u32) -> bool {
        let left = self.0.checked_sub(cost);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }

    /// Adds what the receiver granted; false if that is more than it can have received.
    #[must_use]
    pub fn grant(&mut self, credit: u32) -> bool {
        let open = self.0.checked_add(credit).filter(|open| *open <= WINDOW);
        self.0 = open.unwrap_or(self.0);
        open.is_some()
    }
}

/// The receiver's end: what the sender may still send, and what is to be granted.
#[derive(Debug)]
pub struct ReceiveWindow {
    open: u32,
    owed: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self { open: WINDOW, owed: 0 }
    }
}

impl ReceiveWindow {
    /// Notes a received message; false if the sender was not allowed to send it.
    #[must_use]
    pub fn receive(&mut self, cost: u32) -> bool {
        let left = self.open.checked_sub(cost);
        self.open = left.unwrap_or(self.open);
        left.is_some()
    }

    /// Notes that a received message of this cost has been used up, and gives the credit to send now, if any.
    ///
    /// Credit is saved up to a quarter of the window. A sender that waits still makes progress: whatever is received
    /// and used up leaves it three quarters.
    pub fn release(&mut self, cost: u32) -> Option<u32> {
        self.owed = self.owed.saturating_add(cost);
        if self.owed < WINDOW / 4 {
            return None;
        }
        let credit = std::mem::take(&mut self.owed);
        self.open = self.open.saturating_add(credit);
        Some(credit)
    }
}
