//! The mouse: PS/2 commands, and the wheel and five-button extensions that drivers knock for.

use std::collections::VecDeque;

/// Bytes that the mouse holds.
pub(super) const QUEUE: usize = 64;
/// Room kept for replies to commands.
const RESERVED: usize = 16;

const ACK: u8 = 0xfa;
const ERROR: u8 = 0xfc;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mouse {
    pub(super) queue: VecDeque<u8>,
    pub(super) reporting: bool,
    /// Remote mode: movement is sent when asked for.
    pub(super) remote: bool,
    /// Wrap mode: everything is sent back.
    pub(super) wrap: bool,
    pub(super) scaling: bool,
    pub(super) resolution: u8,
    pub(super) rate: u8,
    /// Last three rates: the knock for the extensions.
    pub(super) knock: [u8; 3],
    /// 0 plain, 3 wheel, 4 wheel and five buttons.
    pub(super) id: u8,
    pub(super) pending: u8,
    pub(super) buttons: u8,
    /// Movement not yet reported.
    pub(super) movement: [i32; 3],
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            reporting: false,
            remote: false,
            wrap: false,
            scaling: false,
            resolution: 2,
            rate: 100,
            knock: [0; 3],
            id: 0,
            pending: 0,
            buttons: 0,
            movement: [0; 3],
        }
    }
}

impl Mouse {
    fn send(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= QUEUE {
            self.queue.extend(bytes);
        }
    }

    pub(super) fn next(&mut self) -> Option<u8> {
        self.queue.pop_front()
    }

    pub(super) fn moved(&mut self, dx: i32, dy: i32, wheel: i32, buttons: u8) {
        if !self.reporting || self.wrap {
            return;
        }
        for (total, by) in self.movement.iter_mut().zip([dx, dy, wheel]) {
            *total = total.saturating_add(by);
        }
        self.buttons = buttons & 0x1f;
        if self.remote {
            return;
        }
        // One packet at least, for the buttons; more while the movement does not fit.
        loop {
            if self.queue.len() + 4 > QUEUE - RESERVED {
                return;
            }
            self.packet();
            if self.movement == [0; 3] {
                return;
            }
        }
    }

    /// Queues one movement packet.
    fn packet(&mut self) {
        let mut take = |axis: usize, limit: i32| {
            let part = self.movement[axis].clamp(-limit, limit);
            self.movement[axis] -= part;
            part
        };
        let (dx, dy) = (take(0, 255), take(1, 255));
        let wheel = take(2, if self.id == 0 { 0 } else { 7 });
        if self.id == 0 {
            self.movement[2] = 0;
        }
        let signs = u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        self.send(&[self.buttons & 7 | 0x08 | signs, dx as u8, dy as u8]);
        match self.id {
            3 => self.send(&[wheel as u8]),
            4 => self.send(&[wheel as u8 & 15 | (self.buttons & 0x18) << 1]),
            _ => {}
        }
    }

    pub(super) fn command(&mut self, value: u8) {
        if self.wrap && !matches!(value, 0xec | 0xff) {
            self.send(&[value]);
            return;
        }
        match std::mem::take(&mut self.pending) {
            0xe8 => {
                self.resolution = value & 3;
                self.send(&[ACK]);
            }
            0xf3 => {
                self.set_rate(value);
                self.send(&[ACK]);
            }
            _ => self.first_byte(value),
        }
    }

    fn set_rate(&mut self, rate: u8) {
        self.rate = rate;
        self.knock = [self.knock[1], self.knock[2], rate];
        match self.knock {
            [200, 100, 80] => self.id = 3,
            [200, 200, 80] if self.id == 3 => self.id = 4,
            _ => {}
        }
    }

    fn first_byte(&mut self, value: u8) {
        match value {
            0xe8 | 0xf3 => self.pending = value,
            0xe6 | 0xe7 => self.scaling = value == 0xe7,
            0xea | 0xf0 => self.remote = value == 0xf0,
            0xec | 0xee => self.wrap = value == 0xee,
            0xf4 | 0xf5 => self.reporting = value == 0xf4,
            0xf6 => {
                let id = self.id;
                *self = Self { id, ..Self::default() };
            }
            0xe9 | 0xeb | 0xf2 | 0xff => {}
            _ => {
                self.send(&[ERROR]);
                return;
            }
        }
        self.send(&[ACK]);
        match value {
            0xe9 => {
                let swapped = self.buttons & 1 << 2 | self.buttons >> 1 & 1 | self.buttons >> 1 & 2;
                let modes =
                    u8::from(self.scaling) << 4 | u8::from(self.reporting) << 5 | u8::from(self.remote) << 6;
                self.send(&[modes | swapped & 7, self.resolution, self.rate]);
            }
            0xeb => self.packet(),
            0xf2 => self.send(&[self.id]),
            0xff => {
                *self = Self::default();
                self.send(&[ACK, 0xaa, 0x00]);
            }
            _ => {}
        }
    }
}
