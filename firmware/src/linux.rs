//! Linux bzImage, boot protocol 2.06 and later (kernel documentation: "The Linux/x86 Boot Protocol").
//!
//! A bzImage is a real-mode part with a setup header at 0x1F1, and a protected-mode part behind it that unpacks
//! the kernel. The real-mode part is not run: its header is copied into `boot_params` ("zero page") and the
//! protected-mode part is entered at its start (32-bit) or 0x200 behind it (64-bit, when the kernel says it can).
//! [`write_boot_params`] also serves uncompressed kernels.

use crate::bytes::{put, slice, u8_at, u16_at, u32_at, u64_at};
use crate::entry::{EntryMode, EntryState, RSI};
use crate::error::LoadError;
use crate::image::{Placement, Request, Segment};
use crate::layout::{self, Range};
use crate::{KernelKind, LoadedKernel};
use std::borrow::Cow;

/// Offset of the setup header in the file and in `boot_params`.
const HEADER_START: usize = 0x1F1;
/// Protocol 2.06 ends here: `cmdline_size` is its last field.
const HEADER_END_MIN: u64 = 0x23C;
/// The header may not reach beyond this offset of `boot_params`.
const HEADER_END_MAX: u64 = 0x290;
/// Size in bytes of `boot_params`.
const BOOT_PARAMS_SIZE: usize = 0x1000;
/// Oldest protocol: the first with a limit for the command line.
const PROTOCOL_MIN: u16 = 0x0206;
/// `loadflags`: the protected-mode part goes to 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// `initrd_addr_max` of kernels that do not say.
const INITRD_MAX_DEFAULT: u64 = 0x37FF_FFFF;
/// Most entries that `boot_params` has room for.
const E820_MAX: usize = 128;
/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;

/// The fields of a bzImage's setup header that loading needs. Sizes and addresses in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SetupHeader {
    version: u16,
    /// Header bytes end here in the file.
    end: u64,
    /// Start of the protected-mode part in the file.
    payload: u64,
    /// Size of the protected-mode part as the header has it, 0 if it does not say.
    payload_size: u64,
    loadflags: u8,
    initrd_max: u64,
    relocatable: bool,
    xloadflags: u16,
    cmdline_max: u64,
    pref_address: u64,
    init_size: u64,
}

impl SetupHeader {
    /// The setup header of `kernel`, or `None` if it is not a Linux kernel at all.
    pub(crate) fn find(kernel: &[u8]) -> Result<Option<SetupHeader>, LoadError> {
        if slice(kernel, 0x202, 4) != Some(b"HdrS") || u16_at(kernel, 0x1FE) != Some(0xAA55) {
            return Ok(None);
        }
        let version = u16_at(kernel, 0x206).unwrap_or(0);
        if version < PROTOCOL_MIN {
            let what = format!(
                "it has Linux boot protocol {}.{:02}, expected 2.06 or later",
                version >> 8,
                version & 0xFF
            );
            return Err(LoadError::Unsupported { what });
        }
        let end = 0x202 + u64::from(u8_at(kernel, 0x201).unwrap_or(0));
        let truncated = || LoadError::Truncated {
            what: "the Linux setup header",
            needed: end,
            present: kernel.len() as u64,
        };
        if !(HEADER_END_MIN..=HEADER_END_MAX).contains(&end) {
            return Err(LoadError::Invalid { what: "the length of the Linux setup header" });
        }
        if (kernel.len() as u64) < end {
            return Err(truncated());
        }
        // A header of an older protocol ends before the newer fields: they count as zero.
        let header = &kernel[..end as usize];
        let sectors = match u8_at(header, 0x1F1) {
            Some(0) | None => 4,
            Some(sectors) => u64::from(sectors),
        };
        Ok(Some(SetupHeader {
            version,
            end,
            payload: (sectors + 1) * 512,
            payload_size: u64::from(u32_at(header, 0x1F4).unwrap_or(0)) * 16,
            loadflags: u8_at(header, 0x211).unwrap_or(0),
            initrd_max: match u32_at(header, 0x22C) {
                Some(0) | None => INITRD_MAX_DEFAULT,
                Some(max) => u64::from(max),
            },
            relocatable: u8_at(header, 0x234) == Some(1),
            xloadflags: if version >= 0x020C { u16_at(header, 0x236).unwrap_or(0) } else { 0 },
            cmdline_max: u64::from(u32_at(header, 0x238).unwrap_or(255)),
            pref_address: if version >= 0x020A { u64_at(header, 0x258).unwrap_or(0) } else { 0 },
            init_size: if version >= 0x020A { u64::from(u32_at(header, 0x260).unwrap_or(0)) } else { 0 },
        }))
    }

    /// Where the protected-mode part is loaded.
    fn load_address(&self) -> u64 {
        let reachable = layout::HIGH_MEMORY_START..layout::LOW_RAM_MAX;
        if self.relocatable && reachable.contains(&self.pref_address) {
            self.pref_address
        } else {
            layout::HIGH_MEMORY_START
        }
    }

