//! Hardware task switches with 32-bit and 16-bit TSSs (Intel SDM vol. 3, chapter 8).
//!
//! ```text
//! checks in the old task's context ─► save old state ─► busy bits, link, TR, CR0.TS
//!    (faults leave everything as is)                          │  commit: from here on faults belong to
//!                                                             ▼  the new task
//!             T flag ◄─ error code ◄─ segments ◄─ LDT ◄─ CR3, registers
//! ```

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::state::{Segment, gpr, seg};

use super::control;
use super::debug;
use super::descriptor::{Descriptor, fetch, is_null, kind, np, set_type_bits, ss as stack_fault, ts};
use super::memory::{Stack, load, store, table_address};
use super::segments::{check_ldt, null_segment, v8086_segment};
use crate::access::Access;
use crate::cpu::{Cpu, control as bits, flag};
use crate::exception::{Exception, Outcome};

/// What causes a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Switch {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// An interrupt or exception through a task gate.
    Gate,
    /// IRET with NT set.
    Return,
}

/// Offsets inside a TSS.
struct Layout {
    width: u32,
    ip: u64,
    flags: u64,
    registers: u64,
    segments: u64,
    segment_count: usize,
    segment_stride: u64,
    ldt: u64,
    min_limit: u32,
}

const LAYOUT32: Layout = Layout {
    width: 4,
    ip: 0x20,
    flags: 0x24,
    registers: 0x28,
    segments: 0x48,
    segment_count: 6,
    segment_stride: 4,
    ldt: 0x60,
    min_limit: 0x67,
};
const LAYOUT16: Layout = Layout {
    width: 2,
    ip: 0x0e,
    flags: 0x10,
    registers: 0x12,
    segments: 0x22,
    segment_count: 4,
    segment_stride: 2,
    ldt: 0x2a,
    min_limit: 0x2b,
};
const CR3_OFFSET: u64 = 0x1c;
const TRAP_OFFSET: u64 = 0x64;

fn layout(kind: u32) -> &'static Layout {
    if kind & 8 != 0 { &LAYOUT32 } else { &LAYOUT16 }
}

