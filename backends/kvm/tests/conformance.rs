//! The suite that every backend passes, on KVM. Without `/dev/kvm` there is nothing to test: it says so and passes.
//!
//! `ATOLL_CONFORMANCE=interrupts::` runs only the cases whose name contains it.

use atoll_backend_conformance::run_matching;
use atoll_foundation::host::processor::Processor;
use atoll_kvm::KvmBackend;

/// Cases that no KVM can pass.
const KVM: &[(&str, &str)] = &[
    ("timers::timer_follows_the_machines_clock", "KVM's timers and counters run on the host's time only"),
    ("lifecycle::budget_is_exact", "KVM does not count instructions"),
    ("moving::moved_at_every_budget_gives_the_same_result", "KVM does not count instructions"),
    ("io::mmio_of_32_bytes_arrives", "KVM's instruction emulator knows no AVX"),
];

/// Cases that a KVM without virtualization in the processor (`kvm_pvm`) cannot pass: there a kernel-mode guest
/// runs in KVM's instruction emulator, which is made for single instructions that touch devices.
const EMULATED: &[(&str, &str)] = &[
    ("registers::saved_form_round_trips", "the emulator knows no SSE arithmetic"),
    ("modes::exceptions_reach_their_handlers", "the emulator knows INT3 in real mode only"),
    ("modes::real_to_protected_to_pae_to_long_and_back", "kvm_pvm answers 32-bit paging with a triple fault"),
    ("modes::sse_avx_and_x87_compute", "the emulator knows no vector or x87 arithmetic"),
    (
        "modes::system_calls_enter_and_leave_the_kernel",
        "kvm_pvm never arrives in ring 3 of a guest that does not speak its interface",
    ),
    (
        "interrupts::sti_holds_one_instruction_longer",
        "the emulator looks for interrupts between batches only",
    ),
    ("timers::time_counter_follows_the_clock", "RDTSC shows the host's counter, without the VM's offset"),
    ("moving::moved_at_random_times_gives_the_same_result", "the emulator knows no AVX"),
];

/// Cases that a processor which QEMU emulates cannot pass, because its own exceptions are otherwise.
const TCG: &[(&str, &str)] = &[
    ("modes::reserved_bits_in_tables_fault_with_their_code", "QEMU leaves P out of the code of such a fault"),
    ("modes::stack_references_fault_as_such", "QEMU raises #GP for stack addresses that are not canonical"),
];

/// Cases that QEMU's emulated processor passes from version 9.1 on.
const TCG_BEFORE_9_1: &[(&str, &str)] = &[(
    "smp::ipi_ping_pong",
    "QEMU before 9.1 forgets STI's shadow when it returns to a guest, so a wake-up between STI and HLT is lost",
)];

/// Whether QEMU emulates the processor.
fn emulated_by_qemu() -> bool {
    let signature = std::arch::x86_64::__cpuid(0x4000_0000);
    std::arch::x86_64::__cpuid(1).ecx >> 31 & 1 != 0 && signature.ebx.to_le_bytes() == *b"TCGT"
}

/// The emulator's version, which the lab tells; an old one when nobody does.
fn qemu_version() -> (u32, u32) {
    let text = std::env::var("KVM_LAB_QEMU_VERSION").unwrap_or_default();
    let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[test]
fn kvm_conforms() {
    let backend = match KvmBackend::open() {
        Ok(backend) => backend,
        Err(error) => return println!("skipped: {error}"),
    };
    let mut skip = KVM.to_vec();
    // Without the processor's virtualization `/dev/kvm` is software.
    if Processor::read().unwrap_or_default().virtualization().is_none() {
        skip.extend(EMULATED);
    }
    if emulated_by_qemu() {
        skip.extend(TCG);
        if qemu_version() < (9, 1) {
            skip.extend(TCG_BEFORE_9_1);
        }
    }
    let filter = std::env::var("ATOLL_CONFORMANCE").unwrap_or_default();
    let report = run_matching(&backend, &skip, &filter);
    println!("{report}");
    report.expect_success();
    assert!(report.passed.len() + report.skipped.len() > 0, "no case is named {filter}");
}
