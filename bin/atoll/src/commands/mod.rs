//! The verbs, one file each.

pub(crate) mod cpus;
mod quick_start;
pub(crate) mod run;
