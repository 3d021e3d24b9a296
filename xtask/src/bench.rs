//! `cargo xtask bench`: the same program natively, on Atoll and on QEMU's emulator, in turn; `bench disk` is in
//! [`disk`].
//!
//! The guest is the distribution's kernel with `testing/bench/guest_bench.c` as its only program. Each round
//! runs native, Atoll, QEMU, so that a slow minute of the host hits all of them; for each figure the best round
//! counts. The figures that travel are ratios: a kernel's slow-down is its time in the guest over its time on
//! the host in the same run.
//!
//! Memory: `/proc/PID/status` is sampled while the guest runs. Guest RAM is shared memory on both sides (a memfd
//! in Atoll, `memory-backend-memfd` in QEMU), so what the process needs beyond it is its anonymous and file
//! pages plus its page tables, at their common peak.

mod disk;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use atoll_guests::GuestKernel;
use serde::Serialize;

use crate::guests;
use crate::process::{cargo, has, output_within, run as run_command, show, target};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    /// Rounds; the best of each figure counts
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// One round, boot only: a few minutes less
    #[arg(long)]
    quick: bool,
    /// Measure only this one besides native: atoll or qemu-tcg
    #[arg(long)]
    only: Option<String>,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 512)]
    memory: u32,
    /// Boot this kernel instead of Debian's 6.1 cloud kernel
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Seconds after which a run is given up
    #[arg(long, default_value_t = 1800)]
    patience: u64,
}

/// What else there is to measure.
#[derive(Debug, clap::Subcommand)]
enum What {
    /// Disks: fio in the guest, on raw and qcow2 images
    Disk(disk::Arguments),
}

/// What one run of one contender gave. Times in seconds, memory in KiB, kernels in ns per operation.
#[derive(Debug, Clone, Default, Serialize)]
struct Run {
    init_wall_s: Option<f64>,
    init_uptime_s: Option<f64>,
    beyond_ram_kib: Option<u64>,
    page_tables_kib: Option<u64>,
    kernels: BTreeMap<String, f64>,
    /// From the start of the process to its end, for a guest whose first instructions end the machine: what
    /// starting and ending cost together.
    start_and_end_ms: Option<f64>,
}

/// The report in `target/bench.json`.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    memory_mib: u32,
    rounds: u32,
    host_cpu: String,
    /// Best of each figure, by contender.
    best: BTreeMap<String, Run>,
    /// Slow-down against native, by contender and kernel.
    slowdown: BTreeMap<String, BTreeMap<String, f64>>,
    /// Geometric mean of the slow-downs, by contender.
    geometric_mean: BTreeMap<String, f64>,
}

/// A name and what makes its command.
type Contender = (&'static str, Box<dyn Fn() -> Command>);

/// Measures, prints the table, writes the JSON file.
///
/// # Errors
/// If a contender cannot be built or started, or does not finish.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        Some(What::Disk(arguments)) => disk::run(arguments),
        None => programs(arguments),
    }
}

