//! The verbs, one file each.

pub(crate) mod cpus;
pub(crate) mod disk;
pub(crate) mod doctor;
pub(crate) mod network_user;
mod quick_start;
pub(crate) mod run;
