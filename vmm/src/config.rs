//! The machine as it will be built: the user's description, checked, with its files open.

use std::path::Path;
use std::sync::Arc;

use atoll_api_types::{ByteSize, OnCrash, VmSpec};
use atoll_firmware::layout::{self, AddressMap};
use atoll_machine::cpu::topology::{MAX_CPUS, Topology};
use atoll_machine::memory::RamBlock;

use crate::accelerator::{self, Choice, HostFacts};
use crate::boot_files::BootFiles;
use crate::disks::{DiskConfig, Troubles};
use crate::driver::Resources;
use crate::engine::Engine;
use crate::error::VmError;
use crate::host_options::{self, HostResources};
use crate::network::{self, Interface};
use crate::{boot, machine, models};

/// A machine that can be built.
pub(crate) struct Config {
    pub(crate) name: String,
    /// What executes the instructions, and why.
    pub(crate) accelerator: Choice,
    /// What executes the instructions now: the choice, until the machine moves to another.
    pub(crate) engine: Engine,
    pub(crate) model: Arc<atoll_machine::cpu::model::CpuModel>,
    pub(crate) topology: Topology,
    /// The host processors on which each CPU may run, by index; empty when all may.
    pub(crate) pinning: Vec<Vec<usize>>,
    pub(crate) map: AddressMap,
    pub(crate) ram: Arc<RamBlock>,
    pub(crate) boot: BootFiles,
    /// Shared with whoever changes their limits.
    pub(crate) disks: Vec<Arc<DiskConfig>>,
    pub(crate) troubles: Arc<Troubles>,
    /// Shared with the machine: their devices come and go, they stay.
    pub(crate) networks: Vec<Arc<Interface>>,
    /// Why the machine's process needs the host's network, if it does.
    pub(crate) network_needed_by: Option<String>,
    pub(crate) on_crash: OnCrash,
    pub(crate) no_reboot: bool,
    pub(crate) debug_exit: bool,
    pub(crate) uuid: [u8; 16],
}

impl Config {
    /// Checks `spec` and opens what it names. What can be wrong is found here, before anything is started.
    #[cfg(test)]
    pub(crate) fn from_spec(spec: &VmSpec) -> Result<Self, VmError> {
        Self::with_resources(spec, Resources::default())
    }