/// Natively, on Atoll and on QEMU's emulator.
fn programs(arguments: &Arguments) -> Result<()> {
    let wanted = |name: &str| arguments.only.as_ref().is_none_or(|only| only == name);
    let kernel = match &arguments.kernel {
        Some(path) => path.clone(),
        None => guests::fetch(GuestKernel::Cloud61).or_else(|_| guests::fetch(GuestKernel::Host))?.vmlinuz,
    };
    let program = guests::bench_program()?;
    let initrd = guests::bench_initrd()?;
    let rounds = if arguments.quick { 1 } else { arguments.rounds.max(1) };
    let append = if arguments.quick { "console=ttyS0" } else { "console=ttyS0 dobench" };
    let patience = Duration::from_secs(arguments.patience);
    let mut best: BTreeMap<String, Run> = BTreeMap::new();
    let mut contenders: Vec<Contender> = Vec::new();
    if wanted("atoll") {
        run_command(&mut cargo(&["build", "--release", "--package", "atoll"]))?;
        let (kernel, initrd, memory) = (kernel.clone(), initrd.clone(), arguments.memory);
        contenders.push(("atoll", Box::new(move || atoll(&kernel, &initrd, append, memory))));
        best.entry("atoll".to_owned()).or_default().start_and_end_ms = Some(start_and_end(arguments.memory)?);
    }
    if wanted("qemu-tcg") && has("qemu-system-x86_64") {
        let (kernel, initrd, memory) = (kernel.clone(), initrd.clone(), arguments.memory);
        contenders.push(("qemu-tcg", Box::new(move || qemu(&kernel, &initrd, append, memory))));
    }
    for round in 1..=rounds {
        if !arguments.quick {
            println!("round {round}/{rounds}: native");
            merge(best.entry("native".to_owned()).or_default(), measure(Command::new(&program), patience)?);
        }
        for (name, command) in &contenders {
            println!("round {round}/{rounds}: {name}");
            let run = measure(command(), patience).with_context(|| format!("measuring {name}"))?;
            merge(best.entry((*name).to_owned()).or_default(), run);
        }
    }
    let report = report(best, &kernel, arguments.memory, rounds);
    print_table(&report);
    let path = target().join("bench.json");
    let json = serde_json::to_string_pretty(&report).context("cannot encode the report")?;
    std::fs::write(&path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    println!("\nwritten to {}", path.display());
    Ok(())
}

fn atoll(kernel: &Path, initrd: &Path, append: &str, memory: u32) -> Command {
    let mut command = Command::new(target().join("release/atoll"));
    command.args(["run", "--accel", "software", "--cpus", "1", "--append", append]);
    command.args(["--memory", &format!("{memory}M")]);
    command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    command
}

/// A Multiboot 1 kernel of three instructions: the value 16 to the debug-exit port, then HLT. The header carries its
/// own load addresses (Multiboot specification 0.6.96, 3.1.3), so no ELF file is needed.
fn shortest_kernel() -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const CODE: [u8; 5] = [0xb0, 0x10, 0xe6, 0xf4, 0xf4];
    let (magic, flags) = (0x1bad_b002_u32, 0x1_0000_u32);
    let entry = LOAD + 32;
    let end = entry + CODE.len() as u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, checksum, LOAD, LOAD, end, end, entry];
    words.iter().flat_map(|w| w.to_le_bytes()).chain(CODE).collect()
}

