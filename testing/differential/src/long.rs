//! Written cases of long mode.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::case::{Suite, Width};
use crate::layout::*;
use crate::left_out;
use crate::protected::{SELECTORS, done, inspect};

type Emitted = Result<(), IcedError>;
/// A named piece of code.
type Body = (&'static str, fn(&mut CodeAssembler) -> Emitted);

const TARGET_LOW: i32 = INNER as i32 + 0x100;

/// IRETQ to user code at `rip`.
pub(crate) fn to_user(a: &mut CodeAssembler, code: u16, rip: u64, flags: i32) -> Emitted {
    a.push(i32::from(sel::USER_DATA))?;
    a.mov(rax, USER + USER_STACK)?;
    a.push(rax)?;
    a.push(flags | 2)?;
    a.push(i32::from(code))?;
    a.mov(rax, rip)?;
    a.push(rax)?;
    a.iretq()
}

/// The suite.
pub(crate) fn suite() -> anyhow::Result<Suite> {
    let mut s = Suite::new(Width::Long);
    segments(&mut s)?;
    transfers(&mut s)?;
    gates(&mut s)?;
    calls(&mut s)?;
    registers(&mut s)?;
    canonical(&mut s)?;
    pages(&mut s)?;
    left_out::long(&mut s)?;
    Ok(s)
}

fn at_both(s: &mut Suite, name: &str, body: &dyn Fn(&mut CodeAssembler) -> Emitted) -> anyhow::Result<()> {
    s.add(format!("{name} cpl0"), &|a| {
        body(a)?;
        done(a)
    })?;
    let inner = s.user_inner();
    s.add_inner(format!("{name} cpl3"), &|a| to_user(a, sel::USER_CODE64, inner, 0), (64, inner), &|a| {
        body(a)?;
        done(a)
    })
}

fn segments(s: &mut Suite) -> anyhow::Result<()> {
    for selector in SELECTORS {
        for (name, register) in [("ds", ds), ("gs", gs), ("ss", ss)] {
            at_both(s, &format!("mov {name},{selector:x}"), &|a| {
                a.mov(eax, i32::from(selector))?;
                a.mov(register, ax)
            })?;
        }
        at_both(s, &format!("lldt {selector:x}"), &|a| {
            a.mov(eax, i32::from(selector))?;
            a.lldt(ax)
        })?;
        if selector & !3 != 0 {
            // The reference loads a null TR and is lost at the next gate.
            at_both(s, &format!("ltr {selector:x}"), &|a| {
                a.mov(eax, i32::from(selector))?;
                a.ltr(ax)
            })?;
        }
        at_both(s, &format!("lar lsl verr verw {selector:x}"), &|a| {
            a.mov(eax, i32::from(selector))?;
            inspect(a)
        })?;
    }
    // The upper half's type field, of each type that LAR or LSL knows.
    for kind in [0x82, 0x89, 0x8b, 0x8c] {
        for upper in [0, 1, 0x10] {
            s.add(format!("lar lsl {kind:x} with upper type {upper:x}"), &|a| {
                let descriptor = GDT + u64::from(sel::FREE);
                a.mov(dword_ptr(descriptor), 0x67)?;
                a.mov(dword_ptr(descriptor + 4), kind << 8)?;
                a.mov(dword_ptr(descriptor + 12), upper << 8)?;
                a.mov(eax, i32::from(sel::FREE))?;
                a.lar(ebx, eax)?;
                a.sete(cl)?;
                a.lsl(ebp, eax)?;
                a.sete(ch)?;
                done(a)
            })?;
        }
    }
    // Presence comes before the base, here a non-canonical one. The reference loads such a base into TR and
    // is lost.
    for (name, kind) in [("ltr", 0x09), ("lldt", 0x02), ("lldt present", 0x82)] {
        s.add(format!("{name} with a non-canonical base"), &|a| {
            let descriptor = GDT + u64::from(sel::FREE);
            a.mov(dword_ptr(descriptor), 0x67)?;
            a.mov(dword_ptr(descriptor + 4), kind << 8)?;
            a.mov(dword_ptr(descriptor + 8), 0xffff)?;
            a.mov(eax, i32::from(sel::FREE))?;
            if name.starts_with("ltr") { a.ltr(ax) } else { a.lldt(ax) }
        })?;
    }
    Ok(())
}

fn transfers(s: &mut Suite) -> anyhow::Result<()> {
    for selector in SELECTORS {
        let target = match selector {
            sel::CODE16 | sel::USER_CODE16 => 0x100,
            _ => TARGET_LOW,
        };
        at_both(s, &format!("jmp far {selector:x}"), &|a| {
            a.mov(dword_ptr(rsp - 16), target)?;
            a.mov(word_ptr(rsp - 12), i32::from(selector))?;
            a.jmp(fword_ptr(rsp - 16))
        })?;
        at_both(s, &format!("call far {selector:x}"), &|a| {
            a.mov(dword_ptr(rsp - 64), target)?;
            a.mov(word_ptr(rsp - 60), i32::from(selector))?;
            a.call(fword_ptr(rsp - 64))
        })?;
        at_both(s, &format!("retfq {selector:x}"), &|a| {
            a.push(i32::from(sel::USER_DATA))?;
            a.push(USER_STACK as i32)?;
            a.push(i32::from(selector))?;
            a.push(target)?;
            a.db(&[0x48, 0xcb])
        })?;
        for flags in [2, 0x3cd7] {
            at_both(s, &format!("iretq {selector:x} flags {flags:x}"), &|a| {
                a.push(i32::from(sel::USER_DATA))?;
                a.push(USER_STACK as i32)?;
                a.push(flags)?;
                a.push(i32::from(selector))?;
                a.push(target)?;
                a.iretq()
            })?;
        }
        for code in [sel::USER_CODE64, sel::USER_CODE32, sel::CODE64] {
            s.add(format!("iretq to {code:x} with ss {selector:x}"), &|a| {
                a.push(i32::from(selector))?;
                a.push(USER_STACK as i32)?;
                a.push(2)?;
                a.push(i32::from(code))?;
                a.push(TARGET_LOW)?;
                a.iretq()
            })?;
        }
    }
    s.add("iretq with nt", &|a| {
        a.push(0x4002)?;
        a.popfq()?;
        a.iretq()
    })
}

fn gates(s: &mut Suite) -> anyhow::Result<()> {
    let descriptor = GDT + u64::from(sel::GATE);
    for kind in [0x8c, 0xec, 0x6c, 0xe4, 0xe5, 0xee] {
        for selector in
            [sel::CODE64, sel::CODE32, sel::CONFORMING, sel::USER_CODE64, sel::DATA, 0, sel::BEYOND]
        {
            for upper in [0, 0x0800] {
                let prepare = |a: &mut CodeAssembler| {
                    a.mov(word_ptr(descriptor + 2), i32::from(selector))?;
                    a.mov(byte_ptr(descriptor + 5), kind)?;
                    a.mov(word_ptr(descriptor + 12), upper)
                };
                let call = |a: &mut CodeAssembler| {
                    a.mov(word_ptr(rsp - 60), i32::from(sel::GATE))?;
                    a.call(fword_ptr(rsp - 64))
                };
                let inner = s.user_inner();
                let name = format!("call gate {kind:x} to {selector:x} upper {upper:x}");
                s.add(format!("{name} cpl0"), &|a| {
                    prepare(a)?;
                    call(a)
                })?;
                s.add_inner(
                    format!("{name} cpl3"),
                    &|a| {
                        prepare(a)?;
                        to_user(a, sel::USER_CODE64, inner, 0)
                    },
                    (64, inner),
                    &call,
                )?;
            }
        }
    }
    for vector in (0..0x50).chain([0xff]) {
        at_both(s, &format!("long int {vector:x}"), &|a| a.int(vector))?;
    }
    Ok(())
}

fn msr(a: &mut CodeAssembler, number: u32, value: u64) -> Emitted {
    a.mov(ecx, number)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;
const EFER: u32 = 0xc000_0080;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

fn calls(s: &mut Suite) -> anyhow::Result<()> {
    for mask in [0, 0x4_7700, 0xffff_ffff] {
        let inner = s.user_inner();
        s.add_inner(
            format!("syscall mask {mask:x}"),
            &|a| {
                msr(a, STAR, 0x0070_0078_0000_0000)?;
                msr(a, LSTAR, INNER + 0x100)?;
                msr(a, SFMASK, mask)?;
                to_user(a, sel::USER_CODE64, inner, 0x3cd5)
            },
            (64, inner),
            &|a| a.syscall(),
        )?;
    }
    for (name, flags) in [("plain", 2_u32), ("all flags", 0xffff_feff), ("step", 0x102)] {
        for wide in [false, true] {
            s.add(format!("sysret {name} {}", if wide { 64 } else { 32 }), &|a| {
                msr(a, STAR, 0x0070_0078_0000_0000)?;
                a.mov(r11d, flags)?;
                a.mov(rcx, USER + INNER + 0x100)?;
                if wide { a.sysretq() } else { a.sysret() }
            })?;
        }
    }
    s.add("sysret to a non-canonical address", &|a| {
        a.mov(rcx, 0x8000_0000_0000_u64)?;
        a.mov(r11d, 2)?;
        a.sysretq()
    })?;
    at_both(s, "sysret", &|a| {
        a.mov(rcx, USER + INNER + 0x100)?;
        a.mov(r11d, 2)?;
        a.sysretq()
    })?;
    at_both(s, "syscall without sce", &|a| {
        a.nop()?;
        a.xor(eax, eax)
    })?;
    s.add("syscall, efer.sce clear", &|a| {
        msr(a, EFER, 0xd00)?;
        a.syscall()
    })?;
    s.add("swapgs", &|a| {
        msr(a, KERNEL_GS_BASE, 0x1122_3344_5566)?;
        a.swapgs()?;
        done(a)
    })?;
    at_both(s, "swapgs twice", &|a| {
        a.swapgs()?;
        a.swapgs()
    })
}

fn registers(s: &mut Suite) -> anyhow::Result<()> {
    for value in [0_u64, 0xd00, 0xc01, 0x901, 0x101, 0x501, 0xd03, 0x1_0000_0d01, 0x8000_0d01] {
        s.add(format!("efer {value:x}"), &|a| {
            msr(a, EFER, value)?;
            a.rdmsr()?;
            done(a)
        })?;
    }
    for (number, values) in [
        (0xc000_0100_u32, [0_u64, 0x7fff_ffff_ffff, 0x8000_0000_0000, 0xffff_8000_0000_0000]),
        (KERNEL_GS_BASE, [0, 0x7fff_ffff_ffff, 0x8000_0000_0000, u64::MAX]),
        (LSTAR, [0, 0x7fff_ffff_ffff, 0x8000_0000_0000, u64::MAX]),
        (0x1234_5678, [0, 1, 2, 3]),
    ] {
        for value in values {
            s.add(format!("msr {number:x} {value:x}"), &|a| msr(a, number, value).and_then(|()| done(a)))?;
        }
    }
    for value in [0xa001_0031_u64, 0xc001_0031, 0xe001_0031, 0x1_8001_0031, 0x8001_003b] {
        s.add(format!("mov cr0,{value:x}"), &|a| {
            a.mov(rax, value)?;
            a.mov(cr0, rax)?;
            a.mov(rbx, cr0)?;
            done(a)
        })?;
    }
    // Values without PAE or with reserved bits are left out: the reference accepts them and is lost.
    for value in [0x220_u64, 0x30_0220, 0xa20, 0x2a0, 0x1_0220] {
        s.add(format!("mov cr4,{value:x}"), &|a| {
            a.mov(rax, value)?;
            a.mov(cr4, rax)?;
            a.mov(rbx, cr4)?;
            done(a)
        })?;
    }
    for value in [0_u64, 15, 16, u64::MAX] {
        at_both(s, &format!("mov cr8,{value:x}"), &|a| {
            a.mov(rax, value)?;
            a.mov(cr8, rax)?;
            a.mov(rbx, cr8)
        })?;
    }
    for value in [0x1_0000_0000_u64, 0xffff_ffff, 0] {
        for number in [6, 7] {
            s.add(format!("mov dr{number},{value:x}"), &|a| {
                a.mov(rax, value)?;
                if number == 6 {
                    a.mov(dr6, rax)?;
                } else {
                    a.mov(dr7, rax)?;
                }
                a.mov(rbx, dr7)?;
                done(a)
            })?;
        }
    }
    umip(s)
}

fn umip(s: &mut Suite) -> anyhow::Result<()> {
    let bodies: [Body; 5] = [
        ("smsw", |a| a.smsw(eax)),
        ("sldt", |a| a.sldt(eax)),
        ("str", |a| a.str(eax)),
        ("sgdt", |a| a.sgdt(ptr(rsp - 32))),
        ("sidt", |a| a.sidt(ptr(rsp - 32))),
    ];
    for (name, body) in bodies {
        for on in [false, true] {
            let inner = s.user_inner();
            s.add_inner(
                format!("{name} cpl3 umip{}", u8::from(on)),
                &|a| {
                    a.mov(eax, if on { 0xa20_u32 } else { 0x220 })?;
                    a.mov(cr4, rax)?;
                    to_user(a, sel::USER_CODE64, inner, 0)
                },
                (64, inner),
                &|a| {
                    body(a)?;
                    done(a)
                },
            )?;
        }
    }
    Ok(())
}

fn canonical(s: &mut Suite) -> anyhow::Result<()> {
    const BAD: u64 = 0x8000_0000_0000;
    at_both(s, "load from a non-canonical address", &|a| {
        a.mov(rdx, BAD)?;
        a.mov(rax, qword_ptr(rdx))
    })?;
    at_both(s, "load through a non-canonical rsp", &|a| {
        a.mov(rsp, BAD)?;
        a.mov(rax, qword_ptr(rsp))
    })?;
    at_both(s, "push to a non-canonical stack", &|a| {
        a.mov(rsp, BAD)?;
        a.push(rax)
    })?;
    at_both(s, "jmp to a non-canonical address", &|a| {
        a.mov(rdx, BAD)?;
        a.jmp(rdx)
    })?;
    at_both(s, "call to a non-canonical address", &|a| {
        a.mov(rdx, BAD)?;
        a.call(rdx)
    })?;
    at_both(s, "ret to a non-canonical address", &|a| {
        a.mov(rdx, BAD)?;
        a.push(rdx)?;
        a.ret()
    })?;
    s.add("iretq to a non-canonical address", &|a| {
        a.mov(rdx, BAD)?;
        a.push(i32::from(sel::USER_DATA))?;
        a.push(0)?;
        a.push(2)?;
        a.push(i32::from(sel::USER_CODE64))?;
        a.push(rdx)?;
        a.iretq()
    })
}

/// What of the window's page is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Execute,
}

fn pages(s: &mut Suite) -> anyhow::Result<()> {
    const ABSENT: u64 = 0;
    const NX: u64 = 1 << 63;
    const RESERVED: u64 = 1 << 51;
    for bits in [ABSENT, NX | 6, 1, 3, 5, 7, NX | 1, NX | 7, RESERVED | 7, RESERVED | 1] {
        for user in [false, true] {
            for (name, access) in
                [("read", Access::Read), ("write", Access::Write), ("execute", Access::Execute)]
            {
                page(s, bits, (user, 0x220, 0x8001_0031, 2), name, access)?;
            }
        }
        // SMEP, SMAP without and with AC, no write protection, NXE off.
        for (cr4_value, cr0_value, flags) in [
            (0x10_0220, 0x8001_0031, 2),
            (0x20_0220, 0x8001_0031, 2),
            (0x20_0220, 0x8001_0031, 0x4_0002),
            (0x220, 0x8000_0031, 2),
        ] {
            for (name, access) in
                [("read", Access::Read), ("write", Access::Write), ("execute", Access::Execute)]
            {
                page(s, bits, (false, cr4_value, cr0_value, flags), name, access)?;
            }
        }
    }
    for (name, table, value) in [
        ("pde reserved", PD_WINDOW, PT_WINDOW | 7 | RESERVED),
        ("pde large reserved", PD_WINDOW, 0x2000 | 0x87),
        ("pde read-only", PD_WINDOW, PT_WINDOW | 5),
        ("pde supervisor", PD_WINDOW, PT_WINDOW | 3),
        ("pde nx", PD_WINDOW, PT_WINDOW | 7 | NX),
        ("pdpte reserved", PDPT + 8, PD_WINDOW | 7 | RESERVED),
        ("pdpte absent", PDPT + 8, PD_WINDOW | 6),
        ("pml4e large", PML4 + 8, PDPT | 0x87),
    ] {
        for access in [Access::Read, Access::Write, Access::Execute] {
            upper(s, name, table, value, access)?;
        }
    }
    Ok(())
}

fn touch(a: &mut CodeAssembler, at: u64, access: Access) -> Emitted {
    a.mov(rdx, at)?;
    match access {
        Access::Read => a.mov(eax, dword_ptr(rdx)),
        Access::Write => a.mov(dword_ptr(rdx), eax),
        Access::Execute => a.jmp(rdx),
    }
}

fn upper(s: &mut Suite, name: &str, table: u64, value: u64, access: Access) -> anyhow::Result<()> {
    let at = if table == PML4 + 8 { 1 << 39 } else { WINDOW };
    let kind = ["read", "write", "execute"][access as usize];
    let inner = s.user_inner();
    let prepare = |a: &mut CodeAssembler| {
        a.mov(rax, value)?;
        a.mov(qword_ptr(table), rax)?;
        // INT 41h where the window's code starts.
        a.mov(word_ptr(DATA), 0x41cd)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)
    };
    s.add(format!("{name} {kind} cpl0"), &|a| {
        prepare(a)?;
        touch(a, at, access)?;
        done(a)
    })?;
    s.add_inner(
        format!("{name} {kind} cpl3"),
        &|a| {
            prepare(a)?;
            to_user(a, sel::USER_CODE64, inner, 0)
        },
        (64, inner),
        &|a| {
            touch(a, at, access)?;
            done(a)
        },
    )
}

