//! Instructions with one memory access per element: gathers and masked moves. Elements that a mask leaves out
//! are not accessed and cannot fault.

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::model::Vendor;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{check_pending, operand, require_mmx, require_sse, require_vex};
use crate::access::Access;
use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome};

/// VGATHER* and VPGATHER*: elements are loaded from the lowest up; one that faults leaves those before it
/// loaded and their mask elements clear, so that the instruction can be restarted (Intel SDM vol. 2, VGATHERDPS).
pub(super) fn gather(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    require_vex(cpu)?;
    let (target, mask, index) =
        (instruction.op0_register(), instruction.op2_register(), instruction.memory_index());
    let numbers = [target.number(), mask.number(), index.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(Exception::UD);
    }
    let (element, index_size) = gather_sizes(instruction.mnemonic());
    let count = (target.size() / element).min(index.size() / index_size);
    let indices = cpu.xsave.ymm(numbers[2]);
    let mut values = cpu.xsave.ymm(numbers[0]);
    let mut masks = cpu.xsave.ymm(numbers[1]);
    let (segment, base) = operand::effective_address(cpu, instruction);
    let scale = i64::from(instruction.memory_index_scale());
    let mut outcome = Ok(());
    for i in 0..count {
        let at = i * element;
        if masks[at + element - 1] & 0x80 == 0 {
            masks[at..at + element].fill(0);
            continue;
        }
        let displacement = signed(&indices[i * index_size..(i + 1) * index_size]).wrapping_mul(scale);
        let offset = operand::truncate(cpu, instruction, base.wrapping_add(displacement as u64));
        let value = &mut values[at..at + element];
        let read = cpu
            .linear(segment, offset, element as u64, Access::Read)
            .and_then(|linear| cpu.read_bytes(io, linear, value, Access::Read));
        if let Err(fault) = read {
            outcome = Err(fault);
            if cpu.shared.model.vendor == Vendor::Intel {
                spread_sign(&mut masks, element, i, count);
            }
            break;
        }
        masks[at..at + element].fill(0);
    }
    if outcome.is_ok() {
        values[count * element..].fill(0);
        masks.fill(0);
    }
    cpu.xsave.set_ymm(numbers[0], &values);
    cpu.xsave.set_ymm(numbers[1], &masks);
    outcome
}

/// Element and index sizes in bytes.
fn gather_sizes(mnemonic: Mnemonic) -> (usize, usize) {
    match mnemonic {
        Mnemonic::Vgatherdps | Mnemonic::Vpgatherdd => (4, 4),
        Mnemonic::Vgatherdpd | Mnemonic::Vpgatherdq => (8, 4),
        Mnemonic::Vgatherqps | Mnemonic::Vpgatherqd => (4, 8),
        _ => (8, 8),
    }
}

/// Mask elements that were not reached hold their sign bit in every position on Intel processors (Intel SDM
/// vol. 2, VGATHERDPS); AMD's leave them alone.
fn spread_sign(masks: &mut [u8; 32], element: usize, from: usize, count: usize) {
    for mask in masks.chunks_exact_mut(element).take(count).skip(from) {
        let fill = if mask[element - 1] & 0x80 != 0 { 0xff } else { 0 };
        mask.fill(fill);
    }
}

fn signed(bytes: &[u8]) -> i64 {
    let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
    let mut wide = [fill; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(wide)
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q, both directions.
pub(super) fn mask_move(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    require_vex(cpu)?;
    let element = match instruction.mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => 4,
        _ => 8,
    };
    let (segment, base) = operand::effective_address(cpu, instruction);
    let mask = cpu.xsave.ymm(instruction.op1_register().number());
    let selected = |i: usize| mask[(i + 1) * element - 1] & 0x80 != 0;
    let address = |cpu: &Cpu, i: usize, access| {
        // One operand: it does not wrap where 16- and 32-bit addresses do, so an element can pass the limit or
        // 4 GiB.
        let offset = base.wrapping_add((i * element) as u64);
        cpu.linear(segment, offset, element as u64, access)
    };
    if instruction.op0_kind() == OpKind::Memory {
        let source = instruction.op2_register();
        let count = source.size() / element;
        let value = cpu.xsave.ymm(source.number());
        for i in (0..count).filter(|i| selected(*i)) {
            let linear = address(cpu, i, Access::Write)?;
            cpu.probe(io, linear, element as u64, Access::Write)?;
        }
        for i in (0..count).filter(|i| selected(*i)) {
            let linear = address(cpu, i, Access::Write)?;
            cpu.write_bytes(io, linear, &value[i * element..(i + 1) * element], Access::Write)?;
        }
        return Ok(());
    }
    let target = instruction.op0_register();
    let mut value = [0; 32];
    for i in (0..target.size() / element).filter(|i| selected(*i)) {
        let linear = address(cpu, i, Access::Read)?;
        cpu.read_bytes(io, linear, &mut value[i * element..(i + 1) * element], Access::Read)?;
    }
    cpu.xsave.set_ymm(target.number(), &value);
    Ok(())
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: the bytes that the mask selects go to [rDI].
pub(super) fn byte_mask_move(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    let mmx = instruction.mnemonic() == Mnemonic::Maskmovq;
    match instruction.mnemonic() {
        Mnemonic::Maskmovq => require_mmx(cpu)?,
        Mnemonic::Maskmovdqu => require_sse(cpu)?,
        _ => require_vex(cpu)?,
    }
    let (value, mask) = if mmx {
        check_pending(cpu)?;
        let mut area = cpu.xsave.clone();
        area.enter_mmx();
        let register = |op: Register| u128::from(area.mm(op.number()));
        let operands = (register(instruction.op1_register()), register(instruction.op2_register()));
        // The transition comes before the memory access.
        cpu.xsave.enter_mmx();
        operands
    } else {
        (
            cpu.xsave.xmm(instruction.op1_register().number()),
            cpu.xsave.xmm(instruction.op2_register().number()),
        )
    };
    let (value, mask) = (value.to_le_bytes(), mask.to_le_bytes());
    let (segment, start) = operand::effective_address(cpu, instruction);
    let wrap = |offset: u64| match instruction.op0_kind() {
        OpKind::MemorySegDI => offset & 0xffff,
        OpKind::MemorySegEDI => offset & 0xffff_ffff,
        _ => offset,
    };
    let mut targets = [0; 16];
    for i in (0..16).filter(|i| mask[*i] & 0x80 != 0) {
        let offset = wrap(start.wrapping_add(i as u64));
        targets[i] = cpu.linear(segment, offset, 1, Access::Write)?;
        cpu.probe(io, targets[i], 1, Access::Write)?;
    }
    for i in (0..16).filter(|i| mask[*i] & 0x80 != 0) {
        cpu.write_bytes(io, targets[i], &value[i..=i], Access::Write)?;
    }
    Ok(())
}
