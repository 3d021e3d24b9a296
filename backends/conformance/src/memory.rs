//! What guest-physical addresses show: ROM, ROM devices, holes, changes while running, and changed code.

use std::time::Duration;

use atoll_machine::backend::{Backend, Vcpu};
use atoll_machine::cpu::state::gpr;
use atoll_machine::memory::RamBlock;
use iced_x86::code_asm::*;

use crate::fixture::{Access, Cells, DEVICE, Machine, ROM};
use crate::payload::{DATA, assemble};

pub(crate) fn rom_ignores_writes<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    machine.rom.write(0x100, &[1, 2, 3, 4, 5, 6, 7, 8]).expect("room in the ROM");
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, ROM + 0x100)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(rbx), -1)?;
        a.lock().inc(dword_ptr(rbx + 4))?;
        a.mov(rcx, qword_ptr(rbx))?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let value = 0x0807_0605_0403_0201;
    assert_eq!((state.gpr[gpr::RAX], state.gpr[gpr::RCX]), (value, value));
}

pub(crate) fn rom_device_takes_writes<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let flash = RamBlock::new_shared("conformance-flash", 0x2000).expect("flash");
    flash.write(0x10, &[0x5a; 8]).expect("room in the flash");
    let cells = Cells::new(0x2000, 0);
    let device = cells.clone();
    machine.memory.map_rom_device(DEVICE, &flash, 0, 0x2000, device, 0).expect("mapping flash");
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(rax, qword_ptr(rbx + 0x10))?;
        a.mov(word_ptr(rbx + 0x10), 0x98u32)?;
        a.mov(rcx, qword_ptr(rbx + 0x10))?;
        a.mov(byte_ptr(rbx + 0x1004), 0x70u32)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!(cells.take_log(), [Access::Write(0x10, vec![0x98, 0]), Access::Write(0x1004, vec![0x70])]);
    assert_eq!((state.gpr[gpr::RAX], state.gpr[gpr::RCX]), (0x5a5a_5a5a_5a5a_5a5a, 0x5a5a_5a5a_5a5a_5a5a));
}

pub(crate) fn unmapped_reads_are_all_ones<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE + 0x10_0000)?;
        a.mov(qword_ptr(rbx), 0)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.xor(ecx, ecx)?;
        a.mov(cl, byte_ptr(rbx + 3))?;
        a.movdqu(xmm0, xmmword_ptr(rbx))?;
        a.movdqu(xmmword_ptr(DATA), xmm0)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!((state.gpr[gpr::RAX], state.gpr[gpr::RCX]), (u64::MAX, 0xff));
    assert_eq!((machine.u64_at(DATA), machine.u64_at(DATA + 8)), (u64::MAX, u64::MAX));
}

pub(crate) fn region_mapped_while_running_is_seen<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let extra = RamBlock::new_shared("conformance-extra", 0x1000).expect("RAM");
    extra.write(0, &0xfeed_u32.to_le_bytes()).expect("room in the block");
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        a.mov(rbx, DEVICE)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.mov(ecx, eax)?;
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.cmp(eax, 0xfeed)?;
        a.jne(again)?;
        a.mov(dword_ptr(rbx + 4), 0xcafe)?;
        a.exit()?;
        Ok(vec![])
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            machine.memory.map_ram(DEVICE, &extra, 0, 0x1000, 0).expect("mapping RAM");
        });
        let state = machine.finish(&mut guest);
        assert_eq!(state.gpr[gpr::RCX], 0xffff_ffff, "nothing was there at first");
    });
    let mut bytes = [0; 4];
    extra.read(4, &mut bytes).expect("the block");
    assert_eq!(u32::from_le_bytes(bytes), 0xcafe);
}

pub(crate) fn region_moved_away_is_gone<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let extra = RamBlock::new_shared("conformance-extra", 0x1000).expect("RAM");
    extra.write(0, &1u32.to_le_bytes()).expect("room in the block");
    let id = machine.memory.map_ram(DEVICE, &extra, 0, 0x1000, 0).expect("mapping RAM");
    let memory = machine.memory.clone();
    machine.on_hook(move |_, _, _| {
        memory.relocate(id, DEVICE + 0x4000);
    });
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(ecx, dword_ptr(rbx))?;
        a.hook(0xe0, 0)?;
        a.mov(edx, dword_ptr(rbx))?;
        a.mov(esi, dword_ptr(rbx + 0x4000))?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let seen = [state.gpr[gpr::RCX], state.gpr[gpr::RDX], state.gpr[gpr::RSI]];
    assert_eq!(seen, [1, 0xffff_ffff, 1], "the move is seen by the next instruction");
}

/// A function that returns 1 in EAX, with the 1 in the byte after the opcode.
fn one(at: u64) -> Vec<u8> {
    assemble(64, at, |a| {
        a.mov(eax, 1u32)?;
        a.ret()
    })
}

pub(crate) fn code_changed_by_the_guest_runs_changed<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    machine.write(DATA, &one(DATA));
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(ecx, 200u32)?;
        a.set_label(&mut again)?;
        a.mov(rdx, DATA)?;
        a.call(rdx)?;
        a.add(rbx, rax)?;
        a.inc(byte_ptr(rdx + 1))?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!(state.gpr[gpr::RBX], (1..=200).sum::<u64>());
}

pub(crate) fn code_changed_by_a_device_runs_changed<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    machine.write(DATA, &one(DATA));
    let memory = machine.memory.clone();
    machine.on_hook(move |_, _, value| {
        memory.write(DATA + 1, &[value as u8]).expect("RAM");
    });
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(ecx, 100u32)?;
        a.mov(rdx, DATA)?;
        a.set_label(&mut again)?;
        a.mov(eax, ecx)?;
        a.out(0xe0, al)?;
        a.call(rdx)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    assert_eq!(state.gpr[gpr::RBX], (1..=100).sum::<u64>());
    assert!(guest.state().gpr == state.gpr, "a state can be read twice");
}
