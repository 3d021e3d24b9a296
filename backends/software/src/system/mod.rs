//! The system half of the software CPU: segments, far transfers, tasks, event delivery, control registers,
//! MSRs. Every rare instruction arrives at [`execute`].
//!
//! | file | contents |
//! |---|---|
//! | [`mode`] | the cached mode, construction of a [`Cpu`] |
//! | `memory`, `operand`, `descriptor` | what the handlers stand on |
//! | `segments` | segment registers, LDTR, TR, descriptor queries |
//! | `far`, `iret`, `task` | far transfers, returns, task switches |
//! | [`delivery`] | exceptions and interrupts, double and triple faults |
//! | `debug` | debug registers and breakpoints |
//! | `control`, `calls`, `flags` | control registers, SYSCALL and friends, flags, ports |
//! | [`msr`], `time`, [`paravirt`] | model-specific registers, TSC, KVM's clock |

mod calls;
pub(crate) mod control;
pub(crate) mod debug;
pub mod delivery;
mod descriptor;
mod far;
mod flags;
mod iret;
mod memory;
pub mod mode;
pub mod msr;
mod operand;
pub mod paravirt;
mod segments;
mod task;
pub(crate) mod time;

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::model::{CpuModel, CpuidContext, Feature};
use atoll_machine::cpu::state::{PendingEvent, gpr};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::apic;
use crate::apic::lapic::Lapic;
use crate::cpu::{Cpu, flag};
use crate::exception::{Exception, Outcome};

/// System-wide registers that only this module, `apic/` and `vcpu.rs` touch.
pub struct SystemState {
    /// Index of the vCPU in its machine.
    pub index: u32,
    /// Local APIC.
    pub lapic: Lapic,
    /// Model-specific registers.
    pub msrs: msr::MsrFile,
    /// KVM's clock and steal time.
    pub paravirt: paravirt::Paravirt,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// The machine's TSC base, see [`crate::partition::Shared::tsc_base`].
    pub tsc_base: u64,
    /// An event that another engine accepted and has not delivered.
    pub pending_event: Option<PendingEvent>,
    /// A fault in the context of the task that the last instruction switched to.
    pub pending_fault: Option<Exception>,
    /// DR6 bits of debug traps that wait for the next boundary.
    pub pending_debug: u64,
    /// DR6 bits of the #DB fault that is being raised.
    pub debug_fault: u64,
    /// I/O breakpoints hit by the current instruction, as DR6 bits.
    pub debug_hits: u64,
    /// The instruction that the interrupt shadow is for: the interpreter goes on after STI when nothing waits,
    /// and the shadow is over once RIP is another.
    pub shadow_rip: u64,
    /// MOV SS or POP SS also holds debug traps off until after the next instruction.
    pub debug_shadow: bool,
    /// SYSCALL and SYSRET: whether a single-step trap follows, overriding TF at the start.
    pub step_flag: Option<bool>,
    /// NMIs that wait: one while another is handled, up to two otherwise (the first would have been taken at
    /// once by a processor that runs all the time).
    pub nmis: u8,
    /// A start-up IPI is latched.
    pub sipi_vector: Option<u8>,
}

impl SystemState {
    /// The registers of vCPU `index` with `apic_id` after RESET.
    pub fn new(model: &CpuModel, index: u32, apic_id: u32) -> Self {
        Self {
            index,
            lapic: Lapic::new(apic_id, index == 0),
            msrs: msr::MsrFile::new(model),
            paravirt: paravirt::Paravirt::default(),
            tsc_adjust: 0,
            tsc_base: 0,
            pending_event: None,
            pending_fault: None,
            pending_debug: 0,
            debug_fault: 0,
            debug_hits: 0,
            shadow_rip: 0,
            debug_shadow: false,
            step_flag: None,
            nmis: 0,
            sipi_vector: None,
        }
    }
}

