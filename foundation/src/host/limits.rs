//! Limits that the kernel puts on this process, and the capabilities that lift them.

use std::fs;

use rustix::process::{Resource, getrlimit};

/// A limit; `None` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// What counts now.
    pub soft: Option<u64>,
    /// Up to where the process may raise it.
    pub hard: Option<u64>,
}

impl Limit {
    fn of(resource: Resource) -> Self {
        let limit = getrlimit(resource);
        Self { soft: limit.current, hard: limit.maximum }
    }

    /// Whether `amount` is within what counts now.
    pub fn allows(&self, amount: u64) -> bool {
        self.soft.is_none_or(|soft| amount <= soft)
    }
}

/// Bytes that may be locked in memory (`RLIMIT_MEMLOCK`).
pub fn locked_memory() -> Limit {
    Limit::of(Resource::Memlock)
}

/// Files that may be open at once, plus one (`RLIMIT_NOFILE`).
pub fn open_files() -> Limit {
    Limit::of(Resource::Nofile)
}

/// A right that the kernel checks by itself (`capabilities(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// `CAP_NET_ADMIN`: makes network interfaces.
    NetAdmin = 12,
    /// `CAP_IPC_LOCK`: locks memory without limit.
    IpcLock = 14,
    /// `CAP_SYS_PTRACE`: handles page faults of the kernel's own accesses, among others.
    SysPtrace = 19,
    /// `CAP_SYS_ADMIN`.
    SysAdmin = 21,
}

/// The capabilities in effect for this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    /// Reads them; none where `/proc` is not mounted.
    pub fn read() -> Self {
        fs::read_to_string("/proc/self/status").map_or(Self(0), |text| Self::parse(&text))
    }

    /// Every capability, as root has them.
    pub fn all() -> Self {
        Self(u64::MAX)
    }

    fn parse(status: &str) -> Self {
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        Self(mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or(0))
    }

    /// Whether the process has `capability`.
    pub fn has(self, capability: Capability) -> bool {
        self.0 >> capability as u32 & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_bits_of_the_effective_set() {
        let text =
            "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000001000\n";
        let few = Capabilities::parse(text);
        assert!(few.has(Capability::NetAdmin));
        assert!(!few.has(Capability::IpcLock) && !few.has(Capability::SysAdmin));
        assert!(Capabilities::parse("CapEff:\t000001fffeffffff\n").has(Capability::SysPtrace));
        assert_eq!(Capabilities::parse(""), Capabilities::default());
    }

    #[test]
    fn no_limit_allows_everything() {
        assert!(Limit { soft: None, hard: None }.allows(u64::MAX));
        let limit = Limit { soft: Some(8 << 20), hard: None };
        assert!(limit.allows(8 << 20) && !limit.allows((8 << 20) + 1));
    }

    #[test]
    fn this_process_may_open_files() {
        assert!(open_files().allows(16));
        let locked = locked_memory();
        assert!(locked.hard.is_none_or(|hard| locked.allows(0) && locked.soft.is_some_and(|s| s <= hard)));
    }
}
