//! Whether a [`CpuState`] is one that a processor of a model could be in.
//!
//! A state may come from a file that anybody has written. What passes here cannot put an engine into a
//! condition that no guest could reach by its own instructions (Intel SDM vol. 3, 2.5, 10.1.1 and 27.3.1).

use super::model::{CpuModel, MsrKind};
use super::msr::is_canonical;
use super::saved_state::{MAX_MSRS, MAX_XSAVE, MIN_XSAVE};
use super::state::{CpuState, EventKind, seg};
use crate::backend::StateError;

const CR0_PE: u64 = 1 << 0;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_PCIDE: u64 = 1 << 17;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bits of CR0 that exist: PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG.
const CR0_BITS: u64 = 0xe005_003f;
/// Bits of RFLAGS that exist, bit 1 included.
const RFLAGS_BITS: u64 = 0x003f_7fd7;
/// Bits of MXCSR that exist.
const MXCSR_BITS: u32 = 0xffff;

impl CpuState {
    /// Checks the whole state against `model` and names the first field that cannot be.
    pub fn check(&self, model: &CpuModel) -> Result<(), StateError> {
        self.check_control(model)?;
        self.check_addresses(model)?;
        self.check_xsave(model)?;
        self.check_event()?;
        self.check_msrs(model)
    }

    fn check_control(&self, model: &CpuModel) -> Result<(), StateError> {
        let long = self.efer & EFER_LMA != 0;
        ensure("rflags", self.rflags & !RFLAGS_BITS == 0 && self.rflags & 2 != 0, self.rflags)?;
        ensure("cr0", self.cr0 & !CR0_BITS == 0, self.cr0)?;
        ensure("cr0", self.cr0 & CR0_PG == 0 || self.cr0 & CR0_PE != 0, self.cr0)?;
        ensure("cr0", self.cr0 & CR0_NW == 0 || self.cr0 & CR0_CD != 0, self.cr0)?;
        ensure("cr4", self.cr4 & !model.cr4_mask() == 0, self.cr4)?;
        ensure("cr4", self.cr4 & CR4_PCIDE == 0 || long, self.cr4)?;
        ensure("efer", self.efer & !model.efer_mask() == 0, self.efer)?;
        ensure("efer", long == (self.efer & EFER_LME != 0 && self.cr0 & CR0_PG != 0), self.efer)?;
        ensure("efer", !long || self.cr4 & CR4_PAE != 0, self.efer)?;
        ensure("cr8", self.cr8 <= 15, self.cr8)?;
        ensure("dr6", self.dr6 >> 32 == 0, self.dr6)?;
        ensure("dr7", self.dr7 >> 32 == 0, self.dr7)
    }

    fn check_addresses(&self, model: &CpuModel) -> Result<(), StateError> {
        let canonical = |address| is_canonical(address, model.linear_bits());
        ensure("cr3", self.cr3 >> model.physical_bits() == 0, self.cr3)?;
        ensure("gdtr", canonical(self.gdtr.base), self.gdtr.base)?;
        ensure("idtr", canonical(self.idtr.base), self.idtr.base)?;
        ensure("ldtr", canonical(self.ldtr.base), self.ldtr.base)?;
        ensure("tr", canonical(self.tr.base), self.tr.base)?;
        for (index, segment) in self.segments.iter().enumerate() {
            // FS and GS have 64-bit bases; the others are 32 bits wide.
            let wide = index == seg::FS || index == seg::GS;
            let fits = if wide { canonical(segment.base) } else { segment.base >> 32 == 0 };
            ensure("segments", fits, segment.base)?;
        }
        Ok(())
    }

