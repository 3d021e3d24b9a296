//! The escape key of the console: Ctrl-A, then a letter.
//!
//! ```text
//!          other bytes (data)
//!          ┌──┐
//!          ▼  │    Ctrl-A            x p c h: a request
//!        ┌──────┐ ───────► ┌────────┐ a, Ctrl-A: one Ctrl-A as data
//!        │ Text │          │ Prefix │ other: dropped with the prefix
//!        └──────┘ ◄─────── └────────┘
//! ```

/// The escape key.
pub(crate) const ESCAPE: u8 = 0x01;

/// What came out of the filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// Bytes for the guest.
    Data(Vec<u8>),
    /// End the machine.
    Quit,
    /// Press the power button.
    PowerButton,
    /// Type to the other console.
    Switch,
    /// Show the keys.
    Help,
}

/// Takes the escape keys out of a stream of bytes.
pub(crate) struct EscapeFilter {
    enabled: bool,
    prefix: bool,
}

impl EscapeFilter {
    /// A filter; one that is not `enabled` passes everything.
    pub(crate) fn new(enabled: bool) -> Self {
        Self { enabled, prefix: false }
    }

    /// Splits `bytes` into data and requests, in order.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<Key> {
        if !self.enabled {
            return vec![Key::Data(bytes.to_vec())];
        }
        let mut keys = Vec::new();
        let mut data = Vec::new();
        for &byte in bytes {
            if !std::mem::take(&mut self.prefix) {
                match byte {
                    ESCAPE => self.prefix = true,
                    _ => data.push(byte),
                }
                continue;
            }
            let key = match byte {
                b'x' | b'X' => Key::Quit,
                b'p' | b'P' => Key::PowerButton,
                b'c' | b'C' => Key::Switch,
                b'h' | b'H' | b'?' => Key::Help,
                b'a' | b'A' | ESCAPE => {
                    data.push(ESCAPE);
                    continue;
                }
                _ => continue,
            };
            if !data.is_empty() {
                keys.push(Key::Data(std::mem::take(&mut data)));
            }
            keys.push(key);
        }
        if !data.is_empty() {
            keys.push(Key::Data(data));
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_keys_are_taken_out_in_order_even_across_reads() {
        let mut filter = EscapeFilter::new(true);
        assert_eq!(
            filter.feed(b"ab\x01hcd\x01"),
            [Key::Data(b"ab".to_vec()), Key::Help, Key::Data(b"cd".to_vec())]
        );
        assert_eq!(filter.feed(b"xyz"), [Key::Quit, Key::Data(b"yz".to_vec())]);
    }

    #[test]
    fn a_doubled_escape_reaches_the_guest_and_unknown_keys_do_nothing() {
        let mut filter = EscapeFilter::new(true);
        assert_eq!(filter.feed(b"\x01a\x01\x01\x01q!"), [Key::Data(b"\x01\x01!".to_vec())]);
        assert_eq!(filter.feed(b""), []);
    }

    #[test]
    fn a_pipe_has_no_escape_keys() {
        assert_eq!(EscapeFilter::new(false).feed(b"\x01x"), [Key::Data(b"\x01x".to_vec())]);
    }
}
