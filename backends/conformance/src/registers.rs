//! The architectural state: what power-on is, that what is set is what is there, and what is refused.

use atoll_machine::backend::{Backend, Partition, Vcpu};
use atoll_machine::cpu::model::MsrKind;
use atoll_machine::cpu::saved_state::CpuStateV1;
use atoll_machine::cpu::state::{
    Activity, CpuState, DescriptorTable, EventKind, LapicState, PendingEvent, Segment, gpr, seg,
};
use iced_x86::code_asm::*;
use prost::Message;

use crate::fixture::{DEVICE, Machine, ROM};
use crate::payload::{DATA, apic, assemble, flat, long_state, selector, set_apic};

/// Reproducible random numbers (xorshift).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
    fn canonical(&mut self) -> u64 {
        ((self.next() << 16) as i64 >> 16) as u64
    }
}

/// Sets what `change` makes of a 64-bit state, many times, and hands what was set and what came back to `same`.
fn round_trips<B: Backend>(
    backend: &B,
    change: impl Fn(&mut CpuState, &mut Random),
    same: impl Fn(&CpuState, &CpuState),
) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.vcpu(0);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..200 {
        let mut state = long_state(&machine, 0, DATA);
        change(&mut state, &mut random);
        state.cr4 &= machine.model.cr4_mask();
        state.check(&machine.model).expect("the case makes valid states");
        guest.set_state(&state).expect("a valid state");
        same(&state, &guest.state());
    }
}

pub(crate) fn power_on_is_the_architectural_reset_state<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 2);
    for index in 0..2 {
        let state = machine.vcpu(index).state();
        let expected = CpuState::power_on(index, index == 0, machine.model.signature());
        same_power_on(&state, &expected);
        for entry in machine.model.msrs() {
            if let Some((_, value)) = state.msrs.iter().find(|(i, _)| *i == entry.index)
                && !matches!(entry.kind, MsrKind::Engine)
            {
                assert_eq!(*value, entry.reset, "MSR {:#x}", entry.index);
            }
        }
        assert!(state.msrs.len() > 20, "the state has the model's registers");
        assert!(state.msrs.is_sorted_by(|a, b| a.0 < b.0), "MSRs are sorted and each is there once");
        state.check(&machine.model).expect("power-on is a valid state");
    }
}

fn same_power_on(state: &CpuState, expected: &CpuState) {
    let plain = CpuState {
        msrs: Vec::new(),
        tsc: 0,
        xsave: expected.xsave.clone(),
        lapic: expected.lapic.clone(),
        ..state.clone()
    };
    assert_eq!(plain, *expected);
    assert_eq!(state.lapic.apic_base, expected.lapic.apic_base);
    for offset in [0x20, 0x80, 0xd0, 0xe0, 0xf0, 0x320, 0x350, 0x360, 0x370, 0x380, 0x3e0] {
        assert_eq!(apic(state, offset), apic(expected, offset), "local APIC register {offset:#x}");
    }
    assert_eq!(state.xsave[0..2], expected.xsave[0..2], "FCW");
    assert_eq!(state.xsave[24..28], expected.xsave[24..28], "MXCSR");
    assert!(state.xsave[32..512].iter().all(|&b| b == 0), "x87 and SSE registers are zero");
}

pub(crate) fn reset_returns_to_power_on_and_runs_from_the_reset_vector<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let jump = assemble(16, 0xfff0, |a| a.jmp(0xff00u64));
    machine.rom.write(0xfff0, &jump).expect("room at the reset vector");
    let code = assemble(16, 0xff00, |a| {
        a.mov(ax, 0x1234u32)?;
        a.out(0xf4, al)?;
        a.hlt()
    });
    machine.rom.write(0xff00, &code).expect("room in the ROM");
    let mut guest = machine.vcpu(0);
    for _ in 0..2 {
        let state = machine.finish(&mut guest);
        assert_eq!(state.gpr[gpr::RAX] & 0xffff, 0x1234);
        assert_eq!(state.segments[seg::CS].base, ROM);
        assert_eq!(state.gpr[gpr::RDX], u64::from(machine.model.signature()), "EDX holds the signature");
        guest.set_state(&long_state(&machine, 0, DATA)).expect("a valid state");
        guest.reset();
        same_power_on(&guest.state(), &CpuState::power_on(0, true, machine.model.signature()));
    }
}

