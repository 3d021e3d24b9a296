//! Written cases of real mode: limits, divisions, single steps, opcodes that are not recognized, lengths.

use iced_x86::code_asm::*;

use crate::case::Suite;
use crate::monitor_real as real;
use crate::real::case;

/// Accesses at and behind the limit of 64 KiB. None pushes an error code.
pub(crate) fn limits(s: &mut Suite) -> anyhow::Result<()> {
    case(s, "byte at ffff", &|a| {
        a.mov(bx, 0xffff)?;
        a.mov(al, byte_ptr(bx))
    })?;
    case(s, "word at ffff beyond the limit", &|a| {
        a.mov(bx, 0xffff)?;
        a.mov(ax, word_ptr(bx))
    })?;
    case(s, "word at fffe", &|a| {
        a.mov(bx, 0xfffe)?;
        a.mov(ax, word_ptr(bx))
    })?;
    case(s, "dword at fffd beyond the limit", &|a| {
        a.mov(bx, 0xfffd)?;
        a.mov(eax, dword_ptr(bx))
    })?;
    case(s, "word write at ffff beyond the limit", &|a| {
        a.mov(bx, 0xffff)?;
        a.mov(word_ptr(bx), ax)
    })?;
    case(s, "word in ss at ffff beyond the limit", &|a| {
        a.mov(bp, 0xffff)?;
        a.add(word_ptr(bp), ax)
    })?;
    case(s, "fs at ffff beyond the limit", &|a| {
        a.mov(bx, 0xffff)?;
        a.mov(ax, word_ptr(bx).fs())
    })?;
    case(s, "ebx 10000 beyond the limit", &|a| {
        a.mov(ebx, 0x1_0000)?;
        a.mov(al, byte_ptr(ebx))
    })?;
    case(s, "ebp 10000 beyond the limit", &|a| {
        a.mov(ebp, 0x1_0000)?;
        a.mov(al, byte_ptr(ebp))
    })?;
    case(s, "lea beyond the limit", &|a| {
        a.mov(ebx, 0x1_0000)?;
        a.lea(eax, dword_ptr(ebx + 5))
    })?;
    case(s, "pop at ffff beyond the limit", &|a| {
        a.mov(sp, 0xffff)?;
        a.pop(ax)
    })?;
    case(s, "lodsw at ffff beyond the limit", &|a| {
        a.mov(si, 0xffff)?;
        a.lodsw()
    })?;
    case(s, "movsw to ffff beyond the limit", &|a| {
        a.mov(si, 0)?;
        a.mov(di, 0xffff)?;
        a.movsw()
    })?;
    case(s, "les at fffe wraps", &|a| {
        a.mov(bx, 0xfffe)?;
        a.db(&[0xc4, 0x07])
    })?;
    // What there would be run beyond the limit: INT 41h.
    let (low, beyond) = ((u32::from(real::CS) << 4) + 0xfff0, 0x2000);
    case(s, "jmp to 10000 beyond the limit", &|a| {
        a.push(beyond + 0xf00)?;
        a.pop(es)?;
        a.mov(word_ptr(low - 0x2_f000 + 0x10).es(), 0x41cd)?;
        a.mov(eax, 0x1_0000)?;
        // JMP EAX.
        a.db(&[0x66, 0xff, 0xe0])
    })?;
    case(s, "jmp far to 10000 beyond the limit", &|a| {
        a.push(beyond + 0xf00)?;
        a.pop(es)?;
        a.mov(word_ptr(low - 0x2_f000 + 0x10).es(), 0x41cd)?;
        a.db(&[0x66, 0xea, 0, 0, 1, 0])?;
        a.db(&real::CS.to_le_bytes())
    })?;
    case(s, "instruction across ffff beyond the limit", &|a| {
        a.push(beyond + 0xe00)?;
        a.pop(es)?;
        a.mov(word_ptr(0xfff_u32).es(), 0x41cd)?;
        a.mov(ax, 0xffff)?;
        a.jmp(ax)
    })?;
    case(s, "instruction behind ffff beyond the limit", &|a| {
        // The reference wraps: the second time here ends the case.
        a.db(&[0x83, 0xfe, 0x55, 0x75, 0x02, 0xcd, 0x41])?;
        a.mov(si, 0x55)?;
        a.push(beyond + 0xe00)?;
        a.pop(es)?;
        a.mov(byte_ptr(0xfff_u32).es(), 0x90)?;
        a.mov(word_ptr(0x1000_u32).es(), 0x41cd)?;
        a.mov(ax, 0xffff)?;
        a.jmp(ax)
    })
}

