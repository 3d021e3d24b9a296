//! General, segment, control and debug registers: `CpuState` ⇄ KVM's structures. Pure.
//!
//! # Segments
//!
//! What hosts make of a segment's hidden part:
//!
//! * AMD has no "unusable" bit: KVM stands an absent segment in for it.
//! * AMD's CPL is the DPL of SS, whatever SS holds. An unusable SS therefore needs the CPL as its DPL (Intel takes
//!   the CPL from there too).
//! * KVM on AMD makes the granularity bit up from the limit, and sets the accessed bit of data segments and the
//!   busy bit of TR, as Intel's entry checks want them.
//!
//! What is lost by that has no effect on the processor, but two copies of one state should be equal:
//! [`recall`] puts back what was set.

use atoll_machine::cpu::state::{CpuState, DescriptorTable, Segment, gpr, seg};
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

const CR0_PE: u64 = 1;
const RFLAGS_VM: u64 = 1 << 17;
const EFER_LMA: u64 = 1 << 10;
/// Bits of DR6 that change; the others read as one or, bit 12 and the upper half, zero.
const DR6_WRITABLE: u64 = 0xe00f;
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_FIXED: u64 = 1 << 10;
/// Attributes that hosts make up: granularity, accessed.
const MADE_UP: u32 = Segment::GRANULARITY | 1;

/// Current privilege level.
fn cpl(s: &CpuState) -> u8 {
    if s.cr0 & CR0_PE == 0 {
        0
    } else if s.rflags & RFLAGS_VM != 0 {
        3
    } else {
        (s.segments[seg::CS].selector & 3) as u8
    }
}

/// A segment in KVM's form. `cpl` is the DPL of an unusable one; `long` whether L may be set.
fn to_kvm(s: &Segment, cpl: u8, long: bool) -> kvm_segment {
    let bit = |n: u32| (s.attributes >> n & 1) as u8;
    let unusable = s.unusable();
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 0xf) as u8,
        s: bit(4),
        dpl: if unusable { cpl } else { s.dpl() },
        present: u8::from(!unusable) & bit(7),
        avl: bit(12),
        // Outside long mode the bit is reserved in descriptors, and KVM refuses it.
        l: if long { bit(13) } else { 0 },
        db: bit(14),
        g: bit(15),
        unusable: u8::from(unusable),
        padding: 0,
    }
}

fn from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u32| u32::from(value & 1) << n;
    let dpl = u32::from(s.dpl & 3) << 5;
    let attributes = if s.unusable != 0 {
        Segment::UNUSABLE | dpl
    } else {
        u32::from(s.type_ & 0xf)
            | bit(s.s, 4)
            | dpl
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15)
    };
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes }
}

/// `now`, or `set` if the two differ only in what hosts do not keep.
pub(super) fn recall(now: Segment, set: Segment) -> Segment {
    let same = now.selector == set.selector
        && if now.unusable() {
            set.unusable()
        } else {
            now.base == set.base
                && now.limit == set.limit
                && (now.attributes ^ set.attributes) & !MADE_UP == 0
        };
    if same { set } else { now }
}

/// [`recall`] of all eight. The bases of FS and GS count even where the segment is unusable: 64-bit programs leave
/// null selectors there and write the bases.
pub(super) fn recall_all(now: &[Segment; 8], set: &[Segment; 8]) -> [Segment; 8] {
    std::array::from_fn(|i| {
        let segment = recall(now[i], set[i]);
        if matches!(i, seg::FS | seg::GS) { Segment { base: now[i].base, ..segment } } else { segment }
    })
}

/// The eight segments in one list: ES to GS, LDTR, TR.
pub(super) fn all_segments(s: &CpuState) -> [Segment; 8] {
    let [es, cs, ss, ds, fs, gs] = s.segments;
    [es, cs, ss, ds, fs, gs, s.ldtr, s.tr]
}

/// The inverse of [`all_segments`].
pub(super) fn put_segments(s: &mut CpuState, all: [Segment; 8]) {
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = all;
    s.segments = [es, cs, ss, ds, fs, gs];
    (s.ldtr, s.tr) = (ldtr, tr);
}

