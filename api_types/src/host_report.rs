//! What a host gives to machines: the document that `atoll doctor --json` prints.

use serde::{Deserialize, Serialize};

/// The version of [`HostReport`] that this code writes. It is raised when a field changes its meaning or goes; new
/// fields and new checks do not raise it.
pub const HOST_REPORT_VERSION: u32 = 1;

/// A host, looked at item by item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Version of this document: [`HOST_REPORT_VERSION`].
    pub version: u32,
    /// What `--accel auto` takes on this host: `kvm` or `software`.
    pub accelerator: String,
    /// What was looked at, in the order in which people want to read it.
    pub checks: Vec<HostCheck>,
}

/// One thing that a host has or lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCheck {
    /// What it is, for programs: lower-case words joined by `-`. It does not change between versions.
    pub id: String,
    /// What it is, for people.
    pub title: String,
    /// Whether it is as Atoll would have it.
    pub state: CheckState,
    /// What was found.
    pub finding: String,
    /// What that means for machines.
    pub meaning: String,
    /// How to mend it; there is one unless the state is `ok`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// Whether something is as Atoll would have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckState {
    /// It is.
    Ok,
    /// Machines run, and slower than they could.
    Slow,
    /// Something is not to be had: what needs it is refused.
    Missing,
}

impl CheckState {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Slow => "slow",
            Self::Missing => "missing",
        }
    }
}

impl HostReport {
    /// How many checks have `state`.
    pub fn count(&self, state: CheckState) -> usize {
        self.checks.iter().filter(|check| check.state == state).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back_and_a_newer_one_is_still_read() {
        let check = HostCheck {
            id: "kvm".to_owned(),
            title: "KVM".to_owned(),
            state: CheckState::Missing,
            finding: "/dev/kvm does not exist".to_owned(),
            meaning: "machines run on the software CPU".to_owned(),
            remedy: Some("load it".to_owned()),
        };
        let report = HostReport { version: 1, accelerator: "software".to_owned(), checks: vec![check] };
        let text = serde_json::to_string(&report).unwrap();
        assert!(text.contains(r#""state":"missing""#), "{text}");
        assert_eq!(serde_json::from_str::<HostReport>(&text).unwrap(), report);
        let newer = text.replacen('{', r#"{"seen_at": 5, "#, 1);
        assert_eq!(serde_json::from_str::<HostReport>(&newer).unwrap(), report);
        assert_eq!((report.count(CheckState::Missing), report.count(CheckState::Ok)), (1, 0));
    }

    #[test]
    fn states_are_spelled_alike_everywhere() {
        for state in [CheckState::Ok, CheckState::Slow, CheckState::Missing] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
