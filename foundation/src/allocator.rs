//! The process's heap, told to give back what it does not use.
//!
//! glibc's allocator raises its threshold for separate mappings to the size of the largest block that was freed, up
//! to 32 MiB. In a process that makes and ends machines, tens of MiB of ended machines' tables then stay in the heap:
//! 46 MiB after eight of them, 3 MiB with the thresholds held where they start.

#![allow(unsafe_code)]
// UNSAFETY: mallopt has no safe form.

/// Blocks of at least this size are mappings of their own, and so much may stay unused at the end of the heap:
/// glibc's own initial value, which is not raised any more once it was set.
const THRESHOLD: libc::c_int = 128 << 10;

/// Makes the heap return freed memory to the host. Call it first thing in a program; harmless later.
pub fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: sets a number in the allocator, which locks itself.
        unsafe { libc::mallopt(parameter, THRESHOLD) };
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    #[test]
    fn a_large_block_is_returned_when_it_is_freed() {
        super::return_freed_memory();
        let resident = || crate::host::process_memory().unwrap().rss_anon;
        let block = |size: usize| std::hint::black_box(vec![1u8; size]);
        // glibc's own rule would keep the second block in the heap: the first, freed, would raise the threshold.
        drop(block(24 << 20));
        let before = resident();
        let (freed, _after_it) = (block(20 << 20), block(64 << 10));
        assert!(resident() > before + (16 << 20));
        drop(freed);
        assert!(resident() < before + (8 << 20));
    }
}
