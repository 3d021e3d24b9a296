//! Seeded cases: random descriptors and selectors under the operations that look at them.

use std::ops::Range;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::case::{Suite, Width};
use crate::layout::*;
use crate::protected::{self, SELECTORS, done};
use crate::rng::Rng;

type Emitted = Result<(), IcedError>;

/// What a case does with its selector.
#[derive(Clone, Copy, Debug)]
enum Action {
    Ds,
    Fs,
    Ss,
    Inspect,
    Jmp,
    Call,
    Retf,
    Iret,
    Lldt,
    Ltr,
}

const ACTIONS: [Action; 10] = [
    Action::Ds,
    Action::Fs,
    Action::Ss,
    Action::Inspect,
    Action::Jmp,
    Action::Call,
    Action::Retf,
    Action::Iret,
    Action::Lldt,
    Action::Ltr,
];

/// `selector`, unless the case would depend on a segment's limit, which the reference does not check.
pub(crate) fn usable(selector: u16) -> u16 {
    if matches!(selector | 3, 0x2b | 0x3b | 0xeb | 3) { sel::CODE32 } else { selector }
}

/// A descriptor with a present bias, code and data flat so that what is loaded can be used, systems' random.
pub(crate) fn descriptor(rng: &mut Rng, width: Width) -> u64 {
    let mut kind = rng.below(256);
    if rng.below(4) != 0 {
        kind |= 0x80;
    }
    if kind & 0x17 <= 7 && kind & 0x18 == 0 {
        // 16-bit system types: see the deviations.
        kind |= 8;
    }
    if matches!(kind & 0x1d, 9) {
        // No task is entered through memory that is no TSS.
        kind &= 0x7f;
    }
    if kind & 0x10 == 0 {
        let selector = usable(rng.pick(&SELECTORS));
        let (low, high) = (INNER + 0x100, rng.below(4));
        return low & 0xffff | u64::from(selector) << 16 | high << 32 | kind << 40 | (low >> 16) << 48;
    }
    let big = if width == Width::Long { rng.pick(&[0xa, 0xc]) } else { 0xc };
    // Expand-down segments of full size have no valid offset; the reference does not check that.
    if kind & 0x0c == 4 {
        kind &= !4;
    }
    crate::image::segment(0, 0xf_ffff, kind | big << 8)
}

fn act(a: &mut CodeAssembler, width: Width, action: Action, selector: u16, flags: i32) -> Emitted {
    let value = i32::from(selector);
    let target = INNER as i32 + 0x100;
    a.mov(eax, value)?;
    match action {
        Action::Ds => a.mov(ds, ax)?,
        Action::Fs => a.mov(fs, ax)?,
        Action::Ss => a.mov(ss, ax)?,
        Action::Lldt => a.lldt(ax)?,
        Action::Ltr => a.ltr(ax)?,
        Action::Inspect => protected::inspect(a)?,
        Action::Jmp | Action::Call => {
            a.push(value)?;
            a.push(value)?;
            // The pointer is target:selector whatever the width of a push.
            let pointer = if width == Width::Long { fword_ptr(rsp) } else { fword_ptr(esp) };
            if width == Width::Long {
                a.mov(dword_ptr(rsp), target)?;
                a.mov(word_ptr(rsp + 4), value)?;
            } else {
                a.mov(dword_ptr(esp), target)?;
            }
            if matches!(action, Action::Jmp) { a.jmp(pointer)? } else { a.call(pointer)? }
        }
        Action::Retf | Action::Iret => {
            a.push(i32::from(sel::USER_DATA))?;
            a.push(USER_STACK as i32)?;
            if matches!(action, Action::Iret) {
                a.push(flags)?;
            }
            a.push(value)?;
            a.push(target)?;
            match (action, width) {
                (Action::Retf, Width::Long) => a.db(&[0x48, 0xcb])?,
                (Action::Retf, _) => a.retf()?,
                (_, Width::Long) => a.iretq()?,
                (_, _) => a.iretd()?,
            }
        }
    }
    done(a)
}

/// The cases with these numbers.
pub(crate) fn suite(width: Width, seed: u64, cases: Range<usize>) -> anyhow::Result<Suite> {
    let mut s = Suite::new(width);
    for index in cases {
        let mut rng = Rng::of_case(seed, index);
        let (first, mut second) = (descriptor(&mut rng, width), descriptor(&mut rng, width));
        let free = [sel::FREE, sel::FREE + 8, sel::FREE | 3, (sel::FREE + 8) | 3];
        let selector = if rng.below(5) == 0 { usable(rng.pick(&SELECTORS)) } else { rng.pick(&free) };
        let action = rng.pick(&ACTIONS);
        let (kind, present) = (first >> 40 & 0x1f, first >> 47 & 1 != 0);
        let inspected = matches!(action, Action::Inspect) || !present;
        if width == Width::Long && (matches!(kind, 2 | 9 | 0xb) || kind == 0xc && inspected) {
            // The upper half of a 16-byte descriptor has type 0: see the deviations.
            second &= !(0x1f << 40);
        }
        let flags = rng.next() as i32 & 0x3cd5 | 2;
        let user = rng.below(2) == 1;
        let name = format!(
            "seed {seed} case {index}: {action:?} {selector:x} of {first:016x} {second:016x} cpl{}",
            u8::from(user) * 3
        );
        let prepare = |a: &mut CodeAssembler| {
            for (i, half) in [first, first >> 32, second, second >> 32].into_iter().enumerate() {
                a.mov(dword_ptr(GDT + u64::from(sel::FREE) + 4 * i as u64), half as u32 as i32)?;
            }
            Ok(())
        };
        let body = |a: &mut CodeAssembler| act(a, width, action, selector, flags);
        if !user {
            s.add(name, &|a| prepare(a).and_then(|()| body(a)))?;
            continue;
        }
        let inner = s.user_inner();
        s.add_inner(
            name,
            &|a| {
                prepare(a)?;
                match width {
                    Width::Real | Width::Protected => protected::to_user(a, sel::USER_CODE32, inner, 0),
                    Width::Long => crate::long::to_user(a, sel::USER_CODE64, inner, 0),
                }
            },
            (width.bits(), inner),
            &body,
        )?;
    }
    Ok(s)
}
