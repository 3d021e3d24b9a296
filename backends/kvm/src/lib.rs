//! The CPU backend on the Linux kernel's KVM, for Intel and AMD hosts.
