//! A Linux that writes more than its host has room for: it must not notice, except that time stood still.
//!
//! The image is on a small file system of its own, in a mount namespace of its own, which needs root.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use atoll_api_types::{Accelerator, DiskSpec, VmSpec};
use atoll_vmm::{RunEnd, Vm, VmEvent, VmOutputs};
use support::linux;

const PATIENCE: Duration = Duration::from_secs(300);
const INSIDE: &str = "ATOLL_TEST_INSIDE_NAMESPACE";
const NAME: &str = "a_guest_waits_while_its_host_has_no_space_and_goes_on_by_itself";

/// PID 1: writes 12 MiB, flushes, reads them back, and looks for errors.
const SCRIPT: &str = r#"for try in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 0.2; done
yes "what the host has no room for" | head -c 12582912 >/tmp-data
echo WRITING
dd if=/tmp-data of=/dev/vda bs=64k conv=notrunc,fsync 2>/dev/null || echo "FAILED write"
echo 3 >/proc/sys/vm/drop_caches
[ "$(md5sum </tmp-data)" = "$(dd if=/dev/vda bs=64k count=192 2>/dev/null | md5sum)" ] || echo "FAILED content"
dmesg | grep -E 'I/O error|Buffer I/O' | sed 's/^/FAILED /'
echo WROTE
poweroff -f
"#;

fn mount(arguments: &[&str], at: &Path) {
    let status = Command::new("mount").args(arguments).arg(at).status().unwrap();
    assert!(status.success(), "mount {arguments:?}");
}

enum News {
    Line(String),
    Event(VmEvent),
    End(RunEnd),
}

fn start(spec: &VmSpec) -> (atoll_vmm::VmHandle, mpsc::Receiver<News>) {
    let (sender, news) = mpsc::channel();
    let (lines, events) = (sender.clone(), sender.clone());
    let line = Mutex::new(Vec::new());
    let outputs = VmOutputs {
        serial: Box::new(move |data| {
            let mut line = line.lock().unwrap();
            for byte in data {
                if *byte == b'\n' {
                    let whole = String::from_utf8_lossy(&std::mem::take(&mut *line)).trim().to_owned();
                    let _ = lines.send(News::Line(whole));
                } else {
                    line.push(*byte);
                }
            }
        }),
        virtio: Box::new(|_| {}),
        rebooted: Box::new(|| {}),
        event: Box::new(move |event| drop(events.send(News::Event(event)))),
        ended: Box::new(move |end| drop(sender.send(News::End(end)))),
    };
    (Vm::prepare(spec).unwrap().start(outputs).unwrap(), news)
}

#[test]
#[ignore = "boots a distribution's kernel: a minute on a busy machine; in the long lane"]
fn a_guest_waits_while_its_host_has_no_space_and_goes_on_by_itself() {
    if std::env::var_os(INSIDE).is_none() {
        let program = std::env::current_exe().unwrap();
        let unshare = |what: &Path, arguments: &[&str]| {
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private"]).arg(what).args(arguments).env(INSIDE, "1");
            command.status()
        };
        if !unshare(Path::new("true"), &[]).is_ok_and(|status| status.success()) {
            println!("skipped: a mount namespace needs root and unshare(1)");
            return;
        }
        assert!(unshare(&program, &["--ignored", "--exact", NAME, "--nocapture"]).unwrap().success());
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(mut spec) = linux(directory.path(), SCRIPT, "") else { return };
    let small = directory.path().join("small");
    std::fs::create_dir(&small).unwrap();
    mount(&["-t", "tmpfs", "-o", "size=6m", "tmpfs"], &small);
    let image = small.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();

    spec.accel = Accelerator::Auto;
    spec.disks = vec![DiskSpec { path: image.clone(), ..DiskSpec::default() }];
    let (handle, news) = start(&spec);
    let (mut troubles, mut mended, mut wrote) = (0, 0, false);
    loop {
        match news.recv_timeout(PATIENCE).expect("the machine says something") {
            News::Line(line) => {
                assert!(!line.contains("FAILED"), "{line}");
                wrote |= line == "WROTE";
            }
            News::Event(VmEvent::DiskTrouble { disk, why }) => {
                assert_eq!(disk, image.display().to_string());
                assert!(why.contains("no space left"), "{why}");
                troubles += 1;
                if troubles == 1 {
                    // Nothing happens while the host stays as it is, retries included.
                    assert!(news.recv_timeout(Duration::from_millis(2500)).is_err());
                    // The saved state has the request; whoever restores it is in the same trouble.
                    handle.rebuild().unwrap();
                } else {
                    mount(&["-o", "remount,size=32m"], &small);
                    let begun = Instant::now();
                    assert!(matches!(news.recv_timeout(PATIENCE), Ok(News::Event(VmEvent::DisksMended))));
                    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
                    mended += 1;
                }
            }
            News::Event(event) => println!("{event}"),
            News::End(end) => {
                assert_eq!(end, RunEnd::PoweredOff);
                break;
            }
        }
    }
    assert!(wrote && troubles == 2 && mended == 1, "{wrote} {troubles} {mended}");
}
