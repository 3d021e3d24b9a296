//! Written cases of real mode: segments and limits, interrupts, transfers, flags, strings, protected mode and
//! back. Those of single instructions and of faults are in `real_faults.rs`.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::case::{Emit, Suite, Width};
use crate::layout::*;
use crate::monitor_real as real;
use crate::{protected, real_faults};

type Emitted = Result<(), IcedError>;

/// A vector whose handler a case brings along.
const OWN: i32 = 0x60;
/// Offset of that handler in the inner code.
const HANDLER: u16 = 0x180;

/// The suite.
pub(crate) fn suite() -> anyhow::Result<Suite> {
    let mut s = Suite::new(Width::Real);
    segment_loads(&mut s)?;
    real_faults::limits(&mut s)?;
    interrupts(&mut s)?;
    interrupt_tables(&mut s)?;
    transfers(&mut s)?;
    flags(&mut s)?;
    strings(&mut s)?;
    loops(&mut s)?;
    stack(&mut s)?;
    system_registers(&mut s)?;
    protected_and_back(&mut s)?;
    real_faults::divisions(&mut s)?;
    real_faults::steps(&mut s)?;
    real_faults::undefined(&mut s)?;
    real_faults::lengths(&mut s)?;
    Ok(s)
}

/// A case whose code INT 41h ends.
pub(crate) fn case(s: &mut Suite, name: &str, body: Emit<'_>) -> anyhow::Result<()> {
    s.add_inner(name, &|_| Ok(()), (16, 0), &|a| {
        body(a)?;
        protected::done(a)
    })
}

fn segment_loads(s: &mut Suite) -> anyhow::Result<()> {
    for (name, register) in [("ds", ds), ("es", es), ("fs", fs), ("gs", gs)] {
        case(s, &format!("mov {name},1e01 and read"), &|a| {
            a.mov(ax, 0x1e01)?;
            a.mov(register, ax)?;
            a.push(ds)?;
            a.mov(bx, 0x10)?;
            match name {
                "ds" => a.mov(ecx, dword_ptr(bx)),
                "es" => a.mov(ecx, dword_ptr(bx).es()),
                "fs" => a.mov(ecx, dword_ptr(bx).fs()),
                _ => a.mov(ecx, dword_ptr(bx).gs()),
            }
        })?;
        case(s, &format!("pop {name}"), &|a| {
            a.push(0x1e02)?;
            a.pop(register)
        })?;
    }
    case(s, "mov ss,0fc0 moves the stack", &|a| {
        a.push(0x7777)?;
        a.mov(ax, 0x0fc0)?;
        a.mov(ss, ax)?;
        a.add(sp, 0x400)?;
        a.pop(bx)
    })?;
    // LDS, LES, LSS, LFS, LGS of the pointer 1e00:0020, LSS of 1000:0700.
    for (name, opcode) in
        [("lds", &[0xc5][..]), ("les", &[0xc4]), ("lfs", &[0x0f, 0xb4]), ("lgs", &[0x0f, 0xb5])]
    {
        for wide in [false, true] {
            case(s, &format!("{name}{}", if wide { " 32" } else { "" }), &|a| {
                a.mov(dword_ptr(0x100), 0x1e03_0020)?;
                a.mov(dword_ptr(0x104), 0x1e04)?;
                if wide {
                    a.db(&[0x66])?;
                }
                a.db(opcode)?;
                a.db(&[0x1e, 0, 1])
            })?;
        }
    }
    case(s, "lss", &|a| {
        a.mov(dword_ptr(0x100), 0x0ff0_0800)?;
        a.db(&[0x0f, 0xb2, 0x26, 0, 1])?;
        a.push(0x1234)
    })?;
    case(s, "effective addresses wrap at 64 KiB", &|a| {
        a.mov(ebx, 0x1234_fff0)?;
        a.mov(esi, 0x5678_0014)?;
        a.mov(eax, dword_ptr(bx + si))
    })
}

/// Makes the inner code's handler that of `OWN`.
fn own_handler(a: &mut CodeAssembler) -> Emitted {
    a.push(0)?;
    a.pop(es)?;
    a.mov(word_ptr(OWN as u32 * 4).es(), i32::from(HANDLER))?;
    a.mov(word_ptr(OWN as u32 * 4 + 2).es(), i32::from(real::CS))
}

