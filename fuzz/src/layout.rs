//! The guest that runs start from, in eight modes: descriptor tables, tasks, page tables, handlers.
//!
//! | guest-physical | |
//! |---|---|
//! | `0x0` | interrupt vectors of real mode |
//! | `0x1000` | GDT |
//! | `0x2000` | IDT |
//! | `0x3000`, `0x3800` | two task state segments |
//! | `0x4000` … `0xbfff` | page tables: four levels, 32-bit, PAE |
//! | `0xc000` | LDT, a copy of the GDT |
//! | `0x1_0000` | code |
//! | `0x1_8000` … | stacks |
//! | `0x1_f000` | handlers |
//! | `0x2_0000` … | data |
//!
//! Page tables map the first 2 MiB and the local APIC's page to themselves, for everybody.

use atoll_machine::cpu::state::{CpuState, DescriptorTable, Segment, gpr, seg};

use crate::machine::Machine;

/// Global descriptor table.
pub const GDT: u64 = 0x1000;
/// Interrupt descriptor table.
pub const IDT: u64 = 0x2000;
/// The current task.
pub const TSS: u64 = 0x3000;
/// Another task.
pub const OTHER_TSS: u64 = 0x3800;
/// Local descriptor table.
pub const LDT: u64 = 0xc000;
/// Code.
pub const CODE: u64 = 0x1_0000;
/// First byte above the stack.
pub const STACK: u64 = 0x1_c000;
/// Handlers of exceptions and interrupts.
pub const HANDLERS: u64 = 0x1_f000;
/// Data.
pub const DATA: u64 = 0x2_0000;

const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const PD: u64 = 0x6000;
const PT: u64 = 0x7000;
const PD32: u64 = 0x8000;
const PT32: u64 = 0x9000;
const PAE_PDPT: u64 = 0xa000;
const HIGH_PD: u64 = 0xb000;

/// A mode to start in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Mode {
    Real,
    Virtual8086,
    Protected16,
    Protected32,
    Paged32,
    Pae,
    Compatibility,
    Long,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 8] = [
        Mode::Real,
        Mode::Virtual8086,
        Mode::Protected16,
        Mode::Protected32,
        Mode::Paged32,
        Mode::Pae,
        Mode::Compatibility,
        Mode::Long,
    ];

    /// Bits of an instruction's default size.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 => 16,
            Mode::Long => 64,
            _ => 32,
        }
    }

    fn long(self) -> bool {
        matches!(self, Mode::Long | Mode::Compatibility)
    }

    fn paging(self) -> bool {
        matches!(self, Mode::Paged32 | Mode::Pae) || self.long()
    }
}

/// Writes all tables for `mode` and gives the state to start in, at privilege level 0 or 3, at [`CODE`].
pub fn start(machine: &Machine, mode: Mode, user: bool) -> CpuState {
    descriptors(machine, mode);
    interrupts(machine, mode);
    tasks(machine, mode);
    page_tables(machine);
    let mut state = CpuState::power_on(0, true, machine.model.signature());
    state.xcr0 = machine.model.xcr0_mask();
    state.xsave = vec![0; 832];
    state.xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    state.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    state.xsave[512] = 7;
    state.gpr = std::array::from_fn(|i| DATA + 0x1000 * i as u64);
    state.gpr[gpr::RCX] = 3;
    control(&mut state, mode);
    segments(&mut state, mode, user);
    tables(&mut state, mode);
    state
}

fn control(state: &mut CpuState, mode: Mode) {
    // OSFXSR, OSXMMEXCPT, OSXSAVE, PSE, PGE; PAE where it belongs.
    state.cr4 = 0x0004_0690;
    state.cr0 = 0x30;
    if mode != Mode::Real {
        state.cr0 |= 1;
    }
    if mode.paging() {
        state.cr0 |= 0x8001_0000;
        state.cr3 = match mode {
            Mode::Paged32 => PD32,
            Mode::Pae => PAE_PDPT,
            _ => PML4,
        };
    }
    if mode.long() || mode == Mode::Pae {
        state.cr4 |= 0x20;
        state.efer = if mode.long() { 0xd01 } else { 0x800 };
    }
    if mode == Mode::Virtual8086 {
        state.rflags = 2 | 1 << 17 | 3 << 12;
    }
}

