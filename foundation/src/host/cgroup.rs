//! Control groups: which version, and what this process may do in its own.

use std::fs;
use std::path::{Path, PathBuf};

/// Which hierarchy the host has mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupVersion {
    /// None.
    Absent,
    /// Version 1 only, or with an empty hierarchy of version 2 beside it.
    V1,
    /// Version 2.
    V2,
}

/// This process's place in the control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// Which hierarchy.
    pub version: CgroupVersion,
    /// Controllers that this process's group has; version 2 only.
    pub controllers: Vec<String>,
    /// This user may make groups below its own; version 2 only.
    pub delegated: bool,
}

/// Looks at the host and at this process's group.
pub fn read() -> Cgroup {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    read_in(Path::new("/sys/fs/cgroup"), &own)
}

fn read_in(root: &Path, own: &str) -> Cgroup {
    let nothing = |version| Cgroup { version, controllers: Vec::new(), delegated: false };
    if !root.join("cgroup.controllers").exists() {
        let v1 = own.lines().any(|line| !line.starts_with("0::"));
        return nothing(if v1 { CgroupVersion::V1 } else { CgroupVersion::Absent });
    }
    let Some(group) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return nothing(CgroupVersion::V2);
    };
    let group: PathBuf = root.join(group);
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    Cgroup {
        version: CgroupVersion::V2,
        controllers: controllers.split_whitespace().map(str::to_owned).collect(),
        delegated: may_write(&group) && may_write(&group.join("cgroup.subtree_control")),
    }
}

fn may_write(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_two_has_controllers_and_may_be_delegated() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("user.slice/session-1.scope");
        fs::create_dir_all(&group).unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        fs::write(group.join("cgroup.controllers"), "memory pids\n").unwrap();
        fs::write(group.join("cgroup.subtree_control"), "").unwrap();
        let cgroup = read_in(root.path(), "0::/user.slice/session-1.scope\n");
        assert_eq!(cgroup.version, CgroupVersion::V2);
        assert_eq!(cgroup.controllers, ["memory", "pids"]);
        assert!(cgroup.delegated);
        fs::remove_file(group.join("cgroup.subtree_control")).unwrap();
        assert!(!read_in(root.path(), "0::/user.slice/session-1.scope\n").delegated);
    }

    #[test]
    fn version_one_is_told_from_none() {
        let root = tempfile::tempdir().unwrap();
        let hybrid = "9:name=systemd:/\n8:pids:/\n4:memory:/docker/7a\n0::/\n";
        assert_eq!(read_in(root.path(), hybrid).version, CgroupVersion::V1);
        assert_eq!(read_in(root.path(), "0::/\n").version, CgroupVersion::Absent);
        assert_eq!(read_in(root.path(), "").version, CgroupVersion::Absent);
    }
}
