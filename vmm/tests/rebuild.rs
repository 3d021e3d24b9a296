//! A machine that is taken apart and rebuilt from its saved state again and again while its guest runs: the guest
//! counts timer interrupts, prints and computes, and must notice nothing.

use std::io::Write;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_api_types::{Accelerator, VmSpec};
use atoll_vmm::{BackendKind, HostFacts, RunEnd, Vm, VmError, VmHandle, VmOutputs, choose};
use iced_x86::code_asm::{AsmMemoryOperand, CodeAssembler};
use iced_x86::code_asm::{ah, al, bl, cl, dword_ptr, dx, eax, ebx, ecx, edi, esi, esp, ptr};

/// Where the image is loaded, its IDT, and its variables.
const BASE: u32 = 0x10_0000;
const IDT: u32 = 0x20_0000;
const TICKS: u32 = 0x20_1000;
const STACK: u32 = 0x30_0000;
/// Timer interrupts that the guest waits for.
const ROUNDS: u32 = 150;
const COM1: u32 = 0x3f8;
const DEBUG_EXIT: u32 = 0xf4;

fn at(address: u32) -> AsmMemoryOperand {
    dword_ptr(u64::from(address))
}

/// Programs PIC, PIT and IDT, then for each timer interrupt prints a letter and mixes a checksum that lives in
/// registers; ends by writing the checksum's low bits to the debug-exit port.
fn program(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    // The call leaves the address of what follows it, the interrupt handler.
    let mut start = a.create_label();
    a.call(start)?;
    a.push(eax)?;
    a.inc(at(TICKS))?;
    a.mov(al, 0x20)?;
    a.out(0x20, al)?;
    a.pop(eax)?;
    // As IRET does but for the flags, which nobody looks at: interrupts come in the wait below only, before its CLI.
    // A KVM without the processor's virtualization behind it cannot carry out IRET in protected mode.
    a.retf_1(4)?;
    a.set_label(&mut start)?;
    a.pop(eax)?;
    a.mov(esp, STACK)?;
    a.mov(ebx, eax)?;
    a.and(ebx, 0xffff)?;
    a.or(ebx, 0x0010_0000)?;
    a.mov(at(IDT + 0x20 * 8), ebx)?;
    a.and(eax, 0xffff_0000u32)?;
    a.or(eax, 0x8e00)?;
    a.mov(at(IDT + 0x20 * 8 + 4), eax)?;
    a.mov(at(IDT + 0x800), 0x07ff | (IDT & 0xffff) << 16)?;
    a.mov(at(IDT + 0x804), IDT >> 16)?;
    a.lidt(ptr(u64::from(IDT + 0x800)))?;
    // PIC: vectors from 0x20, only IRQ 0 open. PIT: mode 2, 200 Hz.
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xfe)] {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    for (port, value) in [(0x43, 0x34), (0x40, 0x4e), (0x40, 0x17)] {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    a.mov(at(TICKS), 0)?;
    a.xor(esi, esi)?;
    a.mov(edi, 0x1234_5678)?;
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.sti()?;
    a.hlt()?;
    a.cli()?;
    a.cmp(at(TICKS), esi)?;
    a.jbe(wait)?;
    a.inc(esi)?;
    // A little computing between interrupts.
    a.mov(ecx, 20_000)?;
    let mut mix = a.create_label();
    a.set_label(&mut mix)?;
    a.imul_3(edi, edi, 1_664_525)?;
    a.add(edi, 1_013_904_223)?;
    a.rol(edi, 7)?;
    a.dec(ecx)?;
    a.jnz(mix)?;
    a.mov(eax, esi)?;
    a.mov(cl, 26)?;
    a.div(cl)?;
    a.mov(bl, ah)?;
    a.add(bl, i32::from(b'a'))?;
    a.mov(al, bl)?;
    a.mov(dx, COM1)?;
    a.out(dx, al)?;
    a.cmp(esi, ROUNDS)?;
    a.jb(wait)?;
    a.mov(eax, edi)?;
    a.and(eax, 0x3f)?;
    a.mov(dx, DEBUG_EXIT)?;
    a.out(dx, al)?;
    let mut end = a.create_label();
    a.set_label(&mut end)?;
    a.hlt()?;
    a.jmp(end)?;
    Ok(())
}

/// A Multiboot 1 image with the address fields of a flat binary (Multiboot specification 0.6.96, 3.1.3).
fn image() -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    program(&mut a).unwrap();
    let code = a.assemble(u64::from(BASE) + 32).unwrap();
    let (magic, flags) = (0x1bad_b002u32, 0x0001_0000u32);
    let words = [magic, flags, magic.wrapping_add(flags).wrapping_neg(), BASE, BASE, 0, 0, BASE + 32];
    let mut image: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    image.extend(code);
    image
}

