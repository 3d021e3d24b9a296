//! [`CpuState`] as it is saved. Field numbers are for ever.
//!
//! Defaults: a missing field is zero unless it says otherwise; a missing message is its type's default.

use super::state::{
    Activity, CpuState, DescriptorTable, EventKind, GPR_COUNT, LapicState, PendingEvent, Segment,
};
use crate::backend::StateError;

/// Longest XSAVE area that is accepted: AVX-512 and AMX need 11 KiB.
pub const MAX_XSAVE: usize = 16 << 10;
/// Shortest XSAVE area: legacy region and header (Intel SDM vol. 1, 13.4).
pub const MIN_XSAVE: usize = 576;
/// Most model-specific registers that are accepted: the models have about a hundred.
pub const MAX_MSRS: usize = 1024;

/// [`Segment`].
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SegmentV1 {
    /// Default: 0.
    #[prost(uint32, optional, tag = "1")]
    pub selector: Option<u32>,
    /// Default: 0.
    #[prost(fixed64, optional, tag = "2")]
    pub base: Option<u64>,
    /// Default: 0.
    #[prost(uint32, optional, tag = "3")]
    pub limit: Option<u32>,
    /// VMX access rights. Default: 0x10000, unusable.
    #[prost(uint32, optional, tag = "4")]
    pub attributes: Option<u32>,
}

/// [`DescriptorTable`].
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct DescriptorTableV1 {
    /// Default: 0.
    #[prost(fixed64, optional, tag = "1")]
    pub base: Option<u64>,
    /// Default: 0.
    #[prost(uint32, optional, tag = "2")]
    pub limit: Option<u32>,
}

/// A model-specific register.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct MsrV1 {
    /// Number. Default: 0.
    #[prost(uint32, optional, tag = "1")]
    pub index: Option<u32>,
    /// Value. Default: 0.
    #[prost(fixed64, optional, tag = "2")]
    pub value: Option<u64>,
}

/// [`LapicState`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct LapicV1 {
    /// IA32_APIC_BASE. Default: 0, disabled.
    #[prost(fixed64, optional, tag = "1")]
    pub apic_base: Option<u64>,
    /// First 1 KiB of the register page; a shorter one continues with zeros. Default: all zero.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub registers: Option<Vec<u8>>,
    /// Guest time in ns. Default: the timer is not running.
    #[prost(fixed64, optional, tag = "3")]
    pub timer_expires_at: Option<u64>,
    /// IA32_TSC_DEADLINE. Default: 0, disarmed.
    #[prost(fixed64, optional, tag = "4")]
    pub tsc_deadline: Option<u64>,
}

/// [`PendingEvent`].
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct PendingEventV1 {
    /// Default: 0.
    #[prost(uint32, optional, tag = "1")]
    pub vector: Option<u32>,
    /// 0 external interrupt, 1 NMI, 2 exception, 3 software interrupt. Default: 0.
    #[prost(uint32, optional, tag = "2")]
    pub kind: Option<u32>,
    /// Default: none is pushed.
    #[prost(uint32, optional, tag = "3")]
    pub error_code: Option<u32>,
}

