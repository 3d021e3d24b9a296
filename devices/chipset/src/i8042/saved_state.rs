//! Saved form of the keyboard controller.

use super::keyboard::{self, Keyboard};
use super::mouse::{self, Mouse};
use super::{Expecting, Inner, MAX_REPLIES, Origin};

/// The controller. Every default is the power-on value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct I8042StateV1 {
    /// 32 bytes of memory, the mode first.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub memory: Option<Vec<u8>>,
    /// What port 60 expects: 0 keyboard, 1 output port, 2 keyboard loop, 3 mouse loop, 4 mouse, 32 + n memory n.
    #[prost(uint32, optional, tag = "2")]
    pub expecting: Option<u32>,
    /// The last write was to port 64.
    #[prost(bool, optional, tag = "3")]
    pub last_was_command: Option<bool>,
    /// Output buffer: byte, plus 256 from the keyboard or 512 from the mouse. Default: empty.
    #[prost(uint32, optional, tag = "4")]
    pub output: Option<u32>,
    /// Replies that wait, in the form of `output`.
    #[prost(uint32, repeated, tag = "5")]
    pub replies: Vec<u32>,
    /// Output port.
    #[prost(uint32, optional, tag = "6")]
    pub output_port: Option<u32>,
    /// The keyboard.
    #[prost(message, optional, tag = "7")]
    pub keyboard: Option<KeyboardStateV1>,
    /// The mouse.
    #[prost(message, optional, tag = "8")]
    pub mouse: Option<MouseStateV1>,
}

/// The keyboard. Every default is the power-on value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeyboardStateV1 {
    /// Bytes not yet sent.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub queue: Option<Vec<u8>>,
    /// Keys are reported.
    #[prost(bool, optional, tag = "2")]
    pub scanning: Option<bool>,
    /// Scan code set 1-3.
    #[prost(uint32, optional, tag = "3")]
    pub scan_set: Option<u32>,
    /// Lights.
    #[prost(uint32, optional, tag = "4")]
    pub leds: Option<u32>,
    /// Repeat rate and delay.
    #[prost(uint32, optional, tag = "5")]
    pub typematic: Option<u32>,
    /// Command that waits for its argument.
    #[prost(uint32, optional, tag = "6")]
    pub pending: Option<u32>,
    /// Byte to send again.
    #[prost(uint32, optional, tag = "7")]
    pub last_sent: Option<u32>,
    /// A release prefix is being translated.
    #[prost(bool, optional, tag = "8")]
    pub release: Option<bool>,
}

/// The mouse. Every default is the power-on value.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MouseStateV1 {
    /// Bytes not yet sent.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub queue: Option<Vec<u8>>,
    /// Bits: 0 reporting, 1 remote, 2 wrap, 3 scaling.
    #[prost(uint32, optional, tag = "2")]
    pub modes: Option<u32>,
    /// Resolution 0-3.
    #[prost(uint32, optional, tag = "3")]
    pub resolution: Option<u32>,
    /// Reports a second.
    #[prost(uint32, optional, tag = "4")]
    pub rate: Option<u32>,
    /// The last three rates.
    #[prost(bytes = "vec", optional, tag = "5")]
    pub knock: Option<Vec<u8>>,
    /// Device id 0, 3 or 4.
    #[prost(uint32, optional, tag = "6")]
    pub id: Option<u32>,
    /// Command that waits for its argument.
    #[prost(uint32, optional, tag = "7")]
    pub pending: Option<u32>,
    /// Buttons held.
    #[prost(uint32, optional, tag = "8")]
    pub buttons: Option<u32>,
    /// Movement not yet reported: x, y, wheel.
    #[prost(sint32, repeated, tag = "9")]
    pub movement: Vec<i32>,
}

fn pack((byte, origin): (u8, Origin)) -> u32 {
    u32::from(byte) | if origin == Origin::Keyboard { 256 } else { 512 }
}
fn unpack(value: u32) -> (u8, Origin) {
    (value as u8, if value & 512 != 0 { Origin::Mouse } else { Origin::Keyboard })
}

impl Inner {
    pub(super) fn save(&self) -> I8042StateV1 {
        I8042StateV1 {
            memory: Some(self.memory.to_vec()),
            expecting: Some(match self.expecting {
                Expecting::Keyboard => 0,
                Expecting::OutputPort => 1,
                Expecting::KeyboardLoop => 2,
                Expecting::MouseLoop => 3,
                Expecting::Mouse => 4,
                Expecting::Memory(n) => 32 + u32::from(n),
            }),
            last_was_command: Some(self.last_was_command),
            output: self.output.map(pack),
            replies: self.replies.iter().copied().map(pack).collect(),
            output_port: Some(u32::from(self.output_port)),
            keyboard: Some(self.keyboard.save()),
            mouse: Some(self.mouse.save()),
        }
    }

