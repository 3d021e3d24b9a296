//! The 8042 keyboard controller with a keyboard and a mouse (IBM PS/2 technical reference; ICH9 data sheet 13.7).
//!
//! ```text
//!  port 64 write --> command --> controller reply --+
//!  port 60 write --> keyboard, or what the command asked for
//!  keyboard queue --(translation to set 1)----------+--> output buffer --> port 60 read
//!  mouse queue -------------------------------------+       |  IRQ 1 / IRQ 12 while full
//! ```
//!
//! The output buffer holds one byte; reading it lowers the interrupt and lets the next byte in: controller
//! replies first, then the keyboard, then the mouse. Address line 20 is always on; switching it is accepted and
//! remembered for nobody. Ports: 60 ([`I8042::data_port`]), 64 ([`I8042::command_port`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use atoll_machine::bus::PortDevice;
use atoll_machine::control::{MachineRequest, SharedControl};
use atoll_machine::inputs::{InputGate, InputKind};
use atoll_machine::interrupt::IrqLine;

use crate::lock;
use keyboard::Keyboard;
use mouse::Mouse;
use saved_state::I8042StateV1;

mod keyboard;
mod mouse;
pub mod saved_state;
#[cfg(test)]
mod tests;

const STATUS_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_MOUSE: u8 = 0x20;

const MODE_KEYBOARD_IRQ: u8 = 0x01;
const MODE_MOUSE_IRQ: u8 = 0x02;
const MODE_SYSTEM: u8 = 0x04;
const MODE_KEYBOARD_OFF: u8 = 0x10;
const MODE_MOUSE_OFF: u8 = 0x20;
const MODE_TRANSLATE: u8 = 0x40;

/// Replies of the controller that wait; software that never reads gets no more.
const MAX_REPLIES: usize = 16;

/// Where a byte in the output buffer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Keyboard,
    Mouse,
}

/// What the next byte written to port 60 is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expecting {
    /// The keyboard.
    #[default]
    Keyboard,
    /// Byte `n` of controller memory; 0 is the mode.
    Memory(u8),
    /// The output port.
    OutputPort,
    /// To be returned as if the keyboard had sent it.
    KeyboardLoop,
    /// To be returned as if the mouse had sent it.
    MouseLoop,
    /// The mouse.
    Mouse,
}

struct Inner {
    /// 32 bytes of memory; byte 0 is the mode.
    memory: [u8; 32],
    expecting: Expecting,
    last_was_command: bool,
    output: Option<(u8, Origin)>,
    replies: VecDeque<(u8, Origin)>,
    keyboard: Keyboard,
    mouse: Mouse,
    /// Output port bits that software wrote.
    output_port: u8,
}

impl Inner {
    fn power_on() -> Self {
        let mut memory = [0; 32];
        memory[0] = MODE_KEYBOARD_IRQ | MODE_SYSTEM | MODE_TRANSLATE;
        Self {
            memory,
            expecting: Expecting::Keyboard,
            last_was_command: false,
            output: None,
            replies: VecDeque::new(),
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
            output_port: 0x03,
        }
    }

    fn mode(&self) -> u8 {
        self.memory[0]
    }

    fn reply(&mut self, byte: u8, origin: Origin) {
        if self.replies.len() < MAX_REPLIES {
            self.replies.push_back((byte, origin));
        }
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED | self.mode() & STATUS_SYSTEM;
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        match self.output {
            Some((_, Origin::Mouse)) => status | STATUS_FULL | STATUS_MOUSE,
            Some((_, Origin::Keyboard)) => status | STATUS_FULL,
            None => status,
        }
    }

    /// Puts the next byte into an empty output buffer.
    fn refill(&mut self) {
        if self.output.is_some() {
            return;
        }
        self.output = self.replies.pop_front();
        if self.output.is_none() && self.mode() & MODE_KEYBOARD_OFF == 0 {
            let translate = self.mode() & MODE_TRANSLATE != 0;
            self.output = self.keyboard.next(translate).map(|byte| (byte, Origin::Keyboard));
        }
        if self.output.is_none() && self.mode() & MODE_MOUSE_OFF == 0 {
            self.output = self.mouse.next().map(|byte| (byte, Origin::Mouse));
        }
    }

    fn read_output_port(&self) -> u8 {
        let full = match self.output {
            Some((_, Origin::Keyboard)) => 0x10,
            Some((_, Origin::Mouse)) => 0x20,
            None => 0,
        };
        self.output_port & 0xcc | 0x03 | full
    }
}

/// The controller. See the module's documentation.
pub struct I8042 {
    inner: Mutex<Inner>,
    keyboard_irq: IrqLine,
    mouse_irq: IrqLine,
    control: SharedControl,
    gate: Arc<InputGate>,
}

impl I8042 {
    /// A controller on IRQ 1 and IRQ 12; its reset output goes to `control`.
    pub fn new(
        keyboard_irq: IrqLine,
        mouse_irq: IrqLine,
        control: SharedControl,
        gate: Arc<InputGate>,
    ) -> Arc<Self> {
        let inner = Mutex::new(Inner::power_on());
        Arc::new(Self { inner, keyboard_irq, mouse_irq, control, gate })
    }

