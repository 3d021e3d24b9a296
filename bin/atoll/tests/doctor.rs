//! `atoll doctor` as a user meets it, on whatever host this runs.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use atoll_api_types::{CheckState, HOST_REPORT_VERSION, HostReport};

fn doctor(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll"));
    command.arg("doctor").args(words).stdin(Stdio::null()).output().unwrap()
}

fn report() -> HostReport {
    let output = doctor(&["--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_document_is_of_the_promised_version_and_names_a_remedy_for_whatever_is_not_well() {
    let report = report();
    assert_eq!(report.version, HOST_REPORT_VERSION);
    assert!(["kvm", "software"].contains(&report.accelerator.as_str()), "{}", report.accelerator);
    assert!(report.checks.len() >= 20, "{}", report.checks.len());
    for check in report.checks {
        assert_eq!(check.remedy.is_some(), check.state != CheckState::Ok, "{check:?}");
    }
}

#[test]
fn the_text_names_every_check_and_has_no_colour_where_there_is_no_terminal() {
    let output = doctor(&[]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains('\x1b'), "{text}");
    for check in report().checks {
        let line =
            text.lines().find(|line| line.starts_with(check.state.name()) && line.contains(&check.title));
        assert!(line.is_some(), "{} is not in\n{text}", check.title);
    }
}

#[test]
fn what_it_found_is_what_runs_find() {
    let report = report();
    let kvm = report.checks.iter().find(|check| check.id == "kvm").unwrap();
    assert_eq!(kvm.state == CheckState::Ok, report.accelerator == "kvm");
    let pool = report.checks.iter().find(|check| check.id == "huge-page-pools").unwrap();
    let reserved = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    if reserved.trim() != "0" && !reserved.is_empty() {
        assert_eq!(pool.state, CheckState::Ok, "{pool:?}");
    }
}

#[test]
fn wrong_usage_is_the_only_failure() {
    assert_eq!(doctor(&["--fast"]).status.code(), Some(2));
    assert_eq!(doctor(&["now"]).status.code(), Some(2));
}

/// What the doctor promises is half a second; a busy machine that runs other tests is given five.
#[test]
fn it_is_quick() {
    let begin = Instant::now();
    doctor(&[]);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}