/// The registers that a TSS holds for its task.
struct Image {
    cr3: Option<u32>,
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Switches to the task whose TSS `selector` names. `fault` makes the exception for a selector that names
/// none (#GP, for IRET #TS). An `error_code` is pushed on the new task's stack.
pub(crate) fn switch(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    selector: u16,
    how: Switch,
    error_code: Option<u32>,
    fault: fn(u16) -> Exception,
) -> Outcome {
    let d = find_tss(cpu, io, selector, how, fault)?;
    let new = Segment { attributes: d.attributes() | kind::BUSY, ..d.segment(selector) };
    let image = read_image(cpu, io, &new)?;
    save_old(cpu, io, how)?;
    update_tables(cpu, io, &d, &new, how)?;
    enter(cpu, new, &image, how);
    if let Err(exception) = finish(cpu, io, &image, d.kind(), error_code) {
        // The instruction that switched is over: the fault is the new task's first event.
        cpu.system.pending_fault = Some(exception);
        cpu.recheck = true;
    }
    Ok(())
}

/// What happens in the new task's context.
fn finish(cpu: &mut Cpu, io: &dyn CpuIo, image: &Image, tss: u32, error_code: Option<u32>) -> Outcome {
    if image.trap {
        cpu.system.pending_debug |= debug::DR6_BT;
    }
    if let Some(cr3) = image.cr3
        && cpu.mode.paging
    {
        control::load_cr3(cpu, u64::from(cr3))?;
        cpu.refresh_translation();
    }
    cpu.ldtr = check_ldt(cpu, io, image.ldt, ts, ts)?;
    load_segments(cpu, io, image)?;
    if let Some(code) = error_code {
        push_error_code(cpu, io, tss, code)?;
    }
    if cpu.next_rip > u64::from(cpu.segments[seg::CS].limit) {
        return Err(Exception::GP0);
    }
    Ok(())
}

fn find_tss(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    selector: u16,
    how: Switch,
    fault: fn(u16) -> Exception,
) -> Outcome<Descriptor> {
    if is_null(selector) || selector & 4 != 0 {
        return Err(fault(selector));
    }
    let d = fetch(cpu, io, selector)?.ok_or(fault(selector))?;
    let wanted_busy = if how == Switch::Return { kind::BUSY } else { 0 };
    let is_tss = matches!(d.kind() & !kind::BUSY, kind::TSS16 | kind::TSS);
    if d.non_system() || !is_tss || d.kind() & kind::BUSY != wanted_busy {
        return Err(fault(selector));
    }
    if !d.present() {
        return Err(np(selector));
    }
    if d.limit() < layout(d.kind()).min_limit {
        return Err(ts(selector));
    }
    Ok(d)
}

fn read(cpu: &mut Cpu, io: &dyn CpuIo, base: u64, offset: u64, size: u32) -> Outcome<u64> {
    let linear = table_address(cpu, base, offset);
    load(cpu, io, linear, size, Access::SystemRead)
}

fn write(cpu: &mut Cpu, io: &dyn CpuIo, base: u64, offset: u64, size: u32, value: u64) -> Outcome {
    let linear = table_address(cpu, base, offset);
    store(cpu, io, linear, size, value, Access::SystemWrite)
}

fn read_image(cpu: &mut Cpu, io: &dyn CpuIo, tss: &Segment) -> Outcome<Image> {
    let l = layout(tss.kind());
    let base = tss.base;
    let wide = l.width == 4;
    let mut image = Image {
        cr3: None,
        ip: read(cpu, io, base, l.ip, l.width)?,
        flags: read(cpu, io, base, l.flags, l.width)?,
        registers: [0; 8],
        segments: [0; 6],
        ldt: read(cpu, io, base, l.ldt, 2)? as u16,
        trap: false,
    };
    for (n, register) in (0u64..).zip(&mut image.registers) {
        *register = read(cpu, io, base, l.registers + n * u64::from(l.width), l.width)?;
        if !wide {
            *register |= 0xffff_0000;
        }
    }
    for (n, segment) in (0u64..).zip(image.segments.iter_mut().take(l.segment_count)) {
        *segment = read(cpu, io, base, l.segments + n * l.segment_stride, 2)? as u16;
    }
    if wide {
        image.trap = read(cpu, io, base, TRAP_OFFSET, 2)? & 1 != 0;
        image.cr3 = Some(read(cpu, io, base, CR3_OFFSET, 4)? as u32);
    }
    Ok(image)
}

/// Stores the running task's registers in its TSS.
fn save_old(cpu: &mut Cpu, io: &dyn CpuIo, how: Switch) -> Outcome {
    let l = layout(cpu.tr.kind());
    let base = cpu.tr.base;
    let start = table_address(cpu, base, l.ip);
    let end = l.segments + l.segment_count as u64 * l.segment_stride;
    cpu.probe(io, start, end - l.ip, Access::SystemWrite)?;
    let flags = if how == Switch::Return { cpu.rflags & !flag::NT } else { cpu.rflags };
    write(cpu, io, base, l.ip, l.width, cpu.next_rip)?;
    write(cpu, io, base, l.flags, l.width, flags)?;
    for n in 0..8usize {
        write(cpu, io, base, l.registers + n as u64 * u64::from(l.width), l.width, cpu.gpr[n])?;
    }
    for n in 0..l.segment_count {
        let selector = u64::from(cpu.segments[n].selector);
        write(cpu, io, base, l.segments + n as u64 * l.segment_stride, 2, selector)?;
    }
    Ok(())
}

/// Busy bits and the back link.
fn update_tables(cpu: &mut Cpu, io: &dyn CpuIo, d: &Descriptor, new: &Segment, how: Switch) -> Outcome {
    if matches!(how, Switch::Call | Switch::Gate) {
        write(cpu, io, new.base, 0, 2, u64::from(cpu.tr.selector))?;
    }
    if how != Switch::Return {
        set_type_bits(cpu, io, d.address, kind::BUSY as u8, 0)?;
    }
    if matches!(how, Switch::Jump | Switch::Return) {
        let offset = u64::from(cpu.tr.selector & 0xfff8);
        let address = table_address(cpu, cpu.gdtr.base, offset);
        set_type_bits(cpu, io, address, 0, kind::BUSY as u8)?;
    }
    Ok(())
}

/// Enters the new task: TR, general registers, flags and selectors, still without descriptors.
fn enter(cpu: &mut Cpu, new: Segment, image: &Image, how: Switch) {
    cpu.tr = new;
    cpu.cr0 |= bits::CR0_TS;
    cpu.dr7 &= !debug::DR7_LOCAL;
    debug::update_watch(cpu);
    cpu.recheck = true;
    let mut flags = image.flags;
    if matches!(how, Switch::Call | Switch::Gate) {
        flags |= flag::NT;
    }
    let known = flag::ARITHMETIC
        | flag::TF
        | flag::IF
        | flag::DF
        | flag::IOPL
        | flag::NT
        | flag::RF
        | flag::VM
        | flag::AC
        | flag::VIF
        | flag::VIP
        | flag::ID;
    cpu.rflags = flags & known | 2;
    for (register, value) in cpu.gpr.iter_mut().zip(image.registers) {
        *register = value;
    }
    cpu.rip = image.ip;
    cpu.next_rip = image.ip;
    let cpl = image.segments[seg::CS] & 3;
    if cpu.rflags & flag::VM != 0 {
        cpu.segments = image.segments.map(v8086_segment);
    } else {
        cpu.segments = image.segments.map(null_segment);
        for register in [seg::CS, seg::SS] {
            cpu.segments[register].attributes |= u32::from(cpl) << 5;
        }
    }
    cpu.ldtr = null_segment(image.ldt);
    cpu.refresh_mode();
}

fn load_segments(cpu: &mut Cpu, io: &dyn CpuIo, image: &Image) -> Outcome {
    if cpu.mode.v8086 {
        return Ok(());
    }
    let code = image.segments[seg::CS];
    let cpl = code as u8 & 3;
    cpu.segments[seg::CS] = task_code(cpu, io, code)?;
    cpu.refresh_mode();
    cpu.segments[seg::SS] = task_stack(cpu, io, image.segments[seg::SS], cpl)?;
    cpu.refresh_mode();
    for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let selector = image.segments[register];
        if !is_null(selector) {
            cpu.segments[register] = task_data(cpu, io, selector, cpl)?;
        }
    }
    Ok(())
}

