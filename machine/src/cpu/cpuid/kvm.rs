//! The hypervisor's leaves 0x4000_0000 to 0x4000_0010, in KVM's layout, so that guests find clock and steal
//! time. Only what a backend really does is offered.

use super::basic::APIC_BUS_KHZ;
use crate::cpu::host::CpuidResult;
use crate::cpu::model::CpuModel;

pub(super) const MAX_LEAF: u32 = 0x4000_0010;

/// Paravirtual clock by the old registers.
const CLOCKSOURCE: u32 = 1 << 0;
/// Port I/O needs no delays.
const NOP_IO_DELAY: u32 = 1 << 1;
/// Paravirtual clock by the new registers.
const CLOCKSOURCE2: u32 = 1 << 3;
/// Time stolen from the vCPU is reported.
const STEAL_TIME: u32 = 1 << 5;
/// The paravirtual clock agrees between vCPUs.
const CLOCKSOURCE_STABLE: u32 = 1 << 24;

pub(super) fn answer(model: &CpuModel, leaf: u32) -> CpuidResult {
    match leaf {
        0x4000_0000 => {
            let word = u32::from_le_bytes;
            CpuidResult { eax: MAX_LEAF, ebx: word(*b"KVMK"), ecx: word(*b"VMKV"), edx: word(*b"M\0\0\0") }
        }
        0x4000_0001 => CpuidResult {
            eax: CLOCKSOURCE | NOP_IO_DELAY | CLOCKSOURCE2 | STEAL_TIME | CLOCKSOURCE_STABLE,
            ..CpuidResult::default()
        },
        0x4000_0010 => CpuidResult { eax: model.tsc_khz, ebx: APIC_BUS_KHZ, ecx: 0, edx: 0 },
        _ => CpuidResult::default(),
    }
}
