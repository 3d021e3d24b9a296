//! Huge pages and merged pages: what the host has set up.

use std::fs;
use std::path::Path;

/// A pool of huge pages of one size, reserved by the administrator (`Documentation/admin-guide/mm/hugetlbpage.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePagePool {
    /// Bytes of a page.
    pub page_size: u64,
    /// Pages in the pool.
    pub total: u64,
    /// Pages that nobody uses.
    pub free: u64,
    /// Free pages that are promised to somebody; 0 for the pool of one NUMA node, where promises are not counted.
    pub reserved: u64,
    /// Pages that the kernel may make beyond the pool when asked.
    pub overcommit: u64,
}

impl HugePagePool {
    /// Bytes that can be had now. What the kernel might make beyond the pool does not count.
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved).saturating_mul(self.page_size)
    }
}

/// The host's pools by ascending page size; none where the kernel has no such pages.
pub fn pools() -> Vec<HugePagePool> {
    pools_in(Path::new("/sys/kernel/mm/hugepages"))
}

/// The pools of NUMA node `node`.
pub fn pools_of_node(node: u32) -> Vec<HugePagePool> {
    pools_in(Path::new(&format!("/sys/devices/system/node/node{node}/hugepages")))
}

fn pools_in(folder: &Path) -> Vec<HugePagePool> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut pools: Vec<_> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib: u64 = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let number = |file: &str| fs::read_to_string(entry.path().join(file)).ok()?.trim().parse().ok();
            Some(HugePagePool {
                page_size: kib.checked_mul(1024)?,
                total: number("nr_hugepages")?,
                free: number("free_hugepages")?,
                reserved: number("resv_hugepages").unwrap_or(0),
                overcommit: number("nr_overcommit_hugepages").unwrap_or(0),
            })
        })
        .collect();
    pools.sort_by_key(|pool| pool.page_size);
    pools
}

/// What the kernel does about transparent huge pages (`Documentation/admin-guide/mm/transhuge.rst`): the word that
/// is chosen in each file, empty where there is no such file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TransparentHugePages {
    /// For private memory: `always`, `madvise` or `never`.
    pub enabled: String,
    /// For shared memory, which guest memory is: `always`, `within_size`, `advise`, `never`, `deny` or `force`.
    pub shared: String,
    /// For shared memory in pages of 2 MiB (since Linux 6.11): the same words, or `inherit`.
    pub shared_2m: String,
}

impl TransparentHugePages {
    /// Reads the host's settings.
    pub fn read() -> Self {
        let word = |file: &str| {
            let path = Path::new("/sys/kernel/mm/transparent_hugepage").join(file);
            fs::read_to_string(path).map_or(String::new(), |text| chosen(&text).to_owned())
        };
        Self {
            enabled: word("enabled"),
            shared: word("shmem_enabled"),
            shared_2m: word("hugepages-2048kB/shmem_enabled"),
        }
    }

    /// Whether private memory gets huge pages when its owner asks for them (`madvise`).
    pub fn for_private_memory(&self) -> bool {
        ["always", "madvise"].contains(&self.enabled.as_str())
    }

    /// Whether shared memory gets huge pages when its owner asks for them (`madvise`).
    pub fn for_shared_memory(&self) -> bool {
        const GIVEN: [&str; 4] = ["always", "within_size", "advise", "force"];
        match self.shared_2m.as_str() {
            _ if self.shared == "deny" => false,
            "" | "inherit" => GIVEN.contains(&self.shared.as_str()),
            own => self.shared == "force" || GIVEN.contains(&own),
        }
    }
}

/// The word in brackets, as sysfs shows which of several is chosen.
fn chosen(text: &str) -> &str {
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or("", |(word, _)| word)
}

/// Whether the kernel merges equal pages (`Documentation/admin-guide/mm/ksm.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ksm {
    /// The kernel cannot.
    Absent,
    /// It is switched off.
    Off,
    /// It runs and has so many pages merged.
    Running(u64),
}

/// Reads whether equal pages are merged.
pub fn ksm() -> Ksm {
    let number = |file: &str| {
        fs::read_to_string(Path::new("/sys/kernel/mm/ksm").join(file)).ok()?.trim().parse::<u64>().ok()
    };
    match number("run") {
        None => Ksm::Absent,
        Some(1) => Ksm::Running(number("pages_sharing").unwrap_or(0)),
        Some(_) => Ksm::Off,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_read_by_size_and_promised_pages_are_not_available() {
        let folder = tempfile::tempdir().unwrap();
        for (name, total, free, reserved) in [
            ("hugepages-1048576kB", 2, 2, Some(2)),
            ("hugepages-2048kB", 64, 60, Some(20)),
            ("hugepages-64kB", 1, 1, None),
        ] {
            let pool = folder.path().join(name);
            fs::create_dir(&pool).unwrap();
            fs::write(pool.join("nr_hugepages"), format!("{total}\n")).unwrap();
            fs::write(pool.join("free_hugepages"), format!("{free}\n")).unwrap();
            if let Some(reserved) = reserved {
                fs::write(pool.join("resv_hugepages"), format!("{reserved}\n")).unwrap();
            }
        }
        fs::create_dir(folder.path().join("hugepages-oddkB")).unwrap();
        fs::create_dir(folder.path().join("hugepages-16kB")).unwrap();
        let pools = pools_in(folder.path());
        let summary: Vec<_> = pools.iter().map(|p| (p.page_size, p.total, p.available())).collect();
        assert_eq!(summary, [(64 << 10, 1, 64 << 10), (2 << 20, 64, 80 << 20), (1 << 30, 2, 0)]);
        assert_eq!(pools_in(&folder.path().join("absent")), []);
    }

    #[test]
    fn the_word_in_brackets_is_chosen() {
        assert_eq!(chosen("always [madvise] never\n"), "madvise");
        assert_eq!(chosen("always within_size advise [never] deny force\n"), "never");
        assert_eq!(chosen("never"), "");
    }

    #[test]
    fn shared_memory_has_a_setting_of_its_own_and_one_per_size() {
        let given = |shared: &str, own: &str| {
            TransparentHugePages {
                enabled: "always".to_owned(),
                shared: shared.to_owned(),
                shared_2m: own.to_owned(),
            }
            .for_shared_memory()
        };
        assert!(!given("never", "") && !given("never", "inherit") && !given("", ""));
        assert!(given("advise", "") && given("within_size", "inherit") && given("always", "inherit"));
        assert!(given("never", "advise") && !given("advise", "never"));
        let private = |enabled: &str| {
            TransparentHugePages { enabled: enabled.to_owned(), ..TransparentHugePages::default() }
                .for_private_memory()
        };
        assert!(private("madvise") && private("always") && !private("never") && !private(""));
        assert!(!given("deny", "always") && given("force", "never"));
    }

    #[test]
    fn this_host_answers() {
        for pool in pools() {
            assert!(
                pool.page_size.is_power_of_two() && pool.free <= pool.total + pool.overcommit,
                "{pool:?}"
            );
        }
        let _ = (TransparentHugePages::read(), ksm());
    }
}
