//! Transitions between modes, and the registers that make them.

use atoll_machine::cpu::state::gpr;
use iced_x86::code_asm::*;

use crate::guest::*;

#[test]
fn real_to_protected_to_long_and_back_to_compatibility() {
    let mut m = Machine::new();
    m.long_surroundings();
    // GDTR image at 0x7000.
    m.write(0x7000, &0xfffu16.to_le_bytes());
    m.write32(0x7002, GDT as u32);
    m.assemble_at(16, 0x7c00, |a| {
        a.lgdt(fword_ptr(0x7000))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea])?; // JMP ptr16:32
        a.dd(&[0x10000])?;
        a.dw(&[sel::CODE32])
    });
    m.assemble_at(32, 0x10000, |a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ds, eax)?;
        a.mov(ss, eax)?;
        a.mov(eax, 0xa0)?; // PAE, PGE
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.mov(eax, 0x100)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, 0x8000_0011u32)?;
        a.mov(cr0, eax)?;
        a.rdmsr()?;
        a.out(0xe9, eax)?; // LME and LMA
        a.db(&[0xea])?;
        a.dd(&[0x11000])?;
        a.dw(&[sel::CODE64])
    });
    m.assemble_at(64, 0x11000, |a| {
        a.mov(rax, 0x1_2345_6789u64)?;
        a.shr(rax, 4)?;
        a.out(0xe9, eax)?;
        a.mov(ebx, 0x7010)?;
        a.jmp(fword_ptr(rbx))
    });
    m.write32(0x7010, 0x12000);
    m.write(0x7014, &sel::CODE32.to_le_bytes());
    m.assemble_at(32, 0x12000, |a| {
        a.mov(eax, 0xffff_ffffu32)?;
        a.inc(eax)?; // one byte 0x40: a REX prefix in 64-bit mode
        a.out(0xe9, eax)?;
        exit(a)
    });
    let state = m.real_state();
    m.run_from(&state);
    assert_eq!(m.log(), [0x500, 0x1234_5678, 0]);
    assert_eq!(m.exit_code(), DONE);
}

#[test]
fn control_registers_refuse_reserved_and_inconsistent_bits() {
    type Build = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [Build; 8] = [
        |a| {
            a.mov(rax, 0x1_8001_0031u64)?; // upper half
            a.mov(cr0, rax)
        },
        |a| {
            a.mov(eax, 0x8001_0030u32)?; // paging without protection
            a.mov(cr0, rax)
        },
        |a| {
            a.mov(eax, 0xa001_0031u32)?; // NW without CD
            a.mov(cr0, rax)
        },
        |a| {
            a.mov(eax, 0x0001_0031u32)?; // paging off in 64-bit mode
            a.mov(cr0, rax)
        },
        |a| {
            a.mov(eax, 0x680)?; // PAE off in long mode
            a.mov(cr4, rax)
        },
        |a| {
            a.mov(eax, 0x26a0)?; // VMXE is not offered
            a.mov(cr4, rax)
        },
        |a| {
            a.mov(rax, 1u64 << 40)?;
            a.mov(cr3, rax)
        },
        |a| {
            a.mov(eax, 16)?;
            a.mov(cr8, rax)
        },
    ];
    for (n, build) in cases.into_iter().enumerate() {
        let mut m = Machine::new();
        m.run_long(build);
        assert_eq!(m.vectors(), [(13, 0)], "case {n}");
    }
}

#[test]
fn efer_and_unknown_registers_follow_their_rules() {
    for (index, value, ok) in [
        (0xc000_0080u32, 0x901u64, true),
        (0xc000_0080, 0x801, false), // LME off while paging
        (0xc000_0080, 0x4901, false),
        (0xc000_0082, 0x8000_0000_0000, false),
        (0xc000_0100, 0xffff_8000_0000_0000, true),
        (0x277, 0x0206_0406_0007_0406, false), // type 2 does not exist
        (0x277, 0x0106_0406_0007_0406, true),
        (0xdead_beef, 0, false),
        (0xfe, 0, false),
        (0x1b, 0xfee0_0500, false), // x2APIC without enable
    ] {
        let mut m = Machine::new();
        m.run_long(|a| {
            a.mov(ecx, index)?;
            a.mov(eax, value as u32)?;
            a.mov(edx, (value >> 32) as u32)?;
            a.wrmsr()
        });
        assert_eq!(m.vectors().is_empty(), ok, "WRMSR {index:#x} = {value:#x}");
    }
}

#[test]
fn pcid_can_be_enabled_only_with_a_clean_cr3() {
    for (low, ok) in [(0u64, true), (1, false)] {
        let mut m = Machine::new();
        if !model(atoll_machine::cpu::model::Vendor::Intel).has(atoll_machine::cpu::model::Feature::Pcid) {
            return;
        }
        m.run_long(|a| {
            a.mov(rax, TABLES | low)?;
            a.mov(cr3, rax)?;
            a.mov(eax, 0x206a0)?;
            a.mov(cr4, rax)?;
            a.mov(rax, 1u64 << 63 | TABLES | 5)?;
            a.mov(cr3, rax)?;
            a.mov(rax, cr3)?;
            a.out(0xe9, eax)
        });
        assert_eq!(m.vectors().is_empty(), ok);
        if ok {
            assert_eq!(m.log(), [TABLES as u32 | 5]);
        }
    }
}

