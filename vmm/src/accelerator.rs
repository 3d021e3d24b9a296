//! Which accelerator executes a machine's instructions, and why.
//!
//! A pure decision over facts: [`HostFacts`] says what the host has, [`choose`] decides and says why in one line.
//!
//! | asked | processor's virtualization behind a usable `/dev/kvm` | usable `/dev/kvm`, no vmx or svm | no usable `/dev/kvm` |
//! |---|---|---|---|
//! | `auto` | KVM | software CPU | software CPU |
//! | `kvm` | KVM | KVM with a warning | refused |
//! | `software` | software CPU | software CPU | software CPU |
//!
//! The middle column is a KVM that is itself software (`kvm_pvm` and its like): small programs run in it through
//! KVM's instruction emulator, at a few million instructions per second, and whole kernels die there.

use atoll_api_types::Accelerator;
use atoll_foundation::host::kvm::{API_VERSION, KvmDevice};
use atoll_foundation::host::processor::{Processor, Virtualization};

use crate::error::VmError;

/// What executes a machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// Atoll's software CPU.
    Software,
    /// The host kernel's KVM.
    Kvm,
}

impl BackendKind {
    /// One word for people and programs; what `--accel` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Software => "software",
            Self::Kvm => "kvm",
        }
    }

    /// What people call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Software => "the software CPU",
            Self::Kvm => "KVM",
        }
    }
}

/// The accelerator of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What executes the instructions.
    pub backend: BackendKind,
    /// Why, as the part of a line that follows the accelerator's name.
    pub why: String,
    /// What the user should know before blaming the machine.
    pub warning: Option<String>,
}

impl Choice {
    fn new(backend: BackendKind, why: impl Into<String>) -> Self {
        Self { backend, why: why.into(), warning: None }
    }
}

impl std::fmt::Display for Choice {
    /// The choice in one line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.backend {
            BackendKind::Software => "software CPU",
            BackendKind::Kvm => "KVM",
        };
        write!(f, "{name}: {}", self.why)
    }
}

/// What the choice depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// The processor's own virtualization, as the host's kernel shows it.
    pub virtualization: Option<Virtualization>,
    /// What `/dev/kvm` is.
    pub kvm: KvmDevice,
}

impl HostFacts {
    /// Looks at this host: opens and closes `/dev/kvm`, reads `/proc/cpuinfo`.
    pub fn gather() -> Self {
        // Without /proc nothing is known about the processor, which is the same as having no virtualization.
        let processor = Processor::read().unwrap_or_default();
        Self { virtualization: processor.virtualization(), kvm: KvmDevice::probe() }
    }
}

/// Decides what executes the instructions of a machine for which `asked` was asked.
///
/// # Errors
/// [`VmError::Accelerator`] when KVM was asked for and cannot be had; the text says what to do.
pub fn choose(asked: Accelerator, host: &HostFacts) -> Result<Choice, VmError> {
    match asked {
        Accelerator::Software => Ok(Choice::new(BackendKind::Software, "asked for")),
        Accelerator::Auto => Ok(automatic(host)),
        Accelerator::Kvm if host.kvm.is_usable() => Ok(match host.virtualization {
            Some(kind) => {
                Choice::new(BackendKind::Kvm, format!("asked for; the processor has {}", kind.name()))
            }
            None => Choice {
                warning: Some(SOFTWARE_KVM_WARNING.to_owned()),
                ..Choice::new(BackendKind::Kvm, "asked for, though this host's KVM is software")
            },
        }),
        Accelerator::Kvm => Err(VmError::Accelerator(format!(
            "--accel kvm: {}; {}, or use --accel software",
            why_unusable(host),
            mend(host)
        ))),
    }
}

const SOFTWARE_KVM_WARNING: &str = "this host's KVM is software (the processor shows neither vmx nor svm): it runs \
                                    small programs only and is slower than --accel software";

fn automatic(host: &HostFacts) -> Choice {
    match (host.kvm.is_usable(), host.virtualization) {
        (true, Some(kind)) => {
            Choice::new(BackendKind::Kvm, format!("/dev/kvm is there and the processor has {}", kind.name()))
        }
        (true, None) => Choice::new(
            BackendKind::Software,
            "this host's /dev/kvm is software, the processor shows neither vmx nor svm",
        ),
        (false, Some(_)) => {
            Choice::new(BackendKind::Software, format!("{}; {}", why_unusable(host), mend(host)))
        }
        // Whatever is wrong with /dev/kvm: mending it would not help.
        (false, None) => Choice::new(BackendKind::Software, "the processor shows neither vmx nor svm"),
    }
}

