//! One PCI function: header, BARs, capabilities and interrupts, in one lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use atoll_machine::interrupt::{IrqLine, MsiSink};

use crate::bar::{Bar, BarInfo, BarKind, BarMapper, BarSpec, BarTarget};
use crate::config::{CONFIG_BYTES, ConfigSpace};
use crate::express::{self, DEVICE_CONTROL_FLR, ExpressSpec};
use crate::lock;
use crate::msi::{MsiCap, MsiSpec};
use crate::msix::Msix;
use crate::regs::{self, COMMAND, STATUS};
use crate::saved_state::{PciFunctionStateV1, RestoreError};

/// What a function says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and programming interface: bits 23..16, 15..8, 7..0.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id (type 0 headers).
    pub subsystem_vendor: u16,
    /// Subsystem id (type 0 headers).
    pub subsystem: u16,
}

/// What a configuration write brought about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigEffect {
    /// Software asked for a function-level reset.
    pub function_reset: bool,
}

/// Builds a [`PciFunction`].
///
/// Capabilities are laid out in the order in which they are declared, from offset 0x40; extended ones from 0x100.
pub struct FunctionBuilder {
    config: ConfigSpace,
    bars: Vec<Bar>,
    next_capability: u16,
    last_capability: u16,
    next_extended: u16,
    last_extended: u16,
    msi: Option<MsiCap>,
    msix: Option<(u16, u16, u8)>,
    express: Option<u16>,
}

impl FunctionBuilder {
    /// A function with a type 0 header.
    pub fn new(identity: Identity) -> Self {
        let mut builder = Self::with_common(identity);
        let config = &mut builder.config;
        config.set_u16(regs::SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor);
        config.set_u16(regs::SUBSYSTEM_VENDOR_ID + 2, identity.subsystem);
        builder
    }