impl SystemState {
    /// Adds `count` NMIs to those that wait.
    pub(crate) fn latch_nmis(&mut self, count: u8, blocked: bool) {
        let limit = if blocked { 1 } else { 2 };
        self.nmis = self.nmis.saturating_add(count).min(limit);
    }
}

/// Whether something waits that the processor would take at the next boundary.
pub(crate) fn event_waits(cpu: &Cpu) -> bool {
    let s = &cpu.system;
    s.pending_debug != 0
        || s.pending_fault.is_some()
        || s.pending_event.is_some()
        || s.nmis != 0 && !cpu.nmi_blocked
        || cpu.rflags & flag::IF != 0 && (s.lapic.deliverable().is_some() || apic::extint_pending(cpu))
}

/// Makes the interpreter look up after an instruction that may have made an event deliverable (IF, TPR, EOI)
/// or that makes the next one be executed alone (TF, RF).
pub(crate) fn recheck_events(cpu: &mut Cpu) {
    if cpu.rflags & (flag::TF | flag::RF) != 0 || event_waits(cpu) {
        cpu.recheck = true;
    }
}

/// Holds interrupts off until after the next instruction (STI, MOV SS, POP SS).
pub(crate) fn begin_shadow(cpu: &mut Cpu) {
    cpu.interrupt_shadow = true;
    cpu.system.shadow_rip = cpu.next_rip;
}

/// Ends a shadow whose instruction has been executed without the run loop noticing.
pub(crate) fn end_stale_shadow(cpu: &mut Cpu) {
    if cpu.interrupt_shadow && cpu.rip != cpu.system.shadow_rip {
        cpu.interrupt_shadow = false;
        cpu.system.debug_shadow = false;
    }
}

/// Executes a rare (system, segment, far-transfer, I/O) instruction.
pub fn execute(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    use Mnemonic::*;
    match i.mnemonic() {
        Mov if involves(i, iced_x86::Register::is_cr) => control::execute_move(cpu, i),
        Mov if involves(i, iced_x86::Register::is_dr) => debug::execute_move(cpu, i),
        Mov | Pop | Push | Lds | Les | Lfs | Lgs | Lss => segments::execute_moves(cpu, io, i),
        Call | Jmp => far::execute(cpu, io, i),
        Retf => far::far_return(cpu, io, far_size(i), retf_extra(i)),
        Iret | Iretd | Iretq => iret::execute(cpu, io, far_size(i)),
        Int | Int3 | Into | Int1 => flags::software_interrupt(cpu, i),
        Bound => flags::bound(cpu, io, i),
        Lgdt | Lidt | Sgdt | Sidt => segments::execute_tables(cpu, io, i),
        Lldt | Sldt | Ltr | Str => segments::execute_system_segments(cpu, io, i),
        Lar | Lsl | Verr | Verw | Arpl => segments::execute_queries(cpu, io, i),
        Lmsw | Smsw | Clts => control::execute_status(cpu, io, i),
        Xgetbv | Xsetbv => control::execute_extended(cpu, i),
        Invlpg => control::invalidate_page(cpu, i),
        Invpcid => control::invalidate_pcid(cpu, io, i),
        Prefetch | Prefetchw => Ok(()),
        Invd | Wbinvd | Wbnoinvd => require_cpl0(cpu),
        Rdmsr => msr::execute_read(cpu),
        Wrmsr => msr::execute_write(cpu),
        Rdtsc => time::execute(cpu, false),
        Rdtscp if cpu.shared.model.has(Feature::Rdtscp) => time::execute(cpu, true),
        // No performance counters: every index is out of range.
        Rdpmc => Err(Exception::GP0),
        Cpuid => {
            cpuid(cpu);
            Ok(())
        }
        Syscall | Sysret | Sysretq | Sysenter | Sysexit | Sysexitq => calls::execute(cpu, i),
        Swapgs => calls::swapgs(cpu),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => calls::execute_base(cpu, i),
        Hlt => flags::halt(cpu),
        Cli => flags::interrupts(cpu, false),
        Sti => flags::interrupts(cpu, true),
        Stac => flags::alignment_check(cpu, true),
        Clac => flags::alignment_check(cpu, false),
        Pushf | Pushfd | Pushfq => flags::push(cpu, io, i),
        Popf | Popfd | Popfq => flags::pop(cpu, io, i),
        In | Out => flags::execute_port(cpu, io, i),
        Vmcall | Vmmcall => {
            hypercall(cpu);
            Ok(())
        }
        Rdrand if cpu.shared.model.has(Feature::Rdrand) => {
            random(cpu, i);
            Ok(())
        }
        Rdseed if cpu.shared.model.has(Feature::Rdseed) => {
            random(cpu, i);
            Ok(())
        }
        // MONITOR, MWAIT, RSM, RDPID, SERIALIZE, UD0 to UD2, VMX, SVM, SMX: not offered.
        _ => Err(Exception::UD),
    }
}

