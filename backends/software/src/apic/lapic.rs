//! The registers of one local APIC and its interrupt priorities (Intel SDM vol. 3, 11.4 to 11.12).
//!
//! ```text
//!        accept                    acknowledge                     EOI
//! (none) ──────► IRR: requested ──────────────► ISR: in service ──────► done, EoiSink if level triggered
//!                 delivered when its class > PPR's class; PPR = max(TPR, highest in service)
//! ```
//!
//! Pure state: it sends nothing itself. What an access asks for (send an ICR, broadcast an EOI) is returned as
//! an [`Effect`], which `apic/mod.rs` carries out.

use super::timer::{Mode as TimerMode, Timer};

/// Register offsets of the xAPIC page.
#[allow(missing_docs)]
pub mod offset {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR_LOW: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERFORMANCE: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// IA32_APIC_BASE: boot processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: globally enabled.
pub const BASE_ENABLE: u64 = 1 << 11;
/// Where the register page is after RESET.
pub const DEFAULT_PAGE: u64 = 0xfee0_0000;

const VERSION: u32 = 0x0005_0014;
const SVR_ENABLE: u32 = 1 << 8;
const SVR_WRITABLE: u32 = 0x3ff;
const LVT_MASKED: u32 = 1 << 16;
/// ESR: an illegal vector was to be sent.
pub const ERROR_SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: an illegal vector was received.
pub const ERROR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: no such register.
pub const ERROR_REGISTER: u32 = 1 << 7;
/// ICR bits that software may set in the lower half.
const ICR_WRITABLE: u32 = 0x000c_cfff;

/// Writable bits of the six LVT registers, in the order of their offsets.
const LVT_WRITABLE: [u32; 6] = [
    0xff | LVT_MASKED | 3 << 17,  // timer
    0x7ff | LVT_MASKED,           // thermal
    0x7ff | LVT_MASKED,           // performance
    0x7ff | 5 << 13 | LVT_MASKED, // LINT0: polarity, trigger
    0x7ff | 5 << 13 | LVT_MASKED, // LINT1
    0xff | LVT_MASKED,            // error
];

/// 256 bits, as ISR, TMR and IRR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorSet(pub [u64; 4]);

impl VectorSet {
    /// Adds `vector`.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }
    /// Removes `vector`.
    pub fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }
    /// Whether `vector` is in it.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }
    /// The highest vector in it.
    pub fn highest(&self) -> Option<u8> {
        let word = (0..4).rev().find(|&w| self.0[w] != 0)?;
        Some((word as u32 * 64 + 63 - self.0[word].leading_zeros()) as u8)
    }
    /// The `n`th of eight 32-bit registers.
    pub fn word(&self, n: u32) -> u32 {
        (self.0[(n >> 1 & 3) as usize] >> ((n & 1) * 32)) as u32
    }
    /// Sets the `n`th of eight 32-bit registers.
    pub fn set_word(&mut self, n: u32, value: u32) {
        let shift = (n & 1) * 32;
        let word = &mut self.0[(n >> 1 & 3) as usize];
        *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }
}

/// What an access to a register makes the rest of the machine do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Send what ICR says.
    SendIcr,
    /// A level-triggered interrupt ended.
    BroadcastEoi(u8),
    /// LDR, DFR, SVR, LVT0 or the mode changed: publish how this APIC is addressed.
    Publish,
    /// Send this vector to itself.
    SelfIpi(u8),
    /// The timer's registers were written; the caller supplies the time (see [`Timer`]).
    TimerMode,
    /// INITIAL_COUNT was written.
    TimerCount(u32),
    /// DIVIDE was written.
    TimerDivide(u32),
}

/// One local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    pub(super) base: u64,
    id: u32,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    esr: u32,
    errors: u32,
    pub(super) icr_low: u32,
    pub(super) icr_high: u32,
    lvt: [u32; 6],
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    pub(crate) timer: Timer,
}

impl Lapic {
    /// The APIC after RESET.
    pub fn new(id: u32, bsp: bool) -> Self {
        let base = DEFAULT_PAGE | BASE_ENABLE | if bsp { BASE_BSP } else { 0 };
        Self {
            base,
            id,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            esr: 0,
            errors: 0,
            icr_low: 0,
            icr_high: 0,
            lvt: [LVT_MASKED; 6],
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            timer: Timer::default(),
        }
    }

