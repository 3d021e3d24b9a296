//! `cargo xtask bench disk`: `fio` in a guest on Atoll's software CPU and on QEMU's emulator, in turn.
//!
//! The guest is the distribution's kernel with busybox and the host's own `fio` in its initial RAM disk. One run of
//! `fio` goes through all patterns on `/dev/vda` and prints JSON on the serial port. Every run gets a fresh copy of
//! the same image, fully allocated and flushed to the host's disk before the machine starts: no cluster is new, and
//! nobody waits for what the run before left to write. Both contenders go through the host's page cache and turn a
//! guest's flush into one of the host's (`cache=writeback` in QEMU's words), so this measures the way from the guest
//! to the page cache, not the host's disk.
//!
//! The ratio of a pattern is the median of its rounds' ratios, each of two runs that followed each other.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use atoll_guests::{Cache, GuestKernel, KernelFiles, initramfs, kernel};
use atoll_scenarios::console::Machine;
use serde::{Deserialize, Serialize};

use crate::guests::{self, Lines};
use crate::process::{cargo, has, run as run_command, show, target};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Rounds; the median of each figure counts
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Measure only this one: atoll or qemu-tcg
    #[arg(long, value_parser = CONTENDERS)]
    only: Option<String>,
    /// Measure only this format: raw or qcow2
    #[arg(long, value_parser = FORMATS)]
    format: Option<String>,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Size of the disk in MiB
    #[arg(long, default_value_t = 512)]
    size: u32,
    /// Seconds for each pattern, after one second that does not count
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Folder for the images, to choose the host's file system (default: the target directory)
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Seconds after which a run is given up and tried once more
    #[arg(long, default_value_t = 240)]
    patience: u64,
}

const CONTENDERS: [&str; 2] = ["atoll", "qemu-tcg"];
const FORMATS: [&str; 2] = ["raw", "qcow2"];
const MIB: f64 = 1024.0 * 1024.0;

/// One way of using a disk.
#[derive(Debug, Clone, Copy)]
struct Pattern {
    /// As `fio` calls it; what the result is found by.
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
}

const fn pattern(name: &'static str, rw: &'static str, block: &'static str, depth: u32) -> Pattern {
    Pattern { name, rw, block, depth }
}

/// In the order in which they run: reads first, so that they find the image as it was copied.
const PATTERNS: [Pattern; 8] = [
    pattern("4k-random-read-1", "randread", "4k", 1),
    pattern("4k-random-read-32", "randread", "4k", 32),
    pattern("1m-sequential-read-1", "read", "1m", 1),
    pattern("1m-sequential-read-32", "read", "1m", 32),
    pattern("4k-random-write-1", "randwrite", "4k", 1),
    pattern("4k-random-write-32", "randwrite", "4k", 32),
    pattern("1m-sequential-write-1", "write", "1m", 1),
    pattern("1m-sequential-write-32", "write", "1m", 32),
];

/// Stands before and after the JSON on the serial port.
const BEGIN: &str = "FIO-BEGIN";
const END: &str = "FIO-END";

/// PID 1. The kernel is silenced so that it does not write into the JSON, and the JSON's indentation stays in the
/// guest: a serial port is slow.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
dmesg -n 1
# The drivers up to the disk's.
while read -r name; do insmod "/lib/modules/$name.ko"; [ "$name" = virtio_blk ] && break; done </etc/modules
for try in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 0.2; done
echo "GUEST-UP $(cat /proc/uptime) $(cat /sys/block/vda/queue/write_cache)"
fio --eta=never --output-format=json --output=/tmp/out /etc/patterns.fio >/tmp/log 2>&1 || cat /tmp/log
echo "FIO-BEGIN"
tr -d ' \n\t' </tmp/out
echo; echo "FIO-END"
poweroff -f
"#;

