//! Guests that write garbage everywhere: every port, every memory-mapped region, configuration space, MSRs, virtio
//! rings, and code. Each is a kernel of a few hundred bytes, assembled here, that draws from a generator whose seed
//! is printed; exceptions and interrupts only start its next round.
//!
//! What is checked of each: the host process survives, its own memory stays within a bound, the machine either ends
//! in a way that its guest can ask for or still stops on request, and garbage that cannot end a machine has not
//! ended it: those guests reach their last round and say so at the debug-exit port.

mod support;

use std::time::{Duration, Instant};

use atoll_api_types::ByteSize;
use atoll_foundation::host::process_memory;
use atoll_scenarios::payload;
use atoll_vmm::RunEnd;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Running, spec};

/// The guest's own memory, in the second MiB with its code: nothing here points a device at it.
const STACK: u32 = 0x17_f000;
const IDTR: u32 = 0x17_f700;
const COUNT: u32 = 0x17_f800;
const IDT: u32 = 0x18_0000;
/// Where garbage may land.
const JUNK: u32 = 0x20_0000;
const ECAM: u32 = 0xe000_0000;
const IOAPIC: u32 = 0xfec0_0000;
const LAPIC: u32 = 0xfee0_0000;
/// Where the guest moves the devices' BARs.
const BARS: u32 = 0xd000_0000;
/// What a guest that got through says at the debug-exit port.
const THROUGH: u8 = 0x10;

/// Ports that can end a machine or move what the other guests are about: i8042, port 92, debug exit, PCI
/// configuration and reset, pvpanic, power management. A four-byte access may begin three ports before.
const ENDING_PORTS: [(u32, u32); 6] =
    [(0x60, 0x64), (0x92, 0x92), (0xf4, 0xf7), (0xcf8, 0xcff), (0x505, 0x505), (0x600, 0x67f)];

type Round = fn(&mut Guest) -> Result<(), IcedError>;

/// A guest being assembled. EBX is the generator's state; EAX, ECX, EDX, ESI, EDI and EBP are free.
struct Guest {
    a: CodeAssembler,
    random: CodeLabel,
}

impl Guest {
    /// A kernel that runs `round` again and again, `rounds` times.
    fn build(seed: u32, rounds: u32, prepare: Round, round: Round) -> Vec<u8> {
        Self::assemble(seed, rounds, prepare, round).expect("the guest does not assemble")
    }

