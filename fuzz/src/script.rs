//! An input as a sequence of numbers.

/// Bytes that run out into zeros.
pub struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.bytes(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number whose first byte chooses its kind: small, negative, an address of the guest, a power of two, or
    /// anything.
    pub fn value(&mut self) -> u64 {
        match self.u8() & 7 {
            0 => u64::from(self.u8()),
            1 => u64::from(self.u8()).wrapping_neg(),
            2 | 3 => u64::from(self.u32()) & 0x7_ffff,
            4 => 1u64.rotate_left(self.u8().into()),
            5 => u64::from(self.u32()),
            6 => 0xffff_8000_0000_0000 | u64::from(self.u32()),
            _ => self.u64(),
        }
    }
}
