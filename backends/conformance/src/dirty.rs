//! Dirty logs see what guest code writes, page-table updates included, and miss nothing.
//!
//! A processor's nested paging may report more than was written: the walk of a guest's page tables counts as a write
//! of the tables (AMD APM vol. 2, 15.25; Intel SDM vol. 3, accessed and dirty flags for EPT), and a page may be
//! mapped writable, and so reported, when it is first read. A page that is not used is never reported, and one
//! that is only read not again. Backends that count instructions have no such excuse.

use std::collections::BTreeSet;

use atoll_machine::backend::{Backend, Partition};
use iced_x86::code_asm::*;

use crate::fixture::{Machine, RAM_SIZE};
use crate::payload::{CODE, DATA};
use crate::registers::Random;

/// The pages of `log` that were written, as numbers.
fn pages(log: &mut atoll_machine::memory::DirtyReader) -> Vec<u64> {
    log.take().iter().collect()
}

/// The tables of [`crate::payload`], which every program's walks use.
const TABLES: std::ops::Range<u64> = 1..5;

/// `seen` without what the backend may report besides `written`: the page tables, and `read`.
fn excused<B: Backend>(
    machine: &Machine<B::Partition>,
    seen: &[u64],
    written: &[u64],
    read: &[u64],
) -> Vec<u64> {
    let exact = machine.partition.counting().is_some();
    let excuse = |page: &u64| !exact && (TABLES.contains(page) || read.contains(page));
    seen.iter().copied().filter(|page| written.contains(page) || !excuse(page)).collect()
}

pub(crate) fn two_readers_see_exactly_the_pages_written<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let page = |address: u64| address / 4096;
    let mut guest = machine.long(0, |a| {
        for round in 0..2 {
            a.mov(byte_ptr(DATA + 0x1000), 1u32)?;
            a.mov(qword_ptr(DATA + 0x4ffc), 2)?;
            a.lock().inc(dword_ptr(DATA + 0x8000))?;
            a.movups(xmmword_ptr(DATA + 0xa010), xmm0)?;
            a.mov(rdi, DATA + 0x10ff0)?;
            a.mov(ecx, 0x20u32)?;
            a.rep().stosb()?;
            a.mov(rax, qword_ptr(DATA + 0x20000))?;
            a.hook(0xe0, round)?;
        }
        a.exit()?;
        Ok(vec![])
    });
    let expected: Vec<u64> =
        [0x1000, 0x4000, 0x5000, 0x8000, 0xa000, 0x10000, 0x11000].map(|o| page(DATA + o)).to_vec();
    let first = std::sync::Arc::new(std::sync::Mutex::new(machine.ram.dirty_log()));
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let (log, rounds) = (first.clone(), seen.clone());
    machine.on_hook(move |_, _, _| {
        let dirty = pages(&mut log.lock().expect("no panic"));
        rounds.lock().expect("no panic").push(dirty);
    });
    let mut second = machine.ram.dirty_log();
    machine.finish(&mut guest);
    let read = [page(CODE), page(DATA + 0x20000)];
    let excused = |seen: &[u64], read: &[u64]| excused::<B>(&machine, seen, &expected, read);
    let rounds = seen.lock().expect("no panic").clone();
    assert_eq!(rounds.len(), 2);
    assert_eq!(excused(&rounds[0], &read), expected);
    assert_eq!(excused(&rounds[1], &[]), expected, "re-armed after a take, and nothing that is only read");
    assert_eq!(excused(&pages(&mut second), &read), expected, "a reader of its own");
    assert_eq!(pages(&mut second), [0u64; 0]);
    let rest = pages(&mut first.lock().expect("no panic"));
    assert_eq!(excused(&rest, &[]), [0u64; 0]);
}

