//! What the program says to nonsense: exit code 2, one line on standard error that names the thing, nothing on
//! standard output, nothing written.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use atoll_scenarios::console::Machine;
use atoll_scenarios::payload;

const ATOLL: &str = env!("CARGO_BIN_EXE_atoll");

struct Table {
    directory: tempfile::TempDir,
    kernel: PathBuf,
}

impl Table {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        fs::write(&kernel, payload::debug_exit(16)).unwrap();
        Self { directory, kernel }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.path(name), content).unwrap();
        self.path(name).display().to_string()
    }

    fn sparse(&self, name: &str, len: u64) -> String {
        fs::File::create(self.path(name)).unwrap().set_len(len).unwrap();
        self.path(name).display().to_string()
    }

    fn listing(&self) -> Vec<(PathBuf, u64)> {
        let entry = |e: fs::DirEntry| (e.path(), e.metadata().unwrap().len());
        let mut list: Vec<_> =
            fs::read_dir(self.directory.path()).unwrap().map(|e| entry(e.unwrap())).collect();
        list.sort();
        list
    }

    /// `atoll run` with a good kernel and `words`, which must be refused with a line that has each of `named`.
    fn refused(&self, words: &[&str], named: &[&str]) {
        let kernel = self.kernel.display().to_string();
        let all: Vec<&str> = ["--kernel", &kernel].into_iter().chain(words.iter().copied()).collect();
        self.refused_exactly(&all, named);
    }

    fn refused_exactly(&self, words: &[&str], named: &[&str]) {
        let before = self.listing();
        let mut command = Command::new(ATOLL);
        command.args(["run", "--debug-exit"]).args(words).stdin(Stdio::null());
        check(&command.output().unwrap(), words, named);
        assert_eq!(self.listing(), before, "{words:?} left something behind");
    }
}

fn check(output: &Output, words: &[&str], named: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{words:?}: expected one line, got {said}");
    for name in named {
        assert!(said.contains(name), "{words:?}: {name:?} is not in {said:?}");
    }
    assert!(output.stdout.is_empty(), "{words:?}: something on standard output");
}

#[test]
fn the_good_command_runs() {
    let table = Table::new();
    let mut command = Command::new(ATOLL);
    command.args(["run", "--debug-exit", "--kernel"]).arg(&table.kernel).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(33), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn kernels_that_are_none_are_refused_by_name() {
    let table = Table::new();
    let absent = table.path("absent").display().to_string();
    let directory = table.directory.path().display().to_string();
    let text = table.file("text", &b"just words\n".repeat(100));
    let empty = table.file("empty", b"");
    let mut truncated = payload::debug_exit(16);
    truncated.truncate(30);
    let truncated = table.file("truncated", &truncated);
    for kernel in [&absent, &directory, &text, &empty, &truncated] {
        table.refused_exactly(&["--kernel", kernel], &[kernel]);
    }
    table.refused_exactly(&["--kernel", "/dev/null"], &["/dev/null"]);
}

#[test]
fn files_that_do_not_fit_into_memory_are_refused() {
    let table = Table::new();
    let absent = table.path("absent").display().to_string();
    table.refused(&["--initrd", &absent], &[&absent]);
    let large = table.sparse("initrd", 20 << 20);
    table.refused(&["--initrd", &large, "--memory", "16M"], &["memory"]);
    // A kernel of 20 MB on a machine of 16 MiB: five bytes that are code, and a long tail.
    let mut code = vec![0xb0, 16, 0xe6, 0xf4, 0xf4];
    code.resize(20 << 20, 0);
    let kernel = table.file("large-kernel", &payload::kernel(&code));
    table.refused_exactly(&["--kernel", &kernel, "--memory", "16M"], &[&kernel, "memory"]);
    let huge = table.sparse("huge-kernel", 1 << 30);
    table.refused_exactly(&["--kernel", &huge], &[&huge]);
}

#[test]
fn disks_that_cannot_be_used_are_refused_by_name() {
    let table = Table::new();
    let absent = table.path("absent").display().to_string();
    let directory = table.directory.path().display().to_string();
    let empty = table.file("empty", b"");
    for disk in [&absent, &directory, &empty] {
        table.refused(&["--disk", disk], &[disk]);
        table.refused(&[disk], &[disk]);
    }
    let image = table.sparse("disk", 1 << 20);
    table.refused(&["--disk", &format!("{image},fast")], &["fast"]);
    // An image without a kernel needs firmware.
    table.refused_exactly(&[&image], &[&image, "--kernel"]);
    // The same image twice in one machine.
    table.refused(&["--disk", &image, "--disk", &image], &[&image]);
    let many: Vec<String> =
        (0..17).flat_map(|i| ["--disk".to_owned(), table.sparse(&format!("d{i}"), 4096)]).collect();
    table.refused(&many.iter().map(String::as_str).collect::<Vec<_>>(), &["17", "16"]);
}

#[test]
fn an_image_in_use_is_refused_and_one_that_is_only_read_is_shared() {
    let table = Table::new();
    let image = table.sparse("disk", 1 << 20);
    let kernel = table.file("halt", &payload::print("UP\n", &[0xf4, 0xeb, 0xfd]));
    let mut command = Command::new(ATOLL);
    command.args(["run", "--kernel", &kernel, "--disk", &image]);
    let logs = tempfile::tempdir().unwrap();
    let mut first = Machine::start(command, &logs.path().join("first")).unwrap();
    first.expect("UP", Duration::from_secs(60)).unwrap();
    table.refused(&["--disk", &image], &[&image, "in use"]);
    table.refused(&["--disk", &format!("{image},readonly")], &[&image]);
    drop(first);

    let read_only = format!("{image},readonly");
    let mut command = Command::new(ATOLL);
    command.args(["run", "--kernel", &kernel, "--disk", &read_only]);
    let mut reader = Machine::start(command, &logs.path().join("reader")).unwrap();
    reader.expect("UP", Duration::from_secs(60)).unwrap();
    let mut command = Command::new(ATOLL);
    command.args(["run", "--debug-exit", "--disk", &read_only, "--kernel"]).arg(&table.kernel);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(33), "{}", String::from_utf8_lossy(&output.stderr));
    table.refused(&["--disk", &image], &[&image]);
}

