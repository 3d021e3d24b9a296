//! The processor's mode as cached in [`Mode`], and the construction of a [`Cpu`].

use std::sync::Arc;

use atoll_machine::cpu::state::{CpuState, Segment, seg};

use crate::cpu::{Cpu, Mode, XsaveArea, control, flag};
use crate::fpu::Fpu;
use crate::host::thunk::ThunkError;
use crate::partition::Shared;
use crate::system::SystemState;

impl Cpu {
    /// vCPU `index` of the machine, in its power-on state. Fails when the host refuses executable memory.
    pub fn new(shared: Arc<Shared>, index: u32) -> Result<Self, ThunkError> {
        let mailbox = &shared.mailboxes[index as usize];
        let state = CpuState::power_on(mailbox.apic_id, index == 0, shared.model.signature());
        let requests = mailbox.requests.clone();
        let mode = Mode {
            cpl: 0,
            bits: 16,
            protected: false,
            v8086: false,
            long: false,
            paging: false,
            stack_bits: 16,
        };
        let mut cpu = Self {
            gpr: state.gpr,
            rip: state.rip,
            next_rip: state.rip,
            rflags: state.rflags,
            segments: state.segments,
            mode,
            cr0: state.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            ldtr: state.ldtr,
            tr: state.tr,
            gdtr: state.gdtr,
            idtr: state.idtr,
            dr: [0; 4],
            dr6: state.dr6,
            dr7: state.dr7,
            pdpte: [0; 4],
            xsave: Box::new(XsaveArea::import(&state.xsave)),
            activity: state.activity,
            interrupt_shadow: false,
            nmi_blocked: false,
            retired: 0,
            budget_end: u64::MAX,
            recheck: false,
            requests,
            system: Box::new(SystemState::new(&shared.model, index, mailbox.apic_id)),
            mmu: Box::default(),
            exec: Default::default(),
            code: Box::default(),
            fpu: Box::new(Fpu::for_model(&shared.model)?),
            shared,
        };
        cpu.refresh_mode();
        Ok(cpu)
    }

    /// Recomputes [`Cpu::mode`] from CR0, EFER, RFLAGS.VM, CS and SS. Called whenever one of them changes.
    pub fn refresh_mode(&mut self) {
        let cs = self.segments[seg::CS];
        let ss = self.segments[seg::SS];
        let pe = self.cr0 & control::CR0_PE != 0;
        let v8086 = pe && self.rflags & flag::VM != 0;
        let long = self.efer & control::EFER_LMA != 0;
        let big = |s: Segment| s.attributes & Segment::DEFAULT_BIG != 0;
        let bits = if long && cs.attributes & Segment::LONG != 0 {
            64
        } else if !v8086 && big(cs) {
            32
        } else {
            16
        };
        self.mode = Mode {
            cpl: match (pe, v8086) {
                (false, _) => 0,
                (true, true) => 3,
                (true, false) => ss.dpl(),
            },
            bits,
            protected: pe && !v8086,
            v8086,
            long,
            paging: self.cr0 & control::CR0_PG != 0,
            stack_bits: match bits {
                64 => 64,
                _ if !v8086 && big(ss) => 32,
                _ => 16,
            },
        };
    }
}
