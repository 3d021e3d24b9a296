//! Every device as a section of the machine's saved state.
//!
//! Restore wires and interrupt controllers first ([`crate::gsi`], [`crate::pic`], [`crate::ioapic`]), then the
//! devices, processors last: a device drives its wire when it is restored, and a wire that already has its level
//! makes no edge. Guest time comes before all of them.

use atoll_machine::state::{RestoreError, SaveState};

/// The two shapes of a restore: one that takes anything, and one that can refuse.
macro_rules! section {
    ($device:ty, $saved:ty) => {
        impl SaveState for $device {
            type Saved = $saved;
            fn save(&self) -> $saved {
                <$device>::save(self)
            }
            fn restore(&self, saved: $saved) -> Result<(), RestoreError> {
                <$device>::restore(self, &saved);
                Ok(())
            }
        }
    };
    (try $device:ty, $saved:ty) => {
        impl SaveState for $device {
            type Saved = $saved;
            fn save(&self) -> $saved {
                <$device>::save(self)
            }
            fn restore(&self, saved: $saved) -> Result<(), RestoreError> {
                Ok(<$device>::restore(self, &saved)?)
            }
        }
    };
}

section!(crate::acpi_pm::AcpiPm, crate::acpi_pm::saved_state::AcpiPmStateV1);
section!(crate::debug_port::PostPort, crate::debug_port::saved_state::PostPortStateV1);
section!(crate::gsi::Gsi, crate::gsi::saved_state::GsiStateV1);
section!(try crate::host_bridge::HostBridge, crate::host_bridge::saved_state::HostBridgeStateV1);
section!(crate::i8042::I8042, crate::i8042::saved_state::I8042StateV1);
section!(crate::ioapic::IoApic, crate::ioapic::saved_state::IoApicStateV1);
section!(try crate::lpc::LpcBridge, crate::lpc::saved_state::LpcBridgeStateV1);
section!(crate::pic::Pic, crate::pic::saved_state::PicStateV1);
section!(crate::pit::Pit, crate::pit::saved_state::PitStateV1);
section!(crate::reset::ResetControl, crate::reset::saved_state::ResetControlStateV1);
section!(try crate::root_port::RootPort, crate::root_port::saved_state::RootPortStateV1);
section!(crate::rtc::Rtc, crate::rtc::saved_state::RtcStateV1);
section!(crate::uart::Uart, crate::uart::saved_state::UartStateV1);
section!(try crate::watchdog::Watchdog, crate::watchdog::saved_state::WatchdogStateV1);
