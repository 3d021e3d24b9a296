//! Availability, alignment, page faults inside gathers and masked moves, and deferred x87 exceptions.

use atoll_machine::cpu::model::Vendor;

use super::Fixture;
use super::fixture::{DATA, UNMAPPED, decode};
use crate::cpu::{control, flag};
use crate::exception::{Exception, vector};
use crate::fpu::state::status;

const ADDPS: [u8; 3] = [0x0f, 0x58, 0xca];
const ADDPS_MEMORY: [u8; 3] = [0x0f, 0x58, 0x0f];
const MOVAPS_LOAD: [u8; 3] = [0x0f, 0x28, 0x0f];
const VADDPS: [u8; 4] = [0xc5, 0xec, 0x58, 0xcb];
const PADDB_MM: [u8; 3] = [0x0f, 0xfc, 0xca];
const FLD1: [u8; 2] = [0xd9, 0xe8];
const FWAIT: [u8; 1] = [0x9b];
/// vgatherdps ymm1, [rdi + ymm2*4], ymm3.
const GATHER: [u8; 6] = [0xc4, 0xe2, 0x65, 0x92, 0x0c, 0x97];
/// vmaskmovps [rdi], ymm1, ymm2.
const MASKED_STORE: [u8; 5] = [0xc4, 0xe2, 0x75, 0x2e, 0x17];
/// vmaskmovps ymm2, ymm1, [rdi].
const MASKED_LOAD: [u8; 5] = [0xc4, 0xe2, 0x75, 0x2c, 0x17];

fn avx() -> bool {
    std::arch::is_x86_feature_detected!("avx2")
}

#[test]
fn control_registers_decide_between_ud_and_nm() {
    let mut f = Fixture::new();
    f.cpu.cr0 |= control::CR0_TS;
    for code in [&ADDPS[..], &PADDB_MM, &FLD1, &FWAIT, &MOVAPS_LOAD] {
        assert_eq!(f.run(code), Err(Exception::NM), "{code:02x?} with TS");
    }
    f.cpu.cr0 &= !control::CR0_MP;
    assert_eq!(f.run(&FWAIT), Ok(()), "WAIT needs MP and TS");
    f.cpu.cr0 |= control::CR0_EM;
    for code in [&ADDPS[..], &PADDB_MM, &MOVAPS_LOAD] {
        assert_eq!(f.run(code), Err(Exception::UD), "{code:02x?} with EM");
    }
    f.cpu.cr0 &= !control::CR0_TS;
    assert_eq!(f.run(&FLD1), Err(Exception::NM));
    f.cpu.cr0 &= !control::CR0_EM;
    f.cpu.cr4 &= !control::CR4_OSFXSR;
    assert_eq!(f.run(&ADDPS), Err(Exception::UD));
    assert_eq!(f.run(&PADDB_MM), Ok(()), "MMX does not need OSFXSR");
}

#[test]
fn vex_needs_osxsave_and_both_components() {
    if !avx() {
        return;
    }
    let mut f = Fixture::new();
    assert_eq!(f.run(&VADDPS), Ok(()));
    f.cpu.xcr0 = 3;
    assert_eq!(f.run(&VADDPS), Err(Exception::UD));
    f.cpu.xcr0 = 7;
    f.cpu.cr4 &= !control::CR4_OSXSAVE;
    assert_eq!(f.run(&VADDPS), Err(Exception::UD));
}

