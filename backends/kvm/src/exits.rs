//! Every reason for which `KVM_RUN` returns, and what is done about it.
//!
//! | `KVM_EXIT_` | here | shown by (or why it cannot come) |
//! |---|---|---|
//! | `IO` | each element goes to [`CpuIo`] | `io::port_widths_reach_the_board_in_order`, `io::string_output_and_input_keep_order` |
//! | `MMIO` | goes to [`CpuIo`], 8 bytes at most | `io::mmio_widths_arrive_whole`, `memory::rom_ignores_writes` |
//! | `IRQ_WINDOW_OPEN` | the PIC is acknowledged in the next turn | `interrupts::legacy_interrupt_waits_for_the_window`, `interrupts::periodic_legacy_interrupts_lose_no_tick` |
//! | `IOAPIC_EOI` | [`EoiSink::end_of_interrupt`] | `interrupts::level_triggered_end_is_told`, `interrupts::every_pin_is_told_of_its_end`, `interrupts::level_triggered_end_is_told_wherever_it_is_sent` |
//! | `X86_RDMSR`, `X86_WRMSR` | the register bank of `msrs` answers, or #GP | `registers_outside_the_kernel_are_answered_and_unknown_ones_fault` in `tests/exits.rs` |
//! | `SHUTDOWN` | [`HaltReason::TripleFault`] from now on | `lifecycle::triple_fault_is_reported` |
//! | `INTR`, errors EINTR and EAGAIN | next turn | `lifecycle::kick_stops_a_tight_loop`, `lifecycle::kick_stops_a_wait_for_sipi` |
//! | `DIRTY_RING_FULL` | the rings are emptied | `memory::kvm_tests::a_full_ring_is_emptied_and_no_page_of_it_is_lost` |
//! | `INTERNAL_ERROR` | [`RunError`] with the suberror and the instruction; the guest's crash where a guest can cause it | `an_instruction_that_cannot_be_emulated_ends_the_run_with_its_bytes` in `tests/exits.rs` |
//! | `FAIL_ENTRY` | [`RunError`] with the hardware's reason | `failures_are_told_with_their_instruction` (the text); impossible states are refused when set |
//! | `UNKNOWN` | [`RunError`] with the hardware's reason | `failures_are_told_with_their_instruction` (the text); a processor newer than the kernel |
//! | `MEMORY_FAULT`, error EFAULT | [`RunError`]: the host has no memory for the page | `failures_are_told_with_their_instruction` (the text); needs a host out of memory |
//! | `HLT`, `SET_TPR` | unexpected | only without local APICs in the kernel |
//! | `DEBUG` | unexpected | only while `KVM_SET_GUEST_DEBUG` is in force, which is never used |
//! | `EXCEPTION` | unexpected | every exception that KVM intercepts it also handles |
//! | `NMI` | unexpected | the kernel handles the host's own NMIs |
//! | `TPR_ACCESS` | unexpected | only after `KVM_TPR_ACCESS_REPORTING` |
//! | `HYPERCALL` | unexpected | only after `KVM_CAP_EXIT_HYPERCALL` |
//! | `SYSTEM_EVENT` | unexpected | on x86 only of Hyper-V guests (interface not offered) and of encrypted ones |
//! | `HYPERV`, `XEN` | unexpected | their interfaces are not offered in CPUID and not enabled |
//! | `AP_RESET_HOLD` | unexpected | encrypted guests (SEV-ES) |
//! | `X86_BUS_LOCK` | unexpected | only after `KVM_CAP_X86_BUS_LOCK_EXIT`, left off |
//! | `NOTIFY` | unexpected | only after `KVM_CAP_X86_NOTIFY_VMEXIT`, left off |
//! | `WATCHDOG`, `EPR`, `OSI`, `PAPR_HCALL`, `DCR`, `S390_*`, `ARM_*`, `RISCV_*`, `LOONGARCH_*` | unexpected | other architectures |
//!
//! "Unexpected" is a [`RunError`] that names the number: the guest cannot provoke it, and going on would hide a
//! mistake of ours.
//!
//! An access that was answered is not complete: KVM puts the value into the guest's register, and moves the
//! instruction pointer, at the beginning of the next `KVM_RUN`. [`After::Complete`] says so.
//!
//! [`EoiSink::end_of_interrupt`]: atoll_machine::interrupt::EoiSink::end_of_interrupt
//! [`HaltReason::TripleFault`]: atoll_machine::backend::HaltReason::TripleFault
//! [`RunError`]: atoll_machine::backend::RunError

