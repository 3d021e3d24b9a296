//! Running many cases: one process's loop, and the parent that watches several of them.

use std::fmt::Write;
use std::process::{Child, Command};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context;
use iced_x86::{Formatter, Instruction, IntelFormatter};

use crate::case::{After, Case, Mode, PATTERNS, Patterns};
use crate::compare;
use crate::eligible::{self, Eligibility};
use crate::encode;
use crate::explain;
use crate::generate::{Generator, Modes};
use crate::guest::{self, Ended, Guest};
use crate::layout::{self, BASE, CODE, CODE_LEN, PAGE, WRITABLE};
use crate::native::Native;
use crate::progress::{MAX_JOBS, Progress, SharedProgress};

/// A child that does not finish a case in this time is ended.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where Linux puts this program, its heap, libraries and stack: a case whose guest faults there would find
/// memory on the host, and damage it.
const OWN_MEMORY: [std::ops::Range<u64>; 2] =
    [0x5500_0000_0000..0x5700_0000_0000, 0x7e00_0000_0000..0x7fff_ffff_f000];

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Both sides agree.
    Agree,
    /// They do not.
    Differ,
    /// Not compared: index into [`crate::progress::SKIPPED`].
    Skipped(usize),
    /// They do not, for a reason in [`crate::explain::REASONS`].
    Explained(usize),
}

/// Both sides, ready to run cases. One per process.
pub struct Bench {
    native: Native,
    guest: Guest,
    patterns: Patterns,
    /// Which pattern each writable page holds on both sides, if it is known to.
    holds: [Option<u8>; 4],
    host_after: After,
    guest_after: After,
}

impl Bench {
    /// Makes both sides and the generator for what they have in common.
    pub fn new() -> anyhow::Result<(Self, Generator)> {
        let patterns = Patterns::default();
        let model = guest::model()?;
        let generator = Generator::new(Eligibility::of(&model));
        // The guest first: the vector engine's signal handlers must be there before the oracle's.
        let guest = Guest::new(model, &patterns)?;
        let native = Native::new(&patterns).context("the host side")?;
        let bench = Self {
            native,
            guest,
            patterns,
            holds: [None; 4],
            host_after: After::default(),
            guest_after: After::default(),
        };
        Ok((bench, generator))
    }

    /// Makes both sides' memory what the case starts with.
    fn prepare(&mut self, case: &Case) {
        for (i, offset) in WRITABLE.into_iter().enumerate() {
            let wanted = case.patterns[i] % PATTERNS as u8;
            if self.holds[i] != Some(wanted) {
                let pattern = self.patterns.page(wanted);
                self.native.writable(offset).copy_from_slice(pattern);
                self.guest.writable(offset).copy_from_slice(pattern);
                self.holds[i] = Some(wanted);
            }
        }
        for (offset, bytes) in &case.planted {
            let page = offset & !(PAGE - 1);
            let Some(i) = WRITABLE.iter().position(|w| *w == page) else { continue };
            let at = offset - page;
            let len = bytes.len().min(PAGE - at);
            self.native.writable(page)[at..at + len].copy_from_slice(&bytes[..len]);
            self.guest.writable(page)[at..at + len].copy_from_slice(&bytes[..len]);
            self.holds[i] = None;
        }
    }

    /// Whether memory agrees; notes which pages still hold their pattern.
    fn memory_agrees(&mut self) -> bool {
        let mut agrees = true;
        for (i, offset) in WRITABLE.into_iter().enumerate() {
            let host = self.native.page(offset);
            agrees &= host == self.guest.page(offset);
            self.holds[i] = self.holds[i].filter(|pattern| agrees && host == self.patterns.page(*pattern));
        }
        agrees
    }

