//! The host's processor, as its kernel describes it.
//!
//! `/proc/cpuinfo` and not CPUID where virtualization is concerned: the kernel takes the flag away when the
//! firmware has locked virtualization off, and CPUID still shows it then.

use std::io::{self, BufRead, BufReader, Read};

/// The processor's own virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Virtualization {
    /// Intel VMX (Intel SDM vol. 3, chapter 25).
    Vmx,
    /// AMD SVM (AMD APM vol. 2, chapter 15).
    Svm,
}

impl Virtualization {
    /// The flag's name in `/proc/cpuinfo`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        }
    }
}

/// What the first processor of `/proc/cpuinfo` says. Hosts with different kinds of processors in one machine do
/// not exist on x86-64 as far as what is read here goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Processor {
    /// The model's name; empty where the kernel does not know it.
    pub model: String,
    /// Feature flags, as the kernel spells them.
    pub flags: Vec<String>,
}

impl Processor {
    /// Reads `/proc/cpuinfo` as far as the first processor's flags.
    pub fn read() -> io::Result<Self> {
        Self::parse(std::fs::File::open("/proc/cpuinfo")?)
    }

    fn parse(text: impl Read) -> io::Result<Self> {
        let mut processor = Self::default();
        for line in BufReader::new(text).lines() {
            let line = line?;
            let Some((key, value)) = line.split_once(':') else { continue };
            match key.trim() {
                "model name" => processor.model = value.trim().to_owned(),
                "flags" => {
                    processor.flags = value.split_whitespace().map(str::to_owned).collect();
                    break;
                }
                _ => {}
            }
        }
        Ok(processor)
    }

    /// Whether the kernel shows `flag`.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag)
    }

    /// The processor's own virtualization, if the kernel may use it.
    pub fn virtualization(&self) -> Option<Virtualization> {
        [Virtualization::Vmx, Virtualization::Svm].into_iter().find(|kind| self.has(kind.name()))
    }
}

/// The hypervisor under which this host itself runs, by the name it gives itself; `None` on bare metal. Every
/// hypervisor announces itself in CPUID leaf 0x4000_0000 when it sets the flag.
#[cfg(target_arch = "x86_64")]
pub fn hypervisor() -> Option<String> {
    use std::arch::x86_64::__cpuid;
    /// CPUID leaf 1, ECX bit 31.
    const HYPERVISOR: u32 = 1 << 31;
    if __cpuid(1).ecx & HYPERVISOR == 0 {
        return None;
    }
    let leaf = __cpuid(0x4000_0000);
    Some(hypervisor_name([leaf.ebx, leaf.ecx, leaf.edx]))
}

/// Not known on another architecture.
#[cfg(not(target_arch = "x86_64"))]
pub fn hypervisor() -> Option<String> {
    None
}

/// The twelve bytes as people know the product.
fn hypervisor_name(words: [u32; 3]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let signature: String = bytes.iter().filter(|b| b.is_ascii_graphic()).map(|b| char::from(*b)).collect();
    let product = match signature.as_str() {
        "KVMKVMKVM" => "KVM",
        "MicrosoftHv" => "Hyper-V",
        "VMwareVMware" => "VMware",
        "XenVMMXenVMM" => "Xen",
        "TCGTCGTCGTCG" => "QEMU's emulator",
        "bhyvebhyve" => "bhyve",
        "VBoxVBoxVBox" => "VirtualBox",
        "prlhyperv" => "Parallels",
        "" => "an unnamed hypervisor",
        other => other,
    };
    product.to_owned()
}

/// Whether a KVM module lets guests use virtualization themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NestedParameter {
    /// `kvm_intel` or `kvm_amd`.
    pub module: &'static str,
    /// What its parameter `nested` says.
    pub enabled: bool,
}

/// The parameter of the module that is loaded, if one is.
pub fn nested_parameter() -> Option<NestedParameter> {
    ["kvm_intel", "kvm_amd"].into_iter().find_map(|module| {
        let text = std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).ok()?;
        Some(NestedParameter { module, enabled: matches!(text.trim(), "1" | "Y" | "y") })
    })
}

/// The clock that the host's kernel reads; empty where it does not say.
pub fn clocksource() -> String {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    std::fs::read_to_string(path).map_or(String::new(), |text| text.trim().to_owned())
}

/// What the kernel says about the processor's known vulnerabilities: names and states, by name.
pub fn vulnerabilities() -> Vec<(String, String)> {
    let entries =
        std::fs::read_dir("/sys/devices/system/cpu/vulnerabilities").into_iter().flatten().flatten();
    let mut list: Vec<_> = entries
        .filter_map(|entry| {
            let state = std::fs::read_to_string(entry.path()).ok()?;
            Some((entry.file_name().into_string().ok()?, state.trim().to_owned()))
        })
        .collect();
    list.sort();
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n\
        model name\t: Intel(R) Xeon(R) Gold 6140 CPU @ 2.30GHz\nstepping\t: 4\n\
        flags\t\t: fpu vme msr constant_tsc vmx nonstop_tsc ept\nvmx flags\t: vnmi preemption_timer\n\
        bugs\t\t: spectre_v1\n\nprocessor\t: 1\nflags\t\t: other\n";
    const AMD: &str = "processor\t: 0\nmodel name\t: AMD EPYC 7763 64-Core Processor\n\
        flags\t\t: fpu vme msr svm npt hypervisor\n";
    const GUEST: &str = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu vme vmmcall hypervisor\n";

    #[test]
    fn the_first_processor_is_read_and_the_flags_are_whole_words() {
        let of = |text: &str| Processor::parse(text.as_bytes()).unwrap();
        let intel = of(INTEL);
        assert_eq!(intel.model, "Intel(R) Xeon(R) Gold 6140 CPU @ 2.30GHz");
        assert!(intel.has("constant_tsc") && !intel.has("other") && !intel.has("tsc"));
        assert_eq!(intel.virtualization(), Some(Virtualization::Vmx));
        assert_eq!(of(AMD).virtualization(), Some(Virtualization::Svm));
        // "vmmcall" begins like a flag that matters and is none.
        assert_eq!(of(GUEST).virtualization(), None);
        assert_eq!(of("").virtualization(), None);
    }

    #[test]
    fn this_host_has_flags() {
        let flags = Processor::read().unwrap().flags;
        assert!(cfg!(not(target_arch = "x86_64")) || flags.iter().any(|f| f == "fpu"), "{flags:?}");
    }

    #[test]
    fn hypervisors_are_known_by_the_names_they_give() {
        let words = |text: &[u8; 12]| {
            [0, 4, 8].map(|at| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]))
        };
        assert_eq!(hypervisor_name(words(b"KVMKVMKVM\0\0\0")), "KVM");
        assert_eq!(hypervisor_name(words(b"Microsoft Hv")), "Hyper-V");
        assert_eq!(hypervisor_name(words(b"SomethingNew")), "SomethingNew");
        assert_eq!(hypervisor_name([0; 3]), "an unnamed hypervisor");
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_kernels_flag_and_cpuid_agree_that_there_is_a_hypervisor() {
        assert_eq!(hypervisor().is_some(), Processor::read().unwrap().has("hypervisor"));
    }
}
