//! Exits of KVM that the conformance suite does not reach by itself: registers that are answered outside the kernel,
//! instructions that KVM cannot emulate, and what becomes of a vCPU then.

use std::cell::RefCell;

use atoll_backend_conformance::fixture::{DEVICE, Machine};
use atoll_backend_conformance::payload::{Built, Payload, count_of, fault_of};
use atoll_kvm::{KvmBackend, KvmPartition};
use atoll_machine::backend::{CpuIo, HaltReason, RunError, StopFlag, Vcpu};
use atoll_machine::cpu::state::gpr;
use iced_x86::code_asm::*;

/// The backend, or the reason why this host has none.
fn backend() -> Option<KvmBackend> {
    KvmBackend::open().map_err(|error| println!("skipped: {error}")).ok()
}

/// Accesses RDX:RAX of an MSR; a fault continues behind it.
fn try_msr(a: &mut Payload, index: u32, write: Option<u64>) -> Result<(), iced_x86::IcedError> {
    let mut after = a.create_label();
    a.resume_at(after)?;
    match write {
        Some(value) => a.msr_write(index, value)?,
        None => a.msr_read(index)?,
    }
    a.set_label(&mut after)?;
    a.nop()
}

fn registers(a: &mut Payload) -> Built {
    const GP: u8 = 13;
    a.faults(&[GP]);
    // MTRR default type: kept outside the kernel.
    try_msr(a, 0x2ff, Some(0xc06))?;
    try_msr(a, 0x2ff, None)?;
    a.mov(rbx, rax)?;
    a.load(count_of(0, GP))?;
    a.mov(rsi, rax)?;
    // Registers that do not exist, of the filter's ranges and outside them.
    for index in [0x1234, 0x480, 0xc001_0114, 0x4b56_4d20] {
        try_msr(a, index, None)?;
        try_msr(a, index, Some(0))?;
    }
    a.load(count_of(0, GP))?;
    a.mov(rdi, rax)?;
    a.exit()?;
    Ok(vec![])
}

#[test]
fn registers_outside_the_kernel_are_answered_and_unknown_ones_fault() {
    let Some(backend) = backend() else { return };
    let machine = Machine::new(&backend, 1);
    let mut guest = machine.long(0, registers);
    let state = machine.finish(&mut guest);
    assert_eq!(state.gpr[gpr::RBX], 0xc06, "MTRR default type");
    assert_eq!((state.gpr[gpr::RSI], state.gpr[gpr::RDI]), (0, 8), "faults");
    assert_eq!((machine.u64_at(fault_of(0)), machine.u64_at(fault_of(0) + 8)), (13, 0), "#GP(0)");
}

/// Answers nothing and notes what it was asked.
#[derive(Default)]
struct Nothing(RefCell<Vec<String>>);

impl CpuIo for Nothing {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.0.borrow_mut().push(format!("in {port:#x}"));
        data.fill(0xff);
    }
    fn port_write(&self, port: u16, _data: &[u8]) {
        self.0.borrow_mut().push(format!("out {port:#x}"));
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.0.borrow_mut().push(format!("read {address:#x}"));
        data.fill(0xff);
    }
    fn mmio_write(&self, address: u64, _data: &[u8]) {
        self.0.borrow_mut().push(format!("write {address:#x}"));
    }
}

#[test]
fn an_instruction_that_cannot_be_emulated_ends_the_run_with_its_bytes() {
    let Some(backend) = backend() else { return };
    let machine: Machine<KvmPartition> = Machine::new(&backend, 1);
    let mut guest = machine.long(0, |a| {
        let mut at = a.create_label();
        a.mov(rbx, DEVICE)?;
        a.set_label(&mut at)?;
        // No emulator of KVM's knows FBSTP.
        a.fbstp(tword_ptr(rbx))?;
        a.exit()?;
        Ok(vec![at])
    });
    let error = guest.vcpu.run(&StopFlag::new(), &Nothing::default()).unwrap_err();
    assert!(
        matches!(error, RunError::BeyondEngine { vcpu: 0, .. }),
        "the guest's doing, not the host's: {error}"
    );
    let error = error.to_string();
    let rip = format!("rip {:#x}", guest.labels[0]);
    assert!(error.contains("could not emulate an instruction") && error.contains(&rip), "{error}");
    assert!(error.contains("df 33") || error.contains("data ["), "{error}");
    assert_eq!(guest.vcpu.state().rip, guest.labels[0], "the state can still be read");
}

#[test]
fn code_without_memory_behind_it_ends_the_run() {
    let Some(backend) = backend() else { return };
    let machine: Machine<KvmPartition> = Machine::new(&backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.jmp(rbx)?;
        Ok(vec![])
    });
    let error = guest.vcpu.run(&StopFlag::new(), &Nothing::default()).unwrap_err().to_string();
    assert!(error.contains("vCPU 0"), "{error}");
    guest.vcpu.reset();
    let stop = StopFlag::new();
    stop.set();
    assert_eq!(guest.vcpu.run(&stop, &Nothing::default()).unwrap(), HaltReason::Stopped);
}
