//! Garbage never harms the host: random code on random tables in random modes ends in some architectural way.
//!
//! Overflow checks and bounds checks are on in the test profile, so a careless computation on a guest's value
//! ends the test. `ATOLL_NOISE_CASES` sets the number of cases, `ATOLL_NOISE_SEED` the first seed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use atoll_machine::backend::{Partition, Vcpu};
use atoll_machine::cpu::model::Vendor;
use atoll_machine::cpu::state::{CpuState, DescriptorTable, seg};

use crate::guest::*;

/// A small generator: repeatable, and good enough to hit odd corners.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// A value that is often near something interesting.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(0x10_0000),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => 0u64.wrapping_sub(self.below(0x1_0000)),
            4 => [0x7fff_ffff_ffff, 0xffff_8000_0000_0000, 0x8000_0000_0000, 0xfee0_0000]
                [self.below(4) as usize],
            _ => self.next(),
        }
    }
}

/// Bytes that start many of the rare instructions.
const RARE: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x21],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xb2],
    &[0x0f, 0xc7],
    &[0x66, 0x0f, 0x38, 0x82],
    &[0x8e],
    &[0x8c],
    &[0x9a],
    &[0xea],
    &[0xca],
    &[0xcb],
    &[0xcc],
    &[0xcd],
    &[0xce],
    &[0xcf],
    &[0x48, 0xcf],
    &[0xf1],
    &[0x9c],
    &[0x9d],
    &[0xfa],
    &[0xfb],
    &[0xec],
    &[0x6c],
    &[0xf3, 0x6e],
    &[0xff],
    &[0xf3, 0xa4],
    &[0xc8],
    &[0x62],
    &[0xc4],
];

fn noise_code(r: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 256 {
        if r.below(2) == 0 {
            code.extend_from_slice(RARE[r.below(RARE.len() as u64) as usize]);
        }
        for _ in 0..r.below(6) {
            code.push(r.next() as u8);
        }
    }
    code
}

/// Descriptors that are often nearly right.
fn noise_descriptor(r: &mut Random) -> u64 {
    let kind = r.below(32) | r.below(4) << 5 | u64::from(r.below(8) != 0) << 7;
    let base = r.below(0x10_0000);
    r.below(0x1_0000)
        | (base & 0xff_ffff) << 16
        | kind << 40
        | r.below(16) << 48
        | r.below(16) << 52
        | if r.below(4) == 0 { r.next() & 0xff00_0000_0000_0000 } else { 0 }
}

fn noise_state(m: &Machine, r: &mut Random) -> CpuState {
    let mut s = match r.below(3) {
        0 => m.long_state(),
        1 => m.protected_state(),
        _ => m.real_state(),
    };
    s.rip = 0x1_0000 + r.below(0x100);
    if s.cr0 & 1 == 0 {
        s.rip &= 0xffff;
        s.segments[seg::CS].base = 0x1_0000;
    }
    for register in &mut s.gpr {
        *register = r.value();
    }
    s.gpr[4] = STACK - r.below(64);
    s.rflags = r.next() & 0x3f_7fd7 & !(1 << 17) | 2;
    if r.below(4) == 0 {
        s.rflags |= (s.cr0 & 1) << 17;
        if s.efer & 0x400 != 0 {
            s.rflags &= !(1 << 17);
        }
    }
    if r.below(3) == 0 {
        s.dr = [r.below(0x12_0000), r.below(0x12_0000), r.below(0x400), r.value()];
        s.dr7 = 0x400 | r.next() & 0xffff_23ff;
    }
    s.gdtr = DescriptorTable { base: GDT, limit: r.below(0x400) as u16 | 0xff };
    s.idtr = DescriptorTable { base: IDT, limit: r.below(0x1000) as u16 };
    if r.below(2) == 0 {
        let cpl3 = 3 << 5;
        for segment in &mut s.segments {
            if s.cr0 & 1 != 0 {
                segment.attributes |= cpl3;
                segment.selector |= 3;
            }
        }
    }
    s.interrupt_shadow = r.below(8) == 0;
    s.nmi_pending = r.below(8) == 0;
    enable_apic(s)
}

fn run_case(m: &mut Machine, seed: u64) {
    let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for n in 0..512 {
        m.write64(GDT + 8 * (n % 128), noise_descriptor(&mut r));
        m.write64(IDT + 8 * n, noise_descriptor(&mut r) & !(0xff << 16) | r.below(16) << 19);
        m.write64(TSS + 8 * (n % 64), r.value());
    }
    // Some selectors lead somewhere.
    m.write64(GDT + 8, 0x00af_9b00_0000_ffff);
    m.write64(GDT + 0x10, 0x00cf_9300_0000_ffff);
    m.write64(GDT + 0x18, 0x00cf_9b00_0000_ffff);
    for page in 0..16 {
        let code = noise_code(&mut r);
        m.write(0x1_0000 + page * 0x100, &code[..256]);
    }
    let state = noise_state(m, &mut r);
    m.vcpu.set_state(&state).expect("a possible state");
    m.partition.counting().expect("counts").set_budget(0, Some(400));
    m.run();
    // What came out can go in again.
    let after = m.vcpu.state();
    m.vcpu.set_state(&after).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
}

#[test]
fn random_code_and_tables_never_harm_the_host() {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let cases: u64 = number("ATOLL_NOISE_CASES", 2000);
    let first: u64 = number("ATOLL_NOISE_SEED", 1);
    let over = AtomicBool::new(false);
    let mut m = Machine::with(Vendor::Intel, 1);
    let mut n = Machine::with(Vendor::Amd, 1);
    let counters = [m.partition.clone(), n.partition.clone()];
    std::thread::scope(|scope| {
        // Whoever halts is called back.
        let callers = [&m, &n].map(|m| (m.io.stop.clone(), m.partition.clone()));
        let over = &over;
        scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
                for (stop, partition) in &callers {
                    stop.set();
                    partition.kick(0);
                }
            }
        });
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _end = Over(over);
        for seed in first..first + cases {
            let machine = if seed % 2 == 0 { &mut m } else { &mut n };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_case(machine, seed))).is_err() {
                panic!("seed {seed} harmed the host; run it alone with ATOLL_NOISE_SEED={seed}");
            }
        }
    });
    let retired: u64 = counters.iter().filter_map(|p| p.counting()).map(|c| c.retired(0)).sum();
    println!("{retired} instructions in {cases} cases");
    assert!(retired > cases * 2, "the cases end before they begin");
}