/// Measures, prints the table, writes the JSON file.
///
/// # Errors
/// If a program is missing, or a machine does not start, finish, or say what it should.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let contenders: Vec<&str> = chosen(&CONTENDERS, arguments.only.as_deref());
    let formats: Vec<&str> = chosen(&FORMATS, arguments.format.as_deref());
    require(&contenders, &formats)?;
    if contenders.contains(&"atoll") {
        run_command(&mut cargo(&["build", "--release", "--package", "atoll"]))?;
    }
    let logs = target().join("bench-disk");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let files = guests::fetch(GuestKernel::Cloud61).or_else(|_| guests::fetch(GuestKernel::Host))?;
    let folder = arguments.folder.clone().unwrap_or_else(|| logs.clone());
    let folder = tempfile::Builder::new()
        .prefix("images-")
        .tempdir_in(&folder)
        .with_context(|| format!("cannot create a folder in {}", folder.display()))?;
    let guest = Guest {
        kernel: files.vmlinuz.clone(),
        initrd: folder.path().join("initrd.cpio"),
        memory: arguments.memory,
        patience: Duration::from_secs(arguments.patience),
    };
    std::fs::write(&guest.initrd, initrd(&files, arguments.seconds)?).context("cannot write the initrd")?;
    let masters = masters(folder.path(), &formats, arguments.size)?;
    let mut samples = Samples::default();
    let rounds = arguments.rounds.max(1);
    for round in 1..=rounds {
        for (format, master) in &masters {
            for contender in &contenders {
                println!("round {round}/{rounds}: {contender}, {format}");
                let log = logs.join(format!("{contender}-{format}-{round}"));
                let (figures, given_up) = guest
                    .measure_twice_at_most(contender, format, master, &log)
                    .with_context(|| format!("measuring {contender} on {format}"))?;
                samples.add(contender, format, figures);
                *samples.given_up.entry((*contender).to_owned()).or_default() += u32::from(given_up);
            }
        }
    }
    let report = Report {
        kernel: files.version,
        disk_mib: arguments.size,
        seconds: arguments.seconds,
        rounds,
        host_cpu: super::host_cpu(),
        rows: samples.rows(&formats),
        given_up: samples.given_up,
    };
    print_table(&report);
    let path = target().join("bench-disk.json");
    let json = serde_json::to_string_pretty(&report).context("cannot encode the report")?;
    std::fs::write(&path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    println!("\nwritten to {}", path.display());
    Ok(())
}

/// Nothing starts before everything that it needs is there.
fn require(contenders: &[&str], formats: &[&str]) -> Result<()> {
    for (program, package, wanted) in [
        ("fio", "fio", true),
        ("ldd", "libc-bin", true),
        ("qemu-img", "qemu-utils", formats.contains(&"qcow2")),
        ("qemu-system-x86_64", "qemu-system-x86", contenders.contains(&"qemu-tcg")),
    ] {
        ensure!(!wanted || has(program), "{program} is missing: install the package {package} and run again");
    }
    Ok(())
}

fn chosen<'a>(all: &[&'a str], only: Option<&str>) -> Vec<&'a str> {
    all.iter().copied().filter(|name| only.is_none_or(|only| only == *name)).collect()
}

/// busybox, drivers and the script that is PID 1, then `fio` with its libraries and the list of patterns.
fn initrd(files: &KernelFiles, seconds: u32) -> Result<Vec<u8>> {
    let busybox = kernel::busybox(&Cache::open()?, &mut Lines)?;
    let mut bytes = initramfs::scripted(files, &busybox, INIT)?;
    let mut more = guests::host_program("fio")?;
    // Not every build of it has Linux' older interface for asynchronous I/O.
    let engine = if more.contains("libaio") { "libaio" } else { "io_uring" };
    more.archive.file("etc/patterns.fio", 0o644, job_file(engine, seconds).as_bytes());
    // The kernel unpacks one archive after the other; each starts at a multiple of four bytes.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(more.archive.finish());
    Ok(bytes)
}

/// What `fio` is to do: one pattern after the other, in threads of one process.
fn job_file(engine: &str, seconds: u32) -> String {
    let mut text = format!(
        "[global]\nfilename=/dev/vda\nioengine={engine}\ndirect=1\nthread=1\nnorandommap=1\nallow_mounted_write=1\n\
         time_based=1\nramp_time=1\nruntime={seconds}\nclat_percentiles=0\n"
    );
    for Pattern { name, rw, block, depth } in PATTERNS {
        text += &format!("[{name}]\nstonewall\nrw={rw}\nbs={block}\niodepth={depth}\n");
    }
    text
}