fn segments(state: &mut CpuState, mode: Mode, user: bool) {
    let set = |state: &mut CpuState, code: Segment, data: Segment| {
        state.segments = [data; 6];
        state.segments[seg::CS] = code;
    };
    match mode {
        Mode::Real | Mode::Virtual8086 => {
            let (code, data) = if mode == Mode::Real { (0x9b, 0x93) } else { (0xf3, 0xf3) };
            set(state, Segment::real_mode(0x1000, code), Segment::real_mode(0x2000, data));
            state.segments[seg::SS] = Segment::real_mode(0x1800, data);
            (state.rip, state.gpr[gpr::RSP]) = (0, STACK - 0x1_8000);
            for register in [gpr::RBX, gpr::RBP, gpr::RSI, gpr::RDI] {
                state.gpr[register] &= 0xffff;
            }
        }
        _ => {
            let rpl = if user { 3 } else { 0 };
            let dpl = u32::from(rpl) << 5;
            let (cs, attributes) = match (mode.bits(), user) {
                (16, false) => (0x38, 0x809b),
                (16, true) => (0x48, 0x809b),
                (64, false) => (0x28, 0xa09b),
                (64, true) => (0x30, 0xa09b),
                (_, false) => (0x08, 0xc09b),
                (_, true) => (0x18, 0xc09b),
            };
            let data = if user { 0x20 } else { 0x10 };
            let segment = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
            set(state, segment(cs | rpl, attributes | dpl), segment(data | rpl, 0xc093 | dpl));
            (state.rip, state.gpr[gpr::RSP]) = (CODE, STACK);
        }
    }
}

fn tables(state: &mut CpuState, mode: Mode) {
    state.gdtr = DescriptorTable { base: GDT, limit: 0xff };
    state.idtr = match mode {
        Mode::Real => DescriptorTable { base: 0, limit: 0x3ff },
        _ => DescriptorTable { base: IDT, limit: if mode.long() { 0xfff } else { 0x7ff } },
    };
    state.tr = Segment { selector: 0x58, base: TSS, limit: 0x7ff, attributes: 0x8b };
    state.ldtr = Segment { selector: 0x68, base: LDT, limit: 0xff, attributes: 0x82 };
}