pub(crate) fn general_registers_and_flags_round_trip<B: Backend>(backend: &B) {
    round_trips(
        backend,
        |s, r| {
            s.gpr = std::array::from_fn(|_| r.next());
            s.rip = r.canonical();
            s.rflags = r.next() & 0x24_4fd5 | 2;
        },
        |set, got| {
            assert_eq!((got.gpr, got.rip, got.rflags), (set.gpr, set.rip, set.rflags));
        },
    );
}

pub(crate) fn segments_and_tables_round_trip<B: Backend>(backend: &B) {
    round_trips(
        backend,
        |s, r| {
            for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
                let limit = r.next() as u32 | 0xfff;
                s.segments[index] = Segment { limit, ..flat(r.next() as u16 & 0xfff8, 0xc093) };
            }
            s.segments[seg::ES].attributes = Segment::UNUSABLE;
            s.segments[seg::FS].base = r.canonical();
            s.segments[seg::GS].base = r.canonical();
            s.gdtr = DescriptorTable { base: r.canonical(), limit: r.next() as u16 };
            s.idtr = DescriptorTable { base: r.canonical(), limit: r.next() as u16 };
            s.tr.base = r.canonical();
            s.tr.limit = 0x67 + r.below(0x1000) as u32;
            s.ldtr = Segment { selector: 0x58, base: r.canonical(), limit: 0xfff, attributes: 0x82 };
        },
        |set, got| {
            for index in [seg::CS, seg::SS, seg::DS, seg::FS, seg::GS] {
                assert_eq!(got.segments[index], set.segments[index], "segment {index}");
            }
            assert!(got.segments[seg::ES].unusable());
            assert_eq!((got.ldtr, got.tr), (set.ldtr, set.tr));
            assert_eq!((got.gdtr, got.idtr), (set.gdtr, set.idtr));
        },
    );
}

pub(crate) fn control_and_debug_registers_round_trip<B: Backend>(backend: &B) {
    round_trips(
        backend,
        |s, r| {
            s.cr0 = s.cr0 & !0xc | r.next() & 0xc | r.next() & 1 << 18;
            s.cr2 = r.canonical();
            s.cr3 = r.below(1 << 20) << 12;
            s.cr4 |= r.next() & 0x31_0884;
            s.efer = s.efer & !0x801 | r.next() & 0x801;
            s.cr8 = r.below(16);
            set_apic(s, 0x80, (s.cr8 as u32) << 4);
            s.dr = std::array::from_fn(|_| r.canonical());
            s.dr6 = 0xffff_0ff0 | r.next() & 0xe00f;
            s.dr7 = 0x400 | r.next() & 0xffff_00ff;
        },
        |set, got| {
            assert_eq!((got.cr0, got.cr2, got.cr3, got.cr4), (set.cr0, set.cr2, set.cr3, set.cr4));
            assert_eq!((got.efer, got.cr8), (set.efer, set.cr8));
            assert_eq!((got.dr, got.dr6, got.dr7), (set.dr, set.dr6, set.dr7));
            assert_eq!(apic(got, 0x80), (set.cr8 as u32) << 4, "TPR mirrors CR8");
        },
    );
}

pub(crate) fn vector_state_round_trips<B: Backend>(backend: &B) {
    round_trips(
        backend,
        |s, r| {
            s.xsave[0..2].copy_from_slice(&(0x40 | r.next() as u16 & 0xf3f).to_le_bytes());
            s.xsave[2..4].copy_from_slice(&((r.next() as u16) & 0x7f7f).to_le_bytes());
            // The summary and busy bits follow from the exception flags and masks.
            s.xsave[2] &= 0x40;
            s.xsave[4] = r.next() as u8;
            s.xsave[24..28].copy_from_slice(&(r.next() as u32 & 0xffff).to_le_bytes());
            for register in 0..8 {
                let at = 32 + register * 16;
                s.xsave[at..at + 8].copy_from_slice(&r.next().to_le_bytes());
                s.xsave[at + 8..at + 10].copy_from_slice(&(r.next() as u16).to_le_bytes());
            }
            for at in (160..416).chain(576..832).step_by(8) {
                s.xsave[at..at + 8].copy_from_slice(&r.next().to_le_bytes());
            }
        },
        |set, got| {
            assert_eq!(got.xcr0, set.xcr0);
            assert_eq!(got.xsave[0..5], set.xsave[0..5], "FCW, FSW, FTW");
            assert_eq!(got.xsave[24..28], set.xsave[24..28], "MXCSR");
            assert_eq!(got.xsave[32..160], set.xsave[32..160], "x87 registers");
            assert_eq!(got.xsave[160..416], set.xsave[160..416], "XMM registers");
            if set.xcr0 & 4 != 0 {
                assert_eq!(got.xsave[576..832], set.xsave[576..832], "upper halves of YMM registers");
            }
            let enabled = set.xcr0 as u8;
            assert_eq!(got.xsave[512] & enabled, enabled, "every component is in the area");
        },
    );
}

