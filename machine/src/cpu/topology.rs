//! How vCPU indices map to sockets, cores, threads and APIC ids.

/// Sockets × cores × threads of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Sockets (packages).
    pub sockets: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

/// Most vCPUs a machine can have.
pub const MAX_CPUS: u32 = 255;

impl Topology {
    /// One socket with `cpus` single-threaded cores.
    pub fn flat(cpus: u32) -> Self {
        Self { sockets: 1, cores: cpus, threads: 1 }
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u32 {
        self.sockets.saturating_mul(self.cores).saturating_mul(self.threads)
    }

    /// Bits of an APIC id that number the thread inside its core.
    pub fn thread_bits(&self) -> u32 {
        bits_for(self.threads)
    }

    /// Bits of an APIC id that number the core inside its socket.
    pub fn core_bits(&self) -> u32 {
        bits_for(self.cores)
    }

    /// APIC id of vCPU `index`: socket, core and thread each in their own bit field, as CPUID leaf 0xB says.
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads.max(1);
        let core = index / self.threads.max(1) % self.cores.max(1);
        let socket = index / (self.threads.max(1) * self.cores.max(1));
        (socket << self.core_bits() | core) << self.thread_bits() | thread
    }
}

fn bits_for(n: u32) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_have_a_field_per_level() {
        let t = Topology { sockets: 2, cores: 3, threads: 2 };
        assert_eq!(t.cpus(), 12);
        let ids: Vec<u32> = (0..12).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(Topology::flat(4).apic_id(3), 3);
    }
}
