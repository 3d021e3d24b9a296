//! The 8259A interrupt controller pair of a PC (Intel 8259A data sheet; ELCR: ICH9 data sheet 13.4.7).
//!
//! ```text
//!            rising edge / high level        INTA (priority over ISR)      EOI or AEOI
//!  line ---------------------------> IRR bit -----------------------> ISR bit ------------> idle
//!                                       |  masked by IMR, held back by ISR of equal or higher priority
//!  slave INT --> master IR2;  master INT --> LINT0 of the local APICs
//! ```
//!
//! An edge stays latched in IRR until it is acknowledged; a level follows the wire. When the request is gone by
//! the time it is acknowledged, the chip answers with its spurious vector 7 and sets no ISR bit.
//!
//! Ports: 20-21 at offset 0-1 of [`Pic::master_ports`], A0-A1 of [`Pic::slave_ports`], 4D0-4D1 of
//! [`Pic::elcr_ports`]. Neighbours: [`crate::gsi`] drives the lines, the backend implements [`ExtIntSink`].

use std::sync::{Arc, Mutex, OnceLock};

use atoll_machine::bus::PortDevice;
use atoll_machine::interrupt::{ExtIntSink, ExtIntSource};

use crate::lock;
use saved_state::{PicChipStateV1, PicStateV1};

pub mod saved_state;
#[cfg(test)]
mod tests;

/// The wire of the master that the slave drives.
const CASCADE: u8 = 2;
/// No priority: nothing requested.
const NONE: u8 = 8;

/// Where the initialization sequence stands: which command word the data port expects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Init {
    /// Operational: the data port is the mask.
    #[default]
    Done,
    /// Vector base.
    Icw2,
    /// Cascade wiring.
    Icw3,
    /// Mode.
    Icw4,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels of the wires, to see edges.
    lines: u8,
    /// Level-triggered inputs (ELCR).
    elcr: u8,
    /// Priority rotation: the input with the highest priority.
    highest: u8,
    vector_base: u8,
    init: Init,
    icw4_follows: bool,
    single: bool,
    /// All inputs are level-triggered (LTIM of ICW1).
    all_level: bool,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    special_fully_nested: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    is_master: bool,
}

impl Chip {
    fn level_inputs(&self) -> u8 {
        if self.all_level { 0xff } else { self.elcr }
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let was = self.lines & bit != 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.level_inputs() & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if high && !was {
            self.irr |= bit;
        }
    }

    /// Distance of the most urgent input in `inputs` from the top of the rotation; [`NONE`] if empty.
    fn priority(&self, inputs: u8) -> u8 {
        let rotated = inputs.rotate_right(u32::from(self.highest));
        rotated.trailing_zeros() as u8
    }

    fn input_at(&self, priority: u8) -> u8 {
        priority.wrapping_add(self.highest) & 7
    }

    /// The input that the chip requests an interrupt for.
    fn request(&self) -> Option<u8> {
        let wanted = self.priority(self.irr & !self.imr);
        if wanted == NONE {
            return None;
        }
        let mut serviced = self.isr;
        if self.special_mask {
            serviced &= !self.imr;
        }
        if self.special_fully_nested && self.is_master {
            serviced &= !(1 << CASCADE);
        }
        (wanted < self.priority(serviced)).then(|| self.input_at(wanted))
    }

    /// The INTA cycle for `input`.
    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.highest = input.wrapping_add(1) & 7;
            }
        } else {
            self.isr |= bit;
        }
        if self.level_inputs() & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn start_init(&mut self, icw1: u8) {
        self.irr &= self.elcr & self.lines;
        self.isr = 0;
        self.imr = 0;
        self.highest = 0;
        self.read_isr = false;
        self.poll = false;
        self.special_mask = false;
        self.special_fully_nested = false;
        self.auto_eoi = false;
        self.rotate_on_auto_eoi = false;
        self.icw4_follows = icw1 & 1 != 0;
        self.single = icw1 & 2 != 0;
        self.all_level = icw1 & 8 != 0;
        self.init = Init::Icw2;
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.start_init(value);
        } else if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                self.poll = true;
            }
            if value & 0x02 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.operation(value >> 5, value & 7);
        }
    }

    /// OCW2: end of interrupt and rotation.
    fn operation(&mut self, command: u8, input: u8) {
        match command {
            // Rotate on automatic EOI: clear, set.
            0 | 4 => self.rotate_on_auto_eoi = command == 4,
            // Non-specific EOI, without and with rotation.
            1 | 5 => {
                let visible = if self.special_mask { self.isr & !self.imr } else { self.isr };
                let priority = self.priority(visible);
                if priority != NONE {
                    let input = self.input_at(priority);
                    self.isr &= !(1 << input);
                    if command == 5 {
                        self.highest = input.wrapping_add(1) & 7;
                    }
                }
            }
            // Specific EOI, without and with rotation; set priority.
            3 | 6 | 7 => {
                if command != 6 {
                    self.isr &= !(1 << input);
                }
                if command != 3 {
                    self.highest = input.wrapping_add(1) & 7;
                }
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.icw4_follows { Init::Icw4 } else { Init::Done };
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = if self.single { after_icw3 } else { Init::Icw3 };
            }
            Init::Icw3 => self.init = after_icw3,
            Init::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.init = Init::Done;
            }
        }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.request() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (data_port, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }
}

struct Inner {
    master: Chip,
    slave: Chip,
    /// Level of the INTR pin as last told to the CPUs.
    output: bool,
}

/// Both chips. See the module's documentation.
pub struct Pic {
    inner: Mutex<Inner>,
    cpu: OnceLock<Arc<dyn ExtIntSink>>,
}

