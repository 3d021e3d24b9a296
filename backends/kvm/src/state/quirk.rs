//! The quirk `TCG_XCR0`: a host whose processor is emulated by QEMU and whose SVM does not intercept XSETBV.
//!
//! On such a host the guest's XSETBV changes the processor's XCR0 behind KVM's back, and KVM puts its own value, 1 since
//! RESET, back at the next entry; AVX instructions then fault. So there KVM has the model's whole mask from the start.
//! That cannot be seen as long as CR4.OSXSAVE is clear, because XGETBV, XSETBV and AVX instructions fault then; so
//! [`seen`] says what was set until the guest runs with CR4.OSXSAVE set, and the mask from then on.
//! The difference that remains: such a guest finds all of XCR0 enabled before its first XSETBV.
//!
//! The quirk is for development machines: real processors intercept XSETBV always.

use std::arch::x86_64::__cpuid;
use std::sync::OnceLock;

const CR4_OSXSAVE: u64 = 1 << 18;

/// Whether this host has the quirk.
pub(super) fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        let (features, signature) = (__cpuid(1), __cpuid(0x4000_0000));
        let hypervisor = features.ecx >> 31 & 1 != 0;
        hypervisor && is_tcg([signature.ebx, signature.ecx, signature.edx])
    })
}

fn is_tcg(signature: [u32; 3]) -> bool {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    signature == [word(b"TCGT"), word(b"CGTC"), word(b"GTCG")]
}

/// XCR0 of a state on a host with the quirk. `set` is what was set last and holds until the guest ran with CR4 as it
/// is now.
pub(super) fn seen(set: u64, mask: u64, cr4: u64, ran: bool) -> u64 {
    if ran && cr4 & CR4_OSXSAVE != 0 { mask } else { set }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulator_is_known_by_its_signature() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        assert!(is_tcg([word(b"TCGT"), word(b"CGTC"), word(b"GTCG")]));
        assert!(!is_tcg([word(b"KVMK"), word(b"VMKV"), 77]) && !is_tcg([0; 3]));
    }

    #[test]
    fn power_on_is_honest_until_the_guest_could_look() {
        assert_eq!(seen(1, 7, 0, false), 1);
        assert_eq!(seen(1, 7, 0, true), 1, "no instruction can tell");
        assert_eq!(seen(1, 7, CR4_OSXSAVE, false), 1, "what was set is what is there");
        assert_eq!(seen(3, 7, CR4_OSXSAVE, true), 7);
    }
}
