//! Control registers, EFER and XCR0: what may be written when, and what a write does to the mode and the TLB
//! (Intel SDM vol. 3, 2.5, 4.1, 4.10 and 10.8.5).

use atoll_machine::backend::CpuIo;
use atoll_machine::cpu::model::Feature;
use atoll_machine::cpu::state::{Segment, gpr, seg};
use iced_x86::{Instruction, Mnemonic};

use super::memory::is_canonical;
use super::operand;
use crate::access::Access;
use crate::cpu::{Cpu, control::*};
use crate::exception::{Exception, Outcome};

/// CR0 bits that exist; the others ignore writes.
const CR0_KNOWN: u64 =
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;
/// CR4 bits that change how linear addresses translate: their change flushes everything.
const CR4_TRANSLATION: u64 = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PCIDE;
/// CR3 bit 63: keep the TLB entries of the new PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;

fn require_cpl0(cpu: &Cpu) -> Outcome {
    if cpu.mode.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
}

/// MOV to and from CR0, CR2, CR3, CR4, CR8.
pub(crate) fn execute_move(cpu: &mut Cpu, i: &Instruction) -> Outcome {
    let to = i.op_register(0).is_cr();
    let (control, general) = if to { (0, 1) } else { (1, 0) };
    let number = i.op_register(control).number();
    let general = operand::gpr_index(i.op_register(general));
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::UD);
    }
    require_cpl0(cpu)?;
    let wide = cpu.mode.bits == 64;
    if to {
        let value = if wide { cpu.gpr[general] } else { cpu.gpr[general] & 0xffff_ffff };
        return match number {
            0 => write_cr0(cpu, value),
            2 => {
                cpu.cr2 = value;
                Ok(())
            }
            3 => write_cr3(cpu, value),
            4 => write_cr4(cpu, value),
            _ => write_cr8(cpu, value),
        };
    }
    let value = match number {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => u64::from(cpu.system.lapic.cr8()),
    };
    cpu.gpr[general] = if wide { value } else { value & 0xffff_ffff };
    Ok(())
}

fn write_cr8(cpu: &mut Cpu, value: u64) -> Outcome {
    if value > 15 {
        return Err(Exception::GP0);
    }
    cpu.system.lapic.set_cr8(value as u8);
    super::recheck_events(cpu);
    Ok(())
}

/// Writes CR0 with all its checks.
pub(crate) fn write_cr0(cpu: &mut Cpu, value: u64) -> Outcome {
    let bad = value >> 32 != 0 || value & (CR0_PG | CR0_PE) == CR0_PG || value & (CR0_NW | CR0_CD) == CR0_NW;
    if bad {
        return Err(Exception::GP0);
    }
    let new = value & CR0_KNOWN | CR0_ET;
    let changed = new ^ cpu.cr0;
    let mut efer = cpu.efer;
    if changed & CR0_PG != 0 {
        if new & CR0_PG != 0 {
            if cpu.efer & EFER_LME != 0 {
                check_long_entry(cpu)?;
                efer |= EFER_LMA;
            }
        } else {
            if cpu.mode.bits == 64 || cpu.cr4 & CR4_PCIDE != 0 {
                return Err(Exception::GP0);
            }
            efer &= !EFER_LMA;
        }
    }
    let pae = new & CR0_PG != 0 && efer & EFER_LMA == 0 && cpu.cr4 & CR4_PAE != 0;
    if pae && changed & (CR0_PG | CR0_CD | CR0_NW) != 0 {
        cpu.pdpte = read_pdptes(cpu, cpu.cr3)?;
    }
    cpu.cr0 = new;
    cpu.efer = efer;
    if changed & (CR0_PG | CR0_PE) != 0 {
        cpu.mmu.flush_all();
    }
    cpu.refresh_mode();
    Ok(())
}

/// Switching paging on with EFER.LME set.
fn check_long_entry(cpu: &Cpu) -> Outcome {
    let long_code = cpu.segments[seg::CS].attributes & Segment::LONG != 0;
    let tss16 = matches!(cpu.tr.kind(), 1 | 3) && cpu.tr.attributes & Segment::NON_SYSTEM == 0;
    if cpu.cr4 & CR4_PAE == 0 || long_code || tss16 {
        return Err(Exception::GP0);
    }
    Ok(())
}