/// A descriptor of 8 bytes; `access` is its bits 55..40 with the limit's bits left out.
fn descriptor(base: u64, limit: u64, access: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// A gate of 8 bytes.
fn gate(selector: u64, offset: u64, kind: u64) -> u64 {
    offset & 0xffff | selector << 16 | kind << 40 | (offset >> 16 & 0xffff) << 48
}

fn descriptors(machine: &Machine, mode: Mode) {
    let code = if mode.long() { 0x28 } else { 0x08 };
    let entries = [
        (0x08, descriptor(0, 0xf_ffff, 0xc09b)),
        (0x10, descriptor(0, 0xf_ffff, 0xc093)),
        (0x18, descriptor(0, 0xf_ffff, 0xc0fb)),
        (0x20, descriptor(0, 0xf_ffff, 0xc0f3)),
        (0x28, descriptor(0, 0xf_ffff, 0xa09b)),
        (0x30, descriptor(0, 0xf_ffff, 0xa0fb)),
        (0x38, descriptor(0, 0xf_ffff, 0x809b)),
        (0x40, descriptor(0, 0xffff, 0x0093)),
        (0x48, descriptor(0, 0xf_ffff, 0x80fb)),
        (0x50, descriptor(0, 0xffff, 0x00f3)),
        (0x58, descriptor(TSS, 0x7ff, 0x008b)),
        (0x68, descriptor(LDT, 0xff, 0x0082)),
        (0x78, gate(code, HANDLERS, 0xec02)),
        (0x88, gate(0x90, 0, 0xe500)),
        (0x90, descriptor(OTHER_TSS, 0x67, 0x00e9)),
        (0xa0, descriptor(OTHER_TSS, 0x67, 0x00e1)),
        (0xb0, descriptor(0, 0xf_ffff, 0xc09f)),
        (0xb8, descriptor(0, 0xfff, 0xc0f7)),
        (0xc0, gate(0x38, HANDLERS & 0xfff, 0xe401)),
    ];
    for (at, entry) in entries {
        machine.write_u64(GDT + at, entry);
        machine.write_u64(LDT + at, entry);
    }
}

fn interrupts(machine: &Machine, mode: Mode) {
    for vector in 0..256 {
        // 1000:F000 is where the handlers are.
        machine.write(vector * 4, &0x1000_f000u32.to_le_bytes());
        let errors = matches!(vector, 8 | 10..=14 | 17);
        let handler = HANDLERS + if errors { 16 } else { 0 };
        if mode.long() {
            machine.write_u64(IDT + vector * 16, gate(0x28, handler, 0xee00 + (vector & 1) * 0x100));
        } else if vector == 8 || vector == 0x88 {
            machine.write_u64(IDT + vector * 8, gate(0x90, 0, 0xe500));
        } else {
            machine.write_u64(IDT + vector * 8, gate(0x08, handler, 0xee00 + (vector & 1) * 0x100));
        }
    }
    // IRET; and for those with an error code: take it away first.
    let (plain, errors): (&[u8], &[u8]) = if mode.long() {
        (&[0x48, 0xcf], &[0x48, 0x83, 0xc4, 8, 0x48, 0xcf])
    } else {
        (&[0xcf], &[0x83, 0xc4, 4, 0xcf])
    };
    machine.write(HANDLERS, plain);
    machine.write(HANDLERS + 16, errors);
}

fn tasks(machine: &Machine, mode: Mode) {
    if mode.long() {
        for at in [4, 12, 20] {
            machine.write_u64(TSS + at, STACK + 0x1000);
        }
        for at in (36..92).step_by(8) {
            machine.write_u64(TSS + at, STACK + 0x2000);
        }
        machine.write(TSS + 102, &[104, 0]);
        return;
    }
    let cr3 = if mode == Mode::Pae { PAE_PDPT } else { PD32 };
    for (task, stack) in [(TSS, STACK + 0x1000), (OTHER_TSS, STACK + 0x2000)] {
        let words = [
            (4, stack),
            (8, 0x10),
            (28, cr3),
            (32, CODE),
            (36, 2),
            (56, stack),
            (72, 0x10),
            (76, 0x08),
            (80, 0x10),
            (84, 0x10),
            (96, 0x68),
            (100, 0x68_0000),
        ];
        for (at, word) in words {
            machine.write(task + at, &(word as u32).to_le_bytes());
        }
    }
    machine.write(OTHER_TSS, &[0x58]);
}

fn page_tables(machine: &Machine) {
    const ALL: u64 = 7;
    machine.write_u64(PML4, PDPT | ALL);
    machine.write_u64(PML4 + 511 * 8, PDPT | ALL);
    machine.write_u64(PDPT, PD | ALL);
    machine.write_u64(PDPT + 3 * 8, HIGH_PD | ALL);
    machine.write_u64(PAE_PDPT, PD | 1);
    machine.write_u64(PAE_PDPT + 3 * 8, HIGH_PD | 1);
    machine.write_u64(PD, PT | ALL);
    machine.write_u64(PD + 8, 0x87);
    machine.write_u64(PD + 16, 0x20_0000 | 0x87);
    machine.write_u64(HIGH_PD + 503 * 8, 0xfee0_0087);
    let pages: Vec<u8> = (0..512u64).flat_map(|page| (page << 12 | ALL).to_le_bytes()).collect();
    machine.write(PT, &pages);
    let pages: Vec<u8> = (0..1024u32).flat_map(|page| (page << 12 | ALL as u32).to_le_bytes()).collect();
    machine.write(PT32, &pages);
    machine.write(PD32, &(PT32 as u32 | ALL as u32).to_le_bytes());
    machine.write(PD32 + 4, &0x87u32.to_le_bytes());
    machine.write(PD32 + 1019 * 4, &0xfec0_0087u32.to_le_bytes());
}
