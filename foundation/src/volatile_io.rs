//! File transfers from and to memory that others may change at the same time.
//!
//! The memory is given as a list of `vm_memory` [`VolatileSlice`]s: memory that is valid for the slice's
//! lifetime, of which no Rust reference exists, and whose content may change at any moment. The kernel copies
//! directly between it and the file, so nothing passes through a buffer here.
//!
//! The transfers are complete or an error: short counts and interrupting signals are dealt with inside.

#![allow(unsafe_code)]
// UNSAFETY: preadv and pwritev take raw addresses; the safe forms want references, which must not exist here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Buffers in one system call; longer lists take several. The kernel's own limit is 1024.
const MAX_VECTORS: usize = 64;

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    FromFile,
    /// Only what the host has in memory.
    FromCache,
    ToFile,
}

/// Fills `buffers`, in order, with the bytes of `fd` from byte `offset`. Returns how many bytes were read: less
/// than the buffers hold only at end of file, where the rest of the buffers is unchanged. After an error any
/// part of the buffers may have been filled. Dirty tracking is the caller's: nothing is marked.
pub fn read_at<B: BitmapSlice>(
    fd: impl AsFd,
    offset: u64,
    buffers: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    transfer(fd.as_fd(), offset, buffers, Direction::FromFile)
}

/// Writes `buffers`, in order, to `fd` from byte `offset`. All or an error, after which any part may have been
/// written. Bytes that others change meanwhile are written with their old or new value.
pub fn write_all_at<B: BitmapSlice>(
    fd: impl AsFd,
    offset: u64,
    buffers: &[VolatileSlice<'_, B>],
) -> io::Result<()> {
    let total: usize = buffers.iter().map(|b| b.len()).sum();
    if transfer(fd.as_fd(), offset, buffers, Direction::ToFile)? == total {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::WriteZero, "the file takes no more bytes"))
    }
}

/// [`read_at`] as far as that needs no waiting for a device (`RWF_NOWAIT`). `None`: it would wait, or the host cannot
/// tell; any part of the buffers may have been filled.
pub fn read_cached_at<B: BitmapSlice>(
    fd: impl AsFd,
    offset: u64,
    buffers: &[VolatileSlice<'_, B>],
) -> Option<usize> {
    let total: usize = buffers.iter().map(|b| b.len()).sum();
    if buffers.len() > MAX_VECTORS {
        return None;
    }
    let count = one_call(fd.as_fd(), offset, buffers, 0, Direction::FromCache).ok()?;
    // Short: the rest is not in memory, or there is none; the other way finds out which.
    (count == total).then_some(count)
}

/// The same memory without its dirty bitmap. Who writes through the result marks the pages itself.
pub fn without_bitmap<'a, B: BitmapSlice>(slice: &VolatileSlice<'a, B>) -> VolatileSlice<'a, ()> {
    // SAFETY: the memory is valid for 'a and accessed volatilely by everybody, as the creator of `slice`
    // promised; the new slice is of the same range and lifetime.
    unsafe { VolatileSlice::new(slice.ptr_guard_mut().as_ptr(), slice.len()) }
}

fn transfer<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    mut offset: u64,
    buffers: &[VolatileSlice<'_, B>],
    direction: Direction,
) -> io::Result<usize> {
    let mut total = 0;
    // The next byte to transfer: `skip` bytes into `buffers[first]`, which always has one there.
    let (mut first, mut skip) = advance(buffers, 0, 0);
    while first < buffers.len() {
        let count = one_call(fd, offset, &buffers[first..], skip, direction)?;
        if count == 0 {
            break;
        }
        total += count;
        offset = offset.saturating_add(count as u64);
        (first, skip) = advance(buffers, first, skip + count);
    }
    Ok(total)
}

/// The position `left` bytes after the start of `buffers[first]`, past any empty buffers.
fn advance<B: BitmapSlice>(
    buffers: &[VolatileSlice<'_, B>],
    mut first: usize,
    mut left: usize,
) -> (usize, usize) {
    while let Some(buffer) = buffers.get(first) {
        if left < buffer.len() {
            break;
        }
        left -= buffer.len();
        first += 1;
    }
    (first, left)
}

/// One preadv or pwritev of the first buffers, without the first `skip` bytes of the first one.
fn one_call<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    offset: u64,
    buffers: &[VolatileSlice<'_, B>],
    skip: usize,
    direction: Direction,
) -> io::Result<usize> {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_VECTORS];
    let used = buffers.len().min(MAX_VECTORS);
    for (index, (vector, buffer)) in vectors.iter_mut().zip(buffers).enumerate() {
        let skip = if index == 0 { skip } else { 0 };
        vector.iov_base = buffer.ptr_guard_mut().as_ptr().wrapping_add(skip).cast();
        vector.iov_len = buffer.len() - skip;
    }
    let offset = libc::off64_t::try_from(offset)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "file offset beyond the host's limit"))?;
    let used = used as libc::c_int;
    uninterrupted(|| {
        // SAFETY: every vector lies within a slice that is valid for its lifetime, which outlasts the call
        // (`skip` is below the length of the buffer, see `advance`). Memory that changes meanwhile is no
        // hazard to the kernel's copy, and no Rust reference to it exists.
        unsafe {
            match direction {
                Direction::FromFile => libc::preadv64(fd.as_raw_fd(), vectors.as_ptr(), used, offset),
                Direction::FromCache => {
                    libc::preadv64v2(fd.as_raw_fd(), vectors.as_ptr(), used, offset, libc::RWF_NOWAIT)
                }
                Direction::ToFile => libc::pwritev64(fd.as_raw_fd(), vectors.as_ptr(), used, offset),
            }
        }
    })
}

