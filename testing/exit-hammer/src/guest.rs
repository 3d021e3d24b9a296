//! The guest: a program that draws one of many ways to leave its vCPU, takes it, checks what came back, and starts
//! again. Interrupts from all sides come in between.
//!
//! Two vCPUs run it in 64-bit mode; a third one is only there to be started by INIT and SIPI. Registers: RBX is the
//! generator's state, R12 the vCPU's device, R13 its scratch memory, R14 the rounds so far, R11 the way
//! that it is on; the rest is free.
//! The layout of memory is the conformance suite's ([`atoll_backend_conformance::payload`]) and what [`place`] adds.

use atoll_backend_conformance::payload::{Built, DATA, Payload, count_of, resume_of};
use atoll_machine::cpu::model::{CpuModel, Feature};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where things are, in guest-physical and linear memory alike.
pub(crate) mod place {
    use atoll_backend_conformance::fixture::DEVICE;
    use atoll_backend_conformance::payload::DATA;

    /// Scratch memory of vCPU `index`: 64 KiB.
    pub(crate) const fn scratch(index: u32) -> u64 {
        DATA + index as u64 * 0x1_0000
    }
    /// Rounds that vCPU `index` has finished, in 64 bits; a page that nothing else writes.
    pub(crate) const fn rounds(index: u32) -> u64 {
        scratch(index) + 0x8000
    }
    /// How often vCPU `index` took way `number`, and the TSC ticks that took, in 64 bits each.
    pub(crate) const fn taken(index: u32, number: u64) -> u64 {
        scratch(index) + 0x9000 + number * 16
    }
    /// The number of the way that vCPU `index` is on, in 64 bits.
    pub(crate) const fn current(index: u32) -> u64 {
        scratch(index) + 0x30
    }
    /// 256 bytes, each the low byte of its address.
    pub(crate) const PATTERN: u64 = 0x3f_0000;
    /// How often the third vCPU was started.
    pub(crate) const STARTS: u64 = 0x7f00;
    /// A device of plain bytes for vCPU `index`.
    pub(crate) const fn device(index: u32) -> u64 {
        DEVICE + index as u64 * 0x1_0000
    }
    pub(crate) const DEVICE_SIZE: u64 = 0x4000;
    /// Slot `slot` of the device of vCPU `index` that moves.
    pub(crate) const fn moving_device(index: u32, slot: u64) -> u64 {
        DEVICE + 0x80_0000 + index as u64 * 0x10_0000 + slot * 0x1_0000
    }
    /// Slot `slot` of the RAM of vCPU `index` that moves.
    pub(crate) const fn moving_ram(index: u32, slot: u64) -> u64 {
        0x1000_0000 + index as u64 * 0x100_0000 + slot * 0x10_0000
    }
    pub(crate) const MOVING_SIZE: u64 = 0x1_0000;
    /// Nothing.
    pub(crate) const NOWHERE: u64 = DEVICE + 0x400_0000;
    /// 2 MiB of linear memory whose mapping vCPU `index` changes, and the page-directory entry that maps it.
    pub(crate) const fn window(index: u32) -> u64 {
        0x2000_0000 + index as u64 * 0x20_0000
    }
    pub(crate) const fn window_entry(index: u32) -> u64 {
        0x3000 + (window(index) >> 21) * 8
    }
}

/// What the first four bytes of the moving device of vCPU `index` are.
pub(crate) fn moving_first(index: u32) -> u8 {
    0x40 + index as u8 * 0x20
}

/// Hook ports: what the guest asks of the host.
pub(crate) mod hook {
    /// An edge-triggered message with this vector to myself.
    pub(crate) const MESSAGE: u8 = 0xe0;
    /// A level-triggered one.
    pub(crate) const LEVEL: u8 = 0xe1;
    /// An interrupt of the legacy controller with this vector.
    pub(crate) const LEGACY: u8 = 0xe3;
    /// NMI.
    pub(crate) const NMI: u8 = 0xe4;
    /// Move my device, my RAM, to this slot.
    pub(crate) const MOVE_DEVICE: u8 = 0xe5;
    pub(crate) const MOVE_RAM: u8 = 0xe6;
    /// Take my moving device away (0), bring it back (1).
    pub(crate) const ENABLE: u8 = 0xe7;
    /// Something is wrong: the way's number.
    pub(crate) const WRONG: u8 = 0xef;
}

/// Vectors.
mod vector {
    pub(super) const TIMER: u8 = 0x40;
    pub(super) const DEADLINE: u8 = 0x41;
    pub(super) const MESSAGE: u8 = 0x50;
    pub(super) const LEVEL: u8 = 0x51;
    pub(super) const IPI: u8 = 0x61;
    pub(super) const LEGACY: u8 = 0x70;
    pub(super) const SOFTWARE: u8 = 0x90;
}
/// Messages that the host sends when it likes.
pub(crate) const UNASKED: u8 = 0x52;
const FAULTS: [u8; 9] = [0, 3, 6, 7, 11, 12, 13, 14, 19];

type Emitted = Result<(), IcedError>;

/// One way to leave a vCPU.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    emit: fn(&mut Guest<'_>) -> Emitted,
    /// Which vCPU can, with which CPU model.
    can: fn(u32, &CpuModel) -> bool,
}

