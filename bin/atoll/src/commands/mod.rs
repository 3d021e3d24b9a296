//! The verbs, one file each.

pub(crate) mod cpus;
pub(crate) mod doctor;
mod quick_start;
pub(crate) mod run;