/// Makes a system call that returns a count of bytes, again for as long as signals interrupt it.
pub(crate) fn uninterrupted(call: impl Fn() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_read_from_memory_or_not_at_all() {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[3; 4096]).unwrap();
        let mut bytes = [0; 4096];
        match read_cached_at(&file, 0, &[VolatileSlice::from(&mut bytes[..])]) {
            Some(count) => assert_eq!((count, bytes), (4096, [3; 4096])),
            None => println!("skipped: the file system cannot tell what is in memory"),
        }
        assert_eq!(read_cached_at(&file, 4000, &[VolatileSlice::from(&mut bytes[..])]), None);
    }

    use std::os::unix::fs::FileExt;

    /// A list of slices of the given lengths over one piece of memory.
    fn slices<'a>(mut memory: &'a mut [u8], lengths: &[usize]) -> Vec<VolatileSlice<'a>> {
        let mut list = Vec::new();
        for length in lengths {
            let (head, tail) = memory.split_at_mut(*length);
            list.push(VolatileSlice::from(head));
            memory = tail;
        }
        list
    }

    #[test]
    fn scattered_buffers_are_written_and_read_in_order() {
        let file = tempfile::tempfile().unwrap();
        let mut out: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        write_all_at(&file, 7, &slices(&mut out, &[0, 1, 500, 0, 0, 499, 0])).unwrap();
        let mut on_disk = vec![0; 1000];
        file.read_exact_at(&mut on_disk, 7).unwrap();
        assert_eq!(on_disk, out);
        let mut back = vec![0; 1000];
        assert_eq!(read_at(&file, 7, &slices(&mut back, &[999, 0, 1])).unwrap(), 1000);
        assert_eq!(back, out);
    }

    #[test]
    fn more_buffers_than_one_call_takes_are_all_transferred() {
        let file = tempfile::tempfile().unwrap();
        let lengths: Vec<usize> = (0..500).map(|n| n % 7).collect();
        let total = lengths.iter().sum();
        let mut out: Vec<u8> = (0..total).map(|n| (n * 13) as u8).collect();
        write_all_at(&file, 0, &slices(&mut out, &lengths)).unwrap();
        let mut back = vec![0; total];
        assert_eq!(read_at(&file, 0, &slices(&mut back, &lengths)).unwrap(), total);
        assert_eq!(back, out);
    }

    #[test]
    fn a_long_run_of_empty_buffers_is_not_the_end_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        let mut lengths = vec![0; 200];
        lengths.push(3);
        let mut out = *b"abc";
        write_all_at(&file, 0, &slices(&mut out, &lengths)).unwrap();
        let mut back = [0; 3];
        assert_eq!(read_at(&file, 0, &slices(&mut back, &lengths)).unwrap(), 3);
        assert_eq!(&back, b"abc");
    }

    #[test]
    fn a_read_at_the_end_of_the_file_is_short_and_leaves_the_rest() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"hello", 0).unwrap();
        let mut back = [b'.'; 8];
        assert_eq!(read_at(&file, 1, &slices(&mut back, &[2, 6])).unwrap(), 4);
        assert_eq!(&back, b"ello....");
        assert_eq!(read_at(&file, 9, &slices(&mut back, &[8])).unwrap(), 0);
    }

    #[test]
    fn errors_are_reported() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = std::fs::File::open(path.path()).unwrap();
        let mut out = [1; 4];
        assert!(write_all_at(&file, 0, &slices(&mut out, &[4])).is_err());
        assert!(read_at(&file, u64::MAX, &slices(&mut out, &[4])).is_err());
    }

    #[test]
    fn a_slice_without_its_bitmap_is_the_same_memory() {
        let mut memory = *b"xyz";
        let slice = VolatileSlice::from(&mut memory[..]);
        let plain = without_bitmap(&slice);
        plain.copy_from(b"abc");
        let mut copy = [0u8; 3];
        slice.copy_to(&mut copy);
        assert_eq!(&copy, b"abc");
    }
}
