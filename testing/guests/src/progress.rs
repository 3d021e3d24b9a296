//! Progress reporting, so that the binary can draw bars and the tests stay quiet.

/// Receives what a long operation is doing. Calls come from the calling thread, in the order
/// `step`, any number of `percent`, next `step` ..., and `done` once at the end of a successful operation.
pub trait Progress {
    /// A new step begins; `what` is a short phrase such as `downloading linux-image-cloud-amd64`.
    fn step(&mut self, what: &str);
    /// The current step is `percent` (0.0 to 100.0) complete.
    fn percent(&mut self, percent: f32);
    /// Everything is there.
    fn done(&mut self);
}

/// Says nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&mut self, _what: &str) {}
    fn percent(&mut self, _percent: f32) {}
    fn done(&mut self) {}
}