/// The images of which every run gets a copy, with the same content in each.
fn masters<'a>(folder: &Path, formats: &[&'a str], mib: u32) -> Result<Vec<(&'a str, PathBuf)>> {
    let raw = folder.join("master.raw");
    let mut file = std::fs::File::create(&raw).with_context(|| format!("cannot create {}", raw.display()))?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..mib {
        let noise: Vec<u8> = (0..(1 << 20) / 8).flat_map(|_| next(&mut state).to_le_bytes()).collect();
        file.write_all(&noise).with_context(|| format!("cannot write {}", raw.display()))?;
    }
    let mut list = Vec::new();
    for format in formats {
        let path = folder.join(format!("master.{format}"));
        if *format != "raw" {
            let mut convert = Command::new("qemu-img");
            run_command(convert.args(["convert", "-f", "raw", "-O", format]).arg(&raw).arg(&path))?;
        }
        list.push((*format, path));
    }
    Ok(list)
}

/// xorshift64: content that is neither zero nor twice the same, no more.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A copy that is on the host's disk, so that its being written does not slow the measurement.
fn fresh_copy(master: &Path, copy: &Path) -> Result<()> {
    let _ = std::fs::remove_file(copy);
    std::fs::copy(master, copy).with_context(|| format!("cannot copy to {}", copy.display()))?;
    let file = std::fs::File::open(copy).with_context(|| format!("cannot open {}", copy.display()))?;
    file.sync_all().with_context(|| format!("cannot flush {}", copy.display()))
}

/// What both contenders boot.
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    memory: u32,
    patience: Duration,
}

impl Guest {
    fn command(&self, contender: &str, format: &str, disk: &Path) -> Command {
        const APPEND: &str = "console=ttyS0 quiet";
        let disk = disk.display();
        if contender == "atoll" {
            let mut command = super::atoll(&self.kernel, &self.initrd, APPEND, self.memory);
            command.args(["--net", "none", "--disk", &format!("{disk},format={format}")]);
            command
        } else {
            let mut command = super::qemu(&self.kernel, &self.initrd, APPEND, self.memory);
            command.args(["-drive", &format!("file={disk},format={format},if=virtio,cache=writeback")]);
            command
        }
    }

    /// Measures on a fresh copy of `master`. A guest that stood still must not cost all rounds: it is measured once
    /// more, and the report says that this happened (the second value).
    fn measure_twice_at_most(
        &self,
        contender: &str,
        format: &str,
        master: &Path,
        log: &Path,
    ) -> Result<(Figures, bool)> {
        let copy = self.initrd.with_file_name(format!("disk.{format}"));
        fresh_copy(master, &copy)?;
        let error = match self.measure(contender, format, &copy, &log.with_extension("log")) {
            Ok(figures) => return Ok((figures, false)),
            Err(error) => error,
        };
        println!("  given up: {error:#}");
        fresh_copy(master, &copy)?;
        let log = log.with_extension("again.log");
        let figures = self.measure(contender, format, &copy, &log);
        Ok((figures.with_context(|| format!("twice; see {}", log.display()))?, true))
    }

    /// Boots, lets `fio` run through its patterns, reads what it printed.
    fn measure(&self, contender: &str, format: &str, disk: &Path, log: &Path) -> Result<Figures> {
        let command = self.command(contender, format, disk);
        let text = show(&command);
        let mut machine = Machine::start(command, log)?;
        let up = machine.expect("GUEST-UP ", self.patience)?;
        machine.expect(BEGIN, self.patience)?;
        let done = machine.expect(END, self.patience)?;
        let status = machine.wait(self.patience)?;
        ensure!(status.success(), "`{text}` ended with {status}");
        println!("  up after {:.1} s, done after {:.1} s", up.as_secs_f64(), done.as_secs_f64());
        read(&machine.text())
    }
}

/// What one pattern gave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Figure {
    mib_per_second: f64,
    operations_per_second: f64,
}

/// Of one run, by the pattern's name.
type Figures = BTreeMap<String, Figure>;

/// The part of `fio`'s JSON that is used (fio documentation, "JSON output").
#[derive(Debug, Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Debug, Deserialize)]
struct Job {
    jobname: String,
    /// An `errno`, 0 for none.
    error: i64,
    read: Direction,
    write: Direction,
}

#[derive(Debug, Deserialize)]
struct Direction {
    total_ios: u64,
    bw_bytes: u64,
    iops: f64,
}

