//! What holds guest memory.

use atoll_api_types::{ByteSize, DEFAULT_MEMORY, HostCheck};
use atoll_foundation::host::limits::Capability;
use atoll_foundation::host::pages::Ksm;
use atoll_foundation::host::rights::Attempt;

use super::About;
use super::facts::Facts;

pub(super) fn checks(facts: &Facts) -> Vec<HostCheck> {
    vec![
        memory(facts),
        transparent(facts),
        pools(facts),
        numa(facts),
        locked(facts),
        ksm(facts),
        userfaultfd(facts),
    ]
}

fn mib(bytes: u64) -> String {
    format!("{}M", bytes >> 20)
}

fn memory(facts: &Facts) -> HostCheck {
    let about = About("memory", "Memory");
    let Some(memory) = facts.memory else {
        return about.missing("unknown", "machines are refused: their size cannot be checked", "mount /proc");
    };
    let limit = memory.limit.filter(|limit| *limit < memory.total);
    let limited = limit.map_or(String::new(), |limit| format!(", limited to {}", mib(limit)));
    let finding = format!("{}, {} of it unused{limited}", mib(memory.total), mib(memory.available));
    let most = memory.usable().min(memory.available);
    if most >= DEFAULT_MEMORY.0 {
        return about.ok(finding, "the default machine fits");
    }
    about.missing(
        finding,
        format!("the default machine of {DEFAULT_MEMORY} does not fit"),
        match limit {
            Some(_) => "raise the memory limit of the container or service, or choose less with --memory",
            None => "end other programs, or choose less with --memory",
        },
    )
}

fn transparent(facts: &Facts) -> HostCheck {
    let about = About("transparent-huge-pages", "Huge pages, auto");
    let settings = &facts.transparent;
    let word = |word: &str| if word.is_empty() { "absent".to_owned() } else { word.to_owned() };
    let finding = format!("shared memory: {}; private: {}", word(&settings.shared), word(&settings.enabled));
    if settings.for_shared_memory() {
        return about.ok(finding, "guest memory gets transparent huge pages");
    }
    let advise = "'echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled' as root, at every boot";
    let slow = "guest memory is shared and lies in 4 KiB pages: guests that use much of it at random take a \
                quarter to a half longer";
    if settings.for_private_memory() {
        return about.slow(
            finding,
            slow,
            format!("{advise}; or --memory SIZE,hugepages=transparent for one machine"),
        );
    }
    about.slow(finding, format!("{slow}; --memory hugepages=transparent is refused"), advise)
}

fn pools(facts: &Facts) -> HostCheck {
    let about = About("huge-page-pools", "Huge pages, pools");
    let show = |pool: &atoll_foundation::host::pages::HugePagePool| {
        let (size, free) = (ByteSize(pool.page_size), pool.available() / pool.page_size);
        format!("{size}: {free} of {} can be had", pool.total)
    };
    let filled: Vec<_> =
        facts.pools.iter().filter(|pool| pool.total + pool.overcommit > 0).map(show).collect();
    if !filled.is_empty() {
        return about.ok(filled.join("; "), "--memory hugepages=SIZE takes memory from there");
    }
    about.missing(
        "none reserved",
        "--memory hugepages=2M and hugepages=1G are refused",
        "'sysctl -w vm.nr_hugepages=N' reserves N pages of 2 MiB; pages of 1 GiB are best reserved at boot with \
         hugepagesz=1G hugepages=N",
    )
}

fn numa(facts: &Facts) -> HostCheck {
    let about = About("numa", "NUMA nodes");
    let nodes: Vec<String> =
        facts.nodes.iter().map(|node| format!("{}: {}", node.id, mib(node.total))).collect();
    match nodes.len() {
        0 => about.missing(
            "unknown to this kernel",
            "--memory numa=NODE is refused",
            "a kernel with CONFIG_NUMA; a container needs /sys mounted",
        ),
        1 => about.ok(format!("one ({})", nodes.join("")), "all memory is equally near"),
        more => about.ok(
            format!("{more} ({})", nodes.join(", ")),
            "--memory numa=NODE together with --pin keeps a machine on one",
        ),
    }
}

