//! The CPU models, as a user chooses among them.

use atoll_machine::cpu::host::HostCpu;
use atoll_machine::cpu::model::{CpuModel, MODEL_NAMES, ModelError};

use crate::engine::Engine;
use crate::error::VmError;

/// A CPU model and whether this host can give it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// What `--cpu` takes.
    pub name: &'static str,
    /// What it is, in a few words.
    pub description: &'static str,
    /// The features that this host lacks, comma separated; `None` when it can give the model.
    pub missing: Option<String>,
}

/// Every model, whether or not this host can give it.
pub fn cpu_models() -> Vec<ModelInfo> {
    MODEL_NAMES
        .iter()
        .map(|name| ModelInfo {
            name,
            description: description(name),
            missing: match on_this_host(name, &Engine::Software) {
                Err(ModelError::Missing { missing, .. }) => Some(missing.to_string()),
                Err(other) => Some(other.to_string()),
                Ok(_) => None,
            },
        })
        .collect()
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