    /// Runs a case on both sides.
    pub fn run(&mut self, case: &Case, generator: &Generator) -> Outcome {
        self.prepare(case);
        match self.guest.run(case, &mut self.guest_after) {
            Ended::Trap => {}
            ended => {
                self.holds = [None; 4];
                return Outcome::Skipped(if ended == Ended::Endless { 0 } else { 3 });
            }
        }
        let trap = self.guest_after.trap;
        if trap.vector == 14 && OWN_MEMORY.iter().any(|range| range.contains(&trap.address)) {
            self.holds = [None; 4];
            return Outcome::Skipped(5);
        }
        self.native.run(case, &mut self.host_after);
        let memory = self.memory_agrees();
        if memory && compare::agree(case, &self.host_after, &self.guest_after) {
            return Outcome::Agree;
        }
        self.holds = [None; 4];
        if self.host_after.trap.vector == 1 {
            // INT1 is not compared: POPF has set TF.
            return Outcome::Skipped(1);
        }
        let different = self.different_bytes();
        self.prepare(case);
        let path = self.path(case, generator);
        self.holds = [None; 4];
        if path.iter().any(|i| !generator.eligibility().instruction(i)) {
            return Outcome::Skipped(2);
        }
        match explain::reason(case, &self.host_after, &self.guest_after, &different, &path) {
            Some(reason) => Outcome::Explained(reason),
            None => self.second_opinion(case, &path),
        }
    }

    /// What a second run says: the kernel's switch to another process loses the selectors of the x87 pointers,
    /// which FNSAVE can then tell.
    fn second_opinion(&mut self, case: &Case, path: &[Instruction]) -> Outcome {
        self.prepare(case);
        let ended = self.guest.run(case, &mut self.guest_after);
        self.native.run(case, &mut self.host_after);
        let different = self.different_bytes();
        let agrees = different.is_empty() && compare::agree(case, &self.host_after, &self.guest_after);
        self.holds = [None; 4];
        if ended != Ended::Trap {
            return Outcome::Differ;
        }
        if agrees {
            return Outcome::Skipped(4);
        }
        match explain::reason(case, &self.host_after, &self.guest_after, &different, path) {
            Some(reason) => Outcome::Explained(reason),
            None => Outcome::Differ,
        }
    }

    fn different_bytes(&self) -> Vec<explain::Byte> {
        let mut bytes = Vec::new();
        for offset in WRITABLE {
            let (host, guest) = (self.native.page(offset), self.guest.page(offset));
            let different = (0..PAGE).filter(|i| host[*i] != guest[*i]);
            bytes.extend(different.map(|at| (BASE + (offset + at) as u64, host[at], guest[at])));
        }
        bytes
    }

    /// The instructions that a case executes; the guest's state is lost. They are decoded anew, because a jump
    /// can lead into the middle of one.
    fn path(&mut self, case: &Case, generator: &Generator) -> Vec<Instruction> {
        let trace = self.guest.trace(case, guest::BUDGET as usize);
        let mut code = vec![0; CODE_LEN];
        code[..PAGE].copy_from_slice(self.native.page(CODE));
        code[PAGE..].copy_from_slice(self.native.page(CODE + PAGE));
        let decode = |(linear, bits): (u64, u32)| {
            let offset = usize::try_from(linear.checked_sub(BASE + CODE as u64)?).ok()?;
            let mode = match bits {
                64 => Mode::Long,
                32 => Mode::Protected32,
                _ => Mode::Protected16,
            };
            let options = generator.eligibility().decoder_options;
            Some(encode::decode(code.get(offset..)?, mode, linear, options).0)
        };
        trace.into_iter().filter_map(decode).collect()
    }

    /// What differs after the last run of `case`.
    fn explain(&mut self, case: &Case, generator: &Generator) -> String {
        self.run(case, generator);
        self.prepare(case);
        // Run once more: the trace for the explanation has used the guest's state up.
        self.guest.run(case, &mut self.guest_after);
        self.native.run(case, &mut self.host_after);
        let mut text = compare::describe(case, &self.host_after, &self.guest_after);
        for (address, host, guest) in self.different_bytes().into_iter().take(16) {
            let _ = writeln!(text, "  [{address:#x}] host {host:#04x}  guest {guest:#04x}");
        }
        self.holds = [None; 4];
        text
    }