    /// Device for port 60.
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(DataPort(self.clone()))
    }
    /// Device for port 64.
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(CommandPort(self.clone()))
    }

    /// Key events: scan codes of set 2 (`1c`, `f0 1c`, `e0 75`...), from any thread. Dropped as a whole when the
    /// keyboard is off or its buffer is full.
    pub fn key(self: &Arc<Self>, scan_codes: &[u8]) {
        let (this, codes) = (self.clone(), scan_codes.to_vec());
        self.gate.deliver(InputKind::Console, move || this.change(|inner| inner.keyboard.key(&codes)));
    }

    /// Pointer movement: right and up positive, `wheel` towards the user positive; bits 0, 1, 2 of `buttons` are
    /// left, right, middle. From any thread.
    pub fn pointer(self: &Arc<Self>, dx: i32, dy: i32, wheel: i32, buttons: u8) {
        let this = self.clone();
        let movement = move || this.change(|inner| inner.mouse.moved(dx, dy, wheel, buttons));
        self.gate.deliver(InputKind::Console, movement);
    }

    /// Applies a change, then lets the next byte in and drives the interrupts.
    fn change<R>(&self, change: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = lock(&self.inner);
        let result = change(&mut inner);
        inner.refill();
        self.drive(&inner);
        result
    }

    fn drive(&self, inner: &Inner) {
        let (mode, origin) = (inner.mode(), inner.output.map(|(_, origin)| origin));
        self.keyboard_irq.set(origin == Some(Origin::Keyboard) && mode & MODE_KEYBOARD_IRQ != 0);
        self.mouse_irq.set(origin == Some(Origin::Mouse) && mode & MODE_MOUSE_IRQ != 0);
    }

    fn read_data(&self) -> u8 {
        let mut inner = lock(&self.inner);
        let Some((byte, _)) = inner.output.take() else { return 0 };
        // The wires fall before the next byte raises them: each byte is an edge.
        self.drive(&inner);
        inner.refill();
        self.drive(&inner);
        byte
    }

    fn write_data(&self, inner: &mut Inner, value: u8) {
        inner.last_was_command = false;
        match std::mem::take(&mut inner.expecting) {
            Expecting::Keyboard => {
                inner.memory[0] &= !MODE_KEYBOARD_OFF;
                inner.keyboard.command(value);
            }
            Expecting::Memory(n) => inner.memory[usize::from(n & 31)] = value,
            Expecting::OutputPort => {
                inner.output_port = value;
                if value & 1 == 0 {
                    self.control.request(MachineRequest::Reset);
                }
            }
            Expecting::KeyboardLoop => inner.reply(value, Origin::Keyboard),
            Expecting::MouseLoop => inner.reply(value, Origin::Mouse),
            Expecting::Mouse => {
                inner.memory[0] &= !MODE_MOUSE_OFF;
                inner.mouse.command(value);
            }
        }
    }

    fn write_command(&self, inner: &mut Inner, command: u8) {
        inner.last_was_command = true;
        inner.expecting = Expecting::Keyboard;
        match command {
            0x20..=0x3f => {
                let byte = inner.memory[usize::from(command & 31)];
                inner.reply(byte, Origin::Keyboard);
            }
            0x60..=0x7f => inner.expecting = Expecting::Memory(command & 31),
            0xa7 => inner.memory[0] |= MODE_MOUSE_OFF,
            0xa8 => inner.memory[0] &= !MODE_MOUSE_OFF,
            // Interface tests: no fault.
            0xa9 | 0xab => inner.reply(0x00, Origin::Keyboard),
            0xaa => {
                inner.memory[0] |= MODE_SYSTEM;
                inner.reply(0x55, Origin::Keyboard);
            }
            0xad => inner.memory[0] |= MODE_KEYBOARD_OFF,
            0xae => inner.memory[0] &= !MODE_KEYBOARD_OFF,
            // Input port: keyboard not locked, display is colour.
            0xc0 => inner.reply(0x80, Origin::Keyboard),
            0xd0 => {
                let byte = inner.read_output_port();
                inner.reply(byte, Origin::Keyboard);
            }
            0xd1 => inner.expecting = Expecting::OutputPort,
            0xd2 => inner.expecting = Expecting::KeyboardLoop,
            0xd3 => inner.expecting = Expecting::MouseLoop,
            0xd4 => inner.expecting = Expecting::Mouse,
            // Pulse output lines: bit 0 low pulses the reset line.
            0xf0..=0xff if command & 1 == 0 => self.control.request(MachineRequest::Reset),
            _ => {}
        }
    }

    /// Power-on state.
    pub fn reset(&self) {
        self.change(|inner| *inner = Inner::power_on());
    }

    /// The saved form.
    pub fn save(&self) -> I8042StateV1 {
        lock(&self.inner).save()
    }

    /// Takes over a saved state and drives the wires accordingly.
    pub fn restore(&self, saved: &I8042StateV1) {
        let mut inner = lock(&self.inner);
        *inner = Inner::restored(saved);
        self.drive(&inner);
    }
}

struct DataPort(Arc<I8042>);
impl PortDevice for DataPort {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = self.0.read_data();
        }
    }
    fn port_write(&self, _offset: u16, data: &[u8]) {
        if let Some(&byte) = data.first() {
            self.0.change(|inner| self.0.write_data(inner, byte));
        }
    }
}

struct CommandPort(Arc<I8042>);
impl PortDevice for CommandPort {
    fn port_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = lock(&self.0.inner).status();
        }
    }
    fn port_write(&self, _offset: u16, data: &[u8]) {
        if let Some(&byte) = data.first() {
            self.0.change(|inner| self.0.write_command(inner, byte));
        }
    }
}