    /// The protected-mode part of `kernel`.
    fn payload<'a>(&self, kernel: &'a [u8]) -> Result<&'a [u8], LoadError> {
        let present = kernel.len() as u64;
        let rest = slice(kernel, self.payload, present.saturating_sub(self.payload)).unwrap_or(&[]);
        // The size is in units of 16 bytes, rounded up: the file may have 15 bytes less.
        let least = self.payload_size.saturating_sub(15).max(1);
        if (rest.len() as u64) < least {
            let needed = self.payload + least;
            return Err(LoadError::Truncated { what: "the Linux kernel proper", needed, present });
        }
        let size = if self.payload_size == 0 { rest.len() as u64 } else { self.payload_size };
        Ok(&rest[..size.min(rest.len() as u64) as usize])
    }
}

/// Places a bzImage.
pub(crate) fn load<'a>(
    kernel: &'a [u8],
    setup: &SetupHeader,
    request: &Request<'a, '_>,
) -> Result<LoadedKernel<'a>, LoadError> {
    if setup.loadflags & LOADED_HIGH == 0 {
        let what = "it is a zImage that loads below 1 MiB, expected a bzImage".to_owned();
        return Err(LoadError::Unsupported { what });
    }
    let payload = setup.payload(kernel)?;
    let mut placement = Placement::new(request.params);
    placement.keep_boot_area()?;
    let load = setup.load_address();
    let segment =
        Segment { what: "the Linux kernel", address: load, data: Cow::Borrowed(payload), zero_after: 0 };
    let image = segment.range();
    // The kernel unpacks itself into init_size bytes from where it is, or from its preferred address if that is
    // higher; the part of it that the image does not cover must be RAM and free of everything else.
    let unpack = load.max(setup.pref_address);
    let room_end = unpack.checked_add(setup.init_size).ok_or(LoadError::Invalid { what: "init_size" })?;
    placement.add(segment)?;
    let room = Range { start: image.end, end: room_end.max(image.end) };
    placement.keep("the unpacked Linux kernel", room)?;

    placement.add_cmdline(request.cmdline, setup.cmdline_max)?;
    let initrd = match request.initrd {
        Some(data) if !data.is_empty() => {
            Some(placement.add_initrd_high(data, setup.initrd_max.saturating_add(1))?)
        }
        _ => None,
    };
    let long = setup.xloadflags & XLF_KERNEL_64 != 0;
    let (mode, kind, rip) = if long {
        (EntryMode::Long64, KernelKind::Linux64, load + 0x200)
    } else {
        (EntryMode::Protected32, KernelKind::Linux32, load)
    };
    let mut params = vec![0; BOOT_PARAMS_SIZE];
    put(&mut params, HEADER_START, &kernel[HEADER_START..setup.end as usize]);
    put(&mut params, 0x214, &(load as u32).to_le_bytes());
    write_boot_params(&mut params, &placement, initrd, request.params.rsdp_address);
    Ok(finish(placement, params, EntryState::new(mode, rip), kind, initrd))
}

/// `boot_params` for an uncompressed kernel, whose file has no setup header.
pub(crate) fn bare_boot_params() -> Vec<u8> {
    let mut params = vec![0; BOOT_PARAMS_SIZE];
    put(&mut params, 0x1FE, &0xAA55u16.to_le_bytes());
    put(&mut params, 0x202, b"HdrS");
    put(&mut params, 0x206, &0x020Cu16.to_le_bytes());
    put(&mut params, 0x211, &[LOADED_HIGH]);
    put(&mut params, 0x230, &0x0100_0000u32.to_le_bytes());
    params
}

/// Writes what a loader has to fill in: loader type, command line, initial RAM disk, ACPI root, memory map.
pub(crate) fn write_boot_params(
    params: &mut [u8],
    placement: &Placement<'_>,
    initrd: Option<Range>,
    rsdp_address: u64,
) {
    let initrd = initrd.unwrap_or_default();
    put(params, 0x070, &rsdp_address.to_le_bytes());
    put(params, 0x210, &[LOADER_UNDEFINED]);
    put(params, 0x218, &(initrd.start as u32).to_le_bytes());
    put(params, 0x21C, &(initrd.size() as u32).to_le_bytes());
    put(params, 0x228, &(layout::BOOT_CMDLINE as u32).to_le_bytes());
    let entries = &placement.e820()[..placement.e820().len().min(E820_MAX)];
    put(params, 0x1E8, &[entries.len() as u8]);
    for (index, entry) in entries.iter().enumerate() {
        let at = 0x2D0 + index * 20;
        put(params, at, &entry.range.start.to_le_bytes());
        put(params, at + 8, &entry.range.size().to_le_bytes());
        put(params, at + 16, &(entry.kind as u32).to_le_bytes());
    }
}

/// Adds `boot_params` and the entry's tables and points the entry at them.
pub(crate) fn finish<'a>(
    mut placement: Placement<'a>,
    params: Vec<u8>,
    mut entry: EntryState,
    kind: KernelKind,
    initrd: Option<Range>,
) -> LoadedKernel<'a> {
    entry.gpr[RSI] = layout::BOOT_PARAMS;
    placement.add_boot(entry.tables());
    placement.add_boot([Segment {
        what: "boot parameters",
        address: layout::BOOT_PARAMS,
        data: Cow::Owned(params),
        zero_after: 0,
    }]);
    LoadedKernel { kind, segments: placement.finish(), entry, initrd }
}