#[test]
fn what_this_user_may_not_open_is_refused() {
    let table = Table::new();
    let (image, kernel) = (table.sparse("disk", 1 << 20), table.file("secret", &payload::halt()));
    fs::set_permissions(table.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let locked = fs::Permissions::from_mode(0o000);
    for path in [&image, &kernel] {
        fs::set_permissions(Path::new(path), locked.clone()).unwrap();
    }
    let readable = table.kernel.display().to_string();
    for (words, name) in
        [(vec!["--kernel", &readable, "--disk", &image], &image), (vec!["--kernel", &kernel], &kernel)]
    {
        let output = unprivileged(&table, &words);
        check(&output, &words, &[name, "permission"]);
    }
}

/// Runs the program as a user who is not root: permissions mean nothing to root. The program is copied to where
/// that user may read it.
fn unprivileged(table: &Table, words: &[&str]) -> Output {
    use std::os::unix::fs::MetadataExt;
    let program = table.path("atoll");
    if !program.exists() {
        fs::copy(ATOLL, &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = if fs::metadata("/proc/self").unwrap().uid() == 0 {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        setpriv
    } else {
        Command::new(&program)
    };
    command.arg("run").args(words).stdin(Stdio::null()).current_dir("/").output().unwrap()
}

#[test]
fn sizes_counts_names_and_models_that_cannot_be_are_refused() {
    let table = Table::new();
    table.refused(&["--memory", "1000T"], &["memory"]);
    table.refused(&["--memory", "0"], &["memory"]);
    table.refused(&["--memory", "5000001"], &["memory"]);
    table.refused(&["--memory", &format!("{}M", host_memory_mib() * 2)], &["memory", "host"]);
    table.refused(&["--cpus", "0"], &["CPU"]);
    table.refused(&["--cpus", "100000"], &["CPU"]);
    table.refused(&["--cpu", "no-such-model"], &["no-such-model"]);
    for name in ["", "a/b", ".hidden", "ü"] {
        table.refused(&["--name", name], &["name"]);
    }
}

#[test]
fn kvm_that_this_user_may_not_have_is_refused_with_what_to_do() {
    let table = Table::new();
    fs::set_permissions(table.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let readable = table.kernel.display().to_string();
    let words = ["--kernel", &readable, "--accel", "kvm"];
    if fs::metadata("/dev/kvm").is_ok_and(|m| m.permissions().mode() & 0o006 == 0o006) {
        println!("skipped: everybody may open this host's /dev/kvm");
        return;
    }
    check(&unprivileged(&table, &words), &words, &["--accel kvm", "/dev/kvm", "--accel software"]);
}

#[test]
fn a_run_says_which_accelerator_it_got_and_why_unless_told_to_be_quiet() {
    let table = Table::new();
    let said = |words: &[&str]| {
        let mut command = Command::new(ATOLL);
        command.args(["run", "--debug-exit"]).args(words).arg("--kernel").arg(&table.kernel);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(33), "{words:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(said(&["--accel", "software"]), "atoll: software CPU: asked for\n");
    let auto = said(&[]);
    assert!(auto.starts_with("atoll: software CPU: ") || auto.starts_with("atoll: KVM: "), "{auto}");
    assert_eq!(auto.lines().count(), 1, "{auto}");
    assert_eq!(said(&["--quiet"]), "");
    let json: serde_json::Value = serde_json::from_str(&said(&["--json", "--accel", "software"])).unwrap();
    assert_eq!(json["accelerator"]["name"], "software");
}

#[test]
fn host_resources_that_are_not_there_are_refused_before_anything_starts() {
    let table = Table::new();
    // More than any host has reserved, and a node and a processor that no host has.
    table.refused(&["--memory", "8G,hugepages=4M"], &["4M", "2M, 1G"]);
    table.refused(&["--memory", "17M,hugepages=2M"], &["17M", "multiple of 2M"]);
    if pool_pages(1 << 20) == 0 {
        table.refused(&["--memory", "1G,hugepages=1G"], &["hugepages=1G"]);
    }
    if pool_pages(2 << 10) < 512 {
        table.refused(&["--memory", "1G,hugepages=2M"], &["512 pages", "echo", "nr_hugepages"]);
    }
    table.refused(&["--memory", "64M,numa=1000"], &["numa=1000", "NUMA node"]);
    table.refused(&["--memory", "64M,fast"], &["fast", "prefault"]);
    table.refused(&["--pin", "60000"], &["60000", "online"]);
    table.refused(&["--pin", "0:0"], &["2 lists", "1 CPU;"]);
    table.refused(&["--pin", "one"], &["'one'", "0-3,8"]);
}

#[test]
fn more_locked_memory_than_the_user_may_have_is_refused() {
    let table = Table::new();
    fs::set_permissions(table.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|l| l.starts_with("Max locked memory")).unwrap();
    match line.split_whitespace().nth(3).unwrap().parse::<u64>() {
        Ok(limit) if limit < 64 << 20 => {}
        _ => return println!("skipped: this user may lock 64 MiB"),
    }
    let words = ["--memory", "64M,lock", "--kernel", table.kernel.to_str().unwrap()];
    check(&unprivileged(&table, &words), &words, &["64M,lock", "RLIMIT_MEMLOCK", "ulimit -l"]);
}

#[test]
fn networks_that_cannot_be_had_are_refused() {
    let table = Table::new();
    table.refused(&["--net", "bridge"], &["'bridge'", "user, none, tap"]);
    table.refused(&["--net", "user,fast"], &["'fast'", "host-loopback"]);
    table.refused(&["--net", "none", "--net", "user"], &["--net none"]);
    table.refused(&["--net", "user,address=10.0.3.15"], &["10.0.3.15", "10.0.2.0/24"]);
    table.refused(&["--net", "user,forward=tcp:8080:10.9.9.9:80"], &["10.9.9.9", "10.0.2.0/24"]);
    table.refused(&["--net", "user,forward=tcp:99999:22"], &["99999"]);
    table.refused(&["--net", "user,mtu=100000"], &["mtu=100000"]);
    table.refused(&["--net", "user,queues=4"], &["queues=4", "1 CPU"]);
    table.refused(&["--net", "user,bytes-per-second=fast"], &["'fast'"]);
    table.refused(&["--net", "tap,name=much-too-long-a-name"], &["much-too-long-a-name"]);
    table.refused(&["--net", "macvtap,name=atoll-none"], &["atoll-none"]);
    let nine = ["--net", "user"].repeat(9);
    table.refused(&nine, &["9 network interfaces"]);
}

#[test]
fn a_forwarded_port_in_use_is_refused() {
    let table = Table::new();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port().to_string();
    table.refused(&["--net", &format!("user,forward=tcp:{port}:22")], &[&port, "in use"]);
    let udp = std::net::UdpSocket::bind("[::1]:0").unwrap();
    let port = udp.local_addr().unwrap().port().to_string();
    table.refused(&["--net", &format!("user,forward=udp:[::1]:{port}:53")], &[&port, "in use"]);
    // An address that this host does not have (RFC 5737).
    table.refused(&["--net", "user,forward=tcp:203.0.113.9:8080:80"], &["203.0.113.9"]);
}

#[test]
fn network_devices_need_rights_and_programs_that_are_there() {
    let table = Table::new();
    fs::set_permissions(table.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let readable = table.kernel.display().to_string();
    let words = ["--kernel", &readable, "--net", "tap,name=atoll-none"];
    check(&unprivileged(&table, &words), &words, &["atoll-none"]);
    let mut command = Command::new(ATOLL);
    let words = ["--kernel", &readable, "--net", "passt"];
    command.arg("run").args(words).env("PATH", table.directory.path()).stdin(Stdio::null());
    check(&command.output().unwrap(), &words, &["passt"]);
}

#[test]
fn what_the_host_has_is_given() {
    let table = Table::new();
    let mut options = vec![vec!["--memory", "64M,hugepages=off,prefault"], vec!["--pin", "0"]];
    if Path::new("/sys/devices/system/node/node0").exists() {
        options.push(vec!["--memory", "64M,numa=0"]);
    }
    let given = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if given.contains("[madvise]") || given.contains("[always]") {
        options.push(vec!["--memory", "64M,hugepages=transparent"]);
    }
    match pool_pages(2 << 10) {
        0..32 => println!("skipped: this host has not reserved 32 huge pages of 2 MiB"),
        _ => options.push(vec!["--memory", "64M,hugepages=2M,prefault", "--cpus", "2", "--pin", "0:0"]),
    }
    for words in options {
        let mut command = Command::new(ATOLL);
        command.args(["run", "--debug-exit", "--kernel"]).arg(&table.kernel).args(&words);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(33), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Free pages in the host's pool of pages of `kib` KiB.
fn pool_pages(kib: u64) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn host_memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|l| l.starts_with("MemTotal:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}