/// Finds the JSON between the two marks in what a console printed.
fn read(console: &str) -> Result<Figures> {
    let json = console
        .rsplit_once(BEGIN)
        .and_then(|(_, rest)| rest.split_once(END))
        .and_then(|(text, _)| text.get(text.find('{')?..=text.rfind('}')?))
        .context("fio printed no result; what it said instead is in the log")?;
    let output: Output = serde_json::from_str(json).context("fio's result cannot be read")?;
    let mut figures = Figures::new();
    for job in output.jobs {
        ensure!(job.error == 0, "{}: fio met error {} in the guest", job.jobname, job.error);
        let used = if job.write.total_ios > job.read.total_ios { &job.write } else { &job.read };
        let figure = Figure { mib_per_second: used.bw_bytes as f64 / MIB, operations_per_second: used.iops };
        figures.insert(job.jobname, figure);
    }
    for Pattern { name, .. } in PATTERNS {
        match figures.get(name) {
            Some(figure) if figure.operations_per_second > 0.0 => {}
            Some(_) => bail!("{name}: fio finished no operation; give it more --seconds"),
            None => bail!("{name}: fio's result does not have it"),
        }
    }
    Ok(figures)
}

/// Every run's figures, in the order of the rounds, by format and contender.
#[derive(Debug, Default)]
struct Samples {
    runs: BTreeMap<(String, String), Vec<Figures>>,
    /// How many runs had to be made again, by contender.
    given_up: BTreeMap<String, u32>,
}

impl Samples {
    fn add(&mut self, contender: &str, format: &str, figures: Figures) {
        self.runs.entry((format.to_owned(), contender.to_owned())).or_default().push(figures);
    }

    fn of(&self, format: &str, contender: &str, pattern: &str) -> Vec<Figure> {
        let runs = self.runs.get(&(format.to_owned(), contender.to_owned()));
        runs.into_iter().flatten().filter_map(|run| run.get(pattern).copied()).collect()
    }

    fn rows(&self, formats: &[&str]) -> Vec<Row> {
        let mut rows = Vec::new();
        for format in formats {
            for Pattern { name, .. } in PATTERNS {
                let [atoll, qemu] = CONTENDERS.map(|contender| self.of(format, contender, name));
                let ratios = atoll.iter().zip(&qemu);
                let ratios = ratios.map(|(a, q)| a.operations_per_second / q.operations_per_second);
                rows.push(Row {
                    format: (*format).to_owned(),
                    pattern: name.to_owned(),
                    ratio: median(ratios.collect()),
                    atoll: middle(&atoll),
                    qemu_tcg: middle(&qemu),
                });
            }
        }
        rows
    }
}

/// The report in `target/bench-disk.json`.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    disk_mib: u32,
    seconds: u32,
    rounds: u32,
    host_cpu: String,
    rows: Vec<Row>,
    /// Runs that failed or stood still and were made again, by contender.
    given_up: BTreeMap<String, u32>,
}

/// Medians of one pattern on one format.
#[derive(Debug, Serialize)]
struct Row {
    format: String,
    pattern: String,
    atoll: Option<Figure>,
    qemu_tcg: Option<Figure>,
    /// Operations of Atoll over those of QEMU, paired by round.
    ratio: Option<f64>,
}

fn middle(figures: &[Figure]) -> Option<Figure> {
    Some(Figure {
        mib_per_second: median(figures.iter().map(|f| f.mib_per_second).collect())?,
        operations_per_second: median(figures.iter().map(|f| f.operations_per_second).collect())?,
    })
}

/// The middle one; of an even number the mean of the middle two.
fn median(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    let above = *all.get(all.len() / 2)?;
    let below = *all.get(all.len().saturating_sub(1) / 2)?;
    Some((above + below) / 2.0)
}