/// Every way. Its position is its number in messages.
pub(crate) const WAYS: &[Way] = {
    const fn way(name: &'static str, emit: fn(&mut Guest<'_>) -> Emitted) -> Way {
        Way { name, emit, can: |_, _| true }
    }
    const fn only(
        name: &'static str,
        emit: fn(&mut Guest<'_>) -> Emitted,
        can: fn(u32, &CpuModel) -> bool,
    ) -> Way {
        Way { name, emit, can }
    }
    &[
        way("port out", port_out),
        way("port in", port_in),
        way("string out", string_out),
        way("string in", string_in),
        way("memory-mapped access", mmio),
        way("memory-mapped access across pages", mmio_across),
        way("memory-mapped read-modify-write", mmio_modify),
        way("string move to and from a device", mmio_string),
        only("vector access to a device", mmio_vector, |_, m| m.has(Feature::Avx)),
        way("halt until the timer", halt_timer),
        only("halt until the deadline", halt_deadline, |_, m| m.has(Feature::TscDeadline)),
        only("legacy interrupt", legacy, |index, _| index == 0),
        way("message", message),
        way("level-triggered message", level),
        way("IPI", ipi),
        way("NMI by IPI", nmi_ipi),
        way("NMI by the host", nmi_hook),
        only("INIT and SIPI", start_third, |index, _| index == 0),
        way("MSRs that hold values", msr_known),
        way("MSRs that are unknown", msr_unknown),
        way("MSRs that are read", msr_read),
        way("CPUID", cpuid),
        way("ROM write", rom_write),
        way("unmapped memory", unmapped),
        way("device moves", device_moves),
        way("RAM moves", ram_moves),
        way("device goes and comes", device_goes),
        way("data breakpoint", data_breakpoint),
        way("single step", single_step),
        way("faults", faults),
        only("XSETBV", xsetbv, |_, m| m.has(Feature::Xsave)),
        way("control registers", control),
        way("time-stamp counter", time),
        way("page-table change", remap),
        way("code change", code_change),
        way("hypercalls, MONITOR, RDPMC", odd),
        way("software interrupt", software_interrupt),
    ]
};

/// Which ways to take, by words of their names that commas separate.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) only: String,
    pub(crate) except: Option<String>,
}

impl Choice {
    fn has(&self, way: &Way) -> bool {
        let matches = |words: &str| words.split(',').any(|word| way.name.contains(word));
        matches(&self.only) && !self.except.as_deref().is_some_and(matches)
    }
}

/// The program of vCPU `index` (0 or 1) under construction.
pub(crate) struct Guest<'a> {
    a: &'a mut Payload,
    index: u32,
    random: CodeLabel,
    /// Where a fault leads that nobody expected.
    bug: CodeLabel,
    way: u32,
}

/// Assembles the program of the chosen ways.
pub(crate) fn program(a: &mut Payload, model: &CpuModel, seed: u64, choice: &Choice) -> Built {
    let (random, bug) = (a.create_label(), a.create_label());
    let index = a.index;
    let vectors = [
        vector::TIMER,
        vector::DEADLINE,
        vector::MESSAGE,
        vector::LEVEL,
        vector::IPI,
        vector::LEGACY,
        UNASKED,
    ];
    a.interrupts(&vectors);
    a.faults(&FAULTS);
    let mut guest = Guest { a, index, random, bug, way: 0 };
    guest.begin(seed)?;
    let can = |w: &Way| (w.can)(index, model) && choice.has(w);
    let ways: Vec<(u32, &Way)> = (0..).zip(WAYS).filter(|(_, w)| can(w)).collect();
    // A vCPU that can take none of the chosen ways idles with one that leaves nothing behind.
    let idle: Vec<_> = (0..).zip(WAYS).filter(|(_, w)| w.name == "control registers").collect();
    guest.rounds(if ways.is_empty() { &idle } else { &ways })?;
    guest.handlers()?;
    Ok(vec![])
}

/// The program of the third vCPU: counts its starts.
pub(crate) fn third(a: &mut Payload) -> Built {
    let mut end = a.create_label();
    a.lock().inc(dword_ptr(place::STARTS as u32))?;
    a.cli()?;
    a.set_label(&mut end)?;
    a.hlt()?;
    a.jmp(end)?;
    Ok(vec![])
}