/// A case with a handler of its own.
fn with_handler(s: &mut Suite, name: &str, body: Emit<'_>, handler: &[u8]) -> anyhow::Result<()> {
    let mut code = crate::case::assemble(16, 0, &|a| {
        own_handler(a)?;
        body(a)?;
        protected::done(a)
    })?;
    code.resize(HANDLER.into(), 0x90);
    code.extend(handler);
    s.add_bytes(name.to_owned(), &|_| Ok(()), (16, 0), &code)
}

fn interrupts(s: &mut Suite) -> anyhow::Result<()> {
    for vector in [0, 8, 13, 0x20, 0x80, 0xff] {
        case(s, &format!("int {vector:x}"), &|a| a.int(vector))?;
    }
    case(s, "int3", &|a| a.int3())?;
    case(s, "int1", &|a| a.int1())?;
    for (name, value) in [("into with overflow", 0x7f), ("into without overflow", 0x10)] {
        case(s, name, &|a| {
            a.mov(al, value)?;
            a.inc(al)?;
            a.into()
        })?;
    }
    for index in [0_i32, 1, 5, 6] {
        case(s, &format!("bound {index} in 1 to 5"), &|a| {
            a.mov(dword_ptr(0x100), 0x0005_0001)?;
            a.mov(ax, index)?;
            a.bound(ax, dword_ptr(0x100))
        })?;
    }
    case(s, "bound 32", &|a| {
        a.mov(dword_ptr(0x100), -5)?;
        a.mov(dword_ptr(0x104), 5)?;
        a.mov(eax, -6)?;
        a.bound(eax, qword_ptr(0x100))
    })?;
    // PUSHFD; POP EAX; INT 41h: the handler's flags.
    let show: &[u8] = &[0x66, 0x9c, 0x66, 0x58, 0xcd, DONE];
    with_handler(
        s,
        "a handler starts with if, tf and ac clear",
        &|a| {
            a.push(0x7fd7 & !0x100)?;
            a.popf()?;
            a.db(&[0x66, 0x68, 0xd7, 0x7e, 0x24, 0x00, 0x66, 0x9d])?;
            a.int(OWN)
        },
        show,
    )?;
    with_handler(
        s,
        "iret goes back with the old flags",
        &|a| {
            a.stc()?;
            a.sti()?;
            a.int(OWN)?;
            a.setb(al)?;
            a.pushf()?;
            a.pop(bx)
        },
        &[0xf8, 0xcf],
    )?;
    for (name, flags, wide) in [
        ("iret of all flags", 0xffff_u32, false),
        ("iretd of all flags", 0xffff_ffff, true),
        ("iretd of vm alone", 0x2_0002, true),
    ] {
        case(s, name, &|a| {
            let flags = flags & !0x100;
            let prefix: &[u8] = if wide { &[0x66] } else { &[] };
            let mut code = Vec::new();
            for value in [flags, real::CS.into(), if wide { 20 } else { 10 }] {
                code.extend_from_slice(prefix);
                code.push(0x68);
                code.extend(&value.to_le_bytes()[..if wide { 4 } else { 2 }]);
            }
            code.extend_from_slice(prefix);
            code.push(0xcf);
            code.chunks(16).try_for_each(|part| a.db(part))?;
            a.pushfd()?;
            a.pop(eax)
        })?;
    }
    Ok(())
}

fn interrupt_tables(s: &mut Suite) -> anyhow::Result<()> {
    // Room for vector 40h, not for 41h: what is pushed points to the INT instruction.
    for limit in [0x103, 0x106, 0x107] {
        case(s, &format!("lidt with limit {limit:x}"), &|a| {
            a.mov(word_ptr(0x100), limit)?;
            a.mov(dword_ptr(0x102), 0)?;
            a.lidt(fword_ptr(0x100))
        })?;
    }
    case(s, "lidt with another base", &|a| {
        // A copy whose vector 41h is the stub of 42h.
        a.push(0)?;
        a.pop(ds)?;
        a.xor(si, si)?;
        a.xor(di, di)?;
        a.push(0x1800)?;
        a.pop(es)?;
        a.mov(cx, 0x200)?;
        a.rep().movsw()?;
        a.add(word_ptr(0x41 * 4).es(), 8)?;
        a.push(i32::from(real::DS))?;
        a.pop(ds)?;
        a.mov(word_ptr(0x100), 0x3ff)?;
        a.mov(dword_ptr(0x102), 0x1_8000)?;
        a.lidt(fword_ptr(0x100))
    })
}

