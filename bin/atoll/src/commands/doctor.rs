//! `atoll doctor`: what this host gives to machines, what will be slow or refused, and how to mend it.
//!
//! Facts are gathered first (`facts`), then judged by pure functions (`processor`, `memory`, `rights`) into the
//! document of `atoll-api-types`, and rendered last. Nothing on the host is changed.

mod facts;
mod memory;
mod processor;
mod rights;

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

use atoll_api_types::{Accelerator, CheckState, HOST_REPORT_VERSION, HostCheck, HostReport};
use atoll_foundation::terminal;
use atoll_vmm::Choice;

use crate::VerbResult;
use facts::Facts;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> VerbResult {
    let facts = Facts::gather();
    let report = report(&facts);
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)? + "\n"
    } else {
        render(&report, facts.choice(Accelerator::Auto).as_ref(), &Look::of_stdout())
    };
    // A reader that has seen enough is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(0)
}

/// Judges every fact.
fn report(facts: &Facts) -> HostReport {
    let mut checks = processor::checks(facts);
    checks.extend(memory::checks(facts));
    checks.extend(rights::checks(facts));
    let accelerator = facts.choice(Accelerator::Auto).map_or("software", |choice| choice.backend.name());
    HostReport { version: HOST_REPORT_VERSION, accelerator: accelerator.to_owned(), checks }
}

/// A check that is being made: what it is about. The functions say how it ended.
struct About(&'static str, &'static str);

impl About {
    fn ok(&self, finding: impl Into<String>, meaning: impl Into<String>) -> HostCheck {
        self.check(CheckState::Ok, finding.into(), meaning.into(), None)
    }

    fn slow(
        &self,
        finding: impl Into<String>,
        meaning: impl Into<String>,
        remedy: impl Into<String>,
    ) -> HostCheck {
        self.check(CheckState::Slow, finding.into(), meaning.into(), Some(remedy.into()))
    }

    fn missing(
        &self,
        finding: impl Into<String>,
        meaning: impl Into<String>,
        remedy: impl Into<String>,
    ) -> HostCheck {
        self.check(CheckState::Missing, finding.into(), meaning.into(), Some(remedy.into()))
    }

    fn check(
        &self,
        state: CheckState,
        finding: String,
        meaning: String,
        remedy: Option<String>,
    ) -> HostCheck {
        HostCheck { id: self.0.to_owned(), title: self.1.to_owned(), state, finding, meaning, remedy }
    }
}

/// How the text looks.
struct Look {
    /// Columns of a line.
    width: usize,
    colour: bool,
}

impl Look {
    /// Lines longer than this are hard to read, however wide the terminal is.
    const MAX_WIDTH: usize = 110;

    fn of_stdout() -> Self {
        let columns = terminal::window_size(std::io::stdout()).map_or(0, |size| usize::from(size.columns));
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { width: if columns < 40 { Self::MAX_WIDTH } else { columns.min(Self::MAX_WIDTH) }, colour }
    }

    fn state(&self, state: CheckState) -> String {
        let colour = match state {
            CheckState::Ok => "32",
            CheckState::Slow => "33",
            CheckState::Missing => "31",
        };
        let word = format!("{:STATE_WIDTH$}", state.name());
        if self.colour { format!("\x1b[{colour}m{word}\x1b[0m") } else { word }
    }
}

const STATE_WIDTH: usize = 7;