    fn check_xsave(&self, model: &CpuModel) -> Result<(), StateError> {
        let avx_without_sse = self.xcr0 & 0b110 == 0b100;
        let known = self.xcr0 & !model.xcr0_mask() == 0;
        ensure("xcr0", known && self.xcr0 & 1 != 0 && !avx_without_sse, self.xcr0)?;
        let needed = if self.xcr0 & 4 != 0 { MIN_XSAVE + 256 } else { MIN_XSAVE };
        ensure("xsave", (needed..=MAX_XSAVE).contains(&self.xsave.len()), self.xsave.len() as u64)?;
        let word = |at: usize| -> u64 {
            let bytes = self.xsave.get(at..at + 8).and_then(|b| b.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        let mxcsr = word(24) as u32;
        ensure("xsave", mxcsr & !MXCSR_BITS == 0, mxcsr.into())?;
        // The legacy region is there without XSAVE too.
        ensure("xsave", word(512) & !(model.xcr0_mask() | 0b11) == 0, word(512))?;
        ensure("xsave", word(520) == 0, word(520))
    }

    fn check_event(&self) -> Result<(), StateError> {
        let Some(event) = self.pending_event else { return Ok(()) };
        let vector = event.vector;
        let fits = match event.kind {
            // Vector 2 is the NMI's; the other 31 are the processor's own.
            EventKind::Exception => vector < 32 && vector != 2,
            EventKind::Nmi => vector == 2,
            EventKind::ExternalInterrupt | EventKind::SoftwareInterrupt => true,
        };
        ensure("pending_event", fits, vector.into())?;
        let code = event.error_code.unwrap_or(0);
        ensure("pending_event", code >> 16 == 0, code.into())
    }

    fn check_msrs(&self, model: &CpuModel) -> Result<(), StateError> {
        ensure("msrs", self.msrs.len() <= MAX_MSRS, self.msrs.len() as u64)?;
        for &(index, value) in &self.msrs {
            let Some(entry) = model.msr(index) else {
                let why = format!("register {index:#x} does not exist in CPU model {}", model.name);
                return Err(StateError::Invalid { field: "msrs", why });
            };
            let possible = match entry.kind {
                MsrKind::ReadOnly | MsrKind::WriteIgnored | MsrKind::Command { .. } => value == entry.reset,
                MsrKind::Masked { writable } => (value ^ entry.reset) & !writable == 0,
                _ => entry.write(entry.reset, value, model.linear_bits()).is_ok(),
            };
            if !possible {
                let why = format!("register {index:#x} cannot hold {value:#x}");
                return Err(StateError::Invalid { field: "msrs", why });
            }
        }
        Ok(())
    }
}

fn ensure(field: &'static str, holds: bool, value: u64) -> Result<(), StateError> {
    if holds {
        return Ok(());
    }
    Err(StateError::Invalid { field, why: format!("no processor of this model can hold {value:#x}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::feature::{Feature, FeatureSet};
    use crate::cpu::host::{HostCpu, Vendor};
    use crate::cpu::state::PendingEvent;

    fn model() -> CpuModel {
        let host = HostCpu { vendor: Vendor::Intel, features: FeatureSet::of(Feature::ALL), tsc_khz: None };
        CpuModel::resolve("atoll-base", &host, 2_000_000).unwrap()
    }

    fn long_mode() -> CpuState {
        let mut state = CpuState::power_on(0, true, model().signature());
        state.cr0 = 0x8005_0033;
        state.cr4 = 0x20;
        state.efer = 0xd01;
        state.segments[seg::GS].base = 0xffff_8880_0000_0000;
        state.msrs = model().msrs().iter().map(|e| (e.index, e.reset)).collect();
        state
    }

    fn refused_event(event: Option<PendingEvent>) -> &'static str {
        match (CpuState { pending_event: event, ..long_mode() }).check(&model()) {
            Err(StateError::Invalid { field, .. }) => field,
            Ok(()) => "accepted",
        }
    }

    #[test]
    fn real_states_pass() {
        assert!(CpuState::power_on(0, true, 0).check(&model()).is_ok());
        assert!(long_mode().check(&model()).is_ok());
    }

    #[test]
    fn impossible_states_are_refused_by_the_field() {
        let field = |change: fn(&mut CpuState)| {
            let mut state = long_mode();
            change(&mut state);
            match state.check(&model()) {
                Err(StateError::Invalid { field, .. }) => field,
                Ok(()) => "accepted",
            }
        };
        assert_eq!(field(|_| {}), "accepted");
        assert_eq!(field(|s| s.rflags = 0), "rflags");
        assert_eq!(field(|s| s.cr0 = 1 << 31), "cr0");
        assert_eq!(field(|s| s.cr0 |= 1 << 32), "cr0");
        assert_eq!(field(|s| s.cr4 |= 1 << 12), "cr4");
        assert_eq!(field(|s| s.cr4 = 0), "efer");
        assert_eq!(field(|s| s.efer &= !(1 << 10)), "efer");
        assert_eq!(field(|s| s.cr3 = 1 << 40), "cr3");
        assert_eq!(field(|s| s.cr8 = 16), "cr8");
        assert_eq!(field(|s| s.gdtr.base = 1 << 47), "gdtr");
        assert_eq!(field(|s| s.segments[seg::DS].base = 1 << 32), "segments");
        assert_eq!(field(|s| s.segments[seg::FS].base = 1 << 50), "segments");
        assert_eq!(field(|s| s.xcr0 = 5), "xcr0");
        assert_eq!(field(|s| s.xcr0 = 7), "xsave");
        assert_eq!(field(|s| s.xsave[27] = 1), "xsave");
        assert_eq!(field(|s| s.xsave[520] = 1), "xsave");
        let event = |vector, kind, error_code| Some(PendingEvent { vector, kind, error_code });
        assert_eq!(refused_event(event(14, EventKind::Exception, Some(2))), "accepted");
        assert_eq!(refused_event(event(32, EventKind::Exception, None)), "pending_event");
        assert_eq!(refused_event(event(14, EventKind::Exception, Some(1 << 16))), "pending_event");
        assert_eq!(refused_event(event(3, EventKind::Nmi, None)), "pending_event");
        assert_eq!(field(|s| s.msrs.push((0xffff_ffff, 0))), "msrs");
        assert_eq!(field(|s| s.msrs[0].1 = 1), "msrs");
    }
}