fn page(
    s: &mut Suite,
    bits: u64,
    (user, cr4_value, cr0_value, flags): (bool, u32, u32, i32),
    kind: &str,
    access: Access,
) -> anyhow::Result<()> {
    let name = format!(
        "pte {bits:x} {kind} cpl{} cr4 {cr4_value:x} cr0 {cr0_value:x} fl {flags:x}",
        u8::from(user) * 3
    );
    let prepare = |a: &mut CodeAssembler| {
        a.mov(word_ptr(DATA), 0x41cd)?;
        a.mov(rax, DATA | bits)?;
        a.mov(qword_ptr(PT_WINDOW), rax)?;
        a.mov(eax, cr4_value)?;
        a.mov(cr4, rax)?;
        a.mov(eax, cr0_value)?;
        a.mov(cr0, rax)?;
        a.push(flags)?;
        a.popfq()
    };
    if !user {
        return s.add(name, &|a| {
            prepare(a)?;
            touch(a, WINDOW, access)?;
            a.mov(rbx, qword_ptr(PT_WINDOW))?;
            done(a)
        });
    }
    let inner = s.user_inner();
    s.add_inner(
        name,
        &|a| {
            prepare(a)?;
            to_user(a, sel::USER_CODE64, inner, 0)
        },
        (64, inner),
        &|a| {
            touch(a, WINDOW, access)?;
            a.mov(rbx, USER + PT_WINDOW)?;
            a.mov(rbx, qword_ptr(rbx))?;
            done(a)
        },
    )
}