use std::fmt::Write;

use atoll_machine::backend::CpuIo;
use kvm_bindings::*;

use crate::partition::Shared;
use crate::run_page::RunPage;
use crate::state::VcpuState;

/// Why `KVM_RUN` returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Port access of `count` elements of `size` bytes.
    Io { input: bool, port: u16, size: u8, count: u32 },
    /// Memory-mapped access.
    Mmio { address: u64, len: u32, write: bool },
    /// RDMSR of a register that is not KVM's.
    ReadMsr(u32),
    /// WRMSR of a register that is not KVM's.
    WriteMsr(u32, u64),
    /// A legacy interrupt can be delivered now.
    InterruptWindow,
    /// A vector ended that the IOAPIC sent level-triggered.
    EndOfInterrupt(u8),
    /// Triple fault.
    Shutdown,
    /// A signal.
    Interrupted,
    /// No room to note more dirty pages.
    DirtyRingFull,
    /// The processor refused to enter the guest.
    FailedEntry { reason: u64, cpu: u32 },
    /// The hardware left the guest for a reason that KVM does not know.
    Hardware(u64),
    /// KVM cannot go on.
    Internal(Failure),
    /// No host memory behind a page.
    MemoryFault { address: u64, size: u64 },
    /// `KVM_RUN` failed with this errno.
    HostError(i32),
    /// Any other reason.
    Other(u32),
}

/// What KVM says about an internal error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) suberror: u32,
    pub(crate) data: Vec<u64>,
    /// The instruction's bytes, where KVM tells them.
    pub(crate) instruction: Vec<u8>,
}

/// What comes after an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// The next turn.
    Continue,
    /// The next turn, whose `KVM_RUN` first completes the instruction that was answered.
    Complete,
    /// The vCPU has shut down.
    Shutdown,
    /// The vCPU cannot go on, by the guest's doing.
    BeyondKvm(String),
    /// The vCPU cannot go on.
    Fatal(String),
}

/// Does what `exit` asks for.
pub(crate) fn handle<I: CpuIo>(
    exit: Exit,
    page: &mut RunPage,
    state: &mut VcpuState,
    shared: &Shared,
    io: &I,
) -> After {
    match exit {
        Exit::Io { input, port, size, .. } => ports(page.io_data(), input, port, size, io),
        Exit::Mmio { address, write: true, .. } => {
            io.mmio_write(address, page.mmio_data());
            After::Complete
        }
        Exit::Mmio { address, write: false, .. } => {
            io.mmio_read(address, page.mmio_data());
            After::Complete
        }
        Exit::ReadMsr(index) => {
            page.answer_msr(state.read_msr(index));
            After::Complete
        }
        Exit::WriteMsr(index, value) => {
            page.answer_msr(state.write_msr(index, value).then_some(0));
            After::Complete
        }
        Exit::InterruptWindow | Exit::Interrupted => After::Continue,
        Exit::EndOfInterrupt(vector) => {
            if let Some(eoi) = &shared.eoi {
                eoi.end_of_interrupt(vector);
            }
            After::Continue
        }
        Exit::DirtyRingFull => {
            shared.memory.ring_full();
            After::Continue
        }
        Exit::Shutdown => After::Shutdown,
        Exit::Internal(failure) if failure.is_the_guests() => After::BeyondKvm(failure.describe()),
        other => After::Fatal(describe(&other)),
    }
}

/// Port accesses, element by element.
fn ports<I: CpuIo>(data: &mut [u8], input: bool, port: u16, size: u8, io: &I) -> After {
    if !matches!(size, 1 | 2 | 4) || data.is_empty() {
        return After::Fatal(format!(
            "KVM reports a port access of {} bytes in elements of {size}",
            data.len()
        ));
    }
    for element in data.chunks_exact_mut(usize::from(size)) {
        if input {
            io.port_read(port, element);
        } else {
            io.port_write(port, element);
        }
    }
    After::Complete
}