    /// After INIT, or after a change of the global enable: everything but the id and IA32_APIC_BASE.
    pub fn reset_registers(&mut self) {
        let base = self.base;
        *self = Self { base, ..Self::new(self.id, false) };
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }
    /// APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }
    /// Enabled in IA32_APIC_BASE.
    pub fn globally_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }
    /// In x2APIC mode.
    pub fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }
    /// Enabled in SVR.
    pub fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }
    /// The physical page of the registers, in xAPIC mode.
    pub fn page(&self) -> Option<u64> {
        (self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE).then_some(self.base & !0xfff)
    }
    /// Logical destination register: derived from the id in x2APIC mode.
    pub fn logical_id(&self) -> u32 {
        if self.x2apic() { (self.id >> 4) << 16 | 1 << (self.id & 15) } else { self.ldr }
    }
    /// DFR selects the flat model.
    pub fn flat(&self) -> bool {
        self.dfr >> 28 == 0xf
    }

    /// CR8: task priority class.
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }
    /// Writes CR8.
    pub fn set_cr8(&mut self, class: u8) {
        self.tpr = class << 4;
    }

    /// Adopts a saved CR8; the page's TPR wins where the two agree in the class.
    pub(crate) fn set_cr8_if_changed(&mut self, class: u8) {
        if self.cr8() != class & 15 {
            self.set_cr8(class & 15);
        }
    }

    fn lvt(&self, register: u32) -> u32 {
        self.lvt[(register.wrapping_sub(offset::LVT_TIMER) >> 4) as usize % 6]
    }

    /// The LVT entry of LINT0 as (delivery mode, vector), if it is not masked.
    pub fn lint0(&self) -> Option<(u8, u8)> {
        let lvt = self.lvt(offset::LVT_LINT0);
        (lvt & LVT_MASKED == 0).then_some(((lvt >> 8 & 7) as u8, lvt as u8))
    }

    /// Whether the legacy INTR pin reaches the processor.
    pub fn takes_extint(&self) -> bool {
        !self.globally_enabled() || matches!(self.lint0(), Some((7, _)))
    }

    /// Processor priority.
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    /// The interrupt to deliver now, if any.
    pub fn deliverable(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (self.software_enabled() && vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Takes a fixed interrupt from the bus.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if !self.globally_enabled() || !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.report(ERROR_RECEIVE_ILLEGAL);
            return;
        }
        self.irr.insert(vector);
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
    }

    /// The processor takes `vector`: from IRR to ISR.
    pub fn acknowledge(&mut self, vector: u8) {
        self.irr.remove(vector);
        self.isr.insert(vector);
    }

    /// EOI: ends the highest interrupt in service.
    pub fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.remove(vector);
        if self.tmr.contains(vector) { Effect::BroadcastEoi(vector) } else { Effect::None }
    }

    /// Notes an error; the error interrupt follows if its LVT entry allows.
    pub fn report(&mut self, error: u32) {
        self.errors |= error;
        let lvt = self.lvt(offset::LVT_ERROR);
        let vector = lvt as u8;
        // An illegal vector in the error LVT itself must not recurse.
        if lvt & LVT_MASKED == 0 && vector >= 16 && self.software_enabled() {
            self.irr.insert(vector);
            self.tmr.remove(vector);
        }
    }

    /// The timer expired: its interrupt, unless masked.
    pub fn timer_expired(&mut self) {
        let lvt = self.lvt(offset::LVT_TIMER);
        if lvt & LVT_MASKED == 0 {
            self.accept(lvt as u8, false);
        }
    }

    /// Mode of the timer.
    pub fn timer_mode(&self) -> TimerMode {
        TimerMode::of(self.lvt(offset::LVT_TIMER))
    }

    /// Reads a register by its xAPIC offset, timer counts apart (they need the time).
    pub fn read(&self, register: u32) -> Option<u32> {
        use offset::*;
        Some(match register {
            ID => {
                if self.x2apic() {
                    self.id
                } else {
                    self.id << 24
                }
            }
            VERSION => self::VERSION,
            TPR => self.tpr.into(),
            APR => 0,
            PPR => self.ppr().into(),
            LDR => self.logical_id(),
            DFR => self.dfr,
            SVR => self.svr,
            ISR..=0x170 => self.isr.word((register - ISR) >> 4),
            TMR..=0x1f0 => self.tmr.word((register - TMR) >> 4),
            IRR..=0x270 => self.irr.word((register - IRR) >> 4),
            ESR => self.esr,
            ICR_LOW => self.icr_low,
            ICR_HIGH => self.icr_high,
            LVT_TIMER..=LVT_ERROR => self.lvt(register),
            INITIAL_COUNT => self.timer.initial,
            DIVIDE => self.timer.divide,
            _ => return None,
        })
    }

    /// Writes a register by its xAPIC offset. `None`: not a writable register.
    pub fn write(&mut self, register: u32, value: u32) -> Option<Effect> {
        use offset::*;
        match register {
            // Fixed by the topology.
            ID => {}
            TPR => self.tpr = value as u8,
            EOI => return Some(self.end_of_interrupt()),
            LDR => {
                self.ldr = value & 0xff00_0000;
                return Some(Effect::Publish);
            }
            DFR => {
                self.dfr = value | 0x0fff_ffff;
                return Some(Effect::Publish);
            }
            SVR => {
                self.set_svr(value);
                return Some(Effect::Publish);
            }
            ESR => self.esr = std::mem::take(&mut self.errors),
            ICR_LOW => {
                self.icr_low = value & ICR_WRITABLE;
                return Some(Effect::SendIcr);
            }
            ICR_HIGH => self.icr_high = value & 0xff00_0000,
            LVT_TIMER..=LVT_ERROR => return Some(self.write_lvt(register, value)),
            INITIAL_COUNT => return Some(Effect::TimerCount(value)),
            DIVIDE => return Some(Effect::TimerDivide(value & 0xb)),
            _ => return None,
        }
        Some(Effect::None)
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value & SVR_WRITABLE & !(1 << 9);
        if !self.software_enabled() {
            self.lvt.iter_mut().for_each(|lvt| *lvt |= LVT_MASKED);
        }
    }

    fn write_lvt(&mut self, register: u32, value: u32) -> Effect {
        let n = ((register - offset::LVT_TIMER) >> 4) as usize % 6;
        let mut value = value & LVT_WRITABLE[n];
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        let before = std::mem::replace(&mut self.lvt[n], value);
        match register {
            offset::LVT_TIMER if (before ^ value) >> 17 & 3 != 0 => Effect::TimerMode,
            offset::LVT_LINT0 => Effect::Publish,
            _ => Effect::None,
        }
    }

    /// The register page in xAPIC layout, except for the current count.
    pub fn save(&self, registers: &mut [u8; 1024]) {
        for at in (0..1024usize).step_by(16) {
            let value = self.read(at as u32).unwrap_or(0);
            registers[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if self.x2apic() {
            // The page has no room for ids above 255 in xAPIC form: x2APIC mode stores all 32 bits.
            registers[0x20..0x24].copy_from_slice(&self.id.to_le_bytes());
        }
        // Errors that no write to ESR has revealed yet.
        registers[0x284..0x288].copy_from_slice(&self.errors.to_le_bytes());
    }

    /// Adopts a register page and IA32_APIC_BASE. The id stays the topology's; reserved bits are dropped.
    pub fn restore(&mut self, base: u64, registers: &[u8; 1024]) {
        let get = |at: u32| {
            let at = at as usize & 0x3fc;
            let mut word = [0; 4];
            word.copy_from_slice(&registers[at..at + 4]);
            u32::from_le_bytes(word)
        };
        use offset::*;
        self.base = base;
        self.tpr = get(TPR) as u8;
        self.ldr = get(LDR) & 0xff00_0000;
        self.dfr = get(DFR) | 0x0fff_ffff;
        self.svr = get(SVR) & SVR_WRITABLE & !(1 << 9);
        self.esr = get(ESR) & 0xff;
        self.errors = get(ESR + 4) & 0xff;
        self.icr_low = get(ICR_LOW) & ICR_WRITABLE;
        self.icr_high = get(ICR_HIGH);
        for n in 0..6u32 {
            self.lvt[n as usize] = get(LVT_TIMER + n * 16) & LVT_WRITABLE[n as usize];
        }
        for n in 0..8u32 {
            self.isr.set_word(n, get(ISR + n * 16));
            self.tmr.set_word(n, get(TMR + n * 16));
            self.irr.set_word(n, get(IRR + n * 16));
        }
        for set in [&mut self.isr, &mut self.tmr, &mut self.irr] {
            set.0[0] &= !0xffff;
        }
        self.timer.initial = get(INITIAL_COUNT);
        self.timer.divide = get(DIVIDE) & 0xb;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled() -> Lapic {
        let mut apic = Lapic::new(0, true);
        apic.write(offset::SVR, 0x1ff);
        apic
    }

    #[test]
    fn higher_classes_interrupt_and_equal_classes_wait() {
        let mut apic = enabled();
        apic.accept(0x41, false);
        assert_eq!(apic.deliverable(), Some(0x41));
        apic.acknowledge(0x41);
        apic.accept(0x4f, false);
        assert_eq!(apic.deliverable(), None, "same class as the one in service");
        apic.accept(0x51, false);
        assert_eq!(apic.deliverable(), Some(0x51));
        apic.acknowledge(0x51);
        assert_eq!(apic.ppr(), 0x50);
        apic.end_of_interrupt();
        assert_eq!((apic.ppr(), apic.deliverable()), (0x40, None));
        apic.end_of_interrupt();
        assert_eq!(apic.deliverable(), Some(0x4f));
    }

    #[test]
    fn task_priority_masks_its_class_and_mirrors_cr8() {
        let mut apic = enabled();
        apic.accept(0x35, false);
        apic.set_cr8(3);
        assert_eq!((apic.read(offset::TPR), apic.deliverable()), (Some(0x30), None));
        apic.write(offset::TPR, 0x2f);
        assert_eq!((apic.cr8(), apic.ppr(), apic.deliverable()), (2, 0x2f, Some(0x35)));
    }

    #[test]
    fn eoi_of_a_level_interrupt_is_broadcast() {
        let mut apic = enabled();
        apic.accept(0x60, true);
        apic.acknowledge(0x60);
        apic.accept(0x61, false);
        apic.acknowledge(0x61);
        assert_eq!(apic.write(offset::EOI, 0), Some(Effect::None));
        assert_eq!(apic.write(offset::EOI, 0), Some(Effect::BroadcastEoi(0x60)));
        assert_eq!(apic.write(offset::EOI, 0), Some(Effect::None));
    }

    #[test]
    fn software_disable_masks_the_lvt_and_drops_interrupts() {
        let mut apic = enabled();
        apic.write(offset::LVT_LINT0, 0x700);
        assert!(apic.takes_extint());
        apic.write(offset::SVR, 0xff);
        assert!(!apic.takes_extint());
        apic.write(offset::LVT_LINT0, 0x700);
        assert_eq!(apic.read(offset::LVT_LINT0), Some(0x1_0700), "mask cannot be cleared while disabled");
        apic.accept(0x50, false);
        assert_eq!(apic.read(offset::IRR + 0x20), Some(0));
    }

    #[test]
    fn illegal_vectors_are_reported_once_esr_is_written() {
        let mut apic = enabled();
        apic.write(offset::LVT_ERROR, 0xfe);
        apic.accept(5, false);
        assert_eq!((apic.read(offset::ESR), apic.deliverable()), (Some(0), Some(0xfe)));
        apic.write(offset::ESR, 0);
        assert_eq!(apic.read(offset::ESR), Some(ERROR_RECEIVE_ILLEGAL));
        apic.write(offset::ESR, 0);
        assert_eq!(apic.read(offset::ESR), Some(0));
    }

    #[test]
    fn saved_registers_are_restored() {
        let mut apic = enabled();
        apic.accept(0x41, true);
        apic.accept(0x91, false);
        apic.acknowledge(0x91);
        apic.write(offset::LVT_TIMER, 0x2_00ef);
        apic.write(offset::LDR, 0x0200_0000);
        let mut page = [0; 1024];
        apic.save(&mut page);
        let mut other = Lapic::new(0, true);
        other.restore(apic.base(), &page);
        let mut again = [0; 1024];
        other.save(&mut again);
        assert_eq!(page, again);
        assert_eq!(other.read(offset::IRR + 0x20), Some(1 << 1));
    }
}
