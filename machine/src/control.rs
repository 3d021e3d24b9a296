//! What devices and vCPUs ask of the machine as a whole.

use std::sync::Arc;

/// A request that ends or restarts the run of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineRequest {
    /// Power off (ACPI S5).
    PowerOff,
    /// Reset in place (reset register, keyboard controller, watchdog).
    Reset,
    /// The guest says that it crashed (pvpanic event).
    GuestPanic,
    /// A vCPU shut down (triple fault).
    TripleFault {
        /// Index of the vCPU.
        vcpu: u32,
    },
    /// The debug-exit port was written: the run ends with a status made from `value`.
    DebugExit {
        /// The value written.
        value: u32,
    },
    /// A vCPU did what its backend cannot carry out; as much the guest's doing as a triple fault.
    BeyondEngine {
        /// Index of the vCPU.
        vcpu: u32,
    },
    /// A vCPU met a condition that its backend cannot continue from.
    InternalError {
        /// Index of the vCPU.
        vcpu: u32,
    },
}

/// Where requests go: implemented by `vmm/`. Never blocks; may be called with device locks held.
pub trait MachineControl: Send + Sync {
    /// Queues `request`; the vCPUs stop soon after.
    fn request(&self, request: MachineRequest);
}

/// The usual way to hold a [`MachineControl`].
pub type SharedControl = Arc<dyn MachineControl>;
