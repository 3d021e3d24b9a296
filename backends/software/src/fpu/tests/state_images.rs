//! FXSAVE, FXRSTOR and the XSAVE family: image formats, masks, header checks.

use super::Fixture;
use super::fixture::{DATA, Random, decode};
use crate::cpu::XsaveArea;
use crate::exception::Exception;
use crate::fpu::state::{component, offset};
use crate::fpu::xinuse;

const FXSAVE64: [u8; 4] = [0x48, 0x0f, 0xae, 0x07];
const FXRSTOR64: [u8; 4] = [0x48, 0x0f, 0xae, 0x0f];
const FXSAVE: [u8; 3] = [0x0f, 0xae, 0x07];
const XSAVE64: [u8; 4] = [0x48, 0x0f, 0xae, 0x27];
const XRSTOR64: [u8; 4] = [0x48, 0x0f, 0xae, 0x2f];
const XSAVEOPT64: [u8; 4] = [0x48, 0x0f, 0xae, 0x37];
const XSAVEC64: [u8; 4] = [0x48, 0x0f, 0xc7, 0x27];

fn filled() -> Fixture {
    let mut f = Fixture::new();
    let mut random = Random(77);
    for i in 0..16 {
        let mut value = [0; 32];
        random.fill(&mut value);
        value[0] |= 1;
        value[16] |= 1;
        f.cpu.xsave.set_ymm(i, &value);
    }
    for i in 0..8 {
        f.cpu.xsave.set_st(i, random.extended());
    }
    f.cpu.xsave.set_ftw(0xa5);
    f.cpu.xsave.set_fsw(0x3801);
    f.cpu.xsave.set_fip(0x1122_3344_5566);
    f.cpu.xsave.set_mxcsr(0x1fa0);
    f.cpu.gpr[7] = DATA;
    f.store(DATA, &[0xcc; 4096]);
    (f.cpu.gpr[0], f.cpu.gpr[2]) = (7, 0);
    f
}

fn poison(f: &mut Fixture) {
    *f.cpu.xsave = XsaveArea::init();
    f.cpu.xsave.set_xmm(1, 9);
    f.cpu.xsave.set_ymm_high(1, 9);
}

#[test]
fn fxsave_stores_416_bytes_and_fxrstor_takes_them_back() {
    let mut f = filled();
    let before = f.cpu.xsave.clone();
    assert_eq!(f.run(&FXSAVE64), Ok(()));
    let image = f.load::<512>(DATA);
    assert_eq!(image[28..32], [0xff, 0xff, 0, 0], "MXCSR_MASK");
    assert_eq!(image[416..], [0xcc; 96], "reserved bytes stay");
    poison(&mut f);
    f.cpu.xsave.0[offset::YMM_HIGH..].copy_from_slice(&before.0[offset::YMM_HIGH..]);
    assert_eq!(f.run(&FXRSTOR64), Ok(()));
    assert!(f.cpu.xsave.0[..28] == before.0[..28] && f.cpu.xsave.0[32..416] == before.0[32..416]);
    f.store(DATA + 24, &0x8001_1f80u32.to_le_bytes());
    assert_eq!(f.run(&FXRSTOR64), Err(Exception::GP0), "reserved MXCSR bits");
    f.cpu.gpr[7] = DATA + 8;
    assert_eq!(f.run(&FXSAVE64), Err(Exception::GP0), "alignment");
}

#[test]
fn fxsave_outside_64_bit_mode_leaves_the_upper_registers() {
    let mut f = filled();
    f.cpu.mode.bits = 32;
    assert_eq!(f.run_decoded(&decode(&FXSAVE, 32)), Ok(()));
    let image = f.load::<512>(DATA);
    assert_eq!(image[288..416], [0xcc; 128]);
    assert_eq!(image[8..16], [0x66, 0x55, 0x44, 0x33, 0, 0, 0, 0], "32-bit pointer and selector");
}

#[test]
fn xsave_writes_what_is_requested_and_merges_the_header() {
    let mut f = filled();
    f.store(DATA + 512, &[0; 64]);
    f.store(DATA + 512, &4u64.to_le_bytes());
    f.cpu.gpr[0] = 2;
    assert_eq!(f.run(&XSAVE64), Ok(()));
    let image = f.load::<832>(DATA);
    assert_eq!(image[..24], [0xcc; 24], "x87 not requested");
    assert_eq!(image[24..28], 0x1fa0u32.to_le_bytes());
    assert!(image[160..416] == f.cpu.xsave.0[160..416]);
    assert_eq!(image[512], 6, "old AVX bit kept, SSE set");
    assert_eq!(image[576..], [0xcc; 256]);
    f.cpu.gpr[7] = DATA + 32;
    assert_eq!(f.run(&XSAVE64), Err(Exception::GP0), "64-byte alignment");
}

