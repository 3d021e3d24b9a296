//! Reading and writing little-endian numbers at offsets, without a way to panic on the reading side.

/// The `size` bytes at `offset`, if they are all there.
pub(crate) fn slice(data: &[u8], offset: u64, size: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = usize::try_from(offset.checked_add(size)?).ok()?;
    data.get(start..end)
}

/// The byte at `offset`.
pub(crate) fn u8_at(data: &[u8], offset: u64) -> Option<u8> {
    slice(data, offset, 1)?.first().copied()
}

/// The 16-bit number at `offset`.
pub(crate) fn u16_at(data: &[u8], offset: u64) -> Option<u16> {
    Some(u16::from_le_bytes(slice(data, offset, 2)?.try_into().ok()?))
}

/// The 32-bit number at `offset`.
pub(crate) fn u32_at(data: &[u8], offset: u64) -> Option<u32> {
    Some(u32::from_le_bytes(slice(data, offset, 4)?.try_into().ok()?))
}

/// The 64-bit number at `offset`.
pub(crate) fn u64_at(data: &[u8], offset: u64) -> Option<u64> {
    Some(u64::from_le_bytes(slice(data, offset, 8)?.try_into().ok()?))
}

/// Overwrites bytes of a table that this crate itself sized; `offset` is a constant of its format.
pub(crate) fn put(table: &mut [u8], offset: usize, value: &[u8]) {
    table[offset..offset + value.len()].copy_from_slice(value);
}

/// The byte that makes the sum of `data` and itself zero modulo 256.
pub(crate) fn checksum(data: &[u8]) -> u8 {
    data.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// `value` rounded up to a multiple of `alignment` (a power of two), if that does not overflow.
pub(crate) fn align_up(value: u64, alignment: u64) -> Option<u64> {
    Some(value.checked_add(alignment.wrapping_sub(1))? & !alignment.wrapping_sub(1))
}

/// `value` rounded down to a multiple of `alignment` (a power of two).
pub(crate) fn align_down(value: u64, alignment: u64) -> u64 {
    value & !alignment.wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_past_the_end_or_past_the_address_space_gives_nothing() {
        let data = [1, 2, 3, 4];
        assert_eq!(u32_at(&data, 0), Some(0x0403_0201));
        assert_eq!(u32_at(&data, 1), None);
        assert_eq!(u8_at(&data, u64::MAX), None);
        assert_eq!(slice(&data, u64::MAX, 2), None);
    }

    #[test]
    fn a_checksum_brings_the_sum_to_zero() {
        let data = [0x80, 0x90, 0x01];
        assert_eq!(data.iter().fold(checksum(&data), |a, b| a.wrapping_add(*b)), 0);
    }
}