fn task_code(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16) -> Outcome<Segment> {
    if is_null(selector) {
        return Err(ts(selector));
    }
    let mut d = fetch(cpu, io, selector)?.ok_or(ts(selector))?;
    let rpl = selector as u8 & 3;
    let dpl_ok = if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if !d.is_code() || !dpl_ok {
        return Err(ts(selector));
    }
    if !d.present() {
        return Err(np(selector));
    }
    d.mark_accessed(cpu, io)?;
    Ok(d.segment(selector))
}

fn task_stack(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16, cpl: u8) -> Outcome<Segment> {
    if is_null(selector) {
        return Err(ts(selector));
    }
    let mut d = fetch(cpu, io, selector)?.ok_or(ts(selector))?;
    if !d.is_writable() || d.dpl() != cpl || selector as u8 & 3 != cpl {
        return Err(ts(selector));
    }
    if !d.present() {
        return Err(stack_fault(selector));
    }
    d.mark_accessed(cpu, io)?;
    Ok(d.segment(selector))
}

fn task_data(cpu: &mut Cpu, io: &dyn CpuIo, selector: u16, cpl: u8) -> Outcome<Segment> {
    let mut d = fetch(cpu, io, selector)?.ok_or(ts(selector))?;
    let rpl = selector as u8 & 3;
    if !d.is_readable() || !d.is_conforming() && (rpl > d.dpl() || cpl > d.dpl()) {
        return Err(ts(selector));
    }
    if !d.present() {
        return Err(np(selector));
    }
    d.mark_accessed(cpu, io)?;
    Ok(d.segment(selector))
}

fn push_error_code(cpu: &mut Cpu, io: &dyn CpuIo, tss: u32, code: u32) -> Outcome {
    let size = if tss & 8 != 0 { 4 } else { 2 };
    let mut stack = Stack::current(cpu);
    stack.push(cpu, io, size, u64::from(code))?;
    cpu.gpr[gpr::RSP] = stack.pointer(cpu.gpr[gpr::RSP]);
    Ok(())
}