    /// As [`Config::from_spec`], with what a description cannot express.
    pub(crate) fn with_resources(spec: &VmSpec, resources: Resources) -> Result<Self, VmError> {
        let ready = resources.disks;
        check_name(&spec.name)?;
        let accelerator = accelerator::choose(spec.accel, &HostFacts::gather())?;
        let (accelerator, (engine, model)) = accelerator::open(spec.accel, accelerator, |kind| {
            let engine = Engine::open(kind)?;
            let model = models::resolve(&spec.cpu, &engine)?;
            Ok((engine, model))
        })?;
        let topology = topology(spec)?;
        let map = memory_map(spec.memory)?;
        let uuid = uuid_of(&spec.name);
        let boot = BootFiles::open(&spec.boot)?;
        let bytes = boot.read()?;
        check_host_memory(spec.memory)?;
        let ram_options = host_options::memory(spec.memory, &spec.memory_options, HostResources::gather)?;
        let pinning = host_options::pinning(spec.pin.as_ref(), topology.cpus(), HostResources::gather)?;
        let asked = spec.disks.len() + ready.len();
        if asked > machine::MAX_DISKS {
            return Err(VmError::Disks { asked, max: machine::MAX_DISKS });
        }
        boot::check(&boot, &bytes, &machine::tables(&map, topology, uuid))?;
        boot.keep(bytes);
        let mut disks = spec
            .disks
            .iter()
            .enumerate()
            .map(|disk| DiskConfig::open(disk).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        for disk in ready {
            disks.push(Arc::new(DiskConfig::ready(disks.len(), disk)));
        }
        let ram = RamBlock::with_options("ram", map.memory(), &ram_options)
            .map_err(|e| VmError::Memory(format!("cannot make {} of guest memory: {e}", spec.memory)))?;
        let around = network::Around {
            machine: &spec.name,
            cpus: topology.cpus(),
            helper: resources.helper.as_deref(),
        };
        // Last: from here on helper processes run.
        let networks = network::open(&spec.networks, &around)?;
        Ok(Self {
            name: spec.name.clone(),
            accelerator,
            engine,
            model: Arc::new(model),
            topology,
            pinning,
            map,
            ram,
            boot,
            disks,
            troubles: Arc::default(),
            networks,
            network_needed_by: network_needed_by(spec),
            on_crash: spec.on_crash,
            no_reboot: spec.no_reboot,
            debug_exit: spec.debug_exit,
            uuid,
        })
    }

    /// The machine in one line.
    pub(crate) fn summary(&self) -> String {
        let cpus = self.topology.cpus();
        format!(
            "machine {}: {cpus} CPU{} ({}, {}), {} of memory, {} disk{}, {}",
            self.name,
            if cpus == 1 { "" } else { "s" },
            self.model.name,
            self.accelerator.backend.name(),
            ByteSize(self.map.memory()),
            self.disks.len(),
            if self.disks.len() == 1 { "" } else { "s" },
            match self.networks.len() {
                0 => "no network".to_owned(),
                1 => "1 network interface".to_owned(),
                many => format!("{many} network interfaces"),
            },
        )
    }
}

fn check_name(name: &str) -> Result<(), VmError> {
    let fits = (1..=64).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if fits { Ok(()) } else { Err(VmError::Name(name.to_owned())) }
}

fn topology(spec: &VmSpec) -> Result<Topology, VmError> {
    let asked = spec.cpus.total();
    if asked == 0 || asked > u64::from(MAX_CPUS) {
        return Err(VmError::Cpus { asked, max: MAX_CPUS });
    }
    let topology =
        Topology { sockets: spec.cpus.sockets, cores: spec.cpus.cores, threads: spec.cpus.threads };
    // Sparse APIC ids of an odd topology may pass what xAPIC can address.
    if topology.apic_id(topology.cpus() - 1) >= MAX_CPUS {
        return Err(VmError::Cpus { asked, max: MAX_CPUS });
    }
    Ok(topology)
}

fn memory_map(memory: ByteSize) -> Result<AddressMap, VmError> {
    AddressMap::new(memory.0, memory.0).map_err(|_| {
        VmError::Memory(format!(
            "{memory} of memory: expected a multiple of {}, from {} to {}",
            ByteSize(layout::MEMORY_GRANULE),
            ByteSize(layout::MIN_MEMORY),
            ByteSize(layout::MAX_MEMORY)
        ))
    })
}

fn check_host_memory(memory: ByteSize) -> Result<(), VmError> {
    let host =
        atoll_foundation::host::memory().map_err(VmError::host("cannot read the host's memory size"))?;
    if memory.0 > host.usable() {
        return Err(VmError::Memory(format!(
            "{memory} of memory asked for, but this host can give at most {}M; choose less with --memory",
            host.usable() >> 20
        )));
    }
    Ok(())
}

/// A disk on a server is connected to again when the connection is lost.
fn network_needed_by(spec: &VmSpec) -> Option<String> {
    let on_server = |path: &Path| path.to_string_lossy().to_ascii_lowercase().starts_with("nbd://");
    let disk = spec.disks.iter().find(|disk| on_server(&disk.path))?;
    Some(format!("disk {} is on a server", disk.path.display()))
}

/// A stable UUID (version 8, RFC 9562) made from the machine's name, so that a guest sees the same machine
/// at every start.
fn uuid_of(name: &str) -> [u8; 16] {
    // FNV-1a with two offsets; identity, not security.
    let hash = |mut h: u64| {
        for byte in name.bytes() {
            h = (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        h
    };
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_be_bytes());
    uuid[8..].copy_from_slice(&hash(0x6c62_272e_07bb_0142).to_be_bytes());
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_options_or_paths_are_refused() {
        for name in ["vm", "a.b-c_9", "Z"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "-x", ".hidden", "a/b", "ü", "a b", &"x".repeat(65)] {
            assert!(matches!(check_name(name), Err(VmError::Name(_))), "{name}");
        }
    }

    #[test]
    fn the_same_name_gives_the_same_uuid_and_another_name_another() {
        assert_eq!(uuid_of("a"), uuid_of("a"));
        assert_ne!(uuid_of("a"), uuid_of("b"));
        assert_eq!(uuid_of("a")[6] >> 4, 8);
    }

    #[test]
    fn wrong_sizes_and_counts_are_one_clear_line() {
        let mut spec = VmSpec::named("t");
        spec.networks = Vec::new();
        spec.boot.kernel = Some("/dev/null".into());
        spec.memory = ByteSize(1000);
        assert!(matches!(Config::from_spec(&spec), Err(VmError::Memory(_))));
        spec.memory = ByteSize(512 << 20);
        spec.cpus.cores = 256;
        assert!(matches!(Config::from_spec(&spec), Err(VmError::Cpus { asked: 256, .. })));
        spec.cpus.cores = 1;
        assert!(matches!(Config::from_spec(&spec), Err(VmError::File { what: "kernel", .. })));
    }
}
