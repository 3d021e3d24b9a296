//! `atoll cpus`: the CPU models, and whether the software CPU and KVM can give them on this host.

use std::fmt::Write;

use atoll_vmm::{Given, ModelInfo};
use serde::Serialize;

use crate::VerbResult;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

/// What one accelerator says of one model.
#[derive(Serialize)]
struct Answer {
    available: bool,
    /// Features that are missing.
    missing: Option<String>,
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    default: bool,
    description: &'static str,
    software: Answer,
    /// `null` where this host has no usable KVM.
    kvm: Option<Answer>,
}

impl From<Given> for Answer {
    fn from(given: Given) -> Self {
        Self { available: given.is_ok(), missing: given.err() }
    }
}

impl From<ModelInfo> for Row {
    fn from(model: ModelInfo) -> Self {
        Self {
            name: model.name,
            default: model.name == atoll_api_types::DEFAULT_CPU,
            description: model.description,
            software: model.software.into(),
            kvm: model.kvm.map(Answer::from),
        }
    }
}

impl Row {
    /// The accelerators that this host has, with their answers.
    fn answers(&self) -> impl Iterator<Item = (&'static str, &Answer)> {
        [("software", &self.software)].into_iter().chain(self.kvm.as_ref().map(|kvm| ("kvm", kvm)))
    }
}

pub(crate) fn run(args: &Args) -> VerbResult {
    let rows: Vec<Row> = atoll_vmm::cpu_models().into_iter().map(Row::from).collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows).map_err(anyhow::Error::from)?);
    } else {
        print!("{}", table(&rows));
    }
    Ok(0)
}

/// A line for each model, then what is missing.
fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max("MODEL".len());
    let mut text = format!("{:width$}", "MODEL");
    for (accelerator, _) in rows.first().iter().flat_map(|row| row.answers()) {
        let _ = write!(text, "  {:8}", accelerator.to_uppercase());
    }
    text += "  WHAT IT IS\n";
    let mut notes = String::new();
    for row in rows {
        let _ = write!(text, "{:width$}", row.name);
        for (accelerator, answer) in row.answers() {
            let _ = write!(text, "  {:8}", if answer.available { "yes" } else { "no" });
            if let Some(missing) = &answer.missing {
                let _ = writeln!(notes, "{} on {accelerator} lacks {missing}", row.name);
            }
        }
        let default = if row.default { " (default)" } else { "" };
        let _ = writeln!(text, "  {}{default}", row.description);
    }
    text + &notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, software: Given, kvm: Option<Given>) -> Row {
        ModelInfo { name, description: "some processor", software, kvm }.into()
    }

    #[test]
    fn each_accelerator_has_a_column_and_what_it_lacks_is_named() {
        let rows = [
            row("atoll-base", Ok(()), Some(Err("avx2, bmi2".to_owned()))),
            row("host", Ok(()), Some(Ok(()))),
        ];
        let expected = "MODEL       SOFTWARE  KVM       WHAT IT IS\n\
                        atoll-base  yes       no        some processor (default)\n\
                        host        yes       yes       some processor\n\
                        atoll-base on kvm lacks avx2, bmi2\n";
        assert_eq!(table(&rows), expected);
    }

    #[test]
    fn without_kvm_there_is_no_column_for_it() {
        let text = table(&[row("host", Err("sse2".to_owned()), None)]);
        assert!(!text.contains("KVM") && text.contains("host on software lacks sse2"), "{text}");
    }
}
