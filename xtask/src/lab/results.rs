//! What tests in the lab say about themselves: lines of Rust's test harness, of `xtask boot`, and the conformance
//! suite's list of what it skipped.

use std::fmt;

/// How many tests ended how.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) passed: usize,
    pub(super) failed: usize,
    pub(super) ignored: usize,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.ignored > 0 {
            write!(f, ", {} ignored", self.ignored)?;
        }
        Ok(())
    }
}

/// What one line of the console is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Passed,
    Failed,
    Ignored,
    /// Not a test's end, but worth showing: figures, skipped cases.
    Remark,
    /// Everything else: kept in the log.
    Other,
}

/// Reads one line. Tests end with `test NAME ... ok`, `guest NAME ... FAILED (1.0 s): why` and the like.
pub(super) fn read(line: &str) -> Line {
    let is_test = line.starts_with("test ") || line.starts_with("guest ");
    if is_test && let Some((_, outcome)) = line.split_once(" ... ") {
        return match outcome.split_whitespace().next() {
            Some("ok") => Line::Passed,
            Some(word) if word.starts_with("ignored") => Line::Ignored,
            Some(_) => Line::Failed,
            None => Line::Other,
        };
    }
    const REMARKS: [&str; 9] = [
        "skipped ",
        "FAILED ",
        "  init after",
        "  login prompt",
        "  memory:",
        "hammer:",
        "moves:",
        "lab:",
        "thread '",
    ];
    if REMARKS.iter().any(|r| line.starts_with(r)) || line.contains(" passed, ") {
        return Line::Remark;
    }
    Line::Other
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_tests_are_read_in_both_forms() {
        assert_eq!(read("test state::tests::round_trip ... ok"), Line::Passed);
        assert_eq!(read("test kvm_conforms ... FAILED"), Line::Failed);
        assert_eq!(read("test slow ... ignored, long: minutes"), Line::Ignored);
        assert_eq!(read("guest kernel 6.1-cloud with 2 vCPU reaches init ... ok (9.1 s)"), Line::Passed);
        assert_eq!(read("guest shell ... FAILED (2.0 s): no \"x\" ... at all"), Line::Failed);
    }

    #[test]
    fn figures_are_shown_and_other_lines_are_not() {
        assert_eq!(read("  init after 5.1 s"), Line::Remark);
        assert_eq!(read("62 passed, 0 failed, 3 skipped"), Line::Remark);
        assert_eq!(read("[    0.1] test of the kernel"), Line::Other);
        assert_eq!(read("running 4 tests"), Line::Other);
    }
}