    /// A PCI-to-PCI bridge: type 1 header with 32-bit I/O and 64-bit prefetchable windows.
    pub fn bridge(identity: Identity) -> Self {
        let mut builder = Self::with_common(identity);
        let config = &mut builder.config;
        config.set_u8(regs::HEADER_TYPE, 1);
        config.set_writable(regs::PRIMARY_BUS, &[0xff; 4]);
        config.set(regs::IO_BASE, &[1, 1]);
        config.set_writable(regs::IO_BASE, &[0xf0, 0xf0]);
        config.set_clear_by_one(regs::SECONDARY_STATUS, &regs::STATUS_W1C.to_le_bytes());
        config.set_writable(regs::MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set(regs::PREFETCH_BASE, &[1, 0, 1, 0]);
        config.set_writable(regs::PREFETCH_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set_writable(regs::PREFETCH_BASE_UPPER, &[0xff; 8]);
        config.set_writable(regs::IO_BASE_UPPER, &[0xff; 4]);
        // Parity, SERR, ISA, VGA, VGA 16-bit, secondary reset, discard timers.
        config.set_writable(regs::BRIDGE_CONTROL, &0x0b5fu16.to_le_bytes());
        config.set_clear_by_one(regs::BRIDGE_CONTROL, &0x0400u16.to_le_bytes());
        builder
    }

    fn with_common(identity: Identity) -> Self {
        let mut config = ConfigSpace::new();
        config.set_u16(regs::VENDOR_ID, identity.vendor);
        config.set_u16(regs::DEVICE_ID, identity.device);
        config.set_u8(regs::REVISION_ID, identity.revision);
        config.set(regs::CLASS_PROG, &identity.class.to_le_bytes()[..3]);
        config.set_writable(COMMAND, &regs::COMMAND_WRITABLE.to_le_bytes());
        config.set_clear_by_one(STATUS, &regs::STATUS_W1C.to_le_bytes());
        config.set_writable(regs::CACHE_LINE_SIZE, &[0xff]);
        config.set_writable(regs::INTERRUPT_LINE, &[0xff]);
        Self {
            config,
            bars: Vec::new(),
            next_capability: 0x40,
            last_capability: 0,
            next_extended: 0x100,
            last_extended: 0,
            msi: None,
            msix: None,
            express: None,
        }
    }

    /// Direct access for registers that have no method here.
    pub fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    /// Marks function 0 of a device that has more functions.
    pub fn multifunction(&mut self) -> &mut Self {
        let kind = self.config.u8(regs::HEADER_TYPE);
        self.config.set_u8(regs::HEADER_TYPE, kind | regs::HEADER_MULTIFUNCTION);
        self
    }

    /// Gives the function INTx: `pin` 0 is INTA, 3 is INTD.
    pub fn interrupt_pin(&mut self, pin: u8) -> &mut Self {
        self.config.set_u8(regs::INTERRUPT_PIN, (pin & 3) + 1);
        self
    }

    /// Adds a BAR. A 64-bit BAR also takes the register slot after its own.
    pub fn bar(&mut self, spec: BarSpec) -> &mut Self {
        debug_assert!(spec.index < 6 && self.bars.iter().all(|b| b.index != spec.index));
        let bar = Bar::new(spec);
        let mask = !(bar.size - 1);
        let low_mask = mask as u32 & if bar.kind == BarKind::Io { 0xffff_fffc } else { 0xffff_fff0 };
        self.config.set_u32(bar.register(), bar.type_bits());
        self.config.set_writable(bar.register(), &low_mask.to_le_bytes());
        if matches!(bar.kind, BarKind::Memory64 { .. }) {
            self.config.set_writable(bar.register() + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars.push(bar);
        self
    }

    /// Adds a capability with `body` after the id and next bytes; `writable` are the body's writable bits (it
    /// may be shorter). Returns the offset of the capability.
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_capability;
        let end = at + 2 + body.len() as u16;
        debug_assert!(end <= 0x100, "capabilities fill the first 256 bytes");
        self.config.set(at, &[id, 0]);
        self.config.set(at + 2, body);
        self.config.set_writable(at + 2, writable);
        let link = if self.last_capability == 0 { regs::CAPABILITIES } else { self.last_capability + 1 };
        self.config.set_u8(link, at as u8);
        let status = self.config.u16(STATUS) | regs::STATUS_CAPABILITIES;
        self.config.set_u16(STATUS, status);
        self.last_capability = at;
        self.next_capability = end.next_multiple_of(4);
        at
    }

    /// Adds an extended capability with `body` after its 4-byte header. Returns its offset.
    pub fn extended_capability(&mut self, id: u16, version: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_extended;
        let end = at + 4 + body.len() as u16;
        debug_assert!(usize::from(end) <= CONFIG_BYTES);
        self.config.set_u32(at, u32::from(id) | u32::from(version & 15) << 16);
        self.config.set(at + 4, body);
        self.config.set_writable(at + 4, writable);
        if self.last_extended != 0 {
            let header = self.config.u32(self.last_extended) & 0x000f_ffff;
            self.config.set_u32(self.last_extended, header | u32::from(at) << 20);
        }
        self.last_extended = at;
        self.next_extended = end.next_multiple_of(4);
        at
    }

    /// Adds the power management capability: D0 and D3hot, state kept in D3hot.
    pub fn power_management(&mut self) -> &mut Self {
        // Version 3; control: no soft reset (bit 3), power state writable, PME enable absent.
        self.capability(regs::CAP_POWER, &[0x03, 0x00, 0x08, 0x00, 0, 0], &[0, 0, 0x03, 0]);
        self
    }

    /// Adds the PCI Express capability. Returns its offset.
    pub fn express(&mut self, spec: ExpressSpec) -> u16 {
        let body = express::body(spec);
        let at = self.capability(regs::CAP_EXPRESS, &body.values, &body.writable);
        self.config.set_clear_by_one(at + 2, &body.clear_by_one);
        if spec.function_level_reset {
            // The bit reads as zero; the write is caught before the rules apply.
            self.express = Some(at);
        }
        at
    }

    /// Adds MSI.
    pub fn msi(&mut self, spec: MsiSpec) -> &mut Self {
        let (body, writable) = MsiCap::body(spec);
        let at = self.capability(regs::CAP_MSI, &body, &writable);
        self.msi = Some(MsiCap { at });
        self
    }

    /// Adds MSI-X with `vectors` vectors (1-2048); table and pending bits get BAR `bar` (32-bit memory) for
    /// themselves.
    pub fn msix(&mut self, bar: u8, vectors: u16) -> &mut Self {
        let vectors = vectors.clamp(1, crate::msix::MAX_VECTORS);
        let pba = (u32::from(vectors) * 16).next_power_of_two().max(0x800);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(bar).to_le_bytes());
        body[6..10].copy_from_slice(&(pba | u32::from(bar)).to_le_bytes());
        let at = self.capability(regs::CAP_MSIX, &body, &[0, 0xc0]);
        self.msix = Some((at, vectors, bar));
        self
    }

    /// Finishes the function. BARs go to `mapper`, messages to `sink`.
    pub fn build(mut self, mapper: Arc<dyn BarMapper>, sink: Arc<dyn MsiSink>) -> PciFunction {
        let bus_master = Arc::new(AtomicBool::new(false));
        let msix = self.msix.map(|(at, vectors, bar)| {
            let msix = Msix::new(vectors, sink.clone(), bus_master.clone());
            let target = Some(BarTarget::Mmio(msix.clone()));
            self.bar(BarSpec { index: bar, kind: BarKind::Memory32, size: msix.bar_size(), target });
            (at, msix)
        });
        self.bars.sort_by_key(|b| b.index);
        let reset_values = Box::new(*self.config.values());
        PciFunction {
            state: Mutex::new(State {
                config: self.config,
                bars: self.bars,
                intx_level: false,
                intx_line: IrqLine::unconnected(),
            }),
            reset_values,
            msix,
            msi: self.msi,
            express: self.express,
            bus_master,
            mapper,
            sink,
        }
    }
}

struct State {
    config: ConfigSpace,
    bars: Vec<Bar>,
    /// The device's wish, before the disable bit.
    intx_level: bool,
    intx_line: IrqLine,
}

/// The runtime of one PCI function.
pub struct PciFunction {
    state: Mutex<State>,
    reset_values: Box<[u8; CONFIG_BYTES]>,
    /// Offset of the capability, and the table.
    msix: Option<(u16, Arc<Msix>)>,
    msi: Option<MsiCap>,
    /// Offset of the PCI Express capability when it offers function-level reset.
    express: Option<u16>,
    bus_master: Arc<AtomicBool>,
    mapper: Arc<dyn BarMapper>,
    sink: Arc<dyn MsiSink>,
}

impl PciFunction {
    /// Reads configuration space.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.state).config.read(offset, data);
    }

    /// Applies a guest's write to configuration space: BARs map and unmap, interrupts follow their enable bits.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        let mut state = lock(&self.state);
        let end = usize::from(offset) + data.len();
        let touches = |at: u16, len: u16| offset < at + len && end > usize::from(at);
        let mut effect = ConfigEffect::default();
        if let Some(cap) = self.express
            && touches(cap + express::offset::DEVICE_CONTROL + 1, 1)
        {
            let byte = data[usize::from(cap + express::offset::DEVICE_CONTROL + 1 - offset)];
            effect.function_reset = u16::from(byte) << 8 & DEVICE_CONTROL_FLR != 0;
        }
        state.config.guest_write(offset, data);
        if touches(COMMAND, 2) || touches(regs::BAR0, 24) {
            self.follow_command(&mut state);
        }
        if let Some((cap, msix)) = &self.msix
            && touches(cap + 2, 2)
        {
            follow_msix(&state.config, *cap, msix);
        }
        if let Some(msi) = self.msi
            && touches(msi.at, 24)
        {
            while let Some(message) = msi.take_unmasked(&mut state.config) {
                if self.bus_master() {
                    self.sink.signal_msi(message);
                }
            }
        }
        effect
    }

