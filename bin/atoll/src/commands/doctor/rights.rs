//! What this user may do: groups, namespaces, interfaces, rings, files.

use atoll_api_types::HostCheck;
use atoll_foundation::host::cgroup::CgroupVersion;
use atoll_foundation::host::limits::Capability;
use atoll_foundation::host::rights::Attempt;

use super::About;
use super::facts::Facts;

pub(super) fn checks(facts: &Facts) -> Vec<HostCheck> {
    vec![cgroup(facts), user_namespaces(facts), tap(facts), io_uring(facts), open_files(facts)]
}

/// Controllers with which a machine can be limited.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

fn cgroup(facts: &Facts) -> HostCheck {
    let about = About("cgroup", "Control groups");
    let cgroup = &facts.cgroup;
    let meaning = "a machine cannot be given limits of its own on processor, memory and disk";
    match cgroup.version {
        CgroupVersion::Absent => about.missing(
            "none mounted",
            meaning,
            "'mount -t cgroup2 none /sys/fs/cgroup' as root; for a container, its runtime does it",
        ),
        CgroupVersion::V1 => about.missing(
            "version 1",
            meaning,
            "boot with systemd.unified_cgroup_hierarchy=1 (version 2 is what every distribution since 2021 has)",
        ),
        CgroupVersion::V2 => {
            let lacking: Vec<&str> =
                CONTROLLERS.into_iter().filter(|c| !cgroup.controllers.iter().any(|own| own == c)).collect();
            let controllers = match cgroup.controllers.join(" ") {
                none if none.is_empty() => "no controllers".to_owned(),
                some => some,
            };
            if !cgroup.delegated {
                return about.missing(
                    format!("version 2 with {controllers}; this user may not make groups"),
                    meaning,
                    "start Atoll as a service with Delegate=yes, or with 'systemd-run --user --scope -p Delegate=yes'",
                );
            }
            if !lacking.is_empty() {
                return about.missing(
                    format!("version 2 with {controllers}; without {}", lacking.join(" ")),
                    meaning,
                    "let systemd delegate them: Delegate=cpu io memory pids in user@.service",
                );
            }
            about.ok(format!("version 2 with {controllers}"), "machines can be given limits of their own")
        }
    }
}

fn user_namespaces(facts: &Facts) -> HostCheck {
    let about = About("user-namespaces", "User namespaces");
    let meaning = "a machine's process cannot be shut in without root";
    let settings = &facts.settings;
    match &facts.user_namespace {
        Attempt::Works => about.ok("work, tried", "a machine's process can be shut in without root"),
        Attempt::Absent => about.missing(
            "this kernel has none",
            meaning,
            "a kernel with CONFIG_USER_NS; a container's seccomp profile may hide them",
        ),
        Attempt::Denied | Attempt::Failed(_) if settings.max_user_namespaces == Some(0) => about.missing(
            "none allowed (user.max_user_namespaces is 0)",
            meaning,
            "'sysctl -w user.max_user_namespaces=15000'",
        ),
        Attempt::Denied | Attempt::Failed(_) if settings.userns_clone == Some(0) => about.missing(
            "for root only (kernel.unprivileged_userns_clone is 0)",
            meaning,
            "'sysctl -w kernel.unprivileged_userns_clone=1'",
        ),
        Attempt::Denied | Attempt::Failed(_) if settings.apparmor_userns == Some(1) => about.missing(
            "without rights inside (kernel.apparmor_restrict_unprivileged_userns is 1)",
            meaning,
            "an AppArmor profile for atoll with 'userns,', or 'sysctl -w \
             kernel.apparmor_restrict_unprivileged_userns=0'",
        ),
        Attempt::Denied => about.missing(
            "denied to this user",
            meaning,
            "a container's seccomp profile or a security module denies them; allow unshare and clone there",
        ),
        Attempt::Failed(why) => {
            about.missing(format!("fail: {why}"), meaning, "look at 'dmesg' for what denied them")
        }
    }
}

fn tap(facts: &Facts) -> HostCheck {
    let about = About("tap", "Tap interfaces");
    let meaning = "machines cannot be put onto the host's network by this user";
    match (&facts.tun, facts.capabilities.has(Capability::NetAdmin)) {
        (Attempt::Works, true) => about.ok("may be made", "machines can be put onto the host's network"),
        (Attempt::Works, false) => about.missing(
            "/dev/net/tun opens, but this user may not make interfaces (CAP_NET_ADMIN)",
            meaning,
            "'ip tuntap add mode tap user NAME' as root makes one that this user may use",
        ),
        (Attempt::Absent, _) => about.missing(
            "/dev/net/tun does not exist",
            meaning,
            "'modprobe tun' as root; for a container, hand the device in",
        ),
        (Attempt::Denied, _) => about.missing(
            "/dev/net/tun may not be opened by this user",
            meaning,
            "'chmod 666 /dev/net/tun' as root: the kernel checks the right to each interface by itself",
        ),
        (Attempt::Failed(why), _) => {
            about.missing(format!("/dev/net/tun does not open: {why}"), meaning, "look at 'dmesg | grep tun'")
        }
    }
}