fn transfers(s: &mut Suite) -> anyhow::Result<()> {
    // To offset 0x100 of the inner code's segment, where an INT 41h is, through other values of CS.
    let target = INNER + 0x100;
    for selector in [real::CS, 0x1e80, 0x1f0f] {
        let offset = (target - (u64::from(selector) << 4)) as u16;
        let pointer = u32::from(offset) | u32::from(selector) << 16;
        for (name, opcode) in [("jmp far", 0xea_u8), ("call far", 0x9a)] {
            case(s, &format!("{name} {selector:x}:{offset:x}"), &|a| {
                a.db(&[opcode])?;
                a.db(&pointer.to_le_bytes())
            })?;
            case(s, &format!("{name} 32 {selector:x}:{offset:x}"), &|a| {
                a.db(&[0x66, opcode])?;
                a.db(&u32::from(offset).to_le_bytes())?;
                a.db(&selector.to_le_bytes())
            })?;
        }
        for (name, field) in [("jmp far [mem]", 0x2e_u8), ("call far [mem]", 0x1e)] {
            case(s, &format!("{name} {selector:x}:{offset:x}"), &|a| {
                a.mov(dword_ptr(0x100), pointer as i32)?;
                a.db(&[0xff, field, 0, 1])
            })?;
        }
        case(s, &format!("retf 4 to {selector:x}:{offset:x}"), &|a| {
            a.push(i32::from(selector))?;
            a.push(i32::from(offset))?;
            a.retf_1(4)
        })?;
    }
    case(s, "near call and return", &|a| {
        a.db(&[0xe8, 2, 0, 0xeb, 1, 0xc3])?;
        a.mov(bx, word_ptr(bp))
    })?;
    case(s, "near call 32 and return", &|a| a.db(&[0x66, 0xe8, 2, 0, 0, 0, 0xeb, 2, 0x66, 0xc3]))?;
    case(s, "jmp rel16 wraps at 64 KiB", &|a| {
        // Back by 0x10000 - 0x100 + 3.
        a.db(&[0xe9, 0xfd, 0x00])
    })
}

fn flags(s: &mut Suite) -> anyhow::Result<()> {
    for value in [0, 0xfeff, 0x7000, 0x8028] {
        case(s, &format!("popf {value:x}"), &|a| {
            a.push(value)?;
            a.popf()?;
            a.pushfd()?;
            a.pop(eax)
        })?;
    }
    for value in [0xffff_feff_u32, 0x24_0002, 0x1b_0002] {
        case(s, &format!("popfd {value:x}"), &|a| {
            a.db(&[0x66, 0x68])?;
            a.db(&value.to_le_bytes())?;
            a.popfd()?;
            a.pushfd()?;
            a.pop(eax)
        })?;
    }
    case(s, "sti and cli", &|a| {
        a.sti()?;
        a.pushf()?;
        a.pop(ax)?;
        a.cli()?;
        a.pushf()?;
        a.pop(bx)
    })
}

