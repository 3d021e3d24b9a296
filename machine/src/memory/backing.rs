//! Where a block's host memory comes from: which pages, from which node, and whether it is there from the start.
//!
//! The order of the steps matters:
//!
//! ```text
//!  memfd (of the pool's page size) ── map ── bind to the node ── lock as touched ── obtain everything
//!                                      │                             │                  │
//!                     the pool's pages are reserved here    the limit is checked   pages come from the
//!                     (or refused): no fault can fail            here              node that was bound
//! ```
//!
//! What the kernel reserves from a pool does not say on which node it lies. With a node given, memory from a pool is
//! therefore obtained at once: a shortage shows here and not as a SIGBUS in the middle of the guest.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::Advice;

use super::MemoryError;
use super::mapping::Mapping;
use super::ram::{MAX_BLOCK_SIZE, PAGE_SIZE};

/// Which host pages hold a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RamPages {
    /// Transparent huge pages if the host gives them to shared memory.
    #[default]
    Transparent,
    /// Transparent huge pages of private memory: many hosts give them to that and not to shared memory. The block
    /// has no file, so no other process can map it.
    PrivateTransparent,
    /// Pages of 4 KiB only.
    Small,
    /// 2 MiB pages from the host's pool.
    Huge2M,
    /// 1 GiB pages from the host's pool.
    Huge1G,
}

impl RamPages {
    /// Bytes of a page whose multiple the block's size must be.
    pub fn size(self) -> u64 {
        match self {
            Self::Transparent | Self::PrivateTransparent | Self::Small => PAGE_SIZE,
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }

    fn is_pooled(self) -> bool {
        self.size() != PAGE_SIZE
    }
}

/// How the host provides a block. The default is what [`super::RamBlock::new_shared`] does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamOptions {
    /// Which pages hold it.
    pub pages: RamPages,
    /// Pages are locked (`mlock2` with `MLOCK_ONFAULT`) once they are touched: they never go to swap.
    pub lock: bool,
    /// Every page is obtained at creation, by this many threads; 0 leaves it to the first touch.
    pub prefault_threads: usize,
    /// Pages come from this NUMA node only (`MPOL_BIND`).
    pub numa_node: Option<u32>,
}

/// Makes the mapping, and the memfd behind it unless the memory is private.
pub(super) fn create(
    name: &str,
    size: u64,
    options: &RamOptions,
) -> Result<(Option<OwnedFd>, Mapping), MemoryError> {
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size > MAX_BLOCK_SIZE {
        return Err(MemoryError::BadSize { name: name.to_owned(), size });
    }
    let page = options.pages.size();
    if !size.is_multiple_of(page) {
        return Err(MemoryError::NotInPages { name: name.to_owned(), size, page });
    }
    let host = |what: &'static str| {
        let name = name.to_owned();
        move |source: io::Error| MemoryError::Host { name, what, source }
    };
    let file = create_file(name, size, options.pages).map_err(host("cannot make a memfd"))?;
    let memory = match &file {
        None => Mapping::anonymous(size as usize).map_err(host("mmap"))?,
        Some(file) if options.pages.is_pooled() => Mapping::of_file_reserved(file.as_fd(), size as usize)
            .map_err(host("cannot reserve enough of the host's huge pages"))?,
        Some(file) => Mapping::of_file(file.as_fd(), size as usize).map_err(host("mmap"))?,
    };
    // Guest memory is the guest's own: it does not belong in a core file of the host process.
    memory.advise(Advice::LinuxDontDump);
    match options.pages {
        RamPages::Transparent | RamPages::PrivateTransparent => memory.advise(Advice::LinuxHugepage),
        RamPages::Small => memory.advise(Advice::LinuxNoHugepage),
        RamPages::Huge2M | RamPages::Huge1G => {}
    }
    if let Some(node) = options.numa_node {
        memory.bind(node).map_err(host("cannot bind it to the NUMA node"))?;
    }
    if options.lock {
        memory.lock_on_touch().map_err(host("cannot lock it"))?;
    }
    let threads = match options.numa_node {
        Some(_) if options.pages.is_pooled() => options.prefault_threads.max(1),
        _ => options.prefault_threads,
    };
    if threads > 0 {
        populate(file.as_ref().map(AsFd::as_fd), &memory, threads, page)
            .map_err(host("cannot obtain all of it"))?;
    }
    Ok((file, memory))
}

