//! Written cases of 32-bit protected mode, 16-bit segments, virtual-8086 mode and tasks.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::case::{Suite, Width};
use crate::layout::*;
use crate::left_out;

type Emitted = Result<(), IcedError>;
/// A named piece of code.
type Body = (&'static str, fn(&mut CodeAssembler) -> Emitted);

/// Selectors worth trying: one of each kind, and where RPL matters with both.
pub(crate) const SELECTORS: [u16; 40] = [
    0,
    3,
    sel::CODE32,
    sel::CODE32 | 3,
    sel::DATA,
    sel::DATA | 1,
    sel::DATA | 3,
    sel::USER_CODE32,
    sel::USER_CODE32 & !3,
    sel::USER_DATA,
    sel::USER_DATA & !3,
    sel::CODE16,
    sel::DATA16,
    sel::USER_CODE16,
    sel::USER_DATA16,
    sel::TSS,
    sel::LDT,
    sel::TSS2,
    sel::TSS2 | 3,
    sel::CODE64,
    sel::CONFORMING,
    sel::CONFORMING | 3,
    sel::EXPAND_DOWN | 3,
    sel::EXPAND_DOWN,
    sel::READ_ONLY,
    sel::READ_ONLY | 3,
    sel::EXECUTE_ONLY,
    sel::EXECUTE_ONLY | 3,
    sel::ABSENT_DATA,
    sel::GATE,
    sel::GATE | 3,
    sel::TASK_GATE,
    sel::BUSY_TSS,
    sel::ABSENT_CODE,
    sel::ABSENT_TSS,
    sel::GATE16,
    sel::TSS16,
    sel::GATE_INWARD,
    sel::BEYOND,
    0x0c,
];

const TF: i32 = 0x100;
const IOPL3: i32 = 0x3000;
const NT: i32 = 0x4000;
const VM: i32 = 0x2_0000;

pub(crate) fn done(a: &mut CodeAssembler) -> Emitted {
    a.int(i32::from(DONE))
}

/// IRETD to user code at `eip`.
pub(crate) fn to_user(a: &mut CodeAssembler, code: u16, eip: u64, flags: i32) -> Emitted {
    let stack = if code == sel::USER_CODE16 {
        (sel::USER_DATA16, USER_STACK - WORK)
    } else {
        (sel::USER_DATA, USER_STACK)
    };
    a.push(i32::from(stack.0))?;
    a.push(stack.1 as i32)?;
    a.push(flags | 2)?;
    a.push(i32::from(code))?;
    a.push(eip as i32)?;
    a.iretd()
}

/// IRETD to virtual-8086 mode at the inner code, its stack in the working area's first page.
pub(crate) fn to_v86(a: &mut CodeAssembler, flags: i32) -> Emitted {
    for word in [0x1444, 0x1333, 0x1e00, 0x1222, 0x1000, 0x400, flags | VM | 2, 0x1f00, 0] {
        a.push(word)?;
    }
    a.iretd()
}

/// The suite.
pub(crate) fn suite() -> anyhow::Result<Suite> {
    let mut s = Suite::new(Width::Protected);
    segment_loads(&mut s)?;
    system_selectors(&mut s)?;
    inspections(&mut s)?;
    transfers(&mut s)?;
    returns(&mut s)?;
    interrupts(&mut s)?;
    tasks(&mut s)?;
    broken_tasks(&mut s)?;
    virtual_8086(&mut s)?;
    ports(&mut s)?;
    debugging(&mut s)?;
    fast_calls(&mut s)?;
    control_registers(&mut s)?;
    paging(&mut s)?;
    left_out::protected(&mut s)?;
    Ok(s)
}

/// A case run at CPL 0 and at CPL 3.
fn at_both(s: &mut Suite, name: &str, body: &dyn Fn(&mut CodeAssembler) -> Emitted) -> anyhow::Result<()> {
    s.add(format!("{name} cpl0"), &|a| {
        body(a)?;
        done(a)
    })?;
    let inner = s.user_inner();
    s.add_inner(format!("{name} cpl3"), &|a| to_user(a, sel::USER_CODE32, inner, 0), (32, inner), &|a| {
        body(a)?;
        done(a)
    })
}

fn segment_loads(s: &mut Suite) -> anyhow::Result<()> {
    for (name, register) in [("ds", ds), ("fs", fs), ("ss", ss)] {
        for selector in SELECTORS {
            at_both(s, &format!("mov {name},{selector:x}"), &|a| {
                a.mov(eax, i32::from(selector))?;
                a.mov(register, ax)
            })?;
        }
    }
    for selector in [sel::DATA, sel::USER_DATA, sel::ABSENT_DATA, 0] {
        at_both(s, &format!("pop ss {selector:x}"), &|a| {
            a.push(i32::from(selector))?;
            a.pop(ss)
        })?;
    }
    for (selector, loads) in [(0x0c, true), (0x14, true), (0x1c, true), (0x24, false), (0x44, false)] {
        s.add(format!("mov es,{selector:x} with ldt"), &|a| {
            a.mov(eax, i32::from(sel::LDT))?;
            a.lldt(ax)?;
            a.mov(eax, selector)?;
            a.mov(es, ax)?;
            if loads {
                a.mov(ebx, dword_ptr(DATA).es())?;
            }
            done(a)
        })?;
    }
    Ok(())
}

fn system_selectors(s: &mut Suite) -> anyhow::Result<()> {
    for selector in SELECTORS {
        at_both(s, &format!("lldt {selector:x}"), &|a| {
            a.mov(eax, i32::from(selector))?;
            a.lldt(ax)
        })?;
        at_both(s, &format!("ltr {selector:x}"), &|a| {
            a.mov(eax, i32::from(selector))?;
            a.ltr(ax)
        })?;
    }
    Ok(())
}

/// LAR, LSL, VERR and VERW of the selector in AX; what they find is left in EBX, EBP and, from each one's ZF, in CL,
/// CH, DL and DH.
pub(crate) fn inspect(a: &mut CodeAssembler) -> Emitted {
    a.lar(ebx, eax)?;
    a.sete(cl)?;
    // Bits 19:16 are undefined.
    a.and(ebx, 0x00f0_ff00)?;
    a.lsl(ebp, eax)?;
    a.sete(ch)?;
    a.verr(ax)?;
    a.sete(dl)?;
    a.verw(ax)?;
    a.sete(dh)
}

fn inspections(s: &mut Suite) -> anyhow::Result<()> {
    for selector in SELECTORS {
        at_both(s, &format!("lar lsl verr verw {selector:x}"), &|a| {
            a.mov(eax, i32::from(selector))?;
            inspect(a)
        })?;
    }
    for (destination, source) in [(0x10, 0x3), (0x13, 0x1), (0x10, 0x10), (0, 1)] {
        at_both(s, &format!("arpl {destination:x},{source:x}"), &|a| {
            a.mov(eax, destination)?;
            a.mov(ebx, source)?;
            a.arpl(ax, bx)
        })?;
    }
    Ok(())
}

/// The offset that leads to the target in a segment.
fn target_of(selector: u16) -> i32 {
    match selector {
        sel::CODE16 | sel::USER_CODE16 => 0x100,
        _ => INNER as i32 + 0x100,
    }
}

fn transfers(s: &mut Suite) -> anyhow::Result<()> {
    for selector in SELECTORS {
        at_both(s, &format!("jmp far {selector:x}"), &|a| {
            a.push(i32::from(selector))?;
            a.push(target_of(selector))?;
            a.jmp(fword_ptr(esp))
        })?;
        at_both(s, &format!("call far {selector:x}"), &|a| {
            a.push(i32::from(selector))?;
            a.push(target_of(selector))?;
            a.call(fword_ptr(esp))
        })?;
    }
    // Gates whose descriptor is changed first: type and DPL, selector.
    for kind in [0x84, 0x8c, 0xec, 0xe4, 0x6c, 0xe0, 0xe1, 0xe7] {
        for selector in
            [sel::CODE32, sel::CONFORMING, sel::USER_CODE32, sel::DATA, 0, sel::ABSENT_CODE, sel::BEYOND]
        {
            at_gate(s, kind, selector)?;
        }
    }
    Ok(())
}

fn at_gate(s: &mut Suite, kind: i32, selector: u16) -> anyhow::Result<()> {
    let descriptor = GDT + u64::from(sel::GATE);
    let prepare = |a: &mut CodeAssembler| {
        a.mov(word_ptr(descriptor + 2), i32::from(selector))?;
        a.mov(byte_ptr(descriptor + 5), kind)
    };
    let call = |a: &mut CodeAssembler| {
        a.push(0x1111)?;
        a.push(0x2222)?;
        a.push(i32::from(sel::GATE))?;
        a.push(0)?;
        a.call(fword_ptr(esp))
    };
    s.add(format!("call gate {kind:x} to {selector:x} cpl0"), &|a| {
        prepare(a)?;
        call(a)
    })?;
    let inner = s.user_inner();
    s.add_inner(
        format!("call gate {kind:x} to {selector:x} cpl3"),
        &|a| {
            prepare(a)?;
            to_user(a, sel::USER_CODE32, inner, 0)
        },
        (32, inner),
        &call,
    )
}

fn returns(s: &mut Suite) -> anyhow::Result<()> {
    for selector in SELECTORS {
        for user_stack in [sel::USER_DATA, sel::DATA] {
            at_both(s, &format!("retf {selector:x} ss {user_stack:x}"), &|a| {
                a.push(i32::from(user_stack))?;
                a.push(USER_STACK as i32)?;
                a.push(i32::from(selector))?;
                a.push(target_of(selector))?;
                a.retf()
            })?;
        }
        at_both(s, &format!("iret {selector:x}"), &|a| {
            a.push(i32::from(sel::USER_DATA))?;
            a.push(USER_STACK as i32)?;
            a.push(0x3cd7)?;
            a.push(i32::from(selector))?;
            a.push(target_of(selector))?;
            a.iretd()
        })?;
        s.add(format!("iret to cpl3 with ss {selector:x}"), &|a| {
            a.push(i32::from(selector))?;
            a.push(USER_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(sel::USER_CODE32))?;
            a.push(target_of(0))?;
            a.iretd()
        })?;
    }
    for flags in [0x0, 0x24_0cd7, 0x3200, NT, 0x8000, 0x1_0002] {
        at_both(s, &format!("popfd {flags:x}"), &|a| {
            a.push(flags)?;
            a.popfd()?;
            a.pushfd()?;
            a.pop(eax)
        })?;
    }
    Ok(())
}

fn interrupts(s: &mut Suite) -> anyhow::Result<()> {
    for vector in (0..0x50).chain([0xff]) {
        if vector != 8 {
            at_both(s, &format!("int {vector:x}"), &|a| a.int(vector))?;
        }
    }
    at_both(s, "int3", &|a| a.int3())?;
    at_both(s, "int1", &|a| a.int1())?;
    at_both(s, "into", &|a| {
        a.mov(al, 0x7f)?;
        a.inc(al)?;
        a.into()
    })?;
    at_both(s, "ud2", &|a| a.ud2())?;
    at_both(s, "div 0", &|a| {
        a.xor(ecx, ecx)?;
        a.div(ecx)
    })?;
    at_both(s, "bound", &|a| {
        a.push(5)?;
        a.push(1)?;
        a.mov(eax, 6)?;
        a.bound(eax, qword_ptr(esp))
    })?;
    for (name, privileged) in [
        ("hlt", (|a| a.hlt()) as fn(&mut CodeAssembler) -> Emitted),
        ("clts", |a| a.clts()),
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("invd", |a| a.invd()),
        ("wbinvd", |a| a.wbinvd()),
        ("rdmsr", |a| a.rdmsr()),
        ("mov eax,cr0", |a| a.mov(eax, cr0)),
        ("mov dr0,eax", |a| a.mov(dr0, eax)),
        ("lmsw", |a| a.lmsw(ax)),
        ("invlpg", |a| a.invlpg(ptr(0))),
        ("lgdt", |a| a.lgdt(fword_ptr(GDTR))),
        ("rdpmc", |a| a.rdpmc()),
    ] {
        let inner = s.user_inner();
        s.add_inner(
            format!("{name} cpl3"),
            &|a| to_user(a, sel::USER_CODE32, inner, 0),
            (32, inner),
            &|a| {
                privileged(a)?;
                done(a)
            },
        )?;
    }
    // The stack that a gate to CPL 0 uses is not usable.
    for stack in SELECTORS {
        let inner = s.user_inner();
        s.add_inner(
            format!("int 40 with ss0 {stack:x}"),
            &|a| {
                a.mov(word_ptr(TSS + 8), i32::from(stack))?;
                to_user(a, sel::USER_CODE32, inner, 0)
            },
            (32, inner),
            &|a| a.int(0x40),
        )?;
    }
    Ok(())
}

fn tasks(s: &mut Suite) -> anyhow::Result<()> {
    let nested = |a: &mut CodeAssembler| {
        // The new task's code returns at once; the old one goes on.
        a.mov(word_ptr(INNER + 0x100), 0x90cf)?;
        a.push(i32::from(sel::TSS2))?;
        a.push(0)?;
        a.call(fword_ptr(esp))?;
        a.str(ebx)?;
        a.mov(ecx, dword_ptr(TSS2))?;
        a.movzx(edx, byte_ptr(GDT + u64::from(sel::TSS2) + 5))?;
        done(a)
    };
    s.add("call tss and iret", &nested)?;
    s.add("int task gate and iret", &|a| {
        a.mov(word_ptr(INNER + 0x100), 0x90cf)?;
        a.int(0x4c)?;
        a.mov(ecx, dword_ptr(TSS2))?;
        a.movzx(edx, byte_ptr(GDT + u64::from(sel::TSS2) + 5))?;
        done(a)
    })?;
    s.add("jmp tss and back", &|a| {
        // JMP 48h:0 in the new task.
        a.mov(dword_ptr(INNER + 0x100), 0x0000_00ea)?;
        a.mov(dword_ptr(INNER + 0x104), 0x0048_0000)?;
        a.push(i32::from(sel::TSS2))?;
        a.push(0)?;
        a.jmp(fword_ptr(esp))?;
        a.movzx(edx, byte_ptr(GDT + u64::from(sel::TSS2) + 5))?;
        a.movzx(ecx, byte_ptr(GDT + u64::from(sel::TSS) + 5))?;
        done(a)
    })?;
    for back in [0, sel::TSS2, sel::BUSY_TSS, sel::LDT, sel::DATA, sel::BEYOND, sel::TSS16] {
        s.add(format!("iret with nt to {back:x}"), &|a| {
            a.mov(word_ptr(TSS), i32::from(back))?;
            a.push(NT | 2)?;
            a.popfd()?;
            a.iretd()
        })?;
    }
    s.add("task with trap flag", &|a| {
        a.mov(byte_ptr(TSS2 + 0x64), 1)?;
        a.push(i32::from(sel::TSS2))?;
        a.push(0)?;
        a.jmp(fword_ptr(esp))
    })?;
    s.add("saved state of the old task", &|a| {
        a.mov(word_ptr(INNER + 0x100), 0x90cf)?;
        a.push(i32::from(sel::TSS2))?;
        a.push(0)?;
        a.stc()?;
        a.call(fword_ptr(esp))?;
        a.mov(eax, dword_ptr(TSS + 0x20))?;
        a.mov(ecx, dword_ptr(TSS + 0x24))?;
        a.mov(edx, dword_ptr(TSS2 + 0x20))?;
        a.mov(ebx, dword_ptr(TSS2 + 0x24))?;
        a.mov(esi, dword_ptr(TSS + 0x48))?;
        a.mov(edi, dword_ptr(TSS + 0x5c))?;
        done(a)
    })
}

fn broken_tasks(s: &mut Suite) -> anyhow::Result<()> {
    let switch = |a: &mut CodeAssembler| {
        a.push(i32::from(sel::TSS2))?;
        a.push(0)?;
        a.jmp(fword_ptr(esp))
    };
    for (field, offset) in [("cs", 0x4c), ("ss", 0x50), ("ds", 0x54), ("gs", 0x5c), ("ldt", 0x60)] {
        for selector in SELECTORS {
            s.add(format!("task with {field} {selector:x}"), &|a| {
                a.mov(word_ptr(TSS2 + offset), i32::from(selector))?;
                switch(a)
            })?;
        }
    }
    for limit in [0x66, 0x67, 0x2a, 0] {
        s.add(format!("task with limit {limit:x}"), &|a| {
            a.mov(word_ptr(GDT + u64::from(sel::TSS2)), limit)?;
            switch(a)
        })?;
    }
    for kind in [0x09, 0x89, 0xe9, 0x8b, 0x81, 0x83] {
        at_task_kind(s, kind)?;
    }
    Ok(())
}

fn at_task_kind(s: &mut Suite, kind: i32) -> anyhow::Result<()> {
    let inner = s.user_inner();
    s.add_inner(
        format!("jmp tss {kind:x} cpl3"),
        &|a| {
            a.mov(byte_ptr(GDT + u64::from(sel::TSS2) + 5), kind)?;
            a.mov(byte_ptr(GDT + u64::from(sel::TSS2)), 0x67)?;
            to_user(a, sel::USER_CODE32, inner, 0)
        },
        (32, inner),
        &|a| {
            a.push(i32::from(sel::TSS2 | 3))?;
            a.push(0)?;
            a.jmp(fword_ptr(esp))
        },
    )
}

fn virtual_8086(s: &mut Suite) -> anyhow::Result<()> {
    let bodies: [Body; 30] = [
        ("int 40", |a| a.int(0x40)),
        ("int 20", |a| a.int(0x20)),
        ("int3", |a| a.int3()),
        ("ud2", |a| a.ud2()),
        ("pushf", |a| {
            a.pushf()?;
            a.pop(ax)
        }),
        ("popf", |a| {
            a.push(0x7cd7)?;
            a.popf()?;
            a.pushfd()?;
            a.pop(eax)
        }),
        ("iret", |a| {
            a.push(0x7cd7)?;
            a.push(0x1f00)?;
            a.push(0x100)?;
            a.iret()
        }),
        ("iretd", |a| {
            // Pushes of 32 bits: flags, CS, EIP.
            a.db(&[0x66, 0x68, 0xd7, 0x7c, 0, 0])?;
            a.db(&[0x66, 0x68, 0, 0x1f, 0, 0])?;
            a.db(&[0x66, 0x68, 0, 0x01, 0, 0])?;
            a.iretd()
        }),
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("hlt", |a| a.hlt()),
        ("in al,e0", |a| a.in_(al, 0xe0)),
        ("out e8,al", |a| a.out(0xe8, al)),
        ("mov eax,cr0", |a| a.mov(eax, cr0)),
        ("clts", |a| a.clts()),
        ("smsw", |a| a.smsw(ax)),
        ("lmsw", |a| a.lmsw(ax)),
        ("lgdt", |a| a.lgdt(fword_ptr(0))),
        ("sgdt", |a| a.sgdt(fword_ptr(0))),
        ("sldt", |a| a.sldt(ax)),
        ("lldt", |a| a.lldt(ax)),
        ("str", |a| a.str(ax)),
        ("lar", |a| a.lar(ax, bx)),
        ("verr", |a| a.verr(ax)),
        ("arpl", |a| a.arpl(ax, bx)),
        ("invd", |a| a.invd()),
        ("rdtsc into dx:ax", |a| {
            a.rdtsc()?;
            a.xor(eax, eax)?;
            a.xor(edx, edx)
        }),
        ("mov es,1234", |a| {
            a.mov(ax, 0x1234)?;
            a.mov(es, ax)
        }),
        ("retf", |a| {
            a.push(0x1f00)?;
            a.push(0x100)?;
            a.retf()
        }),
        ("div 0", |a| {
            a.xor(cl, cl)?;
            a.div(cl)
        }),
    ];
    for (name, body) in bodies {
        for iopl in [0, IOPL3] {
            s.add_inner(format!("v86 {name} iopl{}", iopl >> 12), &|a| to_v86(a, iopl), (16, 0), &|a| {
                body(a)?;
                done(a)
            })?;
        }
    }
    // A gate that leads from virtual-8086 mode to a conforming or user segment.
    for selector in [sel::CONFORMING, sel::USER_CODE32] {
        s.add_inner(
            format!("v86 int 42 to {selector:x}"),
            &|a| {
                a.mov(word_ptr(IDT + 0x42 * 8 + 2), i32::from(selector))?;
                to_v86(a, IOPL3)
            },
            (16, 0),
            &|a| a.int(0x42),
        )?;
    }
    s.add_inner("v86 single step", &|a| to_v86(a, TF), (16, 0), &|a| a.inc(ax))
}

fn ports(s: &mut Suite) -> anyhow::Result<()> {
    for port in [0xdf, 0xe0, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0x4ef, 0x4f8, 0xffff] {
        for (size, read) in [
            (1, (|a| a.in_(al, dx)) as fn(&mut CodeAssembler) -> Emitted),
            (2, |a| a.in_(ax, dx)),
            (4, |a| a.in_(eax, dx)),
        ] {
            let inner = s.user_inner();
            let body = |a: &mut CodeAssembler| {
                a.mov(edx, port)?;
                read(a)?;
                a.xor(eax, eax)?;
                done(a)
            };
            s.add_inner(
                format!("in{size} {port:x} cpl3"),
                &|a| to_user(a, sel::USER_CODE32, inner, 0),
                (32, inner),
                &body,
            )?;
            s.add_inner(format!("v86 in{size} {port:x}"), &|a| to_v86(a, IOPL3), (16, 0), &body)?;
        }
    }
    let inner = s.user_inner();
    for base in [0x68, 0x107, 0x106, 0xdfff] {
        s.add_inner(
            format!("in1 e0 cpl3 bitmap at {base:x}"),
            &|a| {
                a.mov(word_ptr(TSS + 0x66), base)?;
                to_user(a, sel::USER_CODE32, inner, 0)
            },
            (32, inner),
            &|a| {
                a.in_(al, 0xe0)?;
                a.xor(eax, eax)?;
                done(a)
            },
        )?;
    }
    Ok(())
}

fn debugging(s: &mut Suite) -> anyhow::Result<()> {
    let step = |a: &mut CodeAssembler| {
        a.push(TF | 2)?;
        a.popfd()
    };
    s.add("step nop", &|a| {
        step(a)?;
        a.nop()?;
        a.nop()
    })?;
    s.add("step int 40", &|a| {
        step(a)?;
        a.int(0x40)
    })?;
    s.add("step mov ss", &|a| {
        a.mov(eax, ss)?;
        step(a)?;
        a.mov(ss, ax)?;
        a.nop()?;
        a.nop()
    })?;
    s.add("step ud2", &|a| {
        step(a)?;
        a.ud2()
    })?;
    s.add("step rep stosb", &|a| {
        a.mov(edi, DATA as i32)?;
        a.mov(ecx, 3)?;
        step(a)?;
        a.rep().stosb()
    })?;
    s.add("step popfd clears tf", &|a| {
        a.push(2)?;
        step(a)?;
        a.popfd()?;
        a.nop()
    })?;
    for (name, control) in [("exec", 0x1), ("write1", 0x1_0001), ("write4", 0xd_0001), ("access4", 0xf_0001)]
    {
        s.add(format!("breakpoint {name}"), &|a| {
            let at = if control == 1 { INNER + 0x100 } else { DATA };
            a.mov(eax, at as i32)?;
            a.mov(dr0, eax)?;
            a.mov(eax, control)?;
            a.mov(dr7, eax)?;
            a.mov(ebx, dword_ptr(DATA))?;
            a.mov(dword_ptr(DATA), ebx)?;
            a.jmp(INNER + 0x100)
        })?;
    }
    s.add("general detect", &|a| {
        a.mov(eax, 0x2000)?;
        a.mov(dr7, eax)?;
        a.mov(ebx, dr0)
    })?;
    for (name, de) in [("dr4 without de", 0), ("dr4 with de", 8)] {
        s.add(name, &|a| {
            a.mov(eax, de)?;
            a.mov(cr4, eax)?;
            a.mov(ebx, dr4)?;
            done(a)
        })?;
    }
    Ok(())
}

fn write_msr(a: &mut CodeAssembler, msr: u32, value: u64) -> Emitted {
    a.mov(ecx, msr as i32)?;
    a.mov(eax, value as u32 as i32)?;
    a.mov(edx, (value >> 32) as u32 as i32)?;
    a.wrmsr()
}

fn fast_calls(s: &mut Suite) -> anyhow::Result<()> {
    for cs_value in [0, 3, 8, 0x0b, 0x78] {
        let inner = s.user_inner();
        s.add_inner(
            format!("sysenter cs {cs_value:x}"),
            &|a| {
                write_msr(a, 0x174, cs_value)?;
                write_msr(a, 0x175, CASE_STACK - 0x200)?;
                write_msr(a, 0x176, INNER + 0x100)?;
                to_user(a, sel::USER_CODE32, inner, 0)
            },
            (32, inner),
            &|a| a.sysenter(),
        )?;
        s.add(format!("sysexit cs {cs_value:x}"), &|a| {
            write_msr(a, 0x174, cs_value)?;
            a.mov(edx, INNER as i32 + 0x100)?;
            a.mov(ecx, USER_STACK as i32)?;
            a.sysexit()
        })?;
    }
    at_both(s, "syscall without sce", &|a| a.syscall())
}

fn control_registers(s: &mut Suite) -> anyhow::Result<()> {
    // Paging without protection is left out: the reference accepts it and is lost.
    for value in [0x2000_0031_u32, 0x4000_0031, 0x6000_0031, 0x33, 0x3b, 0x5_0031] {
        s.add(format!("mov cr0,{value:x}"), &|a| {
            a.mov(eax, value as i32)?;
            a.mov(cr0, eax)?;
            a.mov(ebx, cr0)?;
            done(a)
        })?;
    }
    // Reserved bits are left out: the reference executes the instruction for ever.
    for value in [0x20_u32, 0x10, 0x10_0000, 0x20_0000, 0x800, 0x80] {
        s.add(format!("mov cr4,{value:x}"), &|a| {
            a.mov(eax, value as i32)?;
            a.mov(cr4, eax)?;
            a.mov(ebx, cr4)?;
            done(a)
        })?;
    }
    for number in [1, 5, 6, 7] {
        // MOV CRn, EAX has no assembler form for these.
        s.add(format!("mov cr{number},eax"), &|a| a.db(&[0x0f, 0x22, 0xc0 | number << 3]))?;
    }
    Ok(())
}

fn paging(s: &mut Suite) -> anyhow::Result<()> {
    for pae in [false, true] {
        for bits in [0, 1, 3, 5, 7] {
            for write_protect in [false, true] {
                for user in [false, true] {
                    for write in [false, true] {
                        page_access(s, (pae, write_protect), bits, user, write)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// One access to the window, whose entry has `bits` (P, W, U).
fn page_access(
    s: &mut Suite,
    (pae, write_protect): (bool, bool),
    bits: u32,
    user: bool,
    write: bool,
) -> anyhow::Result<()> {
    let (table, root, features) = if pae { (PT_WINDOW, PDPT_PAE, 0x20) } else { (PT32, PD32, 0x10) };
    let body = |a: &mut CodeAssembler| {
        if write { a.mov(dword_ptr(WINDOW + 0x10), eax) } else { a.mov(eax, dword_ptr(WINDOW + 0x10)) }
    };
    let prepare = |a: &mut CodeAssembler| {
        a.mov(dword_ptr(table), DATA as i32 | bits as i32)?;
        a.mov(eax, features)?;
        a.mov(cr4, eax)?;
        a.mov(eax, root as i32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, if write_protect { 0x8001_0031_u32 } else { 0x8000_0031 } as i32)?;
        a.mov(cr0, eax)
    };
    let who = if user { "cpl3" } else { "cpl0" };
    let name = format!(
        "{} {who} {} wp{} pte {bits}",
        if pae { "pae" } else { "32-bit paging" },
        if write { "write" } else { "read" },
        u8::from(write_protect)
    );
    if !user {
        return s.add(name, &|a| {
            prepare(a)?;
            body(a)?;
            // The accessed and dirty bits.
            a.mov(ebx, dword_ptr(table))?;
            done(a)
        });
    }
    s.add_inner(
        name,
        &|a| {
            prepare(a)?;
            a.push(i32::from(sel::USER_DATA))?;
            a.push((USER + USER_STACK) as u32 as i32)?;
            a.push(2)?;
            a.push(i32::from(sel::USER_CODE32))?;
            a.push((USER + INNER) as u32 as i32)?;
            a.iretd()
        },
        (32, USER + INNER),
        &|a| {
            // The way to CPL 3 left DS null.
            a.push(i32::from(sel::USER_DATA))?;
            a.pop(ds)?;
            body(a)?;
            a.mov(ebx, dword_ptr(USER + table))?;
            done(a)
        },
    )
}