/// MOV to CR3.
fn write_cr3(cpu: &mut Cpu, value: u64) -> Outcome {
    let pcid_enabled = cpu.cr4 & CR4_PCIDE != 0;
    let keep = pcid_enabled && value & CR3_NO_FLUSH != 0;
    let value = if pcid_enabled { value & !CR3_NO_FLUSH } else { value };
    if cpu.mode.long && value >> cpu.shared.model.physical_bits() != 0 {
        return Err(Exception::GP0);
    }
    if cpu.mode.paging && !cpu.mode.long && cpu.cr4 & CR4_PAE != 0 {
        cpu.pdpte = read_pdptes(cpu, value)?;
    }
    cpu.cr3 = value;
    if !pcid_enabled {
        cpu.mmu.flush_non_global();
    } else if !keep {
        cpu.mmu.flush_pcid((value & 0xfff) as u16);
    }
    Ok(())
}

/// Loads CR3 in a task switch.
pub(crate) fn load_cr3(cpu: &mut Cpu, value: u64) -> Outcome {
    write_cr3(cpu, value)
}

/// Reads the four page-directory-pointer entries of PAE paging; #GP(0) if one has reserved bits set.
pub(crate) fn read_pdptes(cpu: &Cpu, cr3: u64) -> Outcome<[u64; 4]> {
    let mut bytes = [0; 32];
    if cpu.shared.memory.read(cr3 & 0xffff_ffe0, &mut bytes).is_err() {
        bytes.fill(0xff);
    }
    let mut entries = [0; 4];
    let physical = (1u64 << cpu.shared.model.physical_bits()) - 1;
    for (entry, raw) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
        *entry = u64::from_le_bytes(raw.try_into().unwrap_or_default());
        if *entry & 1 != 0 && *entry & (!physical | 0x1e6) != 0 {
            return Err(Exception::GP0);
        }
    }
    Ok(entries)
}

/// MOV to CR4.
fn write_cr4(cpu: &mut Cpu, value: u64) -> Outcome {
    if value & !cpu.shared.model.cr4_mask() != 0 {
        return Err(Exception::GP0);
    }
    let changed = value ^ cpu.cr4;
    if cpu.mode.long && value & CR4_PAE == 0 {
        return Err(Exception::GP0);
    }
    if changed & value & CR4_PCIDE != 0 && (!cpu.mode.long || cpu.cr3 & 0xfff != 0) {
        return Err(Exception::GP0);
    }
    let pae = cpu.mode.paging && !cpu.mode.long && value & CR4_PAE != 0;
    if pae && changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) != 0 {
        cpu.pdpte = read_pdptes(cpu, cpu.cr3)?;
    }
    cpu.cr4 = value;
    if changed & CR4_TRANSLATION != 0 {
        cpu.mmu.flush_all();
    }
    Ok(())
}

/// CLTS, LMSW, SMSW.
pub(crate) fn execute_status(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    match i.mnemonic() {
        Mnemonic::Clts => {
            require_cpl0(cpu)?;
            cpu.cr0 &= !CR0_TS;
            Ok(())
        }
        Mnemonic::Lmsw => {
            require_cpl0(cpu)?;
            let value = operand::read(cpu, io, i, 0, 2)?;
            // PE can be set but not cleared.
            let kept = cpu.cr0 & !(CR0_MP | CR0_EM | CR0_TS);
            write_cr0(cpu, kept | value & (CR0_PE | CR0_MP | CR0_EM | CR0_TS))
        }
        _ => {
            if cpu.mode.cpl > 0 && cpu.cr4 & CR4_UMIP != 0 {
                return Err(Exception::GP0);
            }
            operand::write(cpu, io, i, 0, 2, cpu.cr0)
        }
    }
}

/// WRMSR to EFER.
pub(crate) fn write_efer(cpu: &mut Cpu, value: u64) -> Outcome {
    let allowed = cpu.shared.model.efer_mask() & !EFER_LMA;
    if value & !(allowed | EFER_LMA) != 0 {
        return Err(Exception::GP0);
    }
    if cpu.mode.paging && (value ^ cpu.efer) & EFER_LME != 0 {
        return Err(Exception::GP0);
    }
    let changed = value ^ cpu.efer;
    cpu.efer = value & allowed | cpu.efer & EFER_LMA;
    if changed & EFER_NXE != 0 {
        cpu.mmu.flush_all();
    }
    Ok(())
}