fn strings(s: &mut Suite) -> anyhow::Result<()> {
    case(s, "movsb wraps si and di", &|a| {
        a.mov(esi, 0x1111_ffff)?;
        a.mov(edi, 0x2222_ffff)?;
        a.movsb()
    })?;
    case(s, "lodsb downwards wraps si", &|a| {
        a.std()?;
        a.mov(esi, 0x1111_0000)?;
        a.lodsb()
    })?;
    case(s, "rep stosb wraps di and counts cx", &|a| {
        a.mov(edi, 0x2222_fffe)?;
        a.mov(ecx, 0x3333_0004)?;
        a.rep().stosb()
    })?;
    case(s, "rep with cx 0 and ecx above", &|a| {
        a.mov(ecx, 0x3333_0000)?;
        a.rep().stosb()
    })?;
    case(s, "a32 rep stosb uses edi and ecx", &|a| {
        a.mov(edi, 0x100)?;
        a.mov(ecx, 3)?;
        a.db(&[0x67, 0xf3, 0xaa])
    })?;
    case(s, "a32 rep stosb at the limit", &|a| {
        a.mov(edi, 0xfffe)?;
        a.mov(ecx, 4)?;
        a.db(&[0x67, 0xf3, 0xaa])
    })?;
    case(s, "rep lodsw meets the limit", &|a| {
        a.mov(si, 0xfffb)?;
        a.mov(cx, 5)?;
        a.rep().lodsw()
    })?;
    case(s, "repne scasb", &|a| {
        a.push(ds)?;
        a.pop(es)?;
        a.mov(di, 0)?;
        a.mov(cx, 0x40)?;
        a.mov(al, 0x10)?;
        a.repne().scasb()
    })?;
    case(s, "repe cmpsw", &|a| {
        a.push(ds)?;
        a.pop(es)?;
        a.mov(si, 0)?;
        a.mov(di, 2)?;
        a.mov(cx, 0x40)?;
        a.repe().cmpsw()
    })?;
    case(s, "movsb from another segment", &|a| {
        a.mov(si, 0)?;
        a.mov(di, 0x10)?;
        a.db(&[0x2e, 0xa4])?;
        a.mov(al, byte_ptr(0x10).es())
    })
}

fn loops(s: &mut Suite) -> anyhow::Result<()> {
    // MOV BX, 1 is jumped over.
    for (name, opcode) in [("loop", 0xe2_u8), ("loope", 0xe1), ("loopne", 0xe0), ("jcxz", 0xe3)] {
        for count in [0, 1, 0x1_0000, 0x1_0001] {
            for wide in [false, true] {
                let name = format!("{}{name} with ecx {count:x}", if wide { "a32 " } else { "" });
                case(s, &name, &|a| {
                    a.mov(ecx, count)?;
                    if wide {
                        a.db(&[0x67])?;
                    }
                    a.db(&[opcode, 3])?;
                    a.mov(bx, 1)
                })?;
            }
        }
    }
    Ok(())
}

fn stack(s: &mut Suite) -> anyhow::Result<()> {
    case(s, "push sp and pop sp", &|a| {
        a.push(sp)?;
        a.pop(ax)?;
        a.push(0x700)?;
        a.pop(sp)
    })?;
    case(s, "pusha and popa", &|a| {
        a.pusha()?;
        a.mov(bp, sp)?;
        a.mov(word_ptr(bp), 0x1234)?;
        a.popa()
    })?;
    case(s, "pushad and popad", &|a| {
        a.pushad()?;
        a.mov(bp, sp)?;
        a.mov(dword_ptr(bp + 12), 0x1234)?;
        a.popad()
    })?;
    case(s, "enter 10,2 and leave", &|a| {
        a.mov(bp, 0x780)?;
        a.enter(0x10, 2)?;
        a.mov(ax, bp)?;
        a.mov(bx, sp)?;
        a.leave()
    })?;
    case(s, "push of a segment register, 32 bits", &|a| {
        a.push(0x1234)?;
        a.push(0x5678)?;
        a.add(sp, 4)?;
        a.db(&[0x66, 0x1e])?;
        a.pop(eax)
    })?;
    case(s, "push wraps sp", &|a| {
        a.mov(sp, 2)?;
        a.push(0x1111)?;
        a.push(0x2222)?;
        a.mov(ax, sp)?;
        a.mov(sp, 0x800)
    })
}

