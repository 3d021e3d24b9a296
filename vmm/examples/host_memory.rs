//! What huge pages, prefaulting and pinning gain: the same small guest on differently provided memory, in turn.
//!
//! `cargo run --release -p atoll-vmm --example host_memory [ROUNDS]`
//!
//! The guests are a few 32-bit instructions each, started through Multiboot, so that nothing but the memory
//! counts: *random* adds to random words of 512 MiB, *touch* writes one word of each page of 1 GiB once. The
//! variants of one question run in turn (A B A B ...), so that a slow minute of the host hits all of them; the
//! median of the rounds and its ratio to the first variant are printed, and the spread between the quartiles.

use std::io::Write;
use std::sync::mpsc;
use std::time::{Duration, Instant};

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
    println!("median of {rounds} rounds, ratio to the first line, quartiles");
    let all = |sizes: &[&str]| sizes.iter().map(|s| Variant::memory(s)).collect::<Result<Vec<_>>>();

    let first = ["768M,hugepages=off,prefault", "768M,prefault", "768M,hugepages=2M,prefault"];
    compare("random access, by pages (guest's run)", &random, &all(&first)?, rounds, |t| t.run)?;
    let first = ["1280M,hugepages=off", "1280M,hugepages=off,prefault", "1280M", "1280M,prefault"];
    let lazy = all(&first)?;
    compare("first touch of 1 GiB (guest's run)", &touch, &lazy, rounds, |t| t.run)?;
    compare("first touch of 1 GiB (start-up)", &touch, &lazy, rounds, |t| t.start)?;
    compare("first touch of 1 GiB (both)", &touch, &lazy, rounds, |t| t.start + t.run)?;
    let pinned = [Variant::memory("768M,prefault")?, Variant::pinned("768M,prefault", "0")?];
    compare("random access, pinned or not (guest's run)", &random, &pinned, rounds, |t| t.run)?;
    Ok(())
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

struct Times {
    /// From the specification to a machine that is ready to run.
    start: Duration,
    /// From there to the guest's end.
    run: Duration,
}

fn compare(
    title: &str,
    kernel: &tempfile::NamedTempFile,
    variants: &[Variant],
    rounds: usize,
    figure: impl Fn(&Times) -> Duration,
) -> Result<()> {
    println!("\n{title}");
    let mut times: Vec<Vec<f64>> = variants.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (variant, times) in variants.iter().zip(&mut times) {
            match once(kernel, variant) {
                Ok(measured) => times.push(figure(&measured).as_secs_f64()),
                Err(error) if times.is_empty() => println!("  {:34} not here: {error}", variant.name),
                Err(_) => {}
            }
        }
    }
    let base = median(&mut times[0]);
    for (variant, times) in variants.iter().zip(&mut times).filter(|(_, t)| !t.is_empty()) {
        let middle = median(times);
        let (low, high) = (times[times.len() / 4], times[times.len() * 3 / 4]);
        println!(
            "  {:34} {:8.1} ms   {:5.3}   {:.1} to {:.1}",
            variant.name,
            middle * 1e3,
            middle / base,
            low * 1e3,
            high * 1e3
        );
    }
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn once(kernel: &tempfile::NamedTempFile, variant: &Variant) -> Result<Times> {
    let mut spec = variant.spec.clone();
    spec.boot.kernel = Some(kernel.path().to_owned());
    assert!(spec.memory >= ByteSize(512 << 20));
    let begin = Instant::now();
    let vm = Vm::prepare(&spec)?;
    let start = begin.elapsed();
    let (sender, ended) = mpsc::channel();
    let begin = Instant::now();
    let _handle = vm.start(VmOutputs {
        serial: Box::new(|_| {}),
        virtio: Box::new(|_| {}),
        rebooted: Box::new(|| {}),
        ended: Box::new(move |end| drop(sender.send((end, Instant::now())))),
    })?;
    match ended.recv()? {
        (RunEnd::DebugExit(0), end) => Ok(Times { start, run: end - begin }),
        (end, _) => Err(format!("the guest ended otherwise: {end:?}").into()),
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
    a.and(edx, (bytes - 1 & !3) as i32)?;
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
