//! What executes guests: kernel, KVM, processor, clock.

use atoll_api_types::HostCheck;
use atoll_foundation::host::kvm::{API_VERSION, KvmDevice};
use atoll_foundation::host::processor::Virtualization;

use super::About;
use super::facts::Facts;

/// The oldest kernel whose KVM has everything that the backend needs.
const OLDEST_KVM_KERNEL: (u32, u32) = (5, 16);

pub(super) fn checks(facts: &Facts) -> Vec<HostCheck> {
    vec![
        kernel(facts),
        kvm(facts),
        virtualization(facts),
        nested(facts),
        hypervisor(facts),
        cpu_models(facts),
        tsc(facts),
        vulnerabilities(facts),
    ]
}

fn kernel(facts: &Facts) -> HostCheck {
    let about = About("kernel", "Kernel");
    let (major, minor, release) = &facts.kernel;
    let (oldest_major, oldest_minor) = OLDEST_KVM_KERNEL;
    if (*major, *minor) >= OLDEST_KVM_KERNEL {
        return about.ok(format!("Linux {release}"), "it has everything that Atoll uses");
    }
    about.missing(
        format!("Linux {release}"),
        format!(
            "--accel kvm needs Linux {oldest_major}.{oldest_minor} and is refused; the software CPU runs"
        ),
        "boot a newer kernel",
    )
}

/// What brings virtualization to this host.
fn bring_virtualization(facts: &Facts) -> &'static str {
    if facts.hypervisor.is_some() {
        "let the hypervisor under this host give it nested virtualization (libvirt: <cpu mode='host-passthrough'/>; a \
         cloud: an instance type that has it, or bare metal)"
    } else {
        "enable virtualization in the firmware's setup (VT-x, SVM)"
    }
}

fn kvm(facts: &Facts) -> HostCheck {
    let about = About("kvm", "KVM");
    let refused = "machines run on the software CPU, slower; --accel kvm is refused";
    match (&facts.accelerator.kvm, facts.accelerator.virtualization) {
        (KvmDevice::Answers(API_VERSION), Some(_)) => {
            about.ok("/dev/kvm opens and has the processor behind it", "--accel auto takes KVM")
        }
        (KvmDevice::Answers(API_VERSION), None) => about.slow(
            "/dev/kvm opens and is software: the processor shows neither vmx nor svm",
            "--accel auto takes the software CPU; --accel kvm runs small programs only, slowly",
            bring_virtualization(facts),
        ),
        (KvmDevice::Answers(version), _) => about.missing(
            format!("/dev/kvm speaks version {version} of its interface, not {API_VERSION}"),
            refused,
            "boot an unmodified kernel",
        ),
        (KvmDevice::Denied, None) => about.missing(
            "/dev/kvm is there, this user may not open it, and it is software: neither vmx nor svm",
            refused,
            bring_virtualization(facts),
        ),
        (KvmDevice::Denied, Some(_)) => about.missing(
            "/dev/kvm is there and this user may not open it",
            refused,
            "add the user to its group ('usermod -aG kvm NAME') and log in again",
        ),
        (KvmDevice::Absent, Some(kind)) => about.missing(
            "/dev/kvm does not exist",
            refused,
            format!("'modprobe {}' as root; for a container, hand the device in", module(kind)),
        ),
        (KvmDevice::Absent, None) => {
            about.missing("/dev/kvm does not exist", refused, bring_virtualization(facts))
        }
        (KvmDevice::Broken(why), _) => about.missing(
            format!("/dev/kvm does not work: {why}"),
            refused,
            "look at 'dmesg | grep kvm'; another hypervisor may hold the processor's virtualization",
        ),
    }
}

fn module(kind: Virtualization) -> &'static str {
    match kind {
        Virtualization::Vmx => "kvm_intel",
        Virtualization::Svm => "kvm_amd",
    }
}

fn virtualization(facts: &Facts) -> HostCheck {
    let about = About("virtualization", "Virtualization");
    let model = match facts.processor.model.as_str() {
        "" => "the processor",
        known => known,
    };
    match facts.accelerator.virtualization {
        Some(kind) => about.ok(format!("{} on {model}", kind.name()), "KVM can use the processor"),
        None => about.missing(
            format!("neither vmx nor svm on {model}"),
            "there is no real KVM: guests are several times slower",
            bring_virtualization(facts),
        ),
    }
}

