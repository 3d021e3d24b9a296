//! The system instructions of `ring0.rs`, with operands chosen so that both sides must treat them alike; what the
//! reference is known to do otherwise is left out here and named beside the step.

use crate::descriptors;
use crate::layout::*;
use crate::protected::SELECTORS;
use crate::ring0::{OPERAND, Paging, Ring0};
use crate::sequences;

/// A step and how often it is drawn.
type Step = (u64, fn(&mut Ring0<'_>));

const STEPS: [Step; 25] = [
    (4, control_register),
    (3, read_control_register),
    (3, cr4),
    (3, debug_register),
    (2, breakpoint),
    (2, table_register),
    (3, store_system),
    (3, system_selector),
    (4, msr),
    (3, small),
    (3, flags),
    (1, interrupt),
    (2, iret),
    (2, to_user),
    (1, syscall),
    (1, sysenter),
    (2, far_transfer),
    (4, segment_load),
    (4, inspect),
    (2, extended_control),
    (3, coprocessor),
    (3, page),
    (1, step_over_stack_switch),
    (2, branch),
    (1, base_instructions),
];

/// Appends a random step.
pub(crate) fn step(r: &mut Ring0<'_>) {
    if r.s.room() < 64 {
        return r.s.ordinary();
    }
    let total: u64 = STEPS.iter().map(|(weight, _)| weight).sum();
    let mut drawn = r.s.rng.below(total);
    for (weight, step) in STEPS {
        if drawn < weight {
            return step(r);
        }
        drawn -= weight;
    }
}

/// CR0, 2, 3, 8. Left out: NW without CD, paging switched off, alignment checks where CPL 3 may follow.
fn control_register(r: &mut Ring0<'_>) {
    let random = r.s.rng.next();
    let (number, value) = match r.s.rng.below(6) {
        0..=2 => {
            let mut value = 0x11 | random & 0x2e | random & 0x1_0000;
            if !r.may_leave {
                value |= random & 0x4_0000;
            }
            value |= [0, 0, 0x4000_0000, 0x6000_0000][(random >> 40) as usize & 3];
            if r.paging != Paging::Off {
                value |= 1 << 31;
            }
            (0, value)
        }
        3 => (2, if r.long() { random } else { random & 0xffff_ffff }),
        4 => {
            let root = match r.paging {
                Paging::Off => random & 0xffff_f000,
                Paging::Legacy => PD32,
                Paging::Pae => PDPT_PAE,
                Paging::Long => PML4,
            };
            (3, root | random & 0x18)
        }
        _ if r.long() => (8, random & 15),
        _ => return clts(r),
    };
    let mut code = r.load(0, value);
    if number == 8 {
        // MOV CR8, RAX.
        code.extend([0x44, 0x0f, 0x22, 0xc0]);
    } else {
        code.extend([0x0f, 0x22, 0xc0 | number << 3]);
    }
    r.put(&format!("mov cr{number} {value:x}"), &code);
}

fn clts(r: &mut Ring0<'_>) {
    r.put("clts", &[0x0f, 0x06]);
}

/// Any general register but the stack pointer.
fn register(r: &mut Ring0<'_>) -> u8 {
    r.s.rng.pick(&[0, 1, 2, 3, 5, 6, 7])
}

fn read_control_register(r: &mut Ring0<'_>) {
    let to = register(r);
    let number = r.s.rng.pick(&[0, 2, 3, 4]);
    if r.long() && r.s.rng.one_in(5) {
        r.put("mov from cr8", &[0x44, 0x0f, 0x20, 0xc0 | to]);
        return;
    }
    r.put(&format!("mov from cr{number}"), &[0x0f, 0x20, 0xc0 | number << 3 | to]);
}

/// CR4. Left out: what changes the meaning of the page tables in use, PCIDE, which the reference lacks, and
/// reserved bits, which it never gets past.
fn cr4(r: &mut Ring0<'_>) {
    // TSD, DE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP, OSXSAVE, SMEP, SMAP.
    let mut value = r.s.rng.next() & 0x34_0fcc;
    match r.paging {
        Paging::Off => value |= r.s.rng.next() & 0x30,
        Paging::Legacy => value |= 0x10,
        Paging::Pae => value |= 0x20,
        Paging::Long => value |= 0x20 | r.s.rng.next() & 0x1_0000,
    }
    let mut code = r.load(0, value);
    code.extend([0x0f, 0x22, 0xe0]);
    r.put(&format!("mov cr4 {value:x}"), &code);
}

/// DR0 to 7 without enabling anything. Left out: DR7.GD and DR6 bit 12.
fn debug_register(r: &mut Ring0<'_>) {
    let to = register(r);
    let mut number = r.s.rng.pick(&[0, 1, 2, 3, 6, 7]);
    if r.s.rng.one_in(3) {
        r.put(&format!("mov from dr{number}"), &[0x0f, 0x21, 0xc0 | number << 3 | to]);
        return;
    }
    let random = r.s.rng.next();
    let value = match number {
        6 => random & 0xe00f,
        7 => random & 0xffff_0300,
        _ if r.long() => random,
        _ => random & 0xffff_ffff,
    };
    if matches!(number, 6 | 7) && r.s.rng.one_in(4) {
        // DR4 and DR5 are DR6 and DR7, or undefined with CR4.DE.
        number -= 2;
    }
    let mut code = r.load(0, value);
    code.extend([0x0f, 0x23, 0xc0 | number << 3]);
    r.put(&format!("mov dr{number} {value:x}"), &code);
}

/// A breakpoint on data and an access that meets it or does not. It is on a page of its own and the access is
/// aligned: the reference makes an unaligned access to a watched page of two aligned ones, which meet too much.
fn breakpoint(r: &mut Ring0<'_>) {
    let random = r.s.rng.next();
    let number = random & 3;
    let at = LDT + 0x800 + (random >> 8 & 0x38);
    let length = r.s.rng.pick(&[0_u64, 1, 3]);
    let kind = r.s.rng.pick(&[1_u64, 3]);
    let control = 0x400 | 1 << (number * 2 + (random >> 16 & 1)) | (kind | length << 2) << (16 + number * 4);
    let mut code = r.load(0, at);
    code.extend([0x0f, 0x23, 0xc0 | (number as u8) << 3]);
    code.extend(r.load(0, control));
    code.extend([0x0f, 0x23, 0xf8]);
    let touched = at.wrapping_add(random >> 24 & 0xc).wrapping_sub(4);
    let (opcode, name): (&[u8], _) = match random >> 32 & 3 {
        0 => (&[0x8b], "read"),
        1 => (&[0x89], "write"),
        _ => (&[0x88], "write byte"),
    };
    code.extend(r.absolute(opcode, 1, touched));
    code.push(0x90);
    r.put(&format!("breakpoint {control:x} {name}"), &code);
}

/// LGDT and LIDT with the usual bases and limits that leave enough.
fn table_register(r: &mut Ring0<'_>) {
    let long = r.long();
    let idt = r.s.rng.one_in(2);
    let (base, limits) = match (idt, long) {
        // With the free descriptor, whole, or without.
        (false, _) => (GDT, [0x13f, 0x10f, 0x97]),
        // All vectors in use are there: the reference's error code for an interrupt behind the limit is wrong.
        (true, true) => (IDT, [0xfff, 0x5ff, 0x4ff]),
        (true, false) => (IDT, [0xfff, 0x20f, 0xff]),
    };
    let limit = r.s.rng.pick(&limits);
    let mut code = r.store(OPERAND, limit | (base as u32) << 16);
    code.extend(r.store(OPERAND + 4, (base >> 16) as u32));
    if long {
        code.extend(r.store(OPERAND + 8, 0));
    }
    code.extend(r.absolute(&[0x0f, 0x01], if idt { 3 } else { 2 }, OPERAND));
    r.put(&format!("{} {limit:x}", if idt { "lidt" } else { "lgdt" }), &code);
}

/// SGDT, SIDT, SLDT, STR, SMSW.
fn store_system(r: &mut Ring0<'_>) {
    let to = register(r);
    let at = r.s.place.scratch.start + 0x100 + r.s.rng.below(0x800);
    let wide = r.s.rng.one_in(2);
    let (tag, opcode, field): (_, [u8; 2], u8) = r.s.rng.pick(&[
        ("sgdt", [0x0f, 0x01], 0),
        ("sidt", [0x0f, 0x01], 1),
        ("sldt", [0x0f, 0x00], 0),
        ("str", [0x0f, 0x00], 1),
        ("smsw", [0x0f, 0x01], 4),
    ]);
    let memory = matches!(tag, "sgdt" | "sidt") || r.s.rng.one_in(2);
    let mut code = if wide { vec![0x66] } else { Vec::new() };
    if memory && at <= i32::MAX as u64 {
        code.extend(r.absolute(&opcode, field, at));
    } else if matches!(tag, "sgdt" | "sidt") {
        return;
    } else {
        code.extend([opcode[0], opcode[1], 0xc0 | field << 3 | to]);
    }
    r.put(tag, &code);
}

fn selector(r: &mut Ring0<'_>) -> u16 {
    descriptors::usable(r.s.rng.pick(&SELECTORS))
}

/// Writes a random descriptor and returns a selector, usually its own. `set` are bits that it has.
fn described(r: &mut Ring0<'_>, code: &mut Vec<u8>, set: u64) -> u16 {
    if r.s.rng.one_in(3) {
        return selector(r);
    }
    let width = if r.long() { crate::Width::Long } else { crate::Width::Protected };
    let mut raw = descriptors::descriptor(r.s.rng, width);
    if raw >> 44 & 1 != 0 {
        raw |= set;
    }
    let at = GDT + u64::from(sel::FREE);
    code.extend(r.store(at, raw as u32));
    code.extend(r.store(at + 4, (raw >> 32) as u32));
    let rpl = if r.s.rng.one_in(4) { 3 } else { 0 };
    sel::FREE | rpl
}

/// LLDT and LTR. Left out: a null TR, which the reference takes.
fn system_selector(r: &mut Ring0<'_>) {
    let mut code = Vec::new();
    let mut selector = described(r, &mut code, 0);
    let ltr = r.s.rng.one_in(2);
    if ltr && selector <= 3 {
        selector = sel::TSS;
    }
    code.extend(r.load(0, selector.into()));
    code.extend([0x0f, 0x00, if ltr { 0xd8 } else { 0xd0 }]);
    r.put(&format!("{} {selector:x}", if ltr { "ltr" } else { "lldt" }), &code);
}

/// RDMSR and WRMSR of architectural registers. Left out: values with reserved or non-canonical bits, which the
/// reference takes.
fn msr(r: &mut Ring0<'_>) {
    let long = r.long();
    let random = r.s.rng.next();
    let address = (random as i64 >> 17) as u64;
    let pick: &[(u32, u64)] = &[
        (0x174, random & 0xffff),
        // Not more than 32 bits, as on processors of AMD.
        (0x175, random & 0xffff_ffff),
        (0x176, random & 0xffff_ffff),
        (0xc000_0081, random),
        (0xc000_0082, address),
        (0xc000_0083, address),
        (0xc000_0084, random & 0xffff_ffff),
        (0xc000_0100, address),
        (0xc000_0101, address),
        (0xc000_0102, address),
        (0xc000_0103, random & 0xffff_ffff),
        (0xc000_0080, 0xd00 | random & 0x801),
        (0x277, pat(random)),
    ];
    let (number, value) = if long {
        r.s.rng.pick(pick)
    } else {
        let (number, value) = r.s.rng.pick(&pick[..3]);
        if r.s.rng.one_in(4) {
            let lme = if r.paging == Paging::Off { random & 0x100 } else { 0 };
            (0xc000_0080, random & 0x801 | lme)
        } else {
            (number, value & 0xffff_ffff)
        }
    };
    let mut code = r.load(1, number.into());
    if r.s.rng.one_in(4) {
        code.extend([0x0f, 0x32]);
        r.put(&format!("rdmsr {number:x}"), &code);
        return;
    }
    code.extend(r.load(0, value & 0xffff_ffff));
    code.extend(r.load(2, value >> 32));
    code.extend([0x0f, 0x30]);
    if r.put(&format!("wrmsr {number:x} {value:x}"), &code) {
        forget_bases(r);
    }
}

/// Memory operands no longer go through FS and GS.
fn forget_bases(r: &mut Ring0<'_>) {
    r.s.bases[4] = None;
    r.s.bases[5] = None;
}

/// Eight valid memory types.
fn pat(random: u64) -> u64 {
    (0..8).fold(0, |value, i| value | [0, 1, 4, 5, 6, 7][(random >> (i * 5) & 31) as usize % 6] << (i * 8))
}

/// Instructions without much choice.
fn small(r: &mut Ring0<'_>) {
    let status = r.s.rng.next() as u8 & 0x0f;
    let lmsw = [0xb8, status, 0, 0, 0, 0x0f, 0x01, 0xf0];
    let window = WINDOW as u32 | r.s.rng.next() as u32 & 0xfff;
    let invlpg = r.absolute(&[0x0f, 0x01], 7, window.into());
    let codes: [(&str, &[u8]); 12] = [
        ("clts", &[0x0f, 0x06]),
        ("lmsw", &lmsw),
        ("invlpg", &invlpg),
        ("wbinvd", &[0x0f, 0x09]),
        ("cli", &[0xfa]),
        ("sti", &[0xfb]),
        ("sti; cli", &[0xfb, 0xfa]),
        ("cld", &[0xfc]),
        ("std", &[0xfd]),
        ("swapgs", &[0x0f, 0x01, 0xf8]),
        ("ud2", &[0x0f, 0x0b]),
        ("lahf", &[0x9f]),
    ];
    let (name, code) = r.s.rng.pick(&codes);
    if name == "ud2" && !r.s.rng.one_in(4) {
        return;
    }
    if r.put(name, code) && name == "swapgs" {
        forget_bases(r);
    }
}

/// POPF of random flags, TF now and then.
fn flags(r: &mut Ring0<'_>) {
    let mut value = r.s.rng.next() as u32 & 0x24_7fd7;
    if !r.s.rng.one_in(8) {
        value &= !0x100;
    }
    let mut code = r.push(value);
    // Single-stepped instructions have defined flags.
    code.extend([0x9d, 0x90, 0x9c]);
    r.put(&format!("popf {value:x}"), &code);
}

/// INT n, INT3, INTO. Left out: INT1, which the reference does not know.
fn interrupt(r: &mut Ring0<'_>) {
    if !r.s.rng.one_in(2) {
        return;
    }
    // With an error code of its own meaning in the reference's 64-bit mode: gates that cannot be used.
    let vector = r.s.rng.below(0x4c) as u8;
    if vector == 8 {
        return;
    }
    let codes: [(&str, &[u8]); 3] =
        [("int3", &[0xcc]), ("into", &[0xce]), (&format!("int {vector:x}"), &[0xcd, vector])];
    let (name, code) = r.s.rng.pick(&codes);
    // A software interrupt of CPL 3 through a closed gate has an error code, which the reference gets wrong in
    // 64-bit mode.
    if !(r.long() && r.left) {
        r.put(name, code);
    }
}

/// IRET to the next instruction.
fn iret(r: &mut Ring0<'_>) {
    if r.left {
        return;
    }
    let flags = r.s.rng.next() as u32 & 0x24_3ed7;
    let tag = format!("iret {flags:x}");
    let frame = if r.long() {
        [r.push(sel::DATA.into()), r.push(CASE_STACK as u32 - 0x100)].concat()
    } else {
        Vec::new()
    };
    let tail: &[u8] = if r.long() { &[0x48, 0xcf] } else { &[0xcf] };
    let code = if r.long() { sel::CODE64 } else { sel::CODE32 };
    let code = [frame, r.push(flags), r.push(code.into())].concat();
    let next = r.s.ip() + (code.len() + 5 + tail.len()) as u64;
    r.put(&tag, &[&code[..], &r.push(next as u32), tail].concat());
}

/// IRET, RETF, SYSRET or SYSEXIT to CPL 3, where the sequence goes on.
fn to_user(r: &mut Ring0<'_>) {
    if r.left || !r.may_leave {
        return;
    }
    let shift = r.user_shift();
    let stack = shift + USER_STACK;
    let long = r.long();
    let selector = if long { sel::USER_CODE64 } else { sel::USER_CODE32 };
    let flags = r.s.rng.next() as u32 & 0x3cd7;
    let kind = r.s.rng.below(if long { 4 } else { 3 });
    // AC, which the reference leaves as it is, is off.
    let mut code = [r.push(2), vec![0x9d]].concat();
    let (name, head, tail) = match kind {
        0 => {
            let head =
                [r.push(sel::USER_DATA.into()), r.push_wide(stack), r.push(flags), r.push(selector.into())];
            ("iret to cpl3", head.concat(), if long { vec![0x48, 0xcf] } else { vec![0xcf] })
        }
        1 => {
            let head = [r.push(sel::USER_DATA.into()), r.push_wide(stack), r.push(selector.into())];
            ("retf to cpl3", head.concat(), if long { vec![0x48, 0xcb] } else { vec![0xcb] })
        }
        2 => {
            // SYSEXIT: CS is IA32_SYSENTER_CS + 16 or 32.
            let base = r.s.rng.pick(&[sel::CODE32, sel::DATA, sel::CODE64]);
            let head = [write_msr(r, 0x174, base.into()), r.load(1, stack)];
            ("sysexit", head.concat(), if long { vec![0x48, 0x0f, 0x35] } else { vec![0x0f, 0x35] })
        }
        _ => {
            // No carry out of the selector, which the reference keeps.
            let star = r.s.rng.next() & 0x7ff8 | 3;
            let head = [
                write_msr(r, 0xc000_0081, star << 48),
                write_msr(r, 0xc000_0080, 0xd01),
                vec![0x41, 0xbb],
                flags.to_le_bytes().to_vec(),
            ];
            ("sysret", head.concat(), vec![0x48, 0x0f, 0x07])
        }
    };
    code.extend(head);
    let target = |next: u64| match kind {
        0 | 1 => r.push_wide(next),
        2 => r.load(2, next),
        _ => r.load(1, next),
    };
    // The length does not depend on the value, which is known to be large or small.
    let length = target(r.s.ip() + shift).len();
    let next = r.s.ip() + (code.len() + length + tail.len()) as u64 + shift;
    let code = [&code[..], &target(next), &tail].concat();
    if r.s.room() > code.len() + 20 && r.put(name, &code) {
        r.leave();
    }
}

fn write_msr(r: &Ring0<'_>, number: u32, value: u64) -> Vec<u8> {
    [r.load(1, number.into()), r.load(0, value & 0xffff_ffff), r.load(2, value >> 32), vec![0x0f, 0x30]]
        .concat()
}

/// SYSCALL to the next instruction, with random selectors and mask.
fn syscall(r: &mut Ring0<'_>) {
    if r.left || !r.long() {
        return r.s.ordinary();
    }
    let star = (r.s.rng.next() & 0xfffc) << 32;
    let mask = r.s.rng.next() & 0x4_7fd7;
    let mut code = write_msr(r, 0xc000_0081, star);
    code.extend(write_msr(r, 0xc000_0084, mask));
    let entry = write_msr(r, 0xc000_0082, 0);
    // CMP EAX, EAX and CLD: the reference loses the arithmetic flags and DF.
    let tail = [0x0f, 0x05, 0x39, 0xc0, 0xfc];
    let next = r.s.ip() + (code.len() + entry.len() + 2) as u64;
    code.extend(write_msr(r, 0xc000_0082, next));
    code.extend(tail);
    r.put(&format!("syscall star {star:x} mask {mask:x}"), &code);
}

/// SYSENTER to the next instruction.
fn sysenter(r: &mut Ring0<'_>) {
    if r.left {
        return r.s.ordinary();
    }
    let cs = r.s.rng.pick(&[sel::CODE32, sel::CODE64, 0x1000]);
    let mut code = write_msr(r, 0x174, cs.into());
    code.extend(write_msr(r, 0x175, CASE_STACK - 0x80));
    let entry = write_msr(r, 0x176, 0);
    let next = r.s.ip() + (code.len() + entry.len() + 2) as u64;
    code.extend(write_msr(r, 0x176, next));
    code.extend([0x0f, 0x34]);
    r.put(&format!("sysenter {cs:x}"), &code);
}

/// JMP or CALL through a pointer, RETF: to what ends a case, whatever the selector.
fn far_transfer(r: &mut Ring0<'_>) {
    let mut code = Vec::new();
    // The reference does not mark code segments as accessed.
    let selector = described(r, &mut code, 1 << 40);
    let target = r.user_shift() * u64::from(r.left) + INNER + 0x100;
    if r.left {
        return;
    }
    let name = match r.s.rng.below(3) {
        0 => {
            code.extend(r.push(sel::USER_DATA.into()));
            code.extend(r.push(USER_STACK as u32));
            code.extend(r.push(selector.into()));
            code.extend(r.push(target as u32));
            code.extend(if r.long() { &[0x48, 0xcb][..] } else { &[0xcb] });
            "retf"
        }
        kind => {
            // PUSHF and POPF: the reference saves flags of an earlier instruction when it switches tasks.
            code.extend([0x9c, 0x9d]);
            code.extend(r.store(OPERAND, target as u32));
            code.extend(r.store(OPERAND + 4, selector.into()));
            code.extend(r.absolute(&[0xff], if kind == 1 { 5 } else { 3 }, OPERAND));
            if kind == 1 { "jmp far" } else { "call far" }
        }
    };
    r.put(&format!("{name} {selector:x}"), &code);
    r.ended = true;
}

/// Loads of DS, ES, SS, FS, GS; the first three get their usual segments back.
fn segment_load(r: &mut Ring0<'_>) {
    let mut code = Vec::new();
    let mut selector = described(r, &mut code, 0);
    let number = r.s.rng.pick(&[0, 2, 3, 4, 5]);
    if r.long() && number == 2 && matches!(selector, 1..=3) {
        // The reference takes any RPL.
        selector = 0;
    }
    code.extend(r.load(0, selector.into()));
    code.extend([0x8e, 0xc0 | number << 3]);
    if !r.left && number < 4 {
        code.extend(r.load(0, sel::DATA.into()));
        code.extend([0x8e, 0xc0 | number << 3]);
    } else if number < 4 {
        code.extend(r.load(0, sel::USER_DATA.into()));
        code.extend([0x8e, 0xc0 | number << 3]);
    }
    if r.put(&format!("mov sreg{number} {selector:x}"), &code) && number >= 4 {
        r.s.bases[usize::from(number)] = None;
    }
}

/// LAR, LSL, VERR, VERW.
fn inspect(r: &mut Ring0<'_>) {
    let mut code = Vec::new();
    let mut selector = described(r, &mut code, 0);
    if selector & !3 == sel::TSS2 {
        selector = sel::TSS;
    }
    code.extend(r.load(0, selector.into()));
    // In 64-bit mode the upper half of a system descriptor has type 0 here: the reference ignores it.
    if r.long() {
        code.extend(r.store(GDT + u64::from(sel::FREE) + 12, 0));
    }
    let what = r.s.rng.below(4);
    code.extend(match what {
        // LAR EBX, EAX; its bits 19:16 are undefined.
        0 => vec![0x0f, 0x02, 0xd8, 0x81, 0xe3, 0x00, 0xff, 0xf0, 0x00],
        1 => vec![0x0f, 0x03, 0xd8],
        2 => vec![0x0f, 0x00, 0xe0],
        _ => vec![0x0f, 0x00, 0xe8],
    });
    // PUSHF keeps ZF.
    code.push(0x9c);
    r.put(&format!("{} {selector:x}", ["lar", "lsl", "verr", "verw"][what as usize]), &code);
}

/// XGETBV and XSETBV.
fn extended_control(r: &mut Ring0<'_>) {
    let number = if r.s.rng.one_in(6) { 2 } else { 0 };
    let mut code = r.load(1, number);
    if r.s.rng.one_in(3) {
        code.extend([0x0f, 0x01, 0xd0]);
        r.put(&format!("xgetbv {number}"), &code);
        return;
    }
    let value = r.s.rng.pick(&[1, 3, 7, 3, 7, 0, 2, 5, 6]);
    code.extend(r.load(0, value));
    code.extend(r.load(2, 0));
    code.extend([0x0f, 0x01, 0xd1]);
    r.put(&format!("xsetbv {number} {value}"), &code);
}

/// Instructions that CR0.EM, MP, TS, CR4.OSFXSR, OSXSAVE and XCR0 stop. Left out: EMMS, which nothing stops in the
/// reference.
fn coprocessor(r: &mut Ring0<'_>) {
    let codes: [(&str, &[u8]); 8] = [
        ("fninit", &[0xdb, 0xe3]),
        ("fnop", &[0xd9, 0xd0]),
        ("wait", &[0x9b]),
        ("fnstsw", &[0xdf, 0xe0]),
        ("xorps", &[0x0f, 0x57, 0xc0]),
        ("pause", &[0xf3, 0x90]),
        ("vzeroupper", &[0xc5, 0xf8, 0x77]),
        ("sfence", &[0x0f, 0xae, 0xf8]),
    ];
    let (name, code) = r.s.rng.pick(&codes);
    r.put(name, code);
}

/// Changes the window's page-table entry and reads, writes or runs what it maps. Left out: reserved bits, for
/// which the reference has another error code.
fn page(r: &mut Ring0<'_>) {
    if r.paging == Paging::Off || r.left {
        return;
    }
    let random = r.s.rng.next();
    let present = u64::from(!r.s.rng.one_in(8));
    let entry = DATA | random & 0xf66 | present;
    let table = if r.paging == Paging::Legacy { PT32 } else { PT_WINDOW };
    let mut code = r.store(table, entry as u32);
    if r.long() {
        // NX and ignored bits.
        code.extend(r.store(table + 4, (random >> 32) as u32 & 0x8000_0000));
    }
    code.extend(r.absolute(&[0x0f, 0x01], 7, WINDOW));
    let at = WINDOW + 0x100 + (random >> 16 & 0x7f8);
    let name = match r.s.rng.below(3) {
        0 => {
            code.extend(r.absolute(&[0x8b], 1, at));
            "read"
        }
        1 => {
            // Not read first: the reference takes the page fault of the reading half.
            code.extend(r.absolute(&[0x89], 1, at));
            "write"
        }
        _ => {
            // INT 41h there.
            code.extend(r.store(DATA + 0x80, 0x9090_41cd));
            code.extend(r.load(0, WINDOW + 0x80));
            code.extend([0xff, 0xe0]);
            r.ended = true;
            "run"
        }
    };
    r.put(&format!("pte {entry:x} {name}"), &code);
}

/// A single step that the loading of SS delays.
fn step_over_stack_switch(r: &mut Ring0<'_>) {
    if r.left {
        return;
    }
    let mut code = r.load(0, sel::DATA.into());
    code.extend(r.push(0x102));
    code.extend([0x9d, 0x8e, 0xd0, 0x90, 0x90]);
    r.put("step over mov ss", &code);
}

fn branch(r: &mut Ring0<'_>) {
    match r.s.rng.below(3) {
        0 => sequences::branch(&mut r.s),
        1 => sequences::string(&mut r.s),
        _ if r.long() => r.s.ordinary(),
        _ => sequences::frame(&mut r.s),
    }
}

/// RDFSBASE to WRGSBASE, which CR4.FSGSBASE allows, of canonical addresses.
fn base_instructions(r: &mut Ring0<'_>) {
    if !r.long() {
        return;
    }
    let value = (r.s.rng.next() as i64 >> 17) as u64;
    let which = r.s.rng.below(4) as u8;
    let mut code = r.load(0, value);
    code.extend([0xf3, 0x48, 0x0f, 0xae, 0xc0 | which << 3]);
    if r.put(&format!("base instruction {which}"), &code) {
        forget_bases(r);
    }
}