/// [`CpuState`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct CpuStateV1 {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15; missing ones are zero.
    #[prost(fixed64, repeated, tag = "1")]
    pub gpr: Vec<u64>,
    /// Default: 0.
    #[prost(fixed64, optional, tag = "2")]
    pub rip: Option<u64>,
    /// Default: 2.
    #[prost(uint64, optional, tag = "3")]
    pub rflags: Option<u64>,
    /// ES, CS, SS, DS, FS, GS; missing ones are unusable.
    #[prost(message, repeated, tag = "4")]
    pub segments: Vec<SegmentV1>,
    /// Default: unusable.
    #[prost(message, optional, tag = "5")]
    pub ldtr: Option<SegmentV1>,
    /// Default: unusable.
    #[prost(message, optional, tag = "6")]
    pub tr: Option<SegmentV1>,
    /// Default: base and limit 0.
    #[prost(message, optional, tag = "7")]
    pub gdtr: Option<DescriptorTableV1>,
    /// Default: base and limit 0.
    #[prost(message, optional, tag = "8")]
    pub idtr: Option<DescriptorTableV1>,
    /// Default: 0x6000_0010, as after RESET.
    #[prost(uint64, optional, tag = "9")]
    pub cr0: Option<u64>,
    /// Default: 0.
    #[prost(fixed64, optional, tag = "10")]
    pub cr2: Option<u64>,
    /// Default: 0.
    #[prost(fixed64, optional, tag = "11")]
    pub cr3: Option<u64>,
    /// Default: 0.
    #[prost(uint64, optional, tag = "12")]
    pub cr4: Option<u64>,
    /// Default: 0.
    #[prost(uint64, optional, tag = "13")]
    pub cr8: Option<u64>,
    /// DR0 to DR3; missing ones are zero.
    #[prost(fixed64, repeated, tag = "14")]
    pub dr: Vec<u64>,
    /// Default: 0xffff_0ff0, as after RESET.
    #[prost(uint64, optional, tag = "15")]
    pub dr6: Option<u64>,
    /// Default: 0x400, as after RESET.
    #[prost(uint64, optional, tag = "16")]
    pub dr7: Option<u64>,
    /// Default: 0.
    #[prost(uint64, optional, tag = "17")]
    pub efer: Option<u64>,
    /// Default: 1, x87 state only.
    #[prost(uint64, optional, tag = "18")]
    pub xcr0: Option<u64>,
    /// XSAVE area in standard format. Default: the area after RESET.
    #[prost(bytes = "vec", optional, tag = "19")]
    pub xsave: Option<Vec<u8>>,
    /// Sorted by index. Registers that are missing have their model's reset value.
    #[prost(message, repeated, tag = "20")]
    pub msrs: Vec<MsrV1>,
    /// Default: 0.
    #[prost(fixed64, optional, tag = "21")]
    pub tsc: Option<u64>,
    /// Default: a disabled local APIC.
    #[prost(message, optional, tag = "22")]
    pub lapic: Option<LapicV1>,
    /// 0 active, 1 halted, 2 shutdown, 3 waiting for SIPI. Default: 0.
    #[prost(uint32, optional, tag = "23")]
    pub activity: Option<u32>,
    /// Default: false.
    #[prost(bool, optional, tag = "24")]
    pub interrupt_shadow: Option<bool>,
    /// Default: false.
    #[prost(bool, optional, tag = "25")]
    pub nmi_blocked: Option<bool>,
    /// Default: false.
    #[prost(bool, optional, tag = "26")]
    pub nmi_pending: Option<bool>,
    /// Default: none is latched.
    #[prost(uint32, optional, tag = "27")]
    pub sipi_vector: Option<u32>,
    /// Default: none.
    #[prost(message, optional, tag = "28")]
    pub pending_event: Option<PendingEventV1>,
}

impl From<&CpuState> for CpuStateV1 {
    fn from(state: &CpuState) -> Self {
        Self {
            gpr: state.gpr.to_vec(),
            rip: Some(state.rip),
            rflags: Some(state.rflags),
            segments: state.segments.iter().map(SegmentV1::from).collect(),
            ldtr: Some((&state.ldtr).into()),
            tr: Some((&state.tr).into()),
            gdtr: Some((&state.gdtr).into()),
            idtr: Some((&state.idtr).into()),
            cr0: Some(state.cr0),
            cr2: Some(state.cr2),
            cr3: Some(state.cr3),
            cr4: Some(state.cr4),
            cr8: Some(state.cr8),
            dr: state.dr.to_vec(),
            dr6: Some(state.dr6),
            dr7: Some(state.dr7),
            efer: Some(state.efer),
            xcr0: Some(state.xcr0),
            xsave: Some(state.xsave.clone()),
            msrs: state.msrs.iter().map(|&(i, v)| MsrV1 { index: Some(i), value: Some(v) }).collect(),
            tsc: Some(state.tsc),
            lapic: Some((&state.lapic).into()),
            activity: Some(match state.activity {
                Activity::Active => 0,
                Activity::Halted => 1,
                Activity::Shutdown => 2,
                Activity::WaitForSipi => 3,
            }),
            interrupt_shadow: Some(state.interrupt_shadow),
            nmi_blocked: Some(state.nmi_blocked),
            nmi_pending: Some(state.nmi_pending),
            sipi_vector: state.sipi_vector.map(u32::from),
            pending_event: state.pending_event.as_ref().map(PendingEventV1::from),
        }
    }
}