impl Pic {
    /// Two chips before initialization: everything masked off by the absence of vectors.
    pub fn new() -> Arc<Self> {
        let master = Chip { is_master: true, ..Chip::default() };
        let inner = Inner { master, slave: Chip::default(), output: false };
        Arc::new(Self { inner: Mutex::new(inner), cpu: OnceLock::new() })
    }

    /// Connects the INTR pin. The first call counts.
    pub fn connect_cpu(&self, cpu: Arc<dyn ExtIntSink>) {
        let _ = self.cpu.set(cpu);
        let inner = lock(&self.inner);
        if let Some(cpu) = self.cpu.get() {
            cpu.set_extint(inner.output);
        }
    }

    /// Device for ports 20-21.
    pub fn master_ports(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(ChipPorts { pic: self.clone(), slave: false })
    }
    /// Device for ports A0-A1.
    pub fn slave_ports(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(ChipPorts { pic: self.clone(), slave: true })
    }
    /// Device for ports 4D0-4D1.
    pub fn elcr_ports(self: &Arc<Self>) -> Arc<dyn PortDevice> {
        Arc::new(ElcrPorts { pic: self.clone() })
    }

    /// Drives ISA interrupt `irq` (0-15). Wire 2 belongs to the cascade; others do not exist.
    pub fn set_irq(&self, irq: u32, high: bool) {
        let mut inner = lock(&self.inner);
        match irq {
            2 | 16.. => return,
            0..8 => inner.master.set_line(irq as u8, high),
            _ => inner.slave.set_line(irq as u8 - 8, high),
        }
        self.update(&mut inner);
    }

    /// Whether an edge on `irq` is latched, unmasked and not yet acknowledged: another edge now would be lost.
    pub fn request_pending(&self, irq: u32) -> bool {
        let inner = lock(&self.inner);
        let (chip, bit) = match irq {
            0..8 => (&inner.master, irq),
            8..16 => (&inner.slave, irq - 8),
            _ => return false,
        };
        chip.irr & !chip.imr & 1 << bit != 0
    }

    /// Propagates slave to master to CPU.
    fn update(&self, inner: &mut Inner) {
        let cascade = inner.slave.request().is_some();
        // The slave's INT follows its requests, so the cascade input does too; a latch would turn every request
        // that the slave takes back into a spurious interrupt 15.
        inner.master.irr = inner.master.irr & !(1 << CASCADE) | u8::from(cascade) << CASCADE;
        let output = inner.master.request().is_some();
        if output != inner.output {
            inner.output = output;
            if let Some(cpu) = self.cpu.get() {
                cpu.set_extint(output);
            }
        }
    }

    /// Power-on state. Wires keep their levels.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        for chip in [true, false] {
            let chip = if chip { &mut inner.master } else { &mut inner.slave };
            *chip = Chip { lines: chip.lines, is_master: chip.is_master, ..Chip::default() };
        }
        self.update(&mut inner);
    }

    /// The saved form.
    pub fn save(&self) -> PicStateV1 {
        let inner = lock(&self.inner);
        PicStateV1 { master: Some(inner.master.save()), slave: Some(inner.slave.save()) }
    }

    /// Takes over a saved state and drives the INTR pin accordingly.
    pub fn restore(&self, saved: &PicStateV1) {
        let mut inner = lock(&self.inner);
        inner.master = Chip::restored(saved.master.as_ref().unwrap_or(&PicChipStateV1::default()), true);
        inner.slave = Chip::restored(saved.slave.as_ref().unwrap_or(&PicChipStateV1::default()), false);
        self.update(&mut inner);
    }
}

impl ExtIntSource for Pic {
    fn acknowledge(&self) -> u8 {
        let mut inner = lock(&self.inner);
        let vector = match inner.master.request() {
            Some(CASCADE) => {
                inner.master.acknowledge(CASCADE);
                let input = inner.slave.request();
                if let Some(input) = input {
                    inner.slave.acknowledge(input);
                }
                inner.slave.vector_base | input.unwrap_or(7)
            }
            Some(input) => {
                inner.master.acknowledge(input);
                inner.master.vector_base | input
            }
            None => inner.master.vector_base | 7,
        };
        self.update(&mut inner);
        vector
    }
}

struct ChipPorts {
    pic: Arc<Pic>,
    slave: bool,
}

impl ChipPorts {
    fn with_chip<R>(&self, with: impl FnOnce(&mut Chip) -> R) -> R {
        let mut inner = lock(&self.pic.inner);
        let result = with(if self.slave { &mut inner.slave } else { &mut inner.master });
        self.pic.update(&mut inner);
        result
    }
}

impl PortDevice for ChipPorts {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let data_port = offset.wrapping_add(i as u16) & 1 != 0;
            *byte = self.with_chip(|chip| chip.read(data_port));
        }
    }
    fn port_write(&self, offset: u16, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            self.with_chip(|chip| match offset.wrapping_add(i as u16) & 1 {
                0 => chip.write_command(byte),
                _ => chip.write_data(byte),
            });
        }
    }
}

/// Edge/level control. Inputs 0, 1, 2, 8 and 13 are always edge-triggered.
struct ElcrPorts {
    pic: Arc<Pic>,
}

impl PortDevice for ElcrPorts {
    fn port_read(&self, offset: u16, data: &mut [u8]) {
        let inner = lock(&self.pic.inner);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = if (offset + i as u16) & 1 == 0 { inner.master.elcr } else { inner.slave.elcr };
        }
    }
    fn port_write(&self, offset: u16, data: &[u8]) {
        let mut inner = lock(&self.pic.inner);
        for (i, &byte) in data.iter().enumerate() {
            match (offset + i as u16) & 1 {
                0 => inner.master.elcr = byte & 0xf8,
                _ => inner.slave.elcr = byte & 0xde,
            }
        }
        self.pic.update(&mut inner);
    }
}