pub(super) fn regs(s: &CpuState) -> kvm_regs {
    kvm_regs {
        rax: s.gpr[gpr::RAX],
        rbx: s.gpr[gpr::RBX],
        rcx: s.gpr[gpr::RCX],
        rdx: s.gpr[gpr::RDX],
        rsi: s.gpr[gpr::RSI],
        rdi: s.gpr[gpr::RDI],
        rsp: s.gpr[gpr::RSP],
        rbp: s.gpr[gpr::RBP],
        r8: s.gpr[gpr::R8],
        r9: s.gpr[gpr::R9],
        r10: s.gpr[gpr::R10],
        r11: s.gpr[gpr::R11],
        r12: s.gpr[gpr::R12],
        r13: s.gpr[gpr::R13],
        r14: s.gpr[gpr::R14],
        r15: s.gpr[gpr::R15],
        rip: s.rip,
        rflags: s.rflags,
    }
}

pub(super) fn take_regs(s: &mut CpuState, r: &kvm_regs) {
    s.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    (s.rip, s.rflags) = (r.rip, r.rflags);
}

fn table(t: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

/// Control registers and segments. No interrupt is in it: events go with [`super::events`].
pub(super) fn sregs(s: &CpuState) -> kvm_sregs {
    let (cpl, long) = (cpl(s), s.efer & EFER_LMA != 0);
    let segment = |index: usize| to_kvm(&s.segments[index], cpl, long);
    kvm_sregs {
        cs: segment(seg::CS),
        ds: segment(seg::DS),
        es: segment(seg::ES),
        fs: segment(seg::FS),
        gs: segment(seg::GS),
        ss: segment(seg::SS),
        tr: to_kvm(&s.tr, 0, long),
        ldt: to_kvm(&s.ldtr, 0, long),
        gdt: table(s.gdtr),
        idt: table(s.idtr),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.lapic.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

pub(super) fn take_sregs(s: &mut CpuState, r: &kvm_sregs) {
    s.segments = [&r.es, &r.cs, &r.ss, &r.ds, &r.fs, &r.gs].map(from_kvm);
    (s.ldtr, s.tr) = (from_kvm(&r.ldt), from_kvm(&r.tr));
    s.gdtr = DescriptorTable { base: r.gdt.base, limit: r.gdt.limit };
    s.idtr = DescriptorTable { base: r.idt.base, limit: r.idt.limit };
    (s.cr0, s.cr2, s.cr3, s.cr4, s.cr8) = (r.cr0, r.cr2, r.cr3, r.cr4, r.cr8);
    (s.efer, s.lapic.apic_base) = (r.efer, r.apic_base);
}

pub(super) fn debug(s: &CpuState) -> kvm_debugregs {
    let dr6 = s.dr6 & DR6_WRITABLE | DR6_FIXED;
    let dr7 = s.dr7 & DR7_WRITABLE | DR7_FIXED;
    kvm_debugregs { db: s.dr, dr6, dr7, flags: 0, reserved: [0; 9] }
}

pub(super) fn take_debug(s: &mut CpuState, r: &kvm_debugregs) {
    s.dr = r.db;
    s.dr6 = r.dr6 & DR6_WRITABLE | DR6_FIXED;
    s.dr7 = r.dr7 & DR7_WRITABLE | DR7_FIXED;
}

/// Whether page-directory pointers are processor state: 32-bit paging with PAE.
pub(super) fn has_pdptes(s: &CpuState) -> bool {
    s.cr0 >> 31 & 1 != 0 && s.cr4 >> 5 & 1 != 0 && s.efer & EFER_LMA == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segments() -> impl Strategy<Value = Segment> {
        let usable = (any::<u16>(), any::<u64>(), any::<u32>(), any::<u32>()).prop_map(
            |(selector, base, limit, attributes)| Segment {
                selector,
                base,
                limit,
                attributes: attributes & 0xf0ff,
            },
        );
        let unusable = any::<u16>().prop_map(|selector| Segment {
            selector,
            base: 0,
            limit: 0,
            attributes: Segment::UNUSABLE,
        });
        prop_oneof![4 => usable, 1 => unusable]
    }

    fn states() -> impl Strategy<Value = CpuState> {
        (any::<[u64; 16]>(), any::<[u64; 6]>(), proptest::collection::vec(segments(), 8), any::<[u64; 8]>())
            .prop_map(|(gpr, control, segments, other)| {
                let mut s = CpuState::power_on(0, true, 0);
                (s.gpr, s.rip, s.rflags) = (gpr, other[0], other[1]);
                [s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer] = control;
                // L is kept in long mode only.
                s.efer |= EFER_LMA;
                put_segments(&mut s, segments.try_into().unwrap());
                s.gdtr = DescriptorTable { base: other[2], limit: other[3] as u16 };
                s.idtr = DescriptorTable { base: other[4], limit: other[5] as u16 };
                s.dr = [other[6], other[7], 1, 2];
                s.dr6 = other[6] & 0xe00f | DR6_FIXED;
                s.dr7 = other[7] & 0xffff_23ff | DR7_FIXED;
                s
            })
    }

    proptest! {
        #[test]
        fn registers_come_back_as_they_were(state in states()) {
            let mut back = CpuState::power_on(0, true, 0);
            take_regs(&mut back, &regs(&state));
            take_sregs(&mut back, &sregs(&state));
            take_debug(&mut back, &debug(&state));
            let made = recall_all(&all_segments(&back), &all_segments(&state));
            put_segments(&mut back, made);
            prop_assert_eq!(back, state);
        }
    }

    #[test]
    fn an_unusable_stack_segment_carries_the_privilege_level() {
        let mut s = CpuState::power_on(0, true, 0);
        s.segments[seg::SS].attributes = Segment::UNUSABLE;
        s.segments[seg::CS].selector = 0x33;
        assert_eq!((sregs(&s).ss.dpl, sregs(&s).ss.present, sregs(&s).ss.unusable), (0, 0, 1), "real mode");
        s.cr0 |= CR0_PE;
        assert_eq!(sregs(&s).ss.dpl, 3);
        s.segments[seg::CS].selector = 0x30;
        assert_eq!(sregs(&s).ss.dpl, 0);
        s.rflags |= RFLAGS_VM;
        assert_eq!(sregs(&s).ss.dpl, 3, "virtual 8086");
    }

    #[test]
    fn the_long_bit_is_for_long_mode() {
        let mut s = CpuState::power_on(0, true, 0);
        s.segments[seg::CS].attributes = 0xa09b;
        assert_eq!(sregs(&s).cs.l, 0);
        s.efer = 0x500;
        assert_eq!(sregs(&s).cs.l, 1);
    }

    #[test]
    fn only_what_hosts_make_up_is_recalled() {
        let set = Segment { selector: 8, base: 0, limit: 0xfff, attributes: 0xc093 };
        let now = Segment { attributes: 0x4093, ..set };
        assert_eq!(recall(now, set), set, "granularity");
        assert_eq!(recall(Segment { limit: 1, ..now }, set).limit, 1);
        assert_eq!(recall(Segment { attributes: 0x40f3, ..now }, set).attributes, 0x40f3, "privilege");
        let none = Segment { selector: 8, base: 0, limit: 0, attributes: Segment::UNUSABLE };
        let kernels = Segment { base: 5, attributes: Segment::UNUSABLE | 0x60, ..none };
        assert_eq!(recall(kernels, none), none);
        assert_eq!(recall(now, none), now, "loaded since");
    }

    #[test]
    fn bases_of_fs_and_gs_that_were_written_under_a_null_selector_are_kept() {
        let null = Segment { selector: 0, base: 0, limit: 0, attributes: Segment::UNUSABLE };
        let now = [Segment { base: 0x7f00_1234, ..null }; 8];
        let made = recall_all(&now, &[null; 8]);
        let expected = [false, false, false, false, true, true, false, false];
        assert_eq!(made.map(|s| s.base == 0x7f00_1234), expected);
    }
}
