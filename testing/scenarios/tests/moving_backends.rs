//! A running Linux that moves between KVM and the software CPU and back, in the middle of its boot and of its work:
//! the same machine, the same devices, the same saved state. What one backend leaves out of the state or reads
//! otherwise, the guest would notice: it computes checksums, watches that no clock goes backwards or stands still,
//! and writes and reads a disk.
//!
//! Needs `/dev/kvm` with a processor that virtualizes: `cargo xtask lab --long moves`.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_api_types::{Accelerator, VmSpec};
use atoll_storage::{Disk, OpenOptions, RawDisk};
use atoll_vmm::{BackendKind, HostFacts, RunEnd};
use support::{Running, linux};

/// A guest says something at least this often, on a busy host too.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a guest stays on the software CPU if it does not finish a round there.
const A_WHILE: Duration = Duration::from_secs(20);

/// PID 1. Each round: a checksum of known data, a block through the disk, time that has passed by a plausible amount
/// on both the monotonic and the real-time clock, a sleep that is neither short nor endless. Every processor works.
const SCRIPT: &str = r#"for try in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 0.2; done
echo "CPUS $(grep -c ^processor /proc/cpuinfo)"
echo "CLOCK $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
up() { read -r up rest </proc/uptime; echo "${up%.*}${up#*.}"; }
worker() { i=0; while :; do i=$(( (i * 75 + 74) % 65537 )); done; }
worker & worker &
n=0 last=$(up) wall=$(date +%s)
while [ $n -lt $rounds ]; do
  sum=$(yes "round" | head -c 200000 | md5sum)
  [ "$sum" = "$(yes "round" | head -c 200000 | md5sum)" ] || echo "FAILED checksum $n"
  yes "block $n" | head -c 65536 >/tmp-data
  want=$(md5sum </tmp-data)
  dd if=/tmp-data of=/dev/vda bs=64k seek=$(( n % 64 )) conv=notrunc,fsync 2>/dev/null || echo "FAILED write $n"
  echo 3 >/proc/sys/vm/drop_caches
  got=$(dd if=/dev/vda bs=64k skip=$(( n % 64 )) count=1 2>/dev/null | md5sum)
  [ "$want" = "$got" ] || echo "FAILED block $n"
  sleep 0.1
  now=$(up) date=$(date +%s)
  [ $now -ge $(( last + 10 )) ] || echo "FAILED uptime went from $last to $now"
  [ $now -lt $(( last + 12000 )) ] || echo "FAILED uptime jumped from $last to $now"
  [ $date -ge $wall ] || echo "FAILED the date went from $wall to $date"
  last=$now wall=$date n=$(( n + 1 ))
  echo "OK $n"
done
dmesg | grep -E 'BUG:|WARNING: CPU|soft lockup|stall|Marking TSC|Marking clock|I/O error|timed out' | sed 's/^/FAILED /'
echo "DONE $n"
poweroff -f
"#;

/// The kernel, the script as an initial root file system and a disk, or `None` where the distribution's kernels
/// cannot be had.
fn guest(directory: &Path, cpus: u32, rounds: u32) -> Option<(VmSpec, Arc<dyn Disk>)> {
    let mut spec = linux(directory, SCRIPT, &format!("rounds={rounds}"))?;
    let image = directory.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RawDisk::open(&image, OpenOptions { read_only: false }).unwrap());
    spec.cpus.cores = cpus;
    spec.accel = Accelerator::Kvm;
    Some((spec, disk))
}

/// Whether a processor that virtualizes is behind `/dev/kvm`: elsewhere an unmodified Linux does not run on it.
fn has_virtualization() -> bool {
    let host = HostFacts::gather();
    host.virtualization.is_some() && host.kvm.is_usable()
}

/// Boots on KVM, moves the machine to the other backend and back `moves` times in all, then lets it end after its
/// `rounds`.
fn move_back_and_forth(cpus: u32, moves: u32, rounds: u32) {
    if !has_virtualization() {
        println!("skipped: no processor that virtualizes behind /dev/kvm; see cargo xtask lab");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some((spec, disk)) = guest(directory.path(), cpus, rounds) else { return };
    let running = Running::start(&spec, vec![disk]);
    let (mut done, mut on, mut seen) = (0, BackendKind::Kvm, Vec::<String>::new());
    let started = Instant::now();
    let (mut last_line, mut last_move, mut rounds_at_move) = (Instant::now(), Instant::now(), 0);
    loop {
        match running.lines.next(Duration::from_millis(100)) {
            Some(line) => {
                println!("{:7.1} s, {done} moves, on {on:?}: {line}", started.elapsed().as_secs_f64());
                assert!(!line.contains("FAILED"), "after {done} moves the guest says: {line}");
                last_line = Instant::now();
                let over = line.starts_with("DONE");
                seen.push(line);
                if over {
                    break;
                }
            }
            None => assert!(last_line.elapsed() < PATIENCE, "silent after {done} moves; said {seen:?}"),
        }
        // The first moves hit the boot, the others the work. On the software CPU the guest is slower.
        let rounds = seen.iter().filter(|l| l.starts_with("OK")).count();
        let is_time = match on {
            _ if done < moves / 2 => last_move.elapsed() > Duration::from_millis(700),
            BackendKind::Kvm => rounds >= rounds_at_move + 3,
            BackendKind::Software => rounds > rounds_at_move || last_move.elapsed() > A_WHILE,
        };
        if done < moves && is_time {
            on = if on == BackendKind::Kvm { BackendKind::Software } else { BackendKind::Kvm };
            let before = Instant::now();
            let size = running.handle.rebuild_on(on).unwrap();
            done += 1;
            let millis = before.elapsed().as_secs_f64() * 1e3;
            println!("moves: {done} to {on:?}, {size} bytes of state in {millis:.0} ms");
            assert!(size > 4000, "{size} bytes cannot be a whole machine");
            (last_move, rounds_at_move) = (Instant::now(), rounds);
        }
    }
    assert_eq!(running.end(PATIENCE), Some(RunEnd::PoweredOff));
    println!("moves: {done} with {cpus} vCPU in {:.0} s", started.elapsed().as_secs_f64());
    assert_eq!(done, moves, "the guest was done before all moves were");
    for line in [format!("CPUS {cpus}"), format!("DONE {rounds}")] {
        assert!(seen.contains(&line), "no '{line}' in {seen:?}");
    }
}

#[test]
#[ignore = "long: a whole boot, where the processor virtualizes (cargo xtask lab --long)"]
fn linux_with_one_vcpu_moves_between_kvm_and_the_software_cpu() {
    move_back_and_forth(1, 10, 30);
}

#[test]
#[ignore = "long: a whole boot, where the processor virtualizes (cargo xtask lab --long)"]
fn linux_with_two_vcpus_moves_between_kvm_and_the_software_cpu() {
    move_back_and_forth(2, 10, 30);
}
