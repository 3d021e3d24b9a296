//! FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XSAVEC and XRSTOR (Intel SDM vol. 1, 10.5 and chapter 13).
//!
//! Components in use are recognised by their contents, which the manual permits ("may track"): a component
//! that holds its init configuration is reported and skipped as such. The modified optimisation is not used.
//! Outside 64-bit mode XMM8..15 and their upper halves are neither stored nor loaded.

use atoll_machine::backend::CpuIo;
use iced_x86::{Instruction, Mnemonic};

use super::state::{MXCSR_INIT, MXCSR_MASK, component, offset, status};
use super::{operand, register_count, require_switched, require_x87};
use crate::access::Access;
use crate::cpu::{Cpu, XsaveArea, control};
use crate::exception::{Exception, Outcome};

/// XCOMP_BV bit that marks the compacted format.
const COMPACTED: u64 = 1 << 63;

/// FXSAVE and FXRSTOR.
pub(super) fn fx(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    require_x87(cpu)?;
    let wide = matches!(instruction.mnemonic(), Mnemonic::Fxsave64 | Mnemonic::Fxrstor64);
    let vectors = offset::XMM + 16 * register_count(cpu);
    if matches!(instruction.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64) {
        let image = legacy_image(cpu, wide);
        let linear = operand::linear(cpu, instruction, 512, 16, Access::Write)?;
        cpu.probe(io, linear, 512, Access::Write)?;
        return cpu.write_bytes(io, linear, &image[..vectors], Access::Write);
    }
    let linear = operand::linear(cpu, instruction, 512, 16, Access::Read)?;
    let mut image = [0; 512];
    cpu.read_bytes(io, linear, &mut image, Access::Read)?;
    let mxcsr = u32_at(&image, offset::MXCSR);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Exception::GP0);
    }
    load_x87(cpu, &image, wide);
    cpu.xsave.0[offset::XMM..vectors].copy_from_slice(&image[offset::XMM..vectors]);
    cpu.xsave.set_mxcsr(mxcsr);
    Ok(())
}

/// XSAVE, XSAVEOPT, XSAVEC.
pub(super) fn save(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    require_xsave(cpu)?;
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    let wide = matches!(mnemonic, M::Xsave64 | M::Xsaveopt64 | M::Xsavec64);
    let compact = matches!(mnemonic, M::Xsavec | M::Xsavec64);
    if compact && !cpu.fpu.config.compaction {
        return Err(Exception::UD);
    }
    let requested = requested(cpu);
    let mut in_use = cpu.xsave.in_use() & requested;
    if compact && requested & component::SSE != 0 && cpu.xsave.mxcsr() != MXCSR_INIT {
        in_use |= component::SSE;
    }
    let stored = if matches!(mnemonic, M::Xsave | M::Xsave64) { requested } else { in_use };
    let length = area_length(requested);
    let linear = operand::linear(cpu, instruction, length, 64, Access::Write)?;
    cpu.probe(io, linear, length, Access::Write)?;
    let header = linear.wrapping_add(offset::HEADER as u64);
    let mut old = [0; 8];
    if !compact {
        cpu.read_bytes(io, header, &mut old, Access::Read)?;
    }
    store_components(cpu, io, linear, stored, mxcsr_stored(requested, stored, compact), wide)?;
    if compact {
        let mut image = [0; 64];
        image[..8].copy_from_slice(&in_use.to_le_bytes());
        image[8..16].copy_from_slice(&(COMPACTED | requested).to_le_bytes());
        return cpu.write_bytes(io, header, &image[..16], Access::Write);
    }
    let bits = u64::from_le_bytes(old) & !requested | in_use;
    cpu.write_bytes(io, header, &bits.to_le_bytes(), Access::Write)
}

/// MXCSR goes with SSE and, in the standard format, with AVX too.
fn mxcsr_stored(requested: u64, stored: u64, compact: bool) -> bool {
    if compact { stored & component::SSE != 0 } else { requested & (component::SSE | component::AVX) != 0 }
}

/// Writes the chosen components at their places; the range has been probed.
fn store_components(
    cpu: &mut Cpu,
    io: &dyn CpuIo,
    linear: u64,
    stored: u64,
    mxcsr: bool,
    wide: bool,
) -> Outcome {
    let image = legacy_image(cpu, wide);
    let put = |cpu: &mut Cpu, from: usize, data: &[u8]| {
        cpu.write_bytes(io, linear.wrapping_add(from as u64), data, Access::Write)
    };
    if stored & component::X87 != 0 {
        put(cpu, 0, &image[..offset::MXCSR])?;
        put(cpu, offset::ST, &image[offset::ST..offset::XMM])?;
    }
    if mxcsr {
        put(cpu, offset::MXCSR, &image[offset::MXCSR..offset::ST])?;
    }
    let count = 16 * register_count(cpu);
    if stored & component::SSE != 0 {
        put(cpu, offset::XMM, &image[offset::XMM..offset::XMM + count])?;
    }
    if stored & component::AVX != 0 {
        let mut upper = [0; 256];
        upper.copy_from_slice(&cpu.xsave.0[offset::YMM_HIGH..offset::END]);
        put(cpu, offset::YMM_HIGH, &upper[..count])?;
    }
    Ok(())
}

