//! Random values with a bias towards the ones where arithmetic changes its mind.

use crate::case::{Mode, Vectors, XSAVE, YMM_HIGH};
use crate::layout::{self, BASE, PAGE};
use crate::rng::Rng;

const NOTABLE: [u64; 24] = [
    0,
    1,
    2,
    3,
    0xff,
    0x7f,
    0x80,
    0xffff,
    0x7fff,
    0x8000,
    0xffff_ffff,
    0x7fff_ffff,
    0x8000_0000,
    u64::MAX,
    i64::MAX as u64,
    i64::MIN as u64,
    0x1_0000_0000,
    0xffff_ffff_8000_0000,
    0x7fff_ffff_f000,
    0x8000_0000_0000,
    0xffff_7fff_ffff_ffff,
    0xffff_8000_0000_0000,
    0x0808_0808_0808_0808,
    0x5555_5555_5555_5555,
];

/// A value for a general register.
pub fn integer(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 | 1 => rng.bits(),
        2 => rng.pick(&NOTABLE),
        3 => rng.below(72),
        4 => rng.below(72).wrapping_neg(),
        5 => 1u64.wrapping_shl(rng.byte().into()).wrapping_add(rng.below(3)).wrapping_sub(1),
        6 => rng.bits() >> rng.below(64),
        _ => u64::from(rng.bits() as u32),
    }
}

/// An offset in the window: mostly inside mapped pages, often at their edges.
pub fn window_offset(rng: &mut Rng) -> usize {
    let page = match rng.below(16) {
        0..=9 => layout::DATA,
        10 | 11 => layout::STACK,
        12 => layout::READ_ONLY,
        13 => layout::CODE,
        14 => layout::TOP,
        _ => 0x1000 * rng.below(16) as usize,
    };
    match rng.below(8) {
        0..=2 => page + 64 * rng.below((PAGE / 64) as u64) as usize,
        3 => page + rng.below(PAGE as u64) as usize,
        4 => page + 16 * rng.below((PAGE / 16) as u64) as usize,
        5 => page + 8 * rng.below((PAGE / 8) as u64) as usize,
        6 => page + PAGE - 1 - rng.below(66) as usize,
        _ => (page + rng.below(40) as usize).wrapping_sub(20) & 0xffff,
    }
}

/// A linear address that is interesting for an access.
pub fn address(rng: &mut Rng, mode: Mode) -> u64 {
    match rng.below(64) {
        0 if mode == Mode::Long => rng.pick(&[
            0x7fff_ffff_fff8,
            0x7fff_ffff_ffff,
            0x8000_0000_0000,
            0xffff_7fff_ffff_fffc,
            0xffff_8000_0000_0000,
            0xffff_ffff_ffff_fffc,
            u64::MAX,
        ]),
        1 => rng.below(16).wrapping_sub(8),
        _ => BASE + window_offset(rng) as u64,
    }
}

/// Eight bytes of a data page: numbers, addresses, selectors, floating-point values.
pub fn memory_word(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => BASE + window_offset(rng) as u64,
        1 => BASE + (layout::CODE as u64) + rng.below(layout::CODE_LEN as u64),
        2 => {
            let double = double(rng);
            if rng.once_in(2) { double } else { single(rng) | single(rng) << 32 }
        }
        3 => rng.bits(),
        _ => integer(rng),
    }
}

/// A single-precision bit pattern.
pub fn single(rng: &mut Rng) -> u64 {
    let sign = rng.bits() & 0x8000_0000;
    sign | match rng.below(10) {
        0 => 0,
        1 => 0x7f80_0000,
        2 => 0x7fc0_0000 | rng.bits() & 0x3f_ffff,
        3 => 0x7f80_0001 | rng.bits() & 0x3f_ffff,
        4 => rng.bits() & 0x7f_ffff,
        5 => rng.pick(&[1, 0x7f_ffff, 0x80_0000, 0x7f7f_ffff, 0x4f00_0000, 0x5f00_0000, 0x3f80_0000]),
        6 => u64::from((rng.below(4096) as f32 * 0.5).to_bits()),
        7 => (120 + rng.below(20)) << 23 | rng.bits() & 0x7f_ffff,
        _ => rng.bits() & 0x7fff_ffff,
    }
}