#[test]
fn xsave_and_xrstor_are_inverse_for_every_mask() {
    for mask in 0..8 {
        let mut f = filled();
        let before = f.cpu.xsave.clone();
        f.store(DATA + 512, &[0; 64]);
        assert_eq!(f.run(&XSAVE64), Ok(()));
        poison(&mut f);
        f.cpu.gpr[0] = mask;
        assert_eq!(f.run(&XRSTOR64), Ok(()));
        let same = |range: std::ops::Range<usize>| f.cpu.xsave.0[range.clone()] == before.0[range];
        assert_eq!(same(0..24) && same(32..160), mask & component::X87 != 0, "x87 mask {mask}");
        assert_eq!(same(160..416), mask & component::SSE != 0, "SSE mask {mask}");
        assert_eq!(same(576..832), mask & component::AVX != 0, "AVX mask {mask}");
        assert_eq!(f.cpu.xsave.mxcsr() == 0x1fa0, mask & 6 != 0, "MXCSR mask {mask}");
    }
}

#[test]
fn xrstor_initialises_requested_components_that_the_image_lacks() {
    let mut f = filled();
    f.store(DATA, &[0; 1024]);
    f.store(DATA + 24, &0x1f80u32.to_le_bytes());
    assert_eq!(f.run(&XRSTOR64), Ok(()));
    assert_eq!(f.cpu.xsave.in_use(), 0);
    assert_eq!(f.cpu.xsave.mxcsr(), 0x1f80);
}

#[test]
fn xrstor_refuses_reserved_header_bits() {
    for (at, value) in [(512, 8), (513, 1), (520, 1), (528, 1), (527, 0x80)] {
        let mut f = filled();
        f.store(DATA, &[0; 1024]);
        if at == 527 {
            f.store(DATA + 536, &[1]);
        }
        f.store(DATA + at, &[value]);
        assert_eq!(f.run(&XRSTOR64), Err(Exception::GP0), "header byte {at}");
    }
    let mut f = filled();
    f.store(DATA, &[0; 1024]);
    f.store(DATA + 552, &[1]);
    assert_eq!(f.run(&XRSTOR64), Ok(()), "the standard format ignores bytes 63..24");
}

#[test]
fn xsaveopt_and_xsavec_skip_components_in_init() {
    let mut f = filled();
    f.cpu.xsave.initialize(component::AVX);
    f.store(DATA + 512, &[0; 64]);
    f.store(DATA + 512, &[7]);
    assert_eq!(f.run(&XSAVEOPT64), Ok(()));
    let image = f.load::<832>(DATA);
    assert_eq!((image[512], image[576]), (3, 0xcc));
    let before = f.cpu.xsave.clone();
    f.store(DATA, &[0xcc; 1024]);
    assert_eq!(f.run(&XSAVEC64), Ok(()));
    let image = f.load::<832>(DATA);
    assert_eq!(image[512..528], [3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0x80]);
    assert_eq!(image[576], 0xcc);
    f.store(DATA + 528, &[0; 48]);
    poison(&mut f);
    assert_eq!(f.run(&XRSTOR64), Ok(()));
    assert!(f.cpu.xsave.0[..24] == before.0[..24] && f.cpu.xsave.0[576..] == before.0[576..]);
    assert_eq!(f.cpu.xsave.mxcsr(), 0x1fa0);
}

#[test]
fn xinuse_reports_within_xcr0() {
    let mut f = filled();
    assert_eq!(xinuse(&f.cpu), 7);
    f.cpu.xcr0 = 3;
    assert_eq!(xinuse(&f.cpu), 3);
}

#[test]
fn xrstor_takes_mxcsr_from_the_image_as_each_format_says() {
    for requested in 0..8u64 {
        for present in 0..8u64 {
            for compact in [false, true] {
                let mut f = filled();
                f.store(DATA, &[0; 1024]);
                f.store(DATA + 24, &0x1f90u32.to_le_bytes());
                f.store(DATA + 512, &present.to_le_bytes());
                f.store(DATA + 520, &if compact { 1 << 63 | 7u64 } else { 0 }.to_le_bytes());
                f.cpu.gpr[0] = requested;
                assert_eq!(f.run(&XRSTOR64), Ok(()));
                let expected = match compact {
                    false if requested & 6 != 0 => 0x1f90,
                    true if requested & present & 2 != 0 => 0x1f90,
                    true if requested & 2 != 0 => 0x1f80,
                    _ => 0x1fa0,
                };
                assert_eq!(f.cpu.xsave.mxcsr(), expected, "{requested} {present} compact {compact}");
            }
        }
    }
}
