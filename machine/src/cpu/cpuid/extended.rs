//! Leaves 0x8000_0000 and up.

use super::basic::vendor_leaf;
use super::{AMD_CACHES, CpuidContext, cache, per_package};
use crate::cpu::feature::Register;
use crate::cpu::host::{CpuidResult, Vendor};
use crate::cpu::model::CpuModel;

pub(super) fn max_leaf(model: &CpuModel) -> u32 {
    match model.vendor {
        Vendor::Intel => 0x8000_0008,
        Vendor::Amd => 0x8000_0021,
    }
}

pub(super) fn answer(model: &CpuModel, leaf: u32, subleaf: u32, ctx: &CpuidContext<'_>) -> CpuidResult {
    let amd = model.vendor == Vendor::Amd;
    match leaf {
        0x8000_0000 if amd => vendor_leaf(model.vendor, max_leaf(model)),
        0x8000_0000 => CpuidResult { eax: max_leaf(model), ..CpuidResult::default() },
        0x8000_0001 => leaf_1(model, ctx),
        0x8000_0002..=0x8000_0004 => brand(model, (leaf - 0x8000_0002) as usize),
        0x8000_0005 if amd => {
            // First-level caches: KiB, ways, lines per tag, line size; data in ECX, instructions in EDX.
            let l1 = 32 << 24 | 8 << 16 | 1 << 8 | 64;
            CpuidResult { eax: 0, ebx: 0, ecx: l1, edx: l1 }
        }
        0x8000_0006 => leaf_6(amd),
        0x8000_0007 => CpuidResult {
            edx: model.features().bits(0x8000_0007, 0, Register::Edx),
            ..CpuidResult::default()
        },
        0x8000_0008 => leaf_8(model, ctx),
        0x8000_001d if amd => {
            let threads = ctx.topology.threads.max(1);
            let package = per_package(ctx.topology);
            cache(&AMD_CACHES, subleaf, |level| if level < 3 { threads } else { package })
        }
        0x8000_001e if amd => leaf_1e(ctx),
        0x8000_0021 if amd => leaf_21(model),
        _ => CpuidResult::default(),
    }
}

fn leaf_1(model: &CpuModel, ctx: &CpuidContext<'_>) -> CpuidResult {
    let features = model.features();
    let mut ecx = features.bits(0x8000_0001, 0, Register::Ecx);
    let mut edx = features.bits(0x8000_0001, 0, Register::Edx);
    let mut eax = 0;
    if model.vendor == Vendor::Amd {
        eax = model.signature();
        // AMD repeats these bits of leaf 1: 0..9, 12..17, 23, 24.
        const REPEATED: u32 = 0x0183_f3ff;
        edx |= features.bits(1, 0, Register::Edx) & REPEATED;
        if !ctx.apic_enabled {
            edx &= !(1 << 9);
        }
        ecx |= 1 << 22; // topology extensions: 0x8000_001d and 0x8000_001e
        if per_package(ctx.topology) > 1 {
            ecx |= 1 << 1; // CmpLegacy: several cores rather than threads
        }
    }
    CpuidResult { eax, ebx: 0, ecx, edx }
}

fn brand(model: &CpuModel, third: usize) -> CpuidResult {
    let bytes = model.brand();
    let word = |n: usize| {
        let at = third * 16 + n * 4;
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    CpuidResult { eax: word(0), ebx: word(1), ecx: word(2), edx: word(3) }
}

/// Second- and third-level caches. Associativity codes: 6 is 8 ways, 8 is 16 ways.
fn leaf_6(amd: bool) -> CpuidResult {
    if amd {
        let l2 = 1024 << 16 | 6 << 12 | 1 << 8 | 64;
        let l3 = (32768 / 512) << 18 | 8 << 12 | 1 << 8 | 64;
        CpuidResult { eax: 0, ebx: 0, ecx: l2, edx: l3 }
    } else {
        CpuidResult { ecx: 2048 << 16 | 8 << 12 | 64, ..CpuidResult::default() }
    }
}

fn leaf_8(model: &CpuModel, ctx: &CpuidContext<'_>) -> CpuidResult {
    let eax = u32::from(model.physical_bits()) | u32::from(model.linear_bits()) << 8;
    if model.vendor == Vendor::Intel {
        return CpuidResult { eax, ..CpuidResult::default() };
    }
    let id_bits = ctx.topology.core_bits() + ctx.topology.thread_bits();
    let ecx = (per_package(ctx.topology) - 1) & 0xff | (id_bits & 0xf) << 12;
    CpuidResult { eax, ebx: model.assurances().extended_8_ebx, ecx, edx: 0 }
}

fn leaf_1e(ctx: &CpuidContext<'_>) -> CpuidResult {
    let topology = ctx.topology;
    let core_mask = (1u32 << topology.core_bits()) - 1;
    let core = ctx.apic_id >> topology.thread_bits() & core_mask;
    let node = ctx.apic_id >> (topology.thread_bits() + topology.core_bits());
    CpuidResult {
        eax: ctx.apic_id,
        ebx: core & 0xff | ((topology.threads.max(1) - 1) & 0xff) << 8,
        ecx: node & 0xff, // one node per processor
        edx: 0,
    }
}

fn leaf_21(model: &CpuModel) -> CpuidResult {
    let assurances = model.assurances();
    CpuidResult { eax: assurances.extended_21_eax, ecx: assurances.extended_21_ecx, ..CpuidResult::default() }
}