#[test]
fn legacy_sixteen_byte_operands_must_be_aligned() {
    let mut f = Fixture::new();
    f.cpu.gpr[7] = DATA + 1;
    for code in [&ADDPS_MEMORY[..], &MOVAPS_LOAD] {
        assert_eq!(f.run(code), Err(Exception::GP0), "{code:02x?}");
    }
    // movups, pcmpistri, addss and vaddps with memory.
    for code in [&[0x0f, 0x10, 0x0f][..], &[0x66, 0x0f, 0x3a, 0x63, 0x0f, 0], &[0xf3, 0x0f, 0x58, 0x0f]] {
        assert_eq!(f.run(code), Ok(()), "{code:02x?}");
    }
    if avx() {
        assert_eq!(f.run(&[0xc5, 0xec, 0x58, 0x0f]), Ok(()));
        f.cpu.gpr[7] = DATA + 16;
        assert_eq!(f.run(&[0xc5, 0xfc, 0x28, 0x0f]), Err(Exception::GP0), "vmovaps ymm");
    }
}

#[test]
fn a_faulting_operand_changes_nothing() {
    let mut f = Fixture::new();
    f.cpu.gpr[7] = UNMAPPED;
    f.cpu.xsave.set_xmm(1, 5);
    let before = f.cpu.xsave.0;
    // addps, movups store, fld qword, fstp qword, movq mm1, paddb mm1, movq [rdi] mm1, fnsave.
    let codes: [&[u8]; 8] = [
        &ADDPS_MEMORY,
        &[0x0f, 0x11, 0x0f],
        &[0xdd, 0x07],
        &[0xdd, 0x1f],
        &[0x0f, 0x6f, 0x0f],
        &[0x0f, 0xfc, 0x0f],
        &[0x0f, 0x7f, 0x0f],
        &[0xdd, 0x37],
    ];
    for code in codes {
        assert!(matches!(f.run(code), Err(Exception::PageFault { .. })), "{code:02x?}");
        assert!(f.cpu.xsave.0 == before, "{code:02x?} changed state");
    }
}

#[test]
fn unmasked_simd_exception_without_osxmmexcpt_is_ud() {
    let mut f = Fixture::new();
    f.cpu.cr4 &= !control::CR4_OSXMMEXCPT;
    f.cpu.xsave.set_mxcsr(0x1d80);
    f.cpu.xsave.set_xmm(1, 0x3f80_0000);
    // divss xmm1, xmm2: 1 / 0.
    assert_eq!(f.run(&[0xf3, 0x0f, 0x5e, 0xca]), Err(Exception::UD));
    assert_eq!((f.cpu.xsave.mxcsr(), f.cpu.xsave.xmm(1)), (0x1d84, 0x3f80_0000));
    f.cpu.cr4 |= control::CR4_OSXMMEXCPT;
    assert_eq!(f.run(&[0xf3, 0x0f, 0x5e, 0xca]), Err(Exception::fault(vector::XM)));
}

#[test]
fn x87_exceptions_wait_for_the_next_waiting_instruction() {
    let mut f = Fixture::new();
    f.cpu.xsave.set_fcw(0x37b);
    assert_eq!(f.run(&FLD1), Ok(()));
    // fldz; fdivp: 1 / 0 with ZM clear.
    assert_eq!(f.run(&[0xd9, 0xee]), Ok(()));
    f.cpu.rip = 0x1234;
    assert_eq!(f.run(&[0xde, 0xf9]), Ok(()));
    assert_ne!(f.cpu.xsave.fsw() & status::SUMMARY, 0);
    assert_eq!(f.cpu.xsave.fip(), 0x1234);
    let before = f.cpu.xsave.0;
    for code in [&FLD1[..], &FWAIT, &PADDB_MM] {
        assert_eq!(f.run(code), Err(Exception::fault(vector::MF)), "{code:02x?}");
    }
    assert_eq!(f.run(&[0xdf, 0xe0]), Ok(()), "FNSTSW does not wait");
    assert!(f.cpu.xsave.0 == before);
    f.cpu.cr0 &= !control::CR0_NE;
    assert_eq!(f.run(&FLD1), Ok(()));
    assert!(f.cpu.fpu.ferr);
    assert_ne!(f.cpu.xsave.fsw() & status::SUMMARY, 0, "still pending");
    assert_eq!(f.run(&[0xdb, 0xe2]), Ok(()), "FNCLEX");
    f.cpu.cr0 |= control::CR0_NE;
    assert_eq!(f.run(&FLD1), Ok(()));
}

