//! Runs a suite to its end on either side, going on behind a case that crashes or hangs, and compares.

use crate::case::Suite;
use crate::{deviations, kernel, on_atoll, on_qemu, record};

/// Cases after which a kernel may be lost before the rest of a suite is given up.
const MAX_LOST: usize = 200;

/// What runs a kernel and returns what it wrote to the serial port.
pub type Runner = fn(&[u8]) -> anyhow::Result<String>;

/// One line per case; `None` for a case that was never left: the kernel crashed or hung in it.
///
/// # Errors
/// If the kernel cannot be built or `runner` fails.
pub fn lines(suite: &Suite, runner: Runner) -> anyhow::Result<Vec<Option<String>>> {
    let count = suite.names().count();
    let mut lines = vec![None; count];
    let (mut first, mut lost) = (0, 0);
    while first < count && lost < MAX_LOST {
        let mut next = first;
        for (index, numbers) in record::parse(suite.width, &runner(&kernel(suite, first)?)?) {
            if index == next && index < count {
                lines[index] = Some(record::line(suite, index, &numbers));
                next += 1;
            }
        }
        first = next + 1;
        lost += 1;
    }
    Ok(lines)
}

/// The outcome of a case on both sides.
pub struct Difference {
    /// The case's number in its suite.
    pub index: usize,
    /// The software CPU's line.
    pub ours: Option<String>,
    /// The reference's.
    pub theirs: Option<String>,
    /// Whether a known deviation explains it.
    pub known: bool,
}

/// Runs `suite` on both sides at once and returns where they differ.
///
/// # Errors
/// If one side cannot run.
pub fn compare(suite: &Suite) -> anyhow::Result<Vec<Difference>> {
    let (ours, theirs) = std::thread::scope(|scope| {
        let theirs = scope.spawn(|| lines(suite, on_qemu::run));
        let ours = lines(suite, on_atoll::run);
        (ours, theirs.join())
    });
    let theirs = theirs.map_err(|_| anyhow::anyhow!("the thread of the reference failed"))??;
    let same = |line: &Option<String>| line.as_deref().map(record::without_rf);
    let pairs = suite.names().zip(ours?.into_iter().zip(theirs)).enumerate();
    Ok(pairs
        .filter(|(_, (_, (ours, theirs)))| same(ours) != same(theirs))
        .map(|(index, (name, (ours, theirs)))| {
            let known = deviations::explaining(name, ours.as_deref(), theirs.as_deref()).is_some();
            Difference { index, ours, theirs, known }
        })
        .collect())
}
