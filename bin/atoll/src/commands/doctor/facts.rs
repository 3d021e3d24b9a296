//! What the doctor looks at: one value, gathered at once, judged later.

use atoll_api_types::Accelerator;
use atoll_foundation::host::cgroup::{self, Cgroup};
use atoll_foundation::host::limits::{self, Capabilities, Limit};
use atoll_foundation::host::numa::{self, NumaNode};
use atoll_foundation::host::pages::{self, HugePagePool, Ksm, TransparentHugePages};
use atoll_foundation::host::processor::{self, NestedParameter, Processor};
use atoll_foundation::host::rights::{self, Attempt};
use atoll_foundation::host::{self, HostMemory};
use atoll_vmm::{Choice, HostFacts, ModelInfo};

/// The host's time-stamp counter.
pub(super) struct Tsc {
    /// Its frequency in kHz, where the host says it exactly.
    pub(super) exact_khz: Option<u32>,
    /// Its frequency in kHz as far as it is known.
    pub(super) khz: u32,
    /// The clock that the kernel reads.
    pub(super) clocksource: String,
}

/// Settings of the kernel that take rights away, where there are such settings.
#[derive(Default)]
pub(super) struct Settings {
    /// `user.max_user_namespaces`.
    pub(super) max_user_namespaces: Option<u64>,
    /// `kernel.unprivileged_userns_clone` (Debian).
    pub(super) userns_clone: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns` (Ubuntu).
    pub(super) apparmor_userns: Option<u64>,
    /// `vm.unprivileged_userfaultfd`.
    pub(super) userfaultfd: Option<u64>,
    /// `kernel.io_uring_disabled`.
    pub(super) io_uring_disabled: Option<u64>,
}

/// Everything the doctor looks at.
pub(super) struct Facts {
    /// Version of the host's kernel: major, minor, and the whole text.
    pub(super) kernel: (u32, u32, String),
    pub(super) accelerator: HostFacts,
    pub(super) processor: Processor,
    pub(super) hypervisor: Option<String>,
    pub(super) nested: Option<NestedParameter>,
    pub(super) models: Vec<ModelInfo>,
    pub(super) tsc: Tsc,
    pub(super) vulnerabilities: Vec<(String, String)>,
    /// `None` where `/proc` is not mounted.
    pub(super) memory: Option<HostMemory>,
    pub(super) transparent: TransparentHugePages,
    pub(super) pools: Vec<HugePagePool>,
    pub(super) nodes: Vec<NumaNode>,
    pub(super) locked: Limit,
    pub(super) ksm: Ksm,
    /// Of this program's own accesses, and of the kernel's too.
    pub(super) userfaultfd: (Attempt, Attempt),
    /// `/dev/userfaultfd`, which gives what the system call denies.
    pub(super) userfaultfd_device: Attempt,
    pub(super) cgroup: Cgroup,
    pub(super) user_namespace: Attempt,
    pub(super) tun: Attempt,
    pub(super) capabilities: Capabilities,
    pub(super) io_uring: Attempt,
    pub(super) open_files: Limit,
    pub(super) settings: Settings,
}

impl Facts {
    /// Looks at this host.
    pub(super) fn gather() -> Self {
        let cpu = atoll_machine::cpu::host::HostCpu::detect();
        Self {
            kernel: kernel(),
            accelerator: HostFacts::gather(),
            processor: Processor::read().unwrap_or_default(),
            hypervisor: processor::hypervisor(),
            nested: processor::nested_parameter(),
            models: atoll_vmm::cpu_models(),
            tsc: Tsc {
                exact_khz: cpu.tsc_khz,
                khz: atoll_machine::time::HostClock::nominal_tsc_khz(&cpu),
                clocksource: processor::clocksource(),
            },
            vulnerabilities: processor::vulnerabilities(),
            memory: host::memory().ok(),
            transparent: TransparentHugePages::read(),
            pools: pages::pools(),
            nodes: numa::nodes(),
            locked: limits::locked_memory(),
            ksm: pages::ksm(),
            userfaultfd: (rights::userfaultfd(false), rights::userfaultfd(true)),
            userfaultfd_device: rights::open_device("/dev/userfaultfd"),
            cgroup: cgroup::read(),
            user_namespace: rights::user_namespace(),
            tun: rights::open_device("/dev/net/tun"),
            capabilities: Capabilities::read(),
            io_uring: rights::io_uring(),
            open_files: limits::open_files(),
            settings: Settings {
                max_user_namespaces: setting("user/max_user_namespaces"),
                userns_clone: setting("kernel/unprivileged_userns_clone"),
                apparmor_userns: setting("kernel/apparmor_restrict_unprivileged_userns"),
                userfaultfd: setting("vm/unprivileged_userfaultfd"),
                io_uring_disabled: setting("kernel/io_uring_disabled"),
            },
        }
    }

    /// What a machine for which `asked` was asked would run on.
    pub(super) fn choice(&self, asked: Accelerator) -> Option<Choice> {
        atoll_vmm::choose(asked, &self.accelerator).ok()
    }
}

fn kernel() -> (u32, u32, String) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    parse_release(release.trim())
}

fn parse_release(release: &str) -> (u32, u32, String) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0), release.to_owned())
}

fn setting(name: &str) -> Option<u64> {
    std::fs::read_to_string(format!("/proc/sys/{name}")).ok()?.trim().parse().ok()
}

#[cfg(test)]
pub(super) mod tests {
    use atoll_foundation::host::cgroup::CgroupVersion;
    use atoll_foundation::host::kvm::KvmDevice;
    use atoll_foundation::host::processor::Virtualization;

    use super::*;

    #[test]
    fn releases_are_read_by_their_first_two_numbers() {
        assert_eq!(parse_release("6.1.0-28-cloud-amd64"), (6, 1, "6.1.0-28-cloud-amd64".to_owned()));
        assert_eq!(parse_release("5.15.167.4-microsoft-standard-WSL2").1, 15);
        assert_eq!(parse_release(""), (0, 0, String::new()));
    }

    fn model(name: &'static str, software: Result<(), &str>, kvm: Option<Result<(), &str>>) -> ModelInfo {
        let owned = |given: Result<(), &str>| given.map_err(str::to_owned);
        ModelInfo { name, description: "", software: owned(software), kvm: kvm.map(owned) }
    }

    /// A server of one's own, set up as it should be, used by root.
    pub(in super::super) fn server() -> Facts {
        let none = Limit { soft: None, hard: None };
        let flags = ["fpu", "constant_tsc", "nonstop_tsc", "vmx"];
        Facts {
            kernel: parse_release("6.12.9-amd64"),
            accelerator: HostFacts { virtualization: Some(Virtualization::Vmx), kvm: KvmDevice::Answers(12) },
            processor: Processor { model: "Xeon".to_owned(), flags: flags.map(str::to_owned).to_vec() },
            hypervisor: None,
            nested: Some(NestedParameter { module: "kvm_intel", enabled: true }),
            models: vec![model("atoll-base", Ok(()), Some(Err("sha"))), model("host", Ok(()), Some(Ok(())))],
            tsc: Tsc { exact_khz: Some(2_595_124), khz: 2_595_000, clocksource: "tsc".to_owned() },
            vulnerabilities: vec![("l1tf".to_owned(), "Not affected".to_owned())],
            memory: Some(HostMemory { total: 64 << 30, available: 60 << 30, limit: None }),
            transparent: TransparentHugePages {
                enabled: "madvise".to_owned(),
                shared: "advise".to_owned(),
                shared_2m: "inherit".to_owned(),
            },
            pools: vec![HugePagePool { page_size: 2 << 20, total: 8, free: 8, reserved: 0, overcommit: 0 }],
            nodes: vec![NumaNode { id: 0, total: 64 << 30, free: 60 << 30 }],
            locked: none,
            ksm: Ksm::Off,
            userfaultfd: (Attempt::Works, Attempt::Works),
            userfaultfd_device: Attempt::Works,
            cgroup: Cgroup {
                version: CgroupVersion::V2,
                controllers: ["cpuset", "cpu", "io", "memory", "pids"].map(str::to_owned).to_vec(),
                delegated: true,
            },
            user_namespace: Attempt::Works,
            tun: Attempt::Works,
            capabilities: Capabilities::all(),
            io_uring: Attempt::Works,
            open_files: Limit { soft: Some(1 << 20), hard: Some(1 << 20) },
            settings: Settings::default(),
        }
    }

    /// A container on an old host: nothing is there, nothing is allowed.
    pub(in super::super) fn bare() -> Facts {
        let small = Limit { soft: Some(64 << 10), hard: Some(64 << 10) };
        Facts {
            kernel: parse_release("5.4.0-generic"),
            accelerator: HostFacts { virtualization: None, kvm: KvmDevice::Absent },
            processor: Processor::default(),
            hypervisor: None,
            nested: None,
            models: vec![model("atoll-base", Err("avx2, bmi2"), None)],
            tsc: Tsc { exact_khz: None, khz: 2_000_000, clocksource: "hpet".to_owned() },
            vulnerabilities: vec![("mds".to_owned(), "Vulnerable: Clear CPU buffers".to_owned())],
            memory: Some(HostMemory { total: 1 << 30, available: 600 << 20, limit: Some(256 << 20) }),
            transparent: TransparentHugePages::default(),
            pools: Vec::new(),
            nodes: Vec::new(),
            locked: small,
            ksm: Ksm::Absent,
            userfaultfd: (Attempt::Absent, Attempt::Absent),
            userfaultfd_device: Attempt::Absent,
            cgroup: Cgroup { version: CgroupVersion::Absent, controllers: Vec::new(), delegated: false },
            user_namespace: Attempt::Denied,
            tun: Attempt::Absent,
            capabilities: Capabilities::default(),
            io_uring: Attempt::Denied,
            open_files: Limit { soft: Some(64), hard: Some(64) },
            settings: Settings {
                max_user_namespaces: Some(0),
                io_uring_disabled: Some(2),
                ..Settings::default()
            },
        }
    }

    /// A user on a virtual machine in a cloud, with a KVM that is software.
    pub(in super::super) fn cloud() -> Facts {
        Facts {
            accelerator: HostFacts { virtualization: None, kvm: KvmDevice::Answers(12) },
            hypervisor: Some("KVM".to_owned()),
            nested: None,
            processor: Processor {
                model: "AMD EPYC".to_owned(),
                flags: ["constant_tsc", "nonstop_tsc", "hypervisor"].map(str::to_owned).to_vec(),
            },
            transparent: TransparentHugePages {
                enabled: "madvise".to_owned(),
                shared: "never".to_owned(),
                shared_2m: "inherit".to_owned(),
            },
            userfaultfd: (Attempt::Works, Attempt::Denied),
            userfaultfd_device: Attempt::Denied,
            user_namespace: Attempt::Denied,
            tun: Attempt::Works,
            capabilities: Capabilities::default(),
            locked: Limit { soft: Some(8 << 20), hard: Some(8 << 20) },
            settings: Settings { apparmor_userns: Some(1), ..Settings::default() },
            cgroup: Cgroup {
                version: CgroupVersion::V2,
                controllers: vec!["memory".to_owned(), "pids".to_owned()],
                delegated: false,
            },
            ..server()
        }
    }
}
