//! Whether this host can give what a machine asks of it beyond being there: huge pages, a NUMA node, locked memory,
//! processors to run on.
//!
//! Pure checks over [`HostResources`], so that the tests can show them hosts that are not at hand. They come before
//! anything is made: what the host lacks is one line and exit code 2. Between check and use another program may take
//! what was there; then making the memory fails, in the same place and as cleanly.

use atoll_api_types::{ByteSize, CpuPinning, HugePages, MemoryOptions};
use atoll_foundation::host::limits::{self, Capabilities, Capability, Limit};
use atoll_foundation::host::numa::{self, NumaNode, show_list};
use atoll_foundation::host::pages::{self, HugePagePool, TransparentHugePages};
use atoll_foundation::threads;
use atoll_machine::memory::{RamOptions, RamPages};

use crate::error::VmError;

/// What the host has of that for which a machine can ask.
pub(crate) struct HostResources {
    /// All pools of huge pages.
    pub(crate) pools: Vec<HugePagePool>,
    /// The pools of one node.
    pub(crate) node_pools: fn(u32) -> Vec<HugePagePool>,
    pub(crate) transparent: TransparentHugePages,
    pub(crate) nodes: Vec<NumaNode>,
    pub(crate) locked: Limit,
    /// The limit on locked memory does not count for this process.
    pub(crate) may_lock_all: bool,
    pub(crate) online_cpus: Vec<u32>,
    /// Processors on which this process may run.
    pub(crate) allowed_cpus: Vec<u32>,
}

impl HostResources {
    /// Looks at this host.
    pub(crate) fn gather() -> Self {
        let online_cpus = numa::online_cpus();
        let allowed = threads::current_affinity().ok();
        let allowed =
            allowed.map(|cpus| cpus.into_iter().filter_map(|cpu| u32::try_from(cpu).ok()).collect());
        Self {
            pools: pages::pools(),
            node_pools: pages::pools_of_node,
            transparent: TransparentHugePages::read(),
            nodes: numa::nodes(),
            locked: limits::locked_memory(),
            may_lock_all: Capabilities::read().has(Capability::IpcLock),
            allowed_cpus: allowed.unwrap_or_else(|| online_cpus.clone()),
            online_cpus,
        }
    }
}

/// Checks the memory options of a machine with `size` of RAM and says how to make its memory.
pub(crate) fn memory(
    size: ByteSize,
    options: &MemoryOptions,
    host: impl FnOnce() -> HostResources,
) -> Result<RamOptions, VmError> {
    // The default asks nothing of the host.
    if *options == MemoryOptions::default() {
        return Ok(RamOptions::default());
    }
    let host = host();
    check_node(size, options, &host)?;
    check_pool(size, options, &host)?;
    check_lock(size, options, &host)?;
    Ok(RamOptions {
        pages: match options.hugepages {
            HugePages::Auto => RamPages::Transparent,
            HugePages::Transparent => transparent(&host)?,
            HugePages::Off => RamPages::Small,
            HugePages::Size2M => RamPages::Huge2M,
            HugePages::Size1G => RamPages::Huge1G,
        },
        lock: options.lock,
        prefault_threads: if options.prefault {
            host.allowed_cpus.len().clamp(1, MAX_PREFAULT_THREADS)
        } else {
            0
        },
        numa_node: options.numa,
    })
}

/// More threads do not obtain memory faster: they wait for the kernel's locks.
const MAX_PREFAULT_THREADS: usize = 16;

fn refuse(why: String) -> VmError {
    VmError::Memory(why)
}

fn check_node(size: ByteSize, options: &MemoryOptions, host: &HostResources) -> Result<(), VmError> {
    let Some(asked) = options.numa else { return Ok(()) };
    let Some(node) = host.nodes.iter().find(|node| node.id == asked) else {
        let ids: Vec<u32> = host.nodes.iter().map(|node| node.id).collect();
        return Err(refuse(format!(
            "--memory numa={asked}: this host has no such NUMA node with memory; it has: {}",
            show_list(&ids)
        )));
    };
    if size.0 > node.total {
        return Err(refuse(format!(
            "--memory numa={asked}: {size} do not fit into the {}M of that node; choose less memory or another node",
            node.total >> 20
        )));
    }
    Ok(())
}

/// Shared memory where it gets transparent huge pages, else private memory.
fn transparent(host: &HostResources) -> Result<RamPages, VmError> {
    if host.transparent.for_shared_memory() {
        Ok(RamPages::Transparent)
    } else if host.transparent.for_private_memory() {
        Ok(RamPages::PrivateTransparent)
    } else {
        Err(refuse(
            "--memory hugepages=transparent: this host gives none; 'echo madvise > \
             /sys/kernel/mm/transparent_hugepage/enabled' as root changes that"
                .to_owned(),
        ))
    }
}

