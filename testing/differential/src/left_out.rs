//! Written cases of what the seeded sequences leave out because the reference is known to do it otherwise (see
//! `deviations.rs`): only the expectation in the text speaks for these.

use iced_x86::code_asm::*;

use crate::case::Suite;
use crate::layout::*;
use crate::protected::done;

/// In 32-bit protected mode.
pub(crate) fn protected(s: &mut Suite) -> anyhow::Result<()> {
    s.add("far jump marks a code segment accessed", &|a| {
        let descriptor = GDT + u64::from(sel::CONFORMING);
        a.and(byte_ptr(descriptor + 5), 0xfe)?;
        // What runs at the target: NOP; MOV AL, [descriptor + 5]; INT 41h.
        a.mov(word_ptr(INNER + 0x100), 0xa090)?;
        a.mov(dword_ptr(INNER + 0x102), (descriptor + 5) as i32)?;
        a.mov(word_ptr(INNER + 0x106), 0x41cd)?;
        a.push(i32::from(sel::CONFORMING))?;
        a.push(INNER as i32 + 0x100)?;
        a.jmp(fword_ptr(esp))
    })?;
    s.add("pdpte has no accessed bit", &|a| {
        a.mov(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PDPT_PAE as i32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, 0x8000_0031_u32 as i32)?;
        a.mov(cr0, eax)?;
        a.mov(ebx, dword_ptr(WINDOW))?;
        a.mov(eax, dword_ptr(PDPT_PAE + 8))?;
        done(a)
    })?;
    s.add("unaligned access beside a breakpoint", &|a| {
        a.mov(eax, DATA as i32)?;
        a.mov(dr0, eax)?;
        a.mov(eax, 0x3_0001)?;
        a.mov(dr7, eax)?;
        a.mov(ebx, dword_ptr(DATA + 1))?;
        a.nop()?;
        done(a)
    })?;
    s.add("flags of a task left by a call", &|a| {
        // The new task returns at once.
        a.mov(word_ptr(INNER + 0x100), 0x90cf)?;
        a.push(i32::from(sel::TSS2))?;
        a.push(0)?;
        a.mov(eax, 0x7fff_ffff)?;
        a.add(eax, 1)?;
        a.call(fword_ptr(esp))?;
        a.pushfd()?;
        a.pop(ebx)?;
        a.mov(ecx, dword_ptr(TSS + 0x24))?;
        done(a)
    })?;
    s.add("cmpxchg8b keeps all flags but zf", &|a| {
        a.mov(al, 0x78)?;
        a.stc()?;
        a.adc(al, 0x66)?;
        a.cmpxchg8b(qword_ptr(DATA))?;
        a.pushfd()?;
        a.pop(ebx)?;
        done(a)
    })?;
    coprocessor(s)
}

/// EMMS and SSE instructions under CR0.EM and TS.
fn coprocessor(s: &mut Suite) -> anyhow::Result<()> {
    for (name, control) in [("em", 0x35), ("ts", 0x39), ("em and ts", 0x3d)] {
        for (instruction, code) in [("emms", &[0x0f, 0x77][..]), ("xorps", &[0x0f, 0x57, 0xc0])] {
            s.add(format!("{instruction} with {name}"), &|a| {
                a.mov(eax, 0x200)?;
                a.mov(cr4, eax)?;
                a.mov(eax, control)?;
                a.mov(cr0, eax)?;
                a.db(code)?;
                done(a)
            })?;
        }
    }
    Ok(())
}

/// In 64-bit mode.
pub(crate) fn long(s: &mut Suite) -> anyhow::Result<()> {
    // REX.W, then 66h: a 16-bit immediate.
    s.add("rex before an operand-size prefix", &|a| {
        a.db(&[0x48, 0x66, 0xb8, 0x34, 0x12])?;
        done(a)
    })?;
    s.add("rex before another", &|a| {
        // REX.B is nothing behind which REX.R stands: MOV R8D, EAX.
        a.db(&[0x41, 0x44, 0x8b, 0xc0])?;
        done(a)
    })?;
    for write in [false, true] {
        let name = if write { "mov to an absent page" } else { "add to an absent page" };
        s.add(name, &|a| {
            a.mov(dword_ptr(PT_WINDOW), 0)?;
            a.invlpg(ptr(WINDOW))?;
            if write { a.mov(dword_ptr(WINDOW), eax) } else { a.add(dword_ptr(WINDOW), eax) }
        })?;
    }
    // At INNER, so that the address is known: SHLD [DATA + 10h], EAX, 8. The displacement counts from behind the
    // immediate.
    let displacement = (DATA + 0x10).wrapping_sub(INNER + 8) as u32;
    s.add_inner("shld by an immediate relative to rip", &|a| a.jmp(INNER), (64, INNER), &|a| {
        a.db(&[0x0f, 0xa4, 0x05])?;
        a.db(&displacement.to_le_bytes())?;
        a.db(&[8])?;
        a.mov(ebx, dword_ptr(DATA + 0x10))?;
        a.mov(ecx, dword_ptr(DATA + 0x0c))?;
        done(a)
    })
}