    pub(super) fn restored(s: &I8042StateV1) -> Self {
        let mut inner = Self::power_on();
        for (to, from) in inner.memory.iter_mut().zip(s.memory.iter().flatten()) {
            *to = *from;
        }
        inner.expecting = match s.expecting.unwrap_or(0) {
            1 => Expecting::OutputPort,
            2 => Expecting::KeyboardLoop,
            3 => Expecting::MouseLoop,
            4 => Expecting::Mouse,
            n @ 32..64 => Expecting::Memory(n as u8 - 32),
            _ => Expecting::Keyboard,
        };
        inner.last_was_command = s.last_was_command.unwrap_or(false);
        inner.output = s.output.map(unpack);
        inner.replies = s.replies.iter().copied().map(unpack).take(MAX_REPLIES).collect();
        inner.output_port = s.output_port.map_or(inner.output_port, |v| v as u8);
        inner.keyboard = s.keyboard.as_ref().map(Keyboard::restored).unwrap_or_default();
        inner.mouse = s.mouse.as_ref().map(Mouse::restored).unwrap_or_default();
        inner
    }
}

impl Keyboard {
    fn save(&self) -> KeyboardStateV1 {
        KeyboardStateV1 {
            queue: Some(self.queue.iter().copied().collect()),
            scanning: Some(self.scanning),
            scan_set: Some(u32::from(self.scan_set)),
            leds: Some(u32::from(self.leds)),
            typematic: Some(u32::from(self.typematic)),
            pending: Some(u32::from(self.pending)),
            last_sent: Some(u32::from(self.last_sent)),
            release: Some(self.release),
        }
    }

    fn restored(s: &KeyboardStateV1) -> Self {
        let new = Self::default();
        let byte = |v: Option<u32>, default: u8| v.map_or(default, |v| v as u8);
        Self {
            queue: s.queue.iter().flatten().copied().take(keyboard::QUEUE).collect(),
            scanning: s.scanning.unwrap_or(new.scanning),
            scan_set: byte(s.scan_set, new.scan_set).clamp(1, 3),
            leds: byte(s.leds, 0) & 7,
            typematic: byte(s.typematic, new.typematic),
            pending: byte(s.pending, 0),
            last_sent: byte(s.last_sent, 0),
            release: s.release.unwrap_or(false),
        }
    }
}

impl Mouse {
    fn save(&self) -> MouseStateV1 {
        let flag = |b: bool, bit: u32| u32::from(b) << bit;
        MouseStateV1 {
            queue: Some(self.queue.iter().copied().collect()),
            modes: Some(
                flag(self.reporting, 0) | flag(self.remote, 1) | flag(self.wrap, 2) | flag(self.scaling, 3),
            ),
            resolution: Some(u32::from(self.resolution)),
            rate: Some(u32::from(self.rate)),
            knock: Some(self.knock.to_vec()),
            id: Some(u32::from(self.id)),
            pending: Some(u32::from(self.pending)),
            buttons: Some(u32::from(self.buttons)),
            movement: self.movement.to_vec(),
        }
    }

    fn restored(s: &MouseStateV1) -> Self {
        let new = Self::default();
        let byte = |v: Option<u32>, default: u8| v.map_or(default, |v| v as u8);
        let modes = s.modes.unwrap_or(0);
        let mut knock = [0; 3];
        for (to, from) in knock.iter_mut().zip(s.knock.iter().flatten()) {
            *to = *from;
        }
        let mut movement = [0; 3];
        for (to, from) in movement.iter_mut().zip(&s.movement) {
            *to = *from;
        }
        Self {
            queue: s.queue.iter().flatten().copied().take(mouse::QUEUE).collect(),
            reporting: modes & 1 != 0,
            remote: modes & 2 != 0,
            wrap: modes & 4 != 0,
            scaling: modes & 8 != 0,
            resolution: byte(s.resolution, new.resolution) & 3,
            rate: byte(s.rate, new.rate),
            knock,
            id: match s.id {
                Some(id @ (3 | 4)) => id as u8,
                _ => 0,
            },
            pending: byte(s.pending, 0),
            buttons: byte(s.buttons, 0) & 0x1f,
            movement,
        }
    }
}