impl Guest<'_> {
    fn begin(&mut self, seed: u64) -> Emitted {
        let a = &mut *self.a;
        a.mov(rbx, seed | 1)?;
        a.mov(r12, place::device(self.index))?;
        a.mov(r13, place::scratch(self.index))?;
        a.xor(r14d, r14d)?;
        self.nobody_expects_faults()?;
        self.a.sti()
    }

    /// The loop over `ways`.
    fn rounds(&mut self, ways: &[(u32, &Way)]) -> Emitted {
        let (mut top, mut next_round) = (self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut top)?;
        self.draw(ways.len() as u32)?;
        self.a.mov(r11d, eax)?;
        self.a.time()?;
        self.a.mov(qword_ptr(r13 + 0x28), rax)?;
        for (position, (number, way)) in ways.iter().enumerate() {
            let mut not_this = self.a.create_label();
            self.way = *number;
            self.a.cmp(r11d, position as u32)?;
            self.a.jne(not_this)?;
            self.a.mov(qword_ptr(place::current(self.index)), *number as i32)?;
            (way.emit)(self)?;
            self.a.mov(r11d, *number)?;
            self.a.jmp(next_round)?;
            self.a.set_label(&mut not_this)?;
            self.a.nop()?;
        }
        self.a.set_label(&mut next_round)?;
        self.a.sti()?;
        self.a.time()?;
        self.a.sub(rax, qword_ptr(r13 + 0x28))?;
        self.a.shl(r11d, 4)?;
        self.a.inc(qword_ptr(r13 + r11 + 0x9000))?;
        self.a.add(qword_ptr(r13 + r11 + 0x9008), rax)?;
        self.a.inc(r14)?;
        self.a.mov(qword_ptr(place::rounds(self.index)), r14)?;
        self.a.jmp(top)
    }

    /// What is called or jumped to: the generator, the handlers of NMI, debug exceptions and software interrupts,
    /// and the end of a program that found something wrong.
    fn handlers(&mut self) -> Emitted {
        let (index, mut bug, mut random) = (self.index, self.bug, self.random);
        let a = &mut *self.a;
        // Xorshift (Marsaglia, 2003): the next number in RAX.
        a.set_label(&mut random)?;
        for (left, by) in [(true, 13u32), (false, 7), (true, 17)] {
            a.mov(rax, rbx)?;
            if left {
                a.shl(rax, by)?
            } else {
                a.shr(rax, by)?
            }
            a.xor(rbx, rax)?;
        }
        a.mov(rax, rbx)?;
        a.ret()?;
        for vector in [2, vector::SOFTWARE] {
            let mut label = a.create_label();
            a.set_label(&mut label)?;
            a.inc(qword_ptr(count_of(index, vector)))?;
            a.iretq()?;
            a.own_handler(vector, label);
        }
        // Debug exceptions: no further step, and past an instruction breakpoint.
        let mut debug = a.create_label();
        a.set_label(&mut debug)?;
        a.inc(qword_ptr(count_of(index, 1)))?;
        a.and(qword_ptr(rsp + 16), !0x100)?;
        a.or(qword_ptr(rsp + 16), 0x1_0000)?;
        a.iretq()?;
        a.own_handler(1, debug);
        a.set_label(&mut bug)?;
        self.wrong(0xff)?;
        let mut end = self.a.create_label();
        self.a.cli()?;
        self.a.set_label(&mut end)?;
        self.a.hlt()?;
        self.a.jmp(end)
    }

    /// Says that `what` went wrong in this way; does not return.
    fn wrong(&mut self, what: u8) -> Emitted {
        let mut end = self.a.create_label();
        self.a.mov(eax, self.way << 8 | u32::from(what))?;
        self.a.out(i32::from(hook::WRONG), eax)?;
        self.a.cli()?;
        self.a.set_label(&mut end)?;
        self.a.hlt()?;
        self.a.jmp(end)
    }

    /// Goes on only if the zero flag is set.
    fn must_be_equal(&mut self, what: u8) -> Emitted {
        let mut fine = self.a.create_label();
        self.a.je(fine)?;
        self.wrong(what)?;
        self.a.set_label(&mut fine)?;
        self.a.nop()
    }

    /// RAX: 64 random bits.
    fn random(&mut self) -> Emitted {
        let label = self.random;
        self.a.call(label)
    }

    /// EAX: a random number below `count`. Changes RCX and RDX.
    fn draw(&mut self, count: u32) -> Emitted {
        self.random()?;
        self.a.shr(rax, 11)?;
        self.a.xor(edx, edx)?;
        self.a.mov(eax, eax)?;
        self.a.mov(ecx, count)?;
        self.a.div(ecx)?;
        self.a.mov(eax, edx)
    }

    /// Takes one of `ways`. Changes R10 and what [`Guest::draw`] changes.
    fn one_of(&mut self, ways: &[fn(&mut Self) -> Emitted]) -> Emitted {
        let mut done = self.a.create_label();
        self.draw(ways.len() as u32)?;
        self.a.mov(r10d, eax)?;
        for (number, way) in ways.iter().enumerate() {
            let mut next = self.a.create_label();
            self.a.cmp(r10d, number as u32)?;
            self.a.jne(next)?;
            way(self)?;
            self.a.jmp(done)?;
            self.a.set_label(&mut next)?;
            self.a.nop()?;
        }
        self.a.set_label(&mut done)?;
        self.a.nop()
    }

    fn nobody_expects_faults(&mut self) -> Emitted {
        let bug = self.bug;
        self.a.lea(rax, ptr(bug))?;
        self.a.mov(qword_ptr(resume_of(self.index)), rax)
    }

    /// `body` may fault; it goes on afterwards either way.
    fn tolerate(&mut self, body: impl FnOnce(&mut Self) -> Emitted) -> Emitted {
        let mut after = self.a.create_label();
        self.a.resume_at(after)?;
        body(self)?;
        self.a.set_label(&mut after)?;
        self.nobody_expects_faults()
    }

    /// `body` must fault with `vector`. It may not use R8.
    fn must_fault(&mut self, vector: u8, body: impl FnOnce(&mut Self) -> Emitted) -> Emitted {
        let count = count_of(self.index, vector);
        self.a.mov(r8, qword_ptr(count))?;
        self.tolerate(body)?;
        self.a.inc(r8)?;
        self.a.cmp(r8, qword_ptr(count))?;
        self.must_be_equal(vector)
    }

    /// R8: how often `vector` was handled so far on vCPU `index`.
    fn note(&mut self, index: u32, vector: u8) -> Emitted {
        self.a.mov(r8, qword_ptr(count_of(index, vector)))
    }

    /// Halts, with interrupts on, until `vector` was handled once more than R8 says. Interrupts must be off before
    /// whatever raises it.
    fn halt_until(&mut self, vector: u8) -> Emitted {
        let (mut again, mut done) = (self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut again)?;
        self.a.cmp(r8, qword_ptr(count_of(self.index, vector)))?;
        self.a.jne(done)?;
        self.a.sti()?;
        self.a.hlt()?;
        self.a.cli()?;
        self.a.jmp(again)?;
        self.a.set_label(&mut done)?;
        self.a.sti()
    }

    /// Waits, with interrupts on, until `vector` was handled on vCPU `index` once more than R8 says.
    fn spin_until(&mut self, index: u32, vector: u8) -> Emitted {
        let mut again = self.a.create_label();
        self.a.sti()?;
        self.a.set_label(&mut again)?;
        self.a.pause()?;
        self.a.cmp(r8, qword_ptr(count_of(index, vector)))?;
        self.a.je(again)
    }
}