fn expected() -> (String, u32) {
    let mut sum = 0x1234_5678u32;
    let mut text = String::new();
    for round in 1..=ROUNDS {
        for _ in 0..20_000 {
            sum = sum.wrapping_mul(1_664_525).wrapping_add(1_013_904_223).rotate_left(7);
        }
        text.push((b'a' + (round % 26) as u8) as char);
    }
    (text, sum & 0x3f)
}

/// Runs the guest on `accelerator` and rebuilds its machine all the while: `rebuild` is told how often that was done.
fn run(accelerator: Accelerator, rebuild: impl Fn(&VmHandle, u32) -> Result<u64, VmError>) {
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&image()).unwrap();
    let mut spec = VmSpec::named("rebuild");
    spec.networks = Vec::new();
    spec.boot.kernel = Some(kernel.path().to_owned());
    spec.memory = atoll_api_types::ByteSize(16 << 20);
    spec.debug_exit = true;
    spec.accel = accelerator;
    // A KVM that is software cannot give a named model; this guest needs no more than integers.
    spec.cpu = "host".to_owned();
    let printed = Arc::new(Mutex::new(Vec::new()));
    let sink = printed.clone();
    let (ended, end) = mpsc::channel();
    let handle = Vm::prepare(&spec)
        .unwrap()
        .start(VmOutputs {
            serial: Box::new(move |bytes| sink.lock().unwrap().extend_from_slice(bytes)),
            virtio: Box::new(|_| {}),
            rebooted: Box::new(|| panic!("the guest was reset")),
            event: Box::new(|event| panic!("{event}")),
            ended: Box::new(move |end| drop(ended.send(end))),
        })
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut rebuilds = 0;
    let end = loop {
        match end.recv_timeout(Duration::from_millis(7)) {
            Ok(end) => break end,
            Err(_) => assert!(Instant::now() < deadline, "the guest hangs after {rebuilds} rebuilds"),
        }
        match rebuild(&handle, rebuilds) {
            Ok(size) => {
                assert!(size > 1000, "{size} bytes cannot be a whole machine");
                rebuilds += 1;
            }
            // The run may end between the wait and the rebuild; then there is nothing left to rebuild.
            Err(error) => match end.recv_timeout(Duration::from_millis(200)) {
                Ok(end) => break end,
                Err(_) => panic!("after {rebuilds} rebuilds: {error}"),
            },
        }
    };
    let (text, sum) = expected();
    let printed = String::from_utf8(printed.lock().unwrap().clone()).unwrap();
    assert_eq!((end, printed), (RunEnd::DebugExit(sum), text), "after {rebuilds} rebuilds");
    assert!(rebuilds > 10, "only {rebuilds} rebuilds");
    println!("{rebuilds} rebuilds");
    // A machine has a few tens; other tests of this file have theirs at the same time.
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(
        descriptors < 200,
        "{descriptors} open descriptors after {rebuilds} rebuilds: old machines keep some"
    );
}

/// Whether this host has a `/dev/kvm` that this user may open.
fn has_kvm() -> bool {
    let choice = choose(Accelerator::Kvm, &HostFacts::gather());
    if let Err(error) = &choice {
        println!("skipped: {error}");
    }
    choice.is_ok()
}

#[test]
fn a_guest_does_not_notice_that_its_machine_is_rebuilt_under_it() {
    run(Accelerator::Software, |handle, _| handle.rebuild());
}

#[test]
fn a_guest_on_kvm_does_not_notice_that_its_machine_is_rebuilt_under_it() {
    if has_kvm() {
        run(Accelerator::Kvm, |handle, _| handle.rebuild());
    }
}

#[test]
fn a_guest_does_not_notice_that_it_moves_between_kvm_and_the_software_cpu() {
    if has_kvm() {
        let order = [BackendKind::Software, BackendKind::Kvm];
        run(Accelerator::Kvm, |handle, done| handle.rebuild_on(order[done as usize % 2]));
    }
}
