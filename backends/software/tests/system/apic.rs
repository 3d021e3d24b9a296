//! The local APIC as a guest uses it, by its page and by its registers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use atoll_machine::backend::{HaltReason, Partition, Vcpu};
use atoll_machine::cpu::state::{Activity, CpuState};
use atoll_machine::interrupt::{ExtIntSource, Msi};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::*;

const X2APIC: u64 = 0xfee0_0d00;

fn x2apic(mut state: CpuState) -> CpuState {
    state.lapic.apic_base = X2APIC;
    enable_apic(state)
}

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// Handlers that end the interrupt through x2APIC and return.
fn ending_handlers(m: &Machine, vectors: &[u64]) {
    let at = STUBS + 0x4000;
    m.assemble_at(64, at, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        wrmsr(a, 0x80b, 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    for &v in vectors {
        m.continue_at(v, at);
    }
}

fn run_x2apic(m: &mut Machine, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    m.assemble_at(64, CODE, |a| {
        build(a)?;
        exit(a)
    });
    let state = x2apic(m.long_state());
    m.run_from(&state);
}

#[test]
fn self_ipis_arrive_by_priority_once_interrupts_are_enabled() {
    let mut m = Machine::new();
    m.long_surroundings();
    ending_handlers(&m, &[0x31, 0x52, 0x53]);
    run_x2apic(&mut m, |a| {
        wrmsr(a, 0x83f, 0x31)?;
        wrmsr(a, 0x830, 0x4_0052)?; // shorthand: self
        wrmsr(a, 0x83f, 0x53)?;
        a.sti()?;
        a.nop()?;
        a.cli()
    });
    assert_eq!(m.vectors().iter().map(|v| v.0).collect::<Vec<_>>(), [0x53, 0x52, 0x31]);
}

#[test]
fn task_priority_holds_lower_classes_back_until_cr8_falls() {
    let mut m = Machine::new();
    m.long_surroundings();
    ending_handlers(&m, &[0x45, 0x61]);
    run_x2apic(&mut m, |a| {
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.sti()?;
        wrmsr(a, 0x83f, 0x45)?;
        wrmsr(a, 0x83f, 0x61)?;
        a.mov(eax, 1)?;
        a.out(0xe9, al)?;
        a.mov(ecx, 0x808)?;
        a.rdmsr()?;
        a.out(0xe9, eax)?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        a.nop()
    });
    assert_eq!(m.log(), [1, 0x50]);
    let events = m.events();
    assert_eq!(events.iter().map(|e| e.vector).collect::<Vec<_>>(), [0x61, 0x45]);
}

#[test]
fn register_page_works_and_moves_and_disappears_in_x2apic_mode() {
    let mut m = Machine::new();
    m.long_surroundings();
    // Map the page at 0xfee00000 and one at 0xfed00000: 2 MiB entries of the table for 3 to 4 GiB.
    m.write64(TABLES + 0x1000 + 3 * 8, (TABLES + 0x3000) | 7);
    m.write64(TABLES + 0x3000 + 0x1f7 * 8, 0xfee0_0087 & !0x1f_0000u64);
    m.write64(TABLES + 0x3000 + 0x1f6 * 8, 0xfec0_0087);
    m.run_from_code(|a| {
        a.mov(ebx, 0xfee0_0000u32)?;
        a.mov(eax, dword_ptr(rbx + 0x30))?;
        a.out(0xe9, eax)?; // version
        a.mov(dword_ptr(rbx + 0x80), 0x20)?;
        a.mov(eax, dword_ptr(rbx + 0x80))?;
        a.out(0xe9, eax)?; // TPR
        wrmsr(a, 0x1b, 0xfed0_0900)?;
        a.mov(eax, dword_ptr(rbx + 0x80))?;
        a.out(0xe9, eax)?; // nobody there any more
        a.mov(ebx, 0xfed0_0000u32)?;
        a.mov(eax, dword_ptr(rbx + 0x80))?;
        a.out(0xe9, eax)?; // here now
        wrmsr(a, 0x1b, 0xfed0_0d00)?;
        a.mov(eax, dword_ptr(rbx + 0x80))?;
        a.out(0xe9, eax)?; // x2APIC: no page
        a.mov(ecx, 0x808)?;
        a.rdmsr()?;
        a.out(0xe9, eax)
    });
    assert_eq!(m.log(), [0x5_0014, 0x20, u32::MAX, 0x20, u32::MAX, 0x20]);
}

#[test]
fn x2apic_registers_refuse_what_the_manual_refuses() {
    for (index, value, ok) in [
        (0x80bu32, 0u64, true),
        (0x80b, 1, false), // EOI must be zero
        (0x802, 0, false), // id is read only
        (0x80e, 0, false), // no DFR
        (0x831, 0, false), // no upper ICR
        (0x808, 0x100, false),
        (0x828, 1, false),
        (0x832, 0x4_0030, true),
        (0x832, 0x8_0030, false),
        (0x1b, 0xfee0_0900, false), // back to xAPIC
        (0x1b, 0xfee0_0100, true),  // disabled
    ] {
        let mut m = Machine::new();
        m.long_surroundings();
        run_x2apic(&mut m, |a| wrmsr(a, index, value));
        assert_eq!(m.vectors().is_empty(), ok, "WRMSR {index:#x} = {value:#x}");
    }
    let mut m = Machine::new();
    m.run_long(|a| wrmsr(a, 0x808, 0));
    assert_eq!(m.vectors(), [(13, 0)], "no registers in xAPIC mode");
}

#[test]
fn eoi_of_a_level_triggered_message_reaches_the_io_apic() {
    let mut m = Machine::new();
    m.long_surroundings();
    ending_handlers(&m, &[0x40, 0x41]);
    m.assemble_at(64, CODE, |a| {
        a.sti()?;
        a.nop()?;
        a.nop()?;
        exit(a)
    });
    let state = x2apic(m.long_state());
    m.vcpu.set_state(&state).unwrap();
    let sink = m.partition.msi_sink();
    sink.signal_msi(Msi { address: 0xfee0_0000, data: 0x41 | 1 << 15 | 1 << 14 });
    sink.signal_msi(Msi { address: 0xfee0_0000, data: 0x40 });
    m.run();
    assert_eq!(m.events().len(), 2);
    assert_eq!(*m.eois.0.lock().unwrap(), [0x41]);
}

#[test]
fn deadline_timer_fires_when_the_tsc_reaches_it() {
    let mut m = Machine::new();
    m.long_surroundings();
    ending_handlers(&m, &[0x77]);
    m.assemble_at(64, CODE, |a| {
        wrmsr(a, 0x832, 0x4_0077)?;
        wrmsr(a, 0x6e0, 5_000)?;
        a.sti()?;
        a.hlt()?;
        a.mov(ecx, 0x6e0)?;
        a.rdmsr()?;
        a.out(0xe9, eax)?;
        exit(a)
    });
    let state = x2apic(m.long_state());
    m.vcpu.set_state(&state).unwrap();
    let partition = m.partition.clone();
    let clock = m.clock.clone();
    // A clock that stands still needs somebody to move it and to say so.
    let mover = std::thread::spawn(move || {
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(5));
            clock.advance(1_000);
            partition.kick(0);
        }
    });
    m.run();
    mover.join().unwrap();
    assert_eq!((m.vectors(), m.log()), (vec![(0x77, 0)], vec![0]));
}