fn some_port(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.movzx(edx, al)?;
    g.a.or(edx, 0x100)?;
    g.a.mov(r9d, edx)
}

fn port_out(g: &mut Guest<'_>) -> Emitted {
    some_port(g)?;
    g.one_of(&[
        |g| {
            g.a.mov(edx, r9d)?;
            g.a.out(dx, al)
        },
        |g| {
            g.a.mov(edx, r9d)?;
            g.a.out(dx, ax)
        },
        |g| {
            g.a.mov(edx, r9d)?;
            g.a.out(dx, eax)
        },
    ])
}

fn port_in(g: &mut Guest<'_>) -> Emitted {
    some_port(g)?;
    g.one_of(&[
        |g| {
            g.a.mov(edx, r9d)?;
            g.a.in_(al, dx)
        },
        |g| {
            g.a.mov(edx, r9d)?;
            g.a.in_(ax, dx)
        },
        |g| {
            g.a.mov(edx, r9d)?;
            g.a.in_(eax, dx)
        },
    ])
}

/// The port whose bytes the host checks: every time the pattern's first 40.
pub(crate) fn checked_port(index: u32) -> u16 {
    0x240 + index as u16 * 8
}

fn string_out(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| string_out_of(g, 40, |a| a.rep().outsb()),
        |g| string_out_of(g, 20, |a| a.rep().outsw()),
        |g| string_out_of(g, 10, |a| a.rep().outsd()),
    ])
}

fn string_out_of(g: &mut Guest<'_>, count: u32, go: fn(&mut Payload) -> Emitted) -> Emitted {
    g.a.mov(rsi, place::PATTERN)?;
    g.a.mov(ecx, count)?;
    g.a.mov(edx, u32::from(checked_port(g.index)))?;
    go(g.a)?;
    g.a.sub(rsi, (place::PATTERN + 40) as i32)?;
    g.a.or(rsi, rcx)?;
    g.must_be_equal(1)
}

/// Into memory that may lie across a page.
fn string_in(g: &mut Guest<'_>) -> Emitted {
    some_port(g)?;
    g.one_of(&[
        |g| string_in_of(g, 1, |a| a.rep().insb()),
        |g| string_in_of(g, 2, |a| a.rep().insw()),
        |g| string_in_of(g, 4, |a| a.rep().insd()),
    ])
}

fn string_in_of(g: &mut Guest<'_>, width: i32, go: fn(&mut Payload) -> Emitted) -> Emitted {
    g.draw(30)?;
    g.a.inc(eax)?;
    g.a.mov(ecx, eax)?;
    g.a.mov(edx, r9d)?;
    g.a.lea(rdi, ptr(r13 + 0x1fd0))?;
    g.a.imul_3(eax, eax, width)?;
    g.a.lea(r8, ptr(rdi + rax))?;
    go(g.a)?;
    g.a.cmp(rdi, r8)?;
    g.must_be_equal(1)?;
    g.a.test(rcx, rcx)?;
    g.must_be_equal(2)
}

/// RDX: an address in the vCPU's device, aligned to 8; RAX: random.
fn some_cell(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.mov(edx, eax)?;
    g.a.and(edx, 0x3ff8)?;
    g.a.add(rdx, r12)?;
    g.a.mov(r9, rdx)?;
    g.random()
}

fn mmio(g: &mut Guest<'_>) -> Emitted {
    some_cell(g)?;
    g.one_of(&[|g| mmio_at(g, 1), |g| mmio_at(g, 2), |g| mmio_at(g, 4), |g| mmio_at(g, 8)])
}

/// Writes `width` random bytes at R9, reads them back, twice.
fn mmio_at(g: &mut Guest<'_>, width: u32) -> Emitted {
    g.random()?;
    let a = &mut *g.a;
    match width {
        1 => {
            a.mov(byte_ptr(r9), al)?;
            a.cmp(byte_ptr(r9), al)?
        }
        2 => {
            a.mov(word_ptr(r9), ax)?;
            a.cmp(word_ptr(r9), ax)?
        }
        4 => {
            a.mov(dword_ptr(r9), eax)?;
            a.cmp(dword_ptr(r9), eax)?
        }
        _ => {
            a.mov(qword_ptr(r9), rax)?;
            a.cmp(qword_ptr(r9), rax)?
        }
    }
    g.must_be_equal(width as u8)?;
    g.a.movzx(ecx, byte_ptr(r9))?;
    g.a.cmp(cl, al)?;
    g.must_be_equal(width as u8 | 0x10)
}

fn mmio_across(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| {
            g.a.lea(r9, ptr(r12 + 0xfff))?;
            mmio_at(g, 2)
        },
        |g| {
            g.a.lea(r9, ptr(r12 + 0x1ffd))?;
            mmio_at(g, 4)
        },
        |g| {
            g.a.lea(r9, ptr(r12 + 0x2ffb))?;
            mmio_at(g, 8)
        },
    ])
}

