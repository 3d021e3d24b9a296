//! Which of the two consoles gets what is typed.
//!
//! ```text
//!                 virtio prints
//!   ┌────────────┐ ────────────► ┌────────────┐
//!   │   Serial   │               │   Virtio   │      Ctrl-A c, from anywhere: to the other one,
//!   └────────────┘ ◄──────────── └────────────┘      by hand, for good
//!     │        ▲      reboot
//!     │ typed  │ reboot
//!     ▼        │
//!   ┌────────────┐
//!   │  Answered  │  the serial port, although virtio prints
//!   └────────────┘
//! ```
//!
//! A distribution asks for a login on both consoles. Whoever answers a question on the serial port (what is typed
//! while its last line is unfinished) means that conversation, so it stays there. What is typed while a kernel
//! prints its messages, whole lines, answers nothing.

use std::sync::{Mutex, MutexGuard, PoisonError};

use atoll_vmm::ConsoleId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Serial,
    Virtio,
    Answered,
    ByHand(ConsoleId),
}

impl State {
    /// Where the keys go.
    fn console(self) -> ConsoleId {
        match self {
            Self::Serial | Self::Answered => ConsoleId::Serial,
            Self::Virtio => ConsoleId::Virtio,
            Self::ByHand(console) => console,
        }
    }
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// The serial port's last line is unfinished.
    asks: bool,
}

/// Which console the keys go to.
#[derive(Debug)]
pub(super) struct Focus(Mutex<Inner>);

impl Focus {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Inner { state: State::Serial, asks: false }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Console `id` printed `data`.
    pub(super) fn printed(&self, id: ConsoleId, data: &[u8]) {
        let Some(last) = data.last() else { return };
        let mut inner = self.lock();
        match id {
            ConsoleId::Serial => inner.asks = *last != b'\n',
            ConsoleId::Virtio if inner.state == State::Serial => inner.state = State::Virtio,
            ConsoleId::Virtio => {}
        }
    }

    /// Something is typed. Returns where it goes.
    pub(super) fn typed(&self) -> ConsoleId {
        let mut inner = self.lock();
        if inner.state == State::Serial && inner.asks {
            inner.state = State::Answered;
        }
        inner.state.console()
    }

    /// Goes to the other console; returns its name.
    pub(super) fn switch(&self) -> &'static str {
        let mut inner = self.lock();
        let (other, name) = match inner.state.console() {
            ConsoleId::Serial => (ConsoleId::Virtio, "virtio console (hvc0)"),
            ConsoleId::Virtio => (ConsoleId::Serial, "serial console (ttyS0)"),
        };
        inner.state = State::ByHand(other);
        name
    }

    /// The guest starts over: its kernel prints on the serial port again.
    pub(super) fn rebooted(&self) {
        let mut inner = self.lock();
        inner.asks = false;
        if matches!(inner.state, State::Virtio | State::Answered) {
            inner.state = State::Serial;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ConsoleId::{Serial, Virtio};

    #[test]
    fn keys_follow_the_shell_to_the_virtio_console_whatever_was_typed_ahead() {
        let focus = Focus::new();
        focus.printed(Serial, b"[    0.1] a message\r\n");
        assert_eq!(focus.typed(), Serial);
        focus.printed(Virtio, b"");
        assert_eq!(focus.typed(), Serial, "nothing was printed");
        focus.printed(Virtio, b"# ");
        assert_eq!(focus.typed(), Virtio);
        focus.rebooted();
        assert_eq!(focus.typed(), Serial);
    }

    #[test]
    fn a_login_that_was_begun_on_the_serial_port_goes_on_there() {
        let focus = Focus::new();
        focus.printed(Serial, b"debian login: ");
        assert_eq!(focus.typed(), Serial);
        focus.printed(Virtio, b"debian login: ");
        focus.printed(Serial, b"root\r\nPassword: ");
        assert_eq!(focus.typed(), Serial);
        focus.rebooted();
        focus.printed(Virtio, b"# ");
        assert_eq!(focus.typed(), Virtio);
    }

    #[test]
    fn a_prompt_on_the_virtio_console_wins_until_somebody_answers_the_other() {
        let focus = Focus::new();
        focus.printed(Serial, b"debian login: ");
        focus.printed(Virtio, b"debian login: ");
        assert_eq!(focus.typed(), Virtio);
    }

    #[test]
    fn a_choice_by_hand_stays() {
        let focus = Focus::new();
        assert_eq!(focus.switch(), "virtio console (hvc0)");
        focus.printed(Serial, b"login: ");
        assert_eq!(focus.typed(), Virtio);
        focus.rebooted();
        assert_eq!(focus.typed(), Virtio);
        focus.switch();
        focus.printed(Virtio, b"x");
        assert_eq!(focus.typed(), Serial);
    }
}