/// Why a vCPU cannot go on after `exit`, in words.
pub(crate) fn describe(exit: &Exit) -> String {
    match exit {
        Exit::Internal(failure) => failure.describe(),
        Exit::FailedEntry { reason, cpu } => format!(
            "the processor refused to enter the guest (hardware reason {reason:#x}, on host CPU {cpu}); the host's \
             kernel log may say more"
        ),
        Exit::Hardware(reason) => {
            format!(
                "the hardware left the guest for reason {reason:#x}, which the host's kernel does not know"
            )
        }
        Exit::MemoryFault { address, size } => format!(
            "the host has no memory for {size} bytes at guest address {address:#x}; is it out of memory or huge \
             pages?"
        ),
        Exit::HostError(libc::EFAULT) => {
            "the host has no memory for a page of the guest; is it out of memory or huge pages?".to_owned()
        }
        Exit::HostError(errno) => format!("KVM_RUN: {}", std::io::Error::from_raw_os_error(*errno)),
        Exit::Other(reason) => {
            format!("KVM returned for reason {reason}, which cannot occur in this machine")
        }
        other => format!("KVM returned for {other:?}, which cannot occur here"),
    }
}

impl Failure {
    /// Whether a guest can bring it about: by instructions that KVM does not emulate, or tables and stacks where there
    /// is no memory.
    fn is_the_guests(&self) -> bool {
        matches!(
            self.suberror,
            KVM_INTERNAL_ERROR_EMULATION | KVM_INTERNAL_ERROR_SIMUL_EX | KVM_INTERNAL_ERROR_DELIVERY_EV
        )
    }

    fn describe(&self) -> String {
        let what = match self.suberror {
            KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate an instruction",
            KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met an exception while delivering an exception",
            KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM left the guest while delivering an event",
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "KVM left the guest for a reason it does not handle",
            _ => "KVM met an internal error",
        };
        let mut text = format!("{what} (suberror {})", self.suberror);
        if !self.instruction.is_empty() {
            text.push_str(", instruction bytes");
            for byte in &self.instruction {
                let _ = write!(text, " {byte:02x}");
            }
        } else if !self.data.is_empty() {
            let _ = write!(text, ", data {:x?}", self.data);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn failures_are_told_with_their_instruction() {
        let instruction = vec![0x0f, 0x0b, 0xff];
        let failure = Failure { suberror: 1, data: vec![4], instruction };
        let text = describe(&Exit::Internal(failure));
        assert_eq!(text, "KVM could not emulate an instruction (suberror 1), instruction bytes 0f 0b ff");
        let failure = Failure { suberror: 4, data: vec![0x31, 2], instruction: vec![] };
        assert!(describe(&Exit::Internal(failure)).ends_with("(suberror 4), data [31, 2]"));
        let text = describe(&Exit::FailedEntry { reason: 0x8000_0021, cpu: 3 });
        assert!(text.contains("0x80000021") && text.contains("CPU 3"), "{text}");
        assert!(describe(&Exit::HostError(libc::EFAULT)).contains("no memory"));
        assert!(describe(&Exit::HostError(libc::EINVAL)).contains("Invalid argument"));
        assert!(describe(&Exit::MemoryFault { address: 0x1000, size: 4096 }).contains("0x1000"));
        assert!(describe(&Exit::Hardware(0x4d)).contains("0x4d"));
        assert!(describe(&Exit::Other(KVM_EXIT_HYPERV)).contains("27"));
    }

    #[derive(Default)]
    struct Log(RefCell<Vec<(u16, Vec<u8>)>>);

    impl CpuIo for Log {
        fn port_read(&self, port: u16, data: &mut [u8]) {
            data.fill(self.0.borrow().len() as u8);
            self.0.borrow_mut().push((port, vec![]));
        }
        fn port_write(&self, port: u16, data: &[u8]) {
            self.0.borrow_mut().push((port, data.to_vec()));
        }
        fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}
        fn mmio_write(&self, _address: u64, _data: &[u8]) {}
    }

    #[test]
    fn string_accesses_come_element_by_element() {
        let log = Log::default();
        let mut data = [1, 2, 3, 4];
        assert_eq!(ports(&mut data, false, 0x1f0, 2, &log), After::Complete);
        assert_eq!(log.0.take(), [(0x1f0, vec![1, 2]), (0x1f0, vec![3, 4])]);
        assert_eq!(ports(&mut data, true, 0x60, 1, &log), After::Complete);
        assert_eq!(data, [0, 1, 2, 3]);
        assert!(matches!(ports(&mut data, true, 0x60, 3, &log), After::Fatal(_)), "no such width");
        assert!(matches!(ports(&mut [], true, 0x60, 1, &log), After::Fatal(_)));
    }
}
