//! Guests for Atoll: kernels, user space and initramfs images, obtained without root.
//!
//! `atoll run` without arguments, `cargo xtask` and the tests all need a real Linux kernel and a small user
//! space. On Debian and Ubuntu this crate gets them from the distribution itself: the host's own `apt-get`
//! downloads packages into a private directory and verifies their signatures, `dpkg-deb` unpacks them there,
//! nothing is installed and nothing outside the user's cache is written.
//!
//! | module | purpose |
//! |---|---|
//! | [`cache`] | the directory in the user's cache: one writer at a time, nothing half-written |
//! | [`apt`] | private package-manager state, downloads, progress |
//! | [`kernel`] | which kernel packages exist and how to fetch one |
//! | [`modules`] | kernel modules: dependency order, decompression |
//! | [`cpio`] | writer of the `newc` archive format |
//! | [`initramfs`] | the images: quick start, benchmark program, root file system on a disk |
//! | [`debian`] | a whole Debian 12 root file system as a raw ext4 disk image |
//!
//! Neighbours: the binary (`bin/atoll`) and `xtask` use it; it names no other crate of the workspace.
//! Lock order: [`cache::Cache::lock`] is the only lock and is never taken twice.
#![forbid(unsafe_code)]

pub mod apt;
pub mod cache;
pub mod cpio;
pub mod debian;
mod error;
pub mod initramfs;
pub mod kernel;
pub mod modules;
mod progress;
pub mod quick_start;

pub use cache::Cache;
pub use error::Error;
pub use kernel::{GuestKernel, KernelFiles};
pub use progress::{Progress, Quiet};
pub use quick_start::{QuickStart, quick_start};

/// Result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;