#[test]
fn lmsw_sets_protection_but_cannot_clear_it() {
    let mut m = Machine::new();
    m.run_long(|a| {
        a.mov(eax, 0x0e)?; // everything but PE
        a.lmsw(ax)?;
        a.smsw(eax)?;
        a.out(0xe9, eax)?;
        a.clts()?;
        a.smsw(eax)?;
        a.out(0xe9, eax)
    });
    assert_eq!(m.log(), [0x8001_003f, 0x8001_0037]);
}

#[test]
fn tsc_and_tsc_adjust_move_together() {
    let mut m = Machine::new();
    m.clock.advance(1_000_000);
    m.run_long(|a| {
        a.rdtsc()?;
        a.out(0xe9, eax)?;
        a.mov(ecx, 0x10)?;
        a.mov(eax, 5_000_000)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.rdtscp()?;
        a.out(0xe9, eax)?;
        a.mov(ecx, 0x3b)?;
        a.rdmsr()?;
        a.out(0xe9, eax)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.rdtsc()?;
        a.out(0xe9, eax)
    });
    assert_eq!(m.log(), [1_000_000, 5_000_000, 4_000_000, 1_000_000]);
}

#[test]
fn kvmclock_record_matches_the_clock() {
    let mut m = Machine::new();
    m.clock.advance(7_000);
    m.run_long(|a| {
        a.mov(ecx, 0x4b56_4d01u32)?;
        a.mov(eax, 0x200001)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0x4b56_4d00u32)?;
        a.mov(eax, 0x201000)?;
        a.wrmsr()
    });
    assert_eq!(m.read32(0x200000) & 1, 0);
    assert!(m.read32(0x200000) > 0);
    let (tsc, ns) = (m.read64(0x200008), m.read64(0x200010));
    let (factor, shift) = (m.read32(0x200018), m.read32(0x20001c) as u8 as i8);
    assert_eq!((tsc, ns), (7_000, 7_000));
    // At 1 GHz a tick is a nanosecond.
    let ticks = 1_000_000u64;
    let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
    let converted = (u128::from(ticks) * u128::from(factor)) >> 32;
    assert!((999_999..=1_000_000).contains(&converted));
    assert_eq!(m.read32(0x20001c) >> 8 & 0xff, 1, "stable");
    assert_eq!((m.read32(0x201004), m.read32(0x201008)), (1_700_000_000, 0));
}

#[test]
fn unknown_hypercalls_are_refused_in_both_forms() {
    let mut m = Machine::new();
    m.run_long(|a| {
        a.mov(eax, 77)?;
        a.vmcall()?;
        a.out(0xe9, eax)?;
        a.mov(eax, 77)?;
        a.vmmcall()?;
        a.shr(rax, 32)?;
        a.out(0xe9, eax)
    });
    assert_eq!(m.log(), [-1000i32 as u32, u32::MAX]);
}

#[test]
fn cpuid_shows_the_live_context() {
    let mut m = Machine::new();
    m.run_long(|a| {
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(eax, ecx)?;
        a.out(0xe9, eax)?;
        a.mov(rax, cr4)?;
        a.or(eax, 1 << 18)?;
        a.mov(cr4, rax)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(eax, ecx)?;
        a.out(0xe9, eax)
    });
    let log = m.log();
    assert_eq!((log[0] >> 27 & 1, log[1] >> 27 & 1), (0, 1));
}

#[test]
fn hidden_instructions_are_undefined() {
    type Build = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [Build; 5] = [|a| a.monitor(), |a| a.mwait(), |a| a.rsm(), |a| a.vmrun(), |a| a.rdpid(rax)];
    for (n, build) in cases.into_iter().enumerate() {
        let mut m = Machine::new();
        m.run_long(build);
        assert_eq!(m.vectors(), [(6, 0)], "case {n}");
    }
}

#[test]
fn in_and_out_have_three_widths() {
    let mut m = Machine::new();
    m.run_long(|a| {
        a.mov(rax, 0x1111_2222_3333_4444u64)?;
        a.in_(al, 0x60)?;
        a.mov(rcx, rax)?;
        a.mov(dx, 0x61u32)?;
        a.in_(eax, dx)?;
        a.mov(rbx, rax)?;
        a.out(0xe9, eax)?;
        a.mov(rax, rcx)?;
        a.shr(rax, 32)?;
        a.out(0xe9, ax)
    });
    assert_eq!(m.log(), [0x6161_6161, 0x2222]);
    use atoll_machine::backend::Vcpu;
    let s = m.vcpu.state();
    assert_eq!((s.gpr[gpr::RBX], s.gpr[gpr::RCX] & 0xff), (0x6161_6161, 0x60));
}