    fn assemble(seed: u32, rounds: u32, prepare: Round, round: Round) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        let random = a.create_label();
        let mut guest = Self { a, random };
        let (mut top, mut last) = (guest.a.create_label(), guest.a.create_label());
        guest.interrupt_table(top)?;
        guest.a.mov(ebx, seed | 1)?;
        guest.a.mov(edi, COUNT)?;
        guest.a.mov(dword_ptr(edi), rounds)?;
        prepare(&mut guest)?;
        guest.a.set_label(&mut top)?;
        guest.a.mov(esp, STACK)?;
        guest.a.cld()?;
        guest.a.mov(edi, COUNT)?;
        guest.a.dec(dword_ptr(edi))?;
        guest.a.jz(last)?;
        round(&mut guest)?;
        guest.a.jmp(top)?;
        guest.a.set_label(&mut last)?;
        guest.a.mov(al, u32::from(THROUGH))?;
        guest.a.out(u32::from(payload::DEBUG_EXIT_PORT), al)?;
        guest.a.hlt()?;
        guest.generator()?;
        Ok(payload::kernel(&guest.a.assemble(u64::from(payload::ENTRY))?))
    }

    /// All 256 vectors lead to a handler: whatever it was, the round is over. An interrupt is acknowledged, so that
    /// others can come.
    fn interrupt_table(&mut self, top: CodeLabel) -> Result<(), IcedError> {
        let a = &mut self.a;
        let (mut fill, mut over) = (a.create_label(), a.create_label());
        a.mov(esp, STACK)?;
        // The return address that this leaves is the handler's.
        a.call(over)?;
        a.mov(edi, LAPIC + 0xb0)?;
        a.mov(dword_ptr(edi), 0)?;
        a.or(ebx, 1)?;
        a.jmp(top)?;
        a.set_label(&mut over)?;
        a.pop(eax)?;
        a.mov(esi, eax)?;
        a.shr(esi, 16)?;
        a.mov(edx, cs)?;
        a.mov(edi, IDT)?;
        a.mov(ecx, 256)?;
        a.set_label(&mut fill)?;
        a.mov(word_ptr(edi), ax)?;
        a.mov(word_ptr(edi + 2), dx)?;
        a.mov(word_ptr(edi + 4), 0x8e00)?;
        a.mov(word_ptr(edi + 6), si)?;
        a.add(edi, 8)?;
        a.dec(ecx)?;
        a.jnz(fill)?;
        a.mov(edi, IDTR)?;
        a.mov(word_ptr(edi), 0x7ff)?;
        a.mov(dword_ptr(edi + 2), IDT)?;
        a.lidt(ptr(edi))
    }

    /// Xorshift (Marsaglia, 2003): the next number in EAX.
    fn generator(&mut self) -> Result<(), IcedError> {
        let (a, label) = (&mut self.a, &mut self.random);
        a.set_label(label)?;
        for (left, by) in [(true, 13), (false, 17), (true, 5)] {
            a.mov(eax, ebx)?;
            if left {
                a.shl(eax, by)?
            } else {
                a.shr(eax, by)?
            }
            a.xor(ebx, eax)?;
        }
        a.mov(eax, ebx)?;
        a.ret()
    }

    fn random(&mut self) -> Result<(), IcedError> {
        let label = self.random;
        self.a.call(label)
    }

    /// Runs one of `ways`, by chance. Their number is a power of two. Clobbers EAX and EBP.
    fn one_of(&mut self, ways: &[Round]) -> Result<(), IcedError> {
        assert!(ways.len().is_power_of_two());
        let mut done = self.a.create_label();
        self.random()?;
        self.a.mov(ebp, eax)?;
        self.a.shr(ebp, 7)?;
        self.a.and(ebp, ways.len() as u32 - 1)?;
        for (number, way) in ways.iter().enumerate() {
            let mut next = self.a.create_label();
            self.a.cmp(ebp, number as u32)?;
            self.a.jne(next)?;
            way(self)?;
            self.a.jmp(done)?;
            self.a.set_label(&mut next)?;
            self.a.nop()?;
        }
        self.a.set_label(&mut done)?;
        self.a.nop()
    }

    /// Accesses port DX in some way; EAX is random.
    fn access_port(&mut self) -> Result<(), IcedError> {
        self.one_of(&[
            |g| g.a.out(dx, al),
            |g| g.a.out(dx, ax),
            |g| g.a.out(dx, eax),
            |g| g.a.in_(al, dx),
            |g| g.a.in_(ax, dx),
            |g| g.a.in_(eax, dx),
            |g| {
                g.a.mov(esi, JUNK)?;
                g.a.mov(ecx, 40)?;
                g.a.rep().outsb()
            },
            |g| {
                g.a.mov(edi, JUNK)?;
                g.a.mov(ecx, 40)?;
                g.a.rep().insd()
            },
        ])
    }

    /// Accesses memory at ESI in some way.
    fn access_memory(&mut self) -> Result<(), IcedError> {
        self.random()?;
        self.one_of(&[
            |g| g.a.mov(byte_ptr(esi), bl),
            |g| g.a.mov(word_ptr(esi), bx),
            |g| g.a.mov(dword_ptr(esi), ebx),
            |g| g.a.mov(al, byte_ptr(esi)),
            |g| g.a.mov(eax, dword_ptr(esi)),
            |g| g.a.lock().cmpxchg8b(qword_ptr(esi)),
            |g| g.a.lock().add(dword_ptr(esi), ebx),
            |g| {
                g.a.mov(edi, JUNK)?;
                g.a.mov(ecx, 16)?;
                g.a.rep().movsd()
            },
        ])
    }
}