/// A value that a register of this kind can hold instead of `old`.
fn another(kind: MsrKind, old: u64, random: &mut Random) -> u64 {
    match kind {
        MsrKind::Plain { writable } | MsrKind::Masked { writable } => old ^ random.next() & writable,
        MsrKind::Canonical => random.canonical(),
        MsrKind::MemoryTypes { .. } => {
            let types: [u8; 8] = std::array::from_fn(|_| [0, 1, 4, 5, 6, 6, 5, 1][random.below(8) as usize]);
            u64::from_le_bytes(types)
        }
        _ => old,
    }
}

pub(crate) fn msrs_round_trip<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.vcpu(0);
    let mut random = Random(77);
    let reset = guest.state().msrs;
    let mut changed = 0;
    for _ in 0..50 {
        let mut state = long_state(&machine, 0, DATA);
        state.msrs = reset.clone();
        for (index, value) in &mut state.msrs {
            let Some(entry) = machine.model.msr(*index) else { continue };
            let before = *value;
            *value = another(entry.kind, before, &mut random);
            changed += u32::from(*value != before);
        }
        guest.set_state(&state).expect("a valid state");
        let got = guest.state();
        for (index, value) in &state.msrs {
            let now = got.msrs.iter().find(|(i, _)| i == index).map(|(_, v)| *v);
            assert_eq!(now, Some(*value), "MSR {index:#x}");
        }
    }
    assert!(changed > 500, "the model has registers that can change");
}

pub(crate) fn local_apic_round_trips<B: Backend>(backend: &B) {
    round_trips(
        backend,
        |s, r| {
            let class = r.below(16) as u32;
            s.cr8 = u64::from(class);
            set_apic(s, 0x80, class << 4);
            set_apic(s, 0xd0, (r.next() as u32) << 24);
            set_apic(s, 0xe0, if r.coin() { 0xffff_ffff } else { 0x0fff_ffff });
            set_apic(s, 0xf0, 0x100 | r.next() as u32 & 0xff);
            for lvt in [0x320, 0x350, 0x360] {
                set_apic(s, lvt, (r.next() as u32 & 0x1_00ff) | 0x10);
            }
            set_apic(s, 0x310, (r.next() as u32) << 24);
            set_apic(s, 0x380, r.next() as u32);
            set_apic(s, 0x3e0, r.next() as u32 & 0xb);
            for bank in 0..8 {
                let valid = if bank == 0 { 0xffff_0000 } else { u32::MAX };
                for file in [0x100, 0x180, 0x200] {
                    set_apic(s, file + bank * 0x10, r.next() as u32 & valid);
                }
            }
            s.lapic.timer_expires_at = r.coin().then(|| u64::MAX / 2 + r.below(1000));
        },
        |set, got| {
            let offsets = [0x20, 0x80, 0xd0, 0xe0, 0xf0, 0x310, 0x320, 0x350, 0x360, 0x380, 0x3e0];
            let banks = (0..8).flat_map(|b| [0x100, 0x180, 0x200].map(|f| f + b * 0x10));
            for offset in offsets.into_iter().chain(banks) {
                assert_eq!(apic(got, offset), apic(set, offset), "local APIC register {offset:#x}");
            }
            assert_eq!(got.lapic.apic_base, set.lapic.apic_base);
            assert_eq!(got.lapic.timer_expires_at, set.lapic.timer_expires_at);
        },
    );
}

