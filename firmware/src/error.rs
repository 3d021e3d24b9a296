//! Why a kernel cannot be loaded, and recognising what the user gave instead of one.

use crate::layout::Range;

/// Why [`crate::load`] refused a kernel. Each message is one line that names what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The bytes are none of the accepted formats.
    #[error(
        "not a kernel{hint}; expected a Linux bzImage (boot protocol 2.06 or later), an x86 ELF image with or \
         without a PVH note, or a Multiboot 1 image"
    )]
    NotAKernel {
        /// What the bytes look like, as a phrase to append (`" (a gzip file)"`), or empty.
        hint: &'static str,
    },
    /// The format is recognised, but the image ends before something that it says it has.
    #[error("the kernel image is truncated: {what} needs {needed} bytes, the file has {present}")]
    Truncated {
        /// The part that is missing.
        what: &'static str,
        /// File size in bytes that the part implies.
        needed: u64,
        /// File size in bytes.
        present: u64,
    },
    /// The format is recognised, but this machine cannot start that variant of it.
    #[error("the kernel cannot be started: {what}")]
    Unsupported {
        /// What the image asks for and what would be accepted.
        what: String,
    },
    /// The format is recognised, but a field contradicts it.
    #[error("the kernel image is damaged: {what}")]
    Invalid {
        /// The field and what it should be.
        what: &'static str,
    },
    /// A part of the kernel lies outside the guest's RAM.
    #[error(
        "the kernel does not fit into the guest's memory: {what} occupies {needed}, RAM there ends at \
         {available:#x}; give the machine more memory"
    )]
    NeedsMoreMemory {
        /// The part that does not fit.
        what: &'static str,
        /// Where the part would have to be.
        needed: Range,
        /// First guest-physical address behind the RAM that the part could use.
        available: u64,
    },
    /// Two parts want the same memory.
    #[error("{first} and {second} of the kernel both occupy memory at {at:#x}")]
    Overlap {
        /// The part that was placed first.
        first: &'static str,
        /// The part that collides with it.
        second: &'static str,
        /// Lowest guest-physical address that both occupy.
        at: u64,
    },
    /// There is no room for the initial RAM disk.
    #[error(
        "the initial RAM disk ({size} bytes) does not fit: {available} bytes are free where this kernel can \
         reach it; give the machine more memory"
    )]
    InitrdTooBig {
        /// Size in bytes of the initial RAM disk.
        size: u64,
        /// Bytes that could be used for it.
        available: u64,
    },
    /// The command line is longer than the kernel or the boot protocol takes.
    #[error("the kernel command line has {length} bytes, this kernel takes at most {max}")]
    CommandLineTooLong {
        /// Its length in bytes.
        length: u64,
        /// The longest that is accepted, in bytes.
        max: u64,
    },
    /// The command line contains a NUL byte.
    #[error("the kernel command line contains a NUL byte; remove it")]
    CommandLineNul,
}

/// Recognises by their first bytes the files that are most often given by mistake.
pub(crate) fn recognise(data: &[u8]) -> &'static str {
    const KNOWN: [(usize, &[u8], &str); 9] = [
        (0, &[0x1f, 0x8b], " (this is a gzip file)"),
        (0, b"\xfd7zXZ", " (this is an xz file)"),
        (0, &[0x28, 0xb5, 0x2f, 0xfd], " (this is a zstd file)"),
        (0, b"QFI\xfb", " (this is a qcow2 disk image)"),
        (0, b"070701", " (this is a cpio archive, perhaps an initial RAM disk)"),
        (0, b"#!", " (this is a script)"),
        (0x38, b"ARM\x64", " (this is a kernel for 64-bit ARM)"),
        (0x8001, b"CD001", " (this is an ISO image)"),
        (0x1fe, &[0x55, 0xaa], " (this looks like a disk or a boot sector)"),
    ];
    if data.is_empty() {
        return " (the file is empty)";
    }
    KNOWN
        .iter()
        .find(|(offset, magic, _)| data.get(*offset..).is_some_and(|rest| rest.starts_with(magic)))
        .map_or("", |(_, _, hint)| hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_for_a_wrong_file_names_it_and_the_accepted_formats() {
        let text = LoadError::NotAKernel { hint: recognise(&[0x1f, 0x8b, 8]) }.to_string();
        assert!(text.contains("gzip") && text.contains("bzImage") && text.contains("Multiboot"), "{text}");
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
        assert_eq!(recognise(&[]), " (the file is empty)");
        assert_eq!(recognise(b"plain text"), "");
    }
}