pub(crate) fn page_table_updates_are_seen<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    // Linear 8 MiB: a table at DATA + 0x8000 with two pages, accessed and dirty clear.
    let table = DATA + 0x8000;
    machine.write(0x3000 + 4 * 8, &(table | 3).to_le_bytes());
    machine.write(table, &(DATA | 3).to_le_bytes());
    machine.write(table + 8, &((DATA + 0x1000) | 3).to_le_bytes());
    let mut guest = machine.long(0, |a| {
        a.mov(rax, qword_ptr(0x80_0000))?;
        a.hook(0xe0, 0)?;
        a.mov(rax, qword_ptr(0x80_0000))?;
        a.hook(0xe0, 0)?;
        a.mov(qword_ptr(0x80_0000), 5)?;
        a.hook(0xe0, 0)?;
        a.exit()?;
        Ok(vec![])
    });
    let log = std::sync::Mutex::new(machine.ram.dirty_log());
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let rounds = seen.clone();
    machine.on_hook(move |_, _, _| {
        let dirty = pages(&mut log.lock().expect("no panic"));
        rounds.lock().expect("no panic").push(dirty);
    });
    machine.finish(&mut guest);
    let expected = [vec![3, table / 4096], vec![], vec![DATA / 4096, table / 4096]];
    let read = [CODE / 4096, DATA / 4096, table / 4096];
    let seen = seen.lock().expect("no panic").clone();
    let excused: Vec<_> = seen
        .iter()
        .zip(&expected)
        .map(|(seen, written)| excused::<B>(&machine, seen, written, &read))
        .collect();
    assert_eq!(excused, expected);
    assert_eq!(machine.u64_at(0x3000 + 4 * 8), table | 0x23, "accessed");
    assert_eq!(machine.u64_at(table), DATA | 0x63, "accessed and dirty");
    assert_eq!(machine.u64_at(table + 8), (DATA + 0x1000) | 3, "not touched");
}

/// A copy kept up to date from the log alone equals RAM at the end, while two vCPUs write.
pub(crate) fn log_is_complete_while_another_vcpu_writes<B: Backend>(backend: &B) {
    const SPAN: u64 = 128;
    const STOP: u64 = DATA + SPAN * 4096;
    const ROUNDS: u32 = 100;
    let machine = Machine::new(backend, 2);
    let program = |a: &mut crate::payload::Payload| {
        let mut again = a.create_label();
        let seed = 0x1234_5671 + a.index;
        a.mov(ebx, seed)?;
        a.mov(ecx, 1u32)?;
        a.set_label(&mut again)?;
        // A random page, a random quadword in it.
        a.imul_3(ebx, ebx, 0x0019_660d)?;
        a.add(ebx, 0x3c6e_f35f)?;
        a.mov(eax, ebx)?;
        a.shr(eax, 10)?;
        a.and(eax, (SPAN * 4096 - 8) as i32)?;
        a.add(qword_ptr(rax + DATA), rcx)?;
        a.inc(ecx)?;
        a.cmp(byte_ptr(STOP), 0)?;
        a.je(again)?;
        a.exit()?;
        Ok(vec![])
    };
    let mut guests: Vec<_> = (0..2).map(|index| machine.long(index, program)).collect();
    let mut copy = vec![0; RAM_SIZE as usize];
    let mut log = machine.ram.dirty_log();
    machine.ram.read(0, &mut copy).expect("RAM");
    let mut update = |copy: &mut [u8]| {
        let dirty: BTreeSet<u64> = pages(&mut log).into_iter().collect();
        for page in &dirty {
            let at = (page * 4096) as usize;
            machine.ram.read(page * 4096, &mut copy[at..at + 4096]).expect("RAM");
        }
        dirty.len()
    };
    let mut random = Random(5);
    std::thread::scope(|scope| {
        let machine = &machine;
        let running: Vec<_> =
            guests.iter_mut().map(|guest| scope.spawn(move || machine.finish(guest))).collect();
        for _ in 0..ROUNDS {
            update(&mut copy);
            std::thread::sleep(std::time::Duration::from_micros(random.below(300)));
        }
        assert!(running.iter().all(|thread| !thread.is_finished()), "they write until they are told to stop");
        machine.write(STOP, &[1]);
    });
    update(&mut copy);
    let mut now = vec![0; RAM_SIZE as usize];
    machine.ram.read(0, &mut now).expect("RAM");
    let lost = (0..RAM_SIZE / 4096).find(|p| {
        let at = (p * 4096) as usize;
        copy[at..at + 4096] != now[at..at + 4096]
    });
    assert_eq!(lost, None, "a page that changed was in no result of {ROUNDS}");
}