    /// Brings bus mastering, INTx and BARs in line with the configuration space.
    fn follow_command(&self, state: &mut State) {
        let command = state.config.u16(COMMAND);
        self.bus_master.store(command & regs::COMMAND_BUS_MASTER != 0, Ordering::Relaxed);
        drive_intx(state);
        let State { config, bars, .. } = state;
        for bar in bars {
            let enable = if bar.kind == BarKind::Io { regs::COMMAND_IO } else { regs::COMMAND_MEMORY };
            let address = bar_address(config, bar);
            let wanted = (command & enable != 0 && bar.decodable(address)).then_some(address);
            if bar.mapping.as_ref().map(|(at, _)| *at) == wanted {
                continue;
            }
            bar.mapping = None;
            if let (Some(address), Some(target)) = (wanted, &bar.target) {
                bar.mapping = self.mapper.map(address, bar.size, target).map(|m| (address, m));
            }
        }
    }

    /// Says what answers behind BAR `index`, for devices that exist only after their function.
    pub fn set_bar_target(&self, index: u8, target: BarTarget) {
        let mut state = lock(&self.state);
        if let Some(bar) = state.bars.iter_mut().find(|b| b.index == index) {
            bar.mapping = None;
            bar.target = Some(target);
        }
        self.follow_command(&mut state);
    }

    /// The BARs as they are now, by register slot.
    pub fn bars(&self) -> Vec<BarInfo> {
        let state = lock(&self.state);
        let info = |b: &Bar| BarInfo {
            index: b.index,
            kind: b.kind,
            size: b.size,
            address: bar_address(&state.config, b),
            mapped: b.mapping.is_some(),
        };
        state.bars.iter().map(info).collect()
    }

    /// Takes every BAR out of the address spaces and lowers INTx: the function was unplugged. The next write to
    /// its configuration space would bring it back.
    pub fn disconnect(&self) {
        let mut state = lock(&self.state);
        for bar in &mut state.bars {
            bar.mapping = None;
        }
        state.intx_line.set(false);
    }