/// XRSTOR, both formats.
pub(super) fn restore(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    require_xsave(cpu)?;
    let wide = instruction.mnemonic() == Mnemonic::Xrstor64;
    let requested = requested(cpu);
    let linear = operand::linear(cpu, instruction, area_length(requested), 64, Access::Read)?;
    let mut header = [0; 64];
    cpu.read_bytes(io, linear.wrapping_add(offset::HEADER as u64), &mut header, Access::Read)?;
    let (present, layout) = (u64_at(&header, 0), u64_at(&header, 8));
    let compact = layout & COMPACTED != 0;
    check_header(cpu, &header, present, layout)?;
    let loaded = present & requested;
    let mut image = XsaveArea::init();
    cpu.read_bytes(io, linear, &mut image.0[..512], Access::Read)?;
    if loaded & component::AVX != 0 {
        let upper = linear.wrapping_add(offset::YMM_HIGH as u64);
        cpu.read_bytes(io, upper, &mut image.0[offset::YMM_HIGH..], Access::Read)?;
    }
    let mxcsr = match compact {
        true if requested & component::SSE == 0 => cpu.xsave.mxcsr(),
        true if loaded & component::SSE == 0 => MXCSR_INIT,
        false if requested & (component::SSE | component::AVX) == 0 => cpu.xsave.mxcsr(),
        _ => image.mxcsr(),
    };
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Exception::GP0);
    }
    cpu.xsave.set_mxcsr(mxcsr);
    load_components(cpu, &image, requested, loaded, wide);
    Ok(())
}

/// Reserved parts of the header: #GP.
fn check_header(cpu: &Cpu, header: &[u8; 64], present: u64, layout: u64) -> Outcome {
    let clear = |range: std::ops::Range<usize>| header[range].iter().all(|b| *b == 0);
    let valid = if layout & COMPACTED == 0 {
        present & !cpu.xcr0 == 0 && clear(8..24)
    } else {
        let components = layout & !COMPACTED;
        cpu.fpu.config.compaction
            && components & !cpu.xcr0 == 0
            && present & !components == 0
            && clear(16..64)
    };
    if valid { Ok(()) } else { Err(Exception::GP0) }
}

/// Loads `loaded` and initialises the rest of `requested`, in the registers that the mode can name.
fn load_components(cpu: &mut Cpu, image: &XsaveArea, requested: u64, loaded: u64, wide: bool) {
    if loaded & component::X87 != 0 {
        let mut legacy = [0; 512];
        legacy.copy_from_slice(&image.0[..512]);
        load_x87(cpu, &legacy, wide);
    } else if requested & component::X87 != 0 {
        cpu.xsave.initialize(component::X87);
        (cpu.fpu.fcs, cpu.fpu.fds) = (0, 0);
    }
    for index in 0..register_count(cpu) {
        if requested & component::SSE != 0 {
            let value = if loaded & component::SSE != 0 { image.xmm(index) } else { 0 };
            cpu.xsave.set_xmm(index, value);
        }
        if requested & component::AVX != 0 {
            let value = if loaded & component::AVX != 0 { image.ymm_high(index) } else { 0 };
            cpu.xsave.set_ymm_high(index, value);
        }
    }
}

/// #UD without CR4.OSXSAVE, #NM with CR0.TS.
fn require_xsave(cpu: &Cpu) -> Outcome {
    if cpu.cr4 & control::CR4_OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    require_switched(cpu)
}

/// RFBM: EDX:EAX within XCR0.
fn requested(cpu: &Cpu) -> u64 {
    let mask = cpu.gpr[0] & 0xffff_ffff | cpu.gpr[2] << 32;
    mask & cpu.xcr0 & component::ALL
}

/// Bytes that an instruction with this RFBM accesses. AVX is the only extended component, so its place is the
/// same in both formats.
fn area_length(requested: u64) -> u64 {
    let end = if requested & component::AVX != 0 { offset::END } else { offset::YMM_HIGH };
    end as u64
}

/// The 512-byte image that FXSAVE would store; `wide` has 64-bit pointers.
fn legacy_image(cpu: &Cpu, wide: bool) -> [u8; 512] {
    let area = &cpu.xsave;
    let mut image = [0; 512];
    image[..offset::LEGACY_END].copy_from_slice(&area.0[..offset::LEGACY_END]);
    image[5] = 0;
    image[offset::MXCSR_MASK..offset::ST].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    if cpu.fpu.config.pointers_only_when_pending && area.fsw() & status::SUMMARY == 0 {
        image[offset::FOP..offset::MXCSR].fill(0);
    } else if !wide {
        for (at, selector) in [(offset::FIP, cpu.fpu.fcs), (offset::FDP, cpu.fpu.fds)] {
            image[at + 4..at + 8].fill(0);
            image[at + 4..at + 6].copy_from_slice(&selector.to_le_bytes());
        }
    }
    image
}

/// Loads the x87 state from an image in the format of [`legacy_image`].
fn load_x87(cpu: &mut Cpu, image: &[u8; 512], wide: bool) {
    let area = &mut cpu.xsave;
    area.0[..offset::MXCSR].copy_from_slice(&image[..offset::MXCSR]);
    area.0[5] = 0;
    for i in 0..8 {
        let mut value = [0; 10];
        value.copy_from_slice(&image[offset::ST + 16 * i..][..10]);
        area.set_st(i, value);
    }
    area.set_fcw(area.fcw() & 0x1f3f | 0x40);
    area.set_fop(area.fop() & 0x7ff);
    area.update_summary();
    if !wide {
        let (fip, fdp) = (area.fip(), area.fdp());
        area.set_fip(fip & 0xffff_ffff);
        area.set_fdp(fdp & 0xffff_ffff);
        (cpu.fpu.fcs, cpu.fpu.fds) = ((fip >> 32) as u16, (fdp >> 32) as u16);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}