fn mmio_modify(g: &mut Guest<'_>) -> Emitted {
    some_cell(g)?;
    g.a.mov(ecx, dword_ptr(r9))?;
    g.a.add(dword_ptr(r9), ebx)?;
    g.a.add(ecx, ebx)?;
    g.a.cmp(dword_ptr(r9), ecx)?;
    g.must_be_equal(1)?;
    g.random()?;
    g.a.mov(ecx, eax)?;
    g.a.xchg(dword_ptr(r9), eax)?;
    g.a.cmp(dword_ptr(r9), ecx)?;
    g.must_be_equal(2)?;
    g.a.mov(eax, ecx)?;
    g.a.lock().or(dword_ptr(r9), ebx)?;
    g.a.or(eax, ebx)?;
    g.a.cmp(dword_ptr(r9), eax)?;
    g.must_be_equal(3)
}

/// Eight quadwords to the device and back.
fn mmio_string(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.mov(qword_ptr(r13 + 0x100), rax)?;
    g.a.mov(qword_ptr(r13 + 0x138), rbx)?;
    g.a.cld()?;
    g.a.lea(rsi, ptr(r13 + 0x100))?;
    g.a.lea(rdi, ptr(r12 + 0xfe0))?;
    g.a.mov(ecx, 8)?;
    g.a.rep().movsq()?;
    g.a.lea(rsi, ptr(r12 + 0xfe0))?;
    g.a.lea(rdi, ptr(r13 + 0x200))?;
    g.a.mov(ecx, 8)?;
    g.a.rep().movsq()?;
    g.a.lea(rsi, ptr(r13 + 0x100))?;
    g.a.lea(rdi, ptr(r13 + 0x200))?;
    g.a.mov(ecx, 8)?;
    g.a.repe().cmpsq()?;
    g.must_be_equal(1)
}

fn mmio_vector(g: &mut Guest<'_>) -> Emitted {
    some_cell(g)?;
    g.a.and(r9, -16)?;
    g.a.movq(xmm0, rax)?;
    g.a.punpcklqdq(xmm0, xmm0)?;
    g.a.movdqu(xmmword_ptr(r9), xmm0)?;
    g.a.pxor(xmm1, xmm1)?;
    g.a.movdqu(xmm1, xmmword_ptr(r9))?;
    g.a.movq(rcx, xmm1)?;
    g.a.cmp(rcx, rax)?;
    g.must_be_equal(1)
}

fn halt_timer(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, vector::TIMER)?;
    g.a.cli()?;
    g.a.apic_write(0x3e0, 0xb)?;
    g.a.apic_write(0x320, u32::from(vector::TIMER))?;
    g.random()?;
    g.a.and(eax, 0xf_ffff)?;
    g.a.or(eax, 0x100)?;
    g.a.mov(ecx, 0xfee0_0380u32)?;
    g.a.mov(dword_ptr(rcx), eax)?;
    g.halt_until(vector::TIMER)
}

fn halt_deadline(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, vector::DEADLINE)?;
    g.a.cli()?;
    g.a.apic_write(0x320, 0x4_0000 | u32::from(vector::DEADLINE))?;
    g.random()?;
    g.a.and(eax, 0xf_ffff)?;
    g.a.mov(r9, rax)?;
    // Intel SDM vol. 3, 11.5.4.1: the mode's write must be done before the deadline's.
    g.a.mfence()?;
    g.a.time()?;
    g.a.add(rax, r9)?;
    g.a.mov(rdx, rax)?;
    g.a.shr(rdx, 32)?;
    g.a.mov(ecx, 0x6e0)?;
    g.a.wrmsr()?;
    g.halt_until(vector::DEADLINE)
}

fn legacy(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| {
            g.note(g.index, vector::LEGACY)?;
            g.a.cli()?;
            g.a.hook(hook::LEGACY, vector::LEGACY)?;
            g.halt_until(vector::LEGACY)
        },
        |g| {
            g.note(g.index, vector::LEGACY)?;
            g.a.hook(hook::LEGACY, vector::LEGACY)?;
            g.spin_until(g.index, vector::LEGACY)
        },
    ])
}

fn message(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, vector::MESSAGE)?;
    g.a.cli()?;
    g.a.hook(hook::MESSAGE, vector::MESSAGE)?;
    g.halt_until(vector::MESSAGE)
}

fn level(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, vector::LEVEL)?;
    g.a.hook(hook::LEVEL, vector::LEVEL)?;
    g.spin_until(g.index, vector::LEVEL)
}

/// Sends what `low` says to vCPU `to`.
fn send(g: &mut Guest<'_>, to: u32, low: u32) -> Emitted {
    g.a.apic_write(0x310, to << 24)?;
    g.a.apic_write(0x300, low)
}

fn ipi(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| {
            let to = 1 - g.index;
            g.note(to, vector::IPI)?;
            g.a.cli()?;
            send(g, to, 0x4000 | u32::from(vector::IPI))?;
            g.spin_until(to, vector::IPI)
        },
        |g| {
            g.note(g.index, vector::IPI)?;
            g.a.cli()?;
            send(g, 0, 0x4_4000 | u32::from(vector::IPI))?;
            g.halt_until(vector::IPI)
        },
    ])
}

fn nmi_ipi(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| {
            g.note(g.index, 2)?;
            g.a.cli()?;
            send(g, g.index, 0x4400)?;
            g.spin_until(g.index, 2)
        },
        |g| {
            let to = 1 - g.index;
            g.note(to, 2)?;
            g.a.cli()?;
            send(g, to, 0x4400)?;
            g.spin_until(to, 2)
        },
    ])
}

