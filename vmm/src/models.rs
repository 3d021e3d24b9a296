//! The CPU models, as a user chooses among them.

use atoll_machine::cpu::host::HostCpu;
use atoll_machine::cpu::model::{CpuModel, MODEL_NAMES, ModelError};

use crate::accelerator::BackendKind;
use crate::engine::Engine;
use crate::error::VmError;

/// Whether something can give a model: if not, the features that are missing, comma separated.
pub type Given = Result<(), String>;

/// A CPU model and what of this host can give it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// What `--cpu` takes.
    pub name: &'static str,
    /// What it is, in a few words.
    pub description: &'static str,
    /// Whether the software CPU gives it.
    pub software: Given,
    /// Whether KVM gives it; `None` where this host has no usable KVM.
    pub kvm: Option<Given>,
}

/// Every model, whether or not this host can give it. Opens `/dev/kvm` where there is one.
pub fn cpu_models() -> Vec<ModelInfo> {
    let kvm = Engine::open(BackendKind::Kvm).ok();
    let given = |name, engine: &Engine| match on_this_host(name, engine) {
        Err(ModelError::Missing { missing, .. }) => Err(missing.to_string()),
        Err(other) => Err(other.to_string()),
        Ok(_) => Ok(()),
    };
    let info = |name: &&'static str| ModelInfo {
        name,
        description: description(name),
        software: given(name, &Engine::Software),
        kvm: kvm.as_ref().map(|kvm| given(name, kvm)),
    };
    MODEL_NAMES.iter().map(info).collect()
}

fn description(name: &str) -> &'static str {
    match name {
        "atoll-base" => "x86-64-v3 with AES, PCLMUL and RDRAND; the same on every host",
        "atoll-2026" => "atoll-base with SHA, RDSEED, PCID, INVPCID and XSAVEC",
        "host" => "what this host has; a machine with it may not move to another host",
        _ => "",
    }
}

/// The model called `name` on this host, for `engine`.
pub(crate) fn resolve(name: &str, engine: &Engine) -> Result<CpuModel, VmError> {
    on_this_host(name, engine).map_err(|error| VmError::Model(error.to_string()))
}

fn on_this_host(name: &str, engine: &Engine) -> Result<CpuModel, ModelError> {
    let host = HostCpu::detect();
    CpuModel::resolve_for(name, &host, &engine.features(), engine.tsc_khz(&host))
}
