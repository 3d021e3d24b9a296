//! What a machine's process occupies, apart from its guest's RAM: `/proc/PID/smaps` and `/proc/PID/status`
//! (proc(5)).
//!
//! What the kernel keeps for the guest outside the process (KVM's page tables among it) is not in these files.

use std::fmt;

use anyhow::{Context, Result, ensure};

/// Name of the memory file that is the guest's RAM.
const GUEST_RAM: &str = "/memfd:ram";

/// Memory of a process in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Use {
    /// Private pages that no file has: heap, stacks, written data of programs.
    anonymous: u64,
    /// Shared memory but for guest RAM.
    shared: u64,
    /// What the kernel lends through `anon_inode` mappings: KVM's run structures and dirty rings.
    lent: u64,
    page_tables: u64,
    /// Unwritten pages of files: program text that every process shares.
    files: u64,
    guest_ram: u64,
}

impl Use {
    /// What the machine costs beyond its guest's RAM and the program's text.
    pub(super) fn beyond_ram_kib(&self) -> u64 {
        self.anonymous + self.shared + self.lent + self.page_tables
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "memory: {} KiB beyond guest RAM: anonymous {}, shared {}, KVM's mappings {}, page tables {}; apart \
             from these file pages {}, guest RAM {}",
            self.beyond_ram_kib(),
            self.anonymous,
            self.shared,
            self.lent,
            self.page_tables,
            self.files,
            self.guest_ram
        )
    }
}

/// What process `pid` occupies now.
pub(super) fn of(pid: u32) -> Result<Use> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let found = parse(&read("smaps")?, &read("status")?)?;
    ensure!(found.guest_ram > 0, "process {pid} has no {GUEST_RAM}: is it a machine?");
    Ok(found)
}

fn parse(smaps: &str, status: &str) -> Result<Use> {
    let mut sum = Use::default();
    let (mut name, mut rss) = (String::new(), 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(field) = first.strip_suffix(':') else {
            // ADDRESSES PERMISSIONS OFFSET DEVICE INODE NAME: the start of a mapping.
            name = words.skip(4).collect::<Vec<_>>().join(" ");
            continue;
        };
        let kib = || words.clone().next().and_then(|w| w.parse::<u64>().ok());
        match field {
            "Rss" => rss = kib().context("smaps has an Rss line without a number")?,
            "Anonymous" => {
                let private = kib().context("smaps has an Anonymous line without a number")?;
                sum.anonymous += private;
                *sum.others_of(&name) += rss.saturating_sub(private);
            }
            _ => {}
        }
    }
    let tables = status.lines().find_map(|l| l.strip_prefix("VmPTE:")).context("status has no VmPTE")?;
    let tables = tables.split_whitespace().next().and_then(|w| w.parse().ok());
    sum.page_tables = tables.context("VmPTE is no number")?;
    Ok(sum)
}

impl Use {
    /// Where the pages of mapping `name` count that are not private.
    fn others_of(&mut self, name: &str) -> &mut u64 {
        if name.trim_end_matches(" (deleted)") == GUEST_RAM {
            &mut self.guest_ram
        } else if name.starts_with("anon_inode:") {
            &mut self.lent
        } else if ["/memfd:", "/dev/zero", "/SYSV", "/dev/shm/"].iter().any(|p| name.starts_with(p)) {
            &mut self.shared
        } else {
            &mut self.files
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(name: &str, rss: u64, anonymous: u64) -> String {
        format!(
            "7f00-7f01 rw-s 00000000 00:01 17 {name}\nSize: 999 kB\nRss: {rss} kB\nPss: 1 kB\nAnonymous: \
             {anonymous} kB\nVmFlags: rd wr\n"
        )
    }

    #[test]
    fn guest_ram_and_program_text_stay_apart_from_what_the_machine_costs() {
        let smaps = [
            mapping("/memfd:ram (deleted)", 90_000, 0),
            mapping("/memfd:rom (deleted)", 64, 0),
            mapping("[heap]", 500, 500),
            mapping("/bin/atoll", 3000, 40),
            mapping("anon_inode:kvm-vcpu:0", 12, 0),
            mapping("", 100, 100),
        ]
        .concat();
        let found = parse(&smaps, "Name: atoll\nVmPTE:\t 200 kB\n").unwrap();
        let expected =
            Use { anonymous: 640, shared: 64, lent: 12, page_tables: 200, files: 2960, guest_ram: 90_000 };
        assert_eq!(found, expected);
        assert_eq!(found.beyond_ram_kib(), 916);
    }

    #[test]
    fn a_process_without_guest_ram_is_no_machine() {
        assert!(of(std::process::id()).unwrap_err().to_string().contains("no /memfd:ram"));
    }

    #[test]
    fn files_that_are_none_are_errors() {
        assert!(parse("", "").is_err());
        assert!(parse(&mapping("x", 1, 1).replace("Rss: 1", "Rss: x"), "VmPTE: 1 kB").is_err());
    }
}
