//! The whole machine but its memory, as a saved-state container, and back.
//!
//! Sections, in the order in which they are restored: `clock`, `chipset/…`, `pci/…`, `cpu/N`. Local APICs come
//! last, because what the devices raise while they are restored must not reach the guest twice. Memory is not
//! part of it: it stays where it is, or moves by other means.

use std::sync::Arc;

use atoll_machine::backend::{Backend, Partition};
use atoll_machine::cpu::saved_state::CpuStateV1;
use atoll_machine::cpu::state::CpuState;
use atoll_machine::state::{
    ARCH_X86_64, ContainerError, RestoreError, SaveState, StateReader, StateSection, StateWriter,
};
use atoll_machine::time::{Clock, HostClock};

use super::Machine;
use crate::error::VmError;
use crate::vcpu_thread::VcpuThread;

/// Name of the machine type in every saved state.
pub(crate) const MACHINE_NAME: &str = "atoll-1";

/// Guest time.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ClockStateV1 {
    /// Nanoseconds of guest time; default 0.
    #[prost(uint64, optional, tag = "1")]
    pub(super) now_ns: Option<u64>,
}

struct ClockSection(Arc<HostClock>);

impl SaveState for ClockSection {
    type Saved = ClockStateV1;
    fn save(&self) -> ClockStateV1 {
        ClockStateV1 { now_ns: Some(self.0.now()) }
    }
    fn restore(&self, saved: ClockStateV1) -> Result<(), RestoreError> {
        if self.0.set(saved.now_ns.unwrap_or(0)) {
            Ok(())
        } else {
            Err(RestoreError::invalid("now_ns", "the machine's clock runs; pause the machine first"))
        }
    }
}

struct CpuSection<'a, P: Partition>(&'a VcpuThread<P>);

impl<P: Partition> SaveState for CpuSection<'_, P> {
    type Saved = CpuStateV1;
    fn save(&self) -> CpuStateV1 {
        // A vCPU thread ends only with its machine.
        self.0.state().as_ref().map(CpuStateV1::from).unwrap_or_default()
    }
    fn restore(&self, saved: CpuStateV1) -> Result<(), RestoreError> {
        self.0.set_state(CpuState::try_from(&saved)?).map_err(RestoreError::from)
    }
}

impl<B: Backend> Machine<B>
where
    <B::Partition as Partition>::Vcpu: 'static,
{
    /// See [`AnyMachine::save`](super::AnyMachine::save).
    pub(super) fn save_sections(&self) -> Result<Vec<u8>, VmError> {
        let mut writer = StateWriter::new(MACHINE_NAME, env!("CARGO_PKG_VERSION"));
        self.with_sections(|sections| {
            for (name, section) in sections {
                writer.save(name, *section, true);
            }
        });
        let mut bytes = Vec::new();
        writer.write_to(&mut bytes).map_err(VmError::build)?;
        Ok(bytes)
    }

    /// See [`AnyMachine::restore`](super::AnyMachine::restore).
    pub(super) fn restore_sections(&self, saved: &[u8]) -> Result<(), ContainerError> {
        let reader = StateReader::new(saved)?;
        let header = reader.header();
        for (what, found, expected) in
            [("machine", &header.machine, MACHINE_NAME), ("architecture", &header.guest_arch, ARCH_X86_64)]
        {
            if found != expected {
                return Err(ContainerError::Restore {
                    name: what.to_owned(),
                    source: RestoreError::invalid(
                        "header",
                        format!("is {found}, this machine is {expected}"),
                    ),
                });
            }
        }
        self.with_sections(|sections| reader.restore(sections))?;
        Ok(())
    }

    fn with_sections<R>(&self, use_them: impl FnOnce(&[(&str, &dyn StateSection)]) -> R) -> R {
        let clock = ClockSection(self.clock.clone());
        let cpus: Vec<(String, CpuSection<'_, B::Partition>)> = self
            .vcpus
            .iter()
            .enumerate()
            .map(|(index, vcpu)| (format!("cpu/{index}"), CpuSection(vcpu)))
            .collect();
        let mut sections: Vec<(&str, &dyn StateSection)> = vec![("clock", &clock)];
        sections.extend(self.sections.iter().map(|(name, section)| (name.as_str(), section.as_ref() as _)));
        sections.extend(cpus.iter().map(|(name, section)| (name.as_str(), section as _)));
        use_them(&sections)
    }
}
