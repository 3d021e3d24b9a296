//! Differences that are no defect, each with its reason. Everything here is something that the architecture
//! leaves open and on which processors are known to differ; the table stays short.

use iced_x86::{Instruction, Mnemonic, Register};

use crate::case::{After, Case, Mode};
use crate::compare;
use crate::layout;

/// A byte of memory that differs: address, host's, guest's.
pub type Byte = (u64, u8, u8);

/// The reasons.
pub const REASONS: [&str; 15] = [
    "flags that BCD instructions leave undefined",
    "which of its faults a failing far transfer reports",
    "stack base of a far call that enters 64-bit code",
    "MXCSR_MASK, which the host's misaligned-SSE bit changes",
    "MXCSR bits that the model does not have",
    "which fault and which byte of a long or masked operand is reported",
    "when the processor notices that bytes at the end of a page are no instruction",
    "whether the x87 opcode is kept after an instruction without an exception",
    "MXCSR_MASK and x87 opcode in one image",
    "canonical check of an FS or GS offset before the base is added",
    "alignment checks of long or masked operands",
    "faults at bytes that a mask leaves out",
    "width of what a far call with REX.W pushes",
    "VEX.W of double-word moves outside 64-bit mode",
    "flags after a repeated comparison that faults",
];

/// The reason (an index into [`REASONS`]) for which the two states may differ after executing `path`, whose
/// last instruction is the one that ended the case.
pub fn reason(
    case: &Case,
    host: &After,
    guest: &After,
    memory: &[Byte],
    path: &[Instruction],
) -> Option<usize> {
    let last = path.last()?;
    let before = path.len().checked_sub(2).and_then(|i| path.get(i)).unwrap_or(last);
    let rules: [&dyn Fn() -> bool; REASONS.len()] = [
        &|| decimal_flags(case, host, guest, memory, path),
        &|| is_far(last) && both_refused(host, guest),
        &|| enters_long(case, host, guest) && (is_far(last) || is_far(before)),
        &|| only_mask(memory) && uses(path, FXSAVE) && compare::agree(case, host, guest),
        &|| host.vectors.0[26] & 2 != 0 && uses(path, MXCSR_LOADS),
        &|| (uses(&path[path.len() - 1..], LONG_OPERANDS) || at_end(host)) && memory_faults(host, guest),
        &|| {
            last.is_invalid()
                && (fetches(host) && guest.trap.vector == 6 || host.trap.vector == 6 && fetches(guest))
        },
        &|| only_opcode(memory) && uses(path, IMAGES) && compare::agree(case, host, guest),
        &|| {
            memory.len() <= 3
                && uses(path, FXSAVE)
                && compare::agree(case, host, guest)
                && memory.iter().all(|b| b.2 == 0)
                && memory.last().is_some_and(|b| only_mask(&[*b]))
        },
        &|| {
            case.mode == Mode::Long
                && host.trap.vector == 13
                && matches!(guest.trap.vector, 14 | 17)
                && has_base(last)
        },
        &|| {
            (host.trap.vector == 17 && (uses(path, LONG_OPERANDS)))
                || (guest.trap.vector == 17 && uses(&[*last], MASKED))
        },
        &|| matches!(host.trap.vector, 12..=14) && uses(path, MASKED_BYTES),
        &|| {
            case.mode == Mode::Long
                && (is_far(last) || is_far(before))
                && host.gpr[4].wrapping_add(8) == guest.gpr[4]
        },
        &|| case.mode != Mode::Long && host.trap.vector == 6 && uses(path, WIDTH_BY_W),
        &|| {
            memory.is_empty()
                && host.trap.vector == 14
                && repeated_comparison(last)
                && but_for_flags(case, host, guest)
        },
    ];
    rules.iter().position(|rule| rule())
}

const FXSAVE: &[Mnemonic] = &[Mnemonic::Fxsave, Mnemonic::Fxsave64];
const MXCSR_LOADS: &[Mnemonic] =
    &[Mnemonic::Ldmxcsr, Mnemonic::Vldmxcsr, Mnemonic::Fxrstor, Mnemonic::Fxrstor64];
/// Loaded and stored in parts, in an order of the processor's own.
const LONG_OPERANDS: &[Mnemonic] = &[
    Mnemonic::Fxsave,
    Mnemonic::Fxsave64,
    Mnemonic::Fxrstor,
    Mnemonic::Fxrstor64,
    Mnemonic::Fnsave,
    Mnemonic::Frstor,
    Mnemonic::Fnstenv,
    Mnemonic::Fldenv,
    Mnemonic::Maskmovq,
    Mnemonic::Maskmovdqu,
    Mnemonic::Vmaskmovdqu,
    Mnemonic::Fld,
    Mnemonic::Fstp,
    Mnemonic::Fbld,
    Mnemonic::Fbstp,
    Mnemonic::Bound,
];
/// Images with the last x87 opcode.
const IMAGES: &[Mnemonic] = &[Mnemonic::Fxsave, Mnemonic::Fxsave64, Mnemonic::Fnsave, Mnemonic::Fnstenv];

const MASKED_BYTES: &[Mnemonic] = &[Mnemonic::Maskmovq, Mnemonic::Maskmovdqu, Mnemonic::Vmaskmovdqu];
const MASKED: &[Mnemonic] = &[
    Mnemonic::Vmaskmovps,
    Mnemonic::Vmaskmovpd,
    Mnemonic::Vpmaskmovd,
    Mnemonic::Vpmaskmovq,
    Mnemonic::Vgatherdps,
    Mnemonic::Vgatherdpd,
    Mnemonic::Vgatherqps,
    Mnemonic::Vgatherqpd,
    Mnemonic::Vpgatherdd,
    Mnemonic::Vpgatherdq,
    Mnemonic::Vpgatherqd,
    Mnemonic::Vpgatherqq,
];

