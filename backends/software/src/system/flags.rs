//! Instructions that read or change RFLAGS' system bits: PUSHF, POPF, CLI, STI, STAC, CLAC, HLT; software
//! interrupts; IN and OUT with their permission check.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::model::Feature;
use atoll_machine::cpu::state::{Activity, Segment, gpr};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::debug;
use super::descriptor::kind;
use super::memory::{Stack, load, table_address};
use super::operand;
use crate::access::Access;
use crate::cpu::{Cpu, flag};
use crate::exception::{Exception, Outcome, SoftwareInterrupt, vector};

fn iopl(cpu: &Cpu) -> u8 {
    (cpu.rflags >> 12 & 3) as u8
}

/// #GP(0) in virtual-8086 mode unless IOPL is 3.
fn require_v8086_iopl(cpu: &Cpu) -> Outcome {
    if cpu.mode.v8086 && iopl(cpu) != 3 { Err(Exception::GP0) } else { Ok(()) }
}

/// PUSHF, PUSHFD, PUSHFQ.
pub(crate) fn push(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    require_v8086_iopl(cpu)?;
    let size = i.stack_pointer_increment().unsigned_abs();
    let mut stack = Stack::current(cpu);
    stack.push(cpu, io, size, cpu.rflags & !(flag::VM | flag::RF))?;
    stack.commit(cpu);
    Ok(())
}

/// POPF, POPFD, POPFQ.
pub(crate) fn pop(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    require_v8086_iopl(cpu)?;
    let size = i.stack_pointer_increment().unsigned_abs();
    let mut stack = Stack::current(cpu);
    let image = stack.pop(cpu, io, size)?;
    stack.commit(cpu);
    let mut writable = flag::ARITHMETIC | flag::TF | flag::DF | flag::NT;
    if size > 2 {
        writable |= flag::AC | flag::ID;
    }
    if cpu.mode.cpl <= iopl(cpu) {
        writable |= flag::IF;
    }
    if cpu.mode.cpl == 0 {
        writable |= flag::IOPL;
    }
    cpu.rflags = cpu.rflags & !(writable | flag::RF) | image & writable | 2;
    super::recheck_events(cpu);
    Ok(())
}

/// CLI and STI.
pub(crate) fn interrupts(cpu: &mut Cpu, enable: bool) -> Outcome {
    if cpu.mode.cpl > iopl(cpu) {
        return Err(Exception::GP0);
    }
    if !enable {
        cpu.rflags &= !flag::IF;
    } else if cpu.rflags & flag::IF == 0 {
        cpu.rflags |= flag::IF;
        super::begin_shadow(cpu);
        super::recheck_events(cpu);
    }
    Ok(())
}

/// STAC and CLAC.
pub(crate) fn alignment_check(cpu: &mut Cpu, set: bool) -> Outcome {
    if !cpu.shared.model.has(Feature::Smap) || cpu.mode.cpl != 0 {
        return Err(Exception::UD);
    }
    if set {
        cpu.rflags |= flag::AC;
    } else {
        cpu.rflags &= !flag::AC;
    }
    Ok(())
}

/// HLT.
pub(crate) fn halt(cpu: &mut Cpu) -> Outcome {
    if cpu.mode.cpl != 0 {
        return Err(Exception::GP0);
    }
    cpu.activity = Activity::Halted;
    cpu.recheck = true;
    Ok(())
}

/// INT n, INT3, INTO, INT1.
pub(crate) fn software_interrupt(cpu: &mut Cpu, i: &Instruction) -> Outcome {
    let (vector, source) = match i.mnemonic() {
        Mnemonic::Int3 => (vector::BP, SoftwareInterrupt::Int3),
        Mnemonic::Int1 => (vector::DB, SoftwareInterrupt::Int1),
        Mnemonic::Into => {
            if cpu.rflags & flag::OF == 0 {
                return Ok(());
            }
            (vector::OF, SoftwareInterrupt::Into)
        }
        _ => {
            require_v8086_iopl(cpu)?;
            (operand::immediate(i, 0) as u8, SoftwareInterrupt::IntN)
        }
    };
    Err(Exception::Software { vector, source })
}

/// BOUND.
pub(crate) fn bound(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    let size = i.op_register(0).size() as u32;
    let signed = |v: u64| if size == 2 { i64::from(v as i16) } else { i64::from(v as i32) };
    let index = signed(operand::read(cpu, io, i, 0, size)?);
    let lower = signed(operand::read_memory(cpu, io, i, 0, size)?);
    let upper = signed(operand::read_memory(cpu, io, i, u64::from(size), size)?);
    if index < lower || index > upper {
        return Err(Exception::fault(vector::BR));
    }
    Ok(())
}

/// Whether the current privilege may access `size` bytes at I/O `port`: IOPL, then the TSS's bitmap. #GP(0)
/// if not. Also records hits of I/O breakpoints.
pub(crate) fn check_io_permission(cpu: &mut Cpu, io: &dyn CpuIo, port: u16, size: u32) -> Outcome {
    let limited = cpu.mode.v8086 || cpu.mode.protected && cpu.mode.cpl > iopl(cpu);
    if limited {
        check_bitmap(cpu, io, port, size)?;
    }
    debug::note_port(cpu, port, size);
    Ok(())
}

fn check_bitmap(cpu: &mut Cpu, io: &dyn CpuIo, port: u16, size: u32) -> Outcome {
    let tr = cpu.tr;
    let wide = tr.attributes & Segment::NON_SYSTEM == 0 && tr.kind() & !kind::BUSY == kind::TSS;
    if !wide || tr.attributes & Segment::PRESENT == 0 || tr.limit < 0x67 {
        return Err(Exception::GP0);
    }
    let at = table_address(cpu, tr.base, 0x66);
    let bitmap = load(cpu, io, at, 2, Access::SystemRead)?;
    let byte = bitmap + u64::from(port >> 3);
    if byte + 1 > u64::from(tr.limit) {
        return Err(Exception::GP0);
    }
    let linear = table_address(cpu, tr.base, byte);
    let bits = load(cpu, io, linear, 2, Access::SystemRead)?;
    let mask = ((1u64 << size) - 1) << (port & 7);
    if bits & mask != 0 { Err(Exception::GP0) } else { Ok(()) }
}

fn port_operand(cpu: &Cpu, i: &Instruction, index: u32) -> u16 {
    if i.op_kind(index) == OpKind::Register {
        cpu.gpr[gpr::RDX] as u16
    } else {
        operand::immediate(i, index) as u16 & 0xff
    }
}

fn port_size(register: Register) -> usize {
    register.size().min(4)
}

/// IN and OUT.
pub(crate) fn execute_port(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    let mut data = [0; 4];
    if i.mnemonic() == Mnemonic::In {
        let register = i.op_register(0);
        let size = port_size(register);
        let port = port_operand(cpu, i, 1);
        check_io_permission(cpu, io, port, size as u32)?;
        io.port_read(port, &mut data[..size]);
        operand::write_register(cpu, register, u64::from(u32::from_le_bytes(data)));
    } else {
        let size = port_size(i.op_register(1));
        let port = port_operand(cpu, i, 0);
        check_io_permission(cpu, io, port, size as u32)?;
        data = (cpu.gpr[gpr::RAX] as u32).to_le_bytes();
        io.port_write(port, &data[..size]);
    }
    // The device may have raised an interrupt for this processor or asked it to stop.
    cpu.recheck = true;
    Ok(())
}