/// Opens what was chosen with `open`. What looked like a usable KVM may still lack something: the kernel may be too
/// old, or not give the machine's CPU model. Then `auto` takes the software CPU and says why, and `kvm` is refused.
pub(crate) fn open<T>(
    asked: Accelerator,
    choice: Choice,
    open: impl Fn(BackendKind) -> Result<T, VmError>,
) -> Result<(Choice, T), VmError> {
    match (open(choice.backend), choice.backend, asked) {
        (Ok(opened), ..) => Ok((choice, opened)),
        (Err(error), BackendKind::Kvm, Accelerator::Auto) => {
            let software =
                Choice::new(BackendKind::Software, format!("KVM cannot run this machine: {error}"));
            Ok((software, open(BackendKind::Software)?))
        }
        (Err(VmError::Model(error)), BackendKind::Kvm, _) if choice.warning.is_some() => {
            Err(VmError::Model(format!(
                "{error}; this host's KVM is software: it takes --cpu host, and --accel software every model"
            )))
        }
        (Err(VmError::Backend(error)), BackendKind::Kvm, _) => Err(VmError::Accelerator(format!(
            "--accel kvm: this host's KVM cannot be used: {error}; use --accel software"
        ))),
        (Err(error), ..) => Err(error),
    }
}

/// Why an unusable `/dev/kvm` is unusable.
fn why_unusable(host: &HostFacts) -> String {
    match &host.kvm {
        KvmDevice::Absent => "/dev/kvm does not exist".to_owned(),
        KvmDevice::Denied => "/dev/kvm may not be opened by this user".to_owned(),
        KvmDevice::Answers(version) => {
            format!("/dev/kvm speaks version {version} of its interface, expected {API_VERSION}")
        }
        KvmDevice::Broken(why) => format!("/dev/kvm does not work ({why})"),
    }
}

/// What mends an unusable `/dev/kvm`.
fn mend(host: &HostFacts) -> &'static str {
    match (&host.kvm, host.virtualization) {
        (KvmDevice::Denied, _) => "add the user to the group kvm and log in again",
        (KvmDevice::Absent, Some(Virtualization::Vmx)) => "load it with 'modprobe kvm_intel'",
        (KvmDevice::Absent, Some(Virtualization::Svm)) => "load it with 'modprobe kvm_amd'",
        (KvmDevice::Absent, None) => {
            "enable virtualization in the firmware, or nested virtualization where this host is a virtual machine"
        }
        (KvmDevice::Answers(_) | KvmDevice::Broken(_), _) => {
            "check 'dmesg | grep kvm' and that nothing else uses the processor's virtualization"
        }
    }
}

#[cfg(test)]
mod tests {
    use atoll_machine::backend::BackendError;

    use super::*;

    const DEVICES: [KvmDevice; 4] =
        [KvmDevice::Absent, KvmDevice::Denied, KvmDevice::Answers(12), KvmDevice::Answers(10)];
    const PROCESSORS: [Option<Virtualization>; 3] =
        [None, Some(Virtualization::Vmx), Some(Virtualization::Svm)];

    fn hosts() -> impl Iterator<Item = HostFacts> {
        let broken = KvmDevice::Broken("Device or resource busy (os error 16)".to_owned());
        DEVICES
            .into_iter()
            .chain([broken])
            .flat_map(|kvm| PROCESSORS.map(|virtualization| HostFacts { virtualization, kvm: kvm.clone() }))
    }

    fn host(kvm: KvmDevice, virtualization: Option<Virtualization>) -> HostFacts {
        HostFacts { virtualization, kvm }
    }

    #[test]
    fn auto_takes_kvm_only_with_the_processors_virtualization_behind_it() {
        for host in hosts() {
            let choice = choose(Accelerator::Auto, &host).unwrap();
            let real = host.kvm == KvmDevice::Answers(12) && host.virtualization.is_some();
            assert_eq!(choice.backend == BackendKind::Kvm, real, "{host:?}");
            assert_eq!(choice.warning, None, "auto needs no warning: {host:?}");
        }
    }

