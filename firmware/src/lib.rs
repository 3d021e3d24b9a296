//! What a kernel expects to find when it starts, made without running firmware.
//!
//! Atoll starts a kernel directly: this crate takes the place of the firmware and the boot loader. It is a
//! library of pure functions. Inputs are bytes (a kernel, an initial RAM disk, a command line) and a plain
//! description of the machine; outputs are a list of [`Segment`]s to write into guest RAM and an
//! [`EntryState`] for the boot processor. It opens no file, maps no memory and knows no other Atoll crate, so
//! it can be fuzzed alone: every byte of a kernel image is untrusted.
//!
//! ```text
//!  memory sizes ──► layout::AddressMap ─┬─► acpi::build ──► AcpiImage { segments, region, rsdp }
//!                                       ├─► smbios::build ─► segments
//!  kernel, initrd, command line ────────┴─► load ──► LoadedKernel { segments, EntryState }
//! ```
//!
//! Beside the segments and the entry state, the state that firmware leaves in the processor and in its local
//! APIC is listed by [`entry::firmware_msrs`] and [`entry::FIRMWARE_LAPIC`], and what it leaves in the chipset
//! is named in [`layout`]. Applying it is the caller's work.

#![forbid(unsafe_code)]

pub mod acpi;
mod bytes;
mod elf;
mod elf_boot;
pub mod entry;
mod error;
mod image;
pub mod layout;
mod linux;
mod multiboot;
pub mod smbios;

pub use entry::{EntryMode, EntryState, SegmentRegister, TableRegister};
pub use error::LoadError;
pub use image::Segment;

use layout::{AddressMap, Range};

/// What [`load`] needs to know about the machine.
#[derive(Debug, Clone)]
pub struct LoadParams<'a> {
    /// The guest-physical map: how much RAM there is and where.
    pub map: &'a AddressMap,
    /// Guest-physical address of the ACPI root pointer, 0 for none. Told to kernels that take it directly.
    pub rsdp_address: u64,
    /// Ranges of RAM taken by tables that are already placed, with what to call them in the memory map
    /// (normally [`acpi::AcpiImage::regions`]). The kernel and the initial RAM disk stay out of them.
    pub reserved: &'a [layout::E820Entry],
    /// First word of a Multiboot command line, where such kernels expect the name of their own image.
    pub kernel_name: &'a str,
}

/// The kinds of kernel that [`load`] accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelKind {
    /// Linux bzImage entered in 64-bit mode.
    Linux64,
    /// Linux bzImage entered in 32-bit protected mode.
    Linux32,
    /// ELF image with a PVH entry note.
    Pvh,
    /// Multiboot 1 image.
    Multiboot,
    /// Plain ELF64 executable, entered in 64-bit mode as an uncompressed Linux kernel is.
    Elf64,
    /// Plain ELF32 executable, entered in 32-bit protected mode as an uncompressed Linux kernel is.
    Elf32,
}

/// A kernel that is ready to start.
#[derive(Debug, Clone)]
pub struct LoadedKernel<'a> {
    /// What the image turned out to be.
    pub kind: KernelKind,
    /// What to write into guest RAM. Segments do not overlap each other and lie wholly in RAM.
    pub segments: Vec<Segment<'a>>,
    /// The state of the boot processor at the kernel's first instruction.
    pub entry: EntryState,
    /// Where the initial RAM disk was put, if there is one.
    pub initrd: Option<Range>,
}

/// Finds out what `kernel` is and places it, the initial RAM disk and the boot information in guest RAM.
///
/// Kinds are tried in this order: Linux bzImage, ELF with a PVH note, Multiboot 1, plain ELF. `cmdline` must
/// have no NUL byte and fit what the kernel says it accepts. Kernel and initrd bytes are borrowed, never copied,
/// and nothing is allocated in proportion to a number found in them.
///
/// # Errors
///
/// [`LoadError`] says what is wrong with the image or what does not fit into the guest's memory.
pub fn load<'a>(
    kernel: &'a [u8],
    initrd: Option<&'a [u8]>,
    cmdline: &str,
    params: &LoadParams<'_>,
) -> Result<LoadedKernel<'a>, LoadError> {
    if cmdline.bytes().any(|byte| byte == 0) {
        return Err(LoadError::CommandLineNul);
    }
    let request = image::Request { initrd, cmdline, params };
    if let Some(setup) = linux::SetupHeader::find(kernel)? {
        return linux::load(kernel, &setup, &request);
    }
    let elf = elf::Elf::parse(kernel)?;
    if let Some(elf) = &elf
        && let Some(entry) = elf.pvh_entry()?
    {
        return elf_boot::load_pvh(elf, entry, &request);
    }
    if let Some(header) = multiboot::Header::find(kernel)? {
        return multiboot::load(kernel, elf.as_ref(), &header, &request);
    }
    match elf {
        Some(elf) => elf_boot::load_plain(&elf, &request),
        None => Err(LoadError::NotAKernel { hint: error::recognise(kernel) }),
    }
}