/// XCR0 component bits.
const XCR0_X87: u64 = 1;
const XCR0_SSE: u64 = 1 << 1;
const XCR0_AVX: u64 = 1 << 2;
const XCR0_AVX512: u64 = 7 << 5;

/// Whether `value` is one that XCR0 may hold, of the components in `offered`.
pub(crate) fn xcr0_valid(value: u64, offered: u64) -> bool {
    let avx512 = value & XCR0_AVX512;
    value & XCR0_X87 != 0
        && value & !offered == 0
        && !(value & XCR0_AVX != 0 && value & XCR0_SSE == 0)
        && (avx512 == 0 || avx512 == XCR0_AVX512 && value & XCR0_AVX != 0)
}

/// XGETBV and XSETBV.
pub(crate) fn execute_extended(cpu: &mut Cpu, i: &Instruction) -> Outcome {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    let index = cpu.gpr[gpr::RCX] as u32;
    if i.mnemonic() == Mnemonic::Xgetbv {
        if index > 1 || index == 1 && !cpu.shared.model.has(Feature::Xgetbv1) {
            return Err(Exception::GP0);
        }
        let value = if index == 1 { crate::fpu::xinuse(cpu) } else { cpu.xcr0 };
        set_edx_eax(cpu, value);
        return Ok(());
    }
    let value = edx_eax(cpu);
    if cpu.mode.cpl != 0 || index != 0 || !xcr0_valid(value, cpu.shared.model.xcr0_mask()) {
        return Err(Exception::GP0);
    }
    cpu.xcr0 = value;
    Ok(())
}

/// EDX:EAX as one value.
pub(crate) fn edx_eax(cpu: &Cpu) -> u64 {
    cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX] & 0xffff_ffff
}

/// Sets EDX:EAX; the upper halves of RDX and RAX are cleared.
pub(crate) fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.gpr[gpr::RDX] = value >> 32;
}

/// INVLPG.
pub(crate) fn invalidate_page(cpu: &mut Cpu, i: &Instruction) -> Outcome {
    require_cpl0(cpu)?;
    let offset = operand::effective_offset(cpu, i);
    let segment = &cpu.segments[operand::segment_index(i.memory_segment())];
    let linear = match cpu.mode.bits {
        64 if operand::segment_index(i.memory_segment()) < seg::FS => offset,
        64 => segment.base.wrapping_add(offset),
        _ => segment.base.wrapping_add(offset) & 0xffff_ffff,
    };
    cpu.mmu.flush_page(linear);
    Ok(())
}

/// INVPCID (types 0 to 3).
pub(crate) fn invalidate_pcid(cpu: &mut Cpu, io: &dyn CpuIo, i: &Instruction) -> Outcome {
    if !cpu.shared.model.has(Feature::Invpcid) {
        return Err(Exception::UD);
    }
    require_cpl0(cpu)?;
    let kind = cpu.gpr[operand::gpr_index(i.op_register(0))];
    let kind = if cpu.mode.bits == 64 { kind } else { kind & 0xffff_ffff };
    let mut raw = [0; 16];
    let linear = operand::memory_linear(cpu, i, 0, 16, Access::Read)?;
    cpu.read_bytes(io, linear, &mut raw, Access::Read)?;
    let value = u128::from_le_bytes(raw);
    let (pcid, address) = (value as u64, (value >> 64) as u64);
    let no_pcids = cpu.cr4 & CR4_PCIDE == 0;
    let bad_pcid = kind < 2 && no_pcids && pcid & 0xfff != 0;
    if kind > 3 || pcid >> 12 != 0 || bad_pcid || kind == 0 && !is_canonical(address) {
        return Err(Exception::GP0);
    }
    match kind {
        0 => cpu.mmu.flush_pcid_page((pcid & 0xfff) as u16, address),
        1 => cpu.mmu.flush_pcid((pcid & 0xfff) as u16),
        _ => cpu.mmu.flush_all(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_needs_x87_and_sse_before_avx() {
        assert!(xcr0_valid(7, 7) && xcr0_valid(1, 7) && xcr0_valid(3, 7));
        assert!(!xcr0_valid(6, 7) && !xcr0_valid(5, 7) && !xcr0_valid(0xf, 7) && !xcr0_valid(0x27, 0xe7));
        assert!(xcr0_valid(0xe7, 0xe7));
    }
}
