//! Two processors: start-up, interrupts between them, shoot-downs.

use std::sync::Arc;
use std::time::Duration;

use atoll_machine::backend::{HaltReason, Partition, Vcpu};
use atoll_machine::cpu::model::Vendor;
use atoll_machine::cpu::state::{Activity, CpuState};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::*;

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

fn x2apic(mut state: CpuState) -> CpuState {
    state.lapic.apic_base = 0xfee0_0d00;
    enable_apic(state)
}

/// Runs the boot processor from `state` and the second one from power-on, until the guest exits.
fn run_two(m: &mut Machine, state: &CpuState) -> Activity {
    m.vcpu.set_state(state).unwrap();
    let mut second = m.partition.create_vcpu(1).unwrap();
    let io = Arc::new(Io { stop: m.io.stop.clone(), ..Io::default() });
    let partition = m.partition.clone();
    let other = {
        let io = io.clone();
        std::thread::spawn(move || {
            let reason = second.run(&io.stop.clone(), &*io).unwrap();
            (reason, second.state().activity)
        })
    };
    m.run();
    m.io.stop.set();
    partition.kick(1);
    let (reason, activity) = other.join().unwrap();
    assert_eq!(reason, HaltReason::Stopped);
    m.io.log.lock().unwrap().extend(io.log.lock().unwrap().iter());
    activity
}

/// Waits until the byte at `address` is `value`.
fn wait_for(a: &mut CodeAssembler, address: u64, value: i32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(byte_ptr(address), value)?;
    a.jne(again)
}

#[test]
fn init_and_sipi_start_a_processor_in_real_mode() {
    let mut m = Machine::with(Vendor::Intel, 2);
    m.long_surroundings();
    // The trampoline at 0xd000: reports CS and its APIC id.
    m.assemble_at(16, 0xd000, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, eax)?;
        a.mov(ax, cs)?;
        a.mov(word_ptr(0x6000), ax)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.shr(ebx, 24)?;
        a.mov(dword_ptr(0x6004), ebx)?;
        a.mov(byte_ptr(0x6008), 1)?;
        let mut stop = a.create_label();
        a.set_label(&mut stop)?;
        a.hlt()?;
        a.jmp(stop)
    });
    m.assemble_at(64, CODE, |a| {
        wrmsr(a, 0x830, 1 << 32 | 0xc500)?; // INIT, assert, level
        wrmsr(a, 0x830, 1 << 32 | 0x8500)?; // de-assert: nothing
        wrmsr(a, 0x830, 1 << 32 | 0x60d)?; // SIPI
        wrmsr(a, 0x830, 1 << 32 | 0x60d)?; // the second one is ignored
        wait_for(a, 0x6008, 1)?;
        exit(a)
    });
    let state = x2apic(m.long_state());
    run_two(&mut m, &state);
    assert_eq!((m.read16(0x6000), m.read32(0x6004)), (0xd00, 1));
}

#[test]
fn init_stops_a_running_processor_until_the_next_sipi() {
    let mut m = Machine::with(Vendor::Intel, 2);
    m.long_surroundings();
    m.assemble_at(16, 0xd000, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, eax)?;
        a.inc(byte_ptr(0x6008))?;
        let mut busy = a.create_label();
        a.set_label(&mut busy)?;
        a.jmp(busy)
    });
    m.assemble_at(64, CODE, |a| {
        wrmsr(a, 0x830, 1 << 32 | 0x60d)?;
        wait_for(a, 0x6008, 1)?;
        wrmsr(a, 0x830, 1 << 32 | 0x4500)?;
        wrmsr(a, 0x830, 1 << 32 | 0x60d)?;
        wait_for(a, 0x6008, 2)?;
        wrmsr(a, 0x830, 1 << 32 | 0x4500)?;
        exit(a)
    });
    let state = x2apic(m.long_state());
    let activity = run_two(&mut m, &state);
    assert_eq!(m.read32(0x6008) & 0xff, 2);
    assert!(matches!(activity, Activity::WaitForSipi | Activity::Active), "{activity:?}");
}