/// The frame points to the instruction that faults, and no register has changed.
pub(crate) fn divisions(s: &mut Suite) -> anyhow::Result<()> {
    case(s, "div cl by 0", &|a| {
        a.xor(cl, cl)?;
        a.div(cl)
    })?;
    case(s, "div overflow", &|a| {
        a.mov(ax, 0x1000)?;
        a.mov(cl, 0x10)?;
        a.div(cl)
    })?;
    case(s, "div ecx of edx:eax", &|a| {
        a.mov(edx, 0x1_0000)?;
        a.mov(ecx, 0x1_0000)?;
        a.div(ecx)
    })?;
    case(s, "idiv of the lowest number", &|a| {
        a.mov(dx, 0x8000)?;
        a.xor(ax, ax)?;
        a.mov(cx, -1)?;
        a.idiv(cx)
    })?;
    case(s, "div of memory by 0", &|a| {
        a.mov(dword_ptr(0x100), 0)?;
        // With prefixes, which the frame points to.
        a.db(&[0x3e, 0x66, 0xf7, 0x36, 0, 1])
    })?;
    case(s, "aam 0", &|a| a.aam(0))?;
    case(s, "aam 10", &|a| {
        a.mov(al, 123)?;
        a.aam(10)
    })
}

/// TF for what follows.
fn step(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.push(0x102)?;
    a.popf()
}

/// The single-step trap, and what delays it.
pub(crate) fn steps(s: &mut Suite) -> anyhow::Result<()> {
    case(s, "step nop", &|a| {
        step(a)?;
        a.nop()?;
        a.nop()
    })?;
    case(s, "step int 20", &|a| {
        step(a)?;
        a.int(0x20)
    })?;
    case(s, "step mov ss", &|a| {
        a.mov(ax, ss)?;
        step(a)?;
        a.mov(ss, ax)?;
        a.nop()?;
        a.nop()
    })?;
    case(s, "step pop ss", &|a| {
        a.push(ss)?;
        step(a)?;
        a.pop(ss)?;
        a.nop()?;
        a.nop()
    })?;
    case(s, "step sti", &|a| {
        step(a)?;
        a.sti()?;
        a.nop()
    })?;
    case(s, "step popf that clears tf", &|a| {
        a.push(2)?;
        step(a)?;
        a.popf()?;
        a.nop()
    })?;
    case(s, "step rep stosb", &|a| {
        a.mov(di, 0x100)?;
        a.mov(cx, 3)?;
        step(a)?;
        a.rep().stosb()
    })?;
    case(s, "step ud2", &|a| {
        step(a)?;
        a.ud2()
    })?;
    case(s, "step a taken jump", &|a| {
        step(a)?;
        a.db(&[0xeb, 1, 0x90])?;
        a.nop()
    })?;
    case(s, "iret that sets tf", &|a| {
        a.push(0x102)?;
        a.push(i32::from(real::CS))?;
        a.push(10)?;
        a.iret()?;
        a.nop()?;
        a.nop()
    })
}

