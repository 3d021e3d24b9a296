//! x87, SSE and AVX registers: the XSAVE area in standard format ⇄ KVM's.
//!
//! Both sides use the same format (Intel SDM vol. 1, 13.4). `CpuState` wants every component of XCR0 in the area;
//! KVM leaves out those in their initial state but writes their initial values, so marking them present is enough.
//! Components outside XCR0 are kept if they are in use: SSE does not depend on XCR0.
//!
//! A host without XSAVE (`kvm_pvm`) uses the same requests with x87 and SSE alone. KVM_SET_FPU would not do: it
//! leaves MXCSR out.

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

/// Components that exist without XSAVE.
const LEGACY: u64 = 3;
/// Places of the components in the area, with their initial values: x87 with its control word apart, SSE.
const X87: std::ops::Range<usize> = 0..24;
const X87_REGISTERS: std::ops::Range<usize> = 32..160;
const XMM: std::ops::Range<usize> = 160..416;
const INITIAL_CONTROL: u16 = 0x37f;
const MXCSR: std::ops::Range<usize> = 24..28;
const INITIAL_MXCSR: u32 = 0x1f80;

/// The area of a state from KVM's. `mask` is the model's XCR0 mask.
pub(super) fn from_kvm(area: &[u8], xcr0: u64, mask: u64) -> Vec<u8> {
    let present = (header(area) | xcr0) & (mask | LEGACY);
    let length = if present & AVX != 0 { WITH_AVX } else { MIN };
    let mut image = area.get(..length).unwrap_or(area).to_vec();
    image.resize(length, 0);
    image[UNUSED].fill(0);
    image[HEADER..MIN].fill(0);
    image[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
    image
}

/// The area for KVM. What the header leaves out is initial, which a host without XSAVE would not see to.
pub(super) fn to_kvm(image: &[u8], mask: u64) -> Vec<u8> {
    let mut area = image.to_vec();
    area.resize(image.len().max(WITH_AVX), 0);
    area[UNUSED].fill(0);
    let present = header(image) & (mask | LEGACY);
    if present & 1 == 0 {
        area[X87].fill(0);
        area[..2].copy_from_slice(&INITIAL_CONTROL.to_le_bytes());
        area[X87_REGISTERS].fill(0);
    }
    if present & 2 == 0 {
        area[XMM].fill(0);
    }
    if present & !1 == 0 && area[MXCSR] == [0; 4] {
        area[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    }
    area[HEADER..MIN].fill(0);
    area[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
    area
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
    fn components_that_are_left_out_are_initial() {
        let mut image = vec![0xff; MIN];
        image[HEADER..MIN].fill(0);
        image[MXCSR].fill(0);
        let area = to_kvm(&image, 7);
        assert_eq!(area[..4], [0x7f, 3, 0, 0]);
        assert_eq!(area[MXCSR], INITIAL_MXCSR.to_le_bytes());
        assert!(area[XMM].iter().chain(&area[X87_REGISTERS]).all(|b| *b == 0));
        image[HEADER] = 2;
        assert_eq!(to_kvm(&image, 7)[160], 0xff);
    }

    #[test]
    fn vector_registers_are_kept_without_xsave() {
        let mut area = vec![0; 4096];
        area[HEADER] = 3;
        area[160] = 5;
        let image = from_kvm(&area, 1, 1);
        assert_eq!((image[HEADER], image[160], to_kvm(&image, 1)[HEADER]), (3, 5, 3));
    }
}