#[test]
fn interrupts_cross_by_physical_logical_and_shorthand_destinations() {
    // (ICR, arrives)
    for (icr, expected) in [
        (1u64 << 32 | 0x41, true),
        (2 << 32 | 0x841, true),  // logical: x2APIC cluster 0, bit 1
        (1 << 32 | 0x841, false), // logical: bit 0 is the sender
        (0xc_0041, true),         // all but self
        (2 << 32 | 0x941, true),  // lowest priority
        (1 << 32 | 0x402, true),  // NMI
        (5 << 32 | 0x41, false),  // nobody
    ] {
        let mut m = Machine::with(Vendor::Intel, 2);
        m.long_surroundings();
        let at = STUBS + 0x4000;
        m.assemble_at(64, at, |a| {
            a.mov(byte_ptr(0x6009), 1)?;
            a.iretq()
        });
        m.continue_at(0x41, at);
        m.continue_at(2, at);
        m.assemble_at(64, USER_CODE, |a| {
            a.mov(byte_ptr(0x6008), 1)?;
            a.sti()?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.hlt()?;
            a.jmp(again)
        });
        m.assemble_at(64, CODE, |a| {
            wait_for(a, 0x6008, 1)?;
            wrmsr(a, 0x830, icr)?;
            if expected {
                wait_for(a, 0x6009, 1)?;
            } else {
                a.mov(ecx, 200_000)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.dec(ecx)?;
                a.jne(again)?;
            }
            exit(a)
        });
        let first = x2apic(m.long_state());
        let mut second_state = first.clone();
        second_state.rip = USER_CODE;
        second_state.gpr[4] = IST_STACK;
        second_state.lapic.apic_base = 0xfee0_0c00;
        let mut second = m.partition.create_vcpu(1).unwrap();
        second.set_state(&second_state).unwrap();
        m.vcpu.set_state(&first).unwrap();
        let stop = m.io.stop.clone();
        stop.clear();
        let io = Io { stop: stop.clone(), ..Io::default() };
        let partition = m.partition.clone();
        let other = std::thread::spawn(move || second.run(&stop, &io).unwrap());
        m.vcpu.run(&m.io.stop.clone(), &m.io).unwrap();
        partition.kick(1);
        other.join().unwrap();
        assert_eq!(m.read32(0x6009) & 0xff, u32::from(expected), "ICR {icr:#x}");
    }
}

#[test]
fn locked_increments_of_two_processors_are_not_lost() {
    let mut m = Machine::with(Vendor::Intel, 2);
    m.long_surroundings();
    m.assemble_at(16, 0xd000, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, eax)?;
        a.mov(ecx, 100_000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(0x6000))?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(byte_ptr(0x6008), 1)?;
        let mut stop = a.create_label();
        a.set_label(&mut stop)?;
        a.hlt()?;
        a.jmp(stop)
    });
    m.assemble_at(64, CODE, |a| {
        wrmsr(a, 0x830, 1 << 32 | 0x60d)?;
        a.mov(ecx, 100_000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(0x6000))?;
        a.dec(ecx)?;
        a.jne(again)?;
        wait_for(a, 0x6008, 1)?;
        exit(a)
    });
    let state = x2apic(m.long_state());
    run_two(&mut m, &state);
    assert_eq!(m.read32(0x6000), 200_000);
}

#[test]
fn stop_and_kick_end_a_busy_and_a_waiting_processor() {
    let mut m = Machine::with(Vendor::Intel, 2);
    m.long_surroundings();
    m.assemble_at(64, CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    let state = m.long_state();
    m.vcpu.set_state(&state).unwrap();
    let (stop, partition) = (m.io.stop.clone(), m.partition.clone());
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        stop.set();
        partition.kick(0);
    });
    assert_eq!(m.run(), HaltReason::Stopped);
    other.join().unwrap();
}