#[test]
fn periodic_timer_interrupts_again_and_again() {
    let mut m = Machine::new();
    m.long_surroundings();
    ending_handlers(&m, &[0x77]);
    m.assemble_at(64, CODE, |a| {
        wrmsr(a, 0x83e, 0xb)?;
        wrmsr(a, 0x832, 0x2_0077)?;
        wrmsr(a, 0x838, 100_000)?;
        a.mov(ebx, 3)?;
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.hlt()?;
        a.dec(ebx)?;
        a.jne(again)?;
        exit(a)
    });
    let state = x2apic(m.long_state());
    m.vcpu.set_state(&state).unwrap();
    let (partition, clock, stop) = (m.partition.clone(), m.clock.clone(), m.io.stop.clone());
    let mover = std::thread::spawn(move || {
        while !stop.is_set() {
            std::thread::sleep(Duration::from_millis(2));
            clock.advance(100_000);
            partition.kick(0);
        }
    });
    m.run();
    mover.join().unwrap();
    assert_eq!(m.events().len(), 3);
}

struct Pic;
impl ExtIntSource for Pic {
    fn acknowledge(&self) -> u8 {
        0x28
    }
}

#[test]
fn legacy_interrupts_pass_lint0_only_as_extint() {
    for (lvt, vector) in [(0x700u32, Some(0x28u64)), (0x1_0700, None), (0x0_0055, Some(0x55))] {
        let mut m = Machine::with_extint(Arc::new(Pic));
        m.long_surroundings();
        let at = STUBS + 0x4000;
        m.assemble_at(64, at, exit);
        m.continue_at(0x28, at);
        m.continue_at(0x55, at);
        m.assemble_at(64, CODE, |a| {
            a.sti()?;
            a.nop()?;
            a.nop()?;
            exit(a)
        });
        let mut state = enable_apic(m.long_state());
        state.lapic.registers[0x350..0x354].copy_from_slice(&lvt.to_le_bytes());
        m.vcpu.set_state(&state).unwrap();
        m.partition.extint_sink().set_extint(true);
        m.run();
        assert_eq!(m.events().first().map(|e| e.vector), vector, "LVT {lvt:#x}");
    }
}

#[test]
fn halted_processor_without_interrupts_wakes_for_nmi_and_stop_only() {
    let mut m = Machine::new();
    m.long_surroundings();
    m.assemble_at(64, CODE, |a| {
        a.cli()?;
        a.hlt()
    });
    let state = enable_apic(m.long_state());
    m.vcpu.set_state(&state).unwrap();
    let (partition, stop) = (m.partition.clone(), m.io.stop.clone());
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(10));
        partition.msi_sink().signal_msi(msi(0, 0x41));
        std::thread::sleep(Duration::from_millis(10));
        stop.set();
        partition.kick(0);
    });
    assert_eq!(m.run(), HaltReason::Stopped);
    other.join().unwrap();
    assert_eq!((m.vectors(), m.vcpu.state().activity), (vec![], Activity::Halted));
    m.partition.inject_nmi(0);
    m.run();
    assert_eq!((m.vectors(), m.exit_code()), (vec![(2, 0)], 0xee));
    assert_eq!(m.events()[0].rip, CODE + 2, "after HLT");
    let _ = m.io.exit.load(Ordering::SeqCst);
}
