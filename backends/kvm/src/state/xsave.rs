//! x87, SSE and AVX registers: the XSAVE area in standard format ⇄ KVM's.
//!
//! Both sides use the same format (Intel SDM vol. 1, 13.4). `CpuState` wants every component of XCR0 in the area;
//! KVM leaves out those in their initial state but writes their initial values, so marking them present is enough.
//! Components outside XCR0 are kept if they are in use: SSE does not depend on XCR0.
//!
//! A host without XSAVE (`kvm_pvm`) gives the first 512 bytes by KVM_GET_FPU.

use kvm_bindings::kvm_fpu;

const HEADER: usize = 512;
/// Legacy region and header.
const MIN: usize = 576;
/// Upper halves of the YMM registers follow the header.
const WITH_AVX: usize = MIN + 256;
const AVX: u64 = 4;
/// The software-available bytes of the legacy region.
const UNUSED: std::ops::Range<usize> = 416..512;

fn header(image: &[u8]) -> u64 {
    let bytes = image.get(HEADER..HEADER + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(bytes.unwrap_or_default())
}

/// The area of a state from KVM's. `mask` is the model's XCR0 mask.
pub(super) fn from_kvm(area: &[u8], xcr0: u64, mask: u64) -> Vec<u8> {
    let present = (header(area) | xcr0) & mask;
    let length = if present & AVX != 0 { WITH_AVX } else { MIN };
    let mut image = area.get(..length).unwrap_or(area).to_vec();
    image.resize(length, 0);
    image[UNUSED].fill(0);
    image[HEADER..MIN].fill(0);
    image[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
    image
}

/// The area for KVM.
pub(super) fn to_kvm(image: &[u8], mask: u64) -> Vec<u8> {
    let mut area = image.to_vec();
    area.resize(image.len().max(WITH_AVX), 0);
    area[UNUSED].fill(0);
    let present = header(image) & mask;
    area[HEADER..MIN].fill(0);
    area[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
    area
}

/// The legacy region in the form of KVM_SET_FPU. What the header leaves out is initial.
pub(super) fn to_fpu(image: &[u8]) -> kvm_fpu {
    let mut fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() };
    let half = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let long =
        |at: usize| image.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    let present = header(image);
    if image.len() < MIN {
        return fpu;
    }
    if present & 1 != 0 {
        (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode) = (half(0), half(2), image[4], half(6));
        (fpu.last_ip, fpu.last_dp) = (long(8), long(16));
        for (n, register) in fpu.fpr.iter_mut().enumerate() {
            register[..10].copy_from_slice(&image[32 + n * 16..42 + n * 16]);
        }
    }
    if present & 2 != 0 {
        for (n, register) in fpu.xmm.iter_mut().enumerate() {
            register.copy_from_slice(&image[160 + n * 16..176 + n * 16]);
        }
    }
    let mxcsr = long(24) as u32;
    if present & 6 != 0 || mxcsr != 0 {
        fpu.mxcsr = mxcsr;
    }
    fpu
}

/// The inverse of [`to_fpu`]; `xcr0` as in [`from_kvm`].
pub(super) fn from_fpu(fpu: &kvm_fpu, xcr0: u64) -> Vec<u8> {
    let mut image = vec![0; MIN];
    image[0..2].copy_from_slice(&fpu.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fpu.fsw.to_le_bytes());
    image[4] = fpu.ftwx;
    image[6..8].copy_from_slice(&fpu.last_opcode.to_le_bytes());
    image[8..16].copy_from_slice(&fpu.last_ip.to_le_bytes());
    image[16..24].copy_from_slice(&fpu.last_dp.to_le_bytes());
    image[24..28].copy_from_slice(&fpu.mxcsr.to_le_bytes());
    for (n, register) in fpu.fpr.iter().enumerate() {
        image[32 + n * 16..42 + n * 16].copy_from_slice(&register[..10]);
    }
    for (n, register) in fpu.xmm.iter().enumerate() {
        image[160 + n * 16..176 + n * 16].copy_from_slice(register);
    }
    let sse = if fpu.xmm.iter().flatten().any(|b| *b != 0) || fpu.mxcsr != 0x1f80 { 2 } else { 0 };
    image[HEADER] = ((xcr0 & 3) | 1 | sse) as u8;
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn areas_come_back_as_they_were(bytes in proptest::collection::vec(any::<u8>(), WITH_AVX)) {
            let mut image = bytes;
            image[UNUSED].fill(0);
            image[HEADER..MIN].fill(0);
            image[HEADER] = 7;
            let mut kernels = to_kvm(&image, 7);
            kernels.resize(4096, 0);
            prop_assert_eq!(from_kvm(&kernels, 7, 7), image);
        }

        #[test]
        fn the_old_form_carries_the_legacy_region(bytes in proptest::collection::vec(any::<u8>(), MIN)) {
            let mut image = bytes;
            image[HEADER..MIN].fill(0);
            image[HEADER] = 3;
            let fpu = to_fpu(&image);
            let back = from_fpu(&fpu, 3);
            prop_assert_eq!(to_fpu(&back), fpu);
            for range in [0..5, 6..28, 160..416, HEADER..MIN] {
                prop_assert_eq!(&back[range.clone()], &image[range]);
            }
            for n in 0..8 {
                let at = 32 + n * 16;
                prop_assert_eq!(&back[at..at + 10], &image[at..at + 10]);
            }
        }
    }

    #[test]
    fn the_area_has_every_enabled_component_and_no_unknown_one() {
        let mut area = vec![0; 4096];
        area[HEADER] = 0b10;
        area[HEADER + 1] = 2; // PKRU
        assert_eq!(from_kvm(&area, 1, 7)[HEADER], 0b11);
        assert_eq!(from_kvm(&area, 1, 7).len(), MIN);
        let full = from_kvm(&area, 7, 7);
        assert_eq!((full.len(), full[HEADER], full[HEADER + 1]), (WITH_AVX, 7, 0));
        let mut wide = vec![0; MIN];
        wide[HEADER] = 7;
        assert_eq!(to_kvm(&wide, 3)[HEADER], 3, "the model has no AVX");
    }

    #[test]
    fn components_that_are_left_out_are_initial_in_the_old_form() {
        let mut image = vec![0xff; MIN];
        image[HEADER..MIN].fill(0);
        image[24..28].fill(0);
        let fpu = to_fpu(&image);
        assert_eq!((fpu.fcw, fpu.mxcsr, fpu.xmm[0][0], fpu.fpr[0][0]), (0x37f, 0x1f80, 0, 0));
    }
}