    /// The shortest version of a differing case that still differs: without the instructions that do not matter.
    fn minimise(&mut self, case: &Case, generator: &Generator) -> Case {
        let mut best = case.clone();
        loop {
            let pieces = pieces(&best, generator);
            let shorter = pieces.iter().filter_map(|(from, to)| {
                let mut shorter = best.clone();
                shorter.code.drain(*from..*to);
                (!shorter.code.is_empty()).then_some(shorter)
            });
            let acceptable = shorter.filter(|s| generator.acceptable(&s.code, s.mode, s.start()));
            let candidates: Vec<Case> = acceptable.collect();
            let found = candidates.into_iter().find(|c| self.run(c, generator) == Outcome::Differ);
            match found {
                Some(found) => best = found,
                None => return best,
            }
        }
    }

    /// A report about a differing case, which is minimised first.
    pub fn report(&mut self, case: &Case, name: &str, generator: &Generator) -> String {
        let small = self.minimise(case, generator);
        let mut text = format!("difference in {name}, {}-bit\n", case.mode.bits());
        text += &listing(&small, generator);
        text += &self.explain(&small, generator);
        if small.code == case.code && self.run(case, generator) != Outcome::Differ {
            text += "  it did not differ again\n";
        }
        text
    }
}

/// Byte ranges of the instructions of a case.
fn pieces(case: &Case, generator: &Generator) -> Vec<(usize, usize)> {
    let mut at = 0;
    let mut pieces = Vec::new();
    while at < case.code.len() {
        let options = generator.eligibility().decoder_options;
        let (instruction, _) = encode::decode(&case.code[at..], case.mode, case.start(), options);
        let end = (at + instruction.len().max(1)).min(case.code.len());
        pieces.push((at, end));
        at = end;
    }
    pieces
}

/// Bytes and disassembly.
fn listing(case: &Case, generator: &Generator) -> String {
    let mut text = String::new();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x} ")).collect::<String>();
    let mut formatter = IntelFormatter::new();
    for (from, to) in pieces(case, generator) {
        let rip = case.start().wrapping_add(from as u64);
        let options = generator.eligibility().decoder_options;
        let (instruction, _) = encode::decode(&case.code[from..], case.mode, rip, options);
        let mut assembly = String::new();
        formatter.format(&instruction, &mut assembly);
        let _ = writeln!(text, "  {rip:#x}: {:<40} {assembly}", hex(&case.code[from..to]));
    }
    let _ = writeln!(text, "  corpus line: {} {}", case.mode.bits(), hex(&case.code));
    let gpr: Vec<String> = case.gpr.iter().take(case.mode.registers()).map(|g| format!("{g:x}")).collect();
    let _ = writeln!(text, "  registers {}", gpr.join(" "));
    let _ = writeln!(text, "  selectors {:x?} fs {:#x} gs {:#x}", case.selectors, case.fs_base, case.gs_base);
    text
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of all cases.
    pub seed: u64,
    /// Cases have the indices below this.
    pub cases: u64,
    /// Modes.
    pub modes: Modes,
    /// Child processes.
    pub jobs: usize,
    /// Differences after which a child stops.
    pub max_differences: u64,
}

fn mode_name(modes: Modes) -> &'static str {
    match modes {
        Modes::All => "all",
        Modes::One(Mode::Long) => "64",
        Modes::One(Mode::Protected32) => "32",
        Modes::One(Mode::Protected16) => "16",
    }
}

/// How to make one case again.
fn name(plan: &Plan, index: u64) -> String {
    format!("case {index} (--seed {:#x} --mode {} --only {index})", plan.seed, mode_name(plan.modes))
}

/// Runs one case by itself and prints what differs. True if both sides agree.
pub fn only(plan: &Plan, index: u64) -> anyhow::Result<bool> {
    let (mut bench, mut generator) = Bench::new()?;
    let case = generator.case(plan.seed, index, plan.modes);
    print!("{}", listing(&case, &generator));
    let outcome = bench.run(&case, &generator);
    println!("{outcome:?}");
    println!("host {:x?}, guest {:x?}", bench.host_after.trap, bench.guest_after.trap);
    if outcome == Outcome::Differ {
        println!("{}", bench.report(&case, &name(plan, index), &generator));
    }
    Ok(outcome != Outcome::Differ)
}