fn nothing(_: &mut Guest) -> Result<(), IcedError> {
    Ok(())
}

/// Any port but those that can end the machine; half of them among the first 2048.
fn ports(g: &mut Guest) -> Result<(), IcedError> {
    g.random()?;
    g.a.mov(edx, eax)?;
    g.one_of(&[|g| g.a.and(edx, 0xffff), |g| g.a.and(edx, 0x7ff)])?;
    let mut skip = g.a.create_label();
    for (first, last) in ENDING_PORTS {
        let mut fine = g.a.create_label();
        g.a.cmp(edx, first - 3)?;
        g.a.jb(fine)?;
        g.a.cmp(edx, last)?;
        g.a.jbe(skip)?;
        g.a.set_label(&mut fine)?;
        g.a.nop()?;
    }
    g.random()?;
    g.access_port()?;
    g.a.set_label(&mut skip)?;
    g.a.nop()
}

/// Only the ports that can end the machine.
fn ending_ports(g: &mut Guest) -> Result<(), IcedError> {
    g.one_of(&[
        |g| g.a.mov(edx, 0x60),
        |g| g.a.mov(edx, 0x64),
        |g| g.a.mov(edx, 0x92),
        |g| g.a.mov(edx, 0xf4),
        |g| g.a.mov(edx, 0xcf9),
        |g| g.a.mov(edx, 0x505),
        |g| g.a.mov(edx, 0x604),
        |g| {
            g.random()?;
            g.a.and(eax, 0x7f)?;
            g.a.lea(edx, dword_ptr(eax + 0x600))
        },
    ])?;
    g.random()?;
    g.access_port()
}

/// Interrupt controllers, the VGA window, and everything above configuration space.
fn registers(g: &mut Guest) -> Result<(), IcedError> {
    g.random()?;
    g.one_of(&[
        |g| {
            g.a.and(eax, 0xfff)?;
            g.a.lea(esi, dword_ptr(eax + IOAPIC))
        },
        |g| {
            g.a.and(eax, 0xfff)?;
            g.a.lea(esi, dword_ptr(eax + LAPIC))
        },
        |g| {
            g.a.and(eax, 0x1_ffff)?;
            g.a.lea(esi, dword_ptr(eax + 0xa_0000))
        },
        |g| {
            g.a.or(eax, 0xf000_0000u32)?;
            g.a.mov(esi, eax)
        },
    ])?;
    g.one_of(&[|g| g.a.sti(), |g| g.a.cli()])?;
    g.access_memory()
}

/// Configuration space of every function, by either way, and what the BARs then map.
fn pci(g: &mut Guest) -> Result<(), IcedError> {
    g.one_of(&[
        |g| g.a.mov(esi, 0),
        |g| g.a.mov(esi, 1),
        |g| g.a.mov(esi, 2),
        |g| g.a.mov(esi, 3),
        |g| g.a.mov(esi, 0x1b),
        |g| g.a.mov(esi, 0x1c),
        |g| g.a.mov(esi, 0x1e),
        |g| g.a.mov(esi, 0x1f),
    ])?;
    g.random()?;
    g.one_of(&[
        |g| {
            g.a.shl(esi, 15)?;
            g.a.and(eax, 0xfff)?;
            g.a.lea(esi, dword_ptr(eax + esi * 1 + ECAM))?;
            g.access_memory()
        },
        |g| {
            g.a.and(eax, 0xff_ffff)?;
            g.a.lea(esi, dword_ptr(eax + BARS))?;
            g.access_memory()
        },
        |g| {
            g.a.shl(esi, 11)?;
            g.a.and(eax, 0x7fc)?;
            g.a.lea(eax, dword_ptr(eax + esi * 1 + 0x8000_0000u32))?;
            g.a.mov(edx, 0xcf8)?;
            g.a.out(dx, eax)?;
            g.a.mov(edx, 0xcfc)?;
            g.random()?;
            g.access_port()
        },
        map_bars,
    ])
}

