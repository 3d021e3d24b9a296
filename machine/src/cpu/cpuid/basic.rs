//! Leaves 0 to 0x16.

use super::{CpuidContext, INTEL_CACHES, cache, per_package};
use crate::cpu::feature::{Feature, Register};
use crate::cpu::host::{CpuidResult, Vendor};
use crate::cpu::model::CpuModel;

pub(super) fn max_leaf(model: &CpuModel) -> u32 {
    match model.vendor {
        Vendor::Intel => 0x16,
        Vendor::Amd => 0x10,
    }
}

pub(super) fn answer(model: &CpuModel, leaf: u32, subleaf: u32, ctx: &CpuidContext<'_>) -> CpuidResult {
    match leaf {
        0 => vendor_leaf(model.vendor, max_leaf(model)),
        1 => leaf_1(model, ctx),
        // "See leaf 4" (descriptor 0xff).
        2 if model.vendor == Vendor::Intel => CpuidResult { eax: 0xff01, ..CpuidResult::default() },
        4 if model.vendor == Vendor::Intel => leaf_4(subleaf, ctx),
        6 => CpuidResult { eax: bits(model, 6, 0, Register::Eax), ..CpuidResult::default() },
        7 if subleaf == 0 => leaf_7(model),
        0xb => leaf_b(subleaf, ctx),
        0xd => leaf_d(model, subleaf, ctx),
        0x15 if model.vendor == Vendor::Intel => leaf_15(model.tsc_khz),
        0x16 if model.vendor == Vendor::Intel => {
            let mhz = (model.tsc_khz / 1000).min(0xffff);
            CpuidResult { eax: mhz, ebx: mhz, ecx: 100, edx: 0 }
        }
        _ => CpuidResult::default(),
    }
}

fn bits(model: &CpuModel, leaf: u32, subleaf: u32, register: Register) -> u32 {
    model.features().bits(leaf, subleaf, register)
}

/// Leaves 0 and 0x8000_0000: the highest leaf and the vendor.
pub(super) fn vendor_leaf(vendor: Vendor, max: u32) -> CpuidResult {
    let word = |at: usize| {
        let id = vendor.id();
        u32::from_le_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]])
    };
    CpuidResult { eax: max, ebx: word(0), edx: word(4), ecx: word(8) }
}

fn leaf_1(model: &CpuModel, ctx: &CpuidContext<'_>) -> CpuidResult {
    let logical = per_package(ctx.topology);
    // The field counts APIC ids, so it is rounded up to what they need.
    let ids = 1u32 << (ctx.topology.core_bits() + ctx.topology.thread_bits()).min(7);
    let mut ecx = bits(model, 1, 0, Register::Ecx) | 1 << 31; // a hypervisor is present
    if ctx.os_xsave && model.has(Feature::Xsave) {
        ecx |= 1 << 27;
    }
    let mut edx = bits(model, 1, 0, Register::Edx);
    if !ctx.apic_enabled {
        edx &= !(1 << 9);
    }
    if logical > 1 {
        edx |= 1 << 28; // EBX 23..16 is valid
    }
    CpuidResult {
        eax: model.signature(),
        ebx: (ctx.apic_id & 0xff) << 24 | ids << 16 | 8 << 8, // CLFLUSH line: 8 * 8 bytes
        ecx,
        edx,
    }
}

fn leaf_4(subleaf: u32, ctx: &CpuidContext<'_>) -> CpuidResult {
    let topology = ctx.topology;
    let per_core = 1u32 << topology.thread_bits();
    let per_package = per_core << topology.core_bits();
    let mut result = cache(&INTEL_CACHES, subleaf, |level| if level < 3 { per_core } else { per_package });
    if result.eax != 0 {
        let cores = 1u32 << topology.core_bits().min(6);
        result.eax |= (cores - 1) << 26;
    }
    result
}

fn leaf_7(model: &CpuModel) -> CpuidResult {
    CpuidResult {
        eax: 0,
        ebx: bits(model, 7, 0, Register::Ebx),
        ecx: bits(model, 7, 0, Register::Ecx),
        edx: bits(model, 7, 0, Register::Edx) | model.assurances().leaf_7_edx,
    }
}

/// Extended topology: threads of a core, logical processors of a package.
fn leaf_b(subleaf: u32, ctx: &CpuidContext<'_>) -> CpuidResult {
    let topology = ctx.topology;
    let (eax, ebx, kind) = match subleaf {
        0 => (topology.thread_bits(), topology.threads.max(1), 1),
        1 => (topology.thread_bits() + topology.core_bits(), per_package(topology), 2),
        _ => (0, 0, 0),
    };
    CpuidResult { eax, ebx: ebx & 0xffff, ecx: kind << 8 | subleaf & 0xff, edx: ctx.apic_id }
}

/// Legacy region and XSAVE header.
const XSAVE_BASE: u32 = 512 + 64;
/// Upper halves of the YMM registers, and where they are in the standard format.
const AVX_SIZE: u32 = 256;
const AVX_OFFSET: u32 = XSAVE_BASE;

fn leaf_d(model: &CpuModel, subleaf: u32, ctx: &CpuidContext<'_>) -> CpuidResult {
    if !model.has(Feature::Xsave) {
        return CpuidResult::default();
    }
    let size = |xcr0: u64| if xcr0 & 4 != 0 { AVX_OFFSET + AVX_SIZE } else { XSAVE_BASE };
    let mask = model.xcr0_mask();
    match subleaf {
        0 => CpuidResult { eax: mask as u32, ebx: size(ctx.xcr0), ecx: size(mask), edx: (mask >> 32) as u32 },
        1 => CpuidResult {
            eax: bits(model, 0xd, 1, Register::Eax),
            // With AVX the only component, the compacted area is as long as the standard one.
            ebx: if model.has(Feature::Xsavec) { size(ctx.xcr0) } else { 0 },
            ecx: 0,
            edx: 0,
        },
        2 if mask & 4 != 0 => CpuidResult { eax: AVX_SIZE, ebx: AVX_OFFSET, ecx: 0, edx: 0 },
        _ => CpuidResult::default(),
    }
}

/// The clock that the local APIC timer counts, which leaf 0x15 calls the core crystal clock: 1 GHz, as leaf
/// 0x4000_0010 says too.
pub(super) const APIC_BUS_KHZ: u32 = 1_000_000;

/// TSC : crystal. Left out (zero) where the ratio is not exact in numbers with which guests can calculate:
/// Linux multiplies kHz and numerator in 32 bits.
fn leaf_15(tsc_khz: u32) -> CpuidResult {
    let divisor = gcd(tsc_khz, APIC_BUS_KHZ);
    let (numerator, denominator) = (tsc_khz / divisor, APIC_BUS_KHZ / divisor);
    match APIC_BUS_KHZ.checked_mul(numerator) {
        Some(_) => CpuidResult { eax: denominator, ebx: numerator, ecx: APIC_BUS_KHZ * 1000, edx: 0 },
        None => CpuidResult::default(),
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}