fn involves(i: &Instruction, class: fn(iced_x86::Register) -> bool) -> bool {
    (0..2).any(|n| i.op_kind(n) == OpKind::Register && class(i.op_register(n)))
}

/// Bytes per value that a far return pops.
fn far_size(i: &Instruction) -> u32 {
    match i.code() {
        Code::Retfw | Code::Retfw_imm16 | Code::Iretw => 2,
        Code::Retfd | Code::Retfd_imm16 | Code::Iretd => 4,
        _ => 8,
    }
}

fn retf_extra(i: &Instruction) -> u64 {
    if i.op_count() == 1 { operand::immediate(i, 0) & 0xffff } else { 0 }
}

fn require_cpl0(cpu: &Cpu) -> Outcome {
    if cpu.mode.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
}

/// Whether the current privilege may access `size` bytes at I/O `port`: IOPL, then the TSS's bitmap. #GP(0)
/// if not. Also records hits of I/O breakpoints. For INS and OUTS.
pub fn check_io_permission(cpu: &mut Cpu, io: &dyn CpuIo, port: u16, size: u32) -> Outcome {
    flags::check_io_permission(cpu, io, port, size)
}

fn cpuid(cpu: &mut Cpu) {
    let context = CpuidContext {
        apic_id: cpu.system.lapic.id(),
        topology: &cpu.shared.topology,
        os_xsave: cpu.cr4 & crate::cpu::control::CR4_OSXSAVE != 0,
        xcr0: cpu.xcr0,
        apic_enabled: cpu.system.lapic.globally_enabled(),
    };
    let (leaf, subleaf) = (cpu.gpr[gpr::RAX] as u32, cpu.gpr[gpr::RCX] as u32);
    let r = cpu.shared.model.cpuid(leaf, subleaf, &context);
    cpu.gpr[gpr::RAX] = r.eax.into();
    cpu.gpr[gpr::RBX] = r.ebx.into();
    cpu.gpr[gpr::RCX] = r.ecx.into();
    cpu.gpr[gpr::RDX] = r.edx.into();
}

/// KVM's hypercalls: none is offered. -ENOSYS, or -EPERM outside ring 0.
fn hypercall(cpu: &mut Cpu) {
    const ENOSYS: i64 = -1000;
    const EPERM: i64 = -1;
    let result = if cpu.mode.cpl == 0 { ENOSYS } else { EPERM } as u64;
    cpu.gpr[gpr::RAX] = if cpu.mode.bits == 64 { result } else { result & 0xffff_ffff };
}

/// RDRAND and RDSEED: always succeed.
fn random(cpu: &mut Cpu, i: &Instruction) {
    let mut bytes = [0; 8];
    let register = i.op_register(0);
    cpu.shared.inputs.random(&mut bytes[..register.size().min(8)]);
    operand::write_register(cpu, register, u64::from_le_bytes(bytes));
    cpu.rflags = cpu.rflags & !flag::ARITHMETIC | flag::CF;
}