fn locked(facts: &Facts) -> HostCheck {
    let about = About("locked-memory", "Locked memory");
    let all = "--memory lock works for any machine";
    match facts.locked.soft {
        _ if facts.capabilities.has(Capability::IpcLock) => about.ok("no limit for this user", all),
        None => about.ok("no limit", all),
        Some(limit) if limit >= DEFAULT_MEMORY.0 => {
            about.ok(format!("up to {}", mib(limit)), "--memory lock works up to that size")
        }
        Some(limit) => about.missing(
            format!("up to {}K", limit >> 10),
            "--memory lock is refused for machines larger than that",
            "raise RLIMIT_MEMLOCK: 'ulimit -l', LimitMEMLOCK= of a service, or memlock in /etc/security/limits.conf",
        ),
    }
}

fn ksm(facts: &Facts) -> HostCheck {
    let about = About("ksm", "Merged pages");
    let finding = match facts.ksm {
        Ksm::Absent => "unknown to this kernel".to_owned(),
        Ksm::Off => "KSM is off".to_owned(),
        Ksm::Running(pages) => format!("KSM runs, {} merged away", mib(pages.saturating_mul(4096))),
    };
    about.ok(finding, "guest memory is never offered for merging: what is merged can be told by timing")
}

fn userfaultfd(facts: &Facts) -> HostCheck {
    let about = About("userfaultfd", "Page-fault rights");
    let (own, kernels) = &facts.userfaultfd;
    let use_of_it =
        "this version needs no userfaultfd; machines that start before their saved memory is read will";
    if kernels.works() || facts.userfaultfd_device.works() {
        return about.ok("userfaultfd works, for the kernel's accesses too", use_of_it);
    }
    let allow = "'sysctl -w vm.unprivileged_userfaultfd=1', or read and write rights on /dev/userfaultfd";
    match own {
        Attempt::Works => about.missing(
            "userfaultfd works for a program's own accesses only",
            use_of_it,
            match facts.settings.userfaultfd {
                Some(1) => "read and write rights on /dev/userfaultfd; a sandbox seems to stand in between",
                _ => allow,
            },
        ),
        Attempt::Denied => about.missing("userfaultfd is denied", use_of_it, allow),
        Attempt::Absent => about.missing(
            "there is no userfaultfd",
            use_of_it,
            "a kernel with CONFIG_USERFAULTFD; a container's seccomp profile may hide it",
        ),
        Attempt::Failed(why) => about.missing(format!("userfaultfd fails: {why}"), use_of_it, allow),
    }
}

#[cfg(test)]
mod tests {
    use atoll_api_types::CheckState;
    use atoll_foundation::host::numa::NumaNode;

    use super::super::facts::tests::{bare, cloud, server};
    use super::*;

    #[test]
    fn a_limit_of_the_container_counts_as_the_hosts_memory() {
        let check = memory(&bare());
        assert_eq!(check.state, CheckState::Missing);
        assert!(check.finding.contains("limited to 256M"), "{check:?}");
        assert!(check.remedy.unwrap().contains("container"));
        assert_eq!(memory(&server()).state, CheckState::Ok);
    }

    #[test]
    fn what_private_memory_gets_does_not_count() {
        let check = transparent(&cloud());
        assert_eq!(check.state, CheckState::Slow);
        assert!(check.finding.contains("shared memory: never; private: madvise"), "{check:?}");
    }

    #[test]
    fn pools_and_nodes_are_listed() {
        let mut facts = server();
        assert_eq!(pools(&facts).finding, "2M: 8 of 8 can be had");
        facts.pools[0].total = 0;
        assert_eq!(pools(&facts).state, CheckState::Missing);
        facts.nodes.push(NumaNode { id: 1, total: 32 << 30, free: 0 });
        assert_eq!(numa(&facts).finding, "2 (0: 65536M, 1: 32768M)");
    }

    #[test]
    fn locking_is_limited_unless_the_user_may_lock_everything() {
        assert_eq!(locked(&server()).state, CheckState::Ok);
        let mut user = cloud();
        assert_eq!(locked(&user).state, CheckState::Missing);
        user.locked.soft = Some(1 << 30);
        assert_eq!(locked(&user).finding, "up to 1024M");
    }

    #[test]
    fn handling_only_ones_own_faults_is_not_enough_unless_the_device_helps() {
        let mut user = cloud();
        assert!(userfaultfd(&user).finding.contains("own accesses only"));
        user.userfaultfd_device = Attempt::Works;
        assert_eq!(userfaultfd(&user).state, CheckState::Ok);
        assert!(userfaultfd(&bare()).remedy.unwrap().contains("seccomp"));
    }
}
