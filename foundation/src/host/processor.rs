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
}
