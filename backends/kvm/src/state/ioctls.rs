//! The requests to KVM that `kvm-ioctls` has no safe function for.
//!
//! Specification: the Linux kernel's virt/kvm/api and virt/kvm/devices/vcpu.

// UNSAFETY: ioctl takes addresses; each function here hands over one that lives for the call, of the type or the
// size that the request reads and writes.
#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);

/// Bytes that KVM_GET_XSAVE fills, and the least that KVM_SET_XSAVE reads.
pub(super) const XSAVE_SIZE: usize = size_of::<kvm_xsave>();

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn tsc_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}

/// What the kernel adds to the (scaled) host TSC for this vCPU, what the guest wrote included.
pub(crate) fn tsc_offset(fd: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let attribute = tsc_attribute(&raw mut value);
    // SAFETY: the kernel reads the attribute and writes 8 bytes at its address, which is `value`'s.
    done(unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(value)
}

/// Sets what [`tsc_offset`] reads.
pub(crate) fn set_tsc_offset(fd: &VcpuFd, mut offset: u64) -> io::Result<()> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the kernel reads the attribute and 8 bytes at its address, which is `offset`'s.
    done(unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) })
}

/// The processor's own counter, as KVM reads it.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no effect but its result; Linux lets every program execute it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// An area of words, so that it is aligned as the kernel's structure is.
fn area(size: usize) -> Vec<u64> {
    vec![0; size.max(XSAVE_SIZE).div_ceil(8)]
}

/// The XSAVE area in standard format. `size` is what KVM_CAP_XSAVE2 says for the VM; 0 where it says nothing.
pub(super) fn xsave(fd: &VcpuFd, size: usize) -> io::Result<Vec<u8>> {
    let mut words = area(size);
    let request = if size == 0 { KVM_GET_XSAVE() } else { KVM_GET_XSAVE2() };
    // SAFETY: KVM_GET_XSAVE writes XSAVE_SIZE bytes, KVM_GET_XSAVE2 as many as KVM_CAP_XSAVE2 said; `words` has
    // both. No feature that enlarges the area is ever requested by this process.
    done(unsafe { ioctl_with_mut_ptr(fd, request, words.as_mut_ptr()) })?;
    Ok(words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

/// Sets the XSAVE area. `size` as in [`xsave`].
pub(super) fn set_xsave(fd: &VcpuFd, size: usize, image: &[u8]) -> io::Result<()> {
    let mut words = area(size);
    for (word, bytes) in words.iter_mut().zip(image.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_le_bytes(whole);
    }
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 said, and at least XSAVE_SIZE; `words` has them.
    done(unsafe { ioctl_with_ptr(fd, KVM_SET_XSAVE(), words.as_ptr()) })
}