/// The report for people: a line per check, and for those that are not well what it means and what mends it.
fn render(report: &HostReport, accelerator: Option<&Choice>, look: &Look) -> String {
    let titles = report.checks.iter().map(|check| check.title.len()).max().unwrap_or(0);
    let indent = STATE_WIDTH + 2 + titles + 2;
    let mut text = String::new();
    let mut paragraph = |first: &str, used: usize, indent: usize, words: &str| {
        let _ = write!(text, "{first}");
        wrap(&mut text, words, used, indent, look.width);
    };
    if let Some(choice) = accelerator {
        let name = choice.backend.title();
        paragraph("", 0, 0, &format!("Machines run here on {name} by default, because {}", choice.why));
        paragraph("", 0, 0, "");
    }
    for check in &report.checks {
        let head = format!("{}  {:titles$}  ", look.state(check.state), check.title);
        paragraph(&head, indent, indent, &check.finding);
        if let Some(remedy) = &check.remedy {
            let margin = " ".repeat(indent);
            paragraph(&margin, indent, indent, &check.meaning);
            paragraph(&format!("{margin}To mend: "), indent + 9, indent, remedy);
        }
    }
    paragraph("", 0, 0, "");
    let (ok, slow) = (report.count(CheckState::Ok), report.count(CheckState::Slow));
    let missing = report.count(CheckState::Missing);
    let ending = format!("{ok} ok, {slow} slow, {missing} missing. 'atoll run' works with what is there.");
    paragraph("", 0, 0, &ending);
    text
}

/// Appends `words`, broken into lines of `width` columns, to a line of which `used` columns are used. Further lines
/// begin with `indent` spaces.
fn wrap(text: &mut String, words: &str, used: usize, indent: usize, width: usize) {
    let (mut column, mut first) = (used, true);
    for word in words.split(' ') {
        let length = word.chars().count();
        if !first && column + 1 + length > width {
            let _ = write!(text, "\n{:indent$}", "");
            column = indent;
        } else if !first {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
        first = false;
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn every_host() -> Vec<Facts> {
        vec![Facts::gather(), facts::tests::server(), facts::tests::bare(), facts::tests::cloud()]
    }

    #[test]
    fn whatever_is_not_well_has_a_remedy_and_every_check_is_one_line_each() {
        for facts in every_host() {
            let report = report(&facts);
            for check in &report.checks {
                assert_eq!(check.remedy.is_none(), check.state == CheckState::Ok, "{check:?}");
                let parts = [&check.finding, &check.meaning, check.remedy.as_ref().unwrap_or(&check.finding)];
                for part in parts {
                    assert!(!part.is_empty() && !part.contains('\n') && !part.ends_with('.'), "{check:?}");
                    assert!(part.len() < 400, "{check:?}");
                }
            }
        }
    }

    #[test]
    fn every_host_is_asked_the_same_questions() {
        let ids = |facts: &Facts| report(facts).checks.into_iter().map(|c| c.id).collect::<Vec<_>>();
        let hosts = every_host();
        let first = ids(&hosts[0]);
        assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), first.len(), "an id twice: {first:?}");
        for host in &hosts {
            assert_eq!(ids(host), first);
        }
        for id in first {
            assert!(id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{id}");
        }
    }

    #[test]
    fn a_good_server_is_well_and_a_bare_host_lacks_nearly_everything() {
        let server = report(&facts::tests::server());
        assert_eq!(server.count(CheckState::Ok), server.checks.len(), "{:#?}", server.checks);
        assert_eq!(server.accelerator, "kvm");
        let bare = report(&facts::tests::bare());
        assert_eq!(bare.accelerator, "software");
        assert!(bare.count(CheckState::Missing) >= 12, "{:#?}", bare.checks);
    }

    #[test]
    fn the_text_is_aligned_wrapped_and_plain() {
        let facts = facts::tests::bare();
        let choice = facts.choice(Accelerator::Auto).unwrap();
        let text = render(&report(&facts), Some(&choice), &Look { width: 80, colour: false });
        assert!(text.starts_with("Machines run here on the software CPU by default, because "), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80 || !line.trim().contains(' ')), "{text}");
        assert!(text.lines().all(|line| line.trim_end() == line), "{text}");
        assert!(!text.contains('\x1b') && text.contains("To mend: "));
        let coloured = render(&report(&facts), None, &Look { width: 80, colour: true });
        assert!(coloured.contains("\x1b[31mmissing\x1b[0m"));
    }

    #[test]
    fn long_words_are_not_broken_and_short_lines_not_wrapped() {
        let mut text = String::new();
        wrap(&mut text, "aa bb cccccccccccc dd", 2, 2, 8);
        assert_eq!(text, "aa bb\n  cccccccccccc\n  dd\n");
    }
}