fn nmi_hook(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, 2)?;
    g.a.hook(hook::NMI, 0)?;
    g.spin_until(g.index, 2)
}

fn start_third(g: &mut Guest<'_>) -> Emitted {
    let mut again = g.a.create_label();
    g.a.mov(r8d, dword_ptr(place::STARTS))?;
    g.a.cli()?;
    send(g, 2, 0x4500)?;
    // The third program is at 0x7000.
    send(g, 2, 0x4607)?;
    g.a.sti()?;
    g.a.set_label(&mut again)?;
    g.a.pause()?;
    g.a.cmp(r8d, dword_ptr(place::STARTS))?;
    g.a.je(again)
}

fn msr_known(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| msr_holds(g, 0xc000_0100, 1),
        |g| msr_holds(g, 0xc000_0101, 2),
        |g| msr_holds(g, 0xc000_0102, 3),
        |g| msr_holds(g, 0xc000_0082, 4),
        |g| msr_holds(g, 0xc000_0081, 5),
        |g| msr_holds(g, 0x175, 6),
        |g| msr_holds(g, 0x176, 7),
    ])
}

/// Writes a random canonical address to MSR `index` and reads it back; `what` says in messages which it was.
fn msr_holds(g: &mut Guest<'_>, index: u32, what: u8) -> Emitted {
    g.random()?;
    // SYSENTER's addresses have 32 bits where the processor is AMD's.
    g.a.shr(rax, if matches!(index, 0x175 | 0x176) { 33 } else { 17 })?;
    g.a.mov(r9, rax)?;
    g.a.mov(rdx, rax)?;
    g.a.shr(rdx, 32)?;
    g.a.mov(ecx, index)?;
    g.a.wrmsr()?;
    g.a.msr_read(index)?;
    g.a.cmp(rax, r9)?;
    g.must_be_equal(what)
}

fn msr_unknown(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.movzx(ecx, ax)?;
    g.a.or(ecx, 0x1_0000)?;
    g.a.mov(r9d, ecx)?;
    g.must_fault(13, |g| {
        g.a.mov(ecx, r9d)?;
        g.a.rdmsr()
    })?;
    g.must_fault(13, |g| {
        g.a.mov(ecx, r9d)?;
        g.a.wrmsr()
    })
}

fn msr_read(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| g.a.msr_read(0x10),
        |g| g.a.msr_read(0x1b),
        |g| g.a.msr_read(0x277),
        |g| g.a.msr_read(0xc000_0080),
        |g| g.tolerate(|g| g.a.msr_read(0x1a0)),
        |g| g.tolerate(|g| g.a.msr_read(0x17)),
        |g| g.tolerate(|g| g.a.msr_read(0x8b)),
        |g| g.tolerate(|g| g.a.msr_read(0x4b56_4d01)),
        |g| {
            // Any of the first 4096.
            g.random()?;
            g.a.and(eax, 0xfff)?;
            g.a.mov(r9d, eax)?;
            g.tolerate(|g| {
                g.a.mov(ecx, r9d)?;
                g.a.rdmsr()
            })
        },
    ])
}

fn cpuid(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.mov(r9, rax)?;
    g.one_of(&[|g| g.a.xor(esi, esi), |g| g.a.mov(esi, 0x8000_0000u32), |g| g.a.mov(esi, 0x4000_0000u32)])?;
    g.a.mov(r8, rbx)?;
    g.a.mov(eax, r9d)?;
    g.a.and(eax, 0x3f)?;
    g.a.or(eax, esi)?;
    g.a.mov(rcx, r9)?;
    g.a.shr(rcx, 40)?;
    g.a.and(ecx, 0xf)?;
    g.a.cpuid()?;
    g.a.mov(rbx, r8)?;
    // The boot processor's vendor is not empty.
    g.a.xor(eax, eax)?;
    g.a.cpuid()?;
    g.a.mov(rbx, r8)?;
    g.a.test(eax, eax)?;
    g.a.sete(al)?;
    g.a.test(al, al)?;
    g.must_be_equal(1)
}

fn rom_write(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.and(eax, 0xfff8)?;
    g.a.or(eax, 0xffff_0000u32)?;
    g.a.mov(r9d, eax)?;
    g.a.mov(r8, qword_ptr(r9))?;
    g.a.mov(qword_ptr(r9), rbx)?;
    g.a.mov(byte_ptr(r9), bl)?;
    g.a.cmp(r8, qword_ptr(r9))?;
    g.must_be_equal(1)
}

fn unmapped(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.and(eax, 0xff_fff8)?;
    g.a.mov(r9, place::NOWHERE)?;
    g.a.add(r9, rax)?;
    g.a.mov(qword_ptr(r9), rbx)?;
    g.a.mov(rax, qword_ptr(r9))?;
    g.a.inc(rax)?;
    g.must_be_equal(1)
}

/// R9: what `port` was told last time (the slot), in memory at `kept`; R8: the new slot, which is then told.
fn new_slot(g: &mut Guest<'_>, port: u8, kept: i32) -> Emitted {
    g.a.mov(r9d, dword_ptr(r13 + kept))?;
    g.draw(8)?;
    g.a.mov(r8d, eax)?;
    g.a.out(i32::from(port), al)?;
    g.a.mov(dword_ptr(r13 + kept), r8d)
}