/// Milliseconds that the shortest machine takes, best of twenty.
fn start_and_end(memory: u32) -> Result<f64> {
    let kernel = target().join("guests").join("shortest");
    std::fs::write(&kernel, shortest_kernel())
        .with_context(|| format!("cannot write {}", kernel.display()))?;
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let mut command = Command::new(target().join("release/atoll"));
        command.args([
            "run",
            "--accel",
            "software",
            "--debug-exit",
            "--memory",
            &format!("{memory}M"),
            "--kernel",
        ]);
        command.arg(&kernel);
        let started = Instant::now();
        let output = output_within(command, Duration::from_secs(20))?;
        // 2 * 16 + 1, see docs/run.md.
        if output.status.code() != Some(33) {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("the shortest machine ended with {}, expected exit code 33: {said}", output.status);
        }
        best = best.min(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(best)
}

fn qemu(kernel: &Path, initrd: &Path, append: &str, memory: u32) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-M", "q35,memory-backend=ram", "-m", &memory.to_string()]);
    command.args(["-object", &format!("memory-backend-memfd,id=ram,share=on,size={memory}M")]);
    command.args(["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio", "-append", append]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    command
}

/// Runs `command` to its end and reads its figures from its output.
fn measure(mut command: Command, patience: Duration) -> Result<Run> {
    let text = show(&command);
    let started = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start `{text}`"))?;
    let memory = Arc::new(Memory::default());
    let sampler = sample(child.id(), Arc::clone(&memory));
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let complaints = std::thread::spawn(move || errors.map(std::io::read_to_string));
    let reader = std::thread::spawn(move || {
        let mut run = Run::default();
        let mut last = String::new();
        for line in output.map(BufReader::new).into_iter().flat_map(|o| o.split(b'\n')).map_while(Result::ok)
        {
            let line = String::from_utf8_lossy(&line).trim().to_owned();
            read_line(&mut run, &line, started.elapsed());
            last = line;
        }
        (run, last)
    });
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait")? {
            break status;
        }
        if started.elapsed() > patience {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    memory.stop.store(true, Ordering::Relaxed);
    let _ = sampler.join();
    let (mut run, last) = reader.join().unwrap_or_default();
    if !status.success() {
        let said = complaints.join().ok().flatten().and_then(Result::ok).unwrap_or_default();
        bail!("`{text}` ended with {status} after {:?}: {} {}", started.elapsed(), last, said.trim());
    }
    run.beyond_ram_kib = Some(memory.beyond.load(Ordering::Relaxed)).filter(|n| *n > 0);
    run.page_tables_kib = Some(memory.tables.load(Ordering::Relaxed)).filter(|n| *n > 0);
    Ok(run)
}

/// `INIT-REACHED`, `UPTIME 1.23 ...` and `R name ns ns/op`, as `testing/bench/README.md` has them.
fn read_line(run: &mut Run, line: &str, now: Duration) {
    // The kernel's own messages may stand on the same line before the program's.
    if line.contains("INIT-REACHED") {
        run.init_wall_s = Some(now.as_secs_f64());
    } else if let Some((_, rest)) = line.split_once("UPTIME ") {
        run.init_uptime_s = rest.split_whitespace().next().and_then(|w| w.parse().ok());
    } else if let Some(rest) = line.strip_prefix("R ") {
        let mut words = rest.split_whitespace();
        if let (Some(name), Some(Ok(figure))) = (words.next(), words.next().map(str::parse)) {
            run.kernels.insert(name.to_owned(), figure);
        }
    }
}

#[derive(Debug, Default)]
struct Memory {
    beyond: AtomicU64,
    tables: AtomicU64,
    stop: AtomicBool,
}

fn sample(pid: u32, memory: Arc<Memory>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        while !memory.stop.load(Ordering::Relaxed) {
            if let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) {
                let field = |name: &str| status_field(&status, name).unwrap_or(0);
                let tables = field("VmPTE");
                memory.tables.fetch_max(tables, Ordering::Relaxed);
                memory.beyond.fetch_max(field("RssAnon") + field("RssFile") + tables, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    })
}

/// `Name:   123 kB` in `/proc/PID/status`.
fn status_field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Keeps the best of each figure. Memory is a peak: there the larger one counts.
fn merge(best: &mut Run, run: Run) {
    let lower = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    best.init_wall_s = lower(best.init_wall_s, run.init_wall_s);
    best.init_uptime_s = lower(best.init_uptime_s, run.init_uptime_s);
    best.beyond_ram_kib = best.beyond_ram_kib.max(run.beyond_ram_kib);
    best.page_tables_kib = best.page_tables_kib.max(run.page_tables_kib);
    for (name, figure) in run.kernels {
        let entry = best.kernels.entry(name).or_insert(figure);
        *entry = entry.min(figure);
    }
}

fn report(best: BTreeMap<String, Run>, kernel: &Path, memory_mib: u32, rounds: u32) -> Report {
    let native = best.get("native").map(|r| r.kernels.clone()).unwrap_or_default();
    let mut slowdown = BTreeMap::new();
    let mut geometric_mean = BTreeMap::new();
    for (name, run) in best.iter().filter(|(name, _)| *name != "native") {
        let ratios: BTreeMap<String, f64> = run
            .kernels
            .iter()
            .filter_map(|(k, ns)| native.get(k).filter(|n| **n > 0.0).map(|n| (k.clone(), ns / n)))
            .collect();
        if let Some(mean) = mean_of(ratios.values().copied()) {
            geometric_mean.insert(name.clone(), mean);
        }
        slowdown.insert(name.clone(), ratios);
    }
    let kernel = kernel.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Report { kernel, memory_mib, rounds, host_cpu: host_cpu(), best, slowdown, geometric_mean }
}

/// Geometric mean.
fn mean_of(ratios: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = ratios.fold((0u32, 0.0), |(count, sum), ratio| (count + 1, sum + ratio.ln()));
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

fn host_cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, n)| n.to_owned()));
    name.unwrap_or_default()
}