#[test]
fn gather_keeps_the_elements_before_a_fault() {
    if !avx() {
        return;
    }
    let mut f = Fixture::new();
    f.store(DATA, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
    let mut index = [0; 32];
    let far = ((UNMAPPED - DATA) / 4) as u32;
    for (i, value) in [2u32, 0, 1, far, 0, 0, 0, 0].into_iter().enumerate() {
        index[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes());
    }
    f.cpu.xsave.set_ymm(2, &index);
    f.cpu.xsave.set_ymm(1, &[0xee; 32]);
    let mut mask = [0; 32];
    for i in [0, 2, 3, 4] {
        mask[4 * i + 3] = 0x80;
    }
    f.cpu.xsave.set_ymm(3, &mask);
    let fault = f.run(&GATHER);
    assert!(matches!(fault, Err(Exception::PageFault { address: UNMAPPED, .. })), "{fault:?}");
    let lanes = |value: [u8; 32]| -> Vec<u32> {
        value.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
    };
    let old = 0xeeee_eeee;
    assert_eq!(lanes(f.cpu.xsave.ymm(1)), [3, old, 2, old, old, old, old, old]);
    let left = if f.cpu.shared.model.vendor == Vendor::Intel { u32::MAX } else { 0x8000_0000 };
    assert_eq!(lanes(f.cpu.xsave.ymm(3)), [0, 0, 0, left, left, 0, 0, 0]);
    index[12..16].fill(0);
    f.cpu.xsave.set_ymm(2, &index);
    assert_eq!(f.run(&GATHER), Ok(()));
    assert_eq!(lanes(f.cpu.xsave.ymm(1)), [3, old, 2, 1, 1, old, old, old]);
    assert_eq!(f.cpu.xsave.ymm(3), [0; 32]);
}

#[test]
fn masked_moves_touch_only_selected_elements() {
    if !avx() {
        return;
    }
    let mut f = Fixture::new();
    f.cpu.gpr[7] = UNMAPPED - 8;
    let mut mask = [0; 32];
    mask[7] = 0x80;
    f.cpu.xsave.set_ymm(1, &mask);
    f.cpu.xsave.set_ymm(2, &[0x77; 32]);
    assert_eq!(f.run(&MASKED_STORE), Ok(()));
    assert_eq!(f.load::<8>(UNMAPPED - 8), [0, 0, 0, 0, 0x77, 0x77, 0x77, 0x77]);
    assert_eq!(f.run(&MASKED_LOAD), Ok(()));
    assert_eq!(f.cpu.xsave.ymm(2)[..12], [0, 0, 0, 0, 0x77, 0x77, 0x77, 0x77, 0, 0, 0, 0]);
    mask[11] = 0x80;
    f.cpu.xsave.set_ymm(1, &mask);
    f.store(UNMAPPED - 8, &[0; 8]);
    assert!(f.run(&MASKED_STORE).is_err());
    assert_eq!(f.load::<8>(UNMAPPED - 8), [0; 8], "nothing is written before a fault");
}

#[test]
fn reserved_mxcsr_bits_are_refused() {
    let mut f = Fixture::new();
    f.store(DATA, &0x0001_1f80u32.to_le_bytes());
    assert_eq!(f.run(&[0x0f, 0xae, 0x17]), Err(Exception::GP0));
    f.store(DATA, &0xffffu32.to_le_bytes());
    assert_eq!(f.run(&[0x0f, 0xae, 0x17]), Ok(()));
    assert_eq!(f.cpu.xsave.mxcsr(), 0xffff);
}

#[test]
fn misaligned_scalars_raise_ac_in_ring_three_only() {
    let mut f = Fixture::new();
    f.cpu.cr0 |= control::CR0_AM;
    f.cpu.rflags |= flag::AC;
    f.cpu.gpr[7] = DATA + 1;
    let movsd = [0xf2, 0x0f, 0x10, 0x0f];
    assert_eq!(f.run(&movsd), Ok(()));
    f.cpu.mode.cpl = 3;
    assert_eq!(f.run(&movsd), Err(Exception::with_code(vector::AC, 0)));
}

#[test]
fn code_decoded_for_32_bit_runs_the_same_computation() {
    let mut f = Fixture::new();
    f.cpu.xsave.set_xmm(1, 3);
    f.cpu.xsave.set_xmm(2, 4);
    // paddd xmm1, xmm2; then pextrd eax, xmm1, 0 in 32-bit code.
    assert_eq!(f.run_decoded(&decode(&[0x66, 0x0f, 0xfe, 0xca], 32)), Ok(()));
    f.cpu.gpr[0] = u64::MAX;
    assert_eq!(f.run_decoded(&decode(&[0x66, 0x0f, 0x3a, 0x16, 0xc8, 0], 32)), Ok(()));
    assert_eq!((f.cpu.xsave.xmm(1), f.cpu.gpr[0]), (7, 7));
}

#[test]
fn a_full_cache_is_emptied_and_goes_on() {
    let mut f = Fixture::new();
    for round in 0..40u32 {
        for immediate in 0..=255 {
            let source = round as u8 % 8;
            // pshufd xmm1, xmmN, immediate.
            assert_eq!(f.run(&[0x66, 0x0f, 0x70, 0xc8 | source, immediate]), Ok(()));
            // palignr and blendps: more encodings.
            assert_eq!(f.run(&[0x66, 0x0f, 0x3a, 0x0f, 0xc8 | source, immediate]), Ok(()));
            assert_eq!(f.run(&[0x66, 0x0f, 0x3a, 0x0c, 0xd0 | source, immediate]), Ok(()));
        }
    }
    f.cpu.xsave.set_xmm(2, 0x0403_0201);
    assert_eq!(f.run(&[0x66, 0x0f, 0x70, 0xca, 0]), Ok(()));
    assert_eq!(f.cpu.xsave.xmm(1), 0x0403_0201_0403_0201_0403_0201_0403_0201);
}

#[test]
fn faults_on_several_threads_stay_apart() {
    let threads: Vec<_> = (0..4u32)
        .map(|id| {
            std::thread::spawn(move || {
                let mut f = Fixture::new();
                f.cpu.xsave.set_mxcsr(0x1d80);
                for round in 0..200 {
                    let numerator = u128::from(0x3f80_0000 + id * 1000 + round);
                    f.cpu.xsave.set_xmm(1, numerator);
                    f.cpu.xsave.set_xmm(2, 0);
                    // divss xmm1, xmm2, then with a divisor of 1.
                    let outcome = f.run(&[0xf3, 0x0f, 0x5e, 0xca]);
                    assert_eq!(outcome, Err(Exception::fault(vector::XM)));
                    f.cpu.xsave.set_xmm(2, 0x3f80_0000);
                    assert_eq!(f.run(&[0xf3, 0x0f, 0x5e, 0xca]), Ok(()));
                    assert_eq!(f.cpu.xsave.xmm(1), numerator);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no assertion fails");
    }
}

#[test]
fn undocumented_and_ancient_x87_encodings_do_what_the_host_does() {
    let mut f = Fixture::new();
    assert_eq!(f.run(&FLD1), Ok(()));
    // FNENI, FNDISI, FNSETPM; FFREEP ST(0); the aliases of FCOM, FXCH and FSTP.
    let codes =
        [[0xdb, 0xe0], [0xdb, 0xe1], [0xdb, 0xe4], [0xdf, 0xc0], [0xdc, 0xd1], [0xdd, 0xc9], [0xd9, 0xd9]];
    for code in codes {
        assert_eq!(f.run(&code), Ok(()), "{code:02x?}");
    }
}
