//! A running Linux whose machine is saved, taken apart and rebuilt from the saved state several times a second,
//! all through its boot and while two processors compute, sleep and use a disk. What the saved state lacks, the
//! guest would notice.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_storage::{Disk, OpenOptions, RawDisk};
use atoll_vmm::RunEnd;
use support::{Running, linux};

/// A guest says something at least this often, on a busy host too.
const PATIENCE: Duration = Duration::from_secs(300);

/// PID 1: a checksum of what the disk gives back, timers, and work on every processor; then the kernel's warnings,
/// but for its advice about flaws that the host's processor has.
const SCRIPT: &str = r#"for try in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 0.2; done
echo "CPUS $(grep -c ^processor /proc/cpuinfo)"
spin() { i=0; while [ $i -lt 3000 ]; do i=$(( i + 1 )); done; echo "SPUN $1 $i"; }
spin a & spin b &
n=0
while [ $n -lt 20 ]; do
  yes "block $n" | head -c 65536 >/tmp-data
  want=$(md5sum </tmp-data)
  dd if=/tmp-data of=/dev/vda bs=64k seek=$n conv=notrunc,fsync 2>/dev/null || echo "FAILED write $n"
  echo 3 >/proc/sys/vm/drop_caches
  got=$(dd if=/dev/vda bs=64k skip=$n count=1 2>/dev/null | md5sum)
  [ "$want" = "$got" ] || echo "FAILED block $n"
  head -c 64 /dev/hwrng >/dev/null || echo "FAILED hwrng"
  sleep 0.05
  n=$(( n + 1 ))
done
wait
dmesg | grep -E 'BUG|WARN|soft lockup|stall|nstable|I/O error|timed out' | grep -v -E 'admin-guide/hw-vuln@EXCUSED@' | sed 's/^/FAILED /'
echo "WROTE $n"
poweroff -f
"#;

/// On KVM the paravirtual clock is without its master clock from a rebuild until every vCPU has run again. A kernel
/// that begins just then calls its clock unstable and takes a slower way to read it; nothing else follows.
const EXCUSED_ON_KVM: &str = "|Unstable clock detected";

#[test]
#[ignore = "boots a distribution's kernel: minutes on a busy machine; in the long lane"]
fn linux_does_not_notice_that_its_machine_is_rebuilt_several_times_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let on_kvm = std::env::var("ATOLL_TEST_ACCEL").is_ok_and(|accel| accel == "kvm");
    let script = SCRIPT.replace("@EXCUSED@", if on_kvm { EXCUSED_ON_KVM } else { "" });
    let Some(mut spec) = linux(directory.path(), &script, "") else { return };
    let image = directory.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RawDisk::open(&image, OpenOptions { read_only: false }).unwrap());
    spec.cpus.cores = 2;
    let running = Running::start(&spec, vec![disk]);

    let (mut rebuilds, mut seen) = (0u32, Vec::new());
    let mut last_line = Instant::now();
    loop {
        match running.lines.next(Duration::from_millis(150)) {
            Some(line) => {
                assert!(!line.contains("FAILED"), "after {rebuilds} rebuilds the guest says: {line}");
                last_line = Instant::now();
                let done = line.starts_with("WROTE");
                seen.push(line);
                if done {
                    break;
                }
            }
            None => {
                assert!(last_line.elapsed() < PATIENCE, "silent after {rebuilds} rebuilds; said {seen:?}");
            }
        }
        let size = running.handle.rebuild().unwrap();
        assert!(size > 4000, "{size} bytes cannot be a whole machine");
        rebuilds += 1;
    }
    assert_eq!(running.end(PATIENCE), Some(RunEnd::PoweredOff));
    println!("{rebuilds} rebuilds");
    for line in ["CPUS 2", "SPUN a 3000", "SPUN b 3000", "WROTE 20"] {
        assert!(seen.iter().any(|l| l == line), "no '{line}' in {seen:?}");
    }
    assert!(rebuilds > 20, "only {rebuilds} rebuilds");
}
