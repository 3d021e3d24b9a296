//! How many guest instructions the interpreter executes per second of host processor time, on four small 64-bit
//! loops, and how fast REP MOVSB copies.
//!
//! `cargo run --release -p atoll-cpu-software --example mips`

use atoll_cpu_software::execute::{Leave, run};
use atoll_cpu_software::test_support::{DATA, Machine};
use atoll_machine::cpu::state::gpr;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

fn measure(name: &str, instructions: u64, assemble: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut a = CodeAssembler::new(64).expect("assembler");
    assemble(&mut a).expect("assemble");
    let code = a.assemble(atoll_cpu_software::test_support::CODE).expect("encode");
    let mut machine = Machine::long(64);
    machine.load_code(&code);
    machine.cpu.gpr[gpr::RBX] = DATA;
    machine.cpu.budget_end = instructions;
    let start = cpu_seconds();
    loop {
        match run(&mut machine.cpu, &machine.io) {
            Leave::Events => {}
            Leave::Budget => break,
            other => panic!("{name}: {other:?} at {:#x}", machine.cpu.rip),
        }
    }
    let seconds = cpu_seconds() - start;
    println!("{name:<12} {:8.1} M instructions/s", machine.cpu.retired as f64 / seconds / 1e6);
}

/// Processor time of this thread, so that a busy host does not count.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn main() {
    let n = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(200_000_000);
    measure("alu", n, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.add(rax, 1)?;
        a.lea(rcx, qword_ptr(rax + rdx * 4))?;
        a.xor(edx, ecx)?;
        a.shl(rdx, 3)?;
        a.sub(rsi, rdx)?;
        a.and(edi, 0xff)?;
        a.imul_3(r8, rsi, 7)?;
        a.cmp(rax, -1)?;
        a.jne(again)
    });
    measure("memory", n, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.add(rax, qword_ptr(rbx + 8))?;
        a.mov(qword_ptr(rbx + 16), rax)?;
        a.add(dword_ptr(rbx + 24), 1)?;
        a.movzx(ecx, byte_ptr(rbx + rdx + 32))?;
        a.mov(byte_ptr(rbx + rdx + 40), cl)?;
        a.inc(rdx)?;
        a.and(edx, 7)?;
        a.jmp(again)
    });
    measure("call", n, |a| {
        let mut again = a.create_label();
        let mut function = a.create_label();
        a.set_label(&mut again)?;
        a.call(function)?;
        a.test(rax, rax)?;
        a.jne(again)?;
        a.jmp(again)?;
        a.set_label(&mut function)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.inc(rax)?;
        a.pop(rbp)?;
        a.ret()
    });
    measure("branches", n, |a| {
        // A linear congruential generator decides which way to go.
        let mut again = a.create_label();
        let mut odd = a.create_label();
        let mut next = a.create_label();
        a.set_label(&mut again)?;
        a.imul_3(eax, eax, 1_103_515_245)?;
        a.add(eax, 12345)?;
        a.test(eax, 0x10000)?;
        a.jne(odd)?;
        a.add(rcx, 1)?;
        a.jmp(next)?;
        a.set_label(&mut odd)?;
        a.add(rdx, 1)?;
        a.set_label(&mut next)?;
        a.test(eax, 0x20000)?;
        a.je(again)?;
        a.add(rsi, 1)?;
        a.jmp(again)
    });
    copy();
}

/// REP MOVSB of 1 MiB, in bytes per second.
fn copy() {
    let mut machine = Machine::long(64);
    let mut a = CodeAssembler::new(64).expect("assembler");
    let build = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsi, 0x20_0000u64)?;
        a.mov(rdi, 0x40_0000u64)?;
        a.mov(ecx, 0x10_0000)?;
        a.rep().movsb()?;
        a.jmp(again)
    };
    build(&mut a).expect("assemble");
    let code = a.assemble(atoll_cpu_software::test_support::CODE).expect("encode");
    machine.load_code(&code);
    machine.cpu.budget_end = 5 * 1000;
    let start = cpu_seconds();
    while run(&mut machine.cpu, &machine.io) == Leave::Events {}
    println!("{:<12} {:8.1} MiB/s", "rep movsb", 1000.0 / (cpu_seconds() - start));
}
