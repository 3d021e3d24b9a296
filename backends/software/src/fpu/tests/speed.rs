//! Time per executed instruction, decoding left out.

use std::time::Instant;

use super::Fixture;
use super::fixture::decode;

const CASES: [(&str, &[u8]); 18] = [
    ("movups xmm1, [rdi]", &[0x0f, 0x10, 0x0f]),
    ("movups [rdi], xmm1", &[0x0f, 0x11, 0x0f]),
    ("movdqa xmm1, xmm2", &[0x66, 0x0f, 0x6f, 0xca]),
    ("movq xmm1, rax", &[0x66, 0x48, 0x0f, 0x6e, 0xc8]),
    ("pxor xmm1, xmm1", &[0x66, 0x0f, 0xef, 0xc9]),
    ("vmovdqu ymm1, [rdi]", &[0xc5, 0xfe, 0x6f, 0x0f]),
    ("paddb xmm1, xmm2", &[0x66, 0x0f, 0xfc, 0xca]),
    ("pshufb xmm1, [rdi]", &[0x66, 0x0f, 0x38, 0x00, 0x0f]),
    ("pmovmskb eax, xmm1", &[0x66, 0x0f, 0xd7, 0xc1]),
    ("addsd xmm1, xmm2", &[0xf2, 0x0f, 0x58, 0xca]),
    ("comisd xmm1, xmm2", &[0x66, 0x0f, 0x2f, 0xca]),
    ("vpaddb ymm1, ymm2, ymm3", &[0xc5, 0xed, 0xfc, 0xcb]),
    ("vfmadd213pd ymm1, ymm2, [rdi]", &[0xc4, 0xe2, 0xed, 0xa8, 0x0f]),
    ("paddb mm1, mm2", &[0x0f, 0xfc, 0xca]),
    ("fadd st, st(1)", &[0xd8, 0xc1]),
    ("fld qword [rdi]; fstp [rdi]", &[0xdd, 0x07, 0xdd, 0x1f]),
    ("fnstcw [rdi]", &[0xd9, 0x3f]),
    ("xsaveopt64 [rdi]", &[0x48, 0x0f, 0xae, 0x37]),
];

#[test]
#[ignore = "a measurement: run it with --release --ignored --nocapture (#2)"]
fn nanoseconds_per_instruction() {
    const ROUNDS: u32 = 300_000;
    let mut f = Fixture::new();
    f.cpu.gpr[0] = 7;
    for (name, code) in CASES {
        let first = decode(code, 64);
        let second = (first.len() < code.len()).then(|| decode(&code[first.len()..], 64));
        if f.run_decoded(&first).is_err() {
            println!("{name:32} not on this host");
            continue;
        }
        let mut best = f64::MAX;
        for _ in 0..5 {
            f.cpu.xsave.x87_init();
            let start = Instant::now();
            for _ in 0..ROUNDS {
                let _ = f.run_decoded(&first);
                if let Some(second) = &second {
                    let _ = f.run_decoded(second);
                }
            }
            let count = if second.is_some() { 2 } else { 1 };
            best = best.min(start.elapsed().as_nanos() as f64 / f64::from(ROUNDS * count));
        }
        println!("{name:32} {best:7.1} ns");
    }
}