/// Opcodes that real mode does not recognize, and a few that it does.
pub(crate) fn undefined(s: &mut Suite) -> anyhow::Result<()> {
    let codes: [(&str, &[u8]); 46] = [
        ("sldt", &[0x0f, 0x00, 0xc0]),
        ("str", &[0x0f, 0x00, 0xc8]),
        ("lldt", &[0x0f, 0x00, 0xd0]),
        ("ltr", &[0x0f, 0x00, 0xd8]),
        ("verr", &[0x0f, 0x00, 0xe0]),
        ("verw", &[0x0f, 0x00, 0xe8]),
        ("lar", &[0x0f, 0x02, 0xc3]),
        ("lsl", &[0x0f, 0x03, 0xc3]),
        ("arpl", &[0x63, 0xc3]),
        ("ud2", &[0x0f, 0x0b]),
        ("mov cs", &[0x8e, 0xc8]),
        ("mov sreg 6", &[0x8e, 0xf0]),
        ("mov from sreg 7", &[0x8c, 0xf8]),
        ("lea of a register", &[0x8d, 0xc0]),
        ("les of a register", &[0xc4, 0xc0]),
        ("lss of a register", &[0x0f, 0xb2, 0xc0]),
        ("bound of a register", &[0x62, 0xc0]),
        ("jmp far of a register", &[0xff, 0xe8]),
        ("call far of a register", &[0xff, 0xd8]),
        ("ff /7", &[0xff, 0xf8]),
        ("fe /2", &[0xfe, 0xd0]),
        ("8f /1", &[0x8f, 0xc8]),
        ("c6 /1", &[0xc6, 0xc8, 0]),
        ("mov cr1", &[0x0f, 0x20, 0xc8]),
        ("mov cr7", &[0x0f, 0x22, 0xf8]),
        ("lgdt of a register", &[0x0f, 0x01, 0xd8]),
        ("invlpg of a register", &[0x0f, 0x01, 0xff]),
        ("invlpg", &[0x0f, 0x01, 0x3e, 0, 1]),
        ("xgetbv without osxsave", &[0x0f, 0x01, 0xd0]),
        ("syscall", &[0x0f, 0x05]),
        ("sysenter", &[0x0f, 0x34]),
        ("sysexit", &[0x0f, 0x35]),
        ("rsm", &[0x0f, 0xaa]),
        ("vmlaunch", &[0x0f, 0x01, 0xc2]),
        ("xorps without osfxsr", &[0x0f, 0x57, 0xc0]),
        ("lock inc ax", &[0xf0, 0xff, 0xc0]),
        ("lock add ax,bx", &[0xf0, 0x01, 0xd8]),
        ("lock nop", &[0xf0, 0x90]),
        ("lock mov [100],ax", &[0xf0, 0xa3, 0, 1]),
        ("lock cmp [100],ax", &[0xf0, 0x39, 0x06, 0, 1]),
        ("lock test [100],ax", &[0xf0, 0x85, 0x06, 0, 1]),
        ("lock bt [100],ax", &[0xf0, 0x0f, 0xa3, 0x06, 0, 1]),
        ("lock add ax,[100]", &[0xf0, 0x03, 0x06, 0, 1]),
        ("lock add [100],ax", &[0xf0, 0x01, 0x06, 0, 1]),
        ("f6 /1 is test", &[0xf6, 0xc8, 0x80]),
        // CMP AX, AX: AF is undefined.
        ("d0 /6 is shl", &[0xd0, 0xf0, 0x39, 0xc0]),
    ];
    for (name, code) in codes {
        case(s, name, &|a| a.db(code))?;
    }
    Ok(())
}

/// An instruction has at most 15 bytes (SDM vol. 2, 2.3.11).
pub(crate) fn lengths(s: &mut Suite) -> anyhow::Result<()> {
    for prefixes in [13, 14, 15] {
        case(s, &format!("nop with {prefixes} prefixes"), &|a| {
            for _ in 0..prefixes {
                a.db(&[0x3e])?;
            }
            a.nop()
        })?;
    }
    case(s, "mov with immediate of 16 bytes", &|a| {
        for _ in 0..8 {
            a.db(&[0x3e])?;
        }
        // MOV dword [100h], imm32 with an operand-size prefix: 1 + 1 + 1 + 2 + 4.
        a.db(&[0x66, 0xc7, 0x06, 0, 1, 1, 2, 3, 4])
    })
}