/// Puts the BARs of devices 1 to 4 where this guest reaches them: registers at 64 KiB times the device's number
/// above `BARS`, the MSI-X table 8 MiB above.
fn map_bars(g: &mut Guest) -> Result<(), IcedError> {
    for device in 1..=4u32 {
        g.a.mov(edi, ECAM + (device << 15))?;
        g.a.mov(dword_ptr(edi + 0x10), BARS + (device << 16))?;
        g.a.mov(dword_ptr(edi + 0x14), 0)?;
        g.a.mov(dword_ptr(edi + 0x18), BARS + 0x80_0000 + (device << 16))?;
        g.a.mov(word_ptr(edi + 4), 7)?;
    }
    Ok(())
}

/// Reads and writes of MSRs: the architectural ones, the x2APIC's, the fast system calls', the hypervisor's.
fn msrs(g: &mut Guest) -> Result<(), IcedError> {
    g.random()?;
    g.a.mov(ecx, eax)?;
    g.one_of(&[
        |g| g.a.and(ecx, 0xfff),
        |g| {
            g.a.and(ecx, 0xff)?;
            g.a.or(ecx, 0x800)
        },
        |g| {
            g.a.and(ecx, 0x1ff)?;
            g.a.or(ecx, 0xc000_0000u32)
        },
        |g| {
            g.a.and(ecx, 0xf)?;
            g.a.or(ecx, 0x4b56_4d00)
        },
    ])?;
    g.random()?;
    g.a.mov(edx, eax)?;
    g.one_of(&[|g| g.a.xor(edx, edx), nothing])?;
    g.random()?;
    g.one_of(&[|g| g.a.wrmsr(), |g| g.a.rdmsr()])
}

/// Rings of devices 1 to 4 that are set up correctly and filled with garbage: addresses, lengths, flags, chains.
fn rings(g: &mut Guest) -> Result<(), IcedError> {
    g.random()?;
    g.a.and(eax, 3)?;
    g.a.inc(eax)?;
    g.a.shl(eax, 16)?;
    g.a.lea(edi, dword_ptr(eax + BARS))?;
    g.one_of(&[start_device, nothing, nothing, nothing])?;
    for _ in 0..24 {
        fill(g)?;
    }
    g.random()?;
    g.a.and(eax, 3)?;
    g.a.mov(dword_ptr(edi + eax * 4 + 0x3000), eax)?;
    // And now and then garbage in the registers themselves.
    g.one_of(&[
        |g| {
            g.random()?;
            g.a.and(eax, 0x3f)?;
            g.a.mov(dword_ptr(edi + eax * 1), ebx)
        },
        |g| {
            g.random()?;
            g.a.and(eax, 0xfff)?;
            g.a.mov(dword_ptr(edi + eax * 1 + 0x2000), ebx)
        },
        |g| {
            g.random()?;
            g.a.and(eax, 0x3f)?;
            g.a.mov(dword_ptr(edi + eax * 1 + 0x80_0000), ebx)
        },
        nothing,
    ])
}