fn nested(facts: &Facts) -> HostCheck {
    let about = About("nested", "Nested");
    match facts.nested {
        Some(parameter) if parameter.enabled => about.ok(
            format!("{} has nested=1", parameter.module),
            "hypervisors inside machines could be given virtualization",
        ),
        Some(parameter) => about.missing(
            format!("{} has nested=0", parameter.module),
            "hypervisors inside machines cannot be given virtualization",
            format!("'options {0} nested=1' in /etc/modprobe.d/kvm.conf, then reload {0}", parameter.module),
        ),
        None => about.missing(
            "neither kvm_intel nor kvm_amd is loaded",
            "hypervisors inside machines cannot be given virtualization",
            "mend KVM first",
        ),
    }
}

fn hypervisor(facts: &Facts) -> HostCheck {
    let about = About("hypervisor", "Host");
    match &facts.hypervisor {
        None => about.ok("bare metal, by its own account", "nothing lies between Atoll and the processor"),
        Some(name) => about.slow(
            format!("a virtual machine itself, under {name}"),
            match facts.accelerator.virtualization {
                Some(_) => {
                    "every exit of a machine on KVM passes two hypervisors and costs several times as much"
                }
                None => "the processor's speed, and how steady it is, are that hypervisor's to give",
            },
            "run Atoll on bare metal where speed matters",
        ),
    }
}

fn cpu_models(facts: &Facts) -> HostCheck {
    let about = About("cpu-models", "CPU models");
    let names = |given: bool| {
        let some = facts.models.iter().filter(|model| model.software.is_ok() == given);
        some.map(|model| model.name).collect::<Vec<_>>().join(", ")
    };
    let lacking: Vec<String> = facts
        .models
        .iter()
        .filter_map(|model| Some(format!("{} (needs {})", model.name, model.software.as_ref().err()?)))
        .collect();
    let or_none = |names: String| if names.is_empty() { "none".to_owned() } else { names };
    let kvm = if facts.models.iter().any(|model| model.kvm.is_some()) {
        let some = facts.models.iter().filter(|model| matches!(model.kvm, Some(Ok(()))));
        format!("; on KVM: {}", or_none(some.map(|model| model.name).collect::<Vec<_>>().join(", ")))
    } else {
        String::new()
    };
    if lacking.is_empty() {
        return about.ok(format!("{}{kvm}", names(true)), "every --cpu is given on the software CPU");
    }
    about.missing(
        format!("not {}; given: {}{kvm}", lacking.join(", "), or_none(names(true))),
        format!("--cpu {} is refused: a named model is exact or not given", names(false)),
        "take a model that is given ('atoll cpus'), or a host with a newer processor",
    )
}

fn tsc(facts: &Facts) -> HostCheck {
    let about = About("tsc", "Clock");
    let (mhz, source) =
        (f64::from(facts.tsc.exact_khz.unwrap_or(facts.tsc.khz)) / 1e3, &facts.tsc.clocksource);
    let known = if facts.tsc.exact_khz.is_some() { "exactly" } else { "about" };
    let invariant = facts.processor.has("constant_tsc") && facts.processor.has("nonstop_tsc");
    let name = if source.is_empty() { "unknown" } else { source };
    let finding = format!(
        "TSC {}, {known} {mhz} MHz; the kernel reads {name}",
        if invariant { "invariant" } else { "not invariant" }
    );
    if !invariant {
        return about.missing(
            finding,
            "time in machines may drift or jump when the processor changes its speed",
            if facts.hypervisor.is_some() {
                "let the hypervisor under this host show it (QEMU: -cpu host,+invtsc)"
            } else {
                "no setting helps; a processor from 2010 or later has it"
            },
        );
    }
    // The paravirtual clocks read the TSC as well.
    if ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "xen"].contains(&source.as_str()) {
        return about.ok(finding, "machines read the time without leaving the processor");
    }
    about.slow(
        finding,
        "every reading of the time is a system call, for Atoll and for what else runs here",
        "'dmesg | grep -i tsc' says why the kernel gave the TSC up; tsc=reliable on its command line if it was wrong",
    )
}

