//! Port and memory-mapped access: which accesses leave a vCPU, how wide, in which order, with which data.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use atoll_machine::backend::{Backend, HaltReason, Partition, Vcpu};
use atoll_machine::bus::MmioDevice;
use atoll_machine::cpu::state::gpr;
use iced_x86::code_asm::*;

use crate::fixture::{Access, Cells, DEVICE, Machine, port_answer};
use crate::payload::DATA;

pub(crate) fn port_widths_reach_the_board_in_order<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(edx, 0x1f0u32)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.out(0x60, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.mov(rax, u64::MAX)?;
        a.in_(al, 0x61)?;
        a.mov(rbx, rax)?;
        a.mov(rax, u64::MAX)?;
        a.in_(ax, dx)?;
        a.mov(rcx, rax)?;
        a.mov(rax, u64::MAX)?;
        a.in_(eax, dx)?;
        a.mov(rsi, rax)?;
        a.mov(edx, 0xffffu32)?;
        a.out(dx, al)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let expected = [
        Access::PortWrite(0x60, vec![0x88]),
        Access::PortWrite(0x1f0, vec![0x88, 0x77]),
        Access::PortWrite(0x1f0, vec![0x88, 0x77, 0x66, 0x55]),
        Access::PortRead(0x61, 1),
        Access::PortRead(0x1f0, 2),
        Access::PortRead(0x1f0, 4),
        Access::PortWrite(0xffff, vec![port_answer(2, 0x1f0, 1)[0]]),
    ];
    assert_eq!(machine.take_log(), expected);
    let word = u16::from_le_bytes([port_answer(1, 0x1f0, 2)[0], port_answer(1, 0x1f0, 2)[1]]);
    let mut double = [0; 4];
    double.copy_from_slice(&port_answer(2, 0x1f0, 4));
    assert_eq!(state.gpr[gpr::RBX], u64::MAX << 8 | u64::from(port_answer(0, 0x61, 1)[0]), "AL alone");
    assert_eq!(state.gpr[gpr::RCX], u64::MAX << 16 | u64::from(word), "AX alone");
    assert_eq!(state.gpr[gpr::RSI], u64::from(u32::from_le_bytes(double)), "EAX zero-extends");
}