/// VEX.W = 1 would make them quad-word moves; Intel ignores it, AMD raises #UD.
const WIDTH_BY_W: &[Mnemonic] = &[Mnemonic::Vpinsrd, Mnemonic::Vpextrd];

fn has_base(instruction: &Instruction) -> bool {
    matches!(instruction.memory_segment(), Register::FS | Register::GS)
}

/// A page fault of an instruction fetch.
fn fetches(after: &After) -> bool {
    after.trap.vector == 14 && after.trap.error_code & 0x10 != 0
}

fn uses(path: &[Instruction], any: &[Mnemonic]) -> bool {
    path.iter().any(|i| any.contains(&i.mnemonic()))
}

/// BCD instructions (not in 64-bit mode, so that the host cannot execute them for the interpreter) define only
/// some flags (Intel SDM vol. 2).
pub fn undefined_by(mnemonic: Mnemonic) -> u64 {
    const CF: u64 = 1;
    const PF: u64 = 1 << 2;
    const AF: u64 = 1 << 4;
    const ZF: u64 = 1 << 6;
    const SF: u64 = 1 << 7;
    const OF: u64 = 1 << 11;
    match mnemonic {
        Mnemonic::Aaa | Mnemonic::Aas => OF | SF | ZF | PF,
        Mnemonic::Aam | Mnemonic::Aad => OF | AF | CF,
        Mnemonic::Daa | Mnemonic::Das => OF,
        _ => 0,
    }
}

/// CMPS or SCAS with a prefix: processors restore the flags of before the instruction (Intel SDM vol. 2, REP) or
/// leave those of the last comparison, the same processor now the one and now the other.
fn repeated_comparison(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let compares = matches!(
        instruction.mnemonic(),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
    );
    repeated && compares
}

fn but_for_flags(case: &Case, host: &After, guest: &After) -> bool {
    const ARITHMETIC: u64 = 0x8d5;
    let mut same = guest.clone();
    same.rflags = guest.rflags & !ARITHMETIC | host.rflags & ARITHMETIC;
    compare::agree(case, host, &same)
}

/// Whether nothing may follow an instruction in a generated case.
pub fn must_be_last(mnemonic: Mnemonic) -> bool {
    undefined_by(mnemonic) != 0 || IMAGES.contains(&mnemonic)
}

fn decimal_flags(case: &Case, host: &After, guest: &After, memory: &[Byte], path: &[Instruction]) -> bool {
    let plain = memory.is_empty() || only_opcode(memory) && uses(path, IMAGES);
    let undefined = path.iter().fold(0, |flags, i| flags | undefined_by(i.mnemonic()));
    let mut same = guest.clone();
    same.rflags = guest.rflags & !undefined | host.rflags & undefined;
    let compared = path.iter().position(|i| undefined_by(i.mnemonic()) != 0);
    // Generated cases end with such an instruction; flipped bits and jumps can put others after it.
    let goes_on = compared.and_then(|at| path.get(at + 1)).is_some_and(|i| i.mnemonic() != Mnemonic::Int3);
    undefined != 0 && (goes_on || plain && compare::agree(case, host, &same))
}

fn is_far(instruction: &Instruction) -> bool {
    let code = instruction.code();
    code.is_jmp_far()
        || code.is_call_far()
        || code.is_jmp_far_indirect()
        || code.is_call_far_indirect()
        || instruction.mnemonic() == Mnemonic::Retf
}

fn both_refused(host: &After, guest: &After) -> bool {
    let refused = |after: &After| matches!(after.trap.vector, 10..=14 | 17);
    refused(host) && refused(guest) && host.rip == guest.rip && host.gpr == guest.gpr
}

/// The host pushes the return address after the change of mode, when SS has no base any more.
fn enters_long(case: &Case, host: &After, guest: &After) -> bool {
    let long = |after: &After| after.selectors[1] == layout::USER_CODE64;
    case.mode != Mode::Long && (long(host) || long(guest)) && layout::loaded(case.selectors[2]).base != 0
}

/// Byte 30 of the 16-byte aligned area, where bit 17 is.
fn only_mask(memory: &[Byte]) -> bool {
    matches!(memory, [(address, 2, 0)] if address % 16 == 14)
}

/// Two adjacent bytes that the guest left zero.
fn only_opcode(memory: &[Byte]) -> bool {
    match memory {
        [(_, _, 0)] => true,
        [(first, _, 0), (second, _, 0)] => *second == first + 1,
        _ => false,
    }
}

/// The last bytes that a program can address.
fn at_end(host: &After) -> bool {
    host.trap.vector == 14 && (0x7fff_ffff_f000..0x8000_0000_0000).contains(&host.trap.address)
}

fn memory_faults(host: &After, guest: &After) -> bool {
    let (h, g) = (&host.trap, &guest.trap);
    let refused = |vector: u64| (12..=14).contains(&vector);
    // At the end of the canonical addresses the first part faults before the last one is refused.
    // 16-bit addresses wrap between the parts.
    let distance = h.address.wrapping_sub(g.address).wrapping_add(512) & 0xffff;
    let near = h.vector != 14 || g.vector != 14 || distance < 1024;
    refused(h.vector) && refused(g.vector) && host.rip == guest.rip && near
}