fn create_file(name: &str, size: u64, pages: RamPages) -> io::Result<Option<OwnedFd>> {
    let kind = match pages {
        RamPages::PrivateTransparent => return Ok(None),
        RamPages::Transparent | RamPages::Small => MemfdFlags::empty(),
        RamPages::Huge2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        RamPages::Huge1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind)?;
    rustix::fs::ftruncate(&file, size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(Some(file))
}

/// Smallest share of a thread: below it, starting the thread costs more than it saves.
const MIN_SHARE: u64 = 64 << 20;

/// Obtains every page, in `threads` shares of whole pages of `page` bytes.
fn populate(file: Option<BorrowedFd<'_>>, memory: &Mapping, threads: usize, page: u64) -> io::Result<()> {
    let size = memory.len() as u64;
    let share =
        size.div_ceil(threads as u64).max(MIN_SHARE).next_multiple_of(page.max(RamPages::Huge2M.size()));
    let result = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..size.div_ceil(share))
            .map(|index| {
                let (start, end) = (index * share, ((index + 1) * share).min(size));
                scope.spawn(move || memory.populate(start as usize, (end - start) as usize))
            })
            .collect();
        let joined = workers.into_iter().map(|w| w.join().unwrap_or_else(|_| Err(io::Error::other("panic"))));
        joined.fold(Ok(()), Result::and)
    });
    match (result, file) {
        // Kernels before 5.14 do not know MADV_POPULATE_WRITE. This obtains the memory as well, without page tables.
        (Err(error), Some(file)) if error.kind() == io::ErrorKind::InvalidInput => {
            Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size)?)
        }
        (other, _) => other,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::RamBlock;

    /// Resident bytes of `block` by the kernel's count, and the sum of what smaps says under `key` for its mapping.
    fn smaps(block: &RamBlock, keys: &[&str]) -> u64 {
        let start = format!("{:x}-", block.as_ptr() as usize);
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let lines = text.lines().skip_while(|l| !l.starts_with(&start)).skip(1);
        let own = lines.take_while(|l| l.split(' ').next().is_some_and(|w| w.ends_with(':')));
        let value = |line: &str| {
            let (key, rest) = line.split_once(':')?;
            keys.contains(&key).then(|| rest.split_whitespace().next()?.parse::<u64>().ok()).flatten()
        };
        own.filter_map(value).sum::<u64>() * 1024
    }

    fn block(size: u64, options: &RamOptions) -> Result<Arc<RamBlock>, MemoryError> {
        RamBlock::with_options("options", size, options)
    }

    #[test]
    fn memory_is_obtained_at_the_first_touch_or_at_once() {
        let size = 8 << 20;
        let lazy = block(size, &RamOptions::default()).unwrap();
        assert_eq!(smaps(&lazy, &["Rss"]), 0);
        lazy.write(5 << 20, &[1]).unwrap();
        let touched = smaps(&lazy, &["Rss"]);
        assert!(touched >= PAGE_SIZE && touched < size, "{touched}");
        let eager = block(size, &RamOptions { prefault_threads: 3, ..RamOptions::default() }).unwrap();
        assert_eq!(smaps(&eager, &["Rss"]), size);
    }

    #[test]
    fn private_memory_gets_huge_pages_where_the_host_gives_them_and_has_no_file() {
        let options =
            RamOptions { pages: RamPages::PrivateTransparent, prefault_threads: 1, ..RamOptions::default() };
        let private = block(16 << 20, &options).unwrap();
        assert!(private.file().is_none());
        private.write(5 << 20, &[7; 100]).unwrap();
        assert_eq!(smaps(&private, &["Rss"]), 16 << 20);
        let enabled =
            std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        if !enabled.contains("[madvise]") && !enabled.contains("[always]") {
            println!("skipped in part: this host gives no transparent huge pages");
            return;
        }
        // A host whose memory is in pieces may not have all of them.
        assert!(smaps(&private, &["AnonHugePages"]) > 0);
    }

    #[test]
    fn a_prefault_in_several_shares_leaves_nothing_out() {
        let size = 3 * MIN_SHARE + 4096;
        let options = RamOptions { prefault_threads: 8, pages: RamPages::Small, ..RamOptions::default() };
        assert_eq!(smaps(&block(size, &options).unwrap(), &["Rss"]), size);
    }

    #[test]
    fn locked_memory_is_locked_page_by_page_as_it_is_touched() {
        let options = RamOptions { lock: true, pages: RamPages::Small, ..RamOptions::default() };
        let locked = match block(1 << 20, &options) {
            Ok(locked) => locked,
            Err(error) => {
                println!("skipped: this user may not lock 1 MiB ({error})");
                return;
            }
        };
        assert_eq!(smaps(&locked, &["Rss"]), 0, "nothing is obtained before it is touched");
        locked.write(0, &[1; 8192]).unwrap();
        assert_eq!(smaps(&locked, &["Locked"]), 8192);
    }

    #[test]
    fn memory_of_a_node_that_exists_is_given_and_of_another_refused() {
        let on = |node| {
            let options = RamOptions { numa_node: Some(node), prefault_threads: 1, ..RamOptions::default() };
            block(1 << 20, &options)
        };
        match on(0) {
            Ok(block) => {
                let start = format!("{:x} bind:0 ", block.as_ptr() as usize);
                let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
                assert!(maps.lines().any(|l| l.starts_with(&start)), "{start} is not in\n{maps}");
            }
            Err(error) => {
                assert!(error.to_string().contains("NUMA"), "{error}");
                println!("skipped: this kernel has no NUMA policies ({error})");
            }
        }
        for absent in [63, 1000, u32::MAX] {
            assert!(on(absent).is_err(), "node {absent}");
        }
    }

    #[test]
    fn a_pool_that_has_not_enough_is_an_error_and_not_a_fault() {
        // More than any test host has reserved.
        for pages in [RamPages::Huge2M, RamPages::Huge1G] {
            let error = block(1 << 42, &RamOptions { pages, ..RamOptions::default() }).err().unwrap();
            assert!(matches!(error, MemoryError::Host { .. }), "{error}");
        }
    }

    #[test]
    fn a_size_that_is_not_in_whole_pages_of_the_pool_is_refused() {
        let error = block(3 << 20, &RamOptions { pages: RamPages::Huge2M, ..RamOptions::default() }).err();
        assert!(matches!(error, Some(MemoryError::NotInPages { page: 0x20_0000, .. })));
    }

    #[test]
    fn memory_from_the_pool_is_zero_and_writable_and_behaves_like_any_block() {
        let options = RamOptions { pages: RamPages::Huge2M, ..RamOptions::default() };
        let block = match block(4 << 20, &options) {
            Ok(block) => block,
            Err(error) => {
                println!("skipped: this host's pool has no two free pages of 2 MiB ({error})");
                return;
            }
        };
        let mut byte = [9];
        block.read((4 << 20) - 1, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        let mut log = block.dirty_log();
        let _ = log.take();
        block.write(0x20_1234, b"x").unwrap();
        assert_eq!(log.take().iter().collect::<Vec<_>>(), [0x201]);
        assert_eq!(smaps(&block, &["Shared_Hugetlb", "Private_Hugetlb"]), 2 << 20);
    }
}