/// Reads the first bytes at `base` plus `by` for each slot of R9: all ones unless R9 is R8.
fn old_place_is_empty(g: &mut Guest<'_>, base: u64, by: u32) -> Emitted {
    let mut same = g.a.create_label();
    g.a.cmp(r8d, r9d)?;
    g.a.je(same)?;
    g.a.shl(r9, by)?;
    g.a.mov(rdx, base)?;
    g.a.mov(eax, dword_ptr(rdx + r9))?;
    g.a.cmp(eax, -1)?;
    g.must_be_equal(2)?;
    g.a.set_label(&mut same)?;
    g.a.nop()
}

fn first_word(index: u32) -> u32 {
    let first = moving_first(index);
    u32::from_le_bytes([first, first + 1, first + 2, first + 3])
}

fn device_moves(g: &mut Guest<'_>) -> Emitted {
    let base = place::moving_device(g.index, 0);
    new_slot(g, hook::MOVE_DEVICE, 0x10)?;
    g.a.mov(edx, r8d)?;
    g.a.shl(rdx, 16)?;
    g.a.mov(rax, base)?;
    g.a.cmp(dword_ptr(rdx + rax), first_word(g.index))?;
    g.must_be_equal(1)?;
    old_place_is_empty(g, base, 16)
}

fn device_goes(g: &mut Guest<'_>) -> Emitted {
    let base = place::moving_device(g.index, 0);
    g.a.hook(hook::ENABLE, 0)?;
    g.a.mov(edx, dword_ptr(r13 + 0x10))?;
    g.a.shl(rdx, 16)?;
    g.a.mov(rax, base)?;
    g.a.add(rdx, rax)?;
    g.a.mov(r9, rdx)?;
    g.a.cmp(dword_ptr(r9), -1)?;
    g.must_be_equal(1)?;
    g.a.hook(hook::ENABLE, 1)?;
    g.a.cmp(dword_ptr(r9), first_word(g.index))?;
    g.must_be_equal(2)
}

fn ram_moves(g: &mut Guest<'_>) -> Emitted {
    let base = place::moving_ram(g.index, 0);
    // Written where it is, read where it will be.
    g.a.mov(edx, dword_ptr(r13 + 0x18))?;
    g.a.shl(rdx, 20)?;
    g.a.mov(rax, base)?;
    g.a.add(rdx, rax)?;
    g.random()?;
    g.a.mov(rsi, rax)?;
    g.a.shr(rsi, 1)?;
    g.a.mov(qword_ptr(rdx), rsi)?;
    g.a.mov(qword_ptr(rdx + 0xfff8), rsi)?;
    new_slot(g, hook::MOVE_RAM, 0x18)?;
    g.a.mov(edx, r8d)?;
    g.a.shl(rdx, 20)?;
    g.a.mov(rax, base)?;
    g.a.cmp(qword_ptr(rdx + rax), rsi)?;
    g.must_be_equal(1)?;
    g.a.cmp(qword_ptr(rdx + rax + 0xfff8), rsi)?;
    g.must_be_equal(3)?;
    old_place_is_empty(g, base, 20)
}

fn data_breakpoint(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, 1)?;
    g.a.lea(rax, ptr(r13 + 0x40))?;
    g.a.mov(dr0, rax)?;
    g.a.mov(eax, 0xd_0401)?;
    g.a.mov(dr7, rax)?;
    g.a.mov(dword_ptr(r13 + 0x40), ebx)?;
    g.a.nop()?;
    g.a.mov(eax, 0x400)?;
    g.a.mov(dr7, rax)?;
    g.a.mov(rax, dr6)?;
    g.a.mov(eax, 0xffff_0ff0u32)?;
    g.a.mov(dr6, rax)?;
    g.a.inc(r8)?;
    g.a.cmp(r8, qword_ptr(count_of(g.index, 1)))?;
    g.must_be_equal(1)
}

fn single_step(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, 1)?;
    g.a.pushfq()?;
    g.a.or(qword_ptr(rsp), 0x100)?;
    g.a.popfq()?;
    g.a.nop()?;
    g.a.nop()?;
    g.a.mov(eax, 0xffff_0ff0u32)?;
    g.a.mov(dr6, rax)?;
    g.a.inc(r8)?;
    g.a.cmp(r8, qword_ptr(count_of(g.index, 1)))?;
    g.must_be_equal(1)
}

fn faults(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| g.must_fault(6, |g| g.a.ud2()),
        |g| {
            g.must_fault(0, |g| {
                g.a.xor(ecx, ecx)?;
                g.a.div(ecx)
            })
        },
        |g| {
            g.must_fault(13, |g| {
                g.a.mov(rax, 0x1234_5678_9abc_def0u64)?;
                g.a.mov(rax, qword_ptr(rax))
            })
        },
        |g| {
            g.must_fault(14, |g| {
                g.a.mov(rax, 0x5000_0000u64)?;
                g.a.mov(rax, qword_ptr(rax))
            })
        },
        |g| g.must_fault(3, |g| g.a.int3()),
        |g| {
            g.must_fault(13, |g| {
                g.a.mov(eax, 0x1230)?;
                g.a.mov(ds, eax)
            })
        },
        |g| {
            g.must_fault(13, |g| {
                g.a.mov(rax, -1i64)?;
                g.a.mov(cr4, rax)
            })
        },
    ])
}

