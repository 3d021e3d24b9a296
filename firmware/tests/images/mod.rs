//! Kernel images made for tests, byte by byte from the specifications.

#![allow(dead_code, unreachable_pub, reason = "shared by test files, each of which uses a part")]

/// Overwrites bytes.
pub fn put(image: &mut [u8], offset: usize, value: &[u8]) {
    image[offset..offset + value.len()].copy_from_slice(value);
}

/// A bzImage of protocol 2.15 with `payload` bytes of protected-mode part, preferring 16 MiB.
pub fn bzimage(payload: usize) -> Vec<u8> {
    let mut image = vec![0; 1024 + payload];
    put(&mut image, 0x1F1, &[1]);
    put(&mut image, 0x1F4, &(payload.div_ceil(16) as u32).to_le_bytes());
    put(&mut image, 0x1FE, &[0x55, 0xAA]);
    put(&mut image, 0x200, &[0xEB, 0x6A]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020Fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1]);
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x80_0000u32.to_le_bytes());
    for (index, byte) in image[1024..].iter_mut().enumerate() {
        *byte = index as u8;
    }
    image
}

/// One program header of an ELF image that is being made.
pub struct Part<'a> {
    pub kind: u32,
    pub virtual_address: u64,
    pub physical_address: u64,
    pub data: &'a [u8],
    pub memory_size: u64,
}

/// A loadable part without zeros behind it, linked where it is loaded.
pub fn load(address: u64, data: &[u8]) -> Part<'_> {
    let memory_size = data.len() as u64;
    Part { kind: 1, virtual_address: address, physical_address: address, data, memory_size }
}

/// An ELF64 executable for x86-64.
pub fn elf64(entry: u64, parts: &[Part<'_>]) -> Vec<u8> {
    let mut image = vec![0; 64 + parts.len() * 56];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 24, &entry.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &(parts.len() as u16).to_le_bytes());
    for (index, part) in parts.iter().enumerate() {
        let at = 64 + index * 56;
        let offset = image.len() as u64;
        put(&mut image, at, &part.kind.to_le_bytes());
        let numbers = [
            offset,
            part.virtual_address,
            part.physical_address,
            part.data.len() as u64,
            part.memory_size,
            4,
        ];
        for (number, value) in numbers.iter().enumerate() {
            put(&mut image, at + 8 + number * 8, &value.to_le_bytes());
        }
        image.extend_from_slice(part.data);
    }
    image
}

/// An ELF32 executable for i386.
pub fn elf32(entry: u32, parts: &[Part<'_>]) -> Vec<u8> {
    let mut image = vec![0; 52 + parts.len() * 32];
    put(&mut image, 0, b"\x7fELF\x01\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &3u16.to_le_bytes());
    put(&mut image, 24, &entry.to_le_bytes());
    put(&mut image, 28, &52u32.to_le_bytes());
    put(&mut image, 42, &32u16.to_le_bytes());
    put(&mut image, 44, &(parts.len() as u16).to_le_bytes());
    for (index, part) in parts.iter().enumerate() {
        let offset = image.len() as u32;
        let numbers = [
            part.kind,
            offset,
            part.virtual_address as u32,
            part.physical_address as u32,
            part.data.len() as u32,
            part.memory_size as u32,
            7,
            4,
        ];
        for (number, value) in numbers.iter().enumerate() {
            put(&mut image, 52 + index * 32 + number * 4, &value.to_le_bytes());
        }
        image.extend_from_slice(part.data);
    }
    image
}

/// Notes as a note segment has them: one that is not ours, then the PVH entry with a value of 4 or 8 bytes.
pub fn pvh_notes(entry: u64, value_size: usize) -> Vec<u8> {
    let mut notes = Vec::new();
    for word in [4u32, 5, 6] {
        notes.extend_from_slice(&word.to_le_bytes());
    }
    notes.extend_from_slice(b"GNU\0value\0\0\0");
    for word in [4u32, value_size as u32, 18] {
        notes.extend_from_slice(&word.to_le_bytes());
    }
    notes.extend_from_slice(b"Xen\0");
    notes.extend_from_slice(&entry.to_le_bytes()[..value_size]);
    notes
}

/// A Multiboot header: `flags`, then the five load addresses if given.
pub fn multiboot_header(flags: u32, addresses: Option<[u32; 5]>) -> Vec<u8> {
    let magic = 0x1BAD_B002u32;
    let mut words = vec![magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags)];
    words.extend(addresses.into_iter().flatten());
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