fn check_pool(size: ByteSize, options: &MemoryOptions, host: &HostResources) -> Result<(), VmError> {
    let Some(page) = options.hugepages.pool() else { return Ok(()) };
    let kind = options.hugepages;
    if !size.0.is_multiple_of(page) {
        return Err(refuse(format!(
            "--memory {size},hugepages={kind}: the size must be a multiple of {kind}"
        )));
    }
    let pool_of = |pools: &[HugePagePool]| pools.iter().find(|pool| pool.page_size == page).copied();
    let Some(pool) = pool_of(&host.pools) else {
        return Err(refuse(format!(
            "--memory hugepages={kind}: this host's kernel or processor has no such pages"
        )));
    };
    let short = |pool: &HugePagePool, place: &str, knob: String| {
        let (asked, had) = (size.0 / page, pool.available() / page);
        refuse(format!(
            "--memory {size},hugepages={kind}: needs {} of the pool{place}, {had} of {} can be had; 'echo {} > {knob}' as \
             root reserves more",
            counted(asked, "page"),
            pool.total,
            pool.total + (asked - had),
        ))
    };
    // The kernel may make more than the pool has where the administrator lets it: then only trying tells.
    let folder = format!("hugepages-{}kB/nr_hugepages", page >> 10);
    if pool.available().saturating_add(pool.overcommit.saturating_mul(page)) < size.0 {
        return Err(short(&pool, "", format!("/sys/kernel/mm/hugepages/{folder}")));
    }
    let Some(node) = options.numa else { return Ok(()) };
    match pool_of(&(host.node_pools)(node)) {
        Some(own) if own.available() < size.0 => {
            let knob = format!("/sys/devices/system/node/node{node}/hugepages/{folder}");
            Err(short(&own, &format!(" of node {node}"), knob))
        }
        _ => Ok(()),
    }
}