pub(crate) fn string_output_and_input_keep_order<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    machine.write(DATA, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let mut guest = machine.long(0, |a| {
        a.mov(edx, 0x3f8u32)?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 3u32)?;
        a.rep().outsb()?;
        a.outsd()?;
        a.mov(rdi, DATA + 0x100)?;
        a.mov(ecx, 5u32)?;
        a.rep().insw()?;
        a.std()?;
        a.insb()?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let mut expected: Vec<Access> = (1..=3).map(|b| Access::PortWrite(0x3f8, vec![b])).collect();
    expected.push(Access::PortWrite(0x3f8, vec![4, 5, 6, 7]));
    expected.extend((0..5).map(|_| Access::PortRead(0x3f8, 2)));
    expected.push(Access::PortRead(0x3f8, 1));
    assert_eq!(machine.take_log(), expected);
    let mut memory = vec![0; 11];
    machine.ram.read(DATA + 0x100, &mut memory).expect("RAM");
    let answers: Vec<u8> =
        (0..5).flat_map(|i| port_answer(i, 0x3f8, 2)).chain(port_answer(5, 0x3f8, 1)).collect();
    assert_eq!(memory, answers);
    assert_eq!(state.gpr[gpr::RSI], DATA + 7);
    assert_eq!(state.gpr[gpr::RDI], DATA + 0x109);
    assert_eq!(state.gpr[gpr::RCX], 0);
}

pub(crate) fn port_access_in_real_mode<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.real(0, |a| {
        a.mov(dx, 0x70u32)?;
        a.mov(eax, 0xa1b2_c3d4u32)?;
        a.out(dx, eax)?;
        a.in_(ax, dx)?;
        a.mov(word_ptr(0x500), ax)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    let expected = [Access::PortWrite(0x70, vec![0xd4, 0xc3, 0xb2, 0xa1]), Access::PortRead(0x70, 2)];
    assert_eq!(machine.take_log(), expected);
    assert_eq!(machine.u64_at(0x500).to_le_bytes()[..2], port_answer(0, 0x70, 2));
}

/// A machine with `pages` pages of device cells at [`DEVICE`].
fn with_cells<B: Backend>(backend: &B, pages: usize) -> (Machine<B::Partition>, std::sync::Arc<Cells>) {
    let machine = Machine::new(backend, 1);
    let cells = Cells::new(pages * 4096, 0x40);
    let len = pages as u64 * 4096;
    machine.memory.map_mmio(DEVICE, len, cells.clone(), 0).expect("mapping a device");
    (machine, cells)
}

/// Accesses as single bytes, so that a backend may carry a wide one in pieces of 8 bytes.
fn bytes_of(log: &[Access]) -> Vec<(bool, u64, Option<u8>)> {
    let mut bytes = Vec::new();
    for access in log {
        match access {
            Access::Read(at, len) => bytes.extend((0..*len as u64).map(|i| (false, at + i, None))),
            Access::Write(at, data) => {
                bytes.extend(data.iter().enumerate().map(|(i, b)| (true, at + i as u64, Some(*b))));
            }
            other => panic!("{other:?} is no memory access"),
        }
    }
    bytes
}

pub(crate) fn mmio_widths_arrive_whole<B: Backend>(backend: &B) {
    let (machine, cells) = with_cells(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(byte_ptr(rbx), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.movzx(ecx, byte_ptr(rbx + 0x11))?;
        a.movzx(edx, word_ptr(rbx + 0x12))?;
        a.mov(esi, dword_ptr(rbx + 0x14))?;
        a.mov(rdi, qword_ptr(rbx + 0x18))?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let log = cells.take_log();
    let value = 0x1122_3344_5566_7788u64.to_le_bytes();
    let narrow = [
        Access::Write(0, value[..1].to_vec()),
        Access::Write(2, value[..2].to_vec()),
        Access::Write(4, value[..4].to_vec()),
        Access::Write(8, value.to_vec()),
        Access::Read(0x11, 1),
        Access::Read(0x12, 2),
        Access::Read(0x14, 4),
        Access::Read(0x18, 8),
    ];
    assert_eq!(log, narrow);
    let seen = [state.gpr[gpr::RCX], state.gpr[gpr::RDX], state.gpr[gpr::RSI], state.gpr[gpr::RDI]];
    assert_eq!(seen, [0x51, 0x5352, 0x5756_5554, 0x5f5e_5d5c_5b5a_5958]);
}

pub(crate) fn mmio_of_16_bytes_arrives<B: Backend>(backend: &B) {
    let (machine, cells) = with_cells(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.movdqu(xmm0, xmmword_ptr(rbx + 0x20))?;
        a.movdqu(xmmword_ptr(rbx + 0x30), xmm0)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    let wide = [Access::Read(0x20, 16), Access::Write(0x30, ramp(0x20, 16))];
    assert_eq!(bytes_of(&cells.take_log()), bytes_of(&wide));
    assert_eq!(cells.bytes()[0x30..0x40], ramp(0x20, 16));
}

pub(crate) fn mmio_of_32_bytes_arrives<B: Backend>(backend: &B) {
    let (machine, cells) = with_cells(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.vmovdqu(ymm1, ymmword_ptr(rbx + 0x40))?;
        a.vmovdqu(ymmword_ptr(rbx + 0x80), ymm1)?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    let wide = [Access::Read(0x40, 32), Access::Write(0x80, ramp(0x40, 32))];
    assert_eq!(bytes_of(&cells.take_log()), bytes_of(&wide));
    assert_eq!(cells.bytes()[0x80..0xa0], ramp(0x40, 32));
}

/// Calls a function at each read; reads as zero but for the count of reads in its low byte.
struct Alarm {
    at: u32,
    reads: AtomicU32,
    alarm: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl MmioDevice for Alarm {
    fn mmio_read(&self, _offset: u64, data: &mut [u8]) {
        let count = self.reads.fetch_add(1, Ordering::SeqCst) + 1;
        data.fill(0);
        data[0] = count as u8;
        if count == self.at
            && let Some(alarm) = self.alarm.get()
        {
            alarm();
        }
    }
    fn mmio_write(&self, _offset: u64, _data: &[u8]) {}
}

/// A machine whose device at [`DEVICE`] stops vCPU 0 at read number `at`.
fn with_alarm<B: Backend>(backend: &B, at: u32) -> Machine<B::Partition> {
    let machine = Machine::new(backend, 1);
    let alarm = Arc::new(Alarm { at, reads: AtomicU32::new(0), alarm: OnceLock::new() });
    machine.memory.map_mmio(DEVICE, 4096, alarm.clone(), 0).expect("mapping a device");
    let (stop, partition) = (machine.stop_flag(0).clone(), Arc::downgrade(&machine.partition));
    let ring = move || {
        stop.set();
        if let Some(partition) = partition.upgrade() {
            partition.kick(0);
        }
    };
    let _ = alarm.alarm.set(Box::new(ring));
    machine
}

pub(crate) fn a_stop_during_an_access_leaves_a_boundary<B: Backend>(backend: &B) {
    let machine = with_alarm(backend, 1);
    let mut guest = machine.long(0, |a| {
        let mut after = a.create_label();
        a.mov(rbx, DEVICE)?;
        a.mov(rax, -1i64 as u64)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.set_label(&mut after)?;
        a.mov(rcx, rax)?;
        a.exit()?;
        Ok(vec![after])
    });
    assert_eq!(machine.run(&mut guest), HaltReason::Stopped);
    let state = guest.state();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (guest.labels[0], 1), "the access is complete");
    guest.set_state(&state).expect("its own state");
    assert_eq!(machine.finish(&mut guest).gpr[gpr::RCX], 1, "the access is not made again");
}

pub(crate) fn a_stop_during_a_string_access_leaves_an_element_boundary<B: Backend>(backend: &B) {
    for at in 1..=3 {
        let machine = with_alarm(backend, at);
        let mut guest = machine.long(0, |a| {
            a.mov(rsi, DEVICE)?;
            a.mov(rdi, DATA)?;
            a.mov(ecx, 5u32)?;
            a.rep().movsb()?;
            a.exit()?;
            Ok(vec![])
        });
        assert_eq!(machine.run(&mut guest), HaltReason::Stopped);
        let state = guest.state();
        let done = state.gpr[gpr::RDI] - DATA;
        assert_eq!(done + state.gpr[gpr::RCX], 5, "stopped at element {at}");
        assert!(done >= u64::from(at), "{done} of {at} elements are in memory");
        guest.set_state(&state).expect("its own state");
        machine.finish(&mut guest);
        assert_eq!(machine.u64_at(DATA), 0x05_0403_0201, "stopped at element {at}: each read once");
    }
}

fn ramp(from: u8, len: u8) -> Vec<u8> {
    (0..len).map(|i| from + 0x40 + i).collect()
}

pub(crate) fn mmio_across_a_page_is_split<B: Backend>(backend: &B) {
    let (machine, cells) = with_cells(backend, 3);
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rbx + 0xffd), rax)?;
        a.mov(rcx, qword_ptr(rbx + 0xffd))?;
        a.mov(edx, dword_ptr(rbx + 0x1ffe))?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    for access in machine.take_log() {
        let (at, len) = match access {
            Access::Read(at, len) => (at, len),
            Access::Write(at, data) => (at, data.len()),
            other => panic!("{other:?} is no memory access"),
        };
        assert!(at % 4096 + len as u64 <= 4096, "an access of {len} bytes at {at:#x} crosses a page");
    }
    assert_eq!(cells.bytes()[0xffd..0x1005], 0x1122_3344_5566_7788u64.to_le_bytes());
    assert_eq!(state.gpr[gpr::RCX], 0x1122_3344_5566_7788);
    assert_eq!(state.gpr[gpr::RDX], 0x4140_3f3e);
}

pub(crate) fn mmio_read_modify_write_reads_once_and_writes_once<B: Backend>(backend: &B) {
    let (machine, cells) = with_cells(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(rbx, DEVICE)?;
        a.add(dword_ptr(rbx), 1)?;
        a.mov(eax, 5u32)?;
        a.xchg(dword_ptr(rbx + 8), eax)?;
        a.mov(ecx, 7u32)?;
        a.lock().xadd(word_ptr(rbx + 0x10), cx)?;
        a.or(byte_ptr(rbx + 0x18), 0x80)?;
        a.exit()?;
        Ok(vec![])
    });
    let state = machine.finish(&mut guest);
    let expected = [
        Access::Read(0, 4),
        Access::Write(0, vec![0x41, 0x41, 0x42, 0x43]),
        Access::Read(8, 4),
        Access::Write(8, vec![5, 0, 0, 0]),
        Access::Read(0x10, 2),
        Access::Write(0x10, vec![0x57, 0x51]),
        Access::Read(0x18, 1),
        Access::Write(0x18, vec![0xd8]),
    ];
    assert_eq!(cells.take_log(), expected);
    assert_eq!((state.gpr[gpr::RAX], state.gpr[gpr::RCX]), (0x4b4a_4948, 0x5150));
}

pub(crate) fn mmio_string_move_accesses_each_element<B: Backend>(backend: &B) {
    let (machine, cells) = with_cells(backend, 1);
    machine.write(DATA, &[9, 8, 7, 6, 5, 4, 3, 2]);
    let mut guest = machine.long(0, |a| {
        a.mov(rsi, DATA)?;
        a.mov(rdi, DEVICE)?;
        a.mov(ecx, 2u32)?;
        a.rep().movsd()?;
        a.mov(rsi, DEVICE + 0x40)?;
        a.mov(rdi, DATA + 0x40)?;
        a.mov(ecx, 4u32)?;
        a.rep().movsw()?;
        a.mov(rdi, DEVICE + 0x80)?;
        a.mov(ecx, 3u32)?;
        a.mov(al, 0xeeu32)?;
        a.rep().stosb()?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    let mut expected = vec![Access::Write(0, vec![9, 8, 7, 6]), Access::Write(4, vec![5, 4, 3, 2])];
    expected.extend((0..4).map(|i| Access::Read(0x40 + i * 2, 2)));
    expected.extend((0..3).map(|i| Access::Write(0x80 + i, vec![0xee])));
    assert_eq!(cells.take_log(), expected);
    assert_eq!(machine.u64_at(DATA + 0x40).to_le_bytes(), [0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87]);
}
