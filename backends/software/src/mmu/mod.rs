//! Linear-address translation: soft TLBs in front of the paging-structure walker, and guest RAM behind them.
//!
//! ```text
//! handler ──linear──► data TLB ──hit──► host load / store, page flag byte
//!                        │ miss
//!                        ▼
//!                     access.rs slow path: canonical, alignment, watchpoints, page crossing
//!                        ▼
//!                     walk.rs (A/D flags) ──► FlatView ──► RAM: fill the TLB; device: `CpuIo`
//! ```
//!
//! | file | contents |
//! |---|---|
//! | [`raw`] | one host instruction per guest access |
//! | [`walk`] | the walker, testable alone |
//! | [`tlb`] | arrays, tags, flushing |
//! | [`fill`] | walks for this processor, TLB fills, physical accesses |
//!
//! The [`Mmu`] keeps the [`FlatView`] alive whose blocks its entries point into; a new generation of the
//! address space empties the TLBs before the view is let go.

use std::sync::Arc;

use atoll_machine::memory::FlatView;

pub mod fill;
pub mod raw;
pub mod tlb;
pub mod walk;

pub use tlb::Mmu;

/// A data breakpoint that an access hit, for DR6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WatchHits(pub u64);

/// The view and its generation.
#[derive(Default)]
pub(crate) struct ViewCache {
    pub(crate) view: Arc<FlatView>,
    pub(crate) generation: Option<u64>,
}

#[cfg(test)]
mod walk_tests;
