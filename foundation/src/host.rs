//! What the host has and what this process uses of it.
//!
//! * [`kvm`] and [`processor`] are what a choice among accelerators is made from;
//! * [`pages`], [`numa`] and [`limits`] say which memory and processors can be had;
//! * [`rights`] finds out by trying what this process may do; [`cgroup`] what it may do in its control group.
//!
//! Everything here reads; nothing changes the host. Parsers are functions of a file's text or of a folder, so that
//! the tests can show them other hosts.

pub mod cgroup;
pub mod kvm;
pub mod limits;
pub mod numa;
pub mod pages;
pub mod processor;
pub mod rights;

use std::io;
use std::path::Path;

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All memory that the kernel manages.
    pub total: u64,
    /// What could be had now without swapping, by the kernel's estimate.
    pub available: u64,
    /// The smallest limit that a control group (a container, a service) puts on this process, if any.
    pub limit: Option<u64>,
}

impl HostMemory {
    /// The most that this process could ever use: all memory or the control group's limit.
    pub fn usable(&self) -> u64 {
        self.limit.map_or(self.total, |limit| limit.min(self.total))
    }
}

/// Memory of this process, in bytes; from `/proc/self/status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessMemory {
    /// Resident private and anonymous pages.
    pub rss_anon: u64,
    /// Resident pages of mapped files (program text included).
    pub rss_file: u64,
    /// Resident shared memory (memfd and tmpfs pages mapped here).
    pub rss_shmem: u64,
    /// Page tables.
    pub page_tables: u64,
    /// The highest that the sum of the resident pages has been.
    pub rss_peak: u64,
}

impl ProcessMemory {
    /// Resident pages of all kinds plus page tables.
    pub fn total(&self) -> u64 {
        self.rss_anon + self.rss_file + self.rss_shmem + self.page_tables
    }
}

/// Reads the host's memory figures. Fails when `/proc` is not mounted.
pub fn memory() -> io::Result<HostMemory> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let (total, available) = (field_kib(&text, "MemTotal"), field_kib(&text, "MemAvailable"));
    let total = total.ok_or_else(|| missing("MemTotal in /proc/meminfo"))?;
    Ok(HostMemory { total, available: available.unwrap_or(total), limit: cgroup_limit() })
}

/// Reads this process's memory figures. Fails when `/proc` is not mounted.
pub fn process_memory() -> io::Result<ProcessMemory> {
    parse_status(&std::fs::read_to_string("/proc/self/status")?)
        .ok_or_else(|| missing("RssAnon in /proc/self/status"))
}

/// Size of the host's pages in bytes.
pub fn page_size() -> usize {
    rustix::param::page_size()
}

/// Processors this process may use, by affinity and control-group quota; at least one.
pub fn cpu_count() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn missing(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("this kernel does not report {what}"))
}

fn parse_status(text: &str) -> Option<ProcessMemory> {
    Some(ProcessMemory {
        rss_anon: field_kib(text, "RssAnon")?,
        rss_file: field_kib(text, "RssFile")?,
        rss_shmem: field_kib(text, "RssShmem")?,
        page_tables: field_kib(text, "VmPTE").unwrap_or(0),
        rss_peak: field_kib(text, "VmHWM").unwrap_or(0),
    })
}

/// The value in bytes of a line `Name:   123 kB`.
fn field_kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The smallest limit from this process's control group up to the root, of either version.
fn cgroup_limit() -> Option<u64> {
    cgroup_limit_in(Path::new("/sys/fs/cgroup"), &std::fs::read_to_string("/proc/self/cgroup").ok()?)
}

fn cgroup_limit_in(root: &Path, own: &str) -> Option<u64> {
    let v1 = root.join("memory");
    let limits = own.lines().filter_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(":/")?;
        match controllers {
            "" => smallest_limit(root, group, "memory.max"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                smallest_limit(&v1, group, "memory.limit_in_bytes")
            }
            _ => None,
        }
    });
    limits.min()
}

/// The smallest number in a file called `name` from `group` below `root` up to `root`. No limit is a word in
/// version 2, and a number larger than any memory in version 1.
fn smallest_limit(root: &Path, group: &str, name: &str) -> Option<u64> {
    let mut path = root.join(group);
    let mut smallest = None;
    while path.starts_with(root) {
        let limit = std::fs::read_to_string(path.join(name)).ok().and_then(|s| s.trim().parse().ok());
        smallest = smallest.into_iter().chain(limit).min();
        path.pop();
    }
    smallest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_figures_are_plausible() {
        let memory = memory().unwrap();
        assert!(memory.total >= 64 << 20 && memory.available <= memory.total, "{memory:?}");
        assert!(memory.usable() <= memory.total);
        assert!(page_size().is_power_of_two() && page_size() >= 4096);
        assert!(cpu_count() >= 1);
    }

    #[test]
    fn touched_memory_shows_in_the_report() {
        let before = process_memory().unwrap();
        let block = vec![1u8; 64 << 20];
        let after = process_memory().unwrap();
        assert!(after.rss_anon >= before.rss_anon + (32 << 20), "{before:?} {after:?}");
        assert!(after.page_tables > 0 && after.rss_peak >= after.rss_anon);
        assert!(after.total() > after.rss_anon);
        assert_eq!(block.iter().map(|b| usize::from(*b)).sum::<usize>(), 64 << 20);
    }

    #[test]
    fn status_lines_are_read_in_bytes() {
        let text = "Name:\tx\nVmHWM:\t    80 kB\nRssAnon:\t      12 kB\nRssFile:\t 4 kB\nRssShmem:\t 0 kB\nVmPTE:\t 8 kB\n";
        let memory = parse_status(text).unwrap();
        assert_eq!((memory.rss_anon, memory.rss_file, memory.total()), (12 << 10, 4 << 10, 24 << 10));
        assert_eq!(parse_status("RssAnon: lots"), None);
    }

    #[test]
    fn the_smallest_limit_on_the_way_to_the_root_counts_in_either_version() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/b/memory.max", "max\n");
        assert_eq!(cgroup_limit_in(root.path(), "0::/a/b\n"), Some(1000));
        assert_eq!(cgroup_limit_in(root.path(), "0::/\n"), None);
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/docker/7a/memory.limit_in_bytes", "4096\n");
        assert_eq!(cgroup_limit_in(root.path(), "8:pids:/\n4:memory:/docker/7a\n0::/\n"), Some(4096));
        assert_eq!(cgroup_limit_in(root.path(), "4:cpu,memory:/docker/7a\n"), Some(4096));
        assert_eq!(cgroup_limit_in(root.path(), "5:pids:/docker/7a\n"), None);
    }

    #[test]
    fn a_control_group_limit_bounds_what_is_usable() {
        let memory = HostMemory { total: 100, available: 50, limit: Some(10) };
        assert_eq!(memory.usable(), 10);
        assert_eq!(HostMemory { limit: None, ..memory }.usable(), 100);
    }
}