/// A double-precision bit pattern.
pub fn double(rng: &mut Rng) -> u64 {
    let sign = rng.bits() & 1 << 63;
    let fraction = (1 << 52) - 1;
    sign | match rng.below(10) {
        0 => 0,
        1 => 0x7ff << 52,
        2 => 0xfff << 51 | rng.bits() & (fraction >> 1),
        3 => 0x7ff << 52 | 1 | rng.bits() & (fraction >> 1),
        4 => rng.bits() & fraction,
        5 => rng.pick(&[1, fraction, 1 << 52, (0x7ff << 52) - 1, 0x41e0 << 48, 0x43e0 << 48, 0x3ff << 52]),
        6 => (rng.below(1 << 20) as f64 * 0.5).to_bits(),
        7 => (1016 + rng.below(20)) << 52 | rng.bits() & fraction,
        _ => rng.bits() & (u64::MAX >> 1),
    }
}

/// An extended-precision bit pattern, the invalid ones included.
fn extended(rng: &mut Rng) -> [u8; 10] {
    let sign = (rng.bits() & 0x8000) as u16;
    let integer = 1 << 63;
    let (exponent, significand) = match rng.below(12) {
        0 => (0, 0),
        1 => (0x7fff, integer),
        2 => (0x7fff, 3 << 62 | rng.bits() >> 2),
        3 => (0x7fff, integer | 1 | rng.bits() >> 2),
        4 => (0, rng.bits() >> 1),
        5 => (0, integer | rng.bits() >> 1),
        6 => (rng.bits() as u16 & 0x7fff, rng.bits() >> 1),
        7 => (0x3fff + rng.below(70) as u16, integer | rng.bits() >> 1 & (u64::MAX << rng.below(64))),
        8 => (0x3ff0 + rng.below(32) as u16, integer | rng.bits() >> 1),
        9 => (rng.pick(&[1, 2, 0x3fff, 0x3ffe, 0x3c01, 0x43ff, 0x7ffe, 0x3f81, 0x407e]), integer),
        10 => (0xffff, rng.bits()),
        _ => (rng.bits() as u16 & 0x7fff, integer | rng.bits()),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
    bytes
}

/// Eight bytes of a vector register.
fn vector_word(rng: &mut Rng, flavour: u64) -> u64 {
    match flavour {
        0 => double(rng),
        1 => single(rng) | single(rng) << 32,
        2 => integer(rng),
        3 => integer(rng) as u32 as u64 | integer(rng) << 32,
        4 => rng.bits() & 0x8080_8080_8080_8080 | rng.bits() & 0x0f0f_0f0f_0f0f_0f0f,
        _ => rng.bits(),
    }
}

/// Random vector and x87 state.
pub fn vectors(rng: &mut Rng) -> Box<Vectors> {
    let mut v = Box::new(Vectors([0; XSAVE]));
    let area = &mut v.0;
    let control = match rng.below(8) {
        0..=4 => 0x37f,
        5 => 0x40 | 0x3f | (rng.bits() as u16 & 0xf00),
        _ => 0x40 | (rng.bits() as u16 & 0x1f3f),
    };
    let status = match rng.below(4) {
        0 | 1 => (rng.bits() as u16) & 0x3800,
        2 => rng.bits() as u16 & 0x7f00,
        _ => rng.bits() as u16 & 0x7f7f,
    };
    let tags = match rng.below(4) {
        0 => 0,
        1 | 2 => 0xff,
        _ => rng.byte(),
    };
    // Bit 7 (ES) and bit 15 (B) follow from the others: the processor computes them anew on loading.
    let pending = status & !control & 0x3f != 0;
    let status = status | if pending { 0x8080 } else { 0 };
    area[0..2].copy_from_slice(&control.to_le_bytes());
    area[2..4].copy_from_slice(&status.to_le_bytes());
    area[4] = tags;
    let mxcsr: u32 = match rng.below(8) {
        0..=3 => 0x1f80,
        4 | 5 => 0x1f80 | (rng.bits() as u32 & 0xe07f),
        _ => rng.bits() as u32 & 0xffff,
    };
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    area[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    for st in 0..8 {
        area[32 + 16 * st..][..10].copy_from_slice(&extended(rng));
    }
    for register in 0..16 {
        let flavour = rng.below(6);
        for half in [160 + 16 * register, YMM_HIGH + 16 * register] {
            for word in area[half..half + 16].chunks_exact_mut(8) {
                word.copy_from_slice(&vector_word(rng, flavour).to_le_bytes());
            }
        }
    }
    // XSTATE_BV: x87, SSE and AVX are in use.
    area[512] = 7;
    v
}