fn io_uring(facts: &Facts) -> HostCheck {
    let about = About("io-uring", "io_uring");
    let meaning = "disks are served by threads, which is what this version does everywhere";
    match &facts.io_uring {
        Attempt::Works => about.ok("works, tried", "disks can be served without a thread for each request"),
        Attempt::Absent => about.slow(
            "this kernel has none",
            meaning,
            "a kernel with CONFIG_IO_URING; a container's seccomp profile may hide it",
        ),
        Attempt::Denied | Attempt::Failed(_) => about.slow(
            match (&facts.io_uring, facts.settings.io_uring_disabled) {
                (_, Some(level)) if level > 0 => format!("denied (kernel.io_uring_disabled is {level})"),
                (Attempt::Failed(why), _) => format!("fails: {why}"),
                _ => "denied to this user".to_owned(),
            },
            meaning,
            "'sysctl -w kernel.io_uring_disabled=0'; for a container, allow io_uring_setup in its seccomp profile",
        ),
    }
}

/// Descriptors of a machine with a few disks, and then some.
const ENOUGH_FILES: u64 = 256;

fn open_files(facts: &Facts) -> HostCheck {
    let about = About("open-files", "Open files");
    let show = |limit: Option<u64>| limit.map_or("no limit".to_owned(), |limit| limit.to_string());
    let finding = format!("{} at once, at most {}", show(facts.open_files.soft), show(facts.open_files.hard));
    if facts.open_files.allows(ENOUGH_FILES) {
        return about.ok(finding, "a machine needs a few dozen, and one for each disk");
    }
    about.missing(
        finding,
        "a machine with several CPUs and disks may not start",
        "'ulimit -n 1024', LimitNOFILE= of a service, or nofile in /etc/security/limits.conf",
    )
}

#[cfg(test)]
mod tests {
    use atoll_api_types::CheckState;

    use super::super::facts::tests::{bare, cloud, server};
    use super::*;

    #[test]
    fn groups_need_version_two_delegation_and_controllers() {
        let mut facts = server();
        assert_eq!(cgroup(&facts).state, CheckState::Ok);
        facts.cgroup.controllers.retain(|name| name != "io");
        assert!(cgroup(&facts).finding.ends_with("without io"));
        facts.cgroup.delegated = false;
        assert!(cgroup(&facts).remedy.unwrap().contains("Delegate=yes"));
        facts.cgroup.version = CgroupVersion::V1;
        assert!(cgroup(&facts).remedy.unwrap().contains("unified_cgroup_hierarchy"));
    }

    #[test]
    fn what_takes_user_namespaces_away_is_named() {
        assert!(user_namespaces(&bare()).finding.contains("max_user_namespaces"));
        assert!(user_namespaces(&cloud()).remedy.unwrap().contains("AppArmor"));
        let mut debian = cloud();
        debian.settings.userns_clone = Some(0);
        assert!(user_namespaces(&debian).finding.contains("unprivileged_userns_clone"));
        assert_eq!(user_namespaces(&server()).state, CheckState::Ok);
    }

    #[test]
    fn an_interface_takes_the_device_and_the_right() {
        assert_eq!(tap(&server()).state, CheckState::Ok);
        assert!(tap(&cloud()).remedy.unwrap().contains("ip tuntap add"));
        assert!(tap(&bare()).remedy.unwrap().contains("modprobe tun"));
        let closed = Facts { tun: Attempt::Denied, ..server() };
        assert!(tap(&closed).remedy.unwrap().contains("chmod"));
    }

    #[test]
    fn rings_and_files_are_judged_by_what_was_tried_and_by_the_limit() {
        assert!(io_uring(&bare()).finding.contains("io_uring_disabled is 2"));
        assert_eq!(io_uring(&server()).state, CheckState::Ok);
        assert_eq!(open_files(&bare()).state, CheckState::Missing);
        let endless = atoll_foundation::host::limits::Limit { soft: None, hard: None };
        assert!(open_files(&Facts { open_files: endless, ..bare() }).finding.starts_with("no limit"));
    }
}