fn xsetbv(g: &mut Guest<'_>) -> Emitted {
    for value in [1u32, 3, 7] {
        g.a.xor(ecx, ecx)?;
        g.a.xor(edx, edx)?;
        g.a.mov(eax, value)?;
        g.a.xsetbv()?;
    }
    g.a.xor(ecx, ecx)?;
    g.a.xgetbv()?;
    g.a.cmp(eax, 7)?;
    g.must_be_equal(1)?;
    // AVX state without SSE state.
    g.must_fault(13, |g| {
        g.a.xor(ecx, ecx)?;
        g.a.xor(edx, edx)?;
        g.a.mov(eax, 5)?;
        g.a.xsetbv()
    })
}

fn control(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| {
            g.a.mov(rax, cr3)?;
            g.a.mov(cr3, rax)
        },
        |g| {
            g.a.mov(rax, cr4)?;
            g.a.xor(eax, 0x80)?;
            g.a.mov(cr4, rax)
        },
        |g| {
            g.a.mov(rax, cr0)?;
            g.a.or(eax, 8)?;
            g.a.mov(cr0, rax)?;
            g.a.clts()
        },
        |g| {
            g.random()?;
            g.a.and(eax, 0xf)?;
            g.a.mov(cr8, rax)?;
            g.a.mov(rcx, cr8)?;
            g.a.cmp(rcx, rax)?;
            g.must_be_equal(1)?;
            g.a.xor(eax, eax)?;
            g.a.mov(cr8, rax)
        },
        |g| g.a.invlpg(byte_ptr(r13)),
        |g| g.a.wbinvd(),
        |g| {
            g.a.sgdt(ptr(r13 + 0x60))?;
            g.a.sidt(ptr(r13 + 0x70))?;
            g.a.lidt(ptr(r13 + 0x70))?;
            g.a.lgdt(ptr(r13 + 0x60))
        },
    ])
}

fn time(g: &mut Guest<'_>) -> Emitted {
    let mut fine = g.a.create_label();
    g.a.time()?;
    g.a.cmp(rax, qword_ptr(r13 + 0x20))?;
    g.a.jae(fine)?;
    g.wrong(1)?;
    g.a.set_label(&mut fine)?;
    g.a.mov(qword_ptr(r13 + 0x20), rax)
}

/// Maps the window onto the first, then onto the second 2 MiB, and compares.
fn remap(g: &mut Guest<'_>) -> Emitted {
    let (window, entry) = (place::window(g.index), place::window_entry(g.index));
    for (target, probe) in [(DATA, 0x0u64), (0, 0x1000)] {
        g.a.mov(rax, target | 0xe7)?;
        g.a.mov(qword_ptr(entry), rax)?;
        g.a.mov(rdx, window)?;
        g.a.invlpg(byte_ptr(rdx))?;
        // Two places that hold still: this vCPU's scratch, and the page tables.
        let offset = if target == DATA { place::scratch(g.index) - DATA + 0x20 } else { probe };
        g.a.mov(rax, qword_ptr(rdx + offset as i32))?;
        g.a.cmp(rax, qword_ptr(target + offset))?;
        g.must_be_equal(if target == DATA { 1 } else { 2 })?;
    }
    Ok(())
}

/// Writes `mov eax, RANDOM; ret` and calls it.
fn code_change(g: &mut Guest<'_>) -> Emitted {
    g.random()?;
    g.a.mov(r9d, eax)?;
    g.a.mov(byte_ptr(r13 + 0x4000), 0xb8)?;
    g.a.mov(dword_ptr(r13 + 0x4001), eax)?;
    g.a.mov(byte_ptr(r13 + 0x4005), 0xc3)?;
    g.a.lea(rdx, ptr(r13 + 0x4000))?;
    g.a.call(rdx)?;
    g.a.cmp(eax, r9d)?;
    g.must_be_equal(1)
}

/// What some hosts answer and others refuse. Not CLGI: QEMU's emulated processor forgets all interrupts after a nested
/// guest's (seen with 7.2, in the lab).
fn odd(g: &mut Guest<'_>) -> Emitted {
    g.one_of(&[
        |g| {
            g.tolerate(|g| {
                g.a.mov(eax, 0xff)?;
                g.a.vmcall()
            })
        },
        |g| {
            g.tolerate(|g| {
                g.a.mov(eax, 0xff)?;
                g.a.vmmcall()
            })
        },
        |g| {
            g.tolerate(|g| {
                g.a.mov(rax, r13)?;
                g.a.xor(ecx, ecx)?;
                g.a.xor(edx, edx)?;
                g.a.monitor()
            })
        },
        |g| {
            g.tolerate(|g| {
                g.a.xor(ecx, ecx)?;
                g.a.rdpmc()
            })
        },
        |g| g.tolerate(|g| g.a.vmxoff()),
    ])
}

fn software_interrupt(g: &mut Guest<'_>) -> Emitted {
    g.note(g.index, vector::SOFTWARE)?;
    g.a.int(i32::from(vector::SOFTWARE))?;
    g.a.inc(r8)?;
    g.a.cmp(r8, qword_ptr(count_of(g.index, vector::SOFTWARE)))?;
    g.must_be_equal(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &str, except: Option<&str>) -> Vec<&'static str> {
        let choice = Choice { only: only.to_owned(), except: except.map(str::to_owned) };
        WAYS.iter().filter(|w| choice.has(w)).map(|w| w.name).collect()
    }

    #[test]
    fn ways_are_chosen_by_words_of_their_names() {
        assert_eq!(names("", None).len(), WAYS.len());
        assert_eq!(names("legacy,CPUID", None), ["legacy interrupt", "CPUID"]);
        assert_eq!(names("NMI", Some("host")), ["NMI by IPI"]);
        assert_eq!(names("", Some("data breakpoint")).len(), WAYS.len() - 1);
    }
}