impl TryFrom<&CpuStateV1> for CpuState {
    type Error = StateError;

    fn try_from(saved: &CpuStateV1) -> Result<Self, StateError> {
        let reset = CpuState::power_on(0, false, 0);
        let mut segments = [segment("segments", &SegmentV1::default())?; 6];
        if saved.segments.len() > segments.len() {
            return Err(invalid("segments", format!("{} segments", saved.segments.len())));
        }
        for (segment_register, saved) in segments.iter_mut().zip(&saved.segments) {
            *segment_register = segment("segments", saved)?;
        }
        Ok(Self {
            gpr: words::<GPR_COUNT>("gpr", &saved.gpr)?,
            rip: saved.rip.unwrap_or(0),
            rflags: saved.rflags.unwrap_or(2),
            segments,
            ldtr: segment("ldtr", &saved.ldtr.unwrap_or_default())?,
            tr: segment("tr", &saved.tr.unwrap_or_default())?,
            gdtr: table("gdtr", &saved.gdtr.unwrap_or_default())?,
            idtr: table("idtr", &saved.idtr.unwrap_or_default())?,
            cr0: saved.cr0.unwrap_or(reset.cr0),
            cr2: saved.cr2.unwrap_or(0),
            cr3: saved.cr3.unwrap_or(0),
            cr4: saved.cr4.unwrap_or(0),
            cr8: saved.cr8.unwrap_or(0),
            dr: words::<4>("dr", &saved.dr)?,
            dr6: saved.dr6.unwrap_or(reset.dr6),
            dr7: saved.dr7.unwrap_or(reset.dr7),
            efer: saved.efer.unwrap_or(0),
            xcr0: saved.xcr0.unwrap_or(1),
            xsave: xsave(saved.xsave.as_deref(), reset.xsave)?,
            msrs: msrs(&saved.msrs)?,
            tsc: saved.tsc.unwrap_or(0),
            lapic: lapic(saved.lapic.as_ref())?,
            activity: match saved.activity.unwrap_or(0) {
                0 => Activity::Active,
                1 => Activity::Halted,
                2 => Activity::Shutdown,
                3 => Activity::WaitForSipi,
                other => return Err(invalid("activity", format!("unknown value {other}"))),
            },
            interrupt_shadow: saved.interrupt_shadow.unwrap_or(false),
            nmi_blocked: saved.nmi_blocked.unwrap_or(false),
            nmi_pending: saved.nmi_pending.unwrap_or(false),
            sipi_vector: saved.sipi_vector.map(|v| narrow("sipi_vector", v)).transpose()?,
            pending_event: saved.pending_event.as_ref().map(PendingEvent::try_from).transpose()?,
        })
    }
}

impl From<&Segment> for SegmentV1 {
    fn from(s: &Segment) -> Self {
        Self {
            selector: Some(s.selector.into()),
            base: Some(s.base),
            limit: Some(s.limit),
            attributes: Some(s.attributes),
        }
    }
}

impl From<&DescriptorTable> for DescriptorTableV1 {
    fn from(t: &DescriptorTable) -> Self {
        Self { base: Some(t.base), limit: Some(t.limit.into()) }
    }
}

impl From<&LapicState> for LapicV1 {
    fn from(l: &LapicState) -> Self {
        Self {
            apic_base: Some(l.apic_base),
            registers: Some(l.registers.to_vec()),
            timer_expires_at: l.timer_expires_at,
            tsc_deadline: Some(l.tsc_deadline),
        }
    }
}