    /// Runs `with` on the configuration space, past the write rules: for registers that a device changes itself.
    /// BARs and the command register do not take effect this way.
    pub fn with_config<R>(&self, with: impl FnOnce(&mut ConfigSpace) -> R) -> R {
        with(&mut lock(&self.state).config)
    }

    /// Whether software switched bus mastering on. DMA and MSI need it.
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Relaxed)
    }

    /// The function's INTx pin: 0 for INTA .. 3 for INTD.
    pub fn intx_pin(&self) -> Option<u8> {
        lock(&self.state).config.u8(regs::INTERRUPT_PIN).checked_sub(1)
    }

    /// Connects INTx to `line`, an input that no other device drives.
    pub fn connect_intx(&self, line: IrqLine) {
        let mut state = lock(&self.state);
        state.intx_line = line;
        drive_intx(&mut state);
    }

    /// Asserts or releases INTx.
    pub fn set_intx(&self, level: bool) {
        let mut state = lock(&self.state);
        state.intx_level = level;
        drive_intx(&mut state);
    }

    /// The MSI-X table, if the function has one.
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|(_, msix)| msix)
    }

    /// Raises MSI `vector`. Returns false when MSI is off or absent, so that the caller can use INTx.
    pub fn signal_msi(&self, vector: u8) -> bool {
        let mut state = lock(&self.state);
        let Some(msi) = self.msi.filter(|m| m.enabled(&state.config)) else { return false };
        if let Some(message) = msi.raise(&mut state.config, vector)
            && self.bus_master()
        {
            self.sink.signal_msi(message);
        }
        true
    }

    /// Power-on state: configuration space as built, nothing mapped, no interrupt.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        state.config.copy_values(&self.reset_values);
        state.intx_level = false;
        if let Some((_, msix)) = &self.msix {
            msix.reset();
        }
        self.follow_command(&mut state);
    }

    /// The saved form.
    pub fn save(&self) -> PciFunctionStateV1 {
        let state = lock(&self.state);
        PciFunctionStateV1 {
            config: Some(state.config.save()),
            msix: self.msix.as_ref().map(|(_, msix)| msix.save()),
            msi_pending: self.msi.map(|m| m.pending(&state.config)).filter(|&p| p != 0),
            intx: Some(state.intx_level),
        }
    }

    /// Takes over a saved state: BARs are mapped where they were, interrupt wires get their levels.
    pub fn restore(&self, saved: &PciFunctionStateV1) -> Result<(), RestoreError> {
        let mut state = lock(&self.state);
        let bytes = saved.config.as_deref().unwrap_or(&self.reset_values[..]);
        let mut id = [0; 4];
        for (to, from) in id.iter_mut().zip(bytes) {
            *to = *from;
        }
        let (have, id) = (state.config.u32(regs::VENDOR_ID), u32::from_le_bytes(id));
        if id != have {
            return Err(RestoreError::Identity { saved: id, have });
        }
        if let (Some((_, msix)), Some(table)) = (&self.msix, &saved.msix) {
            msix.restore(table)?;
        }
        state.config.copy_values(&self.reset_values);
        let mut padded = bytes.to_vec();
        padded.resize(CONFIG_BYTES, 0);
        state.config.restore(&padded);
        if let Some(msi) = self.msi {
            msi.set_pending(&mut state.config, saved.msi_pending.unwrap_or(0));
        }
        state.intx_level = saved.intx.unwrap_or(false);
        self.follow_command(&mut state);
        if let Some((cap, msix)) = &self.msix {
            follow_msix(&state.config, *cap, msix);
        }
        Ok(())
    }
}

fn follow_msix(config: &ConfigSpace, cap: u16, msix: &Msix) {
    let control = config.u16(cap + 2);
    msix.set_control(control & 1 << 15 != 0, control & 1 << 14 != 0);
}

fn drive_intx(state: &mut State) {
    let status = state.config.u16(STATUS) & !regs::STATUS_INTX;
    let bit = if state.intx_level { regs::STATUS_INTX } else { 0 };
    state.config.set_u16(STATUS, status | bit);
    let disabled = state.config.u16(COMMAND) & regs::COMMAND_INTX_DISABLE != 0;
    state.intx_line.set(state.intx_level && !disabled);
}

fn bar_address(config: &ConfigSpace, bar: &Bar) -> u64 {
    let low = config.u32(bar.register());
    match bar.kind {
        BarKind::Io => u64::from(low & !3),
        BarKind::Memory32 => u64::from(low & !15),
        BarKind::Memory64 { .. } => u64::from(low & !15) | u64::from(config.u32(bar.register() + 4)) << 32,
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