fn print_table(report: &Report) {
    println!(
        "\nfio in {} on a disk of {} MiB, {} s a pattern, on {}, median of {}",
        report.kernel, report.disk_mib, report.seconds, report.host_cpu, report.rounds
    );
    println!("{:<30} {:>23} {:>23} {:>8}", "", "Atoll", "QEMU TCG", "ratio");
    println!("{:<30} {:>11} {:>11} {:>11} {:>11}", "", "MiB/s", "IOPS", "MiB/s", "IOPS");
    for row in &report.rows {
        let cell = |figure: &Option<Figure>| {
            figure.map_or_else(
                || format!("{:>11} {:>11}", "-", "-"),
                |f| format!("{:>11.1} {:>11.0}", f.mib_per_second, f.operations_per_second),
            )
        };
        let ratio = row.ratio.map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        let label = format!("{:<6} {}", row.format, row.pattern);
        println!("{label:<30} {} {} {ratio:>8}", cell(&row.atoll), cell(&row.qemu_tcg));
    }
    for (contender, count) in report.given_up.iter().filter(|(_, count)| **count > 0) {
        println!("{contender}: {count} of its runs failed or stood still and were made again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str, error: i64, read: (u64, u64, f64), write: (u64, u64, f64)) -> String {
        let flow = |(ios, bytes, iops): (u64, u64, f64)| {
            format!(r#"{{"io_bytes":1,"total_ios":{ios},"bw_bytes":{bytes},"bw":1,"iops":{iops:?}}}"#)
        };
        format!(
            r#"{{"jobname":"{name}","groupid":0,"error":{error},"read":{},"write":{}}}"#,
            flow(read),
            flow(write)
        )
    }

    /// A console's text with a result in it: 2 MiB/s and 512 operations, in the direction of each pattern.
    fn console(change: impl Fn(&str, String) -> Option<String>) -> String {
        let (used, unused) = ((2048, 2_097_152, 512.5), (0, 0, 0.0));
        let jobs: Vec<String> = PATTERNS
            .iter()
            .filter_map(|p| {
                let writes = p.rw.contains("write");
                let (read, write) = if writes { (unused, used) } else { (used, unused) };
                change(p.name, job(p.name, 0, read, write))
            })
            .collect();
        format!(
            "[ 0.1] noise {{}}\r\nGUEST-UP 1.0 0.2 write back\r\nFIO-BEGIN\r\nfio:note\r\n\
             {{\"fioversion\":\"fio-3.33\",\"jobs\":[{}],\"disk_util\":[]}}\r\nFIO-END\r\nreboot: }}\r\n",
            jobs.join(",")
        )
    }

    #[test]
    fn a_result_is_read_in_the_direction_of_its_pattern() {
        let figures = read(&console(|_, job| Some(job))).unwrap();
        assert_eq!(figures.len(), PATTERNS.len());
        let expected = Figure { mib_per_second: 2.0, operations_per_second: 512.5 };
        assert!(figures.values().all(|figure| *figure == expected), "{figures:?}");
    }

    #[test]
    fn a_result_that_is_not_whole_is_refused_and_the_pattern_is_named() {
        let said = |text: &str| read(text).unwrap_err().to_string();
        let name = PATTERNS[5].name;
        let without = console(|n, job| (n != name).then_some(job));
        assert!(said(&without).contains(name));
        let failed = |n: &str, good| Some(if n == name { job(n, 5, (0, 0, 0.0), (0, 0, 0.0)) } else { good });
        assert!(said(&console(failed)).contains("error 5"));
        let idle = |n: &str, good| Some(if n == name { job(n, 0, (0, 0, 0.0), (0, 0, 0.0)) } else { good });
        assert!(said(&console(idle)).contains("no operation"));
        assert!(said("FIO-BEGIN\r\nfio: cannot open\r\nFIO-END\r\n").contains("no result"));
        assert!(said(&console(|_, job| Some(job)).replace(END, "")).contains("no result"));
    }

    #[test]
    fn ratios_are_paired_by_round() {
        let figures = |iops: f64| {
            let figure = Figure { mib_per_second: 1.0, operations_per_second: iops };
            PATTERNS.iter().map(|p| (p.name.to_owned(), figure)).collect::<Figures>()
        };
        let mut samples = Samples::default();
        // The host was slow in the second round; both felt it.
        for (atoll, qemu) in [(100.0, 200.0), (10.0, 20.0), (120.0, 200.0)] {
            samples.add("atoll", "raw", figures(atoll));
            samples.add("qemu-tcg", "raw", figures(qemu));
        }
        let rows = samples.rows(&["raw"]);
        assert_eq!(rows.len(), PATTERNS.len());
        assert_eq!(rows[0].ratio, Some(0.5));
        assert_eq!(rows[0].atoll.unwrap().operations_per_second, 100.0);
        assert_eq!(samples.rows(&["qcow2"])[0].ratio, None);
    }

    #[test]
    fn medians_of_even_numbers_are_between_the_middle_two() {
        assert_eq!(median(vec![4.0, 1.0, 2.0, 100.0]), Some(3.0));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn every_pattern_waits_for_the_one_before_it() {
        let text = job_file("libaio", 4);
        assert_eq!(text.matches("stonewall").count(), PATTERNS.len());
        assert!(
            text.contains("[4k-random-write-32]\nstonewall\nrw=randwrite\nbs=4k\niodepth=32\n"),
            "{text}"
        );
    }
}
