//! The smallest kernels: a Multiboot 1 image (Multiboot specification 0.6.96, 3.1) around some machine code.
//!
//! The code runs at [`ENTRY`] on one processor in 32-bit protected mode with flat segments, without paging, with
//! interrupts off and no stack, as the specification says.

/// Where the image is loaded: its header first.
pub const LOAD: u32 = 0x10_0000;
/// Physical address of the first instruction.
pub const ENTRY: u32 = LOAD + 32;
/// The port that `--debug-exit` enables.
pub const DEBUG_EXIT_PORT: u8 = 0xf4;

/// An image whose code is `code`. The header carries its own load addresses, so no ELF file is needed.
#[must_use]
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let (magic, flags) = (0x1bad_b002_u32, 0x1_0000_u32);
    let end = ENTRY + code.len() as u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, checksum, LOAD, LOAD, end, end, ENTRY];
    words.iter().flat_map(|w| w.to_le_bytes()).chain(code.iter().copied()).collect()
}

/// Writes `value` to the debug-exit port and halts: the program ends with exit code `2 * value + 1`.
#[must_use]
pub fn debug_exit(value: u8) -> Vec<u8> {
    kernel(&[0xb0, value, 0xe6, DEBUG_EXIT_PORT, 0xf4])
}

/// Halts for ever with interrupts off.
#[must_use]
pub fn halt() -> Vec<u8> {
    kernel(&[0xf4, 0xeb, 0xfd])
}

/// Writes `value` to a port and halts.
#[must_use]
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp $-1
    kernel(&[0x66, 0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd])
}

/// Faults with an interrupt table that holds nothing: a triple fault.
#[must_use]
pub fn triple_fault() -> Vec<u8> {
    // push 0; push 0; lidt [esp]; ud2, with a stack below the image.
    kernel(&[0xbc, 0x00, 0x80, 0x00, 0x00, 0x6a, 0x00, 0x6a, 0x00, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b])
}

/// Prints `text` on the first serial port, then does what `then` (machine code) does.
#[must_use]
pub fn print(text: &str, then: &[u8]) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code.extend(then);
    kernel(&code)
}

/// Prints `text`, then sends every character that comes in on the serial port back, for ever.
#[must_use]
pub fn echo(text: &str) -> Vec<u8> {
    // again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dx, 0x3f8; in al, dx; out dx, al; jmp again
    let then = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef,
    ];
    print(text, &then)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_adds_up_to_zero_and_covers_the_code() {
        let image = kernel(&[1, 2, 3]);
        let word = |i: usize| u32::from_le_bytes(image[4 * i..4 * i + 4].try_into().unwrap());
        assert_eq!(word(0).wrapping_add(word(1)).wrapping_add(word(2)), 0);
        assert_eq!((word(3), word(7)), (LOAD, ENTRY));
        assert_eq!(word(5) as usize - word(3) as usize, image.len());
    }
}
