//! Lists of buffers: parts of them, and moving bytes between them and ordinary memory. For every format that takes
//! requests apart: [`crate::raw`], [`crate::qcow2`] and [`crate::nbd`]. A list's length is
//! [`total_len`](crate::disk::total_len).

use std::io;

use vm_memory::VolatileSlice;

/// The part of a list of buffers from byte `start` for `len` bytes.
pub(crate) fn part_of<'a>(
    buffers: &[VolatileSlice<'a>],
    start: u64,
    len: u64,
) -> io::Result<Vec<VolatileSlice<'a>>> {
    let (mut skip, mut left) = (start, len);
    let mut part = Vec::new();
    for buffer in buffers {
        let size = buffer.len() as u64;
        if left == 0 {
            break;
        }
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = left.min(size - skip);
        part.push(buffer.subslice(skip as usize, take as usize).map_err(io::Error::other)?);
        left -= take;
        skip = 0;
    }
    Ok(part)
}

/// Fills all buffers with zeros.
pub(crate) fn zero(buffers: &[VolatileSlice<'_>]) {
    const ZEROS: [u8; 4096] = [0; 4096];
    for buffer in buffers {
        let mut start = 0;
        while let Ok(rest) = buffer.offset(start)
            && !rest.is_empty()
        {
            let piece = rest.len().min(ZEROS.len());
            rest.copy_from(&ZEROS[..piece]);
            start += piece;
        }
    }
}

/// Copies bytes into buffers until either ends.
pub(crate) fn copy_out(mut bytes: &[u8], buffers: &[VolatileSlice<'_>]) {
    for buffer in buffers {
        let (now, later) = bytes.split_at(buffer.len().min(bytes.len()));
        buffer.copy_from(now);
        bytes = later;
    }
}

/// Copies buffers into bytes until either ends.
pub(crate) fn copy_in(buffers: &[VolatileSlice<'_>], bytes: &mut [u8]) {
    let mut done = 0;
    for buffer in buffers {
        done += buffer.copy_to(&mut bytes[done..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_crosses_buffers() {
        let (mut a, mut b, mut c) = ([0u8; 3], [0u8; 0], [0u8; 5]);
        let list = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
            VolatileSlice::from(&mut c[..]),
        ];
        copy_out(&[1, 2, 3, 4, 5, 6, 7, 8], &list);
        let mut bytes = [0; 4];
        copy_in(&part_of(&list, 2, 4).unwrap(), &mut bytes);
        assert_eq!(bytes, [3, 4, 5, 6]);
        zero(&part_of(&list, 1, 3).unwrap());
        assert_eq!((a, c), ([1, 0, 0], [0, 5, 6, 7, 8]));
    }
}
