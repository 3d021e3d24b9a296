//! The 4096 bytes of one function's configuration space, with a rule for every bit.
//!
//! A bit is read-only, writable, or cleared by writing one. Rules are set while the device is built; guest
//! writes go through them, the device itself changes bits freely.

/// Bytes of configuration space of a PCI Express function.
pub(crate) const CONFIG_BYTES: usize = 4096;

/// Configuration space: values and per-bit rules.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_BYTES]>,
    writable: Box<[u8; CONFIG_BYTES]>,
    clear_by_one: Box<[u8; CONFIG_BYTES]>,
}

impl Default for ConfigSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl ConfigSpace {
    /// All zero and read-only.
    pub fn new() -> Self {
        Self {
            bytes: Box::new([0; CONFIG_BYTES]),
            writable: Box::new([0; CONFIG_BYTES]),
            clear_by_one: Box::new([0; CONFIG_BYTES]),
        }
    }

    /// Copies bytes out; what lies past the end reads as ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    /// Applies a guest's write by the rules of each bit.
    pub fn guest_write(&mut self, offset: u16, data: &[u8]) {
        for (i, &new) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if at >= CONFIG_BYTES {
                return;
            }
            let (w, c) = (self.writable[at], self.clear_by_one[at]);
            self.bytes[at] = (self.bytes[at] & !w & !(c & new)) | (new & w);
        }
    }

    /// Sets bytes without regard to the rules. Past the end nothing happens.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        copy(&mut self.bytes, offset, data);
    }
    /// Says which bits software may write.
    pub fn set_writable(&mut self, offset: u16, mask: &[u8]) {
        copy(&mut self.writable, offset, mask);
    }
    /// Says which bits software clears by writing ones.
    pub fn set_clear_by_one(&mut self, offset: u16, mask: &[u8]) {
        copy(&mut self.clear_by_one, offset, mask);
    }

    /// The byte at `offset`.
    pub fn u8(&self, offset: u16) -> u8 {
        let mut b = [0; 1];
        self.read(offset, &mut b);
        b[0]
    }
    /// The 16 bits at `offset`.
    pub fn u16(&self, offset: u16) -> u16 {
        let mut b = [0; 2];
        self.read(offset, &mut b);
        u16::from_le_bytes(b)
    }
    /// The 32 bits at `offset`.
    pub fn u32(&self, offset: u16) -> u32 {
        let mut b = [0; 4];
        self.read(offset, &mut b);
        u32::from_le_bytes(b)
    }
    /// Sets the byte at `offset`.
    pub fn set_u8(&mut self, offset: u16, value: u8) {
        self.set(offset, &[value]);
    }
    /// Sets the 16 bits at `offset`.
    pub fn set_u16(&mut self, offset: u16, value: u16) {
        self.set(offset, &value.to_le_bytes());
    }
    /// Sets the 32 bits at `offset`.
    pub fn set_u32(&mut self, offset: u16, value: u32) {
        self.set(offset, &value.to_le_bytes());
    }

    /// Takes the value of every bit that a guest can change from `saved`, which may be shorter.
    pub fn restore(&mut self, saved: &[u8]) {
        for (at, &byte) in saved.iter().enumerate().take(CONFIG_BYTES) {
            let dynamic = self.writable[at] | self.clear_by_one[at];
            self.bytes[at] = (self.bytes[at] & !dynamic) | (byte & dynamic);
        }
    }

    /// All values, without the zeros at the end.
    pub fn save(&self) -> Vec<u8> {
        let len = self.bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        self.bytes[..len].to_vec()
    }

    /// Takes all values, but not the rules, from `other`.
    pub(crate) fn copy_values(&mut self, other: &[u8; CONFIG_BYTES]) {
        *self.bytes = *other;
    }
    /// All values.
    pub(crate) fn values(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }
}

fn copy(to: &mut [u8; CONFIG_BYTES], offset: u16, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(usize::from(offset)).zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_follows_its_rule() {
        let mut c = ConfigSpace::new();
        c.set_u16(0x10, 0xff00);
        c.set_writable(0x10, &[0x0f]);
        c.set_clear_by_one(0x11, &[0x0f]);
        c.guest_write(0x10, &[0xff, 0x03]);
        assert_eq!(c.u16(0x10), 0xfc0f);
        c.guest_write(0x10, &[0x00, 0x00]);
        assert_eq!(c.u16(0x10), 0xfc00);
    }

    #[test]
    fn the_end_of_the_space_is_the_end() {
        let mut c = ConfigSpace::new();
        c.set_writable(0xffc, &[0xff; 4]);
        c.guest_write(0xffe, &[1, 2, 3, 4]);
        assert_eq!(c.u32(0xffc), 0x0201_0000);
        assert_eq!(c.u32(0xffe), 0xffff_0201);
    }

    #[test]
    fn restore_touches_only_bits_that_software_owns() {
        let mut c = ConfigSpace::new();
        c.set_u16(0, 0x8086);
        c.set_writable(4, &[0x07]);
        let mut saved = vec![0xee; 6];
        saved[4] = 0x05;
        c.restore(&saved);
        assert_eq!((c.u16(0), c.u8(4)), (0x8086, 5));
        assert_eq!(c.save().len(), 5);
    }
}
