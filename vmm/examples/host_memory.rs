//! What huge pages, prefaulting and pinning gain: the same small guest on differently provided memory, in turn.
//!
//! `cargo run --release -p atoll-vmm --example host_memory [ROUNDS]`
//!
//! The guests are a few 32-bit instructions each, started through Multiboot, so that nothing but the memory
//! counts: *random* adds to random words of 512 MiB, *touch* writes one word of each page of 1 GiB once. The
//! variants of one question run in turn (A B A B ...), so that a slow minute of the host hits all of them.

use std::io::Write;
use std::sync::mpsc;
use std::time::Instant;

use atoll_api_types::{Accelerator, ByteSize, MemorySpec, VmSpec};
use atoll_vmm::{RunEnd, Vm, VmOutputs};
use iced_x86::code_asm::{CodeAssembler, dword_ptr, eax, ebx, ecx, edx};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Where the kernel is loaded, and the first byte of what it works on.
const KERNEL: u32 = 0x10_0000;
const WORK: u32 = 16 << 20;

fn main() -> Result<()> {
    let rounds = std::env::args().nth(1).map_or(Ok(7), |text| text.parse())?;
    let random = kernel(random_words(512 << 20, 20_000_000)?)?;
    let touch = kernel(touch_pages(1 << 30)?)?;
    println!("medians of {rounds} rounds (ratio to the first line; quartiles); CPU is of the whole process");
    let all = |sizes: &[&str]| sizes.iter().map(|s| Variant::memory(s)).collect::<Result<Vec<_>>>();

    let pages = all(&[
        "768M,hugepages=off,prefault",
        "768M,hugepages=transparent,prefault",
        "768M,hugepages=2M,prefault",
    ])?;
    compare("random access", &random, &pages, rounds)?;
    let first = all(&[
        "1280M,hugepages=off",
        "1280M,hugepages=off,prefault",
        "1280M,hugepages=transparent",
        "1280M,hugepages=transparent,prefault",
    ])?;
    compare("first touch of 1 GiB", &touch, &first, rounds)?;
    let pinned = [Variant::memory("768M,prefault")?, Variant::pinned("768M,prefault", "0")?];
    compare("random access, pinned or not", &random, &pinned, rounds)
}

/// A way to provide a machine's memory and processors.
struct Variant {
    name: String,
    spec: VmSpec,
}

impl Variant {
    fn memory(text: &str) -> Result<Self> {
        let memory: MemorySpec = text.parse()?;
        let mut spec = VmSpec::named("bench");
        spec.networks = Vec::new();
        spec.accel = Accelerator::Software;
        (spec.memory, spec.memory_options) = (memory.size, memory.options);
        spec.debug_exit = true;
        Ok(Self { name: text.to_owned(), spec })
    }

    fn pinned(text: &str, cpus: &str) -> Result<Self> {
        let mut variant = Self::memory(text)?;
        variant.spec.pin = Some(cpus.parse()?);
        variant.name = format!("{text} --pin {cpus}");
        Ok(variant)
    }
}

/// What one run took, in seconds.
struct Times {
    /// From the specification to a machine that is ready to run.
    start: f64,
    /// From there to the guest's end.
    run: f64,
    /// CPU time of the latter.
    cpu: f64,
}