impl From<&PendingEvent> for PendingEventV1 {
    fn from(event: &PendingEvent) -> Self {
        let kind = match event.kind {
            EventKind::ExternalInterrupt => 0,
            EventKind::Nmi => 1,
            EventKind::Exception => 2,
            EventKind::SoftwareInterrupt => 3,
        };
        Self { vector: Some(event.vector.into()), kind: Some(kind), error_code: event.error_code }
    }
}

impl TryFrom<&PendingEventV1> for PendingEvent {
    type Error = StateError;

    fn try_from(saved: &PendingEventV1) -> Result<Self, StateError> {
        let kind = match saved.kind.unwrap_or(0) {
            0 => EventKind::ExternalInterrupt,
            1 => EventKind::Nmi,
            2 => EventKind::Exception,
            3 => EventKind::SoftwareInterrupt,
            other => return Err(invalid("pending_event", format!("unknown kind {other}"))),
        };
        let vector = narrow("pending_event", saved.vector.unwrap_or(0))?;
        Ok(Self { vector, kind, error_code: saved.error_code })
    }
}

fn invalid(field: &'static str, why: String) -> StateError {
    StateError::Invalid { field, why }
}

fn narrow<T: TryFrom<u32>>(field: &'static str, value: u32) -> Result<T, StateError> {
    T::try_from(value).map_err(|_| invalid(field, format!("{value:#x} does not fit")))
}

fn words<const N: usize>(field: &'static str, saved: &[u64]) -> Result<[u64; N], StateError> {
    let mut words = [0; N];
    match words.get_mut(..saved.len()) {
        Some(part) => part.copy_from_slice(saved),
        None => return Err(invalid(field, format!("{} values instead of {N}", saved.len()))),
    }
    Ok(words)
}

fn segment(field: &'static str, saved: &SegmentV1) -> Result<Segment, StateError> {
    Ok(Segment {
        selector: narrow(field, saved.selector.unwrap_or(0))?,
        base: saved.base.unwrap_or(0),
        limit: saved.limit.unwrap_or(0),
        attributes: saved.attributes.unwrap_or(Segment::UNUSABLE),
    })
}

fn table(field: &'static str, saved: &DescriptorTableV1) -> Result<DescriptorTable, StateError> {
    Ok(DescriptorTable { base: saved.base.unwrap_or(0), limit: narrow(field, saved.limit.unwrap_or(0))? })
}

fn xsave(saved: Option<&[u8]>, reset: Vec<u8>) -> Result<Vec<u8>, StateError> {
    match saved {
        None => Ok(reset),
        Some(area) if (MIN_XSAVE..=MAX_XSAVE).contains(&area.len()) => Ok(area.to_vec()),
        Some(area) => {
            Err(invalid("xsave", format!("{} bytes; expected {MIN_XSAVE} to {MAX_XSAVE}", area.len())))
        }
    }
}

fn msrs(saved: &[MsrV1]) -> Result<Vec<(u32, u64)>, StateError> {
    if saved.len() > MAX_MSRS {
        return Err(invalid("msrs", format!("{} registers; at most {MAX_MSRS}", saved.len())));
    }
    let list: Vec<_> = saved.iter().map(|m| (m.index.unwrap_or(0), m.value.unwrap_or(0))).collect();
    match list.windows(2).find(|w| w[0].0 >= w[1].0) {
        Some(w) => Err(invalid("msrs", format!("{:#x} and {:#x} are out of order", w[0].0, w[1].0))),
        None => Ok(list),
    }
}

fn lapic(saved: Option<&LapicV1>) -> Result<LapicState, StateError> {
    let mut state = LapicState::default();
    let Some(saved) = saved else { return Ok(state) };
    state.apic_base = saved.apic_base.unwrap_or(0);
    state.timer_expires_at = saved.timer_expires_at;
    state.tsc_deadline = saved.tsc_deadline.unwrap_or(0);
    let registers = saved.registers.as_deref().unwrap_or_default();
    match state.registers.get_mut(..registers.len()) {
        Some(part) => part.copy_from_slice(registers),
        None => return Err(invalid("lapic", format!("{} bytes of registers", registers.len()))),
    }
    Ok(state)
}

#[cfg(test)]
#[path = "saved_state_tests.rs"]
mod tests;