/// A driver's first steps (VIRTIO 1.2, 3.1) with a random subset of the features, then one queue somewhere in the
/// first 16 KiB of junk.
fn start_device(g: &mut Guest) -> Result<(), IcedError> {
    for status in [0, 1, 3] {
        g.a.mov(byte_ptr(edi + 0x14), status)?;
    }
    for select in [0u32, 1] {
        g.a.mov(dword_ptr(edi), select)?;
        g.random()?;
        g.a.and(eax, dword_ptr(edi + 4))?;
        g.a.or(eax, select)?;
        g.a.mov(dword_ptr(edi + 8), select)?;
        g.a.mov(dword_ptr(edi + 0xc), eax)?;
    }
    g.a.mov(byte_ptr(edi + 0x14), 0xb)?;
    g.random()?;
    g.a.and(eax, 3)?;
    g.a.mov(word_ptr(edi + 0x16), ax)?;
    g.random()?;
    g.a.mov(ecx, eax)?;
    g.a.and(ecx, 7)?;
    g.a.mov(eax, 1)?;
    g.a.shl(eax, cl)?;
    g.a.mov(word_ptr(edi + 0x18), ax)?;
    for register in [0x20, 0x28, 0x30] {
        g.random()?;
        g.a.and(eax, 0x3ff0)?;
        g.a.add(eax, JUNK)?;
        g.a.mov(dword_ptr(edi + register), eax)?;
        g.a.mov(dword_ptr(edi + (register + 4)), 0)?;
    }
    g.a.mov(word_ptr(edi + 0x1c), 1)?;
    g.a.mov(byte_ptr(edi + 0x14), 0xf)
}

/// One word of the first 16 KiB of junk: a number, a small number, or an address in junk.
fn fill(g: &mut Guest) -> Result<(), IcedError> {
    g.random()?;
    g.a.and(eax, 0x3ffc)?;
    g.a.lea(esi, dword_ptr(eax + JUNK))?;
    g.random()?;
    g.one_of(&[
        nothing,
        |g| {
            g.a.mov(eax, ebx)?;
            g.a.and(eax, 0xff)
        },
        |g| {
            g.a.mov(eax, ebx)?;
            g.a.and(eax, 0x3_0003)
        },
        |g| {
            g.a.mov(eax, ebx)?;
            g.a.and(eax, 0xf_ffff)?;
            g.a.add(eax, JUNK)
        },
    ])?;
    g.a.mov(dword_ptr(esi), eax)
}

/// Runs random bytes as code.
fn code(g: &mut Guest) -> Result<(), IcedError> {
    g.random()?;
    g.a.and(eax, 0xffff)?;
    g.a.lea(edi, dword_ptr(eax + (JUNK + 0x10_0000)))?;
    g.a.mov(esi, edi)?;
    for _ in 0..8 {
        g.random()?;
        g.a.stosd()?;
    }
    g.a.jmp(esi)
}

/// What a guest's garbage may lead to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Allowed {
    /// Nothing: it gets through all its rounds.
    OnlyThrough,
    /// Any end that guests can ask for, or none.
    AnyEnd,
    /// Any end that guests can ask for, but an end.
    SomeEnd,
}

/// Bytes by which the host process may grow over all machines of a test: page tables, caches of decoded code, heap.
const GROWTH: u64 = 64 << 20;

fn own_memory() -> u64 {
    let memory = process_memory().unwrap();
    memory.rss_anon + memory.page_tables
}