/// What is shown of each run.
type Figure = (&'static str, fn(&Times) -> f64);

const FIGURES: [Figure; 4] =
    [("start-up", |t| t.start), ("run", |t| t.run), ("run, CPU", |t| t.cpu), ("both", |t| t.start + t.run)];

fn compare(title: &str, kernel: &tempfile::NamedTempFile, variants: &[Variant], rounds: usize) -> Result<()> {
    println!("\n{title}");
    let mut times: Vec<Vec<Times>> = variants.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (variant, times) in variants.iter().zip(&mut times) {
            match once(kernel, variant) {
                Ok(measured) => times.push(measured),
                Err(error) if times.is_empty() => println!("  {:38} not here: {error}", variant.name),
                Err(_) => {}
            }
        }
    }
    for (name, figure) in FIGURES {
        let columns = times.iter().map(|times| sorted(times.iter().map(figure)));
        let columns: Vec<Vec<f64>> = columns.collect();
        for (variant, column) in variants.iter().zip(&columns).filter(|(_, column)| !column.is_empty()) {
            println!(
                "  {name:9} {:38} {:8.1} ms  ({:.3}; {:.1} to {:.1})",
                variant.name,
                at(column, 2) * 1e3,
                at(column, 2) / at(&columns[0], 2),
                at(column, 1) * 1e3,
                at(column, 3) * 1e3
            );
        }
    }
    Ok(())
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The value after `quarters` of four.
fn at(sorted: &[f64], quarters: usize) -> f64 {
    sorted.get(sorted.len() * quarters / 4).copied().unwrap_or(f64::NAN)
}

/// CPU time of this process so far, in seconds.
fn cpu_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn once(kernel: &tempfile::NamedTempFile, variant: &Variant) -> Result<Times> {
    let mut spec = variant.spec.clone();
    spec.boot.kernel = Some(kernel.path().to_owned());
    assert!(spec.memory >= ByteSize(512 << 20));
    let begin = Instant::now();
    let vm = Vm::prepare(&spec)?;
    let start = begin.elapsed().as_secs_f64();
    let (sender, ended) = mpsc::channel();
    let (begin, cpu_before) = (Instant::now(), cpu_time());
    let _handle = vm.start(VmOutputs {
        serial: Box::new(|_| {}),
        virtio: Box::new(|_| {}),
        rebooted: Box::new(|| {}),
        event: Box::new(|_| {}),
        ended: Box::new(move |end| drop(sender.send((end, begin.elapsed(), cpu_time() - cpu_before)))),
    })?;
    match ended.recv()? {
        (RunEnd::DebugExit(0), run, cpu) => Ok(Times { start, run: run.as_secs_f64(), cpu }),
        (end, ..) => Err(format!("the guest ended otherwise: {end:?}").into()),
    }
}

/// A Multiboot 1 image (0.6.96, 3.1.3) with an address header.
fn kernel(mut code: CodeAssembler) -> Result<tempfile::NamedTempFile> {
    let (magic, flags) = (0x1bad_b002u32, 0x0001_0000u32);
    let header = [magic, flags, magic.wrapping_add(flags).wrapping_neg(), KERNEL, KERNEL, 0, 0, KERNEL + 32];
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(&header.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())?;
    file.write_all(&code.assemble(u64::from(KERNEL) + 32)?)?;
    code.reset();
    Ok(file)
}

/// Adds to `count` random words of the first `bytes` (a power of two) of the working memory.
fn random_words(bytes: u32, count: u32) -> Result<CodeAssembler> {
    let mut a = CodeAssembler::new(32)?;
    let mut again = a.create_label();
    a.mov(eax, 12345u32)?;
    a.mov(ecx, count)?;
    a.set_label(&mut again)?;
    a.imul_3(eax, eax, 1_664_525)?;
    a.add(eax, 1_013_904_223)?;
    a.mov(edx, eax)?;
    // The low bits of such a sequence are hardly random.
    a.shr(edx, 2u32)?;
    a.and(edx, ((bytes - 1) & !3) as i32)?;
    a.add(dword_ptr(edx + WORK), ecx)?;
    a.dec(ecx)?;
    a.jne(again)?;
    exit(a)
}

/// Writes one word of each page of the first `bytes` of the working memory.
fn touch_pages(bytes: u32) -> Result<CodeAssembler> {
    let mut a = CodeAssembler::new(32)?;
    let mut again = a.create_label();
    a.mov(ebx, WORK)?;
    a.mov(ecx, bytes / 4096)?;
    a.set_label(&mut again)?;
    a.mov(dword_ptr(ebx), ecx)?;
    a.add(ebx, 4096)?;
    a.dec(ecx)?;
    a.jne(again)?;
    exit(a)
}

fn exit(mut a: CodeAssembler) -> Result<CodeAssembler> {
    a.xor(eax, eax)?;
    a.out(0xf4, eax)?;
    a.hlt()?;
    Ok(a)
}
