//! atoll-vmm