/// Runs a machine for each seed, each for at most `patience`.
fn torment(
    name: &str,
    seeds: std::ops::Range<u32>,
    rounds: u32,
    patience: Duration,
    how: (Round, Round, Allowed),
) {
    let (prepare, round, allowed) = how;
    // As the program does: what machines used before must not count as growth.
    atoll_foundation::allocator::return_freed_memory();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let before = own_memory();
    for seed in seeds.clone() {
        let seed = seed.wrapping_mul(0x9e37_79b9);
        let kernel = directory.path().join("kernel");
        std::fs::write(&kernel, Guest::build(seed, rounds, prepare, round)).unwrap();
        let mut spec = spec(&kernel);
        spec.memory = ByteSize(32 << 20);
        spec.cpus.cores = 2;
        spec.debug_exit = true;
        spec.no_reboot = true;
        spec.disks = vec![image.display().to_string().parse().unwrap()];
        let started = Instant::now();
        let running = Running::start(&spec, Vec::new());
        let end = running.end(patience);
        println!("{name}: seed {seed:#x}: {end:?} after {:.2} s", started.elapsed().as_secs_f64());
        let through = Some(RunEnd::DebugExit(u32::from(THROUGH)));
        match (&end, allowed) {
            (Some(RunEnd::Failed(why)), _) => panic!("{name}, seed {seed:#x}: the machine failed: {why}"),
            (_, Allowed::OnlyThrough) => assert_eq!(end, through, "{name}, seed {seed:#x}"),
            (None, Allowed::SomeEnd) => panic!("{name}, seed {seed:#x}: no end within {patience:?}"),
            (Some(_) | None, _) => {}
        }
        if end.is_none() {
            running.handle.stop();
            let stopped = running.end(Duration::from_secs(30));
            assert_eq!(stopped, Some(RunEnd::Stopped), "{name}, seed {seed:#x}: does not stop on request");
        }
        let grown = own_memory().saturating_sub(before);
        assert!(grown < GROWTH, "{name}, seed {seed:#x}: the process grew by {} MiB", grown >> 20);
    }
}

const LONG_ENOUGH: Duration = Duration::from_secs(300);
const A_WHILE: Duration = Duration::from_millis(700);

/// The machines of one test measure one process: tests take turns.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn garbage_to_ports_that_end_nothing_ends_nothing() {
    let _turn = turn();
    torment("ports", 1..3, 100_000, LONG_ENOUGH, (nothing, ports, Allowed::OnlyThrough));
}

#[test]
fn garbage_to_the_ports_that_end_machines_ends_them_cleanly() {
    let _turn = turn();
    torment("ending ports", 1..9, u32::MAX, LONG_ENOUGH, (nothing, ending_ports, Allowed::SomeEnd));
}

#[test]
fn garbage_to_interrupt_controllers_and_unclaimed_memory_is_survived() {
    let _turn = turn();
    torment("registers", 1..5, 200_000, A_WHILE, (nothing, registers, Allowed::AnyEnd));
}

#[test]
fn garbage_to_configuration_space_and_bars_is_survived() {
    let _turn = turn();
    torment("pci", 1..5, 200_000, A_WHILE, (map_bars, pci, Allowed::AnyEnd));
}

#[test]
fn garbage_to_msrs_is_survived() {
    let _turn = turn();
    torment("msrs", 1..5, 200_000, A_WHILE, (nothing, msrs, Allowed::AnyEnd));
}

#[test]
fn garbage_in_virtio_rings_ends_nothing() {
    let _turn = turn();
    torment("rings", 1..4, 5_000, LONG_ENOUGH, (map_bars, rings, Allowed::OnlyThrough));
}

#[test]
fn garbage_as_code_is_survived() {
    let _turn = turn();
    torment("code", 1..9, 200_000, A_WHILE, (nothing, code, Allowed::AnyEnd));
}

#[test]
#[ignore = "long: two hundred seeds"]
fn every_kind_of_garbage_is_survived_for_many_seeds() {
    let _turn = turn();
    let seconds = Duration::from_secs;
    torment("ports", 100..110, 1_000_000, seconds(900), (nothing, ports, Allowed::OnlyThrough));
    torment("ending ports", 100..140, u32::MAX, LONG_ENOUGH, (nothing, ending_ports, Allowed::SomeEnd));
    torment("registers", 100..140, u32::MAX, seconds(2), (nothing, registers, Allowed::AnyEnd));
    torment("pci", 100..140, u32::MAX, seconds(2), (map_bars, pci, Allowed::AnyEnd));
    torment("msrs", 100..120, u32::MAX, seconds(2), (nothing, msrs, Allowed::AnyEnd));
    torment("rings", 100..110, 50_000, seconds(900), (map_bars, rings, Allowed::OnlyThrough));
    torment("code", 100..140, u32::MAX, seconds(2), (nothing, code, Allowed::AnyEnd));
}
