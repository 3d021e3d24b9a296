//! `atoll cpus`: the CPU models and whether this host can give them.

use serde::Serialize;

use crate::VerbResult;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    default: bool,
    available: bool,
    /// Features that this host lacks.
    missing: Option<String>,
    description: &'static str,
}

pub(crate) fn run(args: &Args) -> VerbResult {
    let rows: Vec<Row> = atoll_vmm::cpu_models()
        .into_iter()
        .map(|model| Row {
            name: model.name,
            default: model.name == atoll_api_types::DEFAULT_CPU,
            available: model.missing.is_none(),
            missing: model.missing,
            description: model.description,
        })
        .collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows).map_err(anyhow::Error::from)?);
        return Ok(0);
    }
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    for row in rows {
        let state = match &row.missing {
            None if row.default => "default".to_owned(),
            None => "available".to_owned(),
            Some(missing) => format!("not on this host: needs {missing}"),
        };
        println!("{:width$}  {}  [{state}]", row.name, row.description);
    }
    Ok(0)
}