/// The loop of child `slot`: cases `first`, `first + jobs` and so on.
pub fn child(plan: &Plan, first: u64, slot: usize, progress: &Progress) -> anyhow::Result<()> {
    let (mut bench, mut generator) = Bench::new()?;
    let mut differences = 0;
    let mut index = first;
    while index < plan.cases {
        progress.current[slot].store(index + 1, Relaxed);
        let case = generator.case(plan.seed, index, plan.modes);
        let outcome = bench.run(&case, &generator);
        count(progress, &bench, &case, &generator, outcome);
        if outcome == Outcome::Differ {
            println!("{}", bench.report(&case, &name(plan, index), &generator));
            differences += 1;
            if differences >= plan.max_differences {
                break;
            }
        }
        index += plan.jobs as u64;
    }
    Ok(())
}

fn count(progress: &Progress, bench: &Bench, case: &Case, generator: &Generator, outcome: Outcome) {
    progress.done.fetch_add(1, Relaxed);
    match outcome {
        Outcome::Differ => {
            progress.differences.fetch_add(1, Relaxed);
        }
        Outcome::Skipped(why) => {
            progress.skipped[why].fetch_add(1, Relaxed);
            return;
        }
        Outcome::Explained(reason) => {
            progress.explained[reason].fetch_add(1, Relaxed);
        }
        Outcome::Agree => {}
    }
    let options = generator.eligibility().decoder_options;
    let (instruction, _) = encode::decode(&case.code, case.mode, case.start(), options);
    progress.categories[eligible::category(&instruction)].fetch_add(1, Relaxed);
    let after = &bench.host_after;
    progress.vectors[(after.trap.vector & 31) as usize].fetch_add(1, Relaxed);
    if after.rip != case.start() {
        let mode = match case.mode {
            Mode::Long => 0,
            Mode::Protected32 => 1,
            Mode::Protected16 => 2,
        };
        progress.covered[mode][instruction.code() as usize & 8191].store(1, Relaxed);
    }
}

struct Job {
    child: Child,
    seen: u64,
    since: Instant,
}

fn spawn(plan: &Plan, first: u64, slot: usize, progress: &SharedProgress) -> anyhow::Result<Job> {
    let child = Command::new(std::env::current_exe()?)
        .args(["--seed", &plan.seed.to_string(), "--cases", &plan.cases.to_string()])
        .args(["--mode", mode_name(plan.modes), "--jobs", &plan.jobs.to_string()])
        .args(["--max-differences", &plan.max_differences.to_string()])
        .args(["--child", &format!("{first},{slot},{}", progress.fd())])
        .spawn()
        .context("starting a child process")?;
    Ok(Job { child, seen: 0, since: Instant::now() })
}

/// Runs a plan in child processes and prints what they found. The number of differences, crashes included.
pub fn parent(plan: &Plan) -> anyhow::Result<u64> {
    anyhow::ensure!((1..=MAX_JOBS).contains(&plan.jobs), "--jobs must be 1 to {MAX_JOBS}");
    let progress = SharedProgress::create()?;
    let begin = Instant::now();
    println!("seed {:#x}, {} cases, mode {}", plan.seed, plan.cases, mode_name(plan.modes));
    let mut jobs: Vec<Option<Job>> = Vec::new();
    for slot in 0..plan.jobs {
        jobs.push(Some(spawn(plan, slot as u64, slot, &progress)?));
    }
    let mut crashes = 0;
    let mut tick = 0u32;
    while jobs.iter().any(Option::is_some) {
        std::thread::sleep(Duration::from_millis(if begin.elapsed().as_millis() < 500 { 5 } else { 50 }));
        tick += 1;
        for (slot, job) in jobs.iter_mut().enumerate() {
            let Some(running) = job else { continue };
            let Some(crashed) = watch(plan, running, slot, &progress)? else { continue };
            let next = crashed.map(|index| index + plan.jobs as u64);
            crashes += u64::from(crashed.is_some());
            let again = next.filter(|n| *n < plan.cases && crashes < plan.max_differences);
            *job = again.map(|n| spawn(plan, n, slot, &progress)).transpose()?;
        }
        if tick.is_multiple_of(200) {
            let done = progress.done.load(Relaxed);
            eprintln!("{done} cases, {:.0} per second", done as f64 / begin.elapsed().as_secs_f64());
        }
    }
    summary(&progress, begin.elapsed(), plan)?;
    Ok(progress.differences.load(Relaxed) + crashes)
}