    #[test]
    fn software_is_given_on_every_host() {
        for host in hosts() {
            assert_eq!(choose(Accelerator::Software, &host).unwrap().backend, BackendKind::Software);
        }
    }

    #[test]
    fn kvm_is_given_where_it_answers_and_refused_where_it_does_not() {
        for host in hosts() {
            match choose(Accelerator::Kvm, &host) {
                Ok(choice) => {
                    assert_eq!(choice.backend, BackendKind::Kvm);
                    assert!(host.kvm.is_usable());
                    assert_eq!(choice.warning.is_some(), host.virtualization.is_none(), "{host:?}");
                }
                Err(error) => {
                    assert!(!host.kvm.is_usable(), "{host:?}");
                    assert!(error.is_input(), "exit code 2");
                }
            }
        }
    }

    #[test]
    fn a_refusal_says_what_mends_it() {
        let refusal = |facts| choose(Accelerator::Kvm, &facts).unwrap_err().to_string();
        let absent = refusal(host(KvmDevice::Absent, Some(Virtualization::Svm)));
        assert!(absent.contains("does not exist") && absent.contains("modprobe kvm_amd"), "{absent}");
        let absent = refusal(host(KvmDevice::Absent, None));
        assert!(absent.contains("firmware") && absent.contains("nested"), "{absent}");
        let denied = refusal(host(KvmDevice::Denied, Some(Virtualization::Vmx)));
        assert!(denied.contains("group kvm"), "{denied}");
        let old = refusal(host(KvmDevice::Answers(10), None));
        assert!(old.contains("version 10") && old.contains("12"), "{old}");
        for host in hosts() {
            if let Err(error) = choose(Accelerator::Kvm, &host) {
                let text = error.to_string();
                assert!(
                    text.starts_with("--accel kvm: ") && text.ends_with("or use --accel software"),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn a_kvm_that_disappoints_is_replaced_for_auto_and_refused_for_kvm() {
        let real = host(KvmDevice::Answers(12), Some(Virtualization::Vmx));
        let lacks = |kind| match kind {
            BackendKind::Software => Ok(kind),
            BackendKind::Kvm => Err(VmError::Backend(BackendError::Config("the kernel lacks X".to_owned()))),
        };
        let choice = choose(Accelerator::Auto, &real).unwrap();
        assert_eq!(choice.backend, BackendKind::Kvm);
        let (choice, opened) = open(Accelerator::Auto, choice, lacks).unwrap();
        assert_eq!((choice.backend, opened), (BackendKind::Software, BackendKind::Software));
        assert!(choice.why.contains("the kernel lacks X"), "{choice}");

        let choice = choose(Accelerator::Kvm, &real).unwrap();
        let error = open(Accelerator::Kvm, choice, lacks).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("the kernel lacks X"), "{error}");

        // Where KVM is software it lacks much of the processor, which is worth a word.
        let software = choose(Accelerator::Kvm, &host(KvmDevice::Answers(12), None)).unwrap();
        let model = |_: BackendKind| -> Result<(), _> { Err(VmError::Model("needs avx".to_owned())) };
        let error = open(Accelerator::Kvm, software, model).unwrap_err().to_string();
        assert!(error.contains("needs avx") && error.contains("--cpu host"), "{error}");

        // A machine that neither can run is refused in the words of the one that runs everything.
        let none = |kind: BackendKind| -> Result<(), _> { Err(VmError::Model(kind.name().to_owned())) };
        let choice = choose(Accelerator::Auto, &real).unwrap();
        assert_eq!(open(Accelerator::Auto, choice, none).unwrap_err().to_string(), "software");
    }

    #[test]
    fn every_choice_is_explained_in_one_line() {
        for host in hosts() {
            for asked in [Accelerator::Auto, Accelerator::Kvm, Accelerator::Software] {
                let Ok(choice) = choose(asked, &host) else { continue };
                let line = choice.to_string();
                assert!(!choice.why.is_empty() && !line.contains('\n') && line.len() < 200, "{line}");
            }
        }
        let pvm = host(KvmDevice::Answers(12), None);
        assert_eq!(
            choose(Accelerator::Auto, &pvm).unwrap().to_string(),
            "software CPU: this host's /dev/kvm is software, the processor shows neither vmx nor svm"
        );
    }
}