fn print_table(report: &Report) {
    let names: Vec<&String> = report.best.keys().filter(|n| *n != "native").collect();
    println!(
        "\n{} with {} MiB on {}, best of {}",
        report.kernel, report.memory_mib, report.host_cpu, report.rounds
    );
    let row = |label: &str, native: String, cell: &dyn Fn(&Run, &str) -> String| {
        print!("{label:<26} {native:>12}");
        for name in &names {
            print!(" {:>14}", report.best.get(*name).map(|run| cell(run, name)).unwrap_or_default());
        }
        println!();
    };
    row("", "native".to_owned(), &|_, name| name.to_owned());
    let number = |value: Option<f64>, unit: &str| value.map_or("-".to_owned(), |v| format!("{v:.2} {unit}"));
    row("start and end", String::new(), &|run, _| number(run.start_and_end_ms, "ms"));
    row("boot to init, wall", String::new(), &|run, _| number(run.init_wall_s, "s"));
    row("boot to init, guest clock", String::new(), &|run, _| number(run.init_uptime_s, "s"));
    let mib = |kib: Option<u64>| number(kib.map(|k| k as f64 / 1024.0), "MiB");
    row("memory beyond guest RAM", String::new(), &|run, _| mib(run.beyond_ram_kib));
    row("  of it page tables", String::new(), &|run, _| mib(run.page_tables_kib));
    if let Some(native) = report.best.get("native") {
        for (kernel, ns) in &native.kernels {
            row(kernel, format!("{ns:.2} ns"), &|_, name| {
                let ratio = report.slowdown.get(name).and_then(|s| s.get(kernel));
                ratio.map_or("-".to_owned(), |r| format!("{r:.1} x"))
            });
        }
        row("geometric mean", String::new(), &|_, name| {
            report.geometric_mean.get(name).map_or("-".to_owned(), |m| format!("{m:.1} x"))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(lines: &[&str]) -> Run {
        let mut run = Run::default();
        for line in lines {
            read_line(&mut run, line, Duration::from_secs(2));
        }
        run
    }

    #[test]
    fn the_programs_output_is_read() {
        let run = parsed(&[
            "[ 1.0] noise",
            "INIT-REACHED",
            "UPTIME 1.25 0.30",
            "R alu   1.500 ns/op",
            "R bad x ns/op",
        ]);
        assert_eq!((run.init_wall_s, run.init_uptime_s), (Some(2.0), Some(1.25)));
        assert_eq!(run.kernels.into_iter().collect::<Vec<_>>(), [("alu".to_owned(), 1.5)]);
    }

    #[test]
    fn the_best_time_and_the_worst_memory_count() {
        let mut best = Run { beyond_ram_kib: Some(10), ..parsed(&["R alu 3.0 ns/op", "UPTIME 9.0 0"]) };
        merge(&mut best, Run { beyond_ram_kib: Some(20), ..parsed(&["R alu 2.0 ns/op", "UPTIME 8.0 0"]) });
        merge(&mut best, Run { beyond_ram_kib: Some(5), ..parsed(&["R alu 4.0 ns/op"]) });
        assert_eq!(
            (best.kernels["alu"], best.init_uptime_s, best.beyond_ram_kib),
            (2.0, Some(8.0), Some(20))
        );
    }

    #[test]
    fn slow_downs_are_against_native_and_their_mean_is_geometric() {
        let mut best = BTreeMap::new();
        best.insert("native".to_owned(), parsed(&["R a 1.0 ns/op", "R b 2.0 ns/op"]));
        best.insert("atoll".to_owned(), parsed(&["R a 2.0 ns/op", "R b 16.0 ns/op", "R c 1.0 ns/op"]));
        let report = report(best, Path::new("/k/vmlinuz"), 1, 1);
        assert_eq!(report.slowdown["atoll"].len(), 2, "a kernel without a native figure has no slow-down");
        assert!((report.geometric_mean["atoll"] - 4.0).abs() < 1e-9);
        assert!(!report.geometric_mean.contains_key("native"));
    }

    #[test]
    fn status_fields_are_found_by_their_whole_name() {
        let status = "RssAnonX:\t9 kB\nRssAnon:\t  123 kB\n";
        assert_eq!(status_field(status, "RssAnon"), Some(123));
        assert_eq!(status_field(status, "VmPTE"), None);
    }

    #[test]
    fn a_run_that_fails_is_an_error_with_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo INIT-REACHED; echo why >&2; exit 4"]);
        let error = measure(command, Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("why"), "{error}");
    }
}