fn counted(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn check_lock(size: ByteSize, options: &MemoryOptions, host: &HostResources) -> Result<(), VmError> {
    if !options.lock || host.may_lock_all || host.locked.allows(size.0) {
        return Ok(());
    }
    let now = host.locked.soft.unwrap_or(0);
    Err(refuse(format!(
        "--memory {size},lock: this user may lock {} only (RLIMIT_MEMLOCK); raise it with 'ulimit -l', LimitMEMLOCK= \
         of the service, or memlock in /etc/security/limits.conf",
        ByteSize(now)
    )))
}

/// Checks the host processors for a machine with `cpus` CPUs; those that each may use, by index.
pub(crate) fn pinning(
    pinning: Option<&CpuPinning>,
    cpus: u32,
    host: impl FnOnce() -> HostResources,
) -> Result<Vec<Vec<usize>>, VmError> {
    let Some(pinning) = pinning else { return Ok(Vec::new()) };
    if let Some(lists) = pinning.lists()
        && lists != cpus as usize
    {
        return Err(VmError::Pinning(format!(
            "--pin {pinning}: {lists} lists, and the machine has {}; give one list for all, or one for each",
            counted(cpus.into(), "CPU")
        )));
    }
    let host = host();
    let absent: Vec<u32> =
        pinning.named().into_iter().filter(|cpu| !host.online_cpus.contains(cpu)).collect();
    if !absent.is_empty() {
        return Err(VmError::Pinning(format!(
            "--pin {pinning}: host CPU {} does not exist or is offline; online are: {}",
            show_list(&absent),
            show_list(&host.online_cpus)
        )));
    }
    let denied: Vec<u32> =
        pinning.named().into_iter().filter(|cpu| !host.allowed_cpus.contains(cpu)).collect();
    if !denied.is_empty() {
        return Err(VmError::Pinning(format!(
            "--pin {pinning}: this process may not use host CPU {}; its control group or taskset allows: {}",
            show_list(&denied),
            show_list(&host.allowed_cpus)
        )));
    }
    let of_cpu =
        |index| pinning.of_cpu(index).unwrap_or_default().into_iter().map(|cpu| cpu as usize).collect();
    Ok((0..cpus).map(of_cpu).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn pool(page_size: u64, total: u64, free: u64, reserved: u64) -> HugePagePool {
        HugePagePool { page_size, total, free, reserved, overcommit: 0 }
    }

    /// Two nodes of 8 and 4 GiB, 1000 free pages of 2 MiB of which 200 are promised and 100 lie on node 1.
    fn host() -> HostResources {
        HostResources {
            pools: vec![pool(2 << 20, 1200, 1000, 200), pool(1 << 30, 0, 0, 0)],
            node_pools: |node| vec![pool(2 << 20, 600, if node == 1 { 100 } else { 900 }, 0)],
            transparent: TransparentHugePages {
                enabled: "madvise".to_owned(),
                shared: "never".to_owned(),
                shared_2m: String::new(),
            },
            nodes: vec![
                NumaNode { id: 0, total: 8 * GIB, free: GIB },
                NumaNode { id: 1, total: 4 * GIB, free: GIB },
            ],
            locked: Limit { soft: Some(8 << 20), hard: None },
            may_lock_all: false,
            online_cpus: vec![0, 1, 2, 5],
            allowed_cpus: vec![0, 1],
        }
    }

    fn check(text: &str, host: impl FnOnce() -> HostResources) -> Result<RamOptions, String> {
        let spec: atoll_api_types::MemorySpec = text.parse().unwrap();
        memory(spec.size, &spec.options, host).map_err(|error| {
            assert!(error.is_input(), "exit code 2: {error}");
            error.to_string()
        })
    }

    fn refused(text: &str, words: &[&str]) {
        let why = check(text, host).unwrap_err();
        assert!(words.iter().all(|word| why.contains(word)) && !why.contains('\n'), "{text}: {why}");
    }

    #[test]
    fn the_default_looks_at_nothing() {
        let options = check("512M", || panic!("the host was asked")).unwrap();
        assert_eq!(options, RamOptions::default());
        assert!(pinning(None, 2, || panic!("the host was asked")).unwrap().is_empty());
    }

    #[test]
    fn what_the_host_has_is_given() {
        let options = check("1G,hugepages=2M,prefault,numa=0", host).unwrap();
        let expected =
            RamOptions { pages: RamPages::Huge2M, lock: false, prefault_threads: 2, numa_node: Some(0) };
        assert_eq!(options, expected);
        assert_eq!(check("1G,hugepages=off", host).unwrap().pages, RamPages::Small);
        assert!(check("8M,lock", host).unwrap().lock);
        let advised = || HostResources {
            transparent: TransparentHugePages {
                shared: "advise".to_owned(),
                ..TransparentHugePages::default()
            },
            ..host()
        };
        assert_eq!(check("1G,hugepages=transparent", advised).unwrap().pages, RamPages::Transparent);
    }

    #[test]
    fn a_pool_that_is_too_small_is_refused_with_the_number_that_would_do() {
        refused(
            "2G,hugepages=2M",
            &["1024 pages", "800 of 1200 can be had", "echo 1424", "hugepages-2048kB"],
        );
        refused("1G,hugepages=1G", &["1 page of", "0 of 0 can", "echo 1 >", "hugepages-1048576kB"]);
        refused("1G,hugepages=2M,numa=1", &["node 1", "100 of 600 can", "node1/hugepages"]);
        refused("513M,hugepages=2M", &["multiple of 2M"]);
        let none = || HostResources { pools: Vec::new(), ..host() };
        assert!(check("1G,hugepages=1G", none).unwrap_err().contains("no such pages"));
    }

    #[test]
    fn pages_that_the_kernel_may_make_are_left_for_it_to_make() {
        let generous = || HostResources {
            pools: vec![HugePagePool { overcommit: 1000, ..pool(2 << 20, 0, 0, 0) }],
            ..host()
        };
        assert!(check("1G,hugepages=2M", generous).is_ok());
    }

    #[test]
    fn transparent_pages_come_from_private_memory_where_shared_memory_gets_none() {
        assert_eq!(check("1G,hugepages=transparent", host).unwrap().pages, RamPages::PrivateTransparent);
        let never = || HostResources { transparent: TransparentHugePages::default(), ..host() };
        let why = check("1G,hugepages=transparent", never).unwrap_err();
        assert!(why.contains("transparent_hugepage/enabled"), "{why}");
    }

    #[test]
    fn nodes_that_are_not_there_or_too_small_are_refused() {
        refused("1G,numa=2", &["numa=2", "it has: 0-1"]);
        refused("6G,numa=1", &["numa=1", "4096M"]);
    }

    #[test]
    fn more_locked_memory_than_allowed_is_refused_unless_the_limit_does_not_count() {
        refused("512M,lock", &["8M", "RLIMIT_MEMLOCK", "ulimit -l"]);
        let root = || HostResources { may_lock_all: true, ..host() };
        assert!(check("512M,lock", root).is_ok());
    }

    #[test]
    fn processors_that_cannot_be_used_are_refused() {
        let pin = |text: &str, cpus| {
            pinning(Some(&text.parse().unwrap()), cpus, host).map_err(|error| {
                assert!(error.is_input());
                error.to_string()
            })
        };
        assert_eq!(pin("0-1", 2).unwrap(), [vec![0, 1], vec![0, 1]]);
        assert_eq!(pin("1:0", 2).unwrap(), [vec![1], vec![0]]);
        let wrong = |text, cpus, words: &[&str]| {
            let why = pin(text, cpus).unwrap_err();
            assert!(words.iter().all(|word| why.contains(word)), "{why}");
        };
        wrong("0:1", 3, &["2 lists", "3 CPUs"]);
        wrong("0-4", 1, &["host CPU 3-4", "online are: 0-2,5"]);
        wrong("5", 1, &["may not use host CPU 5", "allows: 0-1"]);
    }
}