fn some_event(r: &mut Random) -> PendingEvent {
    let (vector, kind) = match r.below(4) {
        0 => (32 + r.below(224) as u8, EventKind::ExternalInterrupt),
        1 => (2, EventKind::Nmi),
        2 => (14, EventKind::Exception),
        _ => (0x80, EventKind::SoftwareInterrupt),
    };
    let error_code = (kind == EventKind::Exception).then(|| r.below(8) as u32);
    PendingEvent { vector, kind, error_code }
}

pub(crate) fn events_and_activity_round_trip<B: Backend>(backend: &B) {
    let activities = [Activity::Active, Activity::Halted, Activity::Shutdown, Activity::WaitForSipi];
    round_trips(
        backend,
        |s, r| {
            s.activity = activities[r.below(4) as usize];
            (s.nmi_blocked, s.nmi_pending) = (r.coin(), r.coin());
            if s.activity == Activity::WaitForSipi {
                s.sipi_vector = r.coin().then(|| r.next() as u8);
            }
            if s.activity == Activity::Active {
                s.interrupt_shadow = r.coin();
                s.rflags |= 1 << 9;
                s.pending_event = r.coin().then(|| some_event(r));
            }
        },
        |set, got| {
            assert_eq!(got.activity, set.activity);
            assert_eq!((got.nmi_blocked, got.nmi_pending), (set.nmi_blocked, set.nmi_pending));
            assert_eq!((got.interrupt_shadow, got.sipi_vector), (set.interrupt_shadow, set.sipi_vector));
            assert_eq!(got.pending_event, set.pending_event);
            assert!(got.tsc >= set.tsc, "the time-stamp counter does not go back");
        },
    );
}

pub(crate) fn guests_see_the_state_that_was_set<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        for (i, register) in [rax, rcx, rbx, rbp, rsi, rdi, r8, r15].into_iter().enumerate() {
            a.mov(qword_ptr(DATA + i as u64 * 8), register)?;
        }
        a.mov(rax, cr8)?;
        a.mov(qword_ptr(DATA + 0x40), rax)?;
        a.rdfsbase(rax)?;
        a.mov(qword_ptr(DATA + 0x48), rax)?;
        a.mov(rax, dr0)?;
        a.mov(qword_ptr(DATA + 0x50), rax)?;
        a.movups(xmmword_ptr(DATA + 0x60), xmm7)?;
        a.msr_read(0xc000_0082)?;
        a.mov(qword_ptr(DATA + 0x58), rax)?;
        a.exit()?;
        Ok(vec![])
    });
    let mut state = guest.state();
    state.gpr[..4].copy_from_slice(&[10, 11, 12, 13]);
    state.gpr[5..9].copy_from_slice(&[15, 16, 17, 18]);
    state.gpr[15] = u64::MAX;
    (state.cr8, state.cr4) = (9, (state.cr4 | 1 << 16) & machine.model.cr4_mask());
    set_apic(&mut state, 0x80, 0x90);
    state.segments[seg::FS].base = 0xffff_9000_1234_5678;
    state.dr[0] = 0x1122_3344;
    state.xsave[160 + 7 * 16..160 + 8 * 16].copy_from_slice(&[0xa5; 16]);
    let lstar = state.msrs.iter_mut().find(|(i, _)| *i == 0xc000_0082).expect("LSTAR");
    lstar.1 = 0xffff_ffff_8100_0000;
    guest.set_state(&state).expect("a valid state");
    machine.finish(&mut guest);
    let seen: Vec<u64> = (0..14).map(|i| machine.u64_at(DATA + i * 8)).collect();
    assert_eq!(seen[..8], [10, 11, 13, 15, 16, 17, 18, u64::MAX]);
    assert_eq!(seen[8..12], [9, 0xffff_9000_1234_5678, 0x1122_3344, 0xffff_ffff_8100_0000]);
    assert_eq!(seen[12..], [0xa5a5_a5a5_a5a5_a5a5; 2]);
}

