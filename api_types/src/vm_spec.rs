//! A virtual machine as a document.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, CpuPinning, CpuTopology, DiskSpec, MemoryOptions, NetSpec};

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// KVM where the host has it, the software CPU otherwise.
    #[default]
    Auto,
    /// The host processor's virtualization, or refuse.
    Kvm,
    /// Atoll's own software CPU.
    Software,
}

/// What a crash of the guest (a pvpanic event or a triple fault) leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCrash {
    /// The run ends with exit code 3.
    #[default]
    Exit,
    /// The machine is reset and boots again.
    Reset,
}

/// What the machine starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// Kernel: bzImage, PVH or plain ELF, Multiboot 1.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub append: String,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Name: letters, digits, `-`, `_` and `.`, at most 64.
    pub name: String,
    /// What executes its instructions.
    #[serde(default)]
    pub accel: Accelerator,
    /// CPU model.
    #[serde(default = "default_cpu")]
    pub cpu: String,
    /// Processors.
    #[serde(default)]
    pub cpus: CpuTopology,
    /// RAM.
    #[serde(default = "default_memory")]
    pub memory: ByteSize,
    /// How the host provides the RAM.
    #[serde(default)]
    pub memory_options: MemoryOptions,
    /// The host processors on which its CPUs run; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<CpuPinning>,
    /// What it starts.
    #[serde(default)]
    pub boot: BootSpec,
    /// Its disks, the first one first.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Its network interfaces, the first one first; user-mode NAT when absent.
    #[serde(default = "default_networks")]
    pub networks: Vec<NetSpec>,
    /// What a crash leads to.
    #[serde(default)]
    pub on_crash: OnCrash,
    /// A reboot ends the run instead of starting over.
    #[serde(default)]
    pub no_reboot: bool,
    /// The debug-exit port exists.
    #[serde(default)]
    pub debug_exit: bool,
}

/// The CPU model of machines that name none.
pub const DEFAULT_CPU: &str = "atoll-base";
/// RAM of machines that name no size.
pub const DEFAULT_MEMORY: ByteSize = ByteSize(512 << 20);

fn default_cpu() -> String {
    DEFAULT_CPU.to_owned()
}
fn default_memory() -> ByteSize {
    DEFAULT_MEMORY
}
fn default_networks() -> Vec<NetSpec> {
    vec![NetSpec::default()]
}

impl VmSpec {
    /// A machine called `name` with every default.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            accel: Accelerator::default(),
            cpu: default_cpu(),
            cpus: CpuTopology::default(),
            memory: default_memory(),
            memory_options: MemoryOptions::default(),
            pin: None,
            boot: BootSpec::default(),
            disks: Vec::new(),
            networks: default_networks(),
            on_crash: OnCrash::default(),
            no_reboot: false,
            debug_exit: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_with_only_a_name_has_every_default_and_reads_back() {
        let spec: VmSpec = serde_json::from_str(r#"{"name": "a"}"#).unwrap();
        assert_eq!(spec, VmSpec::named("a"));
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec);
        assert!(serde_json::from_str::<VmSpec>(r#"{"name": "a", "memroy": "1G"}"#).is_err());
    }
}