fn system_registers(s: &mut Suite) -> anyhow::Result<()> {
    for (name, prefix) in [("lgdt 16", &[][..]), ("lgdt 32", &[0x66])] {
        case(s, name, &|a| {
            a.mov(word_ptr(0x100), 0x1234)?;
            a.mov(dword_ptr(0x102), 0x89ab_cdef_u32 as i32)?;
            a.db(prefix)?;
            a.db(&[0x0f, 0x01, 0x16, 0, 1])
        })?;
    }
    for (name, prefix) in [("sgdt 16", &[][..]), ("sgdt 32", &[0x66])] {
        case(s, name, &|a| {
            a.mov(word_ptr(0x100), 0x1234)?;
            a.mov(dword_ptr(0x102), 0x89ab_cdef_u32 as i32)?;
            a.db(&[0x66, 0x0f, 0x01, 0x16, 0, 1])?;
            a.db(prefix)?;
            a.db(&[0x0f, 0x01, 0x06, 0x10, 1])?;
            a.mov(ax, word_ptr(0x110))?;
            a.mov(ebx, dword_ptr(0x112))
        })?;
    }
    case(s, "smsw", &|a| {
        a.smsw(ax)?;
        a.smsw(ebx)?;
        a.smsw(word_ptr(0x100))?;
        a.mov(cx, word_ptr(0x100))
    })?;
    for value in [0, 0x2, 0x8, 0xe, 0xfff0] {
        case(s, &format!("lmsw {value:x}"), &|a| {
            a.mov(ax, value)?;
            a.lmsw(ax)?;
            a.smsw(bx)
        })?;
    }
    case(s, "lmsw and clts", &|a| {
        a.mov(ax, 0xa)?;
        a.lmsw(ax)?;
        a.clts()
    })?;
    for (name, status, code) in [
        ("fninit with em", 4, &[0xdb, 0xe3][..]),
        ("fninit with ts", 8, &[0xdb, 0xe3]),
        ("wait with ts", 8, &[0x9b]),
        ("wait with mp and ts", 0xa, &[0x9b]),
        ("fninit with mp", 2, &[0xdb, 0xe3]),
    ] {
        case(s, name, &|a| {
            a.mov(ax, status)?;
            a.lmsw(ax)?;
            a.db(code)
        })?;
    }
    case(s, "data breakpoint at a linear address", &|a| {
        a.mov(eax, DATA as i32 + 0x20)?;
        a.mov(dr0, eax)?;
        a.mov(eax, 0xd_0001)?;
        a.mov(dr7, eax)?;
        a.mov(byte_ptr(0x22), 5)
    })
}

/// Sets or clears CR0.PE.
fn protection(a: &mut CodeAssembler, on: bool) -> Emitted {
    a.mov(eax, cr0)?;
    if on {
        a.or(al, 1)?
    } else {
        a.and(al, 0xfe)?
    }
    a.mov(cr0, eax)?;
    // The jump that the manuals want behind it.
    a.db(&[0xeb, 0])
}

fn protected_and_back(s: &mut Suite) -> anyhow::Result<()> {
    let unreal = |a: &mut CodeAssembler, register: AsmRegisterSegment| {
        protection(a, true)?;
        a.mov(bx, i32::from(sel::DATA))?;
        a.mov(register, bx)?;
        protection(a, false)
    };
    case(s, "unreal fs reads above 1 MiB", &|a| {
        unreal(a, fs)?;
        a.mov(ebx, IMAGE as i32)?;
        a.mov(ecx, dword_ptr(ebx).fs())
    })?;
    case(s, "unreal fs keeps its limit when loaded in real mode", &|a| {
        unreal(a, fs)?;
        a.mov(bx, 0x1000)?;
        a.mov(fs, bx)?;
        a.mov(ebx, (IMAGE - 0x1_0000) as i32)?;
        a.mov(ecx, dword_ptr(ebx).fs())
    })?;
    case(s, "unreal ss pushes through esp", &|a| {
        unreal(a, ss)?;
        a.mov(esp, CASE_STACK as i32)?;
        a.push(0x1234)?;
        a.pop(cx)
    })?;
    case(s, "protected code segment and back", &|a| {
        protection(a, true)?;
        // JMP CODE16:next, at offset 0x0c after the 12 bytes above.
        a.db(&[0xea, 0x11, 0])?;
        a.db(&sel::CODE16.to_le_bytes())?;
        a.mov(cx, cs)?;
        a.str(dx)?;
        a.sldt(si)?;
        a.smsw(di)?;
        protection(a, false)
    })?;
    case(s, "lmsw cannot leave protected mode", &|a| {
        protection(a, true)?;
        a.xor(ax, ax)?;
        a.lmsw(ax)?;
        a.smsw(cx)?;
        protection(a, false)
    })?;
    case(s, "lmsw enters protected mode", &|a| {
        a.mov(ax, 1)?;
        a.lmsw(ax)?;
        a.mov(bx, i32::from(sel::DATA))?;
        a.mov(gs, bx)?;
        protection(a, false)?;
        a.mov(ebx, IMAGE as i32)?;
        a.mov(ecx, dword_ptr(ebx).gs())
    })
}