/// `None` while the child runs; then the case in which it crashed or stood still, if it did.
fn watch(
    plan: &Plan,
    job: &mut Job,
    slot: usize,
    progress: &Progress,
) -> anyhow::Result<Option<Option<u64>>> {
    let current = progress.current[slot].load(Relaxed);
    if current != job.seen {
        (job.seen, job.since) = (current, Instant::now());
    }
    let stuck = job.since.elapsed() > PATIENCE;
    if stuck {
        job.child.kill()?;
    }
    let status = if stuck { Some(job.child.wait()?) } else { job.child.try_wait()? };
    match status {
        None => Ok(None),
        Some(status) if status.success() => Ok(Some(None)),
        Some(_) if current == 0 => anyhow::bail!("a child process could not start; see above"),
        Some(status) => {
            let how = if stuck { "did not end".to_owned() } else { format!("ended the process: {status}") };
            println!("{} {how}", name(plan, current - 1));
            Ok(Some(Some(current - 1)))
        }
    }
}

fn summary(progress: &Progress, took: Duration, plan: &Plan) -> anyhow::Result<()> {
    let done = progress.done.load(Relaxed);
    let rate = done as f64 / took.as_secs_f64().max(1e-9);
    println!("{done} cases in {:.1} s: {rate:.0} per second", took.as_secs_f64());
    let list = |names: &[&str], counters: &[std::sync::atomic::AtomicU64]| {
        let one = |(n, c): (&&str, &std::sync::atomic::AtomicU64)| format!("{n} {}", c.load(Relaxed));
        names.iter().zip(counters).map(one).collect::<Vec<_>>().join(", ")
    };
    println!("first instruction: {}", list(&eligible::CATEGORIES, &progress.categories));
    const VECTORS: [&str; 20] = [
        "#DE", "#DB", "2", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF",
        "15", "#MF", "#AC", "#MC", "#XM",
    ];
    println!("ended by: {}", list(&VECTORS, &progress.vectors));
    println!("not compared: {}", list(&crate::progress::SKIPPED, &progress.skipped));
    for (reason, count) in explain::REASONS.iter().zip(&progress.explained) {
        println!("explained: {} by {reason}", count.load(Relaxed));
    }
    let generator = Generator::new(Eligibility::of(&guest::model()?));
    for (i, mode) in [Mode::Long, Mode::Protected32, Mode::Protected16].into_iter().enumerate() {
        if plan.modes != Modes::All && plan.modes != Modes::One(mode) {
            continue;
        }
        let all: Vec<_> = generator.codes(mode).collect();
        let covered =
            all.iter().filter(|c| progress.covered[i][**c as usize & 8191].load(Relaxed) != 0).count();
        println!("{}-bit: {covered} of {} encodings completed", mode.bits(), all.len());
    }
    println!("differences: {}", progress.differences.load(Relaxed));
    Ok(())
}

/// Replays a corpus, each line with `states` states. Reports of the lines that differ.
pub fn replay(text: &str, states: u64) -> anyhow::Result<Vec<String>> {
    let (mut bench, mut generator) = Bench::new()?;
    let mut reports = Vec::new();
    for (line, (mode, code)) in crate::corpus::parse(text).map_err(anyhow::Error::msg)?.iter().enumerate() {
        for state in 0..states {
            let case = generator.case_with_code(state << 32 | line as u64, *mode, code);
            if bench.run(&case, &generator) == Outcome::Differ {
                reports.push(bench.report(&case, &format!("corpus case {line}, state {state}"), &generator));
                break;
            }
        }
    }
    Ok(reports)
}

const _: () = assert!(layout::WINDOW == 0x1_0000);
