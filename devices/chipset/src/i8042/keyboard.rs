//! The keyboard: commands, and scan codes of sets 1 and 2.

use std::collections::VecDeque;

/// Bytes that the keyboard holds.
pub(super) const QUEUE: usize = 64;
/// Room kept for replies to commands.
const RESERVED: usize = 16;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keyboard {
    pub(super) queue: VecDeque<u8>,
    pub(super) scanning: bool,
    /// 1, 2 or 3.
    pub(super) scan_set: u8,
    pub(super) leds: u8,
    pub(super) typematic: u8,
    /// Command that waits for its argument; 0 when none does.
    pub(super) pending: u8,
    pub(super) last_sent: u8,
    /// The controller has swallowed an `f0`: the next code is a release.
    pub(super) release: bool,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            scanning: true,
            scan_set: 2,
            leds: 0,
            typematic: 0x2b,
            pending: 0,
            last_sent: 0,
            release: false,
        }
    }
}

impl Keyboard {
    fn send(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= QUEUE {
            self.queue.extend(bytes);
        }
    }

    pub(super) fn key(&mut self, set2: &[u8]) {
        if !self.scanning || self.queue.len() + set2.len() > QUEUE - RESERVED {
            return;
        }
        if self.scan_set != 1 {
            self.queue.extend(set2);
            return;
        }
        let mut release = false;
        for &code in set2 {
            if let Some(code) = to_set1(code, &mut release) {
                self.queue.push_back(code);
            }
        }
    }

    /// The next byte as the controller forwards it.
    pub(super) fn next(&mut self, translate: bool) -> Option<u8> {
        loop {
            let byte = self.queue.pop_front()?;
            self.last_sent = byte;
            if !translate {
                return Some(byte);
            }
            if let Some(byte) = to_set1(byte, &mut self.release) {
                return Some(byte);
            }
        }
    }

    pub(super) fn command(&mut self, value: u8) {
        match std::mem::take(&mut self.pending) {
            0xed => {
                self.leds = value & 7;
                self.send(&[ACK]);
            }
            0xf3 => {
                self.typematic = value & 0x7f;
                self.send(&[ACK]);
            }
            0xf0 => match value {
                0 => self.send(&[ACK, self.scan_set]),
                1..=3 => {
                    self.scan_set = value;
                    self.send(&[ACK]);
                }
                _ => self.send(&[RESEND]),
            },
            _ => self.first_byte(value),
        }
    }

    fn first_byte(&mut self, value: u8) {
        match value {
            0xed | 0xf0 | 0xf3 => {
                self.pending = value;
                self.send(&[ACK]);
            }
            0xee => self.send(&[0xee]),
            0xf2 => self.send(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.scanning = true;
                self.queue.clear();
                self.send(&[ACK]);
            }
            0xf5 | 0xf6 => {
                *self = Self { scanning: value == 0xf6, ..Self::default() };
                self.send(&[ACK]);
            }
            // Per-key modes of set 3: nothing differs.
            0xf7..=0xfa => self.send(&[ACK]),
            0xfe => self.send(&[self.last_sent]),
            0xff => {
                *self = Self::default();
                self.send(&[ACK, 0xaa]);
            }
            _ => self.send(&[RESEND]),
        }
    }
}

/// One byte of set 2 as set 1; `None` for the release prefix, which becomes bit 7 of the next code.
fn to_set1(code: u8, release: &mut bool) -> Option<u8> {
    if code == 0xf0 {
        *release = true;
        return None;
    }
    let make = match code {
        0x83 => 0x41,
        0x84 => 0x54,
        0x80.. => return Some(code),
        _ => SET2_TO_SET1[usize::from(code)],
    };
    let bit = if std::mem::take(release) { 0x80 } else { 0 };
    Some(make | bit)
}

/// The translation that the controller's ROM holds.
#[rustfmt::skip]
const SET2_TO_SET1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];
