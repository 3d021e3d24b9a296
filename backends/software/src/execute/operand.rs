//! Registers and memory operands: of iced instructions (for `system/` and `fpu/`), and of digested ops.

use iced_x86::{Instruction, OpKind, Register};

use atoll_machine::cpu::state::{gpr, seg};

use crate::access::Access;
use crate::cpu::Cpu;
use crate::decode::{Op, REG_NONE, REG_RIP};
use crate::exception::Outcome;
use crate::mmu::raw::Word;

/// Index of a general register in [`Cpu::gpr`], with bit 4 set for AH, CH, DH and BH. `REG_NONE` for others.
pub fn register_code(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            (register as u8 - Register::AH as u8) | 0x10
        }
        Register::None => REG_NONE,
        _ if register.is_gpr() => register.full_register().number() as u8,
        _ => REG_NONE,
    }
}

/// Index of a segment register in [`Cpu::segments`]; DS for anything else.
pub fn segment_code(register: Register) -> usize {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// Segment of the memory operand: 64-bit code ignores all overrides but FS and GS, so that faults are those of
/// the base register's own segment (AMD APM vol. 1, 2.1.2).
pub fn data_segment(instruction: &Instruction, bits: u32) -> Register {
    let segment = instruction.memory_segment();
    if bits != 64 || matches!(segment, Register::FS | Register::GS) {
        return segment;
    }
    match instruction.memory_base() {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => Register::SS,
        _ => Register::DS,
    }
}

/// Value of a general register, zero-extended.
pub fn read_register(cpu: &Cpu, register: Register) -> u64 {
    let code = register_code(register);
    match register.size() {
        1 => u64::from(u8::get(cpu, code)),
        2 => u64::from(u16::get(cpu, code)),
        4 => u64::from(u32::get(cpu, code)),
        _ => u64::get(cpu, code),
    }
}

/// Writes a general register: 8- and 16-bit writes keep the rest, 32-bit writes clear the upper half.
pub fn write_register(cpu: &mut Cpu, register: Register, value: u64) {
    let code = register_code(register);
    match register.size() {
        1 => u8::set(cpu, code, value as u8),
        2 => u16::set(cpu, code, value as u16),
        4 => u32::set(cpu, code, value as u32),
        _ => u64::set(cpu, code, value),
    }
}

/// Address size of a memory operand in bytes: 2, 4 or 8.
pub fn address_size(cpu: &Cpu, instruction: &Instruction) -> u32 {
    let by_register = |r: Register| match r {
        Register::RIP => Some(8),
        Register::EIP => Some(4),
        // A vector index (gather) leaves the size to the base or the displacement.
        r if r.is_gpr() => Some(r.size() as u32),
        _ => None,
    };
    by_register(instruction.memory_base()).or_else(|| by_register(instruction.memory_index())).unwrap_or_else(
        || match instruction.memory_displ_size() {
            2 => 2,
            4 => 4,
            8 => 8,
            _ => cpu.mode.bits / 8,
        },
    )
}

fn mask_of(size: u32) -> u64 {
    match size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Segment and offset of memory operand `operand`: address-size masked, segment override applied,
/// RIP-relative to [`Cpu::next_rip`]. A vector index (VSIB) is left out. The instruction was decoded with
/// IP 0.
pub fn effective_address(cpu: &Cpu, instruction: &Instruction, operand: u32) -> (usize, u64) {
    let source = segment_code(data_segment(instruction, cpu.mode.bits));
    let by = |segment: usize, register: usize, size: u32| (segment, cpu.gpr[register] & mask_of(size));
    match instruction.op_kind(operand) {
        OpKind::MemorySegSI => by(source, gpr::RSI, 2),
        OpKind::MemorySegESI => by(source, gpr::RSI, 4),
        OpKind::MemorySegRSI => by(source, gpr::RSI, 8),
        OpKind::MemorySegDI => by(source, gpr::RDI, 2),
        OpKind::MemorySegEDI => by(source, gpr::RDI, 4),
        OpKind::MemorySegRDI => by(source, gpr::RDI, 8),
        OpKind::MemoryESDI => by(seg::ES, gpr::RDI, 2),
        OpKind::MemoryESEDI => by(seg::ES, gpr::RDI, 4),
        OpKind::MemoryESRDI => by(seg::ES, gpr::RDI, 8),
        _ => (source, memory_offset(cpu, instruction)),
    }
}

fn memory_offset(cpu: &Cpu, instruction: &Instruction) -> u64 {
    let mut offset = instruction.memory_displacement64();
    match instruction.memory_base() {
        Register::None => {}
        // The displacement already counts from the instruction's start (it was decoded at IP 0).
        Register::RIP | Register::EIP => {
            let start = cpu.next_rip.wrapping_sub(instruction.len() as u64);
            offset = offset.wrapping_add(start);
        }
        base => offset = offset.wrapping_add(read_register(cpu, base)),
    }
    let index = instruction.memory_index();
    if index.is_gpr() {
        let scale = u64::from(instruction.memory_index_scale());
        offset = offset.wrapping_add(read_register(cpu, index).wrapping_mul(scale));
    }
    offset & mask_of(address_size(cpu, instruction))
}

/// Linear address of the memory operand (the first one there is) for an access of `size` bytes, with the
/// segment's checks.
pub fn memory_operand_linear(
    cpu: &Cpu,
    instruction: &Instruction,
    size: u64,
    access: Access,
) -> Outcome<u64> {
    let operand = (0..instruction.op_count())
        .find(|&i| !matches!(instruction.op_kind(i), OpKind::Register) && is_memory(instruction.op_kind(i)))
        .unwrap_or(0);
    let (segment, offset) = effective_address(cpu, instruction, operand);
    cpu.linear(segment, offset, size, access)
}

/// Whether an operand is in memory.
pub fn is_memory(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Memory
            | OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}

/// An operand size with its registers.
pub(crate) trait Operand: Word {
    /// Size in bits.
    const BITS: u32;
    /// Value of register `code` (see [`register_code`]).
    fn get(cpu: &Cpu, code: u8) -> Self;
    /// Writes register `code` as an instruction of this size does.
    fn set(cpu: &mut Cpu, code: u8, value: Self);
    /// Sign-extended.
    fn to_i64(self) -> i64;
}

impl Operand for u8 {
    const BITS: u32 = 8;
    #[inline(always)]
    fn get(cpu: &Cpu, code: u8) -> Self {
        (cpu.gpr[(code & 15) as usize] >> (code >> 4 << 3)) as u8
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, code: u8, value: Self) {
        let shift = code >> 4 << 3;
        let register = &mut cpu.gpr[(code & 15) as usize];
        *register = *register & !(0xff << shift) | u64::from(value) << shift;
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        i64::from(self as i8)
    }
}

impl Operand for u16 {
    const BITS: u32 = 16;
    #[inline(always)]
    fn get(cpu: &Cpu, code: u8) -> Self {
        cpu.gpr[(code & 15) as usize] as u16
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, code: u8, value: Self) {
        let register = &mut cpu.gpr[(code & 15) as usize];
        *register = *register & !0xffff | u64::from(value);
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        i64::from(self as i16)
    }
}

impl Operand for u32 {
    const BITS: u32 = 32;
    #[inline(always)]
    fn get(cpu: &Cpu, code: u8) -> Self {
        cpu.gpr[(code & 15) as usize] as u32
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, code: u8, value: Self) {
        cpu.gpr[(code & 15) as usize] = u64::from(value);
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        i64::from(self as i32)
    }
}

impl Operand for u64 {
    const BITS: u32 = 64;
    #[inline(always)]
    fn get(cpu: &Cpu, code: u8) -> Self {
        cpu.gpr[(code & 15) as usize]
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, code: u8, value: Self) {
        cpu.gpr[(code & 15) as usize] = value;
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self as i64
    }
}

/// Addressing form of a digested op: 64-bit base plus displacement, no segment base.
pub(crate) const BASE: u8 = 0;
/// Addressing form: any other 64-bit address of 64-bit code.
pub(crate) const LONG: u8 = 1;
/// Addressing form: everything else (16- and 32-bit addresses, segment limits).
pub(crate) const ANY: u8 = 2;

/// Offset of the memory operand, before its segment.
#[inline(always)]
pub(crate) fn op_offset<const A: u8>(cpu: &Cpu, op: &Op) -> u64 {
    let disp = i64::from(op.disp) as u64;
    if A == BASE {
        return cpu.gpr[(op.base & 15) as usize].wrapping_add(disp);
    }
    let mut offset = disp;
    if op.base < REG_NONE {
        offset = offset.wrapping_add(cpu.gpr[(op.base & 15) as usize]);
    } else if op.base == REG_RIP {
        offset = offset.wrapping_add(cpu.op_next_rip(op));
    }
    if op.index < REG_NONE {
        offset = offset.wrapping_add(cpu.gpr[(op.index & 15) as usize] << (op.shift & 3));
    }
    if A == ANY { offset & mask_of(u32::from(op.flags & 15)) } else { offset }
}

/// Linear address of the memory operand of `size` bytes. Whether it is canonical is found out by the access.
#[inline(always)]
pub(crate) fn op_linear<const A: u8>(cpu: &Cpu, op: &Op, size: u64, access: Access) -> Outcome<u64> {
    match A {
        BASE => Ok(op_offset::<BASE>(cpu, op)),
        LONG => {
            let offset = op_offset::<LONG>(cpu, op);
            let segment = op.segment as usize;
            Ok(if segment >= seg::FS { offset.wrapping_add(cpu.segments[segment % 6].base) } else { offset })
        }
        _ => op_linear_any(cpu, op, size, access),
    }
}

#[inline(never)]
fn op_linear_any(cpu: &Cpu, op: &Op, size: u64, access: Access) -> Outcome<u64> {
    cpu.linear(op.segment as usize, op_offset::<ANY>(cpu, op), size, access)
}

/// [`op_linear`] for handlers that are not specialised by addressing form; `extra` bytes beyond the operand's
/// own offset (bit strings).
#[inline]
pub(crate) fn op_linear_dyn(cpu: &Cpu, op: &Op, extra: u64, size: u64, access: Access) -> Outcome<u64> {
    if op.flags & FLAG_ANY != 0 {
        let offset = op_offset::<ANY>(cpu, op).wrapping_add(extra) & mask_of(u32::from(op.flags & 15));
        return cpu.linear(op.segment as usize, offset, size, access);
    }
    Ok(op_linear::<LONG>(cpu, op, size, access)?.wrapping_add(extra))
}

/// [`Op::flags`]: the memory operand has the addressing form [`ANY`].
pub(crate) const FLAG_ANY: u8 = 0x80;
/// [`Op::flags`]: operand 0 (or the only one) is in memory.
pub(crate) const FLAG_MEMORY: u8 = 0x40;
/// [`Op::flags`]: LOCK prefix.
pub(crate) const FLAG_LOCK: u8 = 0x20;
/// [`Op::flags`]: REP or REPE prefix on a string instruction; the handler's own flag elsewhere.
pub(crate) const FLAG_REP: u8 = 0x10;

/// A register or memory operand that is only read (`src` names the register).
#[inline(always)]
pub(crate) fn read_rm<T: Operand>(cpu: &mut Cpu, env: &crate::execute::Env<'_>, op: &Op) -> Outcome<T> {
    if op.flags & FLAG_MEMORY == 0 {
        return Ok(T::get(cpu, op.src));
    }
    let linear = op_linear_dyn(cpu, op, 0, T::BYTES, Access::Read)?;
    cpu.load::<T>(env.io, op.segment as usize, linear)
}

/// A register or memory operand that is only written (`dst` names the register).
#[inline(always)]
pub(crate) fn write_rm<T: Operand>(
    cpu: &mut Cpu,
    env: &crate::execute::Env<'_>,
    op: &Op,
    value: T,
) -> Outcome {
    if op.flags & FLAG_MEMORY == 0 {
        T::set(cpu, op.dst, value);
        return Ok(());
    }
    let linear = op_linear_dyn(cpu, op, 0, T::BYTES, Access::Write)?;
    cpu.store::<T>(env.io, op.segment as usize, linear, value)
}

/// A register or memory operand that is read and written (`dst` names the register), under LOCK where the op
/// says so. `change` gets flags and value and may be called several times.
#[inline]
pub(crate) fn modify_rm<T: Operand>(
    cpu: &mut Cpu,
    env: &crate::execute::Env<'_>,
    op: &Op,
    extra: u64,
    mut change: impl FnMut(&mut u64, T) -> T,
) -> Outcome<T> {
    let before = cpu.rflags;
    let mut flags = before;
    if op.flags & FLAG_MEMORY == 0 {
        let old = T::get(cpu, op.dst);
        let new = change(&mut flags, old);
        T::set(cpu, op.dst, new);
        cpu.rflags = flags;
        return Ok(old);
    }
    let linear = op_linear_dyn(cpu, op, extra, T::BYTES, Access::Write)?;
    let place = cpu.place::<T>(op.segment as usize, linear)?;
    let old = if op.flags & FLAG_LOCK != 0 {
        cpu.place_atomic(env.io, place, Access::Write, |a| {
            flags = before;
            change(&mut flags, a)
        })?
    } else {
        let old = cpu.place_load::<T>(env.io, place)?;
        let new = change(&mut flags, old);
        cpu.place_store(env.io, place, new)?;
        old
    };
    cpu.rflags = flags;
    Ok(old)
}

/// Whether condition `CC` (as in Jcc's opcode) holds.
#[inline(always)]
pub(crate) fn condition<const CC: u8>(flags: u64) -> bool {
    use crate::cpu::flag::{CF, OF, PF, SF, ZF};
    let less = flags >> 7 & 1 != flags >> 11 & 1;
    let holds = match CC >> 1 {
        0 => flags & OF != 0,
        1 => flags & CF != 0,
        2 => flags & ZF != 0,
        3 => flags & (CF | ZF) != 0,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => less,
        _ => less || flags & ZF != 0,
    };
    holds != (CC & 1 != 0)
}
