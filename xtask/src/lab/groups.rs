//! The groups: what each boot of the lab shows.

use anyhow::Result;
use atoll_guests::GuestKernel::{Cloud61, Cloud612, Generic61, Generic612, Rt61, Rt612};

use super::host::Boot;
use super::stock::{CACHE, HAMMER, Stock, TestProgram, XTASK, build_tests};

/// Tests that share one boot.
pub(super) struct Group {
    pub(super) name: &'static str,
    /// Only in the long lane (which has only these: the short lane runs before it).
    pub(super) long: bool,
    pub(super) boot: fn(&Stock) -> Result<Boot>,
}

/// All of them, in the order in which they run.
pub(super) fn all() -> Vec<Group> {
    let group = |name, long, boot| Group { name, long, boot };
    vec![
        group("backend", false, backend),
        group("hammer-minute", false, hammer_briefly),
        group("guests", false, guests),
        group("hostile", true, hostile),
        group("kernels", true, kernels),
        group("debian", true, debian),
        group("hammer", true, hammer),
        group("moves", true, moves),
    ]
}

/// For messages.
pub(super) fn names() -> String {
    let list = all();
    let name = |long| list.iter().filter(|g| g.long == long).map(|g| g.name).collect::<Vec<_>>().join(", ");
    format!("{}; with --long: {}", name(false), name(true))
}

/// Every boot's beginning.
const PREPARE: &str = "mkdir -p /dev/pts; mount -t devpts devpts /dev/pts; failed=0\n";

/// A boot with `files` whose script runs `lines` and fails when one of them does. On one processor: with two, a vCPU
/// of QEMU's emulated SVM sees page tables as not present at times that are right in memory (the lab's README).
fn boot(stock: &Stock, patience: u64, files: Vec<(std::path::PathBuf, String)>, lines: &[String]) -> Boot {
    let mut script = format!(
        "export XDG_CACHE_HOME={CACHE} CARGO_TARGET_DIR=/tmp/target RUST_BACKTRACE=1 ATOLL_TEST_ACCEL={}\n",
        stock.accel
    );
    script += PREPARE;
    for line in lines {
        script += &format!("echo 'lab$ {line}'; {line} || failed=1\n");
    }
    script += "for log in /tmp/target/boot/*.log; do [ $failed = 1 ] && [ -f $log ] && echo \"--- $log\" && busybox \
               tail -n 40 $log; done\nexit $failed";
    Boot {
        memory: 4096,
        cpus: 1,
        patience,
        files,
        kernel: stock.lab_kernel.clone(),
        disk: None,
        script,
        at_least: 1,
    }
}

/// A command that is killed after so many seconds.
fn within(seconds: u64, command: &str) -> String {
    format!("busybox timeout -s KILL {seconds} {command}")
}

fn files_of(tests: &[TestProgram]) -> Vec<(std::path::PathBuf, String)> {
    tests.iter().map(|t| (t.path.clone(), t.inside())).collect()
}

/// A boot in which the hammer runs for so long.
fn hammering(stock: &Stock, seconds: u64) -> Result<Boot> {
    let line = within(seconds + 120, &format!("{HAMMER} --accel {} --seconds {seconds}", stock.accel));
    Ok(boot(stock, seconds + 300, vec![stock.hammer()?], &[line]))
}

/// The backend's own tests with the conformance suite.
fn backend(stock: &Stock) -> Result<Boot> {
    let tests = build_tests(&["atoll-kvm"])?;
    let line = |t: &TestProgram| within(900, &format!("{} --test-threads=1 --show-output", t.inside()));
    let lines: Vec<String> = tests.iter().map(line).collect();
    Ok(Boot { at_least: 2, ..boot(stock, 1500, files_of(&tests), &lines) })
}

/// Runs scenarios of `xtask boot` inside.
fn scenarios(stock: &Stock, seconds: u64, names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|n| format!("\"{n}\"")).collect();
    let accel = &stock.accel;
    let names = names.join(" ");
    within(seconds, &format!("{XTASK} boot --inside --accel {accel} --patience 300 --long {names}"))
}

/// Whole guests: the two kernels for virtual machines with one and two vCPUs, a session with a disk, reboot in place
/// and power-off, a panic; and the size of a machine's process.
fn guests(stock: &Stock) -> Result<Boot> {
    let names = ["shell", "terminal", "panic", "memory", "kernel 6.1-cloud", "kernel 6.12-cloud"];
    let lines = [scenarios(stock, 1500, &names)];
    Ok(Boot { at_least: 8, ..boot(stock, 1600, stock.guests(&[Cloud61, Cloud612])?, &lines) })
}

/// The kernels for physical machines and those with real-time preemption.
fn kernels(stock: &Stock) -> Result<Boot> {
    let lines = [scenarios(stock, 3000, &["generic", "kernel 6.1-rt", "kernel 6.12-rt"])];
    Ok(Boot {
        at_least: 8,
        ..boot(stock, 3100, stock.guests(&[Generic61, Rt61, Generic612, Rt612])?, &lines)
    })
}

/// A whole Debian on a disk.
fn debian(stock: &Stock) -> Result<Boot> {
    let lines = [scenarios(stock, 3000, &["Debian"])];
    Ok(Boot { disk: Some(stock.debian()?), ..boot(stock, 3100, stock.guests(&[Cloud61])?, &lines) })
}

/// A minute of random exits.
fn hammer_briefly(stock: &Stock) -> Result<Boot> {
    hammering(stock, 60)
}

/// Ten minutes of random exits.
fn hammer(stock: &Stock) -> Result<Boot> {
    hammering(stock, 600)
}

/// Guests that write garbage everywhere, as on the software CPU.
fn hostile(stock: &Stock) -> Result<Boot> {
    let tests = stock.scenarios(&["hostile"])?;
    let line = |t: &TestProgram| within(1200, &format!("{} --test-threads=1 --show-output", t.inside()));
    let lines: Vec<String> = tests.iter().map(line).collect();
    Ok(boot(stock, 1300, files_of(&tests), &lines))
}

/// A running Linux that moves between KVM and the software CPU, and one that is saved and rebuilt on KVM.
fn moves(stock: &Stock) -> Result<Boot> {
    let tests = stock.scenarios(&["moving_backends", "rebuild_linux"])?;
    let mut files = files_of(&tests);
    files.push(stock.cache(&[])?);
    let line = |t: &TestProgram| {
        within(1800, &format!("{} --include-ignored --show-output --test-threads=1", t.inside()))
    };
    let lines: Vec<String> = tests.iter().map(line).collect();
    Ok(Boot { at_least: 3, ..boot(stock, 3900, files, &lines) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_names_are_unique_and_both_lanes_have_some() {
        let mut names: Vec<&str> = all().iter().map(|g| g.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(all().iter().any(|g| g.long) && all().iter().any(|g| !g.long));
    }
}