fn vulnerabilities(facts: &Facts) -> HostCheck {
    let about = About("vulnerabilities", "CPU flaws");
    let open: Vec<&str> = facts
        .vulnerabilities
        .iter()
        .filter(|(_, state)| state.to_ascii_lowercase().contains("vulnerable"))
        .map(|(name, _)| name.as_str())
        .collect();
    if open.is_empty() {
        let known = facts.vulnerabilities.len();
        return about.ok(
            format!("{known} known to the kernel, none open"),
            "guests cannot read the host through them",
        );
    }
    about.missing(
        format!("open: {}", open.join(", ")),
        "a hostile guest may read what other programs on this host hold in memory",
        "update kernel and microcode, boot without mitigations=off; details in \
         /sys/devices/system/cpu/vulnerabilities",
    )
}

#[cfg(test)]
mod tests {
    use atoll_api_types::CheckState;

    use super::super::facts::tests::{bare, cloud, server};
    use super::*;

    #[test]
    fn each_state_of_kvm_has_its_own_remedy() {
        let mut facts = server();
        assert_eq!(kvm(&facts).state, CheckState::Ok);
        let mut remedy = |device| {
            facts.accelerator.kvm = device;
            kvm(&facts).remedy.unwrap()
        };
        assert!(remedy(KvmDevice::Denied).contains("usermod -aG kvm"));
        assert!(remedy(KvmDevice::Absent).contains("modprobe kvm_intel"));
        assert!(remedy(KvmDevice::Broken("busy".to_owned())).contains("dmesg"));
        assert!(remedy(KvmDevice::Answers(10)).contains("kernel"));
        assert!(kvm(&bare()).remedy.unwrap().contains("firmware"));
        let software = kvm(&cloud());
        assert_eq!(software.state, CheckState::Slow);
        assert!(software.remedy.unwrap().contains("nested"), "a virtual machine has no firmware setup");
    }

    #[test]
    fn a_clock_that_is_not_the_tsc_is_slow_and_one_that_varies_is_none() {
        let mut facts = server();
        assert_eq!(tsc(&facts).state, CheckState::Ok);
        assert!(tsc(&facts).finding.contains("exactly 2595.124 MHz"));
        facts.tsc.clocksource = "hpet".to_owned();
        assert_eq!(tsc(&facts).state, CheckState::Slow);
        facts.processor.flags.retain(|flag| flag != "nonstop_tsc");
        assert_eq!(tsc(&facts).state, CheckState::Missing);
    }

    #[test]
    fn flaws_count_when_any_part_of_the_machine_is_open() {
        let of = |state: &str| {
            vulnerabilities(&Facts { vulnerabilities: vec![("l1tf".into(), state.into())], ..server() }).state
        };
        assert_eq!(of("Mitigation: PTE Inversion"), CheckState::Ok);
        assert_eq!(of("Mitigation: Clear CPU buffers; SMT vulnerable"), CheckState::Missing);
        assert_eq!(of("KVM: Vulnerable"), CheckState::Missing);
    }

    #[test]
    fn nested_and_models_and_kernel_are_judged_by_what_they_say() {
        let mut facts = server();
        facts.nested.as_mut().unwrap().enabled = false;
        assert!(nested(&facts).remedy.unwrap().contains("options kvm_intel nested=1"));
        let models = cpu_models(&bare());
        assert!(models.finding.contains("atoll-base (needs avx2, bmi2)"), "{models:?}");
        assert!(models.finding.ends_with("given: none"), "no KVM, nothing said of it: {models:?}");
        assert_eq!(cpu_models(&server()).finding, "atoll-base, host; on KVM: host");
        facts.kernel = (5, 15, "5.15.0".to_owned());
        assert_eq!(kernel(&facts).state, CheckState::Missing);
        facts.kernel = (5, 16, "5.16.0".to_owned());
        assert_eq!(kernel(&facts).state, CheckState::Ok);
    }
}
