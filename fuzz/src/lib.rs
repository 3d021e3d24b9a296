//! What the fuzz targets share: a reader of inputs, seeds, and a machine around one vCPU.
//!
//! * [`script`] turns an input into numbers; it runs out into zeros, so every input is complete.
//! * [`seeds`] puts a few inputs made by code into the corpus when a target starts.
//! * [`machine`] is a machine of one vCPU that notices stray stores and ends every run.
//! * [`layout`] is the guest it starts from: descriptor tables, tasks, page tables, handlers, in eight modes.

pub mod layout;
pub mod machine;
pub mod script;
pub mod seeds;