/// A name, and what makes a state impossible.
type Spoiler = (&'static str, fn(&mut CpuState));

/// What no processor holds.
const IMPOSSIBLE: [Spoiler; 16] = [
    ("rflags without bit 1", |s| s.rflags = 0),
    ("paging without protection", |s| s.cr0 = 1 << 31),
    ("reserved bit of CR0", |s| s.cr0 |= 1 << 40),
    ("not write-through without cache disable", |s| s.cr0 |= 1 << 29),
    ("reserved bit of CR4", |s| s.cr4 |= 1 << 30),
    ("long mode without PAE", |s| s.cr4 = 0),
    ("LMA without LME", |s| s.efer &= !(1 << 8)),
    ("CR3 wider than physical addresses", |s| s.cr3 = 1 << 45),
    ("CR8 above 15", |s| s.cr8 = 16),
    ("upper half of DR7", |s| s.dr7 |= 1 << 33),
    ("GDT base not canonical", |s| s.gdtr.base = 1 << 48),
    ("FS base not canonical", |s| s.segments[seg::FS].base = 1 << 48),
    ("XCR0 with AVX but not SSE", |s| s.xcr0 = 5),
    ("short XSAVE area", |s| s.xsave.truncate(100)),
    ("reserved bit of MXCSR", |s| s.xsave[27] = 1),
    ("MSR that does not exist", |s| s.msrs.push((0xdead_beef, 1))),
];

pub(crate) fn impossible_states_are_refused_and_change_nothing<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.vcpu(0);
    let good = long_state(&machine, 0, DATA);
    guest.set_state(&good).expect("a valid state");
    let before = guest.state();
    for (what, change) in IMPOSSIBLE {
        let mut bad = good.clone();
        bad.gpr[0] = 0xbad;
        change(&mut bad);
        assert!(guest.set_state(&bad).is_err(), "{what} was accepted");
        let after = CpuState { tsc: before.tsc, ..guest.state() };
        assert_eq!(after, before, "{what} changed the vCPU");
    }
    let mut bad = good.clone();
    bad.lapic = LapicState { apic_base: 1 << 10, ..good.lapic };
    assert!(guest.set_state(&bad).is_err(), "x2APIC mode of a disabled APIC was accepted");
}

pub(crate) fn state_at_a_stop_is_a_boundary<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        let mut again = a.create_label();
        let (mut second, mut third) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.inc(rax)?;
        a.set_label(&mut second)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.set_label(&mut third)?;
        a.inc(rbx)?;
        a.jmp(again)?;
        Ok(vec![again, second, third])
    });
    let mut last = 0;
    for turn in 0..100u64 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(std::time::Duration::from_micros(turn * 7 % 300));
                machine.stop(0);
            });
            machine.run(&mut guest);
        });
        let s = guest.state();
        let (sum, other, stored) = (s.gpr[gpr::RAX], s.gpr[gpr::RBX], machine.u64_at(DATA));
        let ahead = if s.rip == guest.labels[1] {
            (1, 1)
        } else if s.rip == guest.labels[2] {
            (1, 0)
        } else {
            assert!(s.rip >= guest.labels[0] && s.rip < guest.labels[2] + 16, "rip {:#x}", s.rip);
            (0, 0)
        };
        assert_eq!((sum - other, sum - stored), ahead, "at {:#x}", s.rip);
        assert!(sum >= last);
        last = sum;
    }
    assert!(last > 100, "the loop ran: {last}");
}

pub(crate) fn saved_form_round_trips<B: Backend>(backend: &B) {
    let machine = Machine::new(backend, 1);
    let mut guest = machine.long(0, |a| {
        a.mov(rax, DEVICE)?;
        a.pxor(xmm1, xmm1)?;
        a.pcmpeqd(xmm2, xmm2)?;
        a.fld1()?;
        a.exit()?;
        Ok(vec![])
    });
    machine.finish(&mut guest);
    let state = guest.state();
    let bytes = CpuStateV1::from(&state).encode_to_vec();
    let read = CpuStateV1::decode(&bytes[..]).expect("what was encoded");
    let back = CpuState::try_from(&read).expect("what was saved");
    assert_eq!(back, state);
    back.check(&machine.model).expect("a state that a vCPU gave is valid");
    assert_eq!(back.segments[seg::CS].selector, selector::CODE64);
    guest.set_state(&back).expect("a state that a vCPU gave is accepted");
    assert_eq!(CpuState { tsc: state.tsc, ..guest.state() }, state);
    assert!(machine.partition.create_vcpu(1).is_err(), "there is one vCPU");
}
