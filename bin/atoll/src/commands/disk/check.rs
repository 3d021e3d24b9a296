//! `atoll disk check`: damage in a qcow2 image.

use std::path::PathBuf;

use atoll_storage::DiskFormat;
use atoll_storage::images::{check, info, repair};
use atoll_storage::qcow2::CheckReport;
use serde::Serialize;

use super::{open_failure, plain};
use crate::VerbResult;
use crate::failure::Failure;

const EXIT_CODES: &str = "\
Exit codes: 0 nothing is wrong, or everything is mended; 1 something is wrong;
2 wrong usage, or an image that cannot be checked.";

#[derive(clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Args {
    /// The image
    path: PathBuf,
    /// Mend reference counts: give lost space back, protect data counted as free
    #[arg(long)]
    repair: bool,
    /// Format of the image, if its name does not say it
    #[arg(long)]
    format: Option<DiskFormat>,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

/// What programs are told.
#[derive(Serialize)]
struct Report<'a> {
    used_clusters: u64,
    leaked_clusters: u64,
    undercounted_clusters: u64,
    wrong_flags: u64,
    damage: &'a [String],
    /// Whether all that is wrong was mended.
    repaired: bool,
}

pub(super) fn run(args: &Args) -> VerbResult {
    let found = info(&args.path, args.format).map_err(open_failure)?;
    let Some(image) = found.qcow2 else {
        return Err(Failure::input(format_args!(
            "disk image '{}' is raw: it has no structure that could be damaged",
            plain(&args.path.to_string_lossy())
        )));
    };
    let report = if args.repair { repair(&args.path) } else { check(&args.path) }.map_err(open_failure)?;
    let marked = image.dirty || image.marked_corrupt;
    let repaired = args.repair && report.damage.is_empty();
    if args.json {
        let report = Report {
            used_clusters: report.used_clusters,
            leaked_clusters: report.leaked_clusters,
            undercounted_clusters: report.undercounted_clusters,
            wrong_flags: report.wrong_flags,
            damage: &report.damage,
            repaired,
        };
        println!("{}", serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)?);
    } else {
        print!("{}", text(&report, marked, repaired));
    }
    Ok(u8::from(!repaired && (marked || !report.is_clean())))
}

/// A line for each kind of what is wrong, and what to do about all of it.
fn text(report: &CheckReport, marked: bool, repaired: bool) -> String {
    let mut lines: Vec<String> =
        report.damage.iter().map(|text| format!("damage: {}", plain(text))).collect();
    let mut count = |number: u64, what: &str| {
        if number != 0 {
            lines.push(format!("{number} {what}"));
        }
    };
    count(report.undercounted_clusters, "clusters are used and counted as free: writing could destroy data");
    count(report.wrong_flags, "entries have a wrong flag");
    count(report.leaked_clusters, "clusters are counted and not used: space is lost, nothing else");
    if marked {
        lines.push("the image is marked as not closed properly, or as corrupt".to_owned());
    }
    lines.push(match () {
        () if lines.is_empty() => format!("nothing is wrong; {} clusters are in use", report.used_clusters),
        () if repaired => "all of it is mended".to_owned(),
        () if report.damage.is_empty() => "--repair mends all of it".to_owned(),
        () => "this cannot be repaired; copy what can be read with 'atoll disk convert'".to_owned(),
    });
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_with_what_to_do() {
        let clean = CheckReport { used_clusters: 7, ..Default::default() };
        assert_eq!(text(&clean, false, false), "nothing is wrong; 7 clusters are in use\n");
        assert!(text(&clean, true, false).ends_with("--repair mends all of it\n"));
        let leaked = CheckReport { leaked_clusters: 3, ..Default::default() };
        let said = text(&leaked, false, true);
        assert_eq!(
            said,
            "3 clusters are counted and not used: space is lost, nothing else\nall of it is mended\n"
        );
        let damaged = CheckReport { damage: vec!["a\nb".to_owned()], ..leaked };
        let said = text(&damaged, false, false);
        assert!(said.starts_with("damage: a\\nb\n") && said.contains("cannot be repaired"), "{said}");
    }
}
